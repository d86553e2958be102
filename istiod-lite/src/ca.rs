//! The local certificate authority: a root for ten years, an intermediate for one, leaves for a day.
//! ECDSA P-256 throughout. Keys live in the state directory (0600) and survive restarts.
//!
//! Invariants: a leaf has exactly one URI name, and no name that the asker chose; no certificate
//! outlives the one above it; a root is made only where none has been given out before; state that does
//! not fit together is an error and never repaired by a new root, since every proxy trusts the old one.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use futures_util::future::BoxFuture;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

use crate::files::{self, FileError};
use crate::signer::{Issued, LeafRequest, SignError, Signer};

/// Ten years: nobody rotates the root of a laptop's mesh, and it never leaves the machine.
const ROOT_LIFETIME: Duration = Duration::from_secs(3650 * 24 * 3600);
/// One year, renewed at half of it: the key that signs all day should not stay for ten.
const INTERMEDIATE_LIFETIME: Duration = Duration::from_secs(365 * 24 * 3600);
/// CA certificates are valid from a day before they were made: their keys did not exist then, so nothing
/// is given away, and a clock that is set back by an hour does not stop the mesh.
const CA_BACKDATE: Duration = Duration::from_secs(24 * 3600);
/// Leaves are valid from two minutes before they were made, since a peer's clock may be behind ours; at
/// most a tenth of the lifetime, or a proxy that renews at half life would find a short one already due.
const LEAF_BACKDATE: Duration = Duration::from_secs(120);

/// Where proxies find the root they shall trust, inside the state directory.
pub const ROOT_CERT: &str = "root-cert.pem";
const ROOT_KEY: &str = "root-key.pem";
const INTERMEDIATE_CERT: &str = "intermediate-cert.pem";
const INTERMEDIATE_KEY: &str = "intermediate-key.pem";

/// Why the CA cannot start or renew itself.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{} is not usable: {problem}; restore it from a backup, or remove {} for a new one{}",
        path.display(), remove.join(" and "), consequence(*root))]
    Corrupt { path: PathBuf, problem: String, remove: Vec<&'static str>, root: bool },
    #[error("{0}")]
    NotValidNow(String),
    #[error("cannot make a certificate: {0}")]
    Make(#[from] rcgen::Error),
    #[error("the CA made a certificate that it cannot read back: {0}")]
    Internal(String),
    #[error("no random numbers: {0}")]
    Random(#[from] getrandom::Error),
}

fn consequence(root: bool) -> &'static str {
    if root { " (every proxy must then restart, to trust the new root)" } else { "" }
}

/// See the module.
#[derive(Debug)]
pub struct LocalCa {
    dir: PathBuf,
    root: Authority,
    intermediate: Mutex<Arc<Authority>>,
}

/// A CA certificate with its key, ready to sign.
struct Authority {
    certificate: CertificateDer<'static>,
    not_before: SystemTime,
    not_after: SystemTime,
    issuer: Issuer<'static, KeyPair>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

/// Times for the metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CaExpiry {
    pub root: SystemTime,
    pub intermediate: SystemTime,
}

impl LocalCa {
    /// Loads the CA from the state directory, or makes a new one where there was none.
    pub fn open(dir: &Path, trust_domain: &str, now: SystemTime) -> Result<Self, CaError> {
        let root = match load(dir, &ROOT)? {
            Some(root) => root,
            None => {
                tracing::info!(dir = %dir.display(), "making a new root certificate");
                make_root(dir, trust_domain, now)?
            }
        };
        check_validity("the root certificate", &dir.join(ROOT_CERT), &root, now)
            .map_err(CaError::NotValidNow)?;
        let loaded = match load(dir, &INTERMEDIATE)? {
            Some(loaded) => {
                check_signed_by(&loaded, &root, dir)?;
                Some(loaded)
            }
            None => None,
        };
        let intermediate = match loaded {
            Some(loaded) if !is_due(&loaded, now) => {
                let path = dir.join(INTERMEDIATE_CERT);
                check_validity("the intermediate certificate", &path, &loaded, now)
                    .map_err(CaError::NotValidNow)?;
                loaded
            }
            _ => {
                let (made, key) = make_intermediate(&root, trust_domain, now)?;
                store(dir, &INTERMEDIATE, &made.certificate, &key)?;
                made
            }
        };
        Ok(Self { dir: dir.to_owned(), root, intermediate: Mutex::new(Arc::new(intermediate)) })
    }

    /// Renews the intermediate when half of its life is over. The new one is used even when it cannot
    /// be written (a full disk): the next start then renews once more. Returns that write error.
    pub fn maintain(&self, trust_domain: &str, now: SystemTime) -> Result<(), CaError> {
        if !is_due(&self.intermediate(), now) {
            return Ok(());
        }
        check_validity("the root certificate", &self.dir.join(ROOT_CERT), &self.root, now)
            .map_err(CaError::NotValidNow)?;
        let (made, key) = make_intermediate(&self.root, trust_domain, now)?;
        let stored = store(&self.dir, &INTERMEDIATE, &made.certificate, &key);
        *self.intermediate.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(made);
        tracing::info!("renewed the intermediate certificate");
        Ok(stored?)
    }

    pub fn expiry(&self) -> CaExpiry {
        CaExpiry { root: self.root.not_after, intermediate: self.intermediate().not_after }
    }

    fn intermediate(&self) -> Arc<Authority> {
        // Poisoned means a panic elsewhere; the pointer in it is whole.
        self.intermediate.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn sign_now(&self, request: &LeafRequest, now: SystemTime) -> Result<Issued, SignError> {
        let above = self.intermediate();
        for (what, file, authority) in [
            ("the root certificate", ROOT_CERT, &self.root),
            ("the intermediate certificate", INTERMEDIATE_CERT, &*above),
        ] {
            check_validity(what, &self.dir.join(file), authority, now)
                .map_err(SignError::NotValidNow)?;
        }
        let failed = |e: rcgen::Error| SignError::Failed(e.to_string());
        let key = SubjectPublicKeyInfo::from_der(&request.public_key).map_err(failed)?;
        let (params, not_after) = leaf_params(request, above.not_after, now)
            .map_err(|e| SignError::Failed(e.to_string()))?;
        let leaf = params.signed_by(&key, &above.issuer).map_err(failed)?;
        let serial = params.serial_number.map(|s| s.to_string()).unwrap_or_default();
        Ok(Issued {
            chain: vec![leaf.der().clone(), above.certificate.clone()],
            roots: self.roots(),
            not_after,
            serial: serial.replace(':', ""),
        })
    }
}

impl Signer for LocalCa {
    fn sign(
        &self,
        request: LeafRequest,
        now: SystemTime,
    ) -> BoxFuture<'_, Result<Issued, SignError>> {
        // 40 µs of arithmetic: not worth a thread change.
        let issued = self.sign_now(&request, now);
        Box::pin(std::future::ready(issued))
    }

    fn roots(&self) -> Vec<CertificateDer<'static>> {
        vec![self.root.certificate.clone()]
    }
}

/// PEM text of one block.
pub fn pem(label: &str, der: &[u8]) -> String {
    pem::encode_config(
        &pem::Pem::new(label, der),
        pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF),
    )
}

/// The files of one authority, and what to remove when they are spoilt.
struct Files {
    certificate: &'static str,
    key: &'static str,
    root: bool,
}

const ROOT: Files = Files { certificate: ROOT_CERT, key: ROOT_KEY, root: true };
const INTERMEDIATE: Files =
    Files { certificate: INTERMEDIATE_CERT, key: INTERMEDIATE_KEY, root: false };

/// Reads an authority back. `None` when there is none yet; a key without certificate counts as none,
/// since the certificate is written last and nobody can have seen it.
fn load(dir: &Path, files: &Files) -> Result<Option<Authority>, CaError> {
    let (certificate_path, key_path) = (dir.join(files.certificate), dir.join(files.key));
    let spoilt = |path: &Path, problem: String| CaError::Corrupt {
        path: path.to_owned(),
        problem,
        remove: vec![files.certificate, files.key],
        root: files.root,
    };
    let certificate = match files::read(&certificate_path) {
        Ok(bytes) => bytes,
        Err(e) if e.is_not_found() => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    let key = match files::read_secret(&key_path) {
        Ok(bytes) => bytes,
        Err(e) if e.is_not_found() => {
            return Err(spoilt(&key_path, "it is missing, but its certificate is there".into()));
        }
        Err(e) => return Err(e.into()),
    };
    let certificate = CertificateDer::from_pem_slice(&certificate)
        .map_err(|e| spoilt(&certificate_path, e.to_string()))?;
    let key = String::from_utf8(key).map_err(|_| spoilt(&key_path, "it is not text".into()))?;
    let key = KeyPair::from_pem(&key).map_err(|e| spoilt(&key_path, e.to_string()))?;
    Authority::new(certificate, key).map(Some).map_err(|problem| spoilt(&certificate_path, problem))
}

/// Writes an authority: first the key, then the certificate that makes it count.
fn store(
    dir: &Path,
    files: &Files,
    certificate: &CertificateDer<'_>,
    key: &str,
) -> Result<(), FileError> {
    files::write_atomic(&dir.join(files.key), key.as_bytes(), files::SECRET)?;
    let text = pem("CERTIFICATE", certificate);
    files::write_atomic(&dir.join(files.certificate), text.as_bytes(), files::PUBLIC)
}

impl Authority {
    fn new(certificate: CertificateDer<'static>, key: KeyPair) -> Result<Self, String> {
        let (_, parsed) = X509Certificate::from_der(&certificate).map_err(|e| e.to_string())?;
        if !parsed.is_ca() {
            return Err("it is not the certificate of a CA".into());
        }
        if parsed.public_key().raw != key.subject_public_key_info() {
            return Err("certificate and key do not belong together".into());
        }
        let (not_before, not_after) = validity(&parsed);
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(|e| e.to_string())?;
        Ok(Self { certificate, not_before, not_after, issuer })
    }
}

/// Start and end of a certificate's life.
pub fn validity(certificate: &X509Certificate<'_>) -> (SystemTime, SystemTime) {
    let time = |t: x509_parser::time::ASN1Time| {
        let seconds = u64::try_from(t.timestamp()).unwrap_or(0);
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    };
    (time(certificate.validity().not_before), time(certificate.validity().not_after))
}

fn check_signed_by(below: &Authority, root: &Authority, dir: &Path) -> Result<(), CaError> {
    let spoilt = |problem: String| CaError::Corrupt {
        path: dir.join(INTERMEDIATE_CERT),
        problem,
        remove: vec![INTERMEDIATE_CERT, INTERMEDIATE_KEY],
        root: false,
    };
    let parse = |der| X509Certificate::from_der(der).map(|(_, c)| c);
    let (Ok(below), Ok(root)) = (parse(&below.certificate), parse(&root.certificate)) else {
        return Err(spoilt("it cannot be read".into()));
    };
    below
        .verify_signature(Some(root.public_key()))
        .map_err(|_| spoilt(format!("it is not signed by {ROOT_CERT}")))
}

/// Half of the life is over. One that is not valid yet is not due: its clock must be put right.
fn is_due(authority: &Authority, now: SystemTime) -> bool {
    let life = authority.not_after.duration_since(authority.not_before).unwrap_or_default();
    now >= authority.not_before + life / 2
}

/// Says by how much the clock and the certificate disagree.
fn check_validity(
    what: &str,
    path: &Path,
    authority: &Authority,
    now: SystemTime,
) -> Result<(), String> {
    let path = path.display();
    if let Ok(early) = authority.not_before.duration_since(now)
        && !early.is_zero()
    {
        return Err(format!(
            "{what} ({path}) becomes valid only in {}: the clock of this machine is behind by at least \
             that much; set it right",
            span(early)
        ));
    }
    if let Ok(late) = now.duration_since(authority.not_after) {
        return Err(format!(
            "{what} ({path}) expired {} ago: either the clock of this machine is ahead; or remove the \
             state directory for a new CA and restart every proxy",
            span(late)
        ));
    }
    Ok(())
}

/// A duration in the two units that matter.
fn span(duration: Duration) -> String {
    let s = duration.as_secs();
    match (s / 86400, s / 3600 % 24, s / 60 % 60, s % 60) {
        (0, 0, 0, s) => format!("{s}s"),
        (0, 0, m, s) => format!("{m}m {s}s"),
        (0, h, m, _) => format!("{h}h {m}m"),
        (d, h, ..) => format!("{d}d {h}h"),
    }
}

fn make_root(dir: &Path, trust_domain: &str, now: SystemTime) -> Result<Authority, CaError> {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    // Path length 1: the root may sign one layer of intermediates.
    let params = ca_params("Ambit root", trust_domain, 1, now, now + ROOT_LIFETIME)?;
    let certificate = params.self_signed(&key)?.der().clone();
    let text = key.serialize_pem();
    store(dir, &ROOT, &certificate, &text)?;
    Authority::new(certificate, key).map_err(CaError::Internal)
}

fn make_intermediate(
    root: &Authority,
    trust_domain: &str,
    now: SystemTime,
) -> Result<(Authority, String), CaError> {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let not_after = (now + INTERMEDIATE_LIFETIME).min(root.not_after);
    let params = ca_params("Ambit intermediate", trust_domain, 0, now, not_after)?;
    let certificate = params.signed_by(&key, &root.issuer)?.der().clone();
    let text = key.serialize_pem();
    Ok((Authority::new(certificate, key).map_err(CaError::Internal)?, text))
}

fn ca_params(
    name: &str,
    trust_domain: &str,
    path_length: u8,
    now: SystemTime,
    not_after: SystemTime,
) -> Result<CertificateParams, CaError> {
    let mut subject = DistinguishedName::new();
    subject.push(DnType::OrganizationName, trust_domain);
    let serial = serial()?;
    // A renewed intermediate must not share its subject with the old one: a verifier that finds
    // issuers by name would try the wrong key first.
    subject.push(DnType::CommonName, format!("{name} {serial}"));
    let mut params = CertificateParams::default();
    params.distinguished_name = subject;
    params.serial_number = Some(serial);
    params.not_before = (now - CA_BACKDATE).into();
    params.not_after = not_after.into();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(path_length));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn leaf_params(
    request: &LeafRequest,
    latest: SystemTime,
    now: SystemTime,
) -> Result<(CertificateParams, SystemTime), CaError> {
    let not_after = (now + request.lifetime).min(latest);
    let mut names = vec![SanType::URI(request.identity.to_string().try_into()?)];
    for name in &request.dns_names {
        names.push(SanType::DnsName(name.as_str().try_into()?));
    }
    names.extend(request.addresses.iter().copied().map(SanType::IpAddress));
    let mut params = CertificateParams::default();
    // No subject: the name of a workload is its URI, and a second name would only invite trust in it.
    params.distinguished_name = DistinguishedName::new();
    params.serial_number = Some(serial()?);
    params.subject_alt_names = names;
    params.not_before = (now - LEAF_BACKDATE.min(request.lifetime / 10)).into();
    params.not_after = not_after.into();
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    Ok((params, not_after))
}

/// 127 random bits: positive, and never the same twice.
fn serial() -> Result<SerialNumber, CaError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)?;
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

#[cfg(test)]
mod tests;
