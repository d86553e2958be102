//! From a saved route file to the first answer that shows it.
//!
//! Ours goes the whole way of the local mode: file -> istiod-lite -> xDS -> waypoint, asked by a pod through its node's proxy.
//! Envoy watches a file of its own (`path_config_source`) and is asked over loopback. Both files are replaced by a rename. The
//! clock starts before the rename and stops with the answer, which the client asks for every half millisecond.
//!
//! In the many-routes rows ours gets a small file beside others that stay as they are; Envoy's file is all of its routes, since it
//! takes a route configuration whole.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::HttpResults;
use super::envoy::{self, Routes};
use super::mesh::{CROWDED, Place};
use super::plain::MANY;
use super::process::{Process, free_port};
use crate::bench::procfs::Cpu;
use crate::bench::world::Programs;
use crate::talk;

/// Changes of each kind.
const CHANGES: u32 = 40;
/// For all of them, and what comes before.
const SECONDS: f64 = 120.0;
/// Between two, so that none waits for the one before.
const BETWEEN: Duration = Duration::from_millis(250);
/// The header that shows which version of the route answered.
const HEADER: &str = "x-route";

/// What was measured of one way.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Changes {
    pub title: String,
    /// Routes beside the one that changes.
    pub routes: usize,
    /// In the order of the changes.
    pub milliseconds: Vec<f64>,
    /// Answers that were not 200 meanwhile.
    pub failed: u64,
    /// CPU of the processes that take part, for each change.
    pub cpu_ms: f64,
}

/// Ours, in the local world.
pub fn ours(place: &Place, results: &mut HttpResults) -> Result<()> {
    for (namespace, routes) in [("routed", 2), (CROWDED, MANY)] {
        if routes == MANY {
            place.crowd(MANY)?;
        }
        let pids = place.movers(namespace)?;
        let write = |value: &str| {
            place.world.write(&format!("{namespace}-probe.yaml"), &probe(namespace, value))
        };
        write("0")?;
        let watcher = place.watcher(namespace, HEADER, SECONDS)?;
        let title = "waypoint, in the local world";
        results.changes.push(measure(title, routes, watcher, &pids, write)?);
    }
    results.memory.push(place.crowded_memory()?);
    Ok(())
}

/// A route of its own: `/probe` is longer than what the others match.
fn probe(namespace: &str, value: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: probe, namespace: {namespace}}}\nspec:\n  \
         parentRefs: [{{group: '', kind: Service, name: web}}]\n  rules:\n  - matches: [{{path: {{type: PathPrefix, value: /probe}}}}]\n    \
         filters: [{{type: ResponseHeaderModifier, responseHeaderModifier: {{set: [{{name: {HEADER}, value: 'v{value}'}}]}}}}]\n    \
         backendRefs: [{{name: v1, port: 80}}]\n"
    )
}

/// Envoy, with a file.
pub fn of_envoy(programs: &Programs, folder: &Path, results: &mut HttpResults) -> Result<()> {
    let folder = folder.join("http-change");
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let server = free_port([127, 0, 0, 2])?;
    let mut command = Command::new(&programs.meshload);
    command.args(["serve", "--listen", &server.to_string()]);
    let log = folder.join("server.log");
    let mut serving = Process::start(command, &log)?;
    serving.listens(server, &log)?;
    for (prefixes, routes) in [(0, 2), (MANY, MANY)] {
        let file = folder.join(format!("routes-{prefixes}.json"));
        let write =
            |value: &str| replace(&file, &envoy::route_file(prefixes, &format!("v{value}")));
        write("0")?;
        let (at, admin) = (free_port([127, 0, 0, 1])?, free_port([127, 0, 0, 1])?);
        let process = start(&folder, &file, server, at, admin)?;
        let mut command = Command::new(&programs.meshload);
        command.args(["watch", &format!("http://{at}/probe"), "--header", HEADER]);
        command.args(["-d", &SECONDS.to_string()]);
        let watcher = command.stdout(Stdio::piped()).spawn()?;
        let title = "Envoy, a file that it watches";
        results.changes.push(measure(title, routes, watcher, &[process.pid()], write)?);
    }
    Ok(())
}

fn start(
    folder: &Path,
    file: &Path,
    server: SocketAddr,
    at: SocketAddr,
    admin: SocketAddr,
) -> Result<Process> {
    let config = envoy::plain(at, admin, server, server, Routes::File(file), false);
    let (path, log) = (folder.join("envoy.json"), folder.join("envoy.log"));
    fs::write(&path, config.to_string()).with_context(|| path.display().to_string())?;
    let mut process = Process::start(envoy::command(&envoy::program()?, &path), &log)?;
    process.listens(at, &log)?;
    Ok(process)
}

fn replace(path: &Path, value: &Value) -> Result<()> {
    let new = path.with_extension("tmp");
    fs::write(&new, value.to_string()).with_context(|| new.display().to_string())?;
    fs::rename(&new, path).with_context(|| path.display().to_string())
}

/// Ends a client when it is no longer needed.
struct Watcher(Child);

impl Drop for Watcher {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn measure(
    title: &str,
    routes: usize,
    watcher: Child,
    pids: &[i32],
    write: impl Fn(&str) -> Result<()>,
) -> Result<Changes> {
    let mut watcher = Watcher(watcher);
    let pipe = watcher.0.stdout.take().context("no pipe")?;
    let mut lines = BufReader::new(pipe).lines();
    let mut next = || -> Result<Value> {
        let line = lines.next().context("the client ended")??;
        serde_json::from_str(&line).with_context(|| format!("meshload printed {line:?}"))
    };
    // The first version may be on its way when the client begins, and what was answered before it is no change's fault; the
    // client ends by itself if it never comes.
    let first = loop {
        let seen = next()?;
        if seen["value"] == "v0" {
            break seen["failed"].as_u64().unwrap_or_default();
        }
    };
    let before = Cpu::now(pids)?;
    let (mut milliseconds, mut failed) = (Vec::new(), 0);
    for change in 1..=CHANGES {
        thread::sleep(BETWEEN);
        let begun = talk::monotonic_us()?;
        write(&change.to_string())?;
        let seen = next()?;
        ensure!(seen["value"] == format!("v{change}"), "{title}: change {change} shows {seen}");
        let at = seen["answered_us"].as_u64().context("no time")?;
        milliseconds.push(thousandths(at.saturating_sub(begun)));
        failed = seen["failed"].as_u64().unwrap_or_default() - first;
    }
    let after = Cpu::now(pids)?;
    let cpu: f64 = pids.iter().map(|p| after.processes[p] - before.processes[p]).sum::<f64>() * 1e3;
    let cpu_ms = cpu / f64::from(CHANGES);
    Ok(Changes { title: title.to_owned(), routes, milliseconds, failed, cpu_ms })
}

fn thousandths(number: u64) -> f64 {
    f64::from(u32::try_from(number).unwrap_or(u32::MAX)) / 1e3
}

impl Changes {
    /// The value below which this share of the changes is.
    pub fn quantile(&self, share: f64) -> f64 {
        let mut all = self.milliseconds.clone();
        all.sort_by(f64::total_cmp);
        let count = u32::try_from(all.len()).unwrap_or(u32::MAX);
        let place = (f64::from(count) * share).ceil();
        let found = (1..=count).zip(&all).find(|(n, _)| f64::from(*n) >= place);
        found.map_or(f64::NAN, |(_, ms)| *ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_of_changes() {
        let check = |milliseconds: &[f64], share: f64, want: f64| {
            let milliseconds = milliseconds.to_vec();
            let changes =
                Changes { title: String::new(), routes: 0, milliseconds, failed: 0, cpu_ms: 0.0 };
            let got = changes.quantile(share);
            assert!((got - want).abs() < 1e-9, "{share} of {changes:?}: {got}");
        };
        check(&[3.0, 1.0, 2.0], 0.5, 2.0);
        check(&[3.0, 1.0, 2.0], 0.99, 3.0);
        check(&[3.0, 1.0, 2.0], 1.0, 3.0);
        check(&[7.0], 0.5, 7.0);
        let many: Vec<f64> = (1..=200).map(f64::from).collect();
        check(&many, 0.99, 198.0);
        let none = Changes {
            title: String::new(),
            routes: 0,
            milliseconds: vec![],
            failed: 0,
            cpu_ms: 0.0,
        };
        assert!(none.quantile(0.5).is_nan());
    }
}
