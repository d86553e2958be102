//! A client of HTTP/2 that writes what no library would: frames by hand.

use hbone::TunnelIo;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::world::PATIENCE;

pub(crate) type Pair = (&'static [u8], &'static [u8]);

/// What became of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// An answer with a status of HPACK's static table, or 0.
    Status(u16),
    Reset(u32),
    GoAway(u32),
}

/// See the module.
pub(crate) struct Frames {
    pub(crate) io: TunnelIo,
}

/// Kinds of frames, and their flags (RFC 9113, 6).
pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const GOAWAY: u8 = 7;
#[allow(dead_code, reason = "for the floods")]
pub(crate) const CONTINUATION: u8 = 9;
pub(crate) const END_STREAM: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;

impl Frames {
    /// A request that would be served.
    pub(crate) const GET: [Pair; 4] = [
        (b":method", b"GET"),
        (b":scheme", b"http"),
        (b":authority", b"web.shop"),
        (b":path", b"/"),
    ];

    pub(crate) async fn new(mut io: TunnelIo) -> Self {
        io.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        let mut new = Self { io };
        new.frame(SETTINGS, 0, 0, &[]).await.unwrap();
        new.frame(SETTINGS, 1, 0, &[]).await.unwrap();
        new
    }

    pub(crate) async fn frame(
        &mut self,
        kind: u8,
        flags: u8,
        stream: u32,
        payload: &[u8],
    ) -> std::io::Result<()> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let mut bytes = vec![length[1], length[2], length[3], kind, flags];
        bytes.extend(stream.to_be_bytes());
        bytes.extend(payload);
        self.io.write_all(&bytes).await
    }

    pub(crate) async fn headers(&mut self, stream: u32, pairs: &[Pair], end: bool) {
        let flags = END_HEADERS | if end { END_STREAM } else { 0 };
        // The other end may have gone.
        let _ = self.frame(HEADERS, flags, stream, &block(pairs)).await;
    }

    pub(crate) async fn data(&mut self, stream: u32, bytes: &[u8], end: bool) {
        let _ = self.frame(DATA, u8::from(end), stream, bytes).await;
    }

    /// Waits for what becomes of a stream.
    pub(crate) async fn heard(&mut self, of: u32) -> Heard {
        let hearing = async {
            loop {
                let mut head = [0; 9];
                if self.io.read_exact(&mut head).await.is_err() {
                    return Heard::GoAway(0);
                }
                let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
                let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
                let mut payload = vec![0; length as usize];
                self.io.read_exact(&mut payload).await.unwrap();
                let number = |at: usize| {
                    let bytes = payload.get(at..at + 4).unwrap_or(&[0; 4]);
                    u32::from_be_bytes(bytes.try_into().unwrap())
                };
                match head[3] {
                    HEADERS if stream == of => return Heard::Status(status(&payload)),
                    RST_STREAM if stream == of => return Heard::Reset(number(0)),
                    GOAWAY if number(4) != 0 => return Heard::GoAway(number(4)),
                    _ => {}
                }
            }
        };
        tokio::time::timeout(PATIENCE, hearing).await.expect("nothing became of the stream")
    }
}

/// Each header as a literal without an index (RFC 7541, 6.2.2). Longer than 126 bytes is nothing here.
pub(crate) fn block(pairs: &[Pair]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in pairs {
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).unwrap());
            assert!(text.len() < 127);
            block.extend(*text);
        }
    }
    block
}

/// Answers begin with `:status` (RFC 7541, appendix A).
fn status(block: &[u8]) -> u16 {
    // A change of the table's size may come first.
    let first = block.iter().find(|b| **b & 0xe0 != 0x20);
    match first {
        Some(0x88) => 200,
        Some(0x8c) => 400,
        Some(0x8d) => 404,
        Some(0x8e) => 500,
        _ => 0,
    }
}
