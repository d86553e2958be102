//! Which tunnel a new stream takes.
//!
//! A pool belongs to one thread. Its key names the source *pod* and the destination *workload*, so that an
//! address that a new pod has taken over never meets the connection of the old one. Per key there is one
//! dial at a time; those who wait for it share its result. Streams go to the tunnel with the fewest.
//! Which tunnel that is, who dials and what is given back is decided by [`engine::PoolBook`].

use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use engine::{BookLimits, Carrier, Next, PoolBook};
use model::{Identity, Str, WorkloadUid};
use tokio::net::TcpStream;

use crate::client::{Tunnel, TunnelStream};
use crate::error::TunnelError;
use crate::headers::ConnectHeaders;
use crate::{Credentials, MAX_STREAMS};

/// Everything that two streams must share to share a tunnel.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PoolKey {
    /// The pod whose address the tunnel comes from. Its own id, which no other pod ever has: a pod that is made anew
    /// under the name of an old one is the same workload.
    pub source: Str,
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
    /// From where the book counts time.
    begun: Instant,
    /// Locked only between awaits; one thread, so never contended.
    book: Mutex<Book>,
}

type Book = PoolBook<PoolKey, Tunnel, tokio::sync::Mutex<()>>;

impl Carrier for Tunnel {
    fn streams(&self) -> usize {
        Self::streams(self)
    }

    fn capacity(&self, ours: usize) -> usize {
        Self::capacity(self, ours)
    }

    fn is_closed(&self) -> bool {
        Self::is_closed(self)
    }
}

/// Attempts for one stream: a tunnel may be on its way out (GOAWAY in flight), and rarely the next one, too.
const ATTEMPTS: usize = 3;
/// A CONNECT on a pooled tunnel that is not answered this long puts the tunnel in doubt: the peer's machine may be gone
/// without a word. The peer's application may be slow as well, so that the tunnel is asked (a ping) before it is given up.
const DOUBT: Duration = Duration::from_secs(1);

impl Pool {
    pub fn new(limits: PoolLimits) -> Self {
        let PoolLimits { streams, tunnels, idle, spare, .. } = limits;
        let book = PoolBook::new(BookLimits { streams, tunnels, idle, spare });
        Self { limits, begun: Instant::now(), book: Mutex::new(book) }
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
            let pooled = self.lock().pick(key, self.now());
            let (tunnel, fresh) = match pooled {
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
        let book = self.lock();
        let mut stats = PoolStats::default();
        for (_, tunnel) in book.tunnels() {
            stats.tunnels += 1;
            stats.streams += tunnel.streams();
        }
        stats
    }

    /// Drops closed tunnels and those idle for too long. Call it now and then.
    pub fn sweep(&self, now: Instant) {
        self.lock().sweep(now.saturating_duration_since(self.begun));
    }

    /// Forgets every tunnel of a pod that leaves. Streams that live go on.
    pub fn forget_source(&self, source: &Str) {
        self.lock().forget(|key| key.source == *source);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.begun.elapsed()
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
        let turn = self.lock().queue(key);
        let _one_at_a_time = turn.gate.lock().await;
        let next = self.lock().next(key, &turn, self.now());
        match next {
            Next::Take(tunnel) => return Ok(tunnel),
            Next::Full(limit) => return Err(TunnelError::PoolFull(limit)),
            Next::Failed { message, reason } => {
                return Err(TunnelError::Shared { message, reason });
            }
            Next::Dial => {}
        }
        let dialled = tokio::time::timeout(self.limits.dial, handshake(key, credentials, connect));
        let result = dialled.await.unwrap_or_else(|_| {
            Err(TunnelError::Timeout {
                to: key.gateway,
                what: "making a tunnel",
                seconds: self.limits.dial.as_secs(),
            })
        });
        let told = match &result {
            Ok(tunnel) => Ok(tunnel.clone()),
            Err(e) => Err((e.to_string(), e.reason())),
        };
        self.lock().dialled(key, told, self.now());
        result
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
