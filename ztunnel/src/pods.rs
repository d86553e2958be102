//! The pods of this node: who they are, and telling the workers.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use agent::certs::CertStore;
use agent::metrics::Metrics;
use agent::readiness::Awaited;
use model::{Identity, Str};
use net::NetNs;
use tokio::sync::{mpsc, oneshot, watch};

use crate::listeners::{MAX_HANDED, share};
use crate::pages::Pages;
use crate::pod::Pod;
use crate::worker::{Added, Command};
use crate::zds::PodEvent;

/// The agent waits for our answer before it lets a pod's containers start.
const SERVE_POD: Duration = Duration::from_secs(10);

/// The pods the node agent has handed over.
#[derive(Debug)]
pub struct Pods {
    trust_domain: Str,
    workers: Vec<mpsc::Sender<Command>>,
    certs: Arc<CertStore>,
    metrics: Metrics,
    known: Mutex<HashMap<Str, Arc<Pod>>>,
    /// Dropped when the agent has named every pod once: until then this proxy is not ready.
    incomplete: Mutex<Option<Awaited>>,
    /// The operators' pages, whose sockets are handed over like those of the pods.
    pages: Arc<Pages>,
}

impl Pods {
    pub fn new(
        trust_domain: Str,
        workers: Vec<mpsc::Sender<Command>>,
        certs: Arc<CertStore>,
        metrics: Metrics,
        incomplete: Awaited,
        pages: Arc<Pages>,
    ) -> Self {
        let incomplete = Mutex::new(Some(incomplete));
        Self { trust_domain, workers, certs, metrics, known: Mutex::default(), incomplete, pages }
    }

    /// Acts on a message of the node agent. Called from the agent's thread; the error goes back to it, or the listeners that
    /// it is to keep for the process after this one.
    pub fn handle(&self, event: PodEvent) -> Added {
        match event {
            PodEvent::Add { uid, info, netns, handed } => {
                let account = if info.service_account.is_empty() {
                    "default"
                } else {
                    &*info.service_account
                };
                let pod = Pod {
                    uid: uid.into(),
                    name: info.name.into(),
                    identity: Identity::new(self.trust_domain.clone(), &*info.namespace, account),
                    namespace: info.namespace.into(),
                    netns: NetNs::from_fd(netns).map_err(|e| e.to_string())?,
                    leaving: watch::Sender::new(false),
                    told: OnceLock::new(),
                };
                self.add(Arc::new(pod), handed)
            }
            PodEvent::Remove { uid } => {
                self.remove(&uid.into());
                Ok(Vec::new())
            }
            PodEvent::Only { uids, handed } => {
                let gone: Vec<Str> =
                    self.lock().keys().filter(|uid| !uids.contains(&***uid)).cloned().collect();
                gone.iter().for_each(|uid| self.remove(uid));
                let listeners = self.pages.take_over(handed);
                self.incomplete.lock().unwrap_or_else(PoisonError::into_inner).take();
                Ok(listeners)
            }
        }
    }

    fn add(&self, pod: Arc<Pod>, handed: Vec<OwnedFd>) -> Added {
        let old = self.lock().get(&pod.uid).cloned();
        let (pod, is_new) = match old {
            // The agent says it again after a reconnect.
            Some(old) if old.netns == pod.netns && old.identity == pod.identity => (old, false),
            Some(_) => {
                self.remove(&pod.uid);
                (pod, true)
            }
            None => (pod, true),
        };
        if is_new {
            self.certs.prefetch(&pod.identity);
            self.lock().insert(pod.uid.clone(), pod.clone());
            self.metrics.proxies().started();
        }
        let listeners = self.serve(&pod, handed).inspect_err(|_| self.remove(&pod.uid))?;
        if is_new {
            tracing::info!(pod = %pod.name, namespace = %pod.namespace, identity = %pod.identity, "pod enrolled");
        }
        // More than fit into a message: the next process opens its own.
        Ok(if listeners.len() <= MAX_HANDED { listeners } else { Vec::new() })
    }

    /// Has every worker serve the pod.
    fn serve(&self, pod: &Arc<Pod>, handed: Vec<OwnedFd>) -> Added {
        let mut answers = Vec::new();
        let shares = share(handed, &pod.netns, self.workers.len());
        for (worker, share) in self.workers.iter().zip(shares) {
            let (done, answer) = oneshot::channel();
            worker
                .blocking_send(Command::Add(pod.clone(), share, done))
                .map_err(|_| "the proxy is going away".to_owned())?;
            answers.push(answer);
        }
        let mut listeners = Vec::new();
        for answer in answers {
            listeners.extend(wait(answer, SERVE_POD)?);
        }
        Ok(listeners)
    }

    fn remove(&self, uid: &Str) {
        let (gone, shared_identity) = {
            let mut known = self.lock();
            let Some(pod) = known.remove(uid) else { return };
            let others = known.values().any(|other| other.identity == pod.identity);
            (pod, others)
        };
        // A worker that did not get as far as serving it must let go, too.
        gone.leaving.send_replace(true);
        for worker in &self.workers {
            // A worker that is gone has nothing to remove.
            let _ = worker.blocking_send(Command::Remove(uid.clone()));
        }
        if !shared_identity {
            self.certs.forget(&gone.identity);
        }
        self.metrics.proxies().stopped();
        tracing::info!(pod = %gone.name, namespace = %gone.namespace, "pod left");
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Str, Arc<Pod>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn wait(answer: oneshot::Receiver<Added>, limit: Duration) -> Added {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .map_err(|e| e.to_string())?;
    runtime.block_on(async {
        match tokio::time::timeout(limit, answer).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err("the proxy is going away".into()),
            Err(_) => Err(format!("no worker took the pod within {} s", limit.as_secs())),
        }
    })
}
