//! What an API server would refuse: names, ports and addresses that cannot be.
//!
//! Runs at the edge, in `parse`, so that a slip costs nothing that is in force. The compilers behind it
//! do not rely on it: they are total.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{PodSpec, ServiceSpec};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use crate::istio::{AuthorizationPolicySpec, PeerAuthenticationSpec, Source};
use crate::kinds::Kind;
use crate::object::Body;
use crate::{addresses, authorization, http};

/// Takes a field path and what is wrong with the value there.
pub(crate) type Report<'a> = &'a mut dyn FnMut(String, String);

pub(crate) fn body(body: &Body, report: Report<'_>) {
    match body {
        Body::Namespace(_) | Body::Node(_) | Body::ServiceAccount(_) => {}
        Body::Pod(pod) => {
            if let Some(spec) = &pod.spec {
                pod_spec("spec", spec, report);
            }
        }
        Body::Deployment(deployment) => {
            if let Some(spec) = &deployment.spec {
                if spec.replicas.is_some_and(|n| n < 0) {
                    report("spec.replicas".into(), "must not be negative".into());
                }
                if let Some(spec) = &spec.template.spec {
                    pod_spec("spec.template.spec", spec, report);
                }
            }
        }
        Body::Service(service) => {
            if let Some(spec) = &service.spec {
                service_spec(spec, report);
            }
        }
        Body::AuthorizationPolicy(policy) => authorization_policy(&policy.spec, report),
        Body::PeerAuthentication(policy) => peer_authentication(&policy.spec, report),
        Body::HttpRoute(_)
        | Body::GrpcRoute(_)
        | Body::Gateway(_)
        | Body::GatewayClass(_)
        | Body::ReferenceGrant(_)
        // What is wrong with a fault ends it, and nothing else: see `http::faults`.
        | Body::HttpFault(_) => {}
        Body::VirtualService(service) => http::virtual_service::validate(&service.spec, report),
        Body::DestinationRule(rule) => http::destination_rule::validate(&rule.spec, report),
    }
}

pub(crate) fn object_name(kind: Kind, name: &str) -> Result<(), String> {
    match kind {
        Kind::Namespace => label_name(name),
        Kind::Service => {
            label_name(name)?;
            if name.starts_with(|c: char| c.is_ascii_digit()) {
                return Err(format!("{name:?}: the name of a Service must start with a letter"));
            }
            Ok(())
        }
        _ => subdomain_name(name),
    }
}

/// A DNS label: at most 63 of `a-z`, `0-9` and `-`, not at the ends.
pub(crate) fn label_name(name: &str) -> Result<(), String> {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let good = (1..=63).contains(&name.len())
        && name.bytes().all(inner)
        && !name.starts_with('-')
        && !name.ends_with('-');
    if good {
        Ok(())
    } else {
        let name: String = name.chars().take(80).collect();
        Err(format!("{name:?} is not a valid name: use a-z, 0-9 and '-', at most 63 characters"))
    }
}

/// DNS labels joined by dots, at most 253 characters.
fn subdomain_name(name: &str) -> Result<(), String> {
    if name.len() > 253 {
        return Err("the name is longer than 253 characters".into());
    }
    name.split('.').try_for_each(label_name)
}

fn pod_spec(at: &str, spec: &PodSpec, report: Report<'_>) {
    if let Some(node) = spec.node_name.as_deref().filter(|n| !n.is_empty())
        && let Err(message) = subdomain_name(node)
    {
        report(format!("{at}.nodeName"), message);
    }
    if let Some(account) = spec.service_account_name.as_deref().filter(|n| !n.is_empty())
        && let Err(message) = subdomain_name(account)
    {
        report(format!("{at}.serviceAccountName"), message);
    }
    if spec.containers.is_empty() {
        report(format!("{at}.containers"), "a pod needs at least one container".into());
    }
    let mut names = BTreeMap::new();
    let init = spec.init_containers.iter().flatten().enumerate().map(|c| ("initContainers", c));
    let main = spec.containers.iter().enumerate().map(|c| ("containers", c));
    for (list, (i, container)) in init.chain(main) {
        let at = format!("{at}.{list}[{i}]");
        if let Err(message) = label_name(&container.name) {
            report(format!("{at}.name"), message);
        }
        if let Some(first) = names.insert(&container.name, at.clone()) {
            report(format!("{at}.name"), format!("{first} has the same name"));
        }
        for (j, port) in container.ports.iter().flatten().enumerate() {
            if !is_port(port.container_port) {
                report(format!("{at}.ports[{j}].containerPort"), not_a_port(port.container_port));
            }
        }
    }
}

fn service_spec(spec: &ServiceSpec, report: Report<'_>) {
    let mut numbers = BTreeMap::new();
    let mut names = BTreeMap::new();
    for (i, port) in spec.ports.iter().flatten().enumerate() {
        let at = format!("spec.ports[{i}]");
        let protocol = port.protocol.as_deref().unwrap_or("TCP");
        if !matches!(protocol, "TCP" | "UDP" | "SCTP") {
            report(format!("{at}.protocol"), format!("{protocol:?} is not TCP, UDP or SCTP"));
        }
        if !is_port(port.port) {
            report(format!("{at}.port"), not_a_port(port.port));
        }
        match &port.target_port {
            Some(IntOrString::Int(n)) if !is_port(*n) => {
                report(format!("{at}.targetPort"), not_a_port(*n));
            }
            Some(IntOrString::String(name)) if !is_port_name(name) => {
                let message = format!("{name:?} is neither a port number nor the name of a port");
                report(format!("{at}.targetPort"), message);
            }
            _ => {}
        }
        if let Some(first) = numbers.insert((port.port, protocol), i) {
            let message = format!("spec.ports[{first}] has the same port {}", port.port);
            report(format!("{at}.port"), message);
        }
        let name = port.name.as_deref().unwrap_or_default();
        if let Some(first) = names.insert(name, i) {
            let message = if name.is_empty() {
                "a Service with several ports must name them".to_owned()
            } else {
                format!("spec.ports[{first}] has the same name")
            };
            report(format!("{at}.name"), message);
        }
    }
    let mut address = |field: String, ip: &str| {
        if !matches!(ip, "" | "None") && ip.parse::<IpAddr>().is_err() {
            report(field, format!("{ip:?} is not an IP address"));
        }
    };
    address("spec.clusterIP".into(), spec.cluster_ip.as_deref().unwrap_or_default());
    for (i, ip) in spec.cluster_ips.iter().flatten().enumerate() {
        address(format!("spec.clusterIPs[{i}]"), ip);
    }
    for (i, family) in spec.ip_families.iter().flatten().enumerate() {
        if !matches!(family.as_str(), "IPv4" | "IPv6") {
            report(format!("spec.ipFamilies[{i}]"), format!("{family:?} is not IPv4 or IPv6"));
        }
    }
}

fn is_port(number: i32) -> bool {
    (1..=65535).contains(&number)
}

fn not_a_port(number: i32) -> String {
    format!("{number} is not a port (1-65535)")
}

/// IANA service name: what Kubernetes allows for a container's port.
fn is_port_name(name: &str) -> bool {
    (1..=15).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && name.bytes().any(|b| b.is_ascii_lowercase())
}

fn authorization_policy(spec: &AuthorizationPolicySpec, report: Report<'_>) {
    if spec.selector.is_some() && (spec.target_ref.is_some() || !spec.target_refs.is_empty()) {
        report("spec.selector".into(), "cannot stand beside targetRef or targetRefs".into());
    }
    for (i, rule) in spec.rules.iter().flatten().enumerate() {
        let at = format!("spec.rules[{i}]");
        if rule.from.as_ref().is_some_and(Vec::is_empty) {
            report(format!("{at}.from"), EMPTY_LIST.into());
        }
        if rule.to.as_ref().is_some_and(Vec::is_empty) {
            report(format!("{at}.to"), EMPTY_LIST.into());
        }
        for (j, from) in rule.from.iter().flatten().enumerate() {
            let at = format!("{at}.from[{j}].source");
            if from.source == Source::default() {
                report(at.clone(), "empty: name who the source is, or leave out `from`".into());
            }
            source(&at, &from.source, report);
        }
        for (j, to) in rule.to.iter().flatten().enumerate() {
            let at = format!("{at}.to[{j}].operation");
            let operation = &to.operation;
            if *operation == crate::istio::Operation::default() {
                report(at.clone(), "empty: say what the operation is, or leave out `to`".into());
            }
            let numbers = [("ports", &operation.ports), ("notPorts", &operation.not_ports)];
            for (field, values) in numbers {
                each(&at, field, values, report, |v| addresses::port(v).map(drop));
            }
        }
        for (j, when) in rule.when.iter().flatten().enumerate() {
            let at = format!("{at}.when[{j}]");
            if when.values.is_empty() && when.not_values.is_empty() {
                report(at.clone(), "needs values or notValues".into());
            }
            if !authorization::is_condition_key(&when.key) {
                report(format!("{at}.key"), format!("{:?} is not an attribute", when.key));
            }
            for (field, values) in [("values", &when.values), ("notValues", &when.not_values)] {
                each(&at, field, values, report, |v| authorization::condition_value(&when.key, v));
            }
        }
    }
}

const EMPTY_LIST: &str = "an empty list: leave the field out, or fill it in";

fn source(at: &str, source: &Source, report: Report<'_>) {
    let text = |v: &str| if v.is_empty() { Err("empty text".to_owned()) } else { Ok(()) };
    for (field, values) in [
        ("principals", &source.principals),
        ("notPrincipals", &source.not_principals),
        ("requestPrincipals", &source.request_principals),
        ("notRequestPrincipals", &source.not_request_principals),
        ("namespaces", &source.namespaces),
        ("notNamespaces", &source.not_namespaces),
    ] {
        each(at, field, values, report, text);
    }
    for (field, values) in [
        ("ipBlocks", &source.ip_blocks),
        ("notIpBlocks", &source.not_ip_blocks),
        ("remoteIpBlocks", &source.remote_ip_blocks),
        ("notRemoteIpBlocks", &source.not_remote_ip_blocks),
    ] {
        each(at, field, values, report, |v| addresses::prefix(v).map(drop));
    }
    for (field, values) in [
        ("serviceAccounts", &source.service_accounts),
        ("notServiceAccounts", &source.not_service_accounts),
    ] {
        each(at, field, values, report, |v| authorization::service_account(v, "x").map(drop));
    }
}

fn peer_authentication(spec: &PeerAuthenticationSpec, report: Report<'_>) {
    for port in spec.port_level_mtls.keys() {
        if let Err(message) = addresses::port(port) {
            report(format!("spec.portLevelMtls.{port}"), message);
        }
    }
}

fn each(
    at: &str,
    field: &str,
    values: &[String],
    report: Report<'_>,
    check: impl Fn(&str) -> Result<(), String>,
) {
    for (i, value) in values.iter().enumerate() {
        if let Err(message) = check(value) {
            report(format!("{at}.{field}[{i}]"), message);
        }
    }
}
