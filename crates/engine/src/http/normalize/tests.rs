//! What a request looks like after the one step, and what does not get past it.

use http::Request;
use proptest::prelude::*;

use super::*;

/// A request as hyper would give it: the target as in the request line (or assembled from HTTP/2's pseudo-headers).
fn request(version: Version, method: &str, uri: &str, headers: &[(&str, &str)]) -> request::Parts {
    let mut request = Request::builder().version(version).method(method).uri(uri);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(()).unwrap().into_parts().0
}

/// The request in short: `METHOD URI | name: value | ...`, or `reason: message`.
fn short(mut parts: request::Parts) -> String {
    if let Err(refusal) = normalize(&mut parts) {
        return format!("{}: {}", refusal.reason, refusal.message);
    }
    let mut words = vec![format!("{} {}", parts.method, parts.uri)];
    let mut headers: Vec<String> = parts
        .headers
        .iter()
        .map(|(n, v)| format!("{n}: {}", String::from_utf8_lossy(v.as_bytes())))
        .collect();
    headers.sort();
    words.extend(headers);
    words.join(" | ")
}

fn http1(method: &str, uri: &str, headers: &[(&str, &str)]) -> String {
    short(request(Version::HTTP_11, method, uri, headers))
}

fn http2(method: &str, uri: &str, headers: &[(&str, &str)]) -> String {
    short(request(Version::HTTP_2, method, uri, headers))
}

const HOST_WEB: (&str, &str) = ("host", "web");

#[test]
fn one_form() {
    let want = "GET http://web/a?x=1 | host: web";
    assert_eq!(http1("GET", "/a?x=1", &[HOST_WEB]), want);
    assert_eq!(http1("GET", "http://web/a?x=1", &[HOST_WEB]), want);
    assert_eq!(http1("GET", "http://web/a?x=1", &[]), want);
    assert_eq!(http2("GET", "http://web/a?x=1", &[]), want);
    assert_eq!(http2("GET", "http://web/a?x=1", &[HOST_WEB]), want);
    assert_eq!(http1("GET", "/b/../%61?x=1", &[("host", "WEB")]), want);
    assert_eq!(http1("GET", "http://web", &[]), "GET http://web/ | host: web");
    assert_eq!(http1("GET", "http://web?x", &[]), "GET http://web/?x | host: web");
    assert_eq!(http2("GET", "https://Web:8443/", &[]), "GET https://web:8443/ | host: web:8443");
    assert_eq!(
        http1("GET", "/", &[("host", "[FD00::1]:80")]),
        "GET http://[fd00::1]:80/ | host: [fd00::1]:80"
    );
    assert_eq!(http1("OPTIONS", "*", &[HOST_WEB]), "OPTIONS http://web* | host: web");
    assert_eq!(
        http1("GET", "/?a=%zz&b=../.", &[HOST_WEB]),
        "GET http://web/?a=%zz&b=../. | host: web"
    );
}

#[test]
fn hosts_that_disagree_or_are_none() {
    let check = |uri: &str, headers: &[(&str, &str)], words: &str| {
        for got in [http1("GET", uri, headers), http2("GET", uri, headers)] {
            assert!(
                got.starts_with("bad_http: ") && got.contains(words),
                "{uri} {headers:?}: {got}"
            );
        }
    };
    check("http://web/", &[("host", "admin")], "another host");
    check("http://web/", &[("host", "web:80")], "another host");
    check("/", &[HOST_WEB, HOST_WEB], "more than one host");
    check("/", &[], "names no host");
    check("/", &[("host", "")], "no host");
    check("/", &[("host", "a b")], "no host");
    check("/", &[("host", "a,b")], "no host");
    check("/", &[("host", "a/b")], "no host");
    check("/", &[("host", "user@web")], "user info");
    check("http://user@web/", &[], "user info");
    check("/", &[("host", "web:")], "a port");
    check("/", &[("host", "web:65536")], "a port");
    check("/", &[("host", "web:+80")], "a port");
    check("/", &[("host", "web:80:80")], "a port");
    check("/", &[("host", "[::1")], "a bracket");
    check("/", &[("host", "[web]")], "IPv6");
    check("/", &[("host", "[::1]80")], "behind the bracket");
    check("/", &[("host", &"a".repeat(256))], "255");
}

#[test]
fn targets_that_are_none() {
    let check = |method: &str, uri: &str, words: &str| {
        let got = http1(method, uri, &[("host", "web:80")]);
        assert!(got.starts_with("bad_http: ") && got.contains(words), "{method} {uri}: {got}");
    };
    check("CONNECT", "web:80", "CONNECT");
    check("CONNECT", "/_goRPC_", "CONNECT");
    check("GET", "ftp://web:80/", "scheme \"ftp\"");
    check("GET", "*", "the path");
    check("GET", "/a%00", "the path");
    check("GET", "/a%2", "the path");
}

#[test]
fn framing_is_one() {
    let check = |headers: &[(&str, &str)], words: &str| {
        let headers: Vec<_> = headers.iter().copied().chain([HOST_WEB]).collect();
        let got = http1("POST", "/", &headers);
        assert!(got.contains(words), "{headers:?}: {got}");
    };
    check(&[("content-length", "5")], "POST http://web/ | content-length: 5");
    check(&[("transfer-encoding", "Chunked")], "POST http://web/ | host: web");
    for (headers, words) in [
        (&[("content-length", "5"), ("transfer-encoding", "chunked")][..], "in one request"),
        (&[("content-length", "5"), ("content-length", "5")], "not one number"),
        (&[("content-length", "5, 5")], "not one number"),
        (&[("content-length", "+5")], "not one number"),
        (&[("content-length", "")], "not one number"),
        (&[("content-length", "99999999999999999999")], "not one number"),
        (&[("transfer-encoding", "gzip, chunked")], "other than chunked"),
        (
            &[("transfer-encoding", "chunked"), ("transfer-encoding", "identity")],
            "other than chunked",
        ),
        (&[("transfer-encoding", "xchunked")], "other than chunked"),
        (&[("transfer-encoding", "")], "other than chunked"),
    ] {
        check(headers, "bad_http: ");
        check(headers, words);
    }
    let old = request(Version::HTTP_10, "POST", "/", &[HOST_WEB, ("transfer-encoding", "chunked")]);
    assert_eq!(short(old), "bad_http: HTTP/1.0 knows no transfer-encoding");
}

#[test]
fn bytes_that_are_no_text() {
    // The safe ways to make a value refuse line breaks; `look` is for parsers that take another way.
    for value in ["a\r\n b", "a\n b", "a\0"] {
        assert!(HeaderValue::from_bytes(value.as_bytes()).is_err());
    }
    let mut parts = request(Version::HTTP_11, "GET", "/", &[HOST_WEB]);
    parts.headers.insert("x", HeaderValue::from_bytes(b"a\tb\xff").unwrap());
    assert_eq!(short(parts.clone()), "GET http://web/ | host: web | x: a\tb\u{fffd}");
    parts.headers.insert("host", HeaderValue::from_bytes(b"w\xffb").unwrap());
    assert_eq!(short(parts), "bad_http: the host header is no text");
}

#[test]
fn what_is_for_one_hop_stays_there() {
    let check = |headers: &[(&str, &str)], want: &str| {
        let headers: Vec<_> = headers.iter().copied().chain([HOST_WEB]).collect();
        assert_eq!(http1("GET", "/", &headers), format!("GET http://web/{want}"), "{headers:?}");
    };
    check(
        &[("connection", "close, X-One"), ("x-one", "1"), ("x-two", "2")],
        " | host: web | x-two: 2",
    );
    check(
        &[("connection", "keep-alive"), ("keep-alive", "timeout=5"), ("proxy-connection", "x")],
        " | host: web",
    );
    check(
        &[("connection", "Upgrade"), ("upgrade", "websocket")],
        " | connection: upgrade | host: web | upgrade: websocket",
    );
    check(&[("upgrade", "websocket")], " | host: web");
    check(
        &[("connection", "upgrade, http2-settings"), ("upgrade", "h2c"), ("http2-settings", "AA")],
        " | host: web",
    );
    check(&[("connection", "upgrade"), ("upgrade", "websocket, h2c")], " | host: web");
    // Read by whoever skips what is no text.
    check(&[("connection", "upgrade"), ("upgrade", "h2c, é")], " | host: web");
    check(&[("te", "gzip, trailers")], " | host: web | te: trailers");
    check(&[("te", "gzip"), ("connection", "te")], " | host: web");
    for name in ["host", "Content-Length", "a b"] {
        let got = http1("GET", "/", &[HOST_WEB, ("connection", name)]);
        assert!(got.starts_with("bad_http: header connection names"), "{name}: {got}");
    }
    for header in
        [("connection", "x"), ("upgrade", "websocket"), ("keep-alive", "1"), ("te", "gzip")]
    {
        let got = http2("GET", "http://web/", &[header]);
        assert!(got.starts_with(&format!("bad_http: header {} in HTTP/2", header.0)), "{got}");
    }
    assert_eq!(
        http2("GET", "http://web/", &[("te", "trailers")]),
        "GET http://web/ | host: web | te: trailers"
    );
}

#[test]
fn names_of_others_are_taken_off() {
    let got = http1(
        "GET",
        "/",
        &[
            HOST_WEB,
            ("x-ambit-client-identity", "spiffe://td/ns/a/sa/admin"),
            ("X-Ambit-Reason", "x"),
            ("x-forwarded-client-cert", "URI=spiffe://td/ns/a/sa/admin"),
            ("x-forwarded-for", "1.2.3.4"),
        ],
    );
    assert_eq!(got, "GET http://web/ | host: web | x-forwarded-for: 1.2.3.4");
}

#[test]
fn cookies_are_one() {
    let got = http2("GET", "http://web/", &[("cookie", "a=1"), ("cookie", "b=2; c=3")]);
    assert_eq!(got, "GET http://web/ | cookie: a=1; b=2; c=3 | host: web");
}

#[test]
fn limits() {
    let long = "a".repeat(MAX_HEAD - "host".len() - "web".len() - "x".len() - "/".len());
    let fits = http1("GET", "/", &[HOST_WEB, ("x", &long)]);
    assert!(fits.starts_with("GET "), "{fits:.80}");
    let more = http1("GET", "/a", &[HOST_WEB, ("x", &long)]);
    assert_eq!(more, "limit: path and headers have 61441 bytes, at most 61440 are allowed");
    let names: Vec<String> = (0..MAX_HEADERS).map(|n| format!("x-{n}")).collect();
    let headers: Vec<_> = names.iter().map(|n| (n.as_str(), "1")).chain([HOST_WEB]).collect();
    assert!(http1("GET", "/", &headers[1..]).starts_with("GET "));
    assert_eq!(
        http1("GET", "/", &headers),
        "limit: the request has 101 headers, at most 100 are allowed"
    );
}

/// What is let through is let through again by the next hop. Found by the fuzzer: a hundred headers and `:authority` were 101
/// headers there.
#[test]
fn limits_hold_for_what_is_sent_on() {
    let names: Vec<String> = (0..MAX_HEADERS).map(|n| format!("x-{n}")).collect();
    let headers: Vec<_> = names.iter().map(|n| (n.as_str(), "1")).collect();
    assert_eq!(
        http2("GET", "http://web/", &headers),
        "limit: the request has 101 headers, at most 100 are allowed"
    );
    assert!(http2("GET", "http://web/", &headers[1..]).starts_with("GET "));
    // Crumbs of a cookie are one header to whoever comes next.
    let crumbs = [("cookie", "a=1"); 2 * MAX_HEADERS];
    assert!(http2("GET", "http://web/", &crumbs).starts_with("GET "));
    // An escape is longer than what it stands for.
    let path = format!("/{}", "é".repeat(MAX_HEAD / 6));
    let long = http2("GET", &format!("http://web{path}"), &[]);
    assert_eq!(long, "limit: path and headers have 61448 bytes, at most 61440 are allowed");
}

proptest! {
    /// Whatever comes in: it is refused, or has one form that a second look does not change.
    #[test]
    fn twice_is_once(
        path in "/[a-z%./\\\\2eE]{0,12}(\\?[a-z=&%]{0,6})?",
        host in "[a-zA-Z0-9.:\\[\\]@-]{0,12}",
        absolute in any::<bool>(),
        second in any::<bool>(),
        connection in "(close|upgrade|host|te|x-a|, )?",
    ) {
        let uri = if absolute { format!("http://{host}{path}") } else { path };
        let built = Request::builder()
            .uri(&uri)
            .header("host", if absolute && !second { "web" } else { &host })
            .header("connection", &connection)
            .header("x-a", "1")
            .body(());
        let Ok(built) = built else { return Ok(()) };
        let mut parts = built.into_parts().0;
        if normalize(&mut parts).is_err() {
            return Ok(());
        }
        let once = parts.clone();
        prop_assert_eq!(parts.headers.get_all(HOST).iter().count(), 1);
        prop_assert_eq!(parts.uri.authority().unwrap().as_str(), parts.headers[HOST].to_str().unwrap());
        prop_assert!(normalize(&mut parts).is_ok());
        prop_assert_eq!((once.uri, once.headers), (parts.uri, parts.headers));
    }
}

#[test]
fn trailers_say_nothing_that_only_headers_may() {
    let mut trailers = HeaderMap::new();
    for name in ["grpc-status", "x-checksum", "x-ambit-reason", "x-forwarded-client-cert", "host"] {
        trailers.insert(HeaderName::from_static(name), HeaderValue::from_static("0"));
    }
    trailers.insert(CONTENT_LENGTH, HeaderValue::from_static("5"));
    trailers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    strip_trailers(&mut trailers);
    let mut left: Vec<_> = trailers.keys().map(HeaderName::as_str).collect();
    left.sort_unstable();
    assert_eq!(left, ["grpc-status", "x-checksum"]);
}

#[test]
fn an_answer_ends_in_one_way() {
    let check = |lines: &[(HeaderName, &'static str)], want: Result<bool, ()>| {
        let lines = lines.iter().map(|(name, v)| (name.clone(), HeaderValue::from_static(v)));
        let mut headers = HeaderMap::from_iter([(CONTENT_LENGTH, HeaderValue::from_static("5"))]);
        for (name, value) in lines {
            headers.append(name, value);
        }
        let framed = one_framing(&mut headers).map_err(drop);
        assert_eq!(framed.map(|()| headers.contains_key(CONTENT_LENGTH)), want, "{headers:?}");
    };
    check(&[], Ok(true));
    check(&[(TRANSFER_ENCODING, "Chunked")], Ok(false));
    check(&[(TRANSFER_ENCODING, "identity")], Ok(false));
    check(&[(TRANSFER_ENCODING, "gzip, chunked")], Err(()));
    check(&[(TRANSFER_ENCODING, "gzip")], Err(()));
    check(&[(TRANSFER_ENCODING, "chunked"), (TRANSFER_ENCODING, "chunked")], Err(()));
}
