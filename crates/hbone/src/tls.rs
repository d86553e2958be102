//! SPIFFE mutual TLS: credentials in, rustls configurations out.
//!
//! Both directions demand a certificate from the peer, verify its chain against the mesh roots and take
//! the identity from its one URI SAN. TLS 1.3 only, AES-GCM only, ALPN `h2`, no SNI, no resumption, as
//! Istio's ztunnel does it. Names in certificates other than the SPIFFE URI mean nothing here.

use std::fmt;
use std::sync::Arc;

use model::Identity;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs};
use rustls::server::ParsedCertificate;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, OtherError,
    RootCertStore, ServerConfig, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use thiserror::Error;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

const ALPN: &[u8] = b"h2";

/// A workload's certificate, ready to be used as client and as server.
pub struct Credentials {
    identity: Identity,
    not_before: u64,
    not_after: u64,
    serial: String,
    certified: Arc<CertifiedKey>,
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
    server: Arc<ServerConfig>,
}

/// Why a certificate and key cannot be used.
#[derive(Debug, Error)]
pub enum CredentialsError {
    #[error("the certificate chain is empty")]
    Empty,
    #[error("the certificate names {found}, wanted {wanted}")]
    WrongIdentity { found: String, wanted: Identity },
    #[error("the certificate cannot be parsed: {0}")]
    Parse(String),
    #[error("the certificate and key cannot be used: {0}")]
    Tls(#[from] rustls::Error),
    #[error("no usable root certificate: {0}")]
    Roots(String),
}

impl Credentials {
    /// `chain` is leaf first; `roots` are the mesh roots. Does not check validity times: a clock that
    /// is off must show as a handshake error with words, not as missing credentials.
    pub fn new(
        identity: Identity,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        roots: Vec<CertificateDer<'static>>,
    ) -> Result<Self, CredentialsError> {
        let leaf = chain.first().ok_or(CredentialsError::Empty)?;
        let (_, parsed) =
            X509Certificate::from_der(leaf).map_err(|e| CredentialsError::Parse(e.to_string()))?;
        let found = peer_identity(leaf).map_err(CredentialsError::Parse)?;
        if found != identity {
            return Err(CredentialsError::WrongIdentity {
                found: found.to_string(),
                wanted: identity,
            });
        }
        let seconds = |t: x509_parser::time::ASN1Time| u64::try_from(t.timestamp()).unwrap_or(0);
        let (not_before, not_after) =
            (seconds(parsed.validity().not_before), seconds(parsed.validity().not_after));
        let serial = parsed.raw_serial_as_string();

        let mut store = RootCertStore::empty();
        for root in roots {
            store.add(root).map_err(|e| CredentialsError::Roots(e.to_string()))?;
        }
        if store.is_empty() {
            return Err(CredentialsError::Roots("none given".into()));
        }
        let roots = Arc::new(store);
        let provider = Arc::new(provider());
        let key = provider.key_provider.load_private_key(key)?;
        let certified = Arc::new(CertifiedKey::new(chain, key));
        certified.keys_match()?;
        let server = server_config(&identity, &certified, &roots, &provider)?;
        Ok(Self { identity, not_before, not_after, serial, certified, roots, provider, server })
    }

    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Seconds since the epoch.
    pub fn not_before(&self) -> u64 {
        self.not_before
    }

    /// Seconds since the epoch.
    pub fn not_after(&self) -> u64 {
        self.not_after
    }

    pub fn serial(&self) -> &str {
        &self.serial
    }

    pub fn server_config(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }

    /// For a connection to a peer that must show one of `expected`.
    pub fn client_config(&self, expected: &[Identity]) -> Result<Arc<ClientConfig>, rustls::Error> {
        let verifier = ExpectedPeer {
            roots: self.roots.clone(),
            algorithms: self.provider.signature_verification_algorithms,
            expected: expected.to_vec(),
        };
        let mut config = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(self.certified.clone())));
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.enable_sni = false;
        config.resumption = rustls::client::Resumption::disabled();
        Ok(Arc::new(config))
    }
}

impl fmt::Debug for Credentials {
    /// Never the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("identity", &self.identity)
            .field("serial", &self.serial)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

/// The workload identity in a certificate: its one URI SAN. The error says what is wrong with it.
pub fn peer_identity(certificate: &CertificateDer<'_>) -> Result<Identity, String> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|e| e.to_string())?;
    let names = parsed
        .subject_alternative_name()
        .map_err(|e| e.to_string())?
        .ok_or("the certificate has no subject alternative name")?;
    let mut uris = names.value.general_names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    match (uris.next(), uris.next()) {
        (Some(uri), None) => uri.parse().map_err(|e: model::IdentityError| e.to_string()),
        (None, _) => Err("the certificate has no URI name".into()),
        // Two names would let a peer choose who it is.
        (Some(_), Some(_)) => Err("the certificate has more than one URI name".into()),
    }
}

/// aws-lc-rs, cut down to TLS 1.3 with AES-GCM.
fn provider() -> CryptoProvider {
    CryptoProvider {
        cipher_suites: vec![
            aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
            aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
        ],
        ..aws_lc_rs::default_provider()
    }
}

fn server_config(
    identity: &Identity,
    certified: &Arc<CertifiedKey>,
    roots: &Arc<RootCertStore>,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<ServerConfig>, CredentialsError> {
    let chain_verifier =
        WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|e| CredentialsError::Roots(e.to_string()))?;
    let verifier = MeshPeer { chain: chain_verifier, trust_domain: identity.trust_domain.clone() };
    let mut config = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(certified.clone())));
    config.alpn_protocols = vec![ALPN.to_vec()];
    // No tickets: resumption is off, and a ticket costs a write after each handshake.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    Ok(Arc::new(config))
}

fn refuse(message: String) -> rustls::Error {
    rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(PeerRefused(
        message,
    )))))
}

/// The words of our own verifiers inside a rustls error.
#[derive(Debug, Error)]
#[error("{0}")]
pub(crate) struct PeerRefused(pub(crate) String);

/// Server side: any workload of our trust domain may speak; policy decides later what it may do.
#[derive(Debug)]
struct MeshPeer {
    chain: Arc<dyn ClientCertVerifier>,
    trust_domain: model::Str,
}

impl ClientCertVerifier for MeshPeer {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.chain.verify_client_cert(leaf, intermediates, now)?;
        let identity = peer_identity(leaf).map_err(refuse)?;
        if identity.trust_domain != self.trust_domain {
            return Err(refuse(format!(
                "{identity} is of trust domain {}, this workload is of {}",
                identity.trust_domain, self.trust_domain
            )));
        }
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// Client side: the chain must hold and the name must be one we expect.
#[derive(Debug)]
struct ExpectedPeer {
    roots: Arc<RootCertStore>,
    algorithms: WebPkiSupportedAlgorithms,
    expected: Vec<Identity>,
}

/// Marks a refusal because of the name, to tell it from a bad chain.
#[derive(Debug, Error)]
#[error("{found}")]
pub(crate) struct UnexpectedPeer {
    pub(crate) found: String,
    pub(crate) expected: String,
}

impl ServerCertVerifier for ExpectedPeer {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let parsed = ParsedCertificate::try_from(leaf)?;
        verify_server_cert_signed_by_trust_anchor(
            &parsed,
            &self.roots,
            intermediates,
            now,
            self.algorithms.all,
        )?;
        let identity = peer_identity(leaf).map_err(refuse)?;
        if self.expected.contains(&identity) {
            return Ok(ServerCertVerified::assertion());
        }
        let expected: Vec<_> = self.expected.iter().map(ToString::to_string).collect();
        Err(rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(
            UnexpectedPeer { found: identity.to_string(), expected: expected.join(" or ") },
        )))))
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not offered".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
