//! The operators' pages: readiness, metrics, admin. Bound at the start, or taken over from the process before.
//!
//! Where another process of this node still answers on a page's address, its listener comes with the node agent's word
//! that all pods are named; an agent that keeps no listeners leaves us to wait until the address is free.
//!
//! Invariants: an address that is taken stops neither the start nor the pods' traffic; the admin page is only ever served
//! on loopback.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agent::admin::{self, AdminState, Page};
use net::NetNs;
use net::handed::Handed;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::task::AbortHandle;

use crate::config::Config;

/// How often an address that is taken is tried again.
const TRY_AGAIN: Duration = Duration::from_millis(100);

/// See the module.
pub struct Pages {
    runtime: Handle,
    state: Arc<AdminState>,
    slots: Mutex<Vec<Slot>>,
}

struct Slot {
    page: Page,
    address: SocketAddr,
    served: Option<Served>,
}

struct Served {
    /// For the agent.
    copy: OwnedFd,
    task: AbortHandle,
}

impl std::fmt::Debug for Pages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pages").finish_non_exhaustive()
    }
}

impl Pages {
    /// Binds what is free.
    ///
    /// # Errors
    /// When an address is not ours, or the admin page's is not loopback.
    pub async fn start(state: AdminState, config: &Config) -> io::Result<Arc<Self>> {
        let addresses = [
            (Page::Readiness, config.readiness_address),
            (Page::Metrics, config.stats_address),
            (Page::Admin, config.admin_address),
        ];
        let slots = addresses.map(|(page, address)| Slot { page, address, served: None }).into();
        let pages =
            Self { runtime: Handle::current(), state: Arc::new(state), slots: Mutex::new(slots) };
        for (page, address) in addresses {
            match admin::bind(page, address).await {
                Ok(listener) => pages.serve(page, listener)?,
                Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
                    tracing::info!("{e}; waiting for the process before this one to hand it over");
                }
                Err(e) => return Err(e),
            }
        }
        Ok(Arc::new(pages))
    }

    /// Serves what the process before had. Returns copies of all listeners, for the process after.
    pub fn take_over(self: &Arc<Self>, handed: Vec<OwnedFd>) -> Vec<OwnedFd> {
        for fd in handed {
            if let Err(error) = self.take(fd) {
                tracing::warn!(%error, "a page's listener of the process before is not taken over");
            }
        }
        for (page, address) in self.missing() {
            self.runtime.spawn(self.clone().wait_until_free(page, address));
        }
        let slots = self.lock();
        let copies = slots.iter().filter_map(|slot| slot.served.as_ref()?.copy.try_clone().ok());
        copies.collect()
    }

    /// Stops answering: the process after this one does.
    pub fn close(&self) {
        for slot in self.lock().drain(..) {
            if let Some(served) = slot.served {
                served.task.abort();
            }
        }
    }

    fn take(&self, fd: OwnedFd) -> io::Result<()> {
        let handed = Handed::check(fd, &NetNs::current()?)?;
        // By port: on a machine without IPv6 a page listens on another address than it was told.
        let page = self.missing().into_iter().find(|(_, wanted)| wanted.port() == handed.at.port());
        let Some((page, _)) = page.filter(|_| !handed.udp) else { return Ok(()) };
        if page == Page::Admin && !handed.at.ip().is_loopback() {
            return Err(io::Error::other(format!("{} is not loopback", handed.at)));
        }
        let _on = self.runtime.enter();
        self.serve(page, TcpListener::from_std(handed.fd.into())?)
    }

    fn serve(&self, page: Page, listener: TcpListener) -> io::Result<()> {
        let copy = listener.as_fd().try_clone_to_owned()?;
        let state = self.state.clone();
        let serving = async move { admin::serve(listener, page, state).await };
        let task = self.runtime.spawn(serving).abort_handle();
        match self.lock().iter_mut().find(|slot| slot.page == page) {
            Some(slot) => slot.served = Some(Served { copy, task }),
            // Closed meanwhile.
            None => task.abort(),
        }
        Ok(())
    }

    async fn wait_until_free(self: Arc<Self>, page: Page, address: SocketAddr) {
        tracing::warn!(%address, "another process answers there; trying until it ends");
        while self.missing().iter().any(|(missing, _)| *missing == page) {
            if let Ok(listener) = admin::bind(page, address).await {
                if let Err(error) = self.serve(page, listener) {
                    tracing::error!(%address, %error, "cannot serve");
                }
                return;
            }
            tokio::time::sleep(TRY_AGAIN).await;
        }
    }

    fn missing(&self) -> Vec<(Page, SocketAddr)> {
        let slots = self.lock();
        let missing = slots.iter().filter(|slot| slot.served.is_none());
        missing.map(|slot| (slot.page, slot.address)).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
