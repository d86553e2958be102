//! When to read which file again. Pure: `now` is an argument.
//!
//! People and tools save in many small steps: truncate, write, write, close; or write beside and rename;
//! or delete and write anew. Reading between the steps would show half a mesh, so:
//! - a path is read once it has been quiet for [`QUIET`], and nothing else moved either;
//! - a file that takes the place of another in one step, in a quiet folder, is whole and read at once;
//! - a file that is being written waits for its close, at most [`OPEN_MAX`];
//! - a file that is gone may be about to come back: it gets [`GONE`], and holds the rest back that long;
//! - under a steady stream of changes, all but those two are read after [`MAX`] at the latest.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Longer than the gaps within one save of any editor we know, too short for a person to notice.
pub(crate) const QUIET: Duration = Duration::from_millis(20);
/// What a person still takes for "at once".
pub(crate) const MAX: Duration = Duration::from_millis(200);
/// Deleting an object's file weakens or breaks something: being wrong for a moment is worse than late.
pub(crate) const GONE: Duration = Duration::from_millis(100);
/// A file that has been unsettled this long is not being saved but streamed to; the parser judges what is
/// there.
pub(crate) const OPEN_MAX: Duration = Duration::from_secs(1);

/// What happened to a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// Somebody writes, and has not closed it yet.
    Writing,
    /// Whole: closed after writing, or renamed to here.
    Settled,
    /// Renamed over a file that was there: how careful tools save. Nothing more is to come.
    Replaced,
    /// Deleted or renamed away.
    Gone,
}

/// What to read now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Batch<P> {
    pub paths: Vec<P>,
    /// Look at everything: events were lost, or a folder changed as a whole.
    pub rescan: bool,
}

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct Debounce<P> {
    pending: BTreeMap<P, Pending>,
    rescan: Option<Times>,
    /// The last event of all.
    moved: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Pending {
    change: Change,
    times: Times,
    /// Read without waiting for anything.
    at_once: bool,
}

#[derive(Clone, Copy, Debug)]
struct Times {
    /// The first event that nobody has read after.
    first: Instant,
    /// The first one of the kind that was last.
    since: Instant,
    last: Instant,
}

impl Times {
    fn new(now: Instant) -> Self {
        Self { first: now, since: now, last: now }
    }
}

impl<P> Default for Debounce<P> {
    fn default() -> Self {
        Self { pending: BTreeMap::new(), rescan: None, moved: None }
    }
}

impl<P: Ord + Clone> Debounce<P> {
    /// Something happened to a path.
    pub(crate) fn handle(&mut self, now: Instant, path: P, change: Change) {
        // Only the first of several files: the others tell that more is going on.
        let alone = self.pending.is_empty()
            && self.rescan.is_none()
            && self.moved.is_none_or(|moved| now.saturating_duration_since(moved) >= QUIET);
        self.moved = Some(now);
        let at_once = alone && change == Change::Replaced;
        let change = if change == Change::Replaced { Change::Settled } else { change };
        let new = Pending { change, times: Times::new(now), at_once };
        let pending = self.pending.entry(path).or_insert(new);
        if pending.change != change {
            pending.change = change;
            pending.times.since = now;
            pending.at_once = false;
        }
        pending.times.last = now;
    }

    /// Everything must be looked at.
    pub(crate) fn handle_rescan(&mut self, now: Instant) {
        self.moved = Some(now);
        self.rescan.get_or_insert_with(|| Times::new(now)).last = now;
    }

    /// When [`Self::take`] will have something. `None`: nothing is pending.
    pub(crate) fn due_at(&self) -> Option<Instant> {
        let held = self.pending.values().filter_map(Pending::held_until);
        self.free_at().into_iter().chain(held).min()
    }

    /// What is due now; empty when called too early.
    pub(crate) fn take(&mut self, now: Instant) -> Batch<P> {
        let all = self.free_at().is_some_and(|at| at <= now);
        let due = |p: &Pending| p.held_until().map_or(all, |until| until <= now);
        let paths: Vec<P> =
            self.pending.iter().filter(|(_, p)| due(p)).map(|(path, _)| path.clone()).collect();
        for path in &paths {
            self.pending.remove(path);
        }
        Batch { paths, rescan: all && self.rescan.take().is_some() }
    }

    /// When what is not held may be read.
    fn free_at(&self) -> Option<Instant> {
        let settled = self.pending.values().filter(|p| p.change == Change::Settled && !p.at_once);
        let free: Vec<Times> = settled.map(|p| p.times).chain(self.rescan).collect();
        let last = free.iter().map(|t| t.last).max()? + QUIET;
        let latest = free.iter().map(|t| (t.since + MAX).min(t.first + OPEN_MAX)).min()?;
        let gone = self.pending.values().filter(|p| p.change == Change::Gone);
        let together = gone.filter_map(Pending::held_until).max();
        Some(last.max(together.unwrap_or(last)).min(latest))
    }
}

impl Pending {
    fn held_until(&self) -> Option<Instant> {
        match self.change {
            Change::Settled | Change::Replaced if self.at_once => Some(self.times.first),
            Change::Settled | Change::Replaced => None,
            Change::Gone => Some((self.times.last + GONE).min(self.times.first + OPEN_MAX)),
            Change::Writing => Some(self.times.first + OPEN_MAX),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Change::{Gone, Replaced, Settled, Writing};
    use proptest::prelude::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// Plays events (milliseconds, path, change) and returns when which paths are read.
    fn play(events: &[(u64, &'static str, Change)]) -> Vec<(u64, Vec<&'static str>)> {
        let start = Instant::now();
        let mut debounce = Debounce::default();
        let mut read = Vec::new();
        let mut drain = |debounce: &mut Debounce<&'static str>, until: Option<Instant>| {
            while let Some(at) = debounce.due_at().filter(|at| until.is_none_or(|u| *at < u)) {
                let batch = debounce.take(at);
                assert!(!batch.paths.is_empty(), "woken for nothing");
                read.push((u64::try_from((at - start).as_millis()).unwrap(), batch.paths));
            }
        };
        for (at, path, change) in events {
            drain(&mut debounce, Some(start + ms(*at)));
            debounce.handle(start + ms(*at), *path, *change);
        }
        drain(&mut debounce, None);
        read
    }

    #[test]
    fn saves() {
        let check =
            |what: &str, events: &[(u64, &'static str, Change)], want: &[(u64, &[&str])]| {
                let got = play(events);
                let want: Vec<_> = want.iter().map(|(at, paths)| (*at, paths.to_vec())).collect();
                assert_eq!(got, want, "{what}");
            };
        check("a new file, renamed to here", &[(0, "a", Settled)], &[(20, &["a"])]);
        check("atomic rename over a file", &[(0, "a", Replaced)], &[(0, &["a"])]);
        check(
            "the first of several is read at once, the others together",
            &[(0, "a", Replaced), (5, "b", Replaced), (10, "c", Replaced), (90, "a", Replaced)],
            &[(0, &["a"]), (30, &["b", "c"]), (90, &["a"])],
        );
        check(
            "not while something is being written",
            &[(0, "b", Writing), (30, "a", Replaced), (40, "b", Settled)],
            &[(60, &["a", "b"])],
        );
        check(
            "truncate, write, close",
            &[(0, "a", Writing), (3, "a", Writing), (5, "a", Settled)],
            &[(25, &["a"])],
        );
        check(
            "a slow writer is waited for",
            &[(0, "a", Writing), (300, "a", Writing), (700, "a", Settled)],
            &[(720, &["a"])],
        );
        check(
            "a writer that never closes",
            &[(0, "a", Writing), (900, "a", Writing)],
            &[(1000, &["a"])],
        );
        check(
            "a slow writer does not hold others up",
            &[(0, "a", Writing), (1, "b", Settled), (500, "a", Settled)],
            &[(21, &["b"]), (520, &["a"])],
        );
        check(
            "vim: rename away, write anew",
            &[(0, "a", Gone), (2, "a", Writing), (4, "a", Settled)],
            &[(24, &["a"])],
        );
        check("delete", &[(0, "a", Gone)], &[(100, &["a"])]);
        check(
            "a file renamed: both ends at once",
            &[(0, "a", Gone), (0, "b", Settled)],
            &[(100, &["a", "b"])],
        );
        check(
            "several files",
            &[(0, "a", Settled), (15, "b", Settled), (30, "c", Settled)],
            &[(50, &["a", "b", "c"])],
        );
        let stream: Vec<_> = (0..30).map(|i| (i * 10, "a", Settled)).collect();
        check("a steady stream is read in between", &stream, &[(200, &["a"]), (310, &["a"])]);
    }

    #[test]
    fn rescans_are_debounced_too() {
        let start = Instant::now();
        let mut debounce = Debounce::<u8>::default();
        debounce.handle_rescan(start);
        debounce.handle_rescan(start + ms(10));
        assert_eq!(debounce.due_at(), Some(start + ms(30)));
        assert_eq!(debounce.take(start + ms(29)), Batch { paths: vec![], rescan: false });
        assert_eq!(debounce.take(start + ms(30)), Batch { paths: vec![], rescan: true });
        assert_eq!(debounce.due_at(), None);
    }

    proptest! {
        /// Every change is read after it settled, soon, and exactly the pending paths are read.
        #[test]
        fn nothing_is_forgotten(
            events in proptest::collection::vec((0_u64..40, 0_usize..3, 0_u8..4), 1..40),
        ) {
            const NAMES: [&str; 3] = ["a", "b", "c"];
            let mut at = 0;
            let mut last = BTreeMap::new();
            let events: Vec<_> = events.into_iter().map(|(gap, path, change)| {
                at += gap;
                let change = [Writing, Settled, Gone, Replaced][usize::from(change)];
                last.insert(NAMES[path], at);
                (at, NAMES[path], change)
            }).collect();
            let read = play(&events);
            for (path, last) in last {
                let after = read.iter().find(|(at, paths)| *at >= last && paths.contains(&path));
                prop_assert!(after.is_some_and(|(at, _)| at - last <= 1000), "{} {:?}", path, read);
            }
        }
    }
}
