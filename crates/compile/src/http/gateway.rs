//! Gateway API's routes whose parents are Services: which Service and ports, whose requests, and what status says.
//!
//! A route in its Service's namespace is a producer's and for everybody; one in another is a consumer's, for the clients of its own
//! namespace. Neither needs a grant.
//!
//! What a route means within what everything else says is an [`Attached`], which is kept from one time to the next.
//!
//! Invariants: every parent that is ours gets a status; every condition that is not good is a diagnostic with its place; a
//! field that is not honoured is named.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};

use model::http::Audience;
use model::{Provenance, Service, Str};

use super::protocol;
use super::rules::{RuleCompiler, Rules};
use super::shape::{self, ParentRef};
use super::status::ConditionReason;
use super::{Api, Contribution, ParentReference, Rank, Ranked};
use crate::context::{Budget, Context};
use crate::diagnostics::{Code, Diagnostic};
use crate::gateway_api::GROUP;
use crate::object::{Meta, Objects, Origin, Sourced, Table, object_id};
use crate::services::{self, ByNamespace};
use crate::waypoints;

mod judge;

use judge::Verdict;
pub(super) use judge::judge;

/// A route, and what became of it at its parents.
#[derive(Debug)]
pub(super) struct Attached {
    object: RouteObject,
    parents: Vec<Parent>,
    /// What it says, once for each Service.
    contributions: Vec<Arc<Contribution>>,
    diagnostics: Vec<Diagnostic>,
    bad_references: Vec<(ConditionReason, String)>,
    dropped: Vec<(ConditionReason, String)>,
    /// It has rules, and every one was dropped.
    nothing_left: bool,
    /// The names of the `HTTPFault`s that it names.
    faults: BTreeSet<Str>,
    /// How it is where nobody else has a say and there is room, once that was asked.
    undisputed: OnceLock<Verdict>,
}

#[derive(Debug)]
struct RouteObject {
    kind: &'static str,
    api: Api,
    key: (Str, Str),
    generation: i64,
    /// Whole seconds: an API server keeps no more, and what it would cut off must decide nothing here.
    created: Option<i64>,
    origin: Origin,
}

/// A parent that is ours to judge.
#[derive(Debug)]
struct Parent {
    /// Its place in `spec.parentRefs`.
    index: usize,
    reference: ParentReference,
    verdict: Result<Attachment, Refused>,
}

#[derive(Debug)]
struct Attachment {
    service: Arc<Service>,
    ports: Vec<u16>,
    /// Its place among the route's own. `None`: the route has nothing to contribute.
    contribution: Option<usize>,
}

#[derive(Debug)]
struct Refused {
    reason: ConditionReason,
    code: Code,
    message: String,
    help: &'static str,
}

/// All routes of one time, each kind in the order of names.
#[derive(Debug, Default)]
pub(super) struct Memo {
    grpc: Vec<Arc<Attached>>,
    http: Vec<Arc<Attached>>,
}

impl Memo {
    fn all(&self) -> impl Iterator<Item = &Arc<Attached>> {
        self.grpc.iter().chain(&self.http)
    }

    /// What all of them say, in the order in which [`judge`] counts them.
    pub(super) fn contributions(&self) -> Vec<Arc<Contribution>> {
        self.all().flat_map(|attached| attached.contributions.iter().cloned()).collect()
    }
}

/// What all routes say; they are judged once it is known who won where. A route that is as it was `before` is as it was `known`.
pub(super) fn attach_all(
    objects: &Objects,
    before: Option<&Objects>,
    services: &ByNamespace,
    known: &mut Memo,
    cx: &mut Context<'_>,
) -> Memo {
    let known = std::mem::take(known);
    let around = Around { objects, services };
    let (of_grpc, of_http) = before.map(|b| (&b.grpc_routes, &b.http_routes)).unzip();
    let grpc = each(&objects.grpc_routes, of_grpc, known.grpc, |route| {
        let object = RouteObject::new(route, Api::GrpcRoute);
        attach(object, &shape::Route::grpc(&route.1.value), &around, cx)
    });
    let http = each(&objects.http_routes, of_http, known.http, |route| {
        let object = RouteObject::new(route, Api::HttpRoute);
        attach(object, &shape::Route::http(&route.1.value), &around, cx)
    });
    let all = Memo { grpc, http };
    cx.diagnostics.extend(all.all().flat_map(|attached| attached.diagnostics.iter().cloned()));
    all
}

/// What is around a route.
struct Around<'a> {
    objects: &'a Objects,
    services: &'a ByNamespace,
}

/// `known` stands beside `before`.
fn each<'a, T: Meta + PartialEq>(
    table: &'a Table<T>,
    before: Option<&Table<T>>,
    known: Vec<Arc<Attached>>,
    mut attach: impl FnMut((&'a (Str, Str), &'a Sourced<T>)) -> Attached,
) -> Vec<Arc<Attached>> {
    let mut old = before.into_iter().flatten().zip(known).peekable();
    let mut one = |(key, sourced): (&'a (Str, Str), &'a Sourced<T>)| {
        // Both are in the order of names.
        while old.next_if(|((name, _), _)| *name < key).is_some() {}
        match old.next_if(|((name, _), _)| *name == key) {
            Some(((_, before), attached)) if before.is(sourced) => attached,
            _ => Arc::new(attach((key, sourced))),
        }
    };
    table.iter().map(&mut one).collect()
}

/// ReferenceGrants are for routes of Gateways; ours do not need them.
pub(crate) fn grants(objects: &Objects, cx: &mut Context<'_>) {
    for (key, sourced) in &objects.reference_grants {
        let message = "has no effect: routes of Services may send to any namespace without one";
        cx.report(key, sourced, Diagnostic::info(Code::NoEffect, message));
    }
}

fn attach(
    object: RouteObject,
    route: &shape::Route<'_>,
    around: &Around<'_>,
    cx: &mut Context<'_>,
) -> Attached {
    let Around { objects, services } = *around;
    let id: Str = object_id(object.kind, &object.key.0, &object.key.1).into();
    let mut compiler = RuleCompiler {
        objects,
        services,
        cx,
        namespace: &object.key.0,
        patterns: Budget::default(),
        diagnostics: Vec::new(),
        bad_references: Vec::new(),
        dropped: Vec::new(),
        faults: BTreeSet::new(),
    };
    let rules = compiler.rules(route, &id, &object.origin);
    let RuleCompiler { mut diagnostics, bad_references, dropped, faults, .. } = compiler;
    let mut parents = parents(&object, route, around, &mut diagnostics);
    remarks(route, &parents, &mut diagnostics);
    let nothing_left = rules.rules.is_empty() && !route.rules.is_empty();
    // Without a rule it would take the port from others, and every request would find no route.
    let contributions = if rules.rules.is_empty() {
        Vec::new()
    } else {
        contribute(&object, &id, ranked(&object, &rules), &rules, &mut parents)
    };
    let diagnostics = diagnostics.into_iter().map(|d| object.found(d)).collect();
    Attached {
        object,
        parents,
        contributions,
        diagnostics,
        bad_references,
        dropped,
        nothing_left,
        faults,
        undisputed: OnceLock::new(),
    }
}

/// What is legal and hardly meant, or not honoured.
fn remarks(route: &shape::Route<'_>, parents: &[Parent], diagnostics: &mut Vec<Diagnostic>) {
    if route.hostnames && parents.iter().any(|p| p.verdict.is_ok()) {
        let message = "not looked at: what was called decides, not what the request says";
        let d = Diagnostic::warning(Code::NoEffect, message).field("spec.hostnames");
        diagnostics.push(d.help("match the Host header instead"));
    }
    if route.rules.is_empty() {
        let message = "has no rule: requests go on as if the route were not there";
        diagnostics.push(Diagnostic::warning(Code::NoEffect, message).field("spec.rules"));
    }
    portable(route, diagnostics);
    if route.default_gateways {
        let message = "not handled by this version: there are no default Gateways";
        let d = Diagnostic::warning(Code::Unsupported, message);
        diagnostics.push(d.field("spec.useDefaultGateways"));
    }
}

/// What an API server would refuse for its length. We take it: files have a limit of their own.
fn portable(route: &shape::Route<'_>, diagnostics: &mut Vec<Diagnostic>) {
    let mut check = |field: String, length: usize, most: usize| {
        if length > most {
            let message = format!("has {length} entries; a cluster takes at most {most}");
            let d = Diagnostic::warning(Code::LimitExceeded, message).field(field);
            diagnostics.push(d.help("use several routes: their rules are put together"));
        }
    };
    check("spec.parentRefs".into(), route.parents.len(), 32);
    check("spec.rules".into(), route.rules.len(), 16);
    for (i, rule) in route.rules.iter().enumerate() {
        check(format!("spec.rules[{i}].matches"), rule.matches.len(), 64);
        check(format!("spec.rules[{i}].filters"), rule.filters.len(), 16);
        check(format!("spec.rules[{i}].backendRefs"), rule.backends.len(), 16);
    }
}

/// One contribution per Service: two parents that differ in the port share it.
fn contribute(
    object: &RouteObject,
    id: &Str,
    matches: Arc<[Ranked]>,
    rules: &Rules,
    parents: &mut [Parent],
) -> Vec<Arc<Contribution>> {
    let mut out: Vec<Contribution> = Vec::new();
    let mut of_service = BTreeMap::new();
    for parent in parents {
        let Ok(attachment) = &mut parent.verdict else { continue };
        let service = &attachment.service.key;
        let place = *of_service.entry(service.clone()).or_insert_with(|| {
            let namespace = &object.key.0;
            let producer = service.namespace == *namespace;
            let consumer = || Audience::Namespace(namespace.clone());
            out.push(Contribution {
                service: service.clone(),
                audience: if producer { Audience::Everybody } else { consumer() },
                ports: Vec::new(),
                api: object.api,
                provenance: Provenance {
                    object: id.clone(),
                    field: "spec.parentRefs".into(),
                    origin: object.origin.at("spec.parentRefs").into(),
                },
                rules: rules.rules.clone(),
                matches: matches.clone(),
                holds: OnceLock::new(),
            });
            out.len() - 1
        });
        attachment.contribution = Some(place);
        let ports = &mut out[place].ports;
        ports.extend(&attachment.ports);
        ports.sort_unstable();
        ports.dedup();
    }
    out.into_iter().map(Arc::new).collect()
}

fn ranked(object: &RouteObject, rules: &Rules) -> Arc<[Ranked]> {
    let age = (object.created.is_none(), object.created.unwrap_or_default());
    let name: Str = format!("{}/{}", object.key.0, object.key.1).into();
    let mut out = Vec::new();
    for (own, (rule, matches)) in (0_u32..).zip(&rules.matches) {
        for (place, (specificity, matched)) in (0_u32..).zip(matches) {
            let object = name.clone();
            let rank = Rank { specificity: *specificity, age, object, rule: *rule, place };
            let mut matched = matched.clone();
            matched.rule = own;
            out.push(Ranked { rank, matched });
        }
    }
    out.into()
}

fn parents(
    object: &RouteObject,
    route: &shape::Route<'_>,
    around: &Around<'_>,
    diagnostics: &mut Vec<Diagnostic>,
) -> Vec<Parent> {
    if route.parents.is_empty() {
        let d = Diagnostic::warning(Code::NoEffect, "names no parent, so it applies nowhere");
        diagnostics.push(d.field("spec.parentRefs").help(NAME_A_SERVICE));
    }
    let mut out = Vec::new();
    for (index, reference) in route.parents.iter().enumerate() {
        let at = format!("spec.parentRefs[{index}]");
        let group = reference.group.unwrap_or(GROUP);
        let kind = reference.kind.unwrap_or("Gateway");
        let written = parent_reference(reference);
        if (group, kind) == ("", "Service") {
            let found = service(object, reference, around);
            if let Ok((service, ports)) = &found
                && let Some(d) = protocol::untouched(service, ports)
            {
                diagnostics.push(d.field(at));
            }
            let verdict = found.map(|(service, ports)| {
                let service = service.service.clone();
                Attachment { service, ports, contribution: None }
            });
            out.push(Parent { index, reference: written, verdict });
            continue;
        }
        if (group, kind) == (GROUP, "Gateway") && is_waypoint(object, reference, around.objects) {
            let verdict = Err(Refused {
                reason: ConditionReason::NotAllowedByListeners,
                code: Code::Unsupported,
                message: "a waypoint takes no routes of its own: they apply at Services".to_owned(),
                help: NAME_A_SERVICE,
            });
            out.push(Parent { index, reference: written, verdict });
            continue;
        }
        let d = if (group, kind) == (GROUP, "Service") {
            let message = format!("{GROUP} has no kind Service: the route applies nowhere by this");
            Diagnostic::error(Code::DanglingReference, message).help("say group: \"\" beside it")
        } else {
            let message = format!("no route of this version applies at a {kind} ({group})");
            Diagnostic::warning(Code::Unsupported, message).help(NAME_A_SERVICE)
        };
        diagnostics.push(d.field(at));
    }
    out
}

/// Whether a Gateway is one of ours. Another controller says what it thinks of the routes of its own.
fn is_waypoint(object: &RouteObject, reference: &ParentRef<'_>, objects: &Objects) -> bool {
    let namespace = reference.namespace.unwrap_or(&object.key.0);
    let gateway = objects.gateways.get(&(namespace.into(), reference.name.into()));
    gateway.is_some_and(|g| waypoints::is_ours(&g.value.spec.gateway_class_name, objects))
}

const NAME_A_SERVICE: &str = "name a Service: {group: \"\", kind: Service, name: ...}";

/// The Service that a parent names, and those of its ports that it means.
fn service<'a>(
    object: &RouteObject,
    reference: &ParentRef<'_>,
    &Around { objects, services }: &Around<'a>,
) -> Result<(&'a services::Compiled, Vec<u16>), Refused> {
    let namespace = reference.namespace.unwrap_or(&object.key.0);
    let name = format!("Service {namespace}/{}", reference.name);
    let refused = |reason, code, message: String, help| Refused { reason, code, message, help };
    let no_parent = |message: String, help| {
        refused(ConditionReason::NoMatchingParent, Code::DanglingReference, message, help)
    };
    let no_frontend = |message: String| {
        let help = "give it a virtual address (clusterIP)";
        refused(ConditionReason::UnsupportedValue, Code::Unsupported, message, help)
    };
    let Some(service) = services::find(services, namespace, reference.name) else {
        return Err(if objects.services.contains_key(&(namespace.into(), reference.name.into())) {
            no_frontend(format!("{name} is no Service that can be called (ExternalName)"))
        } else {
            no_parent(format!("there is no {name}"), "add it, or mend the name")
        });
    };
    if service.headless {
        let message = format!("{name} is headless: its pods are called, not the Service");
        return Err(no_frontend(message));
    }
    let all = service.service.ports.iter().zip(&service.ports);
    let wanted = all.filter(|(port, facts)| {
        reference.port.is_none_or(|p| p == i32::from(port.service_port))
            && reference.section_name.is_none_or(|n| n == &*facts.name)
    });
    let mut ports: Vec<u16> = wanted.map(|(port, _)| port.service_port).collect();
    ports.sort_unstable();
    if ports.is_empty() {
        let port = reference.port.map(|p| format!(" {p}")).unwrap_or_default();
        let named = reference.section_name.map(|n| format!(" named {n}")).unwrap_or_default();
        let message = format!("{name} has no TCP port{port}{named}");
        return Err(no_parent(message, "the Service's own port, or leave it out for all"));
    }
    Ok((service, ports))
}

/// What to do about two APIs on one port.
pub(super) const ONE_KIND: &str = "on one port of a Service a GRPCRoute wins over an HTTPRoute, and that over a VirtualService: keep one";

impl RouteObject {
    fn new<T: Meta>((key, sourced): (&(Str, Str), &Sourced<T>), api: Api) -> Self {
        let meta = sourced.value.meta();
        Self {
            kind: T::KIND,
            api,
            key: key.clone(),
            generation: meta.generation.unwrap_or_default(),
            created: meta.creation_timestamp.as_ref().map(|t| t.0.as_second()),
            origin: sourced.origin.clone(),
        }
    }

    /// A finding about it, complete.
    fn found(&self, d: Diagnostic) -> Diagnostic {
        let origin = self.origin.at(&d.field);
        let object = object_id(self.kind, &self.key.0, &self.key.1);
        d.object(object).origin(origin)
    }
}

fn parent_reference(r: &ParentRef<'_>) -> ParentReference {
    ParentReference {
        group: r.group.map(Str::from),
        kind: r.kind.map(Str::from),
        namespace: r.namespace.map(Str::from),
        name: r.name.into(),
        section_name: r.section_name.map(Str::from),
        port: r.port,
    }
}
