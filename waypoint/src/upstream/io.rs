//! A connection to an endpoint together with its place among those that may be open.
//!
//! Invariant: the place is taken as long as bytes can flow, whoever reads and writes them: hyper, or, after an answer 101, a
//! relay.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Weak;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::kept::{Open, Ticket};
use crate::io::PeerIo;

/// See the module.
#[derive(Debug)]
pub(crate) struct UpstreamIo {
    io: PeerIo,
    open: Open,
}

impl UpstreamIo {
    pub(super) fn new(io: PeerIo, open: Open) -> Self {
        Self { io, open }
    }

    pub(crate) fn into_parts(self) -> (PeerIo, Open) {
        (self.io, self.open)
    }

    /// By which the place is given up before the connection is closed.
    pub(super) fn ticket(&self) -> Weak<Ticket> {
        self.open.ticket()
    }
}

impl AsyncRead for UpstreamIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for UpstreamIo {
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
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
