//! One caller to one destination, as the proxies of both nodes would decide it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use engine::{Allowed, Candidate, InboundFacts, OutboundFacts, OutboundPlan, Transport, Verdict};
use model::{Provenance, Refusal, Snapshot, TunnelProtocol, Workload};
use serde::Serialize;

/// What happens between one caller and one endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Path {
    /// `namespace/name` of the calling pod.
    pub(super) caller: String,
    /// What the caller's proxy proves; absent for plaintext.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) identity: Option<String>,
    /// `namespace/name` of the pod that is reached; absent where none is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) endpoint: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) address: Option<SocketAddr>,
    pub(super) transport: Wire,
    /// Identities of which the endpoint must prove one.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) expected: Vec<String>,
    pub(super) allowed: bool,
    /// The code of a refusal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) reason: Option<&'static str>,
    /// In words.
    pub(super) why: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) help: Option<&'static str>,
    /// The policy that decided.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) policy: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) rule: Option<RuleAt>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) enum Wire {
    #[serde(rename = "HBONE")]
    Hbone,
    #[serde(rename = "plaintext")]
    Plaintext,
    /// Refused before anything is sent.
    #[serde(rename = "none")]
    Nothing,
}

/// Where a rule is written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct RuleAt {
    pub(super) object: String,
    pub(super) field: String,
    pub(super) origin: String,
}

/// Every path that a connection of the caller to this destination may take.
pub(super) fn walk(
    snapshot: &Snapshot,
    caller: &Arc<Workload>,
    destination: SocketAddr,
) -> Vec<Path> {
    // Outside the mesh there is no proxy, but the node's service addresses pick among the same endpoints.
    match engine::plan_every_endpoint(snapshot, &OutboundFacts { source: caller, destination }) {
        OutboundPlan::Refuse(refusal) => vec![refused(caller, &refusal)],
        OutboundPlan::Passthrough => vec![passthrough(snapshot, caller, destination)],
        OutboundPlan::Connect { candidates, .. } => {
            candidates.iter().map(|c| to_endpoint(snapshot, caller, c)).collect()
        }
    }
}

/// A path that ends before it begins.
pub(super) fn refused(caller: &Workload, refusal: &Refusal) -> Path {
    no(blank(caller), refusal)
}

/// A destination outside the mesh, to which the mesh adds nothing.
fn passthrough(snapshot: &Snapshot, caller: &Workload, destination: SocketAddr) -> Path {
    let pod = snapshot.workload_at(&caller.network, destination.ip());
    Path {
        endpoint: pod.map(|w| name(w)),
        address: Some(destination),
        transport: Wire::Plaintext,
        allowed: true,
        why: outside().to_owned(),
        ..blank(caller)
    }
}

fn to_endpoint(snapshot: &Snapshot, caller: &Workload, candidate: &Candidate) -> Path {
    let endpoint = &candidate.workload;
    let mut path = Path {
        endpoint: Some(name(endpoint)),
        address: Some(candidate.target),
        transport: Wire::Plaintext,
        ..blank(caller)
    };
    if endpoint.protocol == TunnelProtocol::None {
        return Path { allowed: true, why: outside().to_owned(), ..path };
    }
    let identity = caller.identity();
    let mut peer = None;
    if let (TunnelProtocol::Hbone, Transport::Hbone { expected, .. }) =
        (caller.protocol, &candidate.transport)
    {
        peer = Some(&identity);
        path.transport = Wire::Hbone;
        path.identity = Some(identity.to_string());
        path.expected = expected.iter().map(ToString::to_string).collect();
    }
    let facts = InboundFacts {
        workload: endpoint,
        destination: candidate.target,
        source_ip: address_of(caller, candidate.target.ip()),
        peer,
    };
    match engine::authorize(snapshot, &facts) {
        Verdict::Allow(Allowed::NoAllowPolicies) => Path {
            allowed: true,
            why: "no ALLOW policy applies to the endpoint".to_owned(),
            ..path
        },
        Verdict::Allow(Allowed::By { policy, provenance }) => Path {
            allowed: true,
            why: format!("ALLOW policy {policy} matches"),
            policy: Some(policy.to_string()),
            rule: Some(rule_at(&provenance)),
            ..path
        },
        Verdict::Deny(refusal) | Verdict::Pending(refusal) => no(path, &refusal),
    }
}

fn no(path: Path, refusal: &Refusal) -> Path {
    Path {
        allowed: false,
        reason: Some(refusal.reason.code()),
        why: refusal.message.clone(),
        help: Some(refusal.reason.help()),
        policy: refusal.policy.as_ref().map(ToString::to_string),
        rule: refusal.provenance.as_ref().map(rule_at),
        ..path
    }
}

fn blank(caller: &Workload) -> Path {
    Path {
        caller: name(caller),
        identity: None,
        endpoint: None,
        address: None,
        transport: Wire::Nothing,
        expected: Vec::new(),
        allowed: false,
        reason: None,
        why: String::new(),
        help: None,
        policy: None,
        rule: None,
    }
}

const fn outside() -> &'static str {
    "the endpoint is outside the mesh, where no policy is enforced"
}

/// The address that the endpoint sees: of the family of the connection.
fn address_of(caller: &Workload, to: IpAddr) -> IpAddr {
    let same = caller.addresses.iter().find(|ip| ip.is_ipv4() == to.is_ipv4());
    same.or_else(|| caller.addresses.first()).copied().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED))
}

fn name(w: &Workload) -> String {
    format!("{}/{}", w.namespace, w.name)
}

fn rule_at(p: &Provenance) -> RuleAt {
    RuleAt {
        object: p.object.to_string(),
        field: p.field.to_string(),
        origin: p.origin.to_string(),
    }
}
