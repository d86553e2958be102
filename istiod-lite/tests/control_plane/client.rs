//! A small proxy: asks for certificates and follows the discovery stream, over real sockets and TLS.
//! It knows the wire and none of the server's code.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use istiod_lite::config::Config;
use istiod_lite::{Inputs, Running, SERVER_NAME};
use rcgen::{CertificateParams, KeyPair, SanType};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::{Request, Status, Streaming};
use tonic_prost::ProstCodec;
use xds::ca::{IstioCertificateRequest, IstioCertificateResponse};
use xds::digest::Sum;
use xds::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use xds::{Kind, ambit, digest};

/// What a test waits for at most; passing takes milliseconds.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A control plane over a folder of its own.
pub(crate) struct World {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) running: Running,
}

impl World {
    pub(crate) async fn start(files: &[(&str, &str)]) -> Self {
        Self::start_with(files, |_| ()).await
    }

    pub(crate) async fn start_with(
        files: &[(&str, &str)],
        change: impl FnOnce(&mut Config),
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("yaml")).unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join("yaml").join(name), text).unwrap();
        }
        let mut config = config(dir.path());
        change(&mut config);
        let inputs = Inputs { epoch: Some(7), ..Inputs::default() };
        let running = istiod_lite::start(config, inputs).await.unwrap();
        within("ready", running.ready()).await;
        Self { dir, running }
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        std::fs::write(self.dir.path().join("yaml").join(name), text).unwrap();
    }

    pub(crate) fn remove(&self, name: &str) {
        std::fs::remove_file(self.dir.path().join("yaml").join(name)).unwrap();
    }

    pub(crate) fn token(&self, node: &str, token: &str) {
        self.running.register_token(&istiod_lite::tokens::registry_line(node, token)).unwrap();
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.running.addresses[0]
    }

    pub(crate) fn roots(&self) -> Vec<CertificateDer<'static>> {
        let pem = std::fs::read(&self.running.root_cert).unwrap();
        CertificateDer::pem_slice_iter(&pem).collect::<Result<_, _>>().unwrap()
    }

    /// A connection without a client certificate.
    pub(crate) async fn stranger(&self) -> Channel {
        Channel::open(self.address(), self.roots(), None).await.unwrap()
    }

    pub(crate) async fn with(&self, svid: &Svid) -> Result<Channel, String> {
        Channel::open(self.address(), self.roots(), Some(svid)).await
    }

    /// The certificate of a node's proxy, by a fresh token.
    pub(crate) async fn node(&self, node: &str) -> Svid {
        self.token(node, &format!("token-of-{node}"));
        let call = Call::default().bearer(&format!("token-of-{node}"));
        self.stranger().await.certificate(call).await.unwrap()
    }

    /// A node's proxy, connected.
    pub(crate) async fn proxy(&self, node: &str) -> Channel {
        let svid = self.node(node).await;
        self.with(&svid).await.unwrap()
    }
}

pub(crate) fn config(dir: &Path) -> Config {
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let mut config = Config::new(vec![dir.join("yaml")], dir.join("state"));
    config.listen = vec![any];
    config.status_listen = any;
    config
}

pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(_) => panic!("{what}: not within {PATIENCE:?}"),
    }
}

/// A key and its certificate.
pub(crate) struct Svid {
    pub(crate) key: KeyPair,
    /// Leaf, intermediate, root.
    pub(crate) chain: Vec<CertificateDer<'static>>,
}

/// A certificate call to be made.
#[derive(Default, Clone)]
pub(crate) struct Call {
    bearer: Option<String>,
    impersonated: Option<String>,
    csr_uri: Option<String>,
    csr: Option<String>,
    validity: i64,
}

impl Call {
    pub(crate) fn bearer(mut self, token: &str) -> Self {
        self.bearer = Some(token.into());
        self
    }

    pub(crate) fn impersonate(mut self, uri: &str) -> Self {
        self.impersonated = Some(uri.into());
        self
    }

    /// The CSR names this.
    pub(crate) fn csr_uri(mut self, uri: &str) -> Self {
        self.csr_uri = Some(uri.into());
        self
    }

    pub(crate) fn csr(mut self, pem: &str) -> Self {
        self.csr = Some(pem.into());
        self
    }

    pub(crate) fn validity(mut self, seconds: i64) -> Self {
        self.validity = seconds;
        self
    }
}

/// An HTTP/2 connection.
#[derive(Clone)]
pub(crate) struct Channel(SendRequest<Body>);

impl tonic::codegen::Service<http::Request<Body>> for Channel {
    type Response = http::Response<hyper::body::Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, hyper::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), hyper::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}

impl Channel {
    pub(crate) async fn open(
        address: SocketAddr,
        roots: Vec<CertificateDer<'static>>,
        svid: Option<&Svid>,
    ) -> Result<Self, String> {
        Self::open_from("127.0.0.1", address, roots, svid).await
    }

    pub(crate) async fn open_from(
        source: &str,
        address: SocketAddr,
        roots: Vec<CertificateDer<'static>>,
        svid: Option<&Svid>,
    ) -> Result<Self, String> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut store = rustls::RootCertStore::empty();
        roots.into_iter().for_each(|root| store.add(root).unwrap());
        let builder = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(store);
        let mut config = match svid {
            None => builder.with_no_client_auth(),
            Some(svid) => {
                let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(svid.key.serialize_der()));
                builder.with_client_auth_cert(svid.chain[..2].to_vec(), key).unwrap()
            }
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        let socket = tokio::net::TcpSocket::new_v4().map_err(|e| e.to_string())?;
        socket.bind((source.parse::<std::net::IpAddr>().unwrap(), 0).into()).unwrap();
        let tcp = socket.connect(address).await.map_err(|e| e.to_string())?;
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let name = SERVER_NAME.try_into().unwrap();
        let tls = connector.connect(name, tcp).await.map_err(|e| e.to_string())?;
        let (send, connection) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
            .handshake(TokioIo::new(tls))
            .await
            .map_err(|e| e.to_string())?;
        tokio::spawn(connection);
        Ok(Self(send))
    }

    /// Makes a certificate call; checks that what comes back belongs to the key.
    pub(crate) async fn certificate(&self, call: Call) -> Result<Svid, Status> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let mut params = CertificateParams::default();
        if let Some(uri) = &call.csr_uri {
            params.subject_alt_names = vec![SanType::URI(uri.as_str().try_into().unwrap())];
        }
        let csr = params.serialize_request(&key).unwrap().pem().unwrap();
        let metadata = call.impersonated.map(|uri| prost_types::Struct {
            fields: [(
                xds::IMPERSONATED_IDENTITY.to_owned(),
                prost_types::Value { kind: Some(prost_types::value::Kind::StringValue(uri)) },
            )]
            .into(),
        });
        let mut request = Request::new(IstioCertificateRequest {
            csr: call.csr.unwrap_or(csr),
            validity_duration: call.validity,
            metadata,
        });
        if let Some(token) = call.bearer {
            let value = format!("Bearer {token}").parse().unwrap();
            request.metadata_mut().insert("authorization", value);
        }
        let codec = ProstCodec::<IstioCertificateRequest, IstioCertificateResponse>::default();
        let mut grpc = self.grpc();
        grpc.ready().await.map_err(|e| Status::unknown(e.to_string()))?;
        let path = http::uri::PathAndQuery::from_static(xds::CREATE_CERTIFICATE_PATH);
        let response = grpc.unary(request, path, codec).await?.into_inner();
        let chain = response.cert_chain.iter();
        let chain = chain.map(|pem| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap());
        Ok(Svid { key, chain: chain.collect() })
    }

    /// Opens a discovery stream.
    pub(crate) async fn discover(&self) -> Result<Discovery, Status> {
        self.discover_with(None).await
    }

    /// Opens a discovery stream with a token.
    pub(crate) async fn discover_as(&self, token: &str) -> Result<Discovery, Status> {
        self.discover_with(Some(token)).await
    }

    async fn discover_with(&self, token: Option<&str>) -> Result<Discovery, Status> {
        let (requests, outbox) = mpsc::channel(16);
        let codec = ProstCodec::<DeltaDiscoveryRequest, DeltaDiscoveryResponse>::default();
        let mut grpc = self.grpc().max_decoding_message_size(64 << 20);
        grpc.ready().await.map_err(|e| Status::unknown(e.to_string()))?;
        let path = http::uri::PathAndQuery::from_static(xds::DELTA_PATH);
        let mut request = Request::new(ReceiverStream::new(outbox));
        if let Some(token) = token {
            let value = format!("Bearer {token}").parse().unwrap();
            request.metadata_mut().insert("authorization", value);
        }
        let responses = grpc.streaming(request, path, codec).await?.into_inner();
        Ok(Discovery { requests, responses, held: BTreeMap::new(), log: Vec::new() })
    }

    fn grpc(&self) -> tonic::client::Grpc<Self> {
        let origin = format!("https://{SERVER_NAME}").parse().unwrap();
        tonic::client::Grpc::with_origin(self.clone(), origin)
    }
}

/// A discovery stream, and what came over it.
pub(crate) struct Discovery {
    pub(crate) requests: mpsc::Sender<DeltaDiscoveryRequest>,
    pub(crate) responses: Streaming<DeltaDiscoveryResponse>,
    /// What a proxy would hold now.
    pub(crate) held: BTreeMap<Kind, BTreeMap<String, Vec<u8>>>,
    /// Every response as `+Kind/name` and `-Kind/name`, in order.
    pub(crate) log: Vec<String>,
}

impl Discovery {
    pub(crate) async fn subscribe(&mut self, kinds: &[Kind]) {
        for kind in kinds {
            let versions = self.held.get(kind).into_iter().flatten().map(|(name, value)| {
                (name.clone(), digest::version(digest::resource(name, value)))
            });
            let request = DeltaDiscoveryRequest {
                type_url: kind.type_url().into(),
                initial_resource_versions: versions.collect(),
                ..Default::default()
            };
            self.requests.send(request).await.unwrap();
        }
    }

    /// Takes one response in and acknowledges it, or refuses it with `error`.
    pub(crate) async fn take(
        &mut self,
        error: Option<&str>,
    ) -> Result<DeltaDiscoveryResponse, Status> {
        let message = within("a response", self.responses.message()).await?;
        let response = message.ok_or_else(|| Status::cancelled("the server closed the stream"))?;
        let kind = Kind::from_type_url(&response.type_url).expect("a type we asked for");
        let held = self.held.entry(kind).or_default();
        for resource in &response.resources {
            self.log.push(format!("+{kind}/{}", resource.name));
            let value = resource.resource.as_ref().expect("a value").value.to_vec();
            held.insert(resource.name.clone(), value);
        }
        for name in &response.removed_resources {
            self.log.push(format!("-{kind}/{name}"));
            held.remove(name);
        }
        let answer = DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            error_detail: error.map(|message| xds::discovery::Status {
                code: 3,
                message: message.into(),
                details: vec![],
            }),
            ..Default::default()
        };
        // Fails when the server has closed: the next take says so.
        let _ = self.requests.send(answer).await;
        Ok(response)
    }

    /// Takes responses until a marker comes; checks its sums. Returns the push and what came before.
    pub(crate) async fn until_marker(&mut self) -> (u64, Vec<String>) {
        self.log.clear();
        loop {
            let response = self.take(None).await.unwrap();
            if response.type_url != Kind::Marker.type_url() {
                continue;
            }
            let value = response.resources[0].resource.as_ref().unwrap().value.clone();
            let marker: ambit::PushMarker = prost::Message::decode(value).unwrap();
            assert_eq!(marker.epoch, 7);
            for holding in &marker.holdings {
                let kind = Kind::from_type_url(&holding.type_url).unwrap();
                let mut sum = Sum::default();
                for (name, value) in self.held.get(&kind).into_iter().flatten() {
                    sum.add(digest::resource(name, value));
                }
                assert_eq!((sum.count, sum.sum), (holding.count, holding.sum), "{kind}");
            }
            let mut log = std::mem::take(&mut self.log);
            assert_eq!(log.pop().as_deref(), Some("+PushMarker/push"));
            return (marker.number, log);
        }
    }
}

/// A file with a pod that runs.
pub(crate) fn pod(namespace: &str, name: &str, account: &str, node: &str, ip: &str) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata:
  name: {name}
  namespace: {namespace}
  labels: {{app: {account}}}
  annotations: {{ambient.istio.io/redirection: enabled}}
spec:
  nodeName: {node}
  serviceAccountName: {account}
  containers: [{{name: main, image: none}}]
status:
  phase: Running
  podIP: {ip}
  podIPs: [{{ip: {ip}}}]
  conditions: [{{type: Ready, status: \"True\"}}]
"
    )
}

pub(crate) const NAMESPACE: &str = "apiVersion: v1
kind: Namespace
metadata:
  name: shop
  labels: {istio.io/dataplane-mode: ambient}
";

/// A policy for the pods of `app`.
pub(crate) fn policy(name: &str, app: &str, port: u16) -> String {
    format!(
        "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: {name}, namespace: shop}}
spec:
  selector: {{matchLabels: {{app: {app}}}}}
  action: DENY
  rules:
  - to:
    - operation: {{ports: [\"{port}\"]}}
"
    )
}

/// GET of the status page: status code and body.
pub(crate) async fn get(address: SocketAddr, path: &str) -> (u16, String) {
    use http_body_util::BodyExt;
    let tcp = tokio::net::TcpStream::connect(address).await.unwrap();
    let (mut send, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(tcp)).await.unwrap();
    tokio::spawn(connection);
    let request = http::Request::get(path).header("host", "x").body(String::new()).unwrap();
    let response = send.send_request(request).await.unwrap();
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

pub(crate) fn state_file(world: &World, name: &str) -> PathBuf {
    world.dir.path().join("state").join(name)
}
