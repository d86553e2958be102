//! Floods: heads and bodies without an end. The memory of client, waypoint and endpoint together stays within a bound, the
//! client is told why, and another client of the same worker is served all the time.
//!
//! A binary of its own: its memory is looked at, so that its tests run one after another.
#![allow(clippy::unwrap_used, reason = "test")]

#[path = "../proxy/frames.rs"]
#[allow(dead_code, reason = "shared with the other tests")]
mod frames;
#[path = "../proxy/world.rs"]
#[allow(dead_code, reason = "shared with the other tests")]
mod world;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use model::http::Protocol;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::frames::{CONTINUATION, END_HEADERS, END_STREAM, Frames, HEADERS, Heard, block};
use crate::world::*;

/// What a flood would send if it were let.
const FLOOD: usize = 100 << 20;
/// What it may cost, at all three ends: windows and buffers of both connections, and what an allocator keeps.
const COST: usize = 32 << 20;
const MIB: usize = 1 << 20;
/// How long an attack may take before its test fails: a gibibyte each way without optimizations, on a busy machine.
const ATTACK: Duration = Duration::from_secs(600);

static ONE_AT_A_TIME: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// Runs an attack while another client asks again and again, and wants each of its requests served, and memory bounded.
async fn attacked<T>(world: &World, name: &str, attack: impl Future<Output = T>) -> T {
    let mut client = Http1::new(world.connect().await).await;
    let mut asked = 0;
    let mut ask = async || {
        let begun = Instant::now();
        let answer = client.ask(get("/well")).await;
        assert_eq!(
            answer.ok().map(|a| a.status().as_u16()),
            Some(200),
            "{name}: another is harmed"
        );
        // Far above what it takes on a busy machine, far below what waiting for the attack's end would.
        assert!(begun.elapsed() < Duration::from_secs(5), "{name}: {:?}", begun.elapsed());
        asked += 1;
        tokio::time::sleep(Duration::from_millis(1)).await;
    };
    ask().await;
    let before = memory("VmRSS:");
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let result = {
        let mut attack = std::pin::pin!(tokio::time::timeout(ATTACK, attack));
        loop {
            let mut asking = std::pin::pin!(ask());
            let ended = tokio::select! {
                result = &mut attack => Some(result.unwrap_or_else(|_| panic!("{name} has no end"))),
                () = &mut asking => None,
            };
            if let Some(result) = ended {
                asking.await;
                break result;
            }
        }
    };
    ask().await;
    let grown = memory("VmHWM:").saturating_sub(before);
    println!("{name}: {} KiB more at the peak, {asked} other requests", grown >> 10);
    assert!(grown < COST, "{name}: {} MiB more", grown / MIB);
    result
}

/// A row of /proc/self/status, in bytes.
fn memory(row: &str) -> usize {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(row)).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<usize>().unwrap() << 10
}

/// Sends a head, and then the same bytes until nobody takes them. Says how many went, and what came back.
async fn pour(world: &World, head: &str, again: &str) -> (usize, String) {
    let mut io = world.connect().await;
    io.write_all(head.as_bytes()).await.unwrap();
    let (mut read, mut write) = tokio::io::split(io);
    let again = again.repeat((64 << 10) / again.len());
    let mut sent = 0;
    let mut answer = Vec::new();
    let writing = async {
        while sent < FLOOD && write.write_all(again.as_bytes()).await.is_ok() {
            sent += again.len();
        }
    };
    let reading = read.read_to_end(&mut answer);
    // The answer ends the connection; what is being written then is stuck, or fails.
    let mut writing = std::pin::pin!(writing);
    tokio::select! {
        biased;
        _ = reading => {}
        () = async { writing.as_mut().await; std::future::pending().await } => {}
    }
    (sent, String::from_utf8_lossy(&answer).into_owned())
}

#[tokio::test]
async fn heads_of_http1_without_an_end() {
    let _one = ONE_AT_A_TIME.lock().await;
    let world = World::new(Protocol::Http);
    let web = world.echo("web", "web").await;
    let value = "GET / HTTP/1.1\r\nhost: web\r\nx: ";
    for (name, head, again, status) in [
        ("one header", value, "a", "431"),
        ("many headers", "GET / HTTP/1.1\r\nhost: web\r\n", "x-y: z\r\n", "431"),
        ("a name", "GET / HTTP/1.1\r\nhost: web\r\n", "x", "431"),
        ("spaces", value, " ", "431"),
        ("a target", "GET /", "a", "431"),
        ("empty lines", "\r\n", "\r\n", ""),
    ] {
        let (sent, answer) = attacked(&world, name, pour(&world, head, again)).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{name}: {sent} {answer:?}");
        assert!(answer.contains("\r\nx-ambit-reason: limit\r\n"), "{name}: {answer}");
        assert!(sent < 8 * MIB, "{name}: {sent} bytes were taken");
        let line = world.take_line(&["request failed", "reason=\"limit\""]).await;
        assert!(line.contains(&format!("status={status}")), "{name}: {line}");
    }
    assert!(!web.seen.lines().iter().any(|line| line != "GET /well"));
}

#[tokio::test]
async fn heads_of_http2_without_an_end() {
    let _one = ONE_AT_A_TIME.lock().await;
    let world = World::new(Protocol::Http);
    let _web = world.echo("web", "web").await;
    let fields =
        block(&[(b"x", b"yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy")]);
    for (name, part) in [
        ("large frames", fields.repeat((16 << 10) / fields.len())),
        ("small frames", fields.clone()),
        ("empty frames", Vec::new()),
    ] {
        let flood = async {
            let mut frames = Frames::new(world.connect().await).await;
            let first = block(&Frames::GET);
            frames.frame(HEADERS, END_STREAM, 1, &first).await.unwrap();
            let mut sent = 0;
            // Nobody reads meanwhile: it stops when the other end has gone, or takes nothing more.
            while sent < FLOOD {
                let next = frames.frame(CONTINUATION, 0, 1, &part);
                match tokio::time::timeout(Duration::from_secs(5), next).await {
                    Ok(Ok(())) => sent += part.len() + 9,
                    _ => break,
                }
                // Who floods is a task among others here.
                tokio::task::yield_now().await;
            }
            (sent, frames.heard(1).await)
        };
        let (sent, heard) = attacked(&world, name, flood).await;
        // ENHANCE_YOUR_CALM.
        assert!(matches!(heard, Heard::GoAway(11 | 0)), "{name}: {heard:?} after {sent} bytes");
        assert!(sent < 8 * MIB, "{name}: {sent} bytes were taken");
        let line = world.take_line(&["request failed", "reason=\"limit\""]).await;
        assert!(line.contains("protocol=\"HTTP/2\""), "{name}: {line}");
    }
}

#[tokio::test]
async fn small_heads_of_http2_that_become_large() {
    let _one = ONE_AT_A_TIME.lock().await;
    let world = World::new(Protocol::Http);
    let _web = world.echo("web", "web").await;
    // A header of 3,900 bytes goes into HPACK's table, and then a byte names it (RFC 7541, 6.1).
    let bomb = |times: usize| {
        let world = &world;
        async move {
            let mut frames = Frames::new(world.connect().await).await;
            let mut head = block(&Frames::GET);
            // The length as HPACK's integers are written: 127, and the rest seven bits at a time.
            head.extend([0x40, 1, b'x', 0x7f, 0xbd, 0x1d]);
            head.extend([b'y'; 3900]);
            head.resize(head.len() + times, 0x80 | 62);
            frames.frame(HEADERS, END_STREAM | END_HEADERS, 1, &head).await.unwrap();
            let first = frames.heard(1).await;
            if matches!(first, Heard::GoAway(_)) {
                return (first, None);
            }
            frames.headers(3, &Frames::GET, true).await;
            (first, Some(frames.heard(3).await))
        }
    };
    // Above engine's limit, and below that of the library that reads HTTP/2: our words.
    let some = attacked(&world, "a list above our limit", bomb(16)).await;
    assert_eq!(some, (Heard::Status(0), Some(Heard::Status(200))));
    let line = world.take_line(&["request failed", "reason=\"limit\""]).await;
    assert!(line.contains("status=431"), "{line}");
    // Above both: 431 in the words of the library, which tells us nothing. The connection goes on.
    let more = attacked(&world, "a list above the library's limit", bomb(40)).await;
    assert_eq!(more, (Heard::Status(0), Some(Heard::Status(200))));
    // 45 MiB in 12 KiB: ENHANCE_YOUR_CALM, and the end of the connection.
    let (bang, _) = attacked(&world, "a bomb", bomb(12_000)).await;
    assert_eq!(bang, Heard::GoAway(11));
    world.take_line(&["request failed", "reason=\"limit\"", "protocol=\"HTTP/2\""]).await;
}

/// An endpoint that takes requests and reads no body until it is told to.
async fn unread(world: &World) -> Endpoint {
    world
        .endpoint("sink", "sink", |io, seen| {
            serve_http1(io, seen, |request, seen| async move {
                seen.go_on.notified().await;
                let mut body = request.into_body();
                let mut read = 0;
                while let Some(frame) = body.frame().await {
                    read += frame?.into_data().map_or(0, |bytes| bytes.len());
                }
                Ok(Response::new(full(read.to_string())))
            })
        })
        .await
}

/// Requests for `/flood` go to `sink`.
fn with_sink(world: &World) {
    world.speak("sink", Protocol::Http);
    let rules = vec![
        (path("/flood"), rule(vec![], vec![to("sink")])),
        (path("/"), rule(vec![], vec![to("web")])),
    ];
    world.rules(Protocol::Http, rules);
}

/// A body that counts what was taken of it.
fn endless(limit: usize, taken: &Arc<AtomicUsize>) -> Body {
    let (chunk, taken) = (Bytes::from(vec![7; 64 << 10]), taken.clone());
    let frames = std::iter::repeat_with(move || {
        taken.fetch_add(chunk.len(), Ordering::SeqCst);
        Ok::<_, Error>(Frame::data(chunk.clone()))
    });
    StreamBody::new(futures_util::stream::iter(frames.take(limit / (64 << 10)))).boxed_unsync()
}

/// Waits until nothing more is taken, and says how much was.
async fn stuck(taken: &AtomicUsize) -> usize {
    let mut last = 0;
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let now = taken.load(Ordering::SeqCst);
        if now == last && now > 0 {
            return now;
        }
        last = now;
    }
}

#[tokio::test]
async fn a_body_without_an_end_that_nobody_reads() {
    let _one = ONE_AT_A_TIME.lock().await;
    let world = World::new(Protocol::Http);
    let (_web, sink) = (world.echo("web", "web").await, unread(&world).await);
    with_sink(&world);
    for http2 in [false, true] {
        let taken = Arc::<AtomicUsize>::default();
        let flood = async {
            let mut io = world.connect().await;
            if http2 {
                let request = Request::post("http://web.shop/flood");
                let request = request.body(endless(usize::MAX, &taken)).unwrap();
                let mut client = Http2::new(io).await;
                return tokio::select! {
                    answer = client.send(request) => panic!("answered: {answer:?}"),
                    taken = stuck(&taken) => taken,
                };
            }
            let head = "POST /flood HTTP/1.1\r\nhost: web\r\ncontent-length: 99999999999\r\n\r\n";
            io.write_all(head.as_bytes()).await.unwrap();
            let writing = async {
                let chunk = vec![7; 64 << 10];
                while io.write_all(&chunk).await.is_ok() {
                    taken.fetch_add(chunk.len(), Ordering::SeqCst);
                }
            };
            let taken = tokio::select! {
                () = writing => panic!("ended before it was read"),
                taken = stuck(&taken) => taken,
            };
            // The client goes, though nothing is read of it any more.
            io.reset();
            taken
        };
        let taken = attacked(&world, "an endless body", flood).await;
        assert!(taken < 16 * MIB, "{} MiB for an endpoint that reads nothing", taken / MIB);
        let line = world.take_line(&["path=\"/flood\"", "connection_broken"]).await;
        assert!(line.contains("status=0"), "{line}");
    }
    assert_eq!(sink.seen.requests(), 2);
}

#[tokio::test]
async fn a_body_that_comes_slowly() {
    let _one = ONE_AT_A_TIME.lock().await;
    let world = World::new(Protocol::Http);
    let (_web, sink) = (world.echo("web", "web").await, unread(&world).await);
    with_sink(&world);
    sink.seen.go_on.notify_one();
    let slow = async {
        let mut io = world.connect().await;
        io.write_all(b"POST /flood HTTP/1.1\r\nhost: web\r\ncontent-length: 40\r\n\r\n")
            .await
            .unwrap();
        for _ in 0..40 {
            io.write_all(b"x").await.unwrap();
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        let mut answer = vec![0; 4096];
        let length = io.read(&mut answer).await.unwrap();
        String::from_utf8_lossy(&answer[..length]).into_owned()
    };
    let answer = attacked(&world, "a slow body", slow).await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("\r\n\r\n40"), "{answer}");
}

#[tokio::test]
async fn a_gibibyte_each_way() {
    const SIZE: usize = 1 << 30;
    let _one = ONE_AT_A_TIME.lock().await;
    let world = World::new(Protocol::Http);
    let _web = world.echo("web", "web").await;
    // Sends back what it gets, as it comes.
    let _sink = world
        .endpoint("sink", "sink", |io, seen| {
            serve_http1(io, seen, |request, _| async move {
                Ok(Response::new(request.into_body().map_err(Error::from).boxed_unsync()))
            })
        })
        .await;
    with_sink(&world);
    let taken = Arc::<AtomicUsize>::default();
    let both = async {
        let request = Request::post("/flood").header("host", "web").body(endless(SIZE, &taken));
        let mut client = Http1::new(world.connect().await).await;
        let mut answer = client.send(request.unwrap()).await.unwrap().into_body();
        let mut read = 0;
        while let Some(frame) = answer.frame().await {
            read += frame.unwrap().into_data().map_or(0, |bytes| bytes.len());
        }
        read
    };
    assert_eq!(attacked(&world, "a gibibyte", both).await, SIZE);
    let line = world.take_line(&["path=\"/flood\""]).await;
    assert!(line.contains(&format!("bytes_sent={SIZE} bytes_recv={SIZE}")), "{line}");
}
