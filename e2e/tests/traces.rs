//! Spans of connections, as a collector sees them that is made of the official protobufs.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::collector::{Collector, Received};
use e2e::stock::two::{Two, VIP, identity};
use e2e::stock::world::{self, HERE};
use e2e::stock::{Resource, World, inside};
use e2e::suite::{self, Alone};
use e2e::{wait_for, wait_until};

const SOON: Duration = Duration::from_secs(20);
const ENDPOINT: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://10.9.0.1:4317");
const TESTS: &[(&str, Alone)] = &[
    ("both_nodes_spans_are_one_trace", both_nodes_spans_are_one_trace),
    ("a_refusal_says_why", a_refusal_says_why),
    ("off_unless_asked_for", off_unless_asked_for),
    ("without_a_collector_traffic_goes_on", without_a_collector_traffic_goes_on),
    ("what_is_not_understood_is_named", what_is_not_understood_is_named),
];
/// OTLP's numbers.
const SERVER: i32 = 2;
const CLIENT: i32 = 3;
const ERROR: i32 = 2;

fn main() -> ExitCode {
    match inside::enter() {
        Ok(()) => suite::run_alone(TESTS),
        Err(code) => code,
    }
}

fn collector() -> Result<Collector> {
    Collector::start((HERE, 4317).into())
}

/// The pair of spans of a connection that both nodes saw.
fn pair(collector: &Collector, after: usize) -> Result<(Received, Received)> {
    wait_for("the spans of both nodes", SOON, || {
        let spans = collector.spans();
        let new = spans.get(after..).unwrap_or_default();
        let outbound = new.iter().find(|s| s.span.kind == CLIENT);
        let Some(outbound) = outbound else { return Ok(None) };
        let inbound = new.iter().find(|s| s.span.parent_span_id == outbound.span.span_id);
        Ok(inbound.map(|inbound| (outbound.clone(), inbound.clone())))
    })
}

fn has(span: &Received, attributes: &[(&str, &str)]) -> Result<()> {
    for (name, value) in attributes {
        ensure!(span.get(name) == *value, "{name} should be {value:?}: {span:#?}");
    }
    Ok(())
}

fn both_nodes_spans_are_one_trace() -> Result<()> {
    let t = Two::start_with(&[ENDPOINT, ("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=blue")])?;
    let collector = collector()?;
    t.call(&VIP.to_string(), t.client.v4)?;
    let (out, r#in) = pair(&collector, 0)?;
    ensure!(out.span.trace_id == r#in.span.trace_id && out.span.trace_id.len() == 16);
    ensure!(out.span.parent_span_id.is_empty(), "{out:#?}");
    ensure!(r#in.span.kind == SERVER && out.span.name != r#in.span.name, "{in:#?}", in = r#in);
    for span in [&out, &r#in] {
        ensure!(span.span.start_time_unix_nano < span.span.end_time_unix_nano, "{span:#?}");
        ensure!(span.span.status.as_ref().is_none_or(|s| s.code == 0), "{span:#?}");
        ensure!(span.of("service.name") == "ztunnel" && span.scope == "ambit", "{span:#?}");
        ensure!(span.get("ambit.client.bytes").parse::<u64>()? > 50, "{span:#?}");
        ensure!(span.get("ambit.server.bytes").parse::<u64>()? > 50, "{span:#?}");
        let (from, to) = (identity("client"), identity("server"));
        has(
            span,
            &[
                ("network.transport", "tcp"),
                ("network.type", "ipv4"),
                ("istio.connection_security_policy", "mutual_tls"),
                ("istio.source_principal", &from),
                ("istio.destination_principal", &to),
                ("istio.source_workload", "client"),
                ("istio.destination_workload", "server"),
                ("istio.source_workload_namespace", "app"),
                ("istio.destination_service", &world::hostname("server")),
                ("error.type", ""),
            ],
        )?;
    }
    let vip = VIP.to_string();
    let gate = t.server.v4.to_string();
    has(
        &out,
        &[("destination.address", &vip), ("destination.port", "80"), ("istio.reporter", "source")],
    )?;
    has(&out, &[("network.peer.address", &gate), ("network.peer.port", "15008")])?;
    has(&r#in, &[("destination.address", &gate), ("destination.port", "8080")])?;
    has(&r#in, &[("source.address", &t.client.v4.to_string()), ("istio.reporter", "destination")])?;
    ensure!(
        (out.of("k8s.node.name"), r#in.of("k8s.node.name")) == ("node-1".into(), "node-2".into())
    );
    ensure!(collector.tenants().iter().all(|tenant| tenant == "blue"), "{:?}", collector.tenants());
    wait_until("the span to be counted", SOON, || {
        Ok(t.one.metrics()?.contains("ambit_spans_exported_total 1"))
    })?;
    // The next connection is another trace, through the same tunnel.
    let before = collector.spans().len();
    t.call(&VIP.to_string(), t.client.v4)?;
    let (next, _) = pair(&collector, before)?;
    ensure!(next.span.trace_id != out.span.trace_id);
    Ok(())
}

fn a_refusal_says_why() -> Result<()> {
    let t = Two::start_with(&[ENDPOINT])?;
    let collector = collector()?;
    t.world.istiod.set(Resource::policy(&world::allow("nobody-gets-in", "nobody")));
    let mut workload = t.server.workload(&t.two.name, true);
    workload.authorization_policies = vec!["app/nobody-gets-in".to_owned()];
    t.world.istiod.set(Resource::workload(workload));
    let url = format!("http://{}:8080/who", t.server.v4);
    wait_until("the client to be refused", SOON, || Ok(!t.client.curl(&url)?.is_ok()))?;
    let refused = wait_for("the span of a refusal", SOON, || {
        let spans = collector.spans();
        Ok(spans.into_iter().find(|s| s.get("error.type") == "policy_no_allow"))
    })?;
    let status = refused.span.status.clone().unwrap_or_default();
    ensure!(status.code == ERROR && !status.message.is_empty(), "{refused:#?}");
    has(
        &refused,
        &[("istio.reporter", "destination"), ("istio.source_principal", &identity("client"))],
    )?;
    // The client's side of it is in the same trace.
    wait_until("the other side of it", SOON, || {
        let same = |s: &&Received| s.span.trace_id == refused.span.trace_id;
        let spans = collector.spans();
        Ok(spans.iter().filter(same).any(|s| s.get("error.type") == "tunnel_refused"))
    })?;
    Ok(())
}

fn off_unless_asked_for() -> Result<()> {
    let t = Two::start()?;
    let collector = collector()?;
    t.call(&VIP.to_string(), t.client.v4)?;
    t.two.wait_for_access(&[("direction", "inbound")])?;
    ensure!(collector.tenants().is_empty(), "{collector:?}");
    ensure!(t.one.metrics()?.contains("ambit_spans_exported_total 0"));
    Ok(())
}

fn without_a_collector_traffic_goes_on() -> Result<()> {
    let t = Two::start_with(&[ENDPOINT])?;
    for _ in 0..5 {
        t.call(&VIP.to_string(), t.client.v4)?;
    }
    t.one.says(&["trace collector", "10.9.0.1:4317", "does not take spans"])?;
    wait_until("the loss to be counted", Duration::from_secs(60), || {
        let metrics = t.one.metrics()?;
        Ok(metrics.lines().any(|l| {
            l.strip_prefix("ambit_spans_dropped_total{reason=\"export\"} ")
                .is_some_and(|n| n != "0")
        }))
    })?;
    let collector = collector()?;
    let began = collector.spans().len();
    t.call(&VIP.to_string(), t.client.v4)?;
    pair(&collector, began)?;
    t.one.says(&["trace collector takes spans again"])?;
    Ok(())
}

fn what_is_not_understood_is_named() -> Result<()> {
    let mut world = World::new()?;
    let node = world.node("node-1")?;
    let ran = node.run_with(&[ENDPOINT, ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")])?;
    ran.failed_with(&["OTEL_EXPORTER_OTLP_PROTOCOL", "only grpc is supported"])?;
    let ran = node.run_with(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "collector")])?;
    ran.failed_with(&["OTEL_EXPORTER_OTLP_ENDPOINT", "http://HOST:PORT"])
}
