//! What a client of a waypoint sends: an HTTP request, and what becomes of it.

use std::sync::{Arc, LazyLock};

use engine::http::{
    Caller, HttpAction, HttpPlan, RequestFacts, answer, normal_path, normalize, route,
};
use http::header::{CONNECTION, CONTENT_LENGTH, HOST, LOCATION, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderName, HeaderValue, Method, Request, Uri, Version, request};
use model::http::{
    Audience, Backend, Filter, HeaderEdits, PathMatch, PathRewrite, Pattern, Redirect,
    RedirectPort, Rewrite, RouteKind, RouteMatch, RouteRule, RouteSet, ServiceRoutes, Target,
    TextMatch, Timeouts,
};
use model::{
    Change, FamilyPolicy, LoadBalancing, Provenance, Reason, Service, ServiceKey, Snapshot,
};

use crate::planted;

/// A line `VERSION METHOD TARGET`, then a header a line.
pub fn request(data: &[u8]) {
    let Some(mut parts) = parse(data) else { return };
    if let Err(refusal) = normalize(&mut parts) {
        assert!(refusal.message.len() < 2048, "a client must not fill the log");
        let said = answer(refusal, false);
        assert!(said.status.is_client_error() || said.status.is_server_error());
        return;
    }
    planted::request(&parts);
    has_one_form(&parts);
    let facts = RequestFacts {
        service: &WORLD.0,
        port: 80,
        caller: Caller::default(),
        request: &parts,
        now: 0,
    };
    planned(&route(&WORLD.1, &facts, 7), &parts, Routes::Ours);
}

fn parse(data: &[u8]) -> Option<request::Parts> {
    let mut lines = data.split(|b| *b == b'\n');
    let mut words = lines.next()?.splitn(3, |b| *b == b' ');
    let version = match words.next()? {
        b"0" => Version::HTTP_10,
        b"1" => Version::HTTP_11,
        _ => Version::HTTP_2,
    };
    let mut parts = Request::new(()).into_parts().0;
    parts.version = version;
    parts.method = Method::from_bytes(words.next()?).ok()?;
    parts.uri = Uri::try_from(words.next()?).ok()?;
    for line in lines {
        let colon = line.iter().position(|b| *b == b':')?;
        let name = HeaderName::from_bytes(&line[..colon]).ok()?;
        parts.headers.append(name, HeaderValue::from_bytes(line[colon + 1..].trim_ascii()).ok()?);
    }
    Some(parts)
}

/// What every other reader relies on.
fn has_one_form(parts: &request::Parts) {
    let mut again = parts.clone();
    assert!(normalize(&mut again).is_ok(), "{parts:?}");
    assert_eq!((&again.uri, &again.headers), (&parts.uri, &parts.headers));
    let authority = parts.uri.authority().expect("a host").as_str();
    let hosts: Vec<_> = parts.headers.get_all(HOST).iter().collect();
    assert_eq!(hosts, [authority], "two readers could see two hosts");
    assert_eq!(authority, authority.to_ascii_lowercase());
    let path = parts.uri.path();
    if path != "*" {
        assert_eq!(normal_path(path).as_deref(), Some(path));
        assert!(path.split('/').all(|segment| segment != "." && segment != ".."), "{path}");
    }
    assert!(!parts.headers.contains_key(TRANSFER_ENCODING));
    assert!(parts.headers.get_all(CONTENT_LENGTH).iter().count() < 2);
    assert_eq!(parts.headers.contains_key(CONNECTION), parts.headers.contains_key(UPGRADE));
}

/// Whose routes made a plan.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Routes {
    /// Those of this module: no faults, no redirects to other hosts.
    Ours,
    AnyUsers,
}

/// What is sent on has one form too, and a redirect leads to a URI.
pub(crate) fn planned(plan: &HttpPlan, parts: &request::Parts, routes: Routes) {
    match &plan.action {
        HttpAction::Forward { .. } => {
            let mut sent = parts.clone();
            plan.edit_request(&mut sent);
            match normalize(&mut sent.clone()) {
                Ok(()) => has_one_form(&sent),
                Err(refusal) => assert_eq!(refusal.reason, Reason::Limit, "{sent:?}: {refusal}"),
            }
        }
        HttpAction::Answer(said) => {
            if let Some(location) = said.headers.get(LOCATION)
                && !writes_location(plan)
            {
                let to = Uri::try_from(location.as_bytes()).expect("a redirect to a URI");
                let known = routes == Routes::AnyUsers || to.host() == parts.uri.host();
                assert!(known, "a redirect to where nobody said");
            }
        }
        HttpAction::Reset(refusal) => {
            assert!(routes == Routes::AnyUsers, "no fault was asked for: {refusal}");
        }
    }
}

/// What a user writes there goes out as it is: a relative one is a reference too.
fn writes_location(plan: &HttpPlan) -> bool {
    let filters = plan.rule.iter().flat_map(|rule| &rule.filters);
    let edits = filters.filter_map(|filter| match filter {
        Filter::ResponseHeaders(edits) => Some(edits),
        _ => None,
    });
    edits
        .flat_map(|edits| edits.set.iter().chain(&edits.add))
        .any(|(name, _)| **name == *LOCATION.as_str())
}

/// A Service with routes of many kinds.
static WORLD: LazyLock<(Service, Snapshot)> = LazyLock::new(|| {
    let key = ServiceKey { namespace: "shop".into(), hostname: "web.shop".into() };
    let service = Service {
        key: key.clone(),
        name: "web".into(),
        vips: Arc::new([]),
        ports: Arc::new([]),
        subject_alt_names: Arc::new([]),
        waypoint: None,
        load_balancing: LoadBalancing::default(),
        families: FamilyPolicy::default(),
    };
    let target = Target::Service { service: key.clone(), port: 80, subset: None };
    let rules: Vec<_> =
        filters().into_iter().map(|filter| Arc::new(rule(filter, &target))).collect();
    let matches: Vec<_> = (0..).zip(matches()).map(|(rule, m)| RouteMatch { rule, ..m }).collect();
    let ports = Arc::new([80]);
    let set =
        RouteSet::new(Audience::Everybody, ports, RouteKind::Http, rules.into(), matches.into());
    let sets = Arc::new([Arc::new(set.expect("as many rules as matches"))]);
    let routes = ServiceRoutes { service: key, ports: Arc::new([]), sets };
    (service, Snapshot::default().with([Change::SetRoutes(Arc::new(routes))]))
});

fn rule(filter: Filter, target: &Target) -> RouteRule {
    RouteRule {
        route: "HTTPRoute/shop/web".into(),
        name: "rules[0]".into(),
        provenance: Provenance { object: "".into(), field: "".into(), origin: "".into() },
        filters: vec![filter],
        backends: vec![Backend { weight: 1, target: target.clone(), filters: Vec::new() }],
        timeouts: Timeouts::default(),
    }
}

fn matches() -> Vec<RouteMatch> {
    let path = |path| RouteMatch { path, ..RouteMatch::default() };
    let field = |name: &str, value: &str| model::http::FieldMatch {
        name: name.into(),
        value: TextMatch::Exact(value.into()),
    };
    let pattern = Pattern::new("/x/[^/]+/.*").expect("a pattern");
    vec![
        path(PathMatch::Exact("/exact".into())),
        path(PathMatch::Segments("/a/b".into())),
        path(PathMatch::Prefix("/te".into())),
        path(PathMatch::Regex(pattern)),
        path(PathMatch::GrpcMethod("Say".into())),
        RouteMatch { query: vec![field("q", "a b")], ..RouteMatch::default() },
        RouteMatch { headers: vec![field("x-one", "a,b")], ..RouteMatch::default() },
    ]
}

fn filters() -> Vec<Filter> {
    let path = |path| Filter::Rewrite(Rewrite { host: None, path: Some(path) });
    let redirect = |path| {
        let port = RedirectPort::Number(8443);
        Filter::Redirect(Redirect { scheme: None, host: None, port, path, status: 302 })
    };
    let pattern = Pattern::new("^/x/([^/]+)(/.*)$").expect("a pattern");
    let edits = HeaderEdits {
        remove: vec!["x-two".into()],
        set: vec![("host".into(), "Other:81".into())],
        add: vec![("x-one".into(), "c".into()), ("cookie".into(), "d=1".into())],
    };
    vec![
        redirect(None),
        path(PathRewrite::Segments("/".into())),
        path(PathRewrite::Text("/".into())),
        path(PathRewrite::Regex { pattern, substitution: r"\2/of/\1".into() }),
        redirect(Some(PathRewrite::Full("/full?x".into()))),
        Filter::RequestHeaders(edits),
        path(PathRewrite::Full("/full".into())),
    ]
}
