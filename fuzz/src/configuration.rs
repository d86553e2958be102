//! What a user writes into files, and what the programs of a node say to each other.

use std::collections::{BTreeSet, VecDeque};

use compile::{Folder, MeshConfig, compile};
use istiod_lite::tokens::Tokens;
use prost::Message;
use xds::codec::{self, Defaults, Interner};
use xds::zds::{WorkloadRequest, WorkloadResponse, ZdsHello};
use ztunnel::zds::{PodEvent, Snapshot};

use crate::planted;

/// A file of Kubernetes YAML or JSON, through everything that makes configuration of it.
pub fn objects(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let mut folder = Folder::new();
    folder.set_file(0, "fuzz.yaml", text);
    for diagnostic in folder.diagnostics() {
        assert!(diagnostic.to_string().len() < 64 << 10, "a file must not fill the log");
    }
    let config = MeshConfig::default();
    let compiled = compile(&folder.objects(), &config);
    // What we send, our own proxies can read: never a refusal for what a user wrote.
    let interner = &mut Interner::default();
    let defaults = Defaults { trust_domain: config.trust_domain.clone() };
    for w in &compiled.workloads {
        let wire = codec::encode_workload(w).encode_to_vec();
        let got = codec::decode_address(&codec::workload_name(w), &wire, &defaults, interner);
        assert_eq!(got, Ok(codec::Address::Workload(w.clone())));
    }
    for s in &compiled.services {
        let wire = codec::encode_service(s).encode_to_vec();
        let got = codec::decode_address(&codec::service_name(s), &wire, &defaults, interner);
        assert_eq!(got, Ok(codec::Address::Service(s.clone())));
    }
    for p in &compiled.policies {
        let wire = codec::encode_policy(p).encode_to_vec();
        let mut got = codec::decode_authorization(&codec::policy_name(p), &wire, interner)
            .unwrap_or_else(|e| panic!("{p:?}: {e}"));
        codec::attach_origin(&mut got, &codec::policy_origin(p), interner);
        assert_eq!(got, **p);
        planted::compiled(p);
    }
    for r in &compiled.routes {
        let wire = codec::encode_routes(r).encode_to_vec();
        let got = codec::decode_routes(&codec::routes_name(r), &wire, interner);
        assert_eq!(got.as_ref(), Ok(&**r));
    }
    for s in &compiled.subsets {
        let wire = codec::encode_subset(s).encode_to_vec();
        let got = codec::decode_subset(&codec::subset_name(s), &wire, interner);
        assert_eq!(got.as_ref(), Ok(&**s));
    }
}

/// The messages between a node's agent and its proxy: as one, and as a line of them, a length before each.
pub fn zds(data: &[u8]) {
    if let Ok(request) = WorkloadRequest::decode(data) {
        let again = WorkloadRequest::decode(&request.encode_to_vec()[..]);
        planted::zds(&request);
        assert_eq!(again.as_ref(), Ok(&request));
    }
    if let Ok(hello) = ZdsHello::decode(data) {
        assert_eq!(ZdsHello::decode(&hello.encode_to_vec()[..]), Ok(hello));
    }
    if let Ok(answer) = WorkloadResponse::decode(data) {
        assert_eq!(WorkloadResponse::decode(&answer.encode_to_vec()[..]), Ok(answer));
    }
    line(data);
}

/// What the proxy makes of a line: it keeps what was named before the end of the snapshot, and nothing else.
fn line(mut data: &[u8]) {
    let (mut snapshot, mut added, mut over) = (Snapshot::default(), BTreeSet::new(), false);
    while let Some((length, rest)) = data.split_first() {
        let (packet, rest) = rest.split_at(usize::from(*length).min(rest.len()));
        data = rest;
        match snapshot.read(packet, VecDeque::from([()])) {
            Ok(Some(PodEvent::Add { uid, .. })) => {
                assert!(!uid.is_empty());
                added.insert(uid);
            }
            Ok(Some(PodEvent::Remove { uid })) => {
                added.remove(&uid);
            }
            Ok(Some(PodEvent::Only { uids, .. })) => {
                assert!(!over, "a snapshot ends once");
                assert!(added.iter().all(|uid| uids.contains(uid)), "a pod that was added is lost");
                over = true;
            }
            Ok(None) => {}
            Err(words) => assert!(words.len() < 1024, "an agent must not fill the log"),
        }
    }
}

/// The launcher's lines about node tokens, and the tokens that proxies show.
pub fn registry(data: &[u8]) {
    let mut tokens = Tokens::default();
    let mut registered = 0;
    for line in data.split(|b| *b == b'\n') {
        let Ok(line) = std::str::from_utf8(line) else { continue };
        // As a token, nothing that was only registered by its hash opens anything.
        assert_eq!(tokens.node_of(line), None, "{line:?}");
        assert_eq!(tokens.redeem(line), None);
        if let Ok(node) = tokens.register(line) {
            assert!(!node.is_empty() && node.len() <= 253);
            registered += 1;
            planted::node(&node);
        }
        assert!(tokens.pending() <= registered);
    }
}
