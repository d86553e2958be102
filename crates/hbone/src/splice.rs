//! Moving bytes from one CONNECT stream to another, as a proxy between two tunnels does.
//!
//! Frames are handed on without a copy; the next is taken when the one before has found room in the other tunnel, so that
//! memory is bounded by the windows of both. Half-close is kept, a reset is passed on as a reset.
//!
//! A peer that has ended its direction and then resets the stream wants nothing more (RFC 9113, 8.1): what it has said still
//! goes out, and the other end hears of the rest afterwards.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};

use crate::io::TunnelIo;
use crate::relay::{Ended, EndedBy, Transfer};

/// Relays between two streams until both directions end or `stop` does; what `stop` said comes back beside the end. `moved`
/// counts as up what the first sends.
pub fn relay_streams<S: Future + Unpin>(
    first: TunnelIo,
    second: TunnelIo,
    moved: Arc<Transfer>,
    mut stop: S,
) -> impl Future<Output = (Ended, Option<S::Output>)> {
    let (first_send, first_receive, first_unread, first_slot) = first.into_parts();
    let (second_send, second_receive, second_unread, second_slot) = second.into_parts();
    let mut up = Leg::new(first_receive, first_unread, second_send);
    let mut down = Leg::new(second_receive, second_unread, first_send);
    let slots = (first_slot, second_slot);
    std::future::poll_fn(move |cx| {
        let _counted = &slots;
        let (ended, word) = if let Poll::Ready(word) = Pin::new(&mut stop).poll(cx) {
            (Ended { by: EndedBy::Stopped, error: None }, Some(word))
        } else {
            let sent = step(cx, &mut up, &mut down, &moved.up);
            let ended = match sent {
                Poll::Ready(Err(e)) => e.ended(EndedBy::Socket, EndedBy::Peer),
                sent => match (step(cx, &mut down, &mut up, &moved.down), sent) {
                    (Poll::Ready(Err(e)), _) => e.ended(EndedBy::Peer, EndedBy::Socket),
                    (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => {
                        return Poll::Ready((both_ended(&mut up, &mut down), None));
                    }
                    _ => return Poll::Pending,
                },
            };
            (ended, None)
        };
        up.to.send_reset(Reason::CANCEL);
        down.to.send_reset(Reason::CANCEL);
        Poll::Ready((ended, word))
    })
}

/// Moves one direction on. Where its receiver wants nothing more, but has come to its own end, the other direction goes on.
fn step(
    cx: &mut Context<'_>,
    leg: &mut Leg,
    other: &mut Leg,
    moved: &AtomicU64,
) -> Poll<Result<(), LegError>> {
    match leg.poll(cx, moved) {
        Poll::Ready(Err(LegError::To(e))) if other.take_rest(cx) => {
            leg.unwanted = Some(e);
            leg.done = true;
            // What the other waits for has been taken for it.
            cx.waker().wake_by_ref();
            Poll::Ready(Ok(()))
        }
        moved => moved,
    }
}

/// How it ended when there is nothing more to move. Streams of which an end is left open are reset when they are dropped,
/// behind what is on its way in them.
fn both_ended(up: &mut Leg, down: &mut Leg) -> Ended {
    match (up.unwanted.take(), down.unwanted.take()) {
        (Some(e), _) => LegError::To(e).ended(EndedBy::Socket, EndedBy::Peer),
        (None, Some(e)) => LegError::To(e).ended(EndedBy::Peer, EndedBy::Socket),
        (None, None) => Ended { by: EndedBy::Both, error: None },
    }
}

/// One direction.
struct Leg {
    from: RecvStream,
    to: SendStream<Bytes>,
    /// Taken from the one and not yet given to the other.
    held: Bytes,
    /// How much of `held` the sender has not been given back room for.
    owed: usize,
    /// All that was left in the one when it was reset.
    rest: VecDeque<Bytes>,
    done: bool,
    /// The other takes nothing more, and there was more.
    unwanted: Option<h2::Error>,
}

enum LegError {
    From(h2::Error),
    To(h2::Error),
}

impl LegError {
    fn ended(self, from: EndedBy, to: EndedBy) -> Ended {
        match self {
            Self::From(e) => Ended { by: from, error: Some(io::Error::other(e)) },
            Self::To(e) => Ended { by: to, error: Some(io::Error::other(e)) },
        }
    }
}

impl Leg {
    fn new(from: RecvStream, unread: Bytes, mut to: SendStream<Bytes>) -> Self {
        to.reserve_capacity(unread.len());
        Self { from, to, held: unread, owed: 0, rest: VecDeque::new(), done: false, unwanted: None }
    }

    /// Of a stream that was reset: takes what came before. True: its end came before, too. Else it was cut off.
    fn take_rest(&mut self, cx: &mut Context<'_>) -> bool {
        while !self.done {
            match self.from.poll_data(cx) {
                Poll::Ready(Some(Ok(bytes))) => self.rest.push_back(bytes),
                Poll::Ready(None) => return true,
                Poll::Ready(Some(Err(_))) | Poll::Pending => return false,
            }
        }
        true
    }

    fn poll(&mut self, cx: &mut Context<'_>, moved: &AtomicU64) -> Poll<Result<(), LegError>> {
        while !self.done {
            if self.held.is_empty() {
                let next = match self.rest.pop_front() {
                    Some(bytes) => Some(Ok(bytes)),
                    None => ready!(self.from.poll_data(cx)),
                };
                match next {
                    Some(Ok(bytes)) => {
                        self.owed = bytes.len();
                        self.to.reserve_capacity(bytes.len());
                        self.held = bytes;
                    }
                    Some(Err(e)) => return Poll::Ready(Err(LegError::From(e))),
                    None => {
                        // An error: the receiver has reset after its own end, so that it wants nothing more.
                        let _ = self.to.send_data(Bytes::new(), true);
                        self.done = true;
                    }
                }
                continue;
            }
            let mut room = self.to.capacity();
            if room == 0 {
                room = match ready!(self.to.poll_capacity(cx)) {
                    Some(room) => room.map_err(LegError::To)?,
                    None => return Poll::Ready(Err(LegError::To(Reason::CANCEL.into()))),
                };
            }
            if room == 0 {
                continue;
            }
            let piece = self.held.split_to(room.min(self.held.len()));
            let length = piece.len();
            self.to.send_data(piece, false).map_err(LegError::To)?;
            moved.fetch_add(length as u64, Ordering::Relaxed);
            let owed = length.min(self.owed);
            self.owed -= owed;
            // An error: the stream is gone, which the next read says.
            let _ = self.from.flow_control().release_capacity(owed);
        }
        Poll::Ready(Ok(()))
    }
}
