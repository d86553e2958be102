//! Which rules there are: hosts, gateways, whose requests, which ports; and that nothing is skipped. One test per honoured
//! field; the table of fields names them.

use model::http::{Audience, Filter, PathMatch, RouteRule, RouteSet, Target, TextMatch};

use crate::http::testing::{SHOP, chosen, http, order, routes};
use crate::testing::{namespace, objects, pod};
use crate::{Code, Compiled, Diagnostic, Folder, MeshConfig, Severity, compile};

mod actions;
mod matches;

/// A VirtualService `v` in a namespace; `metadata` may say more.
fn object(namespace: &str, metadata: &str, spec: &str) -> String {
    format!(
        "\n---\n{{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {{namespace: {namespace}, {metadata}}}, \
         spec: {{{spec}}}}}\n"
    )
}

/// What the shop becomes with more objects, and everything that is said.
fn world(more: &str) -> (Compiled, Vec<Diagnostic>) {
    let mut folder = Folder::new();
    folder.set_file(0, "test.yaml", &format!("{SHOP}{more}"));
    let compiled = compile(&folder.objects(), &MeshConfig::default());
    let all = folder.diagnostics().into_iter().chain(compiled.diagnostics.iter().cloned());
    let ours = |d: &Diagnostic| {
        ["VirtualService", "DestinationRule"].iter().any(|k| d.object.starts_with(k))
    };
    let found = all.filter(ours).collect();
    (compiled, found)
}

/// The shop with one VirtualService of `web` that has these rules, without a finding.
fn shop(rules: &str) -> Compiled {
    let (compiled, found) =
        world(&object("shop", "name: v", &format!("hosts: [web], http: {rules}")));
    assert_eq!(found, [], "{rules}");
    compiled
}

/// `code field` of what is said of these rules.
fn said(rules: &str) -> Vec<String> {
    let (_, found) = world(&object("shop", "name: v", &format!("hosts: [web], http: {rules}")));
    brief(&found)
}

fn brief(found: &[Diagnostic]) -> Vec<String> {
    found.iter().map(|d| format!("{} {}", d.code, d.field)).collect()
}

/// The rules for everybody on port 80.
fn set(compiled: &Compiled) -> &RouteSet {
    chosen(compiled, "any", 80).unwrap()
}

fn first(compiled: &Compiled) -> &RouteRule {
    &set(compiled).rules[0]
}

/// Whether a rule answers with an error, and says why.
fn fails(rule: &RouteRule) -> bool {
    matches!(&rule.filters[..], [Filter::Fail { message, .. }] if !message.is_empty())
        && rule.backends.is_empty()
}

const TO_V1: &str = "route: [{destination: {host: v1}}]";

/// The YAML that people bring along, with a namespace and the subsets by label.
#[test]
fn a_canary_as_people_write_it() {
    let yaml = format!(
        "{}{}{}
---
apiVersion: v1
kind: Service
metadata: {{name: api-service, namespace: production}}
spec:
  clusterIP: 10.96.0.9
  selector: {{app: api}}
  ports: [{{name: http, port: 80, targetPort: 8080}}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {{name: production-waypoint, namespace: production, labels: {{istio.io/waypoint-for: service}}}}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{{name: mesh, port: 15008, protocol: HBONE}}]
---
apiVersion: networking.istio.io/v1beta1
kind: VirtualService
metadata: {{name: api-canary, namespace: production}}
spec:
  hosts: [api-service]
  http:
  - match: [{{headers: {{x-canary: {{exact: \"true\"}}}}}}]
    route: [{{destination: {{host: api-service, subset: canary}}}}]
  - route:
    - {{destination: {{host: api-service, subset: stable}}, weight: 90}}
    - {{destination: {{host: api-service, subset: canary}}, weight: 10}}
---
apiVersion: networking.istio.io/v1beta1
kind: DestinationRule
metadata: {{name: api-service, namespace: production}}
spec:
  host: api-service
  subsets:
  - {{name: stable, labels: {{version: v1}}}}
  - {{name: canary, labels: {{version: v2}}}}
",
        namespace("production")
            .replace("name: production", "name: production, labels: {istio.io/use-waypoint: production-waypoint}"),
        pod("production", "one", "10.0.0.1", "app: api, version: v1"),
        pod("production", "two", "10.0.0.2", "app: api, version: v2"),
    );
    let mut objects = objects(&yaml);
    objects.programmed.insert(("production".into(), "production-waypoint".into()));
    let compiled = compile(&objects, &MeshConfig::default());
    let said = |d: &&Diagnostic| {
        d.object.starts_with("VirtualService") || d.object.starts_with("DestinationRule")
    };
    assert_eq!(compiled.diagnostics.iter().find(said), None);
    let members: Vec<(String, usize)> =
        compiled.subsets.iter().map(|s| (s.key.to_string(), s.workloads.len())).collect();
    let key = "production/api-service.production.svc.cluster.local";
    assert_eq!(members, [(format!("{key}/canary"), 1), (format!("{key}/stable"), 1)]);
    let set = &compiled.routes[0].sets[0];
    assert_eq!((set.matches.len(), set.rules.len(), &set.audience), (2, 2, &Audience::Everybody));
    assert_eq!(&*set.matches[0].headers[0].name, "x-canary");
    assert_eq!(set.matches[0].headers[0].value, TextMatch::Exact("true".into()));
    assert_eq!(set.matches[1].path, PathMatch::Any);
    let sends = |rule: &RouteRule| -> Vec<String> {
        rule.backends.iter().map(|b| format!("{} {}", b.weight, b.target)).collect()
    };
    assert_eq!(sends(&set.rules[0]), [format!("1 {key}:80 subset canary")]);
    assert_eq!(
        sends(&set.rules[1]),
        [format!("90 {key}:80 subset stable"), format!("10 {key}:80 subset canary")]
    );
    let rule = &set.rules[1];
    assert_eq!((&*rule.route, &*rule.name), ("VirtualService/production/api-canary", "http[1]"));
    assert!(
        rule.provenance
            .to_string()
            .starts_with("VirtualService/production/api-canary spec.http[1] (test.yaml:")
    );
}

#[test]
fn hosts() {
    let check = |hosts: &str, services: &[&str], want: &[&str]| {
        let (compiled, found) =
            world(&object("shop", "name: v", &format!("hosts: {hosts}, http: [{{{TO_V1}}}]")));
        let with = compiled.routes.iter().filter(|r| !r.sets.is_empty());
        let names: Vec<&str> =
            with.map(|r| r.service.hostname.split('.').next().unwrap()).collect();
        assert_eq!(names, services, "{hosts}");
        assert_eq!(brief(&found), want, "{hosts}");
    };
    check("[web]", &["web"], &[]);
    check("[web.shop.svc.cluster.local, web, v2]", &["v2", "web"], &[]);
    check("[nobody, web]", &["web"], &["dangling_reference spec.hosts[0]"]);
    check("[web.shop]", &[], &["dangling_reference spec.hosts[0]"]);
    check("[example.com]", &[], &["dangling_reference spec.hosts[0]"]);
    check("['*']", &[], &["unsupported spec.hosts[0]"]);
    check("['*.shop.svc.cluster.local']", &[], &["unsupported spec.hosts[0]"]);
    check("[headless]", &[], &["unsupported spec.hosts[0]"]);
    check("[]", &[], &["unsupported spec.hosts"]);
    // A short name is of the object's namespace.
    let (compiled, found) =
        world(&object("buyer", "name: v", &format!("hosts: [web], http: [{{{TO_V1}}}]")));
    assert!(compiled.routes.iter().all(|r| r.sets.is_empty()));
    assert_eq!(brief(&found), ["dangling_reference spec.hosts[0]"]);
}

/// What goes to a port that does not speak HTTP is not looked into, and the object is told.
#[test]
fn ports_that_speak_no_http() {
    let check = |hosts: &str, rules: &str, want: &[&str]| {
        let mixed = "\n---\n{apiVersion: v1, kind: Service, metadata: {name: mixed, namespace: shop}, spec: \
                     {selector: {app: p}, ports: [{name: http, port: 80}, {name: tcp, port: 90}]}}";
        let spec = format!("hosts: {hosts}, http: [{rules}]");
        let (_, found) = world(&(object("shop", "name: v", &spec) + mixed));
        let got: Vec<String> =
            found.iter().map(|d| format!("{} {} {}", d.severity, d.code, d.field)).collect();
        assert_eq!(got, want, "{hosts} {rules}");
    };
    let all = format!("{{{TO_V1}}}");
    check(
        "[raw]",
        &all.replace("v1}", "v1, port: {number: 80}}"),
        &["warning no_effect spec.hosts"],
    );
    check("[mixed]", &all, &["info no_effect spec.hosts"]);
    let on = |port: u16| format!("{{match: [{{port: {port}}}], {TO_V1}}}");
    check("[mixed]", &on(80), &[]);
    check(
        "[mixed]",
        &on(90),
        &["warning no_effect spec.hosts", "warning no_effect spec.http[0].match[0].port"],
    );
    // A port of one of several hosts.
    check("[web, v1]", &on(8080), &[]);
    check("[web, v1]", &on(81), &["warning matches_nothing spec.http[0].match[0].port"]);
}

#[test]
fn gateways() {
    let check = |gateways: &str, in_force: bool, want: &[&str]| {
        let spec = format!(
            "hosts: [web], gateways: {gateways}, http: [{{route: [{{destination: {{host: v1.shop.svc.cluster.local}}}}]}}]"
        );
        let (compiled, found) = world(&object("shop", "name: v", &spec));
        assert_eq!(chosen(&compiled, "any", 80).is_some(), in_force, "{gateways}");
        assert_eq!(brief(&found), want, "{gateways}");
    };
    check("[]", true, &[]);
    check("[mesh]", true, &[]);
    check("[edge, mesh]", true, &["unsupported spec.gateways[0]"]);
    check("[edge]", false, &["unsupported spec.gateways[0]"]);
}

#[test]
fn export_to() {
    let check = |home: &str, export: &str, audiences: &[&str], want: &[&str]| {
        let spec = format!(
            "hosts: [web.shop.svc.cluster.local], exportTo: {export}, http: [{{route: [{{destination: {{host: v1.shop.svc.cluster.local}}}}]}}]"
        );
        let (compiled, found) = world(&object(home, "name: v", &spec));
        let name = |a: &Audience| match a {
            Audience::Everybody => "*".to_owned(),
            Audience::Namespace(ns) => ns.to_string(),
        };
        let got: Vec<String> = routes(&compiled).sets.iter().map(|s| name(&s.audience)).collect();
        assert_eq!(got, audiences, "{home} {export}");
        assert_eq!(brief(&found), want, "{home} {export}");
    };
    check("shop", "[]", &["*"], &[]);
    check("shop", "['*']", &["*"], &[]);
    check("shop", "['.']", &["shop"], &[]);
    check("shop", "['.', buyer]", &["buyer", "shop"], &[]);
    check("shop", "[buyer, '*']", &["*"], &[]);
    check("shop", "['~']", &[], &["matches_nothing spec.exportTo[0]"]);
    check("shop", "['Not a name']", &[], &["invalid_field spec.exportTo[0]"]);
    // Nobody routes the requests of others to a Service of others.
    check("buyer", "['.']", &["buyer"], &[]);
    check("buyer", "[]", &["buyer"], &["no_effect spec.hosts"]);
    check("buyer", "['*']", &["buyer"], &["no_effect spec.exportTo"]);
    check("buyer", "[buyer, other]", &["buyer"], &["no_effect spec.exportTo"]);
    check("buyer", "[other]", &[], &["matches_nothing spec.exportTo"]);
    check("buyer", "['~']", &[], &["matches_nothing spec.exportTo[0]"]);
    check("buyer", "['.', 'Not a name']", &["buyer"], &["invalid_field spec.exportTo[1]"]);
}

#[test]
fn rule_names() {
    let compiled = shop(
        "[{name: first, match: [{uri: {exact: /a}}, {name: b, uri: {exact: /b}}], route: [{destination: {host: v1}}]}, \
         {match: [{name: c, uri: {exact: /c}}], route: [{destination: {host: v1}}]}, {route: [{destination: {host: v1}}]}]",
    );
    assert_eq!(order(set(&compiled)), ["first", "first.b", "http[1].c", "http[2]"]);
}

/// The first that fits decides: no precedence but the order of the list.
#[test]
fn the_order_is_kept() {
    let rule =
        |name: &str, uri: &str| format!("{{name: {name}, match: [{{uri: {{{uri}}}}}], {TO_V1}}}");
    let rules =
        [rule("short", "prefix: /a"), rule("long", "prefix: /aaa"), rule("exact", "exact: /a")];
    assert_eq!(order(set(&shop(&format!("[{}]", rules.join(", "))))), ["short", "long", "exact"]);
}

#[test]
fn one_object_decides() {
    let at = |name: &str, time: &str| {
        format!("name: {name}, creationTimestamp: '2026-01-01T00:00:0{time}Z'")
    };
    let spec =
        |name: &str, more: &str| format!("hosts: [web]{more}, http: [{{name: {name}, {TO_V1}}}]");
    let (compiled, found) = world(
        &(object("shop", &at("a", "2"), &spec("newer", ""))
            + &object("shop", &at("b", "1"), &spec("older", ""))),
    );
    assert_eq!(order(set(&compiled)), ["older"]);
    assert_eq!(brief(&found), ["route_conflict spec.hosts"]);
    assert_eq!(found[0].object, "VirtualService/shop/a");
    assert!(found[0].message.contains("VirtualService/shop/b"), "{}", found[0].message);
    // Rules for one namespace stand beside those for everybody.
    let (compiled, found) = world(
        &(object("shop", &at("a", "2"), &spec("own", ", exportTo: ['.']"))
            + &object("shop", &at("b", "1"), &spec("all", ""))),
    );
    assert_eq!(found, []);
    assert_eq!(order(chosen(&compiled, "shop", 80).unwrap()), ["own"]);
    assert_eq!(order(chosen(&compiled, "buyer", 80).unwrap()), ["all"]);
}

#[test]
fn gateway_api_wins() {
    let v = |spec: &str| {
        object(
            "shop",
            "name: v",
            &format!("hosts: [web]{spec}, http: [{{name: virtual, {TO_V1}}}]"),
        )
    };
    let (compiled, found) = world(&(v("") + &http("[{name: route}]")));
    assert_eq!(order(set(&compiled)), ["route"]);
    assert!(found.iter().all(|d| d.code == Code::RouteConflict && d.severity == Severity::Error));
    assert_eq!(found.len(), 3, "one for each port: {found:?}");
    // For some clients only: Gateway API's routes are for them, too.
    let (compiled, found) = world(&(v(", exportTo: ['.']") + &http("[{name: route}]")));
    assert_eq!(order(chosen(&compiled, "shop", 80).unwrap()), ["route"]);
    assert_eq!(found.len(), 3);
    // The other way round there is no conflict: consumers go their own way.
    let consumer =
        http("[{name: route}]").replace("namespace: shop, name: r", "namespace: buyer, name: r");
    let (compiled, found) = world(&(v("") + &consumer));
    assert_eq!(order(chosen(&compiled, "buyer", 80).unwrap()), ["route"]);
    assert_eq!(order(chosen(&compiled, "shop", 80).unwrap()), ["virtual"]);
    assert_eq!(found, []);
}

/// Each pattern is taken; all of them together would take gigabytes in every proxy. The others stay.
#[test]
fn patterns_of_one_object_have_a_limit_together() {
    let many: Vec<_> = (0..65).map(|n| format!("{{uri: {{regex: '/{n}a{{4000}}'}}}}")).collect();
    let rules = format!("[{{match: [{}], {TO_V1}}}]", many.join(", "));
    let (compiled, found) =
        world(&object("shop", "name: v", &format!("hosts: [web], http: {rules}")));
    assert_eq!(brief(&found), ["unsupported spec.http[0].match[64].uri.regex"]);
    let set = set(&compiled);
    let failing = |m: &&model::http::RouteMatch| fails(&set.rules[m.rule as usize]);
    assert_eq!(set.matches.len(), 65);
    assert_eq!(set.matches.iter().filter(failing).count(), 1);
}

/// What cannot be honoured answers with an error, and its requests do not get past it.
#[test]
fn what_cannot_be_honoured_fails_closed() {
    let check = |rule: &str, want: &str| {
        let rules = format!("[{{{rule}}}, {{{TO_V1}}}]");
        let (compiled, found) =
            world(&object("shop", "name: v", &format!("hosts: [web], http: {rules}")));
        let set = set(&compiled);
        assert!(fails(first(&compiled)), "{rule}: {:?}", set.rules);
        assert_eq!(set.matches[0].rule, 0, "{rule}");
        assert_eq!(brief(&found), [want], "{rule}");
        assert_eq!(found[0].severity, Severity::Error);
    };
    check(
        "match: [{uri: {prefix: /a}, sourceLabels: {app: x}}], route: [{destination: {host: v1}}]",
        "unsupported spec.http[0].match[0].sourceLabels",
    );
    check(
        "match: [{uri: {prefix: /a}}], delegate: {name: other}",
        "unsupported spec.http[0].delegate.name",
    );
    let rule = |more: &str| {
        format!("match: [{{uri: {{prefix: /a}}}}], route: [{{destination: {{host: v1}}}}], {more}")
    };
    check(
        &rule("headers: {request: {set: {x: '%DOWNSTREAM_REMOTE_ADDRESS%'}}}"),
        "unsupported spec.http[0].headers.request.set.x",
    );
    check(
        &rule("headers: {request: {set: {content-length: '1'}}}"),
        "unsupported spec.http[0].headers.request.set.content-length",
    );
    // What our engine of patterns does not take, and others may: the rule is lost, the object is not.
    for text in [r"(a{1000}){1000}", r"\Qa.b\E", &"a".repeat(1025)] {
        check(
            &format!(
                "match: [{{uri: {{regex: '{text}'}}}}], route: [{{destination: {{host: v1}}}}]"
            ),
            "unsupported spec.http[0].match[0].uri.regex",
        );
    }
    check(
        &rule(r"rewrite: {uriRegexRewrite: {match: '\Qa', rewrite: a}}"),
        "unsupported spec.http[0].rewrite.uriRegexRewrite.match",
    );
    check(
        "match: [{uri: {prefix: /a}}], route: [{destination: {host: v1}, weight: 2000000}, {destination: {host: v2}, weight: 1}]",
        "unsupported spec.http[0].route[0].weight",
    );
    check(&rule("rewrite: {uri: ' '}"), "unsupported spec.http[0].rewrite.uri");
    check(
        "match: [{headers: {'@request.auth.claims.sub': {exact: a}}}], route: [{destination: {host: v1}}]",
        "unsupported spec.http[0].match[0].headers.@request.auth.claims.sub",
    );
    check(
        "match: [{uri: {prefix: /a}}], directResponse: {status: 200, body: {bytes: /w==}}",
        "unsupported spec.http[0].directResponse.body.bytes",
    );
    // A destination that is not there takes its share of the requests, with an error.
    let nowhere = |to: &str, want: &str| {
        let rules = format!("[{{route: [{{destination: {{{to}}}}}]}}]");
        let (compiled, found) =
            world(&object("shop", "name: v", &format!("hosts: [web], http: {rules}")));
        assert!(matches!(first(&compiled).backends[0].target, Target::Invalid { .. }), "{to}");
        assert_eq!(brief(&found), [want], "{to}");
    };
    nowhere("host: nobody", "dangling_reference spec.http[0].route[0].destination.host");
    nowhere("host: example.com", "dangling_reference spec.http[0].route[0].destination.host");
    nowhere(
        "host: v1, port: {number: 81}",
        "dangling_reference spec.http[0].route[0].destination.port",
    );
    nowhere(
        "host: v1, subset: none",
        "dangling_reference spec.http[0].route[0].destination.subset",
    );
    nowhere("host: secret", "unsupported spec.http[0].route[0].destination.port");
}

/// What an API server would refuse costs the object, and an object that is in force stays.
#[test]
fn what_an_api_server_refuses() {
    let good = object("shop", "name: v", &format!("hosts: [web], http: [{{name: good, {TO_V1}}}]"));
    let check = |rule: &str, want: &str| {
        let bad = object("shop", "name: v", &format!("hosts: [web], http: [{{{rule}}}]"));
        let mut folder = Folder::new();
        folder.set_file(0, "shop.yaml", SHOP);
        folder.set_file(0, "v.yaml", &good);
        folder.set_file(0, "v.yaml", &bad);
        let found = brief(&folder.diagnostics());
        assert!(found.contains(&want.to_owned()), "{rule}: {found:?}");
        assert!(found.contains(&"last_good_in_force ".to_owned()), "{rule}: {found:?}");
        let compiled = compile(&folder.objects(), &MeshConfig::default());
        assert_eq!(order(set(&compiled)), ["good"], "{rule}");
    };
    let rule = |more: &str| format!("{TO_V1}, {more}");
    check("name: nothing", "invalid_field spec.http[0]");
    check(&rule("redirect: {uri: /a}"), "invalid_field spec.http[0]");
    check("redirect: {uri: /a}, rewrite: {uri: /b}", "invalid_field spec.http[0].rewrite");
    check(
        &rule("match: [{uri: {exact: /a, prefix: /b}}]"),
        "invalid_field spec.http[0].match[0].uri",
    );
    check(&rule("match: [{uri: {regex: '('}}]"), "invalid_field spec.http[0].match[0].uri.regex");
    check(
        &rule("match: [{headers: {'a b': {}}}]"),
        "invalid_field spec.http[0].match[0].headers.a b",
    );
    check(
        &rule("match: [{headers: {A: {}, a: {}}}]"),
        "invalid_field spec.http[0].match[0].headers.a",
    );
    check(&rule("match: [{port: 65536}]"), "invalid_field spec.http[0].match[0].port");
    check(&rule("timeout: 5"), "invalid_field spec.http[0].timeout");
    check(&rule("timeout: soon"), "invalid_field spec.http[0].timeout");
    check(
        &rule("headers: {request: {set: {'a b': c}}}"),
        "invalid_field spec.http[0].headers.request.set.a b",
    );
    check(
        &rule("headers: {request: {set: {a: \"b\\r\\nc: d\"}}}"),
        "invalid_field spec.http[0].headers.request.set.a",
    );
    check(
        &rule("mirror: {host: v2}, mirrorPercentage: {value: 101}"),
        "invalid_field spec.http[0].mirrorPercentage.value",
    );
    check(
        &rule("mirror: {host: v2}, mirrors: [{destination: {host: v2}}]"),
        "invalid_field spec.http[0].mirrors",
    );
    check("route: [{destination: {}}]", "invalid_field spec.http[0].route[0].destination.host");
    check(
        "route: [{destination: {host: v1}}, {destination: {host: v2}}]",
        "invalid_field spec.http[0].route",
    );
    check(
        "route: [{destination: {host: v1}, weight: -1}]",
        "invalid_field spec.http[0].route[0].weight",
    );
    check("redirect: {redirectCode: 200}", "invalid_field spec.http[0].redirect.redirectCode");
    check("redirect: {}", "invalid_field spec.http[0].redirect");
    check("redirect: {redirectCode: 302}", "invalid_field spec.http[0].redirect");
    check("redirect: {scheme: ftp}", "invalid_field spec.http[0].redirect.scheme");
    check("redirect: {authority: 'a b'}", "invalid_field spec.http[0].redirect.authority");
    // No proxy could read these, and the whole Service's routes with them.
    for port in ["0", "+80", "65536", ""] {
        check(
            &format!("redirect: {{authority: 'b.example:{port}'}}"),
            "invalid_field spec.http[0].redirect.authority",
        );
    }
    check(
        &rule("rewrite: {authority: 'b.example:+80'}"),
        "invalid_field spec.http[0].rewrite.authority",
    );
    check(
        &rule("rewrite: {uriRegexRewrite: {match: '.*', rewrite: '/.#'}}"),
        "invalid_field spec.http[0].rewrite.uriRegexRewrite.rewrite",
    );
    check(
        "redirect: {port: 1, derivePort: FROM_REQUEST_PORT}",
        "invalid_field spec.http[0].redirect.derivePort",
    );
    check(
        "match: [{uri: {exact: /a}}], redirect: {prefixRewrite: /b}",
        "invalid_field spec.http[0].redirect.prefixRewrite",
    );
    check("directResponse: {status: 99}", "invalid_field spec.http[0].directResponse.status");
    check(&rule("corsPolicy: {maxAge: x}"), "invalid_field spec.http[0].corsPolicy.maxAge");
    check(
        &rule("fault: {delay: {fixedDelay: 2x, percentage: {value: 1}}}"),
        "invalid_field spec.http[0].fault.delay.fixedDelay",
    );
    check(&rule("retrys: {}"), "unknown_field spec.http[0].retrys");
    check(&rule("retries: {attemts: 1}"), "unknown_field spec.http[0].retries.attemts");
}

/// What is around the edge: the compiler does not rely on what the edge refuses.
#[test]
fn the_compiler_is_closed_without_the_edge() {
    use crate::istio::VirtualService;
    let rule = |json: serde_json::Value| {
        let spec = serde_json::json!({"spec": {"hosts": ["web"], "http": [json]}});
        let mut all = objects(SHOP);
        let value: VirtualService = serde_json::from_value(spec).unwrap();
        all.insert(crate::Object {
            namespace: "shop".into(),
            name: "v".into(),
            origin: crate::Origin::new("test.yaml", 1),
            body: crate::Body::VirtualService(std::sync::Arc::new(value)),
        });
        let compiled = compile(&all, &MeshConfig::default());
        assert!(
            compiled
                .diagnostics
                .iter()
                .any(|d| d.code == Code::InvalidField && !d.object.is_empty())
        );
        first(&compiled).clone()
    };
    let to = serde_json::json!([{"destination": {"host": "v1"}}]);
    assert!(fails(&rule(serde_json::json!({"route": to, "match": [{"uri": {"regex": "("}}]}))));
    assert!(fails(&rule(serde_json::json!({"route": to, "timeout": "soon"}))));
    assert!(fails(&rule(serde_json::json!({}))));
    assert!(fails(&rule(serde_json::json!({"route": to, "redirect": {}}))));
    // Only a fault is the other way round.
    let harmless = rule(
        serde_json::json!({"route": to, "fault": {"abort": {"httpStatus": 1, "percentage": {"value": 100}}}}),
    );
    assert_eq!((harmless.filters.len(), harmless.backends.len()), (0, 1));
}

#[test]
fn what_is_hardly_meant() {
    let check = |rules: &str, want: &[&str]| assert_eq!(said(rules), want, "{rules}");
    let to = TO_V1;
    check(
        &format!("[{{{to}}}, {{match: [{{uri: {{exact: /a}}}}], {to}}}]"),
        &["matches_nothing spec.http[1]"],
    );
    check(
        &format!("[{{match: [{{name: all}}], {to}}}, {{{to}}}]"),
        &["matches_nothing spec.http[1]"],
    );
    check(
        &format!("[{{match: [{{port: 81}}], {to}}}]"),
        &["matches_nothing spec.http[0].match[0].port"],
    );
    check(
        &format!("[{{match: [{{uri: {{prefix: a}}}}], {to}}}]"),
        &["matches_nothing spec.http[0].match[0].uri"],
    );
    check(
        &format!("[{{match: [{{headers: {{uri: {{exact: /a}}}}}}], {to}}}]"),
        &["no_effect spec.http[0].match[0].headers.uri"],
    );
    check(
        &format!("[{{retries: {{attempts: 3, perTryTimeout: 1s}}, {to}}}]"),
        &[
            "unsupported spec.http[0].retries.attempts",
            "unsupported spec.http[0].retries.perTryTimeout",
        ],
    );
    check(&format!("[{{retries: {{attempts: 0}}, {to}}}]"), &[]);
    check(
        &format!("[{{fault: {{delay: {{fixedDelay: 1s}}}}, {to}}}]"),
        &["no_effect spec.http[0].fault.delay"],
    );
    let long = "fault: {delay: {fixedDelay: 2h, percentage: {value: 1}}}";
    check(&format!("[{{{long}, {to}}}]"), &["unsupported spec.http[0].fault.delay.fixedDelay"]);
    // Without an HTTP part nothing is in force.
    let (compiled, found) = world(&object(
        "shop",
        "name: v",
        "hosts: [web], tcp: [{route: [{destination: {host: v1}}]}]",
    ));
    assert!(chosen(&compiled, "any", 80).is_none());
    assert_eq!(brief(&found), ["unsupported spec.tcp"]);
}
