//! `make demo`: two nodes and a small shop, and what one would show a colleague. Everything printed is real output.
//!
//! Needs our own programs and nothing else of the machine, and no root. Works on a copy of `examples/shop`. Ends clean,
//! also on Ctrl-C: the lab ends with this process.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::wire::Seen;
use e2e::{Background, Lab, Plan, programs, wait_for, wait_until};
use serde_json::Value;

/// For each wait: far above what is usual.
const SOON: Duration = Duration::from_secs(20);
const FRONTEND: &str = "shop/frontend";
/// What is looked for on the wire. It travels in the path of a request.
const CANARY: &str = "CANARY-the-password-is-swordfish";
const POLICY: &str = "\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-frontend, namespace: shop}
spec:
  selector: {matchLabels: {app: cart}}
  action: DENY
  rules:
    - from:
        - source: {principals: [\"cluster.local/ns/shop/sa/frontend\"]}
";

fn main() -> ExitCode {
    let mut stage = Stage {
        colored: std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none(),
        number: 0,
    };
    match demo(&mut stage) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // Nobody is left to tell when standard error is closed.
            let _ = writeln!(std::io::stderr(), "the demo failed: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn demo(stage: &mut Stage) -> Result<()> {
    let began = Instant::now();
    stage.title("Two nodes and a small shop, from a folder of Kubernetes YAML");
    let shop = Path::new("examples/shop");
    ensure!(shop.is_dir(), "start the demo in the project's folder: examples/shop is not here");
    stage.command(&format!("meshctl local up {}   # a copy of it", shop.display()));
    let lab = Plan::new().copy_of(shop).up()?;
    stage.text(&format!("up and ready after {:.1} s", began.elapsed().as_secs_f64()));
    stage.command("meshctl local status");
    let table = lab.meshctl(&["local", "status"])?;
    stage.output(table.ok()?);
    who_called_whom(stage, &lab)?;
    without_the_label(stage, &lab)?;
    a_policy_denies(stage, &lab)?;
    end(stage, lab, began)
}

fn who_called_whom(stage: &mut Stage, lab: &Lab) -> Result<()> {
    stage.title("Who calls whom, with which identity, and what is on the wire meanwhile");
    stage.text("A tap listens on the uplink of node-1. frontend (node-1) calls cart (node-2):");
    let before = [lab.access_log("node-1")?.len(), lab.access_log("node-2")?.len()];
    let seen = watch(lab, || {
        let who = call(stage, lab, "http://cart/who")?;
        let own = lab.pod_ip(FRONTEND, false)?;
        ensure!(who.contains(&own), "cart should have seen {own}, and says {who}");
        stage.text(&format!("cart saw the caller's own address, {own}. Now the canary:"));
        call(stage, lab, &format!("http://cart/{CANARY}")).map(|_| ())
    })?;
    for (node, before) in ["node-1", "node-2"].iter().zip(before) {
        let line = wait_for("the access-log line", SOON, || {
            let log = lab.process_log("ztunnel", Some(node))?;
            let mut lines = log.lines().filter(|l| l.contains("\taccess\t")).skip(before);
            Ok(lines.find(|l| l.contains("frontend")).map(str::to_owned))
        })?;
        stage.text(&format!("the access log of {node}:"));
        stage.output(&folded(&line));
    }
    seen.check_encrypted()?;
    stage.verdict(&format!(
        "{} packets to and from port 15008, all TLS 1.3 records ({} of them), canary absent",
        seen.tunnel_segments, seen.records
    ));
    Ok(())
}

fn without_the_label(stage: &mut Stage, lab: &Lab) -> Result<()> {
    let file = "00-namespaces.yaml";
    stage.title("The control: without the label, the same tap sees the canary");
    let labelled = std::fs::read_to_string(lab.folder().join(file))?;
    let plain: String = labelled
        .lines()
        .filter(|l| !l.contains("istio.io/dataplane-mode"))
        .map(|l| format!("{l}\n"))
        .collect();
    stage.text(&format!(
        "`istio.io/dataplane-mode: ambient` is taken out of {file}; no pod is restarted:"
    ));
    let plain = plain.replace("  labels:\n", "");
    lab.write(file, &plain)?;
    captured(lab, false)?;
    let seen = watch(lab, || call(stage, lab, &format!("http://cart/{CANARY}")).map(|_| ()))?;
    let clear: u64 = seen.plain.iter().map(|(_, n)| n).sum();
    // On port 15008 tunnels of before may still say goodbye.
    ensure!(seen.canary && clear > 0, "plaintext was expected: {seen}");
    stage.verdict(&format!("{clear} packets in the clear, canary PRESENT"));
    stage.text("The label is back:");
    lab.write(file, &labelled)?;
    captured(lab, true)?;
    let seen = wait_for("encryption to be back", SOON, || {
        let seen = watch(lab, || call_quietly(lab, &format!("http://cart/{CANARY}")).map(|_| ()))?;
        Ok((seen.plain.is_empty() && seen.tunnel_segments > 0).then_some(seen))
    })?;
    ensure!(!seen.canary, "{seen}");
    stage.verdict(&format!(
        "{} packets on port 15008 and none beside, canary absent",
        seen.tunnel_segments
    ));
    Ok(())
}

fn a_policy_denies(stage: &mut Stage, lab: &Lab) -> Result<()> {
    stage.title("A policy cuts a live connection, and says which rule it was");
    stage.command("meshctl local exec shop/frontend -- meshload ping http://cart/who --every 0.1   # one connection");
    let argv = ["meshload", "ping", "http://cart/who", "--every", "0.1"];
    let mut live: Background = lab.exec_in_background(FRONTEND, &argv)?;
    wait_until("three answers", SOON, || {
        ensure!(live.is_running()?, "{}{}", live.out(), live.err());
        Ok(live.out().lines().count() >= 3)
    })?;
    stage.output(live.out().lines().take(3).collect::<Vec<_>>().join("\n").as_str());
    let before = lab.access_log("node-2")?.len();
    stage.command("cat 30-policy.yaml   # written into the folder now");
    stage.output(POLICY.trim_end());
    let written = Instant::now();
    lab.write("30-policy.yaml", POLICY)?;
    wait_until("the connection to be cut", SOON, || Ok(!live.is_running()?))?;
    let took = written.elapsed();
    let said = live.wait(SOON)?;
    stage.output(said.out.lines().last().unwrap_or_default());
    lab.wait_for_access("node-2", before, &[("reason", "policy_changed")])?;
    let log = lab.process_log("ztunnel", Some("node-2"))?;
    let line =
        log.lines().rev().find(|l| l.contains("policy_changed")).context("no line says why")?;
    stage.text("the access log of node-2:");
    stage.output(&folded(line));
    stage.verdict(&format!("cut {} ms after the file was written", took.as_millis()));
    stage.command("meshctl can shop/frontend shop/cart");
    let can = lab.can("shop/frontend", "shop/cart")?;
    ensure!(can.code == 1 && can.out.contains("30-policy.yaml:"), "{can:?}");
    stage.output(can.out.trim());
    stage.text("The file is removed, and the call works again:");
    lab.remove("30-policy.yaml")?;
    wait_until("the call to work", SOON, || Ok(call_quietly(lab, "http://cart/who").is_ok()))?;
    call(stage, lab, "http://cart/who")?;
    Ok(())
}

fn end(stage: &mut Stage, lab: Lab, began: Instant) -> Result<()> {
    stage.title("The end");
    let belongings = lab.belongings()?;
    stage.command("meshctl local down");
    lab.down()?;
    stage.verdict(&format!(
        "{} processes and {} namespaces are gone, and nothing is left; {:.0} s in all",
        belongings.processes(),
        belongings.namespaces(),
        began.elapsed().as_secs_f64()
    ));
    Ok(())
}

/// An access-log line, broken where its parts begin.
fn folded(line: &str) -> String {
    let mut text = line.replace('\t', "  ");
    for part in ["src.addr=", "dst.addr=", "direction=", "reason=", "error="] {
        text = text.replacen(&format!(" {part}"), &format!("\n    {part}"), 1);
    }
    text
}

/// Calls from the frontend, and shows it.
fn call(stage: &Stage, lab: &Lab, url: &str) -> Result<String> {
    stage.command(&format!("meshctl local exec {FRONTEND} -- meshload get {url}"));
    let answer = call_quietly(lab, url)?;
    let short = if answer.starts_with('{') {
        answer.as_str()
    } else {
        "(the answer of a fixed size is left out)"
    };
    stage.output(short);
    Ok(answer)
}

fn call_quietly(lab: &Lab, url: &str) -> Result<String> {
    let ran = lab.exec(FRONTEND, &["meshload", "get", url])?;
    Ok(ran.ok()?.to_owned())
}

/// Watches the uplink of node-1 while `act` runs.
fn watch(lab: &Lab, act: impl FnOnce() -> Result<()>) -> Result<Seen> {
    let probe = programs::path_of_ours("meshprobe")?;
    let mut tap = lab.exec_in_background("node-1", &[&probe, "tap", "--canary", CANARY])?;
    wait_until("the tap to be open", SOON, || {
        ensure!(tap.is_running()?, "the tap ended: {}", tap.err());
        Ok(tap.out().contains("ready"))
    })?;
    act()?;
    tap.close_input();
    let ran = tap.wait(SOON)?;
    let last: Value = serde_json::from_str(ran.ok()?.lines().last().unwrap_or_default())?;
    Ok(serde_json::from_value(last)?)
}

/// Waits until the shop's pods are in the mesh, or out of it.
fn captured(lab: &Lab, want: bool) -> Result<()> {
    wait_until("the pods' capture to change", SOON, || {
        let status = lab.status()?;
        Ok(status
            .pods
            .iter()
            .filter(|p| p.namespace == "shop")
            .all(|p| p.captured == want && p.ready))
    })?;
    Ok(())
}

/// Where it is told. Colours only at a terminal.
struct Stage {
    colored: bool,
    number: u32,
}

impl Stage {
    fn title(&mut self, text: &str) {
        self.number += 1;
        self.say(&format!("\n{}", self.paint("1;36", &format!("{}. {text}", self.number))));
    }

    fn text(&self, text: &str) {
        self.say(text);
    }

    fn command(&self, text: &str) {
        self.say(&format!("{} {}", self.paint("32", "$"), self.paint("1", text)));
    }

    fn output(&self, text: &str) {
        for line in text.lines() {
            self.say(&format!("    {}", self.paint("2", line)));
        }
    }

    fn verdict(&self, text: &str) {
        self.say(&format!("{} {text}", self.paint("1;32", "=>")));
    }

    fn paint(&self, color: &str, text: &str) -> String {
        if self.colored { format!("\x1b[{color}m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn say(&self, text: &str) {
        // A reader that went away stops nothing: the lab still has to be ended.
        let _ = writeln!(std::io::stdout(), "{text}");
    }
}
