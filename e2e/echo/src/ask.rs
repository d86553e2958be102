//! The client: asks a URL a number of times, and says what came back as lines.
//!
//! One connection serves all requests as long as the server keeps it: a proxy that routes by connection instead of by
//! request is found out that way. Redirects are not followed.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Uri, Version, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::answer::header_name;
use crate::{grpc, tls};

/// Largest answer kept: an echo's is a few KiB.
const BODY_MAX: usize = 1024 * 1024;

/// What to ask.
#[derive(Debug, Clone)]
pub struct Question {
    pub url: Uri,
    pub method: Method,
    pub headers: Vec<(HeaderName, HeaderValue)>,
    pub message: String,
    /// HTTP/2 from the first byte on.
    pub http2: bool,
    pub authority: Option<PathBuf>,
    pub timeout: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scheme {
    Http,
    Https,
    Grpc,
    Tcp,
}

/// Asks `count` times and hands each answer's lines to `print`.
pub async fn ask(
    question: &Question,
    count: u32,
    mut print: impl FnMut(String) -> Result<()>,
) -> Result<()> {
    let target = Target::of(question)?;
    let mut line = None;
    for number in 0..count {
        let began = Instant::now();
        let asked = timeout(question.timeout, once(question, &target, &mut line)).await;
        let heard = asked.with_context(|| format!("no answer within {:?}", question.timeout))??;
        print(describe(number, question, &heard, began.elapsed()))?;
    }
    Ok(())
}

struct Heard {
    status: u16,
    headers: HeaderMap,
    body: String,
}

struct Target {
    scheme: Scheme,
    host: String,
    port: u16,
}

impl Target {
    fn of(question: &Question) -> Result<Self> {
        let (scheme, port) = match question.url.scheme_str() {
            Some("http") => (Scheme::Http, 80),
            Some("https") => (Scheme::Https, 443),
            Some("grpc") => (Scheme::Grpc, 7070),
            Some("tcp") => (Scheme::Tcp, 9090),
            other => bail!("the URL must begin with http, https, grpc or tcp, not {other:?}"),
        };
        let host = question.url.host().context("the URL names no host")?;
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        Ok(Self { scheme, host, port: question.url.port_u16().unwrap_or(port) })
    }
}

enum Line {
    One(http1::SendRequest<Full<Bytes>>),
    Two(http2::SendRequest<Full<Bytes>>),
}

impl Line {
    fn usable(&self) -> bool {
        match self {
            Self::One(line) => !line.is_closed(),
            Self::Two(line) => !line.is_closed(),
        }
    }

    async fn send(&mut self, request: Request<Full<Bytes>>) -> hyper::Result<Response<Incoming>> {
        match self {
            Self::One(line) => {
                line.ready().await?;
                line.send_request(request).await
            }
            Self::Two(line) => {
                line.ready().await?;
                line.send_request(request).await
            }
        }
    }
}

async fn once(question: &Question, target: &Target, line: &mut Option<Line>) -> Result<Heard> {
    if target.scheme == Scheme::Tcp {
        return talk(question, target).await;
    }
    let mut open = match line.take().filter(Line::usable) {
        Some(open) => open,
        None => connect(question, target).await?,
    };
    let request = request(question, target, &open)?;
    let answer = open.send(request).await.context("sending the request")?;
    let (head, body) = answer.into_parts();
    let body = Limited::new(body, BODY_MAX).collect().await;
    let body = body.map_err(|error| anyhow::anyhow!(error)).context("reading the answer")?;
    let trailers = body.trailers().cloned().unwrap_or_default();
    let body = body.to_bytes();
    *line = Some(open);
    if target.scheme != Scheme::Grpc {
        let body = String::from_utf8_lossy(&body).into_owned();
        return Ok(Heard { status: head.status.as_u16(), headers: head.headers, body });
    }
    ensure!(head.status.is_success(), "the gRPC call was answered with HTTP {}", head.status);
    let status = trailers.get("grpc-status").or_else(|| head.headers.get("grpc-status"));
    let status = status.context("the gRPC answer has no status")?;
    if status.as_bytes() != b"0" {
        let why = trailers.get("grpc-message").or_else(|| head.headers.get("grpc-message"));
        bail!("the gRPC call failed with status {status:?}: {why:?}");
    }
    Ok(Heard { status: 200, headers: head.headers, body: grpc::unframe(&body)? })
}

/// The line protocol: one line there, an answer until the server hangs up.
async fn talk(question: &Question, target: &Target) -> Result<Heard> {
    let mut stream = dial(target).await?;
    stream.write_all(format!("{}\n", question.message).as_bytes()).await?;
    let mut body = Vec::new();
    stream.take(BODY_MAX as u64).read_to_end(&mut body).await.context("reading the answer")?;
    ensure!(!body.is_empty(), "the server hung up without an answer");
    Ok(Heard {
        status: 200,
        headers: HeaderMap::new(),
        body: String::from_utf8_lossy(&body).into_owned(),
    })
}

async fn dial(target: &Target) -> Result<TcpStream> {
    let to = (target.host.as_str(), target.port);
    let stream = TcpStream::connect(to)
        .await
        .with_context(|| format!("connecting to {}:{}", target.host, target.port))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

async fn connect(question: &Question, target: &Target) -> Result<Line> {
    let stream = dial(target).await?;
    let two = question.http2 || target.scheme == Scheme::Grpc;
    if target.scheme != Scheme::Https {
        return open(stream, two).await;
    }
    let protocols: &[&[u8]] = if two { &[b"h2"] } else { &[b"http/1.1"] };
    let config = tls::client(question.authority.as_deref(), protocols)?;
    let name =
        ServerName::try_from(sni(question, target)).context("the URL's host is no name for TLS")?;
    let stream =
        TlsConnector::from(config).connect(name, stream).await.context("the TLS handshake")?;
    open(stream, two).await
}

/// The name in a Host header, if one is given: that is whom the request is for.
fn sni(question: &Question, target: &Target) -> String {
    let given = question.headers.iter().find(|(name, _)| *name == header::HOST);
    let given = given.and_then(|(_, value)| value.to_str().ok());
    given.map_or_else(
        || target.host.clone(),
        |host| host.split(':').next().unwrap_or_default().to_owned(),
    )
}

async fn open(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    two: bool,
) -> Result<Line> {
    let stream = TokioIo::new(stream);
    if two {
        let (line, driver) =
            http2::handshake(TokioExecutor::new(), stream).await.context("opening HTTP/2")?;
        tokio::spawn(driver);
        return Ok(Line::Two(line));
    }
    let (line, driver) = http1::handshake(stream).await.context("opening HTTP/1.1")?;
    tokio::spawn(driver);
    Ok(Line::One(line))
}

fn request(question: &Question, target: &Target, line: &Line) -> Result<Request<Full<Bytes>>> {
    let authority = question.url.authority().context("the URL names no host")?.as_str();
    let given = question.headers.iter().find(|(name, _)| *name == header::HOST);
    let host = match given {
        Some((_, value)) => value.to_str().context("the Host header is not text")?.to_owned(),
        None => authority.to_owned(),
    };
    let calls = target.scheme == Scheme::Grpc;
    let path = if calls {
        grpc::METHOD
    } else {
        question.url.path_and_query().map_or("/", |path| path.as_str())
    };
    let mut request = Request::new(Full::new(if calls {
        grpc::frame(&question.message)
    } else {
        Bytes::from(question.message.clone())
    }));
    *request.method_mut() = if calls { Method::POST } else { question.method.clone() };
    for (name, value) in &question.headers {
        if *name != header::HOST {
            request.headers_mut().append(name, value.clone());
        }
    }
    if calls {
        request
            .headers_mut()
            .insert(header::CONTENT_TYPE, HeaderValue::from_static(grpc::CONTENT_TYPE));
        request.headers_mut().insert(header::TE, HeaderValue::from_static("trailers"));
    }
    match line {
        Line::One(_) => {
            *request.uri_mut() = path.parse()?;
            request.headers_mut().insert(header::HOST, host.parse()?);
        }
        Line::Two(_) => {
            let scheme = if target.scheme == Scheme::Https { "https" } else { "http" };
            *request.uri_mut() =
                Uri::builder().scheme(scheme).authority(host).path_and_query(path).build()?;
            *request.version_mut() = Version::HTTP_2;
        }
    }
    Ok(request)
}

/// The lines of one answer. Blank lines stand between answers, so there is none inside.
fn describe(number: u32, question: &Question, heard: &Heard, took: Duration) -> String {
    let mut text = String::new();
    // Writing into a String cannot fail.
    let _ = writeln!(text, "[{number}] Url={}", question.url);
    for (name, value) in &question.headers {
        let _ = writeln!(text, "[{number}] Header={}:{}", header_name(name.as_str()), shown(value));
    }
    let _ = writeln!(text, "[{number}] Latency={took:?}");
    let _ = writeln!(text, "[{number}] StatusCode={}", heard.status);
    for (name, value) in &heard.headers {
        let _ = writeln!(
            text,
            "[{number}] ResponseHeader={}:{}",
            header_name(name.as_str()),
            shown(value)
        );
    }
    for line in heard.body.lines().filter(|line| !line.trim().is_empty()) {
        let _ = writeln!(text, "[{number} body] {line}");
    }
    text
}

fn shown(value: &HeaderValue) -> String {
    String::from_utf8_lossy(value.as_bytes()).into_owned()
}
