//! Counters of HTTP requests, one set per combination of labels, with Istio's names and labels.
//!
//! As with connections a data thread keeps handles by the addresses of what the labels come from, so that a request costs one
//! small hash. Codes, flags and protocols are closed lists or bounded numbers: a backend that answers with a thousand codes makes
//! at most as many series as there is room for.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use model::{Service, Workload};
use prometheus_client::encoding::{EncodeLabelSet, LabelSetEncoder};
use rustc_hash::FxHashMap;

use super::labels::{Labels, Reporter, Security, TrafficKey, label};
use super::lock;
use super::traffic::{IDLE_SERIES, address, as_its_workload};

/// Combinations of labels that are counted apart: callers × called × codes. Each is some 30 KB of the page, most of it
/// histograms, and a scrape must stay below what a Prometheus takes.
const MAX_SERIES: usize = 1_000;
/// Combinations one data thread remembers.
const MAX_INTERNED: usize = 4_096;
/// Upper bounds in milliseconds, from Envoy's defaults, up to the longest that people wait.
const MILLISECONDS: [f64; 15] = [
    0.5, 1.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1_000.0, 2_500.0, 5_000.0, 10_000.0,
    30_000.0, 60_000.0,
];
/// Upper bounds in bytes: from a small message to a large file.
const BYTES: [f64; 10] = [
    64.0,
    256.0,
    1_024.0,
    4_096.0,
    16_384.0,
    65_536.0,
    262_144.0,
    1_048_576.0,
    4_194_304.0,
    16_777_216.0,
];

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HttpProtocol {
    Http,
    Grpc,
}

impl HttpProtocol {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Grpc => "grpc",
        }
    }
}

/// What is known of a request at its end.
#[derive(Clone, Copy, Debug)]
pub struct HttpKey<'a> {
    pub traffic: TrafficKey<'a>,
    pub protocol: HttpProtocol,
    /// 0: there was no answer, the client went away or was reset.
    pub code: u16,
    /// [`model::Reason::response_flags`], or `-`.
    pub flags: &'static str,
    /// Of a gRPC answer.
    pub grpc_status: Option<u8>,
}

/// One request.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sample {
    pub duration: Duration,
    /// Of the bodies.
    pub request_bytes: u64,
    pub response_bytes: u64,
    /// gRPC messages.
    pub request_messages: u64,
    pub response_messages: u64,
}

/// The counters of one combination of labels.
#[derive(Debug, Default)]
pub struct HttpMetrics {
    duration: Histogram<{ MILLISECONDS.len() }>,
    request_bytes: Histogram<{ BYTES.len() }>,
    response_bytes: Histogram<{ BYTES.len() }>,
    request_messages: AtomicU64,
    response_messages: AtomicU64,
}

impl HttpMetrics {
    /// A request is over.
    pub fn add(&self, sample: &Sample) {
        let micros = u64::try_from(sample.duration.as_micros()).unwrap_or(u64::MAX);
        self.duration.add(&MILLISECONDS, sample.duration.as_secs_f64() * 1_000.0, micros);
        for (histogram, bytes) in [
            (&self.request_bytes, sample.request_bytes),
            (&self.response_bytes, sample.response_bytes),
        ] {
            #[expect(clippy::cast_precision_loss, reason = "a bucket needs no more precision")]
            histogram.add(&BYTES, bytes as f64, bytes);
        }
        for (counter, messages) in [
            (&self.request_messages, sample.request_messages),
            (&self.response_messages, sample.response_messages),
        ] {
            if messages > 0 {
                counter.fetch_add(messages, Ordering::Relaxed);
            }
        }
    }

    fn values(&self) -> Values {
        Values {
            duration: self.duration.counted(&MILLISECONDS, 1_000.0),
            request_bytes: self.request_bytes.counted(&BYTES, 1.0),
            response_bytes: self.response_bytes.counted(&BYTES, 1.0),
            request_messages: self.request_messages.load(Ordering::Relaxed),
            response_messages: self.response_messages.load(Ordering::Relaxed),
        }
    }
}

#[derive(Debug)]
struct Histogram<const N: usize> {
    /// Up to each bound, not cumulated.
    buckets: [AtomicU64; N],
    above: AtomicU64,
    /// In the unit of what is added.
    sum: AtomicU64,
}

impl<const N: usize> Default for Histogram<N> {
    fn default() -> Self {
        Self {
            buckets: std::array::from_fn(|_| AtomicU64::new(0)),
            above: AtomicU64::new(0),
            sum: AtomicU64::new(0),
        }
    }
}

impl<const N: usize> Histogram<N> {
    fn add(&self, bounds: &[f64; N], value: f64, amount: u64) {
        let at = bounds.iter().position(|bound| value <= *bound);
        let bucket = at.and_then(|at| self.buckets.get(at)).unwrap_or(&self.above);
        bucket.fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(amount, Ordering::Relaxed);
    }

    fn counted(&self, bounds: &[f64; N], unit: f64) -> Counted {
        let all = self.buckets.iter().chain([&self.above]).map(|n| n.load(Ordering::Relaxed));
        #[expect(clippy::cast_precision_loss, reason = "the page has floats")]
        let sum = self.sum.load(Ordering::Relaxed) as f64 / unit;
        Counted { buckets: bounds.iter().copied().chain([f64::MAX]).zip(all).collect(), sum }
    }
}

/// A histogram at one moment.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Counted {
    /// Bound and count, not cumulated; the last bound is infinite.
    pub(super) buckets: Vec<(f64, u64)>,
    pub(super) sum: f64,
}

impl Counted {
    pub(super) fn count(&self) -> u64 {
        self.buckets.iter().map(|(_, n)| n).sum()
    }
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Values {
    pub(super) duration: Counted,
    pub(super) request_bytes: Counted,
    pub(super) response_bytes: Counted,
    pub(super) request_messages: u64,
    pub(super) response_messages: u64,
}

impl Values {
    pub(super) fn requests(&self) -> u64 {
        self.duration.count()
    }
}

/// The label values.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct HttpLabels {
    traffic: Labels,
    answer: Answer,
}

/// What a request adds to the labels of its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Answer {
    protocol: HttpProtocol,
    code: u16,
    flags: &'static str,
    grpc_status: Option<u8>,
}

impl Answer {
    fn of(key: &HttpKey<'_>) -> Self {
        let HttpKey { protocol, code, flags, grpc_status, .. } = *key;
        Self { protocol, code, flags, grpc_status }
    }
}

/// The labels as the page has them.
pub(super) struct Shown<'a>(pub(super) &'a HttpLabels);

impl EncodeLabelSet for Shown<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        let HttpLabels { traffic, answer } = self.0;
        traffic.encode(encoder, answer.protocol.as_str(), answer.flags)?;
        label(encoder, "response_code", answer.code)?;
        match answer.grpc_status {
            Some(status) => label(encoder, "grpc_response_status", status),
            None => Ok(()),
        }
    }
}

/// All combinations that were seen.
#[derive(Debug)]
pub(super) struct Http {
    series: Mutex<HashMap<Arc<HttpLabels>, Series>>,
    /// For what exceeds [`MAX_SERIES`].
    overflow: (Arc<HttpLabels>, Arc<HttpMetrics>),
    overflowed: AtomicU64,
}

#[derive(Debug)]
struct Series {
    metrics: Arc<HttpMetrics>,
    /// How many requests the last scrape saw, and since when there are no more.
    last: Option<(u64, Instant)>,
}

impl Default for Http {
    fn default() -> Self {
        let traffic = Labels::new(&TrafficKey::unknown(Reporter::Waypoint));
        let protocol = HttpProtocol::Http;
        let answer = Answer { protocol, code: 0, flags: "-", grpc_status: None };
        Self {
            series: Mutex::default(),
            overflow: (Arc::new(HttpLabels { traffic, answer }), Arc::default()),
            overflowed: AtomicU64::new(0),
        }
    }
}

impl Http {
    pub(super) fn get(&self, key: &HttpKey<'_>) -> Arc<HttpMetrics> {
        let labels = HttpLabels { traffic: Labels::new(&key.traffic), answer: Answer::of(key) };
        let mut series = lock(&self.series);
        if let Some(found) = series.get(&labels) {
            return found.metrics.clone();
        }
        if series.len() >= MAX_SERIES {
            self.overflowed.fetch_add(1, Ordering::Relaxed);
            return self.overflow.1.clone();
        }
        let metrics = Arc::new(HttpMetrics::default());
        series.insert(Arc::new(labels), Series { metrics: metrics.clone(), last: None });
        metrics
    }

    /// How often a combination had to be counted as unknown because there are too many.
    pub(super) fn overflowed(&self) -> u64 {
        self.overflowed.load(Ordering::Relaxed)
    }

    /// All values; forgets the series that nobody holds and that are idle.
    pub(super) fn scrape(&self, now: Instant) -> Vec<(Arc<HttpLabels>, Values)> {
        let mut rows: Vec<_> = Vec::new();
        lock(&self.series).retain(|labels, series| {
            let values = series.metrics.values();
            let requests = values.requests();
            rows.push((labels.clone(), values));
            match series.last {
                Some((last, since)) if last == requests => {
                    Arc::strong_count(&series.metrics) > 1
                        || now.duration_since(since) < IDLE_SERIES
                }
                _ => {
                    series.last = Some((requests, now));
                    true
                }
            }
        });
        let unknown = self.overflow.1.values();
        if unknown.requests() > 0 {
            rows.push((self.overflow.0.clone(), unknown));
        }
        rows
    }
}

/// Remembers handles for one data thread, as [`super::Interner`] does for connections.
#[derive(Debug, Default)]
pub struct HttpInterner {
    seen: FxHashMap<Pointers, Seen>,
}

/// Addresses stand for the values: a [`Weak`] in [`Seen`] keeps each from being used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Pointers {
    security: Security,
    source: usize,
    destination: usize,
    service: usize,
    answer: Answer,
}

#[derive(Debug)]
struct Seen {
    metrics: Weak<HttpMetrics>,
    _source: Option<Weak<Workload>>,
    _destination: Option<Weak<Workload>>,
    _service: Option<Weak<Service>>,
}

impl HttpInterner {
    /// As [`super::Metrics::http`].
    pub fn get(&mut self, metrics: &super::Metrics, key: &HttpKey<'_>) -> Arc<HttpMetrics> {
        let traffic = &key.traffic;
        // Someone who shows another identity than his address has, or speaks for another, is not worth a place here.
        if traffic.client.is_some()
            || !as_its_workload(traffic.source, traffic.source_identity)
            || !as_its_workload(traffic.destination, traffic.destination_identity)
        {
            return metrics.http(key);
        }
        let pointers = Pointers {
            security: traffic.security,
            source: address(traffic.source),
            destination: address(traffic.destination),
            service: address(traffic.service),
            answer: Answer::of(key),
        };
        if let Some(found) = self.seen.get(&pointers).and_then(|s| s.metrics.upgrade()) {
            return found;
        }
        let found = metrics.http(key);
        if self.seen.len() >= MAX_INTERNED {
            // Most entries belong to workloads that are gone: configuration changes make new pointers.
            self.seen.clear();
        }
        let seen = Seen {
            metrics: Arc::downgrade(&found),
            _source: traffic.source.map(Arc::downgrade),
            _destination: traffic.destination.map(Arc::downgrade),
            _service: traffic.service.map(Arc::downgrade),
        };
        self.seen.insert(pointers, seen);
        found
    }
}
