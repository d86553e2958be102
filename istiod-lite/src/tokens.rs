//! One-time node tokens: what the launcher told us it gave to whom.
//!
//! We learn hashes only; the token itself passes by once, when its proxy asks for its certificate.
//! Invariant: a token is redeemed at most once, and only for the node it was issued to.

use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest::{SHA256, digest};
use model::Str;
use serde::Deserialize;

use crate::authorize::is_node_name;

pub(crate) const HASH: usize = 32;
/// More nodes than one launcher has. Beyond it, something is wrong with the launcher.
const MAX_TOKENS: usize = 1024;
/// A line names a hash and at most four names, of which each has at most 253 bytes.
pub const MAX_LINE: usize = 2048;

/// Tokens that have been issued and not redeemed.
#[derive(Debug, Default)]
pub struct Tokens {
    pending: Vec<Pending>,
}

#[derive(Debug)]
struct Pending {
    node: Str,
    hash: [u8; HASH],
}

/// Why a line of the registry is not a token. The launcher is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    #[error("not {{\"node\": NAME, \"token_sha256\": 64 HEX DIGITS}}: {0}")]
    Malformed(String),
    #[error("{0:?} cannot be the name of a node: lower case letters, digits, '-' and '.'")]
    NodeName(String),
    #[error("{0:?} cannot be the name of a namespace, a pod or a service account")]
    Name(String),
    #[error("{0} tokens are there already; no more are taken")]
    TooMany(usize),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    node: String,
    token_sha256: String,
}

impl Tokens {
    /// Takes one line of the registry. A second token for a node replaces the first: the launcher has
    /// started its proxy anew, and what the old process had must be worthless. Returns the node.
    pub fn register(&mut self, line: &str) -> Result<Str, TokenError> {
        let line: Line =
            serde_json::from_str(line).map_err(|e| TokenError::Malformed(e.to_string()))?;
        if !is_node_name(&line.node) {
            return Err(TokenError::NodeName(line.node.chars().take(64).collect()));
        }
        let hash = parse_hash(&line.token_sha256)?;
        let node: Str = line.node.into();
        self.pending.retain(|p| p.node != node);
        if self.pending.len() >= MAX_TOKENS {
            return Err(TokenError::TooMany(MAX_TOKENS));
        }
        self.pending.push(Pending { node: node.clone(), hash });
        Ok(node)
    }

    /// The node a token was issued to, while it has not been used.
    pub fn node_of(&self, token: &str) -> Option<Str> {
        self.find(token).map(|i| self.pending[i].node.clone())
    }

    /// Uses the token up. Of two callers that race with one token, one gets `None`.
    pub fn redeem(&mut self, token: &str) -> Option<Str> {
        self.find(token).map(|i| self.pending.swap_remove(i).node)
    }

    /// Tokens that nobody has used yet.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Looks at every token and compares in constant time, so that the time tells nothing.
    fn find(&self, token: &str) -> Option<usize> {
        let hash = hash_of(token);
        let mut found = None;
        for (i, pending) in self.pending.iter().enumerate() {
            if verify_slices_are_equal(&pending.hash, &hash).is_ok() {
                found = Some(i);
            }
        }
        found
    }
}

/// What we know of a token.
pub(crate) fn hash_of(token: &str) -> [u8; HASH] {
    let mut hash = [0; HASH];
    hash.copy_from_slice(digest(&SHA256, token.as_bytes()).as_ref());
    hash
}

/// The hash of a token, as the registry writes it.
pub(crate) fn parse_hash(text: &str) -> Result<[u8; HASH], TokenError> {
    let wrong = || TokenError::Malformed("token_sha256 is not 64 hex digits".into());
    if text.len() != 2 * HASH || !text.is_ascii() {
        return Err(wrong());
    }
    let mut hash = [0; HASH];
    for (byte, digits) in hash.iter_mut().zip(text.as_bytes().chunks(2)) {
        let digit = |d: u8| char::from(d).to_digit(16).and_then(|d| u8::try_from(d).ok());
        let (high, low) = digit(digits[0]).zip(digit(digits[1])).ok_or_else(wrong)?;
        *byte = high << 4 | low;
    }
    Ok(hash)
}

/// The hash as the registry writes it.
pub(crate) fn hex(token: &str) -> String {
    hash_of(token).iter().map(|b| format!("{b:02x}")).collect()
}

/// The registry line for a token: what a launcher writes.
pub fn registry_line(node: &str, token: &str) -> String {
    serde_json::json!({ "node": node, "token_sha256": hex(token) }).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_works_once_and_for_its_node() {
        let mut tokens = Tokens::default();
        tokens.register(&registry_line("node-1", "aaaa")).unwrap();
        tokens.register(&registry_line("node-2", "bbbb")).unwrap();
        assert_eq!(tokens.redeem("cccc"), None);
        assert_eq!(tokens.node_of("bbbb").as_deref(), Some("node-2"));
        assert_eq!(tokens.redeem("bbbb").as_deref(), Some("node-2"));
        assert_eq!(tokens.redeem("bbbb"), None);
        assert_eq!(tokens.redeem("aaaa").as_deref(), Some("node-1"));
        assert_eq!(tokens.pending(), 0);
    }

    #[test]
    fn the_newest_token_of_a_node_counts() {
        let mut tokens = Tokens::default();
        tokens.register(&registry_line("node-1", "old")).unwrap();
        tokens.register(&registry_line("node-1", "new")).unwrap();
        assert_eq!(tokens.redeem("old"), None);
        assert_eq!(tokens.redeem("new").as_deref(), Some("node-1"));
    }

    #[test]
    fn lines() {
        let check = |line: &str, want: Result<(), &str>| {
            let got = Tokens::default().register(line).map(|_| ()).map_err(|e| e.to_string());
            match want {
                Ok(()) => assert_eq!(got, Ok(()), "{line}"),
                Err(part) => assert!(got.clone().unwrap_err().contains(part), "{got:?} / {part}"),
            }
        };
        let hash = "0123456789abcdef".repeat(4);
        check(&registry_line("node-1", "x"), Ok(()));
        check(&format!(r#"{{"node":"n","token_sha256":"{hash}"}}"#), Ok(()));
        check("", Err("Malformed").or(Err("not {")));
        check("{}", Err("missing field"));
        check(r#"{"node":"n","token_sha256":"00"}"#, Err("64 hex"));
        check(
            &format!(r#"{{"node":"n","token_sha256":"{}"}}"#, hash.replace('a', "g")),
            Err("64 hex"),
        );
        check(&format!(r#"{{"node":"N 1","token_sha256":"{hash}"}}"#), Err("name of a node"));
        check(
            &format!(r#"{{"node":"n","token_sha256":"{hash}","token":"x"}}"#),
            Err("unknown field"),
        );
    }

    #[test]
    fn the_number_of_tokens_is_limited() {
        let mut tokens = Tokens::default();
        for i in 0..MAX_TOKENS {
            tokens.register(&registry_line(&format!("n{i}"), "x")).unwrap();
        }
        assert_eq!(
            tokens.register(&registry_line("one-more", "x")),
            Err(TokenError::TooMany(MAX_TOKENS))
        );
        // A node that is known may still have its token replaced.
        tokens.register(&registry_line("n0", "y")).unwrap();
        assert_eq!(tokens.redeem("y").as_deref(), Some("n0"));
        tokens.register(&registry_line("one-more", "z")).unwrap();
    }
}
