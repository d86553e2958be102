//! Pages for operators: readiness (15021), metrics (15020) and, on localhost only, admin (15000).
//!
//! They run on the admin runtime, away from the data threads. A dump of the configuration is written
//! piece by piece, so that a mesh of 100,000 workloads is never in memory twice.
//!
//! Invariants: one request a connection, with limits on its size, its time and the number of
//! connections; nothing that changes state answers to GET; no private key is ever shown.

use std::convert::Infallible;
use std::fmt::{self, Write as _};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ALLOW, CONTENT_TYPE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use model::Snapshot;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::logging::LogControl;
use crate::metrics::Metrics;
use crate::readiness::Readiness;

mod certificates;
mod dump;

pub use certificates::certificates;
pub use dump::{Certificate, CertificateInfo};

/// Connections at once to one of the three servers: a few Prometheus servers, probes and people.
const MAX_CONNECTIONS: usize = 32;
/// Request line and headers; curl and Prometheus need a tenth.
const MAX_HEAD: usize = 16 << 10;
/// From accept to the end of the headers.
const HEAD_TIME: Duration = Duration::from_secs(5);
/// From accept to the end of the answer: enough for a large dump over a slow link.
const TOTAL_TIME: Duration = Duration::from_secs(60);
/// After an accept failed, mostly for want of file descriptors: do not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Where the pages get what they show. Closures, so that this module knows neither proxy.
pub struct AdminState {
    /// Name and version of the program, for the index.
    pub program: String,
    pub readiness: Readiness,
    pub metrics: Metrics,
    pub log: LogControl,
    /// The configuration in force.
    pub snapshot: Box<dyn Fn() -> Arc<Snapshot> + Send + Sync>,
    pub certificates: Box<dyn Fn() -> Vec<CertificateInfo> + Send + Sync>,
    /// Live connections, as JSON.
    pub connections: Box<dyn Fn() -> serde_json::Value + Send + Sync>,
    /// The settings the program started with, without secrets.
    pub settings: serde_json::Value,
    /// Starts an orderly shutdown.
    pub quit: Box<dyn Fn() + Send + Sync>,
}

impl fmt::Debug for AdminState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdminState").field("program", &self.program).finish_non_exhaustive()
    }
}

/// What a server answers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Page {
    /// `/healthz/ready`
    Readiness,
    /// `/metrics`, `/stats/prometheus`
    Metrics,
    /// `/`, `/config_dump`, `/connections`, `/logging`, `/quitquitquit`
    Admin,
}

impl Page {
    const fn purpose(self) -> &'static str {
        match self {
            Self::Readiness => "readiness",
            Self::Metrics => "metrics",
            Self::Admin => "the admin page",
        }
    }
}

/// Listens for a page.
///
/// # Errors
/// When the address is taken or not ours; the message names it and what it was for. For the admin page,
/// also when the address is not loopback: it can change the program.
pub async fn bind(page: Page, address: SocketAddr) -> io::Result<TcpListener> {
    let wrong = |e: io::Error| {
        io::Error::new(e.kind(), format!("cannot listen on {address} for {}: {e}", page.purpose()))
    };
    if page == Page::Admin && !address.ip().is_loopback() {
        let message = "it can change this program and must be a loopback address";
        return Err(wrong(io::Error::new(io::ErrorKind::InvalidInput, message)));
    }
    match TcpListener::bind(address).await {
        // No IPv6 on this machine: "any address" is then any IPv4 address.
        Err(_) if address.is_ipv6() && address.ip().is_unspecified() && !has_ipv6().await => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        bound => bound,
    }
    .map_err(wrong)
}

async fn has_ipv6() -> bool {
    TcpListener::bind(("::1", 0)).await.is_ok()
}

/// Serves a page until the future is dropped.
pub async fn serve(listener: TcpListener, page: Page, state: Arc<AdminState>) -> Infallible {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let socket = match listener.accept().await {
            Ok((socket, _)) => socket,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection for {}", page.purpose());
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // Full: the newcomer is closed at once, which a client sees; a queue would only hide it.
        let Ok(place) = places.clone().try_acquire_owned() else { continue };
        let state = state.clone();
        tokio::spawn(async move {
            // An error here is the client's: it went away, was too slow, or spoke no HTTP.
            let _ = tokio::time::timeout(TOTAL_TIME, connection(socket, page, state)).await;
            drop(place);
        });
    }
}

async fn connection(socket: TcpStream, page: Page, state: Arc<AdminState>) -> hyper::Result<()> {
    let answer = |request: Request<Incoming>| {
        let response = answer(page, &request, &state);
        async { Ok::<_, Infallible>(response) }
    };
    http1::Builder::new()
        .keep_alive(false)
        .max_buf_size(MAX_HEAD)
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .serve_connection(TokioIo::new(socket), service_fn(answer))
        .await
}

type Answer = Response<UnsyncBoxBody<Bytes, Infallible>>;

fn answer<B>(page: Page, request: &Request<B>, state: &Arc<AdminState>) -> Answer {
    let reading = matches!(*request.method(), Method::GET | Method::HEAD);
    let path = request.uri().path();
    match (page, path) {
        (Page::Readiness, "/healthz/ready") if reading => ready(&state.readiness),
        (Page::Metrics, "/metrics" | "/stats/prometheus") if reading => {
            let (text, content_type) = state.metrics.render();
            reply(StatusCode::OK, content_type, text)
        }
        (Page::Admin, "/") if reading => index(state),
        (Page::Admin, "/config_dump") if reading => dump::config_dump(request.uri().query(), state),
        (Page::Admin, "/connections") if reading => json(&(state.connections)()),
        (Page::Admin, "/logging") if reading => plain(StatusCode::OK, state.log.current()),
        (Page::Admin, "/logging") if request.method() == Method::POST => {
            set_log(request.uri().query(), &state.log)
        }
        (Page::Admin, "/quitquitquit") if request.method() == Method::POST => {
            tracing::info!("shutting down: asked to on the admin page");
            (state.quit)();
            plain(StatusCode::OK, "shutting down")
        }
        (Page::Readiness, "/healthz/ready") | (Page::Metrics, "/metrics" | "/stats/prometheus") => {
            wrong_method("GET")
        }
        (Page::Admin, "/" | "/config_dump" | "/connections") => wrong_method("GET"),
        (Page::Admin, "/logging") => wrong_method("GET, POST"),
        (Page::Admin, "/quitquitquit") => wrong_method("POST"),
        _ => plain(StatusCode::NOT_FOUND, format!("no page {path:.200}")),
    }
}

fn ready(readiness: &Readiness) -> Answer {
    let pending = readiness.pending();
    if pending.is_empty() {
        plain(StatusCode::OK, "ready")
    } else {
        plain(
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("not ready: waiting for {}", pending.join(", ")),
        )
    }
}

fn index(state: &AdminState) -> Answer {
    let snapshot = (state.snapshot)();
    let pages = [
        (
            "GET  /config_dump",
            "configuration, certificates and settings as JSON; ?namespace=NS, ?only=workloads|services|policies|routes|subsets|certificates",
        ),
        ("GET  /connections", "live connections as JSON"),
        ("GET  /logging", "the log filter in force"),
        (
            "POST /logging?level=FILTER",
            "another one, for example info,hbone=debug; ?reset: back to the first",
        ),
        ("POST /quitquitquit", "orderly shutdown"),
    ];
    let mut text = format!("{}\nconfiguration {}\n\n", state.program, snapshot.version());
    for (page, what) in pages {
        // A String takes whatever is written to it.
        let _: fmt::Result = writeln!(text, "{page:<28} {what}");
    }
    plain(StatusCode::OK, text)
}

fn set_log(query: Option<&str>, log: &LogControl) -> Answer {
    let done = match parameter(query, "level") {
        Some(level) => log.set(&level),
        None if parameter(query, "reset").is_some() => log.reset(),
        None => return plain(StatusCode::BAD_REQUEST, "say ?level=FILTER or ?reset"),
    };
    match done {
        Ok(()) => plain(StatusCode::OK, log.current()),
        Err(error) => plain(StatusCode::BAD_REQUEST, error.to_string()),
    }
}

/// The value of a query parameter, with `%xx` and `+` decoded; empty when it has none.
fn parameter(query: Option<&str>, name: &str) -> Option<String> {
    let value = query?.split('&').find_map(|pair| match pair.split_once('=') {
        Some((key, value)) => (key == name).then_some(value),
        None => (pair == name).then_some(""),
    })?;
    let mut bytes = Vec::with_capacity(value.len());
    let mut rest = value.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let mut digit = || char::from(rest.next()?).to_digit(16);
                let (high, low) = (digit()?, digit()?);
                u8::try_from(high * 16 + low).ok()?
            }
            other => other,
        });
    }
    String::from_utf8(bytes).ok()
}

fn wrong_method(allowed: &'static str) -> Answer {
    let mut answer = plain(StatusCode::METHOD_NOT_ALLOWED, format!("use {allowed}"));
    answer.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
    answer
}

fn plain(status: StatusCode, text: impl Into<String>) -> Answer {
    let mut text = text.into();
    if !text.ends_with('\n') {
        text.push('\n');
    }
    reply(status, "text/plain; charset=utf-8", text)
}

fn json(value: &serde_json::Value) -> Answer {
    reply(StatusCode::OK, "application/json", format!("{value:#}\n"))
}

fn reply(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()).boxed_unsync());
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    answer
}

#[cfg(test)]
mod tests;
