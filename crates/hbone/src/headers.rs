//! The words of a CONNECT: authority, `baggage`, `forwarded`, `traceparent`, and for whom a waypoint speaks.
//!
//! Everything here parses bytes that a peer controls: every function is total and bounded. The header
//! size limit of HTTP/2 bounds the input.
//!
//! Invariant: what a peer says of its client is in [`ConnectHeaders::claim`] and nowhere else, so that who passes headers on
//! does not pass on a claim that nobody has judged.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;

use engine::Claim;
use http::uri;
use http::{HeaderMap, HeaderValue, Method, Request, Uri};
use model::{Identity, Workload};

/// Names the client for whom a waypoint calls, as `spiffe://...`. It counts only where
/// `engine::delegated` says so.
pub const CLIENT_IDENTITY: &str = "x-ambit-client-identity";

/// Where a CONNECT wants to go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Authority {
    Address(SocketAddr),
    /// A service host name and port; only waypoints and gateways take these.
    Host(String, u16),
}

impl Authority {
    /// Parses `:authority`. The error says what is wrong, in words for the peer's operator.
    pub fn parse(text: &str) -> Result<Self, String> {
        if let Ok(address) = text.parse::<SocketAddr>() {
            return Ok(Self::Address(address));
        }
        let quote = || text.chars().take(64).collect::<String>();
        let (host, port) =
            text.rsplit_once(':').ok_or_else(|| format!("authority {:?} has no port", quote()))?;
        // Digits only: `parse` would take a sign, and an address with one would pass for a host name.
        let port = Some(port).filter(|p| p.bytes().all(|b| b.is_ascii_digit()));
        let port: u16 = port
            .and_then(|p| p.parse().ok())
            .ok_or_else(|| format!("authority {:?} has a bad port", quote()))?;
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
        if host.is_empty() || host.len() > 253 || !host.bytes().all(plain) {
            return Err(format!("authority {:?} is neither ip:port nor host:port", quote()));
        }
        Ok(Self::Host(host.to_ascii_lowercase(), port))
    }
}

/// What a source proxy says about a connection.
#[derive(Clone, Debug, Default)]
pub struct ConnectHeaders {
    /// Describes the source workload (W3C baggage). For telemetry only, never for policy.
    pub baggage: Option<HeaderValue>,
    /// `for=source;host=intended service` (RFC 7239).
    pub forwarded: Option<HeaderValue>,
    /// W3C trace context; joins the access logs of both ends.
    pub traceparent: Option<HeaderValue>,
    /// The client for whom this proxy, a waypoint, calls. For sending only; see [`Self::claim`].
    pub client: Option<Identity>,
}

impl ConnectHeaders {
    /// The request for a tunnel to `target`.
    pub(crate) fn request(&self, target: SocketAddr) -> Result<Request<()>, http::Error> {
        let authority: uri::Authority = target.to_string().parse()?;
        let mut request = Request::new(());
        *request.method_mut() = Method::CONNECT;
        *request.uri_mut() = Uri::builder().authority(authority).build()?;
        *request.version_mut() = http::Version::HTTP_2;
        let headers = request.headers_mut();
        for (name, value) in [
            ("baggage", &self.baggage),
            ("forwarded", &self.forwarded),
            ("traceparent", &self.traceparent),
        ] {
            if let Some(value) = value {
                headers.insert(name, value.clone());
            }
        }
        if let Some(client) = &self.client {
            headers.insert(CLIENT_IDENTITY, HeaderValue::try_from(client.to_string())?);
        }
        Ok(request)
    }

    /// What a peer said, but for whom it says to speak.
    pub fn from_headers(headers: &HeaderMap) -> Self {
        let get = |name: &str| headers.get(name).cloned();
        Self {
            baggage: get("baggage"),
            forwarded: get("forwarded"),
            traceparent: get("traceparent"),
            client: None,
        }
    }

    /// For whom a peer says to speak. The error is in words for the peer's operator.
    pub fn claim(headers: &HeaderMap) -> Claim {
        let mut values = headers.get_all(CLIENT_IDENTITY).iter();
        let Some(value) = values.next() else { return Ok(None) };
        if values.next().is_some() {
            return Err(format!("{CLIENT_IDENTITY} names more than one client"));
        }
        let text = value.to_str().map_err(|_| format!("{CLIENT_IDENTITY} is not plain text"))?;
        match text.parse() {
            Ok(client) => Ok(Some(Arc::new(client))),
            Err(e) => Err(format!("{CLIENT_IDENTITY}: {e}")),
        }
    }

    /// The `host=` of `forwarded`: what the client's application called, in the words of its proxy.
    pub fn forwarded_host(&self) -> Option<String> {
        let text = self.forwarded.as_ref()?.to_str().ok()?;
        let host = text.split(';').find_map(|pair| pair.trim().strip_prefix("host="))?;
        let host = host.trim_matches('"').to_ascii_lowercase();
        (!host.is_empty()).then_some(host)
    }

    /// `baggage` of a workload, with Istio's keys. Made once per workload and shared.
    pub fn baggage_of(workload: &Workload) -> Option<HeaderValue> {
        let mut text = String::with_capacity(192);
        let mut put = |key: &str, value: &str| {
            if !value.is_empty() {
                let comma = if text.is_empty() { "" } else { "," };
                let _ = write!(text, "{comma}{key}={value}");
            }
        };
        put("k8s.cluster.name", &workload.cluster);
        put("k8s.namespace.name", &workload.namespace);
        put(&format!("k8s.{}.name", workload.workload_kind.as_str()), &workload.workload_name);
        put("service.name", &workload.canonical_name);
        put("service.version", &workload.canonical_revision);
        put("cloud.region", workload.locality.region.as_deref().unwrap_or(""));
        put("cloud.availability_zone", workload.locality.zone.as_deref().unwrap_or(""));
        HeaderValue::from_str(&text).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwarded_hosts() {
        let check = |text: &str, want: Option<&str>| {
            let forwarded = HeaderValue::from_str(text).ok();
            let headers = ConnectHeaders { forwarded, ..ConnectHeaders::default() };
            assert_eq!(headers.forwarded_host().as_deref(), want, "{text}");
        };
        check("for=10.0.0.1;host=Web.shop.svc.cluster.local", Some("web.shop.svc.cluster.local"));
        check("host=\"web.shop\"; for=x", Some("web.shop"));
        check("for=10.0.0.1", None);
        check("host=", None);
        check("", None);
    }

    #[test]
    fn claims() {
        let check = |values: &[&[u8]], want: Result<Option<&str>, &str>| {
            let mut map = HeaderMap::new();
            for value in values {
                map.append(CLIENT_IDENTITY, HeaderValue::from_bytes(value).unwrap());
            }
            // Nobody who passes on what a peer said passes on its claim.
            assert_eq!(ConnectHeaders::from_headers(&map).client, None);
            match (ConnectHeaders::claim(&map), want) {
                (Ok(got), Ok(want)) => {
                    assert_eq!(got.map(|id| id.to_string()).as_deref(), want);
                }
                (Err(words), Err(want)) => {
                    assert!(words.contains(want) && words.len() < 1024, "{words}");
                }
                (got, want) => panic!("{values:?}: {got:?}, not {want:?}"),
            }
        };
        check(&[], Ok(None));
        let web = "spiffe://cluster.local/ns/shop/sa/web";
        check(&[web.as_bytes()], Ok(Some(web)));
        check(&[web.as_bytes(), web.as_bytes()], Err("more than one"));
        check(&[b""], Err("is not of the form"));
        check(&[b"cluster.local/ns/shop/sa/web"], Err("is not of the form"));
        check(&[b"spiffe://td/ns/a/sa/b, spiffe://td/ns/a/sa/c"], Err("is not of the form"));
        check(&[b"spiffe://td/ns/a/sa/b\xff"], Err("not plain text"));
        check(&[&[b'"'; 60_000]], Err("is not of the form"));
    }

    #[test]
    fn what_is_sent_can_be_read() {
        let client = Identity::new("cluster.local", "shop", "web");
        let headers = ConnectHeaders { client: Some(client.clone()), ..ConnectHeaders::default() };
        let request = headers.request("10.0.0.1:80".parse().unwrap()).unwrap();
        assert_eq!(ConnectHeaders::claim(request.headers()), Ok(Some(Arc::new(client))));
        let request = ConnectHeaders::default().request("10.0.0.1:80".parse().unwrap()).unwrap();
        assert_eq!(ConnectHeaders::claim(request.headers()), Ok(None));
        // No identity that was parsed is like this: nothing is sent, rather than another header.
        let client = Identity::new("td", "a\r\nx: y", "b");
        let headers = ConnectHeaders { client: Some(client), ..ConnectHeaders::default() };
        assert!(headers.request("10.0.0.1:80".parse().unwrap()).is_err());
    }

    #[test]
    fn authorities() {
        let check = |text: &str, want: Option<Authority>| {
            assert_eq!(Authority::parse(text).ok(), want, "{text}");
        };
        check("10.0.0.1:80", Some(Authority::Address("10.0.0.1:80".parse().unwrap())));
        check("[fd00::1]:80", Some(Authority::Address("[fd00::1]:80".parse().unwrap())));
        check("Web.shop:80", Some(Authority::Host("web.shop".into(), 80)));
        for bad in [
            "",
            ":",
            "web",
            "web:",
            "web:99999",
            "web:+80",
            "10.0.0.1:+80",
            ":80",
            "a b:80",
            "fd00::1",
            "[fd00::1]",
            "web:80/x",
            "u@web:80",
        ] {
            check(bad, None);
        }
    }
}
