//! Who has which address, remembered across plans.
//!
//! Addresses of pods rotate: a new pod gets the next one after the last given, and one that was just
//! freed comes last of all. A proxy that has not heard of a pod's end then dials nobody, and not somebody
//! else. Both families share the host number, so that a pod is 10.244.1.7 and fd00:10:244:1::7.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use model::IpPrefix;
use serde::{Deserialize, Serialize};

/// Host 0 is the range itself, host 1 the node.
const FIRST_POD: u32 = 2;
/// Below: addresses that Services ask for by number, as Kubernetes keeps a band for them.
const FIRST_SERVICE: u32 = 256;

/// See the module. Serializable, so that a restart moves nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Assignments {
    /// By `namespace/name`.
    pub(super) pods: BTreeMap<String, PodAssignment>,
    /// Addresses of pods that may still be ending, oldest first.
    ending: VecDeque<Ending>,
    /// The last host number given on each node.
    last: BTreeMap<String, u32>,
    /// Host numbers of Services that did not ask for one, by `namespace/name`.
    pub(super) services: BTreeMap<String, u32>,
    last_service: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PodAssignment {
    pub node: String,
    /// 0: in the host's network, no address of its own.
    pub host: u32,
    pub hash: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Ending {
    pod: String,
    node: String,
    host: u32,
}

impl Assignments {
    /// The pod has ended: its address may be given out again, in its turn.
    pub fn release(&mut self, namespace: &str, name: &str) {
        let pod = format!("{namespace}/{name}");
        self.ending.retain(|e| e.pod != pod);
    }

    /// Pods that should end, or may still be ending: `namespace/name`.
    pub fn ending(&self) -> impl Iterator<Item = &str> {
        self.ending.iter().map(|e| e.pod.as_str())
    }

    /// Takes the address from a pod; it stays out of use until the pod is released.
    pub(super) fn end(&mut self, pod: &str) {
        if let Some(PodAssignment { node, host, .. }) = self.pods.remove(pod)
            && host != 0
        {
            self.ending.push_back(Ending { pod: pod.to_owned(), node, host });
        }
    }

    /// A free host number for a pod on a node.
    pub(super) fn take_pod_host(&mut self, node: &str, range: IpPrefix) -> Option<u32> {
        let hosts = size(range).checked_sub(1).filter(|end| *end > FIRST_POD)?;
        let here = |n: &String| n == node;
        let used: BTreeSet<u32> =
            self.pods.values().filter(|p| here(&p.node)).map(|p| p.host).collect();
        let ending: BTreeSet<u32> =
            self.ending.iter().filter(|e| here(&e.node)).map(|e| e.host).collect();
        let last = self.last.get(node).copied().unwrap_or(FIRST_POD - 1);
        let free = |h: &u32| !used.contains(h) && !ending.contains(h);
        let host = rotate(FIRST_POD, hosts, last).find(free).or_else(|| {
            // Nothing else is left: the address that has been ending for longest.
            let oldest =
                self.ending.iter().position(|e| here(&e.node) && !used.contains(&e.host))?;
            self.ending.remove(oldest).map(|e| e.host)
        })?;
        self.last.insert(node.to_owned(), host);
        Some(host)
    }

    /// A free host number for a Service.
    pub(super) fn take_service_host(
        &mut self,
        range: IpPrefix,
        is_taken: impl Fn(u32) -> bool,
    ) -> Option<u32> {
        let hosts = size(range).checked_sub(1).filter(|end| *end > FIRST_SERVICE)?;
        let used: BTreeSet<u32> = self.services.values().copied().collect();
        let free = |h: &u32| !used.contains(h) && !is_taken(*h);
        let host = rotate(FIRST_SERVICE, hosts, self.last_service).find(free)?;
        self.last_service = host;
        Some(host)
    }
}

/// From the number after `last` to the end, then from the start.
fn rotate(first: u32, end: u32, last: u32) -> impl Iterator<Item = u32> {
    let next = last.saturating_add(1).clamp(first, end);
    (next..end).chain(first..next)
}

/// How many addresses a range has, as far as we give them out.
fn size(range: IpPrefix) -> u32 {
    /// Enough for any local world.
    const MOST: u32 = 1 << 16;
    let width: u32 = if range.ip.is_ipv4() { 32 } else { 128 };
    let bits = width.saturating_sub(u32::from(range.length));
    1_u32.checked_shl(bits).map_or(MOST, |n| n.min(MOST))
}

/// The address of a host number in a range.
pub(super) fn host(range: IpPrefix, number: u32) -> IpAddr {
    match range.ip {
        IpAddr::V4(ip) => IpAddr::V4(Ipv4Addr::from_bits(ip.to_bits().wrapping_add(number))),
        IpAddr::V6(ip) => {
            IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits().wrapping_add(u128::from(number))))
        }
    }
}
