//! The question that both proxies are asked: a header match, shares of 90 and 10, a request header and an answer's header.
//! In Kubernetes' words for ours; `envoy` says the same in its own.

use std::fmt::Write as _;
use std::net::SocketAddr;

/// Header and value that choose the second version.
pub(crate) const CHOOSE: (&str, &str) = ("x-version", "v2");
/// Added to requests.
pub(crate) const TO_SERVER: (&str, &str) = ("x-mesh", "bench");
/// Added to answers.
pub(crate) const TO_CLIENT: (&str, &str) = ("x-via", "bench");
/// Shares of the two versions.
pub(crate) const SHARES: (u32, u32) = (90, 10);
/// What Gateway API allows in one route.
const RULES: usize = 16;

/// The path of a prefix, and one that only this prefix matches.
pub(crate) fn prefix(n: usize) -> String {
    format!("/p/{n}")
}

/// The rules for one Service, named `web` in `namespace`: with `prefixes` 0 the header match and the shares, otherwise a rule for
/// each prefix, all with the same filters and shares.
pub(crate) fn http_routes(namespace: &str, prefixes: usize) -> String {
    let mut yaml = String::new();
    let all: Vec<Vec<String>> = if prefixes == 0 {
        let header = format!("{{headers: [{{name: {}, value: {}}}]}}", CHOOSE.0, CHOOSE.1);
        let chosen = "[{name: v2, port: 80}]";
        vec![vec![rule(Some(&header), chosen), rule(None, &shares())]]
    } else {
        let numbers: Vec<usize> = (0..prefixes).collect();
        let one = |n: &usize| {
            let path = format!("{{path: {{type: PathPrefix, value: {}}}}}", prefix(*n));
            rule(Some(&path), &shares())
        };
        numbers.chunks(RULES).map(|part| part.iter().map(one).collect()).collect()
    };
    for (n, rules) in all.iter().enumerate() {
        // Writing to a String cannot fail.
        let _ = write!(
            yaml,
            "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: web-{n}, namespace: {namespace}}}\n\
             spec:\n  parentRefs: [{{group: '', kind: Service, name: web}}]\n  rules:\n{}",
            rules.concat()
        );
    }
    yaml
}

fn shares() -> String {
    let (first, second) = SHARES;
    format!("[{{name: v1, port: 80, weight: {first}}}, {{name: v2, port: 80, weight: {second}}}]")
}

fn rule(matched: Option<&str>, backends: &str) -> String {
    let matches = matched.map_or_else(String::new, |m| format!("matches: [{m}], "));
    format!(
        "  - {{{matches}filters: [{{type: RequestHeaderModifier, requestHeaderModifier: {{add: [{}]}}}}, \
         {{type: ResponseHeaderModifier, responseHeaderModifier: {{add: [{}]}}}}], backendRefs: {backends}}}\n",
        header(TO_SERVER),
        header(TO_CLIENT),
    )
}

fn header((name, value): (&str, &str)) -> String {
    format!("{{name: {name}, value: {value}}}")
}

/// Address of the Service `web` for [`world`]: what a CONNECT would name.
pub(crate) const WEB: &str = "10.96.0.10";

/// A namespace `bench` with a waypoint, the Service `web` that is bound to it, and two versions of it at these addresses,
/// outside the mesh, whose ports are the same.
pub(crate) fn world(v1: SocketAddr, v2: SocketAddr) -> String {
    let service = |name: &str, ip: &str, labels: &str, port: u16| {
        // `web` itself is only called: its routes name the versions.
        let app = if name == "web" { "v1" } else { name };
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: bench, labels: {{{labels}}}}}\nspec:\n  \
             clusterIP: {ip}\n  clusterIPs: [{ip}]\n  selector: {{app: {app}}}\n  ports: [{{name: http, port: 80, targetPort: {port}}}]\n"
        )
    };
    let pod = |name: &str, ip: &str, labels: &str| {
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: bench, labels: {{app: {name}{labels}}}}}\n\
             spec: {{nodeName: node-1, serviceAccountName: {name}, containers: [{{name: main, image: app}}]}}\n\
             status: {{phase: Running, podIP: {ip}, podIPs: [{{ip: {ip}}}], conditions: [{{type: Ready, status: 'True'}}]}}\n"
        )
    };
    let account = |name: &str| {
        format!(
            "---\napiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {name}, namespace: bench}}\n"
        )
    };
    let waypoint = ", networking.istio.io/tunnel: http, istio.io/dataplane-mode: none";
    [
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: bench}\n".to_owned(),
        ["waypoint", "v1", "v2"].map(account).concat(),
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: waypoint, namespace: bench}\nspec:\n  \
         gatewayClassName: istio-waypoint\n  listeners: [{name: mesh, port: 15008, protocol: HBONE}]\n"
            .to_owned(),
        service("waypoint", "10.96.0.2", "", 15008),
        pod("waypoint", "127.0.0.9", waypoint),
        service("web", WEB, "istio.io/use-waypoint: waypoint", v1.port()),
        service("v1", "10.96.0.11", "", v1.port()),
        service("v2", "10.96.0.12", "", v2.port()),
        pod("v1", &v1.ip().to_string(), ""),
        pod("v2", &v2.ip().to_string(), ""),
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    use compile::{Folder, MeshConfig, compile};

    use super::*;

    #[test]
    fn every_rule_is_understood() {
        let at = |last| SocketAddr::from(([127, 0, 0, last], 9001));
        let check = |prefixes: usize, rules: usize| {
            let mut folder = Folder::new();
            let yaml = world(at(2), at(3)) + &http_routes("bench", prefixes);
            folder.set_file(0, "objects.yaml", &yaml);
            assert_eq!(folder.diagnostics(), vec![], "{prefixes} prefixes");
            let mut objects = folder.objects();
            objects.programmed.insert(("bench".into(), "waypoint".into()));
            let compiled = compile(&objects, &MeshConfig::default());
            assert_eq!(compiled.diagnostics, vec![], "{prefixes} prefixes");
            let sets = compiled.routes.iter().flat_map(|r| r.sets.iter());
            assert_eq!(sets.map(|s| s.rules.len()).sum::<usize>(), rules, "{prefixes} prefixes");
            let bound = compiled.services.iter().filter(|s| s.waypoint.is_some());
            assert_eq!(bound.map(|s| &*s.name).collect::<Vec<_>>(), ["web"]);
        };
        check(0, 2);
        check(5, 5);
        check(100, 100);
    }
}
