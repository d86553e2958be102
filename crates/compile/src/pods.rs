//! Pods that run become workloads.
//!
//! A pod is a workload once it has an address and until it has ended. What it serves follows from the
//! Services of its namespace that select it; which policies it lists, from theirs.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Pod, PodSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use model::{
    Health, Locality, NetworkMode, PolicyKey, ServiceKey, ServicePort, Str, TunnelProtocol,
    Workload, WorkloadKind, WorkloadUid,
};

use crate::context::Context;
use crate::diagnostics::{Code, Diagnostic};
use crate::enrolment::REDIRECTION;
use crate::object::{Meta, Objects, Sourced, age};
use crate::selection::ByLabel;
use crate::services::{self, Target};

/// Service accounts (namespace, name) by the node on which a pod of theirs runs: who may be given a
/// certificate there.
pub type PodsOnNodes = BTreeMap<Str, BTreeSet<(Str, Str)>>;

/// Which policies a pod lists.
pub(crate) type PoliciesOf<'a> = &'a dyn Fn(&str, &Pod) -> Vec<PolicyKey>;

pub(crate) fn compile(
    objects: &Objects,
    services: &services::ByNamespace,
    policies_of: PoliciesOf<'_>,
    cx: &mut Context<'_>,
) -> Vec<Arc<Workload>> {
    let localities = localities(objects, cx);
    let mut memberships = memberships(objects, services);
    let mut workloads = Vec::new();
    for (key, sourced) in &objects.pods {
        let pod = &*sourced.value;
        let addresses = addresses(pod);
        if has_ended(pod) || addresses.is_empty() {
            continue;
        }
        let mut workload = workload(key, pod, addresses, cx);
        workload.locality = localities.get(&workload.node).cloned().unwrap_or_default();
        workload.services = memberships.remove(key).unwrap_or_default().into();
        workload.policies = policies_of(&key.0, pod).into();
        workloads.push(Arc::new(workload));
    }
    duplicate_addresses(objects, services, cx);
    workloads
}

/// See [`PodsOnNodes`]. Pods without an address count: their certificate is wanted before they start.
/// Pods in the host's network do not: they are never captured.
pub(crate) fn on_nodes(objects: &Objects, cx: &mut Context<'_>) -> PodsOnNodes {
    let mut nodes = PodsOnNodes::new();
    for ((namespace, _), sourced) in &objects.pods {
        let Some(spec) = &sourced.value.spec else { continue };
        let Some(node) = spec.node_name.as_deref().filter(|n| !n.is_empty()) else { continue };
        if has_ended(&sourced.value) || spec.host_network == Some(true) {
            continue;
        }
        let account = (cx.share(namespace), cx.share(service_account(spec)));
        nodes.entry(cx.share(node)).or_default().insert(account);
    }
    nodes
}

/// The service account a pod runs as.
pub(crate) fn service_account(spec: &PodSpec) -> &str {
    // `serviceAccount` is the deprecated name of the same field.
    let named = spec.service_account_name.as_deref().filter(|n| !n.is_empty());
    named.or(spec.service_account.as_deref()).filter(|n| !n.is_empty()).unwrap_or("default")
}

pub(crate) fn has_ended(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

fn addresses(pod: &Pod) -> Vec<IpAddr> {
    let Some(status) = &pod.status else { return Vec::new() };
    let listed = status.pod_ips.iter().flatten().map(|p| &p.ip);
    let mut all: Vec<IpAddr> =
        status.pod_ip.iter().chain(listed).filter_map(|ip| ip.parse().ok()).collect();
    let mut seen = BTreeSet::new();
    all.retain(|ip| seen.insert(*ip));
    all
}

fn workload(key: &(Str, Str), pod: &Pod, addresses: Vec<IpAddr>, cx: &mut Context<'_>) -> Workload {
    let config = cx.config;
    let spec = pod.spec.as_ref();
    let (namespace, name) = key;
    let uid = format!("{}//Pod/{namespace}/{name}", config.cluster);
    let mut workload = Workload::named(uid, cx.share(namespace), name.clone());
    workload.uid = WorkloadUid(workload.uid.0);
    workload.cluster = config.cluster.clone();
    workload.network = config.network.clone();
    workload.trust_domain = config.trust_domain.clone();
    workload.service_account = cx.share(spec.map_or("default", service_account));
    workload.addresses = addresses.into();
    workload.node = cx.share(spec.and_then(|s| s.node_name.as_deref()).unwrap_or_default());
    workload.health = health(pod);
    if spec.is_some_and(|s| s.host_network == Some(true)) {
        workload.network_mode = NetworkMode::HostNetwork;
    } else if pod.label("networking.istio.io/tunnel") == Some("http") {
        workload.protocol = TunnelProtocol::Hbone;
        workload.native_tunnel = true;
    } else if pod.annotation(REDIRECTION) == Some("enabled") {
        workload.protocol = TunnelProtocol::Hbone;
    }
    let (owner, kind) = owner(pod, name);
    workload.workload_name = cx.share(&owner);
    workload.workload_kind = kind;
    let first =
        |labels: &[&str]| labels.iter().find_map(|l| pod.label(l).filter(|v| !v.is_empty()));
    let names = ["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"];
    workload.canonical_name = cx.share(first(&names).unwrap_or(&owner));
    let revisions = ["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"];
    workload.canonical_revision = cx.share(first(&revisions).unwrap_or("latest"));
    workload
}

/// A pod takes new connections while it is ready and not on its way out.
fn health(pod: &Pod) -> Health {
    let conditions = pod.status.as_ref().and_then(|s| s.conditions.as_deref()).unwrap_or_default();
    let ready = conditions.iter().any(|c| c.type_ == "Ready" && c.status == "True");
    if ready && pod.metadata.deletion_timestamp.is_none() {
        Health::Healthy
    } else {
        Health::Unhealthy
    }
}

/// Who made the pod: its name and kind, seen through the ReplicaSet or Job in between.
fn owner(pod: &Pod, name: &str) -> (String, WorkloadKind) {
    let owners = pod.metadata.owner_references.as_deref().unwrap_or_default();
    let controller = owners.iter().find(|o| o.controller == Some(true)).or_else(|| owners.first());
    let Some(OwnerReference { kind, name: owner, .. }) = controller else {
        return (name.to_owned(), WorkloadKind::Pod);
    };
    match kind.as_str() {
        "Deployment" => (owner.clone(), WorkloadKind::Deployment),
        "ReplicaSet" => match strip_hash(owner, pod.label("pod-template-hash")) {
            Some(deployment) => (deployment.to_owned(), WorkloadKind::Deployment),
            None => (owner.clone(), WorkloadKind::Pod),
        },
        "CronJob" => (owner.clone(), WorkloadKind::CronJob),
        "Job" => match owner.rsplit_once('-') {
            // Jobs of a CronJob end in the minute they were scheduled for.
            Some((cron, minute))
                if (8..=10).contains(&minute.len())
                    && minute.bytes().all(|b| b.is_ascii_digit())
                    && !cron.is_empty() =>
            {
                (cron.to_owned(), WorkloadKind::CronJob)
            }
            _ => (owner.clone(), WorkloadKind::Job),
        },
        _ => (owner.clone(), WorkloadKind::Pod),
    }
}

/// `web` of `web-5d8f7c9b`, when the hash is the one on the pod.
fn strip_hash<'a>(replica_set: &'a str, hash: Option<&str>) -> Option<&'a str> {
    let (deployment, suffix) = replica_set.rsplit_once('-')?;
    (hash == Some(suffix) && !deployment.is_empty()).then_some(deployment)
}

/// A Service that a pod is an endpoint of, and the ports that it serves for it.
type Membership = (ServiceKey, Arc<[ServicePort]>);

/// A pod with its namespace and name.
type Keyed<'a> = (&'a (Str, Str), &'a Pod);

/// The Services of each pod that some Service selects, in the order of their keys.
fn memberships<'a>(
    objects: &'a Objects,
    services: &services::ByNamespace,
) -> BTreeMap<&'a (Str, Str), Vec<Membership>> {
    let mut pods: BTreeMap<&str, ByLabel<'_, Keyed<'_>>> = BTreeMap::new();
    for (key, sourced) in &objects.pods {
        let pod = &*sourced.value;
        pods.entry(&key.0).or_default().add(&pod.metadata.labels, (key, pod));
    }
    let mut memberships: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for (namespace, services) in services {
        let Some(pods) = pods.get(&**namespace) else { continue };
        for service in services.iter().filter(|s| !s.selector.is_empty()) {
            for (key, pod) in pods.selected(&service.selector) {
                memberships.entry(key).or_default().push(membership(service, pod));
            }
        }
    }
    for of_pod in memberships.values_mut() {
        of_pod.sort_by(|(a, _), (b, _)| a.cmp(b));
    }
    memberships
}

/// The pod as an endpoint of a Service. A named port that the pod does not have is not served by it.
fn membership(compiled: &services::Compiled, pod: &Pod) -> Membership {
    let ports = compiled.service.ports.iter().zip(&compiled.targets);
    let ports = ports.filter_map(|(port, target)| {
        let target_port = match target {
            Target::Number(n) => *n,
            Target::Name(name) => named_port(pod, name)?,
        };
        Some(ServicePort { target_port, ..*port })
    });
    (compiled.service.key.clone(), ports.collect())
}

/// The TCP container port with a name.
pub(crate) fn named_port(pod: &Pod, name: &str) -> Option<u16> {
    let spec = pod.spec.as_ref()?;
    // Init containers that restart run beside the others: Kubernetes' own sidecars.
    let sidecars = spec.init_containers.iter().flatten();
    let sidecars = sidecars.filter(|c| c.restart_policy.as_deref() == Some("Always"));
    let ports = spec.containers.iter().chain(sidecars).flat_map(|c| c.ports.iter().flatten());
    let port = ports
        .filter(|p| p.protocol.as_deref().unwrap_or("TCP") == "TCP")
        .find(|p| p.name.as_deref() == Some(name))?;
    u16::try_from(port.container_port).ok().filter(|p| *p > 0)
}

fn localities(objects: &Objects, cx: &mut Context<'_>) -> BTreeMap<Str, Locality> {
    let mut localities = BTreeMap::new();
    for ((_, name), sourced) in &objects.nodes {
        let node: &Node = &sourced.value;
        let mut label = |name| node.label(name).filter(|v| !v.is_empty()).map(|v| cx.share(v));
        let locality = Locality {
            region: label("topology.kubernetes.io/region"),
            zone: label("topology.kubernetes.io/zone"),
            subzone: label("topology.istio.io/subzone"),
        };
        localities.insert(name.clone(), locality);
    }
    localities
}

/// Two pods with one address: traffic for it reaches one of them, and fails the other's identity check.
/// A pod with a Service's address is never reached.
fn duplicate_addresses(objects: &Objects, services: &services::ByNamespace, cx: &mut Context<'_>) {
    let vips = services.values().flatten().flat_map(|s| {
        s.service
            .vips
            .iter()
            .map(|vip| (vip.ip, format!("Service/{}/{}", s.service.key.namespace, s.service.name)))
    });
    let vips: BTreeMap<IpAddr, String> = vips.collect();
    let mut taken: BTreeMap<IpAddr, (&(Str, Str), &Sourced<Pod>)> = BTreeMap::new();
    let mut by_age: Vec<_> = objects.pods.iter().collect();
    by_age.sort_by(|a, b| age(a.0, a.1).cmp(&age(b.0, b.1)));
    for (key, sourced) in by_age {
        let host = sourced.value.spec.as_ref().is_some_and(|s| s.host_network == Some(true));
        if has_ended(&sourced.value) || host {
            continue;
        }
        for ip in addresses(&sourced.value) {
            if let Some(service) = vips.get(&ip) {
                let message = format!("{ip} is the address of {service}, which gets the traffic");
                let d = Diagnostic::error(Code::DuplicateAddress, message).field("status.podIP");
                cx.report(key, sourced, d);
            }
            let Some((other, first)) = taken.get(&ip) else {
                taken.insert(ip, (key, sourced));
                continue;
            };
            let message =
                format!("{ip} already belongs to Pod/{}/{} ({})", other.0, other.1, first.origin);
            let d = Diagnostic::error(Code::DuplicateAddress, message).field("status.podIP");
            cx.report(key, sourced, d);
        }
    }
}

#[cfg(test)]
mod tests;
