//! Pods that prove themselves by their token: what they get, and when it ends. Each refusal has a twin that succeeds.

use istiod_lite::pod_tokens::{ended_line, issued_line};
use tonic::{Code, Status};
use xds::Kind;

use crate::client::*;

const WAYPOINT: &str = "spiffe://cluster.local/ns/shop/sa/waypoint";
const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

const GATEWAY: &str = "apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: shop}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
";

async fn shop() -> World {
    let w = World::start(&[
        ("ns.yaml", NAMESPACE),
        ("gateway.yaml", GATEWAY),
        ("waypoint.yaml", &pod("shop", "waypoint-1", "waypoint", "node-1", "10.244.1.2")),
        ("web.yaml", &pod("shop", "web-1", "web", "node-1", "10.244.1.3")),
    ])
    .await;
    tell(&w, &issued_line("shop", "waypoint-1", "waypoint", "node-1", "of-waypoint"));
    tell(&w, &issued_line("shop", "web-1", "web", "node-1", "of-web"));
    w
}

fn tell(w: &World, line: &str) {
    w.running.register_token(line).expect("a line of the registry");
}

#[track_caller]
fn refused<T>(got: Result<T, Status>, code: Code, says: &str) {
    let status = got.err().unwrap_or_else(|| panic!("granted, should be refused: {says}"));
    assert_eq!(status.code(), code, "{status:?}");
    assert!(status.message().contains(says), "{status:?} should say {says}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_gets_its_own_identity_as_often_as_it_asks() {
    let w = shop().await;
    let stranger = w.stranger().await;
    let waypoint = || Call::default().bearer("of-waypoint");
    for call in [waypoint(), waypoint().impersonate(WAYPOINT).csr_uri(WAYPOINT), waypoint()] {
        assert_eq!(stranger.certificate(call).await.unwrap().chain.len(), 3);
    }
    // A pod that is no waypoint gets its own as well, and neither gets the other's.
    let web = || Call::default().bearer("of-web");
    stranger.certificate(web().impersonate(WEB)).await.unwrap();
    let denied = Code::PermissionDenied;
    refused(stranger.certificate(web().impersonate(WAYPOINT)).await, denied, "that identity only");
    refused(stranger.certificate(waypoint().impersonate(WEB)).await, denied, "that identity only");
    let proxy = "spiffe://cluster.local/ns/istio-system/sa/ztunnel";
    refused(
        stranger.certificate(waypoint().impersonate(proxy)).await,
        denied,
        "that identity only",
    );
    let other = waypoint().csr_uri(WEB);
    refused(stranger.certificate(other).await, Code::InvalidArgument, "must be the same");
    // The account of the node proxies, in a pod: not theirs, and nobody else's.
    tell(&w, &issued_line("istio-system", "z", "ztunnel", "node-1", "of-z"));
    let forged = Call::default().bearer("of-z");
    refused(stranger.certificate(forged).await, denied, "not a node proxy");
    let page = w.running.metrics();
    assert!(page.contains("refusals_total{reason=\"pod_for_other\"} 3"), "{page}");
    w.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_ends_with_its_pod() {
    let w = shop().await;
    let stranger = w.stranger().await;
    let ask = async |token: &str| stranger.certificate(Call::default().bearer(token)).await;
    ask("of-waypoint").await.unwrap();
    // Another pod of the name: the newest counts.
    tell(&w, &issued_line("shop", "waypoint-1", "waypoint", "node-1", "newer"));
    refused(ask("of-waypoint").await, Code::Unauthenticated, "not known");
    ask("newer").await.unwrap();
    // That the one before is gone means nothing for it.
    tell(&w, &ended_line("of-waypoint"));
    ask("newer").await.unwrap();
    tell(&w, &ended_line("newer"));
    refused(ask("newer").await, Code::Unauthenticated, "not known");
    refused(ask("guess").await, Code::Unauthenticated, "not known");
    // A line that says nothing is refused, and changes nothing.
    for line in ["{}", "{\"pod\":{}}", "{\"ended_token_sha256\":\"00\"}", "no"] {
        assert!(w.running.register_token(line).is_err(), "{line}");
    }
    ask("of-web").await.unwrap();
    w.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waypoint_reads_the_configuration_and_other_pods_do_not() {
    let w = shop().await;
    let stranger = w.stranger().await;
    let mut stream = stranger.discover_as("of-waypoint").await.unwrap();
    stream.subscribe(&[Kind::Address, Kind::Marker]).await;
    let (_, log) = stream.until_marker().await;
    assert!(log.iter().any(|l| l == "+Address/Kubernetes//Pod/shop/web-1"), "{log:?}");
    let proxies = w.running.proxies();
    assert_eq!(proxies.len(), 1);
    assert_eq!(proxies[0].pod.as_deref(), Some("shop/waypoint-1"));
    let web = w.stranger().await;
    refused(web.discover_as("of-web").await, Code::PermissionDenied, "no waypoint does");
    refused(web.discover_as("guess").await, Code::Unauthenticated, "not known");
    refused(web.discover().await, Code::Unauthenticated, "no client certificate");
    // A node's token is for one certificate.
    w.token("node-1", "of-node");
    refused(web.discover_as("of-node").await, Code::Unauthenticated, "no client certificate");
    // The page says how the waypoint is.
    let (status, page) = get(w.running.status, "/debug/waypoints").await;
    assert_eq!(status, 200);
    let page: serde_json::Value = serde_json::from_str(&page).unwrap();
    assert_eq!(page[0]["name"], "waypoint");
    assert_eq!(page[0]["conditions"][1]["reason"], "Pending", "{page}");
    w.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_ends_with_the_token_and_with_the_gateway() {
    let w = shop().await;
    let stranger = w.stranger().await;
    let open = async || {
        let mut stream = stranger.discover_as("of-waypoint").await.unwrap();
        stream.subscribe(&[Kind::Address, Kind::Marker]).await;
        stream.until_marker().await;
        stream
    };
    let ended = async |mut stream: Discovery| loop {
        if let Err(status) = stream.take(None).await {
            return status;
        }
    };
    let stream = open().await;
    tell(&w, &ended_line("of-waypoint"));
    refused::<()>(Err(ended(stream).await), Code::Unauthenticated, "not known");
    tell(&w, &issued_line("shop", "waypoint-1", "waypoint", "node-1", "of-waypoint"));
    let stream = open().await;
    w.remove("gateway.yaml");
    refused::<()>(Err(ended(stream).await), Code::PermissionDenied, "no waypoint does");
    refused(stranger.discover_as("of-waypoint").await, Code::PermissionDenied, "no waypoint does");
    // Its own identity it keeps.
    stranger.certificate(Call::default().bearer("of-waypoint")).await.unwrap();
    w.running.stop().await;
}
