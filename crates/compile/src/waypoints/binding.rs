//! Which waypoint a Service or a pod is bound to.
//!
//! The label `istio.io/use-waypoint` names a waypoint's Gateway, on the object or on its namespace; the object's own word
//! goes first, and `none` is a word. The waypoint is reached at the Service of the Gateway's name.
//!
//! Before a waypoint is *programmed*, what names it is reached directly. It is programmed from the moment at which one of
//! its proxies is ready, and from then on for as long as its Gateway exists: without a ready proxy calls are refused,
//! not sent around it. The fact outlives everything that it was seen in, so it is an input ([`Objects::programmed`]) and an
//! output: what was programmed before and what is seen to be ready now. Who calls `compile` keeps it.
//!
//! Invariants: a Gateway that is gone binds nobody; a waypoint, its Service included, is bound to no waypoint; what a label
//! asks for and does not get has a diagnostic.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};
use model::{
    GatewayAddress, GatewayDestination, HBONE_PORT, Health, ServiceKey, Str, TunnelProtocol,
    Workload,
};

use super::{
    TrafficFor, USE_WAYPOINT, USE_WAYPOINT_NAMESPACE, WAYPOINT_CLASS, WAYPOINT_FOR, Waypoint,
};
use crate::context::Context;
use crate::diagnostics::{Code, Diagnostic};
use crate::gateway_api::Gateway;
use crate::gateway_api::gateways::{
    GatewayListenersAllowedRoutesNamespaces, GatewayListenersAllowedRoutesNamespacesFrom as Which,
};
use crate::object::Objects;
use crate::selection::fits;
use crate::services::{self, ByNamespace};

/// Waypoints that had a ready proxy: the namespaces and names of their Gateways.
pub type Programmed = BTreeSet<(Str, Str)>;

pub(crate) type Labels<'a> = Option<&'a BTreeMap<String, String>>;

/// Every waypoint, and what they may be used for.
pub(crate) struct Bindings<'a> {
    objects: &'a Objects,
    namespaces: BTreeMap<&'a str, &'a Namespace>,
    all: BTreeMap<&'a (Str, Str), Target>,
    pub(crate) programmed: Programmed,
}

/// A waypoint as something to be bound to.
#[derive(Debug)]
struct Target {
    key: ServiceKey,
    takes: TrafficFor,
    from: Admits,
}

/// From which namespaces.
#[derive(Debug)]
enum Admits {
    Same,
    All,
    Selected(LabelSelector),
}

/// What is to be bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Traffic {
    Service,
    Workload,
    /// Whatever a namespace holds.
    Any,
}

/// What labels say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    Unsaid,
    OptOut,
    Waypoint(Str, Str),
}

/// Why something is not bound to the waypoint that its label names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    Missing,
    OtherClass(String),
    NotAllowed,
    Traffic(TrafficFor),
}

/// Why calls do not go through a waypoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Direct {
    /// Neither the object nor its namespace says a word.
    Unsaid,
    OptOut {
        by: Sayer,
    },
    /// The label leads nowhere.
    Refused {
        by: Sayer,
        gateway: (Str, Str),
        why: Why,
    },
    /// No proxy of the waypoint has been ready yet.
    NotReady {
        gateway: (Str, Str),
    },
    /// It is a waypoint's own Service or pod.
    Own,
}

/// Whose label counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sayer {
    Object,
    Namespace,
}

impl Why {
    /// The code, what is wrong with a waypoint as something for a namespace, and what to do.
    pub(crate) fn explain(
        &self,
        (gateway_namespace, gateway): (&str, &str),
        namespace: &str,
    ) -> (Code, String, String) {
        let name = format!("Gateway/{gateway_namespace}/{gateway}");
        match self {
            Self::Missing => (
                Code::DanglingReference,
                format!("there is no {name}"),
                format!("meshctl waypoint apply -n {gateway_namespace} --name {gateway}"),
            ),
            Self::OtherClass(class) => (
                Code::NotAWaypoint,
                format!("{name} is of class {class:?} and no waypoint"),
                format!("waypoints are of class {WAYPOINT_CLASS}"),
            ),
            Self::NotAllowed => (
                Code::AttachmentDenied,
                format!("{name} takes nothing of namespace {namespace}"),
                "let its HBONE listener say so in allowedRoutes.namespaces".to_owned(),
            ),
            Self::Traffic(takes) => {
                let takes = match takes {
                    TrafficFor::Service => "calls to Services",
                    TrafficFor::Workload => "calls to pods by their own address",
                    TrafficFor::All => "all calls",
                    TrafficFor::None => "no calls",
                };
                (
                    Code::UnsupportedTrafficType,
                    format!("{name} is for {takes}"),
                    format!("change its label {WAYPOINT_FOR}"),
                )
            }
        }
    }
}

impl Wish {
    /// `namespace`: where the labels are, or what they are of.
    pub(crate) fn of(labels: Labels<'_>, namespace: &str) -> Self {
        let get = |name| labels.and_then(|l| l.get(name)).map(String::as_str);
        match get(USE_WAYPOINT) {
            None | Some("") => Self::Unsaid,
            Some("none") => Self::OptOut,
            Some(name) => {
                let elsewhere = get(USE_WAYPOINT_NAMESPACE).filter(|ns| !ns.is_empty());
                Self::Waypoint(elsewhere.unwrap_or(namespace).into(), name.into())
            }
        }
    }
}

impl<'a> Bindings<'a> {
    pub(crate) fn new(
        objects: &'a Objects,
        waypoints: &BTreeMap<&'a (Str, Str), Waypoint<'a>>,
        workloads: &[Arc<Workload>],
        cluster_domain: &str,
    ) -> Self {
        let mut new = Self::known(objects, waypoints, Programmed::new(), cluster_domain);
        let ready = ready(&new.all, workloads);
        for (key, waypoint) in waypoints {
            let known = objects.programmed.contains(*key) || ready.contains(*key);
            if known || says_programmed(&waypoint.sourced.value) {
                new.programmed.insert((*key).clone());
            }
        }
        new
    }

    /// Where it is known already which waypoints are or were ready.
    pub(crate) fn known(
        objects: &'a Objects,
        waypoints: &BTreeMap<&'a (Str, Str), Waypoint<'a>>,
        programmed: Programmed,
        cluster_domain: &str,
    ) -> Self {
        let namespaces = objects.namespaces.iter();
        let namespaces = namespaces.map(|((_, name), s)| (&**name, &*s.value)).collect();
        let targets = waypoints.iter().map(|(key, w)| (*key, Target::new(w, cluster_domain)));
        Self { objects, namespaces, all: targets.collect(), programmed }
    }

    /// Names the waypoints to which nothing is bound yet.
    pub(crate) fn report(
        &self,
        waypoints: &BTreeMap<&'a (Str, Str), Waypoint<'a>>,
        cx: &mut Context<'_>,
    ) {
        for (key, waypoint) in waypoints.iter().filter(|(key, _)| !self.programmed.contains(**key))
        {
            cx.report(key, waypoint.sourced, not_ready());
        }
    }

    /// Writes into Services and workloads which waypoint each is bound to.
    pub(crate) fn bind(&self, services: &mut ByNamespace, workloads: &mut [Arc<Workload>]) {
        if self.programmed.is_empty() {
            return;
        }
        for service in services.values_mut().flatten() {
            let (namespace, name) = (&service.service.key.namespace, &service.service.name);
            let key = (namespace.clone(), name.clone());
            let object = self.objects.services.get(&key).filter(|_| !self.all.contains_key(&key));
            let labels = object.map(|o| o.value.metadata.labels.as_ref());
            let bound = labels.and_then(|labels| self.choose(labels, &key.0, Traffic::Service));
            if bound.is_some() {
                Arc::make_mut(&mut service.service).waypoint = bound;
            }
        }
        for workload in workloads {
            let key = (workload.namespace.clone(), workload.name.clone());
            let pod = self.objects.pods.get(&key).filter(|_| !self.is_proxy(workload));
            let labels = pod.map(|pod| pod.value.metadata.labels.as_ref());
            let bound = labels.and_then(|labels| self.choose(labels, &key.0, Traffic::Workload));
            if bound.is_some() {
                Arc::make_mut(workload).waypoint = bound;
            }
        }
    }

    /// Whether the waypoint of this name may serve something of this namespace.
    pub(crate) fn check(
        &self,
        at: (&Str, &Str),
        namespace: &str,
        traffic: Traffic,
    ) -> Result<(), Why> {
        self.attach(at, namespace, traffic).map(|_| ())
    }

    /// Why calls to a Service are not bound to a waypoint, if they are not.
    pub(crate) fn of_service(&self, service: &model::Service) -> Result<(), Direct> {
        let key = (service.key.namespace.clone(), service.name.clone());
        if self.all.contains_key(&key) {
            return Err(Direct::Own);
        }
        let object = self.objects.services.get(&key);
        let labels = object.and_then(|o| o.value.metadata.labels.as_ref());
        self.follow(labels, &key.0, Traffic::Service).map(|_| ())
    }

    /// Waypoints of a namespace that calls to its own Services could go through.
    pub(crate) fn for_services_of(&self, namespace: &str) -> impl Iterator<Item = &(Str, Str)> {
        let own = self.all.iter().filter(move |(key, _)| *key.0 == *namespace);
        own.filter(|(_, target)| target.takes.services()).map(|(key, _)| *key)
    }

    fn choose(&self, labels: Labels<'_>, namespace: &str, for_: Traffic) -> Option<GatewayAddress> {
        self.follow(labels, namespace, for_).ok()
    }

    fn follow(
        &self,
        labels: Labels<'_>,
        namespace: &str,
        for_: Traffic,
    ) -> Result<GatewayAddress, Direct> {
        let (by, wish) = match Wish::of(labels, namespace) {
            Wish::Unsaid => {
                let of_namespace = self.namespaces.get(namespace);
                let labels = of_namespace.and_then(|ns| ns.metadata.labels.as_ref());
                (Sayer::Namespace, Wish::of(labels, namespace))
            }
            own => (Sayer::Object, own),
        };
        let gateway = match wish {
            Wish::Unsaid => return Err(Direct::Unsaid),
            Wish::OptOut => return Err(Direct::OptOut { by }),
            Wish::Waypoint(gateway_namespace, gateway) => (gateway_namespace, gateway),
        };
        match self.attach((&gateway.0, &gateway.1), namespace, for_) {
            Err(why) => Err(Direct::Refused { by, gateway, why }),
            Ok(_) if !self.programmed.contains(&gateway) => Err(Direct::NotReady { gateway }),
            Ok(found) => {
                let destination = GatewayDestination::Service(found.key.clone());
                Ok(GatewayAddress { destination, hbone_port: HBONE_PORT })
            }
        }
    }

    fn attach(
        &self,
        (gateway_namespace, gateway): (&Str, &Str),
        namespace: &str,
        traffic: Traffic,
    ) -> Result<&Target, Why> {
        let key = (gateway_namespace.clone(), gateway.clone());
        let Some(found) = self.all.get(&key) else {
            return Err(match self.objects.gateways.get(&key) {
                Some(other) => Why::OtherClass(other.value.spec.gateway_class_name.clone()),
                None => Why::Missing,
            });
        };
        let allowed = match &found.from {
            _ if *key.0 == *namespace => true,
            Admits::Same => false,
            Admits::All => true,
            Admits::Selected(selector) => self.is_selected(selector, namespace),
        };
        let takes = match traffic {
            Traffic::Service => found.takes.services(),
            Traffic::Workload => found.takes.workloads(),
            Traffic::Any => found.takes != TrafficFor::None,
        };
        match (allowed, takes) {
            (false, _) => Err(Why::NotAllowed),
            (true, false) => Err(Why::Traffic(found.takes)),
            (true, true) => Ok(found),
        }
    }

    fn is_selected(&self, selector: &LabelSelector, namespace: &str) -> bool {
        let object = self.namespaces.get(namespace);
        let mut labels = object.and_then(|ns| ns.metadata.labels.clone()).unwrap_or_default();
        // Every cluster sets it on every namespace; people do not write it.
        labels.insert("kubernetes.io/metadata.name".to_owned(), namespace.to_owned());
        fits(selector, Some(&labels))
    }

    fn is_proxy(&self, workload: &Workload) -> bool {
        let mut services = workload.services.iter().map(|(key, _)| key);
        workload.native_tunnel
            && services.any(|key| self.all.values().any(|target| target.key == *key))
    }
}

impl fmt::Debug for Bindings<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bindings")
            .field("all", &self.all)
            .field("programmed", &self.programmed)
            .finish_non_exhaustive()
    }
}

impl Target {
    fn new(waypoint: &Waypoint<'_>, cluster_domain: &str) -> Self {
        // The one that is served, of those that are written.
        let spec = &waypoint.sourced.value.spec.listeners;
        let mut served = waypoint.listeners.iter().zip(spec).filter(|(l, _)| l.rejected.is_none());
        let listener = served.next().map(|(_, listener)| listener);
        let namespaces = listener.and_then(|l| l.allowed_routes.as_ref()?.namespaces.as_ref());
        let (namespace, name) = waypoint.key;
        Self {
            key: services::key(namespace, name, cluster_domain),
            takes: waypoint.traffic,
            from: namespaces.map_or(Admits::Same, admits),
        }
    }
}

fn admits(namespaces: &GatewayListenersAllowedRoutesNamespaces) -> Admits {
    match namespaces.from {
        None | Some(Which::Same) => Admits::Same,
        Some(Which::All) => Admits::All,
        Some(Which::Selector) => {
            // Without a selector nothing is selected.
            let Some(selector) = &namespaces.selector else { return Admits::Same };
            let expressions = selector.match_expressions.iter().flatten();
            let expressions = expressions.map(|e| LabelSelectorRequirement {
                key: e.key.clone(),
                operator: e.operator.clone(),
                values: e.values.clone(),
            });
            Admits::Selected(LabelSelector {
                match_labels: selector.match_labels.clone(),
                match_expressions: Some(expressions.collect()),
            })
        }
    }
}

/// Waypoints with a proxy that takes connections.
fn ready<'a>(
    all: &BTreeMap<&'a (Str, Str), Target>,
    workloads: &[Arc<Workload>],
) -> BTreeSet<&'a (Str, Str)> {
    let by_service: BTreeMap<&ServiceKey, &'a (Str, Str)> =
        all.iter().map(|(gateway, target)| (&target.key, *gateway)).collect();
    if by_service.is_empty() {
        return BTreeSet::new();
    }
    let is_ready = |w: &&Arc<Workload>| {
        w.native_tunnel && w.protocol == TunnelProtocol::Hbone && w.health == Health::Healthy
    };
    let services = workloads.iter().filter(is_ready).flat_map(|w| w.services.iter());
    services.filter_map(|(key, _)| by_service.get(key).copied()).collect()
}

/// What whoever made the proxies wrote down.
fn says_programmed(gateway: &Gateway) -> bool {
    let conditions = gateway.status.as_ref().and_then(|status| status.conditions.as_deref());
    let mut conditions = conditions.unwrap_or_default().iter();
    conditions.any(|c| c.type_ == "Programmed" && c.status == "True")
}

fn not_ready() -> Diagnostic {
    let message = "no proxy of this waypoint has been ready yet: until one is, what names it is \
                   reached directly, without its routes and policies";
    Diagnostic::info(Code::WaypointNotReady, message)
}

#[cfg(test)]
mod tests;
