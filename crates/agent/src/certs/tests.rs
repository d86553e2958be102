//! The certificate store against a CA that counts, fails and lets wait.

use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::future::BoxFuture;
use tokio::sync::Semaphore;

use super::*;
use crate::ca_client::CaError;
use crate::control_plane::Login;
use crate::testing::{StandIn, TestCa, control_plane, now, requested};

/// A CA without sockets: can be broken, can be slow, counts.
struct FakeCa {
    ca: Mutex<Arc<TestCa>>,
    clock: Clock,
    lifetime: u64,
    broken: Mutex<Option<CaError>>,
    asked: Mutex<Vec<(Identity, bool)>>,
    under_way: AtomicUsize,
    most: AtomicUsize,
    /// Requests take a permit each.
    gate: Semaphore,
}

impl Issuer for FakeCa {
    fn issue(
        &self,
        identity: Identity,
        csr: String,
        own: Option<Arc<ClientCertificate>>,
    ) -> BoxFuture<'_, Result<Vec<String>, CaError>> {
        Box::pin(async move {
            self.asked.lock().unwrap().push((identity.clone(), own.is_some()));
            let under_way = self.under_way.fetch_add(1, Ordering::SeqCst) + 1;
            self.most.fetch_max(under_way, Ordering::SeqCst);
            self.gate.acquire().await.unwrap().forget();
            self.under_way.fetch_sub(1, Ordering::SeqCst);
            if let Some(error) = self.broken.lock().unwrap().clone() {
                return Err(error);
            }
            let ca = self.ca.lock().unwrap().clone();
            let now = (self.clock)();
            Ok(ca.sign(&csr, &identity, now, now + self.lifetime))
        })
    }
}

struct World {
    dir: tempfile::TempDir,
    ca: Arc<FakeCa>,
    clock: Clock,
}

impl World {
    fn new(lifetime: u64) -> Self {
        let (start, begun) = (now(), Instant::now());
        let clock: Clock = Arc::new(move || start + begun.elapsed().as_secs());
        let ca = FakeCa {
            ca: Mutex::new(TestCa::new()),
            clock: clock.clone(),
            lifetime,
            broken: Mutex::default(),
            asked: Mutex::default(),
            under_way: AtomicUsize::new(0),
            most: AtomicUsize::new(0),
            gate: Semaphore::new(10_000),
        };
        Self { dir: tempfile::tempdir().unwrap(), ca: Arc::new(ca), clock }
    }

    /// A proxy process.
    fn start(&self) -> Arc<CertStore> {
        let ca = self.ca.ca.lock().unwrap().clone();
        let cp = control_plane(self.dir.path(), &ca, "https://127.0.0.1:1");
        let store = CertStore::with(Arc::new(cp), self.ca.clone(), self.clock.clone());
        let (stop, stopped) = watch::channel(false);
        let running = store.clone();
        tokio::spawn(async move {
            let _stop = stop;
            running.run(stopped).await;
        });
        store
    }

    fn break_ca(&self, broken: bool) {
        *self.ca.broken.lock().unwrap() = broken.then_some(CaError::Timeout);
    }

    fn asked(&self) -> Vec<(Identity, bool)> {
        self.ca.asked.lock().unwrap().clone()
    }

    fn files(&self) -> usize {
        std::fs::read_dir(self.dir.path().join("secrets")).unwrap().count()
    }
}

fn pod(account: &str) -> Identity {
    Identity::new("cluster.local", "ns", account)
}

const LONG: Duration = Duration::from_secs(5);

#[tokio::test(start_paused = true)]
async fn the_own_certificate_comes_first_and_vouches_for_the_others() {
    let world = World::new(86_400);
    let store = world.start();
    store.prefetch(&pod("a"));
    let got = store.wait(&pod("a"), LONG).await.unwrap();
    assert_eq!(got.identity(), &pod("a"));
    assert!(store.client_certificate().is_some());
    let own = Identity::new("cluster.local", "istio-system", "ztunnel");
    assert_eq!(world.asked(), [(own, false), (pod("a"), true)]);
    assert_eq!(store.states().len(), 2);
    assert_eq!(world.files(), 2);

    store.forget(&pod("a"));
    assert!(store.get(&pod("a")).is_none());
    assert_eq!(world.files(), 1);
}

#[tokio::test(start_paused = true)]
async fn eight_at_once_and_those_with_waiting_connections_first() {
    let world = World::new(86_400);
    let store = world.start();
    store.wait(store.own.as_ref().unwrap(), LONG).await.unwrap();
    // From here on nobody gets an answer.
    world.ca.gate.forget_permits(20_000);
    for i in 0..40 {
        store.prefetch(&pod(&format!("pod{i}")));
    }
    let waiting = store.clone();
    let urgent = tokio::spawn(async move { waiting.wait(&pod("urgent"), LONG).await.is_ok() });
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert_eq!(world.ca.under_way.load(Ordering::SeqCst), engine::MAX_REQUESTS);
    // One answer makes room for the urgent one, however many were there before.
    world.ca.gate.add_permits(1);
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert_eq!(world.asked().last().unwrap().0, pod("urgent"));
    world.ca.gate.add_permits(1000);
    assert!(urgent.await.unwrap());
    store.wait(&pod("pod39"), LONG).await.unwrap();
    assert_eq!(world.ca.most.load(Ordering::SeqCst), engine::MAX_REQUESTS);
}

#[tokio::test(start_paused = true)]
async fn renewal_at_half_life_and_the_old_one_until_it_expires() {
    let world = World::new(3600);
    let store = world.start();
    let first = store.wait(&pod("a"), LONG).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1200)).await;
    assert_eq!(store.get(&pod("a")).unwrap().serial(), first.serial());
    tokio::time::sleep(Duration::from_secs(900)).await;
    let second = store.get(&pod("a")).unwrap();
    assert_ne!(second.serial(), first.serial());

    world.break_ca(true);
    tokio::time::sleep(Duration::from_secs(2000)).await;
    let still = store.get(&pod("a")).unwrap();
    assert_eq!(still.serial(), second.serial(), "kept while it is valid");
    let state = store.states().into_iter().find(|s| s.identity == pod("a").to_string()).unwrap();
    assert!(state.error.unwrap().contains("did not answer"));

    tokio::time::sleep(Duration::from_secs(1700)).await;
    assert!(store.get(&pod("a")).is_none(), "not a second longer");
    let refusal = store.wait(&pod("a"), LONG).await.unwrap_err();
    assert_eq!(refusal.reason, Reason::CertificateUnavailable);
    assert!(refusal.message.contains("did not answer"), "{refusal}");

    // The CA comes back; the longest pause is 150 s and 20 %, twice: own certificate, then this one.
    world.break_ca(false);
    tokio::time::sleep(Duration::from_secs(400)).await;
    assert!(store.get(&pod("a")).is_some());
}

#[tokio::test(start_paused = true)]
async fn a_failing_ca_is_asked_with_growing_pauses() {
    let world = World::new(3600);
    world.break_ca(true);
    let store = world.start();
    tokio::time::sleep(Duration::from_secs(600)).await;
    // 0.5 s doubled up to 150 s: about eleven in ten minutes.
    let asked = world.asked();
    assert!((8..16).contains(&asked.len()), "{}", asked.len());
    let refusal = store.wait(&pod("a"), LONG).await.unwrap_err();
    assert!(refusal.message.contains("the proxy itself has none"), "{refusal}");
}

#[tokio::test(start_paused = true)]
async fn a_restarted_proxy_serves_without_the_ca() {
    let world = World::new(86_400);
    let before = world.start().wait(&pod("a"), LONG).await.unwrap();
    world.break_ca(true);
    let store = world.start();
    assert!(store.get(&pod("a")).is_none(), "until a pod wants it");
    store.prefetch(&pod("a"));
    assert_eq!(store.get(&pod("a")).unwrap().serial(), before.serial());
    assert!(store.client_certificate().is_some());

    // After a day nothing of it is used any more.
    tokio::time::sleep(Duration::from_secs(90_000)).await;
    assert!(store.get(&pod("a")).is_none());
    drop(world.start());
    assert_eq!(world.files(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_damaged_secret_is_fetched_again() {
    let world = World::new(86_400);
    let first = world.start();
    first.wait(&pod("a"), LONG).await.unwrap();
    for file in std::fs::read_dir(world.dir.path().join("secrets")).unwrap() {
        std::fs::write(file.unwrap().path(), "-----BEGIN").unwrap();
    }
    let store = world.start();
    store.prefetch(&pod("a"));
    assert!(store.get(&pod("a")).is_none());
    store.wait(&pod("a"), LONG).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_new_root_renews_everything() {
    let world = World::new(86_400);
    let store = world.start();
    let old = store.wait(&pod("a"), LONG).await.unwrap();
    let next = TestCa::new();
    std::fs::write(world.dir.path().join("root-cert.pem"), next.root_pem()).unwrap();
    *world.ca.ca.lock().unwrap() = next;
    tokio::time::sleep(Duration::from_secs(70)).await;
    assert_ne!(store.get(&pod("a")).unwrap().serial(), old.serial());
    assert_eq!(store.states().iter().filter(|s| s.error.is_some()).count(), 0);
}

#[tokio::test(start_paused = true)]
async fn answers_are_checked_before_they_are_used() {
    let check = async |change: &dyn Fn(&World), want: &str| {
        let world = World::new(3600);
        change(&world);
        let store = world.start();
        let refusal = store.wait(store.own.as_ref().unwrap(), LONG).await.unwrap_err();
        assert!(refusal.message.contains(want), "{refusal}");
        assert_eq!(world.files(), 0);
    };
    let refused = |error: CaError| {
        move |world: &World| *world.ca.broken.lock().unwrap() = Some(error.clone())
    };
    check(&refused(CaError::NoCredentials), "new token").await;
    check(&refused(CaError::Answer("nothing in it".to_owned())), "nothing in it").await;
}

/// The CA's clock is ahead by an hour.
#[tokio::test(start_paused = true)]
async fn clocks_that_disagree_are_named() {
    let world = World::new(86_400);
    let behind = world.clock.clone();
    let clock: Clock = Arc::new(move || behind() - 3600);
    let ca = world.ca.ca.lock().unwrap().clone();
    let cp = Arc::new(control_plane(world.dir.path(), &ca, "https://127.0.0.1:1"));
    let store = CertStore::with(cp, world.ca.clone(), clock);
    let (_stop, stopped) = watch::channel(false);
    tokio::spawn(store.clone().run(stopped));
    let refusal = store.wait(store.own.as_ref().unwrap(), LONG).await.unwrap_err();
    assert!(refusal.message.contains("clock is at least 1 h 0 min behind"), "{refusal}");
}

/// This machine's clock is set while the proxy runs, and differs from the CA's from the start.
#[tokio::test(start_paused = true)]
async fn two_minutes_either_way_harm_nobody() {
    const BACKDATE: u64 = 120;
    for skew in [-120_i64, 0, 120] {
        let mut world = World::new(86_400);
        let right = world.clock.clone();
        let off = Arc::new(std::sync::atomic::AtomicI64::new(skew));
        let (by, base) = (off.clone(), right.clone());
        let ours: Clock = Arc::new(move || base().saturating_add_signed(by.load(Ordering::SeqCst)));
        // As the CA does: valid from two minutes before its making.
        let ca = Arc::get_mut(&mut world.ca).unwrap();
        ca.clock = Arc::new(move || right() - BACKDATE);
        world.clock = ours;
        let store = world.start();
        store.wait(&pod("a"), LONG).await.unwrap_or_else(|e| panic!("{skew}: {e}"));
        let asked = world.asked().len();
        // Set forth and back by two minutes: nothing is asked for, nothing is dropped.
        for jump in [120, -120, -240, 0] {
            off.store(skew + jump, Ordering::SeqCst);
            tokio::time::sleep(engine::TICK * 2).await;
            assert!(store.get(&pod("a")).is_some(), "{skew} {jump}");
            assert!(store.client_certificate().is_some(), "{skew} {jump}");
        }
        assert_eq!(world.asked().len(), asked, "{skew}");
        // By two days: it says so.
        off.store(2 * 86_400, Ordering::SeqCst);
        world.break_ca(true);
        tokio::time::sleep(engine::TICK * 2).await;
        let refusal = store.wait(&pod("a"), LONG).await.unwrap_err();
        assert!(store.get(&pod("a")).is_none());
        let words = format!("{refusal} {:?}", store.states());
        assert!(words.contains("clock"), "{words}");
    }
}

/// The clock jumps beyond the end of the certificate and back before anybody has looked: nothing changes in the store,
/// and still who waits for the certificate gets it.
#[tokio::test(start_paused = true)]
async fn a_clock_that_is_right_again_is_noticed() {
    let world = World::new(86_400);
    let (ahead, right) = (Arc::new(AtomicUsize::new(0)), world.clock.clone());
    let by = ahead.clone();
    let clock: Clock = Arc::new(move || right() + by.load(Ordering::SeqCst) as u64);
    let ca = world.ca.ca.lock().unwrap().clone();
    let cp = Arc::new(control_plane(world.dir.path(), &ca, "https://127.0.0.1:1"));
    let store = CertStore::with(cp, world.ca.clone(), clock);
    let (_stop, stopped) = watch::channel(false);
    tokio::spawn(store.clone().run(stopped));
    store.wait(store.own.as_ref().unwrap(), LONG).await.unwrap();
    ahead.store(200_000, Ordering::SeqCst);
    let waiting = store.clone();
    let waiting = tokio::spawn(async move { waiting.own(|_| ()).await });
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!waiting.is_finished(), "expired by this clock");
    ahead.store(0, Ordering::SeqCst);
    let found = tokio::time::timeout(Duration::from_secs(120), waiting).await;
    found.expect("noticed within two looks").unwrap();
}

/// The real CA client: a token for the first certificate, that certificate for all others.
#[tokio::test]
async fn a_token_is_used_once() {
    let ca = TestCa::new();
    let callers = Arc::new(Mutex::new(Vec::new()));
    let (signer, log) = (ca.clone(), callers.clone());
    let server = StandIn::start(&ca, move |caller, request| {
        let identity = requested(&request);
        log.lock().unwrap().push((identity.clone(), caller));
        Ok(signer.sign(&request.csr, &identity, now() - 60, now() + 3600))
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let mut cp = control_plane(dir.path(), &ca, &server.address);
    cp.login = Login::Certificate { bootstrap_token: Some("t0ken".to_owned()) };
    let store = CertStore::new(Arc::new(cp));
    let (_stop, stopped) = watch::channel(false);
    tokio::spawn(store.clone().run(stopped));
    store.wait(&pod("a"), LONG).await.unwrap();
    let own = store.own.clone().unwrap();
    let seen: Vec<_> = callers
        .lock()
        .unwrap()
        .iter()
        .map(|(identity, caller)| {
            (identity.clone(), caller.certificate.clone(), caller.authorization.clone())
        })
        .collect();
    let bearer = Some("Bearer t0ken".to_owned());
    assert_eq!(seen, [(own.clone(), None, bearer), (pod("a"), Some(own), None)]);
}
