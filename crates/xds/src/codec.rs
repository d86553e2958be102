//! Between wire messages and [`model`] values, both ways.
//!
//! Decoding is total and strict: an unknown enum value, an address of the wrong size, a port above 65535
//! or a name that contradicts the resource is an error that names the resource and the field, and the
//! resource is refused. For workloads and services unknown *fields* are skipped, as protobuf intends, and so
//! are unknown values of the two enums that only describe (`workload_type`, `app_protocol`).
//! For policies they are refused too: a matcher that this proxy cannot read would make an ALLOW match more
//! than its author wrote. [`closed_stand_in`] is what stands in until the policy can be read, and
//! [`closed_address`] for workloads and services: an address that nobody knows is passed through in
//! plaintext, so what cannot be read must not become unknown. Routes and subsets are our own types and refused for
//! anything that is not understood ([`decode_routes`]).

mod context;
mod decode;
mod encode;
mod routes;

use model::http::{Pattern, PatternError, RouteRule};
use model::{Service, ServicePort, Str, Workload};
use rustc_hash::{FxHashMap, FxHashSet};
use std::sync::Arc;

pub use decode::{
    attach_origin, closed_address, closed_stand_in, decode_address, decode_authorization,
    decode_origin,
};
pub use encode::{
    encode_policy, encode_service, encode_workload, policy_name, policy_origin, service_name,
    workload_name,
};
pub use routes::{
    closed_routes, closed_subset, decode_routes, decode_subset, encode_routes, encode_subset,
    routes_name, subset_name,
};
pub(crate) use routes::{encode_routes_by, encode_rule};

/// A tunnel protocol that nobody will ever define: how [`model::TunnelProtocol::Unreadable`] is written down.
const UNREADABLE: i32 = i32::MAX;

/// What an Address resource says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    Workload(Arc<Workload>),
    Service(Arc<Service>),
}

/// Values that the control plane may leave out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Defaults {
    /// The mesh's own trust domain, for workloads that state none.
    pub trust_domain: Str,
}

/// Why a resource cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{resource}: {field}: {problem}")]
pub struct DecodeError {
    /// The resource's name on the wire.
    pub resource: String,
    /// Path of the field, or the message as a whole.
    pub field: String,
    pub problem: String,
}

/// Shares equal strings and port lists among the values of one configuration: 100,000 workloads repeat
/// a few hundred namespaces, services and nodes. A pattern is compiled once and a rule read once, however often their
/// routes are sent.
#[derive(Debug, Default)]
pub struct Interner {
    strings: FxHashSet<Str>,
    ports: FxHashSet<Arc<[ServicePort]>>,
    /// By what they are on the wire.
    rules: FxHashMap<Box<[u8]>, KnownRule>,
    /// By their text, which each pattern shares with all its clones.
    patterns: FxHashMap<Str, Pattern>,
    /// Size after the last sweep.
    swept: usize,
}

/// Bytes of a rule that is kept to be known again: ordinary ones have a few hundred.
const MAX_KNOWN_RULE: usize = 16 << 10;

/// A rule that was read, and the texts of its patterns.
#[derive(Clone, Debug)]
struct KnownRule {
    rule: Arc<RouteRule>,
    patterns: Box<[Str]>,
}

impl Interner {
    pub fn str(&mut self, s: &str) -> Str {
        if let Some(known) = self.strings.get(s) {
            return known.clone();
        }
        let new: Str = s.into();
        self.strings.insert(new.clone());
        new
    }

    fn ports(&mut self, ports: Vec<ServicePort>) -> Arc<[ServicePort]> {
        if let Some(known) = self.ports.get(ports.as_slice()) {
            return known.clone();
        }
        let new: Arc<[ServicePort]> = ports.into();
        self.ports.insert(new.clone());
        new
    }

    fn pattern(&mut self, text: &str) -> Result<Pattern, PatternError> {
        if let Some(known) = self.patterns.get(text) {
            return Ok(known.clone());
        }
        let new = Pattern::new(text)?;
        self.patterns.insert(new.text().clone(), new.clone());
        Ok(new)
    }

    fn rule(&self, bytes: &[u8]) -> Option<KnownRule> {
        self.rules.get(bytes).cloned()
    }

    /// A large one is read again: sweeping counts entries, not bytes.
    fn keep_rule(&mut self, bytes: &[u8], rule: KnownRule) {
        if bytes.len() <= MAX_KNOWN_RULE {
            self.rules.insert(bytes.into(), rule);
        }
    }

    /// Forgets what nobody uses any more. Call it after each batch: it does something only when the
    /// tables have doubled, so its cost is spread over the insertions.
    pub fn sweep(&mut self) {
        // 1024: below that there is nothing worth saving.
        if self.len() < 2 * self.swept.max(1024) {
            return;
        }
        // Before their strings and patterns.
        self.rules.retain(|_, known| Arc::strong_count(&known.rule) > 1);
        self.strings.retain(|s| Arc::strong_count(s) > 1);
        self.ports.retain(|p| Arc::strong_count(p) > 1);
        // Ours are the key and the pattern itself.
        self.patterns.retain(|text, _| Arc::strong_count(text) > 2);
        self.swept = self.len();
    }

    fn len(&self) -> usize {
        self.strings.len() + self.ports.len() + self.rules.len() + self.patterns.len()
    }
}

#[cfg(test)]
mod tests;
