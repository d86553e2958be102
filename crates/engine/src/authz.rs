//! May this peer connect to this workload? Istio's layer-4 semantics, without its fail-open gaps.
//!
//! Order: any DENY that matches denies; with no ALLOW policy at all the answer is allow; any ALLOW that
//! matches allows; otherwise deny. A policy that the workload names and nobody has makes the answer
//! `Pending`; a matching DENY that *is* known still denies at once.

use std::net::{IpAddr, SocketAddr};

use model::{Identity, PolicyKey, Provenance, Refusal, Snapshot, Workload};

/// What is known of a connection that arrives at a workload.
#[derive(Clone, Debug)]
pub struct InboundFacts<'a> {
    pub workload: &'a Workload,
    /// Address and port of the workload that the peer wants.
    pub destination: SocketAddr,
    pub source_ip: IpAddr,
    /// From the verified peer certificate. `None`: plaintext.
    pub peer: Option<&'a Identity>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Allow(Allowed),
    Deny(Refusal),
    /// A policy this workload names has not arrived; wait at most a second, then refuse with the
    /// `Refusal` ([`model::Reason::PolicyMissing`]).
    Pending(Refusal),
}

/// Why the answer is yes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Allowed {
    /// No ALLOW policy applies to this workload.
    NoAllowPolicies,
    /// This rule matched.
    By { policy: PolicyKey, provenance: Provenance },
}

/// Decides on a connection. Port level PeerAuthentication arrives as DENY policies that match peers
/// without a principal (`model::StringMatch::Presence` under `not_principals`).
pub fn authorize(_snapshot: &Snapshot, _facts: &InboundFacts<'_>) -> Verdict {
    todo!()
}
