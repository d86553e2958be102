//! Sets and maps: what rules look keys up in.
//!
//! Keys and values are concatenations of fields; the kernel keeps each field padded to 4 bytes, in network byte order.

use super::Verdict;
use super::expr::{encode_value, encode_verdict};
use crate::netlink::Message;
use crate::netlink::addr::octets;
use std::net::IpAddr;

const NFTA_SET_TABLE: u16 = 1;
const NFTA_SET_NAME: u16 = 2;
const NFTA_SET_FLAGS: u16 = 3;
const NFTA_SET_KEY_TYPE: u16 = 4;
const NFTA_SET_KEY_LEN: u16 = 5;
const NFTA_SET_DATA_TYPE: u16 = 6;
const NFTA_SET_DATA_LEN: u16 = 7;
const NFTA_SET_DESC: u16 = 9;
const NFTA_SET_ID: u16 = 10;
const NFTA_SET_DESC_SIZE: u16 = 1;
const NFTA_SET_ELEM_KEY: u16 = 1;
const NFTA_SET_ELEM_DATA: u16 = 2;
const NFTA_LIST_TABLE: u16 = 1;
const NFTA_LIST_SET: u16 = 2;
const NFTA_LIST_ELEMENTS: u16 = 3;
const NFTA_LIST_ELEM: u16 = 1;
const NFT_SET_CONSTANT: u32 = 0x2;
const NFT_SET_MAP: u32 = 0x8;
/// Rules may add and delete entries.
const NFT_SET_EVAL: u32 = 0x20;
/// Entries a dynamic set holds at most: as many connections as one pod has ports.
const DYNAMIC_MAX: u32 = 65_535;
const NFT_DATA_VERDICT: u32 = 0xffff_ff00;
/// A message's list of entries is one attribute of at most 64 KiB; an entry takes up to about 100 bytes.
pub(super) const ENTRIES_PER_MESSAGE: usize = 400;

/// The type of a field in a key or value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// A plain number, in the machine's byte order.
    Number,
    /// An IPv4 address.
    Ipv4,
    /// An IPv6 address.
    Ipv6,
    /// A transport protocol.
    Protocol,
    /// A port.
    Port,
}

/// A set, or with values a map. Constant once made, unless it is dynamic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Set {
    /// Unique in the table.
    pub name: String,
    /// Fields of the key.
    pub key: Vec<Field>,
    /// Fields of the value; empty: a plain set, or a map of verdicts if the entries say so.
    pub value: Vec<Field>,
    /// Whether the entries carry verdicts.
    pub verdicts: bool,
    /// The entries; a key must not come twice.
    pub entries: Vec<Entry>,
    /// Rules, and later transactions, may add entries and delete them.
    pub dynamic: bool,
}

/// One entry of a set or map.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    key: Vec<u8>,
    value: Vec<u8>,
    verdict: Option<Verdict>,
}

impl Entry {
    /// An entry with an empty key.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an address to the key.
    #[must_use]
    pub fn ip(mut self, ip: IpAddr) -> Self {
        push(&mut self.key, &octets(ip));
        self
    }

    /// Adds a protocol to the key.
    #[must_use]
    pub fn protocol(mut self, protocol: u8) -> Self {
        push(&mut self.key, &[protocol]);
        self
    }

    /// Adds a port to the key.
    #[must_use]
    pub fn port(mut self, port: u16) -> Self {
        push(&mut self.key, &port.to_be_bytes());
        self
    }

    /// Adds a number to the key.
    #[must_use]
    pub fn number(mut self, number: u32) -> Self {
        push(&mut self.key, &number.to_ne_bytes());
        self
    }

    /// Makes the value an address and a port.
    #[must_use]
    pub fn to(mut self, ip: IpAddr, port: u16) -> Self {
        push(&mut self.value, &octets(ip));
        push(&mut self.value, &port.to_be_bytes());
        self
    }

    /// Makes the value a verdict.
    #[must_use]
    pub fn verdict(mut self, verdict: Verdict) -> Self {
        self.verdict = Some(verdict);
        self
    }
}

impl Entry {
    /// The key as the kernel keeps it.
    pub(crate) fn key(&self) -> &[u8] {
        &self.key
    }
}

impl Set {
    /// Appends what creates the set. `id` must differ among the sets of one transaction.
    pub(super) fn encode(&self, m: &mut Message, table: &str, id: usize) {
        let is_map = self.verdicts || !self.value.is_empty();
        let kind = if self.dynamic { NFT_SET_EVAL } else { NFT_SET_CONSTANT };
        m.str(NFTA_SET_TABLE, table)
            .str(NFTA_SET_NAME, &self.name)
            .be32(NFTA_SET_FLAGS, kind | if is_map { NFT_SET_MAP } else { 0 })
            .be32(NFTA_SET_KEY_TYPE, type_number(&self.key))
            .be32(NFTA_SET_KEY_LEN, length(&self.key));
        if self.verdicts {
            m.be32(NFTA_SET_DATA_TYPE, NFT_DATA_VERDICT);
        } else if is_map {
            m.be32(NFTA_SET_DATA_TYPE, type_number(&self.value));
            m.be32(NFTA_SET_DATA_LEN, length(&self.value));
        }
        // The kernel picks a hash or a bitmap by the number of entries.
        let count = if self.dynamic {
            DYNAMIC_MAX
        } else {
            u32::try_from(self.entries.len()).unwrap_or(u32::MAX)
        };
        if count > 0 {
            m.nested(NFTA_SET_DESC, |m| {
                m.be32(NFTA_SET_DESC_SIZE, count);
            });
        }
        m.be32(NFTA_SET_ID, u32::try_from(id).unwrap_or(u32::MAX));
    }

    /// Appends some of the entries.
    pub(super) fn encode_entries(&self, m: &mut Message, table: &str, entries: &[Entry]) {
        m.str(NFTA_LIST_TABLE, table).str(NFTA_LIST_SET, &self.name);
        m.nested(NFTA_LIST_ELEMENTS, |m| {
            for entry in entries {
                m.nested(NFTA_LIST_ELEM, |m| {
                    encode_value(m, NFTA_SET_ELEM_KEY, &entry.key);
                    if let Some(verdict) = &entry.verdict {
                        encode_verdict(m, NFTA_SET_ELEM_DATA, verdict);
                    } else if !entry.value.is_empty() {
                        encode_value(m, NFTA_SET_ELEM_DATA, &entry.value);
                    }
                });
            }
        });
    }
}

fn push(to: &mut Vec<u8>, field: &[u8]) {
    to.extend_from_slice(field);
    to.resize(to.len().next_multiple_of(4), 0);
}

fn length(fields: &[Field]) -> u32 {
    fields.iter().map(|f| if *f == Field::Ipv6 { 16 } else { 4 }).sum()
}

/// The numbers under which the `nft` program knows types, six bits a field. The kernel only keeps them.
fn type_number(fields: &[Field]) -> u32 {
    fields.iter().fold(0, |number, field| {
        let one = match field {
            Field::Number => 4,
            Field::Ipv4 => 7,
            Field::Ipv6 => 8,
            Field::Protocol => 12,
            Field::Port => 13,
        };
        number << 6 | one
    })
}
