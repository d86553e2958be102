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
    ("a_killed_proxy_makes_new_connections_wait", killed),
];
const SOON: Duration = Duration::from_secs(20);
/// How long a ztunnel that was replaced keeps its connections: longer than the loads last.
const DRAIN: u64 = 13;
/// How long new connections may stand still while a ztunnel is replaced. The promise is 100 ms on a machine that has
/// time; this is for one that builds something else meanwhile.
const GAP: f64 = 1_000.0;
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

/// Requests on kept connections and on new ones, while something happens.
struct Loads {
    kept: Background,
    new: Background,
}

impl Loads {
    fn start(lab: &Lab, seconds: u32) -> Result<Self> {
        let (seconds, to) =
            (seconds.to_string(), format!("{}:8080", lab.pod_ip("app/server", false)?));
        let kept = ["closed", "-n", "4", "-d", &seconds, "--to", &to];
        let new = ["connect", "-n", "4", "-d", &seconds, "--closing", "reset", "--to", &to];
        Ok(Self { kept: start(lab, &kept)?, new: start(lab, &new)? })
    }

    /// Waits for their end. The results: of the kept connections, and of the new ones.
    fn results(mut self) -> Result<(Value, Value)> {
        Ok((result(&mut self.kept)?, result(&mut self.new)?))
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

fn no_errors(result: &Value, count: &str) -> Result<()> {
    ensure!(errors(result) == 0 && result[count].as_u64() > Some(0), "{result}");
    Ok(())
}

fn gap(result: &Value) -> Result<f64> {
    result["gap_ms"].as_f64().with_context(|| format!("no gap: {result}"))
}

fn hold(lab: &Lab) -> Result<Background> {
    let mut held =
        lab.exec_in_background("app/client", &["/image/meshprobe", "hold", "server:7"])?;
    wait_until("the held connection", SOON, || {
        ensure!(held.is_running()?, "it ended: {} {}", held.out(), held.err());
        Ok(held.out().contains("open"))
    })?;
    Ok(held)
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
    let mut held = hold(lab)?;
    let loads = Loads::start(lab, 10)?;
    for node in ["node-1", "node-2", "node-1", "node-2"] {
        let (_, new) = replace(lab, node)?;
        ensure!(lab.process_id("ztunnel", Some(node))? == i32::try_from(new)?);
        // In the words of the table, too.
        lab.meshctl(&["local", "status"])?.ok()?;
    }
    ensure!(held.is_running()?, "an old connection ended: {} {}", held.out(), held.err());
    let (kept, new) = loads.results()?;
    no_errors(&kept, "requests")?;
    no_errors(&new, "connections")?;
    let gap = gap(&new)?;
    println!("four replacements: {gap:.0} ms without a new connection, {}", new["latency"]);
    ensure!(gap < GAP, "{gap} ms without a new connection: {new}");
    drop(held);
    Ok(())
}

fn limit(lab: &Lab) -> Result<()> {
    let mut held = hold(lab)?;
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

fn killed(lab: &Lab) -> Result<()> {
    for node in ["node-1", "node-2"] {
        let loads = Loads::start(lab, 6)?;
        let pid = lab.process_id("ztunnel", Some(node))?;
        lab.exec("node-1", &["kill", &format!("-{}", Signal::SIGKILL as i32), &pid.to_string()])?
            .ok()?;
        wait_until("its successor", SOON, || {
            Ok(lab.process_id("ztunnel", Some(node)).is_ok_and(|new| new != pid))
        })?;
        let (_, new) = loads.results()?;
        let (gap, broken) = (gap(&new)?, errors(&new));
        println!(
            "ztunnel of {node} killed: {gap:.0} ms without a new connection, {broken} of {} broke",
            new["connections"]
        );
        ensure!(gap < GAP_KILLED, "{gap} ms without a new connection: {new}");
        // What was under way through the process that died, and at most that once more at the other end.
        ensure!(broken <= 8, "{new}");
    }
    Ok(())
}
