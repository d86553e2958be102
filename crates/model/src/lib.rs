//! What a proxy knows about the mesh, as plain immutable data.
//!
//! Ids are newtypes that always carry what keeps two meshes apart (network, trust domain, cluster).
//! [`Snapshot`] is the one value a proxy publishes: every table, persistent, so that one change costs
//! the path to that entry and not a copy of the mesh.
//!
//! Invariants: no IO, no clock, no random source, no environment, no `async`; a reference that cannot
//! be resolved is reported by the lookup as missing and never skipped ([`Snapshot::policies_of`]).

pub mod http;
mod identity;
mod policy;
mod provenance;
mod reason;
mod service;
mod snapshot;
mod workload;

pub use identity::{Identity, IdentityError};
pub use policy::{Action, IpPrefix, Match, Policy, PolicyKey, Rule, Scope, StringMatch};
pub use provenance::Provenance;
pub use reason::{Reason, Refusal};
pub use service::{
    AppProtocol, FamilyPolicy, HealthPolicy, LoadBalancing, LocalityScope, RoutingMode, Service,
    ServiceKey, ServicePort, Vip,
};
pub use snapshot::{Change, ConfigVersion, Endpoint, Endpoints, PoliciesOf, Snapshot};
pub use workload::{
    ApplicationTunnel, GatewayAddress, GatewayDestination, Health, Locality, NetworkAddress,
    NetworkMode, TunnelProtocol, Workload, WorkloadKind, WorkloadUid,
};

/// A shared immutable string. Equal strings of one configuration usually share one allocation.
pub type Str = std::sync::Arc<str>;

/// The port of HBONE (HTTP/2 CONNECT over mTLS), fixed by Istio ambient.
pub const HBONE_PORT: u16 = 15008;
/// Outbound capture: where connections that a pod opens arrive.
pub const OUTBOUND_PORT: u16 = 15001;
/// Inbound capture: where plaintext connections to a pod arrive.
pub const INBOUND_PLAINTEXT_PORT: u16 = 15006;
/// DNS capture.
pub const DNS_PORT: u16 = 15053;

/// Ports of a pod that belong to the mesh: nobody may reach them through a tunnel or a redirect,
/// or a pod could make its proxy call itself.
pub const MESH_PORTS: [u16; 4] = [OUTBOUND_PORT, INBOUND_PLAINTEXT_PORT, HBONE_PORT, DNS_PORT];
