//! The mesh's own processes are replaced, killed and stopped under load: what fails, and for how long?

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use e2e::suite::{self, Test};
use e2e::{Background, Lab, Plan, wait_until, yaml};
use nix::sys::signal::Signal;
use serde_json::Value;

const TESTS: &[(&str, Test)] = &[
    ("replaced_under_load_nothing_fails", replaced),
    ("old_connections_end_at_the_limit", limit),
    ("policy_still_ends_old_connections", judged),
    ("a_killed_proxy_makes_new_connections_wait", killed),
    ("without_the_control_plane_everything_goes_on", control_plane_away),
    ("what_cannot_be_replaced_goes_on", refused),
];
const SOON: Duration = Duration::from_secs(20);
/// How long a ztunnel that was replaced keeps its connections: longer than the loads last.
const DRAIN: u64 = 13;
/// How long new connections may stand still while a ztunnel is replaced. The promise is 100 ms on a machine that has
/// time; this is for one that builds something else meanwhile, where 560 ms were seen.
const GAP: f64 = 2_000.0;
/// The same for one that was killed: the start of the next is part of it.
const GAP_KILLED: f64 = 3_000.0;

fn main() -> ExitCode {
    suite::run(plan, TESTS)
}

fn plan() -> Result<Plan> {
    let objects = [
        yaml::namespace("app", true),
        yaml::pod("app", "client", 1).image("meshprobe", &["pause"]).yaml(),
        yaml::pod("app", "load", 1).image("meshload", &["pause"]).yaml(),
        yaml::pod("app", "server", 2)
            .image("meshload", &["all", "--listen", "[::]:8080"])
            .ready_on(8080)
            .yaml(),
        yaml::service("app", "server", "server", &[("http", 80, "8080"), ("echo", 7, "8082")]),
    ];
    Ok(Plan::new().file("app.yaml", yaml::join(&objects)).drain_seconds(DRAIN))
}

/// Requests on kept connections and on new ones, and questions, while something happens.
struct Loads {
    kept: Background,
    new: Background,
    dns: Background,
}

impl Loads {
    fn start(lab: &Lab, seconds: u32) -> Result<Self> {
        let (seconds, to) =
            (seconds.to_string(), format!("{}:8080", lab.pod_ip("app/server", false)?));
        let kept = ["closed", "-n", "4", "-d", &seconds, "--to", &to];
        let new = ["connect", "-n", "4", "-d", &seconds, "--closing", "reset", "--to", &to];
        let dns = ["dns", "-n", "2", "-d", &seconds, "--to", "10.96.0.10:53", "server.app"];
        Ok(Self { kept: start(lab, &kept)?, new: start(lab, &new)?, dns: start(lab, &dns)? })
    }

    /// Waits for their end. The results: of the kept connections, of the new ones, and of the questions.
    fn results(mut self) -> Result<[Value; 3]> {
        Ok([result(&mut self.kept)?, result(&mut self.new)?, result(&mut self.dns)?])
    }

    /// The same; nothing may have failed. Milliseconds without a new connection.
    fn all_well(self) -> Result<f64> {
        let [kept, new, dns] = self.results()?;
        for (result, count) in [(&kept, "requests"), (&new, "connections"), (&dns, "questions")] {
            let done = result[count].as_u64().or_else(|| result["latency"]["count"].as_u64());
            ensure!(errors(result) == 0 && done > Some(0), "{result}");
        }
        gap(&new)
    }
}

fn start(lab: &Lab, args: &[&str]) -> Result<Background> {
    let argv: Vec<&str> = std::iter::once("/image/meshload").chain(args.iter().copied()).collect();
    lab.exec_in_background("app/load", &argv)
}

fn result(load: &mut Background) -> Result<Value> {
    wait_until("the load to end", Duration::from_secs(40), || Ok(!load.is_running()?))?;
    let out = load.out();
    let line = out.lines().last().with_context(|| format!("no result: {}", load.err()))?;
    Ok(serde_json::from_str(line)?)
}

fn errors(result: &Value) -> u64 {
    let of_kinds = result["errors"].as_object().into_iter().flatten();
    of_kinds.filter_map(|(_, count)| count.as_u64()).sum()
}

fn gap(result: &Value) -> Result<f64> {
    result["gap_ms"].as_f64().with_context(|| format!("no gap: {result}"))
}

/// Replaces the ztunnel of a node. The processes before and after.
fn replace(lab: &Lab, node: &str) -> Result<(i64, i64)> {
    let ran = lab.meshctl(&["local", "restart", "ztunnel", "--node", node, "-o", "json"])?;
    let done: Value = serde_json::from_str(ran.ok()?)?;
    match (done[0]["old"].as_i64(), done[0]["new"].as_i64()) {
        (Some(old), Some(new)) if old != new => Ok((old, new)),
        _ => bail!("not replaced: {done}"),
    }
}

fn replaced(lab: &Lab) -> Result<()> {
    let mut held = lab.hold("app/client", "server:7")?;
    let loads = Loads::start(lab, 10)?;
    for node in ["node-1", "node-2", "node-1", "node-2"] {
        let (_, new) = replace(lab, node)?;
        ensure!(lab.process_id("ztunnel", Some(node))? == i32::try_from(new)?);
        // In the words of the table, too.
        lab.meshctl(&["local", "status"])?.ok()?;
    }
    ensure!(held.is_running()?, "an old connection ended: {} {}", held.out(), held.err());
    let gap = loads.all_well()?;
    suite::measured(&format!("at most {gap:.0} ms without a new connection"));
    ensure!(gap < GAP, "{gap} ms without a new connection");
    // The pages answer for the one that serves.
    let ready = ["curl", "-sS", "--fail", "http://127.0.0.1:15021/healthz/ready"];
    lab.exec("node-1", &ready)?.ok()?;
    drop(held);
    Ok(())
}

fn limit(lab: &Lab) -> Result<()> {
    let mut held = lab.hold("app/client", "server:7")?;
    let before = lab.access_log("node-1")?.len();
    let (old, _) = replace(lab, "node-1")?;
    let drains = || {
        let ran = lab.exec("node-1", &["kill", "-0", &old.to_string()])?;
        Ok::<_, anyhow::Error>(ran.is_ok())
    };
    ensure!(drains()? && held.is_running()?, "{} {}", held.out(), held.err());
    wait_until("the end of the old connection", SOON, || Ok(!held.is_running()?))?;
    let line = [("direction", "outbound"), ("reason", "draining")];
    lab.wait_for_access("node-1", before, &line)?;
    wait_until("the end of the old process", SOON, || Ok(!drains()?))?;
    ensure!(held.out().contains("reset"), "{}", held.out());
    Ok(())
}

fn judged(lab: &Lab) -> Result<()> {
    let mut held = lab.hold("app/client", "server:7")?;
    let before = lab.access_log("node-2")?.len();
    replace(lab, "node-2")?;
    ensure!(held.is_running()?, "{} {}", held.out(), held.err());
    let deny = "[{from: [{source: {namespaces: [app]}}]}]";
    lab.write("deny.yaml", &yaml::policy("app", "deny", "server", "DENY", deny))?;
    wait_until("the end of the old connection", SOON, || Ok(!held.is_running()?))?;
    let line = [("direction", "inbound"), ("reason", "policy_changed")];
    lab.wait_for_access("node-2", before, &line)?;
    lab.remove("deny.yaml")?;
    lab.until("calls again", || calls(lab, "app/client", "http://server.app/"))?;
    Ok(())
}

fn killed(lab: &Lab) -> Result<()> {
    for node in ["node-1", "node-2"] {
        let loads = Loads::start(lab, 6)?;
        kill(lab, "ztunnel", node)?;
        let [_, new, _] = loads.results()?;
        let (gap, broken) = (gap(&new)?, errors(&new));
        let all = &new["connections"];
        suite::measured(&format!("{node}: {gap:.0} ms without one, {broken} of {all} broke"));
        ensure!(gap < GAP_KILLED, "{gap} ms without a new connection: {new}");
        // What was under way through the process that died, and at most that once more at the other end.
        ensure!(broken <= 8, "{new}");
    }
    Ok(())
}

/// `kill -9`, and the wait for another process in its place.
fn kill(lab: &Lab, name: &str, node: &str) -> Result<()> {
    let pid = lab.process_id(name, Some(node))?;
    let signal = format!("-{}", Signal::SIGKILL as i32);
    lab.exec("node-1", &["kill", &signal, &pid.to_string()])?.ok()?;
    wait_until("its successor", SOON, || {
        Ok(lab.process_id(name, Some(node)).is_ok_and(|new| new != pid))
    })?;
    Ok(())
}

fn calls(lab: &Lab, from: &str, url: &str) -> Result<bool> {
    let ran = lab.exec(from, &["curl", "-sS", "--fail", "--max-time", "8", url])?;
    Ok(ran.is_ok())
}

fn control_plane_away(lab: &Lab) -> Result<()> {
    let url = "http://server.app/";
    lab.meshctl(&["local", "stop", "istiod-lite"])?.ok()?;
    let state = lab.status()?.process("istiod-lite", None).context("no istiod-lite")?.state.clone();
    ensure!(state == "Stopped", "{state}");
    lab.meshctl(&["local", "stop", "istiod-lite"])?.failed_with(&["stopped already"])?;
    // Replaced: from disk, with the keys on tmpfs.
    let loads = Loads::start(lab, 5)?;
    for node in ["node-1", "node-2"] {
        replace(lab, node)?;
    }
    let gap = loads.all_well()?;
    suite::measured(&format!("at most {gap:.0} ms without a new connection"));
    ensure!(gap < GAP, "{gap} ms without a new connection");
    // Killed: the same.
    for node in ["node-1", "node-2"] {
        kill(lab, "ztunnel", node)?;
        ensure!(calls(lab, "app/client", url)?, "no call after the proxy of {node} was killed");
    }
    new_pods(lab, url)?;
    lab.meshctl(&["local", "start", "istiod-lite"])?.ok()?;
    lab.until("the new pods to be known", || calls(lab, "app/stranger", url))?;
    let late = format!("http://{}:8080/", lab.pod_ip("app/late", false)?);
    lab.until("the new pod to be called", || calls(lab, "app/client", &late))?;
    lab.remove("late.yaml")
}

/// Pods that the control plane has not heard of: one of an identity that has a certificate on its node, one of another.
fn new_pods(lab: &Lab, url: &str) -> Result<()> {
    let serve = ["serve", "--listen", "[::]:8080"];
    let late = yaml::pod("app", "late", 1).account("client").image("meshload", &serve).alone();
    let stranger = yaml::pod("app", "stranger", 1).image("meshprobe", &["pause"]).yaml();
    lab.write("late.yaml", &yaml::join(&[late, stranger]))?;
    lab.until("the new pods to run", || {
        let status = lab.status()?;
        let runs = |name| status.pod(name).is_some_and(|p| p.state == "Running" && p.captured);
        Ok(runs("app/late") && runs("app/stranger"))
    })?;
    let (inbound, outbound) = (lab.access_log("node-2")?.len(), lab.access_log("node-1")?.len());
    // The known identity calls, encrypted and under its own name.
    ensure!(calls(lab, "app/late", url)?, "the new pod of a known identity cannot call");
    let line = [
        ("direction", "inbound"),
        ("src.identity", "spiffe://cluster.local/ns/app/sa/client"),
        ("dst.identity", "spiffe://cluster.local/ns/app/sa/server"),
    ];
    lab.wait_for_access("node-2", inbound, &line)?;
    // Nobody has signed for the other.
    ensure!(!calls(lab, "app/stranger", url)?, "an identity without a certificate called");
    let line = [("direction", "outbound"), ("reason", "certificate_unavailable")];
    lab.wait_for_access("node-1", outbound, &line)?;
    // Which policies select the new pod is not known, so it is not called.
    let late = format!("http://{}:8080/", lab.pod_ip("app/late", false)?);
    ensure!(!calls(lab, "app/client", &late)?, "a pod was called without its policies");
    let line = [("direction", "inbound"), ("reason", "unknown_workload")];
    lab.wait_for_access("node-1", outbound, &line)?;
    Ok(())
}

fn refused(lab: &Lab) -> Result<()> {
    let restart = |args: &[&str]| lab.meshctl(&[&["local", "restart"], args].concat());
    restart(&["ztunnel", "--node", "node-9"])?.failed_with(&["ztunnel on node-9", "node-1"])?;
    ensure!(restart(&["waypoint"])?.code == 2, "a process that does not exist");
    lab.meshctl(&["local", "start", "ztunnel", "--node", "node-1"])?
        .failed_with(&["runs already"])?;
    // The control plane has nothing to hand over: it is ended and started, and nobody waits for it.
    let before = lab.process_id("istiod-lite", None)?;
    restart(&["istiod-lite"])?.ok()?;
    ensure!(
        lab.process_id("istiod-lite", None)? != before
            && calls(lab, "app/client", "http://server.app/")?
    );
    Ok(())
}
