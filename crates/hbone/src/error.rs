//! What can go wrong with a tunnel, and who is wrong. Application bytes are sent only after the peer's 2xx,
//! so that after any of these another endpoint may be tried.

use std::io;

use model::Reason;
use thiserror::Error;

/// A tunnel could not be made, or broke.
#[derive(Debug, Error)]
pub enum TunnelError {
    #[error("TCP connection to {to} failed: {source}")]
    Connect { to: std::net::SocketAddr, source: io::Error },
    #[error("no answer from {to} within {seconds} s while {what}")]
    Timeout { to: std::net::SocketAddr, what: &'static str, seconds: u64 },
    #[error("the peer's certificate is not acceptable: {0}")]
    PeerCertificate(String),
    #[error("the peer is {found}, expected {expected}")]
    PeerIdentity { found: String, expected: String },
    #[error("the peer refused our certificate: {0}")]
    RefusedByPeer(String),
    /// The same where our certificate is not at hand; see [`TunnelError::RefusedByPeer`].
    #[error("the peer refused our certificate: {0:?}")]
    Alert(rustls::AlertDescription),
    #[error("TLS handshake failed: {0}")]
    Handshake(String),
    #[error("HTTP/2 failed: {0}")]
    Http2(#[from] h2::Error),
    #[error("the peer's proxy answered {status} to CONNECT{}", reason.as_deref().map(|r| format!(" ({r})")).unwrap_or_default())]
    Refused { status: u16, reason: Option<String> },
    #[error("the pool already holds {0} tunnels, its limit")]
    PoolFull(usize),
    #[error("the tunnel closed before the request was sent")]
    Closed,
    /// Another task dialled for the same key and failed; its words are shared.
    #[error("{message}")]
    Shared { message: String, reason: Reason },
}

impl TunnelError {
    /// The peer takes no more requests on this tunnel.
    pub(crate) fn is_go_away(&self) -> bool {
        matches!(self, Self::Http2(e) if e.is_go_away() && e.is_remote())
    }

    /// The code for logs and metrics.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Connect { .. } => Reason::ConnectFailed,
            Self::Timeout { .. } => Reason::ConnectTimeout,
            Self::PeerCertificate(_) | Self::RefusedByPeer(_) | Self::Alert(_) => {
                Reason::PeerCertificate
            }
            Self::PeerIdentity { .. } => Reason::PeerIdentityMismatch,
            Self::Handshake(_) | Self::Http2(_) | Self::Closed => Reason::TunnelHandshake,
            Self::Refused { .. } => Reason::TunnelRefused,
            Self::PoolFull(_) => Reason::Limit,
            Self::Shared { reason, .. } => *reason,
        }
    }
}
