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

    /// A pattern of an object, built once however often it is written: building one takes longer than reading a rule.
    pub(crate) fn pattern(&mut self, text: &str, of: &mut Budget) -> Result<Pattern, String> {
        of.check()?;
        let pattern = match self.patterns.get(text) {
            Some(known) => known.clone(),
            None => {
                let new = Pattern::new(text);
                self.patterns.insert(text.into(), new.clone());
                new
            }
        };
        of.count(pattern)
    }
}

/// What the patterns of one object may take once they are compiled: 4,096 of ordinary size, or 64 of the largest that may be.
/// Each proxy holds them all; an object of a megabyte could have 50,000 that take gigabytes.
const MOST_PATTERNS: usize = 16 << 20;

/// What the patterns of one object have taken so far. A text counts once.
#[derive(Debug, Default)]
pub(crate) struct Budget {
    used: usize,
    counted: BTreeSet<Str>,
}

impl Budget {
    /// A pattern that nobody keeps.
    pub(crate) fn pattern(&mut self, text: &str) -> Result<Pattern, String> {
        self.check()?;
        self.count(Pattern::new(text))
    }

    fn count(&mut self, pattern: Result<Pattern, PatternError>) -> Result<Pattern, String> {
        let pattern = pattern.map_err(|e| e.to_string())?;
        if self.counted.insert(pattern.text().clone()) {
            self.used += pattern.size();
        }
        self.check().map(|()| pattern)
    }

    /// Before a pattern is built, too: that is what takes time.
    fn check(&self) -> Result<(), String> {
        if self.used <= MOST_PATTERNS {
            return Ok(());
        }
        let most = MOST_PATTERNS >> 20;
        Err(format!(
            "is one pattern too many: those of one object may take {most} MiB once compiled"
        ))
    }
}
