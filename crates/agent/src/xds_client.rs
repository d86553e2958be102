//! Keeps the configuration in force what the control plane wants: one delta stream, opened again whenever
//! it ends.
//!
//! Invariants: an acknowledgement is sent after the snapshot it speaks of was published; when the stream
//! ends everything held stays in force, and the next stream fetches only what differs; the last good
//! configuration is in force before the control plane has been reached for the first time.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use model::{Change, Snapshot};
use prost::Message;
use prost_types::Struct;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::{Code, Streaming};
use tonic_prost::ProstCodec;
use xds::client::Client;
use xds::codec::Defaults;
use xds::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node};

mod status;

use crate::certs::CertStore;
use crate::channel::{self, ClientCertificate};
use crate::control_plane::{ControlPlane, Login, Proxy};
use crate::disk::{self, Saver};
use crate::metrics::Termination;
use crate::store::ConfigStore;
pub use status::{Refused, XdsPhase, XdsStatus, XdsView};

/// Requests that may wait for the wire: six types at most, each with an answer and a resynchronisation.
const REQUESTS: usize = 32;
/// How long a control plane may take to answer the opening of a stream.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);

/// Puts the last good configuration into force before it returns; the future then keeps it current until `shutdown`
/// says so.
pub fn run_xds(
    control_plane: Arc<ControlPlane>,
    store: Arc<ConfigStore>,
    certs: Arc<CertStore>,
    status: Arc<XdsStatus>,
    shutdown: watch::Receiver<bool>,
) -> impl Future<Output = ()> + Send + use<> {
    let defaults = Defaults { trust_domain: control_plane.trust_domain.clone() };
    let client = Client::new(node(&control_plane), defaults).asking_for(control_plane.kinds);
    let trust_domain = control_plane.trust_domain.to_string();
    let saver = Saver::start(control_plane.state_dir.clone(), trust_domain);
    let mut session = Session { control_plane, store, certs, status, client, saver };
    session.restore();
    run(session, shutdown)
}

async fn run(mut session: Session, mut shutdown: watch::Receiver<bool>) {
    tokio::select! {
        () = session.keep_connected() => {}
        _ = shutdown.wait_for(|stop| *stop) => {}
    }
    // The saver writes what it has when it is dropped: not on this thread, which has a drain to finish.
    let saver = session.saver;
    let _ = tokio::task::spawn_blocking(move || drop(saver)).await;
}

struct Session {
    control_plane: Arc<ControlPlane>,
    store: Arc<ConfigStore>,
    certs: Arc<CertStore>,
    status: Arc<XdsStatus>,
    client: Client,
    saver: Saver,
}

/// Why a stream ended, in words for a person.
struct Ended {
    why: String,
    termination: Termination,
    /// The control plane does not know us.
    unauthenticated: bool,
}

impl Session {
    /// Puts the last good configuration into force.
    fn restore(&mut self) {
        let dir = &self.control_plane.state_dir;
        let last_good = match disk::load(dir, &self.control_plane.trust_domain) {
            Ok(Some(last_good)) => last_good,
            Ok(None) => return,
            Err(e) => return tracing::warn!("no configuration from disk: {e}"),
        };
        let (mut changes, unreadable) = self.client.restore(last_good.resources);
        for error in unreadable {
            tracing::warn!("left out of the configuration on disk: {error}");
        }
        changes.push(Change::SetVersion(last_good.version));
        let snapshot = Snapshot::default().with(changes);
        tracing::info!(version = %last_good.version, ?snapshot, "configuration from disk in force");
        self.store.publish(snapshot);
        self.status.update(|view| {
            view.phase = XdsPhase::FromDisk;
            view.version = last_good.version.to_string();
        });
    }

    async fn keep_connected(&mut self) {
        loop {
            let own = match self.control_plane.login {
                Login::Certificate { .. } => Some(self.own_certificate().await),
                Login::Token(_) => None,
            };
            let Ended { mut why, termination, unauthenticated } = self.stream(own.as_deref()).await;
            if unauthenticated {
                self.not_known(own.as_deref(), &mut why);
            }
            let rand = getrandom::u64().unwrap_or_default();
            let pause = self.client.retry_in(rand);
            tracing::warn!("no configuration stream, next attempt in {pause:?}: {why}");
            self.status.ended(why, termination);
            tokio::time::sleep(pause).await;
        }
    }

    /// The control plane does not take us for who we say we are.
    fn not_known(&self, own: Option<&ClientCertificate>, why: &mut String) {
        if let Login::Token(token) = &self.control_plane.login {
            why.push_str(&format!("; the proxy showed its token ({token})"));
        }
        // A stream also ends because its certificate did; then a newer one is here already.
        let newest = self.certs.client_certificate();
        if own.is_some_and(|own| newest.is_none_or(|newest| newest.serial == own.serial)) {
            self.certs.own_refused();
        }
    }

    /// Waits for the certificate that the control plane wants to see.
    async fn own_certificate(&self) -> Arc<ClientCertificate> {
        let waiting =
            |why| self.status.update(|view| view.error = Some(waiting_for_certificate(why)));
        self.certs.own(waiting).await
    }

    /// One stream from its opening to its end.
    async fn stream(&mut self, own: Option<&ClientCertificate>) -> Ended {
        let (requests, outgoing) = mpsc::channel(REQUESTS);
        let mut incoming = match self.open(own, outgoing).await {
            Ok(incoming) => incoming,
            Err(ended) => return ended,
        };
        self.status.connected(&self.control_plane.xds.address);
        for request in self.client.connect() {
            // Fails only when the stream has ended, and that is said below.
            let _ = requests.send(request).await;
        }
        loop {
            match incoming.message().await {
                Ok(Some(response)) => {
                    for answer in self.apply(response) {
                        let _ = requests.send(answer).await;
                    }
                }
                Ok(None) => {
                    return Ended::because(
                        "the control plane ended the stream",
                        Termination::Complete,
                    );
                }
                Err(status) => return Ended::from(&status),
            }
        }
    }

    async fn open(
        &self,
        own: Option<&ClientCertificate>,
        requests: mpsc::Receiver<DeltaDiscoveryRequest>,
    ) -> Result<Streaming<DeltaDiscoveryResponse>, Ended> {
        let failed = |why: String| Ended::because(why, Termination::ConnectionError);
        let server = &self.control_plane.xds;
        let channel = channel::connect(server, own).await.map_err(|e| failed(e.to_string()))?;
        let mut request = tonic::Request::new(ReceiverStream::new(requests));
        let signed = self.control_plane.sign_in(server, request.metadata_mut());
        signed.map_err(|e| failed(e.to_string()))?;
        let opening = async {
            let mut grpc = Grpc::new(channel).max_decoding_message_size(xds::MAX_RESPONSE_BYTES);
            grpc.ready().await.map_err(|e| failed(channel::explain(&e)))?;
            let codec = ProstCodec::<DeltaDiscoveryRequest, DeltaDiscoveryResponse>::default();
            let path = PathAndQuery::from_static(xds::DELTA_PATH);
            grpc.streaming(request, path, codec).await.map_err(|status| Ended::from(&status))
        };
        match tokio::time::timeout(OPEN_TIMEOUT, opening).await {
            Ok(opened) => opened.map(tonic::Response::into_inner),
            Err(_) => Err(failed(format!(
                "{} does not answer within {} s",
                server.address,
                OPEN_TIMEOUT.as_secs()
            ))),
        }
    }

    /// Puts a response into force; returns what to answer.
    fn apply(&mut self, response: DeltaDiscoveryResponse) -> Vec<DeltaDiscoveryRequest> {
        let type_url = response.type_url.clone();
        let size = response.encoded_len();
        let batch = self.client.handle(response);
        for error in &batch.refused {
            tracing::warn!("refused from the control plane, what was there before stays: {error}");
        }
        for mismatch in &batch.mismatches {
            tracing::error!(resync = mismatch.resync, "{mismatch}");
        }
        let changed = !batch.changes.is_empty();
        if changed {
            let snapshot = self.store.load().with(batch.changes);
            self.store.publish(snapshot);
            self.saver.submit(self.client.held(), self.store.load_full());
        }
        let (refused, mismatches) = (batch.refused.len(), batch.mismatches.len());
        self.status.received(&type_url, size, refused);
        if changed {
            self.status.applied(self.store.load().version(), now());
        }
        self.report(mismatches);
        batch.receipt.answers()
    }

    fn report(&self, mismatches: usize) {
        let version = self.store.load().version();
        let all_refused = self.client.refused();
        let all_refused: Vec<_> = all_refused
            .map(|(kind, name, why)| Refused {
                kind: kind.to_string(),
                name: name.to_string(),
                why: why.to_owned(),
            })
            .take(status::MAX_REFUSED)
            .collect();
        self.status.update(|view| {
            if self.client.is_synced() {
                view.phase = XdsPhase::Synced;
                view.was_synced = true;
            }
            view.version = version.to_string();
            view.responses += 1;
            view.mismatches += mismatches as u64;
            view.refused = all_refused;
            view.disk_error = self.saver.error();
            view.updated_at = now();
        });
    }
}

impl Ended {
    fn because(why: impl Into<String>, termination: Termination) -> Self {
        Self { why: why.into(), termination, unauthenticated: false }
    }
}

impl From<&tonic::Status> for Ended {
    fn from(status: &tonic::Status) -> Self {
        let why = match std::error::Error::source(status) {
            Some(source) => channel::explain(source),
            None => format!("the control plane says: {} ({:?})", status.message(), status.code()),
        };
        let unauthenticated = status.code() == Code::Unauthenticated;
        Self { why, termination: Termination::Error, unauthenticated }
    }
}

fn waiting_for_certificate(why: Option<String>) -> String {
    match why {
        Some(why) => format!("the proxy has no certificate to show to the control plane: {why}"),
        None => "waiting for the proxy's first certificate".to_owned(),
    }
}

/// Who we are, in the words of Istio's control plane.
fn node(control_plane: &ControlPlane) -> Node {
    let text = |s: &str| prost_types::Value {
        kind: Some(prost_types::value::Kind::StringValue(s.to_owned())),
    };
    let ControlPlane { proxy, cluster, network, trust_domain, .. } = control_plane;
    let Proxy { node, pod, namespace, service_account, ip, metadata } = proxy;
    // The control plane wants an address; it means nothing for a node's proxy.
    let ip = ip.map_or_else(|| "0.0.0.0".to_owned(), |ip| ip.to_string());
    let own = [
        ("NAME", pod.as_str()),
        ("NAMESPACE", namespace),
        ("SERVICE_ACCOUNT", service_account),
        ("INSTANCE_IPS", &ip),
        ("NODE_NAME", node),
        ("CLUSTER_ID", &**cluster),
        ("NETWORK", &**network),
        ("TRUST_DOMAIN", &**trust_domain),
    ];
    let more = metadata.iter().map(|(key, value)| (key.as_str(), value.as_str()));
    let fields: BTreeMap<_, _> =
        more.chain(own).map(|(key, value)| (key.to_owned(), text(value))).collect();
    Node {
        // type~address~name.namespace~domain
        id: format!("ztunnel~{ip}~{pod}.{namespace}~{namespace}.svc.cluster.local"),
        cluster: "ztunnel".to_owned(),
        metadata: Some(Struct { fields }),
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests;
