//! Tells the rest of the world how things are: objects for the control plane, translations for the nodes, names for DNS,
//! complaints for the user, the status for who asks.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::UNIX_EPOCH;

use compile::{Body, MeshConfig, Object, Objects, Severity};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use super::World;
use super::pods::{Capture, Pod, service_account};
use crate::dns::table::Table;
use crate::endpoints::{self, Backend, Resolved};
use crate::launch::Event;
use crate::network::{DNS_V4, DNS_V6};
use crate::pod::lifecycle::Phase;
use crate::reconcile::Key;
use crate::status::{NodeStatus, PodStatus, ServiceStatus, Status};

impl World {
    /// Brings objects, translations and names up to date.
    pub(super) fn publish(&mut self) {
        for key in self.pods.keys().cloned().collect::<Vec<_>>() {
            self.write_pod(&key);
        }
        self.write_made();
        self.write_services();
        let resolved = self.resolved();
        let translations = endpoints::translations(&resolved);
        if self.translated.as_ref() != Some(&translations) {
            // All nodes, also after one that failed: what works must not wait for what does not.
            let failed =
                self.network.nodes.iter().map(|n| net::service_nat::program(&n.ns, &translations));
            let failed: Vec<_> = failed.filter_map(Result::err).collect();
            match failed.into_iter().next().map_or(Ok(()), Err) {
                Ok(()) => self.translated = Some(translations),
                Err(e) => self.trouble(format!("service addresses: {e}")),
            }
        }
        self.names.set(Table::new(&resolved, &self.aliases(), [DNS_V4.into(), DNS_V6.into()]));
        if let Some(why) = self.objects.trouble() {
            self.trouble(why);
        }
    }

    /// Writes a pod's object as it is now.
    pub(super) fn write_pod(&mut self, key: &Key) {
        // One of which nothing is left is no object any more, though its network may stay a moment.
        let gone = |p: &&Pod| p.last.as_ref().is_some_and(|r| r.gone);
        let Some(pod) = self.pods.get(key).filter(|p| !gone(p)) else { return };
        let phase = match pod.phase() {
            Phase::Pending => "Pending",
            Phase::Running => "Running",
            Phase::Succeeded => "Succeeded",
            Phase::Failed => "Failed",
        };
        let mut object = pod.plan.with_status(phase, pod.ready(), pod.announced());
        if let Some(at) = pod.ended_at {
            let seconds = at.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
            let time = Timestamp::from_second(i64::try_from(seconds).unwrap_or(i64::MAX)).ok();
            object.metadata.deletion_timestamp = time.map(Time);
        }
        self.objects.put("pod", &key.0, &key.1, &object);
    }

    fn write_services(&mut self) {
        let mut keep = BTreeSet::new();
        for service in self.plan.services.clone() {
            let namespace =
                service.metadata.namespace.clone().unwrap_or_else(|| "default".to_owned());
            let name = service.metadata.name.clone().unwrap_or_default();
            self.objects.put("service", &namespace, &name, &*service);
            keep.insert((namespace, name));
        }
        self.remove_others("service", &keep);
    }

    /// What Gateways needed beside pods and Services.
    fn write_made(&mut self) {
        let (mut deployments, mut accounts) = (BTreeSet::new(), BTreeSet::new());
        for Object { namespace, name, body, .. } in self.plan.made.clone() {
            match body {
                Body::Deployment(object) => {
                    self.objects.put("deployment", &namespace, &name, &*object);
                    deployments.insert((namespace.to_string(), name.to_string()));
                }
                Body::ServiceAccount(object) => {
                    self.objects.put("serviceaccount", &namespace, &name, &*object);
                    accounts.insert((namespace.to_string(), name.to_string()));
                }
                _ => {}
            }
        }
        self.remove_others("deployment", &deployments);
        self.remove_others("serviceaccount", &accounts);
    }

    fn remove_others(&mut self, kind: &str, keep: &BTreeSet<(String, String)>) {
        for key in self.objects.names(kind) {
            if !keep.contains(&key) {
                self.objects.remove(kind, &key.0, &key.1);
            }
        }
    }

    fn resolved(&self) -> Vec<Resolved> {
        let backend = |p: &'_ Pod| p.phase() != Phase::Succeeded && p.phase() != Phase::Failed;
        let backends: Vec<Backend<'_>> = self
            .pods
            .values()
            .filter(|p| backend(p))
            .map(|p| Backend { pod: &p.plan.pod, ips: &p.plan.ips, ready: p.ready() })
            .collect();
        endpoints::resolve(&self.plan.services, &backends)
    }

    /// `ExternalName` Services.
    fn aliases(&self) -> Vec<(String, String, String)> {
        let objects = self.folder.objects();
        let alias = |((namespace, name), s): (&(model::Str, model::Str), &compile::Sourced<_>)| {
            let s: &k8s_openapi::api::core::v1::Service = &s.value;
            let spec = s.spec.as_ref().filter(|s| s.type_.as_deref() == Some("ExternalName"))?;
            Some((namespace.to_string(), name.to_string(), spec.external_name.clone()?))
        };
        objects.services.iter().filter_map(alias).collect()
    }

    /// Everything there is to say about the folder. `found`: about its objects as they will be once all pods run, since what is only
    /// not ready yet is no fault.
    fn findings(&self, found: Vec<compile::Diagnostic>) -> Vec<compile::Diagnostic> {
        let mut all = found;
        all.extend(self.plan.diagnostics.iter().cloned());
        all.extend(self.folder.diagnostics());
        all.extend(self.folder_problems.iter().cloned());
        compile::sort_diagnostics(&mut all);
        all
    }

    /// Shows new complaints, about the folder and about the machine, and which are settled.
    pub(super) fn complain(&mut self, objects: &Objects) {
        let settled = self.plan.settled(objects);
        let compiled = self.compiler.compile(settled);
        let findings = self.findings(compiled.diagnostics);
        let texts = findings.iter().filter(|d| d.severity != Severity::Info);
        let mut now: BTreeSet<String> = texts.map(ToString::to_string).collect();
        now.extend(self.troubles.iter().cloned());
        for new in now.difference(&self.shown) {
            self.say(Event::Warning(new.clone()));
        }
        for old in self.shown.difference(&now) {
            self.say(Event::Resolved(old.clone()));
        }
        self.shown = now;
    }

    /// Something that could not be done and will be tried again.
    pub(super) fn trouble(&mut self, text: String) {
        tracing::warn!("{text}");
        self.troubles.insert(text);
    }

    pub(super) fn status(&self) -> Status {
        let settled = self.plan.settled(&self.folder.objects());
        let found = compile::compile(&settled, &MeshConfig::default()).diagnostics;
        let pods: Vec<PodStatus> =
            self.pods.iter().map(|(key, pod)| pod_status(key, pod, self.mesh.is_some())).collect();
        let nodes = self.network.nodes.iter().map(|n| NodeStatus {
            name: n.name.clone(),
            addresses: n.underlay.iter().map(ToString::to_string).collect(),
            pods: pods.iter().filter(|p| p.node == n.name).count(),
        });
        Status {
            name: self.config.info.name.clone(),
            dir: self.config.info.dir.display().to_string(),
            nodes: nodes.collect(),
            services: self.resolved().iter().map(service_status).collect(),
            // istiod-lite says how they are.
            waypoints: vec![],
            processes: self.mesh.as_ref().map(crate::mesh::Mesh::statuses).unwrap_or_default(),
            diagnostics: self.findings(found).iter().map(ToString::to_string).collect(),
            pods,
        }
    }
}

fn pod_status(key: &Key, pod: &Pod, mesh: bool) -> PodStatus {
    let containers = pod.last.as_ref().map(|r| r.containers.clone()).unwrap_or_default();
    // The first container that is not well says what the matter is.
    let worst = containers.iter().find(|c| !matches!(c.state.as_str(), "Running" | "Completed"));
    let unready = containers.iter().find(|c| !c.message.is_empty());
    let (state, message) = match (&pod.capture, worst) {
        _ if pod.ending => ("Terminating".to_owned(), String::new()),
        (Capture::Failed(why), _) => ("NotInMesh".to_owned(), why.clone()),
        (_, Some(c)) => (c.state.clone(), c.message.clone()),
        _ => (format!("{:?}", pod.phase()), unready.map(|c| c.message.clone()).unwrap_or_default()),
    };
    let identity = pod.captured().then(|| {
        let config = MeshConfig::default();
        model::Identity::new(config.trust_domain, key.0.as_str(), service_account(&pod.plan))
            .to_string()
    });
    PodStatus {
        namespace: key.0.clone(),
        name: key.1.clone(),
        node: pod.plan.node.to_string(),
        ips: pod.plan.ips.iter().map(IpAddr::to_string).collect(),
        state,
        message,
        ready: pod.ready(),
        restarts: containers.iter().map(|c| c.restarts).sum(),
        containers,
        captured: pod.captured(),
        enrolment: if mesh {
            pod.plan.enrolment.as_str().to_owned()
        } else {
            "this lab has no mesh".to_owned()
        },
        identity,
        origin: pod.plan.origin.clone(),
    }
}

fn service_status(service: &Resolved) -> ServiceStatus {
    let port = |p: &endpoints::Port| {
        let name = if p.name.is_empty() { String::new() } else { format!("{}:", p.name) };
        let udp = if p.protocol == net::service_nat::Protocol::Udp { "/UDP" } else { "" };
        format!("{name}{}{udp}", p.number)
    };
    ServiceStatus {
        namespace: service.namespace.clone(),
        name: service.name.clone(),
        addresses: service.vips.iter().map(ToString::to_string).collect(),
        ports: service.ports.iter().map(port).collect(),
        endpoints: service
            .endpoints
            .iter()
            .filter_map(|e| e.ips.first())
            .map(ToString::to_string)
            .collect(),
    }
}
