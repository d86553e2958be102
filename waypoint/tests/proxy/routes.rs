//! What routes ask for, carried out: backends, edits, redirects, faults, timeouts, mirrors.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::{Request, Response, StatusCode};
use model::http::{
    Abort, Fault, Filter, FixedResponse, HeaderEdits, Mirror, PathRewrite, Protocol, Redirect,
    RedirectPort, Rewrite, RouteMatch, Share, Target, Timeouts,
};
use model::{Change, Reason};

use crate::world::*;

#[tokio::test]
async fn routes_that_cannot_be_read_are_closed() {
    let world = World::new(Protocol::Http);
    let web = world.echo("web", "web").await;
    assert_eq!(world.ask(get("/")).await.status(), 200);
    let name = "shop/web.shop.svc.cluster.local";
    let closed = xds::codec::closed_routes(name, &mut xds::codec::Interner::default()).unwrap();
    world.change([Change::SetRoutes(Arc::new(closed))]);
    let before = web.seen.requests();
    let answer = world.ask(get("/")).await;
    assert_eq!(answer.status(), 500);
    assert_eq!(header(answer.headers(), "x-ambit-reason"), "unsupported");
    assert_eq!(web.seen.requests(), before);
}

#[tokio::test]
async fn rules_choose_backends_and_change_requests() {
    let world = World::new(Protocol::Http);
    let (_web, v2) = (world.echo("web", "web").await, world.echo("v2", "v2").await);
    world.speak("v2", Protocol::Http);
    let edits =
        HeaderEdits { set: vec![("x-mesh".into(), "yes".into())], ..HeaderEdits::default() };
    let answer = HeaderEdits { add: vec![("x-via".into(), "a".into())], ..HeaderEdits::default() };
    let rewrite =
        Rewrite { host: Some("new.host".into()), path: Some(PathRewrite::Segments("/b".into())) };
    let filters = vec![
        Filter::RequestHeaders(edits),
        Filter::ResponseHeaders(answer),
        Filter::Rewrite(rewrite),
    ];
    world.rules(
        Protocol::Http,
        vec![
            (path("/a"), rule(filters, vec![to("v2")])),
            (path("/"), rule(vec![], vec![to("web")])),
        ],
    );
    let response = world.ask(get("/a/x?q=1")).await;
    let body = text(&response);
    assert!(body.starts_with("GET /b/x?q=1 HTTP/1.1\n"), "{body}");
    assert!(body.contains("x-mesh: yes") && body.contains("host: new.host"), "{body}");
    assert_eq!(header(response.headers(), "x-via"), "a");
    assert_eq!(v2.seen.requests(), 1);
    let line = world.line(&["path=\"/a/x?q=1\""]).await;
    assert!(
        line.contains("route=\"HTTPRoute/shop/web\"") && line.contains("route.rule=\"rules[0]\""),
        "{line}"
    );
    let response = world.ask(get("/other")).await;
    assert!(text(&response).starts_with("GET /other"), "{response:?}");
    assert_eq!(v2.seen.requests(), 1);
}

#[tokio::test]
async fn what_the_proxy_answers_itself() {
    let world = World::new(Protocol::Http);
    let check = |name: &'static str,
                 filters: Vec<Filter>,
                 backends: Vec<model::http::Backend>,
                 status: u16,
                 want: (&'static str, &'static str)| {
        world.rules(Protocol::Http, vec![(path("/here"), rule(filters, backends))]);
        let world = &world;
        async move {
            let response = world.ask(get("/here/x?q=1")).await;
            assert_eq!(response.status().as_u16(), status, "{name}");
            assert_eq!(header(response.headers(), want.0), want.1, "{name}");
        }
    };
    let redirect = Redirect {
        scheme: Some("https".into()),
        host: Some("example.com".into()),
        port: RedirectPort::Derived,
        path: None,
        status: 302,
    };
    let location = ("location", "https://example.com/here/x?q=1");
    check("redirect", vec![Filter::Redirect(redirect)], vec![], 302, location).await;
    let fixed = FixedResponse { status: 418, body: "teapot".into() };
    check("fixed", vec![Filter::Respond(fixed)], vec![], 418, ("x-ambit-reason", "")).await;
    let reason = |code| ("x-ambit-reason", code);
    let target = Target::Invalid { message: "no such Service".into() };
    let invalid = model::http::Backend { weight: 1, target, filters: vec![] };
    check("invalid backend", vec![], vec![invalid], 500, reason("bad_backend")).await;
    check("no backend", vec![], vec![], 500, reason("bad_backend")).await;
    check("unknown service", vec![], vec![to("nowhere")], 500, reason("bad_backend")).await;
    check("no endpoint", vec![], vec![to("web")], 503, reason("no_healthy_endpoint")).await;
    let fail = Filter::Fail { reason: Reason::BadFilter, message: "x".into() };
    check("bad filter", vec![fail], vec![to("web")], 500, reason("bad_filter")).await;
    let abort = Fault { abort: Some((Share::ALL, Abort::Http(555))), ..Fault::default() };
    check("abort", vec![Filter::Fault(abort)], vec![to("web")], 555, reason("fault")).await;
    world.rules(Protocol::Http, vec![(path("/there"), rule(vec![], vec![to("web")]))]);
    let response = world.ask(get("/here")).await;
    assert_eq!(response.status(), 404);
    assert_eq!(header(response.headers(), "x-ambit-reason"), "no_route");
    let line = world.line(&["status=555"]).await;
    assert!(
        line.contains("reason=\"fault\"") && line.contains("route=\"HTTPRoute/shop/web\""),
        "{line}"
    );
    let (page, _) = world.metrics.render();
    let counted = "ambit_refusals_total{reason=\"bad_backend\",reporter=\"waypoint\"} 3";
    assert!(page.contains(counted), "{page}");
}

#[tokio::test]
async fn faults_delay_and_reset() {
    let world = World::new(Protocol::Http);
    let _web = world.echo("web", "web").await;
    let delay = Duration::from_millis(200);
    let slow = Fault { delay: Some((Share::ALL, delay)), ..Fault::default() };
    world
        .rules(Protocol::Http, vec![(path("/"), rule(vec![Filter::Fault(slow)], vec![to("web")]))]);
    let begun = Instant::now();
    assert_eq!(world.ask(get("/")).await.status(), 200);
    assert!(begun.elapsed() >= delay);
    let reset = Fault { abort: Some((Share::ALL, Abort::Reset)), ..Fault::default() };
    world.rules(
        Protocol::Http,
        vec![(path("/"), rule(vec![Filter::Fault(reset)], vec![to("web")]))],
    );
    let mut client = Http1::new(world.connect().await).await;
    client.ask(get("/")).await.unwrap_err();
    let mut client = Http2::new(world.connect().await).await;
    client.ask(get2("/")).await.unwrap_err();
    // Only the stream, not the connection.
    world.rules(Protocol::Http, vec![(path("/"), rule(vec![], vec![to("web")]))]);
    assert_eq!(client.ask(get2("/")).await.unwrap().status(), 200);
    let line = world.line(&["reason=\"fault\"", "HTTP/2"]).await;
    assert!(line.contains("status=0"), "{line}");
}

#[tokio::test]
async fn a_route_has_its_time() {
    let world = World::new(Protocol::Http);
    // Answers when it is told to, and takes as long with the second half of its body.
    let web = world
        .endpoint("web", "web", |io, seen| {
            serve_http1(io, seen, |request, seen| async move {
                if request.uri().path() == "/half" {
                    let frames = futures_util::stream::unfold(0, move |n| {
                        let seen = seen.clone();
                        async move {
                            if n > 0 {
                                seen.go_on.notified().await;
                            }
                            Some((Ok::<_, Error>(hyper::body::Frame::data("x".into())), n + 1))
                        }
                    });
                    let body = http_body_util::StreamBody::new(frames);
                    return Ok(Response::new(http_body_util::BodyExt::boxed_unsync(body)));
                }
                seen.go_on.notified().await;
                Ok(Response::new(empty()))
            })
        })
        .await;
    // Long enough for a head to come through a busy machine.
    let limit = Some(Duration::from_secs(2));
    for timeouts in [
        Timeouts { request: limit, backend_request: None },
        Timeouts { request: None, backend_request: limit },
    ] {
        let with = |filters| model::http::RouteRule { timeouts, ..rule(filters, vec![to("web")]) };
        world.rules(Protocol::Http, vec![(path("/"), with(vec![]))]);
        let response = world.ask(get("/slow")).await;
        assert_eq!(response.status(), 504, "{timeouts:?}");
        assert_eq!(header(response.headers(), "x-ambit-reason"), "request_timeout");
        // The head was sent: what is left is to break off.
        let mut client = Http1::new(world.connect().await).await;
        client.ask(get("/half")).await.unwrap_err();
        world.line(&["path=\"/half\"", "request_timeout", "status=200"]).await;
        // Of a request's whole time a delay is a part, of a backend's not.
        let delay = Fault { delay: Some((Share::ALL, Duration::from_secs(5))), ..Fault::default() };
        if timeouts.request.is_some() {
            world.rules(Protocol::Http, vec![(path("/"), with(vec![Filter::Fault(delay)]))]);
            assert_eq!(world.ask(get("/slow")).await.status(), StatusCode::GATEWAY_TIMEOUT);
        }
    }
    let requests = web.seen.requests();
    world.rules(Protocol::Http, vec![(path("/"), rule(vec![], vec![to("web")]))]);
    let ask = world.ask(get("/"));
    let mut ask = std::pin::pin!(ask);
    let answer = loop {
        tokio::select! {
            answer = &mut ask => break answer,
            // A request that was given up may still be there to hear it.
            () = tokio::time::sleep(Duration::from_millis(20)) => web.seen.go_on.notify_one(),
        }
    };
    assert_eq!(answer.status(), 200);
    assert_eq!(web.seen.requests(), requests + 1);
}

#[tokio::test]
async fn mirrors_get_a_copy_and_disturb_nobody() {
    let world = World::new(Protocol::Http);
    let web = world.echo("web", "web").await;
    let (copies, mut heard) = tokio::sync::mpsc::unbounded_channel();
    let _copy = world
        .endpoint("copy", "copy", move |io, seen| {
            let copies = copies.clone();
            serve_http1(io, seen, move |request, seen| {
                let copies = copies.clone();
                async move {
                    let answer = echo(request, seen).await?;
                    let bytes =
                        http_body_util::BodyExt::collect(answer.into_body()).await?.to_bytes();
                    copies.send(String::from_utf8(bytes.to_vec()).unwrap()).unwrap();
                    let mut answer = Response::new(full("nobody reads this"));
                    *answer.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
                    Ok(answer)
                }
            })
        })
        .await;
    world.speak("copy", Protocol::Http);
    let mirror = |service: &str| {
        let target = Target::Service { service: key(service), port: 80, subset: None };
        Filter::Mirror(Mirror { target, share: Share::ALL })
    };
    // The second mirror is not there.
    let filters = vec![mirror("copy"), mirror("nowhere")];
    world.rules(Protocol::Http, vec![(RouteMatch::default(), rule(filters, vec![to("web")]))]);
    let mut client = Http1::new(world.connect().await).await;
    for body in ["", "hello", &"x".repeat(100_000)] {
        let request =
            Request::post("/m").header("host", "web").body(full(body.to_owned())).unwrap();
        let answer = client.ask(request).await.unwrap();
        assert_eq!(answer.status(), 200);
        let copied = tokio::time::timeout(PATIENCE, heard.recv()).await.unwrap().unwrap();
        assert!(copied.starts_with("POST /m HTTP/1.1\n"), "{copied}");
        let same = copied.split("\n\n").nth(1).unwrap_or_default();
        assert!(same == body, "{} bytes of {}", same.len(), body.len());
    }
    assert_eq!(web.seen.requests(), 3);
}
