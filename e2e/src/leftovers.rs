//! Proof that a lab left nothing: no process, no mount, no namespace, no folder.
//!
//! Before the end, everything below the lab's front is remembered: processes and the namespaces they are in. After the
//! end, none of it may be there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;

use anyhow::{Result, ensure};

/// What belongs to a running lab.
#[derive(Clone, Debug, Default)]
pub struct Belongings {
    /// Process id and start time, which together are unique.
    processes: BTreeSet<(i32, u64)>,
    /// Identity of namespaces, as `net:[4026532001]`.
    namespaces: BTreeSet<String>,
    state: PathBuf,
}

/// The kinds of namespaces a lab makes.
const KINDS: [&str; 6] = ["user", "mnt", "net", "pid", "uts", "ipc"];

impl Belongings {
    /// Everything below `front`, and the lab's folder.
    pub fn of(front: u32, state: PathBuf) -> Result<Self> {
        let ours = namespaces_of("self");
        let children = children();
        let mut found = Self { state, ..Self::default() };
        let mut todo = vec![i32::try_from(front)?];
        while let Some(pid) = todo.pop() {
            let Some(start) = start_time(pid) else { continue };
            found.processes.insert((pid, start));
            found.namespaces.extend(namespaces_of(&pid.to_string()).difference(&ours).cloned());
            todo.extend(children.get(&pid).into_iter().flatten());
        }
        Ok(found)
    }

    pub fn processes(&self) -> usize {
        self.processes.len()
    }

    pub fn namespaces(&self) -> usize {
        self.namespaces.len()
    }

    /// Below somebody who is neither of the lab nor of our own line. The lab has ended, so its namespace only has the number of one
    /// that was the lab's: numbers are used again at once. What the lab left behind is nobody's child but init's or ours.
    fn is_foreign(&self, pid: i32) -> bool {
        let lab = |pid: i32| self.processes.iter().any(|(known, _)| *known == pid);
        let own: BTreeSet<i32> = ancestors(std::process::id().cast_signed()).collect();
        ancestors(pid).skip(1).any(|above| !own.contains(&above) && !lab(above))
    }

    /// An error that names what is still there.
    pub fn check_gone(&self) -> Result<()> {
        self.check_ended()?;
        ensure!(!self.state.exists(), "{} is left", self.state.display());
        Ok(())
    }

    /// The same, but for the folder, which a front that was killed leaves behind.
    pub fn check_ended(&self) -> Result<()> {
        let alive: Vec<String> = self
            .processes
            .iter()
            .filter(|(pid, start)| start_time(*pid) == Some(*start))
            .map(|(pid, _)| format!("{pid} ({})", command_line(*pid)))
            .collect();
        ensure!(alive.is_empty(), "processes are left: {}", alive.join(", "));
        let held: Vec<String> = everyone()
            .filter_map(|pid| {
                let shared = &namespaces_of(&pid.to_string()) & &self.namespaces;
                let ours = !shared.is_empty() && !self.is_foreign(pid);
                ours.then(|| format!("{shared:?} by {pid} ({})", command_line(pid)))
            })
            .collect();
        ensure!(held.is_empty(), "namespaces are left: {}", held.join(", "));
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let state = self.state.to_string_lossy();
        let bound = |line: &&str| {
            // A namespace kept by a mount shows as the file system nsfs.
            line.contains(&*state) || self.namespaces.iter().any(|n| line.contains(n.as_str()))
        };
        let left: Vec<&str> = mounts.lines().filter(bound).collect();
        ensure!(left.is_empty(), "mounts are left: {left:?}");
        Ok(())
    }
}

fn everyone() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().to_str()?.parse().ok())
}

fn children() -> BTreeMap<i32, Vec<i32>> {
    let mut children: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
    for pid in everyone() {
        if let Some(parent) = stat(pid).and_then(|s| s.get(1)?.parse().ok()) {
            children.entry(parent).or_default().push(pid);
        }
    }
    children
}

/// A process, its parent, and so on to the first one; a process that ends meanwhile is nobody's.
fn ancestors(pid: i32) -> impl Iterator<Item = i32> {
    // 0 is the parent of the first process.
    let parent = |pid: &i32| stat(*pid)?.get(1)?.parse().ok().filter(|parent| *parent > 0);
    std::iter::successors(Some(pid), parent)
}

fn start_time(pid: i32) -> Option<u64> {
    stat(pid)?.get(19)?.parse().ok()
}

/// The fields of `/proc/PID/stat` behind the name, which may hold anything; the first is the state.
fn stat(pid: i32) -> Option<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = text.rsplit_once(')')?;
    Some(fields.split_whitespace().map(str::to_owned).collect())
}

/// Empty where the process is closed to us.
fn namespaces_of(pid: &str) -> BTreeSet<String> {
    let link = |kind| fs::read_link(format!("/proc/{pid}/ns/{kind}"));
    KINDS.iter().filter_map(|k| link(k).ok()).map(|l| l.to_string_lossy().into_owned()).collect()
}

fn command_line(pid: i32) -> String {
    let raw = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&raw).replace('\0', " ").trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sees_what_is_there_and_what_is_gone() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        // `spawn` returns when the old program is gone; the new one's words may come a moment later.
        let limit = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while command_line(pid) != "sleep 60" && std::time::Instant::now() < limit {
            std::thread::yield_now();
        }
        let folder = tempfile::tempdir().unwrap();
        let found = Belongings::of(child.id(), folder.path().join("gone")).unwrap();
        assert_eq!(found.processes(), 1);
        assert!(found.check_gone().unwrap_err().to_string().contains("sleep 60"));
        child.kill().unwrap();
        child.wait().unwrap();
        found.check_gone().unwrap();
        let folder_left = Belongings { state: folder.path().to_owned(), ..found };
        assert!(folder_left.check_gone().is_err());
    }
}
