//! A waypoint between a client's node and an endpoint's, both played here: real sockets on loopback, real TLS, real HTTP.
#![allow(clippy::unwrap_used, reason = "test")]

mod bad;
mod drain;
mod frames;
mod framing;
mod http1;
mod http2;
mod limits;
mod plain;
mod raw;
mod routes;
mod smuggling;
mod threads;
mod world;
