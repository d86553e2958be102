//! One request: what is it, what is to be done with it, and doing it.
//!
//! The order is the engine's: normalize, route, delay, then an answer of our own or a backend's. Everything that is
//! waited for is within the route's time; what is refused is answered in the client's protocol with its reason.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use engine::http::{
    Answer, Caller, HttpAction, HttpPlan, RequestFacts, answer as refused, answer_with,
    backend_protocol, destination, normalize, one_framing, route, strip_hop_by_hop, to_pod,
};
use engine::{Admitted, Candidate};
use http::header::{
    CONNECTION, CONTENT_LENGTH, EXPECT, HOST, HeaderValue, TE, TRANSFER_ENCODING, UPGRADE,
};
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri, Version, request};
use hyper::body::{Body as _, Incoming};
use hyper::upgrade::OnUpgrade;
use model::http::{Protocol, Target};
use model::{Reason, Refusal, Snapshot};

use super::Client;
use super::body::{BodyError, EndpointBody, Messages, RequestBody, ResponseBody};
use super::exchange::{Exchange, REQUEST_ID};
use super::timed::TimedBody;
use super::{mirror, span, upgrade};
use crate::call::Admission;
use crate::upstream::{Answered, send};

/// Answers a request. An `Err` is a reset: of the stream in HTTP/2, of the connection in HTTP/1.
pub(super) async fn answer(
    client: Arc<Client>,
    request: Request<Incoming>,
) -> Result<Response<ResponseBody>, BodyError> {
    let (mut parts, incoming) = request.into_parts();
    let mut upgrade = parts.extensions.remove::<OnUpgrade>();
    let answered = answer_parts(client, parts, incoming, &mut upgrade).await;
    if let Some(unused) = upgrade {
        tokio::spawn(upgrade::close(unused));
    }
    answered
}

/// Takes `upgrade` if the answer is that protocols are switched.
async fn answer_parts(
    client: Arc<Client>,
    mut parts: request::Parts,
    incoming: Incoming,
    upgrade: &mut Option<OnUpgrade>,
) -> Result<Response<ResponseBody>, BodyError> {
    let mut exchange = Exchange::begin(client, &parts);
    let (plan, admission) = match decide(&mut exchange, &mut parts) {
        Ok(decided) => decided,
        Err(answer) => return Ok(own(exchange, *answer)),
    };
    let mut time = Time::of(&exchange, &plan);
    if let Some(delay) = plan.delay
        && let Err(refusal) = time.within(tokio::time::sleep(delay)).await
    {
        let answer = plan.answer(refusal);
        return Ok(own(exchange, answer));
    }
    let forward = match &plan.action {
        HttpAction::Answer(answer) => {
            let answer = answer.clone();
            return Ok(own(exchange, answer));
        }
        HttpAction::Reset(refusal) => {
            exchange.refusal = Some(refusal.clone());
            return Err(BodyError::reset());
        }
        HttpAction::Forward { target, http2 } => Forward { target, http2: *http2 },
    };
    match forward.run(&mut exchange, &plan, &admission, parts, incoming, &mut time).await {
        Ok(response) => Ok(finish(exchange, &plan, response, upgrade, &time)),
        Err(refusal) => {
            let answer = plan.answer(refusal);
            Ok(own(exchange, answer))
        }
    }
}

/// What is to be done with a request, by the configuration of this moment.
fn decide(
    exchange: &mut Exchange,
    parts: &mut request::Parts,
) -> Result<(HttpPlan, Arc<Admission>), Box<Answer>> {
    let client = exchange.client.clone();
    let grpc = exchange.grpc;
    let ambiguous = client.progress.take_ambiguous();
    let admission = client.call.admission().map_err(|refusal| Box::new(refused(refusal, grpc)))?;
    exchange.admission = Some(admission.clone());
    if ambiguous {
        let words = "the request has a content-length and a transfer-encoding";
        return Err(Box::new(refused(Refusal::new(Reason::BadHttp, words), grpc)));
    }
    normalize(parts).map_err(|refusal| {
        Box::new(match refusal.reason {
            Reason::Limit => answer_with(refusal, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE),
            _ => refused(refusal, grpc),
        })
    })?;
    name_request(exchange, parts);
    let snapshot = client.call.worker.shared.store.load();
    exchange.config = snapshot.version();
    let plan = match &admission.to {
        Admitted::Service { service, port, .. } => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
            let caller = Caller { identity: Some(&client.call.client) };
            let facts = RequestFacts { service, port: *port, caller, request: parts, now };
            route(&snapshot, &facts, client.call.worker.random())
        }
        Admitted::Workload { .. } => to_pod(parts),
    };
    exchange.rule = plan.rule.clone();
    Ok((plan, admission))
}

/// Gives a request a name that is the same in every log, unless it has one.
fn name_request(exchange: &mut Exchange, parts: &mut request::Parts) {
    if exchange.request_id.is_some() {
        return;
    }
    let worker = &exchange.client.call.worker;
    let random = u128::from(worker.random()) << 64 | u128::from(worker.random());
    // A version 4 UUID, as Envoy writes them.
    let id = (random & !(0xf << 76) & !(3 << 62)) | 4 << 76 | 2 << 62;
    let hex = format!("{id:032x}");
    let text = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-");
    if let Ok(value) = HeaderValue::try_from(text) {
        parts.headers.insert(REQUEST_ID, value.clone());
        exchange.request_id = Some(value);
    }
}

/// A request that goes to a backend.
struct Forward<'a> {
    target: &'a Target,
    http2: bool,
}

impl Forward<'_> {
    async fn run(
        self,
        exchange: &mut Exchange,
        plan: &HttpPlan,
        admission: &Arc<Admission>,
        mut parts: request::Parts,
        incoming: Incoming,
        time: &mut Time,
    ) -> Result<Response<Incoming>, Refusal> {
        let client = exchange.client.clone();
        let (candidates, protocol) = {
            let snapshot = client.call.worker.shared.store.load();
            self.candidates(&snapshot, admission, &client)?
        };
        let http2 = self.http2
            || match protocol {
                Protocol::Http2 | Protocol::Grpc => true,
                // Nobody said what it speaks: what the client speaks.
                Protocol::Undeclared => parts.version == Version::HTTP_2,
                Protocol::Http | Protocol::Opaque => false,
            };
        let (mut body, counts) = RequestBody::client(incoming, exchange.grpc);
        if body.is_empty() && parts.headers.get(CONTENT_LENGTH).is_some_and(|length| length != "0")
        {
            // Passed on, the endpoint would take the next request for its body.
            let words = "the request has a content-length and no body";
            return Err(Refusal::new(Reason::BadHttp, words));
        }
        exchange.counts = counts.clone();
        mirror::send(&client, admission, plan, &parts, &mut body);
        plan.edit_request(&mut parts);
        if let Some(position) = &exchange.trace {
            span::tell(&mut parts.headers, &position.context);
        }
        let expected = parts.headers.contains_key(EXPECT);
        let possible = expected && !http2 && parts.version != Version::HTTP_2;
        let gate = possible.then(|| body.wait_for_continue()).flatten();
        if gate.is_none() {
            parts.headers.remove(EXPECT);
        }
        dress(&mut parts, http2, &body);
        let mut request = Request::from_parts(parts, body);
        if let Some(position) = &exchange.trace {
            request.extensions_mut().insert(position.context);
        }
        if let Some(gate) = gate {
            hyper::ext::on_informational(&mut request, move |response| {
                if response.status() == StatusCode::CONTINUE {
                    gate.open();
                }
            });
        }
        time.begin_backend();
        let sending = send(&client.call, admission, &candidates, http2, request, |candidate| {
            exchange.endpoint = Some(candidate.clone());
        });
        let fault = || counts.as_ref().and_then(|counts| counts.fault.get().cloned());
        let Answered { response, lease } =
            time.within(sending).await?.map_err(|refusal| fault().unwrap_or(refusal))?;
        exchange.lease = Some(lease);
        Ok(response)
    }

    fn candidates(
        &self,
        snapshot: &Snapshot,
        admission: &Admission,
        client: &Client,
    ) -> Result<(Vec<Candidate>, Protocol), Refusal> {
        if let Admitted::Workload { workload, port, protocol } = &admission.to {
            return Ok((vec![admission.pod(&client.call, workload, *port)?], *protocol));
        }
        let rand = client.call.worker.random();
        let to = destination(snapshot, &admission.own, self.target, rand)?;
        let protocol = backend_protocol(snapshot, &to.service, to.port.service_port);
        Ok((to.candidates, protocol))
    }
}

/// Brings a request into the form of the endpoint's protocol: the target in origin-form and a `host` for HTTP/1, the
/// whole URI and no `host` for HTTP/2.
pub(super) fn dress(parts: &mut request::Parts, http2: bool, body: &RequestBody) {
    parts.extensions.clear();
    if http2 {
        parts.version = Version::HTTP_2;
        parts.headers.remove(HOST);
        // An endpoint that speaks HTTP/2 may ignore the wish for another protocol.
        parts.headers.remove(UPGRADE);
        parts.headers.remove(CONNECTION);
        return;
    }
    parts.version = Version::HTTP_11;
    parts.headers.remove(TE);
    if !body.is_empty() && body.size_hint().exact().is_none() {
        // Said in so many words: hyper takes a GET without a length for one without a body, and drops what comes.
        parts.headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
    if !parts.headers.contains_key(HOST)
        && let Some(host) =
            parts.uri.authority().and_then(|a| HeaderValue::from_str(a.as_str()).ok())
    {
        parts.headers.insert(HOST, host);
    }
    let path = parts.uri.path_and_query().cloned();
    parts.uri = path.map_or_else(|| Uri::from_static("/"), Uri::from);
}

/// Makes the client's answer of a backend's.
fn finish(
    mut exchange: Exchange,
    plan: &HttpPlan,
    mut response: Response<Incoming>,
    upgrade: &mut Option<OnUpgrade>,
    time: &Time,
) -> Response<ResponseBody> {
    let switched = response.status() == StatusCode::SWITCHING_PROTOCOLS;
    let server = switched.then(|| hyper::upgrade::on(&mut response));
    let (mut parts, incoming) = response.into_parts();
    parts.extensions.clear();
    parts.version = Version::HTTP_11;
    let framed = one_framing(&mut parts.headers);
    if let Err(words) = framed.and_then(|()| strip_hop_by_hop(&mut parts.headers)) {
        let words = format!("the endpoint's answer cannot be passed on: {words}");
        let answer = plan.answer(Refusal::new(Reason::UpstreamBroken, words));
        return own(exchange, answer);
    }
    plan.edit_response(&mut parts);
    exchange.status = Some(parts.status.as_u16());
    if let Some(server) = server {
        let Some(upgrade) = upgrade.take() else {
            let words = "the endpoint switched protocols, which the client did not ask for";
            let answer = plan.answer(Refusal::new(Reason::UpstreamBroken, words));
            return own(exchange, answer);
        };
        upgrade::carry(exchange, upgrade, server);
        return Response::from_parts(parts, ResponseBody::Own(None));
    }
    exchange.trailers(&parts.headers);
    leave(&exchange, &mut parts.headers);
    let messages = exchange.grpc.then(Messages::default);
    let mut body = EndpointBody { incoming, exchange, messages };
    if body.incoming.is_end_stream() {
        body.exchange.complete();
        return Response::from_parts(parts, ResponseBody::Own(None));
    }
    let body = match time.deadline() {
        Some((end, ..)) => ResponseBody::Timed(TimedBody::new(body, end)),
        None => ResponseBody::Endpoint(Box::new(body)),
    };
    Response::from_parts(parts, body)
}

/// An answer of the proxy itself.
fn own(mut exchange: Exchange, answer: Answer) -> Response<ResponseBody> {
    let Answer { status, headers, body, refusal } = answer;
    exchange.status = Some(status.as_u16());
    exchange.trailers(&headers);
    exchange.sent(body.len() as u64);
    exchange.refusal = refusal;
    let mut headers = headers;
    leave(&exchange, &mut headers);
    let unread = exchange.refusal.as_ref().is_some_and(|r| r.reason == Reason::BadHttp)
        || status == StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
    if unread && exchange.version < Version::HTTP_2 {
        // Where the next request begins is anybody's guess.
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    exchange.complete();
    let some = !body.is_empty() && exchange.method != Method::HEAD;
    let body = some.then(|| Bytes::copy_from_slice(body.as_bytes()));
    let mut response = Response::new(ResponseBody::Own(body));
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

/// Tells a client of HTTP/1 that this connection takes no more requests, when the waypoint is about to go.
fn leave(exchange: &Exchange, headers: &mut HeaderMap) {
    if exchange.version < Version::HTTP_2 && exchange.client.call.worker.shared.is_leaving() {
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
}

/// What a request may still take.
struct Time {
    /// Of the whole request, and of the attempt at a backend.
    request: Option<(Instant, Duration)>,
    backend: Option<(Instant, Duration)>,
    backend_limit: Option<Duration>,
}

impl Time {
    fn of(exchange: &Exchange, plan: &HttpPlan) -> Self {
        let at = |limit: Duration| exchange.started.checked_add(limit).map(|at| (at, limit));
        Self {
            request: plan.timeouts.request.and_then(at),
            backend: None,
            backend_limit: plan.timeouts.backend_request,
        }
    }

    fn begin_backend(&mut self) {
        let limit = self.backend_limit;
        self.backend = limit.and_then(|limit| Some((Instant::now().checked_add(limit)?, limit)));
    }

    /// The earlier of the two limits.
    fn deadline(&self) -> Option<(Instant, Duration, &'static str)> {
        let request = self.request.map(|(at, limit)| (at, limit, "request"));
        let backend = self.backend.map(|(at, limit)| (at, limit, "backendRequest"));
        request.into_iter().chain(backend).min_by_key(|(at, ..)| *at)
    }

    async fn within<F: Future>(&self, work: F) -> Result<F::Output, Refusal> {
        let Some((at, limit, name)) = self.deadline() else { return Ok(work.await) };
        tokio::time::timeout_at(at.into(), work).await.map_err(|_| {
            let words = format!("not answered within {limit:?}, the route's timeout ({name})");
            Refusal::new(Reason::RequestTimeout, words)
        })
    }
}
