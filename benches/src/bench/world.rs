//! The mesh under test: a local one with two nodes, started and asked through `meshctl`.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::procfs::{Cpu, Process, descendants};
use super::sysctl::{self, CONGESTION, CONGESTION_PIN, Settings};

/// First port of the servers, and of the relays in front of them.
const SERVER_PORT: u16 = 8080;
const RELAY_PORT: u16 = 9080;
/// A mesh that is not up by then will not come up.
const UP_LIMIT: Duration = Duration::from_secs(90);
/// Time to end in order; after that the processes are killed.
const DOWN_LIMIT: Duration = Duration::from_secs(30);
/// Of the pairs.
const NODES: usize = 2;
/// Between two looks at whether something is there yet.
const POLL: Duration = Duration::from_millis(100);

/// Which of the pairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Arm {
    Plain,
    Mesh,
    /// A copying relay in each pod, no mesh: the floor (see [`crate::relay`]).
    Relay,
}

impl Arm {
    pub const fn namespace(self) -> &'static str {
        match self {
            Self::Plain => "bench-plain",
            Self::Mesh => "bench-mesh",
            Self::Relay => "bench-relay",
        }
    }
}

/// Where the programs are.
#[derive(Clone, Debug)]
pub struct Programs {
    pub meshctl: PathBuf,
    pub meshload: PathBuf,
    pub ztunnel: PathBuf,
    pub echo_server: PathBuf,
}

impl Programs {
    /// All in one folder, as cargo leaves them.
    pub fn in_folder(folder: &Path) -> Result<Self> {
        let program = |name: &str| {
            let path = folder.join(name);
            ensure!(
                path.is_file(),
                "{} is missing: build it with `cargo build --bins`, same profile",
                path.display()
            );
            Ok(path)
        };
        Ok(Self {
            meshctl: program("meshctl")?,
            meshload: program("meshload")?,
            ztunnel: program("ztunnel")?,
            echo_server: program("echo-server")?,
        })
    }
}

/// A running mesh. Ends with this value.
#[derive(Debug)]
pub struct World {
    programs: Programs,
    name: String,
    nodes: usize,
    launcher: Child,
    folder: PathBuf,
    servers: [String; 3],
}

/// What a client reported, and the CPU time that passed while its load lasted.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub result: Value,
    pub before: Cpu,
    pub after: Cpu,
}

impl World {
    /// Starts a mesh and waits until both pairs answer; in `folder` its YAML and its output are kept.
    pub fn up(programs: &Programs, folder: &Path, name: &str) -> Result<Self> {
        let mut world = Self::start(programs, folder, name, NODES, &manifest(), &[])?;
        // The relay's client talks to the relay in its own pod.
        world.servers = [
            world.address_of_server(Arm::Plain)?,
            world.address_of_server(Arm::Mesh)?,
            "127.0.0.1".to_owned(),
        ];
        world.wait_for_answers()?;
        Ok(world)
    }

    /// Starts a mesh of these objects, with more arguments for `meshctl local up`; waits for nothing.
    pub fn start(
        programs: &Programs,
        folder: &Path,
        name: &str,
        nodes: usize,
        manifest: &str,
        more: &[&str],
    ) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        let yaml = folder.join("mesh");
        fs::create_dir_all(&yaml)?;
        fs::write(yaml.join("bench.yaml"), manifest)?;
        let log = File::create(folder.join("up.log"))?;
        let launcher = Command::new(&programs.meshctl)
            .args(["local", "up"])
            .arg(&yaml)
            .args(["--nodes", &nodes.to_string(), "--name", name, "--image"])
            .arg(format!("meshload={}", programs.meshload.display()))
            .args(more)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {}", programs.meshctl.display()))?;
        Ok(Self {
            programs: programs.clone(),
            name: name.to_owned(),
            nodes,
            launcher,
            folder: folder.to_owned(),
            servers: [const { String::new() }; 3],
        })
    }

    /// `IP:PORT` of an arm's server; `offset` picks the service (see `meshload all`).
    pub fn server(&self, arm: Arm, offset: u16) -> String {
        let first = if arm == Arm::Relay { RELAY_PORT } else { SERVER_PORT };
        format!("{}:{}", self.servers[arm as usize], first + offset)
    }

    /// Process id of `meshctl local up`.
    pub fn launcher(&self) -> i32 {
        i32::try_from(self.launcher.id()).unwrap_or(i32::MAX)
    }

    /// The node proxies, ordered by node.
    pub fn proxies(&self) -> Result<Vec<Process>> {
        let mut found: Vec<Process> =
            descendants(self.launcher()).into_iter().filter(|p| p.program() == "ztunnel").collect();
        found.sort_by(|a, b| (a.flag("--node"), a.pid).cmp(&(b.flag("--node"), b.pid)));
        ensure!(found.len() == self.nodes, "expected {} ztunnel, found {found:?}", self.nodes);
        Ok(found)
    }

    /// Writes a file of the mesh, by a rename as editors do it.
    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        let folder = self.folder.join("mesh");
        let (new, path) = (folder.join(format!(".{name}.tmp")), folder.join(name));
        fs::write(&new, text).with_context(|| new.display().to_string())?;
        fs::rename(&new, &path).with_context(|| path.display().to_string())
    }

    /// The processes in between, ordered by node: the node proxies, or the relays.
    fn between(&self, arm: Arm) -> Result<Vec<Process>> {
        if arm != Arm::Relay {
            return self.proxies();
        }
        let mut found: Vec<Process> = descendants(self.launcher())
            .into_iter()
            .filter(|p| p.program() == "meshload" && p.arguments.iter().any(|a| a == "relay"))
            .collect();
        found.sort_by_key(|p| (p.flag("--label").map(str::to_owned), p.pid));
        ensure!(found.len() == 2, "expected two relays, found {found:?}");
        Ok(found)
    }

    /// Sets values in the network namespaces of all pods.
    pub fn set_in_pods(&self, settings: Settings<'_>) -> Result<()> {
        let proxy = self.proxies()?[0].pid;
        let pods: Vec<Process> = descendants(self.launcher())
            .into_iter()
            .filter(|p| p.program() == "meshload" && p.flag("--label").is_some())
            .collect();
        ensure!(pods.len() >= 6, "expected the processes of six pods, found {pods:?}");
        pods.iter().try_for_each(|pod| sysctl::set(pod.pid, proxy, settings))
    }

    /// Pins the congestion control of all pods.
    pub fn pin_congestion(&self) -> Result<()> {
        self.set_in_pods(&[(CONGESTION, CONGESTION_PIN)])
    }

    /// Runs `meshload` with these arguments in the client pod of an arm.
    pub fn load(&self, arm: Arm, arguments: &[&str]) -> Result<Outcome> {
        self.load_with(arm, arguments, |_| Ok(()))
    }

    /// The same; `on_event` sees every line as it comes.
    pub fn load_with(
        &self,
        arm: Arm,
        arguments: &[&str],
        on_event: impl FnMut(&Value) -> Result<()>,
    ) -> Result<Outcome> {
        let pids: Vec<i32> = self.between(arm)?.iter().map(|p| p.pid).collect();
        watch(self.exec(arm, "client", arguments), &pids, on_event)
            .with_context(|| format!("{}/client", arm.namespace()))
    }

    /// A command in a pod, `NAMESPACE/POD`.
    pub fn command_in(&self, place: &str, argv: &[&str]) -> Command {
        let mut command = Command::new(&self.programs.meshctl);
        command.args(["local", "exec", "--name", &self.name, place, "--"]);
        command.args(argv).stdin(Stdio::null());
        command
    }

    /// What `meshctl local status` says.
    pub fn status(&self) -> Result<Value> {
        let mut command = Command::new(&self.programs.meshctl);
        let output =
            command.args(["local", "status", "--name", &self.name, "-o", "json"]).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "meshctl local status: {}", said.trim());
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Runs `meshload` in a pod and returns the one line it prints.
    pub fn ask(&self, arm: Arm, pod: &str, arguments: &[&str]) -> Result<Value> {
        let output = self.exec(arm, pod, arguments).stderr(Stdio::piped()).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "meshload {}: {}", arguments.join(" "), said.trim());
        let text = String::from_utf8_lossy(&output.stdout);
        serde_json::from_str(text.trim()).with_context(|| format!("meshload printed {text:?}"))
    }

    fn exec(&self, arm: Arm, pod: &str, arguments: &[&str]) -> Command {
        let argv: Vec<&str> =
            std::iter::once("meshload").chain(arguments.iter().copied()).collect();
        self.command_in(&format!("{}/{pod}", arm.namespace()), &argv)
    }

    fn address_of_server(&mut self, arm: Arm) -> Result<String> {
        let until = Instant::now() + UP_LIMIT;
        loop {
            let error = match self.ask(arm, "server", &["addresses"]) {
                Ok(value) => {
                    match value["addresses"].as_array().and_then(|all| all.iter().find_map(ipv4)) {
                        Some(address) => return Ok(address),
                        None => anyhow::anyhow!("{}/server has no IPv4 address", arm.namespace()),
                    }
                }
                Err(error) => error,
            };
            if let Some(status) = self.launcher.try_wait()? {
                bail!(
                    "meshctl local up ended with {status}: see {}",
                    self.folder.join("up.log").display()
                );
            }
            if Instant::now() > until {
                return Err(error.context(format!(
                    "the mesh is not up: see {}",
                    self.folder.join("up.log").display()
                )));
            }
            thread::sleep(POLL);
        }
    }

    /// Until the client of each arm has an answer from its server, and the mesh arm's came through the mesh.
    fn wait_for_answers(&self) -> Result<()> {
        for arm in [Arm::Plain, Arm::Mesh, Arm::Relay] {
            let until = Instant::now() + UP_LIMIT;
            let through_mesh = arm == Arm::Mesh;
            loop {
                let answered =
                    self.load(arm, &["closed", "--to", &self.server(arm, 0), "-d", "0.1"]);
                let tunnels = self.ask(arm, "server", &["established", "15008"])?["count"]
                    .as_u64()
                    .unwrap_or(0);
                let requests =
                    answered.as_ref().map_or(0, |o| o.result["requests"].as_u64().unwrap_or(0));
                ensure!(
                    through_mesh || tunnels == 0,
                    "the pair outside the mesh goes through the mesh"
                );
                if requests > 0 && (tunnels > 0) == through_mesh {
                    break;
                }
                if Instant::now() > until {
                    let why = answered.map_or_else(|e| format!("{e:#}"), |o| o.result.to_string());
                    bail!("no answer for {}/client ({tunnels} tunnels): {why}", arm.namespace());
                }
                thread::sleep(POLL);
            }
        }
        Ok(())
    }

    /// Ends the mesh and waits for it.
    pub fn down(mut self) -> Result<()> {
        self.stop()
    }

    fn stop(&mut self) -> Result<()> {
        if self.launcher.try_wait()?.is_some() {
            return Ok(());
        }
        kill(Pid::from_raw(self.launcher()), Signal::SIGINT)?;
        let until = Instant::now() + DOWN_LIMIT;
        while Instant::now() < until {
            if self.launcher.try_wait()?.is_some() {
                return Ok(());
            }
            thread::sleep(POLL);
        }
        self.launcher.kill()?;
        self.launcher.wait()?;
        bail!("the mesh did not end within {DOWN_LIMIT:?}")
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // On the way out of an error: that error is the one to show.
        let _ = self.stop();
    }
}

/// Runs a `meshload`, and reads the CPU time of `pids` at the marks that it prints. `on_event` sees its other lines.
pub fn watch(
    mut command: Command,
    pids: &[i32],
    mut on_event: impl FnMut(&Value) -> Result<()>,
) -> Result<Outcome> {
    let mut child = command.stdout(Stdio::piped()).spawn()?;
    let lines = BufReader::new(child.stdout.take().context("no pipe")?).lines();
    let (mut before, mut after, mut result) = (None, None, None);
    for line in lines {
        let line = line?;
        let value: Value =
            serde_json::from_str(&line).with_context(|| format!("meshload printed {line:?}"))?;
        match value["event"].as_str() {
            Some("begin") => before = Some(Cpu::now(pids)?),
            Some("end") => after = Some(Cpu::now(pids)?),
            Some("result") => result = Some(value),
            _ => on_event(&value)?,
        }
    }
    let status = child.wait()?;
    ensure!(status.success(), "{command:?}: {status}");
    match (result, before, after) {
        (Some(result), Some(before), Some(after)) => Ok(Outcome { result, before, after }),
        _ => bail!("{command:?} printed no result"),
    }
}

fn ipv4(value: &Value) -> Option<String> {
    let text = value.as_str()?;
    text.parse::<std::net::Ipv4Addr>().ok().map(|_| text.to_owned())
}

/// The pairs, the client on one node, the server on the other.
fn manifest() -> String {
    let mut yaml = String::new();
    for arm in [Arm::Plain, Arm::Mesh, Arm::Relay] {
        let namespace = arm.namespace();
        let mode = if arm == Arm::Mesh { "ambient" } else { "none" };
        yaml += &format!(
            "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {namespace}\n  labels:\n    istio.io/dataplane-mode: {mode}\n"
        );
        for (pod, node, mode) in [("client", "node-1", "pause"), ("server", "node-2", "all")] {
            yaml += &format!(
                "---\napiVersion: v1\nkind: ServiceAccount\nmetadata:\n  name: {pod}\n  namespace: {namespace}\n\
                 ---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: {pod}\n  namespace: {namespace}\n  labels: {{ app: {pod} }}\nspec:\n  \
                 nodeName: {node}\n  serviceAccountName: {pod}\n  containers:\n  - name: meshload\n    image: meshload\n    \
                 args: [--label, {namespace}/{pod}, {mode}]\n"
            );
            if arm == Arm::Relay {
                yaml += &relay_container(pod);
            }
        }
        yaml += "---\n";
    }
    yaml += &format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: server\n  namespace: {0}\nspec:\n  \
         clusterIP: None\n  selector: {{ app: server }}\n  ports: [{{ port: {RELAY_PORT} }}]\n",
        Arm::Relay.namespace()
    );
    yaml
}

/// HTTP and bulk, from the client's pod to the server's, and there to the server.
fn relay_container(pod: &str) -> String {
    let hop = |offset: u16| {
        let (relay, server) = (RELAY_PORT + offset, SERVER_PORT + offset);
        match pod {
            "client" => format!("\"127.0.0.1:{relay}=server.{}:{relay}\"", Arm::Relay.namespace()),
            _ => format!("\"[::]:{relay}=127.0.0.1:{server}\""),
        }
    };
    format!(
        "  - name: relay\n    image: meshload\n    args: [--label, {pod}, relay, {}, {}]\n",
        hop(0),
        hop(1)
    )
}
