//! Who may call whom: each policy is tried on live traffic and put to `meshctl can`, and both must agree; a change acts on
//! connections that live.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::suite::{self, Test};
use e2e::{Lab, Plan, programs, wait_until, yaml};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(15);
/// From the change of a file to the end of a connection it forbids. The mesh has a second for its part; the rest is for
/// two cores that are busy with something else.
const LIVE_DENY: Duration = Duration::from_secs(3);

const TESTS: &[(&str, Test)] = &[
    ("without_policy_all_may", no_policy),
    ("allow_by_principal", allow_by_principal),
    ("allow_by_pattern", allow_by_pattern),
    ("deny_by_namespace", deny_by_namespace),
    ("allow_by_address", allow_by_address),
    ("allow_by_port", allow_by_port),
    ("deny_goes_before_allow", deny_before_allow),
    ("deny_for_the_whole_mesh", deny_from_the_root_namespace),
    ("an_allow_policy_without_rules_denies_all", allow_nothing),
    ("http_rules_fail_closed", http_rules),
    ("a_deny_closes_what_lives_and_healing_works", live_deny),
    ("a_deny_ends_an_iperf3_run", deny_under_load),
    ("can_names_the_rule", can_names_the_rule),
];

fn main() -> ExitCode {
    suite::run(plan, TESTS)
}

fn plan() -> Result<Plan> {
    programs::find("curl")?;
    let iperf = programs::path_of("iperf3")?;
    let idle =
        |namespace, name| yaml::pod(namespace, name, 1).image("meshprobe", &["pause"]).yaml();
    let serve = ["all", "--listen", "[::]:8080"];
    let objects = [
        yaml::namespace("app", true),
        yaml::namespace("team", true),
        yaml::namespace("plain", false),
        idle("app", "client"),
        idle("app", "other"),
        idle("team", "caller"),
        idle("plain", "outsider"),
        yaml::pod("app", "server", 2).image("meshload", &serve).ready_on(8080).yaml(),
        yaml::service("app", "server", "server", &[("http", 80, "8080"), ("echo", 7, "8082")]),
        // Policies of `server` must not touch its neighbour.
        yaml::pod("app", "free", 2).image("meshload", &serve).ready_on(8080).yaml(),
        yaml::service("app", "free", "free", &[("http", 80, "8080")]),
        // Without a probe: iperf3 serves one at a time, and resets whoever comes beside a probe.
        yaml::pod("app", "iperf", 2).command(&[&iperf, "-s", "-p", "5201"]).yaml(),
        yaml::service("app", "iperf", "iperf", &[("iperf", 5201, "5201")]),
    ];
    Ok(Plan::new().file("app.yaml", yaml::join(&objects)))
}

/// A caller and a port of the server.
type Call = (&'static str, u16);

const CALLS: [Call; 5] = [
    ("app/client", 80),
    ("app/client", 7),
    ("app/other", 80),
    ("team/caller", 80),
    ("plain/outsider", 80),
];

/// Tries a call with an ordinary client.
fn may(lab: &Lab, (from, port): Call) -> Result<bool> {
    if port == 80 {
        let ran =
            lab.exec(from, &["curl", "-sS4", "--fail", "--max-time", "5", "http://server.app/"])?;
        return Ok(ran.is_ok());
    }
    let to = format!("server.app:{port}");
    let ran =
        lab.exec(from, &["/image/meshprobe", "end", &to, "--send", "ping", "--until", "ping"])?;
    Ok(ran.ok()?.contains("closed by us"))
}

/// Puts the policies in force, and checks live traffic and `meshctl can` for every call. `allowed`: all others are refused,
/// for `reason`.
fn check(lab: &Lab, policies: &[String], allowed: &[Call], reason: &str) -> Result<()> {
    lab.write("policy.yaml", &yaml::join(policies))?;
    lab.until("the policies to be in force", || {
        for call in CALLS {
            let (got, want) = (may(lab, call)?, allowed.contains(&call));
            ensure!(
                got == want,
                "{call:?}: allowed is {got}, wanted {want}; complaints: {:?}",
                lab.status()?.diagnostics
            );
        }
        Ok(true)
    })?;
    for call in CALLS {
        let ran = lab.can(&format!("pod:{}", call.0), &format!("app/server:{}", call.1))?;
        if allowed.contains(&call) {
            ran.ok().with_context(|| format!("{call:?} works"))?;
        } else {
            ensure!(ran.code == 1, "{call:?} is refused: {ran:?}");
            ran.failed_with(&[reason])?;
        }
    }
    // Its neighbour is free, with every policy here but one for the whole mesh.
    if !policies.iter().any(|p| p.contains("namespace: istio-system")) {
        lab.exec("app/client", &["curl", "-sS4", "--fail", "--max-time", "5", "http://free/"])?
            .ok()?;
    }
    Ok(())
}

fn no_policy(lab: &Lab) -> Result<()> {
    check(lab, &[yaml::namespace("unused", false)], &CALLS, "")
}

fn allow(rules: &str) -> String {
    yaml::policy("app", "allow", "server", "ALLOW", rules)
}

fn deny(rules: &str) -> String {
    yaml::policy("app", "deny", "server", "DENY", rules)
}

fn allow_by_principal(lab: &Lab) -> Result<()> {
    let policy = allow("[{from: [{source: {principals: [cluster.local/ns/app/sa/client]}}]}]");
    check(lab, &[policy], &[CALLS[0], CALLS[1]], "policy_no_allow")
}

fn allow_by_pattern(lab: &Lab) -> Result<()> {
    let policy =
        allow("[{from: [{source: {principals: ['*/sa/caller', 'cluster.local/ns/app/sa/o*']}}]}]");
    check(lab, &[policy], &[CALLS[2], CALLS[3]], "policy_no_allow")
}

fn deny_by_namespace(lab: &Lab) -> Result<()> {
    let policy = deny("[{from: [{source: {namespaces: [team]}}]}]");
    check(lab, &[policy], &[CALLS[0], CALLS[1], CALLS[2], CALLS[4]], "policy_deny")
}

fn allow_by_address(lab: &Lab) -> Result<()> {
    let (client, outsider) = (lab.pod("app/client")?.ips, lab.pod("plain/outsider")?.ips);
    let blocks: Vec<String> = client.iter().chain(&outsider).map(|ip| format!("'{ip}'")).collect();
    let policy = allow(&format!("[{{from: [{{source: {{ipBlocks: [{}]}}}}]}}]", blocks.join(", ")));
    check(lab, &[policy], &[CALLS[0], CALLS[1], CALLS[4]], "policy_no_allow")
}

fn allow_by_port(lab: &Lab) -> Result<()> {
    // Ports are the workload's, not the Service's.
    let policy = allow("[{to: [{operation: {ports: ['8080']}}]}]");
    let all_but_echo = [CALLS[0], CALLS[2], CALLS[3], CALLS[4]];
    check(lab, &[policy], &all_but_echo, "policy_no_allow")
}

fn deny_before_allow(lab: &Lab) -> Result<()> {
    let policies = [
        allow("[{from: [{source: {namespaces: [app]}}]}]"),
        deny(
            "[{from: [{source: {principals: [cluster.local/ns/app/sa/client]}}], to: [{operation: {ports: ['8082']}}]}]",
        ),
    ];
    check(lab, &policies, &[CALLS[0], CALLS[2]], "policy_")
}

fn deny_from_the_root_namespace(lab: &Lab) -> Result<()> {
    let rules = "[{from: [{source: {notNamespaces: [team]}}]}]";
    let policy = yaml::policy("istio-system", "only-team", "", "DENY", rules);
    check(lab, &[policy], &[CALLS[3]], "policy_deny")
}

fn allow_nothing(lab: &Lab) -> Result<()> {
    check(
        lab,
        &[yaml::policy("app", "allow-nothing", "server", "ALLOW", "")],
        &[],
        "policy_no_allow",
    )
}

/// ztunnel cannot read HTTP: an ALLOW that depends on it allows nothing, a DENY denies without it, and the user is told.
fn http_rules(lab: &Lab) -> Result<()> {
    let get = "[{from: [{source: {namespaces: [app]}}], to: [{operation: {methods: [GET]}}]}]";
    check(lab, &[allow(get)], &[], "policy_no_allow")?;
    let told = |lab: &Lab| {
        lab.until("the complaint", || {
            let all = lab.status()?.diagnostics;
            ensure!(
                all.iter().any(|d| d.contains("policy.yaml:") && d.contains("methods")),
                "{all:?}"
            );
            Ok(true)
        })
    };
    told(lab)?;
    check(lab, &[deny(get)], &[CALLS[3], CALLS[4]], "policy_deny")?;
    told(lab)?;
    Ok(())
}

fn live_deny(lab: &Lab) -> Result<()> {
    check(lab, &[yaml::namespace("unused", false)], &CALLS, "")?;
    let (mut victim, mut twin) =
        (lab.hold("app/client", "server.app:7")?, lab.hold("app/other", "server.app:7")?);
    let before = lab.access_log("node-2")?.len();
    let began = Instant::now();
    let policy =
        deny("\n    - from:\n        - source: {principals: [cluster.local/ns/app/sa/client]}");
    lab.write("policy.yaml", &policy)?;
    wait_until("the connection to end", SOON, || Ok(!victim.is_running()?))?;
    let took = began.elapsed();
    let said = victim.wait(SOON)?;
    let last: Value = serde_json::from_str(said.ok()?.lines().last().unwrap_or_default())?;
    ensure!(last["answers"].as_u64() > Some(0), "it never worked: {said:?}");
    ensure!(took < LIVE_DENY, "the connection went on for {took:?}");
    let line = lab.wait_for_access(
        "node-2",
        before,
        &[("reason", "policy_changed"), ("src.workload", "client")],
    )?;
    let rule = line.get("rule");
    ensure!(rule.contains("policy.yaml:8"), "the rule is at {rule:?}: {line:?}");
    ensure!(line.get("policy").contains("app/deny"), "{line:?}");
    ensure!(twin.is_running()?, "the twin was allowed all the time: {} {}", twin.out(), twin.err());
    ensure!(!may(lab, CALLS[1])?, "a new connection is refused as well");
    lab.remove("policy.yaml")?;
    lab.until("the call to work again", || may(lab, CALLS[1]))?;
    ensure!(twin.is_running()?, "the twin was allowed all the time: {} {}", twin.out(), twin.err());
    twin.end()?;
    Ok(())
}

/// A connection that is never idle ends like one that is: the buffers on the way are full when the policy comes.
fn deny_under_load(lab: &Lab) -> Result<()> {
    // Longer than the test waits, so that only the policy can end it.
    let argv = ["iperf3", "-c", "iperf", "-p", "5201", "-t", "60", "-i", "0.2", "--forceflush"];
    let short = ["iperf3", "-c", "iperf", "-p", "5201", "-n", "1M"];
    lab.until("iperf3 to listen", || Ok(lab.exec("app/client", &short)?.is_ok()))?;
    for direction in [&[][..], &["-R"]] {
        let mut run = lab.exec_in_background("app/client", &[&argv[..], direction].concat())?;
        wait_until("bytes to flow", SOON, || {
            ensure!(run.is_running()?, "it ended: {} {}", run.out(), run.err());
            Ok(run.out().contains("bits/sec"))
        })?;
        let before = lab.access_log("node-2")?.len();
        let began = Instant::now();
        let rules = "[{from: [{source: {principals: [cluster.local/ns/app/sa/client]}}]}]";
        lab.write("policy.yaml", &yaml::policy("app", "deny", "iperf", "DENY", rules))?;
        wait_until("the run to end", SOON, || Ok(!run.is_running()?))?;
        let took = began.elapsed();
        run.wait(SOON)?.failed()?;
        ensure!(took < LIVE_DENY, "the run went on for {took:?}");
        let line = [("reason", "policy_changed"), ("src.workload", "client")];
        lab.wait_for_access("node-2", before, &line)?;
        lab.remove("policy.yaml")?;
        // The twin: the same run, shorter, comes to its end without the policy.
        let argv = [&short[..], direction].concat();
        lab.until("a run without the policy", || Ok(lab.exec("app/client", &argv)?.is_ok()))?;
    }
    Ok(())
}

fn can_names_the_rule(lab: &Lab) -> Result<()> {
    let policy = deny(
        "\n    - from:\n        - source: {namespaces: [team]}\n    - from:\n        - source: {principals: [cluster.local/ns/app/sa/client]}",
    );
    lab.write("policy.yaml", &policy)?;
    lab.until("the policy to be in force", || Ok(!may(lab, CALLS[0])?))?;
    let ran = lab.can("app/client", "app/server:http")?;
    ensure!(ran.code == 1, "{ran:?}");
    ran.failed_with(&["policy_deny", "app/deny", "policy.yaml:10"])?;
    lab.can("team/caller", "app/server:80")?.failed_with(&["policy.yaml:8"])?;
    let ran = lab.can("app/other", "app/server:80")?;
    ensure!(ran.code == 0 && ran.out.contains("yes"), "{ran:?}");
    // No answer is neither yes nor no.
    for (from, to) in [
        ("app/nobody", "app/server:80"),
        ("app/client", "app/nothing"),
        ("app/client", "app/server"),
    ] {
        let ran = lab.can(from, to)?;
        ensure!(ran.code == 2 && !ran.err.is_empty(), "{from} {to}: {ran:?}");
    }
    lab.remove("policy.yaml")?;
    Ok(())
}
