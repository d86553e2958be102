//! Which pods to start and which to end, given what should run and what does.
//!
//! As the controllers of a cluster: pods on their own are replaced when they changed; a Deployment is rolled, one pod more
//! than asked for at a time, and an old pod ends only when enough are ready without it.
//!
//! Invariants: pure; a pod is not started while another of its name or address is still there; asking twice without a
//! change in between gives the same answer.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// Namespace and name.
pub(crate) type Key = (String, String);

/// A pod that should run.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) key: Key,
    pub(crate) hash: String,
    /// The Deployment, in the pod's namespace.
    pub(crate) owner: Option<String>,
    pub(crate) ips: Vec<IpAddr>,
}

/// A pod that is there.
#[derive(Clone, Debug)]
pub(crate) struct Present {
    pub(crate) wanted: Wanted,
    pub(crate) ready: bool,
    /// It was told to end.
    pub(crate) ending: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Decision {
    pub(crate) start: Vec<Key>,
    pub(crate) end: Vec<Key>,
}

/// How many pods a Deployment may have above what it asks for while it is rolled: Kubernetes' default of 25 %, at least 1.
fn surge(wanted: usize) -> usize {
    wanted.div_ceil(4).max(1)
}

/// Decides. Both lists in order of key.
pub(crate) fn decide(wanted: &[Wanted], present: &[Present]) -> Decision {
    let by_key: BTreeMap<&Key, &Wanted> = wanted.iter().map(|w| (&w.key, w)).collect();
    let asked: BTreeMap<(&str, &str), usize> =
        wanted.iter().filter_map(owner).fold(BTreeMap::new(), |mut n, o| {
            *n.entry(o).or_default() += 1;
            n
        });
    let is_current =
        |p: &Present| by_key.get(&p.wanted.key).is_some_and(|w| w.hash == p.wanted.hash);
    let mut decision = Decision::default();
    let mut live: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    let mut ready: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    for p in present.iter().filter(|p| !p.ending) {
        if let Some(owner) = owner(&p.wanted) {
            *live.entry(owner).or_default() += 1;
            *ready.entry(owner).or_default() += usize::from(p.ready);
        }
    }
    let mut old: Vec<&Present> = present.iter().filter(|p| !p.ending && !is_current(p)).collect();
    // Those that serve nobody go first.
    old.sort_by_key(|p| p.ready);
    for p in old {
        let rolled = owner(&p.wanted).and_then(|o| Some((o, *asked.get(&o)?)));
        if let Some((owner, asked)) = rolled {
            let ready = ready.entry(owner).or_default();
            if p.ready && *ready <= asked {
                continue;
            }
            *ready -= usize::from(p.ready);
            *live.entry(owner).or_default() -= 1;
        }
        decision.end.push(p.wanted.key.clone());
    }
    let keys: BTreeSet<&Key> = present.iter().map(|p| &p.wanted.key).collect();
    let ips: BTreeSet<&IpAddr> = present.iter().flat_map(|p| &p.wanted.ips).collect();
    for w in
        wanted.iter().filter(|w| !keys.contains(&w.key) && !w.ips.iter().any(|ip| ips.contains(ip)))
    {
        if let Some(owner) = owner(w) {
            let asked = asked.get(&owner).copied().unwrap_or_default();
            let live = live.entry(owner).or_default();
            if *live >= asked + surge(asked) {
                continue;
            }
            *live += 1;
        }
        decision.start.push(w.key.clone());
    }
    decision.end.sort();
    decision
}

fn owner(w: &Wanted) -> Option<(&str, &str)> {
    w.owner.as_deref().map(|owner| (w.key.0.as_str(), owner))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(text: &str) -> Wanted {
        // "name/hash/owner/ip"
        let parts: Vec<&str> = text.split('/').collect();
        Wanted {
            key: ("ns".into(), parts[0].into()),
            hash: parts[1].into(),
            owner: (!parts[2].is_empty()).then(|| parts[2].into()),
            ips: vec![format!("10.0.0.{}", parts[3]).parse().unwrap()],
        }
    }

    fn present(text: &str) -> Present {
        let (pod, state) = text.split_once(' ').unwrap();
        Present { wanted: wanted(pod), ready: state == "ready", ending: state == "ending" }
    }

    fn check(want: &[&str], there: &[&str], start: &[&str], end: &[&str]) {
        let wanted: Vec<_> = want.iter().map(|t| wanted(t)).collect();
        let present: Vec<_> = there.iter().map(|t| present(t)).collect();
        let got = decide(&wanted, &present);
        let names = |keys: &[Key]| keys.iter().map(|k| k.1.clone()).collect::<Vec<_>>();
        assert_eq!(
            (names(&got.start), names(&got.end)),
            (names_of(start), names_of(end)),
            "{want:?} {there:?}"
        );
    }

    fn names_of(names: &[&str]) -> Vec<String> {
        names.iter().map(|n| (*n).to_owned()).collect()
    }

    #[test]
    fn pods_on_their_own() {
        check(&[], &[], &[], &[]);
        check(&["a/1//2"], &[], &["a"], &[]);
        check(&["a/1//2"], &["a/1//2 ready"], &[], &[]);
        check(&["a/1//2"], &["a/1//2 unready"], &[], &[]);
        check(&[], &["a/1//2 ready"], &[], &["a"]);
        // Changed: first it ends, then it starts again.
        check(&["a/2//3"], &["a/1//2 ready"], &[], &["a"]);
        check(&["a/2//3"], &["a/1//2 ending"], &[], &[]);
        // Its address is not free yet.
        check(&["b/1//2"], &["a/1//2 ending"], &[], &[]);
    }

    #[test]
    fn deployments_roll() {
        // From nothing, all at once.
        check(&["a/1/d/2", "b/1/d/3", "c/1/d/4"], &[], &["a", "b", "c"], &[]);
        // A new revision: one more.
        let new = ["c/2/d/4", "e/2/d/5"];
        check(&new, &["a/1/d/2 ready", "b/1/d/3 ready"], &["c"], &[]);
        check(&new, &["a/1/d/2 ready", "b/1/d/3 ready", "c/2/d/4 unready"], &[], &[]);
        check(&new, &["a/1/d/2 ready", "b/1/d/3 ready", "c/2/d/4 ready"], &["e"], &["a"]);
        check(&new, &["a/1/d/2 ending", "b/1/d/3 ready", "c/2/d/4 ready"], &["e"], &[]);
        check(&new, &["b/1/d/3 ready", "c/2/d/4 ready", "e/2/d/5 ready"], &[], &["b"]);
        check(&new, &["c/2/d/4 ready", "e/2/d/5 ready"], &[], &[]);
        // An old pod that serves nobody goes at once.
        check(&new, &["a/1/d/2 ready", "b/1/d/3 unready"], &["c", "e"], &["b"]);
        // Scaled down, and away.
        check(&["a/1/d/2"], &["a/1/d/2 ready", "b/1/d/3 ready"], &[], &["b"]);
        check(&[], &["a/1/d/2 ready", "b/1/d/3 ready"], &[], &["a", "b"]);
    }
}
