//! The wire of the mesh: xDS, CA and ZDS messages, their translation to and from [`model`], and the
//! delta discovery protocol as state machines for both ends.
//!
//! Messages are generated from `proto/` (a test keeps `src/gen` and `proto/` together). Everything here is
//! a function over data: the caller owns sockets, clocks and tasks.
//!
//! Invariants: what is not understood is refused with the name of the resource and the field, never
//! guessed ([`codec`]); a client acknowledges only what its caller has put into force ([`client`]); a server
//! sends a policy before whatever refers to it and withdraws it after ([`server`]).

pub mod any;
pub mod client;
pub mod codec;
pub mod digest;
mod kind;
pub mod server;

// Prost's output is its own affair; a test keeps it equal to what `proto/` generates.
/// Messages of `type.googleapis.com/istio.workload.Address`.
#[allow(clippy::all, clippy::pedantic, missing_debug_implementations, reason = "generated")]
pub mod workload {
    include!("gen/istio.workload.rs");
}

/// Messages of `type.googleapis.com/istio.security.Authorization`.
#[allow(clippy::all, clippy::pedantic, missing_debug_implementations, reason = "generated")]
pub mod security {
    include!("gen/istio.security.rs");
}

/// The delta discovery protocol.
#[allow(clippy::all, clippy::pedantic, missing_debug_implementations, reason = "generated")]
pub mod discovery {
    include!("gen/envoy.service.discovery.v3.rs");
}

/// The certificate service.
#[allow(clippy::all, clippy::pedantic, missing_debug_implementations, reason = "generated")]
pub mod ca {
    include!("gen/istio.v1.auth.rs");
}

/// Node agent to node proxy.
#[allow(clippy::all, clippy::pedantic, missing_debug_implementations, reason = "generated")]
pub mod zds {
    include!("gen/istio.workload.zds.rs");
}

/// Ambit's own resources.
#[allow(clippy::all, clippy::pedantic, missing_debug_implementations, reason = "generated")]
pub mod ambit {
    include!("gen/ambit.v1.rs");
}

pub use kind::{Kind, MARKER_NAME, REFUSED_TYPE};

/// gRPC path of the delta discovery stream.
pub const DELTA_PATH: &str =
    "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
/// gRPC path of the certificate call.
pub const CREATE_CERTIFICATE_PATH: &str =
    "/istio.v1.auth.IstioCertificateService/CreateCertificate";
/// Key in the metadata of a certificate request that names the workload a node proxy asks for.
pub const IMPERSONATED_IDENTITY: &str = "ImpersonatedIdentity";

/// Largest request a server takes, in bytes: the versions of 500,000 resources after a reconnect.
pub const MAX_REQUEST_BYTES: usize = 64 << 20;
/// Largest response a client takes, in bytes: a mesh of 500,000 workloads in one response.
pub const MAX_RESPONSE_BYTES: usize = 256 << 20;
