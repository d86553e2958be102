//! The control plane: folders of YAML in, xDS and certificates out.
pub mod ca;
pub mod csr;
pub mod files;
pub mod signer;
