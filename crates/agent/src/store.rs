//! The configuration in force: one [`Snapshot`], replaced by one pointer swap.
//!
//! Readers on data threads load a pointer and never wait. Writers publish; whoever waits for a change is
//! woken after the swap, so that a woken reader sees at least what it was woken for. Old snapshots are
//! dropped on a thread of their own: freeing a mesh must not cost a connection its millisecond.

use std::sync::{Arc, mpsc};
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};
use model::Snapshot;
use tokio::sync::watch;

/// How often the dropper looks whether the last reader of an old snapshot has let go.
const DROP_INTERVAL: Duration = Duration::from_millis(100);

/// See the module.
pub struct ConfigStore {
    current: ArcSwap<Snapshot>,
    /// Counts publications. The receiver's value is at most the generation of what `load` returns.
    generation: watch::Sender<u64>,
    old: Option<mpsc::Sender<Arc<Snapshot>>>,
}

impl Default for ConfigStore {
    /// An empty configuration.
    fn default() -> Self {
        let (old, snapshots) = mpsc::channel();
        let dropper = std::thread::Builder::new().name("config-drop".into());
        let dropper = dropper.spawn(move || drop_old(&snapshots));
        if let Err(e) = &dropper {
            tracing::warn!(
                "no thread for old configurations, they are dropped where they end: {e}"
            );
        }
        Self {
            current: ArcSwap::default(),
            generation: watch::Sender::new(0),
            old: dropper.is_ok().then_some(old),
        }
    }
}

impl std::fmt::Debug for ConfigStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConfigStore")
            .field("generation", &*self.generation.borrow())
            .field("snapshot", &**self.load())
            .finish()
    }
}

impl ConfigStore {
    /// The configuration in force. Cheap; hold it for one decision, not across waits.
    pub fn load(&self) -> Guard<Arc<Snapshot>> {
        self.current.load()
    }

    /// The configuration in force, to keep.
    pub fn load_full(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Publications so far. Read before a [`Self::load`], it is at most that of what is loaded.
    pub fn generation(&self) -> u64 {
        *self.generation.borrow()
    }

    /// Wakes after each publication. The value counts them.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }

    /// Puts a configuration into force: when this returns, every later decision uses it.
    pub fn publish(&self, snapshot: Snapshot) {
        let old = self.current.swap(Arc::new(snapshot));
        self.generation.send_modify(|generation| *generation += 1);
        if let Some(dropper) = &self.old {
            // Fails only when the thread is gone; then the snapshot is dropped here.
            let _ = dropper.send(old);
        }
    }

    /// What `find` finds in the configuration, now or as soon as a publication brings it.
    pub async fn wait_for<T>(
        &self,
        mut find: impl FnMut(&Snapshot) -> Option<T>,
        timeout: Duration,
    ) -> Option<T> {
        // Subscribed before the first look: a publication in between is not missed.
        let mut published = self.subscribe();
        let search = async {
            loop {
                if let Some(found) = find(&self.load()) {
                    return Some(found);
                }
                published.changed().await.ok()?;
            }
        };
        tokio::time::timeout(timeout, search).await.ok().flatten()
    }
}

/// Holds each old snapshot until it is the last to hold it, so that the work of freeing happens here.
fn drop_old(snapshots: &mpsc::Receiver<Arc<Snapshot>>) {
    let mut held: Vec<Arc<Snapshot>> = Vec::new();
    loop {
        let next = if held.is_empty() {
            snapshots.recv().map_err(|_| mpsc::RecvTimeoutError::Disconnected)
        } else {
            snapshots.recv_timeout(DROP_INTERVAL)
        };
        match next {
            Ok(snapshot) => held.push(snapshot),
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => return,
        }
        held.retain(|snapshot| Arc::strong_count(snapshot) > 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::{Change, ConfigVersion};

    fn version(number: u64) -> Snapshot {
        let version = ConfigVersion { epoch: 1, number };
        Snapshot::default().with([Change::SetVersion(version)])
    }

    #[tokio::test]
    async fn woken_readers_see_what_woke_them() {
        let store = Arc::new(ConfigStore::default());
        let mut published = store.subscribe();
        assert_eq!(*published.borrow_and_update(), 0);
        let reader = store.clone();
        let waiting = tokio::spawn(async move {
            published.changed().await.unwrap();
            reader.load().version().number
        });
        store.publish(version(1));
        assert_eq!(waiting.await.unwrap(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_ends_with_the_answer_or_the_time() {
        let store = Arc::new(ConfigStore::default());
        let find = |s: &Snapshot| (s.version().number > 1).then(|| s.version().number);
        assert_eq!(store.wait_for(find, Duration::from_secs(1)).await, None);
        let publisher = store.clone();
        tokio::spawn(async move {
            publisher.publish(version(1));
            tokio::time::sleep(Duration::from_millis(500)).await;
            publisher.publish(version(2));
        });
        assert_eq!(store.wait_for(find, Duration::from_secs(1)).await, Some(2));
        assert_eq!(store.wait_for(find, Duration::ZERO).await, Some(2));
    }

    #[test]
    fn old_snapshots_end_on_the_dropper() {
        let store = ConfigStore::default();
        store.publish(version(1));
        let kept = store.load_full();
        let weak = Arc::downgrade(&kept);
        store.publish(version(2));
        drop(kept);
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        while weak.strong_count() > 0 && std::time::Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert_eq!(weak.strong_count(), 0);
    }
}
