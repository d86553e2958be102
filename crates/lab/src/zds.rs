//! The node agent's end of ZDS: tells a node's ztunnel which pods it serves, with their network namespaces.
//!
//! One packet per message on a SEQPACKET socket, the namespace's file beside it, each answered. A ztunnel that connects
//! (again) is told all pods first, then "that is all".
//!
//! With its answers ztunnel sends copies of its listeners. They are kept and given to the next one, so that connections
//! wait in their queues while no ztunnel runs, and two that overlap share them. A ztunnel that sends none has the kept ones
//! closed: beside its own they would swallow connections.
//!
//! Invariants: pods are told to one ztunnel, the newest; when its line breaks, every other line is cut as well, so that a
//! ztunnel that still serves connects anew and hears everything again; one message is under way at a time; a pod counts as
//! enrolled when ztunnel said so, and a caller waits for that as long as it takes: without ztunnel the pod does not start
//! (fail closed).

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::task::Poll;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use net::NetNs;
use nix::cmsg_space;
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType,
    UnixAddr, bind, listen, recvmsg, sendmsg, socket,
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
/// How long connections wait for a ztunnel. After it they are reset, and new ones refused: a client that hangs does not
/// learn that it should try elsewhere.
const KEEP: Duration = Duration::from_secs(30);
/// Files beside one message: as many as the kernel passes.
const MAX_FILES: usize = 253;
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
            pages: vec![],
            lines: vec![],
            alone_since: None,
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
    /// Listeners of the operators' pages, as ztunnel sent them last.
    pages: Vec<OwnedFd>,
    /// The newest last: that one is told.
    lines: Vec<AsyncFd<OwnedFd>>,
    /// When the last line broke, while listeners are kept for the next.
    alone_since: Option<Instant>,
}

struct Pod {
    captured: Captured,
    waiting: Option<oneshot::Sender<Result<(), String>>>,
    /// As ztunnel sent them last.
    listeners: Vec<OwnedFd>,
}

impl Server {
    async fn run(mut self) {
        loop {
            let give_up = self.alone_since.map(|since| since + KEEP);
            tokio::select! {
                line = accept(&self.listener) => match line {
                    Ok(line) => self.greet(line).await,
                    Err(e) => return tracing::error!("{}: ZDS: {e}", self.node),
                },
                command = self.commands.recv() => match command {
                    Some(command) => self.obey(command).await,
                    None => return,
                },
                (index, why) = first_that_breaks(&self.lines) => self.lost(index, &why),
                () = tokio::time::sleep_until(give_up.unwrap_or_else(Instant::now).into()), if give_up.is_some() => {
                    tracing::warn!("{}: no ztunnel for {} s, connections are refused", self.node, KEEP.as_secs());
                    self.close_listeners();
                }
            }
        }
    }

    /// Tells a new ztunnel everything. From then on it is the one that is told.
    async fn greet(&mut self, line: AsyncFd<OwnedFd>) {
        let hello = tokio::time::timeout(PATIENCE, receive(&line)).await;
        let Ok(Ok(Ok(hello))) = hello.map(|h| h.map(|(packet, _)| ZdsHello::decode(&*packet)))
        else {
            return tracing::warn!("{}: somebody connected and said no hello", self.node);
        };
        if hello.version != i32::from(Version::V1) {
            return tracing::warn!(
                "{}: a ztunnel speaks ZDS version {}, this node agent V1: start programs of one release",
                self.node,
                hello.version
            );
        }
        tracing::info!("{}: ztunnel connected", self.node);
        match self.snapshot(&line).await {
            Ok(()) => {
                self.lines.push(line);
                self.alone_since = None;
            }
            Err(e) => {
                tracing::warn!("{}: ztunnel's line: {e:#}", self.node);
                self.call_all_back();
            }
        }
    }

    /// Has every ztunnel that still lives connect anew; the one that serves then hears everything again. One that drains
    /// has hung up and does not come back.
    fn call_all_back(&mut self) {
        self.lines.clear();
        let keeps = !self.pages.is_empty() || self.pods.values().any(|p| !p.listeners.is_empty());
        self.alone_since = keeps.then(Instant::now);
    }

    async fn snapshot(&mut self, line: &AsyncFd<OwnedFd>) -> Result<()> {
        for uid in self.pods.keys().cloned().collect::<Vec<_>>() {
            self.add(line, &uid).await?;
        }
        let pages: Vec<RawFd> = self.pages.iter().map(AsRawFd::as_raw_fd).collect();
        let all = ask(line, Payload::SnapshotSent(SnapshotSent {}), &pages).await;
        self.pages = all.context("end of snapshot")?.map_err(anyhow::Error::msg)?;
        Ok(())
    }

    fn lost(&mut self, index: usize, why: &str) {
        if index + 1 < self.lines.len() {
            self.lines.remove(index);
            return;
        }
        tracing::info!("{}: ztunnel's line: {why}", self.node);
        self.call_all_back();
    }

    async fn obey(&mut self, command: Command) {
        let Some(line) = self.lines.pop() else { return self.note(command) };
        let done = match &command {
            Command::Add(pod, _) => {
                let uid = pod.uid.clone();
                self.note(command);
                self.add(&line, &uid).await
            }
            Command::Remove(uid, _) => {
                let uid = uid.clone();
                let told = ask(&line, Payload::Del(DelWorkload { uid }), &[]).await;
                // Whatever it answers, the pod is none of its business any more; a broken line is noticed next.
                self.note(command);
                told.context("remove a pod").map(|_| ())
            }
        };
        match done {
            Ok(()) => self.lines.push(line),
            Err(e) => {
                tracing::warn!("{}: ztunnel's line: {e:#}", self.node);
                self.call_all_back();
            }
        }
    }

    /// Changes the list.
    fn note(&mut self, command: Command) {
        match command {
            Command::Add(captured, waiting) => {
                let pod = Pod { captured: *captured, waiting: Some(waiting), listeners: vec![] };
                self.pods.insert(pod.captured.uid.clone(), pod);
            }
            Command::Remove(uid, reply) => {
                self.pods.remove(&uid);
                let _ = reply.send(());
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
        let listeners = pod.listeners.iter().map(AsRawFd::as_raw_fd);
        let files: Vec<RawFd> = [c.ns.as_fd().as_raw_fd()].into_iter().chain(listeners).collect();
        let answer = ask(line, Payload::Add(add), &files).await.context("add a pod")?;
        let answer = match answer {
            Ok(listeners) => {
                pod.listeners = listeners;
                Ok(())
            }
            Err(e) => {
                tracing::warn!("{}: ztunnel refused {}/{}: {e}", self.node, c.namespace, c.name);
                pod.listeners = vec![];
                Err(e)
            }
        };
        if let Some(waiting) = pod.waiting.take() {
            let _ = waiting.send(answer);
        }
        Ok(())
    }

    fn close_listeners(&mut self) {
        self.alone_since = None;
        self.pages.clear();
        self.pods.values_mut().for_each(|pod| pod.listeners.clear());
    }
}

/// Waits until a ztunnel hangs up, or speaks without being asked.
async fn first_that_breaks(lines: &[AsyncFd<OwnedFd>]) -> (usize, String) {
    let mut waits: Vec<_> = lines.iter().map(|line| Box::pin(receive(line))).collect();
    poll_fn(|cx| {
        for (index, wait) in waits.iter_mut().enumerate() {
            match wait.as_mut().poll(cx) {
                Poll::Ready(Ok(_)) => {
                    return Poll::Ready((index, "it spoke without being asked".to_owned()));
                }
                Poll::Ready(Err(e)) => return Poll::Ready((index, e.to_string())),
                Poll::Pending => {}
            }
        }
        Poll::Pending
    })
    .await
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

/// Sends one message and waits for its answer: what ztunnel wants to be kept, or its refusal.
async fn ask(
    line: &AsyncFd<OwnedFd>,
    payload: Payload,
    files: &[RawFd],
) -> Result<Result<Vec<OwnedFd>, String>> {
    let packet = WorkloadRequest { payload: Some(payload) }.encode_to_vec();
    let exchange = async {
        let sent = line.async_io(Interest::WRITABLE, |fd| {
            let rights = [ControlMessage::ScmRights(files)];
            let rights = if files.is_empty() { &[][..] } else { &rights[..] };
            let parts = [IoSlice::new(&packet)];
            Ok(sendmsg::<()>(fd.as_raw_fd(), &parts, rights, MsgFlags::MSG_NOSIGNAL, None)?)
        });
        sent.await?;
        receive(line).await
    };
    let (answer, files) =
        tokio::time::timeout(PATIENCE, exchange).await.context("ztunnel does not answer")??;
    let answer = WorkloadResponse::decode(&*answer).context("ztunnel's answer")?;
    let Some(workload_response::Payload::Ack(ack)) = answer.payload else {
        bail!("ztunnel's answer is empty")
    };
    Ok(if ack.error.is_empty() { Ok(files) } else { Err(ack.error) })
}

/// One packet, and the files beside it.
async fn receive(line: &AsyncFd<OwnedFd>) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    line.async_io(Interest::READABLE, |fd| {
        let mut buffer = vec![0; MAX_PACKET];
        let mut space = cmsg_space!([RawFd; MAX_FILES]);
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(fd.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
        let mut files = vec![];
        for part in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = part {
                #[expect(unsafe_code, reason = "files received over a socket come as numbers")]
                // SAFETY: the kernel has just made these numbers for this process; nobody else owns them.
                files.extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        let length = message.bytes;
        if length == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "closed"));
        }
        buffer.truncate(length);
        Ok((buffer, files))
    })
    .await
}

#[cfg(test)]
mod tests;
