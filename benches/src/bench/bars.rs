//! The bars: what the mesh has to reach, and whether it did.
//!
//! The first number is "no worse from the start", what stock ztunnel does on such a machine or a
//! little better; the second is where we want to be.

use serde_json::Value;

use super::results::{MemoryStep, Results, Sample, Size};
use super::stats::Spread;
use super::world::Arm;

/// One number with its two bars.
#[derive(Clone, Debug, PartialEq)]
pub struct Bar {
    pub line: String,
    /// No worse than this.
    pub start: f64,
    pub target: f64,
    pub digits: usize,
    pub higher_is_better: bool,
    pub measured: Option<f64>,
}

impl Bar {
    /// Whether the first bar is reached; `None` when it was not measured.
    pub fn reached(&self) -> Option<bool> {
        self.measured.map(|m| self.is_within(m, self.start))
    }

    pub fn target_reached(&self) -> Option<bool> {
        self.measured.map(|m| self.is_within(m, self.target))
    }

    fn is_within(&self, measured: f64, bar: f64) -> bool {
        if self.higher_is_better { measured >= bar } else { measured <= bar }
    }
}

/// Every bar, in the order of the table.
pub fn all(results: &Results) -> Vec<Bar> {
    let mut bars = traffic(results);
    bars.extend(latency(results));
    bars.extend(connections(results));
    bars.extend(memory(results));
    bars.extend(sizes(results));
    bars
}

fn at_most(
    line: impl Into<String>,
    start: f64,
    target: f64,
    digits: usize,
    measured: Option<f64>,
) -> Bar {
    Bar { line: line.into(), start, target, digits, higher_is_better: false, measured }
}

fn at_least(
    line: impl Into<String>,
    start: f64,
    target: f64,
    digits: usize,
    measured: Option<f64>,
) -> Bar {
    Bar { line: line.into(), start, target, digits, higher_is_better: true, measured }
}

fn traffic(results: &Results) -> Vec<Bar> {
    let bulk = results.line("bulk-1");
    let ratio = bulk.and_then(|l| l.ratio(Sample::rate)).map(|s| s.median);
    let cost = bulk.and_then(|l| l.spread(Arm::Mesh, Sample::proxy_cpu_per_unit)).map(|s| s.median);
    let mut bars = vec![
        at_least("bulk, 1 stream: ratio to no mesh", 0.25, 0.33, 3, ratio),
        at_most("bulk, 1 stream: proxy CPU s per GB, both nodes", 0.75, 0.55, 2, cost),
    ];
    for (connections, start, target) in [(1, 8.4, 6.3), (16, 3.13, 2.3), (64, 2.30, 1.7)] {
        let line = results.line(&format!("requests-{connections}"));
        let cost =
            line.and_then(|l| l.spread(Arm::Mesh, Sample::proxy_cpu_per_unit)).map(|s| s.median);
        let title = format!("small requests, {connections} connections: proxy CPU s per 100k");
        bars.push(at_most(title, start, target, 2, cost));
    }
    bars
}

/// Added latency: the difference of the medians of the arms.
pub fn added(results: &Results, quantile: &str) -> Option<f64> {
    let line = results.line("rate-1000")?;
    let of = |arm| line.spread(arm, |s| s.number(quantile)).map(|s| s.median);
    Some(of(Arm::Mesh)? - of(Arm::Plain)?)
}

/// What a copying relay costs where the bars were taken, and what stock ztunnel costs there. The machine
/// differs, the multiple should not.
#[derive(Clone, Debug)]
pub struct Floor {
    pub line: &'static str,
    pub relay_there: f64,
    pub stock_there: f64,
    pub relay_here: Option<Spread>,
    pub mesh_here: Option<Spread>,
}

/// CPU of both processes in between, for each unit of the line.
pub fn floors(results: &Results) -> Vec<Floor> {
    let rows: [(&str, &str, f64, f64); 5] = [
        ("bulk-1", "bulk, 1 stream, s per GB", 0.43, 0.84),
        ("requests-1", "small requests, 1 connection, s per 100k", 5.7, 8.4),
        ("requests-16", "small requests, 16 connections, s per 100k", 2.05, 3.13),
        ("requests-64", "small requests, 64 connections, s per 100k", 2.02, 2.30),
        ("connections-16", "new connections, 16 at a time, s per 100k", 10.14, 19.0),
    ];
    let floor = |(id, line, relay_there, stock_there): (&str, &'static str, f64, f64)| {
        let of = |arm| results.line(id)?.spread(arm, Sample::proxy_cpu_per_unit);
        Floor {
            line,
            relay_there,
            stock_there,
            relay_here: of(Arm::Relay),
            mesh_here: of(Arm::Mesh),
        }
    };
    rows.into_iter().map(floor).collect()
}

fn latency(results: &Results) -> Vec<Bar> {
    vec![
        at_most("added p50 at 1000 requests/s, µs", 117.0, 95.0, 0, added(results, "p50_us")),
        at_most("added p99 at 1000 requests/s, µs", 121.0, 100.0, 0, added(results, "p99_us")),
    ]
}

fn connections(results: &Results) -> Vec<Bar> {
    let sustained = results.line("sustained-reset").and_then(|l| {
        let mesh = l.samples.iter().find(|s| s.arm == Arm::Mesh)?;
        window_rates(&mesh.result).into_iter().min_by(f64::total_cmp)
    });
    let errors = results.line("sustained-reset").map(|l| {
        let errors: u64 = l.samples.iter().filter(|s| s.arm == Arm::Mesh).map(Sample::errors).sum();
        u32::try_from(errors).map_or(f64::INFINITY, f64::from)
    });
    let pooled = results
        .line("connections-16")
        .and_then(|l| l.spread(Arm::Mesh, Sample::proxy_cpu_per_unit));
    // Seconds per 100,000 on two nodes; microseconds for one on one node.
    let pooled = pooled.map(|s| s.median / 1e5 * 1e6 / 2.0);
    let handshake = results
        .handshakes
        .iter()
        .filter_map(|h| h["cpu_ms_median"].as_f64())
        .max_by(f64::total_cmp);
    vec![
        at_least("sustained new connections/s, worst 2 s window", 6600.0, 9000.0, 0, sustained),
        at_most("sustained new connections: errors", 0.0, 0.0, 0, errors),
        at_most("CPU per new pooled connection and node, 16 at a time, µs", 95.0, 60.0, 0, pooled),
        at_most("mTLS + HTTP/2 set-up, CPU of both ends, ms", 1.1, 0.7, 2, handshake),
    ]
}

/// Connections a second, window by window.
pub fn window_rates(result: &Value) -> Vec<f64> {
    let seconds = result["window_seconds"].as_f64().unwrap_or(f64::NAN);
    let windows = result["windows"].as_array().into_iter().flatten();
    windows.filter_map(|w| Some(w["connections"].as_f64()? / seconds)).collect()
}

fn memory(results: &Results) -> Vec<Bar> {
    let worst = |step: &MemoryStep| step.rss_mb.iter().copied().max_by(f64::total_cmp);
    let with = |connections: u64| {
        let mut steps = results.memory.iter().filter(|s| s.connections == connections);
        steps.next().and_then(worst)
    };
    // The last reading of all: long after the last connection was closed.
    let after =
        results.memory.iter().rfind(|s| s.connections == 0).filter(|_| results.memory.len() > 1);
    vec![
        at_most("RSS MB, idle", 15.0, 8.0, 1, with(0)),
        at_most("RSS MB, 1k connections", 24.0, 12.0, 1, with(1000)),
        at_most("RSS MB, 10k connections", 39.5, 35.0, 1, with(10_000)),
        at_most(
            "RSS MB, after they are closed (kept by stock: 74–76)",
            39.5,
            12.0,
            1,
            after.and_then(worst),
        ),
    ]
}

fn sizes(results: &Results) -> Vec<Bar> {
    let size = |workloads: u32, value: fn(&Size) -> f64| {
        results.sizes.iter().find(|s| s.workloads == workloads).map(value)
    };
    let start = Spread::of(results.start_ms.iter().copied()).map(|s| s.max);
    vec![
        at_most("RSS MB, 10k workloads", 35.0, 20.0, 0, size(10_000, |s| s.rss_after_changes_mb)),
        at_most(
            "RSS MB, 100k workloads",
            188.0,
            80.0,
            0,
            size(100_000, |s| s.rss_after_changes_mb),
        ),
        at_most("RSS MB, 100k workloads, peak", 249.0, 120.0, 0, size(100_000, |s| s.peak_mb)),
        at_most("start to ready, ms, the slowest", 61.0, 30.0, 0, start),
        at_most(
            "binary, MB",
            16.7,
            12.0,
            1,
            (results.binary_mb > 0.0).then_some(results.binary_mb),
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn which_side_of_a_bar() {
        let check = |bar: Bar, want: Option<bool>| assert_eq!(bar.reached(), want, "{bar:?}");
        check(at_most("cost", 1.0, 0.5, 1, Some(0.9)), Some(true));
        check(at_most("cost", 1.0, 0.5, 1, Some(1.1)), Some(false));
        check(at_least("rate", 1.0, 2.0, 1, Some(1.1)), Some(true));
        check(at_least("rate", 1.0, 2.0, 1, Some(0.9)), Some(false));
        check(at_least("rate", 1.0, 2.0, 1, None), None);
        assert_eq!(at_least("rate", 1.0, 2.0, 1, Some(1.1)).target_reached(), Some(false));
    }

    #[test]
    fn windows_become_rates() {
        let result = serde_json::json!({
            "window_seconds": 2.0, "windows": [{ "connections": 10 }, { "connections": 4 }]
        });
        assert_eq!(window_rates(&result), [5.0, 2.0]);
    }
}
