//! Settings inside a pod's network namespace, made from outside the mesh.
//!
//! A pod may not change its own network; the owner of the lab's user namespace may. Joining a user
//! namespace needs a process with one thread, so this runs in a process of its own: `meshbench sysctl`.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CloneFlags, setns};
use nix::unistd::geteuid;

/// The congestion control of every run: Linux's default. Others, BBR first of all, distort links
/// without a queue, as between namespaces (`field/performance.md` measured 16 against 60 Gbit/s).
pub const CONGESTION: &str = "net.ipv4.tcp_congestion_control";
pub const CONGESTION_PIN: &str = "cubic";
const ALLOWED: &str = "/proc/sys/net/ipv4/tcp_allowed_congestion_control";

/// What a pod's settings are for one line of the benchmark.
pub type Settings<'a> = &'a [(&'a str, &'a str)];

/// Sets values in the network namespace of process `pid`; `lab` is a process in the user namespace
/// that owns it. Starts a process of its own.
pub fn set(pid: i32, lab: i32, settings: Settings<'_>) -> Result<()> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["sysctl", &pid.to_string(), &lab.to_string()]);
    command.args(settings.iter().map(|(name, value)| format!("{name}={value}")));
    let output = command.output().context("cannot start this program again")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// The process that [`set`] starts. It must have one thread.
pub fn set_here(pid: i32, lab: i32, settings: &[String]) -> Result<()> {
    let net = File::open(format!("/proc/{pid}/ns/net")).context("the pod's network namespace")?;
    if !geteuid().is_root() {
        let user =
            File::open(format!("/proc/{lab}/ns/user")).context("the lab's user namespace")?;
        setns(user, CloneFlags::CLONE_NEWUSER).context("cannot join the lab's user namespace")?;
    }
    setns(net, CloneFlags::CLONE_NEWNET).context("cannot join the pod's network namespace")?;
    for setting in settings {
        let (name, value) =
            setting.split_once('=').with_context(|| format!("{setting:?} is not NAME=VALUE"))?;
        let path = Path::new("/proc/sys").join(name.replace('.', "/"));
        fs::write(&path, value)
            .with_context(|| format!("cannot set {name} to {value} in the pod"))?;
    }
    Ok(())
}

/// Lets namespaces use the pinned congestion control while it lives, and puts the list back after.
#[derive(Debug)]
pub struct Allowed {
    before: Option<String>,
}

impl Allowed {
    /// # Errors
    /// When the kernel's list does not have it and this user may not change the list.
    pub fn ensure() -> Result<Self> {
        let before = fs::read_to_string(ALLOWED).with_context(|| ALLOWED.to_owned())?;
        if before.split_whitespace().any(|c| c == CONGESTION_PIN) {
            return Ok(Self { before: None });
        }
        if let Err(e) = fs::write(ALLOWED, format!("{} {CONGESTION_PIN}", before.trim())) {
            bail!(
                "congestion control cannot be pinned to {CONGESTION_PIN} ({e}); as root: \
                 sysctl -w net.ipv4.tcp_allowed_congestion_control=\"{} {CONGESTION_PIN}\"",
                before.trim()
            );
        }
        Ok(Self { before: Some(before) })
    }
}

impl Drop for Allowed {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            // Nothing depends on it: the list only allows.
            let _ = fs::write(ALLOWED, before.trim());
        }
    }
}
