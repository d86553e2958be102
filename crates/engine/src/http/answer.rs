//! The words of the proxy itself: which status a refusal has, in HTTP's numbers and in gRPC's.
//!
//! | reasons | HTTP | gRPC |
//! |---|---|---|
//! | `no_route` | 404 | 12 UNIMPLEMENTED |
//! | `bad_backend` | 500 | 14 UNAVAILABLE |
//! | `bad_filter` | 500 | 13 INTERNAL |
//! | policies, `mtls_required`, `mesh_port`, `not_bound` | 403 | 7 PERMISSION_DENIED |
//! | `bad_http`, `bad_request` | 400 | 13 INTERNAL |
//! | `request_timeout` | 504 | 4 DEADLINE_EXCEEDED |
//! | `limit` | 503 (431 for a request that is too large) | 8 RESOURCE_EXHAUSTED |
//! | every other: nobody could be asked | 503 | 14 UNAVAILABLE |
//!
//! Invariants: every refusal carries its code in `x-ambit-reason`; the body says what the code means and no more:
//! names of policies, routes and backends are for the log, not for whoever asks.

use http::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use http::{HeaderMap, StatusCode};
use model::{Reason, Refusal};

use super::{Answer, HttpPlan};

const REASON: HeaderName = HeaderName::from_static("x-ambit-reason");
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// The answer to a request that is refused.
pub fn answer(refusal: Refusal, grpc: bool) -> Answer {
    let (status, code) = (http_status(refusal.reason), grpc_status(refusal.reason));
    if grpc { in_grpc(refusal, code) } else { answer_with(refusal, status) }
}

/// The same with another HTTP status than the reason's own.
pub fn answer_with(refusal: Refusal, status: StatusCode) -> Answer {
    let mut headers = HeaderMap::with_capacity(2);
    headers.insert(REASON, HeaderValue::from_static(refusal.reason.code()));
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    let body = format!("{}: {}\n", refusal.reason, refusal.reason.meaning());
    Answer { status, headers, body: body.into(), refusal: Some(refusal) }
}

impl HttpPlan {
    /// The answer when the plan cannot be carried out: in gRPC's words where the client expects them, with the CORS headers
    /// of the route.
    pub fn answer(&self, refusal: Refusal) -> Answer {
        let mut answer = answer(refusal, self.grpc);
        self.add_cors(&mut answer.headers);
        answer
    }
}

/// Whether a message is gRPC's own, so that its errors are read from `grpc-status`. Not `application/grpc-web`.
pub fn is_grpc(headers: &HeaderMap) -> bool {
    headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.as_bytes().strip_prefix(b"application/grpc"))
        .is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}

/// The HTTP status of a refusal.
pub fn http_status(reason: Reason) -> StatusCode {
    match reason {
        Reason::NoRoute => StatusCode::NOT_FOUND,
        Reason::BadBackend | Reason::BadFilter => StatusCode::INTERNAL_SERVER_ERROR,
        Reason::PolicyDeny
        | Reason::PolicyNoAllow
        | Reason::PolicyMissing
        | Reason::PolicyChanged
        | Reason::MtlsRequired
        | Reason::MeshPort
        | Reason::NotBound => StatusCode::FORBIDDEN,
        Reason::BadHttp | Reason::BadRequest => StatusCode::BAD_REQUEST,
        Reason::RequestTimeout => StatusCode::GATEWAY_TIMEOUT,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    }
}

/// The gRPC status code of a refusal.
pub fn grpc_status(reason: Reason) -> u32 {
    match reason {
        Reason::NoRoute => 12,
        Reason::BadFilter | Reason::BadHttp | Reason::BadRequest => 13,
        Reason::PolicyDeny
        | Reason::PolicyNoAllow
        | Reason::PolicyMissing
        | Reason::PolicyChanged
        | Reason::MtlsRequired
        | Reason::MeshPort
        | Reason::NotBound => 7,
        Reason::RequestTimeout => 4,
        Reason::Limit => 8,
        _ => 14,
    }
}

/// A gRPC answer without messages: headers that are trailers (gRPC's `Trailers-Only`).
pub(super) fn in_grpc(refusal: Refusal, code: u32) -> Answer {
    let mut headers = HeaderMap::with_capacity(4);
    headers.insert(REASON, HeaderValue::from_static(refusal.reason.code()));
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(GRPC_STATUS, HeaderValue::from(code));
    // gRPC wants what is not printable ASCII escaped; codes and meanings are.
    let message = format!("{}: {}", refusal.reason, refusal.reason.meaning());
    if let Ok(message) = HeaderValue::from_str(&message.replace('%', "%25")) {
        headers.insert(GRPC_MESSAGE, message);
    }
    Answer { status: StatusCode::OK, headers, body: "".into(), refusal: Some(refusal) }
}

/// The HTTP status that says what a gRPC code says, for clients that do not speak gRPC.
pub(super) fn http_of_grpc(code: u32) -> StatusCode {
    match code {
        0 => StatusCode::OK,
        3 | 9 | 11 => StatusCode::BAD_REQUEST,
        4 => StatusCode::GATEWAY_TIMEOUT,
        5 => StatusCode::NOT_FOUND,
        6 | 10 => StatusCode::CONFLICT,
        7 => StatusCode::FORBIDDEN,
        8 => StatusCode::TOO_MANY_REQUESTS,
        12 => StatusCode::NOT_IMPLEMENTED,
        14 => StatusCode::SERVICE_UNAVAILABLE,
        16 => StatusCode::UNAUTHORIZED,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words() {
        let refusal = || Refusal::new(Reason::NoRoute, "no rule of shop/secret fits");
        let plain = answer(refusal(), false);
        assert_eq!(plain.status, 404);
        assert_eq!(plain.headers["x-ambit-reason"], "no_route");
        assert_eq!(
            &*plain.body,
            "no_route: The Service has routes and none of their matches fits the request.\n"
        );
        let grpc = answer(refusal(), true);
        assert_eq!((grpc.status, &*grpc.body), (StatusCode::OK, ""));
        assert_eq!(grpc.headers["grpc-status"], "12");
        assert_eq!(grpc.headers["content-type"], "application/grpc");
        let shown = format!("{:?} {:?} {}", plain.headers, grpc.headers, plain.body);
        assert!(!shown.contains("secret"), "{shown}");
    }

    #[test]
    fn every_reason_is_an_error() {
        for reason in Reason::ALL {
            let refusal = Refusal::new(*reason, "x");
            let plain = answer(refusal.clone(), false);
            assert!(plain.status.is_client_error() || plain.status.is_server_error(), "{reason}");
            let grpc = answer(refusal, true);
            assert_ne!(grpc.headers["grpc-status"], "0", "{reason}");
            let message = grpc.headers["grpc-message"].to_str().unwrap();
            assert!(message.starts_with(reason.code()), "{message}");
        }
    }

    #[test]
    fn who_speaks_grpc() {
        let check = |value: Option<&'static str>, want| {
            let headers = value.map(|v| (CONTENT_TYPE, HeaderValue::from_static(v)));
            assert_eq!(is_grpc(&headers.into_iter().collect()), want, "{value:?}");
        };
        check(None, false);
        check(Some("application/grpc"), true);
        check(Some("application/grpc+proto"), true);
        check(Some("application/grpc;charset=utf-8"), true);
        check(Some("application/grpc-web"), false);
        check(Some("text/plain"), false);
    }
}
