//! Rows F: what filters do to requests and answers, Location and status asserted; and faults.

use http::{HeaderMap, Response, response};
use model::Reason;

use super::*;

/// A rule on every path with one backend `b`, and these filters.
fn with(filters: Vec<Filter>) -> Snapshot {
    on(PathMatch::Any, filters)
}

fn on(path: PathMatch, filters: Vec<Filter>) -> Snapshot {
    let rules = vec![rule(filters, vec![backend("b", 1)])];
    world(vec![set(RouteKind::Http, rules, vec![by_path(path)])])
}

/// What backend `b` sees of the headers but `host`, or what the plan says instead: `name: value | ...`.
fn sent(snapshot: &Snapshot, asked: &request::Parts) -> String {
    let plan = ask(snapshot, asked, 7);
    if !matches!(plan.action, HttpAction::Forward { .. }) {
        return short(&plan, asked);
    }
    let mut sent = asked.clone();
    plan.edit_request(&mut sent);
    assert_eq!(sent.headers["host"], sent.uri.authority().unwrap().as_str(), "one host");
    sent.headers.remove("host");
    lines(&sent.headers)
}

/// Headers in the order of their names; what several lines say is apart by ` & `.
fn lines(headers: &HeaderMap) -> String {
    let mut lines: Vec<String> = headers
        .keys()
        .map(|name| {
            let all = headers.get_all(name).iter();
            let all: Vec<_> = all.map(|v| String::from_utf8_lossy(v.as_bytes())).collect();
            format!("{name}: {}", all.join(" & "))
        })
        .collect();
    lines.sort();
    lines.join(" | ")
}

fn answered(plan: &HttpPlan, headers: &[(&str, &str)]) -> response::Parts {
    let mut answer = Response::builder();
    for (name, value) in headers {
        answer = answer.header(*name, *value);
    }
    let mut parts = answer.body(()).unwrap().into_parts().0;
    plan.edit_response(&mut parts);
    parts
}

fn edits(remove: &[&str], set: &[(&str, &str)], add: &[(&str, &str)]) -> HeaderEdits {
    let pairs =
        |all: &[(&str, &str)]| all.iter().map(|(n, v)| ((*n).into(), (*v).into())).collect();
    HeaderEdits {
        remove: remove.iter().map(|n| (*n).into()).collect(),
        set: pairs(set),
        add: pairs(add),
    }
}

#[test]
fn request_headers() {
    let check = |row: &str, e: HeaderEdits, headers: &[(&str, &str)], want: &str| {
        let snapshot = with(vec![Filter::RequestHeaders(e.clone())]);
        assert_eq!(sent(&snapshot, &request("GET /", headers)), want, "{row} {e:?}");
    };
    check("F1 set", edits(&[], &[("X", "new")], &[]), &[("x", "old")], "x: new");
    check("F1 set", edits(&[], &[("x", "new")], &[]), &[("x", "a"), ("x", "b")], "x: new");
    check("F1 set", edits(&[], &[("x", "new")], &[]), &[], "x: new");
    check("F1 add", edits(&[], &[], &[("X", "new")]), &[("x", "old")], "x: old,new");
    check("F1 add", edits(&[], &[], &[("x", "b,c")]), &[("x", "a")], "x: a,b,c");
    check("F1 add", edits(&[], &[], &[("x", "new")]), &[], "x: new");
    check(
        "F1 add",
        edits(&[], &[], &[("cookie", "b=2")]),
        &[("cookie", "a=1")],
        "cookie: a=1; b=2",
    );
    check("F1 remove", edits(&["X-One", "y"], &[], &[]), &[("x-one", "1"), ("z", "1")], "z: 1");
    check(
        "F1 all",
        edits(&["a"], &[("b", "2")], &[("c", "3")]),
        &[("a", "1"), ("b", "1")],
        "b: 2 | c: 3",
    );
    for bad in [
        edits(&["host"], &[], &[]),
        edits(&[], &[], &[("host", "a")]),
        edits(&[], &[("host", "a b")], &[]),
        edits(&[], &[("content-length", "5")], &[]),
        edits(&[], &[], &[("Transfer-Encoding", "chunked")]),
        edits(&[], &[("a b", "1")], &[]),
        edits(&[":path"], &[], &[]),
        edits(&[], &[("x", "1\r\ny: 2")], &[]),
        // Who reads these believes them: only the mesh writes them.
        edits(&[], &[("X-Forwarded-Client-Cert", "URI=spiffe://td/ns/a/sa/admin")], &[]),
        edits(&[], &[], &[("x-ambit-client-identity", "spiffe://td/ns/a/sa/admin")]),
        edits(&[], &[("http2-settings", "AA")], &[]),
    ] {
        check("bad", bad, &[], "500 bad_filter");
    }
    let snapshot = with(vec![Filter::RequestHeaders(edits(&[], &[("Host", "other")], &[]))]);
    let asked = request("GET /a", &[]);
    let mut seen = asked.clone();
    ask(&snapshot, &asked, 0).edit_request(&mut seen);
    assert_eq!(seen.uri, "http://other/a");
    assert_eq!(seen.headers["host"], "other");
}

#[test]
fn order_of_filters() {
    let add = |v: &str| Filter::RequestHeaders(edits(&[], &[], &[("x", v)]));
    let rewrite =
        |p: &str| Filter::Rewrite(Rewrite { host: None, path: Some(PathRewrite::Full(p.into())) });
    let own = Backend { filters: vec![add("3"), rewrite("/own")], ..backend("b", 1) };
    let other = Backend { filters: vec![add("no")], ..backend("c", 0) };
    let rules = vec![rule(vec![add("1"), add("2"), rewrite("/rule")], vec![other, own])];
    let snapshot = world(vec![set(RouteKind::Http, rules, vec![any()])]);
    let asked = request("GET /?q", &[]);
    assert_eq!(sent(&snapshot, &asked), "x: 1,2,3", "F3");
    assert_eq!(
        short(&ask(&snapshot, &asked, 0), &asked),
        "b /own?q",
        "F3: the last rewrite counts"
    );
}

#[test]
fn response_headers() {
    let both =
        Filter::ResponseHeaders(edits(&["a"], &[("B", "2")], &[("c", "3"), ("set-cookie", "y=2")]));
    let snapshot = with(vec![both.clone()]);
    let plan = ask(&snapshot, &request("GET /", &[]), 0);
    let answer = answered(&plan, &[("a", "1"), ("b", "1"), ("c", "1"), ("set-cookie", "x=1")]);
    assert_eq!(lines(&answer.headers), "b: 2 | c: 1,3 | set-cookie: x=1 & y=2", "F4");
    let asked = request("GET /", &[]);
    let tea = Filter::Respond(FixedResponse { status: 418, body: "tea".into() });
    let html = Filter::ResponseHeaders(edits(&[], &[("content-type", "text/html")], &[]));
    let cors = Cors { allow_origins: vec![OriginMatch::Any], ..Cors::default() };
    let stars = Filter::ResponseHeaders(edits(&[], &[("access-control-allow-origin", "no")], &[]));
    let fail = Filter::Fail { reason: Reason::BadFilter, message: "x".into() };
    let length = Filter::ResponseHeaders(edits(&[], &[("content-length", "1")], &[]));
    // What the route itself answers is edited as well, wherever the filter stands; what is refused is not.
    for (row, filters, want) in [
        ("answer", vec![html.clone(), tea.clone()], "418 content-type: text/html"),
        ("behind", vec![tea.clone(), html.clone()], "418 content-type: text/html"),
        (
            "all",
            vec![both, tea.clone()],
            "418 b: 2 | c: 3 | content-type: text/plain | set-cookie: y=2",
        ),
        (
            "redirect",
            vec![html.clone(), Filter::Redirect(to())],
            "302 content-type: text/html | location: http://web/",
        ),
        (
            "redirect, behind",
            vec![Filter::Redirect(to()), html.clone()],
            "302 content-type: text/html | location: http://web/",
        ),
        (
            "CORS speaks last",
            vec![Filter::Cors(cors), stars, tea.clone()],
            "418 access-control-allow-origin: * | content-type: text/plain",
        ),
        (
            "bad, behind",
            vec![tea, length],
            "500 content-type: text/plain | x-ambit-reason: bad_filter",
        ),
        ("refused", vec![html, fail], "500 content-type: text/plain | x-ambit-reason: bad_filter"),
    ] {
        let asked = request("GET /", &[("origin", "http://a")]);
        let HttpAction::Answer(answer) = ask(&with(filters), &asked, 0).action else { panic!() };
        let got = format!("{} {}", answer.status.as_u16(), lines(&answer.headers));
        assert_eq!(got, want, "F4 {row}");
    }
    let bad = Filter::ResponseHeaders(edits(&[], &[("content-length", "1")], &[]));
    assert_eq!(sent(&with(vec![bad]), &asked), "500 bad_filter");
    let bad = Filter::Respond(FixedResponse { status: 42, body: "".into() });
    assert_eq!(sent(&with(vec![bad]), &asked), "500 bad_filter");
}

fn to() -> Redirect {
    Redirect { scheme: None, host: None, port: RedirectPort::Derived, path: None, status: 302 }
}

#[test]
fn redirects() {
    let check = |row: &str, r: Redirect, port: u16, line: &str, host: &str, want: &str| {
        let snapshot = with(vec![Filter::Redirect(r.clone())]);
        let sets = snapshot.routes(&key("web")).unwrap().sets[0].clone();
        let snapshot =
            world(vec![RouteSet { ports: Arc::new([80, 8080, 443]), ..(*sets).clone() }]);
        let asked = request(line, &[("host", host)]);
        let plan = ask_as(&snapshot, &asked, 0, port, None);
        assert_eq!(short(&plan, &asked), want, "{row} {r:?} {line} {host}");
    };
    let host = |h: &str| Redirect { host: Some(h.into()), ..to() };
    let scheme = |s: &str| Redirect { scheme: Some(s.into()), ..to() };
    let number = |n| Redirect { port: RedirectPort::Number(n), ..to() };
    check("F5", to(), 80, "GET /a", "web", "302 http://web/a");
    for status in [301, 302, 303, 307, 308] {
        let want = format!("{status} http://other/a");
        check("F5", Redirect { status, ..host("other") }, 80, "GET /a", "web", &want);
    }
    for status in [200, 300, 304, 306, 399, 1000] {
        check("F5", Redirect { status, ..to() }, 80, "GET /a", "web", "500 bad_filter");
    }
    check("F6", to(), 80, "GET /", "web:8080", "302 http://web/");
    check("F6", to(), 80, "GET /", "[fd00::1]:8080", "302 http://[fd00::1]/");
    check("F7 explicit", number(8083), 80, "GET /", "web", "302 http://web:8083/");
    check(
        "F7 explicit",
        Redirect { scheme: Some("https".into()), ..number(8443) },
        80,
        "GET /",
        "web",
        "302 https://web:8443/",
    );
    check("F7 scheme", scheme("https"), 8080, "GET /", "web", "302 https://web/");
    check("F7 scheme", scheme("http"), 8080, "GET /", "web", "302 http://web/");
    check("F7 called", to(), 8080, "GET /", "web", "302 http://web:8080/");
    check("F7 called", host("other"), 8080, "GET /", "web", "302 http://other:8080/");
    check("F7 called", host("other:81"), 8080, "GET /", "web", "302 http://other:81/");
    check("F8", number(80), 8080, "GET /", "web", "302 http://web/");
    check(
        "F8",
        Redirect { scheme: Some("https".into()), ..number(443) },
        80,
        "GET /",
        "web",
        "302 https://web/",
    );
    check("F8", number(443), 80, "GET /", "web", "302 http://web:443/");
    check("F8", to(), 443, "GET https://web/", "web", "302 https://web/");
    check("F9", to(), 80, "GET /a?x=1&y=%20", "web", "302 http://web/a?x=1&y=%20");
    // As a client may send it; a Location is ASCII.
    check("F9", to(), 80, "GET /a?q=é", "web", "302 http://web/a?q=%C3%A9");
    let path = |p| Redirect { path: Some(PathRewrite::Full(p)), ..to() };
    check("F9", path("/b".into()), 80, "GET /a?x=1", "web", "302 http://web/b?x=1");
    check("F9", path("/b?y=2".into()), 80, "GET /a?x=1", "web", "302 http://web/b?y=2&x=1");
    check("F9", path("/b c".into()), 80, "GET /a", "web", "500 bad_filter");
    check("F9", path("/..#".into()), 80, "GET /a", "web", "500 bad_filter");
    // No path at all; behind a host the star would be part of its name.
    check("F9", to(), 80, "OPTIONS *", "web", "302 http://web/");
    check("F9", path("/b".into()), 8080, "OPTIONS *", "web", "302 http://web:8080/");
    check("F9", host("a\r\nb"), 80, "GET /a", "web", "500 bad_filter");
}

#[test]
fn redirects_end_it() {
    let rules = vec![rule(vec![Filter::Redirect(to())], vec![])];
    let snapshot = world(vec![set(RouteKind::Http, rules, vec![any()])]);
    let asked = request("GET /", &[]);
    assert_eq!(
        short(&ask(&snapshot, &asked, 0), &asked),
        "302 http://web/",
        "F10: without backends"
    );
    let fail = Filter::Fail { reason: Reason::BadFilter, message: "x".into() };
    let snapshot = with(vec![Filter::Redirect(to()), fail]);
    let plan = ask(&snapshot, &asked, 0);
    assert_eq!(short(&plan, &asked), "302 http://web/", "F10: nothing after it");
    let HttpAction::Answer(answer) = plan.action else { panic!() };
    assert!(answer.refusal.is_none());
}

#[test]
fn rewrites() {
    let check = |row: &str, rewrite: Rewrite, line: &str, want: &str| {
        let snapshot = on(PathMatch::Segments("/a".into()), vec![Filter::Rewrite(rewrite.clone())]);
        let asked = request(line, &[]);
        let mut seen = asked.clone();
        let plan = ask(&snapshot, &asked, 0);
        plan.edit_request(&mut seen);
        assert_eq!(seen.uri.to_string(), want, "{row} {rewrite:?}");
        assert_eq!(seen.headers["host"], seen.uri.authority().unwrap().as_str(), "{row}");
        // A second attempt begins with the original again.
        let mut again = asked;
        plan.edit_request(&mut again);
        assert_eq!(seen.uri, again.uri);
    };
    let host = Rewrite { host: Some("Other.example:8080".into()), path: None };
    check("F11", host, "GET /a?x", "http://other.example:8080/a?x");
    let full = Rewrite { host: None, path: Some(PathRewrite::Full("/test".into())) };
    check("F12", full, "GET /a/b?x=1", "http://web/test?x=1");
    let bad = Rewrite { host: Some("a b".into()), path: None };
    let snapshot = with(vec![Filter::Rewrite(bad)]);
    assert_eq!(sent(&snapshot, &request("GET /", &[])), "500 bad_filter");
}

/// The table of Gateway API's HTTPPathModifier, in both places that use it. Compile takes the slash off the prefix's end.
#[test]
fn replaced_prefixes() {
    for (path, prefix, new, want) in [
        ("/foo/bar", "/foo", "/xyz", "/xyz/bar"),
        ("/foo/bar", "/foo", "/xyz/", "/xyz/bar"),
        ("/foo/bar", "/foo/", "/xyz", "/xyz/bar"),
        ("/foo/bar", "/foo/", "/xyz/", "/xyz/bar"),
        ("/foo", "/foo", "/xyz", "/xyz"),
        ("/foo/", "/foo", "/xyz", "/xyz/"),
        ("/foo/bar", "/foo", "", "/bar"),
        ("/foo/", "/foo", "", "/"),
        ("/foo", "/foo", "", "/"),
        ("/foo/", "/foo", "/", "/"),
        ("/foo", "/foo", "/", "/"),
        // Beyond the table: the prefix that is everything.
        ("/", "/", "/xyz", "/xyz"),
        ("/bar", "/", "/xyz", "/xyz/bar"),
        ("/bar", "/", "/xyz/", "/xyz/bar"),
        ("/bar", "/", "/", "/bar"),
    ] {
        let matched = match prefix.trim_end_matches('/') {
            "" => PathMatch::Any,
            prefix => PathMatch::Segments(prefix.into()),
        };
        let rewrite = PathRewrite::Segments(new.into());
        let asked = request(&format!("GET {path}?q=1"), &[]);
        let check = |row: &str, filter: Filter, want: String| {
            let snapshot = on(matched.clone(), vec![filter]);
            let got = short(&ask(&snapshot, &asked, 0), &asked);
            assert_eq!(got, want, "{row} ({path}, {prefix}, {new})");
        };
        let path = Some(rewrite.clone());
        check("F14", Filter::Rewrite(Rewrite { host: None, path }), format!("b {want}?q=1"));
        let redirect = Redirect { path: Some(rewrite), ..to() };
        check("F15", Filter::Redirect(redirect), format!("302 http://web{want}?q=1"));
    }
}

fn mirror(name: &str, numerator: u32, denominator: u32) -> Filter {
    Filter::Mirror(Mirror { target: target(name), share: Share { numerator, denominator } })
}

#[test]
fn mirrors() {
    let asked = request("GET /", &[]);
    let header = Filter::RequestHeaders(edits(&[], &[("x", "1")], &[]));
    let nowhere = Filter::Mirror(Mirror {
        target: Target::Invalid { message: "gone".into() },
        share: Share::ALL,
    });
    let snapshot = with(vec![mirror("m1", 1, 1), header, mirror("m2", 1, 1), nowhere]);
    let plan = ask(&snapshot, &asked, 0);
    assert_eq!(plan.mirrors, [target("m1"), target("m2")], "F16");
    let copies: Vec<String> = (0..3)
        .map(|n| {
            let mut copy = asked.clone();
            plan.edit_mirror(n, &mut copy);
            lines(&copy.headers)
        })
        .collect();
    assert_eq!(copies, ["host: web", "host: web | x: 1", "host: web"], "F17: in order");
    assert_eq!(short(&plan, &asked), "b /", "F16: to nowhere, and the request itself goes on");
    let share = |numerator, denominator| {
        let snapshot = with(vec![mirror("m", numerator, denominator)]);
        (0..10_000).filter(|rand| !ask(&snapshot, &asked, *rand).mirrors.is_empty()).count()
    };
    assert_eq!(share(0, 100), 0, "F17");
    assert_eq!(share(100, 100), 10_000, "F17");
    assert!((4_700..5_300).contains(&share(50, 100)), "F17");
    assert!((1..30).contains(&share(1, 1000)), "F17");
    let snapshot = with(vec![mirror("m", 1, 1), Filter::Redirect(to())]);
    assert!(ask(&snapshot, &asked, 0).mirrors.is_empty(), "no copy of what is not sent");
}

#[test]
fn filters_that_nobody_can_apply() {
    let fail =
        Filter::Fail { reason: Reason::BadFilter, message: "there is no Thing shop/x".into() };
    let asked = request("GET /", &[]);
    let plan = ask(&with(vec![fail.clone()]), &asked, 0);
    assert_eq!(short(&plan, &asked), "500 bad_filter", "F18");
    let HttpAction::Answer(Answer { refusal: Some(refusal), .. }) = plan.action else { panic!() };
    assert_eq!(refusal.message, "HTTPRoute/shop/web rules[0]: there is no Thing shop/x");
    let own = Backend { filters: vec![fail], ..backend("b", 1) };
    let rules = vec![rule(vec![], vec![own])];
    let snapshot = world(vec![set(RouteKind::Http, rules, vec![any()])]);
    assert_eq!(short(&ask(&snapshot, &asked, 0), &asked), "500 bad_filter", "F18 of a backend");
}

fn cors() -> Cors {
    let words = |all: &[&str]| all.iter().map(|w| (*w).into()).collect();
    Cors {
        allow_origins: vec![
            OriginMatch::Exact("https://a.com".into()),
            OriginMatch::Wildcard { before: "https://".into(), after: ".example.com".into() },
        ],
        allow_methods: words(&["GET", "PUT"]),
        allow_headers: words(&["x-one", "x-two"]),
        expose_headers: words(&["x-three"]),
        allow_credentials: false,
        max_age: Some(5),
        forward_unmatched_preflights: false,
    }
}

/// The answer to a request with CORS rules: `proxy ...` where it is the proxy's, else what a backend's becomes.
fn cors_answer(
    cors: Cors,
    method: &str,
    headers: &[(&str, &str)],
    backend: &[(&str, &str)],
) -> String {
    let asked = request(&format!("{method} /"), headers);
    let plan = ask(&with(vec![Filter::Cors(cors)]), &asked, 0);
    match &plan.action {
        HttpAction::Answer(answer) => {
            assert!(answer.refusal.is_none() && answer.body.is_empty());
            format!("proxy {} {}", answer.status.as_u16(), lines(&answer.headers))
        }
        _ => lines(&answered(&plan, backend).headers),
    }
}

const ORIGIN: (&str, &str) = ("origin", "https://a.com");
const METHOD: (&str, &str) = ("access-control-request-method", "PUT");
const HEADERS: (&str, &str) = ("access-control-request-headers", "x-one, x-nine");

#[test]
fn preflights() {
    let check = |row: &str, cors: Cors, headers: &[(&str, &str)], want: &str| {
        assert_eq!(cors_answer(cors, "OPTIONS", headers, &[]), want, "{row} {headers:?}");
    };
    let origin = "access-control-allow-origin: https://a.com";
    let methods = "access-control-allow-methods: GET, PUT";
    let age = "access-control-max-age: 5";
    check(
        "F19",
        cors(),
        &[ORIGIN, METHOD],
        &format!("proxy 204 {methods} | {origin} | {age} | vary: origin"),
    );
    let names = "access-control-allow-headers: x-one, x-two";
    check(
        "F19",
        cors(),
        &[ORIGIN, METHOD, HEADERS],
        &format!("proxy 204 {names} | {methods} | {origin} | {age} | vary: origin"),
    );
    check("F19: plain OPTIONS", cors(), &[METHOD], "");
    let actual = format!("{origin} | access-control-expose-headers: x-three | vary: origin");
    check("F19: plain OPTIONS", cors(), &[ORIGIN], &actual);
    check("F20: unmatched", cors(), &[("origin", "https://b.com"), METHOD], "proxy 204 ");
    check("F20", cors(), &[("origin", "https://example.com"), METHOD], "proxy 204 ");
    let forward = Cors { forward_unmatched_preflights: true, ..cors() };
    check("F20: Istio's FORWARD", forward, &[("origin", "https://b.com"), METHOD], "");
    let sub = "access-control-allow-origin: https://a.b.example.com";
    check(
        "F20",
        cors(),
        &[("origin", "https://a.b.example.com"), METHOD],
        &format!("proxy 204 {methods} | {sub} | {age} | vary: origin"),
    );
    let no_age = Cors { max_age: None, ..cors() };
    check(
        "F21: compile knows the default",
        no_age,
        &[ORIGIN, METHOD],
        &format!("proxy 204 {methods} | {origin} | vary: origin"),
    );
    let star = || vec!["*".into()];
    let all = Cors {
        allow_origins: vec![OriginMatch::Any],
        allow_methods: star(),
        allow_headers: star(),
        expose_headers: star(),
        ..cors()
    };
    check(
        "F21: anything without credentials",
        all.clone(),
        &[ORIGIN, METHOD, HEADERS],
        &format!(
            "proxy 204 access-control-allow-headers: * | access-control-allow-methods: * | access-control-allow-origin: * | {age}"
        ),
    );
    let credentials = Cors { allow_credentials: true, ..all };
    check(
        "F21: anything with credentials",
        credentials.clone(),
        &[ORIGIN, METHOD, HEADERS],
        &format!(
            "proxy 204 access-control-allow-credentials: true | access-control-allow-headers: x-one, x-nine | access-control-allow-methods: PUT | {origin} | {age} | vary: origin"
        ),
    );
    let actual = format!("access-control-allow-credentials: true | {origin} | vary: origin");
    check("F21: and no star exposed", credentials, &[ORIGIN], &actual);
}

#[test]
fn answers_across_origins() {
    let backend = [
        ("access-control-allow-origin", "*"),
        ("access-control-allow-credentials", "true"),
        ("vary", "accept"),
    ];
    let got = cors_answer(cors(), "GET", &[ORIGIN], &backend);
    assert_eq!(
        got,
        "access-control-allow-origin: https://a.com | access-control-expose-headers: x-three | vary: accept & origin",
        "F21: the route speaks, not the backend"
    );
    assert_eq!(cors_answer(cors(), "GET", &[], &[("vary", "accept")]), "vary: accept");
    assert_eq!(cors_answer(cors(), "GET", &[("origin", "https://b.com")], &[]), "", "F20");
    // What the proxy itself answers may be read across origins too.
    let fail = Filter::Fail { reason: Reason::BadFilter, message: "x".into() };
    let plan = ask(&with(vec![Filter::Cors(cors()), fail]), &request("GET /", &[ORIGIN]), 0);
    let HttpAction::Answer(answer) = &plan.action else { panic!() };
    assert_eq!(answer.headers["access-control-allow-origin"], "https://a.com");
    let late = plan.answer(Refusal::new(Reason::RequestTimeout, "x"));
    assert_eq!(late.status, 504);
    assert_eq!(late.headers["access-control-allow-origin"], "https://a.com");
}

#[test]
fn faults() {
    let asked = request("GET /", &[("x", "1")]);
    let all = |abort| Fault { abort: Some((Share::ALL, abort)), ..Fault::default() };
    let check = |what: &str, fault: Fault, want: &str| {
        assert_eq!(
            short(&ask(&with(vec![Filter::Fault(fault)]), &asked, 0), &asked),
            want,
            "{what}"
        );
    };
    check("status", all(Abort::Http(503)), "503 fault");
    check("gRPC's words in HTTP", all(Abort::Grpc(5)), "404 fault");
    check("reset", all(Abort::Reset), "reset fault");
    check("no status", all(Abort::Http(7)), "500 bad_filter");
    check(
        "none",
        Fault {
            abort: Some((Share { numerator: 0, denominator: 1 }, Abort::Reset)),
            ..Fault::default()
        },
        "b /",
    );
    let headers = |value: &str| vec![field("x", value)];
    check("header", Fault { headers: headers("1"), ..all(Abort::Reset) }, "reset fault");
    check("header", Fault { headers: headers("2"), ..all(Abort::Reset) }, "b /");
    let source = SourceMatch { namespaces: vec!["shop".into()], identities: vec![] };
    check("nobody known", Fault { source: source.clone(), ..all(Abort::Reset) }, "b /");
    // The tests' clock says 1,000.
    check("expired", Fault { until: Some(1_000), ..all(Abort::Reset) }, "b /");
    check("not yet", Fault { until: Some(1_001), ..all(Abort::Reset) }, "reset fault");
    let shop = Identity::new("td", "shop", "a");
    let snapshot = with(vec![Filter::Fault(Fault { source, ..all(Abort::Reset) })]);
    let plan = ask_as(&snapshot, &asked, 0, 80, Some(&shop));
    assert_eq!(short(&plan, &asked), "reset fault");
}

#[test]
fn shares_of_faults_are_drawn_apart() {
    let share = Share { numerator: 10, denominator: 100 };
    let second = Duration::from_secs(1);
    let fault = Filter::Fault(Fault {
        delay: Some((share, second)),
        abort: Some((share, Abort::Http(500))),
        ..Fault::default()
    });
    let snapshot = with(vec![fault.clone(), fault]);
    let asked = request("GET /", &[]);
    let (mut untouched, mut delayed, mut twice) = (0, 0, 0);
    for rand in 0..20_000 {
        let plan = ask(&snapshot, &asked, rand);
        let forward = matches!(plan.action, HttpAction::Forward { .. });
        untouched += usize::from(forward && plan.delay.is_none());
        delayed += usize::from(plan.delay.is_some());
        twice += usize::from(plan.delay == Some(2 * second));
    }
    // 0.9^4; 1 - 0.9 * (0.1 + 0.9 * 0.9); 0.1 * 0.9 * 0.1, each with room of five sigmas.
    assert!((12_770..13_480).contains(&untouched), "{untouched}");
    assert!((3_340..3_900).contains(&delayed), "{delayed}");
    assert!((110..250).contains(&twice), "{twice}");
}
