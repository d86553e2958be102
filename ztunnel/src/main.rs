//! `ztunnel`: the node proxy. See `ztunnel proxy --help`.

use clap::{Parser, Subcommand};
use ztunnel::config::Config;
use ztunnel::istio;

/// Returns memory soon after a burst, on a thread of its own.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// The node proxy of Ambit: identity, encryption and layer-4 policy for the pods of one node.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Example:\n  ztunnel proxy --node node-1 --root-cert root-cert.pem --xds-address https://10.89.0.1:15012 --token-fd 3\n\nIstio's own DaemonSet starts it as `ztunnel proxy ztunnel`: then Istio's environment variables and files count, and nothing else (docs/stock-istio.md)."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the pods of this node.
    Proxy(Box<Config>),
}

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().collect();
    if istio::is_call(&args) {
        anyhow::ensure!(
            args.len() == 3,
            "`ztunnel proxy ztunnel` takes no flags: Istio's environment variables count"
        );
        let resolv_conf = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        return ztunnel::app::run(istio::config(std::env::vars(), &resolv_conf)?);
    }
    match Cli::parse().command {
        Command::Proxy(config) => ztunnel::app::run(*config),
    }
}
