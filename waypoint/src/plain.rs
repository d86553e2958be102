//! Requests that come without a tunnel: plain TCP that counts as a call of one address by one client, from there on through
//! the same code. For benchmarks against proxies that have no HBONE; the program `waypoint` has no way in here.
//!
//! Invariant: who may call what is asked of the engine all the same, for the identity that the caller of this module names.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use agent::metrics::Flushed;
use hbone::Authority;
use model::{Identity, Refusal};
use tokio::net::{TcpListener, TcpStream};

use crate::call::Call;
use crate::io::PeerIo;
use crate::proxy;
use crate::record::Record;
use crate::worker::{Worker, listen_at};

/// As the tunnels' workers do it.
const SWEEP: Duration = Duration::from_secs(15);
/// Pause after `accept` failed for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);

/// What a connection without a tunnel counts as.
#[derive(Clone, Debug)]
pub struct Entry {
    pub client: Arc<Identity>,
    /// What its CONNECT would have said.
    pub to: SocketAddr,
}

/// Starts a thread for each worker, with a listener of its own, for HTTP/1.1. The address where they listen.
///
/// # Errors
/// When the address is taken or not ours, or there is no thread to be had.
pub fn start_workers(
    mut at: SocketAddr,
    workers: Vec<Arc<Worker>>,
    entry: &Entry,
) -> io::Result<SocketAddr> {
    for (index, worker) in workers.into_iter().enumerate() {
        let (listener, entry) = (listen_at(at)?, entry.clone());
        // The first may have been given any port; the others share it.
        at = listener.local_addr()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::Builder::new()
            .name(format!("worker-{index}"))
            .spawn(move || runtime.block_on(run(worker, listener, entry)))?;
    }
    Ok(at)
}

async fn run(worker: Arc<Worker>, listener: std::net::TcpListener, entry: Entry) {
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(e) => return tracing::error!("a worker cannot use its listener: {e}"),
    };
    let mut sweep = tokio::time::interval(SWEEP);
    let mut count = tokio::time::interval(Flushed::EVERY);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = count.tick() => { worker.connections.flush_metrics(); continue }
            _ = sweep.tick() => {
                worker.tunnels.sweep(Instant::now());
                worker.upstreams.sweep(Instant::now());
                continue;
            }
        };
        match accepted {
            Ok((tcp, source)) => {
                tokio::spawn(serve(worker.clone(), tcp, source, entry.clone()));
            }
            Err(e) => {
                tracing::warn!(error = %e, "accept failed; raise the open files limit?");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve(worker: Arc<Worker>, tcp: TcpStream, source: SocketAddr, entry: Entry) {
    // Small writes are whole messages already.
    let _ = tcp.set_nodelay(true);
    match admitted(&worker, source, &entry).await {
        Ok(call) => proxy::serve(call, PeerIo::Tcp(tcp), false).await,
        Err(refusal) => {
            worker.recorder.write(Record::early(source, Some(entry.client), refusal));
        }
    }
}

async fn admitted(
    worker: &Arc<Worker>,
    source: SocketAddr,
    entry: &Entry,
) -> Result<Call, Refusal> {
    let to = Authority::Address(entry.to);
    Call::admit(worker.clone(), entry.client.clone(), source, to, None).await
}
