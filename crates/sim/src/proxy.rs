//! One process of a node proxy: what it holds, and the decisions that it takes by asking `xds` and `engine`.
//! What is here is what in the real one moves bytes and waits; nothing here decides.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use engine::{BookLimits, Carrier, PoolBook, Renewals, Rotation};
use model::{Change, Identity, Snapshot, Workload};
use xds::Kind;
use xds::client::{Client, Saved};
use xds::codec::Defaults;
use xds::discovery::Node;

use crate::content::{Pod, node_name};
use crate::oracle::Request;

/// What a proxy holds, by the numbers of contents: see [`crate::oracle::Mix`].
#[derive(Clone, Debug)]
pub(crate) struct Holds {
    pub(crate) sent: Vec<usize>,
    pub(crate) policies: Option<usize>,
    pub(crate) addresses: Option<usize>,
}

impl Holds {
    /// This content and nothing else.
    pub(crate) fn exactly(content: usize) -> Self {
        Self { sent: vec![content], policies: Some(content), addresses: Some(content) }
    }
}

impl Default for Holds {
    /// The first content, which has nothing in it.
    fn default() -> Self {
        Self::exactly(0)
    }
}

/// A proxy gives up streams above this; small, so that the limit is met.
pub(crate) const STREAMS: usize = 2;
/// Tunnels of one proxy.
pub(crate) const TUNNELS: usize = 6;
/// Times of the real pool.
pub(crate) const IDLE: Duration = Duration::from_secs(300);
const SPARE: Duration = Duration::from_secs(10);

/// What a node keeps while its proxy is not running.
#[derive(Clone, Debug, Default)]
pub(crate) struct Disk {
    pub(crate) saved: Vec<Saved>,
    pub(crate) version: model::ConfigVersion,
    pub(crate) holds: Holds,
}

/// A certificate: its dates, and the pod whose identity it states is its key in the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cert(pub(crate) Rotation);

pub(crate) type Secrets = BTreeMap<Identity, Cert>;

/// What the pool of the real proxy has as its key.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Key {
    /// The pod that dials: one of a kind, also where a new one has taken its name.
    pub(crate) source: u32,
    pub(crate) identity: Identity,
    pub(crate) destination: model::WorkloadUid,
    pub(crate) gateway: SocketAddr,
    pub(crate) expected: Vec<Identity>,
}

/// A tunnel. Both ends hold it; it works while both processes, and both pods, live.
#[derive(Clone, Debug)]
pub(crate) struct Wire(pub(crate) Rc<WireState>);

#[derive(Debug)]
pub(crate) struct WireState {
    /// The pod at its client's end, and the one at its server's.
    pub(crate) from: u32,
    pub(crate) to: u32,
    pub(crate) client: usize,
    pub(crate) server: usize,
    /// As the server verified it.
    pub(crate) peer: Identity,
    pub(crate) source: IpAddr,
    pub(crate) closed: Cell<bool>,
    pub(crate) streams: Cell<usize>,
}

impl Carrier for Wire {
    fn streams(&self) -> usize {
        self.0.streams.get()
    }

    fn capacity(&self, ours: usize) -> usize {
        ours
    }

    fn is_closed(&self) -> bool {
        self.0.closed.get()
    }
}

/// A live connection at the server's end.
#[derive(Clone, Debug)]
pub(crate) struct Live {
    pub(crate) pod: Pod,
    pub(crate) request: Request,
    pub(crate) destination: SocketAddr,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Proxy {
    pub(crate) node: usize,
    pub(crate) alive: bool,
    /// Takes nothing new, since this moment.
    pub(crate) draining: Option<u64>,
    pub(crate) client: Client,
    pub(crate) snapshot: Arc<Snapshot>,
    pub(crate) holds: Holds,
    /// Counts what was put into force.
    pub(crate) generation: u64,
    pub(crate) stream: Option<usize>,
    /// No stream is tried before there is a certificate to show.
    pub(crate) waits_for_certificate: bool,
    pub(crate) renewals: Renewals<Identity>,
    pub(crate) certs: Secrets,
    /// Left by an earlier process, until somebody wants them.
    pub(crate) found: Secrets,
    /// Requests to the CA under way.
    pub(crate) asking: usize,
    /// Which look at the certificates is the planned one.
    pub(crate) look: u64,
    pub(crate) pool: PoolBook<Key, Wire, ()>,
    /// Who waits for whose dial.
    pub(crate) dials: BTreeMap<Key, Vec<usize>>,
    /// Its pods, by when they were born.
    pub(crate) pods: BTreeMap<u32, Pod>,
    pub(crate) live: BTreeMap<usize, Live>,
    /// Calls that wait for a policy in flight, at the server's end.
    pub(crate) pending: Vec<usize>,
    pub(crate) save_planned: bool,
    /// Fewer resources than the control plane sent may be here: it lost one on purpose.
    pub(crate) holed: bool,
}

impl Proxy {
    /// Starts with what the node kept.
    pub(crate) fn start(node: usize, disk: &Disk, secrets: &Secrets, now: u64, wall: u64) -> Self {
        let name = node_name(node);
        let id = Node { id: name, ..Node::default() };
        let mut client = Client::new(id, Defaults { trust_domain: "cluster.local".into() });
        let (mut changes, _) = client.restore(disk.saved.iter().cloned());
        changes.push(Change::SetVersion(disk.version));
        let limits = BookLimits { streams: STREAMS, tunnels: TUNNELS, idle: IDLE, spare: SPARE };
        let mut proxy = Self {
            node,
            alive: true,
            draining: None,
            client,
            snapshot: Arc::new(Snapshot::default().with(changes)),
            holds: disk.holds.clone(),
            generation: 0,
            stream: None,
            waits_for_certificate: false,
            renewals: Renewals::new(Some(own_identity())),
            certs: Secrets::new(),
            found: secrets.clone(),
            asking: 0,
            look: 0,
            pool: PoolBook::new(limits),
            dials: BTreeMap::new(),
            pods: BTreeMap::new(),
            live: BTreeMap::new(),
            pending: Vec::new(),
            save_planned: false,
            holed: false,
        };
        proxy.found.retain(|_, cert| cert.0.not_after > wall);
        proxy.want(&own_identity(), now, 500);
        proxy
    }

    /// A certificate of this identity is to be had, and kept valid.
    pub(crate) fn want(&mut self, identity: &Identity, now: u64, rand: u64) {
        if self.renewals.get(identity).is_some() {
            return;
        }
        let found = self.found.remove(identity);
        let dates = found.map(|cert| cert.0);
        self.renewals.add(identity.clone(), dates, false, Duration::from_millis(now), rand);
        if let Some(found) = found {
            self.certs.insert(identity.clone(), found);
        }
    }

    /// Nobody on the node has this identity any more.
    pub(crate) fn forget(&mut self, identity: &Identity) {
        self.found.remove(identity);
        if self.renewals.forget(identity) {
            self.certs.remove(identity);
        }
    }

    /// The certificate of an identity, unless it has expired by the node's clock.
    pub(crate) fn certificate(&self, identity: &Identity, wall: u64) -> Option<Cert> {
        self.certs.get(identity).copied().filter(|cert| cert.0.not_after > wall)
    }

    /// The control plane's view of a pod.
    pub(crate) fn workload(&self, pod: &Pod) -> Option<&Arc<Workload>> {
        self.snapshot.workload_named(&pod.namespace().into(), &pod.name().as_str().into())
    }

    /// What a restart finds, if it is written now.
    pub(crate) fn to_disk(&self) -> Disk {
        let held = self.client.held();
        let saved = held.save(&self.snapshot).collect();
        Disk { saved, version: self.snapshot.version(), holds: self.holds.clone() }
    }

    /// A response of this content is in force.
    pub(crate) fn took(&mut self, kind: Kind, content: usize) {
        if !self.holds.sent.contains(&content) {
            self.holds.sent.push(content);
        }
        match kind {
            Kind::Authorization if !self.holed => self.holds.policies = Some(content),
            Kind::Address if !self.holed => self.holds.addresses = Some(content),
            _ => {}
        }
    }

    /// A response did not arrive, and the control plane thinks that it did.
    pub(crate) fn missed(&mut self) {
        self.holed = true;
        (self.holds.policies, self.holds.addresses) = (None, None);
    }
}

/// Of every node proxy.
pub(crate) fn own_identity() -> Identity {
    Identity::new("cluster.local", "istio-system", "ztunnel")
}
