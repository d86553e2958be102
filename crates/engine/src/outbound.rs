//! Where does a connection that a pod opens go, and how?

use std::net::SocketAddr;
use std::sync::Arc;

use model::{Identity, Refusal, Service, Snapshot, Workload};

/// What is known of a connection that a captured pod opened.
#[derive(Clone, Debug)]
pub struct OutboundFacts<'a> {
    pub source: &'a Workload,
    /// Where the application wanted to go.
    pub destination: SocketAddr,
}

#[derive(Clone, Debug)]
pub enum OutboundPlan {
    /// Not a destination of the mesh: plain TCP to the original address.
    Passthrough,
    /// Try the candidates in order until one connects. Never empty.
    Connect { service: Option<Arc<Service>>, candidates: Vec<Candidate> },
    Refuse(Refusal),
}

/// One endpoint to try.
#[derive(Clone, Debug)]
pub struct Candidate {
    pub workload: Arc<Workload>,
    /// The endpoint's own address and target port: the CONNECT authority, or the plain TCP destination.
    pub target: SocketAddr,
    pub transport: Transport,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Transport {
    Plain,
    /// HBONE to `gateway`; its certificate must show one of `expected`.
    Hbone { gateway: SocketAddr, expected: Vec<Identity> },
}

/// Plans one outbound connection. `rand` decides among equals; the same input gives the same plan.
pub fn plan_outbound(_snapshot: &Snapshot, _facts: &OutboundFacts<'_>, _rand: u64) -> OutboundPlan {
    todo!()
}
