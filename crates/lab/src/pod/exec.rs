//! The process that runs a command inside a running container or a node.
//!
//! Invariants: it joins the pod's namespaces from above (the network, UTS, IPC and process namespaces as the lab's root,
//! then the mounts, the user namespace last), drops what the container dropped, and holds no file of the lab by then. Its
//! end ends the command.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::run::ProcessRun;
use super::terminal::Terminal;
use super::{helper, program};
use crate::fds;

/// What to run where.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ExecRun {
    pub(crate) process: ProcessRun,
    /// The container's first process; `None`: the network namespace passed as file 4 (a node), as the lab's root.
    pub(crate) container: Option<i32>,
    /// The caller's stdin is a terminal: the command gets one of its own.
    pub(crate) terminal: bool,
}

/// The shell's word for "could not be run".
const CANNOT_RUN: u8 = 126;

/// The hidden subcommand: file 3 is the description, file 4 the network namespace; stdin, stdout and stderr are the
/// caller's. The exit status is the command's.
pub(crate) fn run() -> Result<ExitCode> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    let mut text = vec![];
    File::from(fds::take(3).context("this command is started by the lab only")?)
        .read_to_end(&mut text)?;
    let exec: ExecRun = serde_json::from_slice(&text).context("description of the command")?;
    let net = fds::take(4)?;
    if let Err(e) = join(&exec, net) {
        return Ok(fail(&format!("{e:#}")));
    }
    match start(&exec) {
        Ok((child, terminal)) => {
            if let Some(terminal) = terminal {
                terminal.join();
            }
            Ok(ExitCode::from(wait_for(child)))
        }
        Err(e) => Ok(fail(&format!("{e:#}"))),
    }
}

fn start(exec: &ExecRun) -> Result<(Pid, Option<Terminal>)> {
    let terminal = exec.terminal.then(Terminal::create).transpose().context("make a terminal")?;
    let (mut ours, mut theirs) = UnixStream::pair()?;
    let slave = terminal.as_ref().map(|t| t.slave.as_fd());
    let child = program::start(&exec.process, &mut theirs, slave)?;
    drop(theirs);
    let mut text = String::new();
    ours.read_to_string(&mut text)?;
    if !text.is_empty() {
        let _ = waitpid(child, None);
        bail!(text);
    }
    Ok((child, terminal))
}

fn join(exec: &ExecRun, net: OwnedFd) -> Result<()> {
    setns(net, CloneFlags::CLONE_NEWNET).context("enter the network namespace")?;
    let Some(pid) = exec.container else { return Ok(()) };
    let open = |kind: &str| {
        File::open(format!("/proc/{pid}/ns/{kind}"))
            .with_context(|| format!("the container's {kind} namespace (has it ended?)"))
    };
    // All are opened before the first is entered: the lab's /proc is out of sight afterwards.
    let spaces = [
        (open("uts")?, CloneFlags::CLONE_NEWUTS),
        (open("ipc")?, CloneFlags::CLONE_NEWIPC),
        (open("pid")?, CloneFlags::CLONE_NEWPID),
        (open("mnt")?, CloneFlags::CLONE_NEWNS),
        (open("user")?, CloneFlags::CLONE_NEWUSER),
    ];
    prctl::set_dumpable(false)?;
    for (space, kind) in spaces {
        setns(space, kind).with_context(|| format!("enter the container's namespace {kind:?}"))?;
    }
    helper::drop_privileges()
}

fn wait_for(child: Pid) -> u8 {
    loop {
        let code = |n: i32| u8::try_from(n & 0xff).unwrap_or(u8::MAX);
        match waitpid(child, None) {
            Ok(WaitStatus::Exited(_, status)) => return code(status),
            Ok(WaitStatus::Signaled(_, signal, _)) => return code(128 + signal as i32),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => {
                let _ = kill(child, Signal::SIGKILL);
                return CANNOT_RUN;
            }
        }
    }
}

fn fail(text: &str) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "meshctl: {text}");
    ExitCode::from(CANNOT_RUN)
}

/// Reads what a helper needs from memory, so that nothing of it is on a command line or on disk.
pub(crate) fn description(value: &impl Serialize) -> Result<OwnedFd> {
    let fd = nix::sys::memfd::memfd_create(c"lab", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
        .context("memfd_create")?;
    let mut file = File::from(fd);
    file.write_all(&serde_json::to_vec(value)?)?;
    let again = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    // A second opening starts at the beginning.
    Ok(File::open(again)?.into())
}
