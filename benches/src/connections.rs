//! A new connection for every request, `n` at a time: latency from the start of the connect to the
//! whole answer, how many a second in consecutive windows, and the longest time without an answer.
//!
//! Who closes first keeps the connection in TIME_WAIT for a minute, and a client has 28,000 ports in
//! Linux's default range. So it matters who closes, and the caller says which: see [`Closing`].

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::json;

use crate::clients::{BUFFER, LOOK, PATIENCE, nanos, rate};
use crate::hist::Histogram;
use crate::lines::{self, Errors};
use crate::poller::Poller;
use crate::request::{CLOSE, Connection, KEEP};

/// After an error a slot rests this long, or a client without ports would spin.
const REST: Duration = Duration::from_millis(1);

/// Who closes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Closing {
    /// The client asks for it; the server keeps TIME_WAIT, and no port of the client is used up.
    Server,
    /// The client, in the usual way; it keeps TIME_WAIT.
    Client,
    /// The client resets: nobody keeps TIME_WAIT. What a proxy in between makes of it is its matter.
    Reset,
}

/// What to do, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub to: SocketAddr,
    /// At a time.
    pub concurrency: usize,
    pub time: Duration,
    /// Ends the run early, so that TIME_WAIT cannot fill up. 0: no limit.
    pub most: u64,
    pub closing: Closing,
    /// Length of the windows that are counted one by one.
    pub window: Duration,
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
struct Window {
    connections: u64,
    errors: u64,
}

pub fn run(plan: &Plan) -> io::Result<()> {
    let mut slots: Vec<Slot> =
        (0..plan.concurrency).map(|_| Slot::Resting { until: Instant::now() }).collect();
    let mut run = Run {
        plan: *plan,
        poller: Poller::new()?,
        hist: Histogram::default(),
        errors: Errors::default(),
        windows: Vec::new(),
        began: Instant::now(),
        answered: Instant::now(),
        gap: Duration::ZERO,
        started: 0,
        buffer: vec![0; BUFFER],
    };
    let mut ready = Vec::new();
    lines::begin()?;
    run.began = Instant::now();
    run.answered = run.began;
    while run.goes_on() || slots.iter().any(Slot::is_busy) {
        let resting = slots.iter().any(|s| matches!(s, Slot::Resting { .. }));
        if resting {
            run.wake(&mut slots);
        }
        run.poller.wait(Some(if resting { REST } else { LOOK }), &mut ready)?;
        for &token in &ready {
            let Some(slot) = usize::try_from(token).ok().and_then(|t| slots.get_mut(t)) else {
                continue;
            };
            let before = std::mem::replace(slot, Slot::Finished);
            *slot = run.step(before, token);
        }
        if ready.is_empty() {
            run.time_out(&mut slots);
        }
    }
    let took = run.began.elapsed();
    lines::end()?;
    run.report(took)
}

enum Slot {
    Resting {
        until: Instant,
    },
    Connecting {
        connection: Connection,
        began: Instant,
    },
    Waiting {
        connection: Connection,
        began: Instant,
    },
    /// Answered; the server is to close first.
    Closing {
        connection: Connection,
        began: Instant,
    },
    /// The run is over for this slot.
    Finished,
}

impl Slot {
    fn is_busy(&self) -> bool {
        self.began().is_some()
    }

    fn began(&self) -> Option<Instant> {
        match self {
            Self::Resting { .. } | Self::Finished => None,
            Self::Connecting { began, .. }
            | Self::Waiting { began, .. }
            | Self::Closing { began, .. } => Some(*began),
        }
    }
}

struct Run {
    plan: Plan,
    poller: Poller,
    hist: Histogram,
    errors: Errors,
    windows: Vec<Window>,
    began: Instant,
    /// When the last answer was complete.
    answered: Instant,
    /// The longest time without one.
    gap: Duration,
    started: u64,
    buffer: Vec<u8>,
}

impl Run {
    fn goes_on(&self) -> bool {
        self.began.elapsed() < self.plan.time
            && (self.plan.most == 0 || self.started < self.plan.most)
    }

    fn wake(&mut self, slots: &mut [Slot]) {
        for (slot, token) in slots.iter_mut().zip(0..) {
            if matches!(slot, Slot::Resting { until } if *until <= Instant::now()) {
                *slot = self.start(token);
            }
        }
    }

    fn start(&mut self, token: u64) -> Slot {
        if !self.goes_on() {
            return Slot::Finished;
        }
        self.started += 1;
        let began = Instant::now();
        let connection =
            Connection::start(self.plan.to).and_then(|c| self.poller.writes(&c, token).map(|()| c));
        match connection {
            Ok(connection) => Slot::Connecting { connection, began },
            Err(error) => self.failed(&lines::kind_of(&error)),
        }
    }

    /// One step of one slot that is ready.
    fn step(&mut self, slot: Slot, token: u64) -> Slot {
        let next = match slot {
            Slot::Connecting { connection, began } => self.ask(connection, began, token),
            Slot::Waiting { connection, began } => self.hear(connection, began, token),
            Slot::Closing { connection, began } => self.close(connection, began, token),
            idle @ (Slot::Resting { .. } | Slot::Finished) => Ok(idle),
        };
        next.unwrap_or_else(|error| self.failed(&lines::kind_of(&error)))
    }

    fn ask(&mut self, connection: Connection, began: Instant, token: u64) -> io::Result<Slot> {
        connection.connected()?;
        connection.send(if self.plan.closing == Closing::Server { CLOSE } else { KEEP })?;
        self.poller.now_reads(&connection, token)?;
        Ok(Slot::Waiting { connection, began })
    }

    fn hear(&mut self, mut connection: Connection, began: Instant, token: u64) -> io::Result<Slot> {
        if !connection.receive(&mut self.buffer)? {
            return Ok(Slot::Waiting { connection, began });
        }
        self.hist.record(nanos(began.elapsed()));
        let now = Instant::now();
        self.gap = self.gap.max(now - self.answered);
        self.answered = now;
        self.window().connections += 1;
        match self.plan.closing {
            Closing::Server => return self.close(connection, began, token),
            Closing::Reset => connection.reset_on_close()?,
            Closing::Client => {}
        }
        drop(connection);
        Ok(self.start(token))
    }

    fn close(&mut self, connection: Connection, began: Instant, token: u64) -> io::Result<Slot> {
        if !connection.at_end(&mut self.buffer)? {
            return Ok(Slot::Closing { connection, began });
        }
        drop(connection);
        Ok(self.start(token))
    }

    fn failed(&mut self, kind: &str) -> Slot {
        self.errors.add(kind);
        self.window().errors += 1;
        Slot::Resting { until: Instant::now() + REST }
    }

    fn time_out(&mut self, slots: &mut [Slot]) {
        for slot in slots {
            if slot.began().is_some_and(|began| began.elapsed() > PATIENCE) {
                *slot = self.failed("timeout");
            }
        }
    }

    fn window(&mut self) -> &mut Window {
        let index = self.began.elapsed().as_nanos() / self.plan.window.as_nanos().max(1);
        let index = usize::try_from(index).unwrap_or(0);
        if self.windows.len() <= index {
            self.windows.resize(index + 1, Window::default());
        }
        &mut self.windows[index]
    }

    fn report(&self, took: Duration) -> io::Result<()> {
        let latency = self.hist.quantiles();
        // What answers trickle in after the end is no window of its own.
        let whole =
            usize::try_from(took.as_nanos() / self.plan.window.as_nanos().max(1)).unwrap_or(0);
        lines::result(json!({
            "mode": "connections",
            "concurrency": self.plan.concurrency,
            "closing": self.plan.closing,
            "seconds": took.as_secs_f64(),
            "connections": latency.count,
            "per_second": rate(latency.count, took),
            "latency": latency,
            "gap_ms": self.gap.as_secs_f64() * 1e3,
            "window_seconds": self.plan.window.as_secs_f64(),
            "windows": &self.windows[..whole.min(self.windows.len())],
            "time_wait": time_wait(),
            "errors": self.errors,
        }))
    }
}

/// Sockets of this network namespace in TIME_WAIT; `None` where the kernel does not say.
fn time_wait() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/net/sockstat").ok()?;
    let words: Vec<&str> = text.lines().find(|l| l.starts_with("TCP:"))?.split(' ').collect();
    words.windows(2).find(|w| w[0] == "tw").and_then(|w| w[1].parse().ok())
}
