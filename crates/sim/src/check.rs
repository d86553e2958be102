//! What must hold, whatever happened: each check looks at the world from outside and asks nobody of those it
//! checks.

use std::net::SocketAddr;

use xds::Kind;

use crate::content::{Content, PODS, PORTS, Pod, vip};
use crate::control::{Compiled, MAX_STREAMS_PER_NODE};
use crate::oracle::{Denied, Mix, Request, judge};
use crate::proxy::{Holds, Proxy, TUNNELS, own_identity};
use crate::traffic::Call;
use crate::world::{Event, REPLICAS, Sim};

/// Calls, connections and planned events at once, at most. Some dozens are usual.
const MAX_CALLS: usize = 300;
const MAX_EVENTS: usize = 1_000;
/// Calls that are tried when everything has settled, and how long they may take.
const PROBES: usize = 4;
const PROBE_MS: u64 = 15_000;
/// A stream ends with its certificate, also at the moment of a look: that often it is looked at again, so much later.
const LOOKS: u32 = 3;
const LOOK_MS: u64 = 5_000;

/// What went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Violation {
    /// Plaintext was let in where mTLS is demanded.
    PlaintextIn = 1,
    /// Plaintext was sent to a workload that is known to be of the mesh.
    PlaintextOut,
    /// A connection was let in that every version the proxy may hold denies.
    Denied,
    /// A connection lives that every version the proxy may hold denies.
    LivesOn,
    /// A proxy acknowledged a version and holds something else.
    NotEnforced,
    /// An identity was shown that is not the caller's, or from another's address.
    WrongTunnel,
    /// A certificate was used after its end.
    Expired,
    /// Ends of the protocol that disagree without cause.
    Protocol,
    /// All is quiet, and a proxy holds something else than users want.
    NotConverged,
    /// All is quiet, and a certificate is missing.
    NoCertificate,
    /// All is quiet, and a tunnel is kept that nobody can use.
    DeadTunnel,
    /// All is quiet, and a process that should have ended is there.
    Undrained,
    /// All is quiet, and a connection that is allowed fails, or one that is not is made.
    WrongAnswer,
    /// Something grows without limit.
    Unbounded,
}

impl Sim {
    fn mix_of<'a>(&'a self, proxy: &Proxy) -> Mix<'a> {
        let Holds { sent, policies, addresses } = &proxy.holds;
        let content = |content: &usize| &self.contents[*content].content;
        Mix {
            sent: sent.iter().map(content).collect(),
            policies: policies.as_ref().map(content),
            addresses: addresses.as_ref().map(content),
        }
    }

    /// Plaintext leaves a pod of the mesh.
    pub(crate) fn check_plaintext_out(&mut self, id: usize, proxy: usize, to: SocketAddr) {
        let mix = self.mix_of(&self.proxies[proxy]);
        let of_mesh = |content: &&Content| {
            let service = (0..2).any(|s| content.services[s] && vip(s) == to.ip());
            let mut pods = content.pods.iter().flatten();
            service || pods.any(|pod| pod.ip() == to.ip() && pod.enrolled)
        };
        if mix.places().iter().all(of_mesh) {
            self.violate(Violation::PlaintextOut, || {
                format!("call {id} goes to {to} in plaintext")
            });
        }
    }

    /// A proxy lets a connection in.
    pub(crate) fn check_admitted(&mut self, id: usize, proxy: usize, request: &Request) {
        let mix = self.mix_of(&self.proxies[proxy]);
        let exact = mix.sent.len() == 1;
        let verdict = judge(&mix, request, false);
        self.counts.exact += u64::from(exact);
        self.counts.admitted += 1;
        if let Err(denied) = verdict {
            let violation = match denied {
                Denied::Plaintext => Violation::PlaintextIn,
                Denied::Policy | Denied::Unknown => Violation::Denied,
            };
            self.violate(violation, || {
                format!("call {id} was let in by proxy {proxy}: {request:?}, {denied:?}")
            });
        }
    }

    /// A proxy has judged again what lives.
    pub(crate) fn check_live(&mut self, id: usize) {
        let proxy = &self.proxies[id];
        let mix = self.mix_of(proxy);
        let denied = proxy.live.iter().find_map(|(conn, live)| {
            let denied = judge(&mix, &live.request, true).err()?;
            // A pod that no version knows is on its way out, and its connections with it.
            (denied != Denied::Unknown)
                .then(|| format!("call {conn}: {:?}, {denied:?}", live.request))
        });
        if let Some(words) = denied {
            self.violate(Violation::LivesOn, || format!("at proxy {id}, {words}"));
        }
    }

    /// A proxy says that it holds a content.
    pub(crate) fn check_enforced(&mut self, id: usize, content: usize) {
        let problem = differs(&self.proxies[id], &self.contents[content]);
        if let Some(what) = problem {
            self.violate(Violation::NotEnforced, || {
                format!("proxy {id} acknowledged content {content}, but {what}")
            });
        }
    }

    /// A certificate is used.
    pub(crate) fn check_certificate(&mut self, id: usize, not_after: u64, wall: u64) {
        if not_after <= wall {
            self.violate(Violation::Expired, || {
                format!("call {id} {} s too late", wall - not_after)
            });
        }
    }

    /// Nothing grows without limit. Cheap: after every event.
    pub(crate) fn check_bounds(&mut self) {
        let sizes = [self.calls.len(), self.conns.len(), self.queued()];
        let streams = self.streams.len();
        let most = REPLICAS * MAX_STREAMS_PER_NODE * crate::content::NODES;
        if sizes[0] > MAX_CALLS || sizes[1] > MAX_CALLS || sizes[2] > MAX_EVENTS || streams > most {
            self.violate(Violation::Unbounded, || {
                format!("calls, connections, events: {sizes:?}; {streams} streams")
            });
        }
    }

    /// Everything has had its time.
    pub(crate) fn settled(&mut self) {
        if std::mem::replace(&mut self.probing, true) {
            if let Some((id, _)) = self.calls.iter().find(|(_, call)| call.expected.is_some()) {
                let id = *id;
                self.violate(Violation::WrongAnswer, || format!("call {id} has no answer at all"));
            }
            self.done = true;
            return;
        }
        let alive: Vec<_> = (0..self.proxies.len()).filter(|id| self.proxies[*id].alive).collect();
        for id in alive {
            let Some((violation, words)) = self.unsettled(id) else { continue };
            self.looks += 1;
            if self.looks > LOOKS {
                return self.violate(violation, || format!("proxy {id} {words}"));
            }
            self.probing = false;
            return self.plan(LOOK_MS, Event::Probe);
        }
        for _ in 0..PROBES {
            self.probe();
        }
        self.plan(PROBE_MS, Event::Probe);
    }

    /// What a proxy lacks.
    fn unsettled(&self, id: usize) -> Option<(Violation, String)> {
        let proxy = &self.proxies[id];
        if proxy.draining.is_some() {
            return Some((Violation::Undrained, "drains for ever".to_owned()));
        }
        let lagging = |words: &str| Some((Violation::NotConverged, words.to_owned()));
        let wires = proxy.stream.and_then(|stream| Some((stream, self.streams.get(&stream)?)));
        let end = wires.and_then(|(stream, wires)| {
            let replica = &self.replicas[wires.replica];
            Some((replica.streams.get(&stream)?, replica.desired.push()))
        });
        let Some((end, push)) = end else { return lagging("has no stream") };
        if let Some(what) = differs(proxy, self.newest()) {
            return lagging(&what);
        }
        if !end.connection.is_settled() || proxy.snapshot.version() != push {
            return lagging("is not settled");
        }
        let wall = self.wall(proxy.node);
        let wanted = proxy.pods.values().map(Pod::identity).chain([own_identity()]);
        let lacks = wanted.into_iter().find(|identity| {
            proxy.certificate(identity, wall).is_none_or(|cert| !cert.0.valid_at(wall))
        });
        if let Some(identity) = lacks {
            return Some((Violation::NoCertificate, format!("has none for {identity}")));
        }
        let (tunnels, keys) = (proxy.pool.tunnels().count(), proxy.pool.keys());
        (keys > 0 || !proxy.dials.is_empty()).then(|| {
            let words = format!("has {tunnels} tunnels of {keys} keys, and nobody calls");
            (Violation::DeadTunnel, words)
        })
    }

    /// A call whose answer is known beforehand.
    fn probe(&mut self) {
        let (from, to) = (self.rng.index(PODS), self.rng.index(PODS));
        let port = PORTS[self.rng.index(2)];
        let content = self.content();
        let (Some(source), Some(target)) = (&content.pods[from], &content.pods[to]) else { return };
        if from == to || !self.runs(source) || !self.runs(target) {
            return;
        }
        let peer = source.enrolled.then(|| source.identity());
        let request = Request { to, port, source: source.ip(), peer };
        let expected = !target.enrolled || judge(&Mix::of(content), &request, false).is_ok();
        self.counts.probes += 1;
        self.call(from, to, port, Some(expected));
    }

    pub(crate) fn check_probe(&mut self, id: usize, call: &Call, made: bool) {
        if call.expected.is_some_and(|expected| expected != made) {
            self.violate(Violation::WrongAnswer, || {
                format!(
                    "call {id} to {} was {}made",
                    call.destination,
                    if made { "" } else { "not " }
                )
            });
        }
    }

    /// The pool's own limit.
    pub(crate) fn check_pool(&mut self, id: usize) {
        let tunnels = self.proxies[id].pool.tunnels().count();
        // Dials of several keys may end at once, each counted before the others.
        if tunnels > 2 * TUNNELS {
            self.violate(Violation::Unbounded, || format!("proxy {id} has {tunnels} tunnels"));
        }
    }
}

/// In what a proxy differs from what users want.
fn differs(proxy: &Proxy, wanted: &Compiled) -> Option<String> {
    let (snapshot, mesh) = (&proxy.snapshot, &wanted.mesh);
    let counts =
        [snapshot.workloads().count(), snapshot.services().count(), snapshot.policies().count()];
    let want = [mesh.workloads.len(), mesh.services.len(), mesh.policies.len()];
    if counts != want {
        let kinds = [Kind::Address, Kind::Address, Kind::Authorization];
        return Some(format!("it holds {counts:?} of {kinds:?}, not {want:?}"));
    }
    let workload = mesh.workloads.iter().find(|w| snapshot.workload(&w.uid) != Some(w));
    if let Some(workload) = workload {
        return Some(format!("its {} is another one", workload.uid));
    }
    if let Some(service) = mesh.services.iter().find(|s| snapshot.service(&s.key) != Some(s)) {
        return Some(format!("its {} is another one", service.key));
    }
    let policy = mesh.policies.iter().find(|p| snapshot.policy(&p.key) != Some(p));
    policy.map(|policy| format!("its policy {} is another one", policy.key))
}
