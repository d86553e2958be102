//! Ten thousand small meshes, each with its own misfortunes: what must hold, holds.
//!
//!     cargo test -p sim --test seeds                               # all of them
//!     AMBIT_SIM_SEEDS=4711 cargo test -p sim --test seeds          # one, with its last steps if it fails
//!     AMBIT_SIM_SEEDS=0..1000000 cargo test -p sim --release --test seeds hold

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use sim::{Bug, Counts, Fault, Options, Outcome, Violation, run};

/// What CI runs. Another range is other worlds: `AMBIT_SIM_SEEDS=10000..20000`.
const SEEDS: Range<u64> = 0..10_000;
/// Steps shown of a run that failed.
const SHOWN: usize = 60;
/// The same when that one seed was asked for.
const ALL_SHOWN: usize = 5_000;

/// `4711`, `100..200`, or [`SEEDS`].
fn seeds() -> Range<u64> {
    let Ok(text) = std::env::var("AMBIT_SIM_SEEDS") else { return SEEDS };
    let parsed = match text.split_once("..") {
        Some((from, to)) => from.parse().ok().zip(to.parse().ok()).map(|(from, to)| from..to),
        None => text.parse::<u64>().ok().map(|one| one..one + 1),
    };
    parsed.unwrap_or_else(|| panic!("AMBIT_SIM_SEEDS is {text:?}; it must be N or FROM..TO"))
}

/// Faults to leave out, as a failure names them.
fn without() -> u32 {
    let text = std::env::var("AMBIT_SIM_WITHOUT").unwrap_or_default();
    if text.is_empty() { 0 } else { text.parse().expect("AMBIT_SIM_WITHOUT is a number") }
}

/// The first seed of a range whose run fails. Runs on every core; the answer does not depend on how many.
fn first_failure(seeds: Range<u64>, options: Options) -> (Option<u64>, Counts) {
    let (next, failed) = (AtomicU64::new(seeds.start), AtomicU64::new(u64::MAX));
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let work = || {
        let mut counts = Counts::default();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            // Seeds are handed out in order: what is left is above the failure.
            if seed >= seeds.end.min(failed.load(Ordering::Relaxed)) {
                return counts;
            }
            let outcome = run(seed, options);
            counts = add(counts, outcome.counts);
            if outcome.violation.is_some() {
                failed.fetch_min(seed, Ordering::Relaxed);
            }
        }
    };
    let counts = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        let counts = threads.into_iter().map(|thread| {
            thread.join().unwrap_or_else(|panicked| std::panic::resume_unwind(panicked))
        });
        counts.fold(Counts::default(), add)
    });
    let failed = failed.into_inner();
    ((failed < u64::MAX).then_some(failed), counts)
}

fn add(a: Counts, b: Counts) -> Counts {
    Counts {
        contents: a.contents + b.contents,
        acks: a.acks + b.acks,
        calls: a.calls + b.calls,
        made: a.made + b.made,
        admitted: a.admitted + b.admitted,
        exact: a.exact + b.exact,
        denied: a.denied + b.denied,
        pending: a.pending + b.pending,
        ended: a.ended + b.ended,
        probes: a.probes + b.probes,
    }
}

/// The same failure with as few kinds of faults as it takes.
fn shrink(seed: u64, mut options: Options) -> Options {
    let violation = run(seed, options).violation;
    for fault in Fault::ALL {
        let fewer = Options { without: options.without | fault.bit(), ..options };
        if run(seed, fewer).violation == violation {
            options = fewer;
        }
    }
    options
}

/// What to tell of a failure: the seed, how to see it again, and the last steps.
fn report(seed: u64, options: Options) -> String {
    let Options { without, .. } = shrink(seed, options);
    let outcome = run(seed, Options { trace: true, without, ..options });
    let shown = if seeds().count() == 1 { ALL_SHOWN } else { SHOWN };
    let from = outcome.trace.len().saturating_sub(shown);
    let needs: Vec<_> = Fault::ALL.into_iter().filter(|f| without & f.bit() == 0).collect();
    format!(
        "seed {seed}: {:?}; it takes {needs:?} and {} steps. To see all of them:\n\n    AMBIT_SIM_SEEDS={seed} \
         AMBIT_SIM_WITHOUT={without} cargo test -p sim --test seeds what_must_hold_holds\n\n\
         the last {} lines of {}:\n{}\n",
        outcome.violation,
        outcome.steps,
        outcome.trace.len() - from,
        outcome.trace.len(),
        outcome.trace[from..].join("\n")
    )
}

#[test]
fn what_must_hold_holds() {
    let options = Options { without: without(), ..Options::default() };
    let (failed, counts) = first_failure(seeds(), options);
    println!("{counts:?}");
    if let Some(seed) = failed {
        panic!("{}", report(seed, options));
    }
}

/// The bug is found, and as what it is.
fn check_found(bug: Bug, violations: &[Violation]) -> u64 {
    let options = Options { bug: Some(bug), ..Options::default() };
    let (found, _) = first_failure(SEEDS, options);
    let seed = found.unwrap_or_else(|| panic!("{bug:?} is not found within {SEEDS:?}"));
    let violation = run(seed, options).violation;
    assert!(violation.is_some_and(|v| violations.contains(&v)), "{bug:?}: {violation:?}");
    seed
}

#[test]
fn planted_bugs_are_found() {
    use Violation::*;
    let bugs: [(Bug, &[Violation]); Bug::ALL.len()] = [
        (Bug::FallsBackToPlaintext, &[PlaintextOut]),
        (Bug::KeepsThePlan, &[PlaintextOut]),
        (Bug::TrustsAddresses, &[PlaintextIn, Denied]),
        (Bug::AllowsPending, &[Denied]),
        (Bug::NeverJudgesAgain, &[LivesOn]),
        (Bug::ForgetsTheGap, &[LivesOn]),
        (Bug::AcksUnread, &[NotEnforced]),
        (Bug::OldStream, &[Protocol, NotEnforced, NotConverged]),
        (Bug::LeaksStreams, &[NotConverged, Unbounded]),
        (Bug::NeverSweeps, &[DeadTunnel]),
        (Bug::PoolsByName, &[WrongTunnel]),
        (Bug::ForgetsFailures, &[NoCertificate, NotConverged, Unbounded]),
        (Bug::UsesExpired, &[Expired]),
        (Bug::DrainsForever, &[Undrained]),
    ];
    for bug in Bug::ALL {
        let (_, violations) = bugs.iter().find(|(b, _)| *b == bug).expect("listed");
        println!("{bug:?}: seed {}", check_found(bug, violations));
    }
}

/// A failure is told with the faults that it takes, and only these.
#[test]
fn a_failure_is_shrunk() {
    let options = Options { bug: Some(Bug::DrainsForever), ..Options::default() };
    let seed = first_failure(SEEDS, options).0.expect("found");
    let shrunk = shrink(seed, options);
    assert_eq!(shrunk.without & Fault::Replace.bit(), 0, "no drain without a replacement");
    assert_ne!(shrunk.without & Fault::Clock.bit(), 0, "clocks have nothing to do with it");
    let words = report(seed, options);
    assert!(words.contains(&format!("AMBIT_SIM_SEEDS={seed} ")), "{words}");
    assert!(words.contains("VIOLATION Undrained"), "{words}");
}

#[test]
fn a_seed_says_everything() {
    for seed in SEEDS.take(50) {
        let traced = Options { trace: true, ..Options::default() };
        let (first, second) = (run(seed, traced), run(seed, traced));
        assert_eq!(first, second, "seed {seed}");
        // Looking changes nothing.
        let untraced = run(seed, Options::default());
        assert_eq!(Outcome { trace: Vec::new(), ..first }, untraced, "seed {seed}");
    }
    assert_ne!(run(0, Options::default()).fingerprint, run(1, Options::default()).fingerprint);
}
