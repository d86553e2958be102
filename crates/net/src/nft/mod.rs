//! nf_tables over netlink: whole tables as values, put in place in one atomic step.
//!
//! Purpose: [`replace`] a table, [`delete`] it, and tell whether it [`is_intact`]. There is no editing: who wants
//! another rule builds the whole table again, so what is in the kernel is always one of our values.
//!
//! Invariants: a table is replaced in one transaction, or the old one stays; every rule carries a comment with a digest of
//! itself, so a rule that somebody deleted, changed or slipped in is noticed. Everything works in the namespace of the
//! calling thread: use inside [`NetNs::run`](crate::NetNs::run).

mod dump;
mod expr;
mod set;

use nix::errno::Errno;

use crate::netlink::{
    self, Message, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST, Netlink,
};

pub use dump::{is_intact, keys};
pub use expr::{Rule, Verdict, Way};
pub(crate) use expr::{TCP, UDP};
pub use set::{Entry, Field, Set};

const NFNL_MSG_BATCH_BEGIN: u16 = 16;
const NFNL_MSG_BATCH_END: u16 = 17;
const SUBSYSTEM: u16 = 10;
const NEWTABLE: u16 = SUBSYSTEM << 8;
const GETTABLE: u16 = NEWTABLE + 1;
const DELTABLE: u16 = NEWTABLE + 2;
const NEWCHAIN: u16 = NEWTABLE + 3;
const GETCHAIN: u16 = NEWTABLE + 4;
const NEWRULE: u16 = NEWTABLE + 6;
const GETRULE: u16 = NEWTABLE + 7;
const DELRULE: u16 = NEWTABLE + 8;
const NEWSET: u16 = NEWTABLE + 9;
const NEWSETELEM: u16 = NEWTABLE + 12;
const GETSETELEM: u16 = NEWTABLE + 13;
const DELSETELEM: u16 = NEWTABLE + 14;

const NFTA_TABLE_NAME: u16 = 1;
const NFTA_TABLE_USERDATA: u16 = 6;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_POLICY: u16 = 5;
const NFTA_CHAIN_TYPE: u16 = 7;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NFTA_ELEM_LIST_TABLE: u16 = 1;
const NFTA_ELEM_LIST_SET: u16 = 2;
const NFTA_HOOK_PRIORITY: u16 = 2;
const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_RULE_USERDATA: u16 = 7;
/// The longest comment that `nft` accepts when it reads one back.
const MAX_COMMENT: usize = 127;

/// Which packets a table sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4 and IPv6.
    Inet = 1,
    /// IPv4 only.
    Ip = 2,
    /// IPv6 only.
    Ip6 = 10,
}

/// Where a packet is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HookPoint {
    /// Just arrived.
    Prerouting = 0,
    /// For this namespace.
    Input = 1,
    /// On its way through.
    Forward = 2,
    /// Made here.
    Output = 3,
    /// About to leave.
    Postrouting = 4,
}

/// What a base chain may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainType {
    /// Accept and drop.
    Filter,
    /// Also route again when the mark changed; output only.
    Route,
    /// Translate addresses; sees only the first packet of a connection.
    Nat,
}

/// Well-known priorities: lower comes first.
pub mod priority {
    /// Before connection tracking.
    pub const RAW: i32 = -300;
    /// Where packets are altered.
    pub const MANGLE: i32 = -150;
    /// Where destinations are translated.
    pub const DSTNAT: i32 = -100;
    /// Where packets are refused.
    pub const FILTER: i32 = 0;
    /// Where sources are translated.
    pub const SRCNAT: i32 = 100;
}

/// What makes a chain a base chain. Its policy is always accept: a chain of ours that vanished must not cut a pod off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hook {
    /// Where.
    pub point: HookPoint,
    /// What it may do.
    pub kind: ChainType,
    /// When, among others at the same point.
    pub priority: i32,
}

/// A chain: rules in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Unique in the table.
    pub name: String,
    /// None: only jumped to.
    pub hook: Option<Hook>,
    /// The rules.
    pub rules: Vec<Rule>,
}

/// A whole table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Which packets it sees.
    pub family: Family,
    /// Unique per family.
    pub name: String,
    /// Sets and maps that rules look into.
    pub sets: Vec<Set>,
    /// The chains.
    pub chains: Vec<Chain>,
}

/// The kernel refused a table.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("nftables {object}: {source}{}", hint.as_ref().map(|h| format!("; {h}")).unwrap_or_default())]
pub struct Error {
    /// Which table, chain, set or rule.
    pub object: String,
    /// What the kernel said.
    pub source: netlink::Error,
    /// What to do about it, where we know.
    pub hint: Option<String>,
}

/// Puts a table in place, instead of one of the same name if there is one, in one transaction.
pub fn replace(table: &Table) -> Result<(), Error> {
    commit(&format!("replace table {}", table.name), &[Change::Replace(table)])
}

/// Deletes a table. One that is not there is fine.
pub fn delete(family: Family, name: &str) -> Result<(), Error> {
    commit(&format!("delete table {name}"), &[Change::Delete(family, name)])
}

/// One step of a transaction.
#[derive(Clone, Copy, Debug)]
pub enum Change<'a> {
    /// A whole table, instead of one of the same name if there is one.
    Replace(&'a Table),
    /// No table of this name any more.
    Delete(Family, &'a str),
    /// The chains of a table that is there get the rules that `Table` holds for them. A packet sees all of a chain's
    /// old rules or all of its new ones; with `Replace` it may pass between the old chain and the new one.
    Rules(&'a Table),
    /// The dynamic sets of a table that is there get the entries that `Table` holds for them, beside those they have.
    Entries(&'a Table),
    /// The dynamic set of this name, in this table, is empty.
    Empty(Family, &'a str, &'a str),
}

/// Takes all steps at once, or none.
pub fn commit(what: &str, changes: &[Change<'_>]) -> Result<(), Error> {
    let mut batch = Batch::begin();
    for change in changes {
        match change {
            Change::Replace(table) => {
                batch.no_table(table.family, &table.name);
                let digest = digest_of_table(table);
                batch.table(NEWTABLE, table.family, &table.name, Some(&digest));
                for chain in &table.chains {
                    batch.chain(table, chain);
                }
                // Elements of verdict maps name chains, and rules name sets: hence this order.
                for set in &table.sets {
                    batch.set(table, set);
                    batch.entries(table, set);
                }
                batch.rules(table);
            }
            Change::Delete(family, name) => batch.no_table(*family, name),
            Change::Rules(table) => {
                for chain in &table.chains {
                    batch.no_rules(table, chain);
                }
                batch.rules(table);
            }
            Change::Entries(table) => {
                for set in &table.sets {
                    batch.entries(table, set);
                }
            }
            Change::Empty(family, table, set) => batch.no_entries(*family, table, set),
        }
    }
    batch.commit(what)
}

/// Messages for one transaction, and beside each what it is about and which expressions it uses.
struct Batch {
    messages: Vec<Message>,
    about: Vec<(String, Vec<&'static str>)>,
}

impl Batch {
    fn begin() -> Self {
        let mut batch = Self { messages: Vec::new(), about: Vec::new() };
        batch.push("transaction", vec![], envelope(NFNL_MSG_BATCH_BEGIN));
        batch
    }

    fn table(&mut self, kind: u16, family: Family, name: &str, comment: Option<&str>) {
        let mut message = message(kind, family, NLM_F_CREATE);
        message.str(NFTA_TABLE_NAME, name);
        if let Some(comment) = comment {
            message.attr(NFTA_TABLE_USERDATA, &comment_bytes(comment));
        }
        self.push(format!("table {name}"), vec![], message);
    }

    /// Creating before deleting makes the deletion succeed whether or not the table was there.
    fn no_table(&mut self, family: Family, name: &str) {
        self.table(NEWTABLE, family, name, None);
        self.table(DELTABLE, family, name, None);
    }

    fn no_rules(&mut self, table: &Table, chain: &Chain) {
        let mut message = message(DELRULE, table.family, 0);
        message.str(NFTA_RULE_TABLE, &table.name).str(NFTA_RULE_CHAIN, &chain.name);
        self.push(format!("table {} chain {}", table.name, chain.name), vec![], message);
    }

    fn no_entries(&mut self, family: Family, table: &str, set: &str) {
        let mut message = message(DELSETELEM, family, 0);
        message.str(NFTA_ELEM_LIST_TABLE, table).str(NFTA_ELEM_LIST_SET, set);
        self.push(format!("table {table} set {set}"), vec![], message);
    }

    fn rules(&mut self, table: &Table) {
        for chain in &table.chains {
            for rule in &chain.rules {
                self.rule(table, chain, rule);
            }
        }
    }

    fn chain(&mut self, table: &Table, chain: &Chain) {
        let mut message = message(NEWCHAIN, table.family, NLM_F_CREATE);
        message.str(NFTA_CHAIN_TABLE, &table.name).str(NFTA_CHAIN_NAME, &chain.name);
        if let Some(hook) = chain.hook {
            message.nested(NFTA_CHAIN_HOOK, |m| {
                m.be32(NFTA_HOOK_HOOKNUM, hook.point as u32)
                    .be32(NFTA_HOOK_PRIORITY, hook.priority.cast_unsigned());
            });
            message.be32(NFTA_CHAIN_POLICY, 1).str(NFTA_CHAIN_TYPE, type_name(hook.kind));
        }
        self.push(format!("table {} chain {}", table.name, chain.name), vec![], message);
    }

    fn set(&mut self, table: &Table, set: &Set) {
        let about = format!("table {} set {}", table.name, set.name);
        let mut create = message(NEWSET, table.family, NLM_F_CREATE);
        set.encode(&mut create, &table.name, self.messages.len());
        self.push(about, vec![], create);
    }

    fn entries(&mut self, table: &Table, set: &Set) {
        let about = format!("table {} set {}", table.name, set.name);
        for entries in set.entries.chunks(set::ENTRIES_PER_MESSAGE) {
            let mut add = message(NEWSETELEM, table.family, NLM_F_CREATE);
            set.encode_entries(&mut add, &table.name, entries);
            self.push(&about, vec![], add);
        }
    }

    fn rule(&mut self, table: &Table, chain: &Chain, rule: &Rule) {
        let about = format!("table {} chain {} rule \"{}\"", table.name, chain.name, rule.comment);
        let mut message = message(NEWRULE, table.family, NLM_F_CREATE | NLM_F_APPEND);
        message.str(NFTA_RULE_TABLE, &table.name).str(NFTA_RULE_CHAIN, &chain.name);
        message.nested(NFTA_RULE_EXPRESSIONS, |m| expr::encode(m, &rule.exprs));
        message.attr(NFTA_RULE_USERDATA, &comment_bytes(&signed_comment(rule)));
        self.push(about, rule.exprs.iter().map(expr::name).collect(), message);
    }

    fn push(&mut self, about: impl Into<String>, exprs: Vec<&'static str>, message: Message) {
        self.messages.push(message);
        self.about.push((about.into(), exprs));
    }

    fn commit(mut self, what: &str) -> Result<(), Error> {
        if let Some(last) = self.messages.last_mut() {
            last.add_flags(NLM_F_ACK);
        }
        self.messages.push(envelope(NFNL_MSG_BATCH_END));
        let sent = Netlink::open(libc::NETLINK_NETFILTER)
            .map_err(|e| (None, e))
            .and_then(|mut netlink| netlink.batch(what, self.messages));
        sent.map_err(|(index, source)| {
            let about = index.and_then(|i| self.about.get(i));
            let (object, exprs) = about.cloned().unwrap_or_default();
            Error { hint: hint(source.errno, &exprs), object, source }
        })
    }
}

/// What stands at the beginning and end of a transaction.
fn envelope(kind: u16) -> Message {
    let [high, low] = SUBSYSTEM.to_be_bytes();
    Message::new(kind, NLM_F_REQUEST, &[0, 0, high, low])
}

fn message(kind: u16, family: Family, flags: u16) -> Message {
    Message::new(kind, NLM_F_REQUEST | flags, &[family as u8, 0, 0, 0])
}

fn type_name(kind: ChainType) -> &'static str {
    match kind {
        ChainType::Filter => "filter",
        ChainType::Route => "route",
        ChainType::Nat => "nat",
    }
}

fn hint(errno: Errno, exprs: &[&str]) -> Option<String> {
    match errno {
        Errno::EPERM | Errno::EACCES => {
            Some("CAP_NET_ADMIN over this network namespace is needed".into())
        }
        Errno::EMSGSIZE => Some("the table is too big for one transaction".into()),
        Errno::ENOENT | Errno::EOPNOTSUPP | Errno::EAFNOSUPPORT if !exprs.is_empty() => {
            let mut modules: Vec<_> = exprs
                .iter()
                .filter(|e| !matches!(**e, "meta" | "cmp" | "payload" | "bitwise" | "immediate"))
                .map(|e| format!("nft_{e}"))
                .collect();
            modules.dedup();
            let modules = if modules.is_empty() { "nf_tables".into() } else { modules.join(", ") };
            Some(format!("the kernel seems to lack a module: {modules}"))
        }
        Errno::EPROTONOSUPPORT | Errno::EINVAL | Errno::ENOPROTOOPT if exprs.is_empty() => {
            Some("does the kernel have nf_tables (module nf_tables, CONFIG_NF_TABLES_INET)?".into())
        }
        _ => None,
    }
}

/// A rule's comment with a digest of its expressions in front, by which [`is_intact`] knows it again.
fn signed_comment(rule: &Rule) -> String {
    let mut encoded = Message::new(0, 0, &[]);
    expr::encode(&mut encoded, &rule.exprs);
    let bytes = encoded.finish(0).unwrap_or_default();
    let mut comment = format!("{:016x} {}", fnv(&bytes), rule.comment);
    while comment.len() > MAX_COMMENT {
        comment.pop();
    }
    comment
}

/// Over the sets: constant ones with their entries. Rules have digests of their own.
fn digest_of_table(table: &Table) -> String {
    let fixed: Vec<Set> = table
        .sets
        .iter()
        .map(|set| if set.dynamic { Set { entries: vec![], ..set.clone() } } else { set.clone() })
        .collect();
    format!("ambit {:016x}", fnv(format!("{fixed:?}").as_bytes()))
}

/// The way `nft` keeps comments: type 0, length, text with a closing zero.
fn comment_bytes(comment: &str) -> Vec<u8> {
    let length = u8::try_from(comment.len() + 1).unwrap_or(u8::MAX);
    let mut bytes = vec![0, length];
    bytes.extend(comment.bytes());
    bytes.push(0);
    bytes
}

/// FNV-1a: a digest against accidents, the same in every build.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
pub(crate) mod tests;
