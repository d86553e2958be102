//! The end of a push: what the control plane says that the proxy should hold now, compared with what it received.

use model::{Change, ConfigVersion};
use prost::Message;

use super::{Batch, Client, acknowledgement, refusal};
use crate::codec::DecodeError;
use crate::digest::Sum;
use crate::discovery::{DeltaDiscoveryRequest, Resource};
use crate::{Kind, MARKER_NAME, ambit};

/// Attempts to get a type from scratch before only a reconnect tries again: a server whose sums are
/// wrong must not make us fetch the mesh forever.
pub(super) const MAX_RESYNCS: u32 = 3;

/// A type of which the proxy holds something else than the control plane believes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    pub kind: Kind,
    pub push: ConfigVersion,
    pub want: Sum,
    pub have: Sum,
    /// Whether it is being fetched from scratch; not after several attempts in vain.
    pub resync: bool,
}

impl std::fmt::Display for Mismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { kind, push, want, have, .. } = self;
        write!(f, "push {push}: the control plane says {want} of {kind}; received were {have}")
    }
}

impl Client {
    pub(super) fn marker(&mut self, nonce: &str, resources: &[Resource]) -> Batch {
        let marker = resources.iter().find(|resource| resource.name == MARKER_NAME);
        let Some(marker) = marker.and_then(|m| m.resource.as_ref()) else {
            // A removal, or a first answer of a server that has no push yet.
            return Batch::new(Vec::new(), Vec::new(), vec![acknowledgement(Kind::Marker, nonce)]);
        };
        let marker = match ambit::PushMarker::decode(marker.value.clone()) {
            Ok(marker) => marker,
            Err(e) => {
                let error = DecodeError {
                    resource: MARKER_NAME.to_owned(),
                    field: "PushMarker".to_owned(),
                    problem: e.to_string(),
                };
                let names = vec![MARKER_NAME.to_owned()];
                let answer = refusal(Kind::Marker.type_url(), nonce, error.to_string(), names);
                return Batch::new(Vec::new(), vec![error], vec![answer]);
            }
        };
        let push = ConfigVersion { epoch: marker.epoch, number: marker.number };
        let mismatches = self.compare(push, &marker.holdings);
        let mut words: Vec<_> = mismatches.iter().map(ToString::to_string).collect();
        words.extend(self.tables.iter().any(|t| t.resyncing).then(|| "fetching again".to_owned()));
        if words.is_empty() {
            let answers = vec![acknowledgement(Kind::Marker, nonce)];
            return Batch::new(vec![Change::SetVersion(push)], Vec::new(), answers);
        }
        let mut answers =
            vec![refusal(Kind::Marker.type_url(), nonce, words.join("; "), Vec::new())];
        for mismatch in mismatches.iter().filter(|mismatch| mismatch.resync) {
            answers.push(DeltaDiscoveryRequest {
                type_url: mismatch.kind.type_url().to_owned(),
                resource_names_subscribe: vec!["*".to_owned()],
                // Without versions: send everything, and tell what must go.
                initial_resource_versions: self.tables[mismatch.kind.index()].versions(true),
                ..Default::default()
            });
        }
        Batch { mismatches, ..Batch::new(Vec::new(), Vec::new(), answers) }
    }

    fn compare(&mut self, push: ConfigVersion, holdings: &[ambit::Holding]) -> Vec<Mismatch> {
        let mut mismatches = Vec::new();
        for holding in holdings {
            let kind = Kind::from_type_url(&holding.type_url);
            let Some(kind) = kind.filter(|kind| self.kinds.contains(kind)) else { continue };
            let Some(table) = self.tables.get_mut(kind.index()) else { continue };
            let (want, have) = (Sum { count: holding.count, sum: holding.sum }, table.sum);
            if table.resyncing {
                continue;
            }
            if want == have {
                table.resyncs = 0;
                continue;
            }
            let resync = table.resyncs < MAX_RESYNCS;
            table.resyncs += u32::from(resync);
            table.resyncing = resync;
            mismatches.push(Mismatch { kind, push, want, have, resync });
        }
        mismatches
    }
}
