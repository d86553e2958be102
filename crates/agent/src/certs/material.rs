//! A key, its certificate and the roots: made from a CA's answer or from a file, checked before use.
//!
//! Keys are generated here, one per identity and certificate, and leave the process only into the secret
//! directory (0700, files 0600).

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use engine::Rotation;
use hbone::Credentials;
use model::Identity;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::RootCertStore;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::ParsedCertificate;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::channel::{ClientCertificate, explain_tls};
use crate::disk;

/// A certificate in use.
pub(super) struct Material {
    pub(super) credentials: Arc<Credentials>,
    /// The same, for connections to the control plane.
    pub(super) client: Arc<ClientCertificate>,
    /// What it is verified against, and peers are: the mesh's roots and the one that came with it.
    roots: Vec<CertificateDer<'static>>,
    /// Its root is not in the mesh's root file (any more).
    pub(super) foreign_root: bool,
    pem: String,
}

/// A new key and the request to sign it.
pub(super) struct KeyRequest {
    pub(super) csr: String,
    key: KeyPair,
}

impl KeyRequest {
    pub(super) fn new(identity: &Identity) -> Result<Self, rcgen::Error> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
        let csr = params.serialize_request(&key)?.pem()?;
        Ok(Self { csr, key })
    }
}

impl Material {
    /// From the CA's answer: leaf first, root last. `roots` are those of the mesh's root file.
    pub(super) fn issued(
        identity: &Identity,
        request: &KeyRequest,
        chain: &[String],
        roots: &[CertificateDer<'static>],
        now: u64,
    ) -> Result<Self, String> {
        let pem = format!("{}{}", request.key.serialize_pem(), chain.concat());
        let material = Self::parse(Some(identity), pem, roots)?;
        material.verify(now)?;
        Ok(material)
    }

    /// From the text of a secret file or a CA's answer: one key, certificates leaf first.
    fn parse(
        identity: Option<&Identity>,
        pem: String,
        roots: &[CertificateDer<'static>],
    ) -> Result<Self, String> {
        let key = PrivateKeyDer::from_pem_slice(pem.as_bytes()).map_err(|e| format!("key: {e}"))?;
        let certificates: Result<Vec<_>, _> =
            CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
        let mut chain = certificates.map_err(|e| format!("certificate: {e}"))?;
        let leaf = chain.first().ok_or("no certificate")?;
        let named = hbone::peer_identity(leaf)?;
        let identity = identity.cloned().unwrap_or(named);
        // The roots travel at the end, several while one replaces another. Peers have them already; beside the root file
        // they are what we trust.
        let mut trusted = roots.to_vec();
        while chain.len() > 1
            && let Some(root) = chain.pop_if(|last| is_root(last))
        {
            if !trusted.contains(&root) {
                trusted.push(root);
            }
        }
        let foreign_root = !roots.is_empty() && trusted.len() > roots.len();
        let credentials =
            Credentials::new(identity, chain.clone(), key.clone_key(), trusted.clone())
                .map_err(|e| e.to_string())?;
        let serial = credentials.serial().to_owned();
        Ok(Self {
            credentials: Arc::new(credentials),
            client: Arc::new(ClientCertificate { chain, key, serial }),
            roots: trusted,
            foreign_root,
            pem,
        })
    }

    /// Whether a peer would accept the certificate now. Checked when it is issued: later it would be every
    /// connection that fails, at the other end.
    fn verify(&self, now: u64) -> Result<(), String> {
        let mut store = RootCertStore::empty();
        store.add_parsable_certificates(self.roots.iter().cloned());
        let [leaf, intermediates @ ..] = &self.client.chain[..] else {
            return Err("no certificate".to_owned());
        };
        let parsed = ParsedCertificate::try_from(leaf).map_err(|e| e.to_string())?;
        let now = UnixTime::since_unix_epoch(Duration::from_secs(now));
        let algorithms = aws_lc_rs::default_provider().signature_verification_algorithms;
        verify_server_cert_signed_by_trust_anchor(
            &parsed,
            &store,
            intermediates,
            now,
            algorithms.all,
        )
        .map_err(|e| explain_tls(&e))
    }

    pub(super) fn dates(&self) -> Rotation {
        let (not_before, not_after) = (self.credentials.not_before(), self.credentials.not_after());
        Rotation { not_before, not_after }
    }

    pub(super) fn identity(&self) -> &Identity {
        self.credentials.identity()
    }

    /// Keeps it for the next process.
    pub(super) fn write(&self, dir: &Path) -> io::Result<()> {
        disk::replace(&path(dir, self.identity()), self.pem.as_bytes())
    }
}

fn is_root(certificate: &CertificateDer<'static>) -> bool {
    X509Certificate::from_der(certificate).is_ok_and(|(_, c)| c.subject() == c.issuer())
}

/// Creates the secret directory, or closes one that others may enter.
pub(super) fn make_secret_dir(dir: &Path) -> io::Result<()> {
    disk::make_private_dir(dir)?;
    let mode = fs::metadata(dir)?.permissions().mode();
    if mode & 0o077 != 0 {
        tracing::warn!("{} was open to others (mode {:o}): closed", dir.display(), mode & 0o777);
        fs::set_permissions(dir, fs::Permissions::from_mode(0o700))?;
    }
    Ok(())
}

/// Every certificate that an earlier process left and that still holds. The others are deleted.
pub(super) fn read_all(dir: &Path, roots: &[CertificateDer<'static>], now: u64) -> Vec<Material> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let files = entries.flatten().map(|entry| entry.path());
    let mut found = Vec::new();
    for file in files.filter(|path| path.extension().is_some_and(|e| e == "pem")) {
        let material = fs::read_to_string(&file)
            .map_err(|e| e.to_string())
            .and_then(|pem| Material::parse(None, pem, roots));
        match material {
            Ok(material) if material.credentials.not_after() > now => found.push(material),
            Ok(_) => delete(&file),
            Err(problem) => {
                tracing::warn!("{} is not usable and deleted: {problem}", file.display());
                delete(&file);
            }
        }
    }
    found
}

/// Deletes what is kept for an identity.
pub(super) fn remove(dir: &Path, identity: &Identity) {
    delete(&path(dir, identity));
}

fn delete(file: &Path) {
    if let Err(e) = fs::remove_file(file)
        && e.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!("cannot delete {}: {e}", file.display());
    }
}

/// Identities may be longer than file names; the certificate inside says whose it is.
fn path(dir: &Path, identity: &Identity) -> PathBuf {
    let hash = xds::digest::resource("", identity.to_string().as_bytes());
    dir.join(format!("{hash:016x}.pem"))
}
