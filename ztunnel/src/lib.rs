//! The node proxy as a library, for its binary and its tests.
//!
//! Invariants: application bytes are never parsed, DNS questions excepted; every decision is asked of `engine`; one thread owns
//! a tunnel and its streams; whatever goes wrong with one connection ends that connection and nothing
//! else, with a reason in the access log and the metrics.

pub mod app;
pub mod config;
pub mod connections;
pub mod dns;
mod inbound;
pub mod istio;
pub mod listeners;
mod outbound;
pub mod pages;
pub mod pod;
pub mod pods;
pub mod record;
mod same_node;
pub mod worker;
pub mod zds;
