//! The TCP connections of a network namespace, as the kernel lists them.
//!
//! Purpose: what is open when capture is switched on or off. Works in the namespace of the calling thread: use inside
//! [`NetNs::run`](crate::NetNs::run).

use std::collections::HashSet;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// One socket's connection: its own address, and the other end's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Flow {
    /// The address of this socket.
    pub own: SocketAddr,
    /// The address it is connected to.
    pub other: SocketAddr,
}

/// Every TCP socket that has another end: also those that are still connecting, or already closing. Not those that only
/// wait for stray packets (TIME_WAIT).
pub fn tcp() -> io::Result<Vec<Flow>> {
    let mut flows = Vec::new();
    for path in ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"] {
        match fs::read_to_string(path) {
            Ok(text) => flows.extend(text.lines().skip(1).filter_map(parse)),
            // A kernel without IPv6 has no such list.
            Err(e) if e.kind() == io::ErrorKind::NotFound && path.ends_with('6') => {}
            Err(e) => return Err(io::Error::new(e.kind(), format!("{path}: {e}"))),
        }
    }
    Ok(flows)
}

/// The flows in two heaps. `Mirrored`: the other end is a socket of this namespace too, under the same two addresses.
/// That is how a transparent proxy shows: it answers in the name of somebody else.
pub fn split(flows: Vec<Flow>) -> (Vec<Flow>, Vec<Flow>) {
    let all: HashSet<Flow> = flows.iter().copied().collect();
    let of_the_pod =
        |flow: &Flow| !flow.other.ip().is_loopback() && flow.own.ip() != flow.other.ip();
    flows
        .into_iter()
        .filter(of_the_pod)
        .partition(|flow| all.contains(&Flow { own: flow.other, other: flow.own }))
}

/// `  1: 0100007F:1F90 0200000A:C350 01 ...`: number, own, other, state.
fn parse(line: &str) -> Option<Flow> {
    const LISTENS: &str = "0A";
    const TIME_WAIT: &str = "06";
    let mut words = line.split_whitespace().skip(1);
    let (own, other, state) = (words.next()?, words.next()?, words.next()?);
    if [LISTENS, TIME_WAIT].contains(&state) {
        return None;
    }
    Some(Flow { own: address(own)?, other: address(other)? })
}

/// The kernel prints the address as words of 32 bits in the machine's order, the port as a number.
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word =
        |i: usize| Some(u32::from_str_radix(ip.get(i * 8..i * 8 + 8)?, 16).ok()?.to_ne_bytes());
    let ip = match ip.len() {
        8 => IpAddr::V4(Ipv4Addr::from(word(0)?)),
        32 => {
            let mut bytes = [0; 16];
            for (i, part) in bytes.chunks_exact_mut(4).enumerate() {
                part.copy_from_slice(&word(i)?);
            }
            // A socket of both families shows IPv4 as mapped; on the wire it is IPv4.
            IpAddr::V6(Ipv6Addr::from(bytes)).to_canonical()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(own: &str, other: &str) -> Flow {
        Flow { own: own.parse().unwrap(), other: other.parse().unwrap() }
    }

    #[test]
    fn lines_of_the_kernel() {
        let check = |line: &str, want: Option<Flow>| assert_eq!(parse(line), want, "{line}");
        let v4 =
            "   0: 0200000A:1F90 0100000A:C350 01 00000000:00000000 00:00000000 00000000 0 0 1";
        check(v4, Some(flow("10.0.0.2:8080", "10.0.0.1:50000")));
        let mapped = "   1: 0000000000000000FFFF00000200000A:0050 0000000000000000FFFF00000100000A:C351 08 0";
        check(mapped, Some(flow("10.0.0.2:80", "10.0.0.1:50001")));
        let v6 = "   2: 000000FD000000000000000002000000:0050 000000FD000000000000000001000000:C351 03 0";
        check(v6, Some(flow("[fd00::2]:80", "[fd00::1]:50001")));
        check("   3: 00000000:1F90 00000000:0000 0A 00000000:00000000", None);
        check("   3: 0200000A:1F90 0100000A:C350 06 00000000:00000000", None);
        check("   4: nonsense", None);
        check("", None);
    }

    #[test]
    fn mirrors() {
        let app = flow("10.0.0.2:50000", "10.9.0.9:80");
        let proxy = flow("10.9.0.9:80", "10.0.0.2:50000");
        let direct = flow("10.0.0.2:50001", "10.9.0.9:80");
        let itself = flow("10.0.0.2:50002", "10.0.0.2:80");
        let back = flow("10.0.0.2:80", "10.0.0.2:50002");
        let (mirrored, plain) = split(vec![app, proxy, direct, itself, back]);
        assert_eq!((mirrored, plain), (vec![app, proxy], vec![direct]));
    }
}
