//! Puts the parts together, and takes them apart again.

use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use engine::Rotation;
use model::Str;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::ca::{CaError, LocalCa, ROOT_CERT};
use crate::config::Config;
use crate::control::{Control, Proxy, Registered};
use crate::files::{self, FileError};
use crate::kept::Kept;
use crate::report::Reporter;
use crate::serve::{self, Limits};
use crate::signer::{SignError, Signer};
use crate::tls::{ServerCertificate, server_config};
use crate::watch as folders;
use crate::world::{Builder, Latest, World};
use crate::{registry, status};

/// How often certificates are looked at at least. A clock may be set at any time.
const MAINTENANCE: Duration = Duration::from_secs(60);
/// Calls that are under way at the end get this long.
const DRAIN: Duration = Duration::from_secs(5);

/// What the process gets from outside besides its settings.
#[derive(Debug, Default)]
pub struct Inputs {
    /// The launcher's token registry.
    pub token_registry: Option<UnixStream>,
    /// Tells this run from every other; random unless given.
    pub epoch: Option<u64>,
}

/// Why the control plane cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Ca(#[from] CaError),
    #[error("the control plane's own certificate: {0}")]
    Sign(#[from] SignError),
    #[error("TLS: {0}")]
    Tls(String),
    #[error("cannot listen on {address}: {source}; {help}")]
    Listen { address: SocketAddr, source: std::io::Error, help: &'static str },
    #[error("{what}: {source}")]
    Io { what: &'static str, source: std::io::Error },
    #[error("no random numbers: {0}")]
    Random(#[from] getrandom::Error),
}

/// A control plane at work. Ends when dropped; [`Running::stop`] ends it gently.
#[derive(Debug)]
pub struct Running {
    /// Where proxies are served; real ports where 0 was asked for.
    pub addresses: Vec<SocketAddr>,
    /// Where the status page is.
    pub status: SocketAddr,
    /// The root of trust for proxies.
    pub root_cert: PathBuf,
    control: Arc<Control>,
    stopping: watch::Sender<bool>,
    tasks: JoinSet<()>,
    _watch: folders::Stop,
    _lock: std::fs::File,
}

/// Starts everything; returns when the ports are open. Needs a tokio runtime.
pub async fn start(config: Config, inputs: Inputs) -> Result<Running, StartError> {
    files::create_dir(&config.state_dir)?;
    let lock = files::lock_dir(&config.state_dir)?;
    let now = SystemTime::now();
    let trust_domain = config.mesh.trust_domain.clone();
    let ca = Arc::new(LocalCa::open(&config.state_dir, &trust_domain, now)?);
    let mut listeners = Vec::new();
    for address in &config.listen {
        listeners.push(listen(*address, "--listen").await?);
    }
    let status_listener = listen(config.status_listen, "--status-listen").await?;
    let (addresses, status_address) = (locals(&listeners)?, local(&status_listener)?);
    let ips = addresses.iter().map(SocketAddr::ip).collect();
    let server = ServerCertificate::new(&*ca, ips, trust_domain.clone(), config.leaf_ttl, now);
    let server = Arc::new(server.await?);
    let tls = server_config(server.clone(), ca.roots()).map_err(StartError::Tls)?;
    let epoch = match inputs.epoch {
        Some(epoch) => epoch,
        // 0 means "no epoch" to a proxy.
        None => getrandom::u64()?.max(1),
    };

    let (publish, latest) = watch::channel(Latest::default());
    let (stopping, stop) = watch::channel(false);
    let control = Control::new(config.mesh.clone(), config.leaf_ttl, ca.clone(), latest, stop);
    let control = Arc::new(control);
    let folder_watch = watch_folders(&config, epoch, publish, control.clone())
        .map_err(|source| StartError::Io { what: "cannot start the watch thread", source })?;

    let mut tasks = JoinSet::new();
    let (tls, limits) = (Arc::new(tls), Arc::new(Limits::default()));
    for listener in listeners {
        tasks.spawn(serve::accept(listener, tls.clone(), control.clone(), limits.clone()));
    }
    tasks.spawn(status::serve(status_listener, control.clone()));
    tasks.spawn(maintain(ca, server, trust_domain, control.clone()));
    if let Some(stream) = inputs.token_registry {
        let stream = nonblocking(stream)
            .map_err(|source| StartError::Io { what: "the token registry", source })?;
        tasks.spawn(registry::serve(stream, control.clone()));
    }
    let root_cert = config.state_dir.join(ROOT_CERT);
    Ok(Running {
        addresses,
        status: status_address,
        root_cert,
        control,
        stopping,
        tasks,
        _watch: folder_watch,
        _lock: lock,
    })
}

impl Running {
    /// Waits until every folder has been read and the first configuration is there.
    pub async fn ready(&self) {
        let mut latest = self.control.latest.clone();
        // Fails when the watch thread is gone: then it never becomes ready.
        if latest.wait_for(|latest| latest.world.is_some()).await.is_err() {
            std::future::pending().await
        }
    }

    /// The proxies that are connected.
    pub fn proxies(&self) -> Vec<Proxy> {
        self.control.list_proxies()
    }

    /// Takes a line of the token registry, for programs that run the control plane inside themselves.
    pub fn register_token(&self, line: &str) -> Result<Registered, crate::tokens::TokenError> {
        self.control.register(line)
    }

    /// The metrics page.
    pub fn metrics(&self) -> String {
        self.control.metrics.text()
    }

    /// Closes the ports, tells proxies to go elsewhere, and lets calls that are under way end.
    pub async fn stop(mut self) {
        // Fails when nobody listens any more: then there is nothing to stop.
        let _ = self.stopping.send(true);
        let drained = async {
            while !self.control.list_proxies().is_empty() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        if tokio::time::timeout(DRAIN, drained).await.is_err() {
            tracing::warn!("streams still open after {DRAIN:?}; closing them");
        }
        self.tasks.shutdown().await;
    }
}

/// Builds a new state for each change, on the watch thread.
fn watch_folders(
    config: &Config,
    epoch: u64,
    publish: watch::Sender<Latest>,
    control: Arc<Control>,
) -> std::io::Result<folders::Stop> {
    let mut builder = Builder::new(config.mesh.clone(), epoch, Kept::new(&config.state_dir));
    let mut reporter = Reporter::default();
    let state_dir = config.state_dir.clone();
    let mut last: Option<Arc<World>> = None;
    folders::start(config.dirs.clone(), move |update| {
        let latest = builder.update(update, Instant::now());
        if let Some(world) = &latest.world {
            let [workloads, services, policies, routes, subsets] = world.counts;
            control.metrics.counted(&world.counts, &latest.diagnostics);
            if !last.as_ref().is_some_and(|last| Arc::ptr_eq(last, world)) {
                control.metrics.compiled(world.compile_time.as_secs_f64());
            }
            if last.as_ref().map(|last| last.push()) != Some(world.push()) {
                control.metrics.pushed();
                let took = world.compile_time;
                tracing::info!(
                    push = %world.push(), workloads, services, policies, routes, subsets, ?took,
                    "new configuration"
                );
            }
        }
        last = latest.world.clone();
        publish.send_replace(latest.clone());
        reporter.report(&latest, &state_dir);
    })
}

/// Renews our certificate and the intermediate.
async fn maintain(
    ca: Arc<LocalCa>,
    server: Arc<ServerCertificate>,
    trust_domain: Str,
    control: Arc<Control>,
) {
    loop {
        let now = SystemTime::now();
        if let Err(error) = ca.maintain(&trust_domain, now) {
            tracing::error!("CA: {error}");
        }
        let rotation = rotation(server.lifetime());
        if rotation.wait(seconds(now), 0) == 0
            && let Err(error) = server.renew(&*ca, now).await
        {
            tracing::error!("the control plane's own certificate was not renewed: {error}");
        }
        let expiry = ca.expiry();
        control.metrics.expires("root", expiry.root);
        control.metrics.expires("intermediate", expiry.intermediate);
        control.metrics.expires("server", server.lifetime().1);
        let wait = self::rotation(server.lifetime()).wait(seconds(SystemTime::now()), 0);
        // At least a second, should the renewal have failed.
        tokio::time::sleep(Duration::from_secs(wait.max(1)).min(MAINTENANCE)).await;
    }
}

fn rotation((not_before, not_after): (SystemTime, SystemTime)) -> Rotation {
    Rotation { not_before: seconds(not_before), not_after: seconds(not_after) }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

async fn listen(address: SocketAddr, flag: &'static str) -> Result<TcpListener, StartError> {
    use std::io::ErrorKind;
    TcpListener::bind(address).await.map_err(|source| {
        let help = match (source.kind(), flag) {
            (ErrorKind::AddrInUse, "--listen") => {
                "another program, perhaps another istiod-lite, has that port: stop it, or choose another \
                 with --listen"
            }
            (ErrorKind::AddrInUse, _) => {
                "another program, perhaps another istiod-lite, has that port: stop it, or choose another \
                 with --status-listen"
            }
            (ErrorKind::AddrNotAvailable, _) => "no interface of this machine has that address",
            (ErrorKind::PermissionDenied, _) => "ports below 1024 need privileges: choose a higher one",
            _ => "check the address",
        };
        StartError::Listen { address, source, help }
    })
}

fn locals(listeners: &[TcpListener]) -> Result<Vec<SocketAddr>, StartError> {
    listeners.iter().map(local).collect()
}

fn local(listener: &TcpListener) -> Result<SocketAddr, StartError> {
    listener
        .local_addr()
        .map_err(|source| StartError::Io { what: "a listener has no address", source })
}

fn nonblocking(stream: UnixStream) -> std::io::Result<tokio::net::UnixStream> {
    stream.set_nonblocking(true)?;
    tokio::net::UnixStream::from_std(stream)
}
