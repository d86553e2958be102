//! VirtualServices: which Services they are for, whose requests, and on which ports.
//!
//! What is decided here, per host, namespace of the client and port, is what Istio calls selection: `gateways`, `exportTo`,
//! `sourceNamespace` and `port` say which rules there are. What is left is compiled by `rules` and looks at requests.
//!
//! Invariants: for one Service and audience one object decides, the oldest; a namespace routes the requests of others only to
//! its own Services; the rules keep their order; a rule that cannot be honoured answers with an error.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use model::http::{Audience, RouteMatch, RouteRule, Subset, SubsetKey};
use model::{ServiceKey, Str};

use super::hosts::{self, Host};
use super::{Api, Contribution, Rank, Ranked, Specificity};
use crate::context::{Budget, Context};
use crate::diagnostics::{Code, Diagnostic};
use crate::istio::VirtualService;
use crate::istio::virtual_service::{HttpMatch, VirtualServiceSpec};
use crate::object::{Objects, Sourced, age, object_id, provenance};
use crate::services::{self, ByNamespace};
use crate::validate::{Report, label_name};

mod actions;
mod matches;
mod rules;

use rules::{Place, Reader};

/// The gateway that stands for the mesh itself.
const MESH: &str = "mesh";

type Entry<'a> = (&'a (Str, Str), &'a Sourced<VirtualService>);
/// Who decides.
type Claims<'a> = BTreeMap<(ServiceKey, Audience), (&'a services::Compiled, Entry<'a>)>;

/// What all VirtualServices say.
pub(super) fn contributions(
    objects: &Objects,
    services: &ByNamespace,
    subsets: &[Arc<Subset>],
    cx: &mut Context<'_>,
) -> Vec<Contribution> {
    let subsets: BTreeSet<&SubsetKey> = subsets.iter().map(|s| &s.key).collect();
    let mut out = Vec::new();
    for ((_, audience), (service, entry)) in claims(objects, services, cx) {
        contribute(service, audience, entry, services, &subsets, &mut out, cx);
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
        reader.rule(i, rule, &Place::Nowhere);
    }
    for d in reader.found.into_iter().filter(|d| d.code == Code::InvalidField) {
        report(d.field, d.message);
    }
}

/// Who decides for which Service and audience.
fn claims<'a>(objects: &'a Objects, services: &'a ByNamespace, cx: &mut Context<'_>) -> Claims<'a> {
    let mut by_age: Vec<Entry<'a>> = objects.virtual_services.iter().collect();
    by_age.sort_by(|a, b| age(a.0, a.1).cmp(&age(b.0, b.1)));
    let mut claims = Claims::new();
    for entry in by_age {
        if !is_for_the_mesh(entry, cx) {
            continue;
        }
        for service in hosts(entry, services, cx) {
            for audience in audiences(entry, &service.service.key.namespace, cx) {
                let claim = (service.service.key.clone(), audience);
                match claims.get(&claim) {
                    Some((_, winner)) => conflict(entry, *winner, &claim, cx),
                    None => drop(claims.insert(claim, (service, entry))),
                }
            }
        }
    }
    // Rules for the clients of one namespace are a set of their own, beside that for everybody.
    let everybody = claims.iter().filter(|((_, audience), _)| *audience == Audience::Everybody);
    let mut narrow = Vec::new();
    for ((service, _), claim) in everybody {
        let sources = sources(&claim.1.1.value.spec);
        narrow
            .extend(sources.map(|ns| ((service.clone(), Audience::Namespace(ns.into())), *claim)));
    }
    for (key, claim) in narrow {
        claims.entry(key).or_insert(claim);
    }
    claims
}

fn sources(spec: &VirtualServiceSpec) -> impl Iterator<Item = &str> {
    let matches = spec.http.iter().flat_map(|rule| &rule.r#match);
    matches.map(|m| m.source_namespace.as_str()).filter(|ns| !ns.is_empty())
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
                    continue;
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
    let own = Audience::Namespace(key.0.clone());
    let export = &sourced.value.spec.export_to;
    let everybody = export.is_empty() || export.iter().any(|e| e == "*");
    if *service_namespace != key.0 {
        if export.iter().any(|e| e != ".") || export.is_empty() {
            let message = format!(
                "it is for clients in namespace {} only: the Service belongs to namespace {service_namespace}",
                key.0
            );
            let field = if export.is_empty() { "spec.hosts" } else { "spec.exportTo" };
            let d = Diagnostic::warning(Code::NoEffect, message).field(field);
            cx.report(
                key,
                sourced,
                d.help("put it into the Service's namespace to be for everybody"),
            );
        }
        return BTreeSet::from([own]);
    }
    if everybody {
        return BTreeSet::from([Audience::Everybody]);
    }
    let mut audiences = BTreeSet::new();
    for (i, namespace) in export.iter().enumerate() {
        match namespace.as_str() {
            "." => drop(audiences.insert(own.clone())),
            "~" => {
                let message = "`~` is nobody: no rule is in force for anybody it stands for";
                let d = Diagnostic::warning(Code::MatchesNothing, message);
                cx.report(key, sourced, d.field(format!("spec.exportTo[{i}]")));
            }
            name => match label_name(name) {
                Ok(()) => drop(audiences.insert(Audience::Namespace(name.into()))),
                Err(message) => {
                    let d = Diagnostic::error(Code::InvalidField, message);
                    cx.report(key, sourced, d.field(format!("spec.exportTo[{i}]")));
                }
            },
        }
    }
    audiences
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

/// Rules and matches of some ports.
type Compiled = (Vec<Arc<RouteRule>>, Vec<RouteMatch>);

fn contribute(
    service: &services::Compiled,
    audience: Audience,
    (key, sourced): Entry<'_>,
    services: &ByNamespace,
    subsets: &BTreeSet<&SubsetKey>,
    out: &mut Vec<Contribution>,
    cx: &mut Context<'_>,
) {
    let domain = cx.config.cluster_domain.clone();
    let mut ports: Vec<u16> = service.service.ports.iter().map(|p| p.service_port).collect();
    ports.sort_unstable();
    ports.dedup();
    // Ports that come out the same share what they have: mostly all of them.
    let mut groups: Vec<(Vec<u16>, Compiled)> = Vec::new();
    for port in &ports {
        let there = rules::There {
            namespace: &key.0,
            domain: &domain,
            services,
            subsets,
            port: *port,
            audience: &audience,
        };
        let compiled = compile((key, sourced), &Place::At(there), cx);
        // No rule is for this port: it is reached as without rules.
        if compiled.1.is_empty() {
            continue;
        }
        match groups.iter_mut().find(|(_, same)| *same == compiled) {
            Some((ports, _)) => ports.push(*port),
            None => groups.push((vec![*port], compiled)),
        }
    }
    unused(&ports, (key, sourced), cx);
    let object: Str = format!("{}/{}", key.0, key.1).into();
    for (ports, (rules, matches)) in groups {
        let ranked = (0..).zip(matches).map(|(place, matched)| Ranked {
            rank: Rank {
                specificity: Specificity::default(),
                age: (true, 0),
                object: object.clone(),
                rule: 0,
                place,
            },
            matched,
        });
        out.push(Contribution {
            service: service.service.key.clone(),
            audience: audience.clone(),
            ports,
            api: Api::VirtualService,
            provenance: provenance(key, sourced, "spec.hosts"),
            rules,
            matches: ranked.collect(),
        });
    }
}

fn compile((key, sourced): Entry<'_>, place: &Place<'_>, cx: &mut Context<'_>) -> Compiled {
    let object: Str = object_id("VirtualService", &key.0, &key.1).into();
    let mut rules: Vec<Arc<RouteRule>> = Vec::new();
    let mut matches = Vec::new();
    let mut found = Vec::new();
    let mut budget = Budget::default();
    for (i, rule) in sourced.value.spec.http.iter().enumerate() {
        let mut pattern = |text: &str| cx.pattern(text, &mut budget);
        let mut reader = Reader::new(&mut pattern);
        let compiled = reader.rule(i, rule, place);
        found.append(&mut reader.found);
        let provenance = provenance(key, sourced, &format!("spec.http[{i}]"));
        // Matches of one rule mostly lead to the same.
        let first = rules.len();
        for (matched, rule) in compiled {
            let rule = RouteRule { route: object.clone(), provenance: provenance.clone(), ..rule };
            let same = rules[first..].iter().position(|r| **r == rule);
            let index = same.map_or(rules.len(), |at| first + at);
            if same.is_none() {
                rules.push(Arc::new(rule));
            }
            // Thousands of rules at most, by the limits of files.
            let rule = u32::try_from(index).unwrap_or(u32::MAX);
            matches.push(RouteMatch { rule, ..matched });
        }
    }
    for d in found {
        cx.report(key, sourced, d);
    }
    (rules, matches)
}

/// Matches for a port that the Service does not have, and rules that no request gets to.
fn unused(ports: &[u16], (key, sourced): Entry<'_>, cx: &mut Context<'_>) {
    let mut all = None;
    for (i, rule) in sourced.value.spec.http.iter().enumerate() {
        if let Some(before) = all {
            let message = format!("no request gets here: spec.http[{before}] takes every one");
            let d = Diagnostic::warning(Code::MatchesNothing, message);
            cx.report(key, sourced, d.field(format!("spec.http[{i}]")).help("put it before that"));
            continue;
        }
        for (j, m) in rule.r#match.iter().enumerate() {
            let port = m.port.filter(|port| *port != 0);
            if let Some(port) = port.filter(|p| !ports.iter().any(|own| u32::from(*own) == *p)) {
                let message = format!("the Service has no port {port}");
                let d = Diagnostic::warning(Code::MatchesNothing, message);
                cx.report(key, sourced, d.field(format!("spec.http[{i}].match[{j}].port")));
            }
        }
        let everything = |m: &HttpMatch| {
            let name = m.name.clone();
            *m == HttpMatch { name, ..HttpMatch::default() }
        };
        if rule.r#match.is_empty() || rule.r#match.iter().any(everything) {
            all = Some(i);
        }
    }
}

#[cfg(test)]
mod tests;
