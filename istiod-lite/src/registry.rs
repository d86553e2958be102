//! The launcher's line to us: which one-time tokens it handed to which nodes, and which tokens to which pods.
//!
//! Each line is answered (`{"node": ..., "ok": true}`, `{"pod": ..., "ok": true}` or `{"error": ...}`), so that a
//! launcher can wait until a token counts before it starts the proxy that has it. It need not read the answers.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream as StdStream;
use std::sync::Arc;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::UnixStream;

use crate::control::{Control, Registered};
use crate::tokens::MAX_LINE;

/// Takes the inherited descriptor over. To be called once, before anything else opens descriptors.
pub fn inherit(fd: RawFd) -> Result<StdStream, String> {
    let wrong = |what: &str| Err(format!("--token-registry-fd {fd} {what}"));
    if fd <= 2 {
        return wrong("is a standard stream");
    }
    match std::fs::read_link(format!("/proc/self/fd/{fd}")) {
        Err(_) => return wrong("is not open: the launcher must let this process inherit it"),
        Ok(link) if !link.to_string_lossy().starts_with("socket:") => {
            return wrong(&format!("is {}, not a unix stream socket", link.display()));
        }
        Ok(_) => {}
    }
    // SAFETY: the descriptor is open (checked above), was handed to this process for this purpose, and
    // nobody else in it knows its number: this call is the only one, at start, before other descriptors.
    #[expect(unsafe_code, reason = "an inherited descriptor comes as a number")]
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    let stream = StdStream::from(owned);
    match stream.local_addr() {
        Ok(_) => Ok(stream),
        Err(_) => wrong("is a socket, but not a unix stream socket"),
    }
}

/// Reads lines until the launcher closes its end.
pub(crate) async fn serve(stream: UnixStream, control: Arc<Control>) {
    let (read, write) = stream.into_split();
    let mut lines = BufReader::new(read);
    loop {
        let mut line = Vec::new();
        // One byte more than allowed, to tell a line that is too long.
        let limit = MAX_LINE as u64 + 1;
        match (&mut lines).take(limit).read_until(b'\n', &mut line).await {
            Ok(0) => return tracing::info!("the launcher closed the token registry"),
            Ok(_) => {}
            Err(error) => return tracing::error!("token registry: {error}; no more node tokens"),
        }
        if line.len() > MAX_LINE {
            return tracing::error!(
                "token registry: a line has more than {MAX_LINE} bytes; closing it"
            );
        }
        let text = String::from_utf8_lossy(&line);
        let text = text.trim();
        if text.is_empty() {
            continue;
        }
        let answer = match control.register(text) {
            Ok(Registered::Node(node)) => {
                tracing::info!(%node, "node token registered");
                serde_json::json!({ "node": node, "ok": true })
            }
            Ok(Registered::Pod(pod)) => {
                tracing::info!(%pod, node = %pod.node, "pod token registered");
                serde_json::json!({ "pod": pod.to_string(), "ok": true })
            }
            Ok(Registered::Ended(pod)) => {
                let pod = pod.map(|pod| pod.to_string());
                tracing::info!(pod, "pod token ended");
                serde_json::json!({ "pod": pod, "ok": true })
            }
            Err(error) => {
                tracing::error!("token registry: {error}");
                serde_json::json!({ "error": error.to_string() })
            }
        };
        // A launcher that does not read must not stop us; it loses answers, not tokens.
        let _ = write.try_write(format!("{answer}\n").as_bytes());
    }
}
