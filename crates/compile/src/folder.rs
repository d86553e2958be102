//! Folders of files, and what is in force while people edit them.
//!
//! A state machine fed by a watcher: [`Folder::set_file`] and [`Folder::remove_file`] in, [`Folder::objects`]
//! and [`Folder::diagnostics`] out.
//!
//! Invariants:
//! - A file that stops making sense costs nothing: its last good objects stay in force, whole, so that a
//!   half-saved file never leaves a pod without its policy. A file that never made sense yields the
//!   documents that do, as `kubectl apply` would.
//! - Within a folder the first of two equal names stays (by path, then place in the file); a later folder
//!   wins over an earlier one. Neither depends on the order of events.

use std::collections::BTreeMap;

use model::Str;
use rustc_hash::FxHashMap;

use crate::diagnostics::{self, Code, Diagnostic};
use crate::object::{Object, Objects};
use crate::parse::{ParsedFile, parse_file};

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Folder {
    files: BTreeMap<(usize, Str), File>,
}

#[derive(Clone, Debug, Default)]
struct File {
    objects: Vec<Object>,
    /// The objects are all that the file held, nothing was lost.
    good: bool,
    /// What there is to say about the newest text.
    diagnostics: Vec<Diagnostic>,
}

impl Folder {
    pub fn new() -> Self {
        Self::default()
    }

    /// The file has this content now. `folder` is the precedence: a higher one wins.
    pub fn set_file(&mut self, folder: usize, path: &str, text: &str) {
        let file = self.files.entry((folder, path.into())).or_default();
        if text.trim().is_empty() {
            // Editors truncate before they write. Who means it removes the file.
            file.diagnostics.clear();
            if !file.objects.is_empty() {
                let message = format!("the file is empty; {}", stay(file.objects.len()));
                file.diagnostics.push(
                    Diagnostic::warning(Code::EmptyFile, message)
                        .origin(format!("{path}:1"))
                        .help("remove the file to remove the objects"),
                );
            }
            return;
        }
        let ParsedFile { objects, diagnostics, complete } = parse_file(path, text);
        file.diagnostics = diagnostics;
        if !complete && file.good && !file.objects.is_empty() {
            let message = format!("the file has errors; {}", stay(file.objects.len()));
            file.diagnostics.push(
                Diagnostic::warning(Code::LastGoodInForce, message).origin(format!("{path}:1")),
            );
        } else {
            file.objects = objects;
            file.good = complete;
        }
    }

    /// Whether the file has been set and not removed.
    pub fn has_file(&self, folder: usize, path: &str) -> bool {
        self.files.contains_key(&(folder, path.into()))
    }

    /// Whether the newest text of the file is what is in force, whole.
    pub fn is_in_force(&self, folder: usize, path: &str) -> bool {
        let overruled = |d: &Diagnostic| matches!(d.code, Code::LastGoodInForce | Code::EmptyFile);
        let file = self.files.get(&(folder, path.into()));
        file.is_some_and(|file| file.good && !file.diagnostics.iter().any(overruled))
    }

    /// The file is gone, and so are its objects.
    pub fn remove_file(&mut self, folder: usize, path: &str) {
        self.files.remove(&(folder, path.into()));
    }

    /// The paths of the files of a folder.
    pub fn paths(&self, folder: usize) -> impl Iterator<Item = &str> {
        self.files.keys().filter(move |(f, _)| *f == folder).map(|(_, path)| &**path)
    }

    /// What is wrong with the files. What is wrong with the objects, `compile` says.
    pub fn diagnostics(&self) -> Vec<Diagnostic> {
        self.state().1
    }

    /// What is in force.
    pub fn objects(&self) -> Objects {
        self.merge().0
    }

    /// [`Self::objects`] and [`Self::diagnostics`] in one.
    pub fn state(&self) -> (Objects, Vec<Diagnostic>) {
        let (objects, mut all) = self.merge();
        all.extend(self.files.values().flat_map(|file| file.diagnostics.iter().cloned()));
        diagnostics::sort(&mut all);
        (objects, all)
    }

    fn merge(&self) -> (Objects, Vec<Diagnostic>) {
        let mut objects = Objects::default();
        let mut duplicates = Vec::new();
        // The first place of each name within the folder at hand.
        let mut first: FxHashMap<(&str, &str, &str), &Object> = FxHashMap::default();
        let mut folder = None;
        for ((f, _), file) in &self.files {
            if folder != Some(*f) {
                first.clear();
                folder = Some(*f);
            }
            for object in &file.objects {
                let key = (object.body.kind(), &*object.namespace, &*object.name);
                if let Some(first) = first.get(&key) {
                    duplicates.push(duplicate(first, object));
                } else {
                    first.insert(key, object);
                    objects.insert(object.clone());
                }
            }
        }
        (objects, duplicates)
    }
}

fn stay(n: usize) -> String {
    let plural = if n == 1 { "its last good object stays" } else { "its last good objects stay" };
    format!("{plural} in force ({n})")
}

fn duplicate(first: &Object, second: &Object) -> Diagnostic {
    let message =
        format!("defined twice: {} stays in force, {} is ignored", first.origin, second.origin);
    Diagnostic::error(Code::DuplicateObject, message)
        .object(second.id())
        .origin(second.origin.to_string())
        .help("remove one of them, or rename it")
}

#[cfg(test)]
mod tests;
