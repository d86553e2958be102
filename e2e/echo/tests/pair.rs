//! Server and client together, over loopback, in every protocol they share.

use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use echo::answer::Me;
use echo::ask::{self, Question};
use echo::basic::{Basic, Context};
use echo::serve::{App, Port, Server};
use echo::tls;
use http::{HeaderName, HeaderValue, Method};
use rcgen::{CertifiedKey, generate_simple_self_signed};
use tokio::net::TcpListener;

struct World {
    http: u16,
    tls: u16,
    lines: u16,
    /// Removed at the end.
    dir: std::path::PathBuf,
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

async fn world(name: &str) -> World {
    let dir = std::env::temp_dir().join(format!("echo-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a folder");
    let CertifiedKey { cert, signing_key } =
        generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    std::fs::write(dir.join("crt"), cert.pem()).expect("a file");
    std::fs::write(dir.join("key"), signing_key.serialize_pem()).expect("a file");
    let config = tls::server(&dir.join("crt"), &dir.join("key"), None).expect("a configuration");
    let server = Server::new(App::Lines(Me {
        hostname: "echo-v1-6b-xz".into(),
        version: "v1".into(),
        cluster: String::new(),
    }));
    let [(http, plain), (tls, secret), (lines, talk)] =
        [listen().await, listen().await, listen().await];
    tokio::spawn(Arc::clone(&server).http(plain, Port::default()));
    tokio::spawn(Arc::clone(&server).http(secret, Port { tls: Some(config), only_h2: false }));
    tokio::spawn(server.lines(talk));
    World { http, tls, lines, dir }
}

async fn listen() -> (u16, TcpListener) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
    (listener.local_addr().expect("an address").port(), listener)
}

fn question(url: &str) -> Question {
    Question {
        url: url.parse().expect("a URL"),
        method: Method::GET,
        headers: vec![(HeaderName::from_static("x-one"), HeaderValue::from_static("1"))],
        message: "hi".into(),
        http2: false,
        authority: None,
        timeout: Duration::from_secs(5),
    }
}

async fn answers(question: &Question, count: u32) -> Result<Vec<String>> {
    let mut all = Vec::new();
    ask::ask(question, count, |lines| {
        all.push(lines);
        Ok(())
    })
    .await?;
    Ok(all)
}

#[tokio::test]
async fn every_protocol_says_what_it_saw() {
    let world = world("protocols").await;
    let (http, tls, lines) = (world.http, world.tls, world.lines);
    let cases: [(String, bool, &[&str]); 6] = [
        (
            format!("http://localhost:{http}/a?b=c"),
            false,
            &[
                "[0] StatusCode=200",
                "[0 body] Proto=HTTP/1.1",
                "[0 body] URL=/a?b=c",
                "[0 body] Method=GET",
            ],
        ),
        (
            format!("http://localhost:{http}/"),
            true,
            &["[0 body] Proto=HTTP/2.0", "[0 body] RequestHeader=X-One:1"],
        ),
        (
            format!("https://localhost:{tls}/"),
            false,
            &["[0 body] Proto=HTTP/1.1", "[0 body] Alpn=http/1.1"],
        ),
        (
            format!("https://localhost:{tls}/"),
            true,
            &["[0 body] Proto=HTTP/2.0", "[0 body] Alpn=h2"],
        ),
        (
            format!("grpc://localhost:{http}"),
            false,
            &[
                "[0] StatusCode=200",
                "[0 body] Proto=GRPC",
                "[0 body] Echo=hi",
                "[0 body] RequestHeader=X-One:1",
            ],
        ),
        (
            format!("tcp://localhost:{lines}"),
            false,
            &["[0] StatusCode=200", "[0 body] Proto=TCP", "[0 body] Echo=hi"],
        ),
    ];
    for (url, http2, want) in cases {
        let asked = Question { http2, ..question(&url) };
        let text =
            answers(&asked, 1).await.unwrap_or_else(|error| panic!("{url}: {error:#}")).concat();
        for line in want.iter().chain(&["[0 body] Hostname=echo-v1-6b-xz", "[0 body] IP=127.0.0.1"])
        {
            assert!(text.lines().any(|have| have == *line), "{url}: no {line:?} in\n{text}");
        }
        assert!(!text.contains("\n\n"), "{url}: a blank line would end the answer\n{text}");
    }
}

#[tokio::test]
async fn the_host_header_says_who_is_asked_for() {
    let world = world("host").await;
    for http2 in [false, true] {
        let mut asked =
            Question { http2, ..question(&format!("http://localhost:{}/", world.http)) };
        asked.headers.push((http::header::HOST, HeaderValue::from_static("other")));
        let text = answers(&asked, 1).await.expect("an answer").concat();
        assert!(text.contains("[0 body] Host=other\n"), "{text}");
        assert!(!text.contains("RequestHeader=Host"), "{text}");
    }
}

#[tokio::test]
async fn many_questions_are_numbered_and_an_error_status_is_an_answer() {
    let world = world("many").await;
    let asked = question(&format!("http://localhost:{}/?codes=503", world.http));
    let all = answers(&asked, 20).await.expect("answers");
    assert_eq!(all.len(), 20);
    for (number, text) in all.iter().enumerate() {
        assert!(text.contains(&format!("[{number}] StatusCode=503\n")), "{text}");
    }
}

#[tokio::test]
async fn no_answer_is_an_error() {
    let world = world("errors").await;
    let closed = listen().await.0;
    let (short, long) = (Duration::from_millis(500), Duration::from_secs(10));
    for (url, timeout, says) in [
        (format!("http://localhost:{}/?delay=20s", world.http), short, "no answer within"),
        (format!("http://localhost:{closed}/"), long, "connecting to localhost"),
        (format!("https://localhost:{}/", world.http), long, "the TLS handshake"),
        (format!("udp://localhost:{}/", world.http), long, "must begin with"),
    ] {
        let asked = Question { timeout, ..question(&url) };
        let error = format!("{:#}", answers(&asked, 1).await.expect_err(&url));
        assert!(error.contains(says), "{url}: {error}");
    }
}

#[tokio::test]
async fn an_authority_is_held_to() {
    let world = world("authority").await;
    let url = format!("https://localhost:{}/", world.tls);
    let right = Question { authority: Some(world.dir.join("crt")), ..question(&url) };
    assert!(answers(&right, 1).await.is_ok());
    let missing = Question { authority: Some(Path::new("/nowhere.crt").into()), ..question(&url) };
    assert!(
        format!("{:#}", answers(&missing, 1).await.expect_err("no such file"))
            .contains("/nowhere.crt")
    );
    let other =
        generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate").cert.pem();
    std::fs::write(world.dir.join("other"), other).expect("a file");
    let wrong = Question { authority: Some(world.dir.join("other")), ..question(&url) };
    assert!(
        format!("{:#}", answers(&wrong, 1).await.expect_err("not signed by it"))
            .contains("TLS handshake")
    );
}

#[tokio::test]
async fn the_json_application_answers_in_every_protocol() {
    let world = world("basic").await;
    let config = tls::server(&world.dir.join("crt"), &world.dir.join("key"), None);
    let config = config.expect("a configuration");
    let context = Context { pod: "pod-1".into(), ..Context::default() };
    let server = Server::new(App::Basic(Basic::new(context, "3000".into())));
    let [(http, plain), (h2c, two), (https, secret)] =
        [listen().await, listen().await, listen().await];
    tokio::spawn(Arc::clone(&server).http(plain, Port::default()));
    tokio::spawn(Arc::clone(&server).http(two, Port { tls: None, only_h2: true }));
    tokio::spawn(server.http(secret, Port { tls: Some(config), only_h2: false }));
    for (url, http2, want) in [
        (format!("http://localhost:{http}/a"), false, r#""proto": "HTTP/1.1""#),
        (format!("http://localhost:{h2c}/a"), true, r#""proto": "HTTP/2.0""#),
        (format!("http://localhost:{h2c}/a"), false, "StatusCode=400"),
        (format!("https://localhost:{https}/a"), false, r#""serverName": "localhost""#),
        (format!("https://localhost:{https}/a"), false, r#""version": "TLSv1.3""#),
        (format!("https://localhost:{https}/a"), true, r#""negotiatedProtocol": "h2""#),
        (format!("https://localhost:{https}/a"), false, r#""cipherSuite": "TLS_"#),
    ] {
        let asked = Question { http2, ..question(&url) };
        let text = answers(&asked, 1).await.unwrap_or_else(|e| panic!("{url}: {e:#}")).concat();
        assert!(text.contains(want), "{url}: no {want} in\n{text}");
    }
    // Its gRPC service is another one than our client's.
    let wrong = answers(&question(&format!("grpc://localhost:{http}")), 1).await;
    assert!(format!("{:#}", wrong.expect_err("there is no such method")).contains("status \"12\""));
    let cut = question(&format!("http://localhost:{http}/retry/a?uuid=1&succeedAfter=1"));
    assert!(answers(&cut, 1).await.is_err());
    assert!(answers(&cut, 1).await.is_ok());
}
