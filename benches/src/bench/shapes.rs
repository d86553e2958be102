//! Shapes of traffic beyond the paired lines: both ends on one node, IPv6, many policies, DNS, HTTP/2, latency under
//! churn, a hundred pairs at once. A mesh of their own; every shape has its arms, measured in turns.

use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::procfs::Cpu;
use super::results::{Kind, Sample};
use super::world::{Arm, Outcome, World, watch};

/// Policies in the namespace of that shape, of which one lets the client in.
const POLICIES: u32 = 1_000;
/// Pairs that are busy at once.
pub const PAIRS: usize = 100;
/// Two hundred pods start on two cores.
const UP_LIMIT: Duration = Duration::from_secs(300);
const POLL: Duration = Duration::from_millis(500);
const NAMESPACES: &[&str] = &["plain", "mesh", "direct", "policy"];

/// One way to do the work of a shape.
#[derive(Clone, Copy, Debug)]
struct Way {
    title: &'static str,
    /// Where the client runs: `NAMESPACE/POD`.
    client: &'static str,
    /// `NAMESPACE/POD` of the server.
    server: &'static str,
    ipv6: bool,
}

const fn way(title: &'static str, client: &'static str, server: &'static str) -> Way {
    Way { title, client, server, ipv6: false }
}

/// Some work, done in several ways.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub id: &'static str,
    title: &'static str,
    kind: Kind,
    work: Work,
    ways: &'static [Way],
}

#[derive(Clone, Copy, Debug)]
enum Work {
    /// `meshload` with these arguments, to this port.
    Load(&'static [&'static str], u16),
    /// The same, while another client opens one connection after the other to the same server.
    Churn(&'static [&'static str], u16),
    /// Questions for the server's Service.
    Dns,
    /// The real h2load against the real nghttpd.
    H2,
    /// h2load again, calling a gRPC method of the echo server.
    Grpc,
    /// A hundred clients at once; a `*` in the way stands for the number of each.
    Pairs,
}

/// The echo server's method.
const GRPC_METHOD: &str = "/proto.EchoTestService/Echo";
/// h2load takes a body from a file only: one message, field 1 is the text `a`.
const GRPC_CALL: [&str; 4] = [
    "sh",
    "-c",
    "printf '\\0\\0\\0\\0\\3\\12\\1a' >/tmp/call; exec h2load -d /tmp/call \
     -H 'content-type: application/grpc' -H 'te: trailers' \"$@\"",
    "h2load",
];

const BULK: Work = Work::Load(&["send", "-n", "1"], 8081);
const REQUESTS: Work = Work::Load(&["closed", "-n", "16"], 8080);
const CONNECTIONS: Work = Work::Load(&["connect", "-n", "16", "--closing", "reset"], 8080);
const RATE: Work = Work::Churn(&["rate", "-n", "16", "--rate", "1000"], 8080);

const NEAR: &[Way] = &[
    way("no mesh", "plain/client", "plain/near"),
    way("encrypted to oneself", "mesh/client", "mesh/near"),
    way("joined", "direct/client", "direct/near"),
];
const FAMILIES: &[Way] = &[
    Way { ipv6: true, ..way("no mesh, IPv6", "plain/client", "plain/far") },
    way("mesh, IPv4", "mesh/client", "mesh/far"),
    Way { ipv6: true, ..way("mesh, IPv6", "mesh/client", "mesh/far") },
];
const POLICED: &[Way] = &[
    way("no policy", "mesh/client", "mesh/far"),
    way("1,000 policies", "policy/client", "policy/far"),
];
const PLAIN_AND_MESH: &[Way] =
    &[way("no mesh", "plain/client", "plain/far"), way("mesh", "mesh/client", "mesh/far")];

const PAIRED: &[Way] = &[
    way("one pair", "mesh/client", "mesh/far"),
    way("100 pairs", "mesh/client-*", "mesh/server-*"),
];

const fn shape(
    id: &'static str,
    title: &'static str,
    kind: Kind,
    work: Work,
    ways: &'static [Way],
) -> Shape {
    Shape { id, title, kind, work, ways }
}

pub const SHAPES: &[Shape] = &[
    shape("near-bulk", "One node: bulk, 1 stream", Kind::Bulk, BULK, NEAR),
    shape("near-requests", "One node: requests, 16 connections", Kind::Requests, REQUESTS, NEAR),
    shape(
        "near-connections",
        "One node: new connections, 16 at a time",
        Kind::Connections,
        CONNECTIONS,
        NEAR,
    ),
    shape("ipv6-bulk", "IPv6: bulk, 1 stream", Kind::Bulk, BULK, FAMILIES),
    shape("ipv6-requests", "IPv6: requests, 16 connections", Kind::Requests, REQUESTS, FAMILIES),
    shape(
        "policies-requests",
        "Policies: requests, 16 connections",
        Kind::Requests,
        REQUESTS,
        POLICED,
    ),
    shape(
        "policies-connections",
        "Policies: new connections, 16 at a time",
        Kind::Connections,
        CONNECTIONS,
        POLICED,
    ),
    shape("dns", "DNS: questions, 8 sockets", Kind::Questions, Work::Dns, PLAIN_AND_MESH),
    shape(
        "h2",
        "HTTP/2: h2load, 4 connections of 16 streams",
        Kind::Requests,
        Work::H2,
        PLAIN_AND_MESH,
    ),
    shape(
        "grpc",
        "gRPC: h2load, 4 connections of 16 calls",
        Kind::Requests,
        Work::Grpc,
        PLAIN_AND_MESH,
    ),
    shape(
        "churn",
        "1000 requests/s on 16 connections under churn",
        Kind::Rate,
        RATE,
        PLAIN_AND_MESH,
    ),
    shape("pairs", "100 clients at once, 1 connection each", Kind::Requests, Work::Pairs, PAIRED),
];

/// What was measured of a shape.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Measured {
    pub id: String,
    pub title: String,
    pub kind: Kind,
    /// In the order of the shape's ways.
    pub ways: Vec<MeasuredWay>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MeasuredWay {
    pub title: String,
    pub samples: Vec<Sample>,
}

/// A mesh with everything that the shapes need.
#[derive(Debug)]
pub struct Place<'w> {
    world: &'w World,
    pids: Vec<i32>,
    status: Value,
}

impl<'w> Place<'w> {
    /// Waits until every pod is ready and where it belongs.
    pub fn ready(world: &'w World) -> Result<Self> {
        let until = Instant::now() + UP_LIMIT;
        loop {
            let unready = match world.status() {
                Ok(status) => {
                    let unready = unready(&status);
                    if unready.is_empty() {
                        let pids = world.proxies()?.iter().map(|p| p.pid).collect();
                        return Ok(Self { world, pids, status });
                    }
                    unready.join(", ")
                }
                Err(error) => format!("{error:#}"),
            };
            ensure!(Instant::now() < until, "the mesh is not up: {unready}");
            thread::sleep(POLL);
        }
    }

    fn address(&self, pod: &str, ipv6: bool) -> Result<String> {
        let (namespace, name) = pod.split_once('/').context("NAMESPACE/POD")?;
        let all = self.status["pods"].as_array().context("no pods")?;
        let found = all.iter().find(|p| p["namespace"] == namespace && p["name"] == name);
        let ips =
            found.and_then(|p| p["ips"].as_array()).with_context(|| format!("no pod {pod}"))?;
        let mut texts = ips.iter().filter_map(Value::as_str);
        let ip = texts
            .find(|ip| ip.contains(':') == ipv6)
            .with_context(|| format!("no address of {pod}"))?;
        Ok(if ipv6 { format!("[{ip}]") } else { ip.to_owned() })
    }

    /// Measures the ways of a shape in turns.
    pub fn measure(&self, shape: &Shape, rounds: u32, seconds: f64) -> Result<Measured> {
        let mut ways: Vec<MeasuredWay> = shape
            .ways
            .iter()
            .map(|w| MeasuredWay { title: w.title.to_owned(), samples: vec![] })
            .collect();
        for round in 0..rounds {
            for turn in 0..ways.len() {
                let index = (turn + round as usize) % ways.len();
                let outcome = self
                    .once(shape, &shape.ways[index], seconds)
                    .with_context(|| format!("{}: {}", shape.id, shape.ways[index].title))?;
                // Which arm it is says the way; the sample's own field knows two.
                let arm = if index == 0 { Arm::Plain } else { Arm::Mesh };
                ways[index].samples.push(Sample::of(shape.kind, arm, round, outcome));
            }
        }
        Ok(Measured { id: shape.id.into(), title: shape.title.into(), kind: shape.kind, ways })
    }

    fn once(&self, shape: &Shape, way: &Way, seconds: f64) -> Result<Outcome> {
        let time = seconds.to_string();
        let to = |port: u16| {
            Ok::<_, anyhow::Error>(format!("{}:{port}", self.address(way.server, way.ipv6)?))
        };
        match shape.work {
            Work::Load(arguments, port) => self.load(way.client, arguments, &to(port)?, &time),
            Work::Churn(arguments, port) => {
                let to = to(port)?;
                let churn = ["connect", "-n", "1", "--closing", "reset", "--to", &to, "-d", &time];
                let mut other = self.meshload(way.client, &churn).stdout(Stdio::null()).spawn()?;
                let outcome = self.load(way.client, arguments, &to, &time);
                other.wait()?;
                outcome
            }
            Work::Dns => {
                let name = format!(
                    "far.{}.svc.cluster.local",
                    way.client.split('/').next().unwrap_or_default()
                );
                self.load(
                    way.client,
                    &["dns", "-n", "8", &name],
                    &self.resolver(way.client)?,
                    &time,
                )
            }
            Work::H2 => self.h2(way, seconds, &["h2load"], &self.url(way, 8088, "/")?),
            Work::Grpc => self.h2(way, seconds, &GRPC_CALL, &self.url(way, 7070, GRPC_METHOD)?),
            Work::Pairs => self.pairs(way, seconds),
        }
    }

    fn meshload(&self, pod: &str, arguments: &[&str]) -> Command {
        let argv: Vec<&str> =
            std::iter::once("meshload").chain(arguments.iter().copied()).collect();
        self.world.command_in(pod, &argv)
    }

    fn load(&self, pod: &str, arguments: &[&str], to: &str, seconds: &str) -> Result<Outcome> {
        let arguments = [arguments, &["--to", to, "-d", seconds]].concat();
        watch(self.meshload(pod, &arguments), &self.pids, |_| Ok(()))
    }

    fn resolver(&self, pod: &str) -> Result<String> {
        let output = self.world.command_in(pod, &["cat", "/etc/resolv.conf"]).output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let server = text.lines().find_map(|l| l.strip_prefix("nameserver "));
        Ok(format!("{}:53", server.with_context(|| format!("no nameserver in {text:?}"))?.trim()))
    }

    fn url(&self, way: &Way, port: u16, path: &str) -> Result<String> {
        Ok(format!("http://{}:{port}{path}", self.address(way.server, way.ipv6)?))
    }

    /// h2load prints text: the CPU is read around the whole program.
    fn h2(&self, way: &Way, seconds: f64, program: &[&str], url: &str) -> Result<Outcome> {
        // nghttpd answers that the path is not there, which is small as well; h2load counts it apart.
        let time = (seconds.ceil().max(1.0)).to_string();
        let argv = [program, &["-c", "4", "-m", "16", "-t", "1", "-D", &time, url]].concat();
        let before = Cpu::now(&self.pids)?;
        let output = self.world.command_in(way.client, &argv).output()?;
        let after = Cpu::now(&self.pids)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            output.status.success(),
            "h2load: {text} {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(Outcome {
            result: h2load(&text).with_context(|| format!("h2load printed {text:?}"))?,
            before,
            after,
        })
    }

    /// All clients start together and run for the same time; their rates are added.
    fn pairs(&self, way: &Way, seconds: f64) -> Result<Outcome> {
        // Long enough that the start of a hundred clients is a small part.
        let time = (seconds * 3.0).to_string();
        let before = Cpu::now(&self.pids)?;
        let mut clients = Vec::new();
        for pair in 0..PAIRS {
            let of_pair = |name: &str| name.replace('*', &pair.to_string());
            let to = format!("{}:8080", self.address(&of_pair(way.server), false)?);
            let arguments = ["closed", "-n", "1", "--to", &to, "-d", &time];
            let mut command = self.meshload(&of_pair(way.client), &arguments);
            clients.push(command.stdout(Stdio::piped()).spawn()?);
        }
        let (mut requests, mut rate, mut errors) = (0, 0.0, 0);
        for client in clients {
            let output = client.wait_with_output()?;
            ensure!(output.status.success(), "a client failed: {}", output.status);
            let text = String::from_utf8_lossy(&output.stdout);
            let result: Value = serde_json::from_str(text.lines().last().unwrap_or_default())?;
            requests += result["requests"].as_u64().unwrap_or_default();
            rate += result["per_second"].as_f64().unwrap_or_default();
            errors += result["errors"]
                .as_object()
                .map_or(0, |e| e.values().filter_map(Value::as_u64).sum());
        }
        let after = Cpu::now(&self.pids)?;
        let result = json!({"requests": requests, "per_second": rate, "errors": {"any": errors}});
        Ok(Outcome { result, before, after })
    }
}

fn unready(status: &Value) -> Vec<String> {
    let pods = status["pods"].as_array().map(Vec::as_slice).unwrap_or_default();
    if pods.is_empty() {
        return vec!["no pod yet".to_owned()];
    }
    let belongs =
        |p: &Value| (p["namespace"] != "plain") == p["captured"].as_bool().unwrap_or(false);
    let bad = pods.iter().filter(|p| p["ready"] != true || !belongs(p));
    bad.map(|p| format!("{}/{}: {}", p["namespace"], p["name"], p["message"])).collect()
}

/// `finished in 2.00s, 12345.50 req/s, 1.2MB/s` and `requests: 24691 total, … 24691 done, … 0 failed, 0 errored, 0 timeout`.
fn h2load(text: &str) -> Option<Value> {
    let rate = text.lines().find_map(|l| l.strip_prefix("finished in "))?;
    let rate: f64 = rate.split(", ").find_map(|p| p.strip_suffix(" req/s"))?.parse().ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("requests: "))?;
    let count = |what: &str| {
        line.split(", ")
            .find_map(|p| p.strip_suffix(what))
            .and_then(|n| n.trim().parse::<u64>().ok())
    };
    // An answer is an answer: the page's status is not h2load's to judge here.
    Some(json!({
        "requests": count(" done")?, "per_second": rate,
        "errors": {"errored": count(" errored")?, "timeout": count(" timeout")?},
    }))
}

/// Namespaces with a client on node-1, a server beside it and one on node-2.
/// `echo` is the echo server's program.
pub fn manifest(echo: &Path) -> String {
    let mut yaml = String::new();
    for namespace in NAMESPACES {
        let mode = if *namespace == "plain" { "none" } else { "ambient" };
        yaml += &format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {namespace}, labels: {{istio.io/dataplane-mode: {mode}}}}}\n---\n"
        );
        for (name, node, command) in [("client", 1, "pause"), ("near", 1, "all"), ("far", 2, "all")]
        {
            let echo = (*namespace != "direct" && name == "far").then_some(echo);
            yaml += &pod(namespace, name, node, command, echo);
        }
        yaml += &format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: far, namespace: {namespace}}}\n\
             spec: {{selector: {{app: far}}, ports: [{{name: http, port: 80, targetPort: 8080}}]}}\n---\n"
        );
    }
    for pair in 0..PAIRS {
        yaml += &pod("mesh", &format!("client-{pair}"), 1, "pause", None);
        yaml += &pod("mesh", &format!("server-{pair}"), 2, "all", None);
    }
    for policy in 0..POLICIES {
        let user =
            if policy == POLICIES - 1 { "client".to_owned() } else { format!("user-{policy}") };
        yaml += &format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: allow-{policy}, namespace: policy}}\n\
             spec: {{selector: {{matchLabels: {{app: far}}}}, action: ALLOW, rules: [{{from: [{{source: {{principals: \
             [cluster.local/ns/policy/sa/{user}]}}}}]}}]}}\n---\n"
        );
    }
    yaml
}

/// With `echo`, HTTP/2 and gRPC servers beside the usual one.
fn pod(namespace: &str, name: &str, node: u16, command: &str, echo: Option<&Path>) -> String {
    let more = echo.map_or_else(String::new, |echo| {
        format!(
            "\n  - {{name: h2, command: [nghttpd, --no-tls, -d, /tmp, '8088']}}\n  \
             - {{name: grpc, command: ['{}', --grpc, '7070']}}",
            echo.display()
        )
    });
    format!(
        "apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {name}, namespace: {namespace}}}\n---\n\
         apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}\nspec:\n  \
         nodeName: node-{node}\n  serviceAccountName: {name}\n  containers:\n  - {{name: main, image: meshload, args: [--label, {namespace}/{name}, {command}]}}{more}\n---\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_h2load_prints() {
        let text = "starting benchmark...\n\nfinished in 2.01s, 12345.50 req/s, 1.20MB/s\n\
                    requests: 24691 total, 24755 started, 24690 done, 0 succeeded, 24690 failed, 1 errored, 2 timeout\n";
        let got = h2load(text).unwrap();
        assert_eq!(got["requests"], 24_690);
        assert_eq!(got["per_second"], 12_345.5);
        assert_eq!(got["errors"], json!({"errored": 1, "timeout": 2}));
        assert_eq!(h2load("nothing"), None);
    }
}
