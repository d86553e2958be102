//! What Gateway API wants to be said of a route, per parent: plain values. Who writes them where is not decided here.

use std::fmt;

use model::Str;
use serde::Serialize;

/// The controller in whose name status is given.
pub const CONTROLLER_NAME: &str = "ambit.io/mesh-controller";

/// Bytes of a condition's message: room for a few rules' worth of causes; Kubernetes takes 32768.
const MAX_MESSAGE: usize = 2048;

/// What there is to say about a route at one of its parents.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RouteStatus {
    /// `HTTPRoute` or `GRPCRoute`.
    pub kind: &'static str,
    pub namespace: Str,
    pub name: Str,
    pub parent_ref: ParentReference,
    pub controller_name: &'static str,
    /// `Accepted`, `ResolvedRefs`, `ResolvedWaypoints` where the parent is one that is there, and `PartiallyInvalid` where it is
    /// true.
    pub conditions: Vec<Condition>,
}

/// The parent as the route writes it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ParentReference {
    pub group: Option<Str>,
    pub kind: Option<Str>,
    pub namespace: Option<Str>,
    pub name: Str,
    pub section_name: Option<Str>,
    pub port: Option<i32>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    #[serde(rename = "type")]
    pub kind: ConditionType,
    pub status: bool,
    pub reason: ConditionReason,
    pub message: String,
    /// `metadata.generation` of the route that was judged; 0 where nobody counts.
    pub observed_generation: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum ConditionType {
    /// The route applies at this parent.
    Accepted,
    /// Everything that the route names is there and can take requests.
    ResolvedRefs,
    /// What is sent to the parent passes a waypoint, where the route is looked at. Istio's, not Gateway API's.
    ResolvedWaypoints,
    /// Some rules were dropped. Only ever true.
    PartiallyInvalid,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum ConditionReason {
    Accepted,
    NoMatchingParent,
    NotAllowedByListeners,
    UnsupportedValue,
    IncompatibleFilters,
    Conflicted,
    ResolvedRefs,
    BackendNotFound,
    InvalidKind,
    UnsupportedProtocol,
    ResolvedWaypoints,
    /// Nobody asks for a waypoint.
    NoWaypoint,
    /// The one that is asked for is not there, or none.
    WaypointMissing,
    AttachmentDenied,
    UnsupportedTrafficType,
    WaypointIsNotReady,
}

impl RouteStatus {
    /// The condition of a type, if it is there.
    pub fn condition(&self, kind: ConditionType) -> Option<&Condition> {
        self.conditions.iter().find(|c| c.kind == kind)
    }
}

impl Condition {
    pub(super) fn new(
        kind: ConditionType,
        status: bool,
        reason: ConditionReason,
        mut message: String,
        observed_generation: i64,
    ) -> Self {
        if message.len() > MAX_MESSAGE {
            let end = (0..=MAX_MESSAGE).rev().find(|at| message.is_char_boundary(*at));
            message.truncate(end.unwrap_or_default());
            message.push_str(" ...");
        }
        Self { kind, status, reason, message, observed_generation }
    }
}

impl fmt::Display for ConditionReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The names are Gateway API's own.
        write!(f, "{self:?}")
    }
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let status = if self.status { "True" } else { "False" };
        write!(f, "{:?}={status} {}: {}", self.kind, self.reason, self.message)
    }
}
