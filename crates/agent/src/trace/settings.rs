//! How tracing is set up, from the words of OpenTelemetry's environment variables.
//!
//! Invariant: a word that is not understood is an error that names its variable; silence is no setting.

use std::path::PathBuf;

use tonic::metadata::{AsciiMetadataKey, AsciiMetadataValue};

/// The texts as they were given; empty ones count as absent.
#[derive(Clone, Debug, Default)]
pub struct TraceText {
    /// `OTEL_EXPORTER_OTLP_ENDPOINT`
    pub endpoint: String,
    /// `OTEL_EXPORTER_OTLP_PROTOCOL`
    pub protocol: String,
    /// `OTEL_EXPORTER_OTLP_HEADERS`
    pub headers: String,
    /// `OTEL_EXPORTER_OTLP_CERTIFICATE`
    pub certificate: String,
    /// `OTEL_SERVICE_NAME`
    pub service_name: String,
    /// `OTEL_RESOURCE_ATTRIBUTES`
    pub resource: String,
    /// `OTEL_TRACES_SAMPLER`
    pub sampler: String,
    /// `OTEL_TRACES_SAMPLER_ARG`
    pub sampler_arg: String,
}

/// Tracing that is on.
#[derive(Clone, Debug)]
pub struct TraceSettings {
    /// `http://HOST:PORT` or `https://HOST:PORT`.
    pub endpoint: String,
    /// Who signs the collector's certificate; for https.
    pub certificate: Option<PathBuf>,
    pub headers: Vec<(AsciiMetadataKey, AsciiMetadataValue)>,
    /// What every span is of: `service.name` and more.
    pub resource: Vec<(String, String)>,
    pub sampler: Sampler,
}

/// Which traces are recorded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampler {
    /// Of traces that begin here, by their identifier.
    ratio: f64,
    /// Whether a trace that began elsewhere follows what was decided there.
    follow: bool,
}

impl TraceText {
    /// `None`: off, since there is no endpoint.
    pub fn settings(&self) -> Result<Option<TraceSettings>, String> {
        if self.endpoint.is_empty() {
            return Ok(None);
        }
        let bad = |name: &str, value: &str, want: &str| Err(format!("{name}={value:?}: {want}"));
        let endpoint = self.endpoint.trim_end_matches('/').to_owned();
        let rest = endpoint.strip_prefix("http://").or_else(|| endpoint.strip_prefix("https://"));
        let port = rest.and_then(|rest| rest.rsplit_once(':')).map(|(_, port)| port.parse::<u16>());
        if !matches!(port, Some(Ok(_))) {
            let want =
                "http://HOST:PORT or https://HOST:PORT is expected (gRPC, usually port 4317)";
            return bad("OTEL_EXPORTER_OTLP_ENDPOINT", &self.endpoint, want);
        }
        if !matches!(self.protocol.as_str(), "" | "grpc") {
            return bad("OTEL_EXPORTER_OTLP_PROTOCOL", &self.protocol, "only grpc is supported");
        }
        let certificate = Some(&self.certificate).filter(|c| !c.is_empty()).map(PathBuf::from);
        if endpoint.starts_with("https:") && certificate.is_none() {
            let want = "for an https endpoint it must name the PEM file of the collector's root";
            return bad("OTEL_EXPORTER_OTLP_CERTIFICATE", "", want);
        }
        let mut resource = pairs("OTEL_RESOURCE_ATTRIBUTES", &self.resource)?;
        if !self.service_name.is_empty() {
            resource.retain(|(key, _)| key != "service.name");
            resource.push(("service.name".to_owned(), self.service_name.clone()));
        }
        Ok(Some(TraceSettings {
            endpoint,
            certificate,
            headers: headers(&self.headers)?,
            resource,
            sampler: self.sampler()?,
        }))
    }

    fn sampler(&self) -> Result<Sampler, String> {
        let ratio = || match self.sampler_arg.as_str() {
            "" => Ok(1.0),
            text => match text.parse::<f64>() {
                Ok(ratio) if (0.0..=1.0).contains(&ratio) => Ok(ratio),
                _ => Err(format!(
                    "OTEL_TRACES_SAMPLER_ARG={text:?}: a number from 0 to 1 is expected"
                )),
            },
        };
        let (ratio, follow) = match self.sampler.as_str() {
            "" | "parentbased_always_on" => (1.0, true),
            "parentbased_always_off" => (0.0, true),
            "parentbased_traceidratio" => (ratio()?, true),
            "always_on" => (1.0, false),
            "always_off" => (0.0, false),
            "traceidratio" => (ratio()?, false),
            other => {
                return Err(format!(
                    "OTEL_TRACES_SAMPLER={other:?}: always_on, always_off or traceidratio is expected, perhaps \
                     behind parentbased_"
                ));
            }
        };
        Ok(Sampler { ratio, follow })
    }
}

impl Sampler {
    /// Decides for a trace; `parent` is what was decided before.
    pub(super) fn decide(&self, parent: Option<bool>, trace_id: &[u8; 16]) -> bool {
        if let Some(sampled) = parent.filter(|_| self.follow) {
            return sampled;
        }
        // By the last 56 bits, which are random in every trace: all who see this trace with this ratio decide alike. Of
        // those the 53 that a float holds exactly.
        let [.., a, b, c, d, e, f, g] = *trace_id;
        let random = u64::from_be_bytes([0, a, b, c, d, e, f, g]) >> 3;
        #[expect(clippy::cast_precision_loss, reason = "53 bits fit")]
        let place = random as f64 / (1_u64 << 53) as f64;
        place < self.ratio
    }
}

fn headers(text: &str) -> Result<Vec<(AsciiMetadataKey, AsciiMetadataValue)>, String> {
    const NAME: &str = "OTEL_EXPORTER_OTLP_HEADERS";
    let header = |(key, value): (String, String)| {
        let name = AsciiMetadataKey::from_bytes(key.to_ascii_lowercase().as_bytes());
        // The value may be a credential: it is not repeated.
        let bad = || format!("{NAME}: {key:?} cannot be sent as a header");
        let mut value: AsciiMetadataValue = value.parse().map_err(|_| bad())?;
        value.set_sensitive(true);
        Ok((name.map_err(|_| bad())?, value))
    };
    pairs(NAME, text)?.into_iter().map(header).collect()
}

/// `key=value,key=value`, values percent-encoded.
fn pairs(name: &str, text: &str) -> Result<Vec<(String, String)>, String> {
    let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
    let pair = |part: &str| {
        let (key, value) = part
            .split_once('=')
            .filter(|(key, _)| !key.trim().is_empty())
            .ok_or_else(|| format!("{name}: key=value,key=value is expected"))?;
        Ok((key.trim().to_owned(), decoded(value.trim())))
    };
    parts.map(pair).collect()
}

fn decoded(text: &str) -> String {
    let (mut out, mut rest) = (Vec::with_capacity(text.len()), text.as_bytes());
    while let Some((first, after)) = rest.split_first() {
        let byte = after.get(..2).and_then(|two| std::str::from_utf8(two).ok());
        match byte.and_then(|two| u8::from_str_radix(two, 16).ok()).filter(|_| *first == b'%') {
            Some(byte) => {
                out.push(byte);
                rest = after.get(2..).unwrap_or_default();
            }
            None => {
                out.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}
