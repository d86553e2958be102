//! The links, addresses, routes and rules of fresh namespaces, and packets over them.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};

use nix::errno::Errno;

use super::link::VethEnd;
use super::route::{Kind, Route};
use super::{addr, link, route, rule};
use crate::netns::NetNs;
use crate::testing::in_user_ns;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn two_namespaces_talk_over_a_veth_pair() {
    in_user_ns(|| {
        let (a, b) = (NetNs::create().unwrap(), NetNs::create().unwrap());
        let mac = [2, 0, 0, 0, 0, 9];
        a.run(|| {
            let there = VethEnd { mac: Some(mac), mtu: Some(1400), ..VethEnd::inside("eth0", &b) };
            link::add_veth(&VethEnd::here("pod0"), &there).unwrap();
            link::up("pod0").unwrap();
            addr::add("pod0", ip("10.0.0.1"), 24).unwrap();
            addr::add("pod0", ip("fd00::1"), 64).unwrap();
            addr::add("pod0", ip("fd00::1"), 64).unwrap();
        })
        .unwrap();
        let servers = b
            .run(|| {
                for dev in ["lo", "eth0"] {
                    link::up(dev).unwrap();
                }
                addr::add("eth0", ip("10.0.0.2"), 24).unwrap();
                addr::add("eth0", ip("fd00::2"), 64).unwrap();
                let eth0 = link::get("eth0").unwrap();
                assert_eq!((eth0.mac, eth0.mtu, eth0.up), (Some(mac), 1400, true));
                assert_eq!(eth0.kind, "veth");
                let all: Vec<_> = addr::list().unwrap().iter().map(|a| a.ip).collect();
                assert!(all.contains(&ip("10.0.0.2")) && all.contains(&ip("fd00::2")), "{all:?}");
                ["10.0.0.2:0", "[fd00::2]:0"].map(|a| TcpListener::bind(a).unwrap())
            })
            .unwrap();
        for server in servers {
            let to = server.local_addr().unwrap();
            let mut client = a.run(|| TcpStream::connect(to)).unwrap().unwrap();
            client.write_all(b"x").unwrap();
            let mut got = [0];
            server.accept().unwrap().0.read_exact(&mut got).unwrap();
            assert_eq!(got, *b"x");
        }
    });
}

#[test]
fn a_bridge_joins_its_ports() {
    in_user_ns(|| {
        link::add_bridge("br0").unwrap();
        link::up("br0").unwrap();
        addr::add("br0", ip("10.1.0.1"), 24).unwrap();
        let ns = NetNs::create().unwrap();
        link::add_veth(&VethEnd::here("port"), &VethEnd::inside("tmp", &ns)).unwrap();
        link::set_master("port", "br0").unwrap();
        link::up("port").unwrap();
        assert_eq!(link::get("port").unwrap().master, Some(link::index("br0").unwrap()));
        ns.run(|| {
            link::rename("tmp", "eth0").unwrap();
            link::set_mtu("eth0", 1300).unwrap();
            link::set_mac("eth0", [2, 0, 0, 0, 0, 7]).unwrap();
            link::up("eth0").unwrap();
            addr::add("eth0", ip("10.1.0.2"), 24).unwrap();
            assert_eq!(link::get("eth0").unwrap().mtu, 1300);
        })
        .unwrap();
        let server = TcpListener::bind("10.1.0.1:0").unwrap();
        let to = server.local_addr().unwrap();
        ns.run(|| TcpStream::connect(to)).unwrap().unwrap();
        link::delete("port").unwrap();
        assert!(ns.run(|| link::get("eth0")).unwrap().is_err());
    });
}

#[test]
fn routes_and_rules_can_be_read_back_and_repeated() {
    in_user_ns(|| {
        link::up("lo").unwrap();
        link::add_veth(&VethEnd::here("a"), &VethEnd::here("b")).unwrap();
        link::up("a").unwrap();
        link::up("b").unwrap();
        for ipv6 in [false, true] {
            let (own, gateway, net) = if ipv6 {
                ("fd00::1", "fe80::1", "fd01::")
            } else {
                ("10.2.0.1", "169.254.1.1", "10.9.0.0")
            };
            addr::add("a", ip(own), if ipv6 { 128 } else { 32 }).unwrap();
            let prefix = if ipv6 { 64 } else { 24 };
            let routes = [
                Route { onlink: true, ..Route::default_of(ipv6).via(ip(gateway)).dev("a") },
                Route { source: Some(ip(own)), ..Route::to(ip(net), prefix).dev("a") },
                Route { kind: Kind::Local, table: 100, ..Route::default_of(ipv6).dev("lo") },
            ];
            for wanted in routes {
                route::add(&wanted).unwrap();
                route::add(&wanted).unwrap();
                let read = Route { onlink: false, ..wanted.clone() };
                let there = || route::list(wanted.table).unwrap();
                assert_eq!(there().iter().filter(|r| **r == read).count(), 1, "{:?}", there());
                route::delete(&wanted).unwrap();
                route::delete(&wanted).unwrap();
                assert!(!there().contains(&read));
            }
            let wanted = rule::Rule { ipv6, mark: 0x100, mask: 0xfff, table: 100, priority: 2000 };
            rule::add(&wanted).unwrap();
            rule::add(&wanted).unwrap();
            assert_eq!(rule::list().unwrap(), [wanted]);
            rule::delete(&wanted).unwrap();
            rule::delete(&wanted).unwrap();
            assert_eq!(rule::list().unwrap(), []);
        }
    });
}

#[test]
fn errors_say_what_and_why() {
    in_user_ns(|| {
        let e = link::up("nobody").unwrap_err();
        assert_eq!((e.errno, e.to_string().contains("nobody")), (Errno::ENODEV, true), "{e}");
        let to: SocketAddr = "192.0.2.1:1".parse().unwrap();
        let e = route::add(&Route::default_of(false).via(to.ip())).unwrap_err();
        let text = e.to_string();
        assert!(text.contains("add Unicast route to 0.0.0.0/0 via 192.0.2.1"), "{text}");
        assert_eq!(e.detail.as_deref(), Some("Nexthop has invalid gateway"), "{text}");
    });
}
