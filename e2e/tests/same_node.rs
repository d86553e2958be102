//! Two pods on one node: encrypted like all others, unless the operator joins them; then identity, policy and honesty stay.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::suite::{self, Test};
use e2e::{Lab, Plan, programs, wait_until, yaml};

const TESTS: &[(&str, Test)] = &[
    ("listed_namespaces_are_joined", joined),
    ("what_is_not_listed_is_encrypted", not_listed),
    ("another_node_is_another_node", another_node),
    ("policy_decides_as_before", policy),
    ("strict_mutual_tls_goes_first", strict),
];
const SOON: Duration = Duration::from_secs(20);
const ACCOUNT: &str = "spiffe://cluster.local/ns/app/sa/";

fn main() -> ExitCode {
    suite::run(plan, TESTS)
}

fn plan() -> Result<Plan> {
    programs::find("curl")?;
    let serve = ["all", "--listen", "[::]:8080"];
    let ports = [("http", 80, "8080"), ("echo", 7, "8082")];
    let pod = |namespace, name, node| yaml::pod(namespace, name, node).account(name);
    let mut objects = vec![yaml::namespace("app", true), yaml::namespace("other", true)];
    for (namespace, name) in
        [("app", "client"), ("app", "near"), ("app", "far"), ("other", "near"), ("other", "client")]
    {
        objects.push(yaml::service_account(namespace, name));
        let node = if name == "far" { 2 } else { 1 };
        objects.push(if name == "client" {
            pod(namespace, name, node).image("meshprobe", &["pause"]).yaml()
        } else {
            pod(namespace, name, node).image("meshload", &serve).ready_on(8080).yaml()
        });
        if name != "client" {
            objects.push(yaml::service(namespace, name, name, &ports));
        }
    }
    Ok(Plan::new().file("app.yaml", yaml::join(&objects)).same_node_direct("app"))
}

fn call(lab: &Lab, from: &str, url: &str) -> Result<bool> {
    Ok(lab.exec(from, &["curl", "-sS4", "--fail", "--max-time", "5", url])?.is_ok())
}

/// Both sides of one call, by what their lines say of the hop.
fn check(lab: &Lab, from: &str, url: &str, node: &str, direct: bool) -> Result<()> {
    let (out, into) = (lab.access_log("node-1")?.len(), lab.access_log(node)?.len());
    ensure!(call(lab, from, url)?, "{from} to {url}");
    for (node, before, direction) in [("node-1", out, "outbound"), (node, into, "inbound")] {
        let account = format!("{ACCOUNT}client");
        let mut fields = vec![("direction", direction)];
        if from == "app/client" {
            fields.push(("src.identity", account.as_str()));
        }
        let line = lab.wait_for_access(node, before, &fields)?;
        ensure!((line.get("same_node") == "direct") == direct, "{direction}: {line:?}");
        let tunnel = !line.get("dst.hbone_addr").is_empty();
        ensure!(direction == "inbound" || tunnel != direct, "{line:?}");
        ensure!(!line.get("dst.identity").is_empty(), "{line:?}");
    }
    Ok(())
}

fn joined(lab: &Lab) -> Result<()> {
    check(lab, "app/client", "http://near/", "node-1", true)?;
    // The server sees its client, as through the tunnel.
    let who = lab.exec("app/client", &["curl", "-sS4", "--max-time", "5", "http://near/who"])?;
    ensure!(who.ok()?.contains(&lab.pod_ip("app/client", false)?), "{who:?}");
    // The metrics name both, and claim no TLS.
    let page = lab.exec("node-1", &["curl", "-sS", "http://localhost:15020/metrics"])?;
    for reporter in ["source", "destination"] {
        let series = page.ok()?.lines().find(|l| {
            l.starts_with("istio_tcp_connections_opened_total")
                && l.contains(&format!("reporter=\"{reporter}\""))
                && l.contains("destination_service_name=\"near\"")
        });
        let series = series.unwrap_or_default();
        ensure!(series.contains(&format!("source_principal=\"{ACCOUNT}client\"")), "{series}");
        ensure!(series.contains("connection_security_policy=\"none\""), "{series}");
    }
    Ok(())
}

fn not_listed(lab: &Lab) -> Result<()> {
    check(lab, "app/client", "http://near.other/", "node-1", false)?;
    check(lab, "other/client", "http://near.app/", "node-1", false)?;
    check(lab, "other/client", "http://near/", "node-1", false)
}

fn another_node(lab: &Lab) -> Result<()> {
    check(lab, "app/client", "http://far/", "node-2", false)
}

fn policy(lab: &Lab) -> Result<()> {
    let mut held = lab.hold("app/client", "near:7")?;
    let before = lab.access_log("node-1")?.len();
    let rules = format!("[{{from: [{{source: {{principals: ['{}client']}}}}]}}]", &ACCOUNT[9..]);
    lab.write("policy.yaml", &yaml::policy("app", "deny", "near", "DENY", &rules))?;
    wait_until("the connection to end", SOON, || Ok(!held.is_running()?))?;
    for direction in ["inbound", "outbound"] {
        let fields =
            [("direction", direction), ("reason", "policy_changed"), ("same_node", "direct")];
        lab.wait_for_access("node-1", before, &fields)?;
    }
    let before = lab.access_log("node-1")?.len();
    ensure!(!call(lab, "app/client", "http://near/")?, "a new connection is refused as well");
    for direction in ["inbound", "outbound"] {
        let fields = [("direction", direction), ("reason", "policy_deny"), ("policy", "app/deny")];
        lab.wait_for_access("node-1", before, &fields)?;
    }
    // The twin: somebody else may.
    ensure!(call(lab, "other/client", "http://near.app/")?, "the policy names the client only");
    lab.remove("policy.yaml")?;
    lab.until("the call to work again", || call(lab, "app/client", "http://near/"))?;
    Ok(())
}

fn strict(lab: &Lab) -> Result<()> {
    let mut held = lab.hold("app/client", "near:7")?;
    lab.write("strict.yaml", &yaml::peer_authentication("app", "STRICT"))?;
    // What was joined ends; what comes is encrypted.
    wait_until("the joined connection to end", SOON, || Ok(!held.is_running()?))?;
    check(lab, "app/client", "http://near/", "node-1", false)?;
    lab.remove("strict.yaml")?;
    lab.until("connections to be joined again", || {
        Ok(check(lab, "app/client", "http://near/", "node-1", true).is_ok())
    })?;
    Ok(())
}
