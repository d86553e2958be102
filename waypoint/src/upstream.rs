//! HTTP connections to endpoints: kept and shared by the requests of one client identity.
//!
//! A connection is a CONNECT stream inside a tunnel to the endpoint's proxy, or plain TCP where the endpoint is outside the
//! mesh. HTTP/1 connections are lent to one request at a time and come back when its answer was read to the end;
//! HTTP/2 connections carry many.
//!
//! Invariants: a connection never serves two client identities, because its CONNECT has told the endpoint's proxy for whom
//! it is; another candidate, or another connection, is tried only when nothing was delivered or when the request is safe to
//! repeat (RFC 9110, 9.2.2), and then once.

mod dial;
mod io;
mod kept;
mod settings;

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, Weak};

use agent::trace::SpanContext;
use engine::{Candidate, Transport};
use http::{Method, Request, Response, request};
use hyper::body::Incoming;
use hyper::client::conn::{TrySendError, http1, http2};
use model::{Identity, Reason, Refusal, WorkloadUid};

use crate::call::{Admission, Call};
use crate::proxy::body::RequestBody;
use crate::record::lock;
pub(crate) use dial::{connect, connect_first};
pub(crate) use io::UpstreamIo;
use kept::Ticket;
pub(crate) use kept::{InUse, Open, Upstreams};

/// Everything that two requests must share to share a connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct UpstreamKey {
    /// For whom; nobody where there is nobody to tell.
    client: Option<Arc<Identity>>,
    workload: WorkloadUid,
    target: SocketAddr,
    /// The endpoint's proxy, and who must answer there.
    transport: TransportKey,
    http2: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum TransportKey {
    Plain,
    Hbone(SocketAddr, Vec<Identity>),
}

impl UpstreamKey {
    fn new(call: &Call, candidate: &Candidate, http2: bool) -> Self {
        let (client, transport) = match &candidate.transport {
            Transport::Plain => (None, TransportKey::Plain),
            Transport::Hbone { gateway, expected } => {
                (Some(call.client.clone()), TransportKey::Hbone(*gateway, expected.clone()))
            }
        };
        let workload = candidate.workload.uid.clone();
        Self { client, workload, target: candidate.target, transport, http2 }
    }
}

/// A connection, for one request.
pub(crate) struct Lease {
    key: UpstreamKey,
    connection: Connection,
}

enum Connection {
    Http1 { send: http1::SendRequest<RequestBody>, ticket: Weak<Ticket> },
    Http2 { send: http2::SendRequest<RequestBody>, counted: Arc<InUse> },
}

/// An endpoint's answer, and the connection on which the rest of it comes.
pub(crate) struct Answered {
    pub(crate) response: Response<Incoming>,
    pub(crate) lease: Lease,
}

/// Sends a request to the first candidate that takes it. `chosen` hears whom it is sent to, each time. The request's span, where
/// it has one, is among its extensions.
pub(crate) async fn send(
    call: &Call,
    admission: &Admission,
    candidates: &[Candidate],
    http2: bool,
    mut request: Request<RequestBody>,
    mut chosen: impl FnMut(&Candidate),
) -> Result<Answered, Refusal> {
    let mut last = None;
    for (number, candidate) in (1..).zip(candidates) {
        // The first one is tried at once. For another the plan may be seconds old.
        if number > 1 && !candidate.is_current(&call.worker.shared.store.load()) {
            continue;
        }
        chosen(candidate);
        let another = number < candidates.len();
        match to_one(call, admission, candidate, another, http2, request).await {
            Ok(answered) => return Ok(answered),
            Err(Failed { refusal, request: Some(unsent) }) => {
                request = unsent;
                last = Some(refusal);
            }
            Err(Failed { refusal, request: None }) => return Err(refusal),
        }
    }
    Err(last.unwrap_or_else(|| Refusal::new(Reason::NoHealthyEndpoint, "no endpoint to try")))
}

/// A candidate that did not answer.
struct Failed {
    refusal: Refusal,
    /// The request, where nothing of it was delivered and another candidate may get it.
    request: Option<Request<RequestBody>>,
}

/// Sends a request to one endpoint: on a connection that is open, and on a new one where that had died.
async fn to_one(
    call: &Call,
    admission: &Admission,
    candidate: &Candidate,
    another: bool,
    http2: bool,
    mut request: Request<RequestBody>,
) -> Result<Answered, Failed> {
    let upstreams = &call.worker.upstreams;
    let key = UpstreamKey::new(call, candidate, http2);
    let trace = request.extensions().get::<SpanContext>().copied();
    if let Some(connection) = upstreams.take(&key) {
        let again = Again::of(&request);
        let mut lease = Lease { key: key.clone(), connection };
        match lease.send(request).await {
            Ok(response) => return Ok(Answered { response, lease }),
            Err(error) => match again.unless_delivered(error, true) {
                (_, Some(unsent)) => request = unsent,
                (error, None) => return Err(broken(candidate, &error)),
            },
        }
    }
    let connected = match connect(call, admission, candidate, another, trace).await {
        Ok(connected) => connected,
        Err((refusal, last)) => {
            return Err(Failed { refusal, request: (!last).then_some(request) });
        }
    };
    let connection = match handshake(upstreams, &key, connected).await {
        Ok(connection) => connection,
        Err(refusal) => return Err(Failed { refusal, request: Some(request) }),
    };
    let again = Again::of(&request);
    let mut lease = Lease { key, connection };
    match lease.send(request).await {
        Ok(response) => Ok(Answered { response, lease }),
        Err(error) => {
            let (error, unsent) = again.unless_delivered(error, false);
            Err(Failed { request: unsent, ..broken(candidate, &error) })
        }
    }
}

impl Lease {
    async fn send(
        &mut self,
        mut request: Request<RequestBody>,
    ) -> Result<Response<Incoming>, TrySendError<Request<RequestBody>>> {
        match &mut self.connection {
            Connection::Http1 { send, .. } => send.try_send_request(request).await,
            Connection::Http2 { send, counted } => {
                request.body_mut().keep(counted);
                send.try_send_request(request).await
            }
        }
    }
}

/// Begins HTTP on a new connection, and drives it until it ends.
async fn handshake(
    upstreams: &Upstreams,
    key: &UpstreamKey,
    io: UpstreamIo,
) -> Result<Connection, Refusal> {
    let (ticket, target) = (io.ticket(), key.target);
    let io = hyper_util::rt::TokioIo::new(io);
    let failed =
        |e: hyper::Error| Refusal::new(Reason::UpstreamBroken, format!("HTTP with {target}: {e}"));
    if key.http2 {
        let (send, connection) = settings::http2_settings().handshake(io).await.map_err(failed)?;
        let driver = Arc::new(Mutex::new(connection));
        let connection = upstreams.share(key, send, Arc::downgrade(&driver), ticket);
        let driving = std::future::poll_fn(move |cx| Pin::new(&mut *lock(&driver)).poll(cx));
        tokio::spawn(driven(driving, target));
        return Ok(connection);
    }
    let (send, connection) = settings::http1_settings().handshake(io).await.map_err(failed)?;
    tokio::spawn(driven(connection.with_upgrades(), target));
    Ok(Connection::Http1 { send, ticket })
}

async fn driven(connection: impl Future<Output = hyper::Result<()>>, target: SocketAddr) {
    if let Err(error) = connection.await {
        tracing::debug!(%error, %target, "connection to an endpoint ended");
    }
}

fn broken(candidate: &Candidate, error: &hyper::Error) -> Failed {
    let mut words = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(e) = cause {
        words.push_str(&format!(": {e}"));
        cause = e.source();
    }
    let name = &candidate.workload.name;
    let message =
        format!("{name} ({}) took the request and did not answer: {words}", candidate.target);
    Failed { refusal: Refusal::new(Reason::UpstreamBroken, message), request: None }
}

/// What it takes to send a request once more.
struct Again {
    /// A copy, of requests without a body.
    copy: Option<request::Parts>,
    /// The method may be repeated whatever came of the first time.
    safe: bool,
}

impl Again {
    fn of(request: &Request<RequestBody>) -> Self {
        let safe = matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS);
        let upgrade = request.headers().contains_key(http::header::UPGRADE);
        let copy = (request.body().is_empty() && !upgrade).then(|| {
            let mut copy = Request::new(());
            *copy.method_mut() = request.method().clone();
            *copy.uri_mut() = request.uri().clone();
            *copy.version_mut() = request.version();
            *copy.headers_mut() = request.headers().clone();
            copy.into_parts().0
        });
        Self { copy, safe }
    }

    /// The request, if it may be sent again after this error: hyper gives it back unsent, the peer says that it did not look at
    /// it, or the connection had been used before and died without a byte, and the method is safe.
    fn unless_delivered(
        self,
        mut error: TrySendError<Request<RequestBody>>,
        reused: bool,
    ) -> (hyper::Error, Option<Request<RequestBody>>) {
        if let Some(unsent) = error.take_message() {
            return (error.into_error(), Some(unsent));
        }
        let error = error.into_error();
        let died =
            reused && self.safe && !error.is_timeout() && !error.is_parse() && !error.is_user();
        let copy = self.copy.filter(|_| died || was_not_processed(&error));
        (error, copy.map(|parts| Request::from_parts(parts, RequestBody::Empty)))
    }
}

/// HTTP/2 can say that a request was not looked at: REFUSED_STREAM, or an id above GOAWAY's last (RFC 9113, 8.7).
fn was_not_processed(error: &hyper::Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = std::error::Error::source(error);
    while let Some(e) = cause {
        if let Some(e) = e.downcast_ref::<h2::Error>() {
            return e.reason() == Some(h2::Reason::REFUSED_STREAM)
                || (e.is_go_away() && e.is_remote() && e.reason() == Some(h2::Reason::NO_ERROR));
        }
        cause = e.source();
    }
    false
}
