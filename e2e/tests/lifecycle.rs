//! Beginnings and ends: labels live, processes killed, Deployments scaled and rolled, labs side by side, and nothing left
//! behind.

use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::suite::{self, Alone};
use e2e::{Lab, Plan, command, programs, wait_until, yaml};
use nix::sys::signal::Signal;

const SOON: Duration = Duration::from_secs(20);
/// From the death of a proxy to the first new connection through its successor.
const PROXY_BACK: Duration = Duration::from_secs(5);

const TESTS: &[(&str, Alone)] = &[
    ("the_mesh_heals", the_mesh_heals),
    ("deployments_scale_and_roll", deployments),
    ("ctrl_c_leaves_nothing", ctrl_c),
    ("a_killed_front_takes_everything_along", killed_front),
    ("two_labs_at_once", two_labs),
    ("a_folder_that_is_not_there", no_folder),
];

fn main() -> ExitCode {
    suite::run_alone(TESTS)
}

fn small() -> Plan {
    let objects = [
        yaml::namespace("app", true),
        yaml::pod("app", "client", 1).image("meshprobe", &["pause"]).yaml(),
        yaml::pod("app", "server", 2)
            .image("meshload", &["all", "--listen", "[::]:8080"])
            .ready_on(8080)
            .yaml(),
        yaml::service("app", "server", "server", &[("http", 80, "8080"), ("echo", 7, "8082")]),
    ];
    Plan::new().file("app.yaml", yaml::join(&objects))
}

fn works(lab: &Lab) -> Result<bool> {
    Ok(lab
        .exec("app/client", &["curl", "-sS", "--fail", "--max-time", "2", "http://server/"])?
        .is_ok())
}

/// Kills a process of the mesh, and waits until another has its place.
fn kill(lab: &Lab, name: &str, node: Option<&str>) -> Result<Instant> {
    let pid = lab.process_id(name, node)?;
    let at = Instant::now();
    lab.exec("node-1", &["kill", "-9", &pid.to_string()])?.ok()?;
    wait_until("its successor", SOON, || {
        Ok(lab.process_id(name, node).is_ok_and(|new| new != pid))
    })?;
    Ok(at)
}

fn the_mesh_heals() -> Result<()> {
    let lab = small().up()?;
    ensure!(works(&lab)?);
    // The control plane dies: nobody notices.
    let mut held = lab.hold("app/client", "server:7")?;
    kill(&lab, "istiod-lite", None)?;
    for _ in 0..20 {
        ensure!(works(&lab)?, "a new connection failed while the control plane was away");
    }
    ensure!(held.is_running()?, "{}", held.out());
    // Changes arrive again, from its successor.
    lab.write(
        "policy.yaml",
        &yaml::policy("app", "deny", "server", "DENY", "[{from: [{source: {namespaces: [app]}}]}]"),
    )?;
    lab.until("the policy of the new control plane", || Ok(!works(&lab)?))?;
    lab.remove("policy.yaml")?;
    lab.until("its removal", || works(&lab))?;
    drop(held);
    // A proxy dies: its connections end, and new ones work soon.
    for node in ["node-1", "node-2"] {
        let mut held = lab.hold("app/client", "server:7")?;
        let before = lab.access_log("node-2")?.len();
        let died = kill(&lab, "ztunnel", Some(node))?;
        wait_until("the held connection to end", SOON, || Ok(!held.is_running()?))?;
        wait_until("new connections", SOON, || works(&lab))?;
        let gap = died.elapsed();
        ensure!(gap < PROXY_BACK, "{node}: {gap:?} without new connections");
        // Not in the clear, neither meanwhile nor now.
        let line =
            [("direction", "inbound"), ("src.identity", "spiffe://cluster.local/ns/app/sa/client")];
        lab.wait_for_access("node-2", if node == "node-2" { 0 } else { before }, &line)?;
    }
    // A pod dies: it is started again.
    lab.exec("app/server", &["sh", "-c", "kill -9 $(pidof meshload)"])?;
    lab.until("the restarted pod", || Ok(lab.pod("app/server")?.restarts > 0 && works(&lab)?))?;
    lab.down()
}

fn deployment(replicas: u32, version: &str) -> String {
    let deployment = format!(
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: shop, namespace: app}}\nspec:\n  replicas: {replicas}\n  \
         selector: {{matchLabels: {{app: shop}}}}\n  template:\n    metadata: {{labels: {{app: shop}}}}\n    spec:\n      \
         terminationGracePeriodSeconds: 2\n      containers:\n        - name: main\n          image: meshload\n          \
         args: [serve, --listen, '[::]:8080']\n          env: [{{name: VERSION, value: '{version}'}}]\n          \
         readinessProbe: {{tcpSocket: {{port: 8080}}, periodSeconds: 1}}\n"
    );
    yaml::join(&[deployment, yaml::service("app", "shop", "shop", &[("http", 80, "8080")])])
}

fn deployments() -> Result<()> {
    let lab = small().file("shop.yaml", deployment(2, "one")).up()?;
    let pods = |lab: &Lab| -> Result<Vec<String>> {
        let status = lab.status()?;
        let of = status
            .pods
            .iter()
            .filter(|p| p.name.starts_with("shop-") && p.ready && p.state == "Running");
        Ok(of.map(|p| p.name.clone()).collect())
    };
    let endpoints = |lab: &Lab| {
        Ok::<_, anyhow::Error>(lab.status()?.service("app/shop").map_or(0, |s| s.endpoints.len()))
    };
    let settle = |want: usize| {
        lab.until("the replicas", || Ok(pods(&lab)?.len() == want && endpoints(&lab)? == want))
    };
    settle(2)?;
    let nodes: std::collections::BTreeSet<_> = lab
        .status()?
        .pods
        .iter()
        .filter(|p| p.name.starts_with("shop-"))
        .map(|p| p.node.clone())
        .collect();
    ensure!(nodes.len() == 2, "two replicas are on {nodes:?}");
    lab.write("shop.yaml", &deployment(4, "one"))?;
    settle(4)?;
    lab.write("shop.yaml", &deployment(2, "one"))?;
    settle(2)?;
    // Rolled while somebody calls: every call is answered.
    let old = pods(&lab)?;
    lab.write("shop.yaml", &deployment(2, "two"))?;
    let mut calls = 0;
    lab.until("the roll to be over", || {
        let ran =
            lab.exec("app/client", &["curl", "-sS", "--fail", "--max-time", "5", "http://shop/"])?;
        calls += 1;
        if !ran.is_ok() {
            // No patience for this one: it is what the test is about.
            panic!("call {calls} failed during the roll: {ran:?}");
        }
        let now = pods(&lab)?;
        Ok(now.len() == 2 && now.iter().all(|p| !old.contains(p)))
    })?;
    lab.remove("shop.yaml")?;
    lab.until("the pods to be gone", || {
        Ok(!lab.status()?.pods.iter().any(|p| p.name.starts_with("shop-")))
    })?;
    lab.down()
}

fn ctrl_c() -> Result<()> {
    let lab = small().up()?;
    let belongings = lab.belongings()?;
    ensure!(belongings.check_gone().is_err(), "the check must see a lab that runs");
    lab.signal_front(Signal::SIGINT)?;
    lab.wait_for_end(&belongings)?;
    Ok(())
}

fn killed_front() -> Result<()> {
    let mut lab = small().up()?;
    let (name, belongings) = (lab.name.clone(), lab.belongings()?);
    ensure!(belongings.check_ended().is_err(), "a lab that runs counts as ended");
    lab.kill_front()?;
    // Its folder stays until somebody uses the name again: nobody was left to remove it.
    wait_until("every process to be gone", SOON, || belongings.check_ended().map(|()| true))?;
    drop(lab);
    let again = small().named(&name).up()?;
    ensure!(works(&again)?);
    again.down()
}

fn two_labs() -> Result<()> {
    let first = small().up()?;
    let second = small().up()?;
    ensure!(first.name != second.name);
    // They have the same addresses and do not meet.
    ensure!(first.pod_ip("app/server", false)? == second.pod_ip("app/server", false)?);
    ensure!(works(&first)? && works(&second)?);
    let third = small().named(&first.name).up();
    let why = third.err().context("a second lab of the same name was started")?;
    ensure!(format!("{why:#}").contains("is running already"), "{why:#}");
    let meshctl = programs::ours("meshctl")?;
    let mut ask = Command::new(meshctl);
    ask.args(["local", "status"]);
    let ran = command::run(ask, "", SOON)?;
    ran.failed_with(&["--name", &first.name, &second.name])?;
    first.down()?;
    ensure!(works(&second)?, "the end of one lab hurt the other");
    second.down()
}

fn no_folder() -> Result<()> {
    let mut up = Command::new(programs::ours("meshctl")?);
    up.args(["local", "up", "/nowhere/at/all", "--name", "e2e-nowhere"]);
    command::run(up, "", SOON)?.failed_with(&["/nowhere/at/all"])
}
