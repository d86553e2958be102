//! Model values to wire messages. Nothing is left out as a default, so that a proxy with another idea of
//! the defaults still reads the same mesh.

use bytes::Bytes;
use model::{
    Action, AppProtocol, FamilyPolicy, GatewayAddress, GatewayDestination, Health, HealthPolicy,
    IpPrefix, LoadBalancing, LocalityScope, Match, NetworkMode, Policy, Provenance, RoutingMode,
    Scope, Service, ServicePort, Str, StringMatch, TunnelProtocol, Vip, Workload, WorkloadKind,
};
use std::net::IpAddr;

use crate::{ambit, security, workload as wire};

/// Resource name of a workload.
pub fn workload_name(w: &Workload) -> Str {
    w.uid.0.clone()
}

/// Resource name of a service.
pub fn service_name(s: &Service) -> Str {
    s.key.to_string().into()
}

/// Resource name of a policy and of its origin.
pub fn policy_name(p: &Policy) -> Str {
    p.key.to_string().into()
}

pub fn encode_workload(w: &Workload) -> wire::Address {
    let services = w
        .services
        .iter()
        .map(|(key, ports)| (key.to_string(), wire::PortList { ports: ports_out(ports) }))
        .collect();
    let message = wire::Workload {
        uid: w.uid.0.to_string(),
        name: w.name.to_string(),
        namespace: w.namespace.to_string(),
        addresses: w.addresses.iter().map(|ip| ip_bytes(*ip)).collect(),
        hostname: w.hostname.to_string(),
        network: w.network.to_string(),
        tunnel_protocol: match w.protocol {
            TunnelProtocol::None => wire::TunnelProtocol::None.into(),
            TunnelProtocol::Hbone => wire::TunnelProtocol::Hbone.into(),
            // Only the last good configuration on disk ever holds one: it comes back as unreadable.
            TunnelProtocol::Unreadable => super::UNREADABLE,
        },
        trust_domain: w.trust_domain.to_string(),
        service_account: w.service_account.to_string(),
        waypoint: w.waypoint.as_ref().map(gateway),
        network_gateway: w.network_gateway.as_ref().map(gateway),
        node: w.node.to_string(),
        canonical_name: w.canonical_name.to_string(),
        canonical_revision: w.canonical_revision.to_string(),
        workload_type: kind(w.workload_kind).into(),
        workload_name: w.workload_name.to_string(),
        native_tunnel: w.native_tunnel,
        application_tunnel: w.application_tunnel.map(|t| wire::ApplicationTunnel {
            protocol: i32::from(t.proxy_protocol),
            port: t.port.map_or(0, u32::from),
        }),
        services,
        authorization_policies: w.policies.iter().map(ToString::to_string).collect(),
        status: match w.health {
            Health::Healthy => wire::WorkloadStatus::Healthy,
            Health::Unhealthy => wire::WorkloadStatus::Unhealthy,
        }
        .into(),
        cluster_id: w.cluster.to_string(),
        locality: locality(&w.locality),
        network_mode: match w.network_mode {
            NetworkMode::Standard => wire::NetworkMode::Standard,
            NetworkMode::HostNetwork => wire::NetworkMode::HostNetwork,
        }
        .into(),
        extensions: Vec::new(),
        capacity: Some(w.capacity),
    };
    wire::Address { r#type: Some(wire::address::Type::Workload(message)) }
}

pub fn encode_service(s: &Service) -> wire::Address {
    let message = wire::Service {
        name: s.name.to_string(),
        namespace: s.key.namespace.to_string(),
        hostname: s.key.hostname.to_string(),
        addresses: s.vips.iter().map(vip).collect(),
        ports: ports_out(&s.ports),
        subject_alt_names: s.subject_alt_names.iter().map(ToString::to_string).collect(),
        waypoint: s.waypoint.as_ref().map(gateway),
        load_balancing: load_balancing(&s.load_balancing),
        ip_families: match s.families {
            FamilyPolicy::Automatic => wire::IpFamilies::Automatic,
            FamilyPolicy::Ipv4Only => wire::IpFamilies::Ipv4Only,
            FamilyPolicy::Ipv6Only => wire::IpFamilies::Ipv6Only,
            FamilyPolicy::Dual => wire::IpFamilies::Dual,
        }
        .into(),
        extensions: Vec::new(),
        canonical: false,
        ingress_use_waypoint: false,
    };
    wire::Address { r#type: Some(wire::address::Type::Service(message)) }
}

/// The policy without its provenance, which travels as [`policy_origin`].
pub fn encode_policy(p: &Policy) -> security::Authorization {
    let clause = |matches: &Vec<Match>| security::Clause {
        matches: matches.iter().map(one_match).collect(),
    };
    security::Authorization {
        name: p.key.name.to_string(),
        namespace: p.key.namespace.to_string(),
        scope: match p.scope {
            Scope::Global => security::Scope::Global,
            Scope::Namespace => security::Scope::Namespace,
            Scope::WorkloadSelector => security::Scope::WorkloadSelector,
        }
        .into(),
        action: match p.action {
            Action::Allow => security::Action::Allow,
            Action::Deny => security::Action::Deny,
        }
        .into(),
        rules: p
            .rules
            .iter()
            .map(|rule| security::Rule { clauses: rule.clauses.iter().map(clause).collect() })
            .collect(),
        dry_run: p.dry_run,
        extensions: Vec::new(),
    }
}

/// Where the policy and its rules were written.
pub fn policy_origin(p: &Policy) -> ambit::Origin {
    let out = |p: &Provenance| ambit::Provenance {
        object: p.object.to_string(),
        field: p.field.to_string(),
        origin: p.origin.to_string(),
    };
    ambit::Origin {
        policy: Some(out(&p.provenance)),
        rules: p.rules.iter().map(|rule| out(&rule.provenance)).collect(),
    }
}

fn ip_bytes(ip: IpAddr) -> Bytes {
    match ip {
        IpAddr::V4(ip) => Bytes::copy_from_slice(&ip.octets()),
        IpAddr::V6(ip) => Bytes::copy_from_slice(&ip.octets()),
    }
}

fn kind(kind: WorkloadKind) -> wire::WorkloadType {
    match kind {
        WorkloadKind::Deployment => wire::WorkloadType::Deployment,
        WorkloadKind::CronJob => wire::WorkloadType::Cronjob,
        WorkloadKind::Pod => wire::WorkloadType::Pod,
        WorkloadKind::Job => wire::WorkloadType::Job,
    }
}

fn locality(l: &model::Locality) -> Option<wire::Locality> {
    let text = |s: &Option<Str>| s.as_deref().unwrap_or_default().to_owned();
    (l.region.is_some() || l.zone.is_some() || l.subzone.is_some()).then(|| wire::Locality {
        region: text(&l.region),
        zone: text(&l.zone),
        subzone: text(&l.subzone),
    })
}

fn ports_out(ports: &[ServicePort]) -> Vec<wire::Port> {
    let app = |p: AppProtocol| match p {
        AppProtocol::Unknown => wire::AppProtocol::Unknown,
        AppProtocol::Http11 => wire::AppProtocol::Http11,
        AppProtocol::Http2 => wire::AppProtocol::Http2,
        AppProtocol::Grpc => wire::AppProtocol::Grpc,
    };
    ports
        .iter()
        .map(|p| wire::Port {
            service_port: p.service_port.into(),
            target_port: p.target_port.into(),
            app_protocol: app(p.app_protocol).into(),
        })
        .collect()
}

fn gateway(g: &GatewayAddress) -> wire::GatewayAddress {
    use wire::gateway_address::Destination;
    let destination = match &g.destination {
        GatewayDestination::Service(key) => Destination::Hostname(wire::NamespacedHostname {
            namespace: key.namespace.to_string(),
            hostname: key.hostname.to_string(),
        }),
        GatewayDestination::Address(address) => Destination::Address(wire::NetworkAddress {
            network: address.network.to_string(),
            address: ip_bytes(address.ip),
            length: None,
        }),
    };
    wire::GatewayAddress { destination: Some(destination), hbone_mtls_port: g.hbone_port.into() }
}

fn vip(v: &Vip) -> wire::NetworkAddress {
    let width = if v.ip.is_ipv4() { 32 } else { 128 };
    wire::NetworkAddress {
        network: v.network.to_string(),
        address: ip_bytes(v.ip),
        // Left out for single addresses: proxies that do not know ranges read the rest.
        length: (v.prefix != width).then_some(v.prefix.into()),
    }
}

fn load_balancing(l: &LoadBalancing) -> Option<wire::LoadBalancing> {
    use wire::load_balancing as lb;
    if *l == LoadBalancing::default() {
        return None;
    }
    let scope = |s: &LocalityScope| match s {
        LocalityScope::Region => lb::Scope::Region,
        LocalityScope::Zone => lb::Scope::Zone,
        LocalityScope::Subzone => lb::Scope::Subzone,
        LocalityScope::Node => lb::Scope::Node,
        LocalityScope::Cluster => lb::Scope::Cluster,
        LocalityScope::Network => lb::Scope::Network,
    };
    Some(wire::LoadBalancing {
        routing_preference: l.preference.iter().map(|s| scope(s).into()).collect(),
        mode: match l.mode {
            RoutingMode::Any => lb::Mode::UnspecifiedMode,
            RoutingMode::Strict => lb::Mode::Strict,
            RoutingMode::Failover => lb::Mode::Failover,
            RoutingMode::Passthrough => lb::Mode::Passthrough,
        }
        .into(),
        health_policy: match l.health {
            HealthPolicy::OnlyHealthy => lb::HealthPolicy::OnlyHealthy,
            HealthPolicy::AllowAll => lb::HealthPolicy::AllowAll,
        }
        .into(),
    })
}

fn one_match(m: &Match) -> security::Match {
    let strings = |all: &[StringMatch]| all.iter().map(string_match).collect();
    let ips = |all: &[IpPrefix]| all.iter().map(prefix).collect();
    let ports = |all: &[u16]| all.iter().map(|p| u32::from(*p)).collect();
    let accounts = |all: &[(Str, Str)]| {
        all.iter()
            .map(|(namespace, account)| security::ServiceAccountMatch {
                namespace: namespace.to_string(),
                service_account: account.to_string(),
            })
            .collect()
    };
    security::Match {
        namespaces: strings(&m.namespaces),
        not_namespaces: strings(&m.not_namespaces),
        principals: strings(&m.principals),
        not_principals: strings(&m.not_principals),
        source_ips: ips(&m.source_ips),
        not_source_ips: ips(&m.not_source_ips),
        destination_ips: ips(&m.destination_ips),
        not_destination_ips: ips(&m.not_destination_ips),
        destination_ports: ports(&m.destination_ports),
        not_destination_ports: ports(&m.not_destination_ports),
        service_accounts: accounts(&m.service_accounts),
        not_service_accounts: accounts(&m.not_service_accounts),
        extensions: Vec::new(),
    }
}

fn string_match(m: &StringMatch) -> security::StringMatch {
    use security::string_match::MatchType;
    security::StringMatch {
        match_type: Some(match m {
            StringMatch::Exact(s) => MatchType::Exact(s.to_string()),
            StringMatch::Prefix(s) => MatchType::Prefix(s.to_string()),
            StringMatch::Suffix(s) => MatchType::Suffix(s.to_string()),
            StringMatch::Presence => MatchType::Presence(()),
        }),
    }
}

fn prefix(p: &IpPrefix) -> security::Address {
    security::Address { address: ip_bytes(p.ip), length: p.length.into() }
}
