//! TCP flows put together from segments in any order, and the check that a flow is a sequence of TLS records.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use super::Segment;

/// Bytes kept of one flow: far more than any check sends, and little enough for a test machine.
const MAX_FLOW: usize = 64 * 1024 * 1024;
/// Flows kept: a check looks at a handful.
const MAX_FLOWS: usize = 4096;
/// The longest TLS record: 16 KiB, and what TLS 1.2 allows on top for encryption.
const MAX_RECORD: usize = 16384 + 2048;
const RECORD_HEADER: usize = 5;

/// The flows seen, each direction of a connection by itself.
#[derive(Clone, Debug, Default)]
pub struct Flows {
    by_ends: BTreeMap<(SocketAddr, SocketAddr), Flow>,
    overflowed: bool,
}

/// One direction of one connection.
#[derive(Clone, Debug, Default)]
pub struct Flow {
    /// Sequence number of the first byte.
    start: Option<u32>,
    /// The beginning without a hole.
    bytes: Vec<u8>,
    /// Pieces that came before their time, by offset.
    later: BTreeMap<usize, Vec<u8>>,
    end: Option<usize>,
    truncated: bool,
    opened: bool,
}

/// Something of a flow is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Gap {
    /// The opening was not seen, so bytes may be missing in front.
    #[error("the opening of the flow was not captured")]
    Front,
    /// A segment was not captured.
    #[error("bytes from offset {0} on were not captured")]
    Hole(usize),
    /// The flow is longer than what is kept.
    #[error("the flow is longer than {MAX_FLOW} bytes")]
    TooLong,
}

/// One TLS record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TlsRecord {
    /// 20 change cipher spec, 21 alert, 22 handshake, 23 application data.
    pub kind: u8,
    /// Length of its content.
    pub length: usize,
}

/// A flow is not TLS.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("at byte {at} there is no TLS record but {found:02x?}")]
pub struct NotTls {
    /// Offset in the flow.
    pub at: usize,
    /// What is there instead, up to 16 bytes.
    pub found: Vec<u8>,
}

impl Flows {
    /// Adds what was seen.
    pub fn add(&mut self, segment: &Segment<'_>) {
        let ends = (segment.from, segment.to);
        if self.by_ends.len() >= MAX_FLOWS && !self.by_ends.contains_key(&ends) {
            self.overflowed = true;
            return;
        }
        self.by_ends.entry(ends).or_default().add(segment);
    }

    /// All flows, by (from, to).
    pub fn iter(&self) -> impl Iterator<Item = (SocketAddr, SocketAddr, &Flow)> {
        self.by_ends.iter().map(|((from, to), flow)| (*from, *to, flow))
    }

    /// Flows from or to a port.
    pub fn with_port(&self, port: u16) -> impl Iterator<Item = (SocketAddr, SocketAddr, &Flow)> {
        self.iter().filter(move |(from, to, _)| from.port() == port || to.port() == port)
    }

    /// Whether some flow carries these bytes in the clear.
    pub fn contain(&self, needle: &[u8]) -> bool {
        self.by_ends.values().any(|flow| flow.contains(needle))
    }

    /// Whether there were more flows than are kept.
    pub fn overflowed(&self) -> bool {
        self.overflowed
    }
}

impl Flow {
    /// The bytes from the first one seen up to the first hole.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Whether these bytes are in it, also behind a hole.
    pub fn contains(&self, needle: &[u8]) -> bool {
        std::iter::once(&self.bytes)
            .chain(self.later.values())
            .any(|piece| piece.windows(needle.len().max(1)).any(|window| window == needle))
    }

    /// Whether it ended in order and everything up to there was seen.
    pub fn is_finished(&self) -> bool {
        self.end == Some(self.bytes.len())
    }

    /// Says if something is missing in front or in the middle. What was not sent yet is not missing.
    pub fn check_whole(&self) -> Result<(), Gap> {
        if !self.opened {
            return Err(Gap::Front);
        }
        if self.truncated {
            return Err(Gap::TooLong);
        }
        let ends_later = self.end.is_some_and(|end| end > self.bytes.len());
        if self.later.is_empty() && !ends_later { Ok(()) } else { Err(Gap::Hole(self.bytes.len())) }
    }

    fn add(&mut self, segment: &Segment<'_>) {
        let first = segment.sequence.wrapping_add(u32::from(segment.syn));
        if segment.syn && !self.opened {
            *self = Self { start: Some(first), opened: true, ..Self::default() };
        }
        let start = *self.start.get_or_insert(first);
        // Before the start: a keep-alive probe or a repetition. Sequence numbers wrap, so "before" is "far ahead".
        let Ok(offset) =
            i32::try_from(first.wrapping_sub(start)).map(|o| o.unsigned_abs() as usize)
        else {
            return;
        };
        if offset + segment.payload.len() > MAX_FLOW {
            self.truncated = true;
            return;
        }
        if segment.fin {
            self.end = Some(offset + segment.payload.len());
        }
        if !segment.payload.is_empty() {
            let piece = self.later.entry(offset).or_default();
            if piece.len() < segment.payload.len() {
                *piece = segment.payload.to_vec();
            }
        }
        self.join();
    }

    /// Moves pieces to the beginning as far as they reach without a hole.
    fn join(&mut self) {
        while let Some(entry) = self.later.first_entry() {
            if *entry.key() > self.bytes.len() {
                return;
            }
            let (offset, piece) = entry.remove_entry();
            if let Some(new) = piece.get(self.bytes.len() - offset..) {
                self.bytes.extend_from_slice(new);
            }
        }
    }
}

/// Splits a flow into TLS records. The last one may be incomplete and is left out then, but its header must be right.
pub fn tls_records(flow: &[u8]) -> Result<Vec<TlsRecord>, NotTls> {
    let (mut records, mut at) = (Vec::new(), 0);
    while at < flow.len() {
        let rest = &flow[at..];
        let not_tls = || NotTls { at, found: rest[..rest.len().min(16)].to_vec() };
        let wrong_start = !matches!(rest, [20..=23] | [20..=23, 3] | [20..=23, 3, 1..=4, ..]);
        if wrong_start {
            return Err(not_tls());
        }
        let Some(header) = rest.get(..RECORD_HEADER) else { break };
        let record = TlsRecord {
            kind: header[0],
            length: usize::from(u16::from_be_bytes([header[3], header[4]])),
        };
        if record.length == 0 || record.length > MAX_RECORD {
            return Err(not_tls());
        }
        at += RECORD_HEADER + record.length;
        if at <= flow.len() {
            records.push(record);
        }
    }
    Ok(records)
}
