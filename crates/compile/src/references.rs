//! Names that refer to nothing, selectors that select nothing, and policies where nobody enforces them.
//!
//! Kubernetes and Istio accept all of these; most are slips, and a policy that protects nothing is the
//! expensive kind.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Namespace, Pod, PodSpec};
use model::{PolicyKey, Scope, Str, StringMatch};

use crate::authorization;
use crate::context::Context;
use crate::diagnostics::{Code, Diagnostic};
use crate::enrolment::enrolment;
use crate::object::{Meta, Objects, Sourced, Table};
use crate::pods::service_account;
use crate::selection::ByLabel;
use crate::services::ByNamespace;
use crate::waypoints::binding::Bindings;
use crate::{http, labels};

/// Namespaces that every cluster has, or that the mesh brings.
const BUILT_IN: [&str; 5] =
    ["default", "kube-system", "kube-public", "kube-node-lease", "istio-system"];

pub(crate) fn check(
    objects: &Objects,
    services: &ByNamespace,
    policies: &[authorization::Compiled],
    bindings: &Bindings<'_>,
    cx: &mut Context<'_>,
) {
    namespaces(&objects.service_accounts, objects, cx);
    let own = own_pods(objects);
    namespaces(&own, objects, cx);
    namespaces(&objects.deployments, objects, cx);
    namespaces(&objects.services, objects, cx);
    namespaces(&objects.authorization_policies, objects, cx);
    namespaces(&objects.peer_authentications, objects, cx);
    namespaces(&objects.gateways, objects, cx);
    namespaces(&objects.reference_grants, objects, cx);
    namespaces(&objects.destination_rules, objects, cx);
    namespaces(&objects.http_faults, objects, cx);
    accounts(&own, objects, cx);
    labels::check(objects, &own, bindings, cx);
    let selectable = Selectable::of(objects);
    service_selectors(objects, services, &selectable, cx);
    subset_labels(objects, services, &selectable, cx);
    policy_selectors(objects, policies, &selectable, cx);
    policy_sources(objects, policies, cx);
}

/// The same of routes.
pub(crate) fn check_routes(objects: &Objects, cx: &mut Context<'_>) {
    namespaces(&objects.http_routes, objects, cx);
    namespaces(&objects.grpc_routes, objects, cx);
    namespaces(&objects.virtual_services, objects, cx);
}

/// Pods that the user wrote: what is wrong with the others is said of their Deployment.
fn own_pods(objects: &Objects) -> Table<Pod> {
    let is_own = |namespace: &Str, pod: &Pod| {
        deployment_of(pod)
            .is_none_or(|d| !objects.deployments.contains_key(&(namespace.clone(), d.into())))
    };
    let pods = objects.pods.iter().filter(|((namespace, _), s)| is_own(namespace, &s.value));
    pods.map(|(key, sourced)| (key.clone(), sourced.clone())).collect()
}

/// Labels of pods: those that run, and those that Deployments without pods would make.
struct Selectable<'a> {
    by_namespace: BTreeMap<&'a str, ByLabel<'a, bool>>,
}

impl<'a> Selectable<'a> {
    fn of(objects: &'a Objects) -> Self {
        let namespaces = objects.namespaces.iter();
        let namespaces: BTreeMap<&str, &Namespace> =
            namespaces.map(|((_, name), sourced)| (&**name, &*sourced.value)).collect();
        let mut by_namespace: BTreeMap<&str, ByLabel<'_, bool>> = BTreeMap::new();
        let mut owners = BTreeSet::new();
        for ((namespace, _), sourced) in &objects.pods {
            let object = namespaces.get(&**namespace).copied();
            let enrolled = enrolment(object, &sourced.value).is_enrolled();
            let labels = &sourced.value.metadata.labels;
            by_namespace.entry(namespace).or_default().add(labels, enrolled);
            owners.extend(deployment_of(&sourced.value).map(|owner| (&**namespace, owner)));
        }
        for ((namespace, name), sourced) in &objects.deployments {
            let template = sourced.value.spec.as_ref().map(|s| &s.template);
            let Some((template, metadata)) = template.and_then(|t| Some((t, t.metadata.as_ref()?)))
            else {
                continue;
            };
            if owners.contains(&(&**namespace, &**name)) {
                continue;
            }
            let mut pod =
                Pod { metadata: metadata.clone(), spec: template.spec.clone(), status: None };
            pod.metadata.namespace = Some(namespace.to_string());
            let object = namespaces.get(&**namespace).copied();
            let enrolled = enrolment(object, &pod).is_enrolled();
            by_namespace.entry(namespace).or_default().add(&metadata.labels, enrolled);
        }
        Self { by_namespace }
    }

    /// Whether each pod that is selected belongs to the mesh.
    fn selected<'s>(
        &'s self,
        namespace: Option<&'s str>,
        labels: &'s BTreeMap<String, String>,
    ) -> impl Iterator<Item = bool> + 's {
        let namespaces =
            self.by_namespace.iter().filter(move |(ns, _)| namespace.is_none_or(|n| n == **ns));
        namespaces.flat_map(|(_, pods)| pods.selected(labels))
    }
}

/// The Deployment a pod belongs to, where pods say so directly.
fn deployment_of(pod: &Pod) -> Option<&str> {
    let owners = pod.metadata.owner_references.iter().flatten();
    owners.into_iter().find(|o| o.kind == "Deployment").map(|o| o.name.as_str())
}

fn exists(namespace: &str, objects: &Objects, cx: &Context<'_>) -> bool {
    BUILT_IN.contains(&namespace)
        || namespace == &*cx.config.root_namespace
        || objects.namespace(namespace).is_some()
}

fn namespaces<T: Meta>(table: &Table<T>, objects: &Objects, cx: &mut Context<'_>) {
    // Those of one namespace stand together.
    let mut last: Option<(&Str, bool)> = None;
    for (key, sourced) in table {
        let known = last.filter(|(name, _)| *name == &key.0);
        let (_, there) =
            *last.insert(known.unwrap_or_else(|| (&key.0, exists(&key.0, objects, cx))));
        if !there {
            let message = format!("there is no Namespace {:?}", &*key.0);
            let d = Diagnostic::warning(Code::DanglingReference, message)
                .field("metadata.namespace")
                .help("a cluster would refuse the object; add the Namespace");
            cx.report(key, sourced, d);
        }
    }
}

fn accounts(own_pods: &Table<Pod>, objects: &Objects, cx: &mut Context<'_>) {
    let missing = |namespace: &Str, spec: Option<&PodSpec>| {
        let name = spec.map_or("default", service_account);
        let there = name == "default"
            || objects.service_accounts.contains_key(&(namespace.clone(), name.into()));
        (!there).then(|| {
            let message = format!("there is no ServiceAccount {namespace}/{name}");
            Diagnostic::warning(Code::DanglingReference, message)
                .help("a cluster would not start the pod; add the ServiceAccount")
        })
    };
    for (key, sourced) in own_pods {
        if let Some(d) = missing(&key.0, sourced.value.spec.as_ref()) {
            cx.report(key, sourced, d.field("spec.serviceAccountName"));
        }
    }
    for (key, sourced) in &objects.deployments {
        let template = sourced.value.spec.as_ref().map(|s| &s.template);
        if let Some(d) = missing(&key.0, template.and_then(|t| t.spec.as_ref())) {
            cx.report(key, sourced, d.field("spec.template.spec.serviceAccountName"));
        }
    }
}

fn service_selectors(
    objects: &Objects,
    services: &ByNamespace,
    selectable: &Selectable<'_>,
    cx: &mut Context<'_>,
) {
    for compiled in services.values().flatten() {
        let key = (compiled.service.key.namespace.clone(), compiled.service.name.clone());
        let Some(sourced) = objects.services.get(&key) else { continue };
        if compiled.selector.is_empty() {
            let message = "no selector: the Service has no endpoints";
            let d = Diagnostic::warning(Code::SelectsNothing, message).field("spec.selector");
            cx.report(&key, sourced, d);
        } else if selectable.selected(Some(&key.0), &compiled.selector).next().is_none() {
            let message = "selects no pod: the Service has no endpoints";
            let d = Diagnostic::warning(Code::SelectsNothing, message).field("spec.selector");
            cx.report(&key, sourced, d.help("compare it with the labels of the pods"));
        }
    }
}

/// Subsets that no pod could ever be in.
fn subset_labels(
    objects: &Objects,
    services: &ByNamespace,
    selectable: &Selectable<'_>,
    cx: &mut Context<'_>,
) {
    for (key, sourced) in &objects.destination_rules {
        let Some(service) = http::destination_rule::service_of(key, &sourced.value, services, cx)
        else {
            continue;
        };
        for (i, subset) in sourced.value.spec.subsets.iter().enumerate() {
            let namespace = Some(&*service.service.key.namespace);
            let selector = http::destination_rule::selector(service, &subset.labels);
            let found =
                selector.is_some_and(|s| selectable.selected(namespace, &s).next().is_some());
            if !found && !service.selector.is_empty() {
                let message =
                    "selects no pod of the Service: requests for the subset are answered with 503";
                let d = Diagnostic::warning(Code::SelectsNothing, message)
                    .field(format!("spec.subsets[{i}].labels"));
                cx.report(key, sourced, d.help("compare them with the labels of the pods"));
            }
        }
    }
}

fn policy_selectors(
    objects: &Objects,
    policies: &[authorization::Compiled],
    selectable: &Selectable<'_>,
    cx: &mut Context<'_>,
) {
    for compiled in policies {
        let PolicyKey { namespace, name } = &compiled.policy.key;
        let key = (namespace.clone(), name.clone());
        let Some(sourced) = objects.authorization_policies.get(&key) else { continue };
        let Some(selection) = &compiled.selection else {
            if compiled.policy.scope == Scope::Namespace {
                whole_namespace(&key, sourced, selectable, cx);
            }
            continue;
        };
        let found = selectable.selected(selection.namespace.as_deref(), &selection.labels);
        judge(&key, sourced, found, cx);
    }
    for (key, sourced) in &objects.peer_authentications {
        let selector = sourced.value.spec.selector.as_ref();
        match selector.map(|s| &s.match_labels).filter(|labels| !labels.is_empty()) {
            Some(labels) => judge(key, sourced, selectable.selected(Some(&key.0), labels), cx),
            None if key.0 == cx.config.root_namespace => {}
            None => whole_namespace(key, sourced, selectable, cx),
        }
    }
}

/// A policy for a namespace of which no pod belongs to the mesh.
fn whole_namespace<T: Meta>(
    key: &(Str, Str),
    sourced: &Sourced<T>,
    selectable: &Selectable<'_>,
    cx: &mut Context<'_>,
) {
    let everything = BTreeMap::new();
    let mut pods = selectable.selected(Some(&key.0), &everything).peekable();
    if pods.peek().is_some() && pods.all(|enrolled| !enrolled) {
        let message = "no pod of the namespace is in the mesh: nothing enforces this policy";
        let d = Diagnostic::warning(Code::NotInMesh, message);
        cx.report(key, sourced, d.help("label the namespace istio.io/dataplane-mode: ambient"));
    }
}

/// A policy with a selector, and whether each pod it selects belongs to the mesh.
fn judge<T: Meta>(
    key: &(Str, Str),
    sourced: &Sourced<T>,
    selected: impl Iterator<Item = bool>,
    cx: &mut Context<'_>,
) {
    let (mut inside, mut outside) = (0_usize, 0_usize);
    for enrolled in selected {
        *(if enrolled { &mut inside } else { &mut outside }) += 1;
    }
    if inside + outside == 0 {
        let d = Diagnostic::warning(Code::SelectsNothing, "selects no pod: it protects nothing");
        let d = d.field("spec.selector").help("compare it with the labels of the pods");
        cx.report(key, sourced, d);
    } else if outside > 0 {
        let message = format!(
            "{outside} of the {} pods it selects are outside the mesh, where nothing enforces it",
            inside + outside
        );
        let d = Diagnostic::warning(Code::NotInMesh, message).field("spec.selector");
        cx.report(key, sourced, d.help("label the namespace istio.io/dataplane-mode: ambient"));
    }
}

/// Namespaces and service accounts that policies name.
fn policy_sources(objects: &Objects, policies: &[authorization::Compiled], cx: &mut Context<'_>) {
    for compiled in policies {
        let policy = &compiled.policy;
        let key = (policy.key.namespace.clone(), policy.key.name.clone());
        let Some(sourced) = objects.authorization_policies.get(&key) else { continue };
        for rule in policy.rules.iter() {
            let mut missing = BTreeSet::new();
            for m in rule.clauses.iter().flatten() {
                let namespaces = m.namespaces.iter().chain(&m.not_namespaces);
                let namespaces = namespaces.filter_map(exact);
                let missing_namespaces = namespaces.filter(|ns| !exists(ns, objects, cx));
                missing.extend(missing_namespaces.map(|ns| format!("Namespace {ns:?}")));
                let accounts = m.service_accounts.iter().chain(&m.not_service_accounts);
                let accounts = accounts.map(|(ns, sa)| (&**ns, &**sa));
                let principals = m.principals.iter().chain(&m.not_principals).filter_map(exact);
                let principals = principals.filter_map(|p| account_of(p, cx));
                missing.extend(accounts.chain(principals).filter_map(|(ns, sa)| {
                    let there = sa == "default" && exists(ns, objects, cx)
                        || objects.service_accounts.contains_key(&(ns.into(), sa.into()));
                    (!there).then(|| format!("ServiceAccount {ns}/{sa}"))
                }));
            }
            for what in missing {
                let message = format!("names {what}, which does not exist");
                let d = Diagnostic::warning(Code::DanglingReference, message);
                cx.report(&key, sourced, d.field(&*rule.provenance.field));
            }
        }
    }
}

fn exact(m: &StringMatch) -> Option<&str> {
    match m {
        StringMatch::Exact(text) => Some(text),
        _ => None,
    }
}

/// The account of a principal of this mesh.
fn account_of<'p>(principal: &'p str, cx: &Context<'_>) -> Option<(&'p str, &'p str)> {
    let rest = principal.strip_prefix(&*cx.config.trust_domain)?.strip_prefix("/ns/")?;
    rest.split_once("/sa/")
}

#[cfg(test)]
mod tests;
