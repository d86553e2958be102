//! One line per HTTP request, in the words of the connections' lines.

use std::fmt;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use model::http::RouteRule;
use model::{ConfigVersion, Identity, ServiceKey};

use super::line::{Fields, party};
use super::{Outcome, Party};

/// What is known of a request at its end.
#[derive(Clone, Copy, Debug)]
pub struct HttpRecord<'a> {
    pub start: SystemTime,
    pub duration: Duration,
    /// The client.
    pub source: Party<'a>,
    /// The endpoint: the address of its tunnel, or its own.
    pub destination: Party<'a>,
    /// Address and port of the application behind the tunnel, if there is a tunnel.
    pub hbone_address: Option<SocketAddr>,
    pub service: Option<&'a ServiceKey>,
    pub method: &'a str,
    pub authority: &'a str,
    /// As it came, query and all.
    pub path: &'a str,
    /// `HTTP/1.1` and so on.
    pub protocol: &'a str,
    /// `None`: no answer was given.
    pub status: Option<u16>,
    pub grpc_status: Option<u8>,
    pub request_id: &'a str,
    pub trace: Option<[u8; 16]>,
    /// The rule that decided.
    pub rule: Option<&'a RouteRule>,
    /// On whose behalf the endpoint was called, where the tunnel told it.
    pub delegated: Option<&'a Identity>,
    /// Of the bodies.
    pub request_bytes: u64,
    pub response_bytes: u64,
    pub outcome: Outcome<'a>,
    pub config: ConfigVersion,
}

impl HttpRecord<'_> {
    pub(super) fn headline(&self) -> (&'static str, &'static str) {
        match self.outcome {
            Outcome::Complete => ("info", "request complete"),
            Outcome::Failed { .. } => ("error", "request failed"),
        }
    }

    pub(super) fn fill(&self, f: &mut impl Fields) -> fmt::Result {
        let names = ["src.addr", "src.workload", "src.namespace", "src.identity", "src.cluster"];
        party(f, names, &self.source, |_| Ok(()))?;
        let names = ["dst.addr", "dst.workload", "dst.namespace", "dst.identity", "dst.cluster"];
        party(f, names, &self.destination, |f| {
            if let Some(address) = self.hbone_address {
                f.plain("dst.hbone_addr", address)?;
            }
            match self.service {
                Some(service) => f.quoted("dst.service", &service.hostname),
                None => Ok(()),
            }
        })?;
        f.quoted("direction", "waypoint")?;
        f.quoted("method", self.method)?;
        f.quoted("authority", self.authority)?;
        f.quoted("path", self.path)?;
        f.quoted("protocol", self.protocol)?;
        f.number("status", self.status.unwrap_or(0).into())?;
        if let Some(status) = self.grpc_status {
            f.number("grpc_status", status.into())?;
        }
        f.number("bytes_sent", self.response_bytes)?;
        f.number("bytes_recv", self.request_bytes)?;
        f.quoted("duration", format_args!("{}ms", self.duration.as_millis()))?;
        f.quoted("request_id", self.request_id)?;
        if let Some(trace) = self.trace {
            f.quoted("trace_id", Hex(&trace))?;
        }
        if let Some(identity) = self.delegated {
            f.quoted("on_behalf_of", identity)?;
        }
        if let Some(rule) = self.rule {
            f.quoted("route", &rule.route)?;
            f.quoted("route.rule", &rule.name)?;
            f.quoted("rule", &rule.provenance)?;
        }
        if let Outcome::Failed { reason, message } = self.outcome {
            f.quoted("reason", reason)?;
            f.quoted("error", message)?;
        }
        f.quoted("config", self.config)
    }
}

struct Hex<'a>(&'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}
