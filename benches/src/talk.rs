//! Small clients for people and for tests: one request, or one a second on a connection that lives.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use crate::lines;
use crate::request::connect_blocking;

/// Largest body that is shown: these clients talk to small servers.
const BODY_MAX: u64 = 1 << 20;
/// Most that standard input may hold for [`cat`].
const INPUT_MAX: u64 = 1 << 20;

/// Where a `http://HOST[:PORT]/PATH` leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Url {
    /// `HOST` or `HOST:PORT`, as it was written.
    pub authority: String,
    pub path: String,
}

impl Url {
    pub fn parse(text: &str) -> Result<Self> {
        let rest = text
            .strip_prefix("http://")
            .with_context(|| format!("{text:?} does not begin with http://"))?;
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        ensure!(!authority.is_empty(), "{text:?} names no host");
        let plain = |s: &str| s.bytes().all(|b| b.is_ascii_graphic());
        ensure!(plain(rest), "{text:?} holds blanks or letters that a URL must not hold");
        Ok(Self {
            authority: authority.to_owned(),
            path: if path.is_empty() { "/" } else { path }.to_owned(),
        })
    }

    fn address(&self) -> Result<SocketAddr> {
        // A colon behind the last bracket is a port's; one inside brackets belongs to an IPv6 address.
        let tail = self.authority.rsplit(']').next().unwrap_or("");
        if tail.contains(':') {
            resolve(&self.authority)
        } else {
            resolve(&format!("{}:80", self.authority))
        }
    }
}

/// The first address of `HOST:PORT`.
pub fn resolve(to: &str) -> Result<SocketAddr> {
    let mut found =
        to.to_socket_addrs().with_context(|| format!("{to} is not HOST:PORT of a known host"))?;
    found.next().with_context(|| format!("{to} has no address"))
}

/// Prints the body of one answer. An error unless the answer is 2xx.
pub fn get(url: &str, patience: Duration) -> Result<()> {
    let url = Url::parse(url)?;
    let mut talk = Talk::begin(url.address()?, patience)?;
    let (status, body) = talk.ask(&url, true)?;
    io::stdout().lock().write_all(&body)?;
    ensure!((200..300).contains(&status), "the answer is {status}");
    Ok(())
}

/// The status of one answer; its body is not looked at.
pub fn status(url: &str, patience: Duration) -> Result<u16> {
    let url = Url::parse(url)?;
    Ok(Talk::begin(url.address()?, patience)?.ask(&url, true)?.0)
}

/// Asks again and again on one connection, and prints each answer; an error once the connection is lost.
/// `count` 0: until then.
pub fn ping(url: &str, count: u64, every: Duration, patience: Duration) -> Result<()> {
    let url = Url::parse(url)?;
    let mut talk = Talk::begin(url.address()?, patience)?;
    let (began, mut answers) = (Instant::now(), 0_u64);
    loop {
        match talk.ask(&url, false) {
            Ok((status, body)) => {
                answers += 1;
                let body = String::from_utf8_lossy(&body);
                lines::line(
                    &json!({ "event": "answer", "number": answers, "status": status, "body": body.trim() }),
                )?;
            }
            Err(error) => {
                let after = began.elapsed().as_secs_f64();
                lines::line(
                    &json!({ "event": "lost", "answers": answers, "seconds": after, "why": format!("{error:#}") }),
                )?;
                bail!("the connection was lost after {answers} answers: {error:#}");
            }
        }
        if answers == count {
            return Ok(());
        }
        // Whoever ends the connection meanwhile is noticed by the next request, at most `every` later.
        thread::sleep(every);
    }
}

/// Between two questions of [`watch`]: what it adds to a time, at most.
const WATCH_PAUSE: Duration = Duration::from_micros(500);

/// Asks on one connection and prints a line when a header of the answer has another value, with the time of that answer in
/// microseconds since 1970. Ends after `time`, which is its way to succeed.
pub fn watch(url: &str, header: &str, time: Duration, patience: Duration) -> Result<()> {
    let url = Url::parse(url)?;
    let mut talk = Talk::begin(url.address()?, patience)?;
    let (began, mut last, mut failed) = (Instant::now(), None, 0_u64);
    while began.elapsed() < time {
        let (head, _) = talk.answer(&url, false)?;
        let status = status_of(&head)?;
        if status != 200 {
            failed += 1;
        }
        let value = field(&head, header).unwrap_or_default().to_owned();
        if last.as_ref() != Some(&value) {
            let micros = SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros();
            let micros = u64::try_from(micros)?;
            lines::line(
                &json!({ "event": "changed", "value": value, "at_us": micros, "failed": failed, "status": status }),
            )?;
            last = Some(value);
        }
        thread::sleep(WATCH_PAUSE);
    }
    lines::line(&json!({ "event": "watched", "failed": failed }))?;
    Ok(())
}

/// Sends standard input over one connection, ends its own direction, and prints what comes back.
pub fn cat(to: &str, patience: Duration) -> Result<()> {
    let mut input = Vec::new();
    io::stdin().take(INPUT_MAX).read_to_end(&mut input)?;
    let mut stream = connect_blocking(resolve(to)?, patience)
        .with_context(|| format!("cannot connect to {to}"))?;
    stream.set_read_timeout(Some(patience))?;
    stream.write_all(&input)?;
    stream.shutdown(std::net::Shutdown::Write)?;
    io::copy(&mut stream, &mut io::stdout())?;
    Ok(())
}

/// One HTTP/1.1 connection.
struct Talk {
    stream: BufReader<TcpStream>,
}

impl Talk {
    fn begin(to: SocketAddr, patience: Duration) -> Result<Self> {
        let stream =
            connect_blocking(to, patience).with_context(|| format!("cannot connect to {to}"))?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    fn ask(&mut self, url: &Url, last: bool) -> Result<(u16, Vec<u8>)> {
        let (head, body) = self.answer(url, last)?;
        Ok((status_of(&head)?, body))
    }

    /// The lines of an answer's head, and its body.
    fn answer(&mut self, url: &Url, last: bool) -> Result<(Vec<String>, Vec<u8>)> {
        let close = if last { "Connection: close\r\n" } else { "" };
        let request =
            format!("GET {} HTTP/1.1\r\nHost: {}\r\n{close}\r\n", url.path, url.authority);
        self.stream.get_mut().write_all(request.as_bytes()).context("cannot send the request")?;
        let head = self.head().context("no answer")?;
        let length: Option<u64> = field(&head, "content-length").and_then(|v| v.parse().ok());
        let mut body = Vec::new();
        let limit = length.unwrap_or(BODY_MAX).min(BODY_MAX);
        Read::by_ref(&mut self.stream)
            .take(limit)
            .read_to_end(&mut body)
            .context("the body broke off")?;
        let whole = length.is_none_or(|l| l == body.len() as u64);
        ensure!(whole, "the body broke off after {} of {} bytes", body.len(), length.unwrap_or(0));
        Ok((head, body))
    }

    fn head(&mut self) -> io::Result<Vec<String>> {
        let mut head = Vec::new();
        // 100 lines of 8 KiB: more than any server sends.
        for _ in 0..100 {
            let mut line = String::new();
            if Read::by_ref(&mut self.stream).take(8 << 10).read_line(&mut line)? == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            match line.trim_end() {
                "" => return Ok(head),
                text => head.push(text.to_owned()),
            }
        }
        Err(io::Error::new(ErrorKind::InvalidData, "the head of the answer does not end"))
    }
}

fn status_of(head: &[String]) -> Result<u16> {
    let status = head.first().and_then(|l| l.split(' ').nth(1)?.parse().ok());
    status.with_context(|| format!("the answer is not HTTP: {:?}", head.first()))
}

/// The first header of this name.
fn field<'a>(head: &'a [String], name: &str) -> Option<&'a str> {
    let mut fields = head.iter().filter_map(|l| l.split_once(':'));
    fields.find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        let check = |text: &str, want: Option<(&str, &str)>| {
            let got = Url::parse(text).ok();
            let got = got.as_ref().map(|u| (u.authority.as_str(), u.path.as_str()));
            assert_eq!(got, want, "{text:?}");
        };
        check("http://cart/who", Some(("cart", "/who")));
        check("http://cart", Some(("cart", "/")));
        check("http://cart:8080?x", Some(("cart:8080?x", "/")));
        check("http://[::1]:80/a/b", Some(("[::1]:80", "/a/b")));
        check("https://cart/", None);
        check("http:///who", None);
        check("http://cart/a b", None);
        check("http://cart/\r\nX: y", None);
    }

    #[test]
    fn addresses_of_urls() {
        let check = |text: &str, want: &str| {
            assert_eq!(Url::parse(text).unwrap().address().unwrap().to_string(), want, "{text}");
        };
        check("http://127.0.0.1/", "127.0.0.1:80");
        check("http://127.0.0.1:81/", "127.0.0.1:81");
        check("http://[::1]/", "[::1]:80");
        check("http://[::1]:81", "[::1]:81");
    }
}
