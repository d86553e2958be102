//! Asks the mesh's processes how they are: readiness, and which configuration is in force.
//!
//! Runs on a client's thread, in the lab's root namespace, from where all nodes are reached. Invariants: a process that does
//! not answer within [`PATIENCE`] is not ready, and costs no more than that.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::mesh::STATUS_PORT;
use crate::network::UNDERLAY_V4;
use crate::status::{Status, WaypointStatus};
use crate::supervise::DRAINING;

/// Answers come from memory, over a bridge.
const PATIENCE: Duration = Duration::from_millis(500);
/// The answer names every proxy, or every Service that is bound to a waypoint.
const MOST_READ: u64 = 1 << 20;
/// Where ztunnel says whether it is ready, as in Istio.
const READINESS_PORT: u16 = 15021;

/// What istiod-lite says, as far as it is shown.
#[derive(Deserialize)]
struct Debug {
    config: Option<Config>,
    #[serde(default)]
    proxies: Vec<Proxy>,
}

#[derive(Deserialize)]
struct Config {
    push: String,
}

#[derive(Deserialize)]
struct Proxy {
    node: String,
    /// A waypoint's; the node's own proxy has none.
    pod: Option<String>,
    acked: Option<String>,
}

/// Fills in what the processes say about themselves.
pub(super) fn ask(status: &mut Status) {
    let debug = istiod();
    status.waypoints = waypoints().unwrap_or_default();
    for process in status.processes.iter_mut().filter(|p| p.state != DRAINING) {
        match &process.node {
            None => {
                process.ready = get(UNDERLAY_V4.into(), STATUS_PORT, "/readyz").is_ok();
                process.config =
                    debug.as_ref().ok().and_then(|d| Some(d.config.as_ref()?.push.clone()));
            }
            Some(node) => {
                let address = status.nodes.iter().find(|n| n.name == *node);
                let address = address.and_then(|n| n.addresses.first()?.parse().ok());
                process.ready =
                    address.is_some_and(|a| get(a, READINESS_PORT, "/healthz/ready").is_ok());
                let proxy = debug
                    .as_ref()
                    .ok()
                    .and_then(|d| d.proxies.iter().find(|p| p.pod.is_none() && p.node == *node));
                process.config = proxy.and_then(|p| p.acked.clone());
            }
        }
    }
}

fn istiod() -> Result<Debug> {
    let text = get(UNDERLAY_V4.into(), STATUS_PORT, "/debug/config")?;
    serde_json::from_str(&text).context("istiod-lite's answer")
}

fn waypoints() -> Result<Vec<WaypointStatus>> {
    let text = get(UNDERLAY_V4.into(), STATUS_PORT, "/debug/waypoints")?;
    serde_json::from_str(&text).context("istiod-lite's answer")
}

/// A GET whose answer must be 200; its body.
fn get(ip: IpAddr, port: u16, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::new(ip, port), PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {ip}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.take(MOST_READ).read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
    ensure!(head.starts_with("HTTP/1.1 200"), "{}", head.lines().next().unwrap_or_default());
    Ok(body.to_owned())
}
