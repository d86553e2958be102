//! Certificates as the dump shows them: serial, times, and why there is none. No key.

use std::time::{Duration, UNIX_EPOCH};

use super::{Certificate, CertificateInfo};
use crate::access_log::Utc;
use crate::certs::{CertStore, CertificateState};

/// All that are wanted, by identity.
pub fn certificates(certs: &CertStore) -> Vec<CertificateInfo> {
    certs.states().into_iter().map(info).collect()
}

fn info(state: CertificateState) -> CertificateInfo {
    let time = |seconds| Utc(UNIX_EPOCH + Duration::from_secs(seconds)).to_string();
    let leaf = (!state.serial.is_empty()).then(|| Certificate {
        serial_number: state.serial.clone(),
        valid_from: time(state.not_before),
        expiration_time: time(state.not_after),
    });
    let words = match (&leaf, state.error) {
        (Some(_), None) => "Available".to_owned(),
        (Some(_), Some(error)) => format!("Available, renewal fails: {error}"),
        (None, None) => "Initializing".to_owned(),
        (None, Some(error)) => error,
    };
    CertificateInfo {
        identity: state.identity,
        state: words,
        cert_chain: leaf.into_iter().collect(),
        root_certs: Vec::new(),
    }
}
