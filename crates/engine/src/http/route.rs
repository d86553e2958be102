//! The plan for one request: the rule that fits, its filters in order, and a backend by weight.
//!
//! Filters of the rule run first, then a backend is drawn, then run the filters of that backend. A filter that answers
//! ends it. Paths are rewritten from what the match saw, so of two rewrites the last one counts. A mirror gets the
//! request as the edits before it made it, and only if the request itself is sent.
//!
//! GRPCRoutes choose by path and headers as HTTPRoutes do; whether a refusal is worded for gRPC is decided by what the
//! client speaks.
//!
//! Invariants: no routes for this client and port: the Service's own endpoints, unchanged; routes and none that fits:
//! refused; a backend that is not valid keeps its share and answers with an error; no mirror, fault or weight shares
//! its draw with another.

use std::sync::Arc;

use http::header::{CONTENT_TYPE, LOCATION};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use model::http::{
    Backend, Fault, Filter, FixedResponse, PathMatch, Redirect, Rewrite, RouteKind, RouteRule,
    Target, Timeouts,
};
use model::{Reason, Refusal, Snapshot};

use super::cors::Judgement;
use super::edit::Edit;
use super::matching::{self, Asked};
use super::{Answer, HttpAction, HttpPlan, RequestFacts, answer, cors, edit, fault, normalize};
use super::{path, redirect};
use crate::dice::Dice;

/// Characters of a path in a message: enough to know it, too few to fill a log.
const SHOWN_PATH: usize = 128;

/// What to do with a request. `rand` decides shares; the same input gives the same plan.
pub fn route(snapshot: &Snapshot, facts: &RequestFacts<'_>, rand: u64) -> HttpPlan {
    let asked = Asked::new(facts);
    let namespace = facts.caller.identity.map(|identity| &identity.namespace);
    let set = snapshot
        .routes(&facts.service.key)
        .and_then(|routes| matching::set_for(routes, facts.port, namespace));
    let Some(set) = set else { return plain(facts) };
    let grpc = speaks_grpc(facts, set.kind);
    let found = matching::first(set, &asked).and_then(|place| set.matches.get(place as usize));
    let Some((found, rule)) = found.and_then(|m| Some((m, set.rules.get(m.rule as usize)?))) else {
        return no_route(facts, grpc);
    };
    let http2 = grpc || set.kind == RouteKind::Grpc;
    let plan = HttpPlan { rule: Some(rule.clone()), timeouts: rule.timeouts, ..empty(grpc) };
    let walk =
        Walk { facts, asked, rule, matched: &found.path, http2, dice: Dice::of_route(rand), plan };
    walk.run()
}

/// The plan for a request to a pod by its own address: routes belong to Services.
pub fn to_pod(request: &http::request::Parts) -> HttpPlan {
    let grpc = answer::is_grpc(&request.headers);
    // Where it goes is known already; whoever asks for a destination all the same gets none.
    let target = Target::Invalid { message: "a pod was called by its own address".into() };
    HttpPlan { action: HttpAction::Forward { target, http2: grpc }, ..empty(grpc) }
}

/// The way through a rule.
struct Walk<'a> {
    facts: &'a RequestFacts<'a>,
    asked: Asked<'a>,
    rule: &'a Arc<RouteRule>,
    matched: &'a PathMatch,
    http2: bool,
    dice: Dice,
    plan: HttpPlan,
}

impl Walk<'_> {
    fn run(mut self) -> HttpPlan {
        let rule = self.rule;
        let mut action = self.filters(&rule.filters).unwrap_or_else(|| self.backend());
        if let HttpAction::Answer(answer) = &mut action {
            self.plan.add_cors(&mut answer.headers);
        }
        if !matches!(action, HttpAction::Forward { .. }) {
            self.plan.mirrors.clear();
        }
        HttpPlan { action, ..self.plan }
    }

    /// `Some`: a filter decided what happens.
    fn filters(&mut self, filters: &[Filter]) -> Option<HttpAction> {
        for (place, filter) in filters.iter().enumerate() {
            let Some(action) = self.filter(filter) else { continue };
            return Some(match (filter, action) {
                (Filter::Redirect(_) | Filter::Respond(_), HttpAction::Answer(answer))
                    if answer.refusal.is_none() =>
                {
                    self.edited(answer, &filters[place + 1..])
                }
                (_, action) => action,
            });
        }
        None
    }

    /// What the rule itself answers, changed as a backend's answer would be; also by filters that stand behind the one that
    /// answers, since an answer passes all of them.
    fn edited(&mut self, mut answer: Answer, behind: &[Filter]) -> HttpAction {
        for filter in behind {
            if let Filter::ResponseHeaders(edits) = filter
                && let Err(message) = edit::of_response(edits, &mut self.plan.response_edits)
            {
                return self.refuse(Reason::BadFilter, &message);
            }
        }
        self.plan.response_edits.iter().for_each(|edit| edit.apply(&mut answer.headers));
        HttpAction::Answer(answer)
    }

    fn filter(&mut self, filter: &Filter) -> Option<HttpAction> {
        match filter {
            Filter::RequestHeaders(edits) => {
                let read = edit::of_request(edits, &mut self.plan.edits);
                self.unless_bad(read)
            }
            Filter::ResponseHeaders(edits) => {
                let read = edit::of_response(edits, &mut self.plan.response_edits);
                self.unless_bad(read)
            }
            Filter::Rewrite(rewrite) => {
                let read = self.rewrite(rewrite);
                self.unless_bad(read)
            }
            Filter::Redirect(redirect) => Some(self.redirect(redirect)),
            Filter::Mirror(mirror) => {
                let taken = mirror.share.takes(self.dice.draw());
                // A mirror to nowhere is no reason to fail: Gateway API wants the request itself unaffected.
                if taken && matches!(mirror.target, Target::Service { .. }) {
                    self.plan.mirrors.push(mirror.target.clone());
                    self.plan.mirror_edits.push(self.plan.edits.len());
                }
                None
            }
            Filter::Cors(cors) => match cors::judge(cors, self.facts.request) {
                Judgement::Preflight(headers) => Some(preflight(headers)),
                Judgement::Allowed(headers) => {
                    self.plan.cors = headers;
                    None
                }
                Judgement::Nothing => None,
            },
            Filter::Fault(fault) => self.fault(fault),
            Filter::Respond(fixed) => Some(self.respond(fixed)),
            Filter::Fail { reason, message } => Some(self.refuse(*reason, message)),
        }
    }

    fn rewrite(&mut self, rewrite: &Rewrite) -> Result<(), String> {
        if let Some(host) = &rewrite.host {
            self.plan.edits.push(Edit::Host(normalize::authority(host)?));
        }
        if let Some(rewrite) = &rewrite.path {
            let uri = &self.facts.request.uri;
            let path = path::rewritten(rewrite, self.matched, uri.path())?;
            self.plan.edits.push(Edit::Path(path::with_query(&path, uri.query())?));
        }
        Ok(())
    }

    fn redirect(&self, redirect: &Redirect) -> HttpAction {
        match redirect::redirect(redirect, self.facts, self.matched) {
            Ok((status, location)) => {
                let headers = HeaderMap::from_iter([(LOCATION, location)]);
                HttpAction::Answer(Answer { status, headers, body: "".into(), refusal: None })
            }
            Err(message) => self.refuse(Reason::BadFilter, &message),
        }
    }

    fn fault(&mut self, fault: &Fault) -> Option<HttpAction> {
        let hit = fault::hit(fault, &self.asked, self.facts.now, &mut self.dice);
        if let Some(delay) = hit.delay {
            self.plan.delay = Some(self.plan.delay.unwrap_or_default().saturating_add(delay));
        }
        let abort = hit.abort?;
        let refusal = self.refusal(Reason::Fault, "a fault was asked for");
        Some(fault::abort(abort, refusal, self.plan.grpc))
    }

    fn respond(&self, fixed: &FixedResponse) -> HttpAction {
        let Ok(status) = StatusCode::from_u16(fixed.status) else {
            let message = format!("{} is no HTTP status", fixed.status);
            return self.refuse(Reason::BadFilter, &message);
        };
        let mut headers = HeaderMap::new();
        if !fixed.body.is_empty() {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        }
        HttpAction::Answer(Answer { status, headers, body: fixed.body.clone(), refusal: None })
    }

    /// Draws a backend, and runs its filters.
    fn backend(&mut self) -> HttpAction {
        let rule = self.rule;
        let Some(backend) = draw(&rule.backends, &mut self.dice) else {
            let message = match rule.backends.len() {
                0 => "the rule has no backend".to_owned(),
                n => format!("the weights of all {n} backends are 0"),
            };
            return self.refuse(Reason::BadBackend, &message);
        };
        if let Target::Invalid { message } = &backend.target {
            return self.refuse(Reason::BadBackend, message);
        }
        let forward = HttpAction::Forward { target: backend.target.clone(), http2: self.http2 };
        self.filters(&backend.filters).unwrap_or(forward)
    }

    fn unless_bad(&self, read: Result<(), String>) -> Option<HttpAction> {
        read.err().map(|message| self.refuse(Reason::BadFilter, &message))
    }

    fn refuse(&self, reason: Reason, message: &str) -> HttpAction {
        HttpAction::Answer(answer(self.refusal(reason, message), self.plan.grpc))
    }

    fn refusal(&self, reason: Reason, message: &str) -> Refusal {
        let message = format!("{} {}: {message}", self.rule.route, self.rule.name);
        let provenance = Some(self.rule.provenance.clone());
        Refusal { provenance, ..Refusal::new(reason, message) }
    }
}

/// A backend by its share; `None` when nobody has one.
fn draw<'a>(backends: &'a [Backend], dice: &mut Dice) -> Option<&'a Backend> {
    let total: u64 = backends.iter().map(|b| u64::from(b.weight)).sum();
    let mut left = dice.below(total);
    backends.iter().find(|backend| {
        let weight = u64::from(backend.weight);
        let taken = left < weight;
        left = left.saturating_sub(weight);
        taken
    })
}

/// What the client speaks decides; where it does not say, a POST to a GRPCRoute is gRPC.
fn speaks_grpc(facts: &RequestFacts<'_>, kind: RouteKind) -> bool {
    let headers = &facts.request.headers;
    answer::is_grpc(headers)
        || (kind == RouteKind::Grpc
            && facts.request.method == Method::POST
            && !headers.contains_key(CONTENT_TYPE))
}

/// A Service without routes for this client and port.
fn plain(facts: &RequestFacts<'_>) -> HttpPlan {
    let grpc = answer::is_grpc(&facts.request.headers);
    let service = facts.service.key.clone();
    let target = Target::Service { service, port: facts.port, subset: None };
    HttpPlan { action: HttpAction::Forward { target, http2: grpc }, ..empty(grpc) }
}

fn no_route(facts: &RequestFacts<'_>, grpc: bool) -> HttpPlan {
    let request = facts.request;
    let path: String = request.uri.path().chars().take(SHOWN_PATH).collect();
    let message =
        format!("no rule for {}:{} fits {} {path}", facts.service.key, facts.port, request.method);
    let answer = answer(Refusal::new(Reason::NoRoute, message), grpc);
    HttpPlan { action: HttpAction::Answer(answer), ..empty(grpc) }
}

fn preflight(headers: HeaderMap) -> HttpAction {
    let status = StatusCode::NO_CONTENT;
    HttpAction::Answer(Answer { status, headers, body: "".into(), refusal: None })
}

/// A plan that nobody has filled in: it refuses.
fn empty(grpc: bool) -> HttpPlan {
    HttpPlan {
        rule: None,
        delay: None,
        action: HttpAction::Reset(Refusal::new(Reason::NoRoute, "")),
        mirrors: Vec::new(),
        timeouts: Timeouts::default(),
        grpc,
        edits: Vec::new(),
        mirror_edits: Vec::new(),
        response_edits: Vec::new(),
        cors: HeaderMap::new(),
    }
}
