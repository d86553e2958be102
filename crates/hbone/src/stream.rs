//! A TLS stream that moves much per system call.
//!
//! rustls does TLS; this file decides when the socket is touched. Reads take up to 256 KiB of ciphertext
//! at once (one `recv` for sixteen records, where a plain adapter needs sixteen). Writes are collected:
//! small plaintext pieces share a record, records wait until the HTTP/2 connection has no more to say in
//! this poll, then leave in one `writev`. The driver of the connection calls [`FlushHandle::flush`] at
//! the end of each poll; until then `poll_flush` is a promise.
//!
//! Cost per 64 KiB in bulk: one `recv` and one `writev` each 256 KiB, AES-GCM, and the copies that
//! rustls makes (plaintext into the record; record out of it).

use std::io::{self, BufRead as _, IoSlice, Write as _};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll, ready};

use rustls::{AlertDescription, ClientConfig, Connection, ServerConfig};
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use crate::buffer::Scratch;
use crate::clock;
use crate::error::TunnelError;
use crate::tls::{PeerRefused, UnexpectedPeer};
use crate::{RELAY_CHUNK, peer_identity};

/// Plaintext pieces below this are copied together into one record; larger ones are encrypted from
/// where they are. A record costs 22 bytes and about 100 ns, a copy of this much about as long.
const COALESCE: usize = 4 << 10;
/// Ciphertext that may wait for the socket before writers are told to wait: two chunks and their
/// record overhead, so that the next chunk is encrypted while the first is in the socket buffer.
const HIGH_WATER: usize = 2 * RELAY_CHUNK + (64 << 10);

/// One end of a TLS connection. Cloned halves are not possible; see [`FlushHandle`] for the one seam.
#[derive(Debug)]
pub struct TlsStream {
    shared: Arc<Mutex<Inner>>,
}

/// Writes out what a [`TlsStream`] has collected.
#[derive(Clone, Debug)]
pub struct FlushHandle {
    shared: Arc<Mutex<Inner>>,
}

#[derive(Debug)]
struct Inner {
    tcp: TcpStream,
    tls: Connection,
    /// Ciphertext read from the socket and not yet given to rustls.
    unread: Option<Unread>,
    /// Small plaintext pieces that wait to become a record.
    small: Vec<u8>,
    /// Ciphertext that rustls holds for us.
    queued: usize,
    eof: bool,
    /// Why the peer does not want us. HTTP/2 keeps only words of errors.
    alert: Arc<OnceLock<AlertDescription>>,
}

#[derive(Debug)]
struct Unread {
    buffer: Scratch,
    start: usize,
    end: usize,
}

impl TlsStream {
    /// Runs the handshake as client. No server name is sent; the configuration knows whom to expect.
    pub async fn connect(tcp: TcpStream, config: Arc<ClientConfig>) -> Result<Self, TunnelError> {
        let nobody = ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into());
        let tls = rustls::ClientConnection::new(config, nobody)
            .map_err(|e| TunnelError::Handshake(e.to_string()))?;
        Self::handshake(tcp, tls.into()).await
    }

    /// Runs the handshake as server.
    pub async fn accept(tcp: TcpStream, config: Arc<ServerConfig>) -> Result<Self, TunnelError> {
        let tls = rustls::ServerConnection::new(config)
            .map_err(|e| TunnelError::Handshake(e.to_string()))?;
        Self::handshake(tcp, tls.into()).await
    }

    async fn handshake(tcp: TcpStream, mut tls: Connection) -> Result<Self, TunnelError> {
        tls.set_buffer_limit(None);
        let mut inner = Inner {
            tcp,
            tls,
            unread: None,
            small: Vec::new(),
            queued: 0,
            eof: false,
            alert: Arc::default(),
        };
        std::future::poll_fn(|cx| inner.poll_handshake(cx)).await?;
        if inner.tls.alpn_protocol() != Some(b"h2") {
            return Err(TunnelError::Handshake("the peer did not agree on ALPN h2".into()));
        }
        Ok(Self { shared: Arc::new(Mutex::new(inner)) })
    }

    /// The peer's identity, verified by the handshake.
    pub fn peer(&self) -> Result<model::Identity, TunnelError> {
        let inner = lock(&self.shared);
        let leaf: &CertificateDer<'_> = inner
            .tls
            .peer_certificates()
            .and_then(|chain| chain.first())
            .ok_or_else(|| TunnelError::PeerCertificate("the peer sent none".into()))?;
        peer_identity(leaf).map_err(TunnelError::PeerCertificate)
    }

    /// The peer's alert, once there is one. With TLS 1.3 it comes after our own handshake is done.
    pub(crate) fn alert(&self) -> Arc<OnceLock<AlertDescription>> {
        lock(&self.shared).alert.clone()
    }

    pub fn flush_handle(&self) -> FlushHandle {
        FlushHandle { shared: self.shared.clone() }
    }
}

impl FlushHandle {
    /// Pushes collected bytes towards the socket. Registers the waker when the socket is full.
    pub fn flush(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        lock(&self.shared).poll_write_out(cx)
    }
}

/// One thread owns a tunnel: the lock is never contended, and a poisoned one only means that a panic
/// already ended the task.
fn lock(shared: &Mutex<Inner>) -> MutexGuard<'_, Inner> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inner {
    fn poll_handshake(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), TunnelError>> {
        while self.tls.is_handshaking() {
            self.seal_small().map_err(handshake_io)?;
            // An alert explains itself better than the broken pipe that follows it.
            let wrote = self.poll_write_out(cx);
            if !self.tls.wants_read() {
                if !self.tls.is_handshaking() {
                    break;
                }
                ready!(wrote).map_err(handshake_io)?;
                continue;
            }
            match ready!(self.poll_more_plaintext(cx)) {
                Ok(true) => {}
                Ok(false) => {
                    return Poll::Ready(Err(TunnelError::Handshake(
                        "the peer closed the connection during the handshake".into(),
                    )));
                }
                Err(e) => {
                    // Tell the peer why before going: the alert is already queued in rustls.
                    let _ = self.poll_write_out(cx);
                    return Poll::Ready(Err(handshake_io(e)));
                }
            }
        }
        ready!(self.poll_write_out(cx)).map_err(handshake_io)?;
        Poll::Ready(Ok(()))
    }

    /// Feeds rustls from the read-ahead, or the socket when that is empty. `Ok(false)` at end of stream.
    fn poll_more_plaintext(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        if self.unread.is_none() {
            if self.eof {
                return Poll::Ready(Ok(false));
            }
            let mut buffer = Scratch::take();
            let mut target = ReadBuf::new(&mut buffer);
            ready!(Pin::new(&mut self.tcp).poll_read(cx, &mut target))?;
            let end = target.filled().len();
            if end == 0 {
                self.eof = true;
                return Poll::Ready(Ok(false));
            }
            self.unread = Some(Unread { buffer, start: 0, end });
        }
        if let Some(unread) = &mut self.unread {
            let mut rest = &unread.buffer[unread.start..unread.end];
            let before = rest.len();
            self.tls.read_tls(&mut rest)?;
            unread.start += before - rest.len();
            if unread.start == unread.end {
                self.unread = None;
            }
        }
        self.tls.process_new_packets().map_err(|e| {
            if let rustls::Error::AlertReceived(alert) = &e {
                // Only the first counts.
                let _ = self.alert.set(*alert);
            }
            io::Error::new(io::ErrorKind::InvalidData, e)
        })?;
        Poll::Ready(Ok(true))
    }

    fn poll_read(&mut self, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let start = out.filled().len();
        loop {
            while out.remaining() > 0 {
                match self.tls.reader().fill_buf() {
                    Ok([]) => return Poll::Ready(Ok(())),
                    Ok(plain) => {
                        let n = plain.len().min(out.remaining());
                        out.put_slice(&plain[..n]);
                        self.tls.reader().consume(n);
                    }
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                    // Many peers close TCP without close_notify. HTTP/2 frames its own ends, so a cut
                    // shows there.
                    Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                        return Poll::Ready(Ok(()));
                    }
                    Err(e) => return Poll::Ready(Err(e)),
                }
            }
            if out.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            let got = out.filled().len() > start;
            if got && self.unread.is_none() {
                // Enough for this poll: a short read is followed by the frames it completes, not by
                // another system call that finds nothing.
                return Poll::Ready(Ok(()));
            }
            match self.poll_more_plaintext(cx) {
                Poll::Ready(Ok(true)) => {}
                Poll::Ready(Ok(false)) => return Poll::Ready(Ok(())),
                Poll::Ready(Err(e)) => return Poll::Ready(Err(e)),
                Poll::Pending if got => return Poll::Ready(Ok(())),
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    fn seal_small(&mut self) -> io::Result<()> {
        if !self.small.is_empty() {
            self.queued += self.small.len();
            self.tls.writer().write_all(&self.small)?;
            self.small.clear();
            if self.small.capacity() > 4 * COALESCE {
                self.small = Vec::new();
            }
        }
        Ok(())
    }

    /// Writes until rustls has nothing left or the socket is full.
    fn poll_write_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.seal_small()?;
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut Vectored { tcp: &mut self.tcp, cx }) {
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Ok(n) => self.queued = self.queued.saturating_sub(n),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Poll::Pending,
                Err(e) => return Poll::Ready(Err(e)),
            }
        }
        self.queued = 0;
        Poll::Ready(Ok(()))
    }

    fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.queued + self.small.len() >= HIGH_WATER {
            ready!(self.poll_write_out(cx))?;
        }
        let mut taken = 0;
        for buf in bufs {
            if buf.len() < COALESCE {
                self.small.extend_from_slice(buf);
            } else {
                self.seal_small()?;
                self.tls.writer().write_all(buf)?;
                self.queued += buf.len();
            }
            taken += buf.len();
            if self.small.len() >= 4 * COALESCE {
                self.seal_small()?;
            }
        }
        Poll::Ready(Ok(taken))
    }
}

/// Lets rustls `writev` straight into the socket. A full socket is `WouldBlock`, with the waker set.
struct Vectored<'a, 'w> {
    tcp: &'a mut TcpStream,
    cx: &'a mut Context<'w>,
}

impl io::Write for Vectored<'_, '_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(buf)])
    }
    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        match Pin::new(&mut *self.tcp).poll_write_vectored(self.cx, bufs) {
            Poll::Ready(result) => result,
            Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsyncRead for TlsStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        lock(&self.shared).poll_read(cx, buf)
    }
}

impl AsyncWrite for TlsStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        lock(&self.shared).poll_write(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        lock(&self.shared).poll_write(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// A promise: the driver flushes at the end of its poll. See the module.
    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inner = lock(&self.shared);
        inner.seal_small()?;
        inner.tls.send_close_notify();
        ready!(inner.poll_write_out(cx))?;
        Pin::new(&mut inner.tcp).poll_shutdown(cx)
    }
}

/// Sorts handshake errors by who is wrong.
fn handshake_io(e: io::Error) -> TunnelError {
    let Some(tls) = e.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) else {
        return TunnelError::Handshake(e.to_string());
    };
    match tls {
        rustls::Error::InvalidCertificate(rustls::CertificateError::Other(other)) => {
            if let Some(unexpected) = other.0.downcast_ref::<UnexpectedPeer>() {
                return TunnelError::PeerIdentity {
                    found: unexpected.found.clone(),
                    expected: unexpected.expected.clone(),
                };
            }
            let words = other.0.downcast_ref::<PeerRefused>().map(ToString::to_string);
            TunnelError::PeerCertificate(words.unwrap_or_else(|| tls.to_string()))
        }
        rustls::Error::InvalidCertificate(reason) => {
            TunnelError::PeerCertificate(explain_certificate(reason))
        }
        rustls::Error::NoCertificatesPresented => {
            TunnelError::PeerCertificate("the peer sent none".into())
        }
        rustls::Error::AlertReceived(alert) => TunnelError::Alert(*alert),
        other => TunnelError::Handshake(other.to_string()),
    }
}

fn explain_certificate(reason: &rustls::CertificateError) -> String {
    match reason {
        rustls::CertificateError::UnknownIssuer => {
            "it was not issued by this mesh's root (unknown issuer)".into()
        }
        other => clock::explain_certificate(other).unwrap_or_else(|| format!("{other:?}")),
    }
}
