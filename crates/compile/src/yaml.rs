//! YAML and JSON text to trees that know their line numbers.
//!
//! What `kubectl apply` accepts is accepted, with its reading of scalars (YAML 1.1 booleans, octal
//! numbers). Stricter than most readers where silence would hurt: a key given twice is an error, since
//! the loser could be half of a policy.
//!
//! Invariants: total over any text; work and memory are bounded (depth, nodes after alias expansion);
//! no recursion deeper than [`MAX_DEPTH`].

use std::collections::BTreeMap;

use saphyr_parser::{Event, Parser, ScalarStyle, Span, StrInput, Tag};
use serde_json::Value as Json;

/// Deepest nesting. Kubernetes objects stay far below; the limit keeps recursive walks off the end of
/// the stack.
const MAX_DEPTH: usize = 64;
/// Most nodes of one file, aliases expanded: keeps a few bytes of nested aliases from becoming
/// gigabytes. 10,000 pods of 50 fields fit.
const MAX_NODES: usize = 1_000_000;
/// Largest file read, in bytes. The largest object Kubernetes stores is 1.5 MiB.
const MAX_BYTES: usize = 32 << 20;

/// A value and where it starts.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Node {
    pub line: u32,
    pub value: Value,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Null,
    Bool(bool),
    Number(serde_json::Number),
    String(String),
    Sequence(Vec<Node>),
    Mapping(Vec<Entry>),
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Entry {
    pub key: String,
    /// [`MERGED`] for keys that came by `<<`.
    line: u32,
    pub value: Node,
}

/// Why a text is not YAML.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SyntaxError {
    pub line: u32,
    pub column: u32,
    pub message: String,
}

impl Entry {
    /// The line of the key.
    pub(crate) fn line(&self) -> u32 {
        if self.line == MERGED { self.value.line } else { self.line }
    }
}

impl Node {
    pub(crate) fn get(&self, key: &str) -> Option<&Node> {
        match &self.value {
            Value::Mapping(entries) => entries.iter().find(|e| e.key == key).map(|e| &e.value),
            _ => None,
        }
    }

    pub(crate) fn as_str(&self) -> Option<&str> {
        match &self.value {
            Value::String(s) => Some(s),
            _ => None,
        }
    }

    pub(crate) fn to_json(&self) -> Json {
        match &self.value {
            Value::Null => Json::Null,
            Value::Bool(b) => Json::Bool(*b),
            Value::Number(n) => Json::Number(n.clone()),
            Value::String(s) => Json::String(s.clone()),
            Value::Sequence(items) => items.iter().map(Self::to_json).collect(),
            Value::Mapping(entries) => {
                entries.iter().map(|e| (e.key.clone(), e.value.to_json())).collect()
            }
        }
    }
}

/// The documents of a text; empty ones are left out.
pub(crate) fn load(text: &str) -> Result<Vec<Node>, SyntaxError> {
    if text.len() > MAX_BYTES {
        let message = format!("the file is larger than {} MiB", MAX_BYTES >> 20);
        return Err(SyntaxError { line: 1, column: 1, message });
    }
    // A byte order mark is not content.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut builder = Builder::default();
    for event in Parser::new(StrInput::new(text)) {
        let (event, span) = match event {
            Ok(event) => event,
            Err(e) => {
                let error = SyntaxError {
                    line: clamp(e.marker().line()),
                    column: clamp(e.marker().col()).saturating_add(1),
                    message: e.info().to_owned(),
                };
                return json(text).ok_or(error);
            }
        };
        builder.event(event, span)?;
    }
    Ok(builder.documents)
}

/// JSON is nearly YAML; what is not (tabs, surrogate escapes) is read here, without lines.
fn json(text: &str) -> Option<Vec<Node>> {
    if !text.trim_start().starts_with('{') {
        return None;
    }
    let value: Json = serde_json::from_str(text).ok()?;
    Some(vec![from_json(value)])
}

fn from_json(value: Json) -> Node {
    let value = match value {
        Json::Null => Value::Null,
        Json::Bool(b) => Value::Bool(b),
        Json::Number(n) => Value::Number(n),
        Json::String(s) => Value::String(s),
        Json::Array(items) => Value::Sequence(items.into_iter().map(from_json).collect()),
        Json::Object(map) => Value::Mapping(
            map.into_iter().map(|(key, v)| Entry { key, line: 1, value: from_json(v) }).collect(),
        ),
    };
    Node { line: 1, value }
}

/// A collection that is still open.
struct Open {
    node: Node,
    anchor: usize,
    /// The key whose value comes next.
    key: Option<(String, u32)>,
    /// Where in the mapping each key stands.
    keys: BTreeMap<String, usize>,
}

#[derive(Default)]
struct Builder {
    documents: Vec<Node>,
    stack: Vec<Open>,
    anchors: BTreeMap<usize, Node>,
    nodes: usize,
}

impl Builder {
    fn event(&mut self, event: Event<'_>, span: Span) -> Result<(), SyntaxError> {
        let line = clamp(span.start.line());
        match event {
            Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentStart(_) => {
                Ok(())
            }
            Event::DocumentEnd => {
                self.stack.clear();
                self.anchors.clear();
                Ok(())
            }
            Event::SequenceStart(anchor, _) => {
                self.open(Value::Sequence(Vec::new()), anchor, line, span)
            }
            Event::MappingStart(anchor, _) => {
                self.open(Value::Mapping(Vec::new()), anchor, line, span)
            }
            Event::SequenceEnd | Event::MappingEnd => match self.stack.pop() {
                Some(open) => self.insert(open.node, open.anchor, span),
                None => Err(error(span, "unbalanced collection")),
            },
            Event::Scalar(text, style, anchor, tag) => {
                let value = scalar(&text, style, tag.as_deref());
                self.count(1, span)?;
                self.insert(Node { line, value }, anchor, span)
            }
            Event::Alias(anchor) => {
                let Some(node) = self.anchors.get(&anchor) else {
                    return Err(error(span, "an alias refers to an anchor that is not complete"));
                };
                let (size, depth) = measure(node);
                if self.stack.len() + depth > MAX_DEPTH {
                    return Err(error(span, "nested too deeply"));
                }
                self.count(size, span)?;
                let node = self.anchors[&anchor].clone();
                self.insert(node, 0, span)
            }
        }
    }

    fn count(&mut self, nodes: usize, span: Span) -> Result<(), SyntaxError> {
        self.nodes = self.nodes.saturating_add(nodes);
        if self.nodes > MAX_NODES {
            return Err(error(span, "too many values in one file"));
        }
        Ok(())
    }

    fn open(
        &mut self,
        value: Value,
        anchor: usize,
        line: u32,
        span: Span,
    ) -> Result<(), SyntaxError> {
        if self.stack.len() >= MAX_DEPTH {
            return Err(error(span, "nested too deeply"));
        }
        self.count(1, span)?;
        self.stack.push(Open {
            node: Node { line, value },
            anchor,
            key: None,
            keys: BTreeMap::new(),
        });
        Ok(())
    }

    fn insert(&mut self, node: Node, anchor: usize, span: Span) -> Result<(), SyntaxError> {
        if anchor > 0 {
            // A copy for later aliases: counts, since text could consist of anchors alone.
            self.count(measure(&node).0, span)?;
            self.anchors.insert(anchor, node.clone());
        }
        let Some(parent) = self.stack.last_mut() else {
            if node.value != Value::Null {
                self.documents.push(node);
            }
            return Ok(());
        };
        match &mut parent.node.value {
            Value::Sequence(items) => items.push(node),
            Value::Mapping(entries) => match parent.key.take() {
                None => parent.key = Some((key_text(&node, span)?, node.line)),
                Some((key, line)) if key == "<<" => {
                    merge(entries, &mut parent.keys, &node, line)?;
                }
                Some((key, line)) => {
                    let entry = Entry { key, line, value: node };
                    give(entries, &mut parent.keys, entry)?;
                }
            },
            // Only collections are ever open.
            _ => {}
        }
        Ok(())
    }
}

/// Line of a key that came by `<<`: the key may still be given, and what is given wins.
const MERGED: u32 = 0;

fn give(
    entries: &mut Vec<Entry>,
    keys: &mut BTreeMap<String, usize>,
    entry: Entry,
) -> Result<(), SyntaxError> {
    match keys.get(&entry.key).and_then(|i| entries.get_mut(*i)) {
        Some(present) if present.line == MERGED => *present = entry,
        Some(present) => {
            let message = format!("{:?} is given twice, first on line {}", entry.key, present.line);
            return Err(SyntaxError { line: entry.line, column: 1, message });
        }
        None => {
            keys.insert(entry.key.clone(), entries.len());
            entries.push(entry);
        }
    }
    Ok(())
}

/// `<<: *defaults` puts the keys of a mapping, or of several, under those that are given.
fn merge(
    entries: &mut Vec<Entry>,
    keys: &mut BTreeMap<String, usize>,
    node: &Node,
    line: u32,
) -> Result<(), SyntaxError> {
    let sources: Vec<&Node> = match &node.value {
        Value::Sequence(items) => items.iter().collect(),
        _ => vec![node],
    };
    for source in sources {
        let Value::Mapping(more) = &source.value else {
            let message = "`<<` takes a mapping or a list of mappings".to_owned();
            return Err(SyntaxError { line, column: 1, message });
        };
        for entry in more {
            if !keys.contains_key(&entry.key) {
                keys.insert(entry.key.clone(), entries.len());
                entries.push(Entry { line: MERGED, ..entry.clone() });
            }
        }
    }
    Ok(())
}

/// Keys of Kubernetes objects are strings; numbers and booleans are read as their text.
fn key_text(node: &Node, span: Span) -> Result<String, SyntaxError> {
    match &node.value {
        Value::String(s) => Ok(s.clone()),
        Value::Number(n) => Ok(n.to_string()),
        Value::Bool(b) => Ok(b.to_string()),
        Value::Null => Ok("null".to_owned()),
        Value::Sequence(_) | Value::Mapping(_) => Err(error(span, "a key must be a plain value")),
    }
}

/// Number of nodes and depth.
fn measure(node: &Node) -> (usize, usize) {
    let children = |nodes: &mut dyn Iterator<Item = &Node>| {
        nodes.map(measure).fold((1, 1), |(n, d), (cn, cd)| (n + cn, d.max(cd + 1)))
    };
    match &node.value {
        Value::Sequence(items) => children(&mut items.iter()),
        Value::Mapping(entries) => children(&mut entries.iter().map(|e| &e.value)),
        _ => (1, 0),
    }
}

fn scalar(text: &str, style: ScalarStyle, tag: Option<&Tag>) -> Value {
    let string = tag.is_some_and(|tag| tag.is_yaml_core_schema() && tag.suffix == "str");
    if style != ScalarStyle::Plain || string {
        return Value::String(text.to_owned());
    }
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "true" | "True" | "TRUE" | "yes" | "Yes" | "YES" | "on" | "On" | "ON" => {
            return Value::Bool(true);
        }
        "false" | "False" | "FALSE" | "no" | "No" | "NO" | "off" | "Off" | "OFF" => {
            return Value::Bool(false);
        }
        _ => {}
    }
    number(text).map_or_else(|| Value::String(text.to_owned()), Value::Number)
}

fn number(text: &str) -> Option<serde_json::Number> {
    let (negative, digits) = match text.as_bytes() {
        [b'-', ..] => (true, &text[1..]),
        [b'+', ..] => (false, &text[1..]),
        _ => (false, text),
    };
    if !digits.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return None;
    }
    // Behind a prefix too: `from_str_radix` takes a sign of its own.
    let radix = |digits: &str, radix| {
        let plain = digits.starts_with(|c: char| c.is_ascii_hexdigit());
        plain.then(|| i64::from_str_radix(digits, radix).ok()).flatten()
    };
    let integer = if let Some(hex) = digits.strip_prefix("0x") {
        radix(hex, 16)
    } else if let Some(octal) = digits.strip_prefix("0o") {
        radix(octal, 8)
    } else if let Some(binary) = digits.strip_prefix("0b") {
        radix(binary, 2)
    } else if digits.len() > 1
        && digits.starts_with('0')
        && digits.bytes().all(|b| b.is_ascii_digit())
    {
        // `0644` is octal in YAML 1.1, as file modes are written. `0899` is not a number there.
        radix(digits, 8)
    } else {
        digits.parse().ok()
    };
    if let Some(integer) = integer {
        return Some(if negative { -integer } else { integer }.into());
    }
    let float =
        digits.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'.' | b'e' | b'E' | b'-' | b'+'))
            && digits.contains(['.', 'e', 'E'])
            && digits.contains(|c: char| c.is_ascii_digit());
    // Dots inside, as in an address, do not parse.
    let value: f64 = float.then(|| digits.parse().ok()).flatten()?;
    serde_json::Number::from_f64(if negative { -value } else { value })
}

fn error(span: Span, message: &str) -> SyntaxError {
    SyntaxError {
        line: clamp(span.start.line()),
        column: clamp(span.start.col()).saturating_add(1),
        message: message.to_owned(),
    }
}

fn clamp(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
