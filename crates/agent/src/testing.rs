//! A control plane for tests: real sockets on loopback, real TLS, and answers that the test decides.

use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::future::BoxFuture;
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use model::Identity;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer,
    DistinguishedName, DnType, IsCa, KeyPair, SanType,
};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::server::WebPkiClientVerifier;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::server::{Grpc, StreamingService, UnaryService};
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;
use xds::ca::{IstioCertificateRequest, IstioCertificateResponse};
use xds::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};

use crate::control_plane::{
    Anchors, CERTIFICATE_LIFETIME, ControlPlane, Login, Proxy, RootCert, Server,
};

pub(crate) const SERVER_NAME: &str = "istiod.istio-system.svc";

/// A root that signs what it is asked to.
pub(crate) struct TestCa {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl TestCa {
    pub(crate) fn new() -> Arc<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "test root");
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        Arc::new(Self { issuer })
    }

    pub(crate) fn root_pem(&self) -> String {
        self.issuer.pem()
    }

    /// Signs a request for an identity; returns leaf and root.
    pub(crate) fn sign(
        &self,
        csr: &str,
        identity: &Identity,
        from: u64,
        until: u64,
    ) -> Vec<String> {
        let time = |s| (SystemTime::UNIX_EPOCH + Duration::from_secs(s)).into();
        let mut csr = CertificateSigningRequestParams::from_pem(csr).unwrap();
        csr.params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into().unwrap())];
        csr.params.not_before = time(from);
        csr.params.not_after = time(until);
        let leaf = csr.signed_by(&self.issuer).unwrap();
        vec![leaf.pem(), self.root_pem()]
    }

    fn server_config(&self) -> rustls::ServerConfig {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new([SERVER_NAME.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.root_pem().as_bytes()).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
                .allow_unauthenticated()
                .build()
                .unwrap();
        let key = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![certificate.der().clone()], key)
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        config
    }
}

/// A proxy's settings for a control plane, with folders inside `dir`.
pub(crate) fn control_plane(dir: &Path, ca: &TestCa, address: &str) -> ControlPlane {
    let root_cert = dir.join("root-cert.pem");
    std::fs::write(&root_cert, ca.root_pem()).unwrap();
    let server = Server {
        address: address.to_owned(),
        name: SERVER_NAME.to_owned(),
        root: RootCert::File(root_cert),
        headers: Vec::new(),
    };
    ControlPlane {
        xds: server.clone(),
        ca: server,
        login: Login::Certificate { bootstrap_token: None },
        kinds: &xds::Kind::OF_NODE,
        anchors: Anchors::RootFile,
        proxy: Proxy::of_node("node-1"),
        cluster: "Kubernetes".into(),
        network: "".into(),
        trust_domain: "cluster.local".into(),
        certificate_lifetime: CERTIFICATE_LIFETIME,
        state_dir: dir.join("state"),
        secret_dir: dir.join("secrets"),
    }
}

/// How a caller of the CA showed itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Caller {
    pub(crate) certificate: Option<Identity>,
    pub(crate) authorization: Option<String>,
}

type CaAnswer =
    dyn Fn(Caller, IstioCertificateRequest) -> Result<Vec<String>, Status> + Send + Sync;

/// One discovery stream, as the control plane sees it.
pub(crate) struct Stream {
    pub(crate) requests: Streaming<DeltaDiscoveryRequest>,
    pub(crate) responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
}

impl Stream {
    pub(crate) async fn next(&mut self) -> DeltaDiscoveryRequest {
        self.requests.message().await.unwrap().expect("the proxy ended the stream")
    }

    pub(crate) async fn send(&self, response: DeltaDiscoveryResponse) {
        self.responses.send(Ok(response)).await.expect("the proxy ended the stream");
    }
}

/// A control plane on a port of its own. Ends when it is dropped.
pub(crate) struct StandIn {
    pub(crate) address: String,
    pub(crate) streams: mpsc::Receiver<Stream>,
    tasks: tokio::task::JoinHandle<()>,
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.tasks.abort();
    }
}

impl StandIn {
    pub(crate) async fn start(
        ca: &TestCa,
        answer: impl Fn(Caller, IstioCertificateRequest) -> Result<Vec<String>, Status>
        + Send
        + Sync
        + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("https://{}", listener.local_addr().unwrap());
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(ca.server_config()));
        let (opened, streams) = mpsc::channel(8);
        let answer: Arc<CaAnswer> = Arc::new(answer);
        let tasks = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                let (acceptor, opened, answer) = (acceptor.clone(), opened.clone(), answer.clone());
                connections.spawn(async move {
                    let Ok(tls) = acceptor.accept(tcp).await else { return };
                    let peer = tls.get_ref().1.peer_certificates();
                    let peer = peer.map(|chain| hbone::peer_identity(&chain[0]).unwrap());
                    let service = service_fn(move |request| {
                        serve(request, peer.clone(), opened.clone(), answer.clone())
                    });
                    let _ = http2::Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(tls), service)
                        .await;
                });
            }
        });
        Self { address, streams, tasks }
    }

    /// The next stream that a node's proxy opens, its subscriptions taken.
    pub(crate) async fn subscribed(&mut self) -> (Stream, Vec<DeltaDiscoveryRequest>) {
        self.subscribed_to(&xds::Kind::OF_NODE).await
    }

    /// The same for a proxy that asks for these.
    pub(crate) async fn subscribed_to(
        &mut self,
        kinds: &[xds::Kind],
    ) -> (Stream, Vec<DeltaDiscoveryRequest>) {
        let mut stream = self.streams.recv().await.unwrap();
        let mut subscriptions = Vec::new();
        for _ in kinds {
            subscriptions.push(stream.next().await);
        }
        (stream, subscriptions)
    }
}

async fn serve(
    request: http::Request<Incoming>,
    certificate: Option<Identity>,
    opened: mpsc::Sender<Stream>,
    answer: Arc<CaAnswer>,
) -> Result<http::Response<Body>, Infallible> {
    Ok(match request.uri().path() {
        xds::DELTA_PATH if certificate.is_none() => {
            Status::unauthenticated("no certificate").into_http()
        }
        xds::DELTA_PATH => {
            Grpc::new(ProstCodec::default()).streaming(Discovery(opened), request).await
        }
        _ => {
            let service = Certificates { certificate, answer };
            Grpc::new(ProstCodec::default()).unary(service, request).await
        }
    })
}

struct Discovery(mpsc::Sender<Stream>);

impl StreamingService<DeltaDiscoveryRequest> for Discovery {
    type Response = DeltaDiscoveryResponse;
    type ResponseStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;
    type Future = BoxFuture<'static, Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<Streaming<DeltaDiscoveryRequest>>) -> Self::Future {
        let opened = self.0.clone();
        Box::pin(async move {
            let (responses, outgoing) = mpsc::channel(8);
            let stream = Stream { requests: request.into_inner(), responses };
            opened.send(stream).await.map_err(|_| Status::unavailable("the test is over"))?;
            Ok(Response::new(ReceiverStream::new(outgoing)))
        })
    }
}

struct Certificates {
    certificate: Option<Identity>,
    answer: Arc<CaAnswer>,
}

impl UnaryService<IstioCertificateRequest> for Certificates {
    type Response = IstioCertificateResponse;
    type Future = std::future::Ready<Result<Response<IstioCertificateResponse>, Status>>;

    fn call(&mut self, request: Request<IstioCertificateRequest>) -> Self::Future {
        let authorization = request.metadata().get("authorization");
        let authorization = authorization.map(|value| value.to_str().unwrap().to_owned());
        let caller = Caller { certificate: self.certificate.clone(), authorization };
        let chain = (self.answer)(caller, request.into_inner());
        std::future::ready(
            chain.map(|cert_chain| Response::new(IstioCertificateResponse { cert_chain })),
        )
    }
}

/// The identity that a certificate request names.
pub(crate) fn requested(request: &IstioCertificateRequest) -> Identity {
    let metadata = request.metadata.as_ref().unwrap();
    match &metadata.fields[xds::IMPERSONATED_IDENTITY].kind {
        Some(prost_types::value::Kind::StringValue(identity)) => identity.parse().unwrap(),
        other => panic!("{other:?}"),
    }
}

/// Seconds since the epoch.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
}
