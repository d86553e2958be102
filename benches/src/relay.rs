//! The floor: a relay that only copies. No TLS, no identity, no policy.
//!
//! One of these in each pod of a pair does the system calls that any proxy in user space must do, so the
//! same load through two of them says what this machine charges for being in between at all. A bar that
//! was taken on another machine can then be read as a multiple of its floor. One thread, one epoll set,
//! 64 KiB for each read.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};

use crate::clients::PATIENCE;
use crate::poller::Poller;
use crate::request::connect_blocking;
use crate::talk;

/// Bytes of one read: the size with which the floors of other machines were taken.
const CHUNK: usize = 64 * 1024;

/// Where to listen, and where what arrives there goes.
#[derive(Debug)]
pub struct Hop {
    pub listener: TcpListener,
    /// `HOST:PORT`, looked up at the first connection: the other end may start later than this one.
    pub to: String,
}

/// Relays until the process ends.
pub fn serve(hops: Vec<Hop>) -> io::Result<()> {
    let mut relay = Relay { poller: Poller::new()?, ends: BTreeMap::new(), next: 0 };
    let mut doors = Vec::new();
    for (hop, token) in hops.into_iter().zip(DOORS..) {
        hop.listener.set_nonblocking(true)?;
        relay.poller.reads(&hop.listener, token)?;
        doors.push((hop, None));
    }
    let (mut ready, mut buffer) = (Vec::new(), vec![0; CHUNK]);
    loop {
        relay.poller.wait(None, &mut ready)?;
        for &token in &ready {
            match token.checked_sub(DOORS).and_then(|door| usize::try_from(door).ok()) {
                Some(door) => {
                    let (hop, target) = &mut doors[door];
                    relay.accept(hop, target)?;
                }
                None => relay.step(token, &mut buffer),
            }
        }
    }
}

/// Tokens of listeners start here; those of connections stay far below.
const DOORS: u64 = 1 << 62;

struct Relay {
    poller: Poller,
    /// Both ends of every connection: an even token and the odd one after it.
    ends: BTreeMap<u64, End>,
    next: u64,
}

struct End {
    stream: TcpStream,
    /// What was read from the other end and did not fit this one yet.
    waiting: Vec<u8>,
    /// The other end has said all it had to say.
    last: bool,
    /// This end has.
    finished: bool,
}

impl Relay {
    fn accept(&mut self, hop: &Hop, target: &mut Option<SocketAddr>) -> io::Result<()> {
        loop {
            let client = match hop.listener.accept() {
                Ok((client, _)) => client,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == ErrorKind::ConnectionAborted => continue,
                Err(e) => return Err(e),
            };
            let to = match *target {
                Some(to) => to,
                None => match talk::resolve(&hop.to) {
                    Ok(to) => *target.insert(to),
                    // Not there yet: the client sees its connection end and counts an error.
                    Err(_) => continue,
                },
            };
            if let Ok(server) = connect_blocking(to, PATIENCE) {
                // A connection that is gone already is its client's matter.
                let _ = self.add(client, server);
            }
        }
    }

    fn add(&mut self, client: TcpStream, server: TcpStream) -> io::Result<()> {
        for stream in [client, server] {
            stream.set_nonblocking(true)?;
            stream.set_nodelay(true)?;
            self.poller.reads(&stream, self.next)?;
            let end = End { stream, waiting: Vec::new(), last: false, finished: false };
            self.ends.insert(self.next, end);
            self.next += 1;
        }
        Ok(())
    }

    /// Moves what can be moved at one end, and forgets both when one breaks or both are done.
    fn step(&mut self, token: u64, buffer: &mut [u8]) {
        let other = token ^ 1;
        if !self.ends.contains_key(&token) {
            return; // Its other end has just been forgotten.
        }
        let moved = self.flush(token).and_then(|()| self.copy(token, other, buffer));
        let done = |token| self.ends.get(&token).is_none_or(|end| end.finished);
        if moved.is_err() || (done(token) && done(other)) {
            self.ends.remove(&token);
            self.ends.remove(&other);
        }
    }

    /// Writes what waits for this end.
    fn flush(&mut self, token: u64) -> io::Result<()> {
        let Some(end) = self.ends.get_mut(&token) else { return Ok(()) };
        if end.waiting.is_empty() {
            return Ok(());
        }
        let sent = write_some(&end.stream, &end.waiting)?;
        end.waiting.drain(..sent);
        if end.waiting.is_empty() {
            if end.last {
                end.stream.shutdown(Shutdown::Write)?;
            }
            self.watch(token)?;
            self.watch(token ^ 1)?;
        }
        Ok(())
    }

    /// One read of this end, written to the other.
    fn copy(&mut self, from: u64, to: u64, buffer: &mut [u8]) -> io::Result<()> {
        let blocked = self.ends.get(&to).is_none_or(|end| !end.waiting.is_empty());
        let Some(source) = self.ends.get_mut(&from).filter(|end| !end.finished && !blocked) else {
            return Ok(());
        };
        let read = match source.stream.read(buffer) {
            Ok(read) => read,
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(e) => return Err(e),
        };
        source.finished = read == 0;
        let Some(target) = self.ends.get_mut(&to) else { return Ok(()) };
        if read == 0 {
            target.last = true;
            target.stream.shutdown(Shutdown::Write)?;
            return self.watch(from);
        }
        let sent = write_some(&target.stream, &buffer[..read])?;
        if sent < read {
            target.waiting.extend_from_slice(&buffer[sent..read]);
            self.watch(from)?;
            self.watch(to)?;
        }
        Ok(())
    }

    /// Reads are of interest while the other end takes them, writes while something waits.
    fn watch(&self, token: u64) -> io::Result<()> {
        let (Some(end), Some(other)) = (self.ends.get(&token), self.ends.get(&(token ^ 1))) else {
            return Ok(());
        };
        let reads = !end.finished && other.waiting.is_empty();
        self.poller.watch(&end.stream, token, reads, !end.waiting.is_empty())
    }
}

fn write_some(mut stream: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    match stream.write(bytes) {
        Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(0),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// More than the socket buffers hold, both ways, then half-close: nothing is lost.
    #[test]
    fn relays_both_ways_and_ends() {
        const MANY: usize = 32 << 20;
        let (door, back) = (bound(), bound());
        let (at, to) = (door.local_addr().unwrap(), back.local_addr().unwrap().to_string());
        thread::spawn(move || serve(vec![Hop { listener: door, to }]));
        let echo = thread::spawn(move || {
            let (mut stream, _) = back.accept().unwrap();
            let mut all = Vec::new();
            stream.read_to_end(&mut all).unwrap();
            stream.write_all(&all).unwrap();
            all.len()
        });
        let mut client = TcpStream::connect(at).unwrap();
        let sent: Vec<u8> = (0_u8..=250).cycle().take(MANY).collect();
        client.write_all(&sent).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut received = Vec::with_capacity(MANY);
        client.read_to_end(&mut received).unwrap();
        assert_eq!(echo.join().unwrap(), MANY);
        assert!(received == sent, "the bytes differ, {} came back", received.len());
    }

    fn bound() -> TcpListener {
        TcpListener::bind("127.0.0.1:0").unwrap()
    }
}
