//! Which pods belong to the mesh.
//!
//! The label `istio.io/dataplane-mode` on the pod decides, else the one on its namespace. Some pods are
//! never captured, whatever the labels say.

use k8s_openapi::api::core::v1::{Namespace, Pod};

use crate::object::Meta;

/// The label that enrols a namespace or a pod.
pub const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";
/// The annotation that says a pod's traffic is captured.
pub const REDIRECTION: &str = "ambient.istio.io/redirection";

/// The annotation by which a pod says whether its DNS questions go to the proxy.
pub const DNS_CAPTURE: &str = "ambient.istio.io/dns-capture";

/// Should the pod be captured, and if not, why not?
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Enrolment {
    Enrolled,
    /// Neither the pod nor its namespace asks for it.
    NotLabelled,
    /// The pod's label says something other than `ambient`.
    OptedOut,
    /// The pod has no network of its own.
    HostNetwork,
    /// A system namespace, which the mesh itself needs.
    SystemNamespace,
    /// The pod brings its own proxy.
    Sidecar,
}

impl Enrolment {
    pub fn is_enrolled(self) -> bool {
        self == Self::Enrolled
    }

    /// For people: why the pod is in the mesh or not.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Enrolled => "labelled istio.io/dataplane-mode: ambient",
            Self::NotLabelled => "no label istio.io/dataplane-mode: ambient on pod or namespace",
            Self::OptedOut => "the pod's label istio.io/dataplane-mode opts out",
            Self::HostNetwork => "hostNetwork pods are never captured",
            Self::SystemNamespace => "pods in kube-system are never captured",
            Self::Sidecar => "the pod has a sidecar (annotation sidecar.istio.io/status)",
        }
    }
}

/// Decides on one pod. `namespace`: its Namespace object, if there is one.
pub fn enrolment(namespace: Option<&Namespace>, pod: &Pod) -> Enrolment {
    if pod.spec.as_ref().is_some_and(|spec| spec.host_network == Some(true)) {
        return Enrolment::HostNetwork;
    }
    if pod.metadata.namespace.as_deref() == Some("kube-system") {
        return Enrolment::SystemNamespace;
    }
    if pod.annotation("sidecar.istio.io/status").is_some() {
        return Enrolment::Sidecar;
    }
    match pod.label(DATAPLANE_MODE) {
        Some("ambient") => Enrolment::Enrolled,
        // Any other word is not a mode we know: the pod did not ask for ours.
        Some(_) => Enrolment::OptedOut,
        None if namespace.and_then(|ns| ns.label(DATAPLANE_MODE)) == Some("ambient") => {
            Enrolment::Enrolled
        }
        None => Enrolment::NotLabelled,
    }
}

/// Whether the DNS questions of a captured pod go to the proxy: unless its annotation says `false`.
pub fn captures_dns(pod: &Pod) -> bool {
    pod.annotation(DNS_CAPTURE) != Some("false")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_false_keeps_questions_from_the_proxy() {
        let check = |value: Option<&str>, want: bool| {
            let mut pod = Pod::default();
            if let Some(value) = value {
                let annotations = pod.metadata.annotations.get_or_insert_default();
                annotations.insert(DNS_CAPTURE.to_owned(), value.to_owned());
            }
            assert_eq!(captures_dns(&pod), want, "{value:?}");
        };
        check(None, true);
        check(Some("true"), true);
        check(Some("false"), false);
        check(Some("False"), true);
    }
}
