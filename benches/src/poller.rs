//! The readiness of many sockets, level-triggered, and a timer finer than epoll's millisecond.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

/// Events taken from the kernel at once: enough for every connection of the largest closed loop.
const BATCH: usize = 256;

/// An epoll set whose entries are numbered by the caller.
#[derive(Debug)]
pub struct Poller {
    epoll: Epoll,
    events: Vec<EpollEvent>,
}

impl Poller {
    pub fn new() -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        Ok(Self { epoll, events: vec![EpollEvent::empty(); BATCH] })
    }

    /// Wakes when there is something to read, or the peer has closed.
    pub fn reads(&self, fd: impl AsFd, token: u64) -> io::Result<()> {
        Ok(self.epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, token))?)
    }

    /// Wakes when a connect has come to an end.
    pub fn writes(&self, fd: impl AsFd, token: u64) -> io::Result<()> {
        Ok(self.epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLOUT, token))?)
    }

    /// After [`Poller::writes`]: from now on only reads count.
    pub fn now_reads(&self, fd: impl AsFd, token: u64) -> io::Result<()> {
        Ok(self.epoll.modify(fd, &mut EpollEvent::new(EpollFlags::EPOLLIN, token))?)
    }

    /// Sets what counts from now on; neither means that only errors do.
    pub fn watch(&self, fd: impl AsFd, token: u64, reads: bool, writes: bool) -> io::Result<()> {
        let mut flags = EpollFlags::empty();
        flags.set(EpollFlags::EPOLLIN, reads);
        flags.set(EpollFlags::EPOLLOUT, writes);
        Ok(self.epoll.modify(fd, &mut EpollEvent::new(flags, token))?)
    }

    pub fn remove(&self, fd: impl AsFd) -> io::Result<()> {
        Ok(self.epoll.delete(fd)?)
    }

    /// The tokens that are ready, after at most `limit`; no limit waits for as long as it takes.
    pub fn wait(&mut self, limit: Option<Duration>, ready: &mut Vec<u64>) -> io::Result<()> {
        ready.clear();
        let timeout = match limit {
            // A minute at most: who waits longer asks again.
            Some(limit) => u16::try_from(limit.as_millis()).unwrap_or(60_000).into(),
            None => EpollTimeout::NONE,
        };
        match self.epoll.wait(&mut self.events, timeout) {
            Ok(count) => ready.extend(self.events.iter().take(count).map(EpollEvent::data)),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        Ok(())
    }
}

/// A timer that becomes readable at every multiple of a period.
#[derive(Debug)]
pub struct Ticker(TimerFd);

impl Ticker {
    pub fn every(period: Duration) -> io::Result<Self> {
        let timer = TimerFd::new(
            ClockId::CLOCK_MONOTONIC,
            TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC,
        )?;
        timer.set(Expiration::Interval(period.into()), TimerSetTimeFlags::empty())?;
        Ok(Self(timer))
    }

    /// Takes the readiness away until the next multiple.
    pub fn clear(&self) {
        // Nothing to read means that it has not fired: both are fine.
        let _ = self.0.wait();
    }
}

impl AsFd for Ticker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
