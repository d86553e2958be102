//! The certificates of this node's workloads, and the proxy's own.
//!
//! One task ([`CertStore::run`]) fetches and renews; everybody else reads a map that is replaced as a
//! whole. A workload's certificate is fetched when the workload appears on the node, and forgotten when
//! the last one with that identity has left.
//!
//! Invariants: a certificate that failed to be renewed stays until it expires, and not a second longer;
//! no identity is asked for more often than its back-off allows, however many wait for it; keys and
//! certificates are in the secret directory before they are used, so that the next process has them too.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use engine::{Begin, Renewals};
use hbone::Credentials;
use model::{Identity, Reason, Refusal};
use rustls::pki_types::CertificateDer;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

mod material;

use crate::ca_client::{CaClient, Issuer};
use crate::channel::{ClientCertificate, span};
use crate::control_plane::ControlPlane;
use crate::metrics::Metrics;
use material::{KeyRequest, Material};

/// What came of asking for an identity.
type Fetched = (Identity, Result<Material, String>);

/// Seconds since the epoch.
type Clock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// See the module.
pub struct CertStore {
    control_plane: Arc<ControlPlane>,
    issuer: Arc<dyn Issuer>,
    clock: Clock,
    /// Whom the proxy itself is, where it needs a certificate to ask for others.
    own: Option<Identity>,
    /// From where the book of renewals counts time.
    begun: Instant,
    /// What data threads read.
    current: ArcSwap<HashMap<Identity, Arc<Credentials>>>,
    entries: Mutex<Entries>,
    /// Wakes the task: something is wanted.
    wanted: Notify,
    /// Counts changes of `current` and of errors.
    changed: watch::Sender<u64>,
    metrics: OnceLock<Metrics>,
}

struct Entries {
    /// Who is wanted, and when to ask.
    renewals: Renewals<Identity>,
    /// The certificates that `renewals` says are held.
    materials: HashMap<Identity, Material>,
    /// Left by an earlier process, until somebody wants them.
    found: HashMap<Identity, Material>,
    /// As last read, to notice a replacement.
    roots: Vec<CertificateDer<'static>>,
}

/// What the admin page shows of a certificate.
#[derive(Clone, Debug, serde::Serialize)]
pub struct CertificateState {
    pub identity: String,
    /// Empty: there is none yet.
    pub serial: String,
    pub not_before: u64,
    pub not_after: u64,
    /// Why the last attempt to get one failed.
    pub error: Option<String>,
}

impl std::fmt::Debug for CertStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CertStore")
            .field("own", &self.own)
            .field("certificates", &self.current.load().len())
            .finish_non_exhaustive()
    }
}

impl CertStore {
    /// Reads what an earlier process left, so that it can be served before the CA answers.
    pub fn new(control_plane: Arc<ControlPlane>) -> Arc<Self> {
        let issuer = Arc::new(CaClient::new(control_plane.clone()));
        Self::with(control_plane, issuer, Arc::new(system_clock))
    }

    /// With another CA and another clock.
    fn with(control_plane: Arc<ControlPlane>, issuer: Arc<dyn Issuer>, clock: Clock) -> Arc<Self> {
        let own = control_plane.own_identity();
        let dir = &control_plane.secret_dir;
        if let Err(e) = material::make_secret_dir(dir) {
            tracing::warn!(
                "no folder for certificates, a restart will need the CA: {}: {e}",
                dir.display()
            );
        }
        let roots = control_plane.roots().unwrap_or_default();
        let found = material::read_all(dir, control_plane.anchors(&roots), clock());
        tracing::debug!("{} certificates found in {}", found.len(), dir.display());
        let entries = Entries {
            renewals: Renewals::new(own.clone()),
            materials: HashMap::new(),
            found: found.into_iter().map(|m| (m.identity().clone(), m)).collect(),
            roots,
        };
        let store = Arc::new(Self {
            control_plane,
            issuer,
            clock,
            own: own.clone(),
            begun: Instant::now(),
            current: ArcSwap::default(),
            entries: Mutex::new(entries),
            wanted: Notify::new(),
            changed: watch::Sender::new(0),
            metrics: OnceLock::new(),
        });
        if let Some(own) = own {
            store.prefetch(&own);
        }
        store
    }

    /// From now on the ends of the certificates are in these metrics.
    pub fn report_to(&self, metrics: Metrics) {
        if self.metrics.set(metrics).is_ok() {
            self.publish(&self.lock());
        }
    }

    /// A workload with this identity is on the node: get its certificate and keep it valid.
    pub fn prefetch(&self, identity: &Identity) {
        self.want(identity, false);
    }

    /// The last workload with this identity has left.
    pub fn forget(&self, identity: &Identity) {
        if self.own.as_ref() == Some(identity) {
            return;
        }
        let mut entries = self.lock();
        entries.found.remove(identity);
        if entries.renewals.forget(identity) {
            entries.materials.remove(identity);
            self.publish(&entries);
        }
        material::remove(&self.control_plane.secret_dir, identity);
    }

    /// The certificate of a wanted identity, unless it has expired. Does not wait for anybody.
    pub fn get(&self, identity: &Identity) -> Option<Arc<Credentials>> {
        let credentials = self.current.load().get(identity).cloned()?;
        // By our clock. One that is not valid *yet* is shown all the same: the peer's clock decides, and
        // its refusal names the clock.
        (credentials.not_after() > (self.clock)()).then_some(credentials)
    }

    /// The certificate, as soon as there is one. An identity that nobody wanted so far is wanted now.
    pub async fn wait(
        &self,
        identity: &Identity,
        timeout: Duration,
    ) -> Result<Arc<Credentials>, Refusal> {
        // Subscribed before the first look: a certificate that comes in between is not missed.
        let mut changed = self.subscribe();
        if let Some(credentials) = self.get(identity) {
            return Ok(credentials);
        }
        self.want(identity, true);
        let search = async {
            loop {
                if let Some(credentials) = self.get(identity) {
                    return Some(credentials);
                }
                changed.changed().await.ok()?;
            }
        };
        let found = tokio::time::timeout(timeout, search).await.ok().flatten();
        found.ok_or_else(|| self.refusal(identity, timeout))
    }

    /// Wakes when a certificate is new or gone, or an attempt failed.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// The proxy's own certificate, for connections to the control plane.
    pub fn client_certificate(&self) -> Option<Arc<ClientCertificate>> {
        self.own_certificate(&self.lock())
    }

    /// The proxy's own certificate, as soon as there is one. `why_not` hears what is in the way.
    pub async fn own(&self, mut why_not: impl FnMut(Option<String>)) -> Arc<ClientCertificate> {
        let mut changed = self.subscribe();
        loop {
            if let Some(own) = self.client_certificate() {
                return own;
            }
            why_not(self.own_error());
            // Not by a change alone: a clock that was wrong and is right again makes a certificate valid that
            // nobody has touched. The channel cannot end: we hold the store.
            let _ = tokio::time::timeout(engine::TICK, changed.changed()).await;
        }
    }

    /// Why the proxy has no certificate of its own, or cannot renew it.
    pub fn own_error(&self) -> Option<String> {
        self.lock().renewals.get(self.own.as_ref()?).and_then(|state| state.error.clone())
    }

    /// The control plane does not accept our certificate: get another one, valid or not.
    pub fn own_refused(&self) {
        self.lock().renewals.own_refused(self.begun.elapsed());
        self.wanted.notify_one();
    }

    /// All wanted certificates, by identity.
    pub fn states(&self) -> Vec<CertificateState> {
        let entries = self.lock();
        let state = |(identity, state): (&Identity, &engine::State)| {
            let held = entries.materials.get(identity).map(|m| &m.credentials);
            CertificateState {
                identity: identity.to_string(),
                serial: held.map(|c| c.serial().to_owned()).unwrap_or_default(),
                not_before: held.map_or(0, |c| c.not_before()),
                not_after: held.map_or(0, |c| c.not_after()),
                error: state.error.clone(),
            }
        };
        let mut states: Vec<_> = entries.renewals.iter().map(state).collect();
        states.sort_by(|a, b| a.identity.cmp(&b.identity));
        states
    }

    /// Fetches and renews until it is stopped.
    pub async fn run(self: Arc<Self>, mut stopped: watch::Receiver<bool>) {
        let mut fetches = JoinSet::new();
        loop {
            let next = self.start_due(&mut fetches);
            tokio::select! {
                _ = stopped.wait_for(|stopped| *stopped) => return,
                Some(done) = fetches.join_next() => self.finish(done),
                () = self.wanted.notified() => {}
                () = tokio::time::sleep_until(next) => self.look_at_roots(),
            }
        }
    }

    fn want(&self, identity: &Identity, urgent: bool) {
        let mut entries = self.lock();
        let entries = &mut *entries;
        if entries.renewals.get(identity).is_none() {
            let found = entries.found.remove(identity);
            let (dates, stale) = (found.as_ref().map(Material::dates), found.as_ref());
            // What an earlier process left under another root serves until the new one is here.
            let stale = stale.is_some_and(|found| found.foreign_root);
            let now = self.begun.elapsed();
            entries.renewals.add(identity.clone(), dates, stale, now, self.random());
            if let Some(found) = found {
                entries.materials.insert(identity.clone(), found);
                self.publish(entries);
            }
        }
        if urgent {
            entries.renewals.urge(identity);
        }
        self.wanted.notify_one();
    }

    /// Starts what is due and may start. Returns when to look again.
    fn start_due(&self, fetches: &mut JoinSet<Fetched>) -> Instant {
        let (now, wall) = (self.begun.elapsed(), (self.clock)());
        let mut entries = self.lock();
        let entries = &mut *entries;
        let Begin { expired, ask, next } = entries.renewals.begin(now, wall, fetches.len());
        if !expired.is_empty() {
            for (identity, not_after) in expired {
                entries.materials.remove(&identity);
                let ago = span(wall.saturating_sub(not_after));
                tracing::error!(%identity, "certificate expired {ago} ago by this machine's clock");
                entries
                    .renewals
                    .explain(&identity, || format!("expired {ago} ago by this machine's clock"));
            }
            self.publish(entries);
        }
        let own = self.own_certificate(entries);
        for identity in ask {
            fetches.spawn(self.fetch(identity, own.clone()));
        }
        self.begun + next
    }

    /// One request to the CA, with a key of its own.
    fn fetch(
        &self,
        identity: Identity,
        own: Option<Arc<ClientCertificate>>,
    ) -> impl Future<Output = Fetched> + Send + use<> {
        let (issuer, clock) = (self.issuer.clone(), self.clock.clone());
        let control_plane = self.control_plane.clone();
        async move {
            let attempt = async {
                let request = KeyRequest::new(&identity).map_err(|e| e.to_string())?;
                let chain = issuer.issue(identity.clone(), request.csr.clone(), own).await;
                let chain = chain.map_err(|e| e.to_string())?;
                let roots = control_plane.roots().map_err(|e| e.to_string())?;
                let anchors = control_plane.anchors(&roots);
                let material = Material::issued(&identity, &request, &chain, anchors, clock())?;
                if let Err(e) = material.write(&control_plane.secret_dir) {
                    tracing::warn!(%identity, "the certificate is not kept for a restart: {e}");
                }
                Ok(material)
            };
            let result = attempt.await;
            (identity, result)
        }
    }

    fn finish(&self, done: Result<Fetched, tokio::task::JoinError>) {
        let (identity, result) = match done {
            Ok(fetched) => fetched,
            Err(e) => return tracing::error!("a certificate request broke off: {e}"),
        };
        let (now, wall, rand) = (self.begun.elapsed(), (self.clock)(), self.random());
        let mut entries = self.lock();
        match result {
            Ok(material) => {
                if !entries.renewals.issued(&identity, material.dates(), now, wall, rand) {
                    // Forgotten meanwhile: so must be what is kept for a restart.
                    return material::remove(&self.control_plane.secret_dir, &identity);
                }
                let seconds = material.credentials.not_after().saturating_sub(wall);
                tracing::info!(%identity, serial = material.credentials.serial(), "certificate for {}", span(seconds));
                entries.materials.insert(identity, material);
            }
            Err(error) => {
                let text = error.clone();
                let Some(pause) = entries.renewals.failed(&identity, error, now, rand) else {
                    return material::remove(&self.control_plane.secret_dir, &identity);
                };
                tracing::warn!(%identity, "no certificate, next attempt in {pause:?}: {text}");
            }
        }
        self.publish(&entries);
    }

    /// A replaced root file means another CA, or a new root of it: everything is fetched again.
    fn look_at_roots(&self) {
        // An unreadable file is reported by who needs it.
        let Ok(roots) = self.control_plane.roots() else { return };
        let mut entries = self.lock();
        if entries.roots == roots {
            return;
        }
        tracing::info!("{} changed: all certificates are renewed", self.control_plane.ca.root);
        entries.roots = roots;
        entries.renewals.renew_all(self.begun.elapsed());
    }

    fn own_certificate(&self, entries: &Entries) -> Option<Arc<ClientCertificate>> {
        let material = entries.materials.get(self.own.as_ref()?)?;
        (material.credentials.not_after() > (self.clock)()).then(|| material.client.clone())
    }

    /// Puts the certificates into force.
    fn publish(&self, entries: &Entries) {
        let held = entries.materials.iter();
        let map: HashMap<_, _> =
            held.map(|(identity, m)| (identity.clone(), m.credentials.clone())).collect();
        if let Some(metrics) = self.metrics.get() {
            let before = self.current.load();
            before
                .keys()
                .filter(|id| !map.contains_key(id))
                .for_each(|id| metrics.forget_certificate(id));
            map.iter().for_each(|(id, c)| metrics.set_certificate(id, c.not_after()));
        }
        self.current.store(Arc::new(map));
        self.changed.send_modify(|changes| *changes += 1);
    }

    fn refusal(&self, identity: &Identity, waited: Duration) -> Refusal {
        let entries = self.lock();
        let error_of = |identity| entries.renewals.get(identity).and_then(|e| e.error.as_deref());
        let may_ask = self.own.is_none() || self.own_certificate(&entries).is_some();
        let own_error = self.own.as_ref().and_then(error_of);
        let why = match (error_of(identity), may_ask, own_error) {
            (Some(error), _, _) => error.to_owned(),
            (None, false, Some(error)) => format!("the proxy itself has none: {error}"),
            (None, false, None) => "the proxy itself has none yet".to_owned(),
            (None, true, _) => "the CA has not answered yet".to_owned(),
        };
        let waited = waited.as_secs_f32();
        let message = format!("no certificate for {identity} within {waited} s: {why}");
        Refusal::new(Reason::CertificateUnavailable, message)
    }

    fn random(&self) -> u64 {
        // Without random numbers there are no keys either; jitter is the least of it.
        getrandom::u64().unwrap_or_else(|_| (self.clock)())
    }

    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn system_clock() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests;
