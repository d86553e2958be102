//! The index finds what trying everything finds, and tries little.

use http::Request;
use model::http::{Pattern, RouteKind};
use model::{LoadBalancing, Provenance, Service, ServiceKey};
use proptest::prelude::*;

use super::super::Caller;
use super::*;

fn set(matches: Vec<RouteMatch>) -> RouteSet {
    let rule = model::http::RouteRule {
        route: "HTTPRoute/shop/web".into(),
        name: "rules[0]".into(),
        provenance: Provenance { object: "".into(), field: "".into(), origin: "".into() },
        filters: Vec::new(),
        backends: Vec::new(),
        timeouts: model::http::Timeouts::default(),
    };
    let rules = Arc::from([Arc::new(rule)]);
    RouteSet::new(Audience::Everybody, Arc::new([80]), RouteKind::Http, rules, matches.into())
        .unwrap()
}

/// The first that fits and the number of tries.
fn found(
    set: &RouteSet,
    method: &str,
    uri: &str,
    headers: &[(&str, &str)],
) -> (Option<u32>, Option<u32>, usize) {
    let mut request = Request::builder().method(method).uri(uri);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(()).unwrap().into_parts().0;
    let service = Service {
        key: ServiceKey { namespace: "shop".into(), hostname: "web".into() },
        name: "web".into(),
        vips: Arc::new([]),
        ports: Arc::new([]),
        subject_alt_names: Arc::new([]),
        waypoint: None,
        load_balancing: LoadBalancing::default(),
        families: model::FamilyPolicy::default(),
    };
    let facts = RequestFacts {
        service: &service,
        port: 80,
        caller: Caller::default(),
        request: &request,
        now: 0,
    };
    let asked = Asked::new(&facts);
    let mut tried = 0;
    let indexed = search(set, &asked, &mut tried);
    let naive = (0..).zip(set.matches.iter()).find(|(_, m)| fits(m, &asked)).map(|(n, _)| n);
    (indexed, naive, tried)
}

fn segments(path: String) -> RouteMatch {
    RouteMatch { path: PathMatch::Segments(path.into()), ..RouteMatch::default() }
}

/// The number of routes does not show in the number of tries.
#[test]
fn thousands_of_prefixes_are_not_scanned() {
    for count in [5_u32, 5_000] {
        let all = (0..count).map(|n| segments(format!("/api/service-{n:05}/v1")));
        let set = set(all.chain([RouteMatch::default()]).collect());
        let check = |uri: &str, want: u32| {
            let (indexed, naive, tried) = found(&set, "GET", uri, &[]);
            assert_eq!((indexed, naive), (Some(want), Some(want)), "{uri}");
            assert!(tried <= 2, "{tried} of {count} tried for {uri}");
        };
        check("/api/service-00000/v1/x", 0);
        check(&format!("/api/service-{:05}/v1", count - 1), count - 1);
        check("/api/service-99999/v1", count);
        check("/", count);
    }
}

/// Nor does it with exact paths, and of thousands with one path only those before the first that fits are tried.
#[test]
fn candidates_after_the_first_are_not_tried() {
    let exact =
        |path: &str| RouteMatch { path: PathMatch::Exact(path.into()), ..RouteMatch::default() };
    let set = set((0..5_000).map(|n| exact(&format!("/{}", n % 50))).collect());
    assert_eq!(found(&set, "GET", "/7", &[]), (Some(7), Some(7), 1));
    assert_eq!(found(&set, "GET", "/50", &[]), (None, None, 0));
}

fn paths() -> impl Strategy<Value = PathMatch> {
    let text = || "(/[ab]{0,2}){1,3}".prop_map(Str::from);
    prop_oneof![
        Just(PathMatch::Any),
        text().prop_map(PathMatch::Exact),
        text().prop_map(PathMatch::Segments),
        text().prop_map(PathMatch::Prefix),
        text().prop_map(PathMatch::ExactIgnoringCase),
        text().prop_map(PathMatch::PrefixIgnoringCase),
        "[ab]".prop_map(|c| PathMatch::Regex(Pattern::new(&format!("/{c}.*")).unwrap())),
        "[ab]{1,2}".prop_map(|m| PathMatch::GrpcMethod(m.into())),
    ]
}

fn texts() -> impl Strategy<Value = TextMatch> {
    let text = || "[xyX]{0,2}".prop_map(Str::from);
    prop_oneof![
        Just(TextMatch::Present),
        text().prop_map(TextMatch::Exact),
        text().prop_map(TextMatch::ExactIgnoringCase),
        text().prop_map(TextMatch::Prefix),
        text().prop_map(TextMatch::PrefixIgnoringCase),
    ]
}

fn fields() -> impl Strategy<Value = Vec<FieldMatch>> {
    let one = ("[pq]", texts()).prop_map(|(name, value)| FieldMatch { name: name.into(), value });
    prop::collection::vec(one, 0..2)
}

fn matches() -> impl Strategy<Value = RouteMatch> {
    (paths(), prop::option::of(Just("GET")), fields(), fields(), fields()).prop_map(
        |(path, method, headers, without_headers, query)| RouteMatch {
            path,
            method: method.map(|m| TextMatch::Exact(m.into())),
            headers,
            without_headers,
            query,
            ..RouteMatch::default()
        },
    )
}

proptest! {
    #[test]
    fn the_index_finds_what_a_scan_finds(
        all in prop::collection::vec(matches(), 0..12),
        method in "GET|POST",
        uri in "(/[abA]{0,2}){1,3}(\\?[pq]=[xyX%+]{0,2}(&[pq])?)?",
        p in "[xyX]{0,2}",
        q in prop::option::of("[xyX]{0,2}"),
    ) {
        let set = set(all);
        let headers: Vec<_> = [("p", p.as_str())].into_iter().chain(q.as_deref().map(|q| ("q", q))).collect();
        let (indexed, naive, tried) = found(&set, &method, &uri, &headers);
        prop_assert_eq!(indexed, naive);
        prop_assert!(tried <= set.matches.len());
    }

    /// Percent-encoding a query does not change what it says.
    #[test]
    fn parameters_mean_what_they_say(name in "[a-c &=+%é]{1,3}", value in "\\PC{0,6}") {
        let encode = |text: &str| text.bytes().map(|b| format!("%{b:02x}")).collect::<String>();
        let query = format!("z=1&{}={}&{}=no", encode(&name), encode(&value), encode(&name));
        let got = parameter(&query, &name);
        prop_assert_eq!(got.as_deref(), Some(value.as_bytes()));
    }
}
