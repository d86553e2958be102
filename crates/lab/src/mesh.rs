//! The mesh's own processes: `istiod-lite` on the underlay, one `ztunnel` per node, watched and started again.
//!
//! Invariants: a node token goes to its ztunnel over an inherited pipe and to istiod-lite as a hash ([`Registry`]), and to
//! nobody else; each start of a ztunnel gets a new one. While a ztunnel is away the pods' capture stays in place, so that nothing goes out
//! in the clear.

use std::fs::{self, DirBuilder};
use std::io::Write as _;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use net::NetNs;
use tokio::sync::mpsc;

use crate::fds;
use crate::launch::Event;
use crate::network::{CONTROL_PLANE_PORT, Network, UNDERLAY_V4, UNDERLAY_V6};
use crate::place::Place;
use crate::procs::Processes;
use crate::registry::{PodNames, PodToken, Registry};
use crate::status::ProcessStatus;
use crate::supervise::{self, Around, Control, DRAINING, Start, States, Watched, lock};
use crate::zds::Agent;

/// Metrics, readiness and debugging of the control plane.
pub(crate) const STATUS_PORT: u16 = 15014;
/// The running mesh.
#[derive(Clone, Debug)]
pub(crate) struct Mesh {
    /// In the order of the nodes.
    pub(crate) agents: Vec<Agent>,
    /// The root of the mesh, once istiod-lite has made it.
    pub(crate) root: PathBuf,
    controls: Vec<Control>,
    states: States,
    registry: Registry,
}

/// What the user wants of every ztunnel.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// How long one that was replaced keeps its connections.
    pub(crate) drain: Duration,
    /// Namespaces, separated by commas, whose pods on one node are joined without a tunnel.
    pub(crate) same_node_direct: String,
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
    let root = istiod_dir.join("root-cert.pem");
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
            root: root.clone(),
            registry: registry.clone(),
            settings: settings.clone(),
        };
        controls.push(ztunnel.watch_over(around.clone()));
    }
    Ok(Mesh { agents, root, controls, states, registry })
}

impl Mesh {
    /// A token by which the pod proves who it is, until it is dropped.
    pub(crate) fn token(&self, pod: PodNames<'_>) -> Result<PodToken> {
        self.registry.issue_pod(pod)
    }

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
        command.arg("--listen").arg(format!("{UNDERLAY_V4}:{CONTROL_PLANE_PORT}"));
        command.arg("--listen").arg(format!("[{UNDERLAY_V6}]:{CONTROL_PLANE_PORT}"));
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
        let token = self.registry.issue_node(&self.node, self.home.join("secret"))?;
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        // Fits the pipe: nobody has to read for this to return.
        fs::File::from(write).write_all(format!("{}\n", token.text()).as_bytes())?;
        let mut command = Command::new(&self.program);
        command.arg("proxy").arg("--node").arg(&self.node).arg("--zds-socket").arg(&self.socket);
        command.arg("--xds-address").arg(format!("https://{UNDERLAY_V4}:{CONTROL_PLANE_PORT}"));
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
