//! The node agent's end of ZDS: tells a node's ztunnel which pods it serves, with their network namespaces.
//!
//! One packet per message on a SEQPACKET socket, the namespace's file beside it, each answered. A ztunnel that connects
//! (again) is told all pods first, then "that is all".
//!
//! Invariants: one ztunnel at a time, the newest; one message is under way at a time; a pod counts as enrolled when ztunnel
//! said so, and a caller waits for that as long as it takes: without ztunnel the pod does not start (fail closed).

use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use net::NetNs;
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, bind, listen,
    recv, sendmsg, socket,
};
use prost::Message as _;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot};
use xds::zds::workload_request::Payload;
use xds::zds::{
    AddWorkload, DelWorkload, SnapshotSent, Version, WorkloadInfo, WorkloadRequest,
    WorkloadResponse, ZdsHello, workload_response,
};

use crate::fds::watched;

/// The largest answer is an error text.
const MAX_PACKET: usize = 64 * 1024;
/// Binding a pod's listeners takes milliseconds; a ztunnel that is silent this long is given up.
const PATIENCE: Duration = Duration::from_secs(10);
/// Commands that wait for ztunnel: the pods of a node, each at most twice.
const QUEUE: usize = 512;

/// A pod for ztunnel.
#[derive(Clone, Debug)]
pub(crate) struct Captured {
    pub(crate) uid: String,
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) service_account: String,
    pub(crate) ns: NetNs,
}

/// The agent of one node. Ends when dropped.
#[derive(Clone, Debug)]
pub(crate) struct Agent(mpsc::Sender<Command>);

#[derive(Debug)]
enum Command {
    Add(Box<Captured>, oneshot::Sender<Result<(), String>>),
    Remove(String, oneshot::Sender<()>),
}

impl Agent {
    /// Listens at `path`.
    pub(crate) fn start(path: &Path, node: &str) -> Result<Self> {
        let listener = socket(
            AddressFamily::Unix,
            SockType::SeqPacket,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            None,
        )?;
        bind(listener.as_raw_fd(), &UnixAddr::new(path)?)
            .with_context(|| format!("bind {}", path.display()))?;
        listen(&listener, Backlog::new(4)?)?;
        let (sender, commands) = mpsc::channel(QUEUE);
        let server = Server {
            node: node.to_owned(),
            listener: watched(listener)?,
            commands,
            pods: BTreeMap::new(),
        };
        tokio::spawn(server.run());
        Ok(Self(sender))
    }

    /// Enrols a pod; returns when ztunnel serves it or says why not.
    pub(crate) async fn add(&self, pod: Captured) -> Result<(), String> {
        let (reply, answer) = oneshot::channel();
        let sent = self.0.send(Command::Add(Box::new(pod), reply)).await;
        sent.map_err(|_| "the node agent has ended".to_owned())?;
        answer.await.map_err(|_| "the node agent has ended".to_owned())?
    }

    /// Takes a pod away; returns when ztunnel has let go of it, or is not there.
    pub(crate) async fn remove(&self, uid: &str) {
        let (reply, answer) = oneshot::channel();
        if self.0.send(Command::Remove(uid.to_owned(), reply)).await.is_ok() {
            let _ = answer.await;
        }
    }
}

struct Server {
    node: String,
    listener: AsyncFd<OwnedFd>,
    commands: mpsc::Receiver<Command>,
    /// Everything ztunnel is to serve, and who waits to hear that it does.
    pods: BTreeMap<String, Pod>,
}

struct Pod {
    captured: Captured,
    waiting: Option<oneshot::Sender<Result<(), String>>>,
}

impl Server {
    async fn run(mut self) {
        loop {
            // Without ztunnel, commands change only the list.
            let line = tokio::select! {
                line = accept(&self.listener) => match line {
                    Ok(line) => line,
                    Err(e) => return tracing::error!("{}: ZDS: {e}", self.node),
                },
                command = self.commands.recv() => match command {
                    Some(command) => {
                        self.note(command);
                        continue;
                    }
                    None => return,
                },
            };
            match self.serve(&line).await {
                Ok(()) => return,
                Err(e) => tracing::info!("{}: ztunnel's line: {e:#}", self.node),
            }
        }
    }

    /// Remembers a command for the next ztunnel.
    fn note(&mut self, command: Command) {
        match command {
            Command::Add(captured, waiting) => {
                self.pods.insert(
                    captured.uid.clone(),
                    Pod { captured: *captured, waiting: Some(waiting) },
                );
            }
            Command::Remove(uid, reply) => {
                self.pods.remove(&uid);
                let _ = reply.send(());
            }
        }
    }

    /// Talks to one ztunnel. Ok: the agent is to end.
    async fn serve(&mut self, line: &AsyncFd<OwnedFd>) -> Result<()> {
        let hello = receive(line).await.context("hello")?;
        let hello = ZdsHello::decode(&*hello).context("hello")?;
        if hello.version != i32::from(Version::V1) {
            bail!(
                "ztunnel speaks ZDS version {}, this node agent V1: start programs of one release",
                hello.version
            );
        }
        tracing::info!("{}: ztunnel connected", self.node);
        for uid in self.pods.keys().cloned().collect::<Vec<_>>() {
            self.add(line, &uid).await?;
        }
        ask(line, Payload::SnapshotSent(SnapshotSent {}), None)
            .await
            .context("end of snapshot")?
            .map_err(anyhow::Error::msg)?;
        loop {
            tokio::select! {
                gone = receive(line) => {
                    gone?;
                    bail!("it spoke without being asked");
                }
                command = self.commands.recv() => {
                    let Some(command) = command else { return Ok(()) };
                    let (added, removed) = match &command {
                        Command::Add(pod, _) => (Some(pod.uid.clone()), None),
                        Command::Remove(uid, _) => (None, Some(uid.clone())),
                    };
                    if let Some(uid) = removed {
                        // Whatever it answers, the pod is none of its business any more; a broken line is noticed next.
                        let told = ask(line, Payload::Del(DelWorkload { uid }), None).await;
                        self.note(command);
                        told.context("remove a pod")?.map_err(anyhow::Error::msg)?;
                    } else if let Some(uid) = added {
                        self.note(command);
                        self.add(line, &uid).await?;
                    }
                }
            }
        }
    }

    async fn add(&mut self, line: &AsyncFd<OwnedFd>, uid: &str) -> Result<()> {
        let Some(pod) = self.pods.get_mut(uid) else { return Ok(()) };
        let c = &pod.captured;
        let info = WorkloadInfo {
            name: c.name.clone(),
            namespace: c.namespace.clone(),
            service_account: c.service_account.clone(),
        };
        let add = AddWorkload { uid: c.uid.clone(), workload_info: Some(info) };
        let answer = ask(line, Payload::Add(add), Some(&c.ns)).await.context("add a pod")?;
        if let Err(e) = &answer {
            tracing::warn!("{}: ztunnel refused {}/{}: {e}", self.node, c.namespace, c.name);
        }
        if let Some(waiting) = pod.waiting.take() {
            let _ = waiting.send(answer);
        }
        Ok(())
    }
}

async fn accept(listener: &AsyncFd<OwnedFd>) -> io::Result<AsyncFd<OwnedFd>> {
    let accepted = listener.async_io(Interest::READABLE, |fd| {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        Ok(nix::sys::socket::accept4(fd.as_raw_fd(), flags)?)
    });
    let fd = accepted.await?;
    #[expect(unsafe_code, reason = "accept returns a number")]
    // SAFETY: the kernel has just made this number for us.
    watched(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sends one message and waits for its answer; the inner error is ztunnel's refusal.
async fn ask(
    line: &AsyncFd<OwnedFd>,
    payload: Payload,
    ns: Option<&NetNs>,
) -> Result<Result<(), String>> {
    let packet = WorkloadRequest { payload: Some(payload) }.encode_to_vec();
    let files: Vec<_> = ns.iter().map(|ns| ns.as_fd().as_raw_fd()).collect();
    let exchange = async {
        let sent = line.async_io(Interest::WRITABLE, |fd| {
            let rights = [ControlMessage::ScmRights(&files)];
            let rights = if files.is_empty() { &[][..] } else { &rights[..] };
            let parts = [IoSlice::new(&packet)];
            Ok(sendmsg::<()>(fd.as_raw_fd(), &parts, rights, MsgFlags::MSG_NOSIGNAL, None)?)
        });
        sent.await?;
        receive(line).await
    };
    let answer =
        tokio::time::timeout(PATIENCE, exchange).await.context("ztunnel does not answer")??;
    let answer = WorkloadResponse::decode(&*answer).context("ztunnel's answer")?;
    let Some(workload_response::Payload::Ack(ack)) = answer.payload else {
        bail!("ztunnel's answer is empty")
    };
    Ok(if ack.error.is_empty() { Ok(()) } else { Err(ack.error) })
}

async fn receive(line: &AsyncFd<OwnedFd>) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; MAX_PACKET];
    let n = line
        .async_io(Interest::READABLE, |fd| {
            Ok(recv(fd.as_raw_fd(), &mut buffer, MsgFlags::empty())?)
        })
        .await?;
    if n == 0 {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "closed"));
    }
    buffer.truncate(n);
    Ok(buffer)
}

#[cfg(test)]
mod tests;
