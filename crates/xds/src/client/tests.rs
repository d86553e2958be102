//! The client's half of the delta protocol: what is in force, what is refused, what is reported.

use super::marker::MAX_RESYNCS;
use super::*;
use crate::{MARKER_NAME, security};
use model::http::{ServiceRoutes, Subset, SubsetKey};
use model::{Action, Scope, Snapshot, Workload};

fn client() -> Client {
    let node = Node { id: "node-1".to_owned(), ..Default::default() };
    let mut client = Client::new(node, Defaults { trust_domain: "td".into() });
    let _ = client.connect();
    client
}

fn resource(kind: Kind, name: &str, version: &str, value: Vec<u8>) -> Resource {
    Resource {
        version: version.to_owned(),
        resource: Some(Any { type_url: kind.type_url().to_owned(), value: value.into() }),
        name: name.to_owned(),
        aliases: Vec::new(),
    }
}

fn workload(name: &str) -> Vec<u8> {
    codec::encode_workload(&Workload::named(name, "ns", name)).encode_to_vec()
}

fn authorization(action: i32, scope: i32) -> security::Authorization {
    security::Authorization {
        name: "p".to_owned(),
        namespace: "ns".to_owned(),
        action,
        scope,
        ..Default::default()
    }
}

fn response(kind: Kind, resources: Vec<Resource>, removed: &[&str]) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        type_url: kind.type_url().to_owned(),
        nonce: "n".to_owned(),
        resources,
        removed_resources: removed.iter().map(ToString::to_string).collect(),
        ..Default::default()
    }
}

fn marker(kind: Kind, count: u64, sum: u64) -> DeltaDiscoveryResponse {
    let holdings = vec![ambit::Holding { type_url: kind.type_url().to_owned(), count, sum }];
    let value = ambit::PushMarker { epoch: 1, number: 2, holdings }.encode_to_vec();
    response(Kind::Marker, vec![resource(Kind::Marker, MARKER_NAME, "v", value)], &[])
}

#[test]
fn one_bad_resource_is_refused_and_the_rest_is_in_force() {
    let mut client = client();
    let good = resource(Kind::Address, "good", "1", workload("good"));
    let bad = resource(Kind::Address, "bad", "1", vec![0xff]);
    let other = resource(Kind::Authorization, "other", "1", workload("other"));
    let batch = client.handle(response(Kind::Address, vec![bad, good, other], &[]));
    assert!(matches!(&batch.changes[..], [Change::SetWorkload(w)] if &*w.name == "good"));
    let [answer] = &batch.receipt.answers()[..] else { panic!() };
    let error = answer.error_detail.as_ref().unwrap();
    assert_eq!((answer.response_nonce.as_str(), error.code), ("n", INVALID_ARGUMENT));
    assert!(error.message.contains("bad: Address: "), "{}", error.message);
    let refused = ambit::Refused::decode(error.details[0].value.clone()).unwrap();
    assert_eq!(refused.names, ["bad", "other"]);
    assert_eq!(client.refused().count(), 2);

    // What is refused is not reported as held in a version, so a later stream gets it again.
    let requests = client.connect();
    let versions = &requests[Kind::Address.index()].initial_resource_versions;
    let versions: Vec<_> = versions.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
    assert_eq!(versions, [("bad", ""), ("good", "1"), ("other", "")]);

    // A readable version clears the refusal; a removal too.
    let batch = client.handle(response(
        Kind::Address,
        vec![resource(Kind::Address, "bad", "2", workload("bad"))],
        &["other", "never heard of"],
    ));
    assert_eq!((batch.changes.len(), batch.refused.len()), (1, 0));
    assert!(batch.receipt.answers()[0].error_detail.is_none());
    assert_eq!(client.refused().count(), 0);
}

#[test]
fn a_bad_version_leaves_the_good_one_in_force() {
    let mut client = client();
    let send = |client: &mut Client, version: &str, value| {
        let batch = client.handle(response(
            Kind::Address,
            vec![resource(Kind::Address, "w", version, value)],
            &[],
        ));
        (batch.changes.len(), batch.refused.len())
    };
    assert_eq!(send(&mut client, "1", workload("w")), (1, 0));
    assert_eq!(send(&mut client, "2", vec![0xff]), (0, 1));
    let requests = client.connect();
    assert_eq!(requests[Kind::Address.index()].initial_resource_versions["w"], "1");
    // And a removal takes it away.
    let batch = client.handle(response(Kind::Address, Vec::new(), &["w"]));
    assert!(matches!(&batch.changes[..], [Change::RemoveWorkload(uid)] if &*uid.0 == "w"));
}

#[test]
fn an_unreadable_new_policy_is_closed() {
    let mut client = client();
    let send = |client: &mut Client, version: &str, message: security::Authorization| {
        let one = resource(Kind::Authorization, "ns/p", version, message.encode_to_vec());
        client.handle(response(Kind::Authorization, vec![one], &[]))
    };
    let narrowed = security::Authorization {
        extensions: vec![security::Extension::default()],
        ..authorization(0, 1)
    };
    let batch = send(&mut client, "1", narrowed.clone());
    let [Change::SetPolicy(p)] = &batch.changes[..] else { panic!("{batch:?}") };
    assert_eq!((p.action, p.scope, p.rules.len()), (Action::Allow, Scope::Namespace, 0));

    // Survives a restart, and the control plane learns that it stands there.
    let snapshot = Snapshot::default().with(batch.changes);
    let saved: Vec<_> = client.held().save(&snapshot).collect();
    let mut next = self::client();
    let (changes, unreadable) = next.restore(saved);
    assert_eq!((changes.len(), unreadable.len()), (1, 0));
    let requests = next.connect();
    assert_eq!(requests[Kind::Authorization.index()].initial_resource_versions["ns/p"], "");

    // A readable version replaces it; then an unreadable one changes nothing.
    let batch = send(&mut client, "2", authorization(1, 1));
    assert!(matches!(&batch.changes[..], [Change::SetPolicy(p)] if p.action == Action::Deny));
    let batch = send(&mut client, "3", narrowed);
    assert_eq!((batch.changes.len(), batch.refused.len()), (0, 1));
    let batch = client.handle(response(Kind::Authorization, Vec::new(), &["ns/p"]));
    assert!(matches!(&batch.changes[..], [Change::RemovePolicy(_)]));
}

#[test]
fn a_resource_may_change_its_nature() {
    let mut client = client();
    let workload = codec::encode_workload(&Workload::named("ns/x", "ns", "x")).encode_to_vec();
    let service = codec::encode_service(&model::Service {
        key: service_key("ns/x"),
        name: "x".into(),
        vips: [].into(),
        ports: [].into(),
        subject_alt_names: [].into(),
        waypoint: None,
        load_balancing: Default::default(),
        families: Default::default(),
    })
    .encode_to_vec();
    let one = |v: &str, value| resource(Kind::Address, "ns/x", v, value);
    let _ = client.handle(response(Kind::Address, vec![one("1", workload)], &[]));
    let batch = client.handle(response(Kind::Address, vec![one("2", service)], &[]));
    assert!(matches!(&batch.changes[..], [Change::SetService(_), Change::RemoveWorkload(_)]));
}

fn service_key(name: &str) -> model::ServiceKey {
    let (namespace, hostname) = name.split_once('/').unwrap();
    model::ServiceKey { namespace: namespace.into(), hostname: hostname.into() }
}

#[test]
fn markers_are_compared_with_what_was_received() {
    let mut client = client();
    let value = workload("w");
    let hash = digest::resource("w", &value);
    let one = resource(Kind::Address, "w", "1", value);
    let _ = client.handle(response(Kind::Address, vec![one], &[]));

    let batch = client.handle(marker(Kind::Address, 1, hash));
    assert!(matches!(&batch.changes[..], [Change::SetVersion(v)] if v.number == 2));
    assert!(batch.receipt.answers()[0].error_detail.is_none());

    // Refused resources count: they were received.
    let bad = resource(Kind::Address, "bad", "1", vec![0xff]);
    let _ = client.handle(response(Kind::Address, vec![bad], &[]));
    let sum = hash.wrapping_add(digest::resource("bad", &[0xff]));
    assert!(client.handle(marker(Kind::Address, 2, sum)).mismatches.is_empty());

    // A server whose sums are wrong gets a few attempts, then only complaints.
    for attempt in 0..MAX_RESYNCS + 2 {
        let batch = client.handle(marker(Kind::Address, 7, 0));
        let resync = attempt < MAX_RESYNCS;
        assert_eq!(batch.mismatches.len(), 1);
        assert_eq!(batch.mismatches[0].resync, resync);
        assert!(batch.changes.is_empty());
        let answers = batch.receipt.answers();
        assert!(answers[0].error_detail.is_some());
        assert_eq!(answers.len(), 1 + usize::from(resync));
        if let Some(request) = answers.get(1) {
            assert_eq!(request.resource_names_subscribe, ["*"]);
            assert_eq!(request.initial_resource_versions["w"], "");
        }
        // While it is on its way, markers say nothing about it.
        if resync {
            assert!(client.handle(marker(Kind::Address, 7, 0)).mismatches.is_empty());
        }
        let _ = client.handle(response(Kind::Address, Vec::new(), &[]));
    }
}

fn waypoint() -> Client {
    let mut client = client().asking_for(&Kind::OF_WAYPOINT);
    let _ = client.connect();
    client
}

/// A request whose routes nobody can read must not be sent as if there were none.
#[test]
fn unreadable_new_routes_and_subsets_are_closed() {
    let mut client = waypoint();
    let routes = ServiceRoutes { service: service_key("ns/h"), ports: [].into(), sets: [].into() };
    let readable = codec::encode_routes(&routes).encode_to_vec();
    let key = SubsetKey { service: service_key("ns/h"), name: "v1".into() };
    let subset = Subset { key, workloads: [model::WorkloadUid("w".into())].into() };
    let one = |version: &str, value: &[u8]| {
        let one = resource(Kind::Routes, "ns/h", version, value.to_vec());
        response(Kind::Routes, vec![one], &[])
    };
    let closed = |changes: &[Change]| matches!(changes, [Change::SetRoutes(r)] if r.sets.len() == 1 && r.sets[0].ports.is_empty());
    // Also what is of another type is closed: the name says what it is for.
    let mut odd = one("1", &readable);
    odd.resources[0].resource = None;
    for response in [odd, one("1", &[0xff])] {
        let batch = waypoint().handle(response);
        assert!(closed(&batch.changes) && batch.refused.len() == 1, "{batch:?}");
    }
    let batch = client.handle(one("1", &[0xff]));
    let mut snapshot = Snapshot::default().with(batch.changes);
    let bad = resource(Kind::Subset, "ns/h/v1", "1", vec![0xff]);
    let batch = client.handle(response(Kind::Subset, vec![bad], &[]));
    assert!(matches!(&batch.changes[..], [Change::SetSubset(s)] if s.workloads.is_empty()));
    snapshot = snapshot.with(batch.changes);

    // They stay closed over a restart, and the control plane is asked for them again.
    let mut next = waypoint();
    let (changes, unreadable) = next.restore(client.held().save(&snapshot));
    assert_eq!((changes.len(), unreadable.len()), (2, 0));
    let requests = next.connect();
    let asked = |kind: Kind, name: &str| {
        let of = requests.iter().find(|r| r.type_url == kind.type_url()).unwrap();
        of.initial_resource_versions[name].clone()
    };
    assert_eq!((asked(Kind::Routes, "ns/h"), asked(Kind::Subset, "ns/h/v1")), Default::default());

    // A readable version opens them; then an unreadable one changes nothing; a removal takes them away.
    for client in [&mut client, &mut next] {
        let batch = client.handle(one("2", &readable));
        assert!(matches!(&batch.changes[..], [Change::SetRoutes(r)] if **r == routes));
        assert_eq!(client.handle(one("3", &[0xff])).changes.len(), 0);
        let batch = client.handle(response(Kind::Routes, Vec::new(), &["ns/h"]));
        assert!(matches!(&batch.changes[..], [Change::RemoveRoutes(k)] if *k == routes.service));
        let value = codec::encode_subset(&subset).encode_to_vec();
        let good = resource(Kind::Subset, "ns/h/v1", "2", value);
        let batch = client.handle(response(Kind::Subset, vec![good], &[]));
        assert!(matches!(&batch.changes[..], [Change::SetSubset(s)] if **s == subset));
        let batch = client.handle(response(Kind::Subset, Vec::new(), &["ns/h/v1"]));
        assert!(matches!(&batch.changes[..], [Change::RemoveSubset(k)] if *k == subset.key));
    }
}

#[test]
fn synced_is_when_everything_that_decides_was_answered() {
    let check = |kinds: &'static [Kind], decides: &[Kind]| {
        let mut client = client().asking_for(kinds);
        let _ = client.connect();
        for kind in decides {
            assert!(!client.is_synced(), "{kinds:?} before {kind}");
            let _ = client.handle(response(*kind, Vec::new(), &[]));
        }
        assert!(client.is_synced(), "{kinds:?}");
    };
    check(&Kind::OF_ISTIO, &Kind::OF_ISTIO);
    check(&Kind::OF_NODE, &[Kind::Authorization, Kind::Address]);
    let decides = [Kind::Authorization, Kind::Routes, Kind::Subset, Kind::Address];
    check(&Kind::OF_WAYPOINT, &decides);
}

#[test]
fn foreign_types_are_refused() {
    // A node's proxy asks for no routes.
    let batch = client().handle(response(Kind::Routes, Vec::new(), &[]));
    assert_eq!(
        batch.refused[0].to_string(),
        "response: type_url: \"type.googleapis.com/ambit.v1.Routes\" was not asked for"
    );
    let mut client = client();
    let foreign = DeltaDiscoveryResponse {
        type_url: "x/y".to_owned(),
        nonce: "n".to_owned(),
        ..Default::default()
    };
    let answers = client.handle(foreign).receipt.answers();
    assert_eq!(answers[0].type_url, "x/y");
    assert!(answers[0].error_detail.is_some());
}

#[test]
fn pauses_grow_and_end() {
    let mut client = client();
    let pauses: Vec<_> = (0..40).map(|_| client.retry_in(u64::MAX).as_millis()).collect();
    assert!(pauses[0] >= 5 && pauses[0] <= 10, "{}", pauses[0]);
    assert!(pauses.iter().all(|p| *p <= 15_000));
    assert!(pauses[39] >= 7_500);
    let _ = client.handle(response(Kind::Address, Vec::new(), &[]));
    assert!(client.retry_in(0).as_millis() <= 10);
}

/// A destination that is not known is reached in plaintext: one that cannot be read must not be unknown.
#[test]
fn an_unreadable_new_workload_is_closed() {
    let mut client = client();
    let send = |client: &mut Client, version: &str, value: Vec<u8>| {
        let one = resource(Kind::Address, "w", version, value);
        client.handle(response(Kind::Address, vec![one], &[]))
    };
    let mut strange = codec::encode_workload(&Workload::named("w", "ns", "w"));
    let Some(crate::workload::address::Type::Workload(w)) = &mut strange.r#type else { panic!() };
    w.tunnel_protocol = 7;
    w.addresses = vec![vec![10, 0, 0, 1].into()];
    let batch = send(&mut client, "1", strange.encode_to_vec());
    let closed = |changes: &[Change]| {
        matches!(changes, [Change::SetWorkload(w)]
            if w.protocol == model::TunnelProtocol::Unreadable && w.addresses.len() == 1)
    };
    assert!(closed(&batch.changes), "{batch:?}");
    assert_eq!(batch.refused.len(), 1);

    // It is still closed after a restart, and the control plane is asked for it again.
    let snapshot = Snapshot::default().with(batch.changes);
    let saved: Vec<_> = client.held().save(&snapshot).collect();
    let mut next = self::client();
    let (changes, unreadable) = next.restore(saved);
    assert!(closed(&changes), "{changes:?}");
    assert_eq!(unreadable.len(), 1);
    let requests = next.connect();
    assert_eq!(requests[Kind::Address.index()].initial_resource_versions["w"], "");

    // A readable version opens it; then an unreadable one changes nothing; a removal takes it away.
    let batch = send(&mut client, "2", workload("w"));
    assert!(
        matches!(&batch.changes[..], [Change::SetWorkload(w)] if w.protocol == model::TunnelProtocol::None)
    );
    assert_eq!(send(&mut client, "3", strange.encode_to_vec()).changes.len(), 0);
    let batch = next.handle(response(Kind::Address, Vec::new(), &["w"]));
    assert!(matches!(&batch.changes[..], [Change::RemoveWorkload(_)]));
}
