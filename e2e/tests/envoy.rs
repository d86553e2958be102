//! The real Envoy as the other end: an HBONE client of our inbound proxy, and an HBONE server behind our outbound one.
//!
//! Its pods are not captured. They hold certificates of the mesh's CA, or of another where that is the point; both ends
//! check the other's SPIFFE name, and each refusal has a twin that succeeds.

use std::process::ExitCode;

use anyhow::{Result, ensure};
use e2e::authority::Authority;
use e2e::command::Ran;
use e2e::envoy::{self, Party, Way};
use e2e::lab::SOON;
use e2e::suite::{self, Test};
use e2e::{Lab, Plan, programs, wait_until, yaml};
use serde_json::Value;

const TESTS: &[(&str, Test)] = &[
    ("envoy_calls_a_pod_of_the_mesh", envoy_is_let_in),
    ("envoy_with_another_identity_is_refused", other_identity),
    ("envoy_with_another_root_or_domain_is_refused", other_root),
    ("envoy_refuses_a_server_that_it_does_not_expect", envoy_refuses),
    ("envoy_asks_for_what_is_not_there", wrong_targets),
    ("a_pod_of_the_mesh_calls_envoy", envoy_serves),
    ("envoy_that_is_somebody_else_is_refused", impostors),
    ("envoy_that_takes_others_only_refuses_us", picky),
    ("envoy_without_a_route_refuses_the_tunnel", no_route),
];

const FRONT: &str = "spiffe://cluster.local/ns/app/sa/front";
const SERVER: &str = "spiffe://cluster.local/ns/app/sa/server";
const CALLER: &str = "spiffe://cluster.local/ns/app/sa/caller";

fn main() -> ExitCode {
    suite::run(plan, TESTS)
}

fn plan() -> Result<Plan> {
    programs::find("curl")?;
    let (body, listen) = (PAGE.to_string(), "[::]:8080");
    let serve = ["all", "--listen", listen, "--body", &body];
    let objects = [
        yaml::namespace("app", true),
        yaml::pod("app", "server", 2).image("meshload", &serve).ready_on(8080).yaml(),
        yaml::pod("app", "caller", 1).image("meshload", &["pause"]).yaml(),
        yaml::peer_authentication("app", "STRICT"),
        // Who gets in is who the certificate says.
        yaml::policy(
            "app",
            "front-only",
            "server",
            "ALLOW",
            "[{from: [{source: {principals: [cluster.local/ns/app/sa/front]}}]}]",
        ),
    ];
    Ok(Plan::new().image("envoy", programs::envoy()?).file("app.yaml", yaml::join(&objects)))
}

/// Starts the pods that a test writes for itself, and waits until their Envoys serve.
fn start(lab: &Lab, names: &[&str], pods: &[String]) -> Result<()> {
    // Those of the test before have the same names, and would answer.
    lab.until("the pods of before to be gone", || {
        let status = lab.status()?;
        Ok(names.iter().all(|name| status.pod(name).is_none()))
    })?;
    lab.write("envoy.yaml", &yaml::join(pods))?;
    wait_until("the Envoys to serve", SOON, || {
        let ready = |name: &&str| {
            lab.exec(name, &["curl", "-sS", "--fail", "http://127.0.0.1:9901/ready"])?.ok()?;
            Ok::<_, anyhow::Error>(())
        };
        names.iter().try_for_each(ready)?;
        Ok(lab.status()?.is_settled())
    })?;
    Ok(())
}

/// A pod beside which Envoy runs, outside the mesh's capture.
fn uncaptured(name: &str, node: u16, args: &[&str]) -> yaml::Pod {
    yaml::pod("app", name, node).label("istio.io/dataplane-mode", "none").image("meshload", args)
}

// --- Envoy as a client -------------------------------------------------------------------------

/// The ways out of the pod `front`, by port.
const GOOD: u16 = 10080;
const GOOD_SINK: u16 = 10081;
const GOOD_ECHO: u16 = 10082;
const STRANGER: u16 = 10001;
const FOREIGN: u16 = 10002;
const OTHER_DOMAIN: u16 = 10003;
const OTHER_SERVER: u16 = 10004;
const OTHER_ADDRESS: u16 = 10005;
const HOST_NAME: u16 = 10006;
const OWN_PORT: u16 = 10007;

fn start_client(lab: &Lab) -> Result<()> {
    let (mesh, foreign) = (Authority::of(lab)?, Authority::foreign()?);
    let front = mesh.certify(FRONT)?;
    let stranger = mesh.certify("spiffe://cluster.local/ns/app/sa/stranger")?;
    let other_domain = mesh.certify("spiffe://other.example/ns/app/sa/front")?;
    let forged = foreign.certify(FRONT)?;
    let gate = lab.pod_ip("app/server", false)?;
    let [web, sink, echo] = [8080, 8081, 8082].map(|port| format!("{gate}:{port}"));
    let (elsewhere, own) = ("10.99.0.1:8080", format!("{gate}:15006"));
    let party = |own| Party { own, root: &mesh.root, expects: SERVER };
    let way = |port, own, target| Way { port, party: party(own), gate: &gate, target };
    let mut other_server = way(OTHER_SERVER, &front, &web);
    other_server.party.expects = "spiffe://cluster.local/ns/app/sa/other";
    let config = envoy::client(&[
        way(GOOD, &front, &web),
        way(GOOD_SINK, &front, &sink),
        way(GOOD_ECHO, &front, &echo),
        way(STRANGER, &stranger, &web),
        way(FOREIGN, &forged, &web),
        way(OTHER_DOMAIN, &other_domain, &web),
        other_server,
        way(OTHER_ADDRESS, &front, elsewhere),
        way(HOST_NAME, &front, "server.app.svc.cluster.local:8080"),
        way(OWN_PORT, &front, &own),
    ]);
    start(lab, &["app/front"], &[envoy::beside(&uncaptured("front", 1, &["pause"]), &config)])?;
    // The proxy has heard of the server's policy and of its own pod before Envoy came; this is the proof.
    lab.until("Envoy to be let in", || Ok(ask(lab, GOOD)?.is_ok()))?;
    Ok(())
}

fn ask(lab: &Lab, port: u16) -> Result<Ran> {
    let url = format!("http://127.0.0.1:{port}/who");
    lab.exec("app/front", &["curl", "-sS", "--fail", "--max-time", "5", &url])
}

/// What is sent and must come back.
const ECHOED: u64 = 1_000_000;
/// More than the window of a stream, so that both ends must give credit to each other.
const BULK: usize = PAGE * PAGES;
const PAGE: usize = 16_000;
const PAGES: usize = 500;

/// Sends to an echo server and has every byte back, the end of each direction on its own; then moves bulk both ways.
///
/// The server never is the first to end a connection: Envoy (1.40) then resets the stream and drops what it still holds.
fn move_much(lab: &Lab, from: &str, [web, sink, echo]: [&str; 3]) -> Result<()> {
    let script = format!(
        "head -c {ECHOED} /dev/urandom > /tmp/much; /image/meshload cat {echo} < /tmp/much | cmp - /tmp/much"
    );
    lab.exec_with(from, &["sh", "-ec", &script], "", SOON)?.ok()?;
    let ran = lab.exec(from, &["/image/meshload", "send", "--to", sink, "-d", "1"])?;
    let sent: Value = serde_json::from_str(ran.ok()?.lines().last().unwrap_or_default())?;
    ensure!(sent["lost"] == false && sent["bytes_received"].as_u64() > Some(BULK as u64), "{sent}");
    // All on one connection.
    let script = format!("curl -sS --fail --max-time 15 'http://{web}/[1-{PAGES}]' | wc -c");
    let ran = lab.exec(from, &["sh", "-ec", &script])?;
    ensure!(ran.ok()? == BULK.to_string(), "{ran:?}");
    Ok(())
}

fn envoy_is_let_in(lab: &Lab) -> Result<()> {
    start_client(lab)?;
    let before = lab.access_log("node-2")?.len();
    // The application sees who called, although a tunnel was in between.
    let (front, ran) = (lab.pod_ip("app/front", false)?, ask(lab, GOOD)?);
    ensure!(ran.ok()?.contains(&front), "{ran:?} should name {front}");
    let line = [
        ("direction", "inbound"),
        ("src.identity", FRONT),
        ("dst.identity", SERVER),
        ("policy", "app/front-only"),
    ];
    lab.wait_for_access("node-2", before, &line)?;
    // Both ways, more than every window, and the end of each direction on its own.
    let ways = [GOOD, GOOD_SINK, GOOD_ECHO].map(|port| format!("127.0.0.1:{port}"));
    move_much(lab, "app/front", ways.each_ref().map(String::as_str))?;
    let line = lab.wait_for_access("node-2", before, &[("dst.addr", &echo_address(lab)?)])?;
    ensure!(line.get("src.identity") == FRONT, "{line:?}");
    ensure!(line.number("bytes_sent") == ECHOED && line.number("bytes_recv") == ECHOED, "{line:?}");
    Ok(())
}

fn echo_address(lab: &Lab) -> Result<String> {
    Ok(format!("{}:8082", lab.pod_ip("app/server", false)?))
}

/// The call fails, and the server's proxy says why.
fn refused(lab: &Lab, port: u16, fields: &[(&str, &str)]) -> Result<()> {
    let before = lab.access_log("node-2")?.len();
    ask(lab, port)?.failed()?;
    lab.wait_for_access("node-2", before, &[&[("direction", "inbound")], fields].concat())?;
    // The twin goes on.
    ask(lab, GOOD)?.ok()?;
    Ok(())
}

fn other_identity(lab: &Lab) -> Result<()> {
    start_client(lab)?;
    let stranger = "spiffe://cluster.local/ns/app/sa/stranger";
    refused(lab, STRANGER, &[("reason", "policy_no_allow"), ("src.identity", stranger)])
}

fn other_root(lab: &Lab) -> Result<()> {
    start_client(lab)?;
    for port in [FOREIGN, OTHER_DOMAIN] {
        refused(lab, port, &[("reason", "peer_certificate"), ("src.identity", "")])?;
    }
    Ok(())
}

fn envoy_refuses(lab: &Lab) -> Result<()> {
    start_client(lab)?;
    ask(lab, OTHER_SERVER)?.failed()?;
    wait_until("Envoy to say why", SOON, || {
        let said = envoy_said(lab, "app/front")?;
        Ok(said.contains("CERTIFICATE_VERIFY_FAILED"))
    })?;
    ask(lab, GOOD)?.ok()?;
    Ok(())
}

fn wrong_targets(lab: &Lab) -> Result<()> {
    start_client(lab)?;
    refused(lab, OTHER_ADDRESS, &[("reason", "destination_mismatch"), ("src.identity", FRONT)])?;
    refused(lab, HOST_NAME, &[("reason", "bad_request"), ("src.identity", FRONT)])?;
    refused(lab, OWN_PORT, &[("reason", "mesh_port"), ("src.identity", FRONT)])
}

// --- Envoy as a server -------------------------------------------------------------------------

/// A pod that serves HBONE itself, and says so.
fn gate(name: &str, party: &Party<'_>) -> String {
    let body = PAGE.to_string();
    let pod = uncaptured(name, 2, &["all", "--listen", "127.0.0.1:8080", "--body", &body])
        .label("networking.istio.io/tunnel", "http");
    envoy::beside(&pod, &envoy::server(party, &[8080, 8081, 8082]))
}

fn gate_identity(name: &str) -> String {
    format!("spiffe://cluster.local/ns/app/sa/{name}")
}

fn call(lab: &Lab, gate: &str, port: u16) -> Result<Ran> {
    let url = format!("http://{}:{port}/who", lab.pod_ip(&format!("app/{gate}"), false)?);
    lab.exec("app/caller", &["curl", "-sS", "--fail", "--max-time", "5", &url])
}

/// What Envoy wrote about requests and connections.
fn envoy_said(lab: &Lab, pod: &str) -> Result<String> {
    let ran = lab.meshctl(&["local", "logs", pod, "-c", "envoy"])?;
    Ok(ran.ok()?.to_owned())
}

fn start_gate(lab: &Lab) -> Result<()> {
    let mesh = Authority::of(lab)?;
    let own = mesh.certify(&gate_identity("gate"))?;
    let pod = gate("gate", &Party { own: &own, root: &mesh.root, expects: CALLER });
    let service = yaml::service(
        "app",
        "gate",
        "gate",
        &[("web", 80, "8080"), ("sink", 9, "8081"), ("echo", 7, "8082")],
    );
    start(lab, &["app/gate"], &[pod, service])?;
    // Nothing but Envoy listens where others can reach it: what arrives came through the tunnel.
    lab.until("Envoy to be reached", || Ok(call(lab, "gate", 8080)?.is_ok()))?;
    Ok(())
}

fn envoy_serves(lab: &Lab) -> Result<()> {
    start_gate(lab)?;
    let before = lab.access_log("node-1")?.len();
    let service = lab.service_ip("app/gate", false)?;
    let ways = [80, 9, 7].map(|port| format!("{service}:{port}"));
    move_much(lab, "app/caller", ways.each_ref().map(String::as_str))?;
    let (ip, identity) = (lab.pod_ip("app/gate", false)?, gate_identity("gate"));
    let (gate, target) = (format!("{ip}:15008"), format!("{ip}:8082"));
    let line = [
        ("direction", "outbound"),
        ("src.identity", CALLER),
        ("dst.identity", identity.as_str()),
        ("dst.addr", &gate),
        ("dst.hbone_addr", &target),
        ("dst.service", "gate.app.svc.cluster.local"),
    ];
    let line = lab.wait_for_access("node-1", before, &line)?;
    ensure!(line.number("bytes_sent") == ECHOED && line.number("bytes_recv") == ECHOED, "{line:?}");
    // What Envoy saw: the target, our certificate's name, and what our proxy says about the call.
    let caller = lab.pod_ip("app/caller", false)?;
    let wanted = [
        format!("hbone 200 CONNECT {ip}:8082 {CALLER}"),
        format!("for={caller};host=gate.app.svc.cluster.local"),
        "k8s.namespace.name=app".to_owned(),
    ];
    wait_until("Envoy to log the tunnel", SOON, || {
        let said = envoy_said(lab, "app/gate")?;
        ensure!(said.lines().any(|l| wanted.iter().all(|w| l.contains(w))), "{said}\n{wanted:#?}");
        Ok(true)
    })?;
    Ok(())
}

/// The call fails, and our outbound proxy says why.
fn refused_out(lab: &Lab, gate: &str, port: u16, fields: &[(&str, &str)]) -> Result<()> {
    let address = format!("{}:{port}", lab.pod_ip(&format!("app/{gate}"), false)?);
    let fields =
        [&[("direction", "outbound"), ("dst.hbone_addr", address.as_str())], fields].concat();
    // The pod is new: the first calls may be older than what the proxy knows of it.
    let before = lab.access_log("node-1")?.len();
    lab.until("the right refusal", || {
        call(lab, gate, port)?.failed()?;
        Ok(lab.access_log("node-1")?.iter().skip(before).any(|l| l.has(&fields)))
    })?;
    Ok(())
}

fn impostors(lab: &Lab) -> Result<()> {
    let (mesh, foreign) = (Authority::of(lab)?, Authority::foreign()?);
    let (other, forged) =
        (mesh.certify(&gate_identity("gate"))?, foreign.certify(&gate_identity("forger"))?);
    let party = |own| Party { own, root: &mesh.root, expects: CALLER };
    let pods = [gate("impostor", &party(&other)), gate("forger", &party(&forged))];
    start(lab, &["app/impostor", "app/forger"], &pods)?;
    refused_out(lab, "impostor", 8080, &[("reason", "peer_identity_mismatch")])?;
    refused_out(lab, "forger", 8080, &[("reason", "peer_certificate")])?;
    for pod in ["app/impostor", "app/forger"] {
        let said = envoy_said(lab, pod)?;
        ensure!(!said.contains("CONNECT"), "{pod} was asked for something: {said}");
    }
    Ok(())
}

fn picky(lab: &Lab) -> Result<()> {
    let mesh = Authority::of(lab)?;
    let own = mesh.certify(&gate_identity("picky"))?;
    let pod = gate("picky", &Party { own: &own, root: &mesh.root, expects: FRONT });
    start(lab, &["app/picky"], &[pod])?;
    refused_out(lab, "picky", 8080, &[("reason", "peer_certificate")])?;
    ensure!(!envoy_said(lab, "app/picky")?.contains("CONNECT"));
    Ok(())
}

fn no_route(lab: &Lab) -> Result<()> {
    start_gate(lab)?;
    refused_out(lab, "gate", 9999, &[("reason", "tunnel_refused")])?;
    // The tunnel is there for others.
    call(lab, "gate", 8080)?.ok()?;
    Ok(())
}
