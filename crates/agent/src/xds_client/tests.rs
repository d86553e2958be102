//! The configuration stream against a stand-in control plane.

use std::path::Path;

use model::http::{ServiceRoutes, Subset, SubsetKey};
use model::{ConfigVersion, Workload, WorkloadUid};
use tokio::task::JoinHandle;
use xds::any::Any;
use xds::discovery::Resource;
use xds::server::{Connection, Mesh, Resources};
use xds::{Kind, codec};

use super::*;
use crate::testing::{StandIn, Stream, TestCa, control_plane, requested};

/// A proxy process against a control plane.
struct Proxy {
    store: Arc<ConfigStore>,
    status: Arc<XdsStatus>,
    stop: watch::Sender<bool>,
    tasks: Vec<JoinHandle<()>>,
}

impl Proxy {
    fn start(dir: &Path, ca: &TestCa, address: &str) -> Self {
        Self::asking_for(&Kind::OF_NODE, dir, ca, address)
    }

    fn asking_for(kinds: &'static [Kind], dir: &Path, ca: &TestCa, address: &str) -> Self {
        let mut cp = control_plane(dir, ca, address);
        cp.kinds = kinds;
        cp.login = Login::Certificate { bootstrap_token: Some("token".to_owned()) };
        let cp = Arc::new(cp);
        let (store, status) = (Arc::new(ConfigStore::default()), Arc::new(XdsStatus::default()));
        let certs = CertStore::new(cp.clone());
        let (stop, stopped) = watch::channel(false);
        let renewing = tokio::spawn(certs.clone().run(stopped.clone()));
        let streaming = tokio::spawn(run_xds(cp, store.clone(), certs, status.clone(), stopped));
        Self { store, status, stop, tasks: vec![renewing, streaming] }
    }

    async fn stop(self) {
        self.stop.send_replace(true);
        for task in self.tasks {
            task.await.unwrap();
        }
    }

    fn has(&self, uid: &str) -> bool {
        self.store.load().workload(&WorkloadUid(uid.into())).is_some()
    }

    async fn wait_for(&self, uid: &str) {
        let uid = WorkloadUid(uid.into());
        let found =
            self.store.wait_for(|s| s.workload(&uid).cloned(), Duration::from_secs(20)).await;
        assert!(found.is_some(), "{:?}", self.status.view());
    }
}

async fn stand_in(ca: &Arc<TestCa>) -> StandIn {
    let signer = ca.clone();
    StandIn::start(ca, move |_, request| {
        let now = crate::testing::now();
        Ok(signer.sign(&request.csr, &requested(&request), now - 60, now + 3600))
    })
    .await
}

fn address(name: &str, value: Vec<u8>) -> Resource {
    let value = value.into();
    Resource {
        name: name.to_owned(),
        version: "1".to_owned(),
        resource: Some(Any { type_url: Kind::Address.type_url().to_owned(), value }),
        aliases: Vec::new(),
    }
}

fn workload(name: &str) -> Resource {
    address(name, codec::encode_workload(&Workload::named(name, "ns", name)).encode_to_vec())
}

fn response(nonce: &str, resources: Vec<Resource>) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        type_url: Kind::Address.type_url().to_owned(),
        nonce: nonce.to_owned(),
        resources,
        ..Default::default()
    }
}

/// Answers a stream as a control plane does, until the proxy or the test ends it.
async fn serve(
    mut stream: Stream,
    subscriptions: Vec<DeltaDiscoveryRequest>,
    desired: Arc<Resources>,
) {
    let mut connection = Connection::new(desired);
    for request in subscriptions {
        connection.request(request).unwrap();
    }
    loop {
        while let Some(response) = connection.next_response() {
            if stream.responses.send(Ok(response)).await.is_err() {
                return;
            }
        }
        match stream.requests.message().await {
            Ok(Some(request)) => drop(connection.request(request).unwrap()),
            _ => return,
        }
    }
}

fn mesh(number: u64, names: &[&str]) -> Arc<Resources> {
    let named = |name: &&str| Arc::new(Workload::named(*name, "ns", *name));
    let workloads: Vec<_> = names.iter().map(named).collect();
    let push = ConfigVersion { epoch: 9, number };
    Arc::new(Resources::new(push, Mesh { workloads: &workloads, ..Mesh::default() }))
}

#[tokio::test]
async fn acknowledged_means_in_force_and_a_bad_resource_refuses_only_itself() {
    let (ca, dir) = (TestCa::new(), tempfile::tempdir().unwrap());
    let mut server = stand_in(&ca).await;
    let proxy = Proxy::start(dir.path(), &ca, &server.address);
    let (mut stream, subscriptions) = server.subscribed().await;
    let types: Vec<_> = subscriptions.iter().map(|s| s.type_url.as_str()).collect();
    assert_eq!(types, Kind::OF_NODE.map(Kind::type_url));
    assert!(subscriptions[0].node.as_ref().unwrap().id.contains("node-1"));
    assert!(proxy.status.view().connected);

    stream.send(response("1", vec![workload("a")])).await;
    let answer = stream.next().await;
    assert!(proxy.has("a"), "in force before it was acknowledged");
    assert_eq!((answer.response_nonce.as_str(), answer.error_detail), ("1", None));

    stream.send(response("2", vec![workload("b"), address("bad", vec![0xff])])).await;
    let answer = stream.next().await;
    assert!(proxy.has("a") && proxy.has("b"));
    assert_eq!(answer.response_nonce, "2");
    assert!(answer.error_detail.unwrap().message.starts_with("bad: "));
    let refused = proxy.status.view().refused;
    assert_eq!((refused.len(), refused[0].name.as_str()), (1, "bad"));
    proxy.stop().await;
}

#[tokio::test]
async fn a_broken_stream_takes_nothing_away() {
    let (ca, dir) = (TestCa::new(), tempfile::tempdir().unwrap());
    let mut server = stand_in(&ca).await;
    let proxy = Proxy::start(dir.path(), &ca, &server.address);
    let (mut stream, _) = server.subscribed().await;
    stream.send(response("1", vec![workload("a"), workload("b")])).await;
    stream.next().await;
    stream.responses.send(Err(tonic::Status::unavailable("restarting"))).await.unwrap();
    drop(stream);

    // The next stream says what is held, and gets the difference.
    let (stream, subscriptions) = server.subscribed().await;
    assert!(proxy.has("a") && proxy.has("b"));
    let held = &subscriptions[2].initial_resource_versions;
    assert_eq!(held.keys().collect::<Vec<_>>(), ["a", "b"]);
    let serving = tokio::spawn(serve(stream, subscriptions, mesh(3, &["b", "c"])));
    proxy.wait_for("c").await;
    assert!(!proxy.has("a"));
    let settled = async |view: &mut watch::Receiver<XdsView>| {
        view.wait_for(|view| view.version == "9.3").await.unwrap().clone()
    };
    let view = settled(&mut proxy.status.subscribe()).await;
    assert_eq!((view.phase, view.mismatches, view.reconnects), (XdsPhase::Synced, 0, 1));
    proxy.stop().await;
    serving.await.unwrap();
}

#[tokio::test]
async fn a_restarted_proxy_begins_with_what_it_had() {
    let (ca, dir) = (TestCa::new(), tempfile::tempdir().unwrap());
    let mut server = stand_in(&ca).await;
    let proxy = Proxy::start(dir.path(), &ca, &server.address);
    let (stream, subscriptions) = server.subscribed().await;
    let serving = tokio::spawn(serve(stream, subscriptions, mesh(1, &["a", "b"])));
    let mut view = proxy.status.subscribe();
    view.wait_for(|view| view.version == "9.1").await.unwrap();
    proxy.stop().await;
    serving.await.unwrap();

    // The control plane is gone.
    drop(server);
    let proxy = Proxy::start(dir.path(), &ca, "https://127.0.0.1:1");
    proxy.wait_for("a").await;
    let mut view = proxy.status.subscribe();
    let view = view.wait_for(|view| view.error.is_some()).await.unwrap().clone();
    assert_eq!((view.phase, view.version.as_str()), (XdsPhase::FromDisk, "9.1"));
    assert!(view.error.unwrap().contains("cannot connect to https://127.0.0.1:1"));
    assert!(proxy.status.is_ready() && !proxy.status.view().was_synced);
    proxy.stop().await;

    // And back: only the difference travels.
    let mut server = stand_in(&ca).await;
    let proxy = Proxy::start(dir.path(), &ca, &server.address);
    let (stream, subscriptions) = server.subscribed().await;
    let desired = mesh(2, &["b"]);
    let (_, b) = desired.iter(Kind::Address).next().unwrap();
    assert_eq!(subscriptions[2].initial_resource_versions["b"], *b.version);
    let serving = tokio::spawn(serve(stream, subscriptions, desired));
    let mut view = proxy.status.subscribe();
    view.wait_for(|view| view.version == "9.2").await.unwrap();
    assert!(proxy.has("b") && !proxy.has("a"));
    proxy.stop().await;
    serving.await.unwrap();
}

#[tokio::test]
async fn a_damaged_disk_does_not_stop_the_proxy() {
    let (ca, dir) = (TestCa::new(), tempfile::tempdir().unwrap());
    let state = dir.path().join("state");
    std::fs::create_dir(&state).unwrap();
    std::fs::write(state.join("last-good-config"), "AMBIT CONFIG 1\nnonsense").unwrap();
    let mut server = stand_in(&ca).await;
    let proxy = Proxy::start(dir.path(), &ca, &server.address);
    let (stream, subscriptions) = server.subscribed().await;
    assert!(!proxy.status.is_ready());
    let serving = tokio::spawn(serve(stream, subscriptions, mesh(1, &["a"])));
    proxy.wait_for("a").await;
    proxy.stop().await;
    serving.await.unwrap();
}

/// A waypoint fetches routes, serves with them, and has them after a restart without its control plane.
#[tokio::test]
async fn a_waypoint_has_its_routes_from_the_control_plane_and_from_disk() {
    let (ca, dir) = (TestCa::new(), tempfile::tempdir().unwrap());
    let mut server = stand_in(&ca).await;
    let proxy = Proxy::asking_for(&Kind::OF_WAYPOINT, dir.path(), &ca, &server.address);
    let (stream, subscriptions) = server.subscribed_to(&Kind::OF_WAYPOINT).await;
    let types: Vec<_> = subscriptions.iter().map(|s| s.type_url.as_str()).collect();
    assert_eq!(types, Kind::OF_WAYPOINT.map(Kind::type_url));
    let service = model::ServiceKey { namespace: "ns".into(), hostname: "web".into() };
    let key = SubsetKey { service: service.clone(), name: "v1".into() };
    let routes = ServiceRoutes { service: service.clone(), ports: [].into(), sets: [].into() };
    let subset = Subset { key: key.clone(), workloads: Default::default() };
    let push = ConfigVersion { epoch: 9, number: 1 };
    let (all_routes, subsets) = ([Arc::new(routes.clone())], [Arc::new(subset.clone())]);
    let mesh = Mesh { routes: &all_routes, subsets: &subsets, ..Mesh::default() };
    let desired = Arc::new(Resources::new(push, mesh));
    let serving = tokio::spawn(serve(stream, subscriptions, desired));
    let mut view = proxy.status.subscribe();
    let view = view.wait_for(|view| view.version == "9.1").await.unwrap().clone();
    assert_eq!((view.phase, view.mismatches), (XdsPhase::Synced, 0));
    assert_eq!(proxy.store.load().routes(&service).map(|r| &**r), Some(&routes));
    proxy.stop().await;
    serving.await.unwrap();

    drop(server);
    let proxy = Proxy::asking_for(&Kind::OF_WAYPOINT, dir.path(), &ca, "https://127.0.0.1:1");
    let snapshot = proxy.store.load();
    assert_eq!(snapshot.routes(&service).map(|r| &**r), Some(&routes));
    assert_eq!(snapshot.subset(&key).map(|s| &**s), Some(&subset));
    proxy.stop().await;
}
