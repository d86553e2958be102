//! Styles of YAML that people write, and what an edit makes of them.

use proptest::prelude::*;

use super::*;

const LABEL: Label<'_> = Label { namespace: "shop", name: "istio.io/use-waypoint" };

/// Sets the label to `waypoint`; the lines that changed.
#[track_caller]
fn set(text: &str, want: &[&str]) {
    let edited = edit("f.yaml", text, LABEL, Change::Set("waypoint"));
    let edited = edited.unwrap_or_else(|| panic!("no safe way for:\n{text}"));
    assert_eq!(diff(text, &edited), want, "{edited}");
    // Once more changes nothing.
    let again = edit("f.yaml", &edited, LABEL, Change::Set("waypoint"));
    assert_eq!(again.as_deref(), Some(edited.as_str()));
    // And back; the text is the same, but for `labels` without labels.
    let back = edit("f.yaml", &edited, LABEL, Change::Remove).unwrap();
    let left = diff(text, &back);
    assert!(
        left.iter().all(|l| l.contains("labels") || l.contains("waypoint")),
        "{left:?}\n{back}"
    );
}

#[test]
fn blocks() {
    set(
        "# shop\napiVersion: v1\nkind: Namespace\nmetadata:\n  name: shop # ours\n  labels:\n    # the mesh\n    istio.io/dataplane-mode: ambient\n",
        &["+    istio.io/use-waypoint: waypoint"],
    );
    set(
        "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: shop\n",
        &["+  labels:", "+    istio.io/use-waypoint: waypoint"],
    );
    set(
        "kind: Namespace\nmetadata: # about\n    name: shop\napiVersion: v1\n---\nkind: ServiceAccount\napiVersion: v1\nmetadata:\n  name: a\n  namespace: shop\n",
        &["+    labels:", "+      istio.io/use-waypoint: waypoint"],
    );
    // The end of the file is the end of the line.
    set(
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}",
        &[
            "-metadata: {name: shop}",
            "+metadata: {labels: {istio.io/use-waypoint: waypoint}, name: shop}",
        ],
    );
    set(
        "apiVersion: v1\nkind: Namespace\nmetadata:\n  labels:\n    \"a\": b\n  name: shop",
        &["+    istio.io/use-waypoint: waypoint"],
    );
    // In a list.
    set(
        "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Namespace\n  metadata:\n    name: shop\n    labels:\n      a: b\n",
        &["+      istio.io/use-waypoint: waypoint"],
    );
    // Windows.
    let text = "apiVersion: v1\r\nkind: Namespace\r\nmetadata:\r\n  name: shop\r\n";
    let edited = edit("f.yaml", text, LABEL, Change::Set("w")).unwrap();
    assert_eq!(edited.matches("\r\n").count(), edited.matches('\n').count());
}

#[test]
fn braces() {
    set(
        "{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}}\n",
        &[
            "-{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}}",
            "+{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {istio.io/use-waypoint: waypoint, istio.io/dataplane-mode: ambient}}}",
        ],
    );
    set(
        "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: shop\n  labels: {}\n",
        &["-  labels: {}", "+  labels: {istio.io/use-waypoint: waypoint}"],
    );
    set(
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n---\napiVersion: v1\nkind: Namespace\nmetadata: {name: other}\n",
        &[
            "-metadata: {name: shop}",
            "+metadata: {labels: {istio.io/use-waypoint: waypoint}, name: shop}",
        ],
    );
    let json = "{\n  \"apiVersion\": \"v1\",\n  \"kind\": \"Namespace\",\n  \"metadata\": {\n    \"name\": \"shop\"\n  }\n}\n";
    let edited = edit("f.json", json, LABEL, Change::Set("waypoint")).unwrap();
    assert!(serde_json::from_str::<serde_json::Value>(&edited).is_ok(), "{edited}");
}

#[test]
fn values() {
    let labelled = |value: &str| {
        format!(
            "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: shop\n  labels:\n    istio.io/use-waypoint: {value} # which\n    a: b\n"
        )
    };
    let check = |old: &str, new: &str, want: &str| {
        let text = labelled(old);
        let edited = edit("f.yaml", &text, LABEL, Change::Set(new)).unwrap();
        assert_eq!(edited, labelled(want));
        let removed = edit("f.yaml", &edited, LABEL, Change::Remove).unwrap();
        assert!(!removed.contains("waypoint") && removed.contains("a: b"), "{removed}");
    };
    check("old", "new", "new");
    check("\"old\"", "new", "\"new\"");
    check("none", "waypoint", "waypoint");
    // A word that means something else without quotes.
    check("old", "true", "\"true\"");
    // The label beside it is another one.
    let text = labelled("w").replace("    a: b", "    istio.io/use-waypoint-namespace: w");
    let edited = edit("f.yaml", &text, LABEL, Change::Set("v")).unwrap();
    assert!(edited.contains("use-waypoint: v ") && edited.contains("-namespace: w"), "{edited}");
    let removed = edit("f.yaml", &text, LABEL, Change::Remove).unwrap();
    assert!(removed.contains("-namespace: w") && !removed.contains("use-waypoint:"), "{removed}");
    let flow = "{apiVersion: v1, kind: Namespace, metadata: {labels: {a: b, istio.io/use-waypoint: w}, name: shop}}\n";
    let removed = edit("f.yaml", flow, LABEL, Change::Remove).unwrap();
    assert_eq!(
        removed,
        "{apiVersion: v1, kind: Namespace, metadata: {labels: {a: b}, name: shop}}\n"
    );
}

#[test]
fn what_cannot_be_edited_safely_is_left() {
    let check = |text: &str| {
        assert_eq!(edit("f.yaml", text, LABEL, Change::Set("waypoint")), None, "{text}");
    };
    check("");
    check("kind: [");
    check("apiVersion: v1\nkind: Namespace\nmetadata:\n  name: other\n");
    // Labels that stand elsewhere.
    check(
        "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: shop\n  labels: &l\n    a: b\n  annotations: *l\n",
    );
}

proptest! {
    /// Whatever the text, an edit that is made changes this label and nothing else.
    #[test]
    fn nothing_else_changes(
        indent in 1_usize..5, flow: bool, labelled: bool, comment: bool, before: bool, after: bool,
        value in "[a-z][a-z0-9-]{0,8}[a-z0-9]",
    ) {
        let pad = " ".repeat(indent);
        let note = if comment { " # labels: {metadata}" } else { "" };
        let labels = match (labelled, flow) {
            (false, _) => String::new(),
            (true, true) => format!("{pad}labels: {{metadata: labels}}{note}\n"),
            (true, false) => format!("{pad}labels:{note}\n{pad}{pad}metadata: labels\n"),
        };
        let other = "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: other\n  labels: {labels: metadata}\n---\n";
        let other = |there: bool| if there { other } else { "" };
        let text = format!(
            "{}apiVersion: v1\nkind: Namespace\nmetadata:{note}\n{labels}{pad}name: shop\n---\n{}",
            other(before), other(after)
        );
        let edited = edit("f.yaml", &text, LABEL, Change::Set(&value));
        prop_assert!(edited.is_some(), "{}", text);
        let (old, new) = (parse_file("f.yaml", &text), parse_file("f.yaml", edited.as_deref().unwrap()));
        prop_assert!(is_only_change(&old, &new, LABEL, Change::Set(&value)));
    }
}
