//! Certificate signing requests, as far as the CA believes them: the public key, and proof that the
//! asker holds its private half. Every other wish in a CSR is ignored; a CSR that names another
//! identity than the one asked for is refused, since one of the two is a mistake or an attack.

use model::Identity;
use rustls_pki_types::CertificateSigningRequestDer;
use rustls_pki_types::pem::PemObject;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::oid_registry;
use x509_parser::prelude::FromDer;
use x509_parser::public_key::PublicKey;
use x509_parser::x509::SubjectPublicKeyInfo;

/// A CSR with an RSA-4096 key and long names stays below 3 KiB; parsing cost grows with size.
pub const MAX_CSR: usize = 16 * 1024;

/// A checked request: the signature is that of the key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Csr {
    /// SubjectPublicKeyInfo, DER.
    pub public_key: Vec<u8>,
    /// The URI names it asks for, only to compare them.
    pub uris: Vec<String>,
}

/// Why a request is not acceptable. The asker is wrong in every case, and asking again will not help.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CsrError {
    #[error("the CSR has {size} bytes, more than {MAX_CSR}")]
    TooLarge { size: usize },
    #[error("the CSR is not a PEM certificate request: {0}")]
    Malformed(String),
    #[error("the CSR is not signed by its own key: {0}")]
    Signature(String),
    #[error("the key in the CSR is {0}; use ECDSA P-256 or P-384, or RSA of 2048 to 4096 bits")]
    Key(String),
    #[error("the CSR names {named} and the request is for {requested}: they must be the same")]
    OtherIdentity { named: String, requested: Identity },
}

impl Csr {
    /// Parses a PEM request and verifies its signature.
    pub fn parse(pem: &str) -> Result<Self, CsrError> {
        if pem.len() > MAX_CSR {
            return Err(CsrError::TooLarge { size: pem.len() });
        }
        let der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes())
            .map_err(|e| CsrError::Malformed(brief(e)))?;
        let (rest, csr) =
            X509CertificationRequest::from_der(&der).map_err(|e| CsrError::Malformed(brief(e)))?;
        if !rest.is_empty() {
            return Err(CsrError::Malformed("bytes after its end".into()));
        }
        let key = &csr.certification_request_info.subject_pki;
        // Before the signature: a huge key makes the verification itself expensive.
        check_key(key)?;
        check_digest(&csr)?;
        csr.verify_signature().map_err(|e| CsrError::Signature(brief(e)))?;
        Ok(Self { public_key: key.raw.to_vec(), uris: uris(&csr)? })
    }

    /// Refuses a request that names another identity. One that names none is fine: the names in the
    /// certificate come from the CA.
    pub fn check_names(&self, requested: &Identity) -> Result<(), CsrError> {
        let want = requested.to_string();
        match self.uris.iter().find(|uri| **uri != want) {
            None => Ok(()),
            Some(other) => Err(CsrError::OtherIdentity {
                // The asker controls this text: keep the echo short.
                named: format!("{:?}", other.chars().take(256).collect::<String>()),
                requested: requested.clone(),
            }),
        }
    }
}

/// The words of a parser, which may quote what the asker sent: one short line of a log.
fn brief(words: impl ToString) -> String {
    words.to_string().chars().filter(|c| !c.is_control()).take(256).collect()
}

fn check_key(key: &SubjectPublicKeyInfo<'_>) -> Result<(), CsrError> {
    let wrong = |what: String| Err(CsrError::Key(brief(what)));
    match key.parsed() {
        Ok(PublicKey::EC(_)) => {
            let curve = key.algorithm.parameters.as_ref().and_then(|p| p.as_oid().ok());
            match curve {
                Some(oid)
                    if oid == oid_registry::OID_EC_P256
                        || oid == oid_registry::OID_NIST_EC_P384 =>
                {
                    Ok(())
                }
                Some(oid) => wrong(format!("on the elliptic curve {oid}")),
                None => wrong("on an unnamed elliptic curve".into()),
            }
        }
        Ok(PublicKey::RSA(rsa)) => match rsa.key_size() {
            2048..=4096 => Ok(()),
            bits => wrong(format!("RSA of {bits} bits")),
        },
        Ok(_) => wrong(format!("of the type {}", key.algorithm.algorithm)),
        Err(e) => wrong(format!("not readable ({e})")),
    }
}

/// SHA-1 no longer proves anything.
fn check_digest(csr: &X509CertificationRequest<'_>) -> Result<(), CsrError> {
    let digest = &csr.signature_algorithm.algorithm;
    if *digest == oid_registry::OID_PKCS1_SHA1WITHRSA || *digest == oid_registry::OID_SHA1_WITH_RSA
    {
        return Err(CsrError::Signature("it uses SHA-1".into()));
    }
    Ok(())
}

fn uris(csr: &X509CertificationRequest<'_>) -> Result<Vec<String>, CsrError> {
    let mut uris = Vec::new();
    for extension in csr.requested_extensions().into_iter().flatten() {
        match extension {
            ParsedExtension::SubjectAlternativeName(names) => {
                uris.extend(names.general_names.iter().filter_map(|name| match name {
                    GeneralName::URI(uri) => Some((*uri).to_owned()),
                    _ => None,
                }));
            }
            // What cannot be read cannot be compared.
            ParsedExtension::ParseError { error } => {
                return Err(CsrError::Malformed(brief(format!("unreadable extension: {error}"))));
            }
            _ => {}
        }
    }
    Ok(uris)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, KeyPair, SanType, SignatureAlgorithm};

    fn key(algorithm: &'static SignatureAlgorithm) -> KeyPair {
        KeyPair::generate_for(algorithm).unwrap()
    }

    fn csr(key: &KeyPair, sans: Vec<SanType>) -> String {
        let mut params = CertificateParams::default();
        params.subject_alt_names = sans;
        params.serialize_request(key).unwrap().pem().unwrap()
    }

    fn uri(uri: &str) -> SanType {
        SanType::URI(uri.try_into().unwrap())
    }

    #[test]
    fn keys() {
        let check = |key: &KeyPair, want: Option<&str>| {
            let got = Csr::parse(&csr(key, vec![]));
            match want {
                None => {
                    use rcgen::PublicKeyData;
                    assert_eq!(got.unwrap().public_key, key.subject_public_key_info());
                }
                Some(part) => {
                    let error = got.unwrap_err().to_string();
                    assert!(error.contains(part), "{error} should say {part}");
                }
            }
        };
        check(&key(&rcgen::PKCS_ECDSA_P256_SHA256), None);
        check(&key(&rcgen::PKCS_ECDSA_P384_SHA384), None);
        let rsa = |size| KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, size).unwrap();
        check(&rsa(rcgen::RsaKeySize::_2048), None);
        check(&key(&rcgen::PKCS_ED25519), Some("use ECDSA P-256"));
        check(&key(&rcgen::PKCS_ECDSA_P521_SHA512), Some("elliptic curve"));
    }

    #[test]
    fn names() {
        let requested = Identity::new("td", "shop", "web");
        let check = |sans: Vec<SanType>, ok: bool| {
            let parsed =
                Csr::parse(&csr(&key(&rcgen::PKCS_ECDSA_P256_SHA256), sans.clone())).unwrap();
            let got = parsed.check_names(&requested);
            assert_eq!(got.is_ok(), ok, "{sans:?}: {got:?}");
        };
        check(vec![], true);
        check(vec![uri("spiffe://td/ns/shop/sa/web")], true);
        // A DNS wish is ignored, not granted: see the leaf tests of `ca`.
        check(vec![SanType::DnsName("istiod.istio-system.svc".try_into().unwrap())], true);
        check(vec![uri("spiffe://td/ns/shop/sa/db")], false);
        check(vec![uri("spiffe://td/ns/shop/sa/web"), uri("spiffe://td/ns/shop/sa/db")], false);
        check(vec![uri("https://example.org")], false);
    }

    #[test]
    fn forgeries_and_garbage() {
        let good = csr(&key(&rcgen::PKCS_ECDSA_P256_SHA256), vec![]);
        Csr::parse(&good).unwrap();
        let check = |pem: &str, want: &str| {
            let error = Csr::parse(pem).unwrap_err().to_string();
            assert!(error.contains(want), "{error} should say {want}");
        };
        check("", "not a PEM");
        check(
            "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
            "not a PEM",
        );
        check(&"x".repeat(MAX_CSR + 1), "16385 bytes");
        // The PEM parser quotes the line that it does not like.
        let long = format!("-----BEGIN {}\n", "\u{1b}x".repeat(4000));
        let error = Csr::parse(&long).unwrap_err().to_string();
        assert!(error.len() < 512 && !error.contains('\u{1b}'), "{error}");
        // The last byte belongs to the signature.
        let mut der =
            CertificateSigningRequestDer::from_pem_slice(good.as_bytes()).unwrap().to_vec();
        *der.last_mut().unwrap() ^= 1;
        check(&pem(&der), "not signed by its own key");
        der.push(0);
        check(&pem(&der), "bytes after its end");
    }

    fn pem(der: &[u8]) -> String {
        crate::ca::pem("CERTIFICATE REQUEST", der)
    }
}
