//! Certificates for the tests of this crate.
#![allow(dead_code, unreachable_pub, reason = "each test takes what it needs")]

use std::sync::Arc;

use hbone::Credentials;
use model::Identity;
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType,
};
use rustls_pki_types::PrivateKeyDer;

/// A certificate authority.
pub struct Ca {
    issuer: Issuer<'static, KeyPair>,
    root: rustls_pki_types::CertificateDer<'static>,
}

impl Ca {
    pub fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).unwrap().der().clone();
        Self { issuer: Issuer::new(params, key), root }
    }

    pub fn credentials(&self, id: &Identity) -> Arc<Credentials> {
        self.with_times(id, -3600, 3600)
    }

    pub fn with_times(&self, id: &Identity, from: i64, to: i64) -> Arc<Credentials> {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.subject_alt_names = vec![SanType::URI(id.to_string().try_into().unwrap())];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let now = std::time::SystemTime::now();
        let at = |s: i64| {
            let d = std::time::Duration::from_secs(s.unsigned_abs());
            if s < 0 { (now - d).into() } else { (now + d).into() }
        };
        params.not_before = at(from);
        params.not_after = at(to);
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        Arc::new(
            Credentials::new(id.clone(), vec![cert.der().clone()], key, vec![self.root.clone()])
                .unwrap(),
        )
    }
}

pub fn id(sa: &str) -> Identity {
    Identity::new("cluster.local", "shop", sa)
}
