//! The client's half of a delta discovery stream: what this proxy holds, what a response changes in it,
//! and what to answer.
//!
//! The caller feeds each response to [`Client::handle`], puts [`Batch::changes`] into force, and only then
//! sends what [`Receipt::answers`] holds: an acknowledgement means "enforced".
//!
//! Invariants:
//! - A resource that cannot be read is refused by name; the rest of its response is in force. Its last
//!   readable version stays; what was never readable is replaced by something closed
//!   ([`codec::closed_stand_in`], [`codec::closed_address`], [`codec::closed_routes`]).
//! - Across reconnects nothing is forgotten: the server learns what is held and sends the difference.
//! - What a marker says should be held is compared with what was received; a type that differs is asked
//!   for once more from scratch, without giving up what is held meanwhile.

mod held;
mod marker;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use model::{Change, Policy, Str};
use prost::Message;
use rustc_hash::FxHashMap;

use crate::any::Any;
use crate::codec::{self, Address, DecodeError, Defaults, Interner};
use crate::digest;
use crate::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Resource, Status};
use crate::{Kind, REFUSED_TYPE, ambit};
pub use held::{Entry, Held, Saved, What};
use held::{Origins, Table, remove_value};
pub use marker::Mismatch;

/// gRPC's INVALID_ARGUMENT, the code of every refusal.
const INVALID_ARGUMENT: i32 = 3;
/// Refused resources that the text of a refusal explains; the names of all travel beside it.
const MAX_EXPLAINED: usize = 5;
/// First and longest pause between streams. Short at first, as most breaks are restarts of the control
/// plane; long in the end, so that a fleet does not hammer one that is down.
const BACKOFF_MIN_MS: u64 = 10;
const BACKOFF_MAX_MS: u64 = 15_000;

/// What the proxy holds of the control plane's resources.
pub struct Client {
    node: Node,
    defaults: Defaults,
    /// What to ask for, in this order.
    kinds: &'static [Kind],
    interner: Interner,
    /// One for each type of configuration. Empty for what is not asked for.
    tables: [Table; Kind::CONFIGURATION.len()],
    /// Policies as they are in force, to complete them when their origin arrives after them.
    policies: FxHashMap<Str, Arc<Policy>>,
    origins: Origins,
    refused: BTreeMap<(Kind, Str), String>,
    failures: u32,
}

/// What one response means.
#[must_use = "put the changes into force, then send the answers"]
#[derive(Debug)]
pub struct Batch {
    /// In order.
    pub changes: Vec<Change>,
    /// What could not be read, and was answered with a refusal.
    pub refused: Vec<DecodeError>,
    /// A marker contradicts what was received. The types concerned are asked for again.
    pub mismatches: Vec<Mismatch>,
    pub receipt: Receipt,
}

/// Proof of a handled response; to be redeemed when its changes are in force.
#[must_use = "without an answer the server sends nothing more of this type"]
#[derive(Debug)]
pub struct Receipt {
    answers: Vec<DeltaDiscoveryRequest>,
}

impl Receipt {
    /// What to send, once the batch is in force.
    pub fn answers(self) -> Vec<DeltaDiscoveryRequest> {
        self.answers
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sizes = self.tables.each_ref().map(|table| table.entries.size());
        f.debug_struct("Client").field("node", &self.node.id).field("held", &sizes).finish()
    }
}

impl Client {
    /// Asks for what a node's proxy needs.
    pub fn new(node: Node, defaults: Defaults) -> Self {
        Self {
            node,
            defaults,
            kinds: &Kind::OF_NODE,
            interner: Interner::default(),
            tables: std::array::from_fn(|_| Table::default()),
            policies: FxHashMap::default(),
            origins: held::origins(),
            refused: BTreeMap::new(),
            failures: 0,
        }
    }

    /// Asks for these, in this order. Policies and addresses must be among them.
    pub fn asking_for(self, kinds: &'static [Kind]) -> Self {
        Self { kinds, ..self }
    }

    /// Takes in the last good configuration, before the first [`Self::connect`]. What it cannot read (another
    /// version wrote it) is closed as far as that goes, until the control plane sends it again. What is not asked for
    /// is left out: nobody would ever change it.
    pub fn restore(
        &mut self,
        saved: impl IntoIterator<Item = Saved>,
    ) -> (Vec<Change>, Vec<DecodeError>) {
        let (mut changes, mut unreadable) = (Vec::new(), Vec::new());
        // Origins first, so that each policy is made once.
        let (origins, others): (Vec<_>, Vec<_>) = saved
            .into_iter()
            .filter(|saved| self.kinds.contains(&saved.kind))
            .partition(|saved| saved.kind == Kind::Origin);
        for saved in origins.into_iter().chain(others) {
            match self.decode(saved.kind, &saved.name, &saved.value, &mut changes) {
                Ok(what) => {
                    let version = saved.version.as_str().into();
                    let entry = Entry { what, version, hash: saved.hash, received: saved.hash };
                    self.put(saved.kind, &saved.name, entry);
                }
                Err(error) => {
                    let (kind, name) = (saved.kind, &saved.name);
                    if let Some(what) = self.stand_in(kind, name, &saved.value, &mut changes) {
                        self.put(kind, name, Entry { what, ..Entry::unknown() });
                    }
                    unreadable.push(error);
                }
            }
        }
        (changes, unreadable)
    }

    /// What to send first on a new stream, in this order.
    pub fn connect(&mut self) -> Vec<DeltaDiscoveryRequest> {
        self.kinds
            .iter()
            .map(|&kind| {
                let mut initial_resource_versions = BTreeMap::new();
                if let Some(table) = self.tables.get_mut(kind.index()) {
                    table.begin_stream();
                    initial_resource_versions = table.versions(false);
                }
                DeltaDiscoveryRequest {
                    node: Some(self.node.clone()),
                    type_url: kind.type_url().to_owned(),
                    initial_resource_versions,
                    ..Default::default()
                }
            })
            .collect()
    }

    /// Whether everything that decides has been answered on this stream: from then on what is held is
    /// what the control plane wants, and not only what the disk remembered.
    pub fn is_synced(&self) -> bool {
        let decides = |kind: &&Kind| !matches!(kind, Kind::Origin | Kind::Marker);
        self.kinds.iter().filter(decides).all(|kind| self.tables[kind.index()].answered)
    }

    /// Why resources are refused at present.
    pub fn refused(&self) -> impl Iterator<Item = (Kind, &Str, &str)> {
        self.refused.iter().map(|((kind, name), why)| (*kind, name, why.as_str()))
    }

    /// Names and versions of what is held, to write it to disk together with the snapshot of this moment.
    pub fn held(&self) -> Held {
        let tables = Kind::CONFIGURATION.into_iter().zip(&self.tables);
        Held {
            tables: tables.map(|(kind, table)| (kind, table.entries.clone())).collect(),
            origins: self.origins.clone(),
        }
    }

    /// How long to wait before the next stream. Grows from call to call until a response is handled.
    pub fn retry_in(&mut self, rand: u64) -> Duration {
        let doubled =
            BACKOFF_MIN_MS.saturating_mul(1_u64.checked_shl(self.failures).unwrap_or(u64::MAX));
        self.failures = (self.failures + 1).min(32);
        let ceiling = doubled.min(BACKOFF_MAX_MS);
        // The upper half at random: a fleet that lost one server does not come back in one moment.
        Duration::from_millis(ceiling / 2 + rand % (ceiling / 2 + 1))
    }

    /// Works out what a response changes. Batches must be put into force in the order of their responses.
    pub fn handle(&mut self, response: DeltaDiscoveryResponse) -> Batch {
        self.failures = 0;
        let DeltaDiscoveryResponse { type_url, nonce, resources, removed_resources, .. } = response;
        let kind = Kind::from_type_url(&type_url).filter(|kind| self.kinds.contains(kind));
        let batch = match kind {
            Some(Kind::Marker) => self.marker(&nonce, &resources),
            Some(kind) => self.update(kind, &nonce, resources, &removed_resources),
            None => {
                let error = DecodeError {
                    resource: "response".to_owned(),
                    field: "type_url".to_owned(),
                    problem: format!("{type_url:?} was not asked for"),
                };
                let answers = vec![refusal(&type_url, &nonce, error.to_string(), Vec::new())];
                Batch::new(Vec::new(), vec![error], answers)
            }
        };
        self.interner.sweep();
        batch
    }

    fn update(
        &mut self,
        kind: Kind,
        nonce: &str,
        resources: Vec<Resource>,
        removed: &[String],
    ) -> Batch {
        let table = &mut self.tables[kind.index()];
        table.answered = true;
        table.resyncing = false;
        let (mut changes, mut refused) = (Vec::with_capacity(resources.len()), Vec::new());
        // Removals first: an address that moved from one resource to another ends up with the new one.
        for name in removed {
            self.remove(kind, name, &mut changes);
        }
        for resource in resources {
            if let Err(error) = self.set(kind, resource, &mut changes) {
                refused.push(error);
            }
        }
        let answer = if refused.is_empty() {
            acknowledgement(kind, nonce)
        } else {
            let names = refused.iter().map(|error| error.resource.clone()).collect();
            refusal(kind.type_url(), nonce, explain(&refused), names)
        };
        Batch::new(changes, refused, vec![answer])
    }

    fn set(
        &mut self,
        kind: Kind,
        resource: Resource,
        changes: &mut Vec<Change>,
    ) -> Result<(), DecodeError> {
        let Resource { name, version, resource: any, .. } = resource;
        let any = any.unwrap_or_default();
        let hash = digest::resource(&name, &any.value);
        let old = self.tables[kind.index()].entries.get(name.as_str()).cloned();
        let decoded = if any.type_url == kind.type_url() {
            self.decode(kind, &name, &any.value, changes)
        } else {
            Err(DecodeError {
                resource: name.clone(),
                field: "resource".to_owned(),
                problem: format!("is of type {:?}", any.type_url),
            })
        };
        match decoded {
            Ok(what) => {
                if let Some(old) = old.filter(|old| old.what != what) {
                    remove_value(old.what, &name, changes);
                }
                let entry = Entry { what, version: version.into(), hash, received: hash };
                let name = self.put(kind, &name, entry);
                self.refused.remove(&(kind, name));
                Ok(())
            }
            Err(error) => {
                let fresh = old.as_ref().is_none_or(|old| old.version.is_empty());
                let mut entry = old.unwrap_or_else(Entry::unknown);
                entry.received = hash;
                // Routes and subsets are closed by their name, whatever was sent under it.
                let named = matches!(kind, Kind::Routes | Kind::Subset);
                if fresh && (named || any.type_url == kind.type_url()) {
                    // An older stand-in stays when this version does not even allow a new one.
                    if let Some(what) = self.stand_in(kind, &name, &any.value, changes) {
                        if entry.what != what {
                            remove_value(entry.what, &name, changes);
                        }
                        entry.what = what;
                    }
                }
                let name = self.put(kind, &name, entry);
                self.refused.insert((kind, name), error.to_string());
                Err(error)
            }
        }
    }

    /// Decodes one value and appends the change it makes.
    fn decode(
        &mut self,
        kind: Kind,
        name: &str,
        value: &[u8],
        changes: &mut Vec<Change>,
    ) -> Result<What, DecodeError> {
        match kind {
            Kind::Address => {
                match codec::decode_address(name, value, &self.defaults, &mut self.interner)? {
                    Address::Workload(w) => {
                        changes.push(Change::SetWorkload(w));
                        Ok(What::Workload)
                    }
                    Address::Service(s) => {
                        changes.push(Change::SetService(s));
                        Ok(What::Service)
                    }
                }
            }
            Kind::Authorization => {
                let policy = codec::decode_authorization(name, value, &mut self.interner)?;
                self.set_policy(name, policy, changes);
                Ok(What::Policy)
            }
            Kind::Origin => {
                let origin = Arc::new(codec::decode_origin(name, value)?);
                self.origins.insert_mut(self.interner.str(name), origin);
                // A policy that is already here learns where it came from.
                if let Some(policy) = self.policies.get(name).cloned() {
                    self.set_policy(name, (*policy).clone(), changes);
                }
                Ok(What::Origin)
            }
            Kind::Routes => {
                let routes = codec::decode_routes(name, value, &mut self.interner)?;
                changes.push(Change::SetRoutes(Arc::new(routes)));
                Ok(What::Routes)
            }
            Kind::Subset => {
                let subset = codec::decode_subset(name, value, &mut self.interner)?;
                changes.push(Change::SetSubset(Arc::new(subset)));
                Ok(What::Subset)
            }
            Kind::Marker => Err(DecodeError {
                resource: name.to_owned(),
                field: "type".to_owned(),
                problem: "a marker is no configuration".to_owned(),
            }),
        }
    }

    fn set_policy(&mut self, name: &str, mut policy: Policy, changes: &mut Vec<Change>) {
        if let Some(origin) = self.origins.get(name) {
            codec::attach_origin(&mut policy, origin, &mut self.interner);
        }
        if self.policies.get(name).is_some_and(|old| **old == policy) {
            return;
        }
        let policy = Arc::new(policy);
        self.policies.insert(self.interner.str(name), policy.clone());
        changes.push(Change::SetPolicy(policy));
    }

    /// Puts something closed in the place of a value that cannot be read and was not there before.
    fn stand_in(
        &mut self,
        kind: Kind,
        name: &str,
        value: &[u8],
        changes: &mut Vec<Change>,
    ) -> Option<What> {
        match kind {
            Kind::Authorization => {
                let policy = codec::closed_stand_in(name, value, &mut self.interner)?;
                self.set_policy(name, policy, changes);
                Some(What::Policy)
            }
            Kind::Address => {
                let (change, what) =
                    match codec::closed_address(name, value, &self.defaults, &mut self.interner)? {
                        Address::Workload(w) => (Change::SetWorkload(w), What::Workload),
                        Address::Service(s) => (Change::SetService(s), What::Service),
                    };
                changes.push(change);
                Some(what)
            }
            Kind::Routes => {
                let routes = codec::closed_routes(name, &mut self.interner)?;
                changes.push(Change::SetRoutes(Arc::new(routes)));
                Some(What::Routes)
            }
            Kind::Subset => {
                let subset = codec::closed_subset(name, &mut self.interner)?;
                changes.push(Change::SetSubset(Arc::new(subset)));
                Some(What::Subset)
            }
            Kind::Origin | Kind::Marker => None,
        }
    }

    fn remove(&mut self, kind: Kind, name: &str, changes: &mut Vec<Change>) {
        let table = &mut self.tables[kind.index()];
        let Some(entry) = table.entries.get(name).cloned() else { return };
        table.sum.remove(entry.received);
        table.entries.remove_mut(name);
        self.refused.remove(&(kind, self.interner.str(name)));
        match kind {
            Kind::Origin => {
                self.origins.remove_mut(name);
            }
            Kind::Authorization => {
                self.policies.remove(name);
            }
            Kind::Address | Kind::Subset | Kind::Routes | Kind::Marker => {}
        }
        remove_value(entry.what, name, changes);
    }

    /// Enters a resource into its table; the sum follows what was received.
    fn put(&mut self, kind: Kind, name: &str, entry: Entry) -> Str {
        let name = self.interner.str(name);
        let table = &mut self.tables[kind.index()];
        if let Some(old) = table.entries.get(&name) {
            table.sum.remove(old.received);
        }
        table.sum.add(entry.received);
        table.entries.insert_mut(name.clone(), entry);
        name
    }
}

impl Batch {
    fn new(
        changes: Vec<Change>,
        refused: Vec<DecodeError>,
        answers: Vec<DeltaDiscoveryRequest>,
    ) -> Self {
        Self { changes, refused, mismatches: Vec::new(), receipt: Receipt { answers } }
    }
}

fn acknowledgement(kind: Kind, nonce: &str) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: kind.type_url().to_owned(),
        response_nonce: nonce.to_owned(),
        ..Default::default()
    }
}

fn refusal(
    type_url: &str,
    nonce: &str,
    message: String,
    names: Vec<String>,
) -> DeltaDiscoveryRequest {
    let value = ambit::Refused { names }.encode_to_vec().into();
    let details = vec![Any { type_url: REFUSED_TYPE.to_owned(), value }];
    DeltaDiscoveryRequest {
        type_url: type_url.to_owned(),
        response_nonce: nonce.to_owned(),
        error_detail: Some(Status { code: INVALID_ARGUMENT, message, details }),
        ..Default::default()
    }
}

fn explain(refused: &[DecodeError]) -> String {
    let words: Vec<_> = refused.iter().take(MAX_EXPLAINED).map(ToString::to_string).collect();
    let more = refused.len().saturating_sub(MAX_EXPLAINED);
    let tail = if more == 0 { String::new() } else { format!("; and {more} more") };
    format!("{}{tail}", words.join("; "))
}

#[cfg(test)]
mod tests;
