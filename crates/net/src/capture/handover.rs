//! Switching capture on and off under connections that live.
//!
//! Without connection tracking the kernel does not know which way a connection went when it began, so we tell it: sets in
//! the table hold the flows that were open at the moment of the switch, and they are treated as before.
//! - After [`enrol`] the direct flows pass: they stay outside the mesh.
//! - After [`leave`] the proxied flows still go to the proxy that serves them.
//!
//! No flow falls between: first the rules *note* every connection that opens from now on, then the open sockets are
//! listed, then one transaction adds them to those noted, stops noting, and switches. Noting and deciding are always
//! rules of one chain: of one chain's rules a packet sees all old ones or all new ones, of two chains' not.
//!
//! Invariants: a connection that opens after the switch never profits from an entry, even with the same ports: its first
//! packet deletes the entry. Entries thus only ever become fewer, and with the last one [`settle`] takes the rules away
//! that look for them.

use std::collections::HashSet;

use model::HBONE_PORT;

use super::{
    CaptureError, Dns, MARK_MASK, MARK_OUTBOUND, OUTBOUND_PORT, State, TABLE, prepare, table,
    take_routing_away,
};
use crate::flows::{self, Flow};
use crate::netns::NetNs;
use crate::nft::{self, Change, Entry, Family, Field, Rule, Set, TCP, Table, Verdict, Way};

/// What the entries of a pair of sets, one for each family, are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Noted {
    /// Connections from before capture.
    Direct,
    /// Connections that the proxy serves.
    Proxied,
}

impl Noted {
    fn set(self, ipv6: bool) -> &'static str {
        match (self, ipv6) {
            (Self::Direct, false) => "direct4",
            (Self::Direct, true) => "direct6",
            (Self::Proxied, false) => "proxied4",
            (Self::Proxied, true) => "proxied6",
        }
    }

    fn empty<'a>(self) -> [Change<'a>; 2] {
        [false, true].map(|ipv6| Change::Empty(Family::Inet, TABLE, self.set(ipv6)))
    }
}

/// Switches capture on; what is open stays as it is. Listeners should stand before. Returns the number of connections
/// that stay outside.
pub fn enrol(ns: &NetNs, dns: Dns) -> Result<usize, CaptureError> {
    ns.run(|| {
        prepare()?;
        match state()? {
            // Connections that open now are captured: noting them as direct would let them out.
            Some((State::Captured | State::Exempting, _)) => return Ok(0),
            Some((State::Left, _)) => {
                let rules = table(State::Entering, dns);
                let [v4, v6] = Noted::Direct.empty();
                commit("note what opens", &[v4, v6, Change::Rules(&rules)])?;
            }
            _ => commit("note what opens", &[Change::Replace(&table(State::Entering, dns))])?,
        }
        let (_, direct) = flows::split(flows::tcp().map_err(CaptureError::Connections)?);
        // Tunnels of an earlier time in the mesh are the proxy's, whose mark exempts them.
        let is_tunnel = |f: &Flow| f.own.port() == HBONE_PORT || f.other.port() == HBONE_PORT;
        let direct: Vec<Flow> = direct.into_iter().filter(|f| !is_tunnel(f)).collect();
        let (entries, rules) = (noting(Noted::Direct, &direct), table(State::Exempting, dns));
        commit("switch capture on", &[Change::Entries(&entries), Change::Rules(&rules)])?;
        Ok(direct.len())
    })
    .map_err(CaptureError::Namespace)?
}

/// Switches capture off; what the proxy serves stays with it. Returns the number of connections that do.
pub fn leave(ns: &NetNs) -> Result<usize, CaptureError> {
    ns.run(|| {
        let dns = match state()? {
            Some((State::Captured | State::Exempting, dns)) => dns,
            Some(_) => return Ok(0),
            None => {
                // Nothing there, or damaged by hand: what is left of it would drop what opens from now on.
                nft::delete(Family::Inet, TABLE).map_err(CaptureError::Table)?;
                return Ok(0);
            }
        };
        let leaving = table(State::Leaving, dns);
        let [v4, v6] = Noted::Proxied.empty();
        commit("note what opens", &[v4, v6, Change::Rules(&leaving)])?;
        let (proxied, _) = flows::split(flows::tcp().map_err(CaptureError::Connections)?);
        let (entries, rules) = (noting(Noted::Proxied, &proxied), table(State::Left, dns));
        commit("switch capture off", &[Change::Entries(&entries), Change::Rules(&rules)])?;
        Ok(proxied.len() / 2)
    })
    .map_err(CaptureError::Namespace)?
}

/// Looks at what is left of a switch. Returns how many connections still need it; once that is 0, what was there for
/// them is gone. After [`leave`] call it only when the proxy has closed its listeners.
pub fn settle(ns: &NetNs) -> Result<usize, CaptureError> {
    ns.run(|| {
        let (mirrored, direct) = flows::split(flows::tcp().map_err(CaptureError::Connections)?);
        match state()? {
            Some((State::Exempting, dns)) => {
                let mut noted = HashSet::new();
                for ipv6 in [false, true] {
                    let keys = nft::keys(Family::Inet, TABLE, Noted::Direct.set(ipv6));
                    noted.extend(keys.map_err(CaptureError::Table)?);
                }
                let left = direct.iter().filter(|f| noted.contains(entry(f).key())).count();
                if left == 0 {
                    let [v4, v6] = Noted::Direct.empty();
                    let rules = table(State::Captured, dns);
                    commit("end exemptions", &[Change::Rules(&rules), v4, v6])?;
                }
                Ok(left)
            }
            Some((State::Left, _)) if mirrored.is_empty() => {
                nft::delete(Family::Inet, TABLE).map_err(CaptureError::Table)?;
                take_routing_away().map_err(CaptureError::Routing)?;
                Ok(0)
            }
            Some((State::Left, _)) => Ok(mirrored.len().div_ceil(2)),
            _ => Ok(0),
        }
    })
    .map_err(CaptureError::Namespace)?
}

/// What the table in the kernel does; none when it is not there or not as we made it.
pub(super) fn state() -> Result<Option<(State, Dns)>, CaptureError> {
    for state in [State::Captured, State::Exempting, State::Left] {
        for dns in [Dns::Captured, Dns::Left] {
            if nft::is_intact(&table(state, dns)).map_err(CaptureError::Table)? {
                return Ok(Some((state, dns)));
            }
        }
    }
    Ok(None)
}

fn commit(what: &str, changes: &[Change<'_>]) -> Result<(), CaptureError> {
    nft::commit(what, changes).map_err(CaptureError::Table)
}

/// The sets of the table, empty.
pub(super) fn sets() -> Vec<Set> {
    let kinds = [Noted::Direct, Noted::Proxied];
    kinds.into_iter().flat_map(|kind| [set(kind, false, &[]), set(kind, true, &[])]).collect()
}

fn set(kind: Noted, ipv6: bool, flows: &[Flow]) -> Set {
    let ip = if ipv6 { Field::Ipv6 } else { Field::Ipv4 };
    let of_family = flows.iter().filter(|f| f.own.is_ipv6() == ipv6 && f.other.is_ipv6() == ipv6);
    Set {
        name: kind.set(ipv6).to_owned(),
        key: vec![ip, Field::Port, ip, Field::Port],
        value: vec![],
        verdicts: false,
        entries: of_family.map(entry).collect(),
        dynamic: true,
    }
}

fn entry(flow: &Flow) -> Entry {
    let Flow { own, other } = flow;
    Entry::new().ip(own.ip()).port(own.port()).ip(other.ip()).port(other.port())
}

/// Entries for the sets of a kind.
fn noting(kind: Noted, flows: &[Flow]) -> Table {
    Table {
        family: Family::Inet,
        name: TABLE.to_owned(),
        sets: vec![set(kind, false, flows), set(kind, true, flows)],
        chains: vec![],
    }
}

/// Output: notes every connection that opens.
pub(super) fn note_sent(kind: Noted) -> Vec<Rule> {
    let note =
        |ipv6| Rule::new("opens now").tcp_opening().remember_flow(ipv6, Way::Sent, kind.set(ipv6));
    vec![note(false), note(true)]
}

/// Prerouting: the same for those that come from outside, seen from the pod.
pub(super) fn note_received() -> Vec<Rule> {
    let note = |ipv6| {
        let rule = Rule::new("opens now").mark(0, MARK_MASK).tcp_opening();
        rule.remember_flow(ipv6, Way::Received, Noted::Direct.set(ipv6))
    };
    vec![note(false), note(true)]
}

/// Output: lets direct flows pass.
pub(super) fn exempt() -> Vec<Rule> {
    let rules = |ipv6| {
        let set = Noted::Direct.set(ipv6);
        [
            Rule::new("a new connection").tcp_opening().forget_flow(ipv6, set),
            Rule::new("before capture").flow_in(ipv6, set).verdict(Verdict::Return),
        ]
    };
    [rules(false), rules(true)].concat()
}

/// Output: sends proxied flows to the proxy, and nothing else.
pub(super) fn keep() -> Vec<Rule> {
    let rules = |ipv6| {
        let set = Noted::Proxied.set(ipv6);
        [
            Rule::new("a new connection").tcp_opening().forget_flow(ipv6, set),
            Rule::new("the proxy serves it").flow_in(ipv6, set).set_mark(MARK_OUTBOUND),
        ]
    };
    [rules(false), rules(true)].concat()
}

/// Prerouting: a connection that had just left the app when capture ended.
pub(super) fn still_under_way() -> Vec<Rule> {
    let from_app =
        |comment| Rule::new(comment).from_loopback().mark(MARK_OUTBOUND, MARK_MASK).protocol(TCP);
    vec![
        from_app("under way to the proxy").tproxy(OUTBOUND_PORT).verdict(Verdict::Accept),
        from_app("its next try goes its own way").tcp_opening().verdict(Verdict::Drop),
    ]
}

#[cfg(test)]
mod tests;
