//! Wire messages to model values. See the module above for what is strict and why.

use std::sync::Arc;

use model::{
    Action, AppProtocol, ApplicationTunnel, FamilyPolicy, GatewayAddress, GatewayDestination,
    Health, HealthPolicy, IpPrefix, LoadBalancing, Locality, LocalityScope, Match, NetworkAddress,
    NetworkMode, Policy, PolicyKey, Provenance, RoutingMode, Rule, Scope, Service, ServiceKey,
    ServicePort, Str, StringMatch, TunnelProtocol, Vip, Workload, WorkloadKind, WorkloadUid,
};
use prost::Message;

use super::context::{Cx, short};
use super::{Address, DecodeError, Defaults, Interner};
use crate::{ambit, security, workload as wire};

/// Decodes the value of an Address resource called `name`.
pub fn decode_address(
    name: &str,
    value: &[u8],
    defaults: &Defaults,
    interner: &mut Interner,
) -> Result<Address, DecodeError> {
    let mut cx = Cx { resource: name, interner };
    let message = wire::Address::decode(value).map_err(|e| cx.error("Address", e))?;
    match message.r#type {
        Some(wire::address::Type::Workload(w)) => {
            cx.workload(w, defaults).map(|w| Address::Workload(Arc::new(w)))
        }
        Some(wire::address::Type::Service(s)) => {
            cx.service(s).map(|s| Address::Service(Arc::new(s)))
        }
        None => Err(cx.error("type", "neither a workload nor a service")),
    }
}

/// Decodes the value of an Authorization resource called `name`. The provenance stays empty until
/// [`attach_origin`].
pub fn decode_authorization(
    name: &str,
    value: &[u8],
    interner: &mut Interner,
) -> Result<Policy, DecodeError> {
    let mut cx = Cx { resource: name, interner };
    let message =
        security::Authorization::decode(value).map_err(|e| cx.error("Authorization", e))?;
    // prost drops fields it does not know. What was dropped, or written twice, shows in the length.
    if message.encoded_len() != value.len() {
        return Err(cx.error("Authorization", "has fields that this proxy does not know"));
    }
    cx.policy(message)
}

/// What to enforce in place of a policy that could not be decoded and that was not there before: an ALLOW
/// policy that allows nobody, or a DENY policy that denies everybody, as wide as the policy's scope.
/// `None` when the bytes are no Authorization at all, and for selector policies: workloads name those,
/// and a name that nobody has is a refusal already.
pub fn closed_stand_in(name: &str, value: &[u8], interner: &mut Interner) -> Option<Policy> {
    let message = security::Authorization::decode(value).ok()?;
    let scope = match security::Scope::try_from(message.scope) {
        Ok(security::Scope::Global) => Scope::Global,
        Ok(security::Scope::WorkloadSelector) => return None,
        // A scope of the future lies within a namespace, or it would not name one.
        Ok(security::Scope::Namespace) | Err(_) => Scope::Namespace,
    };
    let (action, rules) = match security::Action::try_from(message.action) {
        Ok(security::Action::Allow) => (Action::Allow, Vec::new()),
        Ok(security::Action::Deny) | Err(_) => (Action::Deny, vec![Rule::default()]),
    };
    let (namespace, policy) = name.split_once('/')?;
    Some(Policy {
        key: PolicyKey { namespace: interner.str(namespace), name: interner.str(policy) },
        scope,
        action,
        rules: rules.into(),
        dry_run: message.dry_run,
        provenance: Provenance {
            object: interner.str(name),
            field: interner.str("(refused by this proxy: closed until it can be read)"),
            origin: interner.str(""),
        },
    })
}

/// What to know in place of a workload or service that could not be decoded and that was not there before: its
/// name and its addresses, and nothing that would let a connection through. `None` when the bytes are no
/// Address at all, or one that is named otherwise.
pub fn closed_address(
    name: &str,
    value: &[u8],
    defaults: &Defaults,
    interner: &mut Interner,
) -> Option<Address> {
    let mut cx = Cx { resource: name, interner };
    match wire::Address::decode(value).ok()?.r#type? {
        wire::address::Type::Workload(w) => {
            cx.named("uid", &w.uid).ok()?;
            let addresses = w.addresses.iter().filter_map(|a| cx.ip("addresses", a).ok()).collect();
            let mut closed = Workload {
                addresses,
                network: cx.str(&w.network),
                cluster: cx.str(&w.cluster_id),
                node: cx.str(&w.node),
                protocol: TunnelProtocol::Unreadable,
                health: Health::Unhealthy,
                ..Workload::named(cx.str(&w.uid), cx.str(&w.namespace), cx.str(&w.name))
            };
            closed.trust_domain = defaults.trust_domain.clone();
            // Shared addresses are never looked up, readable or not.
            if w.network_mode == i32::from(wire::NetworkMode::HostNetwork) {
                closed.network_mode = NetworkMode::HostNetwork;
            }
            Some(Address::Workload(Arc::new(closed)))
        }
        wire::address::Type::Service(s) => {
            cx.named_in("hostname", &s.namespace, &s.hostname).ok()?;
            Some(Address::Service(Arc::new(Service {
                key: ServiceKey { namespace: cx.str(&s.namespace), hostname: cx.str(&s.hostname) },
                name: cx.str(&s.name),
                vips: s.addresses.iter().filter_map(|a| cx.vip(a).ok()).collect(),
                // Without a port every call is refused.
                ports: Arc::new([]),
                subject_alt_names: Arc::new([]),
                waypoint: None,
                load_balancing: LoadBalancing::default(),
                families: FamilyPolicy::default(),
            })))
        }
    }
}

/// Decodes the value of an Origin resource called `name`.
pub fn decode_origin(name: &str, value: &[u8]) -> Result<ambit::Origin, DecodeError> {
    ambit::Origin::decode(value).map_err(|e| DecodeError {
        resource: name.to_owned(),
        field: "Origin".to_owned(),
        problem: e.to_string(),
    })
}

/// Writes into the policy where it and its rules came from. An origin with another number of rules
/// belongs to another version of the policy: then only the policy as a whole is marked.
pub fn attach_origin(policy: &mut Policy, origin: &ambit::Origin, interner: &mut Interner) {
    let mut read = |p: &ambit::Provenance| Provenance {
        object: interner.str(&p.object),
        field: interner.str(&p.field),
        origin: interner.str(&p.origin),
    };
    policy.provenance = origin.policy.as_ref().map(&mut read).unwrap_or_default();
    if origin.rules.len() != policy.rules.len() {
        return;
    }
    let rules = policy.rules.iter().zip(&origin.rules);
    policy.rules = rules
        .map(|(rule, from)| Rule { clauses: rule.clauses.clone(), provenance: read(from) })
        .collect();
}

/// The services of a workload, with the ports it serves there.
type Memberships = Arc<[(ServiceKey, Arc<[ServicePort]>)]>;

impl Cx<'_> {
    fn workload(
        &mut self,
        w: wire::Workload,
        defaults: &Defaults,
    ) -> Result<Workload, DecodeError> {
        self.named("uid", &w.uid)?;
        let addresses: Result<Vec<_>, _> =
            w.addresses.iter().map(|bytes| self.ip("addresses", bytes)).collect();
        let policies: Result<Vec<_>, _> =
            w.authorization_policies.iter().map(|key| self.policy_key(key)).collect();
        Ok(Workload {
            uid: WorkloadUid(self.str(&w.uid)),
            name: self.str(&w.name),
            namespace: self.str(&w.namespace),
            cluster: self.str(&w.cluster_id),
            network: self.str(&w.network),
            trust_domain: match w.trust_domain.as_str() {
                "" => defaults.trust_domain.clone(),
                stated => self.str(stated),
            },
            service_account: match w.service_account.as_str() {
                "" => self.str("default"),
                stated => self.str(stated),
            },
            addresses: addresses?.into(),
            hostname: self.str(&w.hostname),
            node: self.str(&w.node),
            protocol: match self.known("tunnel_protocol", w.tunnel_protocol)? {
                wire::TunnelProtocol::Hbone => TunnelProtocol::Hbone,
                wire::TunnelProtocol::None | wire::TunnelProtocol::LegacyIstioMtls => {
                    TunnelProtocol::None
                }
            },
            native_tunnel: w.native_tunnel,
            application_tunnel: w
                .application_tunnel
                .map(|t| self.application_tunnel(t))
                .transpose()?,
            locality: self.locality(w.locality.unwrap_or_default()),
            health: match self.known("status", w.status)? {
                wire::WorkloadStatus::Healthy => Health::Healthy,
                wire::WorkloadStatus::Unhealthy => Health::Unhealthy,
            },
            network_mode: match self.known("network_mode", w.network_mode)? {
                wire::NetworkMode::Standard => NetworkMode::Standard,
                wire::NetworkMode::HostNetwork => NetworkMode::HostNetwork,
            },
            capacity: w.capacity.unwrap_or(1).max(1),
            canonical_name: self.str(&w.canonical_name),
            canonical_revision: self.str(&w.canonical_revision),
            workload_name: self.str(&w.workload_name),
            workload_kind: match wire::WorkloadType::try_from(w.workload_type) {
                Ok(wire::WorkloadType::Deployment) => WorkloadKind::Deployment,
                Ok(wire::WorkloadType::Cronjob) => WorkloadKind::CronJob,
                Ok(wire::WorkloadType::Job) => WorkloadKind::Job,
                // Only metrics say it: a kind of the future is not worth an unreachable workload.
                Ok(wire::WorkloadType::Pod) | Err(_) => WorkloadKind::Pod,
            },
            waypoint: w.waypoint.map(|g| self.gateway("waypoint", g)).transpose()?,
            network_gateway: w
                .network_gateway
                .map(|g| self.gateway("network_gateway", g))
                .transpose()?,
            services: self.memberships(&w.services)?,
            policies: policies?.into(),
        })
    }

    fn service(&mut self, s: wire::Service) -> Result<Service, DecodeError> {
        self.named_in("hostname", &s.namespace, &s.hostname)?;
        let vips: Result<Vec<_>, _> = s.addresses.iter().map(|a| self.vip(a)).collect();
        Ok(Service {
            key: ServiceKey { namespace: self.str(&s.namespace), hostname: self.str(&s.hostname) },
            name: self.str(&s.name),
            vips: vips?.into(),
            ports: self.ports("ports", &s.ports)?,
            subject_alt_names: s.subject_alt_names.iter().map(|san| self.str(san)).collect(),
            waypoint: s.waypoint.map(|g| self.gateway("waypoint", g)).transpose()?,
            load_balancing: s
                .load_balancing
                .map(|l| self.load_balancing(&l))
                .transpose()?
                .unwrap_or_default(),
            families: match self.known("ip_families", s.ip_families)? {
                wire::IpFamilies::Automatic => FamilyPolicy::Automatic,
                wire::IpFamilies::Ipv4Only => FamilyPolicy::Ipv4Only,
                wire::IpFamilies::Ipv6Only => FamilyPolicy::Ipv6Only,
                wire::IpFamilies::Dual => FamilyPolicy::Dual,
            },
        })
    }

    fn policy(&mut self, p: security::Authorization) -> Result<Policy, DecodeError> {
        self.named_in("name", &p.namespace, &p.name)?;
        if !p.extensions.is_empty() {
            return Err(
                self.error("extensions", "an extension this proxy does not know may narrow it")
            );
        }
        let scope = match self.known("scope", p.scope)? {
            security::Scope::Global => Scope::Global,
            security::Scope::Namespace => Scope::Namespace,
            security::Scope::WorkloadSelector => Scope::WorkloadSelector,
        };
        let action = match self.known("action", p.action)? {
            security::Action::Allow => Action::Allow,
            security::Action::Deny => Action::Deny,
        };
        let mut rules = Vec::with_capacity(p.rules.len());
        for (r, rule) in p.rules.iter().enumerate() {
            let mut clauses = Vec::with_capacity(rule.clauses.len());
            for (c, clause) in rule.clauses.iter().enumerate() {
                let path = |m| format!("rules[{r}].clauses[{c}].matches[{m}]");
                let matches = clause.matches.iter().enumerate();
                let matches: Result<Vec<_>, _> =
                    matches.map(|(m, one)| self.one_match(&path(m), one)).collect();
                clauses.push(matches?);
            }
            rules.push(Rule { clauses, provenance: Provenance::default() });
        }
        Ok(Policy {
            key: PolicyKey { namespace: self.str(&p.namespace), name: self.str(&p.name) },
            scope,
            action,
            rules: rules.into(),
            dry_run: p.dry_run,
            provenance: Provenance::default(),
        })
    }

    fn one_match(&mut self, path: &str, m: &security::Match) -> Result<Match, DecodeError> {
        if !m.extensions.is_empty() {
            return Err(self.error(format!("{path}.extensions"), "an unknown matcher"));
        }
        Ok(Match {
            namespaces: self.strings(path, "namespaces", &m.namespaces)?,
            not_namespaces: self.strings(path, "not_namespaces", &m.not_namespaces)?,
            service_accounts: self.accounts(&m.service_accounts),
            not_service_accounts: self.accounts(&m.not_service_accounts),
            principals: self.strings(path, "principals", &m.principals)?,
            not_principals: self.strings(path, "not_principals", &m.not_principals)?,
            source_ips: self.prefixes(path, "source_ips", &m.source_ips)?,
            not_source_ips: self.prefixes(path, "not_source_ips", &m.not_source_ips)?,
            destination_ips: self.prefixes(path, "destination_ips", &m.destination_ips)?,
            not_destination_ips: self.prefixes(
                path,
                "not_destination_ips",
                &m.not_destination_ips,
            )?,
            destination_ports: self.numbers(path, "destination_ports", &m.destination_ports)?,
            not_destination_ports: self.numbers(
                path,
                "not_destination_ports",
                &m.not_destination_ports,
            )?,
        })
    }

    fn strings(
        &mut self,
        path: &str,
        field: &str,
        all: &[security::StringMatch],
    ) -> Result<Vec<StringMatch>, DecodeError> {
        use security::string_match::MatchType;
        all.iter()
            .map(|one| match &one.match_type {
                Some(MatchType::Exact(s)) => Ok(StringMatch::Exact(self.str(s))),
                Some(MatchType::Prefix(s)) => Ok(StringMatch::Prefix(self.str(s))),
                Some(MatchType::Suffix(s)) => Ok(StringMatch::Suffix(self.str(s))),
                Some(MatchType::Presence(())) => Ok(StringMatch::Presence),
                None => {
                    Err(self.error(format!("{path}.{field}"), "an unknown kind of string match"))
                }
            })
            .collect()
    }

    fn accounts(&mut self, all: &[security::ServiceAccountMatch]) -> Vec<(Str, Str)> {
        all.iter().map(|a| (self.str(&a.namespace), self.str(&a.service_account))).collect()
    }

    fn prefixes(
        &mut self,
        path: &str,
        field: &str,
        all: &[security::Address],
    ) -> Result<Vec<IpPrefix>, DecodeError> {
        let prefix = |a: &security::Address| {
            let field = format!("{path}.{field}");
            let ip = self.ip(&field, &a.address)?;
            Ok(IpPrefix { ip, length: self.prefix_length(&field, ip, a.length)? })
        };
        all.iter().map(prefix).collect()
    }

    fn numbers(&mut self, path: &str, field: &str, all: &[u32]) -> Result<Vec<u16>, DecodeError> {
        all.iter().map(|p| self.port(&format!("{path}.{field}"), *p)).collect()
    }

    fn application_tunnel(
        &mut self,
        t: wire::ApplicationTunnel,
    ) -> Result<ApplicationTunnel, DecodeError> {
        use wire::application_tunnel::Protocol;
        let port = self.port("application_tunnel.port", t.port)?;
        Ok(ApplicationTunnel {
            proxy_protocol: match self.known("application_tunnel.protocol", t.protocol)? {
                Protocol::None => false,
                Protocol::Proxy => true,
            },
            port: (port != 0).then_some(port),
        })
    }

    fn locality(&mut self, l: wire::Locality) -> Locality {
        let mut part = |s: &str| (!s.is_empty()).then(|| self.interner.str(s));
        Locality { region: part(&l.region), zone: part(&l.zone), subzone: part(&l.subzone) }
    }

    /// Ordered by service key, so that equal workloads are equal values.
    fn memberships(
        &mut self,
        services: &std::collections::BTreeMap<String, wire::PortList>,
    ) -> Result<Memberships, DecodeError> {
        let mut all = Vec::with_capacity(services.len());
        for (name, list) in services {
            let Some((namespace, hostname)) = name.split_once('/') else {
                let name = short(name);
                return Err(self.error("services", format!("{name:?} is not namespace/hostname")));
            };
            let key = ServiceKey { namespace: self.str(namespace), hostname: self.str(hostname) };
            all.push((key, self.ports("services", &list.ports)?));
        }
        all.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(all.into())
    }

    fn policy_key(&mut self, name: &str) -> Result<PolicyKey, DecodeError> {
        match name.split_once('/') {
            Some((namespace, name)) if !name.is_empty() => {
                Ok(PolicyKey { namespace: self.str(namespace), name: self.str(name) })
            }
            _ => {
                let name = short(name);
                Err(self.error("authorization_policies", format!("{name:?} is not namespace/name")))
            }
        }
    }

    fn ports(
        &mut self,
        field: &str,
        all: &[wire::Port],
    ) -> Result<Arc<[ServicePort]>, DecodeError> {
        let mut ports = Vec::with_capacity(all.len());
        for p in all {
            ports.push(ServicePort {
                service_port: self.port(field, p.service_port)?,
                target_port: self.port(field, p.target_port)?,
                app_protocol: match wire::AppProtocol::try_from(p.app_protocol) {
                    Ok(wire::AppProtocol::Http11) => AppProtocol::Http11,
                    Ok(wire::AppProtocol::Http2) => AppProtocol::Http2,
                    Ok(wire::AppProtocol::Grpc) => AppProtocol::Grpc,
                    // Bytes, and a protocol of the future is bytes as well.
                    Ok(
                        wire::AppProtocol::Unknown
                        | wire::AppProtocol::Tcp
                        | wire::AppProtocol::Tls,
                    )
                    | Err(_) => AppProtocol::Unknown,
                },
            });
        }
        Ok(self.interner.ports(ports))
    }

    fn gateway(
        &mut self,
        field: &str,
        g: wire::GatewayAddress,
    ) -> Result<GatewayAddress, DecodeError> {
        use wire::gateway_address::Destination;
        let destination = match g.destination {
            Some(Destination::Hostname(h)) => GatewayDestination::Service(ServiceKey {
                namespace: self.str(&h.namespace),
                hostname: self.str(&h.hostname),
            }),
            Some(Destination::Address(a)) => GatewayDestination::Address(NetworkAddress {
                network: self.str(&a.network),
                ip: self.ip(&format!("{field}.address"), &a.address)?,
            }),
            None => return Err(self.error(field, "names neither a hostname nor an address")),
        };
        let hbone_port = self.port(&format!("{field}.hbone_mtls_port"), g.hbone_mtls_port)?;
        if hbone_port == 0 {
            return Err(self.error(format!("{field}.hbone_mtls_port"), "is not set"));
        }
        Ok(GatewayAddress { destination, hbone_port })
    }

    fn vip(&mut self, a: &wire::NetworkAddress) -> Result<Vip, DecodeError> {
        let ip = self.ip("addresses", &a.address)?;
        let width = if ip.is_ipv4() { 32 } else { 128 };
        let prefix = self.prefix_length("addresses", ip, a.length.unwrap_or(width))?;
        Ok(Vip { network: self.str(&a.network), ip, prefix })
    }

    fn load_balancing(&mut self, l: &wire::LoadBalancing) -> Result<LoadBalancing, DecodeError> {
        use wire::load_balancing::{HealthPolicy as H, Mode, Scope};
        let mut preference = Vec::with_capacity(l.routing_preference.len());
        for scope in &l.routing_preference {
            preference.push(match self.known("load_balancing.routing_preference", *scope)? {
                Scope::Region => LocalityScope::Region,
                Scope::Zone => LocalityScope::Zone,
                Scope::Subzone => LocalityScope::Subzone,
                Scope::Node => LocalityScope::Node,
                Scope::Cluster => LocalityScope::Cluster,
                Scope::Network => LocalityScope::Network,
                Scope::UnspecifiedScope => {
                    return Err(self.error("load_balancing.routing_preference", "is unspecified"));
                }
            });
        }
        Ok(LoadBalancing {
            mode: match self.known("load_balancing.mode", l.mode)? {
                Mode::UnspecifiedMode => RoutingMode::Any,
                Mode::Strict => RoutingMode::Strict,
                Mode::Failover => RoutingMode::Failover,
                Mode::Passthrough => RoutingMode::Passthrough,
            },
            preference: preference.into(),
            health: match self.known("load_balancing.health_policy", l.health_policy)? {
                H::OnlyHealthy => HealthPolicy::OnlyHealthy,
                H::AllowAll => HealthPolicy::AllowAll,
            },
        })
    }
}
