//! Asks the machine's resolvers for names that are not the cluster's.
//!
//! The lab has no way out to the machine's network; its DNS server hands such questions to the front over a socket pair
//! (one packet each: two bytes of tag, then the DNS message) and gets the answer the same way.
//!
//! Invariants: at most [`MOST_AT_ONCE`] questions are under way, each for at most [`PATIENCE`] per resolver; a question
//! that nobody answered is sent back as its tag alone.

use std::fs;
use std::io::{self, IoSlice, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, sendmsg};

/// Each question holds a thread for up to some seconds; a lab has some dozens of pods.
const MOST_AT_ONCE: usize = 64;
/// As long as a stub resolver waits for one server before it tries the next.
const PATIENCE: Duration = Duration::from_secs(2);
/// The largest DNS message there can be.
pub(crate) const MAX_MESSAGE: usize = 65_535;
/// glibc looks at no more than three resolvers either.
const MOST_RESOLVERS: usize = 3;

/// Answers until the lab closes its end.
pub(crate) fn serve_in_background(link: OwnedFd) -> io::Result<()> {
    std::thread::Builder::new().name("dns-upstream".into()).spawn(move || serve(Arc::new(link)))?;
    Ok(())
}

fn serve(link: Arc<OwnedFd>) {
    let under_way = Arc::new(AtomicUsize::new(0));
    let mut buffer = vec![0; 2 + MAX_MESSAGE];
    loop {
        let n = match recv(link.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(0) => return,
            Ok(n) => n,
            Err(Errno::EINTR) => continue,
            Err(e) => return tracing::debug!("DNS link to the lab: {e}"),
        };
        if n <= 2 || under_way.load(Ordering::Relaxed) >= MOST_AT_ONCE {
            continue;
        }
        under_way.fetch_add(1, Ordering::Relaxed);
        let (tag, question) = ([buffer[0], buffer[1]], buffer[2..n].to_vec());
        let (link, done) = (Arc::clone(&link), Arc::clone(&under_way));
        let started = std::thread::Builder::new().name("dns-question".into()).spawn(move || {
            // A tag alone means: nobody knows.
            let answer = ask(&resolvers(), &question).unwrap_or_default();
            let parts = [IoSlice::new(&tag), IoSlice::new(&answer)];
            let _ = sendmsg::<()>(link.as_raw_fd(), &parts, &[], MsgFlags::MSG_NOSIGNAL, None);
            done.fetch_sub(1, Ordering::Relaxed);
        });
        if started.is_err() {
            under_way.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

fn resolvers() -> Vec<SocketAddr> {
    parse_resolvers(&fs::read_to_string("/etc/resolv.conf").unwrap_or_default())
}

fn parse_resolvers(text: &str) -> Vec<SocketAddr> {
    let server = |line: &str| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next())??.parse::<IpAddr>().ok()
    };
    text.lines().filter_map(server).take(MOST_RESOLVERS).map(|ip| SocketAddr::new(ip, 53)).collect()
}

/// The first answer of any resolver; by TCP when it does not fit a datagram.
fn ask(resolvers: &[SocketAddr], question: &[u8]) -> Option<Vec<u8>> {
    let tried = |server: &SocketAddr| {
        let answer = ask_udp(*server, question).ok()?;
        let truncated = answer.get(2).is_some_and(|flags| flags & 0x02 != 0);
        if truncated { ask_tcp(*server, question).ok().or(Some(answer)) } else { Some(answer) }
    };
    resolvers.iter().find_map(tried)
}

fn ask_udp(server: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    let any: SocketAddr =
        if server.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = UdpSocket::bind(any)?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send(question)?;
    let mut buffer = vec![0; MAX_MESSAGE];
    loop {
        let n = socket.recv(&mut buffer)?;
        // Only an answer to this question: the socket is connected, the id must match too.
        if n >= 12 && buffer[..2] == question[..2] {
            buffer.truncate(n);
            return Ok(buffer);
        }
    }
}

fn ask_tcp(server: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&server, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let length = u16::try_from(question.len()).map_err(io::Error::other)?;
    stream.write_all(&length.to_be_bytes())?;
    stream.write_all(question)?;
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut answer)?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolvers_of_the_machine() {
        let check = |text: &str, want: &[&str]| {
            let got: Vec<String> = parse_resolvers(text).iter().map(ToString::to_string).collect();
            assert_eq!(got, want, "{text:?}");
        };
        check("", &[]);
        check("# nameserver 9.9.9.9\nsearch a b\nnameserver 1.1.1.1\n", &["1.1.1.1:53"]);
        check("nameserver ::1\nnameserver x\nnameserver\t8.8.8.8 ", &["[::1]:53", "8.8.8.8:53"]);
        check(&"nameserver 1.2.3.4\n".repeat(5), &["1.2.3.4:53"; 3]);
    }
}
