//! Reads the proxies' access logs: `TIME\tLEVEL\taccess\tMESSAGE\tkey=value key="value"`.

use std::collections::BTreeMap;

/// One connection, as one proxy saw it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Line {
    pub level: String,
    pub message: String,
    fields: BTreeMap<String, String>,
}

impl Line {
    /// A field, or an empty text when the line does not have it.
    pub fn get(&self, field: &str) -> &str {
        self.fields.get(field).map_or("", String::as_str)
    }

    pub fn number(&self, field: &str) -> u64 {
        self.get(field).parse().unwrap_or_default()
    }

    /// Whether all these fields have these values.
    pub fn has(&self, fields: &[(&str, &str)]) -> bool {
        fields.iter().all(|(name, value)| self.get(name) == *value)
    }

    /// Who called whom, for people: `ns/pod (identity) -> ns/pod (identity)`.
    pub fn summary(&self) -> String {
        let party = |side: &str| {
            let name = format!(
                "{}/{}",
                self.get(&format!("{side}.namespace")),
                self.get(&format!("{side}.workload"))
            );
            match self.get(&format!("{side}.identity")) {
                "" => format!("{name} (no identity)"),
                id => format!("{name} ({id})"),
            }
        };
        format!("{} {} -> {}", self.get("direction"), party("src"), party("dst"))
    }
}

/// The access-log lines of a proxy's whole log.
pub fn parse(log: &str) -> Vec<Line> {
    log.lines().filter_map(line).collect()
}

fn line(text: &str) -> Option<Line> {
    let mut parts = text.splitn(5, '\t');
    let (_time, level) = (parts.next()?, parts.next()?);
    if parts.next()? != "access" {
        return None;
    }
    let (message, rest) = (parts.next()?, parts.next()?);
    Some(Line { level: level.to_owned(), message: message.to_owned(), fields: fields(rest)? })
}

/// A line that is cut off in the middle is none yet.
fn fields(mut text: &str) -> Option<BTreeMap<String, String>> {
    let mut fields = BTreeMap::new();
    while !text.is_empty() {
        let (name, rest) = text.split_once('=')?;
        let (value, rest) = if rest.starts_with('"') {
            let mut values = serde_json::Deserializer::from_str(rest).into_iter::<String>();
            let value = values.next()?.ok()?;
            (value, &rest[values.byte_offset()..])
        } else {
            let end = rest.find(' ').unwrap_or(rest.len());
            (rest[..end].to_owned(), &rest[end..])
        };
        fields.insert(name.to_owned(), value);
        text = rest.strip_prefix(' ').unwrap_or(rest);
    }
    Some(fields)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines() {
        let text = "2026-01-01T00:00:00Z\tinfo\taccess\tconnection complete\tsrc.addr=10.0.0.1:5 src.workload=\"a \\\"b\\\"\" bytes_sent=7\n\
                    2026-01-01T00:00:00Z\tinfo\txds\tconnected\n\
                    2026-01-01T00:00:00Z\terror\taccess\tconnection failed\treason=\"policy_deny\" err";
        let lines = parse(text);
        assert_eq!(lines.len(), 1);
        assert!(lines[0].has(&[("src.addr", "10.0.0.1:5"), ("src.workload", "a \"b\"")]));
        assert_eq!(lines[0].number("bytes_sent"), 7);
        assert_eq!(lines[0].get("reason"), "");
    }
}
