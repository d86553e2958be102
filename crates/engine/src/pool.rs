//! Which tunnel a new stream takes, who dials when there is none, and which tunnels are given back.
//!
//! The book of one pool, without its sockets: the caller makes tunnels and waits, the book decides. Times are
//! since any moment that the caller sticks to.
//!
//! Invariants: streams go to the open tunnel with the fewest; per key there is one dial at a time, and those
//! who waited for one that failed share its error; a tunnel that is closed is never handed out, and is
//! gone from the book after the next [`PoolBook::sweep`].

use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use model::Reason;
use rustc_hash::FxHashMap;

/// What the book must know of a tunnel. Clones are the same tunnel.
pub trait Carrier: Clone {
    /// Streams that live on it, or are about to.
    fn streams(&self) -> usize;
    /// How many it may carry: `ours`, or less if the peer says so.
    fn capacity(&self, ours: usize) -> usize;
    /// No new stream may be opened.
    fn is_closed(&self) -> bool;
}

/// Limits of one pool.
#[derive(Clone, Copy, Debug)]
pub struct BookLimits {
    /// Streams on one tunnel before another is opened.
    pub streams: usize,
    pub tunnels: usize,
    /// A tunnel without streams is given back after this long.
    pub idle: Duration,
    /// The same for a tunnel beside which its key has another.
    pub spare: Duration,
}

/// See the module. `K` is everything that two streams must share to share a tunnel, `G` where those wait
/// who want to dial.
#[derive(Debug)]
pub struct PoolBook<K, T, G> {
    limits: BookLimits,
    entries: FxHashMap<K, Entry<T, G>>,
}

#[derive(Debug)]
struct Entry<T, G> {
    tunnels: Vec<Pooled<T>>,
    gate: Arc<G>,
    /// Counts dials that failed, so that those who waited for one learn of it and do not dial again.
    failures: u64,
    last_failure: Option<(String, Reason)>,
}

#[derive(Debug)]
struct Pooled<T> {
    tunnel: T,
    last_used: Duration,
}

/// A place among those who want to dial.
#[derive(Debug)]
pub struct Turn<G> {
    /// Held by who dials. While somebody holds a clone, the book keeps the entry.
    pub gate: Arc<G>,
    failures: u64,
}

/// What to do when it is one's turn.
#[derive(Debug)]
pub enum Next<T> {
    /// Somebody has made one meanwhile.
    Take(T),
    /// Dial, and tell [`PoolBook::dialled`].
    Dial,
    /// Somebody has tried meanwhile.
    Failed { message: String, reason: Reason },
    /// The pool holds as many tunnels as it may.
    Full(usize),
}

impl<T, G: Default> Default for Entry<T, G> {
    fn default() -> Self {
        Self { tunnels: Vec::new(), gate: Arc::default(), failures: 0, last_failure: None }
    }
}

impl<K: Eq + Hash + Clone, T: Carrier, G: Default> PoolBook<K, T, G> {
    pub fn new(limits: BookLimits) -> Self {
        Self { limits, entries: FxHashMap::default() }
    }

    /// The open tunnel with the fewest streams, if it has room.
    pub fn pick(&mut self, key: &K, now: Duration) -> Option<T> {
        let entry = self.entries.get_mut(key)?;
        entry.tunnels.retain(|p| !p.tunnel.is_closed());
        let pooled = entry.tunnels.iter_mut().min_by_key(|p| p.tunnel.streams())?;
        if pooled.tunnel.streams() >= pooled.tunnel.capacity(self.limits.streams) {
            return None;
        }
        pooled.last_used = now;
        Some(pooled.tunnel.clone())
    }

    /// Takes a place among those who want to dial for a key.
    pub fn queue(&mut self, key: &K) -> Turn<G> {
        let entry = self.entries.entry(key.clone()).or_default();
        Turn { gate: entry.gate.clone(), failures: entry.failures }
    }

    /// It is one's turn: nobody else dials for this key.
    pub fn next(&mut self, key: &K, turn: &Turn<G>, now: Duration) -> Next<T> {
        if let Some(tunnel) = self.pick(key, now) {
            return Next::Take(tunnel);
        }
        if self.entries.values().map(|e| e.tunnels.len()).sum::<usize>() >= self.limits.tunnels {
            return Next::Full(self.limits.tunnels);
        }
        match self.entries.get(key) {
            Some(Entry { failures, last_failure: Some((message, reason)), .. })
                if *failures != turn.failures =>
            {
                Next::Failed { message: message.clone(), reason: *reason }
            }
            _ => Next::Dial,
        }
    }

    /// What came of dialling.
    pub fn dialled(&mut self, key: &K, result: Result<T, (String, Reason)>, now: Duration) {
        let entry = self.entries.entry(key.clone()).or_default();
        match result {
            Ok(tunnel) => entry.tunnels.push(Pooled { tunnel, last_used: now }),
            Err(failure) => {
                entry.failures += 1;
                entry.last_failure = Some(failure);
            }
        }
    }

    /// Drops closed tunnels and those idle for too long. Call it now and then.
    pub fn sweep(&mut self, now: Duration) {
        let limits = self.limits;
        self.entries.retain(|_, entry| {
            for pooled in &mut entry.tunnels {
                if pooled.tunnel.streams() > 0 {
                    pooled.last_used = now;
                }
            }
            entry.tunnels.retain(|p| !p.tunnel.is_closed());
            // One stays for the long time, whoever was used last; the others are spare.
            let keep = entry.tunnels.iter().map(|p| p.last_used).max();
            let mut kept = false;
            entry.tunnels.retain(|p| {
                let main = !kept && Some(p.last_used) == keep;
                kept |= main;
                let limit = if main { limits.idle } else { limits.spare };
                now.saturating_sub(p.last_used) < limit
            });
            // Somebody dials while others hold the gate.
            !entry.tunnels.is_empty() || Arc::strong_count(&entry.gate) > 1
        });
    }

    /// Forgets every tunnel of these keys. Streams that live go on.
    pub fn forget(&mut self, of: impl Fn(&K) -> bool) {
        self.entries.retain(|key, _| !of(key));
    }

    /// Every tunnel, with its key.
    pub fn tunnels(&self) -> impl Iterator<Item = (&K, &T)> {
        let entries = self.entries.iter();
        entries.flat_map(|(key, entry)| entry.tunnels.iter().map(move |p| (key, &p.tunnel)))
    }

    /// Keys with a tunnel, a dial, or the memory of one.
    pub fn keys(&self) -> usize {
        self.entries.len()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;

    use super::*;

    #[derive(Clone, Debug, Default)]
    struct Wire(Rc<(Cell<usize>, Cell<bool>)>);

    impl Wire {
        fn with(streams: usize) -> Self {
            Self(Rc::new((Cell::new(streams), Cell::new(false))))
        }

        fn close(&self) {
            self.0.1.set(true);
        }
    }

    impl Carrier for Wire {
        fn streams(&self) -> usize {
            self.0.0.get()
        }

        fn capacity(&self, ours: usize) -> usize {
            ours
        }

        fn is_closed(&self) -> bool {
            self.0.1.get()
        }
    }

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn book() -> PoolBook<&'static str, Wire, ()> {
        PoolBook::new(BookLimits { streams: 10, tunnels: 3, idle: s(300), spare: s(10) })
    }

    #[test]
    fn the_fewest_streams_and_never_a_closed_tunnel() {
        let mut book = book();
        let (busy, free, full) = (Wire::with(4), Wire::with(3), Wire::with(10));
        for tunnel in [&full, &busy, &free] {
            book.dialled(&"k", Ok(tunnel.clone()), s(0));
        }
        assert_eq!(book.pick(&"k", s(1)).unwrap().streams(), 3);
        free.close();
        assert_eq!(book.pick(&"k", s(1)).unwrap().streams(), 4);
        busy.close();
        assert!(book.pick(&"k", s(1)).is_none(), "the other one is full");
        assert!(book.pick(&"other", s(1)).is_none());
    }

    #[test]
    fn who_waited_shares_the_result() {
        let mut book = book();
        let (first, second) = (book.queue(&"k"), book.queue(&"k"));
        assert!(matches!(book.next(&"k", &first, s(0)), Next::Dial));
        book.dialled(&"k", Err(("no route".into(), Reason::ConnectFailed)), s(1));
        drop(first);
        let shared = book.next(&"k", &second, s(1));
        assert!(matches!(shared, Next::Failed { reason: Reason::ConnectFailed, .. }), "{shared:?}");
        // Who comes later tries for himself.
        let third = book.queue(&"k");
        assert!(matches!(book.next(&"k", &third, s(2)), Next::Dial));
        book.dialled(&"k", Ok(Wire::with(0)), s(3));
        assert!(matches!(book.next(&"k", &second, s(3)), Next::Take(_)));
    }

    #[test]
    fn the_limit_is_of_all_keys() {
        let mut book = book();
        for key in ["a", "b", "c"] {
            book.dialled(&key, Ok(Wire::with(10)), s(0));
        }
        let turn = book.queue(&"d");
        assert!(matches!(book.next(&"d", &turn, s(0)), Next::Full(3)));
    }

    #[test]
    fn a_sweep_gives_back_what_is_closed_idle_or_spare() {
        let mut book = book();
        let (main, spare, used) = (Wire::with(0), Wire::with(0), Wire::with(1));
        book.dialled(&"k", Ok(spare), s(0));
        book.dialled(&"k", Ok(main), s(1));
        book.dialled(&"u", Ok(used.clone()), s(0));
        let waiting = book.queue(&"w");
        let count = |book: &PoolBook<_, _, ()>| (book.tunnels().count(), book.keys());
        book.sweep(s(9));
        assert_eq!(count(&book), (3, 3));
        book.sweep(s(10));
        assert_eq!(count(&book), (2, 3));
        book.sweep(s(301));
        assert_eq!(count(&book), (1, 2));
        drop(waiting);
        used.close();
        book.sweep(s(302));
        assert_eq!(count(&book), (0, 0));
    }
}
