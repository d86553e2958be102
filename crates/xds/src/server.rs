//! The server's half of a delta discovery stream: what a proxy should hold, and one [`Connection`] per
//! stream that works out what to send next.
//!
//! Invariants:
//! - Additions travel Origin, Authorization, Address, Subset, Routes; removals the other way round: no proxy ever holds
//!   a reference to a policy, a workload or a subset that was not sent, nor loses one that something still refers to.
//!   Who did not subscribe to routes is sent all changes of addresses at once, since then nothing refers to them.
//! - One response per type is in flight. What changes meanwhile is sent as one difference afterwards.
//! - The marker comes last, once per push, and only to who asked for it.
//! - A push costs a settled connection what changed: differences between two meshes are worked out once
//!   for all connections.
//! - A connection always ends up with the newest [`Resources`], wherever it started from.

mod changes;
mod encoder;
mod resources;
mod sent;

use std::collections::BTreeMap;
use std::sync::Arc;

use model::{ConfigVersion, Str};
use prost::Message;

use crate::any::Any;
use crate::digest::Sum;
use crate::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use crate::{Kind, MARKER_NAME, REFUSED_TYPE, ambit};
pub use changes::Changes;
pub use encoder::{Encoder, Mesh};
pub use resources::{Encoded, Resources};
use sent::{Difference, Sent};

/// Names kept of a refusal: enough to start looking.
const MAX_REFUSED_NAMES: usize = 100;
/// Bytes kept of a proxy's words: they end up in logs and on a page.
const MAX_MESSAGE_BYTES: usize = 4096;

/// What a request meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The proxy wants this type, from now on or from scratch.
    Subscribed(Kind),
    Unsubscribed(Kind),
    /// Enforced by the proxy. A marker says up to which push.
    Acked {
        kind: Kind,
        push: Option<ConfigVersion>,
    },
    Nacked(Nack),
    /// An answer to a response that is no longer the newest, or a type that this server does not have.
    Ignored(String),
}

/// A proxy refused something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nack {
    pub kind: Kind,
    /// The resources it refused, when it says so; else the first ones of the response.
    pub names: Vec<String>,
    /// In the proxy's words.
    pub message: String,
}

/// A request that cannot be served. The stream should end with these words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unserviceable(String);

/// One discovery stream.
#[derive(Debug)]
pub struct Connection {
    desired: Arc<Resources>,
    types: [Subscription; Kind::ALL.len()],
    last_nonce: u64,
    acked: Option<ConfigVersion>,
    marker_due: bool,
}

#[derive(Debug, Default)]
struct Subscription {
    active: bool,
    sent: Sent,
    in_flight: Option<InFlight>,
    /// Began with what an earlier stream left behind.
    resumed: bool,
    /// A subscription is answered even when there is nothing to send: the proxy waits for it.
    answer_due: bool,
    /// `sent` has every desired resource, and none but these.
    added: bool,
    removed: bool,
}

#[derive(Debug)]
struct InFlight {
    nonce: String,
    names: Vec<Str>,
    push: ConfigVersion,
}

impl Connection {
    pub fn new(desired: Arc<Resources>) -> Self {
        Self { desired, types: Default::default(), last_nonce: 0, acked: None, marker_due: true }
    }

    /// A newer state of the mesh. Call [`Self::next_response`] afterwards.
    pub fn set(&mut self, desired: Arc<Resources>) {
        self.desired = desired;
        self.marker_due = true;
        for subscription in &mut self.types {
            subscription.added = false;
            subscription.removed = false;
        }
    }

    /// The last push that the proxy enforces in full, as far as it said so.
    pub fn acked(&self) -> Option<ConfigVersion> {
        self.acked
    }

    /// Whether everything has been sent and answered.
    pub fn is_settled(&self) -> bool {
        let done = |kind: &Kind| {
            let s = &self.types[kind.index()];
            let added = s.added || self.must_wait(*kind, Part::Added);
            let removed = s.removed || self.must_wait(*kind, Part::Removed);
            let answered = !s.answer_due || self.must_wait(*kind, Part::Both);
            !s.active || (added && removed && answered && s.in_flight.is_none())
        };
        let marker = &self.types[Kind::Marker.index()];
        Kind::CONFIGURATION.iter().all(done)
            && (!marker.active || (!self.marker_due && marker.in_flight.is_none()))
    }

    /// Takes a request in. Call [`Self::next_response`] afterwards.
    pub fn request(&mut self, request: DeltaDiscoveryRequest) -> Result<Event, Unserviceable> {
        let Some(kind) = Kind::from_type_url(&request.type_url) else {
            return Ok(Event::Ignored(format!(
                "no such type here: {}",
                short(&request.type_url, 256)
            )));
        };
        let answer = self.answer(kind, &request);
        let active = self.types[kind.index()].active;
        let all = |names: &[String]| names.iter().any(|name| name == "*");
        let (subscribe, unsubscribe) =
            (&request.resource_names_subscribe, &request.resource_names_unsubscribe);
        if all(subscribe) && all(unsubscribe) || subscribe.iter().any(|name| name != "*") {
            return Err(Unserviceable(format!(
                "{kind}: this control plane serves whole types only; switch on-demand xDS off in the proxy"
            )));
        }
        if all(unsubscribe) {
            self.types[kind.index()] = Subscription::default();
            return Ok(Event::Unsubscribed(kind));
        }
        // The first request of a type subscribes to all of it; "*" later means: all of it, once more.
        if all(subscribe) || (!active && request.response_nonce.is_empty()) {
            self.subscribe(kind, request.initial_resource_versions);
            return Ok(Event::Subscribed(kind));
        }
        Ok(answer.unwrap_or_else(|| Event::Ignored(format!("{kind}: not the newest nonce"))))
    }

    /// The next response to send, if anything may be sent now. Call it until it returns `None`.
    pub fn next_response(&mut self) -> Option<DeltaDiscoveryResponse> {
        // What refers must not overtake what it refers to: the first step that has something to send
        // and must wait holds back all later ones.
        let routes = self.types[Kind::Routes.index()].active;
        let steps = [
            (Kind::Origin, Part::Added),
            (Kind::Authorization, Part::Added),
            (Kind::Address, if routes { Part::Added } else { Part::Both }),
            (Kind::Subset, Part::Added),
            (Kind::Routes, Part::Both),
            (Kind::Subset, Part::Removed),
            (Kind::Address, Part::Removed),
            (Kind::Authorization, Part::Removed),
            (Kind::Origin, Part::Removed),
        ];
        for (kind, part) in steps {
            if self.must_wait(kind, part) {
                continue;
            }
            let (resources, removed) = self.difference(kind, part);
            let subscription = &self.types[kind.index()];
            if resources.is_empty() && removed.is_empty() && !subscription.answer_due {
                continue;
            }
            if subscription.in_flight.is_some() {
                return None;
            }
            return Some(self.send(kind, part, resources, removed));
        }
        self.next_marker()
    }

    /// A proxy subscribes type by type. Until it has named its addresses, they may still refer to a policy that is gone;
    /// and what refers to addresses waits for them.
    fn must_wait(&self, kind: Kind, part: Part) -> bool {
        if self.types[Kind::Address.index()].active {
            return false;
        }
        match kind {
            Kind::Origin | Kind::Authorization => {
                part == Part::Removed && self.types[kind.index()].resumed
            }
            Kind::Subset | Kind::Routes => true,
            Kind::Address | Kind::Marker => false,
        }
    }

    /// Settles the response that this request answers, if it does.
    fn answer(&mut self, kind: Kind, request: &DeltaDiscoveryRequest) -> Option<Event> {
        let subscription = &mut self.types[kind.index()];
        let answered = subscription.in_flight.take_if(|sent| {
            !request.response_nonce.is_empty() && sent.nonce == request.response_nonce
        })?;
        let Some(error) = &request.error_detail else {
            let push = (kind == Kind::Marker).then_some(answered.push);
            self.acked = push.or(self.acked);
            return Some(Event::Acked { kind, push });
        };
        let listed = error.details.iter().find(|any| any.type_url == REFUSED_TYPE);
        let listed = listed.and_then(|any| ambit::Refused::decode(any.value.clone()).ok());
        let mut names = match listed {
            Some(refused) => refused.names,
            None => answered.names.iter().map(ToString::to_string).collect(),
        };
        names.truncate(MAX_REFUSED_NAMES);
        Some(Event::Nacked(Nack { kind, names, message: short(&error.message, MAX_MESSAGE_BYTES) }))
    }

    fn subscribe(&mut self, kind: Kind, versions: BTreeMap<String, String>) {
        let subscription = &mut self.types[kind.index()];
        let versions = versions.into_iter();
        let mut sent = Sent::stated(versions.map(|(name, version)| (name.into(), version.into())));
        // What is still on its way will be held too, and it is not known in which version.
        for name in subscription.in_flight.iter().flat_map(|sent| &sent.names) {
            sent.set(name.clone(), "".into());
        }
        *subscription = Subscription {
            active: true,
            resumed: !sent.is_empty(),
            sent,
            in_flight: subscription.in_flight.take(),
            answer_due: kind != Kind::Marker,
            added: false,
            removed: false,
        };
        self.marker_due = true;
    }

    /// What the proxy lacks, and what it should no longer have, ready to be sent.
    fn difference(&mut self, kind: Kind, part: Part) -> (Vec<Resource>, Vec<String>) {
        let subscription = &mut self.types[kind.index()];
        let known = match part {
            Part::Added => subscription.added,
            Part::Removed => subscription.removed,
            Part::Both => subscription.added && subscription.removed,
        };
        if !subscription.active || known {
            return (Vec::new(), Vec::new());
        }
        let Difference { set, removed } = subscription.sent.difference(kind, part, &self.desired);
        let set: Vec<_> = set.into_iter().map(|(name, e)| on_wire(kind, name, e)).collect();
        let removed: Vec<_> = removed.into_iter().map(ToString::to_string).collect();
        if set.is_empty() && removed.is_empty() {
            subscription.done(part, &self.desired);
        }
        (set, removed)
    }

    fn send(
        &mut self,
        kind: Kind,
        part: Part,
        resources: Vec<Resource>,
        removed_resources: Vec<String>,
    ) -> DeltaDiscoveryResponse {
        let subscription = &mut self.types[kind.index()];
        let mut names = Vec::with_capacity(resources.len());
        for resource in &resources {
            let name: Str = resource.name.as_str().into();
            names.push(name.clone());
            subscription.sent.set(name, resource.version.as_str().into());
        }
        for name in &removed_resources {
            subscription.sent.remove(name.as_str().into());
        }
        subscription.done(part, &self.desired);
        subscription.answer_due = false;
        self.respond(kind, resources, removed_resources, names)
    }

    fn next_marker(&mut self) -> Option<DeltaDiscoveryResponse> {
        let marker = &self.types[Kind::Marker.index()];
        if !marker.active || !self.marker_due || marker.in_flight.is_some() {
            return None;
        }
        self.marker_due = false;
        let sent =
            |kind: &Kind| self.types[kind.index()].active && !self.must_wait(*kind, Part::Added);
        let kinds = Kind::CONFIGURATION.into_iter().filter(sent);
        let push = self.desired.push();
        let message = ambit::PushMarker {
            epoch: push.epoch,
            number: push.number,
            holdings: kinds
                .map(|kind| {
                    let Sum { count, sum } = self.desired.sum(kind);
                    ambit::Holding { type_url: kind.type_url().to_owned(), count, sum }
                })
                .collect(),
        };
        let encoded = Encoded::new(MARKER_NAME, message.encode_to_vec());
        let resource = on_wire(Kind::Marker, MARKER_NAME, &encoded);
        Some(self.respond(Kind::Marker, vec![resource], Vec::new(), vec![MARKER_NAME.into()]))
    }

    fn respond(
        &mut self,
        kind: Kind,
        resources: Vec<Resource>,
        removed_resources: Vec<String>,
        names: Vec<Str>,
    ) -> DeltaDiscoveryResponse {
        self.last_nonce += 1;
        let nonce = self.last_nonce.to_string();
        let push = self.desired.push();
        self.types[kind.index()].in_flight = Some(InFlight { nonce: nonce.clone(), names, push });
        DeltaDiscoveryResponse {
            system_version_info: push.to_string(),
            resources,
            type_url: kind.type_url().to_owned(),
            nonce,
            removed_resources,
        }
    }
}

/// Which half of a difference a step sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Added,
    Removed,
    Both,
}

impl Subscription {
    /// This part of the newest mesh has been sent.
    fn done(&mut self, part: Part, desired: &Arc<Resources>) {
        self.added |= part != Part::Removed;
        self.removed |= part != Part::Added;
        if self.added && self.removed {
            self.sent.settle(desired);
        }
    }
}

fn on_wire(kind: Kind, name: &str, encoded: &Encoded) -> Resource {
    Resource {
        version: encoded.version.to_string(),
        resource: Some(Any { type_url: kind.type_url().to_owned(), value: encoded.value.clone() }),
        name: name.to_owned(),
        aliases: Vec::new(),
    }
}

/// At most `max` bytes of a peer's words.
fn short(words: &str, max: usize) -> String {
    let end = (0..=max.min(words.len())).rev().find(|end| words.is_char_boundary(*end));
    words[..end.unwrap_or(0)].to_owned()
}

#[cfg(test)]
mod tests;
