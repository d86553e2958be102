//! From a Pod object to what its containers are run with.
//!
//! Invariants: pure. What the local world cannot do is a [`Problem`] of that container, with a word and a sentence as
//! `kubectl` would show them; the rest of the pod goes on.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use k8s_openapi::api::core::v1::{
    Container, EnvVar, Pod, PodSecurityContext, PodSpec, Probe, SecurityContext, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::lifecycle::Millis;
use super::run::{ProcessRun, RootSource};
use super::volumes;
pub(crate) use super::volumes::{FileContent, VolumeContent, VolumePlan};

/// What a pod is run with, as far as it does not depend on this machine's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PodPlan {
    pub(crate) containers: Vec<ContainerPlan>,
    pub(crate) policy: RestartPolicy,
    pub(crate) hostname: String,
    /// Fully qualified name, for Services that give their pods names.
    pub(crate) fqdn: Option<String>,
    pub(crate) grace: Millis,
    /// Those that can be had here.
    pub(crate) volumes: Vec<VolumePlan>,
    /// Further names in `/etc/hosts`.
    pub(crate) host_aliases: Vec<(String, Vec<String>)>,
}

impl PodPlan {
    /// Whether a file of this kind is in one of its volumes.
    pub(crate) fn needs(&self, content: FileContent) -> bool {
        let files = self.volumes.iter().flat_map(|v| match &v.content {
            VolumeContent::Files(files) => files.as_slice(),
            VolumeContent::EmptyDir => &[],
        });
        files.into_iter().any(|(_, c)| *c == content)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ContainerPlan {
    pub(crate) name: String,
    pub(crate) init: bool,
    /// An init container that goes on running.
    pub(crate) sidecar: bool,
    pub(crate) process: Result<ProcessRun, Problem>,
    pub(crate) root: RootSource,
    /// Volume, path inside the volume, path in the container, read-only.
    pub(crate) mounts: Vec<Mount>,
    pub(crate) startup: Option<ProbePlan>,
    pub(crate) readiness: Option<ProbePlan>,
    pub(crate) liveness: Option<ProbePlan>,
    pub(crate) pre_stop: Option<ProbeAction>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    pub(crate) volume: String,
    pub(crate) sub_path: String,
    pub(crate) target: PathBuf,
    pub(crate) read_only: bool,
}

/// Why a container cannot be run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Problem {
    /// One word, as in `kubectl get pods`.
    pub(crate) reason: String,
    pub(crate) message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RestartPolicy {
    Always,
    OnFailure,
    Never,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ProbePlan {
    pub(crate) action: ProbeAction,
    pub(crate) initial_delay: Millis,
    pub(crate) period: Millis,
    pub(crate) timeout: Millis,
    pub(crate) success: u32,
    pub(crate) failure: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ProbeAction {
    Exec(Vec<String>),
    Http {
        port: u16,
        path: String,
        host: Option<String>,
        headers: Vec<(String, String)>,
    },
    Tcp {
        port: u16,
    },
    Sleep {
        millis: Millis,
    },
    /// Not done locally; the text says so each time.
    Unsupported(String),
}

/// What the plan depends on beside the object.
#[derive(Clone, Debug)]
pub(crate) struct Surroundings<'a> {
    pub(crate) node: &'a str,
    pub(crate) ips: &'a [IpAddr],
    /// Image name to what stands for it, and whether that is a folder.
    pub(crate) images: &'a BTreeMap<String, (PathBuf, bool)>,
}

/// The search path of a container whose image says nothing.
/// The last place is where the program of an executable image lies, so that `exec` finds it by its name.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/image";

/// Resolves a pod.
pub(crate) fn resolve(pod: &Pod, around: &Surroundings<'_>) -> PodPlan {
    let empty = PodSpec::default();
    let spec = pod.spec.as_ref().unwrap_or(&empty);
    let name = pod.metadata.name.clone().unwrap_or_default();
    let namespace = pod.metadata.namespace.clone().unwrap_or_else(|| "default".to_owned());
    let hostname = spec.hostname.clone().unwrap_or_else(|| name.clone());
    let fqdn =
        spec.subdomain.as_ref().map(|s| format!("{hostname}.{s}.{namespace}.svc.cluster.local"));
    let init = spec.init_containers.iter().flatten().map(|c| (c, true));
    let main = spec.containers.iter().map(|c| (c, false));
    let containers =
        init.chain(main).map(|(c, init)| container(pod, spec, c, init, around)).collect();
    let volumes = volumes::plan(spec).into_iter().filter_map(|(name, content)| {
        Some(VolumePlan { name: name.to_owned(), content: content.ok()? })
    });
    let aliases = spec.host_aliases.iter().flatten();
    PodPlan {
        containers,
        policy: match spec.restart_policy.as_deref() {
            Some("Never") => RestartPolicy::Never,
            Some("OnFailure") => RestartPolicy::OnFailure,
            _ => RestartPolicy::Always,
        },
        // The kernel takes 64 characters, Kubernetes cuts at 63.
        hostname: hostname.chars().take(63).collect(),
        fqdn,
        grace: seconds(spec.termination_grace_period_seconds, 30),
        volumes: volumes.collect(),
        host_aliases: aliases
            .map(|a| (a.ip.clone(), a.hostnames.clone().unwrap_or_default()))
            .collect(),
    }
}

fn container(
    pod: &Pod,
    spec: &PodSpec,
    c: &Container,
    init: bool,
    around: &Surroundings<'_>,
) -> ContainerPlan {
    let sidecar = init && c.restart_policy.as_deref() == Some("Always");
    let image = c.image.as_deref().unwrap_or_default();
    let root = match around.images.get(image) {
        Some((path, true)) => RootSource::Folder(path.clone()),
        Some((path, false)) => RootSource::Program(path.clone()),
        None => RootSource::Machine,
    };
    let probe = |p: &Option<Probe>| p.as_ref().map(|p| probe_plan(p, c));
    let hook = c.lifecycle.as_ref().and_then(|l| l.pre_stop.as_ref()).map(|h| {
        let sleep =
            h.sleep.as_ref().map(|s| ProbeAction::Sleep { millis: seconds(Some(s.seconds), 0) });
        sleep.unwrap_or_else(|| {
            action(h.exec.as_ref(), h.http_get.as_ref(), h.tcp_socket.as_ref(), c)
        })
    });
    ContainerPlan {
        name: c.name.clone(),
        init,
        sidecar,
        process: process(pod, spec, c, &root, around),
        root,
        mounts: c.volume_mounts.iter().flatten().map(|m| mount(m, spec)).collect(),
        startup: probe(&c.startup_probe),
        readiness: probe(&c.readiness_probe),
        liveness: probe(&c.liveness_probe),
        pre_stop: hook,
    }
}

fn process(
    pod: &Pod,
    spec: &PodSpec,
    c: &Container,
    root: &RootSource,
    around: &Surroundings<'_>,
) -> Result<ProcessRun, Problem> {
    let mut env: Vec<(String, String)> = vec![
        ("PATH".to_owned(), PATH.to_owned()),
        (
            "HOSTNAME".to_owned(),
            spec.hostname.clone().or_else(|| pod.metadata.name.clone()).unwrap_or_default(),
        ),
    ];
    if let Some(from) = c.env_from.as_ref().and_then(|f| f.first()) {
        let optional = from
            .config_map_ref
            .as_ref()
            .and_then(|r| r.optional)
            .or_else(|| from.secret_ref.as_ref().and_then(|r| r.optional));
        if optional != Some(true) {
            return Err(config_error(
                "envFrom: ConfigMaps and Secrets are not supported locally; write the values under env",
            ));
        }
    }
    for var in c.env.iter().flatten() {
        if let Some(value) = env_value(pod, spec, var, &env, around)? {
            env.retain(|(k, _)| *k != var.name);
            env.push((var.name.clone(), value));
        }
    }
    for (name, content) in volumes::plan(spec) {
        let used = c.volume_mounts.iter().flatten().any(|m| m.name == name);
        if let (true, Err(why)) = (used, content) {
            return Err(config_error(&format!("volume {name}: {why}")));
        }
    }
    for m in c.volume_mounts.iter().flatten() {
        if !spec.volumes.iter().flatten().any(|v| v.name == m.name) {
            return Err(config_error(&format!(
                "volumeMounts names volume {}, which the pod does not have",
                m.name
            )));
        }
        if [m.sub_path.as_deref(), Some(m.mount_path.as_str())]
            .into_iter()
            .flatten()
            .any(|p| p.split('/').any(|s| s == ".."))
        {
            return Err(config_error(&format!("volumeMounts of {}: a path with '..'", m.name)));
        }
    }
    let argv = argv(c, root, &env)?;
    let (uid, gid, groups) = user(spec.security_context.as_ref(), c.security_context.as_ref())?;
    Ok(ProcessRun { argv, env, cwd: c.working_dir.clone().unwrap_or_default(), uid, gid, groups })
}

fn argv(
    c: &Container,
    root: &RootSource,
    env: &[(String, String)],
) -> Result<Vec<String>, Problem> {
    let mut argv: Vec<String> = c.command.iter().flatten().map(|a| expand(a, env)).collect();
    if argv.is_empty() {
        let image = c.image.as_deref().unwrap_or("");
        match root {
            RootSource::Program(path) => {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                argv.push(format!("{}/{name}", super::run::PROGRAM_DIR));
            }
            RootSource::Folder(_) => {
                return Err(Problem {
                    reason: "CommandMissing".to_owned(),
                    message: format!(
                        "image {image:?} stands for a folder, which does not say what to run: give the container a command"
                    ),
                });
            }
            RootSource::Machine => {
                return Err(Problem {
                    reason: "ImageUnknown".to_owned(),
                    message: format!(
                        "images are not downloaded: give the container a command, or start with --image {image}=PATH"
                    ),
                });
            }
        }
    }
    argv.extend(c.args.iter().flatten().map(|a| expand(a, env)));
    Ok(argv)
}

fn env_value(
    pod: &Pod,
    spec: &PodSpec,
    var: &EnvVar,
    so_far: &[(String, String)],
    around: &Surroundings<'_>,
) -> Result<Option<String>, Problem> {
    let Some(from) = &var.value_from else {
        return Ok(Some(expand(var.value.as_deref().unwrap_or_default(), so_far)));
    };
    if let Some(field) = &from.field_ref {
        return field_value(pod, spec, &field.field_path, around).map(Some).ok_or_else(|| {
            config_error(&format!(
                "env {}: fieldRef {:?} is not known here",
                var.name, field.field_path
            ))
        });
    }
    let optional = from
        .config_map_key_ref
        .as_ref()
        .and_then(|r| r.optional)
        .or_else(|| from.secret_key_ref.as_ref().and_then(|r| r.optional));
    if optional == Some(true) {
        return Ok(None);
    }
    Err(config_error(&format!(
        "env {}: only value and fieldRef are supported locally; ConfigMaps and Secrets are not",
        var.name
    )))
}

/// The downward API.
fn field_value(pod: &Pod, spec: &PodSpec, path: &str, around: &Surroundings<'_>) -> Option<String> {
    let ip = || around.ips.first().map(ToString::to_string).unwrap_or_default();
    let key = |prefix: &str| path.strip_prefix(prefix)?.strip_suffix("']").map(str::to_owned);
    Some(match path {
        "metadata.name" => pod.metadata.name.clone()?,
        "metadata.namespace" => {
            pod.metadata.namespace.clone().unwrap_or_else(|| "default".to_owned())
        }
        "metadata.uid" => pod.metadata.uid.clone().unwrap_or_default(),
        "spec.nodeName" => around.node.to_owned(),
        "spec.serviceAccountName" => {
            spec.service_account_name.clone().unwrap_or_else(|| "default".to_owned())
        }
        "status.podIP" => ip(),
        "status.podIPs" => around.ips.iter().map(ToString::to_string).collect::<Vec<_>>().join(","),
        _ => {
            let map = if let Some(k) = key("metadata.labels['") {
                (pod.metadata.labels.as_ref(), k)
            } else {
                (pod.metadata.annotations.as_ref(), key("metadata.annotations['")?)
            };
            map.0.and_then(|m| m.get(&map.1)).cloned().unwrap_or_default()
        }
    })
}

/// `$(NAME)` becomes the variable's value, `$$` a dollar; what is not known stays as it is.
fn expand(text: &str, env: &[(String, String)]) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let tail = &rest[at + 1..];
        if let Some(after) = tail.strip_prefix('$') {
            out.push('$');
            rest = after;
            continue;
        }
        let named = tail.strip_prefix('(').and_then(|t| t.split_once(')'));
        let value = named.and_then(|(name, after)| {
            Some((env.iter().find(|(k, _)| k == name)?.1.as_str(), after))
        });
        match value {
            Some((value, after)) => {
                out.push_str(value);
                rest = after;
            }
            None => {
                out.push('$');
                rest = tail;
            }
        }
    }
    out.push_str(rest);
    out
}

fn user(
    pod: Option<&PodSecurityContext>,
    own: Option<&SecurityContext>,
) -> Result<(u32, u32, Vec<u32>), Problem> {
    let id = |what: &str, n: Option<i64>| {
        n.map(|n| {
            u32::try_from(n)
                .map_err(|_| config_error(&format!("{what} {n} is not a user or group id")))
        })
        .transpose()
    };
    let uid = id(
        "runAsUser",
        own.and_then(|s| s.run_as_user).or_else(|| pod.and_then(|p| p.run_as_user)),
    )?;
    let gid = id(
        "runAsGroup",
        own.and_then(|s| s.run_as_group).or_else(|| pod.and_then(|p| p.run_as_group)),
    )?;
    let non_root =
        own.and_then(|s| s.run_as_non_root).or_else(|| pod.and_then(|p| p.run_as_non_root));
    if non_root == Some(true) && uid.unwrap_or(0) == 0 {
        return Err(config_error(
            "runAsNonRoot is set and no runAsUser: locally, containers run as root unless told otherwise",
        ));
    }
    let mut groups = vec![];
    for n in pod.and_then(|p| p.supplemental_groups.as_ref()).into_iter().flatten().copied() {
        groups.extend(id("supplementalGroups", Some(n))?);
    }
    groups.extend(id("fsGroup", pod.and_then(|p| p.fs_group))?);
    Ok((uid.unwrap_or(0), gid.unwrap_or(0), groups))
}

fn mount(m: &VolumeMount, spec: &PodSpec) -> Mount {
    let kept_by_lab = volumes::plan(spec)
        .into_iter()
        .any(|(name, content)| name == m.name && content.is_ok_and(|c| c.is_kept_by_lab()));
    Mount {
        volume: m.name.clone(),
        sub_path: m.sub_path.clone().unwrap_or_default(),
        target: PathBuf::from("/").join(&m.mount_path),
        read_only: kept_by_lab || m.read_only.unwrap_or(false),
    }
}

fn probe_plan(p: &Probe, c: &Container) -> ProbePlan {
    let count = |n: Option<i32>, default: u32| {
        n.and_then(|n| u32::try_from(n).ok()).filter(|n| *n > 0).unwrap_or(default)
    };
    let millis = |n: Option<i32>, default: u32| Millis::from(count(n, default)) * 1000;
    let action = if let Some(grpc) = &p.grpc {
        ProbeAction::Unsupported(format!(
            "grpc probe of port {}: not supported locally, use tcpSocket",
            grpc.port
        ))
    } else {
        action(p.exec.as_ref(), p.http_get.as_ref(), p.tcp_socket.as_ref(), c)
    };
    ProbePlan {
        action,
        initial_delay: p.initial_delay_seconds.and_then(|n| u64::try_from(n).ok()).unwrap_or(0)
            * 1000,
        period: millis(p.period_seconds, 10),
        timeout: millis(p.timeout_seconds, 1),
        success: count(p.success_threshold, 1),
        failure: count(p.failure_threshold, 3),
    }
}

fn action(
    exec: Option<&k8s_openapi::api::core::v1::ExecAction>,
    http: Option<&k8s_openapi::api::core::v1::HTTPGetAction>,
    tcp: Option<&k8s_openapi::api::core::v1::TCPSocketAction>,
    c: &Container,
) -> ProbeAction {
    let unknown = |p: &IntOrString| {
        let p = match p {
            IntOrString::Int(n) => n.to_string(),
            IntOrString::String(s) => s.clone(),
        };
        ProbeAction::Unsupported(format!("the container has no port {p:?}"))
    };
    if let Some(exec) = exec {
        return ProbeAction::Exec(exec.command.clone().unwrap_or_default());
    }
    if let Some(get) = http {
        if get.scheme.as_deref() == Some("HTTPS") {
            return ProbeAction::Unsupported(
                "httpGet with scheme HTTPS is not supported locally, use tcpSocket".to_owned(),
            );
        }
        let headers =
            get.http_headers.iter().flatten().map(|h| (h.name.clone(), h.value.clone())).collect();
        let path = get.path.clone().filter(|p| !p.is_empty()).unwrap_or_else(|| "/".to_owned());
        return port(&get.port, c).map_or_else(
            || unknown(&get.port),
            |port| ProbeAction::Http { port, path, host: get.host.clone(), headers },
        );
    }
    if let Some(tcp) = tcp {
        return port(&tcp.port, c)
            .map_or_else(|| unknown(&tcp.port), |port| ProbeAction::Tcp { port });
    }
    ProbeAction::Unsupported("the probe says neither exec, httpGet nor tcpSocket".to_owned())
}

fn port(port: &IntOrString, c: &Container) -> Option<u16> {
    match port {
        IntOrString::Int(n) => u16::try_from(*n).ok().filter(|n| *n > 0),
        IntOrString::String(name) => {
            let found = c.ports.iter().flatten().find(|p| p.name.as_ref() == Some(name))?;
            u16::try_from(found.container_port).ok()
        }
    }
}

fn seconds(n: Option<i64>, default: u64) -> Millis {
    n.map_or(default, |n| u64::try_from(n).unwrap_or(0)).saturating_mul(1000)
}

fn config_error(message: &str) -> Problem {
    Problem { reason: "CreateContainerConfigError".to_owned(), message: message.to_owned() }
}

#[cfg(test)]
#[path = "resolve/tests.rs"]
mod tests;
