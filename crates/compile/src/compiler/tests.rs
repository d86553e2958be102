//! Compiling again is compiling.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::Folder;
use crate::http::testing::{SHOP, http, route, routes, web};

/// What may stand in a file at one time: nothing, or one of these.
const FILES: [(&str, &[&str]); 8] = [
    (
        "a.yaml",
        &[
            "{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {name: a, namespace: shop}, spec: {parentRefs: [{group: '', kind: Service, name: web}], rules: [{name: one, backendRefs: [{name: v1, port: 80}]}]}}",
            "{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {name: a, namespace: shop}, spec: {parentRefs: [{group: '', kind: Service, name: web, port: 80}, {group: '', kind: Service, name: v2}], rules: [{matches: [{path: {value: /a}}]}, {filters: [{type: ExtensionRef, extensionRef: {group: ambit.io, kind: HTTPFault, name: slow}}]}]}}",
            "# the same one line further down\n{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {name: a, namespace: shop}, spec: {parentRefs: [{group: '', kind: Service, name: web}], rules: [{name: one, backendRefs: [{name: v1, port: 80}]}]}}",
        ],
    ),
    (
        "b.yaml",
        &[
            "{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {name: b, namespace: buyer}, spec: {parentRefs: [{group: '', kind: Service, name: web, namespace: shop}], rules: [{backendRefs: [{name: nowhere, port: 80}]}]}}",
            "{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {name: b, namespace: shop}, spec: {parentRefs: [{group: '', kind: Service, name: web}, {group: '', kind: Service, name: missing}], rules: [{matches: [{path: {value: /b}}]}]}}",
            "{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {name: b, namespace: nowhere}, spec: {parentRefs: [], rules: [{retry: {attempts: 2}}]}}",
        ],
    ),
    (
        "c.yaml",
        &[
            "{apiVersion: gateway.networking.k8s.io/v1, kind: GRPCRoute, metadata: {name: g, namespace: shop}, spec: {parentRefs: [{group: '', kind: Service, name: web, port: 80}], rules: [{backendRefs: [{name: v1, port: 80}]}]}}",
            "{apiVersion: gateway.networking.k8s.io/v1, kind: GRPCRoute, metadata: {name: g, namespace: shop}, spec: {parentRefs: [{group: '', kind: Service, name: web}], rules: []}}",
        ],
    ),
    (
        "d.yaml",
        &[
            "{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {name: v, namespace: shop}, spec: {hosts: [web, v1], http: [{route: [{destination: {host: v2, subset: new}}]}]}}",
            "{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {name: v, namespace: buyer}, spec: {hosts: [web.shop.svc.cluster.local], exportTo: [.], http: [{directResponse: {status: 204}}]}}",
        ],
    ),
    (
        "e.yaml",
        &[
            "{apiVersion: networking.istio.io/v1, kind: DestinationRule, metadata: {name: d, namespace: shop}, spec: {host: v2, subsets: [{name: new, labels: {app: p}}]}}",
            "{apiVersion: networking.istio.io/v1, kind: DestinationRule, metadata: {name: d, namespace: shop}, spec: {host: v2, subsets: [{name: new, labels: {app: q}}]}}",
        ],
    ),
    (
        "f.yaml",
        &[
            "{apiVersion: ambit.io/v1alpha1, kind: HTTPFault, metadata: {name: slow, namespace: shop}, spec: {delay: {fixedDelay: 1s}}}",
            "{apiVersion: ambit.io/v1alpha1, kind: HTTPFault, metadata: {name: slow, namespace: shop}, spec: {abort: {httpStatus: 503, percentage: 20}}}",
        ],
    ),
    (
        "g.yaml",
        &[
            "{apiVersion: v1, kind: Service, metadata: {name: missing, namespace: shop}, spec: {selector: {app: p}, ports: [{port: 80}]}}",
            "{apiVersion: v1, kind: Service, metadata: {name: missing, namespace: shop, labels: {istio.io/use-waypoint: none}}, spec: {selector: {app: p}, ports: [{name: grpc, port: 80}]}}",
            "{apiVersion: v1, kind: Namespace, metadata: {name: nowhere}}",
        ],
    ),
    (
        "h.yaml",
        &[
            "{apiVersion: v1, kind: Pod, metadata: {name: q, namespace: shop, labels: {app: q}}, spec: {nodeName: n, containers: [{name: c}]}, status: {podIP: 10.0.0.9}}",
            "{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: p, namespace: shop}, spec: {selector: {matchLabels: {app: p}}}}",
            "{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {name: p, namespace: shop}, spec: {mtls: {mode: STRICT}}}",
        ],
    ),
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    /// Whatever is saved and removed in whatever order, the result is that of compiling once.
    #[test]
    fn again_is_as_for_the_first_time(steps in vec((0..FILES.len(), 0_usize..4), 1..24)) {
        let mut folder = Folder::new();
        folder.set_file(0, "shop.yaml", SHOP);
        let mut compiler = Compiler::new(MeshConfig::default());
        let mut programmed = Programmed::new();
        for (file, version) in steps {
            let (path, versions) = FILES[file];
            match versions.get(version) {
                Some(text) => folder.set_file(0, path, text),
                None => folder.remove_file(0, path),
            }
            let mut objects = folder.objects();
            objects.programmed = programmed;
            let once = compile(&objects, &MeshConfig::default());
            let again = compiler.compile(objects);
            prop_assert_eq!(&again, &once);
            programmed = again.programmed;
        }
    }
}

#[test]
fn what_did_not_change_is_the_very_same() {
    let mut folder = Folder::new();
    let mut compiler = Compiler::new(MeshConfig::default());
    let of = |name: &str, parent: &str, rules: &str| {
        route("HTTPRoute", "shop", &format!("name: {name}"), parent, rules)
    };
    folder.set_file(0, "shop.yaml", SHOP);
    folder.set_file(0, "r.yaml", &http("[{name: before}]"));
    folder.set_file(0, "s.yaml", &of("s", &web(""), "[{matches: [{path: {value: /s}}]}]"));
    folder.set_file(0, "v.yaml", &of("v", "{group: '', kind: Service, name: v1}", "[{}]"));
    let first = compiler.compile(folder.objects());
    let both = format!("{}{}", http("[{name: after}]"), of("new", &web(""), "[{}]"));
    folder.set_file(0, "r.yaml", &both);
    let second = compiler.compile(folder.objects());
    let same = |what: &str, a: &Arc<_>, b: &Arc<_>| assert!(Arc::ptr_eq(a, b), "{what}");
    same("Service", &first.services[0], &second.services[0]);
    let of = |compiled: &Compiled, name: &str| {
        let found = compiled.routes.iter().find(|r| r.service.hostname.starts_with(name));
        found.unwrap().clone()
    };
    assert!(Arc::ptr_eq(&of(&first, "v1."), &of(&second, "v1.")), "routes of another Service");
    let rule = |compiled: &Compiled, route: &str| {
        let mut rules = routes(compiled).sets[0].rules.iter();
        rules.rfind(|rule| rule.route.ends_with(route)).unwrap().clone()
    };
    assert!(Arc::ptr_eq(&rule(&first, "/s"), &rule(&second, "/s")), "another route of it");
    assert_eq!(&*rule(&second, "/r").name, "after");
    // A Service that changes makes everything anew.
    folder.set_file(0, "shop.yaml", &SHOP.replace("port: 7070", "port: 7071"));
    let third = compiler.compile(folder.objects());
    assert!(!Arc::ptr_eq(&rule(&second, "/s"), &rule(&third, "/s")));
    assert!(routes(&third).ports.iter().any(|p| p.service_port == 7071));
}
