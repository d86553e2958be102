//! Authorization once more, as the documentation tells it: slow, without early exits, and sharing no
//! code with the real one, not even [`StringMatch::matches`] or [`IpPrefix::contains`].

use std::net::IpAddr;

use model::{Action, Identity, IpPrefix, Match, Policy, Scope, StringMatch};

use super::Case;

pub(super) fn answer(case: &Case) -> String {
    let to = plain(case.destination.ip());
    if to != "10.1.0.1" && to != "fd00::1" {
        return "destination_mismatch".into();
    }
    if [15001, 15006, 15008, 15053].contains(&case.destination.port()) {
        return "mesh_port".into();
    }
    let mut denying = Vec::new();
    let mut allowing = Vec::new();
    let mut allow_policies = Vec::new();
    for policy in &case.policies {
        let applies = match policy.scope {
            Scope::Global | Scope::WorkloadSelector => true,
            Scope::Namespace => &*policy.key.namespace == "shop",
        };
        if !applies || policy.dry_run {
            continue;
        }
        let name = format!("{}/{}", policy.key.namespace, policy.key.name);
        let (peer, client) = (case.peer.as_ref(), case.client.as_ref());
        let hit = match policy.action {
            Action::Deny => {
                let of_client = client.is_some() && matches(policy, case, client, None);
                matches(policy, case, peer, None) || of_client
            }
            Action::Allow => {
                let of_client = client.is_some() && matches(policy, case, client, peer);
                matches(policy, case, peer, client) || of_client
            }
        };
        match policy.action {
            Action::Deny if hit => denying.push(name),
            Action::Deny => {}
            Action::Allow => {
                allow_policies.push(name.clone());
                if hit {
                    allowing.push(name);
                }
            }
        }
    }
    denying.sort();
    allowing.sort();
    allow_policies.sort();
    if !denying.is_empty() {
        return format!("policy_deny {}", denying[0]);
    }
    if !case.missing.is_empty() {
        return "pending shop/gone".into();
    }
    if allow_policies.is_empty() {
        return "allow".into();
    }
    match allowing.first() {
        Some(name) => format!("allow {name}"),
        None => format!("policy_no_allow {}", allow_policies[0]),
    }
}

/// `besides`: who must not be excluded either.
fn matches(
    policy: &Policy,
    case: &Case,
    who: Option<&Identity>,
    besides: Option<&Identity>,
) -> bool {
    let mut any = false;
    for rule in policy.rules.iter() {
        let mut all = true;
        for clause in &rule.clauses {
            let mut one = clause.is_empty();
            for m in clause {
                one = one || (holds(m, case, who) && spares(m, besides));
            }
            all = all && one;
        }
        any = any || all;
    }
    any
}

/// No `not` of the match names this identity.
fn spares(m: &Match, who: Option<&Identity>) -> bool {
    let Some(who) = who else { return true };
    let principal = format!("{}/ns/{}/sa/{}", who.trust_domain, who.namespace, who.service_account);
    let account = (who.namespace.clone(), who.service_account.clone());
    !m.not_namespaces.iter().any(|s| text_matches(s, &who.namespace))
        && !m.not_principals.iter().any(|s| text_matches(s, &principal))
        && !m.not_service_accounts.contains(&account)
}

fn holds(m: &Match, case: &Case, peer: Option<&Identity>) -> bool {
    if *m == Match::default() {
        return false;
    }
    let mut ok = true;
    let mut wants = |set: bool, hit: bool| ok = ok && (!set || hit);
    let namespace = peer.map(|p| p.namespace.to_string());
    let principal =
        peer.map(|p| format!("{}/ns/{}/sa/{}", p.trust_domain, p.namespace, p.service_account));
    let account = peer.map(|p| (p.namespace.clone(), p.service_account.clone()));
    let text = |list: &[StringMatch], value: &Option<String>| {
        list.iter().any(|s| value.as_ref().is_some_and(|v| text_matches(s, v)))
    };
    let listed = |list: &[(model::Str, model::Str)]| {
        list.iter().any(|pair| account.as_ref().is_some_and(|a| a == pair))
    };
    let (source, to, port) = (case.source, case.destination.ip(), case.destination.port());
    wants(!m.namespaces.is_empty(), text(&m.namespaces, &namespace));
    wants(!m.not_namespaces.is_empty(), !text(&m.not_namespaces, &namespace));
    wants(!m.principals.is_empty(), text(&m.principals, &principal));
    wants(!m.not_principals.is_empty(), !text(&m.not_principals, &principal));
    wants(!m.service_accounts.is_empty(), listed(&m.service_accounts));
    wants(!m.not_service_accounts.is_empty(), !listed(&m.not_service_accounts));
    wants(!m.source_ips.is_empty(), within(&m.source_ips, source));
    wants(!m.not_source_ips.is_empty(), !within(&m.not_source_ips, source));
    wants(!m.destination_ips.is_empty(), within(&m.destination_ips, to));
    wants(!m.not_destination_ips.is_empty(), !within(&m.not_destination_ips, to));
    wants(!m.destination_ports.is_empty(), m.destination_ports.contains(&port));
    wants(!m.not_destination_ports.is_empty(), !m.not_destination_ports.contains(&port));
    ok
}

fn text_matches(s: &StringMatch, value: &str) -> bool {
    match s {
        StringMatch::Exact(want) => want.to_string() == value,
        StringMatch::Prefix(want) => value.len() >= want.len() && value[..want.len()] == **want,
        StringMatch::Suffix(want) => {
            value.len() >= want.len() && value[value.len() - want.len()..] == **want
        }
        StringMatch::Presence => value.chars().count() > 0,
    }
}

/// An address as a string, IPv4 also when it came inside IPv6.
fn plain(ip: IpAddr) -> String {
    ip.to_string().trim_start_matches("::ffff:").to_owned()
}

fn within(list: &[IpPrefix], ip: IpAddr) -> bool {
    let bits = |ip: IpAddr| -> Vec<bool> {
        let octets = match ip {
            IpAddr::V4(v4) => v4.octets().to_vec(),
            IpAddr::V6(v6) => v6.octets().to_vec(),
        };
        octets.iter().flat_map(|o| (0..8).rev().map(move |i| o >> i & 1 == 1)).collect()
    };
    let ip = bits(plain(ip).parse().unwrap());
    list.iter().any(|prefix| {
        let net = bits(prefix.ip);
        net.len() == ip.len() && net.iter().zip(&ip).take(prefix.length.into()).all(|(a, b)| a == b)
    })
}
