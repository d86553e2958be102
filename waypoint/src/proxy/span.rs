//! A request as a span, and its place in the trace of who asked: W3C's `traceparent`, or Zipkin's B3 in either form.
//!
//! A request in a trace of its own is linked with the span of the connection it came on: the client's proxy does not look into
//! requests, so that span is in a trace of its own, too.
//!
//! Where tracing is off nothing here changes a request: what a client sent passes as it is. Where it is on the endpoint
//! hears of this proxy's span, in W3C's words and in B3's where the client used them.

use std::time::SystemTime;

use agent::trace::{Position, Span, SpanContext, SpanKind, Value};
use http::{HeaderMap, HeaderName, HeaderValue};

use super::exchange::{Exchange, protocol};

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const B3: HeaderName = HeaderName::from_static("b3");
const B3_TRACE: HeaderName = HeaderName::from_static("x-b3-traceid");
const B3_SPAN: HeaderName = HeaderName::from_static("x-b3-spanid");
const B3_PARENT: HeaderName = HeaderName::from_static("x-b3-parentspanid");
const B3_SAMPLED: HeaderName = HeaderName::from_static("x-b3-sampled");
const B3_FLAGS: HeaderName = HeaderName::from_static("x-b3-flags");

/// The span that a request comes from, as its headers say.
pub(super) fn parent(headers: &HeaderMap) -> Option<SpanContext> {
    let get = |name: &HeaderName| headers.get(name).map(HeaderValue::as_bytes);
    if let Some(context) = get(&TRACEPARENT).and_then(SpanContext::parse) {
        return Some(context);
    }
    if let Some(context) = get(&B3).and_then(SpanContext::parse_b3) {
        return Some(context);
    }
    // "Debug" means sampled.
    let sampled = match (get(&B3_FLAGS), get(&B3_SAMPLED)) {
        (Some(b"1"), _) | (_, Some(b"1" | b"true")) => b"1",
        _ => b"0",
    };
    let single = [get(&B3_TRACE)?, get(&B3_SPAN)?, sampled].join(&b'-');
    SpanContext::parse_b3(&single)
}

/// Tells the endpoint of this proxy's span.
pub(super) fn tell(headers: &mut HeaderMap, context: &SpanContext) {
    let set = |headers: &mut HeaderMap, name, text: String| {
        if let Ok(value) = HeaderValue::try_from(text) {
            headers.insert(name, value);
        }
    };
    set(headers, TRACEPARENT, context.to_string());
    let (trace, span) = (hex(&context.trace_id), hex(&context.span_id));
    let sampled = if context.sampled { "1" } else { "0" };
    if headers.contains_key(B3) {
        set(headers, B3, format!("{trace}-{span}-{sampled}"));
    }
    if headers.contains_key(B3_TRACE) {
        // The parent is not ours to know; a span id without it is a span of its own.
        headers.remove(B3_PARENT);
        headers.remove(B3_FLAGS);
        set(headers, B3_TRACE, trace);
        set(headers, B3_SPAN, span);
        set(headers, B3_SAMPLED, sampled.to_owned());
    }
}

/// The span of a request that is over.
pub(super) fn of(exchange: &Exchange, position: &Position) -> Span {
    let end = SystemTime::now();
    Span {
        name: "request",
        kind: SpanKind::Server,
        context: position.context,
        parent: position.parent,
        link: exchange.client.call.trace.filter(|t| t.trace_id != position.context.trace_id),
        start: end.checked_sub(exchange.started.elapsed()).unwrap_or(end),
        end,
        attributes: attributes(exchange),
        error: exchange.refusal.as_ref().map(|refusal| refusal.message.clone()),
    }
}

fn attributes(exchange: &Exchange) -> Vec<(&'static str, Value)> {
    let mut all = Attributes(Vec::with_capacity(32));
    let call = &exchange.client.call;
    all.text("http.request.method", exchange.method.as_str());
    all.text("url.path", exchange.uri.path());
    let host = exchange.host.as_ref().and_then(|host| host.to_str().ok()).unwrap_or_default();
    let authority = exchange.uri.authority().map_or(host, |authority| authority.as_str());
    all.text("server.address", authority);
    all.text("network.protocol.version", &protocol(exchange.version)["HTTP/".len()..]);
    if let Some(status) = exchange.status {
        all.number("http.response.status_code", status.into());
    }
    if let Some(id) = exchange.request_id.as_ref().and_then(|id| id.to_str().ok()) {
        all.text("guid:x-request-id", id);
    }
    all.text("source.address", &call.source.ip().to_string());
    all.text("istio.reporter", "waypoint");
    all.text("istio.source_principal", &call.client.to_string());
    if let Some(admission) = &exchange.admission {
        if let Some(client) = &admission.client {
            all.text("istio.source_workload", &client.workload_name);
            all.text("istio.source_workload_namespace", &client.namespace);
        }
        if let Some(service) = admission.service() {
            all.text("istio.destination_service", &service.key.hostname);
            all.text("istio.destination_service_namespace", &service.key.namespace);
        }
    }
    if let Some(endpoint) = &exchange.endpoint {
        all.text("istio.destination_workload", &endpoint.workload.workload_name);
        all.text("istio.destination_workload_namespace", &endpoint.workload.namespace);
        all.text("network.peer.address", &endpoint.target.ip().to_string());
        all.number("network.peer.port", endpoint.target.port().into());
    }
    if let Some(rule) = &exchange.rule {
        all.text("ambit.route", &rule.route);
        all.text("ambit.rule", &rule.provenance.to_string());
    }
    all.number("ambit.client.bytes", exchange.received().0);
    all.number("ambit.server.bytes", exchange.answered());
    if let Some(refusal) = &exchange.refusal {
        all.text("error.type", refusal.reason.code());
    }
    all.text("ambit.config", &exchange.config.to_string());
    all.0
}

struct Attributes(Vec<(&'static str, Value)>);

impl Attributes {
    fn text(&mut self, name: &'static str, value: &str) {
        if !value.is_empty() {
            self.0.push((name, Value::Text(value.to_owned())));
        }
    }

    fn number(&mut self, name: &'static str, value: u64) {
        self.0.push((name, Value::Number(i64::try_from(value).unwrap_or(i64::MAX))));
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    const SPAN: &str = "00f067aa0ba902b7";

    #[test]
    fn parents_in_every_form() {
        let check = |headers: &[(&'static str, String)], want: Option<bool>| {
            let map = headers.iter().map(|(name, value)| {
                (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())
            });
            let found = parent(&map.collect());
            assert_eq!(found.map(|context| context.sampled), want, "{headers:?}");
        };
        check(&[("traceparent", format!("00-{TRACE}-{SPAN}-01"))], Some(true));
        check(&[("traceparent", format!("00-{TRACE}-{SPAN}-00"))], Some(false));
        check(&[("b3", format!("{TRACE}-{SPAN}-1"))], Some(true));
        check(&[("b3", format!("{TRACE}-{SPAN}-d-{SPAN}"))], Some(true));
        check(&[("b3", format!("{TRACE}-{SPAN}"))], Some(false));
        check(&[("b3", format!("{}-{SPAN}-1", &TRACE[16..]))], Some(true));
        check(&[("b3", "0".to_owned())], None);
        check(&[("b3", "nonsense".to_owned())], None);
        let multi = |sampled: &str| {
            [
                ("x-b3-traceid", TRACE.to_owned()),
                ("x-b3-spanid", SPAN.to_owned()),
                ("x-b3-sampled", sampled.to_owned()),
            ]
        };
        check(&multi("1"), Some(true));
        check(&multi("0"), Some(false));
        check(&multi("1")[..1], None);
        check(&[], None);
    }

    #[test]
    fn an_endpoint_is_told_in_the_clients_words() {
        let context = SpanContext::new([1; 16], [2; 8], true).unwrap();
        let mut headers = HeaderMap::new();
        tell(&mut headers, &context);
        assert_eq!(headers.len(), 1);
        assert_eq!(parent(&headers), Some(context));
        headers.insert(B3, HeaderValue::from_static("0"));
        headers.insert(B3_TRACE, HeaderValue::from_static("0"));
        headers.insert(B3_PARENT, HeaderValue::from_static("0"));
        tell(&mut headers, &context);
        headers.remove(TRACEPARENT);
        assert_eq!(parent(&headers), Some(context));
        headers.remove(B3);
        assert_eq!(parent(&headers), Some(context));
        assert!(!headers.contains_key(B3_PARENT));
    }
}
