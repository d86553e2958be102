//! The life of a waypoint in a running lab: applied, used, taken away; and by what its pod proves itself.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::lab::SOON;
use e2e::suite::{self, Test};
use e2e::{Lab, Plan, programs, yaml};

const TESTS: &[(&str, Test)] = &[
    ("applied_used_and_deleted", life),
    ("a_waypoint_that_cannot_run_says_why", broken),
    ("a_route_that_no_waypoint_looks_at_says_so", unseen),
    ("tokens_are_for_their_pods", tokens),
];
/// Enough to tell one half from all.
const REQUESTS: usize = 40;
/// A pod starts within a second or two; the rest is for a machine under load.
const APPLY: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    suite::run(plan, TESTS)
}

fn plan() -> Result<Plan> {
    let echo = |name: &str, node: u16| {
        yaml::pod("shop", name, node)
            .image("echo-basic", &["--pod", name, "--http-port", "8080"])
            .label("part-of", "web")
            .ready_on(8080)
            .yaml()
    };
    let service = |name: &str, selector: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec: {{selector: {{{selector}}}, ports: [{{name: http, port: 80, targetPort: 8080}}]}}\n"
        )
    };
    let objects = [
        yaml::pod("shop", "client", 1).image("meshprobe", &["pause"]).yaml(),
        yaml::pod("shop", "keyless", 1).image("meshprobe", &["pause"]).yaml(),
        echo("web-v1", 1),
        echo("web-v2", 2),
        service("web", "part-of: web"),
        service("web-v1", "app: web-v1"),
        service("web-v2", "app: web-v2"),
    ];
    Ok(Plan::new()
        .image("echo-basic", programs::ours("echo-basic")?)
        .file("00-shop.yaml", yaml::namespace("shop", true))
        .file("shop.yaml", yaml::join(&objects)))
}

/// An HTTPRoute that sends this share of `web` to each version.
fn split(v1: u32, v2: u32) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: web, namespace: shop}}\n\
         spec:\n  parentRefs: [{{group: '', kind: Service, name: web, port: 80}}]\n  rules:\n  - backendRefs:\n    - {{name: web-v1, \
         port: 80, weight: {v1}}}\n    - {{name: web-v2, port: 80, weight: {v2}}}\n"
    )
}

/// The pod that answers a request for a path.
fn ask(lab: &Lab, path: &str) -> Result<String> {
    let url = format!("http://web{path}");
    let ran = lab.exec("shop/client", &["curl", "-sS", "--fail", "--max-time", "5", &url])?;
    let answer: serde_json::Value = serde_json::from_str(ran.ok()?)?;
    answer["pod"].as_str().map(str::to_owned).with_context(|| format!("no pod in {answer}"))
}

fn life(lab: &Lab) -> Result<()> {
    ask(lab, "/before")?;
    let applied = ["apply", "-n", "shop", "--enroll-namespace", "--wait", "--timeout", "45"];
    let ran = lab.waypoint(&applied, APPLY)?;
    let said = ran.ok()?;
    for words in ["shop/waypoint applied", "labelled istio.io/use-waypoint: waypoint", "is ready"] {
        ensure!(said.contains(words), "{said}");
    }
    let namespace = std::fs::read_to_string(lab.folder().join("00-shop.yaml"))?;
    ensure!(namespace.contains("istio.io/use-waypoint"), "{namespace}");

    // What the client sends to the Service passes the waypoint.
    ask(lab, "/through-the-waypoint")?;
    let log = || Ok::<_, anyhow::Error>(lab.meshctl(&["local", "logs", "shop/waypoint"])?.out);
    lab.until("the request in the waypoint's access log", || {
        Ok(log()?.contains("/through-the-waypoint"))
    })?;
    ensure!(!log()?.contains("/before"), "it was direct before");

    // Routes split, and move traffic when they are edited.
    for (v1, v2, only) in [(1, 0, Some("web-v1")), (0, 1, Some("web-v2")), (1, 1, None)] {
        lab.write("route.yaml", &split(v1, v2))?;
        lab.until("the route to be in force", || match only {
            Some(only) => (0..5).try_fold(true, |all, _| Ok(all && ask(lab, "/split")? == only)),
            None => Ok(true),
        })?;
        let answers = (0..REQUESTS).map(|_| ask(lab, "/split")).collect::<Result<Vec<_>>>()?;
        let first = answers.iter().filter(|a| *a == "web-v1").count();
        match only {
            Some(only) => ensure!(answers.iter().all(|a| a == only), "{v1}:{v2} {answers:?}"),
            // 8 of 40 or fewer, for one half: once in 30,000 runs.
            None => ensure!((8..=32).contains(&first), "{first} of {REQUESTS}"),
        }
    }
    let list = lab.waypoint(&["list", "-n", "shop", "-o", "json"], APPLY)?;
    let list: serde_json::Value = serde_json::from_str(list.ok()?)?;
    ensure!(list[0]["services"].as_array().is_some_and(|s| s.len() == 3), "{list}");

    // Taken away: everything is direct again, at once and without a failure.
    lab.remove("route.yaml")?;
    lab.waypoint(&["delete", "-n", "shop", "waypoint"], APPLY)?.ok()?;
    lab.until("the waypoint to be gone", || {
        let status = lab.status()?;
        let gone = !status.pods.iter().any(|p| p.name.starts_with("waypoint-"));
        Ok(gone && status.service("shop/waypoint").is_none())
    })?;
    ask(lab, "/after")?;
    let namespace = std::fs::read_to_string(lab.folder().join("00-shop.yaml"))?;
    ensure!(!namespace.contains("use-waypoint"), "{namespace}");
    Ok(())
}

/// A Gateway that nothing can serve: `--wait` ends with the reason, and nothing is harmed.
fn broken(lab: &Lab) -> Result<()> {
    lab.write("other.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: taken, namespace: shop}\nspec: {selector: {app: web-v1}, ports: [{port: 80}]}\n")?;
    let apply = ["apply", "-n", "shop", "--name", "taken", "--wait", "--timeout", "3"];
    let ran = lab.waypoint(&apply, APPLY)?;
    let said = ran.failed()?.err.clone();
    ensure!(said.contains("not ready after 3 s") && said.contains("Service/shop/taken"), "{said}");
    let status = lab.waypoint(&["status", "-n", "shop", "taken"], APPLY)?;
    ensure!(!status.is_ok() && status.out.contains("Invalid"), "{status:?}");
    // What somebody else wrote stays.
    let again = ["apply", "-n", "shop", "--name", "web", "--out", "other.yaml"];
    let refused = lab.waypoint(&again, APPLY)?.failed()?.err.clone();
    ensure!(refused.contains("choose another file"), "{refused}");
    ask(lab, "/unharmed")?;
    Ok(())
}

/// Without a waypoint a route does nothing, and everybody who looks is told what to do.
fn unseen(lab: &Lab) -> Result<()> {
    lab.write("route.yaml", &split(0, 1))?;
    let words = "Service shop/web goes through no waypoint";
    let said = |status: &e2e::status::Status| {
        status.diagnostics.iter().find(|d| d.contains(words)).cloned()
    };
    lab.until("the finding", || Ok(said(&lab.status()?).is_some()))?;
    let finding = said(&lab.status()?).context("the finding is gone")?;
    for word in ["route.yaml:", "HTTPRoute/shop/web", "l7_without_waypoint"] {
        ensure!(finding.contains(word), "{word} in {finding}");
    }
    let advice = finding.split_once("(meshctl ").and_then(|(_, rest)| rest.split_once(')'));
    let (advice, _) = advice.with_context(|| format!("no advice in {finding}"))?;
    lab.until("the word of it", || Ok(lab.said().contains(words)))?;
    ensure!(routes_say(lab, "NoWaypoint")?, "the condition of the route");

    // What it advises helps.
    let mut argv: Vec<&str> = advice.split(' ').skip(1).collect();
    argv.extend(["--wait", "--timeout", "45"]);
    lab.waypoint(&argv, APPLY)?.ok()?;
    lab.until("the finding to be gone", || Ok(said(&lab.status()?).is_none()))?;
    lab.until("the route to act", || {
        (0..5).try_fold(true, |all, _| Ok(all && ask(lab, "/seen")? == "web-v2"))
    })?;
    ensure!(routes_say(lab, "\"reason\": \"ResolvedWaypoints\"")?, "the condition is good");
    lab.remove("route.yaml")?;
    lab.waypoint(&["delete", "-n", "shop", "waypoint"], APPLY)?.ok()?;
    lab.until("everything to be direct", || Ok(lab.status()?.service("shop/waypoint").is_none()))?;
    Ok(())
}

/// Whether the control plane's page of routes has these words.
fn routes_say(lab: &Lab, words: &str) -> Result<bool> {
    let url = "http://10.89.0.1:15014/debug/routes";
    let page = lab.exec("node-1", &["curl", "-sS", "--fail", "--max-time", "5", url])?;
    Ok(page.ok()?.contains(words))
}

const KEYED: &str = "apiVersion: v1
kind: ServiceAccount
metadata: {name: keyed, namespace: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: keyed, namespace: shop, labels: {istio.io/dataplane-mode: none}}
spec:
  nodeName: node-2
  serviceAccountName: keyed
  terminationGracePeriodSeconds: 1
  securityContext: {runAsUser: 1337, runAsGroup: 1337}
  containers:
  - name: main
    image: meshprobe
    args: [pause]
    volumeMounts:
    - {name: token, mountPath: /var/run/secrets/tokens}
    - {name: root, mountPath: /var/run/secrets/istio}
  volumes:
  - name: token
    projected: {sources: [{serviceAccountToken: {audience: istio-ca, path: istio-token}}]}
  - {name: root, configMap: {name: istio-ca-root-cert}}
";

/// A pod's token is its own, opens the control plane for it alone, and ends with it.
fn tokens(lab: &Lab) -> Result<()> {
    lab.write("keyed.yaml", KEYED)?;
    lab.until("the pod with a token", || {
        Ok(lab.status()?.pod("shop/keyed").is_some_and(|p| p.ready))
    })?;
    let cat = |file: &str| -> Result<String> {
        let path = format!("/var/run/secrets/{file}");
        Ok(lab.exec("shop/keyed", &["cat", &path])?.ok()?.to_owned())
    };
    let token = cat("tokens/istio-token")?;
    ensure!(token.len() == 64, "{token:?}");
    ensure!(cat("istio/root-cert.pem")?.contains("BEGIN CERTIFICATE"), "no root");
    let write = ["sh", "-c", "echo x > /var/run/secrets/tokens/istio-token"];
    ensure!(!lab.exec("shop/keyed", &write)?.is_ok(), "the pod can change its token");
    // One empty message: who may ask is told that it has no CSR in it, all others that they may not.
    let call = |from: &str, token: &str| {
        let header = format!("authorization: Bearer {token}");
        let url = "https://10.89.0.1:15012/istio.v1.auth.IstioCertificateService/CreateCertificate";
        let mut argv =
            vec!["curl", "-sS", "--http2", "--max-time", "3", "-D", "-", "-X", "POST", url];
        for header in ["content-type: application/grpc", "te: trailers", &header] {
            argv.extend(["-H", header]);
        }
        argv.extend(["--data-binary", "@-"]);
        match from {
            "shop/keyed" => argv.extend(["--cacert", "/var/run/secrets/istio/root-cert.pem"]),
            _ => argv.push("-k"),
        }
        lab.exec_with(from, &argv, "\0\0\0\0\0", SOON)
    };
    let status = |from: &str, token: &str| -> Result<String> {
        let text = call(from, token)?.ok()?.to_ascii_lowercase();
        let line = text.lines().find_map(|l| l.strip_prefix("grpc-status: ").map(str::to_owned));
        line.with_context(|| text.clone())
    };
    ensure!(status("shop/keyed", &token)? == "3", "its own token, and no CSR");
    ensure!(status("shop/keyed", "guess")? == "16", "another token");
    // Of the control plane it reaches that port alone; who has no token does not even reach that.
    let page = ["curl", "-sS", "--max-time", "2", "http://10.89.0.1:15014/debug/config"];
    ensure!(!lab.exec("shop/keyed", &page)?.is_ok(), "the page of operators");
    call("shop/keyless", &token)?.failed()?;
    // Another pod of the name has another token, and the one before is worthless.
    lab.remove("keyed.yaml")?;
    lab.until("the pod to be gone", || Ok(lab.status()?.pod("shop/keyed").is_none()))?;
    ensure!(status("node-1", &token)? == "16", "the token of a pod that is gone");
    lab.write("keyed.yaml", KEYED)?;
    lab.until("the pod with a token", || {
        Ok(lab.status()?.pod("shop/keyed").is_some_and(|p| p.ready))
    })?;
    let newer = cat("tokens/istio-token")?;
    ensure!(newer != token, "a token is used again");
    ensure!(
        status("shop/keyed", &newer)? == "3" && status("shop/keyed", &token)? == "16",
        "which counts?"
    );
    // A control plane that starts anew knows it; nobody tells the pod.
    lab.meshctl(&["local", "restart", "istiod-lite"])?.ok()?;
    lab.until("the token to count again", || Ok(status("shop/keyed", &newer)? == "3"))?;
    // It stands in no log and no argument.
    for process in [("istiod-lite", None), ("ztunnel", Some("node-2"))] {
        ensure!(!lab.process_log(process.0, process.1)?.contains(&newer), "{process:?}");
    }
    let seen = lab.exec(
        "node-2",
        &["sh", "-c", "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null"],
    )?;
    ensure!(!seen.out.contains(&newer), "in the arguments or the environment of a process");
    Ok(())
}
