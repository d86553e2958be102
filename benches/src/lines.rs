//! What the tool prints: one JSON object a line, each with an `event`, flushed at once, since the
//! benchmark reads them through a pipe as they happen.

use std::collections::BTreeMap;
use std::io::{self, Write};

use serde::Serialize;
use serde_json::{Value, json};

/// Counts of errors by kind, for example `ECONNREFUSED` or `timeout`.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(transparent)]
pub struct Errors(BTreeMap<String, u64>);

impl Errors {
    pub fn add(&mut self, kind: impl Into<String>) {
        *self.0.entry(kind.into()).or_default() += 1;
    }

    pub fn add_io(&mut self, error: &io::Error) {
        self.add(kind_of(error));
    }

    pub fn total(&self) -> u64 {
        self.0.values().sum()
    }

    pub fn merge(&mut self, other: &Self) {
        for (kind, count) in &other.0 {
            *self.0.entry(kind.clone()).or_default() += count;
        }
    }
}

/// The name of an error: the errno's when it has one.
pub fn kind_of(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(code) => format!("{:?}", nix::errno::Errno::from_raw(code)),
        None => format!("{:?}", error.kind()),
    }
}

/// The load begins: everything is connected that is connected beforehand.
pub fn begin() -> io::Result<()> {
    line(&json!({ "event": "begin" }))
}

/// The load has ended; what follows is bookkeeping.
pub fn end() -> io::Result<()> {
    line(&json!({ "event": "end" }))
}

/// The last line of a client.
pub fn result(mut value: Value) -> io::Result<()> {
    value["event"] = "result".into();
    line(&value)
}

/// One line on standard output.
pub fn line(value: &Value) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{value}")?;
    out.flush()
}
