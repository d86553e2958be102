//! Reads a table back, far enough to tell whether it is still the one we put there.

use nix::errno::Errno;

use super::{
    Chain, Error, Family, GETCHAIN, GETRULE, GETSETELEM, GETTABLE, Hook, NEWCHAIN, NEWRULE,
    NEWTABLE, NFTA_CHAIN_HOOK, NFTA_CHAIN_NAME, NFTA_CHAIN_POLICY, NFTA_CHAIN_TABLE,
    NFTA_CHAIN_TYPE, NFTA_ELEM_LIST_SET, NFTA_ELEM_LIST_TABLE, NFTA_HOOK_HOOKNUM,
    NFTA_HOOK_PRIORITY, NFTA_RULE_CHAIN, NFTA_RULE_TABLE, NFTA_RULE_USERDATA, NFTA_TABLE_NAME,
    NFTA_TABLE_USERDATA, Table, comment_bytes, digest_of_table, hint, signed_comment, type_name,
};
use crate::netlink::{self, Message, Netlink, Received, attr, attrs, text};

/// Length of `struct nfgenmsg`.
const NFGENMSG: usize = 4;
const NFTA_ELEM_LIST_ELEMENTS: u16 = 3;
const NFTA_ELEM_KEY: u16 = 1;
const NFTA_DATA_VALUE: u16 = 1;

/// A chain as far as it can be lost or changed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Seen {
    name: String,
    /// Point, priority, type and policy.
    hook: Option<(u32, i32, String, u32)>,
    /// The comment bytes of its rules, in order; a foreign rule has none or others.
    rules: Vec<Vec<u8>>,
}

/// Whether the kernel holds exactly the chains and rules of `table`, none missing, changed or added. Sets are compared
/// by the digest that came with the table: the kernel does not let anybody change them afterwards, unless they are
/// dynamic, and then what is in them may differ.
pub fn is_intact(table: &Table) -> Result<bool, Error> {
    let failed = |source: netlink::Error| Error {
        object: format!("table {}", table.name),
        hint: hint(source.errno, &[]),
        source,
    };
    let digest = comment_bytes(&digest_of_table(table));
    if read_digest(table.family, &table.name).map_err(failed)? != Some(digest) {
        return Ok(false);
    }
    let mut there = read(table.family, &table.name).map_err(failed)?;
    let mut wanted: Vec<Seen> = table.chains.iter().map(expected).collect();
    there.sort();
    wanted.sort();
    Ok(there == wanted)
}

/// The keys of a set, as the kernel keeps them. None when the set is not there.
pub fn keys(family: Family, table: &str, set: &str) -> Result<Vec<Vec<u8>>, Error> {
    let what = format!("read set {set} of table {table}");
    let failed = |source: netlink::Error| Error {
        object: what.clone(),
        hint: hint(source.errno, &[]),
        source,
    };
    let mut ask = Message::new(GETSETELEM, 0, &[family as u8, 0, 0, 0]);
    ask.str(NFTA_ELEM_LIST_TABLE, table).str(NFTA_ELEM_LIST_SET, set);
    let mut netlink = Netlink::open(libc::NETLINK_NETFILTER).map_err(failed)?;
    let found = netlink.dump(&what, &ask, |m| {
        let list = attr(m.payload.get(NFGENMSG..)?, NFTA_ELEM_LIST_ELEMENTS)?;
        let key = |element| Some(attr(attr(element, NFTA_ELEM_KEY)?, NFTA_DATA_VALUE)?.to_vec());
        Some(attrs(list).filter_map(|(_, element)| key(element)).collect::<Vec<_>>())
    });
    Ok(none_if_missing(found).map_err(failed)?.concat())
}

fn expected(chain: &Chain) -> Seen {
    let hook = chain.hook.map(|Hook { point, kind, priority }| {
        (point as u32, priority, type_name(kind).to_owned(), 1)
    });
    let rules = chain.rules.iter().map(|rule| comment_bytes(&signed_comment(rule))).collect();
    Seen { name: chain.name.clone(), hook, rules }
}

fn read_digest(family: Family, table: &str) -> netlink::Result<Option<Vec<u8>>> {
    let ask = Message::new(GETTABLE, 0, &[family as u8, 0, 0, 0]);
    let mut netlink = Netlink::open(libc::NETLINK_NETFILTER)?;
    let found = netlink.dump(&format!("read table {table}"), &ask, |m| {
        let body = of_table(m, NEWTABLE, NFTA_TABLE_NAME, table)?;
        attr(body, NFTA_TABLE_USERDATA).map(<[u8]>::to_vec)
    })?;
    Ok(found.into_iter().next())
}

fn read(family: Family, table: &str) -> netlink::Result<Vec<Seen>> {
    let what = format!("read table {table}");
    let mut netlink = Netlink::open(libc::NETLINK_NETFILTER)?;
    let head = [family as u8, 0, 0, 0];
    let ask = Message::new(GETCHAIN, 0, &head);
    let mut chains = none_if_missing(netlink.dump(&what, &ask, |m| {
        let body = of_table(m, NEWCHAIN, NFTA_CHAIN_TABLE, table)?;
        Some(Seen { name: text(attr(body, NFTA_CHAIN_NAME)?), hook: hook(body), rules: vec![] })
    }))?;
    let mut ask = Message::new(GETRULE, 0, &head);
    ask.str(NFTA_RULE_TABLE, table);
    let rules = none_if_missing(netlink.dump(&what, &ask, |m| {
        let body = of_table(m, NEWRULE, NFTA_RULE_TABLE, table)?;
        let comment = attr(body, NFTA_RULE_USERDATA).unwrap_or(&[]).to_vec();
        Some((text(attr(body, NFTA_RULE_CHAIN)?), comment))
    }))?;
    for (name, comment) in rules {
        if let Some(chain) = chains.iter_mut().find(|chain| chain.name == name) {
            chain.rules.push(comment);
        }
    }
    Ok(chains)
}

fn of_table<'a>(m: &Received<'a>, kind: u16, name: u16, table: &str) -> Option<&'a [u8]> {
    let body = m.payload.get(NFGENMSG..)?;
    (m.kind == kind && text(attr(body, name)?) == table).then_some(body)
}

fn hook(body: &[u8]) -> Option<(u32, i32, String, u32)> {
    let number = |bytes: &[u8]| bytes.try_into().ok().map(u32::from_be_bytes);
    let hook = attr(body, NFTA_CHAIN_HOOK)?;
    Some((
        number(attr(hook, NFTA_HOOK_HOOKNUM)?)?,
        number(attr(hook, NFTA_HOOK_PRIORITY)?)?.cast_signed(),
        text(attr(body, NFTA_CHAIN_TYPE)?),
        number(attr(body, NFTA_CHAIN_POLICY)?)?,
    ))
}

fn none_if_missing<T>(list: netlink::Result<Vec<T>>) -> netlink::Result<Vec<T>> {
    match list {
        Err(e) if e.errno == Errno::ENOENT => Ok(Vec::new()),
        other => other,
    }
}
