//! Whether requests to a route's Service pass a waypoint: only there is a route looked at.
//!
//! Invariants: a route that does nothing for want of a waypoint is told so, at the place that names the Service, with what is
//! missing and what to do; one whose waypoint has not been ready yet is told that it will act.

use model::Service;

use super::ConditionReason;
use crate::diagnostics::{Code, Diagnostic};
use crate::waypoints::USE_WAYPOINT;
use crate::waypoints::binding::{Bindings, Direct, Sayer, Why};

/// Why no waypoint sees what is sent to a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Missed {
    pub reason: ConditionReason,
    /// Without object and place.
    pub finding: Diagnostic,
}

/// Whether what is sent to a Service passes a waypoint. `namespace`: the route's.
pub(super) fn check(
    service: &Service,
    namespace: &str,
    bindings: &Bindings<'_>,
) -> Result<(), Box<Missed>> {
    let Err(direct) = bindings.of_service(service) else { return Ok(()) };
    let of = &*service.key.namespace;
    let name = format!("Service {of}/{}", service.name);
    let says = |by: Sayer| match by {
        Sayer::Object => name.clone(),
        Sayer::Namespace => format!("Namespace {of}"),
    };
    let (reason, why, help) = match &direct {
        Direct::NotReady { gateway: (at, gateway) } => return Err(not_ready(&name, at, gateway)),
        Direct::Unsaid => {
            let help = match bindings.for_services_of(of).next() {
                Some((_, own)) => {
                    format!("label the Service or Namespace {of} {USE_WAYPOINT}: {own}")
                }
                None => format!("meshctl waypoint apply -n {of} --enroll-namespace"),
            };
            let why = "neither it nor its Namespace names one".to_owned();
            (ConditionReason::NoWaypoint, why, help)
        }
        Direct::OptOut { by } => {
            let why = format!("{} says {USE_WAYPOINT}: none", says(*by));
            (ConditionReason::NoWaypoint, why, "take the label away, or the route".to_owned())
        }
        Direct::Own => {
            let why = "it is a waypoint's own".to_owned();
            (ConditionReason::NoWaypoint, why, "name the Service that is called".to_owned())
        }
        Direct::Refused { by, gateway, why } => {
            let (_, text, help) = why.explain((&gateway.0, &gateway.1), of);
            (reason(why), format!("{} names one, but {text}", says(*by)), help)
        }
    };
    let consumers = consumers(of, namespace, bindings);
    let message = format!(
        "{name} goes through no waypoint, so nothing looks at its requests: {why}{consumers}"
    );
    let finding = Diagnostic::error(Code::L7WithoutWaypoint, message).help(help);
    Err(Box::new(Missed { reason, finding }))
}

fn not_ready(service: &str, namespace: &str, gateway: &str) -> Box<Missed> {
    let message = format!(
        "{service} is called directly until a proxy of Gateway/{namespace}/{gateway} has been ready: \
         nothing looks at its requests before"
    );
    let finding = Diagnostic::info(Code::WaypointNotReady, message)
        .help(format!("meshctl waypoint status -n {namespace} {gateway}"));
    Box::new(Missed { reason: ConditionReason::WaypointIsNotReady, finding })
}

/// Istio's words, where a label names a waypoint.
fn reason(why: &Why) -> ConditionReason {
    match why {
        Why::Missing | Why::OtherClass(_) => ConditionReason::WaypointMissing,
        Why::NotAllowed => ConditionReason::AttachmentDenied,
        Why::Traffic(_) => ConditionReason::UnsupportedTrafficType,
    }
}

/// What the author of a consumer's route may have counted on.
fn consumers(of: &str, namespace: &str, bindings: &Bindings<'_>) -> String {
    let own = bindings.for_services_of(namespace).next().filter(|_| namespace != of);
    own.map_or_else(String::new, |(_, own)| {
        format!(
            "; Gateway/{namespace}/{own} is not asked, since clients go to the waypoint of the Service they call"
        )
    })
}

#[cfg(test)]
mod tests;
