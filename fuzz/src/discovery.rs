//! What a control plane sends to a proxy, and a proxy to its control plane.

use std::sync::Arc;

use model::http::{Filter, RouteMatch, ServiceRoutes, Subset, SubsetKey};
use model::{Action, Reason, Rule, Service, ServiceKey, Snapshot, TunnelProtocol, Workload};
use prost::Message;
use xds::client::Client;
use xds::codec::{self, Address, Defaults, Interner};
use xds::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node};
use xds::server::{Connection, Mesh, Resources};
use xds::{Kind, ambit, security, workload as wire};

use crate::planted;

fn defaults() -> Defaults {
    Defaults { trust_domain: "cluster.local".into() }
}

/// A workload or a service.
pub fn address(data: &[u8]) {
    let interner = &mut Interner::default();
    // The name that fits, since the codec refuses every other at once.
    let name = match wire::Address::decode(data).ok().and_then(|a| a.r#type) {
        Some(wire::address::Type::Workload(w)) => w.uid,
        Some(wire::address::Type::Service(s)) => format!("{}/{}", s.namespace, s.hostname),
        None => "ns/name".to_owned(),
    };
    match codec::decode_address(&name, data, &defaults(), interner) {
        Ok(Address::Workload(w)) => {
            let wire = codec::encode_workload(&w).encode_to_vec();
            let again = codec::decode_address(&name, &wire, &defaults(), interner);
            planted::workload(&w);
            assert_eq!(again, Ok(Address::Workload(w)));
        }
        Ok(Address::Service(s)) => {
            let wire = codec::encode_service(&s).encode_to_vec();
            let again = codec::decode_address(&name, &wire, &defaults(), interner);
            assert_eq!(again, Ok(Address::Service(s)));
        }
        Err(error) => {
            assert!(error.to_string().len() < 16 << 10, "a control plane must not fill the log");
            // What cannot be read opens nothing.
            match codec::closed_address(&name, data, &defaults(), interner) {
                Some(Address::Workload(w)) => {
                    assert_eq!(w.protocol, TunnelProtocol::Unreadable);
                }
                Some(Address::Service(s)) => assert!(s.ports.is_empty()),
                None => {}
            }
        }
    }
}

/// A policy.
pub fn authorization(data: &[u8]) {
    let interner = &mut Interner::default();
    let name = match security::Authorization::decode(data) {
        Ok(p) => format!("{}/{}", p.namespace, p.name),
        Err(_) => "ns/name".to_owned(),
    };
    match codec::decode_authorization(&name, data, interner) {
        Ok(policy) => {
            let wire = codec::encode_policy(&policy).encode_to_vec();
            planted::policy(&policy);
            assert_eq!(codec::decode_authorization(&name, &wire, interner), Ok(policy));
        }
        Err(_) => {
            let Some(closed) = codec::closed_stand_in(&name, data, interner) else { return };
            // Allows nobody, or denies everybody.
            match closed.action {
                Action::Allow => assert!(closed.rules.is_empty()),
                Action::Deny => assert_eq!(closed.rules[..], [Rule::default()]),
            }
        }
    }
}

/// What a waypoint knows about a Service: the bytes as routes, and as a subset.
pub fn routes(data: &[u8]) {
    let interner = &mut Interner::default();
    let named = |service: Option<ambit::ServiceName>| match service {
        Some(service) => format!("{}/{}", service.namespace, service.hostname),
        None => "ns/name".to_owned(),
    };
    let name = ambit::Routes::decode(data).map_or_else(|_| named(None), |r| named(r.service));
    match codec::decode_routes(&name, data, interner) {
        Ok(routes) => {
            let wire = codec::encode_routes(&routes).encode_to_vec();
            assert_eq!(codec::decode_routes(&name, &wire, interner).as_ref(), Ok(&routes));
            planted::routes(&routes);
        }
        Err(error) => {
            assert!(error.to_string().len() < 16 << 10, "a control plane must not fill the log");
            if let Some(closed) = codec::closed_routes(&name, interner) {
                assert!(answers_every_request_with_an_error(&closed), "{closed:?}");
            }
        }
    }
    let name = ambit::Subset::decode(data).map_or_else(
        |_| "ns/name/subset".to_owned(),
        |s| format!("{}/{}", named(s.service), s.name),
    );
    match codec::decode_subset(&name, data, interner) {
        Ok(subset) => {
            let wire = codec::encode_subset(&subset).encode_to_vec();
            assert_eq!(codec::decode_subset(&name, &wire, interner), Ok(subset));
        }
        Err(error) => {
            assert!(error.to_string().len() < 16 << 10, "a control plane must not fill the log");
            let closed = codec::closed_subset(&name, interner);
            assert!(closed.is_none_or(|subset| subset.workloads.is_empty()));
        }
    }
}

fn answers_every_request_with_an_error(routes: &ServiceRoutes) -> bool {
    let [set] = &routes.sets[..] else { return false };
    let [rule] = &set.rules[..] else { return false };
    set.ports.is_empty()
        && set.matches[..] == [RouteMatch::default()]
        && matches!(rule.filters[..], [Filter::Fail { reason: Reason::Unsupported, .. }])
}

/// A waypoint asks for more than a node's proxy.
fn waypoint() -> Client {
    Client::new(Node::default(), defaults()).asking_for(&Kind::OF_WAYPOINT)
}

/// A stream of responses for the proxy's half and of requests for the server's. The first byte of a message says which,
/// two more its length.
pub fn delta(data: &[u8]) {
    let mut client = waypoint();
    let mut server = Connection::new(Arc::new(desired()));
    let mut snapshot = Snapshot::default();
    let _ = client.connect();
    let mut rest = data;
    // A stream of more messages finds nothing that one of this many does not.
    for _ in 0..32 {
        let [which, high, low, after @ ..] = rest else { break };
        let length = usize::from(u16::from_be_bytes([*high, *low])).min(after.len());
        let (message, next) = after.split_at(length);
        rest = next;
        match which % 4 {
            0 | 1 => respond(&mut client, &mut snapshot, message),
            2 => request(&mut server, message),
            // A new stream.
            _ => assert_eq!(client.connect().len(), Kind::OF_WAYPOINT.len()),
        }
    }
    restart(&client, &snapshot);
}

fn desired() -> Resources {
    let workload = Workload::named("c//Pod/ns/w", "ns", "w");
    let key = ServiceKey { namespace: "ns".into(), hostname: "s".into() };
    let routes = ServiceRoutes { service: key.clone(), ports: Arc::new([]), sets: Arc::new([]) };
    let subset = Subset {
        key: SubsetKey { service: key.clone(), name: "v1".into() },
        workloads: [workload.uid.clone()].into(),
    };
    let service = Service {
        key,
        name: "s".into(),
        vips: Arc::new([]),
        ports: Arc::new([]),
        subject_alt_names: Arc::new([]),
        waypoint: None,
        load_balancing: model::LoadBalancing::default(),
        families: model::FamilyPolicy::default(),
    };
    let push = model::ConfigVersion { epoch: 1, number: 1 };
    let mesh = Mesh {
        workloads: &[Arc::new(workload)],
        services: &[Arc::new(service)],
        policies: &[],
        routes: &[Arc::new(routes)],
        subsets: &[Arc::new(subset)],
    };
    Resources::new(push, mesh)
}

fn respond(client: &mut Client, snapshot: &mut Snapshot, message: &[u8]) {
    let Ok(response) = DeltaDiscoveryResponse::decode(message) else { return };
    let batch = client.handle(response);
    planted::batch(&batch.changes);
    *snapshot = snapshot.with(batch.changes);
    // Every response is answered, or the server waits for ever.
    assert!(!batch.receipt.answers().is_empty());
}

fn request(server: &mut Connection, message: &[u8]) {
    let Ok(request) = DeltaDiscoveryRequest::decode(message) else { return };
    if server.request(request).is_err() {
        return;
    }
    // A request makes a few responses, never an endless stream of them.
    let sent = (0..64).map_while(|_| server.next_response()).count();
    assert!(sent < 64, "the server has no end");
}

/// What was in force comes back from the disk as it was.
fn restart(client: &Client, snapshot: &Snapshot) {
    let saved: Vec<_> = client.held().save(snapshot).collect();
    let mut next = waypoint();
    let (changes, unreadable) = next.restore(saved);
    let restored = Snapshot::default().with(changes);
    let closed = snapshot.workloads().filter(|w| w.protocol == TunnelProtocol::Unreadable).count();
    assert_eq!(unreadable.len(), closed, "only what stood in for the unreadable is unreadable");
    assert_eq!(on_the_wire(&restored), on_the_wire(snapshot));
}

/// Everything in a snapshot, in an order. Without provenance: what stands in for an unreadable policy says why, and does
/// not say so after a restart.
fn on_the_wire(snapshot: &Snapshot) -> Vec<Vec<u8>> {
    let workloads = snapshot.workloads().map(|w| codec::encode_workload(w).encode_to_vec());
    let services = snapshot.services().map(|s| codec::encode_service(s).encode_to_vec());
    let policies = snapshot.policies().map(|p| codec::encode_policy(p).encode_to_vec());
    let routes = snapshot.all_routes().map(|r| codec::encode_routes(r).encode_to_vec());
    let subsets = snapshot.subsets().map(|s| codec::encode_subset(s).encode_to_vec());
    let known = workloads.chain(services).chain(policies);
    let mut all: Vec<_> = known.chain(routes).chain(subsets).collect();
    all.sort();
    all
}
