//! What every step of compile shares: the configuration, the findings so far, and one copy of each
//! string.

use std::collections::BTreeSet;

use model::Str;

use crate::MeshConfig;
use crate::diagnostics::Diagnostic;
use crate::object::{Meta, Sourced, object_id};

pub(crate) struct Context<'a> {
    pub config: &'a MeshConfig,
    pub diagnostics: Vec<Diagnostic>,
    strings: BTreeSet<Str>,
}

impl<'a> Context<'a> {
    pub(crate) fn new(config: &'a MeshConfig) -> Self {
        Self { config, diagnostics: Vec::new(), strings: BTreeSet::new() }
    }

    /// Adds a finding about an object; its place is looked up by the finding's field.
    pub(crate) fn report<T: Meta>(
        &mut self,
        key: &(Str, Str),
        sourced: &Sourced<T>,
        diagnostic: Diagnostic,
    ) {
        let origin = sourced.origin.at(&diagnostic.field);
        let object = object_id(T::KIND, &key.0, &key.1);
        self.diagnostics.push(diagnostic.object(object).origin(origin));
    }

    /// The one copy of a string: thousands of pods share a few namespaces, nodes and accounts.
    pub(crate) fn share(&mut self, text: &str) -> Str {
        if let Some(shared) = self.strings.get(text) {
            return shared.clone();
        }
        let shared: Str = text.into();
        self.strings.insert(shared.clone());
        shared
    }
}
