//! How HTTP is spoken to endpoints.

use hyper::client::conn::{http1, http2};
use hyper_util::rt::TokioExecutor;

use super::kept::MAX_STREAMS;

/// The head of an answer, and what is buffered of a body at each step: Envoy's limit for heads is 60 KiB.
const MAX_BUFFER: usize = 64 << 10;
/// Headers of an answer.
const MAX_HEADERS: usize = 100;
/// What an endpoint may send ahead on one stream: this bounds what a slow client holds here.
const STREAM_WINDOW: u32 = 256 << 10;
/// The same on one connection: 25 MiB, enough for the windows of all its requests. Were it less, some clients that do not
/// read would use it up, and the answers for all others on this connection would stop.
const CONNECTION_WINDOW: u32 = MAX_STREAMS * STREAM_WINDOW;
/// Requests at once before the peer has said how many it takes. It says so with its first bytes; until then others get
/// connections of their own, because what is above its number would wait inside hyper, or be refused.
const UNTOLD_STREAMS: usize = 1;

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
        .initial_max_send_streams(UNTOLD_STREAMS)
        .max_header_list_size(64 << 10)
        .max_send_buf_size(MAX_BUFFER);
    settings
}
