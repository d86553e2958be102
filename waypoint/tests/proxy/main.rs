//! A waypoint between a client's node and an endpoint's, both played here: real sockets on loopback, real TLS, real HTTP.
#![allow(clippy::unwrap_used, reason = "test")]

mod bad;
mod drain;
mod http1;
mod http2;
mod plain;
mod raw;
mod routes;
mod threads;
mod world;
