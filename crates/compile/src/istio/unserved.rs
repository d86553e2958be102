//! Kinds of Istio's that exist and that nothing here serves: seen, named, and what to use instead.

/// The API groups whose kinds are all known here, so that another one is a slip.
pub const GROUPS: [&str; 4] =
    ["networking.istio.io", "telemetry.istio.io", "extensions.istio.io", "install.istio.io"];

/// A kind that is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unserved {
    pub group: &'static str,
    pub kind: &'static str,
    /// Why not, or what to use instead.
    pub instead: &'static str,
}

/// All of them. Any version counts: what it would say is not read.
pub const UNSERVED: &[Unserved] = &[
    unserved(
        "networking.istio.io",
        "EnvoyFilter",
        "there is no Envoy to patch; use HTTPRoute, VirtualService or AuthorizationPolicy",
    ),
    unserved(
        "networking.istio.io",
        "Sidecar",
        "there are no sidecars; to limit who may call whom use an AuthorizationPolicy",
    ),
    unserved(
        "networking.istio.io",
        "Gateway",
        "nothing takes traffic from outside yet; a waypoint is a Gateway of gateway.networking.k8s.io",
    ),
    unserved(
        "networking.istio.io",
        "ServiceEntry",
        "hosts outside the cluster are unknown to the mesh: they are called directly",
    ),
    unserved(
        "networking.istio.io",
        "WorkloadEntry",
        "workloads are pods only; put a Service and a Deployment before the machine",
    ),
    unserved(
        "networking.istio.io",
        "WorkloadGroup",
        "workloads are pods only; put a Service and a Deployment before the machines",
    ),
    unserved(
        "networking.istio.io",
        "ProxyConfig",
        "proxies are configured by their own flags; see docs/observability.md",
    ),
    unserved(
        "telemetry.istio.io",
        "Telemetry",
        "metrics, access log and traces are set by flags of the proxies; see docs/observability.md",
    ),
    unserved(
        "extensions.istio.io",
        "WasmPlugin",
        "no proxy runs Wasm; use the filters of HTTPRoute or VirtualService",
    ),
    unserved(
        "extensions.istio.io",
        "TrafficExtension",
        "no proxy runs Wasm or Lua; use the filters of HTTPRoute or VirtualService",
    ),
    unserved(
        "install.istio.io",
        "IstioOperator",
        "it installs another mesh; this one is started by meshctl",
    ),
    unserved(
        "security.istio.io",
        "RequestAuthentication",
        "no token is checked; do not rely on it: deny what needs one with an AuthorizationPolicy",
    ),
];

/// Why a kind is not served; `None`: it is not one of these.
pub(crate) fn instead(group: &str, kind: &str) -> Option<&'static str> {
    UNSERVED.iter().find(|u| u.group == group && u.kind == kind).map(|u| u.instead)
}

const fn unserved(group: &'static str, kind: &'static str, instead: &'static str) -> Unserved {
    Unserved { group, kind, instead }
}
