//! The connections of one worker: lent, shared, given back, and closed when nobody has used them for a while or their place is
//! needed.
//!
//! Invariants: an open connection has a place for as long as its bytes can flow; new requests are refused for want of a place
//! only when all connections are in use; an HTTP/2 connection gets no more requests than its peer takes at once, because
//! what is above waits inside hyper, where nobody keeps the time and other connections are not tried.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use model::{Reason, Refusal};
use rustc_hash::FxHashMap;

use super::io::UpstreamIo;
use super::{Connection, Lease, UpstreamKey};
use crate::proxy::body::RequestBody;
use crate::record::lock;

/// HTTP/1 connections without a request that are kept for one key: what a burst of a busy client needed, and no more.
const MAX_IDLE: usize = 128;
/// Such a connection is closed after this long: shorter than most servers do it themselves, so that few requests meet a
/// connection that is being closed.
const IDLE: Duration = Duration::from_secs(30);
/// Connections of one worker. Each is a stream of some kilobytes, and one connection of the application.
const MAX_OPEN: usize = 16_384;
/// Which part of all places is made free at once when the last is taken: to look for idle connections takes a look at all of
/// them, and so costs each connection that is opened afterwards as much as sixteen looks.
const ROOM_PART: usize = 16;
/// After a look that found fewer than that the next is not sooner: nearly all are in use, and a look for each request would
/// be work that grows with the load.
const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// Requests that one HTTP/2 connection carries before another is opened, as most servers allow.
pub(super) const MAX_STREAMS: u32 = 100;

/// An HTTP/2 connection, which a task drives, and which is asked meanwhile how many requests its peer takes. hyper hears of a
/// change before that task does, so that a number that the task writes down would be late.
pub(super) type Http2Driver =
    Mutex<http2::Connection<TokioIo<UpstreamIo>, RequestBody, TokioExecutor>>;

/// The connections of one worker. Only its own thread locks it.
pub struct Upstreams {
    kept: Mutex<Kept>,
    open: Arc<AtomicUsize>,
    max_open: usize,
}

#[derive(Default)]
struct Kept {
    slots: FxHashMap<UpstreamKey, Slot>,
    /// When idle connections were looked for and few were found.
    searched: Option<Instant>,
}

#[derive(Default)]
struct Slot {
    /// The one that was used last is at the end.
    idle: Vec<Idle>,
    shared: Vec<Shared>,
}

/// An HTTP/1 connection without a request.
struct Idle {
    send: http1::SendRequest<RequestBody>,
    since: Instant,
    ticket: Weak<Ticket>,
}

/// An HTTP/2 connection.
struct Shared {
    send: http2::SendRequest<RequestBody>,
    /// Gone: the connection has ended.
    driver: Weak<Http2Driver>,
    requests: Arc<AtomicUsize>,
    /// When it was last given a request.
    used: Instant,
    ticket: Weak<Ticket>,
}

impl Shared {
    /// Whether the peer takes one more request now.
    fn has_room(&self) -> bool {
        let requests = self.requests.load(Ordering::Relaxed);
        let Some(driver) = self.driver.upgrade().filter(|_| requests < MAX_STREAMS as usize) else {
            return false;
        };
        // Locked: this is called from within its poll, which nothing does. Another connection is no mistake.
        driver.try_lock().is_ok_and(|connection| requests < connection.current_max_send_streams())
    }

    fn is_in_use(&self) -> bool {
        self.requests.load(Ordering::Relaxed) > 0
    }
}

/// Counts a request of an HTTP/2 connection, until dropped: until its answer has ended, and its body as well, because for
/// the peer it lives that long.
#[derive(Debug)]
pub(crate) struct InUse(Arc<AtomicUsize>);

impl InUse {
    fn new(requests: &Arc<AtomicUsize>) -> Arc<Self> {
        requests.fetch_add(1, Ordering::Relaxed);
        Arc::new(Self(requests.clone()))
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The place of an open connection, until dropped.
#[derive(Debug)]
pub(crate) struct Open(Arc<Ticket>);

impl Open {
    pub(super) fn ticket(&self) -> Weak<Ticket> {
        Arc::downgrade(&self.0)
    }
}

/// Counts an open connection, until dropped or given up.
#[derive(Debug)]
pub(super) struct Ticket {
    open: Arc<AtomicUsize>,
    counts: AtomicBool,
}

impl Ticket {
    /// For a connection that is being closed: its task does it when it is its turn, and its place is needed now.
    fn give_up(&self) {
        if self.counts.swap(false, Ordering::Relaxed) {
            self.open.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.give_up();
    }
}

impl Default for Upstreams {
    fn default() -> Self {
        Self { kept: Mutex::default(), open: Arc::default(), max_open: MAX_OPEN }
    }
}

impl std::fmt::Debug for Upstreams {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Upstreams").field("open", &self.open()).finish_non_exhaustive()
    }
}

impl Upstreams {
    /// Gives a connection back whose answer was read to its end.
    pub(crate) fn give_back(&self, lease: Lease) {
        let Connection::Http1 { send, ticket } = lease.connection else { return };
        // Not ready: the answer came before the end of the request, or said that the connection closes.
        if !send.is_ready() {
            return;
        }
        let mut kept = self.lock();
        let idle = &mut kept.slots.entry(lease.key).or_default().idle;
        if idle.len() < MAX_IDLE {
            idle.push(Idle { send, since: Instant::now(), ticket });
        }
    }

    /// Forgets connections that were closed, or idle for long.
    pub fn sweep(&self, now: Instant) {
        self.lock().retain(|since| now.saturating_duration_since(since) < IDLE);
    }

    /// Open connections, for the admin page.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// A place for one more connection.
    pub(crate) fn place(&self) -> Result<Open, Refusal> {
        while self.open() >= self.max_open {
            if !self.make_room(Instant::now()) {
                let max = self.max_open;
                let words = format!("{max} connections to endpoints are in use on one thread");
                return Err(Refusal::new(Reason::Limit, words));
            }
        }
        self.open.fetch_add(1, Ordering::Relaxed);
        let ticket = Ticket { open: self.open.clone(), counts: AtomicBool::new(true) };
        Ok(Open(Arc::new(ticket)))
    }

    /// Closes those that nobody has used for longest. False: there is none, or was none a moment ago.
    fn make_room(&self, now: Instant) -> bool {
        let mut kept = self.lock();
        let again = |at| now.saturating_duration_since(at) >= LOOK_AGAIN;
        if !kept.searched.is_none_or(again) {
            return false;
        }
        let mut since: Vec<Instant> = kept.slots.values().flat_map(Slot::idle_since).collect();
        let part = (self.max_open / ROOM_PART).max(1);
        kept.searched = (since.len() < part).then_some(now);
        let Some(last) = since.len().min(part).checked_sub(1) else { return false };
        let (_, &mut last, _) = since.select_nth_unstable(last);
        kept.retain(|since| since > last);
        true
    }

    pub(super) fn take(&self, key: &UpstreamKey) -> Option<Connection> {
        let mut kept = self.lock();
        let slot = kept.slots.get_mut(key)?;
        while let Some(Idle { send, ticket, .. }) = slot.idle.pop() {
            if send.is_ready() && !send.is_closed() {
                return Some(Connection::Http1 { send, ticket });
            }
        }
        slot.shared.retain(|shared| !shared.send.is_closed());
        let shared = slot.shared.iter_mut().find(|shared| shared.has_room())?;
        shared.used = Instant::now();
        let counted = InUse::new(&shared.requests);
        Some(Connection::Http2 { send: shared.send.clone(), counted })
    }

    /// Lets others have a new HTTP/2 connection, too.
    pub(super) fn share(
        &self,
        key: &UpstreamKey,
        send: http2::SendRequest<RequestBody>,
        driver: Weak<Http2Driver>,
        ticket: Weak<Ticket>,
    ) -> Connection {
        let requests = Arc::default();
        let counted = InUse::new(&requests);
        let shared = Shared { send: send.clone(), driver, requests, used: Instant::now(), ticket };
        self.lock().slots.entry(key.clone()).or_default().shared.push(shared);
        Connection::Http2 { send, counted }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        lock(&self.kept)
    }
}

impl Kept {
    /// Forgets connections that were closed, and those without a request that are not `fresh`.
    fn retain(&mut self, fresh: impl Fn(Instant) -> bool) {
        let keep = |closed: bool, fresh: bool, ticket: &Weak<Ticket>| {
            if !closed
                && !fresh
                && let Some(ticket) = ticket.upgrade()
            {
                ticket.give_up();
            }
            !closed && fresh
        };
        self.slots.retain(|_, slot| {
            slot.idle.retain(|idle| keep(idle.send.is_closed(), fresh(idle.since), &idle.ticket));
            slot.shared.retain(|shared| {
                let fresh = shared.is_in_use() || fresh(shared.used);
                keep(shared.send.is_closed(), fresh, &shared.ticket)
            });
            !slot.idle.is_empty() || !slot.shared.is_empty()
        });
    }
}

impl Slot {
    /// Since when the connections are idle that nobody uses.
    fn idle_since(&self) -> impl Iterator<Item = Instant> {
        let shared = self.shared.iter().filter(|shared| !shared.is_in_use());
        self.idle.iter().map(|idle| idle.since).chain(shared.map(|shared| shared.used))
    }
}

#[cfg(test)]
mod tests {
    use tokio::task::JoinHandle;

    use super::*;
    use crate::upstream::TransportKey;

    fn key(number: u16) -> UpstreamKey {
        UpstreamKey {
            client: None,
            workload: model::WorkloadUid("web-0".into()),
            target: ([127, 0, 0, 1], number).into(),
            transport: TransportKey::Plain,
            http2: false,
        }
    }

    /// A connection without a request, and the task that ends when it is closed.
    async fn connection(upstreams: &Upstreams, number: u16) -> (Lease, JoinHandle<()>) {
        let open = upstreams.place().unwrap();
        let ticket = open.ticket();
        let (io, other) = tokio::io::duplex(1024);
        let (mut send, connection) = http1::handshake(TokioIo::new(io)).await.unwrap();
        let task = tokio::spawn(async move {
            let _ = (connection.await, other);
            drop(open);
        });
        send.ready().await.unwrap();
        (Lease { key: key(number), connection: Connection::Http1 { send, ticket } }, task)
    }

    #[tokio::test]
    async fn idle_connections_make_room_and_those_in_use_do_not() {
        let upstreams = Upstreams { max_open: 32, ..Upstreams::default() };
        let (mut leases, mut tasks) = (Vec::new(), Vec::new());
        for number in 0..32 {
            let (lease, task) = connection(&upstreams, number).await;
            leases.push(lease);
            tasks.push(task);
        }
        let refusal = upstreams.place().map(drop).unwrap_err();
        assert_eq!(refusal.reason, Reason::Limit);
        for lease in leases.drain(..8) {
            upstreams.give_back(lease);
        }
        // One that was just looked for in vain is not looked for again.
        upstreams.place().map(drop).unwrap_err();
        upstreams.lock().searched = None;
        let first = upstreams.place().unwrap();
        assert!(upstreams.take(&key(0)).is_none(), "the oldest goes first");
        assert!(upstreams.lock().slots.contains_key(&key(7)), "and not all at once");
        // Their places are free before their tasks have run.
        let more: Vec<Open> = (1..8).map(|_| upstreams.place().unwrap()).collect();
        upstreams.place().map(drop).unwrap_err();
        for task in tasks.drain(..8) {
            task.await.unwrap();
        }
        assert_eq!(upstreams.open(), 32, "a place is given back once");
        drop((first, more));
        assert_eq!(upstreams.open(), 24);
        upstreams.give_back(leases.remove(0));
        drop(upstreams.place().unwrap());
        assert!(upstreams.take(&key(8)).is_some(), "there was room");
    }
}
