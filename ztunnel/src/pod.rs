//! A pod this proxy serves: who it is, its network namespace, and whether it is still ours.

use std::net::SocketAddr;
use std::sync::Arc;

use model::{Identity, Snapshot, Str, Workload};
use net::NetNs;
use tokio::sync::watch;

/// Shared by all workers; lives until the last connection of the pod ends.
#[derive(Debug)]
pub struct Pod {
    /// The node agent's name for it (the Kubernetes uid of the pod).
    pub uid: Str,
    pub name: Str,
    pub namespace: Str,
    pub identity: Identity,
    pub netns: NetNs,
    /// True once the agent took the pod away: no new connections, tunnels are drained.
    pub leaving: watch::Sender<bool>,
}

impl Pod {
    /// The control plane's view of this pod.
    pub fn workload<'s>(&self, snapshot: &'s Snapshot) -> Option<&'s Arc<Workload>> {
        snapshot.workload_named(&self.namespace, &self.name)
    }

    /// Resolves when the pod leaves.
    pub async fn left(&self) {
        let mut leaving = self.leaving.subscribe();
        // The sender lives in `self`: it cannot be gone.
        let _ = leaving.wait_for(|left| *left).await;
    }
}

/// IPv4 in IPv6 clothes, as dual-stack listeners report it, becomes IPv4.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
