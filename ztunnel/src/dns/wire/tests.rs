//! Hostile packets, sizes, and what counts as an answer.

use std::sync::Arc;

use hickory_proto::op::MessageType;
use model::{FamilyPolicy, LoadBalancing, Service, ServiceKey};

use super::*;

const ZONE: &str = "cluster.local";

fn question_for(name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(0x1234, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

fn bytes(name: &str, kind: RecordType) -> Vec<u8> {
    question_for(name, kind).to_vec().unwrap()
}

fn with_edns(mut message: Message, size: u16) -> Message {
    let mut edns = Edns::new();
    edns.set_max_payload(size);
    message.set_edns(edns);
    message
}

fn asked(message: &Message) -> Asked {
    match read(&message.to_vec().unwrap()) {
        Read::Addresses(asked) => *asked,
        other => panic!("{other:?}"),
    }
}

fn service() -> Arc<Service> {
    Arc::new(Service {
        key: ServiceKey { namespace: "shop".into(), hostname: "web.shop.svc.cluster.local".into() },
        name: "web".into(),
        vips: Arc::new([]),
        ports: Arc::new([]),
        subject_alt_names: Arc::new([]),
        waypoint: None,
        load_balancing: LoadBalancing::default(),
        families: FamilyPolicy::default(),
    })
}

fn addresses(count: u32, ipv6: bool) -> DnsAnswer {
    let one = |n: u32| {
        if ipv6 { IpAddr::from(u128::from(n).to_be_bytes()) } else { IpAddr::from(n.to_be_bytes()) }
    };
    DnsAnswer::Addresses {
        service: service(),
        addresses: (1..=count).map(one).collect(),
        of_pods: true,
    }
}

#[test]
fn what_is_answered_here_and_what_is_not() {
    let word = |packet: &[u8]| match read(packet) {
        Read::Ignore => "ignored".to_owned(),
        Read::Forward => "forwarded".to_owned(),
        Read::Addresses(asked) => {
            format!("{} {}", if asked.ipv6 { "AAAA" } else { "A" }, asked.name)
        }
    };
    let check = |what: &str, packet: &[u8], want: &str| assert_eq!(word(packet), want, "{what}");
    check("A", &bytes("Web.Shop.", RecordType::A), "A web.shop");
    check("AAAA", &bytes("web.", RecordType::AAAA), "AAAA web");
    check("the root", &bytes(".", RecordType::A), "A ");
    check("service names", &bytes("_a._tcp.web.", RecordType::A), "A _a._tcp.web");
    for kind in
        [RecordType::SRV, RecordType::ANY, RecordType::PTR, RecordType::HTTPS, RecordType::AXFR]
    {
        check("other types", &bytes("web.", kind), "forwarded");
    }
    check("not a host's name", &hostile(1, b"\x03a b\0\0\x01\0\x01"), "forwarded");
    check("a dot in a label", &hostile(1, b"\x03a.b\0\0\x01\0\x01"), "forwarded");
    let change = |f: fn(&mut Message)| {
        let mut message = question_for("web.", RecordType::A);
        f(&mut message);
        message.to_vec().unwrap()
    };
    check(
        "another class",
        &change(|m| {
            m.queries[0].set_query_class(DNSClass::CH);
        }),
        "forwarded",
    );
    check("no question", &change(|m| m.queries.clear()), "forwarded");
    check("two questions", &change(|m| m.queries.extend_from_within(..)), "forwarded");
    check("notify", &change(|m| m.metadata.op_code = OpCode::Notify), "forwarded");
    check("status", &change(|m| m.metadata.op_code = OpCode::Status), "forwarded");
    check("an answer", &change(|m| m.metadata.message_type = MessageType::Response), "ignored");
    check(
        "an answer inside",
        &change(|m| {
            m.answers.push(Record::from_rdata(
                Name::root(),
                1,
                RData::A(std::net::Ipv4Addr::LOCALHOST.into()),
            ))
        }),
        "forwarded",
    );
    check("EDNS", &with_edns(question_for("web.", RecordType::A), 4096).to_vec().unwrap(), "A web");
    let mut later = with_edns(question_for("web.", RecordType::A), 4096);
    later.edns.as_mut().unwrap().set_version(1);
    check("a later EDNS", &later.to_vec().unwrap(), "forwarded");
    check("nothing", &[], "ignored");
    check("eleven bytes", &[0; 11], "ignored");
    check("a header", &[0; 12], "forwarded");
}

/// The header of a question, and this for its body.
fn hostile(questions: u16, body: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x12, 0x34, 1, 0];
    packet.extend(questions.to_be_bytes());
    packet.extend([0; 6]);
    packet.extend(body);
    packet
}

#[test]
fn hostile_packets_end() {
    let mut long_name = Vec::new();
    for _ in 0..10 {
        long_name.push(63);
        long_name.extend([b'a'; 63]);
    }
    long_name.extend([0, 0, 1, 0, 1]);
    let packets: &[(&str, Vec<u8>)] = &[
        ("a pointer to itself", hostile(1, &[0xc0, 12, 0, 1, 0, 1])),
        ("pointers in a circle", hostile(1, &[0xc0, 14, 0xc0, 12, 0, 1, 0, 1])),
        ("a pointer forward", hostile(1, &[0xc0, 40, 0, 1, 0, 1])),
        ("a pointer into the header", hostile(1, &[0xc0, 0, 0, 1, 0, 1])),
        ("a pointer at the end", hostile(1, &[0xc0])),
        ("a label of an unknown kind", hostile(1, &[0x80, 1, 0, 0, 1, 0, 1])),
        ("a label beyond the end", hostile(1, &[60, b'a', 0])),
        ("a name without end", hostile(1, &[1, b'a'])),
        ("a name without type", hostile(1, &[1, b'a', 0])),
        ("a name of 640 bytes", hostile(1, &long_name)),
        ("more questions than there are", hostile(65_535, &[1, b'a', 0, 0, 1, 0, 1])),
        ("all ones", vec![0x7f; 600]),
    ];
    for (what, packet) in packets {
        assert!(matches!(read(packet), Read::Forward), "{what}");
        let failed = failure(packet).unwrap();
        assert!(
            failed.len() >= HEADER && failed[2] & QR != 0 && failed[..2] == packet[..2],
            "{what}"
        );
        assert!(question_type(packet).is_none() && question_name(packet).is_none(), "{what}");
    }
    // Many questions that are all there.
    let many: Vec<u8> = [1, b'a', 0, 0, 1, 0, 1].repeat(5_000);
    assert!(matches!(read(&hostile(5_000, &many)), Read::Forward));
    // Every way to cut a good packet short.
    let whole = with_edns(question_for("web.shop.svc.cluster.local.", RecordType::A), 1232);
    let whole = whole.to_vec().unwrap();
    for length in 0..whole.len() {
        let cut = &whole[..length];
        assert_eq!(matches!(read(cut), Read::Ignore), length < HEADER, "{length}");
        let _ = (failure(cut), is_answer(&whole, cut), is_answer(cut, &whole));
    }
}

#[test]
fn answers_have_their_sizes() {
    let plain = question_for("big.shop.svc.cluster.local.", RecordType::A);
    let check = |message: &Message, limit: Option<usize>, count: u32, most: usize| {
        let asked = asked(message);
        let bytes = answer(&asked, &addresses(count, asked.ipv6), ZONE, limit).unwrap();
        assert!(bytes.len() <= most, "{} > {most}", bytes.len());
        let got = Message::from_vec(&bytes).unwrap();
        assert_eq!(got.metadata.id, 0x1234);
        assert_eq!(got.queries, message.queries);
        assert_eq!(got.edns.is_some(), message.edns.is_some());
        assert_eq!(got.metadata.truncation, got.answers.len() < count as usize);
        assert!(got.metadata.recursion_desired && got.metadata.recursion_available);
        // A cut answer leaves no room for one more.
        let one = if asked.ipv6 { 28 } else { 16 };
        assert!(!got.metadata.truncation || bytes.len() + one > most, "{} of {most}", bytes.len());
        got.answers.len()
    };
    assert_eq!(check(&plain, None, 20, 512), 20);
    assert!(check(&plain, None, 1000, 512) > 20);
    assert!(check(&with_edns(plain.clone(), 100), None, 1000, 512) > 20);
    assert!(check(&with_edns(plain.clone(), 1232), None, 1000, 1232) > 60);
    assert_eq!(check(&with_edns(plain.clone(), 65_535), None, 1000, 65_535), 1000);
    assert_eq!(check(&plain, Some(MAX_MESSAGE), 1000, MAX_MESSAGE), 1000);
    // The longest name there is.
    let long = format!("{0}.{0}.{0}.{1}.", "a".repeat(63), "b".repeat(61));
    assert_eq!(
        check(&question_for(&long, RecordType::AAAA), Some(MAX_MESSAGE), 1000, MAX_MESSAGE),
        1000
    );
    assert_eq!(check(&question_for(".", RecordType::A), None, 3, 512), 3);
    let six = question_for("big.shop.svc.cluster.local.", RecordType::AAAA);
    assert!(check(&six, None, 1000, 512) > 10);
    assert_eq!(check(&six, Some(MAX_MESSAGE), 1000, MAX_MESSAGE), 1000);
}

#[test]
fn answers_repeat_the_question_as_it_was() {
    let message = question_for("wEb.ShOp.svc.cluster.local.", RecordType::A);
    let bytes = answer(&asked(&message), &addresses(1, false), ZONE, None).unwrap();
    let got = Message::from_vec(&bytes).unwrap();
    assert!(got.queries[0].name().eq_case(message.queries[0].name()));
    assert!(got.answers[0].name.eq_case(message.queries[0].name()));
    assert_eq!(got.answers[0].ttl, TTL_OF_PODS);
    assert!(is_answer(&message.to_vec().unwrap(), &bytes));
    let none = DnsAnswer::NoData { service: service() };
    let bytes = answer(&asked(&message), &none, ZONE, None).unwrap();
    let got = Message::from_vec(&bytes).unwrap();
    assert_eq!((got.metadata.response_code, got.answers.len()), (ResponseCode::NoError, 0));
    assert_eq!(got.authorities.len(), 1, "resolvers may remember it");
    assert!(answer(&asked(&message), &DnsAnswer::Forward, ZONE, None).is_none());
}

#[test]
fn failures_are_for_the_question() {
    let message = with_edns(question_for("web.", RecordType::SRV), 4096);
    let got = Message::from_vec(&failure(&message.to_vec().unwrap()).unwrap()).unwrap();
    assert_eq!(got.metadata.response_code, ResponseCode::ServFail);
    assert_eq!((got.metadata.id, &got.queries), (0x1234, &message.queries));
    assert!(got.edns.is_some());
    assert!(failure(&[]).is_none());
}

#[test]
fn what_counts_as_an_answer() {
    let packet = bytes("www.example.com.", RecordType::A);
    let reply = |f: fn(&mut Message)| {
        let mut message = question_for("www.example.com.", RecordType::A);
        message.metadata.message_type = MessageType::Response;
        f(&mut message);
        message.to_vec().unwrap()
    };
    let check = |what: &str, bytes: &[u8], want: bool| {
        assert_eq!(is_answer(&packet, bytes), want, "{what}");
    };
    check("the answer", &reply(|_| {}), true);
    check(
        "in other letters",
        &reply(|m| {
            m.queries[0].set_name(Name::from_ascii("WWW.example.COM.").unwrap());
        }),
        true,
    );
    check("another id", &reply(|m| m.metadata.id = 1), false);
    check("a question", &reply(|m| m.metadata.message_type = MessageType::Query), false);
    check("another kind", &reply(|m| m.metadata.op_code = OpCode::Status), false);
    check(
        "another name",
        &reply(|m| {
            m.queries[0].set_name(Name::from_ascii("www.example.net.").unwrap());
        }),
        false,
    );
    check(
        "another type",
        &reply(|m| {
            m.queries[0].set_query_type(RecordType::AAAA);
        }),
        false,
    );
    check("no question, no error", &reply(|m| m.queries.clear()), false);
    check(
        "no question, refused",
        &reply(|m| {
            m.queries.clear();
            m.metadata.response_code = ResponseCode::Refused;
        }),
        true,
    );
    check("nothing", &[], false);
}

proptest::proptest! {
    /// Whatever the bytes: they are sorted without a panic, and what is answered is an answer to them.
    #[test]
    fn any_bytes(packet in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..600)) {
        let _ = (question_type(&packet), question_name(&packet), failure(&packet));
        if let Read::Addresses(asked) = read(&packet) {
            let bytes = answer(&asked, &addresses(3, asked.ipv6), ZONE, None).unwrap();
            proptest::prop_assert!(is_answer(&packet, &bytes));
        }
    }

    /// The same for packets that look like questions: flags, name, type and a tail at random.
    #[test]
    fn nearly_questions(
        flags in 0..=u16::MAX,
        labels in proptest::collection::vec("[a-zA-Z0-9_.-]{1,20}", 0..6),
        kind in proptest::prop_oneof![
            proptest::prelude::Just(1_u16), proptest::prelude::Just(28), 0..=300_u16,
        ],
        tail in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..40),
    ) {
        let mut packet = hostile(1, &[]);
        packet[2..4].copy_from_slice(&flags.to_be_bytes());
        for label in &labels {
            packet.push(u8::try_from(label.len()).unwrap());
            packet.extend(label.bytes());
        }
        packet.push(0);
        packet.extend(kind.to_be_bytes());
        packet.extend([0, 1]);
        proptest::prop_assert_eq!(question_type(&packet), Some(kind));
        if let Read::Addresses(asked) = read(&packet) {
            proptest::prop_assert!(kind == 1 || kind == 28);
            let bytes = answer(&asked, &addresses(100, asked.ipv6), ZONE, None).unwrap();
            proptest::prop_assert!(bytes.len() <= 512 && is_answer(&packet, &bytes));
        }
        packet.extend(tail);
        let _ = (read(&packet), failure(&packet));
    }
}
