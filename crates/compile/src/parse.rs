//! The text of one file to objects and diagnostics.
//!
//! Every document is judged on its own; [`ParsedFile::complete`] says whether one that we should
//! understand was lost, which is when `folder` keeps the file's last good state. Wrong types, unknown
//! fields and values out of range name file, line and field.
//!
//! Invariants: total over any text; every object that comes out has a valid name and namespace and
//! passed `validate`, so that names are safe as file and host names.

use std::cell::OnceCell;
use std::sync::Arc;

use model::Str;
use serde::de::DeserializeOwned;
use serde_json::Value as Json;

use crate::diagnostics::{Code, Diagnostic};
use crate::istio::FIELD_NAMES;
use crate::istio::fields::{self, Finding};
use crate::kinds::{self, Handling, Kind};
use crate::object::{Body, Meta, ORIGIN_ANNOTATION, Object, Origin, object_id};
use crate::read::{Misfit, Reading, typed};
use crate::validate;
use crate::yaml::{self, Node, Value};
use crate::{ambit, gateway_api};

/// What a file holds.
#[derive(Clone, Debug, Default)]
pub struct ParsedFile {
    pub objects: Vec<Object>,
    pub diagnostics: Vec<Diagnostic>,
    /// No document was lost that this version should have understood.
    pub complete: bool,
}

/// Reads the objects of a file: several YAML documents, JSON, and `kind: List`.
pub fn parse_file(path: &str, text: &str) -> ParsedFile {
    let mut parsed = ParsedFile { complete: true, ..ParsedFile::default() };
    let documents = match yaml::load(text) {
        Ok(documents) => documents,
        Err(e) => {
            parsed.complete = false;
            let message = format!("not valid YAML at column {}: {}", e.column, e.message);
            parsed.diagnostics.push(
                Diagnostic::error(Code::InvalidSyntax, message)
                    .origin(format!("{path}:{}", e.line)),
            );
            return parsed;
        }
    };
    let file: Str = path.into();
    for document in &documents {
        read(&file, document, &mut parsed);
    }
    parsed
}

fn read(file: &Str, node: &Node, parsed: &mut ParsedFile) {
    let mut reader = Reader {
        file,
        node,
        id: String::new(),
        origin: OnceCell::new(),
        diagnostics: Vec::new(),
        lost: false,
    };
    let kind = reader.kind();
    if kind == Some(Kind::List) {
        match node.get("items").map(|items| &items.value) {
            Some(Value::Sequence(items)) => items.iter().for_each(|i| read(file, i, parsed)),
            Some(Value::Null) | None => {}
            Some(_) => reader.lose(Code::InvalidField, "items", "must be a list of objects", ""),
        }
    } else if let Some(kind) = kind
        && let Some(object) = reader.object(kind)
    {
        parsed.objects.push(object);
    }
    parsed.complete &= !reader.lost;
    parsed.diagnostics.append(&mut reader.diagnostics);
}

/// One document on its way to an object.
struct Reader<'a> {
    file: &'a Str,
    node: &'a Node,
    /// `Kind/namespace/name` as far as it is known.
    id: String,
    /// See [`Self::place`].
    origin: OnceCell<Origin>,
    diagnostics: Vec<Diagnostic>,
    lost: bool,
}

impl Reader<'_> {
    fn kind(&mut self) -> Option<Kind> {
        if !matches!(self.node.value, Value::Mapping(_)) {
            self.lose(Code::InvalidObject, "", "not an object with apiVersion and kind", "");
            return None;
        }
        let text = |field| self.node.get(field).and_then(Node::as_str);
        let (Some(api_version), Some(kind)) = (text("apiVersion"), text("kind")) else {
            let missing = if text("kind").is_none() { "kind" } else { "apiVersion" };
            let help = "every object needs apiVersion, kind and metadata.name";
            self.lose(Code::InvalidObject, missing, "missing or not a text", help);
            return None;
        };
        let (group, version) = api_version.rsplit_once('/').unwrap_or(("", api_version));
        let metadata = |field| self.node.get("metadata")?.get(field)?.as_str();
        let name = metadata("name").unwrap_or("?");
        self.id = object_id(kind, metadata("namespace").unwrap_or(""), name);
        match kinds::handling(group, version, kind) {
            Handling::Handled(kind) => return Some(kind),
            Handling::Harmless => self.skip(Diagnostic::info(
                Code::UnhandledKind,
                "this kind has no effect on the mesh; skipped",
            )),
            Handling::Missed(why) => {
                let message = format!("not handled by this version: {why}");
                self.skip(Diagnostic::warning(Code::UnhandledKind, message));
            }
            Handling::Slip => {
                let message = format!("no such kind: {api_version} {kind}");
                let help = kinds::served_version(kind).map_or_else(
                    || "check the spelling of kind and apiVersion".to_owned(),
                    |v| format!("{kind} is served as {v}"),
                );
                self.lose(Code::UnknownKind, "kind", &message, &help);
            }
            Handling::Foreign => {
                let message = format!("unknown kind {api_version} {kind}; skipped");
                self.skip(Diagnostic::error(Code::UnknownKind, message).field("kind"));
            }
        }
        None
    }

    fn object(&mut self, kind: Kind) -> Option<Object> {
        let (namespace, name) = self.names(kind)?;
        let body = match kind {
            Kind::List => return None,
            Kind::Namespace => Body::Namespace(self.decode(kind, &namespace)?),
            Kind::Node => Body::Node(self.decode(kind, &namespace)?),
            Kind::ServiceAccount => Body::ServiceAccount(self.decode(kind, &namespace)?),
            Kind::Pod => Body::Pod(self.decode(kind, &namespace)?),
            Kind::Deployment => Body::Deployment(self.decode(kind, &namespace)?),
            Kind::Service => Body::Service(self.decode(kind, &namespace)?),
            Kind::AuthorizationPolicy => Body::AuthorizationPolicy(self.decode(kind, &namespace)?),
            Kind::PeerAuthentication => Body::PeerAuthentication(self.decode(kind, &namespace)?),
            Kind::HttpRoute => Body::HttpRoute(self.decode(kind, &namespace)?),
            Kind::GrpcRoute => Body::GrpcRoute(self.decode(kind, &namespace)?),
            Kind::Gateway => Body::Gateway(self.decode(kind, &namespace)?),
            Kind::GatewayClass => Body::GatewayClass(self.decode(kind, &namespace)?),
            Kind::ReferenceGrant => Body::ReferenceGrant(self.decode(kind, &namespace)?),
            Kind::VirtualService => Body::VirtualService(self.decode(kind, &namespace)?),
            Kind::DestinationRule => Body::DestinationRule(self.decode(kind, &namespace)?),
            Kind::HttpFault => Body::HttpFault(self.decode(kind, &namespace)?),
        };
        let served = self.served_fields(kind);
        let mut problems = Vec::new();
        validate::body(&body, &mut |field, message| problems.push((field, message)));
        for (field, message) in &problems {
            self.lose(Code::InvalidField, field, message, "");
        }
        let origin = self.origin();
        (served && problems.is_empty()).then_some(Object { namespace, name, origin, body })
    }

    /// Names the fields that exist and are not served; false when the object cannot be taken with what stands in them.
    fn served_fields(&mut self, kind: Kind) -> bool {
        let root = match kind {
            Kind::VirtualService => "VirtualService",
            Kind::DestinationRule => "DestinationRule",
            _ => return true,
        };
        let spec = self.node.get("spec").map_or(Json::Null, Node::to_json);
        let mut findings = Vec::new();
        if !spec.is_null() {
            fields::walk(root, &spec, &mut |field, finding| findings.push((field, finding)));
        }
        let mut good = true;
        for (field, finding) in findings {
            match finding {
                Finding::Unknown => good &= self.unknown_field(kind, &field),
                Finding::WrongType(expected) => {
                    good = false;
                    self.lose(Code::InvalidField, &field, &format!("must be {expected}"), "");
                }
                Finding::Diagnosed { code, severity, why } => {
                    self.skip(Diagnostic::new(severity, code, why).field(field));
                }
            }
        }
        good
    }

    /// Where the object comes from: generated objects say so themselves.
    fn origin(&self) -> Origin {
        let annotation =
            || self.node.get("metadata")?.get("annotations")?.get(ORIGIN_ANNOTATION)?.as_str();
        let stated = annotation().and_then(|text| {
            let (file, line) = text.rsplit_once(':')?;
            Some(Origin::new(file, line.parse().ok()?))
        });
        stated.unwrap_or_else(|| self.place().clone())
    }

    /// Where the document and its fields stand. Once: it is as large as the document, and findings may be as many.
    fn place(&self) -> &Origin {
        self.origin.get_or_init(|| Origin::of_node(self.file.clone(), self.node))
    }

    fn names(&mut self, kind: Kind) -> Option<(Str, Str)> {
        let metadata = |field| self.node.get("metadata").and_then(|m| m.get(field));
        let text = |node: Option<&Node>| node.and_then(Node::as_str).map(str::to_owned);
        let (name, namespace) = (text(metadata("name")), metadata("namespace"));
        let stated = namespace.is_some_and(|n| n.value != Value::Null);
        let namespace = if stated { text(namespace) } else { Some("default".to_owned()) };
        let Some(name) = name else {
            self.lose(Code::InvalidObject, "metadata.name", "missing or not a text", "");
            return None;
        };
        let Some(namespace) = namespace else {
            self.lose(Code::InvalidField, "metadata.namespace", "not a text", "put it in quotes");
            return None;
        };
        let namespace = if kind.has_namespace() { namespace } else { String::new() };
        self.id = object_id(self.kind_text(), &namespace, &name);
        if let Err(message) = validate::object_name(kind, &name) {
            self.lose(Code::InvalidObject, "metadata.name", &message, "");
            return None;
        }
        if kind.has_namespace()
            && let Err(message) = validate::label_name(&namespace)
        {
            self.lose(Code::InvalidObject, "metadata.namespace", &message, "");
            return None;
        }
        Some((namespace.into(), name.into()))
    }

    fn kind_text(&self) -> &str {
        self.node.get("kind").and_then(Node::as_str).unwrap_or_default()
    }

    fn decode<T: DeserializeOwned + Meta>(
        &mut self,
        kind: Kind,
        namespace: &str,
    ) -> Option<Arc<T>> {
        let mut json = self.node.to_json();
        // From here on every object states its namespace.
        if let Some(Json::Object(metadata)) = json.get_mut("metadata") {
            metadata.remove("namespace");
            if kind.has_namespace() {
                metadata.insert("namespace".to_owned(), namespace.into());
            }
        }
        numbers_of_quantities(&mut json, false);
        let Reading { value, unknown } = typed(&json);
        match value {
            Ok(value) => self.known_fields(kind, &unknown).then(|| Arc::new(value)),
            Err(Misfit { field, message }) => {
                let quote = message.contains("expected a string") && !message.contains("map");
                let help = if quote { "put the value in quotes" } else { "" };
                self.lose(Code::InvalidField, &field, &message, help);
                None
            }
        }
    }

    /// Reports unknown fields; false when the object cannot be taken with them.
    fn known_fields(&mut self, kind: Kind, unknown: &[String]) -> bool {
        let mut good = true;
        for field in unknown {
            let name = field.rsplit('.').next().unwrap_or(field);
            if kind.is_strict() {
                let top = field.split('.').next().unwrap_or(field);
                if matches!(field.as_str(), "apiVersion" | "kind") || top == "status" {
                    continue;
                }
                good &= self.unknown_field(kind, field);
            } else {
                let message = format!("unknown field {name:?}; ignored");
                self.skip(Diagnostic::warning(Code::UnknownField, message).field(field));
            }
        }
        good
    }

    /// Reports an unknown field of a kind that cannot be taken with it.
    fn unknown_field(&mut self, kind: Kind, field: &str) -> bool {
        let name = field.rsplit('.').next().unwrap_or(field);
        let help = nearest(name, &known_names(kind)).map(|near| format!("did you mean {near:?}?"));
        let message = format!("unknown field {name:?}");
        self.lose(Code::UnknownField, field, &message, &help.unwrap_or_default());
        false
    }

    /// An error that costs the object.
    fn lose(&mut self, code: Code, field: &str, message: &str, help: &str) {
        self.lost = true;
        self.skip(Diagnostic::error(code, message).field(field).help(help));
    }

    fn skip(&mut self, diagnostic: Diagnostic) {
        let origin = self.place().at(&diagnostic.field);
        self.diagnostics.push(diagnostic.object(self.id.clone()).origin(origin));
    }
}

/// `cpu: 1` is a quantity like `cpu: "1"`, but the types know only text.
fn numbers_of_quantities(json: &mut Json, quantities: bool) {
    match json {
        Json::Object(map) => {
            for (key, value) in map.iter_mut() {
                if quantities && value.is_number() {
                    *value = Json::String(value.to_string());
                }
                match key.as_str() {
                    "sizeLimit" | "divisor" if value.is_number() => {
                        *value = Json::String(value.to_string());
                    }
                    "limits" | "requests" | "overhead" | "capacity" | "allocatable"
                    | "allocatedResources" => numbers_of_quantities(value, true),
                    _ => numbers_of_quantities(value, false),
                }
            }
        }
        Json::Array(items) => items.iter_mut().for_each(|i| numbers_of_quantities(i, false)),
        _ => {}
    }
}

/// The names of a kind's fields.
fn known_names(kind: Kind) -> Vec<&'static str> {
    match kind {
        Kind::VirtualService | Kind::DestinationRule => fields::names().collect(),
        Kind::HttpFault => ambit::FIELD_NAMES.to_vec(),
        kind if kind.is_gateway_api() => gateway_api::FIELD_NAMES.to_vec(),
        _ => FIELD_NAMES.to_vec(),
    }
}

/// The known field that a misspelt one is closest to, if it is close.
fn nearest(name: &str, known: &[&'static str]) -> Option<&'static str> {
    // Names of fields are short; a long one is not a slip of the finger.
    if name.len() > 40 {
        return None;
    }
    let closest = known.iter().map(|known| (distance(name, known), *known)).min()?;
    (closest.0 <= 2).then_some(closest.1)
}

/// Edits from one word to the other.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replace = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replace.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests;
