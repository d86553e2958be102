//! What other programs ask of a running lab.

use std::io::{IsTerminal, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use crate::control::{self, Action, Answer, ExecPlace, Request, Restarted};
use crate::logs;
use crate::place::{LabInfo, Place, running};
use crate::status::Status;

/// A lab ends its pods within a few seconds.
const DOWN_WITHIN: Duration = Duration::from_secs(20);
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// What the lab does now.
pub fn status(lab: &LabInfo) -> Result<Status> {
    match call(lab, &Request::Status, &[])? {
        Answer::Status(status) => Ok(*status),
        other => bail!("the lab gave an odd answer: {other:?}"),
    }
}

/// Starts, stops or replaces a process of the mesh, on one node or on all, one after the other.
pub fn process(
    lab: &LabInfo,
    action: Action,
    name: &str,
    node: Option<&str>,
) -> Result<Vec<Restarted>> {
    let request = Request::Process { action, name: name.to_owned(), node: node.map(str::to_owned) };
    match call(lab, &request, &[])? {
        Answer::Done(done) => Ok(done),
        other => bail!("the lab gave an odd answer: {other:?}"),
    }
}

/// Ends the lab, and returns when it is gone.
pub fn down(lab: &LabInfo) -> Result<()> {
    call(lab, &Request::Down, &[])?;
    let begun = Instant::now();
    while running()?.iter().any(|l| l.name == lab.name && l.pid == lab.pid) {
        if begun.elapsed() > DOWN_WITHIN {
            bail!(
                "lab {:?} (process {}) is still there after {} s: kill it",
                lab.name,
                lab.pid,
                DOWN_WITHIN.as_secs()
            );
        }
        std::thread::sleep(LOOK_EVERY);
    }
    Ok(())
}

/// Runs a command in a pod or on a node with the caller's stdin, stdout and stderr; its exit status. From a terminal, the
/// command gets one too.
pub fn exec(
    lab: &LabInfo,
    place: ExecPlace,
    argv: Vec<String>,
    env: Vec<(String, String)>,
) -> Result<ExitCode> {
    let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    let files = [stdin.as_fd().as_raw_fd(), stdout.as_fd().as_raw_fd(), stderr.as_fd().as_raw_fd()];
    let terminal = stdin.is_terminal() && stdout.is_terminal();
    let mut env = env;
    if let (true, Ok(kind)) = (terminal, std::env::var("TERM")) {
        env.push(("TERM".to_owned(), kind));
    }
    // Every key goes to the command, also Ctrl-C.
    let _raw = terminal.then(RawTerminal::enter).transpose()?;
    match call(lab, &Request::Exec { place, argv, env, terminal }, &files)? {
        Answer::Exited(code) => Ok(ExitCode::from(code)),
        Answer::Ending => bail!("the lab ended"),
        other => bail!("the lab gave an odd answer: {other:?}"),
    }
}

/// Prints the log of a container (empty name: the first), or of a mesh process.
pub fn print_logs(
    lab: &LabInfo,
    namespace: &str,
    pod: &str,
    container: &str,
    follow: bool,
    out: &mut dyn Write,
) -> Result<()> {
    let status = status(lab)?;
    let found =
        status.pods.iter().find(|p| p.namespace == namespace && p.name == pod).or_else(|| {
            // By the name of a Deployment: its pods are DEPLOYMENT-HASH-HASH.
            let of = |p: &&crate::status::PodStatus| {
                let rest = p.name.strip_prefix(pod).and_then(|r| r.strip_prefix('-'));
                p.namespace == namespace && rest.is_some_and(|r| r.matches('-').count() == 1)
            };
            status.pods.iter().find(of)
        });
    let Some(found) = found else {
        let names: Vec<&str> = status
            .pods
            .iter()
            .filter(|p| p.namespace == namespace)
            .map(|p| p.name.as_str())
            .collect();
        bail!("no pod {namespace}/{pod}; namespace {namespace:?} has: {}", names.join(", "));
    };
    let names: Vec<&str> = found.containers.iter().map(|c| c.name.as_str()).collect();
    let container = match container {
        "" => names.last().copied().context("the pod has no containers yet")?,
        name if names.contains(&name) => name,
        name => bail!(
            "no container {name:?} in {namespace}/{}; it has: {}",
            found.name,
            names.join(", ")
        ),
    };
    let path = Place::of(&lab.name)?.container_log(namespace, &found.name, container);
    follow_file(lab, &path, follow, out)
}

/// Prints the log of one of the lab's own processes: `istiod-lite`, `ztunnel_node-1`, `lab`.
pub fn print_process_log(
    lab: &LabInfo,
    process: &str,
    follow: bool,
    out: &mut dyn Write,
) -> Result<()> {
    follow_file(lab, &Place::of(&lab.name)?.logs().join(format!("{process}.log")), follow, out)
}

fn follow_file(
    lab: &LabInfo,
    path: &std::path::Path,
    follow: bool,
    out: &mut dyn Write,
) -> Result<()> {
    let gone =
        || !running().is_ok_and(|all| all.iter().any(|l| l.name == lab.name && l.pid == lab.pid));
    match logs::print(path, follow, out, &gone) {
        // Whoever read us has seen enough.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        done => done.with_context(|| path.display().to_string()),
    }
}

/// The caller's terminal without its line editing and signals, until dropped.
struct RawTerminal(Termios);

impl RawTerminal {
    fn enter() -> Result<Self> {
        let before = tcgetattr(std::io::stdin()).context("read the terminal's settings")?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(std::io::stdin(), SetArg::TCSANOW, &raw).context("set the terminal up")?;
        Ok(Self(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, &self.0);
    }
}

fn call(lab: &LabInfo, request: &Request, files: &[i32]) -> Result<Answer> {
    match control::call(&Place::of(&lab.name)?.socket(), request, files)? {
        Answer::Error(why) => bail!(why),
        answer => Ok(answer),
    }
}
