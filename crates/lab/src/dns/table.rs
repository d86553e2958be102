//! Which name has which records: the DNS specification of Kubernetes, as a pure function over a table.
//!
//! Invariants: a name of the cluster is never asked elsewhere, so that a typing error does not leak and cannot be answered
//! by somebody outside; a name that exists without the asked type is an empty answer, one that does not exist NXDOMAIN,
//! both with the SOA that lets resolvers remember it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hickory_proto::op::{Edns, Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, CNAME, PTR, SOA, SRV};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};

use crate::endpoints::Resolved;
use net::service_nat::Protocol;

/// The zone that is ours.
pub(crate) const ZONE: &str = "cluster.local";
/// As CoreDNS has it: pods come and go.
const TTL: u32 = 5;
/// The largest answer by UDP that does not risk fragments on the way; more goes by TCP.
pub(crate) const MAX_UDP: u16 = 1232;
/// Without EDNS, by the original DNS specification.
const PLAIN_UDP: u16 = 512;

/// All records, by name in lower case without the final dot.
#[derive(Clone, Debug, Default)]
pub(crate) struct Table {
    records: BTreeMap<String, Vec<Data>>,
    /// Names that exist because something lies below them.
    parents: BTreeSet<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Data {
    Ip(IpAddr),
    Srv { port: u16, target: String },
    Alias(String),
    Pointer(String),
}

/// What to do with a question.
#[derive(Debug)]
pub(crate) enum Answer {
    Here(Message),
    /// Ask the machine's resolvers.
    Elsewhere,
    /// The name stands for another one outside: ask for that, and put these records before the answer.
    Alias {
        begun: Message,
        target: Name,
        kind: RecordType,
    },
    /// Not a question: say nothing.
    Silence,
}

impl Table {
    /// The table for these Services. `aliases`: `ExternalName` Services, as (namespace, name, target).
    pub(crate) fn new(
        services: &[Resolved],
        aliases: &[(String, String, String)],
        dns: [IpAddr; 2],
    ) -> Self {
        let mut table = Self::default();
        let own = format!("kube-dns.kube-system.svc.{ZONE}");
        for ip in dns {
            table.add(&own, Data::Ip(ip));
            table.add(&reverse(ip), Data::Pointer(own.clone()));
        }
        for service in services {
            table.service(service);
        }
        for (namespace, name, target) in aliases {
            let target = target.trim_end_matches('.').to_lowercase();
            table.add(&format!("{name}.{namespace}.svc.{ZONE}"), Data::Alias(target));
        }
        table
    }

    fn service(&mut self, service: &Resolved) {
        let name = format!("{}.{}.svc.{ZONE}", service.name, service.namespace);
        // A Service without endpoints exists all the same.
        self.records.entry(name.clone()).or_default();
        self.parent_of(&name);
        for &ip in &service.vips {
            self.add(&name, Data::Ip(ip));
            self.add(&reverse(ip), Data::Pointer(name.clone()));
        }
        if !service.vips.is_empty() {
            for port in service.ports.iter().filter(|p| !p.name.is_empty()) {
                let srv = Data::Srv { port: port.number, target: name.clone() };
                self.add(&srv_name(&port.name, port.protocol, &name), srv);
            }
            return;
        }
        for endpoint in &service.endpoints {
            for &ip in &endpoint.ips {
                let own = endpoint.hostname.clone().unwrap_or_else(|| dashed(ip));
                let own = format!("{own}.{name}");
                self.add(&name, Data::Ip(ip));
                self.add(&own, Data::Ip(ip));
                self.add(&reverse(ip), Data::Pointer(own.clone()));
                for (port, target) in
                    service.ports.iter().zip(&endpoint.ports).filter(|(p, _)| !p.name.is_empty())
                {
                    if let Some(target) = target {
                        let srv = Data::Srv { port: *target, target: own.clone() };
                        self.add(&srv_name(&port.name, port.protocol, &name), srv);
                    }
                }
            }
        }
    }

    fn add(&mut self, name: &str, data: Data) {
        let name = name.to_lowercase();
        self.parent_of(&name);
        let records = self.records.entry(name).or_default();
        if !records.contains(&data) {
            records.push(data);
        }
    }

    fn parent_of(&mut self, name: &str) {
        let mut rest = name;
        while let Some((_, parent)) = rest.split_once('.') {
            if !parent.ends_with(ZONE) || !self.parents.insert(parent.to_owned()) {
                return;
            }
            rest = parent;
        }
    }

    /// Answers one question.
    pub(crate) fn answer(&self, asked: &Message) -> Answer {
        if asked.metadata.message_type != MessageType::Query {
            return Answer::Silence;
        }
        let mut answer = begin(asked);
        let [query] = asked.queries.as_slice() else {
            answer.metadata.response_code = ResponseCode::FormErr;
            return Answer::Here(answer);
        };
        if asked.metadata.op_code != OpCode::Query {
            answer.metadata.response_code = ResponseCode::NotImp;
            return Answer::Here(answer);
        }
        let name = query.name().to_ascii().trim_end_matches('.').to_lowercase();
        let ours = within(&name, ZONE);
        let pointer = query.query_type() == RecordType::PTR && self.records.contains_key(&name);
        if (!ours && !pointer && !is_cluster_reverse(&name)) || query.query_class() != DNSClass::IN
        {
            return Answer::Elsewhere;
        }
        answer.metadata.authoritative = true;
        let found = self.records.get(&name).cloned().or_else(|| pod_name(&name));
        let Some(found) = found else {
            if !self.parents.contains(&name) {
                answer.metadata.response_code = ResponseCode::NXDomain;
            }
            return Answer::Here(with_soa(answer));
        };
        if let [Data::Alias(target)] = found.as_slice() {
            return alias(answer, query.name(), target, query.query_type());
        }
        for data in rotated(&found, usize::from(asked.metadata.id)) {
            add_record(&mut answer, query.name(), query.query_type(), data);
        }
        if query.query_type() == RecordType::SRV {
            self.add_targets(&mut answer, &found);
        }
        Answer::Here(if answer.answers.is_empty() { with_soa(answer) } else { answer })
    }

    /// The addresses behind SRV targets, which saves the asker a round.
    fn add_targets(&self, answer: &mut Message, found: &[Data]) {
        for data in found {
            let Data::Srv { target, .. } = data else { continue };
            let Ok(name) = Name::from_ascii(format!("{target}.")) else { continue };
            for data in self.records.get(target).into_iter().flatten() {
                if let Data::Ip(ip) = data {
                    answer.add_additional(Record::from_rdata(name.clone(), TTL, address(*ip)));
                }
            }
        }
    }
}

/// How large the answer to this question may be by UDP.
pub(crate) fn udp_limit(asked: &Message) -> usize {
    let offered = asked.edns.as_ref().map_or(PLAIN_UDP, |e| e.max_payload().max(PLAIN_UDP));
    usize::from(offered.min(MAX_UDP))
}

/// "Something went wrong, try again."
pub(crate) fn failure(asked: &Message, code: ResponseCode) -> Message {
    let mut answer = begin(asked);
    answer.metadata.response_code = code;
    answer
}

fn begin(asked: &Message) -> Message {
    let mut answer = Message::response(asked.metadata.id, asked.metadata.op_code);
    answer.metadata.recursion_desired = asked.metadata.recursion_desired;
    answer.metadata.recursion_available = true;
    answer.metadata.checking_disabled = asked.metadata.checking_disabled;
    answer.queries.clone_from(&asked.queries);
    if asked.edns.is_some() {
        let mut edns = Edns::new();
        edns.set_max_payload(MAX_UDP);
        answer.set_edns(edns);
    }
    answer
}

fn alias(mut answer: Message, name: &Name, target: &str, kind: RecordType) -> Answer {
    let Ok(target) = Name::from_ascii(format!("{target}.")) else {
        answer.metadata.response_code = ResponseCode::ServFail;
        return Answer::Here(answer);
    };
    answer.add_answer(Record::from_rdata(name.clone(), TTL, RData::CNAME(CNAME(target.clone()))));
    if kind == RecordType::CNAME {
        return Answer::Here(answer);
    }
    Answer::Alias { begun: answer, target, kind }
}

fn add_record(answer: &mut Message, name: &Name, kind: RecordType, data: &Data) {
    let any = kind == RecordType::ANY;
    let text = |t: &str| Name::from_ascii(format!("{t}.")).ok();
    let rdata = match data {
        Data::Ip(IpAddr::V4(_)) if kind != RecordType::A && !any => None,
        Data::Ip(IpAddr::V6(_)) if kind != RecordType::AAAA && !any => None,
        Data::Ip(ip) => Some(address(*ip)),
        Data::Srv { port, target } if kind == RecordType::SRV || any => {
            text(target).map(|t| RData::SRV(SRV::new(0, 100, *port, t)))
        }
        Data::Pointer(to) if kind == RecordType::PTR || any => text(to).map(|t| RData::PTR(PTR(t))),
        Data::Srv { .. } | Data::Pointer(_) | Data::Alias(_) => None,
    };
    if let Some(rdata) = rdata {
        answer.add_answer(Record::from_rdata(name.clone(), TTL, rdata));
    }
}

fn address(ip: IpAddr) -> RData {
    match ip {
        IpAddr::V4(ip) => RData::A(A(ip)),
        IpAddr::V6(ip) => RData::AAAA(AAAA(ip)),
    }
}

fn with_soa(mut answer: Message) -> Message {
    let name = |n: String| Name::from_ascii(n).ok();
    let names = (
        name(format!("{ZONE}.")),
        name(format!("ns.dns.{ZONE}.")),
        name(format!("hostmaster.{ZONE}.")),
    );
    if let (Some(zone), Some(server), Some(person)) = names {
        let soa = SOA::new(server, person, 1, 7200, 1800, 86_400, TTL);
        answer.add_authority(Record::from_rdata(zone, TTL, RData::SOA(soa)));
    }
    answer
}

/// Starts somewhere else for each question, so that clients that take the first address spread.
fn rotated(data: &[Data], by: usize) -> impl Iterator<Item = &Data> {
    let at = by.checked_rem(data.len()).unwrap_or_default();
    data[at..].iter().chain(&data[..at])
}

fn within(name: &str, zone: &str) -> bool {
    name == zone || name.strip_suffix(zone).is_some_and(|rest| rest.ends_with('.'))
}

fn srv_name(port: &str, protocol: Protocol, service: &str) -> String {
    let protocol = match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    };
    format!("_{port}._{protocol}.{service}")
}

/// `10-244-1-2`, as CoreDNS names pods without a host name.
fn dashed(ip: IpAddr) -> String {
    ip.to_string().replace(['.', ':'], "-")
}

/// `10-244-1-2.NAMESPACE.pod.cluster.local` is that address.
fn pod_name(name: &str) -> Option<Vec<Data>> {
    let rest = name.strip_suffix(ZONE)?.strip_suffix(".pod.")?;
    let (ip, namespace) = rest.split_once('.')?;
    if namespace.contains('.') {
        return None;
    }
    let v4 = ip.replace('-', ".").parse::<Ipv4Addr>().map(IpAddr::from);
    let ip = v4.or_else(|_| ip.replace('-', ":").parse::<Ipv6Addr>().map(IpAddr::from)).ok()?;
    Some(vec![Data::Ip(ip)])
}

/// `4.3.2.1.in-addr.arpa` and the like.
fn reverse(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(ip) => {
            let [a, b, c, d] = ip.octets();
            format!("{d}.{c}.{b}.{a}.in-addr.arpa")
        }
        IpAddr::V6(ip) => {
            let digits: Vec<String> =
                format!("{:032x}", ip.to_bits()).chars().rev().map(String::from).collect();
            format!("{}.ip6.arpa", digits.join("."))
        }
    }
}

/// Reverse names of ranges that exist only in the lab: nobody else knows them.
fn is_cluster_reverse(name: &str) -> bool {
    ["96.10.in-addr.arpa", "244.10.in-addr.arpa", "0.1.0.0.0.0.d.f.ip6.arpa"]
        .iter()
        .any(|zone| within(name, zone))
}

#[cfg(test)]
#[path = "table/tests.rs"]
mod tests;
