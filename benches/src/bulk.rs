//! Bulk data in one direction, every byte counted at both ends.
//!
//! A client opens `streams` connections and says on each what it wants:
//! `S`, then bytes until its end of stream; the server answers with the number of bytes it counted.
//! `R` and a time in milliseconds; the server sends for that long, its last eight bytes being the
//! number of bytes before them.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::lines::{self, Errors};
use crate::request::connect_blocking;
use crate::server::each_in_a_thread;

/// Bytes per read and write: past the point where system calls cost more than copying.
const CHUNK: usize = 256 * 1024;
/// A peer that moves nothing for this long is dead: the run must end.
const STALL: Duration = Duration::from_secs(30);
/// Longest run that a server sends for, whatever the client asks.
const SEND_MAX: Duration = Duration::from_secs(600);

const SEND: u8 = b'S';
const RECEIVE: u8 = b'R';

/// Serves both directions until the process ends.
pub fn serve(listener: &TcpListener) -> io::Result<()> {
    each_in_a_thread(listener, |stream, _| serve_one(stream))
}

fn serve_one(mut stream: TcpStream) -> io::Result<()> {
    set_limits(&stream)?;
    let mut word = [0];
    stream.read_exact(&mut word)?;
    match word[0] {
        SEND => {
            let counted = drain(&mut stream)?.bytes;
            stream.write_all(&counted.to_be_bytes())?;
            stream.shutdown(Shutdown::Write)
        }
        RECEIVE => {
            let mut millis = [0; 8];
            stream.read_exact(&mut millis)?;
            let time = Duration::from_millis(u64::from_be_bytes(millis)).min(SEND_MAX);
            let sent = fill(&mut stream, time)?;
            stream.write_all(&sent.to_be_bytes())?;
            stream.shutdown(Shutdown::Write)
        }
        _ => Err(ErrorKind::InvalidData.into()),
    }
}

/// Which way the bytes go, as the client sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Send,
    Receive,
}

/// What one stream came to.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    sent: u64,
    received: u64,
}

/// Runs `streams` connections to `to` for `time`, and prints both ends' counts.
pub fn run(to: SocketAddr, direction: Direction, streams: usize, time: Duration) -> io::Result<()> {
    let errors = Mutex::new(Errors::default());
    let counts = Mutex::new(Vec::new());
    // The streams and this thread start and end together.
    let gate = Barrier::new(streams + 1);
    let took = thread::scope(|scope| -> io::Result<Duration> {
        for _ in 0..streams {
            scope.spawn(|| {
                let connection =
                    connect_blocking(to, STALL).and_then(|s| set_limits(&s).map(|()| s));
                gate.wait();
                let count = connection.and_then(|stream| one(stream, direction, time));
                match count {
                    Ok(count) => lock(&counts).push(count),
                    Err(error) => lock(&errors).add_io(&error),
                }
                gate.wait();
            });
        }
        // Printed before the gate opens, or the load would run ahead of the mark.
        lines::begin()?;
        gate.wait();
        let began = Instant::now();
        gate.wait();
        let took = began.elapsed();
        lines::end()?;
        Ok(took)
    })?;
    let counts = lock(&counts);
    let sent: u64 = counts.iter().map(|c| c.sent).sum();
    let received: u64 = counts.iter().map(|c| c.received).sum();
    let errors = lock(&errors);
    lines::result(json!({
        "mode": match direction { Direction::Send => "send", Direction::Receive => "receive" },
        "streams": streams,
        "seconds": took.as_secs_f64(),
        "bytes_sent": sent,
        "bytes_received": received,
        "lost": counts.len() < streams || counts.iter().any(|c| c.sent != c.received),
        "gbit_s": gbit(received, took),
        "errors": *errors,
    }))
}

#[expect(clippy::cast_precision_loss, reason = "a rate for people")]
fn gbit(bytes: u64, time: Duration) -> f64 {
    bytes as f64 * 8e-9 / time.as_secs_f64()
}

fn one(mut stream: TcpStream, direction: Direction, time: Duration) -> io::Result<Count> {
    match direction {
        Direction::Send => {
            stream.write_all(&[SEND])?;
            let sent = fill(&mut stream, time)?;
            stream.shutdown(Shutdown::Write)?;
            let mut counted = [0; 8];
            stream.read_exact(&mut counted)?;
            Ok(Count { sent, received: u64::from_be_bytes(counted) })
        }
        Direction::Receive => {
            let millis = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
            stream.write_all(&[RECEIVE])?;
            stream.write_all(&millis.to_be_bytes())?;
            let drained = drain(&mut stream)?;
            // The trailer itself is no payload.
            let received = drained.bytes.checked_sub(8).ok_or(ErrorKind::UnexpectedEof)?;
            Ok(Count { sent: u64::from_be_bytes(drained.last), received })
        }
    }
}

fn set_limits(stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(STALL))?;
    stream.set_write_timeout(Some(STALL))
}

fn fill(stream: &mut TcpStream, time: Duration) -> io::Result<u64> {
    let chunk = vec![b'm'; CHUNK];
    let until = Instant::now() + time;
    let mut sent = 0;
    while Instant::now() < until {
        stream.write_all(&chunk)?;
        sent += CHUNK as u64;
    }
    Ok(sent)
}

struct Drained {
    bytes: u64,
    /// The last eight bytes of the stream.
    last: [u8; 8],
}

fn drain(stream: &mut TcpStream) -> io::Result<Drained> {
    let mut buffer = vec![0; CHUNK];
    let mut drained = Drained { bytes: 0, last: [0; 8] };
    loop {
        let read = stream.read(&mut buffer)?;
        if read == 0 {
            return Ok(drained);
        }
        drained.bytes += read as u64;
        let fresh = &buffer[..read];
        let keep = read.min(8);
        drained.last.rotate_left(keep);
        drained.last[8 - keep..].copy_from_slice(&fresh[read - keep..]);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // A thread that panicked has already ended the process's use.
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (client, listener.accept().unwrap().0)
    }

    #[test]
    fn both_ends_count_the_same() {
        for direction in [Direction::Send, Direction::Receive] {
            let (client, server) = pair();
            let served = thread::spawn(move || serve_one(server));
            let count = one(client, direction, Duration::from_millis(20)).unwrap();
            served.join().unwrap().unwrap();
            assert!(count.sent >= CHUNK as u64, "{direction:?} {count:?}");
            assert_eq!(count.sent, count.received, "{direction:?}");
        }
    }

    /// The control: a sink that swallows a byte is found out.
    #[test]
    fn a_lost_byte_shows() {
        let (client, mut server) = pair();
        let thief = thread::spawn(move || {
            let mut two = [0; 2];
            server.read_exact(&mut two).unwrap();
            let counted = drain(&mut server).unwrap().bytes;
            server.write_all(&counted.to_be_bytes()).unwrap();
        });
        let count = one(client, Direction::Send, Duration::from_millis(20)).unwrap();
        thief.join().unwrap();
        assert_eq!(count.sent, count.received + 1);
    }
}
