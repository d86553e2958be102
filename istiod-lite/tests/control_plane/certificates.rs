//! Who gets which certificate, over real sockets. Each refusal has a twin that succeeds.

use crate::client::*;
use tonic::{Code, Status};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
const DB: &str = "spiffe://cluster.local/ns/shop/sa/db";
const PROXY: &str = "spiffe://cluster.local/ns/istio-system/sa/ztunnel";

async fn two_nodes() -> World {
    World::start(&[
        ("ns.yaml", NAMESPACE),
        ("web.yaml", &pod("shop", "web-1", "web", "node-1", "10.244.1.2")),
        ("db.yaml", &pod("shop", "db-1", "db", "node-2", "10.244.2.2")),
    ])
    .await
}

fn names(svid: &Svid) -> Vec<String> {
    let (_, leaf) = X509Certificate::from_der(&svid.chain[0]).unwrap();
    let names = leaf.subject_alternative_name().unwrap().unwrap().value;
    names
        .general_names
        .iter()
        .map(|name| match name {
            GeneralName::URI(uri) => (*uri).to_owned(),
            GeneralName::DNSName(dns) => format!("dns:{dns}"),
            other => format!("{other:?}"),
        })
        .collect()
}

fn lifetime(svid: &Svid) -> i64 {
    let (_, leaf) = X509Certificate::from_der(&svid.chain[0]).unwrap();
    leaf.validity().not_after.timestamp() - leaf.validity().not_before.timestamp()
}

#[track_caller]
fn refused(got: Result<Svid, Status>, code: Code, says: &str) {
    match got {
        Ok(svid) => panic!("issued {:?}, should be refused: {says}", names(&svid)),
        Err(status) => {
            assert_eq!(status.code(), code, "{status:?}");
            assert!(status.message().contains(says), "{status:?} should say {says}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_becomes_a_node_certificate_once() {
    let w = two_nodes().await;
    w.token("node-1", "secret");
    let stranger = w.stranger().await;
    let call = Call::default().bearer("secret");
    refused(
        stranger.certificate(Call::default().bearer("guess")).await,
        Code::Unauthenticated,
        "not known",
    );
    refused(
        stranger.certificate(Call::default()).await,
        Code::Unauthenticated,
        "no client certificate",
    );
    // Mistakes do not cost the token.
    refused(stranger.certificate(call.clone().csr("nonsense")).await, Code::InvalidArgument, "PEM");
    refused(
        stranger.certificate(call.clone().csr_uri(WEB)).await,
        Code::InvalidArgument,
        "must be the same",
    );
    refused(
        stranger.certificate(call.clone().impersonate(WEB)).await,
        Code::PermissionDenied,
        "node's own certificate only",
    );
    let svid = stranger.certificate(call.clone().csr_uri(PROXY)).await.unwrap();
    assert_eq!(names(&svid), [PROXY, "dns:node-1.node.ambit.io"]);
    assert_eq!(svid.chain.len(), 3);
    assert_eq!(svid.chain[2], w.roots()[0]);
    refused(stranger.certificate(call).await, Code::Unauthenticated, "used already");
    // The certificate renews itself.
    let renewed = w.with(&svid).await.unwrap().certificate(Call::default()).await.unwrap();
    assert_eq!(names(&renewed), [PROXY, "dns:node-1.node.ambit.io"]);
    w.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_gets_the_identities_of_its_own_pods() {
    let w = two_nodes().await;
    let (one, two) = (w.proxy("node-1").await, w.proxy("node-2").await);
    let web = Call::default().impersonate(WEB);
    let db = Call::default().impersonate(DB);
    let svid = one.certificate(web.clone().csr_uri(WEB)).await.unwrap();
    assert_eq!(names(&svid), [WEB]);
    assert_eq!(names(&two.certificate(db.clone()).await.unwrap()), [DB]);
    refused(two.certificate(web.clone()).await, Code::PermissionDenied, "no pod on node-2 runs as");
    refused(one.certificate(db).await, Code::PermissionDenied, "no pod on node-1 runs as");
    refused(one.certificate(web.csr_uri(DB)).await, Code::InvalidArgument, "must be the same");
    let foreign = Call::default().impersonate("spiffe://elsewhere/ns/shop/sa/web");
    refused(one.certificate(foreign).await, Code::InvalidArgument, "another trust domain");
    let garbled = Call::default().impersonate("web");
    refused(one.certificate(garbled).await, Code::InvalidArgument, "spiffe://TRUST_DOMAIN");
    let page = w.running.metrics();
    assert!(page.contains("refusals_total{reason=\"no_pod_on_node\"} 2"), "{page}");
    assert!(page.contains("certificates_issued_total{kind=\"workload\"} 2"), "{page}");
    w.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workload_certificate_is_no_key_to_the_control_plane() {
    let w = two_nodes().await;
    let node = w.node("node-1").await;
    let proxy = w.with(&node).await.unwrap();
    let workload = proxy.certificate(Call::default().impersonate(WEB)).await.unwrap();
    let as_workload = w.with(&workload).await.unwrap();
    let call = Call::default().impersonate(WEB);
    refused(
        as_workload.certificate(call.clone()).await,
        Code::PermissionDenied,
        "not a node proxy",
    );
    // Not even with somebody's token.
    w.token("node-2", "secret");
    refused(
        as_workload.certificate(call.clone().bearer("secret")).await,
        Code::PermissionDenied,
        "not a node proxy",
    );
    let error = as_workload.discover().await.err().expect("refused");
    assert_eq!(error.code(), Code::PermissionDenied);
    proxy.certificate(call).await.unwrap();
    w.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_from_a_foreign_root_is_not_let_in() {
    let (w, other) = (two_nodes().await, two_nodes().await);
    let foreign = other.node("node-1").await;
    other.with(&foreign).await.unwrap().certificate(Call::default()).await.unwrap();
    // In TLS 1.3 the client learns of the refusal with its first read.
    let refused = match w.with(&foreign).await {
        Err(_) => true,
        Ok(channel) => channel.certificate(Call::default()).await.is_err(),
    };
    assert!(refused);
    within("counted", async {
        while !w.running.metrics().contains("connections_failed_total{reason=\"foreign_root\"} 1") {
            tokio::task::yield_now().await;
        }
    })
    .await;
    // And the other way round: the proxy does not talk to a foreign control plane.
    let error = Channel::open(w.address(), other.roots(), None).await.err().expect("refused");
    assert!(error.contains("UnknownIssuer"), "{error}");
    w.stranger().await;
    w.running.stop().await;
    other.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_comes_a_moment_later_is_waited_for() {
    let w = World::start(&[("ns.yaml", NAMESPACE)]).await;
    let proxy = w.proxy("node-1").await;
    let asked = tokio::spawn({
        let proxy = proxy.clone();
        async move { proxy.certificate(Call::default().impersonate(WEB)).await }
    });
    w.write("web.yaml", &pod("shop", "web-1", "web", "node-1", "10.244.1.2"));
    assert_eq!(names(&asked.await.unwrap().unwrap()), [WEB]);
    // And one that has gone gets no more certificates.
    w.remove("web.yaml");
    within("gone", async {
        while proxy.certificate(Call::default().impersonate(WEB)).await.is_ok() {}
    })
    .await;
    w.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lifetimes_are_shortened_and_never_lengthened() {
    let w = World::start_with(&[], |config| {
        config.leaf_ttl = std::time::Duration::from_secs(1000);
    })
    .await;
    let proxy = w.proxy("node-1").await;
    let check = async |wish: i64, want: i64| {
        let svid = proxy.certificate(Call::default().validity(wish)).await.unwrap();
        // A tenth more, backwards: clocks of peers.
        assert_eq!(lifetime(&svid), want + want / 10, "{wish}");
    };
    check(0, 1000).await;
    check(-5, 1000).await;
    check(100, 100).await;
    check(100_000, 1000).await;
    check(i64::MAX, 1000).await;
    w.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_root_survives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("yaml")).unwrap();
    let start = async || {
        let running = istiod_lite::start(config(dir.path()), Default::default()).await.unwrap();
        within("ready", running.ready()).await;
        running
    };
    let first = start().await;
    first.register_token(&istiod_lite::tokens::registry_line("node-1", "secret")).unwrap();
    let root = std::fs::read(&first.root_cert).unwrap();
    let roots = || {
        use rustls_pki_types::pem::PemObject;
        vec![rustls_pki_types::CertificateDer::from_pem_slice(&root).unwrap()]
    };
    let stranger = Channel::open(first.addresses[0], roots(), None).await.unwrap();
    let svid = stranger.certificate(Call::default().bearer("secret")).await.unwrap();
    first.stop().await;
    let second = start().await;
    let proxy = Channel::open(second.addresses[0], roots(), Some(&svid)).await.unwrap();
    proxy.certificate(Call::default()).await.unwrap();
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_address_cannot_keep_others_out() {
    let w = two_nodes().await;
    let node = w.node("node-1").await;
    let mut idle = Vec::new();
    // Connections that never start their handshake. The kernel accepts all of them.
    for _ in 0..60 {
        idle.push(tokio::net::TcpStream::connect(w.address()).await.unwrap());
    }
    within("refused", async {
        while !w.running.metrics().contains("too_many_from_address") {
            tokio::task::yield_now().await;
        }
    })
    .await;
    // From another address of loopback everything goes on.
    let channel =
        Channel::open_from("127.0.0.2", w.address(), w.roots(), Some(&node)).await.unwrap();
    channel.certificate(Call::default()).await.unwrap();
    drop(idle);
    within("room again", async { while w.with(&node).await.is_err() {} }).await;
    w.running.stop().await;
}
