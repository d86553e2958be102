//! Serves other commands: one thread reads a request, the owner decides, the answer goes back.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, bail};
use net::NetNs;
use nix::sys::signal::Signal;
use tokio::io::AsyncReadExt;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};

use super::{Input, Reply, World, health};
use crate::control::{self, Answer, ExecPlace, Request};
use crate::pod::exec::{self, ExecRun};
use crate::pod::run::ProcessRun;
use crate::pod::worker::Ask;
use crate::procs::{Process, Processes};

/// Clients at a time: each `exec` that runs is one.
const MOST_CLIENTS: usize = 256;

/// Where a command is to run.
#[derive(Debug)]
pub(super) enum Target {
    Pod { ns: NetNs, container: String, asks: mpsc::Sender<Ask> },
    Node { ns: NetNs },
}

/// Accepts clients on a thread of its own until the lab ends.
pub(super) fn listen(
    listener: UnixListener,
    inputs: mpsc::Sender<Input>,
    processes: Processes,
) -> Result<()> {
    let runtime = Handle::current();
    let clients = Arc::new(AtomicUsize::new(0));
    std::thread::Builder::new().name("clients".into()).spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { continue };
            if clients.load(Ordering::Relaxed) >= MOST_CLIENTS {
                continue;
            }
            clients.fetch_add(1, Ordering::Relaxed);
            let client = Client {
                inputs: inputs.clone(),
                processes: processes.clone(),
                runtime: runtime.clone(),
            };
            let done = Arc::clone(&clients);
            let started = std::thread::Builder::new().name("client".into()).spawn(move || {
                client.serve(stream);
                done.fetch_sub(1, Ordering::Relaxed);
            });
            if started.is_err() {
                clients.fetch_sub(1, Ordering::Relaxed);
            }
        }
    })?;
    Ok(())
}

/// What the client wants to run.
struct Wish {
    argv: Vec<String>,
    env: Vec<(String, String)>,
    terminal: bool,
}

struct Client {
    inputs: mpsc::Sender<Input>,
    processes: Processes,
    runtime: Handle,
}

impl Client {
    fn serve(&self, mut stream: UnixStream) {
        let answer = self.answer(&mut stream).unwrap_or_else(|e| Answer::Error(format!("{e:#}")));
        if let Err(e) = control::answer(&mut stream, &answer) {
            tracing::debug!("a client left: {e:#}");
        }
    }

    fn answer(&self, stream: &mut UnixStream) -> Result<Answer> {
        let (request, files) = control::receive(stream)?;
        let down = request == Request::Down;
        let (reply, answer) = oneshot::channel();
        self.inputs
            .blocking_send(Input::Client(request.clone(), reply))
            .context("the lab is ending")?;
        let answer = match answer.blocking_recv().context("the lab is ending")? {
            Reply::Answer(Answer::Status(mut status)) => {
                health::ask(&mut status);
                Answer::Status(status)
            }
            Reply::Answer(answer) => answer,
            Reply::Enter(target) => {
                let Request::Exec { argv, env, terminal, .. } = request else {
                    bail!("not a command")
                };
                let process = self.start(target, Wish { argv, env, terminal }, files)?;
                self.wait(&process, stream)?
            }
            Reply::Order(controls, action) => {
                // One after the other: of two nodes at a time, one goes on as it is.
                let done = controls.iter().map(|control| control.order(action));
                Answer::Done(done.collect::<Result<_, _>>().map_err(anyhow::Error::msg)?)
            }
        };
        if down {
            let _ = self.inputs.blocking_send(Input::End);
        }
        Ok(answer)
    }

    fn start(&self, target: Target, wish: Wish, files: Vec<OwnedFd>) -> Result<Process> {
        if wish.argv.is_empty() {
            bail!("no command given: put it after `--`");
        }
        let (ns, mut run) = match target {
            Target::Node { ns } => (ns, on_node()),
            Target::Pod { ns, container, asks } => {
                let (reply, answer) = oneshot::channel();
                asks.blocking_send(Ask::Enter(container, reply)).context("the pod is ending")?;
                let run = answer
                    .blocking_recv()
                    .context("the pod is ending")?
                    .map_err(anyhow::Error::msg)?;
                (ns, run)
            }
        };
        run.process.argv = wish.argv;
        run.terminal = wish.terminal;
        for (name, value) in wish.env {
            run.process.env.retain(|(n, _)| *n != name);
            run.process.env.push((name, value));
        }
        let mut files = files.into_iter();
        let mut next = || files.next().map_or_else(Stdio::null, Stdio::from);
        let mut command = Command::new("/proc/self/exe");
        command.arg(crate::EXEC).env_clear().stdin(next()).stdout(next()).stderr(next());
        // The thread is in the lab's own network namespace and has no reactor; starting a process needs neither.
        self.processes
            .start(command, vec![exec::description(&run)?, ns.as_fd().try_clone_to_owned()?])
    }

    /// Waits for the command; a client that hangs up ends it.
    fn wait(&self, process: &Process, stream: &UnixStream) -> Result<Answer> {
        let watched = stream.try_clone()?;
        watched.set_nonblocking(true)?;
        let code = self.runtime.block_on(async {
            let mut client = tokio::net::UnixStream::from_std(watched)?;
            let mut byte = [0];
            tokio::select! {
                code = process.ended() => Ok::<_, std::io::Error>(code),
                // Nothing more is expected: a byte is as odd as the end.
                _ = client.read(&mut byte) => {
                    process.signal(Signal::SIGKILL);
                    Ok(process.ended().await)
                }
            }
        })?;
        // The clone shares the flag.
        stream.set_nonblocking(false)?;
        Ok(Answer::Exited(code))
    }
}

/// A command in a node's network sees the machine's files, as the lab's root.
fn on_node() -> ExecRun {
    let mut env: Vec<(String, String)> = std::env::vars().collect();
    env.retain(|(k, _)| k != "PWD");
    let process =
        ProcessRun { argv: vec![], env, cwd: "/".to_owned(), uid: 0, gid: 0, groups: vec![] };
    ExecRun { process, container: None, terminal: false }
}

impl World {
    pub(super) fn reply(&self, request: Request) -> Reply {
        match request {
            Request::Status => Reply::Answer(Answer::Status(Box::new(self.status()))),
            Request::Down => Reply::Answer(Answer::Ending),
            Request::Process { action, name, node } => {
                let found = self.mesh.as_ref().map_or_else(
                    || Err("this lab has no mesh".to_owned()),
                    |mesh| mesh.controls(&name, node.as_deref()),
                );
                match found {
                    Ok(controls) => Reply::Order(controls, action),
                    Err(why) => Reply::Answer(Answer::Error(why)),
                }
            }
            Request::Exec { place: ExecPlace::Node { node }, .. } => match self.network.node(&node)
            {
                Some(index) => {
                    Reply::Enter(Target::Node { ns: self.network.nodes[index].ns.clone() })
                }
                None => {
                    let names: Vec<&str> =
                        self.network.nodes.iter().map(|n| n.name.as_str()).collect();
                    Reply::Answer(Answer::Error(format!(
                        "no node {node:?}; there are: {}",
                        names.join(", ")
                    )))
                }
            },
            Request::Exec { place: ExecPlace::Pod { namespace, pod, container }, .. } => {
                self.find_pod(&namespace, &pod).map_or_else(
                    |why| Reply::Answer(Answer::Error(why)),
                    |found| {
                        Reply::Enter(Target::Pod {
                            ns: found.ns.clone(),
                            container,
                            asks: found.asks.clone(),
                        })
                    },
                )
            }
        }
    }

    /// A pod by its name, or by the name of its Deployment.
    fn find_pod(&self, namespace: &str, name: &str) -> Result<&super::pods::Pod, String> {
        if let Some(pod) = self.pods.get(&(namespace.to_owned(), name.to_owned())) {
            return Ok(pod);
        }
        let owned = |p: &&super::pods::Pod| {
            &*p.plan.namespace == namespace && p.plan.owner.as_deref() == Some(name)
        };
        let mut of_deployment: Vec<_> = self.pods.values().filter(owned).collect();
        of_deployment.sort_by_key(|p| !p.ready());
        of_deployment.into_iter().next().ok_or_else(|| {
            let names: Vec<String> =
                self.pods.keys().filter(|k| k.0 == namespace).map(|k| k.1.clone()).collect();
            let there = if names.is_empty() {
                format!("namespace {namespace:?} has no pods")
            } else {
                format!("namespace {namespace:?} has: {}", names.join(", "))
            };
            format!("no pod or Deployment {namespace}/{name}; {there}")
        })
    }
}
