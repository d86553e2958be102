//! The expressions a rule is made of, and a builder that puts them together the way one reads an `nft` rule.
//!
//! A rule runs its expressions in order over a few registers: load a field, compare, stop when it does not match; what
//! is left at the end acts. Invariants: a match on an IPv4 or IPv6 field checks the family first, one on a port the
//! protocol, so no rule reads bytes of another protocol.

use std::net::{IpAddr, SocketAddr};

use crate::netlink::Message;
use crate::netlink::addr::octets;

const NFTA_LIST_ELEM: u16 = 1;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_DATA_VALUE: u16 = 1;
const NFTA_DATA_VERDICT: u16 = 2;
const NFTA_VERDICT_CODE: u16 = 1;
const NFTA_VERDICT_CHAIN: u16 = 2;
/// The interface number of loopback, in every namespace.
const LOOPBACK_INDEX: u32 = 1;
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;
const RTN_LOCAL: u32 = 2;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;

/// A register. The sixteen small ones of 4 bytes start at 8; 1 to 4 are groups of four of them.
pub(super) type Register = u32;
/// The verdict register: writing to it decides.
const VERDICT: Register = 0;
/// The register of every single value.
const REG: Register = 1;
/// Where a second value stands beside it.
const REG_BESIDE: Register = 2;
/// The first small register; a concatenation starts here.
pub(super) const REG32: Register = 8;

/// What happens to a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Through this hook.
    Accept,
    /// Gone.
    Drop,
    /// Back to the calling chain, or the hook's policy.
    Return,
    /// Into another chain of the table, and back if that decides nothing.
    Jump(String),
}

/// Which end of a flow is this namespace's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The packet's source.
    Sent,
    /// The packet's destination.
    Received,
}

/// A number the kernel knows about a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Meta {
    Mark = 3,
    InputInterface = 4,
    Family = 15,
    Protocol = 16,
}

/// One step of a rule. Names follow the kernel's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Expr {
    LoadMeta(Meta, Register),
    StoreMark(Register),
    /// Base (1 network, 2 transport header), offset, length, target.
    Payload(u32, u32, u32, Register),
    Equal(Vec<u8>),
    NotEqual(Vec<u8>),
    /// Keeps the bits of a mask in the single-value register.
    And(Vec<u8>),
    Value(Register, Vec<u8>),
    Verdict(Verdict),
    /// Looks the key up in a set or map; a hit stores the value, or decides, or just goes on.
    Lookup {
        set: String,
        key: Register,
        into: Option<Register>,
    },
    /// Adds the key to a dynamic set, or deletes it there.
    Update {
        set: String,
        key: Register,
        delete: bool,
    },
    DestinationType,
    Tproxy,
    /// To the address in the single-value register and the port beside it.
    TproxyTo {
        ipv6: bool,
    },
    Dnat {
        ipv6: bool,
        address: Register,
        port: Register,
    },
    Masquerade,
    ResetTcp,
    PortUnreachable,
    Random {
        below: u32,
    },
    Counter,
    Notrack,
}

/// One rule: expressions, and a comment that `nft list` shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    pub(super) comment: String,
    pub(super) exprs: Vec<Expr>,
}

impl Rule {
    /// A rule that matches every packet and does nothing yet.
    pub fn new(comment: &str) -> Self {
        Self { comment: comment.to_owned(), exprs: Vec::new() }
    }

    /// Only this transport protocol.
    #[must_use]
    pub fn protocol(self, protocol: u8) -> Self {
        self.with([Expr::LoadMeta(Meta::Protocol, REG), Expr::Equal(vec![protocol])])
    }

    /// Only other transport protocols.
    #[must_use]
    pub fn protocol_not(self, protocol: u8) -> Self {
        self.with([Expr::LoadMeta(Meta::Protocol, REG), Expr::NotEqual(vec![protocol])])
    }

    /// Only from this address.
    #[must_use]
    pub fn source(self, ip: IpAddr) -> Self {
        self.address(ip, 12, 8)
    }

    /// Only to this address.
    #[must_use]
    pub fn destination(self, ip: IpAddr) -> Self {
        self.address(ip, 16, 24)
    }

    /// Only to IPv6 addresses that mean something on one link only (fe80::/10).
    #[must_use]
    pub fn destination_is_link_local(self) -> Self {
        let (mut mask, mut value) = (vec![0; 16], vec![0; 16]);
        (mask[0], mask[1], value[0], value[1]) = (0xff, 0xc0, 0xfe, 0x80);
        self.family(true).with([Expr::Payload(1, 24, 16, REG), Expr::And(mask), Expr::Equal(value)])
    }

    /// Only to an address of this namespace.
    #[must_use]
    pub fn destination_is_local(self) -> Self {
        self.with([Expr::DestinationType, Expr::Equal(RTN_LOCAL.to_ne_bytes().to_vec())])
    }

    /// Only to this TCP port.
    #[must_use]
    pub fn tcp_port(self, port: u16) -> Self {
        self.protocol(TCP)
            .with([Expr::Payload(2, 2, 2, REG), Expr::Equal(port.to_be_bytes().to_vec())])
    }

    /// Only to this UDP port.
    #[must_use]
    pub fn udp_port(self, port: u16) -> Self {
        self.protocol(UDP)
            .with([Expr::Payload(2, 2, 2, REG), Expr::Equal(port.to_be_bytes().to_vec())])
    }

    /// Only UDP, and only to other ports.
    #[must_use]
    pub fn udp_port_not(self, port: u16) -> Self {
        self.protocol(UDP)
            .with([Expr::Payload(2, 2, 2, REG), Expr::NotEqual(port.to_be_bytes().to_vec())])
    }

    /// Only the first packet of a TCP connection: SYN without ACK.
    #[must_use]
    pub fn tcp_opening(self) -> Self {
        // Where the flags are in the TCP header, and two of them.
        let (flags, syn, ack) = (13, 0x02, 0x10);
        self.protocol(TCP).with([
            Expr::Payload(2, flags, 1, REG),
            Expr::And(vec![syn | ack]),
            Expr::Equal(vec![syn]),
        ])
    }

    /// Only packets whose mark has these bits under the mask.
    #[must_use]
    pub fn mark(self, value: u32, mask: u32) -> Self {
        self.with([
            Expr::LoadMeta(Meta::Mark, REG),
            Expr::And(mask.to_ne_bytes().to_vec()),
            Expr::Equal(value.to_ne_bytes().to_vec()),
        ])
    }

    /// Only packets that came in over loopback.
    #[must_use]
    pub fn from_loopback(self) -> Self {
        self.with([
            Expr::LoadMeta(Meta::InputInterface, REG),
            Expr::Equal(LOOPBACK_INDEX.to_ne_bytes().to_vec()),
        ])
    }

    /// Only packets that came in by the interface of this number.
    #[must_use]
    pub fn from_interface(self, index: u32) -> Self {
        self.with([
            Expr::LoadMeta(Meta::InputInterface, REG),
            Expr::Equal(index.to_ne_bytes().to_vec()),
        ])
    }

    /// Only packets whose (number of the interface they came in by, source address) is in a set.
    #[must_use]
    pub fn interface_and_source_in(self, ipv6: bool, set: &str) -> Self {
        let (source, length) = if ipv6 { (8, 16) } else { (12, 4) };
        self.family(ipv6).with([
            Expr::LoadMeta(Meta::InputInterface, REG32),
            Expr::Payload(1, source, length, REG32 + 1),
            Expr::Lookup { set: set.to_owned(), key: REG32, into: None },
        ])
    }

    /// Only packets of this address family.
    #[must_use]
    pub fn family(self, ipv6: bool) -> Self {
        let family = if ipv6 { NFPROTO_IPV6 } else { NFPROTO_IPV4 };
        self.with([Expr::LoadMeta(Meta::Family, REG), Expr::Equal(vec![family])])
    }

    /// Only packets whose (destination address, protocol, destination port) is in a set. If it is a map of verdicts,
    /// the verdict of the entry holds.
    #[must_use]
    pub fn service_in(self, ipv6: bool, set: &str, verdicts: bool) -> Self {
        let (offset, length, words) = if ipv6 { (24, 16, 4) } else { (16, 4, 1) };
        self.family(ipv6).with([
            Expr::Payload(1, offset, length, REG32),
            Expr::LoadMeta(Meta::Protocol, REG32 + words),
            Expr::Payload(2, 2, 2, REG32 + words + 1),
            Expr::Lookup { set: set.to_owned(), key: REG32, into: verdicts.then_some(VERDICT) },
        ])
    }

    /// Only packets whose (source address, destination address) is in a set.
    #[must_use]
    pub fn pair_in(self, ipv6: bool, set: &str) -> Self {
        let (source, destination, length, words) =
            if ipv6 { (8, 24, 16, 4) } else { (12, 16, 4, 1) };
        self.family(ipv6).with([
            Expr::Payload(1, source, length, REG32),
            Expr::Payload(1, destination, length, REG32 + words),
            Expr::Lookup { set: set.to_owned(), key: REG32, into: None },
        ])
    }

    /// Only TCP packets whose flow is in a set.
    #[must_use]
    pub fn flow_in(self, ipv6: bool, set: &str) -> Self {
        self.flow(ipv6, Way::Sent).with([Expr::Lookup {
            set: set.to_owned(),
            key: REG32,
            into: None,
        }])
    }

    /// Adds the TCP packet's flow to a dynamic set.
    #[must_use]
    pub fn remember_flow(self, ipv6: bool, way: Way, set: &str) -> Self {
        let update = Expr::Update { set: set.to_owned(), key: REG32, delete: false };
        self.flow(ipv6, way).with([update])
    }

    /// Deletes the TCP packet's flow from a dynamic set.
    #[must_use]
    pub fn forget_flow(self, ipv6: bool, set: &str) -> Self {
        let update = Expr::Update { set: set.to_owned(), key: REG32, delete: true };
        self.flow(ipv6, Way::Sent).with([update])
    }

    /// Loads (own address, own port, other address, other port).
    fn flow(self, ipv6: bool, way: Way) -> Self {
        let (source, destination, length, words) =
            if ipv6 { (8, 24, 16, 4) } else { (12, 16, 4, 1) };
        let (own, other) = match way {
            Way::Sent => ((source, 0), (destination, 2)),
            Way::Received => ((destination, 2), (source, 0)),
        };
        self.family(ipv6).protocol(TCP).with([
            Expr::Payload(1, own.0, length, REG32),
            Expr::Payload(2, own.1, 2, REG32 + words),
            Expr::Payload(1, other.0, length, REG32 + words + 1),
            Expr::Payload(2, other.1, 2, REG32 + 2 * words + 1),
        ])
    }

    /// Sets the packet's mark.
    #[must_use]
    pub fn set_mark(self, mark: u32) -> Self {
        self.with([Expr::Value(REG, mark.to_ne_bytes().to_vec()), Expr::StoreMark(REG)])
    }

    /// Hands the connection to a transparent listener on this port, of the packet's family; needs
    /// [`protocol`](Self::protocol).
    #[must_use]
    pub fn tproxy(self, port: u16) -> Self {
        self.with([Expr::Value(REG, port.to_be_bytes().to_vec()), Expr::Tproxy])
    }

    /// Hands the packet to the transparent socket at this address, which need not take any other packets. Only for packets
    /// of the address's family; needs [`protocol`](Self::protocol).
    #[must_use]
    pub fn tproxy_to(self, to: SocketAddr) -> Self {
        self.with([
            Expr::Value(REG, octets(to.ip())),
            Expr::Value(REG_BESIDE, to.port().to_be_bytes().to_vec()),
            Expr::TproxyTo { ipv6: to.is_ipv6() },
        ])
    }

    /// Sends the connection to one of the map's (address, port) values, chosen at random. The map's keys must be the
    /// numbers below `count`.
    #[must_use]
    pub fn dnat_to_one_of(self, ipv6: bool, map: &str, count: u32) -> Self {
        let words = if ipv6 { 4 } else { 1 };
        self.with([
            Expr::Random { below: count },
            Expr::Lookup { set: map.to_owned(), key: REG, into: Some(REG32) },
            Expr::Dnat { ipv6, address: REG32, port: REG32 + words },
        ])
    }

    /// Lets the packet leave with an address of the interface it leaves by.
    #[must_use]
    pub fn masquerade(self) -> Self {
        self.with([Expr::Masquerade])
    }

    /// Refuses a TCP connection; needs [`protocol`](Self::protocol).
    #[must_use]
    pub fn reset_tcp(self) -> Self {
        self.with([Expr::ResetTcp])
    }

    /// Refuses by ICMP, "port unreachable".
    #[must_use]
    pub fn port_unreachable(self) -> Self {
        self.with([Expr::PortUnreachable])
    }

    /// Keeps connection tracking away from the packet.
    #[must_use]
    pub fn notrack(self) -> Self {
        self.with([Expr::Notrack])
    }

    /// Counts the packets that come here.
    #[must_use]
    pub fn counter(self) -> Self {
        self.with([Expr::Counter])
    }

    /// Decides.
    #[must_use]
    pub fn verdict(self, verdict: Verdict) -> Self {
        self.with([Expr::Verdict(verdict)])
    }

    fn address(self, ip: IpAddr, offset_v4: u32, offset_v6: u32) -> Self {
        let (offset, length) = if ip.is_ipv6() { (offset_v6, 16) } else { (offset_v4, 4) };
        self.family(ip.is_ipv6())
            .with([Expr::Payload(1, offset, length, REG), Expr::Equal(octets(ip))])
    }

    fn with<const N: usize>(mut self, exprs: [Expr; N]) -> Self {
        self.exprs.extend(exprs);
        self
    }
}

/// Appends a rule's expressions as list elements.
pub(super) fn encode(message: &mut Message, exprs: &[Expr]) {
    for expr in exprs {
        message.nested(NFTA_LIST_ELEM, |m| {
            m.str(NFTA_EXPR_NAME, name(expr));
            m.nested(NFTA_EXPR_DATA, |m| encode_data(m, expr));
        });
    }
}

/// Appends a verdict as data of an attribute.
pub(super) fn encode_verdict(message: &mut Message, kind: u16, verdict: &Verdict) {
    let (code, chain) = match verdict {
        Verdict::Drop => (0, None),
        Verdict::Accept => (1, None),
        Verdict::Return => (-5, None),
        Verdict::Jump(chain) => (-3i32, Some(chain)),
    };
    message.nested(kind, |m| {
        m.nested(NFTA_DATA_VERDICT, |m| {
            m.be32(NFTA_VERDICT_CODE, code.cast_unsigned());
            if let Some(chain) = chain {
                m.str(NFTA_VERDICT_CHAIN, chain);
            }
        });
    });
}

/// Appends bytes as data of an attribute.
pub(super) fn encode_value(message: &mut Message, kind: u16, value: &[u8]) {
    message.nested(kind, |m| {
        m.attr(NFTA_DATA_VALUE, value);
    });
}

/// The kernel's name of an expression, which is also the second half of its module's (`nft_tproxy`).
pub(super) fn name(expr: &Expr) -> &'static str {
    match expr {
        Expr::LoadMeta(..) | Expr::StoreMark(_) => "meta",
        Expr::Payload(..) => "payload",
        Expr::Equal(_) | Expr::NotEqual(_) => "cmp",
        Expr::And(_) => "bitwise",
        Expr::Value(..) | Expr::Verdict(_) => "immediate",
        Expr::Lookup { .. } => "lookup",
        Expr::Update { .. } => "dynset",
        Expr::DestinationType => "fib",
        Expr::Tproxy | Expr::TproxyTo { .. } => "tproxy",
        Expr::Dnat { .. } => "nat",
        Expr::Masquerade => "masq",
        Expr::ResetTcp | Expr::PortUnreachable => "reject",
        Expr::Random { .. } => "numgen",
        Expr::Counter => "counter",
        Expr::Notrack => "notrack",
    }
}

/// Attribute numbers here are those of each expression's own enum in `nf_tables.h`.
fn encode_data(m: &mut Message, expr: &Expr) {
    match expr {
        Expr::LoadMeta(key, into) => {
            m.be32(2, *key as u32).be32(1, *into);
        }
        Expr::StoreMark(from) => {
            m.be32(2, Meta::Mark as u32).be32(3, *from);
        }
        Expr::Payload(base, offset, length, into) => {
            m.be32(1, *into).be32(2, *base).be32(3, *offset).be32(4, *length);
        }
        Expr::Equal(value) => encode_value(m.be32(1, REG).be32(2, 0), 3, value),
        Expr::NotEqual(value) => encode_value(m.be32(1, REG).be32(2, 1), 3, value),
        Expr::And(mask) => {
            m.be32(1, REG).be32(2, REG).be32(3, length(mask));
            encode_value(m, 4, mask);
            encode_value(m, 5, &vec![0; mask.len()]);
        }
        Expr::Value(into, value) => encode_value(m.be32(1, *into), 2, value),
        Expr::Verdict(verdict) => encode_verdict(m.be32(1, VERDICT), 2, verdict),
        Expr::Lookup { set, key, into } => {
            m.str(1, set).be32(2, *key);
            if let Some(into) = into {
                m.be32(3, *into);
            }
        }
        Expr::Update { set, key, delete } => {
            m.str(1, set).be32(3, if *delete { 2 } else { 0 }).be32(4, *key);
        }
        // Result: address type; of the destination.
        Expr::DestinationType => {
            m.be32(1, REG).be32(2, 3).be32(3, 2);
        }
        // Family 0: whichever the packet has.
        Expr::Tproxy => {
            m.be32(1, 0).be32(3, REG);
        }
        Expr::TproxyTo { ipv6 } => {
            let family = if *ipv6 { NFPROTO_IPV6 } else { NFPROTO_IPV4 };
            m.be32(1, u32::from(family)).be32(2, REG).be32(3, REG_BESIDE);
        }
        Expr::Dnat { ipv6, address, port } => {
            m.be32(1, 1).be32(2, if *ipv6 { 10 } else { 2 }).be32(3, *address).be32(5, *port);
        }
        Expr::ResetTcp => {
            m.be32(1, 1);
        }
        Expr::PortUnreachable => {
            m.be32(1, 2).attr(2, &[1]);
        }
        Expr::Random { below } => {
            m.be32(1, REG).be32(2, *below).be32(3, 1).be32(4, 0);
        }
        Expr::Counter | Expr::Masquerade | Expr::Notrack => {}
    }
}

fn length(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).unwrap_or(u32::MAX)
}
