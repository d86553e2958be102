//! Rules, filters, backends and timeouts, by the names of the rows they come from.

use std::time::Duration;

use model::http::{
    Cors, Filter, HeaderEdits, OriginMatch, PathMatch, PathRewrite, Redirect, RedirectPort,
    Rewrite, Share, Target, TextMatch, Timeouts,
};

use crate::http::testing::*;

const TO: &str = "backendRefs: [{name: v1, port: 80}]";

fn one(rule: &str) -> crate::Compiled {
    shop(&http(&format!("[{{{rule}}}]")))
}

/// The conditions of a route of these rules, and what was found.
fn judged(row: &str, rules: &str, want: &[&str], found: &[&str]) {
    let compiled = shop(&http(rules));
    let got = conditions(&compiled.route_status[0]);
    assert_eq!(got, want, "{row}: {:?}", compiled.route_status[0].conditions);
    assert_eq!(codes(&compiled), found, "{row}");
}

const ACCEPTED: &str = "Accepted=True Accepted";
const RESOLVED: &str = "ResolvedRefs=True ResolvedRefs";
const GOOD: &[&str] = &[ACCEPTED, RESOLVED];
const UNSUPPORTED: &[&str] = &["Accepted=False UnsupportedValue", RESOLVED];
const INCOMPATIBLE: &[&str] = &["Accepted=False IncompatibleFilters", RESOLVED];

#[test]
fn matches() {
    let only = |m: &str| {
        let compiled = one(&format!("{TO}, matches: [{m}]"));
        routes(&compiled).sets[0].matches[0].clone()
    };
    let exact = |text: &str| TextMatch::Exact(text.into());
    assert_eq!(
        only("{path: {type: Exact, value: /abc/}}").path,
        PathMatch::Exact("/abc/".into()),
        "P1"
    );
    assert_eq!(only("{path: {value: /abc}}").path, PathMatch::Segments("/abc".into()), "P2");
    assert_eq!(only("{path: {value: /abc/}}").path, PathMatch::Segments("/abc".into()), "P3");
    assert_eq!(only("{path: {value: /}}").path, PathMatch::Any, "P4");
    assert_eq!(only("{}").path, PathMatch::Any, "P4");
    let PathMatch::Regex(pattern) = only("{path: {type: RegularExpression, value: '/a.'}}").path
    else {
        panic!("P7")
    };
    assert!(pattern.matches("/ab") && !pattern.matches("/abc"), "P7");
    let m = only("{headers: [{name: Version, value: One}, {name: VERSION, value: two}]}");
    assert_eq!(m.headers.len(), 1, "M3");
    assert_eq!((&*m.headers[0].name, &m.headers[0].value), ("version", &exact("One")), "M1");
    let m = only(
        "{queryParams: [{name: A, value: b}, {name: a, value: '1+', type: RegularExpression}]}",
    );
    assert_eq!((&*m.query[0].name, &m.query[0].value), ("A", &exact("b")), "M5");
    assert!(matches!(&m.query[1].value, TextMatch::Regex(_)), "M5");
    assert_eq!(only("{method: GET}").method, Some(exact("GET")), "M7");
    assert_eq!(&*only("{headers: [{name: Host, value: a}]}").headers[0].name, "host", "M8");
    let twice = one(&format!(
        "{TO}, matches: [{{headers: [{{name: a, value: b}}, {{name: A, value: c}}]}}]"
    ));
    assert_eq!(codes(&twice), ["no_effect spec.rules[0].matches[0].headers[1]"], "M3");
}

#[test]
fn values_that_no_request_has() {
    for path in ["//a", "/./a", "/a/../b", "/a/%2e%2E/b", "/a%2fb", "/a#b", "'a'", "/a/.."] {
        let rules = format!("[{{{TO}, matches: [{{path: {{value: {path}}}}}]}}]");
        let field = "invalid_field spec.rules[0].matches[0].path.value";
        judged(&format!("P8 {path}"), &rules, UNSUPPORTED, &[field]);
    }
    let regex =
        "[{matches: [{headers: [{name: a, type: RegularExpression, value: '(a{1000}){1000}'}]}]}]";
    judged("P7", regex, UNSUPPORTED, &["invalid_field spec.rules[0].matches[0].headers[0].value"]);
    // Each is allowed; all of them together would take gigabytes in every proxy.
    let one = |n: usize| {
        format!("{{matches: [{{path: {{type: RegularExpression, value: '/{n}a{{4000}}'}}}}]}}")
    };
    let many: Vec<_> = (0..65).map(one).collect();
    let found = codes(&shop(&http(&format!("[{}]", many.join(", ")))));
    let over: Vec<_> = found.iter().filter(|code| code.ends_with("path.value")).collect();
    assert_eq!(over, ["invalid_field spec.rules[64].matches[0].path.value"], "P7");
    let name = "[{matches: [{headers: [{name: 'a b', value: c}]}]}]";
    judged("M1", name, UNSUPPORTED, &["invalid_field spec.rules[0].matches[0].headers[0].name"]);
    // M9: a word that Gateway API does not know is refused where the file is read, as by an API server.
    let parsed = crate::parse_file("f", &http("[{matches: [{path: {type: Glob, value: /a}}]}]"));
    assert_eq!(parsed.diagnostics[0].field, "spec.rules[0].matches[0].path.type", "M9");
    assert!(parsed.objects.is_empty(), "M9");
    let parsed = crate::parse_file("f", &http("[{filters: [{type: Magic}]}]"));
    assert_eq!(parsed.diagnostics[0].field, "spec.rules[0].filters[0].type", "M9");
}

fn filters(list: &str) -> Vec<Filter> {
    rule(&one(&format!("{TO}, filters: [{list}]"))).filters.clone()
}

#[test]
fn header_edits() {
    let edits =
        |text: &str| format!("{{type: RequestHeaderModifier, requestHeaderModifier: {{{text}}}}}");
    let good =
        filters(&edits("set: [{name: A, value: b}], add: [{name: C, value: d}], remove: [E, e]"));
    let want = HeaderEdits {
        set: vec![("a".into(), "b".into())],
        add: vec![("c".into(), "d".into())],
        remove: vec!["e".into()],
    };
    assert_eq!(good, [Filter::RequestHeaders(want.clone())], "F1");
    let response = edits("set: [{name: A, value: b}], add: [{name: C, value: d}], remove: [E]")
        .replace("Request", "Response")
        .replace("request", "response");
    assert_eq!(filters(&response), [Filter::ResponseHeaders(want)], "F4");
    let at = "invalid_field spec.rules[0].filters[0].requestHeaderModifier";
    for (row, text, field) in [
        ("F2", "set: [{name: a, value: b}], add: [{name: A, value: c}]", ".add[0]"),
        ("F2", "set: [{name: a, value: b}], remove: [A]", ".remove[0]"),
        ("F1", "set: [{name: 'a b', value: c}]", ".set[0].name"),
        ("F1", "add: [{name: a, value: \"b\\r\\nc: d\"}]", ".add[0].value"),
        ("F1", "set: [{name: Host, value: a}]", ".set[0].name"),
        ("F1", "remove: [Transfer-Encoding]", ".remove[0]"),
    ] {
        let rules = format!("[{{{TO}, filters: [{}]}}]", edits(text));
        judged(&format!("{row} {text}"), &rules, UNSUPPORTED, &[&format!("{at}{field}")]);
    }
    let twice = one(&format!(
        "{TO}, filters: [{}]",
        edits("set: [{name: a, value: b}, {name: A, value: c}]")
    ));
    assert_eq!(codes(&twice), ["no_effect spec.rules[0].filters[0].requestHeaderModifier.set[1]"]);
    assert_eq!(rule(&twice).filters.len(), 1);
}

#[test]
fn redirects_and_rewrites() {
    let redirect = |text: &str| {
        let list = format!("{{type: RequestRedirect, requestRedirect: {{{text}}}}}");
        let compiled = one(&format!("matches: [{{path: {{value: /a}}}}], filters: [{list}]"));
        // One that says no place leads back to where it comes from.
        let nowhere = text.is_empty() || text.starts_with("statusCode");
        let said = codes(&compiled);
        let want = ["no_effect spec.rules[0].filters[0].requestRedirect"];
        assert_eq!(said, want[..usize::from(nowhere)], "{text}");
        let Filter::Redirect(redirect) = rule(&compiled).filters[0].clone() else {
            panic!("{text}")
        };
        redirect
    };
    let plain =
        Redirect { scheme: None, host: None, port: RedirectPort::Derived, path: None, status: 302 };
    assert_eq!(redirect(""), plain, "F5");
    for status in [301, 302, 303, 307, 308] {
        assert_eq!(redirect(&format!("statusCode: {status}")).status, status, "F5");
    }
    let full = redirect(
        "scheme: https, hostname: a.example, port: 8443, path: {type: ReplaceFullPath, replaceFullPath: /x}",
    );
    assert_eq!(
        full,
        Redirect {
            scheme: Some("https".into()),
            host: Some("a.example".into()),
            port: RedirectPort::Number(8443),
            path: Some(PathRewrite::Full("/x".into())),
            status: 302
        }
    );
    let prefix = redirect("path: {type: ReplacePrefixMatch, replacePrefixMatch: ''}");
    assert_eq!(prefix.path, Some(PathRewrite::Segments("".into())), "F15");
    let rewrite = filters(
        "{type: URLRewrite, urlRewrite: {hostname: b.example, path: {type: ReplacePrefixMatch, replacePrefixMatch: /x/}}}",
    );
    let want =
        Rewrite { host: Some("b.example".into()), path: Some(PathRewrite::Segments("/x/".into())) };
    assert_eq!(rewrite, [Filter::Rewrite(want)], "F11 F14");
    for (row, text, field) in [
        ("F5", "hostname: a.example, statusCode: 418", "statusCode"),
        ("F7", "port: 0", "port"),
        ("F6", "hostname: 'a b'", "hostname"),
        ("F9", "path: {type: ReplaceFullPath, replaceFullPath: 'a b'}", "path.replaceFullPath"),
        ("F9", "path: {type: ReplaceFullPath}", "path"),
    ] {
        let rules =
            format!("[{{filters: [{{type: RequestRedirect, requestRedirect: {{{text}}}}}]}}]");
        let field = format!("invalid_field spec.rules[0].filters[0].requestRedirect.{field}");
        judged(&format!("{row} {text}"), &rules, UNSUPPORTED, &[&field]);
    }
}

#[test]
fn a_prefix_is_replaced_only_where_one_matched() {
    let bad = "{matches: [{path: {type: Exact, value: /a}}, {path: {value: /b}}], filters: [{type: URLRewrite, urlRewrite: \
               {path: {type: ReplacePrefixMatch, replacePrefixMatch: /x}}}], backendRefs: [{name: v1, port: 80}]}";
    let good = format!("{{name: good, {TO}}}");
    let found = "invalid_field spec.rules[0].filters[0].urlRewrite.path.type";
    judged("F13", &format!("[{bad}]"), UNSUPPORTED, &[found]);
    judged(
        "A7",
        &format!("[{bad}, {good}]"),
        &[ACCEPTED, RESOLVED, "PartiallyInvalid=True UnsupportedValue"],
        &[found],
    );
    let compiled = shop(&http(&format!("[{bad}, {good}]")));
    assert_eq!(order(chosen(&compiled, "any", 80).unwrap()), ["good"], "A7");
    let message = &compiled.route_status[0].conditions[2].message;
    assert!(message.starts_with("Dropped Rule spec.rules[0]"), "A7 {message}");
}

#[test]
fn filters_that_exclude_each_other() {
    let set = "{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: a, value: b}]}}";
    let mirror = "{type: RequestMirror, requestMirror: {backendRef: {name: v2, port: 80}}}";
    let redirect = "{type: RequestRedirect, requestRedirect: {hostname: a.example}}";
    let rewrite = "{type: URLRewrite, urlRewrite: {hostname: a.example}}";
    let list = |all: &[&str]| format!("[{{{TO}, filters: [{}]}}]", all.join(", "));
    judged("F16 mirrors", &list(&[mirror, mirror, set]), GOOD, &[]);
    let at = &["invalid_field spec.rules[0].filters"];
    judged("F16", &list(&[set, set]), INCOMPATIBLE, at);
    judged("F10", &list(&[redirect, rewrite]), INCOMPATIBLE, at);
    judged("F10 backends", &list(&[redirect]), GOOD, &["no_effect spec.rules[0].backendRefs"]);
    let lacking = list(&["{type: RequestMirror}"]);
    judged("F16 lacking", &lacking, UNSUPPORTED, &["invalid_field spec.rules[0].filters[0]"]);
    let two = set.replace("}}", "}, urlRewrite: {hostname: a}}");
    judged("F16 two", &list(&[&two]), UNSUPPORTED, &["invalid_field spec.rules[0].filters[0]"]);
}

#[test]
fn mirrors() {
    let share = |text: &str| {
        let list = format!(
            "{{type: RequestMirror, requestMirror: {{backendRef: {{name: v2, port: 80}}{text}}}}}"
        );
        let Filter::Mirror(mirror) = filters(&list)[0].clone() else { panic!("{text}") };
        (mirror.share.numerator, mirror.share.denominator)
    };
    let all = (Share::ALL.numerator, Share::ALL.denominator);
    assert_eq!(share(""), all, "F17");
    assert_eq!(share(", percent: 0"), (0, 100), "F17");
    assert_eq!(share(", percent: 50"), (50, 100), "F17");
    assert_eq!(share(", fraction: {numerator: 1, denominator: 1000}"), (1, 1000), "F17");
    assert_eq!(share(", fraction: {numerator: 7}"), (7, 100), "F17");
    for (text, field) in [
        ("percent: 101", ".percent"),
        ("percent: -1", ".percent"),
        ("fraction: {numerator: 2, denominator: 1}", ".fraction"),
        ("fraction: {numerator: 0, denominator: 0}", ".fraction"),
        ("percent: 1, fraction: {numerator: 1}", ""),
    ] {
        let rules = format!(
            "[{{{TO}, filters: [{{type: RequestMirror, requestMirror: {{backendRef: {{name: v2, port: 80}}, {text}}}}}]}}]"
        );
        let field = format!("invalid_field spec.rules[0].filters[0].requestMirror{field}");
        judged(&format!("F17 {text}"), &rules, UNSUPPORTED, &[&field]);
    }
    // The requests themselves go on.
    let rules = format!(
        "[{{{TO}, filters: [{{type: RequestMirror, requestMirror: {{backendRef: {{name: nobody, port: 80}}}}}}]}}]"
    );
    judged(
        "F17 nobody",
        &rules,
        &[ACCEPTED, "ResolvedRefs=False BackendNotFound"],
        &["dangling_reference spec.rules[0].filters[0].requestMirror.backendRef.name"],
    );
    assert_eq!(rule(&shop(&http(&rules))).backends.len(), 1);
}

#[test]
fn filters_that_nobody_can_apply_answer() {
    let check = |row: &str, list: &str, want: &[&str], found: &[&str]| {
        let rules = format!("[{{{TO}, filters: [{list}]}}]");
        judged(row, &rules, want, found);
        let compiled = shop(&http(&rules));
        let fails = matches!(rule(&compiled).filters[0], Filter::Fail { .. });
        assert!(fails && rule(&compiled).backends.len() == 1, "{row}");
    };
    let extension =
        "{type: ExtensionRef, extensionRef: {group: example.com, kind: Magic, name: x}}";
    check(
        "F18",
        extension,
        &[ACCEPTED, "ResolvedRefs=False InvalidKind"],
        &["dangling_reference spec.rules[0].filters[0].extensionRef"],
    );
    let auth =
        "{type: ExternalAuth, externalAuth: {protocol: GRPC, backendRef: {name: v1, port: 80}}}";
    check(
        "ExternalAuth",
        auth,
        &[ACCEPTED, RESOLVED, "PartiallyInvalid=True UnsupportedValue"],
        &["unsupported spec.rules[0].filters[0]"],
    );
    let compiled = shop(&http(&format!("[{{filters: [{auth}], {TO}}}]")));
    let message = &compiled.route_status[0].conditions[2].message;
    assert!(message.starts_with("Answered With An Error spec.rules[0].filters[0]"), "{message}");
}

#[test]
fn cors() {
    let cors = |text: &str| {
        let Filter::Cors(cors) = filters(&format!("{{type: CORS, cors: {{{text}}}}}"))[0].clone()
        else {
            panic!("{text}")
        };
        cors
    };
    let all = cors(
        "allowOrigins: ['https://*.example.com', 'https://a.example:8443', '*'], allowMethods: [GET, '*'], allowHeaders: [X-A], \
         exposeHeaders: [X-B], allowCredentials: true, maxAge: 60",
    );
    let wildcard =
        OriginMatch::Wildcard { before: "https://".into(), after: ".example.com".into() };
    let want = Cors {
        allow_origins: vec![
            wildcard,
            OriginMatch::Exact("https://a.example:8443".into()),
            OriginMatch::Any,
        ],
        allow_methods: vec!["GET".into(), "*".into()],
        allow_headers: vec!["X-A".into()],
        expose_headers: vec!["X-B".into()],
        allow_credentials: true,
        max_age: Some(60),
        forward_unmatched_preflights: false,
    };
    assert_eq!(all, want, "F20");
    assert_eq!(cors("allowOrigins: ['*']").max_age, Some(5), "F21");
    for (text, field) in [
        ("allowOrigins: [example.com]", "allowOrigins[0]"),
        ("allowOrigins: ['https://*.*.example.com']", "allowOrigins[0]"),
        ("allowMethods: ['GET, PUT']", "allowMethods[0]"),
        ("maxAge: -1", "maxAge"),
    ] {
        let rules = format!("[{{{TO}, filters: [{{type: CORS, cors: {{{text}}}}}]}}]");
        let field = format!("invalid_field spec.rules[0].filters[0].cors.{field}");
        judged(&format!("F20 {text}"), &rules, UNSUPPORTED, &[&field]);
    }
}

#[test]
fn backends() {
    let weights = |list: &str| {
        let compiled = one(&format!("backendRefs: [{list}]"));
        let backends = rule(&compiled).backends.iter();
        backends.map(|b| (b.weight, matches!(b.target, Target::Service { .. }))).collect::<Vec<_>>()
    };
    let list = "{name: v1, port: 80}, {name: v2, port: 80, weight: 0}, {name: nobody, port: 80, weight: 3}";
    assert_eq!(weights(list), [(1, true), (0, true), (3, false)], "B1 B2");
    let twice = one(&format!(
        "backendRefs: [{{name: v1, port: 80}}, {{name: v1, port: 80, weight: 2, filters: [{}]}}]",
        "{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: a, value: b}]}}"
    ));
    let filters: Vec<usize> = rule(&twice).backends.iter().map(|b| b.filters.len()).collect();
    assert_eq!(filters, [0, 1], "B4");
    let bad = |row: &str, backend: &str, reason: &str, found: &str| {
        let resolved = format!("ResolvedRefs=False {reason}");
        let found = format!("{found} spec.rules[0].backendRefs[1]");
        let rules = format!("[{{backendRefs: [{{name: v1, port: 80}}, {backend}]}}]");
        let compiled = shop(&http(&rules));
        let got = conditions(&compiled.route_status[0]);
        assert_eq!(got, [ACCEPTED, &resolved], "{row}");
        let codes = codes(&compiled);
        assert!(codes.len() == 1 && codes[0].starts_with(&found), "{row}: {codes:?}");
        let Target::Invalid { message } = &rule(&compiled).backends[1].target else {
            panic!("{row}")
        };
        assert!(!message.is_empty());
    };
    bad("A5 kind", "{group: example.com, kind: Magic, name: x}", "InvalidKind", "unsupported");
    bad(
        "A5 group",
        "{group: gateway.networking.k8s.io, kind: Service, name: v1, port: 80}",
        "InvalidKind",
        "unsupported",
    );
    bad("A5 missing", "{name: nobody, port: 80}", "BackendNotFound", "dangling_reference");
    // Trap of MeshGRPCRouteWeight: a weight of 0 does not hide it.
    bad(
        "A5 weight 0",
        "{name: nobody, port: 80, weight: 0}",
        "BackendNotFound",
        "dangling_reference",
    );
    bad(
        "A5 other namespace",
        "{name: v1, namespace: buyer, port: 80}",
        "BackendNotFound",
        "dangling_reference",
    );
    bad("B5 no port", "{name: v1}", "BackendNotFound", "dangling_reference");
    bad("B5 not a port of it", "{name: v1, port: 8080}", "BackendNotFound", "dangling_reference");
    bad("ExternalName", "{name: external, port: 80}", "InvalidKind", "unsupported");
    bad("TLS", "{name: secret, port: 443}", "UnsupportedProtocol", "unsupported");
    judged("headless", "[{backendRefs: [{name: headless, port: 80}]}]", GOOD, &[]);
    let nowhere = &["no_backend spec.rules[0].backendRefs"];
    judged("B1 all 0", "[{backendRefs: [{name: v1, port: 80, weight: 0}]}]", GOOD, nowhere);
    judged("R10", "[{backendRefs: []}]", GOOD, nowhere);
    let weight = &["invalid_field spec.rules[0].backendRefs[0].weight"];
    judged("B1 -1", "[{backendRefs: [{name: v1, port: 80, weight: -1}]}]", UNSUPPORTED, weight);
    judged(
        "B1 max",
        "[{backendRefs: [{name: v1, port: 80, weight: 1000001}]}]",
        UNSUPPORTED,
        weight,
    );
}

#[test]
fn timeouts() {
    let read = |text: &str| rule(&one(&format!("{TO}, timeouts: {{{text}}}"))).timeouts;
    let ms = |n| Some(Duration::from_millis(n));
    assert_eq!(read("request: 100ms"), Timeouts { request: ms(100), backend_request: None }, "T1");
    assert_eq!(read("request: 0s"), Timeouts::default(), "T1");
    let both = Timeouts { request: ms(2000), backend_request: ms(500) };
    assert_eq!(read("request: 2s, backendRequest: 500ms"), both, "T2");
    assert_eq!(read("request: 0s, backendRequest: 500ms").backend_request, ms(500), "T2");
    for (text, field) in [
        ("request: 1us", "request"),
        ("backendRequest: '-1s'", "backendRequest"),
        ("request: 1s, backendRequest: 2s", "backendRequest"),
    ] {
        let rules = format!("[{{{TO}, timeouts: {{{text}}}}}]");
        let field = format!("invalid_field spec.rules[0].timeouts.{field}");
        judged(&format!("T2 {text}"), &rules, UNSUPPORTED, &[&field]);
    }
}
