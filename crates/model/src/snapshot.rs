//! The one immutable value a proxy decides from.
//!
//! Tables are persistent maps: [`Snapshot::with`] shares everything that did not change, so that a
//! change of one endpoint among 100,000 workloads copies a path of a tree and not a table.
//! Iteration order of the hash maps means nothing; decisions never depend on it.

use std::net::IpAddr;
use std::sync::Arc;

use rpds::{HashTrieMapSync, RedBlackTreeMapSync, RedBlackTreeSetSync};
use rustc_hash::FxBuildHasher;

use crate::http::{ServiceRoutes, Subset, SubsetKey};
use crate::{
    NetworkAddress, NetworkMode, Policy, PolicyKey, Scope, Service, ServiceKey, ServicePort, Str,
    Vip, Workload, WorkloadUid,
};

/// Keys come from the control plane, not from peers: a fast hash without a random seed will do, and
/// keeps this crate free of random sources.
type Map<K, V> = HashTrieMapSync<K, V, FxBuildHasher>;

/// Which push of the control plane this configuration stands at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConfigVersion {
    /// Changes when the control plane starts anew.
    pub epoch: u64,
    /// Counts pushes within an epoch. 0: nothing received yet, or a control plane without markers.
    pub number: u64,
}

impl std::fmt::Display for ConfigVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:x}.{}", self.epoch, self.number)
    }
}

/// One workload as an endpoint of one service.
#[derive(Clone, Debug)]
pub struct Endpoint {
    pub workload: Arc<Workload>,
    /// What the workload serves for this service.
    pub ports: Arc<[ServicePort]>,
}

/// The endpoints of a service, ordered by workload uid.
pub type Endpoints = RedBlackTreeMapSync<WorkloadUid, Endpoint>;

/// One change of the configuration.
#[derive(Clone, Debug)]
pub enum Change {
    SetWorkload(Arc<Workload>),
    RemoveWorkload(WorkloadUid),
    SetService(Arc<Service>),
    RemoveService(ServiceKey),
    SetPolicy(Arc<Policy>),
    RemovePolicy(PolicyKey),
    SetRoutes(Arc<ServiceRoutes>),
    /// By their Service.
    RemoveRoutes(ServiceKey),
    SetSubset(Arc<Subset>),
    RemoveSubset(SubsetKey),
    SetVersion(ConfigVersion),
}

/// The policies that apply to a workload, and those it names that nobody has.
#[derive(Debug, Default)]
pub struct PoliciesOf<'a> {
    pub found: Vec<&'a Arc<Policy>>,
    /// References without a policy: the decision must not be "allow" while this is not empty.
    pub missing: Vec<&'a PolicyKey>,
}

/// See the module.
#[derive(Clone)]
pub struct Snapshot {
    workloads: Map<WorkloadUid, Arc<Workload>>,
    /// Usually one; several when the control plane holds one address twice.
    by_address: Map<NetworkAddress, Arc<[WorkloadUid]>>,
    by_name: Map<(Str, Str), WorkloadUid>,
    services: Map<ServiceKey, Arc<Service>>,
    endpoints: Map<ServiceKey, Endpoints>,
    by_vip: Map<NetworkAddress, RedBlackTreeSetSync<ServiceKey>>,
    /// Host names in lower case; usually one service, several when namespaces describe the same host.
    by_hostname: Map<Str, RedBlackTreeSetSync<ServiceKey>>,
    /// Services with address ranges, few; longest prefix wins.
    by_range: RedBlackTreeMapSync<(ServiceKey, u32), Vip>,
    policies: Map<PolicyKey, Arc<Policy>>,
    by_scope: Map<Str, RedBlackTreeSetSync<PolicyKey>>,
    global: RedBlackTreeSetSync<PolicyKey>,
    /// Waypoints only; node proxies do not ask for these.
    routes: Map<ServiceKey, Arc<ServiceRoutes>>,
    subsets: Map<SubsetKey, Arc<Subset>>,
    version: ConfigVersion,
}

impl Default for Snapshot {
    fn default() -> Self {
        fn map<K: Eq + std::hash::Hash, V>() -> Map<K, V> {
            Map::new_with_hasher_and_ptr_kind(FxBuildHasher)
        }
        Self {
            workloads: map(),
            by_address: map(),
            by_name: map(),
            services: map(),
            endpoints: map(),
            by_vip: map(),
            by_hostname: map(),
            by_range: RedBlackTreeMapSync::new_sync(),
            policies: map(),
            by_scope: map(),
            global: RedBlackTreeSetSync::new_sync(),
            routes: map(),
            subsets: map(),
            version: ConfigVersion::default(),
        }
    }
}

impl std::fmt::Debug for Snapshot {
    /// Sizes only: a mesh does not belong into a log line.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Snapshot")
            .field("version", &self.version)
            .field("workloads", &self.workloads.size())
            .field("services", &self.services.size())
            .field("policies", &self.policies.size())
            .finish()
    }
}

impl Snapshot {
    /// This snapshot with the changes applied in order. Cheap to clone before: all tables are shared.
    pub fn with(&self, changes: impl IntoIterator<Item = Change>) -> Self {
        let mut next = self.clone();
        for change in changes {
            match change {
                Change::SetWorkload(w) => next.set_workload(w),
                Change::RemoveWorkload(uid) => next.remove_workload(&uid),
                Change::SetService(s) => next.set_service(s),
                Change::RemoveService(key) => next.remove_service(&key),
                Change::SetPolicy(p) => next.set_policy(p),
                Change::RemovePolicy(key) => next.remove_policy(&key),
                Change::SetRoutes(r) => next.routes.insert_mut(r.service.clone(), r),
                Change::RemoveRoutes(key) => {
                    next.routes.remove_mut(&key);
                }
                Change::SetSubset(s) => next.subsets.insert_mut(s.key.clone(), s),
                Change::RemoveSubset(key) => {
                    next.subsets.remove_mut(&key);
                }
                Change::SetVersion(v) => next.version = v,
            }
        }
        next
    }

    pub fn version(&self) -> ConfigVersion {
        self.version
    }

    pub fn workload(&self, uid: &WorkloadUid) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }

    /// The workload of a pod on this cluster, by namespace and name.
    pub fn workload_named(&self, namespace: &Str, name: &Str) -> Option<&Arc<Workload>> {
        self.by_name.get(&(namespace.clone(), name.clone())).and_then(|uid| self.workload(uid))
    }

    /// The workload at an address. Should the control plane hold an address twice, the healthy one
    /// with the smallest uid answers, so that every proxy picks the same.
    pub fn workload_at(&self, network: &Str, ip: IpAddr) -> Option<&Arc<Workload>> {
        let key = NetworkAddress { network: network.clone(), ip };
        let uids = self.by_address.get(&key)?;
        let all = || uids.iter().filter_map(|uid| self.workload(uid));
        all().find(|w| w.health == crate::Health::Healthy).or_else(|| all().next())
    }

    pub fn service(&self, key: &ServiceKey) -> Option<&Arc<Service>> {
        self.services.get(key)
    }

    /// The service at a virtual address: an exact address before the longest range. Should two
    /// services claim one address, the smallest key answers everywhere.
    pub fn service_at(&self, network: &Str, ip: IpAddr) -> Option<&Arc<Service>> {
        let key = NetworkAddress { network: network.clone(), ip };
        if let Some(service) = self.by_vip.get(&key).and_then(|keys| keys.first()) {
            return self.services.get(service);
        }
        self.by_range
            .iter()
            .filter(|(_, vip)| {
                vip.network == *network
                    && crate::IpPrefix { ip: vip.ip, length: vip.prefix }.contains(ip)
            })
            // The first of the longest: iteration is ordered by key.
            .max_by(|(a, x), (b, y)| x.prefix.cmp(&y.prefix).then_with(|| b.cmp(a)))
            .and_then(|((service, _), _)| self.services.get(service))
    }

    /// The services of a host name, in the order of their namespaces. `hostname` in lower case.
    pub fn services_named(&self, hostname: &str) -> impl Iterator<Item = &Arc<Service>> {
        let keys = self.by_hostname.get(hostname).into_iter().flat_map(|keys| keys.iter());
        keys.filter_map(|key| self.services.get(key))
    }

    /// The endpoints of a service; `None` when it has none.
    pub fn endpoints(&self, key: &ServiceKey) -> Option<&Endpoints> {
        self.endpoints.get(key)
    }

    pub fn policy(&self, key: &PolicyKey) -> Option<&Arc<Policy>> {
        self.policies.get(key)
    }

    /// What is known about HTTP to a service. `None`: nothing, it is a plain Service.
    pub fn routes(&self, key: &ServiceKey) -> Option<&Arc<ServiceRoutes>> {
        self.routes.get(key)
    }

    /// `None`: a route that names it must answer with an error.
    pub fn subset(&self, key: &SubsetKey) -> Option<&Arc<Subset>> {
        self.subsets.get(key)
    }

    pub fn all_routes(&self) -> impl Iterator<Item = &Arc<ServiceRoutes>> {
        self.routes.values()
    }

    pub fn subsets(&self) -> impl Iterator<Item = &Arc<Subset>> {
        self.subsets.values()
    }

    /// Every policy that applies to a workload: mesh, namespace, and those it lists.
    pub fn policies_of<'a>(&'a self, workload: &'a Workload) -> PoliciesOf<'a> {
        let mut of = PoliciesOf::default();
        let scoped = self.by_scope.get(&workload.namespace);
        let indexed = self.global.iter().chain(scoped.into_iter().flat_map(|set| set.iter()));
        of.found.extend(indexed.filter_map(|key| self.policies.get(key)));
        for key in workload.policies.iter() {
            match self.policies.get(key) {
                // A policy whose scope is wider than a selector is already in the list.
                Some(p) if p.scope == Scope::WorkloadSelector => of.found.push(p),
                Some(_) => {}
                None => of.missing.push(key),
            }
        }
        of
    }

    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    pub fn policies(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.policies.values()
    }

    fn set_workload(&mut self, workload: Arc<Workload>) {
        // Endpoint changes are the common case: skip the address index when addresses stay.
        if let Some(old) = self.workloads.get(&workload.uid).cloned() {
            if old == workload {
                return;
            }
            self.unlink_workload(&old);
        }
        let uid = workload.uid.clone();
        if workload.network_mode == NetworkMode::Standard {
            for ip in workload.addresses.iter() {
                let key = NetworkAddress { network: workload.network.clone(), ip: *ip };
                let mut uids: Vec<_> =
                    self.by_address.get(&key).map(|u| u.to_vec()).unwrap_or_default();
                uids.push(uid.clone());
                uids.sort_unstable();
                self.by_address.insert_mut(key, uids.into());
            }
        }
        self.by_name.insert_mut((workload.namespace.clone(), workload.name.clone()), uid.clone());
        for (service, ports) in workload.services.iter() {
            let mut endpoints =
                self.endpoints.get(service).cloned().unwrap_or_else(Endpoints::new_sync);
            endpoints.insert_mut(
                uid.clone(),
                Endpoint { workload: workload.clone(), ports: ports.clone() },
            );
            self.endpoints.insert_mut(service.clone(), endpoints);
        }
        self.workloads.insert_mut(uid, workload);
    }

    fn remove_workload(&mut self, uid: &WorkloadUid) {
        if let Some(old) = self.workloads.get(uid).cloned() {
            self.unlink_workload(&old);
            self.workloads.remove_mut(uid);
        }
    }

    fn unlink_workload(&mut self, old: &Workload) {
        for ip in old.addresses.iter() {
            let key = NetworkAddress { network: old.network.clone(), ip: *ip };
            let Some(uids) = self.by_address.get(&key) else { continue };
            let rest: Vec<_> = uids.iter().filter(|uid| **uid != old.uid).cloned().collect();
            if rest.is_empty() {
                self.by_address.remove_mut(&key);
            } else {
                self.by_address.insert_mut(key, rest.into());
            }
        }
        let name = (old.namespace.clone(), old.name.clone());
        if self.by_name.get(&name) == Some(&old.uid) {
            self.by_name.remove_mut(&name);
        }
        for (service, _) in old.services.iter() {
            let Some(mut endpoints) = self.endpoints.get(service).cloned() else { continue };
            endpoints.remove_mut(&old.uid);
            if endpoints.is_empty() {
                self.endpoints.remove_mut(service);
            } else {
                self.endpoints.insert_mut(service.clone(), endpoints);
            }
        }
    }

    fn set_service(&mut self, service: Arc<Service>) {
        self.remove_service(&service.key);
        for (index, vip) in (0..).zip(service.vips.iter()) {
            if is_single(vip) {
                let key = NetworkAddress { network: vip.network.clone(), ip: vip.ip };
                let mut keys =
                    self.by_vip.get(&key).cloned().unwrap_or_else(RedBlackTreeSetSync::new_sync);
                keys.insert_mut(service.key.clone());
                self.by_vip.insert_mut(key, keys);
            } else {
                self.by_range.insert_mut((service.key.clone(), index), vip.clone());
            }
        }
        let hostname = lower(&service.key.hostname);
        let mut keys =
            self.by_hostname.get(&hostname).cloned().unwrap_or_else(RedBlackTreeSetSync::new_sync);
        keys.insert_mut(service.key.clone());
        self.by_hostname.insert_mut(hostname, keys);
        self.services.insert_mut(service.key.clone(), service);
    }

    fn remove_service(&mut self, key: &ServiceKey) {
        let Some(old) = self.services.get(key).cloned() else { return };
        for (index, vip) in (0..).zip(old.vips.iter()) {
            if !is_single(vip) {
                self.by_range.remove_mut(&(key.clone(), index));
                continue;
            }
            let address = NetworkAddress { network: vip.network.clone(), ip: vip.ip };
            let Some(mut keys) = self.by_vip.get(&address).cloned() else { continue };
            keys.remove_mut(key);
            if keys.is_empty() {
                self.by_vip.remove_mut(&address);
            } else {
                self.by_vip.insert_mut(address, keys);
            }
        }
        let hostname = lower(&key.hostname);
        if let Some(mut keys) = self.by_hostname.get(&hostname).cloned() {
            keys.remove_mut(key);
            if keys.is_empty() {
                self.by_hostname.remove_mut(&hostname);
            } else {
                self.by_hostname.insert_mut(hostname, keys);
            }
        }
        self.services.remove_mut(key);
    }

    fn set_policy(&mut self, policy: Arc<Policy>) {
        self.remove_policy(&policy.key);
        match policy.scope {
            Scope::Global => self.global.insert_mut(policy.key.clone()),
            Scope::Namespace => {
                let namespace = policy.key.namespace.clone();
                let mut keys = self
                    .by_scope
                    .get(&namespace)
                    .cloned()
                    .unwrap_or_else(RedBlackTreeSetSync::new_sync);
                keys.insert_mut(policy.key.clone());
                self.by_scope.insert_mut(namespace, keys);
            }
            Scope::WorkloadSelector => {}
        }
        self.policies.insert_mut(policy.key.clone(), policy);
    }

    fn remove_policy(&mut self, key: &PolicyKey) {
        self.global.remove_mut(key);
        if let Some(mut keys) = self.by_scope.get(&key.namespace).cloned()
            && keys.remove_mut(key)
        {
            self.by_scope.insert_mut(key.namespace.clone(), keys);
        }
        self.policies.remove_mut(key);
    }
}

/// Host names compare without case; nearly all are in lower case already and stay shared.
fn lower(hostname: &Str) -> Str {
    if hostname.bytes().any(|b| b.is_ascii_uppercase()) {
        hostname.to_ascii_lowercase().into()
    } else {
        hostname.clone()
    }
}

fn is_single(vip: &Vip) -> bool {
    vip.prefix == if vip.ip.is_ipv4() { 32 } else { 128 }
}

#[cfg(test)]
mod tests;
