//! Objects to what they mean, again and again: what no change has touched is not worked out again.
//!
//! Two things are kept from one time to the next. The *frame*: what everything but routes means, which is most of the work where
//! there are many pods. And within it, what each HTTPRoute and GRPCRoute means, and what the routes of each Service come to.
//! When anything but a route changes, both are made anew. VirtualServices are read each time; what they say is compared.
//!
//! Invariant: the result is what [`compile`] makes of the same objects; a property test holds it to that.

use std::collections::BTreeMap;
use std::mem;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use model::http::Subset;
use model::{Policy, PolicyKey, Service, Workload};

use crate::context::{Context, Patterns};
use crate::diagnostics::{self, Diagnostic};
use crate::object::Objects;
use crate::services::ByNamespace;
use crate::waypoints::binding::Bindings;
use crate::{
    Compiled, GatewayStatus, MeshConfig, PodsOnNodes, Programmed, WaypointAccounts, authorization,
    http, istio, peer_authentication, pods, references, services, waypoints,
};

/// Compiles objects again and again, each time what the change touches: [`compile`], with a memory.
#[derive(Debug)]
pub struct Compiler {
    config: MeshConfig,
    last: Option<Last>,
    patterns: Patterns,
}

/// The last time.
#[derive(Debug)]
struct Last {
    objects: Objects,
    frame: Frame,
    routes: http::Memo,
}

impl Compiler {
    /// Remembers nothing yet.
    pub fn new(config: MeshConfig) -> Self {
        Self { config, last: None, patterns: Patterns::default() }
    }

    /// What everything that is in force means. Remembers the objects and what they mean until the next time.
    pub fn compile(&mut self, objects: Objects) -> Compiled {
        let last = self.last.take().filter(|last| last.objects.is_but_for_routes(&objects));
        let patterns = mem::take(&mut self.patterns);
        let (compiled, frame, routes, mut patterns) = again(&objects, last, patterns, &self.config);
        patterns.sweep();
        self.patterns = patterns;
        self.last = Some(Last { objects, frame, routes });
        compiled
    }
}

/// What everything that is in force means.
pub fn compile(objects: &Objects, config: &MeshConfig) -> Compiled {
    again(objects, None, Patterns::default(), config).0
}

fn again(
    objects: &Objects,
    last: Option<Last>,
    patterns: Patterns,
    config: &MeshConfig,
) -> (Compiled, Frame, http::Memo, Patterns) {
    let (before, frame, mut routes) = match last {
        Some(Last { objects, frame, routes }) => (Some(objects), frame, routes),
        None => (None, Frame::new(objects, config), http::Memo::default()),
    };
    let mut cx = Context::with_patterns(config, patterns);
    let waypoints = waypoints::understand(objects);
    let (programmed, domain) = (frame.programmed.clone(), &config.cluster_domain);
    let bindings = Bindings::known(objects, &waypoints, programmed, domain);
    let around = http::Surroundings {
        services: &frame.by_namespace,
        subsets: &frame.subsets,
        bindings: &bindings,
    };
    let http = http::compile(objects, before.as_ref(), around, &mut routes, &mut cx);
    references::check_routes(objects, &mut cx);
    let mut diagnostics = mem::take(&mut cx.diagnostics);
    diagnostics.extend(frame.diagnostics.iter().cloned());
    diagnostics::sort(&mut diagnostics);
    let compiled = Compiled {
        workloads: frame.workloads.clone(),
        services: frame.services.clone(),
        policies: frame.policies.clone(),
        routes: http.routes,
        subsets: frame.subsets.clone(),
        route_status: http.status,
        diagnostics,
        pods: frame.pods.clone(),
        gateways: frame.gateways.clone(),
        waypoint_accounts: frame.waypoint_accounts.clone(),
        programmed: frame.programmed.clone(),
    };
    (compiled, frame, routes, cx.patterns)
}

/// What everything but routes means.
#[derive(Debug)]
struct Frame {
    by_namespace: ByNamespace,
    workloads: Vec<Arc<Workload>>,
    services: Vec<Arc<Service>>,
    policies: Vec<Arc<Policy>>,
    subsets: Vec<Arc<Subset>>,
    pods: Arc<PodsOnNodes>,
    gateways: Vec<GatewayStatus>,
    waypoint_accounts: WaypointAccounts,
    programmed: Programmed,
    diagnostics: Vec<Diagnostic>,
}

impl Frame {
    fn new(objects: &Objects, config: &MeshConfig) -> Self {
        let mut cx = Context::new(config);
        let domain = &config.cluster_domain;
        let waypoints = waypoints::understand(objects);
        waypoints::check(objects, &waypoints, &mut cx);
        let mut by_namespace = services::compile(objects, &mut cx);
        let authorization = authorization::compile(objects, &mut cx);
        let peers = peer_authentication::compile(objects, &mut cx);
        let selectors = Selectors::of(&authorization);
        let policies_of = |namespace: &str, pod: &Pod| {
            let mut keys = selectors.policies_of(namespace, pod.metadata.labels.as_ref());
            keys.extend(peers.policy_of(namespace, pod).cloned());
            keys.sort_unstable();
            keys
        };
        let mut workloads = pods::compile(objects, &by_namespace, &policies_of, &mut cx);
        workloads.sort_by(|a, b| a.uid.cmp(&b.uid));
        let bindings = Bindings::new(objects, &waypoints, &workloads, domain);
        bindings.report(&waypoints, &mut cx);
        bindings.bind(&mut by_namespace, &mut workloads);
        let subsets = http::destination_rule::subsets(objects, &by_namespace, &workloads, &mut cx);
        http::gateway::grants(objects, &mut cx);
        references::check(objects, &by_namespace, &authorization, &bindings, &mut cx);
        let pods = Arc::new(pods::on_nodes(objects, &mut cx));
        let mut services: Vec<_> =
            by_namespace.values().flatten().map(|s| s.service.clone()).collect();
        services.sort_by(|a, b| a.key.cmp(&b.key));
        let mut policies: Vec<_> = authorization.into_iter().map(|c| c.policy).collect();
        policies.extend(peers.policies);
        policies.sort_by(|a, b| a.key.cmp(&b.key));
        let gateways = waypoints::statuses(objects, &waypoints, &services, &workloads, domain);
        let waypoint_accounts = waypoints::accounts(&waypoints);
        let programmed = bindings.programmed;
        let diagnostics = cx.diagnostics;
        Self {
            by_namespace,
            workloads,
            services,
            policies,
            subsets,
            pods,
            gateways,
            waypoint_accounts,
            programmed,
            diagnostics,
        }
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
mod tests;
