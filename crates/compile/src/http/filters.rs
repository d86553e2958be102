//! Filters of rules and of backends.
//!
//! Invariant: a filter is applied, or the rule is dropped and the status says so, or the filter becomes [`Filter::Fail`], which
//! answers with an error. It is never skipped.

use std::collections::BTreeSet;

use model::http::{
    Cors, Filter, HeaderEdits, Mirror, OriginMatch, PathRewrite, Redirect, RedirectPort, Rewrite,
    Share,
};
use model::{Reason, Str};

use super::rules::{Invalid, RuleCompiler};
use super::shape::{self, PathModifier};
use super::status::ConditionReason;
use super::{faults, targets, text};
use crate::ambit;
use crate::diagnostics::{Code, Diagnostic};
use crate::object::Objects;

/// Seconds that a browser may keep a preflight's answer when the route does not say.
const CORS_MAX_AGE: u32 = 5;

/// The filters that stand at `at`. `prefixes`: whether every match of the rule is a prefix.
pub(super) fn compile(
    filters: &[shape::Filter<'_>],
    at: &str,
    prefixes: bool,
    c: &mut RuleCompiler<'_, '_>,
) -> Result<Vec<Filter>, Invalid> {
    incompatible(filters, at)?;
    let mut out = Vec::new();
    for (i, filter) in filters.iter().enumerate() {
        out.extend(one(filter, &format!("{at}[{i}]"), prefixes, c)?);
    }
    Ok(out)
}

/// The filter that an ExtensionRef names, of the route's own namespace.
pub(crate) fn extension_filter(
    objects: &Objects,
    namespace: &str,
    to: &shape::ExtensionRef<'_>,
    trust_domain: &str,
) -> Result<Filter, String> {
    if (to.group, to.kind) != (ambit::GROUP, "HTTPFault") {
        return Err(format!("{}/{} {:?} is no filter that we know", to.group, to.kind, to.name));
    }
    let fault = faults::filter(objects, namespace, to.name, trust_domain);
    fault.ok_or_else(|| format!("there is no HTTPFault {namespace}/{}", to.name))
}

/// Filters of which one is enough, and those that exclude each other.
fn incompatible(filters: &[shape::Filter<'_>], at: &str) -> Result<(), Invalid> {
    let count = |of: fn(&shape::Filter<'_>) -> bool| filters.iter().filter(|f| of(f)).count();
    let redirects = count(|f| matches!(f, shape::Filter::Redirect(_)));
    let rewrites = count(|f| matches!(f, shape::Filter::Rewrite { .. }));
    for (name, n) in [
        ("RequestHeaderModifier", count(|f| matches!(f, shape::Filter::RequestHeaders(_)))),
        ("ResponseHeaderModifier", count(|f| matches!(f, shape::Filter::ResponseHeaders(_)))),
        ("CORS", count(|f| matches!(f, shape::Filter::Cors(_)))),
        ("RequestRedirect", redirects),
        ("URLRewrite", rewrites),
    ] {
        if n > 1 {
            return Err(Invalid::filters(at, format!("{name} stands {n} times; once is allowed")));
        }
    }
    if redirects + rewrites > 1 {
        let message = "a request is either redirected or rewritten, not both";
        return Err(Invalid::filters(at, message.to_owned()));
    }
    Ok(())
}

fn one(
    filter: &shape::Filter<'_>,
    at: &str,
    prefixes: bool,
    c: &mut RuleCompiler<'_, '_>,
) -> Result<Option<Filter>, Invalid> {
    let some = |f: Filter| Ok(Some(f));
    match filter {
        shape::Filter::RequestHeaders(e) => {
            let edits = edits(e, &format!("{at}.requestHeaderModifier"), c)?;
            some(Filter::RequestHeaders(edits))
        }
        shape::Filter::ResponseHeaders(e) => {
            let edits = edits(e, &format!("{at}.responseHeaderModifier"), c)?;
            some(Filter::ResponseHeaders(edits))
        }
        shape::Filter::Mirror(m) => mirror(m, &format!("{at}.requestMirror"), c).map(Some),
        shape::Filter::Redirect(r) => {
            let at = format!("{at}.requestRedirect");
            let filter = redirect(r, &at, prefixes)?;
            if r.scheme.is_none() && r.hostname.is_none() && r.port.is_none() && r.path.is_none() {
                let message = "leads back to where it comes from";
                let d = Diagnostic::warning(Code::NoEffect, message).field(at.as_str());
                c.diagnostics.push(d.help("say one of scheme, hostname, port and path"));
            }
            some(filter)
        }
        shape::Filter::Rewrite { hostname, path } => {
            let at = format!("{at}.urlRewrite");
            let host = host(*hostname, &at)?;
            let path = path.map(|p| path_rewrite(p, &at, prefixes)).transpose()?;
            some(Filter::Rewrite(Rewrite { host, path }))
        }
        shape::Filter::Cors(cors) => self::cors(cors, &format!("{at}.cors")).map(Some),
        shape::Filter::Extension(to) => some(extension(to, &format!("{at}.extensionRef"), c)),
        shape::Filter::ExternalAuth => {
            // Not dropped: another rule, or none, would let in whom this one asks about.
            let message = "ExternalAuth is not handled by this version: nobody can say who may, so nobody may";
            let d = Diagnostic::error(Code::Unsupported, message).field(at);
            c.unsupported(d.help("use an AuthorizationPolicy"));
            some(Filter::Fail { reason: Reason::BadFilter, message: message.into() })
        }
        shape::Filter::Malformed(why) => {
            Err(Invalid::value(at.to_owned(), format!("the filter {why}")))
        }
    }
}

fn extension(to: &shape::ExtensionRef<'_>, at: &str, c: &mut RuleCompiler<'_, '_>) -> Filter {
    let filter = extension_filter(c.objects, c.namespace, to, &c.cx.config.trust_domain);
    if filter.is_ok() {
        c.faults.insert(c.cx.share(to.name));
    }
    filter.unwrap_or_else(|message| {
        let d = Diagnostic::error(Code::DanglingReference, message.clone()).field(at);
        c.bad_reference(ConditionReason::InvalidKind, d.help(ANSWERS));
        Filter::Fail { reason: Reason::BadFilter, message: message.into() }
    })
}

const ANSWERS: &str = "requests of the rule are answered with an error until it is mended";

/// One action per header: a name that is set and added, or edited and removed, has no order to be done in.
fn edits(
    edits: &shape::Edits<'_>,
    at: &str,
    c: &mut RuleCompiler<'_, '_>,
) -> Result<HeaderEdits, Invalid> {
    let mut out = HeaderEdits::default();
    let mut seen: BTreeSet<String> = BTreeSet::new();
    for (list, pairs) in [("set", &edits.set), ("add", &edits.add)] {
        let mut own: BTreeSet<String> = BTreeSet::new();
        for (i, (name, value)) in pairs.iter().enumerate() {
            let at = format!("{at}.{list}[{i}]");
            let name =
                text::writable_header(name).map_err(|e| Invalid::value(format!("{at}.name"), e))?;
            text::header_value(value).map_err(|e| Invalid::value(format!("{at}.value"), e))?;
            if seen.contains(&name) {
                return Err(twice(at, &name));
            }
            if !own.insert(name.clone()) {
                let message = format!("{name:?} stands above already; only the first counts");
                c.diagnostics.push(Diagnostic::warning(Code::NoEffect, message).field(at));
                continue;
            }
            let pair = (c.cx.share(&name), (*value).into());
            if list == "set" { out.set.push(pair) } else { out.add.push(pair) }
        }
        seen.append(&mut own);
    }
    for (i, name) in edits.remove.iter().enumerate() {
        let at = format!("{at}.remove[{i}]");
        let name = text::editable_header(name).map_err(|e| Invalid::value(at.clone(), e))?;
        if seen.contains(&name) {
            return Err(twice(at, &name));
        }
        let name: Str = c.cx.share(&name);
        if !out.remove.contains(&name) {
            out.remove.push(name);
        }
    }
    Ok(out)
}

fn twice(at: String, name: &str) -> Invalid {
    Invalid::value(at, format!("{name:?} has another action already; one per header is allowed"))
}

fn mirror(
    mirror: &shape::Mirror<'_>,
    at: &str,
    c: &mut RuleCompiler<'_, '_>,
) -> Result<Filter, Invalid> {
    let share = match (mirror.percent, mirror.fraction) {
        (None, None) => Share::ALL,
        (Some(percent), None) => share(percent, 100, &format!("{at}.percent"))?,
        (None, Some((numerator, denominator))) => {
            share(numerator, denominator.unwrap_or(100), &format!("{at}.fraction"))?
        }
        (Some(_), Some(_)) => {
            let message = "percent and fraction both say how much; use one".to_owned();
            return Err(Invalid::value(at.to_owned(), message));
        }
    };
    // A copy that cannot be sent harms nobody: the requests themselves go on.
    let target = targets::target(&mirror.to, &format!("{at}.backendRef"), c);
    Ok(Filter::Mirror(Mirror { target, share }))
}

fn share(numerator: i32, denominator: i32, at: &str) -> Result<Share, Invalid> {
    let invalid = || {
        let message =
            format!("{numerator} of {denominator} is not a share between nothing and all");
        Invalid::value(at.to_owned(), message)
    };
    let numerator = u32::try_from(numerator).map_err(|_| invalid())?;
    let denominator = u32::try_from(denominator).map_err(|_| invalid())?;
    if denominator == 0 || numerator > denominator {
        return Err(invalid());
    }
    Ok(Share { numerator, denominator })
}

fn redirect(redirect: &shape::Redirect<'_>, at: &str, prefixes: bool) -> Result<Filter, Invalid> {
    let host = host(redirect.hostname, at)?;
    let port = match redirect.port {
        None => RedirectPort::Derived,
        Some(port) => match u16::try_from(port) {
            Ok(port) if port > 0 => RedirectPort::Number(port),
            _ => {
                let message = format!("{port} is not a port (1-65535)");
                return Err(Invalid::value(format!("{at}.port"), message));
            }
        },
    };
    let status = match redirect.status.unwrap_or(302) {
        301 => 301,
        302 => 302,
        303 => 303,
        307 => 307,
        308 => 308,
        other => {
            let message = format!("{other} is not 301, 302, 303, 307 or 308");
            return Err(Invalid::value(format!("{at}.statusCode"), message));
        }
    };
    let path = redirect.path.map(|p| path_rewrite(p, at, prefixes)).transpose()?;
    let scheme = redirect.scheme.map(Str::from);
    Ok(Filter::Redirect(Redirect { scheme, host, port, path, status }))
}

fn host(hostname: Option<&str>, at: &str) -> Result<Option<Str>, Invalid> {
    if let Some(name) = hostname {
        text::host(name).map_err(|e| Invalid::value(format!("{at}.hostname"), e))?;
    }
    Ok(hostname.map(Str::from))
}

fn path_rewrite(path: PathModifier<'_>, at: &str, prefixes: bool) -> Result<PathRewrite, Invalid> {
    let at = format!("{at}.path");
    let judge = |text: &str, field: &str| {
        text::replacement(text).map_err(|e| Invalid::value(format!("{at}.{field}"), e))
    };
    match path {
        PathModifier::Full(text) => {
            judge(text, "replaceFullPath")?;
            // An empty path cannot be asked for.
            Ok(PathRewrite::Full(if text.is_empty() { "/".into() } else { text.into() }))
        }
        PathModifier::Prefix(_) if !prefixes => {
            let message = "ReplacePrefixMatch needs a PathPrefix in every match of the rule";
            Err(Invalid::value(format!("{at}.type"), message.to_owned()))
        }
        PathModifier::Prefix(text) => {
            judge(text, "replacePrefixMatch")?;
            Ok(PathRewrite::Segments(text.into()))
        }
        PathModifier::Missing => {
            Err(Invalid::value(at, "lacks the value that its type asks for".to_owned()))
        }
    }
}

fn cors(cors: &shape::Cors<'_>, at: &str) -> Result<Filter, Invalid> {
    let mut origins = Vec::new();
    for (i, origin) in cors.allow_origins.iter().enumerate() {
        let invalid = |e| Invalid::value(format!("{at}.allowOrigins[{i}]"), e);
        origins.push(self::origin(origin).map_err(invalid)?);
    }
    let names = |field: &str, all: &[String]| {
        let name = |(i, name): (usize, &String)| match name.as_str() {
            "*" => Ok(Str::from("*")),
            name => match text::header_name(name) {
                Ok(_) => Ok(Str::from(name)),
                Err(e) => Err(Invalid::value(format!("{at}.{field}[{i}]"), e)),
            },
        };
        all.iter().enumerate().map(name).collect::<Result<Vec<Str>, Invalid>>()
    };
    let max_age = match cors.max_age {
        None => CORS_MAX_AGE,
        Some(seconds) => u32::try_from(seconds).map_err(|_| {
            Invalid::value(format!("{at}.maxAge"), format!("{seconds} is not a number of seconds"))
        })?,
    };
    Ok(Filter::Cors(Cors {
        allow_origins: origins,
        allow_methods: names("allowMethods", cors.allow_methods)?,
        allow_headers: names("allowHeaders", cors.allow_headers)?,
        expose_headers: names("exposeHeaders", cors.expose_headers)?,
        allow_credentials: cors.allow_credentials,
        max_age: Some(max_age),
        forward_unmatched_preflights: false,
    }))
}

/// `*`, `scheme://host[:port]`, or the latter with one star.
fn origin(text: &str) -> Result<OriginMatch, String> {
    if text == "*" {
        return Ok(OriginMatch::Any);
    }
    let visible = |b: u8| b.is_ascii_graphic() && b != b',';
    let has_scheme = text.split_once("://").is_some_and(|(scheme, rest)| {
        !scheme.is_empty() && !scheme.contains('*') && !rest.is_empty()
    });
    if !has_scheme || text.len() > 253 || !text.bytes().all(visible) {
        return Err(format!("{text:.80?} is not an origin, as in https://example.com"));
    }
    let Some((before, after)) = text.split_once('*') else {
        return Ok(OriginMatch::Exact(text.into()));
    };
    if after.contains('*') {
        return Err(format!("{text:.80?} has more than one star"));
    }
    Ok(OriginMatch::Wildcard { before: before.into(), after: after.into() })
}
