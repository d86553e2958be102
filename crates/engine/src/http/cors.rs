//! Who may read an answer from another origin, as Gateway API's HTTPCORSFilter and Istio's CorsPolicy word it.
//!
//! A preflight is `OPTIONS` with `origin` and `access-control-request-method`, and is answered here with 204; every other
//! `OPTIONS` is a request like others. An origin that nothing allows gets no CORS header: the browser refuses then.
//! `*` is said as `*` where credentials are not allowed, else the client's own words are said back.
//!
//! Invariants: `*` never stands beside credentials; no header is named that was not asked for; the default port
//! of an origin's scheme may be written or not, on either side.

use http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE,
    ACCESS_CONTROL_REQUEST_HEADERS, ACCESS_CONTROL_REQUEST_METHOD, HeaderValue, ORIGIN, VARY,
};
use http::{HeaderMap, Method, request};
use model::Str;
use model::http::{Cors, OriginMatch};

pub(super) enum Judgement {
    /// The proxy answers, with these headers.
    Preflight(HeaderMap),
    /// The answer of whoever answers gets these headers.
    Allowed(HeaderMap),
    /// The request is none of CORS's business, or not allowed: it goes on without.
    Nothing,
}

pub(super) fn judge(cors: &Cors, request: &request::Parts) -> Judgement {
    let Some(origin) = request.headers.get(ORIGIN) else { return Judgement::Nothing };
    let asked = request.headers.get(ACCESS_CONTROL_REQUEST_METHOD);
    let preflight = asked.filter(|_| request.method == Method::OPTIONS);
    let allowed = origin.to_str().ok().and_then(|o| cors.allow_origins.iter().find(|m| fits(m, o)));
    match (allowed, preflight) {
        (None, Some(_)) if !cors.forward_unmatched_preflights => {
            Judgement::Preflight(HeaderMap::new())
        }
        (None, _) => Judgement::Nothing,
        (Some(by), None) => {
            let mut headers = allow_origin(cors, by, origin);
            let credentials = cors.allow_credentials;
            let names = cors.expose_headers.iter().filter(|name| !(credentials && &***name == "*"));
            list(&mut headers, &ACCESS_CONTROL_EXPOSE_HEADERS, names);
            Judgement::Allowed(headers)
        }
        (Some(by), Some(method)) => {
            let mut headers = allow_origin(cors, by, origin);
            allow(&mut headers, cors, &ACCESS_CONTROL_ALLOW_METHODS, &cors.allow_methods, method);
            if let Some(names) = request.headers.get(ACCESS_CONTROL_REQUEST_HEADERS) {
                allow(
                    &mut headers,
                    cors,
                    &ACCESS_CONTROL_ALLOW_HEADERS,
                    &cors.allow_headers,
                    names,
                );
            }
            if let Some(seconds) = cors.max_age {
                headers.insert(ACCESS_CONTROL_MAX_AGE, HeaderValue::from(seconds));
            }
            Judgement::Preflight(headers)
        }
    }
}

fn allow_origin(cors: &Cors, by: &OriginMatch, origin: &HeaderValue) -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(8);
    if *by == OriginMatch::Any && !cors.allow_credentials {
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    } else {
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
        // A cache must not give one origin's answer to another.
        headers.insert(VARY, HeaderValue::from_static("origin"));
    }
    if cors.allow_credentials {
        headers.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
    }
    headers
}

/// What is allowed, as a list; where it is everything and `*` would mean nothing, what was asked for.
fn allow(
    headers: &mut HeaderMap,
    cors: &Cors,
    name: &http::HeaderName,
    allowed: &[Str],
    asked: &HeaderValue,
) {
    if cors.allow_credentials && allowed.iter().any(|a| &**a == "*") {
        headers.insert(name, asked.clone());
    } else {
        list(headers, name, allowed.iter());
    }
}

fn list<'a>(
    headers: &mut HeaderMap,
    name: &http::HeaderName,
    words: impl Iterator<Item = &'a Str>,
) {
    let words: Vec<&str> = words.map(|w| &**w).collect();
    if words.is_empty() {
        return;
    }
    // A word that is no header text allows nothing.
    if let Ok(value) = HeaderValue::from_str(&words.join(", ")) {
        headers.insert(name, value);
    }
}

fn fits(m: &OriginMatch, origin: &str) -> bool {
    let origin = without_default_port(origin);
    match m {
        OriginMatch::Any => true,
        OriginMatch::Exact(text) => without_default_port(text).eq_ignore_ascii_case(origin),
        OriginMatch::Wildcard { before, after } => {
            let after = with_scheme_port(before, after);
            let Some(rest) = strip_start(origin, before) else { return false };
            let Some(star) = rest.len().checked_sub(after.len()) else { return false };
            let (Some(star), Some(end)) = (rest.get(..star), rest.get(star..)) else {
                return false;
            };
            let host = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
            !star.is_empty() && star.bytes().all(host) && end.eq_ignore_ascii_case(after)
        }
        OriginMatch::Prefix(text) => strip_start(origin, text).is_some(),
        OriginMatch::Regex(pattern) => pattern.matches(origin),
    }
}

fn strip_start<'a>(text: &'a str, start: &str) -> Option<&'a str> {
    let (head, rest) = text.split_at_checked(start.len())?;
    head.eq_ignore_ascii_case(start).then_some(rest)
}

/// `https://a:443` is `https://a`.
fn without_default_port(origin: &str) -> &str {
    let port = if strip_start(origin, "https://").is_some() {
        ":443"
    } else if strip_start(origin, "http://").is_some() {
        ":80"
    } else {
        return origin;
    };
    origin.strip_suffix(port).unwrap_or(origin)
}

/// The end of a wildcard, without its scheme's default port.
fn with_scheme_port<'a>(before: &str, after: &'a str) -> &'a str {
    let port = if strip_start(before, "https://").is_some() { ":443" } else { ":80" };
    after.strip_suffix(port).unwrap_or(after)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins() {
        let exact = |t: &str| OriginMatch::Exact(t.into());
        let wild = |before: &str, after: &str| OriginMatch::Wildcard {
            before: before.into(),
            after: after.into(),
        };
        let check = |m: OriginMatch, origin: &str, want: bool| {
            assert_eq!(fits(&m, origin), want, "{m:?} {origin}");
        };
        check(OriginMatch::Any, "null", true);
        check(exact("https://a.com"), "https://a.com", true);
        check(exact("https://a.com"), "https://a.com:443", true);
        check(exact("https://a.com:443"), "https://a.com", true);
        check(exact("http://a.com:80"), "http://a.com", true);
        check(exact("https://a.com"), "https://a.com:80", false);
        check(exact("https://a.com"), "http://a.com", false);
        check(exact("https://a.com"), "https://a.com.evil", false);
        check(exact("https://a.com"), "https://A.com", true);
        check(wild("https://", ".a.com"), "https://b.c.a.com", true);
        check(wild("https://", ".a.com"), "https://a.com", false);
        check(wild("https://", ".a.com"), "https://.a.com", false);
        check(wild("https://", ".a.com"), "http://b.a.com", false);
        check(wild("https://", ".a.com"), "https://b.a.com:8443", false);
        check(wild("https://", ".a.com:443"), "https://b.a.com", true);
        check(wild("https://", ".a.com"), "https://evil.com/x.a.com", false);
        check(wild("https://", ".a.com"), "https://evil.com:1@b.a.com", false);
        check(wild("https://", ""), "https://b.a.com", true);
        check(wild("https://", ""), "https://b.a.com:444", false);
        check(OriginMatch::Prefix("https://a".into()), "https://abc", true);
        let pattern = model::http::Pattern::new("https://[ab]").unwrap();
        check(OriginMatch::Regex(pattern), "https://a", true);
    }
}
