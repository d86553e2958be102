//! `ztunnel proxy ztunnel`: started as Istio's DaemonSet starts its own, from Istio's environment and files.
//!
//! The environment comes as an argument, so that reading it is a function. What Istio's proxy has and this one has not is
//! refused by name where it would change who may talk to whom or what is reached, and named in a warning where it only
//! tunes. Our own flags and variables do not count here.
//!
//! Invariant: no variable of Istio's is passed over in silence unless this proxy does what it says.

mod values;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use agent::control_plane::{CERTIFICATE_LIFETIME, Proxy, RootCert, Server, Token};
use agent::flags::Traces;
use tonic::metadata::{AsciiMetadataKey, AsciiMetadataValue};

use crate::config::Config;
pub use values::EnvError;
use values::{duration, endpoint, truth, workers};

/// Where the DaemonSet mounts the root of the control plane and the token, relative to the container's root.
const ROOT_CERT: &str = "./var/run/secrets/istio/root-cert.pem";
const TOKEN: &str = "./var/run/secrets/tokens/istio-token";
/// Where the node agent of Istio listens.
const ZDS_SOCKET: &str = "/var/run/ztunnel/ztunnel.sock";
const IN_CLUSTER: &str = "istiod.istio-system.svc:15012";
const ON_THIS_MACHINE: &str = "localhost:15012";
/// The mark of Istio's rules, and of all our sockets.
const PACKET_MARK: &str = "1337";
/// Prefix of what is told to the control plane about this proxy.
const META: &str = "ISTIO_META_";
/// Where distributions keep the roots that a machine believes, for `SYSTEM`.
const SYSTEM_ROOTS: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];
/// Kubernetes kills at the end of the grace period: what is left then ends without a word.
const LAST_SECONDS: u64 = 5;

/// Variables that this proxy obeys by being as it is. Another value is refused.
const FIXED: [(&str, &[&str], &str); 12] = [
    ("PROXY_MODE", &["shared"], "this proxy serves the pods of a node, which is `shared`"),
    ("INPOD_ENABLED", &["true", "1"], "this proxy works inside the pods' network namespaces only"),
    ("INPOD_PORT_REUSE", &["true", "1"], "its threads share the ports of a pod"),
    ("PACKET_MARK", &[PACKET_MARK, "0x539"], "the marks of its sockets are fixed"),
    ("ENABLE_PROXY", &["true", "1"], "it is a proxy and nothing else"),
    ("FAKE_CA", &["false", "0"], "it takes certificates from a CA only"),
    ("UNSTABLE_ENABLE_SOCKS5", &["false", "0"], "it has no SOCKS5 port"),
    ("TRANSPARENT_NETWORK_POLICIES", &["false", "0"], "tunnels go to port 15008"),
    ("ISTIO_META_DNS_PROXY_ADDR", &["localhost:15053", "127.0.0.1:15053"], "DNS is served there"),
    ("ENABLE_ORIG_SRC", &["true", "1"], "applications see the client's address"),
    ("LOCALHOST_APP_TUNNEL", &["true", "1"], "application tunnels are not served elsewhere"),
    ("TLS12_ENABLED", &["false", "0"], "tunnels use TLS 1.3"),
];
/// Variables that must be absent or empty: not doing what they say would open or break something.
const REFUSED: [(&str, &str); 6] = [
    ("CRL_PATH", "revocation lists are not checked"),
    ("COMPLIANCE_POLICY", "there is one set of algorithms"),
    ("LOCAL_XDS_PATH", "configuration comes from the control plane"),
    ("LOCAL_XDS", "configuration comes from the control plane"),
    ("PROXY_CONFIG", "set XDS_ADDRESS, ISTIO_META_… and ZTUNNEL_WORKER_THREADS instead"),
    ("PREFERED_SERVICE_NAMESPACE", "a name means the client's own namespace, then nothing else"),
];
/// Variables that tune what works here without them.
const TUNING: [&str; 13] = [
    "XDS_ON_DEMAND",
    "HTTP2_STREAM_WINDOW_SIZE",
    "HTTP2_CONNECTION_WINDOW_SIZE",
    "HTTP2_FRAME_SIZE",
    "POOL_MAX_STREAMS_PER_CONNECTION",
    "POOL_UNUSED_RELEASE_TIMEOUT",
    "KEEPALIVE_TIME",
    "KEEPALIVE_INTERVAL",
    "KEEPALIVE_RETRIES",
    "KEEPALIVE_ENABLED",
    "USER_TIMEOUT_ENABLED",
    "AUTHZ_POLICY_INFO_LOGGING",
    "ENABLE_RESPONSE_BAGGAGE",
];

/// What only Istio's way of starting brings.
#[derive(Clone, Debug)]
pub struct Seam {
    pub xds: Server,
    pub ca: Server,
    pub token: Token,
    pub proxy: Proxy,
    pub certificate_lifetime: Duration,
    /// Whom to ask what the mesh does not know: istio-cni's rules hide whom the pod asked. Istio's proxy asks its own
    /// resolver too.
    pub resolver: SocketAddr,
    /// To be said once there is a log.
    pub warnings: Vec<String>,
}

/// True for the command line that Istio's DaemonSet gives.
pub fn is_call(args: &[String]) -> bool {
    matches!(args, [_, proxy, ztunnel, ..] if proxy == "proxy" && ztunnel == "ztunnel")
}

/// Reads Istio's environment, and the proxy's own `/etc/resolv.conf`.
pub fn config(
    env: impl IntoIterator<Item = (String, String)>,
    resolv_conf: &str,
) -> Result<Config, EnvError> {
    let env = Env(env.into_iter().collect());
    env.check_the_rest()?;
    let seam = env.seam(resolv_conf)?;
    let zds_socket = PathBuf::from(env.or("INPOD_UDS", ZDS_SOCKET));
    // The one place of the node that the DaemonSet mounts, and on a tmpfs of the node.
    let home = zds_socket.parent().unwrap_or_else(|| Path::new("/")).join("ambit");
    let folder = |name, sub| env.get(name).map_or_else(|| home.join(sub), PathBuf::from);
    let any: IpAddr = if env.truth("IPV6_ENABLED", true)? {
        Ipv6Addr::UNSPECIFIED.into()
    } else {
        Ipv4Addr::UNSPECIFIED.into()
    };
    Ok(Config {
        node: seam.proxy.node.clone(),
        xds_address: seam.xds.address.clone(),
        xds_server_name: seam.xds.name.clone(),
        // Said per server by the seam.
        root_cert: PathBuf::new(),
        zds_socket,
        state_dir: folder("STATE_DIR", "state"),
        secret_dir: folder("SECRET_DIR", "secret"),
        token_fd: None,
        ready_fd: None,
        cluster: env.cluster(),
        network: env.or("NETWORK", "").to_owned(),
        trust_domain: env.or("TRUST_DOMAIN", "cluster.local").to_owned(),
        dns_proxy: env.truth("ISTIO_META_DNS_CAPTURE", true)?,
        same_node_direct: env.list("SAME_NODE_DIRECT"),
        cluster_domain: env.or("CLUSTER_DOMAIN", "cluster.local").to_owned(),
        workers: env.workers()?,
        max_connections: env.number("MAX_CONNECTIONS", 200_000)?,
        drain_seconds: env.drain_seconds()?,
        access_log: env.or("ACCESS_LOG", "text").to_owned(),
        log_format: env.log_format()?,
        log_level: env.or("RUST_LOG", "info").to_owned(),
        admin_address: SocketAddr::from((Ipv4Addr::LOCALHOST, 15000)),
        stats_address: SocketAddr::new(any, 15020),
        readiness_address: SocketAddr::new(any, 15021),
        traces: env.traces(),
        istio: Some(Box::new(seam)),
    })
}

/// The environment. A variable that is empty counts as absent.
struct Env(BTreeMap<String, String>);

impl Env {
    fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(|value| value.trim()).filter(|value| !value.is_empty())
    }

    fn or<'a>(&'a self, name: &str, default: &'a str) -> &'a str {
        self.get(name).unwrap_or(default)
    }

    /// One that Kubernetes always gives.
    fn needed(&self, name: &'static str, what: &str) -> Result<String, EnvError> {
        let found = self.get(name).map(str::to_owned);
        found.ok_or_else(|| EnvError::missing(name, what))
    }

    fn list(&self, name: &str) -> Vec<String> {
        let parts = self.or(name, "").split(',').map(str::trim);
        parts.filter(|part| !part.is_empty()).map(str::to_owned).collect()
    }

    fn truth(&self, name: &str, default: bool) -> Result<bool, EnvError> {
        self.get(name).map_or(Ok(default), |value| truth(name, value))
    }

    fn number<T: std::str::FromStr>(&self, name: &str, default: T) -> Result<T, EnvError> {
        let Some(value) = self.get(name) else { return Ok(default) };
        value.parse().map_err(|_| EnvError::new(name, value, "a whole number is expected"))
    }

    fn seam(&self, resolv_conf: &str) -> Result<Seam, EnvError> {
        let default = if self.get("KUBERNETES_SERVICE_HOST").is_some() {
            IN_CLUSTER
        } else {
            ON_THIS_MACHINE
        };
        let xds = self.server(&XDS, default)?;
        let ca = self.server(&CA, default)?;
        let lifetime = self.get("SECRET_TTL").map(|value| duration("SECRET_TTL", value));
        Ok(Seam {
            xds,
            ca,
            token: self.token(),
            proxy: self.proxy()?,
            certificate_lifetime: lifetime.transpose()?.unwrap_or(CERTIFICATE_LIFETIME),
            resolver: nameserver(resolv_conf),
            warnings: self.warnings(),
        })
    }

    fn server(&self, names: &Names, default: &str) -> Result<Server, EnvError> {
        let (address, host) = endpoint(names.address, self.or(names.address, default))?;
        Ok(Server {
            address,
            name: self.get(names.other_name).map_or(host, str::to_owned),
            root: self.root(names.root)?,
            headers: self.headers(names.headers)?,
        })
    }

    /// A file, `SYSTEM`, or the certificates themselves.
    fn root(&self, name: &'static str) -> Result<RootCert, EnvError> {
        match self.or(name, ROOT_CERT) {
            pem if pem.contains("-----BEGIN") => Ok(RootCert::Pem(pem.to_owned())),
            "SYSTEM" => {
                let found = SYSTEM_ROOTS.iter().find(|path| Path::new(path).is_file());
                let words = "no file of system roots is here; name the file";
                let path = found.ok_or_else(|| EnvError::new(name, "SYSTEM", words))?;
                Ok(RootCert::File(path.into()))
            }
            path => Ok(RootCert::File(path.into())),
        }
    }

    /// A file, or what has the three parts of a JWT.
    fn token(&self) -> Token {
        match self.or("AUTH_TOKEN", TOKEN) {
            jwt if !jwt.contains('/') && jwt.matches('.').count() == 2 => {
                Token::Fixed(jwt.to_owned())
            }
            path => Token::File(path.into()),
        }
    }

    fn headers(
        &self,
        prefix: &str,
    ) -> Result<Vec<(AsciiMetadataKey, AsciiMetadataValue)>, EnvError> {
        let found = self.0.iter().filter_map(|(n, v)| Some((n, n.strip_prefix(prefix)?, v)));
        let header = |(name, key, value): (&String, &str, &String)| {
            let bad = |words| EnvError::new(name, value, words);
            let key = AsciiMetadataKey::from_bytes(key.to_ascii_lowercase().as_bytes());
            Ok((
                key.map_err(|_| bad("its name is no name of a header"))?,
                value.parse().map_err(|_| bad("its value cannot be a header's"))?,
            ))
        };
        found.map(header).collect()
    }

    fn proxy(&self) -> Result<Proxy, EnvError> {
        let ip = self.get("INSTANCE_IP").map(|value| {
            value.parse().map_err(|_| EnvError::new("INSTANCE_IP", value, "an address is expected"))
        });
        let meta = |(name, value): (&String, &String)| {
            Some((name.strip_prefix(META)?.to_owned(), value.clone()))
        };
        Ok(Proxy {
            node: self.needed("NODE_NAME", "the node's name (spec.nodeName)")?,
            pod: self.needed("POD_NAME", "this pod's name (metadata.name)")?,
            namespace: self.needed("POD_NAMESPACE", "this pod's namespace (metadata.namespace)")?,
            service_account: self
                .needed("SERVICE_ACCOUNT", "this pod's account (spec.serviceAccountName)")?,
            ip: ip.transpose()?,
            metadata: self.0.iter().filter_map(meta).collect(),
        })
    }

    fn traces(&self) -> Traces {
        let own = |name| self.or(name, "").to_owned();
        Traces {
            endpoint: own("OTEL_EXPORTER_OTLP_ENDPOINT"),
            protocol: own("OTEL_EXPORTER_OTLP_PROTOCOL"),
            headers: own("OTEL_EXPORTER_OTLP_HEADERS"),
            certificate: own("OTEL_EXPORTER_OTLP_CERTIFICATE"),
            service_name: own("OTEL_SERVICE_NAME"),
            resource: own("OTEL_RESOURCE_ATTRIBUTES"),
            sampler: own("OTEL_TRACES_SAMPLER"),
            sampler_arg: own("OTEL_TRACES_SAMPLER_ARG"),
        }
    }

    fn cluster(&self) -> String {
        let own = self.get("CLUSTER_ID").unwrap_or("Kubernetes");
        self.or("ISTIO_META_CLUSTER_ID", own).to_owned()
    }

    fn workers(&self) -> Result<Option<usize>, EnvError> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let cores = self.number("ZTUNNEL_CPU_LIMIT", cores)?.max(1);
        self.get("ZTUNNEL_WORKER_THREADS").map(|value| workers(value, cores)).transpose()
    }

    /// What live connections get after SIGTERM.
    fn drain_seconds(&self) -> Result<u64, EnvError> {
        const DEADLINE: &str = "CONNECTION_TERMINATION_DEADLINE";
        if let Some(value) = self.get(DEADLINE) {
            return Ok(duration(DEADLINE, value)?.as_secs());
        }
        let grace: u64 = self.number("TERMINATION_GRACE_PERIOD_SECONDS", 30)?;
        Ok(grace.saturating_sub(if grace > 2 * LAST_SECONDS { LAST_SECONDS } else { 1 }).max(1))
    }

    fn log_format(&self) -> Result<String, EnvError> {
        match self.or("LOG_FORMAT", "plain") {
            "plain" | "text" => Ok("text".to_owned()),
            "json" => Ok("json".to_owned()),
            other => Err(EnvError::new("LOG_FORMAT", other, "json or plain is expected")),
        }
    }

    fn check_the_rest(&self) -> Result<(), EnvError> {
        if self.get("PROXY_MODE") == Some("dedicated") {
            let words = "one proxy for one workload is not supported: start one proxy per node (`shared`, the default) \
                         with istio-cni beside it";
            return Err(EnvError::new("PROXY_MODE", "dedicated", words));
        }
        for (name, allowed, why) in FIXED {
            if let Some(value) = self.get(name)
                && !allowed.iter().any(|allowed| allowed.eq_ignore_ascii_case(value))
            {
                let words = format!("only {} is supported: {why}", allowed.join(" or "));
                return Err(EnvError::new(name, value, words));
            }
        }
        for (name, why) in REFUSED {
            if let Some(value) = self.get(name) {
                return Err(EnvError::new(name, value, format!("not supported: {why}")));
            }
        }
        Ok(())
    }

    fn warnings(&self) -> Vec<String> {
        let set = TUNING.iter().filter(|name| self.get(name).is_some());
        set.map(|name| format!("{name} is set and has no effect here")).collect()
    }
}

/// The first server of a `resolv.conf`; the C library's default when there is none.
fn nameserver(resolv_conf: &str) -> SocketAddr {
    let server = |line: &str| line.trim().strip_prefix("nameserver")?.trim().parse::<IpAddr>().ok();
    let found = resolv_conf.lines().find_map(server);
    SocketAddr::new(
        found.unwrap_or_else(|| Ipv4Addr::LOCALHOST.into()),
        net::capture::RESOLVER_PORT,
    )
}

/// The variables about one server.
struct Names {
    address: &'static str,
    other_name: &'static str,
    root: &'static str,
    headers: &'static str,
}

const XDS: Names = Names {
    address: "XDS_ADDRESS",
    other_name: "ALT_XDS_HOSTNAME",
    root: "XDS_ROOT_CA",
    headers: "XDS_HEADER_",
};
const CA: Names = Names {
    address: "CA_ADDRESS",
    other_name: "ALT_CA_HOSTNAME",
    root: "CA_ROOT_CA",
    headers: "CA_HEADER_",
};

#[cfg(test)]
mod tests;
