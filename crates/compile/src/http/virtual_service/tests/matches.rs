//! What rules match, field by field.

use model::http::{FieldMatch, RouteMatch};

use super::*;

/// The match that a match of the YAML becomes.
fn matched(yaml: &str) -> RouteMatch {
    let compiled = shop(&format!("[{{match: [{{{yaml}}}], {TO_V1}}}]"));
    let set = set(&compiled);
    assert_eq!(set.matches.len(), 1);
    assert!(!fails(&set.rules[0]), "{yaml}");
    set.matches[0].clone()
}

fn exact(text: &str) -> TextMatch {
    TextMatch::Exact(text.into())
}

fn prefix(text: &str) -> TextMatch {
    TextMatch::Prefix(text.into())
}

#[test]
fn match_uri() {
    assert_eq!(matched("uri: {exact: /a}").path, PathMatch::Exact("/a".into()));
    assert_eq!(matched("uri: {prefix: /a}").path, PathMatch::Prefix("/a".into()));
    let PathMatch::Regex(pattern) = matched("uri: {regex: '/v[0-9]+'}").path else {
        panic!("no pattern")
    };
    assert!(pattern.matches("/v12") && !pattern.matches("/v12/x"), "the whole path");
    for anything in ["uri: {}", "uri: {prefix: ''}", "uri: {regex: '*'}", ""] {
        assert_eq!(matched(anything), RouteMatch::default(), "{anything}");
    }
}

/// A rule means the same path however it spells it, and says when there is none.
#[test]
fn match_uri_as_requests_are_spelled() {
    let check = |uri: &str, want: PathMatch| {
        assert_eq!(matched(&format!("uri: {{{uri}}}")).path, want, "{uri}");
    };
    check("exact: /a%2fb", PathMatch::Exact("/a%2Fb".into()));
    check("prefix: /%7Euser", PathMatch::Prefix("/~user".into()));
    check("prefix: /café", PathMatch::Prefix("/caf%C3%A9".into()));
    check("exact: '/a b'", PathMatch::Exact("/a%20b".into()));
    check("prefix: /a%4", PathMatch::Prefix("/a%4".into()));
    // What ends a prefix may go on.
    check("prefix: /a/.", PathMatch::Prefix("/a/.".into()));
    check("exact: /a//b", PathMatch::Exact("/a//b".into()));
    for uri in [
        "exact: '/x?y=1'",
        "prefix: '/x#y'",
        "exact: '/a\\b'",
        "exact: /a/..",
        "prefix: /a/./b",
        "exact: /%2e%2E/a",
        "prefix: a",
    ] {
        let found = said(&format!("[{{match: [{{uri: {{{uri}}}}}], {TO_V1}}}]"));
        assert_eq!(found, ["matches_nothing spec.http[0].match[0].uri"], "{uri}");
    }
}

#[test]
fn match_ignore_uri_case() {
    let path = |uri: &str| matched(&format!("ignoreUriCase: true, uri: {{{uri}}}")).path;
    assert_eq!(path("exact: /A"), PathMatch::ExactIgnoringCase("/A".into()));
    assert_eq!(path("prefix: /A"), PathMatch::PrefixIgnoringCase("/A".into()));
    let PathMatch::Regex(pattern) = path("regex: /A") else { panic!("no pattern") };
    assert!(!pattern.matches("/a"), "patterns say it themselves");
}

#[test]
fn match_scheme() {
    assert_eq!(matched("scheme: {exact: https}").scheme, Some(exact("https")));
}

#[test]
fn match_method() {
    assert_eq!(matched("method: {exact: GET}").method, Some(exact("GET")));
    assert_eq!(matched("method: {prefix: P}").method, Some(prefix("P")));
}

#[test]
fn match_authority() {
    assert_eq!(matched("authority: {exact: web.shop}").authority, Some(exact("web.shop")));
    assert!(matches!(matched("authority: {regex: 'web.*'}").authority, Some(TextMatch::Regex(_))));
}

#[test]
fn match_headers() {
    let check = |yaml: &str, name: &str, value: TextMatch| {
        let want = FieldMatch { name: name.into(), value };
        assert_eq!(matched(&format!("headers: {{{yaml}}}")).headers, [want], "{yaml}");
    };
    check("x-a: {exact: b}", "x-a", exact("b"));
    check("X-A: {exact: B}", "x-a", exact("B"));
    check("x-a: {prefix: b}", "x-a", prefix("b"));
    check("x-a: {}", "x-a", TextMatch::Present);
    check("x-a: {regex: '*'}", "x-a", TextMatch::Present);
    check("x-a: {exact: ''}", "x-a", exact(""));
    check("':authority': {exact: web}", "host", exact("web"));
    assert_eq!(matched("headers: {a: {}, b: {}}").headers.len(), 2);
}

#[test]
fn match_without_headers() {
    let m = matched("withoutHeaders: {x-a: {exact: b}, x-b: {}}");
    let want = [("x-a", exact("b")), ("x-b", TextMatch::Present)];
    let got: Vec<_> = m.without_headers.iter().map(|f| (&*f.name, f.value.clone())).collect();
    assert_eq!(got, want);
}

#[test]
fn match_query_params() {
    let m = matched("queryParams: {Key: {exact: 'true'}, empty: {exact: ''}, there: {}}");
    let want = [("Key", exact("true")), ("empty", exact("")), ("there", TextMatch::Present)];
    let got: Vec<_> = m.query.iter().map(|f| (&*f.name, f.value.clone())).collect();
    assert_eq!(got, want);
}

#[test]
fn match_port() {
    let compiled = shop(&format!(
        "[{{name: alt, match: [{{port: 8080}}], {TO_V1}}}, {{name: http, match: [{{uri: {{prefix: /a}}, port: 80}}], {TO_V1}}}]"
    ));
    assert_eq!(order(chosen(&compiled, "any", 80).unwrap()), ["http"]);
    assert_eq!(order(chosen(&compiled, "any", 8080).unwrap()), ["alt"]);
    assert!(chosen(&compiled, "any", 7070).is_none(), "reached as without rules");
}

#[test]
fn match_gateways() {
    let rules = format!(
        "[{{name: edge, match: [{{gateways: [edge]}}], {TO_V1}}}, {{name: both, match: [{{gateways: [edge, mesh]}}], {TO_V1}}}]"
    );
    let (compiled, found) =
        world(&object("shop", "name: v", &format!("hosts: [web], http: {rules}")));
    assert_eq!(order(set(&compiled)), ["both"]);
    assert_eq!(
        brief(&found),
        [
            "unsupported spec.http[0].match[0].gateways",
            "unsupported spec.http[1].match[0].gateways"
        ]
    );
}

/// The names of the rules that a client of a namespace may meet, in their order.
fn seen<'a>(compiled: &'a Compiled, client: &str, port: u16) -> Vec<&'a str> {
    let set = chosen(compiled, client, port).unwrap();
    let meets = |m: &&RouteMatch| {
        m.source.is_anybody() || m.source.namespaces.iter().any(|ns| **ns == *client)
    };
    set.matches.iter().filter(meets).map(|m| &*set.rules[m.rule as usize].name).collect()
}

#[test]
fn match_source_namespace() {
    let compiled = shop(&format!(
        "[{{name: narrow, match: [{{sourceNamespace: buyer}}], {TO_V1}}}, {{name: wide, match: [{{uri: {{prefix: /a}}}}], {TO_V1}}}]"
    ));
    assert_eq!(seen(&compiled, "buyer", 80), ["narrow", "wide"]);
    assert_eq!(seen(&compiled, "shop", 80), ["wide"]);
    // For others there is no rule: they reach the Service itself.
    let compiled = shop(&format!(
        "[{{name: narrow, match: [{{sourceNamespace: buyer, port: 80}}], {TO_V1}}}]"
    ));
    assert_eq!(seen(&compiled, "buyer", 80), ["narrow", "no rule"]);
    assert_eq!(seen(&compiled, "shop", 80), ["no rule"]);
    let rule = set(&compiled).rules.last().unwrap();
    let service = routes(&compiled).service.clone();
    assert_eq!(rule.backends[0].target, Target::Service { service, port: 80, subset: None });
    assert!(chosen(&compiled, "buyer", 8080).is_none(), "reached as without rules");
    // Only for some clients in the first place: a set for these.
    let (compiled, found) = world(&object(
        "shop",
        "name: v",
        &format!(
            "hosts: [web], exportTo: [buyer, shop], http: [{{name: narrow, match: [{{sourceNamespace: buyer}}], {TO_V1}}}]"
        ),
    ));
    assert_eq!(found, []);
    assert_eq!(seen(&compiled, "buyer", 80), ["narrow"]);
    assert!(chosen(&compiled, "shop", 80).is_none());
}

/// Two thousand of everything: the work grows with the object, and each finding is there once.
#[test]
fn large_objects_are_compiled_in_time() {
    let rule = |i: usize| {
        format!(
            "{{name: r{i}, match: [{{sourceNamespace: n{i}, gateways: [edge, mesh]}}], {TO_V1}}}"
        )
    };
    let rules: Vec<String> = (0..2000).map(rule).collect();
    for last in [String::new(), format!(", {{name: last, {TO_V1}}}")] {
        let spec = format!("hosts: [web], http: [{}{last}]", rules.join(", "));
        let (compiled, found) = world(&object("shop", "name: v", &spec));
        assert_eq!(found.len(), 2000);
        // Where clients are sent to the Service itself, each port is its own.
        let (end, sets) = if last.is_empty() { ("no rule", 3) } else { ("last", 1) };
        assert_eq!(routes(&compiled).sets.len(), sets);
        assert_eq!(seen(&compiled, "n1999", 80), ["r1999", end]);
        assert_eq!(seen(&compiled, "other", 80), [end]);
    }
    let names: Vec<String> = (0..2000).map(|i| format!("n{i}")).collect();
    let spec = format!("hosts: [web], exportTo: [{}], http: [{{{TO_V1}}}]", names.join(", "));
    let (compiled, found) = world(&object("shop", "name: v", &spec));
    assert_eq!(brief(&found), ["limit_exceeded spec.exportTo"]);
    assert_eq!(seen(&compiled, "n7", 80), ["closed", "no rule"]);
    assert_eq!(seen(&compiled, "other", 80), ["no rule"]);
    assert!(matches!(set(&compiled).rules[0].filters[..], [Filter::Fail { .. }]));
}
