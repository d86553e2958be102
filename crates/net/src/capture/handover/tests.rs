//! Capture comes and goes under connections that live, in both directions and families.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::super::tests::{FAR, POD, Proxy, at, established, plain, serve, world};
use super::super::{RULE_PRIORITY, is_installed, rule};
use super::*;
use crate::socket::{ConnectOpts, connect};
use crate::testing::in_user_ns;

/// A connection to an echo server, with the line of greeting read.
struct Held(TcpStream);

impl Held {
    fn open(ns: &NetNs, opts: &ConnectOpts, to: SocketAddr) -> io::Result<Self> {
        let mut held = Self(established(connect(ns, to, opts)?)?);
        while held.byte()? != b'\n' {}
        Ok(held)
    }

    /// The same from a port of ours.
    fn from_port(ns: &NetNs, port: u16, to: SocketAddr) -> io::Result<Self> {
        let domain = socket2::Domain::for_address(to);
        let socket = ns.run(|| socket2::Socket::new(domain, socket2::Type::STREAM, None))??;
        socket.set_reuse_address(true)?;
        socket.bind(&at(POD[usize::from(to.is_ipv6())], port).into())?;
        socket.connect(&to.into())?;
        let mut held = Self(socket.into());
        while held.byte()? != b'\n' {}
        Ok(held)
    }

    /// Says a word and hears it again.
    fn ask(&mut self) -> io::Result<()> {
        self.0.write_all(b"?")?;
        let heard = self.byte()?;
        if heard == b'?' { Ok(()) } else { Err(io::Error::other(format!("heard {heard}"))) }
    }

    fn byte(&mut self) -> io::Result<u8> {
        let mut byte = [0];
        self.0.read_exact(&mut byte)?;
        Ok(byte[0])
    }

    fn reset(self) {
        socket2::SockRef::from(&self.0).set_linger(Some(Duration::ZERO)).unwrap();
    }
}

/// Servers and a proxy, and connections each way and in both families.
fn pair(outside: &NetNs, pod: &NetNs) -> Vec<Held> {
    let one = |i: usize| {
        [
            Held::open(pod, &plain(), at(FAR[i], 80)).unwrap(),
            Held::open(outside, &plain(), at(POD[i], 8080)).unwrap(),
        ]
    };
    [0, 1].into_iter().flat_map(one).collect()
}

fn servers(outside: &NetNs, pod: &NetNs) {
    for i in [0, 1] {
        serve(pod, at(POD[i], 8080));
        serve(outside, at(FAR[i], 80));
    }
}

/// The sockets of a connection that was closed take a moment to go.
fn settled(pod: &NetNs) -> bool {
    let until = Instant::now() + Duration::from_secs(5);
    while Instant::now() < until {
        if settle(pod).unwrap() == 0 {
            return true;
        }
        thread::yield_now();
    }
    false
}

fn now(pod: &NetNs) -> Option<State> {
    pod.run(|| state().unwrap()).unwrap().map(|(state, _)| state)
}

fn rules(pod: &NetNs) -> usize {
    let all = pod.run(|| rule::list().unwrap()).unwrap();
    all.iter().filter(|r| r.priority == RULE_PRIORITY && r.mark != 0).count()
}

#[test]
fn what_is_open_stays_as_it_is() {
    in_user_ns(|| {
        let (outside, pod) = (NetNs::current().unwrap(), world());
        servers(&outside, &pod);
        let proxy = Proxy::start(&pod);
        let mut before = pair(&outside, &pod);
        assert_eq!(enrol(&pod, Dns::Captured).unwrap(), 4);
        assert!(is_installed(&pod, Dns::Captured).unwrap());
        before.iter_mut().for_each(|held| held.ask().unwrap());
        assert_eq!(proxy.take(), [], "the old ones are not the proxy's");
        let mut within = pair(&outside, &pod);
        assert_eq!(proxy.take().len(), 4, "the new ones are");
        before.iter_mut().chain(&mut within).for_each(|held| held.ask().unwrap());
        assert_eq!(settle(&pod).unwrap(), 4);
        drop(before);
        assert!(settled(&pod), "nothing is left of the old ones");
        assert_eq!(now(&pod), Some(State::Captured));

        assert!(leave(&pod).unwrap() >= 4);
        assert_eq!(now(&pod), Some(State::Left));
        within.iter_mut().for_each(|held| held.ask().unwrap());
        let mut after = pair(&outside, &pod);
        assert_eq!(proxy.take(), [], "new ones go their own way");
        within.iter_mut().chain(&mut after).for_each(|held| held.ask().unwrap());
        assert!(
            settle(&pod).unwrap() >= 4 && rules(&pod) > 0,
            "the proxy's still need the routing"
        );
        drop(within);
        assert!(settled(&pod));
        assert_eq!((now(&pod), rules(&pod)), (None, 0));
        after.iter_mut().for_each(|held| held.ask().unwrap());
        assert_eq!(leave(&pod).unwrap(), 0, "leaving twice is fine");
    });
}

/// An exemption is for a connection, not for its ports.
#[test]
fn a_new_connection_with_old_ports_is_captured() {
    in_user_ns(|| {
        let (outside, pod) = (NetNs::current().unwrap(), world());
        servers(&outside, &pod);
        let proxy = Proxy::start(&pod);
        for i in [0, 1] {
            let held = Held::from_port(&pod, 40_000, at(FAR[i], 80)).unwrap();
            enrol(&pod, Dns::Captured).unwrap();
            held.reset();
            let mut again = Held::from_port(&pod, 40_000, at(FAR[i], 80)).unwrap();
            again.ask().unwrap();
            assert_eq!(proxy.take().len(), 1, "the second passes the proxy");
            // And the other way round: what the proxy served does not bind the ports to it.
            leave(&pod).unwrap();
            again.ask().unwrap();
            again.reset();
            let mut third = Held::from_port(&pod, 40_000, at(FAR[i], 80)).unwrap();
            third.ask().unwrap();
            assert_eq!(proxy.take(), [], "the third does not");
            third.reset();
        }
    });
}

#[test]
fn flips_under_load_break_nothing() {
    in_user_ns(|| {
        let (outside, pod) = (NetNs::current().unwrap(), world());
        servers(&outside, &pod);
        let _proxy = Proxy::start(&pod);
        let stop = AtomicBool::new(false);
        let counts = [const { AtomicU32::new(0) }; 4];
        let mut lasting = pair(&outside, &pod);
        thread::scope(|scope| {
            // Bounded, should the other side of this test fail before it says stop.
            let until = Instant::now() + Duration::from_secs(60);
            let load = |ns: &NetNs, to: SocketAddr, count: usize| {
                let (ns, stop, count) = (ns.clone(), &stop, &counts[count]);
                scope.spawn(move || {
                    while !stop.load(Ordering::Relaxed) && Instant::now() < until {
                        let mut held = Held::open(&ns, &plain(), to).unwrap();
                        held.ask().unwrap();
                        held.reset();
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                })
            };
            for i in [0, 1] {
                load(&pod, at(FAR[i], 80), i);
                load(&outside, at(POD[i], 8080), 2 + i);
            }
            let few = || counts.iter().any(|count| count.load(Ordering::Relaxed) <= 50);
            let mut flips = 0;
            while flips < 50 || (few() && Instant::now() < until) {
                flips += 1;
                enrol(&pod, Dns::Captured).unwrap();
                lasting.iter_mut().for_each(|held| held.ask().unwrap());
                leave(&pod).unwrap();
                lasting.iter_mut().for_each(|held| held.ask().unwrap());
            }
            stop.store(true, Ordering::Relaxed);
            assert!(!few(), "{counts:?} connections beside {flips} flips");
        });
    });
}

/// The rest of a table that somebody damaged must not go on capturing for a proxy that no longer listens.
#[test]
fn leaving_takes_a_damaged_table_away() {
    in_user_ns(|| {
        let (outside, pod) = (NetNs::current().unwrap(), world());
        servers(&outside, &pod);
        enrol(&pod, Dns::Captured).unwrap();
        pod.run(|| nft::tests::nft(&["flush", "chain", "inet", "ambit", "output"])).unwrap();
        assert_eq!(leave(&pod).unwrap(), 0);
        Held::open(&outside, &plain(), at(POD[0], 8080)).unwrap().ask().unwrap();
    });
}
