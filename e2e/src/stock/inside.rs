//! Runs a test binary inside fresh user, network, mount and process namespaces, as any user.
//!
//! Invariant: when the process outside ends, however that is, everything inside does (it is process 1 there).

use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use crate::programs;

/// Says to the second run that it is the one inside.
const INSIDE: &str = "AMBIT_STOCK_INSIDE";

/// Returns inside; outside, becomes the process that runs the same command line inside.
pub fn enter() -> Result<(), ExitCode> {
    if std::env::var_os(INSIDE).is_some() {
        return Ok(());
    }
    let error = start().err().map_or_else(String::new, |e| format!("{e:#}"));
    let mut out = std::io::stderr();
    // Nobody is left to tell when standard error is closed.
    let _ = std::io::Write::write_all(
        &mut out,
        format!("no namespaces for the test: {error}\n").as_bytes(),
    );
    Err(ExitCode::FAILURE)
}

fn start() -> Result<()> {
    let mut command = Command::new(programs::find("unshare")?);
    command.args(["--user", "--map-root-user", "--net", "--mount", "--pid", "--fork"]);
    command.args(["--mount-proc", "--kill-child"]);
    command.arg(std::env::current_exe()?).args(std::env::args_os().skip(1)).env(INSIDE, "1");
    Err(command.exec()).context("unshare")
}
