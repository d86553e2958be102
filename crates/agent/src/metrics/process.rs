//! What the kernel says about this process, under the names every Prometheus client uses.

use std::fs;

/// What is not known is left out.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Process {
    pub(super) open_fds: Option<u64>,
    pub(super) max_fds: Option<u64>,
    pub(super) resident_bytes: Option<u64>,
    pub(super) cpu_seconds: Option<f64>,
}

impl Process {
    pub(super) fn read() -> Self {
        let file =
            |name: &str| fs::read_to_string(format!("/proc/self/{name}")).unwrap_or_default();
        Self {
            // The listing itself holds one more open.
            open_fds: fs::read_dir("/proc/self/fd")
                .ok()
                .map(|d| (d.count() as u64).saturating_sub(1)),
            max_fds: max_fds(&file("limits")),
            resident_bytes: resident_bytes(&file("status")),
            cpu_seconds: cpu_seconds(&file("stat")),
        }
    }
}

fn max_fds(limits: &str) -> Option<u64> {
    let line = limits.lines().find_map(|l| l.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

fn resident_bytes(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}

/// User and system time. The kernel reports them in hundredths of a second on every architecture that
/// Linux has today (USER_HZ).
fn cpu_seconds(stat: &str) -> Option<f64> {
    // The second field is the program's name in brackets and may hold anything, brackets too.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let (user, system): (u32, u32) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some((f64::from(user) + f64::from(system)) / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats() {
        let limits = "Limit  Soft Limit  Hard Limit  Units\nMax open files            1024                 4096                 files\n";
        assert_eq!(max_fds(limits), Some(1024));
        assert_eq!(max_fds("Max open files unlimited unlimited"), None);
        assert_eq!(resident_bytes("Name:\tx\nVmRSS:\t  12 kB\n"), Some(12 * 1024));
        assert_eq!(cpu_seconds("1 (a) b) S 1 1 1 0 -1 4194560 1 0 0 0 250 50 0 0 20"), Some(3.0));
        for junk in ["", ")", "1 (a) S 1", "Max open files", "VmRSS:"] {
            assert_eq!(
                (max_fds(junk), resident_bytes(junk), cpu_seconds(junk)),
                (None, None, None)
            );
        }
    }

    #[test]
    fn this_process() {
        let p = Process::read();
        assert!(p.open_fds.is_some_and(|n| n >= 3) && p.max_fds >= p.open_fds, "{p:?}");
        assert!(p.resident_bytes.is_some_and(|n| n > 1 << 20) && p.cpu_seconds.is_some(), "{p:?}");
    }
}
