//! What a waypoint takes, and whom it may speak for.

use std::net::IpAddr;

use model::http::{PortProtocol, RouteKind, RouteSet, ServiceRoutes};
use model::{
    AppProtocol, Change, FamilyPolicy, HBONE_PORT, LoadBalancing, NetworkAddress, ServicePort, Vip,
    WorkloadUid,
};

use super::*;

fn key(namespace: &str, name: &str) -> ServiceKey {
    ServiceKey {
        namespace: namespace.into(),
        hostname: format!("{name}.{namespace}.svc.cluster.local").into(),
    }
}

fn waypoint(namespace: &str) -> GatewayAddress {
    let destination = GatewayDestination::Service(key(namespace, "waypoint"));
    GatewayAddress { destination, hbone_port: HBONE_PORT }
}

fn at(ip: &str) -> GatewayAddress {
    let address = NetworkAddress { network: "".into(), ip: ip.parse().unwrap() };
    GatewayAddress { destination: GatewayDestination::Address(address), hbone_port: HBONE_PORT }
}

fn port(service_port: u16, target_port: u16, app_protocol: AppProtocol) -> ServicePort {
    ServicePort { service_port, target_port, app_protocol }
}

/// Ports 80 (HTTP), 81 (gRPC) and 82 (undeclared).
fn service(namespace: &str, name: &str, ip: &str, waypoint: Option<GatewayAddress>) -> Service {
    Service {
        key: key(namespace, name),
        name: name.into(),
        vips: Arc::new([Vip { network: "".into(), ip: ip.parse().unwrap(), prefix: 32 }]),
        ports: Arc::new([
            port(80, 8080, AppProtocol::Http11),
            port(81, 8081, AppProtocol::Grpc),
            port(82, 8082, AppProtocol::Unknown),
        ]),
        subject_alt_names: Arc::new([]),
        waypoint,
        load_balancing: LoadBalancing::default(),
        families: FamilyPolicy::default(),
    }
}

fn pod(namespace: &str, name: &str, ip: &str, services: &[&Service]) -> Workload {
    let of = |s: &&Service| (s.key.clone(), s.ports.clone());
    Workload {
        uid: WorkloadUid(format!("{namespace}/{name}").into()),
        addresses: Arc::new([ip.parse::<IpAddr>().unwrap()]),
        protocol: TunnelProtocol::Hbone,
        service_account: name.into(),
        services: services.iter().map(of).collect(),
        ..Workload::named("", namespace, name)
    }
}

/// A proxy of the namespace's waypoint.
fn proxy(namespace: &str, ip: &str) -> Workload {
    let own = service(namespace, "waypoint", "10.96.7.1", None);
    Workload { native_tunnel: true, ..pod(namespace, "waypoint", ip, &[&own]) }
}

fn id(namespace: &str, account: &str) -> Identity {
    Identity::new("cluster.local", namespace, account)
}

/// `shop` with a waypoint: `web` is bound to it, `plain` to none, `other` to that of `edge`; pod `db` is bound itself.
fn world() -> Snapshot {
    let web = service("shop", "web", "10.96.0.1", Some(waypoint("shop")));
    let plain = service("shop", "plain", "10.96.0.2", None);
    let other = service("shop", "other", "10.96.0.3", Some(waypoint("edge")));
    let db = Workload { waypoint: Some(waypoint("shop")), ..pod("shop", "db", "10.1.0.9", &[]) };
    let workloads = [
        proxy("shop", "10.1.7.1"),
        proxy("edge", "10.1.7.2"),
        pod("shop", "web", "10.1.0.1", &[&web]),
        pod("shop", "plain", "10.1.0.2", &[&plain]),
        pod("shop", "both", "10.1.0.3", &[&plain, &web]),
        db,
    ];
    let shop = service("shop", "waypoint", "10.96.7.1", None);
    let edge = service("edge", "waypoint", "10.96.7.2", None);
    let services = [web, plain, other, shop, edge].map(|s| Change::SetService(Arc::new(s)));
    let workloads = workloads.map(|w| Change::SetWorkload(Arc::new(w)));
    Snapshot::default().with(services.into_iter().chain(workloads))
}

/// What the waypoint of `shop` says, in short.
fn ask(snapshot: &Snapshot, peer: &Identity, authority: Authority<'_>) -> String {
    let own = proxy("shop", "10.1.7.1");
    match admit(snapshot, &AdmitFacts { own: &own, peer, authority }) {
        Ok(Admitted::Service { service, port, protocol }) => {
            format!("service {}:{port} {protocol:?}", service.name)
        }
        Ok(Admitted::Workload { workload, port, protocol }) => {
            format!("workload {}:{port} {protocol:?}", workload.name)
        }
        Err(refusal) => format!("{}: {}", refusal.reason, refusal.message),
    }
}

#[test]
fn what_a_waypoint_takes() {
    let snapshot = world();
    let check = |authority: &str, want: &str| {
        let peer = id("shop", "client");
        let authority = authority.parse().map_or_else(
            |_| {
                let (host, port) = authority.rsplit_once(':').unwrap();
                Authority::Host(host, port.parse().unwrap())
            },
            Authority::Address,
        );
        let got = ask(&snapshot, &peer, authority);
        assert!(got.starts_with(want), "{authority}: {got}");
    };
    check("10.96.0.1:80", "service web:80 Http");
    check("[::ffff:10.96.0.1]:81", "service web:81 Grpc");
    check("10.96.0.1:82", "service web:82 Undeclared");
    check("web.shop.svc.cluster.local:80", "service web:80 Http");
    let no_port =
        "no_such_port: service shop/web.shop.svc.cluster.local has no port 83; it has 80, 81, 82";
    check("10.96.0.1:83", no_port);
    check("web.shop.svc.cluster.local:83", no_port);
    let asked =
        "not_bound: spiffe://cluster.local/ns/shop/sa/client asked the waypoint shop/waypoint for";
    check(
        "10.96.0.2:80",
        &format!(
            "{asked} 10.96.0.2:80: service shop/plain.shop.svc.cluster.local, which is bound to no waypoint"
        ),
    );
    check(
        "10.96.0.3:80",
        &format!(
            "{asked} 10.96.0.3:80: service shop/other.shop.svc.cluster.local, which is bound to waypoint \
             edge/waypoint.edge.svc.cluster.local"
        ),
    );
    check("other.shop.svc.cluster.local:80", asked);
    check(
        "10.96.0.9:80",
        &format!("{asked} 10.96.0.9:80: neither a Service nor a pod of the mesh"),
    );
    check("gone.shop.svc.cluster.local:80", asked);
    check("1.1.1.1:443", asked);
    check("127.0.0.1:15000", asked);
    // Itself: a loop.
    check("10.96.7.1:15008", asked);
    check("10.1.7.1:15008", asked);
    check("10.1.0.9:5432", "workload db:5432 Undeclared");
    check("10.1.0.9:15008", "mesh_port: port 15008 of shop/db is the mesh's own");
    // A pod of a bound Service is not bound itself.
    check(
        "10.1.0.1:8080",
        &format!("{asked} 10.1.0.1:8080: pod shop/web, which is bound to no waypoint"),
    );
}

#[test]
fn a_waypoint_by_address_is_the_same_waypoint() {
    let check = |bound: &str, want: &str| {
        let web = service("shop", "web", "10.96.0.1", Some(at(bound)));
        let snapshot = world().with([Change::SetService(Arc::new(web))]);
        let got = ask(
            &snapshot,
            &id("shop", "client"),
            Authority::Address("10.96.0.1:80".parse().unwrap()),
        );
        assert!(got.starts_with(want), "{bound}: {got}");
    };
    check("10.96.7.1", "service web:80");
    check("10.1.7.1", "service web:80");
    check("10.96.7.2", "not_bound: ");
    check("10.1.7.2", "not_bound: ");
    check("10.5.5.5", "not_bound: ");
}

/// One name in several namespaces: the Service that is bound here is meant.
#[test]
fn a_name_with_several_services() {
    let hostname: model::Str = "db.example".into();
    let named = |namespace: &str, waypoint| {
        let key = ServiceKey { namespace: namespace.into(), hostname: hostname.clone() };
        Change::SetService(Arc::new(Service {
            key,
            ..service(namespace, "db", "10.96.0.7", waypoint)
        }))
    };
    let snapshot = world().with([named("a", None), named("z", Some(waypoint("shop")))]);
    let own = proxy("shop", "10.1.7.1");
    let (peer, authority) = (id("shop", "client"), Authority::Host("db.example", 80));
    let admitted = admit(&snapshot, &AdmitFacts { own: &own, peer: &peer, authority });
    let Ok(Admitted::Service { service, .. }) = admitted else { panic!("{admitted:?}") };
    assert_eq!(&*service.key.namespace, "z");
}

fn routes(service: &str, audience: Audience, protocol: Protocol) -> Change {
    let ports: Arc<[u16]> = Arc::new([82]);
    let set = RouteSet::new(audience, ports, RouteKind::Http, Arc::new([]), Arc::new([])).unwrap();
    Change::SetRoutes(Arc::new(ServiceRoutes {
        service: key("shop", service),
        ports: Arc::new([PortProtocol { service_port: 82, protocol }]),
        sets: Arc::new([Arc::new(set)]),
    }))
}

#[test]
fn a_consumers_waypoint_takes_what_its_namespace_has_routes_for() {
    let to = || Authority::Address("10.96.0.3:82".parse().unwrap());
    let check = |audience: Audience, peer: &Identity, want: &str| {
        let snapshot = world().with([routes("other", audience, Protocol::Http)]);
        let got = ask(&snapshot, peer, to());
        assert!(got.starts_with(want), "{got}");
    };
    let consumer = |namespace: &str| Audience::Namespace(namespace.into());
    check(consumer("shop"), &id("shop", "client"), "service other:82 Http");
    // For clients of this namespace only.
    check(consumer("shop"), &id("bank", "client"), "not_bound: ");
    check(consumer("bank"), &id("shop", "client"), "not_bound: ");
    check(consumer("bank"), &id("bank", "client"), "not_bound: ");
    check(Audience::Everybody, &id("shop", "client"), "not_bound: ");
}

#[test]
fn what_a_port_speaks() {
    let check = |stated: Protocol, port: u16, want: &str| {
        let snapshot = world().with([routes("web", Audience::Everybody, stated)]);
        let to = Authority::Address(SocketAddr::new([10, 96, 0, 1].into(), port));
        assert_eq!(ask(&snapshot, &id("shop", "client"), to), want);
    };
    check(Protocol::Opaque, 82, "service web:82 Opaque");
    check(Protocol::Http2, 82, "service web:82 Http2");
    // Not listed there: what the Service says.
    check(Protocol::Opaque, 80, "service web:80 Http");
    // A pod's port by the Service that leads there.
    let leads = service("shop", "db", "10.96.0.4", None);
    let db = pod("shop", "db", "10.1.0.9", &[&leads]);
    let db = Workload { waypoint: Some(waypoint("shop")), ..db };
    let changes = [Change::SetService(Arc::new(leads)), Change::SetWorkload(Arc::new(db))];
    let snapshot = world().with(changes);
    let to = |port| Authority::Address(SocketAddr::new([10, 1, 0, 9].into(), port));
    let ask = |port| ask(&snapshot, &id("shop", "client"), to(port));
    assert_eq!(ask(8081), "workload db:8081 Grpc");
    assert_eq!(ask(9999), "workload db:9999 Undeclared");
}

/// For whom a peer speaks to a workload, in short.
fn speaks(snapshot: &Snapshot, peer: Option<&Identity>, to: &str, claim: &Claim) -> String {
    let workload = snapshot.workload_named(&"shop".into(), &to.into()).unwrap();
    match delegated(snapshot, workload, peer, claim) {
        Ok(Some(client)) => client.service_account.to_string(),
        Ok(None) => "nobody".to_owned(),
        Err(refusal) => format!("{}: {}", refusal.reason, refusal.message),
    }
}

#[test]
fn only_a_waypoint_of_the_workload_speaks_for_its_clients() {
    let snapshot = world();
    let claim: Claim = Ok(Some(Arc::new(id("shop", "client"))));
    let check = |peer: &Identity, to: &str, want: &str| {
        assert_eq!(speaks(&snapshot, Some(peer), to, &claim), want, "{peer} to {to}");
        let nothing = speaks(&snapshot, Some(peer), to, &Ok(None));
        assert_eq!(nothing, "nobody", "who claims nothing");
    };
    let shop = id("shop", "waypoint");
    check(&shop, "web", "client");
    check(&shop, "both", "client");
    check(&shop, "db", "client");
    check(&shop, "plain", "nobody");
    // Another's waypoint, a pod of the Service, a stranger, the same name elsewhere.
    check(&id("edge", "waypoint"), "web", "nobody");
    check(&id("shop", "web"), "web", "nobody");
    check(&id("shop", "client"), "web", "nobody");
    check(&Identity::new("other", "shop", "waypoint"), "web", "nobody");
    assert_eq!(speaks(&snapshot, None, "web", &claim), "nobody", "plaintext");
}

#[test]
fn a_claim_that_cannot_be_read_is_refused_where_it_would_count() {
    let snapshot = world();
    let claim: Claim = Err("it is gibberish".to_owned());
    let check = |peer: &Identity, want: &str| {
        assert_eq!(speaks(&snapshot, Some(peer), "web", &claim), want);
    };
    check(
        &id("shop", "waypoint"),
        "bad_request: the waypoint spiffe://cluster.local/ns/shop/sa/waypoint names no client: it is gibberish",
    );
    check(&id("shop", "client"), "nobody");
    assert_eq!(speaks(&snapshot, None, "web", &claim), "nobody");
}

#[test]
fn only_a_waypoints_claim_may_be_early() {
    let claim: Claim = Ok(Some(Arc::new(id("shop", "client"))));
    let snapshot = world();
    let web = snapshot.workload_named(&"shop".into(), &"plain".into()).unwrap();
    let check = |peer: Option<&Identity>, from: &str, claim: &Claim, want: bool| {
        let destination = "10.1.0.2:8080".parse().unwrap();
        let source_ip = from.parse().unwrap();
        let facts = InboundFacts { workload: web, destination, source_ip, peer, client: None };
        assert_eq!(claim_is_early(&snapshot, &facts, claim), want, "{peer:?} {from}");
        // What counts is not early.
        let facts = InboundFacts { client: peer, ..facts };
        assert!(!claim_is_early(&snapshot, &facts, claim) || peer.is_none());
    };
    let edge = id("edge", "waypoint");
    check(Some(&edge), "10.1.7.2", &claim, true);
    check(Some(&edge), "::ffff:10.1.7.2", &Err("gibberish".to_owned()), true);
    check(Some(&edge), "10.1.7.2", &Ok(None), false);
    // From another's address, by a pod of the mesh, in plaintext.
    check(Some(&edge), "10.1.7.1", &claim, false);
    check(Some(&id("shop", "web")), "10.1.0.1", &claim, false);
    check(None, "10.1.7.2", &claim, false);
}

/// A pod whose connections a node's proxy makes has no say in a CONNECT; an endpoint of the waypoint's Service that is not a
/// waypoint has no clients.
#[test]
fn a_captured_pod_among_the_waypoints_speaks_for_nobody() {
    let own = service("shop", "waypoint", "10.96.7.1", None);
    let fake = pod("shop", "fake", "10.1.7.9", &[&own]);
    let snapshot = world().with([Change::SetWorkload(Arc::new(fake))]);
    let claim: Claim = Ok(Some(Arc::new(id("shop", "client"))));
    assert_eq!(speaks(&snapshot, Some(&id("shop", "fake")), "web", &claim), "nobody");
    assert_eq!(speaks(&snapshot, Some(&id("shop", "waypoint")), "web", &claim), "client");
    // With its proxies gone from the configuration nobody is the waypoint.
    let uid = proxy("shop", "10.1.7.1").uid;
    let snapshot = snapshot.with([Change::RemoveWorkload(uid)]);
    assert_eq!(speaks(&snapshot, Some(&id("shop", "waypoint")), "web", &claim), "nobody");
}
