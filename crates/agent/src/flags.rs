//! Flags that the proxies share, and what their words mean.
//!
//! Invariant: a word that is not understood is an error that names the flag.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use clap::Args;

use crate::access_log::{AccessLog, Format};
use crate::trace::{TraceSettings, TraceText};

/// `--log-format`.
pub fn log_format(word: &str) -> Result<Format, String> {
    match word {
        "text" => Ok(Format::Text),
        "json" => Ok(Format::Json),
        other => Err(format!("--log-format is text or json, not {other:?}")),
    }
}

/// `--access-log`: the log on standard output that it asks for. `dropped` counts lines that found no room.
pub fn access_log(word: &str, dropped: Arc<AtomicU64>) -> Result<AccessLog, String> {
    let format = match word {
        "off" => return Ok(AccessLog::off()),
        "text" => Format::Text,
        "json" => Format::Json,
        other => return Err(format!("--access-log is text, json or off, not {other:?}")),
    };
    let started = AccessLog::start(format, std::io::stdout(), dropped);
    started.map_err(|e| format!("starting the access log: {e}"))
}

/// Spans, by OTLP over gRPC. Off without an endpoint. The variables are OpenTelemetry's own.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Tracing")]
pub struct Traces {
    /// Collector: `http://HOST:4317`, or https with the certificate's root beside it.
    #[arg(long = "otlp-endpoint", env = "OTEL_EXPORTER_OTLP_ENDPOINT", default_value = "")]
    pub endpoint: String,
    /// Only `grpc`.
    #[arg(
        long = "otlp-protocol",
        env = "OTEL_EXPORTER_OTLP_PROTOCOL",
        default_value = "",
        hide = true
    )]
    pub protocol: String,
    /// `key=value,key=value`, sent with each call.
    #[arg(
        long = "otlp-headers",
        env = "OTEL_EXPORTER_OTLP_HEADERS",
        default_value = "",
        hide_env_values = true
    )]
    pub headers: String,
    /// PEM file with the root of the collector's certificate.
    #[arg(long = "otlp-certificate", env = "OTEL_EXPORTER_OTLP_CERTIFICATE", default_value = "")]
    pub certificate: String,
    /// `service.name` of the spans; by default the program's name.
    #[arg(long = "otlp-service-name", env = "OTEL_SERVICE_NAME", default_value = "")]
    pub service_name: String,
    /// `key=value,key=value`: more about this proxy.
    #[arg(long = "otlp-resource", env = "OTEL_RESOURCE_ATTRIBUTES", default_value = "")]
    pub resource: String,
    /// always_on, always_off or traceidratio, perhaps behind parentbased_.
    #[arg(
        long = "trace-sampler",
        env = "OTEL_TRACES_SAMPLER",
        default_value = "parentbased_always_on"
    )]
    pub sampler: String,
    /// The part of all traces, for traceidratio: 0 to 1.
    #[arg(long = "trace-sampler-arg", env = "OTEL_TRACES_SAMPLER_ARG", default_value = "")]
    pub sampler_arg: String,
}

impl Traces {
    /// Where the spans of `program` go and what they say of it, beside what the user says; `None` while tracing is off.
    pub fn settings(
        &self,
        program: &str,
        own: &[(&str, &str)],
    ) -> Result<Option<TraceSettings>, String> {
        let Some(mut settings) = self.text(program).settings()? else { return Ok(None) };
        for (key, value) in own {
            if !settings.resource.iter().any(|(known, _)| known == key) {
                settings.resource.push(((*key).to_owned(), (*value).to_owned()));
            }
        }
        Ok(Some(settings))
    }

    fn text(&self, program: &str) -> TraceText {
        let service_name = if self.service_name.is_empty() { program } else { &self.service_name };
        TraceText {
            endpoint: self.endpoint.clone(),
            protocol: self.protocol.clone(),
            headers: self.headers.clone(),
            certificate: self.certificate.clone(),
            service_name: service_name.to_owned(),
            resource: self.resource.clone(),
            sampler: self.sampler.clone(),
            sampler_arg: self.sampler_arg.clone(),
        }
    }
}
