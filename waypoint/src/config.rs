//! Everything that can be set, in one place. Flags come before environment; unknown flags are errors.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use agent::flags::Traces;
use clap::Args;
use model::{Identity, Str};

/// Configuration of `waypoint proxy`.
#[derive(Args, Clone, Debug)]
pub struct Config {
    /// Namespace of this waypoint's pod.
    #[arg(long, env = "POD_NAMESPACE")]
    pub namespace: String,
    /// Name of this waypoint's pod.
    #[arg(long, env = "POD_NAME")]
    pub pod: String,
    /// Service account of this waypoint's pod.
    #[arg(long, env = "SERVICE_ACCOUNT")]
    pub service_account: String,
    /// Node on which the pod runs.
    #[arg(long, env = "NODE_NAME", default_value = "")]
    pub node: String,
    /// Address of the pod.
    #[arg(long, env = "INSTANCE_IP")]
    pub pod_ip: Option<IpAddr>,
    /// Control plane for configuration and certificates (delta xDS over TLS).
    #[arg(long, env = "XDS_ADDRESS", default_value = "https://istiod.istio-system.svc:15012")]
    pub xds_address: String,
    /// Name the control plane's certificate must carry.
    #[arg(long, env = "XDS_SERVER_NAME", default_value = "istiod.istio-system.svc")]
    pub xds_server_name: String,
    /// PEM file with the mesh's root certificates.
    #[arg(long, env = "ROOT_CERT", default_value = "/var/run/secrets/istio/root-cert.pem")]
    pub root_cert: PathBuf,
    /// File with the service account's token, read anew for every call.
    #[arg(long, env = "TOKEN_FILE", default_value = "/var/run/secrets/tokens/istio-token")]
    pub token_file: PathBuf,
    #[arg(long, env = "TRUST_DOMAIN", default_value = "cluster.local")]
    pub trust_domain: String,
    #[arg(long, env = "CLUSTER_ID", default_value = "Kubernetes")]
    pub cluster: String,
    #[arg(long, env = "NETWORK", default_value = "")]
    pub network: String,
    /// Folder for the last good configuration; survives a reboot.
    #[arg(long, env = "STATE_DIR", default_value = "/var/lib/ambit/waypoint")]
    pub state_dir: PathBuf,
    /// Folder for keys and certificates, on tmpfs; survives a restart, not a reboot.
    #[arg(long, env = "SECRET_DIR", default_value = "/run/ambit/waypoint")]
    pub secret_dir: PathBuf,
    /// Data threads. Default: one for each core that this process may use, at most 16.
    #[arg(long, env = "WAYPOINT_WORKER_THREADS")]
    pub workers: Option<usize>,
    /// Connections of clients that this proxy carries at once.
    #[arg(long, env = "MAX_CONNECTIONS", default_value_t = 100_000)]
    pub max_connections: usize,
    /// Seconds that requests and connections get after SIGTERM. What is left then is ended with the reason `draining`; so is
    /// everything at a second SIGTERM.
    #[arg(long, env = "DRAIN_SECONDS", default_value_t = 25)]
    pub drain_seconds: u64,
    /// Access log: `text`, `json` or `off`.
    #[arg(long, env = "ACCESS_LOG", default_value = "text")]
    pub access_log: String,
    /// Log lines: `text` or `json`.
    #[arg(long, env = "LOG_FORMAT", default_value = "text")]
    pub log_format: String,
    /// Log filter, for example `info,hbone=debug`.
    #[arg(long, env = "RUST_LOG", default_value = "info")]
    pub log_level: String,
    /// Address of the HBONE listener.
    #[arg(long, env = "HBONE_ADDR", default_value = "[::]:15008")]
    pub hbone_address: SocketAddr,
    /// Address of the admin page (localhost only).
    #[arg(long, env = "ADMIN_ADDR", default_value = "127.0.0.1:15000")]
    pub admin_address: SocketAddr,
    /// Address where metrics (15020) are served.
    #[arg(long, env = "STATS_ADDR", default_value = "[::]:15020")]
    pub stats_address: SocketAddr,
    /// Address where readiness (15021) is served.
    #[arg(long, env = "READINESS_ADDR", default_value = "[::]:15021")]
    pub readiness_address: SocketAddr,
    #[command(flatten)]
    pub traces: Traces,
}

impl Config {
    /// Who this waypoint is.
    pub fn identity(&self) -> Identity {
        Identity::new(
            self.trust_domain.as_str(),
            self.namespace.as_str(),
            self.service_account.as_str(),
        )
    }

    /// The pod's namespace and name, by which it finds its own workload.
    pub fn own_name(&self) -> (Str, Str) {
        (self.namespace.as_str().into(), self.pod.as_str().into())
    }

    /// Data threads to start. A waypoint has its pod to itself, and HTTP is what its cores are for.
    pub fn worker_threads(&self) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        self.workers.unwrap_or_else(|| cores.min(16)).clamp(1, 64)
    }

    /// How long live connections get at the end.
    pub fn drain(&self) -> Duration {
        Duration::from_secs(self.drain_seconds)
    }

    /// The first part of it, in which connections are told to go and may come: every answer says `connection: close`, every
    /// tunnel gets a GOAWAY after its request, and the listener stays, because clients hear late that we go. A fifth of the
    /// drain, and 5 s at most, which is what Kubernetes needs to take an endpoint out.
    pub fn farewell(&self) -> Duration {
        (self.drain() / 5).min(Duration::from_secs(5))
    }
}

/// How long something may take. What a route says about timeouts is beside these.
#[derive(Clone, Copy, Debug)]
pub struct Waits;

impl Waits {
    /// For TLS and HTTP/2 of a peer that dials us; a slow-loris does not get more.
    pub const HANDSHAKE: Duration = Duration::from_secs(10);
    /// For this pod's own workload and certificate, which may come a moment after the first client.
    pub const OWN: Duration = Duration::from_secs(5);
    /// For a Service of which the configuration is on its way: the client's node may have heard of it first. As long as a
    /// policy in flight is waited for.
    pub const SERVICE: Duration = Duration::from_secs(1);
    /// For a connection to an endpoint.
    pub const CONNECT: Duration = Duration::from_secs(10);
    /// For an endpoint while there is another to try. Most clients wait five seconds and more.
    pub const BEFORE_ANOTHER: Duration = Duration::from_secs(3);
    /// From the first byte of a request to the end of its headers, as long as Envoy's users set it.
    pub const HEAD: Duration = Duration::from_secs(30);
    /// A client's connection without a request is closed after this long, as Envoy does.
    pub const IDLE: Duration = Duration::from_secs(3600);
    /// How often a connection looks at the two limits before this.
    pub const LOOK: Duration = Duration::from_secs(5);
    /// For the first bytes of a client on a port of unknown protocol, before an endpoint is called that may speak first.
    /// What a client sends with its connection is here in a round trip; a server that speaks first is delayed by this much.
    pub const FIRST_BYTES: Duration = Duration::from_millis(20);
    /// For a server's `100 Continue`; then the body is sent all the same (RFC 9110, 10.1.1: not for ever).
    pub const CONTINUE: Duration = Duration::from_secs(1);
    /// For a mirrored request, from its beginning to the end of its answer, which nobody reads.
    pub const MIRROR: Duration = Duration::from_secs(15);
}
