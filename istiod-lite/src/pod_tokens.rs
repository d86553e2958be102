//! Tokens of pods: what a service account's token is in Kubernetes, good as often as the pod likes while it lives.
//!
//! The launcher tells us the hash when it starts a pod, and again when nothing of the pod is left. Invariants: a pod has
//! one token at most; the newest counts; a token that ended is never good again unless it is told anew.

use std::collections::BTreeMap;

use model::Str;
use serde::Deserialize;

use crate::authorize::{Pod, is_node_name};
use crate::tokens::{HASH, TokenError, hash_of, hex, parse_hash};

/// More pods than one launcher starts: 32 nodes of 253 addresses. Beyond it, something is wrong with the launcher.
const MAX_PODS: usize = 16 * 1024;
/// Kubernetes' limit of a namespace's name.
const MAX_NAMESPACE: usize = 63;

/// Tells a token from every other without being it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct TokenId([u8; HASH]);

impl TokenId {
    pub(crate) fn of(token: &str) -> Self {
        Self(hash_of(token))
    }
}

/// The tokens of pods that live.
#[derive(Debug, Default)]
pub(crate) struct PodTokens {
    /// Found by hash: how long that takes tells something about hashes, and from those no token is made.
    by_hash: BTreeMap<TokenId, Pod>,
    /// By namespace and name.
    by_pod: BTreeMap<(Str, Str), TokenId>,
}

/// A line of the registry about a pod: `{"pod": {...}, "token_sha256": HASH}`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Issued {
    pod: Names,
    token_sha256: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Names {
    namespace: String,
    name: String,
    service_account: String,
    node: String,
}

/// A line that ends a token: `{"ended_token_sha256": HASH}`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Ended {
    ended_token_sha256: String,
}

impl PodTokens {
    /// Takes a line that gives a pod its token; one that it had before ends.
    pub(crate) fn issue(&mut self, line: &str) -> Result<Pod, TokenError> {
        let Issued { pod, token_sha256 } = parse(line)?;
        let id = TokenId(parse_hash(&token_sha256)?);
        let namespace_ok = pod.namespace.len() <= MAX_NAMESPACE && !pod.namespace.contains('.');
        for (name, ok) in [
            (&pod.namespace, namespace_ok && is_node_name(&pod.namespace)),
            (&pod.name, is_node_name(&pod.name)),
            (&pod.service_account, is_node_name(&pod.service_account)),
        ] {
            if !ok {
                return Err(TokenError::Name(name.chars().take(64).collect()));
            }
        }
        if !is_node_name(&pod.node) {
            return Err(TokenError::NodeName(pod.node.chars().take(64).collect()));
        }
        let pod = Pod {
            namespace: pod.namespace.into(),
            name: pod.name.into(),
            service_account: pod.service_account.into(),
            node: pod.node.into(),
        };
        let key = (pod.namespace.clone(), pod.name.clone());
        if self.by_hash.get(&id).is_some_and(|other| *other != pod) {
            return Err(TokenError::Malformed("the token is another pod's".into()));
        }
        if let Some(before) = self.by_pod.remove(&key) {
            self.by_hash.remove(&before);
        }
        if self.by_hash.len() >= MAX_PODS {
            return Err(TokenError::TooMany(MAX_PODS));
        }
        self.by_hash.insert(id, pod.clone());
        self.by_pod.insert(key, id);
        Ok(pod)
    }

    /// Takes a line that ends a token; the pod that had it, if it counted.
    pub(crate) fn end(&mut self, line: &str) -> Result<Option<Pod>, TokenError> {
        let Ended { ended_token_sha256 } = parse(line)?;
        let pod = self.by_hash.remove(&TokenId(parse_hash(&ended_token_sha256)?));
        if let Some(pod) = &pod {
            self.by_pod.remove(&(pod.namespace.clone(), pod.name.clone()));
        }
        Ok(pod)
    }

    /// The living pod that has the token.
    pub(crate) fn pod_of(&self, token: TokenId) -> Option<&Pod> {
        self.by_hash.get(&token)
    }

    pub(crate) fn len(&self) -> usize {
        self.by_hash.len()
    }
}

fn parse<'a, T: Deserialize<'a>>(line: &'a str) -> Result<T, TokenError> {
    serde_json::from_str(line).map_err(|e| TokenError::Malformed(e.to_string()))
}

/// The registry line that gives a pod its token: what a launcher writes.
pub fn issued_line(
    namespace: &str,
    pod: &str,
    service_account: &str,
    node: &str,
    token: &str,
) -> String {
    let names = serde_json::json!({
        "namespace": namespace, "name": pod, "service_account": service_account, "node": node,
    });
    serde_json::json!({ "pod": names, "token_sha256": hex(token) }).to_string()
}

/// The registry line that ends a pod's token.
pub fn ended_line(token: &str) -> String {
    serde_json::json!({ "ended_token_sha256": hex(token) }).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn issue(tokens: &mut PodTokens, name: &str, token: &str) -> Result<Pod, TokenError> {
        tokens.issue(&issued_line("shop", name, "waypoint", "node-1", token))
    }

    fn who(tokens: &PodTokens, token: &str) -> Option<String> {
        tokens.pod_of(TokenId::of(token)).map(ToString::to_string)
    }

    #[test]
    fn a_token_is_good_while_its_pod_lives() {
        let mut tokens = PodTokens::default();
        issue(&mut tokens, "a", "one").unwrap();
        issue(&mut tokens, "b", "two").unwrap();
        assert_eq!(who(&tokens, "one").as_deref(), Some("pod shop/a"));
        assert_eq!(who(&tokens, "one").as_deref(), Some("pod shop/a"), "as often as it likes");
        assert_eq!(who(&tokens, "three"), None);
        assert_eq!(tokens.end(&ended_line("one")).unwrap().unwrap().name, "a".into());
        assert_eq!((who(&tokens, "one"), tokens.len()), (None, 1));
        assert_eq!(tokens.end(&ended_line("one")).unwrap(), None);
        assert_eq!(who(&tokens, "two").as_deref(), Some("pod shop/b"));
    }

    #[test]
    fn a_replaced_pods_token_is_worthless() {
        let mut tokens = PodTokens::default();
        issue(&mut tokens, "a", "old").unwrap();
        // A control plane that starts anew is told again.
        issue(&mut tokens, "a", "old").unwrap();
        issue(&mut tokens, "a", "new").unwrap();
        assert_eq!((who(&tokens, "old"), tokens.len()), (None, 1));
        // The end of the one before is no end of the new one.
        assert_eq!(tokens.end(&ended_line("old")).unwrap(), None);
        assert!(who(&tokens, "new").is_some());
        // One token does not stand for two pods.
        assert!(issue(&mut tokens, "b", "new").is_err());
        assert_eq!(who(&tokens, "new").as_deref(), Some("pod shop/a"));
    }

    #[test]
    fn lines_that_are_wrong_say_why() {
        let good = issued_line("shop", "a", "waypoint", "node-1", "x");
        let check = |line: &str, says: &str| {
            let mut tokens = PodTokens::default();
            let error = tokens.issue(line).unwrap_err().to_string();
            assert!(error.contains(says), "{line}: {error}");
            assert_eq!(tokens.len(), 0, "{line}");
        };
        check(&good.replace("shop", "shop.x"), "namespace");
        check(&good.replace("shop", &"s".repeat(64)), "namespace");
        check(&good.replace("\"a\"", "\"A\""), "\"A\"");
        check(&good.replace("waypoint", "way_point"), "way_point");
        check(&good.replace("node-1", ""), "name of a node");
        check(&good.replace("\"name\"", "\"nam\""), "unknown field");
        check(&good.replace(&hex("x"), "12"), "64 hex");
        check("{}", "pod");
        check("nonsense", "expected");
        assert!(PodTokens::default().end("{\"ended_token_sha256\":\"12\"}").is_err());
        assert!(good.len() < crate::tokens::MAX_LINE);
        let longest = ["n".repeat(63), "n".repeat(253), "n".repeat(253), "n".repeat(240)];
        let [namespace, name, account, node] = &longest;
        assert!(issued_line(namespace, name, account, node, "x").len() < crate::tokens::MAX_LINE);
    }

    #[test]
    fn the_number_of_pods_is_limited() {
        let mut tokens = PodTokens::default();
        for i in 0..MAX_PODS {
            issue(&mut tokens, &format!("p{i}"), &format!("t{i}")).unwrap();
        }
        assert_eq!(issue(&mut tokens, "more", "more"), Err(TokenError::TooMany(MAX_PODS)));
        issue(&mut tokens, "p0", "again").unwrap();
        tokens.end(&ended_line("again")).unwrap();
        issue(&mut tokens, "more", "more").unwrap();
    }
}
