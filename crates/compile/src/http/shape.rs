//! HTTPRoute and GRPCRoute in one shape, borrowed from the objects.
//!
//! The crate `gateway-api` has a type of its own for each place at which the same thing may stand: a filter of a rule, of a
//! backend, in either kind of route. From here on there is one of each. Invariant: nothing is judged and nothing is left out here.

use crate::gateway_api::{GrpcRoute, HttpRoute, grpcroutes, httproutes};

#[derive(Debug)]
pub(super) struct Route<'a> {
    pub parents: Vec<ParentRef<'a>>,
    pub hostnames: bool,
    pub default_gateways: bool,
    pub rules: Vec<Rule<'a>>,
}

/// As it is written: what is left out has Gateway API's default, which is no Service.
#[derive(Clone, Copy, Debug)]
pub(super) struct ParentRef<'a> {
    pub group: Option<&'a str>,
    pub kind: Option<&'a str>,
    pub namespace: Option<&'a str>,
    pub name: &'a str,
    pub section_name: Option<&'a str>,
    pub port: Option<i32>,
}

#[derive(Debug)]
pub(super) struct Rule<'a> {
    pub name: Option<&'a str>,
    pub matches: Matches<'a>,
    pub filters: Vec<Filter<'a>>,
    pub backends: Vec<BackendRef<'a>>,
    pub timeouts: Option<&'a httproutes::HttpRouteRulesTimeouts>,
    pub retry: bool,
    pub session_persistence: bool,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Matches<'a> {
    Http(&'a [httproutes::HttpRouteRulesMatches]),
    Grpc(&'a [grpcroutes::GrpcRouteRulesMatches]),
}

impl Matches<'_> {
    pub(super) fn len(self) -> usize {
        match self {
            Self::Http(all) => all.len(),
            Self::Grpc(all) => all.len(),
        }
    }
}

/// Something that requests can be sent to.
#[derive(Clone, Copy, Debug)]
pub(super) struct ObjectRef<'a> {
    pub group: &'a str,
    pub kind: &'a str,
    pub namespace: Option<&'a str>,
    pub name: &'a str,
    pub port: Option<i32>,
}

#[derive(Debug)]
pub(super) struct BackendRef<'a> {
    pub to: ObjectRef<'a>,
    pub weight: Option<i32>,
    pub filters: Vec<Filter<'a>>,
}

#[derive(Debug)]
pub(super) enum Filter<'a> {
    RequestHeaders(Edits<'a>),
    ResponseHeaders(Edits<'a>),
    Mirror(Mirror<'a>),
    Redirect(Redirect<'a>),
    Rewrite {
        hostname: Option<&'a str>,
        path: Option<PathModifier<'a>>,
    },
    Cors(Cors<'a>),
    Extension(ExtensionRef<'a>),
    ExternalAuth,
    /// Its type and its settings do not go together; which says what is wrong.
    Malformed(&'static str),
}

#[derive(Debug)]
pub(super) struct Edits<'a> {
    pub set: Vec<(&'a str, &'a str)>,
    pub add: Vec<(&'a str, &'a str)>,
    pub remove: &'a [String],
}

#[derive(Debug)]
pub(super) struct Mirror<'a> {
    pub to: ObjectRef<'a>,
    pub percent: Option<i32>,
    /// Numerator and denominator.
    pub fraction: Option<(i32, Option<i32>)>,
}

#[derive(Debug)]
pub(super) struct Redirect<'a> {
    pub scheme: Option<&'static str>,
    pub hostname: Option<&'a str>,
    pub port: Option<i32>,
    pub path: Option<PathModifier<'a>>,
    pub status: Option<i64>,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum PathModifier<'a> {
    Full(&'a str),
    Prefix(&'a str),
    /// The type is there, its value is not.
    Missing,
}

#[derive(Debug)]
pub(super) struct Cors<'a> {
    pub allow_origins: &'a [String],
    pub allow_methods: &'a [String],
    pub allow_headers: &'a [String],
    pub expose_headers: &'a [String],
    pub allow_credentials: bool,
    pub max_age: Option<i32>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct ExtensionRef<'a> {
    pub group: &'a str,
    pub kind: &'a str,
    pub name: &'a str,
}

macro_rules! parent_ref {
    ($p:expr) => {
        ParentRef {
            group: $p.group.as_deref(),
            kind: $p.kind.as_deref(),
            namespace: $p.namespace.as_deref(),
            name: &$p.name,
            section_name: $p.section_name.as_deref(),
            port: $p.port,
        }
    };
}

macro_rules! object_ref {
    ($r:expr) => {
        ObjectRef {
            group: $r.group.as_deref().unwrap_or(""),
            kind: $r.kind.as_deref().unwrap_or("Service"),
            namespace: $r.namespace.as_deref(),
            name: &$r.name,
            port: $r.port,
        }
    };
}

macro_rules! edits {
    ($e:expr) => {
        Edits {
            set: $e.set.iter().flatten().map(|h| (h.name.as_str(), h.value.as_str())).collect(),
            add: $e.add.iter().flatten().map(|h| (h.name.as_str(), h.value.as_str())).collect(),
            remove: $e.remove.as_deref().unwrap_or_default(),
        }
    };
}

macro_rules! mirror {
    ($m:expr) => {
        Mirror {
            to: object_ref!($m.backend_ref),
            percent: $m.percent,
            fraction: $m.fraction.as_ref().map(|f| (f.numerator, f.denominator)),
        }
    };
}

macro_rules! extension {
    ($e:expr) => {
        ExtensionRef { group: &$e.group, kind: &$e.kind, name: &$e.name }
    };
}

macro_rules! path_modifier {
    ($p:expr, $kind:ident) => {{
        let value = match $p.r#type {
            $kind::ReplaceFullPath => $p.replace_full_path.as_deref().map(PathModifier::Full),
            $kind::ReplacePrefixMatch => {
                $p.replace_prefix_match.as_deref().map(PathModifier::Prefix)
            }
        };
        value.unwrap_or(PathModifier::Missing)
    }};
}

const LACKS: &str = "lacks the settings of its type";
const SEVERAL: &str = "has the settings of another type, too";

impl<'a> Route<'a> {
    pub(super) fn http(route: &'a HttpRoute) -> Self {
        let spec = &route.spec;
        let rules = match &spec.rules {
            Some(rules) => rules.iter().map(http_rule).collect(),
            // Gateway API's default: one rule for everything.
            None => vec![Rule {
                name: None,
                matches: Matches::Http(&[]),
                filters: Vec::new(),
                backends: Vec::new(),
                timeouts: None,
                retry: false,
                session_persistence: false,
            }],
        };
        Self {
            parents: spec.parent_refs.iter().flatten().map(|p| parent_ref!(p)).collect(),
            hostnames: spec.hostnames.as_ref().is_some_and(|h| !h.is_empty()),
            default_gateways: spec.use_default_gateways.is_some(),
            rules,
        }
    }

    pub(super) fn grpc(route: &'a GrpcRoute) -> Self {
        let spec = &route.spec;
        Self {
            parents: spec.parent_refs.iter().flatten().map(|p| parent_ref!(p)).collect(),
            hostnames: spec.hostnames.as_ref().is_some_and(|h| !h.is_empty()),
            default_gateways: spec.use_default_gateways.is_some(),
            rules: spec.rules.iter().flatten().map(grpc_rule).collect(),
        }
    }
}

fn http_rule(rule: &httproutes::HttpRouteRules) -> Rule<'_> {
    Rule {
        name: rule.name.as_deref(),
        matches: Matches::Http(rule.matches.as_deref().unwrap_or_default()),
        filters: rule.filters.iter().flatten().map(http_filter).collect(),
        backends: rule.backend_refs.iter().flatten().map(http_backend).collect(),
        timeouts: rule.timeouts.as_ref(),
        retry: rule.retry.is_some(),
        session_persistence: rule.session_persistence.is_some(),
    }
}

fn http_backend(backend: &httproutes::HttpRouteRulesBackendRefs) -> BackendRef<'_> {
    BackendRef {
        to: object_ref!(backend),
        weight: backend.weight,
        filters: backend.filters.iter().flatten().map(http_backend_filter).collect(),
    }
}

fn grpc_rule(rule: &grpcroutes::GrpcRouteRules) -> Rule<'_> {
    Rule {
        name: rule.name.as_deref(),
        matches: Matches::Grpc(rule.matches.as_deref().unwrap_or_default()),
        filters: rule.filters.iter().flatten().map(grpc_filter).collect(),
        backends: rule.backend_refs.iter().flatten().map(grpc_backend).collect(),
        timeouts: None,
        retry: false,
        session_persistence: rule.session_persistence.is_some(),
    }
}

fn grpc_backend(backend: &grpcroutes::GrpcRouteRulesBackendRefs) -> BackendRef<'_> {
    BackendRef {
        to: object_ref!(backend),
        weight: backend.weight,
        filters: backend.filters.iter().flatten().map(grpc_backend_filter).collect(),
    }
}

macro_rules! http_filter {
    ($name:ident, $filter:ident, $kind:ident, $rewrite:ident, $redirect:ident, $scheme:ident) => {
        fn $name(f: &httproutes::$filter) -> Filter<'_> {
            use httproutes::{
                $kind as Kind, $redirect as RedirectPath, $rewrite as RewritePath,
                $scheme as Scheme,
            };
            let settings = [
                f.request_header_modifier.is_some(),
                f.response_header_modifier.is_some(),
                f.request_mirror.is_some(),
                f.request_redirect.is_some(),
                f.url_rewrite.is_some(),
                f.cors.is_some(),
                f.extension_ref.is_some(),
                f.external_auth.is_some(),
            ];
            if settings.into_iter().filter(|given| *given).count() > 1 {
                return Filter::Malformed(SEVERAL);
            }
            let filter = match f.r#type {
                Kind::RequestHeaderModifier => {
                    f.request_header_modifier.as_ref().map(|e| Filter::RequestHeaders(edits!(e)))
                }
                Kind::ResponseHeaderModifier => {
                    f.response_header_modifier.as_ref().map(|e| Filter::ResponseHeaders(edits!(e)))
                }
                Kind::RequestMirror => {
                    f.request_mirror.as_ref().map(|m| Filter::Mirror(mirror!(m)))
                }
                Kind::RequestRedirect => f.request_redirect.as_ref().map(|r| {
                    Filter::Redirect(Redirect {
                        scheme: r.scheme.as_ref().map(|s| match s {
                            Scheme::Http => "http",
                            Scheme::Https => "https",
                        }),
                        hostname: r.hostname.as_deref(),
                        port: r.port,
                        path: r.path.as_ref().map(|p| path_modifier!(p, RedirectPath)),
                        status: r.status_code,
                    })
                }),
                Kind::UrlRewrite => f.url_rewrite.as_ref().map(|r| Filter::Rewrite {
                    hostname: r.hostname.as_deref(),
                    path: r.path.as_ref().map(|p| path_modifier!(p, RewritePath)),
                }),
                Kind::Cors => f.cors.as_ref().map(|c| {
                    Filter::Cors(Cors {
                        allow_origins: c.allow_origins.as_deref().unwrap_or_default(),
                        allow_methods: c.allow_methods.as_deref().unwrap_or_default(),
                        allow_headers: c.allow_headers.as_deref().unwrap_or_default(),
                        expose_headers: c.expose_headers.as_deref().unwrap_or_default(),
                        allow_credentials: c.allow_credentials.unwrap_or_default(),
                        max_age: c.max_age,
                    })
                }),
                Kind::ExtensionRef => {
                    f.extension_ref.as_ref().map(|e| Filter::Extension(extension!(e)))
                }
                Kind::ExternalAuth => Some(Filter::ExternalAuth),
            };
            filter.unwrap_or(Filter::Malformed(LACKS))
        }
    };
}
http_filter!(
    http_filter,
    HttpRouteRulesFilters,
    HttpRouteRulesFiltersType,
    HttpRouteRulesFiltersUrlRewritePathType,
    HttpRouteRulesFiltersRequestRedirectPathType,
    HttpRouteRulesFiltersRequestRedirectScheme
);
http_filter!(
    http_backend_filter,
    HttpRouteRulesBackendRefsFilters,
    HttpRouteRulesBackendRefsFiltersType,
    HttpRouteRulesBackendRefsFiltersUrlRewritePathType,
    HttpRouteRulesBackendRefsFiltersRequestRedirectPathType,
    HttpRouteRulesBackendRefsFiltersRequestRedirectScheme
);

macro_rules! grpc_filter {
    ($name:ident, $filter:ident, $kind:ident) => {
        fn $name(f: &grpcroutes::$filter) -> Filter<'_> {
            use grpcroutes::$kind as Kind;
            let settings = [
                f.request_header_modifier.is_some(),
                f.response_header_modifier.is_some(),
                f.request_mirror.is_some(),
                f.extension_ref.is_some(),
            ];
            if settings.into_iter().filter(|given| *given).count() > 1 {
                return Filter::Malformed(SEVERAL);
            }
            let filter = match f.r#type {
                Kind::RequestHeaderModifier => {
                    f.request_header_modifier.as_ref().map(|e| Filter::RequestHeaders(edits!(e)))
                }
                Kind::ResponseHeaderModifier => {
                    f.response_header_modifier.as_ref().map(|e| Filter::ResponseHeaders(edits!(e)))
                }
                Kind::RequestMirror => {
                    f.request_mirror.as_ref().map(|m| Filter::Mirror(mirror!(m)))
                }
                Kind::ExtensionRef => {
                    f.extension_ref.as_ref().map(|e| Filter::Extension(extension!(e)))
                }
            };
            filter.unwrap_or(Filter::Malformed(LACKS))
        }
    };
}
grpc_filter!(grpc_filter, GrpcRouteRulesFilters, GrpcRouteRulesFiltersType);
grpc_filter!(
    grpc_backend_filter,
    GrpcRouteRulesBackendRefsFilters,
    GrpcRouteRulesBackendRefsFiltersType
);
