//! What the routes of one Service may hold, and who has to do without.
//!
//! A proxy takes the routes of a Service whole or not at all, and anybody may write routes for his own clients. So room is given
//! out: first to the routes for everybody, then to those for the clients of one namespace, the smallest first. Who finds no
//! room is closed: the requests of these clients are answered with an error, and the objects are told.
//!
//! Invariants: what is given out always fits ([`model::http::limits`]); no routes are displaced by larger ones of another
//! namespace; the result does not depend on the order of the objects.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;

use model::http::limits::{Amount, MAX_LIST, MAX_PATTERNS, MAX_ROUTES_BYTES, MAX_RULES, MAX_SETS};
use model::http::{Audience, Filter, RouteKind, RouteMatch, RouteRule, RouteSet, Timeouts};
use model::{Reason, ServiceKey, Str};

use super::{Api, Contribution};

/// Which contributions decide for the clients of an audience, and on which of the Service's ports.
pub(super) type Sets = Vec<(Vec<usize>, Vec<u16>)>;

/// What became of an audience.
pub(super) enum Room {
    /// It has all that it asked for.
    Open,
    /// There is no room for it, and why.
    Closed(Arc<RouteSet>, Str),
    /// Nor for that. Nobody gets here with fewer than [`MAX_SETS`] namespaces.
    Out(Str),
}

/// Gives out the room of a Service; the answers stand beside `wanted`.
pub(super) fn give(
    service: &ServiceKey,
    ports: usize,
    wanted: &[(&Audience, Sets)],
    contributions: &[Arc<Contribution>],
) -> Vec<Room> {
    let amounts: Vec<Amount> =
        wanted.iter().map(|(audience, sets)| amount(audience, sets, contributions)).collect();
    let mut all = Amount::of_service(service, ports);
    let fixed = all.clone();
    amounts.iter().for_each(|amount| all.add(amount));
    if all.excess().is_none() {
        return wanted.iter().map(|_| Room::Open).collect();
    }
    let mut order: Vec<usize> = (0..wanted.len()).collect();
    order.sort_by_key(|i| {
        let audience = wanted[*i].0;
        (Reverse(*audience == Audience::Everybody), amounts[*i].share(), audience)
    });
    shared(order, fixed, wanted, &amounts, contributions)
}

/// Everybody has room to be closed before anybody has more.
fn shared(
    order: Vec<usize>,
    fixed: Amount,
    wanted: &[(&Audience, Sets)],
    amounts: &[Amount],
    contributions: &[Arc<Contribution>],
) -> Vec<Room> {
    let mut taken = fixed;
    let mut rooms: Vec<Option<Room>> = wanted.iter().map(|_| None).collect();
    let mut small = BTreeMap::new();
    for i in &order {
        let (audience, sets) = &wanted[*i];
        let why = amounts[*i].excess().unwrap_or_else(|| FULL.to_owned());
        let why: Str = format!("the routes hold more than a waypoint takes: {why}").into();
        let closed = closed(audience, sets, contributions, &why);
        let mut amount = Amount::default();
        if let Some(set) = &closed {
            amount.set(audience, set.ports.len());
            amount.content(set.rules.iter().map(|rule| &**rule), set.matches.iter());
        }
        let fits = fits(&taken, &amount, &Amount::default());
        rooms[*i] = Some(match closed.filter(|_| fits) {
            Some(set) => {
                taken.add(&amount);
                small.insert(*i, amount);
                Room::Closed(set, why)
            }
            None => Room::Out(why),
        });
    }
    for i in order {
        let Some(small) = small.get(&i) else { continue };
        if fits(&taken, &amounts[i], small) {
            taken.sets -= small.sets;
            taken.rules -= small.rules;
            taken.matches -= small.matches;
            taken.bytes -= small.bytes;
            taken.add(&amounts[i]);
            rooms[i] = Some(Room::Open);
        }
    }
    rooms.into_iter().flatten().collect()
}

const FULL: &str = "with what others have written for the Service there is no room for them";

/// Whether there is room for more where something else leaves.
fn fits(taken: &Amount, more: &Amount, less: &Amount) -> bool {
    let new = more.patterns.iter().filter(|p| !taken.patterns.contains(*p)).count();
    taken.sets + more.sets - less.sets <= MAX_SETS
        && taken.rules + more.rules - less.rules <= MAX_RULES
        && taken.matches + more.matches - less.matches <= MAX_RULES
        && taken.bytes + more.bytes - less.bytes <= MAX_ROUTES_BYTES
        && taken.patterns.len() + new <= MAX_PATTERNS
        && more.list <= MAX_LIST
}

fn amount(audience: &Audience, sets: &Sets, contributions: &[Arc<Contribution>]) -> Amount {
    let mut amount = Amount::default();
    for (members, ports) in sets {
        amount.set(audience, ports.len());
        members.iter().for_each(|i| amount.add(contributions[*i].amount()));
    }
    amount
}

/// One set for all ports of an audience that answers every request with an error.
fn closed(
    audience: &Audience,
    sets: &Sets,
    contributions: &[Arc<Contribution>],
    why: &Str,
) -> Option<Arc<RouteSet>> {
    let mut members = sets.iter().flat_map(|(members, _)| members).map(|i| &contributions[*i]);
    let first = members.next()?;
    let grpc = first.api == Api::GrpcRoute && members.all(|c| c.api == Api::GrpcRoute);
    let kind = if grpc { RouteKind::Grpc } else { RouteKind::Http };
    let mut ports: Vec<u16> = sets.iter().flat_map(|(_, ports)| ports).copied().collect();
    ports.sort_unstable();
    let rule = RouteRule {
        route: first.provenance.object.clone(),
        name: "closed".into(),
        provenance: first.provenance.clone(),
        filters: vec![Filter::Fail { reason: Reason::Unsupported, message: why.clone() }],
        backends: Vec::new(),
        timeouts: Timeouts::default(),
    };
    let (rules, matches) = (Arc::new([Arc::new(rule)]), Arc::new([RouteMatch::default()]));
    RouteSet::new((*audience).clone(), ports.into(), kind, rules, matches).ok().map(Arc::new)
}

#[cfg(test)]
mod tests;
