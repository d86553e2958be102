//! Where a redirect sends the client.
//!
//! The Location is absolute. Port: the redirect's own; else the well-known one of a scheme that the redirect sets;
//! else the Service port that was called. `:80` of http and `:443` of https are left out. The query stays, as does the path
//! where the redirect has none.
//!
//! Invariants: the Location is made of the route and the normalised request alone; what is no URI is an error.

use http::{HeaderValue, StatusCode};
use model::http::{PathMatch, Redirect, RedirectPort};

use super::{RequestFacts, path};

/// Status and `location`.
pub(super) fn redirect(
    redirect: &Redirect,
    facts: &RequestFacts<'_>,
    matched: &PathMatch,
) -> Result<(StatusCode, HeaderValue), String> {
    let status = match redirect.status {
        code @ (301 | 302 | 303 | 307 | 308) => StatusCode::from_u16(code).ok(),
        _ => None,
    };
    let status = status.ok_or_else(|| format!("{} is no redirect", redirect.status))?;
    let uri = &facts.request.uri;
    let scheme = redirect.scheme.as_deref().or_else(|| uri.scheme_str()).unwrap_or("http");
    let host = match &redirect.host {
        Some(host) => &**host,
        None => uri.host().ok_or("the request has no host")?,
    };
    let port =
        port(redirect, scheme, host, facts.port).map_or_else(String::new, |p| format!(":{p}"));
    let path = match &redirect.path {
        Some(rewrite) => path::rewritten(rewrite, matched, uri.path())?,
        None => uri.path().to_owned(),
    };
    // `OPTIONS *` names no path, and behind a host the star would be part of its name.
    let path = if path == "*" { "/" } else { &path };
    let target = path::with_query(path, uri.query())?;
    let location = format!("{scheme}://{host}{port}{target}");
    let value = HeaderValue::from_str(&path::ascii(&location))
        .map_err(|_| format!("the location {location:?} holds a control character"))?;
    Ok((status, value))
}

/// `None`: none to write.
fn port(redirect: &Redirect, scheme: &str, host: &str, called: u16) -> Option<u16> {
    let well_known = match scheme {
        "http" => Some(80),
        "https" => Some(443),
        _ => None,
    };
    // A host with a port of its own, as Istio's `authority` may be.
    let bare = host.rfind(']').map_or(host, |end| &host[end..]);
    let port = match redirect.port {
        RedirectPort::Number(port) => port,
        RedirectPort::Derived if bare.contains(':') => return None,
        RedirectPort::Derived if redirect.scheme.is_some() => well_known.unwrap_or(called),
        RedirectPort::Derived => called,
    };
    Some(port).filter(|port| Some(*port) != well_known)
}
