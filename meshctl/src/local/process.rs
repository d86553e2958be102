//! `meshctl local restart`, `stop` and `start`: the mesh's own processes, to see what a change of them does to traffic.

use std::process::ExitCode;

use anyhow::Result;
use lab::{Action, Restarted, client, place};

use super::{Output, Which};
use crate::print;

pub(crate) const RESTART_EXAMPLES: &str = "\
Examples:
  meshctl local restart ztunnel                   # on every node, one after the other
  meshctl local restart ztunnel --node node-1 -o json
  meshctl local restart istiod-lite

Exit status: 0 replaced; 1 not (the old one goes on), why is on stderr.";

pub(crate) const STOP_EXAMPLES: &str = "\
Examples:
  meshctl local stop istiod-lite                  # everything goes on; nothing changes until it is started
  meshctl local start istiod-lite
  meshctl local stop ztunnel --node node-1        # connections wait 30 s for it, then are refused";

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Name {
    Ztunnel,
    IstiodLite,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which process of the mesh
    #[arg(value_enum, value_name = "PROCESS")]
    process: Name,
    /// On this node only [default: on all]
    #[arg(long, value_name = "NODE")]
    node: Option<String>,
    /// How to print what was done
    #[arg(short, long, value_enum, default_value = "table")]
    output: Output,
    #[command(flatten)]
    which: Which,
}

pub(crate) fn run(args: &Args, action: Action) -> Result<ExitCode> {
    let lab = place::find(args.which.name.as_deref())?;
    let name = match args.process {
        Name::Ztunnel => "ztunnel",
        Name::IstiodLite => "istiod-lite",
    };
    let done = client::process(&lab, action, name, args.node.as_deref())?;
    match args.output {
        Output::Json => print::line(&serde_json::to_string_pretty(&done)?),
        Output::Table => done.iter().for_each(|done| print::line(&words(done))),
    }
    Ok(ExitCode::SUCCESS)
}

fn words(done: &Restarted) -> String {
    let label = match &done.node {
        Some(node) => format!("{} on {node}", done.name),
        None => done.name.clone(),
    };
    match (done.old, done.new) {
        (Some(old), Some(new)) => format!(
            "{label}: process {new} serves after {} ms; process {old} drains",
            done.milliseconds
        ),
        (None, Some(new)) => format!("{label}: process {new} runs"),
        (_, None) => format!("{label}: stopped"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_done_in_words() {
        let done = |node: Option<&str>, old, new| {
            let (name, node) = ("ztunnel".to_owned(), node.map(str::to_owned));
            words(&Restarted { name, node, old, new, milliseconds: 7 })
        };
        assert_eq!(
            done(Some("node-1"), Some(1), Some(2)),
            "ztunnel on node-1: process 2 serves after 7 ms; process 1 drains"
        );
        assert_eq!(done(None, None, Some(2)), "ztunnel: process 2 runs");
        assert_eq!(done(None, None, None), "ztunnel: stopped");
    }
}
