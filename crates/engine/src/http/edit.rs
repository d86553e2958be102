//! How requests and responses are changed on their way.
//!
//! Edits are read when the plan is made, not when they are applied: a name or a value that is none fails the
//! request before anything is sent. `host` is the authority wherever it stands.
//!
//! Adding to a header that is there joins the values with a comma, as Gateway API's example shows it; `set-cookie` gets a line of
//! its own, since it cannot be joined.
//!
//! Invariants: no edit touches the framing of a message or what is for one hop, or says who the client is; a request never loses its
//! host.

use http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS,
    CONNECTION, CONTENT_LENGTH, COOKIE, HOST, HeaderName, HeaderValue, SET_COOKIE, TE, TRAILER,
    TRANSFER_ENCODING, UPGRADE, VARY,
};
use http::uri::{Authority, PathAndQuery};
use http::{HeaderMap, request, response};
use model::Str;
use model::http::HeaderEdits;

use super::{HttpPlan, normalize};

/// One change of a request.
#[derive(Clone, Debug)]
pub(crate) enum Edit {
    Header(HeaderEdit),
    Host(Authority),
    /// The new path, query and all.
    Path(PathAndQuery),
}

/// One change of headers.
#[derive(Clone, Debug)]
pub(crate) enum HeaderEdit {
    Remove(HeaderName),
    Set(HeaderName, HeaderValue),
    Add(HeaderName, HeaderValue),
}

impl HttpPlan {
    /// Changes a normalised request into what the backend gets. For each attempt anew, on a copy of the original.
    pub fn edit_request(&self, parts: &mut request::Parts) {
        edit(&self.edits, parts);
    }

    /// Changes a normalised request into what [`Self::mirrors`]`[mirror]` gets: by the edits that stand before it.
    pub fn edit_mirror(&self, mirror: usize, parts: &mut request::Parts) {
        let before = self.mirror_edits.get(mirror).copied().unwrap_or_default();
        edit(self.edits.get(..before).unwrap_or_default(), parts);
    }

    /// Changes what a backend answered into what the client gets.
    pub fn edit_response(&self, parts: &mut response::Parts) {
        for edit in &self.response_edits {
            edit.apply(&mut parts.headers);
        }
        self.add_cors(&mut parts.headers);
    }

    /// Where the route has CORS rules that fit, they speak, and not the backend.
    pub(super) fn add_cors(&self, headers: &mut HeaderMap) {
        if self.cors.is_empty() {
            return;
        }
        headers.remove(ACCESS_CONTROL_ALLOW_ORIGIN);
        headers.remove(ACCESS_CONTROL_ALLOW_CREDENTIALS);
        headers.remove(ACCESS_CONTROL_EXPOSE_HEADERS);
        for (name, value) in &self.cors {
            if *name == VARY {
                headers.append(VARY, value.clone());
            } else {
                headers.insert(name, value.clone());
            }
        }
    }
}

/// Reads edits of a request's headers.
pub(super) fn of_request(edits: &HeaderEdits, into: &mut Vec<Edit>) -> Result<(), String> {
    if edits.remove.iter().any(|name| is_host(name)) {
        return Err("a request without its host cannot be sent".to_owned());
    }
    let (hosts, set): (Vec<_>, Vec<_>) = edits.set.iter().partition(|(name, _)| is_host(name));
    if edits.add.iter().any(|(name, _)| is_host(name)) {
        return Err("a request has one host; it can be set, not added to".to_owned());
    }
    read(&edits.remove, set.into_iter(), &edits.add, |edit| into.push(Edit::Header(edit)))?;
    for (_, host) in hosts {
        into.push(Edit::Host(normalize::authority(host)?));
    }
    Ok(())
}

/// Reads edits of a response's headers.
pub(super) fn of_response(edits: &HeaderEdits, into: &mut Vec<HeaderEdit>) -> Result<(), String> {
    read(&edits.remove, edits.set.iter(), &edits.add, |edit| into.push(edit))
}

fn read<'a>(
    remove: &[Str],
    set: impl Iterator<Item = &'a (Str, Str)>,
    add: &[(Str, Str)],
    mut push: impl FnMut(HeaderEdit),
) -> Result<(), String> {
    for name in remove {
        push(HeaderEdit::Remove(header(name)?));
    }
    for (name, text) in set {
        push(HeaderEdit::Set(writable(name)?, value(name, text)?));
    }
    for (name, text) in add {
        push(HeaderEdit::Add(writable(name)?, value(name, text)?));
    }
    Ok(())
}

fn is_host(name: &str) -> bool {
    name.eq_ignore_ascii_case("host") || name == ":authority"
}

fn header(name: &str) -> Result<HeaderName, String> {
    HeaderName::from_bytes(name.as_bytes()).map_err(|_| format!("{name:?} is no header's name"))
}

fn writable(name: &str) -> Result<HeaderName, String> {
    let header = header(name)?;
    let framing = [CONNECTION, CONTENT_LENGTH, TE, TRAILER, TRANSFER_ENCODING, UPGRADE];
    if framing.contains(&header) || header == normalize::HTTP2_SETTINGS {
        return Err(format!("header {header} says how the message is sent and cannot be written"));
    }
    if normalize::is_forged(&header) {
        return Err(format!("header {header} is for the mesh alone to write"));
    }
    Ok(header)
}

fn value(name: &str, text: &str) -> Result<HeaderValue, String> {
    HeaderValue::from_bytes(text.as_bytes())
        .map_err(|_| format!("the value for header {name} holds a control character"))
}

fn edit(edits: &[Edit], parts: &mut request::Parts) {
    for edit in edits {
        match edit {
            Edit::Header(edit) => edit.apply(&mut parts.headers),
            Edit::Host(authority) => {
                parts.uri = normalize::uri(&parts.uri, Some(authority.clone()), None);
                if let Ok(host) = HeaderValue::from_str(authority.as_str()) {
                    parts.headers.insert(HOST, host);
                }
            }
            Edit::Path(path) => parts.uri = normalize::uri(&parts.uri, None, Some(path.clone())),
        }
    }
}

impl HeaderEdit {
    pub(super) fn apply(&self, headers: &mut HeaderMap) {
        match self {
            Self::Remove(name) => {
                headers.remove(name);
            }
            Self::Set(name, value) => {
                headers.insert(name, value.clone());
            }
            Self::Add(name, value) => add(headers, name, value),
        }
    }
}

fn add(headers: &mut HeaderMap, name: &HeaderName, value: &HeaderValue) {
    let separator: &[u8] = if *name == COOKIE { b"; " } else { b"," };
    let joined = (headers.contains_key(name) && *name != SET_COOKIE).then(|| {
        let values = headers.get_all(name).iter().chain([value]).map(HeaderValue::as_bytes);
        HeaderValue::from_bytes(&values.collect::<Vec<_>>().join(separator))
    });
    match joined {
        Some(Ok(joined)) => {
            headers.insert(name, joined);
        }
        _ => {
            headers.append(name, value.clone());
        }
    }
}
