//! Where a route sends: Services, by their own ports.
//!
//! A reference that is no good is a [`Target::Invalid`] with the reason, so that its share of the requests is answered with an
//! error; the route goes on. References into other namespaces need no ReferenceGrant: a route of a Service gives nobody a way that a
//! client of the mesh does not have.

use model::http::Target;

use super::rules::RuleCompiler;
use super::shape::ObjectRef;
use super::status::ConditionReason;
use crate::diagnostics::{Code, Diagnostic};
use crate::gateway_api::GROUP;
use crate::services;

/// What `to`, which stands at `at`, leads to.
pub(super) fn target(to: &ObjectRef<'_>, at: &str, c: &mut RuleCompiler<'_, '_>) -> Target {
    match find(to, c) {
        Ok(target) => target,
        Err(Bad { reason, field, message, help }) => {
            let code = match reason {
                ConditionReason::BackendNotFound => Code::DanglingReference,
                _ => Code::Unsupported,
            };
            let d = Diagnostic::error(code, message.clone()).help(help);
            c.bad_reference(reason, d.field(format!("{at}.{field}")));
            Target::Invalid { message: message.into() }
        }
    }
}

/// Why a reference is no good.
struct Bad {
    reason: ConditionReason,
    field: &'static str,
    message: String,
    help: &'static str,
}

fn find(to: &ObjectRef<'_>, c: &RuleCompiler<'_, '_>) -> Result<Target, Bad> {
    let bad = |reason, field, message, help| Bad { reason, field, message, help };
    if (to.group, to.kind) != ("", "Service") {
        let name = if to.group.is_empty() { "core" } else { to.group };
        let message = format!("{} of group {name} is nothing that can be sent to", to.kind);
        let slip = to.kind == "Service" && to.group == GROUP;
        let help = if slip { "a Service has no group: leave it out" } else { "use a Service" };
        return Err(bad(ConditionReason::InvalidKind, "kind", message, help));
    }
    let namespace = to.namespace.unwrap_or(c.namespace);
    let Some(service) = services::find(c.services, namespace, to.name) else {
        let there = c.objects.services.contains_key(&(namespace.into(), to.name.into()));
        let name = format!("{namespace}/{}", to.name);
        let (reason, message, help) = if there {
            let message = format!("Service {name} has no endpoints of its own (ExternalName)");
            (ConditionReason::InvalidKind, message, "use a Service with a selector")
        } else {
            let message = format!("there is no Service {name}");
            (ConditionReason::BackendNotFound, message, "add it, or mend the name")
        };
        return Err(bad(reason, "name", message, help));
    };
    let key = &service.service.key;
    let Some(port) = to.port else {
        let message = format!("says no port of Service {namespace}/{}", to.name);
        let help = "the Service's own port, not the pod's";
        return Err(bad(ConditionReason::BackendNotFound, "port", message, help));
    };
    let mut ports = service.service.ports.iter().zip(&service.ports);
    let Some((own, facts)) = ports.find(|(p, _)| i32::from(p.service_port) == port) else {
        let message = format!("Service {namespace}/{} has no port {port}", to.name);
        let help = "the Service's own port, not the pod's";
        return Err(bad(ConditionReason::BackendNotFound, "port", message, help));
    };
    if facts.wants_tls {
        let message = format!(
            "port {port} of Service {namespace}/{} is declared as TLS, which is not begun for a route",
            to.name
        );
        let help = "name a port without TLS: between pods of the mesh it is encrypted anyway";
        return Err(bad(ConditionReason::UnsupportedProtocol, "port", message, help));
    }
    Ok(Target::Service { service: key.clone(), port: own.service_port, subset: None })
}
