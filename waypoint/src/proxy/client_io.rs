//! A client's stream, as hyper reads and writes it.
//!
//! What is no HTTP/1 hyper answers itself, with a status and nothing else. Here that answer is known, and gets a reason and a
//! line of text, as every refusal has them. It is known by when it comes, not by how it looks, since a body may look like
//! anything: hyper flushes a stream when its own buffer is empty, and the answers of all requests that it has handed over
//! until then are behind it. What it writes before it has handed over another request is its own word. Where a client does
//! not read, so that a flush is never reached between an answer and the bytes that cannot be read, the bare answer stays.
//!
//! Invariant: what hyper writes for a request passes as it is.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes};
use engine::http::{Answer, answer_with};
use http::StatusCode;
use model::{Reason, Refusal};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::progress::{Progress, Scan};
use crate::io::PeerIo;

/// See the module.
#[derive(Debug)]
pub(crate) struct ClientIo {
    io: PeerIo,
    /// HTTP/1 only: an HTTP/2 connection has bytes without a request, and knows its own framing.
    progress: Option<Arc<Progress>>,
    /// Of the head that is being read.
    scan: Scan,
    /// How many requests there were when the scan began.
    requests: u32,
    /// How many requests had been handed over when nothing was left to be written.
    settled: Option<u32>,
    /// In place of hyper's own words.
    words: Bytes,
}

impl ClientIo {
    pub(super) fn new(io: PeerIo, progress: Option<Arc<Progress>>) -> Self {
        let settled = Some(0);
        let (scan, words) = (Scan::default(), Bytes::new());
        Self { io, progress, scan, requests: 0, settled, words }
    }

    pub(super) fn into_inner(self) -> PeerIo {
        self.io
    }

    fn look(&mut self, bytes: &[u8]) {
        let Some(progress) = self.progress.as_ref().filter(|_| !bytes.is_empty()) else { return };
        let Some(requests) = progress.heads() else { return };
        if self.requests != requests {
            (self.requests, self.scan) = (requests, Scan::default());
        }
        self.scan.feed(bytes);
        if self.scan.is_ambiguous() {
            progress.mark_ambiguous();
        }
    }

    /// True: these bytes were hyper's own answer, and ours is to be written in place of it.
    fn takes_over(&mut self, bytes: &[u8]) -> bool {
        let Some(progress) = &self.progress else { return false };
        if self.settled != Some(progress.asked()) {
            return false;
        }
        let Some(status) = status_of(bytes) else { return false };
        self.settled = None;
        progress.tell(status.as_u16());
        self.words = words(status);
        true
    }

    fn poll_words(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.words.is_empty() {
            let written = ready!(Pin::new(&mut self.io).poll_write(cx, &self.words))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.words.advance(written);
        }
        Poll::Ready(Ok(()))
    }
}

/// Why a request that hyper answered with this status could not be read.
pub(super) fn unreadable(status: u16) -> Reason {
    match status {
        414 | 431 => Reason::Limit,
        _ => Reason::BadHttp,
    }
}

/// Of the beginning of an answer, if it is an error.
fn status_of(answer: &[u8]) -> Option<StatusCode> {
    let digits = answer.strip_prefix(b"HTTP/1.").and_then(|rest| rest.get(2..5))?;
    StatusCode::from_bytes(digits).ok().filter(StatusCode::is_client_error)
}

/// A whole answer; the connection ends after it.
fn words(status: StatusCode) -> Bytes {
    let refusal = Refusal::new(unreadable(status.as_u16()), "");
    let Answer { headers, body, .. } = answer_with(refusal, status);
    let mut text = format!("HTTP/1.1 {status}\r\nconnection: close\r\n").into_bytes();
    for (name, value) in &headers {
        text.extend([name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"].concat());
    }
    text.extend(format!("content-length: {}\r\n\r\n{body}", body.len()).bytes());
    text.into()
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
        if self.takes_over(buf) {
            return Poll::Ready(Ok(buf.len()));
        }
        ready!(self.poll_words(cx))?;
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if bufs.first().is_some_and(|buf| self.takes_over(buf)) {
            return Poll::Ready(Ok(bufs.iter().map(|buf| buf.len()).sum()));
        }
        ready!(self.poll_words(cx))?;
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_words(cx))?;
        let this = &mut *self;
        if let Some(progress) = &this.progress {
            this.settled = progress.settled();
            // While an endpoint takes no more of a body nothing is read, and nobody would hear that the client has gone.
            if this.settled.is_none()
                && let Poll::Ready(gone) = this.io.poll_gone(cx)
            {
                return Poll::Ready(Err(gone));
            }
        }
        Pin::new(&mut this.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_words(cx))?;
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_errors_are_replaced() {
        let check = |answer: &str, status: Option<u16>| {
            let got = status_of(answer.as_bytes());
            assert_eq!(got.map(|status| status.as_u16()), status, "{answer:?}");
        };
        check("HTTP/1.1 431 Request Header Fields Too Large\r\n\r\n", Some(431));
        check("HTTP/1.0 400 Bad Request\r\n", Some(400));
        check("HTTP/1.1 100 Continue\r\n\r\n", None);
        check("HTTP/1.1 200 OK\r\n", None);
        check("HTTP/1.1 4", None);
        check("0\r\n\r\n", None);
        check("", None);
    }

    #[test]
    fn the_words_are_a_whole_answer() {
        let text = words(StatusCode::URI_TOO_LONG);
        let text = std::str::from_utf8(&text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 414 URI Too Long\r\nconnection: close\r\n"), "{head}");
        assert!(head.contains("\r\nx-ambit-reason: limit\r\n"), "{head}");
        assert!(head.ends_with(&format!("\r\ncontent-length: {}", body.len())), "{head}");
    }
}
