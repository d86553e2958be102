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

use crate::authorize::{Caller, Pod, Refused};
use crate::metrics::Metrics;
use crate::pod_tokens::{PodTokens, TokenId};
use crate::signer::Signer;
use crate::tls::PeerCertificate;
use crate::tokens::{TokenError, Tokens};
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
    pod_tokens: Mutex<PodTokens>,
    /// Changes when a pod's token has ended.
    token_ends: watch::Sender<()>,
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
    /// Turns true when a call of a peer without certificate was one that lasts: it is no stranger then.
    pub admitted: watch::Sender<bool>,
}

/// What a line of the token registry did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Registered {
    /// This node has a one-time token.
    Node(Str),
    /// This pod has a token.
    Pod(Pod),
    /// The token of this pod has ended. `None`: it was nobody's.
    Ended(Option<Pod>),
}

impl Peer {
    pub(crate) fn new(
        address: SocketAddr,
        certificate: Option<Result<PeerCertificate, Refused>>,
    ) -> Self {
        Self { address, certificate, admitted: watch::Sender::new(false) }
    }

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
    /// `namespace/name` of a waypoint's pod. Absent: it is the node's proxy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
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
            pod_tokens: Mutex::default(),
            token_ends: watch::Sender::new(()),
            proxies: Mutex::default(),
            next_stream: AtomicU64::new(0),
        }
    }

    pub(crate) fn tokens(&self) -> MutexGuard<'_, Tokens> {
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn pod_tokens(&self) -> MutexGuard<'_, PodTokens> {
        self.pod_tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a line of the token registry.
    pub(crate) fn register(&self, line: &str) -> Result<Registered, TokenError> {
        let about: serde_json::Value =
            serde_json::from_str(line).map_err(|e| TokenError::Malformed(e.to_string()))?;
        if about.get("pod").is_some() {
            let pod = self.pod_tokens().issue(line)?;
            // It may have had another one.
            self.token_ends.send_replace(());
            return Ok(Registered::Pod(pod));
        }
        if about.get("ended_token_sha256").is_some() {
            let pod = self.pod_tokens().end(line)?;
            self.token_ends.send_replace(());
            return Ok(Registered::Ended(pod));
        }
        self.tokens().register(line).map(Registered::Node)
    }

    /// Returns when a pod's token counts no longer. `None`: there is no token that could end.
    pub(crate) async fn token_ended(&self, token: Option<TokenId>) {
        let Some(token) = token else { return std::future::pending().await };
        let mut ends = self.token_ends.subscribe();
        while self.pod_tokens().pod_of(token).is_some() {
            if ends.changed().await.is_err() {
                return;
            }
        }
    }

    fn proxies(&self) -> MutexGuard<'_, BTreeMap<u64, Proxy>> {
        self.proxies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a stream in, unless the proxy has `limit` already.
    pub(crate) fn open_stream(
        self: &Arc<Self>,
        caller: &Caller,
        address: SocketAddr,
        now: SystemTime,
        limit: usize,
    ) -> Option<Stream> {
        let node = caller.node();
        let pod = caller.pod().map(|pod| format!("{}/{}", pod.namespace, pod.name));
        let mut proxies = self.proxies();
        if proxies.values().filter(|p| p.node == *node && p.pod == pod).count() >= limit {
            return None;
        }
        let id = self.next_stream.fetch_add(1, Ordering::Relaxed);
        let connected_at = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let proxy = Proxy {
            node: node.clone(),
            pod,
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
