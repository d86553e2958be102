//! Process 1 of the lab: one task owns the state of the whole world, others report to it.
//!
//! What a cluster spreads over API server, controllers, scheduler, kubelets and kube-proxy is here one loop: something
//! happened (a file changed, a pod reported, a client asked), the plan is made anew where needed, and the difference to what
//! runs is carried out.
//!
//! Invariants: every decision is a pure function elsewhere (`compile::local::plan`, [`reconcile`](crate::reconcile),
//! [`endpoints`](crate::endpoints)); nothing here waits for a pod or a proxy; a pod of the mesh starts only when its ztunnel
//! has it and its traffic is captured.

mod clients;
mod enrol;
mod health;
mod pods;
mod publish;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use compile::local::{Assignments, LocalConfig, LocalPlan};
use compile::waypoints::Settings as WaypointSettings;
use compile::{Compiler, Diagnostic, Folder, MeshConfig};
use istiod_lite::scan::News;
use istiod_lite::watch::{self, Update};
use nix::mount::{MsFlags, mount};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::sync::{mpsc, oneshot};

use crate::control::{Action, Answer, Request};
use crate::dns::server::{Current, Upstream};
use crate::launch::{Event, WorldConfig, WorldFds};
use crate::mesh::{self, Mesh, Settings};
use crate::network::Network;
use crate::objects::ObjectFiles;
use crate::place::Place;
use crate::pod::worker::{Report, Shared};
use crate::procs::Processes;
use crate::reconcile::Key;
use crate::supervise::Control;
use crate::{dns, ids};

/// Things that happened and wait for the owner. Senders wait when it is full.
const QUEUE: usize = 1024;
/// The program of our own image, beside those of the mesh.
const WAYPOINT: &str = "waypoint";
/// OpenTelemetry's variables that waypoints of the lab get.
const TRACES: [&str; 4] = [
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_PROTOCOL",
    "OTEL_TRACES_SAMPLER",
    "OTEL_TRACES_SAMPLER_ARG",
];
/// When to try again what could not be done.
const TRY_AGAIN: Duration = Duration::from_secs(2);
/// How long pods may take to end when the lab ends: a person waits for it. Then they are killed.
const END_WITHIN: Duration = Duration::from_millis(2_000);

/// Something happened.
#[derive(Debug)]
enum Input {
    Folder(Update),
    Pod(Report),
    /// ztunnel serves a pod that runs already.
    Announced {
        key: Key,
        instance: u64,
    },
    /// A pod was enrolled and captured, or not.
    Captured {
        key: Key,
        instance: u64,
        result: Result<(), String>,
    },
    /// A pod was taken out of the mesh.
    Released {
        key: Key,
        instance: u64,
    },
    Client(Request, oneshot::Sender<Reply>),
    /// Something could not be done a while ago.
    TryAgain,
    End,
}

/// What a client gets from the owner.
#[derive(Debug)]
enum Reply {
    Answer(Answer),
    /// Ask this pod's worker how to run the command, or run it in this network namespace.
    Enter(clients::Target),
    /// Have these supervisors do it.
    Order(Vec<Control>, Action),
}

/// The state of everything.
struct World {
    config: WorldConfig,
    local: LocalConfig,
    network: Network,
    shared: Arc<Shared>,
    folder: Folder,
    /// Compiles for complaints; kept, so that a change costs what it touches.
    compiler: Compiler,
    /// What the watcher says about files and folders as such.
    folder_problems: Vec<Diagnostic>,
    assignments: Assignments,
    plan: LocalPlan,
    pods: BTreeMap<Key, pods::Pod>,
    images: BTreeMap<String, (PathBuf, bool)>,
    objects: ObjectFiles,
    names: Current,
    mesh: Option<Mesh>,
    events: mpsc::Sender<Event>,
    reports: mpsc::Sender<Report>,
    inputs: mpsc::Sender<Input>,
    next_instance: u64,
    /// What could not be done just now.
    troubles: BTreeSet<String>,
    /// Complaints that were shown.
    shown: BTreeSet<String>,
    /// What nodes translate now.
    translated: Option<Vec<net::service_nat::ServicePort>>,
    /// The first plan was carried out, and every pod is ready or known not to be.
    settled: bool,
    /// The folder was read.
    read: bool,
    /// The lab itself ends.
    ending: bool,
    /// A timer for another attempt is running.
    waiting_to_try: bool,
}

/// Runs the lab in this process until it is told to end. `info` is the file with its configuration.
pub(crate) fn run(info: &Path, fds: WorldFds) -> Result<ExitCode> {
    let mut front = UnixStream::from(fds.events.try_clone()?);
    let ended = start(info, fds);
    if let Err(e) = &ended {
        tracing::error!("{e:#}");
        let line = serde_json::to_string(&Event::Failed(format!("{e:#}")))?;
        front.set_nonblocking(false)?;
        let _ = writeln!(front, "{line}");
    }
    Ok(if ended.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn start(info: &Path, fds: WorldFds) -> Result<()> {
    let text = fs::read(info).with_context(|| info.display().to_string())?;
    let config: WorldConfig = serde_json::from_slice(&text)?;
    // Not by name: in here the user has another number, and the folder's path is made of it.
    let place = Place { name: config.info.name.clone(), state: config.info.state.clone() };
    make_folders(&place)?;
    start_log(&place)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.context("start the runtime")?.block_on(live(config, place, fds))
}

async fn live(config: WorldConfig, place: Place, fds: WorldFds) -> Result<()> {
    let (inputs, mut queue) = mpsc::channel(QUEUE);
    let events = talk_to_front(fds.events.into(), inputs.clone())?;
    let processes = Processes::default();
    tokio::spawn(processes.clone().collect());
    let mut world = World::build(config, place, processes, events, inputs.clone(), fds.dns).await?;
    clients::listen(fds.control.into(), inputs.clone(), world.shared.processes.clone())?;
    let sink = inputs.clone();
    let watching = watch::start(vec![world.config.info.dir.clone()], move |update| {
        // Fails only when the lab is ending.
        let _ = sink.blocking_send(Input::Folder(update));
    });
    let _watching = watching.context("watch the folder")?;
    while let Some(input) = queue.recv().await {
        if matches!(input, Input::End) {
            break;
        }
        let mut changed = world.handle(input);
        // Whatever else is waiting is taken in before the world is made to fit.
        while let Ok(input) = queue.try_recv() {
            if matches!(input, Input::End) {
                return world.end(queue).await;
            }
            changed |= world.handle(input);
        }
        if changed {
            world.reconcile();
        }
    }
    world.end(queue).await
}

impl World {
    async fn build(
        config: WorldConfig,
        place: Place,
        processes: Processes,
        events: mpsc::Sender<Event>,
        inputs: mpsc::Sender<Input>,
        dns_link: std::os::fd::OwnedFd,
    ) -> Result<Self> {
        let mut local = LocalConfig::with_nodes(
            u8::try_from(config.info.nodes).unwrap_or(LocalConfig::MAX_NODES),
        );
        local.waypoints = local.waypoints.filter(|_| config.bin_dir.is_some());
        if let Some(settings) = &mut local.waypoints {
            settings.environment = traces();
        }
        let network = Network::create(&local).context("build the network")?;
        let _ = events
            .send(Event::Progress(format!("{} nodes on a bridge", network.nodes.len())))
            .await;
        let (names, upstream) = (Current::default(), Upstream::new(dns_link)?);
        for node in &network.nodes {
            net::service_nat::prepare(&node.ns)?;
            dns::server::serve(&node.ns, &names, &upstream)
                .with_context(|| format!("DNS on {}", node.name))?;
        }
        let mesh = match &config.bin_dir {
            Some(bin) => {
                // Copies of every pod's listeners are kept here.
                net::socket::raise_open_files().context("raise the limit of open files")?;
                let settings = Settings {
                    drain: Duration::from_secs(config.drain_seconds),
                    same_node_direct: config.same_node_direct.join(","),
                };
                let dir = &config.info.dir;
                Some(mesh::start(&place, bin, dir, &network, &processes, &events, &settings)?)
            }
            None => None,
        };
        let shared = shared(&place, processes)?;
        let reports = forward_reports(inputs.clone());
        Ok(Self {
            objects: ObjectFiles::new(place.objects()).context("folder for objects")?,
            images: images(&config),
            config,
            local,
            network,
            shared,
            folder: Folder::new(),
            compiler: Compiler::new(MeshConfig::default()),
            folder_problems: vec![],
            assignments: Assignments::default(),
            plan: LocalPlan::default(),
            pods: BTreeMap::new(),
            names,
            mesh,
            events,
            reports,
            inputs,
            next_instance: 1,
            troubles: BTreeSet::new(),
            shown: BTreeSet::new(),
            translated: None,
            settled: false,
            read: false,
            ending: false,
            waiting_to_try: false,
        })
    }

    /// Takes in what happened. True: plan and world have to be compared.
    fn handle(&mut self, input: Input) -> bool {
        match input {
            Input::Folder(update) => {
                for news in update.news {
                    match news {
                        News::Set { key, text } => self.folder.set_file(key.0, &key.1, &text),
                        News::Removed { key } => self.folder.remove_file(key.0, &key.1),
                    }
                }
                self.folder_problems = update.diagnostics;
                self.read |= update.complete;
                true
            }
            Input::Pod(report) => self.pod_reported(report),
            Input::Announced { key, instance } => self.pod_announced(&key, instance),
            Input::Captured { key, instance, result } => self.pod_captured(&key, instance, result),
            Input::Released { key, instance } => self.pod_released(&key, instance),
            Input::Client(request, reply) => {
                let _ = reply.send(self.reply(request));
                false
            }
            Input::TryAgain => {
                self.waiting_to_try = false;
                true
            }
            Input::End => false,
        }
    }

    /// Makes the plan and brings the world closer to it.
    fn reconcile(&mut self) {
        if !self.read {
            return;
        }
        self.troubles.clear();
        let objects = self.folder.objects();
        self.plan = compile::local::plan(&objects, &self.local, &mut self.assignments);
        self.adopt_plan();
        self.start_and_end_pods();
        self.publish();
        self.complain(&objects);
        self.try_again_later();
        if !self.settled
            && self.pods.values().all(pods::Pod::has_settled)
            && self.pods.len() >= self.plan.pods.len()
        {
            self.settled = true;
            self.say(Event::Ready {
                pods: self.pods.len(),
                services: self.plan.services.len(),
                nodes: self.config.info.nodes,
            });
        }
    }

    /// Troubles may pass by themselves: a disk gets room again.
    fn try_again_later(&mut self) {
        if self.troubles.is_empty() || self.waiting_to_try {
            return;
        }
        self.waiting_to_try = true;
        let inputs = self.inputs.clone();
        tokio::spawn(async move {
            tokio::time::sleep(TRY_AGAIN).await;
            let _ = inputs.send(Input::TryAgain).await;
        });
    }

    fn say(&self, event: Event) {
        // The front reads all the time; when it is stuck, news are dropped rather than the lab stopped.
        let _ = self.events.try_send(event);
    }

    /// Ends all pods, within a limit.
    async fn end(mut self, mut queue: mpsc::Receiver<Input>) -> Result<()> {
        self.read = false;
        self.ending = true;
        let within = u64::try_from(END_WITHIN.as_millis()).unwrap_or(u64::MAX);
        for pod in self.pods.values_mut() {
            pod.stop(within);
        }
        let all_gone = async {
            while !self.pods.is_empty() {
                match queue.recv().await {
                    Some(Input::Client(_, reply)) => {
                        let _ = reply.send(Reply::Answer(Answer::Ending));
                    }
                    Some(input) => drop(self.handle(input)),
                    None => return,
                }
            }
        };
        // What is left is killed with this process.
        let _ = tokio::time::timeout(END_WITHIN * 2, all_gone).await;
        Ok(())
    }
}

/// What images stand for: our own, unless the user has another for it, and the user's.
fn images(config: &WorldConfig) -> BTreeMap<String, (PathBuf, bool)> {
    let own =
        config.bin_dir.iter().map(|dir| (WaypointSettings::IMAGE.to_owned(), dir.join(WAYPOINT)));
    let all = own.chain(config.images.iter().cloned());
    all.map(|(name, path)| (name, (path.clone(), path.is_dir()))).collect()
}

/// Where spans go, as whoever started the lab has it in the environment. Node proxies inherit it; pods inherit nothing. Not
/// `..._HEADERS`, which may hold a password: what a waypoint is run with can be read by all who read the lab's objects.
fn traces() -> Vec<(model::Str, model::Str)> {
    let of = |name: &str| Some((name.into(), std::env::var(name).ok()?.into()));
    TRACES.into_iter().filter_map(of).collect()
}

/// What all pods have in common.
fn shared(place: &Place, processes: Processes) -> Result<Arc<Shared>> {
    let own_map = |file: &str| {
        let text = fs::read_to_string(file).with_context(|| file.to_owned())?;
        Ok::<_, anyhow::Error>(ids::parse_map(&text))
    };
    Ok(Arc::new(Shared {
        place: place.clone(),
        processes,
        lab_uids: own_map("/proc/self/uid_map")?,
        lab_gids: own_map("/proc/self/gid_map")?,
        hidden: hidden(place),
    }))
}

/// Pods know of reports only; the owner takes them among everything else.
fn forward_reports(inputs: mpsc::Sender<Input>) -> mpsc::Sender<Report> {
    let (reports, mut reported) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        while let Some(report) = reported.recv().await {
            if inputs.send(Input::Pod(report)).await.is_err() {
                return;
            }
        }
    });
    reports
}

/// Sends events to the front; its end, or a line from it, ends the lab.
fn talk_to_front(front: UnixStream, inputs: mpsc::Sender<Input>) -> Result<mpsc::Sender<Event>> {
    front.set_nonblocking(true)?;
    let (read, mut write) = tokio::net::UnixStream::from_std(front)?.into_split();
    let (sender, mut events) = mpsc::channel::<Event>(QUEUE);
    tokio::spawn(async move {
        while let Some(event) = events.recv().await {
            let Ok(mut line) = serde_json::to_vec(&event) else { continue };
            line.push(b'\n');
            if tokio::io::AsyncWriteExt::write_all(&mut write, &line).await.is_err() {
                return;
            }
        }
    });
    tokio::spawn(async move {
        let mut lines = BufReader::new(read).lines();
        // One line, or the end: both mean the same.
        let _ = lines.next_line().await;
        let _ = inputs.send(Input::End).await;
    });
    Ok(sender)
}

fn make_folders(place: &Place) -> Result<()> {
    for dir in [place.logs(), place.objects(), place.root(), place.layers(), place.private()] {
        fs::create_dir_all(&dir)
            .with_context(|| format!("cannot create {} (is the disk full?)", dir.display()))?;
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    // Seen by the lab's processes only: this mount namespace is theirs.
    mount(Some("tmpfs"), &place.private(), Some("tmpfs"), flags, Some("mode=0700,size=2g"))
        .context("mount the lab's private memory")?;
    fs::create_dir_all(place.private().join("volumes"))?;
    Ok(())
}

fn start_log(place: &Place) -> Result<()> {
    let path = place.logs().join("lab.log");
    let file = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .with_context(|| path.display().to_string())?;
    let filter =
        tracing_subscriber::EnvFilter::try_from_env("AMBIT_LOG").unwrap_or_else(|_| "info".into());
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        // A full disk is said once, to the user, and not for every line.
        .log_internal_errors(false)
        .with_writer(std::sync::Mutex::new(file));
    log.try_init().map_err(|e| anyhow::anyhow!("start the log: {e}"))
}

/// What pods must not see of the machine: the lab itself, and what people keep in their home to prove who they are. (Where
/// pods have ids of their own the machine's file modes keep them out as well; with one id they would not.)
fn hidden(place: &Place) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = place.state.parent().map(Path::to_owned).into_iter().collect();
    if let Some(home) = std::env::var_os("HOME").map(PathBuf::from).filter(|h| h.is_absolute()) {
        let secret = [
            ".ssh",
            ".gnupg",
            ".aws",
            ".azure",
            ".kube",
            ".docker",
            ".netrc",
            ".git-credentials",
            ".pgpass",
            ".password-store",
            ".config/gcloud",
            ".config/gh",
            ".cargo/credentials.toml",
            ".cargo/credentials",
            ".local/share/keyrings",
        ];
        paths.extend(secret.iter().map(|s| home.join(s)));
    }
    paths
}
