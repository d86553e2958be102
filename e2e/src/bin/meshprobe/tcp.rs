//! TCP clients and servers with manners that ordinary programs do not have.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::json;
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::say;

/// How long these clients wait for anything.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often `hold` talks: what ends its connection is noticed this soon.
const TALK_EVERY: Duration = Duration::from_millis(50);
/// What `flood` sends on each connection: more than all buffers of a proxied way together may hold.
const FLOOD: u64 = 256 << 20;
/// What `slow` reads before it stops.
const SIP: u64 = 64 << 10;

/// What a server does with its connections.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(crate) enum Manner {
    /// Reads to the end, then answers with the number of bytes: needs a half-closed connection
    Count,
    /// Reads a byte, then resets
    Reset,
    /// Answers each byte, and prints how each connection ended
    Report,
    /// Sends 256 MiB as fast as it may, and prints how much it has got rid of
    Flood,
    /// Takes connections and never says anything
    Silent,
}

pub(crate) fn serve(manner: Manner, listen: SocketAddr) -> Result<()> {
    let listener =
        TcpListener::bind(listen).with_context(|| format!("cannot listen on {listen}"))?;
    for stream in listener.incoming() {
        let stream = stream?;
        std::thread::spawn(move || {
            // How it ended is said there; that a client went away is none of a server's trouble.
            let _ = match manner {
                Manner::Count => count(stream),
                Manner::Reset => reset_after_a_byte(stream),
                Manner::Report => report(stream),
                Manner::Flood => flood(stream),
                Manner::Silent => silent(stream),
            };
        });
    }
    Ok(())
}

fn count(mut stream: TcpStream) -> Result<()> {
    let n = io::copy(&mut stream, &mut io::sink())?;
    writeln!(stream, "{n} bytes")?;
    Ok(())
}

fn reset_after_a_byte(mut stream: TcpStream) -> Result<()> {
    stream.read_exact(&mut [0])?;
    Ok(SockRef::from(&stream).set_linger(Some(Duration::ZERO))?)
}

fn report(mut stream: TcpStream) -> Result<()> {
    let peer = stream.peer_addr()?;
    let mut bytes = 0;
    let mut byte = [0];
    let how = loop {
        match stream.read(&mut byte) {
            Ok(0) => break "eof".to_owned(),
            Ok(_) => bytes += 1,
            Err(e) => break word(&e),
        }
        if let Err(e) = stream.write_all(&byte) {
            break word(&e);
        }
    };
    say(&json!({ "peer": peer, "bytes": bytes, "end": how }))
}

fn flood(mut stream: TcpStream) -> Result<()> {
    let sent = Arc::new(AtomicU64::new(0));
    let counter = sent.clone();
    // Says when the stream has stopped moving, and once more at the end.
    let watcher = std::thread::spawn(move || -> Result<()> {
        let (mut last, mut stalled) = (0, false);
        while last < FLOOD {
            std::thread::sleep(Duration::from_millis(500));
            let now = counter.load(Ordering::Relaxed);
            if now == last && !stalled {
                say(&json!({ "stalled": now }))?;
            }
            (stalled, last) = (now == last, now);
        }
        Ok(())
    });
    let chunk = vec![b'f'; 64 << 10];
    while sent.load(Ordering::Relaxed) < FLOOD {
        stream.write_all(&chunk)?;
        sent.fetch_add(chunk.len() as u64, Ordering::Relaxed);
    }
    // It says nothing that is needed when it failed.
    let _ = watcher.join();
    say(&json!({ "sent": FLOOD }))
}

fn silent(mut stream: TcpStream) -> Result<()> {
    io::copy(&mut stream, &mut io::sink())?;
    Ok(())
}

pub(crate) fn hear(to: &str) -> Result<()> {
    let stream = connect(to, None, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line).context("heard nothing")?;
    say(&json!({ "heard": line.trim(), "local": stream.local_addr()? }))
}

/// What `end` was asked for.
#[derive(Debug)]
pub(crate) struct End {
    pub(crate) to: String,
    pub(crate) send: String,
    pub(crate) until: String,
    pub(crate) reset: bool,
    pub(crate) from: Option<IpAddr>,
    pub(crate) timeout: Duration,
}

pub(crate) fn end(ask: &End) -> Result<()> {
    let began = Instant::now();
    let mut heard = vec![];
    let how = match connect(&ask.to, ask.from, ask.timeout) {
        Ok(mut stream) => {
            talk(&mut stream, ask, &mut heard).map_or_else(|e| word(&e), str::to_owned)
        }
        Err(e) => format!(
            "no connection: {}",
            e.downcast_ref::<io::Error>().map_or_else(|| format!("{e:#}"), word)
        ),
    };
    let text = String::from_utf8_lossy(&heard[..heard.len().min(4096)]).into_owned();
    say(&json!({ "end": how, "bytes": heard.len(), "heard": text, "ms": millis(began) }))
}

fn talk(stream: &mut TcpStream, ask: &End, heard: &mut Vec<u8>) -> io::Result<&'static str> {
    stream.set_read_timeout(Some(ask.timeout))?;
    stream.write_all(ask.send.as_bytes())?;
    if ask.reset {
        stream.read_exact(&mut [0])?;
        SockRef::from(&*stream).set_linger(Some(Duration::ZERO))?;
        return Ok("reset by us");
    }
    let mut buffer = [0; 16 << 10];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok("eof"),
            n => heard.extend_from_slice(&buffer[..n]),
        }
        let until = ask.until.as_bytes();
        if !until.is_empty() && heard.windows(until.len()).any(|w| w == until) {
            return Ok("closed by us");
        }
    }
}

pub(crate) fn hold(to: &str) -> Result<()> {
    let began = Instant::now();
    let mut stream = connect(to, None, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let (mut answers, mut byte) = (0_u64, [0]);
    let how = loop {
        let asked = stream.write_all(b".").and_then(|()| stream.read(&mut byte));
        match asked {
            Ok(0) => break "eof".to_owned(),
            Ok(_) => answers += 1,
            Err(e) => break word(&e),
        }
        if answers == 1 {
            say(&json!({ "open": true, "local": stream.local_addr()? }))?;
        }
        std::thread::sleep(TALK_EVERY);
    };
    say(&json!({ "end": how, "answers": answers, "ms": millis(began) }))
}

pub(crate) fn slow(to: &str) -> Result<()> {
    let mut stream = connect(to, None, PATIENCE)?;
    let sip = io::copy(&mut Read::by_ref(&mut stream).take(SIP), &mut io::sink())?;
    say(&json!({ "sipped": sip }))?;
    io::copy(&mut io::stdin(), &mut io::sink())?;
    let rest = io::copy(&mut stream, &mut io::sink())?;
    say(&json!({ "bytes": sip + rest }))
}

pub(crate) fn garbage(to: &str, bytes: usize) -> Result<()> {
    let mut stream = connect(to, None, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    // Looks like no TLS record and repeats late.
    let noise: Vec<u8> = (0..bytes).map(|i| (i * 7 + i / 251).to_le_bytes()[0] ^ 0x5a).collect();
    let sent = stream.write_all(&noise);
    let _ = stream.shutdown(Shutdown::Write);
    let mut heard = vec![];
    let how = match sent.and_then(|()| stream.read_to_end(&mut heard)) {
        Ok(_) => "eof".to_owned(),
        Err(e) => word(&e),
    };
    say(&json!({ "end": how, "bytes": heard.len() }))
}

fn connect(to: &str, from: Option<IpAddr>, limit: Duration) -> Result<TcpStream> {
    let address = to.to_socket_addrs().with_context(|| format!("{to} is not HOST:PORT"))?.next();
    let address = address.with_context(|| format!("{to} has no address"))?;
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if let Some(from) = from {
        if from.is_ipv4() {
            socket.set_freebind_v4(true)?;
        } else {
            socket.set_freebind_v6(true)?;
        }
        socket.bind(&SocketAddr::new(from, 0).into())?;
    }
    socket.connect_timeout(&address.into(), limit)?;
    socket.set_tcp_nodelay(true)?;
    Ok(socket.into())
}

fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// How a connection ended, in a word that tests compare.
fn word(e: &io::Error) -> String {
    match e.kind() {
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => "reset".to_owned(),
        ErrorKind::ConnectionRefused => "refused".to_owned(),
        ErrorKind::TimedOut | ErrorKind::WouldBlock => "timeout".to_owned(),
        ErrorKind::UnexpectedEof => "eof".to_owned(),
        _ => e.to_string(),
    }
}
