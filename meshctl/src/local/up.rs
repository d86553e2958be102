//! `meshctl local up`: starts a lab and prints what happens in it.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use lab::launch::{self, Event, Options};
use lab::place::DEFAULT_NAME;

use crate::print::{self, Color};

/// Long enough for the connections of a database pool to be renewed; nobody waits for it.
const DRAIN_SECONDS: u64 = 600;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder with Kubernetes YAML
    dir: PathBuf,
    /// Number of nodes
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=32))]
    nodes: u16,
    /// What an image stands for: a folder with a root filesystem, or a program to run; may be given several times
    #[arg(long = "image", value_name = "NAME=PATH", value_parser = super::image)]
    images: Vec<(String, PathBuf)>,
    /// Name of the lab; several may run
    #[arg(long, default_value = DEFAULT_NAME)]
    name: String,
    /// Where istiod-lite, ztunnel and waypoint are [default: beside meshctl]
    #[arg(long, value_name = "DIR")]
    bin_dir: Option<PathBuf>,
    /// How long a ztunnel that is replaced (`meshctl local restart`) keeps the connections it has; what is left then is ended
    /// with the reason `draining`
    #[arg(long, value_name = "SECONDS", default_value_t = DRAIN_SECONDS)]
    drain_seconds: u64,
    /// Join pods of these namespaces without a tunnel when both are on one node (comma-separated, `*` for all); by default
    /// every connection of the mesh is encrypted
    #[arg(long, value_name = "NAMESPACE", value_delimiter = ',')]
    same_node_direct: Vec<String>,
    /// Pods only, without the mesh
    #[arg(long, hide = true)]
    no_mesh: bool,
}

pub(crate) fn run(args: Args) -> Result<ExitCode> {
    let exe = std::env::current_exe().context("find the running program")?;
    let beside = || exe.parent().map(Path::to_owned);
    let bin_dir = args.bin_dir.or_else(beside).filter(|_| !args.no_mesh);
    ensure!(args.no_mesh || bin_dir.is_some(), "cannot tell where meshctl is: say --bin-dir");
    let options = Options {
        dir: args.dir,
        name: args.name,
        nodes: args.nodes,
        images: args.images,
        bin_dir,
        drain_seconds: args.drain_seconds,
        same_node_direct: args.same_node_direct,
        helper: exe,
    };
    let colored = print::on_stdout();
    let name = if options.name == DEFAULT_NAME {
        String::new()
    } else {
        format!(" --name {}", options.name)
    };
    launch::up(&options, &mut |event| show(&event, &name, colored))?;
    print::line("the lab is gone");
    Ok(ExitCode::SUCCESS)
}

fn show(event: &Event, name: &str, colored: bool) {
    match event {
        Event::Progress(text) => {
            print::line(&format!("{} {text}", print::paint("✓", Color::Green, colored)))
        }
        Event::Ready { pods, services, nodes } => {
            print::line(&format!(
                "{} {nodes} nodes, {pods} pods, {services} services; end with Ctrl-C. In another terminal:\n    \
                 meshctl local status{name}\n    meshctl local exec{name} NS/POD -- CMD",
                print::paint("✓ running:", Color::Green, colored)
            ));
        }
        Event::Note(text) => {
            print::line(&format!("{} {text}", print::paint("·", Color::Dim, colored)))
        }
        Event::Warning(text) => {
            print::line(&format!("{} {text}", print::paint("!", Color::Yellow, colored)))
        }
        Event::Resolved(text) => {
            print::line(&format!("{} no longer: {text}", print::paint("✓", Color::Green, colored)));
        }
        Event::Failed(text) => {
            print::line(&format!("{} {text}", print::paint("✗", Color::Red, colored)))
        }
    }
}
