//! Objects with their place of origin, and tables of them.
//!
//! Invariant: an [`Objects`] holds at most one object per kind, namespace and name, and its order never
//! depends on the order in which files were read.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use model::{Provenance, Str};

use crate::ambit::HttpFault;
use crate::gateway_api::{Gateway, GatewayClass, GrpcRoute, HttpRoute, ReferenceGrant};
use crate::istio::{AuthorizationPolicy, DestinationRule, PeerAuthentication, VirtualService};
use crate::waypoints::Programmed;
use crate::yaml::{Node as YamlNode, Value};

/// Annotation on generated objects: the place in the user's files that they come from, `file:line`.
pub const ORIGIN_ANNOTATION: &str = "ambit.io/origin";

/// The place an object was read from.
#[derive(Clone, Debug)]
pub struct Origin {
    pub file: Str,
    pub line: u32,
    /// `None`: every field stands on [`Self::line`].
    lines: Option<Arc<Lines>>,
}

/// The lines of a YAML tree.
#[derive(Debug, PartialEq, Eq)]
enum Lines {
    Leaf(u32),
    Sequence(u32, Vec<Lines>),
    Mapping(u32, Vec<(Box<str>, u32, Lines)>),
}

impl Origin {
    pub fn new(file: impl Into<Str>, line: u32) -> Self {
        Self { file: file.into(), line, lines: None }
    }

    pub(crate) fn of_node(file: Str, node: &YamlNode) -> Self {
        let lines = Lines::of(node);
        let lines = (!lines.all_on(node.line)).then(|| Arc::new(lines));
        Self { file, line: node.line, lines }
    }

    /// Whether every field stands where it does in the other.
    pub(crate) fn is(&self, other: &Self) -> bool {
        let same = |a: &Arc<Lines>, b: &Arc<Lines>| Arc::ptr_eq(a, b) || a == b;
        self.line == other.line
            && self.file == other.file
            && match (&self.lines, &other.lines) {
                (None, None) => true,
                (Some(a), Some(b)) => same(a, b),
                _ => false,
            }
    }

    /// `file:line` of a field such as `spec.rules[0].from`; of the closest field around it when it
    /// is not there.
    pub fn at(&self, field: &str) -> String {
        let line = self.lines.as_ref().and_then(|lines| lines.find(field)).unwrap_or(self.line);
        format!("{}:{line}", self.file)
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

impl Lines {
    fn of(node: &YamlNode) -> Self {
        match &node.value {
            Value::Sequence(items) => {
                Self::Sequence(node.line, items.iter().map(Self::of).collect())
            }
            Value::Mapping(entries) => {
                let entry =
                    |e: &crate::yaml::Entry| (e.key.as_str().into(), e.line(), Self::of(&e.value));
                Self::Mapping(node.line, entries.iter().map(entry).collect())
            }
            _ => Self::Leaf(node.line),
        }
    }

    fn all_on(&self, line: u32) -> bool {
        match self {
            Self::Leaf(l) => *l == line,
            Self::Sequence(l, items) => *l == line && items.iter().all(|i| i.all_on(line)),
            Self::Mapping(l, entries) => {
                *l == line && entries.iter().all(|(_, k, v)| *k == line && v.all_on(line))
            }
        }
    }

    /// The line of the deepest part of a path that exists. Keys may contain dots: the longest key that
    /// fits is taken.
    fn find(&self, path: &str) -> Option<u32> {
        let mut at = self;
        let mut line = None;
        let mut rest = path;
        loop {
            rest = rest.strip_prefix('.').unwrap_or(rest);
            match at {
                Self::Mapping(_, entries) => {
                    let fits = |key: &str| {
                        rest.strip_prefix(key)
                            .is_some_and(|r| r.is_empty() || r.starts_with(['.', '[']))
                    };
                    let best = entries.iter().filter(|(key, ..)| fits(key));
                    let Some((key, l, value)) = best.max_by_key(|(key, ..)| key.len()) else {
                        return line;
                    };
                    (at, line, rest) = (value, Some(*l), &rest[key.len()..]);
                }
                Self::Sequence(_, items) => {
                    let index = rest.strip_prefix('[').and_then(|r| r.split_once(']'));
                    let Some((index, r)) = index else { return line };
                    let item = index.parse().ok().and_then(|i: usize| items.get(i));
                    let Some(item) = item else { return line };
                    (at, line, rest) = (item, Some(item.line()), r);
                }
                Self::Leaf(_) => return line,
            }
        }
    }

    fn line(&self) -> u32 {
        match self {
            Self::Leaf(line) | Self::Sequence(line, _) | Self::Mapping(line, _) => *line,
        }
    }
}

/// What an object is.
#[derive(Clone, Debug)]
pub enum Body {
    Namespace(Arc<Namespace>),
    Node(Arc<Node>),
    ServiceAccount(Arc<ServiceAccount>),
    Pod(Arc<Pod>),
    Deployment(Arc<Deployment>),
    Service(Arc<Service>),
    AuthorizationPolicy(Arc<AuthorizationPolicy>),
    PeerAuthentication(Arc<PeerAuthentication>),
    HttpRoute(Arc<HttpRoute>),
    GrpcRoute(Arc<GrpcRoute>),
    Gateway(Arc<Gateway>),
    GatewayClass(Arc<GatewayClass>),
    ReferenceGrant(Arc<ReferenceGrant>),
    VirtualService(Arc<VirtualService>),
    DestinationRule(Arc<DestinationRule>),
    HttpFault(Arc<HttpFault>),
}

impl Body {
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Namespace(_) => "Namespace",
            Self::Node(_) => "Node",
            Self::ServiceAccount(_) => "ServiceAccount",
            Self::Pod(_) => "Pod",
            Self::Deployment(_) => "Deployment",
            Self::Service(_) => "Service",
            Self::AuthorizationPolicy(_) => "AuthorizationPolicy",
            Self::PeerAuthentication(_) => "PeerAuthentication",
            Self::HttpRoute(_) => "HTTPRoute",
            Self::GrpcRoute(_) => "GRPCRoute",
            Self::Gateway(_) => "Gateway",
            Self::GatewayClass(_) => "GatewayClass",
            Self::ReferenceGrant(_) => "ReferenceGrant",
            Self::VirtualService(_) => "VirtualService",
            Self::DestinationRule(_) => "DestinationRule",
            Self::HttpFault(_) => "HTTPFault",
        }
    }
}

/// One object of a file.
#[derive(Clone, Debug)]
pub struct Object {
    /// Empty for kinds without a namespace.
    pub namespace: Str,
    pub name: Str,
    pub origin: Origin,
    pub body: Body,
}

impl Object {
    /// `Kind/namespace/name`.
    pub fn id(&self) -> String {
        object_id(self.body.kind(), &self.namespace, &self.name)
    }
}

/// `Kind/namespace/name`, or `Kind/name` for kinds without a namespace.
pub fn object_id(kind: &str, namespace: &str, name: &str) -> String {
    if namespace.is_empty() {
        format!("{kind}/{name}")
    } else {
        format!("{kind}/{namespace}/{name}")
    }
}

/// A value and where it comes from.
#[derive(Debug)]
pub struct Sourced<T> {
    pub value: Arc<T>,
    pub origin: Origin,
}

impl<T> Sourced<T> {
    pub fn new(value: impl Into<Arc<T>>, origin: Origin) -> Self {
        Self { value: value.into(), origin }
    }

    /// Whether it says the same at the same place.
    pub(crate) fn is(&self, other: &Self) -> bool
    where
        T: PartialEq,
    {
        // Mostly it is the very same value.
        (Arc::ptr_eq(&self.value, &other.value) || self.value == other.value)
            && self.origin.is(&other.origin)
    }
}

// By hand: a derive would ask for `T: Clone`.
impl<T> Clone for Sourced<T> {
    fn clone(&self) -> Self {
        Self { value: self.value.clone(), origin: self.origin.clone() }
    }
}

/// Objects of one kind by namespace (empty for kinds without) and name.
pub type Table<T> = BTreeMap<(Str, Str), Sourced<T>>;

/// Everything that is in force.
#[derive(Clone, Debug, Default)]
pub struct Objects {
    pub namespaces: Table<Namespace>,
    pub nodes: Table<Node>,
    pub service_accounts: Table<ServiceAccount>,
    pub pods: Table<Pod>,
    pub deployments: Table<Deployment>,
    pub services: Table<Service>,
    pub authorization_policies: Table<AuthorizationPolicy>,
    pub peer_authentications: Table<PeerAuthentication>,
    pub http_routes: Table<HttpRoute>,
    pub grpc_routes: Table<GrpcRoute>,
    pub gateways: Table<Gateway>,
    pub gateway_classes: Table<GatewayClass>,
    pub reference_grants: Table<ReferenceGrant>,
    pub virtual_services: Table<VirtualService>,
    pub destination_rules: Table<DestinationRule>,
    pub http_faults: Table<HttpFault>,
    /// Waypoints that are known to have been ready, which stands in no file; those without a Gateway do not count.
    pub programmed: Programmed,
}

impl Objects {
    /// Adds an object; one with the same kind, namespace and name is replaced.
    pub fn insert(&mut self, object: Object) {
        let Object { namespace, name, origin, body } = object;
        let key = (namespace, name);
        match body {
            Body::Namespace(v) => put(&mut self.namespaces, key, v, origin),
            Body::Node(v) => put(&mut self.nodes, key, v, origin),
            Body::ServiceAccount(v) => put(&mut self.service_accounts, key, v, origin),
            Body::Pod(v) => put(&mut self.pods, key, v, origin),
            Body::Deployment(v) => put(&mut self.deployments, key, v, origin),
            Body::Service(v) => put(&mut self.services, key, v, origin),
            Body::AuthorizationPolicy(v) => put(&mut self.authorization_policies, key, v, origin),
            Body::PeerAuthentication(v) => put(&mut self.peer_authentications, key, v, origin),
            Body::HttpRoute(v) => put(&mut self.http_routes, key, v, origin),
            Body::GrpcRoute(v) => put(&mut self.grpc_routes, key, v, origin),
            Body::Gateway(v) => put(&mut self.gateways, key, v, origin),
            Body::GatewayClass(v) => put(&mut self.gateway_classes, key, v, origin),
            Body::ReferenceGrant(v) => put(&mut self.reference_grants, key, v, origin),
            Body::VirtualService(v) => put(&mut self.virtual_services, key, v, origin),
            Body::DestinationRule(v) => put(&mut self.destination_rules, key, v, origin),
            Body::HttpFault(v) => put(&mut self.http_faults, key, v, origin),
        }
    }

    /// Whether everything but HTTPRoutes, GRPCRoutes and VirtualServices is the same.
    pub(crate) fn is_but_for_routes(&self, other: &Self) -> bool {
        let Self {
            namespaces,
            nodes,
            service_accounts,
            pods,
            deployments,
            services,
            authorization_policies,
            peer_authentications,
            http_routes: _,
            grpc_routes: _,
            gateways,
            gateway_classes,
            reference_grants,
            virtual_services: _,
            destination_rules,
            http_faults,
            programmed,
        } = self;
        is(namespaces, &other.namespaces)
            && is(nodes, &other.nodes)
            && is(service_accounts, &other.service_accounts)
            && is(pods, &other.pods)
            && is(deployments, &other.deployments)
            && is(services, &other.services)
            && is(authorization_policies, &other.authorization_policies)
            && is(peer_authentications, &other.peer_authentications)
            && is(gateways, &other.gateways)
            && is(gateway_classes, &other.gateway_classes)
            && is(reference_grants, &other.reference_grants)
            && is(destination_rules, &other.destination_rules)
            && is(http_faults, &other.http_faults)
            && *programmed == other.programmed
    }

    pub fn namespace(&self, name: &str) -> Option<&Namespace> {
        self.namespaces.get(&("".into(), name.into())).map(|s| &*s.value)
    }

    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.get(&("".into(), name.into())).map(|s| &*s.value)
    }
}

fn is<T: PartialEq>(table: &Table<T>, other: &Table<T>) -> bool {
    let same = |((a, one), (b, two)): ((_, &Sourced<T>), (_, &Sourced<T>))| a == b && one.is(two);
    table.len() == other.len() && table.iter().zip(other).all(same)
}

fn put<T>(table: &mut Table<T>, key: (Str, Str), value: Arc<T>, origin: Origin) {
    table.insert(key, Sourced { value, origin });
}

/// Kinds with metadata, as far as compile needs them.
pub(crate) trait Meta {
    const KIND: &'static str;
    fn meta(&self) -> &ObjectMeta;

    fn name(&self) -> &str {
        self.meta().name.as_deref().unwrap_or_default()
    }

    fn annotation(&self, name: &str) -> Option<&str> {
        self.meta().annotations.as_ref()?.get(name).map(String::as_str)
    }

    fn labels(&self) -> Option<&BTreeMap<String, String>> {
        self.meta().labels.as_ref()
    }

    fn label(&self, name: &str) -> Option<&str> {
        self.labels()?.get(name).map(String::as_str)
    }
}

macro_rules! meta {
    ($($kind:ident = $name:literal),* $(,)?) => {
        $(impl Meta for $kind {
            const KIND: &'static str = $name;
            fn meta(&self) -> &ObjectMeta { &self.metadata }
        })*
    };
}
meta!(
    Namespace = "Namespace",
    Node = "Node",
    ServiceAccount = "ServiceAccount",
    Pod = "Pod",
    Deployment = "Deployment",
    Service = "Service",
    AuthorizationPolicy = "AuthorizationPolicy",
    PeerAuthentication = "PeerAuthentication",
    HttpRoute = "HTTPRoute",
    GrpcRoute = "GRPCRoute",
    Gateway = "Gateway",
    GatewayClass = "GatewayClass",
    ReferenceGrant = "ReferenceGrant",
    VirtualService = "VirtualService",
    DestinationRule = "DestinationRule",
    HttpFault = "HTTPFault",
);

/// Which of several objects came first: by creation time where a cluster states it, else by place.
/// Objects without a time come after those with one.
pub(crate) fn age<'a, T: Meta>(
    key: &'a (Str, Str),
    sourced: &'a Sourced<T>,
) -> impl Ord + 'a + use<'a, T> {
    let created: Option<&Time> = sourced.value.meta().creation_timestamp.as_ref();
    (created.is_none(), created, &sourced.origin.file, sourced.origin.line, key)
}

/// Where a field of an object comes from.
pub(crate) fn provenance<T: Meta>(
    key: &(Str, Str),
    sourced: &Sourced<T>,
    field: &str,
) -> Provenance {
    Provenance {
        object: object_id(T::KIND, &key.0, &key.1).into(),
        field: field.into(),
        origin: sourced.origin.at(field).into(),
    }
}
