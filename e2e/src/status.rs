//! What `meshctl local status -o json` says, as far as the tests read it.

use serde::Deserialize;

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Status {
    /// The folder of YAML.
    pub dir: String,
    pub nodes: Vec<Node>,
    pub pods: Vec<Pod>,
    pub services: Vec<Service>,
    pub processes: Vec<Process>,
    pub diagnostics: Vec<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Node {
    pub name: String,
    pub addresses: Vec<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Pod {
    pub namespace: String,
    pub name: String,
    pub node: String,
    pub ips: Vec<String>,
    pub state: String,
    pub message: String,
    pub ready: bool,
    pub restarts: u32,
    pub captured: bool,
    pub enrolment: String,
    pub identity: Option<String>,
    pub origin: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Service {
    pub namespace: String,
    pub name: String,
    pub addresses: Vec<String>,
    pub ports: Vec<String>,
    pub endpoints: Vec<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Process {
    pub name: String,
    pub node: Option<String>,
    pub state: String,
    /// In the lab's process namespace.
    pub pid: Option<i32>,
    pub restarts: u32,
    pub log: String,
}

impl Status {
    /// `NAMESPACE/NAME`.
    pub fn pod(&self, name: &str) -> Option<&Pod> {
        self.pods.iter().find(|p| format!("{}/{}", p.namespace, p.name) == name)
    }

    pub fn service(&self, name: &str) -> Option<&Service> {
        self.services.iter().find(|s| format!("{}/{}", s.namespace, s.name) == name)
    }

    /// `ztunnel` of a node, or `istiod-lite` with none.
    pub fn process(&self, name: &str, node: Option<&str>) -> Option<&Process> {
        self.processes.iter().find(|p| p.name == name && p.node.as_deref() == node)
    }

    /// Pods that are not ready or not where they belong, one line each.
    pub fn unready(&self) -> Vec<String> {
        let line = |p: &Pod| format!("{}/{}: {} {}", p.namespace, p.name, p.state, p.message);
        self.pods.iter().filter(|p| !p.ready).map(line).collect()
    }
}

impl Pod {
    /// The first address of a family.
    pub fn ip(&self, ipv6: bool) -> Option<&str> {
        self.ips.iter().map(String::as_str).find(|ip| ip.contains(':') == ipv6)
    }
}

impl Service {
    pub fn address(&self, ipv6: bool) -> Option<&str> {
        self.addresses.iter().map(String::as_str).find(|ip| ip.contains(':') == ipv6)
    }
}
