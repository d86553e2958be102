//! HTTP against the real Envoy: the same work through both, in turns, on one machine.
//!
//! `plain` is what any HTTP proxy does, without a mesh: loopback, HTTP/1.1 on both sides. `mesh` is a waypoint's place, with
//! our node proxies on both sides and once our waypoint, once Envoy in between. `change` is a route's way from a saved file to
//! the first request that takes it. `page` writes `benches/HTTP.md`.
//!
//! Invariants: both proxies are asked the same question, and it is checked that both answer it before anything is measured;
//! every way of a line is measured in each round, the order changing; nothing is dropped; errors are reported.

pub mod bars;
pub mod change;
pub mod envoy;
pub mod mesh;
pub mod page;
pub mod plain;
mod process;
mod routes;

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::machine::Machine;
use super::stats::Spread;
use super::world::Outcome;

/// One run of this part.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HttpResults {
    /// `YYYY-MM-DD`, UTC.
    pub date: String,
    pub command: String,
    pub commit: String,
    pub machine: Machine,
    /// Congestion control in pods, and whether it was pinned.
    pub congestion: String,
    /// What `envoy --version` says.
    pub envoy: String,
    pub rounds: u32,
    pub seconds: f64,
    pub waypoint_mb: f64,
    pub lines: Vec<Line>,
    pub memory: Vec<MemoryRow>,
    pub changes: Vec<change::Changes>,
    /// What should have been measured and was not, and why.
    pub missing: Vec<String>,
}

/// The same load in several ways.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Line {
    pub id: String,
    pub title: String,
    pub ways: Vec<Way>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Way {
    pub title: String,
    pub runs: Vec<Run>,
}

/// One way of one round.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Run {
    pub round: u32,
    /// Of each process in between, by its role.
    pub cpu_s: BTreeMap<String, f64>,
    pub machine_cpu_s: f64,
    pub steal_s: f64,
    /// What the client printed.
    pub result: Value,
}

/// Resident memory of one process, MB (10^6).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MemoryRow {
    /// Of which part, and under what.
    pub title: String,
    pub process: String,
    pub idle_mb: f64,
    pub after_load_mb: f64,
    pub peak_mb: f64,
}

/// A process whose CPU counts.
#[derive(Clone, Debug)]
pub struct Role {
    pub name: String,
    pub pid: i32,
}

impl Role {
    pub fn new(name: &str, pid: i32) -> Self {
        Self { name: name.to_owned(), pid }
    }
}

impl Run {
    fn of(round: u32, roles: &[Role], outcome: &Outcome) -> Self {
        let (before, after) = (&outcome.before, &outcome.after);
        let passed = |pid: &i32| {
            let at = |cpu: &super::procfs::Cpu| cpu.processes.get(pid).copied().unwrap_or(0.0);
            at(after) - at(before)
        };
        let mut cpu_s: BTreeMap<String, f64> = BTreeMap::new();
        for role in roles {
            *cpu_s.entry(role.name.clone()).or_default() += passed(&role.pid);
        }
        Self {
            round,
            cpu_s,
            machine_cpu_s: after.machine - before.machine,
            steal_s: after.steal - before.steal,
            result: outcome.result.clone(),
        }
    }

    /// A number of the client's result, or of its latency.
    pub fn number(&self, field: &str) -> f64 {
        let value = self.result.get(field).or_else(|| self.result["latency"].get(field));
        value.and_then(Value::as_f64).unwrap_or(f64::NAN)
    }

    pub fn errors(&self) -> u64 {
        self.result["errors"].as_object().map_or(0, |e| e.values().filter_map(Value::as_u64).sum())
    }

    /// CPU seconds of a role for each 100,000 requests.
    pub fn cpu_per_100k(&self, role: &str) -> f64 {
        self.cpu_s.get(role).map_or(f64::NAN, |s| s / self.number("requests") * 1e5)
    }

    /// How many cores a role kept busy.
    pub fn cores(&self, role: &str) -> f64 {
        self.cpu_s.get(role).map_or(f64::NAN, |s| s / self.number("seconds"))
    }
}

impl Way {
    pub fn spread(&self, value: impl Fn(&Run) -> f64) -> Option<Spread> {
        Spread::of(self.runs.iter().map(value))
    }

    pub fn errors(&self) -> u64 {
        self.runs.iter().map(Run::errors).sum()
    }
}

/// Behind the name of what a run was told to leave out.
pub const LEFT_OUT: &str = ": left out by --only";

impl HttpResults {
    /// Adds what another run measured, which this one was told to leave out.
    pub fn add(&mut self, other: Self) {
        let Self { command, commit, lines, memory, changes, missing, .. } = other;
        self.command = format!("{}` and `{command}", self.command);
        if commit != self.commit {
            self.commit = format!("{} and {commit}", self.commit);
        }
        self.lines.extend(lines);
        self.memory.extend(memory);
        self.changes.extend(changes);
        // What neither has is said by both.
        self.missing.retain(|m| !m.ends_with(LEFT_OUT) || missing.contains(m));
        let more = missing.into_iter().filter(|m| !m.ends_with(LEFT_OUT));
        self.missing.extend(more);
    }

    pub fn line(&self, id: &str) -> Option<&Line> {
        self.lines.iter().find(|l| l.id == id)
    }
}

/// One way of a line before it is measured: its title, and what does it once.
pub(crate) struct Doing<'a> {
    pub title: &'a str,
    pub roles: Vec<Role>,
    pub once: Box<dyn Fn() -> Result<Outcome> + 'a>,
}

/// Measures the ways of a line in turns.
pub(crate) fn in_turns(id: &str, title: &str, rounds: u32, ways: &[Doing<'_>]) -> Result<Line> {
    let mut measured: Vec<Way> =
        ways.iter().map(|w| Way { title: w.title.to_owned(), runs: vec![] }).collect();
    for round in 0..rounds {
        for turn in 0..ways.len() {
            let index = (turn + round as usize) % ways.len();
            let way = &ways[index];
            let outcome = (way.once)().with_context(|| format!("{id}: {}", way.title))?;
            measured[index].runs.push(Run::of(round, &way.roles, &outcome));
        }
    }
    Ok(Line { id: id.to_owned(), title: title.to_owned(), ways: measured })
}
