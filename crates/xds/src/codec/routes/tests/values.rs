//! Every value that the wire can carry.

use std::sync::Arc;
use std::time::Duration;

use model::http::*;
use model::*;
use proptest::collection::{btree_map, btree_set, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

fn word() -> impl Strategy<Value = Str> {
    "[a-z][a-z0-9-]{0,6}".prop_map(Into::into)
}

fn any_text() -> impl Strategy<Value = Str> {
    ".{0,6}".prop_map(Into::into)
}

fn pattern() -> impl Strategy<Value = Pattern> {
    select(vec!["", "a+", ".*", "/v([0-9]+)(/.*)?", "(?i)x|y"])
        .prop_map(|text| Pattern::new(text).expect("a pattern"))
}

fn service() -> impl Strategy<Value = ServiceKey> {
    (word(), word()).prop_map(|(namespace, hostname)| ServiceKey { namespace, hostname })
}

fn text() -> impl Strategy<Value = TextMatch> {
    prop_oneof![
        any_text().prop_map(TextMatch::Exact),
        any_text().prop_map(TextMatch::ExactIgnoringCase),
        any_text().prop_map(TextMatch::Prefix),
        any_text().prop_map(TextMatch::PrefixIgnoringCase),
        pattern().prop_map(TextMatch::Regex),
        Just(TextMatch::Present),
    ]
}

fn path() -> impl Strategy<Value = PathMatch> {
    prop_oneof![
        Just(PathMatch::Any),
        any_text().prop_map(PathMatch::Exact),
        "(/[a-z]{1,3}){1,3}".prop_map(|s| PathMatch::Segments(s.into())),
        any_text().prop_map(PathMatch::Prefix),
        any_text().prop_map(PathMatch::ExactIgnoringCase),
        any_text().prop_map(PathMatch::PrefixIgnoringCase),
        pattern().prop_map(PathMatch::Regex),
        any_text().prop_map(PathMatch::GrpcMethod),
    ]
}

fn headers() -> impl Strategy<Value = Vec<FieldMatch>> {
    vec((word(), text()).prop_map(|(name, value)| FieldMatch { name, value }), 0..3)
}

fn source() -> impl Strategy<Value = SourceMatch> {
    let identity = (word(), word(), word()).prop_map(|(td, ns, sa)| Identity::new(td, ns, sa));
    (vec(any_text(), 0..3), vec(identity, 0..3))
        .prop_map(|(namespaces, identities)| SourceMatch { namespaces, identities })
}

fn one_match(rules: u32) -> impl Strategy<Value = RouteMatch> {
    let texts = (option::of(text()), option::of(text()), option::of(text()));
    let query =
        vec((any_text(), text()).prop_map(|(name, value)| FieldMatch { name, value }), 0..3);
    (0..rules, path(), texts, headers(), headers(), query, source()).prop_map(
        |(rule, path, (method, scheme, authority), headers, without_headers, query, source)| {
            RouteMatch {
                rule,
                path,
                method,
                scheme,
                authority,
                headers,
                without_headers,
                query,
                source,
            }
        },
    )
}

fn target() -> impl Strategy<Value = Target> {
    prop_oneof![
        (service(), 1..=u16::MAX, option::of(any_text()))
            .prop_map(|(service, port, subset)| Target::Service { service, port, subset }),
        any_text().prop_map(|message| Target::Invalid { message }),
    ]
}

fn share() -> impl Strategy<Value = Share> {
    (any::<u32>(), 1..=u32::MAX)
        .prop_map(|(numerator, denominator)| Share { numerator, denominator })
}

fn rewrite() -> impl Strategy<Value = PathRewrite> {
    prop_oneof![
        any_text().prop_map(PathRewrite::Full),
        any_text().prop_map(PathRewrite::Segments),
        any_text().prop_map(PathRewrite::Text),
        (pattern(), any_text())
            .prop_map(|(pattern, substitution)| PathRewrite::Regex { pattern, substitution }),
    ]
}

fn edits() -> impl Strategy<Value = HeaderEdits> {
    let value = "[\t -~é]{0,5}".prop_map(Str::from);
    let pairs = vec((word(), value), 0..3).boxed();
    (vec(word(), 0..3), pairs.clone(), pairs).prop_map(|(remove, set, add)| HeaderEdits {
        remove,
        set,
        add,
    })
}

fn redirect() -> impl Strategy<Value = Redirect> {
    let port = option::of(1..=u16::MAX)
        .prop_map(|port| port.map_or(RedirectPort::Derived, RedirectPort::Number));
    let status = select(vec![301, 302, 303, 307, 308]);
    (option::of(any_text()), option::of(any_text()), port, option::of(rewrite()), status).prop_map(
        |(scheme, host, port, path, status)| Redirect { scheme, host, port, path, status },
    )
}

fn cors() -> impl Strategy<Value = Cors> {
    let origin = prop_oneof![
        Just(OriginMatch::Any),
        any_text().prop_map(OriginMatch::Exact),
        (any_text(), any_text())
            .prop_map(|(before, after)| OriginMatch::Wildcard { before, after }),
        any_text().prop_map(OriginMatch::Prefix),
        pattern().prop_map(OriginMatch::Regex),
    ];
    let words = || vec(any_text(), 0..3);
    (vec(origin, 0..3), words(), words(), words(), any::<[bool; 2]>(), option::of(any::<u32>()))
        .prop_map(|(allow_origins, methods, headers, expose, flags, max_age)| Cors {
            allow_origins,
            allow_methods: methods,
            allow_headers: headers,
            expose_headers: expose,
            allow_credentials: flags[0],
            max_age,
            forward_unmatched_preflights: flags[1],
        })
}

fn duration() -> impl Strategy<Value = Duration> {
    any::<u64>().prop_map(Duration::from_nanos)
}

fn fault() -> impl Strategy<Value = Fault> {
    let abort = prop_oneof![
        (200..600_u16).prop_map(Abort::Http),
        (0..17_u32).prop_map(Abort::Grpc),
        Just(Abort::Reset),
    ];
    let (delay, abort) = (option::of((share(), duration())), option::of((share(), abort)));
    (delay, abort, headers(), source(), option::of(any::<u64>())).prop_map(
        |(delay, abort, headers, source, until)| Fault { delay, abort, headers, source, until },
    )
}

fn filter() -> impl Strategy<Value = Filter> {
    prop_oneof![
        edits().prop_map(Filter::RequestHeaders),
        edits().prop_map(Filter::ResponseHeaders),
        (option::of(any_text()), option::of(rewrite()))
            .prop_map(|(host, path)| Filter::Rewrite(Rewrite { host, path })),
        redirect().prop_map(Filter::Redirect),
        (target(), share()).prop_map(|(target, share)| Filter::Mirror(Mirror { target, share })),
        cors().prop_map(Filter::Cors),
        fault().prop_map(Filter::Fault),
        (200..600_u16, any_text())
            .prop_map(|(status, body)| Filter::Respond(FixedResponse { status, body })),
        (select(Reason::ALL), any_text())
            .prop_map(|(reason, message)| Filter::Fail { reason, message }),
    ]
}

fn rule() -> impl Strategy<Value = RouteRule> {
    let filters = || vec(filter(), 0..3);
    let backend = (any::<u32>(), target(), filters())
        .prop_map(|(weight, target, filters)| Backend { weight, target, filters });
    let timeouts = (option::of(duration()), option::of(duration()))
        .prop_map(|(request, backend_request)| Timeouts { request, backend_request });
    let provenance = (any_text(), any_text(), any_text())
        .prop_map(|(object, field, origin)| Provenance { object, field, origin });
    (any_text(), any_text(), provenance, filters(), vec(backend, 0..3), timeouts).prop_map(
        |(route, name, provenance, filters, backends, timeouts)| RouteRule {
            route,
            name,
            provenance,
            filters,
            backends,
            timeouts,
        },
    )
}

/// For ports, or for all of them.
fn set(audience: Audience, all: bool) -> impl Strategy<Value = Arc<RouteSet>> {
    let ports = btree_set(1..=u16::MAX, if all { 0..1 } else { 1..4 });
    let kind = select(vec![RouteKind::Http, RouteKind::Grpc]);
    let content = vec(rule(), 1..3).prop_flat_map(|rules| {
        let count = u32::try_from(rules.len()).expect("few");
        (Just(rules), vec(one_match(count), 0..4))
    });
    (ports, kind, content).prop_map(move |(ports, kind, (rules, matches))| {
        let (ports, rules) = (ports.into_iter().collect(), rules.into_iter().map(Arc::new));
        let set = RouteSet::new(audience.clone(), ports, kind, rules.collect(), matches.into());
        Arc::new(set.expect("each match has its rule"))
    })
}

pub(super) fn routes() -> impl Strategy<Value = ServiceRoutes> {
    let protocols = vec![
        Protocol::Undeclared,
        Protocol::Http,
        Protocol::Http2,
        Protocol::Grpc,
        Protocol::Opaque,
    ];
    let audience =
        option::of(word()).prop_map(|ns| ns.map_or(Audience::Everybody, Audience::Namespace));
    let sets = btree_map(audience, any::<bool>(), 0..3).prop_flat_map(|audiences| {
        audiences.into_iter().map(|(audience, all)| set(audience, all)).collect::<Vec<_>>()
    });
    (service(), btree_map(1..=u16::MAX, select(protocols), 0..3), sets).prop_map(
        |(service, ports, sets)| {
            let port = |(service_port, protocol)| PortProtocol { service_port, protocol };
            ServiceRoutes {
                service,
                ports: ports.into_iter().map(port).collect(),
                sets: sets.into(),
            }
        },
    )
}

pub(super) fn subset() -> impl Strategy<Value = Subset> {
    (service(), word(), btree_set(any_text().prop_map(WorkloadUid), 0..5)).prop_map(
        |(service, name, workloads)| Subset { key: SubsetKey { service, name }, workloads },
    )
}
