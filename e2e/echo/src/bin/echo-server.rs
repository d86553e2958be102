//! `echo-server`: answers every request with what it was asked.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::Parser;
use echo::answer::Me;
use echo::serve::{App, Port, Server};
use echo::{life, tls};
use tokio::task::JoinSet;

/// What a server without any flag listens on, as the conformance suite's application does.
const HTTP_PORT: u16 = 8080;
const GRPC_PORT: u16 = 7070;
const LINES_PORT: u16 = 9090;

#[derive(Parser)]
#[command(
    version,
    about = "Answers with what it was asked: HTTP/1.1, HTTP/2, TLS, gRPC, and lines over TCP"
)]
struct Cli {
    /// A port for HTTP/1.1 and HTTP/2 without TLS; may be given more than once
    #[arg(long)]
    port: Vec<u16>,
    /// A port for gRPC (any HTTP port takes it, too)
    #[arg(long)]
    grpc: Vec<u16>,
    /// A port for lines over TCP: one is read and answered
    #[arg(long)]
    tcp: Vec<u16>,
    /// A port that speaks TLS
    #[arg(long)]
    tls: Vec<u16>,
    /// The certificate of the TLS ports
    #[arg(long, default_value = "/cert.crt")]
    crt: PathBuf,
    /// Its key
    #[arg(long, default_value = "/cert.key")]
    key: PathBuf,
    /// Shown in answers
    #[arg(long = "version-label", env = "SERVICE_VERSION", default_value = "")]
    label: String,
    /// Shown in answers
    #[arg(long, default_value = "")]
    cluster: String,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    life::run("echo-server", serve(cli))
}

async fn serve(mut cli: Cli) -> Result<()> {
    if cli.port.is_empty() && cli.tls.is_empty() {
        cli.port.push(HTTP_PORT);
    }
    if cli.grpc.is_empty() {
        cli.grpc.push(GRPC_PORT);
    }
    if cli.tcp.is_empty() {
        cli.tcp.push(LINES_PORT);
    }
    let config =
        if cli.tls.is_empty() { None } else { Some(tls::server(&cli.crt, &cli.key, None)?) };
    let hostname = nix::unistd::gethostname().context("asking for the host's name")?;
    let server = Server::new(App::Lines(Me {
        hostname: hostname.to_string_lossy().into_owned(),
        version: cli.label,
        cluster: cli.cluster,
    }));
    let mut tasks = JoinSet::new();
    let mut http: Vec<u16> = [cli.port, cli.grpc, cli.tls.clone()].concat();
    http.sort_unstable();
    http.dedup();
    echo::say(format_args!(
        "HTTP and gRPC on {http:?}, TLS on {:?}, lines on {:?}",
        cli.tls, cli.tcp
    ));
    for port in http {
        let how = Port { tls: config.clone().filter(|_| cli.tls.contains(&port)), only_h2: false };
        tasks.spawn(Arc::clone(&server).http(life::listen(port).await?, how));
    }
    for port in cli.tcp {
        tasks.spawn(Arc::clone(&server).lines(life::listen(port).await?));
    }
    life::until_told(&server, tasks).await
}
