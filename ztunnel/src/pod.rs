//! A pod this proxy serves: who it is, its network namespace, and whether it is still ours.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, OnceLock};

use model::{Identity, Snapshot, Str, Workload};
use net::NetNs;
use net::netlink::addr;
use tokio::sync::watch;

use crate::config::Config;

/// Shared by all workers; lives until the last connection of the pod ends.
#[derive(Debug)]
pub struct Pod {
    /// The node agent's name for it (the Kubernetes uid of the pod).
    pub uid: Str,
    pub name: Str,
    pub namespace: Str,
    pub identity: Identity,
    pub netns: NetNs,
    /// True once the agent took the pod away, or this process goes: no new connections, tunnels are drained.
    pub leaving: watch::Sender<bool>,
    /// See [`Pod::as_told`].
    pub told: OnceLock<Arc<Workload>>,
}

impl Pod {
    /// The control plane's view of this pod.
    pub fn workload<'s>(&self, snapshot: &'s Snapshot) -> Option<&'s Arc<Workload>> {
        snapshot.workload_named(&self.namespace, &self.name)
    }

    /// The pod as the node agent and its namespace describe it, for a control plane that is away. Enough to call out: what
    /// the pod may do is decided where the connection arrives, from the identity in its certificate. Not enough to be
    /// called: which policies select the pod is nothing that the agent knows.
    pub fn as_told(&self, config: &Config) -> Arc<Workload> {
        let describe = || {
            // The control plane's own way to name it: what is pooled now is used on when it is back.
            let uid = format!("{}//Pod/{}/{}", config.cluster, self.namespace, self.name);
            Arc::new(Workload {
                cluster: config.cluster.as_str().into(),
                network: config.network.as_str().into(),
                trust_domain: self.identity.trust_domain.clone(),
                service_account: self.identity.service_account.clone(),
                node: config.node.as_str().into(),
                addresses: self.addresses().into(),
                ..Workload::named(uid, self.namespace.clone(), self.name.clone())
            })
        };
        self.told.get_or_init(describe).clone()
    }

    fn addresses(&self) -> Vec<IpAddr> {
        let listed = self.netns.run(addr::list).map_err(|e| e.to_string());
        match listed.and_then(|listed| listed.map_err(|e| e.to_string())) {
            Ok(all) => all.into_iter().map(|a| a.ip).filter(|ip| !ip.is_loopback()).collect(),
            Err(error) => {
                tracing::warn!(pod = %self.name, error, "cannot list the pod's addresses");
                Vec::new()
            }
        }
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
