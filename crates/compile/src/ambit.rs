//! Our own kinds, group `ambit.io`: what no standard kind says. For now one, `HTTPFault`, a filter that a route names with
//! `extensionRef`.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde::{Deserialize, Serialize};

/// The API group of our kinds.
pub const GROUP: &str = "ambit.io";
pub(crate) const VERSION: &str = "v1alpha1";

/// A fault that somebody asks for, until a time at which it ends by itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpFault {
    pub metadata: ObjectMeta,
    pub spec: HttpFaultSpec,
}

/// At least one of `delay` and `abort`; a request may get both.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpFaultSpec {
    pub delay: Option<FaultDelay>,
    pub abort: Option<FaultAbort>,
    /// `None`: every request of the rule.
    pub r#match: Option<FaultMatch>,
    /// RFC 3339. `None`: the fault ends when it is taken away.
    pub until: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct FaultDelay {
    /// 0 to 100.
    pub percent: Option<f64>,
    /// The same as Istio writes it.
    pub percentage: Option<Percentage>,
    /// `250ms`, `2s`; at most an hour.
    pub duration: String,
}

/// One of `httpStatus`, `grpcStatus` and `reset`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct FaultAbort {
    /// 0 to 100.
    pub percent: Option<f64>,
    /// The same as Istio writes it.
    pub percentage: Option<Percentage>,
    pub http_status: Option<u32>,
    /// By name, as `UNAVAILABLE`, or by number.
    pub grpc_status: Option<IntOrString>,
    /// The connection (HTTP/1) or the stream is reset.
    pub reset: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Percentage {
    pub value: f64,
}

/// All of these must fit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct FaultMatch {
    pub headers: Vec<FaultHeader>,
    pub source: Option<FaultSource>,
}

/// As in a match of an HTTPRoute.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct FaultHeader {
    pub r#type: HeaderMatchType,
    pub name: String,
    pub value: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HeaderMatchType {
    #[default]
    Exact,
    /// The whole value.
    RegularExpression,
}

/// Who asks, by verified identity.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct FaultSource {
    /// Any of these.
    pub namespaces: Vec<String>,
    /// Any of these: `TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT`, as in an AuthorizationPolicy but without wildcards.
    pub principals: Vec<String>,
}

/// Every field name, to guess what a misspelt one was meant to be.
pub(crate) const FIELD_NAMES: &[&str] = &[
    "abort",
    "apiVersion",
    "delay",
    "duration",
    "grpcStatus",
    "headers",
    "httpStatus",
    "kind",
    "match",
    "metadata",
    "name",
    "namespaces",
    "percent",
    "percentage",
    "principals",
    "reset",
    "source",
    "spec",
    "type",
    "until",
    "value",
];
