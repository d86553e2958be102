//! Rust source as a flat list of tokens with lines, without comments, strings' contents and test code.
//!
//! Not a parser: the rules need words and braces only, and this way code inside macros is seen too.

use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// A token of non-test code: an identifier, a punctuation character, a bracket, or `"` for any literal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spot {
    pub text: String,
    pub line: usize,
}

/// A function with a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    pub name: String,
    pub line: usize,
    /// From the `fn` to the closing brace.
    pub lines: usize,
}

/// What the rules look at in one file.
#[derive(Debug, Default)]
pub struct Source {
    pub spots: Vec<Spot>,
    pub functions: Vec<Function>,
}

impl Source {
    /// Reads a file's text; `None` when it is not Rust.
    pub fn parse(text: &str) -> Option<Self> {
        // A script header is no token.
        let stream: TokenStream = text.parse().ok()?;
        let mut source = Self::default();
        source.walk(stream);
        Some(source)
    }

    /// The lines on which the tokens of `words` follow each other, for example `["todo", "!"]`.
    /// A brace list is looked into: `std::{env, fs}` holds `std::env` and `std::fs`.
    pub fn lines_of(&self, words: &[&str]) -> Vec<usize> {
        let matches_at = |at: usize| {
            words
                .iter()
                .enumerate()
                .all(|(i, w)| self.spots.get(at + i).is_some_and(|s| s.text == *w))
        };
        let mut lines: Vec<usize> = (0..self.spots.len())
            .filter(|at| matches_at(*at))
            .map(|at| self.spots[at].line)
            .collect();
        if let [head @ .., last] = words
            && head.last() == Some(&":")
        {
            lines.extend(self.in_use_lists(head, last));
        }
        lines
    }

    fn in_use_lists(&self, head: &[&str], last: &str) -> Vec<usize> {
        let mut lines = Vec::new();
        for at in 0..self.spots.len() {
            let starts = head
                .iter()
                .enumerate()
                .all(|(i, w)| self.spots.get(at + i).is_some_and(|s| s.text == *w));
            let open = at + head.len();
            if !starts || self.spots.get(open).is_none_or(|s| s.text != "{") {
                continue;
            }
            let mut depth = 1_u32;
            for (i, spot) in self.spots.iter().enumerate().skip(open + 1) {
                match spot.text.as_str() {
                    "{" => depth += 1,
                    "}" => depth -= 1,
                    // Only the first segment of an entry: `{fmt, net::env}` is not `env`.
                    text if depth == 1
                        && text == last
                        && matches!(self.spots[i - 1].text.as_str(), "{" | ",") =>
                    {
                        lines.push(spot.line);
                    }
                    _ => {}
                }
                if depth == 0 {
                    break;
                }
            }
        }
        lines
    }

    fn walk(&mut self, stream: TokenStream) {
        let tokens: Vec<TokenTree> = stream.into_iter().collect();
        let mut at = 0;
        while at < tokens.len() {
            if is_test_attribute(&tokens[at..]) {
                at = end_of_item(&tokens, at);
                continue;
            }
            if let Some(function) = function_at(&tokens[at..]) {
                self.functions.push(function);
            }
            self.push(&tokens[at]);
            at += 1;
        }
    }

    fn push(&mut self, token: &TokenTree) {
        let line = token.span().start().line;
        let mut spot = |text: String, line| self.spots.push(Spot { text, line });
        match token {
            TokenTree::Ident(ident) => spot(ident.to_string(), line),
            TokenTree::Punct(punct) => spot(punct.as_char().to_string(), line),
            TokenTree::Literal(_) => spot("\"".to_owned(), line),
            TokenTree::Group(group) => {
                let (open, close) = match group.delimiter() {
                    Delimiter::Brace => ("{", "}"),
                    Delimiter::Parenthesis => ("(", ")"),
                    Delimiter::Bracket => ("[", "]"),
                    Delimiter::None => ("", ""),
                };
                spot(open.to_owned(), line);
                self.walk(group.stream());
                self.spots
                    .push(Spot { text: close.to_owned(), line: group.span_close().start().line });
            }
        }
    }
}

/// `#[cfg(test)]` (or a `cfg` that demands `test` among others) or `#[test]` at the head of `tokens`.
fn is_test_attribute(tokens: &[TokenTree]) -> bool {
    let [TokenTree::Punct(hash), TokenTree::Group(attribute), ..] = tokens else { return false };
    if hash.as_char() != '#' || attribute.delimiter() != Delimiter::Bracket {
        return false;
    }
    let text: String = attribute.stream().to_string().split_whitespace().collect();
    text == "test"
        || text == "cfg(test)"
        || text.starts_with("cfg(all(test,")
        || text.ends_with("::test")
}

/// The index after the item that starts at `at`: behind its body or its semicolon.
fn end_of_item(tokens: &[TokenTree], at: usize) -> usize {
    for (i, token) in tokens.iter().enumerate().skip(at) {
        match token {
            TokenTree::Group(g) if g.delimiter() == Delimiter::Brace => return i + 1,
            TokenTree::Punct(p) if p.as_char() == ';' => return i + 1,
            TokenTree::Group(_)
            | TokenTree::Ident(_)
            | TokenTree::Punct(_)
            | TokenTree::Literal(_) => {}
        }
    }
    tokens.len()
}

fn function_at(tokens: &[TokenTree]) -> Option<Function> {
    let [TokenTree::Ident(keyword), TokenTree::Ident(name), rest @ ..] = tokens else {
        return None;
    };
    if keyword != "fn" {
        return None;
    }
    let line = keyword.span().start().line;
    for token in rest {
        match token {
            TokenTree::Group(g) if g.delimiter() == Delimiter::Brace => {
                let lines = g.span_close().end().line + 1 - line;
                return Some(Function { name: name.to_string(), line, lines });
            }
            TokenTree::Punct(p) if p.as_char() == ';' => return None,
            TokenTree::Group(_)
            | TokenTree::Ident(_)
            | TokenTree::Punct(_)
            | TokenTree::Literal(_) => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"
        //! todo!() in a comment
        use std::{collections::BTreeMap, env, fs};
        /// dbg!(x) in a doc comment
        fn real() -> &'static str {
            select! { x => { todo!() } }
            "unimplemented!()"
        }
        #[cfg(test)]
        mod tests { fn inner() { dbg!(1); } }
        #[cfg(test)]
        mod elsewhere;
        async fn later() {}
        trait T { fn no_body(&self); }
    "#;

    #[test]
    fn words_in_code_only() {
        let source = Source::parse(TEXT).unwrap();
        let check = |words: &[&str], want: &[usize]| {
            assert_eq!(source.lines_of(words), want, "{words:?}");
        };
        check(&["todo", "!"], &[6]);
        check(&["dbg", "!"], &[]);
        check(&["unimplemented", "!"], &[]);
        check(&["std", ":", ":", "env"], &[3]);
        check(&["std", ":", ":", "fs"], &[3]);
        check(&["std", ":", ":", "BTreeMap"], &[]);
        check(&["async"], &[13]);
    }

    #[test]
    fn functions_with_bodies() {
        let source = Source::parse(TEXT).unwrap();
        let found: Vec<_> =
            source.functions.iter().map(|f| (f.name.as_str(), f.line, f.lines)).collect();
        assert_eq!(found, [("real", 5, 4), ("later", 13, 1)]);
    }
}
