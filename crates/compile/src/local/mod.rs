//! What a cluster's controllers and scheduler do, for the world on one machine, as one function.
//!
//! [`plan`] turns the user's objects into pods with names, nodes and addresses, and Services with virtual
//! addresses; a Gateway that is a waypoint becomes the Deployment and the Service that run it. [`Assignments`] remembers what was given to whom, so that planning again moves nothing.
//!
//! Invariants: pure and total; the same objects and assignments give the same plan; planning twice
//! changes nothing; a changed pod gets a new address (and, from a Deployment, a new name), so that whoever
//! still knows the old one meets nobody.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Pod, PodCondition, PodIP, PodStatus, Service};
use model::{IpPrefix, Str};

mod addresses;
mod deployments;
mod gateways;
mod plan;
mod services;

pub use addresses::Assignments;
pub use plan::plan;

use crate::MeshConfig;
use crate::diagnostics::Diagnostic;
use crate::enrolment::{Enrolment, REDIRECTION};
use crate::object::{Body, Meta as _, ORIGIN_ANNOTATION, Object, Objects, Origin};
use crate::waypoints::Settings;

/// Where the control plane of the local world listens: the lab's own end of the nodes' bridge.
pub const CONTROL_PLANE_V4: Ipv4Addr = Ipv4Addr::new(10, 89, 0, 1);
pub const CONTROL_PLANE_V6: Ipv6Addr = Ipv6Addr::new(0xfd89, 0, 0, 0, 0, 0, 0, 1);
/// Its port for proxies, as in Istio.
pub const CONTROL_PLANE_PORT: u16 = 15012;

/// The shape of the local world.
#[derive(Clone, Debug)]
pub struct LocalConfig {
    pub nodes: Vec<LocalNode>,
    pub services_v4: IpPrefix,
    pub services_v6: IpPrefix,
    /// Cluster DNS: never given to a Service other than `kube-system/kube-dns`.
    pub dns: [IpAddr; 2],
    /// What waypoints are run with. `None`: this world has no mesh, and Gateways stay unserved.
    pub waypoints: Option<Settings>,
}

/// One node of the local world.
#[derive(Clone, Debug)]
pub struct LocalNode {
    pub name: String,
    /// On the underlay.
    pub addresses: [IpAddr; 2],
    /// Host 1 is the node's own.
    pub pods_v4: IpPrefix,
    pub pods_v6: IpPrefix,
}

impl LocalConfig {
    /// `node-1` to `node-N` with the usual ranges.
    pub fn with_nodes(n: u8) -> Self {
        let v4 = |a, b, c, d| IpAddr::from([a, b, c, d]);
        let nodes = (1..=n.min(Self::MAX_NODES)).map(|i| LocalNode {
            name: format!("node-{i}"),
            addresses: [
                v4(10, 89, 0, 10 + i),
                IpAddr::from([0xfd89, 0, 0, 0, 0, 0, 0, u16::from(10 + i)]),
            ],
            pods_v4: IpPrefix { ip: v4(10, 244, i, 0), length: 24 },
            pods_v6: IpPrefix {
                ip: IpAddr::from([0xfd00, 0x10, 0x244, u16::from(i), 0, 0, 0, 0]),
                length: 64,
            },
        });
        let v6 = |last| IpAddr::from([0xfd00, 0x10, 0x96, 0, 0, 0, 0, last]);
        Self {
            nodes: nodes.collect(),
            services_v4: IpPrefix { ip: v4(10, 96, 0, 0), length: 16 },
            services_v6: IpPrefix { ip: v6(0), length: 112 },
            dns: [v4(10, 96, 0, 10), v6(0xa)],
            waypoints: Some(Self::waypoints(&MeshConfig::default())),
        }
    }

    fn waypoints(mesh: &MeshConfig) -> Settings {
        Settings {
            image: Settings::IMAGE.into(),
            xds_address: format!("https://{CONTROL_PLANE_V4}:{CONTROL_PLANE_PORT}").into(),
            xds_server_name: Settings::XDS_SERVER_NAME.into(),
            trust_domain: mesh.trust_domain.clone(),
            cluster: mesh.cluster.clone(),
            network: mesh.network.clone(),
            environment: Vec::new(),
        }
    }

    /// Node addresses are one byte, and some of it is taken.
    pub const MAX_NODES: u8 = 200;
}

/// What should run.
#[derive(Clone, Debug, Default)]
pub struct LocalPlan {
    /// By namespace and name.
    pub pods: Vec<PodPlan>,
    /// Services with their addresses filled in, by namespace and name. Without ExternalName.
    pub services: Vec<Arc<Service>>,
    /// What was made for Gateways beside pods and Services: Deployments and ServiceAccounts.
    pub made: Vec<Object>,
    pub diagnostics: Vec<Diagnostic>,
}

/// One pod that should run.
#[derive(Clone, Debug)]
pub struct PodPlan {
    /// With name, namespace, labels, owner and `spec.nodeName`; without status.
    pub pod: Arc<Pod>,
    pub namespace: Str,
    pub name: Str,
    /// The Deployment that it belongs to.
    pub owner: Option<Str>,
    /// Index of the node in [`LocalConfig::nodes`].
    pub node_index: usize,
    pub node: Str,
    /// IPv4, then IPv6. The node's for pods in the host's network.
    pub ips: [IpAddr; 2],
    /// Should the mesh capture it?
    pub enrolment: Enrolment,
    /// `file:line` of the object that asks for it.
    pub origin: String,
    /// Changes when what should run changes: a running pod with another hash is to be replaced. Labels
    /// and annotations of a pod that no Deployment made are not part of it: they change in place.
    pub template_hash: Str,
}

impl PodPlan {
    pub fn captured(&self) -> bool {
        self.enrolment.is_enrolled()
    }

    /// The Pod object as an API server would show it in this state.
    pub fn with_status(&self, phase: &str, ready: bool, captured: bool) -> Pod {
        let mut pod = (*self.pod).clone();
        let annotations = pod.metadata.annotations.get_or_insert_default();
        if captured {
            annotations.insert(REDIRECTION.to_owned(), "enabled".to_owned());
        } else {
            annotations.remove(REDIRECTION);
        }
        pod.status = Some(PodStatus {
            phase: Some(phase.to_owned()),
            pod_ip: Some(self.ips[0].to_string()),
            pod_ips: Some(self.ips.iter().map(|ip| PodIP { ip: ip.to_string() }).collect()),
            conditions: Some(vec![PodCondition {
                type_: "Ready".to_owned(),
                status: if ready { "True" } else { "False" }.to_owned(),
                ..PodCondition::default()
            }]),
            ..PodStatus::default()
        });
        pod
    }
}

impl LocalPlan {
    /// The objects as they will be once everything runs and is ready: what to compile to answer
    /// questions about a folder without starting it.
    pub fn settled(&self, objects: &Objects) -> Objects {
        let mut settled = objects.clone();
        settled.pods.clear();
        for made in &self.made {
            settled.insert(made.clone());
        }
        for plan in &self.pods {
            let body = Body::Pod(Arc::new(plan.with_status("Running", true, plan.captured())));
            settled.insert(object(&plan.namespace, &plan.name, &plan.origin, body));
        }
        for service in &self.services {
            let namespace: Str = service.metadata.namespace.as_deref().unwrap_or_default().into();
            let name: Str = service.metadata.name.as_deref().unwrap_or_default().into();
            match settled.services.get_mut(&(namespace.clone(), name.clone())) {
                // The user's own: its fields have lines.
                Some(sourced) => sourced.value = service.clone(),
                None => {
                    let origin = service.annotation(ORIGIN_ANNOTATION).unwrap_or_default();
                    let body = Body::Service(service.clone());
                    settled.insert(object(&namespace, &name, origin, body));
                }
            }
        }
        settled
    }
}

fn object(namespace: &Str, name: &Str, origin: &str, body: Body) -> Object {
    let (file, line) = origin.rsplit_once(':').unwrap_or((origin, "0"));
    let origin = Origin::new(file, line.parse().unwrap_or(0));
    Object { namespace: namespace.clone(), name: name.clone(), origin, body }
}

#[cfg(test)]
mod tests;
