//! `waypoint`: the HTTP proxy. See `waypoint proxy --help`.

use clap::{Parser, Subcommand};
use waypoint::config::Config;

/// Returns memory soon after a burst, on a thread of its own.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// The HTTP proxy of Ambit: routes, faults and timeouts for the Services that are bound to it.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Example:\n  waypoint proxy --namespace shop --pod waypoint-0 --service-account waypoint --node node-1 --root-cert root-cert.pem --token-file token --xds-address https://10.89.0.1:15012\n\nIt is started by the control plane for a Gateway of class istio-waypoint, rarely by hand."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the Services that are bound to this waypoint.
    Proxy(Box<Config>),
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Proxy(config) => waypoint::app::run(*config),
    }
}
