//! The files a container sees: the machine's own or an image folder, each under a private writable layer.
//!
//! ```text
//! /            tmpfs, or the image folder under a layer
//! /usr /etc …  one overlay per top-level folder: the machine's below, a tmpfs above (gone with the container)
//! /proc        of the container's own process namespace; /proc/sys read-only
//! /dev /tmp /run /root   fresh
//! ```
//!
//! Built by process 1 of the container while it still is the lab's root, and locked when it enters the pod's user
//! namespace. Invariants: nothing is written to the machine; the lab's folder is nowhere in sight; targets are resolved
//! inside the new root, so that a symbolic link in an image cannot lead out.
//!
//! Why one overlay per folder: the kernel refuses to use a tree as a lower layer when it contains mounts that came from a
//! more privileged namespace, and `/` always does.

use std::fs::{self, DirBuilder, Metadata, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{chdir, chown, pivot_root};

use super::mounts::{MountTable, bind, hide};
use super::run::{PROGRAM_DIR, ProcessRun, RootFs, RootSource, Volume};
use super::{tmpfiles, users};

/// Who owns what the container may write, as ids of the lab.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Owners {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// What a container may write to its own layers, `/tmp`, `/run` and so on, each. It is memory: enough for a database of
/// an example, little enough that a pod that fills it hurts itself first.
const TMPFS: &str = "mode=0755,size=2g";
/// Where the machine's files are while the root is built.
const OLD: &str = "/.old";
/// Top-level folders that are made fresh, or are none of a container's business.
const NOT_FROM_MACHINE: [&str; 13] = [
    "proc",
    "sys",
    "dev",
    "run",
    "tmp",
    "root",
    "lost+found",
    "boot",
    "mnt",
    "media",
    "snap",
    "efi",
    ".old",
];
/// File systems that hold no ordinary files.
const NOT_FILES: [&str; 22] = [
    "proc",
    "sysfs",
    "devtmpfs",
    "devpts",
    "cgroup",
    "cgroup2",
    "mqueue",
    "hugetlbfs",
    "debugfs",
    "tracefs",
    "securityfs",
    "pstore",
    "bpf",
    "configfs",
    "fusectl",
    "autofs",
    "binfmt_misc",
    "nsfs",
    "rpc_pipefs",
    "efivarfs",
    "selinuxfs",
    "ramfs",
];
/// Folders that hold logs and caches of the machine: containers get them empty.
const EMPTIED: [&str; 3] = ["/var/log", "/var/cache", "/var/tmp"];
/// How much of `/var` is made writable ahead: services keep their state at most this deep, on some hundred paths.
const SKELETON_DEPTH: usize = 3;
const SKELETON_MOST: usize = 4_000;
/// Where mounts lie inside a folder, its entries are taken one by one; a folder with more is left out.
const MOST_ENTRIES: usize = 2_000;

/// Builds the root filesystem and makes it the root of this process's mount namespace.
pub(crate) fn build(root: &RootFs, process: &ProcessRun, owners: Owners) -> Result<()> {
    umask(Mode::empty());
    let builder = Builder {
        owners,
        mounts: MountTable::read()?,
        layers: Path::new(OLD).join(relative(&root.layers)),
        next_layer: std::cell::Cell::new(0),
        wanted: root.mounts.iter().map(|v| v.target.clone()).collect(),
    };
    builder.fresh(&root.layers, "mode=0700,size=2g")?;
    match &root.source {
        RootSource::Folder(folder) => builder.overlay(folder, &root.root, &root.layers)?,
        RootSource::Machine | RootSource::Program(_) => builder.fresh(&root.root, TMPFS)?,
    }
    enter(&root.root)?;
    if !matches!(root.source, RootSource::Folder(_)) {
        builder.machine()?;
    }
    if let RootSource::Program(program) = &root.source {
        builder.program(program)?;
    }
    builder.system()?;
    for (path, text) in &root.files {
        builder.file(path, text)?;
    }
    for (path, text) in users::missing(process) {
        builder.file(Path::new(path), &text)?;
    }
    for volume in &root.mounts {
        builder.volume(volume)?;
    }
    for path in &root.hide {
        hide(path)?;
    }
    umount2(OLD, MntFlags::MNT_DETACH).context("let go of the machine's files")?;
    fs::remove_dir(OLD).context("remove the mount point of the machine's files")?;
    // As the program expects to find it.
    umask(Mode::from_bits_truncate(0o022));
    Ok(())
}

fn enter(root: &Path) -> Result<()> {
    let old = root.join(relative(Path::new(OLD)));
    make_dir(&old, 0o700)?;
    pivot_root(root, &old).context("pivot_root")?;
    chdir("/").context("chdir /")
}

struct Builder {
    owners: Owners,
    mounts: MountTable,
    /// The tmpfs for layers, by its path after the pivot.
    layers: PathBuf,
    next_layer: std::cell::Cell<u32>,
    /// Paths that will be mounted on: made in the upper layers ahead, because a folder that belongs to an id the lab does
    /// not have cannot be written through an overlay.
    wanted: Vec<PathBuf>,
}

impl Builder {
    /// The machine's top-level folders.
    fn machine(&self) -> Result<()> {
        for entry in fs::read_dir(OLD).context("list the machine's root")? {
            let entry = entry?;
            let name = entry.file_name();
            // Folders and links to them; files do not belong into `/`.
            let wanted = entry.file_type()?.is_dir()
                || entry.path().is_dir()
                || entry.file_type()?.is_symlink();
            if wanted && name.to_str().is_some_and(|n| !NOT_FROM_MACHINE.contains(&n)) {
                self.take(&Path::new("/").join(entry.file_name()))?;
            }
        }
        for path in EMPTIED.map(Path::new).into_iter().filter(|p| p.is_dir()) {
            self.fresh(path, TMPFS)?;
            self.skeleton(&old(path), path, &mut SKELETON_MOST.clone(), SKELETON_DEPTH)?;
        }
        self.dir(Path::new("/root"), 0o700)
    }

    /// Shows one path of the machine at the same path inside.
    fn take(&self, path: &Path) -> Result<()> {
        let source = old(path);
        let Ok(meta) = fs::symlink_metadata(&source) else { return Ok(()) };
        if meta.is_symlink() {
            let to = fs::read_link(&source)?;
            return symlink(to, path).with_context(|| path.display().to_string());
        }
        if meta.is_file() {
            fs::write(path, "").with_context(|| path.display().to_string())?;
            return bind(&source, path, true);
        }
        if !meta.is_dir() {
            return Ok(());
        }
        self.dir_like(path, &meta)?;
        if self.mounts.kind(path).is_some_and(|k| NOT_FILES.contains(&k)) {
            return Ok(());
        }
        if !self.mounts.any_below(path) {
            return self.overlay_or_bind(path);
        }
        // Something is mounted further down: entry by entry.
        let Ok(entries) = fs::read_dir(&source) else { return Ok(()) };
        let entries: Vec<_> = entries.flatten().take(MOST_ENTRIES + 1).collect();
        if entries.len() > MOST_ENTRIES {
            return Ok(());
        }
        entries.iter().try_for_each(|e| self.take(&path.join(e.file_name())))
    }

    fn overlay_or_bind(&self, path: &Path) -> Result<()> {
        let source = old(path);
        if fs::read_dir(&source).is_err() {
            // Closed to this user: an empty folder tells as much.
            return Ok(());
        }
        if self.overlay(&source, path, &self.layers).is_ok() {
            return Ok(());
        }
        // A file system that cannot be a lower layer (some network and FUSE ones).
        bind(&source, path, true)
    }

    /// Mounts `lower` under a fresh writable layer at `target`. `layers` is where the layers' tmpfs is just now.
    fn overlay(&self, lower: &Path, target: &Path, layers: &Path) -> Result<()> {
        let n = self.next_layer.get();
        self.next_layer.set(n + 1);
        let (upper, work) = (layers.join(format!("{n}u")), layers.join(format!("{n}w")));
        let meta = fs::metadata(lower).with_context(|| lower.display().to_string())?;
        self.dir_like(&upper, &meta)?;
        make_dir(&work, 0o700)?;
        let inside =
            if lower.starts_with(OLD) { Path::new("/").join(relative(target)) } else { "/".into() };
        // Where services keep their state; of an image, everything near the top.
        if inside == Path::new("/") || inside == Path::new("/var") || inside.starts_with("/var/lib")
        {
            self.skeleton(lower, &upper, &mut SKELETON_MOST.clone(), SKELETON_DEPTH)?;
        }
        for wanted in self.wanted.iter().filter_map(|w| w.strip_prefix(&inside).ok()) {
            self.reserve(lower, &upper, wanted)?;
        }
        let escaped = |p: &Path| {
            let text = p.to_str().ok_or_else(|| anyhow!("{} is not UTF-8", p.display()))?;
            Ok::<_, anyhow::Error>(
                text.replace('\\', "\\\\").replace(':', "\\:").replace(',', "\\,"),
            )
        };
        let options = format!(
            "lowerdir={},upperdir={},workdir={},userxattr",
            escaped(lower)?,
            escaped(&upper)?,
            escaped(&work)?
        );
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("overlay"), target, Some("overlay"), flags, Some(options.as_str())).with_context(
            || {
                format!(
                    "put a writable layer over {} (Linux 5.11 or newer needed)",
                    lower.display()
                )
            },
        )
    }

    /// Makes `path` in the upper layer with the modes of the lower folders, as far as it is not a file below.
    fn reserve(&self, lower: &Path, upper: &Path, path: &Path) -> Result<()> {
        let mut so_far = PathBuf::new();
        for part in path.components() {
            so_far.push(part);
            match fs::symlink_metadata(lower.join(&so_far)) {
                Ok(meta) if meta.is_dir() => self.dir_like(&upper.join(&so_far), &meta)?,
                Ok(_) => return Ok(()),
                Err(_) => self.dir(&upper.join(&so_far), 0o755)?,
            }
        }
        Ok(())
    }

    /// Repeats the folders (not the files) of `source` below `target`, owned by the container's user: folders of ids that do
    /// not exist in the lab cannot be written.
    fn skeleton(&self, source: &Path, target: &Path, left: &mut usize, depth: usize) -> Result<()> {
        let Ok(entries) = fs::read_dir(source) else { return Ok(()) };
        for entry in entries.flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            if !meta.is_dir() || *left == 0 {
                continue;
            }
            *left -= 1;
            let target = target.join(entry.file_name());
            self.dir_like(&target, &meta)?;
            if depth > 1 {
                self.skeleton(&entry.path(), &target, left, depth - 1)?;
            }
        }
        Ok(())
    }

    fn program(&self, program: &Path) -> Result<()> {
        self.dir(Path::new(PROGRAM_DIR), 0o755)?;
        let name =
            program.file_name().ok_or_else(|| anyhow!("{} has no name", program.display()))?;
        let target = Path::new(PROGRAM_DIR).join(name);
        // Copied, not bound: the file may lie in a folder that is closed to the pod's ids.
        fs::copy(old(program), &target).with_context(|| format!("copy {}", program.display()))?;
        fs::set_permissions(&target, Permissions::from_mode(0o755))?;
        self.own(&target)
    }

    /// `/proc`, `/sys`, `/dev`, `/tmp`, `/run`.
    fn system(&self) -> Result<()> {
        let none: Option<&str> = None;
        let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        for (path, mode) in
            [("/proc", 0o555), ("/sys", 0o555), ("/dev", 0o755), ("/tmp", 0o1777), ("/run", 0o755)]
        {
            if !Path::new(path).is_dir() {
                self.dir(Path::new(path), mode)?;
            }
        }
        mount(Some("proc"), "/proc", Some("proc"), quiet, none).context("mount /proc")?;
        bind(Path::new("/proc/sys"), Path::new("/proc/sys"), true)?;
        // Shows the pod's interfaces. Refused on some container hosts; few programs miss it.
        let _ = mount(Some("sysfs"), "/sys", Some("sysfs"), quiet | MsFlags::MS_RDONLY, none);
        self.fresh(Path::new("/tmp"), "mode=1777,size=2g")?;
        fs::set_permissions("/tmp", Permissions::from_mode(0o1777))?;
        self.fresh(Path::new("/run"), TMPFS)?;
        for (path, mode) in tmpfiles::run_dirs() {
            make_parents(self, &path)?;
            self.dir(&path, mode)?;
        }
        self.devices()
    }

    fn devices(&self) -> Result<()> {
        self.fresh(Path::new("/dev"), "mode=0755,size=64k")?;
        for name in ["null", "zero", "full", "random", "urandom", "tty"] {
            let path = Path::new("/dev").join(name);
            fs::write(&path, "").with_context(|| path.display().to_string())?;
            bind(&old(&path), &path, false)?;
        }
        for (name, to) in [
            ("fd", "/proc/self/fd"),
            ("stdin", "/proc/self/fd/0"),
            ("stdout", "/proc/self/fd/1"),
            ("stderr", "/proc/self/fd/2"),
            ("ptmx", "pts/ptmx"),
        ] {
            symlink(to, Path::new("/dev").join(name))?;
        }
        self.dir(Path::new("/dev/shm"), 0o1777)?;
        self.fresh(Path::new("/dev/shm"), "mode=1777,size=512m")?;
        fs::set_permissions("/dev/shm", Permissions::from_mode(0o1777))?;
        self.dir(Path::new("/dev/pts"), 0o755)?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
        mount(
            Some("devpts"),
            "/dev/pts",
            Some("devpts"),
            flags,
            Some("newinstance,ptmxmode=0666,mode=0620"),
        )
        .context("mount /dev/pts")?;
        Ok(())
    }

    fn file(&self, path: &Path, text: &str) -> Result<()> {
        make_parents(self, path)?;
        // A link (to systemd's resolver, say) gives way to the file.
        let _ = fs::remove_file(path);
        fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
        fs::set_permissions(path, Permissions::from_mode(0o644))?;
        self.own(path)
    }

    fn volume(&self, volume: &Volume) -> Result<()> {
        let source = old(&volume.source);
        let say = || format!("mount a volume at {}", volume.target.display());
        if source.is_dir() {
            make_parents(self, &volume.target.join("x")).with_context(say)?;
        } else if !volume.target.exists() {
            make_parents(self, &volume.target).with_context(say)?;
            fs::write(&volume.target, "").with_context(say)?;
        }
        bind(&source, &volume.target, volume.read_only).with_context(say)
    }

    fn fresh(&self, path: &Path, options: &str) -> Result<()> {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("tmpfs"), path, Some("tmpfs"), flags, Some(options))
            .with_context(|| format!("mount a tmpfs at {}", path.display()))?;
        self.own(path)
    }

    fn dir(&self, path: &Path, mode: u32) -> Result<()> {
        make_dir(path, mode)?;
        self.own(path)
    }

    /// Its owner may always enter and write: the mode was made for another owner.
    fn dir_like(&self, path: &Path, meta: &Metadata) -> Result<()> {
        let mode = meta.mode() & 0o7777 | 0o700;
        self.dir(path, mode)?;
        // chown clears the set-group-id bit.
        fs::set_permissions(path, Permissions::from_mode(mode))
            .with_context(|| path.display().to_string())
    }

    fn own(&self, path: &Path) -> Result<()> {
        chown(path, Some(self.owners.uid.into()), Some(self.owners.gid.into()))
            .with_context(|| format!("chown {}", path.display()))
    }
}

fn make_parents(builder: &Builder, path: &Path) -> Result<()> {
    let Some(parent) = path.parent() else { return Ok(()) };
    if parent.is_dir() {
        return Ok(());
    }
    make_parents(builder, parent)?;
    builder.dir(parent, 0o755)
}

fn make_dir(path: &Path, mode: u32) -> Result<()> {
    match DirBuilder::new().mode(mode).create(path) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            Err(e).with_context(|| format!("create {}", path.display()))
        }
        _ => Ok(()),
    }
}

fn old(path: &Path) -> PathBuf {
    Path::new(OLD).join(relative(path))
}

fn relative(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}
