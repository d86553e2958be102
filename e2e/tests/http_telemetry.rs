//! What a waypoint tells about requests: spans that join those of the node proxies, and Istio's metrics with Istio's labels.

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::suite::{self, Test};
use e2e::{Background, Lab, Plan, programs, wait_for, wait_until, yaml};
use serde::Deserialize;
use serde_json::{Map, Value};

const TESTS: &[(&str, Test)] = &[
    ("a_request_without_context_is_one_trace_with_both_nodes", no_context),
    ("a_clients_trace_goes_on_behind_the_waypoint", clients_context),
    ("istios_metrics_have_istios_labels", metrics),
];
/// The collector, on node-1; the lab gives nodes these addresses.
const COLLECTOR: &str = "10.89.0.11:4317";
/// Spans are sent once a second, those of connections when they end.
const SOON: Duration = Duration::from_secs(30);
const CLIENTS: [&str; 4] = ["client", "client-w3c", "client-b3", "client-b3s"];
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const SPAN: &str = "00f067aa0ba902b7";
/// Labels of Istio's HTTP metrics, and of those that a waypoint has for what is not HTTP.
const LABELS: &str = "reporter source_workload source_canonical_service source_canonical_revision source_workload_namespace \
    source_principal source_app source_version source_cluster destination_workload destination_workload_namespace \
    destination_principal destination_app destination_version destination_service destination_canonical_service \
    destination_canonical_revision destination_service_name destination_service_namespace destination_cluster \
    request_protocol response_flags connection_security_policy response_code";

fn main() -> ExitCode {
    suite::run(plan, TESTS)
}

fn plan() -> Result<Plan> {
    let server = yaml::pod("shop", "web", 2)
        .image("echo", &["--port=8080", "--grpc=7070"])
        .ready_on(8080)
        .yaml();
    // Each with an identity, and so with connections, of its own.
    let clients = CLIENTS.map(|name| {
        yaml::pod("shop", name, 1).image("client", &[]).command(&["sleep", "infinity"]).yaml()
    });
    let objects = [
        yaml::join(&clients),
        server,
        yaml::service("shop", "web", "web", &[("http", 80, "8080"), ("grpc", 7070, "7070")]),
    ];
    let namespace = "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: shop\n  labels: {istio.io/dataplane-mode: ambient, \
                     istio.io/use-waypoint: waypoint}\n---\napiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: \
                     {name: waypoint, namespace: shop}\nspec:\n  gatewayClassName: istio-waypoint\n  listeners: [{name: mesh, \
                     port: 15008, protocol: HBONE}]\n";
    Ok(Plan::new()
        .image("echo", programs::ours("echo-server")?)
        .image("client", programs::ours("echo-client")?)
        .file("00-shop.yaml", namespace)
        .file("shop.yaml", yaml::join(&objects))
        .environment("OTEL_EXPORTER_OTLP_ENDPOINT", &format!("http://{COLLECTOR}")))
}

/// A span as the collector prints it.
#[derive(Clone, Debug, Deserialize)]
struct Span {
    service: String,
    name: String,
    trace: String,
    span: String,
    parent: String,
    links: Vec<String>,
    attributes: Map<String, Value>,
}

impl Span {
    fn is(&self, name: &str, value: &str) -> bool {
        self.attributes.get(name).and_then(Value::as_str) == Some(value)
    }
}

fn collector(lab: &Lab) -> Result<Background> {
    let probe = programs::path_of_ours("meshprobe")?;
    let running = lab.exec_in_background("node-1", &[&probe, "collect", COLLECTOR])?;
    wait_until("the collector", SOON, || Ok(running.out().contains("ready")))
        .with_context(|| running.err())?;
    Ok(running)
}

fn spans(collector: &Background) -> Result<Vec<Span>> {
    let out = collector.out();
    let whole = out.rfind('\n').map_or("", |end| &out[..end]);
    let lines = whole.lines().filter(|line| line.contains("\"span\""));
    lines.map(|line| serde_json::from_str(line).context(line.to_owned())).collect()
}

/// Waits for the first span that fits.
fn find(collector: &Background, what: &str, fits: impl Fn(&Span) -> bool) -> Result<Span> {
    let found = wait_for(what, SOON, || Ok(spans(collector)?.into_iter().find(&fits)));
    found.with_context(|| format!("{:#?} {}", spans(collector), collector.err()))
}

/// One request on a connection of its own; what the server saw of its headers.
fn ask(lab: &Lab, client: &str, path: &str, headers: &[String]) -> Result<String> {
    let url = format!("http://web{path}");
    let mut argv = vec!["echo-client", &url];
    headers.iter().for_each(|header| argv.extend(["-H", header]));
    let ran = lab.exec(&format!("shop/{client}"), &argv)?;
    Ok(ran.ok()?.to_owned())
}

/// The waypoint's span of a request, and that of the endpoint's proxy, whose connection was made for it.
fn behind(collector: &Background, path: &str) -> Result<(Span, Span)> {
    let request = find(collector, "the waypoint's span", |s| s.is("url.path", path))?;
    ensure!(request.service == "waypoint" && request.name == "request", "{request:?}");
    let inbound =
        find(collector, "the span of the endpoint's proxy", |s| s.parent == request.span)?;
    ensure!(inbound.service == "ztunnel" && inbound.trace == request.trace, "{inbound:?}");
    ensure!(inbound.name == "connection inbound", "{inbound:?}");
    Ok((request, inbound))
}

/// Ends the server, and with it the connections that the waypoint keeps: spans of connections are sent at their end.
fn end_connections(lab: &Lab) -> Result<()> {
    let before = lab.pod("shop/web")?.restarts;
    let pid = lab.exec("node-2", &["pgrep", "-x", "echo-server"])?.ok()?.to_owned();
    lab.exec("node-2", &["kill", &pid])?.ok()?;
    wait_until("the server to be back", SOON, || {
        let pod = lab.pod("shop/web")?;
        Ok(pod.restarts > before && pod.ready)
    })?;
    Ok(())
}

fn no_context(lab: &Lab) -> Result<()> {
    let collector = collector(lab)?;
    ask(lab, CLIENTS[0], "/nothing", &[])?;
    end_connections(lab)?;
    let (request, _) = behind(&collector, "/nothing")?;
    let outbound =
        find(&collector, "the span of the client's proxy", |s| s.span == request.parent)?;
    ensure!(
        outbound.service == "ztunnel" && outbound.name == "connection outbound",
        "{outbound:?}"
    );
    ensure!(outbound.trace == request.trace && outbound.parent.is_empty(), "{outbound:?}");
    ensure!(outbound.is("ambit.waypoint", "true"), "{outbound:?}");
    ensure!(request.links.is_empty(), "one trace needs no link: {request:?}");
    Ok(())
}

fn clients_context(lab: &Lab) -> Result<()> {
    let collector = collector(lab)?;
    let w3c = vec![format!("traceparent:00-{TRACE}-{SPAN}-01")];
    let single = vec![format!("b3:{TRACE}-{SPAN}-1")];
    let several = vec![
        format!("x-b3-traceid:{TRACE}"),
        format!("x-b3-spanid:{SPAN}"),
        "x-b3-sampled:1".to_owned(),
    ];
    let rows = [
        ("client-w3c", "/w3c", w3c, "Traceparent:00-"),
        ("client-b3", "/b3-single", single, "B3:"),
        ("client-b3s", "/b3-several", several, "X-B3-Traceid:"),
    ];
    let mut seen = Vec::new();
    for (client, path, headers, _) in &rows {
        seen.push(ask(lab, client, path, headers)?);
    }
    end_connections(lab)?;
    for ((_, path, _, header), seen) in rows.iter().zip(seen) {
        let (request, _) = behind(&collector, path)?;
        ensure!(request.trace == TRACE && request.parent == SPAN, "{path}: {request:?}");
        // The client's proxy does not look into requests: its span is another trace's, and linked.
        ensure!(request.links.len() == 1, "{path}: {request:?}");
        let outbound = find(&collector, "the linked span", |s| request.links.contains(&s.span))?;
        ensure!(outbound.name == "connection outbound" && outbound.trace != TRACE, "{outbound:?}");
        // The application hears of the waypoint's span, in the client's words.
        let told = format!("{header}{TRACE}").to_lowercase();
        ensure!(seen.to_lowercase().contains(&told), "{path}: {told} in {seen}");
        ensure!(seen.contains(&request.span), "{path}: {} in {seen}", request.span);
    }
    Ok(())
}

fn metrics(lab: &Lab) -> Result<()> {
    ask(lab, CLIENTS[0], "/counted", &[])?;
    let grpc = ["echo-client", "grpc://web:7070", "--count", "2"];
    lab.exec("shop/client", &grpc)?.ok()?;
    let list: BTreeSet<&str> = LABELS.split_whitespace().collect();
    let http: BTreeSet<&str> = list.clone();
    let mut with_grpc = list.clone();
    with_grpc.insert("grpc_response_status");
    // Where requests are gRPC there is a status more; message counts are of nothing else.
    for (metric, protocol, labels) in [
        ("istio_requests_total", "http", &http),
        ("istio_request_duration_milliseconds_count", "http", &http),
        ("istio_request_bytes_count", "http", &http),
        ("istio_response_bytes_count", "http", &http),
        ("istio_requests_total", "grpc", &with_grpc),
        ("istio_request_duration_milliseconds_count", "grpc", &with_grpc),
        ("istio_request_messages_total", "grpc", &with_grpc),
        ("istio_response_messages_total", "grpc", &with_grpc),
    ] {
        let wanted = format!("request_protocol=\"{protocol}\"");
        let line = wait_for(metric, SOON, || {
            let page = page(lab)?;
            let mut of =
                page.lines().filter(|l| l.strip_prefix(metric).is_some_and(|r| r.starts_with('{')));
            // Other tests have other clients.
            let own = |l: &&str| l.contains(&wanted) && l.contains("source_workload=\"client\"");
            Ok(of.find(own).map(str::to_owned))
        })?;
        let got = names(&line);
        let got: BTreeSet<&str> = got.iter().map(String::as_str).collect();
        let missing: Vec<_> = labels.difference(&got).collect();
        let more: Vec<_> = got.difference(labels).collect();
        ensure!(
            missing.is_empty() && more.is_empty(),
            "{metric}: {missing:?} missing, {more:?} more: {line}"
        );
        for label in [
            "reporter=\"waypoint\"",
            "source_principal=\"spiffe://cluster.local/ns/shop/sa/client\"",
            "destination_principal=\"spiffe://cluster.local/ns/shop/sa/web\"",
            "source_workload=\"client\"",
            "destination_workload=\"web\"",
            "destination_service=\"web.shop.svc.cluster.local\"",
            "destination_service_name=\"web\"",
            "destination_service_namespace=\"shop\"",
            "connection_security_policy=\"mutual_tls\"",
            "response_code=\"200\"",
        ] {
            ensure!(line.contains(label), "{metric}: {label} in {line}");
        }
    }
    Ok(())
}

/// The waypoint's metrics, as a scraper on its node reads them.
fn page(lab: &Lab) -> Result<String> {
    let pod = lab.status()?.pods.into_iter().find(|p| p.name.starts_with("waypoint-"));
    let pod = pod.context("no pod of the waypoint")?;
    let ip = pod.ip(false).context("the waypoint has no address")?.to_owned();
    let url = format!("http://{ip}:15020/metrics");
    let ran = lab.exec(&pod.node, &["curl", "-sS", "--fail", "--max-time", "5", &url])?;
    Ok(ran.ok()?.to_owned())
}

/// The names of a sample's labels.
fn names(line: &str) -> Vec<String> {
    let inner =
        line.split_once('{').and_then(|(_, rest)| rest.rsplit_once('}')).map_or("", |i| i.0);
    let parts = inner.split("\",");
    parts.filter_map(|part| part.split_once('=')).map(|(name, _)| name.to_owned()).collect()
}
