//! A waypoint's routes and subsets in the dump: who matches, what happens, where it was written.

use std::fmt::Write as _;
use std::time::Duration;

use model::http::{
    Abort, Audience, Backend, Fault, FieldMatch, Filter, HeaderEdits, PathMatch, PathRewrite,
    RouteMatch, RouteRule, RouteSet, ServiceRoutes, Share, SourceMatch, Subset, TextMatch,
};
use serde_json::{Map, Value, json};

use super::known;

pub(super) fn routes(r: &ServiceRoutes) -> Value {
    let ports: Map<_, _> = r
        .ports
        .iter()
        .map(|p| (p.service_port.to_string(), format!("{:?}", p.protocol).into()))
        .collect();
    json!({
        "namespace": &*r.service.namespace,
        "hostname": &*r.service.hostname,
        "protocols": ports,
        "sets": r.sets.iter().map(|s| set(s)).collect::<Vec<_>>(),
    })
}

pub(super) fn subset(s: &Subset) -> Value {
    json!({
        "namespace": &*s.key.service.namespace,
        "hostname": &*s.key.service.hostname,
        "name": &*s.key.name,
        "workloads": s.workloads.iter().map(|uid| &*uid.0).collect::<Vec<_>>(),
    })
}

fn set(s: &RouteSet) -> Value {
    json!({
        "for": match &s.audience {
            Audience::Everybody => "everybody".to_owned(),
            Audience::Namespace(namespace) => format!("clients in {namespace}"),
        },
        "ports": if s.ports.is_empty() { json!("all") } else { json!(&*s.ports) },
        "kind": format!("{:?}", s.kind),
        "rules": s.rules.iter().map(|r| rule(r)).collect::<Vec<_>>(),
        "matches": s.matches.iter().map(one_match).collect::<Vec<_>>(),
    })
}

/// What must fit, as words; `rule` is the number in the list of rules.
fn one_match(m: &RouteMatch) -> Value {
    let mut all = vec![path(&m.path)];
    for (what, m) in [("method", &m.method), ("scheme", &m.scheme), ("authority", &m.authority)] {
        all.extend(m.as_ref().map(|m| format!("{what} {}", text(m))));
    }
    all.extend(m.headers.iter().map(|h| format!("header {}", field(h))));
    all.extend(m.without_headers.iter().map(|h| format!("without header {}", field(h))));
    all.extend(m.query.iter().map(|q| format!("parameter {}", field(q))));
    all.extend(source(&m.source));
    json!({ "rule": m.rule, "all": all })
}

fn rule(r: &RouteRule) -> Value {
    let seconds = |d: Option<Duration>| d.map(|d| d.as_secs_f64());
    json!({
        "route": &*r.route,
        "name": &*r.name,
        "provenance": known(&r.provenance),
        "filters": filters(&r.filters),
        "backends": r.backends.iter().map(backend).collect::<Vec<_>>(),
        "requestTimeoutSeconds": seconds(r.timeouts.request),
        "backendTimeoutSeconds": seconds(r.timeouts.backend_request),
    })
}

fn backend(b: &Backend) -> Value {
    json!({ "weight": b.weight, "to": b.target.to_string(), "filters": filters(&b.filters) })
}

fn filters(all: &[Filter]) -> Vec<String> {
    all.iter().map(filter).collect()
}

fn filter(f: &Filter) -> String {
    match f {
        Filter::RequestHeaders(e) => format!("request headers: {}", edits(e)),
        Filter::ResponseHeaders(e) => format!("response headers: {}", edits(e)),
        Filter::Rewrite(r) => {
            let host = r.host.as_ref().map(|h| format!(" host {h}"));
            let path = r.path.as_ref().map(|p| format!(" path {}", rewrite(p)));
            format!("rewrite{}{}", host.unwrap_or_default(), path.unwrap_or_default())
        }
        Filter::Redirect(r) => {
            let scheme = r.scheme.as_ref().map(|s| format!(" scheme {s}"));
            let host = r.host.as_ref().map(|h| format!(" host {h}"));
            let path = r.path.as_ref().map(|p| format!(" path {}", rewrite(p)));
            let [scheme, host, path] = [scheme, host, path].map(Option::unwrap_or_default);
            format!("redirect {}{scheme}{host} port {:?}{path}", r.status, r.port)
        }
        Filter::Mirror(m) => format!("mirror {} to {}", share(m.share), m.target),
        Filter::Cors(c) => format!("{c:?}"),
        Filter::Fault(f) => fault(f),
        Filter::Respond(r) => format!("respond {} with {} bytes", r.status, r.body.len()),
        Filter::Fail { reason, message } => format!("fail {reason}: {message}"),
    }
}

fn fault(f: &Fault) -> String {
    let mut words = "fault".to_owned();
    // A String takes whatever is written to it.
    if let Some((of, delay)) = f.delay {
        let _ = write!(words, " delay {} by {delay:?}", share(of));
    }
    if let Some((of, abort)) = f.abort {
        let how = match abort {
            Abort::Http(status) => format!("status {status}"),
            Abort::Grpc(code) => format!("grpc-status {code}"),
            Abort::Reset => "a reset".to_owned(),
        };
        let _ = write!(words, " abort {} with {how}", share(of));
    }
    for header in &f.headers {
        let _ = write!(words, ", header {}", field(header));
    }
    for source in source(&f.source) {
        let _ = write!(words, ", {source}");
    }
    if let Some(until) = f.until {
        let _ = write!(words, ", until {until}");
    }
    words
}

fn edits(e: &HeaderEdits) -> String {
    let remove = e.remove.iter().map(|name| format!("remove {name}"));
    let set = e.set.iter().map(|(name, value)| format!("set {name}: {value}"));
    let add = e.add.iter().map(|(name, value)| format!("add {name}: {value}"));
    remove.chain(set).chain(add).collect::<Vec<_>>().join(", ")
}

fn rewrite(p: &PathRewrite) -> String {
    match p {
        PathRewrite::Full(s) => format!("to {s}"),
        PathRewrite::Segments(s) | PathRewrite::Text(s) => format!("prefix to {s}"),
        PathRewrite::Regex { pattern, substitution } => format!("{pattern:?} to {substitution}"),
    }
}

fn path(p: &PathMatch) -> String {
    match p {
        PathMatch::Any => "any path".to_owned(),
        PathMatch::Exact(s) => format!("path {s}"),
        PathMatch::Segments(s) => format!("path {s}/*"),
        PathMatch::Prefix(s) => format!("path {s}*"),
        PathMatch::ExactIgnoringCase(s) => format!("path {s} in any case"),
        PathMatch::PrefixIgnoringCase(s) => format!("path {s}* in any case"),
        PathMatch::Regex(p) => format!("path {p:?}"),
        PathMatch::GrpcMethod(s) => format!("path /*/{s}"),
    }
}

fn field(f: &FieldMatch) -> String {
    format!("{} {}", f.name, text(&f.value))
}

fn text(t: &TextMatch) -> String {
    match t {
        TextMatch::Exact(s) => format!("is {s}"),
        TextMatch::ExactIgnoringCase(s) => format!("is {s} in any case"),
        TextMatch::Prefix(s) => format!("is {s}*"),
        TextMatch::PrefixIgnoringCase(s) => format!("is {s}* in any case"),
        TextMatch::Regex(p) => format!("is {p:?}"),
        TextMatch::Present => "is there".to_owned(),
    }
}

fn source(s: &SourceMatch) -> Vec<String> {
    let namespaces = s.namespaces.iter().map(|n| format!("from namespace {n}")).collect::<Vec<_>>();
    let identities = s.identities.iter().map(|i| format!("from {i}")).collect::<Vec<_>>();
    [namespaces, identities].into_iter().filter(|l| !l.is_empty()).map(|l| l.join(" or ")).collect()
}

fn share(s: Share) -> String {
    format!("{}/{}", s.numerator, s.denominator)
}
