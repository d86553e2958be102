//! The lines of the benchmark, and how one line is measured.

use anyhow::{Context, Result};

use super::procfs;
use super::results::{Kind, Line, Noise, Sample};
use super::world::{Arm, World};

/// A load, as arguments of `meshload`.
#[derive(Clone, Copy, Debug)]
pub struct Task {
    pub id: &'static str,
    pub title: &'static str,
    pub kind: Kind,
    /// Mode and its flags; where to and how long is added.
    arguments: &'static [&'static str],
    /// Settings of the pods while it lasts.
    settings: &'static [(&'static str, &'static str)],
}

const TIME_WAIT_MOST: &str = "net.ipv4.tcp_max_tw_buckets";
const TIME_WAIT_REUSE: &str = "net.ipv4.tcp_tw_reuse";
/// The kernel's own value: reuse for loopback only.
const TIME_WAIT_REUSE_DEFAULT: &str = "2";

/// Long enough for eight windows of two seconds.
pub const SUSTAINED_SECONDS: f64 = 16.0;

const fn task(
    id: &'static str,
    title: &'static str,
    kind: Kind,
    arguments: &'static [&'static str],
) -> Task {
    Task { id, title, kind, arguments, settings: &[] }
}

/// With few sockets in TIME_WAIT, so that what is measured is a connection and not the search for a port.
const fn capped(id: &'static str, title: &'static str, arguments: &'static [&'static str]) -> Task {
    Task { id, title, kind: Kind::Connections, arguments, settings: &[(TIME_WAIT_MOST, "2048")] }
}

/// The paired lines.
pub const TASKS: &[Task] = &[
    task("bulk-1", "1 stream, client to server", Kind::Bulk, &["send", "-n", "1"]),
    task("bulk-1-back", "1 stream, server to client", Kind::Bulk, &["receive", "-n", "1"]),
    task("bulk-8", "8 streams, client to server", Kind::Bulk, &["send", "-n", "8"]),
    task("bulk-8-back", "8 streams, server to client", Kind::Bulk, &["receive", "-n", "8"]),
    task("requests-1", "1 connection", Kind::Requests, &["closed", "-n", "1"]),
    task("requests-16", "16 connections", Kind::Requests, &["closed", "-n", "16"]),
    task("requests-64", "64 connections", Kind::Requests, &["closed", "-n", "64"]),
    task(
        "rate-1000",
        "1000 requests/s on 16 connections",
        Kind::Rate,
        &["rate", "-n", "16", "--rate", "1000"],
    ),
    capped("connections-1", "1 at a time", &["connect", "-n", "1", "--closing", "client"]),
    capped("connections-16", "16 at a time", &["connect", "-n", "16", "--closing", "client"]),
];

/// Long lines, one round each.
pub const SUSTAINED: &[Task] = &[
    task(
        "sustained-reset",
        "the client resets",
        Kind::Sustained,
        &["connect", "-n", "16", "--closing", "reset"],
    ),
    task(
        "sustained-server",
        "the server closes first",
        Kind::Sustained,
        &["connect", "-n", "16", "--closing", "server"],
    ),
    Task {
        id: "sustained-client",
        title: "the client closes first, its ports reused after a second (tcp_tw_reuse=1)",
        kind: Kind::Sustained,
        arguments: &["connect", "-n", "16", "--closing", "client"],
        settings: &[(TIME_WAIT_REUSE, "1")],
    },
];

/// What the noise floor is taken from.
pub const NOISE: [&str; 2] = ["bulk-1", "requests-16"];

/// What `bench-quick` looks at.
pub const QUICK: [&str; 6] =
    ["bulk-1", "requests-1", "requests-16", "requests-64", "rate-1000", "connections-16"];

/// The lines that the copying relay is measured on, too: those whose bars are costs of being in between.
pub const FLOORS: [&str; 6] =
    ["bulk-1", "requests-1", "requests-16", "requests-64", "rate-1000", "connections-16"];

/// Measures the arms, `rounds` times, the first arm changing from round to round.
pub fn paired(world: &World, task: &Task, rounds: u32, seconds: f64) -> Result<Line> {
    let samples = with_settings(world, task, || {
        let mut samples = Vec::new();
        for round in 0..rounds {
            for arm in order(task, round) {
                samples.push(sample(world, task, arm, round, seconds)?);
            }
        }
        Ok(samples)
    })?;
    Ok(Line { id: task.id.into(), title: task.title.into(), kind: task.kind, samples })
}

/// Measures one arm against itself: what the method sees where there is nothing to see.
pub fn against_itself(
    world: &World,
    task: &Task,
    arm: Arm,
    rounds: u32,
    seconds: f64,
) -> Result<Noise> {
    let pairs = (0..rounds).map(|round| {
        Ok((sample(world, task, arm, round, seconds)?, sample(world, task, arm, round, seconds)?))
    });
    let pairs: Result<Vec<_>> = pairs.collect();
    Ok(Noise { title: task.title.into(), arm, kind: task.kind, pairs: pairs? })
}

fn order(task: &Task, round: u32) -> Vec<Arm> {
    let mut arms = vec![Arm::Plain, Arm::Mesh];
    if FLOORS.contains(&task.id) {
        arms.push(Arm::Relay);
    }
    let first = round as usize % arms.len();
    arms.rotate_left(first);
    arms
}

fn sample(world: &World, task: &Task, arm: Arm, round: u32, seconds: f64) -> Result<Sample> {
    let (to, seconds) =
        (world.server(arm, u16::from(task.kind == Kind::Bulk)), seconds.to_string());
    let arguments: Vec<&str> =
        task.arguments.iter().copied().chain(["--to", &to, "-d", &seconds]).collect();
    let outcome =
        world.load(arm, &arguments).with_context(|| format!("line {}, round {round}", task.id))?;
    Ok(Sample::of(task.kind, arm, round, outcome))
}

/// Runs `measure` with the task's settings in the pods, and the defaults put back after it.
fn with_settings<T>(world: &World, task: &Task, measure: impl FnOnce() -> Result<T>) -> Result<T> {
    if task.settings.is_empty() {
        return measure();
    }
    world.set_in_pods(task.settings)?;
    let measured = measure();
    let most = procfs::sysctl(TIME_WAIT_MOST).unwrap_or_else(|| "131072".to_owned());
    world.set_in_pods(&[(TIME_WAIT_MOST, &most), (TIME_WAIT_REUSE, TIME_WAIT_REUSE_DEFAULT)])?;
    measured
}
