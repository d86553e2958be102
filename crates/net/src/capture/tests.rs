//! A captured pod with a tiny proxy, and the world outside: what goes where, and what an app can do about it.

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::CloneFlags;

use super::*;
use crate::datagram::{self, Replies};
use crate::netlink::addr;
use crate::netlink::link::VethEnd;
use crate::nft::tests::nft;
use crate::socket::{ConnectOpts, ListenOpts, SourcePorts, connect, listen};
use crate::testing::{in_user_ns, isolate};

/// Longer than anything here takes; only a failing test waits so long.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long something that must not happen is given to happen.
const SILENCE: Duration = Duration::from_millis(300);
pub(super) const POD: [&str; 2] = ["10.0.0.2", "fd00::2"];
const NODE: [&str; 2] = ["10.0.0.1", "fd00::1"];
/// An address that is neither the pod's nor its neighbour's.
pub(super) const FAR: [&str; 2] = ["192.0.2.1", "2001:db8::1"];

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(super) fn at(ip_text: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip(ip_text), port)
}

/// The pod's namespace; the calling thread's is the outside.
pub(super) fn world() -> NetNs {
    let pod = NetNs::create().unwrap();
    link::up("lo").unwrap();
    link::add_veth(&VethEnd::here("pod0"), &VethEnd::inside("eth0", &pod)).unwrap();
    link::up("pod0").unwrap();
    for (i, prefix) in [(0, 24), (1, 64)] {
        addr::add("pod0", ip(NODE[i]), prefix).unwrap();
        addr::add("lo", ip(FAR[i]), [32, 128][i]).unwrap();
        addr::add("lo", probes()[i], [32, 128][i]).unwrap();
    }
    pod.run(|| {
        link::up("lo").unwrap();
        link::up("eth0").unwrap();
        for (i, prefix) in [(0, 24), (1, 64)] {
            addr::add("eth0", ip(POD[i]), prefix).unwrap();
            route::add(&Route::default_of(i == 1).via(ip(NODE[i]))).unwrap();
        }
    })
    .unwrap();
    pod
}

/// One connection that the proxy saw: in or out, from where, originally to where.
pub(super) type Seen = (&'static str, SocketAddr, SocketAddr);

#[derive(Clone)]
pub(super) struct Proxy {
    pod: NetNs,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Proxy {
    pub(super) fn start(pod: &NetNs) -> Self {
        let proxy = Self { pod: pod.clone(), seen: Arc::default() };
        for any in ["0.0.0.0", "::"] {
            // Each twice: one listener a thread, as a real proxy has them.
            let ports = [("out", OUTBOUND_PORT), ("in", INBOUND_PLAINTEXT_PORT)];
            for (direction, port) in ports.into_iter().chain(ports) {
                let opts = ListenOpts {
                    transparent: true,
                    mark: Some(MARK_PROXY),
                    reuse_port: true,
                    v6only: true,
                    ..ListenOpts::default()
                };
                let listener = listen(pod, at(any, port), opts).unwrap();
                listener.set_nonblocking(false).unwrap();
                let proxy = proxy.clone();
                thread::spawn(move || {
                    while let Ok((client, peer)) = listener.accept() {
                        let proxy = proxy.clone();
                        thread::spawn(move || proxy.forward(direction, &client, peer));
                    }
                });
            }
        }
        proxy
    }

    fn forward(&self, direction: &'static str, client: &TcpStream, peer: SocketAddr) {
        let target = client.local_addr().unwrap();
        self.seen.lock().unwrap().push((direction, peer, target));
        let inbound = direction == "in";
        let opts = ConnectOpts {
            mark: Some(if inbound { MARK_TO_APP } else { MARK_PROXY }),
            transparent_source: inbound.then_some(peer.ip()),
            source_ports: SourcePorts::OutsideEphemeral,
            ..ConnectOpts::default()
        };
        let Ok(server) = established(connect(&self.pod, target, &opts).unwrap()) else {
            // A lingering close of zero seconds is a reset: "refused", as far as a proxy can say it.
            socket2::SockRef::from(client).set_linger(Some(Duration::ZERO)).unwrap();
            return;
        };
        thread::scope(|s| {
            s.spawn(|| pump(client, &server));
            s.spawn(|| pump(&server, client));
        });
    }

    pub(super) fn take(&self) -> Vec<Seen> {
        std::mem::take(&mut *self.seen.lock().unwrap())
    }
}

fn pump(mut from: &TcpStream, mut to: &TcpStream) {
    match io::copy(&mut from, &mut to) {
        Ok(_) => drop(to.shutdown(Shutdown::Write)),
        Err(_) => {
            let _ = from.shutdown(Shutdown::Both);
            let _ = to.shutdown(Shutdown::Both);
        }
    }
}

/// Waits until a started connection stands or failed, and makes it blocking.
pub(super) fn established(stream: TcpStream) -> io::Result<TcpStream> {
    let mut fds = [PollFd::new(stream.as_fd(), PollFlags::POLLOUT)];
    let limit = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX);
    if poll(&mut fds, limit)? == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    if let Some(e) = stream.take_error()? {
        return Err(e);
    }
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// A server that tells each client how it sees it, then echoes.
pub(super) fn serve(ns: &NetNs, addr: SocketAddr) {
    let listener = ns.run(|| TcpListener::bind(addr).unwrap()).unwrap();
    thread::spawn(move || {
        while let Ok((mut stream, peer)) = listener.accept() {
            thread::spawn(move || {
                let _ = writeln!(stream, "{peer}");
                let _ = io::copy(&mut &stream, &mut &stream);
            });
        }
    });
}

/// Connects, sends a megabyte, checks the echo, and returns how the server saw us.
fn talk(ns: &NetNs, opts: &ConnectOpts, to: SocketAddr) -> io::Result<SocketAddr> {
    let mut stream = established(connect(ns, to, opts)?)?;
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    let sent: Vec<u8> = (0..1_000_000u32).map(|i| i.to_le_bytes()[0]).collect();
    let mut got = Vec::new();
    thread::scope(|s| {
        s.spawn(|| {
            (&stream).write_all(&sent).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        });
        (&stream).read_to_end(&mut got)
    })?;
    assert!(got == sent, "{} bytes came back of {}", got.len(), sent.len());
    String::from_utf8_lossy(&line).trim().parse().map_err(io::Error::other)
}

pub(super) fn plain() -> ConnectOpts {
    ConnectOpts::default()
}

#[test]
fn every_connection_goes_where_it_should() {
    in_user_ns(|| {
        let (outside, pod) = (NetNs::current().unwrap(), world());
        for i in [0, 1] {
            serve(&pod, at(POD[i], 8080));
            serve(&pod, at(POD[i], HBONE_PORT));
            serve(&pod, at(["127.0.0.1", "::1"][i], 8081));
            serve(&outside, at(FAR[i], 80));
            serve(&outside, at(NODE[i], 80));
        }
        let proxy = Proxy::start(&pod);
        assert!(!is_installed(&pod, Dns::Captured).unwrap());
        for _ in 0..2 {
            install(&pod, Dns::Captured).unwrap();
            assert!(is_installed(&pod, Dns::Captured).unwrap());
        }
        for i in [0, 1] {
            // Out: the proxy is in between, knows the true destination, and leaves by itself.
            for to in [at(FAR[i], 80), at(NODE[i], 80)] {
                assert_eq!(talk(&pod, &plain(), to).unwrap().ip(), ip(POD[i]));
                let seen = proxy.take();
                assert_eq!(seen.len(), 1, "{seen:?}");
                assert_eq!((seen[0].0, seen[0].1.ip(), seen[0].2), ("out", ip(POD[i]), to));
            }
            // In: the same, and the app sees the client's address.
            for from in [NODE[i], FAR[i]] {
                let opts = ConnectOpts { transparent_source: Some(ip(from)), ..plain() };
                assert_eq!(talk(&outside, &opts, at(POD[i], 8080)).unwrap().ip(), ip(from));
                let seen = proxy.take();
                assert_eq!(seen.len(), 1, "{seen:?}");
                assert_eq!((seen[0].0, seen[0].1.ip()), ("in", ip(from)));
                assert_eq!(seen[0].2, at(POD[i], 8080));
            }
            // Around the proxy: probes, HBONE, the pod to itself, the proxy's own.
            let probe = ConnectOpts { transparent_source: Some(probes()[i]), ..plain() };
            assert_eq!(talk(&outside, &probe, at(POD[i], 8080)).unwrap().ip(), probes()[i]);
            talk(&outside, &plain(), at(POD[i], HBONE_PORT)).unwrap();
            talk(&pod, &plain(), at(POD[i], 8080)).unwrap();
            talk(&pod, &plain(), at(["127.0.0.1", "::1"][i], 8081)).unwrap();
            let own = ConnectOpts { mark: Some(MARK_PROXY), ..plain() };
            talk(&pod, &own, at(FAR[i], 80)).unwrap();
            assert_eq!(proxy.take(), []);
        }
        let tracked = "net/netfilter/nf_conntrack_count";
        pod.run(|| assert!(!sysctl::exists(tracked) || sysctl::read(tracked).unwrap() == "0"))
            .unwrap();
        handover::leave(&pod).unwrap();
        handover::leave(&pod).unwrap();
        assert!(!is_installed(&pod, Dns::Captured).unwrap());
        for i in [0, 1] {
            talk(&pod, &plain(), at(FAR[i], 80)).unwrap();
            talk(&outside, &plain(), at(POD[i], 8080)).unwrap();
        }
        assert_eq!(proxy.take(), []);
    });
}

/// Takes captured questions of both families and says who asked whom; does not answer those that begin with `!`.
fn serve_dns(pod: &NetNs) {
    for at in DNS_LISTENERS {
        let captured = datagram::captured(pod, at, MARK_PROXY).unwrap();
        let replies = Replies::open(pod, at.is_ipv6(), MARK_PROXY).unwrap();
        thread::spawn(move || {
            let mut buffer = [0; 512];
            loop {
                let mut fds = [PollFd::new(captured.as_fd(), PollFlags::POLLIN)];
                poll(&mut fds, PollTimeout::NONE).unwrap();
                let got = datagram::receive(&captured, &mut buffer).unwrap();
                let text = format!("{} asked {}", got.from.ip(), got.to);
                replies.send(got.to, got.from, text.as_bytes()).unwrap();
            }
        });
        let opts = ListenOpts { transparent: true, mark: Some(MARK_PROXY), ..Default::default() };
        let listener = listen(pod, at, opts).unwrap();
        listener.set_nonblocking(false).unwrap();
        thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                let text = format!("dns {}", stream.local_addr().unwrap());
                let _ = stream.write_all(text.as_bytes());
            }
        });
    }
}

/// Asks by UDP from inside `ns`; the answer must come from who was asked.
fn question(ns: &NetNs, mark: Option<u32>, to: SocketAddr) -> io::Result<String> {
    question_within(PATIENCE, ns, mark, to)
}

fn question_within(
    limit: Duration,
    ns: &NetNs,
    mark: Option<u32>,
    to: SocketAddr,
) -> io::Result<String> {
    let any = at(["0.0.0.0", "::"][usize::from(to.is_ipv6())], 0);
    let socket = crate::socket::bind_udp(ns, any, mark)?;
    socket.set_nonblocking(false)?;
    socket.set_read_timeout(Some(limit))?;
    socket.connect(to)?;
    socket.send(b"?")?;
    let mut buffer = [0; 512];
    let length = socket.recv(&mut buffer)?;
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}

/// A UDP server that says its name.
fn udp_server(ns: &NetNs, addr: SocketAddr, name: &'static str) {
    let socket = crate::socket::bind_udp(ns, addr, None).unwrap();
    socket.set_nonblocking(false).unwrap();
    thread::spawn(move || {
        let mut buffer = [0; 512];
        while let Ok((_, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(name.as_bytes(), from);
        }
    });
}

/// Gives the wire addresses of its own, and says how the pod and the node name the node's.
fn on_the_link(pod: &NetNs) -> [SocketAddr; 2] {
    addr::add("pod0", ip("fe80::1"), 64).unwrap();
    let eth0 = pod.run(|| {
        addr::add("eth0", ip("fe80::2"), 64).unwrap();
        link::index("eth0").unwrap()
    });
    let node = "fe80::1".parse().unwrap();
    [eth0.unwrap(), link::index("pod0").unwrap()]
        .map(|scope| std::net::SocketAddrV6::new(node, 53, 0, scope).into())
}

#[test]
fn questions_go_to_the_proxy_and_no_other_datagrams() {
    in_user_ns(|| {
        let (outside, pod) = (NetNs::current().unwrap(), world());
        install(&pod, Dns::Captured).unwrap();
        for i in [0, 1] {
            udp_server(&outside, at(FAR[i], 53), "far");
            udp_server(&outside, at(FAR[i], 5353), "far");
            // A pod may be a DNS server itself, before and beside the proxy.
            udp_server(&pod, at(["0.0.0.0", "::"][i], 53), "own");
            let lost = question_within(SILENCE, &pod, None, at(FAR[i], 53)).unwrap_err();
            assert_eq!(lost.kind(), io::ErrorKind::WouldBlock, "no proxy: dropped, not refused");
        }
        serve_dns(&pod);
        for i in [0, 1] {
            let far = at(FAR[i], 53);
            assert_eq!(question(&pod, None, far).unwrap(), format!("{} asked {far}", POD[i]));
            assert_eq!(question(&pod, Some(MARK_PROXY), far).unwrap(), "far");
            assert_eq!(question(&pod, None, at(FAR[i], 5353)).unwrap(), "far");
            assert_eq!(question(&pod, None, at(POD[i], 53)).unwrap(), "own");
            assert_eq!(question(&pod, None, at(["127.0.0.1", "::1"][i], 53)).unwrap(), "own");
            assert_eq!(question(&outside, None, at(POD[i], 53)).unwrap(), "own");
            // From outside the proxy is not there.
            let e = question(&outside, None, at(POD[i], DNS_PORT)).unwrap_err();
            assert_eq!(e.kind(), io::ErrorKind::ConnectionRefused);
            let mut text = String::new();
            let mut stream = established(connect(&pod, far, &plain()).unwrap()).unwrap();
            stream.read_to_string(&mut text).unwrap();
            assert_eq!(text, format!("dns {far}"));
        }
        // A resolver on the link: only the pod itself can say which link.
        let [as_the_pod_says, as_the_node_says] = on_the_link(&pod);
        udp_server(&outside, as_the_node_says, "link");
        assert_eq!(question(&pod, None, as_the_pod_says).unwrap(), "link");
        install(&pod, Dns::Left).unwrap();
        assert!(is_installed(&pod, Dns::Left).unwrap());
        assert!(!is_installed(&pod, Dns::Captured).unwrap());
        for far in FAR {
            assert_eq!(question(&pod, None, at(far, 53)).unwrap(), "far");
        }
    });
}

#[test]
fn refusals_and_resets_reach_the_other_side() {
    in_user_ns(|| {
        let (outside, pod) = (NetNs::current().unwrap(), world());
        let proxy = Proxy::start(&pod);
        install(&pod, Dns::Captured).unwrap();
        for i in [0, 1] {
            // Nobody listens: the proxy learns it at once, and passes it on.
            for (ns, to) in [(&outside, at(POD[i], 8080)), (&pod, at(FAR[i], 80))] {
                let e = talk(ns, &plain(), to).unwrap_err();
                assert_eq!(e.kind(), io::ErrorKind::ConnectionReset, "{to}");
            }
            // The kernel's own reset leaves for the outside: no HBONE listener.
            let e = talk(&outside, &plain(), at(POD[i], HBONE_PORT)).unwrap_err();
            assert_eq!(e.kind(), io::ErrorKind::ConnectionRefused);
            let seen = proxy.take();
            assert_eq!(seen.len(), 2, "{seen:?}");
            resets_of_a_vanished_app(&pod, at(FAR[i], 90));
            assert_eq!(proxy.take().len(), 1);
        }
    });
}

/// An app closes its connection while the server still sends: the server must hear of it, through the proxy.
fn resets_of_a_vanished_app(pod: &NetNs, to: SocketAddr) {
    let listener = TcpListener::bind(to).unwrap();
    let app = established(connect(pod, to, &plain()).unwrap()).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    server.set_write_timeout(Some(PATIENCE)).unwrap();
    server.write_all(b"hello").unwrap();
    (&app).read_exact(&mut [0; 5]).unwrap();
    drop(app);
    let mut end = [0];
    assert_eq!(server.read(&mut end).unwrap(), 0);
    let e = std::iter::repeat_with(|| server.write_all(&[0; 4096])).find_map(Result::err).unwrap();
    assert!(matches!(e.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe), "{e}");
}

#[test]
fn without_the_proxy_nothing_passes_and_a_waiting_connection_succeeds_when_it_comes() {
    in_user_ns(|| {
        let (outside, pod) = (NetNs::current().unwrap(), world());
        install(&pod, Dns::Captured).unwrap();
        for i in [0, 1] {
            serve(&pod, at(["0.0.0.0", "::"][i], [8080, 8081][i]));
            serve(&outside, at(FAR[i], 8080));
        }
        let attempts = [
            (&outside, at(POD[0], 8080)),
            (&outside, at(POD[1], 8081)),
            (&pod, at(FAR[0], 8080)),
            (&pod, at(FAR[1], 8080)),
        ];
        let started: Vec<_> =
            attempts.iter().map(|(ns, to)| connect(ns, *to, &plain()).unwrap()).collect();
        let mut fds: Vec<_> =
            started.iter().map(|s| PollFd::new(s.as_fd(), PollFlags::POLLOUT)).collect();
        let silent = poll(&mut fds, PollTimeout::try_from(SILENCE).unwrap()).unwrap();
        assert_eq!(silent, 0, "a connection passed without the proxy: {fds:?}");
        let proxy = Proxy::start(&pod);
        for stream in started {
            let stream = established(stream).unwrap();
            let mut first = [0];
            (&stream).read_exact(&mut first).unwrap();
        }
        assert_eq!(proxy.take().len(), 4);
    });
}

#[test]
fn a_pod_without_ipv6_is_captured_for_ipv4() {
    in_user_ns(|| {
        let (outside, pod) = (NetNs::current().unwrap(), world());
        pod.run(|| {
            for dev in ["all", "default", "lo"] {
                sysctl::write(&format!("net/ipv6/conf/{dev}/disable_ipv6"), "1").unwrap();
            }
        })
        .unwrap();
        serve(&outside, at(FAR[0], 80));
        let proxy = Proxy::start(&pod);
        install(&pod, Dns::Captured).unwrap();
        assert!(is_installed(&pod, Dns::Captured).unwrap());
        talk(&pod, &plain(), at(FAR[0], 80)).unwrap();
        assert_eq!(proxy.take().len(), 1);
        handover::leave(&pod).unwrap();
    });
}

#[test]
fn damage_is_noticed_and_repaired() {
    in_user_ns(|| {
        let pod = world();
        let damages: [fn(); 5] = [
            || drop(nft(&["flush", "ruleset"])),
            || route::delete(&loopback_route(false)).unwrap(),
            || route::delete(&loopback_route(true)).unwrap(),
            || rule::delete(&routing_rules(true)[1]).unwrap(),
            || sysctl::write(FWMARK_ACCEPT, "0").unwrap(),
        ];
        for damage in damages {
            install(&pod, Dns::Captured).unwrap();
            assert!(is_installed(&pod, Dns::Captured).unwrap());
            pod.run(damage).unwrap();
            assert!(!is_installed(&pod, Dns::Captured).unwrap());
        }
        install(&pod, Dns::Captured).unwrap();
        assert!(is_installed(&pod, Dns::Captured).unwrap());
    });
}

/// Says to the child that it is the app.
const AS_APP: &str = "AMBIT_TEST_AS_APP";

#[test]
fn an_app_in_its_own_user_namespace_cannot_get_around_capture() {
    if std::env::var_os(AS_APP).is_some() {
        return try_everything();
    }
    in_user_ns(|| {
        let (outside, pod) = (NetNs::current().unwrap(), world());
        serve(&outside, at(FAR[0], 80));
        let proxy = Proxy::start(&pod);
        install(&pod, Dns::Captured).unwrap();
        let mut app = Command::new(std::env::current_exe().unwrap());
        let name = "capture::tests::an_app_in_its_own_user_namespace_cannot_get_around_capture";
        app.args(["--exact", name, "--nocapture"]).env(AS_APP, "1");
        isolate(&mut app, CloneFlags::CLONE_NEWUSER, Some(pod.clone()));
        let out = app.output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        assert_eq!(proxy.take().len(), 1, "the app's only way out is through the proxy");
        assert!(is_installed(&pod, Dns::Captured).unwrap());
    });
}

/// What root of the pod may try. Left out: settings in /proc/sys/net. They are files of the user that is root of the
/// namespace's owner, and in a rootless world that is the only user there is; hiding them is the pod runner's task.
fn try_everything() {
    let here = NetNs::current().unwrap();
    assert!(nix::unistd::getuid().is_root(), "the app believes it is root");
    talk(&here, &plain(), at(FAR[0], 80)).unwrap();
    for mark in [MARK_PROXY, MARK_TO_APP] {
        let e = connect(&here, at(FAR[0], 80), &ConnectOpts { mark: Some(mark), ..plain() });
        assert_eq!(e.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    }
    let spoof = ConnectOpts { transparent_source: Some(probes()[0]), ..plain() };
    assert_eq!(
        connect(&here, at(FAR[0], 80), &spoof).unwrap_err().kind(),
        io::ErrorKind::PermissionDenied
    );
    let e = handover::leave(&here).unwrap_err().to_string();
    assert!(e.contains("CAP_NET_ADMIN"), "{e}");
    install(&here, Dns::Captured).unwrap_err();
    route::delete(&loopback_route(false)).unwrap_err();
    link::down("lo").unwrap_err();
    let out = Command::new("nft").args(["flush", "ruleset"]).output().unwrap();
    assert!(!out.status.success());
}
