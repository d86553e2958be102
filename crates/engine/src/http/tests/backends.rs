//! Rows B and T: which backend, in which shares, at which endpoints; timeouts; what a port speaks.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use model::{Health, Reason, TunnelProtocol, Workload, WorkloadUid};

use super::*;
use crate::Transport;

/// How many of 1,000 requests each answer got.
fn shares(backends: Vec<Backend>) -> BTreeMap<String, usize> {
    let snapshot = world(vec![set(RouteKind::Http, vec![rule(vec![], backends)], vec![any()])]);
    let asked = request("GET /", &[]);
    let mut shares = BTreeMap::new();
    for rand in 0..1_000 {
        *shares.entry(short(&ask(&snapshot, &asked, rand), &asked)).or_default() += 1;
    }
    shares
}

fn invalid(weight: u32) -> Backend {
    let message = "there is no Service shop/gone".into();
    Backend { weight, target: Target::Invalid { message }, filters: Vec::new() }
}

/// The answers and their shares of 1,000, give or take 5 %.
fn check(row: &str, backends: Vec<Backend>, want: &[(&str, usize)]) {
    let got = shares(backends);
    assert_eq!(got.len(), want.len(), "{row}: {got:?}");
    for (answer, share) in want {
        let near = share.saturating_sub(50)..=share + 50;
        assert!(got.get(*answer).is_some_and(|n| near.contains(n)), "{row}: {answer} in {got:?}");
    }
}

#[test]
fn weights() {
    check("B1", vec![backend("a", 1)], &[("a /", 1_000)]);
    check("B1", vec![backend("a", 70), backend("b", 30)], &[("a /", 700), ("b /", 300)]);
    check(
        "B1",
        vec![backend("a", 1), backend("b", 1), backend("c", 2)],
        &[("a /", 250), ("b /", 250), ("c /", 500)],
    );
    check(
        "B1: 0 is never",
        vec![backend("a", 0), backend("b", 1), backend("c", 0)],
        &[("b /", 1_000)],
    );
    check("B1: all 0", vec![backend("a", 0), backend("b", 0)], &[("500 bad_backend", 1_000)]);
    check(
        "B1: huge",
        vec![backend("a", u32::MAX), backend("b", u32::MAX)],
        &[("a /", 500), ("b /", 500)],
    );
    check("B2", vec![backend("a", 1), invalid(1)], &[("a /", 500), ("500 bad_backend", 500)]);
    check("B2: without a share", vec![backend("a", 1), invalid(0)], &[("a /", 1_000)]);
    let with_header = |weight, value: &str| Backend {
        filters: vec![Filter::Rewrite(Rewrite {
            host: None,
            path: Some(PathRewrite::Full(value.into())),
        })],
        ..backend("a", weight)
    };
    check("B4", vec![with_header(1, "/x"), with_header(3, "/y")], &[("a /x", 250), ("a /y", 750)]);
}

fn pod(service: &str, n: u8) -> Workload {
    let mut w =
        Workload::named(format!("c//Pod/shop/{service}-{n}"), "shop", format!("{service}-{n}"));
    w.addresses = Arc::new([IpAddr::from([10, 1, 0, n])]);
    w.protocol = TunnelProtocol::Hbone;
    w.services = Arc::new([(key(service), Arc::from([]))]);
    w
}

fn waypoint() -> Workload {
    let mut w = Workload::named("c//Pod/shop/waypoint", "shop", "waypoint");
    w.addresses = Arc::new([IpAddr::from([10, 1, 9, 9])]);
    w
}

fn mesh(services: &[Service], pods: Vec<Workload>) -> Snapshot {
    let services = services.iter().map(|s| Change::SetService(Arc::new(s.clone())));
    Snapshot::default()
        .with(services.chain(pods.into_iter().map(|w| Change::SetWorkload(Arc::new(w)))))
}

/// Addresses in the order of their numbers, or `reason: message`.
fn found(snapshot: &Snapshot, target: &Target, rand: u64) -> String {
    match destination(snapshot, &waypoint(), target, rand) {
        Err(refusal) => format!("{}: {}", refusal.reason, refusal.message),
        Ok(destination) => {
            let mut all: Vec<_> =
                destination.candidates.iter().map(|c| c.target.to_string()).collect();
            all.sort();
            all.join(", ")
        }
    }
}

fn of(port: u16, subset: Option<&str>) -> Target {
    Target::Service { service: key("web"), port, subset: subset.map(Into::into) }
}

#[test]
fn endpoints() {
    let mut down = pod("web", 2);
    down.health = Health::Unhealthy;
    let snapshot = mesh(&[service("web"), service("empty")], vec![pod("web", 1), down.clone()]);
    assert_eq!(found(&snapshot, &of(80, None), 0), "10.1.0.1:8080");
    let none = mesh(&[service("web")], vec![down]);
    let got = found(&none, &of(80, None), 0);
    assert!(got.starts_with("no_healthy_endpoint: "), "B3: {got}");
    assert_eq!(http_status(Reason::NoHealthyEndpoint), 503, "B3");
    assert_eq!(
        found(&snapshot, &target("empty"), 0),
        "no_healthy_endpoint: service shop/empty.shop.svc.cluster.local has no endpoints",
        "B3"
    );
    let no_port = "bad_backend: service shop/web.shop.svc.cluster.local has no port 81";
    assert_eq!(found(&snapshot, &of(81, None), 0), no_port, "B5");
    assert_eq!(http_status(Reason::BadBackend), 500, "B5");
    let gone = found(&snapshot, &target("gone"), 0);
    assert_eq!(gone, "bad_backend: there is no service shop/gone.shop.svc.cluster.local");
    let invalid = Target::Invalid { message: "it is an ExternalName".into() };
    assert_eq!(found(&snapshot, &invalid, 0), "bad_backend: it is an ExternalName");
}

#[test]
fn target_ports() {
    let mut named = service("web");
    named.ports = Arc::new([ServicePort { target_port: 0, ..named.ports[0] }]);
    let own = |n, target_port| {
        let port = ServicePort { target_port, ..named.ports[0] };
        let mut w = pod("web", n);
        w.services = Arc::new([(key("web"), Arc::from([port]))]);
        w
    };
    let snapshot = mesh(&[named.clone()], vec![own(1, 9001), own(2, 9002), pod("web", 3)]);
    assert_eq!(found(&snapshot, &of(80, None), 0), "10.1.0.1:9001, 10.1.0.2:9002", "B6");
}

/// The routes of the backend's own Service do not matter, whoever asks.
#[test]
fn no_chains() {
    let rules = vec![rule(vec![], vec![backend("loop", 1)])];
    let routes = world(vec![set(RouteKind::Http, rules, vec![any()])]);
    let all = routes.routes(&key("web")).unwrap().clone();
    let snapshot = mesh(&[service("web")], vec![pod("web", 1)]).with([Change::SetRoutes(all)]);
    assert_eq!(found(&snapshot, &of(80, None), 0), "10.1.0.1:8080", "B7");
    let to_itself = vec![rule(vec![], vec![backend("web", 1)])];
    let itself = world(vec![set(RouteKind::Http, to_itself, vec![any()])]);
    let asked = request("GET /", &[]);
    assert_eq!(short(&ask(&itself, &asked, 0), &asked), "web /", "B7: a route to itself");
}

#[test]
fn candidates_are_reached_as_mesh_workloads() {
    let mut outside = pod("web", 2);
    outside.protocol = TunnelProtocol::None;
    let snapshot = mesh(&[service("web")], vec![pod("web", 1), outside]);
    let destination = destination(&snapshot, &waypoint(), &of(8080, None), 0).unwrap();
    assert_eq!((&destination.service.key, destination.port.service_port), (&key("web"), 8080));
    for candidate in &destination.candidates {
        match (&*candidate.workload.name, &candidate.transport) {
            ("web-1", Transport::Hbone { gateway, expected }) => {
                assert_eq!(gateway.to_string(), "10.1.0.1:15008");
                assert_eq!(*expected, [candidate.workload.identity()]);
            }
            ("web-2", Transport::Plain) => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(destination.candidates.len(), 2);
}

#[test]
fn subsets() {
    let subset = |name: &str, members: &[&str]| {
        let key = SubsetKey { service: key("web"), name: name.into() };
        let workloads: BTreeSet<_> =
            members.iter().map(|m| WorkloadUid(format!("c//Pod/shop/{m}").into())).collect();
        Change::SetSubset(Arc::new(Subset { key, workloads }))
    };
    let snapshot = mesh(&[service("web")], (1..=4).map(|n| pod("web", n)).collect()).with([
        subset("v1", &["web-1", "web-3"]),
        subset("v2", &["a", "web-2", "web-2b", "web-4", "z"]),
        subset("none", &[]),
        subset("others", &["db-1"]),
    ]);
    for rand in 0..20 {
        assert_eq!(found(&snapshot, &of(80, Some("v1")), rand), "10.1.0.1:8080, 10.1.0.3:8080");
        assert_eq!(found(&snapshot, &of(80, Some("v2")), rand), "10.1.0.2:8080, 10.1.0.4:8080");
    }
    for name in ["none", "others"] {
        let want = format!(
            "no_healthy_endpoint: none of the 4 endpoints of service shop/web.shop.svc.cluster.local subset {name} \
             can take port 80: 4 outside the subset"
        );
        assert_eq!(found(&snapshot, &of(80, Some(name)), 0), want);
    }
    assert_eq!(
        found(&snapshot, &of(80, Some("v3")), 0),
        "bad_backend: no DestinationRule names the subset shop/web.shop.svc.cluster.local/v3"
    );
}

/// One number serves the choice of a backend and of its endpoint: they must not depend on each other.
#[test]
fn endpoints_do_not_follow_the_backend() {
    let rules = vec![rule(vec![], vec![backend("web", 9), backend("other", 1)])];
    let routes = world(vec![set(RouteKind::Http, rules, vec![any()])]);
    let snapshot =
        mesh(&[service("web"), service("other")], (1..=2).map(|n| pod("other", n)).collect())
            .with([Change::SetRoutes(routes.routes(&key("web")).unwrap().clone())]);
    let asked = request("GET /", &[]);
    let (mut first, mut all) = (0, 0);
    for rand in 0..10_000 {
        let HttpAction::Forward { target, .. } = ask(&snapshot, &asked, rand).action else {
            panic!()
        };
        if target != super::target("other") {
            continue;
        }
        let found = destination(&snapshot, &waypoint(), &target, rand).unwrap();
        all += 1;
        first += usize::from(&*found.candidates[0].workload.name == "other-1");
    }
    assert!((850..1_150).contains(&all), "{all}");
    assert!((2 * first).abs_diff(all) < all / 5, "{first} of {all}");
}

#[test]
fn timeouts() {
    let timeouts = Timeouts {
        request: Some(Duration::from_millis(100)),
        backend_request: Some(Duration::from_millis(50)),
    };
    let rules = vec![RouteRule { timeouts, ..rule(vec![], vec![backend("b", 1)]) }];
    let snapshot = world(vec![set(RouteKind::Http, rules, vec![any()])]);
    let plan = ask(&snapshot, &request("GET /", &[]), 0);
    assert_eq!(plan.timeouts, timeouts, "T1, T2: the waypoint keeps them");
    let late = plan.answer(Refusal::new(Reason::RequestTimeout, "after 100 ms"));
    assert_eq!(late.status, 504, "T1");
    assert_eq!(late.headers["x-ambit-reason"], "request_timeout", "T1");
    let plain = ask(&Snapshot::default(), &request("GET /", &[]), 0);
    assert_eq!(plain.timeouts, Timeouts::default(), "T1: no limit");
}

#[test]
fn protocols() {
    let check = |declared: Option<Protocol>, own: AppProtocol, want: Protocol| {
        let mut web = service("web");
        web.ports = Arc::new([ServicePort { app_protocol: own, ..web.ports[0] }]);
        let ports = declared.map(|protocol| PortProtocol { service_port: 80, protocol });
        let routes = ServiceRoutes {
            service: key("web"),
            ports: ports.into_iter().collect(),
            sets: Arc::new([]),
        };
        let snapshot = Snapshot::default().with([Change::SetRoutes(Arc::new(routes))]);
        assert_eq!(backend_protocol(&snapshot, &web, 80), want, "{declared:?} {own:?}");
        assert_eq!(backend_protocol(&snapshot, &web, 81), Protocol::Undeclared);
    };
    check(None, AppProtocol::Unknown, Protocol::Undeclared);
    check(None, AppProtocol::Http11, Protocol::Http);
    check(None, AppProtocol::Http2, Protocol::Http2);
    check(None, AppProtocol::Grpc, Protocol::Grpc);
    check(Some(Protocol::Undeclared), AppProtocol::Grpc, Protocol::Grpc);
    check(Some(Protocol::Opaque), AppProtocol::Http2, Protocol::Opaque);
    check(Some(Protocol::Http2), AppProtocol::Unknown, Protocol::Http2);
}
