//! The simulated world: three nodes with clocks that drift, a network that delays, loses and cuts, a record store that
//! forgets to answer. It runs the very `Target` and `Replica` that the data process runs.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use holdfast_storage_core::guards::Guards;
use holdfast_storage_core::ids::{Attachment, Lineage, NodeName, RecordVersion, ReplicaId, VolumeId};
use holdfast_storage_core::record::{VolumeParams, VolumeRecord};
use holdfast_storage_core::record_store::Versioned;
use holdfast_storage_core::replica::ReplicaMeta;
use holdfast_storage_core::target::CallId;
use holdfast_storage_core::transitions::{self, NewVolume};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::coverage::{Coverage, Scenario};
use crate::disk::Disk;
use crate::families::Chaos;
use crate::groups::Outbox;
use crate::history::History;
use crate::operator::{Operator, Task};
use crate::removals::Removals;
use crate::replica_host::{Process, ToReplica};
use crate::rescues::copy_of;
use crate::rot::Losses;
use crate::snapshots::Snapshots;
use crate::store_host::Store;
use crate::stragglers::Straggler;
use crate::target_host::{TargetHost, ToTarget};
use crate::traps::{Deed, Step, Traps};

pub const REPLICAS: usize = 3;
/// The last one holds no replica: a target there reads from all of them.
pub const NODES: usize = 4;
/// Where the record store is, as far as cuts are concerned.
pub const STORE: usize = NODES;
pub const REGIONS: u64 = 4;
pub const VOLUME_BYTES: u64 = REGIONS << 20;

/// A number per start of a target, across the run.
pub type TargetNumber = u64;

#[derive(Debug)]
pub enum Event {
    AtReplica {
        node: usize,
        message: ToReplica,
        /// In the order of sending.
        number: u64,
    },
    AtTarget {
        target: TargetNumber,
        message: ToTarget,
    },
    DiskDone {
        node: usize,
        process: u64,
        id: u64,
    },
    ConnectionsClosed {
        node: usize,
        process: u64,
        token: u128,
    },
    ReplicaTick {
        node: usize,
        process: u64,
    },
    TargetTick {
        target: TargetNumber,
        /// What the clock must show.
        at_ms: u64,
    },
    ResumeTarget {
        target: TargetNumber,
    },
    ResumeReplica {
        node: usize,
    },
    /// A node's clocks go on.
    ResumeClock {
        node: usize,
    },
    AtStore {
        target: TargetNumber,
        call: CallId,
        swap: Option<(RecordVersion, Box<VolumeRecord>)>,
        answer: bool,
    },
    /// The store may be up again.
    StoreUp,
    /// A trap has sprung.
    Deed {
        deed: Deed,
        step: Step,
        target: TargetNumber,
        node: Option<usize>,
    },
    Client {
        target: TargetNumber,
    },
    StartProcess {
        node: usize,
    },
    PowerOn {
        node: usize,
    },
    StartTarget {
        node: usize,
    },
    Controller,
    Operate(Task),
    Chaos,
    /// Somebody wants a snapshot, a clone or a larger volume.
    Snapshots,
    /// Somebody wants fewer replicas, or more.
    Resize,
    /// Death at a step of a job.
    StrikeJob {
        target: TargetNumber,
        node: Option<usize>,
    },
    /// Who was told that a write to another volume is done writes here.
    Follow,
}

#[derive(Debug)]
pub struct Node {
    pub powered: bool,
    pub disk: Disk,
    pub process: Option<Process>,
    pub processes: u64,
    /// Parts per million by which its clock is fast.
    pub rate_ppm: i64,
    /// Microseconds for which its clocks stood still.
    pub stood_still_us: u64,
    /// Since when they stand still.
    pub stands_since: Option<u64>,
    pub paused_until: u64,
    pub paused_from: u64,
    pub deferred: VecDeque<Event>,
    pub slow_until: u64,
    pub hung_until: u64,
    pub layers_full_until: u64,
    /// Most reads fail.
    pub reads_fail_until: u64,
    pub off_since: u64,
    /// When its replica process died last.
    pub died_at: u64,
    /// The epoch when its power went, if it was in sync then.
    pub off_in_epoch: Option<u64>,
}

#[derive(Debug)]
pub struct World {
    /// Microseconds.
    pub now: u64,
    pub rng: StdRng,
    pub guards: Guards,
    queue: BTreeMap<(u64, u64), Event>,
    next_event: u64,
    pub nodes: Vec<Node>,
    pub store: Store,
    pub targets: BTreeMap<TargetNumber, TargetHost>,
    pub next_target: TargetNumber,
    /// The target that the attached client talks to.
    pub current: Option<TargetNumber>,
    /// A start of a target is on its way.
    pub starting: bool,
    pub cuts: BTreeMap<(usize, usize), u64>,
    pub history: History,
    pub snapshots: Snapshots,
    pub removals: Removals,
    pub chaos: Chaos,
    pub traps: Traps,
    pub straggler: Option<Straggler>,
    pub coverage: Coverage,
    pub losses: Losses,
    pub operator: Operator,
    /// The in-sync sets as they followed each other.
    pub sets: Vec<Vec<usize>>,
    /// Blocks whose last acknowledged change was a trim, and those of them that a power loss came over.
    pub trimmed: BTreeSet<u64>,
    pub trimmed_crashed: BTreeSet<u64>,
    /// The next message is late by this, in microseconds.
    pub late_by: u64,
    /// Messages to replicas, numbered, for telling which overtook which.
    pub next_message: u64,
    pub data_on_the_way: BTreeSet<(TargetNumber, usize, u64)>,
    pub client_load: bool,
    /// What another volume of the same group is to hear of.
    pub outbox: Outbox,
    pub trace: bool,
    /// Before each line of the trace.
    pub label: &'static str,
    /// With `trace`: every disk operation on this block is shown.
    pub watch: u64,
}

pub fn replica_id(node: usize) -> ReplicaId {
    ReplicaId(node as u128 + 1)
}

pub fn node_of(replica: ReplicaId) -> usize {
    // Those that replace an earlier one of the node have the same number in their last digit.
    usize::try_from((replica.0 - 1) % 16).expect("small")
}

pub fn node_name(node: usize) -> NodeName {
    NodeName(format!("n{node}"))
}

fn mk_record(rng: &mut StdRng) -> VolumeRecord {
    transitions::create(NewVolume {
        volume_id: VolumeId(77),
        name: "sim".to_owned(),
        lineage: Lineage(5),
        size_bytes: VOLUME_BYTES,
        epoch_nonce: rng.random(),
        replicas: (0..REPLICAS).map(|node| (replica_id(node), node_name(node))).collect(),
        params: VolumeParams::new(3, ""),
        encryption: None,
        source: None,
    })
}

impl World {
    pub fn new(seed: u64, guards: Guards, trace: bool) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let record = mk_record(&mut rng);
        let chaos = Chaos::of_seed(seed, &mut rng);
        let nodes = (0..NODES).map(|node| mk_node(node, &record, &chaos, &mut rng)).collect();
        let guards = Guards {
            log_cold_ms: chaos.log_cold_ms,
            log_clear_every_ms: chaos.log_clear_every_ms,
            log_regions_max: chaos.log_regions_max,
            ..guards
        };
        let store = Store {
            version: RecordVersion(1),
            record,
            down_until: 0,
            down_since: 0,
            flaky: chaos.store_flaky,
            stale: chaos.store_stale,
            before: None,
            unrelated: RecordVersion(0),
        };
        let mut world = Self {
            now: 1_000_000,
            rng,
            guards,
            queue: BTreeMap::new(),
            next_event: 0,
            nodes,
            store,
            targets: BTreeMap::new(),
            next_target: 0,
            current: None,
            starting: false,
            cuts: BTreeMap::new(),
            history: History::default(),
            snapshots: Snapshots::of_seed(seed),
            removals: Removals::of_seed(seed),
            chaos,
            traps: Traps::default(),
            straggler: None,
            coverage: Coverage::default(),
            losses: Losses::default(),
            operator: Operator::default(),
            sets: Vec::new(),
            trimmed: BTreeSet::new(),
            trimmed_crashed: BTreeSet::new(),
            late_by: 0,
            next_message: 0,
            data_on_the_way: BTreeSet::new(),
            client_load: true,
            outbox: Outbox::default(),
            trace,
            label: "",
            watch: std::env::var("HOLDFAST_SIM_BLOCK")
                .ok()
                .and_then(|block| block.parse().ok())
                .unwrap_or(u64::MAX),
        };
        for node in 0..REPLICAS {
            world.schedule(0, Event::StartProcess { node });
        }
        world.schedule(0, Event::Controller);
        world.note_set();
        world.schedule(400_000, Event::Snapshots);
        if world.removals.are_made() {
            world.schedule(500_000, Event::Resize);
        }
        world
    }

    /// The replica that a node has now.
    pub fn replica_at(&self, node: usize) -> ReplicaId {
        self.nodes[node].disk.meta.replica_id
    }

    pub fn is_in_sync(&self, node: usize) -> bool {
        node < REPLICAS && self.store.record.in_sync.contains(&self.replica_at(node))
    }

    pub fn saw(&mut self, scenario: Scenario) {
        self.coverage.saw(scenario);
    }

    pub fn log(&self, what: impl FnOnce() -> String) {
        if self.trace {
            eprintln!("{:>12.3} {}{}", self.now as f64 / 1000.0, self.label, what());
        }
    }

    pub fn schedule(&mut self, delay_us: u64, event: Event) {
        self.next_event += 1;
        self.queue.insert((self.now + delay_us, self.next_event), event);
    }

    /// A node's monotonic clock, in milliseconds.
    pub fn clock_ms(&self, node: usize) -> u64 {
        let host = &self.nodes[node];
        let rate = 1_000_000 + host.rate_ppm;
        let running = host.stands_since.unwrap_or(self.now) - host.stood_still_us;
        u64::try_from(i128::from(running) * i128::from(rate) / 1_000_000_000).expect("positive")
            + 1_000 * node as u64
    }

    /// Microseconds until a node's clock shows `at_ms`.
    pub fn until_ms(&self, node: usize, at_ms: u64) -> u64 {
        let rate = i128::from(1_000_000 + self.nodes[node].rate_ppm);
        let left_ms = i128::from(at_ms.saturating_sub(self.clock_ms(node)));
        u64::try_from(left_ms * 1_000_000_000 / rate).expect("positive") + 1
    }

    /// Runs until `until`, or until nothing is left to do.
    pub fn run_until(&mut self, until: u64) {
        while self.next_at().is_some_and(|at| at <= until) {
            self.step();
        }
        self.now = until;
    }

    /// When the next thing happens.
    pub fn next_at(&self) -> Option<u64> {
        self.queue.first_key_value().map(|((at, _), _)| *at)
    }

    /// Lets the next thing happen.
    pub fn step(&mut self) {
        let Some(((at, _), event)) = self.queue.pop_first() else { return };
        self.now = self.now.max(at);
        self.dispatch(event);
    }

    pub fn dispatch(&mut self, event: Event) {
        match event {
            Event::AtReplica { node, message, number } => self.at_replica(node, message, number),
            Event::AtTarget { target, message } => self.at_target(target, message),
            Event::DiskDone { node, process, id } => self.disk_done(node, process, id),
            Event::ConnectionsClosed { node, process, token } => {
                self.connections_closed(node, process, token)
            }
            Event::ReplicaTick { node, process } => self.replica_tick(node, process),
            Event::TargetTick { target, at_ms } => self.target_tick(target, at_ms),
            Event::ResumeTarget { target } => self.resume_target(target),
            Event::ResumeReplica { node } => self.resume_replica(node),
            Event::ResumeClock { node } => self.resume_clock(node),
            Event::StoreUp => self.store_up(),
            Event::Deed { deed, step, target, node } => self.do_deed(deed, step, target, node),
            Event::AtStore { target, call, swap, answer } => self.at_store(target, call, swap, answer),
            Event::Client { target } => self.client(target),
            Event::StartProcess { node } => self.start_process(node),
            Event::PowerOn { node } => self.power_on(node),
            Event::StartTarget { node } => self.start_target(node),
            Event::Controller => self.controller(),
            Event::Operate(task) => self.operate(task),
            Event::Chaos => self.chaos_strikes(),
            Event::Snapshots => self.snapshot_client(),
            Event::Resize => self.resize(),
            Event::StrikeJob { target, node } => self.strike_job(target, node),
            Event::Follow => self.follow(),
        }
    }

    pub fn cut_until(&self, from: usize, to: usize) -> Option<u64> {
        self.cuts.get(&(from, to)).copied().filter(|until| *until > self.now)
    }

    /// How long a message takes; `None` if it is lost.
    pub fn message_delay(&mut self, from: usize, to: usize) -> Option<u64> {
        let delay = if from == to {
            self.rng.random_range(20..200)
        } else {
            match self.rng.random_range(0..1000) {
                0..3 => self.rng.random_range(20_000..1_500_000),
                3..40 => self.rng.random_range(1_000..20_000),
                _ => self.rng.random_range(80..900),
            }
        };
        let delay = delay + std::mem::take(&mut self.late_by);
        let cut = self.cut_until(from, to);
        if cut.is_some() && self.cut_until(to, from).is_none() {
            self.saw(Scenario::OneWayCut);
        }
        match cut {
            None => Some(delay),
            // Bytes of an old session may arrive when the cut is over.
            Some(until) if self.rng.random_bool(0.5) => Some(until - self.now + delay),
            Some(_) => None,
        }
    }

    pub fn send_to_replica(&mut self, from: usize, node: usize, message: ToReplica) {
        let Some(delay) = self.message_delay(from, node) else { return };
        self.next_message += 1;
        let number = self.next_message;
        if let ToReplica::Data { caller, .. } = &message {
            self.data_on_the_way.insert((caller.target, node, number));
        }
        self.schedule(delay, Event::AtReplica { node, message, number });
    }

    /// Whether data that was sent before is still on its way.
    pub fn note_arrival(&mut self, node: usize, message: &ToReplica, number: u64) {
        match message {
            ToReplica::Data { caller, .. } => {
                self.data_on_the_way.remove(&(caller.target, node, number));
            }
            ToReplica::Control { caller, .. } => {
                let earlier = (caller.target, node, 0)..(caller.target, node, number);
                if self.data_on_the_way.range(earlier).next().is_some() {
                    self.saw(Scenario::ControlOvertookData);
                }
            }
            ToReplica::Open { .. }
            | ToReplica::Close { .. }
            | ToReplica::Heartbeat { .. }
            | ToReplica::Extents { .. }
            | ToReplica::Changes { .. } => {}
        }
    }

    pub fn send_to_target(&mut self, from: usize, target: TargetNumber, message: ToTarget) {
        let Some(node) = self.targets.get(&target).map(|host| host.node) else { return };
        let written = matches!(&message, ToTarget::IoDone { result: Ok(()), wrote: true, .. });
        match self.message_delay(from, node) {
            Some(delay) => self.schedule(delay, Event::AtTarget { target, message }),
            None if written => self.saw(Scenario::AnswerLostAfterApply),
            None => {}
        }
    }

    /// ControllerUnpublish and ControllerPublish: asks nothing of the old node.
    pub fn publish(&mut self, node: usize) {
        if self.operator.holds {
            return;
        }
        let node = if self.chaos.prefers_diskless { NODES - 1 } else { node };
        let bare = transitions::unpublish(&self.store.record, None).expect("unpublish never fails");
        let record = transitions::publish(&bare, &node_name(node), false).expect("not attached any more");
        let _ = self.swap_record(self.store.version, record);
        self.current = None;
        self.starting = true;
        let delay = self.rng.random_range(1_000..100_000);
        self.schedule(delay, Event::StartTarget { node });
    }

    pub fn attachment(&self) -> Attachment {
        self.store.record.attachment
    }

    fn note_full_log(&mut self) {
        let Some(host) = self.current.and_then(|number| self.targets.get(&number)) else { return };
        if host.target.status().logged_regions >= self.guards.log_regions_max {
            self.saw(Scenario::FullIntentLog);
        }
    }

    /// Keeps a target running for the attached node, and republishes what cannot go on.
    fn controller(&mut self) {
        self.schedule(50_000, Event::Controller);
        self.note_full_log();
        if self.starting || self.operator.holds {
            return;
        }
        let attached = (0..NODES).find(|node| self.store.record.attached_to == Some(node_name(*node)));
        let Some(attached) = attached else {
            let node = self.rng.random_range(0..NODES);
            return self.publish(node);
        };
        let state =
            self.current.and_then(|number| self.targets.get(&number)).map(|host| host.target.state().clone());
        match state {
            Some(holdfast_storage_core::target::TargetState::Failed(reason)) => {
                if reason.contains("restored") && !self.operator.began {
                    self.history.violations.push(format!("R35 misfired: {reason}"));
                }
                let node = self.rng.random_range(0..NODES);
                self.publish(node);
            }
            Some(state) if !state.is_final() => {}
            _ if self.nodes[attached].powered => {
                self.starting = true;
                let delay = self.rng.random_range(1_000..500_000);
                self.schedule(delay, Event::StartTarget { node: attached });
            }
            // Its node is down: wait, or move.
            _ if self.rng.random_bool(0.05) => {
                let node = self.rng.random_range(0..NODES);
                self.publish(node);
            }
            _ => {}
        }
    }
}

fn mk_node(node: usize, record: &VolumeRecord, chaos: &Chaos, rng: &mut StdRng) -> Node {
    let meta =
        ReplicaMeta::new(record.volume_id, replica_id(node), record.lineage, VOLUME_BYTES, record.epoch);
    let mut disk = Disk::new(meta);
    // With the replica comes a copy of the record that lists it.
    disk.record = Some(copy_of(&Versioned { version: RecordVersion(1), record: record.clone() }));
    disk.tears_blocks = chaos.tears_blocks;
    Node {
        powered: true,
        disk,
        process: None,
        processes: 0,
        rate_ppm: chaos.draw_rate_ppm(node, rng),
        stood_still_us: 0,
        stands_since: None,
        paused_until: 0,
        paused_from: 0,
        deferred: VecDeque::new(),
        slow_until: 0,
        hung_until: 0,
        layers_full_until: 0,
        reads_fail_until: 0,
        off_since: 0,
        died_at: 0,
        off_in_epoch: None,
    }
}
