//! The waypoint as a plain HTTP proxy, for the benchmark against proxies that have no HBONE: requests come by TCP, and from
//! there on everything is the waypoint's own code. Its configuration is compiled from YAML, once.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use agent::certs::CertStore;
use agent::control_plane::{
    Anchors, CERTIFICATE_LIFETIME, ControlPlane, Login, Proxy, RootCert, Server, Token,
};
use agent::flags;
use agent::metrics::Metrics;
use agent::store::ConfigStore;
use agent::trace::Tracer;
use anyhow::{Context, Result, ensure};
use clap::Parser;
use compile::{Folder, MeshConfig, compile};
use model::{Change, Identity, Snapshot};
use waypoint::app::make_workers;
use waypoint::config::Config;
use waypoint::plain::{Entry, start_workers};
use waypoint::record::Recorder;
use waypoint::worker::Shared;

/// As in the program `waypoint`.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

#[derive(Debug, Parser)]
#[command(about = "The waypoint without its tunnel, for benchmarks")]
struct Cli {
    #[command(flatten)]
    config: Config,
    /// File with the objects of the mesh
    #[arg(long)]
    objects: PathBuf,
    #[arg(long)]
    listen: SocketAddr,
    /// What every connection is for: address and port of a Service
    #[arg(long)]
    to: SocketAddr,
    /// Folder for what the proxy would keep
    #[arg(long)]
    work: PathBuf,
}

fn main() -> ExitCode {
    let Err(error) = run(Cli::parse()) else { return ExitCode::SUCCESS };
    // Nobody is left to tell when standard error is closed.
    let _ = writeln!(std::io::stderr(), "plainpoint: {error:#}");
    ExitCode::FAILURE
}

fn run(cli: Cli) -> Result<()> {
    net::socket::raise_open_files().context("the limit of open files")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        serve(cli)?;
        std::future::pending().await
    })
}

fn serve(cli: Cli) -> Result<()> {
    let store = Arc::new(ConfigStore::default());
    store.publish(snapshot(&cli.objects)?);
    let metrics = Metrics::new("waypoint", env!("CARGO_PKG_VERSION"));
    let lines = flags::access_log(&cli.config.access_log, metrics.access_log_dropped());
    let lines = lines.map_err(anyhow::Error::msg)?;
    // The receiving ends are for tunnels: there are none.
    let (shared, _tunnels) = Shared::new(cli.config, store, certs(&cli.work));
    let recorder = || Recorder::new(metrics.clone(), lines.clone(), Tracer::off());
    let workers = make_workers(&shared, recorder);
    let client = Arc::new(Identity::new("cluster.local", "bench", "client"));
    start_workers(cli.listen, workers, &Entry { client, to: cli.to })
        .with_context(|| format!("cannot listen on {}", cli.listen))?;
    Ok(())
}

/// What the objects mean.
fn snapshot(path: &Path) -> Result<Snapshot> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let mut folder = Folder::new();
    folder.set_file(0, "objects.yaml", &text);
    let said = folder.diagnostics();
    ensure!(said.is_empty(), "{said:?}");
    let mut objects = folder.objects();
    // The waypoint is this process, which serves.
    objects.programmed.insert(("bench".into(), "waypoint".into()));
    let compiled = compile(&objects, &MeshConfig::default());
    let changes = (compiled.workloads.into_iter().map(Change::SetWorkload))
        .chain(compiled.services.into_iter().map(Change::SetService))
        .chain(compiled.policies.into_iter().map(Change::SetPolicy))
        .chain(compiled.subsets.into_iter().map(Change::SetSubset))
        .chain(compiled.routes.into_iter().map(Change::SetRoutes));
    Ok(Snapshot::default().with(changes))
}

/// A store without a CA: what is outside the mesh needs no certificate.
fn certs(work: &Path) -> Arc<CertStore> {
    let server = Server {
        address: "https://127.0.0.1:1".into(),
        name: "istiod".into(),
        root: RootCert::File(work.join("root-cert.pem")),
        headers: Vec::new(),
    };
    CertStore::new(Arc::new(ControlPlane {
        xds: server.clone(),
        ca: server,
        login: Login::Token(Token::Fixed("none".into())),
        kinds: &xds::Kind::OF_WAYPOINT,
        anchors: Anchors::RootFile,
        proxy: Proxy::of_node("node-1"),
        cluster: "Kubernetes".into(),
        network: "".into(),
        trust_domain: "cluster.local".into(),
        certificate_lifetime: CERTIFICATE_LIFETIME,
        state_dir: work.join("state"),
        secret_dir: work.join("secrets"),
    }))
}
