//! How HTTP is spoken to endpoints.

use hyper::client::conn::{http1, http2};
use hyper_util::rt::TokioExecutor;

/// The head of an answer, and what is buffered of a body at each step: Envoy's limit for heads is 60 KiB.
const MAX_BUFFER: usize = 64 << 10;
/// Headers of an answer.
const MAX_HEADERS: usize = 100;
/// What an endpoint may send ahead on one stream, and on one connection: these bound what a slow client holds here.
const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 4 << 20;

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
