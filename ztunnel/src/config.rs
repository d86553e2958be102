//! Everything that can be set, in one place. Flags come before environment; unknown flags are errors.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use agent::flags::Traces;
use clap::Args;

use crate::istio::Seam;

/// Configuration of `ztunnel proxy`.
#[derive(Args, Clone, Debug)]
pub struct Config {
    /// Name of the node this proxy serves.
    #[arg(long, env = "NODE_NAME")]
    pub node: String,
    /// Control plane for configuration (delta xDS over TLS).
    #[arg(long, env = "XDS_ADDRESS", default_value = "https://istiod.istio-system.svc:15012")]
    pub xds_address: String,
    /// Name the control plane's certificate must carry.
    #[arg(long, env = "XDS_SERVER_NAME", default_value = "istiod.istio-system.svc")]
    pub xds_server_name: String,
    /// PEM file with the mesh's root certificates.
    #[arg(long, env = "ROOT_CERT")]
    pub root_cert: PathBuf,
    /// Unix socket (SOCK_SEQPACKET) of the node agent that hands over pods.
    #[arg(long, env = "INPOD_UDS", default_value = "/var/run/ztunnel/ztunnel.sock")]
    pub zds_socket: PathBuf,
    /// Folder for the last good configuration; survives a reboot.
    #[arg(long, env = "STATE_DIR", default_value = "/var/lib/ambit/ztunnel")]
    pub state_dir: PathBuf,
    /// Folder for keys and certificates, on tmpfs; survives a restart, not a reboot.
    #[arg(long, env = "SECRET_DIR", default_value = "/run/ambit/ztunnel")]
    pub secret_dir: PathBuf,
    /// Inherited file descriptor with a one-time node token, one line.
    #[arg(long)]
    pub token_fd: Option<i32>,
    /// Inherited file descriptor that gets a line once this proxy is ready to serve.
    #[arg(long)]
    pub ready_fd: Option<i32>,
    #[arg(long, env = "CLUSTER_ID", default_value = "Kubernetes")]
    pub cluster: String,
    #[arg(long, env = "NETWORK", default_value = "")]
    pub network: String,
    #[arg(long, env = "TRUST_DOMAIN", default_value = "cluster.local")]
    pub trust_domain: String,
    /// Answer DNS questions for names of the mesh; `false` forwards all of them to the pods' own resolvers. Whether
    /// questions come here at all is the node agent's choice.
    #[arg(long, env = "ISTIO_META_DNS_CAPTURE", default_value_t = true, action = clap::ArgAction::Set)]
    pub dns_proxy: bool,
    /// Namespaces (comma-separated, `*` for all) whose pods on this node are joined without a tunnel when they call each
    /// other: both ends must be listed, and a PeerAuthentication that demands mutual TLS goes first. Default: none, every
    /// connection is encrypted.
    #[arg(long, env = "SAME_NODE_DIRECT", value_delimiter = ',', value_name = "NAMESPACE")]
    pub same_node_direct: Vec<String>,
    /// The zone of the cluster's own names.
    #[arg(long, env = "CLUSTER_DOMAIN", default_value = "cluster.local")]
    pub cluster_domain: String,
    /// Data threads. Default: one for every two cores that this process may use, at most 8.
    #[arg(long, env = "ZTUNNEL_WORKER_THREADS")]
    pub workers: Option<usize>,
    /// Connections that this proxy carries at once, all pods together.
    #[arg(long, env = "MAX_CONNECTIONS", default_value_t = 200_000)]
    pub max_connections: usize,
    /// Seconds that live connections get after SIGTERM. What is left then is ended with the reason `draining`; so is
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
    /// Address of the admin page (localhost only).
    #[arg(long, env = "ADMIN_ADDR", default_value = "127.0.0.1:15000")]
    pub admin_address: std::net::SocketAddr,
    /// Address where metrics (15020) are served.
    #[arg(long, env = "STATS_ADDR", default_value = "[::]:15020")]
    pub stats_address: std::net::SocketAddr,
    /// Address where readiness (15021) is served.
    #[arg(long, env = "READINESS_ADDR", default_value = "[::]:15021")]
    pub readiness_address: std::net::SocketAddr,
    #[command(flatten)]
    pub traces: Traces,
    /// Started the way Istio's DaemonSet starts its proxy: another login, and istio-cni's capture in the pods.
    #[arg(skip)]
    pub istio: Option<Box<Seam>>,
}

impl Config {
    /// How connections of the pods come to our listeners.
    pub fn capture(&self) -> Capture {
        if self.istio.is_some() { Capture::Redirect } else { Capture::Tproxy }
    }

    /// Data threads to start. The applications need cores too, and fewer threads share tunnels better:
    /// on two cores, one thread took 17 to 30 % less CPU per small request than two. More than 8 on one
    /// node gained nothing in Istio's experience, and every thread costs listeners in every pod.
    pub fn worker_threads(&self) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        self.workers.unwrap_or_else(|| cores.div_ceil(2).min(8)).clamp(1, 64)
    }
}

/// How connections of the pods come to our listeners.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capture {
    /// By our own rules (`net::capture`): an accepted socket's local address is where the client wanted to go.
    Tproxy,
    /// By istio-cni's rules: the destination is rewritten, connection tracking knows the original one, and answers to
    /// connections in a client's name come back by the mark that those rules put on the connection.
    Redirect,
}

/// How long a new connection waits for what is still on its way.
#[derive(Clone, Copy, Debug)]
pub struct Waits;

impl Waits {
    /// For a policy that a workload names (DESIGN invariant 3).
    pub const POLICY: Duration = Duration::from_secs(1);
    /// For the pod's own workload: a pod's first connection may be faster than its address (Istio: 5 s).
    pub const WORKLOAD: Duration = Duration::from_secs(5);
    /// For the pod's first certificate.
    pub const CERTIFICATE: Duration = Duration::from_secs(5);
    /// For TCP to the application or a plaintext destination. Shorter than a client's own patience.
    pub const CONNECT: Duration = Duration::from_secs(10);
    /// For an endpoint while there is another to try. Most clients wait five seconds and more.
    pub const BEFORE_ANOTHER: Duration = Duration::from_secs(3);
    /// For TLS and HTTP/2 of a peer that dials us; a slow-loris does not get more.
    pub const HANDSHAKE: Duration = Duration::from_secs(10);
    /// For the first request on a new tunnel when this proxy is going: it was dialled for a request, which is on its way.
    pub const FIRST_REQUEST: Duration = Duration::from_secs(1);
    /// At the start, with a configuration from disk, for the control plane's: connections wait in the listeners of the
    /// process before. What is on disk is seldom older than a second, and is judged again when the newer comes.
    pub const NEWER_CONFIGURATION: Duration = Duration::from_millis(500);
    /// At the start, with nothing on disk. After it pods are taken all the same, and their connections wait and are refused.
    pub const FIRST_CONFIGURATION: Duration = Duration::from_secs(5);
}

/// True when the address is the pod's own, or loopback.
pub fn is_local(addresses: &[IpAddr], ip: IpAddr) -> bool {
    ip.is_loopback() || addresses.contains(&ip)
}
