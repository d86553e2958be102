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
mod settings;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use engine::{Candidate, Transport};
use http::{Method, Request, Response, request};
use hyper::body::Incoming;
use hyper::client::conn::{TrySendError, http1, http2};
use model::{Identity, Reason, Refusal, WorkloadUid};
use rustc_hash::FxHashMap;

use crate::call::{Admission, Call};
use crate::io::PeerIo;
use crate::proxy::body::RequestBody;
pub(crate) use dial::{connect, connect_first};

/// HTTP/1 connections without a request that are kept for one key: what a burst of a busy client needed, and no more.
const MAX_IDLE: usize = 128;
/// Such a connection is closed after this long: shorter than most servers do it themselves, so that few requests meet a
/// connection that is being closed.
const IDLE: Duration = Duration::from_secs(30);
/// Connections of one worker. Each is a stream of some kilobytes, and one connection of the application.
const MAX_OPEN: usize = 16_384;
/// Requests that one HTTP/2 connection carries before another is opened, as most servers allow.
const MAX_STREAMS: usize = 100;

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

/// The connections of one worker. Only its own thread locks it.
#[derive(Default)]
pub struct Upstreams {
    slots: Mutex<FxHashMap<UpstreamKey, Slot>>,
    open: Arc<AtomicUsize>,
}

#[derive(Default)]
struct Slot {
    /// The one that was used last is at the end.
    idle: Vec<(http1::SendRequest<RequestBody>, Instant)>,
    shared: Vec<Shared>,
}

/// An HTTP/2 connection.
struct Shared {
    send: http2::SendRequest<RequestBody>,
    requests: Arc<AtomicUsize>,
    /// When it was last given a request.
    used: Instant,
}

impl std::fmt::Debug for Upstreams {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Upstreams")
            .field("open", &self.open.load(Ordering::Relaxed))
            .finish_non_exhaustive()
    }
}

/// A connection, for one request.
pub(crate) struct Lease {
    key: UpstreamKey,
    connection: Connection,
}

enum Connection {
    Http1(http1::SendRequest<RequestBody>),
    Http2 { send: http2::SendRequest<RequestBody>, _counted: InUse },
}

/// Counts a request of an HTTP/2 connection, until dropped.
struct InUse(Arc<AtomicUsize>);

impl InUse {
    fn new(requests: &Arc<AtomicUsize>) -> Self {
        requests.fetch_add(1, Ordering::Relaxed);
        Self(requests.clone())
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Counts an open connection, until dropped.
pub(crate) struct Open(Arc<AtomicUsize>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Upstreams {
    /// Gives a connection back whose answer was read to its end.
    pub(crate) fn give_back(&self, lease: Lease) {
        let Connection::Http1(send) = lease.connection else { return };
        // Not ready: the answer came before the end of the request, or said that the connection closes.
        if !send.is_ready() {
            return;
        }
        let mut slots = self.lock();
        let idle = &mut slots.entry(lease.key).or_default().idle;
        if idle.len() < MAX_IDLE {
            idle.push((send, Instant::now()));
        }
    }

    /// Forgets connections that were closed, or idle for long.
    pub fn sweep(&self, now: Instant) {
        self.lock().retain(|_, slot| {
            let fresh = |since: &Instant| now.saturating_duration_since(*since) < IDLE;
            slot.idle.retain(|(send, since)| !send.is_closed() && fresh(since));
            slot.shared.retain(|shared| {
                let used = shared.requests.load(Ordering::Relaxed) > 0 || fresh(&shared.used);
                !shared.send.is_closed() && used
            });
            !slot.idle.is_empty() || !slot.shared.is_empty()
        });
    }

    /// Open connections, for the admin page.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// A place for one more connection.
    pub(crate) fn place(&self) -> Result<Open, Refusal> {
        if self.open() >= MAX_OPEN {
            let words = format!("{MAX_OPEN} connections to endpoints are open on one thread");
            return Err(Refusal::new(Reason::Limit, words));
        }
        self.open.fetch_add(1, Ordering::Relaxed);
        Ok(Open(self.open.clone()))
    }

    fn take(&self, key: &UpstreamKey) -> Option<Connection> {
        let mut slots = self.lock();
        let slot = slots.get_mut(key)?;
        while let Some((send, _)) = slot.idle.pop() {
            if send.is_ready() && !send.is_closed() {
                return Some(Connection::Http1(send));
            }
        }
        slot.shared.retain(|shared| !shared.send.is_closed());
        let free = |shared: &&mut Shared| shared.requests.load(Ordering::Relaxed) < MAX_STREAMS;
        let shared = slot.shared.iter_mut().find(free)?;
        shared.used = Instant::now();
        let counted = InUse::new(&shared.requests);
        Some(Connection::Http2 { send: shared.send.clone(), _counted: counted })
    }

    fn share(&self, key: &UpstreamKey, send: http2::SendRequest<RequestBody>) -> Connection {
        let requests = Arc::default();
        let in_use = InUse::new(&requests);
        let shared = Shared { send: send.clone(), requests, used: Instant::now() };
        self.lock().entry(key.clone()).or_default().shared.push(shared);
        Connection::Http2 { send, _counted: in_use }
    }

    fn lock(&self) -> MutexGuard<'_, FxHashMap<UpstreamKey, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An endpoint's answer, and the connection on which the rest of it comes.
pub(crate) struct Answered {
    pub(crate) response: Response<Incoming>,
    pub(crate) lease: Lease,
}

/// Sends a request to the first candidate that takes it. `chosen` hears whom it is sent to, each time.
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
    let connected = match connect(call, admission, candidate, another).await {
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
        request: Request<RequestBody>,
    ) -> Result<Response<Incoming>, TrySendError<Request<RequestBody>>> {
        match &mut self.connection {
            Connection::Http1(send) => send.try_send_request(request).await,
            Connection::Http2 { send, .. } => send.try_send_request(request).await,
        }
    }
}

/// Begins HTTP on a new connection, and drives it until it ends.
async fn handshake(
    upstreams: &Upstreams,
    key: &UpstreamKey,
    (io, open): (PeerIo, Open),
) -> Result<Connection, Refusal> {
    let io = hyper_util::rt::TokioIo::new(io);
    let failed = |e: hyper::Error| {
        Refusal::new(Reason::UpstreamBroken, format!("HTTP with {}: {e}", key.target))
    };
    if key.http2 {
        let (send, connection) = settings::http2_settings().handshake(io).await.map_err(failed)?;
        tokio::spawn(driven(connection, open, key.target));
        return Ok(upstreams.share(key, send));
    }
    let (send, connection) = settings::http1_settings().handshake(io).await.map_err(failed)?;
    tokio::spawn(driven(connection.with_upgrades(), open, key.target));
    Ok(Connection::Http1(send))
}

async fn driven(
    connection: impl Future<Output = hyper::Result<()>>,
    open: Open,
    target: SocketAddr,
) {
    if let Err(error) = connection.await {
        tracing::debug!(%error, %target, "connection to an endpoint ended");
    }
    drop(open);
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
