//! Folders of YAML to the snapshot that a proxy would hold.
//!
//! The snapshot is made the long way, through the bytes of the wire, so that an answer cannot differ
//! from a proxy's by something that is lost there (DESIGN, invariant 13).

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use compile::local::{self, Assignments, LocalConfig};
use compile::waypoints::Programmed;
use compile::{Code, Compiled, Diagnostic, Folder, MeshConfig, Objects, Severity};
use model::{Change, Snapshot};
use prost::Message;
use xds::codec::{self, Address, DecodeError, Defaults, Interner};

use super::Running;

/// As the control plane: a Kubernetes object has at most 1.5 MiB, and a file rarely holds many.
const MAX_FILE: u64 = 1 << 20;
/// Errors named before we stop: more do not help.
const MAX_ERRORS: usize = 5;

/// What there is to ask about.
#[derive(Debug)]
pub(super) struct World {
    pub(super) objects: Objects,
    pub(super) snapshot: Snapshot,
    /// Waypoints to which what names them is bound.
    pub(super) programmed: Programmed,
    pub(super) config: MeshConfig,
    /// Waypoints of which nobody says whether they were ready once; none of them is ready now.
    pub(super) uncertain: Vec<String>,
}

/// The folders of a running lab: the user's, and the objects that the lab wrote.
pub(super) fn running(lab: &Running) -> Result<World> {
    let mut objects = read(&lab.folders)?;
    let bound = lab.waypoints.iter().filter(|(_, bound)| **bound);
    objects.programmed = bound.map(|(key, _)| key.clone()).collect();
    let gateways: Vec<_> = compile::waypoints::understand(&objects).into_keys().cloned().collect();
    let mut world = world(objects)?;
    let unknown = gateways.into_iter().filter(|key| !lab.waypoints.contains_key(key));
    let unknown = unknown.filter(|key| !world.programmed.contains(key));
    world.uncertain = unknown.map(|(namespace, name)| format!("{namespace}/{name}")).collect();
    Ok(world)
}

/// Folders as they would be once everything runs and is ready.
pub(super) fn offline(folders: &[PathBuf], nodes: u8) -> Result<World> {
    let objects = read(folders)?;
    let plan = local::plan(&objects, &LocalConfig::with_nodes(nodes), &mut Assignments::default());
    world(plan.settled(&objects))
}

fn world(objects: Objects) -> Result<World> {
    let config = MeshConfig::default();
    let compiled = compile::compile(&objects, &config);
    let snapshot = through_the_wire(&compiled, &config).context("this is a bug of meshctl")?;
    let programmed = compiled.programmed;
    Ok(World { objects, snapshot, config, programmed, uncertain: Vec::new() })
}

/// Reads the files that the control plane would read.
pub(super) fn read(folders: &[PathBuf]) -> Result<Objects> {
    let mut folder = Folder::new();
    for (index, dir) in folders.iter().enumerate() {
        for (name, text) in texts(dir)? {
            folder.set_file(index, &name, &text);
        }
    }
    refuse_broken(&folder.diagnostics())?;
    Ok(folder.objects())
}

/// The files of a folder by name, in their order.
pub(super) fn texts(dir: &Path) -> Result<Vec<(String, String)>> {
    let listing = || format!("cannot read the folder {}", dir.display());
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).with_context(listing)? {
        let entry = entry.with_context(listing)?;
        if is_config(&entry.file_name().to_string_lossy()) && entry.path().is_file() {
            files.push(entry.path());
        }
    }
    files.sort_unstable();
    let mut texts = Vec::new();
    for path in files {
        // Pods that end take their file away; between listing and reading is time enough for that.
        let Some(text) = read_file(&path)? else { continue };
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        texts.push((name.into_owned(), text));
    }
    Ok(texts)
}

fn read_file(path: &Path) -> Result<Option<String>> {
    let named = || format!("cannot read {}", path.display());
    match fs::metadata(path) {
        Ok(meta) if meta.len() > MAX_FILE => {
            bail!("{} is larger than {MAX_FILE} bytes", path.display())
        }
        _ => {}
    }
    match fs::read_to_string(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        text => text.map(Some).with_context(named),
    }
}

/// The names that the control plane takes for configuration: neither hidden files nor editors' own.
fn is_config(name: &str) -> bool {
    !name.starts_with(['.', '#'])
        && [".yaml", ".yml", ".json"]
            .iter()
            .any(|end| name.len() > end.len() && name.ends_with(end))
}

/// What could not be parsed may hold the rule that decides.
fn refuse_broken(diagnostics: &[Diagnostic]) -> Result<()> {
    // Of two objects with one name the mesh takes the first, and so do we.
    let lost = |d: &&Diagnostic| d.severity == Severity::Error && d.code != Code::DuplicateObject;
    let broken: Vec<_> = diagnostics.iter().filter(lost).collect();
    if broken.is_empty() {
        return Ok(());
    }
    let mut lines: Vec<String> = broken.iter().take(MAX_ERRORS).map(|d| format!("  {d}")).collect();
    if broken.len() > MAX_ERRORS {
        lines.push(format!("  and {} more", broken.len() - MAX_ERRORS));
    }
    bail!(
        "there is no sure answer while files have errors (a running mesh keeps their last good state); repair them:\n{}",
        lines.join("\n")
    )
}

/// Links what a proxy would receive.
pub(super) fn through_the_wire(
    compiled: &Compiled,
    config: &MeshConfig,
) -> Result<Snapshot, DecodeError> {
    let defaults = Defaults { trust_domain: config.trust_domain.clone() };
    let mut interner = Interner::default();
    let mut changes = Vec::new();
    for policy in &compiled.policies {
        let name = codec::policy_name(policy);
        let bytes = codec::encode_policy(policy).encode_to_vec();
        let mut received = codec::decode_authorization(&name, &bytes, &mut interner)?;
        let origin = codec::decode_origin(&name, &codec::policy_origin(policy).encode_to_vec())?;
        codec::attach_origin(&mut received, &origin, &mut interner);
        changes.push(Change::SetPolicy(Arc::new(received)));
    }
    let services =
        compiled.services.iter().map(|s| (codec::service_name(s), codec::encode_service(s)));
    let workloads =
        compiled.workloads.iter().map(|w| (codec::workload_name(w), codec::encode_workload(w)));
    for (name, message) in services.chain(workloads) {
        let bytes = message.encode_to_vec();
        changes.push(match codec::decode_address(&name, &bytes, &defaults, &mut interner)? {
            Address::Workload(w) => Change::SetWorkload(w),
            Address::Service(s) => Change::SetService(s),
        });
    }
    for subset in &compiled.subsets {
        let bytes = codec::encode_subset(subset).encode_to_vec();
        let name = codec::subset_name(subset);
        let received = codec::decode_subset(&name, &bytes, &mut interner)?;
        changes.push(Change::SetSubset(Arc::new(received)));
    }
    for routes in &compiled.routes {
        let bytes = codec::encode_routes(routes).encode_to_vec();
        let name = codec::routes_name(routes);
        let received = codec::decode_routes(&name, &bytes, &mut interner)?;
        changes.push(Change::SetRoutes(Arc::new(received)));
    }
    Ok(Snapshot::default().with(changes))
}
