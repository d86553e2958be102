//! What is not HTTP, and what no longer is: bytes between a client's stream and an endpoint.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use engine::Candidate;
use futures_util::future::Either;
use hbone::{Ended, EndedBy, Transfer, TunnelIo, relay_streams, relay_tunnel};
use model::{Identity, Reason, Refusal};
use rustc_hash::FxHashMap;
use tokio::io::AsyncWriteExt as _;

use crate::call::Call;
use crate::io::PeerIo;
use crate::record::{Counted, Record};
use crate::sniff::{SERVER_WORDS, ServerSaid, Spoken, server_said, spoken};
use crate::upstream::{Open, connect_first};
use crate::worker::{Stage, reached};

/// Pause before a socket is looked at again that has shown the beginning of what may be HTTP.
const PEEK_AGAIN: Duration = Duration::from_millis(10);

/// A connection that lives, for the admin page.
#[derive(Debug)]
pub(crate) struct Live {
    pub(crate) source: SocketAddr,
    pub(crate) client: Arc<Identity>,
    pub(crate) authority: String,
    pub(crate) protocol: &'static str,
    pub(crate) started: Instant,
    pub(crate) moved: Arc<Transfer>,
}

/// The relayed connections of one worker. Locked for a moment by its own thread and by the admin page.
#[derive(Debug, Default)]
pub struct Connections {
    next: AtomicU64,
    table: Mutex<FxHashMap<u64, Entry>>,
}

#[derive(Debug)]
struct Entry {
    live: Live,
    counted: Option<Arc<Counted>>,
}

/// Keeps a connection in the table until dropped.
struct Registered<'a> {
    connections: &'a Connections,
    id: u64,
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        self.connections.lock().remove(&self.id);
    }
}

impl Connections {
    fn register(&self, live: Live, counted: Option<Arc<Counted>>) -> Registered<'_> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.lock().insert(id, Entry { live, counted });
        Registered { connections: self, id }
    }

    /// Counts the bytes of connections that live long.
    pub fn flush_metrics(&self) {
        for counted in self.lock().values().filter_map(|entry| entry.counted.as_ref()) {
            counted.flush();
        }
    }

    /// The list as JSON.
    pub fn list(&self) -> Vec<serde_json::Value> {
        let shown = |live: &Live| {
            let (up, down) = live.moved.totals();
            serde_json::json!({
                "source": live.source.to_string(),
                "client": live.client.to_string(),
                "destination": live.authority,
                "protocol": live.protocol,
                "seconds": live.started.elapsed().as_secs(),
                "bytesUp": up,
                "bytesDown": down,
            })
        };
        self.lock().values().map(|entry| shown(&entry.live)).collect()
    }

    fn lock(&self) -> MutexGuard<'_, FxHashMap<u64, Entry>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Passes a client's stream on to an endpoint of what it asked for, until both end.
pub(crate) async fn pass(call: Call, io: TunnelIo, mut record: Record) {
    let ended = match Box::pin(reach(&call, &mut record)).await {
        Ok(server) => Box::pin(carry(&call, io, server, &mut record)).await,
        Err(refusal) => Err(refusal),
    };
    record.ended(ended);
    call.worker.recorder.write(record);
}

/// Where the client has said nothing yet: an endpoint is called, which may speak first, and what the client says is looked at
/// all the same. Gives the stream back if it is HTTP.
pub(crate) async fn pass_or_http(
    call: Call,
    mut io: TunnelIo,
    mut record: Record,
) -> Option<(Call, TunnelIo, Record, bool)> {
    let server = {
        let mut reaching = Box::pin(reach(&call, &mut record));
        tokio::select! {
            biased;
            said = spoken(&mut io) => match said {
                Ok(said) => Err(said),
                Err(_) => Err(Spoken::Other),
            },
            server = &mut reaching => Ok(server),
        }
    };
    let server = match server {
        Err(Spoken::Other) => {
            pass(call, io, record).await;
            return None;
        }
        Err(said) => return Some((call, io, record, said == Spoken::Http2)),
        Ok(server) => server,
    };
    let server = match server {
        Ok(server) => server,
        // It may be HTTP that finds no endpoint: then the answer is in HTTP.
        Err(refusal) => match spoken(&mut io).await {
            Ok(said @ (Spoken::Http1 | Spoken::Http2)) => {
                return Some((call, io, record, said == Spoken::Http2));
            }
            _ => {
                record.ended(Err(refusal));
                call.worker.recorder.write(record);
                return None;
            }
        },
    };
    let (mut server, open) = server;
    let said = tokio::select! {
        biased;
        said = spoken(&mut io) => said.unwrap_or(Spoken::Other),
        said = first_words(&mut server) => match said {
            ServerSaid::Other => Spoken::Other,
            // Servers of HTTP/2 begin with their settings, and one of HTTP/1 may have lost patience.
            ServerSaid::Http => spoken(&mut io).await.unwrap_or(Spoken::Other),
            ServerSaid::Nothing => {
                // What the client said now would be for nobody; its stream ends as the server's did.
                let _ = io.shutdown().await;
                call.worker.recorder.write(record);
                return None;
            }
        },
    };
    if said != Spoken::Other {
        // The endpoint sees a connection without a byte.
        return Some((call, io, record, said == Spoken::Http2));
    }
    let ended = Box::pin(carry(&call, io, (server, open), &mut record)).await;
    record.ended(ended);
    call.worker.recorder.write(record);
    None
}

/// Waits until an endpoint has sent something, or ended. Nothing is taken.
async fn first_words(server: &mut PeerIo) -> ServerSaid {
    let mut seen = 0;
    loop {
        let words = match server {
            PeerIo::Tunnel(io) => {
                let look = |bytes: Option<&[u8]>| bytes.map(|b| (b.len(), server_said(b)));
                std::future::poll_fn(|cx| io.poll_peek(cx, seen).map_ok(look)).await
            }
            PeerIo::Tcp(tcp) => {
                let mut words = [0; SERVER_WORDS];
                let peeked = tcp.peek(&mut words).await;
                peeked.map(|n| (n > seen).then(|| (n, server_said(&words[..n]))))
            }
        };
        match words {
            Ok(Some((_, Some(said)))) => return said,
            // A part of what may be HTTP.
            Ok(Some((length, None))) => seen = length,
            // A socket shows the same part again until there is more.
            Ok(None) if seen > 0 && matches!(server, PeerIo::Tcp(_)) => {
                tokio::time::sleep(PEEK_AGAIN).await;
            }
            Ok(None) if seen > 0 => return ServerSaid::Other,
            Ok(None) | Err(_) => return ServerSaid::Nothing,
        }
    }
}

/// Connects to an endpoint of what the client asked for.
async fn reach(call: &Call, record: &mut Record) -> Result<(PeerIo, Open), Refusal> {
    let admission = call.admission()?;
    let (candidates, service) = {
        let snapshot = call.worker.shared.store.load();
        record.version = snapshot.version();
        admission.endpoints(&snapshot, call)?
    };
    record.service = service;
    record.client = admission.client.clone();
    connect_first(call, &admission, &candidates, |candidate| record.chosen(candidate)).await
}

/// Relays until both directions end, or the waypoint does.
async fn carry(
    call: &Call,
    io: TunnelIo,
    (server, open): (PeerIo, Open),
    record: &mut Record,
) -> Result<Ended, Refusal> {
    let counted = call.worker.recorder.opened(record);
    let live = live(call, "TCP", record.moved.clone());
    let _registered = call.worker.connections.register(live, Some(counted));
    let ended = relay(call, io, server, record.moved.clone()).await;
    drop(open);
    ended
}

/// Relays a connection that was switched to another protocol. What either side had sent ahead stands in `ahead`: the
/// client's, then the server's.
pub(crate) async fn carry_upgraded(
    call: &Call,
    mut client: TunnelIo,
    mut server: PeerIo,
    ahead: (Bytes, Bytes),
    moved: Arc<Transfer>,
) -> Result<Ended, Refusal> {
    let _registered = call.worker.connections.register(live(call, "upgraded", moved.clone()), None);
    client.unread(ahead.0);
    match &mut server {
        PeerIo::Tunnel(io) => io.unread(ahead.1),
        PeerIo::Tcp(_) => {
            moved.down.fetch_add(ahead.1.len() as u64, Ordering::Relaxed);
            client.write_all(&ahead.1).await.map_err(|e| broke("the client", &e))?;
        }
    }
    relay(call, client, server, moved).await
}

/// `moved` counts as up what the client sends.
async fn relay(
    call: &Call,
    client: TunnelIo,
    server: PeerIo,
    moved: Arc<Transfer>,
) -> Result<Ended, Refusal> {
    let mut stage = call.worker.shared.stage();
    let stop = Box::pin(reached(&mut stage, Stage::is_ended));
    let relaying = match server {
        PeerIo::Tunnel(server) => Either::Left(relay_streams(client, server, moved, stop)),
        PeerIo::Tcp(mut tcp) => {
            let (send, receive, unread, _slot) = client.into_parts();
            if !unread.is_empty() {
                moved.up.fetch_add(unread.len() as u64, Ordering::Relaxed);
                tcp.write_all(&unread).await.map_err(|e| broke("the endpoint", &e))?;
            }
            // That relay counts as up what the socket sends, which is the endpoint's here.
            let (turned, total) = (Arc::<Transfer>::default(), moved);
            let relaying = relay_tunnel(tcp, send, receive, turned.clone(), stop);
            Either::Right(async move {
                let (ended, word) = relaying.await;
                let (down, up) = turned.totals();
                total.up.fetch_add(up, Ordering::Relaxed);
                total.down.fetch_add(down, Ordering::Relaxed);
                let by = match ended.by {
                    EndedBy::Socket => EndedBy::Peer,
                    EndedBy::Peer => EndedBy::Socket,
                    by => by,
                };
                (Ended { by, ..ended }, word)
            })
        }
    };
    let (ended, word) = match relaying {
        Either::Left(relaying) => relaying.await,
        Either::Right(relaying) => Box::pin(relaying).await,
    };
    match word {
        Some(Stage::Ended(refusal)) => Err(refusal),
        _ => Ok(ended),
    }
}

fn live(call: &Call, protocol: &'static str, moved: Arc<Transfer>) -> Live {
    Live {
        source: call.source,
        client: call.client.clone(),
        authority: call.asked_for(),
        protocol,
        started: Instant::now(),
        moved,
    }
}

fn broke(who: &str, error: &std::io::Error) -> Refusal {
    Refusal::new(Reason::ConnectionBroken, format!("{who} broke the connection: {error}"))
}

impl Record {
    fn chosen(&mut self, candidate: &Candidate) {
        self.endpoint = Some(candidate.clone());
    }
}
