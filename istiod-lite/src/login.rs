//! Who calls: by the certificate of the connection, else by the token of the call.
//!
//! Invariant: who has a certificate is who it says, whatever else is claimed.

use std::time::SystemTime;

use http::HeaderMap;
use model::Str;

use crate::authorize::{Caller, Refused};
use crate::control::{Control, Peer};
use crate::pod_tokens::TokenId;

/// A caller, and the token that a call showed.
#[derive(Clone, Debug)]
pub(crate) struct Login<'a> {
    pub caller: Caller,
    /// Set when the caller is one by its token.
    pub token: Option<&'a str>,
}

impl Login<'_> {
    /// The token of a pod, on whose end what was opened with it ends.
    pub(crate) fn pod_token(&self) -> Option<TokenId> {
        self.caller.pod().and(self.token).map(TokenId::of)
    }
}

/// Who makes this call.
pub(crate) fn login<'a>(
    control: &Control,
    peer: &Peer,
    headers: &'a HeaderMap,
    now: SystemTime,
) -> Result<Login<'a>, Refused> {
    let token = bearer(headers)?;
    if peer.certificate.is_some() {
        let caller = peer.caller(&control.mesh.trust_domain, now)?;
        return Ok(Login { caller, token: None });
    }
    let text = token.ok_or(Refused::NoCredentials)?;
    let caller = by_token(control, text).ok_or(Refused::UnknownToken)?;
    Ok(Login { caller, token })
}

fn by_token(control: &Control, token: &str) -> Option<Caller> {
    let node: Option<Str> = control.tokens().node_of(token);
    if let Some(node) = node {
        return Some(Caller::Token { node });
    }
    control.pod_tokens().pod_of(TokenId::of(token)).cloned().map(Caller::Pod)
}

fn bearer(headers: &HeaderMap) -> Result<Option<&str>, Refused> {
    let Some(value) = headers.get(http::header::AUTHORIZATION) else { return Ok(None) };
    let token = value.to_str().ok().and_then(|text| text.strip_prefix("Bearer "));
    token.map(|token| Some(token.trim())).ok_or(Refused::MalformedToken)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn authorization_headers() {
        let check = |value: Option<&str>, want: Result<Option<&str>, &str>| {
            let mut headers = HeaderMap::new();
            if let Some(value) = value {
                headers.insert(http::header::AUTHORIZATION, value.parse().unwrap());
            }
            assert_eq!(bearer(&headers).map_err(|e| e.code()), want, "{value:?}");
        };
        check(None, Ok(None));
        check(Some("Bearer abc"), Ok(Some("abc")));
        check(Some("Bearer abc "), Ok(Some("abc")));
        check(Some("bearer abc"), Err("malformed_token"));
        check(Some("Basic abc"), Err("malformed_token"));
        check(Some(""), Err("malformed_token"));
    }
}
