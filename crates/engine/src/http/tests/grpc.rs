//! Rows G: gRPC through GRPCRoutes.

use http::Response;

use super::*;

const GRPC: (&str, &str) = ("content-type", "application/grpc");

fn snapshot(backends: Vec<Backend>, matches: Vec<RouteMatch>) -> Snapshot {
    world(vec![set(RouteKind::Grpc, vec![rule(vec![], backends)], matches)])
}

fn check(row: &str, m: RouteMatch, path: &str, want: &str) {
    let asked = request(&format!("POST {path}"), &[GRPC]);
    let plan = ask(&snapshot(vec![backend("b", 1)], vec![m]), &asked, 0);
    assert_eq!(short(&plan, &asked), want, "{row} {path}");
}

#[test]
fn methods() {
    let no = "grpc 12 no_route";
    check("G1", exact("/pkg.Echo/Say"), "/pkg.Echo/Say", "b /pkg.Echo/Say");
    check("G1", exact("/pkg.Echo/Say"), "/pkg.Echo/Tell", no);
    check("G1", exact("/pkg.Echo/Say"), "/pkg.echo/Say", no);
    check("G1: a service", prefix("/pkg.Echo"), "/pkg.Echo/Say", "b /pkg.Echo/Say");
    check("G1: a service", prefix("/pkg.Echo"), "/pkg.Echo2/Say", no);
    let method = by_path(PathMatch::GrpcMethod("Say".into()));
    check("G1: a method", method.clone(), "/pkg.Echo/Say", "b /pkg.Echo/Say");
    check("G1: a method", method.clone(), "/Echo/Say", "b /Echo/Say");
    check("G1: a method", method.clone(), "/pkg.Echo/SayIt", no);
    check("G1: a method", method.clone(), "/a/b/Say", no);
    check("G1: a method", method.clone(), "//Say", no);
    check("G1: a method", method, "/Say", no);
    check("G2", any(), "/any.Service/Method", "b /any.Service/Method");
}

#[test]
fn order_decides() {
    let rules = ["b0", "b1", "b2"].map(|b| rule(vec![], vec![backend(b, 1)]));
    let matches = [exact("/a.B/C"), prefix("/a.B"), by_path(PathMatch::GrpcMethod("C".into()))];
    let matches = (0..).zip(matches).map(|(rule, m)| RouteMatch { rule, ..m }).collect();
    let snapshot = world(vec![set(RouteKind::Grpc, rules.to_vec(), matches)]);
    for (path, want) in [("/a.B/C", "b0"), ("/a.B/D", "b1"), ("/x.Y/C", "b2")] {
        let asked = request(&format!("POST {path}"), &[GRPC]);
        let want = format!("{want} {path}");
        assert_eq!(short(&ask(&snapshot, &asked, 0), &asked), want, "G3");
    }
}

#[test]
fn refusals_in_the_words_of_the_client() {
    let invalid = || Backend {
        target: Target::Invalid { message: "there is no Service shop/gone".into() },
        ..backend("gone", 1)
    };
    let say = |backends, matches, headers: &[(&str, &str)], line: &str| {
        let asked = request(line, headers);
        short(&ask(&snapshot(backends, matches), &asked, 0), &asked)
    };
    let post = "POST /a.B/C";
    assert_eq!(say(vec![invalid()], vec![any()], &[GRPC], post), "grpc 14 bad_backend", "G5");
    assert_eq!(say(vec![], vec![any()], &[GRPC], post), "grpc 14 bad_backend", "G5");
    assert_eq!(say(vec![], vec![], &[GRPC], post), "grpc 12 no_route", "G6");
    assert_eq!(say(vec![], vec![], &[], post), "grpc 12 no_route", "G6: a POST that does not say");
    // Who speaks no gRPC is not told by gRPC's status under a 200.
    assert_eq!(say(vec![], vec![], &[], "GET /"), NO, "G6");
    assert_eq!(say(vec![], vec![], &[("content-type", "text/plain")], post), NO, "G6");
    // gRPC through an HTTPRoute.
    let http = world(vec![set(RouteKind::Http, vec![], vec![])]);
    let asked = request(post, &[GRPC]);
    assert_eq!(short(&ask(&http, &asked, 0), &asked), "grpc 12 no_route", "G6");
}

#[test]
fn trailers_only() {
    let asked = request("POST /a.B/C", &[GRPC]);
    let plan = ask(&snapshot(vec![], vec![any()]), &asked, 0);
    let HttpAction::Answer(answer) = plan.action else { panic!() };
    assert_eq!(answer.status, 200, "G5");
    assert_eq!(answer.headers["content-type"], "application/grpc", "G5");
    assert_eq!(answer.headers["grpc-status"], "14", "G5");
    assert!(answer.headers.contains_key("grpc-message") && answer.body.is_empty(), "G5");
}

#[test]
fn metadata() {
    let edits = HeaderEdits { set: vec![("x-a".into(), "1".into())], ..HeaderEdits::default() };
    let filters = vec![Filter::RequestHeaders(edits.clone()), Filter::ResponseHeaders(edits)];
    let rules = vec![rule(filters, vec![backend("b", 1)])];
    let matches = vec![any().header("tenant", "one")];
    let snapshot = world(vec![set(RouteKind::Grpc, rules, matches)]);
    let asked = request(
        "POST http://web/a.B/C",
        &[GRPC, ("te", "trailers"), ("tenant", "one"), ("trace-bin", "AAEC/w==")],
    );
    let plan = ask(&snapshot, &asked, 0);
    let mut sent = asked;
    plan.edit_request(&mut sent);
    for (name, value) in [("x-a", "1"), ("te", "trailers"), ("trace-bin", "AAEC/w==")] {
        assert_eq!(sent.headers[name], value, "G7");
    }
    let mut answered =
        Response::builder().header("grpc-status", "0").body(()).unwrap().into_parts().0;
    plan.edit_response(&mut answered);
    assert_eq!(answered.headers["x-a"], "1", "G7");
    assert_eq!(answered.headers["grpc-status"], "0", "G7");
    let other = request("POST /a.B/C", &[GRPC, ("tenant", "two")]);
    assert_eq!(short(&ask(&snapshot, &other, 0), &other), "grpc 12 no_route", "G7");
}

#[test]
fn shares() {
    let snapshot = snapshot(vec![backend("v1", 70), backend("v2", 30)], vec![any()]);
    let asked = request("POST /a.B/C", &[GRPC]);
    let first =
        (0..500).filter(|r| short(&ask(&snapshot, &asked, *r), &asked).starts_with("v1 ")).count();
    assert!((325..=375).contains(&first), "G8: {first} of 500");
}

#[test]
fn backends_speak_http2() {
    let http2 = |snapshot: &Snapshot, headers: &[(&str, &str)]| match ask(
        snapshot,
        &request("POST /", headers),
        0,
    )
    .action
    {
        HttpAction::Forward { http2, .. } => http2,
        other => panic!("{other:?}"),
    };
    assert!(http2(&snapshot(vec![backend("b", 1)], vec![any()]), &[GRPC]), "G9");
    assert!(http2(&snapshot(vec![backend("b", 1)], vec![any()]), &[]), "G9");
    assert!(http2(&Snapshot::default(), &[GRPC]), "G9: without a route");
    assert!(!http2(&Snapshot::default(), &[]), "G9");
}

#[test]
fn aborts() {
    let fault =
        |abort| Filter::Fault(Fault { abort: Some((Share::ALL, abort)), ..Fault::default() });
    let check = |abort, headers: &[(&str, &str)], want: &str| {
        let rules = vec![rule(vec![fault(abort)], vec![backend("b", 1)])];
        let snapshot = world(vec![set(RouteKind::Grpc, rules, vec![any()])]);
        let asked = request("POST /", headers);
        assert_eq!(short(&ask(&snapshot, &asked, 0), &asked), want, "{abort:?}");
    };
    check(Abort::Grpc(8), &[GRPC], "grpc 8 fault");
    check(Abort::Grpc(8), &[("content-type", "text/plain")], "429 fault");
    check(Abort::Http(503), &[GRPC], "503 fault");
    check(Abort::Reset, &[GRPC], "reset fault");
}
