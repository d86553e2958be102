//! Asks a container how it is: by a command inside, by HTTP or by opening a TCP connection, from the node's probe address.
//!
//! Invariants: an answer within the time limit, always; at most [`MOST_READ`] bytes of an answer are read. The probe address
//! is exempt from capture and policy, as the kubelet is.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::time::Duration;

use net::capture::{PROBE_V4, PROBE_V6};
use nix::sys::signal::Signal;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use super::exec::{self, ExecRun};
use super::resolve::ProbeAction;
use super::worker::{Worker, with_argv};

/// The status line is in the first few hundred bytes; the kubelet reads 10 KiB for its message.
const MOST_READ: usize = 10 * 1024;

/// Carries out a probe or hook. `inside`: how to run a command in the container.
pub(crate) async fn ask(
    worker: &Worker,
    action: &ProbeAction,
    inside: Option<ExecRun>,
    limit: Duration,
) -> Result<(), String> {
    let ask = async {
        match action {
            ProbeAction::Exec(argv) => {
                let inside = inside.ok_or("the container is not running")?;
                command(worker, with_argv(&inside, argv.clone())).await
            }
            ProbeAction::Http { port, path, host, headers } => {
                let mut stream = connect(worker, host.as_deref(), *port).await?;
                let host = host.clone().unwrap_or_else(|| {
                    worker.ips.first().map(ToString::to_string).unwrap_or_default()
                });
                http(&mut stream, path, &host, *port, headers).await
            }
            ProbeAction::Tcp { port } => connect(worker, None, *port).await.map(drop),
            ProbeAction::Sleep { millis } => {
                tokio::time::sleep(Duration::from_millis(*millis)).await;
                Ok(())
            }
            ProbeAction::Unsupported(why) => Err(why.clone()),
        }
    };
    match tokio::time::timeout(limit, ask).await {
        Ok(result) => result,
        Err(_) => Err(format!("no answer within {} ms", limit.as_millis())),
    }
}

async fn connect(worker: &Worker, host: Option<&str>, port: u16) -> Result<TcpStream, String> {
    let ip = match host {
        Some(host) => host
            .parse()
            .map_err(|_| format!("host {host:?}: only addresses are supported locally"))?,
        None => *worker.ips.first().ok_or("the pod has no address")?,
    };
    let to = SocketAddr::new(ip, port);
    let socket = || -> io::Result<TcpSocket> {
        let (socket, from): (_, IpAddr) = match ip {
            IpAddr::V4(_) => (TcpSocket::new_v4()?, PROBE_V4.into()),
            IpAddr::V6(_) => (TcpSocket::new_v6()?, PROBE_V6.into()),
        };
        socket.bind(SocketAddr::new(from, 0))?;
        Ok(socket)
    };
    let socket = worker
        .node_net
        .run(socket)
        .and_then(|s| s)
        .map_err(|e| format!("socket on the node: {e}"))?;
    socket.connect(to).await.map_err(|e| format!("connect to {to}: {e}"))
}

async fn http(
    stream: &mut TcpStream,
    path: &str,
    host: &str,
    port: u16,
    headers: &[(String, String)],
) -> Result<(), String> {
    let host_header =
        if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
    let named = headers.iter().any(|(k, _)| k.eq_ignore_ascii_case("host"));
    let mut request = format!("GET {path} HTTP/1.1\r\n");
    if !named {
        request.push_str(&format!("Host: {host_header}\r\n"));
    }
    for (name, value) in headers {
        request.push_str(&format!("{name}: {value}\r\n"));
    }
    request.push_str("User-Agent: kube-probe/1.36\r\nAccept: */*\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.map_err(|e| format!("send the request: {e}"))?;
    let mut answer = vec![];
    let mut buffer = [0; 1024];
    while answer.len() < MOST_READ && !answer.contains(&b'\n') {
        match stream.read(&mut buffer).await {
            Ok(0) => break,
            Ok(n) => answer.extend_from_slice(&buffer[..n]),
            Err(e) => return Err(format!("read the answer: {e}")),
        }
    }
    let line = String::from_utf8_lossy(&answer).lines().next().unwrap_or_default().to_owned();
    verdict(&line)
}

/// 200 to 399 is good.
fn verdict(status_line: &str) -> Result<(), String> {
    let mut words = status_line.split_whitespace();
    let version = words.next().unwrap_or_default();
    match words.next().and_then(|w| w.parse::<u16>().ok()) {
        Some(200..=399) if version.starts_with("HTTP/1") => Ok(()),
        Some(code) if version.starts_with("HTTP/1") => Err(format!("HTTP status {code}")),
        _ => Err(format!(
            "not an HTTP answer: {:?}",
            status_line.chars().take(60).collect::<String>()
        )),
    }
}

async fn command(worker: &Worker, run: ExecRun) -> Result<(), String> {
    let start = || -> anyhow::Result<_> {
        let mut command = Command::new("/proc/self/exe");
        command
            .arg(crate::EXEC)
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let files = vec![exec::description(&run)?, worker.net.as_fd().try_clone_to_owned()?];
        worker.shared.processes.start(command, files)
    };
    let process = start().map_err(|e| format!("{e:#}"))?;
    // Dropped at the time limit: the command must not go on.
    let guard = KillOnDrop(process.clone());
    let code = process.ended().await;
    drop(guard);
    if code == 0 { Ok(()) } else { Err(format!("exit status {code}")) }
}

struct KillOnDrop(crate::procs::Process);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        self.0.signal(Signal::SIGKILL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn http_verdicts() {
        let check = |line: &str, good: bool| assert_eq!(verdict(line).is_ok(), good, "{line:?}");
        check("HTTP/1.1 200 OK", true);
        check("HTTP/1.0 204", true);
        check("HTTP/1.1 399 x", true);
        check("HTTP/1.1 400 Bad Request", false);
        check("HTTP/1.1 503 Service Unavailable", false);
        check("HTTP/1.1", false);
        check("", false);
        check("220 mail ready", false);
        check("SSH-2.0-OpenSSH 200", false);
    }
}
