//! What ends before its time: connections that a change of policy no longer allows, and those that a drain
//! does not wait for.

use std::time::Duration;

use model::{Reason, Refusal, Snapshot};

use crate::authz::{InboundFacts, Verdict, authorize, demands_mutual_tls};

/// Why a live connection must end under this configuration. `None`: it goes on. A decision that waits for a policy
/// in flight does not end what lives. `joined`: its ends were joined on their node without a tunnel, which mutual TLS
/// that is demanded since does not allow.
pub fn ended_by(snapshot: &Snapshot, facts: &InboundFacts<'_>, joined: bool) -> Option<Refusal> {
    let words = match authorize(snapshot, facts) {
        Verdict::Pending(_) => return None,
        Verdict::Deny(refusal) => {
            let message = format!("no longer allowed: {}", refusal.message);
            return Some(Refusal { message, reason: Reason::PolicyChanged, ..refusal });
        }
        Verdict::Allow(_) if joined && demands_mutual_tls(snapshot, facts) => {
            let (namespace, name) = (&facts.workload.namespace, &facts.workload.name);
            format!(
                "{namespace}/{name} demands mutual TLS now, and both ends were joined on their node"
            )
        }
        Verdict::Allow(_) => return None,
    };
    Some(Refusal::new(Reason::PolicyChanged, format!("no longer allowed: {words}")))
}

/// Where a drain stands: the process takes nothing new, and waits for what lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drain {
    Wait,
    /// Nothing lives any more.
    Done,
    /// Time is up: what is left is closed.
    Cut,
}

impl Drain {
    /// `open` connections after `waited` of `limit`.
    pub fn after(waited: Duration, limit: Duration, open: usize) -> Self {
        if open == 0 {
            Self::Done
        } else if waited >= limit {
            Self::Cut
        } else {
            Self::Wait
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use model::{Action, Change, Policy, PolicyKey, Provenance, Rule, Scope, Workload};

    use super::*;

    #[test]
    fn only_a_denial_ends_what_lives() {
        let key = PolicyKey { namespace: "ns".into(), name: "p".into() };
        let listed = Workload {
            addresses: [[10, 0, 0, 1].into()].into(),
            policies: [key.clone()].into(),
            ..Workload::named("w", "ns", "w")
        };
        let policy = |action| {
            let rules = [Rule::default()].into();
            let (scope, provenance) = (Scope::WorkloadSelector, Provenance::default());
            let key = key.clone();
            Change::SetPolicy(Arc::new(Policy {
                key,
                scope,
                action,
                rules,
                dry_run: false,
                provenance,
            }))
        };
        let check = |changes: Vec<Change>, want: Option<Reason>| {
            let facts = InboundFacts {
                workload: &listed,
                destination: ([10, 0, 0, 1], 80).into(),
                source_ip: [10, 0, 0, 2].into(),
                peer: None,
                client: None,
            };
            let ended = ended_by(&Snapshot::default().with(changes), &facts, true);
            assert_eq!(ended.map(|refusal| refusal.reason), want);
        };
        check(vec![policy(Action::Deny)], Some(Reason::PolicyChanged));
        check(vec![policy(Action::Allow)], None);
        // In flight: also of what was joined nobody knows yet whether mutual TLS is demanded.
        check(vec![], None);
    }

    #[test]
    fn a_drain_ends() {
        let s = Duration::from_secs;
        let check = |waited, open, want| assert_eq!(Drain::after(s(waited), s(10), open), want);
        check(0, 0, Drain::Done);
        check(0, 1, Drain::Wait);
        check(9, 1, Drain::Wait);
        check(10, 1, Drain::Cut);
        check(11, 0, Drain::Done);
    }
}
