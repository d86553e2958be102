//! What a rule matches, and how specific each match is.
//!
//! Rows of Gateway API: a match is ANDed within and ORed over the rule; a header or a parameter that is named twice counts once,
//! the first time; a rule without matches matches everything.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use model::Str;
use model::http::{FieldMatch, PathMatch, RouteMatch, TextMatch};

use super::rules::{Invalid, RuleCompiler};
use super::{PathForm, Specificity, shape, text};
use crate::diagnostics::{Code, Diagnostic};
use crate::gateway_api::grpcroutes::{
    GrpcRouteRulesMatches, GrpcRouteRulesMatchesHeadersType, GrpcRouteRulesMatchesMethod,
    GrpcRouteRulesMatchesMethodType,
};
use crate::gateway_api::httproutes::{
    HttpRouteRulesMatches, HttpRouteRulesMatchesHeadersType, HttpRouteRulesMatchesMethod,
    HttpRouteRulesMatchesPath, HttpRouteRulesMatchesPathType, HttpRouteRulesMatchesQueryParamsType,
};

/// How specific a match is, and the match.
pub(super) type Specific = (Specificity, RouteMatch);

/// The matches of the rule that stands at `at`, in its order.
pub(super) fn compile(
    matches: shape::Matches<'_>,
    at: &str,
    c: &mut RuleCompiler<'_, '_>,
) -> Result<Vec<Specific>, Invalid> {
    let place = |i: usize| format!("{at}.matches[{i}]");
    match matches {
        shape::Matches::Http([]) | shape::Matches::Grpc([]) => {
            Ok(vec![(Specificity::default(), RouteMatch::default())])
        }
        shape::Matches::Http(all) => {
            all.iter().enumerate().map(|(i, m)| http(m, &place(i), c)).collect()
        }
        shape::Matches::Grpc(all) => {
            all.iter().enumerate().map(|(i, m)| grpc(m, &place(i), c)).collect()
        }
    }
}

/// Whether every match of a rule is a `PathPrefix`: what `ReplacePrefixMatch` needs.
pub(super) fn only_prefixes(matches: shape::Matches<'_>) -> bool {
    match matches {
        shape::Matches::Http(all) => all.iter().all(|m| {
            let kind = m.path.as_ref().and_then(|p| p.r#type.as_ref());
            matches!(kind, None | Some(HttpRouteRulesMatchesPathType::PathPrefix))
        }),
        shape::Matches::Grpc(_) => false,
    }
}

fn http(
    m: &HttpRouteRulesMatches,
    at: &str,
    c: &mut RuleCompiler<'_, '_>,
) -> Result<Specific, Invalid> {
    let (form, length, path) = http_path(m.path.as_ref(), at, c)?;
    let headers = m.headers.iter().flatten().map(|h| {
        let regex = h.r#type == Some(HttpRouteRulesMatchesHeadersType::RegularExpression);
        (h.name.as_str(), h.value.as_str(), regex)
    });
    let headers = fields(headers, &format!("{at}.headers"), Named::Header, c)?;
    let query = m.query_params.iter().flatten().map(|q| {
        let regex = q.r#type == Some(HttpRouteRulesMatchesQueryParamsType::RegularExpression);
        (q.name.as_str(), q.value.as_str(), regex)
    });
    let query = fields(query, &format!("{at}.queryParams"), Named::Parameter, c)?;
    let method = m.method.as_ref().map(|method| TextMatch::Exact(c.cx.share(method_name(method))));
    let specificity = Specificity {
        path: form,
        length: Reverse(length),
        method: Reverse(method.is_some()),
        headers: Reverse(headers.len()),
        query: Reverse(query.len()),
        ..Specificity::default()
    };
    Ok((specificity, RouteMatch { path, method, headers, query, ..RouteMatch::default() }))
}

fn http_path(
    path: Option<&HttpRouteRulesMatchesPath>,
    at: &str,
    c: &mut RuleCompiler<'_, '_>,
) -> Result<(PathForm, usize, PathMatch), Invalid> {
    use HttpRouteRulesMatchesPathType::{Exact, PathPrefix, RegularExpression};
    let at = format!("{at}.path.value");
    let value = path.and_then(|p| p.value.as_deref()).unwrap_or("/");
    let kind = path.and_then(|p| p.r#type.as_ref()).unwrap_or(&PathPrefix);
    if *kind == RegularExpression {
        let pattern = c.pattern(value).map_err(|e| Invalid::value(at.clone(), e))?;
        return Ok((PathForm::Pattern, value.chars().count(), PathMatch::Regex(pattern)));
    }
    let judge = |path: &str| text::absolute_path(path).map_err(|e| Invalid::value(at.clone(), e));
    judge(value)?;
    // Again: `%2e` is a dot.
    let value = &text::spelled(value);
    judge(value)?;
    if *kind == Exact {
        return Ok((PathForm::Exact, value.len(), PathMatch::Exact(value.as_str().into())));
    }
    let prefix = value.strip_suffix('/').unwrap_or(value);
    let path = if prefix.is_empty() { PathMatch::Any } else { PathMatch::Segments(prefix.into()) };
    Ok((PathForm::Prefix, prefix.len(), path))
}

fn grpc(
    m: &GrpcRouteRulesMatches,
    at: &str,
    c: &mut RuleCompiler<'_, '_>,
) -> Result<Specific, Invalid> {
    let (service, method, path) = match &m.method {
        Some(method) => grpc_method(method, &format!("{at}.method"), c)?,
        None => (0, 0, PathMatch::Any),
    };
    let headers = m.headers.iter().flatten().map(|h| {
        let regex = h.r#type == Some(GrpcRouteRulesMatchesHeadersType::RegularExpression);
        (h.name.as_str(), h.value.as_str(), regex)
    });
    let headers = fields(headers, &format!("{at}.headers"), Named::Header, c)?;
    let specificity = Specificity {
        length: Reverse(service),
        method_length: Reverse(method),
        headers: Reverse(headers.len()),
        ..Specificity::default()
    };
    Ok((specificity, RouteMatch { path, headers, ..RouteMatch::default() }))
}

/// Characters of the service and of the method, and what the path must be.
fn grpc_method(
    m: &GrpcRouteRulesMatchesMethod,
    at: &str,
    c: &mut RuleCompiler<'_, '_>,
) -> Result<(usize, usize, PathMatch), Invalid> {
    let given =
        |text: &Option<String>| text.as_deref().filter(|t| !t.is_empty()).map(str::to_owned);
    let (service, method) = (given(&m.service), given(&m.method));
    let length = |text: &Option<String>| text.as_deref().map_or(0, |t| t.chars().count());
    let (service_length, method_length) = (length(&service), length(&method));
    let exact = m.r#type != Some(GrpcRouteRulesMatchesMethodType::RegularExpression);
    for (field, value) in [("service", &service), ("method", &method)] {
        let Some(value) = value else { continue };
        // Each on its own: `a)(b` is no pattern, but would be one inside a group.
        let judged = if exact {
            text::grpc_name(value, field == "service")
        } else {
            c.pattern(value).map(drop)
        };
        judged.map_err(|e| Invalid::value(format!("{at}.{field}"), e))?;
    }
    let path = match (service, method, exact) {
        (None, None, _) => {
            let message = "names neither a service nor a method; leave it out to match all";
            return Err(Invalid::value(at.to_owned(), message.to_owned()));
        }
        (Some(service), Some(method), true) => {
            PathMatch::Exact(format!("/{service}/{method}").into())
        }
        (Some(service), None, true) => PathMatch::Prefix(format!("/{service}/").into()),
        (None, Some(method), true) => PathMatch::GrpcMethod(method.into()),
        (service, method, false) => {
            let part = |text: Option<String>| match text {
                Some(text) => format!("(?:{text})"),
                None => "[^/]+".to_owned(),
            };
            let pattern = c.pattern(&format!("/{}/{}", part(service), part(method)));
            PathMatch::Regex(pattern.map_err(|e| Invalid::value(at.to_owned(), e))?)
        }
    };
    Ok((service_length, method_length, path))
}

/// What the names of fields are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Named {
    /// Without regard to case.
    Header,
    Parameter,
}

fn fields<'f>(
    all: impl Iterator<Item = (&'f str, &'f str, bool)>,
    at: &str,
    named: Named,
    c: &mut RuleCompiler<'_, '_>,
) -> Result<Vec<FieldMatch>, Invalid> {
    let mut out = Vec::new();
    let mut names: BTreeSet<Str> = BTreeSet::new();
    for (i, (name, value, regex)) in all.enumerate() {
        let at = format!("{at}[{i}]");
        let name = match named {
            Named::Header => {
                text::header_name(name).map_err(|e| Invalid::value(format!("{at}.name"), e))?
            }
            Named::Parameter => name.to_owned(),
        };
        let name: Str = c.cx.share(&name);
        if !names.insert(name.clone()) {
            let message = format!("{name:?} is matched above already; only the first counts");
            c.diagnostics.push(Diagnostic::warning(Code::NoEffect, message).field(at));
            continue;
        }
        let value = if regex {
            let pattern = c.pattern(value);
            TextMatch::Regex(pattern.map_err(|e| Invalid::value(format!("{at}.value"), e))?)
        } else {
            TextMatch::Exact(value.into())
        };
        out.push(FieldMatch { name, value });
    }
    Ok(out)
}

fn method_name(method: &HttpRouteRulesMatchesMethod) -> &'static str {
    use HttpRouteRulesMatchesMethod as M;
    match method {
        M::Get => "GET",
        M::Head => "HEAD",
        M::Post => "POST",
        M::Put => "PUT",
        M::Delete => "DELETE",
        M::Connect => "CONNECT",
        M::Options => "OPTIONS",
        M::Trace => "TRACE",
        M::Patch => "PATCH",
    }
}
