//! HTTP on a client's stream: hyper reads requests, `forward` answers each.
//!
//! Invariants: a connection ends when its client is too slow with a head, idle for too long, or the waypoint goes; what
//! cannot be read as HTTP is refused and recorded; a request's future is dropped when its client goes, and with it
//! what was done for it.

pub(crate) mod body;
mod exchange;
mod forward;
mod mirror;
mod progress;
mod span;
mod upgrade;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use http::{Method, Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use model::{Reason, Refusal};

use crate::call::Call;
use crate::config::Waits;
use crate::io::PeerIo;
use crate::worker::{Stage, reached};
use body::{BodyError, ResponseBody};
use exchange::Exchange;
use progress::{ClientIo, Progress};

/// The head of a request, and what is buffered of a body at each step: a little more than engine's limit for heads, so
/// that what is just above it is refused with words.
const MAX_BUFFER: usize = engine::http::MAX_HEAD + (8 << 10);
/// hyper's own limit of header lines, above engine's for the same reason.
const MAX_HEADERS: usize = 2 * engine::http::MAX_HEADERS;
/// Requests at once on one HTTP/2 connection, as Envoy's waypoint has it.
const MAX_STREAMS: u32 = 100;
/// What a client may send ahead on one stream, and on one connection: these bound what a slow endpoint holds here.
const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 1 << 20;

/// A client's HTTP connection.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) call: Call,
    progress: Arc<Progress>,
}

type Answer = Pin<Box<dyn Future<Output = Result<Response<ResponseBody>, BodyError>> + Send>>;

/// Serves a client's stream until it ends.
pub(crate) async fn serve(call: Call, io: PeerIo, http2: bool) {
    let progress = Arc::new(Progress::new());
    let client = Arc::new(Client { call, progress: progress.clone() });
    let of_requests = client.clone();
    // On the heap: a connection between requests keeps what it needs, not what a request takes.
    let service = service_fn(move |request: Request<Incoming>| -> Answer {
        Box::pin(forward::answer(of_requests.clone(), request))
    });
    let served = if http2 {
        let io = TokioIo::new(ClientIo::new(io, None));
        let connection = http2_settings().serve_connection(io, service);
        drive(&client, std::pin::pin!(connection), |c| c.graceful_shutdown(), Stage::is_leaving)
            .await
    } else {
        let io = TokioIo::new(ClientIo::new(io, Some(progress)));
        let connection = http1_settings().serve_connection(io, service).with_upgrades();
        drive(&client, std::pin::pin!(connection), |c| c.graceful_shutdown(), Stage::is_closing)
            .await
    };
    if let Err(error) = served {
        ended_badly(&client, &error);
    }
}

fn http1_settings() -> http1::Builder {
    let mut settings = http1::Builder::new();
    settings
        .max_buf_size(MAX_BUFFER)
        .max_headers(MAX_HEADERS)
        // Looked after in `drive`: hyper's own would end idle connections, too.
        .header_read_timeout(None::<Duration>)
        // A proxy passes on what the endpoint says about time.
        .auto_date_header(false);
    settings
}

fn http2_settings() -> http2::Builder<TokioExecutor> {
    let mut settings = http2::Builder::new(TokioExecutor::new());
    settings
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(u32::try_from(MAX_BUFFER).unwrap_or(u32::MAX))
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buf_size(MAX_BUFFER)
        .auto_date_header(false);
    settings
}

/// Drives a connection to its end: its own, or the waypoint's. `part` asks it to end after what it is doing, which
/// happens at the stage that `parting` names.
async fn drive<C>(
    client: &Client,
    mut connection: Pin<&mut C>,
    part: fn(Pin<&mut C>),
    parting: fn(&Stage) -> bool,
) -> hyper::Result<()>
where
    C: Future<Output = hyper::Result<()>>,
{
    let shared = &client.call.worker.shared;
    let (mut early, mut late) = (shared.stage(), shared.stage());
    let mut parting = Box::pin(reached(&mut early, parting));
    let mut ended = Box::pin(reached(&mut late, Stage::is_ended));
    let mut look = tokio::time::interval(Waits::LOOK);
    let mut parted = false;
    loop {
        tokio::select! {
            biased;
            result = &mut connection => return result,
            _ = &mut ended => return Ok(()),
            _ = &mut parting, if !parted => {
                parted = true;
                part(connection.as_mut());
            }
            _ = look.tick() => if client.progress.is_overdue() {
                return Ok(());
            }
        }
    }
}

/// What is no HTTP has been answered by hyper, with a bare 400, 414 or 431. Other errors are of connections that broke, and
/// their requests say so themselves.
fn ended_badly(client: &Arc<Client>, error: &hyper::Error) {
    if !error.is_parse() {
        return tracing::debug!(%error, source = %client.call.source, "a client's connection ended");
    }
    let limit = error.is_parse_too_large();
    let reason = if limit { Reason::Limit } else { Reason::BadHttp };
    let (mut head, ()) = Request::new(()).into_parts();
    head.method = Method::from_bytes(b"UNREADABLE").unwrap_or_default();
    let mut exchange = Exchange::begin(client.clone(), &head);
    exchange.status = Some(if limit { 431 } else { 400 });
    exchange.admission = client.call.admission().ok();
    exchange.refusal = Some(Refusal::new(reason, format!("the request cannot be read: {error}")));
}
