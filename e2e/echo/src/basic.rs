//! The other application of the conformance suite, for requests from outside: what was asked, as JSON; over gRPC, as a message.
//!
//! The fields' names, the paths with a meaning of their own (`/health`, `/status/CODE`, `/retry/`), the header
//! `X-Echo-Set-Header` and the environment variables are what the suite's tests and manifests use. What it does with TCP and
//! UDP is not here.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use http::{HeaderName, HeaderValue, StatusCode};
use prost::Message;
use serde::Serialize;

use crate::answer::Seen;
use crate::wish;

/// Service and methods of the gRPC side; a third method of the service is not implemented on purpose.
const SERVICE: &str = "/gateway_api_conformance.echo_basic.grpcecho.GrpcEcho/";
const METHODS: [&str; 2] = ["Echo", "EchoTwo"];

/// Different values of `uuid` whose tries are counted; the suite uses some tens. More are refused.
const RETRIES_MAX: usize = 10_000;

/// What TLS agreed on, and who the client is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TlsSeen {
    pub version: &'static str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub peer_certificates: Vec<String>,
    pub server_name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub negotiated_protocol: String,
    pub cipher_suite: String,
}

/// Where the server runs, as it was told.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Context {
    pub namespace: String,
    pub ingress: String,
    pub service: String,
    pub pod: String,
}

#[derive(Serialize)]
struct Page<'a> {
    path: &'a str,
    host: &'a str,
    method: &'a str,
    proto: &'a str,
    headers: BTreeMap<&'a str, Vec<&'a str>>,
    #[serde(rename = "httpPort")]
    http_port: &'a str,
    #[serde(flatten)]
    context: &'a Context,
    #[serde(skip_serializing_if = "Option::is_none")]
    tls: Option<&'a TlsSeen>,
}

/// The application. It remembers how often each retried request was tried.
#[derive(Debug)]
pub struct Basic {
    context: Context,
    http_port: String,
    tries: Mutex<HashMap<String, u32>>,
}

/// What to do with a request.
#[derive(Debug, PartialEq, Eq)]
pub enum Reply {
    /// After the delay, this.
    Answer {
        delay: Duration,
        status: StatusCode,
        headers: Vec<(HeaderName, HeaderValue)>,
        body: String,
    },
    /// After the delay, end the connection without an answer.
    HangUp { delay: Duration },
}

impl Basic {
    #[must_use]
    pub fn new(context: Context, http_port: String) -> Self {
        Self { context, http_port, tries: Mutex::default() }
    }

    #[must_use]
    pub fn reply(&self, seen: &Seen, tls: Option<&TlsSeen>) -> Reply {
        let (path, query) = seen.target.split_once('?').unwrap_or((&seen.target, ""));
        let path = path.replace("//", "/");
        if path == "/health" {
            return short(StatusCode::OK, "OK");
        }
        if let Some(code) = path.strip_prefix("/status/") {
            let three = code.len() == 3;
            let status = StatusCode::from_bytes(code.as_bytes())
                .ok()
                .filter(|code| three && !code.is_informational());
            return short(status.unwrap_or(StatusCode::BAD_REQUEST), "");
        }
        if path.starts_with("/retry/")
            && let Some(failed) = self.fail(query)
        {
            return failed;
        }
        self.echo(seen, query, tls)
    }

    /// The answer to a gRPC call, or nothing for a method that is not there.
    #[must_use]
    pub fn call(&self, seen: &Seen, tls: Option<&TlsSeen>) -> Option<Vec<u8>> {
        let method = seen.target.strip_prefix(SERVICE)?;
        if !METHODS.contains(&method) {
            return None;
        }
        let header = |(key, value): &(String, String)| GrpcHeader {
            key: key.to_ascii_lowercase(),
            value: value.clone(),
        };
        let authority = GrpcHeader { key: ":authority".into(), value: seen.host.clone() };
        let assertions = GrpcAssertions {
            fully_qualified_method: seen.target.clone(),
            headers: seen.headers.iter().map(header).chain([authority]).collect(),
            authority: seen.host.clone(),
            context: Some(GrpcContext {
                namespace: self.context.namespace.clone(),
                ingress: self.context.ingress.clone(),
                service_name: self.context.service.clone(),
                pod: self.context.pod.clone(),
            }),
            tls: tls.map(|tls| GrpcTls {
                version: tls.version.to_owned(),
                negotiated_protocol: tls.negotiated_protocol.clone(),
                server_name: tls.server_name.clone(),
                cipher_suite: tls.cipher_suite.clone(),
                peer_certificates: tls.peer_certificates.clone(),
            }),
        };
        Some(GrpcResponse { assertions: Some(assertions) }.encode_to_vec())
    }

    fn echo(&self, seen: &Seen, query: &str, tls: Option<&TlsSeen>) -> Reply {
        let delay = match parameter(query, "delay").map_or(Ok(Duration::ZERO), wish::delay) {
            Ok(delay) => delay,
            Err(error) => return short(StatusCode::INTERNAL_SERVER_ERROR, &format!("{error:#}")),
        };
        let mut headers: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (name, value) in &seen.headers {
            headers.entry(name).or_default().push(value);
        }
        let page = Page {
            path: &seen.target,
            host: &seen.host,
            method: &seen.method,
            proto: seen.protocol,
            headers,
            http_port: &self.http_port,
            context: &self.context,
            tls,
        };
        let mut answer = wanted_headers(&seen.headers);
        answer.push((http::header::CONTENT_TYPE, HeaderValue::from_static("application/json")));
        answer.push((http::header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")));
        match serde_json::to_string_pretty(&page) {
            Ok(body) => Reply::Answer { delay, status: StatusCode::OK, headers: answer, body },
            Err(error) => short(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
        }
    }

    /// How a request fails that is to succeed only after some tries; nothing when it is to succeed now.
    fn fail(&self, query: &str) -> Option<Reply> {
        let Some(uuid) = parameter(query, "uuid").filter(|uuid| !uuid.is_empty()) else {
            return Some(short(StatusCode::BAD_REQUEST, "uuid is required"));
        };
        let Some(after) =
            parameter(query, "succeedAfter").and_then(|text| text.parse::<u32>().ok())
        else {
            return Some(short(StatusCode::BAD_REQUEST, "succeedAfter is required"));
        };
        let mut tries = self.tries.lock().unwrap_or_else(PoisonError::into_inner);
        if tries.len() >= RETRIES_MAX && !tries.contains_key(uuid) {
            return Some(short(StatusCode::TOO_MANY_REQUESTS, "too many values of uuid"));
        }
        let done = tries.entry(uuid.to_owned()).or_default();
        if *done >= after {
            return None;
        }
        *done += 1;
        let delay = match parameter(query, "delayRetry").map_or(Ok(Duration::ZERO), wish::delay) {
            Ok(delay) => delay,
            Err(error) => {
                return Some(short(StatusCode::INTERNAL_SERVER_ERROR, &format!("{error:#}")));
            }
        };
        let code = parameter(query, "responseCode")
            .and_then(|code| StatusCode::from_bytes(code.as_bytes()).ok());
        Some(match code {
            Some(status) => {
                Reply::Answer { delay, status, headers: Vec::new(), body: String::new() }
            }
            None => Reply::HangUp { delay },
        })
    }
}

fn short(status: StatusCode, body: &str) -> Reply {
    Reply::Answer { delay: Duration::ZERO, status, headers: Vec::new(), body: body.to_owned() }
}

fn parameter<'a>(query: &'a str, name: &str) -> Option<&'a str> {
    query
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .find(|(key, _)| *key == name)
        .map(|(_, value)| value)
}

/// The headers that the request asks the answer to have: `X-Echo-Set-Header: name:value, name:value`. Those that HTTP
/// cannot carry are left out; values of one name are joined.
fn wanted_headers(headers: &[(String, String)]) -> Vec<(HeaderName, HeaderValue)> {
    let mut wanted: Vec<(HeaderName, String)> = Vec::new();
    let asked = headers.iter().filter(|(name, _)| name.eq_ignore_ascii_case("x-echo-set-header"));
    for pair in asked.flat_map(|(_, value)| value.split(',')) {
        let pair = pair.trim();
        let (name, value) = pair.split_once(':').unwrap_or((pair, ""));
        let Ok(name) = name.parse::<HeaderName>() else { continue };
        match wanted.iter_mut().find(|(known, _)| *known == name) {
            Some((_, values)) => *values = format!("{values},{}", value.trim()),
            None => wanted.push((name, value.trim().to_owned())),
        }
    }
    wanted.into_iter().filter_map(|(name, value)| Some((name, value.parse().ok()?))).collect()
}

#[derive(Clone, PartialEq, Eq, Message)]
struct GrpcHeader {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(string, tag = "2")]
    value: String,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct GrpcContext {
    #[prost(string, tag = "1")]
    namespace: String,
    #[prost(string, tag = "2")]
    ingress: String,
    #[prost(string, tag = "3")]
    service_name: String,
    #[prost(string, tag = "4")]
    pod: String,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct GrpcTls {
    #[prost(string, tag = "1")]
    version: String,
    #[prost(string, tag = "2")]
    negotiated_protocol: String,
    #[prost(string, tag = "3")]
    server_name: String,
    #[prost(string, tag = "4")]
    cipher_suite: String,
    #[prost(string, repeated, tag = "5")]
    peer_certificates: Vec<String>,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct GrpcAssertions {
    #[prost(string, tag = "1")]
    fully_qualified_method: String,
    #[prost(message, repeated, tag = "2")]
    headers: Vec<GrpcHeader>,
    #[prost(string, tag = "3")]
    authority: String,
    #[prost(message, optional, tag = "4")]
    context: Option<GrpcContext>,
    #[prost(message, optional, tag = "5")]
    tls: Option<GrpcTls>,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct GrpcResponse {
    #[prost(message, optional, tag = "1")]
    assertions: Option<GrpcAssertions>,
}

#[cfg(test)]
mod tests;
