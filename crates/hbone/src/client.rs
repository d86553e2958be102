//! The client end of a tunnel: handshake, CONNECT, and the driver that owns the connection.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use h2::{RecvStream, SendStream};
use http::HeaderMap;
use model::Identity;
use rustls::AlertDescription;
use tokio::net::TcpStream;
use tokio::sync::{Notify, watch};

use crate::clock;
use crate::error::TunnelError;
use crate::headers::ConnectHeaders;
use crate::stream::{FlushHandle, TlsStream};
use crate::{
    CONNECTION_WINDOW, Credentials, MAX_FRAME, MAX_HEADER_LIST, SEND_BUFFER, STREAM_WINDOW,
};

/// A silent tunnel is probed after this long, and given up after `PING_TIMEOUT` more (Istio: 10 s, 20 s).
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// An established tunnel. Cheap to clone; streams of all clones share the connection.
#[derive(Clone, Debug)]
pub struct Tunnel {
    send: SendRequest<Bytes>,
    state: Arc<TunnelState>,
}

#[derive(Debug)]
struct TunnelState {
    /// Streams that live.
    streams: AtomicUsize,
    /// No new streams: GOAWAY, a broken connection, or a ping without answer.
    closed: AtomicBool,
    peer: Identity,
    /// Why the peer refused our certificate, which is valid in these seconds.
    alert: Arc<OnceLock<AlertDescription>>,
    validity: (u64, u64),
    /// Asks for a ping now.
    doubt: Notify,
    /// Counts answered pings.
    pongs: watch::Sender<u64>,
}

/// A new tunnel and the future that drives it; the tunnel works only while that is polled.
pub struct Dialed<D> {
    pub tunnel: Tunnel,
    pub driver: D,
}

impl<D> std::fmt::Debug for Dialed<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dialed").field("tunnel", &self.tunnel).finish_non_exhaustive()
    }
}

/// One CONNECT stream. Counted in its tunnel until dropped.
#[derive(Debug)]
pub struct TunnelStream {
    pub send: SendStream<Bytes>,
    pub receive: RecvStream,
    /// Response headers of the peer's proxy.
    pub headers: HeaderMap,
    pub peer: Identity,
    _slot: Slot,
}

impl TunnelStream {
    /// The two directions, and the guard that keeps the stream counted.
    pub fn split(self) -> (SendStream<Bytes>, RecvStream, impl Sized) {
        self.into_parts()
    }

    pub(crate) fn into_parts(self) -> (SendStream<Bytes>, RecvStream, Slot) {
        (self.send, self.receive, self._slot)
    }
}

/// Counts a stream while it lives.
#[derive(Debug)]
pub(crate) struct Slot(Arc<TunnelState>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Tunnel {
    /// TLS and HTTP/2 over a connected socket. The peer must show one of `expected`.
    pub async fn handshake(
        tcp: TcpStream,
        credentials: &Credentials,
        expected: &[Identity],
    ) -> Result<Dialed<impl Future<Output = Result<(), h2::Error>> + Send + use<>>, TunnelError>
    {
        let config = credentials
            .client_config(expected)
            .map_err(|e| TunnelError::Handshake(e.to_string()))?;
        let validity = (credentials.not_before(), credentials.not_after());
        let tls = TlsStream::connect(tcp, config).await.map_err(|e| match e {
            TunnelError::Alert(alert) => refused(alert, validity),
            other => other,
        })?;
        let peer = tls.peer()?;
        let alert = tls.alert();
        let flush = tls.flush_handle();
        let (send, connection) = h2::client::Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(MAX_FRAME)
            .max_header_list_size(MAX_HEADER_LIST)
            .max_send_buffer_size(SEND_BUFFER)
            .enable_push(false)
            .handshake::<_, Bytes>(tls)
            .await?;
        let state = Arc::new(TunnelState {
            streams: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            peer,
            alert,
            validity,
            doubt: Notify::new(),
            pongs: watch::Sender::new(0),
        });
        let driver = drive(connection, flush, state.clone());
        Ok(Dialed { tunnel: Self { send, state }, driver })
    }

    /// Opens a stream to `target`. Returns once the peer's proxy has said yes.
    pub async fn open(
        &self,
        target: SocketAddr,
        headers: &ConnectHeaders,
    ) -> Result<TunnelStream, TunnelError> {
        let request = headers.request(target).map_err(|e| TunnelError::Handshake(e.to_string()))?;
        self.state.streams.fetch_add(1, Ordering::Relaxed);
        let slot = Slot(self.state.clone());
        let failed = |e| self.failed(e);
        let mut send = self.send.clone().ready().await.map_err(failed)?;
        let (response, stream) = send.send_request(request, false).map_err(failed)?;
        let response = response.await.map_err(failed)?;
        if !response.status().is_success() {
            let reason = response.headers().get("x-ambit-reason");
            return Err(TunnelError::Refused {
                status: response.status().as_u16(),
                reason: reason.and_then(|r| r.to_str().ok()).map(|r| r.chars().take(512).collect()),
            });
        }
        let (head, receive) = response.into_parts();
        Ok(TunnelStream {
            send: stream,
            receive,
            headers: head.headers,
            peer: self.state.peer.clone(),
            _slot: slot,
        })
    }

    /// A refusal of our certificate looks like a connection that broke.
    fn failed(&self, error: h2::Error) -> TunnelError {
        match self.state.alert.get() {
            Some(alert) => refused(*alert, self.state.validity),
            None => error.into(),
        }
    }

    /// Streams that live on this tunnel, or are about to.
    pub fn streams(&self) -> usize {
        self.state.streams.load(Ordering::Relaxed)
    }

    /// True when no new stream may be opened: it broke, or the peer said GOAWAY.
    pub fn is_closed(&self) -> bool {
        // The clone has no request of its own that it could wait for, so the answer is there at once.
        let mut asking = Context::from_waker(Waker::noop());
        self.state.closed.load(Ordering::Relaxed)
            || matches!(self.send.clone().poll_ready(&mut asking), Poll::Ready(Err(_)))
    }

    /// Pings the peer, and says whether it answers in time. A tunnel that is found dead this way is not torn down: streams
    /// on it may only be slow, and [`PING_TIMEOUT`] is for them.
    pub(crate) async fn answers(&self, within: Duration) -> bool {
        let mut pongs = self.state.pongs.subscribe();
        self.state.doubt.notify_one();
        tokio::time::timeout(within, pongs.changed()).await.is_ok_and(|alive| alive.is_ok())
    }

    /// Lets no further stream use this tunnel.
    pub(crate) fn retire(&self) {
        self.state.closed.store(true, Ordering::Relaxed);
    }

    /// How many streams this tunnel may carry: the peer's limit, or ours if that is lower.
    pub fn capacity(&self, ours: usize) -> usize {
        ours.min(self.send.current_max_send_streams())
    }
}

fn refused(alert: AlertDescription, validity: (u64, u64)) -> TunnelError {
    TunnelError::RefusedByPeer(clock::explain_alert(alert, validity, clock::now()))
}

/// Drives one client connection: protocol, flush after each poll, keepalive. The connection stays where
/// this function put it: an `async fn` would hold a copy of it for every step.
fn drive<T>(
    mut connection: h2::client::Connection<T, Bytes>,
    flush: FlushHandle,
    state: Arc<TunnelState>,
) -> impl Future<Output = Result<(), h2::Error>>
where
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let mut keepalive = connection.ping_pong().map(|ping| Box::pin(keepalive(ping, state.clone())));
    std::future::poll_fn(move |cx| {
        let mut result = Pin::new(&mut connection).poll(cx);
        if let Poll::Ready(Err(e)) = flush.flush(cx)
            && result.is_pending()
        {
            tracing::debug!(error = %e, "tunnel write failed");
            result = Poll::Ready(Ok(()));
        }
        let silent = keepalive.as_mut().is_some_and(|k| k.as_mut().poll(cx).is_ready());
        if result.is_pending() && silent {
            result = Poll::Ready(Ok(()));
        }
        if result.is_ready() {
            state.closed.store(true, Ordering::Relaxed);
        }
        result
    })
}

/// Ends when a ping stays without answer. Only silent tunnels need it, but a ping every ten seconds
/// costs less than knowing.
async fn keepalive(mut ping: h2::PingPong, state: Arc<TunnelState>) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(PING_INTERVAL) => {}
            () = state.doubt.notified() => {}
        }
        let answer = tokio::time::timeout(PING_TIMEOUT, ping.ping(h2::Ping::opaque())).await;
        if !matches!(answer, Ok(Ok(_))) {
            tracing::debug!(peer = %state.peer, "tunnel does not answer pings, giving it up");
            state.closed.store(true, Ordering::Relaxed);
            return;
        }
        state.pongs.send_modify(|n| *n = n.wrapping_add(1));
    }
}
