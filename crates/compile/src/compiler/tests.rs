//! Compiling again is compiling.

use proptest::collection::vec;
use proptest::prelude::*;
use xds::server::{Encoder, Mesh, Resources};

use super::*;
use crate::Folder;
use crate::http::testing::{SHOP, http, route, routes, web};

/// What may stand in a file at one time, beside nothing.
struct File {
    folder: usize,
    path: &'static str,
    versions: Vec<String>,
}

/// Routes: their changes leave the rest as it is.
const ROUTES: usize = 5;

fn files() -> Vec<File> {
    let gateway_api = |kind: &str, metadata: &str, spec: &str| {
        format!(
            "{{apiVersion: gateway.networking.k8s.io/v1, kind: {kind}, metadata: {{{metadata}}}, spec: {{{spec}}}}}"
        )
    };
    let route = |metadata: &str, spec: &str| gateway_api("HTTPRoute", metadata, spec);
    let istio = |kind: &str, namespace: &str, spec: &str| {
        format!(
            "{{apiVersion: networking.istio.io/v1, kind: {kind}, metadata: {{name: i, namespace: {namespace}}}, spec: {{{spec}}}}}"
        )
    };
    let security = |kind: &str, spec: &str| {
        format!(
            "{{apiVersion: security.istio.io/v1, kind: {kind}, metadata: {{name: p, namespace: shop}}, spec: {{{spec}}}}}"
        )
    };
    let fault = |spec: &str| {
        format!(
            "{{apiVersion: ambit.io/v1alpha1, kind: HTTPFault, metadata: {{name: slow, namespace: shop}}, spec: {{{spec}}}}}"
        )
    };
    let core = |kind: &str, metadata: &str, more: &str| {
        format!("{{apiVersion: v1, kind: {kind}, metadata: {{{metadata}}}{more}}}")
    };
    let one = "parentRefs: [{group: '', kind: Service, name: web}], rules: [{name: one, backendRefs: [{name: v1, port: 80}]}]";
    let lines = |comment: &str| {
        format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: a, namespace: shop}}\nspec:\n  parentRefs: [{{group: '', kind: Service, name: web}}]\n{comment}  rules: [{{name: one, backendRefs: [{{name: nowhere, port: 80}}]}}]\n"
        )
    };
    let a = "name: a, namespace: shop";
    let too_many = vec!["{name: v1, port: 80}"; model::http::limits::MAX_LIST + 1].join(", ");
    let closes = |namespace: &str| {
        let metadata = format!("name: large, namespace: {namespace}");
        let spec = "parentRefs: [{group: '', kind: Service, name: web, namespace: shop}], rules: [{backendRefs: [";
        route(&metadata, &format!("{spec}{too_many}]}}]"))
    };
    let pod = |ready: &str| {
        let metadata =
            "name: w-1, namespace: shop, labels: {of: w, networking.istio.io/tunnel: http}";
        let status = format!(
            ", spec: {{nodeName: n, containers: [{{name: c}}]}}, status: {{phase: Running, podIP: 10.0.7.1, conditions: [{{type: Ready, status: '{ready}'}}]}}"
        );
        let service = core(
            "Service",
            "name: w, namespace: shop",
            ", spec: {clusterIP: 10.96.0.21, selector: {of: w}, ports: [{port: 15008}]}",
        );
        format!("{}\n---\n{service}", core("Pod", metadata, &status))
    };
    let listeners = "listeners: [{name: mesh, port: 15008, protocol: HBONE}]";
    let file = |folder, path, versions| File { folder, path, versions };
    vec![
        file(0, "a.yaml", vec![
            route(a, one),
            route(&format!("{a}, generation: 2"), one),
            format!("# one line further down\n{}", route(a, one)),
            lines(""),
            lines("# one line further down\n"),
            route(a, "parentRefs: [{group: '', kind: Service, name: web, port: 80}, {group: '', kind: Service, name: v2}], rules: [{matches: [{path: {value: /a}}]}, {filters: [{type: ExtensionRef, extensionRef: {group: ambit.io, kind: HTTPFault, name: slow}}]}]"),
        ]),
        file(0, "b.yaml", vec![
            route("name: b, namespace: buyer", "parentRefs: [{group: '', kind: Service, name: web, namespace: shop}], rules: [{backendRefs: [{name: nowhere, port: 80}]}]"),
            route("name: b, namespace: shop", "parentRefs: [{group: '', kind: Service, name: web}, {group: '', kind: Service, name: missing}], rules: [{matches: [{path: {type: RegularExpression, value: /b+}}]}]"),
            route("name: b, namespace: nowhere", "parentRefs: [], rules: [{retry: {attempts: 2}}]"),
            closes("shop"),
            closes("buyer"),
        ]),
        file(0, "c.yaml", vec![
            gateway_api("GRPCRoute", "name: g, namespace: shop", "parentRefs: [{group: '', kind: Service, name: web, port: 80}], rules: [{backendRefs: [{name: v1, port: 80}]}]"),
            gateway_api("GRPCRoute", "name: g, namespace: shop", "parentRefs: [{group: '', kind: Service, name: web}], rules: []"),
        ]),
        file(0, "d.yaml", vec![
            istio("VirtualService", "shop", "hosts: [web, v1], http: [{match: [{uri: {regex: /b+}}], route: [{destination: {host: v2, subset: new}}]}]"),
            istio("VirtualService", "buyer", "hosts: [web.shop.svc.cluster.local], exportTo: [.], http: [{directResponse: {status: 204}}]"),
        ]),
        // What a.yaml says, when it says nothing.
        file(0, "z.yaml", vec![route(a, one)]),
        file(0, "e.yaml", vec![
            istio("DestinationRule", "shop", "host: v2, subsets: [{name: new, labels: {app: p}}]"),
            istio("DestinationRule", "shop", "host: v2, subsets: [{name: new, labels: {app: q}}]"),
        ]),
        file(0, "f.yaml", vec![
            fault("delay: {percent: 100, duration: 1s}"),
            fault("abort: {percent: 20, httpStatus: 503}"),
            fault("abort: {percent: 20}"),
        ]),
        file(0, "g.yaml", vec![
            core("Service", "name: missing, namespace: shop", ", spec: {selector: {app: p}, ports: [{port: 80}]}"),
            core("Service", "name: missing, namespace: shop, labels: {istio.io/use-waypoint: none}", ", spec: {selector: {app: p}, ports: [{name: grpc, port: 80}]}"),
            core("Namespace", "name: nowhere", ""),
        ]),
        file(0, "h.yaml", vec![
            core("Pod", "name: q, namespace: shop, labels: {app: q}", ", spec: {nodeName: n, containers: [{name: c}]}, status: {podIP: 10.0.0.9}"),
            security("AuthorizationPolicy", "selector: {matchLabels: {app: p}}"),
            security("PeerAuthentication", "mtls: {mode: STRICT}"),
            core("ServiceAccount", "name: s, namespace: shop", ""),
            core("Node", "name: n, labels: {topology.kubernetes.io/zone: z}", ""),
            gateway_api("ReferenceGrant", "name: r, namespace: shop", "from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: buyer}], to: [{group: '', kind: Service}]").replace("/v1,", "/v1beta1,"),
        ]),
        // These win over what the shop says of the same names.
        file(1, "i.yaml", vec![
            core("Namespace", "name: shop", ""),
            core("Namespace", "name: shop, labels: {istio.io/use-waypoint: none}", ""),
        ]),
        file(1, "j.yaml", vec![
            gateway_api("Gateway", "name: w, namespace: shop", &format!("gatewayClassName: istio-waypoint, {listeners}")),
            gateway_api("Gateway", "name: w, namespace: shop", &format!("gatewayClassName: other, {listeners}")),
        ]),
        file(1, "k.yaml", vec![pod("True"), pod("False")]),
    ]
}

/// Which file changes, and to which of its versions; beyond them, it is removed. Routes change most.
fn steps() -> impl Strategy<Value = Vec<(usize, usize)>> {
    let file = prop_oneof![3 => 0..ROUTES, 1 => ROUTES..files().len()];
    vec((file, 0_usize..7), 1..24)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    /// Whatever is saved and removed in whatever order, the result is that of compiling and encoding once.
    #[test]
    fn again_is_as_for_the_first_time(steps in steps()) {
        let files = files();
        let mut folder = Folder::new();
        folder.set_file(0, "shop.yaml", SHOP);
        let (mut compiler, mut encoder) = (Compiler::new(MeshConfig::default()), Encoder::default());
        let mut programmed = Programmed::new();
        for (file, version) in steps {
            let File { folder: precedence, path, versions } = &files[file];
            match versions.get(version) {
                Some(text) => {
                    folder.set_file(*precedence, path, text);
                    prop_assert!(folder.is_in_force(*precedence, path), "{:?}", folder.diagnostics());
                }
                None => folder.remove_file(*precedence, path),
            }
            let mut objects = folder.objects();
            objects.programmed = programmed;
            let once = compile(&objects, &MeshConfig::default());
            let again = compiler.compile(objects);
            prop_assert_eq!(&again, &once);
            let push = model::ConfigVersion::default();
            let resources = encoder.encode(push, mesh(&again));
            let anew = Resources::new(push, mesh(&once));
            prop_assert!(resources.same_content(&anew));
            for kind in xds::Kind::CONFIGURATION {
                prop_assert_eq!(resources.sum(kind), anew.sum(kind));
            }
            programmed = again.programmed;
        }
    }
}

fn mesh(compiled: &Compiled) -> Mesh<'_> {
    Mesh {
        workloads: &compiled.workloads,
        services: &compiled.services,
        policies: &compiled.policies,
        routes: &compiled.routes,
        subsets: &compiled.subsets,
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
    // What a VirtualService says is compared.
    let virtual_service = "{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {name: v, namespace: shop}, spec: {hosts: [v2], http: [{directResponse: {status: 204}}]}}";
    folder.set_file(0, "x.yaml", virtual_service);
    let with = compiler.compile(folder.objects());
    folder.set_file(0, "r.yaml", &http("[{name: again}]"));
    let second = compiler.compile(folder.objects());
    assert!(Arc::ptr_eq(&of(&with, "v2."), &of(&second, "v2.")), "routes by a VirtualService");
    // A Service that changes makes everything anew.
    folder.set_file(0, "shop.yaml", &SHOP.replace("port: 7070", "port: 7071"));
    let third = compiler.compile(folder.objects());
    assert!(!Arc::ptr_eq(&rule(&second, "/s"), &rule(&third, "/s")));
    assert!(routes(&third).ports.iter().any(|p| p.service_port == 7071));
}
