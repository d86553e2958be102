//! UDP on behalf of others: datagrams that TPROXY hands over, and answers in the name of whoever was asked.
//!
//! Purpose: [`captured`] opens a socket and [`receive`] reads it with sender and original destination; [`Replies`] sends
//! from an address that is not ours; [`connect`] asks the original destination from the pod.
//!
//! Answers are made by hand and leave by a raw socket: a socket bound to the resolver's address and port 53 would clash
//! with every DNS server that the pod itself may run on that port, and be one more socket for each resolver.
//!
//! Invariants: everything is non-blocking and closes on exec; a datagram whose original destination the kernel did not
//! say is dropped.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket};
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt, sockopt,
};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::netns::NetNs;
use crate::socket::about;

const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
const UDP_HEADER: usize = 8;
const UDP: u8 = 17;
/// Nobody routes these packets: they go to the pod itself.
const HOP_LIMIT: u8 = 64;
/// Questions that wait while the proxy is busy. The kernel's default (208 KiB) holds some 250 of them, less than a burst
/// of one busy pod; more than this is no burst.
const RECEIVE_BUFFER: usize = 1024 * 1024;

/// One datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagram {
    pub length: usize,
    pub from: SocketAddr,
    /// Where it was sent to.
    pub to: SocketAddr,
}

/// Opens a transparent socket at `at` inside `ns`. Several may share the address; the kernel spreads the askers.
pub fn captured(ns: &NetNs, at: SocketAddr, mark: u32) -> io::Result<UdpSocket> {
    let (domain, kind) = (Domain::for_address(at), Type::DGRAM.nonblocking().cloexec());
    let socket = ns.run(|| Socket::new(domain, kind, Some(Protocol::UDP)))??;
    let opened = (|| {
        socket.set_reuse_port(true)?;
        socket.set_mark(mark)?;
        // It gets what the system allows.
        socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
        if at.is_ipv6() {
            socket.set_only_v6(true)?;
            socket.set_ip_transparent_v6(true)?;
            setsockopt(&socket, sockopt::Ipv6OrigDstAddr, &true)?;
        } else {
            socket.set_ip_transparent_v4(true)?;
            setsockopt(&socket, sockopt::Ipv4OrigDstAddr, &true)?;
        }
        socket.bind(&at.into())
    })();
    opened.map_err(|e| about(&e, &format!("receive udp for {at}")))?;
    Ok(socket.into())
}

/// The next datagram of a socket made by [`captured`], or `WouldBlock`. `InvalidData`: one that had to be dropped; there
/// may be more.
pub fn receive(socket: &impl AsRawFd, buffer: &mut [u8]) -> io::Result<Datagram> {
    // Room for the larger of the two addresses.
    let mut control = nix::cmsg_space!([u8; 64]);
    let mut parts = [IoSliceMut::new(buffer)];
    let message = recvmsg::<SockaddrStorage>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut control),
        MsgFlags::MSG_DONTWAIT,
    )?;
    let to = message.cmsgs().ok().and_then(|mut all| all.find_map(original));
    let from = message.address.as_ref().and_then(address);
    match (from, to) {
        (Some(from), Some(to)) if !message.flags.contains(MsgFlags::MSG_TRUNC) => {
            Ok(Datagram { length: message.bytes, from, to })
        }
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Sends datagrams inside one namespace in anybody's name. Needs `CAP_NET_RAW` over it.
#[derive(Debug)]
pub struct Replies(Socket);

impl Replies {
    /// Opens the socket for one family inside `ns`.
    pub fn open(ns: &NetNs, ipv6: bool, mark: u32) -> io::Result<Self> {
        let domain = if ipv6 { Domain::IPV6 } else { Domain::IPV4 };
        // This protocol only sends, and packets come with their header.
        let only_out = Some(Protocol::from(libc::IPPROTO_RAW));
        let kind = Type::RAW.nonblocking().cloexec();
        let made = ns.run(|| Socket::new(domain, kind, only_out))?;
        let opened = made.and_then(|socket| socket.set_mark(mark).map(|()| socket));
        let named = |e| about(&e, "answer in a resolver's name (CAP_NET_RAW)");
        Ok(Self(opened.map_err(named)?))
    }

    /// Sends one datagram. A full queue loses it, as networks do.
    pub fn send(&self, from: SocketAddr, to: SocketAddr, payload: &[u8]) -> io::Result<()> {
        let packet = packet(from, to, payload)
            .ok_or_else(|| io::Error::from_raw_os_error(Errno::EMSGSIZE as i32))?;
        // A raw socket's address has no port; for IPv6 one must not be there.
        let target = SockAddr::from(SocketAddr::new(to.ip(), 0));
        match self.0.send_to(&packet, &target) {
            Err(e) if e.kind() != io::ErrorKind::WouldBlock => Err(e),
            _ => Ok(()),
        }
    }
}

/// A UDP socket of the pod's own, connected: the kernel takes answers from `to` alone, and says when nobody listens there.
/// Its port is the kernel's random choice.
pub fn connect(ns: &NetNs, to: SocketAddr, mark: u32) -> io::Result<UdpSocket> {
    let (domain, kind) = (Domain::for_address(to), Type::DGRAM.nonblocking().cloexec());
    let socket = ns.run(|| Socket::new(domain, kind, Some(Protocol::UDP)))??;
    socket.set_mark(mark)?;
    socket.connect(&to.into())?;
    Ok(socket.into())
}

/// An IP packet with a UDP datagram in it. `None`: too long, or addresses of two families.
fn packet(from: SocketAddr, to: SocketAddr, payload: &[u8]) -> Option<Vec<u8>> {
    let length = u16::try_from(UDP_HEADER + payload.len()).ok()?;
    let mut packet = Vec::with_capacity(IPV6_HEADER + usize::from(length));
    // What the checksum covers beside the datagram itself.
    let mut sum = u32::from(length) + u32::from(UDP);
    match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let whole = u16::try_from(IPV4_HEADER).ok()?.checked_add(length)?;
            packet.extend([0x45, 0]);
            packet.extend(whole.to_be_bytes());
            // Identification and checksum are the kernel's to fill in; never to be cut in fragments.
            packet.extend([0, 0, 0x40, 0, HOP_LIMIT, UDP, 0, 0]);
            packet.extend(from.octets());
            packet.extend(to.octets());
            sum += words(&from.octets()) + words(&to.octets());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            packet.extend([0x60, 0, 0, 0]);
            packet.extend(length.to_be_bytes());
            packet.extend([UDP, HOP_LIMIT]);
            packet.extend(from.octets());
            packet.extend(to.octets());
            sum += words(&from.octets()) + words(&to.octets());
        }
        _ => return None,
    }
    let datagram = packet.len();
    packet.extend(from.port().to_be_bytes());
    packet.extend(to.port().to_be_bytes());
    packet.extend(length.to_be_bytes());
    packet.extend([0, 0]);
    packet.extend(payload);
    sum += words(packet.get(datagram..)?);
    let check = match !folded(sum) {
        // Zero would say that there is none.
        0 => u16::MAX,
        check => check,
    };
    packet.get_mut(datagram + 6..datagram + 8)?.copy_from_slice(&check.to_be_bytes());
    Some(packet)
}

/// The sum of the 16-bit words. 64 KiB of them fit 32 bits.
fn words(bytes: &[u8]) -> u32 {
    let (pairs, rest) = bytes.as_chunks::<2>();
    let sum: u32 = pairs.iter().map(|pair| u32::from(u16::from_be_bytes(*pair))).sum();
    sum + rest.first().map_or(0, |last| u32::from(*last) << 8)
}

fn folded(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap_or(u16::MAX)
}

fn original(message: ControlMessageOwned) -> Option<SocketAddr> {
    match message {
        ControlMessageOwned::Ipv4OrigDstAddr(a) => {
            let ip = Ipv4Addr::from(u32::from_be(a.sin_addr.s_addr));
            Some(SocketAddrV4::new(ip, u16::from_be(a.sin_port)).into())
        }
        ControlMessageOwned::Ipv6OrigDstAddr(a) => {
            let ip = Ipv6Addr::from(a.sin6_addr.s6_addr);
            Some(SocketAddrV6::new(ip, u16::from_be(a.sin6_port), 0, a.sin6_scope_id).into())
        }
        _ => None,
    }
}

fn address(storage: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = storage.as_sockaddr_in().map(|a| SocketAddr::V4((*a).into()));
    v4.or_else(|| storage.as_sockaddr_in6().map(|a| SocketAddr::V6((*a).into())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::link;
    use crate::testing::in_user_ns;

    #[test]
    fn answers_come_in_anybodys_name() {
        in_user_ns(|| {
            link::up("lo").unwrap();
            let ns = NetNs::current().unwrap();
            for (app, resolver) in [("127.0.0.1:0", "10.96.0.10:53"), ("[::1]:0", "[fd00::a]:53")] {
                let app = UdpSocket::bind(app).unwrap();
                let resolver: SocketAddr = resolver.parse().unwrap();
                app.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
                let replies = Replies::open(&ns, resolver.is_ipv6(), 0x539).unwrap();
                for length in [0, 1, 2, 511, 512, 9001, 65_000] {
                    let payload: Vec<u8> = (0..length).map(|i: u32| i.to_le_bytes()[0]).collect();
                    replies.send(resolver, app.local_addr().unwrap(), &payload).unwrap();
                    let mut got = vec![0; 70_000];
                    let (n, from) = app.recv_from(&mut got).unwrap();
                    assert_eq!((&got[..n], from), (&payload[..], resolver));
                }
                let long = vec![0; 65_535];
                replies.send(resolver, app.local_addr().unwrap(), &long).unwrap_err();
            }
        });
    }

    #[test]
    fn the_checksum_is_right() {
        let at = |text: &str| text.parse().unwrap();
        // A datagram whose checksum was worked out on paper: 0x0a00 0001 0a00 0002, 17, 12, 53 and 1000, 12, "ab" "cd".
        let packet = packet(at("10.0.0.1:53"), at("10.0.0.2:1000"), b"abcd").unwrap();
        let sum = words(&packet[IPV4_HEADER..]) + words(&packet[12..20]) + 17 + 12;
        assert_eq!(folded(sum), 0xffff, "a receiver's sum over everything is all ones");
        assert!(super::packet(at("10.0.0.1:53"), at("[::1]:1"), b"").is_none());
    }
}
