//! Starts a process of the mesh again and again, and obeys orders about it.
//!
//! Invariants: a process that dies is started again with a growing pause. One that can be replaced is replaced by another
//! beside it: the old one is told to drain when the new one has said that it is ready, and goes on as if nothing had been
//! when it has not. No process outlives its limit.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use net::NetNs;
use nix::sys::signal::Signal;
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, oneshot};

use crate::control::{Action, Restarted};
use crate::launch::Event;
use crate::logs::{self, Output};
use crate::place::Place;
use crate::procs::{Process, Processes};
use crate::status::ProcessStatus;

/// Pauses between starts of a process that dies.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// A process that lived this long starts over with the first pause.
const FORGIVEN_AFTER: Duration = Duration::from_secs(30);
/// A new ztunnel reads its configuration from disk and takes the pods of its node, some milliseconds each.
const READY_WITHIN: Duration = Duration::from_secs(30);
/// For a process that is stopped, each time it is told; at last it is killed.
const STOP_WITHIN: Duration = Duration::from_secs(3);
/// What a ztunnel may take beyond its own limit for draining.
const DRAIN_SLACK: Duration = Duration::from_secs(10);
/// Old ztunnels of one node that drain at once. Whoever replaces more often than connections end has those of the oldest ended.
const MOST_DRAINING: usize = 8;
/// Orders that wait for a supervisor: people give them.
const ORDERS: usize = 8;
/// The state of a ztunnel that was replaced.
pub(crate) const DRAINING: &str = "Draining";
/// How much of a dead process's log is shown.
const TAIL: u64 = 600;
/// How soon a ztunnel sees the control plane's root certificate.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// What is known of all processes.
pub(crate) type States = Arc<Mutex<Vec<ProcessStatus>>>;

/// What a supervisor needs beside what it starts.
#[derive(Clone)]
pub(crate) struct Around {
    pub(crate) place: Place,
    pub(crate) processes: Processes,
    pub(crate) events: mpsc::Sender<Event>,
    pub(crate) states: States,
}

/// What a supervisor watches over.
pub(crate) struct Watched {
    pub(crate) name: String,
    pub(crate) node: Option<String>,
    /// A file that must be there first.
    pub(crate) after: Option<PathBuf>,
    /// A successor can be started beside it, says when it is ready, and drains the old one by SIGTERM.
    pub(crate) beside: bool,
    /// How long one that was replaced may live.
    pub(crate) drain: Duration,
}

/// How to start a process.
pub(crate) struct Start {
    pub(crate) command: Command,
    pub(crate) files: Vec<OwnedFd>,
    pub(crate) ns: Option<NetNs>,
    /// Where it will say that it is ready.
    pub(crate) ready: Option<pipe::Receiver>,
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

/// Starts a process now and whenever it dies. The way to its supervisor.
pub(crate) fn watch_over(
    around: Around,
    watched: Watched,
    begin: impl Fn() -> Result<Start> + Send + Sync + 'static,
) -> Control {
    let (orders, received) = mpsc::channel(ORDERS);
    let control = Control { name: watched.name.clone(), node: watched.node.clone(), orders };
    tokio::spawn(supervise(around, watched, received, begin));
    control
}

/// Starts a process again and again, and obeys orders about it.
async fn supervise(
    around: Around,
    watched: Watched,
    mut orders: mpsc::Receiver<Order>,
    begin: impl Fn() -> Result<Start> + Send + Sync,
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
                        // The lab is ending.
                        if asked.is_none() {
                            return;
                        }
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

impl<B: Fn() -> Result<Start> + Send + Sync> Supervised<B> {
    fn start(&self) -> Result<Running> {
        let start = (self.begin)()?;
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
                    end(&process).await;
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

/// Ends a process: asks, asks for haste (a ztunnel then ends its connections with their reason), kills.
async fn end(process: &Process) {
    for signal in [Signal::SIGTERM, Signal::SIGTERM, Signal::SIGKILL] {
        process.signal(signal);
        if tokio::time::timeout(STOP_WITHIN, process.ended()).await.is_ok() {
            return;
        }
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

/// A poisoned lock only means that another thread panicked.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
