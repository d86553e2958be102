//! Resident memory of the proxies with many connections, and whether it is given back.

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::Value;

use super::procfs::Memory;
use super::results::MemoryStep;
use super::world::{Arm, World};

/// From the last connection to the reading: buffers of the start are gone by then.
const SETTLE: Duration = Duration::from_secs(1);
/// From the last close to the reading, as in the reports on other proxies.
const AFTER_CLOSE: Duration = Duration::from_secs(3);
/// The same for an allocator that gives memory back in its own time.
const LATER: Duration = Duration::from_secs(15);

/// Reads memory idle, with each number of connections, and after they are closed. The mesh must be fresh.
pub fn steps(world: &World, connections: &[u64]) -> Result<Vec<MemoryStep>> {
    thread::sleep(AFTER_CLOSE);
    let mut steps = vec![step(world, "idle", 0)?];
    for &count in connections {
        steps.push(held(world, count)?);
        thread::sleep(AFTER_CLOSE);
        steps.push(step(
            world,
            &format!("{} s after {count} were closed", AFTER_CLOSE.as_secs()),
            0,
        )?);
    }
    thread::sleep(LATER - AFTER_CLOSE);
    steps.push(step(world, &format!("{} s after that", LATER.as_secs()), 0)?);
    Ok(steps)
}

fn held(world: &World, count: u64) -> Result<MemoryStep> {
    let (to, number) = (world.server(Arm::Mesh, 0), count.to_string());
    let arguments = ["idle", "--to", &to, "-n", &number, "-d", "4"];
    let mut at_most = None;
    let outcome = world.load_with(Arm::Mesh, &arguments, |event| {
        if event["event"] == "open" {
            thread::sleep(SETTLE);
            at_most = Some(step(
                world,
                &format!("{count} idle connections"),
                event["open"].as_u64().unwrap_or(0),
            )?);
        }
        Ok(())
    })?;
    let open = outcome.result["open"].as_u64().unwrap_or(0);
    ensure!(
        open == count,
        "{open} of {count} connections could be opened: {}",
        short(&outcome.result)
    );
    ensure!(
        outcome.result["ended_early"] == 0,
        "idle connections were closed: {}",
        short(&outcome.result)
    );
    at_most.ok_or_else(|| anyhow::anyhow!("the client did not say when its connections were open"))
}

fn step(world: &World, title: &str, connections: u64) -> Result<MemoryStep> {
    let memory: Result<Vec<Memory>> = world.proxies()?.iter().map(|p| Memory::of(p.pid)).collect();
    let memory = memory?;
    Ok(MemoryStep {
        title: title.to_owned(),
        connections,
        rss_mb: memory.iter().map(|m| m.rss_mb).collect(),
        anonymous_mb: memory.iter().map(|m| m.anonymous_mb).collect(),
        peak_mb: memory.iter().map(|m| m.peak_mb).collect(),
    })
}

fn short(result: &Value) -> String {
    result["errors"].to_string()
}
