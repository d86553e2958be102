//! What a running lab is doing, for `meshctl local status`.

use serde::{Deserialize, Serialize};

pub use crate::pod::lifecycle::ContainerStatus;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    pub name: String,
    pub dir: String,
    pub nodes: Vec<NodeStatus>,
    pub pods: Vec<PodStatus>,
    pub services: Vec<ServiceStatus>,
    /// As istiod-lite sees them; empty when it does not answer.
    #[serde(default)]
    pub waypoints: Vec<WaypointStatus>,
    pub processes: Vec<ProcessStatus>,
    /// One line each, as `meshctl` prints them.
    pub diagnostics: Vec<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeStatus {
    pub name: String,
    pub addresses: Vec<String>,
    pub pods: usize,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodStatus {
    pub namespace: String,
    pub name: String,
    pub node: String,
    pub ips: Vec<String>,
    /// The word of `kubectl get pods`: `Running`, `CrashLoopBackOff`, `Terminating` and so on.
    pub state: String,
    pub message: String,
    pub ready: bool,
    pub restarts: u32,
    pub containers: Vec<ContainerStatus>,
    /// Captured: calls go out and come in over HBONE.
    pub captured: bool,
    /// Why it is in the mesh or not.
    pub enrolment: String,
    /// Its name in the mesh, when it is in it.
    pub identity: Option<String>,
    /// `file:line`.
    pub origin: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceStatus {
    pub namespace: String,
    pub name: String,
    /// Empty: headless.
    pub addresses: Vec<String>,
    pub ports: Vec<String>,
    /// Ready ones, `ip`.
    pub endpoints: Vec<String>,
}

/// A Gateway that is a waypoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WaypointStatus {
    pub namespace: String,
    pub name: String,
    pub class: String,
    /// What goes through it: `service`, `workload`, `all` or `none`.
    pub traffic: String,
    /// `file:line`.
    pub origin: String,
    /// Hostname and addresses of its Service. Empty: there is none yet.
    pub addresses: Vec<String>,
    /// Pods that take connections, and pods that should run.
    pub ready: usize,
    pub replicas: i32,
    pub conditions: Vec<ConditionStatus>,
    pub listeners: Vec<ListenerStatus>,
    /// `namespace/name` of the Services whose traffic goes through it.
    pub services: Vec<String>,
    /// The same of pods.
    pub workloads: Vec<String>,
}

impl WaypointStatus {
    pub fn condition(&self, kind: &str) -> Option<&ConditionStatus> {
        self.conditions.iter().find(|c| c.kind == kind)
    }

    pub fn is(&self, kind: &str) -> bool {
        self.condition(kind).is_some_and(|c| c.status)
    }
}

/// A listener of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ListenerStatus {
    pub name: String,
    pub conditions: Vec<ConditionStatus>,
}

/// One of Gateway API's conditions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConditionStatus {
    #[serde(rename = "type")]
    pub kind: String,
    pub status: bool,
    pub reason: String,
    pub message: String,
}

/// One of the mesh's own processes.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProcessStatus {
    /// `istiod-lite`, or `ztunnel` of a node.
    pub name: String,
    pub node: Option<String>,
    /// `Running`, `Starting`, or why not.
    pub state: String,
    /// It says so itself.
    #[serde(default)]
    pub ready: bool,
    /// The newest push istiod-lite has made, or the one a ztunnel enforces.
    #[serde(default)]
    pub config: Option<String>,
    /// Inside the lab.
    pub pid: Option<i32>,
    pub restarts: u32,
    pub log: String,
}
