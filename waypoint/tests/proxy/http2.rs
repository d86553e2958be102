//! HTTP/2 and gRPC: streams, trailers, both directions at once, and HTTP/2 in front of HTTP/1.1.

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use model::http::Protocol;
use tokio::sync::mpsc;

use crate::world::*;

#[tokio::test]
async fn a_port_speaks_what_is_declared_whatever_the_client_speaks() {
    let check = |declared: Protocol, http2: bool, want: &'static str| async move {
        let world = World::new(declared);
        let _web = match want {
            "HTTP/2.0" => world.echo2("web", "web").await,
            _ => world.echo("web", "web").await,
        };
        let io = world.connect().await;
        let answer = if http2 {
            Http2::new(io).await.ask(get2("/x?y")).await.unwrap()
        } else {
            Http1::new(io).await.ask(get("/x?y")).await.unwrap()
        };
        let text = text(&answer);
        let uri = if want == "HTTP/2.0" { "http://web.shop/x?y" } else { "/x?y" };
        let what = format!("{declared:?} {http2}");
        assert!(text.starts_with(&format!("GET {uri} {want}\n")), "{what}: {text}");
        assert_eq!(text.contains("host: web.shop"), want == "HTTP/1.1", "{what}: {text}");
    };
    check(Protocol::Http, true, "HTTP/1.1").await;
    check(Protocol::Http2, false, "HTTP/2.0").await;
    check(Protocol::Http2, true, "HTTP/2.0").await;
    check(Protocol::Grpc, true, "HTTP/2.0").await;
    check(Protocol::Undeclared, false, "HTTP/1.1").await;
    check(Protocol::Undeclared, true, "HTTP/2.0").await;
}

#[tokio::test]
async fn many_requests_share_one_connection_each_way() {
    let world = World::new(Protocol::Http2);
    let web = world.echo2("web", "web").await;
    let client = Http2::new(world.connect().await).await;
    // The first opens the connection; a burst before it is there may open more.
    client.clone().ask(get2("/")).await.unwrap();
    let asks = (0..50).map(|n| {
        let mut client = client.clone();
        async move { client.ask(get2(&format!("/{n}"))).await.unwrap().status() }
    });
    for status in futures_util::future::join_all(asks).await {
        assert_eq!(status, 200);
    }
    assert_eq!(web.seen.connects().len(), 1);
}

fn message(text: &str) -> Bytes {
    let mut bytes = vec![0];
    bytes.extend(u32::try_from(text.len()).unwrap().to_be_bytes());
    bytes.extend(text.bytes());
    bytes.into()
}

fn trailers(status: &'static str) -> HeaderMap {
    HeaderMap::from_iter([("grpc-status".parse().unwrap(), status.parse().unwrap())])
}

/// A request of gRPC whose messages come from the channel.
fn call(path: &str) -> (Request<Body>, mpsc::UnboundedSender<Bytes>) {
    let (send, mut receive) = mpsc::unbounded_channel();
    let frames = futures_util::stream::poll_fn(move |cx| {
        receive.poll_recv(cx).map(|bytes| bytes.map(|b| Ok::<_, Error>(Frame::data(b))))
    });
    let request = Request::post(format!("http://web.shop{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(StreamBody::new(frames).boxed_unsync());
    (request.unwrap(), send)
}

#[tokio::test]
async fn grpc_streams_and_ends_with_trailers() {
    // Undeclared, and declared as plain HTTP: gRPC is HTTP/2 all the same.
    for declared in [Protocol::Grpc, Protocol::Undeclared, Protocol::Http] {
        let world = World::new(declared);
        // Answers each message at once, and ends with a status.
        let _web = world
            .endpoint("web", "web", |io, seen| {
                serve_http2(io, seen, |request, _| async move {
                    assert_eq!(request.headers()["te"], "trailers");
                    let body = request.into_body().map_frame(|frame| frame);
                    let end = futures_util::stream::once(async {
                        Ok::<_, Error>(Frame::trailers(trailers("7")))
                    });
                    let all = futures_util::StreamExt::chain(
                        http_body_util::BodyStream::new(body.map_err(Error::from)),
                        end,
                    );
                    let answer = Response::builder().header("content-type", "application/grpc");
                    Ok(answer.body(StreamBody::new(all).boxed_unsync())?)
                })
            })
            .await;
        let mut client = Http2::new(world.connect().await).await;
        let (request, send) = call("/echo.Echo/Chat");
        let answer = client.send(request).await.unwrap();
        assert_eq!(answer.status(), 200);
        let mut body = answer.into_body();
        for text in ["one", "two", "three"] {
            send.send(message(text)).unwrap();
            let frame = tokio::time::timeout(PATIENCE, body.frame()).await.unwrap();
            assert_eq!(frame.unwrap().unwrap().into_data().unwrap(), message(text));
        }
        drop(send);
        let end = body.frame().await.unwrap().unwrap().into_trailers().unwrap();
        assert_eq!(end["grpc-status"], "7");
        let line = world.line(&["/echo.Echo/Chat"]).await;
        assert!(line.contains("grpc_status=7") && line.contains("status=200"), "{line}");
        let (page, _) = world.metrics.render();
        for name in ["istio_request_messages_total", "istio_response_messages_total"] {
            let row = page.lines().find(|l| l.starts_with(name)).unwrap();
            assert!(row.ends_with(" 3") && row.contains("grpc_response_status=\"7\""), "{row}");
        }
    }
}

#[tokio::test]
async fn a_refusal_of_grpc_is_in_its_words() {
    let world = World::new(Protocol::Grpc);
    let mut client = Http2::new(world.connect().await).await;
    let (request, _send) = call("/echo.Echo/Chat");
    let answer = client.ask(request).await.unwrap();
    assert_eq!(answer.status(), 200);
    assert_eq!(header(answer.headers(), "grpc-status"), "14");
    assert_eq!(header(answer.headers(), "x-ambit-reason"), "no_healthy_endpoint");
    let line = world.line(&["/echo.Echo/Chat"]).await;
    assert!(line.contains("reason=\"no_healthy_endpoint\""), "{line}");
}

#[tokio::test]
async fn a_client_that_goes_takes_its_request_with_it() {
    let world = World::new(Protocol::Http2);
    let (gone, mut heard) = mpsc::unbounded_channel();
    let web = world
        .endpoint("web", "web", move |io, seen| {
            let gone = gone.clone();
            serve_http2(io, seen, move |_, _| {
                let dropped = Dropped(gone.clone());
                async move {
                    let _dropped = dropped;
                    std::future::pending().await
                }
            })
        })
        .await;
    let mut client = Http2::new(world.connect().await).await;
    let asked = tokio::spawn(async move { client.send(get2("/")).await });
    wait_until("the request", || web.seen.requests() > 0).await;
    asked.abort();
    tokio::time::timeout(PATIENCE, heard.recv()).await.expect("the endpoint was not told");
    let line = world.line(&["request failed", "connection_broken"]).await;
    assert!(line.contains("status=0"), "{line}");
}

struct Dropped(mpsc::UnboundedSender<()>);

impl Drop for Dropped {
    fn drop(&mut self) {
        let _ = self.0.send(());
    }
}
