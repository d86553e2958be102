//! What is said of routes that no request meets: rows by what is missing.

use crate::http::ConditionType;
use crate::http::testing::{route, web};
use crate::testing::objects;
use crate::{Code, Compiled, Diagnostic, MeshConfig, compile};

const SHOP: &str = "
{apiVersion: v1, kind: Namespace, metadata: {name: edge}}
---
{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop, labels: {SERVICE}}, spec: {clusterIP: 10.96.0.1, ports: [{name: http, port: 80}]}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {NAMESPACE}}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: buyer}}
";
const USE: &str = "istio.io/use-waypoint: w";
const NONE: &str = "istio.io/use-waypoint: none";
const ELSEWHERE: &str = "istio.io/use-waypoint: w, istio.io/use-waypoint-namespace: edge";

/// `allowed`: of its listener's `allowedRoutes`.
fn gateway(namespace: &str, class: &str, takes: &str, allowed: &str) -> String {
    format!(
        "\n---\n{{apiVersion: gateway.networking.k8s.io/v1, kind: Gateway, metadata: {{name: w, namespace: {namespace}, labels: \
         {{istio.io/waypoint-for: {takes}}}}}, spec: {{gatewayClassName: {class}, listeners: [{{name: mesh, port: 15008, protocol: \
         HBONE, allowedRoutes: {{namespaces: {{from: {allowed}}}}}}}]}}}}"
    )
}

/// A VirtualService for `web`, whose host is on its fifth line.
fn virtual_service(namespace: &str) -> String {
    format!(
        "\n---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: r, namespace: {namespace}}}\nspec:\n  hosts:\n  \
         - web.shop.svc.cluster.local\n  http: [{{route: [{{destination: {{host: web.shop.svc.cluster.local}}}}]}}]\n"
    )
}

/// What is missing: labels of Namespace and Service, and Gateways.
struct Missing<'a> {
    namespace: &'a str,
    service: &'a str,
    gateways: String,
    ready: bool,
}

impl Missing<'_> {
    fn compile(&self, routes: &str) -> Compiled {
        let shop = SHOP.replace("NAMESPACE", self.namespace).replace("SERVICE", self.service);
        let mut objects = objects(&format!("{shop}{}{routes}", self.gateways));
        if self.ready {
            objects.programmed = objects.gateways.keys().cloned().collect();
        }
        compile(&objects, &MeshConfig::default())
    }
}

/// Every kind of route at `web` is told the same: the reason of its condition (empty: it acts), and these words.
fn check(row: &str, missing: &Missing<'_>, reason: &str, words: &[&str]) {
    for kind in ["HTTPRoute", "GRPCRoute", "VirtualService"] {
        let text = match kind {
            "VirtualService" => virtual_service("shop"),
            _ => {
                route(kind, "shop", "name: r", &web(""), "[{backendRefs: [{name: web, port: 80}]}]")
            }
        };
        told(&format!("{row}: {kind}"), &missing.compile(&text), kind, reason, words);
    }
}

fn told(row: &str, compiled: &Compiled, kind: &str, reason: &str, words: &[&str]) {
    let own = |d: &&Diagnostic| {
        d.object.starts_with(kind)
            && matches!(d.code, Code::L7WithoutWaypoint | Code::WaypointNotReady)
    };
    let found: Vec<&Diagnostic> = compiled.diagnostics.iter().filter(own).collect();
    assert_eq!(found.len(), usize::from(!reason.is_empty()), "{row}: {found:?}");
    for d in &found {
        let text = d.to_string();
        assert!(words.iter().all(|w| text.contains(w)), "{row}: {text}");
        assert!(
            text.contains("Service shop/web") && text.starts_with("test.yaml:"),
            "{row}: {text}"
        );
        let not_ready = reason == "WaypointIsNotReady";
        assert_eq!(d.code == Code::WaypointNotReady, not_ready, "{row}: {text}");
        let field = if kind == "VirtualService" { "spec.hosts[0]" } else { "spec.parentRefs[0]" };
        assert_eq!(d.field, field, "{row}");
    }
    for status in &compiled.route_status {
        assert!(status.condition(ConditionType::Accepted).is_some_and(|c| c.status), "{row}");
        let found = status.condition(ConditionType::ResolvedWaypoints);
        let got = found.map(|c| (c.status, c.reason.to_string()));
        let want = match reason {
            "" => (true, "ResolvedWaypoints".to_owned()),
            some => (false, some.to_owned()),
        };
        assert_eq!(got, Some(want), "{row}: {status:?}");
    }
}

#[test]
fn routes_that_no_request_meets() {
    let class = "istio-waypoint";
    let none = || Missing { namespace: "", service: "", gateways: String::new(), ready: true };
    let own = |takes: &str| gateway("shop", class, takes, "Same");
    let unlabelled = "meshctl waypoint apply -n shop --enroll-namespace";
    check("nothing", &none(), "NoWaypoint", &["neither it nor its Namespace", unlabelled]);
    check(
        "a waypoint, and no label",
        &Missing { gateways: own("service"), ..none() },
        "NoWaypoint",
        &["label the Service or Namespace shop istio.io/use-waypoint: w"],
    );
    check(
        "a waypoint that would not take it, and no label",
        &Missing { gateways: own("workload"), ..none() },
        "NoWaypoint",
        &[unlabelled],
    );
    check(
        "the Service opts out",
        &Missing { namespace: USE, service: NONE, gateways: own("service"), ..none() },
        "NoWaypoint",
        &["Service shop/web says istio.io/use-waypoint: none"],
    );
    check(
        "the Namespace opts out",
        &Missing { namespace: NONE, ..none() },
        "NoWaypoint",
        &["Namespace shop says istio.io/use-waypoint: none"],
    );
    check(
        "no Gateway",
        &Missing { namespace: USE, ..none() },
        "WaypointMissing",
        &[
            "Namespace shop names one, but there is no Gateway/shop/w",
            "meshctl waypoint apply -n shop --name w",
        ],
    );
    check(
        "no Gateway, by the Service",
        &Missing { service: ELSEWHERE, ..none() },
        "WaypointMissing",
        &["Service shop/web names one, but there is no Gateway/edge/w"],
    );
    check(
        "another class",
        &Missing {
            namespace: USE,
            gateways: gateway("shop", "nginx", "service", "Same"),
            ..none()
        },
        "WaypointMissing",
        &["no waypoint"],
    );
    check(
        "for pods",
        &Missing { namespace: USE, gateways: own("workload"), ..none() },
        "UnsupportedTrafficType",
        &["is for calls to pods by their own address", "istio.io/waypoint-for"],
    );
    let edge = |allowed: &str| gateway("edge", class, "service", allowed);
    check(
        "of another namespace",
        &Missing { service: ELSEWHERE, gateways: edge("Same"), ..none() },
        "AttachmentDenied",
        &["Gateway/edge/w takes nothing of namespace shop", "allowedRoutes"],
    );
    check(
        "not ready yet",
        &Missing { namespace: USE, gateways: own("service"), ready: false, ..none() },
        "WaypointIsNotReady",
        &["info", "meshctl waypoint status -n shop w"],
    );
    check("good", &Missing { namespace: USE, gateways: own("all"), ..none() }, "", &[]);
    check(
        "good, of another namespace",
        &Missing { service: ELSEWHERE, gateways: edge("All"), ..none() },
        "",
        &[],
    );
}

/// Row A8: a consumer's route acts at the producer's waypoint or nowhere.
#[test]
fn consumers_routes() {
    let class = "istio-waypoint";
    let own = gateway("buyer", class, "service", "Same");
    let check = |row: &str, missing: &Missing<'_>, reason: &str, words: &[&str]| {
        let routes = route("HTTPRoute", "buyer", "name: r", &web(""), "[{}]");
        told(row, &missing.compile(&routes), "HTTPRoute", reason, words);
        let compiled = missing.compile(&virtual_service("buyer"));
        told(row, &compiled, "VirtualService", reason, words);
    };
    let theirs = gateway("shop", class, "service", "Same");
    let missing = |gateways: &str, namespace: &'static str| Missing {
        namespace,
        service: "",
        gateways: gateways.to_owned(),
        ready: true,
    };
    check("A8 the producer's waypoint", &missing(&theirs, USE), "", &[]);
    let apply = "meshctl waypoint apply -n shop --enroll-namespace";
    check("A8 no waypoint", &missing("", ""), "NoWaypoint", &[apply]);
    check(
        "A8 the consumer's waypoint only",
        &missing(&own, ""),
        "NoWaypoint",
        &["Gateway/buyer/w is not asked", apply],
    );
}

/// The Service of a waypoint is called by nobody but the mesh.
#[test]
fn a_waypoints_own_service() {
    let gateway =
        gateway("shop", "istio-waypoint", "service", "Same").replace("name: w,", "name: web,");
    let missing = Missing { namespace: "", service: "", gateways: gateway, ready: true };
    check("its own", &missing, "NoWaypoint", &["it is a waypoint's own"]);
}

#[test]
fn faults_that_harm_nobody() {
    const FAULT: &str = "\n---\n{apiVersion: ambit.io/v1alpha1, kind: HTTPFault, metadata: {name: f, namespace: shop}, spec: {abort: {percent: \
                         1, httpStatus: 503}}}";
    let named = |namespace: &str, parent: &str| {
        let rules = "[{filters: [{type: ExtensionRef, extensionRef: {group: ambit.io, kind: HTTPFault, name: f}}]}]";
        route("HTTPRoute", namespace, "name: r", parent, rules)
    };
    let check = |row: &str, label: &str, routes: &str, want: Option<&str>| {
        let missing = Missing {
            namespace: label,
            service: "",
            gateways: gateway("shop", "istio-waypoint", "service", "Same"),
            ready: true,
        };
        let compiled = missing.compile(&format!("{FAULT}{routes}"));
        let found: Vec<&Diagnostic> =
            compiled.diagnostics.iter().filter(|d| d.object.starts_with("HTTPFault")).collect();
        assert_eq!(found.len(), usize::from(want.is_some()), "{row}: {found:?}");
        for d in found {
            assert_eq!(d.code, Code::NoEffect, "{row}");
            assert!(want.is_some_and(|w| d.message.contains(w)), "{row}: {d}");
        }
    };
    check("by itself", USE, "", Some("no route of its namespace names it"));
    check("named", USE, &named("shop", &web("")), None);
    check("named where no waypoint is", "", &named("shop", &web("")), Some("looks at any request"));
    check("named by a route of no Service", USE, &named("shop", ""), Some("looks at any request"));
    let nowhere = web(", port: 81");
    check(
        "named by a route of no port",
        USE,
        &named("shop", &nowhere),
        Some("looks at any request"),
    );
    let other = named("buyer", &web(""));
    check("named in another namespace", USE, &other, Some("no route of its namespace"));
}
