//! A server's life: it listens, it runs until it is told to end, it lets answers under way finish.

use std::net::{Ipv6Addr, SocketAddr};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;

use crate::serve::Server;

/// Runs a program to its end; an error goes to whoever looks at the log.
pub fn run(name: &str, program: impl Future<Output = Result<()>>) -> ExitCode {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    match runtime.map_err(Into::into).and_then(|runtime| runtime.block_on(program)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            crate::say(format_args!("{name}: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Returns when a signal has come and nothing is being answered, or when a listener has failed.
pub async fn until_told(server: &Server, mut listeners: JoinSet<Result<()>>) -> Result<()> {
    // As the first process of a pod it gets no default handling of signals.
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        ended = listeners.join_next() => match ended {
            Some(ended) => return ended?,
            None => bail!("there is nothing to listen on"),
        },
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
    listeners.abort_all();
    server.drain().await;
    Ok(())
}

/// On both address families where the machine has them.
pub async fn listen(port: u16) -> Result<TcpListener> {
    match TcpListener::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))).await {
        Ok(listener) => Ok(listener),
        Err(_) => TcpListener::bind(("0.0.0.0", port))
            .await
            .with_context(|| format!("listening on port {port}")),
    }
}
