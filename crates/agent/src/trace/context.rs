//! Trace context: W3C's header `traceparent` and Zipkin's `b3`, which a peer writes and we read.
//!
//! Invariant: parsing is total; what is not exactly a trace context is none.

use std::fmt;

/// Bytes of a header of version 00.
const LENGTH: usize = 55;

/// Which trace and span, and whether the trace is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpanContext {
    pub trace_id: [u8; 16],
    pub span_id: [u8; 8],
    pub sampled: bool,
}

impl SpanContext {
    /// `None` for identifiers that are all zero: those mean "none".
    pub fn new(trace_id: [u8; 16], span_id: [u8; 8], sampled: bool) -> Option<Self> {
        let some = trace_id != [0; 16] && span_id != [0; 8];
        some.then_some(Self { trace_id, span_id, sampled })
    }

    /// Reads a `traceparent`. A later version may have more behind a dash; version ff is none.
    pub fn parse(header: &[u8]) -> Option<Self> {
        let (own, more) = header.split_at_checked(LENGTH)?;
        let [version] = hex(own.get(..2)?)?;
        let fits = match version {
            0 => more.is_empty(),
            0xff => false,
            _ => more.is_empty() || more.starts_with(b"-"),
        };
        let dashes = [2, 35, 52].iter().all(|at| own.get(*at) == Some(&b'-'));
        if !fits || !dashes {
            return None;
        }
        let [flags] = hex(own.get(53..55)?)?;
        Self::new(hex(own.get(3..35)?)?, hex(own.get(36..52)?)?, flags & 1 == 1)
    }

    /// Reads Zipkin's header `b3`: trace, span, then perhaps whether it is sampled and the parent. A trace may have half
    /// the digits. Who leaves the decision to us has not sampled it.
    pub fn parse_b3(header: &[u8]) -> Option<Self> {
        let mut words = header.split(|b| *b == b'-');
        let (trace, span) = (words.next()?, words.next()?);
        let sampled = matches!(words.next(), Some(b"1" | b"d"));
        let trace_id = match hex::<8>(trace) {
            Some(half) => {
                let mut whole = [0; 16];
                whole[8..].copy_from_slice(&half);
                whole
            }
            None => hex(trace)?,
        };
        // The parent's span.
        let _ = words.next();
        words.next().is_none().then(|| Self::new(trace_id, hex(span)?, sampled)).flatten()
    }
}

impl fmt::Display for SpanContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("00-")?;
        self.trace_id.iter().try_for_each(|b| write!(f, "{b:02x}"))?;
        f.write_str("-")?;
        self.span_id.iter().try_for_each(|b| write!(f, "{b:02x}"))?;
        write!(f, "-{:02x}", u8::from(self.sampled))
    }
}

/// Lower-case digits only, as the specification has it.
fn hex<const N: usize>(digits: &[u8]) -> Option<[u8; N]> {
    let digit = |b: u8| match b {
        b'0'..=b'9' => Some(b - b'0'),
        b'a'..=b'f' => Some(b - b'a' + 10),
        _ => None,
    };
    let mut out = [0; N];
    if digits.len() != 2 * N {
        return None;
    }
    for (byte, pair) in out.iter_mut().zip(digits.as_chunks::<2>().0) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(out)
}
