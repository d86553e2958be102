//! Pod objects and what they are run with.

use super::*;
use serde_json::{Value, json};

fn pod(spec: Value) -> PodPlan {
    let object = json!({
        "metadata": {"name": "web-0", "namespace": "shop", "labels": {"app": "web"}},
        "spec": spec,
    });
    let pod: Pod = serde_json::from_value(object).unwrap();
    let images = BTreeMap::from([
        ("app".to_owned(), (PathBuf::from("/opt/app"), false)),
        ("root".to_owned(), (PathBuf::from("/srv/root"), true)),
    ]);
    let ips = ["10.244.1.2".parse().unwrap(), "fd00::2".parse().unwrap()];
    resolve(&pod, &Surroundings { node: "node-1", ips: &ips, images: &images })
}

fn container(value: Value) -> ContainerPlan {
    pod(json!({"containers": [value]})).containers.remove(0)
}

fn reason(value: Value) -> (String, String) {
    let problem = container(value).process.unwrap_err();
    (problem.reason, problem.message)
}

#[test]
fn commands_and_images() {
    let argv = |value: Value| container(value).process.unwrap().argv;
    assert_eq!(argv(json!({"name": "c", "command": ["a", "b"], "args": ["c"]})), ["a", "b", "c"]);
    assert_eq!(argv(json!({"name": "c", "image": "unknown", "command": ["a"]})), ["a"]);
    assert_eq!(argv(json!({"name": "c", "image": "app", "args": ["-x"]})), ["/image/app", "-x"]);
    assert_eq!(argv(json!({"name": "c", "image": "app", "command": ["sh"]})), ["sh"]);
    assert_eq!(
        container(json!({"name": "c", "image": "root", "command": ["sh"]})).root,
        RootSource::Folder("/srv/root".into())
    );
    let (word, text) = reason(json!({"name": "c", "image": "nginx:1.27"}));
    assert_eq!(word, "ImageUnknown");
    assert!(text.contains("--image nginx:1.27=PATH"), "{text}");
    assert_eq!(reason(json!({"name": "c", "image": "root"})).0, "CommandMissing");
}

#[test]
fn environment() {
    let process = container(json!({
        "name": "c",
        "command": ["$(GREETING)", "$(UNKNOWN)", "$$(GREETING)", "a$(GREETING)b$", "$(", "$(GREETING"],
        "env": [
            {"name": "GREETING", "value": "hello"},
            {"name": "TWICE", "value": "$(GREETING) $(GREETING) $(LATER)"},
            {"name": "LATER", "value": "x"},
            {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": "NS", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}},
            {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "IPS", "valueFrom": {"fieldRef": {"fieldPath": "status.podIPs"}}},
            {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
            {"name": "SA", "valueFrom": {"fieldRef": {"fieldPath": "spec.serviceAccountName"}}},
            {"name": "APP", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app']"}}},
            {"name": "OPTIONAL", "valueFrom": {"configMapKeyRef": {"name": "m", "key": "k", "optional": true}}},
            {"name": "PATH", "value": "/bin"},
        ],
    }))
    .process
    .unwrap();
    assert_eq!(
        process.argv,
        ["hello", "$(UNKNOWN)", "$(GREETING)", "ahellob$", "$(", "$(GREETING"]
    );
    let env: BTreeMap<&str, &str> =
        process.env.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    for (name, value) in [
        ("TWICE", "hello hello $(LATER)"),
        ("POD", "web-0"),
        ("NS", "shop"),
        ("IP", "10.244.1.2"),
        ("IPS", "10.244.1.2,fd00::2"),
        ("NODE", "node-1"),
        ("SA", "default"),
        ("APP", "web"),
        ("PATH", "/bin"),
        ("HOSTNAME", "web-0"),
    ] {
        assert_eq!(env.get(name), Some(&value), "{name}");
    }
    assert!(!env.contains_key("OPTIONAL"));
    for from in [
        json!({"configMapKeyRef": {"name": "m", "key": "k"}}),
        json!({"secretKeyRef": {"name": "m", "key": "k"}}),
        json!({"resourceFieldRef": {"resource": "limits.cpu"}}),
        json!({"fieldRef": {"fieldPath": "spec.whatever"}}),
    ] {
        let env = json!([{"name": "X", "valueFrom": from}]);
        let (word, text) = reason(json!({"name": "c", "command": ["a"], "env": env}));
        assert_eq!(word, "CreateContainerConfigError");
        assert!(text.contains("env X"), "{text}");
    }
}

#[test]
fn users() {
    let check = |of_pod: Value, own: Value, want: Result<(u32, u32, Vec<u32>), &str>| {
        let plan = pod(json!({
            "securityContext": of_pod,
            "containers": [{"name": "c", "command": ["a"], "securityContext": own}],
        }));
        match (&plan.containers[0].process, want) {
            (Ok(p), Ok(want)) => assert_eq!((p.uid, p.gid, p.groups.clone()), want),
            (Err(p), Err(want)) => assert!(p.message.contains(want), "{}", p.message),
            (got, want) => panic!("{got:?}, not {want:?}"),
        }
    };
    check(json!({}), json!({}), Ok((0, 0, vec![])));
    check(json!({"runAsUser": 101}), json!({}), Ok((101, 0, vec![])));
    check(json!({"runAsUser": 101, "runAsGroup": 5}), json!({"runAsUser": 7}), Ok((7, 5, vec![])));
    check(json!({"fsGroup": 9, "supplementalGroups": [8]}), json!({}), Ok((0, 0, vec![8, 9])));
    check(json!({"runAsNonRoot": true}), json!({}), Err("runAsNonRoot"));
    check(json!({"runAsNonRoot": true, "runAsUser": 1}), json!({}), Ok((1, 0, vec![])));
    check(json!({}), json!({"runAsUser": -1}), Err("runAsUser -1"));
}

#[test]
fn volumes() {
    let plan = pod(json!({
        "volumes": [{"name": "data", "emptyDir": {}}, {"name": "cfg", "configMap": {"name": "m"}}],
        "containers": [
            {"name": "a", "command": ["x"], "volumeMounts": [{"name": "data", "mountPath": "/data", "subPath": "s", "readOnly": true}]},
            {"name": "b", "command": ["x"], "volumeMounts": [{"name": "cfg", "mountPath": "/cfg"}]},
            {"name": "c", "command": ["x"], "volumeMounts": [{"name": "none", "mountPath": "/x"}]},
            {"name": "d", "command": ["x"], "volumeMounts": [{"name": "data", "mountPath": "/x", "subPath": "../y"}]},
        ],
    }));
    assert_eq!(plan.volumes.iter().map(|v| v.name.as_str()).collect::<Vec<_>>(), ["data"]);
    let mount = Mount {
        volume: "data".into(),
        sub_path: "s".into(),
        target: "/data".into(),
        read_only: true,
    };
    assert_eq!(plan.containers[0].mounts, [mount]);
    assert!(plan.containers[0].process.is_ok());
    for (i, word) in [(1, "emptyDir"), (2, "none"), (3, "..")] {
        let problem = plan.containers[i].process.clone().unwrap_err();
        assert!(problem.message.contains(word), "{problem:?}");
    }
}

#[test]
fn probes() {
    let probe = |value: Value| {
        let ports = json!([{"name": "http", "containerPort": 8080}]);
        container(json!({"name": "c", "command": ["a"], "ports": ports, "readinessProbe": value}))
            .readiness
            .unwrap()
    };
    let p = probe(json!({"httpGet": {"port": "http", "path": "/ok"}}));
    let http = ProbeAction::Http { port: 8080, path: "/ok".into(), host: None, headers: vec![] };
    assert_eq!(
        p,
        ProbePlan {
            action: http,
            initial_delay: 0,
            period: 10_000,
            timeout: 1000,
            success: 1,
            failure: 3
        }
    );
    let p = probe(
        json!({"tcpSocket": {"port": 1}, "initialDelaySeconds": 2, "periodSeconds": 3, "timeoutSeconds": 4, "successThreshold": 5, "failureThreshold": 6}),
    );
    assert_eq!(
        p,
        ProbePlan {
            action: ProbeAction::Tcp { port: 1 },
            initial_delay: 2000,
            period: 3000,
            timeout: 4000,
            success: 5,
            failure: 6
        }
    );
    assert_eq!(
        probe(json!({"exec": {"command": ["x"]}})).action,
        ProbeAction::Exec(vec!["x".into()])
    );
    for bad in [
        json!({"grpc": {"port": 1}}),
        json!({"tcpSocket": {"port": "nope"}}),
        json!({"tcpSocket": {"port": 70_000}}),
        json!({"httpGet": {"port": 1, "scheme": "HTTPS"}}),
        json!({}),
    ] {
        assert!(matches!(probe(bad.clone()).action, ProbeAction::Unsupported(_)), "{bad}");
    }
}

#[test]
fn the_pod_as_a_whole() {
    let plan = pod(
        json!({"hostname": "db-0", "subdomain": "db", "restartPolicy": "Never", "terminationGracePeriodSeconds": 3, "containers": []}),
    );
    assert_eq!(
        (plan.hostname.as_str(), plan.fqdn.as_deref()),
        ("db-0", Some("db-0.db.shop.svc.cluster.local"))
    );
    assert_eq!((plan.policy, plan.grace), (RestartPolicy::Never, 3000));
    let plan = pod(json!({"containers": []}));
    assert_eq!(
        (plan.hostname.as_str(), plan.grace, plan.policy),
        ("web-0", 30_000, RestartPolicy::Always)
    );
}
