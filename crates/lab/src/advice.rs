//! What to tell a user whose machine does not let them make namespaces.
//!
//! Invariants: the error names the setting that is in the way when it can be read, and the command that changes it.

use std::fs;

use anyhow::{Error, anyhow};

/// Explains why the lab's namespaces could not be made.
pub(crate) fn no_namespaces(what: &str) -> Error {
    let read = |path: &str| fs::read_to_string(path).ok().map(|t| t.trim().to_owned());
    let facts = Facts {
        unprivileged: read("/proc/sys/kernel/unprivileged_userns_clone"),
        limit: read("/proc/sys/user/max_user_namespaces"),
        apparmor: read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns"),
        root: nix::unistd::getuid().is_root(),
    };
    let advice = advise(&facts).join("\n  - ");
    anyhow!("cannot make the namespaces of the lab: {what}\n  - {advice}")
}

struct Facts {
    unprivileged: Option<String>,
    limit: Option<String>,
    apparmor: Option<String>,
    root: bool,
}

fn advise(facts: &Facts) -> Vec<&'static str> {
    let mut advice = vec![];
    if facts.unprivileged.as_deref() == Some("0") {
        advice.push("kernel.unprivileged_userns_clone is 0: `sudo sysctl -w kernel.unprivileged_userns_clone=1`");
    }
    if facts.limit.as_deref() == Some("0") {
        advice
            .push("user.max_user_namespaces is 0: `sudo sysctl -w user.max_user_namespaces=15000`");
    }
    if facts.apparmor.as_deref() == Some("1") && !facts.root {
        advice.push(
            "AppArmor restricts user namespaces (Ubuntu 24.04 and later): \
             `sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0`, or give meshctl an AppArmor profile with `userns,`",
        );
    }
    if advice.is_empty() {
        advice.push(
            "the kernel settings look right; a container runtime may forbid it: with Docker, run with \
             --security-opt seccomp=unconfined --security-opt apparmor=unconfined --security-opt systempaths=unconfined \
             --cap-add SYS_ADMIN",
        );
    }
    advice
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_the_setting_in_the_way() {
        let check = |unprivileged: &str, limit: &str, apparmor: &str, root, want: &[&str]| {
            let some = |s: &str| (!s.is_empty()).then(|| s.to_owned());
            let facts = Facts {
                unprivileged: some(unprivileged),
                limit: some(limit),
                apparmor: some(apparmor),
                root,
            };
            let advice = advise(&facts);
            assert_eq!(advice.len(), want.len(), "{advice:?}");
            for (advice, want) in advice.iter().zip(want) {
                assert!(advice.contains(want), "{advice} should name {want}");
            }
        };
        check("0", "", "", false, &["unprivileged_userns_clone=1"]);
        check("1", "0", "", false, &["max_user_namespaces=15000"]);
        check("1", "100", "1", false, &["apparmor_restrict"]);
        check("1", "100", "1", true, &["container runtime"]);
        check("0", "0", "1", false, &["clone=1", "namespaces=15000", "apparmor"]);
    }
}
