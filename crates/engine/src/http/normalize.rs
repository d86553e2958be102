//! The one step before anything looks at a request: what may be read in two ways is refused or gets one spelling.
//!
//! What stands afterwards:
//! - the URI has scheme, authority and path, and one `host` header says the authority too. HTTP/1 sends the URI's
//!   `path_and_query` and `host`; HTTP/2 sends the URI.
//! - the authority is in lower case, a name or an address with perhaps a port, and what `Host`, `:authority` and an absolute
//!   request line say is the same: otherwise two programs on the way could see two hosts.
//! - the path has one spelling ([`super::normal_path`]); the query stays as it is.
//! - no `transfer-encoding`, `keep-alive`, `te` (but `trailers`) and nothing that `connection` names: they were for
//!   this hop. `connection: upgrade` and `upgrade` stay together; an upgrade to `h2c` is not offered further, it would be a
//!   connection that nobody judges.
//! - no header that says who the client is where only its certificate may: `x-forwarded-client-cert`, `x-ambit-*`.
//!   Other `x-forwarded-*` stay as the client's own words; nothing here trusts them.
//! - one `cookie` header, as HTTP/1 wants it.
//!
//! Refused with [`Reason::BadHttp`]: two framings of one body (`content-length` beside `transfer-encoding`, two lengths, a
//! coding other than `chunked`), line breaks or NUL in a value, hop-by-hop headers in HTTP/2, no host or several, user info, a
//! scheme other than http and https, `CONNECT`. Refused with [`Reason::Limit`]: see [`MAX_HEAD`].

use std::net::Ipv6Addr;

use http::header::{
    CONNECTION, CONTENT_LENGTH, COOKIE, HOST, HeaderName, HeaderValue, TE, TRAILER,
    TRANSFER_ENCODING, UPGRADE,
};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, Method, Uri, Version, request};
use model::http::is_for_mesh_alone;
use model::{Reason, Refusal};

use super::path::normal_path;

/// Bytes of a request's path and headers, in the form it is sent on. What Envoy allows by default, so that no application that
/// ran under Istio finds a narrower door here.
pub const MAX_HEAD: usize = 60 << 10;

/// Headers of a request in the form it is sent on: each line counts, and `host` is one of them wherever it was said. Envoy's
/// default again, and hyper's.
pub const MAX_HEADERS: usize = 100;

/// Bytes of a host name, RFC 1035's limit.
const MAX_HOST: usize = 255;

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
pub(super) const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");

/// Brings a request into the form that every other function here expects, or says what is wrong with it. A refusal with
/// [`Reason::Limit`] is the client's fault: its status is 431 (`answer_with`).
pub fn normalize(parts: &mut request::Parts) -> Result<(), Refusal> {
    let forged = look(&parts.headers)?;
    framing(parts)?;
    if parts.version >= Version::HTTP_2 {
        no_hop_by_hop(&parts.headers)?;
    } else {
        strip_hop_by_hop(&mut parts.headers).map_err(bad)?;
    }
    if forged {
        remove_forged(&mut parts.headers);
    }
    join_cookies(&mut parts.headers);
    target(parts)?;
    limits(parts)
}

/// Removes what was meant for one hop, from a request of HTTP/1 or a response. `connection: upgrade` stays, with its
/// `upgrade`. `Err`: `connection` names what no hop may take away.
pub fn strip_hop_by_hop(headers: &mut HeaderMap) -> Result<(), String> {
    let mut upgrade = false;
    if headers.contains_key(CONNECTION) {
        let mut named = Vec::new();
        for token in tokens(headers, &CONNECTION) {
            match token.to_ascii_lowercase().as_str() {
                "" | "close" | "keep-alive" => {}
                "upgrade" => upgrade = true,
                "te" => {}
                "host" | "content-length" => {
                    return Err(format!("header connection names {token}, which is for everybody"));
                }
                other => match HeaderName::from_bytes(other.as_bytes()) {
                    Ok(name) => named.push(name),
                    Err(_) => return Err("header connection names no header".to_owned()),
                },
            }
        }
        headers.remove(CONNECTION);
        for name in named {
            headers.remove(name);
        }
    }
    headers.remove(KEEP_ALIVE);
    headers.remove(PROXY_CONNECTION);
    headers.remove(HTTP2_SETTINGS);
    headers.remove(TRANSFER_ENCODING);
    if headers.contains_key(TE) {
        let trailers = tokens(headers, &TE).any(|t| t.eq_ignore_ascii_case("trailers"));
        headers.remove(TE);
        if trailers {
            headers.insert(TE, HeaderValue::from_static("trailers"));
        }
    }
    if headers.contains_key(UPGRADE) {
        // Words that are no text may hide one.
        let text = headers.get_all(UPGRADE).iter().all(|value| value.to_str().is_ok());
        let h2c = tokens(headers, &UPGRADE).any(|t| t.eq_ignore_ascii_case("h2c"));
        if upgrade && text && !h2c {
            headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        } else {
            headers.remove(UPGRADE);
        }
    }
    Ok(())
}

/// Removes from a body's trailers what a trailer must not say (RFC 9110 §6.5.1), and what no client's word counts for: a
/// program that takes trailers for headers would believe it.
pub fn strip_trailers(trailers: &mut HeaderMap) {
    for name in [
        CONNECTION,
        CONTENT_LENGTH,
        HOST,
        HTTP2_SETTINGS,
        KEEP_ALIVE,
        PROXY_CONNECTION,
        TE,
        TRAILER,
        TRANSFER_ENCODING,
        UPGRADE,
    ] {
        trailers.remove(name);
    }
    remove_forged(trailers);
}

/// How an endpoint's answer of HTTP/1 ends must be said once: a length beside a coding is none (RFC 9112 §6.3), and a coding other
/// than `chunked` would be lost with the header. `Err`: the answer cannot be passed on.
pub fn one_framing(headers: &mut HeaderMap) -> Result<(), String> {
    if !headers.contains_key(TRANSFER_ENCODING) {
        return Ok(());
    }
    // `identity` was a coding once (RFC 2616), and is none.
    let known =
        |coding: &str| ["chunked", "identity"].iter().any(|k| coding.eq_ignore_ascii_case(k));
    let one = tokens(headers, &TRANSFER_ENCODING).count() == 1;
    if !one || !tokens(headers, &TRANSFER_ENCODING).all(known) {
        return Err("it has a transfer-encoding other than chunked".to_owned());
    }
    headers.remove(CONTENT_LENGTH);
    Ok(())
}

fn remove_forged(headers: &mut HeaderMap) {
    let names = headers.keys().filter(|name| is_forged(name));
    for name in names.cloned().collect::<Vec<_>>() {
        headers.remove(name);
    }
}

/// A host with perhaps a port, and nothing else. In lower case.
pub(super) fn authority(text: &str) -> Result<Authority, String> {
    let error = |why: &str| {
        let shown: String = text.chars().take(MAX_HOST).collect();
        Err(format!("{shown:?} is no host: {why}"))
    };
    if text.contains('@') {
        return error("it has user info");
    }
    let port = if let Some(rest) = text.strip_prefix('[') {
        let Some((ip, port)) = rest.split_once(']') else { return error("a bracket is open") };
        if ip.parse::<Ipv6Addr>().is_err() {
            return error("brackets are for IPv6 addresses");
        }
        port
    } else {
        let end = text.find(':').unwrap_or(text.len());
        let (name, port) = text.split_at(end);
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'~');
        if name.is_empty() || name.len() > MAX_HOST || !name.bytes().all(plain) {
            return error("a name has 1 to 255 letters, digits, dots, dashes and underscores");
        }
        port
    };
    let digits = port.strip_prefix(':').unwrap_or("1");
    if !digits.bytes().all(|b| b.is_ascii_digit()) || digits.parse::<u16>().is_err() {
        return error("a port is a number up to 65535");
    }
    if !port.is_empty() && !port.starts_with(':') {
        return error("something stands behind the bracket");
    }
    let lower = text.to_ascii_lowercase();
    Authority::try_from(lower).or_else(|e| error(&e.to_string()))
}

/// A URI with these parts in place of its own. A missing scheme is http.
pub(super) fn uri(old: &Uri, authority: Option<Authority>, path: Option<PathAndQuery>) -> Uri {
    let mut parts = old.clone().into_parts();
    parts.scheme = parts.scheme.or(Some(Scheme::HTTP));
    parts.authority = authority.or(parts.authority);
    parts.path_and_query = path.or(parts.path_and_query).or(Some(PathAndQuery::from_static("/")));
    // Fails only without an authority, which a request has after `normalize`.
    Uri::from_parts(parts).unwrap_or_else(|_| old.clone())
}

/// One pass over the headers for bytes that would end a line. Says whether there is a forged one.
fn look(headers: &HeaderMap) -> Result<bool, Refusal> {
    let mut forged = false;
    for (name, value) in headers {
        forged |= is_forged(name);
        // Without an early end: the compiler makes wide comparisons of it.
        let broken =
            value.as_bytes().iter().fold(false, |bad, b| bad | matches!(b, 0 | b'\r' | b'\n'));
        if broken {
            return Err(bad(format!("header {name} holds a line break or NUL")));
        }
    }
    Ok(forged)
}

/// Last, on what is sent on: before, another spelling of the same request (`:authority` for `host`, crumbs for a cookie) has
/// another size, and the next hop would refuse what this one let through. Until here the connection's own limits hold.
fn limits(parts: &request::Parts) -> Result<(), Refusal> {
    let path = parts.uri.path_and_query().map_or(0, |path| path.as_str().len());
    let sizes = parts.headers.iter().map(|(name, value)| name.as_str().len() + value.len());
    let bytes = path + sizes.sum::<usize>();
    if bytes > MAX_HEAD {
        let message =
            format!("path and headers have {bytes} bytes, at most {MAX_HEAD} are allowed");
        return Err(Refusal::new(Reason::Limit, message));
    }
    let count = parts.headers.len();
    if count > MAX_HEADERS {
        let message = format!("the request has {count} headers, at most {MAX_HEADERS} are allowed");
        return Err(Refusal::new(Reason::Limit, message));
    }
    Ok(())
}

/// Says who the client is, where only its certificate may.
pub(super) fn is_forged(name: &HeaderName) -> bool {
    is_for_mesh_alone(name.as_str())
}

/// One way to find the end of the body.
fn framing(parts: &request::Parts) -> Result<(), Refusal> {
    let headers = &parts.headers;
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    let mut lengths = headers.get_all(CONTENT_LENGTH).iter();
    let (coding, length) = (codings.next(), lengths.next());
    if let Some(coding) = coding {
        if parts.version != Version::HTTP_11 {
            let message = format!("{:?} knows no transfer-encoding", parts.version);
            return Err(bad(message));
        }
        if length.is_some() {
            return Err(bad("content-length and transfer-encoding in one request"));
        }
        if codings.next().is_some() || !coding.as_bytes().eq_ignore_ascii_case(b"chunked") {
            return Err(bad("a transfer-encoding other than chunked, or more than one"));
        }
    }
    let Some(length) = length else { return Ok(()) };
    // 19 digits are 2^63: no body is longer, and no program overflows on it.
    let number = length.as_bytes();
    if lengths.next().is_some()
        || !(1..20).contains(&number.len())
        || !number.iter().all(u8::is_ascii_digit)
    {
        return Err(bad("content-length is not one number"));
    }
    Ok(())
}

/// HTTP/2 has no such headers: RFC 9113 §8.2.2.
fn no_hop_by_hop(headers: &HeaderMap) -> Result<(), Refusal> {
    for name in [CONNECTION, UPGRADE, KEEP_ALIVE, PROXY_CONNECTION, HTTP2_SETTINGS] {
        if headers.contains_key(&name) {
            return Err(bad(format!("header {name} in HTTP/2")));
        }
    }
    if headers.get_all(TE).iter().any(|value| value != "trailers") {
        return Err(bad("header te in HTTP/2 with more than trailers"));
    }
    Ok(())
}

fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    let values = headers.get_all(name).iter();
    // What is not text becomes a token that is no header's name.
    values.flat_map(|v| v.to_str().unwrap_or("\u{fffd}").split(',')).map(str::trim)
}

/// HTTP/2 may send a cookie in crumbs; in HTTP/1 it is one header (RFC 9113 §8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let crumbs: Vec<&[u8]> = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if crumbs.len() < 2 {
        return;
    }
    if let Ok(joined) = HeaderValue::from_bytes(&crumbs.join(&b"; "[..])) {
        headers.insert(COOKIE, joined);
    }
}

/// Scheme, authority and path into the URI, and the authority into `host`.
fn target(parts: &mut request::Parts) -> Result<(), Refusal> {
    if parts.method == Method::CONNECT {
        return Err(bad("CONNECT is not passed on: what it opens is no HTTP"));
    }
    match parts.uri.scheme_str() {
        None => {}
        Some(s) if s.eq_ignore_ascii_case("http") || s.eq_ignore_ascii_case("https") => {}
        Some(other) => {
            let shown: String = other.chars().take(32).collect();
            return Err(bad(format!("scheme {shown:?}; it has to be http or https")));
        }
    }
    let authority = one_authority(parts)?;
    let path = one_path(parts)?;
    if parts.headers.get(HOST).is_none_or(|host| host.as_bytes() != authority.as_str().as_bytes()) {
        let host = HeaderValue::from_str(authority.as_str()).map_err(|e| bad(e.to_string()))?;
        parts.headers.insert(HOST, host);
    }
    parts.uri = uri(&parts.uri, Some(authority), path);
    Ok(())
}

/// What `Host`, `:authority` and the request line agree on.
fn one_authority(parts: &request::Parts) -> Result<Authority, Refusal> {
    let mut hosts = parts.headers.get_all(HOST).iter();
    let (host, second) = (hosts.next(), hosts.next());
    if second.is_some() {
        return Err(bad("more than one host header"));
    }
    let host = match host.map(HeaderValue::to_str) {
        Some(Ok(host)) => Some(host),
        Some(Err(_)) => return Err(bad("the host header is no text")),
        None => None,
    };
    let said = parts.uri.authority().map(Authority::as_str);
    let text = match (said, host) {
        (Some(said), Some(host)) if !said.eq_ignore_ascii_case(host) => {
            return Err(bad("the host header names another host than the request's target"));
        }
        (Some(text), _) | (None, Some(text)) => text,
        (None, None) => return Err(bad("the request names no host")),
    };
    authority(text).map_err(bad)
}

/// `None`: it is normal already.
fn one_path(parts: &request::Parts) -> Result<Option<PathAndQuery>, Refusal> {
    let path = parts.uri.path();
    if path == "*" && parts.method == Method::OPTIONS {
        return Ok(None);
    }
    let normal = normal_path(path).ok_or_else(|| {
        bad("the path does not begin with a slash, or holds %00 or a % without two digits")
    })?;
    if normal == path && parts.uri.path_and_query().is_some_and(|p| p.as_str().starts_with('/')) {
        return Ok(None);
    }
    let whole = match parts.uri.query() {
        Some(query) => format!("{normal}?{query}"),
        None => normal.into_owned(),
    };
    PathAndQuery::try_from(whole).map(Some).map_err(|e| bad(format!("the path is none: {e}")))
}

fn bad(message: impl Into<String>) -> Refusal {
    Refusal::new(Reason::BadHttp, message)
}

#[cfg(test)]
mod tests;
