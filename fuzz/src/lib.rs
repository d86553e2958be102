//! One function per fuzz target: bytes in, no panic, and what must hold of the result holds.
//!
//! Each target calls the parser that the product calls, on the bytes that a stranger could send, and checks what callers
//! rely on: what was accepted comes back the same from its own form, what was refused opens nothing. A failed check is a
//! crash like any other.

mod configuration;
mod discovery;
mod names;
mod peer;
mod planted;
mod request;
mod rules;
mod sniff;

pub use configuration::{objects, registry, zds};
pub use discovery::{address, authorization, delta, routes};
pub use names::dns;
pub use peer::{csr, headers, identity};
pub use request::request;
pub use rules::rules;
pub use sniff::sniff;

/// Every target by name.
pub const TARGETS: [(&str, fn(&[u8])); 14] = [
    ("headers", headers),
    ("identity", identity),
    ("csr", csr),
    ("registry", registry),
    ("address", address),
    ("authorization", authorization),
    ("routes", routes),
    ("delta", delta),
    ("zds", zds),
    ("dns", dns),
    ("objects", objects),
    ("request", request),
    ("rules", rules),
    ("sniff", sniff),
];
