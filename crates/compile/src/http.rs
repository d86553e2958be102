//! HTTP routes of Services: what Gateway API's routes and Istio's VirtualServices say, as one answer per Service and port.
//!
//! Each API turns its objects into [`Contribution`]s; [`assemble`] puts them together: whose requests (producer or
//! consumer), which API wins on a port, and one flat list of matches in order of precedence. Rules are shared, not copied.
//!
//! Invariants: on one port of a Service and for one audience one API decides, in the order of [`Api`], and the loser is told;
//! what cannot be resolved is in the result as an error for requests, never left out; every proxy takes what is put together
//! (`budget`); the result does not depend on the order of the objects.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::mem;
use std::sync::{Arc, OnceLock};

use model::http::limits::Amount;
use model::http::{
    Audience, PortProtocol, Protocol, RouteKind, RouteMatch, RouteRule, RouteSet, ServiceRoutes,
    Subset,
};
use model::{Provenance, ServiceKey, Str};

use crate::context::Context;
use crate::diagnostics::{Code, Diagnostic};
use crate::object::Objects;
use crate::services::{self, ByNamespace};
use crate::waypoints::binding::Bindings;
use budget::Room;

mod budget;
pub(crate) mod destination_rule;
mod faults;
mod filters;
pub(crate) mod gateway;
mod hosts;
mod matches;
mod passage;
pub(crate) mod protocol;
mod rules;
mod shape;
mod status;
mod targets;
mod text;
pub(crate) mod virtual_service;

pub use status::{
    CONTROLLER_NAME, Condition, ConditionReason, ConditionType, ParentReference, RouteStatus,
};

/// What all objects say about HTTP.
#[derive(Debug, Default)]
pub(crate) struct Compiled {
    /// By service: those with routes, and those with a port that declares what it speaks.
    pub routes: Vec<Arc<ServiceRoutes>>,
    /// By kind, namespace, name, and place of the parent.
    pub status: Vec<Arc<RouteStatus>>,
}

/// What is not worked out again while it stays the same; good for as long as nothing but routes changes.
#[derive(Debug, Default)]
pub(crate) struct Memo {
    attached: gateway::Memo,
    /// Of VirtualServices.
    others: Vec<Arc<Contribution>>,
    /// Beside the Services.
    joined: Vec<Joined>,
}

/// What one object says about one Service.
#[derive(Debug)]
pub(crate) struct Contribution {
    pub service: ServiceKey,
    pub audience: Audience,
    /// The Service's own ports; ascending.
    pub ports: Vec<u16>,
    pub api: Api,
    /// The object.
    pub provenance: Provenance,
    pub rules: Vec<Arc<RouteRule>>,
    pub matches: Arc<[Ranked]>,
    /// [`Self::amount`], once it was asked for.
    pub holds: OnceLock<Amount>,
}

impl Contribution {
    /// Whether it says what another says.
    fn says(&self, other: &Self) -> bool {
        let Self { service, audience, ports, api, provenance, rules, matches, holds: _ } = self;
        *service == other.service
            && *audience == other.audience
            && *ports == other.ports
            && *api == other.api
            && *provenance == other.provenance
            && *rules == other.rules
            && *matches == other.matches
    }

    /// How much its rules and matches hold.
    fn amount(&self) -> &Amount {
        self.holds.get_or_init(|| {
            let mut amount = Amount::default();
            let matches = self.matches.iter().map(|ranked| &ranked.matched);
            amount.content(self.rules.iter().map(|rule| &**rule), matches);
            amount
        })
    }
}

/// Who wins on one port of a Service: the first. Gateway API says so of its own kinds, we of Istio's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Api {
    GrpcRoute,
    HttpRoute,
    VirtualService,
}

/// A match and its place among the matches of all rules of all objects of one API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ranked {
    pub rank: Rank,
    /// `rule` is an index into the contribution's own rules.
    pub matched: RouteMatch,
}

/// The place of a match: the smallest decides. Gateway API's order, field by field.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank {
    pub specificity: Specificity,
    /// No creation time, then the time in seconds: that is all Kubernetes keeps.
    pub age: (bool, i64),
    /// `namespace/name`: compared as one text, as Gateway API says.
    pub object: Str,
    pub rule: u32,
    pub place: u32,
}

/// What a match asks for; more comes first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Specificity {
    /// Exact paths, then patterns, then prefixes. Nothing says where patterns belong; between, since they can be as
    /// exact as an exact path, and a prefix never is.
    pub path: PathForm,
    /// Characters: of the path, or of gRPC's service.
    pub length: Reverse<usize>,
    /// Characters of gRPC's method.
    pub method_length: Reverse<usize>,
    pub method: Reverse<bool>,
    pub headers: Reverse<usize>,
    pub query: Reverse<usize>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum PathForm {
    Exact,
    Pattern,
    /// Every gRPC method match, too: there only the lengths count.
    #[default]
    Prefix,
}

/// What holds whatever the routes say.
pub(crate) struct Surroundings<'a> {
    pub services: &'a ByNamespace,
    pub subsets: &'a [Arc<Subset>],
    pub bindings: &'a Bindings<'a>,
}

/// `before`: the objects of the last time, of which only routes were others. `memo`: what was found then.
pub(crate) fn compile(
    objects: &Objects,
    before: Option<&Objects>,
    Surroundings { services, subsets, bindings }: Surroundings<'_>,
    memo: &mut Memo,
    cx: &mut Context<'_>,
) -> Compiled {
    memo.attached = gateway::attach_all(objects, before, services, &mut memo.attached, cx);
    let attached = &memo.attached;
    let mut contributions = attached.contributions();
    let others = virtual_service::contributions(objects, services, subsets, bindings, cx);
    memo.others = known(mem::take(&mut memo.others), others);
    contributions.extend(memo.others.iter().cloned());
    let Assembled { routes, losses, closed } = assemble(services, &contributions, &mut memo.joined);
    let judged = gateway::judge(attached, &contributions, &losses, &closed, bindings, cx);
    faults::check(objects, &judged.faults, cx);
    tell_others(&contributions, &losses, cx);
    tell_closed(&contributions, &closed, cx);
    Compiled { routes, status: judged.status }
}

/// In place of each that says the same as one of the last time, that one: what is made of it is known by its address.
fn known(last: Vec<Arc<Contribution>>, now: Vec<Contribution>) -> Vec<Arc<Contribution>> {
    let place = |c: &Contribution| {
        (c.provenance.object.clone(), c.service.clone(), c.audience.clone(), c.ports.clone())
    };
    let last: BTreeMap<_, _> = last.into_iter().map(|c| (place(&c), c)).collect();
    now.into_iter()
        .map(|new| match last.get(&place(&new)) {
            Some(old) if old.says(&new) => old.clone(),
            _ => Arc::new(new),
        })
        .collect()
}

/// What status does not tell: that a VirtualService has no say on a port.
fn tell_others(contributions: &[Arc<Contribution>], losses: &[Loss], cx: &mut Context<'_>) {
    let of_others = |l: &&Loss| contributions[l.contribution].api == Api::VirtualService;
    for Loss { contribution, port, winner } in losses.iter().filter(of_others) {
        let (loser, winner) = (&contributions[*contribution], &contributions[*winner].provenance);
        let Provenance { object, field, origin } = &loser.provenance;
        let message = format!("port {port} of {} belongs to {winner}", loser.service);
        let d = Diagnostic::error(Code::RouteConflict, message).help(gateway::ONE_KIND);
        cx.diagnostics.push(d.object(&**object).field(&**field).origin(&**origin));
    }
}

/// The same where a proxy has no room for a VirtualService; once for a Service, of however many clients.
fn tell_closed(contributions: &[Arc<Contribution>], closed: &Closed, cx: &mut Context<'_>) {
    let mut told = BTreeSet::new();
    for (contribution, why) in closed {
        let c = &contributions[*contribution];
        if c.api != Api::VirtualService || !told.insert((&c.provenance.object, &c.service)) {
            continue;
        }
        let Provenance { object, field, origin } = &c.provenance;
        let d = Diagnostic::error(Code::LimitExceeded, format!("{}: {why}", c.service));
        let d = d.help(CLOSED).object(&**object);
        cx.diagnostics.push(d.field(&**field).origin(&**origin));
    }
}

/// What becomes of requests when there is no room for their routes.
const CLOSED: &str = "requests of these clients are answered with an error until there are fewer";

/// A contribution, a port of its Service that another API has, and the first contribution of that one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Loss {
    contribution: usize,
    port: u16,
    winner: usize,
}

/// Contributions for which there is no room, and why.
type Closed = BTreeMap<usize, Str>;

struct Assembled {
    routes: Vec<Arc<ServiceRoutes>>,
    /// In the order of contributions and ports.
    losses: Vec<Loss>,
    closed: Closed,
}

/// What the contributions to one Service come to. Places are those among them.
#[derive(Debug)]
struct Joined {
    members: Vec<Arc<Contribution>>,
    routes: Option<Arc<ServiceRoutes>>,
    losses: Vec<Loss>,
    closed: Closed,
}

impl Joined {
    fn is_of(&self, members: &[usize], contributions: &[Arc<Contribution>]) -> bool {
        self.members.len() == members.len()
            && self.members.iter().zip(members).all(|(m, i)| Arc::ptr_eq(m, &contributions[*i]))
    }
}

/// `known`: what was found for each Service the last time, if the Services are the same.
fn assemble(
    services: &ByNamespace,
    contributions: &[Arc<Contribution>],
    known: &mut Vec<Joined>,
) -> Assembled {
    let mut of_service: BTreeMap<&ServiceKey, Vec<usize>> = BTreeMap::new();
    for (i, c) in contributions.iter().enumerate() {
        of_service.entry(&c.service).or_default().push(i);
    }
    let mut out = Assembled { routes: Vec::new(), losses: Vec::new(), closed: Closed::new() };
    let mut old = mem::take(known).into_iter();
    for service in services.values().flatten() {
        let places = of_service.remove(&service.service.key).unwrap_or_default();
        let joined = match old.next().filter(|old| old.is_of(&places, contributions)) {
            Some(same) => same,
            None => join(service, places.iter().map(|i| contributions[*i].clone()).collect()),
        };
        out.routes.extend(joined.routes.clone());
        out.losses.extend(joined.losses.iter().map(|loss| Loss {
            contribution: places[loss.contribution],
            winner: places[loss.winner],
            ..*loss
        }));
        out.closed.extend(joined.closed.iter().map(|(i, why)| (places[*i], why.clone())));
        known.push(joined);
    }
    out.routes.sort_by(|a, b| a.service.cmp(&b.service));
    out.losses.sort_unstable();
    out
}

fn join(service: &services::Compiled, members: Vec<Arc<Contribution>>) -> Joined {
    let mut audiences: BTreeMap<&Audience, Vec<usize>> = BTreeMap::new();
    for (i, c) in members.iter().enumerate() {
        audiences.entry(&c.audience).or_default().push(i);
    }
    let everybody = audiences.get(&Audience::Everybody).cloned().unwrap_or_default();
    let mut losses = Vec::new();
    let wanted: Vec<(&Audience, budget::Sets)> = audiences
        .into_iter()
        .map(|(audience, of)| {
            let ports = by_port(service, &members, &of, &everybody, &mut losses);
            (audience, ports.into_iter().collect())
        })
        .collect();
    let (ports, mut closed) = (protocols(service), Closed::new());
    let sets = sets(&service.service.key, ports.len(), wanted, &members, &mut closed);
    let declared = ports.iter().any(|p| p.protocol != Protocol::Undeclared);
    let routes = (declared || !sets.is_empty()).then(|| {
        let service = service.service.key.clone();
        Arc::new(ServiceRoutes { service, ports, sets: sets.into() })
    });
    Joined { members, routes, losses, closed }
}

fn sets(
    service: &ServiceKey,
    ports: usize,
    wanted: Vec<(&Audience, budget::Sets)>,
    contributions: &[Arc<Contribution>],
    closed: &mut Closed,
) -> Vec<Arc<RouteSet>> {
    let mut sets = Vec::new();
    let rooms = budget::give(service, ports, &wanted, contributions);
    for ((audience, wanted), room) in wanted.into_iter().zip(rooms) {
        let why = match room {
            Room::Open => {
                for (winners, ports) in wanted {
                    let members = winners.iter().map(|i| &*contributions[*i]);
                    sets.extend(set(audience.clone(), ports, members));
                }
                continue;
            }
            Room::Closed(set, why) => {
                sets.push(set);
                why
            }
            Room::Out(why) => why,
        };
        let members = wanted.into_iter().flat_map(|(members, _)| members);
        closed.extend(members.map(|i| (i, why.clone())));
    }
    sets
}

fn protocols(service: &services::Compiled) -> Arc<[PortProtocol]> {
    let ports = service.service.ports.iter().zip(&service.ports);
    let mut seen = BTreeSet::new();
    ports
        .filter(|(p, _)| seen.insert(p.service_port))
        .map(|(p, facts)| PortProtocol { service_port: p.service_port, protocol: facts.protocol })
        .collect()
}

/// Which contributions decide, and on which ports: those of the winning API. A VirtualService for the clients of one namespace
/// does not get past Gateway API's routes for `everybody`: those are for its clients, too.
fn by_port(
    service: &services::Compiled,
    contributions: &[Arc<Contribution>],
    members: &[usize],
    everybody: &[usize],
    losses: &mut Vec<Loss>,
) -> BTreeMap<Vec<usize>, Vec<u16>> {
    let mut ports: Vec<u16> = service.service.ports.iter().map(|p| p.service_port).collect();
    ports.sort_unstable();
    ports.dedup();
    let mut out: BTreeMap<Vec<usize>, Vec<u16>> = BTreeMap::new();
    for port in ports {
        let claims = |i: &&usize| contributions[**i].ports.binary_search(&port).is_ok();
        let claimants: Vec<usize> = members.iter().filter(claims).copied().collect();
        let Some(api) = claimants.iter().map(|i| contributions[*i].api).min() else { continue };
        let stronger = |i: &&usize| claims(i) && contributions[**i].api != Api::VirtualService;
        if api == Api::VirtualService
            && let Some(winner) = everybody.iter().find(stronger)
        {
            let loss = |contribution| Loss { contribution, port, winner: *winner };
            losses.extend(claimants.into_iter().map(loss));
            continue;
        }
        let (winners, losers): (Vec<usize>, Vec<usize>) =
            claimants.into_iter().partition(|i| contributions[*i].api == api);
        let winner = winners.first().copied().unwrap_or_default();
        losses.extend(losers.into_iter().map(|contribution| Loss { contribution, port, winner }));
        out.entry(winners).or_default().push(port);
    }
    out
}

fn set<'a>(
    audience: Audience,
    ports: Vec<u16>,
    members: impl Iterator<Item = &'a Contribution>,
) -> Option<Arc<RouteSet>> {
    let mut kind = RouteKind::Http;
    let mut rules = Vec::new();
    let mut ranked: Vec<(&Rank, u32, &RouteMatch)> = Vec::new();
    for member in members {
        if member.api == Api::GrpcRoute {
            kind = RouteKind::Grpc;
        }
        // Thousands of rules at most, by the limits of files and objects.
        let offset = u32::try_from(rules.len()).unwrap_or(u32::MAX);
        rules.extend(member.rules.iter().cloned());
        ranked.extend(member.matches.iter().map(|m| (&m.rank, offset, &m.matched)));
    }
    ranked.sort_by_key(|(rank, ..)| *rank);
    let matches: Arc<[RouteMatch]> = ranked
        .into_iter()
        .map(|(_, offset, m)| RouteMatch { rule: m.rule.saturating_add(offset), ..m.clone() })
        .collect();
    let ports: Arc<[u16]> = ports.into();
    let set = RouteSet::new(audience.clone(), ports.clone(), kind, rules.into(), matches);
    // A match of no rule is a fault of ours: nothing matches then, which answers with an error.
    let set = set.or_else(|_| RouteSet::new(audience, ports, kind, Arc::new([]), Arc::new([])));
    set.ok().map(Arc::new)
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
