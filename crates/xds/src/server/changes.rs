//! The difference between two meshes.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use model::Str;

use super::{Encoded, Resources};
use crate::Kind;

/// Differences kept per mesh. Connections that keep up ask for the same one; only those that missed pushes
/// ask for others.
const MAX_REMEMBERED: usize = 4;

/// What turns one mesh into another, by type.
#[derive(Debug)]
pub struct Changes {
    pub(super) types: [TypeChanges; Kind::CONFIGURATION.len()],
}

/// Names of one type, in order.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct TypeChanges {
    /// New or in another version.
    pub set: Vec<Str>,
    pub removed: Vec<Str>,
}

impl Changes {
    /// The changes of a type. Markers have none of their own.
    pub fn of(&self, kind: Kind) -> &TypeChanges {
        static NONE: TypeChanges = TypeChanges { set: Vec::new(), removed: Vec::new() };
        self.types.get(kind.index()).unwrap_or(&NONE)
    }
}

impl TypeChanges {
    /// Walks both tables at once: they have one order.
    pub(super) fn new(old: &BTreeMap<Str, Encoded>, new: &BTreeMap<Str, Encoded>) -> Self {
        let (mut olds, mut news) = (old.iter().peekable(), new.iter().peekable());
        let mut changes = Self::default();
        loop {
            let order = match (olds.peek(), news.peek()) {
                (Some((a, _)), Some((b, _))) => a.cmp(b),
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (None, None) => return changes,
            };
            let was = if order.is_le() { olds.next() } else { None };
            let is = if order.is_ge() { news.next() } else { None };
            match (was, is) {
                (Some((name, _)), None) => changes.removed.push(name.clone()),
                (was, Some((name, encoded))) => {
                    if was.is_none_or(|(_, old)| old.version != encoded.version) {
                        changes.set.push(name.clone());
                    }
                }
                (None, None) => return changes,
            }
        }
    }
}

/// Remembers differences to older meshes. Not part of a value: a clone begins without.
#[derive(Default)]
pub(super) struct Memo(Mutex<Vec<(Weak<Resources>, Arc<Changes>)>>);

impl Memo {
    pub(super) fn get(&self, old: &Arc<Resources>, make: impl FnOnce() -> Changes) -> Arc<Changes> {
        // The lock is held meanwhile: the others want the same answer.
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let old = Arc::downgrade(old);
        if let Some((_, changes)) = known.iter().find(|(of, _)| of.ptr_eq(&old)) {
            return changes.clone();
        }
        let changes = Arc::new(make());
        if known.len() == MAX_REMEMBERED {
            known.remove(0);
        }
        known.push((old, changes.clone()));
        changes
    }
}

impl Clone for Memo {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl std::fmt::Debug for Memo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Memo")
    }
}
