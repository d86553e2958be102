//! Network interfaces: make, join, name, switch on, list.

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;

use super::{
    Error, Message, NLM_F_CREATE, NLM_F_EXCL, Netlink, Result, attr, attrs, route_request, text,
    u32_at,
};
use crate::netns::NetNs;

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINK: u16 = 5;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
const IFF_UP: u32 = 1;
/// Length of `struct ifinfomsg`.
const IFINFOMSG: usize = 16;

/// A hardware (Ethernet) address.
pub type Mac = [u8; 6];

/// An interface as the kernel lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its number in this namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Whether it is switched on.
    pub up: bool,
    /// Largest packet.
    pub mtu: u32,
    /// Hardware address, if it has an Ethernet one.
    pub mac: Option<Mac>,
    /// The bridge it is a port of.
    pub master: Option<u32>,
    /// The other end of a veth pair: its number in the namespace where that end is.
    pub peer: Option<u32>,
    /// `veth`, `bridge` and so on; empty for hardware and loopback.
    pub kind: String,
}

/// One end of a veth pair to be made.
#[derive(Clone, Copy, Debug)]
pub struct VethEnd<'a> {
    /// Interface name.
    pub name: &'a str,
    /// The namespace it goes to; none: the caller's.
    pub ns: Option<&'a NetNs>,
    /// Hardware address; none: the kernel makes one up.
    pub mac: Option<Mac>,
    /// Largest packet; none: 1500.
    pub mtu: Option<u32>,
}

impl<'a> VethEnd<'a> {
    /// An end in the caller's namespace.
    pub fn here(name: &'a str) -> Self {
        Self { name, ns: None, mac: None, mtu: None }
    }

    /// An end in another namespace.
    pub fn inside(name: &'a str, ns: &'a NetNs) -> Self {
        Self { name, ns: Some(ns), mac: None, mtu: None }
    }
}

/// The number of an interface.
pub fn index(name: &str) -> Result<u32> {
    nix::net::if_::if_nametoindex(name)
        .map_err(|e| Error::new(&format!("find interface {name}"), e))
}

/// Makes a veth pair.
pub fn add_veth(one: &VethEnd<'_>, other: &VethEnd<'_>) -> Result<()> {
    let mut message = Message::new(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &header(0, 0, 0));
    veth_end(&mut message, one);
    message.nested(IFLA_LINKINFO, |m| {
        m.str(IFLA_INFO_KIND, "veth").nested(IFLA_INFO_DATA, |m| {
            m.nested(VETH_INFO_PEER, |m| veth_end(m.raw(&header(0, 0, 0)), other));
        });
    });
    route_request(&format!("add veth {} - {}", one.name, other.name), message)
}

/// Makes a bridge.
pub fn add_bridge(name: &str) -> Result<()> {
    let mut message = Message::new(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &header(0, 0, 0));
    message.str(IFLA_IFNAME, name).nested(IFLA_LINKINFO, |m| {
        m.str(IFLA_INFO_KIND, "bridge");
    });
    route_request(&format!("add bridge {name}"), message)
}

/// Switches an interface on.
pub fn up(name: &str) -> Result<()> {
    change(name, "switch on", header(index(name)?, IFF_UP, IFF_UP), |_| ())
}

/// Switches an interface off.
pub fn down(name: &str) -> Result<()> {
    change(name, "switch off", header(index(name)?, 0, IFF_UP), |_| ())
}

/// Makes an interface a port of a bridge.
pub fn set_master(name: &str, bridge: &str) -> Result<()> {
    let master = index(bridge)?;
    change(name, &format!("join bridge {bridge}:"), header(index(name)?, 0, 0), |m| {
        m.u32(IFLA_MASTER, master);
    })
}

/// Sets the largest packet.
pub fn set_mtu(name: &str, mtu: u32) -> Result<()> {
    change(name, "set mtu of", header(index(name)?, 0, 0), |m| {
        m.u32(IFLA_MTU, mtu);
    })
}

/// Sets the hardware address.
pub fn set_mac(name: &str, mac: Mac) -> Result<()> {
    change(name, "set hardware address of", header(index(name)?, 0, 0), |m| {
        m.attr(IFLA_ADDRESS, &mac);
    })
}

/// Renames an interface; it must be off.
pub fn rename(name: &str, new: &str) -> Result<()> {
    change(name, &format!("rename to {new}:"), header(index(name)?, 0, 0), |m| {
        m.str(IFLA_IFNAME, new);
    })
}

/// Moves an interface to another namespace.
pub fn move_to(name: &str, ns: &NetNs) -> Result<()> {
    let fd = ns.as_fd().as_raw_fd().cast_unsigned();
    change(name, "move to another namespace:", header(index(name)?, 0, 0), |m| {
        m.u32(IFLA_NET_NS_FD, fd);
    })
}

/// Deletes an interface, and with one end of a veth pair the other.
pub fn delete(name: &str) -> Result<()> {
    let message = Message::new(RTM_DELLINK, 0, &header(index(name)?, 0, 0));
    route_request(&format!("delete interface {name}"), message)
}

/// All interfaces of the namespace.
pub fn list() -> Result<Vec<Link>> {
    let message = Message::new(RTM_GETLINK, 0, &header(0, 0, 0));
    let mut netlink = Netlink::open(libc::NETLINK_ROUTE)?;
    netlink.dump("list interfaces", &message, |m| {
        (m.kind == RTM_NEWLINK).then(|| read(m.payload)).flatten()
    })
}

/// One interface by name.
pub fn get(name: &str) -> Result<Link> {
    let found = list()?.into_iter().find(|link| link.name == name);
    found.ok_or_else(|| Error::new(&format!("find interface {name}"), Errno::ENODEV))
}

fn change(
    name: &str,
    verb: &str,
    header: [u8; IFINFOMSG],
    fill: impl FnOnce(&mut Message),
) -> Result<()> {
    let mut message = Message::new(RTM_NEWLINK, 0, &header);
    fill(&mut message);
    route_request(&format!("{verb} {name}"), message)
}

fn veth_end(message: &mut Message, end: &VethEnd<'_>) {
    message.str(IFLA_IFNAME, end.name);
    if let Some(ns) = end.ns {
        message.u32(IFLA_NET_NS_FD, ns.as_fd().as_raw_fd().cast_unsigned());
    }
    if let Some(mac) = end.mac {
        message.attr(IFLA_ADDRESS, &mac);
    }
    if let Some(mtu) = end.mtu {
        message.u32(IFLA_MTU, mtu);
    }
}

/// `struct ifinfomsg`: which interface, and which of its flags to change.
fn header(index: u32, flags: u32, mask: u32) -> [u8; IFINFOMSG] {
    let mut header = [0; IFINFOMSG];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..16].copy_from_slice(&mask.to_ne_bytes());
    header
}

fn read(payload: &[u8]) -> Option<Link> {
    let mut link = Link {
        index: u32_at(payload, 4)?,
        name: String::new(),
        up: u32_at(payload, 8)? & IFF_UP != 0,
        mtu: 0,
        mac: None,
        master: None,
        peer: None,
        kind: String::new(),
    };
    for (kind, value) in attrs(payload.get(IFINFOMSG..)?) {
        match kind {
            IFLA_IFNAME => link.name = text(value),
            IFLA_MTU => link.mtu = u32_at(value, 0)?,
            IFLA_ADDRESS => link.mac = value.try_into().ok(),
            IFLA_MASTER => link.master = u32_at(value, 0),
            IFLA_LINK => link.peer = u32_at(value, 0),
            IFLA_LINKINFO => link.kind = attr(value, IFLA_INFO_KIND).map(text).unwrap_or_default(),
            _ => {}
        }
    }
    Some(link)
}
