//! A small netlink: requests with attributes, answers checked, the kernel's own words in the errors.
//!
//! Purpose: what `ip` and `nft` do, without the programs. [`link`], [`addr`], [`route`] and [`rule`] work in the
//! network namespace of the calling thread: use them inside [`NetNs::run`](crate::NetNs::run).
//!
//! Invariants: every change is acknowledged before a function returns; a message from anyone but the kernel is ignored.

pub mod addr;
pub mod link;
mod message;
pub mod route;
pub mod rule;

use std::io::{self, Read};
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::socket::{NetlinkAddr, connect};
use socket2::{Domain, Protocol, Socket, Type};

pub(crate) use message::{Message, Received, attr, attrs, messages, text, u32_at};

pub(crate) const NLM_F_REQUEST: u16 = 0x1;
pub(crate) const NLM_F_ACK: u16 = 0x4;
pub(crate) const NLM_F_DUMP: u16 = 0x300;
pub(crate) const NLM_F_REPLACE: u16 = 0x100;
pub(crate) const NLM_F_EXCL: u16 = 0x200;
pub(crate) const NLM_F_CREATE: u16 = 0x400;
pub(crate) const NLM_F_APPEND: u16 = 0x800;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_ACK_TLVS: u16 = 0x200;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSGERR_ATTR_MSG: u16 = 1;

/// The kernel fills dump datagrams up to 32 KiB.
const RECEIVE_BUFFER: usize = 64 * 1024;
/// A batch goes out as one datagram, and the socket's send buffer bounds it. The kernel cuts this down to twice
/// `net.core.wmem_max` (416 KiB by default), which holds some thousand rules.
const SEND_BUFFER: usize = 4 * 1024 * 1024;
/// A dump that changed under our eyes is read again this often. More means somebody rewrites the tables in a loop.
const DUMP_TRIES: u32 = 8;

/// The kernel said no.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {}{}", errno.desc(), detail.as_ref().map(|d| format!(" ({d})")).unwrap_or_default())]
pub struct Error {
    /// What was tried, with names.
    pub what: String,
    /// The kernel's error number.
    pub errno: Errno,
    /// The kernel's own words, or which part of a batch it was about.
    pub detail: Option<String>,
}

/// Shorthand of this module.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn new(what: &str, errno: Errno) -> Self {
        Self { what: what.to_owned(), errno, detail: None }
    }

    fn io(what: &str, e: &io::Error) -> Self {
        Self::new(what, e.raw_os_error().map_or(Errno::EIO, Errno::from_raw))
    }
}

impl From<Error> for io::Error {
    fn from(e: Error) -> Self {
        Self::new(Self::from(e.errno).kind(), e)
    }
}

/// An open netlink socket in the namespace of the thread that opened it.
#[derive(Debug)]
pub(crate) struct Netlink {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    /// Opens a socket of a netlink family: `NETLINK_ROUTE` or `NETLINK_NETFILTER`.
    pub(crate) fn open(family: i32) -> Result<Self> {
        let open = || -> io::Result<Socket> {
            let (domain, protocol) = (Domain::from(libc::AF_NETLINK), Protocol::from(family));
            let socket = Socket::new(domain, Type::RAW.cloexec(), Some(protocol))?;
            socket.set_send_buffer_size(SEND_BUFFER)?;
            for option in [libc::NETLINK_EXT_ACK, libc::NETLINK_CAP_ACK] {
                switch_on(&socket, option)?;
            }
            // A connected netlink socket takes messages from its peer only, and 0 is the kernel.
            connect(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
            Ok(socket)
        };
        let socket = open().map_err(|e| Error::io("open a netlink socket", &e))?;
        Ok(Self { socket, sequence: 0, buffer: vec![0; RECEIVE_BUFFER] })
    }

    /// Sends one request and waits for its acknowledgement.
    pub(crate) fn request(&mut self, what: &str, mut message: Message) -> Result<()> {
        message.add_flags(NLM_F_REQUEST | NLM_F_ACK);
        let sequence = self.send(what, message)?;
        loop {
            let length = self.receive(what)?;
            for answer in messages(&self.buffer[..length]).filter(|m| m.sequence == sequence) {
                if answer.kind == NLMSG_ERROR {
                    return verdict(what, &answer);
                }
            }
        }
    }

    /// Asks for a table and calls `each` for every entry. Starts over when the table changed meanwhile, so `each` gets
    /// a list that it collects and returns.
    pub(crate) fn dump<T>(
        &mut self,
        what: &str,
        message: &Message,
        mut each: impl FnMut(&Received<'_>) -> Option<T>,
    ) -> Result<Vec<T>> {
        for _ in 0..DUMP_TRIES {
            let mut message = message.clone();
            message.add_flags(NLM_F_REQUEST | NLM_F_DUMP);
            let sequence = self.send(what, message)?;
            if let Some(all) = self.collect(what, sequence, &mut each)? {
                return Ok(all);
            }
        }
        Err(Error::new(what, Errno::EINTR))
    }

    /// Sends messages as one datagram, numbered one by one, and reports the first error by the index of its message.
    /// The last message but one (the last before the batch's end) must ask for an acknowledgement.
    pub(crate) fn batch(
        &mut self,
        what: &str,
        batch: Vec<Message>,
    ) -> std::result::Result<(), (Option<usize>, Error)> {
        let first = self.sequence.wrapping_add(1);
        let mut bytes = Vec::with_capacity(batch.iter().map(Message::len).sum());
        for message in batch {
            self.sequence = self.sequence.wrapping_add(1);
            let Some(message) = message.finish(self.sequence) else {
                return Err((None, Error::new(what, Errno::EMSGSIZE)));
            };
            bytes.extend(message);
        }
        self.socket.send(&bytes).map_err(|e| (None, Error::io(what, &e)))?;
        // The kernel works inside `send`: every answer is there by now, errors first.
        let mut acknowledged = false;
        while !acknowledged {
            let length = self.receive(what).map_err(|e| (None, e))?;
            for answer in messages(&self.buffer[..length]).filter(|m| m.kind == NLMSG_ERROR) {
                let index = usize::try_from(answer.sequence.wrapping_sub(first)).ok();
                verdict(what, &answer).map_err(|e| (index, e))?;
                acknowledged = true;
            }
        }
        Ok(())
    }

    /// Reads the answers to a dump; nothing if it was interrupted.
    fn collect<T>(
        &mut self,
        what: &str,
        sequence: u32,
        each: &mut impl FnMut(&Received<'_>) -> Option<T>,
    ) -> Result<Option<Vec<T>>> {
        let (mut all, mut torn) = (Vec::new(), false);
        loop {
            let length = self.receive(what)?;
            for answer in messages(&self.buffer[..length]).filter(|m| m.sequence == sequence) {
                torn |= answer.flags & NLM_F_DUMP_INTR != 0;
                match answer.kind {
                    NLMSG_DONE => return Ok((!torn).then_some(all)),
                    NLMSG_ERROR => verdict(what, &answer)?,
                    _ => all.extend(each(&answer)),
                }
            }
        }
    }

    fn send(&mut self, what: &str, message: Message) -> Result<u32> {
        self.sequence = self.sequence.wrapping_add(1);
        let bytes =
            message.finish(self.sequence).ok_or_else(|| Error::new(what, Errno::EMSGSIZE))?;
        self.socket.send(&bytes).map_err(|e| Error::io(what, &e))?;
        Ok(self.sequence)
    }

    fn receive(&mut self, what: &str) -> Result<usize> {
        loop {
            match self.socket.read(&mut self.buffer) {
                Ok(length) => return Ok(length),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::io(what, &e)),
            }
        }
    }
}

/// Runs one rtnetlink request on a socket of its own.
fn route_request(what: &str, message: Message) -> Result<()> {
    Netlink::open(libc::NETLINK_ROUTE)?.request(what, message)
}

/// Reads an acknowledgement: an error number, the head of the request, then perhaps the kernel's words.
fn verdict(what: &str, answer: &Received<'_>) -> Result<()> {
    let code = u32_at(answer.payload, 0).map_or(libc::EIO, |raw| raw.cast_signed().wrapping_neg());
    if code == 0 {
        return Ok(());
    }
    let mut detail = None;
    if answer.flags & NLM_F_ACK_TLVS != 0 {
        let request = u32_at(answer.payload, 4).and_then(|l| usize::try_from(l).ok()).unwrap_or(0);
        let echoed = if answer.flags & NLM_F_CAPPED != 0 { message::HEADER } else { request };
        let words = answer.payload.get(4 + echoed.next_multiple_of(4)..).unwrap_or(&[]);
        detail = attr(words, NLMSGERR_ATTR_MSG).map(text);
    }
    Err(Error { what: what.to_owned(), errno: Errno::from_raw(code), detail })
}

/// Sets a boolean option of the netlink socket layer.
fn switch_on(socket: &Socket, option: i32) -> io::Result<()> {
    let on: libc::c_int = 1;
    let length = libc::socklen_t::try_from(size_of_val(&on)).unwrap_or(4);
    #[expect(unsafe_code, reason = "no safe wrapper for netlink's socket options")]
    // SAFETY: the kernel reads `length` bytes from `on`, which lives through the call.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_NETLINK,
            option,
            (&raw const on).cast(),
            length,
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests;
