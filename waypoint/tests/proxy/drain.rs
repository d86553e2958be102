//! A waypoint that goes: what it has begun it finishes, what is new goes elsewhere.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hbone::ConnectHeaders;
use http::Response;
use model::http::Protocol;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::Notify;

use crate::world::*;

/// Answers when it is told to.
async fn held(world: &World) -> Endpoint {
    world
        .endpoint("web", "web", |io, seen| {
            serve_http1(io, seen, |_, seen| async move {
                seen.go_on.notified().await;
                Ok(Response::new(full("done")))
            })
        })
        .await
}

fn begin(world: &World) -> (tokio::task::JoinHandle<std::io::Result<()>>, Arc<Notify>) {
    let quit = Arc::new(Notify::new());
    let (shared, told) = (world.shared.clone(), quit.clone());
    (tokio::spawn(async move { waypoint::app::drain(&shared, &told).await }), quit)
}

async fn until_asked(web: &Endpoint) {
    wait_until("the request", || web.seen.requests() > 0).await;
}

#[tokio::test]
async fn requests_that_have_begun_are_finished() {
    let world = World::with(Protocol::Http, &["--drain-seconds", "20"]);
    let web = held(&world).await;
    let tunnel = world.tunnel("client").await;
    let headers = ConnectHeaders::default();
    let a = tunnel.open(WEB, &headers).await.unwrap();
    let b = tunnel.open(WEB, &headers).await.unwrap();
    let mut http1 = Http1::new(hbone::TunnelIo::opened(a)).await;
    let mut http2 = Http2::new(hbone::TunnelIo::opened(b)).await;
    let first = tokio::spawn(async move { (http1.ask(get("/")).await, http1) });
    let second = tokio::spawn(async move { http2.ask(get2("/")).await });
    wait_until("both requests", || web.seen.requests() == 2).await;
    let (drained, _) = begin(&world);
    // A GOAWAY: the tunnel takes no further stream.
    wait_until("the GOAWAY", || tunnel.is_closed()).await;
    web.seen.go_on.notify_waiters();
    let (answer, http1) = first.await.unwrap();
    let answer = answer.unwrap();
    assert_eq!((answer.status().as_u16(), text(&answer).as_str()), (200, "done"));
    assert_eq!(header(answer.headers(), "connection"), "close");
    assert_eq!(second.await.unwrap().unwrap().status(), 200);
    drop(http1);
    drop(tunnel);
    let ended = tokio::time::timeout(PATIENCE, drained).await;
    ended.expect("the drain does not end").unwrap().unwrap();
}

#[tokio::test]
async fn what_is_left_at_the_end_is_ended_with_its_reason() {
    let world = World::with(Protocol::Http, &["--drain-seconds", "1"]);
    let web = held(&world).await;
    let mut client = Http1::new(world.connect().await).await;
    let asked = tokio::spawn(async move { client.ask(get("/")).await });
    until_asked(&web).await;
    let begun = Instant::now();
    let (drained, _) = begin(&world);
    asked.await.unwrap().unwrap_err();
    assert!(begun.elapsed() >= Duration::from_secs(1));
    drained.await.unwrap().unwrap();
    let line = world.line(&["request failed"]).await;
    assert!(line.contains("reason=\"draining\""), "{line}");
}

#[tokio::test]
async fn pipes_live_until_the_end_and_end_at_a_word() {
    let world = World::with(Protocol::Opaque, &["--drain-seconds", "60"]);
    let _web = world
        .endpoint("web", "web", |mut io, _| async move {
            let mut bytes = [0; 5];
            while io.read_exact(&mut bytes).await.is_ok() {
                io.write_all(&bytes).await.unwrap();
            }
        })
        .await;
    let mut io = world.connect().await;
    let mut echo = async || {
        io.write_all(b"hello").await.unwrap();
        let mut bytes = [0; 5];
        io.read_exact(&mut bytes).await.map(|_| bytes)
    };
    assert_eq!(echo().await.unwrap(), *b"hello");
    let (drained, quit) = begin(&world);
    assert_eq!(echo().await.unwrap(), *b"hello");
    quit.notify_one();
    drained.await.unwrap().unwrap();
    let line = world.line(&["connection failed"]).await;
    assert!(line.contains("reason=\"draining\""), "{line}");
}
