//! How waypoints are: the status of their Gateways, as Gateway API words it.

use std::collections::BTreeMap;
use std::sync::Arc;

use model::{GatewayDestination, Health, Service, ServiceKey, Str, Workload};
use serde::Serialize;

use super::{Rejection, Waypoint, render};
use crate::object::Objects;
use crate::services;

/// What has become of a Gateway that is a waypoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct GatewayStatus {
    pub namespace: Str,
    pub name: Str,
    pub class: Str,
    /// `service`, `workload`, `all` or `none`.
    pub traffic: &'static str,
    /// `file:line`.
    pub origin: String,
    /// The hostname of its Service, and that Service's addresses. Empty: there is none.
    pub addresses: Vec<String>,
    /// Pods that take connections, and pods that should run.
    pub ready: usize,
    pub replicas: i32,
    /// `Accepted` and `Programmed`.
    pub conditions: Vec<Condition>,
    pub listeners: Vec<ListenerStatus>,
    /// `namespace/name` of the Services whose traffic goes through it.
    pub services: Vec<String>,
    /// `namespace/name` of the pods whose traffic goes through it.
    pub workloads: Vec<String>,
}

/// One listener of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ListenerStatus {
    pub name: Str,
    /// `Accepted` and `Programmed`.
    pub conditions: Vec<Condition>,
}

/// One of Gateway API's conditions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Condition {
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub status: bool,
    /// One word, from Gateway API where it has one.
    pub reason: &'static str,
    pub message: String,
}

impl GatewayStatus {
    pub fn condition(&self, kind: &str) -> Option<&Condition> {
        self.conditions.iter().find(|c| c.kind == kind)
    }

    pub fn is(&self, kind: &str) -> bool {
        self.condition(kind).is_some_and(|c| c.status)
    }
}

/// The status of each waypoint, given what its objects were compiled to.
pub(crate) fn statuses(
    objects: &Objects,
    waypoints: &BTreeMap<&(Str, Str), Waypoint<'_>>,
    services: &[Arc<Service>],
    workloads: &[Arc<Workload>],
    cluster_domain: &str,
) -> Vec<GatewayStatus> {
    let one = |waypoint: &Waypoint<'_>| {
        let key = services::key(&waypoint.key.0, &waypoint.key.1, cluster_domain);
        let made = made_for(objects, waypoint)
            .and_then(|()| services.iter().find(|s| s.key == key).ok_or(Unmade::NotYet))
            .map(|service| &**service);
        // A pod of somebody else that the Service happens to select ends no tunnels.
        let own = workloads.iter().filter(|w| w.native_tunnel);
        let own = own.filter(|w| w.services.iter().any(|(k, _)| *k == key));
        let ready = own.filter(|w| w.health == Health::Healthy).count();
        let conditions = conditions(waypoint, made, ready);
        let programmed = conditions[1].status;
        GatewayStatus {
            namespace: waypoint.key.0.clone(),
            name: waypoint.key.1.clone(),
            class: waypoint.sourced.value.spec.gateway_class_name.as_str().into(),
            traffic: waypoint.traffic.as_str(),
            origin: waypoint.sourced.origin.to_string(),
            addresses: made.map(addresses).unwrap_or_default(),
            ready,
            replicas: waypoint.replicas,
            conditions,
            listeners: listeners(waypoint, programmed),
            services: through(&key, services.iter().map(|s| (&s.waypoint, named(&s.key, &s.name)))),
            workloads: through(&key, workloads.iter().map(|w| (&w.waypoint, pod(w)))),
        }
    };
    waypoints.values().map(one).collect()
}

/// Why there is no Service for the waypoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unmade {
    NotYet,
    /// One of the same name belongs to somebody else.
    Taken,
}

fn made_for(objects: &Objects, waypoint: &Waypoint<'_>) -> Result<(), Unmade> {
    let service = objects.services.get(waypoint.key).ok_or(Unmade::NotYet)?;
    let ours = render::is_made_for(&service.value.metadata, &waypoint.key.1);
    if ours { Ok(()) } else { Err(Unmade::Taken) }
}

fn conditions(
    waypoint: &Waypoint<'_>,
    made: Result<&Service, Unmade>,
    ready: usize,
) -> Vec<Condition> {
    let condition = |kind, status, reason, message: &str| Condition {
        kind,
        status,
        reason,
        message: message.to_owned(),
    };
    if let Some(Rejection { reason, message }) = &waypoint.rejected {
        return vec![
            condition("Accepted", false, reason, message),
            condition("Programmed", false, "Invalid", "the Gateway is not accepted"),
        ];
    }
    let all_listeners = waypoint.listeners.iter().all(|l| l.rejected.is_none());
    let accepted = if all_listeners {
        condition("Accepted", true, "Accepted", "the Gateway is a waypoint")
    } else {
        condition("Accepted", true, "ListenersNotValid", "some listeners are not served")
    };
    let programmed = match made {
        Err(Unmade::Taken) => {
            let name = &waypoint.key.1;
            let text = format!("Service {name} is there and was not made for the waypoint");
            condition("Programmed", false, "Invalid", &text)
        }
        Err(Unmade::NotYet) => {
            condition("Programmed", false, "Pending", "its Service is not there yet")
        }
        Ok(service) if service.vips.is_empty() => {
            condition("Programmed", false, "AddressNotAssigned", "its Service has no address")
        }
        Ok(_) if ready == 0 => {
            condition("Programmed", false, "NoResources", "no pod of the waypoint is ready")
        }
        Ok(_) => condition("Programmed", true, "Programmed", "the waypoint takes connections"),
    };
    vec![accepted, programmed]
}

fn listeners(waypoint: &Waypoint<'_>, programmed: bool) -> Vec<ListenerStatus> {
    let one = |listener: &super::Listener| {
        let (accepted, reason, message) = match &listener.rejected {
            Some(Rejection { reason, message }) => (false, *reason, message.clone()),
            None => (true, "Accepted", String::new()),
        };
        let programmed = accepted && programmed;
        let word = match (accepted, programmed) {
            (false, _) => "Invalid",
            (true, false) => "Pending",
            (true, true) => "Programmed",
        };
        let conditions = vec![
            Condition { kind: "Accepted", status: accepted, reason, message },
            Condition {
                kind: "Programmed",
                status: programmed,
                reason: word,
                message: String::new(),
            },
        ];
        ListenerStatus { name: listener.name.clone(), conditions }
    };
    waypoint.listeners.iter().map(one).collect()
}

fn addresses(service: &Service) -> Vec<String> {
    let vips = service.vips.iter().map(|vip| vip.ip.to_string());
    std::iter::once(service.key.hostname.to_string()).chain(vips).collect()
}

/// Those whose traffic goes through this waypoint.
fn through<'a>(
    waypoint: &ServiceKey,
    all: impl Iterator<Item = (&'a Option<model::GatewayAddress>, String)>,
) -> Vec<String> {
    let bound = all.filter(|(gateway, _)| {
        let destination = gateway.as_ref().map(|g| &g.destination);
        destination == Some(&GatewayDestination::Service(waypoint.clone()))
    });
    bound.map(|(_, name)| name).collect()
}

fn named(key: &ServiceKey, name: &str) -> String {
    format!("{}/{name}", key.namespace)
}

fn pod(workload: &Workload) -> String {
    format!("{}/{}", workload.namespace, workload.name)
}
