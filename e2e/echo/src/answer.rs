//! What the server says of a request: lines of `Name=value`, in a fixed order.
//!
//! A value never holds a line break: a peer who sends one must not be able to write lines of its own.

use std::fmt::Write as _;
use std::net::IpAddr;

/// One request, as the application saw it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    pub method: String,
    /// Path and query, as they came.
    pub target: String,
    pub host: String,
    /// `HTTP/1.1`, `HTTP/2.0`, `GRPC` or `TCP`.
    pub protocol: &'static str,
    /// What TLS agreed on; empty without TLS.
    pub alpn: String,
    pub headers: Vec<(String, String)>,
    pub peer: Option<IpAddr>,
    /// The port that took the request.
    pub port: u16,
}

/// Who answers. The same for every request of a process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Me {
    /// The host's name: in a pod, the pod's.
    pub hostname: String,
    pub version: String,
    pub cluster: String,
}

/// The answer's body.
#[must_use]
pub fn body(me: &Me, seen: &Seen, status: u16) -> String {
    let mut text = String::new();
    let mut field = |name: &str, value: &str| {
        let value: String = value.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        // Writing into a String cannot fail.
        let _ = writeln!(text, "{name}={value}");
    };
    field("ServiceVersion", &me.version);
    field("ServicePort", &seen.port.to_string());
    field("Host", &seen.host);
    field("URL", &seen.target);
    field("Cluster", &me.cluster);
    field("Method", &seen.method);
    field("Proto", seen.protocol);
    if !seen.alpn.is_empty() {
        field("Alpn", &seen.alpn);
    }
    if let Some(peer) = seen.peer {
        field("IP", &peer.to_string());
    }
    for (name, value) in &seen.headers {
        field("RequestHeader", &format!("{name}:{value}"));
    }
    field("Hostname", &me.hostname);
    field("StatusCode", &status.to_string());
    text
}

/// A header's name as people write it (`x-request-id` is `X-Request-Id`): HTTP/2 sends small letters only, and a reader
/// of the output should not have to know which version it was.
#[must_use]
pub fn header_name(name: &str) -> String {
    let mut first = true;
    name.chars()
        .map(|c| {
            let shown = if first { c.to_ascii_uppercase() } else { c.to_ascii_lowercase() };
            first = c == '-';
            shown
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_body_has_one_line_for_each_field() {
        let me =
            Me { hostname: "echo-v1-6b-xz".into(), version: "v1".into(), cluster: String::new() };
        let seen = Seen {
            method: "GET".into(),
            target: "/a?b=c".into(),
            host: "echo".into(),
            protocol: "HTTP/1.1",
            headers: vec![("X-One".into(), "1".into()), ("X-One".into(), "2".into())],
            peer: Some([10, 0, 0, 1].into()),
            port: 8080,
            ..Seen::default()
        };
        assert_eq!(
            body(&me, &seen, 200),
            "ServiceVersion=v1\nServicePort=8080\nHost=echo\nURL=/a?b=c\nCluster=\nMethod=GET\nProto=HTTP/1.1\n\
             IP=10.0.0.1\nRequestHeader=X-One:1\nRequestHeader=X-One:2\nHostname=echo-v1-6b-xz\nStatusCode=200\n"
        );
    }

    #[test]
    fn a_value_cannot_write_a_line() {
        let seen = Seen { host: "a\nHostname=b".into(), ..Seen::default() };
        let text = body(&Me::default(), &seen, 200);
        assert_eq!(text.lines().filter(|line| line.starts_with("Hostname=")).count(), 1, "{text}");
    }

    #[test]
    fn header_names() {
        for (name, want) in [("x-request-id", "X-Request-Id"), ("HOST", "Host"), ("", "")] {
            assert_eq!(header_name(name), want);
        }
    }
}
