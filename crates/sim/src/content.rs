//! What users wrote: the few pods, Services and policies of a made-up mesh, in a form that is easy to judge by
//! hand, and as the Kubernetes and Istio objects that `compile` reads.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use compile::istio::{
    AuthorizationPolicy, AuthorizationPolicySpec, AuthorizationRule, From, Mtls, MtlsMode,
    Operation, PeerAuthentication, PeerAuthenticationSpec, PolicyAction, Source, To,
    WorkloadSelector,
};
use compile::{Body, Object, Objects, Origin, REDIRECTION};
use k8s_openapi::api::core::v1::{
    Pod as KubePod, PodCondition, PodSpec, PodStatus, Service as KubeService,
    ServicePort as KubePort, ServiceSpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use model::Identity;

use crate::rng::Rng;

pub(crate) const NAMESPACES: [&str; 2] = ["shop", "bank"];
const ROOT: &str = "istio-system";
const ACCOUNTS: [&str; 2] = ["web", "db"];
const APPS: [&str; 2] = ["x", "y"];
pub(crate) const NODES: usize = 3;
/// Places for pods. A pod that is made anew in its place has the old name.
pub(crate) const PODS: usize = 6;
const POLICIES: usize = 3;
/// What pods listen on.
pub(crate) const PORTS: [u16; 2] = [80, 81];

/// One state of everything that users wrote.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Content {
    pub(crate) pods: [Option<Pod>; PODS],
    /// Service `i` is of namespace and app `i`.
    pub(crate) services: [bool; 2],
    pub(crate) policies: [Option<Policy>; POLICIES],
    /// PeerAuthentication of the mesh, and of each namespace: of all of it, and of one app.
    pub(crate) mesh_mode: Mode,
    pub(crate) namespace_mode: [Mode; 2],
    pub(crate) app_mode: [Option<AppMode>; 2],
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pod {
    /// Counts the pods there have ever been.
    pub(crate) born: u32,
    pub(crate) place: usize,
    pub(crate) namespace: usize,
    pub(crate) account: usize,
    pub(crate) app: usize,
    pub(crate) node: usize,
    /// Below the node's range: a pod that is gone leaves its address to the next one.
    pub(crate) address: u8,
    pub(crate) enrolled: bool,
    pub(crate) ready: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Mode {
    #[default]
    Unset,
    Permissive,
    Strict,
}

/// A PeerAuthentication with a selector. `port` is about port 81.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AppMode {
    pub(crate) app: usize,
    pub(crate) mode: Mode,
    pub(crate) port: Mode,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Policy {
    pub(crate) scope: Scope,
    pub(crate) deny: bool,
    pub(crate) rules: Vec<Rule>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    Mesh,
    Namespace(usize),
    App(usize, usize),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    pub(crate) from: Option<Who>,
    pub(crate) port: Option<u16>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    Principal(usize, usize),
    NotPrincipal(usize, usize),
    Namespace(usize),
    Address(IpAddr),
}

impl Pod {
    pub(crate) fn ip(&self) -> IpAddr {
        Ipv4Addr::new(10, 1, u8::try_from(self.node).unwrap_or(0), self.address).into()
    }

    pub(crate) fn name(&self) -> String {
        format!("p{}", self.place)
    }

    pub(crate) fn namespace(&self) -> &'static str {
        NAMESPACES[self.namespace]
    }

    pub(crate) fn identity(&self) -> Identity {
        Identity::new("cluster.local", self.namespace(), ACCOUNTS[self.account])
    }
}

pub(crate) fn node_name(node: usize) -> String {
    format!("node-{node}")
}

/// The virtual address of a Service.
pub(crate) fn vip(service: usize) -> IpAddr {
    Ipv4Addr::new(10, 96, 0, u8::try_from(service).unwrap_or(0) + 1).into()
}

impl Policy {
    /// The namespace and name under which it is known everywhere.
    pub(crate) fn key(&self, place: usize) -> (&'static str, String) {
        let namespace = match self.scope {
            Scope::Mesh => ROOT,
            Scope::Namespace(ns) | Scope::App(ns, _) => NAMESPACES[ns],
        };
        (namespace, format!("policy{place}"))
    }
}

impl Content {
    /// A mesh to begin with.
    pub(crate) fn first(rng: &mut Rng, born: &mut u32) -> Self {
        let mut content = Self { services: [true, true], ..Self::default() };
        for place in 0..4 {
            content.pods[place] = Some(content.pod(rng, born, place));
        }
        content
    }

    /// One change, as a user, a controller or a kubelet makes it.
    pub(crate) fn change(&mut self, rng: &mut Rng, born: &mut u32) -> &'static str {
        let place = rng.index(PODS);
        match rng.below(12) {
            0..=2 => {
                self.policies[rng.index(POLICIES)] = rng.chance(75).then(|| policy(rng));
                "policy"
            }
            3 => {
                self.mesh_mode = mode(rng);
                "mesh mTLS"
            }
            4 => {
                self.namespace_mode[rng.index(2)] = mode(rng);
                "namespace mTLS"
            }
            5 => {
                let app = AppMode { app: rng.index(2), mode: mode(rng), port: mode(rng) };
                self.app_mode[rng.index(2)] = rng.chance(75).then_some(app);
                "app mTLS"
            }
            6 => {
                let service = rng.index(2);
                self.services[service] = !self.services[service];
                "service"
            }
            7..=8 => self.of_pod(place, |pod| {
                pod.enrolled = !pod.enrolled;
                "enrolment"
            }),
            9 => {
                let app = rng.index(2);
                self.of_pod(place, |pod| {
                    (pod.app, pod.ready) = (app, !pod.ready);
                    "pod"
                })
            }
            _ if self.pods[place].is_some() && rng.chance(40) => {
                self.pods[place] = None;
                "pod gone"
            }
            _ => {
                self.pods[place] = Some(self.pod(rng, born, place));
                "pod made"
            }
        }
    }

    fn of_pod(
        &mut self,
        place: usize,
        change: impl FnOnce(&mut Pod) -> &'static str,
    ) -> &'static str {
        self.pods[place].as_mut().map_or("nothing", change)
    }

    fn pod(&self, rng: &mut Rng, born: &mut u32, place: usize) -> Pod {
        *born += 1;
        let mut pod = Pod {
            born: *born,
            place,
            // A name belongs to one namespace.
            namespace: place % 2,
            account: rng.index(2),
            // Mostly that of its namespace's Service.
            app: if rng.chance(75) { place % 2 } else { rng.index(2) },
            node: rng.index(NODES),
            address: 1,
            enrolled: rng.chance(80),
            ready: rng.chance(85),
        };
        // The lowest free address of the node: what was free'd last comes back first.
        let others = || self.pods.iter().flatten().filter(|other| other.place != place);
        while others().any(|other| other.ip() == pod.ip()) {
            pod.address += 1;
        }
        pod
    }

    /// As `compile` reads it.
    pub(crate) fn objects(&self) -> Objects {
        let mut objects = Objects::default();
        let mut put = |namespace: &str, name: &str, body: Body| {
            let (namespace, name) = (namespace.into(), name.into());
            objects.insert(Object { namespace, name, origin: Origin::new("sim", 1), body });
        };
        for pod in self.pods.iter().flatten() {
            put(pod.namespace(), &pod.name(), Body::Pod(kube_pod(pod).into()));
        }
        for service in (0..2).filter(|i| self.services[*i]) {
            let namespace = NAMESPACES[service];
            put(namespace, "svc", Body::Service(kube_service(service).into()));
        }
        for (place, policy) in (0..).zip(&self.policies) {
            let Some(policy) = policy else { continue };
            let (namespace, name) = policy.key(place);
            let body = istio_policy(policy, namespace, &name);
            put(namespace, &name, Body::AuthorizationPolicy(body.into()));
        }
        let wide = [(ROOT, self.mesh_mode)];
        let wide = wide.into_iter().chain(NAMESPACES.into_iter().zip(self.namespace_mode));
        for (namespace, mode) in wide.filter(|(_, mode)| *mode != Mode::Unset) {
            let body = peers(namespace, "default", None, mode, Mode::Unset);
            put(namespace, "default", Body::PeerAuthentication(body.into()));
        }
        for (namespace, app) in NAMESPACES.into_iter().zip(&self.app_mode) {
            let Some(AppMode { app, mode, port }) = app else { continue };
            let body = peers(namespace, "app", Some(*app), *mode, *port);
            put(namespace, "app", Body::PeerAuthentication(body.into()));
        }
        objects
    }
}

fn mode(rng: &mut Rng) -> Mode {
    [Mode::Unset, Mode::Permissive, Mode::Strict][rng.index(3)]
}

fn policy(rng: &mut Rng) -> Policy {
    let scope = match rng.below(4) {
        0 => Scope::Mesh,
        1 => Scope::Namespace(rng.index(2)),
        _ => Scope::App(rng.index(2), rng.index(2)),
    };
    let rules = (0..rng.below(3)).map(|_| rule(rng)).collect();
    Policy { scope, deny: rng.chance(50), rules }
}

fn rule(rng: &mut Rng) -> Rule {
    let from = match rng.below(6) {
        0 | 1 => Some(Who::Principal(rng.index(2), rng.index(2))),
        2 => Some(Who::NotPrincipal(rng.index(2), rng.index(2))),
        3 => Some(Who::Namespace(rng.index(2))),
        4 => {
            let node = u8::try_from(rng.index(NODES)).unwrap_or(0);
            Some(Who::Address(Ipv4Addr::new(10, 1, node, 1).into()))
        }
        _ => None,
    };
    Rule { from, port: rng.chance(40).then(|| PORTS[rng.index(2)]) }
}

fn meta(namespace: &str, name: &str) -> ObjectMeta {
    let (namespace, name) = (Some(namespace.to_owned()), Some(name.to_owned()));
    ObjectMeta { namespace, name, ..ObjectMeta::default() }
}

fn kube_pod(pod: &Pod) -> KubePod {
    let mut metadata = meta(pod.namespace(), &pod.name());
    metadata.labels = Some(app_label(pod.app));
    if pod.enrolled {
        metadata.annotations = Some([(REDIRECTION.to_owned(), "enabled".to_owned())].into());
    }
    let status = if pod.ready { "True" } else { "False" };
    let ready = PodCondition {
        type_: "Ready".to_owned(),
        status: status.to_owned(),
        ..PodCondition::default()
    };
    KubePod {
        metadata,
        spec: Some(PodSpec {
            node_name: Some(node_name(pod.node)),
            service_account_name: Some(ACCOUNTS[pod.account].to_owned()),
            ..PodSpec::default()
        }),
        status: Some(PodStatus {
            pod_ip: Some(pod.ip().to_string()),
            conditions: Some(vec![ready]),
            ..PodStatus::default()
        }),
    }
}

fn kube_service(service: usize) -> KubeService {
    let port = |port: u16| KubePort {
        name: Some(format!("tcp-{port}")),
        port: i32::from(port),
        target_port: Some(IntOrString::Int(i32::from(port))),
        ..KubePort::default()
    };
    KubeService {
        metadata: meta(NAMESPACES[service], "svc"),
        spec: Some(ServiceSpec {
            cluster_ip: Some(vip(service).to_string()),
            selector: Some(app_label(service)),
            ports: Some(PORTS.map(port).to_vec()),
            ..ServiceSpec::default()
        }),
        ..KubeService::default()
    }
}

fn app_label(app: usize) -> BTreeMap<String, String> {
    [("app".to_owned(), APPS[app].to_owned())].into()
}

fn istio_policy(policy: &Policy, namespace: &str, name: &str) -> AuthorizationPolicy {
    let selector = match policy.scope {
        Scope::App(_, app) => Some(WorkloadSelector { match_labels: app_label(app) }),
        Scope::Mesh | Scope::Namespace(_) => None,
    };
    let action = if policy.deny { PolicyAction::Deny } else { PolicyAction::Allow };
    let rules = Some(policy.rules.iter().map(istio_rule).collect());
    let spec =
        AuthorizationPolicySpec { selector, rules, action, ..AuthorizationPolicySpec::default() };
    AuthorizationPolicy { metadata: meta(namespace, name), spec }
}

fn istio_rule(rule: &Rule) -> AuthorizationRule {
    let principal = |ns: usize, account: usize| {
        vec![format!("cluster.local/ns/{}/sa/{}", NAMESPACES[ns], ACCOUNTS[account])]
    };
    let from = rule.from.map(|who| {
        let mut source = Source::default();
        match who {
            Who::Principal(ns, account) => source.principals = principal(ns, account),
            Who::NotPrincipal(ns, account) => source.not_principals = principal(ns, account),
            Who::Namespace(ns) => source.namespaces = vec![NAMESPACES[ns].to_owned()],
            Who::Address(ip) => source.ip_blocks = vec![ip.to_string()],
        }
        vec![From { source }]
    });
    let to = rule.port.map(|port| {
        let ports = vec![port.to_string()];
        vec![To { operation: Operation { ports, ..Operation::default() } }]
    });
    AuthorizationRule { from, to, when: None }
}

fn peers(
    namespace: &str,
    name: &str,
    app: Option<usize>,
    mode: Mode,
    port: Mode,
) -> PeerAuthentication {
    let mtls = |mode: Mode| {
        let mode = match mode {
            Mode::Unset => MtlsMode::Unset,
            Mode::Permissive => MtlsMode::Permissive,
            Mode::Strict => MtlsMode::Strict,
        };
        Mtls { mode }
    };
    let mut spec = PeerAuthenticationSpec { mtls: Some(mtls(mode)), ..Default::default() };
    spec.selector = app.map(|app| WorkloadSelector { match_labels: app_label(app) });
    if port != Mode::Unset {
        spec.port_level_mtls.insert(PORTS[1].to_string(), mtls(port));
    }
    PeerAuthentication { metadata: meta(namespace, name), spec }
}
