//! A running `meshctl local up` on a folder of its own.
//!
//! Invariants: the name is unique on the machine; the lab ends when the handle is dropped, and when the process that
//! holds it dies (the kernel's parent-death signal); [`Lab::down`] proves that nothing is left.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use std::{fs, io};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::access_log;
use crate::command::{self, Background, Ran};
use crate::leftovers::Belongings;
use crate::programs;
use crate::status::{Pod, Status};
use crate::{wait_for, wait_until};

/// For a command in a pod; those that take longer say so.
pub const SOON: Duration = Duration::from_secs(20);
/// For a lab to be up with all pods ready: PostgreSQL makes its database first, and debug builds are slow.
const UP: Duration = Duration::from_secs(60);
/// For a change of YAML to be in force everywhere.
pub const CHANGE: Duration = Duration::from_secs(10);
/// For a lab to end: pods have two seconds of grace, and machines under load are slow.
const DOWN: Duration = Duration::from_secs(30);

/// What to start a lab with.
#[derive(Clone, Debug)]
pub struct Plan {
    files: Vec<(String, String)>,
    images: BTreeMap<String, PathBuf>,
    nodes: u16,
    name: Option<String>,
    /// Folder that is copied first.
    from: Option<PathBuf>,
    wait_for_pods: bool,
    drain_seconds: Option<u64>,
    same_node_direct: Option<String>,
    environment: Vec<(String, String)>,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            files: vec![],
            images: BTreeMap::new(),
            nodes: 2,
            name: None,
            from: None,
            wait_for_pods: true,
            drain_seconds: None,
            same_node_direct: None,
            environment: vec![],
        }
    }
}

impl Plan {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn file(mut self, name: &str, text: impl Into<String>) -> Self {
        self.files.push((name.to_owned(), text.into()));
        self
    }

    pub fn image(mut self, name: &str, path: PathBuf) -> Self {
        self.images.insert(name.to_owned(), path);
        self
    }

    pub fn nodes(mut self, nodes: u16) -> Self {
        self.nodes = nodes;
        self
    }

    pub fn named(mut self, name: &str) -> Self {
        self.name = Some(name.to_owned());
        self
    }

    /// Begins with a copy of a folder of YAML.
    pub fn copy_of(mut self, folder: &Path) -> Self {
        self.from = Some(folder.to_owned());
        self
    }

    /// How long a ztunnel that is replaced keeps its connections.
    pub fn drain_seconds(mut self, seconds: u64) -> Self {
        self.drain_seconds = Some(seconds);
        self
    }

    /// Returns as soon as the lab answers, with pods that may never get ready.
    pub fn not_waiting_for_pods(mut self) -> Self {
        self.wait_for_pods = false;
        self
    }

    /// A variable in the environment of `meshctl local up`.
    pub fn environment(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Pods of this namespace on one node are joined without a tunnel.
    pub fn same_node_direct(mut self, namespace: &str) -> Self {
        self.same_node_direct = Some(namespace.to_owned());
        self
    }

    /// Starts the lab and waits until every pod is ready and every pod of the mesh is captured.
    pub fn up(self) -> Result<Lab> {
        Lab::start(self)
    }
}

/// A running lab. Ended when dropped.
#[derive(Debug)]
pub struct Lab {
    pub name: String,
    meshctl: PathBuf,
    folder: tempfile::TempDir,
    /// The folder's files as they were at the start.
    files: BTreeMap<String, String>,
    front: Option<Background>,
}

impl Lab {
    fn start(plan: Plan) -> Result<Self> {
        static COUNTER: AtomicU32 = AtomicU32::new(1);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name =
            plan.name.clone().unwrap_or_else(|| format!("e2e-{}-{number}", std::process::id()));
        let folder = tempfile::Builder::new().prefix("ambit-e2e-").tempdir()?;
        if let Some(from) = &plan.from {
            copy_folder(from, folder.path())?;
        }
        for (file, text) in &plan.files {
            fs::write(folder.path().join(file), text)?;
        }
        let meshctl = programs::ours("meshctl")?;
        let files = read_folder(folder.path())?;
        let mut lab = Self { name, meshctl, folder, files, front: None };
        lab.front = Some(Background::start(lab.up_command(&plan)?)?);
        lab.wait_until_up(&plan)?;
        Ok(lab)
    }

    fn up_command(&self, plan: &Plan) -> Result<Command> {
        // setpriv: the lab gets SIGTERM when this process dies, however it dies.
        let mut command = match programs::find("setpriv") {
            Ok(setpriv) => {
                let mut command = Command::new(setpriv);
                command.args(["--pdeathsig", "TERM"]).arg(&self.meshctl);
                command
            }
            // The demo runs on bare machines; Ctrl-C reaches the lab there as well.
            Err(_) => Command::new(&self.meshctl),
        };
        command.args(["local", "up"]).arg(self.folder.path());
        command.args(["--name", &self.name, "--nodes", &plan.nodes.to_string()]);
        command.arg("--bin-dir").arg(programs::folder()?);
        if let Some(seconds) = plan.drain_seconds {
            command.args(["--drain-seconds", &seconds.to_string()]);
        }
        if let Some(namespace) = &plan.same_node_direct {
            command.args(["--same-node-direct", namespace]);
        }
        command.envs(plan.environment.iter().map(|(name, value)| (name, value)));
        let mut images = plan.images.clone();
        for ours in ["meshprobe", "meshload"] {
            if !images.contains_key(ours) {
                images.insert(ours.to_owned(), programs::ours(ours)?);
            }
        }
        for (image, path) in images {
            command.arg("--image").arg(format!("{image}={}", path.display()));
        }
        Ok(command)
    }

    fn wait_until_up(&mut self, plan: &Plan) -> Result<()> {
        let wait_for_pods = plan.wait_for_pods;
        let mut last = Status::default();
        let up = wait_until("the lab to be up", UP, || {
            if !self.front.as_mut().context("the lab was not started")?.is_running()? {
                return Ok(true);
            }
            last = self.status()?;
            // The name may belong to another lab, and ours is about to be refused.
            let ours = last.dir == fs::canonicalize(self.folder())?.to_string_lossy();
            let up = ours && last.is_up();
            Ok(up && (!wait_for_pods || (last.is_settled() && self.proxies_call_all(&last)?)))
        });
        let front = self.front.as_mut().context("the lab was not started")?;
        if up.is_ok() && front.is_running()? {
            return Ok(());
        }
        let logs = last_words(&last);
        let front = self.front.take().context("the lab was not started")?;
        // Ended, so that everything it has said is read.
        let ran = front.end()?;
        let said = format!("{}\n{}", ran.out, ran.err);
        bail!(
            "the lab did not come up; pods not ready: {:?}; complaints: {:?}\nit said: {said}{logs}",
            last.unready(),
            last.diagnostics
        );
    }

    /// Every node's proxy knows every pod to be ready: what the lab knows reaches them over the control plane, a moment later.
    fn proxies_call_all(&self, status: &Status) -> Result<bool> {
        for proxy in status.processes.iter().filter(|p| p.name == "ztunnel") {
            let node = proxy.node.as_deref().context("a ztunnel without a node")?;
            let url = "http://localhost:15000/config_dump?only=workloads";
            let asked = self.exec(node, &["curl", "-sS", "--fail", url])?;
            let dump: Value = serde_json::from_str(asked.ok()?)?;
            let healthy = |pod: &Pod| {
                dump["workloads"].as_array().is_some_and(|all| {
                    all.iter().any(|w| {
                        w["namespace"] == pod.namespace
                            && w["name"] == pod.name
                            && w["status"] == "Healthy"
                    })
                })
            };
            if !status.pods.iter().all(healthy) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// `meshctl ARGS`, with this lab's name where the command is about a lab.
    pub fn meshctl(&self, args: &[&str]) -> Result<Ran> {
        command::run(self.meshctl_command(args), "", SOON)
    }

    /// `meshctl waypoint ARGS` about this lab.
    pub fn waypoint(&self, args: &[&str], limit: Duration) -> Result<Ran> {
        let mut command = Command::new(&self.meshctl);
        command.arg("waypoint").args(args).args(["--lab", &self.name]);
        command::run(command, "", limit)
    }

    fn meshctl_command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.meshctl);
        // Names the lab before `--`, behind which the arguments belong to somebody else.
        let end = args.iter().position(|a| *a == "--").unwrap_or(args.len());
        command.args(&args[..end]).args(["--name", &self.name]).args(&args[end..]);
        command
    }

    /// Runs a command in a pod (`NAMESPACE/POD`) or in a node's network (`node-1`).
    pub fn exec(&self, place: &str, argv: &[&str]) -> Result<Ran> {
        self.exec_with(place, argv, "", SOON)
    }

    pub fn exec_with(
        &self,
        place: &str,
        argv: &[&str],
        input: &str,
        limit: Duration,
    ) -> Result<Ran> {
        command::run(self.exec_command(place, argv), input, limit)
    }

    /// The same, without waiting for its end.
    pub fn exec_in_background(&self, place: &str, argv: &[&str]) -> Result<Background> {
        Background::start(self.exec_command(place, argv))
    }

    /// A connection from a pod to an echo server that is kept busy; returns once it has had its first answer.
    pub fn hold(&self, from: &str, to: &str) -> Result<Background> {
        let mut held = self.exec_in_background(from, &["/image/meshprobe", "hold", to])?;
        wait_until("the held connection", SOON, || {
            ensure!(held.is_running()?, "it ended: {} {}", held.out(), held.err());
            Ok(held.out().contains("open"))
        })?;
        Ok(held)
    }

    fn exec_command(&self, place: &str, argv: &[&str]) -> Command {
        let mut args = vec!["local", "exec", place, "--"];
        args.extend(argv);
        self.meshctl_command(&args)
    }

    /// `meshctl can WHO WHAT`.
    pub fn can(&self, from: &str, to: &str) -> Result<Ran> {
        self.meshctl(&["can", from, to])
    }

    pub fn status(&self) -> Result<Status> {
        let ran = self.meshctl(&["local", "status", "-o", "json"])?;
        let text = ran.ok()?;
        serde_json::from_str(text)
            .with_context(|| format!("the status is not what we read: {text}"))
    }

    pub fn pod(&self, name: &str) -> Result<Pod> {
        self.status()?.pod(name).cloned().with_context(|| format!("there is no pod {name}"))
    }

    /// The first address of a pod.
    pub fn pod_ip(&self, name: &str, ipv6: bool) -> Result<String> {
        let pod = self.pod(name)?;
        Ok(pod
            .ip(ipv6)
            .with_context(|| format!("{name} has no such address: {:?}", pod.ips))?
            .to_owned())
    }

    pub fn service_ip(&self, name: &str, ipv6: bool) -> Result<String> {
        let status = self.status()?;
        let service =
            status.service(name).with_context(|| format!("there is no service {name}"))?;
        let address = service.address(ipv6);
        Ok(address
            .with_context(|| format!("{name} has no such address: {:?}", service.addresses))?
            .to_owned())
    }

    /// The lab's folder of YAML.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Writes a file as editors do: beside it, then over it.
    pub fn write(&self, file: &str, text: &str) -> Result<()> {
        let beside = self.folder().join(format!(".{file}.new"));
        fs::write(&beside, text)?;
        Ok(fs::rename(beside, self.folder().join(file))?)
    }

    pub fn remove(&self, file: &str) -> Result<()> {
        fs::remove_file(self.folder().join(file)).with_context(|| format!("remove {file}"))
    }

    /// Makes the folder what it was at the start, for the next test.
    pub fn restore(&self) -> Result<()> {
        let now = read_folder(self.folder())?;
        for file in now.keys().filter(|f| !self.files.contains_key(*f)) {
            self.remove(file)?;
        }
        for (file, text) in self.files.iter().filter(|(f, text)| now.get(*f) != Some(text)) {
            self.write(file, text)?;
        }
        Ok(())
    }

    /// What `meshctl local up` has printed.
    pub fn said(&self) -> String {
        self.front.as_ref().map(|f| format!("{}{}", f.out(), f.err())).unwrap_or_default()
    }

    /// The log of `ztunnel` on a node, or of `istiod-lite`.
    pub fn process_log(&self, name: &str, node: Option<&str>) -> Result<String> {
        let status = self.status()?;
        let process =
            status.process(name, node).with_context(|| format!("there is no {name} {node:?}"))?;
        // The older half first, so that a line keeps its number when a log is begun anew.
        let read = |path: &str| match fs::read_to_string(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            read => read.with_context(|| path.to_owned()),
        };
        Ok(read(&format!("{}.1", process.log))? + &read(&process.log)?)
    }

    /// The id of a mesh process in the lab's process namespace, which is what commands in a node see.
    pub fn process_id(&self, name: &str, node: Option<&str>) -> Result<i32> {
        let status = self.status()?;
        let process =
            status.process(name, node).with_context(|| format!("there is no {name} {node:?}"))?;
        process.pid.with_context(|| format!("{name} {node:?} does not run: {}", process.state))
    }

    /// The output of a pod's container.
    pub fn pod_log(&self, pod: &str) -> Result<String> {
        let ran = self.meshctl(&["local", "logs", pod])?;
        ran.ok()?;
        Ok(ran.out)
    }

    /// What a node's proxy says about finished connections.
    pub fn access_log(&self, node: &str) -> Result<Vec<access_log::Line>> {
        Ok(access_log::parse(&self.process_log("ztunnel", Some(node))?))
    }

    /// Waits for an access-log line with these fields, behind the first `after` lines.
    pub fn wait_for_access(
        &self,
        node: &str,
        after: usize,
        fields: &[(&str, &str)],
    ) -> Result<access_log::Line> {
        let mut seen = vec![];
        let found = wait_for("an access-log line", CHANGE, || {
            seen = self.access_log(node)?;
            Ok(seen.iter().skip(after).find(|l| l.has(fields)).cloned())
        });
        found.map_err(|e| {
            let last: Vec<_> = seen.iter().skip(after).rev().take(5).collect();
            anyhow!("{e:#} on {node} with {fields:?}; the last lines are {last:#?}")
        })
    }

    /// Asks again and again until `decides` is satisfied: configuration reaches the proxies a moment later.
    pub fn until(&self, what: &str, decides: impl FnMut() -> Result<bool>) -> Result<Duration> {
        wait_until(what, CHANGE, decides)
    }

    /// The ends of the logs of the mesh's processes, for a test that failed.
    pub fn last_words(&self) -> String {
        self.status().map(|s| last_words(&s)).unwrap_or_default()
    }

    pub fn signal_front(&self, signal: Signal) -> Result<()> {
        self.front.as_ref().context("the lab has ended")?.signal(signal)
    }

    /// Kills the front as nobody should, and collects it: a process that is dead and not collected is still one.
    pub fn kill_front(&mut self) -> Result<()> {
        let mut front = self.front.take().context("the lab has ended")?;
        front.signal(Signal::SIGKILL)?;
        wait_until("the front to be dead", SOON, || Ok(!front.is_running()?))?;
        Ok(())
    }

    pub fn front_pid(&self) -> Result<u32> {
        Ok(self.front.as_ref().context("the lab has ended")?.pid())
    }

    /// What the lab consists of now.
    pub fn belongings(&self) -> Result<Belongings> {
        let status = self.status()?;
        let log = status.processes.first().map(|p| PathBuf::from(&p.log));
        // STATE/logs/NAME.log
        let state = log.as_deref().and_then(|l| l.parent()?.parent()).map(Path::to_owned);
        Belongings::of(self.front_pid()?, state.context("the status names no log")?)
    }

    /// Waits until the front has ended, and checks that nothing is left.
    pub fn wait_for_end(mut self, belongings: &Belongings) -> Result<Ran> {
        let front = self.front.take().context("the lab has ended")?;
        let ran = front.wait(DOWN)?;
        belongings.check_gone().with_context(|| format!("after {ran:?}"))?;
        Ok(ran)
    }

    /// Ends the lab and checks that nothing is left.
    pub fn down(self) -> Result<()> {
        let belongings = self.belongings()?;
        ensure!(
            belongings.processes() > 3 && belongings.namespaces() > 3,
            "a lab has more: {belongings:?}"
        );
        self.meshctl(&["local", "down"])?.ok()?;
        let ran = self.wait_for_end(&belongings)?;
        ran.ok().map(|_| ())
    }
}

impl Status {
    /// The mesh's own processes run.
    fn is_up(&self) -> bool {
        !self.processes.is_empty() && self.processes.iter().all(|p| p.state == "Running")
    }

    /// Every pod is ready.
    pub fn is_settled(&self) -> bool {
        !self.pods.is_empty() && self.pods.iter().all(|p| p.ready)
    }
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from).with_context(|| from.display().to_string())? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
    }
    Ok(())
}

fn read_folder(folder: &Path) -> Result<BTreeMap<String, String>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        files.insert(name, fs::read_to_string(&path).with_context(|| path.display().to_string())?);
    }
    Ok(files)
}

fn last_words(status: &Status) -> String {
    let mut text = String::new();
    for process in &status.processes {
        let node = process.node.as_deref().unwrap_or_default();
        let log = fs::read_to_string(&process.log).unwrap_or_default();
        text += &format!("\n--- {} {node} ({}):\n{}", process.name, process.state, tail(&log));
    }
    text
}

fn tail(text: &str) -> String {
    /// Enough for an error and what led to it.
    const LINES: usize = 12;
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}
