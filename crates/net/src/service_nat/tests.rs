//! A node with two pods and an outsider, and Services in every shape.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use super::*;
use crate::netlink::link::VethEnd;
use crate::netlink::route::Route;
use crate::netlink::{addr, link, route};
use crate::nft::tests::{nft, ruleset};
use crate::testing::in_user_ns;

/// Longer than anything here takes; only a failing test waits so long.
const PATIENCE: Duration = Duration::from_secs(10);

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// The address of pod `n` in a family, with a port.
fn pod_at(n: usize, ipv6: bool, port: u16) -> SocketAddr {
    let ip = if ipv6 { format!("fd00::{n}") } else { format!("10.0.0.{n}") };
    SocketAddr::new(ip.parse().unwrap(), port)
}

/// The calling thread's namespace becomes the node, with three pods on routes of their own.
fn node() -> Vec<NetNs> {
    link::up("lo").unwrap();
    prepare(&NetNs::current().unwrap()).unwrap();
    link::add_bridge("own").unwrap();
    link::up("own").unwrap();
    for (ip, prefix) in [("10.0.0.254", 32), ("fd00::ff", 128)] {
        addr::add("own", ip.parse().unwrap(), prefix).unwrap();
        // The node's own connections need some route to a service address before it is translated.
        route::add(&Route::default_of(prefix == 128).dev("own")).unwrap();
    }
    (1..=3).map(pod).collect()
}

fn pod(n: usize) -> NetNs {
    let ns = NetNs::create().unwrap();
    ns.run(skip_address_detection).unwrap().unwrap();
    let host = format!("pod{n}");
    link::add_veth(&VethEnd::here(&host), &VethEnd::inside("eth0", &ns)).unwrap();
    link::up(&host).unwrap();
    // IPv6, unlike IPv4, is asked for an address only on the interface that has it.
    addr::add(&host, "fe80::1".parse().unwrap(), 64).unwrap();
    for (ipv6, gateway, prefix) in [(false, "10.0.0.254", 32), (true, "fe80::1", 128)] {
        let ip = pod_at(n, ipv6, 0).ip();
        ns.run(|| {
            link::up("lo").unwrap();
            link::up("eth0").unwrap();
            addr::add("eth0", ip, prefix).unwrap();
            let gateway = gateway.parse().unwrap();
            route::add(&Route::to(gateway, prefix).dev("eth0")).unwrap();
            route::add(&Route::default_of(ipv6).via(gateway).dev("eth0")).unwrap();
        })
        .unwrap();
        route::add(&Route::to(ip, prefix).dev(&host)).unwrap();
    }
    ns
}

/// Each pod serves its number, on TCP and UDP.
fn serve(pods: &[NetNs]) {
    for (i, ns) in pods.iter().enumerate() {
        for ipv6 in [false, true] {
            let addr = pod_at(i + 1, ipv6, 8080);
            let tcp = ns.run(|| TcpListener::bind(addr).unwrap()).unwrap();
            let udp = ns.run(|| UdpSocket::bind(addr).unwrap()).unwrap();
            let answer = [u8::try_from(i + 1).unwrap()];
            thread::spawn(move || {
                while let Ok((mut stream, _)) = tcp.accept() {
                    let _ = stream.write_all(&answer);
                }
            });
            thread::spawn(move || {
                while let Ok((_, peer)) = udp.recv_from(&mut [0; 8]) {
                    let _ = udp.send_to(&answer, peer);
                }
            });
        }
    }
}

fn ask(ns: &NetNs, protocol: Protocol, to: SocketAddr) -> io::Result<u8> {
    let mut answer = [0];
    ns.run(|| match protocol {
        Protocol::Tcp => {
            let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.read_exact(&mut answer)
        }
        Protocol::Udp => {
            let socket = UdpSocket::bind(if to.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" })?;
            socket.set_read_timeout(Some(PATIENCE))?;
            socket.connect(to)?;
            socket.send(b"?")?;
            socket.recv(&mut answer).map(drop)
        }
    })??;
    Ok(answer[0])
}

#[test]
fn services_reach_their_endpoints() {
    in_user_ns(|| {
        let node_ns = NetNs::current().unwrap();
        let pods = node();
        serve(&pods);
        for ipv6 in [false, true] {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                let vip = at(if ipv6 { "[fd01::1]:80" } else { "10.96.0.1:80" });
                let service = |endpoints: &[usize]| {
                    let endpoints = endpoints.iter().map(|n| pod_at(*n, ipv6, 8080)).collect();
                    vec![ServicePort { vip, protocol, endpoints }]
                };
                // Spread over both, from a pod and from the node itself, also when the pod is its own endpoint.
                program(&node_ns, &service(&[1, 2])).unwrap();
                assert!(is_programmed(&node_ns, &service(&[1, 2])).unwrap());
                for client in [&pods[0], &pods[2], &node_ns] {
                    let mut answers = BTreeMap::new();
                    for _ in 0..60 {
                        *answers.entry(ask(client, protocol, vip).unwrap()).or_insert(0) += 1;
                    }
                    assert_eq!(answers.keys().copied().collect::<Vec<_>>(), [1, 2]);
                    assert!(answers.values().all(|n| *n >= 10), "{answers:?} is hardly random");
                }
                // Moved.
                program(&node_ns, &service(&[3])).unwrap();
                assert!(!is_programmed(&node_ns, &service(&[1, 2])).unwrap());
                assert_eq!(ask(&pods[0], protocol, vip).unwrap(), 3);
                // Nobody there: an answer at once.
                program(&node_ns, &service(&[])).unwrap();
                for client in [&pods[0], &node_ns] {
                    let e = ask(client, protocol, vip).unwrap_err().kind();
                    // The kernel tells a local sender of a datagram that it was not let out.
                    let local = protocol == Protocol::Udp && client == &node_ns;
                    let refused = io::ErrorKind::ConnectionRefused;
                    let want = if local { io::ErrorKind::PermissionDenied } else { refused };
                    assert_eq!(e, want, "{vip} {protocol:?}");
                }
            }
        }
        remove(&node_ns).unwrap();
        remove(&node_ns).unwrap();
        assert_eq!(ruleset(), [""; 0]);
    });
}

#[test]
fn a_live_connection_survives_programming() {
    in_user_ns(|| {
        let node_ns = NetNs::current().unwrap();
        let pods = node();
        let listener = pods[0].run(|| TcpListener::bind("10.0.0.1:8080").unwrap()).unwrap();
        let vip = at("10.96.0.1:80");
        let service = |n| {
            let endpoints = vec![pod_at(n, false, 8080)];
            [ServicePort { vip, protocol: Protocol::Tcp, endpoints }]
        };
        program(&node_ns, &service(1)).unwrap();
        let mut client = pods[1].run(|| TcpStream::connect(vip)).unwrap().unwrap();
        let (mut server, _) = listener.accept().unwrap();
        for endpoint in [2, 1, 3] {
            program(&node_ns, &service(endpoint)).unwrap();
            let mut got = [0];
            client.write_all(b"x").unwrap();
            server.read_exact(&mut got).unwrap();
            server.write_all(&got).unwrap();
            client.read_exact(&mut got).unwrap();
        }
    });
}

#[test]
fn many_services_fit_and_can_be_read() {
    in_user_ns(|| {
        let node_ns = NetNs::current().unwrap();
        let services: Vec<_> = (0..300u16)
            .map(|i| ServicePort {
                vip: SocketAddr::new(at("10.96.0.9:0").ip(), i + 1),
                protocol: Protocol::Tcp,
                endpoints: (0..10).map(|j| pod_at(1 + j, false, i + 1)).collect(),
            })
            .collect();
        program(&node_ns, &services).unwrap();
        assert!(is_programmed(&node_ns, &services).unwrap());
        let shown = nft(&["list", "chain", "inet", TABLE, "service-7"]);
        assert!(shown.contains("meta l4proto tcp dnat ip to numgen random mod 10 map"), "{shown}");
        let map = nft(&["list", "map", "inet", TABLE, "services-ipv4"]);
        assert!(map.contains("10.96.0.9 . tcp . 8 : jump service-7"), "{map}");
    });
}

#[test]
fn nonsense_is_refused_with_names() {
    let service = |vip, endpoints: &[&str]| ServicePort {
        vip: at(vip),
        protocol: Protocol::Tcp,
        endpoints: endpoints.iter().map(|e| at(e)).collect(),
    };
    let cases = [
        (vec![service("10.0.0.1:1", &[]), service("10.0.0.1:1", &[])], "10.0.0.1:1"),
        (vec![service("10.0.0.1:1", &["[fd00::1]:2"])], "[fd00::1]:2"),
        (vec![service("10.0.0.1:1", &["10.0.0.2:1"; MAX_ENDPOINTS + 1])], "4001"),
    ];
    for (services, says) in cases {
        let e = table(&services).unwrap_err().to_string();
        assert!(e.contains(says), "{e}");
    }
}
