//! Services, field by field.

use super::*;
use crate::testing::{has, objects};
use crate::{MeshConfig, Severity};

fn yaml(metadata: &str, spec: &str) -> String {
    format!(
        "\n---\n{{apiVersion: v1, kind: Service, metadata: {{namespace: shop, {metadata}}}, spec: {{{spec}}}}}\n"
    )
}

fn one(metadata: &str, spec: &str) -> model::Service {
    let all = objects(&yaml(&format!("name: web, {metadata}"), spec));
    (*crate::compile(&all, &MeshConfig::default()).services[0]).clone()
}

#[test]
fn name_and_addresses() {
    let config = MeshConfig {
        network: "n1".into(),
        cluster_domain: "example".into(),
        ..MeshConfig::default()
    };
    let vips = "clusterIP: 10.96.0.1, clusterIPs: [10.96.0.1, 'fd00::1'], ports: [{port: 80}]";
    let service = &crate::compile(&objects(&yaml("name: web", vips)), &config).services[0];
    assert_eq!(service.key.to_string(), "shop/web.shop.svc.example");
    assert_eq!(&*service.name, "web");
    let vips: Vec<_> =
        service.vips.iter().map(|v| (&*v.network, v.ip.to_string(), v.prefix)).collect();
    assert_eq!(vips, [("n1", "10.96.0.1".to_owned(), 32), ("n1", "fd00::1".to_owned(), 128)]);
    assert!(one("", "clusterIP: None").vips.is_empty());
    assert!(one("", "clusterIPs: [None]").vips.is_empty());
    assert!(one("", "ports: [{port: 80}]").vips.is_empty());
    let external = yaml("name: x", "type: ExternalName, externalName: example.com");
    let compiled = crate::compile(&objects(&external), &MeshConfig::default());
    assert!(compiled.services.is_empty());
    assert!(has(&compiled.diagnostics, Code::Unsupported, Severity::Warning, "spec.type"));
}

#[test]
fn ports() {
    let check = |port: &str, want: Option<(u16, u16, AppProtocol)>| {
        let service = one("", &format!("ports: [{port}]"));
        let got = service.ports.first().map(|p| (p.service_port, p.target_port, p.app_protocol));
        assert_eq!(got, want, "{port}");
    };
    use AppProtocol::{Grpc, Http2, Http11, Unknown};
    check("{port: 80}", Some((80, 80, Unknown)));
    check("{port: 80, targetPort: 8080}", Some((80, 8080, Unknown)));
    check("{port: 80, targetPort: '8080x'}", Some((80, 0, Unknown)));
    check("{port: 80, targetPort: web}", Some((80, 0, Unknown)));
    check("{port: 53, protocol: UDP}", None);
    check("{port: 53, protocol: SCTP}", None);
    for (name, want) in [
        ("http", Http11),
        ("http-web", Http11),
        ("http2", Http2),
        ("http2-x", Http2),
        ("grpc", Grpc),
        ("grpc-api", Grpc),
        ("grpc-web", Unknown),
        ("grpc-web-x", Unknown),
        ("https", Unknown),
        ("tcp", Unknown),
        ("httpx", Unknown),
    ] {
        check(&format!("{{port: 80, name: {name}}}"), Some((80, 80, want)));
    }
    check("{port: 80, name: tcp, appProtocol: http}", Some((80, 80, Http11)));
    check("{port: 80, name: http, appProtocol: tcp}", Some((80, 80, Unknown)));
    check("{port: 80, appProtocol: kubernetes.io/h2c}", Some((80, 80, Http2)));
    check("{port: 80, appProtocol: GRPC}", Some((80, 80, Grpc)));
}

#[test]
fn choosing_endpoints() {
    use LocalityScope::{Network, Node, Region, Subzone, Zone};
    let check = |metadata: &str, spec: &str, mode: RoutingMode, preference: &[LocalityScope]| {
        let lb = one(metadata, spec).load_balancing;
        assert_eq!((lb.mode, &*lb.preference), (mode, preference), "{metadata} {spec}");
    };
    let annotation =
        |value: &str| format!("annotations: {{networking.istio.io/traffic-distribution: {value}}}");
    let close = [Network, Region, Zone];
    let node = [Network, Region, Zone, Subzone, Node];
    let (any, failover, strict) = (RoutingMode::Any, RoutingMode::Failover, RoutingMode::Strict);
    check("", "", any, &[]);
    check("", "trafficDistribution: PreferClose", failover, &close);
    check("", "trafficDistribution: PreferSameZone", failover, &close);
    check("", "trafficDistribution: PreferSameNode", failover, &node);
    check(&annotation("PreferSameNode"), "", failover, &node);
    check(&annotation("PreferSameNode"), "trafficDistribution: PreferClose", failover, &close);
    check(&annotation("Any"), "", any, &[]);
    check("", "internalTrafficPolicy: Local", strict, &[Node]);
    check("", "internalTrafficPolicy: Local, trafficDistribution: PreferClose", strict, &[Node]);
    check("", "internalTrafficPolicy: Cluster", any, &[]);
    check("", "trafficDistribution: Sometimes", any, &[]);
    let all = objects(&yaml("name: web", "trafficDistribution: Sometimes"));
    let found = crate::compile(&all, &MeshConfig::default()).diagnostics;
    assert!(has(&found, Code::InvalidField, Severity::Warning, "spec.trafficDistribution"));
    let namespace = format!(
        "{{apiVersion: v1, kind: Namespace, metadata: {{name: shop, {}}}}}",
        annotation("PreferSameNode")
    );
    let all = objects(&(namespace.clone() + &yaml("name: web", "")));
    let lb = |all| crate::compile(all, &MeshConfig::default()).services[0].load_balancing.clone();
    assert_eq!(*lb(&all).preference, node);
    let own =
        objects(&(namespace + &yaml(&format!("name: web, {}", annotation("PreferClose")), "")));
    assert_eq!(*lb(&own).preference, close);
    assert_eq!(
        one("", "publishNotReadyAddresses: true").load_balancing.health,
        HealthPolicy::AllowAll
    );
    assert_eq!(one("", "").load_balancing.health, HealthPolicy::OnlyHealthy);
}

#[test]
fn ip_families() {
    let check = |spec: &str, want: FamilyPolicy| assert_eq!(one("", spec).families, want, "{spec}");
    check("", FamilyPolicy::Automatic);
    check("ipFamilies: [IPv4]", FamilyPolicy::Ipv4Only);
    check("ipFamilies: [IPv6]", FamilyPolicy::Ipv6Only);
    check("ipFamilies: [IPv6, IPv4]", FamilyPolicy::Dual);
}

#[test]
fn one_address_for_one_service() {
    // b is first in the file: it keeps the address, and a's other one stays.
    let all = yaml("name: b", "clusterIP: 10.96.0.1")
        + &yaml("name: a", "clusterIP: 10.96.0.1, clusterIPs: [10.96.0.1, 'fd00::1']");
    let compiled = crate::compile(&objects(&all), &MeshConfig::default());
    let vips =
        |i: usize| compiled.services[i].vips.iter().map(|v| v.ip.to_string()).collect::<Vec<_>>();
    assert_eq!((vips(0), vips(1)), (vec!["fd00::1".to_owned()], vec!["10.96.0.1".to_owned()]));
    let d = compiled.diagnostics.iter().find(|d| d.code == Code::DuplicateAddress).unwrap();
    assert_eq!((d.object.as_str(), d.field.as_str()), ("Service/shop/a", "spec.clusterIP"));
    assert!(d.message.contains("Service/shop/b (test.yaml:3)"), "{}", d.message);
}
