//! `istiod-lite`: reads its settings, runs the control plane until SIGTERM or SIGINT.

use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use istiod_lite::config::{Args, Config, FileConfig};
use istiod_lite::{Inputs, inherit, start};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// Each change of the mesh makes and frees thousands of small values; what they took goes back to the system soon after.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Streams and certificate calls are short work; the folder watch has its own thread.
const WORKERS: usize = 2;

fn main() -> ExitCode {
    let args = Args::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // It would complain to the very stream that is broken, and a panic there would end us.
        .log_internal_errors(false)
        .init();
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> anyhow::Result<()> {
    // First of all: the number must not be taken by something we open.
    let token_registry =
        args.token_registry_fd.map(inherit).transpose().map_err(anyhow::Error::msg)?;
    let file = match &args.config {
        Some(path) => {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("cannot read --config {}", path.display()))?;
            FileConfig::parse(path, &text)?
        }
        None => FileConfig::default(),
    };
    let config = Config::resolve(args, file)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(serve(config, Inputs { token_registry, epoch: None }))
}

async fn serve(config: Config, inputs: Inputs) -> anyhow::Result<()> {
    // Before anything is started: a signal must not be missed.
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
    let running = start(config, inputs).await?;
    tracing::info!(
        proxies = ?running.addresses, status = %running.status, root = %running.root_cert.display(),
        "listening"
    );
    tokio::select! {
        _ = terminate.recv() => tracing::info!("SIGTERM: stopping"),
        _ = interrupt.recv() => tracing::info!("SIGINT: stopping"),
    }
    running.stop().await;
    Ok(())
}
