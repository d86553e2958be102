//! Processes of the lab: started with chosen files, collected by one reaper.
//!
//! Process 1 of the lab inherits every orphan of it, so children are collected with `waitpid(-1)` and nobody may wait for
//! one child alone.
//!
//! Invariants: a child that ends before anybody asked is not lost: starting and registering happen under the lock that
//! the reaper takes. A process id is only used while its process is not collected.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::fds;

/// Starts and collects processes. Clones share the table.
#[derive(Clone, Debug, Default)]
pub(crate) struct Processes(Arc<Mutex<HashMap<i32, watch::Sender<Option<u8>>>>>);

/// A process of ours.
#[derive(Clone, Debug)]
pub(crate) struct Process {
    pid: i32,
    ended: watch::Receiver<Option<u8>>,
    all: Processes,
}

impl Processes {
    /// Starts a program with the files as 3, 4 and so on.
    pub(crate) fn start(&self, mut command: Command, files: Vec<OwnedFd>) -> Result<Process> {
        fds::pass(&mut command, files);
        let mut table = self.lock();
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {}", command.get_program().display()))?;
        let pid = i32::try_from(child.id())?;
        let (sender, ended) = watch::channel(None);
        table.insert(pid, sender);
        Ok(Process { pid, ended, all: self.clone() })
    }

    /// Collects ended processes for ever. Run it as a task before the first start.
    pub(crate) async fn collect(self) -> io::Result<()> {
        let mut ended = signal(SignalKind::child())?;
        loop {
            self.collect_now();
            if ended.recv().await.is_none() {
                return Ok(());
            }
        }
    }

    fn collect_now(&self) {
        let any: Option<Pid> = None;
        let mut table = self.lock();
        loop {
            let (pid, code) = match waitpid(any, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => {
                    (pid, u8::try_from(code & 0xff).unwrap_or(u8::MAX))
                }
                Ok(WaitStatus::Signaled(pid, signal, _)) => {
                    (pid, u8::try_from(128 + signal as i32).unwrap_or(u8::MAX))
                }
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
                Ok(_) | Err(Errno::EINTR) => continue,
                Err(e) => return tracing::error!("waitpid: {e}"),
            };
            if let Some(sender) = table.remove(&pid.as_raw()) {
                sender.send_replace(Some(code));
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<i32, watch::Sender<Option<u8>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Process {
    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// Sends a signal if the process is still there.
    pub(crate) fn signal(&self, signal: Signal) {
        let table = self.all.lock();
        if table.contains_key(&self.pid) {
            let _ = kill(Pid::from_raw(self.pid), signal);
        }
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended.borrow().is_some()
    }

    /// Waits for its end: exit status, or 128 plus the signal.
    pub(crate) async fn ended(&self) -> u8 {
        let mut ended = self.ended.clone();
        // The sender goes only after it has said the status.
        match ended.wait_for(Option::is_some).await {
            Ok(code) => (*code).unwrap_or(u8::MAX),
            Err(_) => u8::MAX,
        }
    }
}
