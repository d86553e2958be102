//! Gateways to what runs them, and to what is said of them.

use proptest::prelude::*;

use super::*;
use crate::local::{Assignments, LocalConfig, LocalPlan, plan};
use crate::testing::{has, objects, pod};
use crate::{Compiled, MeshConfig, Severity, compile};

fn gateway(metadata: &str, spec: &str) -> String {
    format!(
        "
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {{name: wp, namespace: shop{metadata}}}
spec:
  gatewayClassName: istio-waypoint
{spec}
"
    )
}

const MESH: &str = "  listeners: [{name: mesh, port: 15008, protocol: HBONE}]";

fn class(name: &str, controller: &str, labels: &str) -> String {
    format!(
        "\n---\n{{apiVersion: gateway.networking.k8s.io/v1, kind: GatewayClass, metadata: {{name: {name}, labels: \
         {{{labels}}}}}, spec: {{controllerName: {controller}}}}}\n"
    )
}

const NAMESPACE: &str = "\n---\n{apiVersion: v1, kind: Namespace, metadata: {name: shop}}\n";

fn planned(yaml: &str) -> (LocalPlan, Objects) {
    let user = objects(yaml);
    let config = LocalConfig::with_nodes(2);
    (plan(&user, &config, &mut Assignments::default()), user)
}

/// What the control plane would see of a folder, once pods run; `ready`: and are ready.
fn compiled(yaml: &str, ready: bool) -> Compiled {
    let (plan, user) = planned(yaml);
    let mut settled = plan.settled(&user);
    if !ready {
        settled.pods.clear();
        for p in &plan.pods {
            let body = crate::Body::Pod(p.with_status("Running", false, false).into());
            let (namespace, name) = (p.namespace.clone(), p.name.clone());
            let origin = crate::Origin::new("test.yaml", 1);
            settled.insert(crate::Object { namespace, name, origin, body });
        }
    }
    compile(&settled, &MeshConfig::default())
}

fn words(status: &GatewayStatus) -> Vec<String> {
    let word = |c: &Condition| format!("{}={} {}", c.kind, c.status, c.reason);
    let own = status.conditions.iter().map(word);
    let listeners = status
        .listeners
        .iter()
        .flat_map(|l| l.conditions.iter().map(move |c| format!("{}: {}", l.name, word(c))));
    own.chain(listeners).collect()
}

#[test]
fn a_gateway_becomes_what_runs_it() {
    let yaml = format!("{NAMESPACE}{}", gateway(", labels: {istio.io/waypoint-for: all}", MESH));
    let (plan, user) = planned(&yaml);
    assert_eq!(plan.diagnostics, []);
    assert_eq!((plan.pods.len(), plan.services.len(), plan.made.len()), (1, 1, 2));
    let pod = &plan.pods[0];
    assert_eq!(pod.owner.as_deref(), Some("wp"));
    assert!(!pod.captured(), "it ends HBONE itself");
    assert_eq!(pod.origin, "test.yaml:5");
    let spec = pod.pod.spec.as_ref().unwrap();
    assert_eq!(spec.service_account_name.as_deref(), Some("wp"));
    let container = &spec.containers[0];
    assert_eq!(container.image.as_deref(), Some("ambit/waypoint"));
    assert_eq!(container.args.as_ref().unwrap()[0], "proxy");
    assert_eq!(container.command, None, "the image says what runs");
    let env = container.env.as_ref().unwrap().iter();
    let env: BTreeMap<&str, String> = env
        .map(|e| {
            let field = e.value_from.as_ref().and_then(|f| f.field_ref.as_ref());
            let field = field.map(|f| f.field_path.clone());
            (e.name.as_str(), e.value.clone().or(field).unwrap())
        })
        .collect();
    for (name, value) in [
        ("POD_NAME", "metadata.name"),
        ("POD_NAMESPACE", "metadata.namespace"),
        ("SERVICE_ACCOUNT", "spec.serviceAccountName"),
        ("NODE_NAME", "spec.nodeName"),
        ("INSTANCE_IP", "status.podIP"),
        ("XDS_ADDRESS", "https://10.89.0.1:15012"),
        ("ROOT_CERT", "/var/run/secrets/istio/root-cert.pem"),
        ("TOKEN_FILE", "/var/run/secrets/tokens/istio-token"),
        ("TRUST_DOMAIN", "cluster.local"),
        ("CLUSTER_ID", "Kubernetes"),
        ("NETWORK", ""),
    ] {
        assert_eq!(env.get(name).map(String::as_str), Some(value), "{name}");
    }
    // Every volume is mounted, and every mount is of a volume.
    let volumes: BTreeSet<&str> = spec.volumes.iter().flatten().map(|v| v.name.as_str()).collect();
    let mounts = container.volume_mounts.iter().flatten().map(|m| m.name.as_str());
    assert_eq!(volumes, mounts.collect());
    let service = plan.services[0].spec.as_ref().unwrap();
    let ports: Vec<_> =
        service.ports.iter().flatten().map(|p| (p.port, p.name.as_deref())).collect();
    assert_eq!(ports, [(15008, Some("mesh")), (15021, Some("status"))]);
    assert_eq!(service.cluster_ips.as_ref().map(Vec::len), Some(2), "both families");

    // And it is a proxy that ends HBONE under its own account, with nothing to complain about.
    let compiled = compile(&plan.settled(&user), &MeshConfig::default());
    assert!(
        compiled.diagnostics.iter().all(|d| d.severity == Severity::Info),
        "{:?}",
        compiled.diagnostics
    );
    let workload = &compiled.workloads[0];
    assert!(workload.native_tunnel && workload.protocol == model::TunnelProtocol::Hbone);
    assert_eq!(workload.identity().to_string(), "spiffe://cluster.local/ns/shop/sa/wp");
    assert_eq!(compiled.waypoint_accounts, [("shop".into(), "wp".into())].into());
    let status = &compiled.gateways[0];
    assert_eq!((status.traffic, status.ready, status.replicas), ("all", 1, 1));
    assert_eq!(status.addresses[0], "wp.shop.svc.cluster.local");
    assert_eq!(status.addresses.len(), 3);
    assert_eq!(
        words(status),
        [
            "Accepted=true Accepted",
            "Programmed=true Programmed",
            "mesh: Accepted=true Accepted",
            "mesh: Programmed=true Programmed",
        ]
    );
}

#[test]
fn labels_are_istios_and_the_users() {
    let infrastructure = "  infrastructure: {labels: {team: web, istio.io/dataplane-mode: ambient}, annotations: {a: b}}\n";
    let yaml = format!("{NAMESPACE}{}", gateway("", &format!("{infrastructure}{MESH}")));
    let (plan, user) = planned(&yaml);
    let settled = plan.settled(&user);
    let key = ("shop".into(), "wp".into());
    let deployment = &settled.deployments[&key];
    let template = deployment.value.spec.as_ref().unwrap().template.metadata.clone().unwrap();
    let all = [
        &settled.services[&key].value.metadata,
        &settled.service_accounts[&key].value.metadata,
        &deployment.value.metadata,
        &template,
    ];
    for metadata in all {
        let label = |name: &str| metadata.labels.as_ref().unwrap()[name].clone();
        assert_eq!(label("gateway.networking.k8s.io/gateway-name"), "wp");
        assert_eq!(label("gateway.networking.k8s.io/gateway-class-name"), "istio-waypoint");
        assert_eq!(label("istio.io/dataplane-mode"), "none", "not for the user to say");
        assert_eq!(label("team"), "web");
        assert_eq!(metadata.annotations.as_ref().unwrap()["a"], "b");
    }
    assert_eq!(template.labels.as_ref().unwrap()["networking.istio.io/tunnel"], "http");
    for metadata in &all[..3] {
        assert_eq!(metadata.annotations.as_ref().unwrap()["ambit.io/origin"], "test.yaml:5");
    }
    // Another line of the file is no reason for another pod.
    let moved = planned(&format!("# a comment\n{yaml}")).0;
    assert_eq!(moved.pods[0].template_hash, plan.pods[0].template_hash);
}

#[test]
fn replicas() {
    let check = |text: &str, pods: usize, bad: bool| {
        let metadata = format!(", annotations: {{ambit.io/replicas: {text}}}");
        let yaml = format!("{NAMESPACE}{}", gateway(&metadata, MESH));
        let (plan, user) = planned(&yaml);
        assert_eq!(plan.pods.len(), pods, "{text}");
        let found = compile(&plan.settled(&user), &MeshConfig::default()).diagnostics;
        let field = "metadata.annotations.ambit.io/replicas";
        assert_eq!(has(&found, Code::InvalidField, Severity::Error, field), bad, "{found:?}");
    };
    check("'2'", 2, false);
    check("'50'", 50, false);
    for bad in ["'0'", "'51'", "'-1'", "many", "'2.5'", "''"] {
        check(bad, 1, true);
    }
}

#[test]
fn what_is_not_ready_is_not_programmed() {
    let yaml = format!("{NAMESPACE}{}", gateway("", MESH));
    let check = |compiled: &Compiled, want: &str| {
        assert_eq!(words(&compiled.gateways[0])[1], want);
        assert!(!compiled.gateways[0].is("Programmed") && compiled.gateways[0].is("Accepted"));
    };
    check(&compiled(&yaml, false), "Programmed=false NoResources");
    check(&compile(&objects(&yaml), &MeshConfig::default()), "Programmed=false Pending");
    let (plan, user) = planned(&yaml);
    let mut settled = plan.settled(&user);
    let service = settled.services.values_mut().next().unwrap();
    let spec = std::sync::Arc::make_mut(&mut service.value).spec.as_mut().unwrap();
    (spec.cluster_ip, spec.cluster_ips) = (None, None);
    check(&compile(&settled, &MeshConfig::default()), "Programmed=false AddressNotAssigned");
}

#[test]
fn gateways_that_are_not_served() {
    let check = |yaml: &str, code: Code, field: &str, want: &[&str]| {
        let yaml = format!("{NAMESPACE}{yaml}");
        let compiled = compiled(&yaml, true);
        assert!(
            has(&compiled.diagnostics, code, Severity::Error, field),
            "{:?}",
            compiled.diagnostics
        );
        assert_eq!(words(&compiled.gateways[0])[..2], *want, "{yaml}");
        let accepted = want[0].contains("true");
        assert_eq!(planned(&yaml).0.pods.len(), usize::from(accepted), "{yaml}");
        assert_eq!(compiled.waypoint_accounts.len(), usize::from(accepted), "{yaml}");
    };
    let none = ["Accepted=false ListenersNotValid", "Programmed=false Invalid"];
    let listeners = |all: &str| gateway("", &format!("  listeners: [{all}]"));
    let mesh = "{name: mesh, port: 15008, protocol: HBONE}";
    let http = "{name: http, port: 80, protocol: HTTP}";
    check(&listeners(http), Code::InvalidField, "spec.listeners[0].protocol", &none);
    let port = listeners("{name: mesh, port: 15009, protocol: HBONE}");
    check(&port, Code::InvalidField, "spec.listeners[0].port", &none);
    check(&listeners(""), Code::InvalidField, "spec.listeners", &none);
    let some = ["Accepted=true ListenersNotValid", "Programmed=true Programmed"];
    let both = listeners(&format!("{http}, {mesh}"));
    check(&both, Code::InvalidField, "spec.listeners[0].protocol", &some);
    let twice = listeners(&format!("{mesh}, {}", mesh.replace("name: mesh", "name: more")));
    check(&twice, Code::InvalidField, "spec.listeners[1].port", &some);
    check(
        &gateway("", &format!("  addresses: [{{value: 10.1.2.3}}]\n{MESH}")),
        Code::Unsupported,
        "spec.addresses",
        &["Accepted=false UnsupportedAddress", "Programmed=false Invalid"],
    );
    check(
        &gateway(
            "",
            &format!(
                "  infrastructure: {{parametersRef: {{group: '', kind: ConfigMap, name: x}}}}\n{MESH}"
            ),
        ),
        Code::Unsupported,
        "spec.infrastructure.parametersRef",
        &["Accepted=false InvalidParameters", "Programmed=false Invalid"],
    );
    for name in ["w.p", "1wp"] {
        check(
            &gateway("", MESH).replace("name: wp", &format!("name: {name}")),
            Code::InvalidField,
            "metadata.name",
            &["Accepted=false Invalid", "Programmed=false Invalid"],
        );
    }
}

#[test]
fn classes() {
    let check = |yaml: &str, served: bool, code: Option<(Code, Severity)>| {
        let yaml = format!("{NAMESPACE}{yaml}");
        let compiled = compiled(&yaml, true);
        assert_eq!(compiled.gateways.len(), usize::from(served), "{yaml}");
        let field = "spec.gatewayClassName";
        let found = compiled.diagnostics.iter().find(|d| d.field == field);
        assert_eq!(found.map(|d| (d.code, d.severity)), code, "{yaml}");
    };
    let of = |class: &str| gateway("", MESH).replace("istio-waypoint", class);
    let ours = "istio.io/mesh-controller";
    check(&of("istio-waypoint"), true, None);
    check(&(of("istio-waypoint") + &class("istio-waypoint", ours, "")), true, None);
    check(&(of("mine") + &class("mine", ours, "")), true, None);
    check(&of("mine"), false, Some((Code::DanglingReference, Severity::Error)));
    check(&of("istio"), false, Some((Code::DanglingReference, Severity::Error)));
    let other = Some((Code::Unsupported, Severity::Warning));
    check(&(of("nginx") + &class("nginx", "example.com/nginx", "")), false, other);
    // The class was given to somebody else.
    check(&(of("istio-waypoint") + &class("istio-waypoint", "istio.io/agent", "")), false, other);
}

#[test]
fn what_goes_through() {
    let check = |own: &str, of_class: &str, want: TrafficFor, bad: bool| {
        let label = |text: &str| format!("istio.io/waypoint-for: {text}");
        let metadata =
            if own.is_empty() { String::new() } else { format!(", labels: {{{}}}", label(own)) };
        let class = class("istio-waypoint", "istio.io/mesh-controller", &label(of_class));
        let of_class = if of_class.is_empty() { "" } else { &class };
        let all = objects(&format!("{NAMESPACE}{}{of_class}", gateway(&metadata, MESH)));
        assert_eq!(understand(&all).values().next().unwrap().traffic, want, "{own} {of_class}");
        let found = compile(&all, &MeshConfig::default()).diagnostics;
        let errors = found.iter().filter(|d| d.code == Code::InvalidField);
        assert_eq!(errors.count() > 0, bad, "{found:?}");
    };
    check("", "", TrafficFor::Service, false);
    check("workload", "", TrafficFor::Workload, false);
    check("", "all", TrafficFor::All, false);
    check("none", "all", TrafficFor::None, false);
    check("services", "", TrafficFor::Service, true);
    check("", "nonsense", TrafficFor::Service, true);
    for traffic in TrafficFor::ALL {
        assert_eq!(TrafficFor::parse(traffic.as_str()), Some(traffic));
    }
}

#[test]
fn names_that_are_taken() {
    let gateway = gateway("", MESH);
    let service = "\n---\n{apiVersion: v1, kind: Service, metadata: {name: wp, namespace: shop}, spec: {selector: {a: b}, ports: [{port: 80}]}}\n";
    let deployment = "\n---\n{apiVersion: apps/v1, kind: Deployment, metadata: {name: wp, namespace: shop}, spec: {selector: {matchLabels: {a: b}}, template: {metadata: {labels: {a: b}}, spec: {containers: [{name: c, image: i}]}}}}\n";
    for (taken, kind, pods) in [(service, "Service", 0), (deployment, "Deployment", 1)] {
        let (plan, user) = planned(&format!("{NAMESPACE}{gateway}{taken}"));
        assert_eq!((plan.pods.len(), plan.made.len()), (pods, 0));
        let d = &plan.diagnostics[0];
        assert_eq!((d.code, d.field.as_str()), (Code::DuplicateObject, "metadata.name"));
        assert!(d.message.contains(&format!("{kind}/shop/wp (test.yaml:")), "{}", d.message);
        let compiled = compile(&plan.settled(&user), &MeshConfig::default());
        assert!(!compiled.gateways[0].is("Programmed"), "the {kind} is somebody else's");
    }
    // An account of that name is used as it is.
    let account = "\n---\n{apiVersion: v1, kind: ServiceAccount, metadata: {name: wp, namespace: shop, labels: {mine: 'yes'}}}\n";
    let (plan, user) = planned(&format!("{NAMESPACE}{gateway}{account}"));
    assert_eq!((plan.pods.len(), plan.made.len()), (1, 1));
    let settled = plan.settled(&user);
    let account = settled.service_accounts.values().next().unwrap();
    assert_eq!(account.value.metadata.labels.as_ref().unwrap()["mine"], "yes");
}

#[test]
fn a_world_without_a_mesh_serves_no_gateway() {
    let mut config = LocalConfig::with_nodes(1);
    config.waypoints = None;
    let all = objects(&format!("{NAMESPACE}{}", gateway("", MESH)));
    let plan = plan(&all, &config, &mut Assignments::default());
    assert!(plan.pods.is_empty() && plan.services.is_empty() && plan.made.is_empty());
}

#[test]
fn pods_of_others_do_not_make_a_waypoint_ready() {
    let (plan, user) = planned(&format!("{NAMESPACE}{}", gateway("", MESH)));
    let mut settled = plan.settled(&user);
    settled.pods.clear();
    for object in
        objects(&pod("bank", "wp-1", "10.0.0.9", "gateway.networking.k8s.io/gateway-name: wp")).pods
    {
        settled.pods.insert(object.0, object.1);
    }
    let compiled = compile(&settled, &MeshConfig::default());
    assert_eq!(words(&compiled.gateways[0])[1], "Programmed=false NoResources");
}

proptest! {
    /// Any listeners: total, one status each, and rendered exactly when accepted.
    #[test]
    fn any_listeners(
        all in prop::collection::vec((any::<i32>(), prop::sample::select(vec!["HBONE", "HTTP", "", "hbone"]), any::<bool>()), 0..5),
    ) {
        let listeners: Vec<GatewayListeners> = all.iter().enumerate().map(|(i, (port, protocol, right))| GatewayListeners {
            name: format!("l{i}"),
            port: if *right { 15008 } else { *port },
            protocol: (*protocol).to_owned(),
            ..GatewayListeners::default()
        }).collect();
        let mut user = objects(&format!("{NAMESPACE}{}", gateway("", MESH)));
        let key = ("shop".into(), "wp".into());
        let mut changed = (*user.gateways[&key].value).clone();
        changed.spec.listeners = listeners.clone();
        let origin = user.gateways[&key].origin.clone();
        user.gateways.insert(key, Sourced::new(changed, origin));
        let served = listeners.iter().any(|l| l.port == 15008 && l.protocol == "HBONE");
        let plan = plan(&user, &LocalConfig::with_nodes(1), &mut Assignments::default());
        prop_assert_eq!(plan.pods.len(), usize::from(served));
        let compiled = compile(&plan.settled(&user), &MeshConfig::default());
        let status = &compiled.gateways[0];
        prop_assert_eq!(status.is("Accepted"), served);
        prop_assert_eq!(status.listeners.len(), listeners.len());
        prop_assert_eq!(status.is("Programmed"), served);
    }
}
