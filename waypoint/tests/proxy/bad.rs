//! Clients and endpoints that misbehave: the right status, a reason, and nobody else is hurt.

use std::sync::Arc;

use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use model::http::{Protocol, Target};
use model::{Change, Reason};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::http1::until;
use crate::world::*;

#[tokio::test]
async fn endpoints_that_break_off() {
    let world = World::new(Protocol::Http);
    let answer = Arc::new(std::sync::Mutex::new(""));
    let said = answer.clone();
    let _web = world
        .endpoint("web", "web", move |mut io, _| {
            let answer = *said.lock().unwrap();
            async move {
                let _ = io.read(&mut [0; 4096]).await;
                let _ = io.write_all(answer.as_bytes()).await;
                let _ = io.shutdown().await;
            }
        })
        .await;
    for (said, status) in [
        ("", Some(503)),
        ("HTTP/1.1 200 OK\r\ncontent-le", Some(503)),
        ("SSH-2.0-x\r\n", Some(503)),
        ("HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf", None),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhal", None),
        (
            "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n",
            Some(503),
        ),
    ] {
        *answer.lock().unwrap() = said;
        let mut client = Http1::new(world.connect().await).await;
        let got = client.ask(get(&format!("/{}", said.len()))).await;
        assert_eq!(got.as_ref().ok().map(|a| a.status().as_u16()), status, "{said:?}: {got:?}");
        let path = format!("path=\"/{}\"", said.len());
        world.line(&[&path, "reason=\"upstream_broken\""]).await;
    }
}

#[tokio::test]
async fn endpoints_of_http2_that_break_off() {
    let world = World::new(Protocol::Http2);
    // Sends four bytes, and then, where a half is asked for, resets the stream at a word.
    let web = world
        .endpoint("web", "web", |io, seen| {
            serve_http2(io, seen, |request, seen| async move {
                let half = request.uri().path() == "/half";
                let first = async { Ok::<_, Error>(Frame::data("half".into())) };
                let rest = async move {
                    if half {
                        seen.go_on.notified().await;
                        return Err("broken".into());
                    }
                    Ok(Frame::data("...all".into()))
                };
                let frames = futures_util::stream::once(first);
                let frames =
                    futures_util::StreamExt::chain(frames, futures_util::stream::once(rest));
                Ok(http::Response::new(StreamBody::new(frames).boxed_unsync()))
            })
        })
        .await;
    for http2 in [true, false] {
        let io = world.connect().await;
        // The head has come: what is left is to break off, which is a reset of this stream, or of this connection.
        let whole = if http2 {
            let mut client = Http2::new(io).await;
            let half = client.send(get2("/half")).await.unwrap();
            web.seen.go_on.notify_one();
            collect(half).await.unwrap_err();
            client.ask(get2("/whole")).await.unwrap()
        } else {
            let half = Http1::new(io).await.send(get("/half")).await.unwrap();
            web.seen.go_on.notify_one();
            collect(half).await.unwrap_err();
            world.ask(get("/whole")).await
        };
        assert_eq!(text(&whole), "half...all", "{http2}");
        let line = world.take_line(&["path=\"/half\"", "request failed"]).await;
        let words = ["reason=\"upstream_broken\"", "status=200"];
        assert!(words.iter().all(|word| line.contains(word)), "{line}");
    }
}

#[tokio::test]
async fn a_route_to_itself_is_no_loop() {
    let world = World::new(Protocol::Http);
    let (web, other) = (world.echo("web", "web").await, world.echo("other", "other").await);
    world.speak("other", Protocol::Http);
    // `web` to `web`: its endpoints, as they are.
    world.rules(Protocol::Http, vec![(path("/"), rule(vec![], vec![to("web")]))]);
    assert_eq!(world.ask(get("/self")).await.status(), 200);
    assert_eq!((web.seen.requests(), other.seen.requests()), (1, 0));
    // `web` to `other` and `other` to `web`: of a backend no routes are asked.
    world.rules(Protocol::Http, vec![(path("/"), rule(vec![], vec![to("other")]))]);
    world.rules_of("other", Protocol::Http, vec![(path("/"), rule(vec![], vec![to("web")]))]);
    assert_eq!(world.ask(get("/each-other")).await.status(), 200);
    assert_eq!((web.seen.requests(), other.seen.requests()), (1, 1));
    // To the waypoint's own Service: its port is the mesh's own, and nothing is called.
    let own = Target::Service { service: key("waypoint"), port: 80, subset: None };
    let own = model::http::Backend { weight: 1, target: own, filters: vec![] };
    world.rules(Protocol::Http, vec![(path("/"), rule(vec![], vec![own]))]);
    let answer = world.ask(get("/waypoint")).await;
    assert_eq!(answer.status(), 403, "{answer:?}");
    assert_eq!(header(answer.headers(), "x-ambit-reason"), "mesh_port");
    let line = world.take_line(&["path=\"/waypoint\""]).await;
    assert!(line.contains("reason=\"mesh_port\"") && line.contains("status=403"), "{line}");
    assert!(line.contains("route=\"HTTPRoute/shop/web\""), "{line}");
}

#[tokio::test]
async fn a_backend_that_is_missing_is_named_where_the_operator_looks() {
    let world = World::new(Protocol::Http);
    let web = world.echo("web", "web").await;
    let lost = Target::Invalid { message: "there is no Service shop/lost".into() };
    let lost = model::http::Backend { weight: 1, target: lost, filters: vec![] };
    let rules = vec![
        (path("/lost"), rule(vec![], vec![lost])),
        (path("/gone"), rule(vec![], vec![to("gone")])),
        (path("/"), rule(vec![], vec![to("web")])),
    ];
    world.rules(Protocol::Http, rules);
    for (at, words) in [("/lost", "there is no Service shop/lost"), ("/gone", "gone.shop.svc")] {
        let answer = world.ask(get(at)).await;
        assert_eq!(answer.status(), 500, "{at}");
        assert_eq!(header(answer.headers(), "x-ambit-reason"), "bad_backend", "{at}");
        assert!(!text(&answer).contains("shop"), "the client learns a name: {answer:?}");
        let line = world.take_line(&[&format!("path=\"{at}\""), "reason=\"bad_backend\""]).await;
        assert!(line.contains(words) && line.contains("route.rule=\"rules[0]\""), "{line}");
        // Other rules of the same route serve.
        assert_eq!(world.ask(get("/")).await.status(), 200);
    }
    assert_eq!(web.seen.requests(), 2);
}

#[tokio::test]
async fn another_endpoint_is_asked_when_nothing_was_sent() {
    let world = World::new(Protocol::Http);
    let (a, b) = (world.echo("a", "web").await, world.echo("b", "web").await);
    let refuse = Some((StatusCode::SERVICE_UNAVAILABLE, Reason::ConnectFailed));
    *a.seen.refuse.lock().unwrap() = refuse;
    let post = || Request::post("/").header("host", "web").body(full("body")).unwrap();
    for _ in 0..10 {
        let answer = world.ask(post()).await;
        assert_eq!(answer.status(), 200);
        assert!(text(&answer).ends_with("\n\nbody"));
    }
    assert_eq!((a.seen.requests(), b.seen.requests()), (0, 10));
    // A denial is not tried around.
    *a.seen.refuse.lock().unwrap() = Some((StatusCode::UNAUTHORIZED, Reason::PolicyDeny));
    *b.seen.refuse.lock().unwrap() = Some((StatusCode::UNAUTHORIZED, Reason::PolicyDeny));
    let tunnel = world.tunnel("another").await;
    let stream = tunnel.open(WEB, &Default::default()).await.unwrap();
    let mut client = Http1::new(hbone::TunnelIo::opened(stream)).await;
    let answer = client.ask(post()).await.unwrap();
    assert_eq!(answer.status(), 503);
    assert_eq!(header(answer.headers(), "x-ambit-reason"), "tunnel_refused");
}

#[tokio::test]
async fn an_endpoint_whose_certificate_is_anothers_gets_nothing() {
    let world = World::new(Protocol::Http);
    let web = world.echo("web", "web").await;
    let snapshot = world.store.load_full();
    let now = snapshot.workload(&model::WorkloadUid("web".into())).unwrap();
    let other = model::Workload { service_account: "other".into(), ..(**now).clone() };
    world.change([Change::SetWorkload(Arc::new(other))]);
    let answer = world.ask(get("/")).await;
    assert_eq!(answer.status(), 503);
    assert_eq!(header(answer.headers(), "x-ambit-reason"), "peer_identity_mismatch");
    assert_eq!(web.seen.requests(), 0);
}

#[tokio::test]
async fn a_head_that_never_ends_does_not_hold_others() {
    let world = World::new(Protocol::Http);
    let web = world.echo("web", "web").await;
    let mut slow = world.connect().await;
    slow.write_all(b"GET / HTTP/1.1\r\nhost: web\r\n").await.unwrap();
    for _ in 0..3 {
        assert_eq!(world.ask(get("/")).await.status(), 200);
    }
    slow.write_all(b"\r\n").await.unwrap();
    until(&mut slow, "HTTP/1.1 200 OK").await;
    // A client that goes in the middle of its body: the endpoint hears of it, and nothing is answered.
    let mut gone = world.connect().await;
    gone.write_all(b"POST /gone HTTP/1.1\r\nhost: web\r\ncontent-length: 100\r\n\r\nhalf")
        .await
        .unwrap();
    wait_until("the endpoint to be asked", || web.seen.requests() == 5).await;
    gone.reset();
    world.line(&["path=\"/gone\"", "request failed"]).await;
}
