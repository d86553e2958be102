//! What is on the wire between nodes: TLS 1.3 on port 15008 and nothing else for pods of the mesh, plaintext for others,
//! and refusals where STRICT asks for more. The same canary is seen in the clear once the label is gone.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::suite::{self, Test};
use e2e::wire::Seen;
use e2e::{Background, Lab, Plan, programs, wait_until, yaml};

const SOON: Duration = Duration::from_secs(15);

const TESTS: &[(&str, Test)] = &[
    // First: a tunnel between nodes, once there is one, is pinged.
    ("nothing_new_on_the_same_node", same_node),
    ("between_pods_of_the_mesh_all_is_tls_1_3", mesh_is_encrypted),
    ("without_the_label_the_canary_is_seen", label_removed_and_restored),
    ("permissive_takes_plaintext_strict_refuses", strict_and_permissive),
    ("strict_with_an_exception_for_a_port", port_exception),
    ("the_mesh_calls_out_in_plaintext", mesh_to_outside),
];

fn main() -> ExitCode {
    suite::run(plan, TESTS)
}

fn plan() -> Result<Plan> {
    programs::find("curl")?;
    let serve = ["all", "--listen", "[::]:8080"];
    let objects = [
        yaml::pod("app", "client", 1).yaml_with_pause(),
        yaml::pod("app", "server", 2).image("meshload", &serve).ready_on(8080).yaml(),
        yaml::pod("app", "twin", 2).yaml_with_pause(),
        yaml::service("app", "server", "server", &[("http", 80, "8080"), ("echo", 7, "8082")]),
        yaml::namespace("plain", false),
        yaml::pod("plain", "outsider", 1).yaml_with_pause(),
        yaml::pod("plain", "outside", 2).image("meshload", &serve).ready_on(8080).yaml(),
        yaml::service("plain", "outside", "outside", &[("http", 80, "8080"), ("echo", 7, "8082")]),
    ];
    Ok(Plan::new()
        .file("00-app.yaml", yaml::namespace("app", true))
        .file("pods.yaml", yaml::join(&objects)))
}

trait Pause {
    fn yaml_with_pause(self) -> String;
}

impl Pause for yaml::Pod {
    fn yaml_with_pause(self) -> String {
        self.image("meshprobe", &["pause"]).yaml()
    }
}

/// Watches the uplink of a node while `act` runs.
fn watch(lab: &Lab, node: &str, canary: &str, act: impl FnOnce() -> Result<()>) -> Result<Seen> {
    let probe = programs::path_of_ours("meshprobe")?;
    let mut tap: Background = lab.exec_in_background(node, &[&probe, "tap", "--canary", canary])?;
    wait_until("the tap to be open", SOON, || {
        ensure!(tap.is_running()?, "the tap ended: {}", tap.err());
        Ok(tap.out().contains("ready"))
    })?;
    act()?;
    tap.close_input();
    let ran = tap.wait(SOON)?;
    let last = ran.ok()?.lines().last().unwrap_or_default();
    Ok(serde_json::from_str(last)?)
}

/// Sends the canary to an echo server and has it back.
fn echo(lab: &Lab, from: &str, to: &str, canary: &str) -> Result<()> {
    let text = format!("{canary}\n");
    let ran =
        lab.exec(from, &["/image/meshprobe", "end", to, "--send", &text, "--until", canary])?;
    ensure!(ran.ok()?.contains(canary), "the echo is missing: {ran:?}");
    Ok(())
}

fn mesh_is_encrypted(lab: &Lab) -> Result<()> {
    let canary = "canary-in-the-mesh-5190";
    let (v4, v6) = (lab.pod_ip("app/server", false)?, lab.pod_ip("app/server", true)?);
    // The first call to each address makes a tunnel, whose hellos the tap must see.
    for to in [format!("{v4}:8082"), format!("[{v6}]:8082")] {
        let seen = watch(lab, "node-1", canary, || echo(lab, "app/client", &to, canary))?;
        seen.check_encrypted()?;
    }
    // By name, over the tunnels that are there.
    let seen = watch(lab, "node-1", canary, || echo(lab, "app/client", "server:7", canary))?;
    ensure!(!seen.canary && seen.plain.is_empty() && seen.tunnel_segments > 0, "{seen:?}");
    Ok(())
}

fn same_node(lab: &Lab) -> Result<()> {
    let canary = "canary-on-one-node-2764";
    let seen = watch(lab, "node-2", canary, || echo(lab, "app/twin", "server:7", canary))?;
    ensure!(
        !seen.canary && seen.plain.is_empty() && seen.tunnel_segments == 0,
        "it left the node: {seen:?}"
    );
    let before = lab.access_log("node-2")?.len();
    echo(lab, "app/twin", "server:7", canary)?;
    // On one node as well: identity and encryption.
    let line =
        [("direction", "inbound"), ("src.identity", "spiffe://cluster.local/ns/app/sa/twin")];
    lab.wait_for_access("node-2", before, &line)?;
    Ok(())
}

fn label_removed_and_restored(lab: &Lab) -> Result<()> {
    let canary = "canary-without-label-8813";
    lab.write("00-app.yaml", &yaml::namespace("app", false))?;
    let captured = |want: bool| {
        lab.until("the pods' capture to change", || {
            let status = lab.status()?;
            Ok(status
                .pods
                .iter()
                .filter(|p| p.namespace == "app")
                .all(|p| p.captured == want && p.ready))
        })
    };
    captured(false)?;
    let seen = watch(lab, "node-1", canary, || echo(lab, "app/client", "server:7", canary))?;
    // Tunnels of before may still say goodbye.
    let clear = seen.plain.iter().any(|(port, _)| *port == 8082);
    ensure!(seen.canary && clear, "plaintext was expected: {seen:?}");
    lab.write("00-app.yaml", &yaml::namespace("app", true))?;
    captured(true)?;
    // Both nodes must have heard of both pods.
    lab.until("encryption to be back", || {
        let canary = "canary-with-label-again-1177";
        let seen = watch(lab, "node-1", canary, || echo(lab, "app/client", "server:7", canary))?;
        // A tunnel from before the look could be older than the tap: what matters is that nothing is in the clear.
        ensure!(!seen.canary && seen.plain.is_empty() && seen.tunnel_segments > 0, "{seen:?}");
        Ok(true)
    })?;
    Ok(())
}

fn strict_and_permissive(lab: &Lab) -> Result<()> {
    let canary = "canary-permissive-3021";
    let server = "server.app:7";
    let seen = watch(lab, "node-1", canary, || echo(lab, "plain/outsider", server, canary))?;
    // Tunnels of others are pinged meanwhile.
    let clear = seen.plain.iter().any(|(port, _)| *port == 8082);
    ensure!(seen.canary && clear, "plaintext was expected: {seen:?}");
    lab.write("strict.yaml", &yaml::peer_authentication("app", "STRICT"))?;
    lab.until(
        "STRICT to be in force",
        || Ok(echo(lab, "plain/outsider", server, canary).is_err()),
    )?;
    let before = lab.access_log("node-2")?.len();
    ensure!(echo(lab, "plain/outsider", server, canary).is_err(), "plaintext got in under STRICT");
    let refused =
        [("direction", "inbound"), ("reason", "mtls_required"), ("dst.workload", "server")];
    let line = lab.wait_for_access("node-2", before, &refused)?;
    ensure!(line.message == "connection failed" && line.get("src.identity").is_empty(), "{line:?}");
    // The twin with an identity goes on.
    echo(lab, "app/client", "server:7", canary)?;
    lab.can("pod:plain/outsider", "app/server:7")?.failed_with(&["mtls_required"])?;
    lab.can("pod:app/client", "app/server:7")?.ok()?;
    lab.remove("strict.yaml")?;
    lab.until("plaintext to be taken again", || {
        Ok(echo(lab, "plain/outsider", server, canary).is_ok())
    })?;
    Ok(())
}

fn port_exception(lab: &Lab) -> Result<()> {
    let canary = "canary-port-level-6502";
    let web = |lab: &Lab| {
        let argv = ["curl", "-sS", "--fail", "--max-time", "5", "http://server.app/"];
        Ok::<_, anyhow::Error>(lab.exec("plain/outsider", &argv)?.is_ok())
    };
    ensure!(web(lab)?, "without a policy both ports take plaintext");
    let strict = yaml::peer_authentication("app", "STRICT");
    let open = strict.replace("name: default", "name: server")
        + "  selector: {matchLabels: {app: server}}\n  \
               portLevelMtls: {8082: {mode: PERMISSIVE}}\n";
    lab.write("strict.yaml", &yaml::join(&[strict, open]))?;
    lab.until("STRICT to be in force on the other port", || Ok(!web(lab)?))?;
    echo(lab, "plain/outsider", "server.app:7", canary)?;
    echo(lab, "app/client", "server:7", canary)?;
    lab.can("pod:plain/outsider", "app/server:80")?.failed_with(&["mtls_required"])?;
    lab.can("pod:plain/outsider", "app/server:7")?.ok()?;
    Ok(())
}

fn mesh_to_outside(lab: &Lab) -> Result<()> {
    let canary = "canary-to-outside-4410";
    let before = lab.access_log("node-1")?.len();
    let seen = watch(lab, "node-1", canary, || echo(lab, "app/client", "outside.plain:7", canary))?;
    ensure!(seen.canary, "plaintext was expected: {seen:?}");
    let line = [("direction", "outbound"), ("src.workload", "client"), ("dst.workload", "outside")];
    let line = lab.wait_for_access("node-1", before, &line)?;
    ensure!(
        line.get("dst.identity").is_empty() && line.get("dst.hbone_addr").is_empty(),
        "{line:?}"
    );
    // Its own address is what the other side sees, with a mesh in between or not.
    let own = lab.pod_ip("app/client", false)?;
    let ran =
        lab.exec("app/client", &["curl", "-sS4", "--max-time", "5", "http://outside.plain/who"])?;
    ensure!(ran.ok()?.contains(&own), "{ran:?} should name {own}");
    Ok(())
}
