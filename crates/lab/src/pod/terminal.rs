//! A terminal for `exec`: a pseudo terminal of the container, joined to the caller's.
//!
//! The caller has put its own terminal into raw mode; every key goes through, and the pseudo terminal gives keys like Ctrl-C
//! their meaning for the programs inside.
//!
//! Invariants: the copying ends when the command's side is closed by all its processes; nothing is read ahead that the
//! caller could miss.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::Mode;
use nix::unistd::{read, write};

/// How often the size of the caller's window is looked at: the signal about it does not come here.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// More than one screen.
const CHUNK: usize = 16 * 1024;

/// Both ends of a pseudo terminal.
#[derive(Debug)]
pub(crate) struct Terminal {
    master: OwnedFd,
    pub(crate) slave: OwnedFd,
}

impl Terminal {
    /// Makes one in the `/dev` that this process sees, as large as the caller's window.
    pub(crate) fn create() -> io::Result<Self> {
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        let master = open("/dev/ptmx", flags, Mode::empty())?;
        let unlocked: libc::c_int = 0;
        #[expect(unsafe_code, reason = "no safe wrapper for these ioctls")]
        // SAFETY: the first reads an int that lives through the call; the second takes flags and returns a new file.
        let slave = unsafe {
            check(libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlocked))?;
            let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
            OwnedFd::from_raw_fd(check(libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags))?)
        };
        copy_size(&master);
        Ok(Self { master, slave })
    }

    /// Copies between the caller's terminal (stdin, stdout) and this one until the command's processes have let go of it.
    pub(crate) fn join(self) {
        drop(self.slave);
        let (stdin, stdout) = (io::stdin(), io::stdout());
        let mut buffer = vec![0; CHUNK];
        let mut typing = true;
        loop {
            let wait = PollTimeout::try_from(LOOK_EVERY).unwrap_or(PollTimeout::NONE);
            let mut files = vec![PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
            if typing {
                files.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
            }
            match poll(&mut files, wait) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(_) => return,
            }
            let is_ready = |f: &PollFd<'_>| f.revents().is_some_and(|r| !r.is_empty());
            let (output, input) = (is_ready(&files[0]), files.get(1).is_some_and(is_ready));
            copy_size(&self.master);
            if output && !copy(self.master.as_fd(), stdout.as_fd(), &mut buffer) {
                return;
            }
            if input {
                typing = copy(stdin.as_fd(), self.master.as_fd(), &mut buffer);
            }
        }
    }
}

/// Makes the terminal the controlling one of this session, and its stdin, stdout and stderr.
pub(crate) fn adopt(terminal: BorrowedFd<'_>) -> io::Result<()> {
    #[expect(unsafe_code, reason = "no safe wrapper for this ioctl")]
    // SAFETY: takes a number.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) })?;
    nix::unistd::dup2_stdin(terminal)?;
    nix::unistd::dup2_stdout(terminal)?;
    nix::unistd::dup2_stderr(terminal)?;
    Ok(())
}

/// Copies what is there. False: the end.
fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>, buffer: &mut [u8]) -> bool {
    let mut rest = match read(from, buffer) {
        // A pseudo terminal whose other side is closed gives EIO.
        Ok(0) | Err(Errno::EIO) => return false,
        Ok(n) => &buffer[..n],
        Err(e) => return e == Errno::EINTR || e == Errno::EAGAIN,
    };
    while !rest.is_empty() {
        match write(to, rest) {
            Ok(n) => rest = &rest[n..],
            Err(Errno::EINTR) => {}
            Err(_) => return false,
        }
    }
    true
}

/// Gives the pseudo terminal the size of the caller's window, if it has one.
fn copy_size(master: &OwnedFd) {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    #[expect(unsafe_code, reason = "no safe wrapper for these ioctls")]
    // SAFETY: the kernel fills and reads a struct that lives through both calls. Setting the same size does nothing.
    unsafe {
        if libc::ioctl(0, libc::TIOCGWINSZ, &raw mut size) == 0 {
            libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size);
        }
    }
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
