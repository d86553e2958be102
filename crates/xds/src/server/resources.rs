//! What proxies should hold after a push, encoded once for all of them.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use model::http::{ServiceRoutes, Subset};
use model::{ConfigVersion, Policy, Service, Str, Workload};
use prost::Message;

use super::changes::{Changes, Memo, TypeChanges};
use crate::digest::{self, Sum};
use crate::{Kind, codec};

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
    origins: Table,
    authorizations: Table,
    addresses: Table,
    subsets: Table,
    routes: Table,
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
    pub fn new<'a>(
        push: ConfigVersion,
        workloads: impl IntoIterator<Item = &'a Workload>,
        services: impl IntoIterator<Item = &'a Service>,
        policies: impl IntoIterator<Item = &'a Policy>,
        routes: impl IntoIterator<Item = &'a ServiceRoutes>,
        subsets: impl IntoIterator<Item = &'a Subset>,
    ) -> Self {
        let mut all = Self { push, ..Self::default() };
        for w in workloads {
            all.addresses.set(codec::workload_name(w), codec::encode_workload(w).encode_to_vec());
        }
        for s in services {
            all.addresses.set(codec::service_name(s), codec::encode_service(s).encode_to_vec());
        }
        for p in policies {
            let name = codec::policy_name(p);
            all.authorizations.set(name.clone(), codec::encode_policy(p).encode_to_vec());
            all.origins.set(name, codec::policy_origin(p).encode_to_vec());
        }
        for r in routes {
            all.routes.set(codec::routes_name(r), codec::encode_routes(r).encode_to_vec());
        }
        for s in subsets {
            all.subsets.set(codec::subset_name(s), codec::encode_subset(s).encode_to_vec());
        }
        all
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
    fn set(&mut self, name: Str, value: Vec<u8>) {
        let new = Encoded::new(&name, value);
        self.sum.add(new.hash);
        if let Some(old) = self.by_name.insert(name, new) {
            self.sum.remove(old.hash);
        }
    }
}
