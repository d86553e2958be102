//! A node of a cluster that Istio runs, without Istio: what `istiod` and `istio-cni` would do, exactly as they do it, so
//! that our `ztunnel` is tested behind their protocols and nothing of ours.
//!
//! Purpose: [`istiod`] serves delta xDS and certificates to whoever shows the token, [`cni`] hands over pods by ZDS and puts
//! Istio's redirection into them, [`world`] makes nodes and pods of network namespaces and starts `ztunnel` as the DaemonSet
//! of Istio's chart does.
//!
//! Invariants: nothing here uses our control plane, node agent or capture; only the messages are ours, and those are compared
//! with fixtures byte for byte (`crates/xds/tests/wire.rs`). Everything lives in namespaces that end with the process.

pub mod cni;
pub mod inside;
pub mod istiod;
pub mod two;
pub mod world;

pub use cni::NodeAgent;
pub use istiod::{Istiod, Resource};
pub use world::{Node, Pod, World};
