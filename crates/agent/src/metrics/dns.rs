//! Counters of DNS questions, one set per canonical service of the asking pods, with Istio's names and labels.
//!
//! Invariants: types and protocols are closed lists, so a pod that asks for every number there is makes no series; the
//! number of services is bounded as that of connections is.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use model::Str;

use super::lock;

/// Services that are counted apart: a node holds 250 pods at most in practice. What exceeds it is counted as unknown.
const MAX_SOURCES: usize = 1_000;

/// Types of questions that have a series of their own; all others are `other`.
const TYPES: [(u16, &str); 17] = [
    (1, "A"),
    (28, "AAAA"),
    (33, "SRV"),
    (12, "PTR"),
    (16, "TXT"),
    (5, "CNAME"),
    (15, "MX"),
    (2, "NS"),
    (6, "SOA"),
    (65, "HTTPS"),
    (64, "SVCB"),
    (35, "NAPTR"),
    (257, "CAA"),
    (43, "DS"),
    (48, "DNSKEY"),
    (52, "TLSA"),
    (255, "ANY"),
];
const KINDS: usize = TYPES.len() + 1;

/// Upper bounds of the histogram, in microseconds, and as Istio writes them.
const BOUNDS: [(u64, f64); 6] = [
    (500, 0.0005),
    (1_000, 0.001),
    (10_000, 0.01),
    (100_000, 0.1),
    (1_000_000, 1.0),
    (5_000_000, 5.0),
];

/// How a question came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DnsProtocol {
    Udp,
    Tcp,
}

impl DnsProtocol {
    const ALL: [Self; 2] = [Self::Udp, Self::Tcp];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::Tcp => "tcp",
        }
    }
}

/// What became of a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DnsResult {
    /// Answered from the mesh's configuration.
    Mesh,
    /// The mesh knows the name, and that it has no address of this family.
    NoData,
    /// The pod's resolver answered.
    Forwarded,
    /// The pod's resolver did not answer: SERVFAIL.
    Failed,
    /// Too many questions wait for the resolver: SERVFAIL.
    Limit,
}

impl DnsResult {
    const ALL: [Self; 5] = [Self::Mesh, Self::NoData, Self::Forwarded, Self::Failed, Self::Limit];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Mesh => "mesh",
            Self::NoData => "nodata",
            Self::Forwarded => "forwarded",
            Self::Failed => "failed",
            Self::Limit => "limit",
        }
    }
}

/// The name of a type of question, from the closed list.
pub fn dns_type_name(kind: u16) -> &'static str {
    TYPES.get(index(kind)).map_or("other", |(_, name)| name)
}

/// The counters of one canonical service and revision.
#[derive(Debug)]
pub struct DnsMetrics {
    by_kind: [[Counts; DnsProtocol::ALL.len()]; KINDS],
    results: [AtomicU64; DnsResult::ALL.len()],
}

#[derive(Debug, Default)]
struct Counts {
    requests: AtomicU64,
    upstream: AtomicU64,
    failures: AtomicU64,
    /// The last one has no bound.
    buckets: [AtomicU64; BOUNDS.len() + 1],
    micros: AtomicU64,
}

impl DnsMetrics {
    fn new() -> Self {
        Self { by_kind: std::array::from_fn(|_| Default::default()), results: Default::default() }
    }

    /// A question came in.
    pub fn asked(&self, kind: u16, protocol: DnsProtocol) {
        add(&self.counts(kind, protocol).requests);
    }

    /// It goes to the pod's resolver.
    pub fn upstream(&self, kind: u16, protocol: DnsProtocol) {
        add(&self.counts(kind, protocol).upstream);
    }

    /// The resolver answered, or did not.
    pub fn upstream_ended(&self, kind: u16, protocol: DnsProtocol, took: Duration, answered: bool) {
        let counts = self.counts(kind, protocol);
        if !answered {
            add(&counts.failures);
        }
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let at = BOUNDS.iter().position(|(bound, _)| micros <= *bound).unwrap_or(BOUNDS.len());
        add(&counts.buckets[at]);
        counts.micros.fetch_add(micros, Ordering::Relaxed);
    }

    /// The question is done with.
    pub fn ended(&self, result: DnsResult) {
        add(&self.results[result as usize]);
    }

    fn counts(&self, kind: u16, protocol: DnsProtocol) -> &Counts {
        &self.by_kind[index(kind)][protocol as usize]
    }
}

/// One row of the page: labels, and the counters of one type and protocol.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub(super) kind: &'static str,
    pub(super) protocol: &'static str,
    pub(super) service: Str,
    pub(super) revision: Str,
    pub(super) requests: u64,
    pub(super) upstream: u64,
    pub(super) failures: u64,
    /// Bound and count, not cumulated; the last bound is infinite.
    pub(super) buckets: Vec<(f64, u64)>,
    pub(super) seconds: f64,
}

/// All services that asked.
#[derive(Debug)]
pub(super) struct Dns {
    sources: Mutex<HashMap<(Str, Str), Arc<DnsMetrics>>>,
    unknown: Arc<DnsMetrics>,
}

impl Default for Dns {
    fn default() -> Self {
        Self { sources: Mutex::default(), unknown: Arc::new(DnsMetrics::new()) }
    }
}

impl Dns {
    /// The counters of a canonical service and revision; of the unknown one for `None`, and when there are too many.
    pub(super) fn get(&self, source: Option<(&Str, &Str)>) -> Arc<DnsMetrics> {
        let Some((service, revision)) = source else { return self.unknown.clone() };
        let key = (service.clone(), revision.clone());
        let mut sources = lock(&self.sources);
        if sources.len() >= MAX_SOURCES && !sources.contains_key(&key) {
            return self.unknown.clone();
        }
        sources.entry(key).or_insert_with(|| Arc::new(DnsMetrics::new())).clone()
    }

    /// What was counted, by labels.
    pub(super) fn rows(&self) -> Vec<Row> {
        let mut rows = Vec::new();
        for ((service, revision), metrics) in self.all() {
            for (at, by_protocol) in metrics.by_kind.iter().enumerate() {
                for (protocol, counts) in DnsProtocol::ALL.into_iter().zip(by_protocol) {
                    let requests = get(&counts.requests);
                    if requests == 0 {
                        continue;
                    }
                    let bounds = BOUNDS.iter().map(|(_, seconds)| *seconds).chain([f64::MAX]);
                    rows.push(Row {
                        kind: TYPES.get(at).map_or("other", |(_, name)| name),
                        protocol: protocol.as_str(),
                        service: service.clone(),
                        revision: revision.clone(),
                        requests,
                        upstream: get(&counts.upstream),
                        failures: get(&counts.failures),
                        buckets: bounds.zip(counts.buckets.iter().map(get)).collect(),
                        seconds: Duration::from_micros(get(&counts.micros)).as_secs_f64(),
                    });
                }
            }
        }
        rows
    }

    /// Questions by what became of them, all services together.
    pub(super) fn results(&self) -> [(&'static str, u64); DnsResult::ALL.len()] {
        let all = self.all();
        DnsResult::ALL.map(|result| {
            let count = |(_, m): &((Str, Str), Arc<DnsMetrics>)| get(&m.results[result as usize]);
            (result.as_str(), all.iter().map(count).sum())
        })
    }

    fn all(&self) -> Vec<((Str, Str), Arc<DnsMetrics>)> {
        let unknown: Str = "".into();
        let unknown = ((unknown.clone(), unknown), self.unknown.clone());
        let known: Vec<_> =
            lock(&self.sources).iter().map(|(key, m)| (key.clone(), m.clone())).collect();
        std::iter::once(unknown).chain(known).collect()
    }
}

fn index(kind: u16) -> usize {
    TYPES.iter().position(|(number, _)| *number == kind).unwrap_or(TYPES.len())
}

fn add(n: &AtomicU64) {
    n.fetch_add(1, Ordering::Relaxed);
}

fn get(n: &AtomicU64) -> u64 {
    n.load(Ordering::Relaxed)
}
