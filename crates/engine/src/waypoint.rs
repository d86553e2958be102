//! Waypoints: which workloads they are, what one may be asked for, and for whom it may speak.
//!
//! A waypoint is reached as [`GatewayAddress`] says: by its Service, or by an address. Whoever is an endpoint
//! there is this waypoint.
//!
//! Invariants: a waypoint is asked only for what is bound to it, or what its own namespace has routes for: it must
//! not lend its identity to reach just anything; a client that is named counts only when a waypoint of the called
//! workload names it, and what cannot be read then is a refusal, never nobody.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use model::http::{Audience, Protocol};
use model::{
    GatewayAddress, GatewayDestination, Identity, MESH_PORTS, Reason, Refusal, Service, ServiceKey,
    Snapshot, TunnelProtocol, Workload,
};

use crate::authz::InboundFacts;
use crate::http::backend_protocol;
use crate::outbound::{Called, called, no_such_port};

/// The client that a peer says it speaks for. `Err`: it says so in a way that cannot be understood.
pub type Claim = Result<Option<Arc<Identity>>, String>;

/// What is known of a connection that arrives at a waypoint.
#[derive(Clone, Copy, Debug)]
pub struct AdmitFacts<'a> {
    /// The waypoint's own workload.
    pub own: &'a Workload,
    /// Who calls, from the verified certificate.
    pub peer: &'a Identity,
    /// What the CONNECT asks for.
    pub authority: Authority<'a>,
}

/// The destination of a CONNECT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Authority<'a> {
    Address(SocketAddr),
    Host(&'a str, u16),
}

/// What a connection at a waypoint is for.
#[derive(Clone, Debug)]
pub enum Admitted {
    Service {
        service: Arc<Service>,
        /// The Service's own port.
        port: u16,
        protocol: Protocol,
    },
    /// Somebody called a pod by its address.
    Workload {
        workload: Arc<Workload>,
        /// The pod's port.
        port: u16,
        protocol: Protocol,
    },
}

/// Decides what a waypoint was asked for. [`Reason::NotBound`] may mean that a push is in flight: the client's proxy knew
/// of a binding a moment earlier.
pub fn admit(snapshot: &Snapshot, facts: &AdmitFacts<'_>) -> Result<Admitted, Refusal> {
    match facts.authority {
        Authority::Address(to) => {
            let to = SocketAddr::new(to.ip().to_canonical(), to.port());
            match called(snapshot, &facts.own.network, to.ip()) {
                Called::Service(service) => to_service(snapshot, facts, service, to.port()),
                Called::Workload(workload) => to_workload(snapshot, facts, workload, to.port()),
                Called::Stranger => {
                    Err(not_bound(facts, "neither a Service nor a pod of the mesh"))
                }
            }
        }
        Authority::Host(host, port) => {
            let named = || snapshot.services_named(host);
            let mine = named().find(|service| takes(snapshot, facts, service).is_some());
            match mine.or_else(|| named().next()) {
                Some(service) => to_service(snapshot, facts, service, port),
                None => Err(not_bound(facts, "the name of no Service")),
            }
        }
    }
}

/// The client whose identity counts beside the peer's: the one that is named by a waypoint of this workload. What anybody
/// else says is ignored.
pub fn delegated(
    snapshot: &Snapshot,
    workload: &Workload,
    peer: Option<&Identity>,
    claim: &Claim,
) -> Result<Option<Arc<Identity>>, Refusal> {
    let Some(peer) = peer.filter(|_| *claim != Ok(None)) else { return Ok(None) };
    if !may_delegate(snapshot, workload, peer) {
        return Ok(None);
    }
    claim.clone().map_err(|words| {
        Refusal::new(Reason::BadRequest, format!("the waypoint {peer} names no client: {words}"))
    })
}

/// Whether a claim that does not count may be ahead of the configuration: a waypoint makes it, and that the workload is bound
/// to this waypoint may be on its way. Somebody whom only the claim would let in is then worth a moment's wait.
pub fn claim_is_early(snapshot: &Snapshot, facts: &InboundFacts<'_>, claim: &Claim) -> bool {
    let uncounted = facts.client.is_none() && *claim != Ok(None);
    let Some(peer) = facts.peer.filter(|_| uncounted) else { return false };
    let source = snapshot.workload_at(&facts.workload.network, facts.source_ip.to_canonical());
    source.is_some_and(|w| w.native_tunnel && w.identity() == *peer)
}

/// Whether this workload is (one of) the waypoint.
pub(crate) fn is_waypoint(snapshot: &Snapshot, workload: &Workload, at: &GatewayAddress) -> bool {
    let serves = |key: &ServiceKey| workload.services.iter().any(|(service, _)| service == key);
    match Place::of(snapshot, at) {
        Place::Service(key) => serves(key),
        Place::Workload(there) => there.uid == workload.uid,
        Place::Nowhere => false,
    }
}

/// Where a waypoint is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place<'a> {
    /// At the endpoints of a Service, which this proxy may not know.
    Service(&'a ServiceKey),
    Workload(&'a Arc<Workload>),
    Nowhere,
}

impl<'a> Place<'a> {
    pub(crate) fn of(snapshot: &'a Snapshot, at: &'a GatewayAddress) -> Self {
        match &at.destination {
            GatewayDestination::Service(key) => Self::Service(key),
            GatewayDestination::Address(a) => match snapshot.service_at(&a.network, a.ip) {
                Some(service) => Self::Service(&service.key),
                None => {
                    snapshot.workload_at(&a.network, a.ip).map_or(Self::Nowhere, Self::Workload)
                }
            },
        }
    }

    fn workloads(self, snapshot: &'a Snapshot) -> impl Iterator<Item = &'a Arc<Workload>> {
        let (service, one) = match self {
            Self::Service(key) => (Some(key), None),
            Self::Workload(workload) => (None, Some(workload)),
            Self::Nowhere => (None, None),
        };
        let endpoints = service.and_then(|key| snapshot.endpoints(key)).into_iter();
        endpoints.flat_map(|all| all.iter().map(|(_, e)| &e.workload)).chain(one)
    }
}

/// A waypoint's name, for messages.
pub(crate) struct Name<'a>(pub(crate) &'a GatewayAddress);

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0.destination {
            GatewayDestination::Service(key) => key.fmt(f),
            GatewayDestination::Address(a) => a.ip.fmt(f),
        }
    }
}

/// A waypoint may speak for its clients to the endpoints of the Services that are bound to it, and to workloads that are
/// bound themselves. It holds its own key: a workload behind a node's proxy cannot say anything in a CONNECT.
fn may_delegate(snapshot: &Snapshot, workload: &Workload, peer: &Identity) -> bool {
    let services = workload.services.iter().filter_map(|(key, _)| snapshot.service(key));
    let of_services = services.filter_map(|service| service.waypoint.as_ref());
    workload.waypoint.iter().chain(of_services).any(|at| {
        let mut there = Place::of(snapshot, at).workloads(snapshot);
        there.any(|w| w.native_tunnel && w.identity() == *peer)
    })
}

/// Why a waypoint takes connections for a Service. `None`: it does not.
fn takes(snapshot: &Snapshot, facts: &AdmitFacts<'_>, service: &Service) -> Option<Takes> {
    let own = facts.own;
    if service.waypoint.as_ref().is_some_and(|at| is_waypoint(snapshot, own, at)) {
        return Some(Takes::Bound);
    }
    let mut sets = snapshot.routes(&service.key).into_iter().flat_map(|routes| routes.sets.iter());
    let consumer = |audience: &Audience| match audience {
        Audience::Everybody => false,
        Audience::Namespace(namespace) => *namespace == own.namespace,
    };
    let has_routes = sets.any(|set| consumer(&set.audience));
    (has_routes && facts.peer.namespace == own.namespace).then_some(Takes::Consumer)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Takes {
    /// The Service is bound to this waypoint.
    Bound,
    /// The waypoint's namespace has routes of its own to the Service, and the client is of this namespace.
    Consumer,
}

fn to_service(
    snapshot: &Snapshot,
    facts: &AdmitFacts<'_>,
    service: &Arc<Service>,
    port: u16,
) -> Result<Admitted, Refusal> {
    if takes(snapshot, facts, service).is_none() {
        let what =
            format!("service {}, which {}", service.key, bound_to(service.waypoint.as_ref()));
        return Err(not_bound(facts, &what));
    }
    if !service.ports.iter().any(|p| p.service_port == port) {
        return Err(no_such_port(service, port));
    }
    let protocol = backend_protocol(snapshot, service, port);
    Ok(Admitted::Service { service: service.clone(), port, protocol })
}

fn to_workload(
    snapshot: &Snapshot,
    facts: &AdmitFacts<'_>,
    workload: &Arc<Workload>,
    port: u16,
) -> Result<Admitted, Refusal> {
    let (namespace, name) = (&workload.namespace, &workload.name);
    let at = workload.waypoint.as_ref();
    if !at.is_some_and(|at| is_waypoint(snapshot, facts.own, at)) {
        let what = format!("pod {namespace}/{name}, which {}", bound_to(at));
        return Err(not_bound(facts, &what));
    }
    if workload.protocol == TunnelProtocol::Hbone && MESH_PORTS.contains(&port) {
        let message = format!("port {port} of {namespace}/{name} is the mesh's own");
        return Err(Refusal::new(Reason::MeshPort, message));
    }
    // What the port speaks is said by a Service that leads there, if one does.
    let leads = workload.services.iter().find_map(|(key, ports)| {
        let port = ports.iter().find(|p| p.target_port == port)?;
        Some((snapshot.service(key)?, port.service_port))
    });
    let protocol =
        leads.map_or(Protocol::Undeclared, |(s, port)| backend_protocol(snapshot, s, port));
    Ok(Admitted::Workload { workload: workload.clone(), port, protocol })
}

fn bound_to(at: Option<&GatewayAddress>) -> String {
    match at {
        Some(at) => format!("is bound to waypoint {}", Name(at)),
        None => "is bound to no waypoint".to_owned(),
    }
}

fn not_bound(facts: &AdmitFacts<'_>, what: &str) -> Refusal {
    let AdmitFacts { own, peer, authority } = facts;
    let message = format!(
        "{peer} asked the waypoint {}/{} for {authority}: {what}",
        own.namespace, own.workload_name
    );
    Refusal::new(Reason::NotBound, message)
}

impl fmt::Display for Authority<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Host(host, port) => write!(f, "{host}:{port}"),
        }
    }
}

#[cfg(test)]
mod tests;
