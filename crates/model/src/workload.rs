//! Workloads: what runs behind an address. Fields follow `istio.workload.Workload`.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use crate::{Identity, PolicyKey, ServiceKey, ServicePort, Str};

/// The mesh-wide unique name of a workload: `cluster/group/kind/namespace/name[/section]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WorkloadUid(pub Str);

impl fmt::Display for WorkloadUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An address on one network; the same IP may mean something else on another network.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetworkAddress {
    pub network: Str,
    pub ip: IpAddr,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    pub uid: WorkloadUid,
    pub name: Str,
    pub namespace: Str,
    pub cluster: Str,
    pub network: Str,
    pub trust_domain: Str,
    pub service_account: Str,
    /// IPs of the workload on its network. Several for dual stack.
    pub addresses: Arc<[IpAddr]>,
    /// A DNS name in place of addresses, for endpoints that are resolved on demand. Empty: none.
    pub hostname: Str,
    pub node: Str,
    pub protocol: TunnelProtocol,
    /// The workload terminates HBONE itself; no proxy stands before it.
    pub native_tunnel: bool,
    pub application_tunnel: Option<ApplicationTunnel>,
    pub locality: Locality,
    pub health: Health,
    pub network_mode: NetworkMode,
    /// Weight in load balancing; at least 1.
    pub capacity: u32,
    pub canonical_name: Str,
    pub canonical_revision: Str,
    /// Name of the owner (`Deployment` name and so on).
    pub workload_name: Str,
    pub workload_kind: WorkloadKind,
    pub waypoint: Option<GatewayAddress>,
    pub network_gateway: Option<GatewayAddress>,
    /// The Services this workload is an endpoint of, with the ports it serves there.
    pub services: Arc<[(ServiceKey, Arc<[ServicePort]>)]>,
    /// Selector policies that select this workload. Namespace and mesh policies are found by scope.
    pub policies: Arc<[PolicyKey]>,
}

impl Workload {
    pub fn identity(&self) -> Identity {
        Identity {
            trust_domain: self.trust_domain.clone(),
            namespace: self.namespace.clone(),
            service_account: self.service_account.clone(),
        }
    }

    /// A workload with nothing but a name, HBONE-less and healthy; fields are filled in by the caller.
    pub fn named(uid: impl Into<Str>, namespace: impl Into<Str>, name: impl Into<Str>) -> Self {
        let empty: Str = "".into();
        let name: Str = name.into();
        Self {
            uid: WorkloadUid(uid.into()),
            workload_name: name.clone(),
            canonical_name: name.clone(),
            name,
            namespace: namespace.into(),
            cluster: "Kubernetes".into(),
            network: empty.clone(),
            trust_domain: "cluster.local".into(),
            service_account: "default".into(),
            addresses: Arc::new([]),
            hostname: empty.clone(),
            node: empty,
            protocol: TunnelProtocol::None,
            native_tunnel: false,
            application_tunnel: None,
            locality: Locality::default(),
            health: Health::Healthy,
            network_mode: NetworkMode::Standard,
            capacity: 1,
            canonical_revision: "latest".into(),
            workload_kind: WorkloadKind::Pod,
            waypoint: None,
            network_gateway: None,
            services: Arc::new([]),
            policies: Arc::new([]),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TunnelProtocol {
    /// Plain TCP.
    None,
    /// HTTP/2 CONNECT over mTLS on port 15008.
    Hbone,
    /// The control plane said something about this workload that this proxy cannot read. Nothing is sent to it and
    /// nothing reaches it: plaintext in place of what was meant would be a way around the mesh.
    Unreadable,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Health {
    Healthy,
    Unhealthy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NetworkMode {
    Standard,
    /// The workload shares its node's addresses: it is never found by IP.
    HostNetwork,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WorkloadKind {
    Deployment,
    CronJob,
    Pod,
    Job,
}

impl WorkloadKind {
    /// The word used in `baggage` and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Deployment => "deployment",
            Self::CronJob => "cronjob",
            Self::Pod => "pod",
            Self::Job => "job",
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Locality {
    pub region: Option<Str>,
    pub zone: Option<Str>,
    pub subzone: Option<Str>,
}

/// How the application wants to be told the original peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ApplicationTunnel {
    /// PROXY protocol v2 before the application bytes.
    pub proxy_protocol: bool,
    /// Port to use in place of the original one.
    pub port: Option<u16>,
}

/// Where a waypoint or gateway is reached.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct GatewayAddress {
    pub destination: GatewayDestination,
    /// Port of its HBONE listener.
    pub hbone_port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum GatewayDestination {
    Service(ServiceKey),
    Address(NetworkAddress),
}
