//! Requests that two readers could take for different requests: they are refused with a reason, nothing of them reaches an
//! endpoint as another request, and others are served meanwhile.

use hbone::TunnelIo;
use http::{Request, StatusCode};
use model::http::Protocol;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::frames::{Frames, Heard, Pair};
use crate::world::*;

/// What is left of a connection: all that comes until it ends.
async fn rest(io: &mut TunnelIo) -> (String, bool) {
    let mut all = Vec::new();
    let read = tokio::time::timeout(PATIENCE, io.read_to_end(&mut all)).await;
    (String::from_utf8_lossy(&all).into_owned(), read.is_ok())
}

/// Asks, and wants one answer with this status and reason, in the log too, and the end of the connection: where the next
/// request begins, nobody knows.
async fn refused(world: &World, name: &str, request: &[u8], status: &str, reason: &str) {
    let mut io = world.connect().await;
    io.write_all(request).await.unwrap();
    let (answer, ended) = rest(&mut io).await;
    assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{name}: {answer}");
    assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{name}: {answer}");
    assert!(answer.contains(&format!("\r\nx-ambit-reason: {reason}\r\n")), "{name}: {answer}");
    assert!(answer.contains(&format!("\r\n\r\n{reason}: ")), "{name} has no words: {answer}");
    assert!(ended, "{name}: the connection stays open");
    let line = world.take_line(&["request failed", &format!("reason=\"{reason}\"")]).await;
    assert!(line.contains(&format!("status={status}")), "{name}: {line}");
}

const SMUGGLED: &str = "GET /admin HTTP/1.1\r\nhost: web\r\n\r\n";

fn post(headers: &str, body: &str) -> String {
    format!("POST / HTTP/1.1\r\nhost: web\r\n{headers}\r\n\r\n{body}")
}

#[tokio::test]
async fn requests_that_could_be_two_are_refused() {
    let world = World::new(Protocol::Http);
    let web = world.echo("web", "web").await;
    let chunks = &format!("0\r\n\r\n{SMUGGLED}");
    let te = |value: &str| post(&format!("transfer-encoding: {value}"), chunks);
    let length = |value: &str| post(&format!("content-length: {value}"), "abcd");
    let rows = [
        ("CL.TE", post("content-length: 4\r\ntransfer-encoding: chunked", chunks)),
        ("TE.CL", post("Transfer-Encoding: chunked\r\nContent-Length: 4", chunks)),
        ("CL.0 and TE", post("content-length: 0\r\ntransfer-encoding: chunked", chunks)),
        ("two lengths", post("content-length: 4\r\ncontent-length: 5", "abcde")),
        ("a list of lengths", length("4, 5")),
        ("a signed length", length("+4")),
        ("a negative length", length("-1")),
        ("a length in hex", length("0x4")),
        ("two numbers", length("4 4")),
        ("no number", length("")),
        ("a length beyond 64 bits", length("99999999999999999999")),
        ("TE twice", post("transfer-encoding: chunked\r\ntransfer-encoding: identity", chunks)),
        ("TE in parts", te("gzip, chunked")),
        ("TE with something behind", te("chunked, identity")),
        ("TE with a tab", post("transfer-encoding:\x0bchunked", chunks)),
        ("TE that is another", te("xchunked")),
        ("TE with a parameter", te("chunked;q=1")),
        ("TE in quotes", te("\"chunked\"")),
        ("TE without a value", te("")),
        ("a space before TE's colon", post("transfer-encoding : chunked", chunks)),
        ("TE behind a space", post("x: y\r\n transfer-encoding: chunked", chunks)),
        ("TE on the next line", post("transfer-encoding:\r\n chunked", chunks)),
        (
            "TE in HTTP/1.0",
            te("chunked").replace("HTTP/1.1\r\nhost: web\r\nt", "HTTP/1.0\r\nhost: web\r\nt"),
        ),
        ("obs-fold", post("x: a\r\n b", "")),
        ("obs-fold with a tab", post("x: a\r\n\tb", "")),
        ("space before the colon", post("content-length : 4", "abcd")),
        ("a header without a colon", post("content-length 4", "abcd")),
        ("a header without a name", post(": 4", "abcd")),
        ("bare CR", post("x: a\rtransfer-encoding: chunked", "")),
        ("NUL", post("x: a\0b", "")),
        ("NUL in a name", post("x\0: a", "")),
        ("two hosts", "GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n".to_owned()),
        ("no host", "GET / HTTP/1.1\r\n\r\n".to_owned()),
        ("another host", "GET http://a/ HTTP/1.1\r\nhost: b\r\n\r\n".to_owned()),
        ("a user in the host", "GET / HTTP/1.1\r\nhost: a@b\r\n\r\n".to_owned()),
        ("a space in the target", "GET /a b HTTP/1.1\r\nhost: a\r\n\r\n".to_owned()),
        ("two spaces", "GET  / HTTP/1.1\r\nhost: a\r\n\r\n".to_owned()),
        ("HTTP/1.2", "GET / HTTP/1.2\r\nhost: a\r\n\r\n".to_owned()),
        ("HTTP/0.9", "GET /\r\n\r\n".to_owned()),
        (
            "a length that connection names",
            post("connection: content-length\r\ncontent-length: 4", "abcd"),
        ),
        ("CONNECT", "CONNECT web:80 HTTP/1.1\r\nhost: web:80\r\n\r\n".to_owned()),
        ("no HTTP", "\x16\x03\x01\x02\0\x01\r\n\r\n".to_owned()),
    ];
    for (name, request) in rows {
        refused(&world, name, request.as_bytes(), "400", "bad_http").await;
    }
    let large = post(&format!("x: {}", "a".repeat(70_000)), "");
    refused(&world, "a large head", large.as_bytes(), "431", "limit").await;
    let many: String = (0..150).map(|n| format!("x-{n}: 1\r\n")).collect();
    refused(&world, "many headers", post(many.trim_end(), "").as_bytes(), "431", "limit").await;
    let more: String = (0..250).map(|n| format!("x-{n}: 1\r\n")).collect();
    refused(&world, "more headers", post(more.trim_end(), "").as_bytes(), "431", "limit").await;
    assert_eq!(web.seen.requests(), 0, "none of it went on");
    // And others are served.
    assert_eq!(world.ask(get("/")).await.status(), 200);
}

#[tokio::test]
async fn what_only_looks_like_two_requests_goes_on_as_one() {
    let world = World::new(Protocol::Http);
    let web = world.echo("web", "web").await;
    let rows = [
        // RFC 9112, 2.2: a line may end without CR; what goes on has it.
        ("bare LF", "POST /one HTTP/1.1\nhost: web\ncontent-length: 2\n\nab".to_owned(), "ab"),
        // An unknown name is one header more; the request has no body, and what follows it is the next.
        (
            "another name",
            "GET /one HTTP/1.1\r\nhost: web\r\ntransfer_encoding: chunked\r\n\r\n".to_owned(),
            "",
        ),
        (
            "spaces",
            "POST /one HTTP/1.1\r\nhost: web\r\ncontent-length:  2 \r\n\r\nab".to_owned(),
            "ab",
        ),
        (
            "chunk extensions",
            post("transfer-encoding: chunked", "2;a=b;c=\"d\"\r\nab\r\n0\r\n\r\n")
                .replace("POST / ", "POST /one "),
            "ab",
        ),
        (
            "trailers",
            post("transfer-encoding: Chunked", "2\r\nab\r\n0\r\nx-ambit-reason: a\r\n\r\n")
                .replace("POST / ", "POST /one "),
            "ab",
        ),
    ];
    for (number, (name, request, body)) in (1..).zip(rows) {
        let mut io = world.connect().await;
        io.write_all(request.as_bytes()).await.unwrap();
        let answer = crate::http1::until(&mut io, &format!("\n\n{body}")).await;
        assert!(answer.starts_with("HTTP/1.1 200 OK"), "{name}: {answer}");
        assert!(answer.contains("/one HTTP/1.1\n"), "{name}: {answer}");
        assert_eq!(web.seen.requests(), number, "{name}");
    }
}

#[tokio::test]
async fn chunks_that_two_readers_would_cut_differently_end_the_request() {
    let world = World::new(Protocol::Http);
    // Answers what came whole, as another request than the one that was meant would.
    let web = world.echo("web", "web").await;
    let rows = [
        ("a size beyond 64 bits", format!("fffffffffffffffff\r\nab\r\n0\r\n\r\n{SMUGGLED}")),
        ("a size that wraps to two", format!("10000000000000002\r\nab\r\n0\r\n\r\n{SMUGGLED}")),
        ("a signed size", format!("+2\r\nab\r\n0\r\n\r\n{SMUGGLED}")),
        ("a size in 0x", format!("0x2\r\nab\r\n0\r\n\r\n{SMUGGLED}")),
        ("no size", format!("\r\nab\r\n0\r\n\r\n{SMUGGLED}")),
        ("bare LF behind a size", format!("2\nab\r\n0\r\n\r\n{SMUGGLED}")),
        ("bare LF in an extension", format!("2;a\nab\r\n0\r\n\r\n{SMUGGLED}")),
        ("bare LF behind a chunk", format!("2\r\nab\n0\r\n\r\n{SMUGGLED}")),
        ("a chunk that is longer", format!("2\r\nabcd\r\n0\r\n\r\n{SMUGGLED}")),
        ("endless extensions", format!("2;{}\r\nab\r\n0\r\n\r\n{SMUGGLED}", "a".repeat(70_000))),
        ("endless trailers", format!("0\r\n{}\r\n{SMUGGLED}", "x: y\r\n".repeat(20_000))),
    ];
    for (name, body) in rows {
        let mut io = world.connect().await;
        let request = post("transfer-encoding: chunked", &body);
        // The other end may be gone before it is all written.
        let _ = io.write_all(request.as_bytes()).await;
        let (answer, ended) = rest(&mut io).await;
        assert!(answer.starts_with("HTTP/1.1 400"), "{name}: {answer}");
        assert!(answer.contains("x-ambit-reason: bad_http"), "{name}: {answer}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{name}: {answer}");
        assert!(ended, "{name}: the connection stays open");
        world.take_line(&["request failed", "reason=\"bad_http\"", "status=400"]).await;
    }
    assert_eq!(world.ask(get("/")).await.status(), 200);
    for line in web.seen.lines() {
        assert!(!line.contains("/admin"), "smuggled: {line}");
    }
}

#[tokio::test]
async fn http2_brings_nothing_that_http1_would_read_otherwise() {
    let world = World::new(Protocol::Http);
    let web = world.echo("web", "web").await;
    // Answers of ours have a reason; of malformed requests the library that reads HTTP/2 resets the stream (RFC 9113, 8.1.1).
    let ours = [
        ("another host", vec![("host", "other")]),
        ("two hosts", vec![("host", "web.shop"), ("host", "web.shop")]),
        ("two lengths", vec![("content-length", "0"), ("content-length", "0")]),
    ];
    for (name, headers) in ours {
        let mut request = Request::get("http://web.shop/");
        for (header, value) in headers {
            request = request.header(header, value);
        }
        let mut client = Http2::new(world.connect().await).await;
        let answer = client.ask(request.body(empty()).unwrap()).await.unwrap();
        assert_eq!(answer.status(), StatusCode::BAD_REQUEST, "{name}: {answer:?}");
        assert_eq!(header(answer.headers(), "x-ambit-reason"), "bad_http", "{name}");
        let line = world.take_line(&["request failed", "reason=\"bad_http\""]).await;
        assert!(line.contains("protocol=\"HTTP/2\""), "{name}: {line}");
    }
    assert_eq!(web.seen.requests(), 0, "none of it went on");
}

#[tokio::test]
async fn malformed_requests_of_http2_are_refused_alone() {
    let world = World::new(Protocol::Http);
    let web = world.echo("web", "web").await;
    let with = |pairs: &[Pair]| [&Frames::GET[..], pairs].concat();
    let without = |name: &str| -> Vec<Pair> {
        Frames::GET.iter().copied().filter(|(n, _)| *n != name.as_bytes()).collect()
    };
    let pseudo = |name: &'static [u8], value: &'static [u8]| {
        let mut all = without(std::str::from_utf8(name).unwrap());
        all.insert(0, (name, value));
        all
    };
    let rows: Vec<(&str, Vec<Pair>)> = vec![
        ("transfer-encoding", with(&[(b"transfer-encoding", b"chunked")])),
        ("connection", with(&[(b"connection", b"x-private")])),
        ("upgrade", with(&[(b"connection", b"upgrade"), (b"upgrade", b"websocket")])),
        ("upgrade alone", with(&[(b"upgrade", b"h2c")])),
        ("keep-alive", with(&[(b"keep-alive", b"1")])),
        ("te", with(&[(b"te", b"gzip")])),
        ("CR LF in a value", with(&[(b"x", b"a\r\ntransfer-encoding: chunked")])),
        ("LF in a value", with(&[(b"x", b"a\nb: c")])),
        ("NUL in a value", with(&[(b"x", b"a\0b")])),
        ("a colon in a name", with(&[(b"x: a\r\ny", b"b")])),
        ("a space in a name", with(&[(b"content-length ", b"4")])),
        ("upper case in a name", with(&[(b"Content-Length", b"4")])),
        ("a path with a space", pseudo(b":path", b"/ HTTP/1.1")),
        ("a path with lines", pseudo(b":path", b"/ HTTP/1.1\r\nhost: a\r\n\r\nGET /b")),
        ("an empty path", pseudo(b":path", b"")),
        ("a path without a slash", pseudo(b":path", b"admin")),
        ("a fragment", pseudo(b":path", b"/\0")),
        ("a method with a space", pseudo(b":method", b"GET /x HTTP/1.1\r\nx:")),
        ("an authority with a user", pseudo(b":authority", b"a@web.shop")),
        ("an authority with lines", pseudo(b":authority", b"web\r\nx: y")),
        ("an authority with a path", pseudo(b":authority", b"web/x")),
        ("another scheme", pseudo(b":scheme", b"file")),
        ("CONNECT", vec![(b":method", b"CONNECT"), (b":authority", b"web:80")]),
        ("no path", without(":path")),
        ("no method", without(":method")),
        ("no authority", without(":authority")),
        ("two paths", with(&[(b":path", b"/admin")])),
        ("an unknown pseudo-header", with(&[(b":status", b"200")])),
        ("a pseudo-header behind a header", {
            let mut all = without(":path");
            all.extend([(&b"x"[..], &b"y"[..]), (b":path", b"/")]);
            all
        }),
    ];
    for (name, pairs) in rows {
        let mut frames = Frames::new(world.connect().await).await;
        frames.headers(1, &pairs, true).await;
        match frames.heard(1).await {
            Heard::Status(status) => assert_eq!(status, 400, "{name}"),
            Heard::Reset(_) | Heard::GoAway(_) => {}
        }
        assert_eq!(web.seen.requests(), 0, "{name} went on");
    }
    // And others are served.
    assert_eq!(world.ask(get("/")).await.status(), 200);
}

#[tokio::test]
async fn a_body_of_http2_has_the_length_that_its_head_says() {
    let world = World::new(Protocol::Http);
    let web = world.echo("web", "web").await;
    let post = |length: &'static [u8]| -> Vec<Pair> {
        let mut all = Frames::GET.to_vec();
        all[0] = (b":method", b"POST");
        all.push((b"content-length", length));
        all
    };
    let smuggled = SMUGGLED.as_bytes();
    for (name, length, body) in [
        ("more than it says", &b"2"[..], smuggled),
        ("less than it says", b"100", smuggled),
        ("some, and none is said", b"0", smuggled),
        ("none, and some is said", b"5", b""),
    ] {
        let mut frames = Frames::new(world.connect().await).await;
        frames.headers(1, &post(length), false).await;
        frames.data(1, body, true).await;
        match frames.heard(1).await {
            Heard::Status(status) => assert_eq!(status, 400, "{name}"),
            Heard::Reset(_) | Heard::GoAway(_) => {}
        }
    }
    // Of no request a second one came out.
    let answer = world.ask(get("/")).await;
    assert!(text(&answer).starts_with("GET / "), "{answer:?}");
    for connect in web.seen.lines() {
        assert!(!connect.contains("/admin"), "smuggled: {connect}");
    }
}

#[tokio::test]
async fn nobody_is_believed_who_he_says_he_is() {
    let world = World::new(Protocol::Http);
    let _web = world.echo("web", "web").await;
    let admin = "spiffe://cluster.local/ns/shop/sa/admin";
    let forged = [
        ("x-ambit-client-identity", admin),
        ("X-Ambit-Reason", "none"),
        ("x-ambit-anything", "1"),
        ("x-forwarded-client-cert", "By=spiffe://a;URI=spiffe://cluster.local/ns/shop/sa/admin"),
        ("X-Forwarded-Client-Cert", "URI=spiffe://cluster.local/ns/shop/sa/root"),
    ];
    let words = [
        ("x-forwarded-for", "192.0.2.1"),
        ("x-forwarded-proto", "https"),
        ("x-forwarded-host", "a.example"),
        ("forwarded", "for=192.0.2.1"),
    ];
    for http2 in [false, true] {
        let uri = if http2 { "http://web.shop/forged" } else { "/forged" };
        let mut request = Request::get(uri);
        if !http2 {
            request = request.header("host", "web.shop");
        }
        for (name, value) in forged.into_iter().chain(words) {
            request = request.header(name, value);
        }
        let request = request.body(empty()).unwrap();
        let io = world.connect().await;
        let answer = match http2 {
            true => Http2::new(io).await.ask(request).await,
            false => Http1::new(io).await.ask(request).await,
        };
        let text = text(&answer.unwrap());
        assert!(!text.contains("x-ambit-") && !text.contains("client-cert"), "{text}");
        for (name, value) in words {
            assert!(text.contains(&format!("{name}: {value}\n")), "{name} in {text}");
        }
        // The log knows only the certificate.
        let line = world.take_line(&["path=\"/forged\""]).await;
        assert!(
            line.contains("src.identity=\"spiffe://cluster.local/ns/shop/sa/client\""),
            "{line}"
        );
        assert!(!line.contains("admin"), "{line}");
    }
}
