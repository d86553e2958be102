//! Snapshot: incremental changes equal a rebuild; lookups name what is missing.

use proptest::prelude::*;

use super::*;
use crate::{Action, FamilyPolicy, Health, LoadBalancing, Provenance};

fn service(name: &str, ip: &str, prefix: u8) -> Arc<Service> {
    Arc::new(Service {
        key: ServiceKey { namespace: "ns".into(), hostname: name.into() },
        name: name.into(),
        vips: Arc::new([Vip { network: "".into(), ip: ip.parse().unwrap(), prefix }]),
        ports: Arc::new([]),
        subject_alt_names: Arc::new([]),
        waypoint: None,
        load_balancing: LoadBalancing::default(),
        families: FamilyPolicy::default(),
    })
}

fn policy(name: &str, scope: Scope) -> Arc<Policy> {
    Arc::new(Policy {
        key: PolicyKey { namespace: "ns".into(), name: name.into() },
        scope,
        action: Action::Deny,
        rules: Arc::new([]),
        dry_run: false,
        provenance: Provenance::default(),
    })
}

fn workload(name: &str, ip: u8, services: &[&str], healthy: bool) -> Arc<Workload> {
    let mut w = Workload::named(format!("c//Pod/ns/{name}"), "ns", name);
    w.addresses = Arc::new([IpAddr::from([10, 0, 0, ip])]);
    w.services = services
        .iter()
        .map(|s| (ServiceKey { namespace: "ns".into(), hostname: (*s).into() }, Arc::from([])))
        .collect();
    w.health = if healthy { Health::Healthy } else { Health::Unhealthy };
    Arc::new(w)
}

#[test]
fn longest_range_and_exact_address_win() {
    let snapshot = Snapshot::default().with(
        [
            service("wide", "10.0.0.0", 8),
            service("narrow", "10.1.0.0", 16),
            service("one", "10.1.2.3", 32),
        ]
        .map(Change::SetService),
    );
    let check = |ip: &str, want: Option<&str>| {
        let got = snapshot.service_at(&"".into(), ip.parse().unwrap()).map(|s| s.name.to_string());
        assert_eq!(got.as_deref(), want, "{ip}");
    };
    check("10.9.9.9", Some("wide"));
    check("10.1.9.9", Some("narrow"));
    check("10.1.2.3", Some("one"));
    check("11.0.0.1", None);
    check("fd00::1", None);
    assert!(snapshot.service_at(&"other".into(), "10.1.2.3".parse().unwrap()).is_none());
}

#[test]
fn missing_policy_is_reported_not_skipped() {
    let mut w = (*workload("a", 1, &[], true)).clone();
    let key = |n: &str| PolicyKey { namespace: "ns".into(), name: n.into() };
    w.policies = Arc::new([key("here"), key("gone")]);
    let snapshot = Snapshot::default().with([
        Change::SetPolicy(policy("here", Scope::WorkloadSelector)),
        Change::SetPolicy(policy("wide", Scope::Namespace)),
    ]);
    let of = snapshot.policies_of(&w);
    assert_eq!(of.found.len(), 2);
    assert_eq!(of.missing, [&key("gone")]);
}

#[derive(Clone, Debug)]
enum Step {
    Set { name: u8, ip: u8, services: Vec<u8>, healthy: bool },
    Remove { name: u8 },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let set = (0..6_u8, 0..4_u8, proptest::collection::vec(0..3_u8, 0..3), any::<bool>())
        .prop_map(|(name, ip, services, healthy)| Step::Set { name, ip, services, healthy });
    let remove = (0..6_u8).prop_map(|name| Step::Remove { name });
    proptest::collection::vec(prop_oneof![3 => set, 1 => remove], 0..40)
}

proptest! {
    /// Whatever the order of updates, addresses, names and endpoints are those of the final workloads.
    #[test]
    fn incremental_equals_rebuild(steps in steps()) {
        let names = ["s0", "s1", "s2"];
        let mut kept = std::collections::BTreeMap::new();
        let mut snapshot = Snapshot::default();
        for step in steps {
            match step {
                Step::Set { name, ip, mut services, healthy } => {
                    services.sort_unstable();
                    services.dedup();
                    let services: Vec<_> = services.iter().map(|s| names[*s as usize]).collect();
                    let w = workload(&format!("w{name}"), ip, &services, healthy);
                    kept.insert(w.uid.clone(), w.clone());
                    snapshot = snapshot.with([Change::SetWorkload(w)]);
                }
                Step::Remove { name } => {
                    let uid = workload(&format!("w{name}"), 0, &[], true).uid.clone();
                    kept.remove(&uid);
                    snapshot = snapshot.with([Change::RemoveWorkload(uid)]);
                }
            }
        }
        let rebuilt = Snapshot::default().with(kept.values().cloned().map(Change::SetWorkload));
        prop_assert_eq!(snapshot.workloads().count(), kept.len());
        for ip in 0..4 {
            let ip = IpAddr::from([10, 0, 0, ip]);
            prop_assert_eq!(
                snapshot.workload_at(&"".into(), ip).map(|w| w.uid.clone()),
                rebuilt.workload_at(&"".into(), ip).map(|w| w.uid.clone())
            );
        }
        for name in names {
            let key = ServiceKey { namespace: "ns".into(), hostname: name.into() };
            let uids = |s: &Snapshot| -> Vec<_> {
                s.endpoints(&key).map(|e| e.keys().cloned().collect()).unwrap_or_default()
            };
            prop_assert_eq!(uids(&snapshot), uids(&rebuilt));
            let want: Vec<_> = kept.values()
                .filter(|w| w.services.iter().any(|(s, _)| *s == key))
                .map(|w| w.uid.clone()).collect();
            prop_assert_eq!(uids(&snapshot), want);
        }
    }
}
