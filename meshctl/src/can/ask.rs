//! A question in words to callers and targets, and the answers of all their paths to one.

use anyhow::{Context, Result, bail, ensure};
use model::{Health, HealthPolicy, Service, Str, TunnelProtocol, Workload};
use serde::Serialize;
use std::net::SocketAddr;
use std::sync::Arc;

use super::load::World;
use super::paths::{self, Path};

/// Names listed in an error: enough to see a typing error.
const NAMED: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Decision {
    Yes,
    No,
    /// Some pairs of caller and endpoint may, others may not.
    Depends,
}

/// The answer and all that led to it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Answer {
    pub(super) answer: Decision,
    /// As asked, with what it turned out to be.
    pub(super) from: String,
    pub(super) to: String,
    /// One for each pair of caller and endpoint.
    pub(super) paths: Vec<Path>,
    /// What the answer does not cover.
    pub(super) notes: Vec<String>,
}

pub(super) fn ask(world: &World, from: &str, to: &str) -> Result<Answer> {
    let mut notes = Vec::new();
    let callers = callers(world, from, &mut notes)?;
    let target = target(world, to)?;
    let mut all = Vec::new();
    for caller in &callers.workloads {
        for destination in target.destinations(world) {
            all.extend(paths::walk(&world.snapshot, caller, destination));
        }
        if let Some(refusal) = target.nothing_to_call(world) {
            all.push(paths::refused(caller, &refusal));
        }
    }
    if !world.uncertain.is_empty() {
        let waypoints = world.uncertain.join(", ");
        notes.push(format!(
            "the control plane does not say whether {waypoints} was ready once: if so, what names it is refused, not reached directly"
        ));
    }
    if all.iter().any(|p| p.waypoint.is_some()) {
        let words = "HTTP routes at the waypoint may send a request elsewhere, or answer it: this is about what was called";
        notes.push(words.to_owned());
    }
    let allowed = all.iter().filter(|p| p.allowed).count();
    let answer = match allowed {
        0 => Decision::No,
        n if n == all.len() => Decision::Yes,
        _ => Decision::Depends,
    };
    Ok(Answer { answer, from: callers.called, to: target.called(), paths: all, notes })
}

struct Callers {
    called: String,
    workloads: Vec<Arc<Workload>>,
}

fn callers(world: &World, from: &str, notes: &mut Vec<String>) -> Result<Callers> {
    let (kind, rest) = match from.split_once(':') {
        Some((kind @ ("pod" | "sa"), rest)) => (Some(kind), rest),
        Some((kind, _)) => {
            bail!("FROM {from:?}: {kind:?} is not a kind of caller: use pod: or sa:")
        }
        None => (None, from),
    };
    let (namespace, name) = namespaced(rest).with_context(|| format!("FROM {from:?}"))?;
    if kind != Some("sa") {
        if let Some(pod) = world.snapshot.workload_named(&namespace, &name) {
            return Ok(Callers {
                called: format!("pod {namespace}/{name}"),
                workloads: vec![pod.clone()],
            });
        }
        if let Some(pod) = world.objects.pods.get(&(namespace.clone(), name.clone())) {
            let phase =
                pod.value.status.as_ref().and_then(|s| s.phase.as_deref()).unwrap_or("Pending");
            bail!(
                "pod {namespace}/{name} has no address yet (phase {phase}): ask again when it runs"
            );
        }
        if kind == Some("pod") {
            let pods = names(
                world.snapshot.workloads().filter(|w| w.namespace == namespace).map(|w| &w.name),
            );
            bail!("there is no pod {namespace}/{name}; the pods of this namespace: {pods}");
        }
    }
    let called = format!("service account {namespace}/{name}");
    let runs_as = |w: &&Arc<Workload>| w.namespace == namespace && w.service_account == name;
    let mut workloads: Vec<_> = world.snapshot.workloads().filter(runs_as).cloned().collect();
    workloads.sort_unstable_by(|a, b| a.uid.cmp(&b.uid));
    if workloads.is_empty() {
        workloads.push(Arc::new(imagined(world, &namespace, &name)?));
        notes.push(format!(
            "no pod runs as {called}: the answer is for one that would, and rules about its address do not count"
        ));
    }
    Ok(Callers { called, workloads })
}

/// A pod that does not exist, of a service account that does.
fn imagined(world: &World, namespace: &Str, name: &Str) -> Result<Workload> {
    let exists = world.objects.service_accounts.contains_key(&(namespace.clone(), name.clone()));
    let known = world.objects.namespace(namespace);
    let could_exist = exists || (known.is_some() && &**name == "default");
    if !could_exist {
        let in_namespace = |w: &&Arc<Workload>| w.namespace == *namespace;
        let pods = names(world.snapshot.workloads().filter(in_namespace).map(|w| &w.name));
        let accounts = names(
            world.objects.service_accounts.keys().filter(|(ns, _)| ns == namespace).map(|(_, n)| n),
        );
        bail!(
            "there is neither a pod nor a service account {namespace}/{name}; pods of this namespace: {pods}; \
             service accounts: {accounts}"
        );
    }
    let mut workload =
        Workload::named(format!("imagined/{namespace}/{name}"), namespace.clone(), name.clone());
    workload.service_account = name.clone();
    workload.trust_domain = world.config.trust_domain.clone();
    workload.cluster = world.config.cluster.clone();
    workload.network = world.config.network.clone();
    let label = known.and_then(|ns| ns.metadata.labels.as_ref()?.get(compile::DATAPLANE_MODE));
    if label.is_some_and(|mode| mode == "ambient") {
        workload.protocol = TunnelProtocol::Hbone;
    }
    Ok(workload)
}

/// What is called, and on which port.
enum Target {
    Service(Arc<Service>, u16),
    Pod(Arc<Workload>, u16),
}

fn target(world: &World, to: &str) -> Result<Target> {
    let (pod, rest) = match to.strip_prefix("pod:") {
        Some(rest) => (true, rest),
        None => (false, to.strip_prefix("svc:").unwrap_or(to)),
    };
    let (path, port) = match rest.split_once(':') {
        Some((path, port)) => (path, Some(port)),
        None => (rest, None),
    };
    let (namespace, name) = namespaced(path).with_context(|| format!("TO {to:?}"))?;
    if pod {
        let port = port.and_then(|p| p.parse().ok()).filter(|p| *p != 0);
        let port =
            port.with_context(|| format!("TO {to:?}: say the port: pod:{namespace}/{name}:PORT"))?;
        let found = world.snapshot.workload_named(&namespace, &name);
        let workload = found.with_context(|| {
            let pods = names(world.snapshot.workloads().filter(|w| w.namespace == namespace).map(|w| &w.name));
            format!("there is no pod {namespace}/{name} with an address; the pods of this namespace: {pods}")
        })?;
        ensure!(!workload.addresses.is_empty(), "pod {namespace}/{name} has no address");
        return Ok(Target::Pod(workload.clone(), port));
    }
    let is_it = |s: &&Arc<Service>| s.key.namespace == namespace && s.name == name;
    let Some(service) = world.snapshot.services().find(is_it) else {
        let services = names(
            world.snapshot.services().filter(|s| s.key.namespace == namespace).map(|s| &s.name),
        );
        let hint = match world.snapshot.workload_named(&namespace, &name) {
            Some(_) => format!("; there is a pod of this name: pod:{namespace}/{name}:PORT"),
            None => String::new(),
        };
        bail!(
            "there is no Service {namespace}/{name}; the Services of this namespace: {services}{hint}"
        );
    };
    Ok(Target::Service(service.clone(), service_port(world, service, port)?))
}

/// The port by number or name; the only one where none is said.
fn service_port(world: &World, service: &Service, said: Option<&str>) -> Result<u16> {
    let called = format!("{}/{}", service.key.namespace, service.name);
    let object = world.objects.services.get(&(service.key.namespace.clone(), service.name.clone()));
    let ports = object.and_then(|o| o.value.spec.as_ref()?.ports.as_deref()).unwrap_or_default();
    let number = |name: &str| {
        let port = ports.iter().find(|p| p.name.as_deref() == Some(name))?;
        u16::try_from(port.port).ok()
    };
    let list = || {
        let all: Vec<String> =
            service.ports.iter().take(NAMED).map(|p| p.service_port.to_string()).collect();
        if all.is_empty() { "none".to_owned() } else { all.join(", ") }
    };
    match said {
        Some(said) => said.parse().ok().or_else(|| number(said)).with_context(|| {
            format!("Service {called} has no port named {said:?}; its ports: {}", list())
        }),
        None if service.ports.len() == 1 => Ok(service.ports[0].service_port),
        None => bail!(
            "Service {called} has several ports or none ({}): say which: {called}:PORT",
            list()
        ),
    }
}

impl Target {
    fn called(&self) -> String {
        match self {
            Self::Service(s, port) => format!("service {}/{}:{port}", s.key.namespace, s.name),
            Self::Pod(w, port) => format!("pod {}/{}:{port}", w.namespace, w.name),
        }
    }

    /// What a client would connect to. A headless Service has no address of its own: DNS gives those of
    /// the endpoints.
    fn destinations(&self, world: &World) -> Vec<SocketAddr> {
        match self {
            Self::Pod(w, port) => {
                w.addresses.first().map(|ip| SocketAddr::new(*ip, *port)).into_iter().collect()
            }
            Self::Service(s, port) => match s.vips.first() {
                Some(vip) => vec![SocketAddr::new(vip.ip, *port)],
                None => {
                    let endpoints =
                        world.snapshot.endpoints(&s.key).into_iter().flat_map(|e| e.iter());
                    let all = s.load_balancing.health == HealthPolicy::AllowAll;
                    let in_dns =
                        endpoints.filter(|(_, e)| all || e.workload.health == Health::Healthy);
                    let addresses = in_dns.filter_map(|(_, e)| e.workload.addresses.first());
                    addresses.map(|ip| SocketAddr::new(*ip, *port)).collect()
                }
            },
        }
    }

    /// A headless Service without ready endpoints: its name does not resolve.
    fn nothing_to_call(&self, world: &World) -> Option<model::Refusal> {
        let Self::Service(service, _) = self else { return None };
        self.destinations(world).is_empty().then(|| {
            let message = format!("service {} is headless and has no ready endpoint", service.key);
            model::Refusal::new(model::Reason::NoHealthyEndpoint, message)
        })
    }
}

fn namespaced(path: &str) -> Result<(Str, Str)> {
    match path.split_once('/') {
        Some((namespace, name))
            if !namespace.is_empty() && !name.is_empty() && !name.contains('/') =>
        {
            Ok((namespace.into(), name.into()))
        }
        _ => bail!("write it as NAMESPACE/NAME"),
    }
}

fn names<'a>(all: impl Iterator<Item = &'a Str>) -> String {
    let mut all: Vec<&str> = all.map(|n| &**n).collect();
    all.sort_unstable();
    match all.len() {
        0 => "none".to_owned(),
        n if n > NAMED => format!("{} and {} more", all[..NAMED].join(", "), n - NAMED),
        _ => all.join(", "),
    }
}
