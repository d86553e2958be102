//! What stands behind each Service: the EndpointSlice controller, as one function.
//!
//! Invariants: pure; an endpoint belongs to a Service when the selector matches its labels in the same namespace; only
//! ready ones are called, except where the Service says `publishNotReadyAddresses`; a named target port is looked up in
//! each pod on its own.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use k8s_openapi::api::core::v1::{Pod, Service, ServicePort as KubePort};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use net::service_nat::{Protocol, ServicePort};

/// A pod as a Service sees it.
#[derive(Clone, Debug)]
pub(crate) struct Backend<'a> {
    pub(crate) pod: &'a Pod,
    pub(crate) ips: &'a [IpAddr],
    pub(crate) ready: bool,
}

/// A Service with what is behind it now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Resolved {
    pub(crate) namespace: String,
    pub(crate) name: String,
    /// Empty: headless.
    pub(crate) vips: Vec<IpAddr>,
    pub(crate) ports: Vec<Port>,
    pub(crate) endpoints: Vec<Endpoint>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Port {
    /// May be empty when it is the only one.
    pub(crate) name: String,
    pub(crate) number: u16,
    pub(crate) protocol: Protocol,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Endpoint {
    pub(crate) ips: Vec<IpAddr>,
    /// The name below the Service's, when the pod asks for one.
    pub(crate) hostname: Option<String>,
    /// Target ports in the order of the Service's; none where the pod has no port of that name.
    pub(crate) ports: Vec<Option<u16>>,
}

/// Resolves all Services.
pub(crate) fn resolve(services: &[impl AsRef<Service>], backends: &[Backend<'_>]) -> Vec<Resolved> {
    services.iter().filter_map(|s| resolve_one(s.as_ref(), backends)).collect()
}

fn resolve_one(service: &Service, backends: &[Backend<'_>]) -> Option<Resolved> {
    let namespace = service.metadata.namespace.clone().unwrap_or_else(|| "default".to_owned());
    let name = service.metadata.name.clone()?;
    let spec = service.spec.as_ref()?;
    let kube_ports: Vec<(&KubePort, u16, Protocol)> =
        spec.ports.iter().flatten().filter_map(port).collect();
    let all = spec.publish_not_ready_addresses == Some(true);
    let selected = |b: &&Backend<'_>| {
        let selector = spec.selector.as_ref().filter(|s| !s.is_empty());
        let same = b.pod.metadata.namespace.as_deref().unwrap_or("default") == namespace;
        same && (b.ready || all)
            && selector.is_some_and(|s| matches(s, b.pod.metadata.labels.as_ref()))
    };
    // A Service of one family has endpoints of that family only.
    let families = spec.ip_families.clone().unwrap_or_default();
    let wanted = |ip: &&IpAddr| {
        families.is_empty() || families.iter().any(|f| (f == "IPv6") == ip.is_ipv6())
    };
    let endpoints = backends.iter().filter(selected).map(|b| Endpoint {
        ips: b.ips.iter().filter(wanted).copied().collect(),
        hostname: b.pod.spec.as_ref().and_then(|s| {
            let named = s.subdomain.as_deref() == Some(name.as_str());
            named.then(|| s.hostname.clone().or_else(|| b.pod.metadata.name.clone())).flatten()
        }),
        ports: kube_ports
            .iter()
            .map(|(p, number, protocol)| target(p, *number, *protocol, b.pod))
            .collect(),
    });
    let vips = spec
        .cluster_ips
        .iter()
        .flatten()
        .chain(spec.cluster_ip.as_ref())
        .filter_map(|ip| ip.parse().ok());
    let mut vips: Vec<IpAddr> = vips.collect();
    vips.sort_unstable();
    vips.dedup();
    Some(Resolved {
        endpoints: endpoints.collect(),
        namespace,
        vips,
        ports: kube_ports
            .iter()
            .map(|(p, number, protocol)| Port {
                name: p.name.clone().unwrap_or_default(),
                number: *number,
                protocol: *protocol,
            })
            .collect(),
        name,
    })
}

/// What a node translates.
pub(crate) fn translations(services: &[Resolved]) -> Vec<ServicePort> {
    let mut all: BTreeMap<(SocketAddr, Protocol), Vec<SocketAddr>> = BTreeMap::new();
    for service in services {
        for &vip in &service.vips {
            for (i, port) in service.ports.iter().enumerate() {
                let to = service.endpoints.iter().filter_map(|e| {
                    let ip = e.ips.iter().find(|ip| ip.is_ipv4() == vip.is_ipv4())?;
                    Some(SocketAddr::new(*ip, (*e.ports.get(i)?)?))
                });
                // Two Services cannot share an address; should they all the same, the first has it.
                all.entry((SocketAddr::new(vip, port.number), port.protocol))
                    .or_insert_with(|| to.collect());
            }
        }
    }
    all.into_iter()
        .map(|((vip, protocol), endpoints)| ServicePort { vip, protocol, endpoints })
        .collect()
}

fn matches(selector: &BTreeMap<String, String>, labels: Option<&BTreeMap<String, String>>) -> bool {
    selector.iter().all(|(k, v)| labels.and_then(|l| l.get(k)) == Some(v))
}

fn port(port: &KubePort) -> Option<(&KubePort, u16, Protocol)> {
    let protocol = match port.protocol.as_deref() {
        None | Some("TCP") => Protocol::Tcp,
        Some("UDP") => Protocol::Udp,
        Some(_) => return None,
    };
    Some((port, u16::try_from(port.port).ok().filter(|n| *n > 0)?, protocol))
}

fn target(port: &KubePort, number: u16, protocol: Protocol, pod: &Pod) -> Option<u16> {
    match port.target_port.as_ref() {
        None => Some(number),
        Some(IntOrString::Int(n)) => u16::try_from(*n).ok().filter(|n| *n > 0),
        Some(IntOrString::String(name)) => {
            let word = if protocol == Protocol::Udp { "UDP" } else { "TCP" };
            let containers = pod.spec.iter().flat_map(|s| &s.containers);
            let found = containers.flat_map(|c| c.ports.iter().flatten()).find(|p| {
                p.name.as_ref() == Some(name) && p.protocol.as_deref().unwrap_or("TCP") == word
            })?;
            u16::try_from(found.container_port).ok()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::sync::Arc;

    fn service(value: serde_json::Value) -> Arc<Service> {
        Arc::new(serde_json::from_value(value).unwrap())
    }

    fn pod(labels: serde_json::Value, spec: serde_json::Value) -> Pod {
        let value =
            json!({"metadata": {"name": "p", "namespace": "ns", "labels": labels}, "spec": spec});
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn endpoints_and_named_ports() {
        let a = pod(
            json!({"app": "web"}),
            json!({"containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 8080}, {"name": "dns", "protocol": "UDP", "containerPort": 5353}]}]}),
        );
        let b = pod(
            json!({"app": "web", "x": "y"}),
            json!({"containers": [], "hostname": "zero", "subdomain": "web"}),
        );
        let other = pod(json!({"app": "db"}), json!({"containers": []}));
        let (ip_a, ip_b): ([IpAddr; 2], [IpAddr; 1]) = (
            ["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
            ["10.0.0.2".parse().unwrap()],
        );
        let backends = [
            Backend { pod: &a, ips: &ip_a, ready: true },
            Backend { pod: &b, ips: &ip_b, ready: true },
            Backend { pod: &b, ips: &ip_b, ready: false },
            Backend { pod: &other, ips: &ip_b, ready: true },
        ];
        let check = |spec: serde_json::Value, want: &[(&str, &[&str])]| {
            let s = service(json!({"metadata": {"name": "web", "namespace": "ns"}, "spec": spec}));
            let got: Vec<(String, Vec<String>)> = translations(&resolve(&[s], &backends))
                .iter()
                .map(|p| {
                    (
                        format!("{} {:?}", p.vip, p.protocol),
                        p.endpoints.iter().map(ToString::to_string).collect(),
                    )
                })
                .collect();
            let want: Vec<(String, Vec<String>)> = want
                .iter()
                .map(|(a, b)| ((*a).to_owned(), b.iter().map(|s| (*s).to_owned()).collect()))
                .collect();
            assert_eq!(got, want);
        };
        let web = json!({"app": "web"});
        check(
            json!({"selector": web, "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1", "fd00:96::1"], "ports": [{"port": 80}]}),
            &[
                ("10.96.0.1:80 Tcp", &["10.0.0.1:80", "10.0.0.2:80"]),
                ("[fd00:96::1]:80 Tcp", &["[fd00::1]:80"]),
            ],
        );
        check(
            json!({"selector": web, "clusterIP": "10.96.0.1", "ports": [{"port": 80, "targetPort": "http"}, {"port": 53, "protocol": "UDP", "targetPort": "dns"}, {"port": 9, "protocol": "SCTP"}]}),
            &[("10.96.0.1:53 Udp", &["10.0.0.1:5353"]), ("10.96.0.1:80 Tcp", &["10.0.0.1:8080"])],
        );
        check(
            json!({"selector": {"app": "none"}, "clusterIP": "10.96.0.1", "ports": [{"port": 80}]}),
            &[("10.96.0.1:80 Tcp", &[])],
        );
        check(
            json!({"clusterIP": "10.96.0.1", "ports": [{"port": 80}]}),
            &[("10.96.0.1:80 Tcp", &[])],
        );
        check(json!({"selector": web, "clusterIP": "None", "ports": [{"port": 80}]}), &[]);
        let headless = service(
            json!({"metadata": {"name": "web", "namespace": "ns"}, "spec": {"clusterIP": "None", "selector": web, "publishNotReadyAddresses": true}}),
        );
        let got = resolve(&[headless], &backends);
        assert_eq!(got[0].endpoints.len(), 3);
        assert_eq!(got[0].endpoints[1].hostname.as_deref(), Some("zero"));
        assert_eq!(got[0].endpoints[0].ips, ip_a);
        let spec = json!({"clusterIP": "None", "selector": web, "ipFamilies": ["IPv4"]});
        let one_family =
            service(json!({"metadata": {"name": "web", "namespace": "ns"}, "spec": spec}));
        assert_eq!(resolve(&[one_family], &backends)[0].endpoints[0].ips, ip_a[..1]);
    }
}
