//! Sockets of the data path, made inside a given namespace with marks and foreign addresses.
//!
//! Invariants:
//! - Every socket is non-blocking and closes on exec: ready for an event loop, invisible to children.
//! - The namespace switch covers the creation only; afterwards the socket works from any thread.
//! - Congestion control, buffers and timeouts stay the system's.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use socket2::{Domain, Protocol, SockAddr, Socket, TcpKeepalive, Type};

use crate::netns::NetNs;

/// Source ports of connections in a client's name (see [`SourcePorts::OutsideEphemeral`]): some below Linux' default
/// ephemeral range, 32768-60999, and what lies above it.
const OWN_PORTS: [std::ops::RangeInclusive<u16>; 2] = [24_576..=32_767, 61_000..=65_534];
/// How many ports to try before taking the range for full. Ports rotate, so even one busy port is rare; each try costs
/// two system calls.
const PORT_TRIES: u32 = 32;
/// Connections the kernel holds between handshake and accept. It caps this by `net.core.somaxconn` (4096 by default).
const DEFAULT_BACKLOG: i32 = 4096;

/// How a listener differs from a plain one.
#[derive(Clone, Copy, Debug)]
pub struct ListenOpts {
    /// Accept connections to foreign addresses that TPROXY hands over; the accepted socket's local address is then the
    /// original destination. Needs `CAP_NET_ADMIN`.
    pub transparent: bool,
    /// Firewall mark of the listener; accepted sockets inherit it.
    pub mark: Option<u32>,
    /// Let several listeners share the port; the kernel spreads connections.
    pub reuse_port: bool,
    /// See [`DEFAULT_BACKLOG`]'s comment.
    pub backlog: i32,
    /// For an IPv6 address: do not take IPv4 connections too.
    pub v6only: bool,
}

impl Default for ListenOpts {
    fn default() -> Self {
        Self {
            transparent: false,
            mark: None,
            reuse_port: false,
            backlog: DEFAULT_BACKLOG,
            v6only: false,
        }
    }
}

/// How an outgoing connection differs from a plain one.
#[derive(Clone, Copy, Debug, Default)]
pub struct ConnectOpts {
    /// Firewall mark.
    pub mark: Option<u32>,
    /// Connect in the name of this address, which need not be ours. Needs `CAP_NET_ADMIN`.
    pub transparent_source: Option<IpAddr>,
    /// Where the source port comes from. Only looked at with `transparent_source`.
    pub source_ports: SourcePorts,
    /// Send small writes at once.
    pub nodelay: bool,
    /// Probe an idle peer after this time, and then as often; the kernel gives up after its usual number of probes.
    pub keepalive: Option<Duration>,
}

/// Where the source port of a connection in a client's name comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SourcePorts {
    /// The kernel picks at connect time, by whole four-tuple.
    #[default]
    Ephemeral,
    /// Outside the default ephemeral range. Whoever connects to an app in a client's name shares the client's ports: the
    /// kernel, asked to pick, looks only at this end's sockets, while the app may have a connection of the client itself
    /// under the very port (from before capture, or after it), or the proxy one that was captured on its way in. Then a
    /// SYN would land in a connection that lives, and hang.
    OutsideEphemeral,
}

/// Opens a TCP listener at `addr` inside `ns`.
pub fn listen(ns: &NetNs, addr: SocketAddr, opts: ListenOpts) -> io::Result<TcpListener> {
    let socket = tcp_socket(ns, addr.is_ipv6())?;
    let opened = (|| {
        socket.set_reuse_address(true)?;
        if opts.reuse_port {
            socket.set_reuse_port(true)?;
        }
        if addr.is_ipv6() {
            socket.set_only_v6(opts.v6only)?;
        }
        if opts.transparent {
            set_transparent(&socket, addr.is_ipv6())?;
        }
        if let Some(mark) = opts.mark {
            socket.set_mark(mark)?;
        }
        socket.bind(&addr.into())?;
        socket.listen(opts.backlog)
    })();
    opened.map_err(|e| about(&e, &format!("listen on tcp {addr}")))?;
    Ok(socket.into())
}

/// Opens a UDP socket at `addr` inside `ns`.
pub fn bind_udp(ns: &NetNs, addr: SocketAddr, mark: Option<u32>) -> io::Result<UdpSocket> {
    let (domain, kind) = (Domain::for_address(addr), Type::DGRAM.nonblocking().cloexec());
    let socket = ns.run(|| Socket::new(domain, kind, Some(Protocol::UDP)))??;
    let opened = (|| {
        if addr.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        if let Some(mark) = mark {
            socket.set_mark(mark)?;
        }
        socket.bind(&addr.into())
    })();
    opened.map_err(|e| about(&e, &format!("bind udp {addr}")))?;
    Ok(socket.into())
}

/// Makes an unconnected TCP socket inside `ns`, bound to its source address if it has one.
///
/// For an event loop's connect. [`connect`] does more: it retries when a source port turns out to be taken.
pub fn connect_socket(ns: &NetNs, ipv6: bool, opts: &ConnectOpts) -> io::Result<Socket> {
    let socket = tcp_socket(ns, ipv6)?;
    if let Some(mark) = opts.mark {
        socket.set_mark(mark).map_err(|e| about(&e, "set the firewall mark"))?;
    }
    if opts.nodelay {
        socket.set_tcp_nodelay(true)?;
    }
    if let Some(idle) = opts.keepalive {
        socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(idle).with_interval(idle))?;
    }
    if let Some(source) = opts.transparent_source {
        bind_source(&socket, source, opts.source_ports)
            .map_err(|e| about(&e, &format!("connect in the name of {source}")))?;
    }
    Ok(socket)
}

/// Starts a connection from inside `ns` and returns at once; the stream becomes writable when it stands or failed
/// (`take_error` tells). With tokio: `TcpStream::from_std`, `writable().await`, `take_error()`.
pub fn connect(ns: &NetNs, to: SocketAddr, opts: &ConnectOpts) -> io::Result<TcpStream> {
    let target = SockAddr::from(to);
    let chosen = opts.transparent_source.is_some() && opts.source_ports != SourcePorts::Ephemeral;
    for _ in 0..if chosen { PORT_TRIES } else { 0 } {
        match start(connect_socket(ns, to.is_ipv6(), opts)?, &target) {
            Err(e) if e.kind() == io::ErrorKind::AddrNotAvailable => {}
            done => return done,
        }
    }
    // The range is full: the kernel's choice is rarely wrong, and no connection always is.
    let opts = ConnectOpts { source_ports: SourcePorts::Ephemeral, ..*opts };
    start(connect_socket(ns, to.is_ipv6(), &opts)?, &target)
}

/// Where an accepted connection was going before a rule rewrote its destination (REDIRECT). Connection tracking knows; an
/// error means that it does not know this connection.
pub fn original_destination(socket: &impl AsFd, ipv6: bool) -> io::Result<SocketAddr> {
    if ipv6 {
        let address = getsockopt(socket, sockopt::Ip6tOriginalDst)?;
        let ip = Ipv6Addr::from(address.sin6_addr.s6_addr);
        return Ok(SocketAddr::from((ip, u16::from_be(address.sin6_port))));
    }
    let address = getsockopt(socket, sockopt::OriginalDst)?;
    let ip = Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr));
    Ok(SocketAddr::from((ip, u16::from_be(address.sin_port))))
}

/// Raises the limit of open files to what the system allows, and returns it.
pub fn raise_open_files() -> io::Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(hard)
}

fn start(socket: Socket, target: &SockAddr) -> io::Result<TcpStream> {
    match socket.connect(target) {
        Err(e) if e.raw_os_error() != Some(libc::EINPROGRESS) => Err(e),
        _ => Ok(socket.into()),
    }
}

fn tcp_socket(ns: &NetNs, ipv6: bool) -> io::Result<Socket> {
    let domain = if ipv6 { Domain::IPV6 } else { Domain::IPV4 };
    ns.run(|| Socket::new(domain, Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP)))?
}

fn set_transparent(socket: &Socket, ipv6: bool) -> io::Result<()> {
    if ipv6 { socket.set_ip_transparent_v6(true) } else { socket.set_ip_transparent_v4(true) }
}

fn bind_source(socket: &Socket, source: IpAddr, ports: SourcePorts) -> io::Result<()> {
    set_transparent(socket, source.is_ipv6())?;
    if ports == SourcePorts::Ephemeral {
        // Without it, bind would reserve a port for all destinations, and 28,000 connections in one client's name
        // would be the end. Valid for IPv6 sockets too.
        setsockopt(socket, sockopt::IpBindAddressNoPort, &true)?;
        return socket.bind(&SocketAddr::new(source, 0).into());
    }
    // Lets connections to several destinations share a port; connect says if the four-tuple is taken.
    socket.set_reuse_address(true)?;
    let mut last = io::ErrorKind::AddrInUse.into();
    for _ in 0..PORT_TRIES {
        match socket.bind(&SocketAddr::new(source, next_own_port()).into()) {
            Ok(()) => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => last = e,
            Err(e) => return Err(e),
        }
    }
    Err(last)
}

/// Ports in rotation: the longest possible time before one comes again.
fn next_own_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let [low, high] = OWN_PORTS;
    let (lows, highs) = (low.end() - low.start() + 1, high.end() - high.start() + 1);
    // Wraps somewhere within the ranges, which only shortens one round.
    let number = NEXT.fetch_add(1, Ordering::Relaxed) % (lows + highs);
    if number < lows { low.start() + number } else { high.start() + (number - lows) }
}

pub(crate) fn about(e: &io::Error, what: &str) -> io::Error {
    let hint = match e.raw_os_error() {
        Some(libc::EPERM) => " (CAP_NET_ADMIN over the network namespace needed)",
        _ => "",
    };
    io::Error::new(e.kind(), format!("{what}: {e}{hint}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::link::{self, VethEnd};
    use crate::netlink::route::{self, Route};
    use crate::testing::in_user_ns;

    #[test]
    fn sockets_belong_to_the_namespace_they_were_made_in() {
        in_user_ns(|| {
            let (a, b) = (NetNs::create().unwrap(), NetNs::create().unwrap());
            let addr = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 15008));
            let opts = ListenOpts { transparent: true, mark: Some(7), ..ListenOpts::default() };
            let first = listen(&a, addr, opts).unwrap();
            let _same_port_elsewhere = listen(&b, addr, opts).unwrap();
            let taken = listen(&a, addr, opts).unwrap_err().to_string();
            assert!(taken.contains("listen on tcp 0.0.0.0:15008"), "{taken}");
            assert_eq!(socket2::SockRef::from(&first).mark().unwrap(), 7);
            let any6 = "[::]:15008".parse().unwrap();
            let six = ListenOpts { v6only: true, ..opts };
            let _beside_v4 = listen(&a, any6, six).unwrap();
            bind_udp(&a, addr, Some(7)).unwrap();
        });
    }

    #[test]
    fn a_connection_can_carry_a_foreign_source() {
        in_user_ns(|| {
            let ns = NetNs::create().unwrap();
            for source in ["192.0.2.9", "2001:db8::9"] {
                let source: IpAddr = source.parse().unwrap();
                for source_ports in [SourcePorts::Ephemeral, SourcePorts::OutsideEphemeral] {
                    let opts = ConnectOpts {
                        mark: Some(0x200),
                        transparent_source: Some(source),
                        source_ports,
                        nodelay: true,
                        keepalive: Some(Duration::from_secs(60)),
                    };
                    let socket = connect_socket(&ns, source.is_ipv6(), &opts).unwrap();
                    let local = socket.local_addr().unwrap().as_socket().unwrap();
                    assert_eq!(local.ip(), source);
                    let high = source_ports == SourcePorts::OutsideEphemeral;
                    assert_eq!(is_own(local.port()), high, "{local}");
                }
            }
        });
    }

    fn is_own(port: u16) -> bool {
        OWN_PORTS.iter().any(|range| range.contains(&port))
    }

    #[test]
    fn a_full_range_of_ports_is_no_end() {
        in_user_ns(|| {
            raise_open_files().unwrap();
            let ns = NetNs::current().unwrap();
            // A way out into nothing: connections stay half open.
            link::add_veth(&VethEnd::here("a"), &VethEnd::here("b")).unwrap();
            link::up("a").unwrap();
            link::up("b").unwrap();
            route::add(&Route::default_of(false).dev("a")).unwrap();
            let opts = ConnectOpts {
                transparent_source: Some("192.0.2.9".parse().unwrap()),
                source_ports: SourcePorts::OutsideEphemeral,
                ..ConnectOpts::default()
            };
            let to = "192.0.2.1:80".parse().unwrap();
            let range = OWN_PORTS.iter().map(|r| r.len()).sum::<usize>();
            let all: Vec<_> = (0..range + 10).map(|_| connect(&ns, to, &opts).unwrap()).collect();
            let high = |s: &&TcpStream| is_own(s.local_addr().unwrap().port());
            assert_eq!(all.iter().filter(high).count(), range);
        });
    }

    #[test]
    fn open_files_can_be_raised() {
        let limit = raise_open_files().unwrap();
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap().0, limit);
    }
}
