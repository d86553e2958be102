//! Questions about folders, answered as the program would.

use std::fs;
use std::path::Path;

use clap::Parser;

use super::*;

/// A shop: `web` (2 pods) and `db` in the mesh, `old` outside it.
const SHOP: &str = r"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Namespace
metadata: {name: legacy}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: web, namespace: shop}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: nobody, namespace: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop}
spec: {serviceAccountName: client, containers: [{name: c, command: [sleep]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web, tier: front}}
spec: {serviceAccountName: web, containers: [{name: c, command: [sleep], ports: [{name: http, containerPort: 8080}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web-2, namespace: shop, labels: {app: web}}
spec: {serviceAccountName: web, containers: [{name: c, command: [sleep], ports: [{name: http, containerPort: 8080}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: old, namespace: legacy, labels: {app: old}}
spec: {containers: [{name: c, command: [sleep]}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: http}]}
---
apiVersion: v1
kind: Service
metadata: {name: many, namespace: shop}
spec: {selector: {app: web}, ports: [{name: a, port: 80}, {name: b, port: 81}]}
---
apiVersion: v1
kind: Service
metadata: {name: headless, namespace: shop}
spec: {clusterIP: None, selector: {app: web}, ports: [{port: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: empty, namespace: shop}
spec: {selector: {app: none}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: hollow, namespace: shop}
spec: {clusterIP: None, selector: {app: none}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: old, namespace: legacy}
spec: {selector: {app: old}, ports: [{port: 80}]}
";

const WEB_FROM_CLIENT: &str = r"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: web, namespace: shop}
spec:
  selector: {matchLabels: {app: web}}
  rules:
    - from: [{source: {principals: [cluster.local/ns/shop/sa/client]}}]
";

const FRONT_CLOSED: &str = r"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: front-closed, namespace: shop}
spec:
  action: DENY
  selector: {matchLabels: {tier: front}}
  rules: [{}]
";

const STRICT: &str = r"
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: shop}
spec: {mtls: {mode: STRICT}}
";

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: Args,
}

fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        fs::write(dir.path().join(name), text).unwrap();
    }
    dir
}

fn ask(dir: &Path, words: &[&str]) -> Result<(String, bool)> {
    let dir = dir.to_str().unwrap();
    let cli = Cli::try_parse_from([&["can", "-f", dir], words].concat())?;
    answer(&cli.args, |_| unreachable!("a folder is given"))
}

#[test]
fn yes_and_no_with_the_rule() {
    let dir = folder(&[("shop.yaml", SHOP), ("web.yaml", WEB_FROM_CLIENT)]);
    let check = |from: &str, to: &str, want: &str| {
        let (text, yes) = ask(dir.path(), &[from, to]).unwrap();
        assert_eq!(text, want, "{from} {to}");
        assert_eq!(yes, text.starts_with("yes:"));
    };
    check(
        "shop/client",
        "shop/web",
        "yes: pod shop/client can call service shop/web:80\n\
         \x20 from     spiffe://cluster.local/ns/shop/sa/client (pod shop/client)\n\
         \x20 to       pod shop/web at 10.244.1.3:8080, pod shop/web-2 at 10.244.2.3:8080\n\
         \x20 through  HBONE (mutual TLS) to spiffe://cluster.local/ns/shop/sa/web\n\
         \x20 because  ALLOW policy shop/web matches\n\
         \x20 rule     AuthorizationPolicy/shop/web spec.rules[0] (web.yaml:8)\n",
    );
    check(
        "sa:shop/web",
        "shop/web:http",
        "no: service account shop/web cannot call service shop/web:80\n\
         \x20 from     spiffe://cluster.local/ns/shop/sa/web (pod shop/web), spiffe://cluster.local/ns/shop/sa/web (pod shop/web-2)\n\
         \x20 to       pod shop/web at 10.244.1.3:8080, pod shop/web-2 at 10.244.2.3:8080\n\
         \x20 through  HBONE (mutual TLS) to spiffe://cluster.local/ns/shop/sa/web\n\
         \x20 because  policy_no_allow: spiffe://cluster.local/ns/shop/sa/web at 10.244.1.3 may not call shop/web port 8080: \
         no ALLOW policy matches (there is shop/web) (and likewise for the others)\n\
         \x20 rule     AuthorizationPolicy/shop/web (web.yaml:2)\n\
         \x20 help     Add the caller to one of the ALLOW policies of this workload.\n",
    );
}

/// The first line of the answer, and the reason.
fn check_short(dir: &Path, from: &str, to: &str, want: &str) {
    let (text, yes) = ask(dir, &[from, to, "-o", "json"]).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let mut words = vec![json["answer"].as_str().unwrap().to_owned()];
    for path in json["paths"].as_array().unwrap() {
        let part = |key: &str| path[key].as_str().unwrap_or("-").to_owned();
        words.push(format!(
            "{}>{} {} {}",
            part("caller"),
            part("endpoint"),
            part("transport"),
            part("reason")
        ));
    }
    assert_eq!(words.join("; "), want, "{from} {to}\n{text}");
    assert_eq!(yes, words[0] == "yes");
}

#[test]
fn callers_and_targets() {
    let dir = folder(&[("shop.yaml", SHOP), ("web.yaml", WEB_FROM_CLIENT)]);
    let check = |from: &str, to: &str, want: &str| check_short(dir.path(), from, to, want);
    check(
        "legacy/old",
        "shop/web",
        "no; legacy/old>shop/web plaintext policy_no_allow; legacy/old>shop/web-2 plaintext policy_no_allow",
    );
    check("shop/client", "legacy/old", "yes; shop/client>legacy/old plaintext -");
    check(
        "pod:shop/client",
        "svc:shop/many:b",
        "yes; shop/client>shop/web HBONE -; shop/client>shop/web-2 HBONE -",
    );
    check("shop/client", "shop/many:82", "no; shop/client>- none no_such_port");
    check(
        "shop/client",
        "shop/headless",
        "yes; shop/client>shop/web HBONE -; shop/client>shop/web-2 HBONE -",
    );
    check("shop/client", "shop/empty", "no; shop/client>- none no_healthy_endpoint");
    check("shop/client", "shop/hollow", "no; shop/client>- none no_healthy_endpoint");
    check("shop/client", "pod:shop/web:8080", "yes; shop/client>shop/web HBONE -");
    check("shop/client", "pod:shop/web:15008", "no; shop/client>- none mesh_port");
    check("legacy/old", "pod:shop/web:15008", "no; legacy/old>- none mesh_port");
    check("shop/client", "pod:legacy/old:99", "yes; shop/client>legacy/old plaintext -");
    // Nobody runs as it: the answer is for a pod that would.
    check(
        "shop/nobody",
        "shop/web",
        "no; shop/nobody>shop/web HBONE policy_no_allow; shop/nobody>shop/web-2 HBONE policy_no_allow",
    );
    check("legacy/default", "legacy/old", "yes; legacy/old>legacy/old plaintext -");
    let (text, _) = ask(dir.path(), &["shop/nobody", "shop/web"]).unwrap();
    assert!(text.contains("\n  note     no pod runs as service account shop/nobody"), "{text}");
}

#[test]
fn endpoints_may_differ() {
    let dir = folder(&[("a.yaml", SHOP), ("b.yaml", WEB_FROM_CLIENT), ("c.yaml", FRONT_CLOSED)]);
    check_short(
        dir.path(),
        "shop/client",
        "shop/web",
        "depends; shop/client>shop/web HBONE policy_deny; shop/client>shop/web-2 HBONE -",
    );
    let (text, yes) = ask(dir.path(), &["shop/client", "shop/web"]).unwrap();
    assert!(
        !yes && text.starts_with(
            "it depends: pod shop/client can call some endpoints of service shop/web:80\n"
        )
    );
    assert!(text.contains("\nno\n  from ") && text.contains("\nyes\n  from "), "{text}");
    assert!(text.contains("(c.yaml:8)") && text.contains("(b.yaml:8)"), "{text}");
}

#[test]
fn plaintext_callers_meet_strict_mtls() {
    let dir = folder(&[("a.yaml", SHOP), ("strict.yaml", STRICT)]);
    let check = |from: &str, want: &str| check_short(dir.path(), from, "shop/web", want);
    check(
        "legacy/old",
        "no; legacy/old>shop/web plaintext mtls_required; legacy/old>shop/web-2 plaintext mtls_required",
    );
    check("shop/client", "yes; shop/client>shop/web HBONE -; shop/client>shop/web-2 HBONE -");
    let (text, _) = ask(dir.path(), &["legacy/old", "shop/web"]).unwrap();
    assert!(
        text.contains("PeerAuthentication/shop/default") && text.contains("(strict.yaml:"),
        "{text}"
    );
}

const WAYPOINT: &str = r"
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: edge, namespace: shop}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
";

/// A waypoint between them changes the way and not the answer.
#[test]
fn through_a_waypoint() {
    let bound = SHOP.replace(
        "metadata: {name: web, namespace: shop}\nspec: {selector",
        "metadata: {name: web, namespace: shop, labels: {istio.io/use-waypoint: edge}}\nspec: {selector",
    );
    assert_ne!(bound, SHOP);
    let by_edge = WEB_FROM_CLIENT.replace("sa/client", "sa/edge");
    let check = |policy: &str, from: &str, want: [bool; 2]| {
        let direct = folder(&[("a.yaml", SHOP), ("p.yaml", policy), ("w.yaml", WAYPOINT)]);
        let through = folder(&[("a.yaml", &*bound), ("p.yaml", policy), ("w.yaml", WAYPOINT)]);
        let [(_, direct), (text, through)] =
            [direct, through].map(|dir| ask(dir.path(), &[from, "shop/web"]).unwrap());
        assert_eq!([direct, through], want, "{from}: {text}");
        text
    };
    let text = check(WEB_FROM_CLIENT, "shop/client", [true, true]);
    let words = "yes: pod shop/client can call service shop/web:80\n\
         \x20 from     spiffe://cluster.local/ns/shop/sa/client (pod shop/client)\n\
         \x20 waypoint pod shop/edge-";
    assert!(text.starts_with(words) && text.contains("\n  to       pod shop/web at "), "{text}");
    assert!(text.contains("  note     HTTP routes at the waypoint may"), "{text}");
    let text = check(WEB_FROM_CLIENT, "shop/web-2", [false, false]);
    let both = "sa/web through the waypoint spiffe://cluster.local/ns/shop/sa/edge at 10.244.";
    assert!(text.contains("policy_no_allow: ") && text.contains(both), "{text}");
    // Who is let in as a waypoint brings its clients along.
    check(&by_edge, "shop/client", [false, true]);
    let deny =
        FRONT_CLOSED.replace("[{}]", "[{from: [{source: {principals: [\"*/sa/client\"]}}]}]");
    check(&deny, "shop/client", [false, false]);
    check(&deny, "shop/web-2", [true, true]);
    // Nothing outside the mesh knows of waypoints.
    let text = check(STRICT, "legacy/old", [false, false]);
    assert!(
        text.contains("mtls_required: the plaintext peer") && !text.contains("waypoint"),
        "{text}"
    );
    check(STRICT, "shop/client", [true, true]);
    // The waypoint asks for itself.
    let text = check(&by_edge, "shop/edge", [true, true]);
    assert!(!text.contains("  waypoint"), "{text}");
}

/// A running lab whose waypoint has no ready pod: whether it ever had, the control plane knows.
#[test]
fn a_waypoint_that_was_ready_once() {
    let bound = SHOP.replace(
        "metadata: {name: web, namespace: shop}\nspec: {selector",
        "metadata: {name: web, namespace: shop, labels: {istio.io/use-waypoint: edge}}\nspec: {clusterIP: 10.96.3.3, selector",
    );
    let user = folder(&[("shop.yaml", &*bound), ("w.yaml", WAYPOINT)]);
    let running = |name: &str, ip: &str| {
        format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: shop, labels: {{app: {name}}}, annotations: \
             {{ambient.istio.io/redirection: enabled}}}}, spec: {{nodeName: node-1, serviceAccountName: {name}, containers: \
             [{{name: c, command: [sleep], ports: [{{name: http, containerPort: 8080}}]}}]}}, status: {{phase: Running, \
             podIP: {ip}, conditions: [{{type: Ready, status: 'True'}}]}}}}"
        )
    };
    let lab = folder(&[
        ("a.yaml", &*running("client", "10.244.1.7")),
        ("b.yaml", &*running("web", "10.244.1.8")),
    ]);
    let check = |known: Option<bool>, yes: bool, words: &str| {
        let cli = Cli::try_parse_from(["can", "shop/client", "shop/web"]).unwrap();
        let folders = [user.path().to_owned(), lab.path().to_owned()];
        let waypoints = known.map(|bound| (("shop".into(), "edge".into()), bound));
        let waypoints = waypoints.into_iter().collect();
        let (text, said) = answer(&cli.args, |_| Ok(Running { folders, waypoints })).unwrap();
        assert!(said == yes && text.contains(words), "{known:?}: {text}");
        assert_eq!(text.contains("does not say whether shop/edge"), known.is_none(), "{text}");
    };
    check(Some(true), false, "waypoint_not_ready: service shop/web");
    check(Some(false), true, "pod shop/web at 10.244.1.8:8080");
    check(None, true, "pod shop/web at 10.244.1.8:8080");
}

#[test]
fn errors_name_what_is_wrong() {
    let dir = folder(&[("shop.yaml", SHOP)]);
    let check = |words: &[&str], want: &str| {
        let error = format!("{:#}", ask(dir.path(), words).unwrap_err());
        assert!(error.contains(want), "{words:?}: {error}");
    };
    check(&["client", "shop/web"], "FROM \"client\": write it as NAMESPACE/NAME");
    check(&["shop/client", "web"], "TO \"web\": write it as NAMESPACE/NAME");
    check(
        &["shop/client", "shop/we"],
        "no Service shop/we; the Services of this namespace: empty, headless",
    );
    check(&["shop/client", "shop/client"], "there is a pod of this name: pod:shop/client:PORT");
    check(
        &["shop/client", "shop/many"],
        "has several ports or none (80, 81): say which: shop/many:PORT",
    );
    check(&["shop/client", "shop/web:grpc"], "no port named \"grpc\"; its ports: 80");
    check(&["shop/client", "pod:shop/web"], "say the port: pod:shop/web:PORT");
    check(
        &["shop/client", "pod:shop/no:80"],
        "there is no pod shop/no with an address; the pods of this namespace: client, web, web-2",
    );
    check(
        &["shop/who", "shop/web"],
        "neither a pod nor a service account shop/who; pods of this namespace: client, web, web-2; service accounts: nobody, web",
    );
    check(
        &["pod:shop/nobody", "shop/web"],
        "there is no pod shop/nobody; the pods of this namespace: client",
    );
    check(&["user:shop/web", "shop/web"], "\"user\" is not a kind of caller");
    check(&["gone/default", "shop/web"], "neither a pod nor a service account gone/default");
    let broken = folder(&[("shop.yaml", SHOP), ("b.yaml", "kind: [\n"), ("ignored.txt", "x: [")]);
    let error = format!("{:#}", ask(broken.path(), &["shop/client", "shop/web"]).unwrap_err());
    assert!(error.contains("no sure answer") && error.contains("b.yaml:"), "{error}");
    let error = format!("{:#}", ask(Path::new("/nowhere"), &["a/b", "c/d"]).unwrap_err());
    assert!(error.contains("cannot read the folder /nowhere"), "{error}");
}

/// A running lab: the user's folder without addresses, and the objects that the lab wrote.
#[test]
fn a_running_lab() {
    let user = folder(&[("shop.yaml", SHOP), ("web.yaml", WEB_FROM_CLIENT)]);
    let pod = |name: &str, ip: Option<&str>, ready: bool| {
        let ips = ip.map(|ip| serde_json::json!([{"ip": ip}])).unwrap_or_default();
        let status = if ready { "True" } else { "False" };
        serde_json::json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": name, "namespace": "shop", "labels": {"app": name},
                "annotations": {"ambient.istio.io/redirection": "enabled", "ambit.io/origin": "shop.yaml:23"},
            },
            "spec": {
                "nodeName": "node-1", "serviceAccountName": name,
                "containers": [{"name": "c", "command": ["sleep"], "ports": [{"name": "http", "containerPort": 8080}]}],
            },
            "status": {
                "phase": if ip.is_some() { "Running" } else { "Pending" }, "podIP": ip, "podIPs": ips,
                "conditions": [{"type": "Ready", "status": status}],
            },
        })
        .to_string()
    };
    let service = r#"{"apiVersion":"v1","kind":"Service","metadata":{"name":"web","namespace":"shop"},
        "spec":{"clusterIP":"10.96.3.3","clusterIPs":["10.96.3.3"],"selector":{"app":"web"},
        "ports":[{"name":"http","port":80,"targetPort":"http"}]}}"#;
    let (client, web) =
        (pod("client", Some("10.244.1.7"), true), pod("web", Some("10.244.1.8"), true));
    let lab = folder(&[
        ("pod_shop_client.json", &client),
        ("pod_shop_web.json", &web),
        ("pod_shop_web-2.json", &pod("web-2", None, false)),
        ("service_shop_web.json", service),
    ]);
    let ask = |words: &[&str]| {
        let cli = Cli::try_parse_from([&["can"], words].concat()).unwrap();
        answer(&cli.args, |name| {
            assert_eq!(name, None);
            let folders = [user.path().to_owned(), lab.path().to_owned()];
            Ok(Running { folders, waypoints: BTreeMap::new() })
        })
    };
    let (text, yes) = ask(&["shop/client", "shop/web"]).unwrap();
    assert!(
        yes && text.contains("pod shop/web at 10.244.1.8:8080\n") && text.contains("(web.yaml:8)"),
        "{text}"
    );
    let error = ask(&["shop/web-2", "shop/web"]).unwrap_err().to_string();
    assert!(error.contains("pod shop/web-2 has no address yet (phase Pending)"), "{error}");
    fs::write(lab.path().join("pod_shop_web.json"), pod("web", Some("10.244.1.8"), false)).unwrap();
    let (text, yes) = ask(&["shop/client", "shop/web"]).unwrap();
    assert!(!yes && text.contains("no_healthy_endpoint: none of the 1 endpoint"), "{text}");
    let cli = Cli::try_parse_from(["can", "a/b", "c/d"]).unwrap();
    let error = answer(&cli.args, |_| anyhow::bail!("no lab is running")).unwrap_err();
    assert_eq!(format!("{error:#}"), "to ask about a folder, use --folder DIR: no lab is running");
}

/// DESIGN, invariant 13: link(decode(encode(compile(x)))) equals linking directly.
#[test]
fn the_wire_loses_nothing() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let mut folders: Vec<_> = fs::read_dir(examples).unwrap().map(|e| e.unwrap().path()).collect();
    let all = folder(&[
        ("a.yaml", SHOP),
        ("b.yaml", WEB_FROM_CLIENT),
        ("c.yaml", FRONT_CLOSED),
        ("d.yaml", STRICT),
        ("e.yaml", RICH),
    ]);
    folders.push(all.path().to_owned());
    for dir in folders.iter().filter(|d| d.is_dir()) {
        // An example that changes while it runs keeps what it begins with in a folder of its own.
        let begin = Some(dir.join("mesh")).filter(|mesh| mesh.is_dir());
        let dir = begin.as_ref().unwrap_or(dir);
        let objects = load::read(std::slice::from_ref(dir)).unwrap();
        let config = compile::local::LocalConfig::with_nodes(2);
        let plan =
            compile::local::plan(&objects, &config, &mut compile::local::Assignments::default());
        let mesh = compile::MeshConfig::default();
        let compiled = compile::compile(&plan.settled(&objects), &mesh);
        let wire = load::through_the_wire(&compiled, &mesh).unwrap();
        let direct = model::Snapshot::default().with(
            compiled
                .policies
                .iter()
                .cloned()
                .map(model::Change::SetPolicy)
                .chain(compiled.services.iter().cloned().map(model::Change::SetService))
                .chain(compiled.workloads.iter().cloned().map(model::Change::SetWorkload))
                .chain(compiled.routes.iter().cloned().map(model::Change::SetRoutes))
                .chain(compiled.subsets.iter().cloned().map(model::Change::SetSubset)),
        );
        assert!(compiled.workloads.len() > 1, "{}", dir.display());
        assert_eq!(contents(&wire), contents(&direct), "{}", dir.display());
        assert_eq!(http_contents(&wire), http_contents(&direct), "{}", dir.display());
    }
}

fn contents(
    s: &model::Snapshot,
) -> (Vec<model::Workload>, Vec<model::Service>, Vec<model::Policy>) {
    let mut workloads: Vec<_> = s.workloads().map(|w| (**w).clone()).collect();
    workloads.sort_by(|a, b| a.uid.cmp(&b.uid));
    let mut services: Vec<_> = s.services().map(|s| (**s).clone()).collect();
    services.sort_by(|a, b| a.key.cmp(&b.key));
    let mut policies: Vec<_> = s.policies().map(|p| (**p).clone()).collect();
    policies.sort_by(|a, b| a.key.cmp(&b.key));
    (workloads, services, policies)
}

fn http_contents(
    s: &model::Snapshot,
) -> (Vec<model::http::ServiceRoutes>, Vec<model::http::Subset>) {
    let mut routes: Vec<_> = s.all_routes().map(|r| (**r).clone()).collect();
    routes.sort_by(|a, b| a.service.cmp(&b.service));
    let mut subsets: Vec<_> = s.subsets().map(|s| (**s).clone()).collect();
    subsets.sort_by(|a, b| a.key.cmp(&b.key));
    (routes, subsets)
}

/// What the other texts do not use: every matcher, every load balancing field.
const RICH: &str = r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: rich, namespace: istio-system}
spec:
  action: DENY
  rules:
    - from:
        - source: {namespaces: ["a", "b*"], notNamespaces: ["*c"], ipBlocks: ["10.0.0.0/8", "fd00::/8"], notIpBlocks: ["10.1.1.1"]}
        - source: {notPrincipals: ["*"], notServiceAccounts: ["x/y"]}
      to:
        - operation: {ports: ["80", "81"], notPorts: ["82"]}
      when:
        - {key: source.namespace, values: ["q"], notValues: ["r"]}
        - {key: destination.ip, values: ["10.0.0.0/8"]}
    - from: [{source: {serviceAccounts: ["ns/sa"]}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: dry, namespace: shop, annotations: {istio.io/dry-run: "true"}}
spec: {action: DENY, rules: [{}]}
---
apiVersion: v1
kind: Service
metadata: {name: near, namespace: shop}
spec:
  selector: {app: web}
  internalTrafficPolicy: Local
  publishNotReadyAddresses: true
  ipFamilyPolicy: PreferDualStack
  ports: [{name: grpc-a, port: 80, targetPort: http}, {name: b, appProtocol: http, port: 81}]
---
apiVersion: v1
kind: Service
metadata: {name: zone, namespace: shop}
spec: {selector: {app: web}, trafficDistribution: PreferClose, ports: [{port: 80}]}
"#;
