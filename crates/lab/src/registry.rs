//! Tokens, and the line by which istiod-lite is told which are good.
//!
//! A node's token is for one certificate, a pod's for as long as the pod lives. Invariants: a token is made from randomness
//! of the kernel, and goes to its owner and to nobody else; istiod-lite is told hashes; an istiod-lite that starts anew is
//! told all that are good.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use anyhow::{Context, Result};
use aws_lc_rs::digest::{SHA256, digest};
use serde_json::json;

use crate::supervise::lock;

/// Bytes of entropy in a token.
const TOKEN: usize = 32;

/// A token in the clear. Never printed.
#[derive(Clone)]
pub(crate) struct Secret(String);

impl Secret {
    fn make() -> Result<Self> {
        let mut bytes = [0; TOKEN];
        getrandom::fill(&mut bytes).map_err(|e| anyhow::anyhow!("no randomness: {e}"))?;
        Ok(Self(bytes.iter().map(|b| format!("{b:02x}")).collect()))
    }

    pub(crate) fn text(&self) -> &str {
        &self.0
    }

    fn hash(&self) -> String {
        digest(&SHA256, self.0.as_bytes()).as_ref().iter().map(|b| format!("{b:02x}")).collect()
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

/// Tells istiod-lite which tokens are good.
#[derive(Clone, Debug, Default)]
pub(crate) struct Registry(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// To the thread that writes to istiod-lite.
    line: Option<Sender<String>>,
    /// The newest of each node.
    nodes: Vec<Told>,
    /// Those of pods that live: what was told, by hash.
    pods: BTreeMap<String, String>,
}

#[derive(Debug)]
struct Told {
    node: String,
    line: String,
    at: SystemTime,
    /// Where ztunnel keeps what it got for its token.
    secrets: PathBuf,
}

impl Told {
    /// Whether ztunnel may still have to use it. Once it keeps a certificate that is younger, it has.
    fn is_unused(&self) -> bool {
        let files = fs::read_dir(&self.secrets).into_iter().flatten().flatten();
        let times = files.filter_map(|f| f.metadata().and_then(|m| m.modified()).ok());
        !times.into_iter().any(|time| time >= self.at)
    }
}

/// A pod, for its token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PodNames<'a> {
    pub(crate) namespace: &'a str,
    pub(crate) name: &'a str,
    pub(crate) service_account: &'a str,
    pub(crate) node: &'a str,
}

/// The token of a pod; good until dropped.
#[derive(Debug)]
pub(crate) struct PodToken {
    pub(crate) secret: Secret,
    registry: Registry,
}

impl Drop for PodToken {
    fn drop(&mut self) {
        self.registry.end_pod(&self.secret.hash());
    }
}

impl Registry {
    /// The end for a new istiod-lite, which is told everything that is good.
    pub(crate) fn connect(&self) -> Result<OwnedFd> {
        let (ours, theirs) = UnixStream::pair()?;
        let (sender, lines) = channel();
        let mut state = lock(&self.0);
        let nodes = state.nodes.iter().filter(|t| t.is_unused()).map(|t| &t.line);
        for line in nodes.chain(state.pods.values()) {
            let _ = sender.send(line.clone());
        }
        std::thread::Builder::new()
            .name("registry".into())
            .spawn(move || write(&ours, &lines))
            .context("start the thread that tells istiod-lite of tokens")?;
        // The thread of the one before ends with its sender.
        state.line = Some(sender);
        Ok(theirs.into())
    }

    /// A new token for a node's proxy; what it had before is worthless.
    pub(crate) fn issue_node(&self, node: &str, secrets: PathBuf) -> Result<Secret> {
        let secret = Secret::make()?;
        let line = format!("{}\n", json!({"node": node, "token_sha256": secret.hash()}));
        let mut state = lock(&self.0);
        state.nodes.retain(|t| t.node != node);
        state.tell(&line);
        state.nodes.push(Told { node: node.to_owned(), line, at: SystemTime::now(), secrets });
        Ok(secret)
    }

    /// A token for a pod.
    pub(crate) fn issue_pod(&self, pod: PodNames<'_>) -> Result<PodToken> {
        let secret = Secret::make()?;
        let names = json!({
            "namespace": pod.namespace, "name": pod.name, "service_account": pod.service_account,
            "node": pod.node,
        });
        let line = format!("{}\n", json!({"pod": names, "token_sha256": secret.hash()}));
        let mut state = lock(&self.0);
        state.tell(&line);
        state.pods.insert(secret.hash(), line);
        drop(state);
        Ok(PodToken { secret, registry: self.clone() })
    }

    fn end_pod(&self, hash: &str) {
        let mut state = lock(&self.0);
        state.pods.remove(hash);
        state.tell(&format!("{}\n", json!({"ended_token_sha256": hash})));
    }
}

impl State {
    fn tell(&self, line: &str) {
        if let Some(sender) = &self.line {
            // Nobody takes it while istiod-lite is being started again; it is told then.
            let _ = sender.send(line.to_owned());
        }
    }
}

/// Writes until nobody reads or nobody sends. A thread, since istiod-lite may not read for a while; what waits is at most
/// a line for each pod.
fn write(mut stream: &UnixStream, lines: &Receiver<String>) {
    for line in lines {
        if stream.write_all(line.as_bytes()).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};

    use super::*;

    const POD: PodNames<'_> = PodNames {
        namespace: "shop",
        name: "waypoint-1",
        service_account: "waypoint",
        node: "node-1",
    };

    fn next(lines: &mut impl BufRead) -> serde_json::Value {
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    #[test]
    fn an_istiod_lite_is_told_what_is_good() {
        let secrets = tempfile::tempdir().unwrap();
        let registry = Registry::default();
        let first = registry.issue_pod(POD).unwrap();
        registry.issue_node("node-1", secrets.path().to_owned()).unwrap();
        let gone = registry.issue_pod(PodNames { name: "gone", ..POD }).unwrap();
        drop(gone);
        for _ in 0..2 {
            let mut lines = BufReader::new(UnixStream::from(registry.connect().unwrap()));
            assert_eq!(next(&mut lines)["node"], "node-1");
            let told = next(&mut lines);
            assert_eq!(told["pod"]["name"], "waypoint-1");
            assert_eq!(told["token_sha256"], first.secret.hash());
            let other = registry.issue_pod(PodNames { name: "other", ..POD }).unwrap();
            assert_eq!(next(&mut lines)["pod"]["name"], "other");
            let hash = other.secret.hash();
            drop(other);
            assert_eq!(next(&mut lines)["ended_token_sha256"], hash);
        }
        // Nothing printable gives a token away.
        assert!(!format!("{first:?} {registry:?}").contains(first.secret.text()));
        assert_eq!(first.secret.text().len(), 2 * TOKEN);
    }

    #[test]
    fn many_pods_wait_for_an_istiod_lite_that_does_not_read() {
        let registry = Registry::default();
        let theirs = registry.connect().unwrap();
        let tokens: Vec<PodToken> = (0..4000).map(|_| registry.issue_pod(POD).unwrap()).collect();
        let lines = BufReader::new(UnixStream::from(theirs)).lines();
        assert_eq!(lines.take(tokens.len()).filter(|l| l.is_ok()).count(), tokens.len());
    }
}
