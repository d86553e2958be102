//! Data threads. Each has a listener of its own, its own tunnels and its own connections to endpoints.
//!
//! The kernel spreads new tunnels over the listeners (SO_REUSEPORT), but by chance, and a waypoint has few of them, which
//! live long: whoever accepts one hands it to the thread that has the fewest. What a tunnel carries is served by its own thread,
//! without a wake-up between threads, until that thread has many more streams than another: then new ones go there, so
//! that one busy tunnel does not leave the other cores idle.
//!
//! Invariant: a stream is served by one thread from its admission to its end.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use agent::certs::CertStore;
use agent::metrics::Flushed;
use agent::store::ConfigStore;
use hbone::{Credentials, Pool, PoolLimits};
use model::{Identity, Reason, Refusal, Str, Workload};
use net::NetNs;
use net::socket::{ListenOpts, listen};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, watch};

use crate::config::{Config, Waits};
use crate::listener::{self, ClientStream};
use crate::record::Recorder;
use crate::tcp::Connections;
use crate::upstream::Upstreams;

/// How often closed and idle connections to endpoints are looked for.
const SWEEP: Duration = Duration::from_secs(15);
/// Pause after `accept` failed for want of descriptors or memory: trying at once would burn the core.
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);
/// Handshakes that one worker runs at once. Each may hold a millisecond of CPU and some 50 KiB; whoever comes on top is
/// refused, which a client notices at once, while a queue would only fill.
const MAX_HANDSHAKES: usize = 1024;
/// Mirrored requests that one worker carries at once. They are copies: what is above is left out, and counted.
const MAX_MIRRORS: usize = 1024;
/// Tunnels and streams that wait to be taken by another thread; it takes them in its next turn.
const HANDED: usize = 256;
/// How many more streams than the thread with the fewest one has before it hands new ones over. Each turn of a stream that is served
/// away from its tunnel costs a wake-up each way (some 10 µs of CPU for a small request): worth it only for a load.
const AHEAD: usize = 16;

/// Where a waypoint stands between its start and its end. Each stage includes the ones before.
#[derive(Clone, Debug, Default)]
pub enum Stage {
    #[default]
    Serving,
    /// Answers say `connection: close`, tunnels get a GOAWAY after their request; the listener stays.
    Leaving,
    /// No listener; connections without a request are closed.
    Closing,
    /// What is left ends now, with this word.
    Ended(Refusal),
}

/// What all workers share.
#[derive(Debug)]
pub struct Shared {
    pub config: Config,
    pub store: Arc<ConfigStore>,
    pub certs: Arc<CertStore>,
    pub identity: Identity,
    /// Namespace and name of this waypoint's pod.
    pub own_name: (Str, Str),
    /// Clients' connections of all workers, against `Config::max_connections`.
    pub open: AtomicUsize,
    /// Everything that is served: listeners, tunnels, connections. The drain waits for it.
    pub busy: AtomicUsize,
    stage: watch::Sender<Stage>,
    /// The same as one bit, for every request.
    leaving: AtomicBool,
    places: Vec<Place>,
}

/// One worker as the others see it.
#[derive(Debug)]
struct Place {
    tunnels: AtomicUsize,
    /// Streams of clients that it serves, whoever has their tunnels.
    streams: AtomicUsize,
    hand: mpsc::Sender<Handed>,
}

/// What one thread gives to another.
#[derive(Debug)]
pub enum Handed {
    /// A tunnel that is counted and not yet shaken hands with.
    Tunnel(std::net::TcpStream),
    /// One stream of a tunnel, counted too; the tunnel stays where it is.
    Stream(Box<ClientStream>),
}

impl Shared {
    pub fn new(
        config: Config,
        store: Arc<ConfigStore>,
        certs: Arc<CertStore>,
    ) -> (Arc<Self>, Vec<mpsc::Receiver<Handed>>) {
        let (mut places, mut handed) = (Vec::new(), Vec::new());
        for _ in 0..config.worker_threads() {
            let (hand, receive) = mpsc::channel(HANDED);
            let (tunnels, streams) = (AtomicUsize::new(0), AtomicUsize::new(0));
            places.push(Place { tunnels, streams, hand });
            handed.push(receive);
        }
        let shared = Self {
            identity: config.identity(),
            own_name: config.own_name(),
            config,
            store,
            certs,
            open: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
            stage: watch::Sender::default(),
            leaving: AtomicBool::new(false),
            places,
        };
        (Arc::new(shared), handed)
    }

    /// Goes on to another stage; there is no way back.
    pub fn enter(&self, stage: Stage) {
        self.leaving.store(true, Ordering::Relaxed);
        self.stage.send_replace(stage);
    }

    /// Wakes when the stage changes.
    pub fn stage(&self) -> watch::Receiver<Stage> {
        self.stage.subscribe()
    }

    /// With which word everything that is left ends.
    pub fn last_word(&self) -> Option<Refusal> {
        match &*self.stage.borrow() {
            Stage::Ended(refusal) => Some(refusal.clone()),
            _ => None,
        }
    }

    /// Whether the waypoint is about to go.
    pub fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Relaxed)
    }
}

/// Resolves once the waypoint is at this stage or a later one.
pub async fn reached(stage: &mut watch::Receiver<Stage>, wanted: fn(&Stage) -> bool) -> Stage {
    let found = stage.wait_for(wanted).await.ok().map(|stage| stage.clone());
    match found {
        Some(stage) => stage,
        // The sender lives as long as the workers do.
        None => std::future::pending().await,
    }
}

impl Stage {
    pub fn is_leaving(&self) -> bool {
        !matches!(self, Self::Serving)
    }

    pub fn is_closing(&self) -> bool {
        matches!(self, Self::Closing | Self::Ended(_))
    }

    pub fn is_ended(&self) -> bool {
        matches!(self, Self::Ended(_))
    }
}

/// Counts something that is served, until dropped.
#[derive(Debug)]
pub struct Busy(Arc<Shared>);

impl Busy {
    pub fn new(shared: &Arc<Shared>) -> Self {
        shared.busy.fetch_add(1, Ordering::Relaxed);
        Self(shared.clone())
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.busy.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Counts a stream that a worker serves, until dropped.
struct Served(Arc<Worker>);

impl Drop for Served {
    fn drop(&mut self) {
        self.0.place().streams.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Counts a tunnel of a worker, until dropped.
struct Counted(Arc<Worker>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.place().tunnels.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What one thread owns. Shared with its own tasks, and read by the admin page.
#[derive(Debug)]
pub struct Worker {
    pub shared: Arc<Shared>,
    /// Tunnels to endpoints.
    pub tunnels: Pool,
    /// HTTP connections inside them.
    pub upstreams: Upstreams,
    pub recorder: Recorder,
    pub connections: Connections,
    /// Places for TLS handshakes of peers that dial us.
    pub handshakes: Semaphore,
    /// Places for mirrored requests.
    pub mirrors: Arc<Semaphore>,
    index: usize,
    random: Mutex<fastrand::Rng>,
}

impl Worker {
    /// The worker of this number, which is below [`Config::worker_threads`].
    pub fn new(shared: Arc<Shared>, recorder: Recorder, index: usize) -> Self {
        Self {
            shared,
            tunnels: Pool::new(PoolLimits::default()),
            upstreams: Upstreams::default(),
            recorder,
            connections: Connections::default(),
            handshakes: Semaphore::new(MAX_HANDSHAKES),
            mirrors: Arc::new(Semaphore::new(MAX_MIRRORS)),
            index,
            random: Mutex::new(fastrand::Rng::new()),
        }
    }

    /// A number for load balancing, shares and request ids; not for secrets.
    pub fn random(&self) -> u64 {
        self.random.lock().unwrap_or_else(PoisonError::into_inner).u64(..)
    }

    /// Our certificate, waiting a moment for the first one.
    pub async fn credentials(&self) -> Result<Arc<Credentials>, Refusal> {
        let Shared { certs, identity, .. } = &*self.shared;
        match certs.get(identity) {
            Some(credentials) => Ok(credentials),
            None => certs.wait(identity, Waits::OWN).await,
        }
    }

    /// Our own workload, waiting a moment for its address to arrive.
    pub async fn own(&self) -> Result<Arc<Workload>, Refusal> {
        let (namespace, name) = &self.shared.own_name;
        let find = |snapshot: &model::Snapshot| snapshot.workload_named(namespace, name).cloned();
        if let Some(own) = find(&self.shared.store.load()) {
            return Ok(own);
        }
        let found = self.shared.store.wait_for(find, Waits::OWN).await;
        found.ok_or_else(|| {
            let words = format!(
                "the control plane has not sent this waypoint's own pod {namespace}/{name}"
            );
            Refusal::new(Reason::UnknownWorkload, words)
        })
    }

    /// The thread's main loop: takes tunnels, sweeps, until the waypoint ends.
    pub async fn run(
        self: Arc<Self>,
        listener: std::net::TcpListener,
        mut handed: mpsc::Receiver<Handed>,
    ) {
        let listener = match TcpListener::from_std(listener) {
            Ok(listener) => listener,
            Err(e) => {
                return tracing::error!("a worker cannot use its listener and serves nobody: {e}");
            }
        };
        let accepting = tokio::spawn(self.clone().accept(listener));
        let mut sweep = tokio::time::interval(SWEEP);
        let mut count = tokio::time::interval(Flushed::EVERY);
        loop {
            tokio::select! {
                what = handed.recv() => match what {
                    Some(Handed::Tunnel(tcp)) => self.take_handed(tcp),
                    Some(Handed::Stream(stream)) => self.serve_stream(*stream),
                    None => return accepting.abort(),
                },
                _ = count.tick() => self.connections.flush_metrics(),
                _ = sweep.tick() => {
                    self.tunnels.sweep(Instant::now());
                    self.upstreams.sweep(Instant::now());
                }
            }
        }
    }

    async fn accept(self: Arc<Self>, listener: TcpListener) {
        // Until the last connection has been taken there may be one more to wait for.
        let _accepting = Busy::new(&self.shared);
        let mut stage = self.shared.stage();
        let mut closing = std::pin::pin!(reached(&mut stage, Stage::is_closing));
        loop {
            let accepted = tokio::select! {
                // What waits in the listener is served before it is closed.
                biased;
                accepted = listener.accept() => accepted,
                _ = &mut closing => return,
            };
            match accepted {
                Ok((tcp, peer)) => self.place_tunnel(tcp, canonical(peer)),
                Err(e) if is_of_peer(&e) => {}
                Err(e) => {
                    tracing::warn!(error = %e, "accept failed; raise the open files limit?");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// Gives a tunnel to the thread that has the fewest: this one, or another.
    fn place_tunnel(self: &Arc<Self>, tcp: TcpStream, peer: SocketAddr) {
        let tunnels = |place: &Place| place.tunnels.load(Ordering::Relaxed);
        let places = &self.shared.places;
        let fewest = places.iter().min_by_key(|place| tunnels(place));
        let other = fewest.filter(|place| tunnels(place) < tunnels(self.place()));
        let Some(other) = other else { return self.take(tcp, peer) };
        other.tunnels.fetch_add(1, Ordering::Relaxed);
        let refused = match tcp.into_std() {
            Ok(tcp) => other.hand.try_send(Handed::Tunnel(tcp)).is_err(),
            Err(_) => true,
        };
        if refused {
            // Its queue is full, or the thread ended: the peer sees a closed connection and dials again.
            other.tunnels.fetch_sub(1, Ordering::Relaxed);
            tracing::warn!(%peer, "a tunnel could not be handed to another thread");
        }
    }

    fn take_handed(self: &Arc<Self>, tcp: std::net::TcpStream) {
        let tunnel = TcpStream::from_std(tcp).and_then(|tcp| Ok((tcp.peer_addr()?, tcp)));
        match tunnel {
            Ok((peer, tcp)) => self.serve(tcp, canonical(peer)),
            // It was closed meanwhile.
            Err(e) => {
                self.place().tunnels.fetch_sub(1, Ordering::Relaxed);
                tracing::debug!(error = %e, "a tunnel was gone before it was taken");
            }
        }
    }

    fn take(self: &Arc<Self>, tcp: TcpStream, peer: SocketAddr) {
        self.place().tunnels.fetch_add(1, Ordering::Relaxed);
        self.serve(tcp, peer);
    }

    /// Serves a tunnel that is counted.
    fn serve(self: &Arc<Self>, tcp: TcpStream, peer: SocketAddr) {
        // Small writes are whole messages already.
        let _ = tcp.set_nodelay(true);
        let (busy, counted) = (Busy::new(&self.shared), Counted(self.clone()));
        let served = listener::serve_tunnel(self.clone(), tcp, peer);
        tokio::spawn(async move {
            served.await;
            drop((busy, counted));
        });
    }

    /// Serves a stream of a tunnel on this thread, or on another that has many fewer.
    pub(crate) fn place_stream(self: &Arc<Self>, stream: ClientStream) {
        let streams = |place: &Place| place.streams.load(Ordering::Relaxed);
        let fewest = self.shared.places.iter().min_by_key(|place| streams(place));
        let other = fewest.filter(|place| streams(place) + AHEAD <= streams(self.place()));
        let Some(other) = other else {
            self.place().streams.fetch_add(1, Ordering::Relaxed);
            return self.serve_stream(stream);
        };
        other.streams.fetch_add(1, Ordering::Relaxed);
        if let Err(back) = other.hand.try_send(Handed::Stream(Box::new(stream))) {
            other.streams.fetch_sub(1, Ordering::Relaxed);
            // Its queue is full: it has enough to do, too.
            if let Handed::Stream(stream) = back.into_inner() {
                self.place().streams.fetch_add(1, Ordering::Relaxed);
                self.serve_stream(*stream);
            }
        }
    }

    /// Serves a stream that is counted.
    fn serve_stream(self: &Arc<Self>, stream: ClientStream) {
        let (busy, counted) = (Busy::new(&self.shared), Served(self.clone()));
        let served = listener::serve_stream(self.clone(), stream);
        tokio::spawn(async move {
            served.await;
            drop((busy, counted));
        });
    }

    /// Connections of clients that this thread serves.
    pub fn streams(&self) -> usize {
        self.place().streams.load(Ordering::Relaxed)
    }

    fn place(&self) -> &Place {
        &self.shared.places[self.index]
    }
}

/// One dual-stack listener of those that share the port; IPv4 alone where there is no IPv6.
///
/// # Errors
/// When the address is taken or not ours.
pub fn listen_at(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let opts = ListenOpts { reuse_port: true, v6only: false, ..ListenOpts::default() };
    let here = NetNs::current()?;
    match listen(&here, address, opts) {
        Err(e)
            if e.raw_os_error() == Some(libc::EAFNOSUPPORT)
                && address.ip() == Ipv6Addr::UNSPECIFIED =>
        {
            listen(&here, SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port())), opts)
        }
        result => result,
    }
}

/// IPv4 written as IPv6 is IPv4.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// The connection was gone before we took it.
fn is_of_peer(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset)
}
