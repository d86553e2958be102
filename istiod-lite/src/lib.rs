//! The control plane: folders of YAML in, configuration (xDS) and certificates (CA) out.
//!
//! ```text
//! watch ── scan ── debounce          one thread: what changed in the folders
//!   └─> world (compile, encode)      the same thread: one state of the mesh
//!         ├─> report                 log, diagnostics.json
//!         └─> ads ─┐
//! certificates ────┼─ serve (tls)    port 15012: who calls (login), who may have what (authorize)
//!   └─> signer, ca ┘
//! status                             port 15014: readiness, metrics, debug
//! ```
//!
//! [`start`] runs all of it inside the calling process; the binary is a thin wrapper.
//!
//! Invariants: nothing is served to who did not prove to be a node proxy, or a pod, of this mesh; a change is pushed
//! whole or not at all; trouble with one file, proxy or disk stays with it and is said in the log, in a
//! metric and on a page.

mod ads;
mod app;
pub mod authorize;
pub mod ca;
mod certificates;
pub mod config;
mod control;
pub mod csr;
mod debounce;
mod files;
mod kept;
mod login;
mod metrics;
pub mod pod_tokens;
mod registry;
mod report;
pub mod scan;
mod serve;
pub mod signer;
mod status;
mod tls;
pub mod tokens;
/// Also for the local world, which follows the same folder.
pub mod watch;
mod world;

pub use app::{Inputs, Running, StartError, start};
pub use control::{Proxy, Registered};
pub use registry::inherit;
pub use tls::SERVER_NAME;
