//! The two halves of the protocol against each other: random meshes, losses and reconnects at any moment,
//! and in the end the proxy holds what the control plane wants.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use model::http::{
    Audience, Backend, RouteKind, RouteMatch, RouteRule, RouteSet, ServiceRoutes, Subset,
    SubsetKey, Target, Timeouts,
};
use model::{
    Action, ConfigVersion, Policy, PolicyKey, Provenance, Rule, Scope, Service, ServiceKey,
    Snapshot, Workload, WorkloadUid,
};
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use xds::Kind;
use xds::client::{Client, Mismatch, Saved};
use xds::codec::Defaults;
use xds::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node};
use xds::server::{self, Connection, Event, Resources};

/// A small mesh: index to variant. Workload `i` of variant `v` is selected by policy `v`, the subset of service `i` has
/// workload `v`, and the routes of service `i` go to service `v`, to its subset if it has one. All of these exist.
#[derive(Clone, Debug, Default)]
struct Mesh {
    workloads: BTreeMap<u8, u8>,
    services: BTreeMap<u8, u8>,
    policies: BTreeMap<u8, u8>,
    subsets: BTreeMap<u8, u8>,
    routes: BTreeMap<u8, u8>,
}

fn mesh() -> impl Strategy<Value = Mesh> {
    let some = || btree_map(0..5_u8, 0..4_u8, 0..5);
    let all = (some(), some(), some(), some(), some());
    all.prop_map(|(workloads, services, policies, subsets, routes)| {
        let mut mesh = Mesh { workloads, services, policies, subsets, routes };
        for (index, variant) in &mesh.subsets {
            mesh.services.entry(*index).or_insert(0);
            mesh.workloads.entry(*variant).or_insert(0);
        }
        for (index, variant) in &mesh.routes {
            mesh.services.entry(*index).or_insert(0);
            mesh.services.entry(*variant).or_insert(0);
        }
        for variant in mesh.workloads.values() {
            mesh.policies.entry(*variant).or_insert(0);
        }
        mesh
    })
}

impl Mesh {
    fn policy(index: u8, variant: u8) -> Policy {
        let text = |s: String| -> model::Str { s.into() };
        let provenance = |line| Provenance {
            object: text(format!("AuthorizationPolicy/ns/p{index}")),
            field: text(format!("spec.rules[{line}]")),
            origin: text(format!("file.yaml:{variant}")),
        };
        Policy {
            key: PolicyKey { namespace: "ns".into(), name: text(format!("p{index}")) },
            scope: Scope::WorkloadSelector,
            action: if variant.is_multiple_of(2) { Action::Allow } else { Action::Deny },
            rules: (0..variant)
                .map(|l| Rule { clauses: Vec::new(), provenance: provenance(l) })
                .collect(),
            dry_run: false,
            provenance: provenance(9),
        }
    }

    fn workloads(&self) -> Vec<Workload> {
        let one = |(index, variant): (&u8, &u8)| Workload {
            node: format!("node-{variant}").into(),
            policies: [Self::policy(*variant, 0).key].into(),
            ..Workload::named(format!("c//Pod/ns/w{index}"), "ns", format!("w{index}"))
        };
        self.workloads.iter().map(one).collect()
    }

    fn services(&self) -> Vec<Service> {
        let one = |(index, variant): (&u8, &u8)| Service {
            key: Self::service_key(*index),
            name: format!("variant{variant}").into(),
            vips: [].into(),
            ports: [].into(),
            subject_alt_names: [].into(),
            waypoint: None,
            load_balancing: Default::default(),
            families: Default::default(),
        };
        self.services.iter().map(one).collect()
    }

    fn policies(&self) -> Vec<Policy> {
        self.policies.iter().map(|(index, variant)| Self::policy(*index, *variant)).collect()
    }

    fn service_key(index: u8) -> ServiceKey {
        ServiceKey { namespace: "ns".into(), hostname: format!("s{index}").into() }
    }

    fn subsets(&self) -> Vec<Subset> {
        let one = |(index, variant): (&u8, &u8)| Subset {
            key: SubsetKey { service: Self::service_key(*index), name: "v".into() },
            workloads: [WorkloadUid(format!("c//Pod/ns/w{variant}").into())].into(),
        };
        self.subsets.iter().map(one).collect()
    }

    fn routes(&self) -> Vec<ServiceRoutes> {
        let one = |(index, variant): (&u8, &u8)| {
            let subset = self.subsets.contains_key(variant).then(|| "v".into());
            let target = Target::Service { service: Self::service_key(*variant), port: 80, subset };
            let rule = RouteRule {
                route: "HTTPRoute/ns/r".into(),
                name: "rules[0]".into(),
                provenance: Provenance::default(),
                filters: Vec::new(),
                backends: vec![Backend { weight: 1, target, filters: Vec::new() }],
                timeouts: Timeouts::default(),
            };
            let (rules, matches) = ([Arc::new(rule)].into(), [RouteMatch::default()].into());
            let ports = [80].into();
            let set = RouteSet::new(Audience::Everybody, ports, RouteKind::Http, rules, matches);
            ServiceRoutes {
                service: Self::service_key(*index),
                ports: [].into(),
                sets: [Arc::new(set.expect("its matches refer to its rule"))].into(),
            }
        };
        self.routes.iter().map(one).collect()
    }

    fn resources(&self, number: u64) -> Arc<Resources> {
        let push = ConfigVersion { epoch: 7, number };
        fn all<T>(values: Vec<T>) -> Vec<Arc<T>> {
            values.into_iter().map(Arc::new).collect()
        }
        let mesh = server::Mesh {
            workloads: &all(self.workloads()),
            services: &all(self.services()),
            policies: &all(self.policies()),
            routes: &all(self.routes()),
            subsets: &all(self.subsets()),
        };
        Arc::new(Resources::new(push, mesh))
    }

    /// What a proxy holds that asks for these.
    fn assert_held(&self, snapshot: &Snapshot, kinds: &[Kind]) {
        fn sorted<T: Clone + std::fmt::Debug>(all: impl Iterator<Item = T>) -> BTreeSet<String> {
            all.map(|one| format!("{one:?}")).collect()
        }
        assert_eq!(
            sorted(snapshot.workloads().map(|a| (**a).clone())),
            sorted(self.workloads().into_iter())
        );
        assert_eq!(
            sorted(snapshot.services().map(|a| (**a).clone())),
            sorted(self.services().into_iter())
        );
        assert_eq!(
            sorted(snapshot.policies().map(|a| (**a).clone())),
            sorted(self.policies().into_iter())
        );
        let waypoint = kinds.contains(&Kind::Routes);
        assert_eq!(
            sorted(snapshot.all_routes().map(|a| (**a).clone())),
            sorted(self.routes().into_iter().filter(|_| waypoint))
        );
        assert_eq!(
            sorted(snapshot.subsets().map(|a| (**a).clone())),
            sorted(self.subsets().into_iter().filter(|_| waypoint))
        );
    }
}

/// A proxy, a control plane and the wires between them.
struct World {
    kinds: &'static [Kind],
    client: Client,
    snapshot: Snapshot,
    server: Connection,
    desired: Arc<Resources>,
    up: VecDeque<DeltaDiscoveryRequest>,
    down: VecDeque<DeltaDiscoveryResponse>,
    mismatches: Vec<Mismatch>,
    markers: u64,
    lossy: bool,
}

impl World {
    fn new(kinds: &'static [Kind]) -> Self {
        let desired = Arc::new(Resources::default());
        let mut world = Self {
            kinds,
            client: client(kinds),
            snapshot: Snapshot::default(),
            server: Connection::new(desired.clone()),
            desired,
            up: VecDeque::new(),
            down: VecDeque::new(),
            mismatches: Vec::new(),
            markers: 0,
            lossy: false,
        };
        world.reconnect();
        world
    }

    fn reconnect(&mut self) {
        self.down.clear();
        self.up = self.client.connect().into();
        self.server = Connection::new(self.desired.clone());
    }

    fn push(&mut self, desired: Arc<Resources>) {
        self.desired = desired.clone();
        self.server.set(desired);
        self.send();
    }

    fn send(&mut self) {
        while let Some(response) = self.server.next_response() {
            self.markers += u64::from(response.type_url == Kind::Marker.type_url());
            self.down.push_back(response);
        }
    }

    fn deliver_up(&mut self) {
        if let Some(request) = self.up.pop_front() {
            let event = self.server.request(request).expect("serviceable");
            assert!(!matches!(event, Event::Ignored(_)), "{event:?}");
            self.send();
        }
    }

    fn deliver_down(&mut self) {
        if let Some(response) = self.down.pop_front() {
            let batch = self.client.handle(response);
            self.snapshot = self.snapshot.with(batch.changes);
            self.mismatches.extend(batch.mismatches);
            self.up.extend(batch.receipt.answers());
            self.assert_closed();
        }
    }

    /// The response gets lost, and its acknowledgement is made up.
    fn lose(&mut self) {
        if let Some(response) = self.down.pop_front() {
            self.lossy = true;
            self.up.push_back(DeltaDiscoveryRequest {
                type_url: response.type_url,
                response_nonce: response.nonce,
                ..Default::default()
            });
        }
    }

    fn settle(&mut self) {
        for _ in 0..1000 {
            if self.up.is_empty() && self.down.is_empty() {
                assert!(self.server.is_settled());
                return;
            }
            self.deliver_up();
            self.deliver_down();
        }
        panic!("never settles");
    }

    /// No workload ever refers to a policy that is not there, no subset to a workload, no route to a service or a
    /// subset.
    fn assert_closed(&self) {
        if self.lossy {
            return;
        }
        for workload in self.snapshot.workloads() {
            let missing = self.snapshot.policies_of(workload).missing;
            assert!(missing.is_empty(), "{} misses {missing:?}", workload.uid);
        }
        for subset in self.snapshot.subsets() {
            let mut missing = subset.workloads.iter();
            let missing = missing.find(|uid| self.snapshot.workload(uid).is_none());
            assert_eq!(missing, None, "{}", subset.key);
        }
        for routes in self.snapshot.all_routes() {
            assert!(self.snapshot.service(&routes.service).is_some(), "{}", routes.service);
            let rules = routes.sets.iter().flat_map(|set| set.rules.iter());
            for backend in rules.flat_map(|rule| &rule.backends) {
                let Target::Service { service, subset, .. } = &backend.target else { continue };
                let to = &backend.target;
                assert!(self.snapshot.service(service).is_some(), "{} to {to}", routes.service);
                let Some(name) = subset else { continue };
                let key = SubsetKey { service: service.clone(), name: name.clone() };
                assert!(self.snapshot.subset(&key).is_some(), "{} to {to}", routes.service);
            }
        }
    }
}

fn client(kinds: &'static [Kind]) -> Client {
    let node = Node { id: "node-1".to_owned(), ..Default::default() };
    Client::new(node, defaults()).asking_for(kinds)
}

/// What a node's proxy asks for, or a waypoint.
fn kinds() -> impl Strategy<Value = &'static [Kind]> {
    prop_oneof![Just(&Kind::OF_NODE[..]), Just(&Kind::OF_WAYPOINT[..])]
}

fn defaults() -> Defaults {
    Defaults { trust_domain: "cluster.local".into() }
}

#[derive(Clone, Debug)]
enum Step {
    Push(Mesh),
    Up,
    Down,
    Reconnect,
    /// The proxy restarts from what it saved.
    Restart,
    /// The control plane restarts and pushes the same.
    Renumber,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => mesh().prop_map(Step::Push),
        6 => Just(Step::Up),
        6 => Just(Step::Down),
        1 => Just(Step::Reconnect),
        1 => Just(Step::Restart),
        1 => Just(Step::Renumber),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn ends_where_the_server_wants(kinds in kinds(), steps in vec(step(), 0..60)) {
        let mut world = World::new(kinds);
        let mut wanted = Mesh::default();
        let mut number = 1;
        for step in steps {
            match step {
                Step::Push(mesh) => {
                    number += 1;
                    world.push(mesh.resources(number));
                    wanted = mesh;
                }
                Step::Up => world.deliver_up(),
                Step::Down => world.deliver_down(),
                Step::Reconnect => world.reconnect(),
                Step::Restart => restart(&mut world),
                Step::Renumber => {
                    number += 1;
                    world.push(wanted.resources(number));
                }
            }
        }
        world.settle();
        wanted.assert_held(&world.snapshot, kinds);
        prop_assert_eq!(&world.mismatches, &[]);
        prop_assert_eq!(world.snapshot.version(), world.desired.push());
        prop_assert_eq!(world.server.acked(), Some(world.desired.push()));
        prop_assert!(world.client.is_synced());
    }

    #[test]
    fn lost_updates_are_found_and_repaired(
        kinds in kinds(), before in mesh(), lost in mesh(), after in mesh()
    ) {
        let mut world = World::new(kinds);
        world.push(before.resources(1));
        world.settle();
        world.push(lost.resources(2));
        // All but the marker, which comes last.
        let marker = |r: &&DeltaDiscoveryResponse| r.type_url == Kind::Marker.type_url();
        for _ in 0..world.down.len() - world.down.iter().filter(marker).count() {
            world.lose();
        }
        world.settle();
        // Types that were lost one after the other (a removal after the acknowledgement of an addition)
        // may need the next push.
        world.push(after.resources(3));
        world.settle();
        after.assert_held(&world.snapshot, kinds);
        prop_assert_eq!(world.snapshot.version(), ConfigVersion { epoch: 7, number: 3 });
        let changes = lost.resources(2).changes_since(&before.resources(1));
        let lossless = kinds.iter().copied().all(|kind| {
            changes.of(kind).set.is_empty() && changes.of(kind).removed.is_empty()
        });
        prop_assert_eq!(world.mismatches.is_empty(), lossless);
    }

    #[test]
    fn changes_turn_old_into_new(old in mesh(), new in mesh()) {
        let (old, new) = (old.resources(1), new.resources(2));
        for kind in Kind::ALL {
            let changes = new.changes_since(&old);
            let changes = changes.of(kind);
            let mut applied: BTreeMap<_, _> = old.iter(kind).collect();
            let before = applied.len();
            applied.retain(|name, _| !changes.removed.contains(*name));
            prop_assert_eq!(applied.len() + changes.removed.len(), before, "removed what was not there");
            for (name, encoded) in new.iter(kind).filter(|(name, _)| changes.set.contains(*name)) {
                prop_assert!(applied.insert(name, encoded) != Some(encoded), "set what was there");
            }
            prop_assert_eq!(applied, new.iter(kind).collect());
        }
    }
}

fn restart(world: &mut World) {
    let held = world.client.held();
    let saved: Vec<Saved> = held.save(&world.snapshot).collect();
    world.client = client(world.kinds);
    let (changes, unreadable) = world.client.restore(saved);
    assert_eq!(unreadable, []);
    world.snapshot = Snapshot::default().with(changes);
    world.assert_closed();
    world.reconnect();
}

#[test]
fn a_push_without_changes_costs_a_marker_and_nothing_else() {
    let mut world = World::new(&Kind::OF_NODE);
    let mesh = small();
    world.push(mesh.resources(1));
    world.settle();
    let markers = world.markers;
    world.push(mesh.resources(2));
    assert_eq!(world.down.len(), 1);
    world.settle();
    assert_eq!(world.markers, markers + 1);
    assert_eq!(world.snapshot.version().number, 2);
}

#[test]
fn an_unchanged_mesh_is_not_sent_again_after_a_reconnect() {
    for (kinds, restart_too) in [
        (&Kind::OF_NODE[..], false),
        (&Kind::OF_NODE, true),
        (&Kind::OF_WAYPOINT, false),
        (&Kind::OF_WAYPOINT, true),
    ] {
        let mut world = World::new(kinds);
        let mesh = small();
        world.push(mesh.resources(1));
        world.settle();
        if restart_too {
            restart(&mut world)
        } else {
            world.reconnect()
        }
        while !world.up.is_empty() {
            world.deliver_up();
        }
        let sizes: Vec<_> =
            world.down.iter().map(|r| (r.resources.len(), r.removed_resources.len())).collect();
        // Each type is answered, and only the marker says something.
        let mut want = vec![(0, 0); kinds.len()];
        want[kinds.len() - 1] = (1, 0);
        assert_eq!(sizes, want);
        world.settle();
        mesh.assert_held(&world.snapshot, kinds);
    }
}

/// A proxy that was something else before: what it does not ask for does not come back from the disk.
#[test]
fn what_is_not_asked_for_is_not_restored() {
    let mut world = World::new(&Kind::OF_WAYPOINT);
    let mesh = small();
    world.push(mesh.resources(1));
    world.settle();
    world.kinds = &Kind::OF_NODE;
    restart(&mut world);
    mesh.assert_held(&world.snapshot, &Kind::OF_NODE);
}

fn small() -> Mesh {
    Mesh {
        workloads: [(1, 1)].into(),
        services: [(1, 1)].into(),
        policies: [(1, 2)].into(),
        subsets: [(1, 1)].into(),
        routes: [(1, 1)].into(),
    }
}
