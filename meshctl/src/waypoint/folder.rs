//! The folder of a lab as commands see it: its files, what is in them, and how one is replaced.
//!
//! Invariant: a file is replaced by rename, whole or not at all, and only if it is still what was read.

use std::fs::{self, File as Handle};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use compile::gateway_api::Gateway;
use compile::waypoints::{USE_WAYPOINT, USE_WAYPOINT_NAMESPACE};
use compile::{Body, Object, Objects, ParsedFile, Sourced, parse_file};
use k8s_openapi::api::core::v1::Namespace;
use lab::place::{self, LabInfo};

use crate::can;

/// The files of a folder, in the order in which the mesh reads them.
#[derive(Debug)]
pub(super) struct Folder {
    pub(super) dir: PathBuf,
    pub(super) files: Vec<File>,
}

#[derive(Debug)]
pub(super) struct File {
    /// Its name in the folder.
    pub(super) name: String,
    pub(super) text: String,
    pub(super) parsed: ParsedFile,
}

impl Folder {
    pub(super) fn read(dir: &Path) -> Result<Self> {
        let files = can::texts(dir)?.into_iter().map(|(name, text)| {
            let parsed = parse_file(&name, &text);
            File { name, text, parsed }
        });
        Ok(Self { dir: dir.to_owned(), files: files.collect() })
    }

    pub(super) fn path(&self, file: &str) -> PathBuf {
        self.dir.join(file)
    }

    pub(super) fn file(&self, name: &str) -> Option<&File> {
        self.files.iter().find(|f| f.name == name)
    }

    /// The Gateway of a name: the first, which is the one in force.
    pub(super) fn gateway(
        &self,
        namespace: &str,
        name: &str,
    ) -> Option<(&File, &Object, &Gateway)> {
        self.all().find_map(|(file, object)| match &object.body {
            Body::Gateway(gateway) if &*object.namespace == namespace && &*object.name == name => {
                Some((file, object, &**gateway))
            }
            _ => None,
        })
    }

    pub(super) fn namespace(&self, name: &str) -> Option<(&File, &Object, &Namespace)> {
        self.all().find_map(|(file, object)| match &object.body {
            Body::Namespace(namespace) if &*object.name == name => {
                Some((file, object, &**namespace))
            }
            _ => None,
        })
    }

    pub(super) fn all(&self) -> impl Iterator<Item = (&File, &Object)> {
        self.files.iter().flat_map(|f| f.parsed.objects.iter().map(move |o| (f, o)))
    }

    /// What is in force.
    pub(super) fn objects(&self) -> Objects {
        let mut objects = Objects::default();
        // Of equal names the first stays: it is inserted last.
        for (_, object) in self.all().collect::<Vec<_>>().into_iter().rev() {
            objects.insert(object.clone());
        }
        objects
    }
}

/// Objects whose own label names a waypoint: `Kind/namespace/name (file:line)`.
pub(super) fn labelled(folder: &Folder, namespace: &str, waypoint: &str) -> Vec<String> {
    let names = |object: &Object| {
        let labels = labels(&object.body)?;
        let own = if object.namespace.is_empty() { &object.name } else { &object.namespace };
        let at = labels.get(USE_WAYPOINT_NAMESPACE).map_or(&**own, String::as_str);
        (labels.get(USE_WAYPOINT)? == waypoint && at == namespace).then_some(())
    };
    let all = folder.all().filter(|(_, object)| names(object).is_some());
    all.map(|(_, o)| format!("{} ({})", o.id(), o.origin.at("metadata.labels"))).collect()
}

type Labels = std::collections::BTreeMap<String, String>;

fn labels(body: &Body) -> Option<&Labels> {
    match body {
        Body::Namespace(o) => o.metadata.labels.as_ref(),
        Body::Service(o) => o.metadata.labels.as_ref(),
        Body::Pod(o) => o.metadata.labels.as_ref(),
        Body::Deployment(o) => {
            o.spec.as_ref()?.template.metadata.as_ref().and_then(|m| m.labels.as_ref())
        }
        _ => None,
    }
}

/// The Services that will be bound to a waypoint: `namespace/name`.
pub(super) fn expected(objects: &Objects, namespace: &str, waypoint: &str) -> Vec<String> {
    let wish = |labels: Option<&Labels>, own: &str| {
        let labels = labels?;
        let name = labels.get(USE_WAYPOINT).filter(|n| !n.is_empty())?.clone();
        let at = labels.get(USE_WAYPOINT_NAMESPACE).cloned();
        Some((at.unwrap_or_else(|| own.to_owned()), name))
    };
    let is_bound = |((ns, _), s): &(&(model::Str, model::Str), &Sourced<_>)| {
        let service: &k8s_openapi::api::core::v1::Service = &s.value;
        let spec = service.spec.as_ref();
        // They have no address by which a client could mean them.
        let is_callable = spec.is_some_and(|s| {
            s.type_.as_deref() != Some("ExternalName") && s.cluster_ip.as_deref() != Some("None")
        });
        let of_namespace =
            || wish(objects.namespace(ns).and_then(|n| n.metadata.labels.as_ref()), ns);
        let wish = wish(service.metadata.labels.as_ref(), ns).or_else(of_namespace);
        is_callable && wish == Some((namespace.to_owned(), waypoint.to_owned()))
    };
    let bound = objects.services.iter().filter(is_bound);
    bound.map(|((ns, name), _)| format!("{ns}/{name}")).collect()
}

/// The running lab that is meant; `None` where none runs and none was named.
pub(super) fn lab(name: Option<&str>) -> Result<Option<LabInfo>> {
    if name.is_none() && place::running()?.is_empty() {
        return Ok(None);
    }
    place::find(name).map(Some)
}

/// Puts a file in place. `before`: what it held when it was read; `None`: it was not there.
pub(super) fn replace(path: &Path, before: Option<&str>, text: &str) -> Result<()> {
    let path = target(path, before)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // Hidden, so that nobody who watches the folder takes it for configuration.
    let temporary = path.with_file_name(format!(".{name}.meshctl"));
    let write = || {
        let mut handle = Handle::create(&temporary)?;
        handle.write_all(text.as_bytes())?;
        if let Ok(meta) = fs::metadata(&path) {
            handle.set_permissions(meta.permissions())?;
        }
        handle.sync_all()?;
        fs::rename(&temporary, &path)
    };
    let written = write();
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written.with_context(|| format!("cannot write {}", path.display()))
}

/// Takes a file away, if it still holds what was read.
pub(super) fn remove(path: &Path, before: &str) -> Result<()> {
    unchanged(path, Some(before))?;
    fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()))
}

/// The file itself behind links: a rename would put the text in the place of the link.
fn target(path: &Path, before: Option<&str>) -> Result<PathBuf> {
    unchanged(path, before)?;
    if before.is_none() {
        return Ok(path.to_owned());
    }
    fs::canonicalize(path).with_context(|| format!("cannot find {}", path.display()))
}

fn unchanged(path: &Path, before: Option<&str>) -> Result<()> {
    let now = match fs::read_to_string(path) {
        Ok(text) => Some(text),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
        Err(e) => bail!("cannot read {}: {e}", path.display()),
    };
    ensure!(
        now.as_deref() == before,
        "{} was changed by somebody else just now: nothing was written; run the command again",
        path.display()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_replaced_whole_and_only_when_they_are_what_was_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.yaml");
        replace(&path, None, "one\n").unwrap();
        assert!(replace(&path, None, "two\n").is_err(), "somebody made it meanwhile");
        assert!(replace(&path, Some("other\n"), "two\n").is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "one\n");
        // A link stays one.
        let link = dir.path().join("link.yaml");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        replace(&link, Some("one\n"), "two\n").unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read_to_string(&path).unwrap(), "two\n");
        assert!(remove(&path, "one\n").is_err());
        remove(&path, "two\n").unwrap();
        // Nothing is left beside it.
        fs::remove_file(&link).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(remove(&path, "two\n").is_err());
    }
}
