//! The pods of the lab: made, enrolled, watched, taken away.

use std::time::Duration;

use compile::local::PodPlan;
use net::NetNs;
use tokio::sync::mpsc;

use super::enrol::{Gate, Keeper, dns_of};
use super::{Input, World};
use crate::launch::Event;
use crate::logs;
use crate::network::PodNet;
use crate::place::Place;
use crate::pod::lifecycle::{Millis, Phase};
use crate::pod::resolve::{self, FileContent, Surroundings};
use crate::pod::volumes::Credentials;
use crate::pod::worker::{Ask, Report, Worker};
use crate::reconcile::{self, Key, Present, Wanted};
use crate::registry::{PodNames, PodToken};

/// Asks that wait for a worker, which takes them at once.
const QUEUE: usize = 16;
/// Clients of `exec` may keep a worker waiting; the lab itself never waits this way.
const NO_LIMIT: Millis = Millis::MAX;
/// How much of a failed container's output is shown: a line of a terminal.
const LAST_WORDS: u64 = 200;
/// How long a pod's network outlives its containers, so that its proxy can tell its peers (GOAWAY): otherwise they send
/// into tunnels that nobody answers until the endpoint is gone from their configuration.
const GOODBYE: Duration = Duration::from_millis(50);
/// istiod-lite makes the root as it starts, within some 100 ms.
const LOOK_FOR_ROOT: Duration = Duration::from_millis(50);
/// A proxy that does not answer keeps nobody waiting longer.
const PROXY_ANSWERS: Duration = Duration::from_secs(1);

/// A pod that is there.
pub(super) struct Pod {
    pub(super) plan: PodPlan,
    pub(super) instance: u64,
    pub(super) ns: NetNs,
    /// None: in the node's network.
    net: Option<PodNet>,
    pub(super) asks: mpsc::Sender<Ask>,
    pub(super) last: Option<Report>,
    pub(super) ending: bool,
    pub(super) capture: Capture,
    pub(super) gate: Gate,
    pub(super) keeper: Option<Keeper>,
    /// When it was told to end, for the object's deletionTimestamp.
    pub(super) ended_at: Option<std::time::SystemTime>,
    /// One of its volumes has the root of the mesh in it.
    needs_root: bool,
    /// Ends with the pod.
    _token: Option<PodToken>,
}

/// Where a pod is on its way into the mesh and out of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Capture {
    Out,
    Entering,
    /// ztunnel serves it and its peers are told; capture follows.
    Announced,
    In,
    Leaving,
    /// Why it could not be captured. Its containers do not start.
    Failed(String),
}

impl Pod {
    pub(super) fn stop(&mut self, within: Millis) {
        if !self.ending {
            self.ending = true;
            self.ended_at = Some(std::time::SystemTime::now());
        }
        // Full or closed: it is ending already.
        let _ = self.asks.try_send(Ask::Stop(within));
    }

    pub(super) fn ready(&self) -> bool {
        !self.ending && self.last.as_ref().is_some_and(|r| r.ready)
    }

    pub(super) fn phase(&self) -> Phase {
        self.last.as_ref().map_or(Phase::Pending, |r| r.phase)
    }

    pub(super) fn captured(&self) -> bool {
        self.capture == Capture::In
    }

    /// Whether its peers shall call it through the mesh.
    pub(super) fn announced(&self) -> bool {
        matches!(self.capture, Capture::In | Capture::Announced)
    }

    /// Whether there is nothing more to wait for: it is ready, it is through, or it is clear that it will not be soon.
    pub(super) fn has_settled(&self) -> bool {
        let stuck = |r: &Report| {
            r.containers.iter().any(|c| {
                c.restarts > 0
                    || c.state == "ImageUnknown"
                    || c.state == "CommandMissing"
                    || c.state.ends_with("Error")
            })
        };
        self.ready()
            || matches!(self.phase(), Phase::Succeeded | Phase::Failed)
            || matches!(self.capture, Capture::Failed(_))
            || self.last.as_ref().is_some_and(stuck)
    }

    fn wanted(&self) -> Wanted {
        wanted(&self.plan)
    }
}

fn key(plan: &PodPlan) -> Key {
    (plan.namespace.to_string(), plan.name.to_string())
}

fn host_network(plan: &PodPlan) -> bool {
    plan.pod.spec.as_ref().is_some_and(|s| s.host_network == Some(true))
}

fn wanted(plan: &PodPlan) -> Wanted {
    Wanted {
        key: key(plan),
        hash: plan.template_hash.to_string(),
        owner: plan.owner.as_ref().map(ToString::to_string),
        // A node's address is shared by design.
        ips: if host_network(plan) { vec![] } else { plan.ips.to_vec() },
    }
}

impl World {
    /// Takes over what may change in a running pod: labels, and whether it belongs to the mesh.
    pub(super) fn adopt_plan(&mut self) {
        let (mut moves, mut recaptured) = (vec![], vec![]);
        for plan in &self.plan.pods {
            let Some(pod) = self.pods.get_mut(&key(plan)) else { continue };
            if pod.ending || pod.plan.template_hash != plan.template_hash {
                continue;
            }
            let dns = (dns_of(&pod.plan), dns_of(plan));
            pod.plan = plan.clone();
            if dns.0 != dns.1 && matches!(pod.capture, Capture::In) {
                recaptured.push(key(plan));
            }
            let wants = plan.captured() && self.mesh.is_some();
            match (&pod.capture, wants) {
                (Capture::Out, true) | (Capture::In, false) => moves.push((key(plan), wants)),
                // The others come back here when they have arrived.
                _ => {}
            }
        }
        for key in recaptured {
            self.recapture(&key);
        }
        for (key, wants) in moves {
            let way = if wants { "enters" } else { "leaves" };
            self.say(Event::Note(format!("pod {}/{} {way} the mesh", key.0, key.1)));
            if wants { self.enter_mesh(&key, true) } else { self.leave_mesh(&key) }
        }
    }

    /// Starts and ends pods until what runs is what should.
    pub(super) fn start_and_end_pods(&mut self) {
        let wanted: Vec<Wanted> = self.plan.pods.iter().map(wanted).collect();
        let present: Vec<Present> = self
            .pods
            .values()
            .map(|p| Present { wanted: p.wanted(), ready: p.ready(), ending: p.ending })
            .collect();
        let decision = reconcile::decide(&wanted, &present);
        for key in &decision.end {
            if let Some(pod) = self.pods.get_mut(key) {
                pod.stop(NO_LIMIT);
                self.say(Event::Note(format!("pod {}/{} ends", key.0, key.1)));
            }
        }
        for start in &decision.start {
            let Some(plan) = self.plan.pods.iter().find(|p| key(p) == *start).cloned() else {
                continue;
            };
            if let Err(e) = self.start_pod(plan) {
                self.trouble(format!("pod {}/{} cannot be made: {e:#}", start.0, start.1));
            }
        }
    }

    fn start_pod(&mut self, plan: PodPlan) -> anyhow::Result<()> {
        let key = key(&plan);
        let node = self.network.nodes.get(plan.node_index);
        let node_ns = node.ok_or_else(|| anyhow::anyhow!("no node {}", plan.node))?.ns.clone();
        let around = Surroundings { node: &plan.node, ips: &plan.ips, images: &self.images };
        let resolved = resolve::resolve(&plan.pod, &around);
        let needs_root = resolved.needs(FileContent::Root);
        let (ns, net) = if host_network(&plan) {
            (node_ns.clone(), None)
        } else {
            let net = self.network.add_pod(plan.node_index, &plan.ips)?;
            (net.ns.clone(), Some(net))
        };
        let token = match self.token_for(&key, &plan, &resolved, net.as_ref()) {
            Ok(token) => token,
            Err(e) => {
                net.as_ref().map_or(Ok(()), |net| self.network.remove_pod(net))?;
                return Err(e);
            }
        };
        let instance = self.next_instance;
        self.next_instance += 1;
        let worker = Worker {
            namespace: key.0.clone(),
            name: key.1.clone(),
            instance,
            plan: resolved,
            net: ns.clone(),
            node_net: node_ns,
            ips: plan.ips.to_vec(),
            credentials: self.credentials(token.as_ref()),
            shared: self.shared.clone(),
            reports: self.reports.clone(),
        };
        let (asks, inbox) = mpsc::channel(QUEUE);
        tokio::spawn(worker.run(inbox));
        let enrol = plan.captured() && self.mesh.is_some();
        let pod = Pod {
            plan,
            instance,
            ns,
            net,
            asks,
            last: None,
            ending: false,
            capture: Capture::Out,
            gate: Gate::default(),
            keeper: None,
            ended_at: None,
            needs_root,
            _token: token,
        };
        if !enrol {
            self.let_start(&pod);
        }
        self.pods.insert(key.clone(), pod);
        if enrol {
            // The control plane must know the pod before ztunnel asks for its certificate.
            self.write_pod(&key);
            self.enter_mesh(&key, false);
        }
        Ok(())
    }

    /// What the pod's volumes are filled with.
    fn credentials(&self, token: Option<&PodToken>) -> Option<Credentials> {
        let root = self.mesh.as_ref()?.root.clone();
        Some(Credentials { token: token.map(|t| t.secret.clone()), root })
    }

    /// A token for a pod that wants one, and a way to the control plane, where it is good for something.
    fn token_for(
        &mut self,
        key: &Key,
        plan: &PodPlan,
        resolved: &resolve::PodPlan,
        net: Option<&PodNet>,
    ) -> anyhow::Result<Option<PodToken>> {
        let Some(mesh) = self.mesh.as_ref().filter(|_| resolved.needs(FileContent::Token)) else {
            return Ok(None);
        };
        let names = PodNames {
            namespace: &key.0,
            name: &key.1,
            service_account: &service_account(plan),
            node: &plan.node,
        };
        let token = mesh.token(names)?;
        if let Some(net) = net {
            self.network.admit(net)?;
        }
        Ok(Some(token))
    }

    /// Lets the pod's containers start, once what they are to find is there.
    pub(super) fn let_start(&self, pod: &Pod) {
        let root = self.mesh.as_ref().map(|mesh| mesh.root.clone()).filter(|_| pod.needs_root);
        let Some(root) = root.filter(|root| !root.exists()) else {
            // Full or closed: it was told already, or it is ending.
            let _ = pod.asks.try_send(Ask::Start);
            return;
        };
        let asks = pod.asks.clone();
        tokio::spawn(async move {
            while !root.exists() && !asks.is_closed() {
                tokio::time::sleep(LOOK_FOR_ROOT).await;
            }
            let _ = asks.send(Ask::Start).await;
        });
    }

    pub(super) fn pod_released(&mut self, key: &Key, instance: u64) -> bool {
        let Some(pod) = self.pods.get_mut(key).filter(|p| p.instance == instance) else {
            return false;
        };
        pod.capture = Capture::Out;
        if pod.last.as_ref().is_some_and(|r| r.gone) {
            self.forget_pod(key);
        } else {
            self.keep(key);
        }
        true
    }

    pub(super) fn pod_reported(&mut self, report: Report) -> bool {
        let key = (report.namespace.clone(), report.name.clone());
        let Some(pod) = self.pods.get_mut(&key).filter(|p| p.instance == report.instance) else {
            return false;
        };
        if report.gone {
            pod.last = Some(report);
            self.forget_pod(&key);
            return true;
        }
        let before = pod.last.replace(report.clone());
        let matters =
            before.as_ref().is_none_or(|b| (b.phase, b.ready) != (report.phase, report.ready));
        let notes = news(before.as_ref(), &report, &self.shared.place);
        // What a pod says while it is ended is no news.
        if !pod.ending {
            notes.into_iter().for_each(|n| self.say(n));
        }
        matters
    }

    /// Nothing runs in the pod any more: it leaves the mesh, then its network goes, then its name is free.
    fn forget_pod(&mut self, key: &Key) {
        self.objects.remove("pod", &key.0, &key.1);
        let Some(pod) = self.pods.get_mut(key) else { return };
        if self.ending {
            // Everything else goes with the lab; its peers do too.
            self.pods.remove(key);
            return;
        }
        let agent = self.mesh.as_ref().and_then(|m| m.agents.get(pod.plan.node_index).cloned());
        if let (Some(agent), true) = (agent, pod.capture != Capture::Out) {
            pod.capture = Capture::Leaving;
            let (inputs, key, instance) = (self.inputs.clone(), key.clone(), pod.instance);
            let uid = uid(&key, instance);
            tokio::spawn(async move {
                let _ = tokio::time::timeout(PROXY_ANSWERS, agent.remove(&uid)).await;
                tokio::time::sleep(GOODBYE).await;
                let _ = inputs.send(Input::Released { key, instance }).await;
            });
            return;
        }
        let Some(pod) = self.pods.remove(key) else { return };
        if let Some(net) = &pod.net
            && let Err(e) = self.network.remove_pod(net)
        {
            tracing::warn!("pod {}/{}: {e:#}", key.0, key.1);
        }
        self.assignments.release(&key.0, &key.1);
    }
}

/// What is worth a line on the screen between two reports of a pod.
fn news(before: Option<&Report>, now: &Report, place: &Place) -> Vec<Event> {
    let mut news = vec![];
    for (i, c) in now.containers.iter().enumerate() {
        let was = before.and_then(|b| b.containers.get(i));
        if was.is_some_and(|w| w.state == c.state && w.restarts == c.restarts) {
            continue;
        }
        let bad =
            matches!(c.state.as_str(), "CrashLoopBackOff" | "ImageUnknown" | "CommandMissing");
        if !bad && !c.state.ends_with("Error") {
            continue;
        }
        let mut text =
            format!("pod {}/{} container {}: {}", now.namespace, now.name, c.name, c.state);
        if !c.message.is_empty() {
            text.push_str(&format!(": {}", c.message));
        }
        let log = logs::tail(&place.container_log(&now.namespace, &now.name, &c.name), LAST_WORDS);
        if let Some(words) = log.lines().last().filter(|w| !w.trim().is_empty()) {
            text.push_str(&format!("; its last words: {words}"));
        }
        news.push(Event::Warning(text));
    }
    let steady = now.containers.iter().all(|c| c.restarts == 0);
    if before.is_some_and(|b| !b.ready) && now.ready && steady {
        news.push(Event::Note(format!("pod {}/{} is ready", now.namespace, now.name)));
    }
    news
}

/// Tells a pod from its predecessors of the same name.
pub(super) fn uid(key: &Key, instance: u64) -> String {
    format!("{}_{}_{instance}", key.0, key.1)
}

pub(super) fn service_account(plan: &PodPlan) -> String {
    let named = plan
        .pod
        .spec
        .as_ref()
        .and_then(|s| s.service_account_name.clone())
        .filter(|n| !n.is_empty());
    named.unwrap_or_else(|| "default".to_owned())
}
