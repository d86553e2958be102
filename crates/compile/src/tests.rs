//! The whole way: text to model values.

use model::{Health, TunnelProtocol};

use proptest::prelude::*;

use crate::*;

const SHOP: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop}
spec:
  replicas: 3
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - name: web
        command: [nginx]
        ports: [{name: http, containerPort: 8080}]
        resources: {limits: {cpu: 1}}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: http}]
";

#[test]
fn a_folder_becomes_a_mesh() {
    let mut folder = Folder::new();
    folder.set_file(0, "shop.yaml", SHOP);
    assert_eq!(folder.diagnostics(), []);
    let objects = folder.objects();
    let mut assignments = local::Assignments::default();
    let config = local::LocalConfig::with_nodes(2);
    let plan = local::plan(&objects, &config, &mut assignments);
    assert_eq!(plan.diagnostics, []);
    assert_eq!(plan.pods.len(), 3);
    let compiled = compile(&plan.settled(&objects), &MeshConfig::default());
    assert_eq!(compiled.diagnostics, []);
    assert_eq!(compiled.workloads.len(), 3);
    let web = &compiled.workloads[0];
    assert_eq!(web.protocol, TunnelProtocol::Hbone);
    assert_eq!(web.health, Health::Healthy);
    assert_eq!(&*web.workload_name, "web");
    assert_eq!(web.addresses.len(), 2);
    let (key, ports) = &web.services[0];
    assert_eq!(key.to_string(), "shop/web.shop.svc.cluster.local");
    assert_eq!((ports[0].service_port, ports[0].target_port), (80, 8080));
    let service = &compiled.services[0];
    assert_eq!((service.ports[0].target_port, service.vips.len()), (0, 1));
    assert_eq!(compiled.pods.len(), 2);
}

/// Documents of every kind, good ones and such with small faults.
const DOCUMENTS: [&str; 23] = [
    "{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}}",
    "{apiVersion: v1, kind: Node, metadata: {name: node-1, labels: {topology.kubernetes.io/zone: z}}}",
    "{apiVersion: v1, kind: ServiceAccount, metadata: {name: sa, namespace: shop}}",
    "{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: shop, labels: {app: web}, annotations: \
     {ambient.istio.io/redirection: enabled}}, spec: {nodeName: node-1, serviceAccountName: sa, containers: \
     [{name: c, ports: [{name: http, containerPort: 80}]}]}, status: {podIP: 10.0.0.1, phase: Running}}",
    "{apiVersion: v1, kind: Pod, metadata: {name: b, namespace: shop, labels: {app: web}}, spec: {containers: \
     [{name: c}]}, status: {podIP: 10.0.0.1, phase: Running}}",
    "{apiVersion: apps/v1, kind: Deployment, metadata: {name: web, namespace: shop}, spec: {replicas: 2, selector: \
     {matchLabels: {app: web}}, template: {metadata: {labels: {app: web}}, spec: {containers: [{name: c}]}}}}",
    "{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop}, spec: {selector: {app: web}, \
     clusterIP: 10.96.0.1, ports: [{port: 80, targetPort: http}]}}",
    "{apiVersion: v1, kind: Service, metadata: {name: web2, namespace: shop}, spec: {selector: {app: web}, \
     clusterIP: 10.96.0.1, ipFamilyPolicy: PreferDualStack, ports: [{port: 80}]}}",
    "{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: p, namespace: shop}, spec: \
     {action: DENY, selector: {matchLabels: {app: web}}, rules: [{from: [{source: {principals: ['*/sa/x'], \
     requestPrincipals: [a]}}], to: [{operation: {ports: ['80']}}], when: [{key: source.ip, values: [10.0.0.0/8]}]}]}}",
    "{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: q, namespace: istio-system}, \
     spec: {rules: [{}]}}",
    "{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {name: p, namespace: shop}, spec: \
     {selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}, portLevelMtls: {80: {mode: DISABLE}}}}",
    "{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {name: q, namespace: shop}, spec: \
     {mtls: {mode: PERMISSIVE}}}",
    "{apiVersion: v1, kind: ConfigMap, metadata: {name: x}}",
    "{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {name: h, namespace: shop}, spec: {parentRefs: \
     [{group: '', kind: Service, name: web}], rules: [{name: a, matches: [{path: {type: PathPrefix, value: /a}, headers: \
     [{name: x, value: y}], method: GET}], filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, \
     replacePrefixMatch: /b}}}], backendRefs: [{name: web2, port: 80, weight: 3}], timeouts: {request: 1s}}]}}",
    "{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {name: i, namespace: bank, creationTimestamp: \
     '2026-01-01T00:00:00Z'}, spec: {parentRefs: [{group: '', kind: Service, name: web, namespace: shop, port: 80}, {name: g}], \
     rules: [{filters: [{type: RequestMirror, requestMirror: {percent: 5, backendRef: {name: nobody, port: 1}}}, {type: \
     RequestHeaderModifier, requestHeaderModifier: {set: [{name: a, value: b}], remove: [c]}}]}]}}",
    "{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {name: j, namespace: shop}, spec: {parentRefs: \
     [{group: '', kind: Service, name: web}], rules: [{matches: [{path: {type: RegularExpression, value: '/[a-z]+'}, \
     queryParams: [{name: q, value: '1'}]}], filters: [{type: CORS, cors: {allowOrigins: ['https://*.example'], maxAge: 3}}, \
     {type: RequestRedirect, requestRedirect: {hostname: a.example, port: 81, statusCode: 301}}]}]}}",
    "{apiVersion: gateway.networking.k8s.io/v1, kind: GRPCRoute, metadata: {name: g, namespace: shop}, spec: {parentRefs: \
     [{group: '', kind: Service, name: web, port: 80}], rules: [{matches: [{method: {service: a.B, method: C}, headers: \
     [{name: x, value: y}]}], filters: [{type: ExtensionRef, extensionRef: {group: ambit.io, kind: HTTPFault, name: c}}], backendRefs: \
     [{name: web2, port: 80, filters: [{type: ResponseHeaderModifier, responseHeaderModifier: {add: [{name: a, value: b}]}}]}]}]}}",
    "{apiVersion: gateway.networking.k8s.io/v1, kind: Gateway, metadata: {name: g, namespace: bank}, spec: {gatewayClassName: \
     istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}}",
    "{apiVersion: gateway.networking.k8s.io/v1beta1, kind: ReferenceGrant, metadata: {name: g, namespace: shop}, spec: {from: \
     [{group: a, kind: b, namespace: c}], to: [{group: '', kind: Service}]}}",
    "{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {name: v, namespace: shop}, spec: {hosts: [web2], http: \
     [{name: a, match: [{uri: {prefix: /a}, headers: {x: {exact: y}}, port: 80}, {uri: {regex: '/b.*'}}], rewrite: {uri: /c}, \
     route: [{destination: {host: web2, subset: s}, weight: 3}, {destination: {host: web}, weight: 1}], timeout: 1s}, \
     {redirect: {uri: /d, scheme: https}}]}}",
    "{apiVersion: networking.istio.io/v1beta1, kind: VirtualService, metadata: {name: w, namespace: bank}, spec: {hosts: \
     [web.shop.svc.cluster.local], exportTo: ['.'], http: [{match: [{sourceNamespace: bank}], fault: {delay: {fixedDelay: 1s, \
     percentage: {value: 5}}}, corsPolicy: {allowOrigins: [{exact: '*'}], maxAge: 1h}, headers: {request: {set: {a: b}}}, mirror: \
     {host: nobody}, directResponse: {status: 200, body: {string: x}}}]}}",
    "{apiVersion: networking.istio.io/v1, kind: DestinationRule, metadata: {name: d, namespace: shop}, spec: {host: web2, subsets: \
     [{name: s, labels: {app: web}, trafficPolicy: {tls: {mode: SIMPLE}}}], trafficPolicy: {connectionPool: {tcp: \
     {maxConnections: 1}}}}}",
    "{apiVersion: ambit.io/v1alpha1, kind: HTTPFault, metadata: {name: c, namespace: shop}, spec: {abort: {percent: 1, httpStatus: \
     503}, match: {headers: [{name: a, value: b}], source: {namespaces: [bank]}}, until: '2030-01-01T00:00:00Z'}}",
];

/// What may stand where something else stood.
const FRAGMENTS: [&str; 30] = [
    "null",
    "{}",
    "[]",
    "''",
    "-1",
    "0",
    "65536",
    "4294967296",
    "true",
    "yes",
    "'*'",
    "a",
    "../..",
    "10.0.0.1",
    "fd00::1",
    "None",
    "STRICT",
    "ALLOW",
    "DENY",
    "CUSTOM",
    "[{}]",
    "{a: b}",
    "[[]]",
    "{{{{",
    "]",
    "&a [*a]",
    "<<",
    "1e400",
    "'\\0'",
    "\u{feff}",
];

fn any_document() -> impl Strategy<Value = String> {
    let edit = (any::<prop::sample::Index>(), prop::sample::select(&FRAGMENTS[..]), any::<bool>());
    (prop::sample::select(&DOCUMENTS[..]), prop::collection::vec(edit, 0..3)).prop_map(
        |(document, edits)| {
            let mut text = document.to_owned();
            for (at, fragment, whole) in edits {
                // Values start after a colon or an opening bracket.
                let starts: Vec<usize> =
                    text.match_indices([':', '[', ' ']).map(|(i, _)| i + 1).collect();
                if starts.is_empty() {
                    continue;
                }
                let start = starts[at.index(starts.len())];
                let end = text[start..].find([',', '}', ']']).map_or(text.len(), |n| start + n);
                text.replace_range(
                    start..if whole { end } else { start },
                    &format!(" {fragment} "),
                );
            }
            text
        },
    )
}

/// Everything that is done to text, for its own sake.
fn everything(texts: &[String]) -> (Folder, Compiled) {
    let mut folder = Folder::new();
    for (i, text) in texts.iter().enumerate() {
        folder.set_file(0, &format!("{i}.yaml"), text);
    }
    let objects = folder.objects();
    let _ = folder.diagnostics();
    let mut assignments = local::Assignments::default();
    let plan = local::plan(&objects, &local::LocalConfig::with_nodes(2), &mut assignments);
    let _ = compile(&plan.settled(&objects), &MeshConfig::default());
    let compiled = compile(&objects, &MeshConfig::default());
    (folder, compiled)
}

/// A form to compare: every part of the result.
fn form(compiled: &Compiled) -> String {
    format!("{compiled:#?}")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn any_text_is_survived(text in "[-a-z0-9:{}\\[\\],&*!|>'\"#%@<\n\t ~.?]{0,200}") {
        everything(&[text]);
    }

    #[test]
    fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        everything(&[String::from_utf8_lossy(&bytes).into_owned()]);
    }

    #[test]
    fn any_objects_are_survived(documents in prop::collection::vec(any_document(), 0..6)) {
        everything(&[documents.join("\n---\n")]);
        everything(&documents);
    }

    /// Cut anywhere: a file that was good never loses what it had, or has fewer whole documents.
    #[test]
    fn half_written_files_are_survived(cut in any::<prop::sample::Index>()) {
        let text = DOCUMENTS.join("\n---\n");
        let mut folder = Folder::new();
        folder.set_file(0, "a.yaml", &text);
        let cut = cut.index(text.len());
        folder.set_file(0, "a.yaml", &text[..cut]);
        let objects = folder.objects();
        compile(&objects, &MeshConfig::default());
        folder.set_file(0, "a.yaml", &text);
        prop_assert_eq!(folder.objects().pods.len(), 2);
    }

    /// The order in which files arrive changes nothing, and neither does compiling again.
    #[test]
    fn order_does_not_matter(
        documents in prop::collection::vec(any_document(), 1..8).prop_shuffle(),
        order in Just((0..8_usize).collect::<Vec<_>>()).prop_shuffle(),
    ) {
        let (first_folder, first) = everything(&documents);
        let mut folder = Folder::new();
        for i in order {
            if let Some(text) = documents.get(i) {
                folder.set_file(0, &format!("{i}.yaml"), text);
                // The watcher reports what did not change, too.
                folder.set_file(0, &format!("{i}.yaml"), text);
            }
        }
        prop_assert_eq!(folder.diagnostics(), first_folder.diagnostics());
        let second = compile(&folder.objects(), &MeshConfig::default());
        prop_assert_eq!(form(&second), form(&first));
    }

    /// Every finding names its place.
    #[test]
    fn findings_have_a_place(documents in prop::collection::vec(any_document(), 0..6)) {
        let (folder, compiled) = everything(&documents);
        for d in folder.diagnostics().iter().chain(&compiled.diagnostics) {
            let (file, line) = d.origin.rsplit_once(':').unwrap_or_default();
            prop_assert!(file.ends_with(".yaml") && line.parse::<u32>().is_ok_and(|l| l > 0), "{:?}", d);
            prop_assert!(!d.message.is_empty());
        }
    }
}

#[test]
fn codes_are_distinct() {
    let texts: std::collections::BTreeSet<&str> = Code::ALL.iter().map(|c| c.as_str()).collect();
    assert_eq!(texts.len(), Code::ALL.len());
    let d =
        Diagnostic::error(Code::UnknownField, "m").object("o").field("f").origin("a:1").help("h");
    assert_eq!(d.to_string(), "a:1: error: o: f: m (h) [unknown_field]");
}

#[test]
fn diagnostics_are_sorted() {
    let at = |severity, origin: &str| Diagnostic::new(severity, Code::NoEffect, "m").origin(origin);
    let mut all = vec![
        at(Severity::Warning, "a:1"),
        at(Severity::Error, "b:10"),
        at(Severity::Error, "b:9"),
        at(Severity::Error, "b:9"),
    ];
    sort_diagnostics(&mut all);
    assert_eq!(all.iter().map(|d| d.origin.as_str()).collect::<Vec<_>>(), ["b:9", "b:10", "a:1"]);
}
