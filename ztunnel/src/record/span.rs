//! A connection as a span: the words of OpenTelemetry's semantic conventions where it has them, then Istio's.
//!
//! The same facts as in the access log. Both nodes' spans are in one trace, since the source's proxy sends `traceparent`
//! with its CONNECT.

use std::net::SocketAddr;
use std::time::SystemTime;

use agent::access_log::Direction;
use agent::trace::{Position, Span, SpanKind, Value};
use model::Workload;

use super::Record;

/// The span of a connection that is over.
pub(super) fn of(record: &Record, position: &Position) -> Span {
    let end = SystemTime::now();
    let outbound = record.direction == Direction::Outbound;
    Span {
        name: if outbound { "connection outbound" } else { "connection inbound" },
        kind: if outbound { SpanKind::Client } else { SpanKind::Server },
        context: position.context,
        parent: position.parent,
        link: None,
        start: end.checked_sub(record.started.elapsed()).unwrap_or(end),
        end,
        attributes: attributes(record, outbound),
        error: record.refusal.as_ref().map(|refusal| refusal.message.clone()),
    }
}

fn attributes(record: &Record, outbound: bool) -> Vec<(&'static str, Value)> {
    let mut all = Attributes(Vec::with_capacity(32));
    all.text("network.transport", "tcp");
    let family = if record.source_address.is_ipv4() { "ipv4" } else { "ipv6" };
    all.text("network.type", family);
    all.address(["source.address", "source.port"], record.source_address);
    all.address(["destination.address", "destination.port"], record.destination);
    if outbound {
        let peer = record.hbone_address.unwrap_or(record.target);
        all.address(["network.peer.address", "network.peer.port"], peer);
        if record.hbone_address.is_some() {
            all.text("ambit.hbone.target", &record.target.to_string());
        }
    }
    all.text("istio.reporter", if outbound { "source" } else { "destination" });
    let mutual_tls = record.peer.is_some() && !record.same_node;
    let security = if mutual_tls { "mutual_tls" } else { "unknown" };
    all.text("istio.connection_security_policy", security);
    if record.same_node {
        all.0.push(("ambit.same_node", Value::Truth(true)));
    }
    all.workload(record.source.as_deref(), &SOURCE);
    all.workload(record.destination_workload.as_deref(), &DESTINATION);
    if let Some(peer) = &record.peer {
        let (own, peer) = (record.pod.identity.to_string(), peer.to_string());
        let (source, destination) = if outbound { (own, peer) } else { (peer, own) };
        all.text("istio.source_principal", &source);
        all.text("istio.destination_principal", &destination);
    }
    if let Some(client) = &record.client {
        all.text("ambit.client_principal", &client.to_string());
    }
    if record.waypoint {
        all.0.push(("ambit.waypoint", Value::Truth(true)));
    }
    if let Some(service) = &record.service {
        all.text("istio.destination_service", &service.key.hostname);
        all.text("istio.destination_service_namespace", &service.key.namespace);
    }
    let (from_client, from_server) = record.totals();
    all.number("ambit.client.bytes", from_client);
    all.number("ambit.server.bytes", from_server);
    all.decision(record);
    all.0
}

/// The names of one side's attributes.
struct Side {
    workload: &'static str,
    namespace: &'static str,
    service: &'static str,
    revision: &'static str,
    cluster: &'static str,
}

const SOURCE: Side = Side {
    workload: "istio.source_workload",
    namespace: "istio.source_workload_namespace",
    service: "istio.source_canonical_service",
    revision: "istio.source_canonical_revision",
    cluster: "istio.source_cluster",
};
const DESTINATION: Side = Side {
    workload: "istio.destination_workload",
    namespace: "istio.destination_workload_namespace",
    service: "istio.destination_canonical_service",
    revision: "istio.destination_canonical_revision",
    cluster: "istio.destination_cluster",
};

struct Attributes(Vec<(&'static str, Value)>);

impl Attributes {
    fn text(&mut self, name: &'static str, value: &str) {
        if !value.is_empty() {
            self.0.push((name, Value::Text(value.to_owned())));
        }
    }

    fn number(&mut self, name: &'static str, value: u64) {
        self.0.push((name, Value::Number(i64::try_from(value).unwrap_or(i64::MAX))));
    }

    fn address(&mut self, [ip, port]: [&'static str; 2], address: SocketAddr) {
        self.text(ip, &address.ip().to_string());
        self.number(port, address.port().into());
    }

    fn workload(&mut self, workload: Option<&Workload>, names: &Side) {
        let Some(workload) = workload else { return };
        self.text(names.workload, &workload.workload_name);
        self.text(names.namespace, &workload.namespace);
        self.text(names.service, &workload.canonical_name);
        self.text(names.revision, &workload.canonical_revision);
        self.text(names.cluster, &workload.cluster);
    }

    /// Which policy said yes or no, and why a connection failed.
    fn decision(&mut self, record: &Record) {
        let (policy, rule) = record.decided_by();
        if let Some(policy) = policy {
            self.text("ambit.policy", &policy.to_string());
        }
        if let Some(rule) = rule {
            self.text("ambit.rule", &rule.to_string());
        }
        if let Some(refusal) = &record.refusal {
            self.text("error.type", refusal.reason.code());
        }
        self.text("ambit.config", &record.version.to_string());
    }
}
