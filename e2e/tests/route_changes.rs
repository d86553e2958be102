//! A route that is rewritten again and again under load: no request fails, and each save is in effect at once. With five
//! thousand other routes in the folder, too.
//!
//! One client asks all the time and notes which answer is the first from the other version. The time from a save to that
//! answer is what a user waits for: the file, the control plane, the push, the waypoint and one request.
//!
//! `AMBIT_ROUTE_SECONDS=600` takes as long, `AMBIT_ROUTE_STRICT=1` holds optimized programs to our bars, and
//! `AMBIT_ROUTE_REPORT=FILE` adds the figures to a page: `make routes-soak`.

use std::fmt::Write as _;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::suite::{self, Test};
use e2e::{Background, Lab, Plan, wait_for, wait_until, yaml};
use nix::time::{ClockId, clock_gettime};
use serde_json::Value;

const TESTS: &[(&str, Test)] =
    &[("changes_under_load_fail_no_request", few), ("among_five_thousand_routes", many)];
/// How long each test rewrites its route.
const SECONDS: u64 = 8;
/// From one save to the next.
const EVERY: Duration = Duration::from_millis(200);
/// What users are promised. The bar is stricter, and for optimized programs on a machine that does nothing else.
const PROMISED: Duration = Duration::from_secs(1);
const BAR: Duration = Duration::from_millis(30);
/// Among five thousand, where the control plane compiles them all for each change: unoptimized, and beside other tests.
const AMONG_MANY: Duration = Duration::from_secs(10);
/// For the first change among many routes to arrive: unoptimized programs read them all at the start.
const FIRST: Duration = Duration::from_secs(60);
/// For loads to end.
const SOON: Duration = Duration::from_secs(20);
const ROUTES: usize = 5_000;
/// Routes of one file: it stays below the limit of files, 1 MiB.
const PER_FILE: usize = 1_000;
/// Resident megabytes of a waypoint that holds [`ROUTES`]; unoptimized programs are larger.
const BAR_MB: f64 = 40.0;
const MOST_MB: f64 = 64.0;
/// Of istiod-lite: each version of the routes takes some megabytes, and only one may be there.
const CONTROL_MB: f64 = 200.0;
/// How much longer than the saves the clients ask: for the last save to take effect.
const SLACK: Duration = Duration::from_secs(6);
/// Bytes in the answers of the two versions.
const LENGTHS: [usize; 2] = [128, 256];
/// Requests a second beside the one that watches.
const RATE: &str = "400";

fn main() -> ExitCode {
    // Both tests, a lab that comes and goes, and the routes to be read.
    let longest = Duration::from_secs(300 + 2 * seconds().unwrap_or(SECONDS));
    suite::run_for(longest, plan, TESTS)
}

fn seconds() -> Result<u64> {
    number("AMBIT_ROUTE_SECONDS").map(|n| n.unwrap_or(SECONDS))
}

fn strict() -> bool {
    std::env::var_os("AMBIT_ROUTE_STRICT").is_some()
}

fn number(variable: &str) -> Result<Option<u64>> {
    let Ok(text) = std::env::var(variable) else { return Ok(None) };
    Ok(Some(text.parse().with_context(|| format!("{variable} is not a number: {text:?}"))?))
}

fn plan() -> Result<Plan> {
    let server = |number: usize| {
        let (name, length) = (format!("web-v{number}"), LENGTHS[number - 1].to_string());
        let node = if number == 1 { 1 } else { 2 };
        yaml::pod("shop", &name, node)
            .image("meshload", &["serve", "--listen", "[::]:8080", "--body", &length])
            .label("part-of", "web")
            .ready_on(8080)
            .yaml()
    };
    let service = |name: &str, selector: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec: {{selector: {{{selector}}}, ports: [{{name: http, port: 80, targetPort: 8080}}]}}\n"
        )
    };
    let objects = [
        yaml::pod("shop", "client", 1).image("meshload", &["pause"]).yaml(),
        yaml::pod("shop", "load", 2).image("meshload", &["pause"]).yaml(),
        server(1),
        server(2),
        service("web", "part-of: web"),
        service("web-v1", "app: web-v1"),
        service("web-v2", "app: web-v2"),
    ];
    let namespace = "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: shop\n  labels: {istio.io/dataplane-mode: ambient, \
                     istio.io/use-waypoint: waypoint}\n---\napiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: \
                     {name: waypoint, namespace: shop}\nspec:\n  gatewayClassName: istio-waypoint\n  listeners: [{name: mesh, \
                     port: 15008, protocol: HBONE}]\n";
    Ok(Plan::new()
        .file("00-shop.yaml", namespace)
        .file("route.yaml", route(1))
        .file("shop.yaml", yaml::join(&objects)))
}

/// Sends every request to `web` to one version.
fn route(version: usize) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: web, namespace: shop}}\nspec:\n  parentRefs: \
         [{{group: '', kind: Service, name: web}}]\n  rules:\n  - backendRefs: [{{name: web-v{version}, port: 80}}]\n"
    )
}

/// A route for a path of its own, to version 2.
fn other(number: usize) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: other-{number}, namespace: shop}}\nspec:\n  \
         parentRefs: [{{group: '', kind: Service, name: web}}]\n  rules:\n  - matches: [{{path: {{value: /other/{number}}}}}]\n    \
         backendRefs: [{{name: web-v2, port: 80}}]\n"
    )
}

fn few(lab: &Lab) -> Result<()> {
    let changes = change(lab, Duration::from_secs(seconds()?))?;
    changes.judge("alone", if strict() { BAR } else { PROMISED })
}

fn many(lab: &Lab) -> Result<()> {
    let all: Vec<String> = (0..ROUTES).map(other).collect();
    for (number, some) in all.chunks(PER_FILE).enumerate() {
        lab.write(&format!("others-{number}.yaml"), &yaml::join(some))?;
    }
    let last = format!("http://web/other/{}", ROUTES - 1);
    let ask = |url: &str| -> Result<usize> {
        Ok(lab.exec("shop/client", &["/image/meshload", "get", url])?.out.len())
    };
    wait_until("the routes to be in force", FIRST, || {
        Ok([ask("http://web/")?, ask(&last)?] == LENGTHS)
    })?;
    let changes = change(lab, Duration::from_secs(seconds()?))?;
    let (megabytes, control) = (resident(lab, "waypoint")?, resident(lab, "istiod-lite")?);
    let case = format!(
        "among {ROUTES} others, the waypoint at {megabytes:.1} MB, istiod-lite at {control:.1} MB"
    );
    changes.judge(&case, AMONG_MANY)?;
    let most = if strict() { BAR_MB } else { MOST_MB };
    ensure!(megabytes <= most, "the waypoint holds {megabytes:.1} MB, more than {most}");
    ensure!(
        control <= CONTROL_MB,
        "istiod-lite holds {control:.1} MB, more than {CONTROL_MB}: is what was changed kept?"
    );
    Ok(())
}

/// What a rewritten route did.
struct Changes {
    /// From each save to the first answer by the new route.
    took: Vec<Duration>,
    /// Requests of all clients; none failed.
    requests: u64,
}

/// Rewrites the route for this long, under load.
fn change(lab: &Lab, time: Duration) -> Result<Changes> {
    // What is under way before the first save and after the last one belongs to neither.
    let whole = (time + SLACK).as_secs().to_string();
    let load = ["rate", "-n", "8", "--rate", RATE, "-d", &whole, "--to", "web:80"];
    let mut load = start(lab, "shop/load", &load)?;
    let mut watch = start(lab, "shop/client", &["watch", "http://web/", "-d", &whole])?;
    wait_until("the first answer", FIRST, || Ok(seen(&watch)?.len() == 1))?;
    let (began, mut took, mut version) = (Instant::now(), vec![], 1);
    while began.elapsed() < time {
        let next = Instant::now() + EVERY;
        version = 3 - version;
        let before = seen(&watch)?.len();
        let saved = monotonic()?;
        lab.write("route.yaml", &route(version))?;
        let limit = if took.is_empty() { FIRST } else { SOON };
        let change = wait_for("the route to take effect", limit, || {
            ensure!(watch.is_running()?, "{} {}", watch.out(), watch.err());
            Ok(seen(&watch)?.get(before).copied())
        })?;
        ensure!(
            change.length == LENGTHS[version - 1],
            "{} bytes of version {version}",
            change.length
        );
        took.push(change.answered.saturating_sub(saved));
        // Saves come at a pace, however fast the last one was.
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    let requests = answered(&mut load)? + answered(&mut watch)?;
    let changes = seen(&watch)?.len();
    ensure!(
        changes == took.len() + 1,
        "{changes} changes by {} saves: some answer was old",
        took.len()
    );
    Ok(Changes { took, requests })
}

impl Changes {
    /// `case`: for the report.
    fn judge(mut self, case: &str, bar: Duration) -> Result<()> {
        self.took.sort_unstable();
        let [p50, p99, most] = [50, 99, 100].map(|percent| quantile(&self.took, percent));
        let milliseconds = |d: Duration| d.as_secs_f64() * 1e3;
        let text = format!(
            "{case}: {} saves: p50 {:.1} ms, p99 {:.1} ms, at most {:.1} ms; {} requests, none failed",
            self.took.len(),
            milliseconds(p50),
            milliseconds(p99),
            milliseconds(most),
            self.requests
        );
        suite::measured(&text);
        report(&format!("* {text}\n"))?;
        ensure!(p99 <= bar, "{text}; the bar for p99 is {bar:?}");
        Ok(())
    }
}

/// Of a sorted list that is not empty.
fn quantile(sorted: &[Duration], percent: usize) -> Duration {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted[rank.clamp(1, sorted.len()) - 1]
}

/// A change that the watching client saw.
#[derive(Clone, Copy)]
struct Seen {
    /// Since the machine's start.
    answered: Duration,
    length: usize,
}

/// The changes so far, the first answer among them.
fn seen(watch: &Background) -> Result<Vec<Seen>> {
    let out = watch.out();
    // The last line may be half there.
    let whole = out.rfind('\n').map_or("", |end| &out[..end]);
    let lines = whole.lines().filter(|line| line.contains("\"change\""));
    let read = |line: &str| {
        let value: Value = serde_json::from_str(line)?;
        let answered = value["answered_us"].as_u64().context("no time")?;
        ensure!(value["failed"] == 0, "{value}");
        let length = value["value"].as_str().context("no value")?.parse()?;
        Ok(Seen { answered: Duration::from_micros(answered), length })
    };
    lines.map(read).collect()
}

fn start(lab: &Lab, pod: &str, args: &[&str]) -> Result<Background> {
    let argv: Vec<&str> = std::iter::once("/image/meshload").chain(args.iter().copied()).collect();
    lab.exec_in_background(pod, &argv)
}

/// Waits for the end of a load, and counts its answers: there must be no error.
fn answered(load: &mut Background) -> Result<u64> {
    wait_until("the load to end", SOON, || Ok(!load.is_running()?))?;
    let out = load.out();
    let last = out.lines().last().filter(|line| line.contains("\"result\""));
    let result: Value =
        serde_json::from_str(last.with_context(|| format!("{out} {}", load.err()))?)?;
    let errors = result["errors"].as_object().is_some_and(|e| !e.is_empty())
        || result["failed"].as_u64().is_some_and(|failed| failed > 0);
    let requests = result["requests"].as_u64().unwrap_or_default();
    ensure!(!errors && requests > 0, "{result}");
    Ok(requests)
}

fn monotonic() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_MONOTONIC)?.into())
}

/// Megabytes that the process of this name holds.
fn resident(lab: &Lab, name: &str) -> Result<f64> {
    let found = lab.exec("node-1", &["pgrep", "-x", name])?.out;
    let pid = found.lines().next().with_context(|| format!("no process is called {name}"))?;
    let status = lab.exec("node-1", &["cat", &format!("/proc/{pid}/status")])?.out;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kilobytes: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kilobytes / 1024.0)
}

/// Adds to the page, where one was asked for.
fn report(text: &str) -> Result<()> {
    let Ok(path) = std::env::var("AMBIT_ROUTE_REPORT") else { return Ok(()) };
    let mut page = std::fs::read_to_string(&path).unwrap_or_default();
    write!(page, "{text}")?;
    std::fs::write(&path, page).with_context(|| path)
}
