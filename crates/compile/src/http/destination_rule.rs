//! DestinationRules: named subsets of a Service's endpoints.
//!
//! Which objects count: those in the Service's own namespace; where there are none, those in the root namespace. A namespace
//! does not name parts of somebody else's Service.
//!
//! Invariants: a subset is made of endpoints of its Service only; its name is safe as a part of a key; the oldest of several
//! with one name stays.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use model::http::{Subset, SubsetKey};
use model::{ServiceKey, Str, Workload, WorkloadUid};

use super::hosts::{self, Host};
use crate::context::Context;
use crate::diagnostics::{Code, Diagnostic};
use crate::istio::DestinationRule;
use crate::istio::destination_rule::DestinationRuleSpec;
use crate::object::{Objects, Sourced, age};
use crate::selection::ByLabel;
use crate::services::{self, ByNamespace};
use crate::validate::{Report, label_name};

type Entry<'a> = (&'a (Str, Str), &'a Sourced<DestinationRule>);
/// A Service and the objects that count for it, oldest first.
type Of<'a> = (&'a services::Compiled, Vec<Entry<'a>>);
type Labels = BTreeMap<String, String>;

/// All subsets that are in force, by key.
pub(crate) fn subsets(
    objects: &Objects,
    services: &ByNamespace,
    workloads: &[Arc<Workload>],
    cx: &mut Context<'_>,
) -> Vec<Arc<Subset>> {
    let rules = by_service(objects, services, cx);
    let endpoints = Endpoints::of(&rules, objects, workloads);
    let mut subsets = BTreeMap::new();
    for (service, rules) in rules {
        let key = &service.service.key;
        for (name, labels) in named(key, &rules, cx) {
            let members = endpoints.selected(service, labels);
            let key = SubsetKey { service: key.clone(), name: cx.share(name) };
            subsets.insert(key.clone(), Arc::new(Subset { key, workloads: members }));
        }
    }
    subsets.into_values().collect()
}

/// The Service that an object is for.
pub(crate) fn service_of<'a>(
    key: &(Str, Str),
    object: &DestinationRule,
    services: &'a ByNamespace,
    cx: &Context<'_>,
) -> Option<&'a services::Compiled> {
    match hosts::read(&object.spec.host, &key.0, &cx.config.cluster_domain) {
        Host::Service { namespace, name } => services::find(services, namespace, name),
        Host::Wildcard | Host::Other => None,
    }
}

/// What selects the endpoints of a Service with these labels. `None`: the Service wants one of them another way.
pub(crate) fn selector(service: &services::Compiled, labels: &Labels) -> Option<Labels> {
    let mut selector = service.selector.clone();
    for (name, value) in labels {
        if selector.insert(name.clone(), value.clone()).is_some_and(|wanted| wanted != *value) {
            return None;
        }
    }
    Some(selector)
}

/// What an API server would refuse.
pub(crate) fn validate(spec: &DestinationRuleSpec, report: Report<'_>) {
    if spec.host.is_empty() {
        report("spec.host".into(), "missing: name a Service".into());
    }
    let mut names = BTreeMap::new();
    for (i, subset) in spec.subsets.iter().enumerate() {
        let field = format!("spec.subsets[{i}].name");
        if let Err(message) = label_name(&subset.name) {
            report(field, message);
        } else if let Some(first) = names.insert(subset.name.as_str(), i) {
            report(field, format!("spec.subsets[{first}] has the same name"));
        }
    }
}

/// The Services with objects that count for them.
fn by_service<'a>(
    objects: &'a Objects,
    services: &'a ByNamespace,
    cx: &mut Context<'_>,
) -> Vec<Of<'a>> {
    let mut by_age: Vec<Entry<'a>> = objects.destination_rules.iter().collect();
    by_age.sort_by(|a, b| age(a.0, a.1).cmp(&age(b.0, b.1)));
    let root = cx.config.root_namespace.clone();
    let mut own: BTreeMap<&ServiceKey, Of<'a>> = BTreeMap::new();
    let mut wide: BTreeMap<&ServiceKey, Of<'a>> = BTreeMap::new();
    for (key, sourced) in by_age {
        let Some(service) = service((key, sourced), services, cx) else { continue };
        // Diagnosed by its field.
        if !sourced.value.spec.workload_selector.is_null() {
            continue;
        }
        let namespace = &service.service.key.namespace;
        let list = if *namespace == key.0 {
            &mut own
        } else if key.0 == root {
            &mut wide
        } else {
            let message = format!(
                "has no effect: only rules in namespace {namespace} (the Service's) or {root} name its parts"
            );
            let d = Diagnostic::warning(Code::NoEffect, message).field("spec.host");
            cx.report(key, sourced, d.help("move it there"));
            continue;
        };
        list.entry(&service.service.key)
            .or_insert_with(|| (service, Vec::new()))
            .1
            .push((key, sourced));
    }
    for (service, (compiled, rules)) in wide {
        if own.contains_key(service) {
            for (key, sourced) in rules {
                let message = format!("has no effect: {service} has rules in its own namespace");
                cx.report(
                    key,
                    sourced,
                    Diagnostic::info(Code::NoEffect, message).field("spec.host"),
                );
            }
        } else {
            own.insert(service, (compiled, rules));
        }
    }
    own.into_values().collect()
}

fn service<'a>(
    (key, sourced): Entry<'a>,
    services: &'a ByNamespace,
    cx: &mut Context<'_>,
) -> Option<&'a services::Compiled> {
    if let Some(service) = service_of(key, &sourced.value, services, cx) {
        return Some(service);
    }
    let host = sourced.value.spec.host.as_str();
    let domain = cx.config.cluster_domain.clone();
    let d = match hosts::read(host, &key.0, &domain) {
        Host::Service { namespace, name } => {
            let message = format!("there is no Service {namespace}/{name}");
            Diagnostic::warning(Code::DanglingReference, message).help("add it, or mend the name")
        }
        Host::Wildcard => {
            Diagnostic::error(Code::Unsupported, "wildcards are not handled: it is for no Service")
                .help("write one DestinationRule for each Service")
        }
        Host::Other => {
            let message = format!("{host:.80?} is no Service of the cluster");
            Diagnostic::warning(Code::DanglingReference, message).help(hosts::help(host, &domain))
        }
    };
    cx.report(key, sourced, d.field("spec.host"));
    None
}

/// The subsets by name.
fn named<'a>(
    service: &ServiceKey,
    rules: &[Entry<'a>],
    cx: &mut Context<'_>,
) -> BTreeMap<&'a str, &'a Labels> {
    let mut named: BTreeMap<&str, (Entry<'_>, &Labels)> = BTreeMap::new();
    for &(key, sourced) in rules {
        for (i, subset) in sourced.value.spec.subsets.iter().enumerate() {
            // The edge refuses these; what comes around it is not in force.
            if label_name(&subset.name).is_err() {
                continue;
            }
            let Some(((winner, first), _)) = named.get(subset.name.as_str()) else {
                named.insert(&subset.name, ((key, sourced), &subset.labels));
                continue;
            };
            let message = format!(
                "DestinationRule/{}/{} ({}) is older and has a subset {:?} of {service}; this has no effect",
                winner.0, winner.1, first.origin, subset.name
            );
            let d = Diagnostic::warning(Code::ConflictingPolicies, message)
                .field(format!("spec.subsets[{i}].name"));
            cx.report(key, sourced, d);
        }
    }
    named.into_iter().map(|(name, (_, labels))| (name, labels)).collect()
}

/// Pods by label, of the namespaces in which there are subsets.
struct Endpoints<'a>(BTreeMap<&'a str, ByLabel<'a, &'a Workload>>);

impl<'a> Endpoints<'a> {
    fn of(rules: &[Of<'a>], objects: &'a Objects, workloads: &'a [Arc<Workload>]) -> Self {
        let namespaces = rules.iter().map(|(s, _)| (&*s.service.key.namespace, ByLabel::default()));
        let mut by_namespace: BTreeMap<&str, ByLabel<'a, &'a Workload>> = namespaces.collect();
        for workload in workloads {
            let Some(pods) = by_namespace.get_mut(&*workload.namespace) else { continue };
            let key = (workload.namespace.clone(), workload.name.clone());
            if let Some(pod) = objects.pods.get(&key) {
                pods.add(&pod.value.metadata.labels, &**workload);
            }
        }
        Self(by_namespace)
    }

    /// The endpoints of a Service with these labels.
    fn selected(&self, service: &services::Compiled, labels: &Labels) -> BTreeSet<WorkloadUid> {
        let key = &service.service.key;
        let Some(pods) = self.0.get(&*key.namespace) else { return BTreeSet::new() };
        let Some(selector) = selector(service, labels) else { return BTreeSet::new() };
        let endpoints =
            pods.selected(&selector).filter(|w| w.services.iter().any(|(s, _)| s == key));
        endpoints.map(|w| w.uid.clone()).collect()
    }
}

#[cfg(test)]
mod tests;
