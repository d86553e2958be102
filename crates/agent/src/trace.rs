//! Spans of connections for an OpenTelemetry collector. Off unless an endpoint is configured.
//!
//! A span is made once, at the end of what it describes, and goes into a bounded queue; a task of its own sends batches by
//! OTLP over gRPC. Off means: no identifier is drawn, no header is sent, nothing is queued.
//!
//! Invariants: the data path never waits for a collector; what the queue or the collector does not take is counted
//! (`ambit_spans_dropped_total`); whether a trace is sampled is decided where it begins, and everybody after follows.

mod context;
mod export;
mod proto;
mod settings;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use tokio::sync::{mpsc, watch};

pub use context::SpanContext;
pub use settings::{Sampler, TraceSettings, TraceText};

/// Spans that wait for the collector: as many as OpenTelemetry's own batch processors hold, some 2 MiB.
const QUEUE: usize = 2048;

/// Where spans go. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Tracer(Option<Arc<On>>);

#[derive(Debug)]
struct On {
    sampler: Sampler,
    queue: mpsc::Sender<Span>,
    /// Closed when the task that sends has ended.
    done: watch::Receiver<()>,
    counts: Arc<SpanCounts>,
}

/// What became of spans, for the metrics page.
#[derive(Debug, Default)]
pub struct SpanCounts {
    exported: AtomicU64,
    /// The queue was full.
    queue_full: AtomicU64,
    /// The collector did not take them.
    refused: AtomicU64,
}

impl SpanCounts {
    pub(crate) fn exported(&self) -> u64 {
        self.exported.load(Ordering::Relaxed)
    }

    /// By reason.
    pub(crate) fn dropped(&self) -> [(&'static str, u64); 2] {
        [
            ("queue", self.queue_full.load(Ordering::Relaxed)),
            ("export", self.refused.load(Ordering::Relaxed)),
        ]
    }
}

/// Something that happened between two moments.
#[derive(Clone, Debug)]
pub struct Span {
    pub name: &'static str,
    pub kind: SpanKind,
    pub context: SpanContext,
    /// The span of the same trace that caused this one.
    pub parent: Option<[u8; 8]>,
    /// A span of another trace that it belongs together with.
    pub link: Option<SpanContext>,
    pub start: SystemTime,
    pub end: SystemTime,
    pub attributes: Vec<(&'static str, Value)>,
    /// Why it did not end well.
    pub error: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpanKind {
    /// Took a call.
    Server,
    /// Made one.
    Client,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    Text(String),
    Number(i64),
    Truth(bool),
}

/// Where a span stands in its trace, from its beginning on.
#[derive(Clone, Copy, Debug)]
pub struct Position {
    pub context: SpanContext,
    pub parent: Option<[u8; 8]>,
}

impl Tracer {
    pub fn off() -> Self {
        Self(None)
    }

    /// Starts the task that sends, on the current runtime; off without settings.
    pub fn start(
        settings: Option<TraceSettings>,
        counts: Arc<SpanCounts>,
        stop: watch::Receiver<bool>,
    ) -> Self {
        let Some(settings) = settings else { return Self::off() };
        let (queue, spans) = mpsc::channel(QUEUE);
        let sampler = settings.sampler;
        let (sending, done) = watch::channel(());
        let task = export::run(settings, spans, counts.clone(), stop);
        tokio::spawn(async move {
            task.await;
            drop(sending);
        });
        Self(Some(Arc::new(On { sampler, queue, done, counts })))
    }

    /// Begins a span: of the trace of `parent`, or of a new one. `None` when tracing is off.
    pub fn begin(&self, parent: Option<SpanContext>) -> Option<Position> {
        let on = self.0.as_ref()?;
        // Without random numbers there are no keys either; then there is no trace.
        let mut random = [0; 24];
        getrandom::fill(&mut random).ok()?;
        let span_id = *random.last_chunk::<8>()?;
        let trace_id = parent.map_or(*random.first_chunk::<16>()?, |p| p.trace_id);
        let sampled = on.sampler.decide(parent.map(|p| p.sampled), &trace_id);
        let context = SpanContext::new(trace_id, span_id, sampled)?;
        Some(Position { context, parent: parent.map(|p| p.span_id) })
    }

    /// Waits, after `stop`, until what was queued is sent or given up.
    pub async fn ended(&self) {
        if let Some(on) = &self.0 {
            // Nothing is ever said on it: it closes.
            let _ = on.done.clone().changed().await;
        }
    }

    /// Queues a span whose trace is sampled. Does not wait.
    pub fn end(&self, span: Span) {
        if let Some(on) = &self.0
            && span.context.sampled
            && on.queue.try_send(span).is_err()
        {
            on.counts.queue_full.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests;
