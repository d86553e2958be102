//! Which match of a Service's routes decides.
//!
//! The consumer set of the client's namespace goes before the producer's, and in its place: the two are never merged. In a
//! set the first match that fits decides; the path index says which are worth a look, so that a set of ten thousand
//! prefixes costs what one of ten costs.
//!
//! What values are:
//! - a header that is there more than once: its lines joined with a comma, as RFC 9110 §5.3 reads them; a value that is not
//!   UTF-8 fits only [`TextMatch::Present`].
//! - `host`: the authority with the port that the client wrote, compared without regard to case;
//! - a query parameter: the first of its name, name and value with escapes and `+` decoded, as every form parser behind
//!   the proxy reads them; bytes that are not UTF-8 fit only [`TextMatch::Present`];
//! - a path: the normal one ([`super::normal_path`]), so a match that is written otherwise fits nothing.
//!
//! Invariants: the answer is that of trying all matches in order; a candidate costs no allocation, but for
//! repeated headers and escaped parameters; a caller without an identity fits no match that asks for one.

use std::borrow::Cow;
use std::sync::Arc;

use http::{HeaderMap, Method};
use model::http::{
    Audience, FieldMatch, PathMatch, RouteMatch, RouteSet, ServiceRoutes, SourceMatch, TextMatch,
};
use model::{Identity, Str};

use super::RequestFacts;
use super::path::hex;

/// A request as matches see it.
pub(super) struct Asked<'a> {
    method: &'a str,
    path: &'a str,
    query: Option<&'a str>,
    scheme: Option<&'a str>,
    authority: Option<&'a str>,
    headers: &'a HeaderMap,
    caller: Option<&'a Identity>,
}

impl<'a> Asked<'a> {
    pub(super) fn new(facts: &RequestFacts<'a>) -> Self {
        let request = facts.request;
        let query = request.uri.query();
        Self {
            method: Method::as_str(&request.method),
            path: request.uri.path(),
            query,
            scheme: request.uri.scheme_str(),
            authority: request.uri.authority().map(http::uri::Authority::as_str),
            headers: &request.headers,
            caller: facts.caller.identity,
        }
    }

    /// Whether all of these headers fit.
    pub(super) fn has(&self, headers: &[FieldMatch]) -> bool {
        headers.iter().all(|m| self.header_fits(m))
    }

    pub(super) fn comes_from(&self, source: &SourceMatch) -> bool {
        if source.is_anybody() {
            return true;
        }
        let Some(caller) = self.caller else { return false };
        let namespace = |n: &Str| *n == caller.namespace;
        (source.namespaces.is_empty() || source.namespaces.iter().any(namespace))
            && (source.identities.is_empty() || source.identities.contains(caller))
    }

    fn header_fits(&self, m: &FieldMatch) -> bool {
        if &*m.name == "host" {
            return self.authority.is_some_and(|a| host_fits(&m.value, a));
        }
        let mut lines = self.headers.get_all(&*m.name).iter();
        let Some(first) = lines.next() else { return false };
        if m.value == TextMatch::Present {
            return true;
        }
        if lines.next().is_none() {
            return fits_bytes(&m.value, first.as_bytes());
        }
        let all = self.headers.get_all(&*m.name).iter();
        let lines: Vec<&[u8]> = all.map(http::HeaderValue::as_bytes).collect();
        fits_bytes(&m.value, &lines.join(&b","[..]))
    }

    fn parameter_fits(&self, m: &FieldMatch) -> bool {
        let Some(value) = self.query.and_then(|query| parameter(query, &m.name)) else {
            return false;
        };
        m.value == TextMatch::Present || fits_bytes(&m.value, &value)
    }
}

/// The set for a client of this namespace. `None`: to this client the port is a plain Service.
pub(super) fn set_for<'a>(
    routes: &'a ServiceRoutes,
    port: u16,
    namespace: Option<&Str>,
) -> Option<&'a Arc<RouteSet>> {
    let find = |fits: &dyn Fn(&Audience) -> bool| {
        routes.sets.iter().find(|set| set.is_for_port(port) && fits(&set.audience))
    };
    namespace
        .and_then(|own| find(&|audience| matches!(audience, Audience::Namespace(n) if n == own)))
        .or_else(|| find(&|audience| *audience == Audience::Everybody))
}

/// The place in [`RouteSet::matches`] of the first match that fits.
pub(super) fn first(set: &RouteSet, asked: &Asked<'_>) -> Option<u32> {
    search(set, asked, &mut 0)
}

/// The same, and counts the matches that were tried.
fn search(set: &RouteSet, asked: &Asked<'_>, tried: &mut usize) -> Option<u32> {
    let mut best = None;
    for list in set.index.candidates(asked.path) {
        // Lists are ascending: what comes after the best so far cannot become the first.
        for place in list.iter().take_while(|place| best.is_none_or(|best| **place < best)) {
            *tried += 1;
            if set.matches.get(*place as usize).is_some_and(|m| fits(m, asked)) {
                best = Some(*place);
                break;
            }
        }
    }
    best
}

/// Whether everything fits; the cheap and telling first.
pub(super) fn fits(m: &RouteMatch, asked: &Asked<'_>) -> bool {
    path_fits(&m.path, asked.path)
        && m.method.as_ref().is_none_or(|m| m.matches(Some(asked.method)))
        && m.scheme.as_ref().is_none_or(|m| m.matches(asked.scheme))
        && m.authority.as_ref().is_none_or(|m| asked.authority.is_some_and(|a| host_fits(m, a)))
        && asked.comes_from(&m.source)
        && asked.has(&m.headers)
        && !m.without_headers.iter().any(|m| asked.header_fits(m))
        && m.query.iter().all(|m| asked.parameter_fits(m))
}

fn path_fits(m: &PathMatch, path: &str) -> bool {
    match m {
        PathMatch::Any => true,
        PathMatch::Exact(text) => path == &**text,
        PathMatch::Segments(prefix) => path
            .strip_prefix(&**prefix)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/')),
        PathMatch::Prefix(prefix) => path.starts_with(&**prefix),
        PathMatch::ExactIgnoringCase(text) => path.eq_ignore_ascii_case(text),
        PathMatch::PrefixIgnoringCase(prefix) => {
            path.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix))
        }
        PathMatch::Regex(pattern) => pattern.matches(path),
        PathMatch::GrpcMethod(name) => path
            .strip_prefix('/')
            .and_then(|path| path.split_once('/'))
            .is_some_and(|(service, method)| !service.is_empty() && method == &**name),
    }
}

/// Host names have no case (RFC 9110 §4.2.3); what a pattern sees is in lower case.
fn host_fits(m: &TextMatch, authority: &str) -> bool {
    match m {
        TextMatch::Exact(text) => authority.eq_ignore_ascii_case(text),
        TextMatch::Prefix(text) => {
            authority.get(..text.len()).is_some_and(|start| start.eq_ignore_ascii_case(text))
        }
        TextMatch::ExactIgnoringCase(_)
        | TextMatch::PrefixIgnoringCase(_)
        | TextMatch::Regex(_)
        | TextMatch::Present => m.matches(Some(authority)),
    }
}

fn fits_bytes(m: &TextMatch, value: &[u8]) -> bool {
    std::str::from_utf8(value).is_ok_and(|value| m.matches(Some(value)))
}

/// The first value of a query parameter, decoded.
fn parameter<'q>(query: &'q str, name: &str) -> Option<Cow<'q, [u8]>> {
    query.split('&').find_map(|pair| {
        let (found, value) = pair.split_once('=').unwrap_or((pair, ""));
        let same = if is_encoded(found) { decoded(found).eq(name.bytes()) } else { found == name };
        same.then(|| {
            if is_encoded(value) {
                Cow::Owned(decoded(value).collect())
            } else {
                Cow::Borrowed(value.as_bytes())
            }
        })
    })
}

fn is_encoded(text: &str) -> bool {
    text.bytes().any(|b| matches!(b, b'%' | b'+'))
}

/// `application/x-www-form-urlencoded`: what is no escape stands for itself.
fn decoded(text: &str) -> impl Iterator<Item = u8> {
    let mut rest = text.as_bytes();
    std::iter::from_fn(move || {
        let (byte, taken) = match *rest {
            [] => return None,
            [b'+', ..] => (b' ', 1),
            [b'%', high, low, ..] => match (hex(high), hex(low)) {
                (Some(high), Some(low)) => (high << 4 | low, 3),
                _ => (b'%', 1),
            },
            [byte, ..] => (byte, 1),
        };
        rest = &rest[taken..];
        Some(byte)
    })
}

#[cfg(test)]
mod tests;
