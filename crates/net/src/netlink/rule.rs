//! Policy routing: packets with a firewall mark look in a table of their own.

use nix::errno::Errno;

use super::{Message, NLM_F_CREATE, NLM_F_EXCL, Netlink, Result, attrs, route_request, u32_at};

const RTM_NEWRULE: u16 = 32;
const RTM_DELRULE: u16 = 33;
const RTM_GETRULE: u16 = 34;
const FRA_PRIORITY: u16 = 6;
const FRA_FWMARK: u16 = 10;
const FRA_TABLE: u16 = 15;
const FRA_FWMASK: u16 = 16;
const FR_ACT_TO_TBL: u8 = 1;
/// Length of `struct fib_rule_hdr`.
const FIB_RULE_HDR: usize = 12;

/// "Packets of this mark look in this table."
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// For IPv6 rather than IPv4.
    pub ipv6: bool,
    /// The mark to match.
    pub mark: u32,
    /// The bits of the mark that count.
    pub mask: u32,
    /// The table to look in.
    pub table: u32,
    /// Rules are asked in ascending order; the system's own are 0 (local), 32766 (main) and 32767.
    pub priority: u32,
}

/// Adds a rule; one that is there already is fine.
pub fn add(rule: &Rule) -> Result<()> {
    let message = about(RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL, rule);
    match route_request(&format!("add {}", describe(rule)), message) {
        Err(e) if e.errno == Errno::EEXIST => Ok(()),
        done => done,
    }
}

/// Deletes a rule; one that is not there is fine, and so is an address family the system does not have.
pub fn delete(rule: &Rule) -> Result<()> {
    let message = about(RTM_DELRULE, 0, rule);
    match route_request(&format!("delete {}", describe(rule)), message) {
        Err(e) if matches!(e.errno, Errno::ENOENT | Errno::EAFNOSUPPORT) => Ok(()),
        done => done,
    }
}

/// All rules of both families that match a mark.
pub fn list() -> Result<Vec<Rule>> {
    let message = Message::new(RTM_GETRULE, 0, &[0; FIB_RULE_HDR]);
    let mut netlink = Netlink::open(libc::NETLINK_ROUTE)?;
    netlink.dump("list routing rules", &message, |m| {
        (m.kind == RTM_NEWRULE).then(|| read(m.payload)).flatten()
    })
}

fn about(kind: u16, flags: u16, rule: &Rule) -> Message {
    let mut header = [0; FIB_RULE_HDR];
    header[0] = if rule.ipv6 { 10 } else { 2 };
    header[7] = FR_ACT_TO_TBL;
    let mut message = Message::new(kind, flags, &header);
    message
        .u32(FRA_PRIORITY, rule.priority)
        .u32(FRA_FWMARK, rule.mark)
        .u32(FRA_FWMASK, rule.mask)
        .u32(FRA_TABLE, rule.table);
    message
}

fn read(payload: &[u8]) -> Option<Rule> {
    let ipv6 = *payload.first()? == 10;
    let mut rule = Rule { ipv6, mark: 0, mask: u32::MAX, table: 0, priority: 0 };
    let mut marked = false;
    for (kind, value) in attrs(payload.get(FIB_RULE_HDR..)?) {
        match kind {
            FRA_PRIORITY => rule.priority = u32_at(value, 0)?,
            FRA_FWMARK => (rule.mark, marked) = (u32_at(value, 0)?, true),
            FRA_FWMASK => rule.mask = u32_at(value, 0)?,
            FRA_TABLE => rule.table = u32_at(value, 0)?,
            _ => {}
        }
    }
    marked.then_some(rule)
}

fn describe(rule: &Rule) -> String {
    let family = if rule.ipv6 { "IPv6" } else { "IPv4" };
    format!("{family} rule fwmark {:#x}/{:#x} lookup {}", rule.mark, rule.mask, rule.table)
}
