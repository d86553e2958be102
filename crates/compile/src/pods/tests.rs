//! Pods as workloads, field by field.

use model::{Health, NetworkMode, TunnelProtocol, Workload, WorkloadKind};

use crate::testing::{Mesh, has, objects};
use crate::{Code, MeshConfig, Severity, compile};

/// A Pod from the inside of its metadata, spec and status.
fn pod(metadata: &str, spec: &str, status: &str) -> String {
    format!(
        "\n---\n{{apiVersion: v1, kind: Pod, metadata: {{namespace: shop, {metadata}}}, \
         spec: {{{spec} containers: [{{name: main, ports: [{{name: web, containerPort: 8080}}, \
         {{name: dns, containerPort: 53, protocol: UDP}}]}}]}}, status: {{{status}}}}}\n"
    )
}

const RUNNING: &str = "phase: Running, podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}, {ip: 'fd00::1'}], conditions: [{type: Ready, status: 'True'}]";

fn one(metadata: &str, spec: &str, status: &str) -> Option<Workload> {
    let compiled = compile(&objects(&pod(metadata, spec, status)), &MeshConfig::default());
    compiled.workloads.first().map(|w| (**w).clone())
}

#[test]
fn identity_and_place() {
    let config = MeshConfig {
        trust_domain: "td".into(),
        cluster: "c1".into(),
        network: "n1".into(),
        ..MeshConfig::default()
    };
    let node = "{apiVersion: v1, kind: Node, metadata: {name: node-1, labels: {topology.kubernetes.io/region: r, \
                topology.kubernetes.io/zone: z, topology.istio.io/subzone: s}}}";
    let yaml =
        node.to_owned() + &pod("name: a", "nodeName: node-1, serviceAccountName: sa,", RUNNING);
    let w = &compile(&objects(&yaml), &config).workloads[0];
    assert_eq!(w.uid.to_string(), "c1//Pod/shop/a");
    assert_eq!(w.identity().to_string(), "spiffe://td/ns/shop/sa/sa");
    assert_eq!((&*w.network, &*w.cluster, &*w.node, w.capacity), ("n1", "c1", "node-1", 1));
    assert_eq!(
        w.addresses.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["10.0.0.1", "fd00::1"]
    );
    let locality = [&w.locality.region, &w.locality.zone, &w.locality.subzone];
    assert_eq!(locality.map(|l| l.as_deref().unwrap_or_default()), ["r", "z", "s"]);
    let account = |spec: &str| one("name: a", spec, RUNNING).unwrap().service_account.to_string();
    assert_eq!(account(""), "default");
    assert_eq!(account("serviceAccountName: '',"), "default");
    assert_eq!(account("serviceAccount: old,"), "old");
    assert_eq!(account("serviceAccountName: new, serviceAccount: old,"), "new");
}

#[test]
fn life_cycle() {
    let health = |status: &str| one("name: a", "", status).map(|w| w.health);
    assert_eq!(health(RUNNING), Some(Health::Healthy));
    assert_eq!(health("phase: Running, podIP: 10.0.0.1"), Some(Health::Unhealthy));
    let not_ready = RUNNING.replace("'True'", "'False'");
    assert_eq!(health(&not_ready), Some(Health::Unhealthy));
    assert_eq!(health(&RUNNING.replace("Ready", "Initialized")), Some(Health::Unhealthy));
    assert_eq!(health(&RUNNING.replace("phase: Running", "phase: Succeeded")), None);
    assert_eq!(health(&RUNNING.replace("phase: Running", "phase: Failed")), None);
    assert_eq!(health("phase: Pending"), None);
    assert_eq!(health(""), None);
    let ending = "name: a, deletionTimestamp: '2024-01-01T00:00:00Z'";
    assert_eq!(one(ending, "", RUNNING).unwrap().health, Health::Unhealthy);
}

#[test]
fn how_it_is_reached() {
    let check = |metadata: &str, spec: &str, protocol, native, mode| {
        let w = one(&format!("name: a, {metadata}"), spec, RUNNING).unwrap();
        assert_eq!(
            (w.protocol, w.native_tunnel, w.network_mode),
            (protocol, native, mode),
            "{metadata}"
        );
    };
    let (plain, hbone) = (TunnelProtocol::None, TunnelProtocol::Hbone);
    let (own, host) = (NetworkMode::Standard, NetworkMode::HostNetwork);
    let enabled = "annotations: {ambient.istio.io/redirection: enabled}";
    check("", "", plain, false, own);
    check(enabled, "", hbone, false, own);
    check("annotations: {ambient.istio.io/redirection: pending}", "", plain, false, own);
    // The label asks, the annotation says it is done.
    check("labels: {istio.io/dataplane-mode: ambient}", "", plain, false, own);
    check("labels: {networking.istio.io/tunnel: http}", "", hbone, true, own);
    check(enabled, "hostNetwork: true,", plain, false, host);
}

#[test]
fn names() {
    let check = |metadata: &str, name: &str, kind: WorkloadKind, canonical: (&str, &str)| {
        let w = one(&format!("name: a-1, {metadata}"), "", RUNNING).unwrap();
        assert_eq!((&*w.workload_name, w.workload_kind), (name, kind), "{metadata}");
        assert_eq!((&*w.canonical_name, &*w.canonical_revision), canonical, "{metadata}");
    };
    let owner = |kind: &str, name: &str| {
        format!(
            "ownerReferences: [{{apiVersion: x, kind: {kind}, name: {name}, uid: u, controller: true}}]"
        )
    };
    check("", "a-1", WorkloadKind::Pod, ("a-1", "latest"));
    check(&owner("Deployment", "web"), "web", WorkloadKind::Deployment, ("web", "latest"));
    let hash = "labels: {pod-template-hash: 5d8f}, ".to_owned();
    check(
        &(hash.clone() + &owner("ReplicaSet", "web-5d8f")),
        "web",
        WorkloadKind::Deployment,
        ("web", "latest"),
    );
    check(&(hash + &owner("ReplicaSet", "web-x")), "web-x", WorkloadKind::Pod, ("web-x", "latest"));
    check(&owner("ReplicaSet", "web-5d8f"), "web-5d8f", WorkloadKind::Pod, ("web-5d8f", "latest"));
    check(&owner("Job", "once"), "once", WorkloadKind::Job, ("once", "latest"));
    check(&owner("Job", "tick-28401234"), "tick", WorkloadKind::CronJob, ("tick", "latest"));
    check(
        &owner("Job", "tick-2840123"),
        "tick-2840123",
        WorkloadKind::Job,
        ("tick-2840123", "latest"),
    );
    check(&owner("StatefulSet", "pg"), "pg", WorkloadKind::Pod, ("pg", "latest"));
    let all = "labels: {service.istio.io/canonical-name: one, app.kubernetes.io/name: two, app: three, \
               service.istio.io/canonical-revision: r1, app.kubernetes.io/version: r2, version: r3}";
    check(all, "a-1", WorkloadKind::Pod, ("one", "r1"));
    let some = "labels: {app.kubernetes.io/name: two, app: three, app.kubernetes.io/version: r2, version: r3}";
    check(some, "a-1", WorkloadKind::Pod, ("two", "r2"));
    check("labels: {app: three, version: r3}", "a-1", WorkloadKind::Pod, ("three", "r3"));
}

#[test]
fn endpoints() {
    let service = |name: &str, spec: &str| {
        format!(
            "\n---\n{{apiVersion: v1, kind: Service, metadata: {{name: {name}, namespace: shop}}, spec: {{{spec}}}}}\n"
        )
    };
    let yaml = pod("name: a, labels: {app: web, tier: front}", "", RUNNING)
        + &service("named", "selector: {app: web}, ports: [{port: 80, targetPort: web}]")
        + &service(
            "number",
            "selector: {tier: front}, ports: [{port: 80, targetPort: 9000}, {port: 81, name: b}]"
                .replace("{port: 80,", "{port: 80, name: a,")
                .as_str(),
        )
        + &service(
            "absent",
            "selector: {app: web}, ports: [{name: x, port: 80, targetPort: nothing}, {name: y, port: 81}]",
        )
        + &service("udp", "selector: {app: web}, ports: [{port: 53, targetPort: dns}]")
        // By their host names, as proxies have them: `-` comes before the dot.
        + &service("named-2", "selector: {app: web}, ports: [{port: 53, targetPort: dns}]")
        + &service("both", "selector: {app: web, tier: back}, ports: [{port: 80}]")
        + &service("none", "ports: [{port: 80}]")
        + &service("far", "selector: {app: web}, ports: [{port: 80}]").replace("shop", "bank");
    let compiled = compile(&objects(&yaml), &MeshConfig::default());
    let services: Vec<(String, Vec<(u16, u16)>)> = compiled.workloads[0]
        .services
        .iter()
        .map(|(key, ports)| {
            let ports = ports.iter().map(|p| (p.service_port, p.target_port)).collect();
            (key.hostname.split('.').next().unwrap().to_owned(), ports)
        })
        .collect();
    let want: [(&str, &[(u16, u16)]); 5] = [
        ("absent", &[(81, 81)]),
        ("named-2", &[]),
        ("named", &[(80, 8080)]),
        ("number", &[(80, 9000), (81, 81)]),
        ("udp", &[]),
    ];
    assert_eq!(services, want.map(|(name, ports)| (name.to_owned(), ports.to_vec())));
    // Init containers that restart serve, too; others have ended.
    let init = |policy: &str| {
        format!(
            "initContainers: [{{name: side, {policy} ports: [{{name: nothing, containerPort: 7000}}]}}],"
        )
    };
    for (policy, want) in [("restartPolicy: Always,", Some(7000)), ("", None)] {
        let all = objects(&pod("name: a", &init(policy), RUNNING));
        let pod = &all.pods.values().next().unwrap().value;
        assert_eq!(super::named_port(pod, "nothing"), want);
    }
}

#[test]
fn who_may_have_certificates_where() {
    let yaml = pod("name: a", "nodeName: node-1, serviceAccountName: sa,", "")
        + &pod("name: b", "nodeName: node-1,", RUNNING)
        + &pod(
            "name: c",
            "nodeName: node-2, serviceAccountName: sa,",
            &RUNNING.replace("Running", "Failed"),
        )
        + &pod("name: d", "nodeName: node-2, hostNetwork: true,", RUNNING)
        + &pod("name: e", "serviceAccountName: sa,", RUNNING);
    let pods = compile(&objects(&yaml), &MeshConfig::default()).pods;
    assert_eq!(pods.len(), 1, "{pods:?}");
    let accounts: Vec<String> =
        pods["node-1"].iter().map(|(ns, sa)| format!("{ns}/{sa}")).collect();
    assert_eq!(accounts, ["shop/default", "shop/sa"]);
}

#[test]
fn duplicate_addresses_name_both() {
    let said = |yaml: &str, other: &str| {
        let found = compile(&objects(yaml), &MeshConfig::default()).diagnostics;
        assert!(has(&found, Code::DuplicateAddress, Severity::Error, "status.podIP"), "{found:?}");
        let d = found.iter().find(|d| d.code == Code::DuplicateAddress).unwrap();
        assert_eq!(d.object, "Pod/shop/a");
        assert!(d.message.contains(other), "{}", d.message);
    };
    // The first by place keeps it.
    let two = pod("name: b", "", RUNNING) + &pod("name: a", "", RUNNING);
    said(&two, "Pod/shop/b (test.yaml:3)");
    let vip = "{apiVersion: v1, kind: Service, metadata: {name: s, namespace: shop}, spec: {clusterIP: 10.0.0.1}}";
    said(&(vip.to_owned() + &pod("name: a", "", RUNNING)), "Service/shop/s");
    // Pods in the host's network share its address.
    let host = pod("name: a", "hostNetwork: true,", RUNNING)
        + &pod("name: b", "hostNetwork: true,", RUNNING);
    assert!(!Mesh::new(&host).has(Code::DuplicateAddress, Severity::Error, "status.podIP"));
}
