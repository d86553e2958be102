//! Regular expressions that users write: RE2's syntax and guarantees, compiled once, within bounds.
//!
//! Where RE2 and our engine read the same words in two ways, RE2's reading counts: `\w`, `\d`, `\s` and `\b` are ASCII, and
//! within brackets `[`, `&` and `~` stand for themselves. What RE2 takes and our engine does not is told apart from
//! what is no pattern to anybody ([`PatternError::is_ours`]).

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
pub struct PatternError {
    message: String,
    ours: bool,
}

impl Pattern {
    pub fn new(text: &str) -> Result<Self, PatternError> {
        if text.len() > MAX_TEXT {
            let message = format!("has {} bytes, at most {MAX_TEXT} are allowed", text.len());
            return Err(PatternError { message, ours: true });
        }
        let build = |text: &str, size: usize| {
            RegexBuilder::new(text).size_limit(size).dfa_size_limit(MAX_COMPILED).build()
        };
        let read = as_re2(text);
        // First as it is: `a)(b` is no pattern, but would be one inside a group.
        let mut fits = Err(regex::Error::CompiledTooBig(MAX_COMPILED));
        for size in SIZES {
            fits = build(&read, size).map(|part| (part, size));
            if !matches!(fits, Err(regex::Error::CompiledTooBig(_))) {
                break;
            }
        }
        let (part, size) = fits.map_err(|e| PatternError::of(&e, text))?;
        let whole = build(&format!("^(?:{read})$"), MAX_COMPILED);
        let whole = whole.map_err(|e| PatternError::of(&e, text))?;
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
    /// A limit of ours, in words that follow the pattern.
    pub fn limit(message: String) -> Self {
        Self { message, ours: true }
    }

    /// Whether the pattern may be one, and only we do not take it: it is too large, or RE2 knows words that we do not.
    pub fn is_ours(&self) -> bool {
        self.ours
    }

    fn of(error: &regex::Error, text: &str) -> Self {
        match error {
            regex::Error::CompiledTooBig(limit) => {
                let message = format!("is too large once compiled: more than {limit} bytes");
                Self { message, ours: true }
            }
            // The crate draws a picture over several lines; its last line says what is wrong.
            other => {
                let picture = other.to_string();
                let last = picture.lines().last().unwrap_or_default();
                // Quotes and single bytes are RE2's own.
                let ours = text.contains("\\Q") || text.contains("\\C");
                Self { message: last.trim_start_matches("error: ").to_owned(), ours }
            }
        }
    }
}

/// The pattern in the words of our engine.
fn as_re2(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    let mut in_class = false;
    while let Some(c) = rest.chars().next() {
        let (taken, read) = match (c, in_class) {
            ('\\', _) => {
                let escape = &rest[..1 + rest[1..].chars().next().map_or(0, char::len_utf8)];
                // The end of a range is one character; what is none is for the engine to refuse.
                let ends_range = in_class
                    && out.ends_with('-')
                    && !["[-", "[^-", "]-"].iter().any(|start| out.ends_with(start));
                let read = if ends_range { escape.to_owned() } else { ascii(escape, in_class) };
                (escape.len(), read)
            }
            ('[', false) => {
                in_class = true;
                let open = if rest.starts_with("[^") { "[^" } else { "[" };
                // A bracket that closes at once is one to match.
                let closes = rest[open.len()..].starts_with(']');
                (
                    open.len() + usize::from(closes),
                    if closes { [open, r"\]"].concat() } else { open.into() },
                )
            }
            (']', true) => {
                in_class = false;
                (1, "]".into())
            }
            // `[:alpha:]` and `[:^alpha:]`.
            ('[', true) if rest.starts_with("[:") => match rest.find(":]") {
                Some(end) => (end + 2, rest[..end + 2].into()),
                None => (1, r"\[".into()),
            },
            ('[' | '&' | '~', true) => (1, format!("\\{c}")),
            (c, _) => (c.len_utf8(), c.into()),
        };
        out.push_str(&read);
        rest = &rest[taken..];
    }
    out
}

/// What an escape means in RE2.
fn ascii(escape: &str, in_class: bool) -> String {
    let (of, not) = match escape {
        r"\d" => ("0-9", false),
        r"\D" => ("0-9", true),
        r"\w" => ("0-9A-Za-z_", false),
        r"\W" => ("0-9A-Za-z_", true),
        // Without the vertical tab.
        r"\s" => (r"\t\n\x0c\r ", false),
        r"\S" => (r"\t\n\x0c\r ", true),
        r"\b" if !in_class => return r"(?-u:\b)".to_owned(),
        r"\B" if !in_class => return r"(?-u:\B)".to_owned(),
        _ => return escape.to_owned(),
    };
    // In brackets, too: `[\w-z]` is no range.
    if not { format!("[^{of}]") } else { format!("[{of}]") }
}

impl fmt::Display for PatternError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
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
        for (text, words, ours) in [
            ("a)(b", "unopened group", false),
            ("(a{1000}){1000}", "too large", true),
            (&"a".repeat(2000), "2000 bytes", true),
            ("(?=a)", "look-around", false),
            (r"\p{Nobody}", "Unicode property not found", false),
            (r"\Qa.b\E", "unrecognized escape", true),
            ("[a", "unclosed", false),
        ] {
            let error = Pattern::new(text).unwrap_err();
            assert!(error.to_string().contains(words), "{text:.20}: {error}");
            assert_eq!(error.is_ours(), ours, "{text:.20}: {error}");
        }
    }

    #[test]
    fn the_words_of_re2() {
        for (pattern, text, fits) in [
            (r"\w{1,32}", "a_9", true),
            (r"[\w.-]{1,64}", "a.b-c", true),
            (r"[^\w]", "é", true),
            (r"\w", "é", false),
            (r"\W", "é", true),
            (r"[\W]", "é", true),
            (r"\d", "٣", false),
            (r"\D", "٣", true),
            (r"\s", "\u{b}", false),
            (r"[\s\S]*", "é\n", true),
            (r".*\bx\b.*", "é x", true),
            (r"é\B.*", "é ", true),
            (r"a\\w", r"a\w", true),
            (r"\pL+\p{Greek}\P{Lu}", "éαa", true),
            (r"...", "éaé", true),
            ("[[]", "[", true),
            ("[]a]+", "]a", true),
            ("[^]a]", "]", false),
            ("[a&&b]+", "a&b", true),
            ("[a~~b]", "~", true),
            ("[[:alpha:]_]+", "a_", true),
            ("[[:^digit:]]", "5", false),
            ("(?i)É", "é", true),
            (r"[\w-z]+", "a-z", true),
            (r"[\w-z]", "`", false),
            (r"[\w-\d]+", "-5", true),
            (r"[+-\d]", "5", false),
            (r"\", "", false),
        ] {
            let built = Pattern::new(pattern);
            assert_eq!(built.is_ok_and(|p| p.matches(text)), fits, "{pattern} {text:?}");
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
