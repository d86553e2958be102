//! Questions and the answers the DNS specification of Kubernetes gives.

use super::*;
use crate::endpoints::{Endpoint, Port};
use hickory_proto::op::Query;

fn port(name: &str, number: u16, protocol: Protocol) -> Port {
    Port { name: name.into(), number, protocol }
}

fn ips(text: &[&str]) -> Vec<IpAddr> {
    text.iter().map(|t| t.parse().unwrap()).collect()
}

fn table() -> Table {
    let endpoint = |ip: &[&str], hostname: Option<&str>, ports: &[Option<u16>]| Endpoint {
        ips: ips(ip),
        hostname: hostname.map(Into::into),
        ports: ports.to_vec(),
    };
    let services = [
        Resolved {
            namespace: "shop".into(),
            name: "web".into(),
            vips: ips(&["10.96.1.0", "fd00:10:96::100"]),
            ports: vec![port("http", 80, Protocol::Tcp), port("", 81, Protocol::Tcp)],
            endpoints: vec![endpoint(&["10.244.1.2"], None, &[Some(8080)])],
        },
        Resolved {
            namespace: "shop".into(),
            name: "db".into(),
            vips: vec![],
            ports: vec![port("pg", 5432, Protocol::Tcp), port("dns", 53, Protocol::Udp)],
            endpoints: vec![
                endpoint(&["10.244.1.3", "fd00:10:244:1::3"], Some("db-0"), &[Some(15432), None]),
                endpoint(&["10.244.2.4"], None, &[Some(5432), Some(5353)]),
            ],
        },
        Resolved {
            namespace: "shop".into(),
            name: "empty".into(),
            vips: vec![],
            ports: vec![],
            endpoints: vec![],
        },
    ];
    let aliases = [("shop".into(), "out".into(), "Example.com.".into())];
    Table::new(
        &services,
        &aliases,
        ["10.96.0.10".parse().unwrap(), "fd00:10:96::a".parse().unwrap()],
    )
}

fn ask(name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(0, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

fn check(name: &str, kind: RecordType, want: &[&str]) {
    let text = match table().answer(&ask(name, kind)) {
        Answer::Elsewhere => vec!["elsewhere".to_owned()],
        Answer::Silence => vec!["silence".to_owned()],
        Answer::Alias { target, .. } => vec![format!("alias {target}")],
        Answer::Here(m) => {
            assert!(m.metadata.recursion_available && m.metadata.recursion_desired);
            let empty = m.answers.is_empty();
            assert_eq!(
                empty,
                m.authorities.iter().any(|r| r.record_type() == RecordType::SOA),
                "{name} {kind}"
            );
            let code = m.metadata.response_code;
            match (empty, code) {
                (true, ResponseCode::NoError) => vec!["empty".to_owned()],
                (true, code) => vec![format!("{code:?}")],
                _ => m.answers.iter().map(|r| r.data.to_string()).collect(),
            }
        }
    };
    assert_eq!(text, want, "{name} {kind}");
}

#[test]
fn services() {
    use RecordType::{A, AAAA, CNAME, SRV, TXT};
    check("web.shop.svc.cluster.local.", A, &["10.96.1.0"]);
    check("WEB.Shop.svc.cluster.local.", A, &["10.96.1.0"]);
    check("web.shop.svc.cluster.local.", AAAA, &["fd00:10:96::100"]);
    check("web.shop.svc.cluster.local.", TXT, &["empty"]);
    check("_http._tcp.web.shop.svc.cluster.local.", SRV, &["0 100 80 web.shop.svc.cluster.local."]);
    check("_http._udp.web.shop.svc.cluster.local.", SRV, &["NXDomain"]);
    check("_tcp.web.shop.svc.cluster.local.", A, &["empty"]);
    check("kube-dns.kube-system.svc.cluster.local.", A, &["10.96.0.10"]);
    check("empty.shop.svc.cluster.local.", A, &["empty"]);
    check("out.shop.svc.cluster.local.", A, &["alias example.com."]);
    check("out.shop.svc.cluster.local.", CNAME, &["example.com."]);
}

#[test]
fn headless_services() {
    use RecordType::{A, AAAA, SRV};
    check("db.shop.svc.cluster.local.", A, &["10.244.1.3", "10.244.2.4"]);
    check("db.shop.svc.cluster.local.", AAAA, &["fd00:10:244:1::3"]);
    check("db-0.db.shop.svc.cluster.local.", A, &["10.244.1.3"]);
    check("10-244-2-4.db.shop.svc.cluster.local.", A, &["10.244.2.4"]);
    check(
        "_pg._tcp.db.shop.svc.cluster.local.",
        SRV,
        &[
            "0 100 15432 db-0.db.shop.svc.cluster.local.",
            "0 100 5432 10-244-2-4.db.shop.svc.cluster.local.",
        ],
    );
    check(
        "_dns._udp.db.shop.svc.cluster.local.",
        SRV,
        &["0 100 5353 10-244-2-4.db.shop.svc.cluster.local."],
    );
}

#[test]
fn unknown_names_stay_here() {
    use RecordType::{A, AAAA, PTR, SOA};
    for name in ["nope.shop.svc.cluster.local.", "web.nope.svc.cluster.local.", "x.cluster.local."]
    {
        check(name, A, &["NXDomain"]);
    }
    check("shop.svc.cluster.local.", A, &["empty"]);
    check("cluster.local.", SOA, &["empty"]);
    check("10-244-1-2.shop.pod.cluster.local.", A, &["10.244.1.2"]);
    check("fd00--2.shop.pod.cluster.local.", AAAA, &["fd00::2"]);
    check("x-1.shop.pod.cluster.local.", A, &["NXDomain"]);
    check("example.com.", A, &["elsewhere"]);
    check("mycluster.local.", A, &["elsewhere"]);
    check("web.shop.", A, &["elsewhere"]);
    check(".", A, &["elsewhere"]);
    check("0.1.96.10.in-addr.arpa.", PTR, &["web.shop.svc.cluster.local."]);
    check("3.1.244.10.in-addr.arpa.", PTR, &["db-0.db.shop.svc.cluster.local."]);
    check("9.9.244.10.in-addr.arpa.", PTR, &["NXDomain"]);
    check("8.8.8.8.in-addr.arpa.", PTR, &["elsewhere"]);
}

#[test]
fn bad_questions() {
    let table = table();
    let code = |m: &Message| match table.answer(m) {
        Answer::Here(m) => Some(m.metadata.response_code),
        _ => None,
    };
    let mut two = ask("a.cluster.local.", RecordType::A);
    two.add_query(two.queries[0].clone());
    assert_eq!(code(&two), Some(ResponseCode::FormErr));
    let mut update = ask("a.cluster.local.", RecordType::A);
    update.metadata.op_code = OpCode::Update;
    assert_eq!(code(&update), Some(ResponseCode::NotImp));
    let mut response = ask("a.cluster.local.", RecordType::A);
    response.metadata.message_type = MessageType::Response;
    assert!(matches!(table.answer(&response), Answer::Silence));
}

#[test]
fn sizes_and_order() {
    let mut message = ask("db.shop.svc.cluster.local.", RecordType::A);
    assert_eq!(udp_limit(&message), 512);
    for (offered, want) in [(0, 512), (512, 512), (1000, 1000), (65_535, 1232)] {
        let mut edns = Edns::new();
        edns.set_max_payload(offered);
        message.set_edns(edns);
        assert_eq!(udp_limit(&message), want);
    }
    // Another id, another order.
    message.metadata.id = 2;
    let Answer::Here(answer) = table().answer(&message) else { panic!("not here") };
    assert!(answer.edns.is_some());
    let got: Vec<_> = answer.answers.iter().map(|r| r.data.to_string()).collect();
    assert_eq!(got, ["10.244.2.4", "10.244.1.3"]);
}
