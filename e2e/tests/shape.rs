//! TCP keeps its shape through the mesh: half-close, server speaks first, back-pressure, resets, refusals, many at once.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::suite::{self, Test};
use e2e::{Lab, Plan, wait_for, wait_until, yaml};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(20);
/// The last way between proxy and application is loopback, the first as well: each may hold some MiB, the tunnel 4 MiB a
/// stream. What a server can get rid of beyond that would be memory of the proxies.
const MOST_IN_FLIGHT: u64 = 48 << 20;
/// Growth of a proxy's memory while one connection stands still.
const MOST_MEMORY: u64 = 32 << 20;
/// A refusal must not wait for a timeout.
const AT_ONCE: u64 = 2_000;

const TESTS: &[(&str, Test)] = &[
    ("half_close", half_close),
    ("server_speaks_first", server_first),
    ("server_sees_the_client_address", client_address),
    ("a_slow_reader_holds_back_the_sender", backpressure),
    ("a_reset_by_the_server_arrives", reset_by_server),
    ("a_reset_by_the_client_arrives", reset_by_client),
    ("a_refusal_by_the_application_is_quick", refused),
    ("a_second_endpoint_is_tried", second_endpoint),
    ("five_hundred_at_once", five_hundred),
    ("ten_thousand_one_after_the_other", many_short),
];

fn main() -> ExitCode {
    suite::run(plan, TESTS)
}

fn plan() -> Result<Plan> {
    let manner = |name: &str| {
        let pod =
            yaml::pod("app", name, 2).image("meshprobe", &["serve", name, "--listen", "[::]:9000"]);
        [pod.ready_on(9000).yaml(), yaml::service("app", name, name, &[("tcp", 9000, "9000")])]
    };
    let mut objects = vec![
        yaml::namespace("app", true),
        yaml::pod("app", "client", 1).image("meshprobe", &["pause"]).yaml(),
        yaml::pod("app", "load", 1).image("meshload", &["pause"]).yaml(),
        yaml::pod("app", "server", 2)
            .image("meshload", &["all", "--listen", "[::]:8080"])
            .ready_on(8080)
            .yaml(),
        yaml::service(
            "app",
            "server",
            "server",
            &[("http", 80, "8080"), ("netecho", 7, "8083"), ("nothing", 9, "9999")],
        ),
        // One of the two does not listen where the Service says, and has no probe that would tell.
        yaml::pod("app", "pair-good", 2)
            .app("pair")
            .account("pair")
            .image("meshload", &["serve", "--listen", "[::]:8080"])
            .ready_on(8080)
            .yaml(),
        yaml::pod("app", "pair-bad", 2)
            .app("pair")
            .account("pair")
            .image("meshprobe", &["pause"])
            .alone(),
        yaml::service("app", "pair", "pair", &[("http", 80, "8080")]),
    ];
    for name in ["count", "reset", "report", "flood"] {
        objects.extend(manner(name));
    }
    Ok(Plan::new().file("app.yaml", yaml::join(&objects)))
}

/// Runs the probe in the client, and reads the last line it says.
fn probe(lab: &Lab, args: &[&str]) -> Result<Value> {
    let argv = [&["/image/meshprobe"], args].concat();
    let ran = lab.exec_with("app/client", &argv, "", SOON)?;
    let last = ran.ok()?.lines().last().unwrap_or_default();
    serde_json::from_str(last).with_context(|| format!("{ran:?}"))
}

fn half_close(lab: &Lab) -> Result<()> {
    // The answer comes only after the client has ended its direction.
    let text = "x".repeat(100_000);
    let ran = lab.exec_with("app/load", &["/image/meshload", "cat", "count:9000"], &text, SOON)?;
    ensure!(ran.ok()? == "100000 bytes", "{ran:?}");
    Ok(())
}

fn server_first(lab: &Lab) -> Result<()> {
    let heard = probe(lab, &["hear", "server:7"])?;
    ensure!(heard["heard"].as_str().is_some_and(|h| h.contains("peer")), "{heard}");
    Ok(())
}

fn client_address(lab: &Lab) -> Result<()> {
    for ipv6 in [false, true] {
        let own = lab.pod_ip("app/client", ipv6)?;
        let server = lab.pod_ip("app/server", ipv6)?;
        let to = if ipv6 { format!("[{server}]:8083") } else { format!("{server}:8083") };
        let heard = probe(lab, &["hear", &to])?;
        let greeting: Value = serde_json::from_str(heard["heard"].as_str().unwrap_or_default())?;
        ensure!(
            greeting["peer"] == own.as_str() && greeting["local"] == server.as_str(),
            "{greeting}"
        );
    }
    Ok(())
}

/// Resident memory of a node's proxy, in bytes.
fn memory(lab: &Lab, node: &str) -> Result<u64> {
    let pid = lab.process_id("ztunnel", Some(node))?;
    let ran = lab.exec(node, &["cat", &format!("/proc/{pid}/status")])?;
    let line = ran.ok()?.lines().find(|l| l.starts_with("VmRSS:"));
    let kib = line.and_then(|l| l.split_whitespace().nth(1)?.parse::<u64>().ok());
    Ok(kib.with_context(|| format!("{ran:?}"))? * 1024)
}

fn backpressure(lab: &Lab) -> Result<()> {
    let nodes = ["node-1", "node-2"];
    let before = nodes.map(|n| memory(lab, n));
    let mut slow =
        lab.exec_in_background("app/client", &["/image/meshprobe", "slow", "flood:9000"])?;
    let stalled = wait_for("the sender to stand still", SOON, || {
        ensure!(slow.is_running()?, "{} {}", slow.out(), slow.err());
        let log = lab.pod_log("app/flood")?;
        let lines = log.lines().filter_map(|l| serde_json::from_str::<Value>(l).ok());
        Ok(lines.filter_map(|l| l["stalled"].as_u64()).next_back())
    })?;
    ensure!(stalled < MOST_IN_FLIGHT, "{stalled} bytes went somewhere");
    for (node, before) in nodes.iter().zip(before) {
        let grown = memory(lab, node)?.saturating_sub(before?);
        ensure!(grown < MOST_MEMORY, "the proxy of {node} grew by {grown} bytes");
    }
    // Once the reader goes on, all of it arrives.
    slow.close_input();
    let ran = slow.wait(SOON)?;
    let last: Value = serde_json::from_str(ran.ok()?.lines().last().unwrap_or_default())?;
    ensure!(last["bytes"] == 256 << 20, "{last}");
    Ok(())
}

fn reset_by_server(lab: &Lab) -> Result<()> {
    let end = probe(lab, &["end", "reset:9000", "--send", "x"])?;
    ensure!(end["end"] == "reset", "{end}");
    // The control: a server that closes in order is not taken for a reset.
    let end = probe(
        lab,
        &["end", "server:80", "--send", "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"],
    )?;
    ensure!(end["end"] == "eof" && end["bytes"].as_u64() > Some(0), "{end}");
    Ok(())
}

fn reset_by_client(lab: &Lab) -> Result<()> {
    let ends = || -> Result<Vec<String>> {
        let log = lab.pod_log("app/report")?;
        // Probes of the kubelet come from elsewhere and say nothing.
        let lines = log.lines().filter_map(|l| serde_json::from_str::<Value>(l).ok());
        Ok(lines
            .filter(|l| l["bytes"].as_u64() > Some(0))
            .map(|l| l["end"].as_str().unwrap_or_default().to_owned())
            .collect())
    };
    let check = |args: &[&str], want: &str| -> Result<()> {
        let before = ends()?.len();
        probe(lab, &[&["end", "report:9000", "--send", "x"], args].concat())?;
        wait_until("the server to say how it ended", SOON, || Ok(ends()?.len() > before))?;
        let ends = ends()?;
        ensure!(ends[before] == want, "{ends:?}, wanted {want}");
        Ok(())
    };
    check(&["--reset"], "reset")?;
    check(&["--until", "x"], "eof")
}

fn refused(lab: &Lab) -> Result<()> {
    let pod = lab.pod_ip("app/server", false)?;
    for to in ["server:9".to_owned(), format!("{pod}:9998")] {
        let end = probe(lab, &["end", &to, "--send", "x"])?;
        let how = end["end"].as_str().unwrap_or_default();
        ensure!(
            ["reset", "no connection: refused", "no connection: reset"].contains(&how),
            "{to}: {end}"
        );
        ensure!(end["ms"].as_u64() < Some(AT_ONCE), "{to}: {end}");
    }
    Ok(())
}

fn second_endpoint(lab: &Lab) -> Result<()> {
    let endpoints = lab.status()?.service("app/pair").map(|s| s.endpoints.len());
    ensure!(endpoints == Some(2), "both must be chosen from: {endpoints:?}");
    for n in 0..20 {
        let ran =
            lab.exec("app/load", &["/image/meshload", "get", "http://pair/who", "--timeout", "5"])?;
        ensure!(ran.ok()?.contains("pair-good"), "call {n}: {ran:?}");
    }
    Ok(())
}

fn five_hundred(lab: &Lab) -> Result<()> {
    let ran = lab.exec_with(
        "app/load",
        &["/image/meshload", "idle", "--to", "server:80", "-n", "500", "-d", "1"],
        "",
        SOON,
    )?;
    let last: Value = serde_json::from_str(ran.ok()?.lines().last().unwrap_or_default())
        .with_context(|| format!("{ran:?}"))?;
    ensure!(last["open"] == 500 && last["ended_early"] == 0 && no_errors(&last), "{last}");
    Ok(())
}

fn many_short(lab: &Lab) -> Result<()> {
    let argv = [
        "/image/meshload",
        "connect",
        "--to",
        "server:80",
        "-n",
        "8",
        // Until there are as many; the time is for a machine that does other things as well.
        "-d",
        "90",
        "--most",
        "10000",
    ];
    let ran = lab.exec_with("app/load", &argv, "", Duration::from_secs(120))?;
    let last: Value = serde_json::from_str(ran.ok()?.lines().last().unwrap_or_default())
        .with_context(|| format!("{ran:?}"))?;
    ensure!(last["connections"].as_u64() >= Some(10_000) && no_errors(&last), "{last}");
    Ok(())
}

/// Counts of each kind of error.
fn no_errors(result: &Value) -> bool {
    result["errors"].as_object().is_some_and(|kinds| kinds.values().all(|n| n.as_u64() == Some(0)))
}
