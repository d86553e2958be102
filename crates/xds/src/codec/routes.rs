//! HTTP routes and subsets of Services (`ambit.v1.Routes`, `ambit.v1.Subset`) on the wire.
//!
//! Both types are our own, so nothing has to be tolerated: an unknown field, an unknown kind of match or filter, a pattern
//! that does not compile, a number out of range or an amount beyond the limits below is an error that names the resource and
//! the field, and the whole resource is refused. Half a route would send requests where nobody meant them to go.
//!
//! [`closed_routes`] and [`closed_subset`] stand in for what was never readable: every request to the Service is answered
//! with [`Reason::Unsupported`], a subset has no endpoints. Both are known by the resource's name alone.

mod decode;
mod encode;
mod reader;

use std::collections::BTreeSet;
use std::sync::Arc;

use model::http::{
    Audience, Filter, RouteKind, RouteMatch, RouteRule, RouteSet, ServiceRoutes, Subset, SubsetKey,
    Timeouts,
};
use model::{Provenance, Reason, ServiceKey, Str};

use super::Interner;
pub use decode::{decode_routes, decode_subset};
pub use encode::{encode_routes, encode_subset};
pub(crate) use encode::{encode_routes_by, encode_rule};

/// Workloads of one subset: twice the pods of the largest mesh that we plan for.
const MAX_SUBSET: usize = 200_000;

/// Resource name of the routes of a Service.
pub fn routes_name(routes: &ServiceRoutes) -> Str {
    routes.service.to_string().into()
}

/// Resource name of a subset.
pub fn subset_name(subset: &Subset) -> Str {
    subset.key.to_string().into()
}

/// What to enforce in place of routes that could not be decoded and that were not there before: every request, to any
/// port, is answered with an error. `None` when the name is no Service's.
pub fn closed_routes(name: &str, interner: &mut Interner) -> Option<ServiceRoutes> {
    let message = "the control plane sent routes that this waypoint cannot read; its log says why";
    let rule = RouteRule {
        route: interner.str(&format!("Routes/{name}")),
        name: interner.str("closed"),
        provenance: Provenance {
            object: interner.str(name),
            field: interner.str("(refused by this proxy: closed until it can be read)"),
            origin: interner.str(""),
        },
        filters: vec![Filter::Fail { reason: Reason::Unsupported, message: interner.str(message) }],
        backends: Vec::new(),
        timeouts: Timeouts::default(),
    };
    let (rules, matches) = ([Arc::new(rule)], [RouteMatch::default()]);
    let set = RouteSet::new(
        Audience::Everybody,
        Arc::new([]),
        RouteKind::Http,
        Arc::new(rules),
        Arc::new(matches),
    );
    Some(ServiceRoutes {
        service: service_key(name, interner)?,
        ports: Arc::new([]),
        sets: Arc::new([Arc::new(set.ok()?)]),
    })
}

/// What to know in place of a subset that could not be decoded and that was not there before: nobody belongs to it. `None`
/// when the name is no subset's.
pub fn closed_subset(name: &str, interner: &mut Interner) -> Option<Subset> {
    let (service, subset) = name.rsplit_once('/')?;
    let service = service_key(service, interner)?;
    if subset.is_empty() {
        return None;
    }
    let key = SubsetKey { service, name: interner.str(subset) };
    Some(Subset { key, workloads: BTreeSet::new() })
}

/// The Service that `namespace/hostname` names.
fn service_key(name: &str, interner: &mut Interner) -> Option<ServiceKey> {
    let (namespace, hostname) = name.split_once('/')?;
    let plain = !namespace.is_empty() && !hostname.is_empty() && !hostname.contains('/');
    plain.then(|| ServiceKey {
        namespace: interner.str(namespace),
        hostname: interner.str(hostname),
    })
}

#[cfg(test)]
mod tests;
