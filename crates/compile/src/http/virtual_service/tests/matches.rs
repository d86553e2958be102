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

#[test]
fn match_source_namespace() {
    let compiled = shop(&format!(
        "[{{name: narrow, match: [{{sourceNamespace: buyer}}], {TO_V1}}}, {{name: wide, match: [{{uri: {{prefix: /a}}}}], {TO_V1}}}]"
    ));
    assert_eq!(order(chosen(&compiled, "buyer", 80).unwrap()), ["narrow", "wide"]);
    assert_eq!(order(chosen(&compiled, "shop", 80).unwrap()), ["wide"]);
    let compiled = shop(&format!("[{{match: [{{sourceNamespace: buyer}}], {TO_V1}}}]"));
    assert!(chosen(&compiled, "buyer", 80).is_some());
    assert!(chosen(&compiled, "shop", 80).is_none(), "reached as without rules");
}
