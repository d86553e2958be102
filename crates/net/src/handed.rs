//! Listening sockets that another process opened and handed over.
//!
//! Purpose: a process that takes over from another one takes its listeners too. Both then share one queue of connections,
//! so that none is lost when the older stops accepting; a socket of one's own beside it (SO_REUSEPORT) would take the
//! connections that wait in its queue with it.
//!
//! Invariants: a socket is taken only if it listens, and in the network namespace it is said to be of: under a wrong one
//! the connections of one pod would be served in the name of another.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::sys::socket::{SockType, getsockopt, sockopt};
use socket2::SockRef;

use crate::netns::NetNs;

/// A socket that waits for connections or datagrams.
#[derive(Debug)]
pub struct Handed {
    pub fd: OwnedFd,
    pub udp: bool,
    /// Where it listens.
    pub at: SocketAddr,
}

impl Handed {
    /// Looks at a socket from another process.
    pub fn check(fd: OwnedFd, of: &NetNs) -> io::Result<Self> {
        let wrong = |what: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        if namespace(&fd)? != *of {
            return wrong("the socket is of another network namespace");
        }
        let udp = match getsockopt(&fd, sockopt::SockType)? {
            SockType::Datagram => true,
            SockType::Stream if getsockopt(&fd, sockopt::AcceptConn)? => false,
            _ => return wrong("the socket does not listen"),
        };
        let socket = SockRef::from(&fd);
        let Some(at) = socket.local_addr()?.as_socket() else {
            return wrong("the socket has no internet address");
        };
        // A property of the open file, which the other process shares; ours are all like this.
        socket.set_nonblocking(true)?;
        Ok(Self { fd, udp, at })
    }
}

/// The network namespace a socket was made in.
fn namespace(fd: &OwnedFd) -> io::Result<NetNs> {
    /// `SIOCGSKNS`.
    const GET_NETNS_OF_SOCKET: libc::Ioctl = 0x894c;
    #[expect(unsafe_code, reason = "no safe wrapper for this ioctl")]
    // SAFETY: the ioctl takes no argument; what is no socket refuses it.
    let ns = unsafe { libc::ioctl(fd.as_raw_fd(), GET_NETNS_OF_SOCKET) };
    if ns < 0 {
        return Err(io::Error::last_os_error());
    }
    #[expect(unsafe_code, reason = "a new descriptor arrives as a number")]
    // SAFETY: the kernel has just made this number for us.
    NetNs::from_fd(unsafe { OwnedFd::from_raw_fd(ns) })
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};

    use super::*;
    use crate::socket::{ListenOpts, listen};
    use crate::testing::in_user_ns;

    #[test]
    fn only_listeners_of_the_namespace_are_taken() {
        in_user_ns(|| {
            let (ours, other) = (NetNs::create().unwrap(), NetNs::create().unwrap());
            let at: SocketAddr = "0.0.0.0:15008".parse().unwrap();
            let open = |ns: &NetNs| listen(ns, at, ListenOpts::default()).unwrap();
            let taken = Handed::check(open(&ours).into(), &ours).unwrap();
            assert_eq!((taken.at, taken.udp), (at, false));
            let refused = |fd: OwnedFd, want: &str| {
                let error = Handed::check(fd, &ours).unwrap_err().to_string();
                assert!(error.contains(want), "{error}");
            };
            refused(open(&other).into(), "another network namespace");
            let file = std::fs::File::open("/dev/null").unwrap();
            assert!(Handed::check(file.into(), &ours).is_err());
            ours.run(|| {
                let unbound = socket2::Socket::new(
                    socket2::Domain::IPV4,
                    socket2::Type::STREAM,
                    Some(socket2::Protocol::TCP),
                );
                refused(unbound.unwrap().into(), "does not listen");
                let udp = UdpSocket::bind("0.0.0.0:0").unwrap();
                let at = udp.local_addr().unwrap();
                let taken = Handed::check(udp.into(), &ours).unwrap();
                assert_eq!((taken.at, taken.udp), (at, true));
            })
            .unwrap();
        });
    }

    #[test]
    fn a_connection_that_waits_survives_whoever_opened_the_listener() {
        in_user_ns(|| {
            let ns = NetNs::current().unwrap();
            crate::netlink::link::up("lo").unwrap();
            let first = TcpListener::bind("127.0.0.1:0").unwrap();
            let handed = Handed::check(first.try_clone().unwrap().into(), &ns).unwrap();
            let client = TcpStream::connect(handed.at).unwrap();
            drop(first);
            let second = TcpListener::from(handed.fd);
            let (accepted, from) = second.accept().unwrap();
            assert_eq!(from, client.local_addr().unwrap());
            drop(accepted);
        });
    }
}
