//! What the machine's packages ask for below `/run` at boot (`tmpfiles.d`).

use std::fs;
use std::path::{Component, Path, PathBuf};

/// The folders below `/run` that the machine's packages ask for at boot (`tmpfiles.d`): PostgreSQL, for one, does not
/// start without its own.
pub(crate) fn run_dirs() -> Vec<(PathBuf, u32)> {
    let mut dirs = vec![];
    for folder in ["/usr/lib/tmpfiles.d", "/etc/tmpfiles.d"] {
        let Ok(entries) = fs::read_dir(folder) else { continue };
        for entry in entries.flatten() {
            let text = fs::read_to_string(entry.path()).unwrap_or_default();
            dirs.extend(text.lines().filter_map(run_dir));
        }
    }
    dirs
}

/// One line of `tmpfiles.d`: `d /run/postgresql 2775 postgres postgres - -`.
fn run_dir(line: &str) -> Option<(PathBuf, u32)> {
    let mut words = line.split_whitespace();
    let kind = words.next()?;
    let path = words.next()?;
    let path =
        Path::new(path.strip_prefix("/var").filter(|p| p.starts_with("/run/")).unwrap_or(path));
    let below_run =
        path.starts_with("/run/") && path.components().all(|c| !matches!(c, Component::ParentDir));
    if !matches!(kind, "d" | "D") || !below_run || path.to_str().is_none_or(|p| p.contains('%')) {
        return None;
    }
    let mode = words.next().and_then(|m| u32::from_str_radix(m, 8).ok()).unwrap_or(0o755);
    Some((path.to_owned(), mode & 0o7777))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_below_run() {
        let check = |line: &str, want: Option<(&str, u32)>| {
            assert_eq!(run_dir(line), want.map(|(p, m)| (PathBuf::from(p), m)), "{line:?}");
        };
        check("d /run/postgresql 2775 postgres postgres - -", Some(("/run/postgresql", 0o2775)));
        check("D /var/run/foo - - -", Some(("/run/foo", 0o755)));
        check("d /var/lib/foo 0755", None);
        check("d /run/user/%u 0700", None);
        check("d /run/../etc 0777", None);
        check("f /run/utmp 0664", None);
        check("# d /run/x", None);
        check("", None);
    }
}
