//! The test application of pods: a server that answers with what it was asked, and a client that prints what it was
//! answered, field by field, one `Name=value` a line.
//!
//! The fields, their names and the client's prefixes (`[0]`, `[0 body]`) are those that the Gateway API conformance
//! suite looks for in a pod's output, so the pair stands in for the suite's own application in a cluster without a
//! registry. Nothing here knows of the mesh: what these programs see is what any application sees.

use std::fmt;
use std::io::Write as _;

pub mod answer;
pub mod ask;
pub mod basic;
pub mod grpc;
pub mod life;
pub mod serve;
pub mod tls;
pub mod wish;

/// Says a line to whoever looks at the pod's log. If nobody can hear it there is nobody to tell.
pub fn say(what: fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "{what}");
}
