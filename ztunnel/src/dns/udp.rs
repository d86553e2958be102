//! Questions by UDP: answered on the spot, or asked again from a socket of their own.
//!
//! Invariant: an answer of the resolver is passed on only if it came from the resolver, to the port that asked, with the
//! id and the question of what was asked.

use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use agent::metrics::DnsProtocol;
use net::capture::MARK_PROXY;
use net::datagram::{Replies, connect, receive};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::sync::OwnedSemaphorePermit;

use super::{Decided, PATIENCE, Question, Server, wire};
use crate::worker::Busy;

/// Questions taken before others on this thread get their turn. Each takes some 10 µs.
const BATCH: usize = 32;
/// Pause after the socket failed for want of memory: trying at once would burn the core.
const PAUSE: Duration = Duration::from_millis(10);

thread_local! {
    /// Where datagrams land; no question holds a buffer while it waits.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; wire::MAX_MESSAGE]);
}

/// Takes questions until the pod leaves.
pub(super) async fn serve(server: Arc<Server>, socket: Arc<UdpSocket>, replies: Arc<Replies>) {
    let pod = server.pod.clone();
    // A question that was received is answered before the process goes.
    let _receiving = Busy::new(&server.worker.shared);
    let left = pod.left();
    tokio::pin!(left);
    loop {
        let ready = tokio::select! {
            ready = socket.readable() => ready,
            () = &mut left => return,
        };
        if ready.is_err() {
            return;
        }
        for _ in 0..BATCH {
            match take(&server, &socket, &replies) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                // Dropped; there may be more.
                Err(e) if e.kind() == io::ErrorKind::InvalidData => {}
                Err(error) => {
                    tracing::warn!(pod = %pod.name, %error, "DNS questions cannot be received");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
        tokio::task::yield_now().await;
    }
}

/// Receives one datagram and answers it, or starts a task that will.
fn take(server: &Arc<Server>, socket: &UdpSocket, replies: &Arc<Replies>) -> io::Result<()> {
    BUFFER.with_borrow_mut(|buffer| {
        let got = socket.try_io(Interest::READABLE, || receive(socket, buffer))?;
        let packet = buffer.get(..got.length).unwrap_or_default();
        let Some(resolver) = server.resolver_of(got.to) else { return Ok(()) };
        match server.decide(packet, DnsProtocol::Udp, resolver) {
            Decided::Ignore => {}
            Decided::Answer(bytes) => say(replies, got.to, got.from, &bytes),
            Decided::Forward(question) => match Places::take(server) {
                Some(places) => {
                    let (server, replies) = (server.clone(), replies.clone());
                    let packet = packet.to_vec();
                    let busy = Busy::new(&server.worker.shared);
                    tokio::spawn(async move {
                        if let Some(bytes) = forward(&server, question, &packet).await {
                            // In the name that the question was sent to, as far as we know it.
                            say(&replies, got.to, got.from, &bytes);
                        }
                        drop((places, busy));
                    });
                }
                None => {
                    if let Some(bytes) = server.refused(&question, packet) {
                        say(replies, got.to, got.from, &bytes);
                    }
                }
            },
        }
        Ok(())
    })
}

/// Room for one more question of this pod.
struct Places {
    _of_pod: OwnedSemaphorePermit,
    _of_all: OwnedSemaphorePermit,
}

impl Places {
    fn take(server: &Server) -> Option<Self> {
        let of_pod = server.waiting.clone().try_acquire_owned().ok()?;
        let of_all = server.worker.questions.clone().try_acquire_owned().ok()?;
        Some(Self { _of_pod: of_pod, _of_all: of_all })
    }
}

async fn forward(server: &Server, question: Question, packet: &[u8]) -> Option<Vec<u8>> {
    let began = Instant::now();
    question.metrics.upstream(question.kind, question.protocol);
    let outcome = ask(server, packet, question.resolver).await;
    server.forwarded(&question, packet, began.elapsed(), outcome)
}

/// Asks the resolver. The kernel takes answers from it alone; those that do not fit the question are passed over, for
/// whoever guesses must not win by being first.
async fn ask(server: &Server, packet: &[u8], resolver: SocketAddr) -> Result<Vec<u8>, String> {
    let words = |e: io::Error| format!("{resolver}: {e}");
    let asked = async {
        // The thread stays there: the next question is likely of the same pod.
        server.pod.netns.enter()?;
        let socket = UdpSocket::from_std(connect(&server.pod.netns, resolver, MARK_PROXY)?)?;
        socket.send(packet).await?;
        loop {
            // "Nobody listens there" does not make a socket readable.
            let ready = socket.ready(Interest::READABLE | Interest::ERROR).await?;
            if ready.is_error()
                && let Ok(error) = socket.try_io(Interest::ERROR, || pending_error(&socket))
            {
                return Err(error);
            }
            let got = BUFFER.with_borrow_mut(|buffer| {
                let length = socket.try_recv(buffer)?;
                let reply = buffer.get(..length).unwrap_or_default();
                Ok::<_, io::Error>(wire::is_answer(packet, reply).then(|| reply.to_vec()))
            });
            match got {
                Ok(Some(reply)) => return Ok(reply),
                Ok(None) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
        }
    };
    match tokio::time::timeout(PATIENCE, asked).await {
        Ok(result) => result.map_err(words),
        Err(_) => Err(format!("{resolver} did not answer within {PATIENCE:?}")),
    }
}

fn pending_error(socket: &UdpSocket) -> io::Result<io::Error> {
    socket.take_error()?.ok_or_else(|| io::ErrorKind::WouldBlock.into())
}

fn say(replies: &Replies, resolver: SocketAddr, asker: SocketAddr, bytes: &[u8]) {
    if let Err(error) = replies.send(resolver, asker, bytes) {
        tracing::debug!(target: "dns", %resolver, %asker, %error, "the answer cannot be sent");
    }
}
