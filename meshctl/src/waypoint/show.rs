//! `meshctl waypoint list` and `status`: what the control plane says of the waypoints of a lab.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use lab::client;
use lab::place::{self, LabInfo};
use lab::status::WaypointStatus;

use super::{Lab, wait};
use crate::local::{Output, section};
use crate::print;

#[derive(Debug, clap::Args)]
pub(crate) struct ListArgs {
    #[command(flatten)]
    scope: Scope,
    /// How to print it
    #[arg(short, long, value_enum, default_value = "table")]
    output: Output,
    #[command(flatten)]
    lab: Lab,
}

#[derive(Debug, clap::Args)]
pub(crate) struct StatusArgs {
    /// The waypoint [default: all of the namespace]
    #[arg(value_name = "NAME", value_parser = super::name)]
    name: Option<String>,
    #[command(flatten)]
    scope: Scope,
    /// Wait until it takes connections and Services go through it
    #[arg(long)]
    wait: bool,
    /// How long to wait
    #[arg(long, value_name = "SECONDS", default_value_t = 90)]
    timeout: u64,
    /// How to print it
    #[arg(short, long, value_enum, default_value = "table")]
    output: Output,
    #[command(flatten)]
    lab: Lab,
}

#[derive(Debug, clap::Args)]
struct Scope {
    /// Namespace
    #[arg(short, long, default_value = "default", value_parser = super::namespace)]
    namespace: String,
    /// All namespaces
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    all_namespaces: bool,
}

impl Scope {
    fn find(&self, lab: &LabInfo, name: Option<&str>) -> Result<Vec<WaypointStatus>> {
        let mut all = client::status(lab)?.waypoints;
        all.retain(|w| {
            (self.all_namespaces || w.namespace == self.namespace)
                && name.is_none_or(|name| w.name == name)
        });
        Ok(all)
    }

    fn words(&self) -> String {
        if self.all_namespaces {
            "in this lab".to_owned()
        } else {
            format!("in namespace {:?} (-A shows those of all)", self.namespace)
        }
    }
}

pub(crate) fn list(args: &ListArgs) -> Result<ExitCode> {
    let lab = place::find(args.lab.lab.as_deref())?;
    let all = args.scope.find(&lab, None)?;
    match args.output {
        Output::Json => print::line(&serde_json::to_string_pretty(&all)?),
        Output::Table if all.is_empty() => {
            print::line(&format!("no waypoints {}", args.scope.words()));
        }
        Output::Table => section(&HEADER, all.iter().map(row).collect()),
    }
    Ok(ExitCode::SUCCESS)
}

/// The columns of [`row`].
pub(crate) const HEADER: [&str; 7] =
    ["NAMESPACE", "WAYPOINT", "TRAFFIC", "PROGRAMMED", "PODS", "SERVICES", "ORIGIN"];

/// A line of a table of waypoints.
pub(crate) fn row(w: &WaypointStatus) -> Vec<String> {
    let programmed = match w.condition("Programmed") {
        Some(c) if c.status => "yes".to_owned(),
        Some(c) => format!("no: {}", c.reason),
        None => "no".to_owned(),
    };
    let bound = [w.services.len(), w.workloads.len()];
    let through = match bound {
        [0, 0] => "none".to_owned(),
        [services, 0] => services.to_string(),
        [services, pods] => format!("{services} and {pods} pods"),
    };
    vec![
        w.namespace.clone(),
        w.name.clone(),
        w.traffic.clone(),
        programmed,
        format!("{}/{}", w.ready, w.replicas),
        through,
        w.origin.clone(),
    ]
}

pub(crate) fn status(args: &StatusArgs) -> Result<ExitCode> {
    let lab = place::find(args.lab.lab.as_deref())?;
    let mut all = args.scope.find(&lab, args.name.as_deref())?;
    if args.wait {
        let limit = Duration::from_secs(args.timeout);
        let named = args.name.as_ref().map(|name| (args.scope.namespace.clone(), name.clone()));
        let known = all.iter().map(|w| (w.namespace.clone(), w.name.clone()));
        let waited: Vec<_> = match named {
            Some(named) => vec![named],
            None => known.collect(),
        };
        for (namespace, name) in &waited {
            wait::ready(&lab, namespace, name, limit)?;
        }
        all = args.scope.find(&lab, args.name.as_deref())?;
    }
    if all.is_empty() {
        let which = args
            .name
            .as_ref()
            .map_or_else(|| "no waypoints".to_owned(), |n| format!("no waypoint {n:?}"));
        bail!("{which} {}: make one with `meshctl waypoint apply`", args.scope.words());
    }
    match args.output {
        Output::Json => print::line(&serde_json::to_string_pretty(&all)?),
        Output::Table => {
            let header =
                ["NAMESPACE", "WAYPOINT", "LISTENER", "CONDITION", "STATUS", "REASON", "MESSAGE"];
            section(&header, all.iter().flat_map(conditions).collect());
            for w in &all {
                through(w);
            }
        }
    }
    let good = all.iter().all(|w| w.is("Programmed"));
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn conditions(w: &WaypointStatus) -> Vec<Vec<String>> {
    let own = w.conditions.iter().map(|c| ("", c));
    let listeners =
        w.listeners.iter().flat_map(|l| l.conditions.iter().map(move |c| (l.name.as_str(), c)));
    let row = |(listener, c): (&str, &lab::status::ConditionStatus)| {
        vec![
            w.namespace.clone(),
            w.name.clone(),
            listener.to_owned(),
            c.kind.clone(),
            if c.status { "True" } else { "False" }.to_owned(),
            c.reason.clone(),
            c.message.clone(),
        ]
    };
    own.chain(listeners).map(row).collect()
}

fn through(w: &WaypointStatus) {
    let name = format!("{}/{}", w.namespace, w.name);
    let addresses =
        if w.addresses.is_empty() { "no address".to_owned() } else { w.addresses.join(" ") };
    let all: Vec<&str> = w.services.iter().chain(&w.workloads).map(String::as_str).collect();
    let all = if all.is_empty() {
        "nothing goes through it".to_owned()
    } else {
        format!("through it: {}", all.join(", "))
    };
    print::line(&format!("{name} ({}): {addresses}; {all}", w.origin));
}
