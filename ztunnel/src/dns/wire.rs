//! DNS messages: which questions may be answered here, the answers' bytes, and whether a resolver's answer is one.
//!
//! Purpose: [`read`] sorts any bytes a pod sends, [`answer`] and [`failure`] write, [`is_answer`] checks what a resolver
//! says. All are functions over bytes and total: whatever comes in, they end and do not panic.
//!
//! Invariants: only a plain question for one name's addresses is answered here; anything else, even what we cannot read,
//! is for the resolver, byte for byte; an answer is never longer than the asker takes, and says so when it is cut.

use std::net::IpAddr;

use engine::DnsAnswer;
use hickory_proto::op::{Edns, Message, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::SOA;
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};

/// Seconds that clients may remember a service's address, as Istio has it.
const TTL: u32 = 30;
/// The same for what changes with pods: their addresses, and that there are none. As CoreDNS has it.
const TTL_OF_PODS: u32 = 5;
/// Without EDNS, by the original DNS specification.
const PLAIN_UDP: u16 = 512;
/// What we say we take by UDP: the usual word for "no fragments on any wire".
const OUR_UDP: u16 = 1232;
/// The longest message: its length is 16 bits by TCP.
pub const MAX_MESSAGE: usize = 65_535;
const HEADER: usize = 12;
const MAX_NAME: usize = 255;
/// The top bits of a label's length: anything else is a pointer or not defined.
const LABEL: u8 = 0x3f;
/// Where the question's name stands (behind the header), as other names refer to it.
const POINTER_TO_QUESTION: [u8; 2] = [0xc0, 12];
/// A record without its data: such a pointer, type, class, TTL, length.
const RECORD_HEADER: usize = 12;
/// In the third byte of a message: this is an answer.
const QR: u8 = 0x80;
/// This answer was cut.
const TC: u8 = 0x02;
const OPCODE: u8 = 0x78;
/// In the fourth.
const RCODE: u8 = 0x0f;

/// What a pod sent.
#[derive(Clone, Debug)]
pub enum Read {
    /// Too short to be answered, or an answer itself.
    Ignore,
    /// For the resolver.
    Forward,
    /// A question for addresses.
    Addresses(Box<Asked>),
}

/// A question for the addresses of one name.
#[derive(Clone, Debug)]
pub struct Asked {
    /// In lower case, without the last dot.
    pub name: String,
    /// AAAA, not A.
    pub ipv6: bool,
    message: Message,
}

/// Sorts a message of a pod.
pub fn read(packet: &[u8]) -> Read {
    match packet.get(2) {
        Some(flags) if packet.len() >= HEADER && flags & QR == 0 => {}
        _ => return Read::Ignore,
    }
    match Message::from_vec(packet).ok().and_then(asked) {
        Some(asked) => Read::Addresses(Box::new(asked)),
        None => Read::Forward,
    }
}

/// The type of a message's question; `None`: it has not exactly one, or an unreadable one.
pub fn question_type(packet: &[u8]) -> Option<u16> {
    let [high, low, ..] = question(packet)?.last_chunk::<4>()?;
    Some(u16::from_be_bytes([*high, *low]))
}

/// The name of a message's question as text, for people.
pub fn question_name(packet: &[u8]) -> Option<String> {
    let mut rest = question(packet)?;
    let mut name = String::new();
    while let [length, tail @ ..] = rest
        && *length != 0
    {
        let (label, next) = tail.split_at_checked(usize::from(*length))?;
        name.extend(label.escape_ascii().map(char::from));
        name.push('.');
        rest = next;
    }
    Some(name)
}

/// The bytes of an answer of at most `limit`, or by UDP of what the asker takes. `None` for what is to be forwarded.
pub fn answer(
    asked: &Asked,
    answer: &DnsAnswer,
    cluster_domain: &str,
    limit: Option<usize>,
) -> Option<Vec<u8>> {
    let mut message = begin(&asked.message);
    message.metadata.authoritative = true;
    match answer {
        DnsAnswer::Forward => None,
        DnsAnswer::NoData { .. } => {
            message.authorities.extend(soa(&asked.name, cluster_domain));
            message.to_vec().ok()
        }
        DnsAnswer::Addresses { addresses, of_pods, .. } => {
            let ttl = if *of_pods { TTL_OF_PODS } else { TTL };
            let limit = limit.unwrap_or_else(|| udp_limit(&asked.message));
            with_addresses(message.to_vec().ok()?, addresses, ttl, limit)
        }
    }
}

/// "Try again", for any question: the resolver did not answer.
pub fn failure(packet: &[u8]) -> Option<Vec<u8>> {
    let Ok(asked) = Message::from_vec(packet) else {
        // Enough for the asker to know its question again.
        let [a, b, flags, ..] = *packet else { return None };
        let rcode = ResponseCode::FormErr.low();
        return Some(vec![a, b, QR | (flags & (OPCODE | 1)), QR | rcode, 0, 0, 0, 0, 0, 0, 0, 0]);
    };
    let mut message = begin(&asked);
    message.metadata.response_code = ResponseCode::ServFail;
    message.to_vec().ok()
}

/// Whether `reply` answers `packet`: id, kind and question are the same. The question may be missing where the resolver
/// says that it could not read or would not take it.
pub fn is_answer(packet: &[u8], reply: &[u8]) -> bool {
    let ([a, b, flags, _, ..], [x, y, reply_flags, reply_code, ..]) = (packet, reply) else {
        return false;
    };
    let same = a == x && b == y && flags & OPCODE == reply_flags & OPCODE;
    if !same || reply_flags & QR == 0 || reply.len() < HEADER {
        return false;
    }
    match (question(packet), question(reply)) {
        (Some(asked), Some(answered)) => asked.eq_ignore_ascii_case(answered),
        // No or several questions: there is nothing more to compare.
        (None, _) => true,
        (Some(_), None) => reply.get(4..6) == Some(&[0, 0]) && reply_code & RCODE != 0,
    }
}

fn asked(message: Message) -> Option<Asked> {
    let plain = message.metadata.op_code == OpCode::Query
        && message.answers.is_empty()
        && message.authorities.is_empty()
        // Signatures and the like: the resolver must see what they are about.
        && message.additionals.is_empty()
        && message.signature.is_none()
        && message.edns.as_ref().is_none_or(|edns| edns.version() == 0);
    let [query] = message.queries.as_slice() else { return None };
    let ipv6 = match query.query_type() {
        RecordType::A => false,
        RecordType::AAAA => true,
        _ => return None,
    };
    if !plain || query.query_class() != DNSClass::IN {
        return None;
    }
    Some(Asked { name: host_name(query)?, ipv6, message })
}

/// The name as the configuration has names; `None`: no name of a host.
fn host_name(query: &Query) -> Option<String> {
    let mut name = String::with_capacity(MAX_NAME);
    for label in query.name().iter() {
        if !label.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_')) {
            return None;
        }
        if !name.is_empty() {
            name.push('.');
        }
        name.extend(label.iter().map(|b| char::from(b.to_ascii_lowercase())));
    }
    Some(name)
}

fn begin(asked: &Message) -> Message {
    let mut message = Message::response(asked.metadata.id, asked.metadata.op_code);
    message.metadata.recursion_desired = asked.metadata.recursion_desired;
    message.metadata.recursion_available = true;
    message.metadata.checking_disabled = asked.metadata.checking_disabled;
    message.queries.clone_from(&asked.queries);
    if let Some(theirs) = &asked.edns {
        let mut edns = Edns::new();
        edns.set_max_payload(OUR_UDP);
        edns.set_dnssec_ok(theirs.flags().dnssec_ok);
        message.set_edns(edns);
    }
    message
}

/// How large an answer the asker takes by UDP. What it says is taken at its word: the answer does not leave the pod.
fn udp_limit(asked: &Message) -> usize {
    let offered = asked.edns.as_ref().map_or(PLAIN_UDP, |e| e.max_payload().max(PLAIN_UDP));
    usize::from(offered)
}

/// Puts records for the question's name into an answer that has none: those that fit, and a mark if some do not. Some are
/// better than none: there are clients that do not ask again by TCP. By hand, since hickory stops to compress names after
/// some, and a thousand times a long name would not fit any message.
fn with_addresses(bare: Vec<u8>, addresses: &[IpAddr], ttl: u32, limit: usize) -> Option<Vec<u8>> {
    let (front, back) = bare.split_at_checked(HEADER + question(&bare)?.len())?;
    let first = addresses.first()?;
    let (kind, length): (u16, u16) = if first.is_ipv6() { (28, 16) } else { (1, 4) };
    let one = RECORD_HEADER + usize::from(length);
    let count = addresses.len().min(limit.saturating_sub(bare.len()) / one);
    let mut bytes = Vec::with_capacity(bare.len() + count * one);
    bytes.extend(front);
    for ip in addresses.iter().take(count) {
        bytes.extend(POINTER_TO_QUESTION);
        bytes.extend(kind.to_be_bytes());
        bytes.extend(u16::from(DNSClass::IN).to_be_bytes());
        bytes.extend(ttl.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        match ip {
            IpAddr::V4(ip) => bytes.extend(ip.octets()),
            IpAddr::V6(ip) => bytes.extend(ip.octets()),
        }
    }
    bytes.extend(back);
    bytes.get_mut(6..8)?.copy_from_slice(&u16::try_from(count).ok()?.to_be_bytes());
    if count < addresses.len() {
        *bytes.get_mut(2)? |= TC;
    }
    Some(bytes)
}

/// Lets resolvers remember an empty answer. Only for the cluster's zone: others have their own.
fn soa(name: &str, cluster_domain: &str) -> Option<Record> {
    if !name.ends_with(cluster_domain) {
        return None;
    }
    let named = |text: String| Name::from_ascii(text).ok();
    let zone = named(format!("{cluster_domain}."))?;
    let server = named(format!("ns.dns.{cluster_domain}."))?;
    let person = named(format!("hostmaster.{cluster_domain}."))?;
    let soa = SOA::new(server, person, 1, 7200, 1800, 86_400, TTL_OF_PODS);
    Some(Record::from_rdata(zone, TTL_OF_PODS, RData::SOA(soa)))
}

/// The only question of a message: name, type and class. Its name comes first in the message, so a pointer in it is wrong.
fn question(packet: &[u8]) -> Option<&[u8]> {
    if packet.get(4..6)? != [0, 1] {
        return None;
    }
    let start = packet.get(HEADER..)?;
    let mut at = 0;
    loop {
        let length = *start.get(at)?;
        if length & !LABEL != 0 || at > MAX_NAME {
            return None;
        }
        at += 1 + usize::from(length);
        if length == 0 {
            return start.get(..at + 4);
        }
    }
}

#[cfg(test)]
mod tests;
