//! `echo-basic`: answers every request with what it was asked, as JSON. Told by environment variables, as the conformance
//! suite's manifests for requests from outside do it.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Result, bail, ensure};
use clap::Parser;
use echo::basic::{Basic, Context};
use echo::serve::{App, Port, Server};
use echo::{life, tls};
use tokio::task::JoinSet;

#[derive(Parser)]
#[command(version, about = "Answers with what it was asked, as JSON: HTTP, HTTP/2, TLS, gRPC")]
struct Cli {
    /// HTTP/1.1, HTTP/2 and gRPC without TLS
    #[arg(long, env = "HTTP_PORT", default_value_t = 3000)]
    http_port: u16,
    /// Only HTTP/2, without TLS
    #[arg(long, env = "H2C_PORT", default_value_t = 3001)]
    h2c_port: u16,
    /// With TLS, if a certificate is given
    #[arg(long, env = "HTTPS_PORT", default_value_t = 8443)]
    https_port: u16,
    #[arg(long, env = "TLS_SERVER_CERT")]
    cert: Option<PathBuf>,
    #[arg(long, env = "TLS_SERVER_PRIVKEY")]
    key: Option<PathBuf>,
    /// The key's other name: the suite's gRPC manifests use it
    #[arg(long, env = "TLS_SERVER_PRIV_KEY", hide = true)]
    grpc_key: Option<PathBuf>,
    /// Verify clients' certificates by this authority; clients without one are served
    #[arg(long, env = "TLS_CLIENT_CACERTS")]
    client_ca: Option<PathBuf>,
    #[arg(long, env = "NAMESPACE", default_value = "")]
    namespace: String,
    #[arg(long, env = "INGRESS_NAME", default_value = "")]
    ingress: String,
    #[arg(long, env = "SERVICE_NAME", default_value = "")]
    service: String,
    #[arg(long, env = "POD_NAME", default_value = "")]
    pod: String,
    #[arg(long, env = "TCP_ECHO_SERVER", hide = true)]
    tcp: Option<String>,
    #[arg(long, env = "UDP_ECHO_SERVER", hide = true)]
    udp: Option<String>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    life::run("echo-basic", serve(cli))
}

async fn serve(cli: Cli) -> Result<()> {
    ensure!(cli.tcp.is_none() && cli.udp.is_none(), "this application has no TCP and no UDP mode");
    let tls = match (&cli.cert, cli.key.as_ref().or(cli.grpc_key.as_ref())) {
        (Some(cert), Some(key)) => Some(tls::server(cert, key, cli.client_ca.as_deref())?),
        (None, None) => None,
        _ => bail!("TLS_SERVER_CERT and TLS_SERVER_PRIVKEY must both be given, or neither"),
    };
    let context = Context {
        namespace: cli.namespace,
        ingress: cli.ingress,
        service: cli.service,
        pod: cli.pod,
    };
    let server = Server::new(App::Basic(Basic::new(context, cli.http_port.to_string())));
    let mut ports =
        vec![(cli.http_port, Port::default()), (cli.h2c_port, Port { tls: None, only_h2: true })];
    if tls.is_some() {
        ports.push((cli.https_port, Port { tls, only_h2: false }));
    }
    let mut listeners = JoinSet::new();
    for (port, how) in ports {
        echo::say(format_args!("listening on port {port}"));
        listeners.spawn(Arc::clone(&server).http(life::listen(port).await?, how));
    }
    life::until_told(&server, listeners).await
}
