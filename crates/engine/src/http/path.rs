//! Paths: one spelling for each, and what a rewrite makes of them.
//!
//! Normalisation is what Istio does by default (`BASE`), and a little stricter where leniency would give one path two
//! spellings:
//!
//! | in the request | becomes |
//! |---|---|
//! | `%41`, `%7e`, `%2E`: an escaped unreserved character | the character |
//! | `\` | `/` |
//! | `.` and `..` segments, escaped or not | resolved; `..` of the root is the root |
//! | `é`, not ASCII | escaped |
//! | `%2f`, `%5c` and other escapes | kept, digits in upper case: `%2F` is not a slash to any rule |
//! | `//` | kept |
//! | `%00` | refused |
//! | `%` without two digits | refused: after one decoding it could become another escape |
//!
//! Invariants: normalising twice is normalising once; a normal path begins with a slash, is ASCII, has no dot segment
//! and no backslash; what a rewrite makes is normal again, so that no prefix replaced by a shorter one climbs out of it.

use std::borrow::Cow;

use http::uri::PathAndQuery;
use model::http::{PathMatch, PathRewrite};

/// The one spelling of a path without its query. `None`: it has none, see the module.
pub fn normal_path(path: &str) -> Option<Cow<'_, str>> {
    if !path.starts_with('/') {
        return None;
    }
    if is_plain(path) {
        return Some(Cow::Borrowed(path));
    }
    Some(Cow::Owned(without_dots(&decoded(path)?)))
}

/// The new path, after it matched `matched`. The query is not part of either.
pub(super) fn rewritten(
    rewrite: &PathRewrite,
    matched: &PathMatch,
    path: &str,
) -> Result<String, String> {
    // `OPTIONS *` names no path.
    if path == "*" {
        return Ok(path.to_owned());
    }
    let new = match rewrite {
        PathRewrite::Full(new) => new.to_string(),
        PathRewrite::Segments(new) => replace_segments(new, matched, path),
        PathRewrite::Text(new) => {
            let rest = path.get(matched_text(matched, path)..).unwrap_or_default();
            format!("{new}{rest}")
        }
        PathRewrite::Regex { pattern, substitution } => {
            pattern.replace(path, substitution).unwrap_or_else(|| path.to_owned())
        }
    };
    if new.contains('#') {
        return Err(format!("the new path {new:?} holds a '#', where a path ends"));
    }
    // A new path may bring a query of its own.
    let (new, query) = match new.split_once('?') {
        Some((new, query)) => (new, Some(query)),
        None => (&*new, None),
    };
    let rooted = if new.starts_with('/') { Cow::Borrowed(new) } else { format!("/{new}").into() };
    let normal = normal_path(&rooted).ok_or_else(|| format!("the new path {rooted:?} is none"))?;
    Ok(match query {
        Some(query) => format!("{normal}?{query}"),
        None => normal.into_owned(),
    })
}

/// Joins a rewritten path with the request's query.
pub(super) fn with_query(path: &str, query: Option<&str>) -> Result<PathAndQuery, String> {
    let joined = match query {
        Some(query) => {
            let join = if path.contains('?') { '&' } else { '?' };
            Cow::Owned(format!("{path}{join}{query}"))
        }
        None => Cow::Borrowed(path),
    };
    PathAndQuery::try_from(&*joined).map_err(|e| format!("the new path {path:?} is none: {e}"))
}

/// A text of a URI in ASCII, as `Location` has to be (RFC 3986 §2.5): a client may have sent its query in raw UTF-8.
pub(super) fn ascii(text: &str) -> Cow<'_, str> {
    if text.is_ascii() {
        return text.into();
    }
    let mut out = String::with_capacity(text.len() + 16);
    for byte in text.bytes() {
        if byte.is_ascii() {
            out.push(char::from(byte));
        } else {
            escape(byte, &mut out);
        }
    }
    out.into()
}

/// Gateway API's `ReplacePrefixMatch`: slashes at the end of the prefix and of the new one do not count.
fn replace_segments(new: &str, matched: &PathMatch, path: &str) -> String {
    let rest = match matched {
        // The prefix `/`: its slash is all of the path `/`, and the first of every other.
        PathMatch::Any if path == "/" => "",
        PathMatch::Any => path,
        _ => path.get(matched_text(matched, path)..).unwrap_or_default(),
    };
    let new = new.trim_end_matches('/');
    let join = if rest.is_empty() || rest.starts_with('/') { "" } else { "/" };
    format!("{new}{join}{rest}")
}

/// Bytes of the path that the match took. What is no prefix took all of it.
fn matched_text(matched: &PathMatch, path: &str) -> usize {
    match matched {
        PathMatch::Any => 1.min(path.len()),
        PathMatch::Segments(prefix)
        | PathMatch::Prefix(prefix)
        | PathMatch::PrefixIgnoringCase(prefix) => prefix.len(),
        PathMatch::Exact(_)
        | PathMatch::ExactIgnoringCase(_)
        | PathMatch::Regex(_)
        | PathMatch::GrpcMethod(_) => path.len(),
    }
}

/// Nothing to do: the common case, in one pass and without a copy.
fn is_plain(path: &str) -> bool {
    let mut before = b'/';
    path.bytes().all(|byte| {
        let dot = before == b'/' && byte == b'.';
        before = byte;
        !dot && byte != b'%' && byte != b'\\' && byte.is_ascii()
    })
}

fn decoded(path: &str) -> Option<String> {
    let mut out = String::with_capacity(path.len());
    let mut bytes = path.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' => out.push('/'),
            b'%' => match hex(bytes.next()?)? << 4 | hex(bytes.next()?)? {
                0 => return None,
                value if is_unreserved(value) => out.push(char::from(value)),
                value => escape(value, &mut out),
            },
            _ if byte.is_ascii() => out.push(char::from(byte)),
            _ => escape(byte, &mut out),
        }
    }
    Some(out)
}

fn escape(byte: u8, out: &mut String) {
    const DIGITS: [u8; 16] = *b"0123456789ABCDEF";
    out.push('%');
    out.push(char::from(DIGITS[usize::from(byte >> 4)]));
    out.push(char::from(DIGITS[usize::from(byte & 15)]));
}

/// RFC 3986 §2.3.
fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~')
}

/// The value of a hexadecimal digit.
pub(super) fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok())
}

/// RFC 3986 §5.2.4, for a path that begins with a slash. Empty segments are segments.
fn without_dots(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    let mut segments = path.split('/').skip(1).peekable();
    while let Some(segment) = segments.next() {
        let last = segments.peek().is_none();
        match segment {
            "." => {}
            ".." => out.truncate(out.rfind('/').unwrap_or(0)),
            _ => {
                out.push('/');
                out.push_str(segment);
                continue;
            }
        }
        if last {
            out.push('/');
        }
    }
    if out.is_empty() {
        out.push('/');
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn one_spelling() {
        let check = |path: &str, want: Option<&str>| {
            assert_eq!(normal_path(path).as_deref(), want, "{path:?}");
        };
        check("/", Some("/"));
        check("/a/b.c/..d/e.", Some("/a/b.c/..d/e."));
        check("/%41%7e%2D", Some("/A~-"));
        check("/a/./b/../c", Some("/a/c"));
        check("/a/%2e%2E/b", Some("/b"));
        check("/a/.%2e/b", Some("/b"));
        check("/../../a", Some("/a"));
        check("/a/..", Some("/"));
        check("/a/b/..", Some("/a/"));
        check("/a/.", Some("/a/"));
        check("/.", Some("/"));
        check("/a\\..\\b", Some("/b"));
        check("\\a", None);
        check("/a//b", Some("/a//b"));
        check("/a//../b", Some("/a/b"));
        check("/a%2fb%5c..", Some("/a%2Fb%5C.."));
        check("/a%252e%252e/b", Some("/a%252e%252e/b"));
        check("/é", Some("/%C3%A9"));
        check("/a%00b", None);
        check("/a%zz", None);
        check("/a%", None);
        check("/a%2", None);
        check("/%%32e%%32e/b", None);
        check("a", None);
        check("", None);
    }

    proptest! {
        #[test]
        fn twice_is_once(path in "/([a-z./\\\\%é]|%2e|%2E|%2f|%5c|%25|%41|/\\.\\.)*") {
            if let Some(once) = normal_path(&path) {
                let twice = normal_path(&once);
                prop_assert_eq!(twice.as_deref(), Some(&*once));
                prop_assert!(once.starts_with('/') && once.is_ascii() && !once.contains('\\'));
                prop_assert!(once.split('/').all(|s| s != "." && s != ".."));
            }
        }
    }

    #[test]
    fn prefixes_of_text_and_patterns() {
        let text = |new: &str| PathRewrite::Text(new.into());
        let check = |rewrite: PathRewrite, matched: PathMatch, path: &str, want: &str| {
            assert_eq!(
                rewritten(&rewrite, &matched, path).as_deref(),
                Ok(want),
                "{rewrite:?} {path}"
            );
        };
        check(text("/v1"), PathMatch::Prefix("/api".into()), "/api/x", "/v1/x");
        check(text("/v1"), PathMatch::Prefix("/api".into()), "/apix", "/v1x");
        check(text("/"), PathMatch::Prefix("/api/".into()), "/api/x", "/x");
        check(text("/v1"), PathMatch::PrefixIgnoringCase("/API".into()), "/api/x", "/v1/x");
        check(text("/v1"), PathMatch::Exact("/api".into()), "/api", "/v1");
        check(text("/v1/"), PathMatch::Any, "/x", "/v1/x");
        // No way out by a prefix that ends within a segment.
        check(text("/"), PathMatch::Prefix("/api".into()), "/api../x", "/x");
        let pattern = model::http::Pattern::new("^/s/([^/]+)(/.*)$").unwrap();
        let regex = PathRewrite::Regex { pattern, substitution: r"\2/of/\1".into() };
        check(regex.clone(), PathMatch::Any, "/s/a/b", "/b/of/a");
        check(regex, PathMatch::Any, "/t", "/t");
        check(PathRewrite::Full("/x".into()), PathMatch::Any, "*", "*");
        check(PathRewrite::Full("x?y=1".into()), PathMatch::Any, "/", "/x?y=1");
        let bad = rewritten(&PathRewrite::Full("/%zz".into()), &PathMatch::Any, "/");
        assert!(bad.is_err(), "{bad:?}");
    }
}
