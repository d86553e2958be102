//! Turns a process into a container's program: its user, folder, signals and files, then exec.
//!
//! Invariants: the program gets stdin, stdout and stderr and no other file; what cannot be done is said in words on the
//! socket to whoever waits.

use std::ffi::CString;
use std::fs;
use std::io::Write;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, anyhow, ensure};
use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{ForkResult, Gid, Pid, Uid, fork, setgroups, setresgid, setresuid, setsid};

use super::run::ProcessRun;
use super::{one_id, terminal, users};

/// Starts the program as a child with the container's user, and returns once it runs... or why it does not.
///
/// The other end of `sync` sees it: it is closed by a successful exec. `terminal` becomes its stdin, stdout and stderr.
pub(crate) fn start(
    process: &ProcessRun,
    sync: &mut UnixStream,
    terminal: Option<BorrowedFd<'_>>,
) -> Result<Pid> {
    #[expect(unsafe_code, reason = "the program is a child of process 1")]
    // SAFETY: this process has one thread, so the child may go on as if it were a fresh program.
    match unsafe { fork() }.context("fork")? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => {
            let e = become_program(process, terminal);
            let _ = write!(sync, "{e:#}");
            std::process::exit(127)
        }
    }
}

fn become_program(process: &ProcessRun, terminal: Option<BorrowedFd<'_>>) -> anyhow::Error {
    let mut process = process.clone();
    users::add_home(&mut process);
    match prepare(&process, terminal) {
        Ok((argv, env)) => exec(&process, &argv, &env),
        Err(e) => e,
    }
}

fn prepare(
    process: &ProcessRun,
    terminal: Option<BorrowedFd<'_>>,
) -> Result<(Vec<CString>, Vec<CString>)> {
    setsid()?;
    if let Some(terminal) = terminal {
        terminal::adopt(terminal).context("take the terminal")?;
    }
    let groups: Vec<Gid> = process.groups.iter().copied().map(Gid::from_raw).collect();
    // Refused where only one group is mapped.
    let _ = setgroups(&groups);
    let (uid, gid) = (Uid::from_raw(process.uid), Gid::from_raw(process.gid));
    setresgid(gid, gid, gid).with_context(|| format!("runAsGroup {gid}"))?;
    setresuid(uid, uid, uid).with_context(|| format!("runAsUser {uid}"))?;
    if one_id::is_alone() {
        one_id::pretend().context("system call filter for a single user id")?;
    }
    // A command added by `exec` ends with its helper; a container's program ends with process 1 in any case.
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    let cwd = if process.cwd.is_empty() { "/" } else { &process.cwd };
    if let Err(e) = nix::unistd::chdir(cwd) {
        // Kubernetes makes a missing workingDir.
        ensure!(e == Errno::ENOENT, "workingDir {cwd}: {e}");
        fs::create_dir_all(cwd)
            .and_then(|()| std::env::set_current_dir(cwd))
            .with_context(|| format!("workingDir {cwd}"))?;
    }
    let text = |s: &str| CString::new(s).with_context(|| format!("a zero byte in {s:?}"));
    let argv = process.argv.iter().map(|a| text(a)).collect::<Result<Vec<_>>>()?;
    let env =
        process.env.iter().map(|(k, v)| text(&format!("{k}={v}"))).collect::<Result<Vec<_>>>()?;
    SigSet::empty().thread_set_mask()?;
    reset_signals();
    #[expect(unsafe_code, reason = "close_range has no safe wrapper")]
    // SAFETY: only marks files for closing at exec.
    unsafe {
        libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC.cast_signed());
    }
    Ok((argv, env))
}

/// Rust ignores SIGPIPE; the program must find it as usual.
fn reset_signals() {
    #[expect(unsafe_code, reason = "setting a default disposition")]
    // SAFETY: no handler is installed.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
}

/// Looks the program up in the container's own PATH, as a container runtime does.
fn exec(process: &ProcessRun, argv: &[CString], env: &[CString]) -> anyhow::Error {
    let name = &process.argv[0];
    let path = process.env.iter().find(|(k, _)| k == "PATH").map_or("", |(_, v)| v.as_str());
    let candidates: Vec<String> = if name.contains('/') {
        vec![name.clone()]
    } else {
        path.split(':').filter(|d| !d.is_empty()).map(|d| format!("{d}/{name}")).collect()
    };
    let mut worst = Errno::ENOENT;
    for candidate in candidates {
        let Ok(file) = CString::new(candidate) else { continue };
        let Err(e) = nix::unistd::execve(&file, argv, env);
        if e != Errno::ENOENT {
            worst = e;
        }
    }
    match worst {
        Errno::ENOENT if name.contains('/') => {
            anyhow!("cannot run {name:?}: no such file (or its interpreter is missing)")
        }
        Errno::ENOENT => anyhow!("cannot run {name:?}: not found in PATH ({path})"),
        e => anyhow!("cannot run {name:?}: {e}"),
    }
}
