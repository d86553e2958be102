//! HTTP routes of a Service, as a waypoint knows them: Gateway API's HTTPRoute and GRPCRoute and Istio's
//! VirtualService in one shape.
//!
//! A [`ServiceRoutes`] holds route sets; a set is for some ports of the Service and for everybody or for the clients of one
//! namespace. Its matches are flat and in order: the first that fits decides, whatever API they came from. How Gateway
//! API ranks matches and that a VirtualService keeps its own order is decided once, by `compile`, not per request.
//!
//! Invariants: a reference that cannot be resolved is here as [`Target::Invalid`] or [`Filter::Fail`], which
//! answer with an error: it is never left out; patterns are compiled and bounded before they get here.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::{Identity, Provenance, Reason, ServiceKey, Str, WorkloadUid};

mod index;
pub mod limits;
mod pattern;

pub use index::PathIndex;
pub use pattern::{Pattern, PatternError};

/// A header that says who the client is, or something else that only the mesh may say: what a peer sends under this name is
/// dropped, and no route may write it. In lower case.
pub fn is_for_mesh_alone(header: &str) -> bool {
    header == "x-forwarded-client-cert" || header.starts_with("x-ambit-")
}

/// What a waypoint knows about HTTP to one Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceRoutes {
    pub service: ServiceKey,
    /// What the Service's ports speak, as declared.
    pub ports: Arc<[PortProtocol]>,
    /// At most one set fits a client and a port, once [`Audience::Namespace`] is asked before
    /// [`Audience::Everybody`].
    pub sets: Arc<[Arc<RouteSet>]>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortProtocol {
    pub service_port: u16,
    pub protocol: Protocol,
}

/// What a port speaks, from `appProtocol`, else from the port's name, as in Istio.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// Not declared: looked at, unless the server speaks first.
    #[default]
    Undeclared,
    /// HTTP/1.1, or HTTP/2 where the client begins with its preface.
    Http,
    /// HTTP/2 without TLS.
    Http2,
    /// gRPC, so HTTP/2.
    Grpc,
    /// Declared as something else (`tcp`, `tls`, `https`, `mongo`, ...): passed on untouched.
    Opaque,
}

/// The routes of one kind for some ports of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteSet {
    pub audience: Audience,
    /// The Service's own ports, ascending. Empty: all of them, as where a route that cannot be read is closed.
    pub ports: Arc<[u16]>,
    pub kind: RouteKind,
    pub rules: Arc<[Arc<RouteRule>]>,
    /// The first that fits decides. Each refers to a rule.
    pub matches: Arc<[RouteMatch]>,
    /// Which matches a path may fit.
    pub index: PathIndex,
}

impl RouteSet {
    /// Links a set. `Err`: a match refers to no rule.
    pub fn new(
        audience: Audience,
        ports: Arc<[u16]>,
        kind: RouteKind,
        rules: Arc<[Arc<RouteRule>]>,
        matches: Arc<[RouteMatch]>,
    ) -> Result<Self, String> {
        if let Some(m) = matches.iter().find(|m| m.rule as usize >= rules.len()) {
            return Err(format!("a match refers to rule {} of {}", m.rule, rules.len()));
        }
        let index = PathIndex::new(matches.iter().map(|m| &m.path));
        Ok(Self { audience, ports, kind, rules, matches, index })
    }

    /// Whether it is for this port of the Service.
    pub fn is_for_port(&self, port: u16) -> bool {
        self.ports.is_empty() || self.ports.contains(&port)
    }
}

/// Whose requests a set is for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Audience {
    /// Producer routes: the route stands in the Service's namespace.
    Everybody,
    /// Consumer routes: for clients in the route's namespace, in place of the producer's.
    Namespace(Str),
}

/// What kind of route a set is made of; it says how the proxy words its own answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RouteKind {
    /// No match: 404. A bad backend: 500.
    Http,
    /// No match: UNIMPLEMENTED. A bad backend: UNAVAILABLE. Backends speak HTTP/2.
    Grpc,
}

/// One match of a rule. Everything that is set must fit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RouteMatch {
    /// Index of the rule in the set.
    pub rule: u32,
    pub path: PathMatch,
    /// Gateway API knows exact methods only.
    pub method: Option<TextMatch>,
    /// `http` or `https`, as the client said.
    pub scheme: Option<TextMatch>,
    pub authority: Option<TextMatch>,
    /// Names in lower case, none twice; `host` means the authority, of HTTP/2 too.
    pub headers: Vec<FieldMatch>,
    /// Headers that must not fit.
    pub without_headers: Vec<FieldMatch>,
    /// The first value of a parameter that is there more than once.
    pub query: Vec<FieldMatch>,
    pub source: SourceMatch,
}

/// A header or a query parameter by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldMatch {
    pub name: Str,
    pub value: TextMatch,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TextMatch {
    Exact(Str),
    /// Without regard to ASCII case.
    ExactIgnoringCase(Str),
    Prefix(Str),
    PrefixIgnoringCase(Str),
    Regex(Pattern),
    /// There at all, whatever the value.
    Present,
}

/// Matches the path without its query.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum PathMatch {
    #[default]
    Any,
    Exact(Str),
    /// Gateway API's `PathPrefix`: whole segments. Without a slash at the end; `/` is [`Self::Any`].
    Segments(Str),
    /// Istio's `prefix`: text.
    Prefix(Str),
    ExactIgnoringCase(Str),
    PrefixIgnoringCase(Str),
    /// The whole path.
    Regex(Pattern),
    /// gRPC: any service's method of this name.
    GrpcMethod(Str),
}

/// Who asks, from the verified identity.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceMatch {
    /// Any of them; empty: anybody.
    pub namespaces: Vec<Str>,
    /// Any of them; empty: anybody.
    pub identities: Vec<Identity>,
}

impl SourceMatch {
    pub fn is_anybody(&self) -> bool {
        self.namespaces.is_empty() && self.identities.is_empty()
    }
}

/// What happens to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteRule {
    /// `HTTPRoute/namespace/name` and so on.
    pub route: Str,
    /// The rule's own name, else its number, as in `rules[0]`.
    pub name: Str,
    pub provenance: Provenance,
    /// In the order in which they apply.
    pub filters: Vec<Filter>,
    /// Empty: the answer is 500, unless a filter answers.
    pub backends: Vec<Backend>,
    pub timeouts: Timeouts,
}

/// `None`: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timeouts {
    /// Of the whole request, retries and all.
    pub request: Option<Duration>,
    /// Of one attempt at a backend.
    pub backend_request: Option<Duration>,
}

/// A destination and its share: weight / sum of weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    pub weight: u32,
    pub target: Target,
    /// After the rule's own.
    pub filters: Vec<Filter>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Endpoints of a Service, or of a [`Subset`] of it.
    Service { service: ServiceKey, port: u16, subset: Option<Str> },
    /// What the route names is not there, or is nothing that can be sent to: 500.
    Invalid { message: Str },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Filter {
    RequestHeaders(HeaderEdits),
    ResponseHeaders(HeaderEdits),
    Rewrite(Rewrite),
    /// Answers the request.
    Redirect(Redirect),
    Mirror(Mirror),
    Cors(Cors),
    Fault(Fault),
    /// Answers the request: Istio's `directResponse`.
    Respond(FixedResponse),
    /// A filter that nobody can apply: answers 500, so that it is never silently skipped.
    Fail {
        reason: Reason,
        message: Str,
    },
}

/// One action per header name. Applied as remove, set, add.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderEdits {
    /// Names in lower case.
    pub remove: Vec<Str>,
    pub set: Vec<(Str, Str)>,
    pub add: Vec<(Str, Str)>,
}

impl HeaderEdits {
    pub fn is_empty(&self) -> bool {
        self.remove.is_empty() && self.set.is_empty() && self.add.is_empty()
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rewrite {
    /// The new Host or `:authority`.
    pub host: Option<Str>,
    pub path: Option<PathRewrite>,
}

/// How a path changes; the query stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathRewrite {
    /// Gateway API's `ReplaceFullPath`.
    Full(Str),
    /// Gateway API's `ReplacePrefixMatch`: what [`PathMatch::Segments`] matched gives way, slashes as its table says.
    Segments(Str),
    /// Istio's `rewrite.uri`: the text that an exact match or a prefix matched gives way.
    Text(Str),
    /// Istio's `uriRegexRewrite`: the first place that fits. `\1` names a group.
    Regex { pattern: Pattern, substitution: Str },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redirect {
    pub scheme: Option<Str>,
    /// `None`: the request's, without its port.
    pub host: Option<Str>,
    pub port: RedirectPort,
    pub path: Option<PathRewrite>,
    /// 301, 302, 303, 307 or 308.
    pub status: u16,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RedirectPort {
    /// Gateway API: the scheme's well-known port when a scheme is set, else the Service port that was called.
    #[default]
    Derived,
    Number(u16),
}

/// A copy of the request; its answer is ignored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mirror {
    pub target: Target,
    pub share: Share,
}

/// Some of all requests: numerator / denominator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    pub numerator: u32,
    /// At least 1.
    pub denominator: u32,
}

impl Share {
    pub const ALL: Self = Self { numerator: 1, denominator: 1 };

    /// Whether this draw, uniform over `u64`, falls into the share.
    pub fn takes(self, draw: u64) -> bool {
        let scaled = (u128::from(draw) * u128::from(self.denominator.max(1))) >> 64;
        scaled < u128::from(self.numerator)
    }
}

/// Cross-origin rules, as Gateway API's HTTPCORSFilter words them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cors {
    pub allow_origins: Vec<OriginMatch>,
    pub allow_methods: Vec<Str>,
    pub allow_headers: Vec<Str>,
    pub expose_headers: Vec<Str>,
    pub allow_credentials: bool,
    /// Seconds.
    pub max_age: Option<u32>,
    /// Istio's `unmatchedPreflights: FORWARD`; else the proxy answers.
    pub forward_unmatched_preflights: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OriginMatch {
    /// `*`
    Any,
    Exact(Str),
    /// `https://*.example.com`: what stands before and after the star, which takes at least one character.
    Wildcard {
        before: Str,
        after: Str,
    },
    Prefix(Str),
    Regex(Pattern),
}

/// A fault that somebody asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fault {
    pub delay: Option<(Share, Duration)>,
    pub abort: Option<(Share, Abort)>,
    /// Only requests with all of these headers.
    pub headers: Vec<FieldMatch>,
    /// Only requests of these callers.
    pub source: SourceMatch,
    /// Seconds since 1970 at which the fault ends by itself. `None`: when it is taken away.
    pub until: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Abort {
    /// An HTTP status.
    Http(u16),
    /// A gRPC status code.
    Grpc(u32),
    /// The connection or the stream is reset.
    Reset,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FixedResponse {
    pub status: u16,
    pub body: Str,
}

/// Endpoints of a Service that belong to a named part of it: a DestinationRule's subset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subset {
    pub key: SubsetKey,
    pub workloads: BTreeSet<WorkloadUid>,
}

/// `namespace/hostname/subset`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SubsetKey {
    pub service: ServiceKey,
    pub name: Str,
}

impl fmt::Display for SubsetKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.service, self.name)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service { service, port, subset: None } => write!(f, "{service}:{port}"),
            Self::Service { service, port, subset: Some(subset) } => {
                write!(f, "{service}:{port} subset {subset}")
            }
            Self::Invalid { message } => write!(f, "nothing: {message}"),
        }
    }
}

impl TextMatch {
    /// Whether a value fits. `None`: it is not there.
    pub fn matches(&self, value: Option<&str>) -> bool {
        let Some(value) = value else { return false };
        let starts = |prefix: &str| value.get(..prefix.len());
        match self {
            Self::Exact(text) => value == &**text,
            Self::ExactIgnoringCase(text) => value.eq_ignore_ascii_case(text),
            Self::Prefix(text) => value.starts_with(&**text),
            Self::PrefixIgnoringCase(text) => {
                starts(text).is_some_and(|start| start.eq_ignore_ascii_case(text))
            }
            Self::Regex(pattern) => pattern.matches(value),
            Self::Present => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_take_their_part() {
        let check = |numerator, denominator, draw, takes| {
            assert_eq!(
                Share { numerator, denominator }.takes(draw),
                takes,
                "{numerator}/{denominator} {draw}"
            );
        };
        check(0, 100, 0, false);
        check(100, 100, u64::MAX, true);
        check(50, 100, u64::MAX / 2 - 1, true);
        check(50, 100, u64::MAX / 2 + 1, false);
        check(1, 1000, u64::MAX / 1001, true);
        check(1, 1000, u64::MAX / 999, false);
        check(1, 0, 0, true);
    }

    #[test]
    fn texts_match() {
        let check = |m: TextMatch, value: Option<&str>, fits| {
            assert_eq!(m.matches(value), fits, "{m:?} {value:?}");
        };
        check(TextMatch::Exact("a".into()), Some("a"), true);
        check(TextMatch::Exact("a".into()), Some("A"), false);
        check(TextMatch::ExactIgnoringCase("a".into()), Some("A"), true);
        check(TextMatch::Prefix("a".into()), Some("ab"), true);
        check(TextMatch::PrefixIgnoringCase("Aé".into()), Some("aéb"), true);
        check(TextMatch::PrefixIgnoringCase("ae".into()), Some("aé"), false);
        check(TextMatch::Present, Some(""), true);
        check(TextMatch::Present, None, false);
        check(TextMatch::Exact("".into()), None, false);
        check(TextMatch::Regex(Pattern::new("a+").unwrap()), Some("aa"), true);
        check(TextMatch::Regex(Pattern::new("a+").unwrap()), Some("aab"), false);
    }
}
