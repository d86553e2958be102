//! Services: a name and virtual addresses for a set of workloads. Fields follow `istio.workload.Service`.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use crate::{GatewayAddress, Str};

/// The mesh-wide key of a service: `namespace/hostname`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceKey {
    pub namespace: Str,
    /// Fully qualified, for example `web.shop.svc.cluster.local`.
    pub hostname: Str,
}

impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.hostname)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    pub key: ServiceKey,
    /// The short name.
    pub name: Str,
    /// Virtual addresses. Empty for headless Services.
    pub vips: Arc<[Vip]>,
    pub ports: Arc<[ServicePort]>,
    /// SPIFFE names that an endpoint may show beside its own identity.
    pub subject_alt_names: Arc<[Str]>,
    pub waypoint: Option<GatewayAddress>,
    pub load_balancing: LoadBalancing,
    pub families: FamilyPolicy,
}

/// A virtual address or range on one network.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Vip {
    pub network: Str,
    pub ip: IpAddr,
    /// Prefix length; the full width for a single address.
    pub prefix: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ServicePort {
    /// The port that clients call.
    pub service_port: u16,
    /// The port of the endpoint. 0 on a Service: named, each endpoint states its own.
    pub target_port: u16,
    pub app_protocol: AppProtocol,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum AppProtocol {
    #[default]
    Unknown,
    Http11,
    Http2,
    Grpc,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadBalancing {
    pub mode: RoutingMode,
    /// Scopes that an endpoint should share with the client, most important first.
    pub preference: Arc<[LocalityScope]>,
    pub health: HealthPolicy,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum RoutingMode {
    /// Any endpoint.
    #[default]
    Any,
    /// Only endpoints that share every preferred scope.
    Strict,
    /// Endpoints that share the most scopes; further ones when there are none.
    Failover,
    /// The original destination address, untouched.
    Passthrough,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LocalityScope {
    Region,
    Zone,
    Subzone,
    Node,
    Cluster,
    Network,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum HealthPolicy {
    #[default]
    OnlyHealthy,
    /// `publishNotReadyAddresses`.
    AllowAll,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum FamilyPolicy {
    #[default]
    Automatic,
    Ipv4Only,
    Ipv6Only,
    Dual,
}
