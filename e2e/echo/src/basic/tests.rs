//! What the suite's north-south tests rely on.

use serde_json::{Value, json};

use super::*;

fn basic() -> Basic {
    let context = Context { namespace: "ns".into(), pod: "pod-1".into(), ..Context::default() };
    Basic::new(context, "3000".into())
}

fn seen(target: &str, headers: &[(&str, &str)]) -> Seen {
    Seen {
        method: "GET".into(),
        target: target.into(),
        host: "example.com".into(),
        protocol: "HTTP/1.1",
        headers: headers.iter().map(|&(name, value)| (name.into(), value.into())).collect(),
        ..Seen::default()
    }
}

fn answer(reply: Reply) -> (Duration, StatusCode, Vec<(String, String)>, String) {
    let Reply::Answer { delay, status, headers, body } = reply else { panic!("it hangs up") };
    let text = |(name, value): (HeaderName, HeaderValue)| {
        (name.to_string(), value.to_str().expect("text").to_owned())
    };
    (delay, status, headers.into_iter().map(text).collect(), body)
}

#[test]
fn the_page_has_the_fields_that_the_suite_reads() {
    let asked = seen("/a?b=c", &[("X-One", "1"), ("X-One", "2")]);
    let tls =
        TlsSeen { version: "TLSv1.3", server_name: "example.com".into(), ..TlsSeen::default() };
    for (tls, want) in [
        (None, Value::Null),
        (Some(&tls), json!({"version": "TLSv1.3", "serverName": "example.com", "cipherSuite": ""})),
    ] {
        let (delay, status, headers, body) = answer(basic().reply(&asked, tls));
        assert_eq!((delay, status), (Duration::ZERO, StatusCode::OK));
        assert!(headers.contains(&("content-type".into(), "application/json".into())));
        let page: Value = serde_json::from_str(&body).expect("JSON");
        assert_eq!(page.get("tls").unwrap_or(&Value::Null), &want);
        for (name, want) in [
            ("path", json!("/a?b=c")),
            ("host", json!("example.com")),
            ("method", json!("GET")),
            ("proto", json!("HTTP/1.1")),
            ("headers", json!({"X-One": ["1", "2"]})),
            ("httpPort", json!("3000")),
            ("namespace", json!("ns")),
            ("ingress", json!("")),
            ("service", json!("")),
            ("pod", json!("pod-1")),
        ] {
            assert_eq!(page[name], want, "{name}");
        }
    }
}

#[test]
fn paths_with_a_meaning() {
    for (target, status, text) in [
        ("/health", 200, "OK"),
        ("//health", 200, "OK"),
        ("/status/418", 418, ""),
        ("/status/101", 400, ""),
        ("/status/4180", 400, ""),
        ("/status/x", 400, ""),
        ("/retry/a", 400, "uuid is required"),
        ("/retry/a?uuid=1", 400, "succeedAfter is required"),
        ("/a?delay=nonsense", 500, "no time"),
    ] {
        let (_, got, _, body) = answer(basic().reply(&seen(target, &[]), None));
        assert_eq!(got.as_u16(), status, "{target}");
        assert!(body.contains(text), "{target}: {body}");
    }
    assert_eq!(answer(basic().reply(&seen("/a?delay=2s", &[]), None)).0, Duration::from_secs(2));
}

#[test]
fn a_retried_request_succeeds_after_its_tries() {
    let basic = basic();
    let with_code = seen("/retry/a?uuid=1&succeedAfter=2&responseCode=503&delayRetry=5ms", &[]);
    for want in [503, 503, 200, 200] {
        assert_eq!(answer(basic.reply(&with_code, None)).1.as_u16(), want);
    }
    let cut = seen("/retry/a?uuid=2&succeedAfter=1", &[]);
    assert_eq!(basic.reply(&cut, None), Reply::HangUp { delay: Duration::ZERO });
    assert_eq!(answer(basic.reply(&cut, None)).1, StatusCode::OK);
}

#[test]
fn headers_of_the_answer_can_be_asked_for() {
    let asked = seen(
        "/",
        &[
            ("X-Echo-Set-Header", "X-A:1, X-B:2,X-A: 3"),
            ("X-Echo-Set-Header", "bad name:1,X-C:a:b"),
        ],
    );
    let headers = answer(basic().reply(&asked, None)).2;
    for want in [("x-a", "1,3"), ("x-b", "2"), ("x-c", "a:b")] {
        assert!(headers.contains(&(want.0.into(), want.1.into())), "{want:?}: {headers:?}");
    }
    assert_eq!(headers.len(), 5, "{headers:?}");
}

#[test]
fn calls() {
    let asked = |method: &str| seen(&format!("{SERVICE}{method}"), &[("X-One", "1")]);
    for method in ["Echo", "EchoTwo"] {
        let bytes = basic().call(&asked(method), None).expect("it is there");
        let said =
            GrpcResponse::decode(&bytes[..]).expect("our own message").assertions.expect("set");
        assert_eq!(said.fully_qualified_method, format!("{SERVICE}{method}"));
        assert_eq!(said.authority, "example.com");
        assert!(said.headers.contains(&GrpcHeader { key: "x-one".into(), value: "1".into() }));
        assert_eq!(said.context.expect("set").pod, "pod-1");
        assert_eq!(said.tls, None);
    }
    assert_eq!(basic().call(&asked("EchoThree"), None), None);
    assert_eq!(basic().call(&seen("/other.Service/Echo", &[]), None), None);
}
