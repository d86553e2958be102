//! Order, audience, conflicts, attachment and status, by the names of the rows they come from.

use model::http::{Audience, PathMatch, Protocol, RouteKind, Target};

use super::testing::*;
use super::*;
use crate::Severity;

/// Rules of one route, each with one match, in this order of matches.
fn ordered(row: &str, rules: &[(&str, &str)], want: &[&str]) {
    let rules: Vec<String> =
        rules.iter().map(|(name, m)| format!("{{name: {name}, matches: {m}}}")).collect();
    let compiled = shop(&http(&format!("[{}]", rules.join(", "))));
    assert_eq!(order(chosen(&compiled, "any", 80).unwrap()), want, "{row}");
}

#[test]
fn precedence() {
    let path = |kind: &str, value: &str| format!("path: {{type: {kind}, value: {value}}}");
    let (a, exact) = (path("PathPrefix", "/a"), path("Exact", "/a"));
    let long = path("PathPrefix", "/aaaaaaaaaaaaaaa");
    let regex = path("RegularExpression", "/a+");
    let with = |path: &str, more: &str| format!("[{{{path}{more}}}]");
    ordered("R1", &[("long", &with(&long, "")), ("exact", &with(&exact, ""))], &["exact", "long"]);
    ordered("R2", &[("short", &with(&a, "")), ("long", &with(&long, ""))], &["long", "short"]);
    let three =
        [("long", with(&long, "")), ("regex", with(&regex, "")), ("exact", with(&exact, ""))];
    let three: Vec<(&str, &str)> = three.iter().map(|(n, m)| (*n, m.as_str())).collect();
    ordered("R2 patterns", &three, &["exact", "regex", "long"]);
    let slash = path("PathPrefix", "/a/");
    ordered("R2 slash", &[("a", &with(&a, "")), ("b", &with(&slash, ""))], &["a", "b"]);
    let headers = ", headers: [{name: a, value: b}, {name: c, value: d}]";
    ordered(
        "R3",
        &[("headers", &with(&a, headers)), ("method", &with(&a, ", method: GET"))],
        &["method", "headers"],
    );
    let one = ", headers: [{name: a, value: b}]";
    let query = ", queryParams: [{name: a, value: b}]";
    let queries = ", queryParams: [{name: a, value: b}, {name: c, value: d}]";
    ordered(
        "R4",
        &[("queries", &with(&a, queries)), ("header", &with(&a, one))],
        &["header", "queries"],
    );
    ordered("R5", &[("one", &with(&a, query)), ("two", &with(&a, queries))], &["two", "one"]);
    ordered("R8", &[("first", &with(&a, "")), ("second", &with(&a, ""))], &["first", "second"]);
    // The header is as specific as its path: `/` is shorter than `/v2`.
    ordered(
        "R9",
        &[
            (
                "one",
                "[{path: {type: PathPrefix, value: /}}, {headers: [{name: version, value: one}]}]",
            ),
            (
                "two",
                "[{path: {type: PathPrefix, value: /v2}}, {headers: [{name: version, value: two}]}]",
            ),
        ],
        &["two", "one", "two", "one"],
    );
}

#[test]
fn precedence_over_routes() {
    let check = |row: &str, routes: &[(&str, &str)], want: &[&str]| {
        let one = |(metadata, rule): &(&str, &str)| {
            route("HTTPRoute", "shop", metadata, &web(""), &format!("[{{name: {rule}}}]"))
        };
        let all: String = routes.iter().map(one).collect();
        let compiled = shop(&all);
        assert_eq!(order(chosen(&compiled, "any", 80).unwrap()), want, "{row}");
    };
    let at =
        |name: &str, time: &str| format!("name: {name}, creationTimestamp: '2026-01-01T{time}Z'");
    let (old, new) = (at("z", "00:00:00"), at("a", "00:00:01"));
    check("R6", &[(&new, "new"), (&old, "old")], &["old", "new"]);
    check("R6 no time", &[("name: a", "none"), (&old, "old")], &["old", "none"]);
    check("R7", &[("name: b", "b"), ("name: a", "a")], &["a", "b"]);
    let (early, late) = (at("b", "00:00:00.1"), at("a", "00:00:00.9"));
    check("R12", &[(&early, "early"), (&late, "late")], &["late", "early"]);
    // R9 over routes: each match for itself.
    let prefix = "[{name: short, matches: [{path: {value: /a}}]}, {name: long, matches: [{path: {value: /abc}}]}]";
    let middle = "[{name: middle, matches: [{path: {value: /ab}}]}]";
    let compiled = shop(
        &(route("HTTPRoute", "shop", "name: a", &web(""), prefix)
            + &route("HTTPRoute", "shop", "name: b", &web(""), middle)),
    );
    assert_eq!(order(chosen(&compiled, "any", 80).unwrap()), ["long", "middle", "short"], "R9");
}

#[test]
fn grpc_precedence() {
    let check = |row: &str, rules: &[(&str, &str)], want: &[&str]| {
        let rules: Vec<String> =
            rules.iter().map(|(name, m)| format!("{{name: {name}, matches: [{m}]}}")).collect();
        let rules = format!("[{}]", rules.join(", "));
        let compiled = shop(&route("GRPCRoute", "shop", "name: r", &web(", port: 7070"), &rules));
        let set = chosen(&compiled, "any", 7070).unwrap();
        assert_eq!(set.kind, RouteKind::Grpc);
        assert_eq!(order(set), want, "{row}");
    };
    check(
        "G3",
        &[
            ("none", "{}"),
            ("header", "{headers: [{name: a, value: b}]}"),
            ("method", "{method: {method: Get}}"),
            ("service", "{method: {service: a.B}}"),
            ("both", "{method: {service: a.B, method: Get}}"),
            ("longer", "{method: {service: a.BC}}"),
        ],
        &["longer", "both", "service", "method", "header", "none"],
    );
    let paths = |m: &str| {
        let rules = format!("[{{matches: [{m}]}}]");
        let compiled = shop(&route("GRPCRoute", "shop", "name: r", &web(", port: 7070"), &rules));
        routes(&compiled).sets[0].matches[0].path.clone()
    };
    assert_eq!(
        paths("{method: {service: a.B, method: Get}}"),
        PathMatch::Exact("/a.B/Get".into()),
        "G1"
    );
    assert_eq!(paths("{method: {service: a.B}}"), PathMatch::Prefix("/a.B/".into()), "G1");
    assert_eq!(paths("{method: {method: Get}}"), PathMatch::GrpcMethod("Get".into()), "G1");
    assert_eq!(paths("{}"), PathMatch::Any, "G2");
    let PathMatch::Regex(pattern) =
        paths("{method: {type: RegularExpression, service: 'a|b', method: 'G.*'}}")
    else {
        panic!("G1: not a pattern")
    };
    for (path, fits) in [("/a/Get", true), ("/b/Go", true), ("/c/Get", false), ("/a/x", false)] {
        assert_eq!(pattern.matches(path), fits, "G1 {path}");
    }
}

#[test]
fn ports_and_protocols() {
    // A Service without routes still says what its ports speak.
    let compiled = shop("");
    let protocols = |name: &str| {
        let routes = compiled.routes.iter().find(|r| r.service.hostname.starts_with(name));
        routes.map(|r| r.ports.iter().map(|p| (p.service_port, p.protocol)).collect::<Vec<_>>())
    };
    let (http, grpc) = (Protocol::Http, Protocol::Grpc);
    assert_eq!(protocols("web."), Some(vec![(80, http), (8080, http), (7070, grpc)]));
    assert_eq!(protocols("raw."), Some(vec![(90, Protocol::Opaque)]));
    assert_eq!(protocols("v1."), None, "nothing declared, nothing routed");
    let ports = |parent: &str| {
        let compiled = shop(&route("HTTPRoute", "shop", "name: r", parent, "[{}]"));
        let sets = &routes(&compiled).sets;
        assert!(sets.len() <= 1);
        sets.first().map(|s| s.ports.to_vec()).unwrap_or_default()
    };
    assert_eq!(ports(&web("")), [80, 7070, 8080]);
    assert_eq!(ports(&web(", port: 80")), [80]);
    assert_eq!(ports(&web(", sectionName: alt")), [8080]);
    assert_eq!(ports(&web(", sectionName: alt, port: 8080")), [8080]);
    assert_eq!(ports(&format!("{}, {}", web(", port: 80"), web(", port: 8080"))), [80, 8080]);
    assert_eq!(ports(&web(", sectionName: alt, port: 80")), [0_u16; 0], "both must fit");
}

/// Row A8: whose routes a client gets, of those of both namespaces, both ports and both kinds.
#[test]
fn consumers_and_producers() {
    let named = |kind: &str, namespace: &str, port: u16| format!("{kind}-{namespace}-{port}");
    for bits in 0..16_u8 {
        let present = |bit: u8| bits & (1 << bit) != 0;
        let mut yaml = String::new();
        let mut there = Vec::new();
        for (bit, (namespace, port)) in
            (0..).zip([("shop", 80), ("shop", 8080), ("buyer", 80), ("buyer", 8080)])
        {
            if !present(bit) {
                continue;
            }
            // The other kind on every second round.
            let kind = if bits % 2 == 0 { "GRPCRoute" } else { "HTTPRoute" };
            let name = named("r", namespace, port);
            let rules = format!("[{{name: {name}}}]");
            let parent = web(&format!(", port: {port}"));
            yaml += &route(kind, namespace, &format!("name: {name}"), &parent, &rules);
            there.push((namespace, port));
        }
        let compiled = shop(&yaml);
        for client in ["shop", "buyer"] {
            for port in [80, 8080] {
                let own =
                    (client == "buyer" && there.contains(&("buyer", port))).then_some("buyer");
                let producer = there.contains(&("shop", port)).then_some("shop");
                let want: Vec<String> =
                    own.or(producer).map(|ns| named("r", ns, port)).into_iter().collect();
                let set = chosen(&compiled, client, port);
                let got: Vec<&str> = set.map(order).unwrap_or_default();
                assert_eq!(got, want, "A8 {bits:04b} {client}:{port}");
            }
        }
    }
}

/// Statuses of a route with these parents, and codes of what was found.
fn attached(row: &str, namespace: &str, parents: &str, want: &[&[&str]], found: &[&str]) {
    let rules = "[{backendRefs: [{name: v1, namespace: shop, port: 80}]}]";
    let compiled = shop(&route("HTTPRoute", namespace, "name: r, generation: 7", parents, rules));
    let got: Vec<Vec<String>> = compiled.route_status.iter().map(|s| conditions(s)).collect();
    assert_eq!(got, want, "{row}: {:?}", compiled.route_status);
    assert_eq!(codes(&compiled), found, "{row}");
    for status in &compiled.route_status {
        assert!(status.conditions.iter().all(|c| c.observed_generation == 7), "A4 {row}");
        assert_eq!(status.controller_name, CONTROLLER_NAME);
    }
}

#[test]
fn attachment() {
    const RESOLVED: &str = "ResolvedRefs=True ResolvedRefs";
    const GOOD: &[&str] = &["Accepted=True Accepted", RESOLVED];
    const NO_PARENT: &[&str] = &["Accepted=False NoMatchingParent", RESOLVED];
    const UNSUPPORTED: &[&str] = &["Accepted=False UnsupportedValue", RESOLVED];
    let service =
        |name: &str| format!("{{group: '', kind: Service, name: {name}, namespace: shop}}");
    let dangling: &[&str] = &["dangling_reference spec.parentRefs[0]"];
    attached("A1", "shop", &service("nobody"), &[NO_PARENT], dangling);
    attached("A1 there", "shop", &service("web"), &[GOOD], &[]);
    attached("A2", "shop", &web(", port: 81"), &[NO_PARENT], dangling);
    attached("A2 name", "shop", &web(", sectionName: x"), &[NO_PARENT], dangling);
    attached("A2 both", "shop", &web(", sectionName: alt, port: 80"), &[NO_PARENT], dangling);
    let two = format!("{}, {}", web(", port: 80"), web(", port: 81"));
    attached(
        "A2 one of two",
        "shop",
        &two,
        &[GOOD, NO_PARENT],
        &["dangling_reference spec.parentRefs[1]"],
    );
    // The Gateway's own controller answers for it.
    let gateway = format!("{}, {{name: edge}}", web(""));
    attached("A3", "shop", &gateway, &[GOOD], &["unsupported spec.parentRefs[1]"]);
    attached("A6", "buyer", &web(""), &[GOOD], &[]);
    let unsupported: &[&str] = &["unsupported spec.parentRefs[0]"];
    attached("A10 headless", "shop", &service("headless"), &[UNSUPPORTED], unsupported);
    attached("A10 external", "shop", &service("external"), &[UNSUPPORTED], unsupported);
    attached("no group", "shop", "{kind: Service, name: web}", &[], dangling);
    attached("opaque", "shop", &service("raw"), &[GOOD], &["no_effect spec.parentRefs[0]"]);
    attached("no parent", "shop", "", &[], &["no_effect spec.parentRefs"]);
}

#[test]
fn a_waypoint_takes_no_routes() {
    let gateway = "\n---\n{apiVersion: gateway.networking.k8s.io/v1, kind: Gateway, metadata: {name: edge, namespace: shop}, spec: \
                   {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}}";
    let parents = format!("{}, {{name: edge}}", web(""));
    let compiled = shop(&(route("HTTPRoute", "shop", "name: r", &parents, "[{}]") + gateway));
    let status: Vec<String> = compiled.route_status.iter().flat_map(|s| conditions(s)).collect();
    assert_eq!(status[0], "Accepted=True Accepted", "A3");
    assert_eq!(status[2], "Accepted=False NotAllowedByListeners", "A3");
}

/// Who runs a Gateway says its class, whatever the class is called.
#[test]
fn a_gateway_is_judged_by_the_controller_of_its_class() {
    let check = |row: &str, class: &str, controller: Option<&str>, ours: bool| {
        let gateway = format!(
            "\n---\n{{apiVersion: gateway.networking.k8s.io/v1, kind: Gateway, metadata: {{name: edge, namespace: shop}}, spec: \
             {{gatewayClassName: {class}, listeners: [{{name: mesh, port: 15008, protocol: HBONE}}]}}}}"
        );
        let object = controller.map(|c| {
            format!(
                "\n---\n{{apiVersion: gateway.networking.k8s.io/v1, kind: GatewayClass, metadata: {{name: {class}}}, spec: \
                 {{controllerName: {c}}}}}"
            )
        });
        let yaml = route("HTTPRoute", "shop", "name: r", "{name: edge}", "[{}]");
        let compiled = shop(&(yaml + &gateway + &object.unwrap_or_default()));
        assert_eq!(compiled.route_status.len(), usize::from(ours), "{row}");
    };
    check("the name alone", "istio-waypoint", None, true);
    check("our own name", "mine", Some(crate::waypoints::CONTROLLER), true);
    check("another's", "istio-waypoint", Some("example.com/other"), false);
    check("nobody's", "mine", None, false);
}

/// Row A9: what is deleted is gone, and the Service is called as if it had never been.
#[test]
fn deleted_routes_leave_nothing() {
    let mut folder = crate::Folder::new();
    folder.set_file(0, "shop.yaml", SHOP);
    let compiled =
        |folder: &crate::Folder| crate::compile(&folder.objects(), &crate::MeshConfig::default());
    let before = compiled(&folder);
    folder.set_file(0, "route.yaml", &http("[{}]"));
    assert_eq!(routes(&compiled(&folder)).sets.len(), 1);
    folder.remove_file(0, "route.yaml");
    let after = compiled(&folder);
    assert_eq!(routes(&after), routes(&before), "A9");
    assert!(after.route_status.is_empty(), "A9");
}

/// Row G4: one kind per port.
#[test]
fn kinds_do_not_mix() {
    let http = |parent: &str| route("HTTPRoute", "shop", "name: h", parent, "[{name: http}]");
    let grpc = |parent: &str| {
        route("GRPCRoute", "shop", "name: g", parent, "[{name: grpc, matches: [{}]}]")
    };
    let compiled = shop(&(http(&web("")) + &grpc(&web(""))));
    assert_eq!(order(chosen(&compiled, "any", 80).unwrap()), ["grpc"], "G4");
    let status: Vec<Vec<String>> = compiled.route_status.iter().map(|s| conditions(s)).collect();
    assert_eq!(status[0][0], "Accepted=True Accepted", "G4");
    assert_eq!(status[1][0], "Accepted=False Conflicted", "G4");
    let message = &compiled.route_status[1].conditions[0].message;
    assert!(
        message.contains("ports 80, 7070, 8080") && message.contains("GRPCRoute/shop/g"),
        "{message}"
    );
    assert!(codes(&compiled).contains(&"route_conflict spec.parentRefs[0]".to_owned()));
    // On one port of three: the others stay.
    let compiled = shop(&(http(&web("")) + &grpc(&web(", port: 7070"))));
    let rules = |port| order(chosen(&compiled, "any", port).unwrap());
    assert_eq!(
        (rules(80), rules(8080), rules(7070)),
        (vec!["http"], vec!["http"], vec!["grpc"]),
        "G4"
    );
    let condition = &compiled.route_status[1].conditions[0];
    assert!(condition.status && condition.message.contains("port 7070"), "{condition}");
    // A consumer's route and a producer's are not on one port: they are for different clients.
    let consumer = route("HTTPRoute", "buyer", "name: h", &web(""), "[{name: http}]");
    let compiled = shop(&(consumer + &grpc(&web(""))));
    assert_eq!(order(chosen(&compiled, "buyer", 80).unwrap()), ["http"], "G4");
    assert_eq!(order(chosen(&compiled, "other", 80).unwrap()), ["grpc"], "G4");
    assert!(findings(&compiled).iter().all(|d| d.code != Code::RouteConflict));
}

/// The third API keeps its own order and loses to the others; whoever it is from is told.
#[test]
fn other_apis_come_last() {
    let compiled = shop(&http("[{}]"));
    let key = routes(&compiled).service.clone();
    let of = |api, port, object: &str| {
        Arc::new(Contribution {
            service: key.clone(),
            audience: Audience::Everybody,
            ports: vec![port],
            api,
            provenance: Provenance {
                object: object.into(),
                field: "spec.hosts".into(),
                origin: "f:3".into(),
            },
            rules: routes(&compiled).sets[0].rules.to_vec(),
            matches: Arc::new([]),
            holds: OnceLock::new(),
        })
    };
    let all = [
        of(Api::VirtualService, 80, "VirtualService/shop/v"),
        of(Api::HttpRoute, 80, "HTTPRoute/shop/h"),
        of(Api::VirtualService, 8080, "VirtualService/shop/v"),
    ];
    let objects = crate::testing::objects(SHOP);
    let config = crate::MeshConfig::default();
    let mut cx = Context::new(&config);
    let services = services::compile(&objects, &mut cx);
    let Assembled { routes: assembled, losses, .. } = assemble(&services, &all, &mut Vec::new());
    assert_eq!(losses, [Loss { contribution: 0, port: 80, winner: 1 }]);
    let web = assembled.iter().find(|r| r.service == key).unwrap();
    assert_eq!(web.sets.len(), 2);
    cx.diagnostics.clear();
    tell_others(&all, &losses, &mut cx);
    let d = &cx.diagnostics[0];
    assert_eq!(
        (d.code, d.object.as_str(), d.origin.as_str()),
        (Code::RouteConflict, "VirtualService/shop/v", "f:3")
    );
    assert_eq!(d.severity, Severity::Error);
    assert!(d.message.contains("HTTPRoute/shop/h"), "{}", d.message);
}

#[test]
fn a_route_without_rules_matches_everything_and_sends_nowhere() {
    let yaml = "\n---\n{apiVersion: gateway.networking.k8s.io/v1beta1, kind: HTTPRoute, metadata: {name: r, namespace: shop}, \
                spec: {parentRefs: [{group: '', kind: Service, name: web}]}}";
    let compiled = shop(yaml);
    let set = chosen(&compiled, "any", 80).unwrap();
    assert_eq!((set.matches.len(), set.rules.len()), (1, 1), "R10");
    assert_eq!(set.matches[0].path, PathMatch::Any, "P4");
    assert!(set.rules[0].backends.is_empty());
    assert_eq!(codes(&compiled), ["no_backend spec.rules[0].backendRefs"]);
}

#[test]
fn an_empty_list_of_rules_takes_nothing_over() {
    for kind in ["HTTPRoute", "GRPCRoute"] {
        let compiled = shop(&route(kind, "shop", "name: r", &web(""), "[]"));
        assert!(chosen(&compiled, "any", 80).is_none(), "{kind}");
        assert_eq!(codes(&compiled), ["no_effect spec.rules"], "{kind}");
        assert_eq!(conditions(&compiled.route_status[0])[0], "Accepted=True Accepted", "{kind}");
    }
    // Nor does it win over another kind.
    let yaml = route("GRPCRoute", "shop", "name: g", &web(""), "[]") + &http("[{name: http}]");
    assert_eq!(order(chosen(&shop(&yaml), "any", 80).unwrap()), ["http"]);
}

#[test]
fn what_is_not_honoured_is_named() {
    let check = |row: &str, yaml: &str, want: &[&str]| {
        assert_eq!(codes(&shop(yaml)), want, "{row}");
    };
    let to = "backendRefs: [{name: v1, port: 80}]";
    let rule = |more: &str| http(&format!("[{{{to}, {more}}}]"));
    check("retry", &rule("retry: {attempts: 3}"), &["unsupported spec.rules[0].retry"]);
    check(
        "session",
        &rule("sessionPersistence: {type: Cookie}"),
        &["unsupported spec.rules[0].sessionPersistence"],
    );
    let redirect = |to: &str| {
        http(&format!("[{{filters: [{{type: RequestRedirect, requestRedirect: {to}}}]}}]"))
    };
    let field = "no_effect spec.rules[0].filters[0].requestRedirect";
    check("redirect", &redirect("{}"), &[field]);
    check("redirect status", &redirect("{statusCode: 301}"), &[field]);
    check("redirect somewhere", &redirect("{port: 81}"), &[]);
    let many = vec![format!("{{{to}}}"); 17].join(", ");
    check("limit", &http(&format!("[{many}]")), &["limit_exceeded spec.rules"]);
    let spec = |more: &str| rule("name: a").replace("spec:\n", &format!("spec:\n  {more}\n"));
    check("hostnames", &spec("hostnames: [a.example]"), &["no_effect spec.hostnames"]);
    check("default", &spec("useDefaultGateways: All"), &["unsupported spec.useDefaultGateways"]);
    let grant = "\n---\n{apiVersion: gateway.networking.k8s.io/v1beta1, kind: ReferenceGrant, metadata: {name: g, namespace: shop}, \
                 spec: {from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: buyer}], to: [{group: '', kind: Service}]}}";
    let compiled = shop(grant);
    let d = compiled.diagnostics.iter().find(|d| d.object == "ReferenceGrant/shop/g").unwrap();
    assert_eq!((d.severity, d.code), (Severity::Info, Code::NoEffect));
}

#[test]
fn rules_are_shared_not_copied() {
    let two = format!("{}, {{group: '', kind: Service, name: v1}}", web(""));
    let compiled = shop(&route("HTTPRoute", "shop", "name: r", &two, "[{}]"));
    let sets: Vec<_> = compiled.routes.iter().flat_map(|r| r.sets.iter()).collect();
    assert_eq!(sets.len(), 2);
    assert!(Arc::ptr_eq(&sets[0].rules[0], &sets[1].rules[0]));
}

#[test]
fn backends_are_services_by_their_own_port() {
    // Row B6: 80, not the pod's 8080. Row B7: nothing but the Service itself.
    let compiled = shop(&http("[{backendRefs: [{name: web, port: 80}]}]"));
    let service = routes(&compiled).service.clone();
    assert_eq!(
        rule(&compiled).backends[0].target,
        Target::Service { service, port: 80, subset: None }
    );
    assert_eq!(&*rule(&compiled).route, "HTTPRoute/shop/r");
    assert_eq!(&*rule(&compiled).name, "rules[0]");
    let line = rule(&compiled).provenance.origin.clone();
    assert!(line.starts_with("test.yaml:"), "{line}");
}

/// The whole way, from text to the proxy's plan: the conformance suite's case that mixes paths and headers.
#[test]
fn the_proxy_does_what_the_yaml_says() {
    let to = |name: &str| format!("backendRefs: [{{name: {name}, port: 80}}]");
    let rules = format!(
        "[{{{}, matches: [{{path: {{value: /}}}}, {{headers: [{{name: version, value: one}}]}}]}}, \
         {{{}, matches: [{{path: {{value: /v2}}}}, {{headers: [{{name: version, value: two}}]}}]}}]",
        to("v1"),
        to("v2")
    );
    let yaml = format!("{SHOP}{}", http(&rules));
    let mesh = crate::testing::Mesh::new(&yaml);
    let service = mesh.compiled.services.iter().find(|s| &*s.name == "web").unwrap();
    for (path, version, want) in [
        ("/", None, "v1"),
        ("/v2", None, "v2"),
        ("/v2/x?a=b", None, "v2"),
        ("/v2example", None, "v1"),
        ("/", Some("two"), "v2"),
        ("/", Some("one"), "v1"),
        ("/v2", Some("one"), "v2"),
        ("/%762", None, "v2"),
    ] {
        let mut request = ::http::Request::builder().uri(path).header("host", "web");
        if let Some(version) = version {
            request = request.header("Version", version);
        }
        let (mut parts, ()) = request.body(()).unwrap().into_parts();
        engine::http::normalize(&mut parts).unwrap();
        let caller = engine::http::Caller::default();
        let facts =
            engine::http::RequestFacts { service, port: 80, caller, request: &parts, now: 0 };
        let plan = engine::http::route(&mesh.snapshot, &facts, 0);
        let engine::http::HttpAction::Forward { target: Target::Service { service, .. }, .. } =
            plan.action
        else {
            panic!("R9 {path}: {plan:?}")
        };
        assert!(service.hostname.starts_with(want), "R9 {path} {version:?}: {service}");
    }
}
