//! Kubernetes, Gateway API and Istio objects to what a proxy knows ([`model`]), to route status, and to diagnostics.
//!
//! Text comes in through [`Folder`] (or [`parse_file`]), [`compile`] turns [`Objects`] into [`Compiled`], and [`Compiler`] does
//! it again and again.
//! [`local`] does what a cluster's controllers and scheduler do, for the world on one machine.
//!
//! Invariants: no IO, clock, randomness or environment; every function is total: bad input becomes
//! diagnostics, never a panic; the result depends on the objects alone, not on the order in which they
//! came; every policy and rule carries its provenance.

use std::sync::Arc;

use model::Str;

mod addresses;
pub mod ambit;
mod authorization;
mod compiler;
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

pub use compiler::{Compiler, compile};
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
#[derive(Clone, Debug, Default, PartialEq)]
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
    pub route_status: Vec<Arc<RouteStatus>>,
    /// Errors first, then by place.
    pub diagnostics: Vec<Diagnostic>,
    /// Who may be given a certificate on which node.
    pub pods: Arc<PodsOnNodes>,
    /// How the Gateways are that are waypoints, by namespace and name.
    pub gateways: Vec<GatewayStatus>,
    /// As whom waypoints run: they may read the configuration.
    pub waypoint_accounts: WaypointAccounts,
    /// Waypoints to which what names them is bound: [`Objects::programmed`] for the next time.
    pub programmed: Programmed,
}

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
