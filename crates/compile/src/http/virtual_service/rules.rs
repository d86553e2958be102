//! One rule of a VirtualService: its matches, and what happens to requests that fit.
//!
//! A rule becomes as many as its matches need: the rewrite of a path depends on how the path was matched, and a match that
//! cannot be honoured leads to an error where others of the same rule lead on.
//!
//! Invariants: total; what cannot be honoured answers with an error ([`Filter::Fail`]) for at least the requests it was
//! meant for.

use std::collections::BTreeSet;
use std::time::Duration;

use model::http::{
    Backend, Filter, PathMatch, PathRewrite, Pattern, PatternError, Redirect, RouteMatch,
    RouteRule, SubsetKey, Target, Timeouts,
};
use model::{Provenance, Reason};

use super::super::hosts::{self, Host};
use super::matches::{self, Matched};
use crate::diagnostics::{Code, Diagnostic};
use crate::istio::duration;
use crate::istio::virtual_service::{Destination, HttpRule, RouteDestination};
use crate::services::{self, ByNamespace};

/// The largest weight: the sum of a rule's stays far from the end of `u32`.
const MAX_WEIGHT: u32 = 1_000_000;

/// Where a rule is compiled for.
#[derive(Debug)]
pub(super) enum Place<'a> {
    /// Only to see whether it makes sense in itself.
    Nowhere,
    At(There<'a>),
}

#[derive(Debug)]
pub(super) struct There<'a> {
    /// Of the object.
    pub namespace: &'a str,
    pub domain: &'a str,
    pub services: &'a ByNamespace,
    pub subsets: &'a BTreeSet<&'a SubsetKey>,
    /// The Service port that was called.
    pub port: u16,
    /// Whether a match looks at the client's namespace itself.
    pub by_source: bool,
}

/// Reads rules, and notes what it finds.
pub(super) struct Reader<'r> {
    pattern: &'r mut dyn FnMut(&str) -> Result<Pattern, PatternError>,
    /// Without object and place; each names its field. Those with [`Code::InvalidField`] an API server would refuse.
    pub found: Vec<Diagnostic>,
}

/// That something cannot be honoured, in one line. It has been noted.
pub(super) type Failure = String;

/// How the path changes: it depends on how it was matched.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum PathChange {
    None,
    /// The part that was matched gives way.
    Matched(String),
    /// The same in a redirect, which asks for prefixes.
    Prefix(String),
    Fixed(PathRewrite),
}

/// What a rule does, before its matches are looked at.
#[derive(Debug)]
pub(super) struct Actions {
    pub filters: Vec<Filter>,
    pub host: Option<model::Str>,
    pub path: PathChange,
    /// After the rewrite.
    pub mirrors: Vec<Filter>,
    /// Its path follows from `path`.
    pub redirect: Option<Redirect>,
    pub respond: Option<Filter>,
}

impl<'r> Reader<'r> {
    pub(super) fn new(pattern: &'r mut dyn FnMut(&str) -> Result<Pattern, PatternError>) -> Self {
        Self { pattern, found: Vec::new() }
    }

    /// What there is to say of a rule, wherever it is looked at.
    pub(super) fn remarks(&mut self, index: usize, rule: &HttpRule) {
        matches::remarks(rule, &format!("spec.http[{index}]"), self);
    }

    /// Some matches of a rule, or all, and where each leads. The index of the rule, `route` and `provenance` are the caller's
    /// to set.
    pub(super) fn rule(
        &mut self,
        index: usize,
        rule: &HttpRule,
        chosen: Option<&[usize]>,
        place: &Place<'_>,
    ) -> Vec<(RouteMatch, RouteRule)> {
        let at = format!("spec.http[{index}]");
        let matched = matches::some(rule, chosen, &at, place, self);
        if matched.is_empty() {
            return Vec::new();
        }
        let body = self.body(rule, &at, place);
        let name = if rule.name.is_empty() { format!("http[{index}]") } else { rule.name.clone() };
        let each = matched.into_iter().map(|m| {
            let name = if m.name.is_empty() { name.clone() } else { format!("{name}.{}", m.name) };
            self.finish(m, &body, name, &at)
        });
        each.collect()
    }

    pub(super) fn pattern(&mut self, text: &str, at: String) -> Result<Pattern, Failure> {
        (self.pattern)(text).map_err(|e| {
            let message = format!("{text:.80?} {e}");
            if e.is_ours() { self.unsupported(at, message) } else { self.invalid(at, message) }
        })
    }

    /// Something that an API server would refuse.
    pub(super) fn invalid(
        &mut self,
        field: impl Into<String>,
        message: impl Into<String>,
    ) -> Failure {
        self.note(Diagnostic::error(Code::InvalidField, message), field)
    }

    /// Something that is right and cannot be had.
    pub(super) fn unsupported(
        &mut self,
        field: impl Into<String>,
        message: impl Into<String>,
    ) -> Failure {
        self.note(Diagnostic::error(Code::Unsupported, message).help(ANSWERS), field)
    }

    pub(super) fn warn(
        &mut self,
        code: Code,
        field: impl Into<String>,
        message: impl Into<String>,
    ) {
        self.note(Diagnostic::warning(code, message), field);
    }

    fn note(&mut self, diagnostic: Diagnostic, field: impl Into<String>) -> Failure {
        let diagnostic = diagnostic.field(field);
        let failure = format!("{}: {}", diagnostic.field, diagnostic.message);
        self.found.push(diagnostic);
        failure
    }

    fn body(&mut self, rule: &HttpRule, at: &str, place: &Place<'_>) -> Result<Body, Failure> {
        // Diagnosed by its field.
        let empty = rule.delegate.as_object().is_some_and(serde_json::Map::is_empty);
        if !rule.delegate.is_null() && !empty {
            return Err(format!("{at}.delegate: rules are not delegated"));
        }
        let whats = [
            ("route", !rule.route.is_empty()),
            ("redirect", rule.redirect.is_some()),
            ("directResponse", rule.direct_response.is_some()),
        ];
        let given: Vec<&str> = whats.iter().filter(|(_, is)| *is).map(|(name, _)| *name).collect();
        match given[..] {
            [] => return Err(self.invalid(at, "needs one of route, redirect and directResponse")),
            [_] => {}
            [first, second, ..] => {
                let message = format!("{first} and {second} exclude each other");
                return Err(self.invalid(at, message));
            }
        }
        if rule.rewrite.is_some() && rule.route.is_empty() {
            let message = "only what is sent somewhere can be rewritten: there is no route";
            return Err(self.invalid(format!("{at}.rewrite"), message));
        }
        // All of it is read, so that all of its faults are named at once.
        let timeouts = self.timeouts(rule, at);
        let actions = self.actions(rule, at, place);
        let backends = self.backends(&rule.route, at, place);
        Ok(Body { actions: actions?, backends: backends?, timeouts: timeouts? })
    }

    fn timeouts(&mut self, rule: &HttpRule, at: &str) -> Result<Timeouts, Failure> {
        let Some(text) = &rule.timeout else { return Ok(Timeouts::default()) };
        match duration::parse(text) {
            Ok(Duration::ZERO) => Ok(Timeouts::default()),
            Ok(timeout) => Ok(Timeouts { request: Some(timeout), backend_request: None }),
            Err(message) => Err(self.invalid(format!("{at}.timeout"), message)),
        }
    }

    fn backends(
        &mut self,
        route: &[RouteDestination],
        at: &str,
        place: &Place<'_>,
    ) -> Result<Vec<Backend>, Failure> {
        let mut backends = Vec::new();
        let mut failure = None;
        for (i, to) in route.iter().enumerate() {
            let at = format!("{at}.route[{i}]");
            let target = self.target(&to.destination, &format!("{at}.destination"), place);
            if to.weight > MAX_WEIGHT {
                let message =
                    format!("{}: weights go up to {MAX_WEIGHT}; use smaller ones", to.weight);
                failure = Some(self.unsupported(format!("{at}.weight"), message));
            }
            match self.headers(to.headers.as_ref(), &format!("{at}.headers")) {
                Ok(filters) => backends.push(Backend { weight: to.weight, target, filters }),
                Err(e) => failure = Some(e),
            }
        }
        if let [only] = &mut backends[..] {
            // Istio: whatever its weight says.
            only.weight = 1;
        } else if !route.is_empty() && route.iter().all(|to| to.weight == 0) {
            let message = "the weights add up to nothing: of several destinations each needs one";
            failure = Some(self.invalid(format!("{at}.route"), message));
        }
        failure.map_or(Ok(backends), Err)
    }

    /// Where a destination is. One that is not there is a target that answers with an error.
    pub(super) fn target(&mut self, to: &Destination, at: &str, place: &Place<'_>) -> Target {
        let nothing = |message: String| Target::Invalid { message: message.into() };
        if to.host.is_empty() {
            return nothing(self.invalid(format!("{at}.host"), "missing: name a Service"));
        }
        let stated = to.port.map(|port| port.number);
        if let Some(port) = stated.filter(|p| !(1..=65535).contains(p)) {
            let message = format!("{port} is not a port (1-65535)");
            return nothing(self.invalid(format!("{at}.port.number"), message));
        }
        let Place::At(there) = place else { return nothing(String::new()) };
        match find(to, stated, there) {
            Ok(target) => target,
            Err(Missing { code, field, message, help }) => {
                let d = Diagnostic::error(code, message).help(help);
                nothing(self.note(d, format!("{at}.{field}")))
            }
        }
    }

    fn finish(
        &mut self,
        matched: Matched,
        body: &Result<Body, Failure>,
        name: String,
        at: &str,
    ) -> (RouteMatch, RouteRule) {
        let Matched { mut matched, failure, .. } = matched;
        let mut rule = RouteRule {
            route: "".into(),
            name: name.into(),
            provenance: Provenance::default(),
            filters: Vec::new(),
            backends: Vec::new(),
            timeouts: Timeouts::default(),
        };
        let filters = match (failure, body) {
            (Some(failure), _) => Err(failure),
            (None, Err(failure)) => Err(failure.clone()),
            (None, Ok(body)) => self.filters(&body.actions, &mut matched, at).inspect(|_| {
                rule.backends.clone_from(&body.backends);
                rule.timeouts = body.timeouts;
            }),
        };
        rule.filters = filters.unwrap_or_else(|message| {
            vec![Filter::Fail { reason: Reason::BadFilter, message: message.into() }]
        });
        (matched, rule)
    }

    /// The filters for one match, in the order in which they apply.
    fn filters(
        &mut self,
        actions: &Actions,
        matched: &mut RouteMatch,
        at: &str,
    ) -> Result<Vec<Filter>, Failure> {
        let path = self.path(&actions.path, &mut matched.path, at)?;
        let mut filters = actions.filters.clone();
        let mut redirect = actions.redirect.clone();
        match &mut redirect {
            Some(redirect) => redirect.path = path,
            None if path.is_some() || actions.host.is_some() => {
                let host = actions.host.clone();
                filters.push(Filter::Rewrite(model::http::Rewrite { host, path }));
            }
            None => {}
        }
        filters.extend(actions.mirrors.iter().cloned());
        filters.extend(redirect.map(Filter::Redirect));
        filters.extend(actions.respond.clone());
        Ok(filters)
    }

    /// Istio's table of what gives way: the matched text; all of a path that fitted a pattern; the first slash where every
    /// path fits.
    fn path(
        &mut self,
        change: &PathChange,
        matched: &mut PathMatch,
        at: &str,
    ) -> Result<Option<PathRewrite>, Failure> {
        let (text, prefixes) = match change {
            PathChange::None => return Ok(None),
            PathChange::Fixed(rewrite) => return Ok(Some(rewrite.clone())),
            PathChange::Matched(text) => (text, false),
            PathChange::Prefix(text) => (text, true),
        };
        match matched {
            PathMatch::Any => *matched = PathMatch::Prefix("/".into()),
            PathMatch::Prefix(_) | PathMatch::PrefixIgnoringCase(_) => {}
            _ if prefixes => {
                let message = "needs a match of the uri by prefix";
                return Err(self.invalid(format!("{at}.redirect.prefixRewrite"), message));
            }
            PathMatch::Regex(_) => return Ok(Some(PathRewrite::Full(text.as_str().into()))),
            _ => {}
        }
        Ok(Some(PathRewrite::Text(text.as_str().into())))
    }
}

const ANSWERS: &str = "requests that fit are answered with 500";

#[derive(Debug)]
struct Body {
    actions: Actions,
    backends: Vec<Backend>,
    timeouts: Timeouts,
}

/// Why a destination is none.
struct Missing {
    code: Code,
    field: &'static str,
    message: String,
    help: String,
}

fn find(to: &Destination, stated: Option<u32>, there: &There<'_>) -> Result<Target, Missing> {
    let dangling = |field, message, help: &str| Missing {
        code: Code::DanglingReference,
        field,
        message,
        help: help.to_owned(),
    };
    let (namespace, name) = match hosts::read(&to.host, there.namespace, there.domain) {
        Host::Service { namespace, name } => (namespace, name),
        Host::Wildcard | Host::Other => {
            let message = format!("{:.80?} is no Service of the cluster", to.host);
            return Err(dangling("host", message, &hosts::help(&to.host, there.domain)));
        }
    };
    let Some(service) = services::find(there.services, namespace, name) else {
        let message = format!("there is no Service {namespace}/{name}");
        return Err(dangling("host", message, "add it, or mend the name"));
    };
    let ports = &service.service.ports;
    // Istio: the only port there is, else the one that was called.
    let port = match (stated, &ports[..]) {
        (Some(port), _) => port,
        (None, [only]) => u32::from(only.service_port),
        (None, _) => u32::from(there.port),
    };
    let mut facts = ports.iter().zip(&service.ports);
    let Some((own, facts)) = facts.find(|(p, _)| u32::from(p.service_port) == port) else {
        let message = format!("Service {namespace}/{name} has no port {port}");
        return Err(dangling("port", message, "name one of the Service's own ports"));
    };
    if facts.wants_tls {
        let message = format!(
            "port {port} of Service {namespace}/{name} is declared as TLS, which is not begun for a route"
        );
        let help = "name a port without TLS: between pods of the mesh it is encrypted anyway";
        let help = help.to_owned();
        return Err(Missing { code: Code::Unsupported, field: "port", message, help });
    }
    let key = service.service.key.clone();
    let subset = (!to.subset.is_empty()).then(|| model::Str::from(to.subset.as_str()));
    if let Some(subset) = &subset
        && !there.subsets.contains(&SubsetKey { service: key.clone(), name: subset.clone() })
    {
        let message = format!("no DestinationRule names a subset {subset:.80?} of {key}");
        let help = format!("write one for it in namespace {}", key.namespace);
        return Err(dangling("subset", message, &help));
    }
    Ok(Target::Service { service: key, port: own.service_port, subset })
}
