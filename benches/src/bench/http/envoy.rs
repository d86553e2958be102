//! Envoy's configuration for the work of `routes`: as a plain proxy, and as a waypoint.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::routes::{CHOOSE, SHARES, TO_CLIENT, TO_SERVER, prefix};

const TYPES: &str = "type.googleapis.com/envoy.extensions";
/// One for each core, as ours; Envoy's own default.
pub const WORKERS: &str = "2";
/// What Istio takes off a path before it looks: ours always does.
const NORMALIZE: &str = "normalize_path";

/// The program that `.ci/programs` fetches.
pub fn program() -> Result<PathBuf> {
    let folder = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let cache = folder("AMBIT_CACHE").or_else(|| {
        let shared =
            folder("XDG_CACHE_HOME").or_else(|| folder("HOME").map(|home| home.join(".cache")));
        shared.map(|shared| shared.join("ambit"))
    });
    let path = cache.context("neither AMBIT_CACHE nor HOME is set")?.join("tools/envoy/envoy");
    ensure!(path.is_file(), "{} is missing: run .ci/programs, which fetches it", path.display());
    Ok(path)
}

/// What `--version` says of it.
pub fn version(program: &Path) -> Result<String> {
    let output = Command::new(program).arg("--version").output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.trim().rsplit(": ").next().unwrap_or_default().to_owned())
}

/// Envoy with this configuration in a file.
pub fn command(program: &Path, config: &Path) -> Command {
    let mut command = Command::new(program);
    command.arg("--config-path").arg(config);
    command.args(["--concurrency", WORKERS, "--disable-hot-restart", "--log-level", "warning"]);
    command
}

/// Where a plain proxy gets its routes from.
#[derive(Clone, Copy, Debug)]
pub enum Routes<'a> {
    Inline(usize),
    /// A file that is watched, of this folder.
    File(&'a Path),
}

/// HTTP/1.1 at `listen`, to `v1` and `v2`; one line for each request on standard output with `log`.
pub fn plain(
    listen: SocketAddr,
    admin: SocketAddr,
    v1: SocketAddr,
    v2: SocketAddr,
    routes: Routes<'_>,
    log: bool,
) -> Value {
    let mut manager = json!({
        "@type": http_manager(),
        "stat_prefix": "bench",
        NORMALIZE: true,
        "http_filters": [router()],
    });
    match routes {
        Routes::Inline(prefixes) => manager["route_config"] = route_config(prefixes),
        Routes::File(path) => {
            manager["rds"] = json!({
                "route_config_name": "bench",
                "config_source": { "path_config_source": { "path": path } },
            });
        }
    }
    if log {
        manager["access_log"] = access_log();
    }
    let listener = json!({
        "name": "plain",
        "address": address(listen),
        "filter_chains": [{ "filters": [named("envoy.filters.network.http_connection_manager", manager)] }],
    });
    bootstrap(Some(admin), vec![listener], vec![cluster("v1", v1), cluster("v2", v2)])
}

/// The routes of the plain proxy; see [`super::routes::http_routes`].
pub fn route_config(prefixes: usize) -> Value {
    let (first, second) = SHARES;
    let shares = json!({ "weighted_clusters": { "clusters": [
        { "name": "v1", "weight": first }, { "name": "v2", "weight": second },
    ] } });
    let routes: Vec<Value> = if prefixes == 0 {
        let headers = json!([{ "name": CHOOSE.0, "string_match": { "exact": CHOOSE.1 } }]);
        let chosen = json!({ "prefix": "/", "headers": headers });
        vec![route(&chosen, &json!({ "cluster": "v2" })), route(&json!({ "prefix": "/" }), &shares)]
    } else {
        let one = |n| route(&json!({ "path_separated_prefix": prefix(n) }), &shares);
        (0..prefixes).map(one).collect()
    };
    json!({
        "name": "bench",
        "virtual_hosts": [{ "name": "web", "domains": ["*"], "routes": routes }],
    })
}

/// A file for [`Routes::File`]: its routes add `x-route` of this value to answers of `/probe`, and there are others.
pub fn route_file(prefixes: usize, value: &str) -> Value {
    let mut config = route_config(prefixes);
    config["@type"] = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration".into();
    let probe = json!({
        "match": { "path_separated_prefix": "/probe" },
        "route": { "cluster": "v1" },
        "response_headers_to_add": [add(("x-route", value))],
    });
    if let Some(routes) = config["virtual_hosts"][0]["routes"].as_array_mut() {
        routes.insert(0, probe);
    }
    json!({ "version_info": value, "resources": [config] })
}

/// One line for each request, in Envoy's own form, on standard output.
fn access_log() -> Value {
    let log = format!("{TYPES}.access_loggers.stream.v3.StdoutAccessLog");
    json!([named("envoy.access_loggers.stdout", json!({ "@type": log }))])
}

fn route(matched: &Value, action: &Value) -> Value {
    json!({
        "match": matched,
        "route": action,
        "request_headers_to_add": [add(TO_SERVER)],
        "response_headers_to_add": [add(TO_CLIENT)],
    })
}

fn add((key, value): (&str, &str)) -> Value {
    json!({ "header": { "key": key, "value": value } })
}

pub(super) fn bootstrap(
    admin: Option<SocketAddr>,
    listeners: Vec<Value>,
    clusters: Vec<Value>,
) -> Value {
    let mut all = json!({
        "node": { "id": "bench", "cluster": "bench" },
        "static_resources": { "listeners": listeners, "clusters": clusters },
    });
    if let Some(admin) = admin {
        all["admin"] = json!({ "address": address(admin) });
    }
    all
}

pub(super) fn cluster(name: &str, to: SocketAddr) -> Value {
    json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": address(to) } }] }],
        },
    })
}

pub(super) fn address(at: SocketAddr) -> Value {
    json!({ "socket_address": { "address": at.ip().to_string(), "port_value": at.port() } })
}

pub(super) fn http_manager() -> String {
    format!("{TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager")
}

pub(super) fn router() -> Value {
    let router = format!("{TYPES}.filters.http.router.v3.Router");
    named("envoy.filters.http.router", json!({ "@type": router }))
}

pub(super) fn named(name: &str, config: Value) -> Value {
    json!({ "name": name, "typed_config": config })
}

/// What Envoy needs to be a waypoint, as PEM.
#[derive(Clone, Debug)]
pub struct Secrets {
    /// Leaf first, without the root.
    pub chain: String,
    pub key: String,
    pub root: String,
}

/// Where a waypoint's parts meet inside of Envoy.
const INNER: &str = "main_internal";
const ORIGINATE: &str = "connect_originate";
/// Streams on one connection, as Istio's waypoint has it.
const STREAMS: u32 = 100;
const ORIGINAL_DST: &str = "envoy.filters.listener.original_dst";

/// Envoy as a waypoint, in the form that Istio gives it: tunnels end at port 15008, what is in them goes through an internal
/// listener with the routes, and from there through another one into tunnels to the endpoints, which are addresses with port.
pub fn waypoint(secrets: &Secrets, v1: &str, v2: &str) -> Value {
    let listeners = vec![terminate(secrets), inner(), originate()];
    let clusters = vec![
        to_internal(INNER, internal_address(INNER, None), None),
        to_internal("v1", internal_address(ORIGINATE, Some(v1)), Some(v1)),
        to_internal("v2", internal_address(ORIGINATE, Some(v2)), Some(v2)),
        tunnels(secrets),
    ];
    let mut all = bootstrap(Some(SocketAddr::from(([127, 0, 0, 1], 9901))), listeners, clusters);
    let extension = format!("{TYPES}.bootstrap.internal_listener.v3.InternalListener");
    all["bootstrap_extensions"] =
        json!([named("envoy.bootstrap.internal_listener", json!({ "@type": extension }))]);
    all
}

/// Tunnels of clients.
fn terminate(secrets: &Secrets) -> Value {
    let connect = json!([{ "upgrade_type": "CONNECT", "connect_config": {} }]);
    let manager = json!({
        "@type": http_manager(),
        "stat_prefix": "connect_terminate",
        "codec_type": "HTTP2",
        "http2_protocol_options": { "allow_connect": true, "max_concurrent_streams": STREAMS },
        "upgrade_configs": [{ "upgrade_type": "CONNECT" }],
        "http_filters": [router()],
        "route_config": { "virtual_hosts": [{
            "name": "all",
            "domains": ["*"],
            "routes": [{
                "match": { "connect_matcher": {} },
                "route": { "cluster": INNER, "upgrade_configs": connect },
            }],
        }] },
    });
    let mut tls = tls("DownstreamTlsContext", secrets);
    tls["typed_config"]["require_client_certificate"] = true.into();
    json!({
        "name": "connect_terminate",
        "address": { "socket_address": { "address": "0.0.0.0", "port_value": 15008 } },
        "connection_balance_config": { "exact_balance": {} },
        "filter_chains": [{
            "transport_socket": tls,
            "filters": [named("envoy.filters.network.http_connection_manager", manager)],
        }],
    })
}

/// The requests themselves.
fn inner() -> Value {
    let manager = json!({
        "@type": http_manager(),
        "stat_prefix": "main",
        "access_log": access_log(),
        NORMALIZE: true,
        "http_filters": [router()],
        "route_config": route_config(0),
    });
    json!({
        "name": INNER,
        "internal_listener": {},
        "filter_chains": [{ "filters": [named("envoy.filters.network.http_connection_manager", manager)] }],
    })
}

/// Into tunnels.
fn originate() -> Value {
    let proxy = json!({
        "@type": format!("{TYPES}.filters.network.tcp_proxy.v3.TcpProxy"),
        "stat_prefix": ORIGINATE,
        "cluster": ORIGINATE,
        "tunneling_config": { "hostname": "%DOWNSTREAM_LOCAL_ADDRESS%" },
    });
    let original = format!("{TYPES}.filters.listener.original_dst.v3.OriginalDst");
    json!({
        "name": ORIGINATE,
        "internal_listener": {},
        "use_original_dst": false,
        "listener_filters": [named(ORIGINAL_DST, json!({ "@type": original }))],
        "filter_chains": [{ "filters": [named("envoy.filters.network.tcp_proxy", proxy)] }],
    })
}

fn internal_address(listener: &str, endpoint: Option<&str>) -> Value {
    let mut address = json!({ "server_listener_name": listener });
    if let Some(endpoint) = endpoint {
        address["endpoint_id"] = endpoint.into();
    }
    json!({ "envoy_internal_address": address })
}

/// A cluster of one internal address; `to` is handed on as where it should go.
fn to_internal(name: &str, address: Value, to: Option<&str>) -> Value {
    let mut endpoint = json!({ "endpoint": { "address": address } });
    let raw = format!("{TYPES}.transport_sockets.raw_buffer.v3.RawBuffer");
    let mut internal = json!({
        "@type": format!("{TYPES}.transport_sockets.internal_upstream.v3.InternalUpstreamTransport"),
        "transport_socket": named("envoy.transport_sockets.raw_buffer", json!({ "@type": raw })),
    });
    if let Some(to) = to {
        endpoint["metadata"] = json!({ "filter_metadata": { ORIGINAL_DST: { "local": to } } });
        internal["passthrough_metadata"] =
            json!([{ "kind": { "host": {} }, "name": ORIGINAL_DST }]);
    }
    json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": { "cluster_name": name, "endpoints": [{ "lb_endpoints": [endpoint] }] },
        "transport_socket": named("envoy.transport_sockets.internal_upstream", internal),
    })
}

/// HTTP/2 over mutual TLS to port 15008 of wherever a connection is for.
fn tunnels(secrets: &Secrets) -> Value {
    let options = json!({
        "@type": format!("{TYPES}.upstreams.http.v3.HttpProtocolOptions"),
        "explicit_http_config": {
            "http2_protocol_options": { "allow_connect": true, "max_concurrent_streams": STREAMS },
        },
    });
    json!({
        "name": ORIGINATE,
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "original_dst_lb_config": { "upstream_port_override": 15008 },
        "connect_timeout": "5s",
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options,
        },
        "transport_socket": tls("UpstreamTlsContext", secrets),
    })
}

/// Mutual TLS 1.3 with ALPN `h2`; the peer must be somebody of the mesh.
fn tls(context: &str, secrets: &Secrets) -> Value {
    let names = json!([{ "san_type": "URI", "matcher": { "prefix": "spiffe://cluster.local/" } }]);
    let config = json!({
        "@type": format!("{TYPES}.transport_sockets.tls.v3.{context}"),
        "common_tls_context": {
            "tls_params": {
                "tls_minimum_protocol_version": "TLSv1_3",
                "tls_maximum_protocol_version": "TLSv1_3",
            },
            "alpn_protocols": ["h2"],
            "tls_certificates": [{
                "certificate_chain": { "inline_string": secrets.chain },
                "private_key": { "inline_string": secrets.key },
            }],
            "validation_context": {
                "trusted_ca": { "inline_string": secrets.root },
                "match_typed_subject_alt_names": names,
            },
        },
    });
    named("envoy.transport_sockets.tls", config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_are_as_many_as_asked_for() {
        let check = |prefixes: usize, want: usize| {
            let config = route_config(prefixes);
            let routes = config["virtual_hosts"][0]["routes"].as_array().unwrap();
            assert_eq!(routes.len(), want, "{prefixes} prefixes");
            let via = &routes[want - 1]["response_headers_to_add"][0]["header"];
            assert_eq!(via["key"], TO_CLIENT.0);
        };
        check(0, 2);
        check(5, 5);
        check(5_000, 5_000);
        let file = route_file(5, "7");
        let first = &file["resources"][0]["virtual_hosts"][0]["routes"][0];
        assert_eq!(first["response_headers_to_add"][0]["header"]["value"], "7");
    }
}
