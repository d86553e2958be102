//! Runs tests that share one lab, one after the other, and takes the lab down at the end.
//!
//! Cargo's own runner cannot end what tests share. This one speaks its language: names as filters, `--list`, a line per
//! test, `test result:` at the end. What the lab leaves behind is a failed test of its own.

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use crate::lab::{Lab, Plan};

/// No file of tests may take longer: something hangs then, and the waits' own limits failed.
const LONGEST: Duration = Duration::from_secs(300);

/// A test on a lab.
pub type Test = fn(&Lab) -> Result<()>;

/// A test that makes its own labs.
pub type Alone = fn() -> Result<()>;

/// Runs tests that share the lab of `plan`.
pub fn run(plan: impl FnOnce() -> Result<Plan>, tests: &[(&str, Test)]) -> ExitCode {
    run_for(LONGEST, plan, tests)
}

/// The same, where the caller was asked to take longer.
pub fn run_for(
    longest: Duration,
    plan: impl FnOnce() -> Result<Plan>,
    tests: &[(&str, Test)],
) -> ExitCode {
    let names: Vec<&str> = tests.iter().map(|(name, _)| *name).collect();
    let Some(chosen) = choose(&names) else { return ExitCode::SUCCESS };
    let mut report = Report::begin(chosen.len() + usize::from(!chosen.is_empty()));
    report.left_out = tests.len() - chosen.len();
    if chosen.is_empty() {
        return report.end();
    }
    let watch = Watchdog::start(longest);
    match plan().and_then(Plan::up) {
        Ok(lab) => {
            for (name, test) in tests.iter().filter(|(name, _)| chosen.contains(name)) {
                report.test(name, || {
                    let result = test(&lab);
                    let result = result.map_err(|e| anyhow!("{e:#}{}", lab.last_words()));
                    lab.restore()?;
                    result
                });
            }
            report.test("nothing_is_left_of_the_lab", || lab.down());
        }
        Err(e) => {
            let text = format!("{e:#}");
            for name in chosen {
                report.test(name, || Err(anyhow!("{text}")));
            }
        }
    }
    watch.stop();
    report.end()
}

/// Runs tests that make their own labs.
pub fn run_alone(tests: &[(&str, Alone)]) -> ExitCode {
    let names: Vec<&str> = tests.iter().map(|(name, _)| *name).collect();
    let Some(chosen) = choose(&names) else { return ExitCode::SUCCESS };
    let mut report = Report::begin(chosen.len());
    report.left_out = tests.len() - chosen.len();
    let watch = Watchdog::start(LONGEST);
    for (name, test) in tests.iter().filter(|(name, _)| chosen.contains(name)) {
        report.test(name, test);
    }
    watch.stop();
    report.end()
}

/// The tests that the command line asks for; nothing when it only asks for a list.
fn choose<'a>(names: &[&'a str]) -> Option<Vec<&'a str>> {
    let mut args = std::env::args().skip(1);
    let (mut filters, mut skipped, mut exact, mut list, mut ignored) =
        (vec![], vec![], false, false, false);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--list" => list = true,
            "--exact" => exact = true,
            "--ignored" => ignored = true,
            "--skip" => skipped.extend(args.next()),
            "--test-threads" | "--format" | "--color" | "-Z" => drop(args.next()),
            flag if flag.starts_with('-') => {}
            _ => filters.push(arg),
        }
    }
    let matches =
        |name: &str, f: &String| if exact { name == f } else { name.contains(f.as_str()) };
    let wanted = |name: &&&str| {
        !ignored
            && (filters.is_empty() || filters.iter().any(|f| matches(name, f)))
            && !skipped.iter().any(|f| matches(name, f))
    };
    let chosen: Vec<&str> = names.iter().filter(wanted).copied().collect();
    if list {
        chosen.iter().for_each(|name| say(&format!("{name}: test\n")));
        return None;
    }
    Some(chosen)
}

/// A figure that a test measured, beside its result.
pub fn measured(text: &str) {
    say(&format!("({text}) "));
}

struct Report {
    began: Instant,
    passed: usize,
    left_out: usize,
    failures: Vec<(String, String)>,
}

impl Report {
    fn begin(count: usize) -> Self {
        say(&format!("\nrunning {count} tests\n"));
        Self { began: Instant::now(), passed: 0, left_out: 0, failures: vec![] }
    }

    fn test(&mut self, name: &str, test: impl FnOnce() -> Result<()>) {
        say(&format!("test {name} ... "));
        let began = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(test)).unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|t| (*t).to_owned()));
            Err(anyhow!("panicked: {}", text.unwrap_or_default()))
        });
        let took = began.elapsed().as_secs_f64();
        match result {
            Ok(()) => {
                self.passed += 1;
                say(&format!("ok ({took:.2} s)\n"));
            }
            Err(e) => {
                say(&format!("FAILED ({took:.2} s)\n"));
                self.failures.push((name.to_owned(), format!("{e:#}")));
            }
        }
    }

    fn end(self) -> ExitCode {
        for (name, why) in &self.failures {
            say(&format!("\n---- {name} ----\n{why}\n"));
        }
        let word = if self.failures.is_empty() { "ok" } else { "FAILED" };
        say(&format!(
            "\ntest result: {word}. {} passed; {} failed; 0 ignored; 0 measured; {} filtered out; finished in {:.2}s\n\n",
            self.passed,
            self.failures.len(),
            self.left_out,
            self.began.elapsed().as_secs_f64()
        ));
        if self.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

/// Ends the process when everything takes too long; the lab ends with it.
struct Watchdog(Arc<AtomicBool>);

impl Watchdog {
    fn start(longest: Duration) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let flag = over.clone();
        std::thread::spawn(move || {
            std::thread::sleep(longest);
            if !flag.load(Ordering::Relaxed) {
                say(&format!(
                    "\nnot done after {longest:?}: giving up\ntest result: FAILED. 0 passed; 1 failed\n"
                ));
                std::process::exit(101);
            }
        });
        Self(over)
    }

    fn stop(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn say(text: &str) {
    let mut out = std::io::stdout();
    // Nobody is left to tell when standard output is closed.
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
