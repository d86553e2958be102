//! What the proxies share: xDS and CA clients, certificates, admin, metrics, access log, traces.

pub mod access_log;
pub mod admin;
pub mod ca_client;
pub mod certs;
pub mod channel;
pub mod control_plane;
pub mod disk;
pub mod flags;
pub mod lifecycle;
pub mod logging;
pub mod metrics;
pub mod readiness;
pub mod store;
#[cfg(test)]
mod testing;
pub mod trace;
pub mod xds_client;
