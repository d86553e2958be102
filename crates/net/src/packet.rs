//! Looks at the wire: frames of an interface, TCP flows put together, and whether a flow is TLS.
//!
//! Purpose: the demo and the tests prove with it what they claim about encryption: from outside, with the bytes that
//! really passed, not with what a proxy says about itself.
//!
//! Invariants: only reads; every length from the wire is checked; what is missing from a flow is told, never skipped.

mod flow;
mod parse;

use std::io::{self, Read};
use std::os::fd::AsFd;
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::netlink::link;
use crate::netns::NetNs;

pub use flow::{Flow, Flows, Gap, NotTls, TlsRecord, tls_records};
pub use parse::{Segment, tcp_segment};

/// Frames of a virtual interface reach 64 KiB, since segments are cut late.
const FRAME_BUFFER: usize = 128 * 1024;
/// Holds what arrives while the reader is busy. The kernel cuts it down to twice `net.core.rmem_max`.
const RECEIVE_BUFFER: usize = 8 * 1024 * 1024;

/// A tap on an interface: sees every frame in and out from when it was opened.
#[derive(Debug)]
pub struct Tap {
    socket: Socket,
    buffer: Vec<u8>,
}

impl Tap {
    /// Opens a tap on an interface of a namespace. Needs `CAP_NET_RAW` over it.
    pub fn open(ns: &NetNs, interface: &str) -> io::Result<Self> {
        let named = |e: io::Error| {
            let hint = match e.kind() {
                io::ErrorKind::PermissionDenied => " (CAP_NET_RAW over the namespace needed)",
                _ => "",
            };
            io::Error::new(e.kind(), format!("tap {interface}: {e}{hint}"))
        };
        let socket = ns.run(|| open(interface))?.map_err(named)?;
        Ok(Self { socket, buffer: vec![0; FRAME_BUFFER] })
    }

    /// The next frame with its Ethernet header, or nothing when the deadline came first.
    pub fn next(&mut self, deadline: Instant) -> io::Result<Option<&[u8]>> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let limit = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, limit) {
                Ok(0) if left.is_zero() || limit != PollTimeout::MAX => return Ok(None),
                Ok(0) | Err(nix::errno::Errno::EINTR) => continue,
                Ok(_) => {}
                Err(e) => return Err(e.into()),
            }
            match self.socket.read(&mut self.buffer) {
                Ok(length) => return Ok(Some(&self.buffer[..length])),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Collects TCP flows until the deadline, or until `enough` says so after a frame.
    pub fn flows(
        &mut self,
        deadline: Instant,
        mut enough: impl FnMut(&Flows) -> bool,
    ) -> io::Result<Flows> {
        let mut flows = Flows::default();
        while let Some(frame) = self.next(deadline)? {
            if let Some(segment) = tcp_segment(frame) {
                flows.add(&segment);
                if enough(&flows) {
                    break;
                }
            }
        }
        Ok(flows)
    }
}

fn open(interface: &str) -> io::Result<Socket> {
    let index = link::index(interface)?;
    // Without a protocol it receives nothing until bind names the interface.
    let socket = Socket::new(Domain::PACKET, Type::RAW.nonblocking().cloexec(), None)?;
    socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
    socket.bind(&every_frame_of(index)?)?;
    Ok(socket)
}

/// `struct sockaddr_ll` for all protocols of an interface.
fn every_frame_of(index: u32) -> io::Result<SockAddr> {
    const ALL: u16 = 0x0003;
    let index = i32::try_from(index).map_err(io::Error::other)?;
    let family = u16::try_from(libc::AF_PACKET).map_err(io::Error::other)?;
    let size =
        libc::socklen_t::try_from(size_of::<libc::sockaddr_ll>()).map_err(io::Error::other)?;
    #[expect(unsafe_code, reason = "socket2 has no safe way to make a link-layer address")]
    // SAFETY: the storage is zeroed and large enough for every kind of address, and the length covers what we fill in.
    let ((), address) = unsafe {
        SockAddr::try_init(|storage, length| {
            let address = &mut *storage.cast::<libc::sockaddr_ll>();
            address.sll_family = family;
            address.sll_protocol = ALL.to_be();
            address.sll_ifindex = index;
            *length = size;
            Ok(())
        })
    }?;
    Ok(address)
}

#[cfg(test)]
mod tests;
