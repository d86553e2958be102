//! What `/proc` says about processes and the machine. Reading is here, parsing is separate and tested.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

/// A process as it shows in `/proc`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    pub pid: i32,
    pub parent: i32,
    pub arguments: Vec<String>,
}

impl Process {
    /// The file name of the program.
    pub fn program(&self) -> &str {
        let path = self.arguments.first().map_or("", String::as_str);
        path.rsplit('/').next().unwrap_or(path)
    }

    /// The value of `--name VALUE` or `--name=VALUE`.
    pub fn flag(&self, name: &str) -> Option<&str> {
        let assigned = format!("{name}=");
        let mut arguments = self.arguments.iter();
        while let Some(argument) = arguments.next() {
            if argument == name {
                return arguments.next().map(String::as_str);
            }
            if let Some(value) = argument.strip_prefix(&assigned) {
                return Some(value);
            }
        }
        None
    }
}

/// Every process below `root`, at any depth, in any process namespace.
pub fn descendants(root: i32) -> Vec<Process> {
    let all = processes();
    let mut found = vec![root];
    // Breadth first; the list grows while it is walked.
    let mut at = 0;
    while at < found.len() {
        let parent = found[at];
        found.extend(all.values().filter(|p| p.parent == parent).map(|p| p.pid));
        at += 1;
    }
    found.iter().skip(1).filter_map(|pid| all.get(pid).cloned()).collect()
}

fn processes() -> BTreeMap<i32, Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    // A process may end while it is looked at.
    let process = |pid: i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        Some(Process { pid, parent: stat_fields(&stat)?.parent, arguments: arguments(&line) })
    };
    pids.filter_map(|pid| Some((pid, process(pid)?))).collect()
}

fn arguments(line: &[u8]) -> Vec<String> {
    let words = line.split(|b| *b == 0).map(|w| String::from_utf8_lossy(w).into_owned());
    let mut words: Vec<String> = words.collect();
    // The last argument ends with a zero byte, too.
    words.pop();
    words
}

/// CPU seconds of processes and of the machine at one moment; differences of two are what counts.
#[derive(Clone, Debug)]
pub struct Cpu {
    /// User and system time of each process.
    pub processes: BTreeMap<i32, f64>,
    /// Everything that is not idle, and not stolen.
    pub machine: f64,
    /// Time that the hypervisor gave to somebody else.
    pub steal: f64,
}

impl Cpu {
    pub fn now(pids: &[i32]) -> Result<Self> {
        let mut times = BTreeMap::new();
        for pid in pids {
            let path = format!("/proc/{pid}/stat");
            let text =
                fs::read_to_string(&path).with_context(|| format!("{path}: did the proxy end?"))?;
            let fields =
                stat_fields(&text).with_context(|| format!("{path} is not in the known form"))?;
            times.insert(*pid, fields.cpu_ticks / ticks_per_second()?);
        }
        let text = fs::read_to_string("/proc/stat").context("/proc/stat")?;
        let (busy, steal) = machine_ticks(&text).context("/proc/stat is not in the known form")?;
        Ok(Self {
            processes: times,
            machine: busy / ticks_per_second()?,
            steal: steal / ticks_per_second()?,
        })
    }
}

fn ticks_per_second() -> Result<f64> {
    let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.context("no clock tick")?;
    let ticks = u32::try_from(ticks).context("clock tick")?;
    Ok(ticks.into())
}

struct StatFields {
    parent: i32,
    cpu_ticks: f64,
}

fn stat_fields(text: &str) -> Option<StatFields> {
    // The name in brackets may hold anything, brackets too: what counts comes after the last one.
    let rest: Vec<&str> = text.get(text.rfind(')')? + 1..)?.split_whitespace().collect();
    let (user, system): (f64, f64) = (rest.get(11)?.parse().ok()?, rest.get(12)?.parse().ok()?);
    Some(StatFields { parent: rest.get(1)?.parse().ok()?, cpu_ticks: user + system })
}

/// Busy and stolen ticks of all processors.
fn machine_ticks(text: &str) -> Option<(f64, f64)> {
    let line = text.lines().find_map(|l| l.strip_prefix("cpu "))?;
    let ticks: Vec<f64> = line.split_whitespace().filter_map(|w| w.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal
    let [user, nice, system, _idle, _iowait, irq, softirq, steal, ..] = ticks[..] else {
        return None;
    };
    Some((user + nice + system + irq + softirq, steal))
}

/// Resident memory of a process, in MB (10^6).
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Memory {
    pub rss_mb: f64,
    pub anonymous_mb: f64,
    pub peak_mb: f64,
}

impl Memory {
    pub fn of(pid: i32) -> Result<Self> {
        let path = format!("/proc/{pid}/status");
        let text =
            fs::read_to_string(&path).with_context(|| format!("{path}: did the proxy end?"))?;
        memory(&text).with_context(|| format!("{path} is not in the known form"))
    }
}

fn memory(text: &str) -> Option<Memory> {
    let field = |name: &str| -> Option<f64> {
        let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
        let kib: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kib * 1024.0 / 1e6)
    };
    Some(Memory {
        rss_mb: field("VmRSS")?,
        anonymous_mb: field("RssAnon")?,
        peak_mb: field("VmHWM")?,
    })
}

/// A setting below `/proc/sys`, as text.
pub fn sysctl(name: &str) -> Option<String> {
    let path = Path::new("/proc/sys").join(name.replace('.', "/"));
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_of_a_process_with_an_odd_name() {
        let text = "42 (a) b) (c) S 7 42 42 0 -1 4194560 1 0 0 0 150 25 0 0 20 0 3 0 99 1 2";
        let fields = stat_fields(text).unwrap();
        assert_eq!((fields.parent, fields.cpu_ticks), (7, 175.0));
        assert!(stat_fields("nonsense").is_none());
    }

    #[test]
    fn busy_time_leaves_idle_and_steal_out() {
        let text = "cpu  1 2 4 1000 500 8 16 32 0 0\ncpu0 9 9 9 9 9 9 9 9 9 9\n";
        assert_eq!(machine_ticks(text), Some((31.0, 32.0)));
        assert_eq!(machine_ticks("cpu  1 2\n"), None);
    }

    #[test]
    fn memory_in_megabytes() {
        let text = "Name:\tx\nVmHWM:\t    2000 kB\nVmRSS:\t    1000 kB\nRssAnon:\t     500 kB\n";
        let memory = memory(text).unwrap();
        assert!((memory.rss_mb - 1.024).abs() < 1e-9 && (memory.peak_mb - 2.048).abs() < 1e-9);
    }

    #[test]
    fn flags_of_a_process() {
        let process = |line: &[u8]| Process { pid: 1, parent: 0, arguments: arguments(line) };
        let one = process(b"/x/ztunnel\0proxy\0--node\0node-1\0");
        assert_eq!((one.program(), one.flag("--node")), ("ztunnel", Some("node-1")));
        assert_eq!(process(b"ztunnel\0--node=node-2\0").flag("--node"), Some("node-2"));
        assert_eq!(process(b"").program(), "");
    }

    #[test]
    fn this_test_is_below_its_parent() {
        let own = i32::try_from(std::process::id()).unwrap();
        let parent = nix::unistd::getppid().as_raw();
        assert!(descendants(parent).iter().any(|p| p.pid == own));
        assert!(Cpu::now(&[own]).is_ok() && Memory::of(own).is_ok());
    }
}
