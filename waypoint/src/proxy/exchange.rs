//! A request and its answer, from the first header to the last byte: what is recorded of it.
//!
//! Invariant: whatever becomes of a request, its record is written exactly once: when it is dropped. One that is dropped
//! before it was complete has lost its client.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use agent::access_log::{HttpRecord, Outcome, Party};
use agent::metrics::{HttpKey, HttpProtocol, Reporter, Sample, TrafficKey};
use agent::trace::Position;
use engine::Candidate;
use hbone::Transfer;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, Version, request};
use model::http::RouteRule;
use model::{ConfigVersion, Reason, Refusal};

use super::Client;
use super::body::Counts;
use super::span;
use crate::call::Admission;
use crate::record::{destination, identity, lock, security, start};
use crate::upstream::Lease;

pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

/// See the module.
pub(crate) struct Exchange {
    pub(crate) client: Arc<Client>,
    pub(crate) admission: Option<Arc<Admission>>,
    pub(crate) started: Instant,
    pub(crate) method: Method,
    /// As it came.
    pub(crate) uri: Uri,
    pub(crate) version: Version,
    pub(crate) host: Option<HeaderValue>,
    pub(crate) request_id: Option<HeaderValue>,
    pub(crate) grpc: bool,
    pub(crate) rule: Option<Arc<RouteRule>>,
    pub(crate) config: ConfigVersion,
    /// The last endpoint that was tried.
    pub(crate) endpoint: Option<Candidate>,
    pub(crate) status: Option<u16>,
    grpc_status: Option<u8>,
    /// Of the request's body.
    pub(crate) counts: Option<Arc<Counts>>,
    response_bytes: u64,
    response_messages: u64,
    /// Bytes after the answer 101.
    pub(crate) upgraded: Option<Arc<Transfer>>,
    pub(crate) refusal: Option<Refusal>,
    complete: bool,
    /// Goes back when the answer is complete.
    pub(crate) lease: Option<Lease>,
    /// Its place in a trace, where tracing is on.
    pub(crate) trace: Option<Box<Position>>,
}

impl Exchange {
    pub(crate) fn begin(client: Arc<Client>, parts: &request::Parts) -> Self {
        client.progress.begin();
        let parent = span::parent(&parts.headers).or(client.call.trace);
        let trace = client.call.worker.recorder.tracer.begin(parent).map(Box::new);
        Self {
            client,
            admission: None,
            started: Instant::now(),
            method: parts.method.clone(),
            uri: parts.uri.clone(),
            version: parts.version,
            host: parts.headers.get(http::header::HOST).cloned(),
            request_id: parts.headers.get(REQUEST_ID).cloned(),
            grpc: engine::http::is_grpc(&parts.headers),
            rule: None,
            config: ConfigVersion::default(),
            endpoint: None,
            status: None,
            grpc_status: None,
            counts: None,
            response_bytes: 0,
            response_messages: 0,
            upgraded: None,
            refusal: None,
            complete: false,
            lease: None,
            trace,
        }
    }

    /// Bytes of the answer's body are on their way.
    pub(crate) fn sent(&mut self, bytes: u64) {
        self.response_bytes += bytes;
    }

    pub(crate) fn sent_messages(&mut self, messages: u64) {
        self.response_messages += messages;
    }

    /// Headers or trailers, which may have the status of gRPC.
    pub(crate) fn trailers(&mut self, trailers: &HeaderMap) {
        let status = trailers.get(GRPC_STATUS).and_then(|value| value.to_str().ok());
        self.grpc_status = status.and_then(|text| text.parse().ok()).or(self.grpc_status);
    }

    /// The answer has been passed on to its end.
    pub(crate) fn complete(&mut self) {
        self.complete = true;
        if let Some(lease) = self.lease.take() {
            self.client.call.worker.upstreams.give_back(lease);
        }
    }

    /// The endpoint broke off in the middle of its answer.
    pub(crate) fn broke(&mut self, error: &hyper::Error) {
        // It may have done so because its request broke off.
        let fault = self.counts.as_ref().and_then(|counts| counts.fault.get().cloned());
        let words = format!("the endpoint broke off in the middle of its answer: {error}");
        self.refusal = Some(fault.unwrap_or_else(|| Refusal::new(Reason::UpstreamBroken, words)));
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.complete
    }

    /// The route's time is over in the middle of an answer. An HTTP/1 client hears of it by the end of its connection.
    pub(crate) fn late(&mut self, words: &str) {
        if self.version < Version::HTTP_2 {
            self.client.progress.end_soon();
        }
        self.refusal = Some(Refusal::new(Reason::RequestTimeout, words));
    }

    fn write(&mut self) {
        if !self.complete && self.refusal.is_none() {
            let words = "the client went away before the answer was complete";
            let gone = || Refusal::new(Reason::ConnectionBroken, words);
            let ended = self.client.call.worker.shared.last_word();
            self.refusal = Some(ended.unwrap_or_else(gone));
        }
        let duration = self.started.elapsed();
        self.count(duration);
        let recorder = &self.client.call.worker.recorder;
        if recorder.log.is_on() {
            self.log(duration);
        }
        if let Some(position) = self.trace.as_deref().filter(|p| p.context.sampled) {
            recorder.tracer.end(span::of(self, position));
        }
    }

    fn count(&self, duration: Duration) {
        let recorder = &self.client.call.worker.recorder;
        let reason = self.refusal.as_ref().map(|refusal| refusal.reason);
        if let Some(reason) = reason {
            recorder.metrics.failed(Reporter::Waypoint, reason);
        }
        let (request_bytes, request_messages) = self.received();
        let endpoint = self.endpoint.as_ref();
        let admission = self.admission.as_deref();
        let key = HttpKey {
            traffic: TrafficKey {
                reporter: Reporter::Waypoint,
                security: security(endpoint, true),
                source: admission.and_then(|a| a.client.as_ref()),
                source_identity: Some(&self.client.call.client),
                client: None,
                destination: endpoint.map(|e| &e.workload),
                destination_identity: None,
                service: admission.and_then(Admission::service),
            },
            protocol: if self.grpc { HttpProtocol::Grpc } else { HttpProtocol::Http },
            code: self.status.unwrap_or(0),
            flags: reason.map_or("-", Reason::response_flags),
            grpc_status: self.grpc_status,
        };
        let metrics = lock(&recorder.requests).get(&recorder.metrics, &key);
        metrics.add(&Sample {
            duration,
            request_bytes,
            response_bytes: self.answered(),
            request_messages,
            response_messages: self.response_messages,
        });
    }

    /// Bytes and messages of the request's body.
    pub(crate) fn received(&self) -> (u64, u64) {
        let later = self.upgraded.as_ref().map_or(0, |moved| moved.totals().0);
        let counts = self.counts.as_deref();
        let (bytes, messages) = counts.map_or((0, 0), |counts| {
            (counts.bytes.load(Ordering::Relaxed), counts.messages.load(Ordering::Relaxed))
        });
        (bytes + later, messages)
    }

    /// Bytes of the answer's body.
    pub(crate) fn answered(&self) -> u64 {
        self.response_bytes + self.upgraded.as_ref().map_or(0, |moved| moved.totals().1)
    }

    fn log(&self, duration: Duration) {
        let call = &self.client.call;
        let admission = self.admission.as_deref();
        let identity = self.endpoint.as_ref().and_then(identity);
        let (destination, hbone_address) = destination(self.endpoint.as_ref(), identity.as_ref());
        let text = |value: &'_ Option<HeaderValue>| -> String {
            let bytes = value.as_ref().map(HeaderValue::as_bytes).unwrap_or_default();
            String::from_utf8_lossy(bytes).into_owned()
        };
        let (host, request_id) = (text(&self.host), text(&self.request_id));
        let authority = self.uri.authority().map_or(host.as_str(), |authority| authority.as_str());
        let outcome = match &self.refusal {
            Some(refusal) => Outcome::Failed { reason: refusal.reason, message: &refusal.message },
            None => Outcome::Complete,
        };
        call.worker.recorder.log.log_request(&HttpRecord {
            start: start(duration),
            duration,
            source: Party {
                address: Some(call.source),
                workload: admission.and_then(|a| a.client.as_deref()),
                identity: Some(&call.client),
            },
            destination,
            hbone_address,
            service: admission.and_then(Admission::service).map(|service| &service.key),
            method: self.method.as_str(),
            authority,
            path: self.uri.path_and_query().map_or("", |path| path.as_str()),
            protocol: protocol(self.version),
            status: self.status,
            grpc_status: self.grpc_status,
            request_id: &request_id,
            trace: self.trace.as_ref().map(|position| position.context.trace_id),
            rule: self.rule.as_deref(),
            delegated: hbone_address.map(|_| &*call.client),
            request_bytes: self.received().0,
            response_bytes: self.answered(),
            outcome,
            config: self.config,
        });
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.write();
        self.client.progress.end();
    }
}

pub(crate) fn protocol(version: Version) -> &'static str {
    match version {
        Version::HTTP_2 => "HTTP/2",
        Version::HTTP_10 => "HTTP/1.0",
        _ => "HTTP/1.1",
    }
}
