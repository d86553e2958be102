//! Streams as bytes: what is written arrives, ends stay apart, a cut is no end, and two streams become one.
#![allow(clippy::unwrap_used, reason = "test")]

mod support;

use std::sync::Arc;

use hbone::{ConnectHeaders, EndedBy, ServerTunnel, Transfer, Tunnel, TunnelIo, relay_streams};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};

use support::{Ca, id};

/// A tunnel, and the streams that arrive at its other end.
async fn tunnel() -> (Tunnel, mpsc::UnboundedReceiver<TunnelIo>) {
    let ca = Ca::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let config = ca.credentials(&id("server")).server_config();
    let (arrived, streams) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let (tcp, _) = listener.accept().await.unwrap();
        let mut tunnel = ServerTunnel::accept(tcp, config).await.unwrap();
        while let Some(Ok(incoming)) = tunnel.next().await {
            let (send, receive) = incoming.accept(None).unwrap();
            let _ = arrived.send(TunnelIo::accepted(send, receive));
        }
    });
    let tcp = TcpStream::connect(address).await.unwrap();
    let credentials = ca.credentials(&id("client"));
    let dialed = Tunnel::handshake(tcp, &credentials, &[id("server")]).await.unwrap();
    tokio::spawn(dialed.driver);
    (dialed.tunnel, streams)
}

/// Both ends of a stream.
async fn pair(
    (tunnel, streams): &mut (Tunnel, mpsc::UnboundedReceiver<TunnelIo>),
) -> (TunnelIo, TunnelIo) {
    let target = "10.0.0.1:80".parse().unwrap();
    let ours = tunnel.open(target, &ConnectHeaders::default()).await.unwrap();
    (TunnelIo::opened(ours), streams.recv().await.unwrap())
}

fn data(size: usize) -> Vec<u8> {
    (0..size).map(|i| u8::try_from(i * 7 % 251).unwrap()).collect()
}

#[tokio::test]
async fn bytes_arrive_whole_and_each_end_for_itself() {
    let mut tunnel = tunnel().await;
    for size in [0_usize, 1, 100, 16_384, 70_000, 9 << 20] {
        let (mut ours, mut theirs) = pair(&mut tunnel).await;
        let answer = tokio::spawn(async move {
            let mut all = Vec::new();
            theirs.read_to_end(&mut all).await.unwrap();
            theirs.write_all(&all).await.unwrap();
            theirs.write_all(&all).await.unwrap();
            theirs.shutdown().await.unwrap();
        });
        let sent = data(size);
        let mut all = Vec::new();
        let (mut read, mut write) = tokio::io::split(&mut ours);
        let (_, got) = tokio::join!(
            async {
                write.write_all(&sent).await.unwrap();
                write.shutdown().await.unwrap();
            },
            read.read_to_end(&mut all)
        );
        got.unwrap();
        answer.await.unwrap();
        assert!(all == [&sent[..], &sent[..]].concat(), "{size} bytes differ");
    }
    assert_eq!(tunnel.0.streams(), 0, "streams are counted until they are dropped");
}

#[tokio::test]
async fn a_writer_waits_for_a_reader() {
    let mut tunnel = tunnel().await;
    let (mut ours, mut theirs) = pair(&mut tunnel).await;
    let writing = tokio::spawn(async move {
        let chunk = data(256 << 10);
        let mut taken = 0;
        while taken < 64 << 20 {
            let write = ours.write(&chunk);
            match tokio::time::timeout(std::time::Duration::from_millis(500), write).await {
                Ok(n) => taken += n.unwrap(),
                Err(_) => break,
            }
        }
        (taken, ours)
    });
    let (taken, ours) = writing.await.unwrap();
    assert!(taken < 32 << 20, "{} MiB for nobody", taken >> 20);
    let mut read = vec![0; taken];
    theirs.read_exact(&mut read).await.unwrap();
    drop(ours);
}

#[tokio::test]
async fn what_is_looked_at_is_still_there() {
    let mut tunnel = tunnel().await;
    let (mut ours, mut theirs) = pair(&mut tunnel).await;
    ours.write_all(b"hello").await.unwrap();
    let look = async |io: &mut TunnelIo, seen: usize| {
        std::future::poll_fn(|cx| io.poll_peek(cx, seen).map_ok(|b| b.map(<[u8]>::to_vec))).await
    };
    assert_eq!(look(&mut theirs, 0).await.unwrap().unwrap(), b"hello");
    ours.write_all(b" world").await.unwrap();
    assert_eq!(look(&mut theirs, 5).await.unwrap().unwrap(), b"hello world");
    let mut part = [0; 3];
    theirs.read_exact(&mut part).await.unwrap();
    theirs.unread(part.to_vec().into());
    ours.shutdown().await.unwrap();
    assert!(look(&mut theirs, 11).await.unwrap().is_none(), "it has ended");
    let mut all = String::new();
    theirs.read_to_string(&mut all).await.unwrap();
    assert_eq!(all, "hello world");
}

#[tokio::test]
async fn looking_at_many_small_pieces_does_not_copy_all_of_them_again() {
    let mut tunnel = tunnel().await;
    let (mut ours, mut theirs) = pair(&mut tunnel).await;
    let sent = data(2048);
    let (mut moves, mut last) = (0, std::ptr::null());
    for (seen, byte) in sent.iter().enumerate() {
        ours.write_all(&[*byte]).await.unwrap();
        let at = std::future::poll_fn(|cx| {
            let look = |bytes: Option<&[u8]>| {
                let bytes = bytes.unwrap();
                assert!(bytes == &sent[..=seen]);
                bytes.as_ptr()
            };
            theirs.poll_peek(cx, seen).map_ok(look)
        });
        let at = at.await.unwrap();
        moves += usize::from(at != last);
        last = at;
    }
    assert!(moves < 30, "moved {moves} times");
}

#[tokio::test]
async fn a_cut_is_no_end() {
    let mut tunnel = tunnel().await;
    let (mut ours, theirs) = pair(&mut tunnel).await;
    drop(theirs);
    ours.read_to_end(&mut Vec::new()).await.unwrap_err();
    let (ours, mut theirs) = pair(&mut tunnel).await;
    drop(ours);
    theirs.read_to_end(&mut Vec::new()).await.unwrap_err();
    let (mut ours, mut theirs) = pair(&mut tunnel).await;
    ours.reset();
    theirs.read_to_end(&mut Vec::new()).await.unwrap_err();
}

#[tokio::test]
async fn two_streams_become_one() {
    let (mut before, mut behind) = (tunnel().await, tunnel().await);
    let (mut client, mut first) = pair(&mut before).await;
    let (second, mut server) = pair(&mut behind).await;
    // What was looked at goes along.
    client.write_all(b"head ").await.unwrap();
    std::future::poll_fn(|cx| first.poll_peek(cx, 0).map_ok(|_| ())).await.unwrap();
    let moved = Arc::<Transfer>::default();
    let relaying = relay_streams(first, second, moved.clone(), std::future::pending::<()>());
    let relay = tokio::spawn(relaying);
    let sent = data(5 << 20);
    let echo = tokio::spawn(async move {
        let mut all = Vec::new();
        server.read_to_end(&mut all).await.unwrap();
        server.write_all(&all[5..]).await.unwrap();
        server.shutdown().await.unwrap();
    });
    let mut all = Vec::new();
    let (mut read, mut write) = tokio::io::split(&mut client);
    let (_, got) = tokio::join!(
        async {
            write.write_all(&sent).await.unwrap();
            write.shutdown().await.unwrap();
        },
        read.read_to_end(&mut all)
    );
    got.unwrap();
    assert!(all == sent, "{} of {} bytes", all.len(), sent.len());
    echo.await.unwrap();
    assert_eq!(relay.await.unwrap().0.by, EndedBy::Both);
    assert_eq!(moved.totals(), (sent.len() as u64 + 5, sent.len() as u64));
}

#[tokio::test]
async fn a_relay_passes_on_a_cut_and_can_be_stopped() {
    let (mut before, mut behind) = (tunnel().await, tunnel().await);
    let (mut client, first) = pair(&mut before).await;
    let (second, server) = pair(&mut behind).await;
    let relaying = relay_streams(first, second, Arc::default(), std::future::pending::<()>());
    let relay = tokio::spawn(relaying);
    drop(server);
    client.read_to_end(&mut Vec::new()).await.unwrap_err();
    assert_eq!(relay.await.unwrap().0.by, EndedBy::Peer);
    let (mut client, first) = pair(&mut before).await;
    let (second, mut server) = pair(&mut behind).await;
    let (stop, stopped) = oneshot::channel();
    let relay = tokio::spawn(relay_streams(first, second, Arc::default(), stopped));
    stop.send("word").unwrap();
    let (ended, word) = relay.await.unwrap();
    assert_eq!((ended.by, word), (EndedBy::Stopped, Some(Ok("word"))));
    client.read_to_end(&mut Vec::new()).await.unwrap_err();
    server.read_to_end(&mut Vec::new()).await.unwrap_err();
}

/// Writes until the stream takes no more, and returns when it is gone.
async fn pour(mut io: impl tokio::io::AsyncWrite + Unpin) {
    let chunk = data(256 << 10);
    while io.write_all(&chunk).await.is_ok() {}
}

#[tokio::test]
async fn an_answer_is_whole_though_its_sender_wants_nothing_more() {
    let (mut before, mut behind) = (tunnel().await, tunnel().await);
    let (client, first) = pair(&mut before).await;
    let (second, mut server) = pair(&mut behind).await;
    let relaying = relay_streams(first, second, Arc::default(), std::future::pending::<()>());
    let relay = tokio::spawn(relaying);
    let (mut read, write) = tokio::io::split(client);
    let pouring = tokio::spawn(pour(write));
    let mut some = vec![0; 100];
    server.read_exact(&mut some).await.unwrap();
    let answer = data(200_000);
    server.write_all(&answer).await.unwrap();
    server.shutdown().await.unwrap();
    // While the client still sends: END_STREAM, and then RST_STREAM with NO_ERROR.
    drop(server);
    let mut got = Vec::new();
    read.read_to_end(&mut got).await.unwrap();
    assert!(got == answer, "{} bytes of {}", got.len(), answer.len());
    assert_eq!(relay.await.unwrap().0.by, EndedBy::Peer, "what it did not take is said to be lost");
    pouring.await.unwrap();
}

#[tokio::test]
async fn a_client_that_is_cut_off_ends_a_relay_that_waits_for_the_server() {
    let (mut before, mut behind) = (tunnel().await, tunnel().await);
    let (client, first) = pair(&mut before).await;
    let (second, server) = pair(&mut behind).await;
    let relaying = relay_streams(first, second, Arc::default(), std::future::pending::<()>());
    let relay = tokio::spawn(relaying);
    // Neither reads: both directions wait for room.
    let (client_half, write) = tokio::io::split(client);
    let sending = tokio::spawn(pour(write));
    let (_server_half, write) = tokio::io::split(server);
    let answering = tokio::spawn(pour(write));
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    sending.abort();
    assert!(sending.await.unwrap_err().is_cancelled());
    drop(client_half);
    let limit = std::time::Duration::from_secs(20);
    let (ended, _) = tokio::time::timeout(limit, relay).await.unwrap().unwrap();
    assert_eq!(ended.by, EndedBy::Socket);
    answering.await.unwrap();
}
