//! The agent against a ztunnel made of a few lines.

use super::*;
use nix::sys::socket::{connect, send};

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
        let mut buffer = vec![0; MAX_PACKET];
        let n = recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty()).unwrap();
        let request = WorkloadRequest::decode(&buffer[..n]).unwrap();
        let ack = xds::zds::Ack { error: error.to_owned() };
        let answer = WorkloadResponse { payload: Some(workload_response::Payload::Ack(ack)) };
        send(self.0.as_raw_fd(), &answer.encode_to_vec(), MsgFlags::empty()).unwrap();
        match request.payload.unwrap() {
            Payload::Add(add) => format!("add {}", add.uid),
            Payload::Del(del) => format!("del {}", del.uid),
            Payload::SnapshotSent(_) => "all".to_owned(),
            Payload::Keep(keep) => format!("keep {}", keep.uid),
        }
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
