//! The rules of one HTTPRoute or GRPCRoute.
//!
//! A rule that cannot be what it says is dropped, and the status says which and why; a reference that leads nowhere
//! leaves its rule standing. Nothing here looks at parents: rules are the same for all of them.

use std::sync::Arc;

use model::http::{Backend, Filter, Pattern, RouteRule, Timeouts};
use model::{Provenance, Str};

use super::matches::{self, Specific};
use super::status::ConditionReason;
use super::{filters, shape, targets, text};
use crate::context::{Budget, Context};
use crate::diagnostics::{Code, Diagnostic};
use crate::object::{Objects, Origin};
use crate::services::ByNamespace;

/// The largest weight, as in Gateway API's schema: the sum of a rule's stays far from the end of `u32`.
const MAX_WEIGHT: i32 = 1_000_000;

/// What compiling rules needs, and what it finds.
pub(super) struct RuleCompiler<'a, 'm> {
    pub objects: &'a Objects,
    pub services: &'a ByNamespace,
    pub cx: &'a mut Context<'m>,
    /// The route's.
    pub namespace: &'a str,
    pub patterns: Budget,
    /// Without object and place; each names its field.
    pub diagnostics: Vec<Diagnostic>,
    pub bad_references: Vec<(ConditionReason, String)>,
    /// Rules that are not what they say, and why.
    pub dropped: Vec<(ConditionReason, String)>,
}

/// Why a rule is dropped.
#[derive(Debug)]
pub(super) struct Invalid {
    reason: ConditionReason,
    field: String,
    message: String,
}

/// A route's rules, and the matches of each.
#[derive(Debug, Default)]
pub(super) struct Rules {
    pub rules: Vec<Arc<RouteRule>>,
    /// Beside `rules`: the place of each among the route's own rules, and its matches.
    pub matches: Vec<(u32, Vec<Specific>)>,
}

impl Invalid {
    pub(super) fn value(field: String, message: String) -> Self {
        Self { reason: ConditionReason::UnsupportedValue, field, message }
    }

    pub(super) fn filters(field: &str, message: String) -> Self {
        Self { reason: ConditionReason::IncompatibleFilters, field: field.to_owned(), message }
    }
}

impl RuleCompiler<'_, '_> {
    pub(super) fn rules(
        &mut self,
        route: &shape::Route<'_>,
        object: &Str,
        origin: &Origin,
    ) -> Rules {
        let mut out = Rules::default();
        for (i, rule) in (0_u32..).zip(&route.rules) {
            let at = format!("spec.rules[{i}]");
            match self.rule(rule, &at, object, origin) {
                Ok((compiled, matches)) => {
                    out.rules.push(Arc::new(compiled));
                    out.matches.push((i, matches));
                }
                Err(Invalid { reason, field, message }) => {
                    self.dropped.push((reason, format!("{at} ({field}: {message})")));
                    let d = Diagnostic::error(Code::InvalidField, message).field(field);
                    let d = d.help("the rule is dropped until it is mended");
                    self.diagnostics.push(d);
                }
            }
        }
        out
    }

    /// A finding that the condition `ResolvedRefs` tells, too.
    pub(super) fn bad_reference(&mut self, reason: ConditionReason, d: Diagnostic) {
        self.bad_references.push((reason, format!("{}: {}", d.field, d.message)));
        self.diagnostics.push(d);
    }

    /// A finding that makes a rule less than it says, without taking it away.
    pub(super) fn unsupported(&mut self, d: Diagnostic) {
        self.dropped
            .push((ConditionReason::UnsupportedValue, format!("{}: {}", d.field, d.message)));
        self.diagnostics.push(d);
    }

    pub(super) fn pattern(&mut self, text: &str) -> Result<Pattern, String> {
        self.cx.pattern(text, &mut self.patterns).map_err(|e| format!("{text:.80?} {e}"))
    }

    fn rule(
        &mut self,
        rule: &shape::Rule<'_>,
        at: &str,
        object: &Str,
        origin: &Origin,
    ) -> Result<(RouteRule, Vec<Specific>), Invalid> {
        self.not_honoured(rule, at);
        let matches = matches::compile(rule.matches, at, self)?;
        let prefixes = matches::only_prefixes(rule.matches);
        let filters = filters::compile(&rule.filters, &format!("{at}.filters"), prefixes, self)?;
        let mut backends = Vec::new();
        for (i, backend) in rule.backends.iter().enumerate() {
            backends.push(self.backend(backend, &format!("{at}.backendRefs[{i}]"), prefixes)?);
        }
        let timeouts = timeouts(rule, at)?;
        self.somewhere_to_go(&filters, &backends, at);
        let rule = RouteRule {
            route: object.clone(),
            name: match rule.name {
                Some(name) => name.into(),
                None => self.cx.share(at.strip_prefix("spec.").unwrap_or(at)),
            },
            provenance: Provenance {
                object: object.clone(),
                field: self.cx.share(at),
                origin: origin.at(at).into(),
            },
            filters,
            backends,
            timeouts,
        };
        Ok((rule, matches))
    }

    fn backend(
        &mut self,
        backend: &shape::BackendRef<'_>,
        at: &str,
        prefixes: bool,
    ) -> Result<Backend, Invalid> {
        let weight = backend.weight.unwrap_or(1);
        let weight =
            u32::try_from(weight).ok().filter(|_| weight <= MAX_WEIGHT).ok_or_else(|| {
                let message = format!("{weight} is not a weight (0-{MAX_WEIGHT})");
                Invalid::value(format!("{at}.weight"), message)
            })?;
        let filters = filters::compile(&backend.filters, &format!("{at}.filters"), prefixes, self)?;
        Ok(Backend { weight, target: targets::target(&backend.to, at, self), filters })
    }

    /// A rule that sends nowhere and answers nothing is legal; it is hardly meant.
    fn somewhere_to_go(&mut self, filters: &[Filter], backends: &[Backend], at: &str) {
        let redirects = filters.iter().any(|f| matches!(f, Filter::Redirect(_)));
        let answers = redirects
            || filters.iter().any(|f| matches!(f, Filter::Respond(_) | Filter::Fail { .. }));
        let at = format!("{at}.backendRefs");
        if redirects && !backends.is_empty() {
            let message = "the rule redirects; nothing is sent to its backends";
            self.diagnostics.push(Diagnostic::warning(Code::NoEffect, message).field(at));
        } else if !answers && backends.iter().all(|b| b.weight == 0) {
            let what = if backends.is_empty() { "no backend" } else { "only backends of weight 0" };
            let message = format!("the rule has {what}: its requests are answered with an error");
            self.diagnostics.push(Diagnostic::warning(Code::NoBackend, message).field(at));
        }
    }

    fn not_honoured(&mut self, rule: &shape::Rule<'_>, at: &str) {
        let stanzas = [
            ("retry", rule.retry, "requests are not tried again"),
            ("sessionPersistence", rule.session_persistence, "requests of one session are spread"),
        ];
        for (field, _, what) in stanzas.into_iter().filter(|(_, given, _)| *given) {
            let message = format!("not handled by this version: {what}");
            let d = Diagnostic::warning(Code::Unsupported, message);
            self.diagnostics.push(d.field(format!("{at}.{field}")));
        }
    }
}

fn timeouts(rule: &shape::Rule<'_>, at: &str) -> Result<Timeouts, Invalid> {
    let Some(stated) = rule.timeouts else { return Ok(Timeouts::default()) };
    let read = |text: &Option<String>, field: &str| match text {
        Some(text) => {
            text::duration(text).map_err(|e| Invalid::value(format!("{at}.timeouts.{field}"), e))
        }
        None => Ok(None),
    };
    let request = read(&stated.request, "request")?;
    let backend_request = read(&stated.backend_request, "backendRequest")?;
    if let (Some(whole), Some(part)) = (request, backend_request)
        && part > whole
    {
        let message = "one attempt cannot take longer than the whole request".to_owned();
        return Err(Invalid::value(format!("{at}.timeouts.backendRequest"), message));
    }
    Ok(Timeouts { request, backend_request })
}

#[cfg(test)]
mod tests;
