//! `/config_dump`: what this proxy decides from, in the field names of Istio's ztunnel, with provenance.
//!
//! It is serialized straight into the response, chunk by chunk, as fast as the client reads.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io::{self, Write};
use std::sync::Arc;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Response, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use model::{
    AppProtocol, GatewayAddress, GatewayDestination, HealthPolicy, IpPrefix, Match, Policy,
    Provenance, Service, ServicePort, Snapshot, StringMatch, TunnelProtocol, Workload,
};
use serde::{Serialize, Serializer};
use tokio::sync::mpsc;

use super::{AdminState, Answer, parameter, plain};

mod routes;

/// One piece of the response.
const CHUNK: usize = 64 << 10;
/// Pieces that wait for the client; then the dump waits too.
const CHUNKS_WAITING: usize = 4;

/// The certificate of one identity, as far as it may be shown.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CertificateInfo {
    pub identity: String,
    /// `Available`, `Initializing`, or why there is none.
    pub state: String,
    /// The leaf first.
    pub cert_chain: Vec<Certificate>,
    pub root_certs: Vec<Certificate>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Certificate {
    pub serial_number: String,
    /// RFC 3339.
    pub valid_from: String,
    pub expiration_time: String,
}

const PARTS: [&str; 6] = ["workloads", "services", "policies", "routes", "subsets", "certificates"];

pub(super) fn config_dump(query: Option<&str>, state: &Arc<AdminState>) -> Answer {
    let only = parameter(query, "only");
    if let Some(only) = only.as_deref().filter(|o| !PARTS.contains(o)) {
        let text = format!("no part {only:.100}; there are {}", PARTS.join(", "));
        return plain(StatusCode::BAD_REQUEST, text);
    }
    let namespace = parameter(query, "namespace");
    let (send, receive) = mpsc::channel::<Bytes>(CHUNKS_WAITING);
    let state = state.clone();
    // Serializing is plain computing, and waits for the client.
    tokio::task::spawn_blocking(move || {
        let snapshot = (state.snapshot)();
        let dump = Dump { state: &state, snapshot: &snapshot, namespace, only };
        let mut out = Chunks { send, waiting: Vec::with_capacity(CHUNK) };
        // An error means that the client went away.
        let _ =
            serde_json::to_writer_pretty(&mut out, &dump).map_err(io::Error::from).and_then(|()| {
                out.write_all(b"\n")?;
                out.flush()
            });
    });
    let frames = futures_util::stream::unfold(receive, |mut receive| async {
        let bytes = receive.recv().await?;
        Some((Ok::<_, Infallible>(Frame::data(bytes)), receive))
    });
    let mut answer = Response::new(StreamBody::new(frames).boxed_unsync());
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}

/// Hands over what is written in pieces.
struct Chunks {
    send: mpsc::Sender<Bytes>,
    waiting: Vec<u8>,
}

impl Write for Chunks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.waiting.extend_from_slice(bytes);
        if self.waiting.len() >= CHUNK {
            self.flush()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let full = std::mem::replace(&mut self.waiting, Vec::with_capacity(CHUNK));
        self.send.blocking_send(full.into()).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

struct Dump<'a> {
    state: &'a AdminState,
    snapshot: &'a Snapshot,
    /// Only objects of this namespace.
    namespace: Option<String>,
    /// Only this part.
    only: Option<String>,
}

impl Serialize for Dump<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeMap;
        let wanted = |part: &str| self.only.as_deref().is_none_or(|only| only == part);
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("version", &self.state.program)?;
        map.serialize_entry("configVersion", &self.snapshot.version().to_string())?;
        if wanted("workloads") {
            let mut all: Vec<_> =
                self.snapshot.workloads().filter(|w| self.shows(&w.namespace)).collect();
            all.sort_unstable_by(|a, b| a.uid.cmp(&b.uid));
            map.serialize_entry("workloads", &Each(all, WorkloadView::new))?;
        }
        if wanted("services") {
            let mut all: Vec<_> =
                self.snapshot.services().filter(|s| self.shows(&s.key.namespace)).collect();
            all.sort_unstable_by(|a, b| a.key.cmp(&b.key));
            map.serialize_entry("services", &Each(all, |s| ServiceView::new(s, self.snapshot)))?;
        }
        if wanted("policies") {
            let mut all: Vec<_> =
                self.snapshot.policies().filter(|p| self.shows(&p.key.namespace)).collect();
            all.sort_unstable_by(|a, b| a.key.cmp(&b.key));
            map.serialize_entry("policies", &Each(all, PolicyView::new))?;
        }
        // A node's proxy has none of these: there they are only shown to who asks for them.
        let has = |part: &str, any: bool| wanted(part) && (any || self.only.is_some());
        let mut all: Vec<_> =
            self.snapshot.all_routes().filter(|r| self.shows(&r.service.namespace)).collect();
        if has("routes", !all.is_empty()) {
            all.sort_unstable_by(|a, b| a.service.cmp(&b.service));
            map.serialize_entry("routes", &Each(all, routes::routes))?;
        }
        let mut all: Vec<_> =
            self.snapshot.subsets().filter(|s| self.shows(&s.key.service.namespace)).collect();
        if has("subsets", !all.is_empty()) {
            all.sort_unstable_by(|a, b| a.key.cmp(&b.key));
            map.serialize_entry("subsets", &Each(all, routes::subset))?;
        }
        if wanted("certificates") {
            map.serialize_entry("certificates", &(self.state.certificates)())?;
        }
        if self.only.is_none() {
            map.serialize_entry("config", &self.state.settings)?;
        }
        map.end()
    }
}

impl Dump<'_> {
    fn shows(&self, namespace: &str) -> bool {
        self.namespace.as_deref().is_none_or(|only| only == namespace)
    }
}

/// A list whose elements are turned into their view one at a time.
struct Each<'a, T, F>(Vec<&'a Arc<T>>, F);

impl<'a, T, V: Serialize, F: Fn(&'a T) -> V> Serialize for Each<'a, T, F> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(|t| self.1(t)))
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct WorkloadView<'a> {
    uid: &'a str,
    name: &'a str,
    namespace: &'a str,
    workload_ips: Vec<String>,
    #[serde(skip_serializing_if = "str::is_empty")]
    hostname: &'a str,
    protocol: &'static str,
    native_tunnel: bool,
    trust_domain: &'a str,
    service_account: &'a str,
    workload_name: &'a str,
    workload_type: &'static str,
    canonical_name: &'a str,
    canonical_revision: &'a str,
    cluster_id: &'a str,
    network: &'a str,
    node: &'a str,
    status: String,
    network_mode: String,
    capacity: u32,
    locality: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    waypoint: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    network_gateway: Option<String>,
    services: Vec<String>,
    authorization_policies: Vec<String>,
}

impl<'a> WorkloadView<'a> {
    fn new(w: &'a Workload) -> Self {
        let place = [&w.locality.region, &w.locality.zone, &w.locality.subzone];
        Self {
            uid: &w.uid.0,
            name: &w.name,
            namespace: &w.namespace,
            workload_ips: w.addresses.iter().map(ToString::to_string).collect(),
            hostname: &w.hostname,
            protocol: match w.protocol {
                TunnelProtocol::Hbone => "HBONE",
                TunnelProtocol::None => "TCP",
                TunnelProtocol::Unreadable => "unreadable",
            },
            native_tunnel: w.native_tunnel,
            trust_domain: &w.trust_domain,
            service_account: &w.service_account,
            workload_name: &w.workload_name,
            workload_type: w.workload_kind.as_str(),
            canonical_name: &w.canonical_name,
            canonical_revision: &w.canonical_revision,
            cluster_id: &w.cluster,
            network: &w.network,
            node: &w.node,
            status: format!("{:?}", w.health),
            network_mode: format!("{:?}", w.network_mode),
            capacity: w.capacity,
            locality: place.map(|p| p.as_deref().unwrap_or_default()).join("/"),
            waypoint: w.waypoint.as_ref().map(gateway),
            network_gateway: w.network_gateway.as_ref().map(gateway),
            services: w.services.iter().map(|(key, _)| key.to_string()).collect(),
            authorization_policies: w.policies.iter().map(ToString::to_string).collect(),
        }
    }
}

fn gateway(g: &GatewayAddress) -> String {
    match &g.destination {
        GatewayDestination::Service(key) => format!("{key}:{}", g.hbone_port),
        GatewayDestination::Address(a) => format!("{}/{}:{}", a.network, a.ip, g.hbone_port),
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ServiceView<'a> {
    name: &'a str,
    namespace: &'a str,
    hostname: &'a str,
    vips: Vec<String>,
    ports: BTreeMap<u16, u16>,
    app_protocols: BTreeMap<u16, &'static str>,
    endpoints: BTreeMap<&'a str, EndpointView>,
    subject_alt_names: Vec<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    waypoint: Option<String>,
    load_balancer: LoadBalancerView,
    ip_families: String,
}

#[derive(Serialize)]
struct EndpointView {
    status: String,
    port: BTreeMap<u16, u16>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct LoadBalancerView {
    mode: String,
    routing_preferences: Vec<String>,
    health_policy: &'static str,
}

impl<'a> ServiceView<'a> {
    fn new(s: &'a Service, snapshot: &'a Snapshot) -> Self {
        let endpoints = snapshot.endpoints(&s.key).into_iter().flat_map(|e| e.iter());
        Self {
            name: &s.name,
            namespace: &s.key.namespace,
            hostname: &s.key.hostname,
            vips: s
                .vips
                .iter()
                .map(|v| format!("{}/{}", v.network, prefix(v.ip, v.prefix)))
                .collect(),
            ports: ports(&s.ports),
            app_protocols: s
                .ports
                .iter()
                .filter_map(|p| {
                    let name = match p.app_protocol {
                        AppProtocol::Unknown => return None,
                        AppProtocol::Http11 => "HTTP11",
                        AppProtocol::Http2 => "HTTP2",
                        AppProtocol::Grpc => "GRPC",
                    };
                    Some((p.service_port, name))
                })
                .collect(),
            endpoints: endpoints
                .map(|(uid, e)| {
                    let status = format!("{:?}", e.workload.health);
                    (&*uid.0, EndpointView { status, port: ports(&e.ports) })
                })
                .collect(),
            subject_alt_names: s.subject_alt_names.iter().map(|n| &**n).collect(),
            waypoint: s.waypoint.as_ref().map(gateway),
            load_balancer: LoadBalancerView {
                mode: format!("{:?}", s.load_balancing.mode),
                routing_preferences: s
                    .load_balancing
                    .preference
                    .iter()
                    .map(|p| format!("{p:?}"))
                    .collect(),
                health_policy: match s.load_balancing.health {
                    HealthPolicy::OnlyHealthy => "OnlyHealthy",
                    HealthPolicy::AllowAll => "AllowAll",
                },
            },
            ip_families: format!("{:?}", s.families),
        }
    }
}

fn ports(ports: &[ServicePort]) -> BTreeMap<u16, u16> {
    ports.iter().map(|p| (p.service_port, p.target_port)).collect()
}

/// An address, with its length where it is a range.
fn prefix(ip: std::net::IpAddr, length: u8) -> String {
    match (ip, length) {
        (std::net::IpAddr::V4(_), 32) | (std::net::IpAddr::V6(_), 128) => ip.to_string(),
        _ => format!("{ip}/{length}"),
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct PolicyView<'a> {
    name: &'a str,
    namespace: &'a str,
    scope: String,
    action: String,
    dry_run: bool,
    provenance: String,
    rules: Vec<RuleView>,
}

#[derive(Serialize)]
struct RuleView {
    #[serde(skip_serializing_if = "String::is_empty")]
    provenance: String,
    /// All clauses must match; of a clause, any.
    clauses: Vec<Vec<BTreeMap<&'static str, Vec<String>>>>,
}

impl<'a> PolicyView<'a> {
    fn new(p: &'a Policy) -> Self {
        let rule = |r: &model::Rule| RuleView {
            provenance: known(&r.provenance),
            clauses: r.clauses.iter().map(|c| c.iter().map(match_view).collect()).collect(),
        };
        Self {
            name: &p.key.name,
            namespace: &p.key.namespace,
            scope: format!("{:?}", p.scope),
            action: format!("{:?}", p.action),
            dry_run: p.dry_run,
            provenance: known(&p.provenance),
            rules: p.rules.iter().map(rule).collect(),
        }
    }
}

fn known(provenance: &Provenance) -> String {
    if provenance.object.is_empty() { String::new() } else { provenance.to_string() }
}

/// The conditions that are set, as they are written in an AuthorizationPolicy.
fn match_view(m: &Match) -> BTreeMap<&'static str, Vec<String>> {
    let names = |list: &[StringMatch]| list.iter().map(string_match).collect();
    let accounts =
        |list: &[(model::Str, model::Str)]| list.iter().map(|(n, s)| format!("{n}/{s}")).collect();
    let ips = |list: &[IpPrefix]| list.iter().map(|p| prefix(p.ip, p.length)).collect();
    let numbers = |list: &[u16]| list.iter().map(ToString::to_string).collect();
    let all: [(&str, Vec<String>); 12] = [
        ("namespaces", names(&m.namespaces)),
        ("notNamespaces", names(&m.not_namespaces)),
        ("serviceAccounts", accounts(&m.service_accounts)),
        ("notServiceAccounts", accounts(&m.not_service_accounts)),
        ("principals", names(&m.principals)),
        ("notPrincipals", names(&m.not_principals)),
        ("sourceIps", ips(&m.source_ips)),
        ("notSourceIps", ips(&m.not_source_ips)),
        ("destinationIps", ips(&m.destination_ips)),
        ("notDestinationIps", ips(&m.not_destination_ips)),
        ("destinationPorts", numbers(&m.destination_ports)),
        ("notDestinationPorts", numbers(&m.not_destination_ports)),
    ];
    all.into_iter().filter(|(_, values)| !values.is_empty()).collect()
}

fn string_match(s: &StringMatch) -> String {
    match s {
        StringMatch::Exact(s) => s.to_string(),
        StringMatch::Prefix(s) => format!("{s}*"),
        StringMatch::Suffix(s) => format!("*{s}"),
        StringMatch::Presence => "*".to_owned(),
    }
}
