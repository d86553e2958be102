//! TLS of the control plane's port: 1.3 only, our own certificate, and callers' certificates verified
//! against the root of this mesh. A caller may come without one (it has a token then), but not with a
//! foreign one.

use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use model::{Identity, Str};
use rcgen::{KeyPair, PublicKeyData};
use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{default_provider, sign::any_supported_type};
use rustls::server::{
    ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier,
};
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

use crate::authorize::{Caller, PROXY_NAMESPACE, Refused, node_of_certificate};
use crate::ca::validity;
use crate::signer::{LeafRequest, SignError, Signer};

/// The name proxies expect in our certificate.
pub const SERVER_NAME: &str = "istiod.istio-system.svc";
/// Service account in the control plane's own identity.
const SERVER_ACCOUNT: &str = "istiod";

/// Our certificate, replaced before it expires.
#[derive(Debug)]
pub(crate) struct ServerCertificate {
    provider: Arc<CryptoProvider>,
    current: RwLock<Arc<CertifiedKey>>,
    lifetime: RwLock<(SystemTime, SystemTime)>,
    addresses: Vec<IpAddr>,
    trust_domain: Str,
    leaf_ttl: Duration,
}

impl ServerCertificate {
    /// Has a certificate made for these addresses.
    pub(crate) async fn new(
        signer: &dyn Signer,
        addresses: Vec<IpAddr>,
        trust_domain: Str,
        leaf_ttl: Duration,
        now: SystemTime,
    ) -> Result<Self, SignError> {
        let provider = Arc::new(default_provider());
        let request = request(&addresses, &trust_domain, leaf_ttl);
        let (key, lifetime) = make(signer, request, now).await?;
        Ok(Self {
            provider,
            current: RwLock::new(Arc::new(key)),
            lifetime: RwLock::new(lifetime),
            addresses,
            trust_domain,
            leaf_ttl,
        })
    }

    /// Replaces the certificate. Connections that stand keep the old one.
    pub(crate) async fn renew(
        &self,
        signer: &dyn Signer,
        now: SystemTime,
    ) -> Result<(), SignError> {
        let request = request(&self.addresses, &self.trust_domain, self.leaf_ttl);
        let (key, lifetime) = make(signer, request, now).await?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(key);
        *self.lifetime.write().unwrap_or_else(PoisonError::into_inner) = lifetime;
        Ok(())
    }

    /// From when to when the certificate is valid.
    pub(crate) fn lifetime(&self) -> (SystemTime, SystemTime) {
        *self.lifetime.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ResolvesServerCert for ServerCertificate {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.read().unwrap_or_else(PoisonError::into_inner).clone())
    }
}

type KeyRequest = Box<dyn FnOnce(&KeyPair) -> LeafRequest + Send>;

fn request(addresses: &[IpAddr], trust_domain: &Str, lifetime: Duration) -> KeyRequest {
    // `0.0.0.0` is no address that anyone calls.
    let addresses = addresses.iter().copied().filter(|ip| !ip.is_unspecified()).collect();
    let identity = Identity::new(trust_domain.clone(), PROXY_NAMESPACE, SERVER_ACCOUNT);
    Box::new(move |key| LeafRequest {
        public_key: key.subject_public_key_info(),
        identity,
        dns_names: vec![SERVER_NAME.into()],
        addresses,
        lifetime,
    })
}

async fn make(
    signer: &dyn Signer,
    request: KeyRequest,
    now: SystemTime,
) -> Result<(CertifiedKey, (SystemTime, SystemTime)), SignError> {
    let failed = |e: &dyn std::fmt::Display| SignError::Failed(e.to_string());
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(|e| failed(&e))?;
    let issued = signer.sign(request(&key), now).await?;
    let der = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let key = any_supported_type(&der).map_err(|e| failed(&e))?;
    Ok((CertifiedKey::new(issued.chain, key), (now, issued.not_after)))
}

/// The settings of the listening side.
pub(crate) fn server_config(
    certificate: Arc<ServerCertificate>,
    roots: Vec<CertificateDer<'static>>,
) -> Result<rustls::ServerConfig, String> {
    let provider = certificate.provider.clone();
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root).map_err(|e| format!("a root of the mesh is not usable: {e}"))?;
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(store.into(), provider.clone())
        // The first call of a proxy has a token and no certificate yet.
        .allow_unauthenticated()
        .build()
        .map_err(|e| e.to_string())?;
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| e.to_string())?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(certificate);
    config.alpn_protocols = vec![b"h2".to_vec()];
    // A resumed session would carry a certificate that may have expired since.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// What a verified client certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PeerCertificate {
    pub identity: Identity,
    pub dns_names: Vec<String>,
    pub not_after: SystemTime,
}

impl PeerCertificate {
    /// Reads a certificate that has been verified already.
    pub(crate) fn parse(der: &CertificateDer<'_>) -> Result<Self, Refused> {
        let unreadable = |what: String| Refused::UnreadableCertificate(what);
        let (_, certificate) =
            X509Certificate::from_der(der).map_err(|e| unreadable(e.to_string()))?;
        let names = certificate.subject_alternative_name();
        let names = names.map_err(|e| unreadable(e.to_string()))?;
        let (mut uris, mut dns_names) = (Vec::new(), Vec::new());
        for name in names.iter().flat_map(|n| &n.value.general_names) {
            match name {
                GeneralName::URI(uri) => uris.push(*uri),
                GeneralName::DNSName(name) => dns_names.push((*name).to_owned()),
                _ => {}
            }
        }
        let [uri] = uris[..] else {
            return Err(unreadable(format!("it has {} URI names, and must have one", uris.len())));
        };
        let identity: Identity =
            uri.parse().map_err(|e: model::IdentityError| unreadable(e.to_string()))?;
        Ok(Self { identity, dns_names, not_after: validity(&certificate).1 })
    }

    /// The node proxy behind this certificate, if it is one and still valid.
    pub(crate) fn caller(&self, trust_domain: &Str, now: SystemTime) -> Result<Caller, Refused> {
        // Checked at the handshake, but a connection may outlive the certificate.
        if self.not_after <= now {
            return Err(Refused::CertificateExpired);
        }
        node_of_certificate(&self.identity, &self.dns_names, trust_domain)
    }
}
