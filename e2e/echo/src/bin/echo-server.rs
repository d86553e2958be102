//! `echo-server`: answers every request with what it was asked.

use std::net::{Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::Parser;
use echo::answer::Me;
use echo::serve::Server;
use echo::tls;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
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
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let done =
        runtime.map_err(Into::into).and_then(|runtime| runtime.block_on(serve(Cli::parse())));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            echo::say(format_args!("echo-server: {error:#}"));
            ExitCode::FAILURE
        }
    }
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
    let config = if cli.tls.is_empty() { None } else { Some(tls::server(&cli.crt, &cli.key)?) };
    let hostname = nix::unistd::gethostname().context("asking for the host's name")?;
    let server = Server::new(Me {
        hostname: hostname.to_string_lossy().into_owned(),
        version: cli.label,
        cluster: cli.cluster,
    });
    let mut tasks = JoinSet::new();
    let mut http: Vec<u16> = [cli.port, cli.grpc, cli.tls.clone()].concat();
    http.sort_unstable();
    http.dedup();
    echo::say(format_args!(
        "HTTP and gRPC on {http:?}, TLS on {:?}, lines on {:?}",
        cli.tls, cli.tcp
    ));
    for port in http {
        let tls = config.clone().filter(|_| cli.tls.contains(&port));
        tasks.spawn(Arc::clone(&server).http(listen(port).await?, tls));
    }
    for port in cli.tcp {
        tasks.spawn(Arc::clone(&server).lines(listen(port).await?));
    }
    // As the first process of a pod it gets no default handling of signals.
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        ended = tasks.join_next() => match ended {
            Some(ended) => ended?,
            None => bail!("there is nothing to listen on"),
        },
        _ = term.recv() => finish(&server, tasks).await,
        _ = int.recv() => finish(&server, tasks).await,
    }
}

async fn finish(server: &Server, mut listeners: JoinSet<Result<()>>) -> Result<()> {
    listeners.abort_all();
    server.drain().await;
    Ok(())
}

/// On both address families where the machine has them.
async fn listen(port: u16) -> Result<TcpListener> {
    let both = TcpListener::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))).await;
    match both {
        Ok(listener) => Ok(listener),
        Err(_) => TcpListener::bind(("0.0.0.0", port))
            .await
            .with_context(|| format!("listening on port {port}")),
    }
}
