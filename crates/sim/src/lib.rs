//! A small mesh in one thread: three nodes, two control planes, a few pods, and a scheduler that decides from a
//! seed what happens when. The decisions are those of the real programs (`compile`, `xds`, `engine`); time,
//! network, disk, CA and applications are made up, and go wrong: messages are late, lost and overtake each
//! other, links are cut, processes die, drain and come back, machines reboot, clocks jump, control planes start
//! with old knowledge, the CA fails, addresses and names are used again.
//!
//! Invariants: behind the purity wall, so that a seed says everything ([`run`] with the same seed takes the same steps);
//! what must hold is judged from what users wrote ([`Violation`]), never by the decision that is checked;
//! a [`Bug`] is planted only by a test that wants to see it found.

mod arrival;
mod check;
mod content;
mod control;
mod discovery;
mod faults;
mod oracle;
mod proxy;
mod rng;
mod traffic;
mod world;

pub use check::Violation;

/// How a run is made.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// A bug to plant.
    pub bug: Option<Bug>,
    /// Whether each step is put into words.
    pub trace: bool,
    /// Kinds of faults that are left out, as the sum of their [`Fault::bit`]s.
    pub without: u32,
}

/// Kinds of misfortune.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A proxy dies, and is started again.
    Kill,
    /// A proxy is replaced by another that starts beside it.
    Replace,
    CutNodes,
    CutReplica,
    /// A control plane ends; the next one may know less.
    StopReplica,
    BreakCa,
    Clock,
    /// A machine starts anew, without what was in memory.
    Reboot,
    /// Messages that take seconds.
    Late,
    Lost,
    /// A response that a control plane believes to have arrived.
    Missed,
}

impl Fault {
    pub const ALL: [Self; 11] = [
        Self::Kill,
        Self::Replace,
        Self::CutNodes,
        Self::CutReplica,
        Self::StopReplica,
        Self::BreakCa,
        Self::Clock,
        Self::Reboot,
        Self::Late,
        Self::Lost,
        Self::Missed,
    ];
    /// The first so many happen at a moment; the others befall messages.
    const PLANNED: usize = 8;

    /// For [`Options::without`].
    pub const fn bit(self) -> u32 {
        1 << self as u32
    }
}

/// Bugs as somebody might make them, at the places where the real programs act on a decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// An endpoint that cannot be reached by HBONE is tried in plaintext.
    FallsBackToPlaintext,
    /// A second endpoint is tried as it was planned, however long ago.
    KeepsThePlan,
    /// A plaintext caller is who has its address.
    TrustsAddresses,
    /// A policy in flight is taken for none.
    AllowsPending,
    /// A new configuration is for new connections only.
    NeverJudgesAgain,
    /// What changes while an application is called is not seen by its connection.
    ForgetsTheGap,
    /// A response is acknowledged and not all of it in force.
    AcksUnread,
    /// What an earlier stream had on its way is taken in.
    OldStream,
    /// Streams that ended are still counted.
    LeaksStreams,
    /// Idle tunnels are never looked at.
    NeverSweeps,
    /// Pods with one name share tunnels.
    PoolsByName,
    /// A request to the CA that failed stays under way.
    ForgetsFailures,
    /// A certificate is used for as long as it is there.
    UsesExpired,
    /// A drain has no limit.
    DrainsForever,
}

impl Bug {
    pub const ALL: [Self; 14] = [
        Self::FallsBackToPlaintext,
        Self::KeepsThePlan,
        Self::TrustsAddresses,
        Self::AllowsPending,
        Self::NeverJudgesAgain,
        Self::ForgetsTheGap,
        Self::AcksUnread,
        Self::OldStream,
        Self::LeaksStreams,
        Self::NeverSweeps,
        Self::PoolsByName,
        Self::ForgetsFailures,
        Self::UsesExpired,
        Self::DrainsForever,
    ];
}

/// What happened in a run, to see that runs are worth something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Contents that users wrote, and versions that proxies acknowledged.
    pub contents: u64,
    pub acks: u64,
    pub calls: u64,
    /// Connections made; let in by a proxy; let in while the proxy held exactly one content.
    pub made: u64,
    pub admitted: u64,
    pub exact: u64,
    pub denied: u64,
    /// Waits for a policy in flight.
    pub pending: u64,
    /// Ended by a change of policy.
    pub ended: u64,
    pub probes: u64,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// `None`: everything held.
    pub violation: Option<Violation>,
    pub steps: u64,
    /// Of all that happened: equal runs have equal ones.
    pub fingerprint: u64,
    /// Empty unless asked for.
    pub trace: Vec<String>,
    pub counts: Counts,
}

/// Runs one world.
pub fn run(seed: u64, options: Options) -> Outcome {
    let mut sim = world::Sim::new(seed, options);
    sim.run();
    let world::Sim { violation, steps, fingerprint, trace, counts, .. } = sim;
    Outcome { violation, steps, fingerprint, trace, counts }
}
