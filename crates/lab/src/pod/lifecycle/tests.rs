//! What the kubelet would do, as tables of events.

use super::*;
use crate::pod::resolve::{ProbeAction, Problem};
use crate::pod::run::{ProcessRun, RootSource};

fn plan(name: &str) -> ContainerPlan {
    let process = ProcessRun {
        argv: vec!["x".into()],
        env: vec![],
        cwd: String::new(),
        uid: 0,
        gid: 0,
        groups: vec![],
    };
    ContainerPlan {
        name: name.into(),
        init: false,
        sidecar: false,
        process: Ok(process),
        root: RootSource::Machine,
        mounts: vec![],
        startup: None,
        readiness: None,
        liveness: None,
        pre_stop: None,
    }
}

fn probe(failure: u32) -> Option<ProbePlan> {
    Some(ProbePlan {
        action: ProbeAction::Tcp { port: 1 },
        initial_delay: 0,
        period: 1000,
        timeout: 1000,
        success: 1,
        failure,
    })
}

fn run(container: usize, attempt: u32) -> Run {
    Run { container, attempt }
}

/// A lifecycle and its clock.
struct World(Lifecycle, Millis);

impl World {
    fn new(plans: Vec<ContainerPlan>, policy: RestartPolicy) -> Self {
        Self(Lifecycle::new(plans, policy), 0)
    }

    fn on(&mut self, happened: Happened, want: &[Action]) {
        let got = self.0.handle(self.1, happened.clone());
        assert_eq!(got, want, "after {happened:?} at {}", self.1);
    }

    /// Moves on to the next due time, which must be `at`.
    fn tick(&mut self, at: Millis, want: &[Action]) {
        assert_eq!(self.0.next_due(), Some(at));
        self.1 = at;
        self.on(Happened::Tick, want);
    }

    fn states(&self) -> Vec<String> {
        self.0.statuses().into_iter().map(|s| s.state).collect()
    }
}

#[test]
fn nothing_starts_before_the_pod_is_ready() {
    let mut w = World::new(vec![plan("a"), plan("b")], RestartPolicy::Always);
    w.on(Happened::Tick, &[]);
    assert_eq!(
        (w.0.next_due(), w.0.phase(), w.states()[0].as_str()),
        (None, Phase::Pending, "ContainerCreating")
    );
    w.on(Happened::Ready, &[Action::Start(run(0, 0)), Action::Start(run(1, 0))]);
    assert!(!w.0.is_ready());
    w.on(Happened::Started(run(0, 0)), &[]);
    w.on(Happened::Started(run(1, 0)), &[]);
    assert!(w.0.is_ready());
    assert_eq!((w.0.phase(), w.0.next_due()), (Phase::Running, None));
}

#[test]
fn restarts_pause_longer_each_time() {
    let mut w = World::new(vec![plan("a")], RestartPolicy::Always);
    w.on(Happened::Ready, &[Action::Start(run(0, 0))]);
    let mut at = 0;
    for (attempt, pause) in
        [500, 1000, 2000, 4000, 8000, 16_000, 32_000, 60_000, 60_000].into_iter().enumerate()
    {
        let attempt = u32::try_from(attempt).unwrap();
        w.on(Happened::Started(run(0, attempt)), &[]);
        w.on(Happened::Exited(run(0, attempt), 1), &[]);
        assert_eq!(w.states(), ["CrashLoopBackOff"]);
        // An old event changes nothing.
        w.on(Happened::Exited(run(0, attempt), 1), &[]);
        at += pause;
        w.tick(at, &[Action::Start(run(0, attempt + 1))]);
    }
    // A long run forgives.
    w.on(Happened::Started(run(0, 9)), &[]);
    w.1 += FORGIVEN_AFTER;
    w.on(Happened::Exited(run(0, 9), 0), &[]);
    assert_eq!(w.0.next_due(), Some(w.1 + FIRST_PAUSE));
    assert_eq!(w.0.statuses()[0].restarts, 10);
}

#[test]
fn what_cannot_start_is_tried_again() {
    let mut w = World::new(vec![plan("a")], RestartPolicy::Always);
    w.on(Happened::Ready, &[Action::Start(run(0, 0))]);
    w.on(Happened::NotStarted(run(0, 0), "no such file".into()), &[]);
    w.on(Happened::Exited(run(0, 0), 128), &[]);
    let status = &w.0.statuses()[0];
    assert_eq!(
        (status.state.as_str(), status.message.as_str()),
        ("CrashLoopBackOff", "no such file")
    );
    w.tick(500, &[Action::Start(run(0, 1))]);
}

#[test]
fn restart_policies() {
    let check = |policy, code, again: bool, phase| {
        let mut w = World::new(vec![plan("a")], policy);
        w.on(Happened::Ready, &[Action::Start(run(0, 0))]);
        w.on(Happened::Started(run(0, 0)), &[]);
        w.on(Happened::Exited(run(0, 0), code), &[]);
        assert_eq!((w.0.next_due().is_some(), w.0.phase()), (again, phase), "{policy:?} {code}");
        assert!(!w.0.is_ready());
    };
    check(RestartPolicy::Always, 0, true, Phase::Running);
    check(RestartPolicy::Always, 1, true, Phase::Running);
    check(RestartPolicy::OnFailure, 0, false, Phase::Succeeded);
    check(RestartPolicy::OnFailure, 1, true, Phase::Running);
    check(RestartPolicy::Never, 0, false, Phase::Succeeded);
    check(RestartPolicy::Never, 137, false, Phase::Failed);
}

#[test]
fn init_containers_go_first_and_in_order() {
    let init = |name: &str, sidecar| ContainerPlan { init: true, sidecar, ..plan(name) };
    let mut w = World::new(
        vec![init("i", false), init("s", true), init("j", false), plan("m")],
        RestartPolicy::Always,
    );
    w.on(Happened::Ready, &[Action::Start(run(0, 0))]);
    w.on(Happened::Started(run(0, 0)), &[]);
    // A failed one is tried again.
    w.on(Happened::Exited(run(0, 0), 1), &[]);
    w.tick(500, &[Action::Start(run(0, 1))]);
    w.on(Happened::Started(run(0, 1)), &[]);
    w.on(Happened::Exited(run(0, 1), 0), &[Action::Start(run(1, 0))]);
    // The sidecar runs on, the next starts beside it.
    w.on(Happened::Started(run(1, 0)), &[Action::Start(run(2, 0))]);
    w.on(Happened::Started(run(2, 0)), &[]);
    assert_eq!(w.0.phase(), Phase::Pending);
    w.on(Happened::Exited(run(2, 0), 0), &[Action::Start(run(3, 0))]);
    w.on(Happened::Started(run(3, 0)), &[]);
    assert!(w.0.is_ready());
    assert_eq!(w.states(), ["Completed", "Running", "Completed", "Running"]);
    // A sidecar that ends is started again, and the pod is not ready meanwhile.
    w.on(Happened::Exited(run(1, 0), 0), &[]);
    assert!(!w.0.is_ready());
    w.tick(1000, &[Action::Start(run(1, 1))]);
}

#[test]
fn a_failed_init_container_of_a_pod_that_is_never_restarted() {
    let mut w = World::new(
        vec![ContainerPlan { init: true, ..plan("i") }, plan("m")],
        RestartPolicy::Never,
    );
    w.on(Happened::Ready, &[Action::Start(run(0, 0))]);
    w.on(Happened::Started(run(0, 0)), &[]);
    w.on(Happened::Exited(run(0, 0), 3), &[]);
    assert_eq!((w.0.phase(), w.0.next_due()), (Phase::Failed, None));
}

#[test]
fn readiness() {
    let mut w =
        World::new(vec![ContainerPlan { readiness: probe(2), ..plan("a") }], RestartPolicy::Always);
    let asked = Action::Probe(run(0, 0), ProbeKind::Readiness);
    let answer = |good: bool| {
        let result = if good { Ok(()) } else { Err("refused".to_owned()) };
        Happened::Probed(run(0, 0), ProbeKind::Readiness, result)
    };
    w.on(Happened::Ready, &[Action::Start(run(0, 0))]);
    w.on(Happened::Started(run(0, 0)), std::slice::from_ref(&asked));
    // One at a time.
    w.on(Happened::Tick, &[]);
    assert!(!w.0.is_ready());
    w.on(answer(true), &[]);
    assert!(w.0.is_ready());
    w.tick(1000, std::slice::from_ref(&asked));
    w.on(answer(false), &[]);
    assert!(w.0.is_ready(), "one failure of two");
    w.tick(2000, std::slice::from_ref(&asked));
    w.on(answer(false), &[]);
    assert!(!w.0.is_ready());
    assert!(w.0.statuses()[0].message.contains("refused"));
    w.tick(3000, &[asked]);
    w.on(answer(true), &[]);
    assert!(w.0.is_ready());
    assert_eq!(w.0.statuses()[0].message, "");
}

#[test]
fn liveness_ends_and_startup_holds_back() {
    let startup = probe(3);
    let mut w = World::new(
        vec![ContainerPlan { startup, liveness: probe(1), ..plan("a") }],
        RestartPolicy::Always,
    );
    let fail = |kind| Happened::Probed(run(0, 0), kind, Err("dead".to_owned()));
    w.on(Happened::Ready, &[Action::Start(run(0, 0))]);
    w.on(Happened::Started(run(0, 0)), &[Action::Probe(run(0, 0), ProbeKind::Startup)]);
    w.on(fail(ProbeKind::Startup), &[]);
    assert!(!w.0.is_ready());
    w.tick(1000, &[Action::Probe(run(0, 0), ProbeKind::Startup)]);
    w.on(
        Happened::Probed(run(0, 0), ProbeKind::Startup, Ok(())),
        &[Action::Probe(run(0, 0), ProbeKind::Liveness)],
    );
    assert!(w.0.is_ready());
    w.on(fail(ProbeKind::Liveness), &[Action::End(run(0, 0))]);
    // Asked once; the reason stays until the next run.
    w.on(Happened::Tick, &[]);
    w.on(Happened::Exited(run(0, 0), 137), &[]);
    assert_eq!(w.0.statuses()[0].message, "liveness probe failed: dead");
    w.tick(1500, &[Action::Start(run(0, 1))]);
    // An answer for the run before counts for nothing.
    w.on(Happened::Started(run(0, 1)), &[Action::Probe(run(0, 1), ProbeKind::Startup)]);
    w.on(fail(ProbeKind::Liveness), &[]);
}

#[test]
fn stopping_ends_what_runs_and_starts_nothing() {
    let mut w = World::new(vec![plan("a"), plan("b")], RestartPolicy::Always);
    w.on(Happened::Ready, &[Action::Start(run(0, 0)), Action::Start(run(1, 0))]);
    w.on(Happened::Started(run(0, 0)), &[]);
    w.on(Happened::Started(run(1, 0)), &[]);
    w.on(Happened::Exited(run(1, 0), 1), &[]);
    assert_eq!(w.0.stop(), [Action::End(run(0, 0))]);
    assert_eq!(w.0.stop(), []);
    assert_eq!((w.0.next_due(), w.0.is_idle()), (None, false));
    w.on(Happened::Exited(run(0, 0), 143), &[]);
    assert!(w.0.is_idle());
    // One that was being started when the stop came is still waited for.
    let mut w = World::new(vec![plan("a")], RestartPolicy::Always);
    w.on(Happened::Ready, &[Action::Start(run(0, 0))]);
    assert_eq!(w.0.stop(), [Action::End(run(0, 0))]);
    assert!(!w.0.is_idle());
    w.on(Happened::NotStarted(run(0, 0), "no".into()), &[]);
    assert!(w.0.is_idle());
}

#[test]
fn a_container_that_cannot_be_run_does_not_hold_the_others() {
    let problem = Problem { reason: "ImageUnknown".into(), message: "give it a command".into() };
    let mut w = World::new(
        vec![ContainerPlan { process: Err(problem), ..plan("a") }, plan("b")],
        RestartPolicy::Always,
    );
    w.on(Happened::Ready, &[Action::Start(run(1, 0))]);
    w.on(Happened::Started(run(1, 0)), &[]);
    assert_eq!(w.states(), ["ImageUnknown", "Running"]);
    assert_eq!((w.0.is_ready(), w.0.next_due()), (false, None));
}
