//! How far a client's connection is, and what was seen of its bytes: slow heads, idle connections, and two framings in one
//! head, which hyper takes for one.
//!
//! A head that has both a length and a transfer coding is what request smuggling is made of. hyper would drop the length and
//! go on, which is safe for this hop; but nobody sends both by mistake, so that it is refused and the connection closed
//! (RFC 9112, 6.3).

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::config::Waits;
use crate::io::PeerIo;

/// What the connection's own task, its reader and its requests tell each other.
#[derive(Debug)]
pub(crate) struct Progress {
    begun: Instant,
    /// Requests that are served.
    serving: AtomicUsize,
    /// When the first byte of a head came, in milliseconds since `begun`, and one; 0: none has.
    head: AtomicU64,
    /// When the last request ended, in the same way.
    idle: AtomicU64,
    /// Counts requests.
    requests: AtomicU32,
    /// The head that was read last has two framings.
    ambiguous: AtomicBool,
}

impl Progress {
    pub(crate) fn new() -> Self {
        Self {
            begun: Instant::now(),
            serving: AtomicUsize::new(0),
            head: AtomicU64::new(0),
            idle: AtomicU64::new(0),
            requests: AtomicU32::new(0),
            ambiguous: AtomicBool::new(false),
        }
    }

    /// A request has been read.
    pub(super) fn begin(&self) {
        self.serving.fetch_add(1, Ordering::Relaxed);
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.head.store(0, Ordering::Relaxed);
    }

    /// A request is over.
    pub(super) fn end(&self) {
        self.idle.store(self.now(), Ordering::Relaxed);
        self.serving.fetch_sub(1, Ordering::Relaxed);
    }

    /// Whether the request that has just been read had two framings.
    pub(super) fn take_ambiguous(&self) -> bool {
        self.ambiguous.swap(false, Ordering::Relaxed)
    }

    /// Whether a head, or the next request, has been waited for too long.
    pub(super) fn is_overdue(&self) -> bool {
        let since = |moment: u64| Duration::from_millis(self.now().saturating_sub(moment));
        if self.serving.load(Ordering::Relaxed) > 0 {
            return false;
        }
        match self.head.load(Ordering::Relaxed) {
            0 => since(self.idle.load(Ordering::Relaxed)) > Waits::IDLE,
            head => since(head) > Waits::HEAD,
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX).saturating_add(1)
    }
}

/// A client's stream, as hyper reads it.
#[derive(Debug)]
pub(crate) struct ClientIo {
    io: PeerIo,
    /// HTTP/1 only: an HTTP/2 connection has bytes without a request, and knows its own framing.
    progress: Option<Arc<Progress>>,
    /// Of the head that is being read.
    scan: Scan,
    /// How many requests there were when the scan began.
    requests: u32,
}

impl ClientIo {
    pub(super) fn new(io: PeerIo, progress: Option<Arc<Progress>>) -> Self {
        Self { io, progress, scan: Scan::default(), requests: 0 }
    }

    pub(super) fn into_inner(self) -> PeerIo {
        self.io
    }

    fn look(&mut self, bytes: &[u8]) {
        let Some(progress) = &self.progress else { return };
        // While a request is served its body comes; what follows it is looked at by hyper alone.
        if bytes.is_empty() || progress.serving.load(Ordering::Relaxed) > 0 {
            return;
        }
        let requests = progress.requests.load(Ordering::Relaxed);
        if self.requests != requests {
            (self.requests, self.scan) = (requests, Scan::default());
        }
        if progress.head.load(Ordering::Relaxed) == 0 {
            progress.head.store(progress.now(), Ordering::Relaxed);
        }
        self.scan.feed(bytes);
        if self.scan.length && self.scan.coding {
            progress.ambiguous.store(true, Ordering::Relaxed);
        }
    }
}

/// Looks for the names of two headers in a head that comes in pieces.
#[derive(Debug, Default)]
struct Scan {
    place: ScanPlace,
    length: bool,
    coding: bool,
}

#[derive(Debug, Default)]
enum ScanPlace {
    /// Before the request line, where empty lines are skipped.
    #[default]
    Start,
    /// In a line that is none of the two.
    Line,
    /// So many bytes into a line; all of them fit one of the names, or could be an empty line.
    Begin(usize, Name),
    /// Behind the head.
    Body,
}

#[derive(Clone, Copy, Debug, Default)]
enum Name {
    #[default]
    Unknown,
    Length,
    Coding,
}

impl Name {
    const fn bytes(self) -> &'static [u8] {
        match self {
            Self::Unknown => b"",
            Self::Length => b"content-length",
            Self::Coding => b"transfer-encoding",
        }
    }
}

impl Scan {
    fn feed(&mut self, mut bytes: &[u8]) {
        while let Some(first) = bytes.first() {
            match self.place {
                ScanPlace::Body => return,
                ScanPlace::Start if matches!(first, b'\r' | b'\n') => bytes = &bytes[1..],
                ScanPlace::Start => self.place = ScanPlace::Line,
                ScanPlace::Line => {
                    let Some(end) = bytes.iter().position(|b| *b == b'\n') else { return };
                    bytes = &bytes[end + 1..];
                    self.place = ScanPlace::Begin(0, Name::Unknown);
                }
                ScanPlace::Begin(seen, name) => {
                    self.place = self.step(*first, seen, name);
                    if !matches!(self.place, ScanPlace::Line) {
                        bytes = &bytes[1..];
                    }
                }
            }
        }
    }

    /// One byte at the beginning of a line. A line that turns out to be another is not moved past here.
    fn step(&mut self, byte: u8, seen: usize, name: Name) -> ScanPlace {
        let name = match (seen, byte.to_ascii_lowercase()) {
            (0, b'c') => Name::Length,
            (0, b't') => Name::Coding,
            (0, b'\n') => return ScanPlace::Body,
            (0, b'\r') => return ScanPlace::Begin(1, Name::Unknown),
            (1, b'\n') if matches!(name, Name::Unknown) => return ScanPlace::Body,
            _ => name,
        };
        match name.bytes().get(seen) {
            Some(wanted) if byte.eq_ignore_ascii_case(wanted) => ScanPlace::Begin(seen + 1, name),
            None if byte == b':' && seen > 1 => {
                match name {
                    Name::Length => self.length = true,
                    Name::Coding => self.coding = true,
                    Name::Unknown => {}
                }
                ScanPlace::Line
            }
            _ => ScanPlace::Line,
        }
    }
}

impl AsyncRead for ClientIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.io).poll_read(cx, buf))?;
        this.look(&buf.filled()[before..]);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ClientIo {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_framings_are_seen_however_the_head_is_cut() {
        let check = |head: &str, want: (bool, bool)| {
            for cut in 1..=head.len() {
                let mut scan = Scan::default();
                head.as_bytes().chunks(cut).for_each(|part| scan.feed(part));
                assert_eq!((scan.length, scan.coding), want, "{head:?} in pieces of {cut}");
            }
        };
        check("GET / HTTP/1.1\r\nhost: a\r\n\r\n", (false, false));
        check("POST / HTTP/1.1\r\nContent-Length: 4\r\n\r\n", (true, false));
        check("POST / HTTP/1.1\r\nTRANSFER-encoding:chunked\r\n\r\n", (false, true));
        check(
            "POST / HTTP/1.1\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n",
            (true, true),
        );
        check(
            "POST / HTTP/1.1\ntransfer-encoding: chunked\nx: y\ncontent-length: 4\n\n",
            (true, true),
        );
        // Not the names, not at the beginning, or behind the head.
        check("GET / HTTP/1.1\r\nx: content-length: 4\r\nte: x\r\n\r\n", (false, false));
        check("GET / HTTP/1.1\r\ncontent-lengthy: 4\r\ntransfer: x\r\n\r\n", (false, false));
        check("GET / HTTP/1.1\r\n\r\ncontent-length: 4\r\n", (false, false));
        check("content-length: 4\r\n\r\n", (false, false));
        check("\r\n\nGET / HTTP/1.1\r\ncontent-length: 4\r\n\r\n", (true, false));
        check("GET / HTTP/1.1\r\n:\r\nc:\r\nt:\r\n\rcontent-length: 1\r\n\r\n", (false, false));
    }
}
