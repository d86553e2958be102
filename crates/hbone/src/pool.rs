//! Which tunnel a new stream takes.
//!
//! A pool belongs to one thread. Its key names the source pod and the destination *workload*, so that an
//! address that a new pod has taken over never meets the connection of the old one. Per key there is one
//! dial at a time; those who wait for it share its result. Streams go to the tunnel with the fewest.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use model::{Identity, WorkloadUid};
use tokio::net::TcpStream;

use crate::client::{Tunnel, TunnelStream};
use crate::error::TunnelError;
use crate::headers::ConnectHeaders;
use crate::{Credentials, MAX_STREAMS};

/// Everything that two streams must share to share a tunnel.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PoolKey {
    /// The pod whose address the tunnel comes from.
    pub source: WorkloadUid,
    pub source_identity: Identity,
    pub destination: WorkloadUid,
    /// Where the tunnel goes: the workload's address, port 15008.
    pub gateway: SocketAddr,
    /// Who must answer there.
    pub expected: Vec<Identity>,
}

#[derive(Clone, Copy, Debug)]
pub struct PoolLimits {
    /// Streams on one tunnel before another is opened.
    pub streams: usize,
    /// Tunnels of one pool. Each costs a socket and up to a few hundred KiB while busy.
    pub tunnels: usize,
    /// A tunnel without streams is closed after this long (Istio: 5 min).
    pub idle: Duration,
    /// The same for a tunnel beside which its key has another: what a burst needed is given back soon.
    pub spare: Duration,
    /// Longest TCP connect plus handshake.
    pub dial: Duration,
}

impl Default for PoolLimits {
    fn default() -> Self {
        Self {
            streams: MAX_STREAMS,
            tunnels: 8192,
            idle: Duration::from_secs(300),
            spare: Duration::from_secs(10),
            dial: Duration::from_secs(10),
        }
    }
}

/// For metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    pub tunnels: usize,
    pub streams: usize,
}

/// See the module.
#[derive(Debug)]
pub struct Pool {
    limits: PoolLimits,
    /// Locked only between awaits; one thread, so never contended.
    entries: Mutex<HashMap<PoolKey, Entry>>,
}

#[derive(Debug, Default)]
struct Entry {
    tunnels: Vec<Pooled>,
    gate: Arc<tokio::sync::Mutex<()>>,
    /// Counts dials that failed, so that those who waited for one learn of it and do not dial again.
    failures: u64,
    last_failure: Option<(String, model::Reason)>,
}

#[derive(Debug)]
struct Pooled {
    tunnel: Tunnel,
    last_used: Instant,
}

/// Attempts for one stream: a tunnel may be on its way out (GOAWAY in flight), and rarely the next one, too.
const ATTEMPTS: usize = 3;
/// A CONNECT on a pooled tunnel that is not answered this long puts the tunnel in doubt: the peer's machine may be gone
/// without a word. The peer's application may be slow as well, so that the tunnel is asked (a ping) before it is given up.
const DOUBT: Duration = Duration::from_secs(1);

impl Pool {
    pub fn new(limits: PoolLimits) -> Self {
        Self { limits, entries: Mutex::default() }
    }

    /// Opens a stream to `target`. `connect` makes the TCP connection when a new tunnel is needed;
    /// `headers` describe the source.
    pub async fn open<C>(
        &self,
        key: &PoolKey,
        credentials: &Credentials,
        target: SocketAddr,
        headers: &ConnectHeaders,
        connect: impl Fn() -> C,
    ) -> Result<TunnelStream, TunnelError>
    where
        C: Future<Output = std::io::Result<TcpStream>>,
    {
        let mut last = TunnelError::Closed;
        for _ in 0..ATTEMPTS {
            let (tunnel, fresh) = match self.pick(key) {
                Some(tunnel) => (tunnel, false),
                // Boxed: few streams dial, and the others should not carry a handshake's size.
                None => (Box::pin(self.dial(key, credentials, &connect)).await?, true),
            };
            let opened = if fresh {
                tunnel.open(target, headers).await
            } else {
                open_or_doubt(&tunnel, target, headers, key.gateway).await
            };
            match opened {
                // The tunnel was closing: the request was not processed, another tunnel may take it. A fresh one can only be
                // told to go away: it met a proxy that is just being replaced.
                Err(
                    e @ (TunnelError::Http2(_) | TunnelError::Closed | TunnelError::Timeout { .. }),
                ) if !fresh || e.is_go_away() => {
                    tracing::debug!(error = %e, gateway = %key.gateway, "pooled tunnel is gone, dialling anew");
                    tunnel.retire();
                    last = e;
                }
                result => return result,
            }
        }
        Err(last)
    }

    pub fn stats(&self) -> PoolStats {
        let entries = self.lock();
        let tunnels = || entries.values().flat_map(|e| &e.tunnels);
        PoolStats {
            tunnels: tunnels().count(),
            streams: tunnels().map(|p| p.tunnel.streams()).sum(),
        }
    }

    /// Drops closed tunnels and those idle for too long. Call it now and then.
    pub fn sweep(&self, now: Instant) {
        self.lock().retain(|_, entry| {
            for pooled in &mut entry.tunnels {
                if pooled.tunnel.streams() > 0 {
                    pooled.last_used = now;
                }
            }
            entry.tunnels.retain(|p| !p.tunnel.is_closed());
            // One stays for the long time, whoever was used last; the others are spare.
            let keep = entry.tunnels.iter().map(|p| p.last_used).max();
            let mut kept = false;
            entry.tunnels.retain(|p| {
                let main = !kept && Some(p.last_used) == keep;
                kept |= main;
                let limit = if main { self.limits.idle } else { self.limits.spare };
                now.saturating_duration_since(p.last_used) < limit
            });
            // Somebody dials while others hold the gate.
            !entry.tunnels.is_empty() || Arc::strong_count(&entry.gate) > 1
        });
    }

    /// Forgets every tunnel of a pod that leaves. Streams that live go on.
    pub fn forget_source(&self, source: &WorkloadUid) {
        self.lock().retain(|key, _| key.source != *source);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<PoolKey, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The open tunnel with the fewest streams, if it has room.
    fn pick(&self, key: &PoolKey) -> Option<Tunnel> {
        let mut entries = self.lock();
        let entry = entries.get_mut(key)?;
        entry.tunnels.retain(|p| !p.tunnel.is_closed());
        let pooled = entry.tunnels.iter_mut().min_by_key(|p| p.tunnel.streams())?;
        if pooled.tunnel.streams() >= pooled.tunnel.capacity(self.limits.streams) {
            return None;
        }
        pooled.last_used = Instant::now();
        Some(pooled.tunnel.clone())
    }

    async fn dial<C>(
        &self,
        key: &PoolKey,
        credentials: &Credentials,
        connect: &impl Fn() -> C,
    ) -> Result<Tunnel, TunnelError>
    where
        C: Future<Output = std::io::Result<TcpStream>>,
    {
        let (gate, failures) = {
            let mut entries = self.lock();
            let entry = entries.entry(key.clone()).or_default();
            (entry.gate.clone(), entry.failures)
        };
        let _one_at_a_time = gate.lock().await;
        // While we waited somebody may have made a tunnel, or failed to.
        if let Some(tunnel) = self.pick(key) {
            return Ok(tunnel);
        }
        {
            let entries = self.lock();
            let total: usize = entries.values().map(|e| e.tunnels.len()).sum();
            if total >= self.limits.tunnels {
                return Err(TunnelError::PoolFull(self.limits.tunnels));
            }
            if let Some(entry) = entries.get(key)
                && entry.failures != failures
                && let Some((message, reason)) = &entry.last_failure
            {
                return Err(TunnelError::Shared { message: message.clone(), reason: *reason });
            }
        }
        let dialled = tokio::time::timeout(self.limits.dial, handshake(key, credentials, connect));
        let result = dialled.await.unwrap_or_else(|_| {
            Err(TunnelError::Timeout {
                to: key.gateway,
                what: "making a tunnel",
                seconds: self.limits.dial.as_secs(),
            })
        });
        let mut entries = self.lock();
        let entry = entries.entry(key.clone()).or_default();
        match result {
            Ok(tunnel) => {
                entry.tunnels.push(Pooled { tunnel: tunnel.clone(), last_used: Instant::now() });
                Ok(tunnel)
            }
            Err(e) => {
                entry.failures += 1;
                entry.last_failure = Some((e.to_string(), e.reason()));
                Err(e)
            }
        }
    }
}

/// Opens a stream on a tunnel that was in use before, unless the tunnel turns out to be dead.
async fn open_or_doubt(
    tunnel: &Tunnel,
    target: SocketAddr,
    headers: &ConnectHeaders,
    gateway: SocketAddr,
) -> Result<TunnelStream, TunnelError> {
    let mut open = std::pin::pin!(tunnel.open(target, headers));
    if let Ok(opened) = tokio::time::timeout(DOUBT, &mut open).await {
        return opened;
    }
    tokio::select! {
        biased;
        opened = &mut open => opened,
        alive = tunnel.answers(DOUBT) => {
            if alive {
                return open.await;
            }
            let seconds = 2 * DOUBT.as_secs();
            Err(TunnelError::Timeout { to: gateway, what: "using a tunnel that was open", seconds })
        }
    }
}

async fn handshake<C>(
    key: &PoolKey,
    credentials: &Credentials,
    connect: &impl Fn() -> C,
) -> Result<Tunnel, TunnelError>
where
    C: Future<Output = std::io::Result<TcpStream>>,
{
    let tcp = connect().await.map_err(|source| TunnelError::Connect { to: key.gateway, source })?;
    let dialed = Tunnel::handshake(tcp, credentials, &key.expected).await?;
    let gateway = key.gateway;
    tokio::spawn(async move {
        if let Err(e) = dialed.driver.await {
            tracing::debug!(error = %e, %gateway, "tunnel ended");
        }
    });
    Ok(dialed.tunnel)
}
