//! `meshctl waypoint delete`: takes the file away that `apply` wrote, and the label of the namespace with it.
//!
//! Invariant: only files of `apply` are removed, and only labels that can be taken away safely; for the rest it is said what to do.

use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use compile::waypoints::USE_WAYPOINT;

use super::Lab;
use super::edit::{self, Change, Label};
use super::folder::{self, Folder};
use super::manifest::{MARK, Manifest};
use crate::print::{self, Color};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Names of waypoints
    #[arg(value_name = "NAME", required_unless_present = "all", value_parser = super::name)]
    names: Vec<String>,
    /// All waypoints of the namespace that `apply` made
    #[arg(long, conflicts_with = "names")]
    all: bool,
    /// Namespace
    #[arg(short, long, default_value = "default", value_parser = super::namespace)]
    namespace: String,
    /// Remove a file that was edited since `apply` wrote it
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    lab: Lab,
}

/// What is to be done for one waypoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    /// The file with the label: name, before, after.
    pub(super) unlabelled: Option<(String, String, String)>,
    /// The file to remove, and what it holds.
    pub(super) removed: (String, String),
    pub(super) warnings: Vec<String>,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let lab = folder::lab(args.lab.lab.as_deref())?
        .context("no lab is running for this user: remove the file yourself")?;
    let folder = Folder::read(&lab.dir)?;
    let names = if args.all { ours(&folder, &args.namespace) } else { args.names.clone() };
    if names.is_empty() {
        print::line(&format!("no waypoint of `apply` in namespace {:?}", args.namespace));
        return Ok(ExitCode::SUCCESS);
    }
    // All of them are looked at before the first goes.
    let plan = |name: &String| plan(&folder, &args.namespace, name, args.force);
    let plans: Vec<Plan> = names.iter().map(plan).collect::<Result<_>>()?;
    let colored = print::on_stdout();
    for (name, plan) in names.iter().zip(plans) {
        if let Some((file, before, after)) = &plan.unlabelled {
            folder::replace(&folder.path(file), Some(before), after)?;
            print::line(&format!(
                "{} namespace {} no longer labelled {USE_WAYPOINT}: {name} ({file})",
                print::paint("✓", Color::Green, colored),
                args.namespace
            ));
        }
        let (file, text) = &plan.removed;
        folder::remove(&folder.path(file), text)?;
        print::line(&format!(
            "{} waypoint {}/{name} deleted ({})",
            print::paint("✓", Color::Green, colored),
            args.namespace,
            folder.path(file).display()
        ));
        for warning in &plan.warnings {
            print::line(&format!("{} {warning}", print::paint("!", Color::Yellow, colored)));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Waypoints of a namespace in files of `apply`.
fn ours(folder: &Folder, namespace: &str) -> Vec<String> {
    let all = folder.files.iter().filter_map(|f| Manifest::of_file(&f.text));
    all.filter(|m| m.namespace == namespace).map(|m| m.name).collect()
}

/// Works out what to do.
pub(super) fn plan(folder: &Folder, namespace: &str, name: &str, force: bool) -> Result<Plan> {
    let Some((file, object, _)) = folder.gateway(namespace, name) else {
        bail!(
            "there is no Gateway {namespace}/{name} in {}: `meshctl waypoint list -A` shows what there is",
            folder.dir.display()
        );
    };
    ensure!(
        file.text.starts_with(MARK),
        "Gateway {namespace}/{name} is defined at {}, which `apply` did not write: take it out of that file yourself",
        object.origin
    );
    ensure!(
        force || Manifest::of_file(&file.text).is_some(),
        "{} was edited since `apply` wrote it: --force removes it with all that is in it",
        folder.path(&file.name).display()
    );
    let mut plan = Plan { removed: (file.name.clone(), file.text.clone()), ..Plan::default() };
    let label = Label { namespace, name: USE_WAYPOINT };
    if let Some((holder, _, known)) = folder.namespace(namespace)
        && holder.name != file.name
        && known.metadata.labels.as_ref().and_then(|l| l.get(USE_WAYPOINT)).map(String::as_str)
            == Some(name)
        && let Some(after) = edit::edit(&holder.name, &holder.text, label, Change::Remove)
    {
        plan.unlabelled = Some((holder.name.clone(), holder.text.clone(), after));
    }
    let is_done = |text: &String| {
        let is_namespace = text.starts_with(&format!("Namespace/{namespace} "));
        is_namespace && (plan.unlabelled.is_some() || text.contains(&format!("({}:", file.name)))
    };
    let left = folder::labelled(folder, namespace, name).into_iter().filter(|t| !is_done(t));
    plan.warnings = left
        .map(|what| {
            format!("{what} still has {USE_WAYPOINT}: {name}: it is reached directly; take the label away")
        })
        .collect();
    Ok(plan)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[(&str, &str)]) -> Folder {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        Folder::read(dir.path()).unwrap()
    }

    fn planned(files: &[(&str, &str)], force: bool) -> Result<Plan, String> {
        plan(&folder(files), "shop", "waypoint", force).map_err(|e| format!("{e:#}"))
    }

    const SHOP: &str = "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: shop\n  labels:\n    istio.io/use-waypoint: waypoint\n    a: b\n";
    const WEB: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop, labels: {istio.io/use-waypoint: waypoint}}\nspec: {ports: [{port: 80}]}\n";

    fn manifest(with_namespace: bool) -> Manifest {
        Manifest {
            namespace: "shop".into(),
            name: "waypoint".into(),
            traffic: None,
            with_namespace,
        }
    }

    #[test]
    fn what_apply_wrote_goes_with_its_label() {
        let ours = manifest(false).file();
        let plan = planned(&[("shop.yaml", SHOP), ("w.yaml", &ours)], false).unwrap();
        assert_eq!(plan.removed, ("w.yaml".to_owned(), ours.clone()));
        let (file, before, after) = plan.unlabelled.unwrap();
        assert_eq!(file, "shop.yaml");
        assert_eq!(edit::diff(&before, &after), ["-    istio.io/use-waypoint: waypoint"]);
        assert!(plan.warnings.is_empty(), "{:?}", plan.warnings);
        // Other labels stay, and are named.
        let plan = planned(&[("web.yaml", WEB), ("w.yaml", &ours)], false).unwrap();
        assert_eq!(plan.unlabelled, None);
        assert!(
            plan.warnings[0].starts_with("Service/shop/web (web.yaml:3)"),
            "{:?}",
            plan.warnings
        );
        // The Namespace was part of the file.
        let both = manifest(true).file();
        let plan = planned(&[("w.yaml", &both)], false).unwrap();
        assert!(plan.unlabelled.is_none() && plan.warnings.is_empty(), "{plan:?}");
        // The label names another one.
        let other = SHOP.replace(": waypoint", ": other");
        let plan = planned(&[("shop.yaml", &other), ("w.yaml", &ours)], false).unwrap();
        assert!(plan.unlabelled.is_none() && plan.warnings.is_empty(), "{plan:?}");
    }

    #[test]
    fn what_others_wrote_stays() {
        let check = |files: &[(&str, &str)], force, says: &str| {
            let error = planned(files, force).unwrap_err();
            assert!(error.contains(says), "{error}");
        };
        check(&[("shop.yaml", SHOP)], false, "no Gateway shop/waypoint");
        check(&[("w.yaml", &manifest(false).yaml())], true, "did not write");
        let edited = format!("{}---\n{SHOP}", manifest(false).file());
        check(&[("w.yaml", &edited)], false, "--force");
        planned(&[("w.yaml", &edited)], true).unwrap();
    }
}
