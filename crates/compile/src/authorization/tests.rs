//! AuthorizationPolicy against answers written down from Istio's documentation: each table gives a policy
//! and who may reach `shop/web` with it.

use proptest::prelude::*;

use super::*;
use crate::Severity;
use crate::testing::{Mesh, namespace, pod};

/// A caller: identity (empty: plaintext), address, port, and whether it gets through.
type Call = (&'static str, &'static str, u16, bool);

fn world() -> String {
    let mut yaml = String::new();
    for ns in ["shop", "bank", "test"] {
        yaml += &namespace(ns);
    }
    yaml += &pod("shop", "web", "10.0.0.1", "app: web");
    yaml += &pod("shop", "db", "10.0.0.2", "app: db");
    yaml += &pod("bank", "web", "10.0.0.3", "app: web");
    yaml
}

fn policy(namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "\n---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
         metadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n"
    )
}

fn mesh(policies: &[(&str, &str)]) -> Mesh {
    let mut yaml = world();
    for (i, (namespace, spec)) in policies.iter().enumerate() {
        yaml += &policy(namespace, &format!("p{i}"), spec);
    }
    Mesh::new(&yaml)
}

fn check(policies: &[(&str, &str)], calls: &[Call]) {
    let mesh = mesh(policies);
    for (peer, source, port, want) in calls {
        let got = mesh.allows(peer, source, "shop/web", *port);
        assert_eq!(got, *want, "{policies:?}: {peer:?} from {source} to port {port}");
    }
}

const A: &str = "10.1.0.1";

#[test]
fn actions() {
    check(&[], &[("bank/x", A, 80, true), ("", A, 80, true)]);
    // "allow nothing": an empty spec is an ALLOW policy without rules.
    check(&[("shop", "{}")], &[("bank/x", A, 80, false), ("", A, 80, false)]);
    // "allow all".
    check(&[("shop", "{rules: [{}]}")], &[("bank/x", A, 80, true), ("", A, 80, true)]);
    // "deny all".
    check(&[("shop", "{action: DENY, rules: [{}]}")], &[("bank/x", A, 80, false)]);
    // A DENY without rules denies nothing.
    check(&[("shop", "{action: DENY}")], &[("bank/x", A, 80, true)]);
    // DENY wins over ALLOW.
    let allow = "{rules: [{}]}";
    let deny = "{action: DENY, rules: [{from: [{source: {namespaces: [bank]}}]}]}";
    check(&[("shop", allow), ("shop", deny)], &[("bank/x", A, 80, false), ("test/x", A, 80, true)]);
    // Any ALLOW suffices; with several, who matches none is refused.
    let bank = "{rules: [{from: [{source: {namespaces: [bank]}}]}]}";
    let test = "{rules: [{from: [{source: {namespaces: [test]}}]}]}";
    check(
        &[("shop", bank), ("shop", test)],
        &[("bank/x", A, 80, true), ("test/x", A, 80, true), ("shop/x", A, 80, false)],
    );
}

#[test]
fn scopes() {
    let refused = |policies: &[(&str, &str)], want: [bool; 3]| {
        let mesh = mesh(policies);
        let pods = ["shop/web", "shop/db", "bank/web"];
        let got = pods.map(|pod| !mesh.allows("test/x", A, pod, 80));
        assert_eq!(got, want, "{policies:?}");
    };
    refused(&[("shop", "{}")], [true, true, false]);
    refused(&[("shop", "{selector: {matchLabels: {app: web}}}")], [true, false, false]);
    refused(&[("shop", "{selector: {matchLabels: {app: web, no: pe}}}")], [false, false, false]);
    // A selector without labels is no selector.
    refused(&[("shop", "{selector: {}}")], [true, true, false]);
    refused(&[("istio-system", "{}")], [true, true, true]);
    refused(&[("istio-system", "{selector: {matchLabels: {app: web}}}")], [true, false, true]);
    refused(&[("bank", "{}")], [false, false, true]);
    let scope = |namespace: &str, spec: &str| mesh(&[(namespace, spec)]).compiled.policies[0].scope;
    assert_eq!(scope("shop", "{selector: {}}"), Scope::Namespace);
    assert_eq!(scope("istio-system", "{}"), Scope::Global);
    let selector = "{selector: {matchLabels: {app: web}}}";
    assert_eq!(scope("istio-system", selector), Scope::WorkloadSelector);
}

#[test]
fn sources() {
    let one = |source: &str, calls: &[Call]| {
        check(&[("shop", &format!("{{rules: [{{from: [{{source: {source}}}]}}]}}"))], calls);
    };
    one(
        "{principals: [cluster.local/ns/bank/sa/x]}",
        &[
            ("bank/x", A, 80, true),
            ("bank/y", A, 80, false),
            ("bank/xx", A, 80, false),
            ("", A, 80, false),
        ],
    );
    one("{principals: ['spiffe://cluster.local/ns/bank/sa/x']}", &[("bank/x", A, 80, true)]);
    one(
        "{principals: ['cluster.local/ns/bank/*']}",
        &[("bank/x", A, 80, true), ("shop/x", A, 80, false), ("", A, 80, false)],
    );
    one("{principals: ['*/sa/x']}", &[("bank/x", A, 80, true), ("bank/y", A, 80, false)]);
    one("{principals: ['*']}", &[("bank/x", A, 80, true), ("", A, 80, false)]);
    one(
        "{notPrincipals: [cluster.local/ns/bank/sa/x]}",
        &[("bank/x", A, 80, false), ("bank/y", A, 80, true), ("", A, 80, true)],
    );
    one(
        "{namespaces: [bank]}",
        &[("bank/x", A, 80, true), ("test/x", A, 80, false), ("", A, 80, false)],
    );
    one("{namespaces: ['ba*']}", &[("bank/x", A, 80, true), ("test/x", A, 80, false)]);
    one("{notNamespaces: [bank]}", &[("bank/x", A, 80, false), ("test/x", A, 80, true)]);
    one(
        "{serviceAccounts: [bank/x, y]}",
        &[
            ("bank/x", A, 80, true),
            ("shop/y", A, 80, true),
            ("bank/y", A, 80, false),
            ("", A, 80, false),
        ],
    );
    one("{notServiceAccounts: [bank/x]}", &[("bank/x", A, 80, false), ("bank/y", A, 80, true)]);
    one(
        "{ipBlocks: [10.1.0.0/16, 192.168.0.7, 'fd00::/8']}",
        &[
            ("", "10.1.9.9", 80, true),
            ("", "10.2.0.1", 80, false),
            ("", "192.168.0.7", 80, true),
            ("", "192.168.0.8", 80, false),
            ("", "fd12::1", 80, true),
            ("", "fe80::1", 80, false),
        ],
    );
    one("{notIpBlocks: [10.1.0.0/16]}", &[("", "10.1.9.9", 80, false), ("", "10.2.0.1", 80, true)]);
    // Kinds within a source are all needed; values within a kind are alternatives.
    one(
        "{namespaces: [bank, test], ipBlocks: [10.1.0.0/16]}",
        &[
            ("bank/x", "10.1.0.1", 80, true),
            ("test/x", "10.1.0.1", 80, true),
            ("bank/x", "10.2.0.1", 80, false),
            ("shop/x", "10.1.0.1", 80, false),
        ],
    );
}

#[test]
fn operations_and_conditions() {
    let one =
        |rule: &str, calls: &[Call]| check(&[("shop", &format!("{{rules: [{rule}]}}"))], calls);
    one(
        "{to: [{operation: {ports: ['80', '443']}}]}",
        &[("", A, 80, true), ("", A, 443, true), ("", A, 81, false)],
    );
    one("{to: [{operation: {notPorts: ['80']}}]}", &[("", A, 80, false), ("", A, 81, true)]);
    // from AND to AND when.
    let rule = "{from: [{source: {namespaces: [bank]}}], to: [{operation: {ports: ['80']}}], \
                when: [{key: source.ip, values: [10.1.0.0/16]}]}";
    one(
        rule,
        &[
            ("bank/x", "10.1.0.1", 80, true),
            ("bank/x", "10.2.0.1", 80, false),
            ("bank/x", "10.1.0.1", 81, false),
            ("test/x", "10.1.0.1", 80, false),
        ],
    );
    // Entries of from are alternatives, and so are rules.
    let two = "{from: [{source: {namespaces: [bank]}}, {source: {namespaces: [test]}}]}";
    one(two, &[("bank/x", A, 80, true), ("test/x", A, 80, true), ("shop/x", A, 80, false)]);
    // Entries of when are all needed.
    let whens = "{when: [{key: source.namespace, values: [bank]}, {key: destination.port, notValues: ['81']}]}";
    one(whens, &[("bank/x", A, 80, true), ("bank/x", A, 81, false), ("test/x", A, 80, false)]);
    one(
        "{when: [{key: source.principal, values: ['*/sa/x']}]}",
        &[("bank/x", A, 80, true), ("bank/y", A, 80, false)],
    );
    one(
        "{when: [{key: source.serviceAccount, values: [bank/x]}]}",
        &[("bank/x", A, 80, true), ("bank/y", A, 80, false)],
    );
    one("{when: [{key: destination.ip, values: [10.0.0.1]}]}", &[("", A, 80, true)]);
    one("{when: [{key: destination.ip, notValues: [10.0.0.1]}]}", &[("", A, 80, false)]);
    // values and notValues of one condition: both.
    one(
        "{when: [{key: source.namespace, values: ['*'], notValues: [bank]}]}",
        &[("test/x", A, 80, true), ("bank/x", A, 80, false), ("", A, 80, false)],
    );
}

/// What needs a waypoint: less is allowed, more is denied, and the rest is said aloud.
#[test]
fn layer_7_fails_closed() {
    let allow = |rules: &str, calls: &[Call]| {
        let spec = format!("{{rules: [{rules}]}}");
        check(&[("shop", &spec)], calls);
        let mesh = mesh(&[("shop", &spec)]);
        assert!(
            mesh.compiled
                .diagnostics
                .iter()
                .any(|d| d.code == Code::L7WithoutWaypoint && d.severity == Severity::Warning)
        );
    };
    allow("{to: [{operation: {methods: [GET]}}]}", &[("bank/x", A, 80, false)]);
    allow(
        "{from: [{source: {namespaces: [bank], requestPrincipals: ['*']}}]}",
        &[("bank/x", A, 80, false)],
    );
    // Another rule stays.
    allow(
        "{to: [{operation: {paths: [/]}}]}, {from: [{source: {namespaces: [bank]}}]}",
        &[("bank/x", A, 80, true), ("test/x", A, 80, false)],
    );
    allow("{when: [{key: 'request.headers[x]', values: [y]}]}", &[("bank/x", A, 80, false)]);

    let deny = |rule: &str, severity: Severity, calls: &[Call]| {
        let spec = format!("{{action: DENY, rules: [{rule}]}}");
        check(&[("shop", &spec)], calls);
        let found = mesh(&[("shop", &spec)]).compiled.diagnostics;
        assert!(
            found.iter().any(|d| d.code == Code::L7WithoutWaypoint && d.severity == severity),
            "{rule}: {found:?}"
        );
    };
    let (error, warning) = (Severity::Error, Severity::Warning);
    // Nothing is left at layer 4: no effect, and an error.
    deny("{to: [{operation: {methods: [GET]}}]}", error, &[("bank/x", A, 80, true)]);
    deny(
        "{from: [{source: {requestPrincipals: ['*']}}], to: [{operation: {hosts: [a]}}]}",
        error,
        &[("bank/x", A, 80, true)],
    );
    // The layer 4 part denies.
    deny(
        "{to: [{operation: {methods: [GET], ports: ['80']}}]}",
        warning,
        &[("bank/x", A, 80, false), ("bank/x", A, 81, true)],
    );
    let bank = "from: [{source: {namespaces: [bank]}}]";
    deny(
        &format!("{{{bank}, to: [{{operation: {{methods: [GET]}}}}]}}"),
        warning,
        &[("bank/x", A, 80, false), ("test/x", A, 80, true)],
    );
    deny(
        &format!("{{{bank}, when: [{{key: connection.sni, values: [a]}}]}}"),
        warning,
        &[("bank/x", A, 80, false), ("test/x", A, 80, true)],
    );
    // One alternative is purely layer 7, and the port is all that is certain: everyone at that port.
    deny(
        "{from: [{source: {requestPrincipals: [a]}}, {source: {namespaces: [bank]}}], \
          to: [{operation: {ports: ['80']}}]}",
        warning,
        &[("test/x", A, 80, false), ("bank/x", A, 81, true)],
    );
    // Nothing else is certain: what can be told apart is denied, the rest is an error.
    deny(
        "{from: [{source: {requestPrincipals: [a]}}, {source: {namespaces: [bank]}}]}",
        error,
        &[("test/x", A, 80, true), ("bank/x", A, 80, false)],
    );
    // Both clauses have a purely layer 7 alternative: each other alternative denies by itself.
    deny(
        "{from: [{source: {requestPrincipals: [a]}}, {source: {namespaces: [bank]}}], \
          to: [{operation: {methods: [GET]}}, {operation: {ports: ['81']}}]}",
        error,
        &[("test/x", A, 80, true), ("bank/x", A, 80, false), ("test/x", A, 81, false)],
    );
}

/// Every attribute of layer 7, beside one of layer 4 that matches: an ALLOW must not shrink to the layer
/// 4 part, a DENY must.
#[test]
fn no_layer_7_attribute_is_forgotten() {
    let sources =
        ["requestPrincipals", "notRequestPrincipals", "remoteIpBlocks", "notRemoteIpBlocks"];
    let operations = ["hosts", "notHosts", "methods", "notMethods", "paths", "notPaths"];
    let mut rules = Vec::new();
    for field in sources {
        rules.push(format!("{{from: [{{source: {{namespaces: [bank], {field}: [10.0.0.1]}}}}]}}"));
    }
    for field in operations {
        rules.push(format!("{{to: [{{operation: {{ports: ['80'], {field}: [x]}}}}]}}"));
    }
    for rule in rules {
        let allow = format!("{{rules: [{rule}]}}");
        check(&[("shop", &allow)], &[("bank/x", A, 80, false)]);
        let deny = format!("{{action: DENY, rules: [{rule}]}}");
        check(&[("shop", &deny)], &[("bank/x", A, 80, false), ("shop/x", A, 81, true)]);
    }
}

/// `values` and `notValues` of every layer 4 attribute, each alone and both.
#[test]
fn every_condition_and_its_opposite() {
    for (key, this, other) in [
        ("source.ip", "10.1.0.1", "10.1.0.2"),
        ("source.namespace", "bank", "test"),
        ("source.principal", "cluster.local/ns/bank/sa/x", "cluster.local/ns/bank/sa/y"),
        ("source.serviceAccount", "bank/x", "bank/y"),
        ("destination.ip", "10.0.0.1", "10.0.0.2"),
        ("destination.port", "80", "81"),
    ] {
        let one = |values: &str, want: bool| {
            let spec = format!("{{rules: [{{when: [{{key: {key}, {values}}}]}}]}}");
            check(&[("shop", &spec)], &[("bank/x", A, 80, want)]);
        };
        one(&format!("values: ['{this}']"), true);
        one(&format!("values: ['{other}']"), false);
        one(&format!("notValues: ['{this}']"), false);
        one(&format!("notValues: ['{other}']"), true);
        one(&format!("values: ['{this}'], notValues: ['{this}']"), false);
        one(&format!("values: ['{this}'], notValues: ['{other}']"), true);
        one(&format!("values: ['{this}', '{other}'], notValues: ['{this}']"), false);
    }
}

#[test]
fn what_is_not_enforced_is_said() {
    let said = |spec: &str, code: Code, severity: Severity, field: &str| {
        let mesh = mesh(&[("shop", spec)]);
        assert!(mesh.has(code, severity, field), "{spec}: {:?}", mesh.compiled.diagnostics);
        mesh
    };
    let custom = "{action: CUSTOM, provider: {name: x}, rules: [{}]}";
    assert!(
        said(custom, Code::ActionNotEnforced, Severity::Error, "spec.action")
            .compiled
            .policies
            .is_empty()
    );
    let audit = "{action: AUDIT, rules: [{}]}";
    assert!(
        said(audit, Code::ActionNotEnforced, Severity::Error, "spec.action")
            .compiled
            .policies
            .is_empty()
    );
    let target = "{targetRefs: [{kind: Service, group: '', name: web}], rules: [{}]}";
    assert!(
        said(target, Code::L7WithoutWaypoint, Severity::Warning, "spec.targetRefs")
            .compiled
            .policies
            .is_empty()
    );
    said("{action: DENY}", Code::MatchesNothing, Severity::Warning, "spec.rules");
    let middle =
        "{action: DENY, rules: [{from: [{source: {principals: ['cluster.local/ns/*/sa/x']}}]}]}";
    let field = "spec.rules[0].from[0].source.principals[0]";
    said(middle, Code::MatchesNothing, Severity::Error, field);
    let nobody = "{selector: {matchLabels: {app: nobody}}}";
    said(nobody, Code::SelectsNothing, Severity::Warning, "spec.selector");
    let stranger = "{rules: [{}, {from: [{source: {namespaces: [nowhere]}}]}]}";
    said(stranger, Code::DanglingReference, Severity::Warning, "spec.rules[1]");
    let account = "{rules: [{from: [{source: {principals: [cluster.local/ns/bank/sa/x]}}]}]}";
    said(account, Code::DanglingReference, Severity::Warning, "spec.rules[0]");
    let account = "{rules: [{from: [{source: {serviceAccounts: [x]}}]}]}";
    said(account, Code::DanglingReference, Severity::Warning, "spec.rules[0]");
}

#[test]
fn provenance_names_object_field_and_line() {
    let yaml = format!(
        "apiVersion: security.istio.io/v1beta1
kind: AuthorizationPolicy
metadata: {{name: p, namespace: shop}}
spec:
  rules:
  - {{from: [{{source: {{namespaces: [shop]}}}}]}}
  - from:
    - source:
        namespaces: [shop]
{}",
        world()
    );
    let mesh = Mesh::new(&yaml);
    let policy = &mesh.compiled.policies[0];
    assert_eq!(policy.provenance.to_string(), "AuthorizationPolicy/shop/p (test.yaml:1)");
    let rule = &policy.rules[1].provenance;
    assert_eq!(rule.to_string(), "AuthorizationPolicy/shop/p spec.rules[1] (test.yaml:7)");
}

#[test]
fn dry_run() {
    let check = |value: &str, dry_run: bool, refused: bool| {
        let yaml = world()
            + &policy("shop", "p", "{}").replace(
                "namespace: shop",
                &format!("namespace: shop, annotations: {{istio.io/dry-run: '{value}'}}"),
            );
        let mesh = Mesh::new(&yaml);
        assert_eq!(mesh.compiled.policies[0].dry_run, dry_run, "{value}");
        let field = "metadata.annotations.istio.io/dry-run";
        assert_eq!(mesh.has(Code::InvalidField, Severity::Error, field), refused, "{value}");
        assert_eq!(mesh.allows("bank/x", A, "shop/web", 80), dry_run);
    };
    check("true", true, false);
    check("false", false, false);
    check("perhaps", false, true);
}

#[test]
fn cluster_local_means_the_mesh() {
    let spec =
        "{rules: [{from: [{source: {principals: [cluster.local/ns/bank/sa/x, cluster.localx]}}]}]}";
    let objects = crate::testing::objects(&(world() + &policy("shop", "p", spec)));
    let config = crate::MeshConfig { trust_domain: "td".into(), ..crate::MeshConfig::default() };
    let compiled = crate::compile(&objects, &config);
    let exact = |s: &str| StringMatch::Exact(s.into());
    assert_eq!(
        compiled.policies[0].rules[0].clauses[0][0].principals,
        [exact("cluster.local/ns/bank/sa/x"), exact("td/ns/bank/sa/x"), exact("cluster.localx")]
    );
}

/// A rule of any shape, with layer 7 parts and values that cannot be read.
fn any_rule() -> impl Strategy<Value = AuthorizationRule> {
    let values = |all: &'static [&'static str]| {
        prop::collection::vec(prop::sample::select(all).prop_map(str::to_owned), 0..3)
    };
    let source = (
        values(&["bank", "te*", "*"]),
        values(&["10.0.0.0/8", "bad", "10.1.0.1"]),
        values(&["jwt"]),
    )
        .prop_map(|(namespaces, ip_blocks, request_principals)| crate::istio::From {
            source: Source { namespaces, ip_blocks, request_principals, ..Source::default() },
        });
    let operation = (values(&["80", "81", "x"]), values(&["GET"])).prop_map(|(ports, methods)| {
        crate::istio::To { operation: Operation { ports, methods, ..Operation::default() } }
    });
    let key =
        prop::sample::select(&["source.namespace", "destination.port", "request.headers[x]"][..]);
    let when = (key, values(&["80", "bank"])).prop_map(|(key, values)| Condition {
        key: key.to_owned(),
        values,
        not_values: Vec::new(),
    });
    let some = |n| 0..n;
    (
        prop::option::of(prop::collection::vec(source, some(3))),
        prop::option::of(prop::collection::vec(operation, some(3))),
        prop::option::of(prop::collection::vec(when, some(2))),
    )
        .prop_map(|(from, to, when)| AuthorizationRule { from, to, when })
}

/// What the rule says, where it can be told. `None`: only a waypoint can tell.
fn says(rule: &AuthorizationRule, peer: &str, ip: &str, port: u16) -> Option<bool> {
    let namespace = peer.split_once('/').map_or("", |(ns, _)| ns);
    let in_namespaces = |values: &[String]| {
        values.iter().any(|v| match string_match(v) {
            StringMatch::Presence => !namespace.is_empty(),
            StringMatch::Prefix(p) => namespace.starts_with(&*p),
            other => other == StringMatch::Exact(namespace.into()),
        })
    };
    let in_blocks = |values: &[String]| -> Option<bool> {
        let blocks: Result<Vec<_>, _> = values.iter().map(|v| addresses::prefix(v)).collect();
        Some(blocks.ok()?.iter().any(|b| b.contains(ip.parse().unwrap())))
    };
    let in_ports = |values: &[String]| -> Option<bool> {
        let ports: Result<Vec<_>, _> = values.iter().map(|v| addresses::port(v)).collect();
        Some(ports.ok()?.contains(&port))
    };
    // Three-valued logic over the parts.
    let all = |parts: Vec<Option<bool>>| {
        if parts.is_empty() {
            None
        } else if parts.contains(&Some(false)) {
            Some(false)
        } else if parts.contains(&None) {
            None
        } else {
            Some(true)
        }
    };
    let any = |parts: Vec<Option<bool>>| match () {
        () if parts.contains(&Some(true)) => Some(true),
        () if parts.is_empty() || parts.contains(&None) => None,
        () => Some(false),
    };
    let mut clauses = Vec::new();
    if let Some(from) = &rule.from {
        clauses.push(any(from
            .iter()
            .map(|f| {
                let mut parts = Vec::new();
                let s = &f.source;
                if !s.namespaces.is_empty() {
                    parts.push(Some(in_namespaces(&s.namespaces)));
                }
                if !s.ip_blocks.is_empty() {
                    parts.push(in_blocks(&s.ip_blocks));
                }
                if !s.request_principals.is_empty() {
                    parts.push(None);
                }
                all(parts)
            })
            .collect()));
    }
    if let Some(to) = &rule.to {
        clauses.push(any(to
            .iter()
            .map(|t| {
                let mut parts = Vec::new();
                let o = &t.operation;
                if !o.ports.is_empty() {
                    parts.push(in_ports(&o.ports));
                }
                if !o.methods.is_empty() {
                    parts.push(None);
                }
                all(parts)
            })
            .collect()));
    }
    for when in rule.when.iter().flatten() {
        clauses.push(match when.key.as_str() {
            _ if when.values.is_empty() => None,
            "source.namespace" => Some(in_namespaces(&when.values)),
            "destination.port" => in_ports(&when.values),
            _ => None,
        });
    }
    if clauses.is_empty() { Some(true) } else { all(clauses) }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    /// Whatever the rule: what it certainly denies is denied; what it does not certainly allow is not
    /// allowed; and where nothing needs a waypoint, the answer is exactly the rule's.
    #[test]
    fn no_rule_fails_open(
        rule in any_rule(),
        peer in prop::sample::select(&["bank/x", "test/x", "shop/x", ""][..]),
        ip in prop::sample::select(&["10.1.0.1", "10.2.0.1", "11.0.0.1"][..]),
        port in prop::sample::select(&[80_u16, 81, 82][..]),
    ) {
        let certain = says(&rule, peer, ip, port);
        for action in [PolicyAction::Allow, PolicyAction::Deny] {
            let allowed = enforced(&rule, action, peer, ip, port);
            match (action, certain) {
                (PolicyAction::Allow, Some(true)) => {}
                (PolicyAction::Allow, _) => prop_assert!(!allowed, "{rule:?}"),
                (_, Some(true)) => prop_assert!(!allowed, "{rule:?}"),
                _ => {}
            }
            let mut compiler = RuleCompiler {
                namespace: "shop",
                trust_domain: "cluster.local",
                action: Action::Deny,
                at: String::new(),
                diagnostics: Vec::new(),
            };
            let clauses = compiler.rule(&rule);
            prop_assert!(clauses.iter().flatten().flatten().all(|m| *m != Match::default()));
            prop_assert!(clauses.iter().flatten().all(|clause| !clause.is_empty()));
            if compiler.diagnostics.is_empty() {
                let denied = action == PolicyAction::Deny;
                prop_assert_eq!(Some(allowed), certain.map(|matched| matched != denied));
            }
        }
    }
}

fn enforced(
    rule: &AuthorizationRule,
    action: PolicyAction,
    peer: &str,
    ip: &str,
    port: u16,
) -> bool {
    use crate::istio::AuthorizationPolicySpec;
    // Read once: thousands of cases share it.
    static WORLD: std::sync::LazyLock<Objects> =
        std::sync::LazyLock::new(|| crate::testing::objects(&world()));
    let mut objects = WORLD.clone();
    let spec = AuthorizationPolicySpec {
        rules: Some(vec![rule.clone()]),
        action,
        ..AuthorizationPolicySpec::default()
    };
    objects.insert(crate::Object {
        namespace: "shop".into(),
        name: "p".into(),
        origin: crate::Origin::new("test.yaml", 1),
        body: crate::Body::AuthorizationPolicy(Arc::new(AuthorizationPolicy {
            spec,
            ..AuthorizationPolicy::default()
        })),
    });
    Mesh::of(&objects).allows(peer, ip, "shop/web", port)
}
