//! `meshctl waypoint apply`: one file into the folder of the running lab, and a label where it was asked for.
//!
//! What is written is worked out first, from everything there is ([`plan`]); then it is written, or shown. Invariant: nothing
//! is written when a part of what was asked for cannot be done.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use compile::waypoints::{
    TrafficFor, USE_WAYPOINT, USE_WAYPOINT_NAMESPACE, WAYPOINT_CLASS, WAYPOINT_FOR,
};
use lab::place::LabInfo;

use super::edit::{self, Change, Label};
use super::folder::{self, Folder};
use super::manifest::Manifest;
use super::{Lab, Traffic, wait};
use crate::print::{self, Color};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Namespace of the waypoint
    #[arg(short, long, default_value = "default", value_parser = super::namespace)]
    namespace: String,
    /// Name of the waypoint
    #[arg(long, default_value = "waypoint", value_parser = super::name)]
    name: String,
    /// What goes through it: calls to Services, to pods' own addresses, all or none [default: what its class says: service]
    #[arg(long = "for", value_enum, value_name = "TRAFFIC")]
    traffic: Option<Traffic>,
    /// Send the traffic of the namespace through it: sets the label istio.io/use-waypoint
    #[arg(long)]
    enroll_namespace: bool,
    /// Replace what is there: an edited file of this command, a namespace's label that names another waypoint
    #[arg(long)]
    overwrite: bool,
    /// Wait until it takes connections and Services go through it
    #[arg(long)]
    wait: bool,
    /// How long to wait
    #[arg(long, value_name = "SECONDS", default_value_t = 90)]
    timeout: u64,
    /// The file to write: a name in the lab's folder, or a path [default: waypoint-NAMESPACE-NAME.yaml]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Show what would be written
    #[arg(long, conflicts_with = "wait")]
    dry_run: bool,
    #[command(flatten)]
    lab: Lab,
}

/// What was asked for.
#[derive(Clone, Debug)]
pub(super) struct Request {
    pub(super) manifest: Manifest,
    pub(super) enroll: bool,
    pub(super) overwrite: bool,
    /// Name in the folder.
    pub(super) file: String,
    pub(super) chosen: bool,
}

/// A file to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Write {
    pub(super) file: String,
    pub(super) before: Option<String>,
    pub(super) after: String,
}

/// What is to be done, and what there is to say about it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) writes: Vec<Write>,
    pub(super) done: Vec<String>,
    pub(super) warnings: Vec<String>,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let lab = folder::lab(args.lab.lab.as_deref())?;
    ensure!(lab.is_some() || !args.wait, "no lab is running: there is nothing to wait for");
    let manifest = Manifest {
        namespace: args.namespace.clone(),
        name: args.name.clone(),
        traffic: args.traffic.map(Into::into),
        with_namespace: false,
    };
    let (dir, file) = place(lab.as_ref(), args.out.as_deref(), &manifest)?;
    let folder = Folder::read(&dir)?;
    let request = Request {
        manifest,
        enroll: args.enroll_namespace,
        overwrite: args.overwrite,
        chosen: args.out.is_some(),
        file,
    };
    let plan = plan(&folder, &request)?;
    let colored = print::on_stdout();
    if args.dry_run {
        show(&plan);
    } else {
        carry_out(&folder, &plan)?;
        for text in &plan.done {
            print::line(&format!("{} {text}", print::paint("✓", Color::Green, colored)));
        }
    }
    for text in &plan.warnings {
        print::line(&format!("{} {text}", print::paint("!", Color::Yellow, colored)));
    }
    match lab.filter(|_| args.wait) {
        Some(lab) => {
            wait::ready(&lab, &args.namespace, &args.name, Duration::from_secs(args.timeout))
        }
        None => Ok(ExitCode::SUCCESS),
    }
}

/// The folder, and the name of the file in it.
fn place(
    lab: Option<&LabInfo>,
    out: Option<&Path>,
    manifest: &Manifest,
) -> Result<(PathBuf, String)> {
    let Some(out) = out else {
        let lab = lab.context(
            "no lab is running for this user: start one with `meshctl local up DIR`, or say with --out which file to write",
        )?;
        return Ok((lab.dir.clone(), manifest.file_name()));
    };
    let file =
        out.file_name().and_then(|n| n.to_str()).context("--out is not the path of a file")?;
    let is_config = [".yaml", ".yml"].iter().any(|end| file.ends_with(end));
    ensure!(
        is_config && !file.starts_with(['.', '#']),
        "--out {}: the mesh reads files that end in .yaml, and no hidden ones",
        out.display()
    );
    let folder = out.parent().filter(|p| !p.as_os_str().is_empty());
    let dir = match (folder, lab) {
        (None, Some(lab)) => lab.dir.clone(),
        (folder, lab) => {
            let dir = std::fs::canonicalize(folder.unwrap_or_else(|| Path::new(".")))
                .with_context(|| format!("no folder for --out {}", out.display()))?;
            if let Some(lab) = lab.filter(|lab| lab.dir != dir) {
                bail!(
                    "--out {} is not in {}, the folder of lab {:?}, which would not see it: give a name without a folder",
                    out.display(),
                    lab.dir.display(),
                    lab.name
                );
            }
            dir
        }
    };
    Ok((dir, file.to_owned()))
}

/// Works out what to write.
pub(super) fn plan(folder: &Folder, request: &Request) -> Result<Plan> {
    let mut plan = Plan::default();
    let mut manifest = request.manifest.clone();
    let namespace = folder.namespace(&manifest.namespace);
    let file = holder(folder, request)?;
    // The Namespace may be ours, from the last time.
    let ours = namespace.as_ref().is_some_and(|(f, ..)| {
        Some(&f.name) == file.as_ref() && Manifest::of_file(&f.text).is_some()
    });
    manifest.with_namespace = match &namespace {
        None => request.enroll,
        Some(_) => ours,
    };
    match &file {
        Some(file) => plan_file(folder, request, &manifest, file, &mut plan)?,
        None => ensure!(
            !manifest.with_namespace,
            "there is no Namespace {:?} to label: add {{apiVersion: v1, kind: Namespace, metadata: {{name: {}, labels: \
             {{{USE_WAYPOINT}: {}}}}}}} to a file of {}",
            manifest.namespace,
            manifest.namespace,
            manifest.name,
            folder.dir.display()
        ),
    }
    if request.enroll {
        enroll(folder, request, manifest.with_namespace, &mut plan)?;
    }
    warn(folder, request, &mut plan);
    Ok(plan)
}

/// The file that the waypoint is to be written to; `None`: a file of the user's has it as it should be.
fn holder(folder: &Folder, request: &Request) -> Result<Option<String>> {
    let Manifest { namespace, name, traffic, .. } = &request.manifest;
    let Some((file, object, gateway)) = folder.gateway(namespace, name) else {
        if let Some(there) = folder.file(&request.file) {
            bail!(
                "{} is there already, and Gateway {namespace}/{name} is not in it: choose another file with --out",
                folder.path(&there.name).display()
            );
        }
        // One that cannot be read as text is not ours either.
        ensure!(
            !folder.path(&request.file).exists(),
            "{} is there already: choose another file with --out",
            folder.path(&request.file).display()
        );
        return Ok(Some(request.file.clone()));
    };
    let at = object.origin.to_string();
    if request.chosen && file.name != request.file {
        bail!(
            "Gateway {namespace}/{name} is defined at {at} already: leave --out away, or delete it first"
        );
    }
    let is_marked = file.text.starts_with(super::manifest::MARK);
    if Manifest::of_file(&file.text).is_some() || (is_marked && request.overwrite) {
        return Ok(Some(file.name.clone()));
    }
    let labels = gateway.metadata.labels.as_ref();
    let known = labels.and_then(|l| l.get(WAYPOINT_FOR)).map(String::as_str);
    let is_as_asked = gateway.spec.gateway_class_name == WAYPOINT_CLASS
        && (traffic.is_none() || traffic.map(TrafficFor::as_str) == known);
    if is_as_asked {
        return Ok(None);
    }
    let help = if is_marked {
        "; it was edited since it was written: --overwrite writes it anew"
    } else {
        ": edit it there"
    };
    bail!(
        "Gateway {namespace}/{name} is defined at {at} with class {} and {WAYPOINT_FOR}: {}{help}",
        gateway.spec.gateway_class_name,
        known.unwrap_or("not set")
    )
}

fn plan_file(
    folder: &Folder,
    request: &Request,
    manifest: &Manifest,
    file: &str,
    plan: &mut Plan,
) -> Result<()> {
    let before = folder.file(file).map(|f| f.text.clone());
    let mut manifest = manifest.clone();
    if let Some(known) = before.as_deref().and_then(Manifest::of_file) {
        // Said once, it stays until something else is said.
        manifest.traffic = manifest.traffic.or(known.traffic);
    }
    let after = manifest.file();
    let path = folder.path(file);
    let what = format!("waypoint {}/{}", manifest.namespace, manifest.name);
    if before.as_deref() == Some(after.as_str()) {
        plan.done.push(format!("{what} is there already ({})", path.display()));
        return Ok(());
    }
    let edited = before.is_some() && before.as_deref().and_then(Manifest::of_file).is_none();
    ensure!(
        !edited || request.overwrite,
        "{} was edited: --overwrite writes it anew",
        path.display()
    );
    plan.done.push(format!("{what} applied ({})", path.display()));
    plan.writes.push(Write { file: file.to_owned(), before, after });
    Ok(())
}

/// The label on the Namespace.
fn enroll(folder: &Folder, request: &Request, is_new: bool, plan: &mut Plan) -> Result<()> {
    let Manifest { namespace, name, .. } = &request.manifest;
    let label = format!("{USE_WAYPOINT}: {name}");
    if is_new {
        plan.done.push(format!("namespace {namespace} labelled {label}"));
        return Ok(());
    }
    let (file, object, known) = folder.namespace(namespace).context("the Namespace is gone")?;
    let labels = known.metadata.labels.clone().unwrap_or_default();
    let at = object.origin.at("metadata.labels");
    if let Some(other) = labels.get(USE_WAYPOINT_NAMESPACE).filter(|other| *other != namespace) {
        bail!(
            "namespace {namespace} has {USE_WAYPOINT_NAMESPACE}: {other} at {at}, where the label would name another \
             waypoint: take that away first. Nothing was written"
        );
    }
    match labels.get(USE_WAYPOINT) {
        Some(known) if known == name => {
            plan.done.push(format!("namespace {namespace} has the label {label} already ({at})"));
            return Ok(());
        }
        Some(other) if !request.overwrite => bail!(
            "namespace {namespace} has {USE_WAYPOINT}: {other} at {at}: --overwrite replaces it. Nothing was written"
        ),
        _ => {}
    }
    let wanted = Label { namespace, name: USE_WAYPOINT };
    let after = edit::edit(&file.name, &file.text, wanted, Change::Set(name)).with_context(|| {
        format!(
            "the label cannot be set safely in the text of {}: add `{label}` to metadata.labels of Namespace {namespace} \
             ({at}) yourself, and run this without --enroll-namespace. Nothing was written",
            folder.path(&file.name).display()
        )
    })?;
    plan.done.push(format!("namespace {namespace} labelled {label} ({at})"));
    plan.writes.push(Write { file: file.name.clone(), before: Some(file.text.clone()), after });
    Ok(())
}

fn warn(folder: &Folder, request: &Request, plan: &mut Plan) {
    let Manifest { namespace, name, .. } = &request.manifest;
    let found = folder.namespace(namespace);
    let labels = found.as_ref().and_then(|(.., n)| n.metadata.labels.clone()).unwrap_or_default();
    if labels.get(compile::DATAPLANE_MODE).map(String::as_str) != Some("ambient") {
        plan.warnings.push(format!(
            "namespace {namespace} is not in the mesh: its pods' own calls do not go through waypoints (label {}: ambient)",
            compile::DATAPLANE_MODE
        ));
    }
    let is_used = request.enroll || !folder::labelled(folder, namespace, name).is_empty();
    if !is_used {
        plan.warnings.push(format!(
            "nothing names the waypoint yet: --enroll-namespace, or the label {USE_WAYPOINT}: {name} on a Namespace, a \
             Service or a pod, sends traffic through it"
        ));
    }
}

fn carry_out(folder: &Folder, plan: &Plan) -> Result<()> {
    for Write { file, before, after } in &plan.writes {
        folder::replace(&folder.path(file), before.as_deref(), after)?;
    }
    Ok(())
}

fn show(plan: &Plan) {
    for Write { file, before, after } in &plan.writes {
        print::line(&format!("--- {file}"));
        for line in edit::diff(before.as_deref().unwrap_or_default(), after) {
            print::line(&line);
        }
    }
    if plan.writes.is_empty() {
        print::line("nothing to write");
    }
}

#[cfg(test)]
mod tests;
