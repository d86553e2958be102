//! `istiod` as a proxy sees it: TLS under its own name, delta discovery and certificates for who shows the token.
//!
//! Invariants: it knows Istio's two types and ends a stream that asks for others; a call without the token of this moment
//! and the cluster's name is not authenticated; what it sends after a reconnect is the difference to what the proxy says it
//! holds; removals are named.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message as _;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer,
    DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, SanType,
};
use rustls::pki_types::PrivateKeyDer;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::metadata::MetadataMap;
use tonic::server::{Grpc, StreamingService, UnaryService};
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;
use xds::any::Any;
use xds::ca::{IstioCertificateRequest, IstioCertificateResponse};
use xds::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource as Wire};
use xds::{security, workload};

pub const NAME: &str = "istiod.istio-system.svc";
pub const ADDRESS_TYPE: &str = "type.googleapis.com/istio.workload.Address";
pub const AUTHORIZATION_TYPE: &str = "type.googleapis.com/istio.security.Authorization";
const DISCOVERY: &str =
    "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
const CREATE_CERTIFICATE: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";
/// How long its tasks may take to end.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// Lifetime of what it signs.
const LIFETIME: Duration = Duration::from_secs(3600);

/// Something to be served.
#[derive(Clone, Debug)]
pub struct Resource {
    pub kind: &'static str,
    pub name: String,
    pub value: Vec<u8>,
}

impl Resource {
    pub fn workload(w: workload::Workload) -> Self {
        let name = w.uid.clone();
        Self::address(name, workload::address::Type::Workload(w))
    }

    pub fn service(s: workload::Service) -> Self {
        let name = format!("{}/{}", s.namespace, s.hostname);
        Self::address(name, workload::address::Type::Service(s))
    }

    fn address(name: String, value: workload::address::Type) -> Self {
        let value = workload::Address { r#type: Some(value) }.encode_to_vec();
        Self { kind: ADDRESS_TYPE, name, value }
    }

    pub fn policy(p: &security::Authorization) -> Self {
        let name = format!("{}/{}", p.namespace, p.name);
        Self { kind: AUTHORIZATION_TYPE, name, value: p.encode_to_vec() }
    }
}

/// What happened, for tests to look at.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// The node of every stream's first request.
    pub nodes: Vec<String>,
    /// Names that the proxies said to hold when they connected, without those that held nothing.
    pub held: Vec<Vec<String>>,
    pub acks: usize,
    pub nacks: Vec<String>,
    /// Identity and seconds of every certificate asked for.
    pub certificates: Vec<(String, i64)>,
    pub unauthenticated: usize,
    /// Types asked for that Istio does not have.
    pub unknown_types: Vec<String>,
}

/// A running stand-in.
pub struct Istiod {
    shared: Arc<Shared>,
    root: String,
    runtime: Option<tokio::runtime::Runtime>,
}

struct Shared {
    issuer: CertifiedIssuer<'static, KeyPair>,
    state: Mutex<State>,
    /// Counts changes.
    changed: watch::Sender<u64>,
    /// Counts the times that all connections were cut.
    cut: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    token: String,
    cluster: String,
    /// By type and name: version and value.
    resources: BTreeMap<(&'static str, String), (u64, Vec<u8>)>,
    version: u64,
    seen: Seen,
}

impl std::fmt::Debug for Istiod {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Istiod").field("seen", &self.shared.lock().seen).finish_non_exhaustive()
    }
}

impl Drop for Istiod {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Istiod {
    /// Serves at `address`; takes calls with this token.
    pub fn start(address: SocketAddr, token: &str, cluster: &str) -> Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "cluster.local");
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let root = issuer.pem();
        let state = State { token: token.into(), cluster: cluster.into(), ..State::default() };
        let shared = Arc::new(Shared {
            issuer,
            state: Mutex::new(state),
            changed: watch::Sender::new(0),
            cut: watch::Sender::new(0),
        });
        let tls = TlsAcceptor::from(Arc::new(server_config(&shared)?));
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let listener = runtime.block_on(TcpListener::bind(address)).context("istiod's port")?;
        runtime.spawn(accept(listener, tls, shared.clone()));
        Ok(Self { shared, root, runtime: Some(runtime) })
    }

    /// PEM of the mesh's root, which also signed its own certificate.
    pub fn root(&self) -> &str {
        &self.root
    }

    /// From now on only this token counts.
    pub fn rotate_token(&self, token: &str) {
        token.clone_into(&mut self.shared.lock().token);
    }

    /// Serves this instead of what had its name.
    pub fn set(&self, resource: Resource) {
        let mut state = self.shared.lock();
        state.version += 1;
        let version = state.version;
        state.resources.insert((resource.kind, resource.name), (version, resource.value));
        drop(state);
        self.shared.changed.send_modify(|n| *n += 1);
    }

    pub fn remove(&self, kind: &'static str, name: &str) {
        self.shared.lock().resources.remove(&(kind, name.to_owned()));
        self.shared.changed.send_modify(|n| *n += 1);
    }

    /// Ends for good.
    pub fn stop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(LAST_WORDS);
        }
    }

    /// Ends every connection.
    pub fn cut(&self) {
        self.shared.cut.send_modify(|n| *n += 1);
    }

    pub fn seen(&self) -> Seen {
        self.shared.lock().seen.clone()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Istio's JWT authenticator, as far as a proxy can tell.
    fn authenticate(&self, metadata: &MetadataMap) -> Result<(), Status> {
        let mut state = self.lock();
        let text = |name| metadata.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default();
        let token = text("authorization") == format!("Bearer {}", state.token);
        if token && text("clusterid") == state.cluster {
            return Ok(());
        }
        state.seen.unauthenticated += 1;
        Err(Status::unauthenticated("authentication failure"))
    }

    fn sign(&self, request: &IstioCertificateRequest) -> Result<Vec<String>, Status> {
        let metadata = request.metadata.as_ref();
        let field = metadata.and_then(|m| m.fields.get("ImpersonatedIdentity"));
        let Some(prost_types::value::Kind::StringValue(identity)) =
            field.and_then(|f| f.kind.clone())
        else {
            return Err(Status::invalid_argument("no identity to impersonate"));
        };
        self.lock().seen.certificates.push((identity.clone(), request.validity_duration));
        let bad = |e: &dyn std::fmt::Display| Status::invalid_argument(e.to_string());
        let mut csr =
            CertificateSigningRequestParams::from_pem(&request.csr).map_err(|e| bad(&e))?;
        let name = identity.as_str().try_into().map_err(|e| bad(&e))?;
        csr.params.subject_alt_names = vec![SanType::URI(name)];
        let now = std::time::SystemTime::now();
        csr.params.not_before = (now - Duration::from_secs(120)).into();
        csr.params.not_after = (now + LIFETIME).into();
        csr.params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let leaf = csr.signed_by(&self.issuer).map_err(|e| bad(&e))?;
        Ok(vec![leaf.pem(), self.issuer.pem()])
    }

    /// The difference between what a proxy holds of a type and what it should.
    fn difference(
        &self,
        kind: &'static str,
        held: &mut BTreeMap<String, String>,
    ) -> (Vec<Wire>, Vec<String>) {
        let state = self.lock();
        let wanted = state.resources.iter().filter(|((k, _), _)| *k == kind);
        let wanted: BTreeMap<_, _> = wanted
            .map(|((_, name), (version, value))| (name, (version.to_string(), value)))
            .collect();
        let gone: Vec<String> = held.keys().filter(|n| !wanted.contains_key(n)).cloned().collect();
        held.retain(|name, _| wanted.contains_key(name));
        let mut changed = Vec::new();
        for (name, (version, value)) in wanted {
            if held.get(name) != Some(&version) {
                let any = Any { type_url: kind.to_owned(), value: value.clone().into() };
                held.insert(name.clone(), version.clone());
                let resource = Some(any);
                changed.push(Wire { name: name.clone(), version, resource, ..Wire::default() });
            }
        }
        (changed, gone)
    }
}

fn server_config(shared: &Shared) -> Result<rustls::ServerConfig> {
    let key = KeyPair::generate()?;
    let certificate = CertificateParams::new([NAME.to_owned()])?.signed_by(&key, &shared.issuer)?;
    let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

async fn accept(listener: TcpListener, tls: TlsAcceptor, shared: Arc<Shared>) {
    while let Ok((tcp, _)) = listener.accept().await {
        let (tls, shared) = (tls.clone(), shared.clone());
        let mut cut = shared.cut.subscribe();
        cut.mark_unchanged();
        tokio::spawn(async move {
            let Ok(stream) = tls.accept(tcp).await else { return };
            let service = service_fn(move |request| answer(shared.clone(), request));
            let connection = http2::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                _ = connection => {}
                _ = cut.changed() => {}
            }
        });
    }
}

async fn answer(
    shared: Arc<Shared>,
    request: http::Request<Incoming>,
) -> Result<http::Response<Body>, Infallible> {
    Ok(match request.uri().path() {
        DISCOVERY => Grpc::new(ProstCodec::default()).streaming(Service(shared), request).await,
        CREATE_CERTIFICATE => {
            Grpc::new(ProstCodec::default()).unary(Service(shared), request).await
        }
        other => Status::unimplemented(format!("no {other}")).into_http(),
    })
}

struct Service(Arc<Shared>);

impl UnaryService<IstioCertificateRequest> for Service {
    type Response = IstioCertificateResponse;
    type Future = std::future::Ready<Result<Response<IstioCertificateResponse>, Status>>;

    fn call(&mut self, request: Request<IstioCertificateRequest>) -> Self::Future {
        let known = self.0.authenticate(request.metadata());
        let chain = known.and_then(|()| self.0.sign(request.get_ref()));
        std::future::ready(
            chain.map(|cert_chain| Response::new(IstioCertificateResponse { cert_chain })),
        )
    }
}

type Responses = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

impl StreamingService<DeltaDiscoveryRequest> for Service {
    type Response = DeltaDiscoveryResponse;
    type ResponseStream = Responses;
    type Future = std::future::Ready<Result<Response<Responses>, Status>>;

    fn call(&mut self, request: Request<Streaming<DeltaDiscoveryRequest>>) -> Self::Future {
        let opened = self.0.authenticate(request.metadata()).map(|()| {
            let (responses, outgoing) = mpsc::channel(8);
            let stream =
                Stream { shared: self.0.clone(), responses, held: BTreeMap::new(), sent: 0 };
            tokio::spawn(stream.run(request.into_inner()));
            Response::new(ReceiverStream::new(outgoing))
        });
        std::future::ready(opened)
    }
}

/// One discovery stream.
struct Stream {
    shared: Arc<Shared>,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    /// By type: names and versions.
    held: BTreeMap<&'static str, BTreeMap<String, String>>,
    sent: u64,
}

impl Stream {
    async fn run(mut self, mut requests: Streaming<DeltaDiscoveryRequest>) {
        let mut changed = self.shared.changed.subscribe();
        changed.mark_unchanged();
        loop {
            let pushed = tokio::select! {
                request = requests.message() => match request {
                    Ok(Some(request)) => self.request(request).await,
                    _ => return,
                },
                Ok(()) = changed.changed() => self.push().await,
            };
            if pushed.is_none() {
                return;
            }
        }
    }

    async fn request(&mut self, request: DeltaDiscoveryRequest) -> Option<()> {
        let kind = [ADDRESS_TYPE, AUTHORIZATION_TYPE].into_iter().find(|k| *k == request.type_url);
        let Some(kind) = kind else {
            self.shared.lock().seen.unknown_types.push(request.type_url.clone());
            let status = Status::invalid_argument(format!("no type {:?}", request.type_url));
            let _ = self.responses.send(Err(status)).await;
            return None;
        };
        if !request.response_nonce.is_empty() {
            let mut state = self.shared.lock();
            match request.error_detail {
                Some(error) => state.seen.nacks.push(error.message),
                None => state.seen.acks += 1,
            }
            return Some(());
        }
        let held: BTreeMap<_, _> = request.initial_resource_versions.into_iter().collect();
        {
            let seen = &mut self.shared.lock().seen;
            seen.nodes.extend(request.node.map(|node| node.id));
            if !held.is_empty() {
                seen.held.push(held.keys().cloned().collect());
            }
        }
        self.held.insert(kind, held);
        self.push_kind(kind, true).await
    }

    async fn push(&mut self) -> Option<()> {
        for kind in self.held.keys().copied().collect::<Vec<_>>() {
            self.push_kind(kind, false).await?;
        }
        Some(())
    }

    async fn push_kind(&mut self, kind: &'static str, even_empty: bool) -> Option<()> {
        let (resources, removed_resources) = self.shared.difference(kind, self.held.get_mut(kind)?);
        if resources.is_empty() && removed_resources.is_empty() && !even_empty {
            return Some(());
        }
        self.sent += 1;
        let response = DeltaDiscoveryResponse {
            resources,
            removed_resources,
            type_url: kind.to_owned(),
            nonce: format!("n{}", self.sent),
            ..DeltaDiscoveryResponse::default()
        };
        self.responses.send(Ok(response)).await.ok()
    }
}
