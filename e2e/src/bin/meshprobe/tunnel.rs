//! An HBONE client made by hand, with credentials from standard input: what a proxy does, and what it must not get away
//! with.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use hbone::{ConnectHeaders, Credentials, Tunnel, TunnelError};
use http::HeaderValue;
use model::Identity;
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::json;
use tokio::net::TcpStream;

use crate::say;

/// For each step.
const PATIENCE: Duration = Duration::from_secs(10);

/// Standard input holds PEM: certificates (leaf first, root last) and, unless `--foreign`, the key.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The proxy: IP:15008
    to: SocketAddr,
    /// What it shall connect to
    target: SocketAddr,
    /// Who should be there
    #[arg(long)]
    expect: Identity,
    /// Do not use the key of standard input but a certificate for this identity from a CA of our own
    #[arg(long)]
    foreign: Option<Identity>,
    /// Text to send; the answer is read to its end
    #[arg(long, default_value = "")]
    send: String,
    /// Size of a header nobody needs
    #[arg(long, default_value_t = 0)]
    header: usize,
}

#[tokio::main(flavor = "current_thread")]
pub(crate) async fn run(args: &Args) -> Result<()> {
    let credentials = credentials(args.foreign.as_ref())?;
    let result = match tokio::time::timeout(PATIENCE, call(args, &credentials)).await {
        Ok(Ok(heard)) => json!({ "connected": true, "heard": heard }),
        Ok(Err(TunnelError::Refused { status, reason })) => {
            json!({ "connected": false, "status": status, "reason": reason })
        }
        Ok(Err(e)) => json!({ "connected": false, "error": e.to_string() }),
        Err(_) => json!({ "connected": false, "error": format!("no answer in {PATIENCE:?}") }),
    };
    say(&result)
}

/// Prints the SPIFFE name in the first certificate of standard input.
pub(crate) fn identity() -> Result<()> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text)?;
    let leaf =
        CertificateDer::from_pem_slice(text.as_bytes()).context("certificate on standard input")?;
    let identity = hbone::peer_identity(&leaf).map_err(anyhow::Error::msg)?;
    Ok(writeln!(std::io::stdout(), "{identity}")?)
}

async fn call(args: &Args, credentials: &Credentials) -> Result<String, TunnelError> {
    let connect = |source| TunnelError::Connect { to: args.to, source };
    let tcp = TcpStream::connect(args.to).await.map_err(connect)?;
    let dialed = Tunnel::handshake(tcp, credentials, std::slice::from_ref(&args.expect)).await?;
    tokio::spawn(dialed.driver);
    let mut headers = ConnectHeaders::default();
    if args.header > 0 {
        headers.baggage = HeaderValue::from_bytes(&vec![b'h'; args.header]).ok();
    }
    let stream = dialed.tunnel.open(args.target, &headers).await?;
    let (mut send, mut receive, _counted) = stream.split();
    send.send_data(Bytes::from(args.send.clone()), true)?;
    let mut heard = vec![];
    while let Some(chunk) = receive.data().await {
        let chunk = chunk?;
        receive.flow_control().release_capacity(chunk.len())?;
        heard.extend_from_slice(&chunk);
    }
    Ok(String::from_utf8_lossy(&heard).into_owned())
}

fn credentials(foreign: Option<&Identity>) -> Result<Credentials> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text)?;
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    let mut chain = chain.context("certificates on standard input")?;
    let root = chain.pop().context("no certificate on standard input")?;
    let Some(identity) = foreign else {
        let leaf = chain.first().context("only one certificate on standard input")?;
        let identity = hbone::peer_identity(leaf).map_err(anyhow::Error::msg)?;
        let key =
            PrivateKeyDer::from_pem_slice(text.as_bytes()).context("key on standard input")?;
        return Ok(Credentials::new(identity, chain, key, vec![root])?);
    };
    let (leaf, key) = forge(identity)?;
    Ok(Credentials::new(identity.clone(), vec![leaf], key, vec![root])?)
}

/// A certificate for the identity that would be good if its root were the mesh's.
fn forge(identity: &Identity) -> Result<(CertificateDer<'static>, PrivateKeyDer<'static>)> {
    let mut ca = CertificateParams::new(vec![])?;
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let issuer = Issuer::new(ca, KeyPair::generate()?);
    let mut params = CertificateParams::new(vec![])?;
    params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
    let key = KeyPair::generate()?;
    let leaf = params.signed_by(&key, &issuer)?.der().clone();
    let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?;
    Ok((leaf, key))
}
