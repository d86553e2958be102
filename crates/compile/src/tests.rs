//! The whole way: text to model values.

use model::{Health, TunnelProtocol};

use crate::*;

const SHOP: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop}
spec:
  replicas: 3
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - name: web
        command: [nginx]
        ports: [{name: http, containerPort: 8080}]
        resources: {limits: {cpu: 1}}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: http}]
";

#[test]
fn a_folder_becomes_a_mesh() {
    let mut folder = Folder::new();
    folder.set_file(0, "shop.yaml", SHOP);
    assert_eq!(folder.diagnostics(), []);
    let objects = folder.objects();
    let mut assignments = local::Assignments::default();
    let config = local::LocalConfig::with_nodes(2);
    let plan = local::plan(&objects, &config, &mut assignments);
    assert_eq!(plan.diagnostics, []);
    assert_eq!(plan.pods.len(), 3);
    let compiled = compile(&plan.settled(&objects), &MeshConfig::default());
    assert_eq!(compiled.diagnostics, []);
    assert_eq!(compiled.workloads.len(), 3);
    let web = &compiled.workloads[0];
    assert_eq!(web.protocol, TunnelProtocol::Hbone);
    assert_eq!(web.health, Health::Healthy);
    assert_eq!(&*web.workload_name, "web");
    assert_eq!(web.addresses.len(), 2);
    let (key, ports) = &web.services[0];
    assert_eq!(key.to_string(), "shop/web.shop.svc.cluster.local");
    assert_eq!((ports[0].service_port, ports[0].target_port), (80, 8080));
    let service = &compiled.services[0];
    assert_eq!((service.ports[0].target_port, service.vips.len()), (0, 1));
    assert_eq!(compiled.pods.len(), 2);
}
