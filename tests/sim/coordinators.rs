//! Coordinators of groups, simulated: who wants groups, the store of their records, and the way to the volumes' targets.

use std::collections::BTreeMap;

use holdfast_storage_core::group::{
    Group, GroupAction, GroupCall, GroupConfig, GroupEvent, GroupRecord, GroupState, GroupStoreError,
    GroupTask, MemberError, VersionedGroup,
};
use holdfast_storage_core::ids::{GroupId, RecordVersion, SnapshotId, VolumeId};
use holdfast_storage_core::target::{Job, JobError, JobId, TargetEvent};
use rand::Rng;
use rand::rngs::StdRng;

use crate::coverage::Scenario;
use crate::groups::{Groups, VOLUMES, volume_id, volume_of};
use crate::target_host::ToTarget;
use crate::world::{Event as WorldEvent, STORE};

/// Jobs of coordinators have the ids from here on; those of a volume's own clients are below.
const GROUP_JOBS: u64 = 1 << 40;
/// Groups that are wanted at a time.
const PENDING_MAX: usize = 3;

#[derive(Debug)]
pub enum Event {
    /// Somebody wants a group, or wants one no more.
    Want,
    /// A coordinator dies.
    Crash {
        coordinator: u64,
    },
    AtStore {
        coordinator: u64,
        group: GroupId,
        call: GroupCall,
        swap: Option<Swap>,
        answer: bool,
    },
    AtCoordinator {
        coordinator: u64,
        event: GroupEvent,
    },
    /// Nobody waits for this answer any longer.
    AskEnds {
        job: JobId,
    },
    Tick {
        coordinator: u64,
        at_ms: u64,
    },
}

/// A change of a group's record: the version before, and the content after.
#[derive(Debug, Clone)]
pub struct Swap {
    expected: Option<RecordVersion>,
    record: Option<GroupRecord>,
}

/// One start of a coordinator.
#[derive(Debug)]
pub struct Coordinator {
    pub group_id: GroupId,
    group: Group,
    creates: bool,
    /// Parts per million by which its clock is fast.
    rate_ppm: u64,
    paused_until: u64,
}

/// A question on its way to a target, or its answer on the way back.
#[derive(Debug, Clone, Copy)]
pub struct Ask {
    coordinator: u64,
    call: GroupCall,
    volume: usize,
    what: Job,
}

/// The records of groups, under compare-and-swap.
#[derive(Debug)]
pub struct GroupStore {
    records: BTreeMap<GroupId, VersionedGroup>,
    last: u64,
    /// Every group that was ever committed.
    committed: BTreeMap<GroupId, BTreeMap<VolumeId, SnapshotId>>,
    /// Chance that an answer is lost, with the change made, not made, or made late.
    pub flaky: f64,
    /// Mean pause between two wishes.
    gap_us: u64,
    /// For how long coordinators have writes held.
    hold_ms: u64,
    /// Chance that a coordinator dies, that it sleeps when it gets an answer, and that a question to a target is late.
    dies: f64,
    sleeps: f64,
    late: f64,
}

impl GroupStore {
    pub fn of_seed(rng: &mut StdRng) -> Self {
        Self {
            records: BTreeMap::new(),
            last: 0,
            committed: BTreeMap::new(),
            flaky: [0.0, 0.02, 0.1][rng.random_range(0..3)],
            gap_us: [200_000, 600_000][rng.random_range(0..2)],
            hold_ms: [100, 500, 2_000, 5_000][rng.random_range(0..4)],
            dies: [0.0, 0.1, 0.3][rng.random_range(0..3)],
            sleeps: [0.0, 0.02, 0.1][rng.random_range(0..3)],
            late: [0.0, 0.02, 0.1][rng.random_range(0..3)],
        }
    }

    pub fn records(&self) -> impl Iterator<Item = &GroupRecord> {
        self.records.values().map(|group| &group.record)
    }

    pub fn committed(&self) -> impl Iterator<Item = (&GroupId, &BTreeMap<VolumeId, SnapshotId>)> {
        self.committed.iter()
    }

    /// Groups that are neither committed nor gone.
    pub fn unfinished(&self) -> Vec<GroupId> {
        self.records().filter(|r| r.state != GroupState::Committed).map(|r| r.group_id).collect()
    }

    fn swap(&mut self, group: GroupId, swap: Swap) -> Result<RecordVersion, GroupStoreError> {
        if self.records.get(&group).map(|group| group.version) != swap.expected {
            return Err(GroupStoreError::Conflict);
        }
        self.last += 1;
        let version = RecordVersion(self.last);
        match swap.record {
            Some(record) => {
                if record.state == GroupState::Committed {
                    self.committed.insert(group, record.snapshots.clone());
                }
                self.records.insert(group, VersionedGroup { version, record });
            }
            None => {
                self.records.remove(&group);
            }
        }
        Ok(version)
    }
}

impl Groups {
    pub fn schedule(&mut self, delay_us: u64, event: Event) {
        self.next_event += 1;
        self.queue.insert((self.now + delay_us, self.next_event), event);
    }

    pub fn dispatch(&mut self, event: Event) {
        match event {
            Event::Want => self.want(),
            Event::Crash { coordinator } => self.crash(coordinator),
            Event::AtStore { coordinator, group, call, swap, answer } => {
                self.at_store(coordinator, group, call, swap, answer);
            }
            Event::AtCoordinator { coordinator, event } => self.at_coordinator(coordinator, event),
            Event::AskEnds { job } => {
                if let Some(ask) = self.asks.remove(&job) {
                    let event = GroupEvent::Answered { call: ask.call, result: Err(MemberError::Silent) };
                    self.at_coordinator(ask.coordinator, event);
                }
            }
            Event::Tick { coordinator, at_ms } => self.tick(coordinator, at_ms),
        }
    }

    /// A new group, one that is still wanted, or the end of one.
    fn want(&mut self) {
        if !self.wanted {
            return;
        }
        let delay = self.rng.random_range(0..2 * self.store.gap_us);
        self.schedule(delay, Event::Want);
        let pick = self.rng.random_range(0..100);
        let nth = self.rng.random_range(0..PENDING_MAX);
        let pending = self.pending.iter().copied().nth(nth);
        match (pick, pending, self.kept.first().copied()) {
            (0..8, Some(group), _) => {
                self.pending.remove(&group);
                self.start_deletion(group);
            }
            (8..20, _, Some(group)) => {
                self.kept.remove(&group);
                self.start_deletion(group);
            }
            // Two groups at a time keep each other from holding; two coordinators of one group, from committing.
            (20..96, ..) if !self.coordinators.is_empty() => {}
            (_, Some(group), _) => self.start_creation(group),
            (_, None, _) => {
                self.next_number += 1;
                let group = GroupId(u128::from(self.next_number));
                self.pending.insert(group);
                self.start_creation(group);
            }
        }
    }

    fn start_creation(&mut self, group: GroupId) {
        let mut snapshots = BTreeMap::new();
        for at in 0..VOLUMES {
            self.next_number += 1;
            snapshots.insert(volume_id(at), SnapshotId(u128::from(self.next_number) << 64));
        }
        self.start(group, GroupTask::Create(snapshots));
    }

    pub fn start_deletion(&mut self, group: GroupId) {
        self.start(group, GroupTask::Delete);
    }

    fn start(&mut self, group_id: GroupId, task: GroupTask) {
        self.next_number += 1;
        let number = self.next_number;
        self.log(|| format!("coordinator {number} of group {} starts: {task:?}", group_id.0));
        let rate_ppm = 980_000 + self.rng.random_range(0..40_000);
        let creates = matches!(task, GroupTask::Create(_));
        let config = GroupConfig {
            group_id,
            name: String::new(),
            asked_unix_ms: 0,
            task,
            hold_ms: self.store.hold_ms,
        };
        let group = Group::with_guards(clock_ms(self.now, rate_ppm), config, self.guards);
        let coordinator = Coordinator { group_id, group, creates, rate_ppm, paused_until: 0 };
        self.coordinators.insert(number, coordinator);
        if self.wanted && self.rng.random_bool(self.store.dies) {
            let within = if self.rng.random_bool(0.5) { 30_000 } else { 600_000 };
            let delay = self.rng.random_range(0..within);
            self.schedule(delay, Event::Crash { coordinator: number });
        }
        self.drain(number);
    }

    fn crash(&mut self, number: u64) {
        let Some(coordinator) = self.coordinators.remove(&number) else { return };
        self.log(|| format!("coordinator {number} dies"));
        let begun = self
            .store
            .records
            .get(&coordinator.group_id)
            .is_some_and(|group| matches!(group.record.state, GroupState::Holding | GroupState::Cutting));
        if begun {
            self.worlds[0].saw(Scenario::CoordinatorDied);
        }
    }

    fn at_coordinator(&mut self, number: u64, event: GroupEvent) {
        let (now, sleeps) = (self.now, self.store.sleeps);
        let Some(coordinator) = self.coordinators.get_mut(&number) else { return };
        if coordinator.paused_until <= now && self.wanted && self.rng.random_bool(sleeps) {
            coordinator.paused_until = now + self.rng.random_range(1_000..2_000_000);
        }
        if coordinator.paused_until > now {
            let delay = coordinator.paused_until - now;
            return self.schedule(delay, Event::AtCoordinator { coordinator: number, event });
        }
        coordinator.group.handle_event(clock_ms(now, coordinator.rate_ppm), event);
        self.drain(number);
    }

    fn tick(&mut self, number: u64, at_ms: u64) {
        let Some(coordinator) = self.coordinators.get(&number) else { return };
        if coordinator.group.next_timeout() == Some(at_ms) {
            self.at_coordinator(number, GroupEvent::Tick);
        }
    }

    fn drain(&mut self, number: u64) {
        while let Some(action) = self.coordinators.get_mut(&number).and_then(|c| c.group.poll_action()) {
            self.log(|| format!("coordinator {number}: {action:?}"));
            match action {
                GroupAction::ReadRecord { call } => self.send_to_store(number, call, None),
                GroupAction::Swap { call, expected, record } => {
                    self.send_to_store(number, call, Some(Swap { expected, record }));
                }
                GroupAction::Ask { call, volume, what } => {
                    self.ask(Ask { coordinator: number, call, volume: volume_of(volume), what });
                }
                GroupAction::Done { result } => self.done(number, result.is_ok()),
            }
        }
        let Some(coordinator) = self.coordinators.get(&number) else { return };
        if let Some(at_ms) = coordinator.group.next_timeout() {
            let left_ms = at_ms.saturating_sub(clock_ms(self.now, coordinator.rate_ppm));
            let delay = (left_ms + 1) * 1_000_000_000 / coordinator.rate_ppm;
            self.schedule(delay, Event::Tick { coordinator: number, at_ms });
        }
    }

    fn done(&mut self, number: u64, ok: bool) {
        let Some(coordinator) = self.coordinators.remove(&number) else { return };
        let counts = &mut self.worlds[0].snapshots.counts;
        match (coordinator.creates, ok) {
            (true, true) => {
                counts.groups += 1;
                self.pending.remove(&coordinator.group_id);
                self.kept.insert(coordinator.group_id);
            }
            (true, false) => counts.groups_given_up += 1,
            (false, _) => {}
        }
    }

    // ---- the store of group records

    fn send_to_store(&mut self, coordinator: u64, call: GroupCall, swap: Option<Swap>) {
        let Some(group) = self.coordinators.get(&coordinator).map(|c| c.group_id) else { return };
        let delay = self.rng.random_range(100..3_000);
        self.schedule(delay, Event::AtStore { coordinator, group, call, swap, answer: true });
    }

    fn at_store(
        &mut self,
        coordinator: u64,
        group: GroupId,
        call: GroupCall,
        swap: Option<Swap>,
        answer: bool,
    ) {
        let lost = answer && self.rng.random_bool(self.store.flaky);
        let is_swap = swap.is_some();
        if lost && self.rng.random_bool(0.6) {
            // Not applied, or applied late.
            if is_swap && self.rng.random_bool(0.5) {
                let delay = self.rng.random_range(1_000..2_000_000);
                self.schedule(delay, Event::AtStore { coordinator, group, call, swap, answer: false });
            }
            return self.store_is_silent(coordinator, call, is_swap);
        }
        let event = match swap {
            None => GroupEvent::RecordRead { call, result: Ok(self.store.records.get(&group).cloned()) },
            Some(swap) => {
                let result = self.store.swap(group, swap);
                GroupEvent::SwapAnswered { call, result }
            }
        };
        if lost {
            self.store_is_silent(coordinator, call, is_swap);
        } else if answer {
            let delay = self.rng.random_range(100..3_000);
            self.schedule(delay, Event::AtCoordinator { coordinator, event });
        }
    }

    fn store_is_silent(&mut self, coordinator: u64, call: GroupCall, swap: bool) {
        let error = GroupStoreError::Unknown("timed out".to_owned());
        let event = if swap {
            GroupEvent::SwapAnswered { call, result: Err(error) }
        } else {
            GroupEvent::RecordRead { call, result: Err(error) }
        };
        let delay = self.rng.random_range(50_000..800_000);
        self.schedule(delay, Event::AtCoordinator { coordinator, event });
    }

    // ---- the members

    /// To the target that the volume has now, over a network that loses and delays.
    fn ask(&mut self, ask: Ask) {
        self.next_number += 1;
        let job = JobId(GROUP_JOBS + self.next_number);
        let patience = self.rng.random_range(500_000..6_000_000);
        self.schedule(patience, Event::AskEnds { job });
        self.asks.insert(job, ask);
        let late = self.rng.random_bool(self.store.late).then(|| self.rng.random_range(0..3_000_000));
        let world = self.world_now(ask.volume);
        if let Job::DeleteSnapshot { snapshot } = ask.what {
            world.expect_deletion(snapshot);
        }
        let Some(target) = world.current else { return };
        let Some(node) = world.targets.get(&target).map(|host| host.node) else { return };
        let Some(delay) = world.message_delay(STORE, node) else { return };
        let message = ToTarget::event(TargetEvent::Job { job, what: ask.what });
        world.schedule(delay + late.unwrap_or(0), WorldEvent::AtTarget { target, message });
    }

    pub fn answered(&mut self, job: JobId, result: Result<(), JobError>) {
        let Some(ask) = self.asks.get(&job).copied() else { return };
        if matches!(ask.what, Job::Cut { .. }) && result == Err(JobError::HoldOver) {
            self.worlds[ask.volume].saw(Scenario::GroupHoldOver);
        }
        let world = self.world_now(ask.volume);
        let mut result = result.map_err(MemberError::Refused);
        if let Job::DeleteSnapshot { snapshot } = ask.what
            && world.store.record.snapshot(snapshot).is_some()
        {
            // Its target was replaced and did not know.
            result = Err(MemberError::Silent);
        }
        let node = world.current.and_then(|target| world.targets.get(&target)).map_or(0, |host| host.node);
        // An answer that is lost is waited for in vain.
        let Some(delay) = world.message_delay(node, STORE) else { return };
        self.asks.remove(&job);
        let event = GroupEvent::Answered { call: ask.call, result };
        self.schedule(delay, Event::AtCoordinator { coordinator: ask.coordinator, event });
    }

    fn log(&self, what: impl FnOnce() -> String) {
        if self.worlds[0].trace {
            eprintln!("{:>12.3} {}", self.now as f64 / 1000.0, what());
        }
    }
}

/// A coordinator's clock, in milliseconds.
fn clock_ms(now_us: u64, rate_ppm: u64) -> u64 {
    now_us / 1_000 * rate_ppm / 1_000_000
}
