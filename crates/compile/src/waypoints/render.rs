//! The objects that run a waypoint: a ServiceAccount, a Deployment and a Service of the Gateway's name.
//!
//! Names, labels and ports are Istio's, so that its tools find what they look for. Nothing secret is in them: the pod
//! proves itself with the token that its node puts into a file.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec};
use k8s_openapi::api::core::v1::{
    Capabilities, ConfigMapVolumeSource, Container, ContainerPort, EmptyDirVolumeSource, EnvVar,
    EnvVarSource, HTTPGetAction, KeyToPath, ObjectFieldSelector, PodSecurityContext, PodSpec,
    PodTemplateSpec, Probe, ProjectedVolumeSource, ResourceRequirements, SecurityContext, Service,
    ServiceAccount, ServiceAccountTokenProjection, ServicePort, ServiceSpec, Volume, VolumeMount,
    VolumeProjection,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use model::Str;

use super::{GATEWAY_CLASS_NAME, GATEWAY_NAME, HBONE_PORT, Waypoint};
use crate::enrolment::DATAPLANE_MODE;
use crate::object::{Body, ORIGIN_ANNOTATION, Object, Origin};

/// Who made an object for a Gateway, in Istio's words.
const MANAGED: &str = "gateway.istio.io/managed";
const MANAGED_BY: &str = "istio.io-mesh-controller";
const STATUS_PORT: i32 = 15021;
const METRICS_PORT: i32 = 15020;
/// Where a pod finds its token and the root, as in Istio.
const TOKEN_DIR: &str = "/var/run/secrets/tokens";
const TOKEN_FILE: &str = "istio-token";
const ROOT_DIR: &str = "/var/run/secrets/istio";
const ROOT_FILE: &str = "root-cert.pem";
/// The ConfigMap with the root that every namespace has.
const ROOT_CONFIG_MAP: &str = "istio-ca-root-cert";
/// For whom the token is.
const AUDIENCE: &str = "istio-ca";
/// A node replaces the token long before.
const TOKEN_SECONDS: i64 = 12 * 3600;
const STATE_DIR: &str = "/var/lib/ambit";
const SECRET_DIR: &str = "/var/run/ambit";
/// Istio's user for proxies.
const USER: i64 = 1337;
/// How long a pod that is told to go has, and how much of it connections get: the rest is for saying goodbye.
const GRACE_SECONDS: i64 = 30;
const DRAIN_SECONDS: i64 = 25;

/// What is the same for every waypoint of a mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    pub image: Str,
    /// `https://HOST:PORT` of the control plane, and the name in its certificate.
    pub xds_address: Str,
    pub xds_server_name: Str,
    pub trust_domain: Str,
    pub cluster: Str,
    pub network: Str,
    /// More variables and their values, for what the Gateway has no word for: where spans go. Nothing secret.
    pub environment: Vec<(Str, Str)>,
}

impl Settings {
    /// The image that stands for the program `waypoint` of this version.
    pub const IMAGE: &'static str = "ambit/waypoint";
    pub const XDS_SERVER_NAME: &'static str = "istiod.istio-system.svc";
}

/// What runs a waypoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Rendered {
    pub service_account: ServiceAccount,
    pub deployment: Deployment,
    pub service: Service,
}

impl Rendered {
    /// As objects that come from the Gateway's place.
    pub fn objects(self, origin: &Origin) -> [Object; 3] {
        let meta = |m: &ObjectMeta| {
            let text = |t: &Option<String>| t.as_deref().unwrap_or_default().into();
            (text(&m.namespace), text(&m.name))
        };
        // Fields of the Gateway are not fields of these objects.
        let origin = Origin::new(origin.file.clone(), origin.line);
        let object = |(namespace, name): (Str, Str), body| Object {
            namespace,
            name,
            origin: origin.clone(),
            body,
        };
        let Self { service_account, deployment, service } = self;
        [
            object(meta(&service_account.metadata), Body::ServiceAccount(service_account.into())),
            object(meta(&deployment.metadata), Body::Deployment(deployment.into())),
            object(meta(&service.metadata), Body::Service(service.into())),
        ]
    }
}

/// Whether an object was made for this Gateway.
pub(crate) fn is_made_for(metadata: &ObjectMeta, gateway: &str) -> bool {
    let label = |name| metadata.labels.as_ref().and_then(|l| l.get(name)).map(String::as_str);
    label(GATEWAY_NAME) == Some(gateway) && label(MANAGED) == Some(MANAGED_BY)
}

/// The objects of a waypoint that is accepted.
pub fn render(waypoint: &Waypoint<'_>, settings: &Settings) -> Rendered {
    Rendered {
        service_account: ServiceAccount {
            metadata: metadata(waypoint),
            ..ServiceAccount::default()
        },
        deployment: deployment(waypoint, settings),
        service: service(waypoint),
    }
}

/// Name, labels and annotations of every object.
fn metadata(waypoint: &Waypoint<'_>) -> ObjectMeta {
    let (namespace, name) = waypoint.key;
    let origin = waypoint.sourced.origin.to_string();
    let mut annotations = infrastructure(waypoint).1;
    annotations.insert(ORIGIN_ANNOTATION.to_owned(), origin);
    ObjectMeta {
        namespace: Some(namespace.to_string()),
        name: Some(name.to_string()),
        labels: Some(labels(waypoint)),
        annotations: Some(annotations),
        ..ObjectMeta::default()
    }
}

fn labels(waypoint: &Waypoint<'_>) -> BTreeMap<String, String> {
    let mut labels = infrastructure(waypoint).0;
    labels.extend(selector(waypoint));
    let class = &waypoint.sourced.value.spec.gateway_class_name;
    for (name, value) in
        [(GATEWAY_CLASS_NAME, class.as_str()), (MANAGED, MANAGED_BY), (DATAPLANE_MODE, "none")]
    {
        labels.insert(name.to_owned(), value.to_owned());
    }
    labels
}

fn selector(waypoint: &Waypoint<'_>) -> BTreeMap<String, String> {
    [(GATEWAY_NAME.to_owned(), waypoint.key.1.to_string())].into()
}

/// What the user wants on everything that is made for the Gateway: labels and annotations.
fn infrastructure(waypoint: &Waypoint<'_>) -> (BTreeMap<String, String>, BTreeMap<String, String>) {
    let wished = waypoint.sourced.value.spec.infrastructure.clone().unwrap_or_default();
    (wished.labels.unwrap_or_default(), wished.annotations.unwrap_or_default())
}

fn service(waypoint: &Waypoint<'_>) -> Service {
    let port = |name: &str, number: i32, protocol: Option<&str>| ServicePort {
        name: Some(name.to_owned()),
        port: number,
        protocol: Some("TCP".to_owned()),
        app_protocol: protocol.map(str::to_owned),
        ..ServicePort::default()
    };
    Service {
        metadata: metadata(waypoint),
        spec: Some(ServiceSpec {
            // Clients of either family reach it, where the cluster has both.
            ip_family_policy: Some("PreferDualStack".to_owned()),
            selector: Some(selector(waypoint)),
            ports: Some(vec![
                port("mesh", i32::from(HBONE_PORT), Some("hbone")),
                port("status", STATUS_PORT, None),
            ]),
            type_: Some("ClusterIP".to_owned()),
            ..ServiceSpec::default()
        }),
        status: None,
    }
}

fn deployment(waypoint: &Waypoint<'_>, settings: &Settings) -> Deployment {
    let mut pod_labels = labels(waypoint);
    let name = waypoint.key.1.to_string();
    for (label, value) in [
        // It ends HBONE itself: no ztunnel stands before it.
        ("networking.istio.io/tunnel", "http"),
        ("service.istio.io/canonical-name", name.as_str()),
        ("service.istio.io/canonical-revision", "latest"),
    ] {
        pod_labels.insert(label.to_owned(), value.to_owned());
    }
    let mut annotations = infrastructure(waypoint).1;
    let port = METRICS_PORT.to_string();
    for (annotation, value) in [("scrape", "true"), ("port", port.as_str()), ("path", "/metrics")] {
        annotations.insert(format!("prometheus.io/{annotation}"), value.to_owned());
    }
    let template = PodTemplateSpec {
        metadata: Some(ObjectMeta {
            labels: Some(pod_labels),
            annotations: Some(annotations),
            ..ObjectMeta::default()
        }),
        spec: Some(pod(waypoint, settings)),
    };
    Deployment {
        metadata: metadata(waypoint),
        spec: Some(DeploymentSpec {
            replicas: Some(waypoint.replicas),
            selector: LabelSelector {
                match_labels: Some(selector(waypoint)),
                ..LabelSelector::default()
            },
            template,
            ..DeploymentSpec::default()
        }),
        status: None,
    }
}

fn pod(waypoint: &Waypoint<'_>, settings: &Settings) -> PodSpec {
    PodSpec {
        service_account_name: Some(waypoint.key.1.to_string()),
        // What it needs of the API server comes through the control plane.
        automount_service_account_token: Some(false),
        termination_grace_period_seconds: Some(GRACE_SECONDS),
        security_context: Some(PodSecurityContext {
            run_as_non_root: Some(true),
            run_as_user: Some(USER),
            run_as_group: Some(USER),
            fs_group: Some(USER),
            ..PodSecurityContext::default()
        }),
        containers: vec![container(settings)],
        volumes: Some(volumes()),
        ..PodSpec::default()
    }
}

fn container(settings: &Settings) -> Container {
    let mount = |name: &str, path: &str, read_only: bool| VolumeMount {
        name: name.to_owned(),
        mount_path: path.to_owned(),
        read_only: read_only.then_some(true),
        ..VolumeMount::default()
    };
    let port = |name: &str, number: i32| ContainerPort {
        name: Some(name.to_owned()),
        container_port: number,
        protocol: Some("TCP".to_owned()),
        ..ContainerPort::default()
    };
    let quantities = |all: &[(&str, &str)]| {
        Some(all.iter().map(|(k, v)| ((*k).to_owned(), Quantity((*v).to_owned()))).collect())
    };
    Container {
        name: "waypoint".to_owned(),
        image: Some(settings.image.to_string()),
        args: Some(args(settings)),
        env: Some(env(settings)),
        ports: Some(vec![
            port("mesh", i32::from(HBONE_PORT)),
            port("metrics", METRICS_PORT),
            port("status", STATUS_PORT),
        ]),
        readiness_probe: Some(Probe {
            http_get: Some(HTTPGetAction {
                path: Some("/healthz/ready".to_owned()),
                port: IntOrString::Int(STATUS_PORT),
                ..HTTPGetAction::default()
            }),
            period_seconds: Some(1),
            failure_threshold: Some(3),
            ..Probe::default()
        }),
        // 5,000 routes take 40 MB; what is beyond the limit is a leak. No limit of CPU: it would only add latency.
        resources: Some(ResourceRequirements {
            requests: quantities(&[("cpu", "100m"), ("memory", "64Mi")]),
            limits: quantities(&[("memory", "512Mi")]),
            ..ResourceRequirements::default()
        }),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            capabilities: Some(Capabilities {
                drop: Some(vec!["ALL".to_owned()]),
                ..Capabilities::default()
            }),
            privileged: Some(false),
            read_only_root_filesystem: Some(true),
            ..SecurityContext::default()
        }),
        volume_mounts: Some(vec![
            mount("istio-token", TOKEN_DIR, true),
            mount("istio-ca-root-cert", ROOT_DIR, true),
            mount("state", STATE_DIR, false),
            mount("secrets", SECRET_DIR, false),
        ]),
        ..Container::default()
    }
}

/// What is not in the environment.
fn args(settings: &Settings) -> Vec<String> {
    let args = [
        "proxy",
        "--xds-server-name",
        &settings.xds_server_name,
        "--state-dir",
        STATE_DIR,
        "--secret-dir",
        SECRET_DIR,
        "--drain-seconds",
        &DRAIN_SECONDS.to_string(),
    ];
    args.map(str::to_owned).to_vec()
}

fn env(settings: &Settings) -> Vec<EnvVar> {
    let of_field = |(name, path): (&str, &str)| EnvVar {
        name: name.to_owned(),
        value_from: Some(EnvVarSource {
            field_ref: Some(ObjectFieldSelector {
                field_path: path.to_owned(),
                ..ObjectFieldSelector::default()
            }),
            ..EnvVarSource::default()
        }),
        ..EnvVar::default()
    };
    let plain = |(name, value): (&str, &str)| EnvVar {
        name: name.to_owned(),
        value: Some(value.to_owned()),
        ..EnvVar::default()
    };
    let fields = [
        ("POD_NAME", "metadata.name"),
        ("POD_NAMESPACE", "metadata.namespace"),
        ("SERVICE_ACCOUNT", "spec.serviceAccountName"),
        ("NODE_NAME", "spec.nodeName"),
        ("INSTANCE_IP", "status.podIP"),
    ];
    let (root, token) = (format!("{ROOT_DIR}/{ROOT_FILE}"), format!("{TOKEN_DIR}/{TOKEN_FILE}"));
    let values = [
        ("XDS_ADDRESS", &*settings.xds_address),
        ("ROOT_CERT", &root),
        ("TOKEN_FILE", &token),
        ("TRUST_DOMAIN", &settings.trust_domain),
        ("CLUSTER_ID", &settings.cluster),
        ("NETWORK", &settings.network),
    ];
    let more = settings.environment.iter().map(|(name, value)| (&**name, &**value));
    let values = values.into_iter().chain(more).map(plain);
    fields.into_iter().map(of_field).chain(values).collect()
}

fn volumes() -> Vec<Volume> {
    let volume = |name: &str| Volume { name: name.to_owned(), ..Volume::default() };
    let token = ServiceAccountTokenProjection {
        audience: Some(AUDIENCE.to_owned()),
        expiration_seconds: Some(TOKEN_SECONDS),
        path: TOKEN_FILE.to_owned(),
    };
    let projection =
        VolumeProjection { service_account_token: Some(token), ..VolumeProjection::default() };
    let empty = |medium: Option<&str>| EmptyDirVolumeSource {
        medium: medium.map(str::to_owned),
        ..EmptyDirVolumeSource::default()
    };
    vec![
        Volume {
            projected: Some(ProjectedVolumeSource {
                sources: Some(vec![projection]),
                ..ProjectedVolumeSource::default()
            }),
            ..volume("istio-token")
        },
        Volume {
            config_map: Some(ConfigMapVolumeSource {
                name: ROOT_CONFIG_MAP.to_owned(),
                items: Some(vec![KeyToPath {
                    key: ROOT_FILE.to_owned(),
                    path: ROOT_FILE.to_owned(),
                    mode: None,
                }]),
                ..ConfigMapVolumeSource::default()
            }),
            ..volume("istio-ca-root-cert")
        },
        Volume { empty_dir: Some(empty(None)), ..volume("state") },
        // Keys never reach a disk.
        Volume { empty_dir: Some(empty(Some("Memory"))), ..volume("secrets") },
    ]
}
