//! Services: names, virtual addresses, ports and how to choose among endpoints.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use model::http::Protocol;
use model::{
    AppProtocol, FamilyPolicy, HealthPolicy, LoadBalancing, LocalityScope, RoutingMode, ServiceKey,
    Str, Vip,
};

use crate::context::Context;
use crate::diagnostics::{Code, Diagnostic};
use crate::http::protocol;
use crate::object::{Meta, Objects, Sourced, age};

/// How clients choose among endpoints, on a Service or its namespace.
const TRAFFIC_DISTRIBUTION: &str = "networking.istio.io/traffic-distribution";

/// A Service and what is needed to find its endpoints.
#[derive(Debug)]
pub(crate) struct Compiled {
    pub service: Arc<model::Service>,
    /// Empty: endpoints do not come from a selector.
    pub selector: BTreeMap<String, String>,
    /// Beside `service.ports`: where each leads.
    pub targets: Vec<Target>,
    /// Beside `service.ports`: what routes want to know of each.
    pub ports: Vec<PortFacts>,
    /// It says that it wants no virtual address.
    pub headless: bool,
}

/// What a Service's port declares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PortFacts {
    /// Empty: a Service with one port need not name it.
    pub name: Str,
    pub protocol: Protocol,
    pub wants_tls: bool,
}

/// The port of the pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    Number(u16),
    /// The container port with this name.
    Name(Str),
}

/// Services by namespace, in the order of their names.
pub(crate) type ByNamespace = BTreeMap<Str, Vec<Compiled>>;

pub(crate) fn compile(objects: &Objects, cx: &mut Context<'_>) -> ByNamespace {
    let vips = Vips::claim(objects, cx);
    let mut out = ByNamespace::new();
    for (key, sourced) in &objects.services {
        let Some(spec) = &sourced.value.spec else {
            cx.report(
                key,
                sourced,
                Diagnostic::error(Code::InvalidField, "has no spec").field("spec"),
            );
            continue;
        };
        if spec.type_.as_deref() == Some("ExternalName") {
            let message = "Services of type ExternalName are not handled by this version";
            let help = "call the external name itself";
            let d = Diagnostic::warning(Code::Unsupported, message).field("spec.type").help(help);
            cx.report(key, sourced, d);
            continue;
        }
        let compiled = service(key, sourced, spec, &vips, objects, cx);
        out.entry(key.0.clone()).or_default().push(compiled);
    }
    out
}

/// The Service of that name.
pub(crate) fn find<'a>(
    services: &'a ByNamespace,
    namespace: &str,
    name: &str,
) -> Option<&'a Compiled> {
    let all = services.get(namespace)?;
    let index = all.binary_search_by(|c| (*c.service.name).cmp(name)).ok()?;
    all.get(index)
}

/// The hostname of a Service.
pub(crate) fn key(namespace: &str, name: &str, cluster_domain: &str) -> ServiceKey {
    ServiceKey {
        namespace: namespace.into(),
        hostname: format!("{name}.{namespace}.svc.{cluster_domain}").into(),
    }
}

fn service(
    key: &(Str, Str),
    sourced: &Sourced<Service>,
    spec: &ServiceSpec,
    vips: &Vips,
    objects: &Objects,
    cx: &mut Context<'_>,
) -> Compiled {
    let mut ports = Vec::new();
    let mut targets = Vec::new();
    let mut facts = Vec::new();
    for (i, stated) in spec.ports.iter().flatten().enumerate() {
        if let Some((port, target)) = service_port(i, stated, key, sourced, cx) {
            ports.push(port);
            targets.push(target);
            facts.push(PortFacts {
                name: cx.share(stated.name.as_deref().unwrap_or_default()),
                protocol: protocol::of_port(stated),
                wants_tls: protocol::wants_tls(stated),
            });
        }
    }
    let addresses = addresses(spec).filter(|ip| vips.0.get(ip) == Some(key));
    let network = cx.config.network.clone();
    let vip = |ip: IpAddr| Vip {
        network: network.clone(),
        ip,
        prefix: if ip.is_ipv4() { 32 } else { 128 },
    };
    let service = model::Service {
        key: self::key(&key.0, &key.1, &cx.config.cluster_domain),
        name: key.1.clone(),
        vips: addresses.map(vip).collect(),
        ports: ports.into(),
        subject_alt_names: Arc::new([]),
        waypoint: None,
        load_balancing: load_balancing(key, sourced, spec, objects, cx),
        families: families(spec),
    };
    let selector = spec.selector.clone().unwrap_or_default();
    let headless = spec.cluster_ip.as_deref() == Some("None");
    Compiled { service: Arc::new(service), selector, targets, ports: facts, headless }
}

/// The virtual addresses a Service asks for, each once.
pub(crate) fn addresses(spec: &ServiceSpec) -> impl Iterator<Item = IpAddr> {
    let single = spec.cluster_ip.iter();
    let mut all: Vec<IpAddr> =
        single.chain(spec.cluster_ips.iter().flatten()).filter_map(|ip| ip.parse().ok()).collect();
    let mut seen = std::collections::BTreeSet::new();
    all.retain(|ip| seen.insert(*ip));
    all.into_iter()
}

/// Which Service has which virtual address: the oldest that asks for it.
struct Vips(BTreeMap<IpAddr, (Str, Str)>);

impl Vips {
    fn claim(objects: &Objects, cx: &mut Context<'_>) -> Self {
        let mut claimed: BTreeMap<IpAddr, (&(Str, Str), &Sourced<Service>)> = BTreeMap::new();
        let mut by_age: Vec<_> = objects.services.iter().collect();
        by_age.sort_by(|a, b| age(a.0, a.1).cmp(&age(b.0, b.1)));
        for (key, sourced) in by_age {
            let Some(spec) = &sourced.value.spec else { continue };
            for ip in addresses(spec) {
                let Some((other, first)) = claimed.get(&ip) else {
                    claimed.insert(ip, (key, sourced));
                    continue;
                };
                let message = format!(
                    "{ip} already belongs to Service/{}/{} ({}); this Service goes without it",
                    other.0, other.1, first.origin
                );
                let d = Diagnostic::error(Code::DuplicateAddress, message)
                    .field("spec.clusterIP")
                    .help("give each Service its own clusterIP, or leave it out");
                cx.report(key, sourced, d);
            }
        }
        Self(claimed.into_iter().map(|(ip, (key, _))| (ip, key.clone())).collect())
    }
}

fn service_port(
    index: usize,
    port: &ServicePort,
    key: &(Str, Str),
    sourced: &Sourced<Service>,
    cx: &mut Context<'_>,
) -> Option<(model::ServicePort, Target)> {
    let field = format!("spec.ports[{index}]");
    let protocol = port.protocol.as_deref().unwrap_or("TCP");
    if protocol != "TCP" {
        let message = format!("{protocol} is not captured by the mesh; the port goes around it");
        cx.report(key, sourced, Diagnostic::info(Code::Unsupported, message).field(field));
        return None;
    }
    let number = u16::try_from(port.port).ok().filter(|p| *p > 0);
    let target = match &port.target_port {
        None => number.map(Target::Number),
        Some(IntOrString::Int(n)) => u16::try_from(*n).ok().filter(|p| *p > 0).map(Target::Number),
        Some(IntOrString::String(name)) => {
            Some(name.parse().map_or_else(|_| Target::Name(name.as_str().into()), Target::Number))
        }
    };
    let (Some(service_port), Some(target)) = (number, target) else {
        let d = Diagnostic::error(Code::InvalidField, "not a port (1-65535); skipped").field(field);
        cx.report(key, sourced, d);
        return None;
    };
    let target_port = match target {
        Target::Number(n) => n,
        Target::Name(_) => 0,
    };
    let app_protocol = app_protocol(port);
    Some((model::ServicePort { service_port, target_port, app_protocol }, target))
}

/// `appProtocol`, else the first word of the port's name.
fn app_protocol(port: &ServicePort) -> AppProtocol {
    match protocol::word(port).as_str() {
        "http" => AppProtocol::Http11,
        "http2" | "h2c" => AppProtocol::Http2,
        "grpc" => AppProtocol::Grpc,
        _ => AppProtocol::Unknown,
    }
}

fn families(spec: &ServiceSpec) -> FamilyPolicy {
    let families = spec.ip_families.as_deref().unwrap_or_default();
    let has = |family: &str| families.iter().any(|f| f == family);
    match (has("IPv4"), has("IPv6")) {
        (true, true) => FamilyPolicy::Dual,
        (true, false) => FamilyPolicy::Ipv4Only,
        (false, true) => FamilyPolicy::Ipv6Only,
        (false, false) => FamilyPolicy::Automatic,
    }
}

fn load_balancing(
    key: &(Str, Str),
    sourced: &Sourced<Service>,
    spec: &ServiceSpec,
    objects: &Objects,
    cx: &mut Context<'_>,
) -> LoadBalancing {
    use LocalityScope::{Network, Node, Region, Subzone, Zone};
    let health = if spec.publish_not_ready_addresses == Some(true) {
        HealthPolicy::AllowAll
    } else {
        HealthPolicy::OnlyHealthy
    };
    if spec.internal_traffic_policy.as_deref() == Some("Local") {
        return LoadBalancing { mode: RoutingMode::Strict, preference: Arc::new([Node]), health };
    }
    let namespace = objects.namespaces.get(&("".into(), key.0.clone()));
    let annotation = format!("metadata.annotations.{TRAFFIC_DISTRIBUTION}");
    let (field, wanted) = if let Some(wanted) = spec.traffic_distribution.as_deref() {
        ("spec.trafficDistribution", Some(wanted))
    } else if let Some(wanted) = sourced.value.annotation(TRAFFIC_DISTRIBUTION) {
        (annotation.as_str(), Some(wanted))
    } else {
        ("", namespace.and_then(|ns| ns.value.annotation(TRAFFIC_DISTRIBUTION)))
    };
    let preference: Arc<[LocalityScope]> = match wanted {
        None | Some("Any") => return LoadBalancing { health, ..LoadBalancing::default() },
        Some("PreferClose" | "PreferSameZone") => Arc::new([Network, Region, Zone]),
        Some("PreferSameNode") => Arc::new([Network, Region, Zone, Subzone, Node]),
        Some(other) => {
            let message =
                format!("{other:?} is not a traffic distribution; endpoints are chosen evenly");
            let d = Diagnostic::warning(Code::InvalidField, message)
                .field(field)
                .help("use PreferSameZone, PreferSameNode or PreferClose");
            cx.report(key, sourced, d);
            return LoadBalancing { health, ..LoadBalancing::default() };
        }
    };
    LoadBalancing { mode: RoutingMode::Failover, preference, health }
}

#[cfg(test)]
mod tests;
