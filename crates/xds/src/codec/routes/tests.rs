//! Encode and decode are inverse; what is not understood, or too much, is refused by resource and field, and closed.

use model::http::Pattern;
use model::http::limits::{Amount, MAX_LIST, MAX_PATTERNS, MAX_ROUTES_BYTES, MAX_RULES};
use proptest::collection::vec;
use proptest::prelude::*;
use prost::Message;

use super::*;
use crate::ambit as wire;
use crate::codec::DecodeError;

mod values;

use values::{routes, subset};

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn routes_survive_the_wire(r in routes()) {
        let bytes = encode_routes(&r).encode_to_vec();
        let got = decode_routes(&routes_name(&r), &bytes, &mut Interner::default());
        // Whoever counts before it is sent counts no less.
        let mut amount = Amount::of_service(&r.service, r.ports.len());
        for set in r.sets.iter() {
            amount.set(&set.audience, set.ports.len());
            amount.content(set.rules.iter().map(|r| &**r), set.matches.iter());
        }
        prop_assert!(amount.bytes >= bytes.len(), "{} {}", amount.bytes, bytes.len());
        prop_assert_eq!(got, Ok(r));
    }

    #[test]
    fn subsets_survive_the_wire(s in subset()) {
        let bytes = encode_subset(&s).encode_to_vec();
        let got = decode_subset(&subset_name(&s), &bytes, &mut Interner::default());
        prop_assert_eq!(got, Ok(s));
    }

    #[test]
    fn garbage_never_panics(bytes in vec(any::<u8>(), 0..64)) {
        let interner = &mut Interner::default();
        let _ = decode_routes("a/b", &bytes, interner);
        let _ = decode_subset("a/b/c", &bytes, interner);
    }

    /// A byte more, and the resource is another one or none: nothing is read over.
    #[test]
    fn what_is_added_is_refused(r in routes(), field in 4..1000_u32) {
        let mut bytes = encode_routes(&r).encode_to_vec();
        prost::encoding::uint32::encode(field, &1, &mut bytes);
        let got = decode_routes(&routes_name(&r), &bytes, &mut Interner::default());
        prop_assert_eq!(got.unwrap_err().field, "Routes");
    }
}

fn sample_rule() -> wire::RouteRule {
    wire::RouteRule::decode(&sample().sets[0].rules[0][..]).unwrap()
}

/// Routes with everything that the checks below change.
fn sample() -> wire::Routes {
    use wire::{filter, path_match, target, text_match};
    let header = wire::FieldMatch {
        name: "x-user".to_owned(),
        value: Some(wire::TextMatch { text: Some(text_match::Text::Exact("a".to_owned())) }),
    };
    let service = wire::ServiceName { namespace: "ns".to_owned(), hostname: "h".to_owned() };
    let to = wire::ServiceTarget { service: Some(service.clone()), port: 80, subset: None };
    let set = |names: &[&str]| wire::HeaderEdits {
        set: names
            .iter()
            .map(|name| wire::Header { name: (*name).to_owned(), value: "v".to_owned() })
            .collect(),
        ..Default::default()
    };
    let rule = wire::RouteRule {
        filters: vec![wire::Filter { filter: Some(filter::Filter::RequestHeaders(set(&["x-a"]))) }],
        backends: vec![wire::Backend {
            weight: 1,
            target: Some(wire::Target { target: Some(target::Target::Service(to)) }),
            filters: Vec::new(),
        }],
        ..Default::default()
    };
    let one = wire::RouteMatch {
        path: Some(wire::PathMatch { path: Some(path_match::Path::Segments("/a".to_owned())) }),
        headers: vec![header],
        ..Default::default()
    };
    wire::Routes {
        service: Some(service),
        ports: vec![wire::PortProtocol { service_port: 80, protocol: 1 }],
        sets: vec![wire::RouteSet {
            audience: Some(wire::route_set::Audience::Everybody(())),
            ports: vec![80],
            kind: 0,
            rules: vec![rule.encode_to_vec().into()],
            matches: vec![one],
        }],
    }
}

fn decoded(routes: &wire::Routes) -> Result<ServiceRoutes, DecodeError> {
    decode_routes("ns/h", &routes.encode_to_vec(), &mut Interner::default())
}

#[test]
fn what_is_not_understood_is_refused_by_its_place() {
    use wire::filter::Filter as F;
    assert!(decoded(&sample()).is_ok());
    let check = |change: &dyn Fn(&mut wire::Routes), want: &str| {
        let mut routes = sample();
        change(&mut routes);
        assert_eq!(decoded(&routes).unwrap_err().to_string(), format!("ns/h: {want}"));
    };
    let rule = |change: &dyn Fn(&mut wire::RouteRule), want: &str| {
        let changed = |r: &mut wire::Routes| {
            let mut rule = sample_rule();
            change(&mut rule);
            r.sets[0].rules[0] = rule.encode_to_vec().into();
        };
        check(&changed, &format!("sets[0].rules[0].{want}"));
    };
    let one = |change: &dyn Fn(&mut wire::RouteMatch), want: &str| {
        check(&|r| change(&mut r.sets[0].matches[0]), &format!("sets[0].matches[0].{want}"));
    };
    let filter = |filter: F, want: &str| {
        rule(
            &|r| r.filters[0] = wire::Filter { filter: Some(filter.clone()) },
            &format!("filters[0].{want}"),
        );
    };
    const KIND: &str = "is of a kind that this proxy does not know";

    // Of the resource.
    check(&|r| r.service = None, "service: is not set");
    let named = |hostname: &str| {
        Some(wire::ServiceName { namespace: "ns".to_owned(), hostname: hostname.to_owned() })
    };
    check(&|r| r.service = named(""), "service: is not namespace/hostname");
    check(&|r| r.service = named("a/b"), "service: is not namespace/hostname");
    check(
        &|r| r.service = named("other"),
        "service: says \"ns/other\", the resource is named otherwise",
    );
    check(&|r| r.ports[0].service_port = 0, "ports[0].service_port: 0 is not a port");
    check(
        &|r| r.ports[0].protocol = 9,
        "ports[0].protocol: the value 9 is not known to this proxy",
    );
    check(&|r| r.ports.push(r.ports[0]), "ports: port 80 is there twice");

    // Of its sets.
    check(&|r| r.sets[0].audience = None, &format!("sets[0].audience: {KIND}"));
    check(&|r| r.sets[0].kind = 2, "sets[0].kind: the value 2 is not known to this proxy");
    check(&|r| r.sets[0].ports.push(80), "sets[0].ports: are not in ascending order");
    check(&|r| r.sets[0].ports.push(70_000), "sets[0].ports[1]: 70000 is not a port");
    let twice = "sets: two sets are for the same clients and port";
    check(&|r| r.sets.push(r.sets[0].clone()), twice);
    check(&|r| r.sets.push(wire::RouteSet { ports: Vec::new(), ..r.sets[0].clone() }), twice);

    // Of a match.
    one(&|m| m.path = Some(wire::PathMatch { path: None }), &format!("path: {KIND}"));
    for path in ["a", "/a/", "/"] {
        let path = wire::path_match::Path::Segments(path.to_owned());
        one(
            &|m| m.path = Some(wire::PathMatch { path: Some(path.clone()) }),
            "path.segments: must begin with a slash and not end in one",
        );
    }
    let regex =
        |text: &str| wire::TextMatch { text: Some(wire::text_match::Text::Regex(text.to_owned())) };
    one(&|m| m.method = Some(wire::TextMatch { text: None }), &format!("method: {KIND}"));
    one(&|m| m.authority = Some(regex("a)(b")), "authority.regex: unopened group");
    one(&|m| m.headers[0].value = None, "headers[0].value: is not set");
    one(
        &|m| m.headers[0].name = "X-User".to_owned(),
        "headers[0].name: \"X-User\" is no header name in lower case",
    );
    one(
        &|m| {
            let identities = vec!["cluster.local/ns/a/sa/b".to_owned()];
            m.source = Some(wire::SourceMatch { identities, ..Default::default() });
        },
        "source.identities[0]: \"cluster.local/ns/a/sa/b\" is not of the form \
         spiffe://TRUST_DOMAIN/ns/NS/sa/SA",
    );
    check(&|r| r.sets[0].matches[0].rule = 1, "sets[0].matches: a match refers to rule 1 of 1");

    // Of a rule.
    rule(&|r| r.backends[0].target = None, &format!("backends[0].target: {KIND}"));
    rule(&|r| r.filters[0].filter = None, &format!("filters[0]: {KIND}"));
    filter(
        F::Mirror(wire::Mirror {
            target: sample_rule().backends[0].target.clone(),
            share: Some(wire::Share { numerator: 1, denominator: 0 }),
        }),
        "share: has no denominator",
    );
    filter(
        F::RequestHeaders(wire::HeaderEdits {
            add: vec![wire::Header { name: "a".to_owned(), value: "b\r\nc: d".to_owned() }],
            ..Default::default()
        }),
        "add[0].value: has control characters",
    );
    filter(
        F::ResponseHeaders(wire::HeaderEdits {
            remove: vec![":path".to_owned()],
            ..Default::default()
        }),
        "remove[0]: \":path\" is no header name in lower case",
    );
    filter(
        F::Redirect(wire::Redirect { status: 200, ..Default::default() }),
        "status: 200 does not redirect",
    );
    filter(
        F::Respond(wire::FixedResponse { status: 101, ..Default::default() }),
        "status: 101 is no status of an answer",
    );
    let abort = |how| {
        let share = Some(wire::Share { numerator: 1, denominator: 1 });
        F::Fault(wire::Fault { abort: Some(wire::Abort { share, how }), ..Default::default() })
    };
    filter(abort(None), &format!("abort.how: {KIND}"));
    filter(abort(Some(wire::abort::How::Grpc(17))), "abort.grpc: 17 is no status code of gRPC");
    filter(abort(Some(wire::abort::How::Http(99))), "abort.http: 99 is no status of an answer");
    filter(
        F::Fail(wire::Failure { reason: "new".to_owned(), ..Default::default() }),
        "reason: \"new\" is no reason that this proxy knows",
    );
}

#[test]
fn amounts_are_limited() {
    let check = |change: &dyn Fn(&mut wire::Routes), want: &str| {
        let mut routes = sample();
        change(&mut routes);
        assert_eq!(decoded(&routes).unwrap_err().to_string(), format!("ns/h: {want}"));
    };
    check(
        &|r| {
            let header = r.sets[0].matches[0].headers[0].clone();
            r.sets[0].matches[0].headers = vec![header; MAX_LIST + 1];
        },
        "sets[0].matches[0].headers: 1025 entries, at most 1024 are read",
    );
    // Of all sets together.
    check(
        &|r| {
            let one = wire::RouteMatch::default();
            r.sets[0].matches = vec![one; MAX_RULES / 2 + 1];
            r.sets.push(wire::RouteSet { ports: vec![81], ..r.sets[0].clone() });
        },
        "sets[1].matches: 32769 entries, at most 32767 are read",
    );
    check(
        &|r| {
            r.sets[0].matches = (0..=MAX_PATTERNS)
                .map(|i| wire::RouteMatch {
                    path: Some(wire::PathMatch {
                        path: Some(wire::path_match::Path::Regex(format!("a{i}"))),
                    }),
                    ..Default::default()
                })
                .collect();
        },
        "sets[0].matches[1024].path.regex: more than 1024 different patterns",
    );
    check(
        &|r| {
            let name = "n".repeat(MAX_ROUTES_BYTES);
            r.sets[0].rules[0] = wire::RouteRule { name, ..sample_rule() }.encode_to_vec().into();
        },
        "Routes: has 16777307 bytes, at most 16777216 are read",
    );
}

/// A rule with these patterns in its filters.
fn rule_with(patterns: std::ops::Range<usize>) -> bytes::Bytes {
    use wire::path_rewrite::Rewrite;
    let rewrite = |i: usize| {
        let (pattern, substitution) = (format!("a{i}"), String::new());
        let regex = Rewrite::Regex(wire::RegexRewrite { pattern, substitution });
        let path = Some(wire::PathRewrite { rewrite: Some(regex) });
        let filter = wire::filter::Filter::Rewrite(wire::Rewrite { host: None, path });
        wire::Filter { filter: Some(filter) }
    };
    let filters = patterns.map(rewrite).collect();
    wire::RouteRule { filters, ..Default::default() }.encode_to_vec().into()
}

/// A rule comes again with every change of its neighbours.
#[test]
fn a_rule_that_is_known_is_not_read_again_and_counts_all_the_same() {
    let mut routes = sample();
    let half = MAX_PATTERNS / 2;
    routes.sets[0].rules = vec![rule_with(0..half), rule_with(half..MAX_PATTERNS)];
    let mut interner = Interner::default();
    let mut read = |routes: &wire::Routes| {
        decode_routes("ns/h", &routes.encode_to_vec(), &mut interner).map_err(|e| e.to_string())
    };
    let first = read(&routes).unwrap();
    routes.sets[0].rules[1] = rule_with(0..3);
    let second = read(&routes).unwrap();
    let rule = |routes: &ServiceRoutes, i: usize| routes.sets[0].rules[i].clone();
    assert!(Arc::ptr_eq(&rule(&first, 0), &rule(&second, 0)));
    assert!(!Arc::ptr_eq(&rule(&first, 1), &rule(&second, 1)));
    // Both halves are known; together with one more pattern they are too many, as if nothing were known.
    routes.sets[0].rules = vec![
        rule_with(0..half),
        rule_with(MAX_PATTERNS..MAX_PATTERNS + 1),
        rule_with(half..MAX_PATTERNS),
    ];
    let error = read(&routes).unwrap_err();
    assert_eq!(error, "ns/h: sets[0].rules[2].patterns: more than 1024 different patterns");
    // Nobody uses them any more.
    drop((first, second));
    interner.swept = 0;
    for i in 0..1024 {
        interner.str(&i.to_string());
    }
    interner.sweep();
    assert!(interner.rules.is_empty() && interner.patterns.is_empty());
}

#[test]
fn a_field_of_a_rule_that_is_not_known_is_refused() {
    let mut routes = sample();
    let mut rule = routes.sets[0].rules[0].to_vec();
    prost::encoding::uint32::encode(99, &1, &mut rule);
    routes.sets[0].rules[0] = rule.into();
    let error = decoded(&routes).unwrap_err().to_string();
    assert_eq!(error, "ns/h: sets[0].rules[0]: has fields that this proxy does not know");
}

#[test]
fn subsets_are_checked_too() {
    let check = |name: &str, change: &dyn Fn(&mut wire::Subset), want: &str| {
        let mut subset = wire::Subset {
            service: sample().service,
            name: "v1".to_owned(),
            workloads: vec!["a".to_owned(), "b".to_owned()],
        };
        change(&mut subset);
        let got = decode_subset(name, &subset.encode_to_vec(), &mut Interner::default());
        let got =
            got.map_or_else(|e| e.to_string(), |s| format!("{} {}", s.key, s.workloads.len()));
        assert_eq!(got, want);
    };
    check("ns/h/v1", &|_| {}, "ns/h/v1 2");
    check("ns/h/v2", &|_| {}, "ns/h/v2: name: says \"ns/h/v1\", the resource is named otherwise");
    check("ns/h/", &|s| s.name = String::new(), "ns/h/: name: is empty, or has a slash");
    check("ns/h/v1", &|s| s.workloads.reverse(), "ns/h/v1: workloads: are not in ascending order");
}

#[test]
fn what_stands_in_is_closed_and_survives_the_disk() {
    let interner = &mut Interner::default();
    let closed = closed_routes("ns/h", interner).unwrap();
    let bytes = encode_routes(&closed).encode_to_vec();
    assert_eq!(decode_routes("ns/h", &bytes, interner), Ok(closed.clone()));
    let [set] = &closed.sets[..] else { panic!("{closed:?}") };
    assert!(set.ports.is_empty() && set.audience == Audience::Everybody);
    assert_eq!(set.matches[..], [RouteMatch::default()]);
    let filters = &set.rules[0].filters[..];
    assert!(matches!(filters, [Filter::Fail { reason: Reason::Unsupported, .. }]));
    for name in ["", "h", "/h", "ns/", "ns/h/x"] {
        assert_eq!(closed_routes(name, interner), None, "{name:?}");
    }

    let closed = closed_subset("ns/h/v1", interner).unwrap();
    let bytes = encode_subset(&closed).encode_to_vec();
    assert_eq!(decode_subset("ns/h/v1", &bytes, interner), Ok(closed.clone()));
    assert!(closed.workloads.is_empty());
    for name in ["", "ns/h", "ns/h/", "ns//v1", "ns/h/x/v1"] {
        assert_eq!(closed_subset(name, interner), None, "{name:?}");
    }
}

/// The same pattern is one in memory, in all routes and all their versions, and is forgotten after them.
#[test]
fn patterns_are_shared_and_forgotten() {
    let interner = &mut Interner::default();
    let shared = |a: &Pattern, b: &Pattern| Arc::ptr_eq(a.text(), b.text());
    let kept = interner.pattern("kept").unwrap();
    assert!(shared(&kept, &interner.pattern("kept").unwrap()));
    for i in 0..3000 {
        interner.pattern(&format!("a{i}")).unwrap();
    }
    interner.sweep();
    assert_eq!(interner.len(), 1);
    assert!(shared(&kept, &interner.pattern("kept").unwrap()));
}
