//! Runs one pod: carries out what [`Lifecycle`] decides and tells it what happened.
//!
//! One task per pod, owner of everything the pod has. Containers and probes run in tasks of their own and report back.
//!
//! Invariants: when the worker's `run` returns, no process of the pod is left; a report is sent for every change.

use std::fs;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use net::NetNs;
use nix::sys::signal::Signal;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, oneshot};

use super::exec::{self, ExecRun};
use super::helper::KILL_NOW;
use super::lifecycle::{
    Action, ContainerStatus, Happened, Lifecycle, Millis, Phase, ProbeKind, Run,
};
use super::probe;
use super::resolve::PodPlan;
use super::run::{ContainerRun, HelperSays, ProcessRun, RootFs, Volume};
use super::spaces::Spaces;
use super::volumes::{self, Credentials};
use crate::fds;
use crate::ids::{self, IdRange};
use crate::logs;
use crate::place::Place;
use crate::procs::{Process, Processes};

/// Containers, probes and commands of one pod that wait for the worker. It handles each at once.
const QUEUE: usize = 64;
/// How long a killed container may take to vanish before it is killed again.
const KILL_AGAIN: Duration = Duration::from_secs(5);

/// What a worker needs.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) namespace: String,
    pub(crate) name: String,
    /// Tells this pod from an earlier one of the same name.
    pub(crate) instance: u64,
    pub(crate) plan: PodPlan,
    pub(crate) net: NetNs,
    /// The node's: probes come from there.
    pub(crate) node_net: NetNs,
    pub(crate) ips: Vec<std::net::IpAddr>,
    /// None where there is no mesh.
    pub(crate) credentials: Option<Credentials>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) reports: mpsc::Sender<Report>,
}

/// The same for all pods.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) place: Place,
    pub(crate) processes: Processes,
    pub(crate) lab_uids: Vec<IdRange>,
    pub(crate) lab_gids: Vec<IdRange>,
    /// Paths of the machine that pods must not see.
    pub(crate) hidden: Vec<PathBuf>,
}

/// What the lab asks of a worker.
#[derive(Debug)]
pub(crate) enum Ask {
    /// Network and mesh are ready: containers may start.
    Start,
    /// End everything within this time; at most the pod's own grace period.
    Stop(Millis),
    /// How to run a command in a container (by name; empty: the first).
    Enter(String, oneshot::Sender<Result<ExecRun, String>>),
}

/// What a worker tells the lab.
#[derive(Clone, Debug)]
pub(crate) struct Report {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) instance: u64,
    pub(crate) phase: Phase,
    pub(crate) ready: bool,
    pub(crate) containers: Vec<ContainerStatus>,
    /// Nothing of the pod is left.
    pub(crate) gone: bool,
}

struct Running {
    run: Run,
    helper: Process,
    /// The container's first process, once its program runs.
    first: Option<i32>,
    process: ProcessRun,
}

struct State {
    worker: Arc<Worker>,
    lifecycle: Lifecycle,
    running: Vec<Option<Running>>,
    spaces: Spaces,
    happened: mpsc::Sender<Happened>,
    began: Instant,
    grace: Millis,
    started: mpsc::Sender<(Run, i32)>,
}

impl Worker {
    /// Runs the pod until it was asked to stop and has.
    pub(crate) async fn run(self, mut asks: mpsc::Receiver<Ask>) {
        let worker = Arc::new(self);
        let say = Arc::clone(&worker);
        if let Err(e) = Box::pin(work(worker, &mut asks)).await {
            tracing::error!("pod {}/{}: {e:#}", say.namespace, say.name);
            let status = ContainerStatus {
                name: say.plan.containers.first().map(|c| c.name.clone()).unwrap_or_default(),
                init: false,
                state: "CreatePodSandboxError".to_owned(),
                message: format!("{e:#}"),
                ready: false,
                restarts: 0,
            };
            say.report(Phase::Failed, false, vec![status], false).await;
            // Shown until the lab gives it up.
            while let Some(ask) = asks.recv().await {
                match ask {
                    Ask::Stop(_) => break,
                    Ask::Enter(_, reply) => {
                        drop(reply.send(Err(format!("the pod could not be made: {e:#}"))))
                    }
                    Ask::Start => {}
                }
            }
        }
        say.remove_volumes();
        say.report(Phase::Failed, false, vec![], true).await;
    }

    async fn report(
        &self,
        phase: Phase,
        ready: bool,
        containers: Vec<ContainerStatus>,
        gone: bool,
    ) {
        let report = Report {
            namespace: self.namespace.clone(),
            name: self.name.clone(),
            instance: self.instance,
            phase,
            ready,
            containers,
            gone,
        };
        // Fails only when the lab is ending.
        let _ = self.reports.send(report).await;
    }

    fn volumes(&self) -> PathBuf {
        self.shared
            .place
            .private()
            .join("volumes")
            .join(format!("{}_{}_{}", self.namespace, self.name, self.instance))
    }

    fn remove_volumes(&self) {
        if let Err(e) = fs::remove_dir_all(self.volumes())
            && e.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!("volumes of {}/{}: {e}", self.namespace, self.name);
        }
    }
}

async fn work(worker: Arc<Worker>, asks: &mut mpsc::Receiver<Ask>) -> Result<()> {
    volumes::make(&worker.plan.volumes, &worker.volumes())?;
    let (happened, mut events) = mpsc::channel(QUEUE);
    let (started, mut starts) = mpsc::channel(QUEUE);
    let plans = worker.plan.containers.clone();
    let mut state = State {
        running: plans.iter().map(|_| None).collect(),
        lifecycle: Lifecycle::new(plans, worker.plan.policy),
        spaces: Spaces::create(&worker.plan.hostname)?,
        happened,
        began: Instant::now(),
        grace: worker.plan.grace,
        started,
        worker,
    };
    let mut stopping = false;
    state.report().await;
    while !(stopping && state.lifecycle.is_idle()) {
        let due = state.lifecycle.next_due();
        tokio::select! {
            ask = asks.recv() => match ask {
                Some(Ask::Start) => state.handle(Happened::Ready),
                Some(Ask::Enter(container, reply)) => {
                    let _ = reply.send(state.enter(&container));
                    continue;
                }
                Some(Ask::Stop(within)) => {
                    stopping = true;
                    state.stop(within);
                }
                None => {
                    stopping = true;
                    state.stop(0);
                }
            },
            Some((run, first)) = starts.recv() => {
                if let Some(running) = state.running[run.container].as_mut().filter(|r| r.run == run) {
                    running.first = Some(first);
                }
                state.handle(Happened::Started(run));
            }
            Some(event) = events.recv() => state.handle(event),
            () = until(state.began, due) => state.handle(Happened::Tick),
        }
        state.report().await;
    }
    Ok(())
}

async fn until(began: Instant, due: Option<Millis>) {
    match due {
        Some(due) => tokio::time::sleep_until((began + Duration::from_millis(due)).into()).await,
        None => std::future::pending().await,
    }
}

impl State {
    fn now(&self) -> Millis {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn handle(&mut self, event: Happened) {
        let mut events = vec![event];
        while let Some(event) = events.pop() {
            for action in self.lifecycle.handle(self.now(), event) {
                if let Err((run, e)) = self.act(&action) {
                    events.push(Happened::NotStarted(run, format!("{e:#}")));
                }
            }
        }
    }

    fn stop(&mut self, within: Millis) {
        self.grace = self.worker.plan.grace.min(within);
        for action in self.lifecycle.stop() {
            // Ending cannot fail.
            let _ = self.act(&action);
        }
    }

    fn act(&mut self, action: &Action) -> Result<(), (Run, anyhow::Error)> {
        match *action {
            Action::Start(run) => self.start(run).map_err(|e| (run, e)),
            Action::End(run) => {
                self.end(run);
                Ok(())
            }
            Action::Probe(run, kind) => {
                self.probe(run, kind);
                Ok(())
            }
        }
    }

    async fn report(&self) {
        let l = &self.lifecycle;
        self.worker.report(l.phase(), l.is_ready(), l.statuses(), false).await;
    }

    fn start(&mut self, run: Run) -> Result<()> {
        let plan = &self.worker.plan.containers[run.container];
        let process = plan.process.clone().map_err(|p| anyhow::anyhow!(p.message))?;
        let worker = &self.worker;
        volumes::fill(&worker.plan.volumes, &worker.volumes(), worker.credentials.as_ref())?;
        let container = self.container_run(run, process.clone());
        let log = self.worker.shared.place.container_log(
            &self.worker.namespace,
            &self.worker.name,
            &plan.name,
        );
        let output = logs::pipe_to(log)?;
        let (status, theirs) = fds::pipe()?;
        let mut command = Command::new("/proc/self/exe");
        command.arg(crate::CONTAINER).env_clear().stdin(Stdio::null());
        command.stdout(output.try_clone()?).stderr(output);
        let [uts, ipc] = self.spaces.try_clone()?;
        let net = self.worker.net.as_fd().try_clone_to_owned()?;
        let files = vec![exec::description(&container)?, theirs, net, uts, ipc];
        let helper = self.worker.shared.processes.start(command, files)?;
        self.running[run.container] =
            Some(Running { run, helper: helper.clone(), first: None, process });
        tokio::spawn(watch(run, helper, status, self.happened.clone(), self.started.clone()));
        Ok(())
    }

    fn container_run(&self, run: Run, process: ProcessRun) -> ContainerRun {
        let worker = &self.worker;
        let plan = &worker.plan.containers[run.container];
        let volumes = plan.mounts.iter().map(|m| Volume {
            source: worker.volumes().join(&m.volume).join(&m.sub_path),
            target: m.target.clone(),
            read_only: m.read_only,
        });
        let volumes: Vec<Volume> = volumes.collect();
        for volume in &volumes {
            // subPath names a folder that need not exist yet.
            let _ = fs::create_dir_all(&volume.source);
        }
        ContainerRun {
            uid_map: ids::pod_map(&worker.shared.lab_uids, process.uid),
            gid_map: ids::pod_map(&worker.shared.lab_gids, process.gid),
            root: RootFs {
                source: plan.root.clone(),
                files: worker.files(),
                mounts: volumes,
                hide: worker.shared.hidden.clone(),
                root: worker.shared.place.root(),
                layers: worker.shared.place.layers(),
            },
            process,
        }
    }

    /// Lets the container end by itself, then makes it.
    fn end(&self, run: Run) {
        let Some(running) = self.running[run.container].as_ref().filter(|r| r.run == run) else {
            return;
        };
        let hook = self.worker.plan.containers[run.container]
            .pre_stop
            .clone()
            .zip(self.command_in(running));
        let (helper, grace) = (running.helper.clone(), Duration::from_millis(self.grace));
        let worker = Arc::clone(&self.worker);
        tokio::spawn(async move {
            let asked = async {
                if let Some((hook, inside)) = hook
                    && let Err(e) = probe::ask(&worker, &hook, Some(inside), grace).await
                {
                    tracing::info!("preStop of {}/{}: {e}", worker.namespace, worker.name);
                }
                helper.signal(Signal::SIGTERM);
                helper.ended().await;
            };
            let mut ended = tokio::time::timeout(grace, asked).await.is_ok();
            while !ended {
                helper.signal(KILL_NOW);
                ended = tokio::time::timeout(KILL_AGAIN, helper.ended()).await.is_ok();
            }
        });
    }

    fn probe(&self, run: Run, kind: ProbeKind) {
        let plan = &self.worker.plan.containers[run.container];
        let probe = match kind {
            ProbeKind::Startup => &plan.startup,
            ProbeKind::Readiness => &plan.readiness,
            ProbeKind::Liveness => &plan.liveness,
        };
        let Some(probe) = probe.clone() else { return };
        let running = self.running[run.container].as_ref().filter(|r| r.run == run);
        let inside = running.and_then(|r| self.command_in(r));
        let (worker, happened) = (Arc::clone(&self.worker), self.happened.clone());
        tokio::spawn(async move {
            let result =
                probe::ask(&worker, &probe.action, inside, Duration::from_millis(probe.timeout))
                    .await;
            let _ = happened.send(Happened::Probed(run, kind, result)).await;
        });
    }

    /// How to run something beside the container's program, once that runs.
    fn command_in(&self, running: &Running) -> Option<ExecRun> {
        Some(ExecRun {
            process: running.process.clone(),
            container: Some(running.first?),
            terminal: false,
        })
    }

    fn enter(&self, container: &str) -> Result<ExecRun, String> {
        let names: Vec<&str> =
            self.worker.plan.containers.iter().map(|c| c.name.as_str()).collect();
        let index = if container.is_empty() {
            self.worker.plan.containers.iter().position(|c| !c.init)
        } else {
            names.iter().position(|n| *n == container)
        };
        let Some(index) = index else {
            return Err(format!(
                "no container {container:?} in this pod; it has: {}",
                names.join(", ")
            ));
        };
        self.running[index].as_ref().and_then(|r| self.command_in(r)).ok_or_else(|| {
            let status = self.lifecycle.statuses().swap_remove(index);
            let why = if status.message.is_empty() {
                String::new()
            } else {
                format!(" ({})", status.message)
            };
            format!("container {:?} is not running: {}{why}", status.name, status.state)
        })
    }
}

impl Worker {
    fn files(&self) -> Vec<(PathBuf, String)> {
        let names: Vec<String> = [self.plan.fqdn.clone(), Some(self.plan.hostname.clone())]
            .into_iter()
            .flatten()
            .collect();
        let mut hosts = String::from(
            "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::0\tip6-localnet\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n",
        );
        for ip in &self.ips {
            hosts.push_str(&format!("{ip}\t{}\n", names.join("\t")));
        }
        for (ip, names) in &self.plan.host_aliases {
            hosts.push_str(&format!("{ip}\t{}\n", names.join("\t")));
        }
        let resolv = format!(
            "nameserver {}\nsearch {}.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n",
            crate::network::DNS_V4,
            self.namespace
        );
        vec![
            ("/etc/hosts".into(), hosts),
            ("/etc/resolv.conf".into(), resolv),
            ("/etc/hostname".into(), format!("{}\n", self.plan.hostname)),
        ]
    }
}

/// Reads what the helper says, then waits for its end.
async fn watch(
    run: Run,
    helper: Process,
    status: pipe::Receiver,
    happened: mpsc::Sender<Happened>,
    started: mpsc::Sender<(Run, i32)>,
) {
    let mut lines = BufReader::new(status).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let event = match serde_json::from_str(&line) {
            Ok(HelperSays::Started(first)) => {
                let _ = started.send((run, first)).await;
                continue;
            }
            Ok(HelperSays::Failed(why)) => Happened::NotStarted(run, why),
            Err(e) => Happened::NotStarted(run, format!("the helper said {line:?}: {e}")),
        };
        let _ = happened.send(event).await;
    }
    let code = helper.ended().await;
    let _ = happened.send(Happened::Exited(run, code)).await;
}

/// What a probe of kind "exec" runs with.
pub(crate) fn with_argv(inside: &ExecRun, argv: Vec<String>) -> ExecRun {
    let process = ProcessRun { argv, ..inside.process.clone() };
    ExecRun { process, container: inside.container, terminal: false }
}
