//! Encode and decode are inverse; messages that mean nothing are refused.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use model::*;
use proptest::collection::vec;
use proptest::prelude::*;
use prost::Message;

use super::*;
use crate::{ca, security, workload as wire};

fn defaults() -> Defaults {
    Defaults { trust_domain: "mesh.example".into() }
}

fn word() -> impl Strategy<Value = Str> {
    "[a-z][a-z0-9-]{0,8}".prop_map(Into::into)
}

fn words() -> impl Strategy<Value = Str> {
    prop_oneof![Just(Str::from("")), word()]
}

fn ip() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        any::<u32>().prop_map(|b| IpAddr::V4(Ipv4Addr::from_bits(b))),
        any::<u128>().prop_map(|b| IpAddr::V6(Ipv6Addr::from_bits(b))),
    ]
}

fn prefixed() -> impl Strategy<Value = (IpAddr, u8)> {
    (ip(), any::<u8>()).prop_map(|(ip, l)| (ip, l % if ip.is_ipv4() { 33 } else { 129 }))
}

fn service_key() -> impl Strategy<Value = ServiceKey> {
    (word(), word()).prop_map(|(namespace, hostname)| ServiceKey { namespace, hostname })
}

fn port() -> impl Strategy<Value = ServicePort> {
    let app = prop_oneof![
        Just(AppProtocol::Unknown),
        Just(AppProtocol::Http11),
        Just(AppProtocol::Http2),
        Just(AppProtocol::Grpc)
    ];
    (any::<u16>(), any::<u16>(), app).prop_map(|(service_port, target_port, app_protocol)| {
        ServicePort { service_port, target_port, app_protocol }
    })
}

fn ports() -> impl Strategy<Value = Arc<[ServicePort]>> {
    vec(port(), 0..3).prop_map(Into::into)
}

fn gateway() -> impl Strategy<Value = Option<GatewayAddress>> {
    let destination = prop_oneof![
        service_key().prop_map(GatewayDestination::Service),
        (words(), ip())
            .prop_map(|(network, ip)| GatewayDestination::Address(NetworkAddress { network, ip })),
    ];
    proptest::option::of(
        (destination, 1..=u16::MAX)
            .prop_map(|(destination, hbone_port)| GatewayAddress { destination, hbone_port }),
    )
}

fn workload() -> impl Strategy<Value = Workload> {
    let names = (word(), words(), words(), words(), words(), word(), word());
    let more = (words(), words(), words(), words(), proptest::option::of(word()));
    let places = (vec(ip(), 0..3), gateway(), gateway(), 1..u32::MAX, any::<[bool; 4]>());
    let refs = (
        proptest::collection::btree_map(service_key(), ports(), 0..4),
        vec((word(), word()), 0..3),
        proptest::option::of((any::<bool>(), proptest::option::of(1..=u16::MAX))),
        0..4_u8,
    );
    (names, more, places, refs).prop_map(|(names, more, places, refs)| {
        let flags = places.4;
        Workload {
            name: names.1,
            cluster: names.2,
            network: names.3,
            hostname: names.4,
            trust_domain: names.5,
            service_account: names.6,
            node: more.0,
            canonical_name: more.1,
            canonical_revision: more.2,
            workload_name: more.3,
            locality: Locality { region: more.4.clone(), zone: None, subzone: more.4 },
            addresses: places.0.into(),
            waypoint: places.1,
            network_gateway: places.2,
            capacity: places.3,
            native_tunnel: flags[0],
            protocol: if flags[1] { TunnelProtocol::Hbone } else { TunnelProtocol::None },
            health: if flags[2] { Health::Healthy } else { Health::Unhealthy },
            network_mode: if flags[3] { NetworkMode::Standard } else { NetworkMode::HostNetwork },
            services: refs.0.into_iter().collect(),
            policies: refs
                .1
                .into_iter()
                .map(|(namespace, name)| PolicyKey { namespace, name })
                .collect(),
            application_tunnel: refs
                .2
                .map(|(proxy_protocol, port)| ApplicationTunnel { proxy_protocol, port }),
            workload_kind: match refs.3 {
                0 => WorkloadKind::Deployment,
                1 => WorkloadKind::CronJob,
                2 => WorkloadKind::Pod,
                _ => WorkloadKind::Job,
            },
            ..Workload::named(names.0, "ns", "")
        }
    })
}

fn service() -> impl Strategy<Value = Service> {
    let vip = (words(), prefixed()).prop_map(|(network, (ip, prefix))| Vip { network, ip, prefix });
    let scopes = [
        LocalityScope::Region,
        LocalityScope::Zone,
        LocalityScope::Subzone,
        LocalityScope::Node,
        LocalityScope::Cluster,
        LocalityScope::Network,
    ];
    let modes =
        [RoutingMode::Any, RoutingMode::Strict, RoutingMode::Failover, RoutingMode::Passthrough];
    let families = [
        FamilyPolicy::Automatic,
        FamilyPolicy::Ipv4Only,
        FamilyPolicy::Ipv6Only,
        FamilyPolicy::Dual,
    ];
    let pick = proptest::sample::select::<LocalityScope>;
    (
        (service_key(), words(), vec(vip, 0..3), ports(), vec(word(), 0..2), gateway()),
        vec(pick(scopes.to_vec()), 0..3),
        (0..4_usize, 0..4_usize, any::<bool>()),
    )
        .prop_map(move |((key, name, vips, ports, sans, waypoint), preference, picks)| {
            Service {
                key,
                name,
                vips: vips.into(),
                ports,
                subject_alt_names: sans.into(),
                waypoint,
                load_balancing: LoadBalancing {
                    mode: modes[picks.0],
                    preference: preference.into(),
                    health: if picks.2 {
                        HealthPolicy::OnlyHealthy
                    } else {
                        HealthPolicy::AllowAll
                    },
                },
                families: families[picks.1],
            }
        })
}

fn provenance() -> impl Strategy<Value = Provenance> {
    (words(), words(), words()).prop_map(|(object, field, origin)| Provenance {
        object,
        field,
        origin,
    })
}

fn policy() -> impl Strategy<Value = Policy> {
    let string = prop_oneof![
        words().prop_map(StringMatch::Exact),
        words().prop_map(StringMatch::Prefix),
        words().prop_map(StringMatch::Suffix),
        Just(StringMatch::Presence),
    ];
    let strings = vec(string, 0..2).boxed();
    let ips = vec(prefixed().prop_map(|(ip, length)| IpPrefix { ip, length }), 0..2).boxed();
    let numbers = vec(any::<u16>(), 0..2).boxed();
    let accounts = vec((words(), words()), 0..2).boxed();
    let one = (
        [strings.clone(), strings.clone(), strings.clone(), strings],
        [ips.clone(), ips.clone(), ips.clone(), ips],
        [numbers.clone(), numbers],
        [accounts.clone(), accounts],
    )
        .prop_map(|([a, b, c, d], [e, f, g, h], [i, j], [k, l])| Match {
            namespaces: a,
            not_namespaces: b,
            principals: c,
            not_principals: d,
            source_ips: e,
            not_source_ips: f,
            destination_ips: g,
            not_destination_ips: h,
            destination_ports: i,
            not_destination_ports: j,
            service_accounts: k,
            not_service_accounts: l,
        });
    let rule = (vec(vec(one, 0..3), 0..3), provenance())
        .prop_map(|(clauses, provenance)| Rule { clauses, provenance });
    let scope =
        prop_oneof![Just(Scope::Global), Just(Scope::Namespace), Just(Scope::WorkloadSelector)];
    let action = prop_oneof![Just(Action::Allow), Just(Action::Deny)];
    ((word(), word()), scope, action, vec(rule, 0..3), any::<bool>(), provenance()).prop_map(
        |((namespace, name), scope, action, rules, dry_run, provenance)| Policy {
            key: PolicyKey { namespace, name },
            scope,
            action,
            rules: rules.into(),
            dry_run,
            provenance,
        },
    )
}

proptest! {
    #[test]
    fn workloads_survive_the_wire(w in workload()) {
        let bytes = encode_workload(&w).encode_to_vec();
        let got = decode_address(&workload_name(&w), &bytes, &defaults(), &mut Interner::default());
        prop_assert_eq!(got, Ok(Address::Workload(Arc::new(w))));
    }

    #[test]
    fn services_survive_the_wire(s in service()) {
        let bytes = encode_service(&s).encode_to_vec();
        let got = decode_address(&service_name(&s), &bytes, &defaults(), &mut Interner::default());
        prop_assert_eq!(got, Ok(Address::Service(Arc::new(s))));
    }

    #[test]
    fn policies_survive_the_wire(p in policy()) {
        let interner = &mut Interner::default();
        let name = policy_name(&p);
        let mut got = decode_authorization(&name, &encode_policy(&p).encode_to_vec(), interner).unwrap();
        let origin = decode_origin(&name, &policy_origin(&p).encode_to_vec()).unwrap();
        attach_origin(&mut got, &origin, interner);
        prop_assert_eq!(got, p);
    }

    #[test]
    fn garbage_never_panics(bytes in vec(any::<u8>(), 0..64)) {
        let interner = &mut Interner::default();
        let _ = decode_address("a/b", &bytes, &defaults(), interner);
        let _ = decode_authorization("a/b", &bytes, interner);
        let _ = closed_stand_in("a/b", &bytes, interner);
        let _ = decode_origin("a/b", &bytes);
    }
}

#[test]
fn elided_values_are_filled_in() {
    let message = wire::Address {
        r#type: Some(wire::address::Type::Workload(wire::Workload {
            uid: "u".to_owned(),
            ..Default::default()
        })),
    };
    let got = decode_address("u", &message.encode_to_vec(), &defaults(), &mut Interner::default());
    let Ok(Address::Workload(w)) = got else { panic!("{got:?}") };
    assert_eq!((&*w.trust_domain, &*w.service_account, w.capacity), ("mesh.example", "default", 1));
}

#[test]
fn what_is_not_understood_is_refused() {
    use wire::gateway_address::Destination;
    let check = |name: &str, change: &dyn Fn(&mut wire::Workload), want: &str| {
        let mut w = wire::Workload { uid: "u".to_owned(), ..Default::default() };
        change(&mut w);
        let message = wire::Address { r#type: Some(wire::address::Type::Workload(w)) };
        let bytes = message.encode_to_vec();
        let got = decode_address(name, &bytes, &defaults(), &mut Interner::default());
        assert_eq!(got.unwrap_err().to_string(), want);
    };
    check("v", &|_| {}, "v: uid: says \"u\", the resource is named otherwise");
    check("u", &|w| w.status = 7, "u: status: the value 7 is not known to this proxy");
    check(
        "u",
        &|w| w.tunnel_protocol = 9,
        "u: tunnel_protocol: the value 9 is not known to this proxy",
    );
    check(
        "u",
        &|w| w.addresses = vec![vec![1, 2, 3].into()],
        "u: addresses: 3 bytes are not an IP address",
    );
    check(
        "u",
        &|w| w.authorization_policies = vec!["p".to_owned()],
        "u: authorization_policies: \"p\" is not namespace/name",
    );
    check(
        "u",
        &|w| w.waypoint = Some(wire::GatewayAddress { destination: None, hbone_mtls_port: 15008 }),
        "u: waypoint: names neither a hostname nor an address",
    );
    check(
        "u",
        &|w| {
            let destination = Some(Destination::Hostname(wire::NamespacedHostname::default()));
            w.waypoint = Some(wire::GatewayAddress { destination, hbone_mtls_port: 70_000 });
        },
        "u: waypoint.hbone_mtls_port: 70000 is not a port",
    );
    // Words of the control plane, but not all of them.
    let long = vec!["\u{7f}".repeat(3000)];
    let many =
        wire::Workload { uid: "u".to_owned(), authorization_policies: long, ..Default::default() };
    let many = wire::Address { r#type: Some(wire::address::Type::Workload(many)) }.encode_to_vec();
    let error = decode_address("u", &many, &defaults(), &mut Interner::default()).unwrap_err();
    assert!(error.to_string().len() < 4096, "{error}");
    // It would be kept under one name and removed under another.
    let slash = wire::Service {
        namespace: "a/b".to_owned(),
        hostname: "c".to_owned(),
        ..Default::default()
    };
    let slash = wire::Address { r#type: Some(wire::address::Type::Service(slash)) }.encode_to_vec();
    let error = decode_address("a/b/c", &slash, &defaults(), &mut Interner::default());
    assert_eq!(error.unwrap_err().to_string(), "a/b/c: namespace: \"a/b\" holds a slash");
    let none = wire::Address { r#type: None }.encode_to_vec();
    let error = decode_address("u", &none, &defaults(), &mut Interner::default()).unwrap_err();
    assert_eq!(error.to_string(), "u: type: neither a workload nor a service");
}

/// A policy of one rule with one match, as bytes, with `extra` bytes appended to the match.
fn policy_bytes(action: u8, scope: u8, extra: &[u8]) -> Vec<u8> {
    fn nested(field: u8, inner: &[u8]) -> Vec<u8> {
        let mut out = vec![field << 3 | 2, u8::try_from(inner.len()).unwrap()];
        out.extend_from_slice(inner);
        out
    }
    // Match { destination_ports: [80] }, packed.
    let mut one = vec![0x4a, 0x01, 80];
    one.extend_from_slice(extra);
    let rules = nested(5, &nested(1, &nested(2, &one)));
    let mut out = nested(1, b"p");
    out.extend(nested(2, b"ns"));
    out.extend([0x18, scope, 0x20, action]);
    out.extend(rules);
    out
}

#[test]
fn policies_with_unknown_parts_are_refused_and_closed() {
    let interner = &mut Interner::default();
    // Not canonical (defaults written out), but no more than that: still refused, still closed.
    let known = policy_bytes(1, 1, &[]);
    assert!(decode_authorization("ns/p", &known, interner).is_ok());
    assert!(decode_authorization("ns/q", &known, interner).is_err(), "named otherwise");

    // Field 14 of Match does not exist today.
    let check = |action, scope, want: Option<(Scope, Action, usize)>| {
        let interner = &mut Interner::default();
        let bytes = policy_bytes(action, scope, &[0x72, 0x01, b'x']);
        assert!(decode_authorization("ns/p", &bytes, interner).is_err());
        let got = closed_stand_in("ns/p", &bytes, interner);
        assert_eq!(got.map(|p| (p.scope, p.action, p.rules.len())), want);
    };
    // ALLOW nobody; DENY everybody; what cannot be read at all denies.
    check(0, 1, Some((Scope::Namespace, Action::Allow, 0)));
    check(1, 1, Some((Scope::Namespace, Action::Deny, 1)));
    check(1, 0, Some((Scope::Global, Action::Deny, 1)));
    check(9, 1, Some((Scope::Namespace, Action::Deny, 1)));
    check(1, 9, Some((Scope::Namespace, Action::Deny, 1)));
    // Workloads name selector policies: without it they refuse.
    check(1, 2, None);

    let empty = security::Authorization {
        name: "p".to_owned(),
        namespace: "ns".to_owned(),
        rules: vec![security::Rule {
            clauses: vec![security::Clause {
                matches: vec![security::Match {
                    not_principals: vec![security::StringMatch { match_type: None }],
                    ..Default::default()
                }],
            }],
        }],
        ..Default::default()
    };
    let error = decode_authorization("ns/p", &empty.encode_to_vec(), interner).unwrap_err();
    assert_eq!(
        error.to_string(),
        "ns/p: rules[0].clauses[0].matches[0].not_principals: an unknown kind of string match"
    );
}

/// Written by hand from the field numbers, so that a renumbered .proto cannot pass unseen.
#[test]
fn bytes_on_the_wire() {
    let interner = &mut Interner::default();
    let mut w = vec![0xa2, 0x01, 0x01, b'u']; // uid = 20
    w.extend(*b"\x0a\x01n\x12\x02ns"); // name = 1, namespace = 2
    w.extend(*b"\x1a\x04\x0a\x00\x00\x01"); // addresses = 3
    w.extend(*b"\x28\x01"); // tunnel_protocol = 5: HBONE
    w.extend(*b"\x3a\x02sa\x4a\x01k"); // service_account = 7, node = 9
    w.extend(*b"\x82\x01\x04ns/p"); // authorization_policies = 16
    w.extend(*b"\x88\x01\x01"); // status = 17: UNHEALTHY
    w.extend(*b"\xb2\x01\x0e\x0a\x04ns/h\x12\x06\x0a\x04\x08\x50\x10\x51"); // services = 22: 80 -> 81
    w.extend(*b"\xda\x01\x02\x08\x03"); // capacity = 27
    let mut address = vec![0x0a, u8::try_from(w.len()).unwrap()]; // workload = 1
    address.extend(w);
    let Ok(Address::Workload(w)) = decode_address("u", &address, &defaults(), interner) else {
        panic!("no workload")
    };
    assert_eq!((&*w.name, &*w.namespace, &*w.service_account, &*w.node), ("n", "ns", "sa", "k"));
    assert_eq!(w.addresses[..], ["10.0.0.1".parse::<IpAddr>().unwrap()]);
    assert_eq!((w.protocol, w.health, w.capacity), (TunnelProtocol::Hbone, Health::Unhealthy, 3));
    assert_eq!(w.policies[0].to_string(), "ns/p");
    assert_eq!(w.services[0].0.to_string(), "ns/h");
    assert_eq!((w.services[0].1[0].service_port, w.services[0].1[0].target_port), (80, 81));

    let mut s = b"\x0a\x01s\x12\x02ns\x1a\x01h".to_vec(); // name, namespace, hostname = 1..3
    s.extend(*b"\x22\x0b\x0a\x01m\x12\x04\x0a\x60\x00\x00\x18\x10"); // addresses = 4: a /16
    s.extend(*b"\x2a\x06\x08\x50\x10\x00\x18\x02"); // ports = 5: 80, named, HTTP/2
    s.extend(*b"\x3a\x0c\x0a\x07\x0a\x02ns\x12\x01w\x18\xa0\x75"); // waypoint = 7
    s.extend(*b"\x42\x07\x0a\x01\x01\x10\x02\x18\x01"); // load_balancing = 8
    s.extend(*b"\x48\x03"); // ip_families = 9: dual
    let mut address = vec![0x12, u8::try_from(s.len()).unwrap()]; // service = 2
    address.extend(s);
    let got = decode_address("ns/h", &address, &defaults(), interner);
    let Ok(Address::Service(s)) = got else { panic!("{got:?}") };
    assert_eq!((&*s.vips[0].network, s.vips[0].prefix), ("m", 16));
    assert_eq!(s.ports[0].app_protocol, AppProtocol::Http2);
    assert_eq!(s.waypoint.as_ref().unwrap().hbone_port, 15008);
    assert_eq!(s.load_balancing.preference[..], [LocalityScope::Region]);
    assert_eq!(
        (s.load_balancing.mode, s.load_balancing.health),
        (RoutingMode::Failover, HealthPolicy::AllowAll)
    );
    assert_eq!(s.families, FamilyPolicy::Dual);

    let mut bytes = policy_bytes(1, 1, b"\x22\x02\x22\x00\x5a\x05\x0a\x01a\x12\x00"); // not_principals = 4, service_accounts = 11
    let at = bytes.len() - 2;
    bytes.truncate(at);
    assert!(decode_authorization("ns/p", &bytes, interner).is_err(), "cut short");
    let bytes = policy_bytes(1, 1, b"\x22\x02\x22\x00\x5a\x06\x0a\x01a\x12\x01b");
    let p = decode_authorization("ns/p", &bytes, interner).unwrap();
    assert_eq!((p.scope, p.action, p.dry_run), (Scope::Namespace, Action::Deny, false));
    let one = &p.rules[0].clauses[0][0];
    assert_eq!(one.destination_ports, [80]);
    assert_eq!(one.not_principals, [StringMatch::Presence]);
    assert_eq!(one.service_accounts, [(Str::from("a"), Str::from("b"))]);

    let metadata = prost_types::Struct {
        fields: [(
            crate::IMPERSONATED_IDENTITY.to_owned(),
            prost_types::Value {
                kind: Some(prost_types::value::Kind::StringValue("i".to_owned())),
            },
        )]
        .into(),
    };
    let request = ca::IstioCertificateRequest {
        csr: "c".to_owned(),
        validity_duration: 86_400,
        metadata: Some(metadata),
    };
    let want =
        b"\x0a\x01c\x18\x80\xa3\x05\x22\x1d\x0a\x1b\x0a\x14ImpersonatedIdentity\x12\x03\x1a\x01i";
    assert_eq!(request.encode_to_vec(), want);
}

#[test]
fn strings_are_shared_and_forgotten() {
    let mut interner = Interner::default();
    let kept = interner.str("kept");
    assert!(Arc::ptr_eq(&kept, &interner.str("kept")));
    for i in 0..5000 {
        interner.str(&i.to_string());
    }
    interner.sweep();
    assert_eq!(interner.len(), 1);
    assert!(Arc::ptr_eq(&kept, &interner.str("kept")));
}
