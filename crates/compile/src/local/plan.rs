//! Pods to nodes and addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use model::Str;

use super::addresses::{Assignments, PodAssignment, host};
use super::deployments::{self, Wanted};
use super::{LocalConfig, LocalNode, LocalPlan, PodPlan, gateways, services};
use crate::diagnostics::{self, Code, Diagnostic};
use crate::enrolment::{REDIRECTION, enrolment};
use crate::object::{Meta, ORIGIN_ANNOTATION, Objects, Origin, object_id};

/// What should run, given the user's objects and what was given out before.
///
/// `objects` are the user's alone, without what this plan became earlier.
pub fn plan(objects: &Objects, config: &LocalConfig, assignments: &mut Assignments) -> LocalPlan {
    let mut out = LocalPlan::default();
    let provisioned = gateways::provision(objects, config, &mut out.diagnostics);
    let objects = &*provisioned.objects;
    let candidates = candidates(objects, &mut out.diagnostics);
    let wanted: BTreeMap<&str, &str> =
        candidates.iter().map(|c| (c.id.as_str(), c.hash.as_str())).collect();
    let gone = |(id, a): (&String, &PodAssignment)| {
        (wanted.get(id.as_str()) != Some(&a.hash.as_str())).then(|| id.clone())
    };
    for id in assignments.pods.iter().filter_map(gone).collect::<Vec<_>>() {
        assignments.end(&id);
    }
    let mut scheduler = Scheduler::new(objects, config, assignments);
    for candidate in &candidates {
        scheduler.keep(candidate);
    }
    for candidate in candidates {
        match scheduler.place(&candidate) {
            Ok((node, host)) => out.pods.push(pod_plan(candidate, objects, config, node, host)),
            Err(d) => out.diagnostics.push(candidate.locate(*d)),
        }
    }
    out.services = services::plan(objects, config, assignments, &mut out.diagnostics);
    out.made = provisioned.made;
    diagnostics::sort(&mut out.diagnostics);
    out
}

/// A pod that should run somewhere.
struct Candidate<'a> {
    /// `namespace/name`.
    id: String,
    pod: Pod,
    hash: String,
    /// The Deployment.
    owner: Option<&'a (Str, Str)>,
    origin: &'a Origin,
}

impl Candidate<'_> {
    fn host_network(&self) -> bool {
        self.pod.spec.as_ref().is_some_and(|s| s.host_network == Some(true))
    }

    fn pinned(&self) -> Option<&str> {
        self.pod.spec.as_ref()?.node_name.as_deref().filter(|n| !n.is_empty())
    }

    fn locate(&self, diagnostic: Diagnostic) -> Diagnostic {
        let (object, prefix) = match self.owner {
            Some((namespace, name)) => (object_id("Deployment", namespace, name), "spec.template."),
            None => (format!("Pod/{}", self.id), ""),
        };
        let field = format!("{prefix}{}", diagnostic.field);
        let origin = self.origin.at(&field);
        diagnostic.object(object).field(field).origin(origin)
    }
}

fn candidates<'a>(objects: &'a Objects, diagnostics: &mut Vec<Diagnostic>) -> Vec<Candidate<'a>> {
    let mut all = Vec::new();
    let mut names: BTreeSet<(Str, Str)> = objects.pods.keys().cloned().collect();
    for ((namespace, name), sourced) in &objects.pods {
        let mut pod = (*sourced.value).clone();
        pod.status = None;
        // Labels and annotations of a pod may change while it runs; what it runs may not.
        let hash = deployments::letters(deployments::hash_of(&pod.spec), 9);
        let id = format!("{namespace}/{name}");
        all.push(Candidate { id, pod, hash, owner: None, origin: &sourced.origin });
    }
    for (key, sourced) in &objects.deployments {
        let mut found = Vec::new();
        let wanted = deployments::expand(key, sourced, &names, &mut found);
        diagnostics.extend(found.into_iter().map(|d| {
            let origin = sourced.origin.at(&d.field);
            d.object(object_id("Deployment", &key.0, &key.1)).origin(origin)
        }));
        for Wanted { pod, hash } in wanted {
            let name = pod.name().to_owned();
            names.insert((key.0.clone(), name.as_str().into()));
            let id = format!("{}/{name}", key.0);
            all.push(Candidate { id, pod, hash, owner: Some(key), origin: &sourced.origin });
        }
    }
    all.sort_by(|a, b| a.id.cmp(&b.id));
    all
}

struct Scheduler<'a> {
    objects: &'a Objects,
    config: &'a LocalConfig,
    assignments: &'a mut Assignments,
    /// Pods on each node, in all and of each owner.
    pods: Vec<usize>,
    owned: BTreeMap<(&'a (Str, Str), usize), usize>,
}

impl<'a> Scheduler<'a> {
    fn new(
        objects: &'a Objects,
        config: &'a LocalConfig,
        assignments: &'a mut Assignments,
    ) -> Self {
        let pods = vec![0; config.nodes.len()];
        Self { objects, config, assignments, pods, owned: BTreeMap::new() }
    }

    /// Counts a pod that stays where it is, before any new one is placed; ends it when it cannot stay.
    fn keep(&mut self, candidate: &Candidate<'a>) {
        let Some(assigned) = self.assignments.pods.get(&candidate.id) else { return };
        let node = self.config.nodes.iter().position(|n| n.name == assigned.node);
        match node.filter(|n| self.fits(candidate, *n)) {
            Some(node) => self.count(candidate, node),
            None => self.assignments.end(&candidate.id),
        }
    }

    fn count(&mut self, candidate: &Candidate<'a>, node: usize) {
        self.pods[node] += 1;
        if let Some(owner) = candidate.owner {
            *self.owned.entry((owner, node)).or_default() += 1;
        }
    }

    /// The node and host number of a pod.
    fn place(&mut self, candidate: &Candidate<'a>) -> Result<(usize, u32), Box<Diagnostic>> {
        if let Some(assigned) = self.assignments.pods.get(&candidate.id) {
            let node = self.config.nodes.iter().position(|n| n.name == assigned.node);
            return Ok((node.unwrap_or_default(), assigned.host));
        }
        let mut nodes: Vec<usize> =
            (0..self.config.nodes.len()).filter(|n| self.fits(candidate, *n)).collect();
        if nodes.is_empty() {
            return Err(Box::new(self.nowhere(candidate)));
        }
        let owned = |n: usize| {
            candidate.owner.and_then(|o| self.owned.get(&(o, n))).copied().unwrap_or_default()
        };
        nodes.sort_by_key(|n| (owned(*n), self.pods[*n], *n));
        for n in nodes {
            let node: &LocalNode = &self.config.nodes[n];
            let host = if candidate.host_network() {
                0
            } else {
                let Some(h) = self.assignments.take_pod_host(&node.name, node.pods_v4) else {
                    continue;
                };
                h
            };
            let (node, hash) = (node.name.clone(), candidate.hash.clone());
            self.assignments.pods.insert(candidate.id.clone(), PodAssignment { node, host, hash });
            self.count(candidate, n);
            return Ok((n, host));
        }
        let message = "no node has a free pod address; the pod is not started";
        let d = Diagnostic::error(Code::AddressesExhausted, message).help("start more nodes");
        Err(Box::new(d))
    }

    /// May the pod run on the node?
    fn fits(&self, candidate: &Candidate<'_>, node: usize) -> bool {
        let name = &self.config.nodes[node].name;
        if let Some(pinned) = candidate.pinned() {
            return pinned == name;
        }
        let selector = candidate.pod.spec.as_ref().and_then(|s| s.node_selector.as_ref());
        selector.into_iter().flatten().all(|(key, value)| {
            let stated = self.objects.node(name).and_then(|n| n.label(key));
            let implied = match key.as_str() {
                "kubernetes.io/hostname" => Some(name.as_str()),
                "kubernetes.io/os" => Some("linux"),
                _ => None,
            };
            stated.or(implied) == Some(value)
        })
    }

    fn nowhere(&self, candidate: &Candidate<'_>) -> Diagnostic {
        let names: Vec<&str> = self.config.nodes.iter().map(|n| n.name.as_str()).collect();
        let help = format!("the nodes are: {}", names.join(", "));
        match candidate.pinned() {
            Some(node) => {
                let message = format!("there is no node {node:?}; the pod is not started");
                Diagnostic::error(Code::Unschedulable, message).field("spec.nodeName").help(help)
            }
            None => {
                let message = "no node has the labels of nodeSelector; the pod is not started";
                Diagnostic::error(Code::Unschedulable, message)
                    .field("spec.nodeSelector")
                    .help(help)
            }
        }
    }
}

fn pod_plan(
    candidate: Candidate<'_>,
    objects: &Objects,
    config: &LocalConfig,
    node_index: usize,
    number: u32,
) -> PodPlan {
    let Candidate { mut pod, hash, owner, origin, .. } = candidate;
    let node = &config.nodes[node_index];
    let spec = pod.spec.get_or_insert_default();
    spec.node_name = Some(node.name.clone());
    spec.service_account_name = Some(crate::pods::service_account(spec).to_owned());
    let host_network = spec.host_network == Some(true);
    let annotations = pod.metadata.annotations.get_or_insert_default();
    // Whether a pod is captured is for the node to say, not for the pod.
    annotations.remove(REDIRECTION);
    annotations.insert(ORIGIN_ANNOTATION.to_owned(), origin.to_string());
    let namespace: Str = pod.metadata.namespace.as_deref().unwrap_or("default").into();
    PodPlan {
        enrolment: enrolment(objects.namespace(&namespace), &pod),
        name: pod.name().into(),
        namespace,
        owner: owner.map(|(_, name)| name.clone()),
        node_index,
        node: node.name.as_str().into(),
        ips: if host_network {
            node.addresses
        } else {
            [host(node.pods_v4, number), host(node.pods_v6, number)]
        },
        origin: origin.to_string(),
        template_hash: hash.into(),
        pod: Arc::new(pod),
    }
}
