//! Where a lab lives on disk, and how other commands find a running one.
//!
//! One folder per lab, `0700`, below `$XDG_RUNTIME_DIR/ambit` or `/tmp/ambit-UID`. Whoever holds the lock on `lock` runs
//! the lab; a folder without a holder is a leftover of a killed one and may be removed.
//!
//! Invariants: a folder that belongs to someone else or is open to others is refused, never used.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

/// The name of a lab when none is given.
pub const DEFAULT_NAME: &str = "lab";
/// Unix socket paths are limited to 107 bytes; a short name leaves room for the folder.
const MAX_NAME: usize = 32;

/// The files of one lab.
#[derive(Clone, Debug)]
pub struct Place {
    pub name: String,
    /// Everything the lab keeps; gone when it ends.
    pub state: PathBuf,
}

/// What `up` was started with, kept in the lab's folder for the other commands.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LabInfo {
    pub name: String,
    /// The folder with the user's YAML, absolute.
    pub dir: PathBuf,
    pub state: PathBuf,
    /// Process id of `meshctl local up`.
    pub pid: u32,
    pub nodes: u16,
}

/// Holding it means: this process runs the lab.
#[derive(Debug)]
pub struct PlaceLock(#[expect(dead_code, reason = "held for its lock")] Flock<File>);

impl Place {
    /// The folder for a lab of this name. Nothing is created.
    pub fn of(name: &str) -> Result<Self> {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        ensure!(
            !name.is_empty()
                && name.len() <= MAX_NAME
                && name.bytes().all(plain)
                && !name.starts_with('-'),
            "{name:?} is no name for a lab: use at most {MAX_NAME} lower case letters, digits and '-'"
        );
        Ok(Self { name: name.to_owned(), state: base_dir().join(name) })
    }

    /// Creates the folder and takes the lock.
    pub fn claim(&self) -> Result<PlaceLock> {
        let base = base_dir();
        private_dir(&base)?;
        private_dir(&self.state)?;
        let path = self.lock_path();
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .mode(0o600)
            .open(&path);
        let opened = file
            .as_mut()
            .map(|_| ())
            .map_err(|e| anyhow::anyhow!("cannot open {}: {e}", path.display()));
        opened?;
        let file = file.with_context(|| path.display().to_string())?;
        let Ok(mut lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else {
            let holder = fs::read_to_string(&path).unwrap_or_default();
            bail!(
                "a lab named {:?} is running already (process {}): end it with `meshctl local down --name {}`, or give \
                 this one another --name",
                self.name,
                holder.trim(),
                self.name
            );
        };
        lock.set_len(0)
            .and_then(|()| writeln!(lock, "{}", std::process::id()))
            .with_context(|| format!("cannot write {} (is the disk full?)", path.display()))?;
        self.clear()?;
        Ok(PlaceLock(lock))
    }

    /// Removes what an earlier lab left behind. The lock file stays: it is held.
    fn clear(&self) -> Result<()> {
        for entry in fs::read_dir(&self.state).with_context(|| self.state.display().to_string())? {
            let path = entry?.path();
            if path == self.lock_path() {
                continue;
            }
            let removed = if path.is_dir() && !path.is_symlink() {
                fs::remove_dir_all(&path)
            } else {
                fs::remove_file(&path)
            };
            removed
                .with_context(|| format!("cannot remove {} of an earlier lab", path.display()))?;
        }
        Ok(())
    }

    /// Removes the whole folder.
    pub fn remove(&self) {
        if let Err(e) = fs::remove_dir_all(&self.state) {
            tracing::warn!("cannot remove {}: {e}", self.state.display());
        }
        // Fails while another lab lives there, which is right.
        let _ = fs::remove_dir(base_dir());
    }

    pub fn lock_path(&self) -> PathBuf {
        self.state.join("lock")
    }
    pub fn info_path(&self) -> PathBuf {
        self.state.join("lab.json")
    }
    pub fn socket(&self) -> PathBuf {
        self.state.join("control.sock")
    }
    /// Objects written for the control plane: pods with addresses, Services with clusterIPs.
    pub fn objects(&self) -> PathBuf {
        self.state.join("objects")
    }
    pub fn logs(&self) -> PathBuf {
        self.state.join("logs")
    }
    /// An empty folder that each container's root filesystem is built on, in its own mount namespace.
    pub fn root(&self) -> PathBuf {
        self.state.join("root")
    }
    /// The same for the writable layers of that filesystem.
    pub fn layers(&self) -> PathBuf {
        self.state.join("layers")
    }
    /// A tmpfs that only the lab's own processes see: keys, tokens, volumes.
    pub fn private(&self) -> PathBuf {
        self.state.join("private")
    }
    /// Where a container's output goes. `instance` is the pod's own number, so that a pod that replaces another of
    /// the same name starts a new file.
    pub fn container_log(&self, namespace: &str, pod: &str, container: &str) -> PathBuf {
        self.logs().join(format!("{namespace}_{pod}_{container}.log"))
    }
}

/// The labs of this user that run now.
pub fn running() -> Result<Vec<LabInfo>> {
    let base = base_dir();
    let Ok(entries) = fs::read_dir(&base) else { return Ok(vec![]) };
    let mut labs = vec![];
    for entry in entries.flatten() {
        let Some(name) = entry.file_name().to_str().map(str::to_owned) else { continue };
        let Ok(place) = Place::of(&name) else { continue };
        if is_held(&place.lock_path())
            && let Ok(text) = fs::read_to_string(place.info_path())
        {
            labs.push(
                serde_json::from_str(&text)
                    .with_context(|| place.info_path().display().to_string())?,
            );
        }
    }
    labs.sort_by(|a: &LabInfo, b| a.name.cmp(&b.name));
    Ok(labs)
}

/// The running lab a command means: the named one, the one with the default name, or the only one.
pub fn find(name: Option<&str>) -> Result<LabInfo> {
    let mut labs = running()?;
    if let Some(name) = name {
        labs.retain(|l| l.name == name);
        return labs.pop().with_context(|| {
            format!("no lab named {name:?} is running for this user: start it with `meshctl local up DIR --name {name}`")
        });
    }
    // Who starts labs with names says names; the one without is meant when none is said.
    if let Some(default) = labs.iter().position(|l| l.name == DEFAULT_NAME) {
        return Ok(labs.swap_remove(default));
    }
    match labs.len() {
        0 => bail!("no lab is running for this user: start one with `meshctl local up DIR`"),
        1 => Ok(labs.remove(0)),
        _ => {
            let names: Vec<_> = labs.iter().map(|l| l.name.as_str()).collect();
            bail!("several labs are running ({}): say which with --name", names.join(", "))
        }
    }
}

fn base_dir() -> PathBuf {
    match std::env::var_os("XDG_RUNTIME_DIR") {
        // `su` leaves the variable of the user before: only a folder of our own counts.
        Some(dir) if is_own(Path::new(&dir)) => Path::new(&dir).join("ambit"),
        _ => PathBuf::from(format!("/tmp/ambit-{}", nix::unistd::getuid())),
    }
}

/// Makes the folder, or checks that the one there is ours and closed to others: `/tmp` is shared.
fn private_dir(path: &Path) -> Result<()> {
    if let Err(e) = DirBuilder::new().mode(0o700).create(path)
        && e.kind() != std::io::ErrorKind::AlreadyExists
    {
        bail!("cannot create {}: {e}", path.display());
    }
    let meta = fs::symlink_metadata(path).with_context(|| path.display().to_string())?;
    ensure!(
        meta.is_dir() && meta.uid() == nix::unistd::getuid().as_raw() && meta.mode() & 0o077 == 0,
        "{} is not a folder of this user closed to others: remove it",
        path.display()
    );
    Ok(())
}

fn is_own(dir: &Path) -> bool {
    fs::metadata(dir).is_ok_and(|m| m.is_dir() && m.uid() == nix::unistd::getuid().as_raw())
}

fn is_held(lock: &Path) -> bool {
    File::open(lock).is_ok_and(|f| Flock::lock(f, FlockArg::LockSharedNonblock).is_err())
}
