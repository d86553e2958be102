//! Regular expressions that users write: RE2's syntax and guarantees, compiled once, within bounds.

use std::fmt;

use regex::{Regex, RegexBuilder};

use crate::Str;

/// Bytes of a pattern's text: far above what people write, far below what a generator of bombs needs.
const MAX_TEXT: usize = 1024;
/// Bytes that a compiled pattern may take: `(a{1000}){1000}` is refused here.
const MAX_COMPILED: usize = 256 << 10;
/// Sizes that are told apart: the regex crate says only whether a pattern fits. With all that it builds beside (the same
/// backwards, once more for whole texts) a pattern takes about five times as much.
const SIZES: [usize; 4] = [4 << 10, 16 << 10, 64 << 10, MAX_COMPILED];

/// A regular expression that fits only the whole text. Matching takes time linear in the text.
#[derive(Clone)]
pub struct Pattern {
    text: Str,
    whole: Regex,
    part: Regex,
    size: usize,
}

/// Why a pattern is not acceptable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PatternError(String);

impl Pattern {
    pub fn new(text: &str) -> Result<Self, PatternError> {
        if text.len() > MAX_TEXT {
            return Err(PatternError(format!(
                "has {} bytes, at most {MAX_TEXT} are allowed",
                text.len()
            )));
        }
        let build = |text: &str, size: usize| {
            RegexBuilder::new(text).size_limit(size).dfa_size_limit(MAX_COMPILED).build()
        };
        // First as it is: `a)(b` is no pattern, but would be one inside a group.
        let mut fits = Err(regex::Error::CompiledTooBig(MAX_COMPILED));
        for size in SIZES {
            fits = build(text, size).map(|part| (part, size));
            if !matches!(fits, Err(regex::Error::CompiledTooBig(_))) {
                break;
            }
        }
        let (part, size) = fits.map_err(|e| PatternError::of(&e))?;
        let whole = format!("^(?:{text})$");
        let whole = build(&whole, MAX_COMPILED).map_err(|e| PatternError::of(&e))?;
        Ok(Self { text: text.into(), whole, part, size })
    }

    /// Bytes that it takes once compiled, rounded up to one of a few sizes: to bound the sum of many patterns.
    pub fn size(&self) -> usize {
        self.size
    }

    /// As the user wrote it.
    pub fn text(&self) -> &Str {
        &self.text
    }

    pub fn matches(&self, text: &str) -> bool {
        self.whole.is_match(text)
    }

    /// Replaces the first place that fits. `\1` names a group, `\0` all of it, as in RE2.
    pub fn replace(&self, text: &str, substitution: &str) -> Option<String> {
        let found = self.part.captures(text)?;
        let whole = found.get(0)?;
        let mut replaced = text[..whole.start()].to_owned();
        let mut chars = substitution.chars();
        while let Some(c) = chars.next() {
            match (c, chars.clone().next()) {
                ('\\', Some(next)) if next.is_ascii_digit() => {
                    let group = next.to_digit(10).unwrap_or_default() as usize;
                    replaced.push_str(found.get(group).map_or("", |m| m.as_str()));
                    chars.next();
                }
                ('\\', Some('\\')) => {
                    replaced.push('\\');
                    chars.next();
                }
                _ => replaced.push(c),
            }
        }
        replaced.push_str(&text[whole.end()..]);
        Some(replaced)
    }
}

impl PatternError {
    fn of(error: &regex::Error) -> Self {
        Self(match error {
            regex::Error::CompiledTooBig(limit) => {
                format!("is too large once compiled: more than {limit} bytes")
            }
            // The crate draws a picture over several lines; its last line says what is wrong.
            other => {
                let text = other.to_string();
                text.lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned()
            }
        })
    }
}

impl fmt::Display for PatternError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for PatternError {}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Pattern {}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}/", self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_texts_only() {
        let pattern = Pattern::new("/v[0-9]+|/w").unwrap();
        for (text, fits) in
            [("/v1", true), ("/w", true), ("/v1/x", false), ("x/w", false), ("/w\n", false)]
        {
            assert_eq!(pattern.matches(text), fits, "{text:?}");
        }
    }

    #[test]
    fn what_is_no_pattern_or_too_much_is_refused() {
        for (text, words) in [
            ("a)(b", "unopened group"),
            ("(a{1000}){1000}", "too large"),
            (&"a".repeat(2000), "2000 bytes"),
            ("(?=a)", "look-around"),
        ] {
            let error = Pattern::new(text).unwrap_err().to_string();
            assert!(error.contains(words), "{text:.20}: {error}");
        }
    }

    #[test]
    fn size_is_what_it_takes_not_what_is_written() {
        let size = |text: &str| Pattern::new(text).unwrap().size() >> 10;
        assert_eq!([size("/v[0-9]+/.*"), size("a{4000}"), size("a{300}")], [4, 256, 16]);
    }

    #[test]
    fn replaces_with_groups() {
        let check = |pattern: &str, text: &str, by: &str, result: Option<&str>| {
            assert_eq!(Pattern::new(pattern).unwrap().replace(text, by).as_deref(), result);
        };
        check(
            "^/service/([^/]+)(/.*)$",
            "/service/foo/v1/api",
            r"\2/instance/\1",
            Some("/v1/api/instance/foo"),
        );
        check("one", "/xxx/one/yyy/one", "two", Some("/xxx/two/yyy/one"));
        check("one", "/two", "x", None);
        check("(a)?b", "b", r"[\1]\9\\", Some(r"[]\"));
    }
}
