//! What a run writes down: the raw measurements, in the order in which they were taken.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::machine::Machine;
use super::stats::Spread;
use super::world::{Arm, Outcome};

/// One run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Results {
    /// `YYYY-MM-DD`, UTC.
    pub date: String,
    pub command: String,
    /// The commit that was measured; `+` behind it when the tree had other changes.
    pub commit: String,
    pub machine: Machine,
    /// Congestion control in the pods, and whether it was pinned.
    pub congestion: String,
    pub rounds: u32,
    pub seconds: f64,
    pub lines: Vec<Line>,
    pub noise: Vec<Noise>,
    pub memory: Vec<MemoryStep>,
    /// From the start of a proxy to ready with a small configuration, several times.
    pub start_ms: Vec<f64>,
    pub sizes: Vec<Size>,
    /// Traffic of other shapes.
    #[serde(default)]
    pub shapes: Vec<super::shapes::Measured>,
    /// Of the ztunnel that was measured, as it is on disk.
    pub binary_mb: f64,
    /// Output of the `snapshot` benchmark.
    pub snapshot: Option<Value>,
    /// Output of the `handshake` benchmark: one at a time, and 16.
    pub handshakes: Vec<Value>,
    /// What should have been measured and was not, and why.
    pub missing: Vec<String>,
}

/// What a line measures, and so what its unit is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Unit: GB (10^9 bytes) that arrived.
    Bulk,
    /// Unit: 100,000 requests.
    Requests,
    /// Unit: 100,000 requests; the latency counts.
    Rate,
    /// Unit: 100,000 connections.
    Connections,
    /// The same, for long: the windows count.
    Sustained,
    /// Unit: 100,000 DNS questions.
    Questions,
}

/// The same load on both arms.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Line {
    pub id: String,
    pub title: String,
    pub kind: Kind,
    pub samples: Vec<Sample>,
}

/// One arm of one round.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Sample {
    pub arm: Arm,
    pub round: u32,
    /// In the unit of the line's kind.
    pub units: f64,
    /// Of each node's proxy, ordered by node.
    pub proxy_cpu_s: Vec<f64>,
    pub machine_cpu_s: f64,
    pub steal_s: f64,
    /// What the client printed.
    pub result: Value,
}

/// One arm measured against itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Noise {
    pub title: String,
    pub arm: Arm,
    pub kind: Kind,
    /// First and second of each round.
    pub pairs: Vec<(Sample, Sample)>,
}

/// Resident memory of the proxies at one moment, in MB (10^6), ordered by node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MemoryStep {
    pub title: String,
    /// Connections that were open through the mesh.
    pub connections: u64,
    pub rss_mb: Vec<f64>,
    pub anonymous_mb: Vec<f64>,
    pub peak_mb: Vec<f64>,
}

/// One proxy with a configuration of some size.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Size {
    pub workloads: u32,
    pub ready_ms: f64,
    pub cpu_s_to_ready: f64,
    /// Three seconds after ready.
    pub rss_mb: f64,
    /// After changes of one workload each.
    pub rss_after_changes_mb: f64,
    pub peak_mb: f64,
    pub proxy_cpu_ms_per_change: f64,
    pub control_plane_cpu_ms_per_change: f64,
    pub control_plane_rss_mb: f64,
}

impl Sample {
    pub fn of(kind: Kind, arm: Arm, round: u32, outcome: Outcome) -> Self {
        let Outcome { result, before, after } = outcome;
        let passed = |pid: &i32| {
            after.processes.get(pid).unwrap_or(&0.0) - before.processes.get(pid).unwrap_or(&0.0)
        };
        Self {
            arm,
            round,
            units: units(kind, &result),
            proxy_cpu_s: before.processes.keys().map(passed).collect(),
            machine_cpu_s: after.machine - before.machine,
            steal_s: after.steal - before.steal,
            result,
        }
    }

    /// What an arm is compared by: Gbit/s, requests or connections a second.
    pub fn rate(&self) -> f64 {
        let fields = ["gbit_s", "per_second", "questions_per_second"];
        let field = fields.into_iter().find(|f| self.result[f].is_number());
        self.number(field.unwrap_or("per_second"))
    }

    pub fn proxy_cpu_per_unit(&self) -> f64 {
        self.proxy_cpu_s.iter().sum::<f64>() / self.units
    }

    pub fn machine_cpu_per_unit(&self) -> f64 {
        self.machine_cpu_s / self.units
    }

    /// A number of the client's result, or of its latency.
    pub fn number(&self, field: &str) -> f64 {
        let value = self.result.get(field).or_else(|| self.result["latency"].get(field));
        value.and_then(Value::as_f64).unwrap_or(f64::NAN)
    }

    pub fn errors(&self) -> u64 {
        self.result["errors"].as_object().map_or(0, |e| e.values().filter_map(Value::as_u64).sum())
    }

    pub fn lost_bytes(&self) -> bool {
        self.result["lost"].as_bool().unwrap_or(false)
    }
}

impl Line {
    pub fn spread(&self, arm: Arm, value: impl Fn(&Sample) -> f64) -> Option<Spread> {
        Spread::of(self.samples.iter().filter(|s| s.arm == arm).map(value))
    }

    /// Mesh to plain, round by round.
    pub fn ratio(&self, value: impl Fn(&Sample) -> f64) -> Option<Spread> {
        let of = |arm: Arm, round: u32| {
            self.samples.iter().find(|s| s.arm == arm && s.round == round).map(&value)
        };
        let rounds = self.samples.iter().filter(|s| s.arm == Arm::Mesh).map(|s| s.round);
        Spread::of(rounds.filter_map(|r| Some(of(Arm::Mesh, r)? / of(Arm::Plain, r)?)))
    }

    pub fn errors(&self) -> u64 {
        self.samples.iter().map(Sample::errors).sum()
    }
}

impl Results {
    pub fn line(&self, id: &str) -> Option<&Line> {
        self.lines.iter().find(|l| l.id == id)
    }

    /// Lines on which a byte did not arrive: the run has failed.
    pub fn lost_bytes(&self) -> Vec<&str> {
        let lost = |l: &&Line| l.samples.iter().any(Sample::lost_bytes);
        self.lines.iter().filter(lost).map(|l| l.id.as_str()).collect()
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts stay far below 2^52")]
fn units(kind: Kind, result: &Value) -> f64 {
    let count = |field: &str| result[field].as_u64().unwrap_or(0) as f64;
    match kind {
        Kind::Bulk => count("bytes_received") / 1e9,
        Kind::Requests | Kind::Rate => count("requests") / 1e5,
        Kind::Connections | Kind::Sustained => count("connections") / 1e5,
        Kind::Questions => count("questions") / 1e5,
    }
}
