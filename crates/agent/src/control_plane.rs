//! What a proxy knows of its control plane, and of itself, before it has heard anything.
//!
//! Two ways to log in: with the proxy's own certificate, got for a one-time token (istiod-lite), or with a service
//! account's token in every call (Istio). Files are read anew each time, because both kinds are replaced while we run.
//!
//! Invariant: no token and no key is ever in a `Debug` text or an error.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use model::{Identity, Str};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tonic::metadata::{AsciiMetadataKey, AsciiMetadataValue, MetadataMap};
use xds::Kind;

use crate::channel::ChannelError;

/// The service account of every node proxy under istiod-lite.
const PROXY_NAMESPACE: &str = "istio-system";
const PROXY_ACCOUNT: &str = "ztunnel";
/// Lifetime we ask for, as Istio's proxies do. The CA may give less.
pub const CERTIFICATE_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// A projected token has some 1.5 KiB; what is longer than this is not one.
const MAX_TOKEN: usize = 64 * 1024;

/// Everything about the control plane that is configured.
#[derive(Clone)]
pub struct ControlPlane {
    /// Serves configuration.
    pub xds: Server,
    /// Signs certificates; often the same.
    pub ca: Server,
    pub login: Login,
    /// What to ask of it, in this order: [`Kind::OF_NODE`], [`Kind::OF_WAYPOINT`] or [`Kind::OF_ISTIO`].
    pub kinds: &'static [Kind],
    pub anchors: Anchors,
    pub proxy: Proxy,
    pub cluster: Str,
    pub network: Str,
    pub trust_domain: Str,
    /// What the CA is asked for.
    pub certificate_lifetime: Duration,
    /// Folder for the last good configuration.
    pub state_dir: PathBuf,
    /// Folder for keys and certificates, on tmpfs.
    pub secret_dir: PathBuf,
}

/// A server of the control plane.
#[derive(Clone, Debug)]
pub struct Server {
    /// `https://HOST:PORT`.
    pub address: String,
    /// The name that its certificate must carry.
    pub name: String,
    /// Who signs its certificate.
    pub root: RootCert,
    /// Sent along with every call.
    pub headers: Vec<(AsciiMetadataKey, AsciiMetadataValue)>,
}

/// Root certificates in PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RootCert {
    File(PathBuf),
    /// The text itself.
    Pem(String),
}

/// How the proxy shows who it is.
#[derive(Clone)]
pub enum Login {
    /// By its own certificate; for the first one, by a one-time token.
    Certificate { bootstrap_token: Option<String> },
    /// By a token in each call, and by no certificate.
    Token(Token),
}

/// A bearer token.
#[derive(Clone, PartialEq, Eq)]
pub enum Token {
    /// Replaced under our feet before it expires.
    File(PathBuf),
    /// The token itself.
    Fixed(String),
}

impl std::fmt::Debug for Login {
    /// Never the token.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Certificate { .. } => f.write_str("Certificate"),
            Self::Token(token) => f.debug_tuple("Token").field(token).finish(),
        }
    }
}

/// Whom workloads believe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Anchors {
    /// The root file, and what came with the certificate.
    RootFile,
    /// Only the roots that the CA sent with the certificate: the root file is about the control plane's own port, which
    /// another authority may have signed.
    CaAnswer,
}

/// The proxy itself, in the words of Kubernetes.
#[derive(Clone, Debug)]
pub struct Proxy {
    pub node: String,
    pub pod: String,
    pub namespace: String,
    pub service_account: String,
    pub ip: Option<IpAddr>,
    /// More about it for the control plane.
    pub metadata: BTreeMap<String, String>,
}

impl Proxy {
    /// A node's proxy as istiod-lite knows it.
    pub fn of_node(node: &str) -> Self {
        Self {
            node: node.to_owned(),
            pod: format!("ztunnel-{node}"),
            namespace: PROXY_NAMESPACE.to_owned(),
            service_account: PROXY_ACCOUNT.to_owned(),
            ip: None,
            metadata: BTreeMap::new(),
        }
    }
}

impl ControlPlane {
    /// The identity under which this proxy speaks to the control plane, if it needs a certificate for that.
    pub fn own_identity(&self) -> Option<Identity> {
        match self.login {
            Login::Certificate { .. } => Some(Identity::new(
                self.trust_domain.clone(),
                self.proxy.namespace.as_str(),
                self.proxy.service_account.as_str(),
            )),
            Login::Token(_) => None,
        }
    }

    /// The roots of the CA's file, in which a change means that certificates should be renewed.
    pub fn roots(&self) -> Result<Vec<CertificateDer<'static>>, ChannelError> {
        self.ca.root.read()
    }

    /// Of those roots, the ones that workloads believe beside what came with their certificate.
    pub fn anchors<'a>(
        &self,
        roots: &'a [CertificateDer<'static>],
    ) -> &'a [CertificateDer<'static>] {
        match self.anchors {
            Anchors::RootFile => roots,
            Anchors::CaAnswer => &[],
        }
    }

    /// Puts what every call carries into its metadata: the token of this moment, and the configured headers.
    pub fn sign_in(&self, server: &Server, metadata: &mut MetadataMap) -> Result<(), ChannelError> {
        if let Login::Token(token) = &self.login {
            metadata.insert("authorization", token.bearer()?);
            let cluster = AsciiMetadataValue::try_from(&*self.cluster).map_err(|_| {
                ChannelError::Own(format!("{:?} cannot be a cluster's name", self.cluster))
            })?;
            metadata.insert("clusterid", cluster);
        }
        for (name, value) in &server.headers {
            metadata.insert(name.clone(), value.clone());
        }
        Ok(())
    }
}

impl RootCert {
    /// The certificates, read anew each time: the file may be replaced while we run.
    pub fn read(&self) -> Result<Vec<CertificateDer<'static>>, ChannelError> {
        let bad = |problem: String| ChannelError::Root { from: self.to_string(), problem };
        let pem = match self {
            Self::File(path) => std::fs::read(path).map_err(|e| bad(e.to_string()))?,
            Self::Pem(text) => text.clone().into_bytes(),
        };
        let roots: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
        let roots = roots.map_err(|e| bad(e.to_string()))?;
        if roots.is_empty() {
            return Err(bad("no certificate in it".to_owned()));
        }
        Ok(roots)
    }
}

impl std::fmt::Display for RootCert {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Pem(_) => f.write_str("the configured text"),
        }
    }
}

impl Token {
    /// The value of an `authorization` header.
    fn bearer(&self) -> Result<AsciiMetadataValue, ChannelError> {
        let bad = |problem: String| ChannelError::Token { from: self.to_string(), problem };
        let text = match self {
            Self::File(path) => read_token(path).map_err(|e| bad(e.to_string()))?,
            Self::Fixed(text) => text.clone(),
        };
        let text = text.trim();
        if text.is_empty() {
            return Err(bad("it is empty".to_owned()));
        }
        if text.len() > MAX_TOKEN {
            return Err(bad(format!("it has more than {MAX_TOKEN} bytes")));
        }
        let mut value = AsciiMetadataValue::try_from(format!("Bearer {text}")).map_err(|_| {
            bad("it is not a token: it holds characters that are not printable".to_owned())
        })?;
        value.set_sensitive(true);
        Ok(value)
    }
}

fn read_token(path: &Path) -> std::io::Result<String> {
    use std::io::Read as _;
    let mut text = String::new();
    let limit = u64::try_from(MAX_TOKEN).unwrap_or(u64::MAX) + 1;
    std::fs::File::open(path)?.take(limit).read_to_string(&mut text)?;
    Ok(text)
}

impl std::fmt::Display for Token {
    /// Where it is from, never the token.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Fixed(_) => f.write_str("the configured text"),
        }
    }
}

impl std::fmt::Debug for Token {
    /// As displayed.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

impl std::fmt::Debug for ControlPlane {
    /// Never the token.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ControlPlane")
            .field("xds", &self.xds.address)
            .field("ca", &self.ca.address)
            .field("proxy", &self.proxy)
            .field("trust_domain", &self.trust_domain)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_read_anew_and_named_when_they_are_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("istio-token");
        let token = Token::File(path.clone());
        let missing = token.bearer().unwrap_err().to_string();
        assert!(missing.contains("istio-token") && missing.contains("No such file"), "{missing}");
        for text in ["first", "second\n"] {
            std::fs::write(&path, text).unwrap();
            let value = token.bearer().unwrap();
            assert_eq!(value.to_str().unwrap(), format!("Bearer {}", text.trim()));
            assert!(!format!("{value:?}").contains(text.trim()), "a token is not for logs");
        }
        for (bytes, want) in [
            (b" \n".to_vec(), "empty"),
            (b"a\x01b".to_vec(), "not printable"),
            (vec![b'a'; MAX_TOKEN + 1], "more than"),
            (vec![0xff], "UTF-8"),
        ] {
            std::fs::write(&path, bytes).unwrap();
            let error = token.bearer().unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
    }
}
