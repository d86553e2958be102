//! A namespace's label comes and goes under load, and rules that somebody changed by hand come back.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::suite::{self, Test};
use e2e::{Background, Lab, Plan, programs, wait_until, yaml};
use serde_json::Value;

const TESTS: &[(&str, Test)] =
    &[("flips_under_load_fail_no_request", flips), ("rules_removed_by_hand_come_back", repair)];
const SOON: Duration = Duration::from_secs(20);
/// Repair is promised within two seconds; the rest is for a machine under load.
const REPAIRED: Duration = Duration::from_secs(5);
/// Each way counts. A thousand take a quarter of an hour: `AMBIT_FLIPS=1000`.
const FLIPS: usize = 12;

fn main() -> ExitCode {
    suite::run(plan, TESTS)
}

fn plan() -> Result<Plan> {
    let objects = [
        yaml::pod("app", "client", 1).image("meshprobe", &["pause"]).yaml(),
        yaml::pod("app", "load", 1).image("meshload", &["pause"]).yaml(),
        yaml::pod("app", "server", 2)
            .image("meshload", &["all", "--listen", "[::]:8080"])
            .ready_on(8080)
            .yaml(),
        yaml::service("app", "server", "server", &[("http", 80, "8080"), ("echo", 7, "8082")]),
    ];
    Ok(Plan::new()
        .file("00-app.yaml", yaml::namespace("app", true))
        .file("app.yaml", yaml::join(&objects)))
}

fn label(lab: &Lab, ambient: bool) -> Result<()> {
    lab.write("00-app.yaml", &yaml::namespace("app", ambient))?;
    lab.until("the pods' capture to change", || {
        Ok(lab.status()?.pods.iter().all(|p| p.captured == ambient && p.ready))
    })?;
    Ok(())
}

fn start(lab: &Lab, args: &[&str]) -> Result<Background> {
    let argv: Vec<&str> = std::iter::once("/image/meshload").chain(args.iter().copied()).collect();
    lab.exec_in_background("app/load", &argv)
}

/// Ends a load that still runs, and reads the line with its result.
fn result(load: &mut Background) -> Result<Value> {
    wait_until("the load to end", SOON, || Ok(!load.is_running()?))?;
    let out = load.out();
    let line = out.lines().last().with_context(|| format!("no result: {}", load.err()))?;
    Ok(serde_json::from_str(line)?)
}

fn flips(lab: &Lab) -> Result<()> {
    let flips = match std::env::var("AMBIT_FLIPS") {
        Ok(many) => many.parse().context("AMBIT_FLIPS is not a number")?,
        Err(_) => FLIPS,
    };
    // One connection that lives over everything, and requests on kept and on new connections all the time.
    let mut held =
        lab.exec_in_background("app/client", &["/image/meshprobe", "hold", "server:7"])?;
    wait_until("the held connection", SOON, || Ok(held.out().contains("open")))?;
    let to = format!("{}:8080", lab.pod_ip("app/server", false)?);
    for flip in 0..flips {
        let mut kept = start(lab, &["closed", "-n", "2", "-d", "3", "--to", &to])?;
        let new = ["connect", "-n", "2", "-d", "3", "--closing", "reset", "--to", &to];
        let mut new = start(lab, &new)?;
        label(lab, flip % 2 == 1)?;
        for (load, count) in [(&mut kept, "requests"), (&mut new, "connections")] {
            let result = result(load)?;
            let errors = result["errors"].as_object().is_none_or(|e| !e.is_empty());
            ensure!(!errors && result[count].as_u64() > Some(0), "flip {flip}: {result}");
        }
        ensure!(held.is_running()?, "flip {flip}: {} {}", held.out(), held.err());
    }
    label(lab, true)?;
    let before = lab.access_log("node-2")?.len();
    lab.exec("app/client", &["curl", "-sS", "--fail", "--max-time", "5", "http://server/"])?
        .ok()?;
    let line =
        [("direction", "inbound"), ("src.identity", "spiffe://cluster.local/ns/app/sa/client")];
    lab.wait_for_access("node-2", before, &line)?;
    Ok(())
}

fn repair(lab: &Lab) -> Result<()> {
    let found = lab.exec("node-1", &["pgrep", "-f", "meshprobe pause"])?.out;
    let pid = found.lines().last().context("the pod has no process")?.to_owned();
    // An ordinary user has no sbin on the path.
    let program = programs::path_of("nft")?;
    let nft = |args: &[&str]| {
        let enter = ["nsenter", "--net", "-t", &pid, &program];
        let argv: Vec<&str> = enter.iter().chain(args).copied().collect();
        lab.exec("node-1", &argv)
    };
    let whole = || {
        let rules = nft(&["list", "table", "inet", "ambit"])?.out;
        let parts =
            ["every other connection goes to the proxy", "tproxy to :15001", "tproxy to :15006"];
        Ok::<_, anyhow::Error>(parts.iter().all(|part| rules.contains(part)))
    };
    wait_until("the rules", SOON, whole)?;
    for damage in [&["flush", "ruleset"][..], &["flush", "chain", "inet", "ambit", "output"]] {
        // The word is what shows that there was damage: the repair may be faster than a look at the rules.
        let words = || lab.said().matches("somebody changed its capture").count();
        let before = words();
        nft(damage)?.ok()?;
        wait_until("the word about it", REPAIRED, || Ok(words() > before))?;
        wait_until("the rules to be back", REPAIRED, whole)?;
    }
    Ok(())
}
