//! Addresses of interfaces.

use std::net::IpAddr;

use nix::errno::Errno;

use super::{
    Message, NLM_F_CREATE, NLM_F_REPLACE, Netlink, Result, attr, link, route_request, u32_at,
};

const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
/// Skip duplicate address detection: the address works at once. The caller hands out addresses itself, so there is
/// nobody to ask.
const IFA_F_NODAD: u8 = 0x02;
/// Length of `struct ifaddrmsg`.
const IFADDRMSG: usize = 8;

/// An address of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The interface's number.
    pub index: u32,
    /// The address.
    pub ip: IpAddr,
    /// Length of the network prefix.
    pub prefix: u8,
}

/// Gives an interface an address, usable at once. Giving it twice changes nothing.
pub fn add(dev: &str, ip: IpAddr, prefix: u8) -> Result<()> {
    let message = about(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, dev, ip, prefix)?;
    route_request(&format!("add address {ip}/{prefix} to {dev}"), message)
}

/// Takes an address away. One that is not there is fine.
pub fn delete(dev: &str, ip: IpAddr, prefix: u8) -> Result<()> {
    let message = about(RTM_DELADDR, 0, dev, ip, prefix)?;
    match route_request(&format!("delete address {ip}/{prefix} of {dev}"), message) {
        Err(e) if e.errno == Errno::EADDRNOTAVAIL => Ok(()),
        done => done,
    }
}

/// All addresses in the namespace.
pub fn list() -> Result<Vec<Address>> {
    let message = Message::new(RTM_GETADDR, 0, &[0; IFADDRMSG]);
    let mut netlink = Netlink::open(libc::NETLINK_ROUTE)?;
    netlink.dump("list addresses", &message, |m| {
        (m.kind == RTM_NEWADDR).then(|| read(m.payload)).flatten()
    })
}

fn about(kind: u16, flags: u16, dev: &str, ip: IpAddr, prefix: u8) -> Result<Message> {
    let mut header = [family(ip), prefix, IFA_F_NODAD, 0, 0, 0, 0, 0];
    header[4..8].copy_from_slice(&link::index(dev)?.to_ne_bytes());
    let mut message = Message::new(kind, flags, &header);
    let octets = octets(ip);
    message.attr(IFA_LOCAL, &octets).attr(IFA_ADDRESS, &octets);
    Ok(message)
}

fn read(payload: &[u8]) -> Option<Address> {
    let body = payload.get(IFADDRMSG..)?;
    // IPv6 has no "local" beside the address; on a point-to-point IPv4 link only "local" is ours.
    let ip = attr(body, IFA_LOCAL).or_else(|| attr(body, IFA_ADDRESS)).and_then(ip)?;
    Some(Address { index: u32_at(payload, 4)?, ip, prefix: payload[1] })
}

/// The address family number of an address.
pub(crate) fn family(ip: IpAddr) -> u8 {
    match ip {
        IpAddr::V4(_) => 2,
        IpAddr::V6(_) => 10,
    }
}

/// The bytes of an address in network order.
pub(crate) fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// An address from its bytes.
pub(crate) fn ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}
