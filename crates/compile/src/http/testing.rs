//! For tests: a small shop, routes in YAML, and what became of them.

use model::http::{Audience, RouteRule, RouteSet, ServiceRoutes};

use super::{ConditionType, RouteStatus};
use crate::testing::objects;
use crate::{Compiled, Diagnostic, MeshConfig, compile};

/// Namespaces, a waypoint that takes connections, and Services of every sort.
pub(crate) const SHOP: &str = "
{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {istio.io/use-waypoint: w}}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: w, namespace: shop}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
status: {conditions: [{type: Programmed, status: 'True', reason: Programmed, message: '', lastTransitionTime: '2026-01-01T00:00:00Z'}]}
---
{apiVersion: v1, kind: Namespace, metadata: {name: buyer}}
---
{apiVersion: v1, kind: Pod, metadata: {name: p, namespace: shop, labels: {app: p}}, spec: {containers: [{name: c}]}}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIP: 10.96.0.1
  selector: {app: p}
  ports:
  - {name: http, port: 80, targetPort: 8080}
  - {name: alt, port: 8080, appProtocol: http}
  - {name: grpc, port: 7070}
---
{apiVersion: v1, kind: Service, metadata: {name: v1, namespace: shop}, spec: {selector: {app: p}, ports: [{port: 80}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: v2, namespace: shop}, spec: {selector: {app: p}, ports: [{port: 80}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: raw, namespace: shop}, spec: {selector: {app: p}, ports: [{name: tcp, port: 90}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: secret, namespace: shop}, spec: {selector: {app: p}, ports: [{name: https, port: 443}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: headless, namespace: shop}, spec: {clusterIP: None, selector: {app: p}, ports: [{port: 80}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: external, namespace: shop}, spec: {type: ExternalName, externalName: example.com, ports: [{port: 80}]}}
";

/// A parentRef to the Service `web`, and more of it.
pub(crate) fn web(more: &str) -> String {
    format!("{{group: '', kind: Service, name: web, namespace: shop{more}}}")
}

/// A route: `kind` is HTTPRoute or GRPCRoute; `metadata` may say more than the name.
pub(crate) fn route(
    kind: &str,
    namespace: &str,
    metadata: &str,
    parents: &str,
    rules: &str,
) -> String {
    format!(
        "\n---\napiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\nmetadata: {{namespace: {namespace}, {metadata}}}\n\
         spec:\n  parentRefs: [{parents}]\n  rules: {rules}\n"
    )
}

/// A route of `web` on all ports with these rules.
pub(crate) fn http(rules: &str) -> String {
    route("HTTPRoute", "shop", "name: r", &web(""), rules)
}

pub(crate) fn shop(routes: &str) -> Compiled {
    compile(&objects(&format!("{SHOP}{routes}")), &MeshConfig::default())
}

/// What a waypoint is told of `web`.
pub(crate) fn routes(compiled: &Compiled) -> &ServiceRoutes {
    let web = |r: &&std::sync::Arc<ServiceRoutes>| r.service.hostname.starts_with("web.");
    compiled.routes.iter().find(web).unwrap()
}

/// The set for a client, as a proxy chooses it.
pub(crate) fn chosen<'a>(compiled: &'a Compiled, client: &str, port: u16) -> Option<&'a RouteSet> {
    let find = |audience: &Audience| {
        let sets = routes(compiled).sets.iter();
        let mut fit = sets.filter(|s| s.audience == *audience && s.ports.contains(&port));
        let found = fit.next();
        assert!(fit.next().is_none(), "two sets for {audience:?} and {port}");
        found.map(|s| &**s)
    };
    find(&Audience::Namespace(client.into())).or_else(|| find(&Audience::Everybody))
}

/// The names of the rules that the matches of a set lead to, in their order.
pub(crate) fn order(set: &RouteSet) -> Vec<&str> {
    set.matches.iter().map(|m| &*set.rules[m.rule as usize].name).collect()
}

/// The first rule of the only route.
pub(crate) fn rule(compiled: &Compiled) -> &RouteRule {
    &routes(compiled).sets[0].rules[0]
}

/// `Type=Status Reason` of every condition of a route's status, but for the good word about the shop's waypoint.
pub(crate) fn conditions(status: &RouteStatus) -> Vec<String> {
    let expected = |c: &&super::Condition| c.kind != ConditionType::ResolvedWaypoints || !c.status;
    let brief = |c: &super::Condition| {
        format!("{:?}={} {}", c.kind, if c.status { "True" } else { "False" }, c.reason)
    };
    status.conditions.iter().filter(expected).map(brief).collect()
}

/// What was found about routes, without what is said of other objects.
pub(crate) fn findings(compiled: &Compiled) -> Vec<&Diagnostic> {
    let of_route = |d: &&Diagnostic| d.object.contains("Route/");
    let found: Vec<&Diagnostic> = compiled.diagnostics.iter().filter(of_route).collect();
    assert!(found.iter().all(|d| d.origin.starts_with("test.yaml:")), "{found:?}");
    found
}

/// `code field` of each.
pub(crate) fn codes(compiled: &Compiled) -> Vec<String> {
    findings(compiled).iter().map(|d| format!("{} {}", d.code, d.field)).collect()
}
