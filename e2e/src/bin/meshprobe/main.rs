//! `meshprobe`: what the end-to-end tests need inside pods and nodes and no ordinary program does: odd TCP manners, a gRPC
//! service, a tap on the wire, and attacks. Results are one JSON object a line.

mod attack;
mod collect;
mod dns;
mod grpc;
mod tap;
mod tcp;
mod tunnel;

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, Subcommand};
use serde::Serialize;

#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    mode: Mode,
}

#[derive(Subcommand)]
enum Mode {
    /// Does nothing until it is ended
    Pause,
    /// Looks at the wire until its input ends; says "ready" first
    Tap {
        #[arg(long, default_value = "eth0")]
        interface: String,
        #[arg(long)]
        canary: String,
        /// Seconds after which it ends in any case
        #[arg(long, default_value_t = 60.0)]
        most: f64,
    },
    /// Connects, says nothing, prints the first line it hears
    Hear { to: String },
    /// Connects, sends a line, reads to the end, says how that came
    End {
        to: String,
        #[arg(long, default_value = "")]
        send: String,
        /// Close as soon as this was heard
        #[arg(long, default_value = "")]
        until: String,
        /// Reset the connection after the first byte heard, instead of reading to the end
        #[arg(long)]
        reset: bool,
        /// Connect from this address (IP_FREEBIND: it need not be ours)
        #[arg(long)]
        from: Option<std::net::IpAddr>,
        #[arg(long, default_value_t = 10.0)]
        timeout: f64,
    },
    /// Talks with an echo server until the connection is lost; says "open" first, and how it ended
    Hold { to: String },
    /// Reads a little from a flood, then nothing until its input ends, then the rest
    Slow { to: String },
    /// A server with a manner
    Serve {
        manner: tcp::Manner,
        #[arg(long, default_value = "[::]:9000")]
        listen: SocketAddr,
    },
    /// The gRPC server
    GrpcServe {
        #[arg(long, default_value = "[::]:9090")]
        listen: SocketAddr,
    },
    /// One gRPC call with one answer
    GrpcUnary { to: String, text: String },
    /// One gRPC call with many answers: counts them
    GrpcStream { to: String, count: u32 },
    /// CONNECT through an HBONE tunnel made by hand
    Tunnel(tunnel::Args),
    /// Prints whose certificate is on standard input
    Identity,
    /// Something a pod must not be able to do; the exit status says whether it could
    Attack {
        #[command(subcommand)]
        what: attack::Attack,
    },
    /// Sends garbage and says how the connection ended
    Garbage {
        to: String,
        #[arg(long, default_value_t = 100_000)]
        bytes: usize,
    },
    /// Asks a resolver and shows every byte
    Dns(dns::Ask),
    /// A resolver with manners, by UDP and TCP; the question's name says which
    DnsServe {
        #[arg(long, default_value = "[::]:53")]
        listen: SocketAddr,
    },
    /// A trace collector that prints the spans it takes
    Collect { listen: SocketAddr },
    /// Prints a file, as `cat`, for places without programs
    Read { path: PathBuf },
}

fn main() -> ExitCode {
    let Err(error) = run(Cli::parse().mode) else { return ExitCode::SUCCESS };
    // Nobody is left to tell when standard error is closed.
    let _ = writeln!(std::io::stderr(), "meshprobe: {error:#}");
    ExitCode::FAILURE
}

fn run(mode: Mode) -> Result<()> {
    match mode {
        Mode::Pause => loop {
            std::thread::park();
        },
        Mode::Tap { interface, canary, most } => tap::run(&interface, &canary, seconds(most)),
        Mode::Hear { to } => tcp::hear(&to),
        Mode::End { to, send, until, reset, from, timeout } => {
            tcp::end(&tcp::End { to, send, until, reset, from, timeout: seconds(timeout) })
        }
        Mode::Hold { to } => tcp::hold(&to),
        Mode::Slow { to } => tcp::slow(&to),
        Mode::Serve { manner, listen } => tcp::serve(manner, listen),
        Mode::GrpcServe { listen } => grpc::serve(listen),
        Mode::GrpcUnary { to, text } => grpc::unary(&to, text),
        Mode::GrpcStream { to, count } => grpc::stream(&to, count),
        Mode::Tunnel(args) => tunnel::run(&args),
        Mode::Identity => tunnel::identity(),
        Mode::Attack { what } => attack::run(what),
        Mode::Garbage { to, bytes } => tcp::garbage(&to, bytes),
        Mode::Dns(args) => dns::ask(&args),
        Mode::DnsServe { listen } => dns::serve(listen),
        Mode::Collect { listen } => collect::run(listen),
        Mode::Read { path } => Ok(std::io::stdout().write_all(&std::fs::read(path)?)?),
    }
}

/// Prints a result.
fn say(value: &impl Serialize) -> Result<()> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, value)?;
    out.write_all(b"\n")?;
    Ok(out.flush()?)
}

fn seconds(seconds: f64) -> Duration {
    // Negative and absurd values become an hour: a probe must end.
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::from_secs(3600))
}
