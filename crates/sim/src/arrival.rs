//! Connections where they arrive: judged, served, judged again, closed. Judging is `engine`'s.

use engine::{InboundFacts, Verdict, authorize, ended_by};

use crate::Bug;
use crate::content::Pod;
use crate::oracle::Request;
use crate::proxy::{Live, Wire};
use crate::traffic::Call;
use crate::world::{Event, Sim};

/// How long the real proxy waits for a policy in flight, in milliseconds.
const POLICY_MS: u64 = 1_000;

/// A connection that was made.
#[derive(Debug)]
pub(crate) struct Conn {
    /// The proxies at its ends, if the pods are in the mesh, and the pods.
    pub(crate) proxies: [Option<usize>; 2],
    pub(crate) pods: [u32; 2],
    wire: Option<Wire>,
}

impl Sim {
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
        let source = wire.map_or_else(|| call.from.ip(), |wire| wire.0.source);
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
            client: None,
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
    pub(crate) fn refused(&mut self, id: usize, why: &'static str) {
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
                client: None,
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
