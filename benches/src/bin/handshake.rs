//! What one new tunnel costs: mTLS and HTTP/2 set-up, CPU of both ends together, over loopback.
//!
//! Both ends run in this one thread, with certificates as our control plane issues them: P-256, leaf,
//! intermediate, root. What a bare TCP connection costs in the same way is measured, too, and taken off.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use hbone::{ConnectHeaders, Credentials, ServerTunnel, Tunnel};
use meshload::lines;
use model::Identity;
use nix::time::{ClockId, clock_gettime};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType,
};
use rustls_pki_types::PrivateKeyDer;
use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{LocalSet, spawn_local};

/// Tunnels of one measurement; about two seconds.
const TUNNELS: u32 = 2_000;
const ROUNDS: usize = 5;

fn main() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(LocalSet::new().run_until(measure()))
}

async fn measure() -> Result<()> {
    let credentials = credentials()?;
    let tunnels = Rc::new(Listening::new(credentials.clone()).await?);
    for at_a_time in [1, 16] {
        let mut net = Vec::new();
        for _ in 0..ROUNDS {
            let bare = cpu_of(at_a_time, || connect(tunnels.tcp)).await?;
            let full =
                cpu_of(at_a_time, || dial(tunnels.hbone, tunnels.credentials.clone())).await?;
            net.push((full.saturating_sub(bare) / TUNNELS).as_secs_f64() * 1e3);
        }
        net.sort_by(f64::total_cmp);
        lines::line(&json!({
            "event": "result", "at_a_time": at_a_time, "tunnels": TUNNELS, "rounds": ROUNDS,
            "cpu_ms_median": net[ROUNDS / 2], "cpu_ms_min": net[0], "cpu_ms_max": net[ROUNDS - 1],
        }))?;
    }
    Ok(())
}

/// CPU time of this process while `TUNNELS` are made and closed, `at_a_time` at once.
async fn cpu_of<F: Future<Output = Result<()>> + 'static>(
    at_a_time: u32,
    one: impl Fn() -> F,
) -> Result<Duration> {
    let before = clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)?;
    for _ in 0..TUNNELS / at_a_time {
        let running: Vec<_> = (0..at_a_time).map(|_| spawn_local(one())).collect();
        for task in running {
            task.await??;
        }
    }
    let after = clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)?;
    Ok(Duration::from(after).saturating_sub(before.into()))
}

/// Dials, has one CONNECT accepted, and closes.
async fn dial(to: SocketAddr, credentials: Arc<Credentials>) -> Result<()> {
    let tcp = TcpStream::connect(to).await?;
    tcp.set_nodelay(true)?;
    let dialed = Tunnel::handshake(tcp, &credentials, &[identity()]).await?;
    let driver = spawn_local(dialed.driver);
    dialed.tunnel.open(to, &ConnectHeaders::default()).await?;
    drop(dialed.tunnel);
    // Ends when its last handle is gone.
    driver.await?.context("the tunnel broke")
}

async fn connect(to: SocketAddr) -> Result<()> {
    let mut tcp = TcpStream::connect(to).await?;
    tcp.set_nodelay(true)?;
    tcp.read_u8().await?;
    Ok(())
}

struct Listening {
    hbone: SocketAddr,
    tcp: SocketAddr,
    credentials: Arc<Credentials>,
}

impl Listening {
    async fn new(credentials: Arc<Credentials>) -> Result<Self> {
        let (hbone, tcp) =
            (TcpListener::bind("127.0.0.1:0").await?, TcpListener::bind("127.0.0.1:0").await?);
        let listening = Self {
            hbone: hbone.local_addr()?,
            tcp: tcp.local_addr()?,
            credentials: credentials.clone(),
        };
        spawn_local(async move {
            while let Ok((socket, _)) = hbone.accept().await {
                spawn_local(serve(socket, credentials.clone()));
            }
        });
        spawn_local(async move {
            while let Ok((socket, _)) = tcp.accept().await {
                // The client's read ends: both have been seen by the other.
                let _ = socket.try_write(b"x");
            }
        });
        Ok(listening)
    }
}

async fn serve(socket: TcpStream, credentials: Arc<Credentials>) -> Result<()> {
    socket.set_nodelay(true)?;
    let mut tunnel = ServerTunnel::accept(socket, credentials.server_config()).await?;
    while let Some(incoming) = tunnel.next().await {
        // Both directions of the stream end here: its bytes are not what is measured.
        drop(incoming?.accept(None)?);
    }
    Ok(())
}

fn identity() -> Identity {
    Identity::new("cluster.local", "bench", "bench")
}

fn credentials() -> Result<Arc<Credentials>> {
    let ca = || -> Result<CertificateParams> {
        let mut params = CertificateParams::new(vec![])?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Ok(params)
    };
    let (root_key, middle_key, leaf_key) =
        (KeyPair::generate()?, KeyPair::generate()?, KeyPair::generate()?);
    let root = ca()?.self_signed(&root_key)?;
    let root_issuer = Issuer::new(ca()?, root_key);
    let middle = ca()?.signed_by(&middle_key, &root_issuer)?;
    let middle_issuer = Issuer::new(ca()?, middle_key);
    let mut params = CertificateParams::new(vec![])?;
    params.subject_alt_names = vec![SanType::URI(identity().to_string().try_into()?)];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
    let leaf = params.signed_by(&leaf_key, &middle_issuer)?;
    let key = PrivateKeyDer::try_from(leaf_key.serialize_der()).map_err(anyhow::Error::msg)?;
    let chain = vec![leaf.der().clone(), middle.der().clone()];
    Ok(Arc::new(Credentials::new(identity(), chain, key, vec![root.der().clone()])?))
}
