//! What is wrong with a file, and where exactly.

use super::*;
use crate::Severity;

/// `severity code object field file:line` of every finding.
fn findings(text: &str) -> Vec<String> {
    let parsed = parse_file("f.yaml", text);
    let brief =
        |d: &Diagnostic| format!("{} {} {} {} {}", d.severity, d.code, d.object, d.field, d.origin);
    parsed.diagnostics.iter().map(brief).collect()
}

fn check(text: &str, want: &[&str]) {
    assert_eq!(findings(text), want, "{text}");
}

#[test]
fn broken_text() {
    check("a: [1\n", &["error invalid_syntax   f.yaml:2"]);
    check("just text", &["error invalid_object   f.yaml:1"]);
    check("- a\n- b", &["error invalid_object   f.yaml:1"]);
    check("apiVersion: v1", &["error invalid_object  kind f.yaml:1"]);
    check("kind: Pod", &["error invalid_object  apiVersion f.yaml:1"]);
    check("{apiVersion: 1, kind: Pod}", &["error invalid_object  apiVersion f.yaml:1"]);
    // One bad document does not hide the others.
    let parsed =
        parse_file("f", "kind: Pod\n---\n{apiVersion: v1, kind: Namespace, metadata: {name: a}}");
    assert_eq!((parsed.objects.len(), parsed.complete), (1, false));
}

#[test]
fn kinds() {
    let object =
        |api: &str, kind: &str| format!("apiVersion: {api}\nkind: {kind}\nmetadata: {{name: x}}\n");
    let one = |api: &str, kind: &str, want: &str, complete: bool| {
        let parsed = parse_file("f.yaml", &object(api, kind));
        let got: Vec<String> =
            parsed.diagnostics.iter().map(|d| format!("{} {}", d.severity, d.code)).collect();
        assert_eq!(got, [want], "{api} {kind}");
        assert_eq!(parsed.complete, complete, "{api} {kind}");
        assert!(parsed.objects.is_empty());
    };
    one("v1", "ConfigMap", "warning unhandled_kind", true);
    one("v1", "ResourceQuota", "info unhandled_kind", true);
    one("networking.k8s.io/v1", "NetworkPolicy", "warning unhandled_kind", true);
    one("gateway.networking.k8s.io/v1", "TCPRoute", "warning unhandled_kind", true);
    one("gateway.networking.x-k8s.io/v1alpha1", "XMesh", "warning unhandled_kind", true);
    one("gateway.networking.k8s.io/v1alpha2", "GRPCRoute", "error unknown_kind", false);
    one("gateway.networking.k8s.io/v1", "HttpRoute", "error unknown_kind", false);
    one("networking.istio.io/v1alpha3", "EnvoyFilter", "warning unhandled_kind", true);
    one("networking.istio.io/v1", "Sidecar", "warning unhandled_kind", true);
    one("networking.istio.io/v1", "Gateway", "warning unhandled_kind", true);
    one("extensions.istio.io/v1alpha1", "WasmPlugin", "warning unhandled_kind", true);
    one("telemetry.istio.io/v1", "Telemetry", "warning unhandled_kind", true);
    one("security.istio.io/v1", "RequestAuthentication", "warning unhandled_kind", true);
    one("networking.istio.io/v1", "VirtualServise", "error unknown_kind", false);
    one("networking.istio.io/v2", "VirtualService", "error unknown_kind", false);
    one("ambit.io/v1", "HTTPFault", "error unknown_kind", false);
    one("rbac.authorization.k8s.io/v1", "Role", "info unhandled_kind", true);
    one("cert-manager.io/v1", "Certificate", "error unknown_kind", true);
    // Slips in what we do handle.
    one("v1", "Pdo", "error unknown_kind", false);
    one("v1", "Deployment", "error unknown_kind", false);
    one("extensions/v1beta1", "Deployment", "error unknown_kind", false);
    one("security.istio.io/v1beat1", "AuthorizationPolicy", "error unknown_kind", false);
    let help = &parse_file("f", &object("v1", "Deployment")).diagnostics[0].help;
    assert_eq!(help, "Deployment is served as apps/v1");
    let envoy = &parse_file("f", &object("networking.istio.io/v1alpha3", "EnvoyFilter"));
    assert!(envoy.diagnostics[0].message.contains("there is no Envoy to patch"));
    for version in ["v1", "v1beta1"] {
        for kind in ["AuthorizationPolicy", "PeerAuthentication"] {
            check(&object(&format!("security.istio.io/{version}"), kind), &[]);
        }
    }
}

#[test]
fn names() {
    let named = |kind: &str, metadata: &str| {
        let text = format!("apiVersion: v1\nkind: {kind}\nmetadata: {metadata}\n");
        parse_file("f", &text).diagnostics.into_iter().map(|d| d.field).collect::<Vec<_>>()
    };
    assert!(named("ServiceAccount", "{name: a.b-c.1}").is_empty());
    for bad in ["''", "A", "a_b", "a/b", "'../x'", "-a", "a-", "a..b", "'a b'", "1", "null"] {
        assert_eq!(
            named("ServiceAccount", &format!("{{name: {bad}}}")),
            ["metadata.name"],
            "{bad}"
        );
    }
    assert_eq!(named("ServiceAccount", "{namespace: x}"), ["metadata.name"]);
    assert_eq!(named("ServiceAccount", "{name: x, namespace: '../y'}"), ["metadata.namespace"]);
    assert_eq!(named("ServiceAccount", "{name: x, namespace: 3}"), ["metadata.namespace"]);
    assert_eq!(named("Service", "{name: 1a}"), ["metadata.name"]);
    assert_eq!(named("Service", "{name: a.b}"), ["metadata.name"]);
    assert_eq!(named("Namespace", &format!("{{name: {}}}", "a".repeat(64))), ["metadata.name"]);
    let object =
        &parse_file("f", "{apiVersion: v1, kind: ServiceAccount, metadata: {name: x}}").objects[0];
    assert_eq!(object.id(), "ServiceAccount/default/x");
    let object =
        &parse_file("f", "{apiVersion: v1, kind: Node, metadata: {name: x, namespace: y}}").objects
            [0];
    assert_eq!(object.id(), "Node/x");
}

#[test]
fn wrong_types_name_field_and_line() {
    let policy = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop}
spec:
  action: ALLOW
  rules:
  - from:
    - source:
        namespaces: bank
";
    check(
        policy,
        &[
            "error invalid_field AuthorizationPolicy/shop/p spec.rules[0].from[0].source.namespaces f.yaml:9",
        ],
    );
    check(
        &policy.replace("ALLOW", "allow"),
        &["error invalid_field AuthorizationPolicy/shop/p spec.action f.yaml:5"],
    );
    let ports = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop}
spec:
  rules:
  - to:
    - operation:
        ports:
        - '80'
        - 443
";
    check(
        ports,
        &[
            "error invalid_field AuthorizationPolicy/shop/p spec.rules[0].to[0].operation.ports[1] f.yaml:10",
        ],
    );
    assert_eq!(parse_file("f", ports).diagnostics[0].help, "put the value in quotes");
    let service = "apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  ports:
  - port: http
";
    check(service, &["error invalid_field Service/shop/web spec.ports[0].port f.yaml:6"]);
    let labels = "apiVersion: v1
kind: Pod
metadata:
  name: web
  labels:
    app.kubernetes.io/name: web
    app.kubernetes.io/on: yes
spec: {containers: [{name: a}]}
";
    check(
        labels,
        &["error invalid_field Pod/default/web metadata.labels.app.kubernetes.io/on f.yaml:7"],
    );
}

#[test]
fn unknown_fields() {
    let policy = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop}
spec:
  rules:
  - form:
    - source: {namespaces: [bank]}
    to:
    - operation: {port: ['80'], ports: ['80']}
status: {anything: 1}
";
    check(
        policy,
        &[
            "error unknown_field AuthorizationPolicy/shop/p spec.rules[0].form f.yaml:6",
            "error unknown_field AuthorizationPolicy/shop/p spec.rules[0].to[0].operation.port f.yaml:9",
        ],
    );
    let parsed = parse_file("f", policy);
    assert_eq!(parsed.diagnostics[0].help, "did you mean \"from\"?");
    assert!(parsed.objects.is_empty() && !parsed.complete);
    // Kubernetes kinds go on without the field.
    let pod = "apiVersion: v1
kind: Pod
metadata: {name: p}
spec:
  hostNetwrk: true
  containers:
  - name: a
    imagee: b
";
    check(
        pod,
        &[
            "warning unknown_field Pod/default/p spec.containers[0].imagee f.yaml:8",
            "warning unknown_field Pod/default/p spec.hostNetwrk f.yaml:5",
        ],
    );
    assert!(parse_file("f", pod).complete);
}

#[test]
fn values_out_of_range() {
    let rule = |rule: &str, fields: &[&str]| {
        let text = format!(
            "{{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {{name: p}}, \
             spec: {{rules: [{rule}]}}}}"
        );
        let got: Vec<String> =
            parse_file("f", &text).diagnostics.into_iter().map(|d| d.field).collect();
        let want: Vec<String> = fields.iter().map(|f| format!("spec.rules[0].{f}")).collect();
        assert_eq!(got, want, "{rule}");
    };
    rule(
        "{from: [{source: {ipBlocks: [10.0.0.0/8, 10.0.0/8, '::/129', x]}}]}",
        &["from[0].source.ipBlocks[1]", "from[0].source.ipBlocks[2]", "from[0].source.ipBlocks[3]"],
    );
    rule("{from: []}", &["from"]);
    rule("{to: []}", &["to"]);
    rule("{from: [{}]}", &["from[0].source"]);
    rule("{from: [{source: {}}]}", &["from[0].source"]);
    rule("{to: [{operation: {}}]}", &["to[0].operation"]);
    rule("{from: [{source: {principals: ['']}}]}", &["from[0].source.principals[0]"]);
    rule("{from: [{source: {serviceAccounts: ['a/*']}}]}", &["from[0].source.serviceAccounts[0]"]);
    rule(
        "{to: [{operation: {ports: ['0', '65536', '-1', '+1', '80', '']}}]}",
        &[
            "to[0].operation.ports[0]",
            "to[0].operation.ports[1]",
            "to[0].operation.ports[2]",
            "to[0].operation.ports[3]",
            "to[0].operation.ports[5]",
        ],
    );
    rule("{when: [{key: source.ip}]}", &["when[0]"]);
    rule("{when: [{key: source.ipp, values: [a]}]}", &["when[0].key"]);
    rule(
        "{when: [{key: destination.port, values: [a], notValues: [b]}]}",
        &["when[0].values[0]", "when[0].notValues[0]"],
    );
    rule("{when: [{key: 'request.headers[x]', values: ['']}]}", &[]);
    let spec = |api: &str, kind: &str, spec: &str, fields: &[&str]| {
        let text =
            format!("{{apiVersion: {api}, kind: {kind}, metadata: {{name: p}}, spec: {spec}}}");
        let found = parse_file("f", &text).diagnostics;
        assert!(found.iter().all(|d| d.severity == Severity::Error), "{found:?}");
        let got: Vec<String> = found.into_iter().map(|d| d.field).collect();
        assert_eq!(got, fields, "{spec}");
    };
    let pa = ("security.istio.io/v1", "PeerAuthentication");
    spec(pa.0, pa.1, "{portLevelMtls: {http: {mode: STRICT}}}", &["spec.portLevelMtls.http"]);
    spec(pa.0, pa.1, "{mtls: {mode: strict}}", &["spec.mtls.mode"]);
    let service = |ports: &str, fields: &[&str]| {
        spec("v1", "Service", &format!("{{ports: {ports}}}"), fields)
    };
    service("[{port: 0}]", &["spec.ports[0].port"]);
    service("[{port: 80, targetPort: 70000}]", &["spec.ports[0].targetPort"]);
    service("[{port: 80, targetPort: Http}]", &["spec.ports[0].targetPort"]);
    service("[{port: 80, protocol: tcp}]", &["spec.ports[0].protocol"]);
    service("[{port: 80, name: a}, {port: 81}]", &[]);
    service("[{port: 80}, {port: 81}]", &["spec.ports[1].name"]);
    service("[{port: 80, name: a}, {port: 80, name: b}]", &["spec.ports[1].port"]);
    service("[{port: 80, name: a}, {port: 80, name: b, protocol: UDP}]", &[]);
    spec("v1", "Service", "{clusterIP: 10.96.0}", &["spec.clusterIP"]);
    spec(
        "v1",
        "Pod",
        "{containers: [{name: A}, {name: b}, {name: b}]}",
        &["spec.containers[0].name", "spec.containers[2].name"],
    );
    spec("v1", "Pod", "{containers: []}", &["spec.containers"]);
    spec("v1", "Pod", "{nodeName: a/b, containers: [{name: a}]}", &["spec.nodeName"]);
    let deployment = "{replicas: -1, selector: {}, template: {}}";
    spec("apps/v1", "Deployment", deployment, &["spec.replicas"]);
}

#[test]
fn lists_and_quantities() {
    let list = "{apiVersion: v1, kind: List, items: [
      {apiVersion: v1, kind: Namespace, metadata: {name: a}},
      {apiVersion: v1, kind: Pod, metadata: {name: p}, spec: {containers: [
        {name: c, resources: {limits: {cpu: 1, memory: 1.5}, requests: {cpu: 500m}}}]}}]}";
    let parsed = parse_file("f", list);
    assert_eq!(parsed.diagnostics, []);
    let ids: Vec<String> = parsed.objects.iter().map(Object::id).collect();
    assert_eq!(ids, ["Namespace/a", "Pod/default/p"]);
    check("{apiVersion: v1, kind: List, items: 3}", &["error invalid_field List/? items f.yaml:1"]);
}

#[test]
fn generated_objects_name_their_source() {
    let text = "{apiVersion: v1, kind: Pod, metadata: {name: p, annotations: {ambit.io/origin: 'shop.yaml:12'}}, \
                spec: {containers: [{name: a}]}}";
    assert_eq!(parse_file("state/x.json", text).objects[0].origin.to_string(), "shop.yaml:12");
}
