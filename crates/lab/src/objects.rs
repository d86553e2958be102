//! What the lab tells the control plane: one JSON file per Pod and Service, as an API server would show them.
//!
//! Invariants: a file is replaced by rename, whole or not at all; unchanged objects are not written again; what is not
//! wanted any more is removed. A write that failed (a full disk) is tried again with the next change, and reported.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

#[derive(Debug)]
pub(crate) struct ObjectFiles {
    dir: PathBuf,
    written: BTreeMap<String, Vec<u8>>,
    /// What went wrong since it was last asked for.
    failed: Option<io::Error>,
}

impl ObjectFiles {
    pub(crate) fn new(dir: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&dir)?;
        Ok(Self { dir, written: BTreeMap::new(), failed: None })
    }

    /// Writes an object if it is new or changed. `kind` in lower case.
    pub(crate) fn put(&mut self, kind: &str, namespace: &str, name: &str, object: &impl Serialize) {
        let file = file_name(kind, namespace, name);
        let written = serde_json::to_vec(object).map_err(io::Error::from).and_then(|mut text| {
            text.push(b'\n');
            if self.written.get(&file) != Some(&text) {
                replace(&self.dir.join(&file), &text)?;
            }
            Ok(text)
        });
        match written {
            Ok(text) => drop(self.written.insert(file, text)),
            Err(e) => self.failed = Some(e),
        }
    }

    pub(crate) fn remove(&mut self, kind: &str, namespace: &str, name: &str) {
        let file = file_name(kind, namespace, name);
        match fs::remove_file(self.dir.join(&file)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => self.failed = Some(e),
            _ => drop(self.written.remove(&file)),
        }
    }

    /// Why the control plane may not know the latest, once.
    pub(crate) fn trouble(&mut self) -> Option<String> {
        let why = self.failed.take()?;
        let full = why.kind() == io::ErrorKind::StorageFull;
        let advice = if full { "make room on the disk" } else { "check the folder" };
        Some(format!(
            "objects cannot be written to {}: {why}; the control plane goes on with what it knows ({advice})",
            self.dir.display()
        ))
    }

    /// The names of the objects of a kind that are written.
    pub(crate) fn names(&self, kind: &str) -> Vec<(String, String)> {
        let parts = |file: &String| {
            let mut parts = file.strip_suffix(".json")?.split('_');
            (parts.next() == Some(kind)).then_some(())?;
            Some((parts.next()?.to_owned(), parts.next()?.to_owned()))
        };
        self.written.keys().filter_map(parts).collect()
    }
}

/// Names of Kubernetes objects hold no underscore.
fn file_name(kind: &str, namespace: &str, name: &str) -> String {
    format!("{kind}_{namespace}_{name}.json")
}

fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    // Hidden, so that the reader of the folder passes it by.
    let temporary =
        path.with_file_name(format!(".{}.tmp", path.file_name().unwrap_or_default().display()));
    let written = File::create(&temporary)
        .and_then(|mut f| f.write_all(text))
        .and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn files_follow_the_objects() {
        let dir = tempfile::tempdir().unwrap();
        let mut files = ObjectFiles::new(dir.path().join("objects")).unwrap();
        let list = || {
            let mut names: Vec<_> = fs::read_dir(dir.path().join("objects"))
                .unwrap()
                .map(|e| e.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        };
        files.put("pod", "shop", "web-1", &json!({"a": 1}));
        files.put("service", "shop", "web", &json!({}));
        files.put("pod", "shop", "web-1", &json!({"a": 2}));
        assert_eq!(list(), ["pod_shop_web-1.json", "service_shop_web.json"]);
        let text = fs::read_to_string(dir.path().join("objects/pod_shop_web-1.json")).unwrap();
        assert_eq!(text, "{\"a\":2}\n");
        assert_eq!(files.names("pod"), [("shop".to_owned(), "web-1".to_owned())]);
        files.remove("pod", "shop", "web-1");
        files.remove("pod", "shop", "web-1");
        assert_eq!(list(), ["service_shop_web.json"]);
        assert_eq!(files.trouble(), None);
        fs::remove_dir_all(dir.path()).unwrap();
        files.put("pod", "shop", "a", &json!({}));
        files.put("pod", "shop", "b", &json!({}));
        assert!(files.trouble().unwrap().contains("No such file"));
        assert_eq!(files.trouble(), None);
        // What failed is written when it can be.
        fs::create_dir_all(dir.path().join("objects")).unwrap();
        files.put("pod", "shop", "a", &json!({}));
        assert_eq!(list(), ["pod_shop_a.json"]);
    }
}
