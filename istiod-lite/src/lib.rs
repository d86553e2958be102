//! The control plane: folders of YAML in, xDS and certificates out.
pub mod authorize;
pub mod ca;
pub mod config;
pub mod csr;
pub mod debounce;
pub mod files;
pub mod metrics;
pub mod scan;
pub mod signer;
pub mod tokens;
pub mod watch;
