//! Connections of applications: planned where they begin, carried by tunnels or in plaintext, judged where
//! they arrive. Planning, pooling and judging are `engine`'s.

use std::cell::Cell;
use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use engine::{
    Candidate, InboundFacts, Next, OutboundFacts, OutboundPlan, Transport, Turn, Verdict,
    authorize, ended_by, plan_outbound,
};
use model::Reason;

use crate::Bug;
use crate::check::Violation;
use crate::content::{PODS, PORTS, Pod, vip};
use crate::oracle::Request;
use crate::proxy::{Key, Live, Wire, WireState};
use crate::world::{Event, Place, Sim};

/// Attempts for one stream, as in the real pool.
const ATTEMPTS: u32 = 3;
/// The real proxy's waits, in milliseconds: for a policy in flight, for a dial, and for a tunnel in doubt.
const POLICY_MS: u64 = 1_000;
const DIAL_MS: u64 = 10_000;
const BEFORE_ANOTHER_MS: u64 = 3_000;
const DOUBT_MS: u64 = 2_000;

/// A connection that is being made.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) from: Pod,
    pub(crate) destination: SocketAddr,
    /// The proxy that plans it. `None`: the pod is not in the mesh.
    proxy: Option<usize>,
    candidates: VecDeque<Candidate>,
    /// The endpoint that is being tried.
    target: SocketAddr,
    tunnel: Option<Tunnel>,
    /// At the other end: the pod, the proxy that judges, and since when it does.
    asked: Option<(u32, usize, u64)>,
    /// What was let in, and under which publication: its application is being called.
    admitted: Option<(Request, u64)>,
    /// The answer that a probe must get.
    pub(crate) expected: Option<bool>,
}

#[derive(Debug)]
struct Tunnel {
    key: Key,
    attempts: u32,
    turn: Option<Turn<()>>,
    wire: Option<Wire>,
    fresh: bool,
}

/// A connection that was made.
#[derive(Debug)]
pub(crate) struct Conn {
    /// The proxies at its ends, if the pods are in the mesh, and the pods.
    pub(crate) proxies: [Option<usize>; 2],
    pub(crate) pods: [u32; 2],
    wire: Option<Wire>,
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

    fn pod_at(&self, ip: IpAddr) -> Option<&Pod> {
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

    pub(crate) fn arrive(&mut self, id: usize) {
        let Some(call) = self.calls.get(&id) else { return };
        if !self.runs(&call.from) || call.proxy.is_some_and(|proxy| !self.proxies[proxy].alive) {
            return self.refused(id, "the caller is gone");
        }
        let wire = call.tunnel.as_ref().and_then(|tunnel| tunnel.wire.clone());
        let (born, proxy) = match &wire {
            Some(wire) => {
                let server = &self.proxies[wire.0.server];
                let there = server.pods.contains_key(&wire.0.to);
                if wire.0.closed.get() || !server.alive || !there {
                    return self.doubt(id);
                }
                (wire.0.to, wire.0.server)
            }
            None => {
                let Some(to) = self.pod_at(call.target.ip()).filter(|to| self.runs(to)) else {
                    return self.refused(id, "nobody is there");
                };
                if !self.captured.contains(&to.born) {
                    // Not of the mesh: nobody judges.
                    return self.made(id, None, to.born);
                }
                match self.machines[to.node].proxy {
                    Some(proxy) => (to.born, proxy),
                    None => return self.refused(id, "no proxy serves the pod"),
                }
            }
        };
        let now = self.now;
        if let Some(call) = self.calls.get_mut(&id) {
            call.asked = Some((born, proxy, now));
        }
        self.decide(id);
    }

    /// The request as the judging proxy sees it.
    fn request_of(&self, call: &Call, pod: &Pod) -> Request {
        let wire = call.tunnel.as_ref().and_then(|tunnel| tunnel.wire.as_ref());
        let mut peer = wire.map(|wire| wire.0.peer.clone());
        if self.has(Bug::TrustsAddresses) && peer.is_none() {
            peer = Some(call.from.identity());
        }
        let source = wire.map_or(call.from.ip(), |wire| wire.0.source);
        Request { to: pod.place, port: call.target.port(), source, peer }
    }

    /// The destination's proxy asks the engine.
    pub(crate) fn decide(&mut self, id: usize) {
        let Some(call) = self.calls.get(&id) else { return };
        let Some((born, proxy, since)) = call.asked else { return };
        let of = &self.proxies[proxy];
        let Some(pod) = of.pods.get(&born).filter(|_| of.alive) else {
            return self.refused(id, "the pod is gone");
        };
        let request = self.request_of(call, pod);
        let Some(workload) = of.workload(pod) else {
            return self.refused(id, "unknown workload");
        };
        let facts = InboundFacts {
            workload,
            destination: call.target,
            source_ip: request.source,
            peer: request.peer.as_ref(),
        };
        let waits = self.has(Bug::AllowsPending);
        match authorize(&of.snapshot, &facts) {
            Verdict::Allow(_) => self.admitted(id, proxy, request),
            Verdict::Pending(_) if waits => self.admitted(id, proxy, request),
            Verdict::Pending(_) if self.now < since + POLICY_MS => {
                if self.now == since {
                    self.plan(POLICY_MS, Event::Waited { call: id });
                }
                self.counts.pending += 1;
                self.proxies[proxy].pending.push(id);
            }
            Verdict::Pending(refusal) | Verdict::Deny(refusal) => {
                let reason = refusal.reason;
                self.note(24, || format!("call {id}: {reason}"));
                self.counts.denied += 1;
                let latency = self.latency();
                self.plan(latency, Event::Answer { call: id, yes: false });
            }
        }
    }

    pub(crate) fn waited(&mut self, id: usize) {
        let Some(Call { asked: Some((_, proxy, _)), .. }) = self.calls.get(&id) else { return };
        let pending = &mut self.proxies[*proxy].pending;
        if let Some(at) = pending.iter().position(|call| *call == id) {
            pending.remove(at);
            self.decide(id);
        }
    }

    fn admitted(&mut self, id: usize, proxy: usize, mut request: Request) {
        let generation = self.proxies[proxy].generation;
        let Some(call) = self.calls.get_mut(&id) else { return };
        let wire = call.tunnel.as_ref().and_then(|tunnel| tunnel.wire.clone());
        // What really came, whatever the proxy takes it for.
        request.peer = wire.map(|wire| wire.0.peer.clone());
        call.admitted = Some((request.clone(), generation));
        self.check_admitted(id, proxy, &request);
        let latency = self.latency();
        self.plan(latency, Event::Serve { call: id });
    }

    /// The application has answered: from now on the connection is among those that are judged again. Whoever was
    /// judging while it was called did not see it.
    pub(crate) fn serve(&mut self, id: usize) {
        let Some(call) = self.calls.get(&id) else { return };
        let (Some((born, proxy, _)), Some((request, generation))) = (call.asked, &call.admitted)
        else {
            return;
        };
        let of = &self.proxies[proxy];
        let Some(pod) = of.pods.get(&born).filter(|pod| of.alive && self.runs(pod)).cloned() else {
            return self.refused(id, "the pod is gone");
        };
        let live = Live { pod, request: request.clone(), destination: call.target };
        let changed = *generation != of.generation;
        self.proxies[proxy].live.insert(id, live);
        self.made(id, Some(proxy), born);
        if changed {
            if !self.has(Bug::ForgetsTheGap) {
                self.judge_again(proxy);
            }
            self.check_live(proxy);
        }
    }

    fn made(&mut self, id: usize, proxy: Option<usize>, to: u32) {
        let Some(call) = self.calls.get(&id) else { return };
        let wire = call.tunnel.as_ref().and_then(|tunnel| tunnel.wire.clone());
        let (proxies, pods) = ([call.proxy, proxy], [call.from.born, to]);
        self.conns.insert(id, Conn { proxies, pods, wire });
        self.counts.made += 1;
        self.note(25, || format!("call {id} is made"));
        let lives = if self.quiet { 500 } else { self.rng.between(100, 60_000) };
        self.plan(lives, Event::Close { conn: id });
        let latency = self.latency();
        self.plan(latency, Event::Answer { call: id, yes: true });
    }

    /// The caller learns what came of it.
    pub(crate) fn answer(&mut self, id: usize, yes: bool) {
        if yes {
            if let Some(call) = self.calls.remove(&id) {
                self.check_probe(id, &call, true);
            }
        } else {
            self.refused(id, "by the other end");
        }
    }

    /// The call ends without a connection. Policy's no is the last word: no other endpoint is tried.
    fn refused(&mut self, id: usize, why: &'static str) {
        let Some(call) = self.calls.remove(&id) else { return };
        self.note(26, || format!("call {id} fails: {why}"));
        if let Some(wire) = call.tunnel.as_ref().and_then(|tunnel| tunnel.wire.as_ref()) {
            wire.0.streams.set(wire.0.streams.get() - 1);
        }
        self.check_probe(id, &call, false);
    }

    pub(crate) fn close(&mut self, id: usize) {
        let Some(conn) = self.conns.remove(&id) else { return };
        if let Some(wire) = &conn.wire {
            wire.0.streams.set(wire.0.streams.get() - 1);
        }
        if let [_, Some(proxy)] = conn.proxies {
            self.proxies[proxy].live.remove(&id);
        }
    }

    /// Ends what the configuration in force no longer allows.
    pub(crate) fn judge_again(&mut self, id: usize) {
        let proxy = &self.proxies[id];
        let mut ended = Vec::new();
        for (conn, live) in &proxy.live {
            let Some(workload) = proxy.workload(&live.pod) else { continue };
            let facts = InboundFacts {
                workload,
                destination: live.destination,
                source_ip: live.request.source,
                peer: live.request.peer.as_ref(),
            };
            ended.extend(ended_by(&proxy.snapshot, &facts, false).map(|_| *conn));
        }
        for conn in ended {
            self.counts.ended += 1;
            self.note(27, || format!("call {conn} is no longer allowed"));
            self.close(conn);
        }
    }
}
