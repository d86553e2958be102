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
