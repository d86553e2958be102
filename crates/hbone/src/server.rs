//! The server end of a tunnel: accept, hand out CONNECT streams, answer them.

use std::sync::Arc;
use std::task::Poll;

use bytes::Bytes;
use engine::Claim;
use h2::server::SendResponse;
use h2::{RecvStream, SendStream};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use model::{Identity, Reason};
use rustls::ServerConfig;
use tokio::net::TcpStream;

use crate::error::TunnelError;
use crate::headers::{Authority, ConnectHeaders};
use crate::stream::{FlushHandle, TlsStream};
use crate::{
    CONNECTION_WINDOW, MAX_CONCURRENT_STREAMS, MAX_FRAME, MAX_HEADER_LIST, SEND_BUFFER,
    STREAM_WINDOW,
};

/// An accepted tunnel with a verified peer.
pub struct ServerTunnel {
    connection: h2::server::Connection<TlsStream, Bytes>,
    flush: FlushHandle,
    peer: Identity,
}

impl std::fmt::Debug for ServerTunnel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerTunnel").field("peer", &self.peer).finish_non_exhaustive()
    }
}

/// One request of the peer, not yet answered. Dropping it resets the stream.
#[derive(Debug)]
pub struct Incoming {
    /// What the peer wants, or why that cannot be understood.
    pub target: Result<Authority, String>,
    pub headers: ConnectHeaders,
    /// The client for whom the peer says to speak. Counts only if `engine::delegated` says so.
    pub claim: Claim,
    respond: SendResponse<Bytes>,
    receive: RecvStream,
}

impl ServerTunnel {
    /// TLS and HTTP/2 over an accepted socket.
    pub async fn accept(tcp: TcpStream, config: Arc<ServerConfig>) -> Result<Self, TunnelError> {
        let tls = TlsStream::accept(tcp, config).await?;
        let peer = tls.peer()?;
        let flush = tls.flush_handle();
        let handshake = h2::server::Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(MAX_FRAME)
            .max_header_list_size(MAX_HEADER_LIST)
            .max_concurrent_streams(MAX_CONCURRENT_STREAMS)
            .max_send_buffer_size(SEND_BUFFER)
            .handshake::<_, Bytes>(tls);
        let mut handshake = std::pin::pin!(handshake);
        // Our SETTINGS must leave although the stream only promises to flush.
        let connection = std::future::poll_fn(|cx| {
            let result = handshake.as_mut().poll(cx);
            match flush.flush(cx) {
                Poll::Ready(Err(e)) if result.is_pending() => {
                    Poll::Ready(Err(TunnelError::Handshake(e.to_string())))
                }
                _ => result.map_err(TunnelError::from),
            }
        })
        .await?;
        Ok(Self { connection, flush, peer })
    }

    /// The peer's verified identity.
    pub fn peer(&self) -> &Identity {
        &self.peer
    }

    /// The next request. `None` when the peer is gone. Must be polled for the streams to move.
    pub async fn next(&mut self) -> Option<Result<Incoming, TunnelError>> {
        let accepted = std::future::poll_fn(|cx| {
            let result = self.connection.poll_accept(cx);
            match self.flush.flush(cx) {
                Poll::Ready(Err(e)) if result.is_pending() => {
                    tracing::debug!(error = %e, "tunnel write failed");
                    Poll::Ready(None)
                }
                _ => result,
            }
        })
        .await?;
        Some(match accepted {
            Ok((request, respond)) => Ok(Incoming::new(request, respond)),
            Err(e) => Err(e.into()),
        })
    }

    /// Says GOAWAY: streams that live end on their own, new ones are refused.
    pub fn drain(&mut self) {
        self.connection.graceful_shutdown();
    }
}

impl Incoming {
    fn new(request: Request<RecvStream>, respond: SendResponse<Bytes>) -> Self {
        let (head, receive) = request.into_parts();
        let target = if head.method == Method::CONNECT {
            match head.uri.authority() {
                Some(authority) => Authority::parse(authority.as_str()),
                None => Err("CONNECT without authority".into()),
            }
        } else {
            Err(format!("method {} where only CONNECT is spoken", head.method))
        };
        let claim = ConnectHeaders::claim(&head.headers);
        Self {
            target,
            headers: ConnectHeaders::from_headers(&head.headers),
            claim,
            respond,
            receive,
        }
    }

    /// Says yes. `baggage` describes this end to the peer.
    pub fn accept(
        mut self,
        baggage: Option<HeaderValue>,
    ) -> Result<(SendStream<Bytes>, RecvStream), h2::Error> {
        let mut response = Response::new(());
        if let Some(baggage) = baggage {
            response.headers_mut().insert("baggage", baggage);
        }
        let send = self.respond.send_response(response, false)?;
        Ok((send, self.receive))
    }

    /// Says no, with a status for stock peers and the reason code for ours.
    pub fn refuse(mut self, status: StatusCode, reason: Reason) {
        let mut response = Response::new(());
        *response.status_mut() = status;
        response.headers_mut().insert("x-ambit-reason", HeaderValue::from_static(reason.code()));
        // The peer may be gone already; then there is nobody to tell.
        let _ = self.respond.send_response(response, true);
    }
}
