//! Labels and ports that ask for what will not happen.
//!
//! A misspelt mode, a pod that can never be captured, an application on a port of the mesh's own: each of
//! them leaves traffic without protection, or without a listener, and nothing else would say so.

use k8s_openapi::api::core::v1::{Pod, PodSpec};
use model::{MESH_PORTS, Str};

use crate::context::Context;
use crate::diagnostics::{Code, Diagnostic, Severity};
use crate::enrolment::{DATAPLANE_MODE, Enrolment, enrolment};
use crate::object::{Meta, Objects, Sourced, Table};
use crate::waypoints::binding::{Bindings, Labels, Traffic, Why, Wish};
use crate::waypoints::{USE_WAYPOINT, USE_WAYPOINT_NAMESPACE};

/// Istio's labels for a second waypoint that gets a share.
const CANARY: [&str; 2] =
    ["istio.io/use-waypoint-canary", "istio.io/use-waypoint-canary-namespace"];

/// `own_pods`: those that no Deployment of the user made.
pub(crate) fn check(
    objects: &Objects,
    own_pods: &Table<Pod>,
    bindings: &Bindings<'_>,
    cx: &mut Context<'_>,
) {
    for (key, sourced) in &objects.namespaces {
        let on = Labelled { key, sourced, labels: sourced.value.labels(), at: "metadata.labels" };
        modes(&on, cx);
        waypoint(&on, &key.1, Traffic::Any, bindings, cx);
    }
    for (key, sourced) in &objects.services {
        let on = Labelled { key, sourced, labels: sourced.value.labels(), at: "metadata.labels" };
        waypoint(&on, &key.0, Traffic::Service, bindings, cx);
    }
    for (key, sourced) in own_pods {
        let on = Labelled { key, sourced, labels: sourced.value.labels(), at: "metadata.labels" };
        modes(&on, cx);
        waypoint(&on, &key.0, Traffic::Workload, bindings, cx);
        pod(key, sourced, &sourced.value, "", objects, cx);
    }
    for (key, sourced) in &objects.deployments {
        let Some(spec) = &sourced.value.spec else { continue };
        let mut metadata = spec.template.metadata.clone().unwrap_or_default();
        let labels = metadata.labels.as_ref();
        let on = Labelled { key, sourced, labels, at: "spec.template.metadata.labels" };
        modes(&on, cx);
        waypoint(&on, &key.0, Traffic::Workload, bindings, cx);
        metadata.namespace = Some(key.0.to_string());
        let template = Pod { metadata, spec: spec.template.spec.clone(), status: None };
        pod(key, sourced, &template, "spec.template.", objects, cx);
    }
}

/// An object's labels, and where they are.
struct Labelled<'a, T> {
    key: &'a (Str, Str),
    sourced: &'a Sourced<T>,
    labels: Labels<'a>,
    at: &'static str,
}

fn modes<T: Meta>(on: &Labelled<'_, T>, cx: &mut Context<'_>) {
    let mode = on.labels.and_then(|l| l.get(DATAPLANE_MODE)).map(String::as_str);
    if let Some(other) = mode.filter(|m| !matches!(*m, "ambient" | "none")) {
        let message = format!("{other:?} is not a mode: what this labels is outside the mesh");
        let d = Diagnostic::warning(Code::InvalidField, message)
            .field(format!("{}.{DATAPLANE_MODE}", on.at))
            .help("write ambient, or none to opt out");
        cx.report(on.key, on.sourced, d);
    }
}

/// `namespace`: what the labels are of, or where.
fn waypoint<T: Meta>(
    on: &Labelled<'_, T>,
    namespace: &str,
    traffic: Traffic,
    bindings: &Bindings<'_>,
    cx: &mut Context<'_>,
) {
    for name in CANARY.into_iter().filter(|name| on.labels.is_some_and(|l| l.contains_key(*name))) {
        let message = format!(
            "not handled by this version: all goes through the waypoint that {USE_WAYPOINT} names"
        );
        let d = Diagnostic::warning(Code::Unsupported, message);
        cx.report(on.key, on.sourced, d.field(format!("{}.{name}", on.at)));
    }
    let Wish::Waypoint(gateway_namespace, gateway) = Wish::of(on.labels, namespace) else {
        if on.labels.is_some_and(|l| l.contains_key(USE_WAYPOINT_NAMESPACE)) {
            let message = format!("says where a waypoint is, but {USE_WAYPOINT} names none");
            let d = Diagnostic::warning(Code::NoEffect, message);
            cx.report(on.key, on.sourced, d.field(format!("{}.{USE_WAYPOINT_NAMESPACE}", on.at)));
        }
        return;
    };
    let Err(why) = bindings.check((&gateway_namespace, &gateway), namespace, traffic) else {
        return;
    };
    let (code, message, help) = why.explain((&gateway_namespace, &gateway), namespace);
    // A waypoint that is for nothing was made so on purpose, and the namespace named with it.
    let on_purpose = matches!(why, Why::Traffic(_)) && traffic == Traffic::Any;
    let severity = if on_purpose { Severity::Warning } else { Severity::Error };
    let message = format!("{message}: what is labelled is reached directly");
    let d = Diagnostic::new(severity, code, message).help(help);
    cx.report(on.key, on.sourced, d.field(format!("{}.{USE_WAYPOINT}", on.at)));
}

/// `at`: the path before `spec` and `metadata`.
fn pod<T: Meta>(
    key: &(Str, Str),
    sourced: &Sourced<T>,
    pod: &Pod,
    at: &str,
    objects: &Objects,
    cx: &mut Context<'_>,
) {
    let namespace = objects.namespace(&key.0);
    let decided = enrolment(namespace, pod);
    let pod_mode = pod.label(DATAPLANE_MODE);
    let asked = pod_mode.or_else(|| namespace.and_then(|ns| ns.label(DATAPLANE_MODE)));
    let never =
        matches!(decided, Enrolment::HostNetwork | Enrolment::SystemNamespace | Enrolment::Sidecar);
    if never && asked == Some("ambient") {
        let message = format!("labelled for the mesh, but outside it: {}", decided.as_str());
        let d = Diagnostic::info(Code::NotInMesh, message).field(format!("{at}metadata"));
        cx.report(key, sourced, d);
    }
    if let Some(spec) = pod.spec.as_ref().filter(|_| decided.is_enrolled()) {
        mesh_ports(key, sourced, spec, at, cx);
    }
}

fn mesh_ports<T: Meta>(
    key: &(Str, Str),
    sourced: &Sourced<T>,
    spec: &PodSpec,
    at: &str,
    cx: &mut Context<'_>,
) {
    for (i, container) in spec.containers.iter().enumerate() {
        for (j, port) in container.ports.iter().flatten().enumerate() {
            let number = port.container_port;
            if MESH_PORTS.iter().any(|p| i32::from(*p) == number) {
                let message = format!(
                    "port {number} of a pod in the mesh belongs to the mesh: nobody reaches the container there"
                );
                let field = format!("{at}spec.containers[{i}].ports[{j}].containerPort");
                let d = Diagnostic::warning(Code::NoEffect, message).field(field);
                cx.report(key, sourced, d.help("let the application listen on another port"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{Mesh, pod};

    /// `severity code object field` of every finding.
    fn findings(yaml: &str) -> Vec<String> {
        let all = Mesh::new(yaml).compiled.diagnostics.into_iter();
        all.map(|d| format!("{} {} {} {}", d.severity, d.code, d.object, d.field)).collect()
    }

    #[test]
    fn what_will_not_happen() {
        let web = pod("default", "web", "10.0.0.1", "app: web");
        assert!(findings(&web).is_empty());
        let check = |yaml: &str, want: &str| assert_eq!(findings(yaml), [want], "{yaml}");
        let namespace = |labels: &str| {
            format!(
                "{{apiVersion: v1, kind: Namespace, metadata: {{name: shop, labels: {{{labels}}}}}}}"
            )
        };
        check(
            &namespace("istio.io/dataplane-mode: Ambient"),
            "warning invalid_field Namespace/shop metadata.labels.istio.io/dataplane-mode",
        );
        check(
            &namespace("istio.io/use-waypoint: w"),
            "error dangling_reference Namespace/shop metadata.labels.istio.io/use-waypoint",
        );
        assert!(findings(&namespace("istio.io/use-waypoint: none")).is_empty());
        check(
            &namespace("istio.io/use-waypoint-canary: w"),
            "warning unsupported Namespace/shop metadata.labels.istio.io/use-waypoint-canary",
        );
        check(
            &web.replace("nodeName: node-1", "hostNetwork: true"),
            "info not_in_mesh Pod/default/web metadata",
        );
        let port = web.replace("{name: main}", "{name: main, ports: [{containerPort: 15008}]}");
        check(&port, "warning no_effect Pod/default/web spec.containers[0].ports[0].containerPort");
        assert!(findings(&port.replace("mode: ambient", "mode: none")).is_empty());
        let deployment = "{apiVersion: apps/v1, kind: Deployment, metadata: {name: web}, spec: {selector: {matchLabels: {a: b}}, \
             template: {metadata: {labels: {a: b, istio.io/dataplane-mode: ambient}}, spec: {hostNetwork: true, \
             containers: [{name: a}]}}}}";
        check(deployment, "info not_in_mesh Deployment/default/web spec.template.metadata");
    }
}
