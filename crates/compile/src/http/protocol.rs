//! What a port of a Service speaks, as declared: `appProtocol`, else the first word of the port's name, as in Istio.

use k8s_openapi::api::core::v1::ServicePort;
use model::http::Protocol;

use crate::diagnostics::{Code, Diagnostic};
use crate::services;

/// Ports whose servers speak first by custom: SMTP, DNS, MySQL, MongoDB. Waiting for the client to speak would hold them up.
const SERVER_FIRST: [i32; 4] = [25, 53, 3306, 27017];

/// The word that declares a port's protocol, in lower case. Empty: none does.
pub(crate) fn word(port: &ServicePort) -> String {
    let stated = port.app_protocol.as_deref().or(port.name.as_deref()).unwrap_or_default();
    let stated = stated.to_ascii_lowercase();
    match stated.as_str() {
        "kubernetes.io/h2c" => "http2".to_owned(),
        "kubernetes.io/ws" => "http".to_owned(),
        "kubernetes.io/wss" => "https".to_owned(),
        // HTTP of its own, not gRPC named "web".
        other if other == "grpc-web" || other.starts_with("grpc-web-") => "grpc-web".to_owned(),
        other => other.split('-').next().unwrap_or_default().to_owned(),
    }
}

pub(crate) fn of_port(port: &ServicePort) -> Protocol {
    match word(port).as_str() {
        "http" | "http_proxy" | "grpc-web" => Protocol::Http,
        "http2" | "h2c" => Protocol::Http2,
        "grpc" => Protocol::Grpc,
        "tcp" | "udp" | "tls" | "https" | "hbone" | "mongo" | "mysql" | "redis" => Protocol::Opaque,
        _ if SERVER_FIRST.contains(&port.port) => Protocol::Opaque,
        _ => Protocol::Undeclared,
    }
}

/// Whether the server wants TLS from its clients, which the mesh does not originate for a route.
pub(crate) fn wants_tls(port: &ServicePort) -> bool {
    matches!(word(port).as_str(), "https" | "tls")
}

/// A finding about ports of a Service that rules are for and that do not speak HTTP: all of these, or some.
pub(super) fn untouched(service: &services::Compiled, ports: &[u16]) -> Option<Diagnostic> {
    let all = service.service.ports.iter().zip(&service.ports);
    let opaque = all
        .filter(|(p, facts)| facts.protocol == Protocol::Opaque && ports.contains(&p.service_port));
    let mut opaque: Vec<u16> = opaque.map(|(p, _)| p.service_port).collect();
    opaque.sort_unstable();
    opaque.dedup();
    match opaque.len() {
        0 => None,
        n if n == ports.len() => Some(not_http(&[])),
        _ => Some(not_http(&opaque)),
    }
}

/// That some ports do not speak HTTP; empty: all that are meant.
pub(super) fn not_http(some: &[u16]) -> Diagnostic {
    let d = if some.is_empty() {
        let message = "the Service declares that no such port speaks HTTP: what goes there is not looked into";
        Diagnostic::warning(Code::NoEffect, message)
    } else {
        let ports = ports(some);
        let message = format!(
            "no HTTP by the Service's declaration: what goes to {ports} is not looked into"
        );
        Diagnostic::info(Code::NoEffect, message)
    };
    d.help("set the port's appProtocol: http, kubernetes.io/h2c or grpc")
}

/// Ports in words.
pub(super) fn ports(all: &[u16]) -> String {
    let numbers: Vec<String> = all.iter().map(u16::to_string).collect();
    let what = if all.len() == 1 { "port" } else { "ports" };
    format!("{what} {}", numbers.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_declare_what_they_speak() {
        use Protocol::{Grpc, Http, Http2, Opaque, Undeclared};
        let check = |port: i32, name: Option<&str>, app_protocol: Option<&str>, want: Protocol| {
            let port = ServicePort {
                port,
                name: name.map(str::to_owned),
                app_protocol: app_protocol.map(str::to_owned),
                ..ServicePort::default()
            };
            assert_eq!(of_port(&port), want, "{port:?}");
        };
        for (word, want) in [
            ("http", Http),
            ("http-web", Http),
            ("HTTP", Http),
            ("grpc-web", Http),
            ("grpc-web-x", Http),
            ("grpc-webx", Grpc),
            ("http2", Http2),
            ("http2-x", Http2),
            ("grpc", Grpc),
            ("grpc-api", Grpc),
            ("https", Opaque),
            ("tls-x", Opaque),
            ("tcp-x", Opaque),
            ("mysql", Opaque),
            ("web", Undeclared),
            ("httpx", Undeclared),
        ] {
            check(80, Some(word), None, want);
            check(80, Some("tcp"), Some(word), want);
        }
        check(80, None, None, Undeclared);
        check(80, None, Some("kubernetes.io/h2c"), Http2);
        check(80, None, Some("kubernetes.io/ws"), Http);
        check(80, None, Some("kubernetes.io/wss"), Opaque);
        check(80, None, Some("example.com/own"), Undeclared);
        check(3306, None, None, Opaque);
        check(3306, Some("http"), None, Http);
    }
}
