//! The way of a change: a file is saved, proxies get the difference, the marker closes it.

use crate::client::*;
use tonic::Code;
use xds::Kind;

const ALL: [Kind; 4] = Kind::OF_NODE;

async fn shop() -> World {
    World::start(&[
        ("ns.yaml", NAMESPACE),
        ("web.yaml", &pod("shop", "web-1", "web", "node-1", "10.244.1.2")),
        ("db.yaml", &pod("shop", "db-1", "db", "node-2", "10.244.2.2")),
        ("policy.yaml", &policy("no-db", "db", 5432)),
    ])
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn policies_come_before_what_they_are_for_and_the_marker_last() {
    let w = shop().await;
    let mut stream = w.proxy("node-1").await.discover().await.unwrap();
    stream.subscribe(&ALL).await;
    let (number, log) = stream.until_marker().await;
    assert_eq!(number, 1);
    assert_eq!(
        log,
        [
            "+Origin/shop/no-db",
            "+Authorization/shop/no-db",
            "+Address/Kubernetes//Pod/shop/db-1",
            "+Address/Kubernetes//Pod/shop/web-1",
        ]
    );
    w.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_saved_file_becomes_its_difference_for_every_proxy() {
    let w = shop().await;
    let mut one = w.proxy("node-1").await.discover().await.unwrap();
    let mut two = w.proxy("node-2").await.discover().await.unwrap();
    for stream in [&mut one, &mut two] {
        stream.subscribe(&ALL).await;
        stream.until_marker().await;
    }
    w.write("policy.yaml", &policy("no-db", "db", 5433));
    for stream in [&mut one, &mut two] {
        assert_eq!(stream.until_marker().await, (2, vec!["+Authorization/shop/no-db".into()]));
    }
    // A new policy arrives before the workload that lists it.
    w.write("more.yaml", &policy("no-web", "web", 80));
    let want = [
        "+Origin/shop/no-web",
        "+Authorization/shop/no-web",
        "+Address/Kubernetes//Pod/shop/web-1",
    ];
    for stream in [&mut one, &mut two] {
        assert_eq!(stream.until_marker().await, (3, want.map(String::from).to_vec()));
    }
    // And leaves after it.
    w.remove("more.yaml");
    let want = [
        "+Address/Kubernetes//Pod/shop/web-1",
        "-Authorization/shop/no-web",
        "-Origin/shop/no-web",
    ];
    for stream in [&mut one, &mut two] {
        assert_eq!(stream.until_marker().await, (4, want.map(String::from).to_vec()));
    }
    w.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_file_keeps_its_last_good_state_and_is_named() {
    let w = shop().await;
    let mut stream = w.proxy("node-1").await.discover().await.unwrap();
    stream.subscribe(&ALL).await;
    stream.until_marker().await;
    let held = stream.held.clone();
    w.write("policy.yaml", "apiVersion: security.istio.io/v1\nkind: [");
    within("diagnosed", async {
        loop {
            let text =
                std::fs::read_to_string(state_file(&w, "diagnostics.json")).unwrap_or_default();
            if text.contains("policy.yaml:3") && text.contains("last_good_in_force") {
                break;
            }
            tokio::task::yield_now().await;
        }
    })
    .await;
    let (_, page) = get(w.running.status, "/debug/diagnostics").await;
    assert!(page.contains("policy.yaml:3"), "{page}");
    // Everything else goes on, and the policy is still there.
    w.write("api.yaml", &pod("shop", "api-1", "api", "node-1", "10.244.1.3"));
    let (number, log) = stream.until_marker().await;
    assert_eq!((number, log), (2, vec!["+Address/Kubernetes//Pod/shop/api-1".to_owned()]));
    assert_eq!(stream.held[&Kind::Authorization], held[&Kind::Authorization]);
    // Mended.
    w.write("policy.yaml", &policy("no-db", "db", 5433));
    assert_eq!(stream.until_marker().await, (3, vec!["+Authorization/shop/no-db".to_owned()]));
    let (_, page) = get(w.running.status, "/debug/diagnostics").await;
    assert!(!page.contains("policy.yaml:3"), "{page}");
    w.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_comes_back_is_sent_what_it_missed() {
    let w = shop().await;
    let svid = w.node("node-1").await;
    let mut stream = w.with(&svid).await.unwrap().discover().await.unwrap();
    stream.subscribe(&ALL).await;
    stream.until_marker().await;
    let held = std::mem::take(&mut stream.held);
    drop(stream);
    w.remove("web.yaml");
    w.write("api.yaml", &pod("shop", "api-1", "api", "node-1", "10.244.1.3"));
    let mut stream = w.with(&svid).await.unwrap().discover().await.unwrap();
    stream.held = held;
    stream.subscribe(&ALL).await;
    let mut log = Vec::new();
    // The file changes may be seen before or after the stream: the sum counts.
    while log.len() < 2 {
        log.extend(stream.until_marker().await.1);
    }
    log.sort();
    assert_eq!(log, ["+Address/Kubernetes//Pod/shop/api-1", "-Address/Kubernetes//Pod/shop/web-1"]);
    w.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_is_counted_and_the_stream_goes_on() {
    let w = shop().await;
    let mut stream = w.proxy("node-1").await.discover().await.unwrap();
    stream.subscribe(&[Kind::Authorization]).await;
    stream.take(Some("cannot read this")).await.unwrap();
    w.write("more.yaml", &policy("no-web", "web", 80));
    stream.take(None).await.unwrap();
    assert_eq!(stream.log, ["+Authorization/shop/no-db", "+Authorization/shop/no-web"]);
    let page = w.running.metrics();
    assert!(page.contains("nacks_total{kind=\"Authorization\"} 1"), "{page}");
    let proxies = w.running.proxies();
    assert_eq!(proxies.len(), 1);
    assert_eq!((&*proxies[0].node, proxies[0].nacks), ("node-1", 1));
    assert_eq!(proxies[0].last_nack.as_deref(), Some("Authorization: cannot read this"));
    w.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_nobody_gets_nothing() {
    let w = shop().await;
    let error = w.stranger().await.discover().await.err().expect("refused");
    assert_eq!(error.code(), Code::Unauthenticated, "{error:?}");
    assert!(error.message().contains("no client certificate"), "{error:?}");
    w.proxy("node-1").await.discover().await.unwrap();
    w.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_of_a_node_are_limited() {
    let w = shop().await;
    let proxy = w.proxy("node-1").await;
    let mut open = Vec::new();
    for _ in 0..4 {
        open.push(proxy.discover().await.unwrap());
    }
    let error = proxy.discover().await.err().expect("refused");
    assert_eq!(error.code(), Code::ResourceExhausted);
    // Another node is not affected; and a closed stream makes room.
    w.proxy("node-2").await.discover().await.unwrap();
    drop(open.pop());
    within("room", async { while proxy.discover().await.is_err() {} }).await;
    w.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_ends_with_the_certificate_that_opened_it() {
    let w = World::start_with(&[], |config| {
        config.leaf_ttl = std::time::Duration::from_secs(5);
    })
    .await;
    let mut stream = w.proxy("node-1").await.discover().await.unwrap();
    stream.subscribe(&ALL).await;
    stream.until_marker().await;
    let error = stream.take(None).await.unwrap_err();
    assert_eq!(error.code(), Code::Unauthenticated);
    assert!(error.message().contains("renewed"), "{error:?}");
    w.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn proxies_learn_that_the_control_plane_stops() {
    let w = shop().await;
    let mut stream = w.proxy("node-1").await.discover().await.unwrap();
    stream.subscribe(&ALL).await;
    stream.until_marker().await;
    let World { running, dir: _dir } = w;
    running.stop().await;
    let error = stream.take(None).await.unwrap_err();
    assert_eq!((error.code(), error.message()), (Code::Unavailable, "the control plane stops"));
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_sent_before_every_folder_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path());
    config.dirs.push(dir.path().join("objects"));
    std::fs::create_dir(dir.path().join("yaml")).unwrap();
    let inputs = istiod_lite::Inputs { epoch: Some(7), ..Default::default() };
    let running = istiod_lite::start(config, inputs).await.unwrap();
    let w = World { dir, running };
    let mut stream = w.proxy("node-1").await.discover().await.unwrap();
    stream.subscribe(&ALL).await;
    within("named", async {
        while !get(w.running.status, "/readyz").await.1.contains("objects") {}
    })
    .await;
    assert_eq!(get(w.running.status, "/readyz").await.0, 503);
    std::fs::create_dir(w.dir.path().join("objects")).unwrap();
    assert_eq!(stream.until_marker().await, (1, vec![]));
    assert_eq!(get(w.running.status, "/readyz").await.0, 200);
    w.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_debug_page_says_who_enforces_what() {
    let w = shop().await;
    let mut stream = w.proxy("node-1").await.discover().await.unwrap();
    stream.subscribe(&ALL).await;
    stream.until_marker().await;
    within("acknowledged", async {
        loop {
            let (status, page) = get(w.running.status, "/debug/config").await;
            let page: serde_json::Value = serde_json::from_str(&page).unwrap();
            assert_eq!((status, &page["config"]["push"]), (200, &"7.1".into()));
            if page["proxies"][0]["acked"] == "7.1" {
                assert_eq!(page["proxies"][0]["node"], "node-1");
                assert_eq!(page["config"]["workloads"], 2);
                break;
            }
        }
    })
    .await;
    assert_eq!(get(w.running.status, "/nonsense").await.0, 404);
    w.running.stop().await;
}
