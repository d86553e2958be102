//! Encodes one mesh after another: what is the very same value as the last time is not encoded again.

use std::mem;
use std::sync::Arc;

use bytes::Bytes;
use model::http::{RouteRule, ServiceRoutes, Subset};
use model::{ConfigVersion, Policy, Service, Str, Workload};
use prost::Message;
use rustc_hash::FxHashMap;

use super::resources::{Encoded, Resources};
use crate::codec;

/// All values of a mesh, each kind as `compile` has them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mesh<'a> {
    pub workloads: &'a [Arc<Workload>],
    pub services: &'a [Arc<Service>],
    pub policies: &'a [Arc<Policy>],
    pub routes: &'a [Arc<ServiceRoutes>],
    pub subsets: &'a [Arc<Subset>],
}

/// Encodes one mesh after another: what is the very same value as the last time is not encoded again.
#[derive(Debug, Default)]
pub struct Encoder {
    workloads: Known<Workload, Named>,
    services: Known<Service, Named>,
    /// The policy, and where it was written.
    policies: Known<Policy, (Named, Encoded)>,
    routes: Known<ServiceRoutes, Named>,
    rules: Known<RouteRule, Bytes>,
    subsets: Known<Subset, Named>,
}

type Named = (Str, Encoded);

impl Encoder {
    /// What proxies should hold after this push. Of several values with one name the last one counts.
    pub fn encode(&mut self, push: ConfigVersion, mesh: Mesh<'_>) -> Resources {
        let mut all = Resources::default().with_push(push);
        for w in mesh.workloads {
            let make = || named(codec::workload_name(w), &codec::encode_workload(w));
            let (name, encoded) = self.workloads.get(w, make);
            all.addresses.set(name, encoded);
        }
        for s in mesh.services {
            let make = || named(codec::service_name(s), &codec::encode_service(s));
            let (name, encoded) = self.services.get(s, make);
            all.addresses.set(name, encoded);
        }
        for p in mesh.policies {
            let ((name, policy), origin) = self.policies.get(p, || {
                let policy = named(codec::policy_name(p), &codec::encode_policy(p));
                let (_, origin) = named(policy.0.clone(), &codec::policy_origin(p));
                (policy, origin)
            });
            all.authorizations.set(name.clone(), policy);
            all.origins.set(name, origin);
        }
        for r in mesh.routes {
            let rules = &mut self.rules;
            let (name, encoded) = self.routes.get(r, || {
                let mut rule = |r: &Arc<RouteRule>| rules.get(r, || codec::encode_rule(r));
                named(codec::routes_name(r), &codec::encode_routes_by(r, &mut rule))
            });
            all.routes.set(name, encoded);
        }
        for s in mesh.subsets {
            let make = || named(codec::subset_name(s), &codec::encode_subset(s));
            let (name, encoded) = self.subsets.get(s, make);
            all.subsets.set(name, encoded);
        }
        self.sweep();
        all
    }

    fn sweep(&mut self) {
        self.workloads.sweep();
        self.services.sweep();
        self.policies.sweep();
        // They hold rules.
        self.routes.sweep();
        self.rules.sweep();
        self.subsets.sweep();
    }
}

fn named(name: Str, message: &impl Message) -> Named {
    let encoded = Encoded::new(&name, message.encode_to_vec());
    (name, encoded)
}

/// Encodings of values by their addresses. Each value is held, so that its address is nobody else's.
#[derive(Debug)]
struct Known<T, M> {
    by_address: FxHashMap<usize, (Arc<T>, M)>,
    /// Something came since the last sweep: then something else may have gone.
    grown: bool,
}

impl<T, M: Clone> Known<T, M> {
    fn get(&mut self, value: &Arc<T>, make: impl FnOnce() -> M) -> M {
        let new = || {
            self.grown = true;
            (value.clone(), make())
        };
        self.by_address.entry(Arc::as_ptr(value).addr()).or_insert_with(new).1.clone()
    }

    /// Forgets what only we still hold. Every time: one value may be of many megabytes.
    fn sweep(&mut self) {
        if mem::take(&mut self.grown) {
            self.by_address.retain(|_, (value, _)| Arc::strong_count(value) > 1);
        }
    }
}

impl<T, M> Default for Known<T, M> {
    fn default() -> Self {
        Self { by_address: FxHashMap::default(), grown: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::http::{Audience, RouteKind, RouteMatch, RouteSet, Timeouts};
    use model::{Provenance, ServiceKey};

    fn rule(name: &str) -> Arc<RouteRule> {
        Arc::new(RouteRule {
            route: "HTTPRoute/ns/r".into(),
            name: name.into(),
            provenance: Provenance::default(),
            filters: Vec::new(),
            backends: Vec::new(),
            timeouts: Timeouts::default(),
        })
    }

    fn routes(rules: &[&Arc<RouteRule>]) -> Arc<ServiceRoutes> {
        let service = ServiceKey { namespace: "ns".into(), hostname: "s".into() };
        let rules: Arc<[_]> = rules.iter().map(|rule| Arc::clone(rule)).collect();
        let matches = Arc::new([RouteMatch::default()]);
        let set = RouteSet::new(Audience::Everybody, Arc::new([]), RouteKind::Http, rules, matches);
        let sets = Arc::new([Arc::new(set.unwrap())]);
        Arc::new(ServiceRoutes { service, ports: Arc::new([]), sets })
    }

    #[test]
    fn again_is_as_for_the_first_time() {
        let mut encoder = Encoder::default();
        let push = ConfigVersion::default();
        let (a, b, c) = (rule("a"), rule("b"), rule("c"));
        for rules in [[&a, &b], [&a, &c], [&c, &a], [&a, &b]] {
            for _ in 0..2 {
                let mesh = Mesh {
                    workloads: &[Arc::new(Workload::named("w", "ns", "w"))],
                    routes: &[routes(&rules)],
                    ..Mesh::default()
                };
                let again = encoder.encode(push, mesh);
                assert!(again.same_content(&Resources::new(push, mesh)));
            }
        }
    }

    /// An address is somebody else's as soon as its value is gone.
    #[test]
    fn what_is_known_is_held_and_what_is_gone_is_forgotten() {
        let mut encoder = Encoder::default();
        for i in 0..500 {
            let workload = Arc::new(Workload::named(format!("w{i}"), "ns", "w"));
            let mesh = Mesh { workloads: std::slice::from_ref(&workload), ..Mesh::default() };
            let resources = encoder.encode(ConfigVersion::default(), mesh);
            let name = resources.iter(crate::Kind::Address).next().unwrap().0.clone();
            assert_eq!(*name, format!("w{i}"));
            assert_eq!(encoder.workloads.by_address.len(), 1);
        }
    }

    /// The routes of a Service may be of 16 MiB: none of an earlier time is kept.
    #[test]
    fn one_version_of_routes_is_kept() {
        let mut encoder = Encoder::default();
        let kept = rule("kept");
        for i in 0..50 {
            let new = [routes(&[&kept, &rule(&format!("r{i}"))])];
            let mesh = Mesh { routes: &new, ..Mesh::default() };
            let resources = encoder.encode(ConfigVersion::default(), mesh);
            assert!(resources.same_content(&Resources::new(ConfigVersion::default(), mesh)));
            let sizes = (encoder.routes.by_address.len(), encoder.rules.by_address.len());
            assert_eq!(sizes, (1, 2));
        }
    }
}
