//! What a pod asks by DNS, and what its resolver answers.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use engine::DnsAnswer;
use hickory_proto::op::Message;
use model::{FamilyPolicy, LoadBalancing, Service, ServiceKey};
use ztunnel::dns::wire::{self, Asked, Read};

use crate::planted;

/// Longest name in text, by the DNS specification.
const MAX_NAME: usize = 253;

/// A pod's message and its resolver's: a byte that says how many addresses there are, two for the length of the first.
pub fn dns(data: &[u8]) {
    let Some(([count, high, low], rest)) = data.split_first_chunk::<3>() else { return };
    let length = usize::from(u16::from_be_bytes([*high, *low]));
    let (packet, reply) = rest.split_at(length.min(rest.len()));
    match wire::read(packet) {
        Read::Ignore => {}
        Read::Forward => failure(packet),
        Read::Addresses(asked) => {
            failure(packet);
            addresses(packet, &asked, usize::from(*count));
        }
    }
    if let Some(name) = wire::question_name(packet) {
        assert!(name.len() <= 4 * (MAX_NAME + 2), "a name must not fill the log");
        assert!(wire::question_type(packet).is_some());
    }
    if wire::is_answer(packet, reply) {
        assert!(reply.len() >= 12 && packet.get(..2) == reply.get(..2));
    }
}

/// "The resolver did not answer" is an answer to what was asked, whatever that was.
fn failure(packet: &[u8]) {
    if let Some(bytes) = wire::failure(packet) {
        assert!(wire::is_answer(packet, &bytes), "{packet:02x?}: {bytes:02x?}");
    }
}

fn addresses(packet: &[u8], asked: &Asked, count: usize) {
    let host = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_.".contains(c);
    assert!(asked.name.len() <= MAX_NAME && asked.name.chars().all(host), "{:?}", asked.name);
    planted::asked(&asked.name, asked.ipv6);
    let service = service();
    let ip: IpAddr =
        if asked.ipv6 { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
    let some = DnsAnswer::Addresses {
        service: service.clone(),
        addresses: vec![ip; count],
        of_pods: count % 2 == 0,
    };
    for (answer, count) in [(some, count), (DnsAnswer::NoData { service }, 0)] {
        for limit in [None, Some(wire::MAX_MESSAGE)] {
            let bytes = wire::answer(asked, &answer, "cluster.local", limit);
            // A question without an address to tell is for the resolver.
            let Some(bytes) = bytes else { continue };
            assert!(bytes.len() <= wire::MAX_MESSAGE);
            assert!(wire::is_answer(packet, &bytes), "{packet:02x?}: {bytes:02x?}");
            let read = Message::from_vec(&bytes).expect("clients can read what we write");
            assert_eq!(read.metadata.truncation, read.answers.len() < count);
        }
    }
}

fn service() -> Arc<Service> {
    Arc::new(Service {
        key: ServiceKey { namespace: "shop".into(), hostname: "web.shop.svc.cluster.local".into() },
        name: "web".into(),
        vips: Arc::new([]),
        ports: Arc::new([]),
        subject_alt_names: Arc::new([]),
        waypoint: None,
        load_balancing: LoadBalancing::default(),
        families: FamilyPolicy::default(),
    })
}
