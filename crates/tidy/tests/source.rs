//! What every source file and manifest keeps to.

use std::collections::BTreeMap;
use std::path::Path;

use tidy::{Source, is_generated, is_test_file, packages, read, report, root, rust_files, shown};

/// Lines of a function from `fn` to its closing brace: one screen.
const LONGEST_FUNCTION: usize = 70;

/// Functions that may be longer: `path name lines`, one a line. They may shrink, not grow.
const LONG_FUNCTIONS: &str = "crates/tidy/long-functions.txt";

#[test]
fn every_file_opens_with_its_purpose() {
    let findings: Vec<String> = rust_files(&root())
        .iter()
        .filter(|path| !is_generated(path) && !opens_with_purpose(&read(path)))
        .map(|path| shown(path))
        .collect();
    report("these files do not open with a //! header (purpose, invariants)", &findings);
}

#[test]
fn every_package_is_under_the_workspace_lints() {
    let findings: Vec<String> = packages()
        .iter()
        .filter(|p| !p.is_detached())
        .filter(|p| {
            let mut lines =
                p.manifest.lines().map(str::trim).skip_while(|l| *l != "[lints]").skip(1);
            !lines.any(|l| l == "workspace = true")
        })
        .map(|p| p.dir.display().to_string())
        .collect();
    report("these manifests lack [lints] workspace = true", &findings);
}

#[test]
fn nothing_is_left_undone() {
    let mut findings = Vec::new();
    for path in rust_files(&root()) {
        let text = read(&path);
        // The word is split, or this file would find itself.
        let mark = concat!("FIX", "ME");
        let marks = text
            .lines()
            .zip(1..)
            .filter(|(l, _)| l.contains(mark))
            .map(|(_, n)| (n, mark.to_owned()));
        let macros = if is_test_file(&path) { Vec::new() } else { unfinished(&path, &text) };
        findings.extend(
            marks.chain(macros).map(|(line, what)| format!("{}:{line} {what}", shown(&path))),
        );
    }
    report("unfinished code", &findings);
}

/// What is not run must not be there: no documentation test (`doctest = false`), no test in a program beside a library (`test =
/// false`), since each of them would be one more program to build and link.
#[test]
fn tests_stand_where_they_are_run() {
    let mut findings = Vec::new();
    for package in packages().iter().filter(|p| !p.is_detached()) {
        let dir = root().join(&package.dir);
        if !dir.join("src/lib.rs").exists() {
            continue;
        }
        if !package.manifest.contains("doctest = false") {
            findings.push(format!("{}: [lib] lacks doctest = false", package.dir.display()));
        }
        let is_program =
            |path: &Path| path == dir.join("src/main.rs") || path.starts_with(dir.join("src/bin"));
        let programs = rust_files(&dir).into_iter().filter(|path| is_program(path));
        let tests = programs.filter(|path| read(path).contains("#[test]"));
        findings.extend(tests.map(|path| format!("{}: a test in a program", shown(&path))));
    }
    for path in rust_files(&root()) {
        let text = read(&path);
        let mut fences = text.lines().zip(1..).filter(|(line, _)| {
            let line = line.trim_start();
            line.starts_with("//! ```") || line.starts_with("/// ```")
        });
        // Each opens with its language, and the next one closes it.
        while let Some((open, line)) = fences.next() {
            if !open.ends_with("```text") {
                findings.push(format!(
                    "{}:{line} a block of documentation that is not ```text",
                    shown(&path)
                ));
            }
            fences.next();
        }
    }
    report("tests that nobody runs", &findings);
}

#[test]
fn functions_fit_a_screen() {
    let list = read(&root().join(LONG_FUNCTIONS));
    let mut allowed: BTreeMap<(String, String), usize> =
        list.lines().filter_map(allowance).collect();
    let mut findings = Vec::new();
    for path in rust_files(&root()).into_iter().filter(|p| !is_test_file(p)) {
        for function in parse(&path, &read(&path)).functions {
            let limit = allowed.remove(&(shown(&path), function.name.clone()));
            match limit {
                Some(limit) if function.lines > limit => findings.push(format!(
                    "{}:{} {} grew from {limit} to {} lines",
                    shown(&path),
                    function.line,
                    function.name,
                    function.lines
                )),
                Some(_) if function.lines <= LONGEST_FUNCTION => findings.push(format!(
                    "{}:{} {} has {} lines: take it off {LONG_FUNCTIONS}",
                    shown(&path),
                    function.line,
                    function.name,
                    function.lines
                )),
                None if function.lines > LONGEST_FUNCTION => findings.push(format!(
                    "{}:{} {} has {} lines of at most {LONGEST_FUNCTION}",
                    shown(&path),
                    function.line,
                    function.name,
                    function.lines
                )),
                Some(_) | None => {}
            }
        }
    }
    findings.extend(
        allowed
            .keys()
            .map(|(path, name)| format!("{path} has no {name}: take it off {LONG_FUNCTIONS}")),
    );
    report("functions that do not fit a screen", &findings);
}

#[test]
fn a_purpose_is_a_doc_header() {
    let check = |text: &str, want: bool| assert_eq!(opens_with_purpose(text), want, "{text:?}");
    check("//! What this is.\n", true);
    check("#!/usr/bin/env x\n//! What this is.\n", true);
    check("// Copyright\n//! What this is.\n", false);
    check("use std::fmt;\n", false);
    check("//!\n", false);
    check("", false);
}

fn opens_with_purpose(text: &str) -> bool {
    text.lines()
        .find(|l| !l.starts_with("#!/"))
        .and_then(|l| l.strip_prefix("//!"))
        .is_some_and(|purpose| !purpose.trim().is_empty())
}

fn unfinished(path: &Path, text: &str) -> Vec<(usize, String)> {
    let source = parse(path, text);
    ["todo", "unimplemented", "dbg"]
        .iter()
        .flat_map(|name| {
            source.lines_of(&[name, "!"]).into_iter().map(move |line| (line, format!("{name}!")))
        })
        .collect()
}

fn parse(path: &Path, text: &str) -> Source {
    Source::parse(text).unwrap_or_else(|| panic!("{} is not Rust", shown(path)))
}

fn allowance(line: &str) -> Option<((String, String), usize)> {
    let mut words = line.split_whitespace().take_while(|w| !w.starts_with('#'));
    let (path, name) = (words.next()?, words.next()?);
    let lines = words.next().and_then(|n| n.parse().ok());
    Some((
        (path.to_owned(), name.to_owned()),
        lines.unwrap_or_else(|| panic!("{LONG_FUNCTIONS}: {line:?} has no number")),
    ))
}
