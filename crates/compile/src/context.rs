//! What every step of compile shares: the configuration, the findings so far, and one copy of each
//! string and of each pattern.

use std::collections::{BTreeMap, BTreeSet};

use model::Str;
use model::http::{Pattern, PatternError};

use crate::MeshConfig;
use crate::diagnostics::Diagnostic;
use crate::object::{Meta, Sourced, object_id};

pub(crate) struct Context<'a> {
    pub config: &'a MeshConfig,
    pub diagnostics: Vec<Diagnostic>,
    strings: BTreeSet<Str>,
    patterns: BTreeMap<Str, Result<Pattern, PatternError>>,
}

impl<'a> Context<'a> {
    pub(crate) fn new(config: &'a MeshConfig) -> Self {
        Self {
            config,
            diagnostics: Vec::new(),
            strings: BTreeSet::new(),
            patterns: BTreeMap::new(),
        }
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

    /// A pattern, built once however often it is written: building one takes longer than reading a rule.
    pub(crate) fn pattern(&mut self, text: &str) -> Result<Pattern, PatternError> {
        if let Some(known) = self.patterns.get(text) {
            return known.clone();
        }
        let pattern = Pattern::new(text);
        self.patterns.insert(text.into(), pattern.clone());
        pattern
    }
}
