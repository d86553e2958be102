//! Every field of VirtualService and DestinationRule, and what this version does with it: honoured, with the test that
//! proves it, or diagnosed, with the code that is said.
//!
//! One table ([`MESSAGES`]) is the source of what [`walk`] says of an object and of the page `docs/istio-fields.md`
//! ([`page`]). `fields/universe.txt` lists what Istio's API has; a test fails on a field there that has no row here.
//!
//! Invariants: total over any JSON; a field without a row is unknown, never silently taken.

use std::fmt::Write as _;

use serde_json::Value as Json;

use super::unserved::UNSERVED;
use crate::diagnostics::{Code, Severity};

mod destination_rule;
mod virtual_service;

/// A message of Istio's API.
#[derive(Clone, Copy, Debug)]
pub struct Message {
    pub name: &'static str,
    pub fields: &'static [Field],
}

#[derive(Clone, Copy, Debug)]
pub struct Field {
    pub name: &'static str,
    pub element: Element,
    pub arity: Arity,
    pub does: Does,
    /// For the page.
    pub note: &'static str,
}

/// What a value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    Text,
    Bool,
    Integer,
    Number,
    OneOf(&'static [&'static str]),
    Message(&'static str),
    /// Not looked into: the field as a whole is diagnosed.
    Any,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arity {
    One,
    List,
    /// By name.
    Map,
}

#[derive(Clone, Copy, Debug)]
pub enum Does {
    /// It does what Istio says it does.
    Honoured { test: &'static str },
    /// Its own fields say.
    Inside,
    /// Said wherever it is given; `unless` it has one of these values, which are what happens anyway.
    Diagnosed { code: Code, severity: Severity, why: &'static str, unless: &'static [&'static str] },
}

/// What is to be said of a field.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Finding {
    Unknown,
    WrongType(&'static str),
    Diagnosed { code: Code, severity: Severity, why: &'static str },
}

/// The messages of both kinds; the first of each list is the kind's `spec`.
pub const MESSAGES: [&[Message]; 2] = [virtual_service::MESSAGES, destination_rule::MESSAGES];

/// Everything that is to be said of the fields of a `spec`. `root`: `VirtualService` or `DestinationRule`.
pub(crate) fn walk(root: &str, spec: &Json, report: &mut dyn FnMut(String, Finding)) {
    message(root, "spec", spec, report);
}

/// Every field name, to guess what a misspelt one was meant to be.
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    MESSAGES.into_iter().flatten().flat_map(|m| m.fields).map(|f| f.name)
}

pub(crate) fn find(name: &str) -> Option<&'static Message> {
    MESSAGES.into_iter().flatten().find(|m| m.name == name)
}

/// The page `docs/istio-fields.md`.
pub fn page() -> String {
    let mut page = String::from(HEAD);
    let heads = [virtual_service::HEAD, destination_rule::HEAD];
    for (messages, head) in MESSAGES.into_iter().zip(heads) {
        page.push_str(head);
        for message in messages {
            // Writing to a String cannot fail.
            let _ = write!(page, "\n### {}\n\n| field | | |\n|---|---|---|\n", message.name);
            message.fields.iter().for_each(|field| row(&mut page, field));
        }
    }
    page.push_str(KINDS_HEAD);
    for kind in UNSERVED {
        let _ = writeln!(page, "| `{}` | {} | {} |", kind.kind, kind.group, kind.instead);
    }
    page
}

impl Field {
    pub(crate) const fn honoured(name: &'static str, element: Element, test: &'static str) -> Self {
        Self::new(name, element, Does::Honoured { test })
    }

    pub(crate) const fn inside(name: &'static str, message: &'static str) -> Self {
        Self::new(name, Element::Message(message), Does::Inside)
    }

    /// The user's wish is not fulfilled, and nothing breaks.
    pub(crate) const fn missed(name: &'static str, element: Element, why: &'static str) -> Self {
        Self::diagnosed(name, element, Code::Unsupported, Severity::Warning, why)
    }

    /// What stands here cannot be had, and requests it would be about are answered with an error, or go another way.
    pub(crate) const fn refused(name: &'static str, element: Element, why: &'static str) -> Self {
        Self::diagnosed(name, element, Code::Unsupported, Severity::Error, why)
    }

    pub(crate) const fn no_effect(name: &'static str, element: Element, why: &'static str) -> Self {
        Self::diagnosed(name, element, Code::NoEffect, Severity::Warning, why)
    }

    const fn diagnosed(
        name: &'static str,
        element: Element,
        code: Code,
        severity: Severity,
        why: &'static str,
    ) -> Self {
        Self::new(name, element, Does::Diagnosed { code, severity, why, unless: &[] })
    }

    const fn new(name: &'static str, element: Element, does: Does) -> Self {
        Self { name, element, arity: Arity::One, does, note: "" }
    }

    pub(crate) const fn list(mut self) -> Self {
        self.arity = Arity::List;
        self
    }

    pub(crate) const fn map(mut self) -> Self {
        self.arity = Arity::Map;
        self
    }

    pub(crate) const fn note(mut self, note: &'static str) -> Self {
        self.note = note;
        self
    }

    /// Nothing is said of these values.
    pub(crate) const fn unless(mut self, values: &'static [&'static str]) -> Self {
        if let Does::Diagnosed { code, severity, why, .. } = self.does {
            self.does = Does::Diagnosed { code, severity, why, unless: values };
        }
        self
    }
}

fn message(name: &str, at: &str, value: &Json, report: &mut dyn FnMut(String, Finding)) {
    let Json::Object(map) = value else {
        return report(at.to_owned(), Finding::WrongType("an object"));
    };
    let fields = find(name).map(|m| m.fields).unwrap_or_default();
    for (key, value) in map {
        let at = format!("{at}.{key}");
        // The schema has this one under both names.
        let key = if key == "mirror_percent" { "mirrorPercent" } else { key.as_str() };
        match fields.iter().find(|f| f.name == key) {
            None => report(at, Finding::Unknown),
            Some(field) if !is_unset(value) => given(field, &at, value, report),
            Some(_) => {}
        }
    }
}

fn given(field: &Field, at: &str, value: &Json, report: &mut dyn FnMut(String, Finding)) {
    if let Does::Diagnosed { code, severity, why, unless } = field.does
        && !unless.iter().any(|v| is_text(value, v))
    {
        report(at.to_owned(), Finding::Diagnosed { code, severity, why });
    }
    match (field.arity, value) {
        (Arity::One, value) => element(field.element, at, value, report),
        (Arity::List, Json::Array(items)) => {
            for (i, item) in items.iter().enumerate() {
                element(field.element, &format!("{at}[{i}]"), item, report);
            }
        }
        (Arity::Map, Json::Object(items)) => {
            for (key, item) in items {
                element(field.element, &format!("{at}.{key}"), item, report);
            }
        }
        (Arity::List, _) => report(at.to_owned(), Finding::WrongType("a list")),
        (Arity::Map, _) => report(at.to_owned(), Finding::WrongType("a map of names to values")),
    }
}

fn element(kind: Element, at: &str, value: &Json, report: &mut dyn FnMut(String, Finding)) {
    let (good, expected) = match kind {
        Element::Any => return,
        Element::Message(name) => return message(name, at, value, report),
        Element::Text => (value.is_string(), "a text"),
        Element::Bool => (value.is_boolean(), "true or false"),
        Element::Integer => (value.is_u64() || value.is_i64(), "a whole number"),
        Element::Number => (value.is_number(), "a number"),
        Element::OneOf(values) => {
            let good = value.as_str().is_some_and(|v| values.contains(&v));
            (good, "one of the values that Istio's reference lists")
        }
    };
    if !good {
        report(at.to_owned(), Finding::WrongType(expected));
    }
}

/// In protobuf a field with its default value is the same as one that is not there.
fn is_unset(value: &Json) -> bool {
    match value {
        Json::Null => true,
        Json::Bool(b) => !b,
        Json::Number(n) => n.as_f64() == Some(0.0),
        Json::String(s) => s.is_empty(),
        Json::Array(items) => items.is_empty(),
        Json::Object(map) => map.is_empty(),
    }
}

/// A text, or a list of just this text.
fn is_text(value: &Json, text: &str) -> bool {
    match value {
        Json::String(s) => s == text,
        Json::Array(items) => matches!(&items[..], [Json::String(s)] if s == text),
        _ => false,
    }
}

fn row(page: &mut String, field: &Field) {
    let (what, detail) = match field.does {
        Does::Honoured { test } => ("honoured", format!("test `{test}`")),
        Does::Inside => match field.element {
            Element::Message(name) => ("see", format!("[{name}](#{})", anchor(name))),
            _ => ("see", String::new()),
        },
        Does::Diagnosed { code, why, unless, .. } => {
            let values: Vec<String> = unless.iter().map(|v| format!("`{v}`")).collect();
            let unless = if values.is_empty() {
                String::new()
            } else {
                format!(" (nothing is said of {})", values.join(", "))
            };
            ("diagnosed", format!("`{code}`: {why}{unless}"))
        }
    };
    let note = if field.note.is_empty() { String::new() } else { format!("; {}", field.note) };
    // Writing to a String cannot fail.
    let _ = writeln!(page, "| `{}` | {what} | {detail}{note} |", field.name);
}

/// How GitHub links to a heading.
fn anchor(heading: &str) -> String {
    heading.to_ascii_lowercase().replace('.', "")
}

const HEAD: &str = "\
# Istio's VirtualService and DestinationRule, field by field

Every field of both kinds is either *honoured*, and a test shows it, or *diagnosed*: `istiod-lite` and `meshctl` name it with a code, the
file and the line. A field that Istio does not have is an error (`unknown_field`). The versions `v1`, `v1beta1` and `v1alpha3` are one.

<!-- Made from crates/compile/src/istio/fields: TIDY_WRITE=1 cargo test -p tidy --test docs -->
";

const KINDS_HEAD: &str = "
## Kinds that are not served

They are seen and named with the code `unhandled_kind`.

| kind | group | instead |
|---|---|---|
";

#[cfg(test)]
mod tests;
