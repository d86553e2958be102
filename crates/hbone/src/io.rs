//! A CONNECT stream as bytes to read and write, for protocols that are spoken inside it.
//!
//! A frame's bytes are copied once into the reader's buffer and once out of the writer's; both are windows of HTTP/2, so that
//! a reader that stops stops the peer, and a writer waits for room. What was read ahead can be given back.
//!
//! Invariants: the end of one direction leaves the other open; a stream that is dropped before both have ended is reset, so
//! that the peer never takes a cut for an end.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::client::{Slot, TunnelStream};

/// Where written bytes wait for the tunnel: a block serves many small messages, and a large one gets a block of its own.
const BLOCK: usize = 64 << 10;

thread_local! {
    static WRITTEN: RefCell<BytesMut> = RefCell::new(BytesMut::new());
}

/// See the module.
#[derive(Debug)]
pub struct TunnelIo {
    send: SendStream<Bytes>,
    receive: RecvStream,
    /// Received and not yet read.
    unread: Bytes,
    /// How much of `unread` the peer has not been given back room for.
    owed: usize,
    /// Keeps the stream counted in the tunnel that it was opened on.
    slot: Option<Slot>,
}

impl TunnelIo {
    /// A stream that a peer opened and that was accepted.
    pub fn accepted(send: SendStream<Bytes>, receive: RecvStream) -> Self {
        Self { send, receive, unread: Bytes::new(), owed: 0, slot: None }
    }

    /// A stream that we opened.
    pub fn opened(stream: TunnelStream) -> Self {
        let (send, receive, slot) = stream.into_parts();
        Self { send, receive, unread: Bytes::new(), owed: 0, slot: Some(slot) }
    }

    /// Waits until there is more to read than `seen` bytes, and shows all of it. Nothing is taken: the next read begins
    /// with these bytes. `None`: the peer has ended its direction and nothing more comes.
    pub fn poll_peek(
        &mut self,
        cx: &mut Context<'_>,
        seen: usize,
    ) -> Poll<io::Result<Option<&[u8]>>> {
        while self.unread.len() <= seen {
            let Some(more) = ready!(self.receive.poll_data(cx)).transpose().map_err(error)? else {
                return Poll::Ready(Ok(None));
            };
            self.owed += more.len();
            if self.unread.is_empty() {
                self.unread = more;
            } else {
                // Nobody else has these bytes, so that they stay where they are and room grows by doubling: a peer that sends
                // them one by one costs no more than one that does not.
                let mut all = BytesMut::from(std::mem::take(&mut self.unread));
                all.extend_from_slice(&more);
                self.unread = all.freeze();
            }
        }
        Poll::Ready(Ok(Some(&self.unread[..])))
    }

    /// Puts bytes that were read back to the front.
    pub fn unread(&mut self, bytes: Bytes) {
        if self.unread.is_empty() {
            self.unread = bytes;
        } else if !bytes.is_empty() {
            self.unread = [&bytes[..], &self.unread[..]].concat().into();
        }
    }

    /// Resolves when the peer has reset the stream, or its connection broke: for who does not read, and would not hear of it.
    pub fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        self.send.poll_reset(cx).map(|reason| match reason {
            Ok(reason) => error(reason.into()),
            Err(e) => error(e),
        })
    }

    /// Ends both directions at once, as a reset.
    pub fn reset(&mut self) {
        self.send.send_reset(Reason::CANCEL);
    }

    /// The two directions, what was read ahead, and the guard that keeps the stream counted. Room for what was read ahead is
    /// given back to the peer here: whoever takes these bytes holds them.
    pub fn into_parts(mut self) -> (SendStream<Bytes>, RecvStream, Bytes, impl Sized + use<>) {
        let owed = std::mem::take(&mut self.owed);
        self.give_back(owed);
        (self.send, self.receive, self.unread, self.slot)
    }

    fn give_back(&mut self, bytes: usize) {
        if bytes > 0 {
            // An error: the stream is gone, and its window with it.
            let _ = self.receive.flow_control().release_capacity(bytes);
        }
    }

    fn write(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
        total: usize,
    ) -> Poll<io::Result<usize>> {
        if total == 0 {
            return Poll::Ready(Ok(0));
        }
        self.send.reserve_capacity(total);
        let mut room = self.send.capacity();
        while room == 0 {
            room = match ready!(self.send.poll_capacity(cx)) {
                Some(room) => room.map_err(error)?,
                None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            };
        }
        let taken = room.min(total);
        self.send.send_data(copy(bufs, taken), false).map_err(error)?;
        Poll::Ready(Ok(taken))
    }
}

/// The first `length` bytes of the buffers.
fn copy(bufs: &[IoSlice<'_>], length: usize) -> Bytes {
    WRITTEN.with_borrow_mut(|block| {
        if block.capacity() < length {
            block.reserve(length.max(BLOCK));
        }
        let mut left = length;
        for buf in bufs {
            let part = left.min(buf.len());
            block.extend_from_slice(&buf[..part]);
            left -= part;
        }
        block.split().freeze()
    })
}

fn error(e: h2::Error) -> io::Error {
    if e.is_io() {
        return e.into_io().unwrap_or_else(|| io::ErrorKind::BrokenPipe.into());
    }
    io::Error::new(io::ErrorKind::ConnectionReset, e)
}

impl AsyncRead for TunnelIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        while this.unread.is_empty() {
            match ready!(this.receive.poll_data(cx)) {
                Some(Ok(bytes)) => {
                    this.owed += bytes.len();
                    this.unread = bytes;
                }
                Some(Err(e)) => return Poll::Ready(Err(error(e))),
                None => return Poll::Ready(Ok(())),
            }
        }
        let taken = buf.remaining().min(this.unread.len());
        buf.put_slice(&this.unread[..taken]);
        this.unread.advance(taken);
        if this.unread.is_empty() {
            // Let go of the frame.
            this.unread = Bytes::new();
        }
        let owed = taken.min(this.owed);
        this.owed -= owed;
        this.give_back(owed);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for TunnelIo {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.write(cx, &[IoSlice::new(buf)], buf.len())
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let total = bufs.iter().map(|buf| buf.len()).sum();
        self.write(cx, bufs, total)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// What was written is with the tunnel, whose driver sends it.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // An error: the peer has reset the stream and wants nothing more. That is for the reader to find out.
        let _ = self.send.send_data(Bytes::new(), true);
        Poll::Ready(Ok(()))
    }
}
