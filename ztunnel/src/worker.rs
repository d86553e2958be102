//! Data threads. Each has its own listeners in every pod, its own pool and its own connections: a
//! tunnel and its streams never leave the thread that made them.
//!
//! The kernel spreads new connections over the threads (SO_REUSEPORT).

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use agent::certs::CertStore;
use agent::metrics::Flushed;
use agent::store::ConfigStore;
use agent::xds_client::XdsStatus;
use futures_util::FutureExt as _;
use hbone::{Pool, PoolLimits};
use model::{HBONE_PORT, INBOUND_PLAINTEXT_PORT, OUTBOUND_PORT, Refusal, Str};
use net::capture::MARK_PROXY;
use net::socket::{ListenOpts, listen};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::config::{Capture, Config};
use crate::connections::Connections;
use crate::listeners::{Listeners, Role, Share, take_or_open};
use crate::pod::{Pod, canonical};
use crate::record::Recorder;
use crate::same_node::SameNode;
use crate::{dns, inbound, outbound};

/// How often closed and idle tunnels are looked for.
const SWEEP: Duration = Duration::from_secs(15);
/// Pause after `accept` failed for want of descriptors or memory: trying at once would burn the core.
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);

/// Handshakes that one worker runs at once. Each may hold a second of CPU and some 50 KiB; whoever comes
/// on top is refused, which a client notices at once, while a queue would only fill.
const MAX_HANDSHAKES: usize = 1024;

/// What all workers share.
#[derive(Debug)]
pub struct Shared {
    pub config: Config,
    pub store: Arc<ConfigStore>,
    pub certs: Arc<CertStore>,
    /// How it stands with the control plane.
    pub status: Arc<XdsStatus>,
    /// Connections of all workers, against `Config::max_connections`.
    pub open: AtomicUsize,
    /// Everything that is served: listeners, connections from the moment they are accepted, tunnels, questions. The drain
    /// waits for it.
    pub busy: AtomicUsize,
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

/// What one thread owns. Shared with its own tasks, and read by the admin page.
#[derive(Debug)]
pub struct Worker {
    pub shared: Arc<Shared>,
    pub pool: Pool,
    pub connections: Connections,
    pub recorder: Recorder,
    pub same_node: SameNode,
    /// Places for TLS handshakes of peers that dial us.
    pub handshakes: Semaphore,
    /// Places for DNS questions that wait for a resolver.
    pub questions: Arc<Semaphore>,
    random: std::sync::Mutex<fastrand::Rng>,
}

/// What came of adding a pod: copies of its listeners, for the agent.
pub type Added = Result<Vec<OwnedFd>, String>;

/// An order to a worker.
#[derive(Debug)]
pub enum Command {
    /// Serve a pod, on these sockets if there are any. For a pod that is served already only the answer is new.
    Add(Arc<Pod>, Share, oneshot::Sender<Added>),
    Remove(Str),
    /// Stop taking connections: the process is going.
    Drain,
    /// End every connection that is left.
    End(Refusal),
}

/// A pod and the sockets on which this worker serves it.
struct Served {
    pod: Arc<Pod>,
    listeners: Listeners,
}

impl Worker {
    pub fn new(shared: Arc<Shared>, recorder: Recorder) -> Self {
        let same_node = SameNode::new(&shared.config.same_node_direct);
        Self {
            shared,
            same_node,
            pool: Pool::new(PoolLimits::default()),
            connections: Connections::default(),
            recorder,
            handshakes: Semaphore::new(MAX_HANDSHAKES),
            questions: Arc::new(Semaphore::new(dns::MAX_WAITING_OF_ALL)),
            random: std::sync::Mutex::new(fastrand::Rng::new()),
        }
    }

    /// A number for load balancing; not for secrets.
    pub fn random(&self) -> u64 {
        self.random.lock().map_or(0, |mut rng| rng.u64(..))
    }

    /// The thread's main loop: obeys commands, judges again when the configuration changes, sweeps.
    pub async fn run(self: Arc<Self>, mut commands: mpsc::Receiver<Command>) {
        let mut changed = self.shared.store.subscribe();
        let mut sweep = tokio::time::interval(SWEEP);
        let mut count = tokio::time::interval(Flushed::EVERY);
        let mut pods: HashMap<Str, Served> = HashMap::new();
        let mut going = false;
        loop {
            tokio::select! {
                command = commands.recv() => match command {
                    Some(Command::Add(pod, share, done)) => {
                        let added = if going {
                            Err("this proxy is going away".to_owned())
                        } else {
                            self.add(&mut pods, pod, share)
                        };
                        // Nobody waits any more: the agent went away.
                        let _ = done.send(added);
                    }
                    Some(Command::Remove(uid)) => {
                        if let Some(served) = pods.remove(&uid) {
                            self.same_node.remove(&served.pod);
                            served.pod.leaving.send_replace(true);
                            self.pool.forget_source(&served.pod.uid);
                        }
                    }
                    Some(Command::Drain) => {
                        going = true;
                        for (_, served) in pods.drain() {
                            self.same_node.remove(&served.pod);
                            served.pod.leaving.send_replace(true);
                        }
                    }
                    Some(Command::End(refusal)) => self.connections.end_all(&refusal),
                    None => return,
                },
                Ok(()) = changed.changed() => {
                    let ended = self.connections.judge_again(&self.shared.store.load());
                    if ended > 0 {
                        tracing::info!(ended, "policy change ended live connections");
                    }
                }
                _ = count.tick() => self.connections.flush_metrics(),
                _ = sweep.tick() => self.pool.sweep(Instant::now()),
            }
        }
    }

    /// Serves the pod, unless it is served already. Copies of its sockets.
    fn add(
        self: &Arc<Self>,
        pods: &mut HashMap<Str, Served>,
        pod: Arc<Pod>,
        share: Share,
    ) -> Added {
        let wrong = |e| format!("cannot listen in pod {}/{}: {e}", pod.namespace, pod.name);
        if !pods.contains_key(&pod.uid) {
            let listeners = self.serve(&pod, share).map_err(wrong)?;
            self.same_node.add(&pod);
            pods.insert(pod.uid.clone(), Served { pod: pod.clone(), listeners });
        }
        pods.get(&pod.uid).map_or_else(|| Ok(Vec::new()), |s| s.listeners.copies()).map_err(wrong)
    }

    /// Serves this worker's share of the pod's listeners, and opens what is missing.
    fn serve(self: &Arc<Self>, pod: &Arc<Pod>, mut share: Share) -> io::Result<Listeners> {
        let mut listeners = Listeners::default();
        for (role, port, transparent) in [
            (Role::Outbound, OUTBOUND_PORT, true),
            (Role::Plaintext, INBOUND_PLAINTEXT_PORT, true),
            (Role::Tunnels, HBONE_PORT, false),
        ] {
            for fd in take_or_open(&mut share, role, || listen_in(pod, port, transparent))? {
                let listener = Arc::new(TcpListener::from_std(fd.into())?);
                listeners.add(listener.clone());
                let (worker, pod) = (self.clone(), pod.clone());
                match role {
                    Role::Outbound => tokio::spawn(accept(worker, pod, listener, outbound::serve)),
                    Role::Tunnels => {
                        tokio::spawn(accept(worker, pod, listener, inbound::serve_tunnel))
                    }
                    _ => tokio::spawn(accept(worker, pod, listener, inbound::serve_plaintext)),
                };
            }
        }
        dns::serve(self, pod, &mut share, &mut listeners)?;
        Ok(listeners)
    }
}

/// One dual-stack listener; IPv4 alone where the pod has no IPv6.
fn listen_in(pod: &Pod, port: u16, transparent: bool) -> io::Result<std::net::TcpListener> {
    let opts = ListenOpts {
        transparent,
        // Accepted sockets inherit it, so that answers are not captured again.
        mark: Some(MARK_PROXY),
        reuse_port: true,
        v6only: false,
        ..ListenOpts::default()
    };
    let both = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    match listen(&pod.netns, both, opts) {
        Err(e) if e.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
            listen(&pod.netns, SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)), opts)
        }
        result => result,
    }
}

/// A connection as it was accepted.
#[derive(Debug)]
pub struct Accepted {
    pub tcp: TcpStream,
    pub peer: SocketAddr,
    /// Where the client wanted to go.
    pub destination: SocketAddr,
    pub at: Instant,
}

/// Accepts until the pod leaves, and serves each connection in a task of its own.
pub(crate) async fn accept<F, R>(
    worker: Arc<Worker>,
    pod: Arc<Pod>,
    listener: Arc<TcpListener>,
    serve: F,
) where
    F: Fn(Arc<Worker>, Arc<Pod>, Accepted) -> R,
    R: Future<Output = ()> + Send + 'static,
{
    // Until the last connection has been taken there may be one more to wait for.
    let _accepting = Busy::new(&worker.shared);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = pod.left() => return,
        };
        match accepted {
            Ok((tcp, peer)) => {
                let peer = canonical(peer);
                let capture = worker.shared.config.capture();
                let Ok(destination) = wanted(&tcp, peer, capture) else { continue };
                // Small writes of the relay are whole messages already.
                let _ = tcp.set_nodelay(true);
                let accepted =
                    Accepted { tcp, peer, destination: canonical(destination), at: Instant::now() };
                let busy = Busy::new(&worker.shared);
                let served = serve(worker.clone(), pod.clone(), accepted);
                tokio::spawn(served.map(move |()| drop(busy)));
            }
            Err(e) if is_of_peer(&e) => {}
            Err(e) => {
                tracing::warn!(pod = %pod.name, error = %e, "accept failed; raise the open files limit?");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Where the client wanted to go. A connection that was not turned around wanted to go to the listener itself.
fn wanted(tcp: &TcpStream, peer: SocketAddr, capture: Capture) -> io::Result<SocketAddr> {
    if capture == Capture::Redirect
        && let Ok(original) = net::socket::original_destination(tcp, peer.is_ipv6())
    {
        return Ok(original);
    }
    tcp.local_addr()
}

/// The connection was gone before we took it.
fn is_of_peer(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset)
}
