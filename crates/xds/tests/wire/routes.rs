//! Our own types for waypoints, against `routes.txt` and `subset.txt`: a waypoint and its control plane may be of two
//! versions.

use std::sync::Arc;
use std::time::Duration;

use model::http::{
    Abort, Audience, Backend, Cors, Fault, FieldMatch, Filter, FixedResponse, HeaderEdits, Mirror,
    OriginMatch, PathMatch, PathRewrite, Pattern, PortProtocol, Protocol, Redirect, RedirectPort,
    Rewrite, RouteKind, RouteMatch, RouteRule, RouteSet, ServiceRoutes, Share, SourceMatch, Subset,
    SubsetKey, Target, TextMatch, Timeouts,
};
use model::{Identity, Provenance, Reason, WorkloadUid};
use prost::Message;
use xds::codec::{self, Interner};

use super::{bytes, key};

const ROUTES: &str = include_str!("routes.txt");
const SUBSET: &str = include_str!("subset.txt");

fn pattern(text: &str) -> Pattern {
    Pattern::new(text).unwrap()
}

fn field(name: &str, value: TextMatch) -> FieldMatch {
    FieldMatch { name: name.into(), value }
}

fn set_header(name: &str, value: &str) -> HeaderEdits {
    HeaderEdits { set: vec![(name.into(), value.into())], ..HeaderEdits::default() }
}

fn share(numerator: u32, denominator: u32) -> Share {
    Share { numerator, denominator }
}

fn cors() -> Cors {
    Cors {
        allow_origins: vec![
            OriginMatch::Any,
            OriginMatch::Exact("https://a.example".into()),
            OriginMatch::Wildcard { before: "https://".into(), after: ".b.example".into() },
            OriginMatch::Prefix("http://".into()),
            OriginMatch::Regex(pattern("https?://c")),
        ],
        allow_methods: vec!["GET".into()],
        allow_headers: vec!["x-d".into()],
        expose_headers: vec!["x-e".into()],
        allow_credentials: true,
        max_age: Some(600),
        forward_unmatched_preflights: true,
    }
}

fn new_rule() -> RouteRule {
    let edits = HeaderEdits {
        remove: vec!["x-a".into()],
        add: vec![("x-c".into(), "2".into())],
        ..set_header("x-b", "1")
    };
    let no_server = HeaderEdits { remove: vec!["server".into()], ..HeaderEdits::default() };
    let fault = Fault {
        delay: Some((share(1, 10), Duration::from_secs(2))),
        abort: Some((share(1, 100), Abort::Grpc(14))),
        headers: vec![field("x-f", TextMatch::Present)],
        source: SourceMatch { namespaces: vec!["test".into()], identities: Vec::new() },
        until: Some(1_800_000_000),
    };
    let path = Some(PathRewrite::Segments("/v2".into()));
    let nowhere = Target::Invalid { message: "no such Service".into() };
    let target = Target::Service { service: key("web-v2"), port: 8080, subset: Some("v2".into()) };
    RouteRule {
        route: "HTTPRoute/shop/web".into(),
        name: "rules[0]".into(),
        provenance: Provenance {
            object: "HTTPRoute/shop/web".into(),
            field: "spec.rules[0]".into(),
            origin: "web.yaml:7".into(),
        },
        filters: vec![
            Filter::RequestHeaders(edits),
            Filter::ResponseHeaders(no_server),
            Filter::Rewrite(Rewrite { host: Some("web.example".into()), path }),
            Filter::Mirror(Mirror { target: nowhere, share: share(1, 4) }),
            Filter::Cors(cors()),
            Filter::Fault(fault),
        ],
        backends: vec![Backend {
            weight: 9,
            target,
            filters: vec![Filter::ResponseHeaders(set_header("x-g", "3"))],
        }],
        timeouts: Timeouts {
            request: Some(Duration::from_secs(10)),
            backend_request: Some(Duration::from_millis(1500)),
        },
    }
}

fn old_rule() -> RouteRule {
    let rewrite = |path| Filter::Rewrite(Rewrite { host: None, path: Some(path) });
    let abort =
        |abort| Filter::Fault(Fault { abort: Some((Share::ALL, abort)), ..Fault::default() });
    let substitution = r"/\1".into();
    RouteRule {
        route: "VirtualService/shop/web".into(),
        name: "old".into(),
        provenance: Provenance::default(),
        filters: vec![
            rewrite(PathRewrite::Full("/".into())),
            rewrite(PathRewrite::Text("/x".into())),
            rewrite(PathRewrite::Regex { pattern: pattern("/(a+)"), substitution }),
            Filter::Redirect(Redirect {
                scheme: Some("https".into()),
                host: Some("h.example".into()),
                port: RedirectPort::Number(8443),
                path: Some(PathRewrite::Full("/new".into())),
                status: 308,
            }),
            abort(Abort::Http(503)),
            abort(Abort::Reset),
            Filter::Respond(FixedResponse { status: 418, body: "no".into() }),
            Filter::Fail { reason: Reason::BadFilter, message: "no such filter".into() },
        ],
        backends: Vec::new(),
        timeouts: Timeouts::default(),
    }
}

fn matches() -> Vec<RouteMatch> {
    let path = |rule, path| RouteMatch { rule, path, ..RouteMatch::default() };
    let all = RouteMatch {
        method: Some(TextMatch::Exact("GET".into())),
        scheme: Some(TextMatch::ExactIgnoringCase("http".into())),
        authority: Some(TextMatch::PrefixIgnoringCase("web.".into())),
        headers: vec![field("x-h", TextMatch::Prefix("p".into()))],
        without_headers: vec![field("x-i", TextMatch::Present)],
        query: vec![field("q", TextMatch::Regex(pattern("[0-9]+")))],
        source: SourceMatch {
            namespaces: vec!["shop".into()],
            identities: vec![Identity::new("td.example", "shop", "front")],
        },
        ..path(0, PathMatch::Exact("/a".into()))
    };
    vec![
        all,
        path(0, PathMatch::Segments("/a".into())),
        path(1, PathMatch::Prefix("/b".into())),
        path(1, PathMatch::ExactIgnoringCase("/C".into())),
        path(1, PathMatch::PrefixIgnoringCase("/D".into())),
        path(1, PathMatch::Regex(pattern("/e+"))),
        path(1, PathMatch::GrpcMethod("Get".into())),
        path(0, PathMatch::Any),
    ]
}

/// What `routes.txt` says.
fn routes() -> ServiceRoutes {
    let set = |audience, ports: &[u16], kind, rules: Vec<RouteRule>, matches: Vec<RouteMatch>| {
        let rules = rules.into_iter().map(Arc::new).collect();
        Arc::new(RouteSet::new(audience, ports.into(), kind, rules, matches.into()).unwrap())
    };
    let port = |service_port, protocol| PortProtocol { service_port, protocol };
    let (rules, client) = (vec![new_rule(), old_rule()], Audience::Namespace("client".into()));
    ServiceRoutes {
        service: key("web.shop.svc"),
        ports: [
            port(80, Protocol::Http),
            port(81, Protocol::Http2),
            port(82, Protocol::Grpc),
            port(83, Protocol::Opaque),
            port(84, Protocol::Undeclared),
        ]
        .into(),
        sets: [
            set(Audience::Everybody, &[80, 8080], RouteKind::Http, rules, matches()),
            set(client, &[], RouteKind::Grpc, Vec::new(), Vec::new()),
        ]
        .into(),
    }
}

#[test]
fn routes_and_subsets() {
    let (wire, interner) = (bytes(ROUTES), &mut Interner::default());
    assert_eq!(codec::decode_routes("shop/web.shop.svc", &wire, interner), Ok(routes()));
    assert_eq!(codec::encode_routes(&routes()).encode_to_vec(), wire);

    let wire = bytes(SUBSET);
    let workloads = ["east//Pod/shop/web-1", "east//Pod/shop/web-2"];
    let subset = Subset {
        key: SubsetKey { service: key("web.shop.svc"), name: "v2".into() },
        workloads: workloads.into_iter().map(|uid| WorkloadUid(uid.into())).collect(),
    };
    assert_eq!(codec::decode_subset("shop/web.shop.svc/v2", &wire, interner), Ok(subset.clone()));
    assert_eq!(codec::encode_subset(&subset).encode_to_vec(), wire);
}

/// A byte of the fixture less, or another one: an error or another value, never a panic and never the same value.
#[test]
fn damaged_routes_are_not_the_same_routes() {
    let (wire, interner) = (bytes(ROUTES), &mut Interner::default());
    let (name, whole) = ("shop/web.shop.svc", Ok(routes()));
    for end in 0..wire.len() {
        assert!(codec::decode_routes(name, &wire[..end], interner) != whole, "{end}");
    }
    for at in 0..wire.len() {
        let mut damaged = wire.clone();
        damaged[at] ^= 1;
        assert!(codec::decode_routes(name, &damaged, interner) != whole, "{at}");
    }
}
