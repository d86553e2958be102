//! Virtual addresses of Services.
//!
//! As in Kubernetes: one IPv4 address unless families are asked for, an address asked for by number is
//! given if it is free, `None` means headless. When two Services ask for one address the first by age
//! has it; the other goes without, and a diagnostic names both.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Service, ServiceSpec};
use model::Str;

use super::LocalConfig;
use super::addresses::{Assignments, host};
use crate::diagnostics::{Code, Diagnostic};
use crate::object::{ORIGIN_ANNOTATION, Objects, Sourced, age, object_id};
use crate::services::addresses;

/// The one Service that may have the addresses of cluster DNS.
const DNS: (&str, &str) = ("kube-system", "kube-dns");

pub(super) fn plan(
    objects: &Objects,
    config: &LocalConfig,
    assignments: &mut Assignments,
    diagnostics: &mut Vec<Diagnostic>,
) -> Vec<Arc<Service>> {
    let wants = |sourced: &Sourced<Service>| sourced.value.spec.as_ref().is_some_and(needs_host);
    let wanted = |id: &String| {
        id.split_once('/').is_some_and(|(namespace, name)| {
            objects.services.get(&(namespace.into(), name.into())).is_some_and(wants)
        })
    };
    assignments.services.retain(|id, _| wanted(id));
    let mut taken = Taken::new(config, assignments);
    let mut explicit: BTreeMap<&(Str, Str), Vec<IpAddr>> = BTreeMap::new();
    let mut by_age: Vec<_> = objects.services.iter().collect();
    by_age.sort_by(|a, b| age(a.0, a.1).cmp(&age(b.0, b.1)));
    for (key, sourced) in &by_age {
        let Some(spec) = &sourced.value.spec else { continue };
        for ip in addresses(spec) {
            match taken.claim(ip, key, sourced, config) {
                Ok(()) => explicit.entry(*key).or_default().push(ip),
                Err(d) => {
                    let d = d.object(object_id("Service", &key.0, &key.1));
                    diagnostics.push(
                        d.field("spec.clusterIP").origin(sourced.origin.at("spec.clusterIP")),
                    );
                }
            }
        }
    }
    let mut out = Vec::new();
    for (key, sourced) in &objects.services {
        let Some(spec) = &sourced.value.spec else { continue };
        if spec.type_.as_deref() == Some("ExternalName") {
            continue;
        }
        let given = explicit.remove(key).unwrap_or_default();
        let ips = match assign(key, spec, given, config, assignments, &taken) {
            Ok(ips) => ips,
            Err(d) => {
                let d = d.object(object_id("Service", &key.0, &key.1));
                diagnostics.push(d.origin(sourced.origin.at("spec.clusterIP")));
                Vec::new()
            }
        };
        out.push(Arc::new(with_addresses(sourced, spec, &ips)));
    }
    out
}

fn is_headless(spec: &ServiceSpec) -> bool {
    spec.cluster_ip.as_deref() == Some("None")
        || spec.cluster_ips.iter().flatten().any(|ip| ip == "None")
}

/// Does the Service leave the choice of an address to us?
fn needs_host(spec: &ServiceSpec) -> bool {
    let external = spec.type_.as_deref() == Some("ExternalName");
    !external && !is_headless(spec) && families(spec).len() > addresses(spec).count()
}

/// The families a Service wants, main one first. `true`: IPv6.
fn families(spec: &ServiceSpec) -> Vec<bool> {
    let named = spec.ip_families.iter().flatten().map(|f| f == "IPv6");
    let mut families: Vec<bool> = addresses(spec).map(|ip| ip.is_ipv6()).chain(named).collect();
    let mut seen = std::collections::BTreeSet::new();
    families.retain(|f| seen.insert(*f));
    if families.is_empty() {
        families.push(false);
    }
    match spec.ip_family_policy.as_deref() {
        Some("PreferDualStack" | "RequireDualStack") if families.len() == 1 => {
            families.push(!families[0]);
        }
        Some("SingleStack") => families.truncate(1),
        _ => {}
    }
    families
}

/// Addresses that are given, and to whom.
struct Taken(BTreeMap<IpAddr, Owner>);

struct Owner {
    /// `namespace/name`; empty: not a Service.
    id: String,
    /// For people.
    text: String,
}

impl Taken {
    fn new(config: &LocalConfig, assignments: &Assignments) -> Self {
        let mut taken = BTreeMap::new();
        for (id, number) in &assignments.services {
            for range in [config.services_v4, config.services_v6] {
                let owner = Owner { id: id.clone(), text: format!("Service/{id}") };
                taken.insert(host(range, *number), owner);
            }
        }
        let dns = || Owner { id: String::new(), text: "cluster DNS".to_owned() };
        taken.extend(config.dns.map(|ip| (ip, dns())));
        Self(taken)
    }

    fn claim(
        &mut self,
        ip: IpAddr,
        key: &(Str, Str),
        sourced: &Sourced<Service>,
        config: &LocalConfig,
    ) -> Result<(), Box<Diagnostic>> {
        let range = if ip.is_ipv4() { config.services_v4 } else { config.services_v6 };
        if !range.contains(ip) {
            let message = format!("{ip} is not in {range}, the range of Services; it goes without");
            let d = Diagnostic::error(Code::InvalidField, message).help("leave clusterIP out");
            return Err(Box::new(d));
        }
        if config.dns.contains(&ip) && (&*key.0, &*key.1) == DNS {
            return Ok(());
        }
        let id = format!("{}/{}", key.0, key.1);
        if let Some(other) = self.0.get(&ip)
            && other.id != id
        {
            let message =
                format!("{ip} already belongs to {}; this Service goes without it", other.text);
            let help = "give each Service its own clusterIP, or leave it out";
            let d = Diagnostic::error(Code::DuplicateAddress, message).help(help);
            return Err(Box::new(d));
        }
        let text = format!("Service/{id} ({})", sourced.origin);
        self.0.insert(ip, Owner { id, text });
        Ok(())
    }
}

fn assign(
    key: &(Str, Str),
    spec: &ServiceSpec,
    given: Vec<IpAddr>,
    config: &LocalConfig,
    assignments: &mut Assignments,
    taken: &Taken,
) -> Result<Vec<IpAddr>, Box<Diagnostic>> {
    // A Service that asked in vain goes without: another address is not what it asked for.
    if is_headless(spec) || (given.is_empty() && addresses(spec).next().is_some()) {
        return Ok(Vec::new());
    }
    let families = families(spec);
    if !needs_host(spec) {
        return Ok(given);
    }
    let id = format!("{}/{}", key.0, key.1);
    let number = match assignments.services.get(&id) {
        Some(number) => *number,
        None => {
            let is_taken = |n| {
                [config.services_v4, config.services_v6]
                    .into_iter()
                    .any(|range| taken.0.contains_key(&host(range, n)))
            };
            let number = assignments.take_service_host(config.services_v4, is_taken);
            let number = number.ok_or_else(|| {
                let message = "no free address for the Service";
                Box::new(Diagnostic::error(Code::AddressesExhausted, message))
            })?;
            assignments.services.insert(id, number);
            number
        }
    };
    let address = |v6: bool| {
        let range = if v6 { config.services_v6 } else { config.services_v4 };
        given.iter().copied().find(|ip| ip.is_ipv6() == v6).unwrap_or_else(|| host(range, number))
    };
    Ok(families.into_iter().map(address).collect())
}

fn with_addresses(sourced: &Sourced<Service>, spec: &ServiceSpec, ips: &[IpAddr]) -> Service {
    let mut service = (*sourced.value).clone();
    let annotations = service.metadata.annotations.get_or_insert_default();
    annotations.insert(ORIGIN_ANNOTATION.to_owned(), sourced.origin.to_string());
    let families = families(spec);
    let family = |v6: bool| if v6 { "IPv6" } else { "IPv4" }.to_owned();
    let texts: Vec<String> = if is_headless(spec) {
        vec!["None".to_owned()]
    } else {
        ips.iter().map(IpAddr::to_string).collect()
    };
    let spec = service.spec.get_or_insert_default();
    spec.cluster_ip = texts.first().cloned();
    spec.cluster_ips = (!texts.is_empty()).then_some(texts);
    if spec.ip_family_policy.is_none() {
        let policy = if families.len() > 1 { "PreferDualStack" } else { "SingleStack" };
        spec.ip_family_policy = Some(policy.to_owned());
    }
    spec.ip_families = Some(families.into_iter().map(family).collect());
    service
}
