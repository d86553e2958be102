//! The pages over real sockets, and that nobody can hold a server up.

use std::sync::atomic::{AtomicUsize, Ordering};

use model::http::{
    Audience, Backend, Filter, HeaderEdits, PathMatch, PortProtocol, Protocol, RouteKind,
    RouteMatch, RouteRule, RouteSet, ServiceRoutes, Subset, SubsetKey, Target, TextMatch, Timeouts,
};
use model::{
    Change, ConfigVersion, Match, Policy, PolicyKey, Rule, Scope, ServiceKey, StringMatch, Workload,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::access_log::Format;

fn snapshot() -> Snapshot {
    let mut web = Workload::named("Kubernetes//Pod/shop/web-0", "shop", "web-0");
    web.addresses = Arc::new(["10.1.0.1".parse().unwrap()]);
    web.protocol = model::TunnelProtocol::Hbone;
    web.services = Arc::new([(
        ServiceKey { namespace: "shop".into(), hostname: "web".into() },
        Arc::from([]),
    )]);
    let other = Workload::named("Kubernetes//Pod/bank/db-0", "bank", "db-0");
    let service = model::Service {
        key: ServiceKey { namespace: "shop".into(), hostname: "web".into() },
        name: "web".into(),
        vips: Arc::new([model::Vip {
            network: "".into(),
            ip: "10.96.0.1".parse().unwrap(),
            prefix: 32,
        }]),
        ports: Arc::new([model::ServicePort {
            service_port: 80,
            target_port: 8080,
            app_protocol: Default::default(),
        }]),
        subject_alt_names: Arc::new([]),
        waypoint: None,
        load_balancing: Default::default(),
        families: Default::default(),
    };
    let from = Match { principals: vec![StringMatch::Prefix("td/".into())], ..Match::default() };
    let policy = Policy {
        key: PolicyKey { namespace: "shop".into(), name: "deny".into() },
        scope: Scope::Namespace,
        action: model::Action::Deny,
        rules: Arc::new([Rule { clauses: vec![vec![from]], provenance: Default::default() }]),
        dry_run: false,
        provenance: model::Provenance {
            object: "AuthorizationPolicy/shop/deny".into(),
            field: "".into(),
            origin: "a.yaml:1".into(),
        },
    };
    Snapshot::default().with([
        Change::SetWorkload(Arc::new(web)),
        Change::SetWorkload(Arc::new(other)),
        Change::SetService(Arc::new(service)),
        Change::SetPolicy(Arc::new(policy)),
        Change::SetVersion(ConfigVersion { epoch: 1, number: 2 }),
    ])
}

struct World {
    state: Arc<AdminState>,
    quits: Arc<AtomicUsize>,
}

fn world(snapshot: Snapshot) -> World {
    let quits = Arc::new(AtomicUsize::new(0));
    let (count, snapshot) = (quits.clone(), Arc::new(snapshot));
    let state = Arc::new(AdminState {
        program: "ztunnel 0.1.0".into(),
        readiness: Readiness::new(),
        metrics: Metrics::new("ztunnel", "0.1.0"),
        log: crate::logging::detached(Format::Text, "info"),
        snapshot: Box::new(move || snapshot.clone()),
        certificates: Box::new(|| {
            let leaf = Certificate {
                serial_number: "01".into(),
                valid_from: "2026-01-01T00:00:00Z".into(),
                expiration_time: "2026-01-02T00:00:00Z".into(),
            };
            vec![CertificateInfo {
                identity: "spiffe://td/ns/a/sa/b".into(),
                state: "Available".into(),
                cert_chain: vec![leaf],
                root_certs: vec![],
            }]
        }),
        connections: Box::new(|| serde_json::json!([{"src": "a"}])),
        settings: serde_json::json!({"node": "node-1"}),
        quit: Box::new(move || {
            count.fetch_add(1, Ordering::SeqCst);
        }),
    });
    World { state, quits }
}

async fn server(page: Page, state: &Arc<AdminState>) -> SocketAddr {
    let listener = bind(page, "127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(serve(listener, page, state.clone()));
    address
}

/// Sends bytes and returns everything that comes back.
async fn send(address: SocketAddr, bytes: &str) -> String {
    let mut socket = TcpStream::connect(address).await.unwrap();
    // The server may answer and close before it has read everything.
    let _ = socket.write_all(bytes.as_bytes()).await;
    let mut answer = Vec::new();
    let _ = socket.read_to_end(&mut answer).await;
    String::from_utf8(answer).unwrap()
}

async fn ask(address: SocketAddr, request: &str) -> (u16, String) {
    let answer = send(address, &format!("{request} HTTP/1.1\r\nhost: x\r\n\r\n")).await;
    let (head, body) =
        answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {answer:?}"));
    let status = head[9..12].parse().unwrap();
    if head.to_lowercase().contains("transfer-encoding: chunked") {
        return (status, unchunk(body));
    }
    (status, body.to_owned())
}

fn unchunk(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        whole.push_str(&rest[..size]);
        body = &rest[(size + 2).min(rest.len())..];
    }
    whole
}

#[tokio::test]
async fn readiness_names_what_is_missing() {
    let w = world(Snapshot::default());
    let at = server(Page::Readiness, &w.state).await;
    let (a, b) = (w.state.readiness.wait_for("xds"), w.state.readiness.wait_for("ca"));
    assert_eq!(
        ask(at, "GET /healthz/ready").await,
        (500, "not ready: waiting for ca, xds\n".into())
    );
    drop((a, b));
    assert_eq!(ask(at, "GET /healthz/ready").await, (200, "ready\n".into()));
    assert_eq!(ask(at, "POST /healthz/ready").await.0, 405);
    assert_eq!(ask(at, "GET /config_dump").await.0, 404);
}

#[tokio::test]
async fn metrics_page() {
    let w = world(Snapshot::default());
    let at = server(Page::Metrics, &w.state).await;
    for path in ["/metrics", "/stats/prometheus"] {
        let (status, page) = ask(at, &format!("GET {path}")).await;
        assert!(
            status == 200 && page.contains("istio_build{component=\"ztunnel\",tag=\"0.1.0\"} 1")
        );
    }
    assert_eq!(ask(at, "POST /quitquitquit").await.0, 404);
}

#[tokio::test]
async fn admin_pages() {
    let w = world(snapshot());
    let at = server(Page::Admin, &w.state).await;
    let (status, index) = ask(at, "GET /").await;
    assert!(status == 200 && index.starts_with("ztunnel 0.1.0\nconfiguration 1.2\n"), "{index}");
    let (_, connections) = ask(at, "GET /connections").await;
    assert_eq!(serde_json::from_str::<serde_json::Value>(&connections).unwrap()[0]["src"], "a");
    let check = async |request: &str, want: (u16, &str)| {
        let (status, text) = ask(at, request).await;
        assert_eq!((status, text.trim()), want, "{request}");
    };
    check("GET /logging", (200, "info")).await;
    check("POST /logging?level=info%2Cagent%3Ddebug", (200, "info,agent=debug")).await;
    check("GET /logging", (200, "info,agent=debug")).await;
    check("POST /logging", (400, "say ?level=FILTER or ?reset")).await;
    check("POST /logging?reset", (200, "info")).await;
    let (status, text) = ask(at, "POST /logging?level=loud").await;
    assert!(status == 400 && text.contains("\"loud\" is not a level"), "{text}");
    check("GET /quitquitquit", (405, "use POST")).await;
    assert_eq!(w.quits.load(Ordering::SeqCst), 0);
    check("POST /quitquitquit", (200, "shutting down")).await;
    assert_eq!(w.quits.load(Ordering::SeqCst), 1);
    check("PUT /logging", (405, "use GET, POST")).await;
    check("GET /nowhere", (404, "no page /nowhere")).await;
}

#[tokio::test]
async fn config_dump() {
    let w = world(snapshot());
    let at = server(Page::Admin, &w.state).await;
    let dump = async |query: &str| -> serde_json::Value {
        let (status, text) = ask(at, &format!("GET /config_dump{query}")).await;
        assert_eq!(status, 200, "{text}");
        serde_json::from_str(&text).unwrap()
    };
    let all = dump("").await;
    assert_eq!(all["configVersion"], "1.2");
    assert_eq!(all["workloads"].as_array().unwrap().len(), 2);
    let web = &all["workloads"][1];
    assert_eq!(
        (&web["uid"], &web["protocol"]),
        (&"Kubernetes//Pod/shop/web-0".into(), &"HBONE".into())
    );
    let service = &all["services"][0];
    assert_eq!(service["vips"][0], "/10.96.0.1");
    assert_eq!(service["ports"]["80"], 8080);
    assert_eq!(service["endpoints"]["Kubernetes//Pod/shop/web-0"]["status"], "Healthy");
    let policy = &all["policies"][0];
    assert_eq!(policy["rules"][0]["clauses"][0][0]["principals"][0], "td/*");
    assert_eq!(policy["provenance"], "AuthorizationPolicy/shop/deny (a.yaml:1)");
    assert_eq!(all["certificates"][0]["certChain"][0]["serialNumber"], "01");
    assert_eq!(all["config"]["node"], "node-1");
    assert!(!all.to_string().to_lowercase().contains("private"));
    let bank = dump("?namespace=bank").await;
    assert_eq!(
        (bank["workloads"].as_array().unwrap().len(), bank["policies"].as_array().unwrap().len()),
        (1, 0)
    );
    let only = dump("?only=policies").await;
    assert!(only.get("workloads").is_none() && only.get("certificates").is_none());
    assert_eq!(only["policies"].as_array().unwrap().len(), 1);
    assert_eq!(ask(at, "GET /config_dump?only=secrets").await.0, 400);
}

#[tokio::test]
async fn config_dump_of_a_waypoint() {
    let service = ServiceKey { namespace: "shop".into(), hostname: "web".into() };
    let target = Target::Service { service: service.clone(), port: 80, subset: Some("v2".into()) };
    let edits = HeaderEdits { remove: vec!["x-a".into()], ..HeaderEdits::default() };
    let rule = RouteRule {
        route: "HTTPRoute/shop/web".into(),
        name: "rules[0]".into(),
        provenance: model::Provenance {
            object: "HTTPRoute/shop/web".into(),
            field: "spec.rules[0]".into(),
            origin: "a.yaml:1".into(),
        },
        filters: vec![
            Filter::RequestHeaders(edits),
            Filter::Fail { reason: model::Reason::BadFilter, message: "no such filter".into() },
        ],
        backends: vec![Backend { weight: 3, target, filters: Vec::new() }],
        timeouts: Timeouts { request: Some(Duration::from_millis(1500)), backend_request: None },
    };
    let one = RouteMatch {
        path: PathMatch::Segments("/a".into()),
        method: Some(TextMatch::Exact("GET".into())),
        ..RouteMatch::default()
    };
    let (rules, matches) = (Arc::new([Arc::new(rule)]), Arc::new([one]));
    let set =
        RouteSet::new(Audience::Everybody, Arc::new([]), RouteKind::Http, rules, matches).unwrap();
    let routes = ServiceRoutes {
        service: service.clone(),
        ports: Arc::new([PortProtocol { service_port: 80, protocol: Protocol::Http }]),
        sets: Arc::new([Arc::new(set)]),
    };
    let subset = Subset {
        key: SubsetKey { service, name: "v2".into() },
        workloads: [model::WorkloadUid("uid".into())].into(),
    };
    let changes = [Change::SetRoutes(Arc::new(routes)), Change::SetSubset(Arc::new(subset))];
    let w = world(snapshot().with(changes));
    let at = server(Page::Admin, &w.state).await;
    let dump = async |query: &str| -> serde_json::Value {
        let (status, text) = ask(at, &format!("GET /config_dump{query}")).await;
        assert_eq!(status, 200, "{text}");
        serde_json::from_str(&text).unwrap()
    };
    let all = dump("").await;
    let routes = &all["routes"][0];
    assert_eq!((&routes["hostname"], &routes["protocols"]["80"]), (&"web".into(), &"Http".into()));
    let set = &routes["sets"][0];
    assert_eq!(set["ports"], "all");
    assert_eq!(set["matches"][0]["all"], serde_json::json!(["path /a/*", "method is GET"]));
    let rule = &set["rules"][0];
    assert_eq!(rule["provenance"], "HTTPRoute/shop/web spec.rules[0] (a.yaml:1)");
    assert_eq!(rule["backends"][0]["to"], "shop/web:80 subset v2");
    assert_eq!(rule["requestTimeoutSeconds"], 1.5);
    let filters = ["request headers: remove x-a", "fail bad_filter: no such filter"];
    assert_eq!(rule["filters"], serde_json::json!(filters));
    assert_eq!(all["subsets"][0]["workloads"], serde_json::json!(["uid"]));
    let bank = dump("?namespace=bank").await;
    assert!(bank.get("routes").is_none() && bank.get("subsets").is_none());
    assert_eq!(dump("?only=subsets&namespace=bank").await["subsets"], serde_json::json!([]));
    assert!(dump("?only=routes").await.get("subsets").is_none());
}

#[tokio::test]
async fn a_large_dump_arrives_whole() {
    let many = (0..20_000).map(|i| {
        let w = Workload::named(format!("c//Pod/ns/w{i:05}"), "ns", format!("w{i:05}"));
        Change::SetWorkload(Arc::new(w))
    });
    let w = world(Snapshot::default().with(many));
    let at = server(Page::Admin, &w.state).await;
    let (_, text) = ask(at, "GET /config_dump").await;
    let dump: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(dump["workloads"].as_array().unwrap().len(), 20_000);
    assert_eq!(dump["workloads"][19_999]["name"], "w19999");
}

#[tokio::test]
async fn odd_clients_do_no_harm() {
    let w = world(Snapshot::default());
    let at = server(Page::Admin, &w.state).await;
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(MAX_HEAD));
    let answer = send(at, &long).await;
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    for bad in ["\x16\x03\x01\0\0\r\n\r\n", "GET\r\n\r\n", "GET / HTTP/9.9\r\n\r\n"] {
        let answer = send(at, bad).await;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    }
    // As many idle connections as there are places, then one more: it is closed and not queued.
    let mut idle = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        idle.push(TcpStream::connect(at).await.unwrap());
    }
    assert_eq!(send(at, "GET / HTTP/1.1\r\nhost: x\r\n\r\n").await, "");
    drop(idle);
    // Places come back as the server notices that the clients went.
    let mut tries = 0;
    while send(at, "GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.is_empty() {
        tries += 1;
        assert!(tries < 10_000, "no place came back");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_place_that_cannot_be_had_is_named() {
    let first = bind(Page::Metrics, "127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = first.local_addr().unwrap();
    let error = bind(Page::Metrics, address).await.unwrap_err().to_string();
    assert!(error.starts_with(&format!("cannot listen on {address} for metrics: ")), "{error}");
    let error = bind(Page::Admin, "0.0.0.0:0".parse().unwrap()).await.unwrap_err().to_string();
    assert!(error.contains("must be a loopback address"), "{error}");
    assert!(bind(Page::Readiness, "[::]:0".parse().unwrap()).await.is_ok());
}

#[test]
fn parameters() {
    let check = |query: &str, want: Option<&str>| {
        assert_eq!(parameter(Some(query), "a").as_deref(), want, "{query}");
    };
    check("", None);
    check("a", Some(""));
    check("a=", Some(""));
    check("b=1&a=2&a=3", Some("2"));
    check("a=x%2cy+z", Some("x,y z"));
    check("a=%", None);
    check("a=%4", None);
    check("a=%zz", None);
    check("a=%ff", None);
    check("ab=1", None);
    assert_eq!(parameter(None, "a"), None);
}
