//! Answers for people and for programs.

use std::collections::BTreeSet;
use std::fmt::Write;

use anyhow::Result;

use super::ask::{Answer, Decision};
use super::paths::{Path, RuleAt, Wire};

pub(super) fn json(answer: &Answer) -> Result<String> {
    Ok(format!("{}\n", serde_json::to_string_pretty(answer)?))
}

pub(super) fn text(answer: &Answer) -> String {
    let mut out = String::new();
    let word = match answer.answer {
        Decision::Yes => "yes",
        Decision::No => "no",
        Decision::Depends => "it depends",
    };
    let can = match answer.answer {
        Decision::Yes => "can call",
        Decision::No => "cannot call",
        Decision::Depends => "can call some endpoints of",
    };
    line(&mut out, &format!("{word}: {} {can} {}", answer.from, answer.to));
    // One block for each decision; usually there is one for all endpoints.
    let mut groups: Vec<(&Path, Vec<&Path>)> = Vec::new();
    for path in &answer.paths {
        match groups.iter_mut().find(|(first, _)| same_decision(first, path)) {
            Some((_, paths)) => paths.push(path),
            None => groups.push((path, vec![path])),
        }
    }
    for (first, paths) in &groups {
        let single = groups.len() == 1;
        block(&mut out, first, paths, single);
    }
    for note in &answer.notes {
        field(&mut out, "note", note);
    }
    out
}

/// Whether two paths are decided by the same thing; endpoints and callers may differ.
fn same_decision(a: &Path, b: &Path) -> bool {
    (a.allowed, a.reason, &a.policy, &a.rule, a.transport, a.waypoint.is_some())
        == (b.allowed, b.reason, &b.policy, &b.rule, b.transport, b.waypoint.is_some())
}

fn block(out: &mut String, first: &Path, paths: &[&Path], single: bool) {
    if !single {
        line(out, if first.allowed { "\nyes" } else { "\nno" });
    }
    field(out, "from", &callers(paths));
    let waypoints: BTreeSet<&str> = paths.iter().filter_map(|p| p.waypoint.as_deref()).collect();
    if !waypoints.is_empty() {
        field(out, "waypoint", &format!("pod {}", list(waypoints)));
    }
    if let Some(to) = endpoints(paths) {
        field(out, "to", &to);
    }
    let through = match first.transport {
        Wire::Hbone => {
            let expected: BTreeSet<&str> =
                paths.iter().flat_map(|p| p.expected.iter().map(String::as_str)).collect();
            format!("HBONE (mutual TLS) to {}", list(expected))
        }
        Wire::Plaintext => "plaintext: not encrypted, and no identity is shown".to_owned(),
        Wire::Nothing => "nothing: refused before a connection is made".to_owned(),
    };
    field(out, "through", &through);
    let mut why = first.why.clone();
    if paths.iter().any(|p| p.why != first.why) {
        why.push_str(" (and likewise for the others)");
    }
    match first.reason {
        Some(reason) => field(out, "because", &format!("{reason}: {why}")),
        None => field(out, "because", &why),
    }
    if let Some(rule) = &first.rule {
        field(out, "rule", &at(rule));
    }
    if let Some(help) = first.help {
        field(out, "help", help);
    }
}

fn callers(paths: &[&Path]) -> String {
    let all: BTreeSet<String> = paths
        .iter()
        .map(|p| match &p.identity {
            Some(identity) => format!("{identity} (pod {})", p.caller),
            None => format!("pod {}", p.caller),
        })
        .collect();
    list(all.iter().map(String::as_str))
}

fn endpoints(paths: &[&Path]) -> Option<String> {
    let all: BTreeSet<String> = paths
        .iter()
        .filter_map(|p| match (&p.endpoint, p.address) {
            (Some(endpoint), Some(address)) => Some(format!("pod {endpoint} at {address}")),
            (None, Some(address)) => Some(address.to_string()),
            _ => None,
        })
        .collect();
    (!all.is_empty()).then(|| list(all.iter().map(String::as_str)))
}

/// What fits on a line; the rest as a number. JSON has them all.
fn list<'a>(all: impl IntoIterator<Item = &'a str>) -> String {
    const SHOWN: usize = 4;
    let all: Vec<&str> = all.into_iter().collect();
    let shown = all.iter().take(SHOWN).copied().collect::<Vec<_>>().join(", ");
    if all.len() > SHOWN { format!("{shown} and {} more", all.len() - SHOWN) } else { shown }
}

fn at(rule: &RuleAt) -> String {
    let mut text =
        if rule.object.is_empty() { "unknown object".to_owned() } else { rule.object.clone() };
    if !rule.field.is_empty() {
        text = format!("{text} {}", rule.field);
    }
    if !rule.origin.is_empty() {
        text = format!("{text} ({})", rule.origin);
    }
    text
}

fn field(out: &mut String, name: &str, value: &str) {
    line(out, &format!("  {name:<8} {value}"));
}

fn line(out: &mut String, text: &str) {
    // A String takes whatever is written to it.
    let _: std::fmt::Result = writeln!(out, "{text}");
}
