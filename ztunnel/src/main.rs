//! `ztunnel`: the node proxy. See `ztunnel proxy --help`.

use clap::{Parser, Subcommand};
use ztunnel::config::Config;

/// Returns memory soon after a burst, on a thread of its own.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// The node proxy of Ambit: identity, encryption and layer-4 policy for the pods of one node.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Example:\n  ztunnel proxy --node node-1 --root-cert root-cert.pem --xds-address https://10.89.0.1:15012 --token-fd 3"
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
    match Cli::parse().command {
        Command::Proxy(config) => ztunnel::app::run(*config),
    }
}
