//! What happens to the containers of one pod, decided without a clock: events in, actions out.
//!
//! Follows the kubelet: init containers in order, then the others together; restarts by `restartPolicy` with a growing
//! pause; startup probes hold the others back, failed liveness and startup probes end a container, readiness decides
//! whether the pod is an endpoint.
//!
//! Invariants: an event of an earlier run of a container (its `attempt`) changes nothing; after [`Lifecycle::stop`] nothing
//! is started any more; every container that was started is reported ended before [`Phase`] says so.

use serde::{Deserialize, Serialize};

use super::resolve::{ContainerPlan, ProbePlan, RestartPolicy};

/// Milliseconds on the caller's clock.
pub(crate) type Millis = u64;

/// The first pause before a restart. The kubelet begins with 10 s; a lab is watched by a person.
const FIRST_PAUSE: Millis = 500;
/// Pauses double up to this (kubelet: 5 min).
const LONGEST_PAUSE: Millis = 60_000;
/// A container that ran this long starts over with the first pause (kubelet: 10 min).
const FORGIVEN_AFTER: Millis = 60_000;

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Happened {
    /// The network is there, the pod is in the mesh if it should be: containers may start.
    Ready,
    /// The container's program runs.
    Started(Run),
    /// It could not be started.
    NotStarted(Run, String),
    /// Every process of the container is gone.
    Exited(Run, u8),
    /// A probe was answered.
    Probed(Run, ProbeKind, Result<(), String>),
    /// Time has passed.
    Tick,
}

/// One run of a container: its index and how often it was started before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Run {
    pub(crate) container: usize,
    pub(crate) attempt: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum ProbeKind {
    Startup,
    Readiness,
    Liveness,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Start(Run),
    Probe(Run, ProbeKind),
    /// Ask the container to end, and make it after the grace period.
    End(Run),
}

/// Where the pod as a whole is, in Kubernetes' words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Phase {
    Pending,
    Running,
    Succeeded,
    Failed,
}

/// What one container does, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerStatus {
    pub name: String,
    /// It prepares the pod and is through before the others start.
    pub init: bool,
    /// `Running`, `Waiting`, `CrashLoopBackOff`, `Completed`, `ImageUnknown` and so on.
    pub state: String,
    /// Why; may be empty.
    pub message: String,
    pub ready: bool,
    pub restarts: u32,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Lifecycle {
    containers: Vec<Container>,
    policy: RestartPolicy,
    allowed: bool,
    stopping: bool,
}

#[derive(Debug)]
struct Container {
    plan: ContainerPlan,
    attempt: u32,
    state: State,
    pause: Millis,
    ready: bool,
    /// The startup probe has succeeded, or there is none.
    up: bool,
    probes: [Probing; 3],
    /// Why the last run ended.
    last: String,
    ending: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    /// Not started yet, or between two runs, not before this time.
    Waiting(Millis),
    Starting,
    Running(Millis),
    Done(u8),
}

#[derive(Clone, Debug, Default)]
struct Probing {
    due: Millis,
    under_way: bool,
    good: u32,
    bad: u32,
}

impl Lifecycle {
    /// Containers in the order of the plan: those for initialisation first.
    pub(crate) fn new(plans: Vec<ContainerPlan>, policy: RestartPolicy) -> Self {
        let containers = plans.into_iter().map(Container::new).collect();
        Self { containers, policy, allowed: false, stopping: false }
    }

    /// Takes what happened and says what to do now.
    pub(crate) fn handle(&mut self, now: Millis, happened: Happened) -> Vec<Action> {
        let mut actions = vec![];
        match happened {
            Happened::Ready => self.allowed = true,
            Happened::Started(run) => {
                if let Some(c) = self.current(run) {
                    c.started(now);
                }
            }
            Happened::NotStarted(run, why) => self.ended(now, run, super::run::START_FAILED, why),
            Happened::Exited(run, code) => self.ended(now, run, code, exit_text(code)),
            Happened::Probed(run, kind, result) => {
                if let Some(c) = self.current(run)
                    && c.probed(now, kind, result)
                {
                    c.ending = true;
                    actions.push(Action::End(run));
                }
            }
            Happened::Tick => {}
        }
        self.start_due(now, &mut actions);
        self.probe_due(now, &mut actions);
        actions
    }

    /// Ends all containers for good.
    pub(crate) fn stop(&mut self) -> Vec<Action> {
        self.stopping = true;
        let mut actions = vec![];
        for (i, c) in self.containers.iter_mut().enumerate() {
            c.ready = false;
            if matches!(c.state, State::Starting | State::Running(_)) && !c.ending {
                c.ending = true;
                actions.push(Action::End(Run { container: i, attempt: c.attempt }));
            }
        }
        actions
    }

    /// When to call with [`Happened::Tick`], unless something happens before.
    pub(crate) fn next_due(&self) -> Option<Millis> {
        if !self.allowed || self.stopping {
            return None;
        }
        let starts = self.startable().filter_map(|i| match self.containers[i].state {
            State::Waiting(until) if self.containers[i].plan.process.is_ok() => Some(until),
            _ => None,
        });
        starts.chain(self.containers.iter().flat_map(Container::probes_due)).min()
    }

    /// Whether no process of the pod is left.
    pub(crate) fn is_idle(&self) -> bool {
        self.containers.iter().all(|c| matches!(c.state, State::Waiting(_) | State::Done(_)))
    }

    pub(crate) fn phase(&self) -> Phase {
        let main = || self.containers.iter().filter(|c| !c.plan.init);
        let begun =
            self.allowed && main().any(|c| c.attempt > 0 || !matches!(c.state, State::Waiting(_)));
        let failed_init = self
            .containers
            .iter()
            .any(|c| c.plan.init && matches!(c.state, State::Done(n) if n != 0));
        if failed_init {
            return Phase::Failed;
        }
        if main().all(|c| matches!(c.state, State::Done(_))) {
            let clean = main().all(|c| c.state == State::Done(0));
            return if clean { Phase::Succeeded } else { Phase::Failed };
        }
        if begun { Phase::Running } else { Phase::Pending }
    }

    /// Whether the pod takes traffic.
    pub(crate) fn is_ready(&self) -> bool {
        let serving = |c: &&Container| !c.plan.init || c.plan.sidecar;
        !self.stopping && self.containers.iter().filter(serving).all(|c| c.ready)
    }

    pub(crate) fn statuses(&self) -> Vec<ContainerStatus> {
        self.containers.iter().map(|c| c.status(self.allowed)).collect()
    }

    fn current(&mut self, run: Run) -> Option<&mut Container> {
        self.containers.get_mut(run.container).filter(|c| c.attempt == run.attempt)
    }

    fn ended(&mut self, now: Millis, run: Run, code: u8, why: String) {
        let (policy, stopping) = (self.policy, self.stopping);
        let Some(c) = self.current(run) else { return };
        if matches!(c.state, State::Waiting(_) | State::Done(_)) {
            return;
        }
        if matches!(c.state, State::Running(since) if now.saturating_sub(since) >= FORGIVEN_AFTER) {
            c.pause = FIRST_PAUSE;
        }
        // What ended it counts more than how: a probe's complaint stays.
        if !c.ending || c.last.is_empty() {
            c.last = why;
        }
        (c.ready, c.up, c.ending) = (false, false, false);
        let again = match policy {
            _ if stopping => false,
            _ if c.plan.sidecar => true,
            RestartPolicy::Always => !c.plan.init || code != 0,
            RestartPolicy::OnFailure => code != 0,
            RestartPolicy::Never => false,
        };
        if again {
            c.state = State::Waiting(now + c.pause);
            c.attempt += 1;
            c.pause = (c.pause * 2).min(LONGEST_PAUSE);
        } else {
            c.state = State::Done(code);
        }
    }

    /// The containers whose turn it is: init containers one after the other, then the rest.
    fn startable(&self) -> impl Iterator<Item = usize> + '_ {
        let through = |c: &Container| if c.plan.sidecar { c.up } else { c.state == State::Done(0) };
        let first_open = self.containers.iter().position(|c| c.plan.init && !through(c));
        (0..self.containers.len()).filter(move |&i| {
            let c = &self.containers[i];
            // A sidecar that was passed once is restarted whenever it ends.
            let earlier_sidecar = c.plan.sidecar && c.attempt > 0;
            first_open.is_none_or(|open| i == open || (i < open && earlier_sidecar))
        })
    }

    fn start_due(&mut self, now: Millis, actions: &mut Vec<Action>) {
        if !self.allowed || self.stopping {
            return;
        }
        let due: Vec<usize> = self.startable().collect();
        for i in due {
            let c = &mut self.containers[i];
            if matches!(c.state, State::Waiting(until) if until <= now) && c.plan.process.is_ok() {
                c.state = State::Starting;
                actions.push(Action::Start(Run { container: i, attempt: c.attempt }));
            }
        }
    }

    fn probe_due(&mut self, now: Millis, actions: &mut Vec<Action>) {
        if self.stopping {
            return;
        }
        for (i, c) in self.containers.iter_mut().enumerate() {
            let run = Run { container: i, attempt: c.attempt };
            for kind in [ProbeKind::Startup, ProbeKind::Readiness, ProbeKind::Liveness] {
                if c.asks(kind)
                    && !c.probes[kind as usize].under_way
                    && c.probes[kind as usize].due <= now
                {
                    c.probes[kind as usize].under_way = true;
                    actions.push(Action::Probe(run, kind));
                }
            }
        }
    }
}

impl Container {
    fn new(plan: ContainerPlan) -> Self {
        Self {
            plan,
            attempt: 0,
            state: State::Waiting(0),
            pause: FIRST_PAUSE,
            ready: false,
            up: false,
            probes: Default::default(),
            last: String::new(),
            ending: false,
        }
    }

    fn probe(&self, kind: ProbeKind) -> Option<&ProbePlan> {
        match kind {
            ProbeKind::Startup => self.plan.startup.as_ref(),
            ProbeKind::Readiness => self.plan.readiness.as_ref(),
            ProbeKind::Liveness => self.plan.liveness.as_ref(),
        }
    }

    /// Whether this probe is to be made now and then.
    fn asks(&self, kind: ProbeKind) -> bool {
        let turn = if kind == ProbeKind::Startup { !self.up } else { self.up };
        turn && !self.ending
            && matches!(self.state, State::Running(_))
            && self.probe(kind).is_some()
    }

    fn probes_due(&self) -> impl Iterator<Item = Millis> + '_ {
        let kinds = [ProbeKind::Startup, ProbeKind::Readiness, ProbeKind::Liveness];
        let waiting = move |k: &ProbeKind| self.asks(*k) && !self.probes[*k as usize].under_way;
        kinds.into_iter().filter(waiting).map(|k| self.probes[k as usize].due)
    }

    fn started(&mut self, now: Millis) {
        self.state = State::Running(now);
        self.last.clear();
        let due = |p: Option<&ProbePlan>| p.map_or(0, |p| now + p.initial_delay);
        self.probes = [ProbeKind::Startup, ProbeKind::Readiness, ProbeKind::Liveness]
            .map(|k| Probing { due: due(self.probe(k)), ..Probing::default() });
        self.up = self.plan.startup.is_none();
        self.ready = self.up && self.plan.readiness.is_none();
    }

    /// Counts an answer. True: the container must be ended.
    fn probed(&mut self, now: Millis, kind: ProbeKind, result: Result<(), String>) -> bool {
        let Some(plan) = self.probe(kind) else { return false };
        let (period, success, failure) = (plan.period, plan.success, plan.failure);
        let p = &mut self.probes[kind as usize];
        (p.under_way, p.due) = (false, now + period);
        if !matches!(self.state, State::Running(_)) || self.ending {
            return false;
        }
        match result {
            Ok(()) => {
                (p.good, p.bad) = (p.good + 1, 0);
                if p.good < success {
                    return false;
                }
                match kind {
                    ProbeKind::Startup => {
                        (self.up, self.ready) = (true, self.plan.readiness.is_none())
                    }
                    ProbeKind::Readiness => (self.ready, self.last) = (true, String::new()),
                    ProbeKind::Liveness => {}
                }
                false
            }
            Err(why) => {
                (p.good, p.bad) = (0, p.bad + 1);
                if p.bad < failure {
                    return false;
                }
                p.bad = 0;
                let name = match kind {
                    ProbeKind::Startup => "startup",
                    ProbeKind::Readiness => "readiness",
                    ProbeKind::Liveness => "liveness",
                };
                self.last = format!("{name} probe failed: {why}");
                self.ready = false;
                kind != ProbeKind::Readiness
            }
        }
    }

    fn status(&self, allowed: bool) -> ContainerStatus {
        let (state, message) = match (&self.plan.process, &self.state) {
            (Err(problem), _) => (problem.reason.clone(), problem.message.clone()),
            (_, State::Waiting(_)) if self.attempt > 0 => {
                ("CrashLoopBackOff".to_owned(), self.last.clone())
            }
            (_, State::Waiting(_)) if !allowed => ("ContainerCreating".to_owned(), String::new()),
            (_, State::Waiting(_)) => ("PodInitializing".to_owned(), String::new()),
            (_, State::Starting) => ("ContainerCreating".to_owned(), self.last.clone()),
            (_, State::Running(_)) => ("Running".to_owned(), self.last.clone()),
            (_, State::Done(0)) => ("Completed".to_owned(), String::new()),
            (_, State::Done(_)) => ("Error".to_owned(), self.last.clone()),
        };
        ContainerStatus {
            name: self.plan.name.clone(),
            init: self.plan.init && !self.plan.sidecar,
            state,
            message,
            ready: self.ready,
            restarts: self.attempt,
        }
    }
}

fn exit_text(code: u8) -> String {
    match code {
        0 => "exited".to_owned(),
        137 => "killed (exit status 137)".to_owned(),
        n if n > 128 => format!("ended by signal {} (exit status {n})", n - 128),
        n => format!("exit status {n}"),
    }
}

#[cfg(test)]
#[path = "lifecycle/tests.rs"]
mod tests;
