//! A pod's way into the mesh and out of it.
//!
//! A pod that starts is captured before its containers run. A pod that runs already is moved under its connections: what
//! is open stays as it is, and what opens later goes the new way (`net::capture::handover`). The order of the steps is
//! such that no new connection meets a door that is closed:
//! - *in*: ztunnel listens; the peers are told; a moment later capture is switched on;
//! - *out*: capture is switched off; the peers are told; a moment later ztunnel stops listening.
//!
//! While a pod is captured somebody may change the rules by hand. That is noticed within [`LOOK`], repaired and said.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use compile::local::PodPlan;
use net::NetNs;
use net::capture::{self, Dns, handover};
use tokio::sync::mpsc;

use super::pods::{Capture, service_account, uid};
use super::{Input, World};
use crate::launch::Event;
use crate::reconcile::Key;
use crate::zds::Captured;

/// From telling the peers to relying on it: a change reaches every proxy within some 100 ms.
const PEERS_KNOW: Duration = Duration::from_millis(500);
/// Between two looks at a captured pod's rules; repair is promised within two seconds.
const LOOK: Duration = Duration::from_secs(1);
/// Longest pause between two looks at what is left of a switch: listing a pod's connections costs a millisecond.
const SETTLE_MAX: Duration = Duration::from_secs(30);

/// Watches over a pod's capture until dropped.
#[derive(Debug)]
pub(super) struct Keeper(tokio::task::AbortHandle);

impl Drop for Keeper {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// One at a time works on the rules of a namespace. Held for milliseconds, never over an await.
#[derive(Clone, Debug, Default)]
pub(super) struct Gate(Arc<Mutex<()>>);

impl Gate {
    fn lock(&self) -> MutexGuard<'_, ()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the pod wants its DNS questions captured.
pub(super) fn dns_of(plan: &PodPlan) -> Dns {
    if compile::captures_dns(&plan.pod) { Dns::Captured } else { Dns::Left }
}

impl World {
    /// Brings a pod into the mesh. `runs`: its containers run already.
    pub(super) fn enter_mesh(&mut self, key: &Key, runs: bool) {
        let (Some(mesh), Some(pod)) = (&self.mesh, self.pods.get_mut(key)) else { return };
        let Some(agent) = mesh.agents.get(pod.plan.node_index).cloned() else { return };
        pod.capture = Capture::Entering;
        pod.keeper = None;
        let captured = Captured {
            uid: uid(key, pod.instance),
            namespace: key.0.clone(),
            name: key.1.clone(),
            service_account: service_account(&pod.plan),
            ns: pod.ns.clone(),
        };
        let (inputs, key, instance, ns, gate) =
            (self.inputs.clone(), key.clone(), pod.instance, pod.ns.clone(), pod.gate.clone());
        let dns = dns_of(&pod.plan);
        tokio::spawn(async move {
            let mut result = agent.add(captured).await;
            if result.is_ok() && runs {
                let _ = inputs.send(Input::Announced { key: key.clone(), instance }).await;
                tokio::time::sleep(PEERS_KNOW).await;
            }
            if result.is_ok() {
                // Listeners stand: from here on every new connection goes to them.
                result = switch_on(&ns, &gate, dns, runs).map_err(|e| e.to_string());
            }
            let _ = inputs.send(Input::Captured { key, instance, result }).await;
        });
    }

    /// ztunnel serves the pod: its peers may call it through the mesh.
    pub(super) fn pod_announced(&mut self, key: &Key, instance: u64) -> bool {
        let Some(pod) = self.pods.get_mut(key).filter(|p| p.instance == instance) else {
            return false;
        };
        if pod.capture == Capture::Entering {
            pod.capture = Capture::Announced;
        }
        true
    }

    pub(super) fn pod_captured(
        &mut self,
        key: &Key,
        instance: u64,
        result: Result<(), String>,
    ) -> bool {
        let Some(pod) = self.pods.get_mut(key).filter(|p| p.instance == instance) else {
            return false;
        };
        match result {
            Ok(()) => {
                pod.capture = Capture::In;
                if let Some(pod) = self.pods.get(key) {
                    self.let_start(pod);
                }
                self.keep(key);
            }
            Err(why) => {
                pod.capture = Capture::Failed(why.clone());
                self.say(Event::Warning(format!(
                    "pod {}/{} is not in the mesh, ztunnel refused it: {why}",
                    key.0, key.1
                )));
            }
        }
        true
    }

    /// What a pod wants to be captured has changed: other rules for the next question or connection.
    pub(super) fn recapture(&mut self, key: &Key) {
        let Some(pod) = self.pods.get_mut(key) else { return };
        pod.keeper = None;
        let changed = {
            let _one = pod.gate.lock();
            capture::install(&pod.ns, dns_of(&pod.plan))
        };
        if let Err(e) = changed {
            self.trouble(format!("pod {}/{}: {e}", key.0, key.1));
        }
        self.keep(key);
    }

    pub(super) fn leave_mesh(&mut self, key: &Key) {
        let (Some(mesh), Some(pod)) = (&self.mesh, self.pods.get_mut(key)) else { return };
        let Some(agent) = mesh.agents.get(pod.plan.node_index).cloned() else { return };
        pod.capture = Capture::Leaving;
        pod.keeper = None;
        let left = {
            let _one = pod.gate.lock();
            handover::leave(&pod.ns)
        };
        let (inputs, key, instance) = (self.inputs.clone(), key.clone(), pod.instance);
        if let Err(e) = left {
            self.say(Event::Warning(format!("pod {}/{}: {e}", key.0, key.1)));
        }
        let name = uid(&key, instance);
        self.write_pod(&key);
        tokio::spawn(async move {
            tokio::time::sleep(PEERS_KNOW).await;
            agent.remove(&name).await;
            let _ = inputs.send(Input::Released { key, instance }).await;
        });
    }

    /// Starts to watch over what the last switch left in the pod's namespace.
    pub(super) fn keep(&mut self, key: &Key) {
        let Some(pod) = self.pods.get_mut(key) else { return };
        let watch = Watch {
            name: format!("{}/{}", key.0, key.1),
            ns: pod.ns.clone(),
            gate: pod.gate.clone(),
            wanted: (pod.capture == Capture::In).then(|| dns_of(&pod.plan)),
            events: self.events.clone(),
        };
        pod.keeper = Some(Keeper(tokio::spawn(watch.run()).abort_handle()));
    }
}

fn switch_on(ns: &NetNs, gate: &Gate, dns: Dns, runs: bool) -> Result<(), capture::CaptureError> {
    let _one = gate.lock();
    if runs { handover::enrol(ns, dns).map(drop) } else { capture::install(ns, dns) }
}

struct Watch {
    name: String,
    ns: NetNs,
    gate: Gate,
    /// How the pod is to be captured; none after it has left.
    wanted: Option<Dns>,
    events: mpsc::Sender<Event>,
}

impl Watch {
    /// Repairs what should be there, and takes away what a switch no longer needs. Ends when there is nothing more to do.
    async fn run(self) {
        let mut settle_in = LOOK;
        let mut waited = Duration::ZERO;
        let mut settled = false;
        loop {
            tokio::time::sleep(LOOK).await;
            if let Some(dns) = self.wanted
                && let Some(words) = self.repair(dns)
            {
                let _ = self.events.send(Event::Warning(words)).await;
            }
            waited += LOOK;
            if !settled && waited >= settle_in {
                waited = Duration::ZERO;
                settle_in = SETTLE_MAX.min(settle_in * 2);
                // An error is one of the namespace: the pod is going.
                settled = self.settle().unwrap_or(0) == 0;
            }
            if settled && self.wanted.is_none() {
                return;
            }
        }
    }

    /// Puts capture back if it is not whole. Connections that opened meanwhile did so outside the mesh: they end.
    fn repair(&self, dns: Dns) -> Option<String> {
        let _one = self.gate.lock();
        match capture::is_installed(&self.ns, dns) {
            Ok(true) => None,
            Ok(false) => Some(match capture::install(&self.ns, dns) {
                Ok(()) => format!("pod {}: somebody changed its capture; put back", self.name),
                Err(e) => format!("pod {}: its capture is damaged: {e}", self.name),
            }),
            Err(e) => Some(format!("pod {}: its capture cannot be checked: {e}", self.name)),
        }
    }

    fn settle(&self) -> Result<usize, capture::CaptureError> {
        let _one = self.gate.lock();
        handover::settle(&self.ns)
    }
}
