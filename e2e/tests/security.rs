//! A hostile pod, root in its own user namespace, against the mesh. Each attack fails for the reason it should, and a
//! control shows that the attempt can succeed where nothing guards.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use e2e::command::Ran;
use e2e::suite::{self, Test};
use e2e::{Lab, Plan, programs, wait_until, yaml};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(20);
const PROBE: &str = "/image/meshprobe";

const TESTS: &[(&str, Test)] = &[
    ("rules_of_the_pod", nft_rules),
    ("settings_of_the_pod", settings),
    ("marks_of_the_proxy", marks),
    ("namespaces_of_others", namespaces),
    ("processes_of_the_mesh", processes),
    ("keys_tokens_and_sockets", secrets),
    ("source_addresses_of_others", source_addresses),
    ("packets_of_others", packets),
    ("ports_of_the_mesh", mesh_ports),
    ("certificates_of_another_root", foreign_root),
    ("targets_that_are_not_the_pods", wrong_targets),
    ("certificates_for_strangers", ca_without_credentials),
    ("dropping_out_of_the_mesh", still_captured),
];

fn main() -> ExitCode {
    suite::run(plan, TESTS)
}

fn plan() -> Result<Plan> {
    for program in ["curl", "nft", "ip", "nsenter", "unshare"] {
        programs::find(program)?;
    }
    let serve = ["all", "--listen", "[::]:8080"];
    let objects = [
        yaml::namespace("app", true),
        yaml::pod("app", "evil", 1).image("meshprobe", &["pause"]).yaml(),
        yaml::pod("app", "neighbour", 1).image("meshload", &serve).ready_on(8080).yaml(),
        yaml::pod("app", "server", 2).image("meshload", &serve).ready_on(8080).yaml(),
        yaml::service("app", "server", "server", &[("http", 80, "8080")]),
        yaml::namespace("plain", false),
        yaml::pod("plain", "outside", 2).image("meshload", &serve).ready_on(8080).yaml(),
        yaml::pod("plain", "naked", 1).image("meshprobe", &["pause"]).yaml(),
        // The server takes its neighbour and the attacker, nobody else: what gets in has an identity.
        yaml::policy(
            "app",
            "callers",
            "server",
            "ALLOW",
            "[{from: [{source: {namespaces: [app]}}]}]",
        ),
    ];
    Ok(Plan::new().file("app.yaml", yaml::join(&objects)))
}

fn evil(lab: &Lab, argv: &[&str]) -> Result<Ran> {
    lab.exec("app/evil", argv)
}

/// The pod's own traffic still goes through the mesh.
fn still_captured(lab: &Lab) -> Result<()> {
    let before = lab.access_log("node-2")?.len();
    evil(lab, &["curl", "-sS", "--fail", "--max-time", "5", "http://server/"])?.ok()?;
    let line =
        [("direction", "inbound"), ("src.identity", "spiffe://cluster.local/ns/app/sa/evil")];
    lab.wait_for_access("node-2", before, &line)?;
    Ok(())
}

fn nft_rules(lab: &Lab) -> Result<()> {
    let nft = programs::path_of("nft")?;
    // The control: the same program, in a namespace that belongs to the pod.
    evil(lab, &["unshare", "-Urn", &nft, "add", "table", "inet", "mine"])?.ok()?;
    for argv in [
        &["flush", "ruleset"][..],
        &["delete", "table", "inet", "ambit"],
        &["add", "table", "inet", "mine"],
        &["list", "ruleset"],
    ] {
        let ran = evil(lab, &[&[nft.as_str()], argv].concat())?;
        // Listing may show an empty answer, changing must fail.
        ensure!(argv[0] == "list" || !ran.is_ok(), "{ran:?}");
        ensure!(argv[0] == "list" || ran.err.contains("not permitted"), "{ran:?}");
        ensure!(!ran.out.contains("table inet mine"), "{ran:?}");
    }
    // With capabilities over a namespace of its own it is no nearer.
    let ran = evil(lab, &["unshare", "-Ur", &nft, "flush", "ruleset"])?;
    ran.failed_with(&["not permitted"])?;
    let ip = programs::path_of("ip")?;
    evil(lab, &[&ip, "rule", "add", "fwmark", "0x100", "lookup", "main"])?
        .failed_with(&["not permitted"])?;
    evil(lab, &[&ip, "route", "flush", "table", "100"])?.failed()?;
    evil(lab, &[&ip, "addr", "add", "10.244.2.77/32", "dev", "eth0"])?
        .failed_with(&["not permitted"])?;
    evil(lab, &[&ip, "link", "set", "lo", "down"])?.failed_with(&["not permitted"])?;
    still_captured(lab)
}

fn settings(lab: &Lab) -> Result<()> {
    for setting in
        ["net/ipv4/tcp_fwmark_accept", "net/ipv4/ip_forward", "net/ipv4/conf/all/rp_filter"]
    {
        let path = format!("/proc/sys/{setting}");
        let before = evil(lab, &["cat", &path])?;
        evil(lab, &[PROBE, "attack", "write", &path, "0"])?.failed()?;
        // A /proc mounted anew would be writable if the pod might mount one.
        let script = format!("mount -t proc proc /mnt && echo 0 > /mnt/sys/{setting}");
        evil(lab, &["sh", "-c", &script])?.failed()?;
        evil(lab, &["unshare", "-Urmpf", "sh", "-c", &script])?.failed()?;
        ensure!(evil(lab, &["cat", &path])?.out == before.out, "{path} has changed");
    }
    // The control: the lab's root may.
    lab.exec(
        "node-1",
        &["sh", "-c", "cat /proc/sys/net/ipv4/ip_forward > /proc/sys/net/ipv4/ip_forward"],
    )?
    .ok()?;
    still_captured(lab)
}

fn marks(lab: &Lab) -> Result<()> {
    let target = format!("{}:8080", lab.pod_ip("app/server", false)?);
    for mark in ["0x539", "0x200", "0x100"] {
        evil(lab, &[PROBE, "attack", "mark", mark, &target])?
            .failed_with(&["SO_MARK", "not permitted"])?;
        let as_root = ["unshare", "-Ur", PROBE, "attack", "mark", mark, &target];
        evil(lab, &as_root)?.failed_with(&["SO_MARK", "not permitted"])?;
    }
    evil(lab, &[PROBE, "attack", "transparent", "1.2.3.4:80"])?.failed_with(&["IP_TRANSPARENT"])?;
    // The control: the lab's root may set the mark.
    let probe = programs::path_of_ours("meshprobe")?;
    let outside = format!("{}:8080", lab.pod_ip("plain/outside", false)?);
    lab.exec("node-1", &[&probe, "attack", "mark", "0x539", &outside])?.ok()?;
    Ok(())
}

fn namespaces(lab: &Lab) -> Result<()> {
    // The control: its own it may enter, once it is root in a user namespace below.
    evil(lab, &["unshare", "-Urn", PROBE, "attack", "setns", "/proc/self/ns/net"])?.ok()?;
    let ran = evil(lab, &["sh", "-c", "ls /proc | grep -c '^[0-9]'"])?;
    let processes: u32 = ran.ok()?.parse()?;
    ensure!(processes < 10, "the pod sees {processes} processes");
    // From outside, by the number a process has there: nothing of the kind exists in the pod.
    let ztunnel = lab.process_id("ztunnel", Some("node-1"))?;
    for kind in ["net", "mnt", "user", "pid"] {
        let path = format!("/proc/{ztunnel}/ns/{kind}");
        evil(lab, &[PROBE, "attack", "setns", &path])?.failed()?;
        evil(lab, &[PROBE, "attack", "setns", &format!("/proc/1/ns/{kind}")])?.failed()?;
    }
    evil(lab, &["nsenter", "-t", "1", "-n", "true"])?.failed()?;
    Ok(())
}

fn processes(lab: &Lab) -> Result<()> {
    let probe = programs::path_of_ours("meshprobe")?;
    for name in ["ztunnel", "istiod-lite"] {
        let node = (name == "ztunnel").then_some("node-1");
        let pid = lab.process_id(name, node)?.to_string();
        evil(lab, &[PROBE, "attack", "ptrace", &pid])?.failed_with(&["ptrace"])?;
        evil(lab, &["cat", &format!("/proc/{pid}/environ")])?.failed()?;
        evil(lab, &["kill", "-9", &pid])?.failed()?;
        // No token where others could look.
        let shown = lab.exec(
            "node-1",
            &[
                "sh",
                "-c",
                &format!(
                    "tr '\\0' '\\n' < /proc/{pid}/cmdline; tr '\\0' '\\n' < /proc/{pid}/environ"
                ),
            ],
        )?;
        let hex = |w: &str| w.len() >= 64 && w.bytes().all(|b| b.is_ascii_hexdigit());
        let words = shown.ok()?.split(|c: char| !c.is_ascii_alphanumeric());
        ensure!(!words.into_iter().any(hex), "a token is in plain sight of {name}: {shown:?}");
    }
    evil(lab, &[PROBE, "attack", "ptrace", "1"])?.failed_with(&["ptrace"])?;
    evil(lab, &["cat", "/proc/1/environ"])?.failed()?;
    // The control: the lab's root may trace.
    let own =
        lab.exec("node-1", &["sh", "-c", &format!("sleep 5 & {probe} attack ptrace $!; kill $!")])?;
    ensure!(own.out.contains("traced"), "{own:?}");
    Ok(())
}

/// The state folder of the lab.
fn state(lab: &Lab) -> Result<String> {
    let status = lab.status()?;
    let log = status.processes.first().context("no processes")?.log.clone();
    let state = log.rsplit_once("/logs/").context("the log lies in STATE/logs")?.0;
    Ok(state.to_owned())
}

fn secrets(lab: &Lab) -> Result<()> {
    let state = state(lab)?;
    // The control: they are there.
    let all = lab.exec("node-1", &["find", &state, "-type", "f"])?;
    let keys: Vec<&str> = all.ok()?.lines().filter(|l| l.ends_with(".pem")).collect();
    ensure!(!keys.is_empty(), "no key is where the lab keeps its keys: {all:?}");
    let sockets = lab.exec("node-1", &["find", &state, "-type", "s"])?;
    let sockets: Vec<&str> = sockets.ok()?.lines().collect();
    ensure!(sockets.iter().any(|s| s.ends_with("control.sock")), "{sockets:?}");
    for path in keys.iter().chain(&sockets) {
        evil(lab, &["cat", path])?.failed()?;
    }
    evil(lab, &["ls", &state])?.failed()?;
    // Not by another way: no open file of the lab, no device, no old root.
    let ran = evil(
        lab,
        &[
            "sh",
            "-c",
            "find / -xdev -name control.sock -o -xdev -name '*.pem' -path '*secret*' 2>/dev/null",
        ],
    )?;
    ensure!(ran.out.trim().is_empty(), "{ran:?}");
    let ran = evil(
        lab,
        &[
            "sh",
            "-c",
            "ls -l /proc/self/fd /proc/*/fd 2>/dev/null | grep -E 'socket:|anon_inode|memfd|private' | grep -v 'pipe:' || true",
        ],
    )?;
    let open: Vec<&str> =
        ran.ok()?.lines().filter(|l| l.contains("memfd") || l.contains("private")).collect();
    ensure!(open.is_empty(), "{open:?}");
    evil(lab, &["sh", "-c", "mount --bind / /mnt"])?.failed()?;
    Ok(())
}

fn source_addresses(lab: &Lab) -> Result<()> {
    let neighbour = lab.pod_ip("app/neighbour", false)?;
    let server = lab.pod_ip("app/server", false)?;
    evil(lab, &[PROBE, "attack", "spoof", &neighbour, &format!("{server}:8080")])?.failed()?;
    // An unprivileged bind to a foreign address (IP_FREEBIND) is allowed by the kernel; the identity stays the pod's own.
    let before = lab.access_log("node-2")?.len();
    let ran = evil(
        lab,
        &[
            PROBE,
            "end",
            &format!("{server}:8080"),
            "--from",
            &neighbour,
            "--send",
            "GET / HTTP/1.0\r\n\r\n",
            "--timeout",
            "3",
        ],
    )?;
    let seen = lab.access_log("node-2")?;
    for line in seen.iter().skip(before) {
        ensure!(!line.get("src.identity").ends_with("/neighbour"), "{line:?} {ran:?}");
    }
    // From outside the mesh a foreign address gets no answer at all: the node drops it.
    let (own, outside) = (lab.pod_ip("app/evil", false)?, lab.pod_ip("plain/outside", false)?);
    let get = ["--send", "GET / HTTP/1.0\r\n\r\n", "--timeout", "2"];
    let to = format!("{outside}:8080");
    let naked =
        |from: &[&str]| lab.exec("plain/naked", &[&[PROBE, "end", &to], from, &get].concat());
    let ran = naked(&[])?;
    ensure!(ran.ok()?.contains("200 OK"), "{ran:?}");
    // Whether the kernel refuses to route it or the node drops it: nobody hears a foreign address.
    let ran = naked(&["--from", &own])?;
    ensure!(ran.out.contains("\"bytes\":0"), "{ran:?}");
    Ok(())
}

fn packets(lab: &Lab) -> Result<()> {
    evil(lab, &[PROBE, "attack", "packet"])?.failed_with(&["packet socket", "not permitted"])?;
    let probe = programs::path_of_ours("meshprobe")?;
    lab.exec("node-1", &[&probe, "attack", "packet"])?.ok()?;
    Ok(())
}

/// How a call from `place` to an address ends, and what it hears.
fn call(lab: &Lab, place: &str, to: &str) -> Result<Value> {
    let probe = if place.starts_with("node-") {
        programs::path_of_ours("meshprobe")?
    } else {
        PROBE.to_owned()
    };
    let ran = lab.exec(
        place,
        &[&probe, "end", to, "--send", "GET /metrics HTTP/1.0\r\n\r\n", "--timeout", "5"],
    )?;
    serde_json::from_str(ran.ok()?.lines().last().unwrap_or_default())
        .with_context(|| format!("{ran:?}"))
}

/// Every port of the mesh, from the pod, from its neighbours and on the node: no answer with content, nothing relayed.
fn mesh_ports(lab: &Lab) -> Result<()> {
    let own = lab.pod_ip("app/evil", false)?;
    let (neighbour, server) =
        (lab.pod_ip("app/neighbour", false)?, lab.pod_ip("app/server", false)?);
    let node = lab
        .status()?
        .nodes
        .first()
        .and_then(|n| n.addresses.first().cloned())
        .context("no node address")?;
    for port in [15000, 15001, 15006, 15008, 15020, 15021, 15053] {
        for ip in ["127.0.0.1", own.as_str(), &neighbour, &server] {
            for from in ["app/evil", "plain/naked"] {
                if from == "plain/naked" && ip == own {
                    continue;
                }
                let end = call(lab, from, &format!("{ip}:{port}"))?;
                // The tunnel port answers what is not TLS with an alert.
                let alert = port == 15008
                    && end["heard"].as_str().is_some_and(|h| h.starts_with("\u{15}\u{3}"));
                ensure!(end["bytes"] == 0 || alert, "{from} to {ip}:{port}: {end}");
                ensure!(end["end"] != "timeout", "{from} to {ip}:{port} was left hanging: {end}");
            }
        }
        // The admin page is for the node alone.
        let end = call(lab, "app/evil", &format!("{node}:15000"))?;
        ensure!(end["bytes"] == 0, "the admin page answers a pod: {end}");
    }
    // The control: there is something to be had there.
    let end = call(lab, "node-1", "127.0.0.1:15000")?;
    ensure!(end["bytes"].as_u64() > Some(0), "{end}");
    Ok(())
}

/// Key and certificates of a pod's identity, as PEM, stolen with the rights of the lab's root.
fn credentials(lab: &Lab, account: &str) -> Result<String> {
    let (state, probe) = (state(lab)?, programs::path_of_ours("meshprobe")?);
    let files = lab.exec("node-1", &["find", &state, "-name", "*.pem", "-path", "*node-1*"])?;
    for file in files.ok()?.lines() {
        let text = lab.exec("node-1", &["cat", file])?.out;
        let named = lab.exec_with("node-1", &[&probe, "identity"], &text, SOON)?;
        if named.out.trim() == format!("spiffe://cluster.local/ns/app/sa/{account}") {
            return Ok(text);
        }
    }
    bail!("no key of {account} in {files:?}")
}

/// CONNECT through the server's proxy, with credentials made or stolen.
fn tunnel(lab: &Lab, pem: &str, target: &str, more: &[&str]) -> Result<Value> {
    let probe = programs::path_of_ours("meshprobe")?;
    let gate = format!("{}:15008", lab.pod_ip("app/server", false)?);
    let get = "GET /who HTTP/1.0\r\n\r\n";
    let expect = "spiffe://cluster.local/ns/app/sa/server";
    let argv =
        [&[&probe, "tunnel", &gate, target, "--expect", expect, "--send", get], more].concat();
    let ran = lab.exec_with("node-1", &argv, pem, SOON)?;
    serde_json::from_str(ran.ok()?.lines().last().unwrap_or_default())
        .with_context(|| format!("{ran:?}"))
}

fn foreign_root(lab: &Lab) -> Result<()> {
    let pem = credentials(lab, "evil")?;
    let server = format!("{}:8080", lab.pod_ip("app/server", false)?);
    // The control: with the mesh's own certificate it works.
    let got = tunnel(lab, &pem, &server, &[])?;
    ensure!(
        got["connected"] == true && got["heard"].as_str().is_some_and(|h| h.contains("200 OK")),
        "{got}"
    );
    let before = lab.access_log("node-2")?.len();
    let got = tunnel(lab, &pem, &server, &["--foreign", "spiffe://cluster.local/ns/app/sa/evil"])?;
    ensure!(got["connected"] == false && got["status"].is_null(), "{got}");
    let line = lab.wait_for_access("node-2", before, &[("reason", "peer_certificate")])?;
    ensure!(line.get("src.identity").is_empty(), "{line:?}");
    Ok(())
}

fn wrong_targets(lab: &Lab) -> Result<()> {
    let pem = credentials(lab, "evil")?;
    let server = lab.pod_ip("app/server", false)?;
    let outside = lab.pod_ip("plain/outside", false)?;
    let check = |target: String, status: u16, reason: &str| -> Result<()> {
        let got = tunnel(lab, &pem, &target, &[])?;
        ensure!(got["connected"] == false && got["status"] == status, "{target}: {got}");
        ensure!(got["reason"].as_str().is_some_and(|r| r.contains(reason)), "{target}: {got}");
        Ok(())
    };
    check(format!("{outside}:8080"), 400, "destination_mismatch")?;
    check("127.0.0.1:8080".to_owned(), 400, "destination_mismatch")?;
    check("10.89.0.1:15012".to_owned(), 400, "destination_mismatch")?;
    for port in [15001, 15006, 15008] {
        check(format!("{server}:{port}"), 401, "mesh_port")
            .or_else(|_| check(format!("{server}:{port}"), 400, "mesh_port"))?;
    }
    check(format!("{server}:9999"), 503, "connect_failed")
}

/// The control plane signs nothing for those who show neither a node's token nor a node's certificate.
fn ca_without_credentials(lab: &Lab) -> Result<()> {
    let url = "https://10.89.0.1:15012/istio.v1.auth.IstioCertificateService/CreateCertificate";
    let ask = |from: &str, token: &str| {
        let header = format!("authorization: Bearer {token}");
        let mut argv =
            vec!["curl", "-sSk", "--http2", "--max-time", "3", "-D", "-", "-X", "POST", url];
        argv.extend([
            "-H",
            "content-type: application/grpc",
            "-H",
            "te: trailers",
            "--data-binary",
            "@-",
        ]);
        if !token.is_empty() {
            argv.extend(["-H", &header]);
        }
        // One empty message.
        lab.exec_with(from, &argv, "\0\0\0\0\0", SOON)
    };
    let made_up = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    for token in ["", made_up] {
        // Pods do not even reach it.
        for from in ["app/evil", "plain/naked"] {
            ask(from, token)?.failed()?;
        }
        // Who stands where the proxies stand reaches it, and gets nothing.
        let ran = ask("node-1", token)?;
        let text = ran.ok()?.to_ascii_lowercase();
        ensure!(text.contains("grpc-status: 16") && !text.contains("begin certificate"), "{ran:?}");
    }
    // It answers, and goes on to answer those who may ask: the proxies are still there.
    wait_until("the proxies to be well", SOON, || {
        Ok(lab
            .exec("node-1", &["curl", "-sS", "--fail", "http://localhost:15021/healthz/ready"])?
            .is_ok())
    })?;
    Ok(())
}
