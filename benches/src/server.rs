//! The servers: an HTTP/1.1 responder that does next to nothing, and echoes that tell the client's address.
//!
//! The responder is one thread and one epoll set, so that in a benchmark its cost is small and the
//! same in every run.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use serde_json::json;

use crate::lines;
use crate::poller::Poller;
use crate::request::head_end;

/// Longest request head; longer ones are refused. Ordinary clients send under 1 KiB.
const HEAD_LIMIT: usize = 16 * 1024;

/// The echo gives up on a client that is silent this long, so that nothing piles up in a pod.
const ECHO_PATIENCE: Duration = Duration::from_secs(600);

/// Connections that one echo serves at once, a thread each.
pub const THREADS_MAX: usize = 1024;

const LISTENER: u64 = u64::MAX;

/// Serves `GET` until the process ends: a body of `body` bytes, or for `/who`
/// the peer's address as this end sees it, and this host's name.
pub fn serve_http(listener: &TcpListener, body: usize) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let mut server = Http {
        poller: Poller::new()?,
        clients: BTreeMap::new(),
        page: page(body),
        accepting: true,
    };
    server.poller.reads(listener, LISTENER)?;
    let mut ready = Vec::new();
    let mut buffer = vec![0; HEAD_LIMIT];
    let mut next = 0;
    loop {
        server.poller.wait(None, &mut ready)?;
        for &token in &ready {
            if token == LISTENER {
                server.accept(listener, &mut next)?;
            } else if !server.step(token, &mut buffer) {
                server.clients.remove(&token);
                if !server.accepting {
                    server.poller.reads(listener, LISTENER)?;
                    server.accepting = true;
                }
            }
        }
    }
}

struct Http {
    poller: Poller,
    clients: BTreeMap<u64, Client>,
    page: Vec<u8>,
    /// False while this process has no file descriptor left: the next close opens the door again.
    accepting: bool,
}

struct Client {
    stream: TcpStream,
    peer: SocketAddr,
    /// An incomplete request.
    head: Vec<u8>,
}

impl Http {
    fn accept(&mut self, listener: &TcpListener, next: &mut u64) -> io::Result<()> {
        loop {
            match listener.accept() {
                Ok((stream, peer)) => {
                    let set_up =
                        stream.set_nonblocking(true).and_then(|()| stream.set_nodelay(true));
                    // A connection that its client has already reset is nobody's error.
                    if set_up.is_err() || self.poller.reads(&stream, *next).is_err() {
                        continue;
                    }
                    self.clients.insert(*next, Client { stream, peer, head: Vec::new() });
                    *next += 1;
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == ErrorKind::ConnectionAborted => {}
                Err(_) => {
                    self.poller.remove(listener)?;
                    self.accepting = false;
                    return Ok(());
                }
            }
        }
    }

    /// Reads and answers. False when the connection is done with.
    fn step(&mut self, token: u64, buffer: &mut [u8]) -> bool {
        let Some(client) = self.clients.get_mut(&token) else { return true };
        let read = match client.stream.read(buffer) {
            Ok(0) => return false,
            Ok(read) => read,
            Err(e) => return e.kind() == ErrorKind::WouldBlock,
        };
        // The usual case: exactly one request, whole.
        if client.head.is_empty() && head_end(&buffer[..read]) == Some(read) {
            return answer(client, &buffer[..read], &self.page);
        }
        client.head.extend_from_slice(&buffer[..read]);
        while let Some(end) = head_end(&client.head) {
            let head: Vec<u8> = client.head.drain(..end).collect();
            if !answer(client, &head, &self.page) {
                return false;
            }
        }
        client.head.len() <= HEAD_LIMIT
    }
}

/// Answers one request. False when the connection is to be closed.
fn answer(client: &mut Client, head: &[u8], page: &[u8]) -> bool {
    if head.starts_with(b"GET /who") {
        let host = nix::unistd::gethostname().unwrap_or_default();
        let who =
            json!({ "peer": client.peer.ip().to_canonical(), "host": host.to_string_lossy() });
        let response = response(format!("{who}\n").as_bytes());
        return client.stream.write_all(&response).is_ok() && !asks_to_close(head);
    }
    if !head.starts_with(b"GET ") {
        // A body may follow that would be read as the next request: answer and close.
        let refusal =
            b"HTTP/1.1 405 Method Not Allowed\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
        let _ = client.stream.write_all(refusal);
        return false;
    }
    client.stream.write_all(page).is_ok() && !asks_to_close(head)
}

fn asks_to_close(head: &[u8]) -> bool {
    const HEADER: &[u8] = b"connection: close";
    head.windows(HEADER.len()).any(|w| w.eq_ignore_ascii_case(HEADER))
}

fn page(body: usize) -> Vec<u8> {
    response(&vec![b'x'; body])
}

fn response(body: &[u8]) -> Vec<u8> {
    let mut head = String::from("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n");
    // Writing to a String cannot fail.
    let _ = write!(head, "Content-Length: {}\r\n\r\n", body.len());
    let mut response = head.into_bytes();
    response.extend_from_slice(body);
    response
}

/// What an echo says before it repeats what it hears.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Greeting {
    None,
    /// One line with the addresses of both ends as this side sees them, on the connection and on
    /// standard output. The server speaks first.
    Addresses,
}

/// Repeats every connection's bytes until its end, a thread each.
pub fn serve_echo(listener: &TcpListener, greeting: Greeting) -> io::Result<()> {
    each_in_a_thread(listener, move |stream, peer| echo(stream, peer, greeting))
}

/// Runs `serve` for every connection in a thread of its own, at most [`THREADS_MAX`] at once.
pub fn each_in_a_thread(
    listener: &TcpListener,
    serve: impl Fn(TcpStream, SocketAddr) -> io::Result<()> + Send + Sync,
) -> io::Result<()> {
    let (release, slots) = std::sync::mpsc::sync_channel(THREADS_MAX);
    let mut free = THREADS_MAX;
    thread::scope(|scope| {
        loop {
            let (stream, peer) = listener.accept()?;
            free += slots.try_iter().count();
            if free == 0 {
                free += usize::from(slots.recv().is_ok());
            }
            free -= 1;
            let (serve, release) = (&serve, release.clone());
            scope.spawn(move || {
                // One connection's end is its client's matter: the client counts it.
                let _ = serve(stream, peer);
                let _ = release.send(());
            });
        }
    })
}

fn echo(mut stream: TcpStream, peer: SocketAddr, greeting: Greeting) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(ECHO_PATIENCE))?;
    if greeting == Greeting::Addresses {
        let addresses = json!({
            "event": "connection",
            "peer": peer.ip().to_canonical(),
            "peer_port": peer.port(),
            "local": stream.local_addr()?.ip().to_canonical(),
            "local_port": stream.local_addr()?.port(),
        });
        lines::line(&addresses)?;
        writeln!(stream, "{addresses}")?;
    }
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let read = stream.read(&mut buffer)?;
        if read == 0 {
            return stream.shutdown(std::net::Shutdown::Write);
        }
        stream.write_all(&buffer[..read])?;
    }
}
