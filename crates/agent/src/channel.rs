//! How a proxy reaches its control plane: TLS to one name, verified with the mesh's root, and with the
//! proxy's own certificate once it has one.
//!
//! Errors are for the person who has to repair it: they say whether it is the address, the network, the
//! root, a certificate or a clock.

use std::error::Error;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hbone::clock;
pub use hbone::clock::span;
use hyper_util::rt::TokioIo;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{AlertDescription, CertificateError, ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::codegen::Service;
use tonic::codegen::http::Uri;
use tonic::transport::{Channel, Endpoint};

use crate::control_plane::Server;

/// TCP and TLS together. A control plane that is overloaded answers later than one that is down refuses.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A control plane that vanished without a word is noticed after one interval and one timeout.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Flow-control windows: a whole mesh comes in one response.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;
/// The certificate with which this proxy shows itself.
pub struct ClientCertificate {
    pub chain: Vec<CertificateDer<'static>>,
    pub key: PrivateKeyDer<'static>,
    pub serial: String,
}

impl std::fmt::Debug for ClientCertificate {
    /// Never the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClientCertificate").field("serial", &self.serial).finish_non_exhaustive()
    }
}

/// Why there is no connection to the control plane. All of them are worth another try later.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ChannelError {
    #[error("{address:?} is not the address of a control plane: https://HOST:PORT is expected")]
    Address { address: String },
    #[error("the root certificates of the control plane ({from}): {problem}")]
    Root { from: String, problem: String },
    #[error("the proxy's token ({from}): {problem}")]
    Token { from: String, problem: String },
    #[error("the proxy's own certificate cannot be used: {0}")]
    Own(String),
    #[error("cannot connect to {address}: {problem}")]
    Connect { address: String, problem: String },
    #[error("TLS with {address}: {problem}")]
    Tls { address: String, problem: String },
}

/// Connects, and says at once when that is not possible.
pub async fn connect(
    server: &Server,
    own: Option<&ClientCertificate>,
) -> Result<Channel, ChannelError> {
    let connector = Connector::new(server, own)?;
    let address = server.address.clone();
    let bad_address = |_| ChannelError::Address { address: address.clone() };
    // TLS is the connector's affair, so to tonic this looks plain; the server sees what it should see.
    let origin = format!("https://{}:{}", server.name, connector.port);
    let endpoint = Endpoint::from_shared(address.replacen("https://", "http://", 1))
        .map_err(bad_address)?
        .origin(origin.parse().map_err(|_| ChannelError::Address { address: origin })?)
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW);
    endpoint.connect_with_connector(connector).await.map_err(|e| {
        // Our own words if they are in there, else the last word of the chain.
        find::<ChannelError>(&e).cloned().unwrap_or_else(|| ChannelError::Connect {
            address: server.address.clone(),
            problem: explain(&e),
        })
    })
}

/// What is wrong, from an error and its sources.
pub fn explain(error: &(dyn Error + 'static)) -> String {
    if let Some(ours) = find::<ChannelError>(error) {
        return ours.to_string();
    }
    if let Some(tls) = find::<rustls::Error>(error) {
        return explain_tls(tls);
    }
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    match find::<tonic::Status>(error) {
        Some(status) if last.downcast_ref::<tonic::Status>().is_some() => {
            format!("{}: {}", status.code(), status.message())
        }
        // HTTP/2 keeps only the words of an error below it.
        _ => match last.to_string() {
            words if words.contains("alert: CertificateExpired") => {
                not_accepted("CertificateExpired")
            }
            words => words,
        },
    }
}

/// What a failed handshake means, clocks included.
pub fn explain_tls(error: &rustls::Error) -> String {
    match error {
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "the certificate is not signed by a root \
            of this mesh: the proxy has the root of another control plane"
                .to_owned()
        }
        rustls::Error::InvalidCertificate(reason) => {
            clock::explain_certificate(reason).unwrap_or_else(|| error.to_string())
        }
        rustls::Error::AlertReceived(
            alert @ (AlertDescription::CertificateExpired
            | AlertDescription::BadCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateRequired
            | AlertDescription::AccessDenied
            | AlertDescription::UnknownCA),
        ) => not_accepted(&format!("{alert:?}")),
        other => other.to_string(),
    }
}

fn not_accepted(alert: &str) -> String {
    format!(
        "the other side does not accept this proxy's certificate ({alert}): compare the clocks of \
         both, and their roots"
    )
}

/// The first error of a type in a chain of sources. IO errors carry theirs inside.
fn find<'a, T: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a T> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<T>() {
            return Some(found);
        }
        let inner = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        if let Some(inner) = inner
            && let Some(found) = find::<T>(inner)
        {
            return Some(found);
        }
        next = error.source();
    }
    None
}

/// TCP and TLS to the control plane.
#[derive(Clone)]
struct Connector {
    address: String,
    host: String,
    port: u16,
    name: ServerName<'static>,
    tls: TlsConnector,
}

impl Connector {
    fn new(server: &Server, own: Option<&ClientCertificate>) -> Result<Self, ChannelError> {
        let bad = || ChannelError::Address { address: server.address.clone() };
        let uri: Uri = server.address.parse().map_err(|_| bad())?;
        if uri.scheme_str() != Some("https") {
            return Err(bad());
        }
        let host = uri.host().ok_or_else(bad)?.trim_matches(['[', ']']).to_owned();
        let port = uri.port_u16().ok_or_else(bad)?;
        let name = ServerName::try_from(server.name.clone())
            .map_err(|_| ChannelError::Address { address: server.name.clone() })?;
        let tls = TlsConnector::from(Arc::new(tls_config(server, own)?));
        Ok(Self { address: server.address.clone(), host, port, name, tls })
    }

    async fn connect(self) -> Result<TokioIo<TlsStream<TcpStream>>, ChannelError> {
        let Self { address, host, port, name, tls } = self;
        let io = |e: std::io::Error| ChannelError::Connect {
            address: address.clone(),
            problem: e.to_string(),
        };
        let tcp = TcpStream::connect((host.as_str(), port)).await.map_err(io)?;
        // Acknowledgements are small and should not wait for company.
        tcp.set_nodelay(true).map_err(io)?;
        let stream = tls
            .connect(name, tcp)
            .await
            .map_err(|e| ChannelError::Tls { address: address.clone(), problem: explain(&e) })?;
        Ok(TokioIo::new(stream))
    }
}

impl Service<Uri> for Connector {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = ChannelError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, ChannelError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), ChannelError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        Box::pin(self.clone().connect())
    }
}

fn tls_config(
    server: &Server,
    own: Option<&ClientCertificate>,
) -> Result<ClientConfig, ChannelError> {
    let mut roots = RootCertStore::empty();
    for root in server.root.read()? {
        roots.add(root).map_err(|e| ChannelError::Root {
            from: server.root.to_string(),
            problem: e.to_string(),
        })?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| ChannelError::Own(e.to_string()))?
        .with_root_certificates(roots);
    let mut config = match own {
        Some(own) => builder
            .with_client_auth_cert(own.chain.clone(), own.key.clone_key())
            .map_err(|e| ChannelError::Own(e.to_string()))?,
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

#[cfg(test)]
mod tests {
    use rustls::pki_types::UnixTime;

    use super::*;
    use crate::control_plane::RootCert;

    #[test]
    fn clocks_are_named() {
        let time = |s| UnixTime::since_unix_epoch(Duration::from_secs(s));
        let check = |error: CertificateError, want: &str| {
            let io = std::io::Error::other(rustls::Error::InvalidCertificate(error));
            let words = explain(&io);
            assert!(words.contains(want), "{words}");
        };
        check(
            CertificateError::NotValidYetContext {
                time: time(1000),
                not_before: time(1000 + 12_000),
            },
            "clock is at least 3 h 20 min behind",
        );
        check(
            CertificateError::ExpiredContext { time: time(1090), not_after: time(1000) },
            "expired 1 min ago",
        );
        check(CertificateError::UnknownIssuer, "root");
        let alert = rustls::Error::AlertReceived(AlertDescription::CertificateExpired);
        assert!(explain(&alert).contains("compare the clocks"));
        let words = std::io::Error::other("received fatal alert: CertificateExpired");
        assert!(explain(&words).contains("compare the clocks"));
    }

    #[tokio::test]
    async fn what_is_wrong_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let root_cert = dir.path().join("root.pem");
        let mut server = Server {
            address: "istiod:15012".into(),
            name: "istiod.istio-system.svc".into(),
            root: RootCert::File(root_cert.clone()),
            headers: Vec::new(),
        };
        let error = async |server: &Server| connect(server, None).await.unwrap_err().to_string();
        assert!(error(&server).await.contains("https://HOST:PORT"));
        server.address = "http://127.0.0.1:1".into();
        assert!(error(&server).await.contains("https://HOST:PORT"));
        server.address = "https://127.0.0.1:1".into();
        assert!(error(&server).await.contains("root.pem"), "{}", error(&server).await);
        std::fs::write(&root_cert, "nothing").unwrap();
        assert!(error(&server).await.contains("no certificate in it"));
        let key = rcgen::KeyPair::generate().unwrap();
        let root = rcgen::CertificateParams::default().self_signed(&key).unwrap();
        std::fs::write(&root_cert, root.pem()).unwrap();
        assert!(error(&server).await.contains("refused"), "{}", error(&server).await);
    }
}
