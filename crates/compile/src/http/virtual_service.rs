//! VirtualServices: which Services they are for, whose requests, and on which ports.
//!
//! What is decided here and in `selection`, per host, namespace of the client and port, is what Istio calls selection: `gateways`,
//! `exportTo`, `sourceNamespace` and `port` say which rules there are. What is left is compiled by `rules` and looks at requests.
//!
//! Invariants: for one Service and audience one object decides, the oldest; a namespace routes the requests of others only to
//! its own Services; the rules keep their order; a rule that cannot be honoured answers with an error.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use model::http::{Audience, Subset, SubsetKey};
use model::{ServiceKey, Str};

use super::Contribution;
use super::hosts::{self, Host};
use super::passage;
use crate::context::{Budget, Context};
use crate::diagnostics::{Code, Diagnostic};
use crate::istio::VirtualService;
use crate::istio::virtual_service::VirtualServiceSpec;
use crate::object::{Objects, Sourced, age, object_id};
use crate::services::{self, ByNamespace};
use crate::validate::{Report, label_name};
use crate::waypoints::binding::Bindings;

mod actions;
mod matches;
mod rules;
mod selection;

use rules::{Place, Reader};

/// The gateway that stands for the mesh itself.
const MESH: &str = "mesh";

type Entry<'a> = (&'a (Str, Str), &'a Sourced<VirtualService>);
/// Who decides.
type Claims<'a> = BTreeMap<(ServiceKey, Audience), (&'a services::Compiled, Entry<'a>)>;
/// The Services of each object.
type Hosts<'a> = BTreeMap<&'a (Str, Str), Vec<&'a services::Compiled>>;
/// Who of `exportTo` at most is taken one by one: each gets the rules as a set of its own.
const MAX_AUDIENCES: usize = 256;

/// What all VirtualServices say.
pub(super) fn contributions(
    objects: &Objects,
    services: &ByNamespace,
    subsets: &[Arc<Subset>],
    bindings: &Bindings<'_>,
    cx: &mut Context<'_>,
) -> Vec<Contribution> {
    let subsets: BTreeSet<&SubsetKey> = subsets.iter().map(|s| &s.key).collect();
    let mut of_object: BTreeMap<&(Str, Str), (Entry<'_>, Vec<selection::Claim<'_>>)> =
        BTreeMap::new();
    let (claims, hosts) = claims(objects, services, bindings, cx);
    for ((_, audience), (service, entry)) in claims {
        let (_, claims) = of_object.entry(entry.0).or_insert_with(|| (entry, Vec::new()));
        claims.push(selection::Claim { service, audience });
    }
    let mut out = Vec::new();
    for (entry, claims) in of_object.into_values() {
        let hosts = hosts.get(entry.0).map(Vec::as_slice).unwrap_or_default();
        selection::contribute(entry, claims, hosts, services, &subsets, &mut out, cx);
    }
    out
}

/// What an API server would refuse.
pub(crate) fn validate(spec: &VirtualServiceSpec, report: Report<'_>) {
    for (i, host) in spec.hosts.iter().enumerate() {
        if host.is_empty() {
            report(format!("spec.hosts[{i}]"), "empty: name a Service".into());
        }
    }
    if spec.http.is_empty() && spec.tls.is_null() && spec.tcp.is_null() {
        report("spec.http".into(), "missing: there is no rule".into());
    }
    let mut budget = Budget::default();
    let mut pattern = |text: &str| budget.pattern(text);
    let mut reader = Reader::new(&mut pattern);
    for (i, rule) in spec.http.iter().enumerate() {
        reader.remarks(i, rule);
        reader.rule(i, rule, None, &Place::Nowhere);
    }
    for d in reader.found.into_iter().filter(|d| d.code == Code::InvalidField) {
        report(d.field, d.message);
    }
}

/// Who decides for which Service and audience.
fn claims<'a>(
    objects: &'a Objects,
    services: &'a ByNamespace,
    bindings: &Bindings<'_>,
    cx: &mut Context<'_>,
) -> (Claims<'a>, Hosts<'a>) {
    let mut by_age: Vec<Entry<'a>> = objects.virtual_services.iter().collect();
    by_age.sort_by(|a, b| age(a.0, a.1).cmp(&age(b.0, b.1)));
    let (mut claims, mut of_object) = (Claims::new(), Hosts::new());
    for entry in by_age {
        if !is_for_the_mesh(entry, cx) {
            continue;
        }
        let hosts = hosts(entry, services, bindings, cx);
        for service in &hosts {
            for audience in audiences(entry, &service.service.key.namespace, cx) {
                let claim = (service.service.key.clone(), audience);
                match claims.get(&claim) {
                    Some((_, winner)) => conflict(entry, *winner, &claim, cx),
                    None => drop(claims.insert(claim, (*service, entry))),
                }
            }
        }
        of_object.insert(entry.0, hosts);
    }
    (claims, of_object)
}

fn is_for_the_mesh((key, sourced): Entry<'_>, cx: &mut Context<'_>) -> bool {
    let gateways = &sourced.value.spec.gateways;
    let mesh = gateways.is_empty() || gateways.iter().any(|g| g == MESH);
    for (i, gateway) in gateways.iter().enumerate().filter(|(_, g)| *g != MESH) {
        let message =
            format!("{gateway:.80?} is not served: nothing takes traffic from outside the mesh");
        let d = if mesh {
            Diagnostic::warning(Code::Unsupported, message)
        } else {
            Diagnostic::error(Code::Unsupported, message)
                .help("no rule is in force; add the gateway `mesh` for traffic of the mesh")
        };
        cx.report(key, sourced, d.field(format!("spec.gateways[{i}]")));
    }
    mesh
}

/// The Services it is for, each once.
fn hosts<'a>(
    (key, sourced): Entry<'a>,
    services: &'a ByNamespace,
    bindings: &Bindings<'_>,
    cx: &mut Context<'_>,
) -> Vec<&'a services::Compiled> {
    let domain = cx.config.cluster_domain.clone();
    let mut found: BTreeMap<&ServiceKey, &services::Compiled> = BTreeMap::new();
    let hosts = &sourced.value.spec.hosts;
    if hosts.is_empty() {
        let message =
            "it is for no host, so it could only be a delegate, and rules are not delegated";
        let d = Diagnostic::error(Code::Unsupported, message).field("spec.hosts");
        cx.report(key, sourced, d.help("write its rules where they are delegated from"));
    }
    for (i, host) in hosts.iter().enumerate() {
        let d = match hosts::read(host, &key.0, &domain) {
            Host::Service { namespace, name } => match services::find(services, namespace, name) {
                Some(service) if service.headless => {
                    let message =
                        format!("{host} is headless: its pods are called, not the Service");
                    Diagnostic::error(Code::Unsupported, message)
                        .help("give the Service an address: leave out clusterIP: None")
                }
                Some(service) => {
                    found.insert(&service.service.key, service);
                    match passage::check(&service.service, &key.0, bindings) {
                        Ok(()) => continue,
                        Err(missed) => missed.finding,
                    }
                }
                None => {
                    let message = format!("there is no Service {namespace}/{name}");
                    Diagnostic::error(Code::DanglingReference, message)
                        .help("add it, or mend the name")
                }
            },
            Host::Wildcard => {
                let message = format!("{host:.80?} is not handled: wildcards are for no Service");
                Diagnostic::error(Code::Unsupported, message).help("name each Service")
            }
            Host::Other => {
                let message = format!("{host:.80?} is no Service of the cluster");
                Diagnostic::error(Code::DanglingReference, message).help(hosts::help(host, &domain))
            }
        };
        cx.report(key, sourced, d.field(format!("spec.hosts[{i}]")));
    }
    found.into_values().collect()
}

/// Whose requests it is for.
fn audiences(
    (key, sourced): Entry<'_>,
    service_namespace: &Str,
    cx: &mut Context<'_>,
) -> BTreeSet<Audience> {
    let export = &sourced.value.spec.export_to;
    let mut named: BTreeSet<Str> = BTreeSet::new();
    for (i, namespace) in export.iter().enumerate() {
        let d = match namespace.as_str() {
            "*" => continue,
            "." => {
                named.insert(key.0.clone());
                continue;
            }
            "~" => {
                let message = "`~` is nobody: no rule is in force for anybody it stands for";
                Diagnostic::warning(Code::MatchesNothing, message)
            }
            name => match label_name(name) {
                Ok(()) => {
                    named.insert(name.into());
                    continue;
                }
                Err(message) => Diagnostic::error(Code::InvalidField, message),
            },
        };
        cx.report(key, sourced, d.field(format!("spec.exportTo[{i}]")));
    }
    let everybody = export.is_empty() || export.iter().any(|e| e == "*");
    if *service_namespace != key.0 {
        return foreign((key, sourced), service_namespace, everybody, &named, cx);
    }
    if everybody || named.len() > MAX_AUDIENCES {
        // Of too many: see `selection`.
        return BTreeSet::from([Audience::Everybody]);
    }
    named.into_iter().map(Audience::Namespace).collect()
}

/// The same at a Service of others: the clients of the object's own namespace, if it is for them.
fn foreign(
    (key, sourced): Entry<'_>,
    service_namespace: &Str,
    everybody: bool,
    named: &BTreeSet<Str>,
    cx: &mut Context<'_>,
) -> BTreeSet<Audience> {
    let only = format!("the Service belongs to namespace {service_namespace}");
    let own = everybody || named.contains(&key.0);
    let others = everybody || named.iter().any(|name| *name != key.0);
    let field =
        if sourced.value.spec.export_to.is_empty() { "spec.hosts" } else { "spec.exportTo" };
    if !own && others {
        let message = format!(
            "it is for nobody: {only}, so it could only be for clients in namespace {}, which is not named",
            key.0
        );
        let d = Diagnostic::warning(Code::MatchesNothing, message).field(field);
        cx.report(key, sourced, d.help("add `.`, or put it into the Service's namespace"));
    } else if others {
        let message = format!("it is for clients in namespace {} only: {only}", key.0);
        let d = Diagnostic::warning(Code::NoEffect, message).field(field);
        let help = "put it into the Service's namespace to be for everybody";
        cx.report(key, sourced, d.help(help));
    }
    own.then(|| Audience::Namespace(key.0.clone())).into_iter().collect()
}

fn conflict(
    (key, sourced): Entry<'_>,
    (winner, first): Entry<'_>,
    (service, audience): &(ServiceKey, Audience),
    cx: &mut Context<'_>,
) {
    let winner = object_id("VirtualService", &winner.0, &winner.1);
    let whose = match audience {
        Audience::Everybody => String::new(),
        Audience::Namespace(ns) => format!(" for clients in namespace {ns}"),
    };
    let message = format!(
        "{winner} ({}) is older and decides for {service}{whose}; this has no effect there",
        first.origin
    );
    let d = Diagnostic::warning(Code::RouteConflict, message).field("spec.hosts");
    cx.report(key, sourced, d.help("put the rules into one object"));
}

#[cfg(test)]
mod tests;
