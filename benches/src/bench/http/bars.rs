//! The bars of this part: what the waypoint has to reach, beside what Envoy reached in the same run. Less is better throughout.

use super::page::{WAYPOINTS, way_of};
use super::plain::{FEW, MANY};
use super::{HttpResults, Run};

/// One number with its bars.
#[derive(Clone, Debug, PartialEq)]
pub struct Bar {
    pub line: String,
    pub envoy: Option<f64>,
    pub ours: Option<f64>,
    /// No worse than this.
    pub start: f64,
    pub target: f64,
    pub digits: usize,
}

/// Every bar, in the order of the table.
pub fn all(results: &HttpResults) -> Vec<Bar> {
    let mut bars = proxying(results);
    bars.extend(memory(results));
    bars.extend(many_routes(results));
    bars.extend(as_waypoint(results));
    bars.extend(changes(results));
    bars
}

/// The median of a way.
fn median(
    results: &HttpResults,
    line: &str,
    way: &str,
    value: impl Fn(&Run) -> f64,
) -> Option<f64> {
    Some(way_of(results.line(line)?, way, value)?.median)
}

fn proxying(results: &HttpResults) -> Vec<Bar> {
    let bar = |(n, start, target): (u32, f64, f64)| {
        let cost = |way| median(results, &format!("plain-{n}"), way, |r| r.cpu_per_100k("proxy"));
        Bar {
            line: format!("HTTP proxy, {n} connections: CPU s per 100k requests"),
            envoy: cost("Envoy, log off"),
            ours: cost("waypoint, log off"),
            start,
            target,
            digits: 2,
        }
    };
    [(1, 7.5, 6.0), (16, 3.7, 3.0), (64, 3.2, 2.6)].map(bar).into()
}

fn memory(results: &HttpResults) -> Vec<Bar> {
    let after = |process: String| {
        let row = results.memory.iter().find(|m| m.process == process)?;
        Some(row.after_load_mb)
    };
    let many = format!("{MANY} routes");
    let rows = [
        ("RSS after load, MB", "log off", 24.0, 16.0),
        ("RSS with 5,000 routes, MB", &many, 40.0, 40.0),
    ];
    let bar = |(line, way, start, target): (&str, &str, f64, f64)| Bar {
        line: line.to_owned(),
        envoy: after(format!("Envoy, {way}")),
        ours: after(format!("waypoint, {way}")),
        start,
        target,
        digits: 1,
    };
    rows.map(bar).into()
}

fn many_routes(results: &HttpResults) -> Vec<Bar> {
    let last = |who: &str, routes: usize| {
        median(results, "routes", &format!("{who}, {routes} routes"), |r| r.cpu_per_100k("proxy"))
    };
    let ratio = |who: &str| Some(last(who, MANY)? / last(who, FEW)?);
    vec![
        Bar {
            line: "the last of 5,000 path prefixes: CPU s per 100k requests".to_owned(),
            envoy: last("Envoy", MANY),
            ours: last("waypoint", MANY),
            start: 4.0,
            target: 3.1,
            digits: 2,
        },
        Bar {
            line: format!("the same against {FEW} prefixes, as a factor"),
            envoy: ratio("Envoy"),
            ours: ratio("waypoint"),
            start: 1.05,
            target: 1.05,
            digits: 3,
        },
    ]
}

fn as_waypoint(results: &HttpResults) -> Vec<Bar> {
    let bar = |(n, start, target): (u32, f64, f64)| {
        let cost = |way| median(results, &format!("mesh-{n}"), way, |r| r.cpu_per_100k("waypoint"));
        Bar {
            line: format!("as waypoint, {n} connections: CPU s per 100k requests"),
            envoy: cost(WAYPOINTS[1]),
            ours: cost(WAYPOINTS[0]),
            start,
            target,
            digits: 2,
        }
    };
    [(1, 13.4, 9.0), (16, 5.21, 3.6), (64, 4.39, 3.0)].map(bar).into()
}

fn changes(results: &HttpResults) -> Vec<Bar> {
    let bar = |(line, routes, start, target): (&str, usize, f64, f64)| {
        let time = |who: &str| {
            let mut all = results.changes.iter();
            let found = all.find(|c| c.title.starts_with(who) && c.routes == routes)?;
            Some(found.quantile(0.99))
        };
        Bar {
            line: format!("a saved route to the first request on it, {line}: p99 ms"),
            envoy: time("Envoy"),
            ours: time("waypoint"),
            start,
            target,
            digits: 1,
        }
    };
    [("small", 2, 100.0, 5.0), ("5,000 routes", MANY, 300.0, 30.0)].map(bar).into()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::bench::http::{LEFT_OUT, Line, Role, Way, page};

    fn run(cpu: f64) -> Run {
        let result = json!({ "requests": 100_000, "seconds": 2.0, "per_second": 50_000.0 });
        let cpu_s = [(Role::new("proxy", 1).name, cpu)].into();
        Run { round: 0, cpu_s, machine_cpu_s: 4.0, steal_s: 0.0, result }
    }

    fn results(missing: &str) -> HttpResults {
        let way = |title: &str, cpu: f64| Way {
            title: title.to_owned(),
            runs: vec![run(cpu), run(cpu * 3.0), run(cpu * 2.0)],
        };
        let ways = vec![way("Envoy, log off", 5.0), way("waypoint, log off", 1.6)];
        let line = Line { id: "plain-16".into(), title: "16 connections".into(), ways };
        HttpResults {
            date: "2026-11-21".into(),
            command: "bench".into(),
            commit: "1".into(),
            machine: Default::default(),
            congestion: String::new(),
            envoy: String::new(),
            rounds: 3,
            seconds: 2.0,
            waypoint_mb: 1.0,
            lines: vec![line],
            memory: vec![],
            changes: vec![],
            missing: vec![missing.to_owned()],
        }
    }

    #[test]
    fn bars_are_of_medians_and_say_what_was_not_measured() {
        let all = all(&results("x"));
        let measured: Vec<_> = all.iter().filter(|b| b.ours.is_some()).collect();
        assert_eq!(measured.len(), 1, "{all:?}");
        assert_eq!(measured[0].envoy, Some(10.0));
        assert!(measured[0].ours.is_some_and(|ours| (ours - 3.2).abs() < 1e-9), "{measured:?}");
        let page = page::page(&results("x"));
        assert!(page.contains("| 10.00 | 3.20 | ≤ 3.70 | reached | ≤ 3.00 | **not reached** |"));
        assert!(page.contains("| not measured |") && page.contains("\n* x\n"), "{page}");
    }

    #[test]
    fn a_second_run_has_what_the_first_left_out() {
        let (mut first, second) = (results(&format!("mesh{LEFT_OUT}")), results("broken"));
        first.add(second);
        assert_eq!((first.lines.len(), first.missing), (2, vec!["broken".to_owned()]));
        let neither = format!("mesh{LEFT_OUT}");
        let mut first = results(&neither);
        first.add(results(&neither));
        assert_eq!(first.missing, [neither]);
    }
}
