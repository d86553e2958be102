//! Network namespaces as values: [`NetNs`] is a handle, [`NetNs::run`] works inside one.
//!
//! Purpose: sockets belong for ever to the namespace they were made in, so a proxy only has to *create* them inside a
//! pod; everything after that happens wherever its thread is.
//!
//! Invariants:
//! - [`NetNs::run`] returns with the thread in the namespace it was in before. If the kernel refuses the way back, the
//!   process aborts: a proxy thread that is lost in some pod's namespace would connect to the wrong world.
//! - Each thread remembers where it is, so `run` costs no system call when it is there already, and two `setns` when not.
//!   This holds as long as nobody else in the process changes a thread's network namespace: do it through this module.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use nix::sched::{CloneFlags, setns, unshare};

/// A network namespace, kept alive by an open file. Clones share the file.
#[derive(Clone, Debug)]
pub struct NetNs(Arc<Inner>);

/// What tells two namespaces apart while both are open: the file's device and inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NsId {
    /// Device of the kernel's namespace file system.
    pub dev: u64,
    /// Inode: what `readlink /proc/PID/ns/net` prints.
    pub inode: u64,
}

#[derive(Debug)]
struct Inner {
    fd: OwnedFd,
    id: NsId,
}

thread_local! {
    /// The namespace this thread is in, once it was asked for.
    static CURRENT: RefCell<Option<NetNs>> = const { RefCell::new(None) };
}

impl NetNs {
    /// The namespace of the calling thread.
    pub fn current() -> io::Result<Self> {
        if let Some(known) = CURRENT.with_borrow(Clone::clone) {
            return Ok(known);
        }
        let ns = Self::open("/proc/thread-self/ns/net")?;
        CURRENT.set(Some(ns.clone()));
        Ok(ns)
    }

    /// Takes over an open namespace file, for example one received over a socket.
    ///
    /// Fails when the file is not a network namespace.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        check_is_netns(fd.as_fd())?;
        let stat = nix::sys::stat::fstat(fd.as_fd())?;
        let id = NsId { dev: stat.st_dev, inode: stat.st_ino };
        Ok(Self(Arc::new(Inner { fd, id })))
    }

    /// Opens a namespace by path: `/proc/PID/ns/net` or a bind mount of it.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        let path = path.as_ref();
        let named = |e: io::Error| {
            io::Error::new(e.kind(), format!("network namespace {}: {e}", path.display()))
        };
        Self::from_fd(File::open(path).map_err(named)?.into()).map_err(named)
    }

    /// Makes a fresh namespace, empty but for a loopback interface that is down. The caller stays where it is.
    ///
    /// It lives as long as this handle or its clones, a socket or a process in it. Needs `CAP_SYS_ADMIN` in the
    /// caller's user namespace, which then owns the new namespace.
    pub fn create() -> io::Result<Self> {
        let made = std::thread::Builder::new().name("netns-create".into()).spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).map_err(|e| {
                io::Error::new(
                    io::Error::from(e).kind(),
                    format!("cannot create a network namespace: {e} (CAP_SYS_ADMIN needed)"),
                )
            })?;
            Self::open("/proc/thread-self/ns/net")
        })?;
        made.join().map_err(|_| io::Error::other("the thread that creates a namespace died"))?
    }

    /// What tells this namespace from others.
    pub fn id(&self) -> NsId {
        self.0.id
    }

    /// Runs `f` on this thread inside the namespace, then goes back.
    ///
    /// `f` must not start threads that should live in the caller's namespace: a thread starts where its parent is.
    pub fn run<T>(&self, f: impl FnOnce() -> T) -> io::Result<T> {
        let home = Self::current()?;
        if home.id() == self.id() {
            return Ok(f());
        }
        self.switch()?;
        let _back = WayBack(home);
        Ok(f())
    }

    /// Moves the calling thread into the namespace for good.
    pub fn enter(&self) -> io::Result<()> {
        if Self::current()?.id() != self.id() {
            self.switch()?;
        }
        Ok(())
    }

    fn switch(&self) -> io::Result<()> {
        setns(self.as_fd(), CloneFlags::CLONE_NEWNET).map_err(|e| {
            io::Error::new(
                io::Error::from(e).kind(),
                format!("cannot enter network namespace {}: {e}", self.id().inode),
            )
        })?;
        CURRENT.set(Some(self.clone()));
        Ok(())
    }
}

impl AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
}

impl PartialEq for NetNs {
    fn eq(&self, other: &Self) -> bool {
        self.id() == other.id()
    }
}

impl Eq for NetNs {}

/// Brings the thread home when dropped, also when the work inside panicked.
struct WayBack(NetNs);

impl Drop for WayBack {
    fn drop(&mut self) {
        if let Err(e) = self.0.switch() {
            tracing::error!("{e}; the thread is lost in another network namespace: abort");
            std::process::abort();
        }
    }
}

/// `ioctl(NS_GET_NSTYPE)` says what kind of namespace a file is; other files refuse it.
fn check_is_netns(fd: BorrowedFd<'_>) -> io::Result<()> {
    /// `_IO(0xb7, 3)`.
    const NS_GET_NSTYPE: libc::Ioctl = 0xb703;
    #[expect(unsafe_code, reason = "no safe wrapper for this ioctl")]
    // SAFETY: the ioctl takes no argument and only reads the open file.
    let kind = unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE) };
    if kind == libc::CLONE_NEWNET {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, "the file is not a network namespace"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::in_user_ns;

    #[test]
    fn run_goes_there_and_back() {
        in_user_ns(|| {
            let home = NetNs::current().unwrap();
            let other = NetNs::create().unwrap();
            assert_ne!(home, other);
            let (inside, nested) = other
                .run(|| {
                    let inside = NetNs::open("/proc/thread-self/ns/net").unwrap();
                    (inside, home.run(|| NetNs::open("/proc/thread-self/ns/net").unwrap()).unwrap())
                })
                .unwrap();
            assert_eq!(inside, other);
            assert_eq!(nested, home);
            assert_eq!(NetNs::open("/proc/thread-self/ns/net").unwrap(), home);
            assert_eq!(NetNs::current().unwrap(), home);
        });
    }

    #[test]
    fn a_panic_inside_still_comes_home() {
        in_user_ns(|| {
            let home = NetNs::current().unwrap();
            let other = NetNs::create().unwrap();
            let inside = std::panic::AssertUnwindSafe(|| other.run(|| panic!("expected")));
            assert!(std::panic::catch_unwind(inside).is_err());
            assert_eq!(NetNs::open("/proc/thread-self/ns/net").unwrap(), home);
        });
    }

    #[test]
    fn other_files_are_refused() {
        for path in ["/dev/null", "/proc/self/ns/pid", "/does/not/exist"] {
            let e = NetNs::open(path).unwrap_err().to_string();
            assert!(e.contains(path), "{e}");
        }
    }
}
