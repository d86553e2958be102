//! The discovery stream: moves messages between a proxy and its [`Connection`], which decides.
//!
//! Changes of the mesh coalesce by themselves: while a proxy works, only the newest state is kept for it,
//! and what it is sent next is the difference to that.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use compile::WaypointAccounts;
use futures_util::FutureExt;
use http::HeaderMap;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};
use xds::Kind;
use xds::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use xds::server::{Connection, Event, Resources};

use crate::authorize::{Caller, Refused, may_read};
use crate::control::{Control, Peer, Stream};
use crate::login::login;
use crate::pod_tokens::TokenId;

/// A proxy that comes back states the version of every resource it holds: 100,000 names of 200 bytes.
pub(crate) const MAX_REQUEST: usize = 32 << 20;
/// Responses ready to be written. Each may have megabytes, and the connection holds them back itself.
const MAX_QUEUED: usize = 1;
/// One proxy per node (or per waypoint's pod), one that takes over from it, and connections whose end we have not noticed
/// yet.
const MAX_STREAMS_PER_NODE: usize = 4;
/// A proxy that is sent something and says nothing for this long keeps our buffers filled for nothing.
/// Taking 100,000 workloads in takes it about a second.
const ANSWER: Duration = Duration::from_secs(60);

/// Requests taken in before the first answer: one for each type, and as many once more.
const MAX_EARLY: usize = 2 * Kind::ALL.len();

type Responses = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

/// Opens a stream for an authenticated proxy.
pub(crate) fn open(
    control: &Arc<Control>,
    peer: &Peer,
    headers: &HeaderMap,
    requests: Streaming<DeltaDiscoveryRequest>,
) -> Result<Responses, Status> {
    let now = SystemTime::now();
    let refuse = |refused: &Refused| {
        control.metrics.refused(refused.code());
        tracing::warn!(peer = %peer.address, reason = refused.code(), "no configuration: {refused}");
        refused_status(refused)
    };
    let login = login(control, peer, headers, now).map_err(|e| refuse(&e))?;
    let caller = &login.caller;
    if let Caller::Pod(_) = caller {
        let world = control.latest.borrow().world.clone();
        let world = world.ok_or_else(|| Status::unavailable("the folders are being read"))?;
        may_read(caller, &world.waypoints).map_err(|e| refuse(&e))?;
    } else {
        may_read(caller, &WaypointAccounts::new()).map_err(|e| refuse(&e))?;
    }
    let stream = control.open_stream(caller, peer.address, now, MAX_STREAMS_PER_NODE);
    let stream = stream.ok_or_else(|| {
        control.metrics.refused("too_many_streams");
        let text = format!("{} has {MAX_STREAMS_PER_NODE} streams open already", name_of(caller));
        tracing::warn!(peer = %peer.address, "no configuration: {text}");
        Status::resource_exhausted(text)
    })?;
    peer.admitted.send_replace(true);
    let not_after = peer.certificate.iter().flatten().map(|c| c.not_after).min();
    let expires = not_after.map(|end| Instant::now() + end.duration_since(now).unwrap_or_default());
    let (responses, outbox) = mpsc::channel(MAX_QUEUED);
    let driver = Driver {
        control: control.clone(),
        stream,
        node: caller.node().clone(),
        token: login.pod_token(),
        caller: login.caller,
        responses,
        expires,
        heard: Instant::now(),
    };
    let who = name_of(&driver.caller);
    tracing::info!(node = %driver.node, who, peer = %peer.address, "proxy connected");
    tokio::spawn(driver.run(requests));
    Ok(ReceiverStream::new(outbox))
}

fn refused_status(refused: &Refused) -> Status {
    if refused.is_unauthenticated() {
        Status::unauthenticated(refused.to_string())
    } else {
        Status::permission_denied(refused.to_string())
    }
}

/// For people.
fn name_of(caller: &Caller) -> String {
    match caller.pod() {
        Some(pod) => pod.to_string(),
        None => caller.node().to_string(),
    }
}

struct Driver {
    control: Arc<Control>,
    stream: Stream,
    node: model::Str,
    caller: Caller,
    /// A pod's: the stream ends with it.
    token: Option<TokenId>,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    /// When the certificate that opened the stream ends.
    expires: Option<Instant>,
    /// The last time the proxy said something, or was sent something after a rest.
    heard: Instant,
}

/// Why a stream ends: a word for the metric, and what the proxy is told, if anything.
struct End {
    reason: &'static str,
    status: Option<Status>,
}

impl Driver {
    async fn run(mut self, mut requests: Streaming<DeltaDiscoveryRequest>) {
        let end = self.serve(&mut requests).await;
        tracing::info!(node = %self.node, reason = end.reason, "proxy disconnected");
        self.stream.ends(end.reason);
        if let Some(status) = end.status {
            // The proxy may be gone, or not reading: it need not hear it.
            let _ = self.responses.try_send(Err(status));
        }
    }

    async fn serve(&mut self, requests: &mut Streaming<DeltaDiscoveryRequest>) -> End {
        let mut latest = self.control.latest.clone();
        let mut stopping = self.control.stopping.clone();
        // Until the folders have been read there is nothing to say.
        let mut connection: Option<Connection> = None;
        let mut early: Vec<DeltaDiscoveryRequest> = Vec::new();
        let mut current: Option<Arc<Resources>> = None;
        loop {
            let newest = latest.borrow_and_update().world.as_ref().map(|w| w.resources.clone());
            // Diagnostics may change alone; then there is nothing to push.
            if let Err(refused) = self.may_still_read() {
                return End::new("not_allowed", refused_status(&refused));
            }
            if let Some(newest) =
                newest.filter(|n| !current.as_ref().is_some_and(|c| Arc::ptr_eq(c, n)))
            {
                current = Some(newest.clone());
                match &mut connection {
                    Some(connection) => connection.set(newest),
                    None => connection = Some(Connection::new(newest)),
                }
            }
            if let Some(connection) = &mut connection {
                for request in early.drain(..) {
                    if let Err(end) = self.take(connection, request) {
                        return end;
                    }
                }
                if let Err(end) = self.send(connection).await {
                    return end;
                }
            }
            let full = early.len() >= MAX_EARLY;
            let waiting = connection.as_ref().is_some_and(|c| !c.is_settled());
            tokio::select! {
                received = receive(requests, &mut early), if !full => match received {
                    Ok(()) => self.heard = Instant::now(),
                    Err(end) => return end,
                },
                changed = latest.changed() => if changed.is_err() {
                    return End::new("stopping", Status::unavailable("the control plane stops"));
                },
                () = until(self.expires) => {
                    let refused = Refused::CertificateExpired;
                    return End::new("certificate_expired", refused_status(&refused));
                }
                () = self.control.token_ended(self.token) => {
                    return End::new("token_ended", refused_status(&Refused::UnknownToken));
                }
                () = sleep_until(self.heard + ANSWER), if waiting => {
                    let text = format!("no answer to the last response for {ANSWER:?}");
                    return End::new("slow", Status::deadline_exceeded(text));
                }
                _ = stopping.wait_for(|stop| *stop) => {
                    return End::new("stopping", Status::unavailable("the control plane stops"));
                }
            }
        }
    }

    /// A waypoint may read for as long as there is a Gateway that it runs for.
    fn may_still_read(&self) -> Result<(), Refused> {
        let latest = self.control.latest.borrow();
        match (&self.caller, &latest.world) {
            (Caller::Pod(_), Some(world)) => may_read(&self.caller, &world.waypoints),
            _ => Ok(()),
        }
    }

    /// Tells the connection what the proxy said, and everybody else what it means.
    fn take(
        &mut self,
        connection: &mut Connection,
        request: DeltaDiscoveryRequest,
    ) -> Result<(), End> {
        let node = &self.node;
        match connection.request(request) {
            Ok(Event::Nacked(nack)) => {
                self.control.metrics.nacked(nack.kind);
                self.stream.nacked(&format!("{}: {}", nack.kind, nack.message));
                tracing::error!(
                    %node, kind = %nack.kind, resources = ?nack.names,
                    "the proxy refused configuration and keeps what it had: {}", nack.message
                );
            }
            Ok(Event::Acked { push: Some(push), .. }) => {
                self.stream.acked(push);
                let world = self.control.latest.borrow().world.clone();
                if let Some(world) = world.filter(|world| world.push() == push) {
                    self.control.metrics.converged(world.since.elapsed().as_secs_f64());
                }
                tracing::debug!(%node, %push, "in force");
            }
            Ok(Event::Acked { .. }) => {}
            Ok(Event::Subscribed(kind)) => tracing::debug!(%node, %kind, "subscribed"),
            Ok(Event::Unsubscribed(kind)) => tracing::debug!(%node, %kind, "unsubscribed"),
            Ok(Event::Ignored(what)) => tracing::debug!(%node, "request ignored: {what}"),
            Err(error) => {
                return Err(End::new("misbehaved", Status::invalid_argument(error.to_string())));
            }
        }
        Ok(())
    }

    /// Sends what is due. Comes to an end: each type has one response in flight at most.
    async fn send(&mut self, connection: &mut Connection) -> Result<(), End> {
        while let Some(response) = connection.next_response() {
            let push = response.system_version_info.clone();
            tracing::debug!(
                node = %self.node, push, kind = response.type_url, resources = response.resources.len(),
                removed = response.removed_resources.len(), "sending"
            );
            if let Some(kind) = Kind::from_type_url(&response.type_url) {
                self.control.metrics.response_sent(kind);
                if kind == Kind::Marker {
                    self.stream.sent(push);
                }
            }
            self.heard = Instant::now();
            match timeout(ANSWER, self.responses.send(Ok(response))).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Err(End { reason: "closed_by_proxy", status: None }),
                // It is not reading; it would not read the status either.
                Err(_) => return Err(End { reason: "slow", status: None }),
            }
        }
        Ok(())
    }
}

async fn until(end: Option<Instant>) {
    match end {
        Some(end) => sleep_until(end).await,
        None => std::future::pending().await,
    }
}

/// Waits for a request, and takes what else is there: a proxy subscribes to all its types at once, and
/// policies should travel before what refers to them whatever the order it named them in.
async fn receive(
    requests: &mut Streaming<DeltaDiscoveryRequest>,
    received: &mut Vec<DeltaDiscoveryRequest>,
) -> Result<(), End> {
    let mut next = requests.message().await;
    loop {
        match next {
            Ok(Some(request)) => received.push(request),
            Ok(None) => return Err(End { reason: "closed_by_proxy", status: None }),
            Err(status) => {
                tracing::debug!(%status, "stream broken");
                return Err(End { reason: "broken", status: None });
            }
        }
        if received.len() >= MAX_EARLY {
            return Ok(());
        }
        match requests.message().now_or_never() {
            Some(more) => next = more,
            None => return Ok(()),
        }
    }
}

impl End {
    fn new(reason: &'static str, status: Status) -> Self {
        Self { reason, status: Some(status) }
    }
}
