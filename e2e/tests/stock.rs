//! Our ztunnel where Istio's would be: its environment and files, its control plane's protocols, its node agent's ZDS and
//! its node agent's redirection. Nothing of our own control plane or lab runs here.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::stock::istiod::{ADDRESS_TYPE, AUTHORIZATION_TYPE};
use e2e::stock::two::{Two, VIP, identity};
use e2e::stock::world::{self, HERE, TOKEN};
use e2e::stock::{Node, Pod, Resource, World, inside};
use e2e::suite::{self, Alone};
use e2e::{Background, wait_until};

const SOON: Duration = Duration::from_secs(20);
const TESTS: &[(&str, Alone)] = &[
    ("curl_through_two_ztunnels", curl_through_two_ztunnels),
    ("policy_and_plaintext", policy_and_plaintext),
    ("names_are_answered_and_forwarded", names_are_answered_and_forwarded),
    ("tokens_rotate_and_streams_come_back", tokens_rotate_and_streams_come_back),
    ("the_node_agent_comes_back", the_node_agent_comes_back),
    ("a_restart_without_istiod", a_restart_without_istiod),
    ("a_wrong_token_is_named", a_wrong_token_is_named),
    ("a_wrong_root_is_named", a_wrong_root_is_named),
    ("missing_files_are_named_and_found_when_they_come", missing_files),
    ("another_version_of_zds_is_named", another_version_of_zds),
    ("what_is_not_supported_is_refused", what_is_not_supported_is_refused),
];

fn main() -> ExitCode {
    match inside::enter() {
        Ok(()) => suite::run_alone(TESTS),
        Err(code) => code,
    }
}

fn curl_through_two_ztunnels() -> Result<()> {
    let t = Two::start()?;
    t.call(&format!("{}:8080", t.server.v4), t.client.v4)?;
    t.call(&format!("[{}]:8080", t.server.v6), t.client.v6)?;
    t.call(&VIP.to_string(), t.client.v4)?;
    let (from, to) = (identity("client"), identity("server"));
    let target = format!("{}:8080", t.server.v4);
    let gate = format!("{}:15008", t.server.v4);
    let service = world::hostname("server");
    t.one.wait_for_access(&[
        ("direction", "outbound"),
        ("src.identity", &from),
        ("dst.identity", &to),
        ("dst.addr", &gate),
        ("dst.hbone_addr", &target),
        ("dst.service", &service),
    ])?;
    t.two.wait_for_access(&[
        ("direction", "inbound"),
        ("src.identity", &from),
        ("dst.identity", &to),
        ("src.workload", "client"),
    ])?;
    let seen = t.world.istiod.seen();
    ensure!(seen.unauthenticated == 0 && seen.nacks.is_empty(), "{seen:?}");
    ensure!(seen.unknown_types.is_empty(), "Istio has no such types: {seen:?}");
    let node = "ztunnel~10.9.0.11~ztunnel-node-1.istio-system~istio-system.svc.cluster.local";
    ensure!(seen.nodes.iter().any(|n| n == node), "{seen:?}");
    // One for each pod, none for the proxies themselves, for a day.
    let mut asked = seen.certificates;
    asked.sort();
    ensure!(asked == [(from, 86_400), (to, 86_400)], "{asked:?}");
    Ok(())
}

fn policy_and_plaintext() -> Result<()> {
    let mut t = Two::start()?;
    let stranger = t.world.pod(&t.one, "stranger", false)?;
    let url = format!("http://{}:8080/who", t.server.v4);
    // Nothing forbids plaintext; the application sees who called.
    let ran = stranger.curl(&url)?;
    ensure!(ran.ok()?.contains(&stranger.v4.to_string()), "{ran:?}");
    t.two.wait_for_access(&[
        ("direction", "inbound"),
        ("src.workload", "stranger"),
        ("src.identity", ""),
    ])?;
    // Outwards, to somebody who is not in the mesh.
    let _app = stranger.start("meshload", &["all", "--listen", "[::]:8080", "--body", "100"])?;
    let out = format!("http://{}:8080/who", stranger.v4);
    wait_until("the stranger to serve", SOON, || Ok(t.client.curl(&out)?.is_ok()))?;

    let serve = |names: &[&str]| {
        let mut workload = t.server.workload(&t.two.name, true);
        workload.authorization_policies = names.iter().map(|n| format!("app/{n}")).collect();
        t.world.istiod.set(Resource::workload(workload));
    };
    t.world.istiod.set(Resource::policy(&world::allow("only-client", "client")));
    serve(&["only-client"]);
    wait_until("the stranger to be refused", SOON, || Ok(!stranger.curl(&url)?.is_ok()))?;
    t.client.curl(&url)?.ok()?;
    t.world.istiod.set(Resource::policy(&world::allow("only-client", "nobody")));
    wait_until("the client to be refused", SOON, || Ok(!t.client.curl(&url)?.is_ok()))?;
    // That may have been a connection in the middle of which the policy came, with a reason of its own.
    ensure!(!t.client.curl(&url)?.is_ok(), "the client was let in again");
    t.two
        .wait_for_access(&[("reason", "policy_no_allow"), ("src.identity", &identity("client"))])?;
    serve(&[]);
    t.world.istiod.remove(AUTHORIZATION_TYPE, "app/only-client");
    wait_until("both to be let in", SOON, || {
        Ok(stranger.curl(&url)?.is_ok() && t.client.curl(&url)?.is_ok())
    })?;
    Ok(())
}

fn names_are_answered_and_forwarded() -> Result<()> {
    let t = Two::start()?;
    let listen = format!("{HERE}:53");
    let here = e2e::programs::ours("meshprobe")?;
    let mut upstream = std::process::Command::new(here);
    upstream.args(["dns-serve", "--listen", &listen]);
    let _upstream = Background::start(upstream)?;
    let dig = |args: &[&str]| {
        let all = [&["@10.96.0.10", "+tries=1", "+time=5", "+short"], args].concat();
        Ok::<_, anyhow::Error>(t.client.exec("dig", &all)?.ok()?.to_owned())
    };
    let name = world::hostname("server");
    for transport in ["+notcp", "+tcp"] {
        ensure!(dig(&[transport, &name])? == VIP.to_string(), "{transport}: {}", t.one.log());
    }
    // What the mesh does not know goes to the node's resolver, whomever the pod asked.
    let mut said = String::new();
    wait_until("the resolver to answer", SOON, || {
        said = dig(&["hello.example", "TXT"])?;
        Ok(said == "\"hello\"")
    })?;
    t.one.says(&["forwarded", "hello.example", "resolver=10.9.0.1:53"])?;
    Ok(())
}

fn tokens_rotate_and_streams_come_back() -> Result<()> {
    let mut t = Two::start()?;
    let second = "eyJhbGciOiJSUzI1NiJ9.second.sig";
    t.world.istiod.rotate_token(second);
    t.one.write_token(second)?;
    t.two.write_token(second)?;
    t.world.istiod.cut();
    // While nobody was connected something went and something came.
    let extra = t.world.pod(&t.two, "extra", true)?;
    wait_until("the streams to come back", SOON, || Ok(t.world.istiod.seen().held.len() >= 2))
        .with_context(|| {
            format!(
                "{:?}
{}
{}",
                t.world.istiod,
                t.one.log(),
                t.two.log()
            )
        })?;
    let held = &t.world.istiod.seen().held;
    let service = format!("app/{}", world::hostname("server"));
    ensure!(held.iter().all(|names| names.contains(&service)), "what is held is told: {held:?}");
    // A new pod's certificate is asked for with the new token.
    let _app = extra.start("meshload", &["all", "--listen", "[::]:8080", "--body", "100"])?;
    t.two.agent.add(&extra)?;
    wait_until("the new pod to be reached", SOON, || {
        Ok(t.client.curl(&format!("http://{}:8080/who", extra.v4))?.is_ok())
    })?;
    t.two.wait_for_access(&[
        ("dst.identity", &identity("extra")),
        ("src.identity", &identity("client")),
    ])?;
    ensure!(t.world.istiod.seen().unauthenticated == 0, "{:?}", t.world.istiod);
    t.world.istiod.remove(ADDRESS_TYPE, &service);
    wait_until("the service to be gone", SOON, || {
        Ok(!t.client.curl(&format!("http://{VIP}/who"))?.is_ok())
    })?;
    t.call(&format!("{}:8080", t.server.v4), t.client.v4)
}

fn the_node_agent_comes_back() -> Result<()> {
    let mut t = Two::start()?;
    let refused = t.two.agent.add_without_namespace(&t.server).err();
    let error = refused.map(|e| e.to_string()).unwrap_or_default();
    ensure!(error.contains("without a network namespace"), "{error}");
    t.two.agent.hang_up();
    t.call(&format!("{}:8080", t.server.v4), t.client.v4)?;
    wait_until("ztunnel to notice", SOON, || Ok(t.two.log().contains("closed the line")))?;
    t.two.agent.accept()?;
    t.two.agent.keep(&t.server)?;
    t.two.agent.all_sent()?;
    t.call(&format!("{}:8080", t.server.v4), t.client.v4)?;
    // An agent that does not name a pod any more has lost it.
    t.two.agent.hang_up();
    t.two.agent.accept()?;
    t.two.agent.all_sent()?;
    t.two.says(&["pod left", "server"])?;
    t.client.curl(&format!("http://{}:8080/who", t.server.v4))?.failed()?;
    t.two.agent.add(&t.server)?;
    wait_until("the pod to be served again", SOON, || {
        Ok(t.client.curl(&format!("http://{}:8080/who", t.server.v4))?.is_ok())
    })?;
    t.two.agent.remove(&t.server)?;
    t.client.curl(&format!("http://{}:8080/who", t.server.v4))?.failed()?;
    Ok(())
}

fn a_restart_without_istiod() -> Result<()> {
    let mut t = Two::start()?;
    t.call(&format!("{}:8080", t.server.v4), t.client.v4)?;
    t.world.istiod.stop();
    for (node, pod) in [(&mut t.one, &t.client), (&mut t.two, &t.server)] {
        node.stop()?;
        node.start()?;
        node.agent.accept()?;
        node.agent.add(pod)?;
        node.agent.all_sent()?;
        wait_until("ztunnel to be ready", SOON, || node.is_ready())?;
    }
    // Configuration, keys and certificates are where the DaemonSet's container has something of the node.
    t.call(&VIP.to_string(), t.client.v4)?;
    t.one.says(&["configuration from disk in force"])?;
    let peer = [("direction", "inbound"), ("src.identity", &*identity("client"))];
    t.two.wait_for_access(&peer)?;
    Ok(())
}

/// A node whose ztunnel has a pod and waits for its control plane.
fn alone(prepare: impl FnOnce(&Node) -> Result<()>) -> Result<(World, Node, Pod)> {
    let mut world = World::new()?;
    let mut node = world.node("node-1")?;
    let pod = world.pod(&node, "client", true)?;
    prepare(&node)?;
    node.start()?;
    node.agent.accept()?;
    node.agent.add(&pod)?;
    node.agent.all_sent()?;
    Ok((world, node, pod))
}

fn recovers(node: &Node) -> Result<()> {
    wait_until("ztunnel to be ready", SOON, || node.is_ready())?;
    node.says(&["certificate for", "app/sa/client"])?;
    Ok(())
}

fn a_wrong_token_is_named() -> Result<()> {
    let (world, node, _pod) = alone(|node| node.write_token("somebody.elses.token"))?;
    node.says(&["no configuration stream", "Unauthenticated", "secrets/tokens/istio-token"])?;
    node.says(&["no certificate", "the CA refuses", "authentication failure"])?;
    ensure!(!node.is_ready()?, "without configuration");
    ensure!(!node.log().contains("somebody.elses"), "a token is not for logs");
    ensure!(world.istiod.seen().nodes.is_empty());
    node.write_token(TOKEN)?;
    recovers(&node)
}

fn a_wrong_root_is_named() -> Result<()> {
    let foreign = e2e::authority::Authority::foreign()?;
    let (world, node, _pod) = alone(|node| node.write_root(&foreign.root))?;
    node.says(&[
        "no configuration stream",
        "istiod.istio-system.svc:15012",
        "not signed by a root",
    ])?;
    node.says(&["no certificate", "istiod.istio-system.svc:15012", "not signed by a root"])?;
    ensure!(world.istiod.seen().certificates.is_empty(), "no token went to a stranger");
    node.write_root(world.istiod.root())?;
    recovers(&node)
}

fn missing_files() -> Result<()> {
    let (world, node, _pod) = alone(|node| Ok(std::fs::remove_file(node.root_file())?))?;
    node.says(&["no configuration stream", "secrets/istio/root-cert.pem", "No such file"])?;
    node.says(&["no certificate", "secrets/istio/root-cert.pem", "No such file"])?;
    std::fs::remove_file(node.token_file())?;
    node.write_root(world.istiod.root())?;
    node.says(&["no configuration stream", "secrets/tokens/istio-token", "No such file"])?;
    node.write_token(TOKEN)?;
    recovers(&node)
}

fn another_version_of_zds() -> Result<()> {
    let mut world = World::new()?;
    let mut node = world.node("node-1")?;
    node.start()?;
    node.agent.accept()?;
    node.agent.hang_up();
    node.says(&["no line to the node agent", "ztunnel.sock", "ZDS version V1"])?;
    ensure!(!node.is_ready()?, "without pods");
    // The next agent is of the right version.
    node.agent.accept()?;
    node.agent.all_sent()?;
    wait_until("ztunnel to be ready", SOON, || node.is_ready())?;
    Ok(())
}

fn what_is_not_supported_is_refused() -> Result<()> {
    let mut world = World::new()?;
    let node = world.node("node-1")?;
    let check = |name: &str, value: &str, words: &str| {
        node.run_with(&[(name, value)])?.failed_with(&[name, value, words])
    };
    check("PROXY_MODE", "dedicated", "one proxy per node")?;
    check("PROXY_MODE", "waypoint", "only shared is supported")?;
    check("CRL_PATH", "/crl.pem", "revocation lists are not checked")?;
    check("XDS_ADDRESS", "http://istiod:15010", "https only")?;
    Ok(())
}
