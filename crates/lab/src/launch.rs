//! The outside of a lab: `meshctl local up` until Ctrl-C.
//!
//! The front claims the lab's folder, starts the stage in new namespaces, writes its id maps, prints what the lab says and
//! asks the machine's resolvers on its behalf. It has no capability over the machine and needs none.
//!
//! Invariants: one thread starts the stage and outlives it (the kernel ties "die with the parent" to the thread); when
//! [`up`] returns, no process of the lab is left and its folder is gone.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use compile::waypoints::Settings;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::{Uid, User, getgid, getuid};
use serde::{Deserialize, Serialize};

use crate::fds;
use crate::ids::{self, IdRange};
use crate::place::{LabInfo, Place};
use crate::{stage, upstream};

/// What the user asked for.
#[derive(Clone, Debug)]
pub struct Options {
    pub dir: PathBuf,
    pub name: String,
    pub nodes: u16,
    /// Image name to a root filesystem folder or a program.
    pub images: Vec<(String, PathBuf)>,
    /// Where `istiod-lite` and `ztunnel` are. `None`: no mesh, plain pods only.
    pub bin_dir: Option<PathBuf>,
    /// Seconds that a ztunnel which was replaced keeps its connections.
    pub drain_seconds: u64,
    /// Namespaces whose pods on one node are joined without a tunnel; `*` for all.
    pub same_node_direct: Vec<String>,
    /// A program that calls [`crate::hidden`] first; usually the running one.
    pub helper: PathBuf,
}

/// Everything process 1 of the lab has to know, written to the lab's folder.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct WorldConfig {
    #[serde(flatten)]
    pub(crate) info: LabInfo,
    pub(crate) images: Vec<(String, PathBuf)>,
    pub(crate) bin_dir: Option<PathBuf>,
    pub(crate) drain_seconds: u64,
    pub(crate) same_node_direct: Vec<String>,
}

/// What the lab tells the front.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Event {
    /// A step of the start.
    Progress(String),
    /// Everything in the folder was started once; later changes follow as notes.
    Ready { pods: usize, services: usize, nodes: u16 },
    /// Something happened to a pod or a process.
    Note(String),
    /// Something in the folder, or a process, needs the user's attention.
    Warning(String),
    /// A complaint about the folder is gone.
    Resolved(String),
    /// The lab cannot go on.
    Failed(String),
}

/// Files of the front's end, as the stage gets them.
pub(crate) struct FrontFds {
    pub(crate) sync: OwnedFd,
    pub(crate) world: WorldFds,
}

/// Files process 1 of the lab lives with.
#[derive(Debug)]
pub(crate) struct WorldFds {
    /// Listening socket of the control protocol.
    pub(crate) control: OwnedFd,
    /// Events out, one JSON line each; a line in means: end.
    pub(crate) events: OwnedFd,
    /// DNS questions out, answers in.
    pub(crate) dns: OwnedFd,
}

impl FrontFds {
    pub(crate) fn take() -> io::Result<Self> {
        let sync = fds::take(3)?;
        let world = WorldFds { control: fds::take(4)?, events: fds::take(5)?, dns: fds::take(6)? };
        Ok(Self { sync, world })
    }
}

/// Runs a lab until Ctrl-C, SIGTERM, `down` or its failure. `on_event` prints.
pub fn up(options: &Options, on_event: &mut dyn FnMut(Event)) -> Result<()> {
    let config = resolve(options)?;
    let place = Place::of(&options.name)?;
    let lock = place.claim()?;
    let ended = run_lab(options, &place, &config, on_event);
    place.remove();
    drop(lock);
    ended
}

fn resolve(options: &Options) -> Result<WorldConfig> {
    let dir = fs::canonicalize(&options.dir).with_context(|| {
        format!("no folder {}: name one with Kubernetes YAML in it", options.dir.display())
    })?;
    if !dir.is_dir() {
        bail!("{} is not a folder: name the folder that holds the YAML", dir.display());
    }
    let place = Place::of(&options.name)?;
    let mut images = vec![];
    for (name, path) in &options.images {
        let path = fs::canonicalize(path).with_context(|| {
            format!("--image {name}={}: no such folder or program", path.display())
        })?;
        images.push((name.clone(), path));
    }
    if let Some(bin) = &options.bin_dir {
        programs(bin, &images)?;
    }
    let info = LabInfo {
        name: options.name.clone(),
        dir,
        state: place.state,
        pid: std::process::id(),
        nodes: options.nodes,
    };
    Ok(WorldConfig {
        info,
        images,
        bin_dir: options.bin_dir.clone(),
        drain_seconds: options.drain_seconds,
        same_node_direct: options.same_node_direct.clone(),
    })
}

/// Looks for the programs of the mesh before anything starts: a waypoint may be wanted hours later.
fn programs(bin: &Path, images: &[(String, PathBuf)]) -> Result<()> {
    let replaced = images.iter().any(|(name, _)| name == Settings::IMAGE);
    let waypoint = (!replaced).then_some("waypoint");
    for program in ["istiod-lite", "ztunnel"].into_iter().chain(waypoint) {
        let path = bin.join(program);
        if !path.is_file() {
            bail!(
                "{} is not there: build it (`cargo build --release --bins`) or say with --bin-dir where it is",
                path.display()
            );
        }
    }
    Ok(())
}

fn run_lab(
    options: &Options,
    place: &Place,
    config: &WorldConfig,
    on_event: &mut dyn FnMut(Event),
) -> Result<()> {
    let text = serde_json::to_vec_pretty(config)?;
    fs::write(place.info_path(), text).with_context(|| {
        format!("cannot write {} (is the disk full?)", place.info_path().display())
    })?;
    let listener = UnixListener::bind(place.socket())
        .with_context(|| format!("cannot listen on {}", place.socket().display()))?;
    let (sync, stage_sync) = UnixStream::pair()?;
    let (events, world_events) = UnixStream::pair()?;
    let (dns, world_dns) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;

    // Blocked here, so that the thread below is the one that gets them. What is started gets an empty mask (`fds::pass`).
    let stop_signals = stop_signals();
    stop_signals.thread_block()?;
    let mut command = Command::new(&options.helper);
    command.arg(crate::STAGE).arg(place.info_path()).stdin(Stdio::null());
    fds::pass(
        &mut command,
        vec![stage_sync.into(), listener.into(), world_events.into(), world_dns],
    );
    let mut child =
        command.spawn().with_context(|| format!("cannot start {}", options.helper.display()))?;
    // Drops our copies of the lab's files: the end of the lab must close them.
    drop(command);
    let guarded = admit(sync, &mut child).and_then(|()| {
        upstream::serve_in_background(dns)?;
        end_on_signal(stop_signals, events.try_clone()?, &child)?;
        relay(events, on_event)
    });
    if guarded.is_err() {
        let _ = child.kill();
    }
    let status = child.wait().context("wait for the lab")?;
    guarded?;
    if !status.success() {
        bail!("the lab ended unexpectedly ({status}); {} may say why", place.logs().display());
    }
    Ok(())
}

fn stop_signals() -> SigSet {
    let mut set = SigSet::empty();
    for s in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        set.add(s);
    }
    set
}

/// Waits for the stage's namespaces, writes the id maps, lets it go on.
fn admit(mut sync: UnixStream, child: &mut Child) -> Result<()> {
    let mut said = [0];
    if sync.read_exact(&mut said).is_err() {
        bail!("the lab's first process died at once");
    }
    if said != [stage::UNSHARED] {
        let mut text = String::from_utf8_lossy(&said).into_owned();
        let _ = sync.read_to_string(&mut text);
        return Err(crate::advice::no_namespaces(&text));
    }
    write_maps(child.id()).map_err(|e| crate::advice::no_namespaces(&format!("{e:#}")))?;
    sync.write_all(&[stage::GO]).context("the lab's first process died")?;
    // Anything but silence is an error after the maps were written.
    let mut text = String::new();
    sync.read_to_string(&mut text).context("hear from the lab's first process")?;
    if text.is_empty() { Ok(()) } else { Err(crate::advice::no_namespaces(&text)) }
}

/// Gives the new user namespace its ids: everything for root, else a subordinate range where the machine has one and the
/// `newuidmap` helper, else only the user's own.
fn write_maps(pid: u32) -> Result<()> {
    if getuid().is_root() {
        let own = |file: &str| {
            Ok::<_, anyhow::Error>(ids::parse_map(
                &fs::read_to_string(file).context(file.to_owned())?,
            ))
        };
        let wrote = write_map(pid, "uid_map", &ids::identity_map(&own("/proc/self/uid_map")?))
            .and_then(|()| {
                write_map(pid, "gid_map", &ids::identity_map(&own("/proc/self/gid_map")?))
            });
        if wrote.is_ok() {
            return wrote;
        }
        // Root of a container that was denied CAP_SETUID: go on as an ordinary user would.
        tracing::debug!("identity map refused: {wrote:?}");
    } else if subordinate_maps(pid) {
        return Ok(());
    }
    fs::write(format!("/proc/{pid}/setgroups"), "deny").context("write setgroups")?;
    write_map(pid, "uid_map", &ids::user_map(getuid().as_raw(), None))?;
    write_map(pid, "gid_map", &ids::user_map(getgid().as_raw(), None))
}

fn write_map(pid: u32, file: &str, map: &[IdRange]) -> Result<()> {
    fs::write(format!("/proc/{pid}/{file}"), ids::render_map(map))
        .with_context(|| format!("write {file}"))
}

/// Whether `newuidmap` and `newgidmap` are there, the user has ranges, and both worked. A half-done attempt leaves the
/// process unusable, so both conditions are checked first.
fn subordinate_maps(pid: u32) -> bool {
    let name = User::from_uid(Uid::current()).ok().flatten().map_or_else(String::new, |u| u.name);
    let uid = getuid().as_raw();
    let read = |file: &str| fs::read_to_string(file).unwrap_or_default();
    let range = |file: &str, own: &str| {
        ids::subordinate(&read(file), &name, uid)
            .filter(|range| ids::is_mapped(&ids::parse_map(&read(own)), *range))
    };
    let uids = range("/etc/subuid", "/proc/self/uid_map");
    let (Some(uids), Some(gids)) = (uids, range("/etc/subgid", "/proc/self/gid_map")) else {
        return false;
    };
    let helper = |program: &str| {
        ["/usr/bin", "/bin", "/usr/local/bin", "/usr/sbin"]
            .iter()
            .map(|d| Path::new(d).join(program))
            .find(|p| p.is_file())
    };
    let (Some(newuidmap), Some(newgidmap)) = (helper("newuidmap"), helper("newgidmap")) else {
        return false;
    };
    let run = |program: &Path, map: &[IdRange]| {
        let numbers =
            map.iter().flat_map(|r| [r.inside, r.outside, r.count]).map(|n| n.to_string());
        let out =
            Command::new(program).arg(pid.to_string()).args(numbers).stdin(Stdio::null()).output();
        out.is_ok_and(|o| o.status.success())
    };
    run(&newgidmap, &ids::user_map(getgid().as_raw(), Some(gids)))
        && run(&newuidmap, &ids::user_map(uid, Some(uids)))
}

/// The first signal asks the lab to end, the second kills it.
fn end_on_signal(signals: SigSet, mut events: UnixStream, child: &Child) -> Result<()> {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id())?);
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        if signals.wait().is_ok() {
            let _ = events.write_all(b"end\n");
        }
        if signals.wait().is_ok() {
            let _ = nix::sys::signal::kill(pid, Signal::SIGKILL);
        }
    })?;
    Ok(())
}

/// Prints until the lab closes its end.
fn relay(events: UnixStream, on_event: &mut dyn FnMut(Event)) -> Result<()> {
    let mut failure = None;
    for line in BufReader::new(events).lines() {
        let Ok(line) = line else { break };
        match serde_json::from_str(&line) {
            Ok(Event::Failed(text)) => failure = Some(text),
            Ok(event) => on_event(event),
            Err(e) => tracing::warn!("the lab said something unreadable ({e}): {line}"),
        }
    }
    failure.map_or(Ok(()), |text| bail!(text))
}
