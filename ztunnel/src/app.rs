//! Puts the proxy together: threads, control plane, node agent, drain.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use agent::access_log::AccessLog;
use agent::admin::{self, AdminState};
use agent::certs::CertStore;
use agent::control_plane::{
    Anchors, CERTIFICATE_LIFETIME, ControlPlane, Login, Proxy, RootCert, Server,
};
use agent::flags;
use agent::lifecycle;
use agent::logging;
use agent::metrics::Metrics;
use agent::readiness::Readiness;
use agent::store::ConfigStore;
use agent::trace::{TraceSettings, Tracer};
use agent::xds_client::{XdsPhase, XdsStatus, XdsView, run_xds};
use anyhow::{Context, ensure};
use model::{Reason, Refusal};
use tokio::sync::{Notify, mpsc, watch};
use xds::Kind;

use crate::config::{Config, Waits};
use crate::pages::Pages;
use crate::pods::Pods;
use crate::record::Recorder;
use crate::worker::{Command, Shared, Worker};
use crate::zds::{self, HangUp};

/// Orders that may wait for a worker: pods come at tens per second at most.
const COMMANDS: usize = 256;
/// A node token is 64 hex digits and a line break; what is longer is not one.
const MAX_TOKEN: u64 = 4096;
/// How long the last access-log lines may take at the end.
const LAST_LINES: Duration = Duration::from_secs(1);
/// How long connections that are ended may take to be gone, access-log line and all.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How often the drain looks whether the last connection has ended.
const DRAIN_LOOK: Duration = Duration::from_millis(50);

/// Runs `ztunnel proxy` until SIGTERM or SIGINT and the drain that follows.
pub fn run(config: Config) -> anyhow::Result<()> {
    let log_format = flags::log_format(&config.log_format).map_err(anyhow::Error::msg)?;
    let log = logging::start(log_format, &config.log_level)?;
    let own = [
        ("service.version", env!("CARGO_PKG_VERSION")),
        ("k8s.node.name", &config.node),
        ("k8s.cluster.name", &config.cluster),
    ];
    let traces = config.traces.settings("ztunnel", &own).map_err(anyhow::Error::msg)?;
    let files = net::socket::raise_open_files().context("reading the limit of open files")?;
    let token = config.token_fd.map(read_token).transpose()?;
    let ready = config.ready_fd.map(|fd| inherited("--ready-fd", fd)).transpose()?;
    tracing::info!(
        node = %config.node,
        version = env!("CARGO_PKG_VERSION"),
        workers = config.worker_threads(),
        open_files = files,
        "ztunnel starts"
    );
    for warning in config.istio.iter().flat_map(|seam| &seam.warnings) {
        tracing::warn!("{warning}");
    }
    // Control plane, certificates and the admin pages: away from the threads that move bytes.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(serve(config, token, traces, ready, log))
}

async fn serve(
    config: Config,
    token: Option<String>,
    traces: Option<TraceSettings>,
    ready: Option<File>,
    log: logging::LogControl,
) -> anyhow::Result<()> {
    let readiness = Readiness::new();
    let pods_named = readiness.wait_for("pods from the node agent");
    let configured = readiness.wait_for("configuration");
    let control_plane = Arc::new(control_plane(&config, token));
    let store = Arc::new(ConfigStore::default());
    let metrics = Metrics::new("ztunnel", env!("CARGO_PKG_VERSION"));
    let certs = CertStore::new(control_plane.clone());
    certs.report_to(metrics.clone());
    let lines = flags::access_log(&config.access_log, metrics.access_log_dropped());
    let lines = lines.map_err(anyhow::Error::msg)?;
    let status = Arc::new(XdsStatus::new(metrics.clone()));
    let shared = Arc::new(Shared {
        config: config.clone(),
        store: store.clone(),
        certs: certs.clone(),
        status: status.clone(),
        open: AtomicUsize::new(0),
        busy: AtomicUsize::new(0),
    });
    let (stop, stopped) = watch::channel(false);
    let tracer = Tracer::start(traces, metrics.spans(), stopped.clone());
    let (workers, commands) = start_workers(&shared, &metrics, &lines, &tracer)?;
    let quit = Arc::new(Notify::new());
    let state = admin_state(
        &config,
        &workers,
        store.clone(),
        certs.clone(),
        readiness.clone(),
        metrics.clone(),
        log,
        quit.clone(),
    );
    let pages = Pages::start(state, &config).await?;
    let pods = Pods::new(
        config.trust_domain.as_str().into(),
        commands.clone(),
        certs.clone(),
        metrics,
        pods_named,
        pages.clone(),
    );
    tokio::spawn(certs.clone().run(stopped.clone()));
    tokio::spawn(run_xds(control_plane, store, certs, status.clone(), stopped));
    tokio::spawn(async move {
        // The sender lives in the status, which the stream's task holds.
        let _ = status.subscribe().wait_for(XdsView::is_configured).await;
        drop(configured);
    });
    let hang_up = Arc::new(HangUp::default());
    tokio::spawn(take_pods(shared.clone(), pods, hang_up.clone()));
    tokio::spawn(say_ready(readiness, ready));

    lifecycle::told_to_end(&quit).await?;
    hang_up.now();
    pages.close();
    drain(&config, &commands, &shared, &quit).await?;
    stop.send_replace(true);
    tracer.ended().await;
    lines.flush(LAST_LINES);
    Ok(())
}

/// Talks to the node agent, but not before there is a configuration: with the first pod come its listeners, and in them
/// the connections that wait.
async fn take_pods(shared: Arc<Shared>, pods: Pods, hang_up: Arc<HangUp>) {
    let mut view = shared.status.subscribe();
    let from_disk = view.borrow().phase == XdsPhase::FromDisk;
    // From disk it is as good as it gets once the control plane could not be reached.
    let enough = |view: &XdsView| view.was_synced || (from_disk && view.error.is_some());
    let limit = if from_disk { Waits::NEWER_CONFIGURATION } else { Waits::FIRST_CONFIGURATION };
    let _ = tokio::time::timeout(limit, view.wait_for(enough)).await;
    let socket = shared.config.zds_socket.clone();
    let thread = std::thread::Builder::new().name("node-agent".into());
    // Istio's agent keeps no listeners for the next process, which shares our ports instead.
    let hands_over = shared.config.istio.is_none();
    let handle = move |event| {
        let added = pods.handle(event);
        if hands_over { added } else { added.map(|_| Vec::new()) }
    };
    let started = thread.spawn(move || zds::run(&socket, &hang_up, handle));
    if let Err(e) = started {
        tracing::error!("no thread for the node agent, this proxy serves nobody: {e}");
    }
}

/// Tells who started us that they can rely on us.
async fn say_ready(readiness: Readiness, to: Option<File>) {
    readiness.ready().await;
    tracing::info!("ready");
    if let Some(mut to) = to {
        // Who started us may have stopped listening.
        let _ = to.write_all(b"ready\n");
    }
}

/// Takes over a descriptor that the parent passed by number.
fn inherited(flag: &str, fd: i32) -> anyhow::Result<File> {
    ensure!(fd > 2, "{flag} is {fd}; it must be an inherited descriptor above 2");
    // SAFETY: the launcher handed this descriptor to us by number, and nothing else in this process
    // knows it. A wrong number gives an error at the first use.
    #[expect(unsafe_code, reason = "an inherited descriptor arrives as a number")]
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// Reads the token and closes the descriptor, so that nothing we start can inherit it.
fn read_token(fd: i32) -> anyhow::Result<String> {
    let file = inherited("--token-fd", fd)?;
    let mut token = String::new();
    file.take(MAX_TOKEN)
        .read_to_string(&mut token)
        .with_context(|| format!("reading the node token from descriptor {fd}"))?;
    let token = token.trim();
    ensure!(!token.is_empty(), "descriptor {fd} (--token-fd) holds no node token");
    Ok(token.to_owned())
}

fn control_plane(config: &Config, bootstrap_token: Option<String>) -> ControlPlane {
    let own = Server {
        address: config.xds_address.clone(),
        name: config.xds_server_name.clone(),
        root: RootCert::File(config.root_cert.clone()),
        headers: Vec::new(),
    };
    let control_plane = ControlPlane {
        xds: own.clone(),
        ca: own,
        login: Login::Certificate { bootstrap_token },
        kinds: &Kind::OF_NODE,
        anchors: Anchors::RootFile,
        proxy: Proxy::of_node(&config.node),
        cluster: config.cluster.as_str().into(),
        network: config.network.as_str().into(),
        trust_domain: config.trust_domain.as_str().into(),
        certificate_lifetime: CERTIFICATE_LIFETIME,
        state_dir: config.state_dir.clone(),
        secret_dir: config.secret_dir.clone(),
    };
    let Some(seam) = config.istio.as_deref().cloned() else { return control_plane };
    ControlPlane {
        xds: seam.xds,
        ca: seam.ca,
        login: Login::Token(seam.token),
        kinds: &Kind::OF_ISTIO,
        anchors: Anchors::CaAnswer,
        proxy: seam.proxy,
        certificate_lifetime: seam.certificate_lifetime,
        ..control_plane
    }
}

type Workers = (Vec<Arc<Worker>>, Vec<mpsc::Sender<Command>>);

fn start_workers(
    shared: &Arc<Shared>,
    metrics: &Metrics,
    lines: &AccessLog,
    tracer: &Tracer,
) -> anyhow::Result<Workers> {
    let (mut workers, mut commands) = (Vec::new(), Vec::new());
    for index in 0..shared.config.worker_threads() {
        let recorder = Recorder::new(metrics.clone(), lines.clone(), tracer.clone());
        let worker = Arc::new(Worker::new(shared.clone(), recorder));
        let (send, receive) = mpsc::channel(COMMANDS);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let of_thread = worker.clone();
        std::thread::Builder::new()
            .name(format!("worker-{index}"))
            .spawn(move || runtime.block_on(of_thread.run(receive)))?;
        workers.push(worker);
        commands.push(send);
    }
    Ok((workers, commands))
}

#[expect(clippy::too_many_arguments, reason = "everything the pages show, gathered in one place")]
fn admin_state(
    config: &Config,
    workers: &[Arc<Worker>],
    store: Arc<ConfigStore>,
    certs: Arc<CertStore>,
    readiness: Readiness,
    metrics: Metrics,
    log: logging::LogControl,
    quit: Arc<Notify>,
) -> AdminState {
    let workers = workers.to_vec();
    AdminState {
        program: format!("ztunnel {}", env!("CARGO_PKG_VERSION")),
        readiness,
        metrics,
        log,
        snapshot: Box::new(move || store.load_full()),
        certificates: Box::new(move || admin::certificates(&certs)),
        connections: Box::new(move || connections(&workers)),
        settings: serde_json::json!({
            "node": config.node,
            "xdsAddress": config.xds_address,
            "workers": config.worker_threads(),
            "maxConnections": config.max_connections,
            "drainSeconds": config.drain_seconds,
            "dnsProxy": config.dns_proxy,
            "accessLog": config.access_log,
            "traces": config.traces.endpoint,
        }),
        quit: Box::new(move || quit.notify_one()),
    }
}

fn connections(workers: &[Arc<Worker>]) -> serde_json::Value {
    let mut list = Vec::new();
    for live in workers.iter().flat_map(|worker| worker.connections.list()) {
        let (up, down) = live.moved.totals();
        list.push(serde_json::json!({
            "pod": format!("{}/{}", live.pod.namespace, live.pod.name),
            "direction": format!("{:?}", live.direction).to_lowercase(),
            "source": live.source.to_string(),
            "destination": live.destination.to_string(),
            "peer": live.peer.as_ref().map(ToString::to_string),
            "client": live.client.as_ref().map(ToString::to_string),
            "protocol": if live.hbone { "HBONE" } else { "TCP" },
            "seconds": live.started.elapsed().as_secs(),
            "bytesUp": up,
            "bytesDown": down,
        }));
    }
    list.into()
}

/// Takes no more connections, waits for those that live as long as the configuration says, and ends what is left with
/// its reason.
async fn drain(
    config: &Config,
    commands: &[mpsc::Sender<Command>],
    shared: &Shared,
    quit: &Notify,
) -> anyhow::Result<()> {
    tell(commands, || Command::Drain).await;
    let open = || shared.open.load(Ordering::Relaxed);
    tracing::info!(connections = open(), seconds = config.drain_seconds, "draining");
    let (begun, limit) = (Instant::now(), Duration::from_secs(config.drain_seconds));
    let busy = || shared.busy.load(Ordering::Relaxed);
    let mut told = std::pin::pin!(lifecycle::told_to_end(quit));
    let why = loop {
        match engine::Drain::after(begun.elapsed(), limit, busy()) {
            engine::Drain::Done => return Ok(()),
            engine::Drain::Cut => {
                let seconds = config.drain_seconds;
                break format!("this proxy goes, and {seconds} s (--drain-seconds) are over");
            }
            engine::Drain::Wait => tokio::select! {
                () = tokio::time::sleep(DRAIN_LOOK) => {}
                told = &mut told => {
                    told?;
                    break "this proxy goes, and was told to go at once".to_owned();
                }
            },
        }
    };
    tracing::warn!(connections = open(), "{why}: ending what is left");
    tell(commands, || Command::End(Refusal::new(Reason::Draining, why.clone()))).await;
    // Only tunnels without streams are left after it, and what connects at this moment.
    let quiet = async {
        while busy() > 0 {
            tokio::time::sleep(DRAIN_LOOK).await;
        }
    };
    let _ = tokio::time::timeout(LAST_WORDS, quiet).await;
    Ok(())
}

async fn tell(workers: &[mpsc::Sender<Command>], command: impl Fn() -> Command) {
    for worker in workers {
        // A worker that ended has nothing to obey.
        let _ = worker.send(command()).await;
    }
}
