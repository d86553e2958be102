//! What has to be known about a machine before its numbers mean anything.

use std::fs;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::procfs;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Machine {
    pub processor: String,
    pub cores: usize,
    pub memory_gb: f64,
    pub kernel: String,
    pub system: String,
    pub compiler: String,
    /// The host's default; the pods' is pinned.
    pub congestion_default: String,
}

impl Machine {
    pub fn here() -> Self {
        let memory = field("/proc/meminfo", "MemTotal:");
        let kib: f64 = memory.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0.0);
        Self {
            processor: field("/proc/cpuinfo", "model name")
                .trim_start_matches([' ', '\t', ':'])
                .to_owned(),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory_gb: (kib * 1024.0 / 1e8).round() / 10.0,
            kernel: procfs::sysctl("kernel.osrelease").unwrap_or_default(),
            system: field("/etc/os-release", "PRETTY_NAME=").trim_matches('"').to_owned(),
            compiler: output("rustc", &["--version"]),
            congestion_default: procfs::sysctl("net.ipv4.tcp_congestion_control")
                .unwrap_or_default(),
        }
    }
}

/// The commit of the working tree, with a `+` when there is more than the commit in it.
pub fn commit() -> String {
    let commit = output("git", &["rev-parse", "--short=12", "HEAD"]);
    let changed = !output("git", &["status", "--porcelain", "--untracked-files=no"]).is_empty();
    if commit.is_empty() {
        "unknown".to_owned()
    } else {
        format!("{commit}{}", if changed { "+" } else { "" })
    }
}

/// Today in UTC, `YYYY-MM-DD`.
pub fn today() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    date(seconds / 86_400)
}

/// The civil date of a day since 1970-01-01.
fn date(day: u64) -> String {
    let (mut year, mut left) = (1970, day);
    let leap = |y: u64| y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400));
    while left >= 365 + u64::from(leap(year)) {
        left -= 365 + u64::from(leap(year));
        year += 1;
    }
    let months = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 1;
    for days in months {
        if left < days {
            break;
        }
        left -= days;
        month += 1;
    }
    format!("{year:04}-{month:02}-{:02}", left + 1)
}

/// What follows `name` on the first line that begins with it.
fn field(path: &str, name: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().find_map(|l| l.strip_prefix(name)).unwrap_or_default().trim().to_owned()
}

/// The output of a command; empty when it is not there or fails.
fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().ok().filter(|o| o.status.success());
    output.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        let check = |day, want: &str| assert_eq!(date(day), want, "day {day}");
        check(0, "1970-01-01");
        check(58, "1970-02-28");
        check(59, "1970-03-01");
        check(11_016, "2000-02-29");
        check(11_017, "2000-03-01");
        check(20_778, "2026-11-21");
        check(20_818, "2026-12-31");
        check(20_819, "2027-01-01");
    }
}
