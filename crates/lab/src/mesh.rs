//! The mesh's own processes: `istiod-lite` on the underlay, one `ztunnel` per node, watched and started again.
//!
//! Invariants: a node token goes to its ztunnel over an inherited pipe and to istiod-lite as a hash, and to nobody else;
//! each start of a ztunnel gets a new one. A process that dies is started again with a growing pause; the pods' capture
//! stays in place meanwhile, so that nothing goes out in the clear. A ztunnel is replaced by one beside it: the old one is
//! told to drain when the new one has said that it is ready, and goes on as if nothing had been when it has not.

use std::fs::{self, DirBuilder};
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use aws_lc_rs::digest::{SHA256, digest};
use net::NetNs;
use nix::sys::signal::Signal;
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, oneshot};

use crate::control::{Action, Restarted};
use crate::fds;
use crate::launch::Event;
use crate::logs::{self, Output};
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
/// A new ztunnel reads its configuration from disk and takes the pods of its node, some milliseconds each.
const READY_WITHIN: Duration = Duration::from_secs(30);
/// For a process that is stopped; then it is killed.
const STOP_WITHIN: Duration = Duration::from_secs(5);
/// What a ztunnel may take beyond its own limit for draining.
const DRAIN_SLACK: Duration = Duration::from_secs(10);
/// Old ztunnels of one node that drain at once. Whoever replaces more often than connections end has those of the oldest ended.
const MOST_DRAINING: usize = 8;
/// Orders that wait for a supervisor: people give them.
const ORDERS: usize = 8;
/// The state of a ztunnel that was replaced.
pub(crate) const DRAINING: &str = "Draining";
/// Bytes of entropy in a token.
const TOKEN: usize = 32;
/// How much of a dead process's log is shown.
const TAIL: u64 = 600;

/// The running mesh.
#[derive(Clone, Debug)]
pub(crate) struct Mesh {
    /// In the order of the nodes.
    pub(crate) agents: Vec<Agent>,
    controls: Vec<Control>,
    states: Arc<Mutex<Vec<ProcessStatus>>>,
}

/// The way to a process' supervisor.
#[derive(Clone, Debug)]
pub(crate) struct Control {
    pub(crate) name: String,
    pub(crate) node: Option<String>,
    orders: mpsc::Sender<Order>,
}

#[derive(Debug)]
struct Order {
    what: Action,
    reply: oneshot::Sender<Result<Restarted, String>>,
}

impl Order {
    fn answer(self, answer: Result<Restarted, String>) {
        // Whoever asked may have hung up.
        let _ = self.reply.send(answer);
    }
}

impl Control {
    /// Has it done, and waits. For a thread that may wait.
    pub(crate) fn order(&self, what: Action) -> Result<Restarted, String> {
        let (reply, answer) = oneshot::channel();
        let sent = self.orders.blocking_send(Order { what, reply });
        sent.map_err(|_| "the lab is ending".to_owned())?;
        answer.blocking_recv().map_err(|_| "the lab is ending".to_owned())?
    }
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

/// Starts everything. `drain`: how long a ztunnel that was replaced keeps its connections.
pub(crate) fn start(
    place: &Place,
    bin_dir: &Path,
    dir: &Path,
    network: &Network,
    processes: &Processes,
    events: &mpsc::Sender<Event>,
    drain: Duration,
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
        Ok(Start { command, files: vec![registry_for.connect()?], ns: None, ready: None })
    };
    let mut controls = vec![];
    let istiod = Watched {
        name: "istiod-lite".to_owned(),
        node: None,
        after: None,
        beside: false,
        drain: Duration::ZERO,
    };
    let orders = control(&istiod, &mut controls);
    tokio::spawn(supervise(around.clone(), istiod, orders, begin));
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
            drain,
        };
        let watched = Watched {
            name: "ztunnel".to_owned(),
            node: Some(node.name.clone()),
            after: Some(ztunnel.root.clone()),
            beside: true,
            drain,
        };
        let begin = move |_: u32| ztunnel.start();
        let orders = control(&watched, &mut controls);
        tokio::spawn(supervise(around.clone(), watched, orders, begin));
    }
    Ok(Mesh { agents, controls, states })
}

/// Makes the way to a supervisor that is about to start.
fn control(watched: &Watched, controls: &mut Vec<Control>) -> mpsc::Receiver<Order> {
    let (orders, received) = mpsc::channel(ORDERS);
    controls.push(Control { name: watched.name.clone(), node: watched.node.clone(), orders });
    received
}

impl Mesh {
    /// Those of this name, of one node or of all; the error names what there is.
    pub(crate) fn controls(&self, name: &str, node: Option<&str>) -> Result<Vec<Control>, String> {
        let named = |c: &&Control| c.name == name;
        let on_node = |c: &&Control| node.is_none_or(|node| c.node.as_deref() == Some(node));
        let found: Vec<Control> =
            self.controls.iter().filter(named).filter(on_node).cloned().collect();
        if !found.is_empty() {
            return Ok(found);
        }
        let label = |c: &Control| match &c.node {
            Some(node) => format!("{} on {node}", c.name),
            None => c.name.clone(),
        };
        let there: Vec<String> = self.controls.iter().map(label).collect();
        let asked = node.map_or_else(|| name.to_owned(), |node| format!("{name} on {node}"));
        Err(format!("no process {asked}; there are: {}", there.join(", ")))
    }

    pub(crate) fn statuses(&self) -> Vec<ProcessStatus> {
        let mut all = lock(&self.states).clone();
        // One that drains stands below the one that serves.
        let draining = |s: &ProcessStatus| s.state == DRAINING;
        all.sort_by(|a, b| (&a.name, &a.node, draining(a)).cmp(&(&b.name, &b.node, draining(b))));
        all
    }
}

/// How to start a process.
struct Start {
    command: Command,
    files: Vec<OwnedFd>,
    ns: Option<NetNs>,
    /// Where it will say that it is ready.
    ready: Option<pipe::Receiver>,
}

struct Ztunnel {
    program: PathBuf,
    node: String,
    ns: NetNs,
    socket: PathBuf,
    home: PathBuf,
    root: PathBuf,
    registry: Registry,
    drain: Duration,
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
        command.arg("--drain-seconds").arg(self.drain.as_secs().to_string());
        let (ready, say_ready) = fds::pipe()?;
        command.arg("--token-fd").arg("3").arg("--ready-fd").arg("4");
        let (files, ns) = (vec![read, say_ready], Some(self.ns.clone()));
        Ok(Start { command, files, ns, ready: Some(ready) })
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

/// What a supervisor watches over.
struct Watched {
    name: String,
    node: Option<String>,
    /// A file that must be there first.
    after: Option<PathBuf>,
    /// A successor can be started beside it, says when it is ready, and drains the old one by SIGTERM.
    beside: bool,
    /// How long one that was replaced may live.
    drain: Duration,
}

/// Starts a process again and again, and obeys orders about it.
async fn supervise(
    around: Around,
    watched: Watched,
    mut orders: mpsc::Receiver<Order>,
    begin: impl Fn(u32) -> Result<Start> + Send,
) {
    let Watched { name, node, after, .. } = &watched;
    let file = node.as_ref().map_or_else(|| name.clone(), |n| format!("{name}_{n}"));
    let log = around.place.logs().join(format!("{file}.log"));
    let state = ProcessStatus {
        name: name.clone(),
        node: node.clone(),
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
    let output = Output::to(log.clone());
    let mut it = Supervised { around, watched, log, output, state, begin, old: vec![] };
    let mut pause = Duration::ZERO;
    // Who asked for the coming start.
    let mut asked: Option<(Order, Instant)> = None;
    loop {
        let began = Instant::now();
        let why = match it.start() {
            Ok(Running { process, .. }) => {
                it.runs(&process);
                if let Some((order, since)) = asked.take() {
                    order.answer(Ok(it.done(None, process.pid(), since)));
                }
                match it.watch(process, &mut orders).await {
                    Ended::Died(code) => format!("ended with status {code}"),
                    Ended::Ordered(order) => {
                        pause = Duration::ZERO;
                        asked = it.stopped(order, &mut orders).await;
                        continue;
                    }
                }
            }
            Err(e) => format!("{e:#}"),
        };
        if let Some((order, _)) = asked.take() {
            order.answer(Err(why.clone()));
        }
        // The first death costs no pause: connections wait.
        pause = if began.elapsed() >= FORGIVEN_AFTER { Duration::ZERO } else { pause };
        it.died(&why, pause).await;
        tokio::time::sleep(pause).await;
        pause = (pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
    }
}

/// A process of the mesh and everything around it.
struct Supervised<B> {
    around: Around,
    watched: Watched,
    log: PathBuf,
    /// The same file, for the process and those that drain.
    output: Output,
    state: ProcessStatus,
    begin: B,
    /// Those that were replaced and still drain, the oldest first.
    old: Vec<Process>,
}

/// A process, and where it says that it is ready.
struct Running {
    process: Process,
    ready: Option<pipe::Receiver>,
}

enum Ended {
    Died(u8),
    /// By this order, not answered yet.
    Ordered(Order),
}

impl<B: Fn(u32) -> Result<Start> + Send> Supervised<B> {
    fn start(&self) -> Result<Running> {
        let start = (self.begin)(self.state.restarts)?;
        start_one(&self.around, start, &self.output)
    }

    fn runs(&mut self, process: &Process) {
        (self.state.state, self.state.pid) = ("Running".to_owned(), Some(process.pid()));
        self.around.publish(&self.state);
    }

    fn label(&self) -> String {
        let Watched { name, node, .. } = &self.watched;
        node.as_ref().map_or_else(|| name.clone(), |n| format!("{name} on {n}"))
    }

    fn done(&self, old: Option<i32>, new: i32, since: Instant) -> Restarted {
        let Watched { name, node, .. } = &self.watched;
        let milliseconds = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
        Restarted { name: name.clone(), node: node.clone(), old, new: Some(new), milliseconds }
    }

    /// Until the process ends. Replaces it meanwhile if told to.
    async fn watch(&mut self, mut process: Process, orders: &mut mpsc::Receiver<Order>) -> Ended {
        loop {
            let order = tokio::select! {
                code = process.ended() => return Ended::Died(code),
                // The lab holds the other end.
                Some(order) = orders.recv() => order,
            };
            match order.what {
                Action::Start => {
                    let pid = process.pid();
                    order.answer(Err(format!("{} runs already (process {pid})", self.label())));
                }
                Action::Restart if self.watched.beside => {
                    let since = Instant::now();
                    match self.successor().await {
                        Ok(next) => {
                            let old = std::mem::replace(&mut process, next);
                            self.runs(&process);
                            order.answer(Ok(self.done(Some(old.pid()), process.pid(), since)));
                            self.retire(old);
                        }
                        Err(e) => order.answer(Err(format!("{e:#}; the old one goes on"))),
                    }
                }
                Action::Restart | Action::Stop => {
                    end(&process, STOP_WITHIN).await;
                    return Ended::Ordered(order);
                }
            }
        }
    }

    /// Another process beside the one that runs, ready to serve.
    async fn successor(&self) -> Result<Process> {
        let label = self.label();
        let Running { process, ready } = self.start()?;
        let mut ready = ready.context("it cannot say when it is ready")?;
        let mut said = [0; 16];
        let answered = tokio::select! {
            read = ready.read(&mut said) => read.is_ok_and(|n| n > 0),
            () = tokio::time::sleep(READY_WITHIN) => false,
        };
        if answered {
            return Ok(process);
        }
        process.signal(Signal::SIGKILL);
        process.ended().await;
        let said = logs::tail(&self.log, TAIL);
        let last = said.lines().last().unwrap_or_default();
        bail!(
            "a new {label} was not ready within {} s; its log ({}) ends with: {last}",
            READY_WITHIN.as_secs(),
            self.log.display()
        )
    }

    /// Lets one that was replaced end in peace, for a while.
    fn retire(&mut self, old: Process) {
        old.signal(Signal::SIGTERM);
        self.old.retain(|old| !old.has_ended());
        if self.old.len() >= MOST_DRAINING {
            // A second signal ends what is left in it.
            self.old.remove(0).signal(Signal::SIGTERM);
        }
        self.old.push(old.clone());
        let state = ProcessStatus {
            state: DRAINING.to_owned(),
            pid: Some(old.pid()),
            ..self.state.clone()
        };
        lock(&self.around.states).push(state);
        let (around, label) = (self.around.clone(), self.label());
        let limit = self.watched.drain + DRAIN_SLACK;
        tokio::spawn(async move {
            if tokio::time::timeout(limit, old.ended()).await.is_err() {
                let text = format!("an old {label} (process {}) did not end, killed", old.pid());
                let _ = around.events.send(Event::Warning(text)).await;
                old.signal(Signal::SIGKILL);
                old.ended().await;
            }
            lock(&around.states).retain(|s| s.state != DRAINING || s.pid != Some(old.pid()));
        });
    }

    /// It was ended by order. Returns when it is to be started again, and by whose order.
    async fn stopped(
        &mut self,
        order: Order,
        orders: &mut mpsc::Receiver<Order>,
    ) -> Option<(Order, Instant)> {
        let since = Instant::now();
        if order.what == Action::Restart {
            return Some((order, since));
        }
        (self.state.state, self.state.pid) = ("Stopped".to_owned(), None);
        self.around.publish(&self.state);
        let Watched { name, node, .. } = &self.watched;
        order.answer(Ok(Restarted {
            name: name.clone(),
            node: node.clone(),
            old: None,
            new: None,
            milliseconds: 0,
        }));
        loop {
            // The lab holds the other end; when it ends, so does this.
            let order = orders.recv().await?;
            match order.what {
                Action::Stop => order.answer(Err(format!("{} is stopped already", self.label()))),
                Action::Start | Action::Restart => return Some((order, Instant::now())),
            }
        }
    }

    async fn died(&mut self, why: &str, pause: Duration) {
        (self.state.state, self.state.pid) = (why.to_owned(), None);
        self.state.restarts += 1;
        self.around.publish(&self.state);
        let said = logs::tail(&self.log, TAIL);
        let last = said.lines().last().unwrap_or_default();
        let text = format!(
            "{} {why}; started again in {} ms; its log ({}) ends with: {last}",
            self.label(),
            pause.as_millis(),
            self.log.display()
        );
        // Fails only when the lab is ending.
        let _ = self.around.events.send(Event::Warning(text)).await;
    }
}

/// Ends a process, by force after a while.
async fn end(process: &Process, within: Duration) {
    process.signal(Signal::SIGTERM);
    if tokio::time::timeout(within, process.ended()).await.is_err() {
        process.signal(Signal::SIGKILL);
        process.ended().await;
    }
}

fn start_one(around: &Around, start: Start, output: &Output) -> Result<Running> {
    let Start { mut command, files, ns, ready } = start;
    let output = output.pipe()?;
    command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output).current_dir("/");
    let start = || around.processes.start(command, files);
    let process = match ns {
        // A process starts in the network namespace of the thread that starts it.
        Some(ns) => ns.run(start).context("enter the node")?,
        None => start(),
    }?;
    Ok(Running { process, ready })
}

impl Around {
    fn publish(&self, state: &ProcessStatus) {
        let mut all = lock(&self.states);
        let same = |s: &ProcessStatus| (&s.name, &s.node) == (&state.name, &state.node);
        all.retain(|s| !same(s) || s.state == DRAINING);
        all.push(state.clone());
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
