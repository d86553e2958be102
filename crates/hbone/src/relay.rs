//! Moving bytes between an application's socket and a tunnel, or another socket.
//!
//! One task moves both directions; it holds no buffer while nothing moves. Half-close is kept: the end of
//! one direction is passed on and the other goes on. A reset is passed on as a reset.
//!
//! Cost per request of 100 bytes and side: one `recv`, one `send`, no allocation of its own (reads take
//! slices of a per-thread arena). Per 64 KiB in bulk: a quarter of a `recv` and of a `writev`.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use socket2::SockRef;
use tokio::io::AsyncWrite;
use tokio::net::TcpStream;

use crate::RELAY_CHUNK;

/// A read is worth a fresh arena below this much room: bulk reads stay large, and small ones reuse the
/// same memory a thousand times before they come here.
const ARENA_LOW: usize = 128 << 10;
/// Pieces handed to one `writev`; the kernel's limit is 1024, more than 64 gains nothing.
const MAX_SLICES: usize = 64;

thread_local! {
    /// Where reads of this thread land. Slices of it travel into h2 without a copy.
    static ARENA: RefCell<BytesMut> = RefCell::new(BytesMut::new());
}

/// Bytes moved so far; read by metrics and `/connections` while the connection lives.
#[derive(Debug, Default)]
pub struct Transfer {
    /// From the first socket (the application's, or the client's) outwards.
    pub up: AtomicU64,
    /// Back to it.
    pub down: AtomicU64,
}

impl Transfer {
    pub fn totals(&self) -> (u64, u64) {
        (self.up.load(Ordering::Relaxed), self.down.load(Ordering::Relaxed))
    }
}

/// How a relayed connection ended.
#[derive(Debug)]
pub struct Ended {
    pub by: EndedBy,
    /// The error behind it, if it was not a normal end.
    pub error: Option<io::Error>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndedBy {
    /// Both directions finished.
    Both,
    /// The first socket broke.
    Socket,
    /// The tunnel, or the second socket, broke.
    Peer,
    /// The `stop` future fired.
    Stopped,
}

/// Relays between a socket and a CONNECT stream until both directions end or `stop` does; what `stop`
/// said comes back beside the end.
///
/// Not an `async fn`: that would keep a copy of its arguments, and this future is what an idle
/// connection costs.
pub fn relay_tunnel<S: Future + Unpin>(
    mut tcp: TcpStream,
    mut send: SendStream<Bytes>,
    receive: RecvStream,
    moved: Arc<Transfer>,
    mut stop: S,
) -> impl Future<Output = (Ended, Option<S::Output>)> {
    let mut up = Up::Reading;
    let mut down = Down { receive, chunks: VecDeque::new(), held: 0, state: DownState::Moving };
    std::future::poll_fn(move |cx| {
        if let Poll::Ready(word) = Pin::new(&mut stop).poll(cx) {
            send.send_reset(Reason::CANCEL);
            reset(&tcp);
            return Poll::Ready((Ended { by: EndedBy::Stopped, error: None }, Some(word)));
        }
        let first = up.poll(cx, &mut tcp, &mut send, &moved);
        let ended = match first {
            Poll::Ready(Err(ended)) => ended,
            first => match (down.poll(cx, &mut tcp, &moved), first) {
                (Poll::Ready(Err(ended)), _) => ended,
                (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => match up.ended() {
                    ended if ended.by == EndedBy::Both => return Poll::Ready((ended, None)),
                    broken => broken,
                },
                _ => return Poll::Pending,
            },
        };
        send.send_reset(Reason::CONNECT_ERROR);
        reset(&tcp);
        Poll::Ready((ended, None))
    })
}

/// The same between two sockets.
pub fn relay_tcp<S: Future + Unpin>(
    mut a: TcpStream,
    mut b: TcpStream,
    moved: Arc<Transfer>,
    mut stop: S,
) -> impl Future<Output = (Ended, Option<S::Output>)> {
    let (mut up, mut down) = (Leg::default(), Leg::default());
    std::future::poll_fn(move |cx| {
        if let Poll::Ready(word) = Pin::new(&mut stop).poll(cx) {
            reset(&a);
            reset(&b);
            return Poll::Ready((Ended { by: EndedBy::Stopped, error: None }, Some(word)));
        }
        let ended = match up.poll(cx, &mut a, &mut b, &moved.up) {
            Poll::Ready(Err(e)) => e.ended(EndedBy::Socket, EndedBy::Peer),
            first => match (down.poll(cx, &mut b, &mut a, &moved.down), first) {
                (Poll::Ready(Err(e)), _) => e.ended(EndedBy::Peer, EndedBy::Socket),
                (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => {
                    return Poll::Ready((Ended { by: EndedBy::Both, error: None }, None));
                }
                _ => return Poll::Pending,
            },
        };
        reset(&a);
        reset(&b);
        Poll::Ready((ended, None))
    })
}

/// Makes the coming close a RST: the other side must not take a cut for an end.
fn reset(tcp: &TcpStream) {
    let _ = SockRef::from(tcp).set_linger(Some(Duration::ZERO));
}

/// Reads what is there, at most one chunk. Empty at end of stream.
fn poll_read(cx: &mut Context<'_>, tcp: &mut TcpStream) -> Poll<io::Result<Bytes>> {
    ARENA.with_borrow_mut(|arena| {
        if arena.capacity() - arena.len() < ARENA_LOW {
            arena.reserve(RELAY_CHUNK);
        }
        ready!(tokio_util::io::poll_read_buf(Pin::new(tcp), cx, arena))?;
        Poll::Ready(Ok(arena.split().freeze()))
    })
}

/// Socket to tunnel.
enum Up {
    Reading,
    /// Read, and waiting for room in the tunnel.
    Sending(Bytes),
    Done,
    /// The peer takes nothing more, and there was more. What it has sent still goes out; whether it ended there or
    /// broke off is for the other direction to find out.
    Unwanted(h2::Error),
}

impl Up {
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        tcp: &mut TcpStream,
        send: &mut SendStream<Bytes>,
        moved: &Transfer,
    ) -> Poll<Result<(), Ended>> {
        loop {
            match self {
                Self::Reading => match ready!(poll_read(cx, tcp)) {
                    Ok(bytes) if bytes.is_empty() => {
                        // An error here: the peer has reset the stream. After its own end that is how a server says that
                        // it wants nothing more (RFC 9113, 8.1; Envoy does), and nothing was kept from it. Without its
                        // end it is a break, which the other direction sees.
                        let _ = send.send_data(Bytes::new(), true);
                        *self = Self::Done;
                    }
                    Ok(bytes) => {
                        send.reserve_capacity(bytes.len());
                        *self = Self::Sending(bytes);
                    }
                    Err(e) => {
                        return Poll::Ready(Err(Ended { by: EndedBy::Socket, error: Some(e) }));
                    }
                },
                Self::Sending(bytes) => {
                    let mut room = send.capacity();
                    if room == 0 {
                        room = match ready!(send.poll_capacity(cx)) {
                            Some(Ok(room)) => room,
                            Some(Err(e)) => {
                                *self = Self::Unwanted(e);
                                continue;
                            }
                            None => {
                                *self = Self::Unwanted(Reason::CANCEL.into());
                                continue;
                            }
                        };
                    }
                    if room == 0 {
                        continue;
                    }
                    let piece = bytes.split_to(room.min(bytes.len()));
                    let length = piece.len() as u64;
                    if let Err(e) = send.send_data(piece, false) {
                        *self = Self::Unwanted(e);
                        continue;
                    }
                    moved.up.fetch_add(length, Ordering::Relaxed);
                    if bytes.is_empty() {
                        *self = Self::Reading;
                    }
                }
                // Nothing to send any more, but a reset of the peer must still be noticed.
                Self::Done | Self::Unwanted(_) => return Poll::Ready(Ok(())),
            }
        }
    }

    /// The end, once the other direction has come to its own.
    fn ended(&mut self) -> Ended {
        match std::mem::replace(self, Self::Done) {
            Self::Unwanted(e) => peer(e),
            _ => Ended { by: EndedBy::Both, error: None },
        }
    }
}

/// Tunnel to socket.
struct Down {
    receive: RecvStream,
    chunks: VecDeque<Bytes>,
    /// Bytes in `chunks`.
    held: usize,
    state: DownState,
}

#[derive(PartialEq)]
enum DownState {
    Moving,
    /// The peer has finished; what is in `chunks` goes out, then the socket's write side closes.
    Finishing,
    Done,
}

impl Down {
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        tcp: &mut TcpStream,
        moved: &Transfer,
    ) -> Poll<Result<(), Ended>> {
        let socket = |e| Ended { by: EndedBy::Socket, error: Some(e) };
        loop {
            if self.state == DownState::Done {
                return Poll::Ready(Ok(()));
            }
            self.gather(cx)?;
            if self.chunks.is_empty() {
                if self.state == DownState::Moving {
                    return Poll::Pending;
                }
                ready!(Pin::new(&mut *tcp).poll_shutdown(cx)).map_err(socket)?;
                self.state = DownState::Done;
                continue;
            }
            let mut n = ready!(self.poll_write(cx, tcp)).map_err(socket)?;
            moved.down.fetch_add(n as u64, Ordering::Relaxed);
            self.held -= n;
            // Only now may the peer send more: memory stays bounded by the windows.
            self.receive.flow_control().release_capacity(n).map_err(peer)?;
            while let Some(front) = self.chunks.front_mut() {
                let step = n.min(front.len());
                front.advance(step);
                n -= step;
                if !front.is_empty() {
                    break;
                }
                self.chunks.pop_front();
            }
            if self.chunks.is_empty() && self.chunks.capacity() > 4 {
                self.chunks = VecDeque::new();
            }
        }
    }

    /// Takes what the tunnel has ready, up to one chunk's worth.
    fn gather(&mut self, cx: &mut Context<'_>) -> Result<(), Ended> {
        while self.state == DownState::Moving && self.held < RELAY_CHUNK {
            match self.receive.poll_data(cx) {
                Poll::Ready(Some(Ok(bytes))) => {
                    self.held += bytes.len();
                    if !bytes.is_empty() {
                        self.chunks.push_back(bytes);
                    }
                }
                Poll::Ready(Some(Err(e))) => return Err(peer(e)),
                Poll::Ready(None) => self.state = DownState::Finishing,
                Poll::Pending => break,
            }
        }
        Ok(())
    }

    fn poll_write(&self, cx: &mut Context<'_>, tcp: &mut TcpStream) -> Poll<io::Result<usize>> {
        let tcp = Pin::new(tcp);
        if self.chunks.len() == 1 {
            return tcp.poll_write(cx, &self.chunks[0]);
        }
        let empty: &[u8] = &[];
        let mut slices = [IoSlice::new(empty); MAX_SLICES];
        let count = self.chunks.len().min(MAX_SLICES);
        for (slice, chunk) in slices.iter_mut().zip(&self.chunks) {
            *slice = IoSlice::new(chunk);
        }
        tcp.poll_write_vectored(cx, &slices[..count])
    }
}

fn peer(e: h2::Error) -> Ended {
    Ended { by: EndedBy::Peer, error: Some(io::Error::other(e)) }
}

/// One direction between two sockets.
#[derive(Default)]
struct Leg {
    held: Bytes,
    /// End of stream was read.
    finished: bool,
    done: bool,
}

enum LegError {
    Read(io::Error),
    Write(io::Error),
}

impl LegError {
    fn ended(self, reader: EndedBy, writer: EndedBy) -> Ended {
        match self {
            Self::Read(e) => Ended { by: reader, error: Some(e) },
            Self::Write(e) => Ended { by: writer, error: Some(e) },
        }
    }
}

impl Leg {
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut TcpStream,
        to: &mut TcpStream,
        moved: &AtomicU64,
    ) -> Poll<Result<(), LegError>> {
        while !self.done {
            if !self.held.is_empty() {
                let n = ready!(Pin::new(&mut *to).poll_write(cx, &self.held))
                    .map_err(LegError::Write)?;
                moved.fetch_add(n as u64, Ordering::Relaxed);
                self.held.advance(n);
                if self.held.is_empty() {
                    // Let go of the arena.
                    self.held = Bytes::new();
                }
            } else if self.finished {
                ready!(Pin::new(&mut *to).poll_shutdown(cx)).map_err(LegError::Write)?;
                self.done = true;
            } else {
                self.held = ready!(poll_read(cx, from)).map_err(LegError::Read)?;
                self.finished = self.held.is_empty();
            }
        }
        Poll::Ready(Ok(()))
    }
}
