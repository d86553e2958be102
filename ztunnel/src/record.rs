//! What is said about a connection: one access-log line, its metrics, and a span where tracing is on.

mod span;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime};

use agent::access_log::{AccessLog, ConnectionRecord, Direction, Outcome, Party};
use agent::metrics::{Flushed, Interner, Metrics, Reporter, Security, TcpMetrics, TrafficKey};
use agent::trace::{Position, SpanContext, Tracer};
use hbone::{Ended, EndedBy, Transfer};
use model::{ConfigVersion, Identity, PolicyKey, Provenance, Reason, Refusal, Service, Workload};

use crate::pod::Pod;
use crate::worker::Accepted;

/// Collected while a connection is served; written once, at its end.
#[derive(Debug)]
pub struct Record {
    pub direction: Direction,
    pub pod: Arc<Pod>,
    pub started: Instant,
    /// The client's address.
    pub source_address: SocketAddr,
    pub source: Option<Arc<Workload>>,
    /// Where the client wanted to go.
    pub destination: SocketAddr,
    /// The endpoint that was chosen.
    pub target: SocketAddr,
    /// The endpoint's proxy.
    pub hbone_address: Option<SocketAddr>,
    pub service: Option<Arc<Service>>,
    pub destination_workload: Option<Arc<Workload>>,
    /// The identity at the other end: proved by its certificate under mutual TLS, or that of a pod of this proxy.
    pub peer: Option<Arc<Identity>>,
    /// The client for whom the peer, a waypoint of the pod, calls.
    pub client: Option<Arc<Identity>>,
    /// The endpoint that was chosen is a waypoint.
    pub waypoint: bool,
    /// The peer is a pod of this proxy, reached without a tunnel.
    pub same_node: bool,
    /// The ALLOW policy that matched, and its rule.
    pub allowed_by: Option<(PolicyKey, Provenance)>,
    pub version: ConfigVersion,
    /// The publication by which the connection was judged.
    pub judged: u64,
    pub moved: Arc<Transfer>,
    pub refusal: Option<Refusal>,
    /// Set once bytes can flow: the connection counts as opened.
    pub counted: Option<Arc<Counted>>,
    /// Its place in a trace, where tracing is on; apart, since it mostly is not.
    pub trace: Option<Box<Position>>,
}

impl Record {
    pub fn new(direction: Direction, pod: &Arc<Pod>, accepted: &Accepted) -> Self {
        Self::of(direction, pod, accepted.at, accepted.peer, accepted.destination)
    }

    /// A connection that this proxy makes for a pod's question, and not for a connection of the pod.
    pub fn outbound(pod: &Arc<Pod>, source: SocketAddr, destination: SocketAddr) -> Self {
        Self::of(Direction::Outbound, pod, Instant::now(), source, destination)
    }

    /// One stream of an accepted tunnel; its destination is known once its request is read.
    pub fn tunnelled(pod: &Arc<Pod>, source: SocketAddr, peer: Arc<Identity>) -> Self {
        let unknown = SocketAddr::from(([0, 0, 0, 0], 0));
        let record = Self::of(Direction::Inbound, pod, Instant::now(), source, unknown);
        Self { peer: Some(peer), ..record }
    }

    /// The server's side of a connection between two pods of this proxy, whose bytes are counted once for both sides.
    pub fn joined(
        pod: &Arc<Pod>,
        source: SocketAddr,
        peer: Arc<Identity>,
        destination: SocketAddr,
        moved: Arc<Transfer>,
    ) -> Self {
        let record = Self::of(Direction::Inbound, pod, Instant::now(), source, destination);
        Self { peer: Some(peer), same_node: true, moved, ..record }
    }

    fn of(
        direction: Direction,
        pod: &Arc<Pod>,
        started: Instant,
        source_address: SocketAddr,
        destination: SocketAddr,
    ) -> Self {
        Self {
            direction,
            pod: pod.clone(),
            started,
            source_address,
            source: None,
            destination,
            target: destination,
            hbone_address: None,
            service: None,
            destination_workload: None,
            peer: None,
            client: None,
            waypoint: false,
            same_node: false,
            allowed_by: None,
            version: ConfigVersion::default(),
            judged: 0,
            moved: Arc::new(Transfer::default()),
            refusal: None,
            counted: None,
            trace: None,
        }
    }

    pub fn refuse(&mut self, refusal: Refusal) {
        self.refusal = Some(refusal);
    }

    /// How the connection ended, or why it did not come about.
    pub fn ended(&mut self, how: Result<Ended, Refusal>) {
        match how {
            Ok(ended) if ended.by == EndedBy::Both => {}
            Ok(ended) => self.broke(ended),
            Err(refusal) => self.refuse(refusal),
        }
    }

    /// The relay did not end by itself.
    fn broke(&mut self, ended: Ended) {
        let who = match ended.by {
            EndedBy::Socket if self.direction == Direction::Outbound => "the client",
            EndedBy::Socket => "the application",
            _ => "the other end",
        };
        let words = match ended.error {
            Some(e) => format!("{who} broke the connection: {e}"),
            None => format!("{who} broke the connection"),
        };
        self.refusal = Some(Refusal::new(Reason::ConnectionBroken, words));
    }

    /// The policy that decided, and its rule: the one that refused, else the one that allowed.
    fn decided_by(&self) -> (Option<&PolicyKey>, Option<&Provenance>) {
        let refused = self.refusal.as_ref().map(|r| (r.policy.as_ref(), r.provenance.as_ref()));
        let allowed = self.allowed_by.as_ref().map(|(policy, rule)| (Some(policy), Some(rule)));
        refused.or(allowed).unwrap_or_default()
    }

    /// Bytes of the client's application and of the server's.
    fn totals(&self) -> (u64, u64) {
        let first_is_client = self.counted.as_ref().is_none_or(|c| c.first_is_client);
        by_sender(first_is_client, &self.moved)
    }
}

/// Bytes of an open connection, counted while it lives.
#[derive(Debug)]
pub struct Counted {
    metrics: Arc<TcpMetrics>,
    moved: Arc<Transfer>,
    first_is_client: bool,
    flushed: Mutex<Flushed>,
}

impl Counted {
    /// Adds what moved since the last time.
    pub fn flush(&self) {
        let (client, server) = by_sender(self.first_is_client, &self.moved);
        let mut flushed = self.flushed.lock().unwrap_or_else(PoisonError::into_inner);
        flushed.flush(&self.metrics, client, server);
    }
}

/// `Transfer::up` counts what the first socket of the relay sent. That is the client, except where a
/// tunnel ends: there the first socket is the application.
fn by_sender(first_is_client: bool, moved: &Transfer) -> (u64, u64) {
    let (up, down) = moved.totals();
    if first_is_client { (up, down) } else { (down, up) }
}

/// Writes records. One per worker.
#[derive(Debug)]
pub struct Recorder {
    metrics: Metrics,
    log: AccessLog,
    tracer: Tracer,
    /// Only the worker's own thread locks it.
    interner: Mutex<Interner>,
}

impl Recorder {
    pub fn new(metrics: Metrics, log: AccessLog, tracer: Tracer) -> Self {
        Self { metrics, log, tracer, interner: Mutex::default() }
    }

    /// Gives a connection its place in a trace: in that of its peer, or in a new one. Nothing where tracing is off.
    pub fn trace(&self, record: &mut Record, parent: Option<SpanContext>) {
        record.trace = self.tracer.begin(parent).map(Box::new);
    }

    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Bytes can flow from here on. `first_is_client`: the relay's first socket is the client's.
    pub fn opened(&self, record: &mut Record, first_is_client: bool) -> Arc<Counted> {
        let metrics = self.handle(record);
        metrics.opened();
        let counted = Arc::new(Counted {
            metrics,
            moved: record.moved.clone(),
            first_is_client,
            flushed: Mutex::default(),
        });
        record.counted = Some(counted.clone());
        counted
    }

    /// The connection is over.
    pub fn write(&self, record: Record) {
        match &record.counted {
            Some(counted) => {
                counted.flush();
                counted.metrics.closed();
                if let Some(refusal) = &record.refusal {
                    counted.metrics.failed(refusal.reason);
                }
            }
            None => {
                if let Some(refusal) = &record.refusal {
                    self.handle(&record).failed(refusal.reason);
                }
            }
        }
        if self.log.is_on() {
            self.log_line(&record);
        }
        if let Some(position) = record.trace.as_deref().filter(|p| p.context.sampled) {
            self.tracer.end(span::of(&record, position));
        }
    }

    fn handle(&self, record: &Record) -> Arc<TcpMetrics> {
        let peer = record.peer.as_deref();
        let outbound = record.direction == Direction::Outbound;
        let key = TrafficKey {
            reporter: if outbound { Reporter::Source } else { Reporter::Destination },
            security: match peer {
                Some(_) if record.same_node => Security::SameNode,
                Some(_) => Security::MutualTls,
                None => Security::Plaintext,
            },
            source: record.source.as_ref(),
            source_identity: if outbound { None } else { peer },
            client: record.client.as_deref(),
            destination: record.destination_workload.as_ref(),
            destination_identity: if outbound { peer } else { None },
            service: record.service.as_ref(),
        };
        self.interner.lock().unwrap_or_else(PoisonError::into_inner).tcp(&self.metrics, &key)
    }

    fn log_line(&self, record: &Record) {
        let duration = record.started.elapsed();
        let (from_client, from_server) = record.totals();
        let outbound = record.direction == Direction::Outbound;
        let own = record.peer.as_ref().map(|_| &record.pod.identity);
        let peer = record.peer.as_deref();
        let refusal = record.refusal.as_ref();
        let (policy, rule) = record.decided_by();
        let outcome = match refusal {
            Some(refusal) => Outcome::Failed { reason: refusal.reason, message: &refusal.message },
            None => Outcome::Complete,
        };
        self.log.log(&ConnectionRecord {
            start: SystemTime::now().checked_sub(duration).unwrap_or(SystemTime::UNIX_EPOCH),
            duration,
            direction: record.direction,
            source: Party {
                address: Some(record.source_address),
                workload: record.source.as_deref(),
                identity: if outbound { own } else { peer },
            },
            destination: Party {
                address: Some(record.hbone_address.unwrap_or(record.target)),
                workload: record.destination_workload.as_deref(),
                identity: if outbound { peer } else { own },
            },
            hbone_address: record.hbone_address.map(|_| record.target),
            same_node: record.same_node,
            client: record.client.as_deref(),
            waypoint: record.waypoint,
            service: record.service.as_ref().map(|s| &s.key),
            from_client,
            from_server,
            outcome,
            policy,
            rule,
            config: record.version,
        });
    }
}
