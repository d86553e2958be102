//! One state of the mesh: what the folders mean, encoded for proxies. Made on the watch thread.
//!
//! Invariant: the push number grows exactly when what proxies should hold has changed, so that a proxy's
//! acknowledged number says which configuration it enforces.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use compile::{
    Compiled, Compiler, Diagnostic, Folder, GatewayStatus, MeshConfig, PodsOnNodes, Programmed,
    RouteStatus, WaypointAccounts, sort_diagnostics,
};
use model::ConfigVersion;
use xds::server::{Encoder, Mesh, Resources};

use crate::kept::Kept;
use crate::scan::News;
use crate::watch::Update;

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct World {
    /// What every proxy should hold.
    pub resources: Arc<Resources>,
    /// Who may have a certificate on which node.
    pub pods: Arc<PodsOnNodes>,
    /// As whom waypoints run.
    pub waypoints: WaypointAccounts,
    /// How they are.
    pub gateways: Vec<GatewayStatus>,
    /// What there is to say about each route at each of its parents.
    pub route_status: Vec<Arc<RouteStatus>>,
    /// Workloads, services, policies, services with routes, subsets.
    pub counts: [usize; 5],
    pub compile_time: Duration,
    /// When this push number came to be.
    pub since: Instant,
}

impl World {
    pub(crate) fn push(&self) -> ConfigVersion {
        self.resources.push()
    }
}

/// What there is to know before every folder has been read: what is wrong, but no mesh.
#[derive(Clone, Debug, Default)]
pub(crate) struct Latest {
    /// `None` until every folder has been read once: an empty mesh, sent to proxies that still hold a good
    /// one, would take their policies away.
    pub world: Option<Arc<World>>,
    /// Errors first.
    pub diagnostics: Arc<[Diagnostic]>,
    /// The folders that are waited for.
    pub missing: Vec<PathBuf>,
}

/// Turns what the watcher tells into states of the mesh.
#[derive(Debug)]
pub(crate) struct Builder {
    epoch: u64,
    folder: Folder,
    compiler: Compiler,
    encoder: Encoder,
    kept: Kept,
    /// Waypoints that were ready once, by all that is known of every folder.
    programmed: Programmed,
    last: Option<Built>,
}

/// What the files mean.
#[derive(Debug)]
struct Built {
    world: Arc<World>,
    /// What is wrong with the content of the files.
    diagnostics: Vec<Diagnostic>,
    /// Waypoints that were ready once, by what these files say.
    programmed: Programmed,
}

impl Builder {
    /// `epoch` tells this run of the control plane from every other.
    pub(crate) fn new(mesh: MeshConfig, epoch: u64, kept: Kept) -> Self {
        let programmed = kept.programmed();
        Self {
            epoch,
            folder: Folder::new(),
            compiler: Compiler::new(mesh),
            encoder: Encoder::default(),
            kept,
            programmed,
            last: None,
        }
    }

    /// Takes a change in and says what holds at `now`.
    pub(crate) fn update(&mut self, update: Update, now: Instant) -> Latest {
        let changed = !update.news.is_empty();
        for news in update.news {
            match news {
                News::Set { key: (folder, path), text } => self.set_file(folder, &path, &text),
                News::Removed { key: (folder, path) } => {
                    self.folder.remove_file(folder, &path);
                    self.kept.forget(folder, &path);
                }
            }
        }
        let built = match self.last.take() {
            Some(last) if !changed => last,
            last => self.build(last.map(|last| last.world), now),
        };
        // A Gateway that has not been read yet is not one that is gone.
        if update.complete && built.programmed != self.programmed {
            self.kept.keep_programmed(&self.programmed, &built.programmed);
            self.programmed.clone_from(&built.programmed);
        }
        let mut diagnostics = update.diagnostics;
        diagnostics.extend(built.diagnostics.iter().cloned());
        sort_diagnostics(&mut diagnostics);
        let world = update.complete.then(|| built.world.clone());
        self.last = Some(built);
        Latest { world, diagnostics: diagnostics.into(), missing: update.missing }
    }

    fn set_file(&mut self, folder: usize, path: &str, text: &str) {
        let known = self.folder.has_file(folder, path);
        if !known && let Some(last_good) = self.kept.recall(folder, path) {
            // The file may have been broken while we were away.
            self.folder.set_file(folder, path, &last_good);
        }
        self.folder.set_file(folder, path, text);
        if self.folder.is_in_force(folder, path) {
            self.kept.keep(folder, path, text);
        }
    }

    /// Compiles and encodes what the changes touch: an HTTPRoute takes milliseconds among thousands, while anything else of
    /// 100,000 pods takes about a second, on a thread that has nothing else to do. Parsing was done for the changed files
    /// only.
    fn build(&mut self, last: Option<Arc<World>>, now: Instant) -> Built {
        let started = Instant::now();
        let (mut objects, mut of_content) = self.folder.state();
        objects.programmed.clone_from(&self.programmed);
        let compiled = self.compiler.compile(objects);
        let Compiled {
            workloads,
            services,
            policies,
            routes,
            subsets,
            diagnostics,
            pods,
            route_status,
            ..
        } = compiled;
        let (waypoints, gateways) = (compiled.waypoint_accounts, compiled.gateways);
        of_content.extend(diagnostics);
        let number = last.as_ref().map_or(0, |last| last.push().number);
        let push = ConfigVersion { epoch: self.epoch, number: number + 1 };
        let mesh = Mesh {
            workloads: &workloads,
            services: &services,
            policies: &policies,
            routes: &routes,
            subsets: &subsets,
        };
        let resources = self.encoder.encode(push, mesh);
        let unchanged = last.filter(|last| last.resources.same_content(&resources));
        let (resources, since) = match unchanged {
            Some(last) => (last.resources.clone(), last.since),
            None => (Arc::new(resources), now),
        };
        let counts = [workloads.len(), services.len(), policies.len(), routes.len(), subsets.len()];
        let compile_time = started.elapsed();
        let world = World {
            resources,
            pods,
            waypoints,
            gateways,
            route_status,
            counts,
            compile_time,
            since,
        };
        Built { world: Arc::new(world), diagnostics: of_content, programmed: compiled.programmed }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use xds::Kind;

    struct Play {
        builder: Builder,
        complete: bool,
        _state: Option<tempfile::TempDir>,
    }

    impl Play {
        fn new() -> Self {
            let state = tempfile::tempdir().unwrap();
            let play = Self::started(state.path());
            Self { _state: Some(state), ..play }
        }

        /// A control plane that finds what an earlier one left.
        fn started(state: &std::path::Path) -> Self {
            let builder = Builder::new(MeshConfig::default(), 7, Kept::new(state));
            Self { builder, complete: true, _state: None }
        }

        fn set(&mut self, path: &str, text: &str) -> Latest {
            self.update(vec![News::Set { key: (0, path.into()), text: text.into() }])
        }

        fn update(&mut self, news: Vec<News>) -> Latest {
            let complete = self.complete;
            let update = Update { news, diagnostics: vec![], complete, missing: vec![] };
            self.builder.update(update, Instant::now())
        }
    }

    const SERVICE: &str = "apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIP: 10.96.0.20, ports: [{port: 80}]}
";
    const POLICY: &str = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: nobody, namespace: shop}
spec: {}
";

    #[test]
    fn a_policy_file_that_broke_while_we_were_away_keeps_denying() {
        let state = tempfile::tempdir().unwrap();
        let policies = |latest: &Latest| {
            let world = latest.world.as_ref().expect("complete");
            world.resources.iter(Kind::Authorization).count()
        };
        assert_eq!(policies(&Play::started(state.path()).set("p.yaml", POLICY)), 1);
        let latest = Play::started(state.path()).set("p.yaml", "kind: [");
        assert_eq!(policies(&latest), 1, "the last good state holds over a restart");
        assert!(latest.diagnostics.iter().any(|d| d.severity == compile::Severity::Error));
        // Removed on purpose: forgotten, also by the next start.
        let mut play = Play::started(state.path());
        play.set("p.yaml", POLICY);
        assert_eq!(policies(&play.update(vec![News::Removed { key: (0, "p.yaml".into()) }])), 0);
        assert_eq!(policies(&Play::started(state.path()).set("p.yaml", "kind: [")), 0);
    }

    /// A waypoint with one proxy, and a Service that names it.
    fn waypoint(ready: &str) -> String {
        format!(
            "
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {{name: w, namespace: shop}}
spec: {{gatewayClassName: istio-waypoint, listeners: [{{name: mesh, port: 15008, protocol: HBONE}}]}}
---
apiVersion: v1
kind: Service
metadata: {{name: w, namespace: shop}}
spec: {{clusterIP: 10.96.0.21, selector: {{of: w}}, ports: [{{port: 15008}}]}}
---
apiVersion: v1
kind: Pod
metadata: {{name: w-1, namespace: shop, labels: {{of: w, networking.istio.io/tunnel: http}}}}
spec: {{nodeName: node-1, containers: [{{name: c}}]}}
status: {{phase: Running, podIP: 10.0.7.1, conditions: [{{type: Ready, status: '{ready}'}}]}}
---
apiVersion: v1
kind: Service
metadata: {{name: web, namespace: shop, labels: {{istio.io/use-waypoint: w}}}}
spec: {{clusterIP: 10.96.0.20, ports: [{{port: 80}}]}}
"
        )
    }

    #[test]
    fn that_a_waypoint_was_ready_outlives_the_control_plane() {
        let state = tempfile::tempdir().unwrap();
        let bound = |play: &Play| !play.builder.programmed.is_empty();
        let mut play = Play::started(state.path());
        play.set("w.yaml", &waypoint("False"));
        assert!(!bound(&play));
        play.set("w.yaml", &waypoint("True"));
        assert!(bound(&play));
        play.set("w.yaml", &waypoint("False"));
        assert!(bound(&play), "no longer ready");
        let mut play = Play::started(state.path());
        // A folder is missing: what has not been read yet is not gone.
        play.complete = false;
        play.set("other.yaml", SERVICE);
        play.complete = true;
        play.set("w.yaml", &waypoint("False"));
        assert!(bound(&play), "over a restart");
        // Broken while we were away: the Gateway and the label are in force, and so is the binding.
        let mut play = Play::started(state.path());
        let latest = play.set("w.yaml", "kind: [");
        assert!(bound(&play));
        assert_eq!(latest.world.expect("complete").resources.iter(Kind::Address).count(), 3);
        // The Gateway is removed: forgotten, also by the next start.
        play.update(vec![News::Removed { key: (0, "w.yaml".into()) }]);
        assert!(!bound(&play));
        let mut play = Play::started(state.path());
        play.set("w.yaml", &waypoint("False"));
        assert!(!bound(&play));
    }

    /// An empty folder is the last to be read.
    #[test]
    fn a_waypoint_seen_before_every_folder_was_read_is_not_forgotten() {
        let state = tempfile::tempdir().unwrap();
        let mut play = Play::started(state.path());
        play.complete = false;
        play.set("w.yaml", &waypoint("True"));
        play.complete = true;
        play.update(vec![]);
        let mut play = Play::started(state.path());
        play.set("w.yaml", &waypoint("False"));
        assert!(!play.builder.programmed.is_empty());
    }

    #[test]
    fn the_push_number_grows_with_what_proxies_hold() {
        let mut play = Play::new();
        let check = |latest: Latest, number: u64, addresses: usize, policies: usize| {
            let world = latest.world.expect("complete");
            assert_eq!(world.push(), ConfigVersion { epoch: 7, number });
            assert_eq!(world.resources.iter(Kind::Address).count(), addresses);
            assert_eq!(world.resources.iter(Kind::Authorization).count(), policies);
        };
        check(play.update(vec![]), 1, 0, 0);
        check(play.set("s.yaml", SERVICE), 2, 1, 0);
        check(play.set("s.yaml", &format!("# a comment\n{SERVICE}")), 2, 1, 0);
        check(play.set("p.yaml", POLICY), 3, 1, 1);
        // The rule moved to another line: proxies name lines.
        check(play.set("p.yaml", &format!("# a comment\n{POLICY}")), 4, 1, 1);
        // Broken: the last good state stays in force, and nothing is pushed.
        let latest = play.set("p.yaml", "kind: [");
        assert!(latest.diagnostics.iter().any(|d| d.origin.starts_with("p.yaml:")));
        check(latest, 4, 1, 1);
        let latest = play.set("p.yaml", POLICY);
        assert!(latest.diagnostics.iter().all(|d| d.severity != compile::Severity::Error));
        check(latest, 5, 1, 1);
        check(play.update(vec![News::Removed { key: (0, "p.yaml".into()) }]), 6, 1, 0);
    }

    #[test]
    fn nothing_is_published_before_every_folder_was_read() {
        let mut play = Play::new();
        play.complete = false;
        assert!(play.set("s.yaml", SERVICE).world.is_none());
        play.complete = true;
        let latest = play.update(vec![]);
        assert_eq!(latest.world.expect("complete").counts, [0, 1, 0, 0, 0]);
    }
}
