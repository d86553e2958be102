//! The node proxy: capture, in-pod sockets, HBONE out and in.

fn main() {}
