//! Load for the mesh, and what measures it.
//!
//! `meshload` runs inside pods: servers that cost next to nothing and clients that count what they
//! see. `meshbench` runs outside: it starts a mesh, drives `meshload` in its pods with and without the
//! mesh in turns, and writes down what came out.
//!
//! Invariants: every client ends by itself after the time it was given; every byte that a bulk client
//! sends is counted again at the other end, and both counts are reported; a latency of the open
//! schedule counts from the moment a request was due, not from when there was time to send it.

pub mod bench;
pub mod bulk;
pub mod clients;
pub mod connections;
pub mod dns;
pub mod hist;
pub mod lines;
pub mod poller;
pub mod relay;
pub mod request;
pub mod server;
pub mod talk;
