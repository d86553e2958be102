//! Connections that a pod opens: plan, connect, relay.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use agent::access_log::Direction;
use agent::xds_client::{XdsPhase, XdsView};
use engine::{Candidate, OutboundFacts, OutboundPlan, Transport, plan_outbound};
use futures_util::FutureExt as _;
use futures_util::future::{Either, ready};
use hbone::{ConnectHeaders, Credentials, Ended, PoolKey, TunnelError, relay_tcp, relay_tunnel};
use http::StatusCode;
use model::{MESH_PORTS, Reason, Refusal, Workload};
use net::capture::MARK_PROXY;
use net::socket::{ConnectOpts, SourcePorts};
use tokio::net::TcpStream;

use crate::config::{Waits, is_local};
use crate::connections::Live;
use crate::inbound;
use crate::pod::Pod;
use crate::record::Record;
use crate::same_node::{self, Joined};
use crate::worker::{Accepted, Worker};

/// Serves one connection from the application to its end.
pub(crate) async fn serve(worker: Arc<Worker>, pod: Arc<Pod>, accepted: Accepted) {
    let mut record = Record::new(Direction::Outbound, &pod, &accepted);
    worker.recorder.trace(&mut record, None);
    // On the heap and gone before the relay starts: an idle connection keeps what the relay needs, not
    // what it took to get there.
    let connected = Box::pin(connect(&worker, &pod, accepted, &mut record)).await;
    finish(&worker, connected, &mut record).await;
    worker.recorder.write(record);
}

/// Plans and connects: both ends of the connection, or a refusal.
async fn connect(
    worker: &Worker,
    pod: &Arc<Pod>,
    accepted: Accepted,
    record: &mut Record,
) -> Result<(Live, Ends), Refusal> {
    let Accepted { tcp, peer, destination, .. } = accepted;
    // A refusal must look like one: the application gets a RST, not an empty answer.
    let tcp = ResetOnDrop(Some(tcp));
    let ends = match reach(worker, pod, peer, destination, record, Joining::Allowed).await? {
        Connected::Plain(target) => Ends::Sockets(tcp.take(), target),
        Connected::Tunnel(stream) => Ends::Tunnel(tcp.take(), stream),
        Connected::Joined(joined) => Ends::Joined(tcp.take(), joined),
    };
    Ok((live(pod, &ends, record), ends))
}

/// Whether a server on this node may be reached without a tunnel. A connection that this proxy makes for itself takes the
/// tunnel: only a relay can end both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Joining {
    Allowed,
    Never,
}

/// Decides where a connection of the pod goes, and makes it. The record learns what is found out on the way.
pub(crate) async fn reach(
    worker: &Worker,
    pod: &Pod,
    peer: SocketAddr,
    destination: SocketAddr,
    record: &mut Record,
    joining: Joining,
) -> Result<Connected, Refusal> {
    let source = caller(worker, pod).await?;
    record.source = Some(source.clone());
    if is_local(&source.addresses, destination.ip()) && MESH_PORTS.contains(&destination.port()) {
        return Err(Refusal::new(
            Reason::MeshPort,
            format!("{destination} is a port of the mesh itself, not of the pod"),
        ));
    }
    let plan = {
        let snapshot = worker.shared.store.load();
        record.version = snapshot.version();
        let facts = OutboundFacts { source: &source, destination };
        plan_outbound(&snapshot, &facts, worker.random())
    };
    match plan {
        OutboundPlan::Refuse(refusal) => Err(refusal),
        OutboundPlan::Passthrough => connect_plain(pod, destination).await.map(Connected::Plain),
        OutboundPlan::Connect { service, candidates } => {
            record.service = service;
            let client = Client { worker, pod, source: &source, address: peer, joining };
            let connected = first_that_connects(&client, candidates, record).await?;
            match &connected {
                Connected::Plain(_) => {}
                Connected::Tunnel(stream) => record.peer = Some(Arc::new(stream.peer.clone())),
                Connected::Joined(joined) => {
                    record.peer = Some(Arc::new(joined.live.pod.identity.clone()));
                    record.same_node = true;
                }
            }
            Ok(connected)
        }
    }
}

/// What the table of live connections says of one that the pod opened.
pub(crate) fn live(pod: &Arc<Pod>, ends: &Ends, record: &Record) -> Live {
    Live {
        pod: pod.clone(),
        direction: Direction::Outbound,
        source: record.source_address,
        destination: record.destination,
        peer: None,
        client: None,
        hbone: matches!(ends, Ends::Tunnel(..)),
        started: record.started,
        judged: record.judged,
        moved: record.moved.clone(),
    }
}

/// A connection towards a destination.
pub(crate) enum Connected {
    Plain(TcpStream),
    Tunnel(hbone::TunnelStream),
    Joined(Box<Joined>),
}

/// Who wants to be connected.
struct Client<'a> {
    worker: &'a Worker,
    pod: &'a Pod,
    source: &'a Arc<Workload>,
    address: SocketAddr,
    joining: Joining,
}

/// Tries the candidates in order. Going on is safe: until a candidate has said yes, no application byte
/// has left (DESIGN invariant 8).
async fn first_that_connects(
    client: &Client<'_>,
    candidates: Vec<Candidate>,
    record: &mut Record,
) -> Result<Connected, Refusal> {
    let (mut last, count) = (None, candidates.len());
    for (number, candidate) in (1..).zip(candidates) {
        // The first one is tried at once. For another the plan may be seconds old.
        let service = record.service.as_deref();
        if number > 1 && !candidate.is_current_for(&client.worker.shared.store.load(), service) {
            continue;
        }
        record.waypoint = candidate.is_waypoint();
        record.destination_workload = Some(candidate.workload.clone());
        record.target = candidate.target;
        let attempt = try_one(client, &candidate, record);
        let result = if number < count {
            let limited = tokio::time::timeout(Waits::BEFORE_ANOTHER, attempt).await;
            limited.unwrap_or_else(|_| Err(Failed::next(too_slow(&candidate))))
        } else {
            attempt.await
        };
        match result {
            Ok(connected) => return Ok(connected),
            Err(failed) => {
                last = Some(failed.refusal);
                if failed.last {
                    break;
                }
            }
        }
    }
    Err(last.unwrap_or_else(|| Refusal::new(Reason::NoHealthyEndpoint, "no endpoint to try")))
}

async fn try_one(
    client: &Client<'_>,
    candidate: &Candidate,
    record: &mut Record,
) -> Result<Connected, Failed> {
    let Client { worker, pod, source, address, joining } = *client;
    let Transport::Hbone { gateway, expected } = &candidate.transport else {
        let connected = connect_plain(pod, candidate.target).await;
        return connected.map(Connected::Plain).map_err(Failed::next);
    };
    if joining == Joining::Allowed
        && let Some(joined) = same_node::join(worker, pod, address, candidate, record).await
    {
        record.hbone_address = None;
        return joined.map(Connected::Joined).map_err(Failed::of);
    }
    record.hbone_address = Some(*gateway);
    let key = PoolKey {
        source: pod.uid.clone(),
        source_identity: pod.identity.clone(),
        destination: candidate.workload.uid.clone(),
        gateway: *gateway,
        expected: expected.clone(),
    };
    let headers = connect_headers(source, address, record, candidate);
    open_tunnel(worker, pod, &headers, candidate, key).await.map(Connected::Tunnel)
}

fn too_slow(candidate: &Candidate) -> Refusal {
    let (name, seconds) = (&candidate.workload.name, Waits::BEFORE_ANOTHER.as_secs());
    Refusal::new(Reason::ConnectTimeout, format!("{name} did not answer within {seconds} s"))
}

/// A candidate that did not connect.
struct Failed {
    refusal: Refusal,
    /// Policy said no. Trying around a denial would make the policy of one endpoint look like noise.
    last: bool,
}

impl Failed {
    fn next(refusal: Refusal) -> Self {
        Self { refusal, last: false }
    }

    /// The same word that a tunnel would have brought as a status.
    fn of(refusal: Refusal) -> Self {
        Self { last: inbound::status(refusal.reason) == StatusCode::UNAUTHORIZED, refusal }
    }
}

fn connect_headers(
    source: &Workload,
    peer: SocketAddr,
    record: &Record,
    candidate: &Candidate,
) -> ConnectHeaders {
    let host = match &record.service {
        Some(service) => service.key.hostname.to_string(),
        None => candidate.target.to_string(),
    };
    ConnectHeaders {
        baggage: ConnectHeaders::baggage_of(source),
        forwarded: format!("for={};host={host}", peer.ip()).parse().ok(),
        traceparent: record.trace.as_ref().and_then(|t| t.context.to_string().parse().ok()),
        client: None,
    }
}

async fn open_tunnel(
    worker: &Worker,
    pod: &Pod,
    headers: &ConnectHeaders,
    candidate: &Candidate,
    key: PoolKey,
) -> Result<hbone::TunnelStream, Failed> {
    let credentials = credentials(worker, pod).await.map_err(Failed::next)?;
    let gateway = key.gateway;
    let opened = worker
        .pool
        .open(&key, &credentials, candidate.target, headers, || dial(pod, gateway))
        .await;
    opened.map_err(|e| Failed {
        last: matches!(e, TunnelError::Refused { status: 401 | 403, .. }),
        refusal: Refusal::new(
            e.reason(),
            format!("tunnel to {} ({gateway}): {e}", candidate.workload.name),
        ),
    })
}

/// The certificate of the pod, waiting a moment for a new pod's first one.
pub(crate) async fn credentials(worker: &Worker, pod: &Pod) -> Result<Arc<Credentials>, Refusal> {
    if let Some(credentials) = worker.shared.certs.get(&pod.identity) {
        return Ok(credentials);
    }
    worker.shared.certs.wait(&pod.identity, Waits::CERTIFICATE).await
}

/// The pod's own workload, waiting a moment for a new pod's address to arrive.
pub(crate) async fn own_workload(worker: &Worker, pod: &Pod) -> Result<Arc<Workload>, Refusal> {
    if let Some(workload) = pod.workload(&worker.shared.store.load()) {
        return Ok(workload.clone());
    }
    let found = worker.shared.store.wait_for(|s| pod.workload(s).cloned(), Waits::WORKLOAD).await;
    found.ok_or_else(|| {
        Refusal::new(
            Reason::UnknownWorkload,
            format!("the control plane has not sent pod {}/{}", pod.namespace, pod.name),
        )
    })
}

/// The pod as the source of a connection. While the control plane is away a pod that it has not named yet may call all the
/// same, if there is a certificate for it: as the node agent described it. Not without any configuration: every destination
/// would be a stranger, and reached in plaintext.
async fn caller(worker: &Worker, pod: &Pod) -> Result<Arc<Workload>, Refusal> {
    let shared = &worker.shared;
    if let Some(workload) = pod.workload(&shared.store.load()) {
        return Ok(workload.clone());
    }
    let mut view = shared.status.subscribe();
    tokio::select! {
        biased;
        Ok(_) = view.wait_for(is_away) => {
            Ok(pod.as_told(&shared.config))
        }
        found = own_workload(worker, pod) => found,
    }
}

fn is_away(view: &XdsView) -> bool {
    view.phase != XdsPhase::Empty && !view.connected && view.error.is_some()
}

async fn connect_plain(pod: &Pod, to: SocketAddr) -> Result<TcpStream, Refusal> {
    match tokio::time::timeout(Waits::CONNECT, dial(pod, to)).await {
        Ok(Ok(tcp)) => Ok(tcp),
        Ok(Err(e)) => Err(Refusal::new(Reason::ConnectFailed, format!("connect to {to}: {e}"))),
        Err(_) => Err(Refusal::new(
            Reason::ConnectTimeout,
            format!("{to} did not answer within {} s", Waits::CONNECT.as_secs()),
        )),
    }
}

/// A connection from the pod's own address that is not captured again.
async fn dial(pod: &Pod, to: SocketAddr) -> io::Result<TcpStream> {
    connect_from(
        pod,
        to,
        &ConnectOpts {
            mark: Some(MARK_PROXY),
            transparent_source: None,
            source_ports: SourcePorts::Ephemeral,
            nodelay: true,
            // Detects hosts that vanished under long idle connections (Istio: 180 s).
            keepalive: Some(std::time::Duration::from_secs(180)),
        },
    )
    .await
}

/// Connects from inside the pod and waits for the answer.
pub(crate) async fn connect_from(
    pod: &Pod,
    to: SocketAddr,
    opts: &ConnectOpts,
) -> io::Result<TcpStream> {
    // The thread stays there: the next connection is likely of the same pod.
    pod.netns.enter()?;
    let tcp = TcpStream::from_std(net::socket::connect(&pod.netns, to, opts)?)?;
    tcp.writable().await?;
    match tcp.take_error()? {
        None => Ok(tcp),
        Some(e) => Err(e),
    }
}

/// The two ends of a connection that has been made.
pub(crate) enum Ends {
    Sockets(TcpStream, TcpStream),
    Tunnel(TcpStream, hbone::TunnelStream),
    /// Two pods of this proxy.
    Joined(TcpStream, Box<Joined>),
    /// The server end of a tunnel.
    Accepted(TcpStream, h2::SendStream<bytes::Bytes>, h2::RecvStream),
}

/// Relays what was connected until it ends, and puts the end into the record.
///
/// This future is most of what an idle connection costs. Hence combinators: an `async` block keeps what it
/// awaits twice, as captured and as awaited.
pub(crate) fn finish<'a>(
    worker: &'a Worker,
    connected: Result<(Live, Ends), Refusal>,
    record: &'a mut Record,
) -> impl Future<Output = ()> + 'a {
    match connected.and_then(|(live, ends)| relay(worker, live, ends, record)) {
        Ok(relaying) => Either::Left(relaying.map(|how| record.ended(how))),
        Err(refusal) => {
            record.ended(Err(refusal));
            Either::Right(ready(()))
        }
    }
}

/// Registers the connection and returns what relays it until it ends. An `Err` of that is the word of who
/// ended it before its time.
fn relay<'a>(
    worker: &'a Worker,
    live: Live,
    ends: Ends,
    record: &mut Record,
) -> Result<impl Future<Output = Result<Ended, Refusal>> + use<'a>, Refusal> {
    let shared = &worker.shared;
    let limit = shared.config.max_connections;
    if shared.open.load(Ordering::Relaxed) >= limit {
        let words = format!("{limit} connections are open (--max-connections)");
        let refusal = Refusal::new(Reason::Limit, words);
        if let Ends::Joined(_, joined) = ends {
            same_node::refuse(worker, *joined, refusal.clone());
        }
        return Err(refusal);
    }
    let moved = live.moved.clone();
    let first_is_client = !matches!(ends, Ends::Accepted(..));
    let counted = worker.recorder.opened(record, first_is_client);
    let (registered, stop) =
        worker.connections.register(Arc::new(live), counted, &shared.store, &shared.open);
    let (relaying, slot) = match ends {
        Ends::Sockets(a, b) => (Either::Left(relay_tcp(a, b, moved, stop)), None),
        Ends::Tunnel(tcp, stream) => {
            let (send, receive, slot) = stream.split();
            let relaying = relay_tunnel(tcp, send, receive, moved, stop);
            (Either::Right(Either::Left(relaying)), Some(slot))
        }
        Ends::Accepted(tcp, send, receive) => {
            (Either::Right(Either::Left(relay_tunnel(tcp, send, receive, moved, stop))), None)
        }
        Ends::Joined(tcp, joined) => {
            let relaying = same_node::relay(worker, tcp, *joined, stop);
            (Either::Right(Either::Right(relaying)), None)
        }
    };
    Ok(relaying.map(move |(ended, word)| {
        drop((registered, slot));
        match word {
            Some(Ok(refusal)) => Err(refusal),
            // The table's entry went without a word; nobody does that while the connection is registered.
            Some(Err(_)) => Err(Refusal::new(Reason::PolicyChanged, "no longer allowed")),
            None => Ok(ended),
        }
    }))
}

/// Closes with a RST unless taken: the other end must learn that it was refused.
pub(crate) struct ResetOnDrop(pub(crate) Option<TcpStream>);

impl ResetOnDrop {
    #[expect(clippy::expect_used, reason = "taken once, by value")]
    pub(crate) fn take(mut self) -> TcpStream {
        self.0.take().expect("the socket is taken once")
    }
}

impl Drop for ResetOnDrop {
    fn drop(&mut self) {
        if let Some(tcp) = &self.0 {
            let _ = socket2::SockRef::from(tcp).set_linger(Some(std::time::Duration::ZERO));
        }
    }
}
