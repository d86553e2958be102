//! The namespaces a pod's containers share beside the network: host name and System V IPC.

use std::fs::File;
use std::os::fd::OwnedFd;

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, unshare};

/// Kept open as long as the pod lives. They belong to the lab's user namespace: a container cannot rename its host.
#[derive(Debug)]
pub(crate) struct Spaces {
    pub(crate) uts: OwnedFd,
    pub(crate) ipc: OwnedFd,
}

impl Spaces {
    pub(crate) fn create(hostname: &str) -> Result<Self> {
        let hostname = hostname.to_owned();
        let thread = std::thread::Builder::new().name("pod-spaces".into()).spawn(
            move || -> Result<Self> {
                unshare(CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC)
                    .context("make UTS and IPC namespaces")?;
                nix::unistd::sethostname(&hostname)
                    .with_context(|| format!("host name {hostname:?}"))?;
                let open = |kind: &str| {
                    File::open(format!("/proc/thread-self/ns/{kind}")).map(OwnedFd::from)
                };
                Ok(Self { uts: open("uts")?, ipc: open("ipc")? })
            },
        )?;
        thread.join().map_err(|_| anyhow!("the thread that makes a pod's namespaces died"))?
    }

    pub(crate) fn try_clone(&self) -> Result<[OwnedFd; 2]> {
        Ok([self.uts.try_clone()?, self.ipc.try_clone()?])
    }
}
