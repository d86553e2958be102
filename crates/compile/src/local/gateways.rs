//! What the controller of waypoints would make: for each Gateway the objects that run it.

use std::borrow::Cow;

use super::LocalConfig;
use crate::diagnostics::{Code, Diagnostic};
use crate::object::{Body, Meta, Object, Objects, object_id};
use crate::waypoints::{self, Waypoint};

/// The user's objects with what Gateways need beside them, and that alone.
pub(super) struct Provisioned<'a> {
    pub objects: Cow<'a, Objects>,
    /// Deployments and ServiceAccounts; Services are planned like the user's.
    pub made: Vec<Object>,
}

pub(super) fn provision<'a>(
    objects: &'a Objects,
    config: &LocalConfig,
    diagnostics: &mut Vec<Diagnostic>,
) -> Provisioned<'a> {
    let mut provisioned = Provisioned { objects: Cow::Borrowed(objects), made: Vec::new() };
    let Some(settings) = &config.waypoints else { return provisioned };
    for waypoint in waypoints::understand(objects).values().filter(|w| w.is_accepted()) {
        if let Some(taken) = taken(objects, waypoint) {
            diagnostics.push(taken);
            continue;
        }
        let rendered = waypoints::render(waypoint, settings);
        for object in rendered.objects(&waypoint.sourced.origin) {
            // An account of that name is the user's, with whatever it carries.
            let is_account = matches!(object.body, Body::ServiceAccount(_));
            if is_account && objects.service_accounts.contains_key(waypoint.key) {
                continue;
            }
            if !matches!(object.body, Body::Service(_)) {
                provisioned.made.push(object.clone());
            }
            provisioned.objects.to_mut().insert(object);
        }
    }
    provisioned
}

/// An object of the user that has the name of one that the waypoint needs.
fn taken(objects: &Objects, waypoint: &Waypoint<'_>) -> Option<Diagnostic> {
    let (namespace, name) = waypoint.key;
    let service = objects.services.get(waypoint.key).map(|s| ("Service", &s.origin));
    let deployment = objects.deployments.get(waypoint.key).map(|s| ("Deployment", &s.origin));
    let (kind, origin) = service.or(deployment)?;
    let message = format!(
        "{} ({origin}) has the name of the {kind} that would run the waypoint; the waypoint is not started",
        object_id(kind, namespace, name)
    );
    let d = Diagnostic::error(Code::DuplicateObject, message).field("metadata.name");
    let object = object_id(crate::gateway_api::Gateway::KIND, namespace, name);
    let d = d.object(object).origin(waypoint.sourced.origin.at("metadata.name"));
    Some(d.help("rename one of them"))
}
