//! Netlink messages: building them with attributes, and reading them with bounds checks.
//!
//! Invariants: everything is padded to 4 bytes; an attribute that grows past its 16-bit length is remembered and makes
//! the message unsendable instead of wrapping around; a reader never looks past a length it was given.

/// Length of `struct nlmsghdr`.
pub(crate) const HEADER: usize = 16;
/// Length of an attribute's header.
const ATTR_HEADER: usize = 4;
/// Attribute flag: the payload is attributes.
const NESTED: u16 = 0x8000;
/// The bits of an attribute's type that are not flags.
const TYPE_MASK: u16 = 0x3fff;

/// One message under construction. Length and sequence number are filled in when it is sent.
#[derive(Clone, Debug)]
pub(crate) struct Message {
    bytes: Vec<u8>,
    too_long: bool,
}

impl Message {
    /// A message of this type with these flags and this fixed header.
    pub(crate) fn new(kind: u16, flags: u16, body: &[u8]) -> Self {
        let mut bytes = Vec::with_capacity(256);
        bytes.extend(0u32.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend([0; 8]);
        let mut message = Self { bytes, too_long: false };
        message.raw(body);
        message
    }

    /// Appends bytes as they are, padded.
    pub(crate) fn raw(&mut self, body: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(body);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }

    /// Appends an attribute.
    pub(crate) fn attr(&mut self, kind: u16, payload: &[u8]) -> &mut Self {
        let start = self.open(kind);
        self.bytes.extend_from_slice(payload);
        self.close(start)
    }

    /// Appends a number in the machine's byte order: rtnetlink's way.
    pub(crate) fn u32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.attr(kind, &value.to_ne_bytes())
    }

    /// Appends a number in network byte order: nf_tables' way.
    pub(crate) fn be32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.attr(kind, &value.to_be_bytes())
    }

    /// Appends a string with its closing zero.
    pub(crate) fn str(&mut self, kind: u16, value: &str) -> &mut Self {
        let start = self.open(kind);
        self.bytes.extend_from_slice(value.as_bytes());
        self.bytes.push(0);
        self.close(start)
    }

    /// Appends an attribute that holds what `fill` appends.
    pub(crate) fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) -> &mut Self {
        let start = self.open(kind | NESTED);
        fill(self);
        self.close(start)
    }

    /// The finished bytes, or nothing if an attribute is too long to exist.
    pub(crate) fn finish(mut self, sequence: u32) -> Option<Vec<u8>> {
        let length = u32::try_from(self.bytes.len()).ok()?;
        self.bytes[..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        (!self.too_long).then_some(self.bytes)
    }

    /// Adds flags to those the message has.
    pub(crate) fn add_flags(&mut self, flags: u16) {
        let old = u16::from_ne_bytes([self.bytes[6], self.bytes[7]]);
        self.bytes[6..8].copy_from_slice(&(old | flags).to_ne_bytes());
    }

    /// Bytes so far.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    fn open(&mut self, kind: u16) -> usize {
        let start = self.bytes.len();
        self.bytes.extend([0; 2]);
        self.bytes.extend(kind.to_ne_bytes());
        start
    }

    fn close(&mut self, start: usize) -> &mut Self {
        let length = u16::try_from(self.bytes.len() - start).unwrap_or_else(|_| {
            self.too_long = true;
            0
        });
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }
}

/// One received message.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Received<'a> {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) sequence: u32,
    pub(crate) payload: &'a [u8],
}

/// The messages of one datagram. Stops at the first that does not fit.
pub(crate) fn messages(mut datagram: &[u8]) -> impl Iterator<Item = Received<'_>> {
    std::iter::from_fn(move || {
        let length = usize::try_from(u32_at(datagram, 0)?).ok()?;
        let payload = datagram.get(HEADER..length)?;
        let received = Received {
            kind: u16_at(datagram, 4)?,
            flags: u16_at(datagram, 6)?,
            sequence: u32_at(datagram, 8)?,
            payload,
        };
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some(received)
    })
}

/// The attributes in `bytes`: type without flags, and payload. Stops at the first that does not fit.
pub(crate) fn attrs(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & TYPE_MASK;
        let payload = bytes.get(ATTR_HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some((kind, payload))
    })
}

/// The first attribute of this type.
pub(crate) fn attr(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attrs(bytes).find(|(k, _)| *k == kind).map(|(_, payload)| payload)
}

/// A string attribute without its closing zero.
pub(crate) fn text(payload: &[u8]) -> String {
    let end = payload.iter().position(|b| *b == 0).unwrap_or(payload.len());
    String::from_utf8_lossy(&payload[..end]).into_owned()
}

/// Two bytes at an offset, in the machine's order.
pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// Four bytes at an offset, in the machine's order.
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_built_can_be_read() {
        let mut m = Message::new(16, 1, &[9; 3]);
        m.u32(1, 7).str(2, "eth0").nested(3, |m| {
            m.be32(1, 8).attr(2, &[1, 2, 3]);
        });
        m.add_flags(4);
        let bytes = m.finish(42).unwrap();
        let all: Vec<_> = messages(&bytes).collect();
        assert_eq!(all.len(), 1);
        assert_eq!((all[0].kind, all[0].flags, all[0].sequence), (16, 5, 42));
        let body = &all[0].payload[4..];
        assert_eq!(u32_at(attr(body, 1).unwrap(), 0), Some(7));
        assert_eq!(text(attr(body, 2).unwrap()), "eth0");
        let inner = attr(body, 3).unwrap();
        assert_eq!(attr(inner, 1).unwrap(), 8u32.to_be_bytes());
        assert_eq!(attr(inner, 2).unwrap(), [1, 2, 3]);
        assert!(attr(body, 4).is_none());
    }

    #[test]
    fn an_attribute_too_long_to_exist_is_not_sent() {
        let mut m = Message::new(16, 1, &[]);
        m.nested(1, |m| {
            for _ in 0..3 {
                m.attr(1, &[0; 30_000]);
            }
        });
        assert!(m.finish(1).is_none());
    }

    proptest! {
        #[test]
        fn any_bytes_can_be_read(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            for message in messages(&bytes) {
                for (_, payload) in attrs(message.payload) {
                    let _ = text(payload);
                }
            }
            let _ = attrs(&bytes).count();
        }
    }
}
