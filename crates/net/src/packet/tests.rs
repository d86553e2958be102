//! Real frames from a veth pair, and flows made up in every order.

use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::netlink::addr;
use crate::netlink::link::VethEnd;
use crate::testing::in_user_ns;

fn ends() -> (SocketAddr, SocketAddr) {
    ("10.0.0.1:1000".parse().unwrap(), "10.0.0.2:15008".parse().unwrap())
}

#[test]
fn a_tap_sees_what_passes() {
    in_user_ns(|| {
        let (here, there) = (NetNs::current().unwrap(), NetNs::create().unwrap());
        link::add_veth(&VethEnd::here("tapped"), &VethEnd::inside("eth0", &there)).unwrap();
        link::up("tapped").unwrap();
        for (own, other, prefix) in [("10.0.0.1", "10.0.0.2", 24), ("fd00::1", "fd00::2", 64)] {
            addr::add("tapped", own.parse().unwrap(), prefix).unwrap();
            there
                .run(|| {
                    link::up("eth0").unwrap();
                    addr::add("eth0", other.parse().unwrap(), prefix).unwrap();
                })
                .unwrap();
            let mut tap = Tap::open(&here, "tapped").unwrap();
            let at = SocketAddr::new(other.parse().unwrap(), 7000);
            let listener = there.run(|| TcpListener::bind(at).unwrap()).unwrap();
            let mut client = TcpStream::connect(at).unwrap();
            let sent: Vec<u8> = (0..100_000u32).flat_map(u32::to_be_bytes).collect();
            let reader = std::thread::spawn(move || {
                io::copy(&mut listener.accept().unwrap().0, &mut io::sink()).unwrap()
            });
            let writer = std::thread::spawn({
                let sent = sent.clone();
                move || client.write_all(&sent).unwrap()
            });
            let deadline = Instant::now() + Duration::from_secs(10);
            let done = |flows: &Flows| flows.iter().any(|(_, to, f)| to == at && f.is_finished());
            let flows = tap.flows(deadline, done).unwrap();
            writer.join().unwrap();
            assert_eq!(reader.join().unwrap(), 400_000);
            assert_eq!(flows.with_port(7000).count(), 2, "{flows:?}");
            let (_, _, flow) = flows.iter().find(|(_, to, _)| *to == at).unwrap();
            flow.check_whole().unwrap();
            assert!(flow.bytes() == sent);
            assert!(flows.contain(&sent[1000..1100]) && !flows.contain(b"not in there"));
            assert!(tls_records(flow.bytes()).is_err());
        }
        let e = Tap::open(&here, "nobody").unwrap_err().to_string();
        assert!(e.contains("tap nobody"), "{e}");
        there.run(|| link::up("lo").unwrap()).unwrap();
        let mut quiet = Tap::open(&there, "lo").unwrap();
        assert!(quiet.next(Instant::now()).unwrap().is_none());
    });
}

#[test]
fn tls_is_told_from_everything_else() {
    let record = |kind: u8, length: u16| {
        let mut bytes = vec![kind, 3, 3];
        bytes.extend(length.to_be_bytes());
        bytes.resize(5 + usize::from(length), 0xaa);
        bytes
    };
    let whole = [record(22, 300), record(20, 1), record(23, 16_640)].concat();
    let kinds: Vec<_> = tls_records(&whole).unwrap().iter().map(|r| r.kind).collect();
    assert_eq!(kinds, [22, 20, 23]);
    for cut in 0..whole.len() {
        let whole_records = tls_records(&whole[..cut]).unwrap().len();
        assert!(whole_records < 3, "{cut}");
    }
    let bad: [(&[u8], usize); 6] = [
        (b"GET / HTTP/1.1", 0),
        (b"PRI * HTTP/2.0", 0),
        (&[24, 3, 3, 0, 1, 0], 0),
        (&[23, 2, 0, 0, 1, 0], 0),
        (&[23, 3, 3, 0xff, 0xff, 0], 0),
        (&[21, 3, 3, 0, 2, 1, 0, b'p', b'w'], 7),
    ];
    for (bytes, at) in bad {
        assert_eq!(tls_records(bytes).unwrap_err().at, at, "{bytes:?}");
    }
}

#[test]
fn what_is_missing_is_told() {
    let (from, to) = ends();
    let segment = |sequence, syn, payload| Segment {
        from,
        to,
        sequence,
        syn,
        fin: false,
        rst: false,
        payload,
    };
    let flow = |segments: &[Segment<'_>]| {
        let mut flows = Flows::default();
        segments.iter().for_each(|s| flows.add(s));
        flows.iter().next().unwrap().2.clone()
    };
    let syn = segment(9, true, b"");
    let (a, b, c) =
        (segment(10, false, b"aa"), segment(12, false, b"bb"), segment(14, false, b"cc"));
    let fin = Segment { fin: true, ..segment(14, false, b"cc") };
    type Case<'a> = (&'a [Segment<'a>], Result<(), Gap>, &'a [u8]);
    let cases: [Case<'_>; 6] = [
        (&[syn, a, b, c], Ok(()), b"aabbcc"),
        (&[syn, c, b, b, a], Ok(()), b"aabbcc"),
        (&[a, b], Err(Gap::Front), b"aabb"),
        (&[syn, a, c], Err(Gap::Hole(2)), b"aa"),
        (&[syn, a, fin], Err(Gap::Hole(2)), b"aa"),
        (&[syn, a, segment(9, false, b"x")], Ok(()), b"aa"),
    ];
    for (segments, whole, bytes) in cases {
        let flow = flow(segments);
        assert_eq!((flow.check_whole(), flow.bytes()), (whole, bytes), "{segments:?}");
    }
    assert!(flow(&[syn, a, c]).contains(b"cc"));
}

proptest! {
    #[test]
    fn any_order_gives_the_same_flow(
        start in any::<u32>(),
        pieces in proptest::collection::vec((0usize..200, 1usize..60), 1..30),
    ) {
        let (from, to) = ends();
        let data: Vec<u8> = (0..=255u8).cycle().take(300).collect();
        let mut flows = Flows::default();
        let sequence = |offset: usize| start.wrapping_add(1).wrapping_add(u32::try_from(offset).unwrap());
        let mut add = |sequence, syn, payload| {
            flows.add(&Segment { from, to, sequence, syn, fin: false, rst: false, payload });
        };
        add(start, true, &[]);
        for (offset, length) in &pieces {
            add(sequence(*offset), false, &data[*offset..offset + length]);
        }
        add(sequence(0), false, &data);
        let flow = flows.iter().next().unwrap().2;
        prop_assert_eq!(flow.bytes(), &data);
        prop_assert_eq!(flow.check_whole(), Ok(()));
    }

    #[test]
    fn any_frame_can_be_read(
        mut frame in proptest::collection::vec(any::<u8>(), 0..120),
        ethertype in prop_oneof![Just([8u8, 0]), Just([0x86, 0xdd])],
    ) {
        if frame.len() > 34 {
            frame[12..14].copy_from_slice(&ethertype);
            frame[20] = 6;
            frame[23] = 6;
        }
        let _ = tcp_segment(&frame);
        let _ = tls_records(&frame);
    }
}
