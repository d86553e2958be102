//! The mesh's own processes: `istiod-lite` on the underlay, one `ztunnel` per node, watched and started again.
//!
//! Invariants: a node token goes to its ztunnel over an inherited pipe and to istiod-lite as a hash, and to nobody else;
//! each start of a ztunnel gets a new one. While a ztunnel is away the pods' capture stays in place, so that nothing goes out
//! in the clear.

use std::fs::{self, DirBuilder};
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use anyhow::Result;
use aws_lc_rs::digest::{SHA256, digest};
use net::NetNs;
use tokio::sync::mpsc;

use crate::fds;
use crate::launch::Event;
use crate::network::{Network, UNDERLAY_V4, UNDERLAY_V6};
use crate::place::Place;
use crate::procs::Processes;
use crate::status::ProcessStatus;
use crate::supervise::{self, Around, Control, DRAINING, Start, States, Watched, lock};
use crate::zds::Agent;

/// Where the control plane serves xDS and the CA, as in Istio.
const XDS_PORT: u16 = 15012;
/// Metrics, readiness and debugging of the control plane.
pub(crate) const STATUS_PORT: u16 = 15014;
/// Bytes of entropy in a token.
const TOKEN: usize = 32;
/// The running mesh.
#[derive(Clone, Debug)]
pub(crate) struct Mesh {
    /// In the order of the nodes.
    pub(crate) agents: Vec<Agent>,
    controls: Vec<Control>,
    states: States,
}

/// What the user wants of every ztunnel.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// How long one that was replaced keeps its connections.
    pub(crate) drain: Duration,
    /// Namespaces, separated by commas, whose pods on one node are joined without a tunnel.
    pub(crate) same_node_direct: String,
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
    settings: &Settings,
) -> Result<Mesh> {
    let states = States::default();
    let around = Around {
        place: place.clone(),
        processes: processes.clone(),
        events: events.clone(),
        states: Arc::clone(&states),
    };
    let registry = Registry::default();
    let istiod_dir = place.private().join("istiod");
    DirBuilder::new().recursive(true).mode(0o700).create(&istiod_dir)?;
    let istiod = Istiod {
        program: bin_dir.join("istiod-lite"),
        dirs: [dir.to_owned(), place.objects()],
        state: istiod_dir.clone(),
        registry: registry.clone(),
    };
    let mut controls = vec![istiod.watch_over(around.clone())];
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
            settings: settings.clone(),
        };
        controls.push(ztunnel.watch_over(around.clone()));
    }
    Ok(Mesh { agents, controls, states })
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

struct Istiod {
    program: PathBuf,
    /// The user's YAML, and the objects of the lab.
    dirs: [PathBuf; 2],
    state: PathBuf,
    registry: Registry,
}

impl Istiod {
    fn watch_over(self, around: Around) -> Control {
        let watched = Watched {
            name: "istiod-lite".to_owned(),
            node: None,
            after: None,
            beside: false,
            drain: Duration::ZERO,
        };
        supervise::watch_over(around, watched, move || self.start())
    }

    fn start(&self) -> Result<Start> {
        let mut command = Command::new(&self.program);
        for dir in &self.dirs {
            command.arg("--dir").arg(dir);
        }
        command.arg("--state-dir").arg(&self.state);
        command.arg("--listen").arg(format!("{UNDERLAY_V4}:{XDS_PORT}"));
        command.arg("--listen").arg(format!("[{UNDERLAY_V6}]:{XDS_PORT}"));
        command.arg("--status-listen").arg(format!("{UNDERLAY_V4}:{STATUS_PORT}"));
        command.arg("--token-registry-fd").arg("3");
        Ok(Start { command, files: vec![self.registry.connect()?], ns: None, ready: None })
    }
}

struct Ztunnel {
    program: PathBuf,
    node: String,
    ns: NetNs,
    socket: PathBuf,
    home: PathBuf,
    root: PathBuf,
    registry: Registry,
    settings: Settings,
}

impl Ztunnel {
    fn watch_over(self, around: Around) -> Control {
        let watched = Watched {
            name: "ztunnel".to_owned(),
            node: Some(self.node.clone()),
            after: Some(self.root.clone()),
            beside: true,
            drain: self.settings.drain,
        };
        supervise::watch_over(around, watched, move || self.start())
    }

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
        command.arg("--drain-seconds").arg(self.settings.drain.as_secs().to_string());
        if !self.settings.same_node_direct.is_empty() {
            command.arg("--same-node-direct").arg(&self.settings.same_node_direct);
        }
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
