//! The mesh's own processes: `istiod-lite` on the underlay, one `ztunnel` per node, watched and started again.
//!
//! Invariants: a node token goes to its ztunnel over an inherited pipe and to istiod-lite as a hash, and to nobody else;
//! each start of a ztunnel gets a new one. A process that dies is started again with a growing pause; the pods' capture
//! stays in place meanwhile, so that nothing goes out in the clear.

use std::fs::{self, DirBuilder};
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use aws_lc_rs::digest::{SHA256, digest};
use net::NetNs;
use tokio::sync::mpsc;

use crate::launch::Event;
use crate::logs;
use crate::network::{Network, UNDERLAY_V4, UNDERLAY_V6};
use crate::place::Place;
use crate::procs::{Process, Processes};
use crate::status::ProcessStatus;
use crate::zds::Agent;

/// Where the control plane serves xDS and the CA, as in Istio.
const XDS_PORT: u16 = 15012;
/// Metrics, readiness and debugging of the control plane.
pub(crate) const STATUS_PORT: u16 = 15014;
/// Pauses between starts of a process that dies.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// A process that lived this long starts over with the first pause.
const FORGIVEN_AFTER: Duration = Duration::from_secs(30);
/// How soon a ztunnel sees the control plane's root certificate.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Bytes of entropy in a token.
const TOKEN: usize = 32;
/// How much of a dead process's log is shown.
const TAIL: u64 = 600;

/// The running mesh.
#[derive(Clone, Debug)]
pub(crate) struct Mesh {
    /// In the order of the nodes.
    pub(crate) agents: Vec<Agent>,
    states: Arc<Mutex<Vec<ProcessStatus>>>,
}

/// What a supervisor needs beside what it starts.
#[derive(Clone)]
struct Around {
    place: Place,
    processes: Processes,
    events: mpsc::Sender<Event>,
    states: Arc<Mutex<Vec<ProcessStatus>>>,
}

/// Tells istiod-lite which tokens are good.
#[derive(Clone, Debug, Default)]
struct Registry(Arc<Mutex<RegistryState>>);

#[derive(Debug, Default)]
struct RegistryState {
    line: Option<UnixStream>,
    /// The newest of each node.
    told: Vec<Told>,
}

#[derive(Debug)]
struct Told {
    node: String,
    line: String,
    at: SystemTime,
    /// Where ztunnel keeps what it got for its token.
    secrets: PathBuf,
}

impl Told {
    /// Whether ztunnel may still have to use it. Once it keeps a certificate that is younger, it has.
    fn is_unused(&self) -> bool {
        let files = fs::read_dir(&self.secrets).into_iter().flatten().flatten();
        let times = files.filter_map(|f| f.metadata().and_then(|m| m.modified()).ok());
        !times.into_iter().any(|time| time >= self.at)
    }
}

/// Starts everything.
pub(crate) fn start(
    place: &Place,
    bin_dir: &Path,
    dir: &Path,
    network: &Network,
    processes: &Processes,
    events: &mpsc::Sender<Event>,
    same_node_direct: &[String],
) -> Result<Mesh> {
    let states = Arc::new(Mutex::new(vec![]));
    let around = Around {
        place: place.clone(),
        processes: processes.clone(),
        events: events.clone(),
        states: Arc::clone(&states),
    };
    let registry = Registry::default();
    let istiod_dir = place.private().join("istiod");
    DirBuilder::new().recursive(true).mode(0o700).create(&istiod_dir)?;
    let (program, registry_for) = (bin_dir.join("istiod-lite"), registry.clone());
    let (yaml, objects, state) = (dir.to_owned(), place.objects(), istiod_dir.clone());
    let begin = move |_: u32| {
        let mut command = Command::new(&program);
        command.arg("--dir").arg(&yaml).arg("--dir").arg(&objects).arg("--state-dir").arg(&state);
        command.arg("--listen").arg(format!("{UNDERLAY_V4}:{XDS_PORT}"));
        command.arg("--listen").arg(format!("[{UNDERLAY_V6}]:{XDS_PORT}"));
        command.arg("--status-listen").arg(format!("{UNDERLAY_V4}:{STATUS_PORT}"));
        command.arg("--token-registry-fd").arg("3");
        Ok(Start { command, files: vec![registry_for.connect()?], ns: None })
    };
    tokio::spawn(supervise(around.clone(), "istiod-lite".to_owned(), None, None, begin));
    let mut agents = vec![];
    for node in &network.nodes {
        let home = place.private().join(&node.name);
        for sub in ["state", "secret"] {
            DirBuilder::new().recursive(true).mode(0o700).create(home.join(sub))?;
        }
        let socket = home.join("zds.sock");
        agents.push(Agent::start(&socket, &node.name)?);
        let ztunnel = Ztunnel {
            program: bin_dir.join("ztunnel"),
            node: node.name.clone(),
            ns: node.ns.clone(),
            socket,
            home,
            root: istiod_dir.join("root-cert.pem"),
            registry: registry.clone(),
            same_node_direct: same_node_direct.join(","),
        };
        let root = ztunnel.root.clone();
        let begin = move |_: u32| ztunnel.start();
        tokio::spawn(supervise(
            around.clone(),
            "ztunnel".to_owned(),
            Some(node.name.clone()),
            Some(root),
            begin,
        ));
    }
    Ok(Mesh { agents, states })
}

impl Mesh {
    pub(crate) fn statuses(&self) -> Vec<ProcessStatus> {
        let mut all = lock(&self.states).clone();
        all.sort_by(|a, b| (&a.name, &a.node).cmp(&(&b.name, &b.node)));
        all
    }
}

/// How to start a process.
struct Start {
    command: Command,
    files: Vec<OwnedFd>,
    ns: Option<NetNs>,
}

struct Ztunnel {
    program: PathBuf,
    node: String,
    ns: NetNs,
    socket: PathBuf,
    home: PathBuf,
    root: PathBuf,
    registry: Registry,
    /// Namespaces, separated by commas.
    same_node_direct: String,
}

impl Ztunnel {
    fn start(&self) -> Result<Start> {
        let token = token()?;
        let hash: String =
            digest(&SHA256, token.as_bytes()).as_ref().iter().map(|b| format!("{b:02x}")).collect();
        self.registry.tell(&self.node, &hash, self.home.join("secret"));
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        // Fits the pipe: nobody has to read for this to return.
        fs::File::from(write).write_all(format!("{token}\n").as_bytes())?;
        let mut command = Command::new(&self.program);
        command.arg("proxy").arg("--node").arg(&self.node).arg("--zds-socket").arg(&self.socket);
        command.arg("--xds-address").arg(format!("https://{UNDERLAY_V4}:{XDS_PORT}"));
        command.arg("--root-cert").arg(&self.root);
        command
            .arg("--state-dir")
            .arg(self.home.join("state"))
            .arg("--secret-dir")
            .arg(self.home.join("secret"));
        if !self.same_node_direct.is_empty() {
            command.arg("--same-node-direct").arg(&self.same_node_direct);
        }
        command.arg("--token-fd").arg("3");
        Ok(Start { command, files: vec![read], ns: Some(self.ns.clone()) })
    }
}

fn token() -> Result<String> {
    let mut bytes = [0; TOKEN];
    getrandom::fill(&mut bytes).map_err(|e| anyhow::anyhow!("no randomness: {e}"))?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

impl Registry {
    /// The end for a new istiod-lite. Tokens that the one before was told and nobody has used are told again.
    fn connect(&self) -> Result<OwnedFd> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let mut state = lock(&self.0);
        for told in state.told.iter().filter(|t| t.is_unused()) {
            let _ = (&ours).write_all(told.line.as_bytes());
        }
        state.line = Some(ours);
        Ok(theirs.into())
    }

    fn tell(&self, node: &str, hash: &str, secrets: PathBuf) {
        let line = format!("{{\"node\":\"{node}\",\"token_sha256\":\"{hash}\"}}\n");
        let mut state = lock(&self.0);
        state.told.retain(|t| t.node != node);
        if let Some(stream) = &mut state.line {
            // A broken line means istiod-lite is being started again; it is told then.
            let _ = stream.write_all(line.as_bytes());
        }
        state.told.push(Told { node: node.to_owned(), line, at: SystemTime::now(), secrets });
    }
}

/// Starts a process again and again. `after`: a file that must be there first.
async fn supervise(
    around: Around,
    name: String,
    node: Option<String>,
    after: Option<PathBuf>,
    begin: impl Fn(u32) -> Result<Start> + Send,
) {
    let label = node.as_ref().map_or_else(|| name.clone(), |n| format!("{name} on {n}"));
    let log = around.place.logs().join(format!(
        "{}.log",
        node.as_ref().map_or_else(|| name.clone(), |n| format!("{name}_{n}"))
    ));
    let mut state = ProcessStatus {
        name,
        node,
        state: "Starting".to_owned(),
        ready: false,
        config: None,
        pid: None,
        restarts: 0,
        log: log.display().to_string(),
    };
    around.publish(&state);
    if let Some(file) = after {
        while !file.exists() {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
    let mut pause = FIRST_PAUSE;
    loop {
        let began = Instant::now();
        let why = match start_one(&around, &begin, state.restarts, &log) {
            Ok(process) => {
                (state.state, state.pid) = ("Running".to_owned(), Some(process.pid()));
                around.publish(&state);
                let code = process.ended().await;
                format!("ended with status {code}")
            }
            Err(e) => format!("{e:#}"),
        };
        if began.elapsed() >= FORGIVEN_AFTER {
            pause = FIRST_PAUSE;
        }
        (state.state, state.pid) = (why.clone(), None);
        state.restarts += 1;
        around.publish(&state);
        let said = logs::tail(&log, TAIL);
        let last = said.lines().last().unwrap_or_default();
        let text = format!(
            "{label} {why}; started again in {} ms; its log ({}) ends with: {last}",
            pause.as_millis(),
            log.display()
        );
        // Fails only when the lab is ending.
        let _ = around.events.send(Event::Warning(text)).await;
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

fn start_one(
    around: &Around,
    begin: &impl Fn(u32) -> Result<Start>,
    attempt: u32,
    log: &Path,
) -> Result<Process> {
    let Start { mut command, files, ns } = begin(attempt)?;
    let output = logs::pipe_to(log.to_owned())?;
    command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output).current_dir("/");
    let start = || around.processes.start(command, files);
    match ns {
        // A process starts in the network namespace of the thread that starts it.
        Some(ns) => ns.run(start).context("enter the node")?,
        None => start(),
    }
}

impl Around {
    fn publish(&self, state: &ProcessStatus) {
        let mut all = lock(&self.states);
        all.retain(|s| (&s.name, &s.node) != (&state.name, &state.node));
        all.push(state.clone());
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
