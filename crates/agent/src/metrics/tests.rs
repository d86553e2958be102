//! The page as Prometheus reads it, and that counting stays bounded.

use std::time::Duration;

use model::{LoadBalancing, Locality, Service, ServiceKey, Workload};

use super::traffic::{FLAGS, IDLE_SERIES, MAX_SERIES};
use super::*;

fn workload(name: &str) -> Arc<Workload> {
    let mut w =
        Workload::named(format!("Kubernetes//Pod/shop/{name}-0"), "shop", format!("{name}-0"));
    w.workload_name = name.into();
    w.canonical_name = name.into();
    w.canonical_revision = "v1".into();
    w.service_account = name.into();
    Arc::new(w)
}

fn service() -> Arc<Service> {
    Arc::new(Service {
        key: ServiceKey { namespace: "shop".into(), hostname: "web.shop.svc.cluster.local".into() },
        name: "web".into(),
        vips: Arc::new([]),
        ports: Arc::new([]),
        subject_alt_names: Arc::new([]),
        waypoint: None,
        load_balancing: LoadBalancing::default(),
        families: Default::default(),
    })
}

fn key<'a>(
    source: &'a Arc<Workload>,
    to: &'a Arc<Workload>,
    service: &'a Arc<Service>,
) -> TrafficKey<'a> {
    TrafficKey {
        security: Security::MutualTls,
        source: Some(source),
        destination: Some(to),
        service: Some(service),
        ..TrafficKey::unknown(Reporter::Source)
    }
}

fn lines<'a>(page: &'a str, start: &str) -> Vec<&'a str> {
    page.lines().filter(|l| l.starts_with(start)).collect()
}

#[test]
fn a_connection_has_istios_names_and_labels() {
    let metrics = Metrics::new("ztunnel", "0.1.0");
    let (client, web, service) = (workload("client"), workload("web"), service());
    let tcp = metrics.tcp(&key(&client, &web, &service));
    tcp.opened();
    tcp.add_bytes(10, 2_000);
    tcp.opened();
    tcp.closed();
    tcp.failed(Reason::ConnectFailed);
    let (page, _) = metrics.render();
    let labels = |flags: &str| {
        format!(
            "{{reporter=\"source\",source_workload=\"client\",source_canonical_service=\"client\",\
             source_canonical_revision=\"v1\",source_workload_namespace=\"shop\",\
             source_principal=\"spiffe://cluster.local/ns/shop/sa/client\",source_app=\"client\",\
             source_version=\"v1\",source_cluster=\"Kubernetes\",\
             destination_service=\"web.shop.svc.cluster.local\",destination_service_namespace=\"shop\",\
             destination_service_name=\"web\",destination_workload=\"web\",\
             destination_canonical_service=\"web\",destination_canonical_revision=\"v1\",\
             destination_workload_namespace=\"shop\",\
             destination_principal=\"spiffe://cluster.local/ns/shop/sa/web\",destination_app=\"web\",\
             destination_version=\"v1\",destination_cluster=\"Kubernetes\",request_protocol=\"tcp\",\
             response_flags=\"{flags}\",connection_security_policy=\"mutual_tls\"}}"
        )
    };
    let check = |name: &str, flags: &str, value: u64| {
        assert_eq!(lines(&page, name), [format!("{name}{} {value}", labels(flags))]);
    };
    check("istio_tcp_connections_opened_total", "-", 2);
    check("istio_tcp_connections_closed_total", "-", 1);
    // The server's bytes are the sent ones, also for the source.
    check("istio_tcp_sent_bytes_total", "-", 2_000);
    check("istio_tcp_received_bytes_total", "-", 10);
    check("istio_tcp_connections_failed_total", "CONNECT", 1);
    let has = |line: &str| assert!(page.lines().any(|l| l == line), "{line} in\n{page}");
    has("istio_tcp_sockets_open{reporter=\"source\"} 1");
    has("istio_tcp_sockets_open{reporter=\"destination\"} 0");
    has("istio_build{component=\"ztunnel\",tag=\"0.1.0\"} 1");
    has("ambit_refusals_total{reason=\"connect_failed\",reporter=\"source\"} 1");
    has("ambit_refusals_total{reason=\"policy_deny\",reporter=\"destination\"} 0");
    has("# TYPE istio_tcp_connections_opened counter");
    assert!(page.ends_with("# EOF\n"));
}

#[test]
fn what_is_not_known_says_so() {
    let metrics = Metrics::new("ztunnel", "x");
    metrics.refused_early(Reporter::Destination, Reason::PolicyDeny);
    let mut far = (*workload("far")).clone();
    far.locality = Locality { region: Some("eu".into()), zone: Some("eu-1".into()), subzone: None };
    far.workload_name = "a\"b\\c\nd".into();
    let far = Arc::new(far);
    let plain = TrafficKey { source: Some(&far), ..TrafficKey::unknown(Reporter::Source) };
    metrics.tcp(&plain).opened();
    let (page, _) = metrics.render();
    let [failed] = lines(&page, "istio_tcp_connections_failed_total")[..] else { panic!("{page}") };
    assert_eq!(failed.matches("=\"unknown\"").count(), 20, "{failed}");
    assert!(failed.contains("response_flags=\"DENY\"") && failed.ends_with(" 1"));
    let [opened] = lines(&page, "istio_tcp_connections_opened_total")[..] else { panic!("{page}") };
    assert!(opened.contains(r#"source_workload="a\"b\\c\nd""#), "{opened}");
    assert!(opened.contains("source_region=\"eu\",source_zone=\"eu-1\""), "{opened}");
    assert!(opened.contains("source_principal=\"unknown\""), "no TLS, no principal: {opened}");
    assert!(!opened.contains("destination_region"));
}

#[test]
fn a_shown_identity_goes_before_that_of_the_address() {
    let metrics = Metrics::new("ztunnel", "x");
    let (client, web, service) = (workload("client"), workload("web"), service());
    let shown = Identity::new("other", "ns", "sa");
    let with = TrafficKey { source_identity: Some(&shown), ..key(&client, &web, &service) };
    let mut interner = Interner::default();
    interner.tcp(&metrics, &key(&client, &web, &service)).opened();
    interner.tcp(&metrics, &with).opened();
    let own = client.identity();
    let same = TrafficKey { source_identity: Some(&own), ..key(&client, &web, &service) };
    interner.tcp(&metrics, &same).opened();
    let (page, _) = metrics.render();
    let opened = lines(&page, "istio_tcp_connections_opened_total");
    assert_eq!(opened.len(), 2);
    assert!(opened.iter().any(|l| l.contains("spiffe://other/ns/ns/sa/sa") && l.ends_with(" 1")));
    assert!(opened.iter().any(|l| l.contains("sa/client") && l.ends_with(" 2")));
}

#[test]
fn a_waypoints_clients_are_told_apart() {
    let metrics = Metrics::new("ztunnel", "x");
    let (waypoint, web, service) = (workload("waypoint"), workload("web"), service());
    let mut interner = Interner::default();
    let clients = [Identity::new("td", "a", "a"), Identity::new("td", "b", "b")];
    for client in [None, Some(&clients[0]), Some(&clients[0].clone()), Some(&clients[1])] {
        let key = TrafficKey { client, ..key(&waypoint, &web, &service) };
        interner.tcp(&metrics, &key).opened();
        metrics.tcp(&key).opened();
    }
    let (page, _) = metrics.render();
    let opened = lines(&page, "istio_tcp_connections_opened_total");
    assert_eq!(opened.len(), 3);
    let count = |label: &str, n: &str| {
        opened.iter().any(|l| l.contains(label) && l.contains("sa/waypoint") && l.ends_with(n))
    };
    assert!(count("client_principal=\"spiffe://td/ns/a/sa/a\"", " 4"), "{page}");
    assert!(count("client_principal=\"spiffe://td/ns/b/sa/b\"", " 2"), "{page}");
    assert_eq!(opened.iter().filter(|l| l.contains("client_principal")).count(), 2);
}

#[test]
fn every_reason_is_counted_once_under_a_known_flag() {
    let metrics = Metrics::new("ztunnel", "x");
    for (n, reason) in (1..).zip(Reason::ALL) {
        assert!(FLAGS.contains(&reason.response_flags()), "{reason}");
        assert_eq!(Reason::ALL.iter().position(|r| r == reason), Some(*reason as usize));
        for _ in 0..n {
            metrics.refused_early(Reporter::Source, *reason);
        }
    }
    let (page, _) = metrics.render();
    for (n, reason) in (1..).zip(Reason::ALL) {
        let line = format!("ambit_refusals_total{{reason=\"{reason}\",reporter=\"source\"}} {n}");
        assert!(page.lines().any(|l| l == line), "{line}");
    }
}

#[test]
fn interned_handles_are_the_same_and_keep_nothing_alive() {
    let metrics = Metrics::new("ztunnel", "x");
    let mut interner = Interner::default();
    let (client, web, service) = (workload("client"), workload("web"), service());
    let first = interner.tcp(&metrics, &key(&client, &web, &service));
    assert!(Arc::ptr_eq(&first, &interner.tcp(&metrics, &key(&client, &web, &service))));
    assert!(Arc::ptr_eq(&first, &metrics.tcp(&key(&client, &web, &service))));
    // Another pod of the same deployment: the same series.
    let twin = workload("client");
    assert!(Arc::ptr_eq(&first, &interner.tcp(&metrics, &key(&twin, &web, &service))));
    let reversed = interner.tcp(&metrics, &key(&web, &client, &service));
    assert!(!Arc::ptr_eq(&first, &reversed));
    assert_eq!((Arc::strong_count(&client), Arc::strong_count(&first)), (1, 2));
    for _ in 0..5_000 {
        let one_off = workload("client");
        assert!(Arc::ptr_eq(&first, &interner.tcp(&metrics, &key(&one_off, &web, &service))));
    }
}

#[test]
fn series_are_bounded_and_sums_stay_right() {
    let metrics = Metrics::new("ztunnel", "x");
    let (web, service) = (workload("web"), service());
    for n in 0..MAX_SERIES + 10 {
        let client = workload(&format!("client-{n}"));
        metrics.tcp(&key(&client, &web, &service)).opened();
    }
    let (page, _) = metrics.render();
    let opened = lines(&page, "istio_tcp_connections_opened_total");
    assert_eq!(opened.len(), MAX_SERIES + 1);
    let unknown = opened.iter().find(|l| l.contains("source_workload=\"unknown\"")).unwrap();
    assert!(unknown.ends_with(" 10"), "{unknown}");
    assert_eq!(
        lines(&page, "ambit_metrics_series_overflow_total"),
        ["ambit_metrics_series_overflow_total 10"]
    );
}

#[test]
fn idle_series_leave_when_nobody_holds_them() {
    let metrics = Metrics::new("ztunnel", "x");
    let (client, web, service) = (workload("client"), workload("web"), service());
    let held = metrics.tcp(&key(&client, &web, &service));
    held.opened();
    metrics.tcp(&key(&web, &client, &service)).opened();
    let start = Instant::now();
    let count = |after: Duration| metrics.0.traffic.scrape(start + after).len();
    assert_eq!(count(Duration::ZERO), 2);
    assert_eq!(count(IDLE_SERIES - Duration::from_secs(1)), 2);
    // It is on the page a last time, and then gone.
    assert_eq!(count(IDLE_SERIES), 2);
    assert_eq!(count(IDLE_SERIES), 1);
    held.closed();
    drop(held);
    assert_eq!(count(IDLE_SERIES * 2), 1);
    assert_eq!(count(IDLE_SERIES * 3), 1);
    assert_eq!(count(IDLE_SERIES * 3), 0);
}

#[test]
fn long_connections_are_counted_while_they_live() {
    let metrics = Metrics::new("ztunnel", "x");
    let tcp = metrics.tcp(&TrafficKey::unknown(Reporter::Source));
    let mut flushed = Flushed::default();
    let mut check = |from_client, from_server| {
        flushed.flush(&tcp, from_client, from_server);
        let v = tcp.values();
        (v.received, v.sent)
    };
    assert_eq!(check(5, 7), (5, 7));
    assert_eq!(check(5, 7), (5, 7));
    assert_eq!(check(6, 100), (6, 100));
    assert_eq!(check(0, 0), (6, 100));
}

#[test]
fn control_plane_certificates_and_proxies() {
    let metrics = Metrics::new("ztunnel", "x");
    let xds = metrics.xds();
    xds.connected();
    xds.message("type.googleapis.com/istio.workload.Address", 120);
    xds.message("type.googleapis.com/istio.workload.Address", 30);
    xds.nack("type.googleapis.com/istio.security.Authorization");
    xds.applied(ConfigVersion { epoch: 255, number: 7 }, 1_700_000_000);
    for n in 0..100 {
        xds.message(&format!("invented/{n}"), 1);
    }
    let identity = Identity::new("td", "ns", "sa");
    metrics.set_certificate(&identity, 1_800_000_000);
    metrics.set_certificate(&Identity::new("td", "ns", "gone"), 1);
    metrics.forget_certificate(&Identity::new("td", "ns", "gone"));
    metrics.proxies().started();
    metrics.proxies().started();
    metrics.proxies().stopped();
    metrics.proxies().set_pending(3);
    metrics.access_log_dropped().fetch_add(4, Ordering::Relaxed);
    let (page, content_type) = metrics.render();
    assert!(content_type.starts_with("application/openmetrics-text"));
    for line in [
        "ambit_xds_connected 1",
        "istio_xds_connection_terminations_total{reason=\"Error\"} 0",
        "istio_xds_message_total{url=\"type.googleapis.com/istio.workload.Address\"} 2",
        "istio_xds_message_bytes_total{url=\"type.googleapis.com/istio.workload.Address\"} 150",
        "ambit_xds_nacks_total{url=\"type.googleapis.com/istio.security.Authorization\"} 1",
        "istio_xds_message_total{url=\"other\"} 86",
        "ambit_config_version{epoch=\"ff\"} 7",
        "ambit_config_applied_timestamp_seconds 1700000000",
        "ambit_certificate_expiration_timestamp_seconds{identity=\"spiffe://td/ns/ns/sa/sa\"} 1800000000",
        "workload_manager_active_proxy_count 1",
        "workload_manager_pending_proxy_count 3",
        "workload_manager_proxies_started_total 2",
        "workload_manager_proxies_stopped_total 1",
        "ambit_access_log_dropped_total 4",
    ] {
        assert!(page.lines().any(|l| l == line), "{line} in\n{page}");
    }
    assert!(!page.contains("sa/gone"));
    assert!(page.contains("process_open_fds ") && page.contains("process_cpu_seconds_total "));
    xds.terminated(Termination::Error);
    metrics.proxies().stopped();
    metrics.proxies().stopped();
    let (page, _) = metrics.render();
    assert!(page.contains("ambit_xds_connected 0\n"));
    assert!(page.contains("istio_xds_connection_terminations_total{reason=\"Error\"} 1\n"));
    assert!(page.contains("workload_manager_active_proxy_count 0\n"));
}

#[test]
fn dns_questions_have_istios_names_and_labels() {
    let metrics = Metrics::new("ztunnel", "x");
    let (service, revision) = ("web".into(), "v1".into());
    let web = metrics.dns(Some((&service, &revision)));
    for _ in 0..3 {
        web.asked(1, DnsProtocol::Udp);
        web.ended(DnsResult::Mesh);
    }
    web.asked(33, DnsProtocol::Tcp);
    for (micros, answered) in [(400, true), (500, true), (70_000, true), (9_000_000, false)] {
        web.upstream(33, DnsProtocol::Tcp);
        web.upstream_ended(33, DnsProtocol::Tcp, Duration::from_micros(micros), answered);
    }
    for kind in 60_000..60_100 {
        metrics.dns(None).asked(kind, DnsProtocol::Udp);
    }
    for n in 0..2_000 {
        metrics.dns(Some((&format!("s{n}").into(), &revision))).asked(2, DnsProtocol::Udp);
    }
    let (page, _) = metrics.render();
    let srv = "request_query_type=\"SRV\",request_protocol=\"tcp\",\
               source_canonical_service=\"web\",source_canonical_revision=\"v1\"";
    for line in [
        "istio_dns_requests_total{request_query_type=\"A\",request_protocol=\"udp\",\
         source_canonical_service=\"web\",source_canonical_revision=\"v1\"} 3"
            .to_owned(),
        "istio_dns_requests_total{request_query_type=\"other\",request_protocol=\"udp\",\
         source_canonical_service=\"unknown\",source_canonical_revision=\"unknown\"} 100"
            .to_owned(),
        "istio_dns_requests_total{request_query_type=\"NS\",request_protocol=\"udp\",\
         source_canonical_service=\"unknown\",source_canonical_revision=\"unknown\"} 1001"
            .to_owned(),
        format!("istio_dns_upstream_requests_total{{{srv}}} 4"),
        format!("istio_dns_upstream_failures_total{{{srv}}} 1"),
        format!("istio_dns_upstream_request_duration_seconds_count{{{srv}}} 4"),
        format!("istio_dns_upstream_request_duration_seconds_sum{{{srv}}} 9.0709"),
        "ambit_dns_questions_total{result=\"mesh\"} 3".to_owned(),
    ] {
        assert!(page.lines().any(|l| l == line), "{line} in\n{page}");
    }
    for (bound, count) in [("0.0005", 2), ("0.01", 2), ("0.1", 3), ("5.0", 3), ("+Inf", 4)] {
        let start = format!("istio_dns_upstream_request_duration_seconds_bucket{{le=\"{bound}\"");
        let line = page.lines().find(|l| l.starts_with(&start)).unwrap();
        assert!(
            line.contains("source_canonical_service=\"web\"")
                && line.ends_with(&format!(" {count}")),
            "{line}"
        );
    }
}

/// The page for people names every metric, and none that is not there.
#[test]
fn the_documents_list_every_metric() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/observability.md");
    let doc = std::fs::read_to_string(path).unwrap();
    let metrics = Metrics::new("ztunnel", "x");
    metrics.set_certificate(&Identity::new("td", "ns", "sa"), 1);
    metrics.xds().message("url", 1);
    metrics.tcp(&TrafficKey::unknown(Reporter::Source)).opened();
    metrics.refused_early(Reporter::Source, Reason::PolicyDeny);
    metrics.dns(None).asked(1, DnsProtocol::Udp);
    metrics.dns(None).upstream(1, DnsProtocol::Udp);
    let waypoint = Metrics::new("waypoint", "x");
    let rpc = HttpKey {
        protocol: HttpProtocol::Grpc,
        grpc_status: Some(0),
        ..request(TrafficKey::unknown(Reporter::Waypoint), 200)
    };
    let sample = Sample { request_messages: 1, response_messages: 1, ..Sample::default() };
    HttpInterner::default().get(&waypoint, &rpc).add(&sample);
    let pages = [metrics.render().0, waypoint.render().0].concat();
    let mut shown: Vec<String> = pages
        .lines()
        .filter_map(|l| l.strip_prefix("# TYPE ")?.split_once(' '))
        .map(
            |(name, kind)| {
                if kind == "counter" { format!("{name}_total") } else { name.to_owned() }
            },
        )
        .collect();
    let kinds = ["| counter |", "| gauge |", "| histogram |"];
    let rows =
        doc.lines().filter(|l| l.ends_with('|') && kinds.iter().any(|kind| l.contains(kind)));
    let mut listed: Vec<String> = rows
        .flat_map(|l| l.split('`').skip(1).step_by(2).filter(|w| w.contains('_')))
        .map(str::to_owned)
        .collect();
    shown.sort();
    shown.dedup();
    listed.sort();
    listed.dedup();
    // Labels that a row names are not metrics.
    listed.retain(|name| name != "response_flags");
    assert_eq!(shown, listed);
}

fn request<'a>(traffic: TrafficKey<'a>, code: u16) -> HttpKey<'a> {
    HttpKey { traffic, protocol: HttpProtocol::Http, code, flags: "-", grpc_status: None }
}

#[test]
fn requests_have_istios_names_and_labels() {
    let metrics = Metrics::new("waypoint", "0");
    let (client, web, service) = (workload("client"), workload("web"), service());
    let traffic = TrafficKey { reporter: Reporter::Waypoint, ..key(&client, &web, &service) };
    let mut interner = HttpInterner::default();
    for (code, millis, bytes) in [(200, 3, 10), (200, 70_000, 20_000_000), (503, 1, 0)] {
        let sample = Sample {
            duration: Duration::from_millis(millis),
            response_bytes: bytes,
            ..Sample::default()
        };
        interner.get(&metrics, &request(traffic, code)).add(&sample);
    }
    let grpc = HttpKey {
        protocol: HttpProtocol::Grpc,
        grpc_status: Some(14),
        flags: "UT",
        ..request(traffic, 200)
    };
    interner.get(&metrics, &grpc).add(&Sample { request_messages: 2, ..Sample::default() });
    let (page, _) = metrics.render();
    let value = |name: &str, words: &[&str]| {
        let fits = |l: &&str| l.starts_with(name) && words.iter().all(|word| l.contains(word));
        let [line] = page.lines().filter(fits).collect::<Vec<_>>()[..] else {
            panic!("{name} {words:?} in\n{page}")
        };
        line.rsplit(' ').next().unwrap_or_default().to_owned()
    };
    let http = "request_protocol=\"http\"";
    assert_eq!(value("istio_requests_total", &["response_code=\"200\"", http]), "2");
    assert_eq!(value("istio_requests_total", &["response_code=\"503\""]), "1");
    let rpc = ["grpc_response_status=\"14\"", "response_flags=\"UT\"", "reporter=\"waypoint\""];
    assert_eq!(value("istio_requests_total", &rpc), "1");
    assert_eq!(value("istio_request_messages_total", &[]), "2");
    let of_200 = |more| ["response_code=\"200\"", http, more];
    let bucket = "istio_request_duration_milliseconds_bucket";
    assert_eq!(value(bucket, &of_200("le=\"5.0\"")), "1");
    assert_eq!(value(bucket, &of_200("le=\"60000.0\"")), "1");
    assert_eq!(value(bucket, &of_200("le=\"+Inf\"")), "2");
    assert_eq!(value("istio_request_duration_milliseconds_sum", &of_200("")), "70003.0");
    assert_eq!(value("istio_response_bytes_sum", &of_200("")), "20000010.0");
    assert!(!page.contains("reporter=\"source\""), "a waypoint is neither end");
}

#[test]
fn too_many_kinds_of_requests_are_counted_as_unknown() {
    let metrics = Metrics::new("waypoint", "0");
    let (client, web, service) = (workload("client"), workload("web"), service());
    let traffic = TrafficKey { reporter: Reporter::Waypoint, ..key(&client, &web, &service) };
    for code in 0..1_100 {
        metrics.http(&request(traffic, code)).add(&Sample::default());
    }
    let (page, _) = metrics.render();
    let rows = lines(&page, "istio_requests_total");
    assert_eq!(rows.len(), 1_001);
    let sum: u64 = rows.iter().filter_map(|l| l.rsplit(' ').next()?.parse::<u64>().ok()).sum();
    assert_eq!(sum, 1_100, "no request is lost");
    assert!(page.contains("ambit_http_series_overflow_total 100\n"));
}
