//! Starts programs with chosen open files at chosen numbers, and nothing else inherited.
//!
//! Invariants: every file of this process is close-on-exec (std and our own code open them so); what a program gets is
//! exactly stdin, stdout, stderr and the list here. So no key, token or socket of the lab leaks into a child. No signal is
//! blocked in it, whatever the starting thread blocks.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::SigSet;
use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe;

/// Passed files are first copied above this number, so that moving one to its place cannot overwrite another.
const OUT_OF_THE_WAY: RawFd = 64;

/// Gives `command` the files, the first as number 3, the next as 4 and so on. The command keeps them open here until it
/// is dropped.
pub(crate) fn pass(command: &mut Command, fds: Vec<OwnedFd>) {
    let place = move || -> io::Result<()> {
        let mut copies = [-1; 16];
        for (fd, copy) in fds.iter().zip(&mut copies) {
            *copy = check(dup_above(fd.as_raw_fd()))?;
        }
        for (target, copy) in (3..).zip(copies.iter().take(fds.len())) {
            #[expect(unsafe_code, reason = "dup2 onto a number nobody owns in this process")]
            // SAFETY: between fork and exec nothing else uses the target number; the source is open.
            check(unsafe { libc::dup2(*copy, target) })?;
        }
        // Inherited otherwise: a program with SIGTERM blocked never learns that it should end.
        Ok(SigSet::empty().thread_set_mask()?)
    };
    #[expect(unsafe_code, reason = "files are placed between fork and exec")]
    // SAFETY: the closure makes only async-signal-safe system calls and does not allocate.
    unsafe {
        command.pre_exec(place);
    }
}

/// Takes over a file that the parent passed as number `fd`, and keeps it from the children.
///
/// Fails when there is no such file: the program was started by hand.
pub(crate) fn take(fd: RawFd) -> io::Result<OwnedFd> {
    #[expect(unsafe_code, reason = "F_SETFD on a number from the parent")]
    // SAFETY: fcntl on a number is harmless; an unused one gives EBADF.
    check(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    #[expect(unsafe_code, reason = "the parent passed this file for us to own")]
    // SAFETY: the file is open (just checked) and each number is taken once, at the start of a program.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Closes everything from `first` on.
pub(crate) fn close_from(first: u32) -> io::Result<()> {
    #[expect(unsafe_code, reason = "close_range has no safe wrapper")]
    // SAFETY: called just before exec or in a process that owns no other file any more.
    check(unsafe { libc::close_range(first, u32::MAX, 0) }).map(|_| ())
}

/// Lets reads and writes return at once when they would have to wait.
pub(crate) fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    let flags = OFlag::from_bits_truncate(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Lets the runtime wait for a file. It must not block.
pub(crate) fn watched(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    #[expect(unsafe_code, reason = "AsyncFd wants a promise about the file's lifetime")]
    // SAFETY: an OwnedFd names one open file from here until AsyncFd drops it.
    Ok(unsafe { AsyncFd::register(fd) }?)
}

/// A pipe to read from in a task; the other end is for a child and blocks.
pub(crate) fn pipe() -> io::Result<(pipe::Receiver, OwnedFd)> {
    let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    set_nonblocking(&read)?;
    Ok((pipe::Receiver::from_owned_fd(read)?, write))
}

fn dup_above(fd: RawFd) -> libc::c_int {
    #[expect(unsafe_code, reason = "async-signal-safe duplicate")]
    // SAFETY: fcntl does not touch memory of ours.
    unsafe {
        libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, OUT_OF_THE_WAY)
    }
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
