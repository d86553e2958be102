//! `benches/HTTP.md`: what came out of a run of this part, as it came out.

use std::fmt::Write as _;

use super::plain::{FEW, MANY};
use super::{HttpResults, Line, Run, bars};
use crate::bench::stats::{Spread, text};

/// The page. Writing to a String cannot fail, so results of `write!` are dropped throughout.
pub fn page(results: &HttpResults) -> String {
    let mut out = String::new();
    head(&mut out, results);
    bars(&mut out, results);
    plain(&mut out, results);
    routes(&mut out, results);
    mesh(&mut out, results);
    article(&mut out, results);
    changes(&mut out, results);
    memory(&mut out, results);
    missing(&mut out, results);
    out
}

fn head(out: &mut String, results: &HttpResults) {
    let machine = &results.machine;
    let runs = results.lines.iter().flat_map(|l| &l.ways).flat_map(|w| &w.runs);
    let steal: f64 = runs.map(|r| r.steal_s).sum();
    let _ = write!(
        out,
        "# HTTP: the waypoint beside Envoy\n\nWritten by `{}` on {}, commit {}; the raw measurements are in `results/`. {}\n\n\
         * Machine: {}, {} cores, {} GB; kernel {}; {}; {}. Congestion control: {}.\n\
         * Envoy {}, as `.ci/programs` fetches it, two workers; ours {:.1} MB, two workers.\n\
         * Client, server and proxy share the cores: carry CPU seconds per unit and ratios to other machines, not rates. Each way \
         of a line in turns, {} rounds of {} s, the order changing; median (least–greatest). Steal over all lines: {steal:.2} s.\n\
         * The same work for both: a header match, shares of 90 and 10 over two upstreams, one header added to requests and one to \
         answers, HTTP/1.1 on both sides. Both give requests an id, normalize paths and count requests. That the answers are right \
         and the shares are kept is checked before each run. What only one does: Envoy adds `x-forwarded-proto`, `x-envoy-*` and `server`; \
         the waypoint asks its configuration for the client's identity and keeps connections of identities apart.\n",
        results.command,
        results.date,
        results.commit,
        if results.missing.is_empty() {
            "Nothing was left out or repeated."
        } else {
            "What was left out, or is not as it came out, stands at the end."
        },
        machine.processor,
        machine.cores,
        machine.memory_gb,
        machine.kernel,
        machine.system,
        machine.compiler,
        results.congestion,
        results.envoy,
        results.waypoint_mb,
        results.rounds,
        results.seconds,
    );
    let _ = writeln!(
        out,
        "* While 1000 requests/s went directly to a server, which takes a fifth of a core, {} cores of the machine were busy: what is \
         above is other work beside the run. It makes requests/s, latency and CPU per request worse for every way.",
        text(beside(results), 2),
    );
}

/// Work that had nothing to do with the run. Where next to nothing is asked for, what the machine does is others' work.
fn beside(results: &HttpResults) -> Option<Spread> {
    let busy = |r: &Run| r.machine_cpu_s / r.number("seconds");
    let idlest = |id: &str, way: &str| way_of(results.line(id)?, way, busy);
    idlest("plain-rate", "direct").or_else(|| idlest("mesh-rate", "no mesh"))
}

fn bars(out: &mut String, results: &HttpResults) {
    out.push_str(
        "\n## Bars\n\n| line | Envoy here | waypoint here | no worse from the start | | where to go | |\n|---|---|---|---|---|---|---|\n",
    );
    for bar in bars::all(results) {
        let digits = bar.digits;
        let word = |limit: f64| match bar.ours {
            Some(ours) if ours <= limit => "reached",
            Some(_) => "**not reached**",
            None => "not measured",
        };
        let shown = |n: Option<f64>| n.map_or_else(|| "–".to_owned(), |n| format!("{n:.digits$}"));
        let _ = writeln!(
            out,
            "| {} | {} | {} | ≤ {:.digits$} | {} | ≤ {:.digits$} | {} |",
            bar.line,
            shown(bar.envoy),
            shown(bar.ours),
            bar.start,
            word(bar.start),
            bar.target,
            word(bar.target),
        );
    }
    out.push_str(
        "\nThe bars were taken on another processor (Sapphire Rapids), where Envoy needs 10.7, 4.67 and 4.05 s per 100k requests at 1, 16 \
         and 64 connections. What can be carried from there to here is a ratio to Envoy in the same run.\n",
    );
}

fn plain(out: &mut String, results: &HttpResults) {
    out.push_str(
        "\n## Plain HTTP proxying\n\nOn loopback, no TLS, no tunnel. The waypoint's own code from a client's connection on; its tunnel is \
         left out (`waypoint::plain`). Log on: one line for each request, to a file. Closed loop; 1000/s: latency from the moment a \
         request was due.\n",
    );
    for n in ["1", "16", "64"] {
        if let Some(line) = results.line(&format!("plain-{n}")) {
            requests(out, line, "proxy");
        }
    }
    if let Some(line) = results.line("plain-rate") {
        rate(out, line);
    }
}

fn routes(out: &mut String, results: &HttpResults) {
    let Some(line) = results.line("routes") else { return };
    let _ = write!(
        out,
        "\n## Many routes\n\n{MANY} path prefixes on one host, each with the two header edits and the shares; every request asks for the \
         last one. Beside it {FEW}.\n"
    );
    requests(out, line, "proxy");
}

/// Ours, and Envoy in its place.
pub(super) const WAYPOINTS: [&str; 2] = ["layer 4 and waypoint", "layer 4 and Envoy"];

fn mesh(out: &mut String, results: &HttpResults) {
    let lines: Vec<&Line> =
        ["1", "16", "64"].iter().filter_map(|n| results.line(&format!("mesh-{n}"))).collect();
    if lines.is_empty() {
        return;
    }
    out.push_str(
        "\n## In a waypoint's place\n\nClient on node-1, its ztunnel, HBONE, the waypoint, HBONE, the server's ztunnel, two servers on \
         node-2; both ztunnels ours, the waypoint ours or Envoy (`connect_terminate`, internal listener with the routes, \
         `connect_originate`). Both log a line for each request. Cores: how much of the two the waypoint used; \
         all requests of the client come in one tunnel.\n",
    );
    for line in lines {
        let _ = write!(
            out,
            "\n**{}**\n\n| | requests/s | p50/p99 µs | waypoint: CPU s/100k | cores | both ztunnels: CPU s/100k | errors |\n\
             |---|---|---|---|---|---|---|\n",
            line.title
        );
        for way in &line.ways {
            let nodes = |r: &Run| {
                r.cpu_per_100k("ztunnel of the client") + r.cpu_per_100k("ztunnel of the server")
            };
            let _ = writeln!(
                out,
                "| {} | {} | {} | {} | {} | {} | {} |",
                way.title,
                text(way.spread(|r| r.number("per_second")), 0),
                quantiles(way, &["p50_us", "p99_us"]),
                text(way.spread(|r| r.cpu_per_100k("waypoint")), 2),
                text(way.spread(|r| r.cores("waypoint")), 2),
                text(way.spread(nodes), 2),
                way.errors(),
            );
        }
    }
}

/// The table that articles print.
fn article(out: &mut String, results: &HttpResults) {
    let (Some(rate), Some(closed)) = (results.line("mesh-rate"), results.line("mesh-16")) else {
        return;
    };
    out.push_str(
        "\n## The table of articles\n\nThree nodes on one machine, 100 Services beside those that are called; client and server on \
         different nodes, Service address to pod. p50 and p99 at 1000 requests/s on 16 connections; requests/s of 16 connections in a \
         closed loop. Memory: resident, of the busiest node's proxy after the loads, and of the waypoint. The servers do nothing: with an \
         application behind them the factors shrink.\n\n\
         | | p50 µs | × | p99 µs | × | requests/s | × | memory per node, MB | waypoint, MB |\n|---|---|---|---|---|---|---|---|---|\n",
    );
    let node = results.memory.iter().filter(|m| m.process.starts_with("ztunnel of node"));
    let node = node.map(|m| m.after_load_mb).fold(0.0, f64::max);
    let of = |name: &str| results.memory.iter().find(|m| m.process == name);
    for way in &rate.ways {
        let median = |line: &Line, title: &str, field: &str| {
            way_of(line, title, |r| r.number(field)).map_or(f64::NAN, |s| s.median)
        };
        let row = |line: &Line, field: &str| {
            let (own, none) = (median(line, &way.title, field), median(line, "no mesh", field));
            format!("{own:.0} | {:.2}", own / none)
        };
        let waypoint = match WAYPOINTS.iter().position(|w| *w == way.title) {
            Some(0) => of("waypoint of routed"),
            Some(_) => of("Envoy as waypoint of envoyed"),
            None => None,
        };
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {} | {} |",
            way.title,
            row(rate, "p50_us"),
            row(rate, "p99_us"),
            row(closed, "per_second"),
            if way.title == "no mesh" { "–".to_owned() } else { format!("{node:.1}") },
            waypoint.map_or_else(|| "–".to_owned(), |m| format!("{:.1}", m.after_load_mb)),
        );
    }
    out.push_str(
        "\nOthers print of themselves, on their machines and with applications: Istio ambient 1.75× p50, 1.51× p99, −5 % requests, 50 MB; \
         Cilium 1.17×, 1.13×, −2 %, 100 MB.\n",
    );
}

fn changes(out: &mut String, results: &HttpResults) {
    if results.changes.is_empty() {
        return;
    }
    out.push_str(
        "\n## From a saved route to the first request on it\n\nThe file is replaced by a rename; the client asks every half millisecond, \
         which is in the times. Ours: YAML in the folder, istiod-lite, xDS, waypoint, asked by a pod through its ztunnel; beside the changed file \
         others that stay. Envoy: a route configuration in a file that it watches, which is always whole. CPU of istiod-lite and the \
         waypoint, or of Envoy.\n\n\
         | | routes | changes | p50 ms | p99 ms | greatest | CPU ms per change | failed requests |\n|---|---|---|---|---|---|---|---|\n",
    );
    for c in &results.changes {
        let _ = writeln!(
            out,
            "| {} | {} | {} | {:.1} | {:.1} | {:.1} | {:.1} | {} |",
            c.title,
            c.routes,
            c.milliseconds.len(),
            c.quantile(0.5),
            c.quantile(0.99),
            c.quantile(1.0),
            c.cpu_ms,
            c.failed,
        );
    }
}

/// A closed loop: rates, latency and the CPU of a role.
fn requests(out: &mut String, line: &Line, role: &str) {
    let _ = write!(
        out,
        "\n**{}**\n\n| | requests/s | p50/p99 µs | CPU s/100k, {role} | CPU s/100k, machine | errors |\n|---|---|---|---|---|---|\n",
        line.title
    );
    for way in &line.ways {
        let machine = |r: &Run| r.machine_cpu_s / r.number("requests") * 1e5;
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {} | {} |",
            way.title,
            text(way.spread(|r| r.number("per_second")), 0),
            quantiles(way, &["p50_us", "p99_us"]),
            text(way.spread(|r| r.cpu_per_100k(role)), 2),
            text(way.spread(machine), 2),
            way.errors(),
        );
    }
}

/// A fixed rate: latency.
fn rate(out: &mut String, line: &Line) {
    let _ = write!(
        out,
        "\n**{}**\n\n| | p50/p99/p99.9 µs | p50 | p99 | errors |\n|---|---|---|---|---|\n",
        line.title
    );
    for way in &line.ways {
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {} |",
            way.title,
            quantiles(way, &["p50_us", "p99_us", "p999_us"]),
            text(way.spread(|r| r.number("p50_us")), 0),
            text(way.spread(|r| r.number("p99_us")), 0),
            way.errors(),
        );
    }
}

/// Medians over the rounds of several quantiles, joined by slashes.
fn quantiles(way: &super::Way, names: &[&str]) -> String {
    let median = |name: &&str| {
        way.spread(|r| r.number(name)).map_or_else(|| "–".into(), |s| format!("{:.0}", s.median))
    };
    names.iter().map(median).collect::<Vec<String>>().join("/")
}

pub(super) fn way_of(line: &Line, title: &str, value: impl Fn(&Run) -> f64) -> Option<Spread> {
    line.ways.iter().find(|w| w.title == title)?.spread(value)
}

fn memory(out: &mut String, results: &HttpResults) {
    if results.memory.is_empty() {
        return;
    }
    out.push_str(
        "\n## Memory of the proxies, resident, MB\n\nIdle: two seconds after the start; in the mesh, before the loads. The peak of `waypoint, 5000 routes` is the bench reading their YAML, which is istiod-lite's part elsewhere.\n\n\
         | work | process | idle | after load | peak |\n|---|---|---|---|---|\n",
    );
    for row in &results.memory {
        let _ = writeln!(
            out,
            "| {} | {} | {:.1} | {:.1} | {:.1} |",
            row.title, row.process, row.idle_mb, row.after_load_mb, row.peak_mb
        );
    }
}

fn missing(out: &mut String, results: &HttpResults) {
    if results.missing.is_empty() {
        return;
    }
    out.push_str("\n## Left out, or not as it came out\n\n");
    for what in &results.missing {
        let _ = writeln!(out, "* {what}");
    }
}
