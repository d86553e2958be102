//! Which user and group ids exist inside the lab, and which a pod gets.
//!
//! Invariants: pure. A pod's root is never the lab's root where more than one id is mapped: the lab's root owns the
//! pod's network namespace, the keys and (started by root) the machine's files. Where only one id is mapped the kernel id
//! is shared, and the nested user namespace alone takes the capabilities away.

use serde::{Deserialize, Serialize};

/// `count` ids from `inside` in the new namespace stand for those from `outside` in its parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct IdRange {
    pub(crate) inside: u32,
    pub(crate) outside: u32,
    pub(crate) count: u32,
}

impl IdRange {
    fn contains(&self, inside: u32) -> bool {
        inside >= self.inside && inside - self.inside < self.count
    }

    /// One past the last id inside. Ids are 32 bits and `u32::MAX` is never valid, so this cannot overflow.
    fn end(&self) -> u32 {
        self.inside.saturating_add(self.count)
    }
}

/// How many ids a pod gets where they can be had: what container images expect.
const POD_IDS: u32 = 65_536;
/// Below this many ids a range is not worth having: images use ids up to 65,534 (`nobody`).
const FEWEST_POD_IDS: u32 = 1_000;
/// Where root's labs take pod ids from when the machine allows it: far from people and from `/etc/subuid`.
const ROOT_POD_BASE: u32 = 1_800_000_000;

/// Reads `/proc/PID/uid_map`. Lines that make no sense are left out.
pub(crate) fn parse_map(text: &str) -> Vec<IdRange> {
    let line = |l: &str| {
        let mut n = l.split_whitespace().map(str::parse::<u32>);
        let mut next = || n.next().and_then(Result::ok);
        Some(IdRange { inside: next()?, outside: next()?, count: next()? })
    };
    text.lines().filter_map(line).collect()
}

/// The text the kernel takes in `/proc/PID/uid_map`.
pub(crate) fn render_map(map: &[IdRange]) -> String {
    map.iter().map(|r| format!("{} {} {}\n", r.inside, r.outside, r.count)).collect()
}

/// The map of a lab started by root: every id that exists here, unchanged.
pub(crate) fn identity_map(own: &[IdRange]) -> Vec<IdRange> {
    own.iter().map(|r| IdRange { outside: r.inside, ..*r }).collect()
}

/// The map of a lab started by an ordinary user: root inside is the user, with `sub` behind it if there is one.
pub(crate) fn user_map(id: u32, sub: Option<(u32, u32)>) -> Vec<IdRange> {
    let mut map = vec![IdRange { inside: 0, outside: id, count: 1 }];
    map.extend(sub.map(|(start, count)| IdRange { inside: 1, outside: start, count }));
    map
}

/// The first range that `/etc/subuid` or `/etc/subgid` gives to the user, who is listed by name or number.
pub(crate) fn subordinate(text: &str, name: &str, id: u32) -> Option<(u32, u32)> {
    text.lines().find_map(|line| {
        let mut fields = line.trim().split(':');
        let who = fields.next()?;
        if who != name && who.parse() != Ok(id) {
            return None;
        }
        let start: u32 = fields.next()?.parse().ok()?;
        let count: u32 = fields.next()?.parse().ok()?;
        start.checked_add(count)?;
        (count > 0).then_some((start, count))
    })
}

/// Whether all of a subordinate range exists where `own` is the map of this process: inside a container of one id the
/// machine's `/etc/subuid` promises ids that cannot be had.
pub(crate) fn is_mapped(own: &[IdRange], (start, count): (u32, u32)) -> bool {
    let last = start.saturating_add(count.saturating_sub(1));
    own.iter().any(|r| r.contains(start) && r.contains(last))
}

/// The map of a pod's user namespace, given the ids of the lab's. `run_as` is the id its processes will have.
///
/// With one id in the lab, the pod has one id too, under the number the pod asks for: programs that insist on not being
/// root then run.
pub(crate) fn pod_map(lab: &[IdRange], run_as: u32) -> Vec<IdRange> {
    match pod_base(lab) {
        Some((base, count)) if run_as < count => vec![IdRange { inside: 0, outside: base, count }],
        // Beyond what a pod has: this one number alone.
        Some((base, _)) => vec![IdRange { inside: run_as, outside: base, count: 1 }],
        None => vec![IdRange { inside: run_as, outside: 0, count: 1 }],
    }
}

/// Where in the lab a pod's id 0 lies, and how many follow.
fn pod_base(lab: &[IdRange]) -> Option<(u32, u32)> {
    let wide =
        lab.iter().find(|r| r.contains(ROOT_POD_BASE) && r.contains(ROOT_POD_BASE + POD_IDS - 1));
    if wide.is_some() {
        return Some((ROOT_POD_BASE, POD_IDS));
    }
    let without_root = |r: &IdRange| {
        let start = r.inside.max(1);
        let count = r.end().saturating_sub(start);
        // The upper end: the lower ids of a whole machine belong to people and daemons.
        let take = count.min(POD_IDS);
        (r.end() - take, take)
    };
    let (base, count) = lab.iter().map(without_root).max_by_key(|&(_, count)| count)?;
    (count >= FEWEST_POD_IDS).then_some((base, count))
}

/// The id in the lab that `inside` of a pod stands for.
pub(crate) fn outside_of(map: &[IdRange], inside: u32) -> Option<u32> {
    map.iter().find(|r| r.contains(inside)).map(|r| r.outside + (inside - r.inside))
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn range(inside: u32, outside: u32, count: u32) -> IdRange {
        IdRange { inside, outside, count }
    }

    #[test]
    fn kernel_text() {
        let text = "         0       1001          1\n         1     100000      65536\n";
        let map = parse_map(text);
        assert_eq!(map, [range(0, 1001, 1), range(1, 100_000, 65_536)]);
        assert_eq!(parse_map(&render_map(&map)), map);
        assert_eq!(parse_map("garbage\n0 1\n"), []);
    }

    #[test]
    fn subordinate_ranges() {
        let check = |text: &str, want| assert_eq!(subordinate(text, "ann", 1001), want, "{text:?}");
        check("", None);
        check("bob:100000:65536", None);
        check("bob:1:2\nann:100000:65536\n", Some((100_000, 65_536)));
        check("1001:300000:65536", Some((300_000, 65_536)));
        check("ann:x:65536", None);
        check("ann:1", None);
        check("ann:4294967295:65536", None);
        check("ann:5:0", None);
    }

    #[test]
    fn a_container_of_one_id_has_no_subordinate_ones() {
        let check = |own: &[IdRange], want| {
            assert_eq!(is_mapped(own, (100_000, 65_536)), want, "{own:?}");
        };
        check(&[range(0, 0, u32::MAX)], true);
        check(&[range(1001, 1001, 1)], false);
        check(&[range(100_000, 5, 65_536)], true);
        check(&[range(100_000, 5, 65_535)], false);
        check(&[range(100_001, 5, 65_536)], false);
    }

    #[test]
    fn pods_get_ids_apart_from_the_labs_root() {
        let check = |lab: &[IdRange], run_as, want| {
            assert_eq!(pod_map(lab, run_as), [want], "{lab:?} {run_as}")
        };
        let root = identity_map(&[range(0, 0, u32::MAX)]);
        check(&root, 0, range(0, ROOT_POD_BASE, 65_536));
        check(&root, 999, range(0, ROOT_POD_BASE, 65_536));
        check(&root, 100_000, range(100_000, ROOT_POD_BASE, 1));
        // Root in a container with 65,536 ids.
        let container = identity_map(&[range(0, 100_000, 65_536)]);
        check(&container, 0, range(0, 1, 65_535));
        // A user with and without a subordinate range.
        check(&user_map(1001, Some((100_000, 65_536))), 33, range(0, 1, 65_536));
        check(&user_map(1001, None), 0, range(0, 0, 1));
        check(&user_map(1001, None), 101, range(101, 0, 1));
        check(&user_map(1001, Some((5, 10))), 101, range(101, 0, 1));
    }

    #[test]
    fn ids_of_a_pod_in_the_lab() {
        let map = pod_map(&user_map(1001, Some((100_000, 65_536))), 0);
        assert_eq!(outside_of(&map, 33), Some(34));
        assert_eq!(outside_of(&map, 70_000), None);
        assert_eq!(outside_of(&pod_map(&user_map(1001, None), 101), 101), Some(0));
    }
}
