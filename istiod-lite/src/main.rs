//! The control plane: sources, compile, xDS and CA servers.

fn main() {}
