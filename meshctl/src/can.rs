//! `meshctl can FROM TO`: may this caller reach that service, and which rule says so?
//!
//! The answer comes from the engine that the proxies run, on a snapshot that went through the same
//! compile, encode, decode and link as theirs. Exit status: 0 yes, 1 no, 2 no answer.
//!
//! Invariant: no answer is given on files that do not parse: the running mesh keeps their last good
//! state, which is not on disk.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args as ClapArgs, ValueEnum};
use model::Str;

mod ask;
mod load;
mod paths;
mod show;

const NO: u8 = 1;
const ERROR: u8 = 2;

/// May a pod or service account reach a service? Prints yes or no and the rule that decides.
///
/// Exit status: 0 yes; 1 no, or not to every endpoint; 2 no answer.
#[derive(ClapArgs, Clone, Debug)]
pub(crate) struct Args {
    /// NAMESPACE/POD or NAMESPACE/SERVICEACCOUNT. A pod goes before a service account of the same name:
    /// write `sa:NS/NAME` or `pod:NS/NAME` to say which.
    #[arg(value_name = "FROM")]
    from: String,
    /// NAMESPACE/SERVICE[:PORT], or pod:NAMESPACE/POD:PORT for a call to the pod's own address. PORT is a
    /// number or the name of a port; needed where the Service has several.
    #[arg(value_name = "TO")]
    to: String,
    /// Answer for these folders of YAML as if they ran and were ready, instead of for the running lab.
    #[arg(short = 'f', long = "folder", value_name = "DIR")]
    folders: Vec<PathBuf>,
    /// Nodes to place pods on, with --folder.
    #[arg(long, default_value_t = 2, requires = "folders", value_parser = clap::value_parser!(u8).range(1..=i64::from(compile::local::LocalConfig::MAX_NODES)))]
    nodes: u8,
    /// The lab to ask about, where several run.
    #[arg(long, conflicts_with = "folders")]
    name: Option<String>,
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    Text,
    Json,
}

/// What is known of a running lab.
#[derive(Clone, Debug)]
pub(crate) struct Running {
    /// In their order of precedence: the user's, then the objects that the lab wrote.
    pub(crate) folders: [PathBuf; 2],
    /// The waypoints that the control plane knows, by namespace and name: whether what names one goes through it.
    pub(crate) waypoints: BTreeMap<(Str, Str), bool>,
}

/// Answers. `running` finds a running lab by its name.
pub(crate) fn run(args: &Args, running: impl FnOnce(Option<&str>) -> Result<Running>) -> ExitCode {
    match answer(args, running) {
        Ok((text, yes)) => match io::stdout().write_all(text.as_bytes()) {
            Ok(()) if yes => ExitCode::SUCCESS,
            Ok(()) => ExitCode::from(NO),
            // Nobody reads the answer: the exit status must not look like one.
            Err(_) => ExitCode::from(ERROR),
        },
        Err(error) => {
            // With nobody to tell, the exit status is all there is.
            let _ = writeln!(io::stderr(), "error: {error:#}");
            ExitCode::from(ERROR)
        }
    }
}

fn answer(
    args: &Args,
    running: impl FnOnce(Option<&str>) -> Result<Running>,
) -> Result<(String, bool)> {
    let world = if args.folders.is_empty() {
        let lab =
            running(args.name.as_deref()).context("to ask about a folder, use --folder DIR")?;
        load::running(&lab)?
    } else {
        load::offline(&args.folders, args.nodes)?
    };
    let answer = ask::ask(&world, &args.from, &args.to)?;
    let yes = answer.answer == ask::Decision::Yes;
    let text = match args.output {
        Output::Text => show::text(&answer),
        Output::Json => show::json(&answer)?,
    };
    Ok((text, yes))
}

/// The files of a folder that the control plane would read, by name.
pub(crate) fn texts(dir: &Path) -> Result<Vec<(String, String)>> {
    load::texts(dir)
}

#[cfg(test)]
mod tests;
