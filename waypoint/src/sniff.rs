//! What a client speaks on a port of which that is not declared, from its first bytes.
//!
//! A server may speak first, and then the client waits for it: so an endpoint is called when the client has said nothing for
//! a moment, and whoever speaks first decides. What looks like HTTP is HTTP, also when it comes late or in pieces.
//!
//! Invariants: nothing is taken from the client, so that whoever serves it sees every byte; what may still become HTTP is
//! waited for, and passed on as nothing else: a pause in the request line is no way around a route.

use std::io;

use hbone::TunnelIo;
use tokio::time::Instant;

use crate::config::Waits;

/// What the client speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spoken {
    Http1,
    Http2,
    /// Not HTTP: passed on as it is.
    Other,
}

/// Bytes in which the end of a request line is looked for, empty lines before it included: hyper's own limit. What is longer is
/// left to hyper to refuse.
pub const MAX_LINE: usize = 64 << 10;
/// Longest method: those that are registered have at most 17 letters.
const MAX_METHOD: usize = 32;
/// What every HTTP/2 client sends first.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Waits for as many bytes as it takes to know. A client that ends before made no request.
pub(crate) async fn spoken(io: &mut TunnelIo) -> io::Result<Spoken> {
    let mut first = FirstBytes::default();
    look(io, |bytes| first.judge(bytes)).await
}

/// The same on a port that speaks HTTP: only the version is to be found out.
pub(crate) async fn version(io: &mut TunnelIo) -> io::Result<Spoken> {
    look(io, judge_version).await
}

async fn look(
    io: &mut TunnelIo,
    mut judge: impl FnMut(&[u8]) -> Option<Spoken>,
) -> io::Result<Spoken> {
    let (mut seen, mut deadline) = (0, None);
    loop {
        let more = std::future::poll_fn(|cx| {
            io.poll_peek(cx, seen).map_ok(|bytes| bytes.map(|bytes| (judge(bytes), bytes.len())))
        });
        let looked = match deadline {
            None => more.await,
            // Who is slow with what looks like HTTP is left to what looks after slow requests.
            Some(at) => match tokio::time::timeout_at(at, more).await {
                Ok(looked) => looked,
                Err(_) => return Ok(Spoken::Http1),
            },
        };
        match looked? {
            None => return Ok(Spoken::Other),
            Some((Some(spoken), _)) => return Ok(spoken),
            Some((None, length)) => seen = length,
        }
        deadline.get_or_insert_with(|| Instant::now() + Waits::HEAD);
    }
}

/// What begins with these bytes. `None`: it takes more of them to know.
pub fn judge(bytes: &[u8]) -> Option<Spoken> {
    FirstBytes::default().judge(bytes)
}

/// The first bytes of a client, as they come. Each is looked at once, however small the pieces are in which they come.
#[derive(Debug, Default)]
pub struct FirstBytes {
    /// Of empty lines before the request line.
    empty: usize,
    /// Looked at. More than `empty`: the line has begun, and has no end in these.
    seen: usize,
}

impl FirstBytes {
    /// The same for all bytes that have come so far; those of the last time are at their front.
    pub fn judge(&mut self, bytes: &[u8]) -> Option<Spoken> {
        if let Some(verdict) = judge_preface(bytes) {
            return verdict;
        }
        let long = bytes.len() > MAX_LINE;
        if self.seen == self.empty {
            // Empty lines before a request are skipped, as servers do (RFC 9112, 2.2).
            let rest = bytes.get(self.empty..).unwrap_or_default();
            self.empty += rest.iter().take_while(|b| matches!(b, b'\r' | b'\n')).count();
            self.seen = self.empty;
        }
        if bytes.len() <= self.empty {
            return long.then_some(Spoken::Http1);
        }
        let line = &bytes[self.empty..];
        let new = bytes.get(self.seen..).unwrap_or_default();
        let end = new.iter().position(|b| *b == b'\n').map(|at| self.seen - self.empty + at);
        self.seen = bytes.len();
        let line = &line[..end.unwrap_or(line.len())];
        let method = line.iter().take(MAX_METHOD + 1).take_while(|b| is_token(**b)).count();
        let after = line.get(method);
        if method == 0 || method > MAX_METHOD || after.is_some_and(|b| *b != b' ') {
            return Some(Spoken::Other);
        }
        match end {
            Some(_) if is_request_line(line, method) => Some(Spoken::Http1),
            Some(_) => Some(Spoken::Other),
            None if long => Some(Spoken::Http1),
            None => None,
        }
    }
}

/// The same of what can only be HTTP.
pub fn judge_version(bytes: &[u8]) -> Option<Spoken> {
    judge_preface(bytes).unwrap_or(Some(Spoken::Http1))
}

/// `None`: this is no preface of HTTP/2. `Some(None)`: it could become one.
fn judge_preface(bytes: &[u8]) -> Option<Option<Spoken>> {
    let shared = bytes.len().min(PREFACE.len());
    let fits = bytes[..shared] == PREFACE[..shared];
    fits.then(|| (shared == PREFACE.len()).then_some(Spoken::Http2))
}

/// What a server said before its client did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServerSaid {
    /// HTTP: the client has yet to speak it.
    Http,
    /// Another protocol.
    Other,
    /// It ended without a word.
    Nothing,
}

/// Bytes of a server that are looked at: the head of a frame.
pub const SERVER_WORDS: usize = 9;

/// HTTP/2 begins with a SETTINGS frame (RFC 9113, 3.4) of the whole connection and with no flags. `None`: it takes more bytes.
pub fn server_said(bytes: &[u8]) -> Option<ServerSaid> {
    const STATUS: &[u8] = b"HTTP/";
    let shared = bytes.len().min(STATUS.len());
    if bytes[..shared] == STATUS[..shared] {
        return (shared == STATUS.len()).then_some(ServerSaid::Http);
    }
    let fits = |(at, byte): (usize, &u8)| match at {
        // A list of settings has far less than 64 KiB; six bytes each.
        0 => *byte == 0,
        1 | 2 => true,
        3 => *byte == 4,
        _ => *byte == 0,
    };
    if !bytes.iter().take(SERVER_WORDS).enumerate().all(fits) {
        return Some(ServerSaid::Other);
    }
    (bytes.len() >= SERVER_WORDS).then_some(ServerSaid::Http)
}

/// A line that ends with a version, or one without that a server of HTTP/0.9 would take for a request: hyper refuses that.
fn is_request_line(line: &[u8], method: usize) -> bool {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let mut words = line.rsplitn(2, |b| *b == b' ');
    let last = words.next().unwrap_or_default();
    let versioned = matches!(last, [b'H', b'T', b'T', b'P', b'/', rest @ ..] if !rest.is_empty());
    let known = matches!(&line[..method], b"GET" | b"HEAD" | b"POST" | b"PUT" | b"DELETE");
    versioned || (known && line.get(method + 1) == Some(&b'/'))
}

/// A character of a method (RFC 9110, 5.6.2).
fn is_token(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_clients_speak() {
        let check = |bytes: &[u8], want: Option<Spoken>| {
            assert_eq!(judge(bytes), want, "{}", bytes.escape_ascii());
            // However it is cut, no part of it says something else before.
            let mut byte_by_byte = FirstBytes::default();
            for end in 0..bytes.len() {
                let part = judge(&bytes[..end]);
                assert!(part.is_none() || part == want, "{}", bytes[..end].escape_ascii());
                if byte_by_byte.judge(&bytes[..end]).is_some() {
                    break;
                }
            }
        };
        let (http1, http2, other) = (Some(Spoken::Http1), Some(Spoken::Http2), Some(Spoken::Other));
        check(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n", http1);
        check(b"get / HTTP/1.1\r\n", http1);
        check(b"PROPFIND /a b HTTP/1.0\n", http1);
        check(b"\r\n\r\nPOST /x HTTP/1.1\r\n", http1);
        check(b"GET /old\r\n", http1);
        check(b"GET / HTTP/9\r\n", http1);
        check(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x12", http2);
        check(b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", http1);
        check(b"", None);
        check(b"GE", None);
        check(b"GET /a", None);
        check(b"\r\n", None);
        // Redis, inline and as an array; memcached; SMTP; TLS; PostgreSQL; MongoDB; AMQP; MQTT; a line of text.
        check(b"GET key\r\n", other);
        check(b"*1\r\n$4\r\nPING\r\n", other);
        check(b"get key\r\n", other);
        check(b"EHLO a.example\r\n", other);
        check(b"\x16\x03\x01\x02\0", other);
        check(b"\0\0\0\x08\x04\xd2\x16\x2f", other);
        check(b"A\0\0\0", other);
        check(b"AMQP\0\0\x09\x01", other);
        check(b"\x10\x0e\0\x04MQTT", other);
        check(b"hello\r\n", other);
        check(b"hello world\r\n", other);
        check(&[b'A'; MAX_METHOD + 1], other);
        assert_eq!(judge(&[b"GET /".as_slice(), &[b'a'; MAX_LINE]].concat()), http1);
        assert_eq!(judge(&[b'\n'; MAX_LINE]), None);
        assert_eq!(judge(&[b'\n'; MAX_LINE + 1]), http1);
    }

    #[test]
    fn what_servers_say_first() {
        let check = |bytes: &[u8], want: Option<ServerSaid>| {
            assert_eq!(server_said(bytes), want, "{}", bytes.escape_ascii());
        };
        let (http, other) = (Some(ServerSaid::Http), Some(ServerSaid::Other));
        check(b"HTTP/1.1 408 Request Timeout\r\n", http);
        check(b"HT", None);
        check(b"\0\0\x12\x04\0\0\0\0\0\0\x03", http);
        check(b"\0\0\x12\x04\0", None);
        check(b"\0\0\0\x04\x01\0\0\0\0", other);
        check(b"220 mail.example ESMTP\r\n", other);
        check(b"SSH-2.0-OpenSSH\r\n", other);
        // MySQL: three bytes of length, a number, the version.
        check(b"\x4a\0\0\0\x0a8.0.36\0", other);
        check(b"+OK\r\n", other);
    }

    proptest::proptest! {
        #[test]
        fn pieces_are_judged_as_the_whole(line in "(\r\n){0,3}(PRI|GET|get) ?[/a* ]{0,5}( HTTP/1.1|2.0)?(\r?\n){0,3}", cuts in proptest::collection::vec(1_usize..9, 60)) {
            let (mut first, mut end) = (FirstBytes::default(), 0);
            for cut in cuts {
                end = line.len().min(end + cut);
                let got = first.judge(&line.as_bytes()[..end]);
                proptest::prop_assert_eq!(got, judge(&line.as_bytes()[..end]));
                if got.is_some() {
                    break;
                }
            }
        }

        #[test]
        fn any_bytes_are_judged(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
            if let Some(first) = judge(&bytes) {
                // More bytes do not change what was decided.
                let more = [&bytes[..], b" HTTP/1.1\r\n"].concat();
                proptest::prop_assert_eq!(judge(&more), Some(first));
            }
        }
    }
}
