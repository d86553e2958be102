//! Plans that go through a waypoint.

use model::{GatewayDestination, NetworkAddress};

use super::*;

const NOT_READY: &str = "service shop/web.shop.svc.cluster.local is bound to waypoint";

fn by_key(name: &str) -> GatewayAddress {
    GatewayAddress { destination: GatewayDestination::Service(key(name)), hbone_port: HBONE_PORT }
}

fn by_ip(ip: &str) -> GatewayAddress {
    let address = NetworkAddress { network: "".into(), ip: ip.parse().unwrap() };
    GatewayAddress { destination: GatewayDestination::Address(address), hbone_port: HBONE_PORT }
}

/// Service `waypoint` with a port that is not the tunnel's, as Istio's has one for its status.
fn service() -> Service {
    Service {
        key: key("waypoint"),
        name: "waypoint".into(),
        vips: Arc::new([vip("10.96.0.9")]),
        ports: Arc::new([port(15021, 15021)]),
        ..web()
    }
}

/// An endpoint of it, with address 10.1.7.N.
fn proxy(n: u8) -> Workload {
    Workload {
        name: format!("waypoint-{n}").into(),
        uid: model::WorkloadUid(format!("c//Pod/shop/waypoint-{n}").into()),
        addresses: Arc::new([IpAddr::from([10, 1, 7, n]), format!("fd01::7:{n}").parse().unwrap()]),
        services: Arc::new([(key("waypoint"), Arc::from([]))]),
        service_account: "waypoint".into(),
        native_tunnel: true,
        ..pod(n)
    }
}

fn bound_to(at: GatewayAddress) -> Service {
    Service { waypoint: Some(at), ..web() }
}

/// `web` with two pods, before it a waypoint with these endpoints.
fn with_waypoint(web: Service, proxies: impl IntoIterator<Item = Workload>) -> Snapshot {
    let all = proxies.into_iter().chain([pod(1), pod(2)]);
    world(web, all).with([Change::SetService(Arc::new(service()))])
}

#[test]
fn a_bound_service_is_asked_of_its_waypoint() {
    let s = with_waypoint(bound_to(by_key("waypoint")), [proxy(1), proxy(2)]);
    check(&s, "10.96.0.1:80", "10.96.0.1:80 by 10.1.7.1:15008, 10.96.0.1:80 by 10.1.7.2:15008");
    check(
        &s,
        "[::ffff:10.96.0.1]:80",
        "10.96.0.1:80 by 10.1.7.1:15008, 10.96.0.1:80 by 10.1.7.2:15008",
    );
    check(
        &s,
        "[fd96::1]:81",
        "[fd96::1]:81 by [fd01::7:1]:15008, [fd96::1]:81 by [fd01::7:2]:15008",
    );
    let no = "no_such_port: service shop/web.shop.svc.cluster.local has no port 82; it has 80, 81";
    check(&s, "10.96.0.1:82", no);
    // Its pods by their own addresses, and the waypoint itself, are reached as ever.
    check(&s, "10.1.0.1:80", "10.1.0.1:80 by 10.1.0.1:15008");
    check(&s, "10.1.7.1:80", "10.1.7.1:80 by 10.1.7.1:15008");
    check(&s, "10.1.7.1:15008", "mesh_port: port 15008 of shop/waypoint-1 is the mesh's own");
    let other_port = GatewayAddress { hbone_port: 15088, ..by_key("waypoint") };
    let s = with_waypoint(bound_to(other_port), [proxy(1)]);
    check(&s, "10.96.0.1:80", "10.96.0.1:80 by 10.1.7.1:15088");
}

#[test]
fn the_waypoint_must_prove_who_it_is() {
    let s = with_waypoint(bound_to(by_key("waypoint")), [proxy(1)]);
    let OutboundPlan::Connect { service, candidates } = plan_to(&s, "10.96.0.1:80", 0) else {
        panic!("there is a waypoint");
    };
    assert_eq!(service.map(|s| s.name.to_string()).as_deref(), Some("web"), "what was called");
    assert_eq!(&*candidates[0].workload.name, "waypoint-1");
    assert!(candidates[0].is_waypoint());
    let Transport::Hbone { expected, .. } = &candidates[0].transport else { panic!("plaintext") };
    assert_eq!(expected, &[proxy(1).identity()]);
    let OutboundPlan::Connect { candidates, .. } = plan_to(&s, "10.1.0.1:80", 0) else {
        panic!("it is an endpoint");
    };
    assert!(!candidates[0].is_waypoint());
}

#[test]
fn around_a_waypoint_there_is_no_way() {
    let down = |n| Workload { health: Health::Unhealthy, ..proxy(n) };
    let outside = |n| Workload { protocol: TunnelProtocol::None, ..proxy(n) };
    let far = |n| Workload { network: "far".into(), ..proxy(n) };
    let strange = |n| Workload { protocol: TunnelProtocol::Unreadable, ..proxy(n) };
    let check = |at: GatewayAddress, proxies: Vec<Workload>, want: &str| {
        let s = with_waypoint(bound_to(at), proxies);
        let got = short(&plan_to(&s, "10.96.0.1:80", 1));
        assert!(got.starts_with("waypoint_not_ready: "), "{got}");
        assert!(got.contains(NOT_READY) && got.ends_with(want), "{got}");
    };
    check(by_key("waypoint"), vec![down(1), down(2)], "can take port 15008: 2 not ready");
    check(by_key("waypoint"), vec![outside(1)], "1 outside the mesh, where no tunnel ends");
    check(
        by_key("waypoint"),
        vec![far(1)],
        "1 on another network, which this version cannot reach",
    );
    check(by_key("waypoint"), vec![strange(1)], "1 described in a way that this proxy cannot read");
    check(by_key("waypoint"), vec![], "waypoint.shop.svc.cluster.local has no endpoints");
    check(by_key("gone"), vec![proxy(1)], "which is not ready: its Service is not there");
    check(by_ip("10.96.0.9"), vec![down(1)], "can take port 15008: 1 not ready");
    check(by_ip("10.1.7.1"), vec![down(1)], "nobody who takes tunnels is ready there");
    check(by_ip("10.1.7.1"), vec![outside(1)], "nobody who takes tunnels is ready there");
    check(by_ip("10.5.5.5"), vec![proxy(1)], "nobody has this address");
    // One that is ready is enough.
    let s = with_waypoint(bound_to(by_key("waypoint")), [down(1), proxy(2)]);
    super::check(&s, "10.96.0.1:80", "10.96.0.1:80 by 10.1.7.2:15008");
}

#[test]
fn a_waypoint_by_address() {
    let s = with_waypoint(bound_to(by_ip("10.96.0.9")), [proxy(1)]);
    check(&s, "10.96.0.1:80", "10.96.0.1:80 by 10.1.7.1:15008");
    let s = with_waypoint(bound_to(by_ip("10.1.7.1")), [proxy(1)]);
    check(&s, "10.96.0.1:80", "10.96.0.1:80 by 10.1.7.1:15008");
}

#[test]
fn a_bound_workload_is_asked_of_its_waypoint() {
    let bound = |n| Workload { waypoint: Some(by_key("waypoint")), ..pod(n) };
    let more = [Change::SetService(Arc::new(service())), Change::SetWorkload(Arc::new(proxy(1)))];
    let s = world(web(), [bound(1)]).with(more.clone());
    check(&s, "10.1.0.1:5432", "10.1.0.1:5432 by 10.1.7.1:15008");
    check(&s, "10.1.0.1:15008", "mesh_port: port 15008 of shop/web-1 is the mesh's own");
    // A workload's waypoint is for calls by its own address.
    check(&s, "10.96.0.1:80", "10.1.0.1:8080 by 10.1.0.1:15008");
    let s = world(web(), [bound(1)]);
    let got = short(&plan_to(&s, "10.1.0.1:5432", 0));
    let want = "waypoint_not_ready: workload c//Pod/shop/web-1 is bound to waypoint shop/waypoint";
    assert!(got.starts_with(want), "{got}");
    // Outside the mesh as well: the waypoint goes on in plaintext.
    let outside = Workload { protocol: TunnelProtocol::None, ..bound(1) };
    let s = world(web(), [outside]).with(more.clone());
    check(&s, "10.1.0.1:5432", "10.1.0.1:5432 by 10.1.7.1:15008");
    // What cannot be read is not reached by that way either.
    let strange = Workload { protocol: TunnelProtocol::Unreadable, ..bound(1) };
    let got = short(&plan_to(&world(web(), [strange]).with(more), "10.1.0.1:5432", 0));
    assert!(got.starts_with("unsupported: "), "{got}");
}

#[test]
fn the_waypoint_itself_goes_on_to_the_endpoints() {
    let bound = Workload { waypoint: Some(by_key("waypoint")), ..pod(3) };
    for at in [by_key("waypoint"), by_ip("10.96.0.9")] {
        let s = with_waypoint(bound_to(at), [proxy(1), proxy(2), bound.clone()]);
        let source = proxy(1);
        let plan = |to: &str| {
            let facts = OutboundFacts { source: &source, destination: to.parse().unwrap() };
            short(&plan_outbound(&s, &facts, 3))
        };
        let direct = "10.1.0.1:8080 by 10.1.0.1:15008, 10.1.0.2:8080 by 10.1.0.2:15008, \
                      10.1.0.3:8080 by 10.1.0.3:15008";
        assert_eq!(plan("10.96.0.1:80"), direct);
        assert_eq!(plan("10.1.0.3:80"), "10.1.0.3:80 by 10.1.0.3:15008");
    }
    // Another waypoint is a client like any other.
    let other = Workload { services: Arc::new([(key("other"), Arc::from([]))]), ..proxy(9) };
    let s = with_waypoint(bound_to(by_key("waypoint")), [proxy(1)]);
    let facts = OutboundFacts { source: &other, destination: "10.96.0.1:80".parse().unwrap() };
    assert_eq!(short(&plan_outbound(&s, &facts, 3)), "10.96.0.1:80 by 10.1.7.1:15008");
}

/// What is bound goes to its waypoint also where the Service leaves the choice of an endpoint to the client.
#[test]
fn a_passthrough_service_may_be_bound() {
    let passthrough = LoadBalancing { mode: RoutingMode::Passthrough, ..LoadBalancing::default() };
    let service = Service { load_balancing: passthrough, ..bound_to(by_key("waypoint")) };
    let s = with_waypoint(service, [proxy(1)]);
    check(&s, "10.96.0.1:9999", "10.96.0.1:9999 by 10.1.7.1:15008");
}

#[test]
fn a_plan_through_a_waypoint_grows_old() {
    let (first, second) = (by_key("waypoint"), by_key("other"));
    let planned = bound_to(first);
    let before = with_waypoint(planned.clone(), [proxy(1)]);
    let OutboundPlan::Connect { candidates, .. } = plan_to(&before, "10.96.0.1:80", 0) else {
        panic!("there is a waypoint");
    };
    let check = |now: &Snapshot, want: [bool; 2]| {
        let got =
            [candidates[0].is_current(now), candidates[0].is_current_for(now, Some(&planned))];
        assert_eq!(got, want);
    };
    check(&before, [true, true]);
    check(&with_waypoint(bound_to(second), [proxy(1)]), [true, false]);
    check(&with_waypoint(web(), [proxy(1)]), [true, false]);
    check(&with_waypoint(planned.clone(), []), [false, false]);
    let moved = Workload { addresses: proxy(2).addresses, ..proxy(1) };
    check(&with_waypoint(planned.clone(), [moved]), [false, false]);
    check(&before.with([Change::RemoveService(key("web"))]), [true, false]);
    // A plan from before the binding must not be tried on: it would go around.
    let OutboundPlan::Connect { candidates, service } =
        plan_to(&with_waypoint(web(), [proxy(1)]), "10.96.0.1:80", 0)
    else {
        panic!("there are endpoints");
    };
    assert!(!candidates[0].is_current_for(&before, service.as_deref()));
    assert!(candidates[0].is_current_for(&before, None));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    /// Whatever the endpoints are: a plan for what is bound ends at the waypoint, or there is none.
    #[test]
    fn what_is_bound_ends_at_the_waypoint(
        service in a_service(),
        pods in (0..5_u8).prop_flat_map(|n| (1..=n).map(a_pod).collect::<Vec<_>>()),
        proxies in (0..5_u8).prop_flat_map(|n| (1..=n).map(a_pod).collect::<Vec<_>>()),
        to in proptest::sample::select(&["10.96.0.1:80", "10.96.0.1:81", "[fd96::1]:80"][..]),
        rand: u64,
    ) {
        let proxies = proxies.into_iter().map(|w| Workload {
            uid: model::WorkloadUid(format!("proxy-{}", w.name).into()),
            name: format!("proxy-{}", w.name).into(),
            services: Arc::new([(key("waypoint"), Arc::from([]))]),
            // Addresses of their own.
            addresses: w.addresses.iter().map(|ip| match ip {
                IpAddr::V4(ip) => IpAddr::from([10, 1, 7, ip.octets()[3]]),
                IpAddr::V6(ip) => format!("fd07::{:x}", ip.segments()[7]).parse().unwrap(),
            }).collect(),
            ..w
        });
        let bound = Service { waypoint: Some(by_key("waypoint")), ..service };
        let s = world(bound, pods.into_iter().chain(proxies))
            .with([Change::SetService(Arc::new(self::service()))]);
        let source = client();
        let destination = to.parse().unwrap();
        let facts = OutboundFacts { source: &source, destination };
        match plan_outbound(&s, &facts, rand) {
            OutboundPlan::Connect { candidates, .. } => {
                prop_assert!(!candidates.is_empty());
                for c in candidates {
                    prop_assert!(c.is_waypoint() && c.target == destination, "{:?}", c);
                    prop_assert!(c.workload.services.iter().any(|(k, _)| *k == key("waypoint")));
                    prop_assert_eq!(c.workload.health, Health::Healthy);
                    let Transport::Hbone { gateway, expected } = &c.transport else {
                        return Err(TestCaseError::fail("plaintext to a waypoint"));
                    };
                    prop_assert!(c.workload.addresses.contains(&gateway.ip()));
                    prop_assert_eq!(expected, &vec![c.workload.identity()]);
                }
            }
            OutboundPlan::Refuse(refusal) => {
                prop_assert_eq!(refusal.reason, Reason::WaypointNotReady);
            }
            OutboundPlan::Passthrough => return Err(TestCaseError::fail("around the waypoint")),
        }
    }
}
