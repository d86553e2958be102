//! The command line: operate and explain the mesh.

fn main() {}
