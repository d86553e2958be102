//! PeerAuthentication: what each combination of modes means for plaintext and mTLS peers at each port,
//! through the proxies' own decision.

use proptest::prelude::*;

use super::*;
use crate::Severity;
use crate::testing::{Mesh, namespace, pod};

fn world() -> String {
    namespace("shop")
        + &namespace("bank")
        + &pod("shop", "web", "10.0.0.1", "app: web, tier: front")
        + &pod("shop", "db", "10.0.0.2", "app: db")
        + &pod("bank", "web", "10.0.0.3", "app: web")
        + &pod("istio-system", "gw", "10.0.0.4", "app: gw")
}

/// A policy: namespace, name, spec.
type Pa<'a> = (&'a str, &'a str, &'a str);

fn mesh(policies: &[Pa<'_>]) -> Mesh {
    let mut yaml = world();
    for (namespace, name, spec) in policies {
        yaml += &format!(
            "\n---\n{{apiVersion: security.istio.io/v1, kind: PeerAuthentication, \
             metadata: {{name: {name}, namespace: {namespace}}}, spec: {spec}}}\n"
        );
    }
    Mesh::new(&yaml)
}

/// At which of the ports 80, 81, 82 does the pod refuse plaintext?
fn strict_ports(mesh: &Mesh, pod: &str) -> Vec<u16> {
    let ports = [80, 81, 82];
    for port in ports {
        assert!(
            mesh.allows("bank/x", "10.9.9.9", pod, port),
            "mTLS is always welcome: {pod} {port}"
        );
    }
    ports.into_iter().filter(|p| !mesh.allows("", "10.9.9.9", pod, *p)).collect()
}

const ALL: &[u16] = &[80, 81, 82];
const STRICT: &str = "{mtls: {mode: STRICT}}";
const PERMISSIVE: &str = "{mtls: {mode: PERMISSIVE}}";
const UNSET: &str = "{mtls: {mode: UNSET}}";
const DISABLE: &str = "{mtls: {mode: DISABLE}}";

/// Policies, and the strict ports of shop/web, shop/db, bank/web.
fn check(policies: &[Pa<'_>], web: &[u16], db: &[u16], bank: &[u16]) {
    let mesh = mesh(policies);
    for (pod, want) in [("shop/web", web), ("shop/db", db), ("bank/web", bank)] {
        assert_eq!(strict_ports(&mesh, pod), want, "{policies:?}: {pod}");
    }
}

#[test]
fn inheritance() {
    check(&[], &[], &[], &[]);
    check(&[("istio-system", "default", STRICT)], ALL, ALL, ALL);
    check(&[("istio-system", "default", PERMISSIVE)], &[], &[], &[]);
    check(&[("istio-system", "default", DISABLE)], &[], &[], &[]);
    check(&[("shop", "default", STRICT)], ALL, ALL, &[]);
    // The narrower scope wins, either way; UNSET looks further out.
    check(&[("istio-system", "default", STRICT), ("shop", "default", PERMISSIVE)], &[], &[], ALL);
    check(&[("istio-system", "default", PERMISSIVE), ("shop", "default", STRICT)], ALL, ALL, &[]);
    check(&[("istio-system", "default", STRICT), ("shop", "default", UNSET)], ALL, ALL, ALL);
    check(&[("istio-system", "default", STRICT), ("shop", "default", "{}")], ALL, ALL, ALL);
    check(&[("istio-system", "default", UNSET), ("shop", "default", UNSET)], &[], &[], &[]);
    check(&[("istio-system", "default", STRICT), ("shop", "default", DISABLE)], &[], &[], ALL);
    let web =
        |mtls: &str| format!("{{selector: {{matchLabels: {{app: web}}}}, mtls: {{mode: {mtls}}}}}");
    check(&[("shop", "web", &web("STRICT"))], ALL, &[], &[]);
    check(&[("shop", "default", STRICT), ("shop", "web", &web("PERMISSIVE"))], &[], ALL, &[]);
    check(&[("shop", "default", STRICT), ("shop", "web", &web("UNSET"))], ALL, ALL, &[]);
    check(&[("shop", "default", STRICT), ("shop", "web", &web("DISABLE"))], &[], ALL, &[]);
    check(
        &[
            ("istio-system", "default", STRICT),
            ("shop", "default", UNSET),
            ("shop", "web", &web("UNSET")),
        ],
        ALL,
        ALL,
        ALL,
    );
    // A selector without labels is no selector.
    check(&[("istio-system", "default", "{selector: {}, mtls: {mode: STRICT}}")], ALL, ALL, ALL);
    check(
        &[("shop", "default", "{selector: {matchLabels: {}}, mtls: {mode: STRICT}}")],
        ALL,
        ALL,
        &[],
    );
    // With a selector, the root namespace is a namespace like any other.
    check(&[("istio-system", "web", &web("STRICT"))], &[], &[], &[]);
}

#[test]
fn ports() {
    let web = |rest: &str| format!("{{selector: {{matchLabels: {{app: web}}}}, {rest}}}");
    let strict_but = web("mtls: {mode: STRICT}, portLevelMtls: {81: {mode: PERMISSIVE}}");
    check(&[("shop", "web", &strict_but)], &[80, 82], &[], &[]);
    let permissive_but = web("mtls: {mode: PERMISSIVE}, portLevelMtls: {'81': {mode: STRICT}}");
    check(&[("shop", "web", &permissive_but)], &[81], &[], &[]);
    check(
        &[("istio-system", "default", STRICT), ("shop", "web", &permissive_but)],
        &[81],
        ALL,
        ALL,
    );
    // The main mode may be inherited.
    let but = web("portLevelMtls: {81: {mode: PERMISSIVE}, 82: {mode: DISABLE}}");
    check(&[("shop", "web", &but)], &[], &[], &[]);
    check(&[("shop", "default", STRICT), ("shop", "web", &but)], &[80], ALL, &[]);
    check(&[("istio-system", "default", STRICT), ("shop", "web", &but)], &[80], ALL, ALL);
    let strict_ports =
        web("portLevelMtls: {80: {mode: STRICT}, 82: {mode: STRICT}, 81: {mode: UNSET}}");
    check(&[("shop", "web", &strict_ports)], &[80, 82], &[], &[]);
    check(&[("shop", "default", STRICT), ("shop", "web", &strict_ports)], ALL, ALL, &[]);
    let everything = web(
        "mtls: {mode: STRICT}, portLevelMtls: {80: {mode: STRICT}, 81: {mode: UNSET}, 82: {mode: DISABLE}}",
    );
    check(&[("shop", "web", &everything)], &[80, 81], &[], &[]);
    // Without a selector, ports have no effect; the mode has.
    let wide = "{mtls: {mode: STRICT}, portLevelMtls: {81: {mode: PERMISSIVE}}}";
    check(&[("shop", "default", wide)], ALL, ALL, &[]);
    assert!(mesh(&[("shop", "default", wide)]).has(
        Code::NoEffect,
        Severity::Error,
        "spec.portLevelMtls"
    ));
}

#[test]
fn the_oldest_wins() {
    check(&[("shop", "a", STRICT), ("shop", "b", PERMISSIVE)], ALL, ALL, &[]);
    check(&[("shop", "b", PERMISSIVE), ("shop", "a", STRICT)], &[], &[], &[]);
    let web =
        |mode: &str| format!("{{selector: {{matchLabels: {{app: web}}}}, mtls: {{mode: {mode}}}}}");
    let front = |mode: &str| {
        format!("{{selector: {{matchLabels: {{tier: front}}}}, mtls: {{mode: {mode}}}}}")
    };
    check(&[("shop", "a", &web("PERMISSIVE")), ("shop", "b", &front("STRICT"))], &[], &[], &[]);
    check(&[("shop", "b", &front("STRICT")), ("shop", "a", &web("PERMISSIVE"))], ALL, &[], &[]);
    let conflicts = |policies: &[Pa<'_>]| {
        let all = mesh(policies).compiled.diagnostics;
        let found = all.into_iter().filter(|d| d.code == Code::ConflictingPolicies);
        found.map(|d| (d.object, d.message)).collect::<Vec<_>>()
    };
    let found = conflicts(&[("shop", "a", STRICT), ("shop", "b", PERMISSIVE)]);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].0, "PeerAuthentication/shop/b");
    assert!(found[0].1.contains("PeerAuthentication/shop/a (test.yaml:"), "{found:?}");
    let found = conflicts(&[("shop", "a", &web("STRICT")), ("shop", "b", &front("STRICT"))]);
    assert_eq!(found.len(), 1);
    assert!(found[0].1.contains("Pod/shop/web"), "{found:?}");
    assert_eq!(conflicts(&[("shop", "a", STRICT), ("bank", "b", STRICT)]), []);
    // A cluster states the age; the place in the file does not matter then.
    let yaml = |first: &str, second: &str| {
        let pa = |name: &str, mode: &str, created: &str| {
            format!(
                "\n---\n{{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {{name: {name}, \
                 namespace: shop, creationTimestamp: '{created}'}}, spec: {{mtls: {{mode: {mode}}}}}}}\n"
            )
        };
        world() + &pa("a", "PERMISSIVE", first) + &pa("b", "STRICT", second)
    };
    let (old, new) = ("2024-01-01T00:00:00Z", "2025-01-01T00:00:00Z");
    assert!(strict_ports(&Mesh::new(&yaml(old, new)), "shop/web").is_empty());
    assert_eq!(strict_ports(&Mesh::new(&yaml(new, old)), "shop/web"), ALL);
}

#[test]
fn a_refusal_names_the_field_that_is_strict() {
    let provenance = |policies: &[Pa<'_>], pod: &str| {
        let mesh = mesh(policies);
        let (namespace, name) = pod.split_once('/').unwrap();
        let workload = mesh.snapshot.workload_named(&namespace.into(), &name.into()).unwrap();
        let policies = mesh.snapshot.policies_of(workload);
        assert!(policies.missing.is_empty());
        let rules = policies.found.iter().flat_map(|p| p.rules.iter());
        let texts = rules.map(|r| format!("{} {}", r.provenance.object, r.provenance.field));
        texts.collect::<Vec<_>>()
    };
    let mesh_wide = ("istio-system", "default", STRICT);
    let main = "PeerAuthentication/istio-system/default spec.mtls.mode";
    assert_eq!(provenance(&[mesh_wide], "bank/web"), [main]);
    let spec = "{selector: {matchLabels: {app: web}}, portLevelMtls: {81: {mode: PERMISSIVE}}}";
    assert_eq!(provenance(&[mesh_wide, ("shop", "web", spec)], "shop/web"), [main]);
    let spec = "{selector: {matchLabels: {app: web}}, portLevelMtls: {81: {mode: STRICT}}}";
    assert_eq!(
        provenance(&[("shop", "web", spec)], "shop/web"),
        ["PeerAuthentication/shop/web spec.portLevelMtls.81"]
    );
}

#[test]
fn disable_is_not_what_it_says() {
    let mesh = mesh(&[("shop", "default", DISABLE)]);
    assert!(mesh.has(Code::NoEffect, Severity::Warning, "spec.mtls.mode"));
}

const MODES: [MtlsMode; 4] =
    [MtlsMode::Unset, MtlsMode::Disable, MtlsMode::Permissive, MtlsMode::Strict];

fn any_mode() -> impl Strategy<Value = Option<MtlsMode>> {
    prop::option::of(prop::sample::select(&MODES[..]))
}

fn spec_of(selector: bool, mode: Option<MtlsMode>, ports: &[(u16, MtlsMode)]) -> String {
    let text = |mode: MtlsMode| format!("{mode:?}").to_uppercase();
    let mut parts = Vec::new();
    if selector {
        parts.push("selector: {matchLabels: {app: web}}".to_owned());
    }
    if let Some(mode) = mode {
        parts.push(format!("mtls: {{mode: {}}}", text(mode)));
    }
    if !ports.is_empty() {
        let ports = ports.iter().map(|(p, m)| format!("{p}: {{mode: {}}}", text(*m)));
        parts.push(format!("portLevelMtls: {{{}}}", ports.collect::<Vec<_>>().join(", ")));
    }
    format!("{{{}}}", parts.join(", "))
}

proptest! {
    /// Every combination of three scopes and ports against the sentence in the documentation: port,
    /// else workload, else namespace, else mesh, else PERMISSIVE.
    #[test]
    fn narrowest_set_mode_decides(
        mesh_mode in prop::option::of(any_mode()),
        namespace_mode in prop::option::of(any_mode()),
        workload_mode in prop::option::of(any_mode()),
        port_modes in prop::collection::btree_map(prop::sample::select(&[80_u16, 81, 82][..]),
            prop::sample::select(&MODES[..]), 0..3),
    ) {
        let ports: Vec<_> = port_modes.iter().map(|(p, m)| (*p, *m)).collect();
        let specs = [
            mesh_mode.map(|m| ("istio-system", spec_of(false, m, &[]))),
            namespace_mode.map(|m| ("shop", spec_of(false, m, &[]))),
            workload_mode.map(|m| ("shop", spec_of(true, m, &ports))),
        ];
        let names = ["mesh", "namespace", "workload"];
        let policies: Vec<Pa<'_>> = specs.iter().zip(names)
            .filter_map(|(s, name)| s.as_ref().map(|(ns, spec)| (*ns, name, spec.as_str())))
            .collect();
        let mesh = mesh(&policies);
        let is_set = |m: &Option<MtlsMode>| m.filter(|m| *m != MtlsMode::Unset);
        let outer = [workload_mode, namespace_mode, mesh_mode];
        let main = outer.iter().flatten().find_map(is_set).unwrap_or(MtlsMode::Permissive);
        let want: Vec<u16> = ALL.iter().copied().filter(|port| {
            let at_port = workload_mode.and_then(|_| port_modes.get(port).copied());
            at_port.filter(|m| *m != MtlsMode::Unset).unwrap_or(main) == MtlsMode::Strict
        }).collect();
        prop_assert_eq!(strict_ports(&mesh, "shop/web"), want, "{:?}", policies);
    }
}
