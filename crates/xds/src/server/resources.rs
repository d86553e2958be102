//! What proxies should hold after a push, encoded once for all of them.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use model::{ConfigVersion, Str};

use super::changes::{Changes, Memo, TypeChanges};
use super::{Encoder, Mesh};
use crate::Kind;
use crate::digest::{self, Sum};

/// One resource, encoded once for every connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// Equal versions mean equal bytes.
    pub version: Str,
    pub hash: u64,
    pub value: Bytes,
}

impl Encoded {
    pub fn new(name: &str, value: Vec<u8>) -> Self {
        let hash = digest::resource(name, &value);
        Self { version: digest::version(hash).into(), hash, value: value.into() }
    }
}

/// Everything a proxy should hold after one push.
#[derive(Clone, Debug, Default)]
pub struct Resources {
    push: ConfigVersion,
    pub(super) origins: Table,
    pub(super) authorizations: Table,
    pub(super) addresses: Table,
    pub(super) subsets: Table,
    pub(super) routes: Table,
    memo: Memo,
}

/// The resources of one type by name, and their sum.
#[derive(Clone, Debug, Default)]
pub(super) struct Table {
    pub(super) by_name: BTreeMap<Str, Encoded>,
    sum: Sum,
}

impl Resources {
    /// Encodes a whole mesh. Of several values with one name the last one counts.
    pub fn new(push: ConfigVersion, mesh: Mesh<'_>) -> Self {
        Encoder::default().encode(push, mesh)
    }

    pub fn push(&self) -> ConfigVersion {
        self.push
    }

    /// The same mesh under another push number.
    pub fn with_push(mut self, push: ConfigVersion) -> Self {
        self.push = push;
        self
    }

    /// Whether both say the same, whatever their push numbers: then there is nothing to push.
    pub fn same_content(&self, other: &Self) -> bool {
        Kind::CONFIGURATION
            .into_iter()
            .all(|kind| self.table(kind).by_name == other.table(kind).by_name)
    }

    /// Name and encoding of each resource of a type, ordered by name.
    pub fn iter(&self, kind: Kind) -> impl Iterator<Item = (&Str, &Encoded)> {
        self.table(kind).by_name.iter()
    }

    /// Count and sum of a type.
    pub fn sum(&self, kind: Kind) -> Sum {
        self.table(kind).sum
    }

    /// What turns `old` into this. Worked out once, however many connections ask.
    pub fn changes_since(&self, old: &Arc<Self>) -> Arc<Changes> {
        self.memo.get(old, || Changes {
            types: Kind::CONFIGURATION
                .map(|kind| TypeChanges::new(&old.table(kind).by_name, &self.table(kind).by_name)),
        })
    }

    pub(super) fn table(&self, kind: Kind) -> &Table {
        static EMPTY: Table = Table { by_name: BTreeMap::new(), sum: Sum { count: 0, sum: 0 } };
        match kind {
            Kind::Origin => &self.origins,
            Kind::Authorization => &self.authorizations,
            Kind::Address => &self.addresses,
            Kind::Subset => &self.subsets,
            Kind::Routes => &self.routes,
            // Depends on the connection's subscriptions: made when it is sent.
            Kind::Marker => &EMPTY,
        }
    }
}

impl Table {
    pub(super) fn set(&mut self, name: Str, new: Encoded) {
        self.sum.add(new.hash);
        if let Some(old) = self.by_name.insert(name, new) {
            self.sum.remove(old.hash);
        }
    }
}
