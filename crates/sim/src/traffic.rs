//! Connections of applications: planned where they begin, carried by tunnels or in plaintext. Planning and
//! pooling are `engine`'s.

use std::cell::Cell;
use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use engine::{Candidate, Next, OutboundFacts, OutboundPlan, Transport, Turn, plan_outbound};
use model::Reason;

use crate::Bug;
use crate::check::Violation;
use crate::content::{PODS, PORTS, Pod, vip};
use crate::oracle::Request;
use crate::proxy::{Key, Wire, WireState};
use crate::world::{Event, Place, Sim};

/// Attempts for one stream, as in the real pool.
const ATTEMPTS: u32 = 3;
/// The real proxy's waits, in milliseconds: for a dial, and for a tunnel in doubt.
const DIAL_MS: u64 = 10_000;
const BEFORE_ANOTHER_MS: u64 = 3_000;
const DOUBT_MS: u64 = 2_000;

/// A connection that is being made.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) from: Pod,
    pub(crate) destination: SocketAddr,
    /// The proxy that plans it. `None`: the pod is not in the mesh.
    pub(crate) proxy: Option<usize>,
    pub(crate) candidates: VecDeque<Candidate>,
    /// The endpoint that is being tried.
    pub(crate) target: SocketAddr,
    pub(crate) tunnel: Option<Tunnel>,
    /// At the other end: the pod, the proxy that judges, and since when it does.
    pub(crate) asked: Option<(u32, usize, u64)>,
    /// What was let in, and under which publication: its application is being called.
    pub(crate) admitted: Option<(Request, u64)>,
    /// The answer that a probe must get.
    pub(crate) expected: Option<bool>,
}

/// What a call needs to go through a tunnel.
#[derive(Debug)]
pub(crate) struct Tunnel {
    key: Key,
    attempts: u32,
    turn: Option<Turn<()>>,
    pub(crate) wire: Option<Wire>,
    fresh: bool,
}

impl Sim {
    /// Some pod calls a Service or another pod.
    pub(crate) fn some_call(&mut self) {
        if self.quiet {
            return;
        }
        let again = self.rng.between(200, 4_000);
        self.plan(again, Event::Call);
        let from = self.rng.index(PODS);
        let to = if self.rng.chance(40) { PODS + self.rng.index(2) } else { self.rng.index(PODS) };
        let port = PORTS[self.rng.index(2)];
        self.call(from, to, port, None);
    }

    /// Calls a place, or a Service behind the last of them.
    pub(crate) fn call(&mut self, from: usize, to: usize, port: u16, expected: Option<bool>) {
        let content = self.content();
        let ip = match content.pods.get(to) {
            Some(None) => return,
            Some(Some(pod)) => pod.ip(),
            None => vip(to - PODS),
        };
        let Some(pod) = content.pods[from].clone().filter(|pod| self.runs(pod)) else { return };
        let destination = SocketAddr::new(ip, port);
        let id = self.id();
        self.counts.calls += 1;
        self.note(20, || {
            format!("call {id}: pod {} of {} calls {destination}", pod.born, pod.name())
        });
        let proxy = self.captured.contains(&pod.born).then(|| self.machines[pod.node].proxy);
        let call = Call {
            from: pod,
            destination,
            proxy: proxy.flatten(),
            candidates: VecDeque::new(),
            target: destination,
            tunnel: None,
            asked: None,
            admitted: None,
            expected,
        };
        self.calls.insert(id, call);
        match proxy {
            // Nobody serves what the pod opens, and its rules let nothing past.
            Some(None) => self.refused(id, "no proxy"),
            Some(Some(proxy)) => self.plan_call(id, proxy),
            None => self.plain_from_outside(id),
        }
    }

    /// Whether a pod's containers run: one of the mesh waits for its proxy to take it.
    pub(crate) fn runs(&self, pod: &Pod) -> bool {
        let there = self.content().pods[pod.place].as_ref();
        there.is_some_and(|p| p.born == pod.born)
            && (!pod.enrolled || self.captured.contains(&pod.born))
    }

    pub(crate) fn pod_at(&self, ip: IpAddr) -> Option<&Pod> {
        self.content().pods.iter().flatten().find(|pod| pod.ip() == ip)
    }

    /// What kube-proxy does.
    fn plain_from_outside(&mut self, id: usize) {
        let ip = self.calls[&id].destination.ip();
        let content = self.content();
        if let Some(service) = (0..2).find(|s| vip(*s) == ip) {
            let serves = |pod: &&Pod| pod.namespace == service && pod.app == service && pod.ready;
            let ready: Vec<_> = content.pods.iter().flatten().filter(serves).map(Pod::ip).collect();
            let there = content.services[service];
            let chosen = self.rng.index(ready.len());
            let Some(ip) = ready.get(chosen).copied().filter(|_| there) else {
                return self.refused(id, "no endpoint");
            };
            if let Some(call) = self.calls.get_mut(&id) {
                call.target.set_ip(ip);
            }
        }
        self.send_plain(id);
    }

    fn plan_call(&mut self, id: usize, proxy: usize) {
        let rand = self.rng.next();
        let call = &self.calls[&id];
        let of = &self.proxies[proxy];
        let Some(source) = of.workload(&call.from) else {
            return self.refused(id, "unknown workload");
        };
        let facts = OutboundFacts { source, destination: call.destination };
        match plan_outbound(&of.snapshot, &facts, rand) {
            OutboundPlan::Refuse(refusal) => {
                let reason = refusal.reason;
                self.note(21, || format!("call {id}: refused, {reason}"));
                self.refused(id, "refused by the plan");
            }
            OutboundPlan::Passthrough => {
                self.check_plaintext_out(id, proxy, self.calls[&id].target);
                // What is no address of the mesh goes the way of every packet.
                self.plain_from_outside(id);
            }
            OutboundPlan::Connect { candidates, .. } => {
                if let Some(call) = self.calls.get_mut(&id) {
                    call.candidates = candidates.into();
                }
                self.next_candidate(id);
            }
        }
    }

    fn next_candidate(&mut self, id: usize) {
        let keeps = self.has(Bug::KeepsThePlan);
        let Some(call) = self.calls.get_mut(&id) else { return };
        let (Some(candidate), Some(proxy)) = (call.candidates.pop_front(), call.proxy) else {
            return self.refused(id, "no candidate is left");
        };
        if !keeps && !candidate.is_current(&self.proxies[proxy].snapshot) {
            return self.next_candidate(id);
        }
        (call.target, call.tunnel) = (candidate.target, None);
        let Transport::Hbone { gateway, expected } = candidate.transport else {
            self.check_plaintext_out(id, proxy, candidate.target);
            return self.send_plain(id);
        };
        let identity = call.from.identity();
        let by_name = self.options.bug == Some(Bug::PoolsByName);
        let key = Key {
            source: if by_name { 0 } else { call.from.born },
            identity: identity.clone(),
            destination: candidate.workload.uid.clone(),
            gateway,
            expected,
        };
        call.tunnel = Some(Tunnel { key, attempts: 0, turn: None, wire: None, fresh: false });
        let wall = self.wall(self.proxies[proxy].node);
        let of = &self.proxies[proxy];
        let expired = self.has(Bug::UsesExpired) && of.certs.contains_key(&identity);
        if of.alive && (expired || of.certificate(&identity, wall).is_some()) {
            let not_after = of.certs.get(&identity).map_or(0, |cert| cert.0.not_after);
            self.check_certificate(id, not_after, wall);
            self.open(id);
        } else {
            self.note(22, || format!("call {id}: no certificate for {identity}"));
            self.candidate_failed(id);
        }
    }

    fn candidate_failed(&mut self, id: usize) {
        if self.has(Bug::FallsBackToPlaintext)
            && let Some(Call { proxy: Some(proxy), target, .. }) = self.calls.get(&id)
        {
            self.check_plaintext_out(id, *proxy, *target);
        }
        self.next_candidate(id);
    }

    /// Takes a tunnel from the pool, or waits for a dial.
    fn open(&mut self, id: usize) {
        let now = Duration::from_millis(self.now);
        let Some(call) = self.calls.get_mut(&id) else { return };
        let (Some(proxy), Some(tunnel)) = (call.proxy, &mut call.tunnel) else { return };
        tunnel.attempts += 1;
        if tunnel.attempts > ATTEMPTS {
            return self.candidate_failed(id);
        }
        let of = &mut self.proxies[proxy];
        if let Some(wire) = of.pool.pick(&tunnel.key, now) {
            return self.use_tunnel(id, wire, false);
        }
        tunnel.turn = Some(of.pool.queue(&tunnel.key));
        match of.dials.get_mut(&tunnel.key) {
            Some(waiting) => waiting.push(id),
            None => {
                of.dials.insert(tunnel.key.clone(), Vec::new());
                self.turn(id);
            }
        }
    }

    /// It is this call's turn to dial.
    fn turn(&mut self, id: usize) {
        let now = Duration::from_millis(self.now);
        let Some(call) = self.calls.get_mut(&id) else { return };
        let (Some(proxy), Some(tunnel)) = (call.proxy, &mut call.tunnel) else { return };
        let key = tunnel.key.clone();
        let Some(turn) = &tunnel.turn else { return };
        let next = self.proxies[proxy].pool.next(&key, turn, now);
        tunnel.turn = if matches!(next, Next::Dial) { tunnel.turn.take() } else { None };
        match next {
            Next::Dial => {
                let node = call.from.node;
                let cut = self.cut_to(node, key.gateway.ip());
                if cut || self.lost() {
                    let result = Err("no answer");
                    // Who has another endpoint to try waits less.
                    let last = self.calls.get(&id).is_none_or(|call| call.candidates.is_empty());
                    let limit = if last { DIAL_MS } else { BEFORE_ANOTHER_MS };
                    return self.plan(limit, Event::Dialled { call: id, result });
                }
                let latency = self.latency();
                return self.plan(latency, Event::Dial { call: id });
            }
            Next::Take(wire) => self.use_tunnel(id, wire, false),
            Next::Failed { .. } | Next::Full(_) => self.candidate_failed(id),
        }
        self.next_turn(proxy, &key);
    }

    fn next_turn(&mut self, proxy: usize, key: &Key) {
        let Some(waiting) = self.proxies[proxy].dials.get_mut(key) else { return };
        if waiting.is_empty() {
            self.proxies[proxy].dials.remove(key);
        } else {
            let next = waiting.remove(0);
            self.turn(next);
        }
    }

    fn cut_to(&self, node: usize, ip: IpAddr) -> bool {
        let to = self.pod_at(ip).map_or(node, |pod| pod.node);
        self.cut_until(Place::Node(node), Place::Node(to)).is_some()
    }

    /// Both sides look at each other's certificate.
    pub(crate) fn dial_arrives(&mut self, id: usize) {
        let Some(Call { from, tunnel: Some(tunnel), .. }) = self.calls.get(&id) else { return };
        let result = self.handshake(from, &tunnel.key);
        let latency = self.latency();
        self.plan(latency, Event::Dialled { call: id, result });
    }

    fn handshake(&self, from: &Pod, key: &Key) -> Result<(), &'static str> {
        let to = self.pod_at(key.gateway.ip()).filter(|to| self.runs(to));
        let to = to.filter(|to| self.captured.contains(&to.born)).ok_or("nobody listens")?;
        let server = self.machines[to.node].proxy.ok_or("nobody listens")?;
        let server = &self.proxies[server];
        if !server.pods.contains_key(&to.born) {
            return Err("nobody listens");
        }
        let (ours, theirs) = (self.wall(from.node), self.wall(to.node));
        let shown = server.certificate(&to.identity(), theirs).ok_or("no certificate to show")?;
        let client = self.machines[from.node].proxy.map(|proxy| &self.proxies[proxy]);
        let client = client.and_then(|c| c.certs.get(&key.identity)).ok_or("no certificate")?;
        if !shown.0.valid_at(ours) || !client.0.valid_at(theirs) {
            return Err("not valid by the other's clock");
        }
        key.expected.contains(&to.identity()).then_some(()).ok_or("somebody else answers")
    }

    pub(crate) fn dialled(&mut self, id: usize, result: Result<(), &'static str>) {
        let now = Duration::from_millis(self.now);
        let Some(Call { from, proxy: Some(proxy), tunnel: Some(tunnel), .. }) = self.calls.get(&id)
        else {
            return;
        };
        let (proxy, key) = (*proxy, tunnel.key.clone());
        let to = self.pod_at(key.gateway.ip()).filter(|to| self.captured.contains(&to.born));
        let server = to.and_then(|to| Some((to.born, self.machines[to.node].proxy?)));
        // Who shook hands may be gone by now.
        let result = result.and_then(|()| server.ok_or("gone"));
        let result = result.map(|(to, server)| {
            Wire(Rc::new(WireState {
                from: from.born,
                to,
                client: proxy,
                server,
                peer: from.identity(),
                source: from.ip(),
                closed: Cell::new(false),
                streams: Cell::new(0),
            }))
        });
        self.note(23, || {
            format!("call {id}: dialled {}: {:?}", key.gateway, result.as_ref().err())
        });
        if !self.proxies[proxy].alive {
            return self.refused(id, "its proxy is gone");
        }
        let told = result.clone().map_err(|e| (e.to_owned(), Reason::ConnectFailed));
        self.proxies[proxy].pool.dialled(&key, told, now);
        match result {
            Ok(wire) => self.use_tunnel(id, wire, true),
            Err(_) => self.candidate_failed(id),
        }
        self.next_turn(proxy, &key);
    }

    /// Sends the CONNECT.
    fn use_tunnel(&mut self, id: usize, wire: Wire, fresh: bool) {
        let Some(call) = self.calls.get_mut(&id) else { return };
        let Some(tunnel) = &mut call.tunnel else { return };
        let (from, node) = (call.from.clone(), call.from.node);
        wire.0.streams.set(wire.0.streams.get() + 1);
        (tunnel.wire, tunnel.fresh, tunnel.turn) = (Some(wire.clone()), fresh, None);
        if wire.0.from != from.born || wire.0.peer != from.identity() {
            return self.violate(Violation::WrongTunnel, || {
                format!("call {id} of pod {} takes a tunnel of pod {}", from.born, wire.0.from)
            });
        }
        let other = self.proxies[wire.0.server].node;
        let silent = self.cut_until(Place::Node(node), Place::Node(other)).is_some();
        if silent || self.lost() {
            return self.plan(DOUBT_MS, Event::Doubt { call: id });
        }
        let latency = self.latency();
        self.plan(latency, Event::Arrive { call: id });
    }

    /// The tunnel does not answer: another one.
    pub(crate) fn doubt(&mut self, id: usize) {
        let Some(call) = self.calls.get_mut(&id) else { return };
        let Some(tunnel) = &mut call.tunnel else { return };
        if let Some(wire) = tunnel.wire.take() {
            wire.0.closed.set(true);
            wire.0.streams.set(wire.0.streams.get() - 1);
        }
        call.asked = None;
        if tunnel.fresh { self.candidate_failed(id) } else { self.open(id) }
    }

    fn send_plain(&mut self, id: usize) {
        let Some(call) = self.calls.get(&id) else { return };
        let (node, ip) = (call.from.node, call.target.ip());
        if self.cut_to(node, ip) || self.lost() {
            return self.refused(id, "no answer");
        }
        let latency = self.latency();
        self.plan(latency, Event::Arrive { call: id });
    }
}
