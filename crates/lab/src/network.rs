//! The lab's network: a bridge for the nodes, a namespace per node, a namespace per pod.
//!
//! ```text
//! lab root ns:  bridge "underlay" 10.89.0.1
//!                 │ veth           │ veth
//! node-1 ns: eth0 10.89.0.11    node-2 ns: eth0 10.89.0.12     routes to each other's pod ranges
//!                 │ veth "pod7"
//! pod ns:     eth0 10.244.1.3, fd00:10:244:1::3               one route: everything to its node
//! ```
//!
//! Invariants: no interface is shared between pods; a node takes from a pod's interface only packets with that pod's
//! addresses (a pod can use neither another's address nor the node's probe address); the control plane answers nodes, and
//! pods that were admitted; everything is gone with the last handle and socket.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result};
use compile::local::{LocalConfig, LocalNode};
use net::netlink::link::VethEnd;
use net::netlink::route::Route;
use net::netlink::{addr, link, route};
use net::nft::{
    self, Chain, ChainType, Entry, Family, Field, Hook, HookPoint, Rule, Set, Table, Verdict,
    priority,
};
use net::{NetNs, capture, sysctl};

/// Where the control plane listens: the lab's root namespace on the bridge.
pub(crate) use compile::local::{
    CONTROL_PLANE_PORT, CONTROL_PLANE_V4 as UNDERLAY_V4, CONTROL_PLANE_V6 as UNDERLAY_V6,
};
/// The cluster's DNS server, on every node.
pub(crate) const DNS_V4: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
pub(crate) const DNS_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0xa);
/// The address of a node as its pods see it: their gateway.
const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 7, 1);
const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// A pod's link-local address; given, not derived, so that the source check can name it.
const POD_LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);
/// The source check of a node.
const TABLE: &str = "ambit-sources";
/// What pods may reach of the lab's root namespace.
const GUARD: &str = "ambit-control-plane";

/// The number of the protocol.
const TCP: u8 = 6;
/// Name of the bridge.
const BRIDGE: &str = "underlay";
/// The interface to the outside, in nodes and in pods.
const UPLINK: &str = "eth0";

#[derive(Debug)]
pub(crate) struct Network {
    pub(crate) nodes: Vec<Node>,
    next_interface: u32,
    /// Interfaces of the pods that the control plane answers.
    admitted: BTreeSet<String>,
}

#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) ns: NetNs,
    pub(crate) underlay: [IpAddr; 2],
    /// Interface name to the addresses that may come from it.
    pods: BTreeMap<String, Vec<IpAddr>>,
}

/// A pod's end of the network.
#[derive(Clone, Debug)]
pub(crate) struct PodNet {
    pub(crate) ns: NetNs,
    /// Index of the node.
    pub(crate) node: usize,
    /// The node's end.
    interface: String,
    pub(crate) ips: Vec<IpAddr>,
}

impl Network {
    /// Builds bridge and nodes in the caller's namespace, which must be fresh.
    pub(crate) fn create(local: &LocalConfig) -> Result<Self> {
        settings(false)?;
        link::up("lo")?;
        link::add_bridge(BRIDGE)?;
        quiet(BRIDGE)?;
        link::up(BRIDGE)?;
        addr::add(BRIDGE, UNDERLAY_V4.into(), 24)?;
        addr::add(BRIDGE, UNDERLAY_V6.into(), 64)?;
        let made: Result<Vec<Node>> = local.nodes.iter().map(Node::create).collect();
        let network = Self { nodes: made?, next_interface: 1, admitted: BTreeSet::new() };
        for node in &network.nodes {
            node.route_services(local).with_context(|| format!("routes of {}", node.name))?;
            node.reach(&local.nodes).with_context(|| format!("routes of {}", node.name))?;
        }
        let nodes: Vec<IpAddr> = local.nodes.iter().flat_map(|n| n.addresses).collect();
        nft::replace(&guard(link::index(BRIDGE)?, &nodes)).context("guard the control plane")?;
        Ok(network)
    }

    /// The index of a node by name.
    pub(crate) fn node(&self, name: &str) -> Option<usize> {
        self.nodes.iter().position(|n| n.name == name)
    }

    /// Makes the namespace of a pod and connects it.
    pub(crate) fn add_pod(&mut self, node: usize, ips: &[IpAddr]) -> Result<PodNet> {
        let interface = format!("pod{}", self.next_interface);
        self.next_interface += 1;
        let ns = NetNs::create().context("network namespace of a pod")?;
        let pod = PodNet { ns, node, interface: interface.clone(), ips: ips.to_vec() };
        let node = self.nodes.get_mut(node).context("no such node")?;
        node.connect(&pod).with_context(|| format!("connect a pod to {}", node.name))?;
        pod.ns.run(|| pod.configure())?.context("configure a pod's network")?;
        let mut sources = ips.to_vec();
        sources.push(POD_LINK_LOCAL.into());
        node.pods.insert(interface, sources);
        node.check_sources().with_context(|| format!("source check of {}", node.name))?;
        Ok(pod)
    }

    /// Lets the pod reach the control plane. Nobody answers the others: there is no way back to them.
    pub(crate) fn admit(&mut self, pod: &PodNet) -> Result<()> {
        self.admitted.insert(pod.interface.clone());
        for route in self.ways_back(pod)? {
            route::add(&route).context("a way from the control plane to a pod")?;
        }
        Ok(())
    }

    fn ways_back(&self, pod: &PodNet) -> Result<Vec<Route>> {
        let node = self.nodes.get(pod.node).context("no such node")?;
        let via = |ip: IpAddr| node.underlay[usize::from(ip.is_ipv6())];
        let way = |&ip| Route::to(ip, width(ip)).via(via(ip)).dev(BRIDGE);
        Ok(pod.ips.iter().map(way).collect())
    }

    /// Takes the pod off its node. Its namespace ends with its last process and handle.
    pub(crate) fn remove_pod(&mut self, pod: &PodNet) -> Result<()> {
        if self.admitted.remove(&pod.interface) {
            for route in self.ways_back(pod)? {
                // One that could not be made is not there.
                if let Err(e) = route::delete(&route) {
                    tracing::warn!("the way from the control plane to a pod: {e}");
                }
            }
        }
        let node = self.nodes.get_mut(pod.node).context("no such node")?;
        node.pods.remove(&pod.interface);
        node.ns
            .run(|| link::delete(&pod.interface))?
            .with_context(|| format!("disconnect a pod from {}", node.name))?;
        node.check_sources()
    }
}

impl Node {
    fn create(local: &LocalNode) -> Result<Self> {
        let name = local.name.clone();
        let ns = NetNs::create().with_context(|| format!("network namespace of {name}"))?;
        link::add_veth(&VethEnd::here(&name), &VethEnd::inside(UPLINK, &ns))?;
        quiet(&name)?;
        link::set_master(&name, BRIDGE)?;
        link::up(&name)?;
        let [v4, v6] = local.addresses;
        ns.run(|| -> Result<()> {
            settings(true)?;
            link::up("lo")?;
            quiet(UPLINK)?;
            link::up(UPLINK)?;
            addr::add(UPLINK, v4, 24)?;
            addr::add(UPLINK, v6, 64)?;
            // What it forwards for pods needs it: the kernel asks for neighbours with a link-local address.
            addr::add(UPLINK, link_local(v6), 64)?;
            for own in [DNS_V4, GATEWAY_V4, capture::PROBE_V4] {
                addr::add("lo", own.into(), 32)?;
            }
            for own in [DNS_V6, capture::PROBE_V6] {
                addr::add("lo", own.into(), 128)?;
            }
            Ok(())
        })?
        .with_context(|| format!("configure {name}"))?;
        Ok(Self { name, ns, underlay: [v4, v6], pods: BTreeMap::new() })
    }

    /// A way for Service addresses: what the node itself sends there is translated only after it was routed.
    fn route_services(&self, local: &LocalConfig) -> Result<()> {
        self.ns.run(|| -> Result<()> {
            for range in [local.services_v4, local.services_v6] {
                route::add(&Route::to(range.ip, range.length).dev(UPLINK))?;
            }
            Ok(())
        })?
    }

    /// Routes to the pods of the other nodes.
    fn reach(&self, all: &[LocalNode]) -> Result<()> {
        self.ns.run(|| -> Result<()> {
            for other in all.iter().filter(|n| n.name != self.name) {
                for (range, via) in [other.pods_v4, other.pods_v6].into_iter().zip(other.addresses)
                {
                    route::add(&Route::to(range.ip, range.length).via(via).dev(UPLINK))?;
                }
            }
            Ok(())
        })?
    }

    fn connect(&self, pod: &PodNet) -> Result<()> {
        self.ns.run(|| -> Result<()> {
            let name = pod.interface.as_str();
            link::add_veth(&VethEnd::here(name), &VethEnd::inside(UPLINK, &pod.ns))?;
            quiet(name)?;
            link::up(name)?;
            addr::add(name, GATEWAY_V6.into(), 64)?;
            for &ip in &pod.ips {
                let own = self.underlay[usize::from(ip.is_ipv6())];
                route::add(&Route { source: Some(own), ..Route::to(ip, width(ip)).dev(name) })?;
            }
            Ok(())
        })?
    }

    /// Writes the source check anew.
    fn check_sources(&self) -> Result<()> {
        self.ns.run(|| -> Result<()> {
            let mut allowed = vec![];
            for (name, ips) in &self.pods {
                let index = link::index(name)?;
                allowed.extend(ips.iter().map(|ip| (index, *ip)));
            }
            let uplink = link::index(UPLINK)?;
            Ok(nft::replace(&source_check(uplink, &allowed))?)
        })?
    }
}

impl PodNet {
    fn configure(&self) -> Result<()> {
        settings(false)?;
        link::up("lo")?;
        quiet(UPLINK)?;
        link::up(UPLINK)?;
        addr::add(UPLINK, POD_LINK_LOCAL.into(), 64)?;
        for &ip in &self.ips {
            addr::add(UPLINK, ip, width(ip))?;
        }
        for &ip in &self.ips {
            let gateway: IpAddr = if ip.is_ipv6() { GATEWAY_V6.into() } else { GATEWAY_V4.into() };
            let default =
                Route { onlink: true, source: Some(ip), ..Route::default_of(ip.is_ipv6()) };
            route::add(&default.via(gateway).dev(UPLINK))?;
        }
        Ok(())
    }
}

/// The link-local address beside an address of the underlay: the same last digits.
fn link_local(ip: IpAddr) -> IpAddr {
    let low = match ip {
        IpAddr::V4(ip) => ip.octets()[3].into(),
        IpAddr::V6(ip) => ip.segments()[7],
    };
    Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 1, low).into()
}

fn width(ip: IpAddr) -> u8 {
    if ip.is_ipv6() { 128 } else { 32 }
}

/// Drops what comes from a pod's interface with an address that is not the pod's.
fn source_check(uplink: u32, allowed: &[(u32, IpAddr)]) -> Table {
    let set = |name: &str, field, ipv6: bool| Set {
        name: name.to_owned(),
        key: vec![Field::Number, field],
        value: vec![],
        verdicts: false,
        dynamic: false,
        entries: allowed
            .iter()
            .filter(|(_, ip)| ip.is_ipv6() == ipv6)
            .map(|&(index, ip)| Entry::new().number(index).ip(ip))
            .collect(),
    };
    let leave = |rule: Rule| rule.verdict(Verdict::Return);
    let rules = vec![
        leave(Rule::new("the node itself").from_loopback()),
        leave(Rule::new("other nodes").from_interface(uplink)),
        leave(Rule::new("a pod's own address").interface_and_source_in(false, "sources4")),
        leave(Rule::new("a pod's own address").interface_and_source_in(true, "sources6")),
        Rule::new("somebody else's address").counter().verdict(Verdict::Drop),
    ];
    let hook =
        Hook { point: HookPoint::Prerouting, kind: ChainType::Filter, priority: priority::RAW };
    Table {
        family: Family::Inet,
        name: TABLE.to_owned(),
        sets: vec![set("sources4", Field::Ipv4, false), set("sources6", Field::Ipv6, true)],
        chains: vec![Chain { name: "prerouting".to_owned(), hook: Some(hook), rules }],
    }
}

/// Of the lab's root namespace pods reach the port where the control plane asks who they are, and no other.
fn guard(bridge: u32, nodes: &[IpAddr]) -> Table {
    let set = |name: &str, field, ipv6: bool| Set {
        name: name.to_owned(),
        key: vec![Field::Number, field],
        value: vec![],
        verdicts: false,
        dynamic: false,
        entries: nodes
            .iter()
            .filter(|ip| ip.is_ipv6() == ipv6)
            .map(|&ip| Entry::new().number(bridge).ip(ip))
            .collect(),
    };
    let leave = |rule: Rule| rule.verdict(Verdict::Return);
    let rules = vec![
        leave(Rule::new("the lab itself").from_loopback()),
        leave(Rule::new("a node").interface_and_source_in(false, "nodes4")),
        leave(Rule::new("a node").interface_and_source_in(true, "nodes6")),
        leave(Rule::new("who proves who it is").tcp_port(CONTROL_PLANE_PORT)),
        Rule::new("a pod").protocol(TCP).counter().verdict(Verdict::Drop),
    ];
    let hook =
        Hook { point: HookPoint::Prerouting, kind: ChainType::Filter, priority: priority::RAW };
    Table {
        family: Family::Inet,
        name: GUARD.to_owned(),
        sets: vec![set("nodes4", Field::Ipv4, false), set("nodes6", Field::Ipv6, true)],
        chains: vec![Chain { name: "prerouting".to_owned(), hook: Some(hook), rules }],
    }
}

/// Settings of a namespace. New ones inherit some of the machine's, which may be anything.
fn settings(forward: bool) -> io::Result<()> {
    let on = if forward { "1" } else { "0" };
    for (name, value) in [
        ("net/ipv4/ip_forward", on),
        ("net/ipv6/conf/all/forwarding", on),
        ("net/ipv4/conf/all/rp_filter", "0"),
        ("net/ipv4/conf/default/rp_filter", "0"),
        ("net/ipv4/conf/all/arp_ignore", "0"),
        ("net/ipv4/conf/default/arp_ignore", "0"),
        ("net/ipv4/conf/all/send_redirects", "0"),
        ("net/ipv4/conf/default/send_redirects", "0"),
        ("net/ipv4/ip_unprivileged_port_start", "0"),
        ("net/ipv6/conf/all/disable_ipv6", "0"),
        ("net/ipv6/conf/default/disable_ipv6", "0"),
        ("net/ipv6/conf/default/accept_ra", "0"),
        // No address of its own making: the source check must know every address.
        ("net/ipv6/conf/default/addr_gen_mode", "1"),
        // A pod may ask for more than it is given by default: servers of examples set large backlogs.
        ("net/core/somaxconn", "4096"),
    ] {
        sysctl::write(name, value)?;
    }
    // Lets ping work without a capability. Only ids that exist in the lab are taken.
    let groups = ["0\t2147483647", "0\t65536", "0\t0"];
    if !groups.iter().any(|range| sysctl::write("net/ipv4/ping_group_range", range).is_ok()) {
        tracing::debug!("ping_group_range could not be set: ping needs a capability");
    }
    Ok(())
}

/// Keeps the kernel from giving an interface addresses on its own.
fn quiet(interface: &str) -> io::Result<()> {
    sysctl::write(&format!("net/ipv6/conf/{interface}/addr_gen_mode"), "1")?;
    sysctl::write(&format!("net/ipv6/conf/{interface}/accept_ra"), "0")
}
