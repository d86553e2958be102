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
/// Pause before the next attempt to reach the agent.
const RECONNECT: Duration = Duration::from_millis(200);

/// What the agent wants.
#[derive(Debug)]
pub enum PodEvent {
    Add {
        uid: String,
        info: WorkloadInfo,
        netns: OwnedFd,
        /// Listeners of the process that served the pod before.
        handed: Vec<OwnedFd>,
    },
    Remove {
        uid: String,
    },
    /// Keep only these; everything has been named.
    Only {
        uids: HashSet<String>,
        /// Listeners of the operators' pages.
        handed: Vec<OwnedFd>,
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
    let mut complained = false;
    while !hang_up.gone.load(Ordering::SeqCst) {
        match serve(path, hang_up, &mut handle) {
            _ if hang_up.gone.load(Ordering::SeqCst) => return,
            Ok(()) => tracing::info!("the node agent closed the line, connecting again"),
            Err(e) if complained => tracing::debug!(error = %e, "node agent"),
            Err(e) => {
                tracing::warn!(socket = %path.display(), error = %e, "no line to the node agent, trying on");
                complained = true;
            }
        }
        std::thread::sleep(RECONNECT);
    }
}

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
    tracing::info!(socket = %path.display(), "connected to the node agent");

    // Uids named before `SnapshotSent`; `None` after it.
    let mut named = Some(HashSet::new());
    while let Some((packet, files)) = receive(&line)? {
        let result = match WorkloadRequest::decode(&*packet) {
            Ok(request) => match event(request, files, &mut named) {
                Ok(Some(event)) => handle(event),
                Ok(None) => Ok(Vec::new()),
                Err(e) => Err(e),
            },
            Err(e) => Err(format!("message not understood: {e}")),
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
        answer_with(&line, &answer.encode_to_vec(), &listeners)?;
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

fn event(
    request: WorkloadRequest,
    mut files: VecDeque<OwnedFd>,
    named: &mut Option<HashSet<String>>,
) -> Result<Option<PodEvent>, String> {
    let mut name = |uid: &str| {
        if let Some(named) = named.as_mut() {
            named.insert(uid.to_owned());
        }
    };
    match request.payload {
        Some(Payload::Add(add)) => {
            name(&add.uid);
            let info = add.workload_info.ok_or("AddWorkload without workload_info")?;
            let netns = files.pop_front().ok_or("AddWorkload without a network namespace")?;
            Ok(Some(PodEvent::Add { uid: add.uid, info, netns, handed: files.into() }))
        }
        Some(Payload::Keep(keep)) => {
            name(&keep.uid);
            Ok(None)
        }
        Some(Payload::Del(del)) => Ok(Some(PodEvent::Remove { uid: del.uid })),
        Some(Payload::SnapshotSent(_)) => {
            Ok(named.take().map(|uids| PodEvent::Only { uids, handed: files.into() }))
        }
        None => Err("empty message".into()),
    }
}

/// One packet and the descriptors beside it. `None` when the agent closed.
fn receive(line: &OwnedFd) -> io::Result<Option<(Vec<u8>, VecDeque<OwnedFd>)>> {
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
