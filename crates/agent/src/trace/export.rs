//! Sends spans in batches, and gives up on a collector that does not take them.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use engine::Backoff;
use tokio::sync::{mpsc, watch};
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request};
use tonic_prost::ProstCodec;

use super::{Span, SpanContext, SpanCounts, SpanKind, TraceSettings, Value, proto};
use crate::channel;
use crate::control_plane::{RootCert, Server};

/// Spans of one call, as OpenTelemetry's own batch processors have it.
const BATCH: usize = 512;
/// How long a span waits for company.
const COMPANY: Duration = Duration::from_secs(1);
/// How long a call may take, by OTLP's specification.
const CALL: Duration = Duration::from_secs(10);
/// Calls for one batch while the collector is away: some 15 s. What comes meanwhile waits in the queue.
const ATTEMPTS: u32 = 5;
/// What is sent after the proxy was told to end.
const LAST: Duration = Duration::from_secs(2);

/// Runs until `stop`, then sends what is left.
pub(super) async fn run(
    settings: TraceSettings,
    spans: mpsc::Receiver<Span>,
    counts: Arc<SpanCounts>,
    mut stop: watch::Receiver<bool>,
) {
    let exporter = Exporter { settings, counts, channel: None, complained: false };
    let sending = exporter.send_all(spans, stop.clone());
    let too_late = async {
        // A sender that is gone means the same.
        let _ = stop.wait_for(|stop| *stop).await;
        tokio::time::sleep(LAST).await;
    };
    // A collector that does not answer must not hold up the end.
    tokio::select! {
        () = sending => {}
        () = too_late => {}
    }
}

/// Gathers until the batch is full or its first span has waited long enough. May be dropped at any moment: what has been
/// gathered is in `batch`.
async fn gather(spans: &mut mpsc::Receiver<Span>, batch: &mut Vec<Span>) {
    if batch.is_empty() && spans.recv_many(batch, BATCH).await == 0 {
        return;
    }
    let fill = async {
        while batch.len() < BATCH {
            let room = BATCH - batch.len();
            if spans.recv_many(batch, room).await == 0 {
                return;
            }
        }
    };
    let _ = tokio::time::timeout(COMPANY, fill).await;
}

struct Exporter {
    settings: TraceSettings,
    counts: Arc<SpanCounts>,
    channel: Option<Channel>,
    complained: bool,
}

/// A call that failed.
struct Failed {
    words: String,
    /// The specification allows another try.
    again: bool,
}

impl Exporter {
    /// Until it is told to stop and the queue is empty.
    async fn send_all(mut self, mut spans: mpsc::Receiver<Span>, mut stop: watch::Receiver<bool>) {
        let (mut batch, mut stopping) = (Vec::new(), false);
        loop {
            tokio::select! {
                () = gather(&mut spans, &mut batch) => {}
                _ = stop.wait_for(|stop| *stop), if !stopping => {
                    stopping = true;
                    spans.close();
                }
            }
            if batch.is_empty() {
                if spans.is_closed() && spans.is_empty() {
                    return;
                }
                continue;
            }
            self.export(std::mem::take(&mut batch)).await;
        }
    }

    async fn export(&mut self, spans: Vec<Span>) {
        let count = spans.len() as u64;
        let request = self.request(spans);
        let mut backoff = Backoff::default();
        let rejected = loop {
            match self.call(request.clone()).await {
                Ok(rejected) => break rejected.min(count),
                Err(Failed { words, again }) => {
                    self.complain(&words);
                    backoff.fail();
                    if !again || backoff.failures >= ATTEMPTS {
                        break count;
                    }
                    let rand = getrandom::u64().unwrap_or_default();
                    tokio::time::sleep(Duration::from_millis(backoff.delay_ms(rand))).await;
                }
            }
        };
        self.counts.refused.fetch_add(rejected, Ordering::Relaxed);
        self.counts.exported.fetch_add(count - rejected, Ordering::Relaxed);
        if rejected < count && self.complained {
            tracing::info!("the trace collector takes spans again");
            self.complained = false;
        }
    }

    /// Once, until it works again: spans are many.
    fn complain(&mut self, words: &str) {
        if !self.complained {
            let endpoint = &self.settings.endpoint;
            tracing::warn!("the trace collector at {endpoint} does not take spans: {words}");
            self.complained = true;
        }
    }

    /// How many spans the collector did not want.
    async fn call(&mut self, message: proto::ExportRequest) -> Result<u64, Failed> {
        let channel = match self.channel.take() {
            Some(channel) => channel,
            None => connect(&self.settings).await.map_err(|words| Failed { words, again: true })?,
        };
        let mut request = Request::new(message);
        for (name, value) in &self.settings.headers {
            request.metadata_mut().insert(name.clone(), value.clone());
        }
        let kept = channel.clone();
        let exchange = async {
            let mut grpc = Grpc::new(channel);
            grpc.ready().await.map_err(|e| Failed { words: channel::explain(&e), again: true })?;
            let codec = ProstCodec::<proto::ExportRequest, proto::ExportResponse>::default();
            let path = PathAndQuery::from_static(proto::EXPORT_PATH);
            grpc.unary(request, path, codec).await.map_err(|status| Failed {
                words: channel::explain(&status),
                again: is_retryable(status.code()),
            })
        };
        let response = tokio::time::timeout(CALL, exchange).await.unwrap_or_else(|_| {
            let words = format!("no answer within {} s", CALL.as_secs());
            Err(Failed { words, again: true })
        })?;
        self.channel = Some(kept);
        let Some(partial) = response.into_inner().partial_success else { return Ok(0) };
        if partial.rejected_spans > 0 {
            self.complain(&partial.error_message);
        }
        Ok(u64::try_from(partial.rejected_spans).unwrap_or(0))
    }

    fn request(&self, spans: Vec<Span>) -> proto::ExportRequest {
        let resource = self.settings.resource.iter();
        let attributes =
            resource.map(|(key, value)| key_value(key, Value::Text(value.clone()))).collect();
        let scope = proto::Scope {
            name: "ambit".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let spans = spans.into_iter().map(on_the_wire).collect();
        proto::ExportRequest {
            resource_spans: vec![proto::ResourceSpans {
                resource: Some(proto::Resource { attributes }),
                scope_spans: vec![proto::ScopeSpans { scope: Some(scope), spans }],
            }],
        }
    }
}

/// The codes after which OTLP's specification allows another try.
fn is_retryable(code: Code) -> bool {
    matches!(
        code,
        Code::Cancelled
            | Code::DeadlineExceeded
            | Code::Aborted
            | Code::OutOfRange
            | Code::Unavailable
            | Code::DataLoss
    )
}

async fn connect(settings: &TraceSettings) -> Result<Channel, String> {
    if let Some(root) = &settings.certificate
        && let Some(rest) = settings.endpoint.strip_prefix("https://")
    {
        let host = rest.rsplit_once(':').map_or(rest, |(host, _)| host);
        let server = Server {
            address: settings.endpoint.clone(),
            name: host.trim_matches(['[', ']']).to_owned(),
            root: RootCert::File(root.clone()),
            headers: Vec::new(),
        };
        return channel::connect(&server, None).await.map_err(|e| e.to_string());
    }
    let endpoint = Endpoint::from_shared(settings.endpoint.clone()).map_err(|e| e.to_string())?;
    endpoint.connect_timeout(CALL).connect().await.map_err(|e| channel::explain(&e))
}

fn on_the_wire(span: Span) -> proto::Span {
    proto::Span {
        trace_id: span.context.trace_id.to_vec(),
        span_id: span.context.span_id.to_vec(),
        parent_span_id: span.parent.map(|id| id.to_vec()).unwrap_or_default(),
        name: span.name.to_owned(),
        kind: match span.kind {
            SpanKind::Server => proto::KIND_SERVER,
            SpanKind::Client => proto::KIND_CLIENT,
        },
        start_time_unix_nano: nanoseconds(span.start),
        end_time_unix_nano: nanoseconds(span.end),
        attributes: span.attributes.into_iter().map(|(k, v)| key_value(k, v)).collect(),
        links: span.link.iter().map(link).collect(),
        status: span.error.map(|message| proto::Status { message, code: proto::STATUS_ERROR }),
        flags: u32::from(span.context.sampled),
    }
}

fn link(to: &SpanContext) -> proto::Link {
    proto::Link { trace_id: to.trace_id.to_vec(), span_id: to.span_id.to_vec() }
}

fn key_value(key: &str, value: Value) -> proto::KeyValue {
    let value = match value {
        Value::Text(text) => proto::Of::Text(text),
        Value::Number(number) => proto::Of::Number(number),
        Value::Truth(truth) => proto::Of::Truth(truth),
    };
    proto::KeyValue { key: key.to_owned(), value: Some(proto::AnyValue { value: Some(value) }) }
}

fn nanoseconds(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
