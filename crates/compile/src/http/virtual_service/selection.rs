//! Which rules of a VirtualService there are for the clients of an audience on a port, and what they become.
//!
//! Rules for the clients of one namespace (`sourceNamespace`) stand among those for everybody, and look at the client
//! themselves. Where nothing is left for other clients, a last rule sends them to the Service, as if there were no rules.
//!
//! Invariants: the work grows with the size of the object, times its Services and their ports, not with its square; a
//! finding is reported once, for however many Services, ports and clients.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};

use model::http::limits::MAX_LIST;
use model::http::{
    Audience, Backend, Filter, Protocol, RouteMatch, RouteRule, SourceMatch, SubsetKey, Target,
    Timeouts,
};
use model::{Provenance, Reason, Str};

use super::super::{Api, Contribution, Rank, Ranked, Specificity, protocol};
use super::rules::{Place, Reader, There};
use super::{Entry, MAX_AUDIENCES, MESH};
use crate::context::{Budget, Context};
use crate::diagnostics::{Code, Diagnostic};
use crate::istio::virtual_service::HttpMatch;
use crate::object::{object_id, provenance};
use crate::services::{self, ByNamespace};

/// How many rules are looked back at for one that is the same: matches of one rule mostly lead to the same.
const LOOK_BACK: usize = 8;

/// A Service and clients for whom an object decides.
pub(super) struct Claim<'a> {
    pub service: &'a services::Compiled,
    pub audience: Audience,
}

/// Rules and matches of some ports.
type Compiled = (Vec<Arc<RouteRule>>, Vec<RouteMatch>);

/// Adds what an object says of all that it decides. `hosts`: its Services, also those that others decide for.
pub(super) fn contribute(
    entry: Entry<'_>,
    claims: Vec<Claim<'_>>,
    hosts: &[&services::Compiled],
    services: &ByNamespace,
    subsets: &BTreeSet<&SubsetKey>,
    out: &mut Vec<Contribution>,
    cx: &mut Context<'_>,
) {
    let domain = cx.config.cluster_domain.clone();
    let mut object = Object {
        entry,
        index: Index::of(entry),
        services,
        subsets,
        domain: &domain,
        patterns: Budget::default(),
        found: Vec::new(),
        told: BTreeSet::new(),
    };
    object.remarks(hosts, cx);
    for claim in claims {
        object.claim(claim, out, cx);
    }
    for d in object.found {
        cx.report(entry.0, entry.1, d);
    }
}

/// An object on its way.
struct Object<'a> {
    entry: Entry<'a>,
    index: Index<'a>,
    services: &'a ByNamespace,
    subsets: &'a BTreeSet<&'a SubsetKey>,
    domain: &'a str,
    patterns: Budget,
    found: Vec<Diagnostic>,
    told: BTreeSet<(Code, String, String)>,
}

impl Object<'_> {
    /// What is said once, whatever the Service.
    fn remarks(&mut self, hosts: &[&services::Compiled], cx: &mut Context<'_>) {
        let mut pattern = |text: &str| cx.pattern(text, &mut self.patterns);
        let mut reader = Reader::new(&mut pattern);
        for (i, rule) in self.entry.1.value.spec.http.iter().enumerate() {
            reader.remarks(i, rule);
        }
        let found = reader.found;
        self.note(found);
        self.note(unused(self.entry, hosts));
    }

    fn note(&mut self, found: Vec<Diagnostic>) {
        for d in found {
            if self.told.insert((d.code, d.field.clone(), d.message.clone())) {
                self.found.push(d);
            }
        }
    }

    fn claim(&mut self, claim: Claim<'_>, out: &mut Vec<Contribution>, cx: &mut Context<'_>) {
        let Claim { service, audience } = claim;
        let mut ports: Vec<u16> = service.service.ports.iter().map(|p| p.service_port).collect();
        ports.sort_unstable();
        ports.dedup();
        // Ports that come out the same share what they have: mostly all of them.
        let mut groups: Vec<(Vec<u16>, Compiled)> = Vec::new();
        for port in &ports {
            let compiled = self.on_port(service, &audience, *port, cx);
            // No rule is for this port: it is reached as without rules.
            if compiled.1.is_empty() {
                continue;
            }
            match groups.iter_mut().find(|(_, same)| *same == compiled) {
                Some((ports, _)) => ports.push(*port),
                None => groups.push((vec![*port], compiled)),
            }
        }
        let (key, sourced) = self.entry;
        let touched: Vec<u16> = groups.iter().flat_map(|(ports, _)| ports).copied().collect();
        if let Some(d) = protocol::untouched(service, &touched) {
            self.note(vec![d.field("spec.hosts")]);
        }
        for (ports, (rules, matches)) in groups {
            out.push(Contribution {
                service: service.service.key.clone(),
                audience: audience.clone(),
                ports,
                api: Api::VirtualService,
                provenance: provenance(key, sourced, "spec.hosts"),
                rules,
                matches: ranked(&format!("{}/{}", key.0, key.1).into(), matches),
                holds: OnceLock::new(),
            });
        }
    }

    fn on_port(
        &mut self,
        service: &services::Compiled,
        audience: &Audience,
        port: u16,
        cx: &mut Context<'_>,
    ) -> Compiled {
        let mut compiled = Compiled::default();
        let (chosen, for_all) = match audience {
            Audience::Everybody => {
                if let Some(names) = self.too_many() {
                    return self.closed(&names, service, port);
                }
                self.index.for_everybody(port)
            }
            Audience::Namespace(namespace) => (self.index.for_clients_of(namespace, port), true),
        };
        for (i, matches) in chosen {
            let by_source = *audience == Audience::Everybody;
            self.rule(i, &matches, port, by_source, &mut compiled, cx);
        }
        if !for_all && !compiled.1.is_empty() {
            self.plain(service, port, &mut compiled);
        }
        compiled
    }

    fn rule(
        &mut self,
        i: usize,
        matches: &[usize],
        port: u16,
        by_source: bool,
        (rules, all): &mut Compiled,
        cx: &mut Context<'_>,
    ) {
        let (key, sourced) = self.entry;
        let Some(rule) = sourced.value.spec.http.get(i) else { return };
        let place = Place::At(There {
            namespace: &key.0,
            domain: self.domain,
            services: self.services,
            subsets: self.subsets,
            port,
            by_source,
        });
        let mut pattern = |text: &str| cx.pattern(text, &mut self.patterns);
        let mut reader = Reader::new(&mut pattern);
        let compiled = reader.rule(i, rule, Some(matches), &place);
        let found = reader.found;
        self.note(found);
        let route: Str = object_id("VirtualService", &key.0, &key.1).into();
        let provenance = provenance(key, sourced, &format!("spec.http[{i}]"));
        let first = rules.len();
        for (matched, rule) in compiled {
            let rule = RouteRule { route: route.clone(), provenance: provenance.clone(), ..rule };
            let from = first.max(rules.len().saturating_sub(LOOK_BACK));
            let same = rules[from..].iter().position(|r| **r == rule);
            let index = same.map_or(rules.len(), |at| from + at);
            if same.is_none() {
                rules.push(Arc::new(rule));
            }
            // Thousands of rules at most, by the limits of files.
            let rule = u32::try_from(index).unwrap_or(u32::MAX);
            all.push(RouteMatch { rule, ..matched });
        }
    }

    /// The namespaces of `exportTo`, when they are too many for a set each.
    fn too_many(&self) -> Option<Vec<Str>> {
        let (key, sourced) = self.entry;
        let export = &sourced.value.spec.export_to;
        if export.is_empty() || export.iter().any(|e| e == "*") {
            return None;
        }
        let names = export.iter().map(String::as_str).filter(|e| *e != "~");
        let names: BTreeSet<&str> = names.map(|e| if e == "." { &*key.0 } else { e }).collect();
        (names.len() > MAX_AUDIENCES).then(|| names.into_iter().map(Str::from).collect())
    }

    /// An error for the clients of these namespaces, and nothing for others.
    fn closed(&mut self, names: &[Str], service: &services::Compiled, port: u16) -> Compiled {
        let message = format!(
            "{} namespaces are named, at most {MAX_AUDIENCES} are taken; their requests are answered with an error",
            names.len()
        );
        let d = Diagnostic::error(Code::LimitExceeded, message.clone()).field("spec.exportTo");
        self.note(vec![d.help("write '*', or use sourceNamespace in the matches")]);
        let fail = Filter::Fail { reason: Reason::Unsupported, message: message.into() };
        let rule = self.own_rule("closed", "spec.exportTo", vec![fail], Vec::new());
        let matches = names.chunks(MAX_LIST).map(|some| RouteMatch {
            source: SourceMatch { namespaces: some.to_vec(), ..SourceMatch::default() },
            ..RouteMatch::default()
        });
        let mut compiled = (vec![rule], matches.collect());
        self.plain(service, port, &mut compiled);
        compiled
    }

    /// A last rule for the clients for whom there is none: to the Service itself.
    fn plain(&self, service: &services::Compiled, port: u16, (rules, matches): &mut Compiled) {
        let service = service.service.key.clone();
        let target = Target::Service { service, port, subset: None };
        let backend = Backend { weight: 1, target, filters: Vec::new() };
        let rule = u32::try_from(rules.len()).unwrap_or(u32::MAX);
        rules.push(self.own_rule("no rule", "spec.http", Vec::new(), vec![backend]));
        matches.push(RouteMatch { rule, ..RouteMatch::default() });
    }

    fn own_rule(
        &self,
        name: &str,
        field: &str,
        filters: Vec<Filter>,
        backends: Vec<Backend>,
    ) -> Arc<RouteRule> {
        let (key, sourced) = self.entry;
        let route = object_id("VirtualService", &key.0, &key.1).into();
        let provenance: Provenance = provenance(key, sourced, field);
        let timeouts = Timeouts::default();
        Arc::new(RouteRule { route, name: name.into(), provenance, filters, backends, timeouts })
    }
}

/// The matches of an object that are for the mesh, by the namespace of the client that they ask for; empty: any. A rule
/// without matches has one, of the place 0.
struct Index<'a>(BTreeMap<&'a str, Vec<Indexed>>);

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Indexed {
    rule: usize,
    place: usize,
    /// 0: any.
    port: u32,
}

/// Rules, and which of their matches.
type Chosen = Vec<(usize, Vec<usize>)>;

impl<'a> Index<'a> {
    fn of((_, sourced): Entry<'a>) -> Self {
        let mut by_source: BTreeMap<&str, Vec<Indexed>> = BTreeMap::new();
        for (rule, stated) in sourced.value.spec.http.iter().enumerate() {
            if stated.r#match.is_empty() {
                by_source.entry("").or_default().push(Indexed { rule, place: 0, port: 0 });
            }
            for (place, m) in stated.r#match.iter().enumerate() {
                if m.gateways.is_empty() || m.gateways.iter().any(|g| g == MESH) {
                    let port = m.port.unwrap_or_default();
                    let indexed = Indexed { rule, place, port };
                    by_source.entry(m.source_namespace.as_str()).or_default().push(indexed);
                }
            }
        }
        Self(by_source)
    }

    /// All matches on a port, and whether some of them are for any client.
    fn for_everybody(&self, port: u16) -> (Chosen, bool) {
        let for_all = self.0.get("").is_some_and(|all| all.iter().any(|m| m.is_on(port)));
        (chosen(self.0.values().flatten(), port), for_all)
    }

    fn for_clients_of(&self, namespace: &str, port: u16) -> Chosen {
        let lists = [self.0.get(""), self.0.get(namespace)];
        chosen(lists.into_iter().flatten().flatten(), port)
    }
}

impl Indexed {
    fn is_on(self, port: u16) -> bool {
        self.port == 0 || self.port == u32::from(port)
    }
}

fn chosen<'a>(all: impl Iterator<Item = &'a Indexed>, port: u16) -> Chosen {
    let mut there: Vec<Indexed> = all.filter(|m| m.is_on(port)).copied().collect();
    there.sort_unstable();
    let mut out = Chosen::new();
    for Indexed { rule, place, .. } in there {
        match out.last_mut() {
            Some((last, places)) if *last == rule => places.push(place),
            _ => out.push((rule, vec![place])),
        }
    }
    out
}

/// The rules keep their order.
fn ranked(object: &Str, matches: Vec<RouteMatch>) -> Arc<[Ranked]> {
    let rank = |place| Rank {
        specificity: Specificity::default(),
        age: (true, 0),
        object: object.clone(),
        rule: 0,
        place,
    };
    (0..).zip(matches).map(|(place, matched)| Ranked { rank: rank(place), matched }).collect()
}

/// Matches for a port that no Service has or that speaks no HTTP, and rules that no request gets to.
fn unused((_, sourced): Entry<'_>, of: &[&services::Compiled]) -> Vec<Diagnostic> {
    let ports = of.iter().flat_map(|s| s.service.ports.iter().zip(&s.ports));
    let mut protocols: BTreeMap<u32, Vec<Protocol>> = BTreeMap::new();
    for (port, facts) in ports {
        protocols.entry(port.service_port.into()).or_default().push(facts.protocol);
    }
    let mut found = Vec::new();
    let mut all = None;
    for (i, rule) in sourced.value.spec.http.iter().enumerate() {
        if let Some(before) = all {
            let message = format!("no request gets here: spec.http[{before}] takes every one");
            let d = Diagnostic::warning(Code::MatchesNothing, message);
            found.push(d.field(format!("spec.http[{i}]")).help("put it before that"));
            continue;
        }
        for (j, m) in rule.r#match.iter().enumerate() {
            let Some(port) = m.port.filter(|port| *port != 0) else { continue };
            let d = match protocols.get(&port) {
                None => {
                    let message = format!("no Service of spec.hosts has a port {port}");
                    Diagnostic::warning(Code::MatchesNothing, message)
                }
                Some(all) if all.iter().all(|p| *p == Protocol::Opaque) => protocol::not_http(&[]),
                Some(_) => continue,
            };
            found.push(d.field(format!("spec.http[{i}].match[{j}].port")));
        }
        let everything = |m: &HttpMatch| {
            let name = m.name.clone();
            *m == HttpMatch { name, ..HttpMatch::default() }
        };
        if rule.r#match.is_empty() || rule.r#match.iter().any(everything) {
            all = Some(i);
        }
    }
    found
}
