//! What is not HTTP, and how it is told apart: without delaying a server that speaks first, and without a way around routes.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use hbone::{ConnectHeaders, TunnelError, TunnelIo};
use model::http::Protocol;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::http1::until;
use crate::world::*;

/// Sends back what it gets, twice, once it has all of it.
async fn double(mut io: TunnelIo) {
    let mut all = Vec::new();
    if io.read_to_end(&mut all).await.is_ok() {
        let _ = io.write_all(&all).await;
        let _ = io.write_all(&all).await;
        let _ = io.shutdown().await;
    }
}

#[tokio::test]
async fn bytes_that_are_not_http_pass_untouched() {
    for declared in [Protocol::Opaque, Protocol::Undeclared] {
        let world = World::new(declared);
        let web = world.endpoint("web", "web", |io, _| double(io)).await;
        for size in [0_usize, 1, 100, 70_000, 3 << 20] {
            let mut io = world.connect().await;
            let data: Vec<u8> = (0..size).map(|i| u8::try_from(i * 7 % 251).unwrap()).collect();
            let (mut read, mut write) = tokio::io::split(io);
            let mut answer = Vec::new();
            let (_, got) = tokio::join!(
                async {
                    write.write_all(&data).await.unwrap();
                    write.shutdown().await.unwrap();
                },
                read.read_to_end(&mut answer)
            );
            got.unwrap();
            assert!(answer == [&data[..], &data[..]].concat(), "{declared:?}: {size} bytes differ");
            io = read.unsplit(write);
            drop(io);
        }
        let whom = web.seen.connects().pop().unwrap().for_whom;
        assert_eq!(whom, Some(id("client").to_string()));
        let line = world.line(&["connection complete", "bytes_recv=70000"]).await;
        assert!(line.contains("bytes_sent=140000") && line.contains("waypoint"), "{line}");
    }
}

#[tokio::test]
async fn an_opaque_port_is_not_looked_at() {
    let world = World::new(Protocol::Opaque);
    let _web = world.endpoint("web", "web", |io, _| double(io)).await;
    let mut io = world.connect().await;
    let bytes = "GET / HTTP/1.1\r\nhost: a\r\nx-ambit-reason: b\r\n\r\n";
    io.write_all(bytes.as_bytes()).await.unwrap();
    io.shutdown().await.unwrap();
    assert_eq!(until(&mut io, &format!("{bytes}{bytes}")).await, format!("{bytes}{bytes}"));
}

#[tokio::test]
async fn a_server_that_speaks_first_is_heard_at_once() {
    let world = World::new(Protocol::Undeclared);
    let _web = world
        .endpoint("web", "web", |mut io, _| async move {
            io.write_all(b"220 hello\r\n").await.unwrap();
            let _ = io.read(&mut [0; 100]).await;
            io.write_all(b"221 bye\r\n").await.unwrap();
            io.shutdown().await.unwrap();
        })
        .await;
    let begun = Instant::now();
    let mut io = world.connect().await;
    until(&mut io, "220 hello").await;
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    io.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
    until(&mut io, "221 bye").await;
}

#[tokio::test]
async fn http_that_comes_late_or_in_pieces_is_http() {
    let world = World::new(Protocol::Undeclared);
    let web = world.echo("web", "web").await;
    let request = b"\r\nGET /late HTTP/1.1\r\nhost: web\r\nx-ambit-forged: 1\r\n\r\n";
    for (pause, pieces) in [(100, 1), (0, 7), (60, 3)] {
        let mut io = world.connect().await;
        tokio::time::sleep(Duration::from_millis(pause)).await;
        for piece in request.chunks(request.len().div_ceil(pieces)) {
            io.write_all(piece).await.unwrap();
            tokio::time::sleep(Duration::from_millis(pause.max(5))).await;
        }
        let answer = until(&mut io, "GET /late").await;
        assert!(!answer.contains("forged"), "it went around the proxy: {answer}");
    }
    assert!(web.seen.requests.load(Ordering::SeqCst) >= 3);
}

#[tokio::test]
async fn a_server_of_http2_that_says_its_settings_first_is_no_way_around() {
    let world = World::new(Protocol::Undeclared);
    let web = world.echo2("web", "web").await;
    let io = world.connect().await;
    // The endpoint says its settings as soon as it is called; the client's words come then, before or after them.
    wait_until("the endpoint to be called", || !web.seen.connects().is_empty()).await;
    let answer = Http2::new(io).await.ask(get2("/late")).await.unwrap();
    assert!(text(&answer).contains("x-request-id"), "it went around the proxy: {answer:?}");
    world.line(&["path=\"/late\""]).await;
}

#[tokio::test]
async fn a_server_that_ends_without_a_word_ends_the_client() {
    let world = World::new(Protocol::Undeclared);
    let _web = world
        .endpoint("web", "web", |mut io, _| async move {
            let _ = io.shutdown().await;
        })
        .await;
    let mut io = world.connect().await;
    let mut all = Vec::new();
    let read = tokio::time::timeout(PATIENCE, io.read_to_end(&mut all)).await.unwrap();
    assert!(read.is_err() || all.is_empty(), "{all:?}");
}

#[tokio::test]
async fn what_is_not_bound_here_is_refused() {
    let world = World::new(Protocol::Http);
    world.change([model::Change::SetService(std::sync::Arc::new(service("other", false)))]);
    let tunnel = world.tunnel("client").await;
    for address in ["10.96.0.99:80", "10.96.0.10:81"] {
        let refused = tunnel.open(address.parse().unwrap(), &ConnectHeaders::default()).await;
        let Err(TunnelError::Refused { status, reason }) = refused else { panic!("{refused:?}") };
        let want = if address.ends_with(":81") { "no_such_port" } else { "not_bound" };
        assert_eq!((status, reason.as_deref()), (404, Some(want)), "{address}");
    }
    world.line(&["not_bound"]).await;
}

#[tokio::test]
async fn a_service_that_is_bound_elsewhere_is_no_longer_served() {
    let world = World::new(Protocol::Http);
    let _web = world.echo("web", "web").await;
    let mut client = Http1::new(world.connect().await).await;
    assert_eq!(client.ask(get("/")).await.unwrap().status(), 200);
    world.change([model::Change::SetService(std::sync::Arc::new(service("web", false)))]);
    let answer = client.ask(get("/")).await.unwrap();
    assert_eq!(answer.status(), 403);
    assert_eq!(header(answer.headers(), "x-ambit-reason"), "not_bound");
}
