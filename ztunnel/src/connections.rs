//! The live connections of one worker: to judge them again, to list them, to wait for their end.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use agent::access_log::Direction;
use agent::store::ConfigStore;
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
    /// The client for whom the peer called, by what held when the connection was let in.
    pub client: Option<Arc<Identity>>,
    pub hbone: bool,
    pub started: Instant,
    /// The publication of the configuration that let it in.
    pub judged: u64,
    pub moved: Arc<Transfer>,
}

impl Live {
    /// Two pods of this proxy, and no tunnel between them.
    fn is_joined(&self) -> bool {
        self.peer.is_some() && !self.hbone
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

impl Entry {
    /// Ends the connection if it is no longer allowed.
    fn judge(&mut self, snapshot: &Snapshot) -> Option<()> {
        let live = &self.live;
        if live.direction != Direction::Inbound {
            return None;
        }
        // A pod that is no longer known is leaving, and its connections end with it.
        let workload = live.pod.workload(snapshot)?;
        let facts = InboundFacts {
            workload,
            destination: live.destination,
            source_ip: live.source.ip(),
            peer: live.peer.as_deref(),
            client: live.client.as_deref(),
        };
        let refusal = engine::ended_by(snapshot, &facts, live.is_joined())?;
        // The connection may have ended by itself meanwhile.
        self.stop.take()?.send(refusal).ok()
    }
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
    /// Adds a connection; the receiver fires when it must end. That may be at once: between the verdict and this moment
    /// the application was called, and whoever judged what lives meanwhile did not see this one.
    pub fn register<'a>(
        &'a self,
        live: Arc<Live>,
        counted: Arc<Counted>,
        store: &ConfigStore,
        total: &'a AtomicUsize,
    ) -> (Registered<'a>, oneshot::Receiver<Refusal>) {
        total.fetch_add(1, Ordering::Relaxed);
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (stop, stopped) = oneshot::channel();
        let judged = live.judged;
        let mut table = self.lock();
        let entry = table.entry(id).or_insert(Entry { live, counted, stop: Some(stop) });
        if judged != store.generation() {
            entry.judge(&store.load());
        }
        drop(table);
        (Registered { connections: self, total, id }, stopped)
    }

    /// Judges every inbound connection again and ends those that are no longer allowed. A decision that
    /// waits for a policy in flight does not end what lives (DESIGN invariant 3).
    pub fn judge_again(&self, snapshot: &Snapshot) -> usize {
        self.lock().values_mut().filter_map(|entry| entry.judge(snapshot)).count()
    }

    /// Ends every connection with this word.
    pub fn end_all(&self, refusal: &Refusal) {
        for stop in self.lock().values_mut().filter_map(|entry| entry.stop.take()) {
            // The connection may have ended by itself meanwhile.
            let _ = stop.send(refusal.clone());
        }
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

#[cfg(test)]
mod tests {
    use agent::access_log::AccessLog;
    use agent::metrics::Metrics;
    use model::{Action, Change, Policy, PolicyKey, Provenance, Reason, Rule, Scope, Workload};
    use net::NetNs;
    use tokio::sync::watch;

    use super::*;
    use crate::record::{Record, Recorder};

    fn pod() -> Arc<Pod> {
        Arc::new(Pod {
            uid: "1".into(),
            name: "web".into(),
            namespace: "shop".into(),
            identity: Identity::new("cluster.local", "shop", "web"),
            netns: NetNs::current().unwrap(),
            leaving: watch::Sender::new(false),
            told: std::sync::OnceLock::new(),
        })
    }

    fn deny() -> Change {
        Change::SetPolicy(Arc::new(Policy {
            key: PolicyKey { namespace: "shop".into(), name: "nobody".into() },
            scope: Scope::Namespace,
            action: Action::Deny,
            rules: [Rule::default()].into(),
            dry_run: false,
            provenance: Provenance::default(),
        }))
    }

    #[test]
    fn what_changed_between_the_verdict_and_the_table_is_not_missed() {
        let web = Workload {
            addresses: [[10, 0, 0, 1].into()].into(),
            ..Workload::named("web", "shop", "web")
        };
        let check = |before: Vec<Change>, meanwhile: Vec<Change>, want: Option<Reason>| {
            let (store, open) = (ConfigStore::default(), AtomicUsize::new(0));
            let known = [Change::SetWorkload(Arc::new(web.clone()))].into_iter().chain(before);
            store.publish(store.load().with(known));
            let judged = store.generation();
            if !meanwhile.is_empty() {
                store.publish(store.load().with(meanwhile));
            }
            let (pod, source) = (pod(), ([10, 0, 0, 2], 4711).into());
            let peer = Arc::new(Identity::new("cluster.local", "shop", "client"));
            let mut record = Record::tunnelled(&pod, source, peer.clone());
            let recorder = Recorder::new(
                Metrics::new("ztunnel", "0"),
                AccessLog::off(),
                agent::trace::Tracer::off(),
            );
            let live = Live {
                pod,
                direction: Direction::Inbound,
                source,
                destination: ([10, 0, 0, 1], 80).into(),
                peer: Some(peer),
                client: None,
                hbone: true,
                started: record.started,
                judged,
                moved: record.moved.clone(),
            };
            let connections = Connections::default();
            let counted = recorder.opened(&mut record, true);
            let (_registered, mut stop) =
                connections.register(Arc::new(live), counted, &store, &open);
            assert_eq!(stop.try_recv().ok().map(|refusal| refusal.reason), want);
        };
        check(vec![], vec![], None);
        check(vec![], vec![deny()], Some(Reason::PolicyChanged));
        // Its own verdict is not doubted.
        check(vec![deny()], vec![], None);
    }
}
