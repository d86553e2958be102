//! Bodies on their way: a request's to an endpoint and its mirrors, an answer's to the client.
//!
//! Frames are handed on as they come, and the next is asked for when the receiver has room: nothing is gathered, whatever
//! the size. gRPC messages are counted by their length prefixes.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use engine::http::strip_trailers;
use futures_util::task::AtomicWaker;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use model::{Reason, Refusal};
use tokio::sync::mpsc;
use tokio::time::Sleep;

use super::exchange::Exchange;
use super::progress::Owed;
use super::timed::TimedBody;
use crate::config::Waits;
use crate::upstream::InUse;

/// Why a body, or an answer, breaks off.
#[derive(Debug)]
pub(crate) struct BodyError(Box<dyn std::error::Error + Send + Sync>);

impl std::fmt::Display for BodyError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for BodyError {
    /// The cause itself: hyper looks for HTTP/2's errors among the causes.
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&*self.0)
    }
}

impl From<hyper::Error> for BodyError {
    fn from(error: hyper::Error) -> Self {
        Self(error.into())
    }
}

impl From<&str> for BodyError {
    fn from(words: &str) -> Self {
        Self(words.into())
    }
}

impl BodyError {
    /// hyper makes a reset of this: of the stream in HTTP/2, of the connection in HTTP/1.
    pub(crate) fn reset() -> Self {
        Self(h2::Error::from(h2::Reason::CANCEL).into())
    }
}

/// What a mirror may be behind the request that it copies: then the mirror is given up, not the request held up.
const MIRROR_BYTES: usize = 256 << 10;
/// The same in frames.
const MIRROR_FRAMES: usize = 256;

/// The body of a request to an endpoint.
pub(crate) enum RequestBody {
    Empty,
    Client(Box<ClientBody>),
    Mirror(MirrorBody),
}

/// A client's body.
pub(crate) struct ClientBody {
    incoming: Incoming,
    counts: Arc<Counts>,
    messages: Option<Messages>,
    gate: Option<WaitForContinue>,
    mirrors: Vec<Copies>,
    _counted: Option<Arc<InUse>>,
}

/// What was counted of a request's body, and how it ended if not well.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) bytes: AtomicU64,
    pub(crate) messages: AtomicU64,
    /// The client's fault, whatever an endpoint made of half a request.
    pub(crate) fault: OnceLock<Refusal>,
}

impl RequestBody {
    pub(crate) fn is_empty(&self) -> bool {
        matches!(self, Self::Empty)
    }

    /// A client's body, and where it is counted. `grpc`: its messages as well.
    pub(crate) fn client(incoming: Incoming, grpc: bool) -> (Self, Option<Arc<Counts>>) {
        if incoming.is_end_stream() {
            return (Self::Empty, None);
        }
        let counts = Arc::<Counts>::default();
        let body = ClientBody {
            incoming,
            counts: counts.clone(),
            messages: grpc.then(Messages::default),
            gate: None,
            mirrors: Vec::new(),
            _counted: None,
        };
        (Self::Client(Box::new(body)), Some(counts))
    }

    /// Holds the body back until the endpoint says `100 Continue`, but not for long.
    pub(crate) fn wait_for_continue(&mut self) -> Option<Arc<Gate>> {
        let Self::Client(body) = self else { return None };
        let gate = Arc::<Gate>::default();
        let patience = Box::pin(tokio::time::sleep(Waits::CONTINUE));
        body.gate = Some(WaitForContinue { gate: gate.clone(), patience });
        Some(gate)
    }

    /// Keeps the request counted on its connection while there may be more of the body.
    pub(crate) fn keep(&mut self, counted: &Arc<InUse>) {
        match self {
            Self::Empty => {}
            Self::Client(body) => body._counted = Some(counted.clone()),
            Self::Mirror(body) => body._counted = Some(counted.clone()),
        }
    }

    /// A copy of the body for a mirror.
    pub(crate) fn copy(&mut self) -> Self {
        let Self::Client(body) = self else { return Self::Empty };
        let (send, frames) = mpsc::channel(MIRROR_FRAMES);
        let behind = Arc::new(AtomicUsize::new(0));
        let hint = body.incoming.size_hint();
        body.mirrors.push(Copies { send, behind: behind.clone() });
        Self::Mirror(MirrorBody { frames, behind, hint, ended: false, _counted: None })
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.get_mut() {
            Self::Empty => Poll::Ready(None),
            Self::Client(body) => body.poll(cx),
            Self::Mirror(body) => body.poll(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Client(body) => body.incoming.is_end_stream(),
            Self::Mirror(body) => body.ended,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Client(body) => body.incoming.size_hint(),
            Self::Mirror(body) => body.hint,
        }
    }
}

impl ClientBody {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Some(gate) = &mut self.gate {
            ready!(gate.poll(cx));
            self.gate = None;
        }
        let frame = match ready!(Pin::new(&mut self.incoming).poll_frame(cx)) {
            Some(Ok(frame)) => frame,
            Some(Err(e)) => {
                self.mirrors.clear();
                self.counts.fault.get_or_init(|| broke_off(&e));
                return Poll::Ready(Some(Err(e.into())));
            }
            None => {
                self.mirrors.drain(..).for_each(|copies| copies.end(None));
                return Poll::Ready(None);
            }
        };
        if let Some(bytes) = frame.data_ref() {
            self.counts.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            if let Some(messages) = &mut self.messages {
                self.counts.messages.fetch_add(messages.count(bytes), Ordering::Relaxed);
            }
            self.mirrors.retain(|copies| copies.add(bytes));
            if self.incoming.is_end_stream() {
                // Nobody asks again where the length was known.
                self.mirrors.drain(..).for_each(|copies| copies.end(None));
            }
            return Poll::Ready(Some(Ok(frame)));
        }
        let Ok(mut trailers) = frame.into_trailers() else {
            return Poll::Ready(Some(Err("a body's frame is neither data nor trailers".into())));
        };
        strip_trailers(&mut trailers);
        self.mirrors.drain(..).for_each(|copies| copies.end(Some(trailers.clone())));
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }
}

/// Why a client's body ended before its end: what came is no body, or nothing came any more.
fn broke_off(error: &hyper::Error) -> Refusal {
    let mut words = error.to_string();
    let mut unreadable = false;
    let mut cause = std::error::Error::source(error);
    while let Some(e) = cause {
        words = format!("{words}: {e}");
        let kind = e.downcast_ref::<io::Error>().map(io::Error::kind);
        unreadable |=
            matches!(kind, Some(io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData));
        unreadable |= e.downcast_ref::<h2::Error>().is_some_and(h2::Error::is_library);
        cause = e.source();
    }
    if unreadable {
        return Refusal::new(
            Reason::BadHttp,
            format!("the request's body cannot be read: {words}"),
        );
    }
    let words = format!("the client went away in the middle of its request: {words}");
    Refusal::new(Reason::ConnectionBroken, words)
}

/// Opened when an endpoint wants the body.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    open: AtomicBool,
    waker: AtomicWaker,
}

impl Gate {
    pub(crate) fn open(&self) {
        self.open.store(true, Ordering::Release);
        self.waker.wake();
    }
}

struct WaitForContinue {
    gate: Arc<Gate>,
    patience: Pin<Box<Sleep>>,
}

impl WaitForContinue {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.gate.waker.register(cx.waker());
        if self.gate.open.load(Ordering::Acquire) {
            return Poll::Ready(());
        }
        self.patience.as_mut().poll(cx)
    }
}

/// Where copies of a body's frames go.
struct Copies {
    send: mpsc::Sender<Piece>,
    behind: Arc<AtomicUsize>,
}

enum Piece {
    Data(Bytes),
    End(Option<HeaderMap>),
}

impl Copies {
    /// False: the mirror is too far behind, and cut off.
    fn add(&self, bytes: &Bytes) -> bool {
        let behind = self.behind.fetch_add(bytes.len(), Ordering::Relaxed);
        // A single frame above the limit is let through, or no large frame would ever be.
        let room = behind == 0 || behind + bytes.len() <= MIRROR_BYTES;
        room && self.send.try_send(Piece::Data(bytes.clone())).is_ok()
    }

    fn end(&self, trailers: Option<HeaderMap>) {
        // No room: the mirror ends without its end, as one that is cut off.
        let _ = self.send.try_send(Piece::End(trailers));
    }
}

/// A copy of a client's body. It fails when the original is cut off, or ran away from it.
pub(crate) struct MirrorBody {
    frames: mpsc::Receiver<Piece>,
    behind: Arc<AtomicUsize>,
    hint: SizeHint,
    ended: bool,
    _counted: Option<Arc<InUse>>,
}

impl MirrorBody {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        match ready!(self.frames.poll_recv(cx)) {
            Some(Piece::Data(bytes)) => {
                self.behind.fetch_sub(bytes.len(), Ordering::Relaxed);
                Poll::Ready(Some(Ok(Frame::data(bytes))))
            }
            Some(Piece::End(trailers)) => {
                self.ended = true;
                Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))))
            }
            None => Poll::Ready(Some(Err(
                "the mirror could not keep up, or the request broke off".into(),
            ))),
        }
    }
}

/// Counts gRPC messages: a flag, four bytes of length, and that many bytes.
#[derive(Debug, Default)]
pub(crate) struct Messages {
    /// Bytes of the message that are still to come.
    left: u64,
    /// Bytes of its prefix that were seen, and the length as far as it is known.
    seen: u8,
    length: u32,
}

impl Messages {
    const PREFIX: u8 = 5;

    /// How many messages begin in these bytes.
    pub(crate) fn count(&mut self, bytes: &[u8]) -> u64 {
        let (mut begun, mut rest) = (0, bytes);
        while !rest.is_empty() {
            if self.left > 0 {
                let part = usize::try_from(self.left).unwrap_or(usize::MAX).min(rest.len());
                self.left -= part as u64;
                rest = &rest[part..];
                continue;
            }
            if self.seen > 0 {
                self.length = self.length << 8 | u32::from(rest[0]);
            }
            self.seen += 1;
            rest = &rest[1..];
            if self.seen == Self::PREFIX {
                begun += 1;
                *self = Self { left: self.length.into(), ..Self::default() };
            }
        }
        begun
    }
}

/// The body of an answer.
pub(crate) enum ResponseBody {
    /// Of the proxy itself; the record is written already.
    Own(Option<Bytes>),
    /// Of an endpoint. The record is written when it has ended, however it does.
    Endpoint(Box<EndpointBody>),
    /// The same where the route says how long it may take.
    Timed(TimedBody),
}

pub(crate) struct EndpointBody {
    pub(crate) incoming: Incoming,
    pub(crate) exchange: Exchange,
    pub(crate) messages: Option<Messages>,
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.get_mut() {
            Self::Own(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Endpoint(body) => body.poll(cx),
            Self::Timed(body) => body.poll(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Own(bytes) => bytes.is_none(),
            Self::Endpoint(body) => body.incoming.is_end_stream(),
            Self::Timed(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Own(bytes) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
            Self::Endpoint(body) => body.incoming.size_hint(),
            Self::Timed(body) => body.size_hint(),
        }
    }
}

/// The body of an answer, and that the answer is owed until hyper has taken all of it.
pub(crate) struct Owing {
    body: ResponseBody,
    _owed: Option<Owed>,
}

impl Owing {
    pub(super) fn new(body: ResponseBody, owed: Option<Owed>) -> Self {
        Self { body, _owed: owed }
    }
}

impl Body for Owing {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        Pin::new(&mut self.get_mut().body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl EndpointBody {
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match ready!(Pin::new(&mut self.incoming).poll_frame(cx)) {
            Some(Ok(frame)) => {
                if let Some(bytes) = frame.data_ref() {
                    self.exchange.sent(bytes.len() as u64);
                    if let Some(messages) = &mut self.messages {
                        self.exchange.sent_messages(messages.count(bytes));
                    }
                } else if let Some(trailers) = frame.trailers_ref() {
                    self.exchange.trailers(trailers);
                }
                // Nobody asks again behind trailers, nor where the length was known.
                if frame.is_trailers() || self.incoming.is_end_stream() {
                    self.exchange.complete();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(e)) => {
                self.exchange.broke(&e);
                Poll::Ready(Some(Err(e.into())))
            }
            None => {
                self.exchange.complete();
                Poll::Ready(None)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_messages_are_counted_however_they_are_cut() {
        let message = |length: u32| {
            let mut bytes = vec![0];
            bytes.extend(length.to_be_bytes());
            bytes.resize(5 + length as usize, 7);
            bytes
        };
        let all: Vec<u8> = [0, 1, 300, 0, 70_000].into_iter().flat_map(message).collect();
        for cut in [1, 2, 5, 7, 4096, all.len()] {
            let mut messages = Messages::default();
            let count: u64 = all.chunks(cut).map(|part| messages.count(part)).sum();
            assert_eq!(count, 5, "in pieces of {cut}");
        }
    }

    #[test]
    fn a_mirror_that_falls_behind_is_cut_off() {
        let (send, frames) = mpsc::channel(MIRROR_FRAMES);
        let copies = Copies { send, behind: Arc::default() };
        let large = Bytes::from(vec![0; 2 * MIRROR_BYTES]);
        let small = Bytes::from(vec![0; MIRROR_BYTES / 2]);
        assert!(copies.add(&large), "one frame is always taken");
        assert!(!copies.add(&small), "it is behind");
        drop((frames, copies));
        let (send, frames) = mpsc::channel(MIRROR_FRAMES);
        let copies = Copies { send, behind: Arc::default() };
        assert!(copies.add(&small) && copies.add(&small) && !copies.add(&small));
        drop(frames);
    }
}
