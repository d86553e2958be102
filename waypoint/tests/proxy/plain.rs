//! Requests without a tunnel.

use std::net::SocketAddr;
use std::sync::Arc;

use model::http::Protocol;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use waypoint::plain::{Entry, start_workers};

use crate::world::*;

/// What a plain client reads until its connection ends.
async fn ask(world: &World, to: SocketAddr) -> String {
    let entry = Entry { client: Arc::new(id("client")), to };
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let at = start_workers(any, world.workers.clone(), &entry).unwrap();
    let mut stream = TcpStream::connect(at).await.unwrap();
    let request = b"GET /a HTTP/1.1\r\nhost: web.shop\r\nconnection: close\r\n\r\n";
    stream.write_all(request).await.unwrap();
    let mut answer = String::new();
    // One that is not let in is reset.
    let read = tokio::time::timeout(PATIENCE, stream.read_to_string(&mut answer)).await.unwrap();
    read.map_or_else(|_| String::new(), |_| answer)
}

#[tokio::test]
async fn a_plain_client_is_served_in_the_name_it_was_given() {
    let world = World::new(Protocol::Http);
    let web = world.echo("web", "web").await;
    let answer = ask(&world, WEB).await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(answer.contains("GET /a HTTP/1.1\n"), "{answer}");
    let connects = web.seen.connects();
    assert_eq!(connects[0].for_whom, Some(id("client").to_string()));
}

#[tokio::test]
async fn a_plain_client_reaches_nothing_that_is_not_bound_here() {
    let world = World::new(Protocol::Http);
    let answer = ask(&world, SocketAddr::from(([10, 96, 0, 99], 80))).await;
    assert_eq!(answer, "");
    world.line(&["reason=\"not_bound\""]).await;
}
