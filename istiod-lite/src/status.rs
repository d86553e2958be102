//! The page of operators: readiness, metrics, and what the control plane thinks. Plain HTTP; listens on
//! loopback unless told otherwise.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::control::Control;
use crate::report::Page;

/// A scraper, a probe and a few people.
const MAX_CONNECTIONS: usize = 64;
/// A connection that has not asked by then is not going to.
const HEADERS: Duration = Duration::from_secs(5);
/// A path and a few headers.
const MAX_BUFFER: usize = 16 * 1024;

/// Serves until the process stops.
pub(crate) async fn serve(listener: TcpListener, control: Arc<Control>) {
    let limit = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut stopping = control.stopping.clone();
    loop {
        let Ok(permit) = limit.clone().acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stopping.wait_for(|stop| *stop) => return,
        };
        let Ok((stream, _)) = accepted else {
            // Out of file descriptors: do not spin.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let control = control.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let response = answer(&control, &request);
                async move { Ok::<_, Infallible>(response) }
            });
            let served = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADERS)
                .max_buf_size(MAX_BUFFER)
                .serve_connection(TokioIo::new(stream), service)
                .await;
            if let Err(error) = served {
                tracing::debug!("status connection ended: {error}");
            }
            drop(permit);
        });
    }
}

fn answer<B>(control: &Control, request: &Request<B>) -> Response<Full<Bytes>> {
    const TEXT: &str = "text/plain; charset=utf-8";
    const JSON: &str = "application/json";
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return page(StatusCode::METHOD_NOT_ALLOWED, TEXT, "only GET\n".into());
    }
    match request.uri().path() {
        "/readyz" => {
            let (status, text) = ready(control);
            page(status, TEXT, text)
        }
        "/metrics" => {
            const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            page(StatusCode::OK, OPEN_METRICS, control.metrics.text())
        }
        "/debug/config" => page(StatusCode::OK, JSON, config(control)),
        "/debug/waypoints" => page(StatusCode::OK, JSON, waypoints(control)),
        "/debug/diagnostics" => {
            page(StatusCode::OK, JSON, Page::new(&control.latest.borrow()).to_json())
        }
        "/debug/routes" => page(StatusCode::OK, JSON, routes(control)),
        _ => {
            let text = "/readyz\n/metrics\n/debug/config\n/debug/waypoints\n/debug/diagnostics\n/debug/routes\n";
            page(StatusCode::NOT_FOUND, TEXT, text.into())
        }
    }
}

fn ready(control: &Control) -> (StatusCode, String) {
    let latest = control.latest.borrow();
    match &latest.world {
        Some(world) => (StatusCode::OK, format!("ready, push {}\n", world.push())),
        None => {
            let missing: Vec<_> = latest.missing.iter().map(|p| p.display().to_string()).collect();
            let text = format!("waiting for these folders: {}\n", missing.join(" "));
            (StatusCode::SERVICE_UNAVAILABLE, text)
        }
    }
}

fn config(control: &Control) -> String {
    let latest = control.latest.borrow();
    let world = latest.world.as_ref().map(|world| {
        let [workloads, services, policies, routes, subsets] = world.counts;
        json!({
            "push": world.push().to_string(),
            "workloads": workloads,
            "services": services,
            "policies": policies,
            "routes": routes,
            "subsets": subsets,
            "compile_ms": world.compile_time.as_secs_f64() * 1e3,
            "age_seconds": world.since.elapsed().as_secs(),
        })
    });
    let mesh = &control.mesh;
    let value = json!({
        "mesh": {
            "trust_domain": mesh.trust_domain,
            "cluster": mesh.cluster,
            "network": mesh.network,
            "root_namespace": mesh.root_namespace,
            "cluster_domain": mesh.cluster_domain,
        },
        "config": world,
        "waiting_for": latest.missing,
        "tokens_pending": control.tokens().pending(),
        "pod_tokens": control.pod_tokens().len(),
        "proxies": control.list_proxies(),
    });
    serde_json::to_string_pretty(&value).unwrap_or_default() + "\n"
}

/// How the waypoints are: an empty list until the folders have been read.
fn waypoints(control: &Control) -> String {
    let latest = control.latest.borrow();
    let gateways = latest.world.as_ref().map_or(&[][..], |world| world.gateways.as_slice());
    serde_json::to_string_pretty(gateways).unwrap_or_default() + "\n"
}

/// Every route's conditions; empty until every folder has been read.
fn routes(control: &Control) -> String {
    let latest = control.latest.borrow();
    let routes = latest.world.iter().flat_map(|world| &world.route_status);
    let routes: Vec<&compile::RouteStatus> = routes.map(|status| &**status).collect();
    // Strings, numbers and lists: cannot fail.
    serde_json::to_string_pretty(&routes).unwrap_or_default() + "\n"
}

fn page(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response
}
