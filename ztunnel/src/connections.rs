//! The live connections of one worker: to judge them again, to list them, to wait for their end.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use agent::access_log::Direction;
use engine::InboundFacts;
use hbone::Transfer;
use model::{Identity, Refusal, Snapshot};
use rustc_hash::FxHashMap;
use tokio::sync::oneshot;

use crate::pod::Pod;
use crate::record::Counted;

/// What a connection is, for the list and for judging it again.
#[derive(Debug)]
pub struct Live {
    pub pod: Arc<Pod>,
    pub direction: Direction,
    pub source: SocketAddr,
    /// Where it wanted to go.
    pub destination: SocketAddr,
    pub peer: Option<Arc<Identity>>,
    pub hbone: bool,
    pub started: Instant,
    pub moved: Arc<Transfer>,
}

/// The table. One per worker; locked for a moment by its own thread and by the admin page.
#[derive(Debug, Default)]
pub struct Connections {
    next: AtomicU64,
    table: Mutex<FxHashMap<u64, Entry>>,
}

#[derive(Debug)]
struct Entry {
    live: Arc<Live>,
    counted: Arc<Counted>,
    stop: Option<oneshot::Sender<Refusal>>,
}

/// Keeps a connection in the table until dropped.
#[derive(Debug)]
pub struct Registered<'a> {
    connections: &'a Connections,
    total: &'a AtomicUsize,
    id: u64,
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        self.connections.lock().remove(&self.id);
        self.total.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Connections {
    /// Adds a connection; the receiver fires when it must end.
    pub fn register<'a>(
        &'a self,
        live: Arc<Live>,
        counted: Arc<Counted>,
        total: &'a AtomicUsize,
    ) -> (Registered<'a>, oneshot::Receiver<Refusal>) {
        total.fetch_add(1, Ordering::Relaxed);
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (stop, stopped) = oneshot::channel();
        self.lock().insert(id, Entry { live, counted, stop: Some(stop) });
        (Registered { connections: self, total, id }, stopped)
    }

    /// Judges every inbound connection again and ends those that are no longer allowed. A decision that
    /// waits for a policy in flight does not end what lives (DESIGN invariant 3).
    pub fn judge_again(&self, snapshot: &Snapshot) -> usize {
        let mut ended = 0;
        for entry in self.lock().values_mut() {
            let live = &entry.live;
            if live.direction != Direction::Inbound {
                continue;
            }
            // A pod that is no longer known is leaving, and its connections end with it.
            let Some(workload) = live.pod.workload(snapshot) else { continue };
            let facts = InboundFacts {
                workload,
                destination: live.destination,
                source_ip: live.source.ip(),
                peer: live.peer.as_deref(),
            };
            if let Some(refusal) = engine::ended_by(snapshot, &facts)
                && let Some(stop) = entry.stop.take()
            {
                ended += 1;
                // The connection may have ended by itself meanwhile.
                let _ = stop.send(refusal);
            }
        }
        ended
    }

    /// Counts the bytes of connections that live long.
    pub fn flush_metrics(&self) {
        for entry in self.lock().values() {
            entry.counted.flush();
        }
    }

    /// A copy of the list.
    pub fn list(&self) -> Vec<Arc<Live>> {
        self.lock().values().map(|entry| entry.live.clone()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, FxHashMap<u64, Entry>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
