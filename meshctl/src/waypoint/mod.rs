//! `meshctl waypoint`: make a waypoint, look at it, take it away.
//!
//! Locally the configuration is the folder of the running lab: `apply` writes one file into it, `delete` removes that file, and
//! the lab and its control plane do the rest, as they do after any edit.

mod apply;
mod delete;
mod edit;
mod folder;
mod manifest;
pub(crate) mod show;
mod wait;

use std::process::ExitCode;

use anyhow::Result;
use compile::waypoints::{self, TrafficFor};

use crate::print;
use manifest::Manifest;

pub(crate) const EXAMPLES: &str = "\
Examples:
  meshctl waypoint apply -n shop --enroll-namespace --wait   # the namespace's traffic goes through it
  meshctl waypoint apply -n shop --name reviews --for all
  meshctl waypoint generate -n shop > shop/waypoint.yaml     # the YAML alone
  meshctl waypoint list -A
  meshctl waypoint status -n shop --wait
  meshctl waypoint delete -n shop waypoint

Exit status: 0 done; 1 not (why is on stderr), or `status` found a waypoint that takes no connections; 2 wrong usage.";

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Make a waypoint: writes a Gateway into the folder of the running lab
    ///
    /// What somebody else wrote is not overwritten. With --enroll-namespace the label is set in the file that holds the
    /// Namespace, as one line, and only where that is safe; --dry-run shows it.
    #[command(after_help = APPLY_EXAMPLES)]
    Apply(apply::Args),
    /// Print the YAML of a waypoint
    #[command(after_help = "Examples:
  meshctl waypoint generate -n shop
  meshctl waypoint generate -n shop --name reviews --for all > reviews.yaml")]
    Generate(GenerateArgs),
    /// List waypoints
    #[command(after_help = "Examples:
  meshctl waypoint list -n shop
  meshctl waypoint list -A -o json")]
    List(show::ListArgs),
    /// Show the conditions of waypoints, and what goes through them
    #[command(after_help = "Examples:
  meshctl waypoint status -n shop
  meshctl waypoint status -n shop waypoint --wait --timeout 30

Exit status: 0 all of them take connections; 1 not, or there is none.")]
    Status(show::StatusArgs),
    /// Take waypoints away that `apply` made, and the label of the namespace
    #[command(after_help = "Examples:
  meshctl waypoint delete -n shop waypoint
  meshctl waypoint delete -n shop --all")]
    Delete(delete::Args),
}

const APPLY_EXAMPLES: &str = "\
Examples:
  meshctl waypoint apply -n shop --enroll-namespace --wait
  meshctl waypoint apply -n shop --enroll-namespace --dry-run   # what would be written, as lines
  meshctl waypoint apply -n shop --name reviews --for all --out reviews.yaml

Exit status: 0 done; 1 not, and nothing was written, or it is not ready in time (why is on stderr); 2 wrong usage.";

/// Which lab, where several run. Not `--name`, which is the waypoint's.
#[derive(Debug, clap::Args)]
pub(crate) struct Lab {
    /// Name of the lab [default: the only one that runs]
    #[arg(long, value_name = "NAME")]
    lab: Option<String>,
}

/// What goes through a waypoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Traffic {
    Service,
    Workload,
    All,
    None,
}

impl From<Traffic> for TrafficFor {
    fn from(traffic: Traffic) -> Self {
        match traffic {
            Traffic::Service => Self::Service,
            Traffic::Workload => Self::Workload,
            Traffic::All => Self::All,
            Traffic::None => Self::None,
        }
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct GenerateArgs {
    /// Namespace of the waypoint
    #[arg(short, long, default_value = "default", value_parser = namespace)]
    namespace: String,
    /// Name of the waypoint
    #[arg(long, default_value = "waypoint", value_parser = name)]
    name: String,
    /// What goes through it [default: what its class says: service]
    #[arg(long = "for", value_enum, value_name = "TRAFFIC")]
    traffic: Option<Traffic>,
}

pub(crate) fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Apply(args) => apply::run(&args),
        Command::Generate(args) => {
            generate(args);
            Ok(ExitCode::SUCCESS)
        }
        Command::List(args) => show::list(&args),
        Command::Status(args) => show::status(&args),
        Command::Delete(args) => delete::run(&args),
    }
}

fn generate(args: GenerateArgs) {
    let GenerateArgs { namespace, name, traffic } = args;
    let traffic = traffic.map(Into::into);
    let manifest = Manifest { namespace, name, traffic, with_namespace: false };
    print::line(manifest.yaml().trim_end());
}

/// The name of a waypoint, for clap.
fn name(text: &str) -> Result<String, String> {
    waypoints::check_name(text).map(|()| text.to_owned())
}

/// The name of a namespace, for clap.
fn namespace(text: &str) -> Result<String, String> {
    waypoints::check_namespace(text).map(|()| text.to_owned())
}
