//! The one request that the clients send, and the recognition of its answer, as cheap as can be.

use std::io::{self, ErrorKind, Read};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// Keeps the connection.
pub const KEEP: &[u8] = b"GET / HTTP/1.1\r\nHost: meshload\r\n\r\n";
/// Asks the server to close after the answer.
pub const CLOSE: &[u8] = b"GET / HTTP/1.1\r\nHost: meshload\r\nConnection: close\r\n\r\n";

/// A request for this path that keeps the connection.
///
/// # Errors
/// When the path is none.
pub fn get(path: &str) -> io::Result<Vec<u8>> {
    if !path.starts_with('/') || !path.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(bad("a path begins with / and holds no blanks"));
    }
    Ok(format!("GET {path} HTTP/1.1\r\nHost: meshload\r\n\r\n").into_bytes())
}

/// Largest answer head that is looked at; the servers of this tool send under 100 bytes.
const HEAD_LIMIT: usize = 16 * 1024;

/// Counts the bytes of one answer after another.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// Until the head is complete; empty between answers.
    head: Vec<u8>,
    /// Bytes of the body still to come, once the head is complete.
    left: Option<usize>,
}

impl Answer {
    /// Takes what was read. True when the answer is complete.
    ///
    /// # Errors
    /// When the answer is not a `200` with a `Content-Length`, or more came than was asked for.
    pub fn take(&mut self, mut bytes: &[u8]) -> io::Result<bool> {
        if self.left.is_none() {
            let before = self.head.len();
            self.head.extend_from_slice(bytes);
            let Some(end) = head_end(&self.head) else {
                if self.head.len() > HEAD_LIMIT {
                    return Err(bad("answer without end of head"));
                }
                return Ok(false);
            };
            self.left = Some(content_length(&self.head[..end])?);
            bytes = &bytes[end - before..];
            self.head.clear();
        }
        let left = self.left.unwrap_or(0);
        let rest = left.checked_sub(bytes.len()).ok_or_else(|| bad("more than was asked for"))?;
        self.left = (rest > 0).then_some(rest);
        Ok(rest == 0)
    }
}

/// The index behind the empty line that ends a head.
pub fn head_end(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|w| w == b"\r\n\r\n").map(|at| at + 4)
}

fn content_length(head: &[u8]) -> io::Result<usize> {
    if !head.starts_with(b"HTTP/1.1 200 ") {
        return Err(bad("status is not 200"));
    }
    let text = std::str::from_utf8(head).map_err(|_| bad("head is not text"))?;
    text.split("\r\n")
        .filter_map(|l| l.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .and_then(|(_, value)| value.trim().parse().ok())
        .ok_or_else(|| bad("no content-length"))
}

fn bad(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what)
}

/// A client's connection: non-blocking from its first moment.
#[derive(Debug)]
pub struct Connection {
    socket: Socket,
    answer: Answer,
}

impl Connection {
    /// Starts to connect; the socket becomes writable when that has come to an end.
    pub fn start(to: SocketAddr) -> io::Result<Self> {
        let socket = Socket::new(
            Domain::for_address(to),
            Type::STREAM.nonblocking().cloexec(),
            Some(Protocol::TCP),
        )?;
        socket.set_tcp_nodelay(true)?;
        match socket.connect(&SockAddr::from(to)) {
            Ok(()) => {}
            Err(e) if e.raw_os_error() == Some(nix::errno::Errno::EINPROGRESS as i32) => {}
            Err(e) => return Err(e),
        }
        Ok(Self { socket, answer: Answer::default() })
    }

    /// What the connect came to, once the socket is writable.
    pub fn connected(&self) -> io::Result<()> {
        match self.socket.take_error()? {
            None => Ok(()),
            Some(error) => Err(error),
        }
    }

    /// Sends the whole request; it always fits the buffer of a socket that waits for an answer.
    pub fn send(&self, request: &[u8]) -> io::Result<()> {
        let sent = self.socket.send(request)?;
        if sent < request.len() {
            return Err(io::Error::new(ErrorKind::WriteZero, "request did not fit the socket"));
        }
        Ok(())
    }

    /// Reads what is there. True when the answer is complete.
    pub fn receive(&mut self, buffer: &mut [u8]) -> io::Result<bool> {
        match (&self.socket).read(buffer) {
            Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
            Ok(n) => self.answer.take(&buffer[..n]),
            Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// After a complete answer: true when the server has closed.
    pub fn at_end(&self, buffer: &mut [u8]) -> io::Result<bool> {
        match (&self.socket).read(buffer) {
            Ok(0) => Ok(true),
            Ok(_) => Err(bad("more than was asked for")),
            Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Closing will reset the connection: neither side keeps it in TIME_WAIT.
    pub fn reset_on_close(&self) -> io::Result<()> {
        self.socket.set_linger(Some(Duration::ZERO))
    }

    pub fn raw(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A blocking connection for bulk data.
pub fn connect_blocking(to: SocketAddr, limit: Duration) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, limit)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_in_pieces() {
        let text = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello";
        for cut in 0..text.len() {
            let mut answer = Answer::default();
            assert!(!answer.take(&text[..cut]).unwrap(), "complete after {cut} bytes");
            assert!(answer.take(&text[cut..]).unwrap(), "not complete, cut at {cut}");
            // The next answer on the same connection.
            assert!(answer.take(text).unwrap());
        }
    }

    #[test]
    fn wrong_answers() {
        let check = |text: &[u8]| assert!(Answer::default().take(text).is_err(), "{text:?}");
        check(b"HTTP/1.1 503 Unavailable\r\nContent-Length: 0\r\n\r\n");
        check(b"HTTP/1.1 200 OK\r\n\r\n");
        check(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nab");
        check(&[b'x'; HEAD_LIMIT + 1]);
    }
}
