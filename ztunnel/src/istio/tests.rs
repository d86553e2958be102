//! What Istio's DaemonSet gives, and what happens when it gives something else.

use super::*;

const RESOLV_CONF: &str =
    "search istio-system.svc.cluster.local\nnameserver 10.96.0.10\nnameserver 10.96.0.11\n";

/// The environment of Istio's chart, unchanged.
fn chart() -> Vec<(String, String)> {
    [
        ("CA_ADDRESS", "istiod.istio-system.svc:15012"),
        ("XDS_ADDRESS", "istiod.istio-system.svc:15012"),
        ("RUST_LOG", "info"),
        ("RUST_BACKTRACE", "1"),
        ("ISTIO_META_CLUSTER_ID", "Kubernetes"),
        ("INPOD_ENABLED", "true"),
        ("TERMINATION_GRACE_PERIOD_SECONDS", "30"),
        ("POD_NAME", "ztunnel-x7k2p"),
        ("POD_NAMESPACE", "istio-system"),
        ("NODE_NAME", "worker-1"),
        ("INSTANCE_IP", "10.244.1.7"),
        ("SERVICE_ACCOUNT", "ztunnel"),
        ("ISTIO_META_ENABLE_HBONE", "true"),
        ("ZTUNNEL_CPU_LIMIT", "8"),
        ("KUBERNETES_SERVICE_HOST", "10.96.0.1"),
        ("PATH", "/usr/bin"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into()
}

fn with(more: &[(&str, &str)]) -> Result<Config, EnvError> {
    let more = more.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    config(chart().into_iter().chain(more), RESOLV_CONF)
}

#[test]
fn the_chart_alone_is_enough() {
    let config = with(&[]).unwrap();
    let seam = config.istio.as_deref().unwrap();
    for server in [&seam.xds, &seam.ca] {
        assert_eq!(server.address, "https://istiod.istio-system.svc:15012");
        assert_eq!(server.name, "istiod.istio-system.svc");
        assert_eq!(server.root, RootCert::File("./var/run/secrets/istio/root-cert.pem".into()));
        assert!(server.headers.is_empty());
    }
    assert!(seam.token == Token::File("./var/run/secrets/tokens/istio-token".into()));
    assert_eq!(config.node, "worker-1");
    assert_eq!(seam.proxy.pod, "ztunnel-x7k2p");
    assert_eq!(seam.proxy.ip, Some("10.244.1.7".parse().unwrap()));
    assert_eq!(seam.proxy.metadata["ENABLE_HBONE"], "true");
    assert_eq!(seam.resolver, "10.96.0.10:53".parse().unwrap());
    assert_eq!(seam.certificate_lifetime, Duration::from_secs(86_400));
    assert_eq!(seam.warnings, Vec::<String>::new());
    assert_eq!(config.zds_socket, Path::new("/var/run/ztunnel/ztunnel.sock"));
    assert_eq!(config.state_dir, Path::new("/var/run/ztunnel/ambit/state"));
    assert_eq!(config.trust_domain, "cluster.local");
    assert_eq!(config.drain_seconds, 25);
    assert!(config.dns_proxy);
    assert_eq!(config.capture(), crate::config::Capture::Redirect);
}

#[test]
fn what_is_set_counts() {
    let config = with(&[
        ("XDS_ADDRESS", "https://istiod-canary.mesh.svc:443/"),
        ("CA_ADDRESS", "[fd00::1]:15012"),
        ("ALT_XDS_HOSTNAME", "istiod.mesh.svc"),
        ("CA_ROOT_CA", "/etc/ca/root.pem"),
        ("XDS_ROOT_CA", "-----BEGIN CERTIFICATE-----\n"),
        ("AUTH_TOKEN", "/var/run/token"),
        ("XDS_HEADER_X_TENANT", "blue"),
        ("CLUSTER_ID", "ignored"),
        ("ISTIO_META_CLUSTER_ID", "east"),
        ("NETWORK", "net-1"),
        ("TRUST_DOMAIN", "example.org"),
        ("SECRET_TTL", "1h30m"),
        ("ZTUNNEL_WORKER_THREADS", "25%"),
        ("TERMINATION_GRACE_PERIOD_SECONDS", "5"),
        ("LOG_FORMAT", "json"),
        ("ISTIO_META_DNS_CAPTURE", "False"),
        ("PROXY_MODE", "shared"),
        ("INPOD_UDS", "/run/z/z.sock"),
        ("IPV6_ENABLED", "false"),
        ("POOL_MAX_STREAMS_PER_CONNECTION", "50"),
    ])
    .unwrap();
    let seam = config.istio.as_deref().unwrap();
    assert_eq!(seam.xds.address, "https://istiod-canary.mesh.svc:443");
    assert_eq!(seam.xds.name, "istiod.mesh.svc");
    assert_eq!(seam.xds.root, RootCert::Pem("-----BEGIN CERTIFICATE-----".into()));
    assert_eq!(seam.xds.headers.len(), 1);
    assert_eq!(seam.xds.headers[0].0.as_str(), "x_tenant");
    assert_eq!(
        (seam.ca.address.as_str(), seam.ca.name.as_str()),
        ("https://[fd00::1]:15012", "fd00::1")
    );
    assert_eq!(seam.ca.root, RootCert::File("/etc/ca/root.pem".into()));
    assert!(seam.token == Token::File("/var/run/token".into()));
    assert_eq!((config.cluster.as_str(), config.network.as_str()), ("east", "net-1"));
    assert_eq!(seam.certificate_lifetime, Duration::from_secs(5400));
    assert_eq!(config.workers, Some(2));
    assert_eq!((config.drain_seconds, config.log_format.as_str()), (4, "json"));
    assert!(!config.dns_proxy && config.stats_address.is_ipv4());
    assert_eq!(config.state_dir, Path::new("/run/z/ambit/state"));
    assert_eq!(seam.warnings.len(), 1, "{:?}", seam.warnings);
}

#[test]
fn what_cannot_be_obeyed_is_an_error_that_names_the_variable() {
    let check = |name: &str, value: &str, words: &str| {
        let error = with(&[(name, value)]).err().unwrap_or_else(|| panic!("{name}={value} passed"));
        let error = error.to_string();
        assert!(error.contains(name) && error.contains(words), "{error}");
    };
    check("PROXY_MODE", "dedicated", "one proxy per node");
    check("PROXY_MODE", "sidecar", "only shared");
    check("INPOD_ENABLED", "false", "only true");
    check("INPOD_ENABLED", "yes", "only true");
    check("PACKET_MARK", "7", "only 1337");
    check("FAKE_CA", "true", "from a CA only");
    check("CRL_PATH", "/crl.pem", "not checked");
    check("COMPLIANCE_POLICY", "pqc", "not supported");
    check("PROXY_CONFIG", "concurrency: 2", "ZTUNNEL_WORKER_THREADS");
    check("XDS_ADDRESS", "http://istiod:15010", "https only");
    check("XDS_ADDRESS", "istiod", "HOST:PORT");
    check("CA_ADDRESS", "fd00::1:15012", "HOST:PORT");
    check("CA_ADDRESS", "istiod/x:15012", "HOST:PORT");
    check("XDS_HEADER_A B", "x", "name of a header");
    check("CA_HEADER_A", "x\u{7f}", "header");
    check("INSTANCE_IP", "here", "address");
    check("SECRET_TTL", "soon", "24h");
    check("SECRET_TTL", "99999999999999h", "24h");
    check("ZTUNNEL_WORKER_THREADS", "0", "number");
    check("ZTUNNEL_WORKER_THREADS", "101%", "1% to 100%");
    check("ZTUNNEL_CPU_LIMIT", "two", "whole number");
    check("TERMINATION_GRACE_PERIOD_SECONDS", "-1", "whole number");
    check("CONNECTION_TERMINATION_DEADLINE", "x", "24h");
    check("ISTIO_META_DNS_CAPTURE", "maybe", "true or false");
    check("IPV6_ENABLED", "no", "true or false");
    check("LOG_FORMAT", "xml", "json or plain");
    for name in ["NODE_NAME", "POD_NAME", "POD_NAMESPACE", "SERVICE_ACCOUNT"] {
        check(name, "", "not set");
    }
}

#[test]
fn only_istios_command_line_counts() {
    let check = |args: &[&str], want| {
        let args: Vec<String> = args.iter().map(|a| (*a).to_owned()).collect();
        assert_eq!(is_call(&args), want, "{args:?}");
    };
    check(&["ztunnel", "proxy", "ztunnel"], true);
    check(&["ztunnel", "proxy"], false);
    check(&["ztunnel", "proxy", "--node", "ztunnel"], false);
    check(&["ztunnel", "ztunnel", "proxy"], false);
}

#[test]
fn the_resolver_is_the_first() {
    let check = |text: &str, want: &str| assert_eq!(nameserver(text).to_string(), want);
    check("", "127.0.0.1:53");
    check("# nameserver 1.1.1.1\nnameserver fd00::a\n", "[fd00::a]:53");
    check("nameserver\tnonsense\n nameserver 9.9.9.9\n", "9.9.9.9:53");
}
