//! DNS for captured pods: names of the mesh are answered here, everything else by the resolver that the pod asked.
//!
//! The decision is `engine::resolve`; [`wire`] knows the bytes. A question that is forwarded goes as it came, with its
//! own id, from a socket of the pod: for the resolver it is as if there were no proxy.
//!
//! Invariants: nothing is remembered between questions, so an answer is as old as the configuration; what the resolver
//! does not answer in time is SERVFAIL, so that clients go on to their next server; a number of questions is under way
//! for each pod and each thread, more are refused the same way.

mod tcp;
mod udp;
pub mod wire;

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use agent::metrics::{DnsMetrics, DnsProtocol, DnsResult, dns_type_name};
use engine::{DnsAnswer, DnsFacts, resolve};
use model::{Snapshot, Str, Workload};
use net::capture::{DNS_LISTENERS, MARK_PROXY, RESOLVER_PORT};
use net::datagram::{Replies, captured};
use net::socket::{ListenOpts, listen};
use tokio::net::{TcpListener, UdpSocket};
use tokio::sync::Semaphore;

use crate::listeners::{Listeners, Role, Share, take_or_open};
use crate::pod::Pod;
use crate::worker::{Worker, accept};
use wire::{Asked, Read};

/// How long the resolver may take. Clients wait five seconds; "try the next server" is worth more while they listen.
const PATIENCE: Duration = Duration::from_millis(4_500);
const _: () = assert!(PATIENCE.as_millis() < 5_000, "clients are gone by then");
/// Questions of one pod that wait for its resolver, on one thread. At a millisecond each that is 256,000 a second; with a
/// dead resolver it is what a busy pod asks before it notices. Each costs a socket and some 2 KiB.
const MAX_WAITING: usize = 256;
/// The same for all pods of a thread: what the limit of open files (20,000 and more) stands beside connections.
pub(crate) const MAX_WAITING_OF_ALL: usize = 4_096;
/// Connections of one pod for questions by TCP, on one thread. Clients use one for a question or a few.
const MAX_CONNECTIONS: usize = 64;

/// Serves the questions of one pod on one thread.
pub(crate) struct Server {
    worker: Arc<Worker>,
    pod: Arc<Pod>,
    network: Str,
    waiting: Arc<Semaphore>,
    connections: Semaphore,
    counted: Mutex<Counted>,
}

/// The counters of the pod's canonical service, as of the workload that was looked at last.
struct Counted {
    workload: Option<Weak<Workload>>,
    metrics: Arc<DnsMetrics>,
}

/// Serves this thread's share of the pod's listeners, and opens what is missing.
pub(crate) fn serve(
    worker: &Arc<Worker>,
    pod: &Arc<Pod>,
    share: &mut Share,
    listeners: &mut Listeners,
) -> io::Result<()> {
    let metrics = worker.recorder.metrics().dns(None);
    let server = Arc::new(Server {
        worker: worker.clone(),
        pod: pod.clone(),
        network: worker.shared.config.network.as_str().into(),
        waiting: Arc::new(Semaphore::new(MAX_WAITING)),
        connections: Semaphore::new(MAX_CONNECTIONS),
        counted: Mutex::new(Counted { workload: None, metrics }),
    });
    for at in DNS_LISTENERS {
        match serve_at(&server, at, share, listeners) {
            // No IPv6 in the kernel: the pod cannot ask by it either.
            Err(e) if at.is_ipv6() && e.raw_os_error() == Some(libc::EAFNOSUPPORT) => {}
            result => result?,
        }
    }
    Ok(())
}

fn serve_at(
    server: &Arc<Server>,
    at: SocketAddr,
    share: &mut Share,
    listeners: &mut Listeners,
) -> io::Result<()> {
    let (ns, ipv6) = (&server.pod.netns, at.is_ipv6());
    let by_udp = Role::Questions { udp: true, ipv6 };
    for fd in take_or_open(share, by_udp, || captured(ns, at, MARK_PROXY))? {
        let socket = Arc::new(UdpSocket::from_std(fd.into())?);
        listeners.add(socket.clone());
        let replies = Replies::open(ns, ipv6, MARK_PROXY)?;
        tokio::spawn(udp::serve(server.clone(), socket, Arc::new(replies)));
    }
    let opts = ListenOpts {
        transparent: true,
        mark: Some(MARK_PROXY),
        reuse_port: true,
        v6only: true,
        ..ListenOpts::default()
    };
    let by_tcp = Role::Questions { udp: false, ipv6 };
    for fd in take_or_open(share, by_tcp, || listen(ns, at, opts))? {
        let listener = Arc::new(TcpListener::from_std(fd.into())?);
        listeners.add(listener.clone());
        let (worker, pod, server) = (server.worker.clone(), server.pod.clone(), server.clone());
        tokio::spawn(accept(worker, pod, listener, move |_, _, accepted| {
            tcp::serve(server.clone(), accepted)
        }));
    }
    Ok(())
}

/// What to do with a message.
enum Decided {
    /// Nothing can be said to it.
    Ignore,
    Answer(Vec<u8>),
    Forward(Question),
}

/// A question on its way to the resolver, for counting and logging.
struct Question {
    metrics: Arc<DnsMetrics>,
    kind: u16,
    protocol: DnsProtocol,
    resolver: SocketAddr,
}

impl Server {
    /// Who is to answer a datagram that the mesh cannot. `None`: it was for nobody but us.
    fn resolver_of(&self, to: SocketAddr) -> Option<SocketAddr> {
        match &self.worker.shared.config.istio {
            Some(seam) => Some(seam.resolver),
            None => Self::is_captured(to).then_some(to),
        }
    }

    /// Only what capture turned around was for a resolver. What the pod sends to the listener itself is not.
    fn is_captured(to: SocketAddr) -> bool {
        to.port() == RESOLVER_PORT && !to.ip().is_loopback()
    }

    /// Decides about a message, and counts it.
    fn decide(&self, packet: &[u8], protocol: DnsProtocol, resolver: SocketAddr) -> Decided {
        let read = wire::read(packet);
        if matches!(read, Read::Ignore) {
            return Decided::Ignore;
        }
        // 0 is no type: what cannot be read is counted as other.
        let kind = wire::question_type(packet).unwrap_or(0);
        let snapshot = self.worker.shared.store.load();
        let metrics = self.metrics(&snapshot);
        metrics.asked(kind, protocol);
        let question = Question { metrics, kind, protocol, resolver };
        let Read::Addresses(asked) = read else { return Decided::Forward(question) };
        if !self.worker.shared.config.dns_proxy {
            return Decided::Forward(question);
        }
        let answer = self.resolve(&snapshot, &asked);
        let limit = (protocol == DnsProtocol::Tcp).then_some(wire::MAX_MESSAGE);
        let domain = &self.worker.shared.config.cluster_domain;
        let Some(bytes) = wire::answer(&asked, &answer, domain, limit) else {
            return Decided::Forward(question);
        };
        self.answered(&question, &asked, &answer);
        Decided::Answer(bytes)
    }

    fn resolve(&self, snapshot: &Snapshot, asked: &Asked) -> DnsAnswer {
        let facts = DnsFacts {
            namespace: &self.pod.namespace,
            network: &self.network,
            cluster_domain: &self.worker.shared.config.cluster_domain,
            name: &asked.name,
            ipv6: asked.ipv6,
        };
        resolve(snapshot, &facts, self.worker.random())
    }

    fn answered(&self, question: &Question, asked: &Asked, answer: &DnsAnswer) {
        let (result, service, endpoints) = match answer {
            DnsAnswer::Addresses { service, addresses, .. } => {
                (DnsResult::Mesh, service, addresses.len())
            }
            DnsAnswer::NoData { service } => (DnsResult::NoData, service, 0),
            DnsAnswer::Forward => return,
        };
        question.metrics.ended(result);
        tracing::debug!(
            target: "dns",
            {
            src.workload = %self.pod.name,
            src.namespace = %self.pod.namespace,
            query = dns_type_name(question.kind),
            protocol = question.protocol.as_str(),
            domain = %asked.name,
            resolver = %question.resolver,
            result = result.as_str(),
            service = %service.key,
            endpoints,
            },
            "answered"
        );
    }

    /// Counts and logs the end of a forwarded question, and returns what the pod hears.
    fn forwarded(
        &self,
        question: &Question,
        packet: &[u8],
        took: Duration,
        outcome: Result<Vec<u8>, String>,
    ) -> Option<Vec<u8>> {
        let Question { metrics, kind, protocol, resolver } = question;
        metrics.upstream_ended(*kind, *protocol, took, outcome.is_ok());
        let result = if outcome.is_ok() { DnsResult::Forwarded } else { DnsResult::Failed };
        self.ended(question, packet, result, outcome.as_ref().err().map(String::as_str));
        tracing::trace!(target: "dns", %resolver, ?took, "forwarded");
        outcome.ok().or_else(|| wire::failure(packet))
    }

    /// Too many questions wait for the resolver already.
    fn refused(&self, question: &Question, packet: &[u8]) -> Option<Vec<u8>> {
        self.ended(question, packet, DnsResult::Limit, Some("too many questions wait"));
        wire::failure(packet)
    }

    fn ended(&self, question: &Question, packet: &[u8], result: DnsResult, error: Option<&str>) {
        question.metrics.ended(result);
        tracing::debug!(
            target: "dns",
            {
            src.workload = %self.pod.name,
            src.namespace = %self.pod.namespace,
            query = dns_type_name(question.kind),
            protocol = question.protocol.as_str(),
            domain = wire::question_name(packet),
            resolver = %question.resolver,
            result = result.as_str(),
            error,
            },
            "forwarded"
        );
    }

    /// The counters for this pod. They change only when its workload does.
    fn metrics(&self, snapshot: &Snapshot) -> Arc<DnsMetrics> {
        let workload = self.pod.workload(snapshot);
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        let same = match (&counted.workload, workload) {
            (Some(known), Some(now)) => std::ptr::eq(known.as_ptr(), Arc::as_ptr(now)),
            (None, None) => true,
            _ => false,
        };
        if !same {
            let names = workload.map(|w| (&w.canonical_name, &w.canonical_revision));
            *counted = Counted {
                workload: workload.map(Arc::downgrade),
                metrics: self.worker.recorder.metrics().dns(names),
            };
        }
        counted.metrics.clone()
    }
}
