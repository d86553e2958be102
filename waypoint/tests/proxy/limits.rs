//! Limits that one peer sets or uses up: streams, windows, time, places. Others go on.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::{TokioExecutor, TokioIo};
use model::http::{Fault, Filter, Protocol, RouteRule, Share, Timeouts};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::mpsc;

use crate::world::*;

/// Serves HTTP/2 with this many requests at once; each waits for a word before it is answered, unless its path is `/at-once`,
/// and its body is not read.
async fn serve_few(io: hbone::TunnelIo, seen: Arc<Seen>, at_once: u32) {
    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
        let seen = seen.clone();
        async move {
            seen.requests.fetch_add(1, Ordering::SeqCst);
            if request.uri().path() != "/at-once" {
                seen.go_on.notified().await;
            }
            // Else the end of the answer would be followed by a reset, and the request's place be free.
            tokio::spawn(async move { (std::future::pending::<()>().await, request) });
            Ok::<_, std::convert::Infallible>(Response::new(full("ok")))
        }
    });
    let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .max_concurrent_streams(at_once)
        .serve_connection(TokioIo::new(io), service);
    let _ = connection.await;
}

#[tokio::test]
async fn an_endpoint_that_takes_few_requests_at_once_gets_more_connections() {
    let world = World::new(Protocol::Http2);
    let web = world.endpoint("web", "web", |io, seen| serve_few(io, seen, 2)).await;
    let client = Http2::new(world.connect().await).await;
    // The first connection, and what its endpoint says about itself.
    assert_eq!(client.clone().ask(get2("/at-once")).await.unwrap().status(), 200);
    let asks: Vec<_> = (0..5)
        .map(|n| {
            let mut client = client.clone();
            tokio::spawn(async move { client.ask(get2(&format!("/{n}"))).await.unwrap().status() })
        })
        .collect();
    wait_until("all are with the endpoint", || web.seen.requests() == 6).await;
    let connections = web.seen.connects().len();
    assert!((3..=6).contains(&connections), "{connections} for five requests, two on each");
    web.seen.go_on.notify_waiters();
    for ask in asks {
        assert_eq!(ask.await.unwrap(), 200);
    }
}

/// A request whose body has begun and comes to no end while the sender is kept.
fn upload(path: &str) -> (Request<Body>, mpsc::UnboundedSender<Bytes>) {
    let (send, mut receive) = mpsc::unbounded_channel::<Bytes>();
    send.send("begun".into()).unwrap();
    let frames = futures_util::stream::poll_fn(move |cx| {
        receive.poll_recv(cx).map(|bytes| bytes.map(|b| Ok::<_, Error>(Frame::data(b))))
    });
    let request = Request::post(format!("http://web.shop{path}"));
    (request.body(StreamBody::new(frames).boxed_unsync()).unwrap(), send)
}

#[tokio::test]
async fn a_request_has_its_place_until_its_body_ends() {
    let world = World::new(Protocol::Http2);
    let web = world.endpoint("web", "web", |io, seen| serve_few(io, seen, 1)).await;
    let mut client = Http2::new(world.connect().await).await;
    let (request, _more) = upload("/at-once");
    // It is answered, and for its endpoint it goes on.
    assert_eq!(client.ask(request).await.unwrap().status(), 200);
    world.line(&["path=\"/at-once\"", "status=200"]).await;
    assert_eq!(client.ask(get2("/at-once")).await.unwrap().status(), 200);
    assert_eq!(web.seen.connects().len(), 2);
}

/// A body without an end, and who hears that nobody wants it any more.
fn endless() -> (Body, mpsc::UnboundedReceiver<()>) {
    let (gone, heard) = mpsc::unbounded_channel();
    let chunk = Bytes::from_static(&[7; 64 << 10]);
    let frames = futures_util::stream::poll_fn(move |_| {
        let _held = &gone;
        std::task::Poll::Ready(Some(Ok::<_, Error>(Frame::data(chunk.clone()))))
    });
    (StreamBody::new(frames).boxed_unsync(), heard)
}

fn in_time(limit: Duration) -> RouteRule {
    let timeouts = Timeouts { request: Some(limit), ..Timeouts::default() };
    RouteRule { timeouts, ..rule(vec![], vec![to("web")]) }
}

#[tokio::test]
async fn a_client_that_does_not_read_does_not_stop_the_clock() {
    for (http2, to_endpoint) in
        [(false, Protocol::Http), (true, Protocol::Http), (true, Protocol::Http2)]
    {
        let world = World::new(to_endpoint);
        let (told, mut bodies) = mpsc::unbounded_channel();
        let answer = move |_: Request<Incoming>, _: Arc<Seen>| {
            let (body, heard) = endless();
            told.send(heard).unwrap();
            async move { Ok::<_, Error>(Response::new(body)) }
        };
        let _web = if to_endpoint == Protocol::Http2 {
            let serve = move |io, seen| serve_http2(io, seen, answer.clone());
            world.endpoint("web", "web", serve).await
        } else {
            let serve = move |io, seen| serve_http1(io, seen, answer.clone());
            world.endpoint("web", "web", serve).await
        };
        world.rules(to_endpoint, vec![(path("/"), in_time(Duration::from_secs(1)))]);
        let io = world.connect().await;
        let (answer, _client): (_, Box<dyn std::any::Any>) = if http2 {
            let mut client = Http2::new(io).await;
            (client.send(get2("/endless")).await, Box::new(client))
        } else {
            let mut client = Http1::new(io).await;
            (client.send(get("/endless")).await, Box::new(client))
        };
        let unread = answer.unwrap();
        assert_eq!(unread.status(), 200);
        let mut gone = bodies.recv().await.unwrap();
        let told = tokio::time::timeout(PATIENCE, gone.recv()).await;
        assert!(told.is_ok(), "{http2} {to_endpoint:?}: the endpoint still sends");
        let line = world.line(&["path=\"/endless\"", "request failed"]).await;
        let words = ["reason=\"request_timeout\"", "status=200"];
        assert!(words.iter().all(|word| line.contains(word)), "{line}");
        // Who reads at last does not take it for whole.
        collect(unread).await.unwrap_err();
    }
}

#[tokio::test]
async fn uploads_that_nobody_reads_leave_room_for_others() {
    let world = World::new(Protocol::Http);
    let web = world.echo("web", "web").await;
    // Nothing is read of a request while it is delayed.
    let delay = Some((Share::ALL, Duration::from_secs(600)));
    let late = Filter::Fault(Fault { delay, ..Fault::default() });
    let rules = vec![
        (path("/late"), rule(vec![late], vec![to("web")])),
        (path("/"), rule(vec![], vec![to("web")])),
    ];
    world.rules(Protocol::Http, rules);
    let client = Http2::new(world.connect().await).await;
    let chunk = Bytes::from(vec![7; 256 << 10]);
    let stalled: Vec<_> = (0..20)
        .map(|_| {
            let mut client = client.clone();
            let (request, more) = upload("/late");
            more.send(chunk.clone()).unwrap();
            tokio::spawn(async move { (client.send(request).await, more) })
        })
        .collect();
    let ask = |number: usize| {
        let mut client = client.clone();
        let body = full(vec![b'a'; 100 << 10]);
        let request = Request::post(format!("http://web.shop/{number}")).body(body).unwrap();
        async move { client.ask(request).await.unwrap().status() }
    };
    // One after another: all that the stalled ones can send is sent at some time.
    for number in 0..10 {
        assert_eq!(ask(number).await, 200);
    }
    assert_eq!(web.seen.requests(), 10);
    assert!(stalled.iter().all(|one| !one.is_finished()));
    stalled.iter().for_each(tokio::task::JoinHandle::abort);
}

#[tokio::test]
async fn answers_that_nobody_reads_leave_room_for_others() {
    let world = World::new(Protocol::Http2);
    let web = world
        .endpoint("web", "web", |io, seen| {
            serve_http2(io, seen, |request, seen| async move {
                match request.uri().path() {
                    "/endless" => Ok(Response::new(endless().0)),
                    _ => echo(request, seen).await,
                }
            })
        })
        .await;
    // Its own windows are small, and those of its connection are not.
    let client = Http2::with_windows(world.connect().await, 64 << 10, 8 << 20).await;
    assert_eq!(client.clone().ask(get2("/")).await.unwrap().status(), 200);
    let mut unread = Vec::new();
    for _ in 0..20 {
        unread.push(client.clone().send(get2("/endless")).await.unwrap());
    }
    for _ in 0..10 {
        let post = Request::post("http://web.shop/").body(full(vec![b'a'; 100 << 10])).unwrap();
        let answer = client.clone().ask(post).await.unwrap();
        assert!(answer.body().len() > 100 << 10, "{} bytes", answer.body().len());
    }
    assert_eq!(web.seen.connects().len(), 1, "they share a connection");
    drop(unread);
}

#[tokio::test]
async fn a_switched_connection_keeps_its_place() {
    let world = World::new(Protocol::Http);
    let _web = world
        .endpoint("web", "web", |mut io, _| async move {
            let mut head = [0; 4096];
            let _ = io.read(&mut head).await;
            let answer = "HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n";
            io.write_all(answer.as_bytes()).await.unwrap();
            let (mut read, mut write) = tokio::io::split(io);
            let _ = tokio::io::copy(&mut read, &mut write).await;
            let _ = write.shutdown().await;
        })
        .await;
    let mut client = Http1::new(world.connect().await).await;
    let request = Request::get("/chat").header("host", "web.shop");
    let request = request.header("connection", "upgrade").header("upgrade", "echo");
    let answer = client.send(request.body(empty()).unwrap()).await.unwrap();
    assert_eq!(answer.status(), 101);
    let mut io = TokioIo::new(hyper::upgrade::on(answer).await.unwrap());
    io.write_all(b"hello").await.unwrap();
    let mut back = [0; 5];
    io.read_exact(&mut back).await.unwrap();
    let open = || world.workers.iter().map(|worker| worker.upstreams.open()).sum::<usize>();
    assert_eq!(open(), 1, "it is open");
    drop(io);
    wait_until("its place is free", || open() == 0).await;
}
