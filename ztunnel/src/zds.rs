//! The node agent's line: which pods this proxy serves, with their network namespaces.
//!
//! Istio's ZDS: a SOCK_SEQPACKET socket, one protobuf message per packet, the namespace's file
//! descriptor beside it. We connect, say hello, and answer every message. The agent sends all pods,
//! then `SnapshotSent`; what it did not name by then is gone. When the line breaks the pods stay and
//! we connect again: a restarting agent must not cut a pod off.

use std::collections::HashSet;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, connect, recvmsg,
    send, socket,
};
use prost::Message as _;
use xds::zds::workload_request::Payload;
use xds::zds::workload_response;
use xds::zds::{Ack, Version, WorkloadInfo, WorkloadRequest, WorkloadResponse, ZdsHello};

/// A packet carries one message; the largest has three names of at most 253 bytes.
const MAX_PACKET: usize = 4096;
/// Pods that an agent may name: ten times what a node is built for. A broken agent must not fill the memory.
const MAX_NAMED: usize = 10_000;
/// Pauses before the next attempts to reach the agent. Pods that start wait for us, so the longest is short.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// What the agent wants. `F` is the pod's network namespace.
#[derive(Debug)]
pub enum PodEvent<F = OwnedFd> {
    Add {
        uid: String,
        info: WorkloadInfo,
        netns: F,
    },
    Remove {
        uid: String,
    },
    /// Keep only these; everything has been named.
    Only {
        uids: HashSet<String>,
    },
}

/// Runs until the process ends, on a thread of its own. `handle` acts on an event and returns the
/// error to tell the agent.
pub fn run(path: &Path, mut handle: impl FnMut(PodEvent) -> Result<(), String>) {
    let (mut pause, mut complaint) = (FIRST_PAUSE, String::new());
    loop {
        match serve(path, &mut handle) {
            Ok(()) => {
                tracing::info!("the node agent closed the line, connecting again");
                (pause, complaint) = (FIRST_PAUSE, String::new());
            }
            // The same again and again says nothing new.
            Err(e) if complaint == e.to_string() => tracing::debug!(error = %e, "node agent"),
            Err(e) => {
                tracing::warn!(socket = %path.display(), error = %e, "no line to the node agent, trying on");
                complaint = e.to_string();
            }
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// One line to the agent, from hello to its end. An error when the agent never said a word.
fn serve(path: &Path, handle: &mut impl FnMut(PodEvent) -> Result<(), String>) -> io::Result<()> {
    let line = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    connect(line.as_raw_fd(), &UnixAddr::new(path)?)?;
    let hello = ZdsHello { version: Version::V1.into() };
    send(line.as_raw_fd(), &hello.encode_to_vec(), MsgFlags::MSG_NOSIGNAL)?;
    let first = match receive(&line) {
        Ok(Some(first)) => first,
        // One that closes with our hello unread resets the line.
        Ok(None) => return Err(refused()),
        Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Err(refused()),
        Err(e) => return Err(e),
    };
    tracing::info!(socket = %path.display(), "connected to the node agent");
    match converse(&line, first, handle) {
        Err(e) if e.kind() == io::ErrorKind::InvalidData => Err(e),
        Err(e) => {
            tracing::warn!(error = %e, "the line to the node agent broke");
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}

/// An agent that takes us names pods, or says that there are none.
fn refused() -> io::Error {
    let words = "the agent closed the line after our hello, which says that this proxy speaks ZDS version V1: it speaks \
                 another version, or serves another proxy";
    io::Error::new(io::ErrorKind::Unsupported, words)
}

type Packet = (Vec<u8>, Option<OwnedFd>);

fn converse(
    line: &OwnedFd,
    first: Packet,
    handle: &mut impl FnMut(PodEvent) -> Result<(), String>,
) -> io::Result<()> {
    let mut snapshot = Snapshot::default();
    let mut next = Some(first);
    while let Some((packet, fd)) = next {
        let result = match snapshot.read(&packet, fd) {
            Ok(Some(event)) => handle(event),
            Ok(None) => Ok(()),
            Err(e) => Err(e),
        };
        let error = result.err().unwrap_or_default();
        if !error.is_empty() {
            tracing::warn!(%error, "refused the node agent's message");
        }
        let answer =
            WorkloadResponse { payload: Some(workload_response::Payload::Ack(Ack { error })) };
        send(line.as_raw_fd(), &answer.encode_to_vec(), MsgFlags::MSG_NOSIGNAL)?;
        next = receive(line)?;
    }
    Ok(())
}

/// What one line's messages mean: a snapshot of all pods first, then changes.
#[derive(Debug)]
pub struct Snapshot {
    /// Uids named before `SnapshotSent`; `None` after it.
    named: Option<HashSet<String>>,
}

impl Default for Snapshot {
    fn default() -> Self {
        Self { named: Some(HashSet::new()) }
    }
}

impl Snapshot {
    /// Reads a message of the agent. The error is for the agent.
    pub fn read<F>(
        &mut self,
        packet: &[u8],
        netns: Option<F>,
    ) -> Result<Option<PodEvent<F>>, String> {
        let request =
            WorkloadRequest::decode(packet).map_err(|e| format!("message not understood: {e}"))?;
        match request.payload {
            Some(Payload::Add(add)) => {
                self.name(&add.uid)?;
                let info = add.workload_info.ok_or("AddWorkload without workload_info")?;
                let netns = netns.ok_or("AddWorkload without a network namespace")?;
                Ok(Some(PodEvent::Add { uid: add.uid, info, netns }))
            }
            Some(Payload::Keep(keep)) => {
                self.name(&keep.uid)?;
                Ok(None)
            }
            Some(Payload::Del(del)) => {
                if let Some(named) = &mut self.named {
                    named.remove(&del.uid);
                }
                Ok(Some(PodEvent::Remove { uid: del.uid }))
            }
            Some(Payload::SnapshotSent(_)) => {
                Ok(self.named.take().map(|uids| PodEvent::Only { uids }))
            }
            None => {
                Err("message of a kind that this proxy does not know (it speaks ZDS V1)".into())
            }
        }
    }

    fn name(&mut self, uid: &str) -> Result<(), String> {
        if uid.is_empty() {
            return Err("a pod without a uid".to_owned());
        }
        let Some(named) = &mut self.named else { return Ok(()) };
        if named.len() >= MAX_NAMED && !named.contains(uid) {
            return Err(format!("more than {MAX_NAMED} pods on one node"));
        }
        named.insert(uid.to_owned());
        Ok(())
    }
}

/// One packet and the descriptor beside it. `None` when the agent closed.
fn receive(line: &OwnedFd) -> io::Result<Option<Packet>> {
    let mut buffer = vec![0; MAX_PACKET];
    let mut control = nix::cmsg_space!([i32; 4]);
    let mut parts = [IoSliceMut::new(&mut buffer)];
    let message = recvmsg::<()>(
        line.as_raw_fd(),
        &mut parts,
        Some(&mut control),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut fds = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = part {
            // SAFETY: the kernel has just made these descriptors for us; nobody else owns them.
            #[expect(unsafe_code, reason = "descriptors arrive as numbers")]
            fds.extend(received.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    let (length, flags) = (message.bytes, message.flags);
    if flags.contains(MsgFlags::MSG_TRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the agent's packet is too large"));
    }
    if length == 0 {
        return Ok(None);
    }
    buffer.truncate(length);
    Ok(Some((buffer, fds.into_iter().next())))
}
