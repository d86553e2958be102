//! From an Ethernet frame to a TCP segment, with every bound checked.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

const ETHERNET_HEADER: usize = 14;
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const TCP: u8 = 6;
/// IPv6 extension headers that can stand before TCP and are read the same way: hop-by-hop, routing, destination.
const EXTENSIONS: [u8; 3] = [0, 43, 60];
/// More than these nobody sends.
const MAX_EXTENSIONS: usize = 8;

/// A TCP segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment<'a> {
    /// Sender.
    pub from: SocketAddr,
    /// Receiver.
    pub to: SocketAddr,
    /// Sequence number of the first byte, or of SYN.
    pub sequence: u32,
    /// Opens the flow.
    pub syn: bool,
    /// Ends the flow.
    pub fin: bool,
    /// Breaks the connection off.
    pub rst: bool,
    /// The data.
    pub payload: &'a [u8],
}

/// The TCP segment in an Ethernet frame; nothing for anything else, fragments included.
pub fn tcp_segment(frame: &[u8]) -> Option<Segment<'_>> {
    let packet = frame.get(ETHERNET_HEADER..)?;
    match u16_at(frame, 12)? {
        ETHERTYPE_IPV4 => ipv4(packet),
        ETHERTYPE_IPV6 => ipv6(packet),
        _ => None,
    }
}

fn ipv4(packet: &[u8]) -> Option<Segment<'_>> {
    let header = usize::from(packet.first()? & 0x0f) * 4;
    // The frame may be padded: the header says where the packet ends.
    let total = usize::from(u16_at(packet, 2)?);
    let fragment = u16_at(packet, 6)? & 0x3fff;
    if header < 20 || *packet.get(9)? != TCP || fragment != 0 {
        return None;
    }
    let address = |at| Some(IpAddr::from(Ipv4Addr::from(array::<4>(packet, at)?)));
    tcp(packet.get(header..total)?, address(12)?, address(16)?)
}

fn ipv6(packet: &[u8]) -> Option<Segment<'_>> {
    let length = usize::from(u16_at(packet, 4)?);
    let mut next = *packet.get(6)?;
    let mut body = packet.get(40..40 + length)?;
    for _ in 0..MAX_EXTENSIONS {
        if !EXTENSIONS.contains(&next) {
            break;
        }
        let skip = (usize::from(*body.get(1)?) + 1) * 8;
        next = *body.first()?;
        body = body.get(skip..)?;
    }
    let address = |at| Some(IpAddr::from(Ipv6Addr::from(array::<16>(packet, at)?)));
    if next == TCP { tcp(body, address(8)?, address(24)?) } else { None }
}

fn tcp(segment: &[u8], from: IpAddr, to: IpAddr) -> Option<Segment<'_>> {
    let header = usize::from(segment.get(12)? >> 4) * 4;
    if header < 20 {
        return None;
    }
    let flags = *segment.get(13)?;
    Some(Segment {
        from: SocketAddr::new(from, u16_at(segment, 0)?),
        to: SocketAddr::new(to, u16_at(segment, 2)?),
        sequence: u32::from_be_bytes(array(segment, 4)?),
        syn: flags & 0x02 != 0,
        fin: flags & 0x01 != 0,
        rst: flags & 0x04 != 0,
        payload: segment.get(header..)?,
    })
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(array(bytes, at)?))
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}
