//! Connections that arrive at a pod: who is it, may they, connect to the application, relay.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use agent::access_log::Direction;
use agent::trace::SpanContext;
use engine::{Allowed, Claim, InboundFacts, Verdict, authorize, claim_is_early, delegated};
use futures_util::FutureExt as _;
use hbone::{Authority, ConnectHeaders, Incoming, ServerTunnel};
use http::StatusCode;
use model::{Identity, MESH_PORTS, Reason, Refusal, Service, ServicePort, Snapshot, Workload};
use net::capture::{MARK_PROXY, MARK_TO_APP};
use net::socket::{ConnectOpts, SourcePorts};
use socket2::TcpKeepalive;
use tokio::net::TcpStream;

use crate::config::{Capture, Waits, is_local};
use crate::connections::Live;
use crate::outbound::{Ends, ResetOnDrop, connect_from, credentials, finish, own_workload};
use crate::pod::Pod;
use crate::record::Record;
use crate::worker::{Accepted, Busy, Worker};

/// Serves a plaintext connection to the pod.
pub(crate) async fn serve_plaintext(worker: Arc<Worker>, pod: Arc<Pod>, accepted: Accepted) {
    let mut record = Record::new(Direction::Inbound, &pod, &accepted);
    worker.recorder.trace(&mut record, None);
    let connected = Box::pin(plaintext(&worker, &pod, accepted, &mut record)).await;
    finish(&worker, connected, &mut record).await;
    worker.recorder.write(record);
}

async fn plaintext(
    worker: &Worker,
    pod: &Arc<Pod>,
    accepted: Accepted,
    record: &mut Record,
) -> Result<(Live, Ends), Refusal> {
    let Accepted { tcp, peer, destination, .. } = accepted;
    let tcp = ResetOnDrop(Some(tcp));
    let call = Call { source: peer, destination, peer: None, claim: Ok(None), host: None };
    let workload = admit(worker, pod, &call, record).await?;
    let app = connect_to_app(worker, pod, &workload, &call).await?;
    Ok((call.live(pod, record), Ends::Sockets(tcp.take(), app)))
}

/// Serves a tunnel to the pod: handshake, then each CONNECT in a task of its own on this thread.
pub(crate) async fn serve_tunnel(worker: Arc<Worker>, pod: Arc<Pod>, accepted: Accepted) {
    let mut record = Record::new(Direction::Inbound, &pod, &accepted);
    let source = accepted.peer;
    let mut tunnel = match Box::pin(accept_tunnel(&worker, &pod, accepted)).await {
        Ok(tunnel) => tunnel,
        Err(refusal) => {
            record.refuse(refusal);
            return worker.recorder.write(record);
        }
    };
    let peer = Arc::new(tunnel.peer().clone());
    let (mut draining, mut used) = (false, false);
    loop {
        let next = tokio::select! {
            next = tunnel.next() => next,
            () = no_longer_wanted(&pod, used), if !draining => {
                draining = true;
                tunnel.drain();
                continue;
            }
        };
        match next {
            Some(Ok(incoming)) => {
                used = true;
                let busy = Busy::new(&worker.shared);
                let (worker, pod, peer) = (worker.clone(), pod.clone(), peer.clone());
                let served = serve_stream(worker, pod, source, peer, incoming);
                tokio::spawn(served.map(move |()| drop(busy)));
            }
            // A broken connection says so again each time it is asked.
            Some(Err(e)) => {
                tracing::debug!(error = %e, %source, "tunnel broke");
                return;
            }
            None => return,
        }
    }
}

/// Resolves when the pod leaves, or the proxy goes. A tunnel without a request so far has one on its way: a GOAWAY before it
/// would fail the connection that it was dialled for, where the peer does not dial again.
async fn no_longer_wanted(pod: &Pod, used: bool) {
    pod.left().await;
    if !used {
        tokio::time::sleep(Waits::FIRST_REQUEST).await;
    }
}

async fn accept_tunnel(
    worker: &Worker,
    pod: &Pod,
    accepted: Accepted,
) -> Result<ServerTunnel, Refusal> {
    let Ok(_place) = worker.handshakes.try_acquire() else {
        return Err(Refusal::new(Reason::Limit, "too many TLS handshakes at once"));
    };
    notice_death(&accepted.tcp);
    let credentials = credentials(worker, pod).await?;
    let handshake = ServerTunnel::accept(accepted.tcp, credentials.server_config());
    match tokio::time::timeout(Waits::HANDSHAKE, handshake).await {
        Ok(Ok(tunnel)) => Ok(tunnel),
        Ok(Err(e)) => Err(Refusal::new(e.reason(), format!("tunnel from {}: {e}", accepted.peer))),
        Err(_) => Err(Refusal::new(
            Reason::ConnectTimeout,
            format!("{} did not finish its handshake in time", accepted.peer),
        )),
    }
}

/// A peer that vanished without a word must not hold a tunnel for ever: probed every 10 s, given up
/// after 30 s without an answer.
fn notice_death(tcp: &TcpStream) {
    let (probe, patience) = (Duration::from_secs(10), Duration::from_secs(30));
    let socket = socket2::SockRef::from(tcp);
    let keepalive = TcpKeepalive::new().with_time(probe).with_interval(probe).with_retries(2);
    // Best effort: without it the tunnel lives longer than it should, and nothing else changes.
    let _ = socket.set_tcp_keepalive(&keepalive);
    let _ = socket.set_tcp_user_timeout(Some(patience));
}

async fn serve_stream(
    worker: Arc<Worker>,
    pod: Arc<Pod>,
    source: SocketAddr,
    peer: Arc<Identity>,
    incoming: Incoming,
) {
    let mut record = Record::tunnelled(&pod, source, peer.clone());
    let parent = incoming.headers.traceparent.as_ref();
    worker.recorder.trace(&mut record, parent.and_then(|h| SpanContext::parse(h.as_bytes())));
    let connected = Box::pin(stream(&worker, &pod, source, peer, incoming, &mut record)).await;
    finish(&worker, connected, &mut record).await;
    worker.recorder.write(record);
}

async fn stream(
    worker: &Worker,
    pod: &Arc<Pod>,
    source: SocketAddr,
    peer: Arc<Identity>,
    incoming: Incoming,
    record: &mut Record,
) -> Result<(Live, Ends), Refusal> {
    let destination = match &incoming.target {
        Ok(Authority::Address(address)) => *address,
        Ok(Authority::Host(host, _)) => {
            let words = format!("{host} is a host name; a pod's proxy takes addresses only");
            incoming.refuse(StatusCode::BAD_REQUEST, Reason::BadRequest);
            return Err(Refusal::new(Reason::BadRequest, words));
        }
        Err(words) => {
            let refusal = Refusal::new(Reason::BadRequest, words.clone());
            incoming.refuse(StatusCode::BAD_REQUEST, Reason::BadRequest);
            return Err(refusal);
        }
    };
    record.destination = destination;
    record.target = destination;
    let host = incoming.headers.forwarded_host();
    let claim = incoming.claim.clone();
    let call = Call { source, destination, peer: Some(peer), claim, host };
    let admitted = async {
        let workload = admit(worker, pod, &call, record).await?;
        let app = connect_to_app(worker, pod, &workload, &call).await?;
        Ok::<_, Refusal>((workload, app))
    };
    let (workload, app) = match admitted.await {
        Ok(admitted) => admitted,
        Err(refusal) => {
            incoming.refuse(status(refusal.reason), refusal.reason);
            return Err(refusal);
        }
    };
    let accepted = incoming.accept(ConnectHeaders::baggage_of(&workload));
    let (send, receive) = accepted.map_err(|e| {
        Refusal::new(Reason::ConnectionBroken, format!("the peer went away before the answer: {e}"))
    })?;
    Ok((call.live(pod, record), Ends::Accepted(app, send, receive)))
}

/// The status that stock peers understand (Istio: 401 policy, 400 nonsense, 503 cannot connect).
pub(crate) fn status(reason: Reason) -> StatusCode {
    match reason {
        Reason::PolicyDeny
        | Reason::PolicyNoAllow
        | Reason::PolicyMissing
        | Reason::MtlsRequired => StatusCode::UNAUTHORIZED,
        Reason::BadRequest | Reason::DestinationMismatch | Reason::MeshPort => {
            StatusCode::BAD_REQUEST
        }
        _ => StatusCode::SERVICE_UNAVAILABLE,
    }
}

/// Decides on a connection from another pod of this proxy, and makes its last hop. The record knows its ends.
pub(crate) async fn admit_joined(
    worker: &Worker,
    pod: &Arc<Pod>,
    record: &mut Record,
    host: Option<String>,
) -> Result<(Live, TcpStream), Refusal> {
    let (source, destination) = (record.source_address, record.destination);
    let call = Call { source, destination, peer: record.peer.clone(), claim: Ok(None), host };
    let workload = admit(worker, pod, &call, record).await?;
    let app = connect_to_app(worker, pod, &workload, &call).await?;
    let live = Live { hbone: false, ..call.live(pod, record) };
    Ok((live, app))
}

/// One inbound connection, as it wants to be.
struct Call {
    source: SocketAddr,
    destination: SocketAddr,
    peer: Option<Arc<Identity>>,
    /// For whom the peer says to speak.
    claim: Claim,
    /// What the client's proxy says was called. For telemetry only.
    host: Option<String>,
}

impl Call {
    fn live(&self, pod: &Arc<Pod>, record: &Record) -> Live {
        Live {
            pod: pod.clone(),
            direction: Direction::Inbound,
            source: self.source,
            destination: self.destination,
            peer: self.peer.clone(),
            client: record.client.clone(),
            hbone: self.peer.is_some(),
            started: record.started,
            judged: record.judged,
            moved: record.moved.clone(),
        }
    }
}

/// Asks the engine; waits for a policy in flight, or for what makes a waypoint's word count, but not longer than a second.
async fn admit(
    worker: &Worker,
    pod: &Arc<Pod>,
    call: &Call,
    record: &mut Record,
) -> Result<Arc<Workload>, Refusal> {
    let workload = own_workload(worker, pod).await?;
    record.destination_workload = Some(workload);
    let deadline = Instant::now() + Waits::POLICY;
    let mut changed = worker.shared.store.subscribe();
    loop {
        let verdict = {
            record.judged = worker.shared.store.generation();
            let snapshot = worker.shared.store.load();
            record.version = snapshot.version();
            let Some(workload) = pod.workload(&snapshot).cloned() else {
                return Err(Refusal::new(
                    Reason::UnknownWorkload,
                    format!("the control plane took pod {}/{} back", pod.namespace, pod.name),
                ));
            };
            if record.source.is_none() {
                let by_address = snapshot.workload_at(&workload.network, call.source.ip());
                record.source = by_address.cloned();
            }
            record.service = called_service(&snapshot, &workload, call);
            record.client = delegated(&snapshot, &workload, call.peer.as_deref(), &call.claim)?;
            let facts = InboundFacts {
                workload: &workload,
                destination: call.destination,
                source_ip: call.source.ip(),
                peer: call.peer.as_deref(),
                client: record.client.as_deref(),
            };
            let verdict = authorize(&snapshot, &facts);
            record.destination_workload = Some(workload.clone());
            match verdict {
                Verdict::Allow(why) => {
                    if let Allowed::By { policy, provenance } = why {
                        record.allowed_by = Some((policy, provenance));
                    }
                    return Ok(workload);
                }
                Verdict::Deny(refusal)
                    if refusal.reason == Reason::PolicyNoAllow
                        && claim_is_early(&snapshot, &facts, &call.claim) =>
                {
                    Verdict::Pending(refusal)
                }
                other => other,
            }
        };
        match verdict {
            Verdict::Pending(refusal) => {
                let left = deadline.saturating_duration_since(Instant::now());
                if !matches!(tokio::time::timeout(left, changed.changed()).await, Ok(Ok(()))) {
                    return Err(refusal);
                }
            }
            Verdict::Deny(refusal) => return Err(refusal),
            Verdict::Allow(_) => {}
        }
    }
}

/// The Service that was called, as far as it can be told here: the one that the client's proxy names, if the workload is
/// an endpoint of it; else the first that has this port.
fn called_service(snapshot: &Snapshot, workload: &Workload, call: &Call) -> Option<Arc<Service>> {
    let named = call
        .host
        .as_deref()
        .and_then(|host| workload.services.iter().find(|(key, _)| *key.hostname == *host));
    let port = call.destination.port();
    let serves = |ports: &[ServicePort]| ports.iter().any(|p| p.target_port == port);
    let (key, _) = named.or_else(|| workload.services.iter().find(|(_, ports)| serves(ports)))?;
    snapshot.service(key).cloned()
}

/// The last hop, in the client's name: the application sees who called.
async fn connect_to_app(
    worker: &Worker,
    pod: &Pod,
    workload: &Workload,
    call: &Call,
) -> Result<TcpStream, Refusal> {
    let to = call.destination;
    // `authorize` has refused these already; the socket must not depend on that.
    if MESH_PORTS.contains(&to.port()) || !is_local(&workload.addresses, to.ip()) {
        return Err(Refusal::new(Reason::MeshPort, format!("{to} is not the pod's to serve")));
    }
    let from: IpAddr = call.source.ip();
    // The pod calling itself through its service needs no disguise, and a client of the other address
    // family cannot be impersonated.
    let foreign = !is_local(&workload.addresses, from) && from.is_ipv4() == to.is_ipv4();
    let opts = ConnectOpts {
        mark: Some(match worker.shared.config.capture() {
            Capture::Tproxy if foreign => MARK_TO_APP,
            // istio-cni's rules know one mark and tell the answers by the connection's.
            Capture::Tproxy | Capture::Redirect => MARK_PROXY,
        }),
        transparent_source: foreign.then_some(from),
        source_ports: SourcePorts::OutsideEphemeral,
        nodelay: true,
        keepalive: None,
    };
    match tokio::time::timeout(Waits::CONNECT, connect_from(pod, to, &opts)).await {
        Ok(Ok(tcp)) => Ok(tcp),
        Ok(Err(e)) => {
            Err(Refusal::new(Reason::ConnectFailed, format!("the application at {to}: {e}")))
        }
        Err(_) => Err(Refusal::new(
            Reason::ConnectTimeout,
            format!("the application at {to} did not answer in {} s", Waits::CONNECT.as_secs()),
        )),
    }
}
