//! The agent against a ztunnel made of a few lines.

use super::*;
use std::net::TcpListener;

use nix::sys::socket::{connect, recv, send};

/// A ztunnel's end of the line, blocking.
struct Proxy(OwnedFd);

impl Proxy {
    fn connect(path: &Path) -> Self {
        let line =
            socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::empty(), None).unwrap();
        connect(line.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
        let hello = ZdsHello { version: 1 };
        send(line.as_raw_fd(), &hello.encode_to_vec(), MsgFlags::empty()).unwrap();
        Self(line)
    }

    /// Takes one message, answers with an error (empty: none), and says in a word what it was.
    fn answer(&self, error: &str) -> String {
        self.answer_with(error, &[]).0
    }

    /// The same with listeners for the agent; and the files that came.
    fn answer_with(&self, error: &str, listeners: &[RawFd]) -> (String, Vec<OwnedFd>) {
        let mut buffer = vec![0; MAX_PACKET];
        let mut space = cmsg_space!([RawFd; MAX_FILES]);
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let line = self.0.as_raw_fd();
        let got =
            recvmsg::<()>(line, &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC).unwrap();
        let mut files = vec![];
        for part in got.cmsgs().unwrap() {
            let ControlMessageOwned::ScmRights(fds) = part else { continue };
            #[expect(unsafe_code, reason = "files received over a socket come as numbers")]
            // SAFETY: the kernel has just made these numbers for this process.
            files.extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
        let n = got.bytes;
        let request = WorkloadRequest::decode(&buffer[..n]).unwrap();
        let ack = xds::zds::Ack { error: error.to_owned() };
        let answer = WorkloadResponse { payload: Some(workload_response::Payload::Ack(ack)) };
        let (packet, rights) = (answer.encode_to_vec(), [ControlMessage::ScmRights(listeners)]);
        let rights = if listeners.is_empty() { &[][..] } else { &rights[..] };
        sendmsg::<()>(line, &[IoSlice::new(&packet)], rights, MsgFlags::empty(), None).unwrap();
        let what = match request.payload.unwrap() {
            Payload::Add(add) => format!("add {}", add.uid),
            Payload::Del(del) => format!("del {}", del.uid),
            Payload::SnapshotSent(_) => "all".to_owned(),
            Payload::Keep(keep) => format!("keep {}", keep.uid),
        };
        (what, files)
    }

    /// The agent has cut the line.
    fn is_cut(&self) -> bool {
        recv(self.0.as_raw_fd(), &mut [0; 16], MsgFlags::empty()).unwrap() == 0
    }
}

fn pod(uid: &str) -> Captured {
    Captured {
        uid: uid.to_owned(),
        namespace: "ns".to_owned(),
        name: uid.to_owned(),
        service_account: "default".to_owned(),
        ns: NetNs::current().unwrap(),
    }
}

fn run<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test)
}

#[test]
fn pods_are_told_again_to_a_new_proxy() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("zds.sock");
        let agent = Agent::start(&path, "node-1").unwrap();
        // Before any proxy is there: the pod waits.
        let early = agent.clone();
        let waiting = tokio::spawn(async move { early.add(pod("a")).await });
        let there = path.clone();
        let first = tokio::task::spawn_blocking(move || {
            let proxy = Proxy::connect(&there);
            (vec![proxy.answer(""), proxy.answer("")], proxy)
        });
        let (said, proxy) = first.await.unwrap();
        // Told in the snapshot, or just after it if the command came later than the line.
        assert!(said.contains(&"add a".to_owned()) && said.contains(&"all".to_owned()), "{said:?}");
        assert_eq!(waiting.await.unwrap(), Ok(()));
        // Refused: the caller hears why.
        let line = tokio::task::spawn_blocking(move || (proxy.answer("no room"), proxy));
        assert_eq!(agent.add(pod("b")).await, Err("no room".to_owned()));
        let (said, proxy) = line.await.unwrap();
        assert_eq!(said, "add b");
        let line = tokio::task::spawn_blocking(move || (proxy.answer(""), proxy));
        agent.remove("b").await;
        let (said, proxy) = line.await.unwrap();
        assert_eq!(said, "del b");
        // A new proxy is told what holds now.
        drop(proxy);
        let again = tokio::task::spawn_blocking(move || {
            let proxy = Proxy::connect(&path);
            [proxy.answer(""), proxy.answer("")]
        });
        assert_eq!(again.await.unwrap(), ["add a", "all"]);
    });
}

#[test]
fn without_a_proxy_removal_does_not_wait() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let agent = Agent::start(&dir.path().join("zds.sock"), "node-1").unwrap();
        agent.remove("a").await;
    });
}

#[test]
fn a_proxy_of_another_version_is_turned_away() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("zds.sock");
        let _agent = Agent::start(&path, "node-1").unwrap();
        let heard = tokio::task::spawn_blocking(move || {
            let line =
                socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::empty(), None).unwrap();
            connect(line.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
            let hello = ZdsHello { version: 2 };
            send(line.as_raw_fd(), &hello.encode_to_vec(), MsgFlags::empty()).unwrap();
            recv(line.as_raw_fd(), &mut [0; 64], MsgFlags::empty())
        });
        assert_eq!(heard.await.unwrap(), Ok(0), "closed without a word");
    });
}

/// Waits in a thread of its own: the agent's tasks go on.
async fn apart<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}

/// Connects, takes one pod and the end of the snapshot; what came beside them is counted.
async fn takes_one(path: &Path, gives: Vec<TcpListener>) -> (Proxy, [usize; 2]) {
    let path = path.to_owned();
    apart(move || {
        let proxy = Proxy::connect(&path);
        let fds: Vec<RawFd> = gives.iter().map(AsRawFd::as_raw_fd).collect();
        let (of_pods, pages) = fds.split_at(fds.len().saturating_sub(1));
        let (what, with_pod) = proxy.answer_with("", of_pods);
        assert_eq!(what, "add a");
        let (what, with_all) = proxy.answer_with("", pages);
        assert_eq!(what, "all");
        (proxy, [with_pod.len(), with_all.len()])
    })
    .await
}

fn listeners(count: usize) -> Vec<TcpListener> {
    (0..count).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect()
}

#[test]
fn listeners_are_kept_for_the_next_proxy() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("zds.sock");
        let agent = Agent::start(&path, "node-1").unwrap();
        let adding = tokio::spawn({
            let agent = agent.clone();
            async move { agent.add(pod("a")).await }
        });
        tokio::task::yield_now().await;
        let ours = listeners(3);
        let (waits, page) = (ours[0].local_addr().unwrap(), ours[2].local_addr().unwrap());
        let (first, came) = takes_one(&path, ours).await;
        // The namespace alone: nobody was there before.
        assert_eq!(came, [1, 0]);
        assert_eq!(adding.await.unwrap(), Ok(()));
        drop(first);
        // Nobody accepts, and yet connections are taken.
        let clients = [waits, page].map(|at| std::net::TcpStream::connect(at).unwrap());
        let (second, came) = takes_one(&path, vec![]).await;
        assert_eq!(came, [3, 1]);
        // It kept none of them, so neither does the agent.
        drop((second, clients));
        assert!(std::net::TcpStream::connect(waits).is_err());
        let (_third, came) = takes_one(&path, vec![]).await;
        assert_eq!(came, [1, 0]);
    });
}

#[test]
fn the_newest_proxy_is_told_and_the_one_before_if_that_is_lost() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("zds.sock");
        let agent = Agent::start(&path, "node-1").unwrap();
        let adding = tokio::spawn({
            let agent = agent.clone();
            async move { agent.add(pod("a")).await }
        });
        tokio::task::yield_now().await;
        let (old, _) = takes_one(&path, vec![]).await;
        assert_eq!(adding.await.unwrap(), Ok(()));
        let (new, _) = takes_one(&path, vec![]).await;
        let line = tokio::task::spawn_blocking(move || (new.answer(""), new));
        assert_eq!(agent.add(pod("b")).await, Ok(()));
        let (said, new) = line.await.unwrap();
        assert_eq!(said, "add b");
        // It is lost: the one before is called back, and hears everything.
        drop(new);
        assert!(apart(move || old.is_cut()).await);
        let said = apart(move || {
            let old = Proxy::connect(&path);
            ([old.answer(""), old.answer(""), old.answer("")], old)
        });
        assert_eq!(said.await.0, ["add a", "add b", "all"]);
    });
}
