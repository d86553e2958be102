//! Answers by size, and the line to the front.

use super::*;
use hickory_proto::rr::{Name, RData, Record, RecordType, rdata::A};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

fn question(id: u16) -> Message {
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.add_query(Query::query(Name::from_ascii("example.com.").unwrap(), RecordType::A));
    message
}

#[test]
fn answers_are_cut_to_size() {
    let mut answer = table::failure(&question(7), ResponseCode::NoError);
    for i in 0..100 {
        let name = Name::from_ascii(format!("n{i}.example.com.")).unwrap();
        answer.add_answer(Record::from_rdata(name, 5, RData::A(A::new(10, 0, 0, i))));
    }
    let whole = answer.to_vec().unwrap();
    let check = |limit: usize, truncated: bool| {
        for reply in [Reply::Message(answer.clone()), Reply::Bytes(whole.clone())] {
            let bytes = fit(reply, limit).unwrap();
            assert!(bytes.len() <= limit);
            let got = Message::from_vec(&bytes).unwrap();
            assert_eq!((got.metadata.truncation, got.metadata.id), (truncated, 7), "{limit}");
            assert_eq!(got.answers.is_empty(), truncated);
        }
    };
    check(512, true);
    check(whole.len() - 1, true);
    check(whole.len(), false);
    check(MAX_MESSAGE, false);
}

#[test]
fn questions_to_the_front_and_back() {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
        let pair =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC);
        let (ours, front) = pair.unwrap();
        let upstream = Upstream::new(ours).unwrap();
        // Answers the second question first, and the third not at all.
        let front = tokio::task::spawn_blocking(move || {
            let mut packets = vec![];
            for _ in 0..3 {
                let mut buffer = [0; 512];
                let n = recv(front.as_raw_fd(), &mut buffer, MsgFlags::empty()).unwrap();
                packets.push(buffer[..n].to_vec());
            }
            packets.sort_by_key(|p| p[2]);
            for i in [1, 0] {
                let mut answer = packets[i].clone();
                // A resolver that mixes up ids.
                answer[2] = 99;
                send(front.as_raw_fd(), &answer, MsgFlags::empty()).unwrap();
            }
            send(front.as_raw_fd(), &packets[2][..2], MsgFlags::empty()).unwrap();
        });
        let asked = [b"\x01\x01one", b"\x02\x02two", b"\x03\x03thr"];
        let (one, two, three) =
            tokio::join!(upstream.ask(asked[0]), upstream.ask(asked[1]), upstream.ask(asked[2]));
        assert_eq!(one.as_deref(), Some(&asked[0][..]));
        assert_eq!(two.as_deref(), Some(&asked[1][..]));
        assert_eq!(three, None);
        front.await.unwrap();
        assert!(upstream.lock().answers.is_empty());
    });
}
