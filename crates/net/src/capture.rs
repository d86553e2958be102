//! Capture: every TCP connection into or out of a pod passes the proxy's listeners in the pod's network namespace.
//!
//! Purpose: [`install`] and check ([`is_installed`]) the settings, routes and rules that do it. Under connections that
//! live, [`handover`] switches it on and off.
//!
//! How it works, with TPROXY and routing by mark, and without connection tracking or address translation:
//! - *Out*: the output chain marks packets of the app [`MARK_OUTBOUND`]; the mark routes them to loopback, and there
//!   prerouting hands them to the listener on [`OUTBOUND_PORT`].
//! - *DNS*: UDP and TCP to port 53 go the same way to the listeners on [`DNS_PORT`], if the pod wants that ([`Dns`]).
//!   Those are bound to loopback: what comes from outside never reaches them. No other UDP is captured.
//! - *In*: prerouting hands TCP from outside to the listener on [`INBOUND_PLAINTEXT_PORT`], except HBONE and probes.
//! - *The proxy's own sockets* carry [`MARK_PROXY`] and are left alone; accepted sockets inherit it from their listener.
//! - *Proxy to app*: the proxy connects in the client's name with [`MARK_TO_APP`]. `tcp_fwmark_accept` makes the app's
//!   end carry the same mark, which routes the answers to loopback instead of to the real client.
//! - *Resets* that the kernel itself sends belong to no socket, so they carry the mark of the packet they answer
//!   (`fwmark_reflect`). Packets from outside are marked [`MARK_PROXY`] for that: their resets leave. Packets that
//!   proxy and app exchange are marked so that the reset reaches the other one: a refused connection is known at once.
//! - *Without listeners* the opening packets are dropped, so nothing passes uncaptured, and the sender's next try a
//!   second later finds the proxy that was restarted meanwhile.
//!
//! Invariants: everything is idempotent; a pod without IPv6 is captured for IPv4; an app that cannot set marks
//! (it has no capability over its own network namespace) cannot leave uncaptured.

pub mod handover;

use handover::Noted;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

pub use model::{DNS_PORT, HBONE_PORT, INBOUND_PLAINTEXT_PORT, OUTBOUND_PORT};
use nix::errno::Errno;

use crate::netlink::route::{Kind, Route};
use crate::netlink::rule::Rule as RoutingRule;
use crate::netlink::{self, link, route, rule};
use crate::netns::NetNs;
use crate::nft::{
    self, Chain, ChainType, Family, Hook, HookPoint, Rule, TCP, Table, UDP, Verdict, priority,
};
use crate::sysctl;

/// Mark of the proxy's own sockets in the pod, listeners included: never captured.
pub const MARK_PROXY: u32 = 0x539;
/// Mark of what the app sends out, until the proxy has it.
pub const MARK_OUTBOUND: u32 = 0x100;
/// Mark of connections from the proxy to the app, both directions.
pub const MARK_TO_APP: u32 = 0x200;
/// The bits of a mark that are ours.
pub const MARK_MASK: u32 = 0xfff;
/// The routing table that sends everything to loopback.
pub const ROUTE_TABLE: u32 = 100;
/// Where our routing rules stand: after the table of local addresses (0), before main (32766).
pub const RULE_PRIORITY: u32 = 20_100;
/// The address in whose name the node probes a pod's health. Link-local, so that no pod can have it.
pub const PROBE_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 7, 127);
/// The same for IPv6.
pub const PROBE_V6: Ipv6Addr =
    Ipv6Addr::new(0xfd16, 0x9254, 0x7127, 0x1337, 0xffff, 0xffff, 0xffff, 0xffff);
/// Where DNS servers listen.
pub const RESOLVER_PORT: u16 = 53;
/// Where the proxy takes captured questions, of each family.
pub const DNS_LISTENERS: [SocketAddr; 2] = [
    SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), DNS_PORT),
    SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), DNS_PORT),
];
/// Name of the nftables table, family inet.
pub const TABLE: &str = "ambit";

/// Accepted sockets take the mark of the connection's first packet (both families).
const FWMARK_ACCEPT: &str = "net/ipv4/tcp_fwmark_accept";
/// Packets that the kernel answers with take the mark of what they answer.
const FWMARK_REFLECT: [&str; 2] = ["net/ipv4/fwmark_reflect", "net/ipv6/fwmark_reflect"];

/// Whether a pod's DNS questions go to the proxy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Dns {
    /// To the proxy, which answers for the mesh and forwards the rest.
    #[default]
    Captured,
    /// Straight to the pod's resolver, and by TCP as any other connection.
    Left,
}

/// Capture could not be put in place, taken away or looked at.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The namespace cannot be entered.
    #[error("capture: {0}")]
    Namespace(#[source] io::Error),
    /// A kernel setting is missing or read-only.
    #[error("capture: {0}{hint}", hint = sysctl_hint(.0))]
    Setting(#[source] io::Error),
    /// Policy routing failed.
    #[error("capture: {0}{hint}", hint = routing_hint(.0))]
    Routing(#[source] netlink::Error),
    /// The open connections cannot be listed.
    #[error("capture: {0}; is /proc mounted?")]
    Connections(#[source] io::Error),
    /// The nftables table was refused.
    #[error("capture: {0}")]
    Table(#[source] nft::Error),
}

/// Puts capture in place in a pod's namespace. Listeners should stand before: from here on connections go to them.
pub fn install(ns: &NetNs, dns: Dns) -> Result<(), CaptureError> {
    ns.run(|| {
        prepare()?;
        // Last, since this switches capture on: before it, the rest does nothing.
        let Some((kept @ (State::Captured | State::Exempting), _)) = handover::state()? else {
            let whole = table(State::Captured, dns);
            return nft::replace(&whole).map_err(CaptureError::Table);
        };
        let rules = table(kept, dns);
        nft::commit("set capture's rules", &[nft::Change::Rules(&rules)])
            .map_err(CaptureError::Table)
    })
    .map_err(CaptureError::Namespace)?
}

/// Whether capture is in place and whole: somebody may have removed or added a rule by hand.
pub fn is_installed(ns: &NetNs, dns: Dns) -> Result<bool, CaptureError> {
    ns.run(|| {
        let rules = rule::list().map_err(CaptureError::Routing)?;
        let routes = route::list(ROUTE_TABLE).map_err(CaptureError::Routing)?;
        let routed = families().all(|ipv6| {
            routes.contains(&loopback_route(ipv6))
                && routing_rules(ipv6).iter().all(|wanted| rules.contains(wanted))
        });
        let reflected = families().map(|ipv6| FWMARK_REFLECT[usize::from(ipv6)]);
        let mut set = true;
        for name in std::iter::once(FWMARK_ACCEPT).chain(reflected) {
            set &= sysctl::read(name).map_err(CaptureError::Setting)? == "1";
        }
        let intact = |state| nft::is_intact(&table(state, dns)).map_err(CaptureError::Table);
        Ok(routed && set && (intact(State::Captured)? || intact(State::Exempting)?))
    })
    .map_err(CaptureError::Namespace)?
}

/// What the table does. Its chains and sets are always the same; the rules differ, so that a switch changes a chain's
/// rules at once and no packet passes between two of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Every connection is captured.
    Captured,
    /// The same, except those in the set of direct flows: they were there before.
    Exempting,
    /// As `Left`, and what opens is noted as direct.
    Entering,
    /// As `Exempting`, and what the pod opens is noted as the proxy's.
    Leaving,
    /// Only what is noted as the proxy's still goes to it.
    Left,
}

/// The table that captures.
pub fn table(state: State, dns: Dns) -> Table {
    let chain = |name: &str, point, kind, rules| Chain {
        name: name.to_owned(),
        hook: Some(Hook { point, kind, priority: priority::MANGLE }),
        rules,
    };
    Table {
        family: Family::Inet,
        name: TABLE.to_owned(),
        sets: handover::sets(),
        chains: vec![
            chain("prerouting", HookPoint::Prerouting, ChainType::Filter, prerouting(state, dns)),
            chain("output", HookPoint::Output, ChainType::Route, output(state, dns)),
        ],
    }
}

fn prerouting(state: State, dns: Dns) -> Vec<Rule> {
    match state {
        State::Entering => {
            return [handover::still_under_way(), handover::note_received()].concat();
        }
        State::Left => return handover::still_under_way(),
        State::Captured | State::Exempting | State::Leaving => {}
    }
    let leave = |rule: Rule| rule.verdict(Verdict::Return);
    let from_app = || from_app("from the app to the outbound listener");
    let [probe4, probe6] = probes();
    let mut rules = Vec::new();
    if dns == Dns::Captured {
        rules.extend(dns_rules());
    }
    rules.extend([
        leave(Rule::new("only TCP is captured").protocol_not(TCP)),
        leave(Rule::new("probes of the node").source(probe4)),
        leave(Rule::new("probes of the node").source(probe6)),
        leave(Rule::new("between proxy and app").mark(MARK_TO_APP, MARK_MASK)),
        from_app().protocol(TCP).tproxy(OUTBOUND_PORT).verdict(Verdict::Accept),
        from_app().tcp_opening().verdict(Verdict::Drop),
        leave(Rule::new("the pod to itself").from_loopback().set_mark(0)),
        Rule::new("from outside").set_mark(MARK_PROXY),
        leave(Rule::new("HBONE has its own listener").tcp_port(HBONE_PORT)),
        Rule::new("from outside to the inbound listener")
            .protocol(TCP)
            .tproxy(INBOUND_PLAINTEXT_PORT)
            .verdict(Verdict::Accept),
        Rule::new("no listener: wait for it").tcp_opening().verdict(Verdict::Drop),
    ]);
    rules
}

/// Questions by TCP fall through to the outbound listener when nobody listens for them. Those by UDP are dropped then: the
/// asker tries again, and finds the proxy that was restarted meanwhile; a refusal would count as an answer.
fn dns_rules() -> Vec<Rule> {
    let question = || from_app("DNS from the app");
    let mut rules = Vec::new();
    for to in DNS_LISTENERS {
        let of_family = || question().family(to.is_ipv6());
        let by_udp = of_family().udp_port(RESOLVER_PORT);
        let by_tcp = of_family().tcp_port(RESOLVER_PORT);
        rules.extend([by_udp, by_tcp].map(|rule| rule.tproxy_to(to).verdict(Verdict::Accept)));
    }
    rules.push(question().protocol(UDP).verdict(Verdict::Drop));
    rules
}

/// What the output chain turned around.
fn from_app(comment: &str) -> Rule {
    Rule::new(comment).from_loopback().mark(MARK_OUTBOUND, MARK_MASK)
}

fn output(state: State, dns: Dns) -> Vec<Rule> {
    let captures = !matches!(state, State::Entering | State::Left);
    let (leave, with_dns) =
        (|rule: Rule| rule.verdict(Verdict::Return), captures && dns == Dns::Captured);
    let [probe4, probe6] = probes();
    let first = if with_dns {
        Rule::new("of UDP only DNS is captured").udp_port_not(RESOLVER_PORT)
    } else {
        Rule::new("only TCP is captured").protocol_not(TCP)
    };
    let mut rules = vec![
        leave(first),
        leave(Rule::new("the proxy's own sockets").mark(MARK_PROXY, MARK_MASK)),
        leave(Rule::new("between proxy and app").mark(MARK_TO_APP, MARK_MASK)),
        leave(Rule::new("answers to probes").destination(probe4)),
        leave(Rule::new("answers to probes").destination(probe6)),
        leave(Rule::new("the pod to itself").destination_is_local()),
    ];
    rules.extend(match state {
        State::Captured => vec![],
        State::Exempting => handover::exempt(),
        State::Entering => [handover::keep(), handover::note_sent(Noted::Direct)].concat(),
        State::Leaving => [handover::exempt(), handover::note_sent(Noted::Proxied)].concat(),
        State::Left => handover::keep(),
    });
    if captures {
        let rule = Rule::new("every other connection goes to the proxy");
        rules.push(rule.protocol(TCP).set_mark(MARK_OUTBOUND));
    }
    if with_dns {
        // Behind loopback nobody knows which link was meant.
        let of_link = Rule::new("but no question to one link").protocol(UDP);
        rules.push(leave(of_link.destination_is_link_local()));
        rules.push(Rule::new("and every question").protocol(UDP).set_mark(MARK_OUTBOUND));
    }
    rules
}

fn probes() -> [IpAddr; 2] {
    [PROBE_V4.into(), PROBE_V6.into()]
}

/// The families the namespace has. IPv6 can be missing from the kernel, or switched off for the whole namespace.
fn families() -> impl Iterator<Item = bool> {
    let off = sysctl::read("net/ipv6/conf/lo/disable_ipv6");
    let has_ipv6 = off.is_ok_and(|off| off == "0");
    [false, true].into_iter().filter(move |ipv6| !ipv6 || has_ipv6)
}

/// Settings and routing: without the table they do nothing.
fn prepare() -> Result<(), CaptureError> {
    settings()?;
    for ipv6 in families() {
        sysctl::write(FWMARK_REFLECT[usize::from(ipv6)], "1").map_err(CaptureError::Setting)?;
        add_routing(ipv6).map_err(CaptureError::Routing)?;
    }
    Ok(())
}

fn settings() -> Result<(), CaptureError> {
    // Everything captured passes loopback.
    link::up("lo").map_err(CaptureError::Routing)?;
    sysctl::write(FWMARK_ACCEPT, "1").map_err(CaptureError::Setting)?;
    // The packets that capture turns around come in on an interface they would not go out by.
    let links = link::list().map_err(CaptureError::Routing)?;
    for name in ["all", "default"].into_iter().chain(links.iter().map(|l| l.name.as_str())) {
        sysctl::write(&format!("net/ipv4/conf/{name}/rp_filter"), "0")
            .map_err(CaptureError::Setting)?;
    }
    Ok(())
}

fn add_routing(ipv6: bool) -> netlink::Result<()> {
    route::add(&loopback_route(ipv6))?;
    routing_rules(ipv6).iter().try_for_each(rule::add)
}

fn take_routing_away() -> netlink::Result<()> {
    for ipv6 in families() {
        for wanted in routing_rules(ipv6) {
            rule::delete(&wanted)?;
        }
        route::delete(&loopback_route(ipv6))?;
    }
    Ok(())
}

fn loopback_route(ipv6: bool) -> Route {
    Route { kind: Kind::Local, table: ROUTE_TABLE, ..Route::default_of(ipv6).dev("lo") }
}

fn routing_rules(ipv6: bool) -> [RoutingRule; 2] {
    [MARK_OUTBOUND, MARK_TO_APP].map(|mark| RoutingRule {
        ipv6,
        mark,
        mask: MARK_MASK,
        table: ROUTE_TABLE,
        priority: RULE_PRIORITY,
    })
}

fn sysctl_hint(e: &io::Error) -> &'static str {
    match e.kind() {
        io::ErrorKind::NotFound => {
            "; is /proc mounted, and the kernel at least 4.16 with network namespaces?"
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "; /proc/sys/net must be writable by root of the namespace's owner"
        }
        _ => "",
    }
}

fn routing_hint(e: &netlink::Error) -> &'static str {
    match e.errno {
        Errno::EPERM | Errno::EACCES => "; CAP_NET_ADMIN over this network namespace is needed",
        Errno::EOPNOTSUPP | Errno::EAFNOSUPPORT => {
            "; the kernel seems to lack policy routing (CONFIG_IP_MULTIPLE_TABLES)"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests;
