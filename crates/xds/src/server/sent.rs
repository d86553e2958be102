//! What a proxy holds or has been sent, as a difference to a whole mesh that all connections share: a
//! settled connection costs a pointer, and a push costs each of them what changed and not the mesh.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use model::Str;

use super::{Encoded, Part, Resources};
use crate::Kind;

/// See the module. Versions by name; an empty version matches nothing.
#[derive(Debug, Default)]
pub(super) struct Sent {
    /// The proxy was sent exactly this, but for `exceptions`.
    base: Option<Arc<Resources>>,
    /// `None`: removed.
    exceptions: BTreeMap<Str, Option<Str>>,
}

/// What a proxy lacks, and what it should no longer have. By name.
#[derive(Debug, Default)]
pub(super) struct Difference<'a> {
    pub(super) set: Vec<(&'a Str, &'a Encoded)>,
    pub(super) removed: Vec<&'a Str>,
}

impl Sent {
    /// As a proxy that comes back states it.
    pub(super) fn stated(versions: impl IntoIterator<Item = (Str, Str)>) -> Self {
        let stated = versions.into_iter().map(|(name, version)| (name, Some(version)));
        Self { base: None, exceptions: stated.collect() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.base.is_none() && self.exceptions.is_empty()
    }

    pub(super) fn set(&mut self, name: Str, version: Str) {
        self.exceptions.insert(name, Some(version));
    }

    pub(super) fn remove(&mut self, name: Str) {
        self.exceptions.insert(name, None);
    }

    /// Everything of this type has been sent.
    pub(super) fn settle(&mut self, desired: &Arc<Resources>) {
        self.base = Some(desired.clone());
        self.exceptions.clear();
    }

    pub(super) fn difference<'a>(
        &'a self,
        kind: Kind,
        part: Part,
        desired: &'a Arc<Resources>,
    ) -> Difference<'a> {
        let mut difference = Difference::default();
        let wanted = &desired.table(kind).by_name;
        let changes = match &self.base {
            Some(base) if !Arc::ptr_eq(base, desired) => Some(desired.changes_since(base)),
            _ => None,
        };
        let changes = changes.as_ref().map(|changes| changes.of(kind));
        if part != Part::Removed {
            let lacks = |(name, encoded): &(&Str, &Encoded)| {
                self.version(kind, name) != Some(&encoded.version)
            };
            if self.base.is_none() {
                difference.set.extend(wanted.iter().filter(lacks));
            } else {
                let changed = changes.iter().flat_map(|changes| &changes.set);
                let names: BTreeSet<&Str> = changed.chain(self.exceptions.keys()).collect();
                let found = names.into_iter().filter_map(|name| wanted.get_key_value(name));
                difference.set.extend(found.filter(lacks));
            }
        }
        if part != Part::Added {
            let gone = changes.iter().flat_map(|changes| &changes.removed);
            let names: BTreeSet<&str> =
                gone.chain(self.exceptions.keys()).map(|name| &**name).collect();
            let held = names.into_iter().filter_map(|name| self.held(kind, name));
            difference.removed.extend(held.filter(|name| !wanted.contains_key(*name)));
        }
        difference
    }

    fn version(&self, kind: Kind, name: &str) -> Option<&Str> {
        match self.exceptions.get(name) {
            Some(exception) => exception.as_ref(),
            None => self.base.as_ref()?.table(kind).by_name.get(name).map(|e| &e.version),
        }
    }

    /// The name as we keep it, if the proxy holds something under it.
    fn held(&self, kind: Kind, name: &str) -> Option<&Str> {
        match self.exceptions.get_key_value(name) {
            Some((name, exception)) => exception.as_ref().map(|_| name),
            None => {
                self.base.as_ref()?.table(kind).by_name.get_key_value(name).map(|(name, _)| name)
            }
        }
    }
}
