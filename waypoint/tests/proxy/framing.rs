//! Where a body ends, and what stands behind it: bodies without a length, trailers, answers that say two things.

use bytes::Bytes;
use hbone::TunnelIo;
use http::{HeaderMap, HeaderName, HeaderValue, Request};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use model::http::{Filter, Mirror, Protocol, RouteKind, RouteMatch, Share, Target};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::http1::until;
use crate::world::*;

/// A body whose length nobody says, with trailers.
fn pieces(trailers: &[(&'static str, &'static str)]) -> Body {
    let trailers = trailers
        .iter()
        .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)));
    let trailers: HeaderMap = trailers.collect();
    let data = ["{\"a\"", ":1}"].map(|piece| Frame::data(Bytes::from_static(piece.as_bytes())));
    let frames = data.into_iter().chain([Frame::trailers(trailers)]).map(Ok::<_, Error>);
    StreamBody::new(futures_util::stream::iter(frames)).boxed_unsync()
}

#[tokio::test]
async fn a_get_may_have_a_body_without_a_length() {
    for declared in [Protocol::Http, Protocol::Http2] {
        let world = World::new(declared);
        let _web = match declared {
            Protocol::Http => world.echo("web", "web").await,
            _ => world.echo2("web", "web").await,
        };
        let mut client = Http2::new(world.connect().await).await;
        let request = Request::get("http://web.shop/_search").body(pieces(&[])).unwrap();
        let answer = client.ask(request).await.unwrap();
        assert!(text(&answer).ends_with("\n\n{\"a\":1}"), "{declared:?}: {}", text(&answer));
        // And the same connection goes on.
        let answer = client.ask(get2("/next")).await.unwrap();
        assert!(text(&answer).starts_with("GET "), "{declared:?}: {}", text(&answer));
        let mut io = world.connect().await;
        let chunked = "GET /_search HTTP/1.1\r\nhost: web\r\ntransfer-encoding: chunked\r\n\r\n\
                       7\r\n{\"b\":2}\r\n0\r\n\r\n";
        io.write_all(chunked.as_bytes()).await.unwrap();
        until(&mut io, "{\"b\":2}").await;
    }
}

#[tokio::test]
async fn forged_trailers_stay_behind() {
    let world = World::new(Protocol::Http2);
    let (said, mut heard) = tokio::sync::mpsc::unbounded_channel();
    let _web = world
        .endpoint("web", "web", move |io, seen| {
            let said = said.clone();
            serve_http2(io, seen, move |request, _| {
                let said = said.clone();
                async move {
                    let trailers = request.into_body().collect().await?.trailers().cloned();
                    said.send(trailers.unwrap_or_default()).unwrap();
                    Ok(http::Response::new(empty()))
                }
            })
        })
        .await;
    let forged = [
        ("x-checksum", "1"),
        ("x-forwarded-client-cert", "URI=spiffe://cluster.local/ns/shop/sa/admin"),
        ("x-ambit-client-identity", "spiffe://cluster.local/ns/shop/sa/admin"),
    ];
    let request = Request::post("http://web.shop/").body(pieces(&forged)).unwrap();
    let mut client = Http2::new(world.connect().await).await;
    assert_eq!(client.ask(request).await.unwrap().status(), 200);
    let trailers = heard.recv().await.unwrap();
    assert_eq!(
        trailers,
        HeaderMap::from_iter([(
            HeaderName::from_static("x-checksum"),
            HeaderValue::from_static("1"),
        )])
    );
}

/// Reads a head, and answers with these bytes; again and again.
async fn answers(mut io: TunnelIo, answer: String) {
    let (mut all, mut buffer) = (Vec::new(), [0; 4096]);
    while let Ok(read @ 1..) = io.read(&mut buffer).await {
        all.extend_from_slice(&buffer[..read]);
        if all.ends_with(b"\r\n\r\n") {
            all.clear();
            if io.write_all(answer.as_bytes()).await.is_err() {
                return;
            }
        }
    }
}

fn hundred(head: &str) -> String {
    format!("HTTP/1.1 200 OK\r\n{head}\r\n\r\n64\r\n{}\r\n0\r\n\r\n", "x".repeat(100))
}

#[tokio::test]
async fn an_answer_with_two_lengths_is_as_long_as_its_chunks() {
    for http2 in [false, true] {
        for length in [5, 500] {
            let world = World::new(Protocol::Http);
            let answer =
                hundred(&format!("transfer-encoding: chunked\r\ncontent-length: {length}"));
            let _web = world.endpoint("web", "web", move |io, _| answers(io, answer.clone())).await;
            let io = world.connect().await;
            let answer = match http2 {
                true => Http2::new(io).await.ask(get2("/")).await.unwrap(),
                false => Http1::new(io).await.ask(get("/")).await.unwrap(),
            };
            assert_eq!(answer.body().len(), 100, "{http2} {length}");
            assert_ne!(header(answer.headers(), "content-length"), length.to_string());
        }
    }
}

#[tokio::test]
async fn an_answer_in_a_coding_that_nobody_asked_for_is_refused() {
    let world = World::new(Protocol::Http);
    let answer = "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n";
    let _web = world.endpoint("web", "web", move |io, _| answers(io, answer.to_owned())).await;
    let answer = world.ask(get("/")).await;
    assert_eq!(answer.status(), 503);
    assert_eq!(header(answer.headers(), "x-ambit-reason"), "upstream_broken");
}

#[tokio::test]
async fn an_answer_with_trailers_is_complete_and_its_connection_used_again() {
    let world = World::new(Protocol::Http);
    let answer = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n\
                  3\r\nabc\r\n0\r\nx-sum: 1\r\n\r\n";
    let web = world.endpoint("web", "web", move |io, _| answers(io, answer.to_owned())).await;
    let mut client = Http1::new(world.connect().await).await;
    for number in 0..3 {
        let answer = client.ask(get(&format!("/{number}"))).await.unwrap();
        assert_eq!(text(&answer), "abc");
        let line = world.line(&["status=200", &format!("path=\"/{number}\"")]).await;
        assert!(line.contains("request complete") && !line.contains("reason="), "{line}");
    }
    assert_eq!(web.seen.connects().len(), 1);
}

#[tokio::test]
async fn a_mirror_of_grpc_is_grpc() {
    let world = World::new(Protocol::Http);
    let (_web, copy) = (world.echo2("web", "web").await, world.echo2("copy", "copy").await);
    world.speak("copy", Protocol::Http);
    let target = Target::Service { service: key("copy"), port: 80, subset: None };
    let filters = vec![Filter::Mirror(Mirror { target, share: Share::ALL })];
    let rules = vec![(RouteMatch::default(), rule(filters, vec![to("web")]))];
    world.rules_of_kind(RouteKind::Grpc, "web", Protocol::Http, rules);
    let request = Request::post("http://web.shop/echo.Echo/Say")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(empty())
        .unwrap();
    let mut client = Http2::new(world.connect().await).await;
    assert_eq!(client.ask(request).await.unwrap().status(), 200);
    wait_until("the mirror", || copy.seen.requests() > 0).await;
}
