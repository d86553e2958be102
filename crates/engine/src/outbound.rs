//! Where does a connection that a pod opens go, and how?
//!
//! Order: the exact virtual address of a service, then the address of a workload, then the address
//! range of a service, then passthrough. A workload that is called by its own address is called there
//! whatever its health, since the caller chose it.
//!
//! Invariants: what is bound to a waypoint is never reached around it; the mesh's own ports of a mesh
//! workload are never a target; a plan to connect has at least one candidate, each another endpoint;
//! the same input gives the same plan.

use std::net::SocketAddr;
use std::sync::Arc;

use model::{
    GatewayAddress, GatewayDestination, HBONE_PORT, Health, Identity, MESH_PORTS, Reason, Refusal,
    RoutingMode, Service, Snapshot, TunnelProtocol, Workload,
};

use crate::endpoint::{self, Call, Pick};

/// Endpoints that one connection may try. The second covers a pod that died a moment ago, the third a
/// rolling restart of small services; more would only delay the error that the application waits for.
pub const MAX_CANDIDATES: usize = 3;

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
    Connect {
        service: Option<Arc<Service>>,
        candidates: Vec<Candidate>,
    },
    Refuse(Refusal),
}

/// One endpoint to try.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    Hbone {
        gateway: SocketAddr,
        expected: Vec<Identity>,
    },
}

impl Candidate {
    /// Whether what was planned still holds: a candidate that is tried seconds after the plan may have joined the mesh
    /// meanwhile, or its address may have gone to another.
    pub fn is_current(&self, snapshot: &Snapshot) -> bool {
        snapshot.workload(&self.workload.uid).is_some_and(|now| {
            now.protocol == self.workload.protocol
                && now.waypoint == self.workload.waypoint
                && now.addresses.contains(&self.target.ip())
        })
    }
}

/// Plans one outbound connection. `rand` decides among equals; the same input gives the same plan.
pub fn plan_outbound(snapshot: &Snapshot, facts: &OutboundFacts<'_>, rand: u64) -> OutboundPlan {
    plan(snapshot, facts, |call, snapshot| endpoint::choose(call, snapshot, rand))
}

/// The same plan with every endpoint that [`plan_outbound`] could ever choose, nearest first, then by
/// uid: for tools that answer for all of them.
pub fn plan_every_endpoint(snapshot: &Snapshot, facts: &OutboundFacts<'_>) -> OutboundPlan {
    plan(snapshot, facts, endpoint::all)
}

fn plan<'a>(
    snapshot: &'a Snapshot,
    facts: &OutboundFacts<'a>,
    pick: impl FnOnce(&Call<'a>, &'a Snapshot) -> Result<Vec<Pick<'a>>, Refusal>,
) -> OutboundPlan {
    let (ip, network) = (facts.destination.ip().to_canonical(), &facts.source.network);
    let destination = SocketAddr::new(ip, facts.destination.port());
    let service = snapshot.service_at(network, ip);
    let exact = service.filter(|s| {
        let width = if ip.is_ipv4() { 32 } else { 128 };
        s.vips.iter().any(|v| v.ip == ip && v.prefix == width && v.network == *network)
    });
    if let Some(service) = exact {
        return to_service(snapshot, facts.source, service, destination, pick);
    }
    if let Some(workload) = snapshot.workload_at(network, ip) {
        return to_workload(snapshot, workload, destination);
    }
    match service {
        Some(service) => to_service(snapshot, facts.source, service, destination, pick),
        None => OutboundPlan::Passthrough,
    }
}

fn to_service<'a>(
    snapshot: &'a Snapshot,
    source: &'a Workload,
    service: &'a Arc<Service>,
    destination: SocketAddr,
    pick: impl FnOnce(&Call<'a>, &'a Snapshot) -> Result<Vec<Pick<'a>>, Refusal>,
) -> OutboundPlan {
    if let Some(waypoint) = &service.waypoint {
        return OutboundPlan::Refuse(needs_waypoint(snapshot, "service", &service.key, waypoint));
    }
    if service.load_balancing.mode == RoutingMode::Passthrough {
        return match snapshot.workload_at(&source.network, destination.ip()) {
            Some(workload) => to_workload(snapshot, workload, destination),
            None => OutboundPlan::Passthrough,
        };
    }
    let Some(port) = service.ports.iter().find(|p| p.service_port == destination.port()) else {
        return OutboundPlan::Refuse(no_such_port(service, destination.port()));
    };
    match pick(&Call { source, service, port, ip: destination.ip() }, snapshot) {
        Ok(picks) => {
            let candidates = picks.iter().map(|p| candidate(p, service)).collect();
            OutboundPlan::Connect { service: Some(service.clone()), candidates }
        }
        Err(refusal) => OutboundPlan::Refuse(refusal),
    }
}

/// The caller named this workload by its address.
fn to_workload(snapshot: &Snapshot, workload: &Arc<Workload>, target: SocketAddr) -> OutboundPlan {
    if workload.protocol == TunnelProtocol::Hbone && MESH_PORTS.contains(&target.port()) {
        let message = format!(
            "port {} of {}/{} is the mesh's own",
            target.port(),
            workload.namespace,
            workload.name
        );
        return OutboundPlan::Refuse(Refusal::new(Reason::MeshPort, message));
    }
    if let Some(waypoint) = &workload.waypoint {
        return OutboundPlan::Refuse(needs_waypoint(snapshot, "workload", &workload.uid, waypoint));
    }
    match workload.protocol {
        TunnelProtocol::Unreadable => OutboundPlan::Refuse(unreadable(workload)),
        TunnelProtocol::None => OutboundPlan::Passthrough,
        TunnelProtocol::Hbone => {
            let candidates = vec![Candidate {
                workload: workload.clone(),
                target,
                transport: Transport::Hbone {
                    gateway: SocketAddr::new(target.ip(), HBONE_PORT),
                    expected: vec![workload.identity()],
                },
            }];
            OutboundPlan::Connect { service: None, candidates }
        }
    }
}

pub(crate) fn candidate(pick: &Pick<'_>, service: &Service) -> Candidate {
    let workload = pick.workload;
    let transport = match workload.protocol {
        TunnelProtocol::None => Transport::Plain,
        // `fit` lets no unreadable one through; if it did, the handshake would fail.
        TunnelProtocol::Hbone | TunnelProtocol::Unreadable => {
            // A name that is no workload identity cannot be shown by a peer that we would accept.
            let also = service.subject_alt_names.iter().filter_map(|san| san.parse().ok());
            Transport::Hbone {
                gateway: SocketAddr::new(pick.target.ip(), HBONE_PORT),
                expected: std::iter::once(workload.identity()).chain(also).collect(),
            }
        }
    };
    Candidate { workload: workload.clone(), target: pick.target, transport }
}

/// The control plane sent this workload in words of another version.
pub(crate) fn unreadable(workload: &Workload) -> Refusal {
    let message = format!(
        "the control plane describes {}/{} in a way that this proxy cannot read (its list of refused \
         configuration says why)",
        workload.namespace, workload.name
    );
    Refusal::new(Reason::Unsupported, message)
}

fn no_such_port(service: &Service, port: u16) -> Refusal {
    /// Ports named in the message: all of a usual Service, not all of a strange one.
    const NAMED: usize = 8;
    let ports: Vec<String> =
        service.ports.iter().take(NAMED).map(|p| p.service_port.to_string()).collect();
    let has = match ports.len() {
        0 => "no port at all".to_owned(),
        _ if service.ports.len() > NAMED => format!("{} and more", ports.join(", ")),
        _ => ports.join(", "),
    };
    Refusal::new(
        Reason::NoSuchPort,
        format!("service {} has no port {port}; it has {has}", service.key),
    )
}

/// This version cannot send traffic through a waypoint, and going around it would skip its policies.
fn needs_waypoint(
    snapshot: &Snapshot,
    kind: &str,
    who: &dyn std::fmt::Display,
    waypoint: &GatewayAddress,
) -> Refusal {
    let (name, ready) = match &waypoint.destination {
        GatewayDestination::Service(key) => (key.to_string(), has_healthy_endpoint(snapshot, key)),
        GatewayDestination::Address(a) => {
            let service = snapshot.service_at(&a.network, a.ip);
            let ready = match service {
                Some(service) => has_healthy_endpoint(snapshot, &service.key),
                None => snapshot
                    .workload_at(&a.network, a.ip)
                    .is_some_and(|w| w.health == Health::Healthy),
            };
            (a.ip.to_string(), ready)
        }
    };
    if ready {
        let message = format!(
            "{kind} {who} is bound to waypoint {name}; this version cannot send through a waypoint and does not go around it"
        );
        Refusal::new(Reason::Unsupported, message)
    } else {
        let message =
            format!("{kind} {who} is bound to waypoint {name}, which has no ready endpoint");
        Refusal::new(Reason::WaypointNotReady, message)
    }
}

fn has_healthy_endpoint(snapshot: &Snapshot, key: &model::ServiceKey) -> bool {
    snapshot
        .endpoints(key)
        .is_some_and(|all| all.iter().any(|(_, e)| e.workload.health == Health::Healthy))
}

#[cfg(test)]
mod tests;
