//! The bytes of a connection to an endpoint, and how HTTP is spoken on it.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use hbone::TunnelIo;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::TokioExecutor;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// The head of an answer, and what is buffered of a body at each step: Envoy's limit for heads is 60 KiB.
const MAX_BUFFER: usize = 64 << 10;
/// Headers of an answer.
const MAX_HEADERS: usize = 100;
/// What an endpoint may send ahead on one stream, and on one connection: these bound what a slow client holds here.
const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 4 << 20;

/// A connection to an endpoint.
#[derive(Debug)]
pub(crate) enum UpstreamIo {
    Tunnel(TunnelIo),
    /// The endpoint is outside the mesh.
    Tcp(TcpStream),
}

pub(super) fn http1_settings() -> http1::Builder {
    let mut settings = http1::Builder::new();
    settings.max_buf_size(MAX_BUFFER).max_headers(MAX_HEADERS);
    settings
}

pub(super) fn http2_settings() -> http2::Builder<TokioExecutor> {
    let mut settings = http2::Builder::new(TokioExecutor::new());
    settings
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(64 << 10)
        .max_send_buf_size(MAX_BUFFER);
    settings
}

macro_rules! either {
    ($self:ident, $io:ident => $call:expr) => {
        match $self.get_mut() {
            Self::Tunnel(io) => {
                let $io = Pin::new(io);
                $call
            }
            Self::Tcp(io) => {
                let $io = Pin::new(io);
                $call
            }
        }
    };
}

impl AsyncRead for UpstreamIo {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        either!(self, io => io.poll_read(cx, buf))
    }
}

impl AsyncWrite for UpstreamIo {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        either!(self, io => io.poll_write(cx, buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        either!(self, io => io.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, io => io.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, io => io.poll_shutdown(cx))
    }
}
