//! The rules of this repository, as tests: `cargo test -p tidy`.
//!
//! Here is what the tests share: finding files and packages, and reading Rust source as tokens, so
//! that a word in a comment or a string is never mistaken for code. The rules themselves are in `tests/`.
//!
//! Invariant: tidy reads the working tree and changes nothing, except `docs/reasons.md` and `docs/istio-fields.md` when
//! `TIDY_WRITE=1` asks for it.

mod reasons;
mod tokens;

use std::fs;
use std::path::{Path, PathBuf};

pub use reasons::reasons_page;
pub use tokens::{Function, Source, Spot};

/// The crates behind the purity wall: decisions and data, no IO. `sim` makes up what is on the other side.
pub const PURE_CRATES: [&str; 5] = ["model", "engine", "compile", "xds", "sim"];

/// Folders that hold nothing a person wrote for this repository.
const SKIPPED: [&str; 4] = ["target", ".git", "corpus", "artifacts"];

/// The top of the repository.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    // crates/tidy is two levels deep; the manifest directory is absolute.
    here.ancestors().nth(2).expect("crates/tidy lies two levels below the root").to_owned()
}

/// A package of the workspace.
#[derive(Clone, Debug)]
pub struct Package {
    pub name: String,
    /// Relative to the root, for example `crates/model`.
    pub dir: PathBuf,
    pub manifest: String,
}

impl Package {
    /// Its own workspace (the fuzz targets): not under the workspace's lints.
    pub fn is_detached(&self) -> bool {
        self.manifest.lines().any(|l| l.trim() == "[workspace]")
    }
}

/// Every package in the tree, ordered by folder.
pub fn packages() -> Vec<Package> {
    let root = root();
    let mut found: Vec<Package> = files(&root, "toml")
        .into_iter()
        .filter(|path| path.file_name().is_some_and(|n| n == "Cargo.toml"))
        .filter_map(|path| {
            let manifest = read(&path);
            let name = manifest
                .lines()
                .skip_while(|l| l.trim() != "[package]")
                .find_map(|l| l.strip_prefix("name = "))?
                .trim_matches('"')
                .to_owned();
            let dir = path.parent()?.strip_prefix(&root).ok()?.to_owned();
            Some(Package { name, dir, manifest })
        })
        .collect();
    found.sort_by(|a, b| a.dir.cmp(&b.dir));
    found
}

/// Every `.rs` file below `dir`, in order.
pub fn rust_files(dir: &Path) -> Vec<PathBuf> {
    files(dir, "rs")
}

/// The path as people write it: relative to the root.
pub fn shown(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).display().to_string()
}

/// Whether a file holds tests only, going by its place.
pub fn is_test_file(path: &Path) -> bool {
    let shown = shown(path);
    shown.starts_with("e2e/")
        || shown.contains("/tests/")
        || shown.ends_with("/tests.rs")
        || shown.ends_with("_tests.rs")
}

/// Whether a file is made from a .proto: it is included into a module and cannot have a header.
pub fn is_generated(path: &Path) -> bool {
    shown(path).contains("/src/gen/")
}

/// The text of a file; a rule that cannot read its subject must fail, and say which.
pub fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("cannot read {}: {e}", shown(path)))
}

/// Fails with one line per finding.
#[track_caller]
pub fn report(rule: &str, findings: &[String]) {
    assert!(findings.is_empty(), "{rule}\n  {}\n", findings.join("\n  "));
}

fn files(dir: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        // A folder may vanish while another build runs in this tree.
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            let Ok(kind) = entry.file_type() else { continue };
            if kind.is_dir() && !SKIPPED.iter().any(|s| entry.file_name() == *s) {
                folders.push(path);
            } else if kind.is_file() && path.extension().is_some_and(|e| e == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}
