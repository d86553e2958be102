//! How a route is at each of its parents, once it is known who won where: its status, and what there is to complain about.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use model::Str;

use super::{Attached, Memo, ONE_KIND, Parent, Refused};
use crate::context::Context;
use crate::diagnostics::{Code, Diagnostic};
use crate::http::passage::{self, Missed};
use crate::http::protocol::ports;
use crate::http::rules::DROPPED;
use crate::http::status::{CONTROLLER_NAME, Condition, ConditionReason, ConditionType};
use crate::http::{CLOSED, Closed, Contribution, Loss, RouteStatus};
use crate::waypoints::binding::Bindings;

/// What is known of routes once it is known who won where.
#[derive(Debug)]
pub(in crate::http) struct Judged {
    /// Every route at every parent that is ours.
    pub status: Vec<Arc<RouteStatus>>,
    /// The `HTTPFault`s that routes name, and whether any request can meet them.
    pub faults: BTreeMap<(Str, Str), bool>,
}

/// The same of one route.
#[derive(Debug, Default)]
pub(super) struct Verdict {
    status: Vec<Arc<RouteStatus>>,
    diagnostics: Vec<Diagnostic>,
    /// Some request can meet it.
    acts: bool,
}

/// Who has a say beside a route: places among all contributions.
struct Others<'a> {
    contributions: &'a [Arc<Contribution>],
    /// By contribution: ports that it lost, and to whom.
    lost: BTreeMap<usize, BTreeMap<u16, usize>>,
    closed: &'a Closed,
}

pub(in crate::http) fn judge(
    attached: &Memo,
    contributions: &[Arc<Contribution>],
    losses: &[Loss],
    closed: &Closed,
    bindings: &Bindings<'_>,
    cx: &mut Context<'_>,
) -> Judged {
    let mut others = Others { contributions, lost: BTreeMap::new(), closed };
    for loss in losses {
        others.lost.entry(loss.contribution).or_default().insert(loss.port, loss.winner);
    }
    let mut out = Judged { status: Vec::new(), faults: BTreeMap::new() };
    let mut first = 0;
    for route in attached.all() {
        let own = first..first + route.contributions.len();
        let disputed = others.lost.range(own.clone()).next().is_some()
            || closed.range(own.clone()).next().is_some();
        let judge = || route.judge(first, &others, bindings);
        let anew;
        let verdict = if disputed {
            anew = judge();
            &anew
        } else {
            route.undisputed.get_or_init(judge)
        };
        out.status.extend(verdict.status.iter().cloned());
        cx.diagnostics.extend(verdict.diagnostics.iter().cloned());
        for fault in &route.faults {
            let key = (route.object.key.0.clone(), fault.clone());
            *out.faults.entry(key).or_default() |= verdict.acts;
        }
        first = own.end;
    }
    out
}

impl Attached {
    /// `first`: the place of its first contribution.
    fn judge(&self, first: usize, others: &Others<'_>, bindings: &Bindings<'_>) -> Verdict {
        let mut out = Verdict::default();
        for parent in &self.parents {
            let attachment = parent.verdict.as_ref().ok();
            let contribution = attachment.and_then(|a| a.contribution).map(|own| first + own);
            let accepted = self.accepted(parent, contribution, others, &mut out.diagnostics);
            let passage = self.passage(parent, bindings, &mut out.diagnostics);
            out.acts |= accepted.0 && passage.as_ref().is_some_and(Result::is_ok);
            out.status.push(Arc::new(RouteStatus {
                kind: self.object.kind,
                namespace: self.object.key.0.clone(),
                name: self.object.key.1.clone(),
                parent_ref: parent.reference.clone(),
                controller_name: CONTROLLER_NAME,
                conditions: self.conditions(accepted, passage),
            }));
        }
        out
    }

    /// Whether the route applies at a parent, and what there is to say. A refusal is reported.
    fn accepted(
        &self,
        parent: &Parent,
        contribution: Option<usize>,
        others: &Others<'_>,
        found: &mut Vec<Diagnostic>,
    ) -> (bool, ConditionReason, String) {
        let none = BTreeMap::new();
        let lost = contribution.and_then(|c| others.lost.get(&c)).unwrap_or(&none);
        let closed = contribution.and_then(|c| others.closed.get(&c));
        let at = format!("spec.parentRefs[{}]", parent.index);
        let attachment = match &parent.verdict {
            Ok(attachment) => attachment,
            Err(Refused { reason, code, message, help }) => {
                let d = Diagnostic::error(*code, message.clone()).field(at).help(*help);
                found.push(self.object.found(d));
                return (false, *reason, message.clone());
            }
        };
        if self.nothing_left {
            let reason = self.dropped.first().map_or(ConditionReason::UnsupportedValue, |d| d.0);
            return (false, reason, format!("no rule is left: {}", self.why_dropped()));
        }
        if let Some(why) = closed {
            let message = format!("{}: {why}", attachment.service.key);
            let d = Diagnostic::error(Code::LimitExceeded, message.clone()).field(at);
            found.push(self.object.found(d.help(CLOSED)));
            return (false, ConditionReason::UnsupportedValue, message);
        }
        let own: Vec<u16> =
            attachment.ports.iter().filter(|p| lost.contains_key(p)).copied().collect();
        let name = &attachment.service.key;
        if own.is_empty() {
            let message = format!("applies to {} of {name}", ports(&attachment.ports));
            return (true, ConditionReason::Accepted, message);
        }
        let winners: BTreeSet<usize> = own.iter().filter_map(|p| lost.get(p)).copied().collect();
        let winners = winners.iter().filter_map(|w| others.contributions.get(*w));
        let winners: Vec<String> = winners.map(|w| w.provenance.to_string()).collect();
        let message = format!("{} of {name} belongs to {}", ports(&own), winners.join(", "));
        let d = Diagnostic::error(Code::RouteConflict, message.clone()).field(at);
        found.push(self.object.found(d.help(ONE_KIND)));
        if own.len() == attachment.ports.len() {
            return (false, ConditionReason::Conflicted, message);
        }
        let rest: Vec<u16> =
            attachment.ports.iter().filter(|p| !own.contains(p)).copied().collect();
        let message = format!("applies to {} of {name}; {message}", ports(&rest));
        (true, ConditionReason::Accepted, message)
    }

    /// Whether what is sent to a parent passes a waypoint; `None` where there is no parent. What is missing is reported.
    fn passage(
        &self,
        parent: &Parent,
        bindings: &Bindings<'_>,
        found: &mut Vec<Diagnostic>,
    ) -> Option<Result<(), Box<Missed>>> {
        let attachment = parent.verdict.as_ref().ok()?;
        let checked = passage::check(&attachment.service, &self.object.key.0, bindings);
        if let Err(missed) = &checked {
            let at = format!("spec.parentRefs[{}]", parent.index);
            found.push(self.object.found(missed.finding.clone().field(at)));
        }
        Some(checked)
    }

    fn conditions(
        &self,
        accepted: (bool, ConditionReason, String),
        passage: Option<Result<(), Box<Missed>>>,
    ) -> Vec<Condition> {
        let generation = self.object.generation;
        let new = |kind, status, reason, message| {
            Condition::new(kind, status, reason, message, generation)
        };
        let (is_accepted, reason, message) = accepted;
        let mut out = vec![new(ConditionType::Accepted, is_accepted, reason, message)];
        let resolved = ConditionType::ResolvedRefs;
        out.push(match self.bad_references.first() {
            None => new(resolved, true, ConditionReason::ResolvedRefs, String::new()),
            Some((reason, _)) => {
                let all: Vec<&str> = self.bad_references.iter().map(|b| b.1.as_str()).collect();
                new(resolved, false, *reason, all.join("; "))
            }
        });
        if is_accepted && let Some((reason, _)) = self.dropped.first() {
            out.push(new(ConditionType::PartiallyInvalid, true, *reason, self.why_dropped()));
        }
        let waypoints = ConditionType::ResolvedWaypoints;
        out.extend(passage.map(|passage| match passage {
            Ok(()) => new(waypoints, true, ConditionReason::ResolvedWaypoints, String::new()),
            Err(missed) => new(waypoints, false, missed.reason, missed.finding.message),
        }));
        out
    }

    fn why_dropped(&self) -> String {
        let mut all: Vec<&str> = self.dropped.iter().map(|d| d.1.as_str()).collect();
        all.sort_by_key(|why| !why.starts_with(DROPPED));
        all.join("; ")
    }
}
