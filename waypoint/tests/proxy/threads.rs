//! One tunnel and several threads.

use hbone::{ConnectHeaders, TunnelIo};
use model::http::Protocol;

use crate::world::*;

/// Connections of a client, each with a request behind it, in one tunnel.
async fn connections(world: &World, tunnel: &hbone::Tunnel, count: usize) -> Vec<Http1> {
    let mut clients = Vec::new();
    for number in 0..count {
        let stream = tunnel.open(WEB, &ConnectHeaders::default()).await.unwrap();
        let mut client = Http1::new(TunnelIo::opened(stream)).await;
        let answer = client.ask(get(&format!("/{number}"))).await.unwrap();
        assert!(text(&answer).starts_with(&format!("GET /{number} ")));
        clients.push(client);
    }
    assert_eq!(served(world).iter().sum::<usize>(), count);
    clients
}

/// What each thread serves.
fn served(world: &World) -> Vec<usize> {
    world.workers.iter().map(|worker| worker.streams()).collect()
}

#[tokio::test]
async fn a_few_connections_stay_on_their_tunnels_thread() {
    let world = World::with(Protocol::Http, &["--workers", "4"]);
    let _web = world.echo("web", "web").await;
    let tunnel = world.tunnel("client").await;
    let _clients = connections(&world, &tunnel, 16).await;
    let mut served = served(&world);
    served.sort_unstable();
    assert_eq!(served, [0, 0, 0, 16]);
}

#[tokio::test]
async fn a_busy_tunnel_is_served_by_every_thread() {
    let world = World::with(Protocol::Http, &["--workers", "4"]);
    let _web = world.echo("web", "web").await;
    let tunnel = world.tunnel("client").await;
    let mut clients = connections(&world, &tunnel, 90).await;
    let many = served(&world);
    assert!(many.iter().all(|&served| served >= 16), "{many:?}");
    for (number, client) in clients.iter_mut().enumerate() {
        let answer = client.ask(get(&format!("/again/{number}"))).await.unwrap();
        assert!(text(&answer).starts_with(&format!("GET /again/{number} ")));
    }
    // Each thread forgets what it served, whoever has the tunnel.
    drop(clients);
    wait_until("all to be forgotten", || served(&world).iter().all(|&served| served == 0)).await;
}
