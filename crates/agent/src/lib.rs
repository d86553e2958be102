//! What the proxies share: xDS and CA clients, certificates, admin, metrics, access log.

pub mod access_log;
pub mod metrics;
