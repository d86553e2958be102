//! Every proxy takes what is put together, and nobody pays for what another one has written.

use std::sync::OnceLock;

use model::http::limits::MAX_LIST;
use model::http::{FieldMatch, PathMatch, Pattern, ServiceRoutes, TextMatch};
use model::{Provenance, Str};
use proptest::collection::vec;
use proptest::prelude::*;
use prost::Message;

use super::super::testing::*;
use super::super::{Assembled, Rank, Ranked, Specificity, assemble};
use super::*;
use crate::context::Context;
use crate::object::Objects;
use crate::services::{self, ByNamespace};
use crate::{Compiled, MeshConfig};

/// Whether a proxy can read what it is sent.
fn decodes(routes: &ServiceRoutes) -> Result<(), String> {
    let bytes = xds::codec::encode_routes(routes).encode_to_vec();
    let name = xds::codec::routes_name(routes);
    let read = xds::codec::decode_routes(&name, &bytes, &mut xds::codec::Interner::default());
    match read {
        Ok(read) if read == *routes => Ok(()),
        Ok(_) => Err("is another one".to_owned()),
        Err(e) => Err(e.to_string()),
    }
}

fn all_decode(compiled: &Compiled) {
    for routes in &compiled.routes {
        assert_eq!(decodes(routes), Ok(()));
    }
}

fn is_closed(set: &RouteSet) -> bool {
    let fails = |rule: &RouteRule| {
        matches!(&rule.filters[..], [Filter::Fail { reason: Reason::Unsupported, .. }])
    };
    set.matches[..] == [RouteMatch::default()] && set.rules.iter().all(|rule| fails(rule))
}

/// Rules with this many patterns, no two the same.
fn patterns(count: usize) -> String {
    let header = |i: usize| format!("{{type: RegularExpression, name: h{}, value: a{i}}}", i % 16);
    let headers: Vec<String> = (0..count).map(header).collect();
    let matches = headers.chunks(16).map(|some| format!("{{headers: [{}]}}", some.join(", ")));
    let matches: Vec<String> = matches.collect();
    let rules = matches.chunks(5).map(|some| format!("{{matches: [{}]}}", some.join(", ")));
    format!("[{}]", rules.collect::<Vec<_>>().join(", "))
}

#[test]
fn one_consumer_cannot_take_a_service_from_others() {
    let others = http("[{name: producer}]")
        + &route("HTTPRoute", "buyer", "name: r", &web(""), "[{name: buyer}]");
    let evil = route("HTTPRoute", "evil", "name: r", &web(""), &patterns(16 * 5 * 16));
    let compiled = shop(&(others.clone() + &evil));
    all_decode(&compiled);
    for (client, port, want) in
        [("any", 80, "producer"), ("buyer", 8080, "buyer"), ("evil", 7070, "closed")]
    {
        assert_eq!(order(chosen(&compiled, client, port).unwrap()), [want], "{client}");
    }
    assert!(is_closed(chosen(&compiled, "evil", 80).unwrap()));
    let limits: Vec<String> =
        codes(&compiled).into_iter().filter(|c| c.starts_with("limit")).collect();
    assert_eq!(limits, ["limit_exceeded spec.parentRefs[0]"]);
    for status in &compiled.route_status {
        let want = if &*status.namespace == "evil" {
            "Accepted=False UnsupportedValue"
        } else {
            "Accepted=True Accepted"
        };
        assert_eq!(conditions(status)[0], want, "{}", status.namespace);
    }
    let evil = compiled.route_status.iter().find(|s| &*s.namespace == "evil").unwrap();
    let message = &evil.conditions[0].message;
    assert!(message.contains("1280 different patterns, at most 1024 are taken"), "{message}");
    // As much as there may be is taken.
    let evil = route("HTTPRoute", "evil", "name: r", &web(""), &patterns(1024));
    let compiled = shop(&(others + &evil));
    all_decode(&compiled);
    assert!(!is_closed(chosen(&compiled, "evil", 80).unwrap()));
}

/// Each alone is small enough, all together are not: the largest has to do without.
#[test]
fn the_smaller_one_goes_first() {
    let of = |namespace: &str, count: usize| {
        route(
            "HTTPRoute",
            namespace,
            "name: r",
            &web(""),
            &patterns(count).replace("value: a", &format!("value: {namespace}")),
        )
    };
    let check = |row: &str, all: &[(&str, usize)], closed: &[&str]| {
        let compiled =
            shop(&all.iter().map(|(namespace, n)| of(namespace, *n)).collect::<String>());
        all_decode(&compiled);
        let is = |namespace: &&str| is_closed(chosen(&compiled, namespace, 80).unwrap());
        let got: Vec<&str> = all.iter().map(|(namespace, _)| *namespace).filter(is).collect();
        assert_eq!(got, closed, "{row}");
        let message = |ns: &str| {
            let status = compiled.route_status.iter().find(|s| &*s.namespace == ns).unwrap();
            status.conditions[0].message.clone()
        };
        assert!(closed.iter().all(|ns| message(ns).contains("what others have written")), "{row}");
    };
    check("fit", &[("aa", 500), ("bb", 500)], &[]);
    check("larger", &[("aa", 600), ("bb", 500)], &["aa"]);
    check("by name", &[("aa", 600), ("bb", 600)], &["bb"]);
    check("producer", &[("shop", 1000), ("bb", 100)], &["bb"]);
}

#[test]
fn virtual_services_are_closed_and_told_once() {
    let names: Vec<String> = (0..20).map(|i| format!("n{i}")).collect();
    let yaml = format!(
        "\n---\n{{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {{name: v, namespace: shop}}, spec: \
         {{hosts: [web], exportTo: [{}], http: [{{directResponse: {{status: 200, body: {{string: {}}}}}}}]}}}}",
        names.join(", "),
        "a".repeat(1 << 20),
    );
    let compiled = shop(&yaml);
    all_decode(&compiled);
    let closed = names.iter().filter(|n| is_closed(chosen(&compiled, n, 80).unwrap())).count();
    assert!((4..8).contains(&closed), "{closed}");
    let said: Vec<_> =
        compiled.diagnostics.iter().filter(|d| d.object == "VirtualService/shop/v").collect();
    assert_eq!(said.len(), 1, "{said:?}");
    assert_eq!((said[0].code.as_str(), said[0].field.as_str()), ("limit_exceeded", "spec.hosts"));
}

/// What somebody wrote for the clients of a namespace, or for everybody.
#[derive(Clone, Debug)]
struct Written {
    namespace: Option<u8>,
    port: u16,
    rules: usize,
    patterns: usize,
    bytes: usize,
    list: usize,
}

fn written() -> impl Strategy<Value = Written> {
    (
        proptest::option::weighted(0.8, 0..6_u8),
        prop_oneof![Just(80_u16), Just(8080)],
        prop_oneof![4 => 0..50_usize, 1 => 10_000..70_000_usize],
        prop_oneof![4 => 0..50_usize, 1 => 300..1100_usize],
        prop_oneof![4 => 0..100_usize, 1 => 1_000_000..18_000_000_usize],
        prop_oneof![8 => 0..10_usize, 1 => Just(MAX_LIST), 1 => Just(MAX_LIST + 1)],
    )
        .prop_map(|(namespace, port, rules, patterns, bytes, list)| Written {
            namespace,
            port,
            rules,
            patterns,
            bytes,
            list,
        })
}

impl Written {
    fn contribution(&self, place: usize, service: &ServiceKey) -> Contribution {
        let provenance = Provenance {
            object: format!("HTTPRoute/n/{place}").into(),
            field: "spec.parentRefs".into(),
            origin: "f:1".into(),
        };
        let rule = |name: Str| {
            Arc::new(RouteRule {
                route: provenance.object.clone(),
                name,
                provenance: provenance.clone(),
                filters: Vec::new(),
                backends: Vec::new(),
                timeouts: Timeouts::default(),
            })
        };
        let mut rules = vec![rule("n".repeat(self.bytes).into())];
        rules.extend(std::iter::repeat_n(rule("n".into()), self.rules));
        let header =
            |i: usize| FieldMatch { name: format!("h{i}").into(), value: TextMatch::Present };
        let list =
            RouteMatch { headers: (0..self.list).map(header).collect(), ..RouteMatch::default() };
        let pattern = |i: usize| {
            let path = PathMatch::Regex(Pattern::new(&format!("{place}-{i}")).unwrap());
            RouteMatch { path, ..RouteMatch::default() }
        };
        let matches = (0..self.patterns).map(pattern).chain([list]);
        let rank = |place: u32| Rank {
            specificity: Specificity::default(),
            age: (true, 0),
            object: provenance.object.clone(),
            rule: 0,
            place,
        };
        Contribution {
            service: service.clone(),
            audience: match self.namespace {
                None => Audience::Everybody,
                Some(n) => Audience::Namespace(format!("n{n}").into()),
            },
            ports: vec![self.port],
            api: Api::HttpRoute,
            matches: (0..)
                .zip(matches)
                .map(|(i, matched)| Ranked { rank: rank(i), matched })
                .collect(),
            provenance,
            rules,
            holds: OnceLock::new(),
        }
    }
}

fn services() -> (ByNamespace, ServiceKey) {
    let objects: Objects = crate::testing::objects(SHOP);
    let config = MeshConfig::default();
    let services = services::compile(&objects, &mut Context::new(&config));
    let web = services::find(&services, "shop", "web").unwrap().service.key.clone();
    (services, web)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    /// Whatever is written can be read by a proxy, and is there for whom it is: as it is, or as an error.
    #[test]
    fn what_is_put_together_always_decodes(all in vec(written(), 0..8)) {
        let (services, web) = services();
        let contributions: Vec<Arc<Contribution>> =
            all.iter().enumerate().map(|(i, w)| Arc::new(w.contribution(i, &web))).collect();
        let Assembled { routes, closed, .. } = assemble(&services, &contributions, &mut Vec::new());
        for routes in &routes {
            prop_assert_eq!(decodes(routes), Ok(()));
        }
        let routes = routes.iter().find(|r| r.service == web).unwrap();
        for (i, c) in contributions.iter().enumerate() {
            let of = |set: &&Arc<RouteSet>| set.audience == c.audience && set.ports.contains(&c.ports[0]);
            let set = routes.sets.iter().find(of);
            prop_assert!(set.is_some(), "{:?}", all[i]);
            prop_assert_eq!(set.is_some_and(|set| is_closed(set)), closed.contains_key(&i), "{:?}", all[i]);
        }
    }

    /// A neighbour that is small enough for all has what it wrote, whatever the others do.
    #[test]
    fn the_small_are_left_alone(others in vec(written(), 0..8)) {
        let (services, web) = services();
        let others: Vec<Written> = others.into_iter().filter(|w| w.namespace.is_some()).collect();
        let small = Written { namespace: Some(9), port: 80, rules: 3, patterns: 3, bytes: 10, list: 3 };
        let all = others.iter().chain([&small]);
        let contributions: Vec<Arc<Contribution>> =
            all.enumerate().map(|(i, w)| Arc::new(w.contribution(i, &web))).collect();
        let closed = assemble(&services, &contributions, &mut Vec::new()).closed;
        let smaller = others.iter().filter(|w| w.patterns < 50 && w.rules < 50 && w.bytes < 100).count();
        prop_assert!(smaller <= 8 && !closed.contains_key(&others.len()));
    }
}
