//! What stays in force while files change.

use super::*;
use crate::Severity;

fn account(name: &str, line: &str) -> String {
    format!("{line}{{apiVersion: v1, kind: ServiceAccount, metadata: {{name: {name}}}}}\n")
}

/// Names of the service accounts in force.
fn names(folder: &Folder) -> Vec<String> {
    folder.objects().service_accounts.keys().map(|(_, name)| name.to_string()).collect()
}

fn codes(folder: &Folder) -> Vec<(Severity, Code, String)> {
    folder.diagnostics().into_iter().map(|d| (d.severity, d.code, d.origin)).collect()
}

#[test]
fn a_broken_file_keeps_its_last_good_objects() {
    let mut folder = Folder::new();
    folder.set_file(0, "a.yaml", &(account("one", "") + &account("two", "---\n")));
    assert_eq!(names(&folder), ["one", "two"]);
    // Not YAML; then YAML with a fault in one of two documents: all or nothing.
    for broken in ["{{{", &(account("three", "") + &account("Bad", "---\n"))] {
        folder.set_file(0, "a.yaml", broken);
        assert_eq!(names(&folder), ["one", "two"]);
        let found = folder.diagnostics();
        assert_eq!(found[0].severity, Severity::Error);
        assert_eq!(found[1].code, Code::LastGoodInForce);
    }
    folder.set_file(0, "a.yaml", &account("three", ""));
    assert_eq!((names(&folder), folder.diagnostics()), (vec!["three".to_owned()], vec![]));
}

#[test]
fn a_file_that_was_never_good_gives_what_it_can() {
    let mut folder = Folder::new();
    folder.set_file(0, "a.yaml", &(account("one", "") + &account("Bad", "---\n")));
    assert_eq!(names(&folder), ["one"]);
    folder.set_file(0, "a.yaml", &(account("two", "") + &account("Bad", "---\n")));
    assert_eq!(names(&folder), ["two"]);
    // A kind that is nobody's business does not hold the file back.
    folder.set_file(0, "a.yaml", &account("three", ""));
    let foreign = "---\n{apiVersion: example.com/v1, kind: Thing, metadata: {name: x}}\n";
    folder.set_file(0, "a.yaml", &(account("four", "") + foreign));
    assert_eq!(names(&folder), ["four"]);
    assert_eq!(codes(&folder), [(Severity::Error, Code::UnknownKind, "a.yaml:3".to_owned())]);
}

#[test]
fn truncation_is_not_deletion() {
    let mut folder = Folder::new();
    folder.set_file(0, "a.yaml", "");
    assert_eq!(folder.diagnostics(), []);
    folder.set_file(0, "a.yaml", &account("one", ""));
    folder.set_file(0, "a.yaml", " \n");
    assert_eq!(names(&folder), ["one"]);
    assert_eq!(codes(&folder), [(Severity::Warning, Code::EmptyFile, "a.yaml:1".to_owned())]);
    // A comment is a decision.
    folder.set_file(0, "a.yaml", "# nothing here\n");
    assert_eq!((names(&folder), codes(&folder)), (vec![], vec![]));
    folder.set_file(0, "a.yaml", &account("one", ""));
    folder.remove_file(0, "a.yaml");
    assert_eq!((names(&folder), codes(&folder)), (vec![], vec![]));
    assert_eq!(folder.paths(0).count(), 0);
}

#[test]
fn duplicates_and_precedence() {
    let line_of = |folder: &Folder| {
        folder.objects().service_accounts[&("default".into(), "one".into())].origin.to_string()
    };
    let mut folder = Folder::new();
    // By path, not by the order of events.
    folder.set_file(0, "b.yaml", &account("one", ""));
    folder.set_file(0, "a.yaml", &account("one", "\n"));
    assert_eq!(line_of(&folder), "a.yaml:2");
    let found = folder.diagnostics();
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].severity, found[0].code), (Severity::Error, Code::DuplicateObject));
    assert_eq!(found[0].object, "ServiceAccount/default/one");
    assert!(found[0].message.contains("a.yaml:2") && found[0].message.contains("b.yaml:1"));
    // Twice in one file.
    folder.set_file(0, "a.yaml", &(account("two", "") + &account("two", "---\n")));
    assert_eq!(codes(&folder), [(Severity::Error, Code::DuplicateObject, "a.yaml:3".to_owned())]);
    // A later folder wins, silently.
    folder.set_file(0, "a.yaml", "# empty\n");
    folder.set_file(1, "state/one.json", &account("one", "\n\n\n"));
    assert_eq!(line_of(&folder), "state/one.json:4");
    assert_eq!(folder.diagnostics(), []);
    folder.remove_file(1, "state/one.json");
    assert_eq!(line_of(&folder), "b.yaml:1");
}
