//! Tunnels over real loopback sockets: bytes, half-close, resets, identities, the pool.
#![allow(clippy::unwrap_used, reason = "test")]

mod support;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use hbone::{
    Authority, ConnectHeaders, Credentials, EndedBy, Pool, PoolKey, PoolLimits, ServerTunnel,
    TunnelError, relay_tunnel,
};
use http::StatusCode;
use model::{Identity, Reason, WorkloadUid};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use support::{Ca, id};

/// An HBONE server that connects every CONNECT to its authority. Counts tunnels.
async fn server(credentials: Arc<Credentials>, refuse: bool) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let tunnels = Arc::new(AtomicUsize::new(0));
    let count = tunnels.clone();
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let config = credentials.server_config();
            let count = count.clone();
            tokio::spawn(async move {
                let Ok(mut tunnel) = ServerTunnel::accept(tcp, config).await else { return };
                count.fetch_add(1, Ordering::SeqCst);
                while let Some(Ok(incoming)) = tunnel.next().await {
                    tokio::spawn(async move {
                        let Ok(Authority::Address(target)) = incoming.target else {
                            return incoming.refuse(StatusCode::BAD_REQUEST, Reason::BadRequest);
                        };
                        if refuse {
                            return incoming.refuse(StatusCode::UNAUTHORIZED, Reason::PolicyDeny);
                        }
                        let Ok(app) = TcpStream::connect(target).await else {
                            return incoming
                                .refuse(StatusCode::SERVICE_UNAVAILABLE, Reason::ConnectFailed);
                        };
                        let (send, receive) = incoming.accept(None).unwrap();
                        relay_tunnel(
                            app,
                            send,
                            receive,
                            Arc::default(),
                            std::future::pending::<()>(),
                        )
                        .await;
                    });
                }
            });
        }
    });
    (address, tunnels)
}

/// Reads everything, then answers with it twice: proves half-close in both directions.
async fn double_echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut tcp, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut all = Vec::new();
                if tcp.read_to_end(&mut all).await.is_ok() {
                    let _ = tcp.write_all(&all).await;
                    let _ = tcp.write_all(&all).await;
                }
            });
        }
    });
    address
}

fn key(gateway: SocketAddr, expected: &str) -> PoolKey {
    PoolKey {
        source: "a".into(),
        source_identity: id("client"),
        destination: WorkloadUid("b".into()),
        gateway,
        expected: vec![id(expected)],
    }
}

/// One application connection through a tunnel: writes `data`, ends, and returns the answer.
async fn call(
    pool: &Pool,
    key: &PoolKey,
    credentials: &Credentials,
    target: SocketAddr,
    data: Vec<u8>,
) -> Result<Vec<u8>, TunnelError> {
    let gateway = key.gateway;
    let stream = pool
        .open(key, credentials, target, &ConnectHeaders::default(), || TcpStream::connect(gateway))
        .await?;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut app = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (proxy, _) = listener.accept().await.unwrap();
    let (send, receive, slot) = stream.split();
    let relay = tokio::spawn(async move {
        relay_tunnel(proxy, send, receive, Arc::default(), std::future::pending::<()>()).await;
        drop(slot);
    });
    let (mut read, mut write) = app.split();
    let mut answer = Vec::new();
    let (_, got) = tokio::join!(
        async {
            write.write_all(&data).await.unwrap();
            write.shutdown().await.unwrap();
        },
        read.read_to_end(&mut answer)
    );
    got.unwrap();
    relay.await.unwrap();
    Ok(answer)
}

#[tokio::test]
async fn bytes_arrive_whole_and_half_close_is_kept() {
    let ca = Ca::new();
    let (gateway, tunnels) = server(ca.credentials(&id("server")), false).await;
    let target = double_echo().await;
    let pool = Pool::new(PoolLimits::default());
    let client = ca.credentials(&id("client"));
    for size in [0_usize, 1, 100, 4095, 4096, 16384, 70_000, 1 << 20, 9 << 20] {
        let data: Vec<u8> = (0..size).map(|i| u8::try_from(i * 7 % 251).unwrap()).collect();
        let answer =
            call(&pool, &key(gateway, "server"), &client, target, data.clone()).await.unwrap();
        assert_eq!(answer.len(), 2 * size);
        assert!(answer[..size] == data && answer[size..] == data, "{size} bytes differ");
    }
    assert_eq!(tunnels.load(Ordering::SeqCst), 1, "one tunnel carries all");
}

/// The server end learns for whom a stream is, apart from what else the peer says, and stream by stream.
#[tokio::test]
async fn a_claim_belongs_to_its_stream() {
    let ca = Ca::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let gateway = listener.local_addr().unwrap();
    let config = ca.credentials(&id("server")).server_config();
    let heard = tokio::spawn(async move {
        let (tcp, _) = listener.accept().await.unwrap();
        let mut tunnel = ServerTunnel::accept(tcp, config).await.unwrap();
        let mut heard = Vec::new();
        while let Some(Ok(incoming)) = tunnel.next().await {
            assert_eq!(incoming.headers.client, None);
            heard.push(incoming.claim.clone().unwrap().map(|id| id.service_account.to_string()));
            incoming.refuse(StatusCode::UNAUTHORIZED, Reason::PolicyDeny);
        }
        heard
    });
    let pool = Pool::new(PoolLimits::default());
    let credentials = ca.credentials(&id("waypoint"));
    let key = key(gateway, "server");
    for client in [Some("a"), None, Some("b")] {
        let headers = ConnectHeaders { client: client.map(id), ..ConnectHeaders::default() };
        let target = "10.0.0.1:80".parse().unwrap();
        let opened =
            pool.open(&key, &credentials, target, &headers, || TcpStream::connect(gateway)).await;
        assert!(matches!(opened, Err(TunnelError::Refused { status: 401, .. })), "{opened:?}");
    }
    drop(pool);
    let heard = heard.await.unwrap();
    assert_eq!(heard, [Some("a".to_owned()), None, Some("b".to_owned())]);
}

#[tokio::test]
async fn many_streams_share_and_spread() {
    let ca = Ca::new();
    let (gateway, tunnels) = server(ca.credentials(&id("server")), false).await;
    let target = double_echo().await;
    let pool = Pool::new(PoolLimits { streams: 10, ..PoolLimits::default() });
    let client = ca.credentials(&id("client"));
    let key = key(gateway, "server");
    let calls = (0..60).map(|i| call(&pool, &key, &client, target, vec![i; 50_000]));
    for answer in futures_util::future::join_all(calls).await {
        assert_eq!(answer.unwrap().len(), 100_000);
    }
    let tunnels = tunnels.load(Ordering::SeqCst);
    assert!((2..=7).contains(&tunnels), "{tunnels} tunnels for 60 streams of at most 10 each");
}

#[tokio::test]
async fn wrong_identities_are_refused_on_both_sides() {
    let (ca, foreign) = (Ca::new(), Ca::new());
    let target = double_echo().await;
    let pool = Pool::new(PoolLimits::default());
    let (gateway, _) = server(ca.credentials(&id("server")), false).await;
    let go = async |key: PoolKey, client: Arc<Credentials>| {
        call(&pool, &key, &client, target, b"x".to_vec()).await
    };
    // The twin that must succeed.
    assert!(go(key(gateway, "server"), ca.credentials(&id("client"))).await.is_ok());

    let other = go(key(gateway, "other"), ca.credentials(&id("client"))).await.unwrap_err();
    assert!(
        matches!(&other, TunnelError::PeerIdentity { found, .. } if found.ends_with("/sa/server")),
        "{other}"
    );

    let (strange, _) = server(foreign.credentials(&id("server")), false).await;
    let unknown = go(key(strange, "server"), ca.credentials(&id("client"))).await.unwrap_err();
    assert!(matches!(unknown, TunnelError::PeerCertificate(_)), "{unknown}");

    let late = ca.with_times(&id("server"), 3630, 7200);
    let (future, _) = server(late, false).await;
    let clock = go(key(future, "server"), ca.credentials(&id("client"))).await.unwrap_err();
    assert!(clock.to_string().contains("clock is at least 1 h 0 min behind"), "{clock}");

    // The server refuses us: with TLS 1.3 we learn of it after our own handshake is done.
    let mut k = key(gateway, "server");
    k.source = "foreign".into();
    assert!(go(k, foreign.credentials(&id("server"))).await.is_err());
    // Not yet valid and expired: the server's clock says so, and ours.
    for (from, until, want) in [
        (3630, 7200, "clock is at least 1 h 0 min behind"),
        (-7200, -3630, "expired 1 h 0 min ago, by this machine's clock too"),
    ] {
        let mut k = key(gateway, "server");
        k.source = want.into();
        let refused = go(k, ca.with_times(&id("client"), from, until)).await.unwrap_err();
        assert_eq!(refused.reason(), Reason::PeerCertificate, "{refused}");
        assert!(refused.to_string().contains(want), "{refused}");
    }
    let mut k = key(gateway, "server");
    k.source = "domain".into();
    let elsewhere = ca.credentials(&Identity::new("other.domain", "shop", "client"));
    assert!(go(k, elsewhere).await.is_err());
}

#[tokio::test]
async fn a_refusal_names_its_reason_and_a_dead_gateway_fails_once_for_all() {
    let ca = Ca::new();
    let pool = Pool::new(PoolLimits::default());
    let client = ca.credentials(&id("client"));
    let target = double_echo().await;
    let (gateway, _) = server(ca.credentials(&id("server")), true).await;
    let refused = call(&pool, &key(gateway, "server"), &client, target, vec![]).await.unwrap_err();
    assert!(
        matches!(&refused, TunnelError::Refused { status: 401, reason: Some(r) } if r == "policy_deny"),
        "{refused}"
    );
    let dead = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let dead_key = key(dead, "server");
    let calls = (0..5).map(|_| call(&pool, &dead_key, &client, target, vec![]));
    for result in futures_util::future::join_all(calls).await {
        assert_eq!(result.unwrap_err().reason(), Reason::ConnectFailed);
    }
}

/// A pod that is made anew under its old name is the same workload with the same identity, in another network: it must
/// not speak through what its predecessor left.
#[tokio::test]
async fn a_new_pod_of_an_old_name_dials_its_own_tunnel() {
    let ca = Ca::new();
    let (gateway, tunnels) = server(ca.credentials(&id("server")), false).await;
    let target = double_echo().await;
    let pool = Pool::new(PoolLimits::default());
    let client = ca.credentials(&id("client"));
    let old = key(gateway, "server");
    let new = PoolKey { source: "a, born later".into(), ..old.clone() };
    call(&pool, &old, &client, target, b"x".to_vec()).await.unwrap();
    call(&pool, &new, &client, target, b"x".to_vec()).await.unwrap();
    assert_eq!(tunnels.load(Ordering::SeqCst), 2);
    pool.forget_source(&old.source);
    assert_eq!(pool.stats().tunnels, 1, "only the old one's is forgotten");
    call(&pool, &new, &client, target, b"x".to_vec()).await.unwrap();
    assert_eq!(tunnels.load(Ordering::SeqCst), 2);
}

/// Forwards to `gateway`. The first connection stops moving once `frozen` is told, and stays open: a machine that is gone.
async fn freezing_way(gateway: SocketAddr, frozen: Arc<tokio::sync::Notify>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        for number in 0.. {
            let (mut near, _) = listener.accept().await.unwrap();
            let frozen = frozen.clone();
            tokio::spawn(async move {
                let mut far = TcpStream::connect(gateway).await.unwrap();
                tokio::select! {
                    _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                    () = frozen.notified(), if number == 0 => std::future::pending::<()>().await,
                }
            });
        }
    });
    address
}

#[tokio::test]
async fn a_tunnel_that_died_without_a_word_is_replaced() {
    let ca = Ca::new();
    let (gateway, tunnels) = server(ca.credentials(&id("server")), false).await;
    let frozen = Arc::new(tokio::sync::Notify::new());
    let key = key(freezing_way(gateway, frozen.clone()).await, "server");
    let target = double_echo().await;
    let pool = Pool::new(PoolLimits::default());
    let client = ca.credentials(&id("client"));
    call(&pool, &key, &client, target, b"first".to_vec()).await.unwrap();
    assert_eq!(tunnels.load(Ordering::SeqCst), 1);
    frozen.notify_waiters();
    let second = call(&pool, &key, &client, target, b"second".to_vec());
    let limit = std::time::Duration::from_secs(8);
    let answer = tokio::time::timeout(limit, second).await.expect("not for ever").unwrap();
    assert_eq!(answer, b"secondsecond");
    assert_eq!(tunnels.load(Ordering::SeqCst), 2, "the dead one is not used again");
    call(&pool, &key, &client, target, b"third".to_vec()).await.unwrap();
    assert_eq!(tunnels.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_slow_application_is_no_dead_tunnel() {
    let ca = Ca::new();
    let (gateway, tunnels) = server(ca.credentials(&id("server")), false).await;
    let pool = Pool::new(PoolLimits::default());
    let client = ca.credentials(&id("client"));
    let key = key(gateway, "server");
    let target = double_echo().await;
    call(&pool, &key, &client, target, b"first".to_vec()).await.unwrap();
    // Takes no connection: the backlog is full, and the kernel drops what comes on top.
    let full = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    full.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    full.listen(0).unwrap();
    let slow = full.local_addr().unwrap().as_socket().unwrap();
    let _waiting = TcpStream::connect(slow).await.unwrap();
    let asked = call(&pool, &key, &client, slow, b"x".to_vec());
    let limit = std::time::Duration::from_secs(4);
    assert!(tokio::time::timeout(limit, asked).await.is_err(), "nobody answers");
    assert_eq!(tunnels.load(Ordering::SeqCst), 1, "the tunnel was not to blame");
}

/// What a burst needed is given back soon; the last tunnel of a key stays for the next caller.
#[tokio::test]
async fn spare_tunnels_are_closed_soon() {
    let ca = Ca::new();
    let (gateway, _) = server(ca.credentials(&id("server")), false).await;
    let target = double_echo().await;
    let pool = Pool::new(PoolLimits { streams: 1, ..PoolLimits::default() });
    let client = ca.credentials(&id("client"));
    let key = key(gateway, "server");
    let calls = (0..4).map(|i| call(&pool, &key, &client, target, vec![i; 50_000]));
    for answer in futures_util::future::join_all(calls).await {
        answer.unwrap();
    }
    let burst = pool.stats();
    assert!(burst.tunnels > 1 && burst.streams == 0, "{burst:?}");
    let after = |seconds| {
        pool.sweep(std::time::Instant::now() + std::time::Duration::from_secs(seconds));
        pool.stats().tunnels
    };
    assert_eq!(after(1), burst.tunnels, "not at once: the next burst may be near");
    assert_eq!(after(11), 1);
    assert_eq!(after(301), 0);
}

/// Answers the first CONNECT with `answer` and its end. At the second it resets the first with NO_ERROR, which says that
/// it wants nothing more, and then refuses: who hears the refusal has heard of the reset.
async fn finishing_server(credentials: Arc<Credentials>, answer: Vec<u8>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (tcp, _) = listener.accept().await.unwrap();
        let mut tunnel = ServerTunnel::accept(tcp, credentials.server_config()).await.unwrap();
        let first = tunnel.next().await.unwrap().unwrap();
        let (mut send, _receive) = first.accept(None).unwrap();
        send.send_data(answer.into(), true).unwrap();
        let second = tunnel.next().await.unwrap().unwrap();
        send.send_reset(h2::Reason::NO_ERROR);
        second.refuse(StatusCode::NOT_FOUND, Reason::BadRequest);
        while tunnel.next().await.is_some() {}
    });
    address
}

#[tokio::test]
async fn a_server_that_has_answered_may_want_nothing_more() {
    let ca = Ca::new();
    let answer: Vec<u8> = (0..200_000_u32).map(|i| u8::try_from(i % 251).unwrap()).collect();
    // The application sends more, or only ends.
    for more in [false, true] {
        let gateway = finishing_server(ca.credentials(&id("server")), answer.clone()).await;
        let key = key(gateway, "server");
        let pool = Pool::new(PoolLimits::default());
        let client = ca.credentials(&id("client"));
        let target = "127.0.0.1:1".parse().unwrap();
        let headers = ConnectHeaders::default();
        let open = || pool.open(&key, &client, target, &headers, || TcpStream::connect(gateway));
        let (send, receive, _slot) = open().await.unwrap().split();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut app = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (proxy, _) = listener.accept().await.unwrap();
        let relay = tokio::spawn(async move {
            relay_tunnel(proxy, send, receive, Arc::default(), std::future::pending::<()>()).await.0
        });
        let mut got = Vec::new();
        app.read_to_end(&mut got).await.unwrap();
        assert!(got == answer, "{} bytes of {}", got.len(), answer.len());
        assert!(open().await.is_err(), "the second is refused");
        if more {
            app.write_all(b"more").await.unwrap();
        }
        drop(app);
        let limit = std::time::Duration::from_secs(10);
        let ended = tokio::time::timeout(limit, relay).await.unwrap().unwrap();
        // What the application still had to say is lost, and said to be; its end alone is not.
        assert_eq!(ended.by, if more { EndedBy::Peer } else { EndedBy::Both });
    }
}

/// A server that says GOAWAY before the first request of each of its first `going` tunnels.
async fn going_server(credentials: Arc<Credentials>, going: usize) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        for number in 0.. {
            let (tcp, _) = listener.accept().await.unwrap();
            let credentials = credentials.clone();
            tokio::spawn(async move {
                let Ok(mut tunnel) = ServerTunnel::accept(tcp, credentials.server_config()).await
                else {
                    return;
                };
                if number < going {
                    tunnel.drain();
                }
                while let Some(Ok(incoming)) = tunnel.next().await {
                    let (mut send, _) = incoming.accept(None).unwrap();
                    send.send_data("hello".into(), true).unwrap();
                }
            });
        }
    });
    address
}

#[tokio::test]
async fn a_peer_that_is_being_replaced_costs_no_stream() {
    let ca = Ca::new();
    let client = ca.credentials(&id("client"));
    let target = "127.0.0.1:1".parse().unwrap();
    // However the GOAWAY meets the request: before, between, or behind it.
    for _ in 0..20 {
        let gateway = going_server(ca.credentials(&id("server")), 1).await;
        let pool = Pool::new(PoolLimits::default());
        let headers = ConnectHeaders::default();
        let key = key(gateway, "server");
        let open = pool.open(&key, &client, target, &headers, || TcpStream::connect(gateway)).await;
        let mut stream = open.unwrap();
        assert_eq!(stream.receive.data().await.unwrap().unwrap(), "hello");
    }
}

/// Serves until told to drain; each tunnel that it has then says GOAWAY.
async fn draining_server(
    credentials: Arc<Credentials>,
) -> (SocketAddr, tokio::sync::watch::Sender<bool>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (drain, drains) = tokio::sync::watch::channel(false);
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            // Tunnels that come later are those of the successor.
            let mut drains = drains.clone();
            drains.mark_unchanged();
            let credentials = credentials.clone();
            tokio::spawn(async move {
                let mut tunnel =
                    ServerTunnel::accept(tcp, credentials.server_config()).await.unwrap();
                let mut held = Vec::new();
                loop {
                    tokio::select! {
                        next = tunnel.next() => match next {
                            Some(Ok(incoming)) => held.push(incoming.accept(None).unwrap()),
                            _ => return,
                        },
                        Ok(()) = drains.changed() => tunnel.drain(),
                    }
                }
            });
        }
    });
    (address, drain)
}

#[tokio::test]
async fn many_tunnels_that_go_at_once_cost_no_stream() {
    let ca = Ca::new();
    let client = ca.credentials(&id("client"));
    let (gateway, drain) = draining_server(ca.credentials(&id("server"))).await;
    // More tunnels than a stream has attempts.
    let pool = Pool::new(PoolLimits { streams: 1, ..PoolLimits::default() });
    let (key, headers) = (key(gateway, "server"), ConnectHeaders::default());
    let target = "127.0.0.1:1".parse().unwrap();
    let open = || pool.open(&key, &client, target, &headers, || TcpStream::connect(gateway));
    let mut old = Vec::new();
    for _ in 0..6 {
        old.push(open().await.unwrap());
    }
    assert_eq!(pool.stats().tunnels, 6);
    // Places are free again, on tunnels that are told to go in this moment.
    old.truncate(1);
    drain.send_replace(true);
    for _ in 0..4 {
        open().await.unwrap();
    }
    // What lives is left alone.
    assert!(futures_util::FutureExt::now_or_never(old[0].receive.data()).is_none());
}
