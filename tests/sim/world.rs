//! The simulated world: three nodes with clocks that drift, a network that delays, loses and cuts, a record store that
//! forgets to answer. It runs the very `Target` and `Replica` that the data process runs.

use std::collections::{BTreeMap, VecDeque};

use holdfast_storage_core::guards::Guards;
use holdfast_storage_core::ids::{Attachment, Lineage, NodeName, RecordVersion, ReplicaId, VolumeId};
use holdfast_storage_core::record::{VolumeParams, VolumeRecord};
use holdfast_storage_core::record_store::{StoreError, Versioned};
use holdfast_storage_core::replica::ReplicaMeta;
use holdfast_storage_core::target::{CallId, TargetEvent};
use holdfast_storage_core::transitions::{self, NewVolume};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::chaos::Chaos;
use crate::disk::Disk;
use crate::history::History;
use crate::replica_host::{Process, ToReplica};
use crate::target_host::{TargetHost, ToTarget};

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
    },
    ResumeTarget {
        target: TargetNumber,
    },
    ResumeReplica {
        node: usize,
    },
    AtStore {
        target: TargetNumber,
        call: CallId,
        swap: Option<(RecordVersion, Box<VolumeRecord>)>,
        answer: bool,
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
    Chaos,
}

#[derive(Debug)]
pub struct Node {
    pub powered: bool,
    pub disk: Disk,
    pub process: Option<Process>,
    pub processes: u64,
    /// Parts per million by which its clock is fast.
    rate_ppm: i64,
    pub paused_until: u64,
    pub deferred: VecDeque<Event>,
    pub slow_until: u64,
}

#[derive(Debug)]
pub struct Store {
    pub version: RecordVersion,
    pub record: VolumeRecord,
    pub down_until: u64,
    /// Chance that an answer is lost, with the change made, not made, or made late.
    pub flaky: f64,
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
    pub chaos: Chaos,
    pub client_load: bool,
    pub trace: bool,
    /// With `trace`: every disk operation on this block is shown.
    pub watch: u64,
}

pub fn replica_id(node: usize) -> ReplicaId {
    ReplicaId(node as u128 + 1)
}

pub fn node_of(replica: ReplicaId) -> usize {
    usize::try_from(replica.0 - 1).expect("small")
}

pub fn node_name(node: usize) -> NodeName {
    NodeName(format!("n{node}"))
}

impl World {
    pub fn new(seed: u64, guards: Guards, trace: bool) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let record = transitions::create(NewVolume {
            volume_id: VolumeId(77),
            name: "sim".to_owned(),
            lineage: Lineage(5),
            size_bytes: VOLUME_BYTES,
            epoch_nonce: rng.random(),
            replicas: (0..REPLICAS).map(|node| (replica_id(node), node_name(node))).collect(),
            params: VolumeParams { replicas: 3, fs_type: String::new(), min_in_sync: 1 },
        });
        let nodes = (0..NODES).map(|node| mk_node(node, &record, &mut rng)).collect();
        let mut chaos = Chaos::draw(&mut rng);
        chaos.focus(seed);
        let guards =
            Guards { log_cold_ms: chaos.log_cold_ms, log_clear_every_ms: chaos.log_clear_every_ms, ..guards };
        let store = Store { version: RecordVersion(1), record, down_until: 0, flaky: chaos.store_flaky };
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
            chaos,
            client_load: true,
            trace,
            watch: std::env::var("HOLDFAST_SIM_BLOCK")
                .ok()
                .and_then(|block| block.parse().ok())
                .unwrap_or(u64::MAX),
        };
        for node in 0..REPLICAS {
            world.schedule(0, Event::StartProcess { node });
        }
        world.schedule(0, Event::Controller);
        world
    }

    pub fn log(&self, what: impl FnOnce() -> String) {
        if self.trace {
            eprintln!("{:>12.3} {}", self.now as f64 / 1000.0, what());
        }
    }

    pub fn schedule(&mut self, delay_us: u64, event: Event) {
        self.next_event += 1;
        self.queue.insert((self.now + delay_us, self.next_event), event);
    }

    /// A node's monotonic clock, in milliseconds.
    pub fn clock_ms(&self, node: usize) -> u64 {
        let rate = 1_000_000 + self.nodes[node].rate_ppm;
        u64::try_from(i128::from(self.now) * i128::from(rate) / 1_000_000_000).expect("positive")
            + 1_000 * node as u64
    }

    /// Microseconds until a node's clock shows `at_ms`.
    pub fn until_ms(&self, node: usize, at_ms: u64) -> u64 {
        // A little late rather than early: an early tick is repeated for nothing.
        at_ms.saturating_sub(self.clock_ms(node)) * 1_005 + 1
    }

    /// Runs until `until`, or until nothing is left to do.
    pub fn run_until(&mut self, until: u64) {
        while let Some((&(at, number), _)) = self.queue.first_key_value() {
            if at > until {
                break;
            }
            let event = self.queue.remove(&(at, number)).expect("just seen");
            self.now = self.now.max(at);
            self.dispatch(event);
        }
        self.now = until;
    }

    pub fn dispatch(&mut self, event: Event) {
        match event {
            Event::AtReplica { node, message } => self.at_replica(node, message),
            Event::AtTarget { target, message } => self.at_target(target, message),
            Event::DiskDone { node, process, id } => self.disk_done(node, process, id),
            Event::ConnectionsClosed { node, process, token } => {
                self.connections_closed(node, process, token)
            }
            Event::ReplicaTick { node, process } => self.replica_tick(node, process),
            Event::TargetTick { target } => self.target_tick(target),
            Event::ResumeTarget { target } => self.resume_target(target),
            Event::ResumeReplica { node } => self.resume_replica(node),
            Event::AtStore { target, call, swap, answer } => self.at_store(target, call, swap, answer),
            Event::Client { target } => self.client(target),
            Event::StartProcess { node } => self.start_process(node),
            Event::PowerOn { node } => self.power_on(node),
            Event::StartTarget { node } => self.start_target(node),
            Event::Controller => self.controller(),
            Event::Chaos => self.chaos_strikes(),
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
        match self.cut_until(from, to) {
            None => Some(delay),
            // Bytes of an old session may arrive when the cut is over.
            Some(until) if self.rng.random_bool(0.5) => Some(until - self.now + delay),
            Some(_) => None,
        }
    }

    pub fn send_to_replica(&mut self, from: usize, node: usize, message: ToReplica) {
        if let Some(delay) = self.message_delay(from, node) {
            self.schedule(delay, Event::AtReplica { node, message });
        }
    }

    pub fn send_to_target(&mut self, from: usize, target: TargetNumber, message: ToTarget) {
        let Some(node) = self.targets.get(&target).map(|host| host.node) else { return };
        if let Some(delay) = self.message_delay(from, node) {
            self.schedule(delay, Event::AtTarget { target, message });
        }
    }

    pub fn send_to_store(
        &mut self,
        target: TargetNumber,
        node: usize,
        call: CallId,
        swap: Option<(RecordVersion, Box<VolumeRecord>)>,
    ) {
        match self.message_delay(node, STORE) {
            Some(delay) => self.schedule(delay, Event::AtStore { target, call, swap, answer: true }),
            None => self.store_is_silent(target, call, swap.is_some()),
        }
    }

    /// The caller gives up waiting.
    fn store_is_silent(&mut self, target: TargetNumber, call: CallId, swap: bool) {
        let result = StoreError::Unknown("timed out".to_owned());
        let event = if swap {
            TargetEvent::SwapAnswered { call, result: Err(result) }
        } else {
            TargetEvent::RecordRead { call, result: Err(result) }
        };
        let delay = self.rng.random_range(50_000..800_000);
        self.schedule(delay, Event::AtTarget { target, message: ToTarget::event(event) });
    }

    fn at_store(
        &mut self,
        target: TargetNumber,
        call: CallId,
        swap: Option<(RecordVersion, Box<VolumeRecord>)>,
        answer: bool,
    ) {
        let down = self.store.down_until > self.now;
        let lost = answer && self.rng.random_bool(self.store.flaky);
        let is_swap = swap.is_some();
        if down || (lost && self.rng.random_bool(0.6)) {
            // Not applied, or applied late.
            if is_swap && self.rng.random_bool(0.3) {
                let delay = self.rng.random_range(1_000..3_000_000);
                self.schedule(delay, Event::AtStore { target, call, swap, answer: false });
            }
            if answer {
                self.store_is_silent(target, call, is_swap);
            }
            return;
        }
        let event = match swap {
            None => {
                let read = Versioned { version: self.store.version, record: self.store.record.clone() };
                TargetEvent::RecordRead { call, result: Ok(read) }
            }
            Some((expected, record)) => {
                let result = self.swap_record(expected, *record);
                TargetEvent::SwapAnswered { call, result }
            }
        };
        if lost {
            self.store_is_silent(target, call, is_swap);
        } else if answer {
            let Some(node) = self.targets.get(&target).map(|host| host.node) else { return };
            match self.message_delay(STORE, node) {
                Some(delay) => {
                    self.schedule(delay, Event::AtTarget { target, message: ToTarget::event(event) });
                }
                None => self.store_is_silent(target, call, is_swap),
            }
        }
    }

    pub fn swap_record(
        &mut self,
        expected: RecordVersion,
        record: VolumeRecord,
    ) -> Result<RecordVersion, StoreError> {
        if expected != self.store.version {
            return Err(StoreError::Conflict(record.volume_id));
        }
        if record.in_sync.is_empty() {
            self.history.violations.push("P6: the in-sync set was emptied".to_owned());
        }
        self.log(|| {
            format!(
                "record: gen {} epoch {} set {:?}",
                record.generation, record.epoch.number, record.in_sync
            )
        });
        self.store.version = self.store.version.next();
        self.store.record = record;
        Ok(self.store.version)
    }

    /// ControllerUnpublish and ControllerPublish: asks nothing of the old node.
    pub fn publish(&mut self, node: usize) {
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

    /// Keeps a target running for the attached node, and republishes what cannot go on.
    fn controller(&mut self) {
        self.schedule(50_000, Event::Controller);
        if self.starting {
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
                if reason.contains("restored") {
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

fn mk_node(node: usize, record: &VolumeRecord, rng: &mut StdRng) -> Node {
    let meta =
        ReplicaMeta::new(record.volume_id, replica_id(node), record.lineage, VOLUME_BYTES, record.epoch);
    Node {
        powered: true,
        disk: Disk::new(meta),
        process: None,
        processes: 0,
        rate_ppm: rng.random_range(-5_000..5_000),
        paused_until: 0,
        deferred: VecDeque::new(),
        slow_until: 0,
    }
}
