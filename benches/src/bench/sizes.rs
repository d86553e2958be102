//! A proxy with a configuration of 10 to 100,000 workloads: start to ready, memory, cost of a change.
//!
//! No namespaces here: the real `istiod-lite` reads a generated folder, the real `ztunnel` takes its
//! configuration from it over xDS, and this module plays the node agent that has no pods. The workloads
//! are pods of other nodes, spread over 100 nodes, ten to a Service.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, accept, bind, listen, recv,
    send, socket,
};
use serde_json::json;

use super::procfs::{Cpu, Memory};
use super::results::Size;
use super::world::Programs;
use crate::talk;

/// A token for a control plane that lives for seconds on this machine's loopback, and its SHA-256.
const TOKEN: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
const TOKEN_SHA256: &str = "2a8abfa8cb9906290437854193ca6bca41d4d4e26d1d454bd66a35158095e737";
/// Pods in one file: well below the control plane's limit of 1 MiB.
const PODS_IN_FILE: u32 = 1_000;
const PODS_IN_SERVICE: u32 = 10;
const NODES: u32 = 100;
/// One workload each, one after the other.
const CHANGES: u32 = 50;
const BETWEEN_CHANGES: Duration = Duration::from_millis(100);
/// Between ready and the reading of memory, as in the reports on other proxies.
const SETTLE: Duration = Duration::from_secs(3);
/// The largest configuration may take this long.
const READY_LIMIT: Duration = Duration::from_secs(120);
/// A start is measured in steps of this.
const POLL: Duration = Duration::from_millis(1);

/// Starts a control plane and a proxy with `workloads`, and measures.
pub fn measure(programs: &Programs, folder: &Path, workloads: u32) -> Result<Size> {
    let folder = folder.join(format!("size-{workloads}"));
    let mesh = folder.join("mesh");
    fs::create_dir_all(&mesh).with_context(|| mesh.display().to_string())?;
    write_mesh(&mesh, workloads)?;
    let plane = ControlPlane::start(programs, &folder, &mesh)?;
    let proxy = Proxy::start(programs, &folder, &plane)?;
    let ready = proxy.wait_until_ready()?;
    let pid = proxy.pid();
    let cpu_to_ready = cpu(pid)?;
    thread::sleep(SETTLE);
    let at_ready = Memory::of(pid)?;
    let (before, plane_before) = (cpu(pid)?, cpu(plane.pid())?);
    for change in 0..CHANGES {
        write_pod(&mesh, change)?;
        thread::sleep(BETWEEN_CHANGES);
    }
    thread::sleep(SETTLE);
    let per_change = |after: f64, before: f64| (after - before) / f64::from(CHANGES) * 1e3;
    let after = Memory::of(pid)?;
    Ok(Size {
        workloads,
        ready_ms: ready.as_secs_f64() * 1e3,
        cpu_s_to_ready: cpu_to_ready,
        rss_mb: at_ready.rss_mb,
        rss_after_changes_mb: after.rss_mb,
        peak_mb: after.peak_mb,
        proxy_cpu_ms_per_change: per_change(cpu(pid)?, before),
        control_plane_cpu_ms_per_change: per_change(cpu(plane.pid())?, plane_before),
        control_plane_rss_mb: Memory::of(plane.pid())?.rss_mb,
    })
}

/// How long a proxy takes from its start to ready with a small configuration.
pub fn start_time(programs: &Programs, folder: &Path) -> Result<Duration> {
    let mesh = folder.join("size-start").join("mesh");
    fs::create_dir_all(&mesh)?;
    write_mesh(&mesh, 10)?;
    let folder = folder.join("size-start");
    let plane = ControlPlane::start(programs, &folder, &mesh)?;
    Proxy::start(programs, &folder, &plane)?.wait_until_ready()
}

fn cpu(pid: i32) -> Result<f64> {
    Cpu::now(&[pid])?.processes.get(&pid).copied().context("no CPU time")
}

/// `istiod-lite`, ended with this value.
struct ControlPlane {
    process: Child,
    address: String,
    root: PathBuf,
    /// While it is open, tokens can be registered.
    _registry: UnixStream,
}

impl ControlPlane {
    fn start(programs: &Programs, folder: &Path, mesh: &Path) -> Result<Self> {
        let state = folder.join("istiod");
        fs::create_dir_all(&state)?;
        let (address, status) = (free_address()?, free_address()?);
        let (mut registry, theirs) = UnixStream::pair()?;
        let process = inherit(&theirs, |fd| {
            let mut command = Command::new(programs.meshctl.with_file_name("istiod-lite"));
            command.arg("--dir").arg(mesh).arg("--state-dir").arg(&state);
            command.args(["--listen", &address, "--status-listen", &status]);
            command.args(["--token-registry-fd", &fd.to_string()]);
            quiet(command, &folder.join("istiod.log"))
        })?;
        writeln!(registry, "{}", json!({ "node": "node-1", "token_sha256": TOKEN_SHA256 }))?;
        let plane =
            Self { process, address, root: state.join("root-cert.pem"), _registry: registry };
        wait_for_page(&format!("http://{status}/readyz"), Duration::from_millis(50))
            .with_context(|| format!("istiod-lite: see {}", folder.join("istiod.log").display()))?;
        Ok(plane)
    }

    fn pid(&self) -> i32 {
        pid_of(&self.process)
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        end(&mut self.process);
    }
}

/// `ztunnel proxy` and the node agent's end of its line.
struct Proxy {
    process: Child,
    began: Instant,
    ready_page: String,
    agent: Option<thread::JoinHandle<()>>,
    log: PathBuf,
}

impl Proxy {
    fn start(programs: &Programs, folder: &Path, plane: &ControlPlane) -> Result<Self> {
        let (socket_path, log) = (folder.join("zds.sock"), folder.join("ztunnel.log"));
        let agent = node_agent(&socket_path)?;
        let ready = free_address()?;
        // The token and a line end fit a pipe: nobody has to read while it is written.
        let (theirs, mut ours) = std::io::pipe()?;
        writeln!(ours, "{TOKEN}")?;
        drop(ours);
        let began = Instant::now();
        let process = inherit(&theirs, |fd| {
            let mut command = Command::new(&programs.ztunnel);
            command.args([
                "proxy",
                "--node",
                "node-1",
                "--xds-address",
                &format!("https://{}", plane.address),
            ]);
            command.arg("--root-cert").arg(&plane.root).arg("--zds-socket").arg(&socket_path);
            command
                .arg("--state-dir")
                .arg(folder.join("state"))
                .arg("--secret-dir")
                .arg(folder.join("secret"));
            command.args(["--token-fd", &fd.to_string(), "--readiness-address", &ready]);
            command.args([
                "--admin-address",
                &free_address()?,
                "--stats-address",
                &free_address()?,
            ]);
            quiet(command, &log)
        })?;
        Ok(Self {
            process,
            began,
            ready_page: format!("http://{ready}/healthz/ready"),
            agent: Some(agent),
            log,
        })
    }

    fn wait_until_ready(&self) -> Result<Duration> {
        wait_for_page(&self.ready_page, POLL)
            .with_context(|| format!("ztunnel: see {}", self.log.display()))?;
        Ok(self.began.elapsed())
    }

    fn pid(&self) -> i32 {
        pid_of(&self.process)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        end(&mut self.process);
        if let Some(agent) = self.agent.take() {
            // It ends with the proxy's end of the line.
            let _ = agent.join();
        }
    }
}

/// Takes the proxy's line and says that there are no pods.
fn node_agent(path: &Path) -> Result<thread::JoinHandle<()>> {
    let _ = fs::remove_file(path);
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    bind(listener.as_raw_fd(), &UnixAddr::new(path)?)
        .with_context(|| path.display().to_string())?;
    listen(&listener, Backlog::new(1)?)?;
    Ok(thread::spawn(move || {
        // A proxy that never comes ends the run elsewhere, by its time limit.
        let _ = serve_line(&listener);
    }))
}

#[expect(unsafe_code, reason = "accept gives a number")]
fn serve_line(listener: &OwnedFd) -> nix::Result<()> {
    use std::os::fd::FromRawFd as _;
    let fd = accept(listener.as_raw_fd())?;
    // SAFETY: the kernel has just made it for us.
    let line = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut packet = [0; 4096];
    recv(line.as_raw_fd(), &mut packet, MsgFlags::empty())?;
    send(line.as_raw_fd(), &snapshot_sent(), MsgFlags::MSG_NOSIGNAL)?;
    while recv(line.as_raw_fd(), &mut packet, MsgFlags::empty())? > 0 {}
    Ok(())
}

/// Runs `start` while `fd` may be inherited.
fn inherit(fd: impl AsFd, start: impl FnOnce(i32) -> Result<Child>) -> Result<Child> {
    let fd = fd.as_fd();
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
    start(fd.as_raw_fd())
}

fn quiet(mut command: Command, log: &Path) -> Result<Child> {
    let log = fs::File::create(log).with_context(|| log.display().to_string())?;
    let name = command.get_program().to_string_lossy().into_owned();
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn().with_context(|| name)
}

fn end(process: &mut Child) {
    // No drain: nothing is connected through it.
    let _ = process.kill();
    let _ = process.wait();
}

fn pid_of(process: &Child) -> i32 {
    i32::try_from(process.id()).unwrap_or(i32::MAX)
}

/// An address of loopback that was free a moment ago.
fn free_address() -> Result<String> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string())
}

fn wait_for_page(url: &str, every: Duration) -> Result<()> {
    let until = Instant::now() + READY_LIMIT;
    loop {
        match talk::status(url, READY_LIMIT) {
            Ok(200) => return Ok(()),
            last if Instant::now() > until => match last {
                Ok(status) => bail!("{url} still answers {status} after {READY_LIMIT:?}"),
                Err(error) => {
                    return Err(
                        error.context(format!("{url} does not answer after {READY_LIMIT:?}"))
                    );
                }
            },
            Ok(_) | Err(_) => thread::sleep(every),
        }
    }
}

fn write_mesh(mesh: &Path, workloads: u32) -> Result<()> {
    let mut text = String::from(
        "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: size\n  labels:\n    istio.io/dataplane-mode: ambient\n",
    );
    let mut files = 0;
    let mut write = |text: &mut String| -> Result<()> {
        let path = mesh.join(format!("part-{files:04}.yaml"));
        files += 1;
        fs::write(&path, std::mem::take(text)).with_context(|| path.display().to_string())
    };
    for service in 0..workloads.div_ceil(PODS_IN_SERVICE) {
        // Writing to a String cannot fail, here and below.
        let _ = write!(text, "---\n{}\n", service_of(service));
        for n in service * PODS_IN_SERVICE..((service + 1) * PODS_IN_SERVICE).min(workloads) {
            // The first ones have files of their own: they are what changes.
            if n < CHANGES.min(workloads) {
                fs::write(mesh.join(format!("pod-{n}.yaml")), pod(n, true).to_string())?;
            } else {
                let _ = write!(text, "---\n{}\n", pod(n, true));
            }
        }
        if service % (PODS_IN_FILE / PODS_IN_SERVICE) == 0 {
            write(&mut text)?;
        }
    }
    write(&mut text)
}

/// Makes one pod unready, by a rename as editors and controllers do it.
fn write_pod(mesh: &Path, n: u32) -> Result<()> {
    let (new, path) = (mesh.join(".pod.tmp"), mesh.join(format!("pod-{n}.yaml")));
    fs::write(&new, pod(n, false).to_string())?;
    fs::rename(&new, &path).with_context(|| path.display().to_string())
}

fn pod(n: u32, ready: bool) -> serde_json::Value {
    let ip = std::net::Ipv4Addr::from_bits(10 << 24 | n);
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": format!("pod-{n}"), "namespace": "size",
            "labels": { "app": format!("app-{}", n / PODS_IN_SERVICE) },
            "annotations": { "ambient.istio.io/redirection": "enabled" },
        },
        "spec": {
            "nodeName": format!("other-{}", n % NODES), "serviceAccountName": format!("account-{}", n % 100),
            "containers": [{ "name": "main", "image": "app", "ports": [{ "containerPort": 8080 }] }],
        },
        "status": {
            "phase": "Running", "podIP": ip, "podIPs": [{ "ip": ip }],
            "conditions": [{ "type": "Ready", "status": if ready { "True" } else { "False" } }],
        },
    })
}

fn service_of(n: u32) -> serde_json::Value {
    let ip = std::net::Ipv4Addr::from_bits(11 << 24 | n);
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": format!("app-{n}"), "namespace": "size" },
        "spec": {
            "selector": { "app": format!("app-{n}") }, "clusterIP": ip, "clusterIPs": [ip],
            "ports": [{ "name": "http", "port": 80, "targetPort": 8080 }],
        },
    })
}

/// `WorkloadRequest { snapshot_sent: {} }`: field 3, an empty message.
fn snapshot_sent() -> [u8; 2] {
    [3 << 3 | 2, 0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pod_is_written_once() {
        let folder = std::env::temp_dir().join(format!("meshbench-sizes-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        write_mesh(&folder, 2_345).unwrap();
        let mut names = Vec::new();
        for entry in fs::read_dir(&folder).unwrap() {
            let text = fs::read_to_string(entry.unwrap().path()).unwrap();
            assert!(text.len() < 1 << 20, "a file has {} bytes", text.len());
            let documents = text.split("---\n").filter(|d| d.starts_with('{'));
            let pods = documents.map(|d| serde_json::from_str::<serde_json::Value>(d).unwrap());
            names.extend(
                pods.filter(|d| d["kind"] == "Pod").map(|d| d["metadata"]["name"].to_string()),
            );
        }
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(names.len(), 2_345);
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 2_345);
    }
}
