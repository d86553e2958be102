//! SPIFFE identities of workloads: `spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT`.

use std::fmt;
use std::str::FromStr;

use crate::Str;

/// The identity of a workload, as its certificate's one URI SAN states it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    pub trust_domain: Str,
    pub namespace: Str,
    pub service_account: Str,
}

impl Identity {
    pub fn new(
        trust_domain: impl Into<Str>,
        namespace: impl Into<Str>,
        service_account: impl Into<Str>,
    ) -> Self {
        Self {
            trust_domain: trust_domain.into(),
            namespace: namespace.into(),
            service_account: service_account.into(),
        }
    }

    /// The name Istio policies use in `principals`: the SPIFFE name without its scheme.
    pub fn principal(&self) -> String {
        format!("{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "spiffe://{}/ns/{}/sa/{}",
            self.trust_domain, self.namespace, self.service_account
        )
    }
}

/// Why a URI is not the SPIFFE name of a workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentityError {
    uri: String,
}

impl fmt::Display for IdentityError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is not of the form spiffe://TRUST_DOMAIN/ns/NS/sa/SA", self.uri)
    }
}

impl std::error::Error for IdentityError {}

impl FromStr for Identity {
    type Err = IdentityError;

    /// Accepts exactly the five-segment form that Istio issues; anything else is an error, so that no
    /// two spellings can name one workload.
    fn from_str(uri: &str) -> Result<Self, IdentityError> {
        // A peer controls this string: keep the echo of it short.
        let error = || IdentityError { uri: uri.chars().take(256).collect() };
        let path = uri.strip_prefix("spiffe://").ok_or_else(error)?;
        let segments: Vec<&str> = path.split('/').collect();
        let [trust_domain, "ns", namespace, "sa", service_account] = segments[..] else {
            return Err(error());
        };
        let plain = |s: &str| {
            !s.is_empty()
                && s.len() <= 253
                && s.bytes()
                    .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b':'))
        };
        if [trust_domain, namespace, service_account].into_iter().all(plain) {
            Ok(Self::new(trust_domain, namespace, service_account))
        } else {
            Err(error())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spiffe_names() {
        let check = |uri: &str, want: Option<(&str, &str, &str)>| {
            let got: Result<Identity, _> = uri.parse();
            match want {
                Some((td, ns, sa)) => {
                    let id = got.unwrap();
                    assert_eq!(id, Identity::new(td, ns, sa));
                    assert_eq!(id.to_string(), uri);
                }
                None => assert!(got.is_err(), "{uri} must not parse"),
            }
        };
        check("spiffe://cluster.local/ns/shop/sa/web", Some(("cluster.local", "shop", "web")));
        check("spiffe://td/ns/a/sa/b", Some(("td", "a", "b")));
        for bad in [
            "",
            "spiffe://",
            "spiffe://td",
            "spiffe://td/ns/a/sa/",
            "spiffe://td/ns//sa/b",
            "spiffe:///ns/a/sa/b",
            "spiffe://td/ns/a/sa/b/",
            "spiffe://td/ns/a/sa/b/c",
            "spiffe://td/NS/a/sa/b",
            "http://td/ns/a/sa/b",
            "spiffe://td/sa/a/ns/b",
            "spiffe://td/ns/a%2fb/sa/b",
            "spiffe://td/ns/a b/sa/b",
            "spiffe://td/ns/a\0/sa/b",
            "spiffe://td/ns/a?x=/sa/b",
        ] {
            check(bad, None);
        }
    }
}
