//! What the proxies count, served on port 15020 in the OpenMetrics text format.
//!
//! Names and labels are Istio's where Istio has them (`istio_tcp_*`, `istio_build`, `istio_xds_*`), our
//! own begin with `ambit_`. A connection takes a handle once ([`Metrics::tcp`], or an [`Interner`] of
//! its thread) and then only adds to atomics; labels are written out at scrape time.
//!
//! Invariants: the number of series is bounded, and what exceeds the bound is counted in one series of
//! unknown labels, so that sums stay right; the data path never waits for a scrape longer than it takes
//! to copy a list of pointers; every refusal is counted, the earliest included.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use model::{ConfigVersion, Identity, Reason, Str};

use crate::trace::SpanCounts;

mod dns;
mod expose;
mod http;
mod labels;
mod process;
mod traffic;

pub use dns::{DnsMetrics, DnsProtocol, DnsResult, dns_type_name};
pub use http::{HttpInterner, HttpKey, HttpMetrics, HttpProtocol, Sample};
pub use labels::{Reporter, Security, TrafficKey};
pub use traffic::{Flushed, Interner, TcpMetrics};

use traffic::Traffic;

/// Certificates with an expiry series: one per service account with a pod on this node, and a node holds
/// 250 pods at most in practice. What exceeds it is not shown.
const MAX_CERTIFICATES: usize = 1_000;
/// Type URLs that are counted apart; there are four. A peer that invents more is counted as `other`.
const MAX_TYPE_URLS: usize = 16;

/// All metrics of a process. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    component: &'static str,
    tag: String,
    traffic: Traffic,
    http: http::Http,
    dns: dns::Dns,
    refusals: Arc<Refusals>,
    certificates: Mutex<BTreeMap<Identity, u64>>,
    xds: Xds,
    proxies: Proxies,
    access_log_dropped: Arc<AtomicU64>,
    spans: Arc<SpanCounts>,
}

impl Metrics {
    /// `component` and `tag` (the version) are the labels of `istio_build`.
    pub fn new(component: &'static str, tag: impl Into<String>) -> Self {
        let refusals = Arc::new(Refusals::default());
        Self(Arc::new(Inner {
            component,
            tag: tag.into(),
            traffic: Traffic::new(refusals.clone()),
            http: http::Http::default(),
            dns: dns::Dns::default(),
            refusals,
            certificates: Mutex::default(),
            xds: Xds::default(),
            proxies: Proxies::default(),
            access_log_dropped: Arc::default(),
            spans: Arc::default(),
        }))
    }

    /// The counters of one kind of traffic. It builds and hashes all labels under a lock: data threads
    /// ask an [`Interner`] instead.
    pub fn tcp(&self, key: &TrafficKey<'_>) -> Arc<TcpMetrics> {
        self.0.traffic.get(key)
    }

    /// The counters of one kind of requests. As dear as [`Self::tcp`]: data threads ask an [`HttpInterner`].
    pub fn http(&self, key: &HttpKey<'_>) -> Arc<HttpMetrics> {
        self.0.http.get(key)
    }

    /// Counts a request that was refused or lost; its labels are counted elsewhere.
    pub fn failed(&self, reporter: Reporter, reason: Reason) {
        self.0.refusals.count(reporter, reason);
    }

    /// The counters of DNS questions of a canonical service and revision; `None`: of pods that are not known yet.
    pub fn dns(&self, source: Option<(&Str, &Str)>) -> Arc<DnsMetrics> {
        self.0.dns.get(source)
    }

    /// Counts a connection that was refused before anything is known of its two ends.
    pub fn refused_early(&self, reporter: Reporter, reason: Reason) {
        self.tcp(&TrafficKey::unknown(reporter)).failed(reason);
    }

    /// Notes when the certificate of an identity ends, in seconds since the epoch.
    pub fn set_certificate(&self, identity: &Identity, not_after: u64) {
        let mut certificates = lock(&self.0.certificates);
        if certificates.len() < MAX_CERTIFICATES || certificates.contains_key(identity) {
            certificates.insert(identity.clone(), not_after);
        }
    }

    /// The certificate of this identity is no longer held.
    pub fn forget_certificate(&self, identity: &Identity) {
        lock(&self.0.certificates).remove(identity);
    }

    pub fn xds(&self) -> &Xds {
        &self.0.xds
    }

    pub fn proxies(&self) -> &Proxies {
        &self.0.proxies
    }

    /// Counts access-log lines that were dropped; the log itself adds to it.
    pub fn access_log_dropped(&self) -> Arc<AtomicU64> {
        self.0.access_log_dropped.clone()
    }

    /// What became of spans; the tracer itself adds to it.
    pub fn spans(&self) -> Arc<SpanCounts> {
        self.0.spans.clone()
    }

    /// The page for Prometheus, and its content type.
    pub fn render(&self) -> (String, &'static str) {
        (expose::render(self, Instant::now()), expose::CONTENT_TYPE)
    }
}

/// Refusals by reason, which Istio's `response_flags` are too coarse for.
#[derive(Debug)]
struct Refusals {
    /// By reporter, then by the position of the reason in [`Reason::ALL`].
    counts: [[AtomicU64; Reason::ALL.len()]; Reporter::ALL.len()],
}

impl Default for Refusals {
    fn default() -> Self {
        Self { counts: std::array::from_fn(|_| std::array::from_fn(|_| AtomicU64::new(0))) }
    }
}

impl Refusals {
    fn count(&self, reporter: Reporter, reason: Reason) {
        // The list is in the order of the variants; a test holds it to that.
        if let Some(n) = self.counts[reporter as usize].get(reason as usize) {
            n.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// The state of the connection to the control plane.
#[derive(Debug, Default)]
pub struct Xds {
    connected: AtomicBool,
    epoch: AtomicU64,
    number: AtomicU64,
    /// Seconds since the epoch of the last applied push; 0: none.
    applied_at: AtomicU64,
    terminations: [AtomicU64; Termination::ALL.len()],
    types: Mutex<BTreeMap<String, XdsType>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct XdsType {
    messages: u64,
    bytes: u64,
    nacks: u64,
}

/// How a stream to the control plane ended; the words are Istio's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Termination {
    /// No connection could be made.
    ConnectionError,
    /// The stream failed.
    Error,
    /// The stream was replaced on purpose.
    Reconnect,
    /// The server ended it in good order.
    Complete,
}

impl Termination {
    const ALL: [Self; 4] = [Self::ConnectionError, Self::Error, Self::Reconnect, Self::Complete];

    const fn as_str(self) -> &'static str {
        match self {
            Self::ConnectionError => "ConnectionError",
            Self::Error => "Error",
            Self::Reconnect => "Reconnect",
            Self::Complete => "Complete",
        }
    }
}

impl Xds {
    pub fn connected(&self) {
        self.connected.store(true, Ordering::Relaxed);
    }

    pub fn terminated(&self, how: Termination) {
        self.connected.store(false, Ordering::Relaxed);
        self.terminations[how as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a response for `type_url` of this encoded size.
    pub fn message(&self, type_url: &str, bytes: usize) {
        self.of_type(type_url, |t| {
            t.messages += 1;
            t.bytes += bytes as u64;
        });
    }

    /// Counts a resource of `type_url` that was not accepted.
    pub fn nack(&self, type_url: &str) {
        self.of_type(type_url, |t| t.nacks += 1);
    }

    /// A configuration is in force; `now` in seconds since the epoch.
    pub fn applied(&self, version: ConfigVersion, now: u64) {
        self.epoch.store(version.epoch, Ordering::Relaxed);
        self.number.store(version.number, Ordering::Relaxed);
        self.applied_at.store(now, Ordering::Relaxed);
    }

    fn of_type(&self, type_url: &str, change: impl FnOnce(&mut XdsType)) {
        let mut types = lock(&self.types);
        if let Some(t) = types.get_mut(type_url) {
            return change(t);
        }
        let name = if types.len() < MAX_TYPE_URLS { type_url } else { "other" };
        change(types.entry(name.to_owned()).or_default());
    }
}

/// Proxies of pods, with Istio's names (`workload_manager_*`).
#[derive(Debug, Default)]
pub struct Proxies {
    active: AtomicU64,
    pending: AtomicU64,
    started: AtomicU64,
    stopped: AtomicU64,
}

impl Proxies {
    pub fn started(&self) {
        self.started.fetch_add(1, Ordering::Relaxed);
        self.active.fetch_add(1, Ordering::Relaxed);
    }

    pub fn stopped(&self) {
        self.stopped.fetch_add(1, Ordering::Relaxed);
        // A stop without a start would be a bug elsewhere; it must not show 2^64 proxies.
        let _ =
            self.active.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
    }

    /// How many pods wait for a proxy, for example until their sockets can be made.
    pub fn set_pending(&self, pending: usize) {
        self.pending.store(pending as u64, Ordering::Relaxed);
    }
}

/// A thread that panicked while it counted must not take the metrics of all others with it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
