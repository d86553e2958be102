//! Puts the proxy together: threads, control plane, pages, drain.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use agent::admin::{self, AdminState, Page};
use agent::certs::CertStore;
use agent::control_plane::{
    Anchors, CERTIFICATE_LIFETIME, ControlPlane, Login, Proxy, RootCert, Server, Token,
};
use agent::metrics::Metrics;
use agent::readiness::Readiness;
use agent::store::ConfigStore;
use agent::trace::{TraceSettings, Tracer};
use agent::xds_client::{XdsStatus, XdsView, run_xds};
use agent::{flags, lifecycle, logging};
use anyhow::Context as _;
use model::{Reason, Refusal};
use tokio::sync::{Notify, mpsc, watch};
use xds::Kind;

use crate::config::Config;
use crate::record::Recorder;
use crate::worker::{Handed, Shared, Stage, Worker, listen_at};

/// How long the last access-log lines may take at the end.
const LAST_LINES: Duration = Duration::from_secs(1);
/// How long what is ended may take to be gone, access-log line and all.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How often the drain looks whether the last connection has ended.
const DRAIN_LOOK: Duration = Duration::from_millis(50);

/// Runs `waypoint proxy` until SIGTERM or SIGINT and the drain that follows.
pub fn run(config: Config) -> anyhow::Result<()> {
    let log_format = flags::log_format(&config.log_format).map_err(anyhow::Error::msg)?;
    let log = logging::start(log_format, &config.log_level)?;
    let own = [
        ("service.version", env!("CARGO_PKG_VERSION")),
        ("k8s.namespace.name", &config.namespace),
        ("k8s.pod.name", &config.pod),
        ("k8s.node.name", &config.node),
        ("k8s.cluster.name", &config.cluster),
    ];
    let traces = config.traces.settings("waypoint", &own).map_err(anyhow::Error::msg)?;
    let files = net::socket::raise_open_files().context("reading the limit of open files")?;
    tracing::info!(
        namespace = %config.namespace,
        pod = %config.pod,
        version = env!("CARGO_PKG_VERSION"),
        workers = config.worker_threads(),
        open_files = files,
        "waypoint starts"
    );
    // Control plane, certificates and the admin pages: away from the threads that move bytes.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(serve(config, traces, log))
}

async fn serve(
    config: Config,
    traces: Option<TraceSettings>,
    log: logging::LogControl,
) -> anyhow::Result<()> {
    let readiness = Readiness::new();
    let configured = readiness.wait_for("configuration");
    let certified = readiness.wait_for("certificate");
    let control_plane = Arc::new(control_plane(&config));
    let store = Arc::new(ConfigStore::default());
    let metrics = Metrics::new("waypoint", env!("CARGO_PKG_VERSION"));
    let certs = CertStore::new(control_plane.clone());
    certs.report_to(metrics.clone());
    let lines = flags::access_log(&config.access_log, metrics.access_log_dropped());
    let lines = lines.map_err(anyhow::Error::msg)?;
    let status = Arc::new(XdsStatus::new(metrics.clone()));
    let (shared, handed) = Shared::new(config, store.clone(), certs.clone());
    let (stop, stopped) = watch::channel(false);
    let tracer = Tracer::start(traces, metrics.spans(), stopped.clone());
    let recorder = || Recorder::new(metrics.clone(), lines.clone(), tracer.clone());
    let workers = make_workers(&shared, recorder);
    let quit = Arc::new(Notify::new());
    let state =
        admin_state(&shared, &workers, readiness.clone(), metrics.clone(), log, quit.clone());
    serve_pages(state, &shared.config).await?;
    certs.prefetch(&shared.identity);
    tokio::spawn(certs.clone().run(stopped.clone()));
    tokio::spawn(run_xds(control_plane, store, certs, status.clone(), stopped));
    // Nobody is taken before there is something to serve with: a client's proxy goes to another waypoint instead of waiting.
    let begun = {
        let shared = shared.clone();
        async move {
            // The sender lives in the status, which the stream's task holds.
            let _ = status.subscribe().wait_for(XdsView::is_configured).await;
            drop(configured);
            has_certificate(&shared).await;
            drop(certified);
            start_workers(&shared, workers, handed)?;
            tracing::info!("ready");
            anyhow::Ok(())
        }
    };
    tokio::select! {
        // It ends at once, with an error that names the address, or the waypoint serves from here on.
        begun = begun => begun?,
        told = lifecycle::told_to_end(&quit) => return told.map_err(Into::into),
    }

    lifecycle::told_to_end(&quit).await?;
    let _leaving = readiness.wait_for("nothing any more: this waypoint is going");
    drain(&shared, &quit).await?;
    stop.send_replace(true);
    tracer.ended().await;
    lines.flush(LAST_LINES);
    Ok(())
}

async fn has_certificate(shared: &Shared) {
    let mut changed = shared.certs.subscribe();
    while shared.certs.get(&shared.identity).is_none() {
        // Not by a change alone: a clock that is put right makes a certificate valid that nobody has touched.
        let _ = tokio::time::timeout(engine::TICK, changed.changed()).await;
    }
}

fn control_plane(config: &Config) -> ControlPlane {
    let own = Server {
        address: config.xds_address.clone(),
        name: config.xds_server_name.clone(),
        root: RootCert::File(config.root_cert.clone()),
        headers: Vec::new(),
    };
    ControlPlane {
        xds: own.clone(),
        ca: own,
        login: Login::Token(Token::File(config.token_file.clone())),
        kinds: &Kind::OF_WAYPOINT,
        anchors: Anchors::RootFile,
        proxy: Proxy {
            node: config.node.clone(),
            pod: config.pod.clone(),
            namespace: config.namespace.clone(),
            service_account: config.service_account.clone(),
            ip: config.pod_ip,
            metadata: Default::default(),
        },
        cluster: config.cluster.as_str().into(),
        network: config.network.as_str().into(),
        trust_domain: config.trust_domain.as_str().into(),
        certificate_lifetime: CERTIFICATE_LIFETIME,
        state_dir: config.state_dir.clone(),
        secret_dir: config.secret_dir.clone(),
    }
}

/// The workers, not yet running.
pub fn make_workers(shared: &Arc<Shared>, recorder: impl Fn() -> Recorder) -> Vec<Arc<Worker>> {
    let count = shared.config.worker_threads();
    (0..count).map(|index| Arc::new(Worker::new(shared.clone(), recorder(), index))).collect()
}

/// Starts a thread for each worker, with a listener of its own. The address where they listen.
pub fn start_workers(
    shared: &Arc<Shared>,
    workers: Vec<Arc<Worker>>,
    handed: Vec<mpsc::Receiver<Handed>>,
) -> anyhow::Result<SocketAddr> {
    let mut address = shared.config.hbone_address;
    for (index, (worker, handed)) in workers.into_iter().zip(handed).enumerate() {
        let listener = listen_at(address)
            .with_context(|| format!("cannot listen on {address} for HBONE (--hbone-address)"))?;
        // The first may have been given any port; the others share it.
        address = listener.local_addr()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::Builder::new()
            .name(format!("worker-{index}"))
            .spawn(move || runtime.block_on(worker.run(listener, handed)))?;
    }
    Ok(address)
}

fn admin_state(
    shared: &Arc<Shared>,
    workers: &[Arc<Worker>],
    readiness: Readiness,
    metrics: Metrics,
    log: logging::LogControl,
    quit: Arc<Notify>,
) -> AdminState {
    let (workers, config) = (workers.to_vec(), &shared.config);
    let (store, certs) = (shared.store.clone(), shared.certs.clone());
    AdminState {
        program: format!("waypoint {}", env!("CARGO_PKG_VERSION")),
        readiness,
        metrics,
        log,
        settings: serde_json::json!({
            "namespace": config.namespace,
            "pod": config.pod,
            "identity": shared.identity.to_string(),
            "xdsAddress": config.xds_address,
            "workers": config.worker_threads(),
            "maxConnections": config.max_connections,
            "drainSeconds": config.drain_seconds,
            "accessLog": config.access_log,
            "traces": config.traces.endpoint,
        }),
        snapshot: Box::new(move || store.load_full()),
        certificates: Box::new(move || admin::certificates(&certs)),
        connections: Box::new(move || connections(&workers)),
        quit: Box::new(move || quit.notify_one()),
    }
}

fn connections(workers: &[Arc<Worker>]) -> serde_json::Value {
    let open = |worker: &Arc<Worker>| {
        let tunnels = worker.tunnels.stats();
        serde_json::json!({
            "clients": worker.streams(),
            "tunnelsToEndpoints": tunnels.tunnels,
            "streamsToEndpoints": tunnels.streams,
            "httpToEndpoints": worker.upstreams.open(),
            "relayed": worker.connections.list(),
        })
    };
    serde_json::json!({
        "clients": workers.first().map_or(0, |w| w.shared.open.load(Ordering::Relaxed)),
        "workers": workers.iter().map(open).collect::<Vec<_>>(),
    })
}

async fn serve_pages(state: AdminState, config: &Config) -> io::Result<()> {
    let state = Arc::new(state);
    for (page, address) in [
        (Page::Readiness, config.readiness_address),
        (Page::Metrics, config.stats_address),
        (Page::Admin, config.admin_address),
    ] {
        let listener = admin::bind(page, address).await?;
        let state = state.clone();
        tokio::spawn(async move { admin::serve(listener, page, state).await });
    }
    Ok(())
}

/// Tells clients to go, then takes no more, waits for what lives as long as the configuration says, and ends the rest with
/// its reason.
pub async fn drain(shared: &Shared, quit: &Notify) -> io::Result<()> {
    let (config, begun) = (&shared.config, Instant::now());
    let busy = || shared.busy.load(Ordering::Relaxed);
    shared.enter(Stage::Leaving);
    tracing::info!(
        connections = shared.open.load(Ordering::Relaxed),
        seconds = config.drain_seconds,
        "draining"
    );
    let mut told = std::pin::pin!(lifecycle::told_to_end(quit));
    let mut closing = false;
    let why = loop {
        if !closing && begun.elapsed() >= config.farewell() {
            closing = true;
            shared.enter(Stage::Closing);
        }
        // The listeners count as busy until they are closed.
        match engine::Drain::after(begun.elapsed(), config.drain(), busy()) {
            engine::Drain::Done => return Ok(()),
            engine::Drain::Cut => {
                let seconds = config.drain_seconds;
                break format!("this waypoint goes, and {seconds} s (--drain-seconds) are over");
            }
            engine::Drain::Wait => tokio::select! {
                () = tokio::time::sleep(DRAIN_LOOK) => {}
                told = &mut told => {
                    told?;
                    break "this waypoint goes, and was told to go at once".to_owned();
                }
            },
        }
    };
    tracing::warn!(connections = shared.open.load(Ordering::Relaxed), "{why}: ending what is left");
    shared.enter(Stage::Ended(Refusal::new(Reason::Draining, why)));
    let quiet = async {
        while busy() > 0 {
            tokio::time::sleep(DRAIN_LOOK).await;
        }
    };
    let _ = tokio::time::timeout(LAST_WORDS, quiet).await;
    Ok(())
}
