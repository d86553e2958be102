//! Model values to wire messages.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use model::Provenance;
use model::http::{
    Abort, Audience, Backend, Cors, Fault, FieldMatch, Filter, FixedResponse, HeaderEdits, Mirror,
    OriginMatch, PathMatch, PathRewrite, Protocol, Redirect, RedirectPort, Rewrite, RouteKind,
    RouteMatch, RouteRule, RouteSet, ServiceRoutes, Share, SourceMatch, Subset, Target, TextMatch,
    Timeouts,
};
use model::{ServiceKey, Str};
use prost::Message;

use crate::ambit as wire;

/// A rule as it stands among those of a set.
pub(crate) fn encode_rule(one: &RouteRule) -> Bytes {
    rule(one).encode_to_vec().into()
}

/// The message of a Routes resource.
pub fn encode_routes(routes: &ServiceRoutes) -> wire::Routes {
    encode_routes_by(routes, &mut |rule| encode_rule(rule))
}

/// The same, where `rule` may know already what a rule is on the wire.
pub(crate) fn encode_routes_by(
    routes: &ServiceRoutes,
    rule: &mut dyn FnMut(&Arc<RouteRule>) -> Bytes,
) -> wire::Routes {
    let protocol = |p: Protocol| match p {
        Protocol::Undeclared => wire::Protocol::Undeclared,
        Protocol::Http => wire::Protocol::Http,
        Protocol::Http2 => wire::Protocol::Http2,
        Protocol::Grpc => wire::Protocol::Grpc,
        Protocol::Opaque => wire::Protocol::Opaque,
    };
    let port = |p: &model::http::PortProtocol| wire::PortProtocol {
        service_port: p.service_port.into(),
        protocol: protocol(p.protocol).into(),
    };
    wire::Routes {
        service: Some(service(&routes.service)),
        ports: routes.ports.iter().map(port).collect(),
        sets: routes.sets.iter().map(|s| set(s, rule)).collect(),
    }
}

pub fn encode_subset(subset: &Subset) -> wire::Subset {
    wire::Subset {
        service: Some(service(&subset.key.service)),
        name: subset.key.name.to_string(),
        workloads: subset.workloads.iter().map(|uid| uid.0.to_string()).collect(),
    }
}

fn set(set: &RouteSet, rule: &mut dyn FnMut(&Arc<RouteRule>) -> Bytes) -> wire::RouteSet {
    use wire::route_set::Audience as Wire;
    wire::RouteSet {
        audience: Some(match &set.audience {
            Audience::Everybody => Wire::Everybody(()),
            Audience::Namespace(namespace) => Wire::Namespace(namespace.to_string()),
        }),
        ports: set.ports.iter().map(|p| (*p).into()).collect(),
        kind: match set.kind {
            RouteKind::Http => wire::RouteKind::Http,
            RouteKind::Grpc => wire::RouteKind::Grpc,
        }
        .into(),
        rules: set.rules.iter().map(rule).collect(),
        matches: set.matches.iter().map(one_match).collect(),
    }
}

fn one_match(m: &RouteMatch) -> wire::RouteMatch {
    wire::RouteMatch {
        rule: m.rule,
        path: path(&m.path),
        method: m.method.as_ref().map(text),
        scheme: m.scheme.as_ref().map(text),
        authority: m.authority.as_ref().map(text),
        headers: fields(&m.headers),
        without_headers: fields(&m.without_headers),
        query: fields(&m.query),
        source: source(&m.source),
    }
}

fn path(path: &PathMatch) -> Option<wire::PathMatch> {
    use wire::path_match::Path;
    let path = match path {
        PathMatch::Any => return None,
        PathMatch::Exact(s) => Path::Exact(s.to_string()),
        PathMatch::Segments(s) => Path::Segments(s.to_string()),
        PathMatch::Prefix(s) => Path::Prefix(s.to_string()),
        PathMatch::ExactIgnoringCase(s) => Path::ExactIgnoringCase(s.to_string()),
        PathMatch::PrefixIgnoringCase(s) => Path::PrefixIgnoringCase(s.to_string()),
        PathMatch::Regex(p) => Path::Regex(p.text().to_string()),
        PathMatch::GrpcMethod(s) => Path::GrpcMethod(s.to_string()),
    };
    Some(wire::PathMatch { path: Some(path) })
}

fn text(text: &TextMatch) -> wire::TextMatch {
    use wire::text_match::Text;
    wire::TextMatch {
        text: Some(match text {
            TextMatch::Exact(s) => Text::Exact(s.to_string()),
            TextMatch::ExactIgnoringCase(s) => Text::ExactIgnoringCase(s.to_string()),
            TextMatch::Prefix(s) => Text::Prefix(s.to_string()),
            TextMatch::PrefixIgnoringCase(s) => Text::PrefixIgnoringCase(s.to_string()),
            TextMatch::Regex(p) => Text::Regex(p.text().to_string()),
            TextMatch::Present => Text::Present(()),
        }),
    }
}

fn fields(all: &[FieldMatch]) -> Vec<wire::FieldMatch> {
    let field =
        |f: &FieldMatch| wire::FieldMatch { name: f.name.to_string(), value: Some(text(&f.value)) };
    all.iter().map(field).collect()
}

fn source(source: &SourceMatch) -> Option<wire::SourceMatch> {
    if source.is_anybody() {
        return None;
    }
    Some(wire::SourceMatch {
        namespaces: strings(&source.namespaces),
        identities: source.identities.iter().map(ToString::to_string).collect(),
    })
}

fn rule(rule: &RouteRule) -> wire::RouteRule {
    let Provenance { object, field, origin } = &rule.provenance;
    wire::RouteRule {
        route: rule.route.to_string(),
        name: rule.name.to_string(),
        provenance: Some(wire::Provenance {
            object: object.to_string(),
            field: field.to_string(),
            origin: origin.to_string(),
        }),
        filters: rule.filters.iter().map(filter).collect(),
        backends: rule.backends.iter().map(backend).collect(),
        timeouts: (rule.timeouts != Timeouts::default()).then(|| wire::Timeouts {
            request_ns: rule.timeouts.request.map(nanoseconds),
            backend_request_ns: rule.timeouts.backend_request.map(nanoseconds),
        }),
    }
}

fn backend(backend: &Backend) -> wire::Backend {
    wire::Backend {
        weight: backend.weight,
        target: Some(target(&backend.target)),
        filters: backend.filters.iter().map(filter).collect(),
    }
}

fn target(target: &Target) -> wire::Target {
    use wire::target::Target as Wire;
    wire::Target {
        target: Some(match target {
            Target::Service { service: key, port, subset } => Wire::Service(wire::ServiceTarget {
                service: Some(service(key)),
                port: (*port).into(),
                subset: subset.as_ref().map(ToString::to_string),
            }),
            Target::Invalid { message } => Wire::Invalid(message.to_string()),
        }),
    }
}

fn filter(filter: &Filter) -> wire::Filter {
    use wire::filter::Filter as Wire;
    wire::Filter {
        filter: Some(match filter {
            Filter::RequestHeaders(edits) => Wire::RequestHeaders(header_edits(edits)),
            Filter::ResponseHeaders(edits) => Wire::ResponseHeaders(header_edits(edits)),
            Filter::Rewrite(Rewrite { host, path }) => Wire::Rewrite(wire::Rewrite {
                host: host.as_ref().map(ToString::to_string),
                path: path.as_ref().map(rewrite),
            }),
            Filter::Redirect(one) => Wire::Redirect(redirect(one)),
            Filter::Mirror(Mirror { target: to, share: of }) => {
                Wire::Mirror(wire::Mirror { target: Some(target(to)), share: Some(share(*of)) })
            }
            Filter::Cors(one) => Wire::Cors(cors(one)),
            Filter::Fault(one) => Wire::Fault(fault(one)),
            Filter::Respond(FixedResponse { status, body }) => Wire::Respond(wire::FixedResponse {
                status: (*status).into(),
                body: body.to_string(),
            }),
            Filter::Fail { reason, message } => Wire::Fail(wire::Failure {
                reason: reason.code().to_owned(),
                message: message.to_string(),
            }),
        }),
    }
}

fn header_edits(edits: &HeaderEdits) -> wire::HeaderEdits {
    let headers = |all: &[(Str, Str)]| {
        all.iter()
            .map(|(name, value)| wire::Header { name: name.to_string(), value: value.to_string() })
            .collect()
    };
    wire::HeaderEdits {
        remove: strings(&edits.remove),
        set: headers(&edits.set),
        add: headers(&edits.add),
    }
}

fn rewrite(rewrite: &PathRewrite) -> wire::PathRewrite {
    use wire::path_rewrite::Rewrite as Wire;
    wire::PathRewrite {
        rewrite: Some(match rewrite {
            PathRewrite::Full(s) => Wire::Full(s.to_string()),
            PathRewrite::Segments(s) => Wire::Segments(s.to_string()),
            PathRewrite::Text(s) => Wire::Text(s.to_string()),
            PathRewrite::Regex { pattern, substitution } => Wire::Regex(wire::RegexRewrite {
                pattern: pattern.text().to_string(),
                substitution: substitution.to_string(),
            }),
        }),
    }
}

fn redirect(redirect: &Redirect) -> wire::Redirect {
    wire::Redirect {
        scheme: redirect.scheme.as_ref().map(ToString::to_string),
        host: redirect.host.as_ref().map(ToString::to_string),
        port: match redirect.port {
            RedirectPort::Derived => None,
            RedirectPort::Number(port) => Some(port.into()),
        },
        path: redirect.path.as_ref().map(rewrite),
        status: redirect.status.into(),
    }
}

fn cors(cors: &Cors) -> wire::Cors {
    use wire::origin_match::Origin;
    let origin = |o: &OriginMatch| wire::OriginMatch {
        origin: Some(match o {
            OriginMatch::Any => Origin::Any(()),
            OriginMatch::Exact(s) => Origin::Exact(s.to_string()),
            OriginMatch::Wildcard { before, after } => Origin::Wildcard(wire::WildcardOrigin {
                before: before.to_string(),
                after: after.to_string(),
            }),
            OriginMatch::Prefix(s) => Origin::Prefix(s.to_string()),
            OriginMatch::Regex(p) => Origin::Regex(p.text().to_string()),
        }),
    };
    wire::Cors {
        allow_origins: cors.allow_origins.iter().map(origin).collect(),
        allow_methods: strings(&cors.allow_methods),
        allow_headers: strings(&cors.allow_headers),
        expose_headers: strings(&cors.expose_headers),
        allow_credentials: cors.allow_credentials,
        max_age: cors.max_age,
        forward_unmatched_preflights: cors.forward_unmatched_preflights,
    }
}

fn fault(fault: &Fault) -> wire::Fault {
    use wire::abort::How;
    let abort = |(of, abort): &(Share, Abort)| wire::Abort {
        share: Some(share(*of)),
        how: Some(match *abort {
            Abort::Http(status) => How::Http(status.into()),
            Abort::Grpc(code) => How::Grpc(code),
            Abort::Reset => How::Reset(()),
        }),
    };
    wire::Fault {
        delay: fault.delay.map(|(of, duration)| wire::Delay {
            share: Some(share(of)),
            duration_ns: nanoseconds(duration),
        }),
        abort: fault.abort.as_ref().map(abort),
        headers: fields(&fault.headers),
        source: source(&fault.source),
        until: fault.until,
    }
}

fn share(share: Share) -> wire::Share {
    wire::Share { numerator: share.numerator, denominator: share.denominator }
}

fn service(key: &ServiceKey) -> wire::ServiceName {
    wire::ServiceName { namespace: key.namespace.to_string(), hostname: key.hostname.to_string() }
}

fn strings(all: &[Str]) -> Vec<String> {
    all.iter().map(ToString::to_string).collect()
}

/// 584 years at most: nobody waits longer.
fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
