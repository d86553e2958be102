//! The server: HTTP/1.1, HTTP/2 with and without TLS, gRPC and lines over TCP.
//!
//! Each connection is a task. A signal to end stops the listeners; what is being answered may end (`Server::drain`).

use std::convert::Infallible;
use std::fmt::Write as _;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, Uri, header};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use rustls::ServerConfig;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;

use crate::answer::{self, Me, Seen, header_name};
use crate::basic::{Basic, Reply, TlsSeen};
use crate::{grpc, tls, wish};

/// Connections at once. Load tests open thousands; a pod's descriptors must not run out.
const CONNECTIONS_MAX: usize = 8192;
/// Longest line of a TCP client; it is repeated to it.
const LINE_MAX: u64 = 64 * 1024;
/// A TCP client that says nothing, and a TLS client that does not finish its handshake, are left.
const PATIENCE: Duration = Duration::from_secs(10);
/// Answers under way at the end get this long: Kubernetes kills after 30 s, and deletes a namespace no sooner.
const DRAIN_MAX: Duration = Duration::from_secs(5);

type Answer = Response<BoxBody<Bytes, Infallible>>;

/// How a server answers.
#[derive(Debug)]
pub enum App {
    /// Lines of `Name=value`.
    Lines(Me),
    /// JSON.
    Basic(Basic),
}

/// What all connections share.
#[derive(Debug)]
pub struct Server {
    app: App,
    busy: AtomicUsize,
    slots: Arc<Semaphore>,
}

/// Where a connection came from and what TLS agreed on.
#[derive(Debug, Clone)]
struct Origin {
    peer: IpAddr,
    port: u16,
    tls: Option<Arc<TlsSeen>>,
    /// HTTP/1.1 is refused.
    only_h2: bool,
}

/// How a port is served.
#[derive(Debug, Clone, Default)]
pub struct Port {
    pub tls: Option<Arc<ServerConfig>>,
    pub only_h2: bool,
}

impl Server {
    #[must_use]
    pub fn new(app: App) -> Arc<Self> {
        let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        Arc::new(Self { app, busy: AtomicUsize::new(0), slots })
    }

    /// Serves HTTP and gRPC for ever.
    pub async fn http(self: Arc<Self>, listener: TcpListener, how: Port) -> Result<()> {
        let port = listener.local_addr()?.port();
        let acceptor = how.tls.map(TlsAcceptor::from);
        loop {
            let (stream, peer, slot) = self.accept(&listener).await?;
            let (server, acceptor) = (Arc::clone(&self), acceptor.clone());
            let mut origin =
                Origin { peer: peer.ip().to_canonical(), port, tls: None, only_h2: how.only_h2 };
            tokio::spawn(async move {
                let _slot = slot;
                let Some(acceptor) = acceptor else {
                    return server.connection(stream, origin).await;
                };
                let Ok(Ok(stream)) = timeout(PATIENCE, acceptor.accept(stream)).await else {
                    return;
                };
                origin.tls = Some(Arc::new(tls::seen(stream.get_ref().1)));
                server.connection(stream, origin).await;
            });
        }
    }

    /// Answers one line of each client with the fields and the line, and hangs up.
    pub async fn lines(self: Arc<Self>, listener: TcpListener) -> Result<()> {
        let port = listener.local_addr()?.port();
        loop {
            let (stream, peer, slot) = self.accept(&listener).await?;
            let server = Arc::clone(&self);
            tokio::spawn(async move {
                let _slot = slot;
                server.busy.fetch_add(1, Ordering::Relaxed);
                // The client sees a connection that ends: there is nobody else to tell.
                let _ = timeout(PATIENCE, server.line(stream, peer, port)).await;
                server.busy.fetch_sub(1, Ordering::Relaxed);
            });
        }
    }

    /// Returns when nothing is being answered, or after a while.
    pub async fn drain(&self) {
        let _ = timeout(DRAIN_MAX, async {
            while self.busy.load(Ordering::Relaxed) > 0 {
                sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
    }

    async fn accept(
        &self,
        listener: &TcpListener,
    ) -> Result<(TcpStream, SocketAddr, tokio::sync::OwnedSemaphorePermit)> {
        let slot = Arc::clone(&self.slots).acquire_owned().await.context("the server ends")?;
        loop {
            match listener.accept().await {
                Ok((stream, peer)) => {
                    let _ = stream.set_nodelay(true);
                    return Ok((stream, peer, slot));
                }
                // Out of descriptors, or the client is gone again: both pass.
                Err(_) => sleep(Duration::from_millis(50)).await,
            }
        }
    }

    async fn connection(
        self: Arc<Self>,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        origin: Origin,
    ) {
        let service = service_fn(move |request| {
            let (server, origin) = (Arc::clone(&self), origin.clone());
            async move {
                server.busy.fetch_add(1, Ordering::Relaxed);
                let answer = server.answer(request, &origin).await;
                server.busy.fetch_sub(1, Ordering::Relaxed);
                // An error makes the connection end without an answer.
                answer.ok_or_else(|| io::Error::from(io::ErrorKind::ConnectionReset))
            }
        });
        // An error is the client's: it left, or it did not speak HTTP.
        let _ = auto::Builder::new(TokioExecutor::new())
            .serve_connection(TokioIo::new(stream), service)
            .await;
    }

    /// Nothing means to hang up.
    async fn answer(&self, request: Request<Incoming>, origin: &Origin) -> Option<Answer> {
        let mut seen = seen(&request, origin);
        let kind = request
            .headers()
            .get(header::CONTENT_TYPE)
            .map(HeaderValue::as_bytes)
            .unwrap_or_default();
        if kind.starts_with(grpc::CONTENT_TYPE.as_bytes()) {
            seen.protocol = "GRPC";
            return Some(self.call(request, &seen, origin).await);
        }
        if origin.only_h2 && request.version() != http::Version::HTTP_2 {
            return Some(plain(
                StatusCode::BAD_REQUEST,
                "this port speaks only HTTP/2\n".to_owned(),
            ));
        }
        match &self.app {
            App::Lines(me) => Some(lines_answer(me, &seen, request.uri()).await),
            App::Basic(basic) => match basic.reply(&seen, origin.tls.as_deref()) {
                Reply::HangUp { delay } => {
                    sleep(delay).await;
                    None
                }
                Reply::Answer { delay, status, headers, body } => {
                    sleep(delay).await;
                    let mut answer = plain(status, body);
                    answer.headers_mut().extend(headers);
                    Some(answer)
                }
            },
        }
    }

    async fn call(&self, request: Request<Incoming>, seen: &Seen, origin: &Origin) -> Answer {
        let path = request.uri().path().to_owned();
        let body = Limited::new(request.into_body(), grpc::MESSAGE_LIMIT).collect().await;
        let Ok(body) = body.map(|body| body.to_bytes()) else {
            return trailers_only(grpc::INVALID_ARGUMENT, "the message is not readable");
        };
        let framed = match &self.app {
            App::Basic(basic) => {
                let Some(message) = basic.call(seen, origin.tls.as_deref()) else {
                    return trailers_only(grpc::UNIMPLEMENTED, "there is no such method");
                };
                grpc::frame_bytes(&message)
            }
            App::Lines(_) if path != grpc::METHOD => {
                return trailers_only(grpc::UNIMPLEMENTED, "there is no such method");
            }
            App::Lines(me) => {
                let Ok(message) = grpc::unframe(&body) else {
                    return trailers_only(grpc::INVALID_ARGUMENT, "the message is not readable");
                };
                grpc::frame(&with_echo(answer::body(me, seen, 200), &message))
            }
        };
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from(grpc::OK));
        let body = Full::new(framed).with_trailers(async move { Some(Ok(trailers)) });
        let mut answer = Response::new(body.boxed());
        answer
            .headers_mut()
            .insert(header::CONTENT_TYPE, HeaderValue::from_static(grpc::CONTENT_TYPE));
        answer
    }

    async fn line(&self, mut stream: TcpStream, peer: SocketAddr, port: u16) -> Result<()> {
        let here = stream.local_addr()?;
        let host = SocketAddr::new(here.ip().to_canonical(), here.port()).to_string();
        let (read, mut write) = stream.split();
        let mut line = String::new();
        BufReader::new(read.take(LINE_MAX)).read_line(&mut line).await?;
        let seen = Seen {
            host,
            protocol: "TCP",
            peer: Some(peer.ip().to_canonical()),
            port,
            ..Seen::default()
        };
        let App::Lines(me) = &self.app else { return Ok(()) };
        let text = with_echo(answer::body(me, &seen, 200), line.trim_end());
        write.write_all(text.as_bytes()).await?;
        write.shutdown().await?;
        Ok(())
    }
}

async fn lines_answer(me: &Me, seen: &Seen, uri: &Uri) -> Answer {
    let wish = match wish::read(uri.query().unwrap_or_default()) {
        Ok(wish) => wish,
        Err(error) => return plain(StatusCode::BAD_REQUEST, format!("{error:#}\n")),
    };
    sleep(wish.delay).await;
    let status = wish.status(fastrand::u64(0..wish.total().max(1)));
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::OK);
    plain(status, answer::body(me, seen, status.as_u16()))
}

/// The client's own words, as a last line.
fn with_echo(mut text: String, message: &str) -> String {
    // Writing into a String cannot fail.
    let _ = writeln!(text, "Echo={}", message.replace(char::is_control, " "));
    text
}

fn seen(request: &Request<Incoming>, origin: &Origin) -> Seen {
    let uri = request.uri();
    let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    let host = uri.authority().map_or_else(
        || request.headers().get(header::HOST).map(text).unwrap_or_default(),
        |authority| authority.as_str().to_owned(),
    );
    Seen {
        method: request.method().as_str().to_owned(),
        target: uri
            .path_and_query()
            .map_or_else(|| uri.path().to_owned(), |target| target.as_str().to_owned()),
        host,
        protocol: match request.version() {
            http::Version::HTTP_10 => "HTTP/1.0",
            http::Version::HTTP_2 => "HTTP/2.0",
            _ => "HTTP/1.1",
        },
        alpn: origin.tls.as_ref().map(|tls| tls.negotiated_protocol.clone()).unwrap_or_default(),
        headers: request
            .headers()
            .iter()
            .filter(|(name, _)| *name != header::HOST)
            .map(|(name, value): (&HeaderName, _)| (header_name(name.as_str()), text(value)))
            .collect(),
        peer: Some(origin.peer),
        port: origin.port,
    }
}

fn plain(status: StatusCode, text: String) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(text)).boxed());
    *answer.status_mut() = status;
    answer
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    answer
}

/// A gRPC error without a message: everything is said in the head.
fn trailers_only(status: u32, why: &'static str) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::new()).boxed());
    let headers = answer.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(grpc::CONTENT_TYPE));
    headers.insert("grpc-status", HeaderValue::from(status));
    headers.insert("grpc-message", HeaderValue::from_static(why));
    answer
}
