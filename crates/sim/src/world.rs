//! The made-up world and its scheduler: what is planned, in the order of its time, and nothing else happens.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

use engine::Rotation;
use model::Identity;

use crate::arrival::Conn;
use crate::check::Violation;
use crate::content::{Content, NODES};
use crate::control::{Compilation, Compiled, Replica};
use crate::discovery::{End, Stream};
use crate::proxy::{Disk, Proxy, Secrets};
use crate::rng::Rng;
use crate::traffic::Call;
use crate::{Bug, Fault, Options};

pub(crate) const REPLICAS: usize = 2;
/// The wall clock's second at the beginning: far from 0, as clocks are.
pub(crate) const EPOCH: u64 = 1_700_000_000;
/// What may happen in one run: some hundred times as much as does.
const MAX_EVENTS: u64 = 200_000;

/// Milliseconds since the beginning.
pub(crate) type Time = u64;

/// Something that is going to happen.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// Somebody changes the mesh.
    Change,
    /// A control plane hears of it.
    Learn {
        replica: usize,
        content: usize,
    },
    /// The next message of a stream arrives at this end.
    Deliver {
        stream: usize,
        end: End,
    },
    /// This end notices that the stream is over.
    Break {
        stream: usize,
        end: End,
    },
    /// A proxy tries to open a stream.
    Connect {
        proxy: usize,
    },
    CaRequest {
        proxy: usize,
        identity: Identity,
    },
    CaAnswer {
        proxy: usize,
        identity: Identity,
        dates: Result<Rotation, &'static str>,
    },
    /// A proxy looks at its certificates.
    Look {
        proxy: usize,
        look: u64,
    },
    Save {
        proxy: usize,
    },
    Sweep {
        proxy: usize,
    },
    /// Some pod calls another.
    Call,
    /// The call's handshake arrives.
    Dial {
        call: usize,
    },
    Dialled {
        call: usize,
        result: Result<(), &'static str>,
    },
    /// The call arrives at its destination, in a tunnel or in plaintext.
    Arrive {
        call: usize,
    },
    /// A policy in flight is not waited for any longer.
    Waited {
        call: usize,
    },
    /// The application answers its proxy.
    Serve {
        call: usize,
    },
    Answer {
        call: usize,
        yes: bool,
    },
    /// A tunnel does not answer.
    Doubt {
        call: usize,
    },
    /// An application closes.
    Close {
        conn: usize,
    },
    /// The node agent hands a pod over, or takes it back.
    Enrol {
        born: u32,
    },
    Leave {
        node: usize,
        born: u32,
    },
    Fault,
    Start {
        node: usize,
    },
    DrainLook {
        proxy: usize,
    },
    ReplicaUp {
        replica: usize,
    },
    ClockBack {
        node: usize,
        by: i64,
    },
    SignAgain {
        replica: usize,
    },
    /// Faults are over.
    Quiet,
    /// Everything must have settled.
    Probe,
}

/// An end of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Place {
    Node(usize),
    Replica(usize),
}

#[derive(Debug)]
struct Planned {
    at: Time,
    number: u64,
    event: Event,
}

impl PartialEq for Planned {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.number) == (other.at, other.number)
    }
}
impl Eq for Planned {}
impl PartialOrd for Planned {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Planned {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

/// A machine.
#[derive(Debug, Default)]
pub(crate) struct Machine {
    pub(crate) disk: Disk,
    pub(crate) secrets: Secrets,
    /// Seconds by which its wall clock is wrong.
    pub(crate) clock: i64,
    /// Its proxy that takes connections.
    pub(crate) proxy: Option<usize>,
}

/// See the module.
pub(crate) struct Sim {
    pub(crate) options: Options,
    pub(crate) rng: Rng,
    pub(crate) now: Time,
    queue: BinaryHeap<Reverse<Planned>>,
    planned: u64,
    pub(crate) steps: u64,
    pub(crate) born: u32,
    /// Everything that users ever wrote: first nothing, and the last is what they want.
    pub(crate) contents: Vec<Compiled>,
    pub(crate) compilation: Compilation,
    /// Which content a push is of.
    pub(crate) pushes: BTreeMap<String, usize>,
    pub(crate) replicas: Vec<Replica>,
    pub(crate) epochs: u64,
    pub(crate) machines: Vec<Machine>,
    pub(crate) proxies: Vec<Proxy>,
    pub(crate) streams: BTreeMap<usize, Stream>,
    pub(crate) next_id: usize,
    pub(crate) calls: BTreeMap<usize, Call>,
    pub(crate) conns: BTreeMap<usize, Conn>,
    /// Pods whose traffic goes through their node's proxy, by when they were born.
    pub(crate) captured: BTreeSet<u32>,
    /// Links that carry nothing until then.
    pub(crate) cuts: BTreeMap<(Place, Place), Time>,
    /// Lifetime of certificates, seconds.
    pub(crate) life: u64,
    pub(crate) quiet: bool,
    pub(crate) done: bool,
    pub(crate) probing: bool,
    /// At what has not settled.
    pub(crate) looks: u32,
    pub(crate) violation: Option<Violation>,
    pub(crate) trace: Vec<String>,
    pub(crate) fingerprint: u64,
    pub(crate) counts: crate::Counts,
}

impl Sim {
    pub(crate) fn new(seed: u64, options: Options) -> Self {
        let mut rng = Rng::new(seed);
        let mut born = 0;
        let mut compilation = Compilation::default();
        let empty = Compiled::new(Content::default(), &mut compilation);
        let first = Compiled::new(Content::first(&mut rng, &mut born), &mut compilation);
        let life = rng.between(120, 1800);
        let mut sim = Self {
            options,
            rng,
            now: 0,
            queue: BinaryHeap::new(),
            planned: 0,
            steps: 0,
            born,
            contents: vec![empty, first],
            compilation,
            pushes: BTreeMap::new(),
            replicas: Vec::new(),
            epochs: 0,
            machines: (0..NODES).map(|_| Machine::default()).collect(),
            proxies: Vec::new(),
            streams: BTreeMap::new(),
            next_id: 0,
            calls: BTreeMap::new(),
            conns: BTreeMap::new(),
            captured: BTreeSet::new(),
            cuts: BTreeMap::new(),
            life,
            quiet: false,
            done: false,
            probing: false,
            looks: 0,
            violation: None,
            trace: Vec::new(),
            fingerprint: 0,
            counts: crate::Counts::default(),
        };
        sim.begin();
        sim
    }

    fn begin(&mut self) {
        for _ in 0..REPLICAS {
            let replica = self.new_replica(1);
            self.replicas.push(replica);
        }
        for node in 0..NODES {
            self.start_proxy(node);
        }
        let pods: Vec<_> = self.content().pods.iter().flatten().cloned().collect();
        for pod in pods.iter().filter(|pod| pod.enrolled) {
            self.plan(10, Event::Enrol { born: pod.born });
        }
        let quiet = self.rng.between(20_000, 120_000);
        self.plan(quiet, Event::Quiet);
        self.plan(3_000, Event::Change);
        self.plan(5_000, Event::Fault);
        self.plan(1_000, Event::Call);
    }

    /// Runs to the end, or to the first violation.
    pub(crate) fn run(&mut self) {
        while let Some(Reverse(Planned { at, event, .. })) = self.queue.pop() {
            self.now = at;
            self.steps += 1;
            self.mix_in(at);
            self.happen(event);
            if self.violation.is_none() {
                self.check_bounds();
            }
            if self.steps > MAX_EVENTS {
                self.violate(Violation::Unbounded, || "events without end".to_owned());
            }
            if self.violation.is_some() || self.done {
                return;
            }
        }
    }

    /// What users want now.
    pub(crate) fn content(&self) -> &Content {
        &self.newest().content
    }

    #[expect(clippy::expect_used, reason = "there is one from the beginning")]
    pub(crate) fn newest(&self) -> &Compiled {
        self.contents.last().expect("a first content")
    }

    /// Something is going to happen in so many milliseconds.
    pub(crate) fn plan(&mut self, within: Time, event: Event) {
        self.plan_at(self.now + within, event);
    }

    pub(crate) fn plan_at(&mut self, at: Time, event: Event) {
        self.planned += 1;
        self.queue.push(Reverse(Planned { at: at.max(self.now), number: self.planned, event }));
    }

    pub(crate) fn queued(&self) -> usize {
        self.queue.len()
    }

    /// How long a message takes: mostly little, sometimes long, so that others overtake it.
    pub(crate) fn latency(&mut self) -> Time {
        if self.rng.chance(5) && !self.spared(Fault::Late) {
            self.rng.between(100, 4_000)
        } else {
            self.rng.between(1, 20)
        }
    }

    /// Whether a message is lost on its way.
    pub(crate) fn lost(&mut self) -> bool {
        self.rng.chance(5) && !self.spared(Fault::Lost)
    }

    /// Until when nothing passes between two places.
    pub(crate) fn cut_until(&self, a: Place, b: Place) -> Option<Time> {
        let until = *self.cuts.get(&(a.min(b), a.max(b)))?;
        (until > self.now).then_some(until)
    }

    /// The true second.
    pub(crate) fn true_wall(&self) -> u64 {
        EPOCH + self.now / 1000
    }

    /// The second by a node's clock.
    pub(crate) fn wall(&self, node: usize) -> u64 {
        self.true_wall().saturating_add_signed(self.machines[node].clock)
    }

    pub(crate) fn id(&mut self) -> usize {
        self.next_id += 1;
        self.next_id
    }

    pub(crate) fn has(&self, bug: Bug) -> bool {
        self.options.bug == Some(bug)
    }

    /// Notes a step: for a person if asked for, and always in the fingerprint.
    pub(crate) fn note(&mut self, number: u64, words: impl FnOnce() -> String) {
        self.mix_in(number);
        if self.options.trace {
            let (seconds, millis) = (self.now / 1000, self.now % 1000);
            self.trace.push(format!("{seconds:4}.{millis:03} {}", words()));
        }
    }

    pub(crate) fn violate(&mut self, violation: Violation, words: impl FnOnce() -> String) {
        if self.violation.is_none() {
            self.violation = Some(violation);
            let text = words();
            self.note(violation as u64, || format!("VIOLATION {violation:?}: {text}"));
        }
    }

    fn mix_in(&mut self, number: u64) {
        self.fingerprint =
            (self.fingerprint ^ number).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(17);
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Change => self.change(),
            Event::Learn { replica, content } => self.learn(replica, content),
            Event::Deliver { stream, end } => self.deliver(stream, end),
            Event::Break { stream, end } => self.break_stream(stream, end),
            Event::Connect { proxy } => self.connect(proxy),
            Event::CaRequest { proxy, identity } => self.ca_request(proxy, identity),
            Event::CaAnswer { proxy, identity, dates } => self.ca_answer(proxy, &identity, dates),
            Event::Look { proxy, look } => {
                if self.proxies[proxy].look == look {
                    self.look(proxy);
                }
            }
            Event::Save { proxy } => self.save(proxy),
            Event::Sweep { proxy } => self.sweep(proxy),
            Event::Call => self.some_call(),
            Event::Dial { call } => self.dial_arrives(call),
            Event::Dialled { call, result } => self.dialled(call, result),
            Event::Arrive { call } => self.arrive(call),
            Event::Waited { call } => self.waited(call),
            Event::Serve { call } => self.serve(call),
            Event::Answer { call, yes } => self.answer(call, yes),
            Event::Doubt { call } => self.doubt(call),
            Event::Close { conn } => self.close(conn),
            Event::Enrol { born } => self.enrol(born),
            Event::Leave { node, born } => self.leave(node, born),
            Event::Fault => self.fault(),
            Event::Start { node } => self.start_again(node),
            Event::DrainLook { proxy } => self.drain_look(proxy),
            Event::ReplicaUp { replica } => self.replica_up(replica),
            Event::ClockBack { node, by } => self.set_clock(node, by),
            Event::SignAgain { replica } => self.replicas[replica].signs = true,
            Event::Quiet => self.all_quiet(),
            Event::Probe => self.settled(),
        }
    }
}
