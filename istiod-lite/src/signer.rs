//! What the control plane needs from a certificate authority. [`crate::ca::LocalCa`] is the one that
//! comes with it; another (a cloud CA, SPIRE) takes its place behind this trait.

use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use futures_util::future::BoxFuture;
use model::Identity;
use rustls_pki_types::CertificateDer;

/// A certificate that has been decided upon: everything in it comes from us, but the key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeafRequest {
    /// SubjectPublicKeyInfo, DER. Whoever asks has proved to hold the private half.
    pub public_key: Vec<u8>,
    /// Becomes the one URI SAN.
    pub identity: Identity,
    /// DNS SANs: only for node proxies and the control plane itself.
    pub dns_names: Vec<String>,
    /// IP SANs: only for the control plane itself.
    pub addresses: Vec<IpAddr>,
    /// The signer may shorten it, never lengthen.
    pub lifetime: Duration,
}

/// A signed certificate with what a peer needs to verify it.
#[derive(Clone, Debug)]
pub struct Issued {
    /// Leaf first, then the intermediates, without the root.
    pub chain: Vec<CertificateDer<'static>>,
    /// Roots to trust, most recent last.
    pub roots: Vec<CertificateDer<'static>>,
    pub not_after: SystemTime,
    /// Hexadecimal.
    pub serial: String,
}

/// Why a certificate could not be signed, although the asker may have it. Trying again later can help.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SignError {
    /// The CA's own certificate is not valid now: a clock is wrong, or the CA was not renewed.
    #[error("{0}")]
    NotValidNow(String),
    #[error("the certificate could not be made: {0}")]
    Failed(String),
}

/// A certificate authority.
pub trait Signer: Send + Sync + std::fmt::Debug {
    /// Signs what has been authorized already.
    fn sign(
        &self,
        request: LeafRequest,
        now: SystemTime,
    ) -> BoxFuture<'_, Result<Issued, SignError>>;

    /// The roots that peers of this mesh must have.
    fn roots(&self) -> Vec<CertificateDer<'static>>;
}
