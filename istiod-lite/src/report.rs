//! Tells people what is wrong: each finding once when it appears and once when it is resolved in the log,
//! and all of them in `diagnostics.json` in the state directory.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use compile::{Diagnostic, Severity};
use serde::Serialize;

use crate::files;
use crate::world::Latest;

/// Findings logged per change; the rest is in the file and on the debug page.
const MAX_LOGGED: usize = 50;
/// The name of the file in the state directory.
pub(crate) const DIAGNOSTICS_FILE: &str = "diagnostics.json";

/// What the file and the debug page say.
#[derive(Debug, Serialize)]
pub(crate) struct Page<'a> {
    /// The push that these findings are about. Absent before the first.
    pub push: Option<String>,
    /// Folders that are waited for.
    pub missing: &'a [PathBuf],
    pub diagnostics: &'a [Diagnostic],
}

impl<'a> Page<'a> {
    pub(crate) fn new(latest: &'a Latest) -> Self {
        Self {
            push: latest.world.as_ref().map(|w| w.push().to_string()),
            missing: &latest.missing,
            diagnostics: &latest.diagnostics,
        }
    }

    pub(crate) fn to_json(&self) -> String {
        // Strings, numbers and lists: cannot fail.
        serde_json::to_string_pretty(self).unwrap_or_default() + "\n"
    }
}

/// Remembers what has been said.
#[derive(Debug, Default)]
pub(crate) struct Reporter {
    said: Arc<[Diagnostic]>,
}

impl Reporter {
    /// Logs the difference to the last call and writes the file. A full disk is reported, not fatal.
    pub(crate) fn report(&mut self, latest: &Latest, state_dir: &Path) {
        let (new, resolved) = difference(&self.said, &latest.diagnostics);
        let total = new.len() + resolved.len();
        for diagnostic in new.into_iter().take(MAX_LOGGED) {
            match diagnostic.severity {
                Severity::Error => tracing::error!("{diagnostic}"),
                Severity::Warning => tracing::warn!("{diagnostic}"),
                Severity::Info => tracing::info!("{diagnostic}"),
            }
        }
        for diagnostic in resolved.into_iter().take(MAX_LOGGED) {
            tracing::info!("resolved: {diagnostic}");
        }
        if total > MAX_LOGGED {
            tracing::warn!(total, "findings changed; all of them are in {DIAGNOSTICS_FILE}");
        }
        self.said = latest.diagnostics.clone();
        let path = state_dir.join(DIAGNOSTICS_FILE);
        let page = Page::new(latest).to_json();
        if let Err(error) = files::write_atomic(&path, page.as_bytes(), files::PUBLIC) {
            tracing::error!("{error}; the mesh itself is not affected");
        }
    }
}

/// Which findings are new and which are resolved. Line numbers count: a finding that moved is new, since
/// its place is what a person looks for.
fn difference<'a>(
    old: &'a [Diagnostic],
    new: &'a [Diagnostic],
) -> (Vec<&'a Diagnostic>, Vec<&'a Diagnostic>) {
    let (before, after): (HashSet<_>, HashSet<_>) = (old.iter().collect(), new.iter().collect());
    let appeared = new.iter().filter(|d| !before.contains(d)).collect();
    let resolved = old.iter().filter(|d| !after.contains(d)).collect();
    (appeared, resolved)
}

#[cfg(test)]
mod tests {
    use super::*;
    use compile::Code;

    fn finding(message: &str) -> Diagnostic {
        Diagnostic::error(Code::InvalidObject, message).origin("a.yaml:3")
    }

    #[test]
    fn each_finding_is_new_once_and_resolved_once() {
        let check = |old: &[&str], new: &[&str], appeared: &[&str], resolved: &[&str]| {
            let list = |names: &[&str]| names.iter().map(|n| finding(n)).collect::<Vec<_>>();
            let (old, new) = (list(old), list(new));
            let got = difference(&old, &new);
            let names =
                |d: Vec<&Diagnostic>| d.iter().map(|d| d.message.clone()).collect::<Vec<_>>();
            assert_eq!((names(got.0), names(got.1)), (list2(appeared), list2(resolved)));
        };
        fn list2(names: &[&str]) -> Vec<String> {
            names.iter().map(|n| (*n).to_owned()).collect()
        }
        check(&[], &["a"], &["a"], &[]);
        check(&["a"], &["a"], &[], &[]);
        check(&["a", "b"], &["b", "c"], &["c"], &["a"]);
        check(&["a"], &[], &[], &["a"]);
    }

    #[test]
    fn the_file_is_whole_json_and_a_full_disk_is_survived() {
        let dir = tempfile::tempdir().unwrap();
        let latest = Latest { diagnostics: vec![finding("x")].into(), ..Latest::default() };
        let mut reporter = Reporter::default();
        reporter.report(&latest, dir.path());
        let text = std::fs::read_to_string(dir.path().join(DIAGNOSTICS_FILE)).unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(json["diagnostics"][0]["origin"], "a.yaml:3");
        assert_eq!(json["diagnostics"][0]["code"], "invalid_object");
        assert_eq!(json["push"], serde_json::Value::Null);
        // Stands in for a full disk.
        reporter.report(&latest, Path::new("/nowhere/at/all"));
    }
}
