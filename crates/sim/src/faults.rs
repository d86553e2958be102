//! What goes wrong, and what comes and goes: users' changes, deaths and restarts, drains, broken links, wrong
//! clocks.

use std::collections::BTreeSet;

use engine::Drain;
use std::time::Duration;

use crate::check::Violation;
use crate::content::{NODES, Pod};
use crate::control::Compiled;
use crate::discovery::{End, KEEPALIVE_MS};
use crate::proxy::Proxy;
use crate::world::{Event, Place, REPLICAS, Sim};
use crate::{Bug, Fault};

/// How often a proxy looks for tunnels to give back (the real one's interval).
const SWEEP_MS: u64 = 15_000;
/// How long a proxy that goes waits for what lives.
pub(crate) const DRAIN: Duration = Duration::from_secs(20);
/// How long everything may take to settle: twice the longest pause between two requests to the CA, and longer than a
/// tunnel may idle.
pub(crate) const SETTLE_MS: u64 = 400_000;

impl Sim {
    /// A user, a controller or a kubelet changes something.
    pub(crate) fn change(&mut self) {
        if self.quiet {
            return;
        }
        let again = self.rng.between(1_000, 20_000);
        self.plan(again, Event::Change);
        let before = self.content().clone();
        let (mut after, mut what) = (before.clone(), Vec::new());
        for _ in 0..self.rng.between(1, 3) {
            what.push(after.change(&mut self.rng, &mut self.born));
        }
        let content = self.contents.len();
        self.note(40, || format!("content {content}: {}", what.join(", ")));
        self.counts.contents += 1;
        self.contents.push(Compiled::new(after.clone(), &mut self.compilation));
        for replica in 0..REPLICAS {
            let late = self.rng.chance(15);
            let within =
                if late { self.rng.between(1_000, 15_000) } else { self.rng.between(1, 200) };
            self.plan(within, Event::Learn { replica, content });
        }
        for (old, new) in before.pods.iter().zip(&after.pods) {
            if old != new {
                self.pod_changes(old.as_ref(), new.as_ref());
            }
        }
    }

    /// What the kubelet and the node agent do about it.
    fn pod_changes(&mut self, old: Option<&Pod>, new: Option<&Pod>) {
        let same = |a: &Pod, b: Option<&Pod>| b.is_some_and(|b| a.born == b.born);
        if let Some(old) = old {
            let gone = !same(old, new);
            if gone {
                let of_pod = |conn: &crate::arrival::Conn| conn.pods.contains(&old.born);
                let ids: Vec<_> =
                    self.conns.iter().filter(|(_, c)| of_pod(c)).map(|(id, _)| *id).collect();
                ids.into_iter().for_each(|id| self.close(id));
            }
            if (gone || new.is_some_and(|new| !new.enrolled)) && self.captured.remove(&old.born) {
                let within = self.rng.between(1, 3_000);
                self.plan(within, Event::Leave { node: old.node, born: old.born });
            }
        }
        if let Some(new) = new.filter(|new| new.enrolled) {
            let within = self.rng.between(1, 1_000);
            self.plan(within, Event::Enrol { born: new.born });
        }
    }

    fn pod(&self, born: u32) -> Option<&Pod> {
        self.content().pods.iter().flatten().find(|pod| pod.born == born)
    }

    /// The node agent hands a pod to its proxy, and its traffic with it; without a proxy it tries again.
    pub(crate) fn enrol(&mut self, born: u32) {
        let Some(pod) = self.pod(born).filter(|pod| pod.enrolled).cloned() else { return };
        let Some(proxy) = self.machines[pod.node].proxy else {
            return self.plan(1_000, Event::Enrol { born });
        };
        self.take_pod(proxy, pod);
        self.captured.insert(born);
    }

    fn take_pod(&mut self, proxy: usize, pod: Pod) {
        let (now, rand) = (self.now, self.rng.next());
        let born = pod.born;
        self.note(41, || format!("proxy {proxy} takes pod {born}, {} at {}", pod.name(), pod.ip()));
        let of = &mut self.proxies[proxy];
        of.want(&pod.identity(), now, rand);
        of.pods.insert(born, pod);
        self.look(proxy);
    }

    /// A pod has left: its tunnels are given up, and its certificate if no other pod needs it.
    pub(crate) fn leave(&mut self, node: usize, born: u32) {
        // It may have come back meanwhile.
        let Some(proxy) = self.machines[node].proxy.filter(|_| !self.captured.contains(&born))
        else {
            return;
        };
        let of = &mut self.proxies[proxy];
        let Some(pod) = of.pods.remove(&born) else { return };
        of.pool.forget(|key| key.source == born);
        let identity = pod.identity();
        if !of.pods.values().any(|other| other.identity() == identity) {
            of.forget(&identity);
            self.machines[node].secrets.remove(&identity);
        }
        self.note(42, || format!("proxy {proxy} lets pod {born} go"));
        self.close_tunnels(|wire| wire.to == born || wire.from == born);
    }

    /// GOAWAY, or the end of a process: no new streams.
    fn close_tunnels(&mut self, of: impl Fn(&crate::proxy::WireState) -> bool) {
        for proxy in &self.proxies {
            for (_, wire) in proxy.pool.tunnels().filter(|(_, wire)| of(&wire.0)) {
                wire.0.closed.set(true);
            }
        }
    }

    pub(crate) fn sweep(&mut self, id: usize) {
        if !self.proxies[id].alive {
            return;
        }
        if !self.has(Bug::NeverSweeps) {
            self.proxies[id].pool.sweep(Duration::from_millis(self.now));
        }
        self.check_pool(id);
        self.plan(SWEEP_MS, Event::Sweep { proxy: id });
    }

    pub(crate) fn start_proxy(&mut self, node: usize) {
        let (now, wall, id) = (self.now, self.wall(node), self.proxies.len());
        let machine = &mut self.machines[node];
        let proxy = Proxy::start(node, &machine.disk, &machine.secrets, now, wall);
        machine.proxy = Some(id);
        self.note(43, || format!("proxy {id} starts on node {node} with {:?}", proxy.snapshot));
        self.proxies.push(proxy);
        // The node agent names the pods that it has.
        let ours = |pod: &&Pod| pod.node == node && self.captured.contains(&pod.born);
        let pods: Vec<_> = self.content().pods.iter().flatten().filter(ours).cloned().collect();
        pods.into_iter().for_each(|pod| self.take_pod(id, pod));
        self.look(id);
        self.connect(id);
        self.plan(SWEEP_MS, Event::Sweep { proxy: id });
    }

    pub(crate) fn start_again(&mut self, node: usize) {
        if self.machines[node].proxy.is_none() {
            self.start_proxy(node);
        }
    }

    /// The process is gone, with all that it held.
    fn kill(&mut self, id: usize) {
        self.note(44, || format!("proxy {id} ends"));
        let proxy = &mut self.proxies[id];
        proxy.alive = false;
        let stream = proxy.stream.take();
        if self.machines[self.proxies[id].node].proxy == Some(id) {
            self.machines[self.proxies[id].node].proxy = None;
        }
        let of_proxy = |conn: &crate::arrival::Conn| conn.proxies.contains(&Some(id));
        let ids: Vec<_> = self.conns.iter().filter(|(_, c)| of_proxy(c)).map(|(i, _)| *i).collect();
        ids.into_iter().for_each(|conn| self.close(conn));
        self.close_tunnels(|wire| wire.client == id || wire.server == id);
        if let Some(stream) = stream {
            self.plan(5, Event::Break { stream, end: End::Server });
        }
    }

    /// A new process beside the old one, which takes nothing new and waits for what lives.
    fn replace(&mut self, node: usize) {
        let Some(old) = self.machines[node].proxy else { return };
        self.note(45, || format!("proxy {old} drains"));
        let proxy = &mut self.proxies[old];
        proxy.draining = Some(self.now);
        proxy.pods.clear();
        self.close_tunnels(|wire| wire.server == old);
        self.start_proxy(node);
        self.plan(1, Event::DrainLook { proxy: old });
    }

    pub(crate) fn drain_look(&mut self, id: usize) {
        let Some(since) = self.proxies[id].draining.filter(|_| self.proxies[id].alive) else {
            return;
        };
        let of_proxy = |conn: &&crate::arrival::Conn| conn.proxies.contains(&Some(id));
        let open = self.conns.values().filter(of_proxy).count();
        let waited = Duration::from_millis(self.now - since);
        if waited > DRAIN + Duration::from_secs(1) {
            return self.violate(Violation::Undrained, || format!("proxy {id} since {waited:?}"));
        }
        let limit = if self.has(Bug::DrainsForever) { Duration::MAX } else { DRAIN };
        match Drain::after(waited, limit, open) {
            Drain::Wait => self.plan(500, Event::DrainLook { proxy: id }),
            Drain::Done | Drain::Cut => {
                self.save(id);
                self.kill(id);
            }
        }
    }

    /// Something breaks.
    pub(crate) fn fault(&mut self) {
        if self.quiet {
            return;
        }
        let again = self.rng.between(1_000, 15_000);
        self.plan(again, Event::Fault);
        let (node, replica) = (self.rng.index(NODES), self.rng.index(REPLICAS));
        let lasts = self.rng.between(100, 40_000);
        let fault = Fault::ALL[self.rng.index(Fault::PLANNED)];
        if self.spared(fault) {
            return;
        }
        match fault {
            Fault::Kill => {
                if let Some(proxy) = self.machines[node].proxy {
                    self.kill(proxy);
                    self.plan(lasts / 4, Event::Start { node });
                }
            }
            Fault::Replace => self.replace(node),
            Fault::CutNodes => {
                let other = (node + 1) % NODES;
                self.cut(Place::Node(node), Place::Node(other), lasts);
            }
            Fault::CutReplica => self.cut(Place::Node(node), Place::Replica(replica), lasts),
            Fault::StopReplica => self.replica_down(replica, lasts),
            Fault::BreakCa => {
                self.note(46, || format!("the CA at replica {replica} breaks"));
                self.replicas[replica].signs = false;
                self.plan(lasts, Event::SignAgain { replica });
            }
            Fault::Clock => self.jump(node, lasts),
            Fault::Reboot => self.reboot(node, lasts / 4),
            Fault::Late | Fault::Lost | Fault::Missed => {}
        }
    }

    /// Whether this kind of fault is left out.
    pub(crate) fn spared(&self, fault: Fault) -> bool {
        self.quiet || self.options.without & fault.bit() != 0
    }

    /// A clock is set wrong, mostly within what must be harmless, and is right again after a while.
    fn jump(&mut self, node: usize, lasts: u64) {
        let far = self.rng.chance(30);
        let by = if far { self.rng.between(1, 7_200) } else { self.rng.between(1, 120) };
        let by = i64::try_from(by).unwrap_or(0);
        let by = if self.rng.chance(50) { by } else { -by };
        self.set_clock(node, by);
        self.plan(lasts, Event::ClockBack { node, by: 0 });
    }

    pub(crate) fn set_clock(&mut self, node: usize, by: i64) {
        self.note(47, || format!("the clock of node {node} is wrong by {by} s"));
        self.machines[node].clock = by;
    }

    /// What is on the disk stays; what was in memory, certificates too, is gone.
    fn reboot(&mut self, node: usize, lasts: u64) {
        let of_node = |proxy: &(usize, &Proxy)| proxy.1.node == node && proxy.1.alive;
        let proxies: Vec<_> =
            self.proxies.iter().enumerate().filter(of_node).map(|(i, _)| i).collect();
        self.note(48, || format!("node {node} reboots"));
        proxies.into_iter().for_each(|proxy| self.kill(proxy));
        self.machines[node].secrets.clear();
        let here: BTreeSet<_> = self
            .content()
            .pods
            .iter()
            .flatten()
            .filter(|p| p.node == node)
            .map(|p| p.born)
            .collect();
        for born in &here {
            if self.captured.remove(born) {
                self.plan(lasts, Event::Enrol { born: *born });
            }
        }
        let gone = |conn: &crate::arrival::Conn| conn.pods.iter().any(|pod| here.contains(pod));
        let ids: Vec<_> = self.conns.iter().filter(|(_, c)| gone(c)).map(|(id, _)| *id).collect();
        ids.into_iter().for_each(|id| self.close(id));
        self.plan(lasts, Event::Start { node });
    }

    /// Nothing passes between two places; who keeps a stream over it gives it up after a while.
    fn cut(&mut self, a: Place, b: Place, lasts: u64) {
        self.note(49, || format!("cut between {a:?} and {b:?} for {lasts} ms"));
        let until = self.now + lasts;
        self.cuts.insert((a.min(b), a.max(b)), until);
        if lasts <= KEEPALIVE_MS {
            return;
        }
        let over = |proxy: usize, replica: usize| {
            let ends = [Place::Node(self.proxies[proxy].node), Place::Replica(replica)];
            ends.contains(&a) && ends.contains(&b)
        };
        let streams = self.streams.iter().filter(|(_, s)| over(s.proxy, s.replica));
        let streams: Vec<_> = streams.map(|(id, _)| *id).collect();
        for stream in streams {
            self.plan(KEEPALIVE_MS, Event::Break { stream, end: End::Proxy });
        }
    }

    fn replica_down(&mut self, replica: usize, lasts: u64) {
        self.note(50, || format!("replica {replica} stops"));
        self.replicas[replica].up = false;
        let streams = std::mem::take(&mut self.replicas[replica].streams);
        for stream in streams.into_keys() {
            self.plan(1, Event::Break { stream, end: End::Proxy });
        }
        self.plan(lasts, Event::ReplicaUp { replica });
    }

    /// A new process: another epoch, and what it finds is not always the newest.
    pub(crate) fn replica_up(&mut self, replica: usize) {
        if self.replicas[replica].up {
            return;
        }
        let newest = self.contents.len() - 1;
        let behind = if self.rng.chance(30) { self.rng.index(3) } else { 0 };
        let knows = newest.saturating_sub(behind).max(1);
        self.note(51, || format!("replica {replica} starts with content {knows}"));
        self.replicas[replica] = self.new_replica(knows);
        self.plan(500, Event::Learn { replica, content: newest });
    }

    /// Faults are over: whatever is broken heals, nobody changes anything, applications fall silent.
    pub(crate) fn all_quiet(&mut self) {
        self.note(52, || "quiet".to_owned());
        self.quiet = true;
        self.cuts.clear();
        for replica in 0..REPLICAS {
            self.replicas[replica].signs = true;
            self.replica_up(replica);
        }
        for node in 0..NODES {
            self.set_clock(node, 0);
            self.start_again(node);
        }
        self.plan(SETTLE_MS, Event::Probe);
    }
}
