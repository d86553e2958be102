//! The disk under a lab's state fills up: traffic goes on, changes of policy take effect, the user is told, and told again
//! when it is over.
//!
//! The whole file runs in a mount namespace of its own, where `XDG_RUNTIME_DIR` is a file system of a few megabytes.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, anyhow, ensure};
use e2e::suite::{self, Test};
use e2e::{Lab, Plan, programs, yaml};

/// Set where the small disk is there already.
const INSIDE: &str = "AMBIT_E2E_SMALL_DISK";

const TESTS: &[(&str, Test)] = &[("a_full_disk_costs_no_traffic_and_no_policy", full_disk)];

fn main() -> Result<ExitCode> {
    if std::env::var_os(INSIDE).is_some() {
        return Ok(suite::run(plan, TESTS));
    }
    on_a_small_disk().context("make a small disk")
}

/// Runs this program again where its state has 16 MB of room.
fn on_a_small_disk() -> Result<ExitCode> {
    let point = tempfile::Builder::new().prefix("ambit-disk-").tempdir()?;
    let mut command = Command::new(programs::find("unshare")?);
    command.args(["--mount", "--propagation", "private"]);
    // An ordinary user mounts in a user namespace, as themselves.
    if !nix::unistd::getuid().is_root() {
        command.args(["--user", "--map-current-user", "--keep-caps"]);
    }
    let script = "set -e\nmount -t tmpfs -o size=16m,mode=700 none \"$1\"\nshift\n\
                  exec setpriv --pdeathsig TERM --ambient-caps -all --inh-caps -all -- \"$@\"";
    command.args(["sh", "-c", script, "sh"]).arg(point.path());
    command.arg(std::env::current_exe()?).args(std::env::args_os().skip(1));
    command.env(INSIDE, "yes").env("XDG_RUNTIME_DIR", point.path());
    let status = command.status().context("start unshare")?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn plan() -> Result<Plan> {
    programs::find("curl")?;
    let serve = ["all", "--listen", "[::]:8080"];
    let objects = [
        yaml::namespace("app", true),
        yaml::pod("app", "client", 1).image("meshprobe", &["pause"]).yaml(),
        yaml::pod("app", "server", 2).image("meshload", &serve).ready_on(8080).yaml(),
        yaml::service("app", "server", "server", &[("http", 80, "8080")]),
    ];
    Ok(Plan::new().file("app.yaml", yaml::join(&objects)))
}

fn works(lab: &Lab) -> Result<bool> {
    Ok(lab
        .exec("app/client", &["curl", "-sS", "--fail", "--max-time", "5", "http://server/"])?
        .is_ok())
}

fn full_disk(lab: &Lab) -> Result<()> {
    ensure!(works(lab)?, "it must work before");
    let filler = fill()?;
    ensure!(works(lab)?, "new connections go on");
    let rules = "[{from: [{source: {namespaces: [app]}}]}]";
    lab.write("policy.yaml", &yaml::policy("app", "deny", "server", "DENY", rules))?;
    lab.until("the policy to be in force", || Ok(!works(lab)?))?;
    lab.remove("policy.yaml")?;
    lab.until("the call to work again", || works(lab))?;
    // What has to be written and cannot be is said, with the place and the way out.
    let late = yaml::pod("app", "late", 1).image("meshprobe", &["pause"]).yaml();
    lab.write("late.yaml", &late)?;
    let said = ["cannot be written", "No space left", "make room"];
    lab.until("the complaint", || Ok(said.iter().all(|s| lab.said().contains(s))))?;
    ensure!(works(lab)?, "nothing else may suffer");
    std::fs::remove_file(&filler)?;
    lab.until("the end of the complaint", || Ok(lab.said().contains("no longer: ")))?;
    lab.until("the late pod in the mesh", || {
        let call = ["curl", "-sS", "--fail", "--max-time", "5", "http://server/"];
        Ok(lab.exec("app/late", &call)?.is_ok())
    })?;
    Ok(())
}

/// Takes all the room there is.
fn fill() -> Result<PathBuf> {
    let dir = std::env::var_os("XDG_RUNTIME_DIR").context("XDG_RUNTIME_DIR is not set")?;
    let path = PathBuf::from(dir).join("filler");
    let mut file = File::create(&path)?;
    // Bounded: the disk has 16 MB; a page at a time, so that none is left.
    for _ in 0..16 * 256 {
        match file.write_all(&[b'x'; 4096]) {
            Ok(()) => {}
            Err(e) if e.kind() == ErrorKind::StorageFull => return Ok(path),
            Err(e) => return Err(e.into()),
        }
    }
    Err(anyhow!("{} took more than the disk has", path.display()))
}
