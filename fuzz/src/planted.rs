//! A bug in each target, behind the feature `planted`: a panic that only a certain result of the real parser reaches, and
//! that no seed reaches. `make fuzz-planted` shows that the fuzzer finds each of them; without the feature nothing here does
//! anything.

use std::net::SocketAddr;
use std::sync::Arc;

use http::request;
use model::http::ServiceRoutes;
use model::{Action, Change, Identity, Match, Policy, Scope, TunnelProtocol, Workload};
use waypoint::sniff::Spoken;
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
    bug(node.ends_with(|c| ('2'..='9').contains(&c)), "a node beyond the first");
}

pub(crate) fn workload(w: &Workload) {
    bug(w.capacity > 1000 && w.native_tunnel, "a large capacity");
}

pub(crate) fn policy(p: &Policy) {
    let selector = p.scope == Scope::WorkloadSelector;
    bug(
        selector && p.action == Action::Deny && p.rules.is_empty(),
        "a selector DENY without rules",
    );
}

pub(crate) fn routes(routes: &ServiceRoutes) {
    let mut rules = routes.sets.iter().flat_map(|set| set.rules.iter());
    bug(
        rules.any(|rule| rule.filters.is_empty() && rule.backends.iter().any(|b| b.weight > 100)),
        "a rule without filters and with a large weight",
    );
}

pub(crate) fn batch(changes: &[Change]) {
    let stand_in = |c: &Change| matches!(c, Change::SetWorkload(w) if w.protocol == TunnelProtocol::Unreadable);
    bug(changes.iter().any(stand_in), "a stand-in for a workload that cannot be read");
}

pub(crate) fn zds(request: &WorkloadRequest) {
    let Some(Payload::Keep(keep)) = &request.payload else { return };
    bug(keep.uid.contains(char::is_control), "a control character in a uid to keep");
}

pub(crate) fn asked(name: &str, ipv6: bool) {
    bug(
        ipv6 && name.starts_with('_'),
        "an IPv6 question for a name that begins with an underscore",
    );
}

pub(crate) fn request(parts: &request::Parts) {
    let upgrade = parts.headers.contains_key("upgrade");
    bug(upgrade && parts.uri.path().contains("%25"), "an upgrade on a path with a percent sign");
}

pub(crate) fn rules(routes: &[Arc<ServiceRoutes>]) {
    let mut rules = routes.iter().flat_map(|r| r.sets.iter()).flat_map(|set| set.rules.iter());
    bug(
        rules.any(|rule| rule.backends.len() > 1 && rule.backends.iter().any(|b| b.weight == 0)),
        "a backend with the weight 0 beside another",
    );
}

pub(crate) fn spoken(bytes: &[u8], spoken: Option<Spoken>) {
    bug(
        spoken == Some(Spoken::Http1) && bytes.starts_with(b"\n") && bytes.contains(&b'~'),
        "a tilde in a request line behind an empty one",
    );
}

pub(crate) fn compiled(p: &Policy) {
    let other = |m: &Match| {
        m.destination_ports.iter().any(|port| *port != 80)
            || m.not_source_ips.iter().any(|prefix| prefix.length != 8)
    };
    let mut matches = p.rules.iter().flat_map(|r| r.clauses.iter().flatten());
    bug(matches.any(other), "a policy with a number that no seed has");
}
