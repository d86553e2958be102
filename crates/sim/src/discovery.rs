//! Discovery streams and certificates: messages between proxies and control planes. Within a stream nothing
//! overtakes anything; streams stall, break and are opened anew.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use engine::Rotation;
use model::{Change, Identity};
use xds::Kind;
use xds::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};

use crate::check::Violation;
use crate::control::Replica;
use crate::proxy::{Cert, Holds, own_identity};
use crate::world::{EPOCH, Event, Place, Sim};
use crate::{Bug, Fault};

/// Requests that may wait for the wire (the real proxy says the same).
const MAX_REQUESTS: usize = 32;
/// After this long without a word the other end counts as gone.
pub(crate) const KEEPALIVE_MS: u64 = 30_000;
/// The real CA's allowance for clocks that differ.
const BACKDATE: u64 = 120;

/// Which end of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Proxy,
    Server,
}

/// The wires of one stream.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) proxy: usize,
    pub(crate) replica: usize,
    up: VecDeque<DeltaDiscoveryRequest>,
    down: VecDeque<DeltaDiscoveryResponse>,
    /// When the last message of each direction arrives.
    up_at: u64,
    down_at: u64,
}

impl Sim {
    pub(crate) fn new_replica(&mut self, knows: usize) -> Replica {
        self.epochs += 1;
        let replica = Replica::start(self.epochs, knows, &self.contents[knows]);
        self.pushes.insert(replica.desired.push().to_string(), knows);
        replica
    }

    pub(crate) fn learn(&mut self, replica: usize, content: usize) {
        let of = &mut self.replicas[replica];
        // News may overtake each other; who knows the newer state ignores the older.
        if !of.up || content <= of.knows || !of.learn(content, &self.contents[content]) {
            return;
        }
        let push = of.desired.push().to_string();
        self.note(1, || format!("replica {replica} pushes {push}, content {content}"));
        self.pushes.insert(push, content);
        let streams: Vec<_> = self.replicas[replica].streams.keys().copied().collect();
        streams.into_iter().for_each(|stream| self.respond(stream));
    }

    /// A proxy tries to open a stream.
    pub(crate) fn connect(&mut self, id: usize) {
        let wall = self.wall(self.proxies[id].node);
        let proxy = &self.proxies[id];
        if !proxy.alive || proxy.stream.is_some() {
            return;
        }
        // Without a certificate it waits; a new one brings it back here, or the next look at the clock.
        let own = proxy.certificate(&own_identity(), wall);
        self.proxies[id].waits_for_certificate = own.is_none();
        let (proxy, Some(own)) = (&self.proxies[id], own) else {
            let tick = u64::try_from(engine::TICK.as_millis()).unwrap_or(u64::MAX);
            return self.plan(tick, Event::Connect { proxy: id });
        };
        let (node, replica) = (proxy.node, self.rng.index(self.replicas.len()));
        let cut = self.cut_until(Place::Node(node), Place::Replica(replica)).is_some();
        let stream = self.id();
        if cut || !self.replicas[replica].up {
            return self.connect_later(id, if cut { 5_000 } else { 1 });
        }
        if !own.0.valid_at(self.true_wall()) {
            self.note(2, || format!("proxy {id} is refused by replica {replica}: its certificate"));
            self.proxies[id].renewals.own_refused(Duration::from_millis(self.now));
            self.look(id);
            return self.connect_later(id, 10);
        }
        if !self.replicas[replica].open(stream, node) {
            self.note(3, || format!("proxy {id} has too many streams at replica {replica}"));
            return self.connect_later(id, 10);
        }
        self.note(4, || {
            format!("proxy {id} on node {node} opens stream {stream} to replica {replica}")
        });
        let (up, down) = (VecDeque::new(), VecDeque::new());
        let wires = Stream { proxy: id, replica, up, down, up_at: 0, down_at: 0 };
        self.streams.insert(stream, wires);
        self.proxies[id].stream = Some(stream);
        // The server ends a stream with the certificate that opened it.
        let ends = own.0.not_after.saturating_sub(EPOCH).saturating_mul(1000);
        self.plan_at(ends, Event::Break { stream, end: End::Server });
        let requests = self.proxies[id].client.connect();
        self.request(stream, requests);
    }

    fn connect_later(&mut self, proxy: usize, tried_for: u64) {
        let rand = self.rng.next();
        let pause = self.proxies[proxy].client.retry_in(rand).as_millis();
        let pause = u64::try_from(pause).unwrap_or(u64::MAX);
        self.plan(tried_for + pause, Event::Connect { proxy });
    }

    fn request(&mut self, stream: usize, requests: Vec<DeltaDiscoveryRequest>) {
        let latency = self.latency();
        let Some(wires) = self.streams.get_mut(&stream) else { return };
        wires.up_at = wires.up_at.max(self.now + latency);
        let (at, count) = (wires.up_at, requests.len());
        wires.up.extend(requests);
        let waiting = wires.up.len();
        for _ in 0..count {
            self.plan_at(at, Event::Deliver { stream, end: End::Server });
        }
        if waiting > MAX_REQUESTS {
            self.violate(Violation::Unbounded, || format!("{waiting} requests wait on a stream"));
        }
    }

    /// Sends what is due on a stream.
    fn respond(&mut self, stream: usize) {
        let latency = self.latency();
        let Some(wires) = self.streams.get_mut(&stream) else { return };
        let Some(end) = self.replicas[wires.replica].streams.get_mut(&stream) else { return };
        wires.down_at = wires.down_at.max(self.now + latency);
        let (at, mut count) = (wires.down_at, 0);
        while let Some(response) = end.connection.next_response() {
            wires.down.push_back(response);
            count += 1;
        }
        let waiting = wires.down.len();
        for _ in 0..count {
            self.plan_at(at, Event::Deliver { stream, end: End::Proxy });
        }
        if waiting > Kind::ALL.len() {
            self.violate(Violation::Unbounded, || format!("{waiting} responses wait on a stream"));
        }
    }

    /// The next message of a stream arrives, unless the link is cut: then it does later.
    pub(crate) fn deliver(&mut self, stream: usize, end: End) {
        let Some(wires) = self.streams.get(&stream) else { return };
        let (proxy, replica) = (wires.proxy, wires.replica);
        let node = self.proxies[proxy].node;
        if let Some(until) = self.cut_until(Place::Node(node), Place::Replica(replica)) {
            return self.plan_at(until + 1, Event::Deliver { stream, end });
        }
        match end {
            End::Server => self.server_hears(stream, replica),
            End::Proxy => self.proxy_hears(stream, proxy),
        }
    }

    fn server_hears(&mut self, stream: usize, replica: usize) {
        let request = self.streams.get_mut(&stream).and_then(|wires| wires.up.pop_front());
        let end = self.replicas[replica].streams.get_mut(&stream);
        let (Some(request), Some(end)) = (request, end) else { return };
        if let Err(e) = end.connection.request(request) {
            return self.violate(Violation::Protocol, || format!("our own proxy is refused: {e}"));
        }
        self.respond(stream);
    }

    fn proxy_hears(&mut self, stream: usize, id: usize) {
        let response = self.streams.get_mut(&stream).and_then(|wires| wires.down.pop_front());
        let Some(response) = response else { return };
        let proxy = &self.proxies[id];
        // What an earlier stream still had on its way is not read any more.
        if !proxy.alive || (proxy.stream != Some(stream) && !self.has(Bug::OldStream)) {
            return;
        }
        // Policies more often: what refers to one that is missing must wait.
        let policies = response.type_url == Kind::Authorization.type_url();
        if self.rng.chance(if policies { 8 } else { 1 }) && !self.spared(Fault::Missed) {
            return self.lose(stream, id, response);
        }
        self.apply(stream, id, response);
    }

    /// The control plane is wrong about what this proxy has: a response gets lost, and its acknowledgement is made up.
    /// The stream does not live long after that.
    fn lose(&mut self, stream: usize, id: usize, response: DeltaDiscoveryResponse) {
        let kind = response.type_url;
        self.note(5, || format!("proxy {id} loses a response of {kind}"));
        self.proxies[id].missed();
        let (type_url, response_nonce) = (kind, response.nonce);
        let made_up = DeltaDiscoveryRequest { type_url, response_nonce, ..Default::default() };
        // Nor are its requests fast, so that it stays without for a while.
        let late = self.now + self.rng.between(0, 5_000);
        if let Some(wires) = self.streams.get_mut(&stream) {
            wires.up_at = wires.up_at.max(late);
        }
        self.request(stream, vec![made_up]);
        let within = self.rng.between(1, KEEPALIVE_MS);
        self.plan(within, Event::Break { stream, end: End::Proxy });
    }

    /// Puts a response into force, judges what lives, and then answers: as the real proxy does.
    fn apply(&mut self, stream: usize, id: usize, response: DeltaDiscoveryResponse) {
        let content = self.pushes.get(&response.system_version_info).copied();
        let kind = Kind::from_type_url(&response.type_url);
        let marker = kind == Some(Kind::Marker);
        let forgets = self.has(Bug::AcksUnread) && self.rng.chance(10);
        let proxy = &mut self.proxies[id];
        let mut batch = proxy.client.handle(response);
        if forgets && !marker {
            batch.changes.pop();
        }
        let refused = batch.refused.len();
        let mismatches = batch.mismatches.len();
        let (changes, answers) = (batch.changes, batch.receipt.answers());
        let version = changes.iter().rev().find_map(|change| match change {
            Change::SetVersion(version) => Some(*version),
            _ => None,
        });
        let count = changes.len();
        if !changes.is_empty() {
            proxy.snapshot = Arc::new(proxy.snapshot.with(changes));
        }
        match (content, kind) {
            (Some(content), _) if version.is_some() => {
                (proxy.holds, proxy.holed) = (Holds::exactly(content), false);
            }
            (Some(content), Some(kind)) if !marker => proxy.took(kind, content),
            _ => {}
        }
        let holed = proxy.holed;
        self.note(6, || {
            format!(
                "proxy {id} takes {count} changes of content {content:?}, acknowledged {version:?}"
            )
        });
        if count > 0 {
            self.published(id);
        }
        if refused > 0 || (mismatches > 0 && !holed) {
            self.violate(Violation::Protocol, || {
                format!("proxy {id}: {refused} refused, {mismatches} mismatches")
            });
        }
        if let (Some(_), Some(content)) = (version, content) {
            self.counts.acks += 1;
            self.check_enforced(id, content);
        }
        self.request(stream, answers);
    }

    /// A new configuration is in force.
    fn published(&mut self, id: usize) {
        self.proxies[id].generation += 1;
        if !self.has(Bug::NeverJudgesAgain) {
            self.judge_again(id);
        }
        self.check_live(id);
        let proxy = &mut self.proxies[id];
        let pending = std::mem::take(&mut proxy.pending);
        if !std::mem::replace(&mut proxy.save_planned, true) {
            self.plan(1_000, Event::Save { proxy: id });
        }
        pending.into_iter().for_each(|call| self.decide(call));
    }

    pub(crate) fn save(&mut self, id: usize) {
        let proxy = &mut self.proxies[id];
        proxy.save_planned = false;
        if proxy.alive {
            self.machines[proxy.node].disk = proxy.to_disk();
        }
    }

    /// An end of a stream notices that it is over; the other one does a moment later.
    pub(crate) fn break_stream(&mut self, stream: usize, end: End) {
        let Some(wires) = self.streams.get(&stream) else { return };
        let (proxy, replica) = (wires.proxy, wires.replica);
        match end {
            End::Proxy if self.proxies[proxy].stream == Some(stream) => {
                self.note(7, || format!("proxy {proxy} loses stream {stream}"));
                self.proxies[proxy].stream = None;
                self.plan(5, Event::Break { stream, end: End::Server });
                self.connect_later(proxy, 0);
            }
            End::Server => {
                if self.has(Bug::LeaksStreams) {
                    return self.break_stream(stream, End::Proxy);
                }
                if self.replicas[replica].streams.remove(&stream).is_some() {
                    self.plan(5, Event::Break { stream, end: End::Proxy });
                }
            }
            End::Proxy => {}
        }
        let open = self.replicas[replica].streams.contains_key(&stream);
        let wires = self.streams.get(&stream);
        let read = self.has(Bug::OldStream) && wires.is_some_and(|wires| !wires.down.is_empty());
        if !open && self.proxies[proxy].stream != Some(stream) && !read {
            self.streams.remove(&stream);
        }
    }

    /// Asks the CA for what is due.
    pub(crate) fn look(&mut self, id: usize) {
        let (now, wall) = (Duration::from_millis(self.now), self.wall(self.proxies[id].node));
        let proxy = &mut self.proxies[id];
        if !proxy.alive {
            return;
        }
        proxy.look += 1;
        let begin = proxy.renewals.begin(now, wall, proxy.asking);
        for (identity, _) in &begin.expired {
            proxy.certs.remove(identity);
        }
        proxy.asking += begin.ask.len();
        let (look, asking) = (proxy.look, proxy.asking);
        for identity in begin.ask {
            let latency = self.latency();
            self.note(8, || format!("proxy {id} asks for {identity}"));
            self.plan(latency, Event::CaRequest { proxy: id, identity });
        }
        let next = u64::try_from(begin.next.as_millis()).unwrap_or(u64::MAX);
        self.plan_at(next, Event::Look { proxy: id, look });
        if asking > engine::MAX_REQUESTS {
            self.violate(Violation::Unbounded, || format!("{asking} requests to the CA at once"));
        }
    }

    pub(crate) fn ca_request(&mut self, proxy: usize, identity: Identity) {
        let node = self.proxies[proxy].node;
        let at = self.rng.index(self.replicas.len());
        let replica = &self.replicas[at];
        let cut = self.cut_until(Place::Node(node), Place::Replica(at)).is_some();
        let known = &self.contents[replica.knows];
        let dates = if !replica.up {
            Err("nobody listens")
        } else if !replica.signs {
            Err("the CA is broken")
        } else if identity != own_identity() && !replica.may_sign(node, &identity, known) {
            Err("no pod on this node")
        } else {
            let now = self.true_wall();
            let not_before = now - BACKDATE.min(self.life / 10);
            Ok(Rotation { not_before, not_after: now + self.life })
        };
        let answer = |dates| Event::CaAnswer { proxy, identity, dates };
        if cut || self.lost() {
            return self.plan(10_000, answer(Err("no answer")));
        }
        let latency = self.latency();
        self.plan(latency, answer(dates));
    }

    pub(crate) fn ca_answer(
        &mut self,
        id: usize,
        identity: &Identity,
        dates: Result<Rotation, &'static str>,
    ) {
        let (now, rand) = (Duration::from_millis(self.now), self.rng.next());
        let node = self.proxies[id].node;
        let wall = self.wall(node);
        // What our own clock calls invalid is not taken.
        let dates = dates.and_then(|d| d.valid_at(wall).then_some(d).ok_or("wrong clock"));
        self.note(9, || format!("proxy {id}: the CA says {dates:?} for {identity}"));
        let forgets = self.has(Bug::ForgetsFailures);
        let proxy = &mut self.proxies[id];
        if !proxy.alive {
            return;
        }
        proxy.asking -= 1;
        match dates {
            Ok(dates) => {
                if proxy.renewals.issued(identity, dates, now, wall, rand) {
                    proxy.certs.insert(identity.clone(), Cert(dates));
                    self.machines[node].secrets.insert(identity.clone(), Cert(dates));
                }
                if *identity == own_identity() && self.proxies[id].waits_for_certificate {
                    self.connect(id);
                }
            }
            Err(_) if forgets => {}
            Err(error) => {
                proxy.renewals.failed(identity, error.to_owned(), now, rand);
            }
        }
        self.look(id);
    }
}
