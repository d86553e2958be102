//! The local world: a cluster on one machine, for an ordinary user, without a cluster.
//!
//! Nodes and pods are network namespaces inside one user namespace. [`launch::up`] runs a lab until it is told to end;
//! the other commands find it by [`place::find`] and talk to it over a unix socket ([`client`]).
//!
//! ```text
//! launch (outside)  claims the folder, makes the namespaces, asks the machine's resolvers
//!   └─ stage → world (process 1)  plan, network, pods, DNS, objects for istiod-lite
//!        ├─ istiod-lite, one ztunnel per node (mesh)
//!        └─ pod helper → container process 1 → program
//! ```
//!
//! Invariants: no root needed and none used; no external program needed; when the front or process 1 dies, the kernel ends
//! everything else; a pod has no capability over its own network, the nodes or the machine, and sees nothing of the lab.
//!
//! A program that uses this crate must call [`hidden`] first in `main`: the lab starts it again for its inner processes.

mod advice;
pub mod client;
mod control;
mod dns;
mod endpoints;
mod fds;
mod ids;
pub mod launch;
pub mod logs;
mod mesh;
mod network;
mod objects;
pub mod place;
mod pod;
mod procs;
mod reconcile;
mod registry;
mod stage;
pub mod status;
mod supervise;
mod upstream;
mod world;
mod zds;

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

pub use control::{Action, ExecPlace, Restarted};

/// Hidden subcommands: the lab's inner processes.
pub(crate) const STAGE: &str = "__lab-stage";
pub(crate) const CONTAINER: &str = "__lab-container";
pub(crate) const EXEC: &str = "__lab-exec";

/// Runs a hidden subcommand if the program was started as one. Call it before anything else in `main`, while the process has
/// one thread.
pub fn hidden() -> Option<ExitCode> {
    let mut args = std::env::args_os().skip(1);
    let result = match args.next()?.to_str()? {
        STAGE => stage::run(Path::new(&args.next().unwrap_or_default())),
        CONTAINER => pod::helper::run(),
        EXEC => pod::exec::run(),
        _ => return None,
    };
    Some(result.unwrap_or_else(|e| {
        let _ = writeln!(std::io::stderr(), "meshctl: {e:#}");
        ExitCode::FAILURE
    }))
}
