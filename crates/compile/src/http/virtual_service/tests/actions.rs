//! What rules do, field by field.

use std::time::Duration;

use model::http::{
    Abort, Backend, Cors, Fault, FixedResponse, HeaderEdits, Mirror, OriginMatch, PathRewrite,
    Redirect, RedirectPort, Rewrite, Share, Timeouts,
};

use super::*;

/// The rule that a rule of the YAML with a destination becomes.
fn sending(yaml: &str) -> RouteRule {
    first(&shop(&format!("[{{{TO_V1}, {yaml}}}]"))).clone()
}

fn filters(yaml: &str) -> Vec<Filter> {
    sending(yaml).filters
}

fn redirecting(yaml: &str) -> Redirect {
    redirect_on(80, yaml)
}

fn redirect_on(port: u16, yaml: &str) -> Redirect {
    let compiled = shop(&format!("[{{redirect: {{{yaml}}}}}]"));
    let rule = chosen(&compiled, "any", port).unwrap().rules[0].clone();
    match &rule.filters[..] {
        [Filter::Redirect(redirect)] => redirect.clone(),
        other => panic!("{yaml}: {other:?}"),
    }
}

fn pairs(all: &[(&str, &str)]) -> Vec<(model::Str, model::Str)> {
    all.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect()
}

fn to(name: &str, port: u16) -> Target {
    let service = model::ServiceKey {
        namespace: "shop".into(),
        hostname: format!("{name}.shop.svc.cluster.local").into(),
    };
    Target::Service { service, port, subset: None }
}

const PERCENT: u32 = 10_000;

fn percent(n: u32) -> Share {
    Share { numerator: n * PERCENT, denominator: 100 * PERCENT }
}

#[test]
fn destination_host() {
    let check = |host: &str, want: Target| {
        let rule =
            first(&shop(&format!("[{{route: [{{destination: {{host: {host}}}}}]}}]"))).clone();
        assert_eq!(
            rule.backends,
            [Backend { weight: 1, target: want, filters: Vec::new() }],
            "{host}"
        );
    };
    check("v1", to("v1", 80));
    check("v2.shop.svc.cluster.local", to("v2", 80));
}

#[test]
fn destination_port() {
    let target = |called: u16, destination: &str| {
        let compiled = shop(&format!("[{{route: [{{destination: {{{destination}}}}}]}}]"));
        chosen(&compiled, "any", called).unwrap().rules[0].backends[0].target.clone()
    };
    assert_eq!(target(80, "host: web, port: {number: 8080}"), to("web", 8080));
    // The only port there is; else the one that was called.
    assert_eq!(target(8080, "host: v1"), to("v1", 80));
    assert_eq!(target(8080, "host: web"), to("web", 8080));
    assert_eq!(target(80, "host: web"), to("web", 80));
}

#[test]
fn destination_subset() {
    let subsets = "\n---\n{apiVersion: networking.istio.io/v1, kind: DestinationRule, metadata: {name: d, namespace: shop}, \
                   spec: {host: v1, subsets: [{name: a, labels: {app: p}}]}}";
    let rules = "hosts: [web], http: [{route: [{destination: {host: v1, subset: a}}]}]";
    let (compiled, found) = world(&(object("shop", "name: v", rules) + subsets));
    assert_eq!(found, []);
    let Target::Service { service, subset, .. } = &first(&compiled).backends[0].target else {
        panic!("no service")
    };
    assert_eq!((&*service.hostname, subset.as_deref()), ("v1.shop.svc.cluster.local", Some("a")));
}

#[test]
fn weights() {
    let weights = |route: &str| -> Vec<u32> {
        first(&shop(&format!("[{{route: [{route}]}}]"))).backends.iter().map(|b| b.weight).collect()
    };
    assert_eq!(
        weights("{destination: {host: v1}, weight: 90}, {destination: {host: v2}, weight: 10}"),
        [90, 10]
    );
    assert_eq!(weights("{destination: {host: v1}, weight: 1}, {destination: {host: v2}}"), [1, 0]);
    assert_eq!(weights("{destination: {host: v1}}"), [1]);
    assert_eq!(weights("{destination: {host: v1}, weight: 0}"), [1], "the only one gets all");
}

#[test]
fn headers() {
    let yaml = "headers: {request: {set: {X-A: b}, add: {x-c: d}, remove: [X-E]}, response: {set: {x-f: '100%%'}}}";
    let request = HeaderEdits {
        remove: vec!["x-e".into()],
        set: pairs(&[("x-a", "b")]),
        add: pairs(&[("x-c", "d")]),
    };
    let response = HeaderEdits { set: pairs(&[("x-f", "100%")]), ..HeaderEdits::default() };
    assert_eq!(filters(yaml), [Filter::RequestHeaders(request), Filter::ResponseHeaders(response)]);
    // The host is no header to edit, but a way to say where to.
    let host =
        |name: &str| filters(&format!("headers: {{request: {{set: {{'{name}': a.example}}}}}}"));
    let rewrite = Filter::Rewrite(Rewrite { host: Some("a.example".into()), path: None });
    assert_eq!(host("host"), std::slice::from_ref(&rewrite));
    assert_eq!(host(":authority"), [rewrite]);
}

#[test]
fn destination_headers() {
    let rule = "[{route: [{destination: {host: v1}, headers: {response: {remove: [server]}}}]}]";
    let edits = HeaderEdits { remove: vec!["server".into()], ..HeaderEdits::default() };
    assert_eq!(first(&shop(rule)).backends[0].filters, [Filter::ResponseHeaders(edits)]);
}

#[test]
fn timeout() {
    let timeout = |text: &str| sending(&format!("timeout: {text}")).timeouts;
    let some = |ms| Timeouts { request: Some(Duration::from_millis(ms)), backend_request: None };
    assert_eq!(timeout("5s"), some(5000));
    assert_eq!(timeout("0.5s"), some(500));
    assert_eq!(timeout("1m30s"), some(90_000));
    assert_eq!(timeout("0s"), Timeouts::default());
}

#[test]
fn rewrite_uri() {
    let check = |m: &str, path: PathMatch, rewrite: PathRewrite| {
        let compiled = shop(&format!("[{{match: [{{{m}}}], {TO_V1}, rewrite: {{uri: /new}}}}]"));
        let (set, rule) = (set(&compiled), first(&compiled));
        assert_eq!(set.matches[0].path, path, "{m}");
        assert_eq!(
            rule.filters,
            [Filter::Rewrite(Rewrite { host: None, path: Some(rewrite) })],
            "{m}"
        );
    };
    let text = PathRewrite::Text("/new".into());
    check("uri: {prefix: /old}", PathMatch::Prefix("/old".into()), text.clone());
    check("uri: {exact: /old}", PathMatch::Exact("/old".into()), text.clone());
    // Where every path fits, the first slash gives way; a pattern fits all of a path.
    check("headers: {a: {}}", PathMatch::Prefix("/".into()), text.clone());
    let compiled = shop(&format!(
        "[{{match: [{{uri: {{regex: '/v.*'}}}}, {{uri: {{prefix: /old}}}}, {{uri: {{prefix: /older}}}}], {TO_V1}, rewrite: {{uri: /new}}}}]"
    ));
    let rewrites: Vec<&[Filter]> = set(&compiled).rules.iter().map(|r| &*r.filters).collect();
    let by = |path| [Filter::Rewrite(Rewrite { host: None, path: Some(path) })];
    assert_eq!(rewrites, [&by(PathRewrite::Full("/new".into())), &by(text)]);
    assert_eq!(set(&compiled).matches.iter().map(|m| m.rule).collect::<Vec<_>>(), [0, 1, 1]);
}

#[test]
fn rewrite_authority() {
    let rewrite = |host: &str| Filter::Rewrite(Rewrite { host: Some(host.into()), path: None });
    assert_eq!(filters("rewrite: {authority: a.example}"), [rewrite("a.example")]);
    assert_eq!(filters("rewrite: {authority: 'a.example:8080'}"), [rewrite("a.example:8080")]);
}

#[test]
fn rewrite_regex() {
    let yaml =
        r"rewrite: {uriRegexRewrite: {match: '^/service/([^/]+)(/.*)$', rewrite: '/custom\2/\1'}}";
    let [
        Filter::Rewrite(Rewrite {
            host: None,
            path: Some(PathRewrite::Regex { pattern, substitution }),
        }),
    ] = &filters(yaml)[..]
    else {
        panic!("no rewrite")
    };
    let path = pattern.replace("/service/update/v1/api", substitution);
    assert_eq!(path.as_deref(), Some("/custom/v1/api/update"));
}

#[test]
fn redirect() {
    let port = RedirectPort::Number(80);
    let plain = Redirect { scheme: None, host: None, port, path: None, status: 301 };
    let path = Some(PathRewrite::Full("/b".into()));
    assert_eq!(redirecting("uri: /b"), Redirect { path: path.clone(), ..plain.clone() });
    let host = Some("a.example".into());
    assert_eq!(redirecting("authority: a.example"), Redirect { host: host.clone(), ..plain });
    let scheme = Some("https".into());
    let all = Redirect { scheme, host, port: RedirectPort::Number(443), path, status: 301 };
    assert_eq!(redirecting("scheme: https, authority: a.example, uri: /b"), all);
}

#[test]
fn redirect_port() {
    let check = |called: u16, yaml: &str, want: u16| {
        assert_eq!(redirect_on(called, yaml).port, RedirectPort::Number(want), "{called} {yaml}");
    };
    check(80, "port: 8443", 8443);
    check(8080, "authority: 'a.example:81'", 81);
    check(8080, "derivePort: FROM_PROTOCOL_DEFAULT", 80);
    check(8080, "scheme: https, derivePort: FROM_PROTOCOL_DEFAULT", 443);
    check(8080, "scheme: https, derivePort: FROM_REQUEST_PORT", 8080);
    check(8080, "authority: a.example, derivePort: FROM_REQUEST_PORT", 8080);
    // The request's own, unless it went without saying.
    check(8080, "uri: /a", 8080);
    check(8080, "scheme: https", 8080);
    check(80, "scheme: https", 443);
    check(8080, "authority: a.example", 80);
}

#[test]
fn redirect_code() {
    for code in [301, 302, 303, 307, 308] {
        assert_eq!(redirecting(&format!("uri: /a, redirectCode: {code}")).status, code);
    }
}

#[test]
fn redirect_prefix() {
    let compiled = shop("[{match: [{uri: {prefix: /old}}], redirect: {prefixRewrite: /new}}]");
    let [Filter::Redirect(redirect)] = &first(&compiled).filters[..] else { panic!("no redirect") };
    assert_eq!(redirect.path, Some(PathRewrite::Text("/new".into())));
}

#[test]
fn direct_response() {
    let check = |yaml: &str, status: u16, body: &str| {
        let compiled = shop(&format!("[{{directResponse: {{{yaml}}}}}]"));
        let want = FixedResponse { status, body: body.into() };
        assert_eq!(first(&compiled).filters, [Filter::Respond(want)], "{yaml}");
    };
    check("status: 503", 503, "");
    check("status: 200, body: {string: hello}", 200, "hello");
    check("status: 200, body: {bytes: aGVsbG8=}", 200, "hello");
}

#[test]
fn fault_delay() {
    let check = |yaml: &str, numerator: u32, millis: u64| {
        let share = Share { numerator, denominator: 1_000_000 };
        let want =
            Fault { delay: Some((share, Duration::from_millis(millis))), ..Fault::default() };
        assert_eq!(
            filters(&format!("fault: {{delay: {{{yaml}}}}}")),
            [Filter::Fault(want)],
            "{yaml}"
        );
    };
    check("fixedDelay: 5s, percentage: {value: 0.1}", 1000, 5000);
    check("fixedDelay: 5ms, percentage: {value: 100}", 1_000_000, 5);
    check("fixedDelay: 5ms, percent: 50", 500_000, 5);
    check("fixedDelay: 5ms, percent: 50, percentage: {value: 0.0001}", 1, 5);
    assert_eq!(filters("fault: {delay: {fixedDelay: 1s, percentage: {value: 0}}}"), []);
}

#[test]
fn fault_abort() {
    let check = |yaml: &str, how: Abort| {
        let want = Fault { abort: Some((percent(10), how)), ..Fault::default() };
        let yaml = format!("fault: {{abort: {{{yaml}, percentage: {{value: 10}}}}}}");
        assert_eq!(filters(&yaml), [Filter::Fault(want)], "{yaml}");
    };
    check("httpStatus: 503", Abort::Http(503));
    check("grpcStatus: UNAVAILABLE", Abort::Grpc(14));
    check("grpcStatus: UNAUTHENTICATED", Abort::Grpc(16));
    check("http2Error: REFUSED_STREAM", Abort::Reset);
    // Both at once: first the delay.
    let both = "fault: {delay: {fixedDelay: 1s, percent: 10}, abort: {httpStatus: 500, percentage: {value: 10}}}";
    let want = Fault {
        delay: Some((percent(10), Duration::from_secs(1))),
        abort: Some((percent(10), Abort::Http(500))),
        ..Fault::default()
    };
    assert_eq!(filters(both), [Filter::Fault(want)]);
}

#[test]
fn mirror() {
    let want = Mirror { target: to("v2", 80), share: Share::ALL };
    assert_eq!(filters("mirror: {host: v2}"), [Filter::Mirror(want)]);
}

#[test]
fn mirror_percent() {
    let share = |yaml: &str| match &filters(&format!("mirror: {{host: v2}}, {yaml}"))[..] {
        [Filter::Mirror(mirror)] => mirror.share,
        other => panic!("{other:?}"),
    };
    assert_eq!(share("mirrorPercentage: {value: 50}"), percent(50));
    assert_eq!(share("mirrorPercent: 5"), percent(5));
    assert_eq!(share("mirror_percent: 5"), percent(5));
    assert_eq!(share("mirrorPercent: 5, mirrorPercentage: {value: 7}"), percent(7));
    assert_eq!(share("mirrorPercentage: {value: 0}"), percent(0));
}

#[test]
fn mirrors() {
    let yaml = "mirrors: [{destination: {host: v2}}, {destination: {host: web, port: {number: 8080}}, percentage: {value: 1}}]";
    let want = [
        Filter::Mirror(Mirror { target: to("v2", 80), share: Share::ALL }),
        Filter::Mirror(Mirror { target: to("web", 8080), share: percent(1) }),
    ];
    assert_eq!(filters(yaml), want);
    // A copy that cannot be sent is no reason to stop the original.
    let rules =
        format!("hosts: [web], http: [{{{TO_V1}, mirrors: [{{destination: {{host: nobody}}}}]}}]");
    let (compiled, found) = world(&object("shop", "name: v", &rules));
    assert_eq!(brief(&found), ["dangling_reference spec.http[0].mirrors[0].destination.host"]);
    assert_eq!(first(&compiled).backends.len(), 1);
}

#[test]
fn cors() {
    let yaml = "corsPolicy: {allowOrigins: [{exact: 'https://a.example'}, {prefix: 'https://b.'}, {exact: '*'}, {regex: 'https://c\\d'}], \
                allowMethods: [GET, POST], allowHeaders: [X-A], exposeHeaders: [X-B], maxAge: 24h, allowCredentials: true}";
    let [Filter::Cors(cors)] = &filters(yaml)[..] else { panic!("no CORS") };
    let Cors { allow_origins, allow_methods, allow_headers, expose_headers, .. } = cors;
    assert_eq!(allow_origins[0], OriginMatch::Exact("https://a.example".into()));
    assert_eq!(allow_origins[1], OriginMatch::Prefix("https://b.".into()));
    assert_eq!(allow_origins[2], OriginMatch::Any);
    assert!(matches!(&allow_origins[3], OriginMatch::Regex(p) if p.matches("https://c1")));
    assert_eq!(allow_methods.join(","), "GET,POST");
    assert_eq!((allow_headers.join(","), expose_headers.join(",")), ("X-A".into(), "X-B".into()));
    assert_eq!((cors.max_age, cors.allow_credentials), (Some(86400), true));
}

#[test]
fn cors_allow_origin() {
    let [Filter::Cors(cors)] =
        &filters("corsPolicy: {allowOrigin: ['https://a.example', '*']}")[..]
    else {
        panic!("no CORS")
    };
    assert_eq!(
        cors.allow_origins,
        [OriginMatch::Exact("https://a.example".into()), OriginMatch::Any]
    );
}

#[test]
fn cors_unmatched_preflights() {
    for (value, forwards) in [("UNSPECIFIED", true), ("FORWARD", true), ("IGNORE", false)] {
        let [Filter::Cors(cors)] =
            &filters(&format!("corsPolicy: {{unmatchedPreflights: {value}}}"))[..]
        else {
            panic!("no CORS")
        };
        assert_eq!(cors.forward_unmatched_preflights, forwards, "{value}");
    }
}

/// CORS answers first, then faults, then what is sent is changed, then it is copied.
#[test]
fn the_order_of_filters() {
    let yaml = "corsPolicy: {allowOrigins: [{exact: '*'}]}, fault: {delay: {fixedDelay: 1s, percent: 1}}, \
                headers: {request: {set: {host: a.example, a: b}}, response: {remove: [c]}}, \
                rewrite: {authority: b.example}, mirror: {host: v2}";
    let names: Vec<&str> = filters(yaml)
        .iter()
        .map(|f| match f {
            Filter::Cors(_) => "cors",
            Filter::Fault(_) => "fault",
            Filter::RequestHeaders(_) => "request",
            Filter::ResponseHeaders(_) => "response",
            Filter::Rewrite(r) if r.host.as_deref() == Some("a.example") => "host",
            Filter::Rewrite(_) => "rewrite",
            Filter::Mirror(_) => "mirror",
            Filter::Redirect(_) | Filter::Respond(_) | Filter::Fail { .. } => "answer",
        })
        .collect();
    assert_eq!(names, ["cors", "fault", "request", "host", "response", "rewrite", "mirror"]);
}
