//! VirtualService, its HTTP part and the roots of the others.

use super::Element::{Any, Bool, Integer, Message as Of, Number, OneOf, Text};
use super::{Field, Message};

const NOT_HTTP: &str = "only HTTP is routed; other traffic goes to the Service as it is";
const NOT_DELEGATED: &str =
    "rules stand in one object here; what fits this rule is answered with 500";
const NO_RETRIES: &str = "nothing is tried twice yet; a request that fails, fails";

pub(super) const MESSAGES: &[Message] = &[
    Message { name: "VirtualService", fields: VIRTUAL_SERVICE },
    Message { name: "HTTPRoute", fields: HTTP_ROUTE },
    Message { name: "HTTPMatchRequest", fields: HTTP_MATCH_REQUEST },
    Message { name: "StringMatch", fields: STRING_MATCH },
    Message { name: "HTTPRouteDestination", fields: HTTP_ROUTE_DESTINATION },
    Message { name: "Destination", fields: DESTINATION },
    Message {
        name: "PortSelector",
        fields: &[Field::honoured("number", Integer, "destination_port")],
    },
    Message { name: "HTTPRedirect", fields: HTTP_REDIRECT },
    Message { name: "HTTPDirectResponse", fields: HTTP_DIRECT_RESPONSE },
    Message { name: "HTTPBody", fields: HTTP_BODY },
    Message { name: "HTTPRewrite", fields: HTTP_REWRITE },
    Message { name: "RegexRewrite", fields: REGEX_REWRITE },
    Message { name: "HTTPFaultInjection", fields: HTTP_FAULT_INJECTION },
    Message { name: "HTTPFaultInjection.Delay", fields: DELAY },
    Message { name: "HTTPFaultInjection.Abort", fields: ABORT },
    Message { name: "Percent", fields: &[Field::honoured("value", Number, "fault_delay")] },
    Message { name: "HTTPMirrorPolicy", fields: HTTP_MIRROR_POLICY },
    Message { name: "HTTPRetry", fields: HTTP_RETRY },
    Message {
        name: "Delegate",
        fields: &[
            Field::refused("name", Text, NOT_DELEGATED),
            Field::refused("namespace", Text, NOT_DELEGATED),
        ],
    },
    Message { name: "CorsPolicy", fields: CORS_POLICY },
    Message { name: "Headers", fields: HEADERS },
    Message { name: "Headers.HeaderOperations", fields: HEADER_OPERATIONS },
];

const VIRTUAL_SERVICE: &[Field] = &[
    Field::honoured("hosts", Text, "hosts").list().note(
        "Services, by their short name (in the object's namespace) or as `NAME.NAMESPACE.svc.cluster.local`; \
         wildcards are `unsupported`, what is no Service is a `dangling_reference`",
    ),
    Field::honoured("gateways", Text, "gateways")
        .list()
        .note("`mesh`, or none at all; another one is `unsupported`"),
    Field::inside("http", "HTTPRoute").list(),
    Field::refused("tls", Any, NOT_HTTP),
    Field::refused("tcp", Any, NOT_HTTP),
    Field::honoured("exportTo", Text, "export_to")
        .list()
        .note("whose requests the rules are for: `*`, `.`, `~` and namespaces"),
];

const HTTP_ROUTE: &[Field] = &[
    Field::honoured("name", Text, "rule_names"),
    Field::inside("match", "HTTPMatchRequest").list(),
    Field::inside("route", "HTTPRouteDestination").list(),
    Field::inside("redirect", "HTTPRedirect"),
    Field::inside("directResponse", "HTTPDirectResponse"),
    Field::inside("delegate", "Delegate"),
    Field::inside("rewrite", "HTTPRewrite"),
    Field::honoured("timeout", Text, "timeout"),
    Field::inside("retries", "HTTPRetry"),
    Field::inside("fault", "HTTPFaultInjection"),
    Field::honoured("mirror", Of("Destination"), "mirror"),
    Field::inside("mirrors", "HTTPMirrorPolicy").list(),
    Field::honoured("mirrorPercent", Integer, "mirror_percent").note("or `mirror_percent`"),
    Field::honoured("mirrorPercentage", Of("Percent"), "mirror_percent"),
    Field::inside("corsPolicy", "CorsPolicy"),
    Field::inside("headers", "Headers"),
];

const HTTP_MATCH_REQUEST: &[Field] = &[
    Field::honoured("name", Text, "rule_names"),
    Field::honoured("uri", Of("StringMatch"), "match_uri"),
    Field::honoured("scheme", Of("StringMatch"), "match_scheme"),
    Field::honoured("method", Of("StringMatch"), "match_method"),
    Field::honoured("authority", Of("StringMatch"), "match_authority"),
    Field::honoured("headers", Of("StringMatch"), "match_headers").map(),
    Field::honoured("port", Integer, "match_port"),
    Field::refused(
        "sourceLabels",
        Text,
        "labels of callers are not known, only identities; what fits the rest of the match is answered with 500; \
         use sourceNamespace",
    )
    .map(),
    Field::honoured("gateways", Text, "match_gateways")
        .list()
        .note("a match for other gateways than `mesh` is no match here"),
    Field::honoured("queryParams", Of("StringMatch"), "match_query_params").map(),
    Field::honoured("ignoreUriCase", Bool, "match_ignore_uri_case"),
    Field::honoured("withoutHeaders", Of("StringMatch"), "match_without_headers").map(),
    Field::honoured("sourceNamespace", Text, "match_source_namespace"),
    Field::no_effect("statPrefix", Text, "it names statistics of Envoy; metrics have their labels"),
];

const STRING_MATCH: &[Field] = &[
    Field::honoured("exact", Text, "match_uri"),
    Field::honoured("prefix", Text, "match_uri"),
    Field::honoured("regex", Text, "match_uri")
        .note(
            "the whole text has to fit; `*` alone means: there at all; a pattern that only our engine does not take \
             (`\\Q`, over 1024 bytes) is `unsupported`, what fits the rest of the match is answered with 500",
        ),
];

const HTTP_ROUTE_DESTINATION: &[Field] = &[
    Field::inside("destination", "Destination"),
    Field::honoured("weight", Integer, "weights").note("above a million: `unsupported`, 500"),
    Field::honoured("headers", Of("Headers"), "destination_headers"),
];

const DESTINATION: &[Field] = &[
    Field::honoured("host", Text, "destination_host").note("named as in `hosts`"),
    Field::honoured("subset", Text, "destination_subset"),
    Field::honoured("port", Of("PortSelector"), "destination_port")
        .note("else the only one of the Service, else the one that was called"),
];

const HTTP_REDIRECT: &[Field] = &[
    Field::honoured("uri", Text, "redirect"),
    Field::honoured("authority", Text, "redirect"),
    Field::honoured("port", Integer, "redirect_port"),
    Field::honoured(
        "derivePort",
        OneOf(&["FROM_PROTOCOL_DEFAULT", "FROM_REQUEST_PORT"]),
        "redirect_port",
    ),
    Field::honoured("scheme", Text, "redirect"),
    Field::honoured("redirectCode", Integer, "redirect_code"),
    Field::honoured("prefixRewrite", Text, "redirect_prefix"),
];

const HTTP_DIRECT_RESPONSE: &[Field] =
    &[Field::honoured("status", Integer, "direct_response"), Field::inside("body", "HTTPBody")];

const HTTP_BODY: &[Field] = &[
    Field::honoured("string", Text, "direct_response"),
    Field::honoured("bytes", Text, "direct_response")
        .note("text only: bytes that are not UTF-8 are `unsupported`"),
];

const HTTP_REWRITE: &[Field] = &[
    Field::honoured("uri", Text, "rewrite_uri"),
    Field::honoured("authority", Text, "rewrite_authority"),
    Field::inside("uriRegexRewrite", "RegexRewrite"),
];

const REGEX_REWRITE: &[Field] = &[
    Field::honoured("match", Text, "rewrite_regex"),
    Field::honoured("rewrite", Text, "rewrite_regex"),
];

const HTTP_FAULT_INJECTION: &[Field] = &[
    Field::inside("delay", "HTTPFaultInjection.Delay"),
    Field::inside("abort", "HTTPFaultInjection.Abort"),
];

const DELAY: &[Field] = &[
    Field::honoured("percent", Integer, "fault_delay"),
    Field::honoured("fixedDelay", Text, "fault_delay").note("at most an hour"),
    Field::refused("exponentialDelay", Any, "nobody is delayed; use fixedDelay"),
    Field::honoured("percentage", Of("Percent"), "fault_delay")
        .note("without it nobody is delayed"),
];

const ABORT: &[Field] = &[
    Field::honoured("httpStatus", Integer, "fault_abort"),
    Field::honoured("grpcStatus", Text, "fault_abort"),
    Field::honoured("http2Error", Text, "fault_abort")
        .note("the stream is reset, whichever error is named"),
    Field::honoured("percentage", Of("Percent"), "fault_abort")
        .note("without it nothing is aborted"),
];

const HTTP_MIRROR_POLICY: &[Field] = &[
    Field::honoured("destination", Of("Destination"), "mirrors"),
    Field::honoured("percentage", Of("Percent"), "mirrors"),
];

const HTTP_RETRY: &[Field] = &[
    Field::missed("attempts", Integer, NO_RETRIES),
    Field::missed("perTryTimeout", Text, NO_RETRIES),
    Field::missed("retryOn", Text, NO_RETRIES),
    Field::missed("retryRemoteLocalities", Bool, NO_RETRIES),
    Field::missed("retryIgnorePreviousHosts", Bool, NO_RETRIES),
    Field::missed("backoff", Text, NO_RETRIES),
];

const CORS_POLICY: &[Field] = &[
    Field::honoured("allowOrigin", Text, "cors_allow_origin").list(),
    Field::honoured("allowOrigins", Of("StringMatch"), "cors").list(),
    Field::honoured("allowMethods", Text, "cors").list(),
    Field::honoured("allowHeaders", Text, "cors").list(),
    Field::honoured("exposeHeaders", Text, "cors").list(),
    Field::honoured("maxAge", Text, "cors"),
    Field::honoured("allowCredentials", Bool, "cors"),
    Field::honoured(
        "unmatchedPreflights",
        OneOf(&["UNSPECIFIED", "FORWARD", "IGNORE"]),
        "cors_unmatched_preflights",
    ),
];

const HEADERS: &[Field] = &[
    Field::inside("request", "Headers.HeaderOperations"),
    Field::inside("response", "Headers.HeaderOperations"),
];

const HEADER_OPERATIONS: &[Field] = &[
    Field::honoured("set", Text, "headers").map().note(
        "`host` and `:authority` too; Envoy's `%VARIABLES%` are `unsupported`, such a rule answers 500",
    ),
    Field::honoured("add", Text, "headers").map(),
    Field::honoured("remove", Text, "headers").list(),
];

pub(super) const HEAD: &str = "
## VirtualService

What differs from Istio, and why:

- **A rule that cannot be honoured is not skipped**: what fits it is answered with 500 (`bad_filter` or `bad_backend`), so that no
  request takes a way that nobody wrote. Only a fault is the other way round: one that cannot be read hurts nobody.
- **Retries are not served yet**, neither those that are written nor Istio's default of two: a request that fails, fails.
- **A destination that is not there** is 500, where Envoy says 503.
- **Who may route whose requests**: in the Service's own namespace a VirtualService is for everybody, as in Istio. In another
  namespace it is for the clients of that namespace at most, and only if `exportTo` is empty or names them: nobody routes the
  requests of others to a Service of others.
- Where several VirtualServices are for one host and the same clients, the oldest decides and the others are named. Where an HTTPRoute or
  GRPCRoute is for the same port and the same clients, it decides: Gateway API wins, and the VirtualService is named.
- `sourceNamespace` and `port` choose which rules there are, as in Istio: where none is left, the Service is reached as without
  rules. Where there are rules and none fits, the answer is 404.
- The rules keep their order: the first that fits decides.
- `exportTo` takes 256 namespaces; with more, the requests of all of them are answered with an error (`limit_exceeded`).
- A mirrored request keeps its host: `-shadow` is not added.
- A fault of a VirtualService ends when it is taken away. One that ends by itself is an `HTTPFault` ([faults.md](faults.md)).
";
