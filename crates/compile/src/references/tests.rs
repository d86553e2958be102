//! Names that refer to nothing.

use crate::testing::{Mesh, namespace, pod};
use crate::{Code, Diagnostic, Severity};

/// `code object field` of every warning.
fn warnings(yaml: &str) -> Vec<String> {
    let all = Mesh::new(yaml).compiled.diagnostics;
    let warnings = all.into_iter().filter(|d| d.severity == Severity::Warning);
    warnings.map(|d: Diagnostic| format!("{} {} {}", d.code, d.object, d.field)).collect()
}

const DEPLOYMENT: &str = "
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop}
spec:
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {serviceAccountName: sa, containers: [{name: a}]}
";

#[test]
fn accounts_and_namespaces() {
    let missing = ["dangling_reference Deployment/shop/web spec.template.spec.serviceAccountName"];
    assert_eq!(warnings(&(namespace("shop") + DEPLOYMENT)), missing);
    let account =
        "---\n{apiVersion: v1, kind: ServiceAccount, metadata: {name: sa, namespace: shop}}\n";
    assert!(warnings(&(namespace("shop") + DEPLOYMENT + account)).is_empty());
    // A pod that the Deployment made says nothing that the Deployment did not say.
    let made = pod("shop", "web-1", "10.0.0.1", "app: web")
        .replace("  labels:", "  ownerReferences: [{apiVersion: apps/v1, kind: Deployment, name: web, uid: u}]\n  labels:")
        .replace("nodeName: node-1", "nodeName: node-1\n  serviceAccountName: sa");
    assert_eq!(warnings(&(namespace("shop") + DEPLOYMENT + &made)), missing);
    let own = made.replace("kind: Deployment, name: web,", "kind: Deployment, name: gone,");
    assert_eq!(
        warnings(&(namespace("shop") + &own)),
        ["dangling_reference Pod/shop/web-1 spec.serviceAccountName"]
    );
    assert_eq!(
        warnings(&pod("nowhere", "a", "10.0.0.1", "a: b")),
        ["dangling_reference Pod/nowhere/a metadata.namespace"]
    );
    for built_in in ["default", "kube-system", "istio-system"] {
        assert!(warnings(&pod(built_in, "a", "10.0.0.1", "a: b")).is_empty(), "{built_in}");
    }
}

#[test]
fn selectors() {
    let service = |selector: &str| {
        format!(
            "\n---\n{{apiVersion: v1, kind: Service, metadata: {{name: s, namespace: default}}, spec: {{{selector}}}}}\n"
        )
    };
    let web = pod("default", "web", "10.0.0.1", "app: web");
    assert!(warnings(&(service("selector: {app: web}") + &web)).is_empty());
    let nothing = ["selects_nothing Service/default/s spec.selector"];
    assert_eq!(warnings(&(service("selector: {app: wbe}") + &web)), nothing);
    assert_eq!(warnings(&(service("") + &web)), nothing);
    // What a Deployment would make counts.
    let deployment = DEPLOYMENT.replace("shop", "default").replace("serviceAccountName: sa, ", "");
    assert!(warnings(&(service("selector: {app: web}") + &deployment)).is_empty());
    for kind in ["AuthorizationPolicy", "PeerAuthentication"] {
        let policy = |selector: &str| {
            format!(
                "\n---\n{{apiVersion: security.istio.io/v1, kind: {kind}, metadata: {{name: p, namespace: default}}, \
                 spec: {{selector: {{matchLabels: {{{selector}}}}}}}}}\n"
            )
        };
        assert!(warnings(&(policy("app: web") + &web)).is_empty());
        let object = format!("{kind}/default/p spec.selector");
        assert_eq!(warnings(&(policy("app: wbe") + &web)), [format!("selects_nothing {object}")]);
        let outside = web.replace("dataplane-mode: ambient", "dataplane-mode: none");
        assert_eq!(warnings(&(policy("app: web") + &outside)), [format!("not_in_mesh {object}")]);
        let both = web.clone()
            + &outside.replace("name: web", "name: out").replace("10.0.0.1", "10.0.0.2");
        let found = Mesh::new(&(policy("app: web") + &both)).compiled.diagnostics;
        assert_eq!(found[0].code, Code::NotInMesh);
        assert!(found[0].message.starts_with("1 of the 2 pods"), "{}", found[0].message);
        let wide = policy("app: web").replace("selector: {matchLabels: {app: web}}", "");
        assert!(warnings(&(wide.clone() + &both)).is_empty());
        assert_eq!(warnings(&(wide + &outside)), [format!("not_in_mesh {kind}/default/p ")]);
    }
}
