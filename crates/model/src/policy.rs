//! Layer-4 authorization policies. Fields follow `istio.security.Authorization`.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use crate::{Provenance, Str};

/// `namespace/name` of a policy, as workloads refer to it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PolicyKey {
    pub namespace: Str,
    pub name: Str,
}

impl fmt::Display for PolicyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    pub key: PolicyKey,
    pub scope: Scope,
    pub action: Action,
    /// The policy matches when any rule matches. None: it never matches.
    pub rules: Arc<[Rule]>,
    /// Only logged, never enforced.
    pub dry_run: bool,
    pub provenance: Provenance,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// Every workload of the mesh.
    Global,
    /// Every workload of the policy's namespace.
    Namespace,
    /// The workloads that list it.
    WorkloadSelector,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    Allow,
    Deny,
}

/// A rule matches when each of its clauses matches; a clause matches when any of its matches does.
/// A rule without clauses matches everything; a clause without matches is satisfied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    pub clauses: Vec<Vec<Match>>,
    pub provenance: Provenance,
}

/// All kinds that are set must match; within a kind any value suffices, and no `not_` value may match.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Match {
    pub namespaces: Vec<StringMatch>,
    pub not_namespaces: Vec<StringMatch>,
    /// `namespace/service-account` pairs.
    pub service_accounts: Vec<(Str, Str)>,
    pub not_service_accounts: Vec<(Str, Str)>,
    /// Matched against [`crate::Identity::principal`].
    pub principals: Vec<StringMatch>,
    pub not_principals: Vec<StringMatch>,
    pub source_ips: Vec<IpPrefix>,
    pub not_source_ips: Vec<IpPrefix>,
    pub destination_ips: Vec<IpPrefix>,
    pub not_destination_ips: Vec<IpPrefix>,
    pub destination_ports: Vec<u16>,
    pub not_destination_ports: Vec<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum StringMatch {
    Exact(Str),
    Prefix(Str),
    Suffix(Str),
    /// Any value, but there must be one.
    Presence,
}

impl StringMatch {
    pub fn matches(&self, value: &str) -> bool {
        match self {
            Self::Exact(s) => value == &**s,
            Self::Prefix(s) => value.starts_with(&**s),
            Self::Suffix(s) => value.ends_with(&**s),
            Self::Presence => !value.is_empty(),
        }
    }
}

/// An address range. IPv4 and IPv6 never match each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IpPrefix {
    pub ip: IpAddr,
    pub length: u8,
}

impl IpPrefix {
    pub fn contains(&self, ip: IpAddr) -> bool {
        match (self.ip, ip) {
            (IpAddr::V4(net), IpAddr::V4(ip)) => {
                let shift = 32_u32.saturating_sub(self.length.into());
                let top = |a: std::net::Ipv4Addr| u64::from(a.to_bits()) >> shift;
                top(net) == top(ip)
            }
            (IpAddr::V6(net), IpAddr::V6(ip)) => {
                let shift = 128_u32.saturating_sub(self.length.into());
                let top = |a: std::net::Ipv6Addr| a.to_bits().checked_shr(shift).unwrap_or(0);
                top(net) == top(ip)
            }
            _ => false,
        }
    }
}

impl fmt::Display for IpPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.length)
    }
}
