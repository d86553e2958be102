//! One caller to one destination, as the proxies of both nodes would decide it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use engine::{
    AdmitFacts, Allowed, Authority, Candidate, Claim, InboundFacts, OutboundFacts, OutboundPlan,
    Transport, Verdict,
};
use model::{Change, Identity, Provenance, Refusal, Service, Snapshot, TunnelProtocol, Workload};
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
    /// `namespace/name` of the waypoint's pod between them; absent where there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) waypoint: Option<String>,
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
    // Outside the mesh there is no proxy, but the node's service addresses pick among the same endpoints; nothing there knows
    // of waypoints.
    let unbound = (caller.protocol == TunnelProtocol::None).then(|| without_waypoints(snapshot));
    let snapshot = unbound.as_ref().unwrap_or(snapshot);
    match engine::plan_every_endpoint(snapshot, &OutboundFacts { source: caller, destination }) {
        OutboundPlan::Refuse(refusal) => vec![refused(caller, &refusal)],
        OutboundPlan::Passthrough => vec![passthrough(snapshot, caller, destination)],
        OutboundPlan::Connect { candidates, .. } => {
            let paths = |c: &Candidate| {
                if c.is_waypoint() {
                    through_waypoint(snapshot, caller, c)
                } else {
                    vec![to_endpoint(snapshot, &Leg::direct(caller), c)]
                }
            };
            candidates.iter().flat_map(paths).collect()
        }
    }
}

fn without_waypoints(snapshot: &Snapshot) -> Snapshot {
    let services = snapshot.services().filter(|s| s.waypoint.is_some());
    let services = services.map(|s| Service { waypoint: None, ..(**s).clone() });
    let workloads = snapshot.workloads().filter(|w| w.waypoint.is_some());
    let workloads = workloads.map(|w| Workload { waypoint: None, ..(**w).clone() });
    let changes: Vec<Change> = services
        .map(|s| Change::SetService(Arc::new(s)))
        .chain(workloads.map(|w| Change::SetWorkload(Arc::new(w))))
        .collect();
    snapshot.with(changes)
}

/// What becomes of a call that goes to a waypoint: the waypoint takes it and goes on, or does not. Its routes may send
/// a request elsewhere; this is the way to what was called.
fn through_waypoint(snapshot: &Snapshot, caller: &Arc<Workload>, to: &Candidate) -> Vec<Path> {
    let waypoint = &to.workload;
    let identity = caller.identity();
    let at_waypoint = |path: Path| Path {
        waypoint: Some(name(waypoint)),
        identity: Some(identity.to_string()),
        ..path
    };
    let authority = Authority::Address(to.target);
    let asked = AdmitFacts { own: waypoint, peer: &identity, authority };
    if let Err(refusal) = engine::admit(snapshot, &asked) {
        return vec![at_waypoint(refused(caller, &refusal))];
    }
    let facts = OutboundFacts { source: waypoint, destination: to.target };
    match engine::plan_every_endpoint(snapshot, &facts) {
        OutboundPlan::Refuse(refusal) => vec![at_waypoint(refused(caller, &refusal))],
        OutboundPlan::Passthrough => vec![at_waypoint(passthrough(snapshot, caller, to.target))],
        OutboundPlan::Connect { candidates, .. } => {
            let leg = Leg { caller, proxy: waypoint, client: Some(identity.clone()) };
            let paths = candidates.iter().map(|c| to_endpoint(snapshot, &leg, c));
            paths.map(at_waypoint).collect()
        }
    }
}

/// The last part of a way: from the caller, or from a waypoint that calls for it.
struct Leg<'a> {
    caller: &'a Workload,
    /// Who makes the connection.
    proxy: &'a Workload,
    /// Whom it names as its client.
    client: Option<Identity>,
}

impl<'a> Leg<'a> {
    const fn direct(caller: &'a Workload) -> Self {
        Self { caller, proxy: caller, client: None }
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

fn to_endpoint(snapshot: &Snapshot, leg: &Leg<'_>, candidate: &Candidate) -> Path {
    let Leg { caller, proxy, client } = leg;
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
    let identity = proxy.identity();
    let mut peer = None;
    if let (TunnelProtocol::Hbone, Transport::Hbone { expected, .. }) =
        (proxy.protocol, &candidate.transport)
    {
        peer = Some(&identity);
        path.transport = Wire::Hbone;
        path.identity = Some(identity.to_string());
        path.expected = expected.iter().map(ToString::to_string).collect();
    }
    let claim: Claim = Ok(client.clone().map(Arc::new));
    let client = match engine::delegated(snapshot, endpoint, peer, &claim) {
        Ok(client) => client,
        Err(refusal) => return no(path, &refusal),
    };
    let facts = InboundFacts {
        workload: endpoint,
        destination: candidate.target,
        source_ip: address_of(proxy, candidate.target.ip()),
        peer,
        client: client.as_deref(),
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
        waypoint: None,
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
