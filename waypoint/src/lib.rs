//! The HTTP proxy as a library, for its binary and its tests.
//!
//! `client's ztunnel -> listener -> sniff -> proxy -> engine (plan) -> upstream -> endpoint's ztunnel`; what is not HTTP
//! goes `sniff -> tcp -> upstream`.
//!
//! Invariants: every decision is asked of `engine`; only what `engine::admit` lets in is served; the client's verified
//! identity goes with every connection that is made for it, and no connection serves two identities; a request is tried
//! again only when nothing of it was delivered, or when it is safe to repeat; bodies stream, with a bounded buffer at each
//! step; whatever goes wrong with one request ends that request and nothing else, with a reason in the answer, the
//! access log and the metrics.

pub mod app;
mod call;
pub mod config;
mod io;
mod listener;
pub mod plain;
mod proxy;
pub mod record;
mod sniff;
mod tcp;
mod upstream;
pub mod worker;
