//! The command line: operate and explain the mesh.
//!
//! One module per group of commands; each turns arguments into a call of a library and prints the answer. Exit status: 0
//! done, 1 failed (why is on stderr), 2 wrong usage; commands that run or decide something say so in their help.

mod can;
mod local;
mod waypoint;

use std::process::ExitCode;

use clap::Parser;

/// Run a mesh on this machine, and ask what it does and why.
#[derive(Debug, Parser)]
#[command(name = "meshctl", version, propagate_version = true, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// A cluster on this machine: nodes and pods from a folder of Kubernetes YAML, without Kubernetes and without root
    #[command(subcommand, after_help = local::EXAMPLES)]
    Local(local::Command),
    /// Waypoints, which the HTTP traffic of a namespace goes through
    #[command(subcommand, after_help = waypoint::EXAMPLES)]
    Waypoint(waypoint::Command),
    Can(can::Args),
}

fn main() -> ExitCode {
    // The lab starts this program again for its inner processes, which must come first and alone.
    if let Some(code) = lab::hidden() {
        return code;
    }
    let result = match Cli::parse().command {
        Command::Local(command) => local::run(command),
        Command::Waypoint(command) => waypoint::run(command),
        Command::Can(args) => return can::run(&args, running),
    };
    result.unwrap_or_else(|e| {
        print::error(&format!("{e:#}"));
        ExitCode::FAILURE
    })
}

/// What a running lab is made of: the user's folder, and the objects that the lab wrote; and what only its control plane knows.
fn running(lab: Option<&str>) -> anyhow::Result<can::Running> {
    let lab = lab::place::find(lab)?;
    let waypoints = lab::client::status(&lab)?.waypoints.into_iter().map(|w| {
        let bound = w.is("Programmed") || !w.services.is_empty() || !w.workloads.is_empty();
        ((w.namespace.into(), w.name.into()), bound)
    });
    let waypoints = waypoints.collect();
    Ok(can::Running { folders: [lab.dir, lab::place::Place::of(&lab.name)?.objects()], waypoints })
}

mod print {
    //! To the terminal and nowhere else: the one place that writes to stdout and stderr.

    use std::io::{IsTerminal, Write};

    /// A line on stdout. A closed pipe is the reader's choice and no error.
    pub(crate) fn line(text: &str) {
        let _ = writeln!(std::io::stdout(), "{text}");
    }

    /// `error:` and a text on stderr.
    pub(crate) fn error(text: &str) {
        let _ = writeln!(
            std::io::stderr(),
            "{} {text}",
            paint("error:", Color::Red, std::io::stderr().is_terminal())
        );
    }

    #[derive(Clone, Copy, Debug)]
    pub(crate) enum Color {
        Red = 31,
        Green = 32,
        Yellow = 33,
        Dim = 2,
    }

    /// Colours only for a person at a terminal who has not asked for none.
    pub(crate) fn on_stdout() -> bool {
        std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none()
    }

    pub(crate) fn paint(text: &str, color: Color, colored: bool) -> String {
        if colored { format!("\x1b[{}m{text}\x1b[0m", color as u8) } else { text.to_owned() }
    }
}
