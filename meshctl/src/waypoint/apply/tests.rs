//! Folders, requests, and what would be written.

use super::*;

fn folder(files: &[(&str, &str)]) -> (tempfile::TempDir, Folder) {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    let folder = Folder::read(dir.path()).unwrap();
    (dir, folder)
}

fn request(name: &str) -> Request {
    let manifest = Manifest {
        namespace: "shop".into(),
        name: name.into(),
        traffic: None,
        with_namespace: false,
    };
    let file = manifest.file_name();
    Request { manifest, enroll: false, overwrite: false, file, chosen: false }
}

/// What is written where, and what is said; or the error.
fn planned(
    files: &[(&str, &str)],
    request: &Request,
) -> Result<(Vec<(String, String)>, String), String> {
    let (_dir, folder) = folder(files);
    let plan = plan(&folder, request).map_err(|e| format!("{e:#}"))?;
    let writes = plan.writes.into_iter().map(|w| (w.file, w.after)).collect();
    Ok((writes, [plan.done, plan.warnings].concat().join("\n")))
}

const SHOP: &str = "# ours\napiVersion: v1\nkind: Namespace\nmetadata:\n  name: shop\n  labels:\n    istio.io/dataplane-mode: ambient # mesh\n";

#[test]
fn a_new_waypoint_is_one_file() {
    let (writes, said) = planned(&[("shop.yaml", SHOP)], &request("waypoint")).unwrap();
    assert_eq!(writes.len(), 1);
    assert_eq!(writes[0].0, "waypoint-shop-waypoint.yaml");
    assert_eq!(writes[0].1, request("waypoint").manifest.file());
    assert!(said.contains("waypoint shop/waypoint applied"), "{said}");
    assert!(said.contains("nothing names the waypoint yet"), "{said}");
    // Again: nothing.
    let files = [("shop.yaml", SHOP), (writes[0].0.as_str(), writes[0].1.as_str())];
    let (again, said) = planned(&files, &request("waypoint")).unwrap();
    assert!(again.is_empty() && said.contains("there already"), "{said}");
    // With another wish: the same file. What was said once stays.
    let mut all = request("waypoint");
    all.manifest.traffic = Some(TrafficFor::All);
    let (writes, _) = planned(&files, &all).unwrap();
    assert!(writes[0].1.contains("istio.io/waypoint-for: all"));
    let files = [("shop.yaml", SHOP), (writes[0].0.as_str(), writes[0].1.as_str())];
    assert!(planned(&files, &request("waypoint")).unwrap().0.is_empty());
}

#[test]
fn a_namespace_is_enrolled_where_it_is_written() {
    let mut enroll = request("waypoint");
    enroll.enroll = true;
    let (writes, said) = planned(&[("shop.yaml", SHOP)], &enroll).unwrap();
    assert_eq!(writes.len(), 2);
    assert_eq!(writes[1].0, "shop.yaml");
    let added = edit::diff(SHOP, &writes[1].1);
    assert_eq!(added, ["+    istio.io/use-waypoint: waypoint"]);
    assert!(said.contains("namespace shop labelled istio.io/use-waypoint: waypoint"), "{said}");
    assert!(!said.contains("nothing names"), "{said}");
    // It is there already.
    let (writes, said) = planned(&[("shop.yaml", &writes[1].1)], &enroll).unwrap();
    assert!(writes.len() == 1 && said.contains("has the label"), "{said}");
    // No Namespace: it comes with the waypoint, and stays with it.
    let (writes, said) = planned(&[], &enroll).unwrap();
    assert!(writes.len() == 1 && writes[0].1.contains("kind: Namespace"), "{}", writes[0].1);
    assert!(said.contains("not in the mesh"), "{said}");
    let files = [(writes[0].0.as_str(), writes[0].1.as_str())];
    for request in [&enroll, &request("waypoint")] {
        assert!(planned(&files, request).unwrap().0.is_empty());
    }
}

#[test]
fn what_others_wrote_is_not_overwritten() {
    let refused = |files: &[(&str, &str)], request: &Request, says: &str| {
        let error = planned(files, request).unwrap_err();
        assert!(error.contains(says), "{error}");
    };
    let ours = request("waypoint").manifest.file();
    let with_more = format!("{ours}---\n{SHOP}");
    // A file of the name that holds something else.
    refused(&[("waypoint-shop-waypoint.yaml", SHOP)], &request("waypoint"), "choose another file");
    // The Gateway in a user's own file.
    let theirs = request("waypoint").manifest.yaml();
    let (writes, _) = planned(&[("all.yaml", &theirs)], &request("waypoint")).unwrap();
    assert!(writes.is_empty(), "it is as asked for");
    let mut all = request("waypoint");
    all.manifest.traffic = Some(TrafficFor::All);
    refused(&[("all.yaml", &theirs)], &all, "all.yaml:1 with class istio-waypoint");
    all.overwrite = true;
    refused(&[("all.yaml", &theirs)], &all, "edit it there");
    // A file of ours that somebody edited.
    all.overwrite = false;
    refused(&[("w.yaml", &with_more)], &all, "--overwrite");
    all.overwrite = true;
    let (writes, _) = planned(&[("w.yaml", &with_more)], &all).unwrap();
    assert_eq!(writes[0].0, "w.yaml");
    // Elsewhere, when it is here.
    let mut elsewhere = request("waypoint");
    (elsewhere.file, elsewhere.chosen) = ("other.yaml".into(), true);
    refused(&[("w.yaml", &ours)], &elsewhere, "defined at w.yaml");
}

#[test]
fn labels_that_are_in_the_way() {
    let mut enroll = request("waypoint");
    enroll.enroll = true;
    let labelled = format!("{SHOP}    istio.io/use-waypoint: other\n");
    let error = planned(&[("shop.yaml", &labelled)], &enroll).unwrap_err();
    assert!(
        error.contains("other at shop.yaml:6") && error.contains("Nothing was written"),
        "{error}"
    );
    enroll.overwrite = true;
    let (writes, _) = planned(&[("shop.yaml", &labelled)], &enroll).unwrap();
    let changed = edit::diff(&labelled, &writes[1].1);
    assert_eq!(
        changed,
        ["-    istio.io/use-waypoint: other", "+    istio.io/use-waypoint: waypoint"]
    );
    let elsewhere = format!("{SHOP}    istio.io/use-waypoint-namespace: edge\n");
    let error = planned(&[("shop.yaml", &elsewhere)], &enroll).unwrap_err();
    assert!(error.contains("use-waypoint-namespace: edge"), "{error}");
    // Not to be edited safely: said, with what to add.
    let anchored = "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: shop\n  labels: &l\n    a: b\n  annotations: *l\n";
    let error = planned(&[("shop.yaml", anchored)], &enroll).unwrap_err();
    assert!(error.contains("add `istio.io/use-waypoint: waypoint`"), "{error}");
}
