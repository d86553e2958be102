//! `meshbench`: the paired benchmark. `make bench` and `make bench-quick` call it.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, Subcommand};
use meshload::bench::machine::{self, Machine};
use meshload::bench::results::Results;
use meshload::bench::suite::{self, Task};
use meshload::bench::sysctl::{self, Allowed, CONGESTION_PIN};
use meshload::bench::world::{Arm, Programs, World};
use meshload::bench::{http, memory, render, shapes, sizes};
use serde_json::Value;

/// Workloads in a configuration.
const SIZES: [u32; 3] = [10, 10_000, 100_000];
/// Starts of a proxy, for the spread.
const STARTS: usize = 5;

#[derive(Parser)]
#[command(version, about = "The same load with and without the mesh, in turns")]
struct Cli {
    #[command(subcommand)]
    mode: Mode,
}

#[derive(Subcommand)]
enum Mode {
    /// Every line; writes benches/results/DATE-COMMIT.json and benches/RESULTS.md
    Full(Options),
    /// Some lines, two short rounds; prints the page
    Quick(Options),
    /// Prints the page of a run that was measured before
    Render { json: PathBuf },
    /// The same for runs of the part `http`: what one left out, the next may have
    RenderHttp {
        #[arg(required = true)]
        json: Vec<PathBuf>,
    },
    /// Sets values in a pod's network namespace (started by this program itself)
    #[command(hide = true)]
    Sysctl { pid: i32, lab: i32, settings: Vec<String> },
}

#[derive(Args)]
struct Options {
    /// Folder with meshctl, meshload, ztunnel and istiod-lite; default: this program's
    #[arg(long)]
    programs: Option<PathBuf>,
    #[arg(long)]
    rounds: Option<u32>,
    /// Of one measurement
    #[arg(long)]
    seconds: Option<f64>,
    /// Only these lines, by id
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Only these parts of a full run
    #[arg(long, value_enum, value_delimiter = ',')]
    parts: Vec<Part>,
    /// Where results are written
    #[arg(long, default_value = "benches")]
    out: PathBuf,
}

/// What a full run consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    Memory,
    Lines,
    /// Same node, IPv6, policies, DNS, HTTP/2, churn, many pairs
    Shapes,
    Sizes,
    /// The snapshot and handshake benchmarks
    Programs,
    /// HTTP beside the real Envoy; has a page of its own, benches/HTTP.md
    Http,
}

impl Options {
    fn has(&self, part: Part) -> bool {
        self.parts.is_empty() || self.parts.contains(&part)
    }
}

fn main() -> ExitCode {
    let Err(error) = run(Cli::parse().mode) else { return ExitCode::SUCCESS };
    // Nobody is left to tell when standard error is closed.
    let _ = say(&format!("{error:#}"));
    ExitCode::FAILURE
}

fn run(mode: Mode) -> Result<()> {
    match mode {
        Mode::Full(options) => full(&options),
        Mode::Quick(options) => quick(&options),
        Mode::Render { json } => {
            let text = fs::read_to_string(&json).with_context(|| json.display().to_string())?;
            print(&render::page(&serde_json::from_str(&text)?))
        }
        Mode::RenderHttp { json } => {
            let mut all: Option<http::HttpResults> = None;
            for file in json {
                let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
                let run: http::HttpResults = serde_json::from_str(&text)?;
                match &mut all {
                    None => all = Some(run),
                    Some(all) => all.add(run),
                }
            }
            print(&all.map(|all| http::page::page(&all)).unwrap_or_default())
        }
        Mode::Sysctl { pid, lab, settings } => sysctl::set_here(pid, lab, &settings),
    }
}

fn full(options: &Options) -> Result<()> {
    let mut bench = Bench::new(options, 5, 3.0)?;
    ensure!(
        bench.results.rounds >= 5 || !options.only.is_empty(),
        "a full run has at least five rounds"
    );
    if options.has(Part::Http) {
        bench.http(options)?;
        if options.parts == [Part::Http] {
            return Ok(());
        }
    }
    if options.has(Part::Memory) {
        bench.memory()?;
    }
    if options.has(Part::Lines) {
        bench.lines(&wanted(options, |_| true))?;
    }
    if options.has(Part::Shapes) {
        bench.shapes(&options.only)?;
    }
    if options.has(Part::Sizes) {
        bench.sizes()?;
    }
    if options.has(Part::Programs) {
        bench.programs_of_their_own()?;
    }
    if !options.parts.is_empty() {
        bench
            .results
            .missing
            .push(format!("everything but {:?}: left out by --parts", options.parts));
    }
    bench.clean();
    let results = &bench.results;
    write_down(options, "", results, "RESULTS.md", &render::page(results))?;
    check_bytes(results)
}

/// Writes the raw measurements, with this behind their name, and their page.
fn write_down<T: serde::Serialize>(
    options: &Options,
    part: &str,
    results: &T,
    page: &str,
    text: &str,
) -> Result<()> {
    let folder = options.out.join("results");
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let commit = machine::commit().replace('+', "-changed");
    let file = folder.join(format!("{}-{commit}{part}.json", machine::today()));
    fs::write(&file, serde_json::to_string_pretty(results)?)
        .with_context(|| file.display().to_string())?;
    let page = options.out.join(page);
    fs::write(&page, text).with_context(|| page.display().to_string())?;
    print(&format!("{}\n{}\n", file.display(), page.display()))
}

fn quick(options: &Options) -> Result<()> {
    let mut bench = Bench::new(options, 2, 1.0)?;
    bench.lines(&wanted(options, |task| suite::QUICK.contains(&task.id)))?;
    bench.clean();
    print(&render::page(&bench.results))?;
    check_bytes(&bench.results)
}

fn wanted(options: &Options, default: impl Fn(&Task) -> bool) -> Vec<Task> {
    let all = suite::TASKS.iter().chain(suite::SUSTAINED);
    let named = |t: &Task| options.only.iter().any(|o| o == t.id);
    all.filter(|t| if options.only.is_empty() { default(t) } else { named(t) }).copied().collect()
}

fn check_bytes(results: &Results) -> Result<()> {
    let lost = results.lost_bytes();
    ensure!(lost.is_empty(), "BYTES WERE LOST on {}", lost.join(", "));
    Ok(())
}

struct Bench {
    programs: Programs,
    folder: PathBuf,
    /// Keeps the congestion control allowed.
    allowed: Option<Allowed>,
    results: Results,
}

impl Bench {
    fn new(options: &Options, rounds: u32, seconds: f64) -> Result<Self> {
        let own = std::env::current_exe()?;
        let folder = options.programs.clone().or_else(|| own.parent().map(Path::to_owned));
        let programs = Programs::in_folder(&folder.context("this program has no folder")?)?;
        let (allowed, congestion) = match Allowed::ensure() {
            Ok(allowed) => (Some(allowed), format!("{CONGESTION_PIN}, pinned")),
            Err(error) => (None, format!("NOT pinned ({error:#})")),
        };
        let size = fs::metadata(&programs.ztunnel)?.len();
        let results = Results {
            date: machine::today(),
            // Without the folder where the program lay that day.
            command: std::iter::once("meshbench".to_owned())
                .chain(std::env::args().skip(1))
                .collect::<Vec<_>>()
                .join(" "),
            commit: machine::commit(),
            machine: Machine::here(),
            congestion,
            rounds: options.rounds.unwrap_or(rounds),
            seconds: options.seconds.unwrap_or(seconds),
            lines: vec![],
            noise: vec![],
            memory: vec![],
            start_ms: vec![],
            sizes: vec![],
            shapes: vec![],
            binary_mb: f64::from(u32::try_from(size).unwrap_or(u32::MAX)) / 1e6,
            snapshot: None,
            handshakes: vec![],
            missing: vec![],
        };
        let folder = std::env::temp_dir().join(format!("meshbench-{}", std::process::id()));
        Ok(Self { programs, folder, allowed, results })
    }

    fn up(&self, name: &str) -> Result<World> {
        say(&format!("starting a mesh ({name})"))?;
        let world = World::up(&self.programs, &self.folder.join(name), name)?;
        if self.allowed.is_some() {
            world.pin_congestion()?;
        }
        Ok(world)
    }

    /// On a mesh of its own: what earlier load left behind must not count.
    fn memory(&mut self) -> Result<()> {
        let world = self.up("bench-memory")?;
        match memory::steps(&world, &[1_000, 10_000]) {
            Ok(steps) => self.results.memory = steps,
            Err(error) => {
                self.results.missing.push(format!("memory with many connections: {error:#}"))
            }
        }
        world.down()
    }

    fn lines(&mut self, tasks: &[Task]) -> Result<()> {
        let world = self.up("bench")?;
        let (rounds, seconds) = (self.results.rounds, self.results.seconds);
        for task in tasks {
            say(&format!("{}: {}", task.id, task.title))?;
            let long = suite::SUSTAINED.iter().any(|s| s.id == task.id);
            let (rounds, seconds) =
                if long { (1, suite::SUSTAINED_SECONDS) } else { (rounds, seconds) };
            match suite::paired(&world, task, rounds, seconds) {
                Ok(line) => self.results.lines.push(line),
                Err(error) => self.results.missing.push(format!("{}: {error:#}", task.id)),
            }
        }
        for task in tasks.iter().filter(|t| suite::NOISE.contains(&t.id)) {
            for arm in [Arm::Plain, Arm::Mesh] {
                say(&format!("{}: {:?} against itself", task.id, arm))?;
                match suite::against_itself(&world, task, arm, rounds, seconds) {
                    Ok(noise) => self.results.noise.push(noise),
                    Err(error) => {
                        self.results.missing.push(format!("{} against itself: {error:#}", task.id))
                    }
                }
            }
        }
        world.down()
    }

    /// Other shapes of traffic, on a mesh that has what they need.
    fn shapes(&mut self, only: &[String]) -> Result<()> {
        say("starting a mesh (bench-shapes)")?;
        let (folder, manifest) =
            (self.folder.join("bench-shapes"), shapes::manifest(&self.programs.echo_server));
        let more = ["--same-node-direct", "direct"];
        let world = World::start(&self.programs, &folder, "bench-shapes", 2, &manifest, &more)?;
        let place = shapes::Place::ready(&world)?;
        if self.allowed.is_some() {
            world.pin_congestion()?;
        }
        for shape in
            shapes::SHAPES.iter().filter(|s| only.is_empty() || only.iter().any(|o| o == s.id))
        {
            say(shape.id)?;
            match place.measure(shape, self.results.rounds, self.results.seconds) {
                Ok(measured) => self.results.shapes.push(measured),
                Err(error) => self.results.missing.push(format!("{}: {error:#}", shape.id)),
            }
        }
        world.down()
    }

    /// HTTP beside Envoy; `--only` names its lines by what they begin with.
    fn http(&mut self, options: &Options) -> Result<()> {
        let waypoint = self.programs.ztunnel.with_file_name("waypoint");
        let waypoint =
            fs::metadata(&waypoint).with_context(|| waypoint.display().to_string())?.len();
        let mut results = http::HttpResults {
            date: machine::today(),
            command: self.results.command.clone(),
            commit: self.results.commit.clone(),
            machine: self.results.machine.clone(),
            congestion: self.results.congestion.clone(),
            envoy: http::envoy::version(&http::envoy::program()?)?,
            rounds: self.results.rounds,
            seconds: self.results.seconds,
            waypoint_mb: f64::from(u32::try_from(waypoint).unwrap_or(u32::MAX)) / 1e6,
            lines: vec![],
            memory: vec![],
            changes: vec![],
            missing: vec![],
        };
        let mut has = |name: &str| {
            let wanted = options.only.is_empty() || options.only.iter().any(|o| o == name);
            if !wanted {
                results.missing.push(format!("{name}{}", http::LEFT_OUT));
            }
            wanted
        };
        let (plain, mesh, change) = (has("plain"), has("mesh"), has("change"));
        let (programs, folder) = (&self.programs, &self.folder);
        if plain {
            say("plain HTTP beside Envoy")?;
            if let Err(error) = http::plain::measure(programs, folder, &mut results) {
                results.missing.push(format!("plain: {error:#}"));
            }
        }
        if change {
            say("changes of Envoy's routes")?;
            if let Err(error) = http::change::of_envoy(programs, folder, &mut results) {
                results.missing.push(format!("changes of Envoy's routes: {error:#}"));
            }
        }
        if mesh || change {
            say("starting a mesh (bench-http)")?;
            if let Err(error) = self.http_mesh(mesh, change, &mut results) {
                results.missing.push(format!("in a mesh: {error:#}"));
            }
        }
        if results.missing.is_empty() {
            self.clean();
        }
        let page = http::page::page(&results);
        write_down(options, "-http", &results, "HTTP.md", &page)
    }

    /// What needs a mesh.
    fn http_mesh(&self, loads: bool, change: bool, results: &mut http::HttpResults) -> Result<()> {
        let place = http::mesh::Place::up(&self.programs, &self.folder)?;
        if self.allowed.is_some() {
            place.pin_congestion()?;
        }
        if loads {
            say("through waypoints")?;
            place.measure(results)?;
        }
        if change {
            say("changes of routes")?;
            http::change::ours(&place, results)?;
        }
        place.down()
    }

    /// Proxies with configurations of several sizes.
    fn sizes(&mut self) -> Result<()> {
        say("start to ready")?;
        for _ in 0..STARTS {
            match sizes::start_time(&self.programs, &self.folder) {
                Ok(time) => self.results.start_ms.push(time.as_secs_f64() * 1e3),
                Err(error) => self.results.missing.push(format!("start to ready: {error:#}")),
            }
        }
        for workloads in SIZES {
            say(&format!("{workloads} workloads"))?;
            match sizes::measure(&self.programs, &self.folder, workloads) {
                Ok(size) => self.results.sizes.push(size),
                Err(error) => {
                    self.results.missing.push(format!("{workloads} workloads: {error:#}"))
                }
            }
        }
        Ok(())
    }

    /// What needs no mesh: one change of the configuration, one handshake.
    fn programs_of_their_own(&mut self) -> Result<()> {
        self.results.snapshot = self.run("snapshot")?.pop();
        self.results.handshakes = self.run("handshake")?;
        Ok(())
    }

    /// The JSON lines that a program beside this one prints. Its exit status says whether its bar is
    /// reached; the page shows the numbers either way.
    fn run(&self, name: &str) -> Result<Vec<Value>> {
        let program = self.programs.meshload.with_file_name(name);
        say(name)?;
        let output =
            Command::new(&program).output().with_context(|| program.display().to_string())?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let lines: Result<Vec<Value>, _> = text.lines().map(serde_json::from_str).collect();
        lines.with_context(|| format!("{name} printed {text:?}"))
    }

    /// Removes the run's folder; after a failure it is worth a look, and stays.
    fn clean(&self) {
        if self.results.missing.is_empty() {
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

/// Progress, apart from the results.
fn say(text: &str) -> Result<()> {
    Ok(writeln!(io::stderr().lock(), "meshbench: {text}")?)
}

fn print(text: &str) -> Result<()> {
    Ok(io::stdout().lock().write_all(text.as_bytes())?)
}
