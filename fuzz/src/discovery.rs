//! What a control plane sends to a proxy, and a proxy to its control plane.

use std::sync::Arc;

use model::{Action, Rule, Service, Snapshot, TunnelProtocol, Workload};
use prost::Message;
use xds::client::Client;
use xds::codec::{self, Address, Defaults, Interner};
use xds::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node};
use xds::server::{Connection, Resources};
use xds::{security, workload as wire};

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

/// A stream of responses for the proxy's half and of requests for the server's. The first byte of a message says which,
/// two more its length.
pub fn delta(data: &[u8]) {
    let mut client = Client::new(Node::default(), defaults());
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
            _ => assert_eq!(client.connect().len(), xds::Kind::ALL.len()),
        }
    }
    restart(&client, &snapshot);
}

fn desired() -> Resources {
    let workload = Workload::named("c//Pod/ns/w", "ns", "w");
    let service = Service {
        key: model::ServiceKey { namespace: "ns".into(), hostname: "s".into() },
        name: "s".into(),
        vips: Arc::new([]),
        ports: Arc::new([]),
        subject_alt_names: Arc::new([]),
        waypoint: None,
        load_balancing: model::LoadBalancing::default(),
        families: model::FamilyPolicy::default(),
    };
    Resources::new(model::ConfigVersion { epoch: 1, number: 1 }, [&workload], [&service], [])
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
    let mut next = Client::new(Node::default(), defaults());
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
    let mut all: Vec<_> = workloads.chain(services).chain(policies).collect();
    all.sort();
    all
}
