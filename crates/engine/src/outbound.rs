//! Where does a connection that a pod opens go, and how?
//!
//! Order: the exact virtual address of a service, then the address of a workload, then the address
//! range of a service, then passthrough. A workload that is called by its own address is called there
//! whatever its health, since the caller chose it. What is bound to a waypoint is asked of an endpoint of that waypoint,
//! under the address that was called.
//!
//! Invariants: what is bound to a waypoint is never reached around it, but by the waypoint itself; the mesh's own
//! ports of a mesh workload are never a target; a plan to connect has at least one candidate, each another
//! endpoint; the same input gives the same plan.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use model::{
    GatewayAddress, HBONE_PORT, Health, Identity, MESH_PORTS, Reason, Refusal, RoutingMode,
    Service, Snapshot, Str, TunnelProtocol, Workload,
};

use crate::endpoint::{self, Call, Pick, Wanted};
use crate::waypoint::{self, Place};

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

/// One endpoint to try: of the service, or of the waypoint before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Who is dialled.
    pub workload: Arc<Workload>,
    /// The CONNECT authority, or the plain TCP destination: the endpoint's own address and target port; to a waypoint, the
    /// address that was called.
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
                && now.addresses.contains(&self.dialled().ip())
        })
    }

    /// The same of a candidate for a call to `service`, which may be bound to another waypoint by now, or to none.
    pub fn is_current_for(&self, snapshot: &Snapshot, service: Option<&Service>) -> bool {
        let bound_as_planned = service.is_none_or(|planned| {
            snapshot.service(&planned.key).is_some_and(|now| now.waypoint == planned.waypoint)
        });
        bound_as_planned && self.is_current(snapshot)
    }

    /// The workload is a waypoint: it is dialled at its own address and asked for another.
    pub fn is_waypoint(&self) -> bool {
        self.dialled().ip() != self.target.ip()
    }

    fn dialled(&self) -> SocketAddr {
        match &self.transport {
            Transport::Plain => self.target,
            Transport::Hbone { gateway, .. } => *gateway,
        }
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
    let (ip, source) = (facts.destination.ip().to_canonical(), facts.source);
    let destination = SocketAddr::new(ip, facts.destination.port());
    match called(snapshot, &source.network, ip) {
        Called::Service(service) => to_service(snapshot, source, service, destination, pick),
        Called::Workload(workload) => to_workload(snapshot, source, workload, destination, pick),
        Called::Stranger => OutboundPlan::Passthrough,
    }
}

/// What an address stands for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Called<'a> {
    Service(&'a Arc<Service>),
    Workload(&'a Arc<Workload>),
    Stranger,
}

/// The order is the module's.
pub(crate) fn called<'a>(snapshot: &'a Snapshot, network: &Str, ip: IpAddr) -> Called<'a> {
    let service = snapshot.service_at(network, ip);
    let exact = service.filter(|s| {
        let width = if ip.is_ipv4() { 32 } else { 128 };
        s.vips.iter().any(|v| v.ip == ip && v.prefix == width && v.network == *network)
    });
    if let Some(service) = exact {
        return Called::Service(service);
    }
    match snapshot.workload_at(network, ip) {
        Some(workload) => Called::Workload(workload),
        None => service.map_or(Called::Stranger, Called::Service),
    }
}

fn to_service<'a>(
    snapshot: &'a Snapshot,
    source: &'a Workload,
    service: &'a Arc<Service>,
    destination: SocketAddr,
    pick: impl FnOnce(&Call<'a>, &'a Snapshot) -> Result<Vec<Pick<'a>>, Refusal>,
) -> OutboundPlan {
    let passthrough = service.load_balancing.mode == RoutingMode::Passthrough;
    let port = service.ports.iter().find(|p| p.service_port == destination.port());
    if port.is_none() && !passthrough {
        return OutboundPlan::Refuse(no_such_port(service, destination.port()));
    }
    if let Some(at) = waypoint_for(snapshot, source, service.waypoint.as_ref()) {
        let call = Through { source, at, destination, kind: "service", called: &service.key };
        return match to_waypoint(snapshot, &call, pick) {
            Ok(candidates) => OutboundPlan::Connect { service: Some(service.clone()), candidates },
            Err(refusal) => OutboundPlan::Refuse(refusal),
        };
    }
    let Some(port) = port.filter(|_| !passthrough) else {
        return match snapshot.workload_at(&source.network, destination.ip()) {
            Some(workload) => to_workload(snapshot, source, workload, destination, pick),
            None => OutboundPlan::Passthrough,
        };
    };
    let port = Wanted::Port(port);
    match pick(&Call { source, service, port, ip: destination.ip() }, snapshot) {
        Ok(picks) => {
            let candidates = picks.iter().map(|p| candidate(p, service)).collect();
            OutboundPlan::Connect { service: Some(service.clone()), candidates }
        }
        Err(refusal) => OutboundPlan::Refuse(refusal),
    }
}

/// The caller named this workload by its address.
fn to_workload<'a>(
    snapshot: &'a Snapshot,
    source: &'a Workload,
    workload: &'a Arc<Workload>,
    target: SocketAddr,
    pick: impl FnOnce(&Call<'a>, &'a Snapshot) -> Result<Vec<Pick<'a>>, Refusal>,
) -> OutboundPlan {
    if workload.protocol == TunnelProtocol::Hbone && MESH_PORTS.contains(&target.port()) {
        let message = format!(
            "port {} of {}/{} is the mesh's own",
            target.port(),
            workload.namespace,
            workload.name
        );
        return OutboundPlan::Refuse(Refusal::new(Reason::MeshPort, message));
    }
    if workload.protocol != TunnelProtocol::Unreadable
        && let Some(at) = waypoint_for(snapshot, source, workload.waypoint.as_ref())
    {
        let (destination, called) = (target, &workload.uid);
        let call = Through { source, at, destination, kind: "workload", called };
        return match to_waypoint(snapshot, &call, pick) {
            Ok(candidates) => OutboundPlan::Connect { service: None, candidates },
            Err(refusal) => OutboundPlan::Refuse(refusal),
        };
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
            let gateway = SocketAddr::new(pick.target.ip(), HBONE_PORT);
            Transport::Hbone { gateway, expected: expected(workload, service) }
        }
    };
    Candidate { workload: workload.clone(), target: pick.target, transport }
}

/// Who may answer as an endpoint of a service.
fn expected(workload: &Workload, service: &Service) -> Vec<Identity> {
    // A name that is no workload identity cannot be shown by a peer that we would accept.
    let also = service.subject_alt_names.iter().filter_map(|san| san.parse().ok());
    std::iter::once(workload.identity()).chain(also).collect()
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

pub(crate) fn no_such_port(service: &Service, port: u16) -> Refusal {
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

/// The waypoint that a call must go through. The waypoint itself goes on from there.
fn waypoint_for<'a>(
    snapshot: &Snapshot,
    source: &Workload,
    at: Option<&'a GatewayAddress>,
) -> Option<&'a GatewayAddress> {
    at.filter(|at| !waypoint::is_waypoint(snapshot, source, at))
}

/// A call that goes through a waypoint.
struct Through<'a, 'b> {
    source: &'a Workload,
    at: &'a GatewayAddress,
    destination: SocketAddr,
    /// What is bound to the waypoint, for messages.
    kind: &'static str,
    called: &'b dyn fmt::Display,
}

/// The waypoint's endpoints, each to be asked for what was called. Around a waypoint there is no way: without one that is
/// ready the call is refused.
fn to_waypoint<'a>(
    snapshot: &'a Snapshot,
    call: &Through<'a, '_>,
    pick: impl FnOnce(&Call<'a>, &'a Snapshot) -> Result<Vec<Pick<'a>>, Refusal>,
) -> Result<Vec<Candidate>, Refusal> {
    let Through { source, at, destination, kind, called } = *call;
    let not_ready = |why: &dyn fmt::Display| {
        let name = waypoint::Name(at);
        let message =
            format!("{kind} {called} is bound to waypoint {name}, which is not ready: {why}");
        Refusal::new(Reason::WaypointNotReady, message)
    };
    match Place::of(snapshot, at) {
        Place::Service(key) => {
            let service = snapshot.service(key);
            let service = service.ok_or_else(|| not_ready(&"its Service is not there"))?;
            let port = Wanted::Tunnel(at.hbone_port);
            let picks = pick(&Call { source, service, port, ip: destination.ip() }, snapshot);
            let picks = picks.map_err(|refusal| not_ready(&refusal.message))?;
            let candidate = |pick: &Pick<'_>| {
                let (gateway, expected) = (pick.target, expected(pick.workload, service));
                let transport = Transport::Hbone { gateway, expected };
                Candidate { workload: pick.workload.clone(), target: destination, transport }
            };
            Ok(picks.iter().map(candidate).collect())
        }
        Place::Workload(workload) => {
            let ready = workload.health == Health::Healthy
                && workload.protocol == TunnelProtocol::Hbone
                && workload.network == source.network;
            let ip = workload.addresses.first().filter(|_| ready);
            let ip = ip.ok_or_else(|| not_ready(&"nobody who takes tunnels is ready there"))?;
            let gateway = SocketAddr::new(*ip, at.hbone_port);
            let transport = Transport::Hbone { gateway, expected: vec![workload.identity()] };
            Ok(vec![Candidate { workload: workload.clone(), target: destination, transport }])
        }
        Place::Nowhere => Err(not_ready(&"nobody has this address")),
    }
}

#[cfg(test)]
mod tests;
