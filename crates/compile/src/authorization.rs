//! AuthorizationPolicy at layer 4, with Istio's semantics where they do not fail open.
//!
//! A rule may ask for what only an HTTP proxy sees (layer 7). Until a waypoint sees it:
//! - in an ALLOW policy such a rule is removed: less is allowed;
//! - in a DENY policy the layer 7 part is removed: more is denied. What is left of a rule without any
//!   layer 4 part would deny everything, so it has no effect, and an error says so.
//!
//! A value that cannot be read is treated like a layer 7 one: never in the direction of "allow".
//! Invariants: total; no clause without matches and no match without values comes out, since proxies
//! disagree about what those mean.

use std::collections::BTreeMap;
use std::sync::Arc;

use model::{Action, Match, Policy, PolicyKey, Rule, Scope, Str, StringMatch};

use crate::addresses;
use crate::context::Context;
use crate::diagnostics::{Code, Diagnostic};
use crate::istio::{
    AuthorizationPolicy, AuthorizationRule, Condition, Operation, PolicyAction, Source,
};
use crate::object::{Meta, Objects, Sourced, provenance};

/// Annotation: log what the policy would do, enforce nothing.
const DRY_RUN: &str = "istio.io/dry-run";
/// In policies this trust domain means the mesh's own, whatever its name.
const LOCAL_TRUST_DOMAIN: &str = "cluster.local";

/// A policy, and what it selects when it has a selector.
#[derive(Debug)]
pub(crate) struct Compiled {
    pub policy: Arc<Policy>,
    pub selection: Option<Selection>,
}

/// Which pods a policy is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Selection {
    /// `None`: all namespaces.
    pub namespace: Option<Str>,
    pub labels: BTreeMap<String, String>,
}

pub(crate) fn compile(objects: &Objects, cx: &mut Context<'_>) -> Vec<Compiled> {
    let policies = objects.authorization_policies.iter();
    policies.filter_map(|(key, sourced)| policy(key, sourced, cx)).collect()
}

fn policy(
    key: &(Str, Str),
    sourced: &Sourced<AuthorizationPolicy>,
    cx: &mut Context<'_>,
) -> Option<Compiled> {
    let spec = &sourced.value.spec;
    if spec.target_ref.is_some() || !spec.target_refs.is_empty() {
        let field = if spec.target_ref.is_some() { "spec.targetRef" } else { "spec.targetRefs" };
        let d = Diagnostic::warning(
            Code::L7WithoutWaypoint,
            "not enforced: policies with targetRefs need a waypoint, and there is none",
        );
        cx.report(key, sourced, d.field(field).help("use a selector and layer 4 attributes"));
        return None;
    }
    let action = match spec.action {
        PolicyAction::Allow => Action::Allow,
        PolicyAction::Deny => Action::Deny,
        PolicyAction::Audit | PolicyAction::Custom => {
            let name = if spec.action == PolicyAction::Audit { "AUDIT" } else { "CUSTOM" };
            let message = format!("{name} is NOT enforced: there is no such action at layer 4");
            let d = Diagnostic::error(Code::ActionNotEnforced, message).field("spec.action");
            cx.report(key, sourced, d.help("use ALLOW or DENY"));
            return None;
        }
    };
    let mut rules = Vec::new();
    for (i, rule) in spec.rules.iter().flatten().enumerate() {
        let mut compiler = RuleCompiler {
            namespace: &key.0,
            trust_domain: &cx.config.trust_domain,
            action,
            at: format!("spec.rules[{i}]"),
            diagnostics: Vec::new(),
        };
        let clauses = compiler.rule(rule);
        for d in std::mem::take(&mut compiler.diagnostics) {
            cx.report(key, sourced, d);
        }
        let provenance = provenance(key, sourced, &format!("spec.rules[{i}]"));
        rules.extend(
            clauses.into_iter().map(|clauses| Rule { clauses, provenance: provenance.clone() }),
        );
    }
    if action == Action::Deny && spec.rules.as_ref().is_none_or(Vec::is_empty) {
        let message = "a DENY policy without rules denies nothing";
        let d = Diagnostic::warning(Code::MatchesNothing, message).field("spec.rules");
        cx.report(key, sourced, d.help("`rules: [{}]` denies everything"));
    }
    let labels = spec.selector.as_ref().map(|s| &s.match_labels).filter(|l| !l.is_empty());
    let global = key.0 == cx.config.root_namespace;
    let scope = match labels {
        Some(_) => Scope::WorkloadSelector,
        None if global => Scope::Global,
        None => Scope::Namespace,
    };
    let selection = labels.map(|labels| Selection {
        namespace: (!global).then(|| key.0.clone()),
        labels: labels.clone(),
    });
    let policy = Policy {
        key: PolicyKey { namespace: key.0.clone(), name: key.1.clone() },
        scope,
        action,
        rules: rules.into(),
        dry_run: dry_run(key, sourced, cx),
        provenance: provenance(key, sourced, ""),
    };
    Some(Compiled { policy: Arc::new(policy), selection })
}

fn dry_run(key: &(Str, Str), sourced: &Sourced<AuthorizationPolicy>, cx: &mut Context<'_>) -> bool {
    match sourced.value.annotation(DRY_RUN) {
        None | Some("0" | "f" | "F" | "false" | "FALSE" | "False") => false,
        Some("1" | "t" | "T" | "true" | "TRUE" | "True") => true,
        Some(other) => {
            let message = format!("{other:?} is neither true nor false; the policy is enforced");
            let d = Diagnostic::error(Code::InvalidField, message)
                .field(format!("metadata.annotations.{DRY_RUN}"));
            cx.report(key, sourced, d);
            false
        }
    }
}

/// One of the values of which any suffices.
#[derive(Debug, Default)]
struct Alternative {
    /// What layer 4 can check.
    l4: Match,
    /// Fields that it cannot.
    lost: Vec<String>,
}

impl Alternative {
    fn has_l4(&self) -> bool {
        self.l4 != Match::default()
    }
}

type Clauses = Vec<Vec<Match>>;

struct RuleCompiler<'a> {
    /// Of the policy.
    namespace: &'a str,
    trust_domain: &'a str,
    action: Action,
    /// The field of the rule.
    at: String,
    diagnostics: Vec<Diagnostic>,
}

impl RuleCompiler<'_> {
    /// The rules that come out of one; several when each denies a part of what cannot be told apart.
    fn rule(&mut self, rule: &AuthorizationRule) -> Vec<Clauses> {
        let at = self.at.clone();
        let mut clauses: Vec<Vec<Alternative>> = Vec::new();
        if let Some(from) = &rule.from {
            let each = from.iter().enumerate();
            let each = each.map(|(i, f)| self.source(&format!("{at}.from[{i}].source"), &f.source));
            clauses.push(never_empty(each.collect(), &format!("{at}.from")));
        }
        if let Some(to) = &rule.to {
            let each = to.iter().enumerate();
            let each =
                each.map(|(i, t)| self.operation(&format!("{at}.to[{i}].operation"), &t.operation));
            clauses.push(never_empty(each.collect(), &format!("{at}.to")));
        }
        for (i, when) in rule.when.iter().flatten().enumerate() {
            clauses.push(vec![self.condition(&format!("{at}.when[{i}]"), when)]);
        }
        let lost: Vec<String> = clauses.iter().flatten().flat_map(|a| a.lost.clone()).collect();
        if lost.is_empty() {
            return vec![clauses.into_iter().map(matches).collect()];
        }
        match self.action {
            Action::Allow => {
                let message =
                    "allows nothing: it needs what only a waypoint can check, and there is none";
                self.l7(Diagnostic::warning(Code::L7WithoutWaypoint, message), &lost);
                Vec::new()
            }
            Action::Deny => self.deny(clauses, &lost),
        }
    }

    /// A DENY rule with parts that cannot be checked. As written it denies when, for every clause, one
    /// of the alternatives matches. Taking a part that cannot be checked for matched gives the widest
    /// rule; when that would be all of it, the rules left are those that keep one clause.
    fn deny(&mut self, clauses: Vec<Vec<Alternative>>, lost: &[String]) -> Vec<Clauses> {
        let (open, firm): (Vec<_>, Vec<_>) =
            clauses.into_iter().partition(|c| c.iter().any(|a| !a.has_l4()));
        if !firm.is_empty() {
            let message = "denies more than it says: a part needs a waypoint, and there is none";
            self.l7(Diagnostic::warning(Code::L7WithoutWaypoint, message), lost);
            return vec![firm.into_iter().map(matches).collect()];
        }
        let message =
            "NOT enforced: what it denies can only be seen by a waypoint, and there is none";
        self.l7(Diagnostic::error(Code::L7WithoutWaypoint, message), lost);
        let kept = open
            .into_iter()
            .map(|clause| matches(clause.into_iter().filter(Alternative::has_l4).collect()));
        kept.filter(|m| !m.is_empty()).map(|m| vec![m]).collect()
    }

    fn l7(&mut self, diagnostic: Diagnostic, lost: &[String]) {
        let first = lost.first().cloned().unwrap_or_default();
        let all = lost.iter().map(|field| field.rsplit(']').next().unwrap_or(field));
        let names: Vec<&str> = all.map(|f| f.trim_start_matches('.')).collect();
        let help = format!("layer 4 cannot check: {}", names.join(", "));
        self.diagnostics.push(diagnostic.field(first).help(help));
    }

    fn source(&mut self, at: &str, source: &Source) -> Alternative {
        // Taken apart by name: a field that is added and not read here would be a hole.
        let Source {
            principals,
            not_principals,
            request_principals,
            not_request_principals,
            service_accounts,
            not_service_accounts,
            namespaces,
            not_namespaces,
            ip_blocks,
            not_ip_blocks,
            remote_ip_blocks,
            not_remote_ip_blocks,
        } = source;
        let mut lost = Vec::new();
        let own = self.namespace;
        let mut accounts =
            |field, values| read(&mut lost, at, field, values, |v| service_account(v, own));
        let service_accounts = accounts("serviceAccounts", service_accounts);
        let not_service_accounts = accounts("notServiceAccounts", not_service_accounts);
        let mut ips = |field, values| read(&mut lost, at, field, values, addresses::prefix);
        let l4 = Match {
            principals: self.principals(at, "principals", principals),
            not_principals: self.principals(at, "notPrincipals", not_principals),
            namespaces: self.strings(at, "namespaces", namespaces),
            not_namespaces: self.strings(at, "notNamespaces", not_namespaces),
            service_accounts,
            not_service_accounts,
            source_ips: ips("ipBlocks", ip_blocks),
            not_source_ips: ips("notIpBlocks", not_ip_blocks),
            ..Match::default()
        };
        let l7 = [
            ("requestPrincipals", request_principals),
            ("notRequestPrincipals", not_request_principals),
            ("remoteIpBlocks", remote_ip_blocks),
            ("notRemoteIpBlocks", not_remote_ip_blocks),
        ];
        l7_values(&mut lost, at, &l7);
        never_nothing(Alternative { l4, lost }, at)
    }

    fn operation(&mut self, at: &str, operation: &Operation) -> Alternative {
        let Operation {
            hosts,
            not_hosts,
            ports,
            not_ports,
            methods,
            not_methods,
            paths,
            not_paths,
        } = operation;
        let mut lost = Vec::new();
        let mut numbers = |field, values| read(&mut lost, at, field, values, addresses::port);
        let l4 = Match {
            destination_ports: numbers("ports", ports),
            not_destination_ports: numbers("notPorts", not_ports),
            ..Match::default()
        };
        let l7 = [
            ("hosts", hosts),
            ("notHosts", not_hosts),
            ("methods", methods),
            ("notMethods", not_methods),
            ("paths", paths),
            ("notPaths", not_paths),
        ];
        l7_values(&mut lost, at, &l7);
        never_nothing(Alternative { l4, lost }, at)
    }

    fn condition(&mut self, at: &str, when: &Condition) -> Alternative {
        let mut a = Alternative::default();
        let (yes, no) = (&when.values, &when.not_values);
        let lost = &mut a.lost;
        match when.key.as_str() {
            "source.ip" => {
                a.l4.source_ips = read(lost, at, "values", yes, addresses::prefix);
                a.l4.not_source_ips = read(lost, at, "notValues", no, addresses::prefix);
            }
            "source.namespace" => {
                a.l4.namespaces = self.strings(at, "values", yes);
                a.l4.not_namespaces = self.strings(at, "notValues", no);
            }
            "source.principal" => {
                a.l4.principals = self.principals(at, "values", yes);
                a.l4.not_principals = self.principals(at, "notValues", no);
            }
            "source.serviceAccount" => {
                let account = |v: &str| service_account(v, self.namespace);
                a.l4.service_accounts = read(lost, at, "values", yes, account);
                a.l4.not_service_accounts = read(lost, at, "notValues", no, account);
            }
            "destination.ip" => {
                a.l4.destination_ips = read(lost, at, "values", yes, addresses::prefix);
                a.l4.not_destination_ips = read(lost, at, "notValues", no, addresses::prefix);
            }
            "destination.port" => {
                a.l4.destination_ports = read(lost, at, "values", yes, addresses::port);
                a.l4.not_destination_ports = read(lost, at, "notValues", no, addresses::port);
            }
            _ => lost.push(format!("{at}.key {}", when.key)),
        }
        never_nothing(a, at)
    }

    /// SPIFFE names without their scheme; the scheme is forgiven.
    fn principals(&mut self, at: &str, field: &str, values: &[String]) -> Vec<StringMatch> {
        let mut matches = Vec::new();
        for (i, value) in values.iter().enumerate() {
            let value = value.strip_prefix("spiffe://").unwrap_or(value);
            matches.push(self.string(&format!("{at}.{field}[{i}]"), value));
            if self.trust_domain != LOCAL_TRUST_DOMAIN
                && let Some(rest) = value.strip_prefix(LOCAL_TRUST_DOMAIN)
                && rest.starts_with('/')
            {
                matches.push(string_match(&format!("{}{rest}", self.trust_domain)));
            }
        }
        matches
    }

    fn strings(&mut self, at: &str, field: &str, values: &[String]) -> Vec<StringMatch> {
        let each = values.iter().enumerate();
        each.map(|(i, value)| self.string(&format!("{at}.{field}[{i}]"), value)).collect()
    }

    fn string(&mut self, field: &str, value: &str) -> StringMatch {
        let matched = string_match(value);
        let (StringMatch::Exact(text) | StringMatch::Prefix(text) | StringMatch::Suffix(text)) =
            &matched
        else {
            return matched;
        };
        if text.contains('*') {
            let message = format!(
                "{value:?}: '*' is a wildcard only at the start or the end; nothing matches this"
            );
            // A DENY that never matches protects nobody; an ALLOW that never matches is only too strict.
            let d = match self.action {
                Action::Deny => Diagnostic::error(Code::MatchesNothing, message),
                Action::Allow => Diagnostic::warning(Code::MatchesNothing, message),
            };
            self.diagnostics.push(d.field(field));
        }
        matched
    }
}

fn matches(alternatives: Vec<Alternative>) -> Vec<Match> {
    alternatives.into_iter().map(|a| a.l4).collect()
}

/// An empty list of alternatives must not turn into "anything" in an ALLOW rule.
fn never_empty(alternatives: Vec<Alternative>, at: &str) -> Vec<Alternative> {
    if alternatives.is_empty() {
        return vec![Alternative { lost: vec![at.to_owned()], ..Alternative::default() }];
    }
    alternatives
}

fn never_nothing(mut alternative: Alternative, at: &str) -> Alternative {
    if !alternative.has_l4() && alternative.lost.is_empty() {
        alternative.lost.push(at.to_owned());
    }
    alternative
}

/// All values, or none and the field among the lost: half of a list would narrow a DENY.
fn read<T>(
    lost: &mut Vec<String>,
    at: &str,
    field: &str,
    values: &[String],
    parse: impl Fn(&str) -> Result<T, String>,
) -> Vec<T> {
    let parsed: Result<Vec<T>, String> = values.iter().map(|v| parse(v)).collect();
    parsed.unwrap_or_else(|_| {
        lost.push(format!("{at}.{field}"));
        Vec::new()
    })
}

fn l7_values(lost: &mut Vec<String>, at: &str, fields: &[(&str, &Vec<String>)]) {
    let given = fields.iter().filter(|(_, values)| !values.is_empty());
    lost.extend(given.map(|(field, _)| format!("{at}.{field}")));
}

/// `abc`, `abc*`, `*abc`, `*`.
fn string_match(value: &str) -> StringMatch {
    if value == "*" {
        StringMatch::Presence
    } else if let Some(suffix) = value.strip_prefix('*') {
        StringMatch::Suffix(suffix.into())
    } else if let Some(prefix) = value.strip_suffix('*') {
        StringMatch::Prefix(prefix.into())
    } else {
        StringMatch::Exact(value.into())
    }
}

/// `namespace/name`, or `name` in the policy's own namespace.
pub(crate) fn service_account(value: &str, own: &str) -> Result<(Str, Str), String> {
    let (namespace, name) = value.split_once('/').unwrap_or((own, value));
    let plain = |s: &str| {
        !s.is_empty() && s.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.'))
    };
    if plain(namespace) && plain(name) {
        Ok((namespace.into(), name.into()))
    } else {
        Err(format!("{value:?} is not a service account: write NAMESPACE/NAME or NAME"))
    }
}

/// Is this an attribute that Istio knows, at whatever layer?
pub(crate) fn is_condition_key(key: &str) -> bool {
    const EXACT: [&str; 11] = [
        "source.ip",
        "remote.ip",
        "source.namespace",
        "source.principal",
        "source.serviceAccount",
        "request.auth.principal",
        "request.auth.audiences",
        "request.auth.presenter",
        "destination.ip",
        "destination.port",
        "connection.sni",
    ];
    const INDEXED: [&str; 2] = ["request.headers[", "request.auth.claims["];
    EXACT.contains(&key)
        || key.starts_with("experimental.envoy.filters.")
        || INDEXED.iter().any(|prefix| key.starts_with(prefix) && key.ends_with(']'))
}

/// May this value stand under this attribute?
pub(crate) fn condition_value(key: &str, value: &str) -> Result<(), String> {
    match key {
        "source.ip" | "destination.ip" | "remote.ip" => addresses::prefix(value).map(drop),
        "destination.port" => addresses::port(value).map(drop),
        "source.serviceAccount" => service_account(value, "x").map(drop),
        "source.namespace" | "source.principal" if value.is_empty() => Err("empty text".into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
