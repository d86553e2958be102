//! For tests: YAML in, the proxies' answer out.

use std::net::{IpAddr, SocketAddr};

use engine::{InboundFacts, Verdict, authorize};
use model::{Change, Identity, Snapshot};

use crate::{Code, Compiled, Diagnostic, Folder, MeshConfig, Objects, Severity, compile};

/// Objects of one file that must be without fault.
pub(crate) fn objects(yaml: &str) -> Objects {
    let mut folder = Folder::new();
    folder.set_file(0, "test.yaml", yaml);
    assert_eq!(folder.diagnostics(), []);
    folder.objects()
}

/// A running pod of the mesh.
pub(crate) fn pod(namespace: &str, name: &str, ip: &str, labels: &str) -> String {
    format!(
        "
---
apiVersion: v1
kind: Pod
metadata:
  name: {name}
  namespace: {namespace}
  labels: {{istio.io/dataplane-mode: ambient, {labels}}}
  annotations: {{ambient.istio.io/redirection: enabled}}
spec:
  nodeName: node-1
  containers: [{{name: main}}]
status:
  phase: Running
  podIP: {ip}
  conditions: [{{type: Ready, status: 'True'}}]
"
    )
}

pub(crate) fn namespace(name: &str) -> String {
    format!("\n---\n{{apiVersion: v1, kind: Namespace, metadata: {{name: {name}}}}}\n")
}

/// A compiled mesh that answers questions.
pub(crate) struct Mesh {
    pub compiled: Compiled,
    pub snapshot: Snapshot,
}

impl Mesh {
    pub(crate) fn new(yaml: &str) -> Self {
        Self::of(&objects(yaml))
    }

    pub(crate) fn of(objects: &Objects) -> Self {
        let compiled = compile(objects, &MeshConfig::default());
        // Two policies with one key would replace each other at the proxy.
        let keys = compiled.policies.iter().map(|p| &p.key);
        assert_eq!(keys.collect::<std::collections::BTreeSet<_>>().len(), compiled.policies.len());
        let changes = (compiled.workloads.iter().cloned().map(Change::SetWorkload))
            .chain(compiled.services.iter().cloned().map(Change::SetService))
            .chain(compiled.policies.iter().cloned().map(Change::SetPolicy));
        let snapshot = Snapshot::default().with(changes);
        Self { compiled, snapshot }
    }

    /// May `peer` (`namespace/account`; empty: plaintext) at `source` reach a pod's port?
    pub(crate) fn allows(&self, peer: &str, source: &str, pod: &str, port: u16) -> bool {
        let (namespace, name) = pod.split_once('/').unwrap();
        let workload = self.snapshot.workload_named(&namespace.into(), &name.into()).unwrap();
        let identity = peer
            .split_once('/')
            .map(|(namespace, account)| Identity::new("cluster.local", namespace, account));
        let source_ip: IpAddr = source.parse().unwrap();
        let facts = InboundFacts {
            workload,
            destination: SocketAddr::new(workload.addresses[0], port),
            source_ip,
            peer: identity.as_ref(),
            client: None,
        };
        match authorize(&self.snapshot, &facts) {
            Verdict::Allow(_) => true,
            Verdict::Deny(_) => false,
            Verdict::Pending(refusal) => panic!("pending: {refusal:?}"),
        }
    }

    pub(crate) fn has(&self, code: Code, severity: Severity, field: &str) -> bool {
        has(&self.compiled.diagnostics, code, severity, field)
    }
}

pub(crate) fn has(all: &[Diagnostic], code: Code, severity: Severity, field: &str) -> bool {
    all.iter().any(|d| d.code == code && d.severity == severity && d.field == field)
}
