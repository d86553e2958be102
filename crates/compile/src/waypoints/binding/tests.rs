//! Labels, Gateways and ready proxies to bindings, and what is said where there is none.

use engine::{OutboundFacts, OutboundPlan, plan_outbound};
use model::{Reason, Refusal};

use super::*;
use crate::testing::{Mesh, objects, pod};
use crate::{Compiled, MeshConfig, Severity, compile};

/// `labels`: of the Gateway. `namespaces`: of its listener's `allowedRoutes`, or nothing.
fn gateway(namespace: &str, name: &str, labels: &str, namespaces: &str) -> String {
    let routes = match namespaces {
        "" => String::new(),
        some => format!(", allowedRoutes: {{namespaces: {some}}}"),
    };
    format!(
        "
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {{name: {name}, namespace: {namespace}, labels: {{{labels}}}}}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{{name: mesh, port: 15008, protocol: HBONE{routes}}}]
"
    )
}

/// What the provisioner makes of a Gateway: a Service and a pod.
fn proxies(namespace: &str, name: &str, ip: &str, ready: bool) -> String {
    let of = format!("gateway.networking.k8s.io/gateway-name: {name}");
    let labels = format!("{of}, networking.istio.io/tunnel: http");
    let made = pod(namespace, &format!("{name}-1"), ip, &labels)
        .replace("istio.io/dataplane-mode: ambient", "istio.io/dataplane-mode: none")
        .replace("  annotations: {ambient.istio.io/redirection: enabled}\n", "");
    let made = if ready { made } else { made.replace("status: 'True'", "status: 'False'") };
    format!("{}{made}", service(namespace, name, "10.96.7.1", "", &of))
}

fn service(namespace: &str, name: &str, ip: &str, labels: &str, selector: &str) -> String {
    format!(
        "
---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: {namespace}, labels: {{{labels}}}}}
spec: {{clusterIP: {ip}, selector: {{{selector}}}, ports: [{{port: 80}}]}}
"
    )
}

fn namespace(name: &str, labels: &str) -> String {
    format!(
        "\n---\n{{apiVersion: v1, kind: Namespace, metadata: {{name: {name}, labels: {{{labels}}}}}}}\n"
    )
}

/// Service `web` and pod `web` in namespace `shop`, with these labels.
fn web(of_namespace: &str, of_service: &str, of_pod: &str) -> String {
    let of_pod = if of_pod.is_empty() { "app: web" } else { of_pod };
    let pod = pod("shop", "web", "10.0.0.1", of_pod);
    namespace("shop", of_namespace)
        + &service("shop", "web", "10.96.0.1", of_service, "app: web")
        + &pod
}

const USE: &str = "istio.io/use-waypoint: w";

fn name(at: Option<&GatewayAddress>) -> String {
    match at {
        None => "direct".to_owned(),
        Some(GatewayAddress {
            destination: GatewayDestination::Service(key),
            hbone_port: 15008,
        }) => key.hostname.trim_end_matches(".svc.cluster.local").to_owned(),
        Some(other) => panic!("{other:?}"),
    }
}

/// What Service and pod `shop/web` are bound to.
fn bound(compiled: &Compiled) -> [String; 2] {
    let service = compiled.services.iter().find(|s| &*s.name == "web").unwrap();
    let pod = compiled.workloads.iter().find(|w| &*w.name == "web").unwrap();
    [name(service.waypoint.as_ref()), name(pod.waypoint.as_ref())]
}

/// Findings about labels and waypoints: `severity code object`.
fn said(compiled: &Compiled) -> Vec<String> {
    let all = compiled.diagnostics.iter();
    let about = all.filter(|d| {
        d.field.contains("waypoint")
            || d.object.starts_with("Gateway")
            || d.severity == Severity::Error
    });
    about.map(|d| format!("{} {} {}", d.severity, d.code, d.object)).collect()
}

#[test]
fn labels_and_traffic() {
    // The Gateway's label, the labels of namespace, Service and pod, and what they are bound to.
    let check = |what: &str, traffic: &str, labels: [&str; 3], want: [&str; 2]| {
        let yaml = web(labels[0], labels[1], labels[2])
            + &gateway("shop", "w", traffic, "")
            + &proxies("shop", "w", "10.0.7.1", true);
        let compiled = Mesh::new(&yaml).compiled;
        assert_eq!(bound(&compiled), want, "{what}");
        assert_eq!(said(&compiled), Vec::<String>::new(), "{what}");
        assert_eq!(compiled.programmed, [("shop".into(), "w".into())].into(), "{what}");
        let own = compiled.services.iter().find(|s| &*s.name == "w").unwrap();
        let proxy = compiled.workloads.iter().find(|w| &*w.name == "w-1").unwrap();
        assert_eq!((&own.waypoint, &proxy.waypoint), (&None, &None), "{what}: the waypoint");
    };
    let (none, direct) = ("istio.io/use-waypoint: none", "direct");
    let (on_pod, not_pod) = (format!("app: web, {USE}"), format!("app: web, {none}"));
    let all = "istio.io/waypoint-for: all";
    let workload = "istio.io/waypoint-for: workload";
    let service = "istio.io/waypoint-for: service";
    check("nobody asks", "", ["", "", ""], [direct, direct]);
    check("the Service", "", ["", USE, ""], ["w.shop", direct]);
    check("the namespace", "", [USE, "", ""], ["w.shop", direct]);
    check("said aloud", service, [USE, "", ""], ["w.shop", direct]);
    check("the namespace, for all", all, [USE, "", ""], ["w.shop", "w.shop"]);
    check("the namespace, for workloads", workload, [USE, "", ""], [direct, "w.shop"]);
    check("the Service opts out", all, [USE, none, ""], [direct, "w.shop"]);
    check("the pod opts out", all, [USE, "", &not_pod], ["w.shop", direct]);
    check("the pod", workload, ["", "", &on_pod], [direct, "w.shop"]);
    check("the pod against its namespace", workload, [none, "", &on_pod], [direct, "w.shop"]);
    check("the Service against its namespace", "", [none, USE, ""], ["w.shop", direct]);
    check("an empty word is none", "", [USE, "istio.io/use-waypoint: ''", ""], ["w.shop", direct]);
}

#[test]
fn the_class_says_what_is_for_all_its_gateways() {
    let class = |text: &str| {
        format!(
            "\n---\n{{apiVersion: gateway.networking.k8s.io/v1, kind: GatewayClass, metadata: {{name: \
             istio-waypoint, labels: {{istio.io/waypoint-for: {text}}}}}, spec: {{controllerName: \
             istio.io/mesh-controller}}}}\n"
        )
    };
    let check = |of_class: &str, of_gateway: &str, want: [&str; 2]| {
        let yaml = web(USE, "", "")
            + &class(of_class)
            + &gateway("shop", "w", of_gateway, "")
            + &proxies("shop", "w", "10.0.7.1", true);
        assert_eq!(bound(&Mesh::new(&yaml).compiled), want, "{of_class} {of_gateway}");
    };
    check("workload", "", ["direct", "w.shop"]);
    check("workload", "istio.io/waypoint-for: service", ["w.shop", "direct"]);
    check("workload", "istio.io/waypoint-for: nonsense", ["w.shop", "direct"]);
    check("nonsense", "", ["w.shop", "direct"]);
}

#[test]
fn from_other_namespaces() {
    let check = |allowed: &str, of_namespace: &str, want: &str| {
        let elsewhere = "istio.io/use-waypoint: w, istio.io/use-waypoint-namespace: edge";
        let yaml = web(of_namespace, elsewhere, "")
            + &namespace("edge", "")
            + &gateway("edge", "w", "", allowed)
            + &proxies("edge", "w", "10.0.7.1", true);
        let compiled = Mesh::new(&yaml).compiled;
        assert_eq!(bound(&compiled), [want, "direct"], "{allowed}");
        let denied = ["error attachment_denied Service/shop/web".to_owned()];
        assert_eq!(said(&compiled), if want == "direct" { &denied[..] } else { &[] }, "{allowed}");
    };
    check("", "", "direct");
    check("{from: Same}", "", "direct");
    check("{from: All}", "", "w.edge");
    let labels = "{from: Selector, selector: {matchLabels: {team: web}}}";
    check(labels, "team: web", "w.edge");
    check(labels, "team: db", "direct");
    check(labels, "", "direct");
    let expressions = "{from: Selector, selector: {matchExpressions: [{key: team, operator: In, values: [web]}]}}";
    check(expressions, "team: web", "w.edge");
    check(expressions, "team: db", "direct");
    // Clusters put the name on every namespace.
    let by_name = "{from: Selector, selector: {matchLabels: {kubernetes.io/metadata.name: shop}}}";
    check(by_name, "", "w.edge");
    check("{from: Selector}", "", "direct");
}

#[test]
fn what_is_not_bound_is_said() {
    let check = |more: &str, labels: [&str; 3], want: &[&str]| {
        let yaml = web(labels[0], labels[1], labels[2]) + more;
        let compiled = Mesh::new(&yaml).compiled;
        assert_eq!(bound(&compiled), ["direct", "direct"]);
        assert_eq!(said(&compiled), want, "{more}");
    };
    let ready = proxies("shop", "w", "10.0.7.1", true);
    check(&ready, ["", USE, ""], &["error dangling_reference Service/shop/web"]);
    check(&ready, [USE, "", ""], &["error dangling_reference Namespace/shop"]);
    let elsewhere = "istio.io/use-waypoint: w, istio.io/use-waypoint-namespace: edge";
    let here = gateway("shop", "w", "", "") + &ready;
    check(&here, ["", elsewhere, ""], &["error dangling_reference Service/shop/web"]);
    let other = here.replace("istio-waypoint", "nginx");
    let unserved = "error dangling_reference Gateway/shop/w";
    check(&other, ["", USE, ""], &["error not_a_waypoint Service/shop/web", unserved]);
    let workloads = gateway("shop", "w", "istio.io/waypoint-for: workload", "") + &ready;
    check(&workloads, ["", USE, ""], &["error unsupported_traffic_type Service/shop/web"]);
    let on_pod = format!("app: web, {USE}");
    check(&here, ["", "", &on_pod], &["error unsupported_traffic_type Pod/shop/web"]);
    let nothing = gateway("shop", "w", "istio.io/waypoint-for: none", "") + &ready;
    check(&nothing, [USE, "", ""], &["warning unsupported_traffic_type Namespace/shop"]);
    let misspelt = gateway("shop", "w", "istio.io/waypoint-for: Service", "") + &ready;
    check(&misspelt, ["", "", ""], &["error invalid_field Gateway/shop/w"]);
    let no_tunnel = here.replace("protocol: HBONE", "protocol: HTTP");
    check(&no_tunnel, ["", "", ""], &["error invalid_field Gateway/shop/w"]);
    let lone = "istio.io/use-waypoint-namespace: edge";
    check(&here, ["", lone, ""], &["warning no_effect Service/shop/web"]);
    let deployment = "
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: d, namespace: shop}
spec:
  selector: {matchLabels: {app: d}}
  template: {metadata: {labels: {app: d, istio.io/use-waypoint: gone}}, spec: {containers: [{name: c}]}}
";
    check(deployment, ["", "", ""], &["error dangling_reference Deployment/shop/d"]);
}

/// DESIGN, invariant 4: bound when first programmed, and then for as long as there is a Gateway.
#[test]
fn once_programmed_always_bound() {
    let mesh = |ready: Option<bool>, gateway_is_there: bool, before: &Programmed| {
        let mut yaml = web("", USE, "");
        if gateway_is_there {
            yaml += &gateway("shop", "w", "", "");
        }
        if let Some(ready) = ready {
            yaml += &proxies("shop", "w", "10.0.7.1", ready);
        }
        let mut objects = objects(&yaml);
        objects.programmed = before.clone();
        let mesh = Mesh::of(&objects);
        let client = Workload::named("client", "shop", "client");
        let facts = OutboundFacts { source: &client, destination: "10.96.0.1:80".parse().unwrap() };
        let way = match plan_outbound(&mesh.snapshot, &facts, 0) {
            OutboundPlan::Connect { candidates, .. } if candidates[0].is_waypoint() => "through",
            OutboundPlan::Connect { .. } => "direct",
            OutboundPlan::Refuse(Refusal { reason: Reason::WaypointNotReady, .. }) => "refused",
            other => panic!("{other:?}"),
        };
        let waits = mesh.compiled.diagnostics.iter().any(|d| d.code == Code::WaypointNotReady);
        (mesh.compiled.programmed, way, waits)
    };
    let never = Programmed::new();
    let (after, way, waits) = mesh(None, true, &never);
    assert_eq!((&after, way, waits), (&never, "direct", true), "made, but not started");
    let (after, way, waits) = mesh(Some(false), true, &after);
    assert_eq!((&after, way, waits), (&never, "direct", true), "started, but not ready");
    let (after, way, waits) = mesh(Some(true), true, &after);
    assert_eq!((way, waits), ("through", false), "ready");
    let once = after.clone();
    assert_eq!(once, [("shop".into(), "w".into())].into());
    let (after, way, waits) = mesh(Some(false), true, &after);
    assert_eq!((&after, way, waits), (&once, "refused", false), "no longer ready");
    let (after, way, waits) = mesh(None, true, &after);
    assert_eq!((&after, way, waits), (&once, "refused", false), "its Service is gone, too");
    let (after, way, _) = mesh(Some(true), true, &after);
    assert_eq!((&after, way), (&once, "through"), "back");
    let (after, way, _) = mesh(Some(true), false, &after);
    assert_eq!((&after, way), (&never, "direct"), "without a Gateway nobody is bound");
    let (after, way, _) = mesh(Some(false), true, &after);
    assert_eq!((&after, way), (&never, "direct"), "a new one begins anew");
}

#[test]
fn a_gateway_that_says_programmed_is() {
    let check = |status: &str, want: &str| {
        let condition = format!(
            "{{type: Programmed, status: '{status}', reason: Programmed, message: '', lastTransitionTime: \
             '2026-01-01T00:00:00Z'}}"
        );
        let gateway =
            gateway("shop", "w", "", "") + &format!("status: {{conditions: [{condition}]}}\n");
        let compiled = Mesh::new(&(web("", USE, "") + &gateway)).compiled;
        assert_eq!(bound(&compiled), [want, "direct"]);
    };
    check("True", "w.shop");
    check("False", "direct");
}

/// A user's pod that happens to be selected, in the mesh or outside it, is no proxy of the waypoint.
#[test]
fn only_what_ends_tunnels_itself_makes_a_waypoint_ready() {
    let of = "gateway.networking.k8s.io/gateway-name: w";
    let yaml = web("", USE, "")
        + &gateway("shop", "w", "", "")
        + &service("shop", "w", "10.96.7.1", "", of)
        + &pod("shop", "not-it", "10.0.0.9", of);
    let compiled = Mesh::new(&yaml).compiled;
    assert_eq!(bound(&compiled), ["direct", "direct"]);
    assert!(compiled.programmed.is_empty());
}

/// istio-ambient.md §1.1: a waypoint's pod is outside capture and takes tunnels all the same.
#[test]
fn proxies_end_tunnels_themselves() {
    let compiled = Mesh::new(&proxies("shop", "w", "10.0.7.1", true)).compiled;
    let proxy = &compiled.workloads[0];
    assert_eq!((proxy.protocol, proxy.native_tunnel), (TunnelProtocol::Hbone, true));
    let outside =
        proxies("shop", "w", "10.0.7.1", true).replace(", networking.istio.io/tunnel: http", "");
    let compiled = Mesh::new(&outside).compiled;
    let proxy = &compiled.workloads[0];
    assert_eq!((proxy.protocol, proxy.native_tunnel), (TunnelProtocol::None, false));
}

#[test]
fn another_cluster_domain() {
    let yaml =
        web("", USE, "") + &gateway("shop", "w", "", "") + &proxies("shop", "w", "10.0.7.1", true);
    let config = MeshConfig { cluster_domain: "corp".into(), ..MeshConfig::default() };
    let compiled = compile(&objects(&yaml), &config);
    let service = compiled.services.iter().find(|s| &*s.name == "web").unwrap();
    let Some(GatewayAddress { destination: GatewayDestination::Service(key), .. }) =
        &service.waypoint
    else {
        panic!("bound")
    };
    assert_eq!(&*key.hostname, "w.shop.svc.corp");
}
