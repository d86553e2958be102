//! What every step of compile shares: the configuration, the findings so far, and one copy of each
//! string and of each pattern.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use model::Str;
use model::http::{Pattern, PatternError};

use crate::MeshConfig;
use crate::diagnostics::Diagnostic;
use crate::object::{Meta, Sourced, object_id};

pub(crate) struct Context<'a> {
    pub config: &'a MeshConfig,
    pub diagnostics: Vec<Diagnostic>,
    strings: BTreeSet<Str>,
    pub patterns: Patterns,
}

/// Patterns by their texts, each built once.
#[derive(Debug, Default)]
pub(crate) struct Patterns(BTreeMap<Str, Result<Pattern, PatternError>>);

impl Patterns {
    /// Forgets those that nobody uses, and what is none.
    pub(crate) fn sweep(&mut self) {
        // Every clone holds the text; one is ours.
        self.0.retain(|_, p| p.as_ref().is_ok_and(|p| Arc::strong_count(p.text()) > 1));
    }
}

impl<'a> Context<'a> {
    pub(crate) fn new(config: &'a MeshConfig) -> Self {
        Self::with_patterns(config, Patterns::default())
    }

    /// With patterns from before.
    pub(crate) fn with_patterns(config: &'a MeshConfig, patterns: Patterns) -> Self {
        Self { config, diagnostics: Vec::new(), strings: BTreeSet::new(), patterns }
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

    /// A pattern of an object, built once however often it is written: building one takes longer than reading a rule.
    pub(crate) fn pattern(&mut self, text: &str, of: &mut Budget) -> Result<Pattern, PatternError> {
        of.room(text)?;
        let pattern = match self.patterns.0.get(text) {
            Some(known) => known.clone(),
            None => {
                let new = Pattern::new(text);
                self.patterns.0.insert(text.into(), new.clone());
                new
            }
        };
        of.count(pattern)
    }
}

/// What the patterns of one object may take once they are compiled: 4,096 of ordinary size, or 64 of the largest that may be.
/// Each proxy holds them all; an object of a megabyte could have 50,000 that take gigabytes.
const MOST_PATTERNS: usize = 16 << 20;

/// What the patterns of one object have taken so far. A text counts once, and what was taken once is taken again.
#[derive(Debug, Default)]
pub(crate) struct Budget {
    used: usize,
    taken: BTreeSet<Str>,
    /// Something did not fit.
    full: bool,
}

impl Budget {
    /// A pattern that nobody keeps.
    pub(crate) fn pattern(&mut self, text: &str) -> Result<Pattern, PatternError> {
        self.room(text)?;
        self.count(Pattern::new(text))
    }

    /// Before a pattern is built: that is what takes time.
    fn room(&self, text: &str) -> Result<(), PatternError> {
        if self.full && !self.taken.contains(text) { Err(over()) } else { Ok(()) }
    }

    fn count(&mut self, pattern: Result<Pattern, PatternError>) -> Result<Pattern, PatternError> {
        let pattern = pattern?;
        if self.taken.contains(pattern.text()) {
            return Ok(pattern);
        }
        if self.used + pattern.size() > MOST_PATTERNS {
            self.full = true;
            return Err(over());
        }
        self.used += pattern.size();
        self.taken.insert(pattern.text().clone());
        Ok(pattern)
    }
}

fn over() -> PatternError {
    let most = MOST_PATTERNS >> 20;
    PatternError::limit(format!(
        "is one pattern too many: those of one object may take {most} MiB once compiled"
    ))
}
