//! The control plane: replicas that learn what users wrote sooner or later, serve it and sign certificates.
//! What is compiled, sent and withheld is decided by `compile` and `xds`.

use std::collections::BTreeMap;
use std::sync::Arc;

use compile::{Compiler, MeshConfig, PodsOnNodes};
use model::{ConfigVersion, Identity};
use xds::server::{Connection, Encoder, Mesh, Resources};

use crate::content::{Content, node_name};

/// Streams that a node may have open at one replica (`istiod-lite` says the same).
pub(crate) const MAX_STREAMS_PER_NODE: usize = 4;

/// What compiles and encodes one content after another.
#[derive(Debug)]
pub(crate) struct Compilation {
    compiler: Compiler,
    encoder: Encoder,
}

impl Default for Compilation {
    fn default() -> Self {
        Self { compiler: Compiler::new(MeshConfig::default()), encoder: Encoder::default() }
    }
}

/// A content with what it compiles to, once for all replicas.
#[derive(Debug)]
pub(crate) struct Compiled {
    pub(crate) content: Content,
    pub(crate) pods: Arc<PodsOnNodes>,
    pub(crate) mesh: compile::Compiled,
    resources: Resources,
}

impl Compiled {
    /// As the control plane does it: with what it remembers of contents before.
    pub(crate) fn new(content: Content, by: &mut Compilation) -> Self {
        let mesh = by.compiler.compile(content.objects());
        let all = Mesh {
            workloads: &mesh.workloads,
            services: &mesh.services,
            policies: &mesh.policies,
            routes: &mesh.routes,
            subsets: &mesh.subsets,
        };
        let resources = by.encoder.encode(ConfigVersion::default(), all);
        let pods = mesh.pods.clone();
        Self { content, pods, mesh, resources }
    }
}

/// One process of the control plane.
#[derive(Debug)]
pub(crate) struct Replica {
    pub(crate) up: bool,
    /// The CA fails while the rest works.
    pub(crate) signs: bool,
    epoch: u64,
    /// The content it knows.
    pub(crate) knows: usize,
    pub(crate) desired: Arc<Resources>,
    pub(crate) streams: BTreeMap<usize, ServerEnd>,
}

/// The replica's end of a discovery stream.
#[derive(Debug)]
pub(crate) struct ServerEnd {
    pub(crate) node: usize,
    pub(crate) connection: Connection,
}

impl Replica {
    pub(crate) fn start(epoch: u64, knows: usize, compiled: &Compiled) -> Self {
        let mut replica = Self {
            up: true,
            signs: true,
            epoch,
            knows,
            desired: Arc::default(),
            streams: BTreeMap::new(),
        };
        replica.learn(knows, compiled);
        replica
    }

    /// Takes in a content. Says whether there is something to push.
    pub(crate) fn learn(&mut self, knows: usize, compiled: &Compiled) -> bool {
        self.knows = knows;
        if self.desired.push().number > 0 && self.desired.same_content(&compiled.resources) {
            return false;
        }
        let push = ConfigVersion { epoch: self.epoch, number: self.desired.push().number + 1 };
        self.desired = Arc::new(compiled.resources.clone().with_push(push));
        for end in self.streams.values_mut() {
            end.connection.set(self.desired.clone());
        }
        true
    }

    /// A proxy opens a stream. `false`: it has too many.
    pub(crate) fn open(&mut self, stream: usize, node: usize) -> bool {
        if self.streams.values().filter(|end| end.node == node).count() >= MAX_STREAMS_PER_NODE {
            return false;
        }
        let connection = Connection::new(self.desired.clone());
        self.streams.insert(stream, ServerEnd { node, connection });
        true
    }

    /// Whether the CA gives a node a certificate for an identity: its own, or that of a pod on it.
    pub(crate) fn may_sign(&self, node: usize, identity: &Identity, compiled: &Compiled) -> bool {
        let key = (identity.namespace.clone(), identity.service_account.clone());
        let name = node_name(node);
        compiled.pods.get(&*name).is_some_and(|accounts| accounts.contains(&key))
    }
}
