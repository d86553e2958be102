//! HBONE: HTTP/2 CONNECT over SPIFFE mutual TLS. Client, server, pool and the byte relay.
//!
//! One thread owns a tunnel and all of its streams; nothing here is shared between threads on the data
//! path. rustls does TLS, h2 does HTTP/2; what is ours is how bytes move between them (`stream`,
//! `relay`), who may speak (`tls`), and which tunnel a stream takes (`pool`).
//!
//! Must never be in here: a policy decision, a lookup in the configuration, a namespace switch.

mod buffer;
mod client;
pub mod clock;
mod error;
mod headers;
mod io;
mod pool;
mod relay;
mod server;
mod splice;
mod stream;
mod tls;

pub use client::{Dialed, Tunnel, TunnelStream};
pub use error::TunnelError;
pub use headers::{Authority, CLIENT_IDENTITY, ConnectHeaders};
pub use io::TunnelIo;
pub use pool::{Pool, PoolKey, PoolLimits, PoolStats};
pub use relay::{Ended, EndedBy, Transfer, relay_tcp, relay_tunnel};
pub use server::{Incoming, ServerTunnel};
pub use splice::relay_streams;
pub use stream::{FlushHandle, TlsStream};
pub use tls::{Credentials, CredentialsError, peer_identity};

/// HTTP/2 limits, the same on both ends. Stream and connection windows follow Istio's ztunnel (4 MiB
/// and 16 MiB): a bandwidth-delay product of 10 Gbit/s at 3 ms.
pub(crate) const STREAM_WINDOW: u32 = 4 << 20;
pub(crate) const CONNECTION_WINDOW: u32 = 16 << 20;
/// Frames up to 1 MiB are accepted: a large DATA frame saves a header and a wake-up each 16 KiB.
pub(crate) const MAX_FRAME: u32 = 1 << 20;
/// What one stream may have queued inside h2: one relay chunk in flight and one behind it.
pub(crate) const SEND_BUFFER: usize = 2 * RELAY_CHUNK;
/// CONNECT carries a handful of headers; anything above is an attack or a mistake.
pub(crate) const MAX_HEADER_LIST: u32 = 16 << 10;
/// Streams that one tunnel carries at once before the pool opens another (Istio's default is 100).
pub const MAX_STREAMS: usize = 100;
/// Streams a client may open on us at once. Twice Istio's client default.
pub(crate) const MAX_CONCURRENT_STREAMS: u32 = 200;
/// One read from or write to a socket. Measured optimum for copy plus AES-GCM is 256 to 512 KiB.
pub(crate) const RELAY_CHUNK: usize = 256 << 10;
