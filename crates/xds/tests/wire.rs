//! The messages on the wire, byte for byte, against fixtures in `tests/wire/` that were written from Istio's field
//! numbers and not from our `.proto` files: a field that is renumbered, retyped or forgotten cannot pass.
//!
//! Both directions: the bytes decode to the value, and the value encodes to the bytes. What a newer control plane may
//! add is checked on the same bytes: unknown fields of workloads and services are skipped, everything that could
//! change who may talk to whom is refused.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests: what does not parse is a broken fixture"
)]

use std::net::IpAddr;
use std::sync::Arc;

use model::{
    Action, AppProtocol, ApplicationTunnel, FamilyPolicy, GatewayAddress, GatewayDestination,
    Health, HealthPolicy, IpPrefix, LoadBalancing, Locality, LocalityScope, Match, NetworkAddress,
    NetworkMode, Policy, PolicyKey, Provenance, RoutingMode, Rule, Scope, Service, ServiceKey,
    ServicePort, Str, StringMatch, TunnelProtocol, Vip, Workload, WorkloadKind, WorkloadUid,
};
use prost::Message;
use xds::any::Any;
use xds::codec::{self, Address, DecodeError, Defaults, Interner};
use xds::{ca, discovery, zds};

#[path = "wire/routes.rs"]
mod routes;

/// Reads a fixture: hex bytes, text in quotes, comments behind `#`.
fn bytes(fixture: &str) -> Vec<u8> {
    let mut out = Vec::new();
    for line in fixture.lines() {
        let mut rest = line.trim_start();
        while !rest.is_empty() && !rest.starts_with('#') {
            if let Some(text) = rest.strip_prefix('"') {
                let (text, after) = text.split_once('"').unwrap();
                out.extend_from_slice(text.as_bytes());
                rest = after.trim_start();
            } else {
                let (byte, after) = rest.split_once(' ').unwrap_or((rest, ""));
                out.push(u8::from_str_radix(byte, 16).unwrap());
                rest = after.trim_start();
            }
        }
    }
    out
}

fn defaults() -> Defaults {
    Defaults { trust_domain: "mesh.default".into() }
}

fn decode(name: &str, value: &[u8]) -> Result<Address, DecodeError> {
    codec::decode_address(name, value, &defaults(), &mut Interner::default())
}

fn decode_policy(value: &[u8]) -> Result<Policy, DecodeError> {
    codec::decode_authorization("shop/only-front", value, &mut Interner::default())
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn key(hostname: &str) -> ServiceKey {
    ServiceKey { namespace: "shop".into(), hostname: hostname.into() }
}

fn policy_key(name: &str) -> PolicyKey {
    PolicyKey { namespace: "shop".into(), name: name.into() }
}

fn port(service_port: u16, target_port: u16, app_protocol: AppProtocol) -> ServicePort {
    ServicePort { service_port, target_port, app_protocol }
}

const WORKLOAD: &str = include_str!("wire/workload.txt");
const SERVICE: &str = include_str!("wire/service.txt");
const AUTHORIZATION: &str = include_str!("wire/authorization.txt");
const UID: &str = "east//Pod/shop/web-7d9f";

/// What `wire/workload.txt` says.
fn workload() -> Workload {
    let web: Arc<[ServicePort]> = [port(80, 8080, AppProtocol::Http11)].into();
    let web2: Arc<[ServicePort]> =
        [port(443, 8443, AppProtocol::Grpc), port(9000, 9000, AppProtocol::Unknown)].into();
    let destination =
        GatewayDestination::Address(NetworkAddress { network: "net2".into(), ip: ip("192.0.2.9") });
    Workload {
        uid: WorkloadUid(UID.into()),
        name: "web-7d9f".into(),
        namespace: "shop".into(),
        cluster: "east".into(),
        network: "net1".into(),
        trust_domain: "td.example".into(),
        service_account: "web".into(),
        addresses: [ip("10.10.1.7"), ip("fd00:10::7")].into(),
        hostname: "web.example".into(),
        node: "node-1".into(),
        protocol: TunnelProtocol::Hbone,
        native_tunnel: true,
        application_tunnel: Some(ApplicationTunnel { proxy_protocol: true, port: Some(15099) }),
        locality: Locality {
            region: Some("eu".into()),
            zone: Some("eu-1".into()),
            subzone: Some("rack-4".into()),
        },
        health: Health::Unhealthy,
        network_mode: NetworkMode::HostNetwork,
        capacity: 300,
        canonical_name: "web".into(),
        canonical_revision: "v1".into(),
        workload_name: "web".into(),
        workload_kind: WorkloadKind::Pod,
        waypoint: Some(GatewayAddress {
            destination: GatewayDestination::Service(key("wp.shop")),
            hbone_port: 15008,
        }),
        network_gateway: Some(GatewayAddress { destination, hbone_port: 15443 }),
        services: [(key("web.shop.svc"), web), (key("web2.shop.svc"), web2)].into(),
        policies: [policy_key("only-front"), policy_key("strict")].into(),
    }
}

/// What `wire/service.txt` says.
fn service() -> Service {
    let vip = |network: &str, address: &str, prefix| Vip {
        network: network.into(),
        ip: ip(address),
        prefix,
    };
    Service {
        key: key("web.shop.svc"),
        name: "web".into(),
        vips: [
            vip("net1", "10.96.0.10", 32),
            vip("net1", "240.240.0.0", 16),
            vip("", "fd00:96::10", 128),
        ]
        .into(),
        ports: [port(80, 8080, AppProtocol::Http2), port(5432, 0, AppProtocol::Unknown)].into(),
        subject_alt_names: ["spiffe://td.example/ns/shop/sa/egress".into()].into(),
        waypoint: Some(GatewayAddress {
            destination: GatewayDestination::Service(key("wp.shop")),
            hbone_port: 15008,
        }),
        load_balancing: LoadBalancing {
            mode: RoutingMode::Failover,
            preference: [
                LocalityScope::Network,
                LocalityScope::Region,
                LocalityScope::Zone,
                LocalityScope::Subzone,
                LocalityScope::Node,
                LocalityScope::Cluster,
            ]
            .into(),
            health: HealthPolicy::AllowAll,
        },
        families: FamilyPolicy::Dual,
    }
}

/// What `wire/authorization.txt` says.
fn policy() -> Policy {
    let prefix = |address: &str, length| IpPrefix { ip: ip(address), length };
    let account = |name: &str| -> (Str, Str) { ("shop".into(), name.into()) };
    let one = Match {
        namespaces: vec![StringMatch::Exact("shop".into()), StringMatch::Prefix("dev-".into())],
        not_namespaces: vec![StringMatch::Suffix("-test".into())],
        service_accounts: vec![account("front")],
        not_service_accounts: vec![account("batch")],
        principals: vec![StringMatch::Exact("td.example/ns/shop/sa/front".into())],
        not_principals: vec![StringMatch::Presence],
        source_ips: vec![prefix("10.0.0.0", 8)],
        not_source_ips: vec![prefix("10.1.0.0", 16)],
        destination_ips: vec![prefix("fd00::", 64)],
        not_destination_ips: vec![prefix("fd00::1", 128)],
        destination_ports: vec![80, 443],
        not_destination_ports: vec![8080],
    };
    let rule = |clauses| Rule { clauses, provenance: Provenance::default() };
    Policy {
        key: policy_key("only-front"),
        scope: Scope::WorkloadSelector,
        action: Action::Deny,
        rules: [rule(vec![vec![one, Match::default()], vec![]]), rule(vec![])].into(),
        dry_run: true,
        provenance: Provenance::default(),
    }
}

#[test]
fn workloads() {
    let wire = bytes(WORKLOAD);
    assert_eq!(decode(UID, &wire), Ok(Address::Workload(Arc::new(workload()))));
    assert_eq!(codec::encode_workload(&workload()).encode_to_vec(), wire);
}

#[test]
fn services() {
    let wire = bytes(SERVICE);
    let want = Address::Service(Arc::new(service()));
    assert_eq!(decode("shop/web.shop.svc", &wire), Ok(want));
    assert_eq!(codec::encode_service(&service()).encode_to_vec(), wire);
}

#[test]
fn policies() {
    let wire = bytes(AUTHORIZATION);
    assert_eq!(decode_policy(&wire), Ok(policy()));
    assert_eq!(codec::encode_policy(&policy()).encode_to_vec(), wire);
}

/// A message that can be compared in both directions.
fn both<M: Message + Default + PartialEq + std::fmt::Debug>(fixture: &str, message: &M) {
    let wire = bytes(fixture);
    assert_eq!(&M::decode(&wire[..]).unwrap(), message);
    assert_eq!(message.encode_to_vec(), wire);
}

fn text_struct(key: &str, value: &str) -> prost_types::Struct {
    let kind = Some(prost_types::value::Kind::StringValue(value.to_owned()));
    prost_types::Struct { fields: [(key.to_owned(), prost_types::Value { kind })].into() }
}

#[test]
fn certificate_calls() {
    let id = "spiffe://td.example/ns/shop/sa/web";
    both(
        include_str!("wire/certificate_request.txt"),
        &ca::IstioCertificateRequest {
            csr: "-----BEGIN CERTIFICATE REQUEST-----".to_owned(),
            validity_duration: 86_400,
            metadata: Some(text_struct(xds::IMPERSONATED_IDENTITY, id)),
        },
    );
    both(
        include_str!("wire/certificate_response.txt"),
        &ca::IstioCertificateResponse {
            cert_chain: ["leaf", "intermediate", "root"].map(str::to_owned).to_vec(),
        },
    );
}

#[test]
fn discovery_calls() {
    both(
        include_str!("wire/delta_request.txt"),
        &discovery::DeltaDiscoveryRequest {
            node: Some(discovery::Node {
                id: "ztunnel~10.0.0.1~z.sys~sys".to_owned(),
                cluster: "ztunnel".to_owned(),
                metadata: Some(text_struct("NODE_NAME", "node-1")),
            }),
            type_url: xds::Kind::Address.type_url().to_owned(),
            resource_names_subscribe: vec!["*".to_owned()],
            resource_names_unsubscribe: vec!["a/b".to_owned()],
            initial_resource_versions: [("shop/web".to_owned(), "7".to_owned())].into(),
            response_nonce: "n1".to_owned(),
            error_detail: Some(discovery::Status {
                code: 3,
                message: "no".to_owned(),
                details: vec![],
            }),
        },
    );
    let type_url = xds::Kind::Authorization.type_url().to_owned();
    both(
        include_str!("wire/delta_response.txt"),
        &discovery::DeltaDiscoveryResponse {
            system_version_info: "v".to_owned(),
            resources: vec![discovery::Resource {
                version: "7".to_owned(),
                resource: Some(Any { type_url: type_url.clone(), value: b"\x0a\x01p"[..].into() }),
                name: "ns/p".to_owned(),
                aliases: vec!["x".to_owned()],
            }],
            type_url,
            nonce: "n2".to_owned(),
            removed_resources: vec!["ns/q".to_owned()],
        },
    );
}

#[test]
fn node_agent_calls() {
    use zds::workload_request::Payload;
    let request = |payload| zds::WorkloadRequest { payload: Some(payload) };
    let info = zds::WorkloadInfo {
        name: "web".to_owned(),
        namespace: "shop".to_owned(),
        service_account: "web".to_owned(),
    };
    both(
        include_str!("wire/zds_add.txt"),
        &request(Payload::Add(zds::AddWorkload {
            uid: "u1".to_owned(),
            workload_info: Some(info),
        })),
    );
    // The uid of `del` is field 2, the others' field 1.
    let uid = || "u1".to_owned();
    both("12 04  12 02 \"u1\"", &request(Payload::Del(zds::DelWorkload { uid: uid() })));
    both("2a 04  0a 02 \"u1\"", &request(Payload::Keep(zds::KeepWorkload { uid: uid() })));
    both("1a 00", &request(Payload::SnapshotSent(zds::SnapshotSent {})));
    both("08 01", &zds::ZdsHello { version: zds::Version::V1.into() });
    let ack = |error: &str| zds::WorkloadResponse {
        payload: Some(zds::workload_response::Payload::Ack(zds::Ack { error: error.to_owned() })),
    };
    both("0a 00", &ack(""));
    both("0a 04  0a 02 \"no\"", &ack("no"));
}

/// Fields that do not exist today, one of each wire type: varint, 64 bit, length, 32 bit. Number 1000.
const OF_THE_FUTURE: [&str; 4] =
    ["c0 3e 05", "c1 3e 01 02 03 04 05 06 07 08", "c2 3e 01 ff", "c5 3e 01 02 03 04"];

/// `field` (a tag of one byte) around `inner`.
fn nest(tag: u8, inner: &[u8]) -> Vec<u8> {
    let mut out = vec![tag];
    prost::encode_length_delimiter(inner.len(), &mut out).unwrap();
    out.extend_from_slice(inner);
    out
}

#[test]
fn unknown_fields_of_workloads_and_services_are_skipped() {
    let plain = bytes("0a 03  a2 01 00"); // A workload with an empty uid, for the shape only.
    assert!(decode("", &plain).is_err(), "a workload without a name");
    for future in OF_THE_FUTURE.map(bytes) {
        let inside = |tag: u8, wire: &[u8], header: usize| {
            let mut with = nest(tag, &[&wire[header..], &future].concat());
            // And beside the oneof.
            with.extend_from_slice(&future);
            with
        };
        // Tag and a length of two bytes come first.
        let with = inside(0x0a, &bytes(WORKLOAD), 3);
        assert_eq!(decode(UID, &with), Ok(Address::Workload(Arc::new(workload()))));
        let with = inside(0x12, &bytes(SERVICE), 3);
        assert_eq!(decode("shop/web.shop.svc", &with), Ok(Address::Service(Arc::new(service()))));
    }
}

#[test]
fn unknown_fields_of_policies_close() {
    for future in OF_THE_FUTURE.map(bytes) {
        let wire = [bytes(AUTHORIZATION), future.clone()].concat();
        let error = decode_policy(&wire).unwrap_err();
        assert_eq!(
            error.to_string(),
            "shop/only-front: Authorization: has fields that this proxy does not know"
        );
        // ns shop, name only-front, a rule that holds only what nobody knows: an ALLOW that must not allow.
        let head = bytes("0a 0a \"only-front\" 12 04 \"shop\" 18 01 20 00");
        let rules = nest(0x2a, &nest(0x0a, &nest(0x12, &future)));
        let wire = [head, rules].concat();
        assert!(decode_policy(&wire).is_err());
        let interner = &mut Interner::default();
        let closed = codec::closed_stand_in("shop/only-front", &wire, interner).unwrap();
        assert_eq!((closed.action, closed.rules.len()), (Action::Allow, 0), "allows nobody");
    }
}

/// A workload and a service of few fields, each followed by `fields`.
fn with(kind: &str, fields: &str) -> Result<Address, DecodeError> {
    let (tag, name, head) = match kind {
        "workload" => (0x0a, "u", "1a 04 0a 00 00 01  a2 01 01 \"u\""),
        _ => (0x12, "n/h", "12 01 \"n\" 1a 01 \"h\"  22 06 12 04 0a 60 00 01"),
    };
    decode(name, &nest(tag, &bytes(&format!("{head} {fields}"))))
}

#[test]
fn unknown_values_that_could_open_something_are_refused() {
    let check = |kind, fields, field: &str| {
        let error = with(kind, fields).unwrap_err();
        assert_eq!(error.field, field, "{fields}");
        assert!(error.problem.ends_with("is not known to this proxy"), "{}", error.problem);
    };
    check("workload", "28 03", "tunnel_protocol");
    check("workload", "88 01 02", "status");
    check("workload", "c8 01 02", "network_mode");
    check("workload", "ba 01 02 08 02", "application_tunnel.protocol");
    // Enums are signed: ten bytes for -1.
    check("workload", "28 ff ff ff ff ff ff ff ff ff 01", "tunnel_protocol");
    check("service", "42 03 0a 01 07", "load_balancing.routing_preference");
    check("service", "42 02 10 04", "load_balancing.mode");
    check("service", "42 02 18 02", "load_balancing.health_policy");
    check("service", "48 04", "ip_families");
    for (scope, action, field) in [("03", "00", "scope"), ("00", "02", "action")] {
        let text = format!("0a 0a \"only-front\" 12 04 \"shop\" 18 {scope} 20 {action}");
        let got = decode_policy(&bytes(&text));
        // Defaults that are written out are refused as well: not what an encoder writes.
        assert!(got.is_err(), "{field}");
    }
    let scope = decode_policy(&bytes("0a 0a \"only-front\" 12 04 \"shop\" 18 03"));
    assert_eq!(scope.unwrap_err().field, "scope");
    let action = decode_policy(&bytes("0a 0a \"only-front\" 12 04 \"shop\" 20 02"));
    assert_eq!(action.unwrap_err().field, "action");
}

#[test]
fn unknown_values_that_only_describe_are_taken_as_plain() {
    let Ok(Address::Workload(w)) = with("workload", "60 09 b2 01 09 0a 03 \"n/h\" 12 02 0a 00")
    else {
        panic!("workload_type 9")
    };
    assert_eq!(w.workload_kind, WorkloadKind::Pod);
    let Ok(Address::Service(s)) = with("service", "2a 04 08 50 18 09") else {
        panic!("app_protocol 9")
    };
    assert_eq!(s.ports[..], [port(80, 0, AppProtocol::Unknown)]);
}

/// An address that nobody knows is passed through in plaintext: what cannot be read must stay known.
#[test]
fn what_is_refused_keeps_its_addresses_closed() {
    let closed = |name: &str, wire: &[u8]| {
        codec::closed_address(name, wire, &defaults(), &mut Interner::default())
    };
    let wire = nest(0x0a, &bytes("1a 04 0a 00 00 01 1a 03 01 02 03 28 03 a2 01 01 \"u\""));
    let Some(Address::Workload(w)) = closed("u", &wire) else { panic!("no workload") };
    assert_eq!((w.protocol, &w.addresses[..]), (TunnelProtocol::Unreadable, &[ip("10.0.0.1")][..]));
    // On disk and back it is what it was.
    let saved = codec::encode_workload(&w).encode_to_vec();
    assert!(decode("u", &saved).is_err());
    assert_eq!(closed("u", &saved), Some(Address::Workload(w)));

    let wire =
        nest(0x12, &bytes("12 01 \"n\" 1a 01 \"h\" 22 06 12 04 0a 60 00 01 2a 02 08 50 48 04"));
    let Some(Address::Service(s)) = closed("n/h", &wire) else { panic!("no service") };
    assert_eq!((s.vips[0].ip, s.ports.len()), (ip("10.96.0.1"), 0));
    // Another's name must not close its addresses, and garbage has none.
    assert_eq!(closed("n/other", &wire), None);
    assert_eq!(closed("u", &[0xff]), None);
}
