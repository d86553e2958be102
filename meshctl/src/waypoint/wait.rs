//! Waits for a waypoint: until it takes connections, what names it is bound to it, and every proxy knows.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use lab::client;
use lab::place::LabInfo;
use lab::status::{Status, WaypointStatus};

use super::folder::{self, Folder};
use crate::print::{self, Color};

/// Between two looks: a change takes some 100 ms.
const LOOK: Duration = Duration::from_millis(100);

/// Waits; what is missing when the time is over is the error.
pub(super) fn ready(
    lab: &LabInfo,
    namespace: &str,
    name: &str,
    limit: Duration,
) -> Result<ExitCode> {
    let begun = Instant::now();
    loop {
        let status = client::status(lab)?;
        let objects = Folder::read(&lab.dir)?.objects();
        let expected = folder::expected(&objects, namespace, name);
        match missing(&status, namespace, name, &expected) {
            None => {
                print::line(&format!(
                    "{} waypoint {namespace}/{name} is ready: {}",
                    print::paint("✓", Color::Green, print::on_stdout()),
                    through(&status, namespace, name)
                ));
                return Ok(ExitCode::SUCCESS);
            }
            Some(why) if begun.elapsed() >= limit => {
                bail!("waypoint {namespace}/{name} is not ready after {} s: {why}", limit.as_secs())
            }
            Some(_) => std::thread::sleep(LOOK),
        }
    }
}

pub(super) fn find<'a>(
    status: &'a Status,
    namespace: &str,
    name: &str,
) -> Option<&'a WaypointStatus> {
    status.waypoints.iter().find(|w| w.namespace == namespace && w.name == name)
}

fn through(status: &Status, namespace: &str, name: &str) -> String {
    match find(status, namespace, name).map(|w| w.services.len() + w.workloads.len()) {
        None | Some(0) => "nothing goes through it yet".to_owned(),
        Some(_) => {
            let bound = find(status, namespace, name);
            let all = bound.into_iter().flat_map(|w| w.services.iter().chain(&w.workloads));
            format!("through it goes {}", all.cloned().collect::<Vec<_>>().join(", "))
        }
    }
}

/// What is still missing. `expected`: Services that name the waypoint.
pub(super) fn missing(
    status: &Status,
    namespace: &str,
    name: &str,
    expected: &[String],
) -> Option<String> {
    let Some(waypoint) = find(status, namespace, name) else {
        let told = about(status, namespace, name);
        return Some(if told.is_empty() {
            "the control plane does not know it (`meshctl local status` shows whether istiod-lite runs)".to_owned()
        } else {
            told
        });
    };
    for kind in ["Accepted", "Programmed"] {
        if let Some(condition) = waypoint.condition(kind).filter(|c| !c.status) {
            let told = about(status, namespace, name);
            let more = if told.is_empty() { String::new() } else { format!("; {told}") };
            return Some(format!(
                "{kind} is False ({}): {}{more}",
                condition.reason, condition.message
            ));
        }
    }
    let takes_services = matches!(waypoint.traffic.as_str(), "service" | "all");
    let unbound = expected.iter().filter(|s| takes_services && !waypoint.services.contains(s));
    let unbound: Vec<&str> = unbound.map(String::as_str).collect();
    if !unbound.is_empty() {
        return Some(format!(
            "Services that name it do not go through it yet: {}",
            unbound.join(", ")
        ));
    }
    let newest = status.processes.iter().find(|p| p.node.is_none()).and_then(|p| p.config.clone());
    // Those that drain serve nothing new.
    let behind = status.processes.iter().filter(|p| p.node.is_some() && p.ready);
    let behind: Vec<String> =
        behind.filter(|p| p.config != newest).filter_map(|p| p.node.clone()).collect();
    (!behind.is_empty()).then(|| format!("the proxies of {} do not know it yet", behind.join(", ")))
}

/// What pods and findings say about it.
fn about(status: &Status, namespace: &str, name: &str) -> String {
    let id = format!("Gateway/{namespace}/{name}:");
    let findings = status.diagnostics.iter().filter(|d| d.contains(&id)).cloned();
    let is_own = |p: &&lab::status::PodStatus| {
        let rest = p.name.strip_prefix(name).and_then(|r| r.strip_prefix('-'));
        p.namespace == namespace && rest.is_some_and(|r| r.matches('-').count() == 1) && !p.ready
    };
    let pods = status.pods.iter().filter(is_own).map(|p| {
        let message = if p.message.is_empty() { String::new() } else { format!(": {}", p.message) };
        format!(
            "pod {}/{} is {}{message} (`meshctl local logs {0}/{1}`)",
            p.namespace, p.name, p.state
        )
    });
    findings.chain(pods).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn status(change: impl FnOnce(&mut Value)) -> Status {
        let condition =
            |kind: &str| json!({"type": kind, "status": true, "reason": kind, "message": ""});
        let process = |node: Value, config: &str| {
            json!({"name": "p", "node": node, "state": "Running", "ready": true, "config": config, "pid": 1,
                   "restarts": 0, "log": ""})
        };
        let mut value = json!({
            "name": "l", "dir": "/d", "nodes": [], "services": [], "diagnostics": [],
            "pods": [{"namespace": "shop", "name": "waypoint-abc-def", "node": "node-1", "ips": [], "state": "Running",
                      "message": "", "ready": true, "restarts": 0, "containers": [], "captured": false,
                      "enrolment": "", "identity": null, "origin": ""}],
            "waypoints": [{"namespace": "shop", "name": "waypoint", "class": "istio-waypoint", "traffic": "service",
                           "origin": "a.yaml:1", "addresses": [], "ready": 1, "replicas": 1,
                           "conditions": [condition("Accepted"), condition("Programmed")], "listeners": [],
                           "services": ["shop/web"], "workloads": []}],
            "processes": [process(Value::Null, "7-2"), process(json!("node-1"), "7-2")],
        });
        change(&mut value);
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn what_is_missing_is_said() {
        let check = |change: fn(&mut Value), expected: &[&str], want: Option<&str>| {
            let expected: Vec<String> = expected.iter().map(|s| (*s).to_owned()).collect();
            let got = missing(&status(change), "shop", "waypoint", &expected);
            match (&got, want) {
                (None, None) => {}
                (Some(got), Some(want)) => assert!(got.contains(want), "{got}"),
                _ => panic!("{got:?}, not {want:?}"),
            }
        };
        check(|_| (), &["shop/web"], None);
        check(|_| (), &[], None);
        check(|_| (), &["shop/web", "shop/db"], Some("shop/db"));
        check(|v| v["waypoints"] = json!([]), &[], Some("does not know it"));
        check(
            |v| {
                v["waypoints"] = json!([]);
                v["diagnostics"] = json!(["a.yaml:1: error: Gateway/shop/waypoint: no such class"]);
            },
            &[],
            Some("no such class"),
        );
        check(
            |v| {
                let programmed = &mut v["waypoints"][0]["conditions"][1];
                programmed["status"] = json!(false);
                programmed["reason"] = json!("NoResources");
                programmed["message"] = json!("no pod");
                v["pods"][0]["ready"] = json!(false);
                v["pods"][0]["state"] = json!("CrashLoopBackOff");
            },
            &[],
            Some(
                "Programmed is False (NoResources): no pod; pod shop/waypoint-abc-def is CrashLoopBackOff",
            ),
        );
        check(|v| v["processes"][1]["config"] = json!("7-1"), &[], Some("proxies of node-1"));
        // One that is away is not waited for.
        check(
            |v| {
                v["processes"][1] = {
                    let mut p = v["processes"][1].clone();
                    p["config"] = Value::Null;
                    p["ready"] = json!(false);
                    p
                }
            },
            &[],
            None,
        );
        check(|v| v["waypoints"][0]["traffic"] = json!("workload"), &["shop/db"], None);
    }
}
