//! The closed list of reasons for which the mesh refuses or loses a connection.

use std::fmt;

use crate::{PolicyKey, Provenance};

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident = $code:literal, flags $flags:literal, help $help:literal;)+) => {
        /// Why a connection was refused or ended. The code is the same in the access log, the metric,
        /// the `x-ambit-reason` header and the CLI.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum Reason { $($(#[doc = $doc])+ $variant,)+ }

        impl Reason {
            /// Every reason, in the order of the list.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The stable code, for logs, metrics and tools.
            pub const fn code(self) -> &'static str {
                match self { $(Self::$variant => $code,)+ }
            }

            /// What happened, in one sentence.
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$variant => concat!($($doc,)+).trim_ascii(),)+ }
            }

            /// The value of Istio's `response_flags` label that this reason falls under.
            pub const fn response_flags(self) -> &'static str {
                match self { $(Self::$variant => $flags,)+ }
            }

            /// What to do about it, in one sentence.
            pub const fn help(self) -> &'static str {
                match self { $(Self::$variant => $help,)+ }
            }
        }
    };
}

reasons! {
    /// A DENY policy matched.
    PolicyDeny = "policy_deny", flags "DENY",
        help "Change the DENY policy named in the message, or the caller's identity.";
    /// There are ALLOW policies and none matched.
    PolicyNoAllow = "policy_no_allow", flags "DENY",
        help "Add the caller to one of the ALLOW policies of this workload.";
    /// The workload names a policy that nobody has.
    PolicyMissing = "policy_missing", flags "DENY",
        help "The control plane named a policy it did not send; look for NACKs in its log.";
    /// The peer is not a mesh identity and the workload demands mutual TLS.
    MtlsRequired = "mtls_required", flags "DENY",
        help "Bring the caller into the mesh, or set PeerAuthentication to PERMISSIVE.";
    /// The peer's certificate is not acceptable: foreign root, expired, or no workload identity.
    PeerCertificate = "peer_certificate", flags "TLS_FAILURE",
        help "Check that both sides share a root and that their clocks agree.";
    /// The peer is a valid identity, but not the one that should answer there.
    PeerIdentityMismatch = "peer_identity_mismatch", flags "TLS_FAILURE",
        help "The address is held by another workload than the control plane says; wait for its update.";
    /// This proxy has no certificate for the pod's identity.
    CertificateUnavailable = "certificate_unavailable", flags "IDENTITY_ERROR",
        help "Check that the proxy can reach the CA and that the service account has a pod on this node.";
    /// The connection's own workload is not known to the control plane.
    UnknownWorkload = "unknown_workload", flags "CONNECT",
        help "Check that the control plane knows the pod: meshctl local status.";
    /// The destination service has no such port.
    NoSuchPort = "no_such_port", flags "CONNECT",
        help "Add the port to the Service, or call one that it has.";
    /// The destination service has no endpoint that may take traffic.
    NoHealthyEndpoint = "no_healthy_endpoint", flags "CONNECT",
        help "Check the readiness of the pods that the Service selects.";
    /// Somebody asked for one of the mesh's own ports.
    MeshPort = "mesh_port", flags "DENY",
        help "Ports 15001, 15006, 15008 and 15053 of a pod belong to the mesh.";
    /// The tunnel's target is not an address of the pod that it reached.
    DestinationMismatch = "destination_mismatch", flags "CONNECT",
        help "The peer holds old configuration, or asks for what is not its own.";
    /// The tunnel request is malformed.
    BadRequest = "bad_request", flags "CONNECT",
        help "The peer does not speak HBONE: CONNECT with an ip:port authority.";
    /// A TCP connection could not be made.
    ConnectFailed = "connect_failed", flags "CONNECT",
        help "Check that the program listens on the target port and address.";
    /// A TCP connection, handshake or tunnel was not answered in time.
    ConnectTimeout = "connect_timeout", flags "CONNECT",
        help "Check the network between the nodes and the load of the peer.";
    /// The TLS or HTTP/2 handshake with the peer failed.
    TunnelHandshake = "tunnel_handshake", flags "H2_HANDSHAKE_FAILURE",
        help "Check that the peer speaks HBONE on port 15008.";
    /// The peer's proxy refused the tunnel.
    TunnelRefused = "tunnel_refused", flags "CONNECT",
        help "Look at the access log of the destination's proxy for its reason.";
    /// An established tunnel or connection broke.
    ConnectionBroken = "connection_broken", flags "-",
        help "One side reset the connection; look at the programs on both ends.";
    /// A policy change took the permission away from a live connection.
    PolicyChanged = "policy_changed", flags "DENY",
        help "A policy now denies this connection; meshctl can names it.";
    /// The destination is bound to a waypoint and none is ready.
    WaypointNotReady = "waypoint_not_ready", flags "CONNECT",
        help "Check the waypoint's pods; the mesh does not detour around a waypoint.";
    /// A waypoint was asked for something that is not bound to it.
    NotBound = "not_bound", flags "CONNECT",
        help "Bind the Service to this waypoint with the label istio.io/use-waypoint, or call it without.";
    /// The Service has routes and none of their matches fits the request.
    NoRoute = "no_route", flags "NR",
        help "Add a rule that matches the request, or one without matches.";
    /// The route sends to something that is not there or cannot take requests.
    BadBackend = "bad_backend", flags "NC",
        help "Mend the backend that the message names; the status of the route says the same.";
    /// The rule has a filter that cannot be applied.
    BadFilter = "bad_filter", flags "NC",
        help "Mend the filter that the message names; a filter is never skipped.";
    /// Somebody asked for this fault.
    Fault = "fault", flags "FI",
        help "Take the fault out of the rule that the message names, or wait until it expires.";
    /// The request took longer than its route allows.
    RequestTimeout = "request_timeout", flags "UT",
        help "Raise the timeout of the rule that the message names, or look why the backend is slow.";
    /// The backend closed or broke the connection before it had answered.
    UpstreamBroken = "upstream_broken", flags "UC",
        help "Look at the backend's own log; it went away in the middle of a request.";
    /// The request is no HTTP that can be passed on safely.
    BadHttp = "bad_http", flags "DPE",
        help "The client is wrong; the message says where in the request.";
    /// The destination needs something this version cannot do.
    Unsupported = "unsupported", flags "CONNECT",
        help "See the honest limits in the README.";
    /// A limit of this proxy is reached.
    Limit = "limit", flags "CONNECT",
        help "Raise the limit named in the message or lower the load.";
    /// The proxy was replaced, and the time for what it still carried is over.
    Draining = "draining", flags "-",
        help "Connect again: the new proxy takes over. For longer connections raise --drain-seconds.";
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())
    }
}

/// A refusal: the reason, the words for a person, and the rule that decided if one did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub reason: Reason,
    /// Who is wrong and what was expected, in one line.
    pub message: String,
    /// The policy that decided.
    pub policy: Option<PolicyKey>,
    /// Where that rule was written.
    pub provenance: Option<Provenance>,
}

impl Refusal {
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), policy: None, provenance: None }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.reason, self.message)?;
        if let Some(p) = &self.policy {
            write!(f, " [policy {p}]")?;
        }
        if let Some(p) = &self.provenance {
            write!(f, " [{p}]")?;
        }
        Ok(())
    }
}

impl std::error::Error for Refusal {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique_and_plain() {
        let mut codes: Vec<_> = Reason::ALL.iter().map(|r| r.code()).collect();
        assert!(codes.iter().all(|c| c.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')));
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), Reason::ALL.len());
    }
}
