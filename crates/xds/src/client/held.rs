//! The book of what a proxy holds: names, versions and hashes by type, and how it is saved and counted.

use std::collections::BTreeMap;
use std::sync::Arc;

use model::http::SubsetKey;
use model::{Change, PolicyKey, ServiceKey, Snapshot, Str, WorkloadUid};
use prost::Message;
use rpds::HashTrieMapSync;
use rustc_hash::FxBuildHasher;

use crate::digest::Sum;
use crate::{Kind, ambit, codec};

/// Names and versions of everything held, without the values: those are in the snapshot. Cheap to clone.
#[derive(Clone)]
pub struct Held {
    pub(super) tables: Vec<(Kind, Entries)>,
    pub(super) origins: Origins,
}

/// Where policies were written, by the name of the policy.
pub(super) type Origins = HashTrieMapSync<Str, Arc<ambit::Origin>, FxBuildHasher>;

pub(super) fn origins() -> Origins {
    Origins::new_with_hasher_and_ptr_kind(FxBuildHasher)
}

/// The resources of one type by name.
pub(super) type Entries = HashTrieMapSync<Str, Entry, FxBuildHasher>;

/// What is known of one resource.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub what: What,
    /// Version in force. Empty: none, but something may stand in for it.
    pub version: Str,
    /// Hash of the version in force.
    pub hash: u64,
    /// Hash of what the server sent last, in force or refused.
    pub(super) received: u64,
}

/// What kind of value a resource turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum What {
    Workload,
    Service,
    Policy,
    Origin,
    Routes,
    Subset,
    /// Never readable so far.
    Unknown,
}

/// A resource as the last good configuration on disk keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    pub kind: Kind,
    pub name: String,
    pub version: String,
    pub hash: u64,
    pub value: Vec<u8>,
}

/// One type's part of the book.
pub(super) struct Table {
    pub(super) entries: Entries,
    /// Over what was received.
    pub(super) sum: Sum,
    /// Answered at least once on this stream.
    pub(super) answered: bool,
    pub(super) resyncs: u32,
    /// Asked for from scratch and not answered yet: markers say nothing about it meanwhile.
    pub(super) resyncing: bool,
}

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sizes = self.tables.iter().map(|(kind, entries)| (kind, entries.size()));
        f.debug_map().entries(sizes).finish()
    }
}

impl Held {
    /// The values of everything held, from the snapshot that was in force when this was taken.
    pub fn save<'a>(&'a self, snapshot: &'a Snapshot) -> impl Iterator<Item = Saved> + 'a {
        self.tables.iter().flat_map(move |(kind, entries)| {
            entries.iter().filter_map(move |(name, entry)| {
                Some(Saved {
                    kind: *kind,
                    name: name.to_string(),
                    version: entry.version.to_string(),
                    hash: entry.hash,
                    value: self.encode(entry.what, name, snapshot)?,
                })
            })
        })
    }

    /// The value in force, encoded again. `None`: nothing is.
    fn encode(&self, what: What, name: &Str, snapshot: &Snapshot) -> Option<Vec<u8>> {
        Some(match what {
            What::Workload => {
                let workload = snapshot.workload(&WorkloadUid(name.clone()))?;
                codec::encode_workload(workload).encode_to_vec()
            }
            What::Service => {
                codec::encode_service(snapshot.service(&service_key(name)?)?).encode_to_vec()
            }
            What::Policy => {
                codec::encode_policy(snapshot.policy(&policy_key(name)?)?).encode_to_vec()
            }
            What::Origin => self.origins.get(name)?.encode_to_vec(),
            What::Routes => {
                codec::encode_routes(snapshot.routes(&service_key(name)?)?).encode_to_vec()
            }
            What::Subset => {
                codec::encode_subset(snapshot.subset(&subset_key(name)?)?).encode_to_vec()
            }
            What::Unknown => return None,
        })
    }
}

/// Appends the removal of the value that a resource name stands for.
pub(super) fn remove_value(what: What, name: &str, changes: &mut Vec<Change>) {
    match what {
        What::Workload => changes.push(Change::RemoveWorkload(WorkloadUid(name.into()))),
        What::Service => changes.extend(service_key(name).map(Change::RemoveService)),
        What::Policy => changes.extend(policy_key(name).map(Change::RemovePolicy)),
        What::Routes => changes.extend(service_key(name).map(Change::RemoveRoutes)),
        What::Subset => changes.extend(subset_key(name).map(Change::RemoveSubset)),
        What::Origin | What::Unknown => {}
    }
}

fn service_key(name: &str) -> Option<ServiceKey> {
    let (namespace, hostname) = name.split_once('/')?;
    Some(ServiceKey { namespace: namespace.into(), hostname: hostname.into() })
}

fn subset_key(name: &str) -> Option<SubsetKey> {
    let (service, name) = name.rsplit_once('/')?;
    Some(SubsetKey { service: service_key(service)?, name: name.into() })
}

fn policy_key(name: &str) -> Option<PolicyKey> {
    let (namespace, name) = name.split_once('/')?;
    Some(PolicyKey { namespace: namespace.into(), name: name.into() })
}

impl Default for Table {
    fn default() -> Self {
        Self {
            entries: Entries::new_with_hasher_and_ptr_kind(FxBuildHasher),
            sum: Sum::default(),
            answered: false,
            resyncs: 0,
            resyncing: false,
        }
    }
}

impl Table {
    /// The server of a new stream knows only what we tell it: versions in force.
    pub(super) fn begin_stream(&mut self) {
        self.answered = false;
        self.resyncs = 0;
        self.resyncing = false;
        let refused: Vec<_> = self
            .entries
            .iter()
            .filter(|(_, entry)| entry.received != entry.hash && !entry.version.is_empty())
            .map(|(name, entry)| (name.clone(), entry.clone()))
            .collect();
        for (name, mut entry) in refused {
            self.sum.remove(entry.received);
            entry.received = entry.hash;
            self.sum.add(entry.received);
            self.entries.insert_mut(name, entry);
        }
    }

    /// Names and versions for the server. An empty version matches nothing: it sends that resource, or
    /// its removal.
    pub(super) fn versions(&self, from_scratch: bool) -> BTreeMap<String, String> {
        let version = |entry: &Entry| match from_scratch {
            true => String::new(),
            false => entry.version.to_string(),
        };
        self.entries.iter().map(|(name, entry)| (name.to_string(), version(entry))).collect()
    }
}

impl Entry {
    pub(super) fn unknown() -> Self {
        Self { what: What::Unknown, version: "".into(), hash: 0, received: 0 }
    }
}
