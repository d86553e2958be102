//! `meshctl local`: start a lab, look into it, replace parts of it, end it.

mod process;
mod status;
mod up;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use lab::{Action, ExecPlace, client, place};

use crate::print;
pub(crate) use status::section;

pub(crate) const EXAMPLES: &str = "\
Examples:
  meshctl local up examples/shop                      # until Ctrl-C; edits to the files take effect at once
  meshctl local up shop --image nginx=/usr/sbin/nginx # what `image: nginx` stands for
  meshctl local status
  meshctl local exec shop/client -- curl -s http://web/
  meshctl local logs shop/web -f
  meshctl local restart ztunnel                       # replaced under traffic, which does not notice
  meshctl local down";

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Start nodes and pods from a folder of YAML, and keep them in step with it until Ctrl-C
    ///
    /// A container runs its `command`, `args` and `env` in the pod's own network, mount, PID and UTS namespaces, over a
    /// private copy of this machine's files. Images are not downloaded: an image is looked up in --image and otherwise
    /// ignored when the container has a command. Pods that end are restarted after 0.5 s, 1 s, 2 s and so on up to a minute.
    Up(up::Args),
    /// Run a command in a pod: its first container, or the one named with -c
    ///
    /// The exit status is the command's. A Deployment's name stands for one of its pods. `node-1` and so on stand for the
    /// network of a node, where the command runs with this machine's files and full rights over the lab.
    #[command(after_help = "Examples:
  meshctl local exec shop/client -- curl -s http://web/
  tar c . | meshctl local exec shop/web -- tar x -C /tmp
  meshctl local exec node-1 -- ss -tn")]
    Exec(ExecArgs),
    /// Show nodes, pods, services, the mesh's processes, and what is wrong with the folder
    Status(status::Args),
    /// Print what a pod has written
    #[command(after_help = "Examples:
  meshctl local logs shop/web
  meshctl local logs shop/web -c sidecar -f
  meshctl local logs ztunnel_node-1     # the mesh's own: istiod-lite, ztunnel_NODE, lab")]
    Logs(LogsArgs),
    /// Replace a process of the mesh while traffic goes on
    ///
    /// A new ztunnel starts beside the old one and takes over its listening sockets; new connections are the new one's, and
    /// those that live stay with the old one until they end or `up --drain-seconds` are over. istiod-lite is ended and started.
    #[command(after_help = process::RESTART_EXAMPLES)]
    Restart(process::Args),
    /// End a process of the mesh until it is started again
    #[command(after_help = process::STOP_EXAMPLES)]
    Stop(process::Args),
    /// Start a process of the mesh that was stopped
    #[command(after_help = process::STOP_EXAMPLES)]
    Start(process::Args),
    /// End the lab and remove everything of it
    Down(Which),
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(crate) enum Output {
    Table,
    Json,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Which {
    /// Name of the lab [default: the only one that runs]
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ExecArgs {
    /// NAMESPACE/POD, NAMESPACE/DEPLOYMENT, or a node
    #[arg(value_name = "NS/POD")]
    target: String,
    /// Container [default: the first]
    #[arg(short, long, default_value = "")]
    container: String,
    /// Set an environment variable; may be given several times
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = pair)]
    env: Vec<(String, String)>,
    #[command(flatten)]
    which: Which,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    argv: Vec<String>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct LogsArgs {
    /// NAMESPACE/POD, NAMESPACE/DEPLOYMENT, or a process of the mesh
    #[arg(value_name = "NS/POD")]
    target: String,
    /// Container [default: the last]
    #[arg(short, long, default_value = "")]
    container: String,
    /// Go on with what is written from now on
    #[arg(short, long)]
    follow: bool,
    #[command(flatten)]
    which: Which,
}

pub(crate) fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Up(args) => up::run(args),
        Command::Exec(args) => exec(args),
        Command::Status(args) => status::run(&args),
        Command::Logs(args) => logs(&args),
        Command::Restart(args) => process::run(&args, Action::Restart),
        Command::Stop(args) => process::run(&args, Action::Stop),
        Command::Start(args) => process::run(&args, Action::Start),
        Command::Down(which) => down(&which),
    }
}

fn exec(args: ExecArgs) -> Result<ExitCode> {
    let lab = place::find(args.which.name.as_deref())?;
    let target = match args.target.split_once('/') {
        Some((namespace, pod)) => ExecPlace::Pod {
            namespace: namespace.to_owned(),
            pod: pod.to_owned(),
            container: args.container,
        },
        None => ExecPlace::Node { node: args.target },
    };
    client::exec(&lab, target, args.argv, args.env)
}

fn logs(args: &LogsArgs) -> Result<ExitCode> {
    let lab = place::find(args.which.name.as_deref())?;
    let mut out = std::io::stdout().lock();
    match args.target.split_once('/') {
        Some((namespace, pod)) => {
            client::print_logs(&lab, namespace, pod, &args.container, args.follow, &mut out)?;
        }
        None => client::print_process_log(&lab, &args.target, args.follow, &mut out)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn down(which: &Which) -> Result<ExitCode> {
    let lab = place::find(which.name.as_deref())?;
    client::down(&lab)?;
    print::line(&format!("lab {:?} is gone", lab.name));
    Ok(ExitCode::SUCCESS)
}

/// `NAME=VALUE`.
fn pair(text: &str) -> Result<(String, String)> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => bail!("{text:?} is not of the form NAME=VALUE"),
    }
}

/// `NAME=PATH`.
fn image(text: &str) -> Result<(String, PathBuf)> {
    let (name, path) = pair(text)?;
    Ok((name, path.into()))
}
