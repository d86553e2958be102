//! The DNS server of every node: UDP and TCP on the cluster DNS addresses.
//!
//! Invariants: a limited number of questions and connections is under way; each has a time limit; an answer too large for
//! the asker's datagram is cut and marked, and complete by TCP.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener as StdTcpListener, UdpSocket as StdUdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use anyhow::{Context, Result};
use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use net::NetNs;
use nix::sys::socket::{MsgFlags, recv, send};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, oneshot};

use super::table::{self, Answer, Table};
use crate::fds;
use crate::network::{DNS_V4, DNS_V6};
use crate::upstream::MAX_MESSAGE;

/// Questions under way per socket. Only those that go to the machine's resolvers take time.
const MOST_QUESTIONS: usize = 256;
/// TCP connections per address.
const MOST_CONNECTIONS: usize = 64;
/// How long a TCP client may take for its next question.
const IDLE: Duration = Duration::from_secs(10);
/// A stub resolver waits 5 s; the front needs up to 2 s per resolver. Then "try again" is the better answer.
const PATIENCE: Duration = Duration::from_millis(4_500);
const PORT: u16 = 53;

/// Hands out the table that holds now.
#[derive(Clone, Debug, Default)]
pub(crate) struct Current(Arc<RwLock<Arc<Table>>>);

impl Current {
    pub(crate) fn set(&self, table: Table) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(table);
    }

    fn get(&self) -> Arc<Table> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Starts the servers of one node.
pub(crate) fn serve(ns: &NetNs, current: &Current, upstream: &Arc<Upstream>) -> Result<()> {
    let open = || -> io::Result<Vec<(StdUdpSocket, StdTcpListener)>> {
        let open = |ip: IpAddr| {
            let at = SocketAddr::new(ip, PORT);
            Ok((StdUdpSocket::bind(at)?, StdTcpListener::bind(at)?))
        };
        [DNS_V4.into(), DNS_V6.into()].into_iter().map(open).collect()
    };
    for (udp, tcp) in ns.run(open)?.context("listen for DNS")? {
        udp.set_nonblocking(true)?;
        tcp.set_nonblocking(true)?;
        let server = Server { current: current.clone(), upstream: Arc::clone(upstream) };
        tokio::spawn(server.clone().udp(UdpSocket::from_std(udp)?));
        tokio::spawn(server.tcp(TcpListener::from_std(tcp)?));
    }
    Ok(())
}

#[derive(Clone)]
struct Server {
    current: Current,
    upstream: Arc<Upstream>,
}

impl Server {
    async fn udp(self, socket: UdpSocket) {
        let socket = Arc::new(socket);
        let room = Arc::new(Semaphore::new(MOST_QUESTIONS));
        let mut buffer = vec![0; MAX_MESSAGE];
        loop {
            let (n, from) = match socket.recv_from(&mut buffer).await {
                Ok(got) => got,
                // An earlier answer met a closed port.
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => continue,
                Err(e) => return tracing::error!("DNS by UDP: {e}"),
            };
            // Without room the question is dropped; the asker tries again.
            let Ok(permit) = Arc::clone(&room).try_acquire_owned() else { continue };
            let Ok(asked) = Message::from_vec(&buffer[..n]) else { continue };
            let (server, socket, raw) = (self.clone(), Arc::clone(&socket), buffer[..n].to_vec());
            tokio::spawn(async move {
                if let Some(answer) = server.answer(&asked, &raw).await
                    && let Some(bytes) = fit(answer, table::udp_limit(&asked))
                {
                    let _ = socket.send_to(&bytes, from).await;
                }
                drop(permit);
            });
        }
    }

    async fn tcp(self, listener: TcpListener) {
        let room = Arc::new(Semaphore::new(MOST_CONNECTIONS));
        loop {
            let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, _)) => {
                    let server = self.clone();
                    tokio::spawn(async move {
                        // A client that breaks off is no news.
                        let _ = server.connection(stream).await;
                        drop(permit);
                    });
                }
                Err(e) => {
                    tracing::warn!("DNS by TCP: {e}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    async fn connection(&self, mut stream: TcpStream) -> io::Result<()> {
        loop {
            let asked = tokio::time::timeout(IDLE, async {
                let length = usize::from(stream.read_u16().await?);
                let mut raw = vec![0; length];
                stream.read_exact(&mut raw).await?;
                Ok::<_, io::Error>(raw)
            });
            let raw = asked.await??;
            let asked = Message::from_vec(&raw).map_err(io::Error::other)?;
            let Some(answer) = self.answer(&asked, &raw).await else { return Ok(()) };
            let Some(bytes) = fit(answer, MAX_MESSAGE) else { return Ok(()) };
            let length = u16::try_from(bytes.len()).map_err(io::Error::other)?;
            let mut packet = length.to_be_bytes().to_vec();
            packet.extend_from_slice(&bytes);
            tokio::time::timeout(IDLE, stream.write_all(&packet)).await??;
        }
    }

    async fn answer(&self, asked: &Message, raw: &[u8]) -> Option<Reply> {
        match self.current.get().answer(asked) {
            Answer::Here(message) => Some(Reply::Message(message)),
            Answer::Silence => None,
            Answer::Elsewhere => Some(match self.upstream.ask(raw).await {
                Some(bytes) => Reply::Bytes(bytes),
                None => Reply::Message(table::failure(asked, ResponseCode::ServFail)),
            }),
            Answer::Alias { begun, target, kind } => {
                Some(Reply::Message(self.follow(asked, begun, target, kind).await))
            }
        }
    }

    async fn follow(
        &self,
        asked: &Message,
        mut begun: Message,
        target: hickory_proto::rr::Name,
        kind: hickory_proto::rr::RecordType,
    ) -> Message {
        let mut question = Message::new(asked.metadata.id, MessageType::Query, OpCode::Query);
        question.metadata.recursion_desired = true;
        question.add_query(Query::query(target, kind));
        let inside = match self.current.get().answer(&question) {
            Answer::Here(message) => Some(message),
            Answer::Elsewhere => {
                let bytes = question.to_vec().ok();
                let answer =
                    if let Some(bytes) = bytes { self.upstream.ask(&bytes).await } else { None };
                answer.and_then(|a| Message::from_vec(&a).ok())
            }
            // An alias of an alias: the asker may go on by itself.
            Answer::Alias { .. } | Answer::Silence => Some(begun.clone()),
        };
        match inside {
            Some(mut found) => {
                begun.metadata.response_code = found.metadata.response_code;
                begun.answers.append(&mut found.answers);
                begun
            }
            None => table::failure(asked, ResponseCode::ServFail),
        }
    }
}

enum Reply {
    Message(Message),
    /// As it came from the machine's resolver.
    Bytes(Vec<u8>),
}

/// The bytes of an answer, cut and marked when they are more than `limit`.
fn fit(reply: Reply, limit: usize) -> Option<Vec<u8>> {
    let message = match reply {
        Reply::Bytes(bytes) if bytes.len() <= limit => return Some(bytes),
        Reply::Bytes(bytes) => Message::from_vec(&bytes).ok()?,
        Reply::Message(message) => {
            let bytes = message.to_vec().ok()?;
            if bytes.len() <= limit {
                return Some(bytes);
            }
            message
        }
    };
    message.truncate().to_vec().ok()
}

/// The line to the front, which can reach the machine's resolvers.
#[derive(Debug)]
pub(crate) struct Upstream {
    link: AsyncFd<OwnedFd>,
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    next: u16,
    answers: HashMap<u16, oneshot::Sender<Option<Vec<u8>>>>,
}

impl Upstream {
    pub(crate) fn new(link: OwnedFd) -> Result<Arc<Self>> {
        fds::set_nonblocking(&link)?;
        let upstream = Arc::new(Self { link: fds::watched(link)?, waiting: Mutex::default() });
        tokio::spawn(Arc::clone(&upstream).receive());
        Ok(upstream)
    }

    async fn ask(&self, question: &[u8]) -> Option<Vec<u8>> {
        let (sender, answer) = oneshot::channel();
        let tag = self.lock().register(sender);
        let mut packet = tag.to_be_bytes().to_vec();
        packet.extend_from_slice(question);
        let sent = self.link.async_io(tokio::io::Interest::WRITABLE, |fd| {
            Ok(send(fd.as_raw_fd(), &packet, MsgFlags::MSG_NOSIGNAL)?)
        });
        let answered = async {
            sent.await.ok()?;
            answer.await.ok()?
        };
        let mut answer = tokio::time::timeout(PATIENCE, answered).await.ok().flatten();
        self.lock().answers.remove(&tag);
        // Whoever answered, the id is the asker's.
        if let (Some(bytes), [a, b, ..]) = (&mut answer, question)
            && bytes.len() >= 2
        {
            bytes[..2].copy_from_slice(&[*a, *b]);
        }
        answer
    }

    async fn receive(self: Arc<Self>) {
        let mut buffer = vec![0; 2 + MAX_MESSAGE];
        loop {
            let read = self.link.async_io(tokio::io::Interest::READABLE, |fd| {
                Ok(recv(fd.as_raw_fd(), &mut buffer, MsgFlags::empty())?)
            });
            match read.await {
                Ok(0) | Err(_) => return,
                Ok(n) if n >= 2 => {
                    let tag = u16::from_be_bytes([buffer[0], buffer[1]]);
                    if let Some(waiting) = self.lock().answers.remove(&tag) {
                        let _ = waiting.send((n > 2).then(|| buffer[2..n].to_vec()));
                    }
                }
                Ok(_) => {}
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    /// A tag that nobody waits for; each socket has at most [`MOST_QUESTIONS`] waiting, so there is one.
    fn register(&mut self, sender: oneshot::Sender<Option<Vec<u8>>>) -> u16 {
        loop {
            self.next = self.next.wrapping_add(1);
            if !self.answers.contains_key(&self.next) {
                self.answers.insert(self.next, sender);
                return self.next;
            }
        }
    }
}

#[cfg(test)]
mod tests;
