//! Mounts: what is mounted where, bind mounts, and covering a path.
//!
//! Invariants: a read-only bind keeps the flags the machine put on the mount, which are locked here.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};

/// Shows `source`, and what is mounted below it, at `target`.
pub(crate) fn bind(source: &Path, target: &Path, read_only: bool) -> Result<()> {
    let none: Option<&str> = None;
    let say = || format!("bind {} to {}", source.display(), target.display());
    mount(Some(source), target, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)
        .with_context(say)?;
    if read_only {
        // Flags of a mount from outside are locked and must be repeated.
        let locked = nix::sys::statvfs::statvfs(target).map(|s| s.flags()).with_context(say)?;
        let mut flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        for (has, flag) in [
            (nix::sys::statvfs::FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
            (nix::sys::statvfs::FsFlags::ST_NODEV, MsFlags::MS_NODEV),
            (nix::sys::statvfs::FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
            (nix::sys::statvfs::FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
            (nix::sys::statvfs::FsFlags::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
            (nix::sys::statvfs::FsFlags::ST_RELATIME, MsFlags::MS_RELATIME),
        ] {
            if locked.contains(has) {
                flags |= flag;
            }
        }
        mount(none, target, none, flags, none).with_context(say)?;
    }
    Ok(())
}

/// Covers a path with nothing, if it is there.
pub(crate) fn hide(path: &Path) -> Result<()> {
    let none: Option<&str> = None;
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => {
            let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
            mount(Some("tmpfs"), path, Some("tmpfs"), flags, Some("mode=0555,size=4k"))
                .with_context(|| format!("hide {}", path.display()))
        }
        Ok(meta) if meta.is_file() => mount(Some("/dev/null"), path, none, MsFlags::MS_BIND, none)
            .with_context(|| format!("hide {}", path.display())),
        _ => Ok(()),
    }
}

/// Where something is mounted, and what.
pub(crate) struct MountTable {
    points: BTreeSet<PathBuf>,
    kinds: Vec<(PathBuf, String)>,
}

impl MountTable {
    pub(crate) fn read() -> Result<Self> {
        Ok(Self::parse(
            &fs::read_to_string("/proc/self/mountinfo").context("read the mount table")?,
        ))
    }

    fn parse(text: &str) -> Self {
        let line = |l: &str| {
            let (left, right) = l.split_once(" - ")?;
            let point = left.split(' ').nth(4)?;
            Some((PathBuf::from(unescape(point)), right.split(' ').next()?.to_owned()))
        };
        let kinds: Vec<_> = text.lines().filter_map(line).collect();
        Self { points: kinds.iter().map(|(p, _)| p.clone()).collect(), kinds }
    }

    /// Whether a mount lies strictly below.
    pub(crate) fn any_below(&self, path: &Path) -> bool {
        self.points.range(path.to_owned()..).take_while(|p| p.starts_with(path)).any(|p| p != path)
    }

    /// The file system mounted exactly here; the last mount covers those before.
    pub(crate) fn kind(&self, path: &Path) -> Option<&str> {
        self.kinds.iter().rev().find(|(p, _)| p == path).map(|(_, k)| k.as_str())
    }
}

/// The kernel writes blanks and backslashes of paths as `\ooo`.
fn unescape(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(code) => {
                out.push(char::from(code));
                out.push_str(&part[3..]);
            }
            None => {
                out.push('\\');
                out.push_str(part);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_table() {
        let text = "22 1 0:20 / / rw - ext4 /dev/vda rw\n\
                    23 22 0:21 / /proc rw,nosuid shared:5 - proc proc rw\n\
                    24 22 0:22 / /mnt/a\\040b rw - tmpfs none rw\n\
                    25 22 0:23 / /var/lib/docker/x rw - overlay overlay rw\n\
                    26 22 0:24 / /usr-local rw - ext4 x rw\n";
        let table = MountTable::parse(text);
        let check = |path: &str, kind, below| {
            assert_eq!(table.kind(Path::new(path)), kind, "{path}");
            assert_eq!(table.any_below(Path::new(path)), below, "{path}");
        };
        check("/", Some("ext4"), true);
        check("/proc", Some("proc"), false);
        check("/mnt/a b", Some("tmpfs"), false);
        check("/var", None, true);
        check("/var/lib", None, true);
        check("/var/log", None, false);
        check("/usr", None, false);
    }
}
