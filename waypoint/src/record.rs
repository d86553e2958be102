//! What is said about a connection that is passed on as it is: one access-log line and its metrics. What is said about
//! requests is in `proxy/exchange`, and written here, too.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use agent::access_log::{AccessLog, ConnectionRecord, Direction, Outcome, Party};
use agent::metrics::{
    Flushed, HttpInterner, Interner, Metrics, Reporter, Security, TcpMetrics, TrafficKey,
};
use agent::trace::Tracer;
use engine::{Candidate, Transport};
use hbone::{Ended, EndedBy, Transfer};
use model::{ConfigVersion, Identity, Reason, Refusal, Service, Workload};

use crate::call::Call;

/// Collected while a connection is served; written once, at its end.
#[derive(Debug)]
pub(crate) struct Record {
    started: Instant,
    source: SocketAddr,
    identity: Option<Arc<Identity>>,
    pub(crate) client: Option<Arc<Workload>>,
    pub(crate) service: Option<Arc<Service>>,
    /// The endpoint that was chosen.
    pub(crate) endpoint: Option<Candidate>,
    pub(crate) version: ConfigVersion,
    pub(crate) moved: Arc<Transfer>,
    refusal: Option<Refusal>,
    /// Set once bytes can flow: the connection counts as opened.
    counted: Option<Arc<Counted>>,
}

impl Record {
    pub(crate) fn new(call: &Call) -> Self {
        Self::of(call.source, Some(call.client.clone()))
    }

    /// A connection that was refused before anything was known of where it goes.
    pub(crate) fn early(
        source: SocketAddr,
        identity: Option<Arc<Identity>>,
        refusal: Refusal,
    ) -> Self {
        Self { refusal: Some(refusal), ..Self::of(source, identity) }
    }

    fn of(source: SocketAddr, identity: Option<Arc<Identity>>) -> Self {
        Self {
            started: Instant::now(),
            source,
            identity,
            client: None,
            service: None,
            endpoint: None,
            version: ConfigVersion::default(),
            moved: Arc::default(),
            refusal: None,
            counted: None,
        }
    }

    /// How the connection ended, or why it did not come about.
    pub(crate) fn ended(&mut self, how: Result<Ended, Refusal>) {
        self.refusal = ended(how);
    }
}

/// Why a relay did not end by itself.
pub(crate) fn ended(how: Result<Ended, Refusal>) -> Option<Refusal> {
    let ended = match how {
        Ok(ended) if ended.by == EndedBy::Both => return None,
        Ok(ended) => ended,
        Err(refusal) => return Some(refusal),
    };
    let who = if ended.by == EndedBy::Socket { "the client" } else { "the endpoint" };
    let words = match ended.error {
        Some(e) => format!("{who} broke the connection: {e}"),
        None => format!("{who} broke the connection"),
    };
    Some(Refusal::new(Reason::ConnectionBroken, words))
}

/// Bytes of an open connection, counted while it lives.
#[derive(Debug)]
pub(crate) struct Counted {
    metrics: Arc<TcpMetrics>,
    moved: Arc<Transfer>,
    flushed: Mutex<Flushed>,
}

impl Counted {
    /// Adds what moved since the last time.
    pub(crate) fn flush(&self) {
        let (client, server) = self.moved.totals();
        lock(&self.flushed).flush(&self.metrics, client, server);
    }
}

/// Writes records. One per worker.
#[derive(Debug)]
pub struct Recorder {
    pub(crate) metrics: Metrics,
    pub(crate) log: AccessLog,
    pub(crate) tracer: Tracer,
    /// Only the worker's own thread locks these.
    connections: Mutex<Interner>,
    pub(crate) requests: Mutex<HttpInterner>,
}

impl Recorder {
    pub fn new(metrics: Metrics, log: AccessLog, tracer: Tracer) -> Self {
        Self { metrics, log, tracer, connections: Mutex::default(), requests: Mutex::default() }
    }

    /// Bytes can flow from here on.
    pub(crate) fn opened(&self, record: &mut Record) -> Arc<Counted> {
        let metrics = self.handle(record);
        metrics.opened();
        let moved = record.moved.clone();
        let counted = Arc::new(Counted { metrics, moved, flushed: Mutex::default() });
        record.counted = Some(counted.clone());
        counted
    }

    /// The connection is over.
    pub(crate) fn write(&self, record: Record) {
        let refused = record.refusal.as_ref().map(|refusal| refusal.reason);
        match &record.counted {
            Some(counted) => {
                counted.flush();
                counted.metrics.closed();
                if let Some(reason) = refused {
                    counted.metrics.failed(reason);
                }
            }
            None => {
                if let Some(reason) = refused {
                    self.handle(&record).failed(reason);
                }
            }
        }
        if self.log.is_on() {
            self.log_line(&record);
        }
    }

    fn handle(&self, record: &Record) -> Arc<TcpMetrics> {
        let endpoint = record.endpoint.as_ref();
        let key = TrafficKey {
            reporter: Reporter::Waypoint,
            security: security(endpoint, record.identity.is_some()),
            source: record.client.as_ref(),
            source_identity: record.identity.as_deref(),
            client: None,
            destination: endpoint.map(|e| &e.workload),
            destination_identity: None,
            service: record.service.as_ref(),
        };
        lock(&self.connections).tcp(&self.metrics, &key)
    }

    fn log_line(&self, record: &Record) {
        let duration = record.started.elapsed();
        let (from_client, from_server) = record.moved.totals();
        let outcome = match &record.refusal {
            Some(refusal) => Outcome::Failed { reason: refusal.reason, message: &refusal.message },
            None => Outcome::Complete,
        };
        let refusal = record.refusal.as_ref();
        let identity = record.endpoint.as_ref().and_then(identity);
        let (destination, hbone_address) = destination(record.endpoint.as_ref(), identity.as_ref());
        self.log.log(&ConnectionRecord {
            start: start(duration),
            duration,
            direction: Direction::Waypoint,
            source: Party {
                address: Some(record.source),
                workload: record.client.as_deref(),
                identity: record.identity.as_deref(),
            },
            destination,
            hbone_address,
            same_node: false,
            client: None,
            waypoint: false,
            service: record.service.as_ref().map(|s| &s.key),
            from_client,
            from_server,
            outcome,
            policy: refusal.and_then(|r| r.policy.as_ref()),
            rule: refusal.and_then(|r| r.provenance.as_ref()),
            config: record.version,
        });
    }
}

/// When something began that has taken so long.
pub(crate) fn start(duration: Duration) -> SystemTime {
    SystemTime::now().checked_sub(duration).unwrap_or(SystemTime::UNIX_EPOCH)
}

/// Both legs are mutual TLS, or the label says that not all is.
pub(crate) fn security(endpoint: Option<&Candidate>, from_mesh: bool) -> Security {
    let plain = endpoint.is_some_and(|e| e.transport == Transport::Plain);
    if from_mesh && !plain { Security::MutualTls } else { Security::Plaintext }
}

/// Who answers there by its certificate.
pub(crate) fn identity(endpoint: &Candidate) -> Option<Identity> {
    (endpoint.transport != Transport::Plain).then(|| endpoint.workload.identity())
}

/// The endpoint as the log shows it: where the bytes went, and behind a tunnel the application's address.
pub(crate) fn destination<'a>(
    endpoint: Option<&'a Candidate>,
    identity: Option<&'a Identity>,
) -> (Party<'a>, Option<SocketAddr>) {
    let Some(endpoint) = endpoint else { return (Party::default(), None) };
    let (address, behind) = match &endpoint.transport {
        Transport::Hbone { gateway, .. } => (*gateway, Some(endpoint.target)),
        _ => (endpoint.target, None),
    };
    let workload = Some(&*endpoint.workload);
    (Party { address: Some(address), workload, identity }, behind)
}

/// A thread that panicked while it counted must not take the records of all others with it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
