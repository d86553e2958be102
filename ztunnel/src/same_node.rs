//! Both ends on this node: two sockets of one process need no wire between them.
//!
//! Where the operator allows it for both namespaces, the client's socket is relayed to the application directly: one pass
//! instead of two, no encryption to oneself. Identity comes from the pod whose namespace the connection was captured in,
//! which this process knows as surely as its own certificate of it; policy decides as it does for a tunnel, on the same
//! facts, and again when it changes.
//!
//! Invariants: off unless listed; never where a PeerAuthentication demands mutual TLS; a connection never counts as
//! mutual TLS; both sides write their line.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use engine::{Candidate, InboundFacts, Transport, demands_mutual_tls};
use futures_util::FutureExt as _;
use hbone::{Ended, EndedBy, relay_tcp};
use model::{Refusal, Str};
use tokio::net::TcpStream;
use tokio::sync::oneshot::Receiver;
use tokio::sync::oneshot::error::RecvError;

use crate::connections::Live;
use crate::inbound;
use crate::pod::Pod;
use crate::record::Record;
use crate::worker::Worker;

/// The pods of this process, as far as connections between them may be joined.
#[derive(Debug)]
pub struct SameNode {
    namespaces: Vec<String>,
    /// By namespace and name. Empty where nothing is listed.
    pods: Mutex<HashMap<(Str, Str), Arc<Pod>>>,
}

impl SameNode {
    pub fn new(namespaces: &[String]) -> Self {
        Self { namespaces: namespaces.to_vec(), pods: Mutex::default() }
    }

    pub fn add(&self, pod: &Arc<Pod>) {
        if self.allows(&pod.namespace) {
            self.lock().insert((pod.namespace.clone(), pod.name.clone()), pod.clone());
        }
    }

    /// Takes a pod away, unless its name belongs to a successor already.
    pub fn remove(&self, pod: &Arc<Pod>) {
        let key = (pod.namespace.clone(), pod.name.clone());
        let mut pods = self.lock();
        if pods.get(&key).is_some_and(|known| known.uid == pod.uid) {
            pods.remove(&key);
        }
    }

    fn allows(&self, namespace: &str) -> bool {
        self.namespaces.iter().any(|n| n == "*" || n == namespace)
    }

    /// The pod behind a candidate, if the client may be joined with it.
    fn find(&self, client: &Pod, candidate: &Candidate) -> Option<Arc<Pod>> {
        let Transport::Hbone { expected, .. } = &candidate.transport else { return None };
        // A waypoint goes on to somebody else: what it is asked for is not its own.
        if self.namespaces.is_empty() || !self.allows(&client.namespace) || candidate.is_waypoint()
        {
            return None;
        }
        let workload = &candidate.workload;
        let key = (workload.namespace.clone(), workload.name.clone());
        let pod = self.lock().get(&key)?.clone();
        // The pod that the tunnel would have found and accepted, and no other of its name.
        expected.contains(&pod.identity).then_some(pod)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(Str, Str), Arc<Pod>>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The server's side of a joined connection.
pub(crate) struct Joined {
    pub(crate) app: TcpStream,
    pub(crate) record: Record,
    pub(crate) live: Live,
}

/// A connection of `client` to a candidate, joined if it may be. `None`: take the tunnel.
pub(crate) async fn join(
    worker: &Worker,
    client: &Pod,
    source: SocketAddr,
    candidate: &Candidate,
    outbound: &Record,
) -> Option<Result<Box<Joined>, Refusal>> {
    let server = worker.same_node.find(client, candidate)?;
    let demanded = {
        let snapshot = worker.shared.store.load();
        let facts = InboundFacts {
            workload: &candidate.workload,
            destination: candidate.target,
            source_ip: source.ip(),
            peer: Some(&client.identity),
            client: None,
        };
        demands_mutual_tls(&snapshot, &facts)
    };
    if demanded {
        return None;
    }
    let peer = Arc::new(client.identity.clone());
    let host = outbound.service.as_ref().map(|s| s.key.hostname.to_string());
    let moved = outbound.moved.clone();
    let mut record = Record::joined(&server, source, peer, candidate.target, moved);
    worker.recorder.trace(&mut record, outbound.trace.as_ref().map(|trace| trace.context));
    Some(match inbound::admit_joined(worker, &server, &mut record, host).await {
        Ok((live, app)) => Ok(Box::new(Joined { app, record, live })),
        Err(refusal) => {
            record.refuse(refusal.clone());
            worker.recorder.write(record);
            Err(refusal)
        }
    })
}

/// What may end a connection before its time says why, or goes without a word.
type Word = Result<Refusal, RecvError>;

/// Relays until both ends are done or one of the two words comes, and writes the server's line. `stop` is the client's.
pub(crate) fn relay(
    worker: &Worker,
    client: TcpStream,
    joined: Joined,
    stop: Receiver<Refusal>,
) -> Pin<Box<dyn Future<Output = (Ended, Option<Word>)> + Send + '_>> {
    let Joined { app, mut record, live } = joined;
    let counted = worker.recorder.opened(&mut record, true);
    let shared = &worker.shared;
    let (registered, server_stop) =
        worker.connections.register(Arc::new(live), counted, &shared.store, &shared.open);
    let relaying = relay_tcp(client, app, record.moved.clone(), Either(stop, server_stop));
    Box::pin(relaying.map(move |(ended, word)| {
        drop(registered);
        record.ended(match &word {
            Some(Ok(refusal)) => Err(refusal.clone()),
            _ => Ok(from_the_other_side(&ended)),
        });
        worker.recorder.write(record);
        (ended, word)
    }))
}

/// The client's side refused after the server's had said yes.
pub(crate) fn refuse(worker: &Worker, joined: Joined, refusal: Refusal) {
    let mut record = joined.record;
    record.refuse(refusal);
    worker.recorder.write(record);
}

/// The end of a joined connection as its other side sees it.
fn from_the_other_side(ended: &Ended) -> Ended {
    let by = match ended.by {
        EndedBy::Socket => EndedBy::Peer,
        EndedBy::Peer => EndedBy::Socket,
        same => same,
    };
    // The error stays with the side whose socket had it.
    Ended { by, error: None }
}

/// The first word of two that may end a connection.
struct Either<A, B>(A, B);

impl<A: Future + Unpin, B: Future<Output = A::Output> + Unpin> Future for Either<A, B> {
    type Output = A::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<A::Output> {
        match Pin::new(&mut self.0).poll(cx) {
            Poll::Pending => Pin::new(&mut self.1).poll(cx),
            ready => ready,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_turned_around() {
        let check = |by, want| {
            assert_eq!(from_the_other_side(&Ended { by, error: None }).by, want);
        };
        check(EndedBy::Both, EndedBy::Both);
        check(EndedBy::Socket, EndedBy::Peer);
        check(EndedBy::Peer, EndedBy::Socket);
        check(EndedBy::Stopped, EndedBy::Stopped);
    }

    #[test]
    fn nothing_is_joined_unless_listed() {
        let allows = |listed: &[&str], namespace: &str| {
            let listed: Vec<String> = listed.iter().map(|n| (*n).to_owned()).collect();
            SameNode::new(&listed).allows(namespace)
        };
        assert!(!allows(&[], "app"));
        assert!(!allows(&["other"], "app"));
        assert!(allows(&["other", "app"], "app"));
        assert!(allows(&["*"], "app"));
    }
}
