//! The process that starts one container and waits for it, and the container's own process 1.
//!
//! ```text
//! lab --start--> helper (lab's user namespace; the pod's net, UTS and IPC namespaces)
//!                  └─ fork, new PID namespace: process 1: builds the root filesystem as the lab's root, then makes the
//!                       pod's user namespace, so that everything mounted so far is locked; drops what it may
//!                       └─ fork: the program
//! ```
//!
//! Invariants:
//! - The pod's network namespace belongs to the lab's user namespace and the program runs in a nested one: whatever
//!   capabilities it has count for nothing against nftables, marks, routes or namespaces of the mesh.
//! - No file of the lab is open in the program. Process 1 is not dumpable: its `/proc/1/exe` and memory are closed to it.
//! - The helper's end ends the container: by the kernel, whatever kills it.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

use super::run::{ContainerRun, HelperSays, START_FAILED};
use super::{program, rootfs};
use crate::{fds, ids};

/// What the lab sends to end the container without asking it.
pub(crate) const KILL_NOW: Signal = Signal::SIGUSR1;

/// What containers may keep, as in Kubernetes. None of it counts outside the pod's own user namespace.
const KEPT_CAPABILITIES: [libc::c_int; 14] = [
    0,  // chown
    1,  // dac_override
    3,  // fowner
    4,  // fsetid
    5,  // kill
    6,  // setgid
    7,  // setuid
    8,  // setpcap
    10, // net_bind_service
    13, // net_raw
    18, // sys_chroot
    27, // mknod
    29, // audit_write
    31, // setfcap
];
/// Higher than any capability a kernel knows; those it does not know are refused and ignored.
const MOST_CAPABILITIES: libc::c_int = 63;

/// The hidden subcommand: files 3 to 7 are the description, the status pipe, and the pod's net, UTS and IPC namespaces.
pub(crate) fn run() -> Result<ExitCode> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    let mut text = vec![];
    fs::File::from(fds::take(3).context("this command is started by the lab only")?)
        .read_to_end(&mut text)?;
    let mut status = fs::File::from(fds::take(4)?);
    let container: ContainerRun =
        serde_json::from_slice(&text).context("description of the container")?;
    let namespaces = [
        (fds::take(5)?, CloneFlags::CLONE_NEWNET),
        (fds::take(6)?, CloneFlags::CLONE_NEWUTS),
        (fds::take(7)?, CloneFlags::CLONE_NEWIPC),
    ];
    let mut say = |what: HelperSays| -> Result<()> {
        let mut line = serde_json::to_vec(&what)?;
        line.push(b'\n');
        Ok(status.write_all(&line)?)
    };
    match start(&container, namespaces) {
        Ok(first) => {
            say(HelperSays::Started(first.as_raw()))?;
            drop(status);
            Ok(ExitCode::from(wait_for(first, forward_as_lab)?))
        }
        Err(e) => {
            say(HelperSays::Failed(format!("{e:#}")))?;
            Ok(ExitCode::from(START_FAILED))
        }
    }
}

fn start(container: &ContainerRun, namespaces: [(OwnedFd, CloneFlags); 3]) -> Result<Pid> {
    for (ns, kind) in namespaces {
        setns(ns, kind).with_context(|| format!("enter the pod's namespace {kind:?}"))?;
    }
    awaited().thread_block()?;
    unshare(CloneFlags::CLONE_NEWPID).context("make a process namespace")?;
    let (mut ours, theirs) = UnixStream::pair()?;
    #[expect(
        unsafe_code,
        reason = "the first process of the new process namespace must be a child"
    )]
    // SAFETY: this process has one thread, so the child may go on as if it were a fresh program.
    let first = match unsafe { fork() }.context("fork")? {
        ForkResult::Child => {
            drop(ours);
            container_main(container, theirs)
        }
        ForkResult::Parent { child } => child,
    };
    drop(theirs);
    let mut said = [0];
    let mut text = vec![];
    if ours.read_exact(&mut said).is_ok() && said == [crate::stage::UNSHARED] {
        write_maps(first, container)?;
        ours.write_all(&[crate::stage::GO])?;
        ours.read_to_end(&mut text)?;
        if text.is_empty() {
            return Ok(first);
        }
    } else {
        text.extend(said);
        ours.read_to_end(&mut text)?;
    }
    let _ = waitpid(first, None);
    bail!("{}", String::from_utf8_lossy(&text).trim_matches('\0'))
}

fn write_maps(first: Pid, container: &ContainerRun) -> Result<()> {
    let write = |file: &str, map: &[ids::IdRange]| {
        fs::write(format!("/proc/{first}/{file}"), ids::render_map(map))
            .with_context(|| format!("write {file} {map:?}"))
    };
    write("gid_map", &container.gid_map)?;
    write("uid_map", &container.uid_map)
}

/// Process 1 of the container. Whatever goes wrong before the program runs is said on `sync`.
fn container_main(container: &ContainerRun, mut sync: UnixStream) -> ! {
    let code = match isolate(container, &mut sync)
        .and_then(|()| program::start(&container.process, &mut sync, None))
    {
        Ok(program) => {
            drop(sync);
            let _ = fds::close_from(3);
            wait_for(program, forward_as_init(program)).unwrap_or(START_FAILED)
        }
        Err(e) => {
            let _ = write!(sync, "{e:#}");
            START_FAILED
        }
    };
    std::process::exit(code.into())
}

fn isolate(container: &ContainerRun, sync: &mut UnixStream) -> Result<()> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    leave_keyring();
    unshare(CloneFlags::CLONE_NEWNS).context("make a mount namespace")?;
    let owner = |map, id| ids::outside_of(map, id).unwrap_or(0);
    let owners = rootfs::Owners {
        uid: owner(&container.uid_map, container.process.uid),
        gid: owner(&container.gid_map, container.process.gid),
    };
    rootfs::build(&container.root, &container.process, owners)?;
    // After this, what is mounted is locked: the container can neither unmount nor remount any of it.
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS)
        .context("make the pod's user namespace")?;
    sync.write_all(&[crate::stage::UNSHARED])?;
    let mut answer = [0];
    sync.read_exact(&mut answer)?;
    ensure!(answer == [crate::stage::GO], "the helper gave up");
    drop_privileges()
}

/// The kernel keeps keys for a login session; a container must not find those of the user who started the lab.
fn leave_keyring() {
    const JOIN_SESSION_KEYRING: libc::c_long = 1;
    #[expect(unsafe_code, reason = "keyctl has no wrapper")]
    // SAFETY: takes a number and a null pointer: a new, nameless keyring.
    unsafe {
        // Fails where the kernel has no keyrings.
        libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, std::ptr::null::<libc::c_char>());
    }
}

/// For this process and all that follow from it.
pub(crate) fn drop_privileges() -> Result<()> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    prctl::set_dumpable(false)?;
    prctl::set_no_new_privs()?;
    for capability in (0..=MOST_CAPABILITIES).filter(|c| !KEPT_CAPABILITIES.contains(c)) {
        #[expect(unsafe_code, reason = "PR_CAPBSET_DROP has no safe wrapper")]
        // SAFETY: takes numbers only.
        let dropped = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        if dropped != 0 && Errno::last() != Errno::EINVAL {
            bail!("drop capability {capability}: {}", Errno::last());
        }
    }
    Ok(())
}

fn awaited() -> SigSet {
    let mut set = SigSet::empty();
    for s in [
        Signal::SIGCHLD,
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
        Signal::SIGQUIT,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
        Signal::SIGWINCH,
    ] {
        set.add(s);
    }
    set
}

/// Collects children until `main` has ended; its exit status, or 128 plus the signal that ended it.
fn wait_for(main: Pid, mut on_signal: impl FnMut(Pid, Signal)) -> Result<u8> {
    let signals = awaited();
    loop {
        match signals.wait().context("wait for signals")? {
            Signal::SIGCHLD => {
                if let Some(code) = reap(main)? {
                    return Ok(code);
                }
            }
            other => on_signal(main, other),
        }
    }
}

fn reap(main: Pid) -> Result<Option<u8>> {
    let any: Option<Pid> = None;
    loop {
        let code = |n: i32| u8::try_from(n & 0xff).unwrap_or(u8::MAX);
        match waitpid(any, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, status)) if pid == main => return Ok(Some(code(status))),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == main => {
                return Ok(Some(code(128 + signal as i32)));
            }
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(None),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(anyhow!("waitpid: {e}")),
        }
    }
}

/// The helper passes signals on to process 1 of the container, and kills it when the lab says so.
fn forward_as_lab(first: Pid, signal: Signal) {
    let _ = kill(first, if signal == KILL_NOW { Signal::SIGKILL } else { signal });
}

/// Process 1 passes them on to the program: as process 1 itself, most programs would ignore them.
fn forward_as_init(program: Pid) -> impl FnMut(Pid, Signal) {
    move |_, signal| {
        let _ = kill(program, signal);
    }
}
