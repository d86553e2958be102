//! The end-to-end harness: labs from YAML, commands in pods, the wire between nodes, and proof that nothing is left.
//!
//! Purpose: the tests and the demo say what they do and expect; this crate starts, waits, asks and cleans up.
//!
//! Invariants:
//! - Nothing sleeps to get green: every wait is for a condition, has a limit, and says what it waited for.
//! - A missing program is an error that names the package, never a skipped test.
//! - A lab ends with its test, however that ends; what it leaves behind fails the test.

pub mod access_log;
pub mod authority;
pub mod collector;
pub mod command;
pub mod envoy;
pub mod lab;
pub mod leftovers;
pub mod programs;
pub mod status;
pub mod stock;
pub mod suite;
pub mod wire;
pub mod yaml;

pub use command::{Background, Ran};
pub use lab::{Lab, Plan};

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Between two looks at a condition.
const LOOK_EVERY: Duration = Duration::from_millis(25);

/// Waits until `look` gives a value. An error of the last look is part of the message when time is over.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut look: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let began = Instant::now();
    loop {
        let last = match look() {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => String::new(),
            Err(e) => format!(": {e:#}"),
        };
        if began.elapsed() >= limit {
            bail!("waited {:.1} s for {what}{last}", began.elapsed().as_secs_f64());
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Waits until `look` says yes, and returns how long that took.
pub fn wait_until(
    what: &str,
    limit: Duration,
    mut look: impl FnMut() -> Result<bool>,
) -> Result<Duration> {
    let began = Instant::now();
    wait_for(what, limit, || Ok(look()?.then_some(())))?;
    Ok(began.elapsed())
}
