//! The rows of the Gateway API mesh tables, each under its name. `P`: paths, `M`: headers, queries and methods, `R`: precedence, `G`:
//! gRPC, `F`: filters, `B`: backends, `T`: timeouts. What ranks matches (R3 to R8, G3) is `compile`; here the order
//! that it gave decides. Rows about objects that are refused (P8, M3, M9, F2, F13, G4) are `compile`'s too.

use http::Request;
use model::http::*;
use model::{AppProtocol, Change, FamilyPolicy, LoadBalancing, Provenance, ServiceKey, Snapshot};

use super::*;

mod backends;
mod filters;
mod grpc;

fn key(name: &str) -> ServiceKey {
    ServiceKey {
        namespace: "shop".into(),
        hostname: format!("{name}.shop.svc.cluster.local").into(),
    }
}

/// Port 80 and 8080, both to 8080.
fn service(name: &str) -> Service {
    let port = |service_port| ServicePort {
        service_port,
        target_port: 8080,
        app_protocol: AppProtocol::Unknown,
    };
    Service {
        key: key(name),
        name: name.into(),
        vips: Arc::new([]),
        ports: Arc::new([port(80), port(8080)]),
        subject_alt_names: Arc::new([]),
        waypoint: None,
        load_balancing: LoadBalancing::default(),
        families: FamilyPolicy::default(),
    }
}

fn target(name: &str) -> Target {
    Target::Service { service: key(name), port: 80, subset: None }
}

fn backend(name: &str, weight: u32) -> Backend {
    Backend { weight, target: target(name), filters: Vec::new() }
}

fn rule(filters: Vec<Filter>, backends: Vec<Backend>) -> RouteRule {
    RouteRule {
        route: "HTTPRoute/shop/web".into(),
        name: "rules[0]".into(),
        provenance: Provenance {
            object: "HTTPRoute/shop/web".into(),
            field: "spec.rules[0]".into(),
            origin: "web.yaml:1".into(),
        },
        filters,
        backends,
        timeouts: Timeouts::default(),
    }
}

/// A set for everybody on port 80: the matches, each of which names a rule.
fn set(kind: RouteKind, rules: Vec<RouteRule>, matches: Vec<RouteMatch>) -> RouteSet {
    let rules: Vec<_> = rules.into_iter().map(Arc::new).collect();
    RouteSet::new(Audience::Everybody, Arc::new([80]), kind, rules.into(), matches.into()).unwrap()
}

fn world(sets: Vec<RouteSet>) -> Snapshot {
    let sets: Vec<_> = sets.into_iter().map(Arc::new).collect();
    let routes = ServiceRoutes { service: key("web"), ports: Arc::new([]), sets: sets.into() };
    Snapshot::default().with([Change::SetRoutes(Arc::new(routes))])
}

/// A request as the waypoint has it after `normalize`: `METHOD TARGET` and headers. Without a host it is for `web`.
fn request(line: &str, headers: &[(&str, &str)]) -> request::Parts {
    let (method, uri) = line.split_once(' ').unwrap();
    let mut request = Request::builder().method(method).uri(uri);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let mut parts = request.body(()).unwrap().into_parts().0;
    if !parts.headers.contains_key("host") && parts.uri.authority().is_none() {
        parts.headers.insert("host", "web".parse().unwrap());
    }
    normalize(&mut parts).unwrap();
    parts
}

fn ask(snapshot: &Snapshot, request: &request::Parts, rand: u64) -> HttpPlan {
    ask_as(snapshot, request, rand, 80, None)
}

fn ask_as(
    snapshot: &Snapshot,
    request: &request::Parts,
    rand: u64,
    port: u16,
    identity: Option<&Identity>,
) -> HttpPlan {
    let service = service("web");
    let facts =
        RequestFacts { service: &service, port, caller: Caller { identity }, request, now: 1_000 };
    route(snapshot, &facts, rand)
}

/// A plan in short: `SERVICE PATH` as the backend sees it, `STATUS LOCATION`, `STATUS reason`, `grpc CODE reason`.
fn short(plan: &HttpPlan, request: &request::Parts) -> String {
    match &plan.action {
        HttpAction::Forward { target: Target::Service { service, .. }, .. } => {
            let mut sent = request.clone();
            plan.edit_request(&mut sent);
            let name = service.hostname.split('.').next().unwrap();
            format!("{name} {}", sent.uri.path_and_query().unwrap())
        }
        HttpAction::Forward { target, .. } => panic!("forwards to {target}"),
        HttpAction::Reset(refusal) => format!("reset {}", refusal.reason),
        HttpAction::Answer(answer) => {
            let reason = answer.refusal.as_ref().map_or("none", |r| r.reason.code());
            let header = |name: &str| answer.headers.get(name).map(|v| v.to_str().unwrap());
            if let Some(refusal) = &answer.refusal {
                assert_eq!(header("x-ambit-reason"), Some(refusal.reason.code()));
            }
            match (header("grpc-status"), header("location")) {
                (Some(code), _) => {
                    assert_eq!(answer.status, 200);
                    format!("grpc {code} {reason}")
                }
                (None, Some(location)) => format!("{} {location}", answer.status.as_u16()),
                (None, None) => format!("{} {reason}", answer.status.as_u16()),
            }
        }
    }
}

/// Match N leads to backend `bN`.
fn check(row: &str, matches: &[RouteMatch], line: &str, headers: &[(&str, &str)], want: &str) {
    let rules = (0..matches.len()).map(|n| rule(vec![], vec![backend(&format!("b{n}"), 1)]));
    let matches = (0..).zip(matches).map(|(n, m)| RouteMatch { rule: n, ..m.clone() });
    let snapshot = world(vec![set(RouteKind::Http, rules.collect(), matches.collect())]);
    let request = request(line, headers);
    assert_eq!(short(&ask(&snapshot, &request, 7), &request), want, "{row}: {line} {headers:?}");
}

/// The same with one match.
fn one(row: &str, m: &RouteMatch, line: &str, headers: &[(&str, &str)], want: &str) {
    check(row, std::slice::from_ref(m), line, headers, want);
}

fn by_path(path: PathMatch) -> RouteMatch {
    RouteMatch { path, ..RouteMatch::default() }
}

fn exact(path: &str) -> RouteMatch {
    by_path(PathMatch::Exact(path.into()))
}

fn prefix(path: &str) -> RouteMatch {
    by_path(PathMatch::Segments(path.into()))
}

fn any() -> RouteMatch {
    RouteMatch::default()
}

fn field(name: &str, value: &str) -> FieldMatch {
    FieldMatch { name: name.into(), value: TextMatch::Exact(value.into()) }
}

/// Words for the tables.
trait Words {
    fn header(self, name: &str, value: &str) -> Self;
    fn query(self, name: &str, value: &str) -> Self;
    fn method(self, method: &str) -> Self;
}

impl Words for RouteMatch {
    fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push(field(name, value));
        self
    }

    fn query(mut self, name: &str, value: &str) -> Self {
        self.query.push(field(name, value));
        self
    }

    fn method(mut self, method: &str) -> Self {
        self.method = Some(TextMatch::Exact(method.into()));
        self
    }
}

const NO: &str = "404 no_route";

#[test]
fn paths() {
    let check = |row: &str, m: RouteMatch, path: &str, fits: bool| {
        let normal = request(&format!("GET {path}"), &[]);
        let seen = normal.uri.path_and_query().unwrap().to_string();
        let want = if fits { format!("b0 {seen}") } else { NO.to_owned() };
        check(row, &[m], &format!("GET {path}"), &[], &want);
    };
    for (path, fits) in [("/abc", true), ("/abc/", false), ("/Abc", false), ("/abcd", false)] {
        check("P1", exact("/abc"), path, fits);
    }
    for (path, fits) in [("/abc", true), ("/abc/", true), ("/abc/def", true), ("/abcd", false)] {
        check("P2", prefix("/abc"), path, fits);
        check("P3", prefix("/abc"), path, fits);
    }
    for path in ["/", "/x", "/x/y?z", "//"] {
        check("P4", any(), path, true);
    }
    check("P5", exact("/abc"), "/abc?x=1", true);
    check("P5", exact("/abc"), "/?x=/abc", false);
    check("P6", exact("/abc"), "/ABC", false);
    check("P6", prefix("/abc"), "/abc%2fdef", false);
    check("P6", exact("/abc"), "/%61bc", true);
    check("P6", exact("/a"), "/x/../a", true);
    let regex = by_path(PathMatch::Regex(Pattern::new("/v[0-9]+").unwrap()));
    check("P7", regex.clone(), "/v12", true);
    check("P7", regex.clone(), "/v12/x", false);
    check("P7", regex, "/x/v12", false);
    for odd in ["", "//", "/./", "/../", "/%2f", "/#", "abc", &"/a".repeat(1000)] {
        check("P8", exact(odd), "/abc", false);
        check("P8", prefix(odd), "/abc", odd.is_empty());
    }
    let istio = by_path(PathMatch::Prefix("/ab".into()));
    check("Istio prefix", istio, "/abcd", true);
    check("Istio ignoreUriCase", by_path(PathMatch::ExactIgnoringCase("/Ab".into())), "/aB", true);
    check(
        "Istio ignoreUriCase",
        by_path(PathMatch::PrefixIgnoringCase("/Ab".into())),
        "/aBc",
        true,
    );
    check("Istio ignoreUriCase", by_path(PathMatch::PrefixIgnoringCase("/Ab".into())), "/a", false);
}

#[test]
fn headers_queries_methods() {
    let version = any().header("version", "one");
    one("M1", &version, "GET /", &[("VERSION", "one")], "b0 /");
    one("M1", &version, "GET /", &[("version", "One")], NO);
    one("M1", &version, "GET /", &[], NO);
    let both = version.header("color", "red").query("a", "1").method("GET");
    let or = [both, prefix("/v2")];
    check("M2", &or, "GET /?a=1", &[("version", "one"), ("color", "red")], "b0 /?a=1");
    check("M2", &or, "GET /?a=1", &[("version", "one")], NO);
    check("M2", &or, "GET /", &[("version", "one"), ("color", "red")], NO);
    check("M2", &or, "POST /?a=1", &[("version", "one"), ("color", "red")], NO);
    check("M2", &or, "GET /v2", &[], "b1 /v2");
    check("M4", &[any().header("x", "a,b")], "GET /", &[("x", "a"), ("x", "b")], "b0 /");
    check("M4", &[any().header("x", "a")], "GET /", &[("x", "a"), ("x", "b")], NO);
    check(
        "M4",
        &[any().header("cookie", "a; b")],
        "GET /",
        &[("cookie", "a"), ("cookie", "b")],
        "b0 /",
    );
    let whale = any().query("animal", "whale");
    one("M5", &whale, "GET /?animal=whale&x=1", &[], "b0 /?animal=whale&x=1");
    one("M5", &whale, "GET /?animal=whaledolphin", &[], NO);
    one("M5", &whale, "GET /?Animal=whale", &[], NO);
    one("M5", &whale, "GET /?animal=Whale", &[], NO);
    check("M5", &[whale.clone().query("x", "1")], "GET /?animal=whale", &[], NO);
    check("M5", &[whale], "GET /", &[], NO);
    check(
        "M5",
        &[any().query("a b", "c&é")],
        "GET /?a+b=%63%26%C3%A9",
        &[],
        "b0 /?a+b=%63%26%C3%A9",
    );
    check("M5", &[any().query("a", "%zz")], "GET /?a=%zz", &[], "b0 /?a=%zz");
    check("M5", &[any().query("a", "")], "GET /?b&a", &[], "b0 /?b&a");
    check("M6", &[any().query("a", "1")], "GET /?a=1&a=2", &[], "b0 /?a=1&a=2");
    check("M6", &[any().query("a", "2")], "GET /?a=1&a=2", &[], NO);
    check("M7", &[any().method("GET")], "GET /", &[], "b0 /");
    check("M7", &[any().method("GET")], "get /", &[], NO);
    let host = any().header("host", "Shop.example");
    one("M8", &host, "GET /", &[("host", "shop.Example")], "b0 /");
    one("M8", &host, "GET http://shop.example/", &[], "b0 /");
    check("M8", &[host], "GET /", &[("host", "shop.example.org")], NO);
}

#[test]
fn values_that_are_no_text_fit_presence_only() {
    let present = |mut m: RouteMatch| {
        for f in m.headers.iter_mut().chain(&mut m.query) {
            f.value = TextMatch::Present;
        }
        m
    };
    let mut asked = request("GET /?q=%ff", &[]);
    asked.headers.insert("x", http::HeaderValue::from_bytes(b"\xff").unwrap());
    let fits = |m: RouteMatch| {
        let snapshot =
            world(vec![set(RouteKind::Http, vec![rule(vec![], vec![backend("b", 1)])], vec![m])]);
        matches!(ask(&snapshot, &asked, 0).action, HttpAction::Forward { .. })
    };
    assert!(fits(present(any().header("x", ""))));
    assert!(fits(present(any().query("q", ""))));
    assert!(!fits(any().header("x", "\u{fffd}")));
    assert!(!fits(any().query("q", "\u{fffd}")));
    assert!(!fits(present(any().header("y", ""))));
    let without = RouteMatch { without_headers: vec![field("x", "a")], ..any() };
    assert!(fits(without));
}

/// Whichever stands first wins, whatever it is made of: the index changes no order.
#[test]
fn precedence() {
    let in_order = |row: &str,
                    winner: &RouteMatch,
                    loser: &RouteMatch,
                    line: &str,
                    headers: &[(&str, &str)]| {
        let want = format!("b0 {}", line.split_once(' ').unwrap().1);
        check(row, &[winner.clone(), loser.clone()], line, headers, &want);
        check(row, &[loser.clone(), winner.clone()], line, headers, &want);
    };
    let regex = by_path(PathMatch::Regex(Pattern::new("/a.*").unwrap()));
    in_order("R1", &exact("/a"), &prefix("/a"), "GET /a", &[]);
    in_order("R2", &prefix("/a/b"), &prefix("/a"), "GET /a/b/c", &[]);
    in_order("R2", &exact("/a/b"), &regex, "GET /a/b", &[]);
    in_order("R2", &regex, &prefix("/a"), "GET /a/b", &[]);
    in_order("R3", &any().method("GET"), &any(), "GET /", &[]);
    in_order("R4", &any().header("x", "1"), &any(), "GET /", &[("x", "1")]);
    in_order("R5", &any().query("x", "1"), &any(), "GET /?x=1", &[]);
    for row in ["R6", "R7", "R8", "R12"] {
        in_order(row, &prefix("/a"), &prefix("/a"), "GET /a", &[]);
    }
    // R9: over all rules, so a longer prefix goes before a query.
    let flat = [prefix("/path5"), any().query("animal", "hydra"), any()];
    check("R9", &flat, "GET /path5?animal=hydra", &[], "b0 /path5?animal=hydra");
    check("R9", &flat, "GET /path?animal=hydra", &[], "b1 /path?animal=hydra");
    check("R9", &flat, "GET /path", &[], "b2 /path");
}

#[test]
fn nothing_fits_or_nothing_is_there() {
    check("R10", &[prefix("/a")], "GET /b", &[], NO);
    check("R10", &[], "GET /", &[], NO);
    let snapshot = world(vec![set(RouteKind::Http, vec![rule(vec![], vec![])], vec![any()])]);
    let asked = request("GET /", &[]);
    let plan = ask(&snapshot, &asked, 0);
    assert_eq!(short(&plan, &asked), "500 bad_backend", "R10: no backends");
    let HttpAction::Answer(Answer { refusal: Some(refusal), .. }) = &plan.action else { panic!() };
    assert_eq!(refusal.message, "HTTPRoute/shop/web rules[0]: the rule has no backend");
    assert!(refusal.provenance.is_some());
    assert!(plan.rule.is_some());
}

#[test]
fn who_and_where() {
    let named = |audience: Audience, ports: &[u16], name: &str| {
        let rules = vec![rule(vec![], vec![backend(name, 1)])];
        let set = set(RouteKind::Http, rules, vec![prefix("/r")]);
        RouteSet { audience, ports: ports.into(), ..set }
    };
    let consumer = || Audience::Namespace("consumer".into());
    let snapshot = world(vec![
        named(Audience::Everybody, &[80], "producer"),
        named(consumer(), &[80, 8080], "consumer"),
    ]);
    let asked = request("GET /r", &[]);
    let other = request("GET /", &[]);
    let (shop, client) = (Identity::new("td", "shop", "a"), Identity::new("td", "consumer", "a"));
    let check =
        |row: &str, identity: Option<&Identity>, port: u16, asked: &request::Parts, want: &str| {
            let plan = ask_as(&snapshot, asked, 0, port, identity);
            assert_eq!(short(&plan, asked), want, "{row} {identity:?} {port}");
        };
    check("A8: the producer's for all", None, 80, &asked, "producer /r");
    check("A8: the producer's for all", Some(&shop), 80, &asked, "producer /r");
    check("A8: the consumer's in its place", Some(&client), 80, &asked, "consumer /r");
    check("A8: not merged", Some(&client), 80, &other, NO);
    check("A8: a port without routes", Some(&shop), 8080, &other, "web /");
    check("A8: the consumer's port", Some(&client), 8080, &asked, "consumer /r");
    check("A8: the consumer's port", Some(&client), 8080, &other, NO);
    // As where routes cannot be read, and every port is closed.
    let of_all_ports = world(vec![named(Audience::Everybody, &[], "all")]);
    for port in [80, 8080] {
        let plan = ask_as(&of_all_ports, &asked, 0, port, Some(&client));
        assert_eq!(short(&plan, &asked), "all /r", "a set for every port");
    }
    let no_routes = Snapshot::default();
    let plan = ask(&no_routes, &other, 0);
    assert_eq!(short(&plan, &other), "web /", "no routes at all");
    assert!(plan.rule.is_none());
    let HttpAction::Forward { target, http2: false } = plan.action else { panic!() };
    assert_eq!(target, Target::Service { service: key("web"), port: 80, subset: None });
}

#[test]
fn callers() {
    let (web, db) = (Identity::new("td", "shop", "web"), Identity::new("td", "data", "db"));
    let check =
        |namespaces: &[&str], identities: &[&Identity], who: Option<&Identity>, fits: bool| {
            let source = SourceMatch {
                namespaces: namespaces.iter().map(|n| (*n).into()).collect(),
                identities: identities.iter().map(|i| (*i).clone()).collect(),
            };
            let m = RouteMatch { source, ..any() };
            let rules = vec![rule(vec![], vec![backend("b", 1)])];
            let snapshot = world(vec![set(RouteKind::Http, rules, vec![m.clone()])]);
            let asked = request("GET /", &[]);
            let plan = ask_as(&snapshot, &asked, 0, 80, who);
            assert_eq!(matches!(plan.action, HttpAction::Forward { .. }), fits, "{m:?} {who:?}");
        };
    check(&[], &[], None, true);
    check(&["shop"], &[], Some(&web), true);
    check(&["shop", "data"], &[], Some(&db), true);
    check(&["data"], &[], Some(&web), false);
    check(&["shop"], &[], None, false);
    check(&[], &[&web], Some(&web), true);
    check(&[], &[&web], Some(&db), false);
    check(&[], &[&web], None, false);
    check(&["data"], &[&web], Some(&web), false);
}

#[test]
fn schemes_and_authorities() {
    let scheme = RouteMatch { scheme: Some(TextMatch::Exact("https".into())), ..any() };
    one("scheme", &scheme, "GET https://web/", &[], "b0 /");
    check("scheme", &[scheme], "GET /", &[], NO);
    let authority = |m: TextMatch| RouteMatch { authority: Some(m), ..any() };
    let exact = authority(TextMatch::Exact("web:80".into()));
    one("authority", &exact, "GET /", &[("host", "WEB:80")], "b0 /");
    check("authority", &[exact], "GET /", &[], NO);
    let regex = authority(TextMatch::Regex(Pattern::new("w[a-e]b").unwrap()));
    check("authority", &[regex], "GET /", &[("host", "WEB")], "b0 /");
    check("authority", &[authority(TextMatch::Prefix("W".into()))], "GET /", &[], "b0 /");
}
