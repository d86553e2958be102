//! What the decoding of routes is made of: the resource at hand, its lists, and values that occur in many places.

use model::http::limits::{MAX_LIST, MAX_PATTERNS};
use model::http::{Pattern, Share};
use model::{ServiceKey, Str};
use rustc_hash::FxHashSet;

use crate::ambit as wire;
use crate::codec::context::{Cx, short};
use crate::codec::{DecodeError, Interner};

pub(super) type Result<T> = std::result::Result<T, DecodeError>;

/// The resource at hand, and how much of it there was so far.
pub(super) struct Reader<'a> {
    pub(super) cx: Cx<'a>,
    patterns: FxHashSet<Str>,
    /// Those of the rule at hand, as often as they are written.
    pub(super) patterns_of_rule: Vec<Str>,
    pub(super) rules: usize,
    pub(super) matches: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(resource: &'a str, interner: &'a mut Interner) -> Self {
        let cx = Cx { resource, interner };
        let (patterns, patterns_of_rule) = (FxHashSet::default(), Vec::new());
        Self { cx, patterns, patterns_of_rule, rules: 0, matches: 0 }
    }

    pub(super) fn service(&mut self, m: Option<&wire::ServiceName>) -> Result<ServiceKey> {
        let Some(m) = m else { return Err(self.error("service", "is not set")) };
        let plain = |s: &str| !s.is_empty() && !s.contains('/');
        if !plain(&m.namespace) || !plain(&m.hostname) {
            return Err(self.error("service", "is not namespace/hostname"));
        }
        let (namespace, hostname) = (self.cx.str(&m.namespace), self.cx.str(&m.hostname));
        Ok(ServiceKey { namespace, hostname })
    }

    pub(super) fn share(&self, m: Option<wire::Share>) -> Result<Share> {
        match m {
            Some(wire::Share { numerator, denominator: denominator @ 1.. }) => {
                Ok(Share { numerator, denominator })
            }
            _ => Err(self.error("share", "has no denominator")),
        }
    }

    /// The status of a final answer.
    pub(super) fn status(&self, field: &str, status: u32) -> Result<u16> {
        match u16::try_from(status) {
            Ok(status @ 200..=599) => Ok(status),
            _ => Err(self.error(field, format!("{status} is no status of an answer"))),
        }
    }

    pub(super) fn port(&self, field: &str, port: u32) -> Result<u16> {
        match self.cx.port(field, port)? {
            0 => Err(self.error(field, "0 is not a port")),
            port => Ok(port),
        }
    }

    /// Lower case, as HTTP/2 has them and as they are looked up.
    pub(super) fn header_name(&self, field: &str, name: &str) -> Result<()> {
        let token =
            |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"!#$%&'*+-.^_`|~".contains(&b);
        if !name.is_empty() && name.bytes().all(token) {
            return Ok(());
        }
        Err(self.error(field, format!("{:?} is no header name in lower case", short(name))))
    }

    pub(super) fn pattern(&mut self, field: &str, text: &str) -> Result<Pattern> {
        let pattern = self.cx.interner.pattern(text).map_err(|e| self.error(field, e))?;
        self.patterns_of_rule.push(pattern.text().clone());
        self.count(pattern.text().clone()).map_err(|problem| self.error(field, problem))?;
        Ok(pattern)
    }

    /// Counts a pattern, once however often it is written.
    pub(super) fn count(&mut self, text: Str) -> std::result::Result<(), String> {
        self.patterns.insert(text);
        let many = || format!("more than {MAX_PATTERNS} different patterns");
        if self.patterns.len() > MAX_PATTERNS { Err(many()) } else { Ok(()) }
    }

    pub(super) fn strings(&mut self, field: &str, all: &[String]) -> Result<Vec<Str>> {
        self.each(field, MAX_LIST, all, |r, s| Ok(r.cx.str(s)))
    }

    /// Every entry of a list; an error names the place.
    pub(super) fn each<T, U>(
        &mut self,
        field: &str,
        max: usize,
        all: &[T],
        mut one: impl FnMut(&mut Self, &T) -> Result<U>,
    ) -> Result<Vec<U>> {
        if all.len() > max {
            let problem = format!("{} entries, at most {max} are read", all.len());
            return Err(self.error(field, problem));
        }
        let mut read = Vec::with_capacity(all.len());
        for (i, entry) in all.iter().enumerate() {
            read.push(one(self, entry).map_err(|e| within(e, &format!("{field}[{i}]")))?);
        }
        Ok(read)
    }

    pub(super) fn optional<T, U>(
        &mut self,
        field: &str,
        message: Option<&T>,
        one: impl FnOnce(&mut Self, &T) -> Result<U>,
    ) -> Result<Option<U>> {
        message.map(|m| one(self, m)).transpose().map_err(|e| within(e, field))
    }

    pub(super) fn unknown(&self, field: &str) -> DecodeError {
        self.error(field, "is of a kind that this proxy does not know")
    }

    pub(super) fn error(&self, field: &str, problem: impl ToString) -> DecodeError {
        self.cx.error(field, problem)
    }
}

/// The error of a part, named by its place in the whole.
pub(super) fn within(error: DecodeError, place: &str) -> DecodeError {
    let field = match error.field.as_str() {
        "" => place.to_owned(),
        inner => format!("{place}.{inner}"),
    };
    DecodeError { field, ..error }
}
