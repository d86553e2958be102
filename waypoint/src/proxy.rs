//! HTTP on a client's stream: hyper reads requests, `forward` answers each.
//!
//! Invariants: a connection ends when its client is too slow with a head, idle for too long, or the waypoint goes; what
//! cannot be read as HTTP is refused and recorded; a request's future is dropped when its client goes, and with it
//! what was done for it.

pub(crate) mod body;
mod client_io;
mod exchange;
mod forward;
mod mirror;
mod progress;
mod span;
mod timed;
mod upgrade;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use http::{Method, Request, Response, Version};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use model::{Reason, Refusal};

use crate::call::Call;
use crate::config::Waits;
use crate::io::PeerIo;
use crate::worker::{Stage, reached};
use body::{BodyError, Owing};
use client_io::{ClientIo, unreadable};
use exchange::Exchange;
use progress::{Overdue, Owed, Progress};

/// The head of a request, and what is buffered of a body at each step: a little more than engine's limit for heads, so
/// that what is just above it is refused with words.
const MAX_BUFFER: usize = engine::http::MAX_HEAD + (8 << 10);
/// hyper's own limit of header lines, above engine's for the same reason.
const MAX_HEADERS: usize = 2 * engine::http::MAX_HEADERS;
/// Requests at once on one HTTP/2 connection, as Envoy's waypoint has it.
const MAX_STREAMS: u32 = 100;
/// What a client may send ahead on one stream: this bounds what a slow endpoint holds here. As much as one that is as far as
/// 2 ms sends with 32 MB/s.
const STREAM_WINDOW: u32 = 64 << 10;
/// The same on one connection: 6.25 MiB, enough for the windows of all its streams. Were it less, some bodies that no endpoint
/// reads would use it up, and all others of this connection would stop.
const CONNECTION_WINDOW: u32 = MAX_STREAMS * STREAM_WINDOW;

/// A client's HTTP connection.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) call: Call,
    progress: Arc<Progress>,
}

type Answer = Pin<Box<dyn Future<Output = Result<Response<Owing>, BodyError>> + Send>>;

/// Serves a client's stream until it ends.
pub(crate) async fn serve(call: Call, io: PeerIo, http2: bool) {
    let progress = Arc::new(Progress::new());
    let client = Arc::new(Client { call, progress: progress.clone() });
    let of_requests = client.clone();
    // On the heap: a connection between requests keeps what it needs, not what a request takes.
    let service = service_fn(move |request: Request<Incoming>| -> Answer {
        let client = of_requests.clone();
        let owed = (!http2).then(|| Owed::new(client.progress.clone()));
        Box::pin(async move {
            let response = forward::answer(client, request).await?;
            Ok(response.map(|body| Owing::new(body, owed)))
        })
    });
    let ended = if http2 {
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
    match ended {
        Ended::Itself(Ok(()))
        | Ended::Overdue(Overdue::Request | Overdue::Reader)
        | Ended::Waypoint => {}
        Ended::Itself(Err(error)) => ended_badly(&client, &error),
        Ended::Overdue(Overdue::Head) => {
            let words = format!("a head has not come to its end within {:?}", Waits::HEAD);
            unread(&client, Version::HTTP_11, Refusal::new(Reason::Limit, words));
        }
    }
}

/// How a connection came to its end.
enum Ended {
    Itself(hyper::Result<()>),
    Overdue(Overdue),
    Waypoint,
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
) -> Ended
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
            result = &mut connection => return Ended::Itself(result),
            _ = &mut ended => return Ended::Waypoint,
            _ = &mut parting, if !parted => {
                parted = true;
                part(connection.as_mut());
            }
            _ = look.tick() => if let Some(what) = client.progress.overdue() {
                return Ended::Overdue(what);
            }
        }
    }
}

/// What is no HTTP/1 has been answered in the name of hyper (`client_io`), what is no HTTP/2 with a GOAWAY. Other errors
/// are of connections that broke, and their requests say so themselves.
fn ended_badly(client: &Arc<Client>, error: &hyper::Error) {
    let cannot = format!("the request cannot be read: {error}");
    if error.is_parse() {
        let reason = match client.progress.told() {
            Some(status) => unreadable(status),
            None if error.is_parse_too_large() => Reason::Limit,
            None => Reason::BadHttp,
        };
        return unread(client, Version::HTTP_11, Refusal::new(reason, cannot));
    }
    let source = std::error::Error::source(error).and_then(|e| e.downcast_ref::<h2::Error>());
    match source.filter(|e| e.is_library() && e.is_go_away()) {
        Some(e) if e.reason() == Some(h2::Reason::ENHANCE_YOUR_CALM) => {
            let words = format!("the client asks too much of one HTTP/2 connection: {e}");
            unread(client, Version::HTTP_2, Refusal::new(Reason::Limit, words));
        }
        Some(e) => {
            let words = format!("what came is no HTTP/2: {e}");
            unread(client, Version::HTTP_2, Refusal::new(Reason::BadHttp, words));
        }
        None => {
            tracing::debug!(%error, source = %client.call.source, "a client's connection ended")
        }
    }
}

/// Records what was no request.
fn unread(client: &Arc<Client>, version: Version, refusal: Refusal) {
    let (mut head, ()) = Request::new(()).into_parts();
    head.method = Method::from_bytes(b"UNREADABLE").unwrap_or_default();
    head.version = version;
    let mut exchange = Exchange::begin(client.clone(), &head);
    exchange.status = client.progress.told();
    exchange.admission = client.call.admission().ok();
    exchange.refusal = Some(refusal);
}
