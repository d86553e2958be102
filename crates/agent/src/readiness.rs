//! What must have happened before this program may be called ready.
//!
//! Invariant: not ready without a name for what is missing.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

/// The things that are awaited. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Readiness {
    pending: Arc<Mutex<BTreeMap<&'static str, usize>>>,
    /// Counts changes.
    changed: watch::Sender<u64>,
}

impl Readiness {
    /// Ready as soon as everything named by [`Readiness::wait_for`] is done; with nothing named, at once.
    pub fn new() -> Self {
        Self::default()
    }

    /// The program is not ready until the result is dropped. It may be named again later, for example
    /// when a connection that was up is lost. Names may repeat.
    #[must_use = "dropping it says that it is done"]
    pub fn wait_for(&self, name: &'static str) -> Awaited {
        self.change(|pending| *pending.entry(name).or_default() += 1);
        Awaited { name, of: self.clone() }
    }

    /// What is still awaited; empty: ready.
    pub fn pending(&self) -> Vec<&'static str> {
        self.change(|pending| pending.keys().copied().collect())
    }

    pub fn is_ready(&self) -> bool {
        self.change(|pending| pending.is_empty())
    }

    /// Waits until everything is done.
    pub async fn ready(&self) {
        // Subscribed before the first look: a change in between is not missed.
        let mut changed = self.changed.subscribe();
        while !self.is_ready() {
            // The sender lives in `self`.
            let _ = changed.changed().await;
        }
    }

    fn change<T>(&self, f: impl FnOnce(&mut BTreeMap<&'static str, usize>) -> T) -> T {
        f(&mut self.pending.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Something that is awaited, until it is dropped.
#[derive(Debug)]
pub struct Awaited {
    name: &'static str,
    of: Readiness,
}

impl Drop for Awaited {
    fn drop(&mut self) {
        self.of.change(|pending| match pending.get_mut(self.name) {
            Some(count) if *count > 1 => *count -= 1,
            _ => {
                pending.remove(self.name);
            }
        });
        self.of.changed.send_modify(|changes| *changes += 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_when_all_is_done() {
        let r = Readiness::new();
        assert!(r.is_ready());
        let (a, b, again) = (r.wait_for("xds"), r.wait_for("certificates"), r.wait_for("xds"));
        assert_eq!(r.pending(), ["certificates", "xds"]);
        drop(a);
        assert_eq!(r.pending(), ["certificates", "xds"]);
        drop((b, again));
        assert!(r.is_ready() && r.pending().is_empty());
        let lost = r.wait_for("xds");
        assert!(!r.is_ready());
        drop(lost);
        assert!(r.is_ready());
    }
}
