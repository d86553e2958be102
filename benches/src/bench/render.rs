//! `benches/RESULTS.md`: what came out of a run, as it came out.

use std::fmt::Write as _;

use super::bars::{self, Bar, window_rates};
use super::results::{Kind, Line, Noise, Results, Sample};
use super::stats::{Spread, text};
use super::world::Arm;

/// The page. Writing to a String cannot fail, so results of `write!` are dropped throughout.
pub fn page(results: &Results) -> String {
    let mut out = String::new();
    head(&mut out, results);
    bars_table(&mut out, results);
    floors(&mut out, results);
    bulk(&mut out, results);
    requests(&mut out, results);
    connections(&mut out, results);
    sustained(&mut out, results);
    noise(&mut out, results);
    shapes(&mut out, results);
    memory(&mut out, results);
    sizes(&mut out, results);
    handshakes(&mut out, results);
    snapshot(&mut out, results);
    missing(&mut out, results);
    out
}

fn head(out: &mut String, results: &Results) {
    let machine = &results.machine;
    let steal: f64 = results.lines.iter().flat_map(|l| &l.samples).map(|s| s.steal_s).sum();
    let _ = write!(
        out,
        "# Results\n\nWritten by `{}` on {}, commit {}; the raw measurements are beside this page in \
         `results/`. Nothing was left out or repeated.\n\n\
         * Machine: {}, {} cores, {} GB; kernel {}; {}; {}.\n\
         * Everything (client, server, both proxies) shares these cores. Carry CPU seconds per unit and ratios to other \
         machines, not rates. The bars were taken from stock ztunnel on two cores of a Sapphire Rapids Xeon.\n\
         * Paired: no mesh and mesh in turns, {} rounds of {} s, the order changing; median (least–greatest); ratios are \
         taken round by round. Client on node-1, server on node-2, pod address to pod address, two network namespaces \
         for nodes joined by a bridge.\n\
         * Congestion control in the pods: {} (this machine's default: {}). Logs and metrics as shipped: one access log \
         line for each connection.\n\
         * CPU of the proxies from `/proc/PID/stat`, between the marks that the client prints; the machine's from \
         `/proc/stat` without idle and steal. Steal over all lines: {steal:.2} s.\n",
        results.command,
        results.date,
        results.commit,
        machine.processor,
        machine.cores,
        machine.memory_gb,
        machine.kernel,
        machine.system,
        machine.compiler,
        results.rounds,
        results.seconds,
        results.congestion,
        machine.congestion_default,
    );
}

fn bars_table(out: &mut String, results: &Results) {
    out.push_str("\n## Bars\n\n| line | measured | no worse from the start | | where to go | |\n|---|---|---|---|---|---|\n");
    for bar in bars::all(results) {
        let Bar { digits, .. } = bar;
        let sign = if bar.higher_is_better { '≥' } else { '≤' };
        let word = |reached: Option<bool>| match reached {
            Some(true) => "reached",
            Some(false) => "**not reached**",
            None => "not measured",
        };
        let measured = bar.measured.map_or_else(|| "–".to_owned(), |m| format!("{m:.digits$}"));
        let _ = writeln!(
            out,
            "| {} | {measured} | {sign} {:.digits$} | {} | {sign} {:.digits$} | {} |",
            bar.line,
            bar.start,
            word(bar.reached()),
            bar.target,
            word(bar.target_reached()),
        );
    }
    out.push_str("\nWhere the rest of what is not reached goes: [PROFILE.md](PROFILE.md). The waypoint beside Envoy: [HTTP.md](HTTP.md).\n");
}

/// What the machine itself charges: the part of a bar that no program can change.
fn floors(out: &mut String, results: &Results) {
    let rows = bars::floors(results);
    if rows.iter().all(|row| row.relay_here.is_none()) {
        return;
    }
    out.push_str(
        "\n## Against a relay that only copies\n\nTwo relays (one thread, epoll, 64 KiB, no TLS) in the same pods, in turns with the \
         others: what any proxy in user space pays here for the same bytes. The last two columns can be compared across \
         machines, absolute seconds cannot. CPU of both processes in between.\n\n\
         | | copying relay, here | mesh, here | copying relay, where the bars are from | stock there | mesh ÷ relay, here | stock ÷ \
         relay, there |\n|---|---|---|---|---|---|---|\n",
    );
    for row in rows {
        let multiple = match (row.mesh_here, row.relay_here) {
            (Some(mesh), Some(relay)) => format!("{:.2}", mesh.median / relay.median),
            _ => "–".to_owned(),
        };
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {} | {multiple} | {:.2} |",
            row.line,
            text(row.relay_here, 2),
            text(row.mesh_here, 2),
            row.relay_there,
            row.stock_there,
            row.stock_there / row.relay_there,
        );
    }
}

fn of_kind(results: &Results, kind: Kind) -> Vec<&Line> {
    results.lines.iter().filter(|l| l.kind == kind).collect()
}

fn errors(line: &Line) -> String {
    match line.errors() {
        0 => "0".to_owned(),
        many => format!("**{many}**"),
    }
}

fn bulk(out: &mut String, results: &Results) {
    let lines = of_kind(results, Kind::Bulk);
    if lines.is_empty() {
        return;
    }
    out.push_str(
        "\n## Bulk\n\nEvery byte is counted at the sender and at the sink.\n\n\
         | | no mesh Gbit/s | mesh Gbit/s | ratio | proxy CPU s/GB, both nodes | machine CPU s/GB, mesh | no mesh | bytes |\n\
         |---|---|---|---|---|---|---|---|\n",
    );
    for line in lines {
        let lost = line.samples.iter().any(Sample::lost_bytes);
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {} | {} | {} | {} |",
            line.title,
            text(line.spread(Arm::Plain, Sample::rate), 2),
            text(line.spread(Arm::Mesh, Sample::rate), 2),
            text(line.ratio(Sample::rate), 3),
            text(line.spread(Arm::Mesh, Sample::proxy_cpu_per_unit), 3),
            text(line.spread(Arm::Mesh, Sample::machine_cpu_per_unit), 3),
            text(line.spread(Arm::Plain, Sample::machine_cpu_per_unit), 3),
            if lost { "**LOST**" } else { "all arrived" },
        );
    }
}

fn requests(out: &mut String, results: &Results) {
    let lines = of_kind(results, Kind::Requests);
    if !lines.is_empty() {
        out.push_str(
            "\n## Small requests\n\nHTTP/1.1 with keep-alive, closed loop, 128 bytes of body.\n\n\
             | | no mesh /s | mesh /s | ratio | p50/p99 µs no mesh | mesh | proxy CPU s/100k, both nodes | machine CPU s/100k, \
             mesh | no mesh | errors |\n|---|---|---|---|---|---|---|---|---|---|\n",
        );
    }
    for line in lines {
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            line.title,
            text(line.spread(Arm::Plain, Sample::rate), 0),
            text(line.spread(Arm::Mesh, Sample::rate), 0),
            text(line.ratio(Sample::rate), 3),
            quantiles(line, Arm::Plain, &["p50_us", "p99_us"]),
            quantiles(line, Arm::Mesh, &["p50_us", "p99_us"]),
            text(line.spread(Arm::Mesh, Sample::proxy_cpu_per_unit), 2),
            text(line.spread(Arm::Mesh, Sample::machine_cpu_per_unit), 2),
            text(line.spread(Arm::Plain, Sample::machine_cpu_per_unit), 2),
            errors(line),
        );
    }
    fixed_rate(out, results);
}

fn fixed_rate(out: &mut String, results: &Results) {
    let lines = of_kind(results, Kind::Rate);
    if lines.is_empty() {
        return;
    }
    out.push_str(
        "\n## Fixed rate\n\nLatency from the moment a request was due, so that a stall shows in every request it made late.\n\n\
         | | no mesh p50/p99/p99.9 µs | mesh | added p50 | added p99 | ranges in the mesh: p50; p99; p99.9 | errors |\n\
         |---|---|---|---|---|---|---|\n",
    );
    let added =
        |q: &str| bars::added(results, q).map_or_else(|| "–".to_owned(), |v| format!("{v:+.0}"));
    for line in lines {
        let names = ["p50_us", "p99_us", "p999_us"];
        let ranges: Vec<String> =
            names.iter().map(|q| text(line.spread(Arm::Mesh, |s| s.number(q)), 0)).collect();
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {} | {} | {} |",
            line.title,
            quantiles(line, Arm::Plain, &names),
            quantiles(line, Arm::Mesh, &names),
            added("p50_us"),
            added("p99_us"),
            ranges.join("; "),
            errors(line),
        );
        if line.spread(Arm::Relay, |s| s.number("p50_us")).is_some() {
            let _ = writeln!(
                out,
                "\nThrough two copying relays: p50/p99/p99.9 {} µs.",
                quantiles(line, Arm::Relay, &names)
            );
        }
    }
}

/// Medians over the rounds of several quantiles, joined by slashes.
fn quantiles(line: &Line, arm: Arm, names: &[&str]) -> String {
    let median = |name: &&str| {
        line.spread(arm, |s| s.number(name))
            .map_or_else(|| "–".into(), |s| format!("{:.0}", s.median))
    };
    names.iter().map(median).collect::<Vec<String>>().join("/")
}

fn connections(out: &mut String, results: &Results) {
    let lines = of_kind(results, Kind::Connections);
    if lines.is_empty() {
        return;
    }
    out.push_str(
        "\n## New connections\n\nOne connection for each request; the client closes; at most 2048 sockets in TIME_WAIT \
         (`tcp_max_tw_buckets` in the pods), so that the search for a free port is not what is measured.\n\n\
         | | no mesh /s | mesh /s | ratio | p50/p99 µs mesh | proxy CPU s/100k, both nodes | machine CPU s/100k, mesh | no mesh \
         | errors |\n|---|---|---|---|---|---|---|---|---|\n",
    );
    for line in lines {
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            line.title,
            text(line.spread(Arm::Plain, Sample::rate), 0),
            text(line.spread(Arm::Mesh, Sample::rate), 0),
            text(line.ratio(Sample::rate), 3),
            quantiles(line, Arm::Mesh, &["p50_us", "p99_us"]),
            text(line.spread(Arm::Mesh, Sample::proxy_cpu_per_unit), 2),
            text(line.spread(Arm::Mesh, Sample::machine_cpu_per_unit), 2),
            text(line.spread(Arm::Plain, Sample::machine_cpu_per_unit), 2),
            errors(line),
        );
    }
}

fn sustained(out: &mut String, results: &Results) {
    let lines = of_kind(results, Kind::Sustained);
    if lines.is_empty() {
        return;
    }
    out.push_str(
        "\n## Sustained rate of new connections\n\nOne client pod to one server pod, 16 at a time, default port range; \
         connections/s in consecutive windows of 2 s.\n\n| | | windows | errors |\n|---|---|---|---|\n",
    );
    for sample in lines.iter().flat_map(|l| l.samples.iter().map(move |s| (l, s))) {
        let (line, sample) = sample;
        let rates: Vec<String> =
            window_rates(&sample.result).iter().map(|r| format!("{r:.0}")).collect();
        let arm = if sample.arm == Arm::Mesh { "mesh" } else { "no mesh" };
        let errors = if sample.errors() == 0 {
            "0".to_owned()
        } else {
            format!("**{}**", sample.result["errors"])
        };
        let _ = writeln!(out, "| {} | {arm} | {} | {errors} |", line.title, rates.join(" "));
    }
}

fn noise(out: &mut String, results: &Results) {
    if results.noise.is_empty() {
        return;
    }
    out.push_str(
        "\n## Noise floor\n\nThe same arm against itself, by the same method. A difference within these ranges is none.\n\n\
         | | arm | ratio of rates | ratio of CPU per unit |\n|---|---|---|---|\n",
    );
    for noise in &results.noise {
        let (arm, cost): (_, fn(&Sample) -> f64) = match noise.arm {
            Arm::Plain => ("no mesh (machine CPU)", Sample::machine_cpu_per_unit),
            Arm::Mesh => ("mesh (proxy CPU)", Sample::proxy_cpu_per_unit),
            Arm::Relay => ("copying relays (their CPU)", Sample::proxy_cpu_per_unit),
        };
        let _ = writeln!(
            out,
            "| {} | {arm} | {} | {} |",
            noise.title,
            text(self_ratio(noise, Sample::rate), 3),
            text(self_ratio(noise, cost), 3),
        );
    }
}

fn self_ratio(noise: &Noise, value: impl Fn(&Sample) -> f64) -> Option<Spread> {
    Spread::of(noise.pairs.iter().map(|(first, second)| value(second) / value(first)))
}

fn shapes(out: &mut String, results: &Results) {
    if results.shapes.is_empty() {
        return;
    }
    out.push_str(
        "\n## Other shapes\n\nThe ways of each shape in turns, the order changing. CPU of both nodes' proxies, in seconds for each GB, or for \
         each 100,000 requests, connections or questions. `near` ends are on one node: \"joined\" is `--same-node-direct`. HTTP/2 by \
         nghttp2's own client and server, gRPC by its client and the echo server, CPU read around the whole client. Under churn another client opens one connection after \
         the other. The hundred clients are processes of their own, started together: \
         of one pod, or of a hundred that call a hundred servers, a tunnel each.\n\n\
         | shape | way | Gbit/s or 1/s | proxy CPU s | p50/p99/p99.9 µs | errors |\n|---|---|---|---|---|---|\n",
    );
    for shape in &results.shapes {
        for way in &shape.ways {
            let spread = |value: fn(&Sample) -> f64| Spread::of(way.samples.iter().map(value));
            let digits = if shape.kind == Kind::Bulk { 2 } else { 0 };
            let quantile = |name: &str| {
                Spread::of(way.samples.iter().map(|s| s.number(name)))
                    .map_or_else(|| "–".to_owned(), |s| format!("{:.0}", s.median))
            };
            let _ = writeln!(
                out,
                "| {} | {} | {} | {} | {} | {} |",
                shape.title,
                way.title,
                text(spread(Sample::rate), digits),
                text(spread(Sample::proxy_cpu_per_unit), 2),
                ["p50_us", "p99_us", "p999_us"].map(quantile).join("/"),
                way.samples.iter().map(Sample::errors).sum::<u64>(),
            );
        }
    }
}

fn memory(out: &mut String, results: &Results) {
    if results.memory.is_empty() {
        return;
    }
    out.push_str("\n## Memory of the proxies, MB\n\nResident (anonymous part; peak so far), each node.\n\n| | node-1 | node-2 |\n|---|---|---|\n");
    for step in &results.memory {
        let node =
            |i: usize| match (step.rss_mb.get(i), step.anonymous_mb.get(i), step.peak_mb.get(i)) {
                (Some(rss), Some(anonymous), Some(peak)) => {
                    format!("{rss:.1} ({anonymous:.1}; {peak:.1})")
                }
                _ => "–".to_owned(),
            };
        let _ = writeln!(out, "| {} | {} | {} |", step.title, node(0), node(1));
    }
}

fn sizes(out: &mut String, results: &Results) {
    if let Some(start) = Spread::of(results.start_ms.iter().copied()) {
        let count = results.start_ms.len();
        let _ = write!(
            out,
            "\n## Start and size\n\nStart to ready, 10 workloads, {count} starts: {} ms. Real istiod-lite over xDS, all on \
             loopback, no pods on the node; workloads of 100 other nodes, ten to a Service. Memory at ready + 3 s; then \
             changes of one workload each.\n",
            start.text(0),
        );
    }
    if results.sizes.is_empty() {
        return;
    }
    out.push_str(
        "\n| workloads | start to ready ms | CPU s to ready | RSS MB | peak | RSS after changes | proxy CPU ms per change | \
         control plane CPU ms per change | control plane RSS MB |\n|---|---|---|---|---|---|---|---|---|\n",
    );
    for size in &results.sizes {
        let _ = writeln!(
            out,
            "| {} | {:.0} | {:.2} | {:.1} | {:.1} | {:.1} | {:.2} | {:.1} | {:.0} |",
            size.workloads,
            size.ready_ms,
            size.cpu_s_to_ready,
            size.rss_mb,
            size.peak_mb,
            size.rss_after_changes_mb,
            size.proxy_cpu_ms_per_change,
            size.control_plane_cpu_ms_per_change,
            size.control_plane_rss_mb,
        );
    }
}

fn handshakes(out: &mut String, results: &Results) {
    if results.handshakes.is_empty() {
        return;
    }
    out.push_str(
        "\n## A new tunnel\n\nmTLS and HTTP/2 set-up with one CONNECT, over loopback in one thread, the cost of a bare TCP \
         connection taken off; not through the whole proxies, as stock's 1.1 ms was.\n\n\
         | at a time | CPU of both ends, ms: median (least–greatest) |\n|---|---|\n",
    );
    for row in &results.handshakes {
        let number = |field: &str| row[field].as_f64().unwrap_or(f64::NAN);
        let spread = Spread {
            median: number("cpu_ms_median"),
            min: number("cpu_ms_min"),
            max: number("cpu_ms_max"),
        };
        let _ = writeln!(out, "| {} | {} |", row["at_a_time"], spread.text(3));
    }
}

fn snapshot(out: &mut String, results: &Results) {
    let Some(s) = &results.snapshot else { return };
    out.push_str("\n## One change among 100,000 workloads\n\n`Snapshot::with` of one endpoint, 2,000 changes; bar: 1 ms and 1 MB.\n\n");
    let _ = writeln!(
        out,
        "| | p50 µs | p99 µs | greatest µs | bytes, mean | bytes, greatest |\n|---|---|---|---|---|---|"
    );
    for (title, key) in
        [("Service of 10 endpoints", "service_of_10"), ("Service of 10,000", "service_of_10000")]
    {
        let (row, time) = (&s[key], &s[key]["time"]);
        let number = |value: &serde_json::Value| {
            value.as_f64().map_or_else(|| "–".to_owned(), |v| format!("{v:.0}"))
        };
        let _ = writeln!(
            out,
            "| {title} | {} | {} | {} | {} | {} |",
            number(&time["p50_us"]),
            number(&time["p99_us"]),
            number(&time["max_us"]),
            number(&row["bytes_mean"]),
            number(&row["bytes_max"]),
        );
    }
    let _ = writeln!(
        out,
        "\nThe whole snapshot: {} bytes for each workload, built in {:.2} s.",
        s["snapshot_bytes_per_workload"],
        s["build_seconds"].as_f64().unwrap_or(f64::NAN),
    );
}

fn missing(out: &mut String, results: &Results) {
    if results.missing.is_empty() {
        return;
    }
    out.push_str("\n## Not measured\n\n");
    for what in &results.missing {
        let _ = writeln!(out, "* {what}");
    }
}
