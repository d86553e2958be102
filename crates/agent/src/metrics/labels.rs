//! The labels of a connection or a request, as Istio names them. They describe deployments, not pods: all pods of
//! one Deployment share a series.

use std::fmt::{self, Write};
use std::sync::Arc;

use model::{Identity, Service, Str, Workload};
use prometheus_client::encoding::{EncodeLabelSet, LabelSetEncoder};

/// Which end of a connection reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reporter {
    Source,
    Destination,
    /// The HTTP proxy between the two.
    Waypoint,
}

impl Reporter {
    pub(super) const ALL: [Self; 3] = [Self::Source, Self::Destination, Self::Waypoint];

    /// Those that a program can be.
    pub(super) fn of(component: &str) -> &'static [Self] {
        if component == "waypoint" { &[Self::Waypoint] } else { &[Self::Source, Self::Destination] }
    }

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
            Self::Waypoint => "waypoint",
        }
    }
}

/// How the bytes of a connection travel, and whether its ends are known for certain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Security {
    #[default]
    Plaintext,
    /// Both ends proved who they are.
    MutualTls,
    /// Both ends are pods of this proxy, which joined their sockets: it knows who they are, and nothing was encrypted.
    SameNode,
}

/// What is known of the two ends of a connection.
#[derive(Clone, Copy, Debug)]
pub struct TrafficKey<'a> {
    pub reporter: Reporter,
    pub security: Security,
    pub source: Option<&'a Arc<Workload>>,
    /// The identity the source showed. `None`, where identities are known: that of the workload.
    pub source_identity: Option<&'a Identity>,
    /// The client for whom the source, a waypoint, calls.
    pub client: Option<&'a Identity>,
    pub destination: Option<&'a Arc<Workload>>,
    pub destination_identity: Option<&'a Identity>,
    /// The service that was called, if it was called by its virtual address.
    pub service: Option<&'a Arc<Service>>,
}

impl TrafficKey<'_> {
    /// A connection of which nothing is known yet.
    pub const fn unknown(reporter: Reporter) -> Self {
        Self {
            reporter,
            security: Security::Plaintext,
            source: None,
            source_identity: None,
            client: None,
            destination: None,
            destination_identity: None,
            service: None,
        }
    }
}

/// The label values. Strings are shared with the configuration they come from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Labels {
    pub(super) reporter: Reporter,
    security: Security,
    source: Side,
    client: Option<Identity>,
    destination: Side,
    service: Option<(Str, Str, Str)>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Side {
    workload: Option<Names>,
    identity: Option<Identity>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Names {
    workload: Str,
    namespace: Str,
    canonical_name: Str,
    canonical_revision: Str,
    cluster: Str,
    region: Option<Str>,
    zone: Option<Str>,
}

impl Labels {
    pub(super) fn new(key: &TrafficKey<'_>) -> Self {
        Self {
            reporter: key.reporter,
            security: key.security,
            source: Side::new(key.source, key.source_identity, key.security),
            client: key.client.cloned(),
            destination: Side::new(key.destination, key.destination_identity, key.security),
            service: key
                .service
                .map(|s| (s.key.hostname.clone(), s.key.namespace.clone(), s.name.clone())),
        }
    }
}

impl Side {
    fn new(
        workload: Option<&Arc<Workload>>,
        identity: Option<&Identity>,
        security: Security,
    ) -> Self {
        Self {
            workload: workload.map(|w| Names {
                workload: w.workload_name.clone(),
                namespace: w.namespace.clone(),
                canonical_name: w.canonical_name.clone(),
                canonical_revision: w.canonical_revision.clone(),
                cluster: w.cluster.clone(),
                region: w.locality.region.clone(),
                zone: w.locality.zone.clone(),
            }),
            identity: (security != Security::Plaintext)
                .then(|| identity.cloned().or_else(|| workload.map(|w| w.identity())))
                .flatten(),
        }
    }

    fn encode(&self, encoder: &mut LabelSetEncoder<'_>, names: &SideNames) -> fmt::Result {
        let names_of = self.workload.as_ref();
        let get = |field: fn(&Names) -> &Str| names_of.map(|n| &**field(n)).unwrap_or_default();
        label(encoder, names.workload, get(|n| &n.workload))?;
        label(encoder, names.canonical_service, get(|n| &n.canonical_name))?;
        label(encoder, names.canonical_revision, get(|n| &n.canonical_revision))?;
        label(encoder, names.workload_namespace, get(|n| &n.namespace))?;
        match &self.identity {
            Some(identity) => label(encoder, names.principal, identity)?,
            None => label(encoder, names.principal, "")?,
        }
        label(encoder, names.app, get(|n| &n.canonical_name))?;
        label(encoder, names.version, get(|n| &n.canonical_revision))?;
        label(encoder, names.cluster, get(|n| &n.cluster))?;
        // Istio leaves these two out where the locality is not known.
        for (name, value) in [
            (names.region, names_of.and_then(|n| n.region.as_deref())),
            (names.zone, names_of.and_then(|n| n.zone.as_deref())),
        ] {
            if let Some(value) = value {
                label(encoder, name, value)?;
            }
        }
        Ok(())
    }
}

struct SideNames {
    workload: &'static str,
    canonical_service: &'static str,
    canonical_revision: &'static str,
    workload_namespace: &'static str,
    principal: &'static str,
    app: &'static str,
    version: &'static str,
    cluster: &'static str,
    region: &'static str,
    zone: &'static str,
}

const SOURCE: SideNames = SideNames {
    workload: "source_workload",
    canonical_service: "source_canonical_service",
    canonical_revision: "source_canonical_revision",
    workload_namespace: "source_workload_namespace",
    principal: "source_principal",
    app: "source_app",
    version: "source_version",
    cluster: "source_cluster",
    region: "source_region",
    zone: "source_zone",
};

const DESTINATION: SideNames = SideNames {
    workload: "destination_workload",
    canonical_service: "destination_canonical_service",
    canonical_revision: "destination_canonical_revision",
    workload_namespace: "destination_workload_namespace",
    principal: "destination_principal",
    app: "destination_app",
    version: "destination_version",
    cluster: "destination_cluster",
    region: "destination_region",
    zone: "destination_zone",
};

/// Labels with one value of `response_flags`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flagged<'a> {
    pub(super) labels: &'a Labels,
    pub(super) flags: &'static str,
}

impl EncodeLabelSet for Flagged<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        self.labels.encode(encoder, "tcp", self.flags)
    }
}

impl Labels {
    /// What TCP and HTTP have in common.
    pub(super) fn encode(
        &self,
        encoder: &mut LabelSetEncoder<'_>,
        protocol: &'static str,
        flags: &'static str,
    ) -> fmt::Result {
        label(encoder, "reporter", self.reporter.as_str())?;
        self.source.encode(encoder, &SOURCE)?;
        // Istio has no such label: left out where no waypoint names a client.
        if let Some(client) = &self.client {
            label(encoder, "client_principal", client)?;
        }
        let service = self.service.as_ref();
        label(encoder, "destination_service", service.map(|s| &*s.0).unwrap_or_default())?;
        label(
            encoder,
            "destination_service_namespace",
            service.map(|s| &*s.1).unwrap_or_default(),
        )?;
        label(encoder, "destination_service_name", service.map(|s| &*s.2).unwrap_or_default())?;
        self.destination.encode(encoder, &DESTINATION)?;
        label(encoder, "request_protocol", protocol)?;
        label(encoder, "response_flags", flags)?;
        let policy = match self.security {
            Security::MutualTls => "mutual_tls",
            Security::Plaintext => "unknown",
            Security::SameNode => "none",
        };
        label(encoder, "connection_security_policy", policy)
    }
}

/// Writes one label; an empty value is `unknown`, as dashboards expect.
pub(super) fn label(
    encoder: &mut LabelSetEncoder<'_>,
    name: &'static str,
    value: impl fmt::Display,
) -> fmt::Result {
    let mut label = encoder.encode_label();
    let mut key = label.encode_label_key()?;
    key.write_str(name)?;
    let mut out = key.encode_label_value()?;
    let mut escaped = Escaped { out: &mut out, empty: true };
    write!(escaped, "{value}")?;
    if escaped.empty {
        out.write_str("unknown")?;
    }
    out.finish()
}

/// The encoder writes values as they are; a quote in one would end it and let its author add labels.
struct Escaped<'a, W> {
    out: &'a mut W,
    empty: bool,
}

impl<W: Write> Write for Escaped<'_, W> {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        self.empty &= s.is_empty();
        let mut rest = s;
        while let Some(at) = rest.find(['"', '\\', '\n']) {
            self.out.write_str(&rest[..at])?;
            self.out.write_str(match rest.as_bytes()[at] {
                b'"' => "\\\"",
                b'\n' => "\\n",
                _ => "\\\\",
            })?;
            rest = &rest[at + 1..];
        }
        self.out.write_str(rest)
    }
}
