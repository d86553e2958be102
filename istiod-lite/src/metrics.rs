//! What the control plane counts, in Prometheus' text format.

use std::sync::atomic::AtomicU64;
use std::time::SystemTime;

use compile::{Diagnostic, Severity};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// 1 ms (a handful of files) to 10 s (more than we promise to handle).
const SECONDS: [f64; 11] = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 3.0, 5.0, 10.0];

/// One label whose name says little, since the metric's name says it.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Kind {
    kind: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct SeverityLabel {
    severity: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Certificate {
    certificate: &'static str,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    responses: Family<Kind, Counter>,
    nacks: Family<Kind, Counter>,
    proxies: Gauge,
    streams_ended: Family<Reason, Counter>,
    pushes: Counter,
    convergence: Histogram,
    issued: Family<Kind, Counter>,
    refused: Family<Reason, Counter>,
    handshakes_failed: Family<Reason, Counter>,
    compile: Histogram,
    objects: Family<Kind, Gauge>,
    diagnostics: Family<SeverityLabel, Gauge>,
    expiry: Family<Certificate, Gauge<f64, AtomicU64>>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut metrics = Self {
            registry: Registry::with_prefix("istiod_lite"),
            responses: Family::default(),
            nacks: Family::default(),
            proxies: Gauge::default(),
            streams_ended: Family::default(),
            pushes: Counter::default(),
            convergence: Histogram::new(SECONDS),
            issued: Family::default(),
            refused: Family::default(),
            handshakes_failed: Family::default(),
            compile: Histogram::new(SECONDS),
            objects: Family::default(),
            diagnostics: Family::default(),
            expiry: Family::default(),
        };
        metrics.register();
        metrics
    }
}

impl Metrics {
    fn register(&mut self) {
        let r = &mut self.registry;
        r.register("responses", "xDS responses sent, by type", self.responses.clone());
        r.register("nacks", "xDS responses that a proxy refused, by type", self.nacks.clone());
        r.register("connected_proxies", "Open xDS streams", self.proxies.clone());
        r.register("streams_ended", "xDS streams ended, by reason", self.streams_ended.clone());
        r.register("pushes", "New states of the mesh", self.pushes.clone());
        r.register(
            "convergence_seconds",
            "From a new state to a proxy's word that it is in force",
            self.convergence.clone(),
        );
        r.register("certificates_issued", "Certificates issued, by subject", self.issued.clone());
        r.register(
            "refusals",
            "Certificate requests and streams refused, by reason",
            self.refused.clone(),
        );
        r.register(
            "connections_failed",
            "Connections that failed before the first call, by reason",
            self.handshakes_failed.clone(),
        );
        r.register("compile_seconds", "Time to compile the objects", self.compile.clone());
        r.register("resources", "What the mesh consists of, by kind", self.objects.clone());
        r.register("diagnostics", "What is wrong, by severity", self.diagnostics.clone());
        r.register(
            "certificate_expiry_timestamp_seconds",
            "When the CA's and the server's certificates expire",
            self.expiry.clone(),
        );
    }

    pub(crate) fn response_sent(&self, kind: impl ToString) {
        self.responses.get_or_create(&Kind { kind: kind.to_string() }).inc();
    }

    pub(crate) fn nacked(&self, kind: impl ToString) {
        self.nacks.get_or_create(&Kind { kind: kind.to_string() }).inc();
    }

    pub(crate) fn stream_opened(&self) {
        self.proxies.inc();
    }

    pub(crate) fn stream_ended(&self, reason: &'static str) {
        self.proxies.dec();
        self.streams_ended.get_or_create(&Reason { reason }).inc();
    }

    pub(crate) fn converged(&self, seconds: f64) {
        self.convergence.observe(seconds);
    }

    pub(crate) fn issued(&self, kind: &'static str) {
        self.issued.get_or_create(&Kind { kind: kind.into() }).inc();
    }

    pub(crate) fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&Reason { reason }).inc();
    }

    pub(crate) fn connection_failed(&self, reason: &'static str) {
        self.handshakes_failed.get_or_create(&Reason { reason }).inc();
    }

    pub(crate) fn compiled(&self, seconds: f64) {
        self.compile.observe(seconds);
    }

    /// Workloads, services, policies, routes and subsets; and what is wrong with them.
    pub(crate) fn counted(&self, counts: &[usize; 5], found: &[Diagnostic]) {
        let kinds = ["workloads", "services", "policies", "routes", "subsets"];
        for (kind, count) in kinds.into_iter().zip(counts) {
            let gauge = self.objects.get_or_create_owned(&Kind { kind: kind.into() });
            gauge.set(i64::try_from(*count).unwrap_or(i64::MAX));
        }
        for severity in [Severity::Error, Severity::Warning, Severity::Info] {
            let count = found.iter().filter(|d| d.severity == severity).count();
            let label = SeverityLabel { severity: severity.to_string() };
            let gauge = self.diagnostics.get_or_create_owned(&label);
            gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    pub(crate) fn pushed(&self) {
        self.pushes.inc();
    }

    pub(crate) fn expires(&self, certificate: &'static str, at: SystemTime) {
        let seconds = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        self.expiry.get_or_create_owned(&Certificate { certificate }).set(seconds);
    }

    /// The page for Prometheus.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page() {
        let metrics = Metrics::default();
        metrics.refused("no_pod_on_node");
        metrics.stream_opened();
        metrics.expires("root", SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(5));
        let page = metrics.text();
        for line in [
            "istiod_lite_refusals_total{reason=\"no_pod_on_node\"} 1",
            "istiod_lite_connected_proxies 1",
            "istiod_lite_certificate_expiry_timestamp_seconds{certificate=\"root\"} 5",
            "# EOF",
        ] {
            assert!(page.contains(line), "{page}");
        }
    }
}
