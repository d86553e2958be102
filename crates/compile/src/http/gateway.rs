//! Gateway API's routes whose parents are Services: which Service and ports, whose requests, and what status says.
//!
//! A route in its Service's namespace is a producer's and for everybody; one in another is a consumer's, for the clients of its own
//! namespace. Neither needs a grant.
//!
//! Invariants: every parent that is ours gets a status; every condition that is not good is a diagnostic with its place; a
//! field that is not honoured is named.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use model::http::{Audience, Protocol};
use model::{Provenance, Str};

use super::rules::{RuleCompiler, Rules};
use super::shape::{self, ParentRef};
use super::status::{CONTROLLER_NAME, Condition, ConditionReason, ConditionType};
use super::{Api, Contribution, Loss, ParentReference, Rank, Ranked, RouteStatus};
use crate::context::{Budget, Context};
use crate::diagnostics::{Code, Diagnostic};
use crate::gateway_api::GROUP;
use crate::object::{Meta, Objects, Origin, Sourced, Table, object_id};
use crate::services::{self, ByNamespace};

/// A route, and what became of it at its parents.
#[derive(Debug)]
pub(super) struct Attached<'a> {
    object: RouteObject<'a>,
    parents: Vec<Parent<'a>>,
    bad_references: Vec<(ConditionReason, String)>,
    dropped: Vec<(ConditionReason, String)>,
    /// It has rules, and every one was dropped.
    nothing_left: bool,
}

#[derive(Clone, Copy, Debug)]
struct RouteObject<'a> {
    kind: &'static str,
    api: Api,
    key: &'a (Str, Str),
    meta: &'a ObjectMeta,
    origin: &'a Origin,
}

/// A parent that is ours to judge.
#[derive(Debug)]
struct Parent<'a> {
    /// Its place in `spec.parentRefs`.
    index: usize,
    reference: ParentRef<'a>,
    verdict: Result<Attachment<'a>, Refused>,
}

#[derive(Debug)]
struct Attachment<'a> {
    service: &'a services::Compiled,
    ports: Vec<u16>,
    /// `None`: the route has nothing to contribute.
    contribution: Option<usize>,
}

#[derive(Debug)]
struct Refused {
    reason: ConditionReason,
    code: Code,
    message: String,
    help: &'static str,
}

/// Adds what all routes say. What is returned becomes status once it is known who won where.
pub(super) fn contributions<'a>(
    objects: &'a Objects,
    services: &'a ByNamespace,
    out: &mut Vec<Contribution>,
    cx: &mut Context<'_>,
) -> Vec<Attached<'a>> {
    grants(objects, cx);
    let http = each(&objects.http_routes, Api::HttpRoute);
    let http = http.map(|(object, route)| (object, shape::Route::http(route)));
    let grpc = each(&objects.grpc_routes, Api::GrpcRoute);
    let grpc = grpc.map(|(object, route)| (object, shape::Route::grpc(route)));
    grpc.chain(http)
        .map(|(object, route)| attach(object, &route, objects, services, out, cx))
        .collect()
}

fn each<T: Meta>(table: &Table<T>, api: Api) -> impl Iterator<Item = (RouteObject<'_>, &T)> {
    table.iter().map(move |(key, Sourced { value, origin })| {
        (RouteObject { kind: T::KIND, api, key, meta: value.meta(), origin }, &**value)
    })
}

/// ReferenceGrants are for routes of Gateways; ours do not need them.
fn grants(objects: &Objects, cx: &mut Context<'_>) {
    for (key, sourced) in &objects.reference_grants {
        let message = "has no effect: routes of Services may send to any namespace without one";
        cx.report(key, sourced, Diagnostic::info(Code::NoEffect, message));
    }
}

fn attach<'a>(
    object: RouteObject<'a>,
    route: &shape::Route<'a>,
    objects: &'a Objects,
    services: &'a ByNamespace,
    out: &mut Vec<Contribution>,
    cx: &mut Context<'_>,
) -> Attached<'a> {
    let id: Str = object_id(object.kind, &object.key.0, &object.key.1).into();
    let mut compiler = RuleCompiler {
        objects,
        services,
        cx: &mut *cx,
        namespace: &object.key.0,
        patterns: Budget::default(),
        diagnostics: Vec::new(),
        bad_references: Vec::new(),
        dropped: Vec::new(),
    };
    let rules = compiler.rules(route, &id, object.origin);
    let RuleCompiler { mut diagnostics, bad_references, dropped, .. } = compiler;
    let mut parents = parents(object, route, objects, services, &mut diagnostics);
    if route.hostnames && parents.iter().any(|p| p.verdict.is_ok()) {
        let message = "not looked at: what was called decides, not what the request says";
        let d = Diagnostic::warning(Code::NoEffect, message).field("spec.hostnames");
        diagnostics.push(d.help("match the Host header instead"));
    }
    portable(route, &mut diagnostics);
    if route.default_gateways {
        let message = "not handled by this version: there are no default Gateways";
        let d = Diagnostic::warning(Code::Unsupported, message);
        diagnostics.push(d.field("spec.useDefaultGateways"));
    }
    for d in diagnostics {
        object.report(d, cx);
    }
    let nothing_left = rules.rules.is_empty() && !route.rules.is_empty();
    if !nothing_left {
        contribute(object, &id, &rules, &mut parents, out);
    }
    Attached { object, parents, bad_references, dropped, nothing_left }
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
    object: RouteObject<'_>,
    id: &Str,
    rules: &Rules,
    parents: &mut [Parent<'_>],
    out: &mut Vec<Contribution>,
) {
    let matches = ranked(object, rules);
    let mut of_service = BTreeMap::new();
    for parent in parents {
        let Ok(attachment) = &mut parent.verdict else { continue };
        let service = &attachment.service.service.key;
        let index = *of_service.entry(service).or_insert_with(|| {
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
            });
            out.len() - 1
        });
        attachment.contribution = Some(index);
        let ports = &mut out[index].ports;
        ports.extend(&attachment.ports);
        ports.sort_unstable();
        ports.dedup();
    }
}

fn ranked(object: RouteObject<'_>, rules: &Rules) -> Vec<Ranked> {
    // Whole seconds: an API server keeps no more, and what it would cut off must decide nothing here.
    let created = object.meta.creation_timestamp.as_ref().map(|t| t.0.as_second());
    let age = (created.is_none(), created.unwrap_or_default());
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
    out
}

fn parents<'a>(
    object: RouteObject<'a>,
    route: &shape::Route<'a>,
    objects: &'a Objects,
    services: &'a ByNamespace,
    diagnostics: &mut Vec<Diagnostic>,
) -> Vec<Parent<'a>> {
    if route.parents.is_empty() {
        let d = Diagnostic::warning(Code::NoEffect, "names no parent, so it applies nowhere");
        diagnostics.push(d.field("spec.parentRefs").help(NAME_A_SERVICE));
    }
    let mut out = Vec::new();
    for (index, reference) in route.parents.iter().enumerate() {
        let at = format!("spec.parentRefs[{index}]");
        let group = reference.group.unwrap_or(GROUP);
        let kind = reference.kind.unwrap_or("Gateway");
        if (group, kind) == ("", "Service") {
            let verdict = service(object, reference, objects, services);
            if let Ok(attachment) = &verdict
                && let Some(d) = untouched(attachment)
            {
                diagnostics.push(d.field(at));
            }
            out.push(Parent { index, reference: *reference, verdict });
            continue;
        }
        if (group, kind) == (GROUP, "Gateway") && is_waypoint(object, reference, objects) {
            let verdict = Err(Refused {
                reason: ConditionReason::NotAllowedByListeners,
                code: Code::Unsupported,
                message: "a waypoint takes no routes of its own: they apply at Services".to_owned(),
                help: NAME_A_SERVICE,
            });
            out.push(Parent { index, reference: *reference, verdict });
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
fn is_waypoint(object: RouteObject<'_>, reference: &ParentRef<'_>, objects: &Objects) -> bool {
    let namespace = reference.namespace.unwrap_or(&object.key.0);
    let gateway = objects.gateways.get(&(namespace.into(), reference.name.into()));
    gateway.is_some_and(|g| g.value.spec.gateway_class_name == WAYPOINT_CLASS)
}

/// The GatewayClass of waypoints.
const WAYPOINT_CLASS: &str = "istio-waypoint";

const NAME_A_SERVICE: &str = "name a Service: {group: \"\", kind: Service, name: ...}";

fn service<'a>(
    object: RouteObject<'_>,
    reference: &ParentRef<'_>,
    objects: &Objects,
    services: &'a ByNamespace,
) -> Result<Attachment<'a>, Refused> {
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
    Ok(Attachment { service, ports, contribution: None })
}

/// A finding about a parent none of whose ports speak HTTP.
fn untouched(attachment: &Attachment<'_>) -> Option<Diagnostic> {
    let ports = attachment.service.service.ports.iter().zip(&attachment.service.ports);
    let mut chosen = ports.filter(|(p, _)| attachment.ports.contains(&p.service_port));
    if !chosen.all(|(_, facts)| facts.protocol == Protocol::Opaque) {
        return None;
    }
    let message =
        "the Service declares that no such port speaks HTTP: what goes there is not looked into";
    let d = Diagnostic::warning(Code::NoEffect, message);
    Some(d.help("set the port's appProtocol: http, kubernetes.io/h2c or grpc"))
}

/// The status of every route at every parent that is ours.
pub(super) fn status(
    attached: Vec<Attached<'_>>,
    contributions: &[Contribution],
    losses: &[Loss],
    cx: &mut Context<'_>,
) -> Vec<RouteStatus> {
    let mut lost: BTreeMap<usize, BTreeMap<u16, usize>> = BTreeMap::new();
    for loss in losses {
        lost.entry(loss.contribution).or_default().insert(loss.port, loss.winner);
    }
    let mut out = Vec::new();
    for route in attached {
        for parent in &route.parents {
            let none = BTreeMap::new();
            let contribution = parent.verdict.as_ref().ok().and_then(|a| a.contribution);
            let lost = contribution.and_then(|c| lost.get(&c)).unwrap_or(&none);
            let accepted = route.accepted(parent, lost, contributions, cx);
            let object = &route.object;
            out.push(RouteStatus {
                kind: object.kind,
                namespace: object.key.0.clone(),
                name: object.key.1.clone(),
                parent_ref: reference(&parent.reference),
                controller_name: CONTROLLER_NAME,
                conditions: route.conditions(accepted),
            });
        }
    }
    out
}

impl Attached<'_> {
    /// Whether the route applies at a parent, and what there is to say. A refusal is reported.
    fn accepted(
        &self,
        parent: &Parent<'_>,
        lost: &BTreeMap<u16, usize>,
        contributions: &[Contribution],
        cx: &mut Context<'_>,
    ) -> (bool, ConditionReason, String) {
        let at = format!("spec.parentRefs[{}]", parent.index);
        let attachment = match &parent.verdict {
            Ok(attachment) => attachment,
            Err(Refused { reason, code, message, help }) => {
                let d = Diagnostic::error(*code, message.clone()).field(at).help(*help);
                self.object.report(d, cx);
                return (false, *reason, message.clone());
            }
        };
        if self.nothing_left {
            let reason = self.dropped.first().map_or(ConditionReason::UnsupportedValue, |d| d.0);
            return (false, reason, format!("every rule is dropped: {}", self.why_dropped()));
        }
        let own: Vec<u16> =
            attachment.ports.iter().filter(|p| lost.contains_key(p)).copied().collect();
        let name = &attachment.service.service.key;
        if own.is_empty() {
            let message = format!("applies to {} of {name}", ports(&attachment.ports));
            return (true, ConditionReason::Accepted, message);
        }
        let winners: BTreeSet<usize> = own.iter().filter_map(|p| lost.get(p)).copied().collect();
        let winners = winners.iter().filter_map(|w| contributions.get(*w));
        let winners: Vec<String> = winners.map(|w| w.provenance.to_string()).collect();
        let message = format!("{} of {name} belongs to {}", ports(&own), winners.join(", "));
        let d = Diagnostic::error(Code::RouteConflict, message.clone()).field(at);
        self.object.report(d.help(ONE_KIND), cx);
        if own.len() == attachment.ports.len() {
            return (false, ConditionReason::Conflicted, message);
        }
        let rest: Vec<u16> =
            attachment.ports.iter().filter(|p| !own.contains(p)).copied().collect();
        let message = format!("applies to {} of {name}; {message}", ports(&rest));
        (true, ConditionReason::Accepted, message)
    }

    fn conditions(&self, accepted: (bool, ConditionReason, String)) -> Vec<Condition> {
        let generation = self.object.meta.generation.unwrap_or_default();
        let new = |kind, status, reason, message| {
            Condition::new(kind, status, reason, message, generation)
        };
        let (is_accepted, reason, message) = accepted;
        let mut out = vec![new(ConditionType::Accepted, is_accepted, reason, message)];
        let resolved = ConditionType::ResolvedRefs;
        out.push(match self.bad_references.first() {
            None => new(resolved, true, ConditionReason::ResolvedRefs, String::new()),
            Some((reason, _)) => {
                let all: Vec<&str> = self.bad_references.iter().map(|b| b.1.as_str()).collect();
                new(resolved, false, *reason, all.join("; "))
            }
        });
        if is_accepted && let Some((reason, _)) = self.dropped.first() {
            let message = format!("Dropped Rule {}", self.why_dropped());
            out.push(new(ConditionType::PartiallyInvalid, true, *reason, message));
        }
        out
    }

    fn why_dropped(&self) -> String {
        let all: Vec<&str> = self.dropped.iter().map(|d| d.1.as_str()).collect();
        all.join("; ")
    }
}

/// What to do about two APIs on one port.
pub(super) const ONE_KIND: &str = "on one port of a Service a GRPCRoute wins over an HTTPRoute, and that over a VirtualService: keep one";

impl RouteObject<'_> {
    fn report(&self, d: Diagnostic, cx: &mut Context<'_>) {
        let origin = self.origin.at(&d.field);
        let object = object_id(self.kind, &self.key.0, &self.key.1);
        cx.diagnostics.push(d.object(object).origin(origin));
    }
}

fn reference(r: &ParentRef<'_>) -> ParentReference {
    ParentReference {
        group: r.group.map(Str::from),
        kind: r.kind.map(Str::from),
        namespace: r.namespace.map(Str::from),
        name: r.name.into(),
        section_name: r.section_name.map(Str::from),
        port: r.port,
    }
}

fn ports(all: &[u16]) -> String {
    let numbers: Vec<String> = all.iter().map(u16::to_string).collect();
    let what = if all.len() == 1 { "port" } else { "ports" };
    format!("{what} {}", numbers.join(", "))
}
