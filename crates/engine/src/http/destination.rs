//! Where a request for a backend may go: endpoints of a Service, or of a subset of it, to be tried in order.
//!
//! The endpoints are reached as they are: the routes of a backend's Service are not applied, here or elsewhere
//! (Gateway API: only the routes of the Service that was called count).
//!
//! Invariants: what the route names and is not there is refused with `bad_backend`, never replaced by something like it: an
//! unknown subset is not the whole Service.

use std::net::{IpAddr, Ipv4Addr};

use model::http::{Protocol, Subset, SubsetKey, Target};
use model::{AppProtocol, Reason, Refusal, Service, Snapshot, Workload};

use super::Destination;
use crate::endpoint::{self, Call, Wanted};
use crate::outbound;

/// The endpoints for a target, chosen for the waypoint `from`.
pub fn destination(
    snapshot: &Snapshot,
    from: &Workload,
    target: &Target,
    rand: u64,
) -> Result<Destination, Refusal> {
    let bad = |message: String| Refusal::new(Reason::BadBackend, message);
    let (key, port, subset) = match target {
        Target::Service { service, port, subset } => (service, *port, subset),
        Target::Invalid { message } => return Err(bad(message.to_string())),
    };
    let service = snapshot.service(key).ok_or_else(|| bad(format!("there is no service {key}")))?;
    let port = service
        .ports
        .iter()
        .find(|p| p.service_port == port)
        .ok_or_else(|| bad(format!("service {key} has no port {port}")))?;
    let subset: Option<&Subset> = match subset {
        None => None,
        Some(name) => {
            let key = SubsetKey { service: key.clone(), name: name.clone() };
            let found = snapshot.subset(&key);
            Some(found.ok_or_else(|| bad(format!("no DestinationRule names the subset {key}")))?)
        }
    };
    // Nobody called an address of this Service: the family of its first one is as good.
    let first = service.vips.first().map(|vip| vip.ip).or_else(|| from.addresses.first().copied());
    let ip = first.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    let call = Call { source: from, service, port: Wanted::Port(port), ip };
    let picks = endpoint::choose_in(&call, subset, snapshot, rand)?;
    let candidates = picks.iter().map(|pick| outbound::candidate(pick, service)).collect();
    Ok(Destination { service: service.clone(), port: *port, candidates })
}

/// What a port of a Service speaks: as declared, else as the Service's own port says.
pub fn backend_protocol(snapshot: &Snapshot, service: &Service, port: u16) -> Protocol {
    let declared = snapshot
        .routes(&service.key)
        .and_then(|routes| routes.ports.iter().find(|p| p.service_port == port))
        .map(|p| p.protocol)
        .filter(|protocol| *protocol != Protocol::Undeclared);
    declared.unwrap_or_else(|| {
        let own = service.ports.iter().find(|p| p.service_port == port);
        match own.map(|p| p.app_protocol) {
            None | Some(AppProtocol::Unknown) => Protocol::Undeclared,
            Some(AppProtocol::Http11) => Protocol::Http,
            Some(AppProtocol::Http2) => Protocol::Http2,
            Some(AppProtocol::Grpc) => Protocol::Grpc,
        }
    })
}
