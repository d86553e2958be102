//! Tunnels of clients: handshake, who may ask for what, and what is spoken inside each stream.
//!
//! Invariant: a stream is answered 200 before anybody has looked at its bytes, so that HTTP is refused in HTTP; what is
//! refused before that is refused with a status and a reason that the client's proxy logs.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use agent::trace::SpanContext;
use engine::Admitted;
use hbone::{ConnectHeaders, Incoming, ServerTunnel, TunnelIo};
use http::StatusCode;
use model::http::Protocol;
use model::{Identity, Reason, Refusal};
use socket2::TcpKeepalive;
use tokio::net::TcpStream;
use tokio::sync::watch;

use crate::call::Call;
use crate::config::Waits;
use crate::io::PeerIo;
use crate::proxy;
use crate::record::Record;
use crate::sniff::{Spoken, spoken, version};
use crate::tcp;
use crate::worker::{Shared, Stage, Worker, reached};

/// For the first request on a new tunnel when this proxy is going: it was dialled for a request, which is on its way.
const FIRST_REQUEST: Duration = Duration::from_secs(1);

/// Serves a tunnel: each CONNECT in a task of its own, most of them on this thread.
pub(crate) async fn serve_tunnel(worker: Arc<Worker>, tcp: TcpStream, source: SocketAddr) {
    let mut tunnel = match Box::pin(accept(&worker, tcp, source)).await {
        Ok(tunnel) => tunnel,
        Err(refusal) => return worker.recorder.write(Record::early(source, None, refusal)),
    };
    let client = Arc::new(tunnel.peer().clone());
    let mut stage = worker.shared.stage();
    let (mut draining, mut used) = (false, false);
    loop {
        let next = tokio::select! {
            next = tunnel.next() => next,
            () = no_longer_wanted(&mut stage, used), if !draining => {
                draining = true;
                tunnel.drain();
                continue;
            }
        };
        match next {
            Some(Ok(incoming)) => {
                used = true;
                worker.place_stream(ClientStream { source, client: client.clone(), incoming });
            }
            // A broken connection says so again each time it is asked.
            Some(Err(e)) => return tracing::debug!(error = %e, %source, "tunnel broke"),
            None => return,
        }
    }
}

/// Resolves when the proxy goes. A tunnel without a request so far has one on its way: a GOAWAY before it would fail the
/// connection that it was dialled for, where the peer does not dial again.
async fn no_longer_wanted(stage: &mut watch::Receiver<Stage>, used: bool) {
    reached(stage, Stage::is_leaving).await;
    if !used {
        tokio::time::sleep(FIRST_REQUEST).await;
    }
}

async fn accept(
    worker: &Worker,
    tcp: TcpStream,
    source: SocketAddr,
) -> Result<ServerTunnel, Refusal> {
    let Ok(_place) = worker.handshakes.try_acquire() else {
        return Err(Refusal::new(Reason::Limit, "too many TLS handshakes at once"));
    };
    notice_death(&tcp);
    let credentials = worker.credentials().await?;
    let handshake = ServerTunnel::accept(tcp, credentials.server_config());
    match tokio::time::timeout(Waits::HANDSHAKE, handshake).await {
        Ok(Ok(tunnel)) => Ok(tunnel),
        Ok(Err(e)) => Err(Refusal::new(e.reason(), format!("tunnel from {source}: {e}"))),
        Err(_) => {
            let words = format!("{source} did not finish its handshake in time");
            Err(Refusal::new(Reason::ConnectTimeout, words))
        }
    }
}

/// A peer that vanished without a word must not hold a tunnel for ever: probed every 10 s, given up after 30 s without an
/// answer.
fn notice_death(tcp: &TcpStream) {
    let (probe, patience) = (Duration::from_secs(10), Duration::from_secs(30));
    let socket = socket2::SockRef::from(tcp);
    let keepalive = TcpKeepalive::new().with_time(probe).with_interval(probe).with_retries(2);
    // Best effort: without it the tunnel lives longer than it should, and nothing else changes.
    let _ = socket.set_tcp_keepalive(&keepalive);
    let _ = socket.set_tcp_user_timeout(Some(patience));
}

/// A CONNECT stream that nobody has answered.
#[derive(Debug)]
pub struct ClientStream {
    source: SocketAddr,
    client: Arc<Identity>,
    incoming: Incoming,
}

/// Serves one stream, on the thread that was chosen for it.
pub(crate) async fn serve_stream(worker: Arc<Worker>, stream: ClientStream) {
    let ClientStream { source, client, incoming } = stream;
    let (call, io, place) =
        match Box::pin(admit(worker.clone(), source, client.clone(), incoming)).await {
            Ok(admitted) => admitted,
            Err(refusal) => {
                return worker.recorder.write(Record::early(source, Some(client), refusal));
            }
        };
    let record = Record::new(&call);
    let protocol = match call.admission().map(|admission| protocol(&admission.to)) {
        Ok(protocol) => protocol,
        // Taken back since a moment ago; the stream is reset.
        Err(refusal) => {
            return worker.recorder.write(Record::early(source, Some(client), refusal));
        }
    };
    match protocol {
        Protocol::Opaque => tcp::pass(call, io, record).await,
        Protocol::Undeclared => undeclared(call, io, record).await,
        Protocol::Http | Protocol::Http2 | Protocol::Grpc => declared(call, io).await,
    }
    drop(place);
}

fn protocol(to: &Admitted) -> Protocol {
    match to {
        Admitted::Service { protocol, .. } | Admitted::Workload { protocol, .. } => *protocol,
    }
}

/// Lets a stream in and says so, or says why not.
async fn admit(
    worker: Arc<Worker>,
    source: SocketAddr,
    client: Arc<Identity>,
    incoming: Incoming,
) -> Result<(Call, TunnelIo, Place), Refusal> {
    let authority = match &incoming.target {
        Ok(authority) => authority.clone(),
        Err(words) => {
            let refusal = Refusal::new(Reason::BadRequest, words.clone());
            incoming.refuse(StatusCode::BAD_REQUEST, Reason::BadRequest);
            return Err(refusal);
        }
    };
    let trace = incoming.headers.traceparent.as_ref();
    let trace = trace.and_then(|header| SpanContext::parse(header.as_bytes()));
    let admitted = match Place::new(&worker.shared) {
        Ok(place) => {
            let call = Call::admit(worker.clone(), client, source, authority, trace).await;
            call.map(|call| (call, place))
        }
        Err(refusal) => Err(refusal),
    };
    let (call, place) = match admitted {
        Ok(admitted) => admitted,
        Err(refusal) => {
            incoming.refuse(status(refusal.reason), refusal.reason);
            return Err(refusal);
        }
    };
    let baggage = call.admission().ok().and_then(|a| ConnectHeaders::baggage_of(&a.own));
    let (send, receive) = incoming.accept(baggage).map_err(|e| {
        let words = format!("the peer went away before the answer: {e}");
        Refusal::new(Reason::ConnectionBroken, words)
    })?;
    Ok((call, TunnelIo::accepted(send, receive), place))
}

/// The status that stock peers understand (Istio: 401 policy, 400 nonsense, 503 cannot).
fn status(reason: Reason) -> StatusCode {
    match reason {
        Reason::PolicyDeny
        | Reason::PolicyNoAllow
        | Reason::PolicyMissing
        | Reason::MtlsRequired => StatusCode::UNAUTHORIZED,
        Reason::BadRequest | Reason::MeshPort => StatusCode::BAD_REQUEST,
        Reason::NotBound | Reason::NoSuchPort => StatusCode::NOT_FOUND,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    }
}

/// A port that speaks HTTP: of which version, the client's first bytes say. What is none is refused in HTTP/1.
async fn declared(call: Call, mut io: TunnelIo) {
    let said = tokio::time::timeout(Waits::IDLE, version(&mut io)).await;
    let http2 = matches!(said, Ok(Ok(Spoken::Http2)));
    if matches!(said, Ok(Ok(_))) {
        proxy::serve(call, PeerIo::Tunnel(io), http2).await;
    }
}

/// A port of which nothing is known: looked at.
async fn undeclared(call: Call, mut io: TunnelIo, record: Record) {
    let said = tokio::time::timeout(Waits::FIRST_BYTES, spoken(&mut io)).await;
    match said {
        Ok(Ok(Spoken::Http1)) => proxy::serve(call, PeerIo::Tunnel(io), false).await,
        Ok(Ok(Spoken::Http2)) => proxy::serve(call, PeerIo::Tunnel(io), true).await,
        Ok(Ok(Spoken::Other)) => tcp::pass(call, io, record).await,
        // It went away.
        Ok(Err(_)) => {}
        Err(_) => {
            if let Some((call, io, _, http2)) = Box::pin(tcp::pass_or_http(call, io, record)).await
            {
                proxy::serve(call, PeerIo::Tunnel(io), http2).await;
            }
        }
    }
}

/// Counts a client's connection, until dropped.
struct Place(Arc<Shared>);

impl Place {
    fn new(shared: &Arc<Shared>) -> Result<Self, Refusal> {
        let limit = shared.config.max_connections;
        if shared.open.fetch_add(1, Ordering::Relaxed) >= limit {
            shared.open.fetch_sub(1, Ordering::Relaxed);
            let words = format!("{limit} connections are open (--max-connections)");
            return Err(Refusal::new(Reason::Limit, words));
        }
        Ok(Self(shared.clone()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let open: &AtomicUsize = &self.0.open;
        open.fetch_sub(1, Ordering::Relaxed);
    }
}
