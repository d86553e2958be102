//! Configurations for the real Envoy: as an HBONE client and as an HBONE server.
//!
//! Envoy takes its configuration on the command line, as JSON, with keys and certificates in it: a pod needs no files.

use serde_json::{Value, json};

use crate::authority::Certified;
use crate::yaml;

const TYPES: &str = "type.googleapis.com/envoy.extensions";
/// Where Envoy says that it is ready.
const ADMIN: u16 = 9901;

/// Who one end says it is, whom it believes, and who the other end must be.
#[derive(Clone, Debug)]
pub struct Party<'a> {
    pub own: &'a Certified,
    /// PEM.
    pub root: &'a str,
    /// SPIFFE name.
    pub expects: &'a str,
}

/// A TCP listener on localhost whose connections go into an HBONE tunnel.
#[derive(Clone, Debug)]
pub struct Way<'a> {
    pub port: u16,
    pub party: Party<'a>,
    /// The peer's proxy, port 15008.
    pub gate: &'a str,
    /// `:authority` of the CONNECT.
    pub target: &'a str,
}

/// Envoy as an HBONE client.
pub fn client(ways: &[Way<'_>]) -> Value {
    bootstrap(ways.iter().map(listener).collect(), ways.iter().map(cluster).collect())
}

fn listener(way: &Way<'_>) -> Value {
    let name = format!("way-{}", way.port);
    let proxy = json!({
        "@type": format!("{TYPES}.filters.network.tcp_proxy.v3.TcpProxy"),
        "stat_prefix": name,
        "cluster": name,
        "tunneling_config": { "hostname": way.target },
        "access_log": log("%RESPONSE_FLAGS% %UPSTREAM_TRANSPORT_FAILURE_REASON%"),
    });
    json!({
        "name": name,
        "address": address("127.0.0.1", way.port),
        "filter_chains": [{
            "filters": [{ "name": "envoy.filters.network.tcp_proxy", "typed_config": proxy }],
        }],
    })
}

fn cluster(way: &Way<'_>) -> Value {
    let options = format!("{TYPES}.upstreams.http.v3.HttpProtocolOptions");
    let mut cluster = static_cluster(&format!("way-{}", way.port), way.gate, 15008);
    cluster["typed_extension_protocol_options"] = json!({
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": options,
            "explicit_http_config": { "http2_protocol_options": {} },
        },
    });
    cluster["transport_socket"] = tls("UpstreamTlsContext", &way.party);
    cluster
}

/// Envoy as an HBONE server: CONNECT to an address that ends in one of `ports` goes to that port of localhost.
pub fn server(party: &Party<'_>, ports: &[u16]) -> Value {
    let connect = json!({ "upgrade_type": "CONNECT", "connect_config": {} });
    let hosts: Vec<Value> = ports
        .iter()
        .map(|port| {
            json!({
                "name": format!("port-{port}"),
                "domains": [format!("*:{port}")],
                "routes": [{
                    "match": { "connect_matcher": {} },
                    "route": { "cluster": format!("port-{port}"), "upgrade_configs": [connect] },
                }],
            })
        })
        .collect();
    let router = format!("{TYPES}.filters.http.router.v3.Router");
    let manager = json!({
        "@type": format!("{TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager"),
        "stat_prefix": "hbone",
        "codec_type": "HTTP2",
        "http2_protocol_options": { "allow_connect": true },
        "upgrade_configs": [{ "upgrade_type": "CONNECT" }],
        "route_config": { "virtual_hosts": hosts },
        "http_filters": [{ "name": "envoy.filters.http.router", "typed_config": { "@type": router } }],
        "access_log": log("%RESPONSE_CODE% %REQ(:METHOD)% %REQ(:AUTHORITY)% %DOWNSTREAM_PEER_URI_SAN% %REQ(FORWARDED)% %REQ(BAGGAGE)% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %BYTES_RECEIVED% %BYTES_SENT%"),
    });
    let listener = json!({
        "name": "hbone",
        "address": address("::", 15008),
        "filter_chains": [{
            "transport_socket": tls("DownstreamTlsContext", party),
            "filters": [{ "name": "envoy.filters.network.http_connection_manager", "typed_config": manager }],
        }],
    });
    let clusters =
        ports.iter().map(|port| static_cluster(&format!("port-{port}"), "127.0.0.1", *port));
    bootstrap(vec![listener], clusters.collect())
}

fn bootstrap(listeners: Vec<Value>, clusters: Vec<Value>) -> Value {
    json!({
        "admin": { "address": address("127.0.0.1", ADMIN) },
        "static_resources": { "listeners": listeners, "clusters": clusters },
    })
}

fn static_cluster(name: &str, ip: &str, port: u16) -> Value {
    json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": address(ip, port) } }] }],
        },
    })
}

fn address(ip: &str, port: u16) -> Value {
    json!({ "socket_address": { "address": ip, "port_value": port, "ipv4_compat": ip == "::" } })
}

/// Mutual TLS 1.3 with ALPN `h2`; the peer's URI name must be the expected one.
fn tls(context: &str, party: &Party<'_>) -> Value {
    let mut config = json!({
        "@type": format!("{TYPES}.transport_sockets.tls.v3.{context}"),
        "common_tls_context": {
            "tls_params": {
                "tls_minimum_protocol_version": "TLSv1_3",
                "tls_maximum_protocol_version": "TLSv1_3",
            },
            "alpn_protocols": ["h2"],
            "tls_certificates": [{
                "certificate_chain": { "inline_string": party.own.chain },
                "private_key": { "inline_string": party.own.key },
            }],
            "validation_context": {
                "trusted_ca": { "inline_string": party.root },
                "match_typed_subject_alt_names": [
                    { "san_type": "URI", "matcher": { "exact": party.expects } },
                ],
            },
        },
    });
    if context == "DownstreamTlsContext" {
        config["require_client_certificate"] = true.into();
    }
    json!({ "name": "envoy.transport_sockets.tls", "typed_config": config })
}

/// Lines on standard output that begin with `hbone `.
fn log(format: &str) -> Value {
    json!([{
        "name": "envoy.access_loggers.stdout",
        "typed_config": {
            "@type": format!("{TYPES}.access_loggers.stream.v3.StdoutAccessLog"),
            "log_format": { "text_format_source": { "inline_string": format!("hbone {format}\n") } },
        },
    }])
}

/// Adds a container with Envoy to a pod: the name is `envoy`, the image too.
pub fn beside(pod: &yaml::Pod, config: &Value) -> String {
    let args = json!([
        "--config-yaml",
        config.to_string(),
        // Two workers would make two tunnels.
        "--concurrency",
        "1",
        // Needs shared memory that others of the same number would share.
        "--disable-hot-restart",
        // The access log is asked for at once.
        "--file-flush-interval-msec",
        "50",
        "--log-level",
        "warning",
    ]);
    format!("{}    - name: envoy\n      image: envoy\n      args: {args}\n", pod.yaml())
}
