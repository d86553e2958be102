//! Which names the mesh itself answers for a pod, and with which addresses.
//!
//! The answer is what the cluster's own DNS would say, from the same configuration that decides about connections, plus
//! the hosts of `ServiceEntry`, which the cluster's DNS does not know. Whatever is not known here for certain is
//! forwarded, never denied: the proxy cannot tell "does not exist" from "I was not told".
//!
//! Invariants: a bounded number of table look-ups per question, no walk over services; a name that is answered for one
//! family is never forwarded for the other, so that a client that asks for both gets both from the mesh; only addresses
//! of the client's network are given out.

use std::net::IpAddr;
use std::sync::Arc;

use model::{Health, HealthPolicy, Service, Snapshot, Str, Vip, Workload, WorkloadKind};

/// Addresses in one answer. A thousand IPv6 records are 28 KB, within what DNS by TCP carries; clients use the first few.
pub const MAX_ADDRESSES: usize = 1000;
/// Wildcard hosts tried for a name, from the longest on. Names with more labels are generated, not called.
const MAX_PARENTS: usize = 16;

/// A question for addresses.
#[derive(Clone, Copy, Debug)]
pub struct DnsFacts<'a> {
    /// The client's namespace: short names are looked for there.
    pub namespace: &'a str,
    /// The client's network: addresses elsewhere mean nothing to it.
    pub network: &'a Str,
    /// The zone of the cluster, for example `cluster.local`.
    pub cluster_domain: &'a str,
    /// The name, in lower case and without the last dot.
    pub name: &'a str,
    /// AAAA, not A.
    pub ipv6: bool,
}

/// What to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DnsAnswer {
    /// These, in this order; at least one.
    Addresses {
        service: Arc<Service>,
        addresses: Vec<IpAddr>,
        /// Addresses of pods, which come and go, and not of the service.
        of_pods: bool,
    },
    /// The name exists and has no address of this family.
    NoData { service: Arc<Service> },
    /// Not a name of the mesh, or not one that can be answered here: the cluster's DNS may know.
    Forward,
}

/// Answers a question. `rand` rotates the addresses of pods, so that clients that take the first one spread.
pub fn resolve(snapshot: &Snapshot, facts: &DnsFacts<'_>, rand: u64) -> DnsAnswer {
    if let Some(service) = named(snapshot, facts, facts.name) {
        return of_service(snapshot, facts, service, rand);
    }
    if in_zone(facts.name, facts.cluster_domain) {
        return of_pod(snapshot, facts, facts.name);
    }
    let Some(full) = expanded(facts) else { return of_wildcard(snapshot, facts, rand) };
    if let Some(service) = named(snapshot, facts, &full) {
        return of_service(snapshot, facts, service, rand);
    }
    match of_pod(snapshot, facts, &full) {
        // `pod.service` in the client's namespace, which looks like `service.namespace`.
        DnsAnswer::Forward if facts.name.split('.').count() == 2 => {
            let full = format!("{}.{}.svc.{}", facts.name, facts.namespace, facts.cluster_domain);
            match of_pod(snapshot, facts, &full) {
                DnsAnswer::Forward => of_wildcard(snapshot, facts, rand),
                answer => answer,
            }
        }
        DnsAnswer::Forward => of_wildcard(snapshot, facts, rand),
        answer => answer,
    }
}

/// The service of a full host name. Several namespaces may describe one host: the client's own goes first, then the one
/// that the name itself says, then the first by name, so that every proxy answers the same.
fn named<'a>(snapshot: &'a Snapshot, facts: &DnsFacts<'_>, name: &str) -> Option<&'a Arc<Service>> {
    let of_name = service_and_namespace(name, facts.cluster_domain).map(|(_, ns)| ns);
    snapshot.services_named(name).min_by_key(|service| {
        let namespace = &*service.key.namespace;
        (namespace != facts.namespace, Some(namespace) != of_name)
    })
}

/// The full form of a short name: `service`, `service.namespace`, `pod.service.namespace`, each also with `.svc` behind a
/// namespace. `None`: too many labels for one.
fn expanded(facts: &DnsFacts<'_>) -> Option<String> {
    let DnsFacts { name, namespace, cluster_domain, .. } = *facts;
    let with_svc = name.strip_suffix(".svc");
    let labels = with_svc.unwrap_or(name).split('.').count();
    match (with_svc, labels) {
        (Some(_), 2 | 3) => Some(format!("{name}.{cluster_domain}")),
        (None, 1) => Some(format!("{name}.{namespace}.svc.{cluster_domain}")),
        (None, 2 | 3) => Some(format!("{name}.svc.{cluster_domain}")),
        _ => None,
    }
}

fn of_service(
    snapshot: &Snapshot,
    facts: &DnsFacts<'_>,
    service: &Arc<Service>,
    rand: u64,
) -> DnsAnswer {
    if !service.vips.is_empty() {
        let own = |vip: &&Vip| vip.network == *facts.network && is_single(vip);
        let addresses = service.vips.iter().filter(own).map(|vip| vip.ip).collect();
        return of_family(facts, service, addresses, false);
    }
    // A Service of the cluster without addresses is headless: its pods answer. A `ServiceEntry` without addresses names
    // a host that the world's DNS knows.
    if service_and_namespace(&service.key.hostname, facts.cluster_domain).is_none() {
        return DnsAnswer::Forward;
    }
    let endpoints = snapshot.endpoints(&service.key).into_iter().flat_map(|all| all.values());
    let serving = endpoints.filter(|e| serves(service, &e.workload, facts));
    let mut addresses: Vec<IpAddr> =
        serving.flat_map(|e| e.workload.addresses.iter().copied()).collect();
    addresses.sort_unstable();
    addresses.dedup();
    // Nobody there: whether that is an empty answer or none is the cluster's DNS to say.
    if addresses.is_empty() {
        return DnsAnswer::Forward;
    }
    let by = usize::try_from(rand % addresses.len() as u64).unwrap_or_default();
    addresses.rotate_left(by);
    of_family(facts, service, addresses, true)
}

/// `POD.SERVICE.NAMESPACE.svc.ZONE`, for pods of a `StatefulSet` behind a headless Service. Other pods with a host name of
/// their own are not known here as such, and the cluster's DNS answers for them.
fn of_pod(snapshot: &Snapshot, facts: &DnsFacts<'_>, name: &str) -> DnsAnswer {
    let Some((pod, host)) = name.split_once('.') else { return DnsAnswer::Forward };
    let Some((_, namespace)) = service_and_namespace(host, facts.cluster_domain) else {
        return DnsAnswer::Forward;
    };
    let mut services = snapshot.services_named(host);
    let Some(service) = services.find(|s| *s.key.namespace == *namespace && s.vips.is_empty())
    else {
        return DnsAnswer::Forward;
    };
    let Some(workload) = snapshot.workload_named(&service.key.namespace, &pod.into()) else {
        return DnsAnswer::Forward;
    };
    let is_endpoint = workload.services.iter().any(|(key, _)| *key == service.key);
    if !is_endpoint || !is_of_stateful_set(workload) || !serves(service, workload, facts) {
        return DnsAnswer::Forward;
    }
    of_family(facts, service, workload.addresses.to_vec(), true)
}

/// A `ServiceEntry` for `*.example.com`: the longest that fits.
fn of_wildcard(snapshot: &Snapshot, facts: &DnsFacts<'_>, rand: u64) -> DnsAnswer {
    let mut rest = facts.name;
    for _ in 0..MAX_PARENTS {
        let Some((_, parent)) = rest.split_once('.') else { break };
        if let Some(service) = named(snapshot, facts, &format!("*.{parent}")) {
            return of_service(snapshot, facts, service, rand);
        }
        rest = parent;
    }
    DnsAnswer::Forward
}

fn of_family(
    facts: &DnsFacts<'_>,
    service: &Arc<Service>,
    mut addresses: Vec<IpAddr>,
    of_pods: bool,
) -> DnsAnswer {
    let service = service.clone();
    if addresses.is_empty() {
        return DnsAnswer::Forward;
    }
    addresses.retain(|ip| ip.is_ipv6() == facts.ipv6);
    addresses.truncate(MAX_ADDRESSES);
    if addresses.is_empty() {
        return DnsAnswer::NoData { service };
    }
    DnsAnswer::Addresses { service, addresses, of_pods }
}

fn serves(service: &Service, workload: &Workload, facts: &DnsFacts<'_>) -> bool {
    let ready = workload.health == Health::Healthy
        || service.load_balancing.health == HealthPolicy::AllowAll;
    ready && workload.network == *facts.network
}

/// A `StatefulSet` names its pods after itself and a number, and gives each its name as host name.
fn is_of_stateful_set(workload: &Workload) -> bool {
    let number = workload.name.strip_prefix(&*workload.workload_name);
    let number = number.and_then(|rest| rest.strip_prefix('-')).unwrap_or_default();
    workload.workload_kind == WorkloadKind::Pod
        && !number.is_empty()
        && number.bytes().all(|b| b.is_ascii_digit())
}

/// A range says where connections may go, not which address a name has.
fn is_single(vip: &Vip) -> bool {
    vip.prefix == if vip.ip.is_ipv4() { 32 } else { 128 }
}

/// The parts of `SERVICE.NAMESPACE.svc.ZONE`.
fn service_and_namespace<'n>(name: &'n str, zone: &str) -> Option<(&'n str, &'n str)> {
    let rest = name.strip_suffix(zone)?.strip_suffix(".svc.")?;
    rest.split_once('.').filter(|(service, ns)| !service.is_empty() && !ns.contains('.'))
}

fn in_zone(name: &str, zone: &str) -> bool {
    name.strip_suffix(zone).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

#[cfg(test)]
mod tests;
