//! Counters of connections and bytes, one set per combination of labels.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use model::{Identity, Reason, Service, Workload};

use super::labels::{Labels, Reporter, Security, TrafficKey};
use super::{Refusals, lock};

/// Combinations of labels that are counted apart: callers × called on one node. 4,000 make a page of
/// about 12 MB, which is what a Prometheus still takes; a node with 250 pods and 16 callers each fits.
pub(super) const MAX_SERIES: usize = 4_000;

/// A series that nobody uses and that did not change for so long leaves the page. Prometheus scrapes at
/// least every five minutes by its own rules, so the last value was seen.
pub(super) const IDLE_SERIES: Duration = Duration::from_secs(15 * 60);

/// Combinations one data thread remembers; more than a thread sees in a while, 100 bytes each.
const MAX_INTERNED: usize = 1_024;

/// Istio's values of `response_flags` that one of our reasons maps to.
pub(super) const FLAGS: [&str; 12] = [
    "-",
    "DENY",
    "CONNECT",
    "TLS_FAILURE",
    "H2_HANDSHAKE_FAILURE",
    "IDENTITY_ERROR",
    "NR",
    "NC",
    "FI",
    "UT",
    "UC",
    "DPE",
];

/// The counters of one combination of labels.
#[derive(Debug)]
pub struct TcpMetrics {
    reporter: Reporter,
    opened: AtomicU64,
    closed: AtomicU64,
    from_client: AtomicU64,
    from_server: AtomicU64,
    /// By position in [`FLAGS`].
    failed: [AtomicU64; FLAGS.len()],
    refusals: Arc<Refusals>,
}

impl TcpMetrics {
    fn new(reporter: Reporter, refusals: Arc<Refusals>) -> Self {
        Self {
            reporter,
            opened: AtomicU64::new(0),
            closed: AtomicU64::new(0),
            from_client: AtomicU64::new(0),
            from_server: AtomicU64::new(0),
            failed: Default::default(),
            refusals,
        }
    }

    /// A connection is established. Each is followed by one [`TcpMetrics::closed`].
    pub fn opened(&self) {
        self.opened.fetch_add(1, Ordering::Relaxed);
    }

    /// An established connection ended, in whatever way.
    pub fn closed(&self) {
        self.closed.fetch_add(1, Ordering::Relaxed);
    }

    /// A connection was refused, could not be made, or broke.
    pub fn failed(&self, reason: Reason) {
        let flags = reason.response_flags();
        let at = FLAGS.iter().position(|f| *f == flags).unwrap_or_default();
        self.failed[at].fetch_add(1, Ordering::Relaxed);
        self.refusals.count(self.reporter, reason);
    }

    /// Adds bytes of the application, by who sent them. Istio's `sent_bytes` are those of the server,
    /// whoever reports (its documentation: "sent during response"); the mapping is done here, so that
    /// callers need not know.
    pub fn add_bytes(&self, from_client: u64, from_server: u64) {
        self.from_client.fetch_add(from_client, Ordering::Relaxed);
        self.from_server.fetch_add(from_server, Ordering::Relaxed);
    }

    pub(super) fn values(&self) -> Values {
        let get = |n: &AtomicU64| n.load(Ordering::Relaxed);
        // Closed before opened: a connection that passes in between must not show as -1 open.
        let closed = get(&self.closed);
        Values {
            closed,
            opened: get(&self.opened),
            sent: get(&self.from_server),
            received: get(&self.from_client),
            failed: std::array::from_fn(|i| get(&self.failed[i])),
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Values {
    pub(super) opened: u64,
    pub(super) closed: u64,
    pub(super) sent: u64,
    pub(super) received: u64,
    pub(super) failed: [u64; FLAGS.len()],
}

/// How much of a connection's bytes is counted already, so that long connections can be counted while
/// they live.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flushed {
    from_client: u64,
    from_server: u64,
}

impl Flushed {
    /// How often a live connection is counted: well within a scrape interval.
    pub const EVERY: Duration = Duration::from_secs(5);

    /// Adds what was moved since the last call, given the totals of the connection.
    pub fn flush(&mut self, metrics: &TcpMetrics, from_client: u64, from_server: u64) {
        metrics.add_bytes(
            from_client.saturating_sub(self.from_client),
            from_server.saturating_sub(self.from_server),
        );
        self.from_client = self.from_client.max(from_client);
        self.from_server = self.from_server.max(from_server);
    }
}

/// All combinations that were seen.
#[derive(Debug)]
pub(super) struct Traffic {
    series: Mutex<HashMap<Arc<Labels>, Series>>,
    /// For what exceeds [`MAX_SERIES`], by reporter.
    overflow: [(Arc<Labels>, Arc<TcpMetrics>); Reporter::ALL.len()],
    overflowed: AtomicU64,
    refusals: Arc<Refusals>,
}

#[derive(Debug)]
struct Series {
    metrics: Arc<TcpMetrics>,
    /// The values of the last scrape and since when they have not changed.
    last: Option<(Values, Instant)>,
}

impl Traffic {
    pub(super) fn new(refusals: Arc<Refusals>) -> Self {
        let overflow = Reporter::ALL.map(|reporter| {
            let labels = Labels::new(&TrafficKey::unknown(reporter));
            (Arc::new(labels), Arc::new(TcpMetrics::new(reporter, refusals.clone())))
        });
        Self { series: Mutex::default(), overflow, overflowed: AtomicU64::new(0), refusals }
    }

    pub(super) fn get(&self, key: &TrafficKey<'_>) -> Arc<TcpMetrics> {
        let labels = Labels::new(key);
        let overflow = &self.overflow[key.reporter as usize];
        if labels == *overflow.0 {
            return overflow.1.clone();
        }
        let mut series = lock(&self.series);
        if let Some(found) = series.get(&labels) {
            return found.metrics.clone();
        }
        if series.len() >= MAX_SERIES {
            self.overflowed.fetch_add(1, Ordering::Relaxed);
            return overflow.1.clone();
        }
        let metrics = Arc::new(TcpMetrics::new(key.reporter, self.refusals.clone()));
        series.insert(Arc::new(labels), Series { metrics: metrics.clone(), last: None });
        metrics
    }

    /// How often a combination had to be counted as unknown because there are too many.
    pub(super) fn overflowed(&self) -> u64 {
        self.overflowed.load(Ordering::Relaxed)
    }

    /// All values; forgets the series that nobody holds and that are idle.
    pub(super) fn scrape(&self, now: Instant) -> Vec<(Arc<Labels>, Values)> {
        let mut rows: Vec<_> = Vec::new();
        lock(&self.series).retain(|labels, series| {
            let values = series.metrics.values();
            rows.push((labels.clone(), values));
            match series.last {
                Some((last, since)) if last == values => {
                    // Only this table holds it: no live connection, and no handle about to be used.
                    Arc::strong_count(&series.metrics) > 1
                        || now.duration_since(since) < IDLE_SERIES
                }
                _ => {
                    series.last = Some((values, now));
                    true
                }
            }
        });
        let unknown = self.overflow.iter().map(|(l, m)| (l.clone(), m.values()));
        rows.extend(unknown.filter(|(_, values)| *values != Values::default()));
        rows
    }
}

/// Remembers handles for one data thread, so that a new connection between workloads that met before
/// costs one small hash and no lock. It keeps no workload and no series alive.
#[derive(Debug, Default)]
pub struct Interner {
    seen: HashMap<Pointers, Seen>,
}

/// Addresses stand for the values: a [`Weak`] in [`Seen`] keeps each from being used again.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Pointers {
    reporter: Reporter,
    security: Security,
    source: usize,
    /// Of each connection another allocation: by value.
    client: Option<Identity>,
    destination: usize,
    service: usize,
}

#[derive(Debug)]
struct Seen {
    metrics: Weak<TcpMetrics>,
    _source: Option<Weak<Workload>>,
    _destination: Option<Weak<Workload>>,
    _service: Option<Weak<Service>>,
}

impl Interner {
    /// As [`super::Metrics::tcp`].
    pub fn tcp(&mut self, metrics: &super::Metrics, key: &TrafficKey<'_>) -> Arc<TcpMetrics> {
        // Someone who shows another identity than his address has is rare, and not worth a place here.
        if !as_its_workload(key.source, key.source_identity)
            || !as_its_workload(key.destination, key.destination_identity)
        {
            return metrics.tcp(key);
        }
        let pointers = Pointers {
            reporter: key.reporter,
            security: key.security,
            source: address(key.source),
            client: key.client.cloned(),
            destination: address(key.destination),
            service: address(key.service),
        };
        if let Some(found) = self.seen.get(&pointers).and_then(|s| s.metrics.upgrade()) {
            return found;
        }
        let found = metrics.tcp(key);
        if self.seen.len() >= MAX_INTERNED {
            // Most entries belong to workloads that are gone: configuration changes make new pointers.
            self.seen.clear();
        }
        let seen = Seen {
            metrics: Arc::downgrade(&found),
            _source: key.source.map(Arc::downgrade),
            _destination: key.destination.map(Arc::downgrade),
            _service: key.service.map(Arc::downgrade),
        };
        self.seen.insert(pointers, seen);
        found
    }
}

pub(super) fn as_its_workload(
    workload: Option<&Arc<Workload>>,
    identity: Option<&Identity>,
) -> bool {
    match (workload, identity) {
        (_, None) => true,
        (None, Some(_)) => false,
        (Some(w), Some(id)) => {
            w.namespace == id.namespace
                && w.service_account == id.service_account
                && w.trust_domain == id.trust_domain
        }
    }
}

pub(super) fn address<T>(value: Option<&Arc<T>>) -> usize {
    value.map_or(0, |v| Arc::as_ptr(v) as usize)
}
