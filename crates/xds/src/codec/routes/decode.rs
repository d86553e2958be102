//! Wire messages to model values. See the module above for what is refused and why.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use model::http::limits::{MAX_LIST, MAX_PORTS, MAX_ROUTES_BYTES, MAX_RULES, MAX_SETS};
use model::http::{
    Abort, Audience, Backend, Cors, Fault, FieldMatch, Filter, FixedResponse, HeaderEdits, Mirror,
    OriginMatch, PathMatch, PathRewrite, PortProtocol, Protocol, Redirect, RedirectPort, Rewrite,
    RouteKind, RouteMatch, RouteRule, RouteSet, ServiceRoutes, Share, SourceMatch, Subset,
    SubsetKey, Target, TextMatch, Timeouts,
};
use model::{Identity, Provenance, Reason, Str, WorkloadUid};
use prost::Message;

use super::MAX_SUBSET;
use super::reader::{Reader, Result, within};
use crate::ambit as wire;
use crate::codec::context::short;
use crate::codec::{Interner, KnownRule};

const UNKNOWN_FIELDS: &str = "has fields that this proxy does not know";

/// Decodes the value of a Routes resource called `name`.
pub fn decode_routes(name: &str, value: &[u8], interner: &mut Interner) -> Result<ServiceRoutes> {
    let mut reader = Reader::new(name, interner);
    if value.len() > MAX_ROUTES_BYTES {
        let problem = format!("has {} bytes, at most {MAX_ROUTES_BYTES} are read", value.len());
        return Err(reader.error("Routes", problem));
    }
    // One copy, of which every rule is a part.
    let message = wire::Routes::decode(Bytes::copy_from_slice(value))
        .map_err(|e| reader.error("Routes", e))?;
    // prost drops fields it does not know. What was dropped, or written twice, shows in the length.
    if message.encoded_len() != value.len() {
        return Err(reader.error("Routes", UNKNOWN_FIELDS));
    }
    reader.routes(&message)
}

/// Decodes the value of a Subset resource called `name`.
pub fn decode_subset(name: &str, value: &[u8], interner: &mut Interner) -> Result<Subset> {
    let mut reader = Reader::new(name, interner);
    let message = wire::Subset::decode(value).map_err(|e| reader.error("Subset", e))?;
    if message.encoded_len() != value.len() {
        return Err(reader.error("Subset", UNKNOWN_FIELDS));
    }
    reader.subset(&message)
}

impl Reader<'_> {
    fn routes(&mut self, m: &wire::Routes) -> Result<ServiceRoutes> {
        let service = self.service(m.service.as_ref())?;
        self.cx.named("service", &service.to_string())?;
        let ports = self.each("ports", MAX_PORTS, &m.ports, Self::port_protocol)?;
        let mut seen = BTreeSet::new();
        if let Some(twice) = ports.iter().find(|p| !seen.insert(p.service_port)) {
            return Err(self.error("ports", format!("port {} is there twice", twice.service_port)));
        }
        let sets = self.each("sets", MAX_SETS, &m.sets, |r, set| r.set(set).map(Arc::new))?;
        self.disjoint(&sets)?;
        Ok(ServiceRoutes { service, ports: ports.into(), sets: sets.into() })
    }

    /// No client finds two sets for one port.
    fn disjoint(&self, sets: &[Arc<RouteSet>]) -> Result<()> {
        let mut seen = BTreeSet::new();
        let mut audiences: Vec<_> = sets.iter().map(|set| (&set.audience, &set.ports)).collect();
        // Those for all ports first.
        audiences.sort_by_key(|(audience, ports)| (*audience, ports.len()));
        for (i, (audience, ports)) in audiences.iter().enumerate() {
            let before = i.checked_sub(1).map(|before| audiences[before]);
            let taken = before.is_some_and(|(of, ports)| of == *audience && ports.is_empty());
            if taken || !ports.iter().all(|port| seen.insert((*audience, *port))) {
                return Err(self.error("sets", "two sets are for the same clients and port"));
            }
        }
        Ok(())
    }

    fn port_protocol(&mut self, m: &wire::PortProtocol) -> Result<PortProtocol> {
        Ok(PortProtocol {
            service_port: self.port("service_port", m.service_port)?,
            protocol: match self.cx.known("protocol", m.protocol)? {
                wire::Protocol::Undeclared => Protocol::Undeclared,
                wire::Protocol::Http => Protocol::Http,
                wire::Protocol::Http2 => Protocol::Http2,
                wire::Protocol::Grpc => Protocol::Grpc,
                wire::Protocol::Opaque => Protocol::Opaque,
            },
        })
    }

    fn set(&mut self, m: &wire::RouteSet) -> Result<RouteSet> {
        use wire::route_set::Audience as Wire;
        let audience = match &m.audience {
            Some(Wire::Everybody(())) => Audience::Everybody,
            Some(Wire::Namespace(namespace)) => Audience::Namespace(self.cx.str(namespace)),
            None => return Err(self.unknown("audience")),
        };
        let ports = self.each("ports", MAX_PORTS, &m.ports, |r, port| r.port("", *port))?;
        if !ports.is_sorted_by(|a, b| a < b) {
            return Err(self.error("ports", "are not in ascending order"));
        }
        let kind = match self.cx.known("kind", m.kind)? {
            wire::RouteKind::Http => RouteKind::Http,
            wire::RouteKind::Grpc => RouteKind::Grpc,
        };
        let rules = MAX_RULES - self.rules;
        let rules = self.each("rules", rules, &m.rules, Self::rule_once)?;
        let matches = MAX_RULES - self.matches;
        let matches = self.each("matches", matches, &m.matches, Self::one_match)?;
        self.rules += rules.len();
        self.matches += matches.len();
        RouteSet::new(audience, ports.into(), kind, rules.into(), matches.into())
            .map_err(|problem| self.error("matches", problem))
    }

    fn one_match(&mut self, m: &wire::RouteMatch) -> Result<RouteMatch> {
        Ok(RouteMatch {
            rule: m.rule,
            path: self.optional("path", m.path.as_ref(), Self::path)?.unwrap_or_default(),
            method: self.optional("method", m.method.as_ref(), Self::text)?,
            scheme: self.optional("scheme", m.scheme.as_ref(), Self::text)?,
            authority: self.optional("authority", m.authority.as_ref(), Self::text)?,
            headers: self.each("headers", MAX_LIST, &m.headers, Self::header_match)?,
            without_headers: self.each(
                "without_headers",
                MAX_LIST,
                &m.without_headers,
                Self::header_match,
            )?,
            query: self.each("query", MAX_LIST, &m.query, Self::field)?,
            source: self.source(m.source.as_ref())?,
        })
    }

    fn path(&mut self, m: &wire::PathMatch) -> Result<PathMatch> {
        use wire::path_match::Path;
        Ok(match &m.path {
            Some(Path::Exact(s)) => PathMatch::Exact(self.cx.str(s)),
            Some(Path::Segments(s)) => {
                // Any other would never fit, or fit where it should not.
                if !s.starts_with('/') || s.ends_with('/') {
                    return Err(
                        self.error("segments", "must begin with a slash and not end in one")
                    );
                }
                PathMatch::Segments(self.cx.str(s))
            }
            Some(Path::Prefix(s)) => PathMatch::Prefix(self.cx.str(s)),
            Some(Path::ExactIgnoringCase(s)) => PathMatch::ExactIgnoringCase(self.cx.str(s)),
            Some(Path::PrefixIgnoringCase(s)) => PathMatch::PrefixIgnoringCase(self.cx.str(s)),
            Some(Path::Regex(s)) => PathMatch::Regex(self.pattern("regex", s)?),
            Some(Path::GrpcMethod(s)) => PathMatch::GrpcMethod(self.cx.str(s)),
            None => return Err(self.unknown("")),
        })
    }

    fn text(&mut self, m: &wire::TextMatch) -> Result<TextMatch> {
        use wire::text_match::Text;
        Ok(match &m.text {
            Some(Text::Exact(s)) => TextMatch::Exact(self.cx.str(s)),
            Some(Text::ExactIgnoringCase(s)) => TextMatch::ExactIgnoringCase(self.cx.str(s)),
            Some(Text::Prefix(s)) => TextMatch::Prefix(self.cx.str(s)),
            Some(Text::PrefixIgnoringCase(s)) => TextMatch::PrefixIgnoringCase(self.cx.str(s)),
            Some(Text::Regex(s)) => TextMatch::Regex(self.pattern("regex", s)?),
            Some(Text::Present(())) => TextMatch::Present,
            None => return Err(self.unknown("")),
        })
    }

    fn header_match(&mut self, m: &wire::FieldMatch) -> Result<FieldMatch> {
        self.header_name("name", &m.name)?;
        self.field(m)
    }

    fn field(&mut self, m: &wire::FieldMatch) -> Result<FieldMatch> {
        let value = self.optional("value", m.value.as_ref(), Self::text)?;
        let value = value.ok_or_else(|| self.error("value", "is not set"))?;
        Ok(FieldMatch { name: self.cx.str(&m.name), value })
    }

    fn source(&mut self, m: Option<&wire::SourceMatch>) -> Result<SourceMatch> {
        let Some(m) = m else { return Ok(SourceMatch::default()) };
        let identities = self.each("identities", MAX_LIST, &m.identities, |r, name| {
            name.parse::<Identity>().map_err(|e| r.error("", e))
        });
        Ok(SourceMatch {
            namespaces: self.strings("source.namespaces", &m.namespaces)?,
            identities: identities.map_err(|e| within(e, "source"))?,
        })
    }

    /// A rule that is known from before is not read again: of thousands one changes.
    fn rule_once(&mut self, bytes: &Bytes) -> Result<Arc<RouteRule>> {
        if let Some(known) = self.cx.interner.rule(bytes) {
            for pattern in known.patterns {
                self.count(pattern).map_err(|problem| self.error("patterns", problem))?;
            }
            return Ok(known.rule);
        }
        let message = wire::RouteRule::decode(&bytes[..]).map_err(|e| self.error("", e))?;
        if message.encoded_len() != bytes.len() {
            return Err(self.error("", UNKNOWN_FIELDS));
        }
        self.patterns_of_rule.clear();
        let rule = Arc::new(self.rule(&message)?);
        self.patterns_of_rule.sort_unstable();
        self.patterns_of_rule.dedup();
        let patterns = self.patterns_of_rule.drain(..).collect();
        self.cx.interner.keep_rule(bytes, KnownRule { rule: rule.clone(), patterns });
        Ok(rule)
    }

    fn rule(&mut self, m: &wire::RouteRule) -> Result<RouteRule> {
        let nowhere = wire::Provenance::default();
        let wire::Provenance { object, field, origin } = m.provenance.as_ref().unwrap_or(&nowhere);
        let timeouts = m.timeouts.unwrap_or_default();
        Ok(RouteRule {
            route: self.cx.str(&m.route),
            name: self.cx.str(&m.name),
            provenance: Provenance {
                object: self.cx.str(object),
                field: self.cx.str(field),
                origin: self.cx.str(origin),
            },
            filters: self.each("filters", MAX_LIST, &m.filters, Self::filter)?,
            backends: self.each("backends", MAX_LIST, &m.backends, Self::backend)?,
            timeouts: Timeouts {
                request: timeouts.request_ns.map(Duration::from_nanos),
                backend_request: timeouts.backend_request_ns.map(Duration::from_nanos),
            },
        })
    }

    fn backend(&mut self, m: &wire::Backend) -> Result<Backend> {
        Ok(Backend {
            weight: m.weight,
            target: self.target(m.target.as_ref())?,
            filters: self.each("filters", MAX_LIST, &m.filters, Self::filter)?,
        })
    }

    fn target(&mut self, m: Option<&wire::Target>) -> Result<Target> {
        use wire::target::Target as Wire;
        let target = m.and_then(|m| m.target.as_ref());
        match target.ok_or_else(|| self.unknown("target"))? {
            Wire::Service(m) => {
                let service = self.service(m.service.as_ref()).map_err(|e| within(e, "target"))?;
                let port = self.port("target.port", m.port)?;
                let subset = m.subset.as_deref().map(|subset| self.cx.str(subset));
                Ok(Target::Service { service, port, subset })
            }
            Wire::Invalid(message) => Ok(Target::Invalid { message: self.cx.str(message) }),
        }
    }

    fn filter(&mut self, m: &wire::Filter) -> Result<Filter> {
        use wire::filter::Filter as Wire;
        let Some(filter) = &m.filter else { return Err(self.unknown("")) };
        Ok(match filter {
            Wire::RequestHeaders(m) => Filter::RequestHeaders(self.header_edits(m)?),
            Wire::ResponseHeaders(m) => Filter::ResponseHeaders(self.header_edits(m)?),
            Wire::Rewrite(m) => Filter::Rewrite(Rewrite {
                host: m.host.as_deref().map(|host| self.cx.str(host)),
                path: self.optional("path", m.path.as_ref(), Self::rewrite)?,
            }),
            Wire::Redirect(m) => Filter::Redirect(self.redirect(m)?),
            Wire::Mirror(m) => Filter::Mirror(Mirror {
                target: self.target(m.target.as_ref())?,
                share: self.share(m.share)?,
            }),
            Wire::Cors(m) => Filter::Cors(self.cors(m)?),
            Wire::Fault(m) => Filter::Fault(self.fault(m)?),
            Wire::Respond(m) => Filter::Respond(FixedResponse {
                status: self.status("status", m.status)?,
                body: self.cx.str(&m.body),
            }),
            Wire::Fail(m) => {
                let reason = Reason::ALL.iter().find(|reason| reason.code() == m.reason);
                let reason = reason.copied().ok_or_else(|| {
                    let reason = short(&m.reason);
                    self.error("reason", format!("{reason:?} is no reason that this proxy knows"))
                })?;
                Filter::Fail { reason, message: self.cx.str(&m.message) }
            }
        })
    }

    fn header_edits(&mut self, m: &wire::HeaderEdits) -> Result<HeaderEdits> {
        let remove = self.each("remove", MAX_LIST, &m.remove, |r, name| {
            r.header_name("", name).map(|()| r.cx.str(name))
        })?;
        Ok(HeaderEdits {
            remove,
            set: self.each("set", MAX_LIST, &m.set, Self::header)?,
            add: self.each("add", MAX_LIST, &m.add, Self::header)?,
        })
    }

    fn header(&mut self, m: &wire::Header) -> Result<(Str, Str)> {
        self.header_name("name", &m.name)?;
        // A line break would be another header.
        if m.value.bytes().any(|b| (b < b' ' && b != b'\t') || b == 0x7f) {
            return Err(self.error("value", "has control characters"));
        }
        Ok((self.cx.str(&m.name), self.cx.str(&m.value)))
    }

    fn rewrite(&mut self, m: &wire::PathRewrite) -> Result<PathRewrite> {
        use wire::path_rewrite::Rewrite as Wire;
        Ok(match &m.rewrite {
            Some(Wire::Full(s)) => PathRewrite::Full(self.cx.str(s)),
            Some(Wire::Segments(s)) => PathRewrite::Segments(self.cx.str(s)),
            Some(Wire::Text(s)) => PathRewrite::Text(self.cx.str(s)),
            Some(Wire::Regex(m)) => PathRewrite::Regex {
                pattern: self.pattern("regex", &m.pattern)?,
                substitution: self.cx.str(&m.substitution),
            },
            None => return Err(self.unknown("")),
        })
    }

    fn redirect(&mut self, m: &wire::Redirect) -> Result<Redirect> {
        let status = self.status("status", m.status)?;
        if !matches!(status, 301 | 302 | 303 | 307 | 308) {
            return Err(self.error("status", format!("{status} does not redirect")));
        }
        Ok(Redirect {
            scheme: m.scheme.as_deref().map(|scheme| self.cx.str(scheme)),
            host: m.host.as_deref().map(|host| self.cx.str(host)),
            port: match m.port {
                None => RedirectPort::Derived,
                Some(port) => RedirectPort::Number(self.port("port", port)?),
            },
            path: self.optional("path", m.path.as_ref(), Self::rewrite)?,
            status,
        })
    }

    fn cors(&mut self, m: &wire::Cors) -> Result<Cors> {
        use wire::origin_match::Origin;
        let origin = |r: &mut Self, m: &wire::OriginMatch| -> Result<_> {
            Ok(match &m.origin {
                Some(Origin::Any(())) => OriginMatch::Any,
                Some(Origin::Exact(s)) => OriginMatch::Exact(r.cx.str(s)),
                Some(Origin::Wildcard(m)) => {
                    OriginMatch::Wildcard { before: r.cx.str(&m.before), after: r.cx.str(&m.after) }
                }
                Some(Origin::Prefix(s)) => OriginMatch::Prefix(r.cx.str(s)),
                Some(Origin::Regex(s)) => OriginMatch::Regex(r.pattern("regex", s)?),
                None => return Err(r.unknown("")),
            })
        };
        Ok(Cors {
            allow_origins: self.each("allow_origins", MAX_LIST, &m.allow_origins, origin)?,
            allow_methods: self.strings("allow_methods", &m.allow_methods)?,
            allow_headers: self.strings("allow_headers", &m.allow_headers)?,
            expose_headers: self.strings("expose_headers", &m.expose_headers)?,
            allow_credentials: m.allow_credentials,
            max_age: m.max_age,
            forward_unmatched_preflights: m.forward_unmatched_preflights,
        })
    }

    fn fault(&mut self, m: &wire::Fault) -> Result<Fault> {
        let delay = |r: &mut Self, m: &wire::Delay| -> Result<_> {
            Ok((r.share(m.share)?, Duration::from_nanos(m.duration_ns)))
        };
        Ok(Fault {
            delay: self.optional("delay", m.delay.as_ref(), delay)?,
            abort: self.optional("abort", m.abort.as_ref(), Self::abort)?,
            headers: self.each("headers", MAX_LIST, &m.headers, Self::header_match)?,
            source: self.source(m.source.as_ref())?,
            until: m.until,
        })
    }

    fn abort(&mut self, m: &wire::Abort) -> Result<(Share, Abort)> {
        use wire::abort::How;
        let how = match m.how {
            Some(How::Http(status)) => Abort::Http(self.status("http", status)?),
            // The codes that gRPC defines.
            Some(How::Grpc(code)) if code <= 16 => Abort::Grpc(code),
            Some(How::Grpc(code)) => {
                return Err(self.error("grpc", format!("{code} is no status code of gRPC")));
            }
            Some(How::Reset(())) => Abort::Reset,
            None => return Err(self.unknown("how")),
        };
        Ok((self.share(m.share)?, how))
    }

    fn subset(&mut self, m: &wire::Subset) -> Result<Subset> {
        let service = self.service(m.service.as_ref())?;
        if m.name.is_empty() || m.name.contains('/') {
            return Err(self.error("name", "is empty, or has a slash"));
        }
        let key = SubsetKey { service, name: self.cx.str(&m.name) };
        self.cx.named("name", &key.to_string())?;
        if !m.workloads.is_sorted_by(|a, b| a < b) {
            return Err(self.error("workloads", "are not in ascending order"));
        }
        let workloads = self
            .each("workloads", MAX_SUBSET, &m.workloads, |r, uid| Ok(WorkloadUid(r.cx.str(uid))))?;
        Ok(Subset { key, workloads: workloads.into_iter().collect() })
    }
}
