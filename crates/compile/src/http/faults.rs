//! Faults that somebody asks for: those of a VirtualService, and our own kind `HTTPFault`.
//!
//! Which way is closed for a fault? It harms on purpose, and whoever wrote it meant it to harm a certain part for a certain
//! time. So one that cannot be read as it was meant (a share, a status, a source, above all its end) harms nobody, and an
//! error says so. It is the one filter whose failure lets requests pass: what it would have stopped was good.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use k8s_openapi::jiff::Timestamp;
use model::http::{Abort, Fault, FieldMatch, Filter, Pattern, Share, SourceMatch, TextMatch};
use model::{Identity, Str};

use super::text;
use crate::ambit::{
    FaultAbort, FaultDelay, FaultHeader, FaultMatch, FaultSource, HeaderMatchType, HttpFault,
    Percentage,
};
use crate::context::Context;
use crate::diagnostics::{Code, Diagnostic};
use crate::istio::duration;
use crate::object::Objects;

/// Longest delay: a request that waits holds a connection and its place among the limits on both sides.
const MAX_DELAY: Duration = Duration::from_secs(3600);
/// Parts of a share: a ten-thousandth of a percent.
const PARTS: u32 = 1_000_000;
/// In principals this trust domain means the mesh's own, whatever its name, as in policies.
const LOCAL_TRUST_DOMAIN: &str = "cluster.local";

/// Says what is wrong with every `HTTPFault`, and which harm nobody. `named`: those that routes name, and whether any request
/// can meet them.
pub(super) fn check(objects: &Objects, named: &BTreeMap<(Str, Str), bool>, cx: &mut Context<'_>) {
    for (key, sourced) in &objects.http_faults {
        let unmet = match named.get(key) {
            Some(true) => None,
            Some(false) => {
                let message = "harms nobody: no route that names it looks at any request";
                let d = Diagnostic::warning(Code::NoEffect, message);
                Some(d.help("what is said of the routes says why"))
            }
            None => {
                let message = "harms nobody: no route of its namespace names it";
                let d = Diagnostic::warning(Code::NoEffect, message);
                Some(
                    d.help("name it in a filter of type ExtensionRef of an HTTPRoute or GRPCRoute"),
                )
            }
        };
        if let Some(d) = unmet {
            cx.report(key, sourced, d);
        }
        if let Err((field, message)) = fault(&sourced.value, &cx.config.trust_domain) {
            let message = format!("{message}; nobody is harmed until this is mended");
            cx.report(key, sourced, Diagnostic::error(Code::InvalidField, message).field(field));
        }
    }
}

/// The filter that an `HTTPFault` is. `None`: there is no such object.
pub(super) fn filter(
    objects: &Objects,
    namespace: &str,
    name: &str,
    trust_domain: &str,
) -> Option<Filter> {
    let sourced = objects.http_faults.get(&(namespace.into(), name.into()))?;
    // The filter is there and does nothing: a route that names it is not broken.
    Some(Filter::Fault(fault(&sourced.value, trust_domain).unwrap_or_default()))
}

/// Percent, 0 to 100, as a share.
pub(super) fn share(percent: f64) -> Result<Share, String> {
    if !(0.0..=100.0).contains(&percent) {
        return Err(format!("{percent} is not a percentage (0-100)"));
    }
    let parts = percent / 100.0 * f64::from(PARTS);
    #[expect(clippy::cast_possible_truncation, reason = "between 0 and a million")]
    let numerator = parts.round() as u32;
    Ok(Share { numerator, denominator: PARTS })
}

/// How long a fault delays.
pub(super) fn delay(text: &str) -> Result<Duration, String> {
    let delay = duration::parse(text)?;
    if delay < Duration::from_millis(1) {
        return Err("shorter than 1ms".to_owned());
    }
    if delay > MAX_DELAY {
        return Err("longer than an hour".to_owned());
    }
    Ok(delay)
}

/// A status that an answer may have.
pub(super) fn http_status(status: u32) -> Result<u16, String> {
    u16::try_from(status)
        .ok()
        .filter(|s| (200..=599).contains(s))
        .ok_or_else(|| format!("{status} is not a status of an answer (200-599)"))
}

/// A gRPC status by its name.
pub(super) fn grpc_status(name: &str) -> Result<u32, String> {
    let found = (0..).zip(GRPC_STATUS).find(|(_, known)| *known == name);
    found
        .map(|(code, _)| code)
        .ok_or_else(|| format!("{name:.40?} is not the name of a gRPC status, as UNAVAILABLE"))
}

/// By number.
const GRPC_STATUS: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

/// The field that is wrong, and why.
type Wrong = (String, String);

fn fault(object: &HttpFault, trust_domain: &str) -> Result<Fault, Wrong> {
    let spec = &object.spec;
    if spec.delay.is_none() && spec.abort.is_none() {
        return Err(("spec".to_owned(), "says neither delay nor abort".to_owned()));
    }
    let mut fault = Fault {
        delay: spec.delay.as_ref().map(own_delay).transpose()?,
        abort: spec.abort.as_ref().map(own_abort).transpose()?,
        until: spec.until.as_deref().map(until).transpose()?,
        ..Fault::default()
    };
    if let Some(FaultMatch { headers, source }) = &spec.r#match {
        for (i, header) in headers.iter().enumerate() {
            let field = own_header(header, &format!("spec.match.headers[{i}]"))?;
            if fault.headers.iter().any(|h| h.name == field.name) {
                return Err((
                    format!("spec.match.headers[{i}].name"),
                    "is matched above already".to_owned(),
                ));
            }
            fault.headers.push(field);
        }
        if let Some(source) = source {
            fault.source = own_source(source, trust_domain)?;
        }
    }
    Ok(fault)
}

fn own_delay(delay: &FaultDelay) -> Result<(Share, Duration), Wrong> {
    let share = portion(delay.percent, delay.percentage, "spec.delay")?;
    let duration =
        self::delay(&delay.duration).map_err(|e| ("spec.delay.duration".to_owned(), e))?;
    Ok((share, duration))
}

fn own_abort(abort: &FaultAbort) -> Result<(Share, Abort), Wrong> {
    let share = portion(abort.percent, abort.percentage, "spec.abort")?;
    let how = match (abort.http_status, &abort.grpc_status, abort.reset) {
        (Some(status), None, false) => {
            Abort::Http(http_status(status).map_err(|e| ("spec.abort.httpStatus".to_owned(), e))?)
        }
        (None, Some(status), false) => {
            let code = match status {
                IntOrString::String(name) => grpc_status(name),
                IntOrString::Int(number) => u32::try_from(*number)
                    .ok()
                    .filter(|n| (*n as usize) < GRPC_STATUS.len())
                    .ok_or_else(|| format!("{number} is not a gRPC status (0-16)")),
            };
            Abort::Grpc(code.map_err(|e| ("spec.abort.grpcStatus".to_owned(), e))?)
        }
        (None, None, true) => Abort::Reset,
        _ => {
            let message = "needs one of httpStatus, grpcStatus and reset: true".to_owned();
            return Err(("spec.abort".to_owned(), message));
        }
    };
    Ok((share, how))
}

/// Whoever asks for a fault says for how many: what is left out is not "all".
fn portion(percent: Option<f64>, percentage: Option<Percentage>, at: &str) -> Result<Share, Wrong> {
    let (field, value) = match (percent, percentage) {
        (Some(percent), None) => ("percent", percent),
        (None, Some(percentage)) => ("percentage.value", percentage.value),
        (None, None) => {
            return Err((at.to_owned(), "does not say which percent of requests".to_owned()));
        }
        (Some(_), Some(_)) => {
            return Err((
                at.to_owned(),
                "percent and percentage both say how many; use one".to_owned(),
            ));
        }
    };
    share(value).map_err(|e| (format!("{at}.{field}"), e))
}

/// Seconds since 1970.
fn until(text: &str) -> Result<u64, Wrong> {
    let wrong = || {
        let message = format!("{text:.40?} is not a time, as 2030-01-31T12:00:00Z");
        ("spec.until".to_owned(), message)
    };
    let time: Timestamp = text.parse().map_err(|_| wrong())?;
    u64::try_from(time.as_second()).map_err(|_| wrong())
}

fn own_header(header: &FaultHeader, at: &str) -> Result<FieldMatch, Wrong> {
    let name = text::header_name(&header.name).map_err(|e| (format!("{at}.name"), e))?;
    let value = match header.r#type {
        HeaderMatchType::Exact => TextMatch::Exact(header.value.as_str().into()),
        HeaderMatchType::RegularExpression => TextMatch::Regex(
            Pattern::new(&header.value).map_err(|e| (format!("{at}.value"), e.to_string()))?,
        ),
    };
    Ok(FieldMatch { name: name.into(), value })
}

fn own_source(source: &FaultSource, trust_domain: &str) -> Result<SourceMatch, Wrong> {
    let at = |list: &str, i: usize| format!("spec.match.source.{list}[{i}]");
    let mut out = SourceMatch::default();
    for (i, namespace) in source.namespaces.iter().enumerate() {
        crate::validate::label_name(namespace).map_err(|e| (at("namespaces", i), e))?;
        out.namespaces.push(namespace.as_str().into());
    }
    for (i, principal) in source.principals.iter().enumerate() {
        let name = principal.strip_prefix("spiffe://").unwrap_or(principal);
        let identity: Identity = format!("spiffe://{name}").parse().map_err(|_| {
            let message =
                format!("{principal:.120?} is not TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT");
            (at("principals", i), message)
        })?;
        if &*identity.trust_domain == LOCAL_TRUST_DOMAIN && trust_domain != LOCAL_TRUST_DOMAIN {
            out.identities.push(Identity { trust_domain: trust_domain.into(), ..identity.clone() });
        }
        out.identities.push(identity);
    }
    if out.is_anybody() {
        return Err((
            "spec.match.source".to_owned(),
            "names nobody; leave it out for everybody".to_owned(),
        ));
    }
    Ok(out)
}

#[cfg(test)]
mod tests;
