//! May this peer connect to this workload? Istio's layer-4 semantics, without its fail-open gaps.
//!
//! Order: any DENY that matches denies; with no ALLOW policy at all the answer is allow; any ALLOW that
//! matches allows; otherwise deny. A policy that the workload names and nobody has makes the answer
//! `Pending`; a matching DENY that *is* known still denies at once.
//!
//! Matching: rules are alternatives, clauses of a rule must all match, matches of a clause are
//! alternatives. A policy without rules matches nothing, a rule without clauses everything, a clause
//! without matches is satisfied. A [`Match`] that sets nothing never matches: it is what is left of an
//! HTTP-only condition, and such a condition must not turn into "everybody" (Istio does the same).
//! A plaintext peer has no identity: no positive identity match holds for it, every negative one does.
//!
//! A waypoint may name the client for whom it calls ([`crate::delegated`]): then there are two identities. A DENY matches if it
//! matches either of them. An ALLOW matches if it matches either, but what its rule excludes (`not...`) it excludes under
//! both names: a client is not let in where it is shut out because a waypoint stands between.
//!
//! Invariants: a dry-run policy never decides; when several policies match, the one with the smallest
//! key is named, so that every proxy and `meshctl can` name the same.

use std::cell::OnceCell;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use model::{
    Action, Identity, MESH_PORTS, Match, Policy, PolicyKey, Provenance, Reason, Refusal, Rule,
    Snapshot, Str, StringMatch, TunnelProtocol, Workload,
};

/// What is known of a connection that arrives at a workload.
#[derive(Clone, Debug)]
pub struct InboundFacts<'a> {
    pub workload: &'a Workload,
    /// Address and port of the workload that the peer wants.
    pub destination: SocketAddr,
    pub source_ip: IpAddr,
    /// From the verified peer certificate. `None`: plaintext.
    pub peer: Option<&'a Identity>,
    /// The client for whom the peer, a waypoint, calls: what [`crate::delegated`] says.
    pub client: Option<&'a Identity>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Allow(Allowed),
    Deny(Refusal),
    /// A policy this workload names has not arrived; wait at most a second, then refuse with the
    /// `Refusal` ([`model::Reason::PolicyMissing`]).
    Pending(Refusal),
}

/// Why the answer is yes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Allowed {
    /// No ALLOW policy applies to this workload.
    NoAllowPolicies,
    /// This rule matched.
    By { policy: PolicyKey, provenance: Provenance },
}

/// Decides on a connection. Port level PeerAuthentication arrives as DENY policies that match peers
/// without a principal (`model::StringMatch::Presence` under `not_principals`).
pub fn authorize(snapshot: &Snapshot, facts: &InboundFacts<'_>) -> Verdict {
    if let Some(refusal) = misdirected(facts) {
        return Verdict::Deny(refusal);
    }
    if facts.workload.protocol == TunnelProtocol::Unreadable {
        // Its policies are part of what cannot be read.
        return Verdict::Deny(crate::outbound::unreadable(facts.workload));
    }
    let policies = snapshot.policies_of(facts.workload);
    let connection = Connection::new(facts);
    if let Some((policy, rule)) = first_match(&policies.found, Action::Deny, &connection) {
        return Verdict::Deny(denied_by(policy, rule, facts));
    }
    if let Some(missing) = policies.missing.iter().min() {
        return Verdict::Pending(missing_policy(missing, policies.missing.len(), facts));
    }
    if let Some((policy, rule)) = first_match(&policies.found, Action::Allow, &connection) {
        return Verdict::Allow(Allowed::By {
            policy: policy.key.clone(),
            provenance: provenance_of(policy, rule),
        });
    }
    match not_allowed(&policies.found, facts) {
        Some(refusal) => Verdict::Deny(refusal),
        None => Verdict::Allow(Allowed::NoAllowPolicies),
    }
}

/// Whether somebody who shows no certificate would be turned away for that: a PeerAuthentication demands mutual TLS of
/// what arrives here. Also true while it cannot be known.
pub fn demands_mutual_tls(snapshot: &Snapshot, facts: &InboundFacts<'_>) -> bool {
    let policies = snapshot.policies_of(facts.workload);
    if !policies.missing.is_empty() || facts.workload.protocol == TunnelProtocol::Unreadable {
        return true;
    }
    let connection = Connection::new(&InboundFacts { peer: None, client: None, ..facts.clone() });
    let denying = policies.found.iter().filter(|p| p.action == Action::Deny && !p.dry_run);
    denying
        .filter_map(|p| Some((p, matching_rule(p, &connection)?)))
        .any(|(policy, rule)| demands_mtls(policy, &provenance_of(policy, rule)))
}

/// The dry-run policies that match this connection, smallest key first: what they would do is for the
/// log only.
pub fn dry_run_matches<'a>(
    snapshot: &'a Snapshot,
    facts: &InboundFacts<'a>,
) -> Vec<&'a Arc<Policy>> {
    let connection = Connection::new(facts);
    let mut hits = snapshot.policies_of(facts.workload).found;
    hits.retain(|p| p.dry_run && matching_rule(p, &connection).is_some());
    hits.sort_unstable_by(|a, b| a.key.cmp(&b.key));
    hits
}

/// Refuses what is not for the application of this workload, whatever the policies say.
fn misdirected(facts: &InboundFacts<'_>) -> Option<Refusal> {
    let (ip, port) = (facts.destination.ip().to_canonical(), facts.destination.port());
    let workload = Name(facts.workload);
    if !facts.workload.addresses.contains(&ip) {
        let message =
            format!("{} asked for {ip}, which is not an address of {workload}", Peer(facts));
        return Some(Refusal::new(Reason::DestinationMismatch, message));
    }
    MESH_PORTS.contains(&port).then(|| {
        let message =
            format!("{} asked for port {port} of {workload}, which the mesh owns", Peer(facts));
        Refusal::new(Reason::MeshPort, message)
    })
}

/// The matching policy with the smallest key among those that are enforced, and its first matching rule.
fn first_match<'a>(
    policies: &[&'a Arc<Policy>],
    action: Action,
    connection: &Connection<'_>,
) -> Option<(&'a Policy, &'a Rule)> {
    policies
        .iter()
        .filter(|p| p.action == action && !p.dry_run)
        .filter_map(|p| Some((&***p, matching_rule(p, connection)?)))
        .min_by(|(a, _), (b, _)| a.key.cmp(&b.key))
}

fn matching_rule<'a>(policy: &'a Policy, connection: &Connection<'_>) -> Option<&'a Rule> {
    let fits = |rule: &Rule, caller: &Caller<'_>| {
        rule.clauses.iter().all(|clause| {
            clause.is_empty() || clause.iter().any(|m| connection.satisfies(m, caller))
        })
    };
    policy.rules.iter().find(|rule| {
        connection.callers(policy.action).into_iter().flatten().any(|caller| fits(rule, &caller))
    })
}

/// A connection as matches see it.
struct Connection<'a> {
    peer: Shown<'a>,
    client: Option<Shown<'a>>,
    source: IpAddr,
    destination: IpAddr,
    port: u16,
}

/// Under which name a rule is tried, and which other name must not be excluded by it.
struct Caller<'a> {
    name: &'a Shown<'a>,
    besides: Option<&'a Shown<'a>>,
}

/// An identity, if there is one.
struct Shown<'a> {
    identity: Option<&'a Identity>,
    /// Built on first use: most workloads have no policy that asks for it.
    principal: OnceCell<String>,
}

impl<'a> Shown<'a> {
    fn new(identity: Option<&'a Identity>) -> Self {
        Self { identity, principal: OnceCell::new() }
    }

    fn principal(&self) -> Option<&str> {
        let identity = self.identity?;
        Some(self.principal.get_or_init(|| identity.principal()))
    }
}

impl<'a> Connection<'a> {
    fn new(facts: &InboundFacts<'a>) -> Self {
        Self {
            peer: Shown::new(facts.peer),
            client: facts.client.map(|client| Shown::new(Some(client))),
            // A dual-stack socket shows IPv4 peers as ::ffff:a.b.c.d; policies are written for a.b.c.d.
            source: facts.source_ip.to_canonical(),
            destination: facts.destination.ip().to_canonical(),
            port: facts.destination.port(),
        }
    }

    /// The names under which a rule of this action is tried.
    fn callers(&self, action: Action) -> [Option<Caller<'_>>; 2] {
        let (peer, client) = (&self.peer, self.client.as_ref());
        let allow = action == Action::Allow;
        [
            Some(Caller { name: peer, besides: client.filter(|_| allow) }),
            client.map(|client| Caller { name: client, besides: allow.then_some(peer) }),
        ]
    }

    fn satisfies(&self, m: &Match, caller: &Caller<'_>) -> bool {
        let namespace = |id: &Shown<'_>, s: &StringMatch| {
            id.identity.is_some_and(|id| s.matches(&id.namespace))
        };
        let account = |id: &Shown<'_>, (ns, sa): &(Str, Str)| {
            id.identity.is_some_and(|id| id.namespace == *ns && id.service_account == *sa)
        };
        let principal =
            |id: &Shown<'_>, s: &StringMatch| id.principal().is_some_and(|id| s.matches(id));
        let kinds = [
            kind_of(caller, &m.namespaces, &m.not_namespaces, namespace),
            kind_of(caller, &m.service_accounts, &m.not_service_accounts, account),
            kind_of(caller, &m.principals, &m.not_principals, principal),
            kind(&m.source_ips, &m.not_source_ips, |p| p.contains(self.source)),
            kind(&m.destination_ips, &m.not_destination_ips, |p| p.contains(self.destination)),
            kind(&m.destination_ports, &m.not_destination_ports, |p| *p == self.port),
        ];
        kinds.contains(&Some(true)) && !kinds.contains(&Some(false))
    }
}

/// Whether one kind of condition holds: any of the wanted, none of the unwanted. `None`: not set.
fn kind<T>(wanted: &[T], unwanted: &[T], is: impl Fn(&T) -> bool) -> Option<bool> {
    if wanted.is_empty() && unwanted.is_empty() {
        return None;
    }
    Some((wanted.is_empty() || wanted.iter().any(&is)) && !unwanted.iter().any(&is))
}

/// The same for a kind that is about who calls.
fn kind_of<T>(
    caller: &Caller<'_>,
    wanted: &[T],
    unwanted: &[T],
    is: impl Fn(&Shown<'_>, &T) -> bool,
) -> Option<bool> {
    let holds = kind(wanted, unwanted, |value| is(caller.name, value))?;
    let excluded = |other: &Shown<'_>| unwanted.iter().any(|value| is(other, value));
    Some(holds && !caller.besides.is_some_and(excluded))
}

fn denied_by(policy: &Policy, rule: &Rule, facts: &InboundFacts<'_>) -> Refusal {
    let provenance = provenance_of(policy, rule);
    let (peer, target) = (Peer(facts), Target(facts));
    let mut refusal = if demands_mtls(policy, &provenance) {
        let by = if provenance.object.is_empty() {
            policy.key.to_string()
        } else {
            provenance.to_string()
        };
        let message = format!("{peer} called {target}, and {by} demands mutual TLS");
        Refusal::new(Reason::MtlsRequired, message)
    } else {
        let message = format!("{peer} may not call {target}: DENY policy {} matches", policy.key);
        Refusal::new(Reason::PolicyDeny, message)
    };
    refusal.policy = Some(policy.key.clone());
    refusal.provenance = Some(provenance);
    refusal
}

/// A DENY that was converted from a PeerAuthentication. A stock Istio control plane sends no provenance;
/// its conversions are known by their names.
fn demands_mtls(policy: &Policy, provenance: &Provenance) -> bool {
    provenance.object.starts_with("PeerAuthentication/")
        || policy.key.name.starts_with("istio_converted_")
}

fn missing_policy(key: &PolicyKey, count: usize, facts: &InboundFacts<'_>) -> Refusal {
    let more = if count > 1 { format!(" and {} more", count - 1) } else { String::new() };
    let message = format!(
        "{} names policy {key}{more}, which this proxy does not have",
        Name(facts.workload)
    );
    let mut refusal = Refusal::new(Reason::PolicyMissing, message);
    refusal.policy = Some(key.clone());
    refusal
}

/// The refusal when ALLOW policies exist, none of which matched. It names the smallest as its policy.
fn not_allowed(policies: &[&Arc<Policy>], facts: &InboundFacts<'_>) -> Option<Refusal> {
    /// Names in the message: enough to see what is meant, short enough for a log line.
    const NAMED: usize = 3;
    let mut allowing: Vec<_> =
        policies.iter().filter(|p| p.action == Action::Allow && !p.dry_run).collect();
    allowing.sort_unstable_by(|a, b| a.key.cmp(&b.key));
    let first = allowing.first()?;
    let names: Vec<String> = allowing.iter().take(NAMED).map(|p| p.key.to_string()).collect();
    let rest = allowing.len().saturating_sub(NAMED);
    let more = if rest > 0 { format!(" and {rest} more") } else { String::new() };
    let message = format!(
        "{} may not call {}: no ALLOW policy matches (there {} {}{more})",
        Peer(facts),
        Target(facts),
        if allowing.len() == 1 { "is" } else { "are" },
        names.join(", "),
    );
    let mut refusal = Refusal::new(Reason::PolicyNoAllow, message);
    refusal.policy = Some(first.key.clone());
    refusal.provenance = Some(first.provenance.clone());
    Some(refusal)
}

/// Where the rule was written; the policy as a whole when the rule does not say.
fn provenance_of(policy: &Policy, rule: &Rule) -> Provenance {
    let known =
        if rule.provenance.object.is_empty() { &policy.provenance } else { &rule.provenance };
    known.clone()
}

/// The caller, for messages.
struct Peer<'a>(&'a InboundFacts<'a>);

impl fmt::Display for Peer<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.0.peer, self.0.client) {
            (Some(id), Some(client)) => {
                write!(f, "{client} through the waypoint {id} at {}", self.0.source_ip)
            }
            (Some(id), None) => write!(f, "{id} at {}", self.0.source_ip),
            (None, _) => write!(f, "the plaintext peer {}", self.0.source_ip),
        }
    }
}

/// The called workload and port, for messages.
struct Target<'a>(&'a InboundFacts<'a>);

impl fmt::Display for Target<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} port {}", Name(self.0.workload), self.0.destination.port())
    }
}

/// A workload, for messages.
struct Name<'a>(&'a Workload);

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.0.namespace, self.0.name)
    }
}

#[cfg(test)]
mod tests;
