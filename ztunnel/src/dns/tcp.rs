//! Questions by TCP: one after the other on a connection, each answered here or by the resolver.
//!
//! The connection to the resolver is one of the pod's like any other: planned, encrypted where the resolver is in the
//! mesh, logged and counted. It is made for the first question that needs it.
//!
//! Invariants: a client may be slow only between questions, and not for long; a zone transfer, which has many messages
//! for an answer, is relayed as it is.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use agent::metrics::DnsProtocol;
use bytes::{Buf as _, Bytes, BytesMut};
use hbone::TunnelStream;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::{Decided, PATIENCE, Question, Server, wire};
use crate::outbound::{Connected, Ends, Joining, ResetOnDrop, finish, live, reach};
use crate::record::Record;
use crate::worker::{Accepted, Worker};

/// How long a client may take for its next question, and for an answer to leave.
const IDLE: Duration = Duration::from_secs(10);
/// Types whose answers are many messages: IXFR and AXFR.
const TRANSFERS: [u16; 2] = [251, 252];

/// Serves one connection to its end.
pub(super) async fn serve(server: Arc<Server>, accepted: Accepted) {
    let Accepted { tcp, peer, destination, .. } = accepted;
    let mut client = ResetOnDrop(Some(tcp));
    let Ok(_place) = server.connections.try_acquire() else { return };
    if !Server::is_captured(destination) {
        return;
    }
    let mut line = Line { server: &server, peer, resolver: destination, open: None };
    match questions(&server, &mut client, &mut line).await {
        Ok(Some(first)) => line.relay(client, &first).await,
        // The end was the client's: an orderly one for it too.
        Ok(None) => drop(client.take()),
        Err(error) => tracing::debug!(target: "dns", %peer, %error, "DNS by TCP ended"),
    }
}

/// Answers until the client is done. Some: this question's answer is many messages.
async fn questions(
    server: &Server,
    client: &mut ResetOnDrop,
    line: &mut Line<'_>,
) -> io::Result<Option<Vec<u8>>> {
    let Some(client) = &mut client.0 else { return Ok(None) };
    loop {
        // A pod that leaves, or a proxy that goes, ends the connection between two questions.
        tokio::select! {
            biased;
            ready = tokio::time::timeout(IDLE, client.readable()) => ready??,
            () = server.pod.left() => return Ok(None),
        }
        let read = tokio::time::timeout(IDLE, read(client)).await??;
        let Some(packet) = read else { return Ok(None) };
        let answer = match server.decide(&packet, DnsProtocol::Tcp, line.resolver) {
            Decided::Ignore => return Err(io::ErrorKind::InvalidData.into()),
            Decided::Answer(bytes) => Some(bytes),
            Decided::Forward(question) if TRANSFERS.contains(&question.kind) => {
                return Ok(Some(packet));
            }
            Decided::Forward(question) => forward(server, line, &question, &packet).await,
        };
        let Some(answer) = answer else { return Err(io::ErrorKind::InvalidData.into()) };
        tokio::time::timeout(IDLE, client.write_all(&framed(&answer)?)).await??;
    }
}

/// The next message; `None` at an orderly end.
async fn read(client: &mut TcpStream) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; 2];
    if client.read(&mut length[..1]).await? == 0 {
        return Ok(None);
    }
    client.read_exact(&mut length[1..]).await?;
    let mut packet = vec![0; usize::from(u16::from_be_bytes(length))];
    client.read_exact(&mut packet).await?;
    Ok(Some(packet))
}

fn framed(message: &[u8]) -> io::Result<Vec<u8>> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    let mut framed = Vec::with_capacity(2 + message.len());
    framed.extend(length.to_be_bytes());
    framed.extend(message);
    Ok(framed)
}

async fn forward(
    server: &Server,
    line: &mut Line<'_>,
    question: &Question,
    packet: &[u8],
) -> Option<Vec<u8>> {
    let began = Instant::now();
    question.metrics.upstream(question.kind, question.protocol);
    let outcome = match tokio::time::timeout(PATIENCE, line.ask(packet)).await {
        Ok(outcome) => outcome,
        Err(_) => Err(format!("{} did not answer within {PATIENCE:?}", question.resolver)),
    };
    if let Err(error) = &outcome {
        // What arrives now would be an answer to the question before.
        line.close(Some(error));
    }
    server.forwarded(question, packet, began.elapsed(), outcome)
}

/// The connection to the resolver.
struct Line<'s> {
    server: &'s Server,
    /// The client.
    peer: SocketAddr,
    resolver: SocketAddr,
    open: Option<Open>,
}

struct Open {
    stream: Stream,
    record: Option<Record>,
    worker: Arc<Worker>,
}

enum Stream {
    Plain(TcpStream),
    Tunnel { stream: TunnelStream, held: BytesMut },
}

impl Line<'_> {
    /// Asks one question. A connection that was open before may have been closed by the resolver meanwhile: then a new one
    /// is tried, since asking twice does no harm.
    async fn ask(&mut self, packet: &[u8]) -> Result<Vec<u8>, String> {
        let was_open = self.open.is_some();
        match self.ask_once(packet).await {
            Err(_) if was_open => {
                self.close(None);
                self.ask_once(packet).await
            }
            result => result,
        }
    }

    async fn ask_once(&mut self, packet: &[u8]) -> Result<Vec<u8>, String> {
        let words = |e: io::Error| format!("{}: {e}", self.resolver);
        let framed = Bytes::from(framed(packet).map_err(words)?);
        if self.open.is_none() {
            self.open = Some(self.connect().await?);
        }
        let Some(open) = &mut self.open else { return Err("not connected".to_owned()) };
        open.ask(packet, framed).await.map_err(words)
    }

    async fn connect(&self) -> Result<Open, String> {
        let (mut record, connected) = self.connected(Joining::Never).await?;
        let stream = match connected {
            Connected::Plain(tcp) => Stream::Plain(tcp),
            Connected::Tunnel(stream) => Stream::Tunnel { stream, held: BytesMut::new() },
            Connected::Joined(_) => return Err("joined where only a relay may be".to_owned()),
        };
        let worker = self.server.worker.clone();
        worker.recorder.opened(&mut record, true);
        Ok(Open { stream, record: Some(record), worker })
    }

    /// A connection to the resolver, as the outbound proxy makes them. A refusal is written here.
    async fn connected(&self, joining: Joining) -> Result<(Record, Connected), String> {
        let (worker, pod) = (&self.server.worker, &self.server.pod);
        let mut record = Record::outbound(pod, self.peer, self.resolver);
        match reach(worker, pod, self.peer, self.resolver, &mut record, joining).await {
            Ok(connected) => Ok((record, connected)),
            Err(refusal) => {
                let words = refusal.to_string();
                record.refuse(refusal);
                worker.recorder.write(record);
                Err(words)
            }
        }
    }

    fn close(&mut self, error: Option<&str>) {
        if let (Some(mut open), Some(error)) = (self.open.take(), error)
            && let Some(record) = &mut open.record
        {
            record.refuse(model::Refusal::new(model::Reason::ConnectionBroken, error));
        }
    }

    /// Hands the rest of the client's connection to the resolver.
    async fn relay(mut self, client: ResetOnDrop, first: &[u8]) {
        self.close(None);
        let Ok((mut record, connected)) = self.connected(Joining::Allowed).await else { return };
        let (worker, pod) = (&self.server.worker, &self.server.pod);
        let joined = async {
            let mut framed = &*framed(first).map_err(broken)?;
            let ends = match connected {
                Connected::Plain(mut tcp) => {
                    tcp.write_all_buf(&mut framed).await.map_err(broken)?;
                    Ends::Sockets(client.take(), tcp)
                }
                Connected::Joined(mut joined) => {
                    joined.app.write_all_buf(&mut framed).await.map_err(broken)?;
                    Ends::Joined(client.take(), joined)
                }
                Connected::Tunnel(mut stream) => {
                    let first = Bytes::copy_from_slice(framed);
                    stream.send.send_data(first, false).map_err(broken)?;
                    Ends::Tunnel(client.take(), stream)
                }
            };
            Ok((live(pod, &ends, &record), ends))
        };
        let joined = joined.await;
        finish(worker, joined, &mut record).await;
        worker.recorder.write(record);
    }
}

fn broken(e: impl std::fmt::Display) -> model::Refusal {
    model::Refusal::new(model::Reason::ConnectionBroken, e.to_string())
}

impl Open {
    async fn ask(&mut self, packet: &[u8], framed: Bytes) -> io::Result<Vec<u8>> {
        let sent = framed.len() as u64;
        self.stream.send(framed).await?;
        if let Some(record) = &self.record {
            record.moved.up.fetch_add(sent, Ordering::Relaxed);
        }
        loop {
            let reply = self.stream.receive().await?;
            if let Some(record) = &self.record {
                record.moved.down.fetch_add(2 + reply.len() as u64, Ordering::Relaxed);
            }
            if wire::is_answer(packet, &reply) {
                return Ok(reply);
            }
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if let Some(record) = self.record.take() {
            self.worker.recorder.write(record);
        }
    }
}

impl Stream {
    async fn send(&mut self, message: Bytes) -> io::Result<()> {
        match self {
            Self::Plain(tcp) => tcp.write_all(&message).await,
            // One question is under way at a time: what HTTP/2 holds back is one message.
            Self::Tunnel { stream, .. } => {
                stream.send.send_data(message, false).map_err(io::Error::other)
            }
        }
    }

    async fn receive(&mut self) -> io::Result<Vec<u8>> {
        let (stream, held) = match self {
            Self::Plain(tcp) => {
                return read(tcp).await?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into());
            }
            Self::Tunnel { stream, held } => (stream, held),
        };
        loop {
            if let Some(length) = held.first_chunk::<2>() {
                let length = usize::from(u16::from_be_bytes(*length));
                if held.len() >= 2 + length {
                    held.advance(2);
                    return Ok(held.split_to(length).to_vec());
                }
            }
            let chunk = stream.receive.data().await.ok_or(io::ErrorKind::UnexpectedEof)?;
            let chunk = chunk.map_err(io::Error::other)?;
            let window = stream.receive.flow_control();
            window.release_capacity(chunk.len()).map_err(io::Error::other)?;
            held.extend_from_slice(&chunk);
        }
    }
}
