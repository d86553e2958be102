//! Names of every form, against what Kubernetes' DNS specification and `ServiceEntry` say; properties for any name.

use model::{Change, FamilyPolicy, LoadBalancing, ServiceKey, WorkloadUid};
use proptest::prelude::*;

use super::*;

const ZONE: &str = "cluster.local";

fn vip(network: &str, ip: &str) -> Vip {
    let (ip, prefix) = ip.split_once('/').unwrap_or((ip, ""));
    let ip: IpAddr = ip.parse().unwrap();
    let full = if ip.is_ipv4() { 32 } else { 128 };
    Vip { network: network.into(), ip, prefix: prefix.parse().unwrap_or(full) }
}

fn host(namespace: &str, hostname: &str, vips: Vec<Vip>) -> Arc<Service> {
    Arc::new(Service {
        key: ServiceKey { namespace: namespace.into(), hostname: hostname.into() },
        name: hostname.split('.').next().unwrap_or_default().into(),
        vips: vips.into(),
        ports: Arc::new([]),
        subject_alt_names: Arc::new([]),
        waypoint: None,
        load_balancing: LoadBalancing::default(),
        families: FamilyPolicy::default(),
    })
}

fn service(namespace: &str, name: &str, ips: &[&str]) -> Arc<Service> {
    let vips = ips.iter().map(|ip| vip("", ip)).collect();
    host(namespace, &format!("{name}.{namespace}.svc.{ZONE}"), vips)
}

fn pod(name: &str, owner: &str, of: &Service, ips: &[&str]) -> Workload {
    let mut w = Workload::named(format!("c//Pod/{}/{name}", of.key.namespace), "", name);
    w.namespace = of.key.namespace.clone();
    w.workload_name = owner.into();
    w.addresses = ips.iter().map(|ip| ip.parse::<IpAddr>().unwrap()).collect();
    w.services = Arc::new([(of.key.clone(), Arc::from([]))]);
    w
}

/// `web` in both families, `four` in one, headless `db` with a `StatefulSet`, and hosts of `ServiceEntry`.
fn world() -> Snapshot {
    let db = service("shop", "db", &[]);
    let mut unready = pod("db-1", "db", &db, &["10.1.0.2"]);
    unready.health = Health::Unhealthy;
    let mut elsewhere = pod("db-2", "db", &db, &["10.1.0.3"]);
    elsewhere.network = "far".into();
    let workloads = [
        pod("db-0", "db", &db, &["10.1.0.1", "fd01::1"]),
        pod("db-7", "db", &db, &["10.1.0.7"]),
        pod("stray-x1", "stray", &db, &["10.1.0.9"]),
        unready,
        elsewhere,
    ];
    let far = host("shop", &format!("far.shop.svc.{ZONE}"), vec![vip("far", "10.96.9.9")]);
    let services = [
        service("shop", "web", &["10.96.0.1", "fd96::1"]),
        service("shop", "four", &["10.96.0.4"]),
        service("other", "web", &["10.96.0.2"]),
        db,
        service("shop", "empty", &[]),
        far,
        host("shop", "api.example.com", vec![vip("", "240.240.0.1")]),
        host("other", "api.example.com", vec![vip("", "240.240.0.2")]),
        host("mesh", "free.example.com", vec![]),
        host("mesh", "range.example.com", vec![vip("", "192.0.2.0/24")]),
        host("mesh", "*.wild.com", vec![vip("", "240.240.0.3")]),
        host("mesh", "*.deep.wild.com", vec![vip("", "240.240.0.4")]),
        host("mesh", "CASE.Example.com", vec![vip("", "240.240.0.5")]),
    ];
    let services = services.map(Change::SetService);
    Snapshot::default()
        .with(services.into_iter().chain(workloads.map(|w| Change::SetWorkload(Arc::new(w)))))
}

fn ask(snapshot: &Snapshot, namespace: &str, name: &str, ipv6: bool) -> DnsAnswer {
    let network = "".into();
    resolve(
        snapshot,
        &DnsFacts { namespace, network: &network, cluster_domain: ZONE, name, ipv6 },
        0,
    )
}

/// `->`: forwarded; `-`: no data; else addresses.
fn shown(answer: &DnsAnswer) -> String {
    match answer {
        DnsAnswer::Forward => "->".to_owned(),
        DnsAnswer::NoData { .. } => "-".to_owned(),
        DnsAnswer::Addresses { addresses, .. } => {
            addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
        }
    }
}

#[test]
fn names_of_every_form() {
    let world = world();
    let check = |namespace: &str, name: &str, a: &str, aaaa: &str| {
        let got = (
            shown(&ask(&world, namespace, name, false)),
            shown(&ask(&world, namespace, name, true)),
        );
        assert_eq!((got.0.as_str(), got.1.as_str()), (a, aaaa), "{name} from {namespace}");
    };
    for name in ["web", "web.shop", "web.shop.svc", "web.shop.svc.cluster.local"] {
        check("shop", name, "10.96.0.1", "fd96::1");
    }
    check("other", "web", "10.96.0.2", "-");
    check("other", "web.shop", "10.96.0.1", "fd96::1");
    check("shop", "four", "10.96.0.4", "-");
    // A search list that was appended to a name with a namespace in it, and other names that are none of ours.
    for name in [
        "web.shop.shop.svc.cluster.local",
        "web.shop.svc.cluster.local.shop.svc.cluster.local",
        "web.shop.svc.cluster.local.svc.cluster.local",
        "web.shop.svc.cluster.local.cluster.local",
        "web.svc.cluster.local",
        "nothing.shop.svc.cluster.local",
        "svc.cluster.local",
        "cluster.local",
        "web.shop.pod.cluster.local",
        "xcluster.local",
        "nothing",
        "www.example.com",
        "a.b.c.d.e",
        "",
        ".",
        "web.",
        ".web",
        "web..svc",
        "svc",
        ".svc",
    ] {
        check("shop", name, "->", "->");
    }
    // Headless: every ready pod on our network; one of them has IPv6.
    for name in ["db", "db.shop", "db.shop.svc", "db.shop.svc.cluster.local"] {
        check("shop", name, "10.1.0.1 10.1.0.7 10.1.0.9", "fd01::1");
    }
    for name in ["db-0.db", "db-0.db.shop", "db-0.db.shop.svc", "db-0.db.shop.svc.cluster.local"] {
        check("shop", name, "10.1.0.1", "fd01::1");
    }
    check("other", "db-0.db.shop", "10.1.0.1", "fd01::1");
    check("other", "db-0.db", "->", "->");
    check("shop", "db-7.db", "10.1.0.7", "-");
    // Not ready, on another network, not of a StatefulSet, not there, and not headless.
    for name in ["db-1.db", "db-2.db", "stray-x1.db", "db-3.db", "db-0.web", "db-0.empty"] {
        check("shop", name, "->", "->");
    }
    check("shop", "empty", "->", "->");
    check("shop", "far", "->", "->");
    // ServiceEntry: the client's namespace first, then the first by name.
    check("shop", "api.example.com", "240.240.0.1", "-");
    check("other", "api.example.com", "240.240.0.2", "-");
    check("third", "api.example.com", "240.240.0.2", "-");
    check("shop", "free.example.com", "->", "->");
    check("shop", "range.example.com", "->", "->");
    check("shop", "case.example.com", "240.240.0.5", "-");
    check("shop", "a.wild.com", "240.240.0.3", "-");
    check("shop", "a.b.wild.com", "240.240.0.3", "-");
    check("shop", "a.deep.wild.com", "240.240.0.4", "-");
    check("shop", "wild.com", "->", "->");
}

#[test]
fn services_that_go_are_forgotten() {
    let key = ServiceKey { namespace: "shop".into(), hostname: "api.example.com".into() };
    let world = world().with([Change::RemoveService(key)]);
    assert_eq!(shown(&ask(&world, "shop", "api.example.com", false)), "240.240.0.2");
    let key = ServiceKey { namespace: "other".into(), hostname: "api.example.com".into() };
    let world = world.with([Change::RemoveService(key)]);
    assert_eq!(shown(&ask(&world, "shop", "api.example.com", false)), "->");
    let uid = WorkloadUid("c//Pod/shop/db-0".into());
    let world = world.with([Change::RemoveWorkload(uid)]);
    assert_eq!(shown(&ask(&world, "shop", "db", false)), "10.1.0.7 10.1.0.9");
    assert_eq!(shown(&ask(&world, "shop", "db", true)), "-");
}

#[test]
fn pods_that_are_not_ready_count_where_the_service_says_so() {
    let mut db = (*service("shop", "db", &[])).clone();
    db.load_balancing.health = HealthPolicy::AllowAll;
    let world = world().with([Change::SetService(Arc::new(db))]);
    assert_eq!(shown(&ask(&world, "shop", "db-1.db", false)), "10.1.0.2");
}

#[test]
fn many_pods_are_cut_and_rotated() {
    let big = service("shop", "big", &[]);
    let pods = (0..3000_u32).map(|n| {
        let [_, _, a, b] = n.to_be_bytes();
        Change::SetWorkload(Arc::new(pod(
            &format!("big-{n}"),
            "big",
            &big,
            &[&format!("10.2.{a}.{b}")],
        )))
    });
    let world =
        Snapshot::default().with(std::iter::once(Change::SetService(big.clone())).chain(pods));
    let network = "".into();
    let facts = DnsFacts {
        namespace: "shop",
        network: &network,
        cluster_domain: ZONE,
        name: "big",
        ipv6: false,
    };
    let firsts: std::collections::BTreeSet<IpAddr> = (0..50)
        .map(|rand| match resolve(&world, &facts, rand * 61) {
            DnsAnswer::Addresses { addresses, of_pods: true, .. } => {
                assert_eq!(addresses.len(), MAX_ADDRESSES);
                addresses[0]
            }
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(firsts.len(), 50);
}

proptest! {
    /// Any name: both families agree on whether it is the mesh's to answer, and an answer has only what was asked for.
    #[test]
    fn families_agree(
        labels in proptest::collection::vec(
            prop_oneof![
                Just("web".to_owned()), Just("db".to_owned()), Just("db-0".to_owned()),
                Just("shop".to_owned()), Just("svc".to_owned()), Just("cluster".to_owned()),
                Just("local".to_owned()), Just("example".to_owned()), Just("com".to_owned()),
                Just("wild".to_owned()), Just("*".to_owned()), "[a-z]{0,3}",
            ],
            0..8,
        ),
        rand in any::<u64>(),
    ) {
        let world = world();
        let (name, network) = (labels.join("."), "".into());
        let of = |ipv6| {
            let facts = DnsFacts {
                namespace: "shop", network: &network, cluster_domain: ZONE, name: &name, ipv6,
            };
            resolve(&world, &facts, rand)
        };
        let (four, six) = (of(false), of(true));
        prop_assert_eq!(four == DnsAnswer::Forward, six == DnsAnswer::Forward);
        for (answer, ipv6) in [(four, false), (six, true)] {
            if let DnsAnswer::Addresses { addresses, .. } = answer {
                prop_assert!(!addresses.is_empty());
                prop_assert!(addresses.iter().all(|ip| ip.is_ipv6() == ipv6));
            }
        }
    }
}
