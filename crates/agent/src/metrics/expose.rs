//! The page: every metric with its name, help and labels.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use model::Reason;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeCounterValue, EncodeGaugeValue, EncodeLabelSet, EncodeMetric,
    LabelSetEncoder, text,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use super::dns::Row;
use super::http::{self, Shown};
use super::labels::{Flagged, Labels, Reporter, label};
use super::process::Process;
use super::traffic::{FLAGS, Values};
use super::{Metrics, Termination, lock};

pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

pub(super) fn render(metrics: &Metrics, now: Instant) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Page { metrics: metrics.clone(), now }));
    let mut page = String::new();
    // Writing to a String fails only if one of our own encoders does.
    if text::encode(&mut page, &registry).is_err() {
        tracing::error!("metrics could not be written; the page is not complete");
    }
    page
}

/// Name, help and values of the histograms of requests.
type HttpHistogram = (&'static str, &'static str, fn(&http::Values) -> &http::Counted);

const HTTP_HISTOGRAMS: [HttpHistogram; 3] = [
    ("istio_request_duration_milliseconds", "How long requests took", |v| &v.duration),
    ("istio_request_bytes", "Bytes of the bodies of requests", |v| &v.request_bytes),
    ("istio_response_bytes", "Bytes of the bodies of responses", |v| &v.response_bytes),
];

#[derive(Debug)]
struct Page {
    metrics: Metrics,
    now: Instant,
}

impl Collector for Page {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.traffic(&mut encoder)?;
        self.http(&mut encoder)?;
        self.refusals(&mut encoder)?;
        self.dns(&mut encoder)?;
        self.spans(&mut encoder)?;
        self.control_plane(&mut encoder)?;
        self.certificates(&mut encoder)?;
        self.proxies(&mut encoder)?;
        process(&mut encoder, Process::read())
    }
}

impl Page {
    fn traffic(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let rows = self.metrics.0.traffic.scrape(self.now);
        let mut simple = |name, help, get: fn(&Values) -> u64| {
            // Series that only ever failed have nothing to say here.
            let used = rows.iter().filter(|(_, values)| values.opened > 0);
            counters(encoder, name, help, used.map(|(labels, values)| (plain(labels), get(values))))
        };
        simple("istio_tcp_connections_opened", "Connections opened", |v| v.opened)?;
        simple("istio_tcp_connections_closed", "Connections closed", |v| v.closed)?;
        simple("istio_tcp_sent_bytes", "Bytes that servers sent to clients", |v| v.sent)?;
        simple("istio_tcp_received_bytes", "Bytes that servers received from clients", |v| {
            v.received
        })?;
        let failed = rows.iter().flat_map(|(labels, values)| {
            let flags = FLAGS.iter().zip(values.failed).filter(|(_, n)| *n > 0);
            flags.map(move |(flags, n)| (Flagged { labels, flags }, n))
        });
        counters(
            encoder,
            "istio_tcp_connections_failed",
            "Connections refused, not made or broken",
            failed,
        )?;
        let open = Reporter::of(self.metrics.0.component).iter().map(|&reporter| {
            let of = rows.iter().filter(|(labels, _)| labels.reporter == reporter);
            let open: u64 = of.map(|(_, v)| v.opened.saturating_sub(v.closed)).sum();
            (One("reporter", reporter.as_str()), open)
        });
        gauges(encoder, "istio_tcp_sockets_open", "Open connections", open)
    }

    fn http(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let rows = self.metrics.0.http.scrape(self.now);
        let requests = rows.iter().map(|(labels, values)| (Shown(labels), values.requests()));
        counters(encoder, "istio_requests", "Requests", requests)?;
        for (name, help, get) in HTTP_HISTOGRAMS {
            let mut filled = rows.iter().filter(|(_, values)| values.requests() > 0).peekable();
            if filled.peek().is_none() {
                return Ok(());
            }
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
            for (labels, values) in filled {
                let histogram = get(values);
                metric.encode_family(&Shown(labels))?.encode_histogram::<One<&str>>(
                    histogram.sum,
                    histogram.count(),
                    &histogram.buckets,
                    None,
                )?;
            }
        }
        let messages = |get: fn(&http::Values) -> u64| {
            let some = rows.iter().map(move |(labels, values)| (Shown(labels), get(values)));
            some.filter(|(_, n)| *n > 0)
        };
        let help = "gRPC messages of clients";
        counters(encoder, "istio_request_messages", help, messages(|v| v.request_messages))?;
        let help = "gRPC messages of servers";
        counters(encoder, "istio_response_messages", help, messages(|v| v.response_messages))?;
        let help = "Times a new combination of labels of a request had to be counted as unknown";
        let overflowed = self.metrics.0.http.overflowed();
        if Reporter::of(self.metrics.0.component).contains(&Reporter::Waypoint) {
            counter(encoder, "ambit_http_series_overflow", help, overflowed)?;
        }
        Ok(())
    }

    fn refusals(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let counts = &self.metrics.0.refusals.counts;
        let rows = Reporter::of(self.metrics.0.component).iter().flat_map(|&reporter| {
            let of = Reason::ALL.iter().zip(&counts[reporter as usize]);
            of.map(move |(reason, n)| {
                (Two("reason", reason.code(), "reporter", reporter.as_str()), get(n))
            })
        });
        let help = "Connections that this proxy refused or lost, by reason";
        counters(encoder, "ambit_refusals", help, rows)?;
        let help = "Times a new combination of labels had to be counted as unknown: too many";
        counter(
            encoder,
            "ambit_metrics_series_overflow",
            help,
            self.metrics.0.traffic.overflowed(),
        )?;
        let help = "Access-log lines dropped because standard output stalled";
        counter(encoder, "ambit_access_log_dropped", help, get(&self.metrics.0.access_log_dropped))
    }

    fn spans(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let spans = &self.metrics.0.spans;
        let help = "Spans that the trace collector took";
        counter(encoder, "ambit_spans_exported", help, spans.exported())?;
        let help = "Spans lost: the queue was full, or the collector did not take them";
        let rows = spans.dropped().into_iter().map(|(reason, n)| ([("reason", reason)], n));
        counters(encoder, "ambit_spans_dropped", help, rows)
    }

    fn dns(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let rows = self.metrics.0.dns.rows();
        let mut simple = |name, help, get: fn(&Row) -> u64| {
            counters(encoder, name, help, rows.iter().map(|row| (Asker(row), get(row))))
        };
        simple("istio_dns_requests", "DNS questions of pods", |r| r.requests)?;
        simple("istio_dns_upstream_requests", "Those that went to the pod's resolver", |r| {
            r.upstream
        })?;
        simple("istio_dns_upstream_failures", "Those that the resolver did not answer", |r| {
            r.failures
        })?;
        let mut forwarded = rows.iter().filter(|row| row.upstream > 0).peekable();
        if forwarded.peek().is_some() {
            let (name, help) =
                ("istio_dns_upstream_request_duration_seconds", "How long resolvers took");
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
            for row in forwarded {
                let count = row.buckets.iter().map(|(_, n)| n).sum();
                metric.encode_family(&Asker(row))?.encode_histogram::<One<&str>>(
                    row.seconds,
                    count,
                    &row.buckets,
                    None,
                )?;
            }
        }
        let results = self.metrics.0.dns.results().map(|(result, n)| (One("result", result), n));
        let help = "DNS questions by what became of them";
        counters(encoder, "ambit_dns_questions", help, results.into_iter())
    }

    fn control_plane(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let inner = &self.metrics.0;
        let build = Two("component", inner.component, "tag", &inner.tag);
        gauges(
            encoder,
            "istio_build",
            "The version of this program",
            [(build, 1_u64)].into_iter(),
        )?;
        let xds = &inner.xds;
        let connected = u64::from(xds.connected.load(Ordering::Relaxed));
        let help = "Whether the stream to the control plane is up";
        gauge(encoder, "ambit_xds_connected", help, connected)?;
        let ended = Termination::ALL
            .iter()
            .map(|t| (One("reason", t.as_str()), get(&xds.terminations[*t as usize])));
        let help = "Streams to the control plane that ended, by reason";
        counters(encoder, "istio_xds_connection_terminations", help, ended)?;
        let types = lock(&xds.types).clone();
        let mut by_type = |name, help, value: fn(&super::XdsType) -> u64| {
            counters(encoder, name, help, types.iter().map(|(url, t)| (One("url", url), value(t))))
        };
        by_type("istio_xds_message", "Responses from the control plane", |t| t.messages)?;
        by_type("istio_xds_message_bytes", "Bytes of responses from the control plane", |t| {
            t.bytes
        })?;
        by_type(
            "ambit_xds_nacks",
            "Resources from the control plane that were not accepted",
            |t| t.nacks,
        )?;
        let epoch = format!("{:x}", get(&xds.epoch));
        let version = [(One("epoch", &epoch), get(&xds.number))].into_iter();
        gauges(
            encoder,
            "ambit_config_version",
            "The push of the control plane that is in force",
            version,
        )?;
        let help = "When configuration was last put into force; 0: never";
        gauge(encoder, "ambit_config_applied_timestamp_seconds", help, get(&xds.applied_at))
    }

    fn certificates(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let held = lock(&self.metrics.0.certificates).clone();
        let rows = held.iter().map(|(identity, not_after)| (One("identity", identity), *not_after));
        let help = "When the certificate of an identity ends";
        gauges(encoder, "ambit_certificate_expiration_timestamp_seconds", help, rows)
    }

    fn proxies(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let p = &self.metrics.0.proxies;
        gauge(encoder, "workload_manager_active_proxy_count", "Pods with a proxy", get(&p.active))?;
        gauge(
            encoder,
            "workload_manager_pending_proxy_count",
            "Pods that wait for one",
            get(&p.pending),
        )?;
        counter(encoder, "workload_manager_proxies_started", "Proxies started", get(&p.started))?;
        counter(encoder, "workload_manager_proxies_stopped", "Proxies stopped", get(&p.stopped))
    }
}

fn process(encoder: &mut DescriptorEncoder<'_>, process: Process) -> fmt::Result {
    for (name, help, value) in [
        ("process_open_fds", "Open file descriptors", process.open_fds),
        ("process_max_fds", "Most file descriptors that may be open", process.max_fds),
        ("process_resident_memory_bytes", "Resident memory", process.resident_bytes),
    ] {
        if let Some(value) = value {
            gauge(encoder, name, help, value)?;
        }
    }
    match process.cpu_seconds {
        Some(seconds) => counter(encoder, "process_cpu_seconds", "CPU time used", seconds),
        None => Ok(()),
    }
}

/// Labels of a connection that did not fail.
fn plain(labels: &Labels) -> Flagged<'_> {
    Flagged { labels, flags: FLAGS[0] }
}

fn get(n: &AtomicU64) -> u64 {
    n.load(Ordering::Relaxed)
}

/// One label.
struct One<V>(&'static str, V);

impl<V: fmt::Display> EncodeLabelSet for One<V> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        label(encoder, self.0, &self.1)
    }
}

/// Two labels.
struct Two<'a>(&'static str, &'a str, &'static str, &'a str);

impl EncodeLabelSet for Two<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        label(encoder, self.0, self.1)?;
        label(encoder, self.2, self.3)
    }
}

/// Who asked what, with Istio's labels.
struct Asker<'a>(&'a Row);

impl EncodeLabelSet for Asker<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        label(encoder, "request_query_type", self.0.kind)?;
        label(encoder, "request_protocol", self.0.protocol)?;
        label(encoder, "source_canonical_service", &self.0.service)?;
        label(encoder, "source_canonical_revision", &self.0.revision)
    }
}

/// A counter per row; its name gets `_total`. Without rows it is left out.
fn counters<L: EncodeLabelSet, V: EncodeCounterValue>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    rows: impl Iterator<Item = (L, V)>,
) -> fmt::Result {
    let mut rows = rows.peekable();
    if rows.peek().is_none() {
        return Ok(());
    }
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (labels, value) in rows {
        ConstCounter::new(value).encode(metric.encode_family(&labels)?)?;
    }
    Ok(())
}

fn counter<V: EncodeCounterValue>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    value: V,
) -> fmt::Result {
    let metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    ConstCounter::new(value).encode(metric)
}

/// As [`counters`], for values that go up and down.
fn gauges<L: EncodeLabelSet, V: EncodeGaugeValue>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    rows: impl Iterator<Item = (L, V)>,
) -> fmt::Result {
    let mut rows = rows.peekable();
    if rows.peek().is_none() {
        return Ok(());
    }
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (labels, value) in rows {
        ConstGauge::new(value).encode(metric.encode_family(&labels)?)?;
    }
    Ok(())
}

fn gauge<V: EncodeGaugeValue>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    value: V,
) -> fmt::Result {
    let metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    ConstGauge::new(value).encode(metric)
}
