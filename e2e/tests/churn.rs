//! Pods come and go under load: a roll of many backends fails no connection, an address that another pod takes over leads
//! to nobody else, and what a connection took is given back when it ends.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::status::Pod;
use e2e::suite::{self, Test};
use e2e::{Background, Lab, Plan, programs, wait_until, yaml};
use serde_json::Value;

const TESTS: &[(&str, Test)] = &[
    ("twenty_backends_roll_under_load", roll),
    ("a_deleted_pod_takes_its_connections_along", deleted),
    ("a_reused_address_is_another_pod", reused_address),
    ("descriptors_are_few_and_given_back", descriptors),
];
const SOON: Duration = Duration::from_secs(20);
/// A roll of twenty, five at a time, each with a second of farewell.
const ROLLED: Duration = Duration::from_secs(120);
const BACKENDS: usize = 20;
/// A node has 253 addresses for pods: the server has one, the tenant the last.
const CROWD: usize = 251;
/// Two hundred and fifty pods start or end on two busy cores.
const CROWDED: Duration = Duration::from_secs(90);
const IDLE: usize = 1000;

fn main() -> ExitCode {
    suite::run(plan, TESTS)
}

fn plan() -> Result<Plan> {
    programs::find("curl")?;
    let serve = ["all", "--listen", "[::]:8080"];
    let objects = [
        yaml::namespace("app", true),
        yaml::pod("app", "client", 1).image("meshprobe", &["pause"]).yaml(),
        yaml::pod("app", "load", 1).image("meshload", &["pause"]).yaml(),
        yaml::pod("app", "server", 2).image("meshload", &serve).ready_on(8080).yaml(),
        yaml::service("app", "server", "server", &[("http", 80, "8080"), ("echo", 7, "8082")]),
        yaml::service("app", "shop", "shop", &[("http", 80, "8080")]),
        yaml::service("app", "short", "short", &[("http", 80, "8080"), ("echo", 7, "8082")]),
    ];
    Ok(Plan::new().file("app.yaml", yaml::join(&objects)))
}

/// The farewell is what Kubernetes asks of every server that is rolled: endpoints go before the process does.
fn deployment(version: &str) -> String {
    format!(
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: shop, namespace: app}}\nspec:\n  replicas: {BACKENDS}\n  \
         selector: {{matchLabels: {{app: shop}}}}\n  template:\n    metadata: {{labels: {{app: shop}}}}\n    spec:\n      \
         terminationGracePeriodSeconds: 3\n      containers:\n        - name: main\n          image: meshload\n          \
         args: [serve, --listen, '[::]:8080']\n          env: [{{name: VERSION, value: '{version}'}}]\n          \
         lifecycle: {{preStop: {{sleep: {{seconds: 1}}}}}}\n          \
         readinessProbe: {{tcpSocket: {{port: 8080}}, periodSeconds: 1}}\n"
    )
}

fn backends(lab: &Lab) -> Result<Vec<String>> {
    let status = lab.status()?;
    let ready = status.pods.iter().filter(|p| p.name.starts_with("shop-") && p.ready);
    Ok(ready.filter(|p| p.state == "Running").map(|p| p.name.clone()).collect())
}

fn start(lab: &Lab, args: &[&str]) -> Result<Background> {
    let argv: Vec<&str> = std::iter::once("/image/meshload").chain(args.iter().copied()).collect();
    lab.exec_in_background("app/load", &argv)
}

/// The result of a load that has ended, which must have had no error.
fn flawless(load: &mut Background, count: &str) -> Result<u64> {
    wait_until("the load to end", SOON, || Ok(!load.is_running()?))?;
    let out = load.out();
    let line = out.lines().last().with_context(|| format!("no result: {}", load.err()))?;
    let result: Value = serde_json::from_str(line)?;
    let errors = result["errors"].as_object().is_none_or(|e| !e.is_empty());
    let done = result[count].as_u64().unwrap_or_default();
    ensure!(!errors && done > 0, "{result}");
    Ok(done)
}

fn roll(lab: &Lab) -> Result<()> {
    lab.write("shop.yaml", &deployment("one"))?;
    wait_until("the backends", ROLLED, || Ok(backends(lab)?.len() == BACKENDS))?;
    let old = backends(lab)?;
    lab.write("shop.yaml", &deployment("two"))?;
    let service = format!("{}:80", lab.service_ip("app/shop", false)?);
    // Each load is bounded; a new one starts until the roll is over, so that there is always one.
    let connect = ["connect", "-n", "4", "-d", "2", "--closing", "reset", "--to", &service];
    let mut connections = 0;
    let mut rolled = false;
    for _ in 0..ROLLED.as_secs() / 2 {
        let mut load = start(lab, &connect)?;
        rolled = rolled || {
            let now = backends(lab)?;
            now.len() == BACKENDS && now.iter().all(|p| !old.contains(p))
        };
        connections += flawless(&mut load, "connections")?;
        if rolled {
            break;
        }
    }
    ensure!(rolled, "the roll did not end: {:?}", backends(lab)?);
    ensure!(connections > 100, "only {connections} connections were made meanwhile");
    lab.remove("shop.yaml")?;
    lab.until("the backends to be gone", || {
        Ok(!lab.status()?.pods.iter().any(|p| p.name.starts_with("shop-")))
    })?;
    Ok(())
}

/// A pod on node-2 that answers on the Service `short`.
fn short(name: &str, account: &str) -> String {
    let serve = ["all", "--listen", "[::]:8080"];
    let pod = yaml::pod("app", name, 2)
        .app("short")
        .account(account)
        .image("meshload", &serve)
        .ready_on(8080)
        .yaml();
    yaml::join(&[yaml::service_account("app", account), pod])
}

/// Its address, once it is in the mesh under the identity.
fn short_lived(lab: &Lab, name: &str, account: &str) -> Result<String> {
    lab.write("short.yaml", &short(name, account))?;
    let (pod, account) = (format!("app/{name}"), format!("/sa/{account}"));
    // Its predecessor may still be ending, beside a crowd.
    wait_until("the pod in the mesh", SOON * 2, || {
        let ready =
            |p: Pod| p.ready && p.captured && p.identity.is_some_and(|i| i.ends_with(&account));
        Ok(lab.pod(&pod).is_ok_and(ready))
    })?;
    lab.pod_ip(&pod, false)
}

/// What is open to a pod ends with it: neither side waits for a peer that is gone.
fn deleted(lab: &Lab) -> Result<()> {
    let ip = short_lived(lab, "leaver", "leaver")?;
    let mut held = lab.hold("app/client", &format!("{ip}:8082"))?;
    let mut twin = lab.hold("app/client", "server:7")?;
    let (client_side, server_side) =
        (lab.access_log("node-1")?.len(), lab.access_log("node-2")?.len());
    lab.remove("short.yaml")?;
    lab.until("the connection to end", || Ok(!held.is_running()?))?;
    for (node, before) in [("node-1", client_side), ("node-2", server_side)] {
        lab.wait_for_access(node, before, &[("dst.workload", "leaver")])?;
    }
    ensure!(twin.is_running()?, "another pod's connection: {} {}", twin.out(), twin.err());
    twin.end()?;
    Ok(())
}

/// Another pod with another identity gets the address at once. A tunnel of the first must not lead there, nor must the
/// client's proxy expect the first one's identity.
fn reused_address(lab: &Lab) -> Result<()> {
    lab.write("crowd.yaml", &crowd())?;
    wait_until("the crowd", CROWDED, || {
        let status = lab.status()?;
        let here = |p: &&Pod| p.name.starts_with("crowd-") && p.state == "Running";
        Ok(status.pods.iter().filter(here).count() == CROWD)
    })?;
    let first = short_lived(lab, "tenant", "tenant-0")?;
    for round in 1..6 {
        // A connection keeps the tunnel to the one before alive until that one is gone.
        let mut held = lab.hold("app/client", &format!("{first}:8082"))?;
        let account = format!("tenant-{round}");
        let ip = short_lived(lab, "tenant", &account)?;
        ensure!(ip == first, "the address was not used again: the test shows nothing");
        let before = lab.access_log("node-2")?.len();
        let url = format!("http://{ip}:8080/who");
        lab.exec("app/client", &["curl", "-sS", "--fail", "--max-time", "5", &url])?.ok()?;
        let identity = format!("spiffe://cluster.local/ns/app/sa/{account}");
        let line = [("direction", "inbound"), ("dst.identity", identity.as_str())];
        lab.wait_for_access("node-2", before, &line)?;
        lab.until("the old connection to end", || Ok(!held.is_running()?))?;
    }
    lab.remove("short.yaml")?;
    lab.remove("crowd.yaml")?;
    wait_until("the crowd to go", CROWDED, || {
        Ok(!lab.status()?.pods.iter().any(|p| p.name.starts_with("crowd-")))
    })
    .map(drop)
}

/// Pods that take every address of node-2 but one. Addresses rotate, so otherwise one comes back after 253 pods.
fn crowd() -> String {
    let namespace = yaml::namespace("crowd", false);
    let deployment = format!(
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: crowd, namespace: crowd}}\nspec:\n  replicas: {CROWD}\n  \
         selector: {{matchLabels: {{app: crowd}}}}\n  template:\n    metadata: {{labels: {{app: crowd}}}}\n    spec:\n      \
         nodeName: node-2\n      terminationGracePeriodSeconds: 1\n      containers: [{{name: main, image: meshload, args: [pause]}}]\n"
    );
    yaml::join(&[namespace, deployment])
}

fn open_files(lab: &Lab, node: &str) -> Result<usize> {
    let pid = lab.process_id("ztunnel", Some(node))?;
    Ok(lab.exec(node, &["ls", &format!("/proc/{pid}/fd")])?.ok()?.lines().count())
}

fn descriptors(lab: &Lab) -> Result<()> {
    let nodes = ["node-1", "node-2"];
    let count = || nodes.iter().map(|n| open_files(lab, n)).collect::<Result<Vec<_>>>();
    let before = count()?;
    let to = format!("{}:8080", lab.pod_ip("app/server", false)?);
    let number = IDLE.to_string();
    let mut idle = start(lab, &["idle", "-n", &number, "-d", "4", "--to", &to])?;
    let mut most = before.clone();
    wait_until("the idle connections to end", SOON * 2, || {
        for (most, now) in most.iter_mut().zip(count()?) {
            *most = now.max(*most);
        }
        Ok(!idle.is_running()?)
    })?;
    for ((node, before), most) in nodes.iter().zip(&before).zip(&most) {
        let more = most.saturating_sub(*before);
        // A few tunnels of the tests before may have closed meanwhile.
        ensure!(more > IDLE * 9 / 10, "{node}: {more} more files: were the connections there?");
        // The promise is two for each; one, and a few tunnels, is what it takes.
        ensure!(more <= IDLE + 100, "{node}: {more} more files for {IDLE} connections");
    }
    let result = idle.out();
    ensure!(result.contains("\"errors\":{}"), "{result}");
    lab.until("the files to be given back", || {
        let now = count()?;
        ensure!(now.iter().zip(&before).all(|(n, b)| *n <= b + 50), "{now:?}, before: {before:?}");
        Ok(true)
    })?;
    Ok(())
}
