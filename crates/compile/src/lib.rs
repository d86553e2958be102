//! Kubernetes, Gateway API and Istio objects to what a proxy knows ([`model`]), to route status, and to diagnostics.
//!
//! Text comes in through [`Folder`] (or [`parse_file`]), [`compile`] turns [`Objects`] into [`Compiled`].
//! [`local`] does what a cluster's controllers and scheduler do, for the world on one machine.
//!
//! Invariants: no IO, clock, randomness or environment; every function is total: bad input becomes
//! diagnostics, never a panic; the result depends on the objects alone, not on the order in which they
//! came; every policy and rule carries its provenance.

use std::collections::BTreeMap;
use std::sync::Arc;

use model::{PolicyKey, Str};
use waypoints::binding::Bindings;

mod addresses;
pub mod ambit;
mod authorization;
mod context;
mod diagnostics;
mod enrolment;
mod folder;
pub mod gateway_api;
mod http;
pub mod istio;
mod kinds;
mod labels;
pub mod local;
mod object;
mod parse;
mod peer_authentication;
mod pods;
mod read;
mod references;
mod selection;
mod services;
mod validate;
pub mod waypoints;
mod yaml;

pub use diagnostics::{Code, Diagnostic, Severity, sort as sort_diagnostics};
pub use enrolment::{DATAPLANE_MODE, DNS_CAPTURE, Enrolment, REDIRECTION, captures_dns, enrolment};
pub use folder::Folder;
pub use http::{
    CONTROLLER_NAME, Condition, ConditionReason, ConditionType, ParentReference, RouteStatus,
};
pub use object::{Body, ORIGIN_ANNOTATION, Object, Objects, Origin, Sourced, Table, object_id};
pub use parse::{ParsedFile, parse_file};
pub use pods::PodsOnNodes;
pub use waypoints::{GatewayStatus, Programmed, WaypointAccounts};

/// What holds for the whole mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeshConfig {
    pub trust_domain: Str,
    pub cluster: Str,
    pub network: Str,
    /// Policies here are for the whole mesh.
    pub root_namespace: Str,
    pub cluster_domain: Str,
}

impl Default for MeshConfig {
    fn default() -> Self {
        Self {
            trust_domain: "cluster.local".into(),
            cluster: "Kubernetes".into(),
            network: "".into(),
            root_namespace: "istio-system".into(),
            cluster_domain: "cluster.local".into(),
        }
    }
}

/// What the objects mean.
#[derive(Clone, Debug, Default)]
pub struct Compiled {
    /// By uid.
    pub workloads: Vec<Arc<model::Workload>>,
    /// By key.
    pub services: Vec<Arc<model::Service>>,
    /// By key.
    pub policies: Vec<Arc<model::Policy>>,
    /// By service: those with routes, and those that declare what a port speaks.
    pub routes: Vec<Arc<model::http::ServiceRoutes>>,
    /// By key.
    pub subsets: Vec<Arc<model::http::Subset>>,
    /// By kind, namespace, name, and place of the parent.
    pub route_status: Vec<RouteStatus>,
    /// Errors first, then by place.
    pub diagnostics: Vec<Diagnostic>,
    /// Who may be given a certificate on which node.
    pub pods: PodsOnNodes,
    /// How the Gateways are that are waypoints, by namespace and name.
    pub gateways: Vec<GatewayStatus>,
    /// As whom waypoints run: they may read the configuration.
    pub waypoint_accounts: WaypointAccounts,
    /// Waypoints to which what names them is bound: [`Objects::programmed`] for the next time.
    pub programmed: Programmed,
}

/// Compiles everything that is in force.
pub fn compile(objects: &Objects, config: &MeshConfig) -> Compiled {
    let mut cx = context::Context::new(config);
    let waypoints = waypoints::understand(objects);
    waypoints::check(objects, &waypoints, &mut cx);
    let mut services = services::compile(objects, &mut cx);
    let authorization = authorization::compile(objects, &mut cx);
    let peers = peer_authentication::compile(objects, &mut cx);
    let selectors = Selectors::of(&authorization);
    let policies_of = |namespace: &str, pod: &k8s_openapi::api::core::v1::Pod| {
        let mut keys = selectors.policies_of(namespace, pod.metadata.labels.as_ref());
        keys.extend(peers.policy_of(namespace, pod).cloned());
        keys.sort_unstable();
        keys
    };
    let mut workloads = pods::compile(objects, &services, &policies_of, &mut cx);
    workloads.sort_by(|a, b| a.uid.cmp(&b.uid));
    let bindings = Bindings::new(objects, &waypoints, &workloads, &mut cx);
    bindings.bind(&mut services, &mut workloads);
    let http = http::compile(objects, &services, &workloads, &bindings, &mut cx);
    references::check(objects, &services, &authorization, &bindings, &mut cx);
    let pods = pods::on_nodes(objects, &mut cx);
    let mut services: Vec<_> = services.into_values().flatten().map(|s| s.service).collect();
    services.sort_by(|a, b| a.key.cmp(&b.key));
    let mut policies: Vec<_> = authorization.into_iter().map(|c| c.policy).collect();
    policies.extend(peers.policies);
    policies.sort_by(|a, b| a.key.cmp(&b.key));
    let domain = &config.cluster_domain;
    let gateways = waypoints::statuses(objects, &waypoints, &services, &workloads, domain);
    let waypoint_accounts = waypoints::accounts(&waypoints);
    let mut diagnostics = cx.diagnostics;
    diagnostics::sort(&mut diagnostics);
    let programmed = bindings.programmed;
    Compiled {
        workloads,
        services,
        policies,
        routes: http.routes,
        subsets: http.subsets,
        route_status: http.status,
        diagnostics,
        pods,
        gateways,
        waypoint_accounts,
        programmed,
    }
}

/// Policies with a selector, by the namespace they are for: mesh-wide ones under `None`.
struct Selectors<'a>(BTreeMap<Option<&'a str>, Vec<&'a authorization::Compiled>>);

impl<'a> Selectors<'a> {
    fn of(policies: &'a [authorization::Compiled]) -> Self {
        let mut by_namespace: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for compiled in policies {
            if let Some(selection) = &compiled.selection {
                by_namespace.entry(selection.namespace.as_deref()).or_default().push(compiled);
            }
        }
        Self(by_namespace)
    }

    fn policies_of(
        &self,
        namespace: &str,
        labels: Option<&BTreeMap<String, String>>,
    ) -> Vec<PolicyKey> {
        let candidates = [None, Some(namespace)].into_iter().filter_map(|ns| self.0.get(&ns));
        let selecting = candidates.flatten().filter(|compiled| {
            compiled.selection.as_ref().is_some_and(|s| istio::selects(&s.labels, labels))
        });
        selecting.map(|compiled| compiled.policy.key.clone()).collect()
    }
}

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
