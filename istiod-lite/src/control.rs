//! What the calls of the control plane share.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use compile::MeshConfig;
use model::{ConfigVersion, Str};
use serde::Serialize;
use tokio::sync::watch;

use crate::authorize::{Caller, Refused};
use crate::metrics::Metrics;
use crate::signer::Signer;
use crate::tls::PeerCertificate;
use crate::tokens::Tokens;
use crate::world::Latest;

/// See the module.
pub(crate) struct Control {
    pub mesh: MeshConfig,
    pub leaf_ttl: Duration,
    pub signer: Arc<dyn Signer>,
    pub metrics: Metrics,
    /// The newest state of the mesh.
    pub latest: watch::Receiver<Latest>,
    /// Turns true when the process is about to end.
    pub stopping: watch::Receiver<bool>,
    tokens: Mutex<Tokens>,
    proxies: Mutex<BTreeMap<u64, Proxy>>,
    next_stream: AtomicU64,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").field("mesh", &self.mesh).finish_non_exhaustive()
    }
}

/// The other end of a connection.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    pub address: SocketAddr,
    /// What its verified certificate says, or why that cannot be used. `None`: it has none.
    pub certificate: Option<Result<PeerCertificate, Refused>>,
}

impl Peer {
    /// The node proxy that this peer has proved to be by its certificate.
    pub(crate) fn caller(&self, trust_domain: &Str, now: SystemTime) -> Result<Caller, Refused> {
        match &self.certificate {
            Some(Ok(certificate)) => certificate.caller(trust_domain, now),
            Some(Err(refused)) => Err(refused.clone()),
            None => Err(Refused::NoCredentials),
        }
    }
}

/// An open xDS stream, for the debug page.
#[derive(Clone, Debug, Serialize)]
pub struct Proxy {
    pub node: Str,
    pub address: SocketAddr,
    /// Seconds since the epoch.
    pub connected_at: u64,
    /// The last push that it enforces. Absent: none yet, or it does not report.
    pub acked: Option<String>,
    /// The last push that it has been sent.
    pub sent: Option<String>,
    pub nacks: u64,
    pub last_nack: Option<String>,
}

impl Control {
    pub(crate) fn new(
        mesh: MeshConfig,
        leaf_ttl: Duration,
        signer: Arc<dyn Signer>,
        latest: watch::Receiver<Latest>,
        stopping: watch::Receiver<bool>,
    ) -> Self {
        Self {
            mesh,
            leaf_ttl,
            signer,
            metrics: Metrics::default(),
            latest,
            stopping,
            tokens: Mutex::default(),
            proxies: Mutex::default(),
            next_stream: AtomicU64::new(0),
        }
    }

    pub(crate) fn tokens(&self) -> MutexGuard<'_, Tokens> {
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn proxies(&self) -> MutexGuard<'_, BTreeMap<u64, Proxy>> {
        self.proxies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a stream in, unless the node has `limit` already.
    pub(crate) fn open_stream(
        self: &Arc<Self>,
        node: &Str,
        address: SocketAddr,
        now: SystemTime,
        limit: usize,
    ) -> Option<Stream> {
        let mut proxies = self.proxies();
        if proxies.values().filter(|p| p.node == *node).count() >= limit {
            return None;
        }
        let id = self.next_stream.fetch_add(1, Ordering::Relaxed);
        let connected_at = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let proxy = Proxy {
            node: node.clone(),
            address,
            connected_at,
            acked: None,
            sent: None,
            nacks: 0,
            last_nack: None,
        };
        proxies.insert(id, proxy);
        self.metrics.stream_opened();
        Some(Stream { control: self.clone(), id, ended: "closed_by_proxy" })
    }

    /// The open streams.
    pub(crate) fn list_proxies(&self) -> Vec<Proxy> {
        self.proxies().values().cloned().collect()
    }
}

/// An open stream; counted out when dropped.
#[derive(Debug)]
pub(crate) struct Stream {
    control: Arc<Control>,
    id: u64,
    ended: &'static str,
}

impl Stream {
    pub(crate) fn sent(&self, push: String) {
        self.with(|p| p.sent = Some(push));
    }

    pub(crate) fn acked(&self, push: ConfigVersion) {
        self.with(|p| p.acked = Some(push.to_string()));
    }

    pub(crate) fn nacked(&self, message: &str) {
        self.with(|p| {
            p.nacks += 1;
            p.last_nack = Some(message.to_owned());
        });
    }

    /// Why the stream ends, for the metric.
    pub(crate) fn ends(&mut self, reason: &'static str) {
        self.ended = reason;
    }

    fn with(&self, change: impl FnOnce(&mut Proxy)) {
        if let Some(proxy) = self.control.proxies().get_mut(&self.id) {
            change(proxy);
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.control.proxies().remove(&self.id);
        self.control.metrics.stream_ended(self.ended);
    }
}
