//! The story of `examples/canary`, as its user would tell it: the new version is deployed, first for who asks for it, then for
//! one request in ten, for half, for all, and back. Requests are counted at each step, and none may fail in all of it.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::suite::{self, Test};
use e2e::{Background, Lab, Plan, programs, wait_until, yaml};
use serde_json::Value;

const TESTS: &[(&str, Test)] = &[
    ("the_waypoint_is_on_the_way", on_the_way),
    ("from_header_to_all_and_back", by_http_route),
    ("the_same_in_istios_words", by_virtual_service),
];
const EXAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/canary");
/// The step that brings a Deployment; all others bring a route.
const DEPLOY: &str = "1-deploy-v2.yaml";
const CLIENT: &str = "production/client";
/// Requests that are counted per step.
const COUNTED: usize = 500;
const SOON: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    suite::run(plan, TESTS)
}

fn plan() -> Result<Plan> {
    let load = yaml::pod("production", "load", 1).image("meshload", &["pause"]).yaml();
    Ok(Plan::new()
        .copy_of(&Path::new(EXAMPLE).join("mesh"))
        .image("echo", programs::ours("echo-server")?)
        .image("client", programs::ours("echo-client")?)
        .file("load.yaml", load))
}

/// How many of the answers came from each version.
struct Counted {
    stable: usize,
    canary: usize,
}

/// Asks so many times over one connection; every answer must be a good one.
fn count(lab: &Lab, times: usize, more: &[&str]) -> Result<Counted> {
    let times_text = times.to_string();
    let mut argv = vec!["echo-client", "http://api-service/", "--count", &times_text];
    argv.extend(more);
    let ran = lab.exec_with(CLIENT, &argv, "", Duration::from_secs(120))?;
    let out = ran.ok()?;
    let lines = |end: &str| out.lines().filter(|line| line.ends_with(end)).count();
    // The body states its status once more.
    let (good, stable, canary) = (
        lines("StatusCode=200") - lines("body] StatusCode=200"),
        lines("ServiceVersion=stable"),
        lines("ServiceVersion=canary"),
    );
    ensure!(good == times, "{good} of {times} answers are 200: {out:.2000}");
    ensure!(stable + canary == times, "{stable} + {canary} of {times}");
    Ok(Counted { stable, canary })
}

/// Copies a step's file into the running mesh's folder: each route takes the place of the one before. Others ask
/// meanwhile, and none of them may fail.
fn step(lab: &Lab, file: &str, checks: impl FnOnce() -> Result<()>) -> Result<()> {
    let load = load(lab)?;
    let to = if file == DEPLOY { "15-canary.yaml" } else { "20-route.yaml" };
    lab.write(to, &read(file)?)?;
    checks().context(file.to_owned())?;
    flawless(load).context(file.to_owned())
}

fn read(file: &str) -> Result<String> {
    let path = Path::new(EXAMPLE).join("steps").join(file);
    std::fs::read_to_string(&path).with_context(|| path.display().to_string())
}

fn canary_runs(lab: &Lab) -> Result<()> {
    lab.until("the canary to run", || {
        let pods = lab.status()?.pods;
        Ok(pods.iter().any(|p| p.name.starts_with("api-canary-") && p.ready))
    })?;
    Ok(())
}

/// Waits until the share of the canary is where it should be, then counts in earnest. `share` in percent.
fn check(lab: &Lab, share: f64, headers: &[&str]) -> Result<()> {
    let few = 50;
    lab.until(&format!("{share} % to reach the canary"), || {
        let seen = count(lab, few, headers)?.canary;
        Ok(within(seen, few, share))
    })?;
    let Counted { stable, canary } = count(lab, COUNTED, headers)?;
    ensure!(
        within(canary, COUNTED, share),
        "{canary} of {COUNTED} reached the canary, {stable} the stable version; wanted {share} %"
    );
    Ok(())
}

/// Five standard deviations of a binomial draw: chance goes beyond that once in two million.
fn within(seen: usize, of: usize, share: f64) -> bool {
    let (n, p) = (of as f64, share / 100.0);
    (seen as f64 - n * p).abs() <= 5.0 * (n * p * (1.0 - p)).sqrt()
}

/// A steady load for the time of a step.
fn load(lab: &Lab) -> Result<Background> {
    let load = ["rate", "-n", "8", "--rate", "400", "-d", "6", "--to", "api-service:80"];
    let argv: Vec<&str> = std::iter::once("/image/meshload").chain(load).collect();
    lab.exec_in_background("production/load", &argv)
}

/// Waits for the end of a load, which must have had no error.
fn flawless(mut load: Background) -> Result<()> {
    wait_until("the load to end", SOON, || Ok(!load.is_running()?))?;
    let out = load.out();
    let line = out.lines().last().with_context(|| format!("no result: {}", load.err()))?;
    let result: Value = serde_json::from_str(line)?;
    let errors = result["errors"].as_object().is_none_or(|e| !e.is_empty());
    ensure!(!errors && result["requests"].as_u64().unwrap_or_default() > 0, "{result}");
    Ok(())
}

fn on_the_way(lab: &Lab) -> Result<()> {
    let before = waypoint_log(lab)?.len();
    count(lab, 1, &["-H", "x-marker:on-the-way"])?;
    lab.until("the waypoint's access-log line", || {
        Ok(waypoint_log(lab)?.get(before..).is_some_and(|new| new.contains("api-service")))
    })?;
    Ok(())
}

fn waypoint_log(lab: &Lab) -> Result<String> {
    let status = lab.status()?;
    let pod = status.pods.iter().find(|p| p.name.starts_with("production-waypoint-"));
    let pod = pod.context("no pod of the waypoint")?;
    let ran = lab.meshctl(&["local", "logs", &format!("production/{}", pod.name)])?;
    Ok(ran.ok()?.to_owned())
}

fn by_http_route(lab: &Lab) -> Result<()> {
    step(lab, DEPLOY, || {
        canary_runs(lab)?;
        check(lab, 0.0, &[])
    })?;
    step(lab, "2-header.yaml", || {
        check(lab, 100.0, &["-H", "x-canary:true"])?;
        check(lab, 0.0, &["-H", "x-canary:no"])
    })?;
    let shares = [
        ("3-ten-percent.yaml", 10.0),
        ("4-half.yaml", 50.0),
        ("5-all.yaml", 100.0),
        ("6-back.yaml", 0.0),
    ];
    shares.iter().try_for_each(|(file, share)| step(lab, file, || check(lab, *share, &[])))
}

fn by_virtual_service(lab: &Lab) -> Result<()> {
    step(lab, DEPLOY, || canary_runs(lab))?;
    step(lab, "virtual-service.yaml", || {
        check(lab, 100.0, &["-H", "x-canary:true"])?;
        check(lab, 10.0, &[])
    })
}
