//! PeerAuthentication: whom a workload answers without mTLS.
//!
//! The mode of a workload is that of the oldest policy that selects it, else of its namespace, else of
//! the mesh (the root namespace), else PERMISSIVE; UNSET looks further out. Ports of the workload may
//! differ, only in policies with a selector. STRICT becomes a DENY policy for peers without a verified
//! identity, listed by the workloads it is for: a wider scope could not be overridden by a narrower one.
//!
//! The policies are named `istio_converted_NAME`: an underscore is not allowed in names of objects, so
//! that no AuthorizationPolicy can take the place of one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use model::{Action, Match, Policy, PolicyKey, Provenance, Rule, Scope, Str, StringMatch};

use crate::addresses;
use crate::context::Context;
use crate::diagnostics::{Code, Diagnostic};
use crate::istio::{MtlsMode, PeerAuthentication, WorkloadSelector};
use crate::object::{Objects, Sourced, age, object_id, provenance};

type Entry<'a> = (&'a (Str, Str), &'a Sourced<PeerAuthentication>);

/// What applies where.
#[derive(Debug, Default)]
pub(crate) struct Compiled {
    pub policies: Vec<Arc<Policy>>,
    /// What a pod of a namespace lists when no policy selects it. Namespaces without an entry: `mesh`.
    namespaces: BTreeMap<Str, Option<PolicyKey>>,
    mesh: Option<PolicyKey>,
    /// By namespace, oldest first.
    selecting: BTreeMap<Str, Vec<Selecting>>,
}

#[derive(Debug)]
struct Selecting {
    selector: WorkloadSelector,
    /// `None`: nothing is denied.
    policy: Option<PolicyKey>,
}

impl Compiled {
    /// The policy that a pod lists.
    pub(crate) fn policy_of(&self, namespace: &str, pod: &Pod) -> Option<&PolicyKey> {
        let labels = pod.metadata.labels.as_ref();
        let selecting = self.selecting.get(namespace).into_iter().flatten();
        match selecting.into_iter().find(|s| s.selector.matches(labels)) {
            Some(selecting) => selecting.policy.as_ref(),
            None => self.namespaces.get(namespace).unwrap_or(&self.mesh).as_ref(),
        }
    }
}

/// A mode, and the field that says so.
#[derive(Clone)]
struct Decided {
    strict: bool,
    provenance: Provenance,
    /// The policy of that field, when it is strict.
    policy: Option<PolicyKey>,
}

pub(crate) fn compile(objects: &Objects, cx: &mut Context<'_>) -> Compiled {
    let mut entries: Vec<Entry<'_>> = objects.peer_authentications.iter().collect();
    entries.sort_by(|a, b| age(a.0, a.1).cmp(&age(b.0, b.1)));
    for (key, sourced) in &entries {
        no_effect(key, sourced, cx);
    }
    let (selecting, wide): (Vec<Entry<'_>>, Vec<Entry<'_>>) =
        entries.into_iter().partition(|(_, s)| has_selector(&s.value));
    let wide = oldest(wide, cx);
    let mut out = Compiled::default();
    let root = cx.config.root_namespace.clone();
    let permissive = Decided { strict: false, provenance: Provenance::default(), policy: None };
    let mesh =
        wide.get(&root).map_or_else(|| permissive.clone(), |e| decide(*e, &permissive, &mut out));
    let mut decided: BTreeMap<Str, Decided> = BTreeMap::new();
    for (namespace, entry) in &wide {
        let is = if *namespace == root { mesh.clone() } else { decide(*entry, &mesh, &mut out) };
        out.namespaces.insert(namespace.clone(), is.policy.clone());
        decided.insert(namespace.clone(), is);
    }
    out.mesh = mesh.policy.clone();
    conflicts(objects, &selecting, cx);
    for (key, sourced) in selecting {
        let inherited = decided.get(&key.0).unwrap_or(&mesh);
        let policy = select((key, sourced), inherited, &mut out);
        let selector = sourced.value.spec.selector.clone().unwrap_or_default();
        out.selecting.entry(key.0.clone()).or_default().push(Selecting { selector, policy });
    }
    out
}

fn has_selector(policy: &PeerAuthentication) -> bool {
    policy.spec.selector.as_ref().is_some_and(|s| !s.match_labels.is_empty())
}

fn mode(policy: &PeerAuthentication) -> MtlsMode {
    policy.spec.mtls.as_ref().map_or(MtlsMode::Unset, |m| m.mode)
}

/// The oldest policy without a selector of each namespace.
fn oldest<'a>(by_age: Vec<Entry<'a>>, cx: &mut Context<'_>) -> BTreeMap<Str, Entry<'a>> {
    let mut first: BTreeMap<Str, Entry<'a>> = BTreeMap::new();
    for entry in by_age {
        match first.get(&entry.0.0) {
            None => drop(first.insert(entry.0.0.clone(), entry)),
            Some(winner) => conflict(entry, *winner, "", cx),
        }
    }
    first
}

/// The mode of a policy without a selector.
fn decide(entry: Entry<'_>, outer: &Decided, out: &mut Compiled) -> Decided {
    let (key, sourced) = entry;
    let strict = match mode(&sourced.value) {
        MtlsMode::Unset => return outer.clone(),
        MtlsMode::Strict => true,
        MtlsMode::Permissive | MtlsMode::Disable => false,
    };
    let provenance = provenance(key, sourced, "spec.mtls.mode");
    let rule = Rule { clauses: vec![vec![plaintext()]], provenance: provenance.clone() };
    let policy = strict.then(|| publish(entry, vec![rule], out));
    Decided { strict, provenance, policy }
}

/// What the pods that a policy selects list.
fn select(entry: Entry<'_>, inherited: &Decided, out: &mut Compiled) -> Option<PolicyKey> {
    let (key, sourced) = entry;
    let spec = &sourced.value.spec;
    let main = match mode(&sourced.value) {
        MtlsMode::Unset => inherited.clone(),
        set => Decided {
            strict: set == MtlsMode::Strict,
            provenance: provenance(key, sourced, "spec.mtls.mode"),
            policy: None,
        },
    };
    // Ports that differ from the main mode. A port that cannot be read is not a port.
    let mut ports: BTreeMap<u16, &str> = BTreeMap::new();
    for (text, mtls) in &spec.port_level_mtls {
        let Ok(port) = addresses::port(text) else { continue };
        let differs = match mtls.mode {
            MtlsMode::Unset => false,
            MtlsMode::Strict => !main.strict,
            MtlsMode::Permissive | MtlsMode::Disable => main.strict,
        };
        if differs {
            ports.insert(port, text);
        }
    }
    if ports.is_empty() && main.policy.is_some() {
        return main.policy;
    }
    let rules = if main.strict {
        let except = Match { not_destination_ports: ports.into_keys().collect(), ..plaintext() };
        vec![Rule { clauses: vec![vec![except]], provenance: main.provenance }]
    } else {
        let rule = |(port, text): (u16, &str)| Rule {
            clauses: vec![vec![Match { destination_ports: vec![port], ..plaintext() }]],
            provenance: provenance(key, sourced, &format!("spec.portLevelMtls.{text}")),
        };
        ports.into_iter().map(rule).collect()
    };
    (!rules.is_empty()).then(|| publish(entry, rules, out))
}

/// Matches peers without a verified identity.
fn plaintext() -> Match {
    Match { not_principals: vec![StringMatch::Presence], ..Match::default() }
}

fn publish((key, sourced): Entry<'_>, rules: Vec<Rule>, out: &mut Compiled) -> PolicyKey {
    let name = format!("istio_converted_{}", key.1);
    let policy = Policy {
        key: PolicyKey { namespace: key.0.clone(), name: name.into() },
        scope: Scope::WorkloadSelector,
        action: Action::Deny,
        rules: rules.into(),
        dry_run: false,
        provenance: provenance(key, sourced, ""),
    };
    let key = policy.key.clone();
    out.policies.push(Arc::new(policy));
    key
}

fn no_effect(key: &(Str, Str), sourced: &Sourced<PeerAuthentication>, cx: &mut Context<'_>) {
    let spec = &sourced.value.spec;
    if !has_selector(&sourced.value) && !spec.port_level_mtls.is_empty() {
        let message = "has no effect: ports can only be set in a policy with a selector";
        let d = Diagnostic::error(Code::NoEffect, message).field("spec.portLevelMtls");
        cx.report(key, sourced, d.help("add spec.selector.matchLabels"));
    }
    let ports = spec.port_level_mtls.iter();
    let ports = ports.map(|(port, m)| (format!("spec.portLevelMtls.{port}.mode"), m.mode));
    let main = ("spec.mtls.mode".to_owned(), mode(&sourced.value));
    for (field, mode) in ports.chain([main]) {
        if mode == MtlsMode::Disable {
            let message = "DISABLE acts as PERMISSIVE: between workloads of the mesh mTLS stays on";
            cx.report(key, sourced, Diagnostic::warning(Code::NoEffect, message).field(field));
        }
    }
}

/// Several selectors that select one pod: the oldest policy wins.
fn conflicts(objects: &Objects, by_age: &[Entry<'_>], cx: &mut Context<'_>) {
    let mut reported = BTreeSet::new();
    for ((namespace, name), pod) in &objects.pods {
        let labels = pod.value.metadata.labels.as_ref();
        let mut selecting = by_age.iter().filter(|(key, sourced)| {
            key.0 == *namespace
                && sourced.value.spec.selector.as_ref().is_some_and(|s| s.matches(labels))
        });
        let Some(winner) = selecting.next() else { continue };
        for loser in selecting {
            if reported.insert(loser.0) {
                conflict(
                    *loser,
                    *winner,
                    &format!(" for Pod/{namespace}/{name} and others like it"),
                    cx,
                );
            }
        }
    }
}

fn conflict(loser: Entry<'_>, winner: Entry<'_>, whom: &str, cx: &mut Context<'_>) {
    let ((namespace, name), sourced) = winner;
    let winner = object_id("PeerAuthentication", namespace, name);
    let message = format!(
        "{winner} ({}) is older and decides{whom}; this has no effect there",
        sourced.origin
    );
    cx.report(loser.0, loser.1, Diagnostic::warning(Code::ConflictingPolicies, message));
}

#[cfg(test)]
mod tests;
