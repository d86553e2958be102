//! What other commands say to a running lab: a unix socket, one JSON line each way, open files beside it.
//!
//! The socket lies in a folder that only its user can enter; who can connect is that user. Invariants: a request is at most
//! [`MAX_REQUEST`] bytes and has to arrive within [`PATIENCE`]; a client that hangs up ends what it started.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::cmsg_space;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::{Deserialize, Serialize};

use crate::status::Status;

/// Arguments of a command can be long, but not that long.
pub(crate) const MAX_REQUEST: usize = 256 * 1024;
/// A request is sent in one go.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Request {
    Status,
    /// End the lab.
    Down,
    /// Start, stop or replace a process of the mesh, on one node or on all.
    Process {
        action: Action,
        name: String,
        node: Option<String>,
    },
    /// Run a command; stdin, stdout and stderr come beside it.
    Exec {
        place: ExecPlace,
        argv: Vec<String>,
        env: Vec<(String, String)>,
        /// stdin and stdout are a terminal.
        terminal: bool,
    },
}

/// What to do with a process of the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Action {
    /// Replace it: by one beside it where that is possible.
    Restart,
    /// End it, until somebody starts it.
    Stop,
    Start,
}

/// What was done with a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Restarted {
    pub name: String,
    pub node: Option<String>,
    /// The process that was replaced and drains now.
    pub old: Option<i32>,
    /// The process that serves now.
    pub new: Option<i32>,
    /// From the order until the new one was ready.
    pub milliseconds: u64,
}

/// Where a command runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ExecPlace {
    /// A container of a pod; an empty name means its first.
    Pod { namespace: String, pod: String, container: String },
    /// The network of a node, with the machine's files.
    Node { node: String },
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Answer {
    Status(Box<Status>),
    Ending,
    Done(Vec<Restarted>),
    /// The command ended with this status.
    Exited(u8),
    Error(String),
}

/// Sends a request with open files, and waits for the answer.
pub(crate) fn call(socket: &Path, request: &Request, files: &[RawFd]) -> Result<Answer> {
    let mut stream = UnixStream::connect(socket).with_context(|| {
        format!("cannot reach the lab at {}: is it just ending?", socket.display())
    })?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    if line.len() > MAX_REQUEST {
        bail!("the command is too long ({} bytes of at most {MAX_REQUEST})", line.len());
    }
    let rights = [ControlMessage::ScmRights(files)];
    let rights = if files.is_empty() { &[][..] } else { &rights[..] };
    let sent = sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(&line)],
        rights,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )
    .context("send the request")?;
    stream.write_all(&line[sent..]).context("send the request")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).context("read the lab's answer")?;
    if answer.is_empty() {
        bail!("the lab ended before it answered");
    }
    serde_json::from_str(&answer).context("the lab's answer")
}

/// Reads one request and the files beside it.
pub(crate) fn receive(stream: &mut UnixStream) -> Result<(Request, Vec<OwnedFd>)> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut buffer = vec![0; 64 * 1024];
    let (n, files) = first_packet(stream, &mut buffer).context("read a request")?;
    let mut line = buffer[..n].to_vec();
    while line.last() != Some(&b'\n') {
        let n = stream.read(&mut buffer).context("read a request")?;
        if n == 0 || line.len() + n > MAX_REQUEST {
            bail!("the request has no end");
        }
        line.extend_from_slice(&buffer[..n]);
    }
    Ok((serde_json::from_slice(&line).context("read a request")?, files))
}

fn first_packet(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = cmsg_space!([RawFd; 3]);
    let mut parts = [IoSliceMut::new(buffer)];
    let message = recvmsg::<()>(
        stream.as_raw_fd(),
        &mut parts,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut files = vec![];
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = part {
            #[expect(unsafe_code, reason = "files received over a socket come as numbers")]
            // SAFETY: the kernel has just made these numbers for this process; nobody else owns them.
            files.extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok((message.bytes, files))
}

/// Answers and hangs up.
pub(crate) fn answer(stream: &mut UnixStream, answer: &Answer) -> Result<()> {
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(&serde_json::to_vec(answer)?)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_travel_with_their_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let request = Request::Exec {
            place: ExecPlace::Node { node: "node-1".into() },
            argv: vec!["x".repeat(100_000), "y".into()],
            env: vec![],
            terminal: false,
        };
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let (request, files) = receive(&mut stream).unwrap();
            let mut file = std::fs::File::from(files.into_iter().next().unwrap());
            file.write_all(b"hello").unwrap();
            answer(&mut stream, &Answer::Exited(7)).unwrap();
            request
        });
        let (mut ours, theirs) = io::pipe().unwrap();
        let got = call(&path, &request, &[theirs.as_raw_fd()]).unwrap();
        drop(theirs);
        assert!(matches!(got, Answer::Exited(7)));
        assert_eq!(server.join().unwrap(), request);
        let mut text = String::new();
        ours.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
    }

    #[test]
    fn nonsense_is_refused() {
        let check = |bytes: &[u8]| {
            let (mut a, mut b) = UnixStream::pair().unwrap();
            a.write_all(bytes).unwrap();
            drop(a);
            assert!(receive(&mut b).is_err(), "{bytes:?}");
        };
        check(b"");
        check(b"{}\n");
        check(b"no end");
        check(&[b'x'; MAX_REQUEST * 2][..100_000]);
    }
}
