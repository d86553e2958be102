//! Which certificate is asked for when: the book of a node's identities, without keys and without a CA.
//!
//! There are two times: that of the machine's timers, since any moment that the caller sticks to, and that of
//! its wall clock, in seconds since the epoch. The second may be set while the first goes on.
//!
//! Invariants: a certificate that failed to be renewed stays until it expires, and not a second longer; no
//! identity is asked for more often than its back-off allows, however many wait for it; nothing is asked
//! for others while the proxy has no valid certificate of its own; at most [`MAX_REQUESTS`] are under way.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::{Backoff, Rotation};

/// Requests to the CA at once: a node that starts with 250 pods must not look like an attack, and one
/// slow request must not hold up the others (Istio's number).
pub const MAX_REQUESTS: usize = 8;
/// The longest pause between two looks. Looking costs nothing, and finds clocks that were set.
pub const TICK: Duration = Duration::from_secs(60);

/// See the module. `I` names an identity.
#[derive(Debug)]
pub struct Renewals<I> {
    /// `None`: the proxy asks without a certificate.
    own: Option<I>,
    entries: BTreeMap<I, State>,
}

/// One wanted identity.
#[derive(Debug)]
pub struct State {
    /// The dates of its certificate, if there is one.
    pub held: Option<Rotation>,
    /// Why the last attempt to get one failed.
    pub error: Option<String>,
    backoff: Backoff,
    /// When to look at it again.
    due: Duration,
    in_flight: bool,
    /// To be replaced before its time.
    stale: bool,
    since: Duration,
    /// Connections wait for it: it goes before those that are only prepared.
    urgent: bool,
    /// The jitter of this certificate's renewal; the same until it is renewed.
    rand: u64,
}

/// What to do now.
#[derive(Debug, PartialEq, Eq)]
pub struct Begin<I> {
    /// Must no longer be used; with the second at which it ended.
    pub expired: Vec<(I, u64)>,
    /// Ask for these, and tell [`Renewals::issued`] or [`Renewals::failed`].
    pub ask: Vec<I>,
    /// Look again at this moment, or when something has happened.
    pub next: Duration,
}

impl<I: Ord + Clone> Renewals<I> {
    /// `own` is the proxy's own identity, without whose certificate the CA does not listen; `None` where the proxy shows
    /// itself in another way.
    pub fn new(own: Option<I>) -> Self {
        Self { own, entries: BTreeMap::new() }
    }

    pub fn get(&self, identity: &I) -> Option<&State> {
        self.entries.get(identity)
    }

    /// All wanted identities, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&I, &State)> {
        self.entries.iter()
    }

    /// Wants an identity that was not wanted before; what an earlier process left may serve meanwhile, or
    /// until it is replaced if it is `stale`.
    pub fn add(
        &mut self,
        identity: I,
        found: Option<Rotation>,
        stale: bool,
        now: Duration,
        rand: u64,
    ) {
        self.entries.insert(identity, State { stale, ..State::new(found, now, rand) });
    }

    /// Why there is no certificate, unless a better reason is known.
    pub fn explain(&mut self, identity: &I, why: impl FnOnce() -> String) {
        if let Some(state) = self.entries.get_mut(identity) {
            state.error.get_or_insert_with(why);
        }
    }

    /// A connection waits for it.
    pub fn urge(&mut self, identity: &I) {
        if let Some(state) = self.entries.get_mut(identity) {
            state.urgent = true;
        }
    }

    /// Nobody wants it any more. Says whether somebody did.
    pub fn forget(&mut self, identity: &I) -> bool {
        self.own.as_ref() != Some(identity) && self.entries.remove(identity).is_some()
    }

    /// Everything is to be replaced: the roots have changed.
    pub fn renew_all(&mut self, now: Duration) {
        for state in self.entries.values_mut() {
            state.stale = true;
            state.due = now;
        }
    }

    /// The control plane does not accept our certificate: another one is to be had, valid or not.
    pub fn own_refused(&mut self, now: Duration) {
        let Some(own) = &self.own else { return };
        if let Some(state) = self.entries.get_mut(own)
            // Two sides that disagree must not renew without a pause.
            && now.saturating_sub(state.since) > TICK
            && state.backoff.failures == 0
        {
            state.stale = true;
            state.due = now;
        }
    }

    /// What is due and may start, beside the requests that are under way. `wall`: seconds since the epoch.
    pub fn begin(&mut self, now: Duration, wall: u64, under_way: usize) -> Begin<I> {
        let expired = self.drop_expired(wall);
        let held = |own: &I| self.entries.get(own).is_some_and(|own| own.held.is_some());
        let may_ask = self.own.as_ref().is_none_or(held);
        for state in self.entries.values_mut() {
            state.postpone(now, wall);
        }
        let own = self.own.as_ref();
        let mut due: Vec<_> = self
            .entries
            .iter_mut()
            .filter(|(identity, state)| {
                !state.in_flight && state.due <= now && (may_ask || Some(*identity) == own)
            })
            .collect();
        due.sort_by_key(|(identity, state)| {
            (Some(*identity) != own, !state.urgent, state.held.is_some(), state.due)
        });
        let mut ask = Vec::new();
        for (identity, state) in due.into_iter().take(MAX_REQUESTS.saturating_sub(under_way)) {
            state.in_flight = true;
            ask.push(identity.clone());
        }
        let waiting = self.entries.values().filter(|state| !state.in_flight && state.due > now);
        let next = waiting.map(|state| state.due).min().unwrap_or(now + TICK).min(now + TICK);
        Begin { expired, ask, next }
    }

    /// The CA has answered. `false`: it was forgotten meanwhile.
    pub fn issued(
        &mut self,
        identity: &I,
        dates: Rotation,
        now: Duration,
        wall: u64,
        rand: u64,
    ) -> bool {
        let Some(state) = self.entries.get_mut(identity) else { return false };
        *state = State::new(Some(dates), now, rand);
        state.postpone(now, wall);
        true
    }

    /// The CA has refused or is away. Returns the pause before the next attempt, unless it was forgotten.
    pub fn failed(
        &mut self,
        identity: &I,
        error: String,
        now: Duration,
        rand: u64,
    ) -> Option<Duration> {
        let state = self.entries.get_mut(identity)?;
        state.in_flight = false;
        state.backoff.fail();
        let pause = Duration::from_millis(state.backoff.delay_ms(rand));
        state.due = now + pause;
        state.error = Some(error);
        Some(pause)
    }

    fn drop_expired(&mut self, wall: u64) -> Vec<(I, u64)> {
        let mut dropped = Vec::new();
        for (identity, state) in &mut self.entries {
            if let Some(dates) = state.held.take_if(|dates| dates.not_after <= wall) {
                dropped.push((identity.clone(), dates.not_after));
            }
        }
        dropped
    }
}

impl State {
    fn new(held: Option<Rotation>, now: Duration, rand: u64) -> Self {
        Self {
            held,
            error: None,
            backoff: Backoff::default(),
            due: now,
            in_flight: false,
            stale: false,
            since: now,
            urgent: false,
            rand,
        }
    }

    /// Moves on the moment of renewal of a certificate that is not yet due.
    fn postpone(&mut self, now: Duration, wall: u64) {
        let Some(dates) = self.held else { return };
        if self.in_flight || self.stale || self.backoff.failures > 0 || self.due > now {
            return;
        }
        self.due = now + Duration::from_secs(dates.wait(wall, self.rand));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    const DAY: Rotation = Rotation { not_before: 1_000_000, not_after: 1_086_400 };

    fn book(others: &[&'static str]) -> Renewals<&'static str> {
        let mut book = Renewals::new(Some("own"));
        for identity in [&"own"].into_iter().chain(others) {
            book.add(identity, None, false, s(0), 500);
        }
        book
    }

    #[test]
    fn the_own_certificate_comes_first_and_opens_the_way() {
        let mut book = book(&["a", "b"]);
        assert_eq!(book.begin(s(0), 1_000_000, 0).ask, ["own"]);
        assert_eq!(book.begin(s(1), 1_000_001, 0).ask, [""; 0]);
        book.issued(&"own", DAY, s(2), 1_000_002, 500);
        book.urge(&"b");
        assert_eq!(book.begin(s(2), 1_000_002, 0).ask, ["b", "a"]);
        assert!(book.failed(&"b", "away".into(), s(3), 0).is_some());
        assert_eq!(book.begin(s(3), 1_000_003, 0).ask, [""; 0]);
        assert_eq!(book.begin(s(4), 1_000_004, 0).ask, ["b"]);
        // Forgotten while the CA works on it.
        assert!(book.forget(&"b") && !book.forget(&"own"));
        assert!(!book.issued(&"b", DAY, s(5), 1_000_005, 0));
    }

    #[test]
    fn only_so_many_are_asked_at_once() {
        let names = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"];
        let mut book = book(&names);
        book.issued(&"own", DAY, s(0), 1_000_000, 500);
        assert_eq!(book.begin(s(0), 1_000_000, 0).ask.len(), MAX_REQUESTS);
        book.issued(&"a", DAY, s(1), 1_000_001, 500);
        assert_eq!(book.begin(s(1), 1_000_001, MAX_REQUESTS - 1).ask, ["i"]);
    }

    #[test]
    fn what_expires_is_not_used_and_asked_for() {
        let mut book = book(&["a"]);
        book.issued(&"own", DAY, s(0), 1_000_000, 500);
        book.issued(&"a", DAY, s(0), 1_000_000, 500);
        let begin = book.begin(s(1), 1_000_001, 0);
        assert_eq!((begin.ask, begin.next), (vec![], s(60)));
        // The clock is set to the second half of the life; then beyond it.
        assert_eq!(book.begin(s(61), 1_050_000, 0).ask, ["own", "a"]);
        let begin = book.begin(s(62), 1_086_400, 0);
        assert_eq!(begin.expired, [("a", 1_086_400), ("own", 1_086_400)]);
        assert!(book.get(&"a").unwrap().held.is_none());
    }

    #[test]
    fn a_refused_certificate_is_replaced_but_not_without_a_pause() {
        let mut book = book(&[]);
        book.issued(&"own", DAY, s(0), 1_000_000, 500);
        book.begin(s(0), 1_000_000, 0);
        book.own_refused(s(60));
        assert_eq!(book.begin(s(60), 1_000_060, 0).ask, [""; 0]);
        book.own_refused(s(61));
        assert_eq!(book.begin(s(61), 1_000_061, 0).ask, ["own"]);
        book.issued(&"own", DAY, s(62), 1_000_062, 500);
        book.renew_all(s(63));
        assert_eq!(book.begin(s(63), 1_000_063, 0).ask, ["own"]);
    }
}
