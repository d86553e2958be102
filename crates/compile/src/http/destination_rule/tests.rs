//! Subsets: which endpoints, whose objects count.

use crate::testing::{namespace, objects, pod};
use crate::{Compiled, Diagnostic, Folder, MeshConfig, compile};

/// Two pods of a Service, one without a label for its version, one that the Service does not select.
fn world() -> String {
    let service = "
---
{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop}, spec: {clusterIP: 10.96.0.1, selector: {app: web}, ports: [{port: 80}]}}
";
    namespace("shop")
        + &namespace("buyer")
        + service
        + &pod("shop", "a", "10.0.0.1", "app: web, version: v1")
        + &pod("shop", "b", "10.0.0.2", "app: web, version: v2")
        + &pod("shop", "c", "10.0.0.3", "app: web")
        + &pod("shop", "other", "10.0.0.4", "app: other, version: v1")
}

fn rule(namespace: &str, metadata: &str, spec: &str) -> String {
    format!(
        "\n---\n{{apiVersion: networking.istio.io/v1beta1, kind: DestinationRule, metadata: {{namespace: {namespace}, {metadata}}}, \
         spec: {{{spec}}}}}\n"
    )
}

fn run(rules: &str) -> (Compiled, Vec<String>) {
    let mut folder = Folder::new();
    folder.set_file(0, "test.yaml", &(world() + rules));
    let compiled = compile(&folder.objects(), &MeshConfig::default());
    let ours = |d: &Diagnostic| d.object.starts_with("DestinationRule");
    let all = folder.diagnostics().into_iter().chain(compiled.diagnostics.iter().cloned());
    let found =
        all.filter(ours).map(|d| format!("{} {} {}", d.severity, d.code, d.field)).collect();
    (compiled, found)
}

/// `name: pods` of each subset.
fn subsets(compiled: &Compiled) -> Vec<String> {
    let pods = |s: &model::http::Subset| {
        let names: Vec<&str> = s.workloads.iter().filter_map(|w| w.0.rsplit('/').next()).collect();
        format!("{}: {}", s.key.name, names.join(" "))
    };
    compiled.subsets.iter().map(|s| pods(s)).collect()
}

#[test]
fn host() {
    let check = |home: &str, host: &str, there: bool, want: &[&str]| {
        let (compiled, found) =
            run(&rule(home, "name: d", &format!("host: '{host}', subsets: [{{name: all}}]")));
        assert_eq!(subsets(&compiled).len(), usize::from(there), "{home} {host}");
        assert_eq!(found, want, "{home} {host}");
    };
    check("shop", "web", true, &[]);
    check("shop", "web.shop.svc.cluster.local", true, &[]);
    check("shop", "nobody", false, &["warning dangling_reference spec.host"]);
    check("shop", "web.shop", false, &["warning dangling_reference spec.host"]);
    check("shop", "*.shop.svc.cluster.local", false, &["error unsupported spec.host"]);
    check("shop", "", false, &["error invalid_field spec.host"]);
    // A namespace does not name parts of somebody else's Service; the root namespace does.
    check("buyer", "web.shop.svc.cluster.local", false, &["warning no_effect spec.host"]);
    check("istio-system", "web.shop.svc.cluster.local", true, &[]);
}

#[test]
fn subset_labels() {
    let check = |labels: &str, pods: &str, want: &[&str]| {
        let (compiled, found) = run(&rule(
            "shop",
            "name: d",
            &format!("host: web, subsets: [{{name: s, labels: {{{labels}}}}}]"),
        ));
        assert_eq!(subsets(&compiled), [format!("s: {pods}")], "{labels}");
        assert_eq!(found, want, "{labels}");
    };
    check("version: v1", "a", &[]);
    check("version: v2", "b", &[]);
    check("", "a b c", &[]);
    check("app: web, version: v1", "a", &[]);
    let nobody = ["warning selects_nothing spec.subsets[0].labels"];
    check("version: v3", "", &nobody);
    check("app: other", "", &nobody);
}

#[test]
fn subset_names() {
    let (compiled, found) = run(&rule(
        "shop",
        "name: d",
        "host: web, subsets: [{name: stable, labels: {version: v1}}, {name: canary, labels: {version: v2}}]",
    ));
    assert_eq!(subsets(&compiled), ["canary: b", "stable: a"]);
    assert_eq!(found, [""; 0]);
    let key = &compiled.subsets[0].key;
    assert_eq!(key.to_string(), "shop/web.shop.svc.cluster.local/canary");
    for bad in ["name: a/b", "name: ''", "labels: {}", "name: x}, {name: x"] {
        let (compiled, found) =
            run(&rule("shop", "name: d", &format!("host: web, subsets: [{{{bad}}}]")));
        assert_eq!(subsets(&compiled), [""; 0], "{bad}");
        assert!(
            found.iter().all(|f| f.starts_with("error invalid_field spec.subsets[")),
            "{bad}: {found:?}"
        );
        assert!(!found.is_empty(), "{bad}");
    }
}

#[test]
fn several_objects() {
    let at = |name: &str, time: &str| {
        format!("name: {name}, creationTimestamp: '2026-01-01T00:00:0{time}Z'")
    };
    let one = |label: &str, name: &str| {
        format!("host: web, subsets: [{{name: {name}, labels: {{version: {label}}}}}]")
    };
    // Read together.
    let (compiled, found) = run(
        &(rule("shop", "name: a", &one("v1", "x")) + &rule("shop", "name: b", &one("v2", "y")))
    );
    assert_eq!(
        (subsets(&compiled), found),
        (vec!["x: a".to_owned(), "y: b".to_owned()], Vec::new())
    );
    // One name twice: the older stays.
    let (compiled, found) = run(&(rule("shop", &at("a", "2"), &one("v1", "x"))
        + &rule("shop", &at("b", "1"), &one("v2", "x"))));
    assert_eq!(subsets(&compiled), ["x: b"]);
    assert_eq!(found, ["warning conflicting_policies spec.subsets[0].name"]);
    // The root namespace only where the Service's own says nothing.
    let wide = rule(
        "istio-system",
        "name: w",
        &one("v1", "x").replace("web", "web.shop.svc.cluster.local"),
    );
    let (compiled, found) = run(&(rule("shop", "name: a", &one("v2", "y")) + &wide));
    assert_eq!(subsets(&compiled), ["y: b"]);
    assert_eq!(found, ["info no_effect spec.host"]);
}

/// Fields that are not served are named one by one; the subsets are there all the same.
#[test]
fn traffic_policies_are_named() {
    let (compiled, found) = run(&rule(
        "shop",
        "name: d",
        "host: web, exportTo: ['*'], trafficPolicy: {tls: {mode: ISTIO_MUTUAL}, loadBalancer: {simple: ROUND_ROBIN}, \
         connectionPool: {tcp: {maxConnections: 1, connectTimeout: 1s}}}, \
         subsets: [{name: s, trafficPolicy: {outlierDetection: {consecutive5xxErrors: 3}}}]",
    ));
    assert_eq!(subsets(&compiled), ["s: a b c"]);
    assert_eq!(
        found,
        [
            "warning unsupported spec.subsets[0].trafficPolicy.outlierDetection.consecutive5xxErrors",
            "warning unsupported spec.trafficPolicy.connectionPool.tcp.connectTimeout",
            "warning unsupported spec.trafficPolicy.connectionPool.tcp.maxConnections",
            "warning unsupported spec.trafficPolicy.loadBalancer.simple",
        ]
    );
    let selector = "host: web, subsets: [{name: s}], workloadSelector: {matchLabels: {app: x}}";
    let (compiled, found) = run(&rule("shop", "name: d", selector));
    assert_eq!(subsets(&compiled), [""; 0]);
    assert_eq!(found, ["error unsupported spec.workloadSelector"]);
}

#[test]
fn pods_that_come_and_go() {
    let yaml = world()
        + &rule("shop", "name: d", "host: web, subsets: [{name: s, labels: {version: v1}}]");
    let mut all = objects(&yaml);
    all.pods.remove(&("shop".into(), "a".into()));
    let compiled = compile(&all, &MeshConfig::default());
    assert_eq!(subsets(&compiled), ["s: "]);
}
