//! The port of proxies: TLS, HTTP/2, and the two gRPC methods. Every step has a limit, since anyone who
//! reaches the port can start one.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::server::{Grpc, StreamingService, UnaryService};
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;
use xds::ca::{IstioCertificateRequest, IstioCertificateResponse};
use xds::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};

use crate::control::{Control, Peer};
use crate::tls::PeerCertificate;
use crate::{ads, certificates};

/// Proxies: two connections for each of a few hundred nodes.
const MAX_CONNECTIONS: usize = 1024;
/// Callers without a certificate: each proxy is one once, and a waypoint until it reads the configuration. Kept apart, so
/// that strangers who hold connections open do not keep proxies out.
const MAX_STRANGERS: usize = 128;
/// Connections in their handshake. Beyond it they wait in the kernel.
const MAX_HANDSHAKES: usize = 128;
/// Handshakes and strangers from one address: a pod that opens connections to keep others out keeps only
/// itself out. A proxy opens a handful, and many of them may be behind one address in a test.
const MAX_PER_ADDRESS: usize = 48;
/// A handshake is two round trips and a millisecond of arithmetic.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// What a stranger's connection is good for is one certificate call, or the start of a waypoint's stream.
const STRANGER: Duration = Duration::from_secs(30);
/// A proxy warms up some dozens of certificates at once, over one connection.
const MAX_STREAMS: u32 = 256;
/// A bearer token and gRPC's own headers.
const MAX_HEADERS: u32 = 16 * 1024;
/// Requests are small, but for the first one after a reconnect.
const WINDOW: u32 = 1 << 20;
/// A proxy that vanished without a word is noticed after the sum of both.
const KEEPALIVE: Duration = Duration::from_secs(30);
const KEEPALIVE_ANSWER: Duration = Duration::from_secs(20);
/// Out of file descriptors: trying again at once would only burn the processor.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How many connections of which sort are open.
#[derive(Debug)]
pub(crate) struct Limits {
    handshakes: Arc<Semaphore>,
    connections: Arc<Semaphore>,
    strangers: Arc<Semaphore>,
    /// Handshakes and strangers by address.
    addresses: Mutex<BTreeMap<IpAddr, usize>>,
}

/// One connection of an address; counted out when dropped.
struct Place {
    limits: Arc<Limits>,
    address: IpAddr,
}

impl Limits {
    fn place(self: &Arc<Self>, address: IpAddr) -> Option<Place> {
        let mut addresses = self.addresses.lock().unwrap_or_else(PoisonError::into_inner);
        let count = addresses.entry(address).or_default();
        if *count >= MAX_PER_ADDRESS {
            return None;
        }
        *count += 1;
        Some(Place { limits: self.clone(), address })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut addresses = self.limits.addresses.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = addresses.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                addresses.remove(&self.address);
            }
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            handshakes: Arc::new(Semaphore::new(MAX_HANDSHAKES)),
            connections: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
            strangers: Arc::new(Semaphore::new(MAX_STRANGERS)),
            addresses: Mutex::default(),
        }
    }
}

/// Accepts connections until the process stops.
pub(crate) async fn accept(
    listener: TcpListener,
    tls: Arc<rustls::ServerConfig>,
    control: Arc<Control>,
    limits: Arc<Limits>,
) {
    let acceptor = TlsAcceptor::from(tls);
    let mut stopping = control.stopping.clone();
    loop {
        let Ok(permit) = limits.handshakes.clone().acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stopping.wait_for(|stop| *stop) => return,
        };
        match accepted {
            Ok((tcp, address)) => {
                let Some(place) = limits.place(address.ip()) else {
                    control.metrics.connection_failed("too_many_from_address");
                    tracing::debug!(peer = %address, "connection refused: too many from this address");
                    continue;
                };
                let (acceptor, control, limits) =
                    (acceptor.clone(), control.clone(), limits.clone());
                tokio::spawn(async move {
                    let shaken = handshake(acceptor, tcp, address, &control).await;
                    drop(permit);
                    if let Some((stream, peer)) = shaken {
                        // Who has shown a certificate of ours no longer counts for its address; who has a token does.
                        let _place = peer.certificate.is_none().then_some(place);
                        serve(stream, peer, control, &limits).await;
                    }
                });
            }
            Err(error) => {
                control.metrics.connection_failed("accept");
                tracing::error!("cannot accept a connection: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn handshake(
    acceptor: TlsAcceptor,
    tcp: TcpStream,
    address: SocketAddr,
    control: &Control,
) -> Option<(TlsStream<TcpStream>, Peer)> {
    // Small messages both ways; without it the fallback is 40 ms late.
    let _ = tcp.set_nodelay(true);
    let failed = |reason: &'static str, error: String| {
        control.metrics.connection_failed(reason);
        tracing::warn!(peer = %address, "TLS handshake failed: {error}");
    };
    match timeout(HANDSHAKE, acceptor.accept(tcp)).await {
        Ok(Ok(stream)) => {
            let certificates = stream.get_ref().1.peer_certificates();
            let leaf = certificates.and_then(|chain| chain.first());
            let certificate = leaf.map(PeerCertificate::parse);
            Some((stream, Peer::new(address, certificate)))
        }
        Ok(Err(error)) => {
            let (reason, text) = explain(&error);
            failed(reason, text);
            None
        }
        Err(_) => {
            failed("handshake_timeout", format!("not finished after {HANDSHAKE:?}"));
            None
        }
    }
}

/// Says in people's words what is wrong with the peer.
fn explain(error: &io::Error) -> (&'static str, String) {
    use rustls::CertificateError as Certificate;
    let tls = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
    let Some(rustls::Error::InvalidCertificate(wrong)) = tls else {
        return ("handshake", error.to_string());
    };
    match wrong {
        Certificate::UnknownIssuer | Certificate::BadSignature => (
            "foreign_root",
            "the client's certificate is not from this mesh's CA: its proxy holds certificates of another \
             or an earlier mesh and must get new ones"
                .into(),
        ),
        Certificate::Expired | Certificate::ExpiredContext { .. } => (
            "certificate_expired",
            format!("the client's certificate has expired, or our clock is ahead ({error})"),
        ),
        Certificate::NotValidYet | Certificate::NotValidYetContext { .. } => (
            "certificate_not_valid_yet",
            format!("the client's certificate is not valid yet: our clock is behind ({error})"),
        ),
        _ => ("certificate", error.to_string()),
    }
}

async fn serve(stream: TlsStream<TcpStream>, peer: Peer, control: Arc<Control>, limits: &Limits) {
    let is_stranger = peer.certificate.is_none();
    let pool = if is_stranger { &limits.strangers } else { &limits.connections };
    let Ok(permit) = pool.clone().try_acquire_owned() else {
        control.metrics.connection_failed("too_many");
        tracing::warn!(peer = %peer.address, "connection refused: there are too many");
        return;
    };
    let admitted = peer.admitted.subscribe();
    let address = peer.address;
    let mut stopping = control.stopping.clone();
    let peer = Arc::new(peer);
    let service = service_fn(move |request| answer(control.clone(), peer.clone(), request));
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE_ANSWER)
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEADERS)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let lifetime = lifetime(is_stranger, admitted, permit, limits);
    let ended = tokio::select! {
        ended = &mut connection => Some(ended),
        () = lifetime => None,
        _ = stopping.wait_for(|stop| *stop) => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            connection.as_mut().graceful_shutdown();
            // Calls that are under way may end; streams end by themselves when we stop.
            match timeout(HANDSHAKE, connection).await {
                Ok(ended) => ended,
                Err(_) => return,
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(peer = %address, "connection ended: {error}");
    }
}

/// Returns when the connection has lived long enough: for ever, unless it is a stranger's that nothing admits.
async fn lifetime(
    is_stranger: bool,
    mut admitted: watch::Receiver<bool>,
    permit: OwnedSemaphorePermit,
    limits: &Limits,
) {
    let mut held = permit;
    if is_stranger {
        let wait = timeout(STRANGER, admitted.wait_for(|admitted| *admitted));
        let is_admitted = matches!(wait.await, Ok(Ok(_)));
        if !is_admitted {
            return;
        }
        // From here on it is counted among the proxies. Where they are too many it has to go.
        let Ok(among_proxies) = limits.connections.clone().try_acquire_owned() else { return };
        held = among_proxies;
    }
    std::future::pending::<()>().await;
    drop(held);
}

async fn answer(
    control: Arc<Control>,
    peer: Arc<Peer>,
    request: http::Request<Incoming>,
) -> Result<http::Response<Body>, Infallible> {
    let response = match request.uri().path() {
        xds::DELTA_PATH => {
            Grpc::new(ProstCodec::default())
                .max_decoding_message_size(ads::MAX_REQUEST)
                .streaming(Discovery { control, peer }, request)
                .await
        }
        xds::CREATE_CERTIFICATE_PATH => {
            Grpc::new(ProstCodec::default())
                .max_decoding_message_size(certificates::MAX_REQUEST)
                .unary(Certificates { control, peer }, request)
                .await
        }
        other => {
            let other: String = other.chars().take(256).collect();
            Status::unimplemented(format!("there is no {other} here")).into_http()
        }
    };
    Ok(response)
}

struct Discovery {
    control: Arc<Control>,
    peer: Arc<Peer>,
}

impl StreamingService<DeltaDiscoveryRequest> for Discovery {
    type Response = DeltaDiscoveryResponse;
    type ResponseStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;
    type Future = std::future::Ready<Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<Streaming<DeltaDiscoveryRequest>>) -> Self::Future {
        let (metadata, _, requests) = request.into_parts();
        let headers = metadata.into_headers();
        let opened = ads::open(&self.control, &self.peer, &headers, requests);
        std::future::ready(opened.map(Response::new))
    }
}

struct Certificates {
    control: Arc<Control>,
    peer: Arc<Peer>,
}

impl UnaryService<IstioCertificateRequest> for Certificates {
    type Response = IstioCertificateResponse;
    type Future = BoxFuture<'static, Result<Response<IstioCertificateResponse>, Status>>;

    fn call(&mut self, request: Request<IstioCertificateRequest>) -> Self::Future {
        let (control, peer) = (self.control.clone(), self.peer.clone());
        Box::pin(async move {
            let (metadata, _, request) = request.into_parts();
            let headers = metadata.into_headers();
            let issued = certificates::create_certificate(&control, &peer, &headers, request).await;
            issued.map(Response::new)
        })
    }
}
