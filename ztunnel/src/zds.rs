//! The node agent's line: which pods this proxy serves, with their network namespaces.
//!
//! Istio's ZDS: a SOCK_SEQPACKET socket, one protobuf message per packet, the namespace's file
//! descriptor beside it. We connect, say hello, and answer every message. The agent sends all pods,
//! then `SnapshotSent`; what it did not name by then is gone. When the line breaks the pods stay and
//! we connect again: a restarting agent must not cut a pod off.
//!
//! What is ours: copies of the listeners travel with the answers, those of a pod with the answer about it,
//! those of the operators' pages with the answer to `SnapshotSent`. An agent that keeps them gives them to
//! the next process behind the namespace, and in `SnapshotSent`. One that does not never sees them.

use std::collections::{HashSet, VecDeque};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::listeners::MAX_HANDED;
use crate::worker::Added;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, Shutdown, SockFlag, SockType,
    UnixAddr, connect, recvmsg, send, sendmsg, shutdown, socket,
};
use prost::Message as _;
use xds::zds::workload_request::Payload;
use xds::zds::workload_response;
use xds::zds::{Ack, Version, WorkloadInfo, WorkloadRequest, WorkloadResponse, ZdsHello};

/// A packet carries one message; the largest has three names of at most 253 bytes.
const MAX_PACKET: usize = 4096;
/// The namespace and the listeners: as many as the kernel passes in one message.
const MAX_FILES: usize = MAX_HANDED + 1;
/// Pods that an agent may name: ten times what a node is built for. A broken agent must not fill the memory.
const MAX_NAMED: usize = 10_000;
/// Pauses before the next attempts to reach the agent. Pods that start wait for us, so the longest is short.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// What the agent wants. `F` is a file that came beside the message.
#[derive(Debug)]
pub enum PodEvent<F = OwnedFd> {
    Add {
        uid: String,
        info: WorkloadInfo,
        netns: F,
        /// Listeners of the process that served the pod before.
        handed: Vec<F>,
    },
    Remove {
        uid: String,
    },
    /// Keep only these; everything has been named.
    Only {
        uids: HashSet<String>,
        /// Listeners of the operators' pages.
        handed: Vec<F>,
    },
}

/// Ends the line: whoever goes must not be taken for the one who serves.
#[derive(Debug, Default)]
pub struct HangUp {
    gone: AtomicBool,
    line: Mutex<Option<OwnedFd>>,
}

impl HangUp {
    pub fn now(&self) {
        self.gone.store(true, Ordering::SeqCst);
        if let Some(line) = &*self.line() {
            // Wakes the thread that waits on it. An error means that the other end was first.
            let _ = shutdown(line.as_raw_fd(), Shutdown::Both);
        }
    }

    fn line(&self) -> MutexGuard<'_, Option<OwnedFd>> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs until the process ends or hangs up, on a thread of its own. `handle` acts on an event and returns the
/// error to tell the agent, or the listeners that it is to keep.
pub fn run(path: &Path, hang_up: &HangUp, mut handle: impl FnMut(PodEvent) -> Added) {
    let (mut pause, mut complaint) = (FIRST_PAUSE, String::new());
    while !hang_up.gone.load(Ordering::SeqCst) {
        match serve(path, hang_up, &mut handle) {
            _ if hang_up.gone.load(Ordering::SeqCst) => return,
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
fn serve(
    path: &Path,
    hang_up: &HangUp,
    handle: &mut impl FnMut(PodEvent) -> Added,
) -> io::Result<()> {
    let line = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    connect(line.as_raw_fd(), &UnixAddr::new(path)?)?;
    *hang_up.line() = Some(line.try_clone()?);
    if hang_up.gone.load(Ordering::SeqCst) {
        return Ok(());
    }
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

type Packet = (Vec<u8>, VecDeque<OwnedFd>);

fn converse(
    line: &OwnedFd,
    first: Packet,
    handle: &mut impl FnMut(PodEvent) -> Added,
) -> io::Result<()> {
    let mut snapshot = Snapshot::default();
    let mut next = Some(first);
    while let Some((packet, files)) = next {
        let result = match snapshot.read(&packet, files) {
            Ok(Some(event)) => handle(event),
            Ok(None) => Ok(Vec::new()),
            Err(e) => Err(e),
        };
        let (listeners, error) = match result {
            Ok(listeners) => (listeners, String::new()),
            Err(error) => (Vec::new(), error),
        };
        if !error.is_empty() {
            tracing::warn!(%error, "refused the node agent's message");
        }
        let answer =
            WorkloadResponse { payload: Some(workload_response::Payload::Ack(Ack { error })) };
        answer_with(line, &answer.encode_to_vec(), &listeners)?;
        next = receive(line)?;
    }
    Ok(())
}

fn answer_with(line: &OwnedFd, packet: &[u8], listeners: &[OwnedFd]) -> io::Result<()> {
    let files: Vec<_> = listeners.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&files)];
    let rights = if files.is_empty() { &[][..] } else { &rights[..] };
    let parts = [IoSlice::new(packet)];
    sendmsg::<()>(line.as_raw_fd(), &parts, rights, MsgFlags::MSG_NOSIGNAL, None)?;
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
        mut files: VecDeque<F>,
    ) -> Result<Option<PodEvent<F>>, String> {
        let request =
            WorkloadRequest::decode(packet).map_err(|e| format!("message not understood: {e}"))?;
        match request.payload {
            Some(Payload::Add(add)) => {
                self.name(&add.uid)?;
                let info = add.workload_info.ok_or("AddWorkload without workload_info")?;
                let netns = files.pop_front().ok_or("AddWorkload without a network namespace")?;
                Ok(Some(PodEvent::Add { uid: add.uid, info, netns, handed: files.into() }))
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
                Ok(self.named.take().map(|uids| PodEvent::Only { uids, handed: files.into() }))
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

/// One packet and the descriptors beside it. `None` when the agent closed.
fn receive(line: &OwnedFd) -> io::Result<Option<Packet>> {
    let mut buffer = vec![0; MAX_PACKET];
    let mut control = nix::cmsg_space!([i32; MAX_FILES]);
    let mut parts = [IoSliceMut::new(&mut buffer)];
    let message = recvmsg::<()>(
        line.as_raw_fd(),
        &mut parts,
        Some(&mut control),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut fds = VecDeque::new();
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
    Ok(Some((buffer, fds)))
}
