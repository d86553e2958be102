//! What a rule of a VirtualService does to requests and answers: CORS, faults, headers, rewrites, mirrors, redirects, answers.
//!
//! The order in which they apply is Istio's: CORS answers preflights first, then faults, then what is sent is changed.
//! Invariant: what cannot be read is a [`Failure`], except a fault, see `faults`.

use std::collections::BTreeSet;

use model::Str;
use model::http::{
    Abort, Cors, Fault, Filter, FixedResponse, HeaderEdits, Mirror, OriginMatch, PathRewrite,
    Redirect, RedirectPort, Rewrite, Share, TextMatch,
};

use super::super::{faults, text};
use super::rules::{Actions, Failure, PathChange, Place, Reader};
use crate::addresses;
use crate::diagnostics::{Code, Diagnostic};
use crate::istio::duration;
use crate::istio::virtual_service::{
    CorsPolicy, DerivePort, DirectResponse, HeaderOperations, Headers, HttpFaultInjection,
    HttpRedirect, HttpRewrite, HttpRule, Percent, UnmatchedPreflights,
};

/// Bytes of a fixed answer: as much as Istio takes.
const MAX_BODY: usize = 1 << 20;

/// HTTP/2's names of errors.
const HTTP2_ERRORS: [&str; 14] = [
    "NO_ERROR",
    "PROTOCOL_ERROR",
    "INTERNAL_ERROR",
    "FLOW_CONTROL_ERROR",
    "SETTINGS_TIMEOUT",
    "STREAM_CLOSED",
    "FRAME_SIZE_ERROR",
    "REFUSED_STREAM",
    "CANCEL",
    "COMPRESSION_ERROR",
    "CONNECT_ERROR",
    "ENHANCE_YOUR_CALM",
    "INADEQUATE_SECURITY",
    "HTTP_1_1_REQUIRED",
];

impl Reader<'_> {
    pub(super) fn actions(
        &mut self,
        rule: &HttpRule,
        at: &str,
        place: &Place<'_>,
    ) -> Result<Actions, Failure> {
        let mut actions = Actions {
            filters: Vec::new(),
            host: None,
            path: PathChange::None,
            mirrors: Vec::new(),
            redirect: None,
            respond: None,
        };
        if let Some(policy) = &rule.cors_policy {
            let cors = self.cors(policy, &format!("{at}.corsPolicy"))?;
            actions.filters.push(Filter::Cors(cors));
        }
        if let Some(fault) = &rule.fault {
            let fault = self.fault(fault, &format!("{at}.fault"));
            actions.filters.extend(fault.map(Filter::Fault));
        }
        actions.filters.append(&mut self.headers(rule.headers.as_ref(), &format!("{at}.headers"))?);
        if let Some(rewrite) = &rule.rewrite {
            self.rewrite(rewrite, &format!("{at}.rewrite"), &mut actions)?;
        }
        actions.mirrors = self.mirrors(rule, at, place)?;
        if let Some(redirect) = &rule.redirect {
            self.redirect(redirect, &format!("{at}.redirect"), place, &mut actions)?;
        }
        if let Some(response) = &rule.direct_response {
            let response = self.respond(response, &format!("{at}.directResponse"))?;
            actions.respond = Some(Filter::Respond(response));
        }
        Ok(actions)
    }

    /// Header edits as filters: of the request, its host, of the response.
    pub(super) fn headers(
        &mut self,
        headers: Option<&Headers>,
        at: &str,
    ) -> Result<Vec<Filter>, Failure> {
        let mut filters = Vec::new();
        let Some(headers) = headers else { return Ok(filters) };
        if let Some(request) = &headers.request {
            let at = format!("{at}.request");
            let mut host = None;
            let edits = self.edits(request, &at, Some(&mut host))?;
            filters.extend((!edits.is_empty()).then_some(Filter::RequestHeaders(edits)));
            filters
                .extend(host.map(|host| Filter::Rewrite(Rewrite { host: Some(host), path: None })));
        }
        if let Some(response) = &headers.response {
            let edits = self.edits(response, &format!("{at}.response"), None)?;
            filters.extend((!edits.is_empty()).then_some(Filter::ResponseHeaders(edits)));
        }
        Ok(filters)
    }

    /// `host`: where to put the host, of a request.
    fn edits(
        &mut self,
        operations: &HeaderOperations,
        at: &str,
        mut host: Option<&mut Option<Str>>,
    ) -> Result<HeaderEdits, Failure> {
        let mut edits = HeaderEdits::default();
        for name in &operations.remove {
            edits.remove.push(self.editable(
                name,
                &format!("{at}.remove"),
                text::editable_header,
            )?);
        }
        for (name, value) in &operations.set {
            let at = format!("{at}.set.{name}");
            let value = self.header_value(value, &at)?;
            match host.as_deref_mut() {
                Some(host)
                    if matches!(name.to_ascii_lowercase().as_str(), "host" | ":authority") =>
                {
                    *host = Some(self.authority(&value, &at)?);
                }
                _ => {
                    let name = self.editable(name, &at, text::writable_header)?;
                    edits.set.push((name, value.into()));
                }
            }
        }
        for (name, value) in &operations.add {
            let at = format!("{at}.add.{name}");
            let value = self.header_value(value, &at)?;
            let name = self.editable(name, &at, text::writable_header)?;
            edits.add.push((name, value.into()));
        }
        for (list, pairs) in [("set", &edits.set), ("add", &edits.add)] {
            if let Some(name) = twice(pairs) {
                let message = format!("{name:?} is there twice: case makes no difference");
                return Err(self.invalid(format!("{at}.{list}"), message));
            }
        }
        Ok(edits)
    }

    fn editable(
        &mut self,
        name: &str,
        at: &str,
        rule: fn(&str) -> Result<String, String>,
    ) -> Result<Str, Failure> {
        if let Err(message) = text::header_name(name) {
            return Err(self.invalid(at, message));
        }
        rule(name).map(Str::from).map_err(|e| self.unsupported(at, e))
    }

    /// In Istio `%` begins a variable of Envoy's, and `%%` is a percent sign.
    fn header_value(&mut self, value: &str, at: &str) -> Result<String, Failure> {
        text::header_value(value).map_err(|e| self.invalid(at, e))?;
        if value.replace("%%", "").contains('%') {
            let message =
                format!("{value:.80?}: variables are not handled; a percent sign is written %%");
            return Err(self.unsupported(at, message));
        }
        Ok(value.replace("%%", "%"))
    }

    /// A host, with or without a port, that requests may have.
    fn authority(&mut self, text: &str, at: &str) -> Result<Str, Failure> {
        let (host, port) = split_port(text);
        if let Err(message) = text::host(host) {
            return Err(self.invalid(at, message));
        }
        if let Some(Err(message)) = port.map(addresses::port) {
            return Err(self.invalid(at, format!("{text:.80?}: {message}")));
        }
        Ok(text.into())
    }

    fn rewrite(
        &mut self,
        rewrite: &HttpRewrite,
        at: &str,
        actions: &mut Actions,
    ) -> Result<(), Failure> {
        let HttpRewrite { uri, authority, uri_regex_rewrite } = rewrite;
        if !authority.is_empty() {
            actions.host = Some(self.authority(authority, &format!("{at}.authority"))?);
        }
        match uri_regex_rewrite {
            Some(_) if !uri.is_empty() => {
                return Err(self.invalid(at, "uri and uriRegexRewrite exclude each other"));
            }
            Some(regex) => {
                let at = format!("{at}.uriRegexRewrite");
                let pattern = self.pattern(&regex.r#match, format!("{at}.match"))?;
                if regex.rewrite.contains('#') {
                    let message = "holds a '#', which ends a path; in a path it is %23";
                    return Err(self.invalid(format!("{at}.rewrite"), message));
                }
                let substitution = regex.rewrite.as_str().into();
                actions.path = PathChange::Fixed(PathRewrite::Regex { pattern, substitution });
            }
            None if !uri.is_empty() => {
                actions.path = PathChange::Matched(self.path_text(uri, &format!("{at}.uri"))?);
            }
            None if authority.is_empty() => {
                return Err(self.invalid(at, "needs one of uri, authority and uriRegexRewrite"));
            }
            None => {}
        }
        Ok(())
    }

    /// A path, or the beginning of one.
    fn path_text(&mut self, path: &str, at: &str) -> Result<String, Failure> {
        match text::replacement(path) {
            Ok(()) => Ok(path.to_owned()),
            Err(message) => Err(self.unsupported(at, message)),
        }
    }

    fn mirrors(
        &mut self,
        rule: &HttpRule,
        at: &str,
        place: &Place<'_>,
    ) -> Result<Vec<Filter>, Failure> {
        if rule.mirror.is_some() && !rule.mirrors.is_empty() {
            return Err(
                self.invalid(format!("{at}.mirrors"), "mirror and mirrors exclude each other")
            );
        }
        let mut filters = Vec::new();
        if let Some(to) = &rule.mirror {
            let percent = rule.mirror_percent.map(|p| Percent { value: f64::from(p) });
            let (percent, field) = match rule.mirror_percentage {
                Some(percentage) => (Some(percentage), "mirrorPercentage.value"),
                None => (percent, "mirrorPercent"),
            };
            let share = self.mirror_share(percent, &format!("{at}.{field}"))?;
            let target = self.target(to, &format!("{at}.mirror"), place);
            filters.push(Filter::Mirror(Mirror { target, share }));
        }
        for (i, policy) in rule.mirrors.iter().enumerate() {
            let at = format!("{at}.mirrors[{i}]");
            let share = self.mirror_share(policy.percentage, &format!("{at}.percentage.value"))?;
            let target = self.target(&policy.destination, &format!("{at}.destination"), place);
            filters.push(Filter::Mirror(Mirror { target, share }));
        }
        Ok(filters)
    }

    fn mirror_share(&mut self, percent: Option<Percent>, at: &str) -> Result<Share, Failure> {
        let Some(percent) = percent else { return Ok(Share::ALL) };
        faults::share(percent.value).map_err(|e| self.invalid(at, e))
    }

    fn redirect(
        &mut self,
        redirect: &HttpRedirect,
        at: &str,
        place: &Place<'_>,
        actions: &mut Actions,
    ) -> Result<(), Failure> {
        let HttpRedirect {
            uri,
            authority,
            port,
            derive_port,
            scheme,
            redirect_code,
            prefix_rewrite,
        } = redirect;
        let status = match u16::try_from(*redirect_code) {
            Ok(0) => 301,
            Ok(code @ (301 | 302 | 303 | 307 | 308)) => code,
            _ => {
                let message = format!("{redirect_code} is not 301, 302, 303, 307 or 308");
                return Err(self.invalid(format!("{at}.redirectCode"), message));
            }
        };
        if !matches!(scheme.as_str(), "" | "http" | "https") {
            let message = format!("{scheme:.40?} is neither http nor https");
            return Err(self.invalid(format!("{at}.scheme"), message));
        }
        if !authority.is_empty() {
            self.authority(authority, &format!("{at}.authority"))?;
        }
        if port.is_some() && derive_port.is_some() {
            return Err(
                self.invalid(format!("{at}.derivePort"), "port and derivePort exclude each other")
            );
        }
        if port.is_some_and(|port| !(1..=65535).contains(&port)) {
            return Err(self.invalid(format!("{at}.port"), "not a port (1-65535)"));
        }
        if uri.is_empty()
            && prefix_rewrite.is_empty()
            && authority.is_empty()
            && scheme.is_empty()
            && port.is_none()
            && derive_port.is_none()
        {
            let message = "leads back to where it comes from: say one of uri, prefixRewrite, authority, scheme, port and derivePort";
            return Err(self.invalid(at, message));
        }
        actions.path = match (uri.as_str(), prefix_rewrite.as_str()) {
            ("", "") => PathChange::None,
            (uri, "") => {
                let path = self.path_text(uri, &format!("{at}.uri"))?;
                PathChange::Fixed(PathRewrite::Full(path.into()))
            }
            ("", prefix) => {
                PathChange::Prefix(self.path_text(prefix, &format!("{at}.prefixRewrite"))?)
            }
            _ => return Err(self.invalid(at, "uri and prefixRewrite exclude each other")),
        };
        let (host, _) = split_port(authority);
        actions.redirect = Some(Redirect {
            scheme: (!scheme.is_empty()).then(|| scheme.as_str().into()),
            host: (!host.is_empty()).then(|| host.into()),
            port: RedirectPort::Number(redirect_port(redirect, place)),
            path: None,
            status,
        });
        Ok(())
    }

    fn respond(&mut self, response: &DirectResponse, at: &str) -> Result<FixedResponse, Failure> {
        let status = faults::http_status(response.status);
        let status = status.map_err(|e| self.invalid(format!("{at}.status"), e))?;
        let at = format!("{at}.body");
        let body = match response.body.as_ref().map(|b| (&b.string, &b.bytes)) {
            None | Some((None, None)) => String::new(),
            Some((Some(text), None)) => text.clone(),
            Some((None, Some(bytes))) => match String::from_utf8(bytes.0.clone()) {
                Ok(text) => text,
                Err(_) => {
                    let message = "not a text: only UTF-8 can be answered";
                    return Err(self.unsupported(format!("{at}.bytes"), message));
                }
            },
            Some((Some(_), Some(_))) => {
                return Err(self.invalid(at, "string and bytes exclude each other"));
            }
        };
        if body.len() > MAX_BODY {
            let message = format!("has {} bytes, at most {MAX_BODY} are allowed", body.len());
            return Err(self.invalid(at, message));
        }
        Ok(FixedResponse { status, body: body.into() })
    }

    /// `None`: nobody is harmed.
    fn fault(&mut self, fault: &HttpFaultInjection, at: &str) -> Option<Fault> {
        let mut out = Fault::default();
        if let Some(delay) = &fault.delay {
            let at = format!("{at}.delay");
            let percent = delay.percent.map(|p| Percent { value: f64::from(p) });
            let share = self.fault_share(delay.percentage.or(percent), &at);
            match &delay.fixed_delay {
                Some(text) => match faults::delay(text) {
                    Ok(duration) => out.delay = share.map(|share| (share, duration)),
                    Err(e) => {
                        let legal = duration::parse(text).is_ok();
                        let code = if legal { Code::Unsupported } else { Code::InvalidField };
                        self.harmless(code, format!("{at}.fixedDelay"), &e);
                    }
                },
                // Diagnosed by its field.
                None if !delay.exponential_delay.is_null() => {}
                None => {
                    let message = "does not say for how long: fixedDelay is missing";
                    self.harmless(Code::InvalidField, at, message);
                }
            }
        }
        if let Some(abort) = &fault.abort {
            let at = format!("{at}.abort");
            let share = self.fault_share(abort.percentage, &at);
            let how = match (abort.http_status, &abort.grpc_status, &abort.http2_error) {
                (Some(status), None, None) => faults::http_status(status).map(Abort::Http),
                (None, Some(name), None) => faults::grpc_status(name).map(Abort::Grpc),
                (None, None, Some(name)) if HTTP2_ERRORS.contains(&name.as_str()) => {
                    Ok(Abort::Reset)
                }
                (None, None, Some(name)) => Err(format!("{name:.40?} is no error of HTTP/2")),
                _ => Err("needs one of httpStatus, grpcStatus and http2Error".to_owned()),
            };
            match how {
                Ok(how) => out.abort = share.map(|share| (share, how)),
                Err(e) => self.harmless(Code::InvalidField, at, &e),
            }
        }
        (out.delay.is_some() || out.abort.is_some()).then_some(out)
    }

    fn fault_share(&mut self, percent: Option<Percent>, at: &str) -> Option<Share> {
        let Some(percent) = percent else {
            let message = "harms nobody: without a percentage it is for no request, as in Istio";
            self.warn(Code::NoEffect, at, message);
            return None;
        };
        match faults::share(percent.value) {
            Ok(share) => Some(share).filter(|share| share.numerator > 0),
            Err(e) => {
                self.harmless(Code::InvalidField, format!("{at}.percentage.value"), &e);
                None
            }
        }
    }

    /// A fault that cannot be read, or not had.
    fn harmless(&mut self, code: Code, field: String, message: &str) {
        let message = format!("{message}; nobody is harmed until this is mended");
        self.found.push(Diagnostic::error(code, message).field(field));
    }

    fn cors(&mut self, policy: &CorsPolicy, at: &str) -> Result<Cors, Failure> {
        let mut origins = Vec::new();
        for (i, origin) in policy.allow_origins.iter().enumerate() {
            let at = format!("{at}.allowOrigins[{i}]");
            origins.push(match super::matches::value(origin, &at, self)? {
                None => OriginMatch::Any,
                Some(TextMatch::Exact(text)) => exact_origin(&text),
                Some(TextMatch::Prefix(text)) => OriginMatch::Prefix(text),
                Some(TextMatch::Regex(pattern)) => OriginMatch::Regex(pattern),
                Some(_) => return Err(self.invalid(at, "not an origin")),
            });
        }
        // The older field counts where the newer one is not there.
        if origins.is_empty() {
            origins.extend(policy.allow_origin.iter().map(|text| exact_origin(text)));
        } else if !policy.allow_origin.is_empty() {
            let message = "has no effect beside allowOrigins";
            self.warn(Code::NoEffect, format!("{at}.allowOrigin"), message);
        }
        let max_age = match &policy.max_age {
            None => None,
            Some(text) => match duration::parse(text) {
                Ok(age) => Some(u32::try_from(age.as_secs()).unwrap_or(u32::MAX)),
                Err(e) => return Err(self.invalid(format!("{at}.maxAge"), e)),
            },
        };
        Ok(Cors {
            allow_origins: origins,
            allow_methods: self.cors_names(&policy.allow_methods, &format!("{at}.allowMethods"))?,
            allow_headers: self.cors_names(&policy.allow_headers, &format!("{at}.allowHeaders"))?,
            expose_headers: self
                .cors_names(&policy.expose_headers, &format!("{at}.exposeHeaders"))?,
            allow_credentials: policy.allow_credentials.unwrap_or_default(),
            max_age,
            forward_unmatched_preflights: policy.unmatched_preflights
                != UnmatchedPreflights::Ignore,
        })
    }

    fn cors_names(&mut self, names: &[String], at: &str) -> Result<Vec<Str>, Failure> {
        let mut out = Vec::new();
        for (i, name) in names.iter().enumerate() {
            // Methods and headers are both tokens.
            if let Err(e) = text::header_name(name) {
                return Err(self.invalid(format!("{at}[{i}]"), e));
            }
            out.push(name.as_str().into());
        }
        Ok(out)
    }
}

fn exact_origin(text: &str) -> OriginMatch {
    if text == "*" { OriginMatch::Any } else { OriginMatch::Exact(text.into()) }
}

fn twice(pairs: &[(Str, Str)]) -> Option<&Str> {
    let mut seen: BTreeSet<&Str> = BTreeSet::new();
    pairs.iter().map(|(name, _)| name).find(|name| !seen.insert(*name))
}

/// The host, and what stands behind its last colon.
fn split_port(authority: &str) -> (&str, Option<&str>) {
    match authority.rsplit_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (authority, None),
    }
}

/// Istio keeps the port of the request's authority when nothing else is said. The mesh's requests come without TLS, so without a
/// scheme the port that is left out is 80.
fn redirect_port(redirect: &HttpRedirect, place: &Place<'_>) -> u16 {
    let default = if redirect.scheme == "https" { 443 } else { 80 };
    let called = match place {
        Place::At(there) => there.port,
        Place::Nowhere => default,
    };
    let stated = redirect.port.and_then(|port| u16::try_from(port).ok());
    let in_authority = split_port(&redirect.authority).1.and_then(|port| port.parse().ok());
    match (stated.or(in_authority), redirect.derive_port) {
        (Some(port), _) => port,
        (None, Some(DerivePort::FromProtocolDefault)) => default,
        (None, Some(DerivePort::FromRequestPort)) => called,
        (None, None) if !redirect.authority.is_empty() => default,
        // The port that goes without saying changes with the scheme.
        (None, None) if called == 80 => default,
        (None, None) => called,
    }
}
