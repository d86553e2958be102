//! Service addresses for pods outside the mesh: what kube-proxy does, as one nftables table in a node's namespace.
//!
//! Purpose: [`program`] makes connections to (address, protocol, port) of a Service go to one of its endpoints, chosen
//! at random. A Service without endpoints refuses at once. A pod that reaches itself through its Service gets an answer.
//!
//! Invariants: the whole table is replaced in one transaction, and live connections stay where they are, since address
//! translation remembers them; the cost per packet does not grow with the number of Services (hash lookups); what does
//! not make sense (families mixed, a port twice) is refused before the kernel sees it.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr};

use crate::netns::NetNs;
use crate::nft::{
    self, Chain, ChainType, Entry, Family, Field, Hook, HookPoint, Rule, Set, TCP, Table, Verdict,
    priority,
};
use crate::sysctl;

/// Name of the nftables table, family inet.
pub const TABLE: &str = "ambit-services";
/// Most endpoints of all Services together. One transaction is one datagram of at most 416 KiB with the kernel's default
/// buffer limit, and an endpoint takes about 50 bytes, a Service about 900.
pub const MAX_ENDPOINTS: usize = 4000;
/// Before destinations are translated: a Service without endpoints has nothing to translate to.
const REFUSE_PRIORITY: i32 = priority::DSTNAT - 10;

/// What a node needs to forward and to refuse.
const NODE_SETTINGS: [(&str, &str); 6] = [
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv6/conf/all/forwarding", "1"),
    // A pod that reaches itself through its Service comes back by the interface it came from. To tell it a better way
    // would be wrong.
    ("net/ipv4/conf/all/send_redirects", "0"),
    ("net/ipv4/conf/default/send_redirects", "0"),
    // IPv6 always tells, and such messages share a limit per receiver with the refusals, which must not get lost.
    ("net/ipv4/icmp_ratelimit", "0"),
    ("net/ipv6/icmp/ratelimit", "0"),
];

/// A transport protocol that Services use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp = 6,
    /// UDP.
    Udp = 17,
}

/// One port of one address of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Where clients connect to.
    pub vip: SocketAddr,
    /// With which protocol.
    pub protocol: Protocol,
    /// Where they end up, in the same address family. None: refused.
    pub endpoints: Vec<SocketAddr>,
}

/// Services could not be put in place.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The namespace cannot be entered.
    #[error("services: {0}")]
    Namespace(#[source] io::Error),
    /// A kernel setting is missing or read-only.
    #[error("services: {0}")]
    Setting(#[source] io::Error),
    /// The same address, protocol and port twice.
    #[error("services: {0} ({1:?}) is there twice")]
    Twice(SocketAddr, Protocol),
    /// An IPv6 endpoint behind an IPv4 address, or the other way round.
    #[error("services: endpoint {endpoint} of {vip} is of the other address family")]
    Family {
        /// The Service's address.
        vip: SocketAddr,
        /// The endpoint that does not fit.
        endpoint: SocketAddr,
    },
    /// See [`MAX_ENDPOINTS`].
    #[error("services: {0} endpoints, at most {MAX_ENDPOINTS} are possible")]
    TooMany(usize),
    /// The kernel refused.
    #[error("services: {0}")]
    Table(#[source] nft::Error),
}

/// Lets a node forward packets. Call it before the node's interfaces are made, since they start with these settings.
pub fn prepare(ns: &NetNs) -> Result<(), Error> {
    let settings = || {
        for (name, value) in NODE_SETTINGS.iter().filter(|(name, _)| sysctl::exists(name)) {
            sysctl::write(name, value)?;
        }
        skip_address_detection()
    };
    ns.run(settings).map_err(Error::Namespace)?.map_err(Error::Setting)
}

/// Lets interfaces that are made from now on, in the calling thread's namespace, use IPv6 at once: link-local addresses
/// would otherwise wait a second or two for a neighbour to object, and neighbours are looked up from them.
pub fn skip_address_detection() -> io::Result<()> {
    let name = "net/ipv6/conf/default/accept_dad";
    if sysctl::exists(name) { sysctl::write(name, "0") } else { Ok(()) }
}

/// Puts exactly these Services in place in a node's namespace, instead of those that were there.
///
/// The namespace must forward packets: see [`prepare`].
pub fn program(ns: &NetNs, services: &[ServicePort]) -> Result<(), Error> {
    let table = table(services)?;
    ns.run(|| nft::replace(&table)).map_err(Error::Namespace)?.map_err(Error::Table)
}

/// Whether exactly these Services are in place, as far as chains and rules tell.
pub fn is_programmed(ns: &NetNs, services: &[ServicePort]) -> Result<bool, Error> {
    let table = table(services)?;
    ns.run(|| nft::is_intact(&table)).map_err(Error::Namespace)?.map_err(Error::Table)
}

/// Takes the table away.
pub fn remove(ns: &NetNs) -> Result<(), Error> {
    ns.run(|| nft::delete(Family::Inet, TABLE)).map_err(Error::Namespace)?.map_err(Error::Table)
}

/// The table for these Services.
pub fn table(services: &[ServicePort]) -> Result<Table, Error> {
    check(services)?;
    let (mut sets, mut chains) = (Vec::new(), Vec::new());
    for (number, service) in services.iter().enumerate().filter(|(_, s)| !s.endpoints.is_empty()) {
        sets.push(endpoints_map(number, service));
        chains.push(service_chain(number, service));
    }
    for ipv6 in [false, true] {
        sets.extend([served(ipv6, services), unserved(ipv6, services), hairpins(ipv6, services)]);
    }
    for (name, point) in [("prerouting", HookPoint::Prerouting), ("output", HookPoint::Output)] {
        let base = |name, kind, priority, rules| Chain {
            name,
            hook: Some(Hook { point, kind, priority }),
            rules,
        };
        chains.push(base(format!("refuse-{name}"), ChainType::Filter, REFUSE_PRIORITY, refusals()));
        chains.push(base(name.to_owned(), ChainType::Nat, priority::DSTNAT, dispatch()));
    }
    let hook =
        Hook { point: HookPoint::Postrouting, kind: ChainType::Nat, priority: priority::SRCNAT };
    chains.push(Chain { name: "postrouting".to_owned(), hook: Some(hook), rules: masquerades() });
    Ok(Table { family: Family::Inet, name: TABLE.to_owned(), sets, chains })
}

fn check(services: &[ServicePort]) -> Result<(), Error> {
    let mut seen = BTreeSet::new();
    for ServicePort { vip, protocol, endpoints } in services {
        if !seen.insert((vip, protocol)) {
            return Err(Error::Twice(*vip, *protocol));
        }
        if let Some(endpoint) = endpoints.iter().find(|e| e.is_ipv6() != vip.is_ipv6()) {
            return Err(Error::Family { vip: *vip, endpoint: *endpoint });
        }
    }
    let count = services.iter().map(|s| s.endpoints.len()).sum();
    if count > MAX_ENDPOINTS { Err(Error::TooMany(count)) } else { Ok(()) }
}

/// Service address to the Service's chain.
fn served(ipv6: bool, services: &[ServicePort]) -> Set {
    let of_family = services.iter().enumerate().filter(|(_, s)| s.vip.is_ipv6() == ipv6);
    let entries = of_family
        .filter(|(_, s)| !s.endpoints.is_empty())
        .map(|(number, s)| entry(s).verdict(Verdict::Jump(chain_name(number))));
    Set {
        name: family_name("services", ipv6),
        key: vec![address_field(ipv6), Field::Protocol, Field::Port],
        value: vec![],
        verdicts: true,
        entries: entries.collect(),
        dynamic: false,
    }
}

/// Service addresses behind which there is nobody.
fn unserved(ipv6: bool, services: &[ServicePort]) -> Set {
    let of_family = services.iter().filter(|s| s.vip.is_ipv6() == ipv6);
    Set {
        name: family_name("no-endpoints", ipv6),
        key: vec![address_field(ipv6), Field::Protocol, Field::Port],
        value: vec![],
        verdicts: false,
        entries: of_family.filter(|s| s.endpoints.is_empty()).map(entry).collect(),
        dynamic: false,
    }
}

/// (endpoint, endpoint) for each endpoint: what a packet looks like that goes back to the pod it came from.
fn hairpins(ipv6: bool, services: &[ServicePort]) -> Set {
    let of_family = services.iter().filter(|s| s.vip.is_ipv6() == ipv6);
    let ips: BTreeSet<IpAddr> = of_family.flat_map(|s| &s.endpoints).map(SocketAddr::ip).collect();
    Set {
        name: family_name("hairpins", ipv6),
        key: vec![address_field(ipv6); 2],
        value: vec![],
        verdicts: false,
        entries: ips.into_iter().map(|ip| Entry::new().ip(ip).ip(ip)).collect(),
        dynamic: false,
    }
}

fn endpoints_map(number: usize, service: &ServicePort) -> Set {
    let entries = (0u32..).zip(&service.endpoints);
    Set {
        name: format!("endpoints-{number}"),
        key: vec![Field::Number],
        value: vec![address_field(service.vip.is_ipv6()), Field::Port],
        verdicts: false,
        entries: entries.map(|(i, e)| Entry::new().number(i).to(e.ip(), e.port())).collect(),
        dynamic: false,
    }
}

fn service_chain(number: usize, service: &ServicePort) -> Chain {
    let count = u32::try_from(service.endpoints.len()).unwrap_or(u32::MAX);
    let protocol = service.protocol as u8;
    let rule = Rule::new(&service.vip.to_string()).protocol(protocol).dnat_to_one_of(
        service.vip.is_ipv6(),
        &format!("endpoints-{number}"),
        count,
    );
    Chain { name: chain_name(number), hook: None, rules: vec![rule] }
}

fn dispatch() -> Vec<Rule> {
    let rule = |ipv6| {
        let services = family_name("services", ipv6);
        Rule::new("to a service").service_in(ipv6, &services, true)
    };
    vec![rule(false), rule(true)]
}

fn refusals() -> Vec<Rule> {
    let matched = |ipv6| {
        let nobody = family_name("no-endpoints", ipv6);
        Rule::new("nobody serves").service_in(ipv6, &nobody, false)
    };
    [false, true]
        .into_iter()
        .flat_map(|ipv6| {
            [matched(ipv6).protocol(TCP).reset_tcp(), matched(ipv6).port_unreachable()]
        })
        .collect()
}

fn masquerades() -> Vec<Rule> {
    let rule = |ipv6| {
        Rule::new("a pod to itself").pair_in(ipv6, &family_name("hairpins", ipv6)).masquerade()
    };
    vec![rule(false), rule(true)]
}

fn entry(service: &ServicePort) -> Entry {
    let ServicePort { vip, protocol, .. } = service;
    Entry::new().ip(vip.ip()).protocol(*protocol as u8).port(vip.port())
}

fn address_field(ipv6: bool) -> Field {
    if ipv6 { Field::Ipv6 } else { Field::Ipv4 }
}

fn family_name(name: &str, ipv6: bool) -> String {
    format!("{name}-{}", if ipv6 { "ipv6" } else { "ipv4" })
}

fn chain_name(number: usize) -> String {
    format!("service-{number}")
}

#[cfg(test)]
mod tests;
