//! A client's connection: who it is, and what it was let in for.
//!
//! Invariant: what was let in is asked for again when the configuration has changed, so that a Service that is no longer
//! bound to this waypoint is not served on a connection that is older than that.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use agent::trace::SpanContext;
use engine::http::destination;
use engine::{AdmitFacts, Admitted, Authority as Wanted, Candidate, Transport, admit};
use hbone::Authority;
use model::http::Target;
use model::{HBONE_PORT, Identity, Reason, Refusal, Service, Snapshot, TunnelProtocol, Workload};

use crate::config::Waits;
use crate::worker::Worker;

/// See the module.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) worker: Arc<Worker>,
    /// From the client's certificate.
    pub(crate) client: Arc<Identity>,
    /// Where its tunnel comes from.
    pub(crate) source: SocketAddr,
    /// What it asked for.
    pub(crate) authority: Authority,
    /// The span of the client's proxy.
    pub(crate) trace: Option<SpanContext>,
    admission: Mutex<Arc<Admission>>,
}

/// What a connection was let in for, by one state of the configuration.
#[derive(Debug)]
pub(crate) struct Admission {
    generation: u64,
    /// This waypoint.
    pub(crate) own: Arc<Workload>,
    /// The client, if it is who its address says.
    pub(crate) client: Option<Arc<Workload>>,
    pub(crate) to: Admitted,
}

impl Admission {
    pub(crate) fn service(&self) -> Option<&Arc<Service>> {
        match &self.to {
            Admitted::Service { service, .. } => Some(service),
            Admitted::Workload { .. } => None,
        }
    }
}

impl Admission {
    /// Where a connection that is not HTTP goes, and the Service that it was to.
    pub(crate) fn endpoints(
        &self,
        snapshot: &Snapshot,
        call: &Call,
    ) -> Result<(Vec<Candidate>, Option<Arc<Service>>), Refusal> {
        match &self.to {
            Admitted::Workload { workload, port, .. } => {
                Ok((vec![self.pod(call, workload, *port)?], None))
            }
            Admitted::Service { service, port, .. } => {
                let key = service.key.clone();
                let target = Target::Service { service: key, port: *port, subset: None };
                let rand = call.worker.random();
                let to = destination(snapshot, &self.own, &target, rand)?;
                Ok((to.candidates, Some(to.service)))
            }
        }
    }

    /// A pod that was called by its own address.
    pub(crate) fn pod(
        &self,
        call: &Call,
        workload: &Arc<Workload>,
        port: u16,
    ) -> Result<Candidate, Refusal> {
        let Authority::Address(asked) = &call.authority else {
            return Err(Refusal::new(Reason::BadRequest, "a pod is called by its address"));
        };
        let ip = asked.ip().to_canonical();
        let transport = match workload.protocol {
            TunnelProtocol::None => Transport::Plain,
            TunnelProtocol::Hbone | TunnelProtocol::Unreadable => Transport::Hbone {
                gateway: SocketAddr::new(ip, HBONE_PORT),
                expected: vec![workload.identity()],
            },
        };
        Ok(Candidate { workload: workload.clone(), target: SocketAddr::new(ip, port), transport })
    }
}

impl Call {
    /// Lets a connection in, or says why not. A binding that is on its way is waited for.
    pub(crate) async fn admit(
        worker: Arc<Worker>,
        client: Arc<Identity>,
        source: SocketAddr,
        authority: Authority,
        trace: Option<SpanContext>,
    ) -> Result<Self, Refusal> {
        let own = worker.own().await?;
        let store = worker.shared.store.clone();
        let mut changed = store.subscribe();
        let deadline = Instant::now() + Waits::SERVICE;
        let admission = loop {
            let generation = store.generation();
            let judged = judge(&store.load(), generation, &own, &client, source, &authority);
            match judged {
                Err(refusal) if refusal.reason == Reason::NotBound => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if !matches!(tokio::time::timeout(left, changed.changed()).await, Ok(Ok(()))) {
                        return Err(refusal);
                    }
                }
                judged => break judged?,
            }
        };
        let admission = Mutex::new(Arc::new(admission));
        Ok(Self { worker, client, source, authority, trace, admission })
    }

    /// What it asked for, in its own words.
    pub(crate) fn asked_for(&self) -> String {
        match &self.authority {
            Authority::Address(address) => address.to_string(),
            Authority::Host(host, port) => format!("{host}:{port}"),
        }
    }

    /// What it is let in for now.
    pub(crate) fn admission(&self) -> Result<Arc<Admission>, Refusal> {
        let store = &self.worker.shared.store;
        let generation = store.generation();
        let mut held = self.admission.lock().unwrap_or_else(PoisonError::into_inner);
        if held.generation != generation {
            let snapshot = store.load();
            let (namespace, name) = &self.worker.shared.own_name;
            let own = snapshot.workload_named(namespace, name).unwrap_or(&held.own).clone();
            let judged =
                judge(&snapshot, generation, &own, &self.client, self.source, &self.authority)?;
            *held = Arc::new(judged);
        }
        Ok(held.clone())
    }
}

fn judge(
    snapshot: &Snapshot,
    generation: u64,
    own: &Arc<Workload>,
    peer: &Identity,
    source: SocketAddr,
    authority: &Authority,
) -> Result<Admission, Refusal> {
    let authority = match authority {
        Authority::Address(address) => Wanted::Address(*address),
        Authority::Host(host, port) => Wanted::Host(host, *port),
    };
    let to = admit(snapshot, &AdmitFacts { own, peer, authority })?;
    let client = snapshot.workload_at(&own.network, source.ip());
    let client = client.filter(|workload| workload.identity() == *peer).cloned();
    Ok(Admission { generation, own: own.clone(), client, to })
}
