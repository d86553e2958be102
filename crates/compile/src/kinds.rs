//! Which kinds exist, which of them this version handles, and what it means when one is not.

use crate::ambit;
use crate::istio::unserved;

/// What this version does with objects of a kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Handling {
    Handled(Kind),
    /// The kind exists; its absence changes nothing for the mesh.
    Harmless,
    /// The kind exists, and the user will miss what it does.
    Missed(&'static str),
    /// The group is known, but not with this version or kind: most likely a slip.
    Slip,
    /// Somebody else's kind, which no cluster of ours serves.
    Foreign,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    List,
    Namespace,
    Node,
    ServiceAccount,
    Pod,
    Deployment,
    Service,
    AuthorizationPolicy,
    PeerAuthentication,
    HttpRoute,
    GrpcRoute,
    Gateway,
    GatewayClass,
    ReferenceGrant,
    VirtualService,
    DestinationRule,
    HttpFault,
}

impl Kind {
    pub(crate) fn has_namespace(self) -> bool {
        !matches!(self, Self::Namespace | Self::Node | Self::List | Self::GatewayClass)
    }

    /// A policy protects, and a match narrows, only when every word of it is understood.
    pub(crate) fn is_strict(self) -> bool {
        let ours = matches!(
            self,
            Self::AuthorizationPolicy
                | Self::PeerAuthentication
                | Self::VirtualService
                | Self::DestinationRule
                | Self::HttpFault
        );
        ours || self.is_gateway_api()
    }

    pub(crate) fn is_gateway_api(self) -> bool {
        matches!(
            self,
            Self::HttpRoute
                | Self::GrpcRoute
                | Self::Gateway
                | Self::GatewayClass
                | Self::ReferenceGrant
        )
    }
}

const NO_PODS: &str = "its pods are not started; use a Deployment or a Pod";

/// `group` is empty for the core group.
pub(crate) fn handling(group: &str, version: &str, kind: &str) -> Handling {
    use Handling::{Foreign, Handled, Harmless, Missed, Slip};
    if let Some(instead) = unserved::instead(group, kind) {
        return Missed(instead);
    }
    match (group, version, kind) {
        ("", "v1", "List") => Handled(Kind::List),
        ("", "v1", "Namespace") => Handled(Kind::Namespace),
        ("", "v1", "Node") => Handled(Kind::Node),
        ("", "v1", "ServiceAccount") => Handled(Kind::ServiceAccount),
        ("", "v1", "Pod") => Handled(Kind::Pod),
        ("apps", "v1", "Deployment") => Handled(Kind::Deployment),
        ("", "v1", "Service") => Handled(Kind::Service),
        ("security.istio.io", "v1" | "v1beta1", "AuthorizationPolicy") => {
            Handled(Kind::AuthorizationPolicy)
        }
        ("security.istio.io", "v1" | "v1beta1", "PeerAuthentication") => {
            Handled(Kind::PeerAuthentication)
        }
        ("gateway.networking.k8s.io", ..) => gateway_api(version, kind),
        ("networking.istio.io", "v1" | "v1beta1" | "v1alpha3", "VirtualService") => {
            Handled(Kind::VirtualService)
        }
        ("networking.istio.io", "v1" | "v1beta1" | "v1alpha3", "DestinationRule") => {
            Handled(Kind::DestinationRule)
        }
        (ambit::GROUP, ambit::VERSION, "HTTPFault") => Handled(Kind::HttpFault),
        ("", "v1", "ReplicationController")
        | ("apps", "v1", "StatefulSet" | "DaemonSet" | "ReplicaSet")
        | ("batch", "v1", "Job" | "CronJob") => Missed(NO_PODS),
        ("", "v1", "ConfigMap" | "Secret" | "PersistentVolumeClaim") => {
            Missed("pods that mount it will not find it")
        }
        ("", "v1", "Endpoints") | ("discovery.k8s.io", "v1", "EndpointSlice") => {
            Missed("endpoints come from pods only")
        }
        (
            "",
            "v1",
            "PersistentVolume" | "LimitRange" | "ResourceQuota" | "Event" | "PodTemplate"
            | "Binding",
        ) => Harmless,
        ("apps", "v1", "ControllerRevision") => Harmless,
        ("networking.k8s.io", _, "NetworkPolicy") => {
            Missed("it is not enforced; use an AuthorizationPolicy")
        }
        ("networking.k8s.io", _, "Ingress") => Missed("nothing serves it"),
        ("gateway.networking.x-k8s.io", ..) => Missed("nothing serves it"),
        (
            ""
            | "apps"
            | "batch"
            | "security.istio.io"
            | "discovery.k8s.io"
            | "extensions"
            | ambit::GROUP,
            ..,
        ) => Slip,
        (group, ..) if unserved::GROUPS.contains(&group) => Slip,
        (group, ..) if HARMLESS_GROUPS.contains(&group) => Harmless,
        _ => Foreign,
    }
}

/// What of them is not handled above changes nothing for the mesh.
const HARMLESS_GROUPS: [&str; 16] = [
    "networking.k8s.io",
    "policy",
    "autoscaling",
    "rbac.authorization.k8s.io",
    "storage.k8s.io",
    "scheduling.k8s.io",
    "coordination.k8s.io",
    "apiextensions.k8s.io",
    "admissionregistration.k8s.io",
    "apiregistration.k8s.io",
    "certificates.k8s.io",
    "events.k8s.io",
    "flowcontrol.apiserver.k8s.io",
    "node.k8s.io",
    "resource.k8s.io",
    "metrics.k8s.io",
];

fn gateway_api(version: &str, kind: &str) -> Handling {
    let kind = match (version, kind) {
        ("v1" | "v1beta1", "HTTPRoute") => Kind::HttpRoute,
        ("v1", "GRPCRoute") => Kind::GrpcRoute,
        ("v1" | "v1beta1", "Gateway") => Kind::Gateway,
        ("v1" | "v1beta1", "GatewayClass") => Kind::GatewayClass,
        ("v1" | "v1beta1", "ReferenceGrant") => Kind::ReferenceGrant,
        (_, "TCPRoute" | "TLSRoute" | "UDPRoute" | "ListenerSet" | "BackendTLSPolicy") => {
            return Handling::Missed("nothing serves it");
        }
        _ => return Handling::Slip,
    };
    Handling::Handled(kind)
}

/// The `apiVersion` a handled kind should have been written with.
pub(crate) fn served_version(kind: &str) -> Option<&'static str> {
    Some(match kind {
        "List" | "Namespace" | "Node" | "ServiceAccount" | "Pod" | "Service" => "v1",
        "Deployment" => "apps/v1",
        "AuthorizationPolicy" | "PeerAuthentication" => "security.istio.io/v1",
        "HTTPRoute" | "GRPCRoute" | "Gateway" | "GatewayClass" | "ReferenceGrant" => {
            "gateway.networking.k8s.io/v1"
        }
        "VirtualService" | "DestinationRule" => "networking.istio.io/v1",
        "HTTPFault" => "ambit.io/v1alpha1",
        _ => return None,
    })
}
