//! Copies of requests. Nobody waits for them, and their answers are read and dropped.
//!
//! A copy of the body is sent as the body comes, from a buffer of bounded size: a mirror that cannot keep up is cut off in
//! the middle, and the request goes on. Copies above the limit are left out.

use std::sync::Arc;

use engine::Admitted;
use engine::http::{HttpAction, HttpPlan, backend_protocol, destination};
use http::{Request, Version, request};
use http_body::Body as _;
use model::http::{Protocol, Target};
use model::{Reason, Refusal};

use super::Client;
use super::body::RequestBody;
use super::forward::dress;
use crate::call::Admission;
use crate::config::Waits;
use crate::upstream::{self, Answered};
use crate::worker::Busy;
use agent::metrics::Reporter;

/// What is read of a mirror's answer, so that its connection can be used again; a longer one costs the connection.
const MAX_ANSWER: u64 = 1 << 20;

/// Sends a copy to each mirror of the plan.
pub(super) fn send(
    client: &Arc<Client>,
    admission: &Arc<Admission>,
    plan: &HttpPlan,
    parts: &request::Parts,
    body: &mut RequestBody,
) {
    // gRPC is HTTP/2, whatever is declared of the mirror's port.
    let grpc = matches!(plan.action, HttpAction::Forward { http2: true, .. });
    if plan.mirrors.is_empty() || matches!(admission.to, Admitted::Workload { .. }) {
        return;
    }
    let worker = &client.call.worker;
    for (index, target) in plan.mirrors.iter().enumerate() {
        let Ok(place) = worker.mirrors.clone().try_acquire_owned() else {
            worker.recorder.metrics.failed(Reporter::Waypoint, Reason::Limit);
            continue;
        };
        let mut copy = copy_of(parts);
        plan.edit_mirror(index, &mut copy);
        copy.headers.remove(http::header::EXPECT);
        copy.headers.remove(http::header::UPGRADE);
        copy.headers.remove(http::header::CONNECTION);
        let request = Request::from_parts(copy, body.copy());
        let mirror = one(client.clone(), admission.clone(), target.clone(), grpc, request);
        let busy = Busy::new(&worker.shared);
        tokio::spawn(async move {
            match tokio::time::timeout(Waits::MIRROR, mirror).await {
                Ok(Ok(())) => {}
                Ok(Err(refusal)) => tracing::debug!(%refusal, "a mirrored request failed"),
                Err(_) => tracing::debug!("a mirrored request took too long"),
            }
            drop((place, busy));
        });
    }
}

async fn one(
    client: Arc<Client>,
    admission: Arc<Admission>,
    target: Target,
    grpc: bool,
    request: Request<RequestBody>,
) -> Result<(), Refusal> {
    let worker = &client.call.worker;
    let (to, protocol) = {
        let snapshot = worker.shared.store.load();
        let to = destination(&snapshot, &admission.own, &target, worker.random())?;
        let protocol = backend_protocol(&snapshot, &to.service, to.port.service_port);
        (to, protocol)
    };
    let http2 = grpc
        || match protocol {
            Protocol::Http2 | Protocol::Grpc => true,
            Protocol::Undeclared => request.version() == Version::HTTP_2,
            Protocol::Http | Protocol::Opaque => false,
        };
    let (mut parts, body) = request.into_parts();
    dress(&mut parts, http2, &body);
    let request = Request::from_parts(parts, body);
    let sent =
        upstream::send(&client.call, &admission, &to.candidates, http2, request, |_| {}).await?;
    let Answered { response, lease } = sent;
    let mut body = response.into_body();
    let mut read = 0;
    while read <= MAX_ANSWER {
        let frame = std::future::poll_fn(|cx| std::pin::Pin::new(&mut body).poll_frame(cx)).await;
        match frame {
            None => {
                worker.upstreams.give_back(lease);
                break;
            }
            Some(Ok(frame)) => read += frame.data_ref().map_or(0, |bytes| bytes.len() as u64),
            Some(Err(_)) => break,
        }
    }
    Ok(())
}

fn copy_of(parts: &request::Parts) -> request::Parts {
    let (mut copy, ()) = Request::new(()).into_parts();
    copy.method = parts.method.clone();
    copy.uri = parts.uri.clone();
    copy.version = parts.version;
    copy.headers = parts.headers.clone();
    copy
}
