//! What a rule of a VirtualService matches.
//!
//! Invariant: a condition that cannot be read leaves its match wider, never narrower, and the match then leads to an error:
//! whatever it was meant for does not slip past it to the next rule.

use std::collections::BTreeMap;

use model::http::{FieldMatch, PathMatch, RouteMatch, SourceMatch, TextMatch};

use super::super::text;
use super::MESH;
use super::rules::{Failure, Place, Reader};
use crate::diagnostics::Code;
use crate::istio::virtual_service::{HttpMatch, HttpRule, StringMatch};

/// A match of a rule.
#[derive(Debug, Default)]
pub(super) struct Matched {
    pub name: String,
    pub matched: RouteMatch,
    /// Set: a request that fits is answered with an error.
    pub failure: Option<Failure>,
}

/// What there is to say of matches, wherever the rule is looked at.
pub(super) fn remarks(rule: &HttpRule, at: &str, reader: &mut Reader<'_>) {
    for (i, m) in rule.r#match.iter().enumerate() {
        let at = format!("{at}.match[{i}]");
        for gateway in m.gateways.iter().filter(|g| *g != MESH) {
            let message = format!(
                "{gateway:.80?} is not served: nothing takes traffic from outside the mesh"
            );
            reader.warn(Code::Unsupported, format!("{at}.gateways"), message);
        }
        if m.port.is_some_and(|port| port > 65535) {
            reader.invalid(format!("{at}.port"), "not a port (1-65535)");
        }
    }
}

/// Some of a rule's matches, or all, in order.
pub(super) fn some(
    rule: &HttpRule,
    chosen: Option<&[usize]>,
    at: &str,
    place: &Place<'_>,
    reader: &mut Reader<'_>,
) -> Vec<Matched> {
    if rule.r#match.is_empty() {
        return vec![Matched::default()];
    }
    let all: Vec<usize> = (0..rule.r#match.len()).collect();
    let chosen = chosen.unwrap_or(&all).iter();
    let there = chosen.filter_map(|i| Some((i, rule.r#match.get(*i)?)));
    let mut out = Vec::new();
    for (i, m) in there {
        let mut matched = one(m, &format!("{at}.match[{i}]"), reader);
        let by_source = matches!(place, Place::At(there) if there.by_source);
        if by_source && !m.source_namespace.is_empty() {
            let namespaces = vec![m.source_namespace.as_str().into()];
            matched.matched.source = SourceMatch { namespaces, ..SourceMatch::default() };
        }
        out.push(matched);
    }
    out
}

fn one(m: &HttpMatch, at: &str, reader: &mut Reader<'_>) -> Matched {
    let mut failures = Vec::new();
    let mut matched = RouteMatch::default();
    match path(m, at, reader) {
        Ok(path) => matched.path = path,
        Err(e) => failures.push(e),
    }
    for (field, wanted, slot) in [
        ("scheme", &m.scheme, &mut matched.scheme),
        ("method", &m.method, &mut matched.method),
        ("authority", &m.authority, &mut matched.authority),
    ] {
        let Some(wanted) = wanted else { continue };
        match value(wanted, &format!("{at}.{field}"), reader) {
            Ok(value) => *slot = value,
            Err(e) => failures.push(e),
        }
    }
    matched.headers = headers(&m.headers, &format!("{at}.headers"), &mut failures, reader);
    matched.without_headers =
        headers(&m.without_headers, &format!("{at}.withoutHeaders"), &mut failures, reader);
    for (name, wanted) in &m.query_params {
        match value(wanted, &format!("{at}.queryParams.{name}"), reader) {
            Ok(value) => matched.query.push(field(name, value)),
            Err(e) => failures.push(e),
        }
    }
    if !m.source_labels.is_empty() {
        // Diagnosed by its field.
        failures.push(format!("{at}.sourceLabels: labels of callers are not known"));
    }
    Matched { name: m.name.clone(), matched, failure: failures.into_iter().next() }
}

fn path(m: &HttpMatch, at: &str, reader: &mut Reader<'_>) -> Result<PathMatch, Failure> {
    let Some(uri) = &m.uri else { return Ok(PathMatch::Any) };
    let at = format!("{at}.uri");
    let Some(mut value) = value(uri, &at, reader)? else { return Ok(PathMatch::Any) };
    if let TextMatch::Exact(text) | TextMatch::Prefix(text) = &mut value
        && !text.is_empty()
    {
        *text = text::spelled(text).into();
        let whole = uri.exact.is_some();
        if let Some(why) = never(text, whole) {
            let message = format!("{text:.80?} {why}: no path fits");
            reader.warn(Code::MatchesNothing, at, message);
        }
    }
    Ok(match (value, m.ignore_uri_case) {
        (TextMatch::Exact(text), false) => PathMatch::Exact(text),
        (TextMatch::Exact(text), true) => PathMatch::ExactIgnoringCase(text),
        (TextMatch::Prefix(text), _) if text.is_empty() => PathMatch::Any,
        (TextMatch::Prefix(text), false) => PathMatch::Prefix(text),
        (TextMatch::Prefix(text), true) => PathMatch::PrefixIgnoringCase(text),
        (TextMatch::Regex(pattern), _) => PathMatch::Regex(pattern),
        // What is left is not made by `value`, or fits everything.
        _ => PathMatch::Any,
    })
}

/// Why no request's path is this, or begins with it: requests have one form before a rule sees them.
fn never(text: &str, whole: bool) -> Option<&'static str> {
    // What ends a prefix may go on.
    let complete = if whole { text } else { text.rsplit_once('/').map_or("", |(start, _)| start) };
    if !text.starts_with('/') {
        Some("does not begin with a slash")
    } else if text.contains(['?', '#']) {
        Some("holds `?` or `#`, which end a path (queries are for queryParams)")
    } else if text.contains('\\') {
        Some("holds a backslash, which is a slash in requests")
    } else if complete.split('/').any(|segment| matches!(segment, "." | "..")) {
        Some("holds a dot segment, which is resolved in requests")
    } else {
        None
    }
}

/// `None`: whatever it is.
pub(super) fn value(
    wanted: &StringMatch,
    at: &str,
    reader: &mut Reader<'_>,
) -> Result<Option<TextMatch>, Failure> {
    match (&wanted.exact, &wanted.prefix, &wanted.regex) {
        (None, None, None) => Ok(None),
        (Some(text), None, None) => Ok(Some(TextMatch::Exact(text.as_str().into()))),
        (None, Some(text), None) => Ok(Some(TextMatch::Prefix(text.as_str().into()))),
        // No pattern, but what people write for "anything".
        (None, None, Some(text)) if text == "*" => Ok(None),
        (None, None, Some(text)) => {
            Ok(Some(TextMatch::Regex(reader.pattern(text, format!("{at}.regex"))?)))
        }
        _ => Err(reader.invalid(at, "exact, prefix and regex exclude each other")),
    }
}

fn headers(
    wanted: &BTreeMap<String, StringMatch>,
    at: &str,
    failures: &mut Vec<Failure>,
    reader: &mut Reader<'_>,
) -> Vec<FieldMatch> {
    let mut out: Vec<FieldMatch> = Vec::new();
    for (name, wanted) in wanted {
        let at = format!("{at}.{name}");
        // Istio ignores these here: they are fields of the match.
        if matches!(name.as_str(), "uri" | "scheme" | "method" | "authority") {
            let message = format!("ignored, as in Istio: write it as the match's own field {name}");
            reader.warn(Code::NoEffect, at, message);
            continue;
        }
        let name = match name.as_str() {
            ":authority" => Ok("host".to_owned()),
            pseudo if pseudo.starts_with([':', '@']) => {
                let message = "not handled: only headers can be matched, not what is made of them";
                Err(reader.unsupported(at.clone(), message))
            }
            name => text::header_name(name).map_err(|e| reader.invalid(at.clone(), e)),
        };
        match name.and_then(|name| Ok((name, value(wanted, &at, reader)?))) {
            Ok((name, _)) if out.iter().any(|h| *h.name == *name) => {
                failures.push(reader.invalid(at, "is matched twice: case makes no difference"));
            }
            Ok((name, value)) => out.push(field(&name, value)),
            Err(e) => failures.push(e),
        }
    }
    out
}

fn field(name: &str, value: Option<TextMatch>) -> FieldMatch {
    FieldMatch { name: name.into(), value: value.unwrap_or(TextMatch::Present) }
}
