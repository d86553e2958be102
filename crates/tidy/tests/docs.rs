//! The documents say what is there, and what is there is in the documents.

use std::fs;
use std::path::Path;

use tidy::{packages, read, reasons_page, report, root};

#[test]
fn architecture_names_every_crate() {
    let text = architecture();
    let findings: Vec<String> = packages()
        .iter()
        .map(|p| p.dir.display().to_string())
        .filter(|dir| !names(&text, dir))
        .map(|dir| format!("{dir} is not named"))
        .collect();
    report("ARCHITECTURE.md must name every crate's folder", &findings);
}

#[test]
fn architecture_names_only_what_exists() {
    let findings: Vec<String> = paths_in(&architecture())
        .into_iter()
        .filter(|path| root().join(path.split('/').next().unwrap_or_default()).is_dir())
        .filter(|path| !exists(path))
        .map(|path| format!("{path} does not exist"))
        .collect();
    report("ARCHITECTURE.md names what is not there", &findings);
}

#[test]
fn reasons_page_is_current() {
    let path = root().join("docs/reasons.md");
    let want = reasons_page();
    if std::env::var_os("TIDY_WRITE").is_some() {
        fs::write(&path, &want).expect("docs/reasons.md can be written");
    }
    let got = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        got == want,
        "docs/reasons.md is not what crates/model/src/reason.rs says: TIDY_WRITE=1 cargo test -p tidy --test docs"
    );
}

#[test]
fn the_page_of_istio_fields_is_current() {
    let path = root().join("docs/istio-fields.md");
    let want = compile::istio::fields::page();
    if std::env::var_os("TIDY_WRITE").is_some() {
        fs::write(&path, &want).expect("docs/istio-fields.md can be written");
    }
    let got = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        got == want,
        "docs/istio-fields.md is not what crates/compile/src/istio/fields says: TIDY_WRITE=1 cargo test -p tidy --test docs"
    );
}

#[test]
fn paths_are_found_in_backticks() {
    let text = "`crates/model`, crates/engine and `ztunnel/src/main.rs:12`; not `a b/c`, `http://x/y`, `x/*`";
    assert_eq!(paths_in(text), ["crates/model", "ztunnel/src/main.rs"]);
    assert!(names(text, "crates/model"));
    assert!(!names(text, "crates/mod"));
    assert!(names("the `ztunnel`", "ztunnel"));
}

fn architecture() -> String {
    read(&root().join("ARCHITECTURE.md"))
}

/// Whether `text` holds `dir` as a word of its own.
fn names(text: &str, dir: &str) -> bool {
    text.split(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '/' | '-' | '_')))
        .any(|word| word.trim_end_matches('/') == dir)
}

/// A file or folder, or a module named as `CRATE/MODULE`.
fn exists(path: &str) -> bool {
    let module = packages().iter().any(|p| {
        let Ok(module) = Path::new(path).strip_prefix(&p.dir) else { return false };
        let module = root().join(&p.dir).join("src").join(module);
        module.exists() || module.with_extension("rs").exists()
    });
    module || root().join(path).exists()
}

/// Paths between backticks: words with a slash and nothing but path characters.
fn paths_in(text: &str) -> Vec<&str> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '-' | '_' | '.');
    text.split('`')
        .skip(1)
        .step_by(2)
        .map(|quoted| quoted.split(':').next().unwrap_or_default())
        .filter(|path| path.contains('/') && path.chars().all(plain))
        .collect()
}
