//! Clients that keep their connections: closed loop, open schedule, idle holder.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::hist::Histogram;
use crate::lines::{self, Errors};
use crate::poller::{Poller, Ticker};
use crate::request::{Connection, KEEP};

/// Connections that are being set up at the same time. More would overflow a listener's queue.
const OPENING_MAX: usize = 64;
/// An answer or a connect that takes longer is an error.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// How often a client looks for what has run out of time.
pub const LOOK: Duration = Duration::from_millis(500);
/// The shortest period of the schedule's timer; several requests can be due at one tick.
const TICK_MIN: Duration = Duration::from_micros(50);
pub const BUFFER: usize = 64 * 1024;
const TICKER: u64 = u64::MAX;

/// Each connection sends its next request when it has the answer to the last one.
pub fn closed_loop(
    to: SocketAddr,
    connections: usize,
    time: Duration,
    request: Vec<u8>,
) -> io::Result<()> {
    let mut load = Load::open(to, connections, request)?;
    lines::begin()?;
    let began = Instant::now();
    for index in 0..load.slots.len() {
        load.send(index, Instant::now());
    }
    let mut done = Vec::new();
    while began.elapsed() < time && load.busy > 0 {
        load.step(LOOK, &mut done)?;
        for index in done.drain(..) {
            load.send(index, Instant::now());
        }
    }
    let took = began.elapsed();
    lines::end()?;
    load.report("closed", took, json!({ "connections": connections }))
}

/// Requests are due at a fixed rate, whatever the answers do. Latency counts from when a request was
/// due: a stall shows in every request that it made late (no coordinated omission).
pub fn open_schedule(
    to: SocketAddr,
    connections: usize,
    rate: u32,
    time: Duration,
    request: Vec<u8>,
) -> io::Result<()> {
    let mut load = Load::open(to, connections, request)?;
    let period = Duration::from_secs(1) / rate.max(1);
    let mut idle: VecDeque<usize> = (0..load.slots.len()).collect();
    lines::begin()?;
    let began = Instant::now();
    // Armed after the schedule began: a tick that came before what is due at it would send each request
    // one whole period late.
    let ticker = Ticker::every(period.max(TICK_MIN))?;
    load.poller.reads(&ticker, TICKER)?;
    let mut due = began;
    let mut done = Vec::new();
    let mut issued = 0_u64;
    // Beyond the end as long as requests that were due in time are not sent or not answered.
    while (due.duration_since(began) < time || load.busy > 0) && began.elapsed() < time + PATIENCE {
        let now = Instant::now();
        while due <= now && due.duration_since(began) < time {
            let Some(index) = idle.pop_front() else { break };
            load.send(index, due);
            issued += 1;
            due += period;
        }
        if load.step(LOOK, &mut done)? {
            ticker.clear();
        }
        idle.extend(done.drain(..));
    }
    let took = began.elapsed();
    lines::end()?;
    load.report("rate", took, json!({ "connections": connections, "rate": rate, "issued": issued }))
}

/// Opens `connections`, has one answer on each, holds them for `time` and closes them.
pub fn hold_idle(to: SocketAddr, connections: usize, time: Duration) -> io::Result<()> {
    let mut errors = Errors::default();
    lines::begin()?;
    let began = Instant::now();
    let held = open(to, connections, KEEP, &mut errors)?;
    let opened_in = began.elapsed();
    lines::line(&json!({ "event": "open", "open": held.len() }))?;
    let mut poller = Poller::new()?;
    for (connection, token) in held.iter().zip(0..) {
        poller.reads(connection, token)?;
    }
    // Whatever becomes readable now is a connection that somebody else ended.
    let (mut ready, mut ended) = (Vec::new(), 0);
    let until = Instant::now() + time;
    while Instant::now() < until {
        poller.wait(Some(LOOK.min(until - Instant::now())), &mut ready)?;
        for token in &ready {
            if let Some(connection) = usize::try_from(*token).ok().and_then(|t| held.get(t)) {
                poller.remove(connection)?;
                ended += 1;
            }
        }
    }
    lines::end()?;
    let open = held.len();
    drop(held);
    lines::result(json!({
        "mode": "idle", "connections": connections, "open": open, "ended_early": ended,
        "open_seconds": opened_in.as_secs_f64(), "errors": errors,
    }))
}

/// Connections under load, and what was measured.
struct Load {
    poller: Poller,
    request: Vec<u8>,
    slots: Vec<Slot>,
    /// Requests without an answer.
    busy: usize,
    /// From due to answer.
    from_due: Histogram,
    /// From sent to answer.
    from_sent: Histogram,
    /// From due to sent: what the generator itself adds.
    late: Histogram,
    errors: Errors,
    ready: Vec<u64>,
    buffer: Vec<u8>,
    looked: Instant,
}

struct Slot {
    connection: Connection,
    /// When the request in flight was due and when it was sent; none in flight otherwise.
    request: Option<(Instant, Instant)>,
    /// Given up after an error.
    dead: bool,
}

impl Load {
    fn open(to: SocketAddr, connections: usize, request: Vec<u8>) -> io::Result<Self> {
        let mut errors = Errors::default();
        let poller = Poller::new()?;
        let mut slots = Vec::with_capacity(connections);
        for (connection, token) in
            open(to, connections, &request, &mut errors)?.into_iter().zip(0..)
        {
            poller.reads(&connection, token)?;
            slots.push(Slot { connection, request: None, dead: false });
        }
        Ok(Self {
            poller,
            request,
            slots,
            busy: 0,
            from_due: Histogram::default(),
            from_sent: Histogram::default(),
            late: Histogram::default(),
            errors,
            ready: Vec::new(),
            buffer: vec![0; BUFFER],
            looked: Instant::now(),
        })
    }

    fn send(&mut self, index: usize, due: Instant) {
        let slot = &mut self.slots[index];
        let sent = Instant::now();
        self.late.record(nanos(sent - due));
        match slot.connection.send(&self.request) {
            Ok(()) => {
                slot.request = Some((due, sent));
                self.busy += 1;
            }
            Err(error) => self.give_up(index, &lines::kind_of(&error)),
        }
    }

    /// Waits for answers; the connections that have theirs go to `done`. True when the ticker fired.
    fn step(&mut self, limit: Duration, done: &mut Vec<usize>) -> io::Result<bool> {
        let mut ready = std::mem::take(&mut self.ready);
        self.poller.wait(Some(limit), &mut ready)?;
        let mut ticked = false;
        for &token in &ready {
            match usize::try_from(token).ok().filter(|_| token != TICKER) {
                Some(index) => self.receive(index, done),
                None => ticked = true,
            }
        }
        self.ready = ready;
        if self.looked.elapsed() > LOOK {
            self.looked = Instant::now();
            self.time_out();
        }
        Ok(ticked)
    }

    fn receive(&mut self, index: usize, done: &mut Vec<usize>) {
        let slot = &mut self.slots[index];
        match slot.connection.receive(&mut self.buffer) {
            Ok(false) => {}
            Ok(true) => {
                if let Some((due, sent)) = slot.request.take() {
                    self.busy -= 1;
                    self.from_due.record(nanos(due.elapsed()));
                    self.from_sent.record(nanos(sent.elapsed()));
                    done.push(index);
                }
            }
            Err(error) => self.give_up(index, &lines::kind_of(&error)),
        }
    }

    fn time_out(&mut self) {
        for index in 0..self.slots.len() {
            if self.slots[index].request.is_some_and(|(_, sent)| sent.elapsed() > PATIENCE) {
                self.give_up(index, "timeout");
            }
        }
    }

    fn give_up(&mut self, index: usize, kind: &str) {
        let slot = &mut self.slots[index];
        self.errors.add(kind);
        self.busy -= usize::from(slot.request.take().is_some());
        if !std::mem::replace(&mut slot.dead, true) {
            // The socket stays open until the end of the run, out of the way.
            let _ = self.poller.remove(&slot.connection);
        }
    }

    fn report(&self, mode: &str, took: Duration, facts: serde_json::Value) -> io::Result<()> {
        let latency = self.from_due.quantiles();
        lines::result(json!({
            "mode": mode,
            "facts": facts,
            "seconds": took.as_secs_f64(),
            "requests": latency.count,
            "per_second": rate(latency.count, took),
            "latency": latency,
            "latency_from_sent": self.from_sent.quantiles(),
            "late": self.late.quantiles(),
            "in_flight": self.busy,
            "errors": self.errors,
        }))
    }
}

/// Opens `count` connections and has each answer once, so that what follows is in its steady state.
/// What fails is counted and left out.
fn open(
    to: SocketAddr,
    count: usize,
    request: &[u8],
    errors: &mut Errors,
) -> io::Result<Vec<Connection>> {
    let mut poller = Poller::new()?;
    let mut slots: Vec<Option<Opening>> = Vec::with_capacity(count);
    let mut opened = Vec::with_capacity(count);
    let (mut pending, mut ready, mut buffer) = (0, Vec::new(), vec![0; BUFFER]);
    while slots.len() < count || pending > 0 {
        while slots.len() < count && pending < OPENING_MAX {
            let started = Opening::start(to, &poller, slots.len() as u64);
            pending += usize::from(started.is_ok());
            slots.push(started.map_err(|e| errors.add_io(&e)).ok());
        }
        poller.wait(Some(LOOK), &mut ready)?;
        for &token in &ready {
            let Some(slot) = usize::try_from(token).ok().and_then(|t| slots.get_mut(t)) else {
                continue;
            };
            let Some(opening) = slot.take() else { continue };
            match opening.step(&poller, token, request, &mut buffer) {
                Ok(Step::Open(connection)) => opened.push(connection),
                Ok(Step::Wait(opening)) => {
                    *slot = Some(opening);
                    continue;
                }
                Err(error) => errors.add_io(&error),
            }
            pending -= 1;
        }
        // Looks at every slot: only when nothing else is to be done.
        if ready.is_empty() {
            for slot in slots.iter_mut().filter(|s| s.as_ref().is_some_and(Opening::is_late)) {
                *slot = None;
                pending -= 1;
                errors.add("timeout");
            }
        }
    }
    Ok(opened)
}

struct Opening {
    connection: Connection,
    asked: bool,
    began: Instant,
}

enum Step {
    Open(Connection),
    Wait(Opening),
}

impl Opening {
    fn start(to: SocketAddr, poller: &Poller, token: u64) -> io::Result<Self> {
        let connection = Connection::start(to)?;
        poller.writes(&connection, token)?;
        Ok(Self { connection, asked: false, began: Instant::now() })
    }

    fn step(
        mut self,
        poller: &Poller,
        token: u64,
        request: &[u8],
        buffer: &mut [u8],
    ) -> io::Result<Step> {
        if !self.asked {
            self.connection.connected()?;
            self.connection.send(request)?;
            poller.now_reads(&self.connection, token)?;
            self.asked = true;
            return Ok(Step::Wait(self));
        }
        if !self.connection.receive(buffer)? {
            return Ok(Step::Wait(self));
        }
        poller.remove(&self.connection)?;
        Ok(Step::Open(self.connection))
    }

    fn is_late(&self) -> bool {
        self.began.elapsed() > PATIENCE
    }
}

pub fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[expect(clippy::cast_precision_loss, reason = "a rate for people")]
pub fn rate(count: u64, time: Duration) -> f64 {
    count as f64 / time.as_secs_f64()
}
