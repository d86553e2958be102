//! Runs a test inside fresh namespaces, as any user: [`in_user_ns`].
//!
//! A user namespace can only be made by a process with one thread, and a test binary has several; so the helper starts
//! the binary again for this one test, in a child that makes its namespaces between fork and exec.
//!
//! Invariants: the child dies with its parent; a failure inside fails the outer test with the child's output.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sched::{CloneFlags, setns, unshare};

use crate::netns::NetNs;

/// Says to the child which test it is.
const INSIDE: &str = "AMBIT_TEST_IN_USER_NS";

/// Runs `test` as root of fresh user, mount and network namespaces (loopback down). Call it first in a `#[test]`.
///
/// # Panics
/// When `test` fails, or when the machine does not let this user make namespaces: a test that cannot run is a failure.
pub fn in_user_ns(test: impl FnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        return test();
    }
    let name = test_name(&test);
    let exe = std::env::current_exe().unwrap_or_else(|e| panic!("current_exe: {e}"));
    let mut child = Command::new(exe);
    child.args(["--exact", &name, "--nocapture", "--include-ignored"]).env(INSIDE, &name);
    let namespaces = CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET;
    isolate(&mut child, namespaces, None);
    let out = child.output().unwrap_or_else(|e| panic!("start {name} in namespaces: {e}"));
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    let (stdout, stderr) = (text(&out.stdout), text(&out.stderr));
    assert!(out.status.success(), "{name} inside namespaces: {}\n{stdout}\n{stderr}", out.status);
    assert!(stdout.contains("1 passed"), "{name} did not run inside:\n{stdout}\n{stderr}");
}

/// The thread carries the test's name, unless the test harness runs on one thread; then the closure's type says it.
fn test_name<F>(_: &F) -> String {
    let thread = std::thread::current();
    if let Some(name) = thread.name().filter(|name| *name != "main") {
        return name.to_owned();
    }
    let path = std::any::type_name::<F>().trim_end_matches("::{{closure}}");
    path.split_once("::").map_or(path, |(_crate, name)| name).to_owned()
}

/// Lets `command` start as root of new namespaces (`CLONE_NEWUSER` must be among them), perhaps after entering a network
/// namespace, and die with its parent.
pub fn isolate(command: &mut Command, namespaces: CloneFlags, first: Option<NetNs>) {
    let (uid, gid) = (nix::unistd::getuid(), nix::unistd::getgid());
    let maps = [
        ("/proc/self/setgroups", "deny".to_owned()),
        ("/proc/self/uid_map", format!("0 {uid} 1")),
        ("/proc/self/gid_map", format!("0 {gid} 1")),
    ];
    let enter = move || -> io::Result<()> {
        nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
        if let Some(ns) = &first {
            setns(ns.as_fd(), CloneFlags::CLONE_NEWNET)?;
        }
        unshare(namespaces)?;
        for (path, map) in &maps {
            fs::write(path, map)?;
        }
        Ok(())
    };
    #[expect(unsafe_code, reason = "namespaces must be made between fork and exec")]
    // SAFETY: the closure makes system calls and opens files by short constant paths, which std does on the stack; it
    // takes no lock that another thread of the parent could hold at the fork.
    unsafe {
        command.pre_exec(enter);
    }
}
