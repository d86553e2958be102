//! An OpenTelemetry collector made of the official protobufs: it takes spans by OTLP over gRPC and keeps them.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value::Value};
use opentelemetry_proto::tonic::trace::v1::Span;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// How long its tasks may take to end.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// A span with what it is of.
#[derive(Clone, Debug)]
pub struct Received {
    pub resource: Vec<KeyValue>,
    pub scope: String,
    pub span: Span,
}

impl Received {
    /// An attribute of the span as text; empty when it has none of this name.
    pub fn get(&self, name: &str) -> String {
        text(&self.span.attributes, name)
    }

    /// An attribute of the resource.
    pub fn of(&self, name: &str) -> String {
        text(&self.resource, name)
    }
}

fn text(attributes: &[KeyValue], name: &str) -> String {
    let found = attributes.iter().find(|a| a.key == name);
    match found.and_then(|a| a.value.as_ref()?.value.as_ref()) {
        Some(Value::StringValue(text)) => text.clone(),
        Some(Value::IntValue(number)) => number.to_string(),
        Some(Value::BoolValue(truth)) => truth.to_string(),
        _ => String::new(),
    }
}

/// A running collector.
pub struct Collector {
    state: Arc<Mutex<State>>,
    runtime: Option<tokio::runtime::Runtime>,
}

#[derive(Default)]
struct State {
    received: Vec<Received>,
    /// The `x-tenant` header of every call.
    tenants: Vec<String>,
}

impl std::fmt::Debug for Collector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Collector").field("spans", &self.spans().len()).finish_non_exhaustive()
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(LAST_WORDS);
        }
    }
}

impl Collector {
    pub fn start(address: SocketAddr) -> Result<Self> {
        let state = Arc::<Mutex<State>>::default();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let listener =
            runtime.block_on(TcpListener::bind(address)).context("the collector's port")?;
        let service = TraceServiceServer::new(Service(state.clone()));
        let server = tonic::transport::Server::builder()
            .serve_with_incoming(service, TcpListenerStream::new(listener));
        runtime.spawn(server);
        Ok(Self { state, runtime: Some(runtime) })
    }

    pub fn spans(&self) -> Vec<Received> {
        lock(&self.state).received.clone()
    }

    pub fn tenants(&self) -> Vec<String> {
        lock(&self.state).tenants.clone()
    }
}

struct Service(Arc<Mutex<State>>);

#[tonic::async_trait]
impl TraceService for Service {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let tenant = request.metadata().get("x-tenant").and_then(|v| v.to_str().ok());
        let tenant = tenant.unwrap_or_default().to_owned();
        let mut state = lock(&self.0);
        state.tenants.push(tenant);
        for of in request.into_inner().resource_spans {
            let resource = of.resource.map(|r| r.attributes).unwrap_or_default();
            for scoped in of.scope_spans {
                let scope = scoped.scope.map(|s| s.name).unwrap_or_default();
                state.received.extend(scoped.spans.into_iter().map(|span| Received {
                    resource: resource.clone(),
                    scope: scope.clone(),
                    span,
                }));
            }
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}
