//! Plans: who runs where, under which name and address, and what stays when planning again.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::testing::{has, objects};
use crate::{Code, Severity};

fn deployment(name: &str, replicas: &str, extra: &str) -> String {
    format!(
        "
---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: {name}, namespace: shop}}
spec:
  {replicas}
  selector: {{matchLabels: {{app: {name}}}}}
  template:
    metadata: {{labels: {{app: {name}}}}}
    spec:
      {extra}
      containers: [{{name: main, image: a}}]
"
    )
}

fn pod(name: &str, spec: &str) -> String {
    format!(
        "\n---\n{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: shop}}, \
         spec: {{{spec} containers: [{{name: main}}]}}}}\n"
    )
}

fn service(name: &str, spec: &str) -> String {
    format!(
        "\n---\n{{apiVersion: v1, kind: Service, metadata: {{name: {name}, namespace: shop}}, \
         spec: {{{spec} selector: {{app: web}}, ports: [{{port: 80}}]}}}}\n"
    )
}

/// A local world that is planned again and again.
struct World {
    config: LocalConfig,
    assignments: Assignments,
}

impl World {
    fn new(nodes: u8) -> Self {
        Self { config: LocalConfig::with_nodes(nodes), assignments: Assignments::default() }
    }

    fn plan(&mut self, yaml: &str) -> LocalPlan {
        plan(&objects(yaml), &self.config, &mut self.assignments)
    }
}

fn names(plan: &LocalPlan) -> Vec<String> {
    plan.pods.iter().map(|p| p.name.to_string()).collect()
}

fn nodes(plan: &LocalPlan) -> Vec<String> {
    plan.pods.iter().map(|p| p.node.to_string()).collect()
}

/// Name, node and first address of every pod.
fn places(plan: &LocalPlan) -> Vec<(String, String, IpAddr)> {
    plan.pods.iter().map(|p| (p.name.to_string(), p.node.to_string(), p.ips[0])).collect()
}

#[test]
fn the_usual_ranges() {
    let config = LocalConfig::with_nodes(2);
    let node = &config.nodes[1];
    assert_eq!(node.name, "node-2");
    assert_eq!(node.addresses.map(|ip| ip.to_string()), ["10.89.0.12", "fd89::c"]);
    assert_eq!(node.pods_v4.to_string(), "10.244.2.0/24");
    assert_eq!(node.pods_v6.to_string(), "fd00:10:244:2::/64");
    assert_eq!(config.services_v4.to_string(), "10.96.0.0/16");
    assert_eq!(config.services_v6.to_string(), "fd00:10:96::/112");
    assert_eq!(config.dns.map(|ip| ip.to_string()), ["10.96.0.10", "fd00:10:96::a"]);
}

#[test]
fn deployments_become_pods() {
    let mut world = World::new(2);
    let plan = world.plan(&deployment("web", "replicas: 3", ""));
    assert_eq!(plan.diagnostics, []);
    assert_eq!(plan.pods.len(), 3);
    let hash = &plan.pods[0].template_hash;
    for p in &plan.pods {
        assert!(p.name.starts_with(&format!("web-{hash}-")), "{}", p.name);
        assert_eq!(p.owner.as_deref(), Some("web"));
        assert_eq!(p.origin, "test.yaml:3");
        assert_eq!(p.pod.metadata.labels.as_ref().unwrap()["pod-template-hash"], **hash);
        assert_eq!(p.pod.metadata.annotations.as_ref().unwrap()["ambit.io/origin"], "test.yaml:3");
        let owner = &p.pod.metadata.owner_references.as_ref().unwrap()[0];
        assert_eq!((owner.kind.as_str(), owner.name.as_str()), ("Deployment", "web"));
        let spec = p.pod.spec.as_ref().unwrap();
        assert_eq!(spec.node_name.as_deref(), Some(&*p.node));
        assert_eq!(spec.service_account_name.as_deref(), Some("default"));
    }
    // Missing replicas: one. None: none.
    assert_eq!(World::new(1).plan(&deployment("web", "", "")).pods.len(), 1);
    assert_eq!(World::new(1).plan(&deployment("web", "replicas: 0", "")).pods.len(), 0);
    // Long names still give host names.
    let long = deployment(&"a".repeat(63), "replicas: 2", "");
    assert!(World::new(1).plan(&long).pods.iter().all(|p| p.name.len() <= 63));
}

#[test]
fn broken_deployments() {
    let said = |yaml: &str, code: Code, field: &str, pods: usize| {
        let plan = World::new(1).plan(yaml);
        assert!(has(&plan.diagnostics, code, Severity::Error, field), "{:?}", plan.diagnostics);
        assert_eq!(plan.pods.len(), pods);
        assert!(plan.diagnostics[0].object.starts_with("Deployment/shop/web"));
        assert!(plan.diagnostics[0].origin.starts_with("test.yaml:"));
    };
    let web = deployment("web", "", "");
    let mismatch = web.replace("matchLabels: {app: web}", "matchLabels: {app: other}");
    said(&mismatch, Code::InvalidField, "spec.selector", 0);
    said(&web.replace("{matchLabels: {app: web}}", "{}"), Code::InvalidField, "spec.selector", 0);
    let expression = |e: &str| {
        web.replace("matchLabels: {app: web}", &format!("matchExpressions: [{{key: app, {e}}}]"))
    };
    said(&expression("operator: In, values: [x]"), Code::InvalidField, "spec.selector", 0);
    said(&expression("operator: Nonsense"), Code::InvalidField, "spec.selector", 0);
    for good in ["operator: In, values: [web]", "operator: Exists", "operator: NotIn, values: [x]"]
    {
        assert_eq!(World::new(1).plan(&expression(good)).pods.len(), 1, "{good}");
    }
    said(&deployment("web", "replicas: 2000000000", ""), Code::LimitExceeded, "spec.replicas", 253);
    let pinned = deployment("web", "", "nodeName: node-7");
    said(&pinned, Code::Unschedulable, "spec.template.spec.nodeName", 0);
    let nowhere = deployment("web", "", "nodeSelector: {disk: ssd}");
    said(&nowhere, Code::Unschedulable, "spec.template.spec.nodeSelector", 0);
}

#[test]
fn planning_again_moves_nothing() {
    let mut world = World::new(2);
    let yaml = deployment("web", "replicas: 3", "")
        + &deployment("db", "replicas: 2", "")
        + &pod("solo", "");
    let first = world.plan(&yaml);
    let before = world.assignments.clone();
    assert_eq!(places(&world.plan(&yaml)), places(&first));
    assert_eq!(world.assignments, before);
    // Through text and back, as after a restart.
    let text = serde_json::to_string(&world.assignments).unwrap();
    world.assignments = serde_json::from_str(&text).unwrap();
    assert_eq!(places(&world.plan(&yaml)), places(&first));
    // More replicas: those that were stay.
    let more = world.plan(&yaml.replace("replicas: 3", "replicas: 5"));
    assert!(places(&first).iter().all(|p| places(&more).contains(p)));
    assert_eq!(more.pods.len(), first.pods.len() + 2);
    // Fewer: a part of them.
    let fewer = world.plan(&yaml.replace("replicas: 3", "replicas: 1"));
    assert!(places(&fewer).iter().all(|p| places(&first).contains(p)));
    // Names do not depend on what was there before.
    assert_eq!(names(&World::new(5).plan(&yaml)), names(&first));
}

#[test]
fn a_changed_template_gives_new_pods() {
    let mut world = World::new(2);
    let yaml = deployment("web", "replicas: 2", "") + &pod("solo", "");
    let old = world.plan(&yaml);
    let new = world.plan(&yaml.replace("image: a", "image: b"));
    let (old_names, new_names) = (names(&old), names(&new));
    assert_eq!(old_names.iter().filter(|n| new_names.contains(n)).collect::<Vec<_>>(), ["solo"]);
    let ending: Vec<&str> = world.assignments.ending().collect();
    assert_eq!(ending.len(), 2);
    // Old and new run side by side during a rollout: no address is shared.
    let ips = |plan: &LocalPlan| plan.pods.iter().map(|p| p.ips[0]).collect::<BTreeSet<_>>();
    assert_eq!(ips(&old).union(&ips(&new)).count(), 5);
    // A changed pod keeps its name, and gets another address.
    let changed = world.plan(&yaml.replace("{name: main}", "{name: main, command: [x]}"));
    let solo = |plan: &LocalPlan| plan.pods.iter().find(|p| &*p.name == "solo").cloned().unwrap();
    assert_ne!(solo(&old).ips, solo(&changed).ips);
    assert_ne!(solo(&old).template_hash, solo(&changed).template_hash);
    // Back to the first: the names are those of the first.
    assert_eq!(names(&world.plan(&yaml)), old_names);
}

#[test]
fn addresses_rotate() {
    let mut world = World::new(1);
    let mut seen = BTreeSet::new();
    // 253 addresses: each comes once before any comes again, released or not.
    for i in 0..253 {
        let plan = world.plan(&pod(&format!("p{i}"), ""));
        assert!(seen.insert(plan.pods[0].ips), "{i}");
        if i % 2 == 0 {
            world.assignments.release("shop", &format!("p{}", i - 1));
        }
    }
    assert_eq!(seen.first().unwrap()[0].to_string(), "10.244.1.2");
    assert_eq!(
        seen.last().unwrap().map(|ip| ip.to_string()),
        ["10.244.1.254", "fd00:10:244:1::fe"]
    );
    let again = world.plan(&pod("again", ""));
    assert!(seen.contains(&again.pods[0].ips));
    // What nobody released is taken only when nothing else is left, oldest first.
    let mut world = World::new(1);
    let first = world.plan(&deployment("web", "replicas: 253", ""));
    let full = world.plan(&(deployment("web", "replicas: 253", "") + &pod("late", "")));
    assert!(has(&full.diagnostics, Code::AddressesExhausted, Severity::Error, ""));
    assert_eq!(full.pods.len(), 253);
    let next = world.plan(&deployment("web", "replicas: 253", "").replace("image: a", "image: b"));
    assert_eq!((next.diagnostics.len(), next.pods.len()), (0, 253));
    assert_eq!(first.pods.len(), 253);
}

#[test]
fn pods_spread() {
    let spread = |yaml: &str, n: u8| nodes(&World::new(n).plan(yaml));
    let count = |nodes: &[String], node: &str| nodes.iter().filter(|n| *n == node).count();
    let three = spread(&deployment("web", "replicas: 3", ""), 3);
    assert!(["node-1", "node-2", "node-3"].iter().all(|n| count(&three, n) == 1));
    let four = spread(&deployment("web", "replicas: 4", ""), 2);
    assert_eq!((count(&four, "node-1"), count(&four, "node-2")), (2, 2));
    // Each owner by itself, then the emptier node.
    let two = spread(&(deployment("a", "", "") + &deployment("b", "", "")), 2);
    assert_eq!(two, ["node-1", "node-2"]);
    assert_eq!(
        spread(&deployment("web", "replicas: 2", "nodeName: node-2"), 2),
        ["node-2", "node-2"]
    );
    let host = "nodeSelector: {kubernetes.io/hostname: node-2, kubernetes.io/os: linux}";
    assert_eq!(spread(&deployment("web", "", host), 2), ["node-2"]);
    let labelled =
        "{apiVersion: v1, kind: Node, metadata: {name: node-2, labels: {disk: ssd}}}".to_owned();
    let ssd = labelled + &deployment("web", "", "nodeSelector: {disk: ssd}");
    assert_eq!(spread(&ssd, 2), ["node-2"]);
    // A pin that changes moves the pod; a node that is gone gives its pods up.
    let mut world = World::new(2);
    let solo = |node: &str| pod("solo", &format!("nodeName: {node},"));
    assert_eq!(nodes(&world.plan(&solo("node-1"))), ["node-1"]);
    assert_eq!(nodes(&world.plan(&solo("node-2"))), ["node-2"]);
    assert_eq!(nodes(&world.plan(&pod("solo", ""))).len(), 1);
    let web = deployment("web", "replicas: 2", "");
    world.plan(&web);
    world.config = LocalConfig::with_nodes(1);
    assert_eq!(nodes(&world.plan(&web)), ["node-1", "node-1"]);
}

#[test]
fn host_network_and_enrolment() {
    let yaml = "{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}}"
        .to_owned()
        + &pod("a", "")
        + &pod("host", "hostNetwork: true,")
        + &pod("out", "").replace("name: out", "name: out, labels: {istio.io/dataplane-mode: none}")
        + &pod("side", "").replace("name: side", "name: side, annotations: {sidecar.istio.io/status: x}")
        + &pod("sys", "").replace("namespace: shop", "namespace: kube-system, labels: {istio.io/dataplane-mode: ambient}")
        + &pod("opt", "").replace("namespace: shop", "namespace: other, labels: {istio.io/dataplane-mode: ambient}")
        + &pod("none", "").replace("namespace: shop", "namespace: other");
    let plan = World::new(1).plan(&yaml);
    let enrolment = |name: &str| plan.pods.iter().find(|p| &*p.name == name).unwrap().enrolment;
    assert_eq!(enrolment("a"), Enrolment::Enrolled);
    assert_eq!(enrolment("host"), Enrolment::HostNetwork);
    assert_eq!(enrolment("out"), Enrolment::OptedOut);
    assert_eq!(enrolment("side"), Enrolment::Sidecar);
    assert_eq!(enrolment("sys"), Enrolment::SystemNamespace);
    assert_eq!(enrolment("opt"), Enrolment::Enrolled);
    assert_eq!(enrolment("none"), Enrolment::NotLabelled);
    let host = plan.pods.iter().find(|p| &*p.name == "host").unwrap();
    assert_eq!(host.ips, LocalConfig::with_nodes(1).nodes[0].addresses);
    // A pod cannot declare itself captured.
    let forged = pod("x", "")
        .replace("name: x", "name: x, annotations: {ambient.istio.io/redirection: enabled}");
    let plan = World::new(1).plan(&forged);
    assert!(!plan.pods[0].pod.metadata.annotations.as_ref().unwrap().contains_key(REDIRECTION));
}

/// `clusterIPs` of each Service; `-` for none.
fn vips(plan: &LocalPlan) -> Vec<String> {
    let text = |s: &Arc<Service>| {
        let spec = s.spec.as_ref().unwrap();
        let ips = spec.cluster_ips.clone().unwrap_or_default();
        assert_eq!(spec.cluster_ip.as_ref(), ips.first());
        if ips.is_empty() { "-".to_owned() } else { ips.join(",") }
    };
    plan.services.iter().map(text).collect()
}

#[test]
fn service_addresses() {
    let one = |spec: &str, want: &str| {
        let plan = World::new(1).plan(&service("a", spec));
        assert_eq!((vips(&plan), plan.diagnostics), (vec![want.to_owned()], vec![]), "{spec}");
    };
    one("", "10.96.1.0");
    one("clusterIP: None,", "None");
    one("clusterIP: 10.96.0.7,", "10.96.0.7");
    one("clusterIP: 'fd00:10:96::7',", "fd00:10:96::7");
    one("ipFamilyPolicy: SingleStack,", "10.96.1.0");
    one("ipFamilyPolicy: PreferDualStack,", "10.96.1.0,fd00:10:96::100");
    one("ipFamilyPolicy: RequireDualStack, ipFamilies: [IPv6, IPv4],", "fd00:10:96::100,10.96.1.0");
    one("ipFamilies: [IPv6],", "fd00:10:96::100");
    one("ipFamilyPolicy: PreferDualStack, clusterIP: 10.96.0.7,", "10.96.0.7,fd00:10:96::100");
    one("clusterIPs: [10.96.0.7, 'fd00:10:96::7'],", "10.96.0.7,fd00:10:96::7");
    one("type: NodePort,", "10.96.1.0");
    let external = service("a", "type: ExternalName, externalName: x.example,");
    assert!(World::new(1).plan(&external).services.is_empty());
    let refused = |spec: &str, code: Code| {
        let plan = World::new(1).plan(&service("a", spec));
        assert_eq!(vips(&plan), ["-"], "{spec}");
        assert!(has(&plan.diagnostics, code, Severity::Error, "spec.clusterIP"), "{spec}");
    };
    refused("clusterIP: 10.1.2.3,", Code::InvalidField);
    refused("clusterIP: 10.96.0.10,", Code::DuplicateAddress);
    let dns = service("kube-dns", "clusterIP: 10.96.0.10,")
        .replace("namespace: shop", "namespace: kube-system");
    assert_eq!(vips(&World::new(1).plan(&dns)), ["10.96.0.10"]);
}

#[test]
fn two_services_with_one_address() {
    let mut world = World::new(1);
    let yaml = service("b", "clusterIP: 10.96.0.7,")
        + &service("a", "clusterIP: 10.96.0.7,")
        + &service("c", "");
    let plan = world.plan(&yaml);
    // The first in the file has it, whatever the names.
    assert_eq!(vips(&plan), ["-", "10.96.0.7", "10.96.1.0"]);
    assert_eq!(plan.diagnostics.len(), 1);
    let d = &plan.diagnostics[0];
    assert_eq!((d.code, d.object.as_str()), (Code::DuplicateAddress, "Service/shop/a"));
    assert!(d.message.contains("Service/shop/b (test.yaml:3)"), "{}", d.message);
    // What was given stays given: a newcomer cannot ask it away.
    let taken = service("c", "") + &service("d", "clusterIP: 10.96.1.0,");
    let plan = world.plan(&taken);
    assert_eq!(vips(&plan), ["10.96.1.0", "-"]);
    assert!(plan.diagnostics[0].message.contains("Service/shop/c"));
    // Addresses of Services rotate, too.
    world.plan("");
    assert_eq!(vips(&world.plan(&service("e", ""))), ["10.96.1.1"]);
    // A new one does not get what another asks for by number.
    let asks = service("x", "") + &service("y", "clusterIP: 10.96.1.0,");
    assert_eq!(vips(&World::new(1).plan(&asks)), ["10.96.1.1", "10.96.1.0"]);
}

proptest! {
    /// Any sequence of edits: no two pods or Services share an address, and planning again is idle.
    #[test]
    fn no_address_twice(
        edits in prop::collection::vec((0_u8..4, 0_u8..6, 0_u8..3, 1_u8..4, any::<bool>()), 1..8),
    ) {
        let mut world = World::new(2);
        for (web, db, image, node_count, vip) in edits {
            world.config = LocalConfig::with_nodes(node_count);
            let yaml = deployment("web", &format!("replicas: {web}"), "")
                .replace("image: a", &format!("image: i{image}"))
                + &deployment("db", &format!("replicas: {db}"), "")
                + &service("a", if vip { "clusterIP: 10.96.1.1," } else { "" })
                + &service("b", "ipFamilyPolicy: PreferDualStack,")
                + &(if vip { String::new() } else { service("c", "clusterIP: 10.96.1.1,") });
            let plan = world.plan(&yaml);
            prop_assert_eq!(plan.pods.len(), usize::from(web + db));
            let pods = plan.pods.iter().flat_map(|p| p.ips);
            let services = plan.services.iter().flat_map(|s| crate::services::addresses(s.spec.as_ref().unwrap()));
            let all: Vec<IpAddr> = pods.chain(services).collect();
            prop_assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len());
            let before = world.assignments.clone();
            let again = world.plan(&yaml);
            prop_assert_eq!(places(&again), places(&plan));
            prop_assert_eq!(vips(&again), vips(&plan));
            prop_assert_eq!(&world.assignments, &before);
        }
    }
}
