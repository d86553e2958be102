//! The world of these tests: a certificate authority, a snapshot written by hand, one waypoint, clients and endpoints.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use agent::access_log::{AccessLog, Format};
use agent::certs::CertStore;
use agent::control_plane::{
    Anchors, CERTIFICATE_LIFETIME, ControlPlane, Login, Proxy, RootCert, Server, Token,
};
use agent::metrics::Metrics;
use agent::store::ConfigStore;
use agent::trace::Tracer;
use bytes::Bytes;
use clap::Parser;
use hbone::{Authority, ConnectHeaders, Credentials, ServerTunnel, Tunnel, TunnelIo};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Empty, Full};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use model::http::{
    Audience, Backend, Filter, PathMatch, PortProtocol, Protocol, RouteKind, RouteMatch, RouteRule,
    RouteSet, ServiceRoutes, Target, Timeouts,
};
use model::{
    Change, GatewayAddress, GatewayDestination, Identity, Reason, Service, ServiceKey, ServicePort,
    TunnelProtocol, Vip, Workload,
};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType,
};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::Notify;
use waypoint::app::{make_workers, start_workers};
use waypoint::config::Config;
use waypoint::record::Recorder;
use waypoint::worker::{Shared, Worker};

pub(crate) type Error = Box<dyn std::error::Error + Send + Sync>;
pub(crate) type Body = UnsyncBoxBody<Bytes, Error>;

/// How long anything may take before a test fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Waits for a condition, as long as anything may take.
pub(crate) async fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(
        tokio::time::timeout(PATIENCE, waiting).await.is_ok(),
        "not within {PATIENCE:?}: {what}"
    );
}

pub(crate) fn empty() -> Body {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

pub(crate) fn full(text: impl Into<Bytes>) -> Body {
    Full::new(text.into()).map_err(|never| match never {}).boxed_unsync()
}

pub(crate) fn id(account: &str) -> Identity {
    Identity::new("cluster.local", "shop", account)
}

/// A loopback address that nobody else is likely to use: endpoints listen on port 15008 of it.
fn address() -> IpAddr {
    let mut random = fastrand::Rng::new();
    IpAddr::V4(Ipv4Addr::new(127, random.u8(1..250), random.u8(..), random.u8(1..250)))
}

struct Ca {
    issuer: Issuer<'static, KeyPair>,
    root: String,
}

impl Ca {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), root }
    }

    /// Key and certificate.
    fn sign(&self, id: &Identity) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.subject_alt_names = vec![SanType::URI(id.to_string().try_into().unwrap())];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let hour = Duration::from_secs(3600);
        params.not_before = (SystemTime::now() - hour).into();
        params.not_after = (SystemTime::now() + hour).into();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (key.serialize_pem(), certificate.pem())
    }

    fn credentials(&self, id: &Identity) -> Arc<Credentials> {
        let (key, certificate) = self.sign(id);
        let certificate = CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap();
        let root = CertificateDer::from_pem_slice(self.root.as_bytes()).unwrap();
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
        Arc::new(Credentials::new(id.clone(), vec![certificate], key, vec![root]).unwrap())
    }
}

/// See the module.
pub(crate) struct World {
    ca: Ca,
    pub(crate) store: Arc<ConfigStore>,
    pub(crate) metrics: Metrics,
    pub(crate) shared: Arc<Shared>,
    pub(crate) workers: Vec<Arc<Worker>>,
    log: Lines,
    waypoint: SocketAddr,
    _dir: tempfile::TempDir,
}

/// What the access log says.
#[derive(Clone, Default)]
struct Lines {
    text: Arc<Mutex<String>>,
}

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let mut text = self.text.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        text.push_str(&String::from_utf8_lossy(bytes));
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    config: Config,
}

fn config(arguments: &[&str]) -> Config {
    let own = ["waypoint", "--namespace", "shop", "--pod", "waypoint-0"];
    let more = ["--service-account", "waypoint", "--hbone-address", "127.0.0.1:0"];
    let all = own.into_iter().chain(more).chain(arguments.iter().copied());
    let config = Cli::parse_from(all).config;
    Config { workers: config.workers.or(Some(1)), ..config }
}

pub(crate) fn key(name: &str) -> ServiceKey {
    let hostname = format!("{name}.shop.svc.cluster.local").into();
    ServiceKey { namespace: "shop".into(), hostname }
}

fn workload(name: &str, ip: IpAddr, services: &[(&str, u16)]) -> Workload {
    let port = |target| ServicePort {
        service_port: 80,
        target_port: target,
        app_protocol: Default::default(),
    };
    Workload {
        addresses: [ip].into(),
        service_account: name.into(),
        protocol: TunnelProtocol::Hbone,
        services: services
            .iter()
            .map(|(service, target)| (key(service), [port(*target)].into()))
            .collect(),
        ..Workload::named(name, "shop", format!("{name}-0"))
    }
}

/// The address of `web`.
pub(crate) const WEB: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10)), 80);

pub(crate) fn service(name: &str, bound: bool) -> Service {
    let vip = Vip { network: "".into(), ip: WEB.ip(), prefix: 32 };
    let port =
        ServicePort { service_port: 80, target_port: 8080, app_protocol: Default::default() };
    let at = GatewayAddress {
        destination: GatewayDestination::Service(key("waypoint")),
        hbone_port: 15008,
    };
    Service {
        key: key(name),
        name: name.into(),
        vips: if name == "web" { [vip].into() } else { [].into() },
        ports: [port].into(),
        subject_alt_names: [].into(),
        waypoint: bound.then_some(at),
        load_balancing: Default::default(),
        families: Default::default(),
    }
}

impl World {
    /// A waypoint for `web`, which has no endpoint yet and speaks this.
    pub(crate) fn new(protocol: Protocol) -> Self {
        Self::with(protocol, &[])
    }

    pub(crate) fn with(protocol: Protocol, arguments: &[&str]) -> Self {
        let (ca, dir) = (Ca::new(), tempfile::tempdir().unwrap());
        let metrics = Metrics::new("waypoint", "0");
        let log = Lines::default();
        let store = Arc::new(ConfigStore::default());
        let certs = certs(&ca, dir.path());
        let (shared, handed) = Shared::new(config(arguments), store.clone(), certs);
        let lines = AccessLog::start(Format::Text, log.clone(), metrics.access_log_dropped());
        let lines = lines.unwrap();
        let recorder = || Recorder::new(metrics.clone(), lines.clone(), Tracer::off());
        let workers = make_workers(&shared, recorder);
        let waypoint = start_workers(&shared, workers.clone(), handed).unwrap();
        let world = Self { ca, store, metrics, shared, workers, log, waypoint, _dir: dir };
        let own = Workload {
            native_tunnel: true,
            ..workload("waypoint", address(), &[("waypoint", 15008)])
        };
        world.change([
            Change::SetWorkload(Arc::new(own)),
            Change::SetService(Arc::new(service("waypoint", false))),
            Change::SetService(Arc::new(service("web", true))),
        ]);
        world.speak("web", protocol);
        world
    }

    pub(crate) fn change(&self, changes: impl IntoIterator<Item = Change>) {
        self.store.publish(self.store.load().with(changes));
    }

    /// Declares what a Service's port speaks; it has no rules then.
    pub(crate) fn speak(&self, service: &str, protocol: Protocol) {
        self.set_routes(service, protocol, Vec::new());
    }

    /// Rules of `web`, each for everything that no rule before it matches.
    pub(crate) fn rules(&self, protocol: Protocol, rules: Vec<(RouteMatch, RouteRule)>) {
        self.rules_of("web", protocol, rules);
    }

    /// The same of any Service.
    pub(crate) fn rules_of(
        &self,
        service: &str,
        protocol: Protocol,
        rules: Vec<(RouteMatch, RouteRule)>,
    ) {
        self.rules_of_kind(RouteKind::Http, service, protocol, rules);
    }

    /// The same for either kind of routes.
    pub(crate) fn rules_of_kind(
        &self,
        kind: RouteKind,
        service: &str,
        protocol: Protocol,
        rules: Vec<(RouteMatch, RouteRule)>,
    ) {
        let (mut matches, mut all) = (Vec::new(), Vec::new());
        for (number, (m, rule)) in rules.into_iter().enumerate() {
            matches.push(RouteMatch { rule: u32::try_from(number).unwrap(), ..m });
            all.push(Arc::new(rule));
        }
        let set = RouteSet::new(Audience::Everybody, [80].into(), kind, all.into(), matches.into());
        self.set_routes(service, protocol, vec![Arc::new(set.unwrap())]);
    }

    fn set_routes(&self, service: &str, protocol: Protocol, sets: Vec<Arc<RouteSet>>) {
        let ports = [PortProtocol { service_port: 80, protocol }].into();
        let routes = ServiceRoutes { service: key(service), ports, sets: sets.into() };
        self.change([Change::SetRoutes(Arc::new(routes))]);
    }

    /// An endpoint of a Service: what `serve` does with a stream is up to the test.
    pub(crate) async fn endpoint<F, R>(&self, name: &str, service: &str, serve: F) -> Endpoint
    where
        F: Fn(TunnelIo, Arc<Seen>) -> R + Send + Sync + 'static,
        R: Future<Output = ()> + Send + 'static,
    {
        let ip = address();
        let listener = TcpListener::bind((ip, 15008)).await.unwrap();
        let config = self.ca.credentials(&id(name)).server_config();
        let seen = Arc::<Seen>::default();
        let (of_server, serve) = (seen.clone(), Arc::new(serve));
        let task = tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let (config, seen, serve) = (config.clone(), of_server.clone(), serve.clone());
                seen.tunnels.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(async move {
                    let mut tunnel = ServerTunnel::accept(tcp, config).await.unwrap();
                    let peer = tunnel.peer().clone();
                    while let Some(Ok(incoming)) = tunnel.next().await {
                        if let Some((status, reason)) = *seen.refuse.lock().unwrap() {
                            incoming.refuse(status, reason);
                            continue;
                        }
                        let for_whom = incoming.claim.clone().unwrap().map(|id| id.to_string());
                        let Ok(Authority::Address(to)) = incoming.target else { panic!() };
                        let connect = Connect { peer: peer.to_string(), for_whom, to };
                        seen.connects.lock().unwrap().push(connect);
                        let (send, receive) = incoming.accept(None).unwrap();
                        tokio::spawn(serve(TunnelIo::accepted(send, receive), seen.clone()));
                    }
                });
            }
        });
        self.change([
            Change::SetService(Arc::new(service_named(service))),
            Change::SetWorkload(Arc::new(workload(name, ip, &[(service, 8080)]))),
        ]);
        Endpoint { seen, ip, task }
    }

    /// An endpoint that answers HTTP/1.1 with what it was asked.
    pub(crate) async fn echo(&self, name: &str, service: &str) -> Endpoint {
        self.endpoint(name, service, |io, seen| serve_http1(io, seen, echo)).await
    }

    /// The same in HTTP/2.
    pub(crate) async fn echo2(&self, name: &str, service: &str) -> Endpoint {
        self.endpoint(name, service, |io, seen| serve_http2(io, seen, echo)).await
    }

    /// A tunnel of a client to the waypoint.
    pub(crate) async fn tunnel(&self, client: &str) -> Tunnel {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((address(), 0).into()).unwrap();
        let tcp = socket.connect(self.waypoint).await.unwrap();
        let credentials = self.ca.credentials(&id(client));
        let dialed = Tunnel::handshake(tcp, &credentials, &[id("waypoint")]).await.unwrap();
        tokio::spawn(dialed.driver);
        dialed.tunnel
    }

    /// A client's connection to `web`.
    pub(crate) async fn connect(&self) -> TunnelIo {
        let tunnel = self.tunnel("client").await;
        TunnelIo::opened(tunnel.open(WEB, &ConnectHeaders::default()).await.unwrap())
    }

    /// Asks once, on a connection of its own.
    pub(crate) async fn ask(&self, request: Request<Body>) -> Response<Bytes> {
        Http1::new(self.connect().await).await.ask(request).await.unwrap()
    }

    /// The same, and the line is not found again.
    pub(crate) async fn take_line(&self, words: &[&str]) -> String {
        let line = self.line(words).await;
        let mut text = self.log.text.lock().unwrap();
        *text = text.replacen(&line, "", 1);
        line
    }

    /// The line of the access log, once there is one that holds all of these words.
    pub(crate) async fn line(&self, words: &[&str]) -> String {
        let search = async {
            loop {
                let text = self.log.text.lock().unwrap().clone();
                let fits = |line: &&str| words.iter().all(|word| line.contains(word));
                if let Some(line) = text.lines().find(fits) {
                    return line.to_owned();
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        match tokio::time::timeout(PATIENCE, search).await {
            Ok(line) => line,
            Err(_) => panic!("no line with {words:?} in\n{}", self.log.text.lock().unwrap()),
        }
    }
}

fn service_named(name: &str) -> Service {
    service(name, name == "web")
}

fn certs(ca: &Ca, dir: &std::path::Path) -> Arc<CertStore> {
    let root = dir.join("root-cert.pem");
    std::fs::write(&root, &ca.root).unwrap();
    let secrets = dir.join("secrets");
    std::fs::create_dir(&secrets).unwrap();
    // As a process before this one would have left it.
    let (key, certificate) = ca.sign(&id("waypoint"));
    std::fs::write(secrets.join("own.pem"), format!("{key}{certificate}{}", ca.root)).unwrap();
    let server = Server {
        address: "https://127.0.0.1:1".into(),
        name: "istiod".into(),
        root: RootCert::File(root),
        headers: Vec::new(),
    };
    let certs = CertStore::new(Arc::new(ControlPlane {
        xds: server.clone(),
        ca: server,
        login: Login::Token(Token::Fixed("x".into())),
        kinds: &xds::Kind::OF_WAYPOINT,
        anchors: Anchors::RootFile,
        proxy: Proxy::of_node("node-1"),
        cluster: "Kubernetes".into(),
        network: "".into(),
        trust_domain: "cluster.local".into(),
        certificate_lifetime: CERTIFICATE_LIFETIME,
        state_dir: dir.join("state"),
        secret_dir: secrets,
    }));
    certs.prefetch(&id("waypoint"));
    certs
}

/// What an endpoint's proxy was told.
#[derive(Clone, Debug)]
pub(crate) struct Connect {
    pub(crate) peer: String,
    pub(crate) for_whom: Option<String>,
    pub(crate) to: SocketAddr,
}

/// What an endpoint saw, and what it is told to do.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) tunnels: AtomicUsize,
    pub(crate) connects: Mutex<Vec<Connect>>,
    /// The first lines of requests.
    lines: Mutex<Vec<String>>,
    pub(crate) requests: AtomicUsize,
    pub(crate) refuse: Mutex<Option<(StatusCode, Reason)>>,
    /// For tests that hold an answer back.
    pub(crate) go_on: Notify,
}

impl Seen {
    pub(crate) fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }

    pub(crate) fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap().clone()
    }

    pub(crate) fn connects(&self) -> Vec<Connect> {
        self.connects.lock().unwrap().clone()
    }
}

pub(crate) struct Endpoint {
    pub(crate) seen: Arc<Seen>,
    pub(crate) ip: IpAddr,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Serves HTTP/1.1 on a stream.
pub(crate) async fn serve_http1<F, R>(io: TunnelIo, seen: Arc<Seen>, handle: F)
where
    F: Fn(Request<Incoming>, Arc<Seen>) -> R,
    R: Future<Output = Result<Response<Body>, Error>>,
{
    let service = hyper::service::service_fn(|request| {
        seen.requests.fetch_add(1, Ordering::SeqCst);
        handle(request, seen.clone())
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .auto_date_header(false)
        .serve_connection(TokioIo::new(io), service);
    let _ = connection.await;
}

/// Serves HTTP/2 on a stream.
pub(crate) async fn serve_http2<F, R>(io: TunnelIo, seen: Arc<Seen>, handle: F)
where
    F: Fn(Request<Incoming>, Arc<Seen>) -> R + Send + Sync + 'static,
    R: Future<Output = Result<Response<Body>, Error>> + Send + 'static,
{
    let service = hyper::service::service_fn(move |request| {
        seen.requests.fetch_add(1, Ordering::SeqCst);
        handle(request, seen.clone())
    });
    let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .auto_date_header(false)
        .serve_connection(TokioIo::new(io), service);
    let _ = connection.await;
}

/// Answers with the request: its line and headers, an empty line, its body.
pub(crate) async fn echo(
    request: Request<Incoming>,
    seen: Arc<Seen>,
) -> Result<Response<Body>, Error> {
    let (parts, body) = request.into_parts();
    seen.lines.lock().unwrap().push(format!("{} {}", parts.method, parts.uri));
    let mut text = format!("{} {} {:?}\n", parts.method, parts.uri, parts.version).into_bytes();
    for (name, value) in &parts.headers {
        text.extend(format!("{name}: ").bytes());
        text.extend(value.as_bytes());
        text.push(b'\n');
    }
    text.push(b'\n');
    text.extend(body.collect().await?.to_bytes());
    Ok(Response::new(full(text)))
}

/// A client of HTTP/1.1.
pub(crate) struct Http1 {
    send: hyper::client::conn::http1::SendRequest<Body>,
}

impl Http1 {
    pub(crate) async fn new(io: TunnelIo) -> Self {
        let (send, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(io)).await.unwrap();
        tokio::spawn(connection.with_upgrades());
        Self { send }
    }

    pub(crate) async fn send(
        &mut self,
        request: Request<Body>,
    ) -> Result<Response<Incoming>, Error> {
        let sending = async {
            self.send.ready().await?;
            self.send.send_request(request).await
        };
        Ok(tokio::time::timeout(PATIENCE, sending).await??)
    }

    pub(crate) async fn ask(&mut self, request: Request<Body>) -> Result<Response<Bytes>, Error> {
        collect(self.send(request).await?).await
    }
}

/// A client of HTTP/2.
#[derive(Clone)]
pub(crate) struct Http2 {
    send: hyper::client::conn::http2::SendRequest<Body>,
}

impl Http2 {
    pub(crate) async fn new(io: TunnelIo) -> Self {
        Self::with_windows(io, 2 << 20, 5 << 20).await
    }

    /// What the waypoint may send ahead on a stream, and on all together.
    pub(crate) async fn with_windows(io: TunnelIo, stream: u32, connection: u32) -> Self {
        let (send, connection) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
            .initial_stream_window_size(stream)
            .initial_connection_window_size(connection)
            .handshake(TokioIo::new(io))
            .await
            .unwrap();
        tokio::spawn(connection);
        Self { send }
    }

    pub(crate) async fn send(
        &mut self,
        request: Request<Body>,
    ) -> Result<Response<Incoming>, Error> {
        Ok(tokio::time::timeout(PATIENCE, self.send.send_request(request)).await??)
    }

    pub(crate) async fn ask(&mut self, request: Request<Body>) -> Result<Response<Bytes>, Error> {
        collect(self.send(request).await?).await
    }
}

pub(crate) async fn collect(response: Response<Incoming>) -> Result<Response<Bytes>, Error> {
    let (parts, body) = response.into_parts();
    let body = tokio::time::timeout(PATIENCE, body.collect()).await??.to_bytes();
    Ok(Response::from_parts(parts, body))
}

pub(crate) fn get(path: &str) -> Request<Body> {
    Request::get(path).header("host", "web.shop").body(empty()).unwrap()
}

/// The same for HTTP/2.
pub(crate) fn get2(path: &str) -> Request<Body> {
    Request::get(format!("http://web.shop{path}")).body(empty()).unwrap()
}

pub(crate) fn text(response: &Response<Bytes>) -> String {
    String::from_utf8(response.body().to_vec()).unwrap()
}

pub(crate) fn header<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    headers.get(name).map_or("", |value| value.to_str().unwrap())
}

pub(crate) fn to(service: &str) -> Backend {
    let target = Target::Service { service: key(service), port: 80, subset: None };
    Backend { weight: 1, target, filters: Vec::new() }
}

/// A rule that sends to a Service.
pub(crate) fn rule(filters: Vec<Filter>, backends: Vec<Backend>) -> RouteRule {
    RouteRule {
        route: "HTTPRoute/shop/web".into(),
        name: "rules[0]".into(),
        provenance: Default::default(),
        filters,
        backends,
        timeouts: Timeouts::default(),
    }
}

pub(crate) fn path(prefix: &str) -> RouteMatch {
    let path = if prefix == "/" { PathMatch::Any } else { PathMatch::Segments(prefix.into()) };
    RouteMatch { path, ..RouteMatch::default() }
}
