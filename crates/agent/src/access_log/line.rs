//! The two forms of a line.

use std::fmt::{self, Display, Write};
use std::time::SystemTime;

use super::http::HttpRecord;
use super::time::Utc;
use super::{ConnectionRecord, Direction, Format, Outcome, Party};

/// Characters of a value that comes from outside; the rest is cut, so that a line stays a line.
const MAX_VALUE: usize = 1_024;

/// What every line begins with.
struct Line {
    level: &'static str,
    message: &'static str,
    /// When it ended.
    time: SystemTime,
}

pub(super) fn connection(
    out: &mut String,
    format: Format,
    record: &ConnectionRecord<'_>,
) -> fmt::Result {
    let (level, message) = headline(record);
    let line = Line { level, message, time: record.start + record.duration };
    match format {
        Format::Text => fill(&mut text(out, &line)?, record),
        Format::Json => {
            fill(&mut json(out, &line)?, record)?;
            out.write_char('}')
        }
    }
}

pub(super) fn request(out: &mut String, format: Format, record: &HttpRecord<'_>) -> fmt::Result {
    let (level, message) = record.headline();
    let line = Line { level, message, time: record.start + record.duration };
    match format {
        Format::Text => record.fill(&mut text(out, &line)?),
        Format::Json => {
            record.fill(&mut json(out, &line)?)?;
            out.write_char('}')
        }
    }
}

fn text<'a>(out: &'a mut String, line: &Line) -> Result<Text<'a>, fmt::Error> {
    let Line { level, message, time } = line;
    write!(out, "{}\t{level}\taccess\t{message}\t", Utc(*time))?;
    Ok(Text { out, first: true })
}

fn json<'a>(out: &'a mut String, line: &Line) -> Result<Json<'a>, fmt::Error> {
    let Line { level, message, time } = line;
    let time = Utc(*time);
    write!(
        out,
        "{{\"level\":\"{level}\",\"time\":\"{time}\",\"scope\":\"access\",\"message\":\"{message}\""
    )?;
    Ok(Json { out })
}

fn headline(record: &ConnectionRecord<'_>) -> (&'static str, &'static str) {
    match record.outcome {
        Outcome::Complete => ("info", "connection complete"),
        Outcome::Failed { .. } => ("error", "connection failed"),
    }
}

/// Where fields go: the same fields in the same order in both forms.
pub(super) trait Fields {
    /// A value that needs no quotes in text: addresses, words.
    fn plain(&mut self, name: &str, value: impl Display) -> fmt::Result;
    /// A value that may hold anything.
    fn quoted(&mut self, name: &str, value: impl Display) -> fmt::Result;
    fn number(&mut self, name: &str, value: u64) -> fmt::Result;
}

fn fill(f: &mut impl Fields, r: &ConnectionRecord<'_>) -> fmt::Result {
    let names = ["src.addr", "src.workload", "src.namespace", "src.identity", "src.cluster"];
    party(f, names, &r.source, |_| Ok(()))?;
    if let Some(client) = r.client {
        f.quoted("client.identity", client)?;
    }
    let names = ["dst.addr", "dst.workload", "dst.namespace", "dst.identity", "dst.cluster"];
    party(f, names, &r.destination, |f| {
        if let Some(address) = r.hbone_address {
            f.plain("dst.hbone_addr", address)?;
        }
        match r.service {
            Some(service) => f.quoted("dst.service", &service.hostname),
            None => Ok(()),
        }
    })?;
    let (direction, sent, received) = match r.direction {
        Direction::Inbound => ("inbound", r.from_server, r.from_client),
        Direction::Outbound => ("outbound", r.from_client, r.from_server),
        Direction::Waypoint => ("waypoint", r.from_server, r.from_client),
    };
    f.quoted("direction", direction)?;
    if r.same_node {
        f.plain("same_node", "direct")?;
    }
    if let Some(proxy) = r.destination.workload.filter(|_| r.waypoint) {
        f.quoted("waypoint", format_args!("{}/{}", proxy.namespace, proxy.workload_name))?;
    }
    f.number("bytes_sent", sent)?;
    f.number("bytes_recv", received)?;
    f.quoted("duration", format_args!("{}ms", r.duration.as_millis()))?;
    if let Some(policy) = r.policy {
        f.quoted("policy", policy)?;
    }
    if let Some(rule) = r.rule {
        f.quoted("rule", rule)?;
    }
    if let Outcome::Failed { reason, message } = r.outcome {
        f.quoted("reason", reason)?;
        f.quoted("error", message)?;
    }
    f.quoted("config", r.config)
}

/// The fields of one end, in Istio's order; `after_address` adds what stands between.
pub(super) fn party<F: Fields>(
    f: &mut F,
    [address, workload, namespace, identity, cluster]: [&str; 5],
    party: &Party<'_>,
    after_address: impl FnOnce(&mut F) -> fmt::Result,
) -> fmt::Result {
    if let Some(at) = party.address {
        f.plain(address, at)?;
    }
    after_address(f)?;
    if let Some(w) = party.workload {
        f.quoted(workload, &w.name)?;
        f.quoted(namespace, &w.namespace)?;
    }
    if let Some(id) = party.identity {
        f.quoted(identity, id)?;
    }
    match party.workload {
        Some(w) => f.quoted(cluster, &w.cluster),
        None => Ok(()),
    }
}

struct Text<'a> {
    out: &'a mut String,
    first: bool,
}

impl Text<'_> {
    fn name(&mut self, name: &str) -> fmt::Result {
        let space = if std::mem::take(&mut self.first) { "" } else { " " };
        write!(self.out, "{space}{name}=")
    }
}

impl Fields for Text<'_> {
    fn plain(&mut self, name: &str, value: impl Display) -> fmt::Result {
        self.name(name)?;
        write!(self.out, "{value}")
    }

    fn quoted(&mut self, name: &str, value: impl Display) -> fmt::Result {
        self.name(name)?;
        quote(self.out, value)
    }

    fn number(&mut self, name: &str, value: u64) -> fmt::Result {
        self.plain(name, value)
    }
}

struct Json<'a> {
    out: &'a mut String,
}

impl Fields for Json<'_> {
    fn plain(&mut self, name: &str, value: impl Display) -> fmt::Result {
        self.quoted(name, value)
    }

    fn quoted(&mut self, name: &str, value: impl Display) -> fmt::Result {
        write!(self.out, ",\"{name}\":")?;
        quote(self.out, value)
    }

    fn number(&mut self, name: &str, value: u64) -> fmt::Result {
        write!(self.out, ",\"{name}\":{value}")
    }
}

/// A JSON string; it serves the text form as well.
fn quote(out: &mut String, value: impl Display) -> fmt::Result {
    out.push('"');
    write!(Escaped { out, left: MAX_VALUE }, "{value}")?;
    out.push('"');
    Ok(())
}

struct Escaped<'a> {
    out: &'a mut String,
    left: usize,
}

impl Write for Escaped<'_> {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        let usual = |b: u8| (0x20..0x7f).contains(&b) && b != b'"' && b != b'\\';
        if s.len() <= self.left && s.bytes().all(usual) {
            self.left -= s.len();
            self.out.push_str(s);
            return Ok(());
        }
        for c in s.chars() {
            if self.left == 0 {
                return Ok(());
            }
            self.left -= 1;
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                c if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}') => {
                    write!(self.out, "\\u{:04x}", u32::from(c))?;
                }
                c => self.out.push(c),
            }
        }
        Ok(())
    }
}
