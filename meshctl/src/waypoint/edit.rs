//! Sets or takes away one label of a Namespace in a file that a person wrote. Pure.
//!
//! The file is edited as text, at the line that the parser names, so that comments, order and style stay. Each way to write
//! YAML is a guess; a guess counts only if the edited file, read again, holds exactly the same objects but for this one
//! label. So what cannot be edited safely is not edited.

use std::collections::BTreeMap;

use compile::{Body, Object, ParsedFile, parse_file};
use k8s_openapi::api::core::v1::Namespace;

/// What to do with the label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change<'a> {
    Set(&'a str),
    Remove,
}

/// The label of a Namespace.
#[derive(Clone, Copy, Debug)]
pub(super) struct Label<'a> {
    pub(super) namespace: &'a str,
    pub(super) name: &'a str,
}

/// The text with the label changed; `None` when no safe way was found. `file` is for the parser's messages.
pub(super) fn edit(file: &str, text: &str, label: Label<'_>, change: Change<'_>) -> Option<String> {
    let before = parse_file(file, text);
    let object = before.objects.iter().find(|o| is_namespace(o, label.namespace))?;
    let Body::Namespace(namespace) = &object.body else { return None };
    let labels = namespace.metadata.labels.as_ref();
    let known = labels.and_then(|l| l.get(label.name)).map(String::as_str);
    if known == wanted(change) {
        return Some(text.to_owned());
    }
    let line = |field: &str| {
        let at = object.origin.at(field);
        at.rsplit_once(':').and_then(|(_, line)| line.parse::<usize>().ok()?.checked_sub(1))
    };
    let lines = Lines::of(text);
    let guesses = match (change, known) {
        (Change::Remove, None) => return Some(text.to_owned()),
        (Change::Remove, Some(_)) => {
            lines.without(line(&format!("metadata.labels.{}", label.name))?, label.name)
        }
        (Change::Set(value), Some(old)) => {
            let at = line(&format!("metadata.labels.{}", label.name))?;
            lines.with_value(at, label.name, old, value)
        }
        (Change::Set(value), None) if labels.is_some() => {
            lines.with_entry(line("metadata.labels")?, "labels", label.name, value)
        }
        (Change::Set(value), None) => lines.with_labels(line("metadata")?, label.name, value),
    };
    guesses
        .into_iter()
        .find(|guess| is_only_change(&before, &parse_file(file, guess), label, change))
}

fn wanted(change: Change<'_>) -> Option<&str> {
    match change {
        Change::Set(value) => Some(value),
        Change::Remove => None,
    }
}

fn is_namespace(object: &Object, name: &str) -> bool {
    matches!(object.body, Body::Namespace(_)) && &*object.name == name
}

/// Whether the two differ in this label, as wished, and in nothing else.
fn is_only_change(
    before: &ParsedFile,
    after: &ParsedFile,
    label: Label<'_>,
    change: Change<'_>,
) -> bool {
    let said = |parsed: &ParsedFile| {
        parsed.diagnostics.iter().map(|d| (d.code, d.message.clone())).collect::<Vec<_>>()
    };
    let same = |(a, b): (&Object, &Object)| {
        if !is_namespace(a, label.namespace) || !is_namespace(b, label.namespace) {
            return a.id() == b.id() && format!("{:?}", a.body) == format!("{:?}", b.body);
        }
        let (Body::Namespace(a), Body::Namespace(b)) = (&a.body, &b.body) else { return false };
        let (a, mut labels) = apart(a);
        let (b, after) = apart(b);
        match change {
            Change::Set(value) => drop(labels.insert(label.name.to_owned(), value.to_owned())),
            Change::Remove => drop(labels.remove(label.name)),
        }
        a == b && labels == after
    };
    before.complete == after.complete
        && before.objects.len() == after.objects.len()
        && said(before) == said(after)
        && before.objects.iter().zip(&after.objects).all(same)
}

fn apart(namespace: &Namespace) -> (Namespace, BTreeMap<String, String>) {
    let mut rest = namespace.clone();
    let labels = rest.metadata.labels.take().unwrap_or_default();
    (rest, labels)
}

/// The lines of a text with their ends.
struct Lines<'a>(Vec<&'a str>);

impl<'a> Lines<'a> {
    fn of(text: &'a str) -> Self {
        Self(text.split_inclusive('\n').collect())
    }

    /// The whole text with one line replaced.
    fn replaced(&self, at: usize, line: &str) -> String {
        let mut all = self.0.clone();
        all[at] = line;
        all.concat()
    }

    fn end(&self, at: usize) -> &'static str {
        if self.0.get(at).is_some_and(|line| line.ends_with("\r\n")) { "\r\n" } else { "\n" }
    }

    /// The indentation of what stands below a line, if it stands deeper.
    fn indent_below(&self, at: usize) -> Option<&'a str> {
        let is_content = |line: &&&str| {
            let text = line.trim_start();
            !text.trim_end().is_empty() && !text.starts_with('#')
        };
        let below = self.0.iter().skip(at + 1).find(is_content)?;
        let indent = indent(below);
        (indent.len() > indent_of_key(self.0.get(at)?).len()).then_some(indent)
    }

    /// A new entry in the mapping that `key` opens on a line.
    fn with_entry(&self, at: usize, key: &str, name: &str, value: &str) -> Vec<String> {
        let Some(line) = self.0.get(at) else { return vec![] };
        let mut guesses = vec![];
        for value in scalars(value) {
            if opens_block(line, key)
                && let Some(indent) = self.indent_below(at)
            {
                let entry = format!("{}{indent}{name}: {value}{}", ended(line), self.end(at));
                guesses.push(self.replaced(at, &entry));
            }
            for (after, quoted) in opens_flow(line, key) {
                let rest = &line[after..];
                let name = if quoted { format!("\"{name}\"") } else { name.to_owned() };
                let value = if quoted { quote(&value) } else { value.clone() };
                let comma = if rest.trim_start().starts_with('}') { "" } else { ", " };
                let entry = format!("{}{name}: {value}{comma}{rest}", &line[..after]);
                guesses.push(self.replaced(at, &entry));
            }
        }
        guesses
    }

    /// New `labels` in the mapping that `metadata` opens on a line.
    fn with_labels(&self, at: usize, name: &str, value: &str) -> Vec<String> {
        let Some(line) = self.0.get(at) else { return vec![] };
        let mut guesses = vec![];
        for value in scalars(value) {
            if opens_block(line, "metadata")
                && let Some(indent) = self.indent_below(at)
            {
                let end = self.end(at);
                let entry =
                    format!("{}{indent}labels:{end}{indent}  {name}: {value}{end}", ended(line));
                guesses.push(self.replaced(at, &entry));
            }
            for (after, quoted) in opens_flow(line, "metadata") {
                let entry = if quoted {
                    format!("\"labels\": {{\"{name}\": {}}}, ", quote(&value))
                } else {
                    format!("labels: {{{name}: {value}}}, ")
                };
                let entry = format!("{}{entry}{}", &line[..after], &line[after..]);
                guesses.push(self.replaced(at, &entry));
            }
        }
        guesses
    }

    fn with_value(&self, at: usize, name: &str, old: &str, new: &str) -> Vec<String> {
        let Some(line) = self.0.get(at) else { return vec![] };
        let mut guesses = vec![];
        for (start, _) in line.match_indices(name) {
            let after = start + name.len();
            let Some(offset) = line[after..].find(old) else { continue };
            let (from, to) = (after + offset, after + offset + old.len());
            for new in [new.to_owned(), quote(new)] {
                guesses.push(self.replaced(at, &format!("{}{new}{}", &line[..from], &line[to..])));
            }
        }
        guesses
    }

    /// Without an entry: its line, or its part of one.
    fn without(&self, at: usize, name: &str) -> Vec<String> {
        let Some(line) = self.0.get(at) else { return vec![] };
        let mut guesses = vec![self.replaced(at, "")];
        for (start, _) in line.match_indices(name) {
            let start = start - usize::from(line[..start].ends_with(['"', '\'']));
            let end = line[start..].find([',', '}', '\n', '\r']).map_or(line.len(), |n| start + n);
            let (head, tail) = (&line[..start], &line[end..]);
            if let Some(tail) = tail.strip_prefix(',') {
                guesses.push(self.replaced(at, &format!("{head}{}", tail.trim_start_matches(' '))));
            }
            if let Some(head) = head.trim_end().strip_suffix(',') {
                guesses.push(self.replaced(at, &format!("{head}{tail}")));
            }
            guesses.push(self.replaced(at, &format!("{}{tail}", head.trim_end_matches(' '))));
        }
        guesses
    }
}

/// A line with an end, also where the file's last line has none.
fn ended(line: &str) -> String {
    if line.ends_with('\n') { line.to_owned() } else { format!("{line}\n") }
}

fn indent(line: &str) -> &str {
    &line[..line.len() - line.trim_start_matches(' ').len()]
}

/// As far as the key is indented: `- metadata:` has its key behind the dash.
fn indent_of_key(line: &str) -> &str {
    let text = line.trim_start_matches([' ', '-']);
    &line[..line.len() - text.len()]
}

/// Whether a line is `key:` and no more, but perhaps a comment.
fn opens_block(line: &str, key: &str) -> bool {
    let text = line.trim_start_matches([' ', '-']);
    let quotes = |text: &str| text.trim_matches(['"', '\'']) == key;
    text.split_once(':').is_some_and(|(word, rest)| {
        let rest = rest.trim();
        quotes(word.trim_end()) && (rest.is_empty() || rest.starts_with('#'))
    })
}

/// Where the braces that a key opens on a line begin, and whether the key stands in double quotes.
fn opens_flow(line: &str, key: &str) -> Vec<(usize, bool)> {
    let opened = line.match_indices(key).filter_map(|(start, _)| {
        let after = start + key.len();
        let quoted = line[..start].ends_with('"') && line[after..].starts_with('"');
        let rest = line[after..].trim_start_matches(['"', '\'']).trim_start();
        let braces = rest.strip_prefix(':')?.trim_start().strip_prefix('{')?;
        Some((line.len() - braces.len(), quoted))
    });
    opened.collect()
}

/// Ways to write a text: plain, and in quotes where plain means something else (`true`, `123`).
fn scalars(text: &str) -> [String; 2] {
    [text.to_owned(), quote(text)]
}

/// In double quotes, unless it is already. Names have no character that needs more.
fn quote(text: &str) -> String {
    if text.starts_with('"') { text.to_owned() } else { format!("\"{text}\"") }
}

/// What changed, as `-` and `+` lines.
pub(super) fn diff(before: &str, after: &str) -> Vec<String> {
    let (old, new): (Vec<&str>, Vec<&str>) = (before.lines().collect(), after.lines().collect());
    let same_start = old.iter().zip(&new).take_while(|(a, b)| a == b).count();
    let (old, new) = (&old[same_start..], &new[same_start..]);
    let same_end = old.iter().rev().zip(new.iter().rev()).take_while(|(a, b)| a == b).count();
    let removed = old[..old.len() - same_end].iter().map(|line| format!("-{line}"));
    removed.chain(new[..new.len() - same_end].iter().map(|line| format!("+{line}"))).collect()
}

#[cfg(test)]
mod tests;
