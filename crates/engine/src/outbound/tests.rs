//! Endpoint choice: tables for what a plan is, properties for who may be in it and how often.

use std::collections::HashMap;

use model::{
    AppProtocol, Change, FamilyPolicy, HealthPolicy, LoadBalancing, Locality, LocalityScope,
    NetworkMode, ServiceKey, ServicePort, Vip,
};
use proptest::prelude::*;

use super::*;

mod waypoints;

fn key(name: &str) -> ServiceKey {
    ServiceKey {
        namespace: "shop".into(),
        hostname: format!("{name}.shop.svc.cluster.local").into(),
    }
}

fn port(service_port: u16, target_port: u16) -> ServicePort {
    ServicePort { service_port, target_port, app_protocol: AppProtocol::Unknown }
}

fn vip(ip: &str) -> Vip {
    let ip: IpAddr = ip.parse().unwrap();
    Vip { network: "".into(), ip, prefix: if ip.is_ipv4() { 32 } else { 128 } }
}

/// Service `web`: 10.96.0.1 and fd96::1, port 80 to 8080, port 81 to a named port.
fn web() -> Service {
    Service {
        key: key("web"),
        name: "web".into(),
        vips: Arc::new([vip("10.96.0.1"), vip("fd96::1")]),
        ports: Arc::new([port(80, 8080), port(81, 0)]),
        subject_alt_names: Arc::new([]),
        waypoint: None,
        load_balancing: LoadBalancing::default(),
        families: FamilyPolicy::default(),
    }
}

/// An endpoint of `web` in the mesh, with address 10.1.0.N.
fn pod(n: u8) -> Workload {
    let mut w = Workload::named(format!("c//Pod/shop/web-{n}"), "shop", format!("web-{n}"));
    w.addresses = Arc::new([IpAddr::from([10, 1, 0, n])]);
    w.protocol = TunnelProtocol::Hbone;
    w.service_account = "web".into();
    w.node = format!("node-{}", n % 2).into();
    w.services = Arc::new([(key("web"), Arc::from([]))]);
    w
}

fn client() -> Workload {
    let mut w = Workload::named("c//Pod/shop/client", "shop", "client");
    w.addresses = Arc::new(["10.1.9.9".parse().unwrap()]);
    w.protocol = TunnelProtocol::Hbone;
    w.node = "node-1".into();
    w
}

fn world(service: Service, pods: impl IntoIterator<Item = Workload>) -> Snapshot {
    let pods = pods.into_iter().chain([client()]).map(|w| Change::SetWorkload(Arc::new(w)));
    Snapshot::default().with([Change::SetService(Arc::new(service))].into_iter().chain(pods))
}

fn plan_to(snapshot: &Snapshot, to: &str, rand: u64) -> OutboundPlan {
    let source = client();
    let facts = OutboundFacts { source: &source, destination: to.parse().unwrap() };
    plan_outbound(snapshot, &facts, rand)
}

/// A plan in short: `passthrough`, `CODE: message`, or sorted `target via` words.
fn short(plan: &OutboundPlan) -> String {
    match plan {
        OutboundPlan::Passthrough => "passthrough".into(),
        OutboundPlan::Refuse(r) => format!("{}: {}", r.reason, r.message),
        OutboundPlan::Connect { candidates, .. } => {
            let mut words: Vec<_> = candidates
                .iter()
                .map(|c| match &c.transport {
                    Transport::Plain => format!("{} plain", c.target),
                    Transport::Hbone { gateway, .. } => format!("{} by {gateway}", c.target),
                })
                .collect();
            words.sort();
            words.join(", ")
        }
    }
}

fn check(snapshot: &Snapshot, to: &str, want: &str) {
    assert_eq!(short(&plan_to(snapshot, to, 7)), want, "{to}");
}

#[test]
fn destinations() {
    let mut outside = pod(3);
    outside.protocol = TunnelProtocol::None;
    let mut host = pod(4);
    (host.network_mode, host.services) = (NetworkMode::HostNetwork, Arc::new([]));
    let mut elsewhere = pod(5);
    (elsewhere.network, elsewhere.services) = ("far".into(), Arc::new([]));
    let mut down = pod(6);
    down.health = Health::Unhealthy;
    let s = world(web(), [pod(1), outside, host, elsewhere, down]);
    check(&s, "10.96.0.1:80", "10.1.0.1:8080 by 10.1.0.1:15008, 10.1.0.3:8080 plain");
    check(&s, "[::ffff:10.96.0.1]:80", "10.1.0.1:8080 by 10.1.0.1:15008, 10.1.0.3:8080 plain");
    let no_port =
        "no_such_port: service shop/web.shop.svc.cluster.local has no port 82; it has 80, 81";
    check(&s, "10.96.0.1:82", no_port);
    check(&s, "10.96.0.2:80", "passthrough");
    check(&s, "1.1.1.1:15008", "passthrough");
    check(&s, "10.1.0.1:5432", "10.1.0.1:5432 by 10.1.0.1:15008");
    check(&s, "10.1.0.6:80", "10.1.0.6:80 by 10.1.0.6:15008");
    check(&s, "10.1.0.3:80", "passthrough");
    check(&s, "10.1.0.4:80", "passthrough");
    check(&s, "10.1.0.5:80", "passthrough");
    for own in MESH_PORTS {
        check(
            &s,
            &format!("10.1.0.1:{own}"),
            &format!("mesh_port: port {own} of shop/web-1 is the mesh's own"),
        );
        check(&s, &format!("10.1.0.3:{own}"), "passthrough");
    }
}

/// What the control plane says in words of another version is neither reached in plaintext nor balanced to.
#[test]
fn a_plan_grows_old() {
    let plain = |n| Workload { protocol: TunnelProtocol::None, ..pod(n) };
    let before = world(web(), [plain(1)]);
    let OutboundPlan::Connect { candidates, .. } = plan_to(&before, "10.96.0.1:80", 0) else {
        panic!("there is an endpoint");
    };
    let check = |now: Vec<Workload>, want: bool| {
        assert_eq!(candidates[0].is_current(&world(web(), now)), want);
    };
    check(vec![plain(1)], true);
    check(vec![Workload { health: Health::Unhealthy, ..plain(1) }], true);
    // Joined the mesh, moved, gone; another has its address.
    check(vec![pod(1)], false);
    check(vec![Workload { addresses: plain(2).addresses, ..plain(1) }], false);
    check(vec![], false);
    check(vec![Workload { addresses: plain(1).addresses, ..plain(2) }], false);
}

#[test]
fn what_cannot_be_read_is_not_reached() {
    let mut strange = pod(2);
    strange.protocol = TunnelProtocol::Unreadable;
    let s = world(web(), [pod(1), strange.clone()]);
    check(&s, "10.96.0.1:80", "10.1.0.1:8080 by 10.1.0.1:15008");
    let refused = "unsupported: the control plane describes shop/web-2 in a way that this proxy cannot read \
                   (its list of refused configuration says why)";
    check(&s, "10.1.0.2:80", refused);
    let s = world(web(), [strange]);
    let none = "unsupported: none of the 1 endpoint of service shop/web.shop.svc.cluster.local can take port 80: \
                1 described in a way that this proxy cannot read";
    check(&s, "10.96.0.1:80", none);
}

#[test]
fn named_target_ports_are_each_endpoints_own() {
    let with = |n: u8, ports: &[ServicePort]| {
        let mut w = pod(n);
        w.services = Arc::new([(key("web"), ports.into())]);
        w
    };
    let s = world(
        web(),
        [pod(1), with(2, &[port(81, 9001)]), with(3, &[port(81, 9002), port(80, 8000)])],
    );
    check(&s, "10.96.0.1:81", "10.1.0.2:9001 by 10.1.0.2:15008, 10.1.0.3:9002 by 10.1.0.3:15008");
    check(
        &s,
        "10.96.0.1:80",
        "10.1.0.1:8080 by 10.1.0.1:15008, 10.1.0.2:8080 by 10.1.0.2:15008, 10.1.0.3:8000 by 10.1.0.3:15008",
    );
}

#[test]
fn families() {
    let dual = |n: u8, ips: &[&str]| {
        let mut w = pod(n);
        w.addresses = ips.iter().map(|ip| ip.parse().unwrap()).collect();
        w
    };
    let pods = || [dual(1, &["10.1.0.1", "fd01::1"]), dual(2, &["fd01::2"])];
    let of = |families| world(Service { families, ..web() }, pods());
    let (one, two) = ("[fd01::1]:8080 by [fd01::1]:15008", "[fd01::2]:8080 by [fd01::2]:15008");
    for families in [FamilyPolicy::Automatic, FamilyPolicy::Dual] {
        let s = of(families);
        check(&s, "[fd96::1]:80", &format!("{one}, {two}"));
        check(&s, "10.96.0.1:80", &format!("10.1.0.1:8080 by 10.1.0.1:15008, {two}"));
    }
    check(&of(FamilyPolicy::Ipv4Only), "[fd96::1]:80", "10.1.0.1:8080 by 10.1.0.1:15008");
    check(&of(FamilyPolicy::Ipv6Only), "10.96.0.1:80", &format!("{one}, {two}"));
}

#[test]
fn refusals_say_why_no_endpoint_fits() {
    let none = |why: &str| format!("none of the {why}");
    let check = |service: Service, pods: Vec<Workload>, to: &str, want: &str| {
        check(&world(service, pods), to, want);
    };
    let of = "of service shop/web.shop.svc.cluster.local can take port";
    check(
        web(),
        vec![],
        "10.96.0.1:80",
        "no_healthy_endpoint: service shop/web.shop.svc.cluster.local has no endpoints",
    );
    let change = |n: u8, f: fn(&mut Workload)| {
        let mut w = pod(n);
        f(&mut w);
        w
    };
    let down = |n| change(n, |w| w.health = Health::Unhealthy);
    let far = |n| change(n, |w| w.network = "far".into());
    let named = |n| change(n, |w| (w.addresses, w.hostname) = (Arc::new([]), "db.example".into()));
    check(
        web(),
        vec![down(1), down(2)],
        "10.96.0.1:80",
        &format!("no_healthy_endpoint: {}", none(&format!("2 endpoints {of} 80: 2 not ready"))),
    );
    check(
        web(),
        vec![down(1), far(2)],
        "10.96.0.1:81",
        &format!(
            "no_healthy_endpoint: none of the 2 endpoints {of} 81: 1 not ready, 1 on another network, which this version cannot reach"
        ),
    );
    check(
        web(),
        vec![pod(1)],
        "10.96.0.1:81",
        &format!(
            "no_healthy_endpoint: none of the 1 endpoint {of} 81: 1 without the named target port"
        ),
    );
    check(
        web(),
        vec![far(1), named(2)],
        "10.96.0.1:80",
        &format!(
            "unsupported: none of the 2 endpoints {of} 80: 1 on another network, which this version cannot reach, \
             1 known only by a DNS name, which this version does not resolve"
        ),
    );
    let v6_only = Service { families: FamilyPolicy::Ipv6Only, ..web() };
    check(
        v6_only,
        vec![pod(1)],
        "10.96.0.1:80",
        &format!(
            "no_healthy_endpoint: none of the 1 endpoint {of} 80: 1 without an address of a usable family"
        ),
    );
    let own = Service { ports: Arc::new([port(80, 15008)]), ..web() };
    check(
        own.clone(),
        vec![pod(1)],
        "10.96.0.1:80",
        &format!(
            "mesh_port: none of the 1 endpoint {of} 80: 1 with one of the mesh's own ports as target"
        ),
    );
    let plain = change(1, |w| w.protocol = TunnelProtocol::None);
    check(own, vec![plain], "10.96.0.1:80", "10.1.0.1:15008 plain");
    let all = LoadBalancing { health: HealthPolicy::AllowAll, ..LoadBalancing::default() };
    let not_ready_too = Service { load_balancing: all, ..web() };
    check(not_ready_too, vec![down(1)], "10.96.0.1:80", "10.1.0.1:8080 by 10.1.0.1:15008");
    let many = Service { ports: (1..=9).map(|p| port(p, p)).collect(), ..web() };
    let no = "no_such_port: service shop/web.shop.svc.cluster.local has no port 80; it has";
    check(many, vec![], "10.96.0.1:80", &format!("{no} 1, 2, 3, 4, 5, 6, 7, 8 and more"));
    let exactly = Service { ports: (1..=8).map(|p| port(p, p)).collect(), ..web() };
    check(exactly, vec![], "10.96.0.1:80", &format!("{no} 1, 2, 3, 4, 5, 6, 7, 8"));
    check(
        Service { ports: Arc::new([]), ..web() },
        vec![],
        "10.96.0.1:80",
        &format!("{no} no port at all"),
    );
}

#[test]
fn locality() {
    use LocalityScope::{Cluster, Network, Node, Region, Subzone, Zone};
    use RoutingMode::{Any, Failover, Strict};
    let place = |n: u8, node: &str, zone: Option<&str>| {
        let mut w = pod(n);
        w.node = node.into();
        w.locality =
            Locality { region: Some("r".into()), zone: zone.map(Str::from), subzone: None };
        w
    };
    let balanced = |mode, preference: &[LocalityScope]| LoadBalancing {
        mode,
        preference: preference.into(),
        health: HealthPolicy::OnlyHealthy,
    };
    // The first candidate of many plans: which endpoints may come first.
    let first = |pods: &[Workload], source: &Workload, mode, preference: &[LocalityScope]| {
        let s =
            world(Service { load_balancing: balanced(mode, preference), ..web() }, pods.to_vec());
        let facts = OutboundFacts { source, destination: "10.96.0.1:80".parse().unwrap() };
        let mut names: Vec<String> = (0..200)
            .filter_map(|rand| match plan_outbound(&s, &facts, rand) {
                OutboundPlan::Connect { candidates, .. } => {
                    Some(candidates[0].workload.name.to_string())
                }
                _ => None,
            })
            .collect();
        names.sort();
        names.dedup();
        names.join(" ")
    };
    let here = place(9, "n1", Some("z1"));
    let pods = [place(1, "n1", Some("z1")), place(2, "n2", Some("z1")), place(3, "n3", Some("z2"))];
    let check = |mode, preference: &[LocalityScope], want: &str| {
        assert_eq!(first(&pods, &here, mode, preference), want, "{mode:?} {preference:?}");
    };
    check(Any, &[Network, Region, Zone], "web-1 web-2 web-3");
    check(Failover, &[Network, Region, Zone], "web-1 web-2");
    check(Failover, &[Network, Region, Zone, Subzone, Node], "web-1");
    check(Failover, &[Network, Region], "web-1 web-2 web-3");
    check(Failover, &[], "web-1 web-2 web-3");
    check(Strict, &[Zone], "web-1 web-2");
    check(Strict, &[Node], "web-1");
    check(Strict, &[], "web-1 web-2 web-3");
    check(Strict, &[Cluster], "web-1 web-2 web-3");
    // Only leading scopes count: sharing the node does not make up for another zone.
    let odd = [place(1, "n1", Some("z2")), place(2, "n2", Some("z1"))];
    assert_eq!(first(&odd, &here, Failover, &[Zone, Node]), "web-2");
    // Unknown zones are one zone; an unknown node is no node, an unknown cluster no cluster.
    let unknown = [place(1, "n1", None), place(2, "n2", None)];
    assert_eq!(first(&unknown, &place(9, "n1", None), Failover, &[Region, Zone, Node]), "web-1");
    assert_eq!(first(&[place(1, "", None)], &place(9, "", None), Strict, &[Node]), "");
    let clusterless = Workload { cluster: "".into(), ..place(1, "", None) };
    assert_eq!(first(std::slice::from_ref(&clusterless), &clusterless, Strict, &[Cluster]), "");
    let sub = |n: u8, s: &str| {
        let mut w = pod(n);
        w.locality.subzone = Some(s.into());
        w
    };
    assert_eq!(first(&[sub(1, "a"), sub(2, "b")], &sub(9, "b"), Strict, &[Subzone]), "web-2");
    let region = |n: u8, s: &str| {
        let mut w = pod(n);
        w.locality.region = Some(s.into());
        w
    };
    assert_eq!(
        first(&[region(1, "a"), region(2, "b")], &region(9, "b"), Strict, &[Region]),
        "web-2"
    );
}

#[test]
fn strict_without_a_near_endpoint_refuses() {
    let strict = LoadBalancing {
        mode: RoutingMode::Strict,
        preference: Arc::new([LocalityScope::Node]),
        health: HealthPolicy::OnlyHealthy,
    };
    let s = world(Service { load_balancing: strict, ..web() }, [pod(2), pod(4)]);
    check(
        &s,
        "10.96.0.1:80",
        "no_healthy_endpoint: none of the 2 endpoints of service shop/web.shop.svc.cluster.local can take port 80: \
         2 outside the scopes that the service demands",
    );
}

#[test]
fn near_candidates_come_before_far_ones() {
    let failover = LoadBalancing {
        mode: RoutingMode::Failover,
        preference: Arc::new([LocalityScope::Node]),
        health: HealthPolicy::OnlyHealthy,
    };
    let s = world(Service { load_balancing: failover, ..web() }, (1..=6).map(pod));
    for rand in 0..100 {
        let OutboundPlan::Connect { candidates, .. } = plan_to(&s, "10.96.0.1:80", rand) else {
            panic!()
        };
        let nodes: Vec<&str> = candidates.iter().map(|c| &*c.workload.node).collect();
        assert_eq!(nodes, ["node-1", "node-1", "node-1"]);
    }
    let source = client();
    let facts = OutboundFacts { source: &source, destination: "10.96.0.1:80".parse().unwrap() };
    let OutboundPlan::Connect { candidates, .. } = plan_every_endpoint(&s, &facts) else {
        panic!()
    };
    let names: Vec<&str> = candidates.iter().map(|c| &*c.workload.name).collect();
    assert_eq!(names, ["web-1", "web-3", "web-5", "web-2", "web-4", "web-6"]);
}

#[test]
fn address_ranges_and_passthrough_services() {
    let passthrough = LoadBalancing { mode: RoutingMode::Passthrough, ..LoadBalancing::default() };
    let range = Service {
        key: key("range"),
        vips: Arc::new([Vip { network: "".into(), ip: "10.0.0.0".parse().unwrap(), prefix: 8 }]),
        load_balancing: passthrough,
        ..web()
    };
    let s = world(web(), [pod(1)]).with([Change::SetService(Arc::new(range.clone()))]);
    check(&s, "10.200.0.1:443", "passthrough");
    check(&s, "10.96.0.1:80", "10.1.0.1:8080 by 10.1.0.1:15008");
    check(&s, "10.1.0.1:443", "10.1.0.1:443 by 10.1.0.1:15008");
    // A range that balances does not take away the address of a workload.
    let balanced = Service { load_balancing: LoadBalancing::default(), ..range };
    let s = s.with([Change::SetService(Arc::new(balanced.clone()))]);
    check(&s, "10.1.0.1:443", "10.1.0.1:443 by 10.1.0.1:15008");
    check(
        &s,
        "10.200.0.1:80",
        "no_healthy_endpoint: service shop/range.shop.svc.cluster.local has no endpoints",
    );
    let exact = Service {
        key: key("none"),
        vips: Arc::new([vip("10.96.0.7"), vip("10.1.0.1")]),
        load_balancing: LoadBalancing {
            mode: RoutingMode::Passthrough,
            ..LoadBalancing::default()
        },
        ..balanced
    };
    let s = s.with([Change::SetService(Arc::new(exact))]);
    check(&s, "10.96.0.7:9", "passthrough");
    check(&s, "10.1.0.1:9", "10.1.0.1:9 by 10.1.0.1:15008");
}

#[test]
fn expected_identities() {
    let service = Service {
        subject_alt_names: Arc::new([
            "spiffe://cluster.local/ns/shop/sa/old".into(),
            "db.example".into(),
        ]),
        ..web()
    };
    let s = world(service, [pod(1)]);
    let expected = |to: &str| match plan_to(&s, to, 0) {
        OutboundPlan::Connect { candidates, service } => match candidates[0].transport.clone() {
            Transport::Hbone { expected, .. } => {
                let names: Vec<_> = expected.iter().map(|i| i.principal()).collect();
                (names.join(" "), service.map(|s| s.name.to_string()))
            }
            Transport::Plain => panic!("plain"),
        },
        other => panic!("{other:?}"),
    };
    let own = "cluster.local/ns/shop/sa/web";
    let both = format!("{own} cluster.local/ns/shop/sa/old");
    assert_eq!(expected("10.96.0.1:80"), (both, Some("web".to_owned())));
    assert_eq!(expected("10.1.0.1:80"), (own.to_owned(), None));
}

/// How often each endpoint comes first is proportional to its capacity: χ² over 20,000 plans.
#[test]
fn weights() {
    let check = |capacities: &[u32], limit: f64| {
        let pods =
            (1..).zip(capacities).map(|(n, capacity)| Workload { capacity: *capacity, ..pod(n) });
        let s = world(web(), pods);
        let mut seen: HashMap<String, f64> = HashMap::new();
        let plans = 20_000_u32;
        for rand in 0..plans {
            let OutboundPlan::Connect { candidates, .. } = plan_to(&s, "10.96.0.1:80", rand.into())
            else {
                panic!("no plan")
            };
            *seen.entry(candidates[0].workload.name.to_string()).or_default() += 1.0;
        }
        let total: u32 = capacities.iter().map(|c| *c.max(&1)).sum();
        let chi2: f64 = (1..)
            .zip(capacities)
            .map(|(n, c): (u8, _)| {
                let want = f64::from(plans) * f64::from(*c.max(&1)) / f64::from(total);
                (seen.get(&format!("web-{n}")).copied().unwrap_or_default() - want).powi(2) / want
            })
            .sum();
        // The limit is the 0.1 % point of χ² with n-1 degrees of freedom.
        assert!(chi2 < limit, "{capacities:?}: chi² {chi2:.1}, {seen:?}");
    };
    check(&[1, 1], 10.83);
    check(&[1; 10], 27.88);
    check(&[1, 2, 3, 4], 16.27);
    check(&[0, 1, 8], 13.82);
    check(&[100, 1], 10.83);
}

fn a_pod(n: u8) -> impl Strategy<Value = Workload> {
    let oneof = |s: &'static [&'static str]| proptest::sample::select(s);
    (
        proptest::bool::weighted(0.7),
        proptest::bool::weighted(0.8),
        oneof(&["", "", "", "far"]),
        oneof(&["node-0", "node-1", ""]),
        proptest::option::of(oneof(&["z1", "z2"])),
        0..4_u32,
        oneof(&["v4", "v6", "both", "name"]),
        oneof(&["", "named", "mesh"]),
    )
        .prop_map(move |(healthy, hbone, network, node, zone, capacity, addresses, ports)| {
            let mut w = pod(n);
            w.health = if healthy { Health::Healthy } else { Health::Unhealthy };
            w.protocol = if hbone { TunnelProtocol::Hbone } else { TunnelProtocol::None };
            (w.network, w.node, w.capacity) = (network.into(), node.into(), capacity);
            w.locality.zone = zone.map(Str::from);
            let (v4, v6) = (IpAddr::from([10, 1, 0, n]), format!("fd01::{n}").parse().unwrap());
            w.addresses = match addresses {
                "v4" => Arc::new([v4]),
                "v6" => Arc::new([v6]),
                "both" => Arc::new([v4, v6]),
                _ => Arc::new([]),
            };
            let ports: Arc<[ServicePort]> = match ports {
                "named" => Arc::new([port(81, 9000)]),
                "mesh" => Arc::new([port(81, 15001), port(80, 15006)]),
                _ => Arc::new([]),
            };
            w.services = Arc::new([(key("web"), ports)]);
            w
        })
}

fn a_service() -> impl Strategy<Value = Service> {
    use LocalityScope::{Network, Node, Zone};
    let modes = &[RoutingMode::Any, RoutingMode::Strict, RoutingMode::Failover][..];
    let preferences: Vec<&'static [LocalityScope]> = vec![&[], &[Node], &[Network, Zone, Node]];
    let families = &[FamilyPolicy::Automatic, FamilyPolicy::Ipv4Only, FamilyPolicy::Ipv6Only][..];
    use proptest::sample::select;
    (select(modes), select(preferences), any::<bool>(), select(families)).prop_map(
        |(mode, preference, all, families)| {
            let health = if all { HealthPolicy::AllowAll } else { HealthPolicy::OnlyHealthy };
            let load_balancing = LoadBalancing { mode, preference: preference.into(), health };
            Service { load_balancing, families, ..web() }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn plans_keep_their_promises(
        service in a_service(),
        pods in (0..8_u8).prop_flat_map(|n| (1..=n).map(a_pod).collect::<Vec<_>>()),
        to in proptest::sample::select(&["10.96.0.1:80", "10.96.0.1:81", "[fd96::1]:80"][..]),
        rand: u64,
    ) {
        let s = world(service.clone(), pods);
        let source = client();
        let facts = OutboundFacts { source: &source, destination: to.parse().unwrap() };
        let plan = plan_outbound(&s, &facts, rand);
        let every = plan_every_endpoint(&s, &facts);
        prop_assert_eq!(short(&plan), short(&plan_outbound(&s, &facts, rand)));
        let (OutboundPlan::Connect { candidates, .. }, OutboundPlan::Connect { candidates: all, .. }) = (&plan, &every)
        else {
            prop_assert_eq!(short(&plan), short(&every), "both refuse, or neither");
            return Ok(());
        };
        prop_assert_eq!(candidates.len(), all.len().min(MAX_CANDIDATES));
        let mut uids: Vec<_> = candidates.iter().map(|c| &c.workload.uid).collect();
        uids.sort();
        uids.dedup();
        prop_assert_eq!(uids.len(), candidates.len(), "distinct");
        let strict = service.load_balancing.mode == RoutingMode::Strict;
        for c in candidates {
            prop_assert!(all.contains(c));
            let w = &c.workload;
            prop_assert!(w.health == Health::Healthy || service.load_balancing.health == HealthPolicy::AllowAll);
            prop_assert!(w.addresses.contains(&c.target.ip()));
            prop_assert!(c.target.port() != 0);
            prop_assert_eq!(&w.network, &source.network);
            let hbone = w.protocol == TunnelProtocol::Hbone;
            prop_assert_eq!(hbone, matches!(c.transport, Transport::Hbone { .. }));
            prop_assert!(!hbone || !MESH_PORTS.contains(&c.target.port()));
            let near = w.node == source.node || !service.load_balancing.preference.contains(&LocalityScope::Node);
            prop_assert!(!strict || near);
        }
    }
}
