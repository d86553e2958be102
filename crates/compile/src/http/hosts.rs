//! How Istio's kinds name a Service: `web` in the object's own namespace, or `web.shop.svc.cluster.local`.
//!
//! Nothing in between, as in Istio: `web.shop` is no Service there, and a name that means one thing here and another one there
//! would be found out in production.

/// What a host of an Istio object names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Host<'a> {
    Service {
        namespace: &'a str,
        name: &'a str,
    },
    /// `*`, or `*.shop.svc.cluster.local`.
    Wildcard,
    /// A host outside the cluster, an address, or a slip.
    Other,
}

/// `own`: the namespace of the object.
pub(super) fn read<'a>(host: &'a str, own: &'a str, cluster_domain: &str) -> Host<'a> {
    if host.contains('*') {
        return Host::Wildcard;
    }
    if !host.is_empty() && !host.contains('.') && !host.contains(':') {
        return Host::Service { namespace: own, name: host };
    }
    let inner = host.strip_suffix(cluster_domain).and_then(|h| h.strip_suffix(".svc."));
    match inner.and_then(|inner| inner.split_once('.')) {
        Some((name, namespace)) if !name.is_empty() && !namespace.contains('.') => {
            Host::Service { namespace, name }
        }
        _ => Host::Other,
    }
}

/// What to do about a host that is no Service.
pub(super) fn help(host: &str, cluster_domain: &str) -> String {
    match host.split_once('.') {
        // What people write for `web.shop.svc.cluster.local`.
        Some((name, namespace)) if !namespace.contains('.') && !host.contains(':') => {
            format!("write {name}.{namespace}.svc.{cluster_domain}")
        }
        _ => format!("write the name of a Service, or NAME.NAMESPACE.svc.{cluster_domain}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_services() {
        let check = |host: &str, want: Host<'_>| {
            assert_eq!(read(host, "own", "cluster.local"), want, "{host}");
        };
        check("web", Host::Service { namespace: "own", name: "web" });
        check("web.shop.svc.cluster.local", Host::Service { namespace: "shop", name: "web" });
        check("*", Host::Wildcard);
        check("*.shop.svc.cluster.local", Host::Wildcard);
        for other in [
            "",
            "web.shop",
            "web.shop.svc",
            "a.web.shop.svc.cluster.local",
            ".svc.cluster.local",
            "::1",
            "10.0.0.1",
            "example.com",
        ] {
            check(other, Host::Other);
        }
        assert_eq!(help("web.shop", "cluster.local"), "write web.shop.svc.cluster.local");
    }
}
