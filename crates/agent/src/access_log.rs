//! One line per connection, and at a waypoint per request, on standard output: at its end, or at once when it is refused.
//!
//! Keys are Istio's (`src.addr`, `dst.workload`, `bytes_sent` and so on), then ours: `policy`, `rule`,
//! `reason` and `config`. `bytes_sent` is what the reporting side's application sent: the request for
//! an outbound line, the response for an inbound one.
//!
//! Data threads format a line into a buffer of their own and copy it into one shared buffer; a writer
//! thread writes what has gathered there. **When standard output stalls, the shared buffer fills and
//! further lines are dropped and counted (`ambit_access_log_dropped_total`): a stuck log reader must not
//! stop the traffic of a node.** Istio's ztunnel waits instead.
//!
//! Invariants: a line is written whole or not at all; a line never holds a line break from outside.

use std::cell::RefCell;
use std::fmt;
use std::io::Write;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use model::{ConfigVersion, Identity, PolicyKey, Provenance, Reason, ServiceKey, Workload};

mod http;
mod line;
mod time;

pub use http::HttpRecord;
pub use time::Utc;

/// Bytes that wait for the writer: about 10,000 lines, one second of a busy node.
const MAX_WAITING: usize = 4 << 20;
/// The writer gathers for so long before it writes: at 10,000 lines a second it wakes 200 times, not
/// 10,000. Short enough that a person who watches sees no delay.
const GATHER: Duration = Duration::from_millis(5);
/// Buffers that grew in a burst give their memory back above this.
const KEEP_CAPACITY: usize = 256 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Tab-separated, as Istio's ztunnel writes it.
    Text,
    /// One JSON object a line.
    Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Inbound,
    Outbound,
    /// Between the two, at a waypoint.
    Waypoint,
}

/// One end of a connection, as far as it is known.
#[derive(Clone, Copy, Debug, Default)]
pub struct Party<'a> {
    pub address: Option<SocketAddr>,
    pub workload: Option<&'a Workload>,
    /// Only what a certificate proved.
    pub identity: Option<&'a Identity>,
}

/// How a connection ended.
#[derive(Clone, Copy, Debug)]
pub enum Outcome<'a> {
    /// Both sides finished.
    Complete,
    /// Refused, not made, or broken. For the first two, `message` is the refusal's.
    Failed { reason: Reason, message: &'a str },
}

/// What is known of a connection at its end.
#[derive(Clone, Copy, Debug)]
pub struct ConnectionRecord<'a> {
    pub start: SystemTime,
    pub duration: Duration,
    pub direction: Direction,
    pub source: Party<'a>,
    /// The address is where this proxy sent the bytes: the peer's HBONE port, or the application.
    pub destination: Party<'a>,
    /// Address and port of the application behind the tunnel, if there is a tunnel.
    pub hbone_address: Option<SocketAddr>,
    /// Both ends are pods of this proxy and their sockets were joined: no tunnel, nothing encrypted.
    pub same_node: bool,
    /// The client for whom the source, a waypoint, calls.
    pub client: Option<&'a Identity>,
    /// The destination is a waypoint, which goes on to what was called.
    pub waypoint: bool,
    /// The service that was called, if it was called by its virtual address.
    pub service: Option<&'a ServiceKey>,
    /// Bytes of the client's application, and of the server's.
    pub from_client: u64,
    pub from_server: u64,
    pub outcome: Outcome<'a>,
    /// The policy that allowed or refused, and where its rule is written.
    pub policy: Option<&'a PolicyKey>,
    pub rule: Option<&'a Provenance>,
    pub config: ConfigVersion,
}

/// The log. Cheap to clone.
#[derive(Clone, Debug)]
pub struct AccessLog {
    /// `None`: switched off.
    shared: Option<Arc<Shared>>,
    format: Format,
}

impl AccessLog {
    /// Starts the writer thread. `dropped` counts lines that found no room
    /// ([`crate::metrics::Metrics::access_log_dropped`]).
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(
        format: Format,
        output: impl Write + Send + 'static,
        dropped: Arc<AtomicU64>,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            wake: Condvar::new(),
            written: Condvar::new(),
            dropped,
        });
        let of_writer = shared.clone();
        std::thread::Builder::new()
            .name("access-log".into())
            .spawn(move || write_lines(&of_writer, output))?;
        Ok(Self { shared: Some(shared), format })
    }

    /// A log that writes nothing.
    pub const fn off() -> Self {
        Self { shared: None, format: Format::Text }
    }

    /// Whether lines are written at all; callers may skip gathering what only a line needs.
    pub const fn is_on(&self) -> bool {
        self.shared.is_some()
    }

    /// Writes the line of one connection. Never waits for the output.
    pub fn log(&self, record: &ConnectionRecord<'_>) {
        self.push(|line| line::connection(line, self.format, record));
    }

    /// The same for one request.
    pub fn log_request(&self, record: &HttpRecord<'_>) {
        self.push(|line| line::request(line, self.format, record));
    }

    fn push(&self, write: impl FnOnce(&mut String) -> fmt::Result) {
        thread_local! {
            /// The line being built; reused, so that a line costs no allocation.
            static LINE: RefCell<String> = const { RefCell::new(String::new()) };
        }
        let Some(shared) = &self.shared else { return };
        LINE.with_borrow_mut(|line| {
            line.clear();
            // A String takes whatever is written to it.
            let _: fmt::Result = write(line);
            line.push('\n');
            shared.push(line.as_bytes());
        });
    }

    /// Waits until everything logged so far is written, at most for `patience`. False: the output stalls.
    pub fn flush(&self, patience: Duration) -> bool {
        let Some(shared) = &self.shared else { return true };
        let state = shared.lock();
        let (state, _) = shared
            .written
            .wait_timeout_while(state, patience, |s| !s.waiting.is_empty() || s.writing)
            .unwrap_or_else(PoisonError::into_inner);
        state.waiting.is_empty() && !state.writing
    }
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Something waits, or the log closes.
    wake: Condvar,
    /// Nothing waits any more.
    written: Condvar,
    dropped: Arc<AtomicU64>,
}

#[derive(Debug, Default)]
struct State {
    waiting: Vec<u8>,
    /// The writer holds lines that are not written yet.
    writing: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, line: &[u8]) {
        let mut state = self.lock();
        if state.waiting.len() + line.len() > MAX_WAITING {
            drop(state);
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let first = state.waiting.is_empty();
        state.waiting.extend_from_slice(line);
        drop(state);
        if first {
            self.wake.notify_one();
        }
    }
}

/// The writer thread. It lives as long as the process: it holds one handle itself, and waits for lines.
fn write_lines(shared: &Shared, mut output: impl Write) {
    let mut lines = Vec::new();
    loop {
        let state = shared.lock();
        let state = shared
            .wake
            .wait_while(state, |s| s.waiting.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        drop(state);
        std::thread::sleep(GATHER);
        let mut state = shared.lock();
        std::mem::swap(&mut state.waiting, &mut lines);
        state.writing = true;
        drop(state);
        if output.write_all(&lines).and_then(|()| output.flush()).is_err() {
            // A closed pipe or a full disk: these lines are lost, later ones may not be.
            let count = lines.iter().filter(|b| **b == b'\n').count();
            shared.dropped.fetch_add(count as u64, Ordering::Relaxed);
        }
        lines.clear();
        lines.shrink_to(KEEP_CAPACITY);
        shared.lock().writing = false;
        shared.written.notify_all();
    }
}

#[cfg(test)]
mod tests;
