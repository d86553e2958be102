//! Certificates for programs that are no part of the mesh but speak its protocol.
//!
//! The mesh's own CA signs only for pods that its proxies serve. Who runs the mesh holds the CA's key and may sign for
//! others: that is what [`Authority::of`] does, with the key of a lab that the test owns.

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};

use crate::lab::Lab;

/// A certificate authority with its key.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// PEM of the intermediates, if any.
    above: String,
    /// PEM of the root.
    pub root: String,
}

/// What a program needs to show who it is, as PEM.
#[derive(Clone, Debug)]
pub struct Certified {
    /// Leaf first, without the root.
    pub chain: String,
    pub key: String,
}

impl Authority {
    /// The CA of a lab's mesh.
    pub fn of(lab: &Lab) -> Result<Self> {
        let status = lab.status()?;
        let log = status.processes.first().context("no processes")?.log.clone();
        let state = log.rsplit_once("/logs/").context("the log lies in STATE/logs")?.0;
        let files = lab.exec("node-1", &["find", state, "-name", "intermediate-key.pem"])?;
        let folder = files.ok()?.strip_suffix("/intermediate-key.pem").context("one CA")?;
        let read = |file: &str| {
            let path = format!("{folder}/{file}.pem");
            Ok::<_, anyhow::Error>(lab.exec("node-1", &["cat", &path])?.ok()?.to_owned() + "\n")
        };
        let key = KeyPair::from_pem(&read("intermediate-key")?)?;
        let above = read("intermediate-cert")?;
        let issuer = Issuer::from_ca_cert_pem(&above, key)?;
        Ok(Self { issuer, above, root: read("root-cert")? })
    }

    /// A CA that nobody has heard of, with the names that the mesh's has.
    pub fn foreign() -> Result<Self> {
        let mut params = CertificateParams::new(vec![])?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.distinguished_name.push(DnType::OrganizationName, "cluster.local");
        let key = KeyPair::generate()?;
        let root = params.self_signed(&key)?.pem();
        Ok(Self { issuer: Issuer::new(params, key), above: String::new(), root })
    }

    /// A certificate for a SPIFFE name, good for a day.
    pub fn certify(&self, identity: &str) -> Result<Certified> {
        let mut params = CertificateParams::new(vec![])?;
        params.subject_alt_names = vec![SanType::URI(identity.to_owned().try_into()?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let key = KeyPair::generate()?;
        let leaf = params.signed_by(&key, &self.issuer)?.pem();
        Ok(Certified { chain: leaf + &self.above, key: key.serialize_pem() })
    }
}
