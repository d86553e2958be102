//! A waypoint's place: three nodes, a hundred Services, our node proxies, and four ways from a client to a server: no mesh,
//! layer 4, our waypoint, Envoy as the waypoint.
//!
//! `client (node-1) -> ztunnel -> HBONE -> waypoint -> HBONE -> ztunnel -> v1 or v2 (node-2)`. Envoy has the certificate of the
//! waypoint that it stands for, signed with the mesh's key, which whoever runs a mesh holds.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rcgen::{
    CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use serde_json::Value;

use super::envoy::{self, Secrets};
use super::routes::{TO_CLIENT, http_routes};
use super::{Doing, HttpResults, MemoryRow, Role, in_turns};
use crate::bench::procfs::{Memory, descendants};
use crate::bench::world::{Programs, World, watch};

const NODES: usize = 3;
/// Services beside those that are called, a pod each.
const SERVICES: usize = 100;
/// A hundred pods and more start on two cores.
const UP_LIMIT: Duration = Duration::from_secs(240);
const POLL: Duration = Duration::from_millis(250);
/// From the last pod to the reading of memory.
const SETTLE: Duration = Duration::from_secs(3);
/// Namespaces, what each is called on the page, and whether it is in the mesh.
const WAYS: &[(&str, &str)] = &[
    ("plain", "no mesh"),
    ("layer4", "layer 4"),
    ("routed", "layer 4 and waypoint"),
    (ENVOYED, "layer 4 and Envoy"),
];
/// Where Envoy is the waypoint.
const ENVOYED: &str = "envoyed";
/// With a waypoint and many routes.
pub(super) const CROWDED: &str = "crowded";
/// The identity of Envoy.
const ENVOY: &str = "spiffe://cluster.local/ns/envoyed/sa/waypoint";

/// The loads, by id: title and arguments of `meshload`.
const LOADS: &[(&str, &str, &[&str])] = &[
    ("mesh-1", "1 connection", &["closed", "-n", "1"]),
    ("mesh-16", "16 connections", &["closed", "-n", "16"]),
    ("mesh-64", "64 connections", &["closed", "-n", "64"]),
    ("mesh-rate", "1000 requests/s on 16 connections", &["rate", "-n", "16", "--rate", "1000"]),
];

/// A running mesh of this part.
#[derive(Debug)]
pub struct Place {
    pub(super) world: World,
    status: Value,
}

impl Place {
    /// Starts the mesh, Envoy in it, and waits until every way leads where it should.
    pub fn up(programs: &Programs, folder: &Path) -> Result<Self> {
        let folder = folder.join("http-mesh");
        let image = format!("envoy={}", envoy::program()?.display());
        let more = ["--image", image.as_str()];
        let world = World::start(programs, &folder, "bench-http", NODES, &manifest(), &more)?;
        let mut place = Self { world, status: Value::Null };
        place.until("the pods", |p| p.settled())?;
        place.start_envoy()?;
        place.until("Envoy's pod", |p| p.settled())?;
        place.until("the ways", |p| WAYS.iter().try_for_each(|(ns, _)| p.leads(ns)))?;
        Ok(place)
    }

    /// Many routes for one namespace, which has none before.
    pub(super) fn crowd(&self, routes: usize) -> Result<()> {
        let mut files = (0..).zip(crowd_files(routes));
        files.try_for_each(|(n, part)| self.world.write(&format!("crowd-{n}.yaml"), &part))
    }

    fn until(&mut self, what: &str, look: impl Fn(&Self) -> Result<()>) -> Result<()> {
        let until = Instant::now() + UP_LIMIT;
        loop {
            let found = match self.world.status() {
                Ok(status) => {
                    self.status = status;
                    look(self)
                }
                Err(error) => Err(error),
            };
            match found {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() > until => {
                    return Err(error.context(format!("waited for {what}")));
                }
                Err(_) => thread::sleep(POLL),
            }
        }
    }

    /// Every pod is ready, and captured where it should be.
    fn settled(&self) -> Result<()> {
        let pods = self.status["pods"].as_array().context("no pods")?;
        ensure!(pods.len() > SERVICES, "{} pods", pods.len());
        for pod in pods {
            let name = pod["name"].as_str().unwrap_or_default();
            let own = name.starts_with("waypoint");
            let meshed = pod["namespace"] != "plain" && !own;
            let captured = pod["captured"].as_bool().unwrap_or(false);
            ensure!(
                pod["ready"] == true && captured == meshed,
                "{}/{name}: {} (ready {}, captured {captured})",
                pod["namespace"],
                pod["message"],
                pod["ready"]
            );
        }
        Ok(())
    }

    /// The answers of a namespace's Service come through its waypoint, or through none.
    fn leads(&self, namespace: &str) -> Result<()> {
        let url = format!("http://{}/", self.service(namespace)?);
        let argv =
            ["meshload", "watch", &url, "--header", TO_CLIENT.0, "-d", "0.01", "--timeout", "2"];
        let output = self.world.command_in(&client(namespace), &argv).output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let line: Value = serde_json::from_str(text.lines().next().unwrap_or_default())
            .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
        let want = if namespace == "plain" || namespace == "layer4" { "" } else { TO_CLIENT.1 };
        ensure!(line["value"] == want && line["status"] == 200, "{namespace}: {line}");
        Ok(())
    }

    /// `IP:80` of the Service that is called.
    pub(super) fn service(&self, namespace: &str) -> Result<String> {
        let all = self.status["services"].as_array().context("no services")?;
        let found = all.iter().find(|s| s["namespace"] == namespace && s["name"] == "web");
        let ips = found.and_then(|s| s["addresses"].as_array());
        let ips = ips.with_context(|| format!("no Service web of {namespace}"))?;
        let ip = ips.iter().filter_map(Value::as_str).find(|ip| !ip.contains(':'));
        Ok(format!("{}:80", ip.context("no IPv4 address")?))
    }

    fn pod_ip(&self, namespace: &str, name: &str) -> Result<String> {
        let all = self.status["pods"].as_array().context("no pods")?;
        let found = all.iter().find(|p| p["namespace"] == namespace && p["name"] == name);
        let ips = found.and_then(|p| p["ips"].as_array());
        let ips = ips.with_context(|| format!("no pod {namespace}/{name}"))?;
        let ip = ips.iter().filter_map(Value::as_str).find(|ip| !ip.contains(':'));
        Ok(ip.context("no IPv4 address")?.to_owned())
    }

    fn start_envoy(&self) -> Result<()> {
        let secrets = self.certify()?;
        let [v1, v2] = ["v1", "v2"].map(|name| self.pod_ip(ENVOYED, name));
        let config = envoy::waypoint(&secrets, &format!("{}:8080", v1?), &format!("{}:8080", v2?));
        let args = serde_json::json!([
            "--config-yaml",
            config.to_string(),
            "--concurrency",
            envoy::WORKERS,
            "--disable-hot-restart",
            "--log-level",
            "warning"
        ]);
        let pod = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: waypoint, namespace: {ENVOYED}, labels: {{app: waypoint, \
             istio.io/dataplane-mode: none, networking.istio.io/tunnel: http}}}}\nspec:\n  nodeName: node-3\n  \
             serviceAccountName: waypoint\n  containers:\n  - name: envoy\n    image: envoy\n    args: {args}\n    \
             readinessProbe: {{tcpSocket: {{port: 15008}}, periodSeconds: 1}}\n"
        );
        self.world.write("envoy.yaml", &pod)
    }

    /// A certificate of the mesh's CA for Envoy.
    fn certify(&self) -> Result<Secrets> {
        let log = self.status["processes"][0]["log"].as_str().context("no processes")?;
        let (state, _) = log.rsplit_once("/logs/").context("the log lies in STATE/logs")?;
        let run = |argv: &[&str]| -> Result<String> {
            let output = self.world.command_in("node-1", argv).output()?;
            ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            Ok(String::from_utf8(output.stdout)?)
        };
        let key = run(&["find", state, "-name", "intermediate-key.pem"])?;
        let folder = key.trim().strip_suffix("/intermediate-key.pem").context("one CA")?.to_owned();
        let read = |file: &str| run(&["cat", &format!("{folder}/{file}.pem")]);
        let above = read("intermediate-cert")?;
        let issuer =
            Issuer::from_ca_cert_pem(&above, KeyPair::from_pem(&read("intermediate-key")?)?)?;
        let mut params = CertificateParams::new(vec![])?;
        params.subject_alt_names = vec![SanType::URI(ENVOY.to_owned().try_into()?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let own = KeyPair::generate()?;
        let chain = params.signed_by(&own, &issuer)?.pem() + &above;
        Ok(Secrets { chain, key: own.serialize_pem(), root: read("root-cert")? })
    }

    /// The waypoint's process of a namespace: ours or Envoy.
    fn waypoint(&self, namespace: &str) -> Result<i32> {
        let all = descendants(self.world.launcher());
        let found = all.iter().find(|p| match namespace {
            ENVOYED => p.program() == "envoy",
            _ => p.program() == "waypoint" && environment(p.pid, "POD_NAMESPACE") == namespace,
        });
        Ok(found.with_context(|| format!("no waypoint of {namespace} runs"))?.pid)
    }

    /// The processes that a change of a route passes through.
    pub(super) fn movers(&self, namespace: &str) -> Result<Vec<i32>> {
        let all = descendants(self.world.launcher());
        let plane = all.iter().find(|p| p.program() == "istiod-lite").context("no istiod-lite")?;
        Ok(vec![plane.pid, self.waypoint(namespace)?])
    }

    fn roles(&self, namespace: &str) -> Result<Vec<Role>> {
        if namespace == "plain" {
            return Ok(vec![]);
        }
        let nodes = self.world.proxies()?;
        let mut roles: Vec<Role> = ["ztunnel of the client", "ztunnel of the server"]
            .iter()
            .zip(&nodes)
            .map(|(name, process)| Role::new(name, process.pid))
            .collect();
        if namespace != "layer4" {
            roles.push(Role::new("waypoint", self.waypoint(namespace)?));
        }
        Ok(roles)
    }

    /// Measures every load in every way.
    pub fn measure(&self, results: &mut HttpResults) -> Result<()> {
        thread::sleep(SETTLE);
        let mut memory = self.memory()?;
        for (id, title, arguments) in LOADS {
            let mut ways = Vec::new();
            for (namespace, name) in WAYS {
                let (to, roles) = (self.service(namespace)?, self.roles(namespace)?);
                let pids: Vec<i32> = roles.iter().map(|r| r.pid).collect();
                let seconds = results.seconds.to_string();
                let once = move || {
                    let mut argv = vec!["meshload"];
                    argv.extend(*arguments);
                    argv.extend(["--to", to.as_str(), "-d", seconds.as_str()]);
                    watch(self.world.command_in(&client(namespace), &argv), &pids, |_| Ok(()))
                };
                ways.push(Doing { title: name, roles, once: Box::new(once) });
            }
            results.lines.push(in_turns(id, title, results.rounds, &ways)?);
        }
        for (row, after) in memory.iter_mut().zip(self.memory()?) {
            (row.after_load_mb, row.peak_mb) = (after.after_load_mb, after.peak_mb);
        }
        results.memory.extend(memory);
        Ok(())
    }

    fn memory(&self) -> Result<Vec<MemoryRow>> {
        let mut all: Vec<(String, i32)> = (1..)
            .zip(self.world.proxies()?)
            .map(|(n, p)| (format!("ztunnel of node-{n}"), p.pid))
            .collect();
        all.push(("waypoint of routed".to_owned(), self.waypoint("routed")?));
        all.push(("Envoy as waypoint of envoyed".to_owned(), self.waypoint(ENVOYED)?));
        let title = format!("{NODES} nodes, {SERVICES} Services");
        all.into_iter().map(|(process, pid)| memory_of(&title, &process, pid)).collect()
    }

    /// The waypoint with the many routes.
    pub(super) fn crowded_memory(&self) -> Result<MemoryRow> {
        memory_of("the same, and many routes", "waypoint of crowded", self.waypoint(CROWDED)?)
    }

    /// Starts a client that tells when an answer's header changes.
    pub(super) fn watcher(&self, namespace: &str, header: &str, seconds: f64) -> Result<Child> {
        let url = format!("http://{}/probe", self.service(namespace)?);
        let time = seconds.to_string();
        let argv = ["meshload", "watch", &url, "--header", header, "-d", &time];
        let mut command: Command = self.world.command_in(&client(namespace), &argv);
        Ok(command.stdout(Stdio::piped()).spawn()?)
    }

    pub fn pin_congestion(&self) -> Result<()> {
        self.world.pin_congestion()
    }

    pub fn down(self) -> Result<()> {
        self.world.down()
    }
}

/// At this moment.
fn memory_of(title: &str, process: &str, pid: i32) -> Result<MemoryRow> {
    let memory = Memory::of(pid)?;
    Ok(MemoryRow {
        title: title.to_owned(),
        process: process.to_owned(),
        idle_mb: memory.rss_mb,
        after_load_mb: memory.rss_mb,
        peak_mb: memory.peak_mb,
    })
}

fn client(namespace: &str) -> String {
    format!("{namespace}/client")
}

/// A variable of a process, as it began.
fn environment(pid: i32, name: &str) -> String {
    let all = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    let mut words = all.split(|b| *b == 0).map(|w| String::from_utf8_lossy(w).into_owned());
    let prefix = format!("{name}=");
    words.find_map(|w| w.strip_prefix(&prefix).map(str::to_owned)).unwrap_or_default()
}

/// Everything but Envoy's pod, which needs a certificate first, and the many routes.
fn manifest() -> String {
    let mut yaml = String::new();
    for (namespace, _) in WAYS {
        let waypoint = matches!(*namespace, "routed" | ENVOYED);
        yaml += &one_namespace(namespace, waypoint);
        if waypoint {
            yaml += &http_routes(namespace, 0);
        }
    }
    yaml += "---\n";
    yaml += &one_namespace(CROWDED, true);
    // The user's own Service of that name: nobody starts our waypoint there.
    yaml += &format!(
        "---\napiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: waypoint, namespace: {ENVOYED}}}\n\
         ---\napiVersion: v1\nkind: Service\nmetadata: {{name: waypoint, namespace: {ENVOYED}}}\nspec:\n  \
         selector: {{app: waypoint}}\n  ports: [{{name: mesh, port: 15008, appProtocol: hbone}}]\n\
         ---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: many, labels: {{istio.io/dataplane-mode: ambient}}}}\n"
    );
    for n in 0..SERVICES {
        yaml += &pod("many", &format!("app-{n}"), 1 + n % NODES, "serve");
        yaml += &service("many", &format!("app-{n}"), &format!("app-{n}"));
    }
    yaml
}

/// The many routes, in files that the control plane reads: at most 1 MiB.
fn crowd_files(crowd: usize) -> Vec<String> {
    let yaml = http_routes(CROWDED, crowd);
    let documents: Vec<&str> = yaml.split("---\n").filter(|d| !d.is_empty()).collect();
    // Some 4 KiB each.
    documents.chunks(64).map(|part| part.join("---\n")).collect()
}

fn one_namespace(name: &str, waypoint: bool) -> String {
    let mode = if name == "plain" { "none" } else { "ambient" };
    let bound = if waypoint { ", istio.io/use-waypoint: waypoint" } else { "" };
    let mut yaml = format!(
        "---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {{istio.io/dataplane-mode: {mode}{bound}}}}}\n"
    );
    if waypoint {
        yaml += &format!(
            "---\napiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: waypoint, namespace: {name}}}\nspec:\n  \
             gatewayClassName: istio-waypoint\n  listeners: [{{name: mesh, port: 15008, protocol: HBONE}}]\n"
        );
    }
    yaml += &pod(name, "client", 1, "pause");
    yaml += &pod(name, "v1", 2, "serve");
    yaml += &pod(name, "v2", 2, "serve");
    for (service_name, app) in [("web", "v1"), ("v1", "v1"), ("v2", "v2")] {
        yaml += &service(name, service_name, app);
    }
    yaml
}

fn pod(namespace: &str, name: &str, node: usize, command: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {name}, namespace: {namespace}}}\n---\n\
         apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}\nspec:\n  \
         nodeName: node-{node}\n  serviceAccountName: {name}\n  containers: [{{name: main, image: meshload, args: [--label, {namespace}/{name}, {command}]}}]\n"
    )
}

fn service(namespace: &str, name: &str, app: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
         spec: {{selector: {{app: {app}}}, ports: [{{name: http, port: 80, targetPort: 8080}}]}}\n"
    )
}
