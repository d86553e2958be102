//! HTTP/1.1: requests, connections that are used again, headers, 100-continue, upgrades, large bodies.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use hbone::TunnelIo;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use hyper_util::rt::TokioIo;
use model::http::Protocol;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::world::*;

#[tokio::test]
async fn requests_reach_an_endpoint_in_the_clients_name() {
    let world = World::new(Protocol::Http);
    let web = world.echo("web", "web").await;
    let mut client = Http1::new(world.connect().await).await;
    for n in 0..5 {
        let answer = client.ask(get(&format!("/a?n={n}"))).await.unwrap();
        assert_eq!(answer.status(), 200);
        let text = text(&answer);
        assert!(text.starts_with(&format!("GET /a?n={n} HTTP/1.1\n")), "{text}");
        assert!(text.contains("\nhost: web.shop\n") && text.contains("\nx-request-id: "), "{text}");
    }
    let connects = web.seen.connects();
    assert_eq!(
        connects.len(),
        1,
        "one connection carries all of a client's requests: {connects:?}"
    );
    assert_eq!(connects[0].peer, id("waypoint").to_string());
    assert_eq!(connects[0].for_whom, Some(id("client").to_string()));
    assert_eq!(connects[0].to, (web.ip, 8080).into());
    let line = world.line(&["request complete", "path=\"/a?n=4\""]).await;
    for word in [
        "src.identity=\"spiffe://cluster.local/ns/shop/sa/client\"",
        "dst.workload=\"web-0\"",
        "dst.service=\"web.shop.svc.cluster.local\"",
        "dst.identity=\"spiffe://cluster.local/ns/shop/sa/web\"",
        "on_behalf_of=\"spiffe://cluster.local/ns/shop/sa/client\"",
        "direction=\"waypoint\"",
        "method=\"GET\"",
        "authority=\"web.shop\"",
        "protocol=\"HTTP/1.1\"",
        "status=200",
    ] {
        assert!(line.contains(word), "{word} in {line}");
    }
    let (page, _) = world.metrics.render();
    let count = page.lines().find(|l| l.starts_with("istio_requests_total")).unwrap();
    for word in [
        "reporter=\"waypoint\"",
        "response_code=\"200\"",
        "request_protocol=\"http\"",
        "response_flags=\"-\"",
        "connection_security_policy=\"mutual_tls\"",
        "source_principal=\"spiffe://cluster.local/ns/shop/sa/client\"",
        "destination_workload=\"web-0\"",
        "destination_service_name=\"web\"",
    ] {
        assert!(count.contains(word), "{word} in {count}");
    }
    assert!(count.ends_with(" 5"), "{count}");
    assert!(page.contains("istio_request_duration_milliseconds_bucket{"), "{page}");
}

#[tokio::test]
async fn no_connection_serves_two_identities() {
    let world = World::new(Protocol::Http);
    let web = world.echo("web", "web").await;
    for (client, connections) in [("a", 1), ("b", 2), ("a", 2), ("b", 2)] {
        let tunnel = world.tunnel(client).await;
        let stream = tunnel.open(WEB, &Default::default()).await.unwrap();
        let mut http = Http1::new(TunnelIo::opened(stream)).await;
        assert_eq!(http.ask(get("/")).await.unwrap().status(), 200);
        let connects = web.seen.connects();
        assert_eq!(connects.len(), connections, "{client}: {connects:?}");
    }
    let mut whom: Vec<_> = web.seen.connects().into_iter().filter_map(|c| c.for_whom).collect();
    whom.sort();
    assert_eq!(whom, [id("a").to_string(), id("b").to_string()]);
    assert_eq!(web.seen.tunnels.load(Ordering::SeqCst), 1, "one tunnel carries both");
}

#[tokio::test]
async fn headers_of_one_hop_and_forged_ones_stay_behind() {
    let world = World::new(Protocol::Http);
    let _web = world.echo("web", "web").await;
    let request = Request::post("/")
        .header("host", "WEB.shop")
        .header("connection", "keep-alive, x-private")
        .header("x-private", "1")
        .header("keep-alive", "timeout=5")
        .header("proxy-connection", "keep-alive")
        .header("te", "trailers")
        .header("x-ambit-client-identity", "spiffe://cluster.local/ns/shop/sa/admin")
        .header("x-ambit-reason", "none")
        .header("x-forwarded-client-cert", "URI=spiffe://cluster.local/ns/shop/sa/admin")
        .header("x-forwarded-for", "192.0.2.1")
        .header("x-request-id", "mine")
        .body(full("body"))
        .unwrap();
    let text = text(&world.ask(request).await);
    for gone in [
        "x-private",
        "keep-alive",
        "proxy-connection",
        "\nte:",
        "x-ambit",
        "client-cert",
        "\nconnection:",
    ] {
        assert!(!text.contains(gone), "{gone} in {text}");
    }
    // What a gateway before us says passes, as Istio's waypoint has it.
    for kept in ["x-forwarded-for: 192.0.2.1", "x-request-id: mine", "\n\nbody", "host: web.shop"] {
        assert!(text.contains(kept), "{kept} in {text}");
    }
}

#[tokio::test]
async fn bodies_stream_both_ways_whatever_their_size() {
    const CHUNK: usize = 256 << 10;
    const CHUNKS: usize = 512;
    let world = World::new(Protocol::Http);
    // Sends back what it gets, as it comes.
    let _web = world
        .endpoint("web", "web", |io, seen| {
            serve_http1(io, seen, |request, _| async move {
                let body = request.into_body().map_err(Error::from).boxed_unsync();
                Ok(Response::new(body))
            })
        })
        .await;
    let before = resident();
    let chunk = Bytes::from(vec![7; CHUNK]);
    let frames = (0..CHUNKS).map(move |_| Ok::<_, Error>(Frame::data(chunk.clone())));
    let body = StreamBody::new(futures_util::stream::iter(frames)).boxed_unsync();
    let request = Request::post("/").header("host", "web").body(body).unwrap();
    let mut client = Http1::new(world.connect().await).await;
    let mut answer = client.send(request).await.unwrap().into_body();
    let mut read = 0;
    while let Some(frame) = answer.frame().await {
        read += frame.unwrap().into_data().map_or(0, |bytes| bytes.len());
    }
    assert_eq!(read, CHUNK * CHUNKS);
    let grown = resident().saturating_sub(before);
    // Windows, socket buffers and both ends' own: far below the 128 MiB that went through.
    assert!(grown < 64 << 20, "{} MiB more", grown >> 20);
    let line = world.line(&["request complete", "POST"]).await;
    let bytes = CHUNK * CHUNKS;
    assert!(line.contains(&format!("bytes_sent={bytes} bytes_recv={bytes}")), "{line}");
}

fn resident() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[tokio::test]
async fn a_slow_reader_holds_the_endpoint_back() {
    let world = World::new(Protocol::Http);
    let sent = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = sent.clone();
    let _web = world
        .endpoint("web", "web", move |io, seen| {
            let sent = counted.clone();
            serve_http1(io, seen, move |_, _| {
                let sent = sent.clone();
                let chunk = Bytes::from(vec![7; 64 << 10]);
                let frames = std::iter::repeat_with(move || {
                    sent.fetch_add(chunk.len(), Ordering::SeqCst);
                    Ok::<_, Error>(Frame::data(chunk.clone()))
                });
                let body = StreamBody::new(futures_util::stream::iter(frames)).boxed_unsync();
                std::future::ready(Ok(Response::new(body)))
            })
        })
        .await;
    let mut client = Http1::new(world.connect().await).await;
    let _unread = client.send(get("/")).await.unwrap();
    // Until nothing more is taken.
    let mut last = 0;
    loop {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let now = sent.load(Ordering::SeqCst);
        if now == last {
            break;
        }
        last = now;
    }
    assert!(last < 64 << 20, "{} MiB were taken for a client that reads nothing", last >> 20);
}

#[tokio::test]
async fn a_body_waits_for_the_endpoints_continue() {
    let world = World::new(Protocol::Http);
    let _web = world.endpoint("web", "web", |io, seen| serve_http1(io, seen, echo)).await;
    let mut io = world.connect().await;
    let head = "POST / HTTP/1.1\r\nhost: web\r\ncontent-length: 5\r\nexpect: 100-continue\r\n\r\n";
    io.write_all(head.as_bytes()).await.unwrap();
    let mut answer = vec![0; 25];
    io.read_exact(&mut answer).await.unwrap();
    assert_eq!(answer, b"HTTP/1.1 100 Continue\r\n\r\n");
    io.write_all(b"hello").await.unwrap();
    let rest = until(&mut io, "hello").await;
    assert!(rest.starts_with("HTTP/1.1 200 OK") && rest.contains("expect: 100-continue"), "{rest}");
}

#[tokio::test]
async fn a_refusal_comes_in_place_of_a_continue() {
    let world = World::new(Protocol::Http);
    let _web = world
        .endpoint("web", "web", |io, seen| {
            serve_http1(io, seen, |_, _| async {
                let mut answer = Response::new(full("too large"));
                *answer.status_mut() = StatusCode::PAYLOAD_TOO_LARGE;
                Ok(answer)
            })
        })
        .await;
    let mut io = world.connect().await;
    let head = "POST / HTTP/1.1\r\nhost: web\r\ncontent-length: 5\r\nexpect: 100-continue\r\n\r\n";
    io.write_all(head.as_bytes()).await.unwrap();
    let answer = until(&mut io, "too large").await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
}

/// Reads until this text has come.
pub(crate) async fn until(io: &mut TunnelIo, text: &str) -> String {
    let mut read = Vec::new();
    let reading = async {
        loop {
            let mut part = [0; 4096];
            let n = io.read(&mut part).await.unwrap();
            read.extend_from_slice(&part[..n]);
            let all = String::from_utf8_lossy(&read).into_owned();
            if n == 0 || all.contains(text) {
                return all;
            }
        }
    };
    let all = tokio::time::timeout(PATIENCE, reading).await.unwrap();
    assert!(all.contains(text), "{text:?} is not in {all:?}");
    all
}

#[tokio::test]
async fn websockets_and_other_upgrades_become_a_pipe() {
    let world = World::new(Protocol::Http);
    let _web = world
        .endpoint("web", "web", |io, _| async move {
            let service = hyper::service::service_fn(
                |mut request: Request<hyper::body::Incoming>| async move {
                    let upgrade = hyper::upgrade::on(&mut request);
                    tokio::spawn(async move {
                        let mut io = TokioIo::new(upgrade.await.unwrap());
                        io.write_all(b"server first\n").await.unwrap();
                        let mut all = Vec::new();
                        io.read_to_end(&mut all).await.unwrap();
                        all.reverse();
                        io.write_all(&all).await.unwrap();
                        io.shutdown().await.unwrap();
                    });
                    let answer = Response::builder()
                        .status(101)
                        .header("connection", "Upgrade")
                        .header("upgrade", request.headers()["upgrade"].clone())
                        .body(empty());
                    Ok::<_, std::convert::Infallible>(answer.unwrap())
                },
            );
            let connection = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(io), service)
                .with_upgrades();
            let _ = connection.await;
        })
        .await;
    let mut client = Http1::new(world.connect().await).await;
    let request = Request::get("/chat")
        .header("host", "web")
        .header("connection", "upgrade")
        .header("upgrade", "websocket")
        .header("sec-websocket-key", "x")
        .body(empty())
        .unwrap();
    let answer = client.send(request).await.unwrap();
    assert_eq!(answer.status(), 101);
    assert_eq!(header(answer.headers(), "upgrade"), "websocket");
    assert_eq!(header(answer.headers(), "connection"), "upgrade");
    let mut io = TokioIo::new(hyper::upgrade::on(answer).await.unwrap());
    let mut first = [0; 13];
    io.read_exact(&mut first).await.unwrap();
    assert_eq!(&first, b"server first\n");
    io.write_all(b"olleh").await.unwrap();
    io.shutdown().await.unwrap();
    let mut rest = String::new();
    io.read_to_string(&mut rest).await.unwrap();
    assert_eq!(rest, "hello");
    let line = world.line(&["path=\"/chat\"", "status=101"]).await;
    assert!(line.contains("bytes_sent=18 bytes_recv=5"), "{line}");
}

#[tokio::test]
async fn a_connection_that_died_meanwhile_costs_no_request() {
    let world = World::new(Protocol::Http);
    // Answers one request a connection and closes it without a word about that.
    let web = world
        .endpoint("web", "web", |mut io, seen| async move {
            let mut part = [0; 4096];
            if io.read(&mut part).await.unwrap() > 0 {
                seen.requests.fetch_add(1, Ordering::SeqCst);
                let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
                io.write_all(answer).await.unwrap();
                // A second one dies in the middle of it.
                let _ = io.read(&mut part).await;
            }
        })
        .await;
    let mut client = Http1::new(world.connect().await).await;
    for n in 1..=4 {
        let answer = client.ask(get("/")).await.unwrap();
        assert_eq!(answer.status(), 200);
        assert_eq!(web.seen.requests(), n);
    }
    // What is not safe to repeat is not: nobody knows what became of it.
    let post = Request::post("/").header("host", "web").body(full("x")).unwrap();
    let answer = client.ask(post).await.unwrap();
    assert_eq!(answer.status(), 503);
    assert_eq!(header(answer.headers(), "x-ambit-reason"), "upstream_broken");
}

#[tokio::test]
async fn idle_connections_are_closed_neither_by_requests_nor_by_pipelining() {
    let world = World::new(Protocol::Http);
    let _web = world.echo("web", "web").await;
    let mut io = world.connect().await;
    let all: String = (1..=3).map(|n| format!("GET /{n} HTTP/1.1\r\nhost: web\r\n\r\n")).collect();
    io.write_all(all.as_bytes()).await.unwrap();
    let answers = until(&mut io, "GET /3 HTTP/1.1").await;
    for n in 1..=3 {
        assert!(answers.contains(&format!("GET /{n} HTTP/1.1")), "{answers}");
    }
}
