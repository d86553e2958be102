//! What happens to an HTTP request at a waypoint: which rule, which answer or which backend, how it is changed.
//!
//! The waypoint asks in this order: [`normalize`] (once, before anything looks at the request), [`route`], then for each attempt
//! [`destination`]; [`HttpPlan::edit_request`] and [`HttpPlan::edit_response`] change what is sent. What goes wrong on the way
//! is worded by [`HttpPlan::answer`], or by [`answer`] where there is no plan yet.
//!
//! Answers of the proxy itself (redirects, fixed responses, preflights, refusals) carry the CORS headers of the route, so
//! that a page may read why it was refused; the route's response header edits are for what a backend answered, and for what
//! the route itself answers (redirects, fixed responses), not for refusals and preflights.
//!
//! Invariants: the parent Service comes from the destination address of the connection, never from the Host header; a
//! Service with routes has no way around them; what cannot be resolved answers with an error and its reason;
//! the same input gives the same plan.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, StatusCode, request};
use model::http::{RouteRule, Target, Timeouts};
use model::{Identity, Refusal, Service, ServicePort, Str};

use crate::Candidate;
use edit::{Edit, HeaderEdit};

mod answer;
mod cors;
mod destination;
mod edit;
mod fault;
mod matching;
mod normalize;
mod path;
mod redirect;
mod route;

pub use answer::{answer, answer_with, grpc_status, http_status, is_grpc};
pub use destination::{backend_protocol, destination};
pub use normalize::{
    MAX_HEAD, MAX_HEADERS, normalize, one_framing, strip_hop_by_hop, strip_trailers,
};
pub use path::normal_path;
pub use route::{route, to_pod};

/// What is known of a request.
#[derive(Clone, Debug)]
pub struct RequestFacts<'a> {
    /// The Service that was called, by the destination address of the connection.
    pub service: &'a Service,
    /// The Service's own port.
    pub port: u16,
    pub caller: Caller<'a>,
    /// After [`normalize`].
    pub request: &'a request::Parts,
    /// Seconds since 1970.
    pub now: u64,
}

/// Who asks, from the verified certificate of the connection. `None`: somebody outside the mesh.
#[derive(Clone, Copy, Debug, Default)]
pub struct Caller<'a> {
    pub identity: Option<&'a Identity>,
}

/// What to do with a request.
#[derive(Clone, Debug)]
pub struct HttpPlan {
    /// The rule that decided; `None` when the Service has no routes, or none that fits.
    pub rule: Option<Arc<RouteRule>>,
    /// Wait this long first: a fault.
    pub delay: Option<Duration>,
    pub action: HttpAction,
    /// Copies to send, each changed by [`Self::edit_mirror`]; their answers are dropped. Only where the request is forwarded.
    pub mirrors: Vec<Target>,
    pub timeouts: Timeouts,
    /// The client expects refusals in gRPC's words.
    pub grpc: bool,
    /// Of the request, in order.
    pub(crate) edits: Vec<Edit>,
    /// How many of `edits` stand before each mirror.
    pub(crate) mirror_edits: Vec<usize>,
    /// Of the response, in order.
    pub(crate) response_edits: Vec<HeaderEdit>,
    /// CORS headers of the response, worked out from the request.
    pub(crate) cors: HeaderMap,
}

#[derive(Clone, Debug)]
pub enum HttpAction {
    Forward {
        target: Target,
        /// The backend has to be spoken to in HTTP/2, whatever its port declares: the route or the request is gRPC.
        http2: bool,
    },
    Answer(Answer),
    /// Reset the connection (HTTP/1) or the stream: a fault.
    Reset(Refusal),
}

/// An answer of the proxy itself.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: StatusCode,
    /// `location`, CORS, `grpc-status` and so on.
    pub headers: HeaderMap,
    pub body: Str,
    /// `None`: this is what the route asked for (a redirect, a fixed response, a preflight).
    pub refusal: Option<Refusal>,
}

/// Where a backend's request may go.
#[derive(Clone, Debug)]
pub struct Destination {
    pub service: Arc<Service>,
    pub port: ServicePort,
    /// To be tried in order; never empty.
    pub candidates: Vec<Candidate>,
}

#[cfg(test)]
mod tests;
