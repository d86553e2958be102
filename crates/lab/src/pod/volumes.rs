//! Volumes: which kinds can be had here, and what is in them.
//!
//! An `emptyDir`, the ConfigMap with the root of the mesh, and the token of the pod's service account for the control plane.
//! Invariants: planning is pure; what is not one of these is refused with what can be had; a token is written into the
//! volume of its own pod and nowhere else.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use k8s_openapi::api::core::v1::{
    ConfigMapProjection, ConfigMapVolumeSource, KeyToPath, PodSpec, ProjectedVolumeSource,
    ServiceAccountTokenProjection, Volume,
};

use crate::registry::Secret;

/// The one ConfigMap there is, and its key.
const ROOT_CONFIG_MAP: &str = "istio-ca-root-cert";
const ROOT_KEY: &str = "root-cert.pem";
/// For whom tokens are made.
const AUDIENCE: &str = "istio-ca";

/// A volume of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VolumePlan {
    pub(crate) name: String,
    pub(crate) content: VolumeContent,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum VolumeContent {
    /// Any user of the pod may write.
    EmptyDir,
    /// Files that the lab writes, by their path in the volume. Nobody else may.
    Files(Vec<(String, FileContent)>),
}

impl VolumeContent {
    pub(crate) fn is_kept_by_lab(&self) -> bool {
        matches!(self, Self::Files(_))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileContent {
    /// The pod's token.
    Token,
    /// The root of the mesh.
    Root,
}

/// What a pod proves itself with.
#[derive(Clone, Debug)]
pub(crate) struct Credentials {
    pub(crate) token: Option<Secret>,
    /// The file with the root, which istiod-lite makes.
    pub(crate) root: PathBuf,
}

/// The volumes of a pod by name, or why one cannot be had.
pub(crate) fn plan(spec: &PodSpec) -> Vec<(&str, Result<VolumeContent, String>)> {
    spec.volumes.iter().flatten().map(|v| (v.name.as_str(), content(v))).collect()
}

fn content(volume: &Volume) -> Result<VolumeContent, String> {
    if volume.empty_dir.is_some() {
        return Ok(VolumeContent::EmptyDir);
    }
    if let Some(projected) = &volume.projected {
        return projected_files(projected).map(VolumeContent::Files);
    }
    if let Some(ConfigMapVolumeSource { name, items, optional, .. }) = &volume.config_map {
        return config_map(name, items.as_deref(), *optional).map(VolumeContent::Files);
    }
    Err(format!(
        "only emptyDir, the ConfigMap {ROOT_CONFIG_MAP} and tokens for {AUDIENCE} are supported locally"
    ))
}

fn projected_files(volume: &ProjectedVolumeSource) -> Result<Vec<(String, FileContent)>, String> {
    let mut files = vec![];
    for source in volume.sources.iter().flatten() {
        if let Some(token) = &source.service_account_token {
            files.push(token_file(token)?);
        } else if let Some(ConfigMapProjection { name, items, optional }) = &source.config_map {
            files.extend(config_map(name, items.as_deref(), *optional)?);
        } else {
            return Err(
                "of projected sources, serviceAccountToken and configMap are supported locally"
                    .to_owned(),
            );
        }
    }
    Ok(files)
}

fn token_file(token: &ServiceAccountTokenProjection) -> Result<(String, FileContent), String> {
    match token.audience.as_deref() {
        Some(AUDIENCE) => Ok((file_path(&token.path)?, FileContent::Token)),
        other => Err(format!(
            "a token for audience {:?} cannot be had locally, only one for {AUDIENCE}",
            other.unwrap_or_default()
        )),
    }
}

fn config_map(
    name: &str,
    items: Option<&[KeyToPath]>,
    optional: Option<bool>,
) -> Result<Vec<(String, FileContent)>, String> {
    if name != ROOT_CONFIG_MAP {
        let missing = format!(
            "ConfigMap {name:?}: locally there is {ROOT_CONFIG_MAP} only; write an emptyDir, or values under env"
        );
        return if optional == Some(true) { Ok(vec![]) } else { Err(missing) };
    }
    let Some(items) = items else { return Ok(vec![(ROOT_KEY.to_owned(), FileContent::Root)]) };
    let file = |item: &KeyToPath| {
        if item.key == ROOT_KEY {
            Ok((file_path(&item.path)?, FileContent::Root))
        } else {
            Err(format!(
                "ConfigMap {ROOT_CONFIG_MAP} has the key {ROOT_KEY} only, not {:?}",
                item.key
            ))
        }
    };
    items.iter().map(file).collect()
}

fn file_path(path: &str) -> Result<String, String> {
    let good = !path.is_empty() && path.split('/').all(|part| !matches!(part, "" | "." | ".."));
    if good {
        Ok(path.to_owned())
    } else {
        Err(format!("{path:?} is no path of a file in a volume"))
    }
}

/// Makes the folders of the volumes below `dir`.
pub(crate) fn make(volumes: &[VolumePlan], dir: &Path) -> Result<()> {
    for volume in volumes {
        let path = dir.join(&volume.name);
        DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(&path)
            .with_context(|| path.display().to_string())?;
        let mode = match volume.content {
            // As the kubelet does: any user of the pod may write.
            VolumeContent::EmptyDir => 0o777,
            VolumeContent::Files(_) => 0o755,
        };
        fs::set_permissions(&path, Permissions::from_mode(mode))?;
    }
    Ok(())
}

/// Writes the files that the lab keeps and that are not there yet.
pub(crate) fn fill(
    volumes: &[VolumePlan],
    dir: &Path,
    credentials: Option<&Credentials>,
) -> Result<()> {
    for volume in volumes {
        let VolumeContent::Files(files) = &volume.content else { continue };
        for (path, content) in files {
            let folder = dir.join(&volume.name);
            let target = folder.join(path);
            if !target.exists() {
                let text = text(*content, credentials)
                    .with_context(|| format!("volume {}: {path}", volume.name))?;
                write(&folder, &target, &text).with_context(|| target.display().to_string())?;
            }
        }
    }
    Ok(())
}

fn text(content: FileContent, credentials: Option<&Credentials>) -> Result<Vec<u8>> {
    let none = || anyhow!("this lab has no mesh that could give it");
    let credentials = credentials.ok_or_else(none)?;
    match content {
        FileContent::Token => {
            let token = credentials.token.as_ref().ok_or_else(none)?;
            Ok(token.text().as_bytes().to_vec())
        }
        FileContent::Root => {
            fs::read(&credentials.root).context("istiod-lite has not made the root of the mesh yet")
        }
    }
}

fn write(folder: &Path, target: &Path, text: &[u8]) -> io::Result<()> {
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent)?;
    }
    for between in target.ancestors().skip(1).take_while(|a| *a != folder) {
        fs::set_permissions(between, Permissions::from_mode(0o755))?;
    }
    // Whole or not at all: a container may be starting.
    let beside = target.with_file_name(".new");
    fs::write(&beside, text)?;
    // The pod's users have numbers of their own. Who is not in the pod never comes to this folder: it lies in memory that
    // only the lab sees, and of the lab's processes only this pod's have it mounted.
    fs::set_permissions(&beside, Permissions::from_mode(0o444))?;
    fs::rename(&beside, target)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn planned(volume: Value) -> Result<VolumeContent, String> {
        content(&named(volume))
    }

    fn named(mut volume: Value) -> Volume {
        volume["name"] = json!("v");
        serde_json::from_value(volume).unwrap()
    }

    #[test]
    fn kinds() {
        let check = |volume: Value, want: Result<&[(&str, FileContent)], &str>| {
            let got = planned(volume.clone());
            match (got, want) {
                (Ok(VolumeContent::Files(files)), Ok(want)) => {
                    let files: Vec<_> = files.iter().map(|(p, c)| (p.as_str(), *c)).collect();
                    assert_eq!(files, want, "{volume}");
                }
                (Err(why), Err(says)) => assert!(why.contains(says), "{volume}: {why}"),
                (got, want) => panic!("{volume}: {got:?}, not {want:?}"),
            }
        };
        let token = |audience: Value, path: &str| {
            let token = json!({"serviceAccountToken": {"audience": audience, "path": path}});
            json!({"projected": {"sources": [token]}})
        };
        check(token(json!("istio-ca"), "istio-token"), Ok(&[("istio-token", FileContent::Token)]));
        check(token(json!("istio-ca"), "a/b"), Ok(&[("a/b", FileContent::Token)]));
        check(token(json!("vault"), "t"), Err("\"vault\""));
        check(token(Value::Null, "t"), Err("istio-ca"));
        for path in ["../t", "/t", "", "a//b", "."] {
            check(token(json!("istio-ca"), path), Err("no path"));
        }
        let root = "istio-ca-root-cert";
        check(json!({"configMap": {"name": root}}), Ok(&[("root-cert.pem", FileContent::Root)]));
        let items = json!([{"key": "root-cert.pem", "path": "ca.pem"}]);
        check(
            json!({"configMap": {"name": root, "items": items}}),
            Ok(&[("ca.pem", FileContent::Root)]),
        );
        let items = json!([{"key": "other", "path": "ca.pem"}]);
        check(json!({"configMap": {"name": root, "items": items}}), Err("\"other\""));
        check(json!({"configMap": {"name": "mine"}}), Err("ConfigMap \"mine\""));
        check(json!({"configMap": {"name": "mine", "optional": true}}), Ok(&[]));
        check(json!({"secret": {"secretName": "s"}}), Err("only emptyDir"));
        check(json!({"projected": {"sources": [{"secret": {"name": "s"}}]}}), Err("projected"));
        assert_eq!(planned(json!({"emptyDir": {}})), Ok(VolumeContent::EmptyDir));
    }

    #[test]
    fn files_are_written_when_they_can_be() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root.pem");
        let files = vec![("a/ca.pem".to_owned(), FileContent::Root)];
        let volumes = [
            VolumePlan { name: "v".into(), content: VolumeContent::Files(files) },
            VolumePlan { name: "e".into(), content: VolumeContent::EmptyDir },
        ];
        let place = dir.path().join("volumes");
        make(&volumes, &place).unwrap();
        let mode =
            |name: &str| fs::metadata(place.join(name)).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode("v"), mode("e")), (0o755, 0o777));
        let credentials = Credentials { token: None, root: root.clone() };
        let why = format!("{:#}", fill(&volumes, &place, Some(&credentials)).unwrap_err());
        assert!(why.contains("not made the root"), "{why}");
        assert!(fill(&volumes, &place, None).is_err());
        fs::write(&root, "PEM").unwrap();
        fill(&volumes, &place, Some(&credentials)).unwrap();
        assert_eq!(fs::read_to_string(place.join("v/a/ca.pem")).unwrap(), "PEM");
        assert_eq!(mode("v/a/ca.pem"), 0o444);
        // What is there stays.
        fill(&volumes, &place, None).unwrap();
    }
}
