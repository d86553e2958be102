//! Gateways that are waypoints: which are, what they run as, and how they are.
//!
//! [`understand`] reads a Gateway of a waypoint's class, [`render`] says which objects run it (what a controller would
//! make of it), [`statuses`] what has become of it. The local world renders in [`local`](crate::local), Kubernetes
//! will in its controller: both get the same objects.
//!
//! Invariants: pure and total; a waypoint runs as the service account of its own name, which is how the control plane
//! knows it ([`accounts`]); a Gateway that cannot be served as it is written is not accepted, with a condition and a
//! diagnostic that say why.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use model::Str;

use crate::context::Context;
use crate::diagnostics::{Code, Diagnostic};
use crate::gateway_api::{Gateway, gateways::GatewayListeners};
use crate::kinds::Kind;
use crate::object::{Meta, Objects, Sourced};
use crate::validate;

pub(crate) mod binding;
mod render;
mod status;

pub use binding::Programmed;
pub use render::{Rendered, Settings, render};
pub(crate) use status::statuses;
pub use status::{Condition, GatewayStatus, ListenerStatus};

/// The class of waypoints; there without an object.
pub const WAYPOINT_CLASS: &str = "istio-waypoint";
/// Who serves it: classes of one's own name the same controller.
pub const CONTROLLER: &str = "istio.io/mesh-controller";
/// Says what goes through a waypoint, on a Gateway or its class.
pub const WAYPOINT_FOR: &str = "istio.io/waypoint-for";
/// Sends traffic through a waypoint, on a namespace, a Service or a pod.
pub const USE_WAYPOINT: &str = "istio.io/use-waypoint";
/// The waypoint's namespace, where it is another one.
pub const USE_WAYPOINT_NAMESPACE: &str = "istio.io/use-waypoint-namespace";
/// On everything that is made for a Gateway: the Gateway's name.
pub const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";
/// Beside it: the class.
pub const GATEWAY_CLASS_NAME: &str = "gateway.networking.k8s.io/gateway-class-name";
/// How many pods a waypoint has; an annotation of the Gateway.
pub const REPLICAS: &str = "ambit.io/replicas";
/// The port of a waypoint's one listener, and its protocol.
pub const HBONE_PORT: u16 = 15008;
pub const HBONE: &str = "HBONE";

/// More pods than this of one waypoint is a slip of the keyboard: each serves some ten thousand requests a second.
const MAX_REPLICAS: i32 = 50;

/// Service accounts (namespace, name) that waypoints run as.
pub type WaypointAccounts = BTreeSet<(Str, Str)>;

/// What goes through a waypoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TrafficFor {
    /// What is sent to Services.
    #[default]
    Service,
    /// What is sent to pods.
    Workload,
    All,
    None,
}

impl TrafficFor {
    pub const ALL: [Self; 4] = [Self::Service, Self::Workload, Self::All, Self::None];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Service => "service",
            Self::Workload => "workload",
            Self::All => "all",
            Self::None => "none",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.as_str() == text)
    }

    pub const fn services(self) -> bool {
        matches!(self, Self::Service | Self::All)
    }

    pub const fn workloads(self) -> bool {
        matches!(self, Self::Workload | Self::All)
    }
}

impl fmt::Display for TrafficFor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A Gateway of a waypoint's class, understood.
#[derive(Clone, Debug)]
pub struct Waypoint<'a> {
    /// Namespace and name.
    pub key: &'a (Str, Str),
    pub sourced: &'a Sourced<Gateway>,
    pub traffic: TrafficFor,
    pub replicas: i32,
    /// In the order of the spec.
    pub listeners: Vec<Listener>,
    /// Why it is not served.
    pub rejected: Option<Rejection>,
    problems: Vec<Diagnostic>,
}

/// A listener, and why it is none of a waypoint's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    pub name: Str,
    pub rejected: Option<Rejection>,
}

/// A reason of the Gateway API, and a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    pub reason: &'static str,
    pub message: String,
}

impl Waypoint<'_> {
    pub fn is_accepted(&self) -> bool {
        self.rejected.is_none()
    }
}

/// Whether a waypoint can have this name, which its Service has too.
pub fn check_name(name: &str) -> Result<(), String> {
    validate::object_name(Kind::Service, name)
}

/// Whether a namespace can have this name.
pub fn check_namespace(name: &str) -> Result<(), String> {
    validate::object_name(Kind::Namespace, name)
}

/// Every Gateway that is a waypoint, by namespace and name.
pub fn understand(objects: &Objects) -> BTreeMap<&(Str, Str), Waypoint<'_>> {
    let waypoints = objects.gateways.iter().filter_map(|(key, sourced)| {
        let class = match class_of(&sourced.value.spec.gateway_class_name, objects) {
            Class::Waypoint { traffic } => traffic,
            Class::Other { .. } | Class::Missing => return None,
        };
        Some((key, understand_one(key, sourced, class.as_deref())))
    });
    waypoints.collect()
}

/// As whom the accepted ones run.
pub(crate) fn accounts(waypoints: &BTreeMap<&(Str, Str), Waypoint<'_>>) -> WaypointAccounts {
    let accepted = waypoints.values().filter(|w| w.is_accepted());
    accepted.map(|w| w.key.clone()).collect()
}

/// Says what is wrong with Gateways and their classes.
pub(crate) fn check(
    objects: &Objects,
    waypoints: &BTreeMap<&(Str, Str), Waypoint<'_>>,
    cx: &mut Context<'_>,
) {
    for (key, sourced) in &objects.gateways {
        if let Some(waypoint) = waypoints.get(key) {
            for problem in &waypoint.problems {
                cx.report(key, sourced, problem.clone());
            }
            continue;
        }
        let name = &sourced.value.spec.gateway_class_name;
        let d = match class_of(name, objects) {
            Class::Other { controller } => {
                let message = format!(
                    "GatewayClass {name:?} is of controller {controller:?}: this version serves waypoints only"
                );
                Diagnostic::warning(Code::Unsupported, message)
            }
            _ => {
                let message =
                    format!("there is no GatewayClass {name:?}: nothing serves the Gateway");
                Diagnostic::error(Code::DanglingReference, message)
            }
        };
        let help = format!("a waypoint has gatewayClassName: {WAYPOINT_CLASS}");
        cx.report(key, sourced, d.field("spec.gatewayClassName").help(help));
    }
}

/// What a class means.
enum Class {
    /// What its object says goes through.
    Waypoint {
        traffic: Option<String>,
    },
    Other {
        controller: String,
    },
    Missing,
}

/// Whether Gateways of a class are waypoints of ours.
pub(crate) fn is_ours(class: &str, objects: &Objects) -> bool {
    matches!(class_of(class, objects), Class::Waypoint { .. })
}

fn class_of(name: &str, objects: &Objects) -> Class {
    let Some(sourced) = objects.gateway_classes.get(&("".into(), name.into())) else {
        return if name == WAYPOINT_CLASS {
            Class::Waypoint { traffic: None }
        } else {
            Class::Missing
        };
    };
    let controller = &sourced.value.spec.controller_name;
    if controller == CONTROLLER {
        Class::Waypoint { traffic: sourced.value.label(WAYPOINT_FOR).map(str::to_owned) }
    } else {
        Class::Other { controller: controller.clone() }
    }
}

fn understand_one<'a>(
    key: &'a (Str, Str),
    sourced: &'a Sourced<Gateway>,
    class_traffic: Option<&str>,
) -> Waypoint<'a> {
    let gateway = &*sourced.value;
    let mut problems = Vec::new();
    let traffic = traffic(gateway, class_traffic, &mut problems);
    let replicas = replicas(gateway, &mut problems);
    let listeners = listeners(&gateway.spec.listeners, &mut problems);
    let rejected = unservable(key, gateway, &mut problems).or_else(|| {
        let none_left = listeners.iter().all(|l| l.rejected.is_some());
        none_left.then(|| {
            let message =
                format!("a waypoint needs a listener with protocol {HBONE} on port {HBONE_PORT}");
            Rejection { reason: "ListenersNotValid", message }
        })
    });
    Waypoint { key, sourced, traffic, replicas, listeners, rejected, problems }
}

/// What can only be refused as a whole.
fn unservable(
    key: &(Str, Str),
    gateway: &Gateway,
    problems: &mut Vec<Diagnostic>,
) -> Option<Rejection> {
    let mut reject = |reason, code, field: &str, message: String, help: &str| {
        let d = Diagnostic::error(code, message.clone()).field(field).help(help);
        problems.push(d);
        Some(Rejection { reason, message })
    };
    if check_name(&key.1).is_err() {
        let message = "its Service would have this name, which no Service can have".to_owned();
        let help = "begin with a letter and use a-z, 0-9 and '-', at most 63 characters";
        return reject("Invalid", Code::InvalidField, "metadata.name", message, help);
    }
    if gateway.spec.addresses.iter().flatten().next().is_some() {
        let message =
            "a waypoint is reached at its Service; no other address can be asked for".to_owned();
        return reject(
            "UnsupportedAddress",
            Code::Unsupported,
            "spec.addresses",
            message,
            "leave addresses out",
        );
    }
    let parameters = gateway.spec.infrastructure.as_ref().and_then(|i| i.parameters_ref.as_ref());
    if let Some(parameters) = parameters {
        let message = format!("{} {:?} is not read", parameters.kind, parameters.name);
        let help = "leave parametersRef out; labels and annotations of infrastructure are honoured";
        let field = "spec.infrastructure.parametersRef";
        return reject("InvalidParameters", Code::Unsupported, field, message, help);
    }
    None
}

fn listeners(spec: &[GatewayListeners], problems: &mut Vec<Diagnostic>) -> Vec<Listener> {
    let mut serving: Option<&str> = None;
    let mut all = Vec::new();
    for (i, listener) in spec.iter().enumerate() {
        let at = format!("spec.listeners[{i}]");
        let (field, rejection) = if listener.protocol != HBONE {
            let message = format!("a waypoint serves {HBONE}, not {:?}", listener.protocol);
            ("protocol", Some(Rejection { reason: "UnsupportedProtocol", message }))
        } else if listener.port != i32::from(HBONE_PORT) {
            let message = format!("a waypoint serves port {HBONE_PORT}, not {}", listener.port);
            ("port", Some(Rejection { reason: "PortUnavailable", message }))
        } else if let Some(first) = serving {
            let message = format!("listener {first:?} has port {HBONE_PORT} already");
            ("port", Some(Rejection { reason: "PortUnavailable", message }))
        } else {
            serving = Some(&listener.name);
            ("", None)
        };
        if let Some(rejection) = &rejection {
            let d = Diagnostic::error(Code::InvalidField, rejection.message.clone());
            let help = format!("write port: {HBONE_PORT}, protocol: {HBONE}");
            problems.push(d.field(format!("{at}.{field}")).help(help));
        }
        for (field, set) in
            [("tls", listener.tls.is_some()), ("hostname", listener.hostname.is_some())]
        {
            if set {
                let message = "has no effect on a waypoint, whose callers show a mesh identity";
                let d = Diagnostic::warning(Code::NoEffect, message);
                problems.push(d.field(format!("{at}.{field}")));
            }
        }
        all.push(Listener { name: listener.name.as_str().into(), rejected: rejection });
    }
    if spec.is_empty() {
        let message =
            format!("a waypoint needs a listener with protocol {HBONE} on port {HBONE_PORT}");
        let d = Diagnostic::error(Code::InvalidField, message).field("spec.listeners");
        problems.push(d.help(format!(
            "write listeners: [{{name: mesh, port: {HBONE_PORT}, protocol: {HBONE}}}]"
        )));
    }
    all
}

fn traffic(gateway: &Gateway, class: Option<&str>, problems: &mut Vec<Diagnostic>) -> TrafficFor {
    let own = gateway.label(WAYPOINT_FOR);
    let Some(text) = own.or(class) else { return TrafficFor::default() };
    TrafficFor::parse(text).unwrap_or_else(|| {
        let message = format!("{text:?} is no kind of traffic; the waypoint is for Services");
        let field = if own.is_some() {
            format!("metadata.labels.{WAYPOINT_FOR}")
        } else {
            "spec.gatewayClassName".to_owned()
        };
        let d = Diagnostic::error(Code::InvalidField, message).field(field);
        problems.push(d.help("write service, workload, all or none"));
        TrafficFor::default()
    })
}

fn replicas(gateway: &Gateway, problems: &mut Vec<Diagnostic>) -> i32 {
    let Some(text) = gateway.annotation(REPLICAS) else { return 1 };
    let number = text.parse().ok().filter(|n| (1..=MAX_REPLICAS).contains(n));
    number.unwrap_or_else(|| {
        let message =
            format!("{text:?} is not a number from 1 to {MAX_REPLICAS}; one pod is started");
        let field = format!("metadata.annotations.{REPLICAS}");
        problems.push(Diagnostic::error(Code::InvalidField, message).field(field));
        1
    })
}

#[cfg(test)]
mod tests;
