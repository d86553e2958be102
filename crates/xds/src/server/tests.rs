//! The server's half of the delta protocol: order, one push at a time, stock proxies.

use super::*;
use crate::discovery::Status;
use model::http::{ServiceRoutes, Subset, SubsetKey};
use model::{Policy, ServiceKey, Workload};

fn policy(name: &str) -> Policy {
    Policy {
        key: model::PolicyKey { namespace: "ns".into(), name: name.into() },
        scope: model::Scope::WorkloadSelector,
        action: model::Action::Allow,
        rules: [].into(),
        dry_run: false,
        provenance: Default::default(),
    }
}

fn workload(name: &str, policy_name: &str) -> Workload {
    Workload { policies: [policy(policy_name).key].into(), ..Workload::named(name, "ns", name) }
}

fn mesh(number: u64, workloads: &[Workload], policies: &[Policy]) -> Arc<Resources> {
    with_http(number, workloads, policies, &[], &[])
}

fn with_http(
    number: u64,
    workloads: &[Workload],
    policies: &[Policy],
    routes: &[ServiceRoutes],
    subsets: &[Subset],
) -> Arc<Resources> {
    let push = ConfigVersion { epoch: 1, number };
    fn all<T: Clone>(values: &[T]) -> Vec<Arc<T>> {
        values.iter().cloned().map(Arc::new).collect()
    }
    let (workloads, policies) = (all(workloads), all(policies));
    let (routes, subsets) = (all(routes), all(subsets));
    let mesh = Mesh {
        workloads: &workloads,
        services: &[],
        policies: &policies,
        routes: &routes,
        subsets: &subsets,
    };
    Arc::new(Resources::new(push, mesh))
}

fn routes(hostname: &str) -> ServiceRoutes {
    let service = ServiceKey { namespace: "ns".into(), hostname: hostname.into() };
    ServiceRoutes { service, ports: [].into(), sets: [].into() }
}

fn subset(name: &str) -> Subset {
    let key = SubsetKey { service: routes("s").service, name: name.into() };
    Subset { key, workloads: Default::default() }
}

fn subscribe(kind: Kind) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest { type_url: kind.type_url().to_owned(), ..Default::default() }
}

fn ack(response: &DeltaDiscoveryResponse) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: response.type_url.clone(),
        response_nonce: response.nonce.clone(),
        ..Default::default()
    }
}

/// Everything the connection sends now: the last word of the type, what is set, what is removed.
fn sent(connection: &mut Connection) -> (Vec<String>, Vec<DeltaDiscoveryResponse>) {
    let responses: Vec<_> = std::iter::from_fn(|| connection.next_response()).collect();
    let line = |r: &DeltaDiscoveryResponse| {
        let set: Vec<_> = r.resources.iter().map(|r| r.name.as_str()).collect();
        let kind = Kind::from_type_url(&r.type_url).unwrap();
        format!("{kind} +{} -{}", set.join(","), r.removed_resources.join(","))
    };
    (responses.iter().map(line).collect(), responses)
}

#[test]
fn additions_and_removals_travel_in_order_and_one_at_a_time() {
    let first = mesh(1, &[workload("w", "p")], &[policy("p")]);
    let mut c = Connection::new(first);
    // As our proxies do.
    for kind in Kind::OF_NODE {
        assert_eq!(c.request(subscribe(kind)), Ok(Event::Subscribed(kind)));
    }
    let (lines, responses) = sent(&mut c);
    assert_eq!(
        lines,
        ["Origin +ns/p -", "Authorization +ns/p -", "Address +w -", "PushMarker +push -"]
    );
    assert!(!c.is_settled());

    // Nothing is answered yet: two newer states become one difference.
    c.set(mesh(2, &[workload("w", "q")], &[policy("q")]));
    c.set(mesh(3, &[workload("w", "r")], &[policy("r")]));
    assert_eq!(sent(&mut c).0, Vec::<String>::new());
    // The address waits for the policy it refers to, although its own type is free.
    c.request(ack(&responses[2])).unwrap();
    c.request(ack(&responses[0])).unwrap();
    let (lines, origin) = sent(&mut c);
    assert_eq!(lines, ["Origin +ns/r -"]);
    c.request(ack(&responses[1])).unwrap();
    let (lines, next) = sent(&mut c);
    assert_eq!(lines, ["Authorization +ns/r -", "Address +w -"]);
    c.request(ack(&origin[0])).unwrap();
    assert_eq!(sent(&mut c).0, Vec::<String>::new());
    c.request(ack(&next[0])).unwrap();
    let (lines, last) = sent(&mut c);
    assert_eq!(lines, ["Authorization + -ns/p", "Origin + -ns/p"]);

    // The first marker is still unanswered: push 2 never gets one of its own.
    let event = c.request(ack(&responses[3])).unwrap();
    assert_eq!(
        event,
        Event::Acked { kind: Kind::Marker, push: Some(ConfigVersion { epoch: 1, number: 1 }) }
    );
    let (lines, marker) = sent(&mut c);
    assert_eq!(lines, ["PushMarker +push -"]);
    for response in [&next[1], &last[0], &last[1], &marker[0]] {
        c.request(ack(response)).unwrap();
    }
    assert!(c.is_settled());
    assert_eq!(c.acked(), Some(ConfigVersion { epoch: 1, number: 3 }));
}

#[test]
fn stock_proxies_get_two_types_and_no_marker() {
    let mut c = Connection::new(mesh(1, &[workload("w", "p")], &[policy("p")]));
    c.request(subscribe(Kind::Address)).unwrap();
    c.request(subscribe(Kind::Authorization)).unwrap();
    let (lines, responses) = sent(&mut c);
    assert_eq!(lines, ["Authorization +ns/p -", "Address +w -"]);
    for response in &responses {
        c.request(ack(response)).unwrap();
    }
    assert!(c.is_settled());
    c.set(mesh(2, &[workload("w", "p")], &[policy("p")]));
    assert_eq!(sent(&mut c).0, Vec::<String>::new());
    // What it wants no more it does not get.
    let mut request = subscribe(Kind::Address);
    request.resource_names_unsubscribe = vec!["*".to_owned()];
    assert_eq!(c.request(request), Ok(Event::Unsubscribed(Kind::Address)));
    c.set(mesh(3, &[], &[]));
    assert_eq!(sent(&mut c).0, ["Authorization + -ns/p"]);
}

#[test]
fn routes_come_after_what_they_name_and_leave_before() {
    let mut c = Connection::new(with_http(
        1,
        &[workload("a", "p")],
        &[policy("p")],
        &[routes("s")],
        &[subset("v1")],
    ));
    // As our waypoints do: routes first, and still they wait for the addresses.
    for kind in Kind::OF_WAYPOINT {
        c.request(subscribe(kind)).unwrap();
    }
    let (lines, responses) = sent(&mut c);
    let want = [
        "Origin +ns/p -",
        "Authorization +ns/p -",
        "Address +a -",
        "Subset +ns/s/v1 -",
        "Routes +ns/s -",
        "PushMarker +push -",
    ];
    assert_eq!(lines, want);
    let marker = responses[5].resources[0].resource.as_ref().unwrap().value.clone();
    let marker = ambit::PushMarker::decode(marker).unwrap();
    let held: Vec<_> = marker.holdings.iter().map(|h| (h.type_url.as_str(), h.count)).collect();
    assert_eq!(held, Kind::CONFIGURATION.map(|kind| (kind.type_url(), 1)));
    responses.iter().for_each(|r| drop(c.request(ack(r)).unwrap()));
    assert!(c.is_settled());

    // Everything is replaced: the old goes when nothing names it any more.
    let policies = [policy("q")];
    let next = with_http(2, &[workload("b", "q")], &policies, &[routes("t")], &[subset("v2")]);
    c.set(next);
    let mut log = Vec::new();
    for _ in 0..9 {
        let (lines, responses) = sent(&mut c);
        log.extend(lines);
        responses.iter().for_each(|r| drop(c.request(ack(r)).unwrap()));
    }
    let want = [
        "Origin +ns/q -",
        "Authorization +ns/q -",
        "Address +b -",
        "Subset +ns/s/v2 -",
        "Routes +ns/t -ns/s",
        "Subset + -ns/s/v1",
        "Address + -a",
        "Authorization + -ns/p",
        "Origin + -ns/p",
        "PushMarker +push -",
    ];
    assert_eq!(log, want);
    assert!(c.is_settled());
}

#[test]
fn who_asks_for_no_routes_never_sees_them() {
    let (routes, subsets) = ([routes("s")], [subset("v1")]);
    let mut c = Connection::new(with_http(1, &[workload("w", "p")], &[], &routes, &subsets));
    for kind in Kind::OF_NODE {
        c.request(subscribe(kind)).unwrap();
    }
    let (lines, responses) = sent(&mut c);
    assert_eq!(lines, ["Origin + -", "Authorization + -", "Address +w -", "PushMarker +push -"]);
    responses.iter().for_each(|r| drop(c.request(ack(r)).unwrap()));
    // One step for addresses: what comes and what goes.
    c.set(mesh(2, &[workload("x", "p")], &[]));
    assert_eq!(sent(&mut c).0, ["Address +x -w", "PushMarker +push -"]);
}

#[test]
fn routes_without_addresses_wait_and_nobody_waits_for_them() {
    let mut c = Connection::new(with_http(1, &[], &[], &[routes("s")], &[subset("v1")]));
    for kind in [Kind::Routes, Kind::Subset, Kind::Marker] {
        c.request(subscribe(kind)).unwrap();
    }
    let (lines, responses) = sent(&mut c);
    assert_eq!(lines, ["PushMarker +push -"]);
    c.request(ack(&responses[0])).unwrap();
    assert!(c.is_settled());
    c.request(subscribe(Kind::Address)).unwrap();
    let (lines, _) = sent(&mut c);
    assert_eq!(lines[..3], ["Address + -", "Subset +ns/s/v1 -", "Routes +ns/s -"]);
}

/// What is gone may still be named by the routes that the proxy holds.
#[test]
fn a_returning_waypoint_keeps_addresses_until_its_routes_have_changed() {
    let mut c = Connection::new(with_http(2, &[], &[], &[routes("s")], &[]));
    let holding = |kind, name: &str| DeltaDiscoveryRequest {
        initial_resource_versions: [(name.to_owned(), "v".to_owned())].into(),
        ..subscribe(kind)
    };
    for (kind, name) in [(Kind::Routes, "ns/s"), (Kind::Subset, "ns/s/v1"), (Kind::Address, "w")] {
        c.request(holding(kind, name)).unwrap();
        if kind != Kind::Address {
            assert_eq!(sent(&mut c).0, Vec::<String>::new());
        }
    }
    let mut log = Vec::new();
    for _ in 0..4 {
        let (lines, responses) = sent(&mut c);
        log.extend(lines);
        responses.iter().for_each(|r| drop(c.request(ack(r)).unwrap()));
    }
    assert_eq!(
        log,
        ["Address + -", "Subset + -", "Routes +ns/s -", "Subset + -ns/s/v1", "Address + -w"]
    );
}

#[test]
fn a_returning_proxy_keeps_policies_until_its_addresses_are_known() {
    let mut c = Connection::new(mesh(1, &[], &[]));
    let holding = |kind, name: &str| DeltaDiscoveryRequest {
        initial_resource_versions: [(name.to_owned(), "v".to_owned())].into(),
        ..subscribe(kind)
    };
    c.request(holding(Kind::Authorization, "ns/p")).unwrap();
    let (lines, responses) = sent(&mut c);
    assert_eq!(lines, ["Authorization + -"]);
    c.request(ack(&responses[0])).unwrap();
    assert_eq!(sent(&mut c).0, Vec::<String>::new());
    assert!(c.is_settled(), "nothing more to wait for");
    c.request(holding(Kind::Address, "w")).unwrap();
    assert_eq!(sent(&mut c).0, ["Address + -w", "Authorization + -ns/p"]);
}

#[test]
fn refusals_are_reported_and_not_repeated() {
    let check = |details: Vec<Any>, want: &[&str]| {
        let mut c = Connection::new(mesh(1, &[workload("w", "p"), workload("x", "p")], &[]));
        c.request(subscribe(Kind::Address)).unwrap();
        let (_, responses) = sent(&mut c);
        let mut nack = ack(&responses[0]);
        nack.error_detail = Some(Status { code: 3, message: "no".repeat(5000), details });
        let Ok(Event::Nacked(nack)) = c.request(nack) else { panic!("no refusal") };
        assert_eq!((nack.kind, nack.message.len()), (Kind::Address, MAX_MESSAGE_BYTES));
        assert_eq!(nack.names, want);
        assert_eq!(sent(&mut c).0, Vec::<String>::new());
        assert!(c.is_settled());
        // A newer version is tried.
        c.set(mesh(2, &[workload("w", "p"), workload("x", "q")], &[]));
        assert_eq!(sent(&mut c).0, ["Address +x -"]);
    };
    check(Vec::new(), &["w", "x"]);
    let value = ambit::Refused { names: vec!["x".to_owned()] }.encode_to_vec().into();
    check(vec![Any { type_url: REFUSED_TYPE.to_owned(), value }], &["x"]);
}

#[test]
fn odd_requests() {
    let mut c = Connection::new(mesh(1, &[], &[]));
    let cds = DeltaDiscoveryRequest { type_url: "x/Cluster".to_owned(), ..Default::default() };
    assert!(matches!(c.request(cds), Ok(Event::Ignored(_))));
    let mut stale = subscribe(Kind::Address);
    stale.response_nonce = "99".to_owned();
    assert!(matches!(c.request(stale.clone()), Ok(Event::Ignored(_))));
    c.request(subscribe(Kind::Address)).unwrap();
    assert_eq!(sent(&mut c).0, ["Address + -"]);
    assert!(matches!(c.request(stale), Ok(Event::Ignored(_))));
    assert!(!c.is_settled(), "a foreign nonce answers nothing");

    let mut on_demand = subscribe(Kind::Address);
    on_demand.resource_names_subscribe = vec!["ns/host".to_owned()];
    assert!(c.request(on_demand.clone()).is_err());
    on_demand.resource_names_subscribe = vec!["*".to_owned()];
    on_demand.resource_names_unsubscribe = vec!["*".to_owned()];
    let error = c.request(on_demand).unwrap_err();
    assert!(error.to_string().contains("on-demand"), "{error}");
}
