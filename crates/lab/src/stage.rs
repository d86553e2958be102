//! The way into the lab: a process that makes the namespaces, and its child, process 1 of the lab.
//!
//! Started as a hidden subcommand, because a user namespace can only be made by a process with one thread.
//!
//! ```text
//! front (outside) --start--> stage: unshare --"U"--> front writes the id maps --"G"--> stage: fork -> process 1: world
//! ```
//!
//! Invariants: when the front dies for whatever reason, the stage dies, then process 1, and with it every process,
//! mount and network namespace of the lab. The lab is in a session of its own: Ctrl-C reaches only the front.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Gid, Uid, fork, setgroups, setresgid, setresuid, setsid};

use crate::launch::FrontFds;

/// The namespaces are made; waiting for the id maps.
pub(crate) const UNSHARED: u8 = b'U';
/// The maps are written; go on.
pub(crate) const GO: u8 = b'G';

/// The hidden subcommand. `info` is the path of the lab's description.
pub(crate) fn run(info: &Path) -> Result<ExitCode> {
    prctl::set_pdeathsig(Signal::SIGKILL).context("PR_SET_PDEATHSIG")?;
    let inherited =
        FrontFds::take().context("this command is started by `meshctl local up` only")?;
    let mut sync = UnixStream::from(inherited.sync);
    setsid().context("setsid")?;
    if let Err(e) = enter(&mut sync) {
        // The front prints it with advice.
        let _ = write!(sync, "{e:#}");
        return Ok(ExitCode::FAILURE);
    }
    // Forgotten with the change of user namespace.
    prctl::set_pdeathsig(Signal::SIGKILL).context("PR_SET_PDEATHSIG")?;
    drop(sync);
    #[expect(
        unsafe_code,
        reason = "the first process of the new process namespace must be a child"
    )]
    // SAFETY: this process has one thread, so the child may go on as if it were a fresh program.
    match unsafe { fork() }.context("fork")? {
        ForkResult::Child => {
            prctl::set_pdeathsig(Signal::SIGKILL).context("PR_SET_PDEATHSIG")?;
            prepare_mounts().context("prepare the mounts of the lab")?;
            nix::unistd::sethostname("ambit-lab").context("set the host name")?;
            crate::world::run(info, inherited.world)
        }
        ForkResult::Parent { child } => {
            drop(inherited.world);
            loop {
                match waitpid(child, None) {
                    Ok(WaitStatus::Exited(_, 0)) => return Ok(ExitCode::SUCCESS),
                    Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) => {
                        return Ok(ExitCode::FAILURE);
                    }
                    Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                    Err(e) => return Err(anyhow!("wait for the lab: {e}")),
                }
            }
        }
    }
}

fn enter(sync: &mut UnixStream) -> Result<()> {
    let all = CloneFlags::CLONE_NEWUSER
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWPID;
    unshare(all).context("unshare")?;
    sync.write_all(&[UNSHARED]).context("tell the front")?;
    let mut answer = [0];
    sync.read_exact(&mut answer).context("wait for the id maps")?;
    anyhow::ensure!(answer == [GO], "the front gave up");
    setresgid(Gid::from_raw(0), Gid::from_raw(0), Gid::from_raw(0))
        .context("become group 0 of the lab")?;
    setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0))
        .context("become root of the lab")?;
    // Refused where only one group is mapped; the user's groups then stay, and weigh as little as outside.
    let _ = setgroups(&[]);
    Ok(())
}

/// Nothing mounted here may travel to the machine, and `/proc` must show the lab's processes.
fn prepare_mounts() -> Result<()> {
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .context("make mounts private")?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), flags, none).context(
        "mount /proc (inside a container this needs an unmasked /proc: with Docker, --security-opt systempaths=unconfined)",
    )?;
    // Shows the lab's interfaces in place of the machine's; some container hosts refuse it, and nothing here needs it.
    let _ = mount(Some("sysfs"), "/sys", Some("sysfs"), flags | MsFlags::MS_RDONLY, none);
    Ok(())
}
