//! Users by number: what `/etc/passwd` of a container says about them.
//!
//! Invariants: a number without a name gets one, as container runtimes do, because some programs (PostgreSQL) refuse to run
//! as nobody in particular; an existing line is never changed.

use std::fs;

use super::run::ProcessRun;

const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";

/// The files to write in the container's `/etc` so that the process's user and group have names. Reads those that are there.
pub(crate) fn missing(process: &ProcessRun) -> Vec<(&'static str, String)> {
    let mut files = vec![];
    let passwd = fs::read_to_string(PASSWD).unwrap_or_default();
    if find(&passwd, process.uid).is_none() {
        let line = format!("user{}:x:{}:{}::/:/bin/sh", process.uid, process.uid, process.gid);
        files.push((PASSWD, with_line(&passwd, &line)));
    }
    let group = fs::read_to_string(GROUP).unwrap_or_default();
    if find(&group, process.gid).is_none() {
        let name =
            if process.gid == 0 { "root".to_owned() } else { format!("group{}", process.gid) };
        files.push((GROUP, with_line(&group, &format!("{name}:x:{}:", process.gid))));
    }
    files
}

/// Sets `HOME` from the container's `/etc/passwd` unless the pod says otherwise.
pub(crate) fn add_home(process: &mut ProcessRun) {
    if process.env.iter().any(|(k, _)| k == "HOME") {
        return;
    }
    let passwd = fs::read_to_string(PASSWD).unwrap_or_default();
    let home = find(&passwd, process.uid)
        .and_then(|line| line.split(':').nth(5))
        .filter(|h| !h.is_empty());
    let fallback = if process.uid == 0 { "/root" } else { "/" };
    process.env.push(("HOME".to_owned(), home.unwrap_or(fallback).to_owned()));
}

/// The line of a number: the third field in both files.
fn find(text: &str, id: u32) -> Option<&str> {
    text.lines().find(|line| line.split(':').nth(2).is_some_and(|n| n.parse() == Ok(id)))
}

fn with_line(text: &str, line: &str) -> String {
    let end = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
    format!("{text}{end}{line}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_found_by_number() {
        let text = "root:x:0:0:root:/root:/bin/bash\nweb:x:33:33::/var/www:/bin/sh\nbroken\n";
        assert_eq!(find(text, 33), Some("web:x:33:33::/var/www:/bin/sh"));
        assert_eq!(find(text, 3), None);
        assert_eq!(with_line("a", "b"), "a\nb\n");
        assert_eq!(with_line("", "b"), "b\n");
    }
}
