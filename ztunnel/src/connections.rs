//! The live connections of one worker: to judge them again, to list them, to wait for their end.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use agent::access_log::Direction;
use engine::{InboundFacts, Verdict, authorize, demands_mutual_tls};
use hbone::Transfer;
use model::{Identity, Reason, Refusal, Snapshot, Workload};
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

impl Live {
    /// Two pods of this proxy were joined, which mutual TLS demanded since does not allow.
    fn lacks_mutual_tls(
        &self,
        snapshot: &Snapshot,
        workload: &Workload,
        facts: &InboundFacts<'_>,
    ) -> Option<Refusal> {
        let joined = self.peer.is_some() && !self.hbone;
        (joined && demands_mutual_tls(snapshot, facts)).then(|| {
            let (namespace, name) = (&workload.namespace, &workload.name);
            let words = format!(
                "{namespace}/{name} demands mutual TLS now, and both ends were joined on their node"
            );
            Refusal::new(Reason::MtlsRequired, words)
        })
    }
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
            let Some(workload) = live.pod.workload(snapshot) else { continue };
            let facts = InboundFacts {
                workload,
                destination: live.destination,
                source_ip: live.source.ip(),
                peer: live.peer.as_deref(),
            };
            let refusal = match authorize(snapshot, &facts) {
                Verdict::Deny(refusal) => Some(refusal),
                _ => live.lacks_mutual_tls(snapshot, workload, &facts),
            };
            if let Some(mut refusal) = refusal
                && let Some(stop) = entry.stop.take()
            {
                refusal.message = format!("no longer allowed: {}", refusal.message);
                refusal.reason = Reason::PolicyChanged;
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
