//! A bug in each target, behind the feature `planted`: a panic that only a certain result of the real parser reaches, and
//! that no seed reaches. `make fuzz-planted` shows that the fuzzer finds each of them; without the feature nothing here does
//! anything.

use std::net::SocketAddr;

use model::{Action, Identity, Policy, Scope, Workload};
use xds::zds::{WorkloadRequest, workload_request::Payload};

fn bug(condition: bool, what: &str) {
    assert!(!(cfg!(feature = "planted") && condition), "planted: {what}");
}

pub(crate) fn authority(address: &SocketAddr) {
    bug(address.is_ipv6() && address.port() == 0, "an IPv6 address with port 0");
}

pub(crate) fn forwarded(host: &str) {
    bug(host.len() > 40 && !host.contains('.'), "a long host without a dot");
}

pub(crate) fn identity(identity: &Identity) {
    bug(identity.namespace.contains('_'), "an underscore in a namespace");
}

pub(crate) fn csr(words: &str) {
    bug(words.starts_with("on the elliptic curve 1.2.840.10045.3.1."), "a curve beside P-256");
}

pub(crate) fn node(node: &str) {
    bug(node.contains('.'), "a node name with a dot");
}

pub(crate) fn workload(w: &Workload) {
    let port = w.application_tunnel.and_then(|t| t.port);
    bug(w.capacity > 1000 && port.is_some_and(|p| p > 40_000), "a large capacity and a high port");
}

pub(crate) fn policy(p: &Policy) {
    bug(p.dry_run && p.scope == Scope::Global && p.action == Action::Deny, "a global dry-run DENY");
}

pub(crate) fn batch(removed: bool, refused: usize) {
    bug(removed && refused > 0, "a removal and a refusal in one response");
}

pub(crate) fn zds(request: &WorkloadRequest) {
    let Some(Payload::Keep(keep)) = &request.payload else { return };
    bug(keep.uid.len() > 20, "a long uid to keep");
}

pub(crate) fn compiled(p: &Policy) {
    bug(p.action == Action::Deny && p.rules.len() > 1, "a DENY of two rules");
}
