//! What another proxy sends: the words of a CONNECT, its certificate, and a certificate request.

use hbone::{Authority, CLIENT_IDENTITY, ConnectHeaders, peer_identity};
use http::{HeaderMap, HeaderValue};
use istiod_lite::csr::{Csr, CsrError, MAX_CSR};
use model::Identity;
use rustls_pki_types::CertificateDer;

use crate::planted;

/// A CONNECT: `:authority`, then `forwarded`, `baggage` and `traceparent`, a line each, then the clients for whom it is said to
/// be.
pub fn headers(data: &[u8]) {
    let mut lines = data.split(|b| *b == b'\n');
    let line = lines.next().unwrap_or_default();
    if let Ok(text) = std::str::from_utf8(line) {
        authority(text);
    }
    let mut map = HeaderMap::new();
    for name in ["forwarded", "baggage", "traceparent"] {
        let value = HeaderValue::from_bytes(lines.next().unwrap_or_default());
        if let Ok(value) = value {
            map.insert(name, value);
        }
    }
    for line in lines {
        if let Ok(value) = HeaderValue::from_bytes(line) {
            map.append(CLIENT_IDENTITY, value);
        }
    }
    claim(&map);
    let headers = ConnectHeaders::from_headers(&map);
    assert_eq!(headers.client, None, "a claim that nobody has judged");
    assert_eq!(headers.baggage.is_some(), map.contains_key("baggage"));
    assert_eq!(headers.traceparent.is_some(), map.contains_key("traceparent"));
    let Some(host) = headers.forwarded_host() else { return };
    assert!(!host.is_empty() && host == host.to_ascii_lowercase(), "{host:?}");
    assert!(!host.contains(';'), "{host:?} is more than one pair");
    planted::forwarded(&host);
}

fn claim(map: &HeaderMap) {
    let all: Vec<_> = map.get_all(CLIENT_IDENTITY).iter().collect();
    match ConnectHeaders::claim(map) {
        Ok(None) => assert!(all.is_empty(), "a claim that cannot be read is not none"),
        Ok(Some(client)) => {
            assert_eq!(all, [client.to_string().as_str()], "one client, in its one spelling");
        }
        Err(words) => {
            assert!(!all.is_empty() && words.len() < 1024, "a peer must not fill the log");
        }
    }
}

fn authority(text: &str) {
    match Authority::parse(text) {
        Ok(Authority::Address(address)) => {
            let again = Authority::parse(&address.to_string());
            assert_eq!(again, Ok(Authority::Address(address)));
            planted::authority(&address);
        }
        Ok(Authority::Host(host, port)) => {
            assert!(!host.is_empty() && host.len() <= 253);
            let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
            assert!(host.bytes().all(plain), "{host:?} could mean something to somebody");
            let again = Authority::parse(&format!("{host}:{port}"));
            assert_eq!(again, Ok(Authority::Host(host, port)));
        }
        Err(words) => assert!(words.len() < 1024, "a peer must not fill the log"),
    }
}

/// A peer's certificate (DER), and its name on its own.
pub fn identity(data: &[u8]) {
    let found = peer_identity(&CertificateDer::from(data));
    for identity in [found.ok(), std::str::from_utf8(data).ok().and_then(|t| t.parse().ok())] {
        let Some(identity) = identity else { continue };
        // One spelling for one identity: policies compare text.
        assert_eq!(identity.to_string().parse::<Identity>().as_ref(), Ok(&identity));
        assert_eq!(identity.to_string().matches('/').count(), 6, "{identity}");
        planted::identity(&identity);
    }
}

/// A certificate request: DER that is wrapped in PEM here, or PEM.
pub fn csr(data: &[u8]) {
    let text = match std::str::from_utf8(data) {
        Ok(text) if text.contains("-----BEGIN") => text.to_owned(),
        _ => pem::encode(&pem::Pem::new("CERTIFICATE REQUEST", data)),
    };
    let requested = Identity::new("cluster.local", "shop", "web");
    match Csr::parse(&text) {
        Ok(csr) => {
            assert!(text.len() <= MAX_CSR && !csr.public_key.is_empty());
            let only = csr.uris.iter().all(|uri| *uri == requested.to_string());
            assert_eq!(csr.check_names(&requested).is_ok(), only, "another's name is refused");
        }
        Err(error) => {
            if let CsrError::Key(words) = &error {
                planted::csr(words);
            }
            let words = error.to_string();
            assert!(
                words.len() < 2048,
                "an asker must not fill the log: {} bytes: {words}",
                words.len()
            );
        }
    }
}
