//! Trouble at a chosen step: a trap waits until a target or a replica takes the step, and springs within it.

use holdfast_storage_core::replica::{DataOp, DiskOp};
use holdfast_storage_core::target::{Control, Payload, TargetAction};
use rand::Rng;
use rand::rngs::StdRng;

use crate::coverage::Scenario;
use crate::disk::data_op;
use crate::world::{Event, NODES, REPLICAS, TargetNumber, World, node_of};

/// Traps armed at a time at most; a further one replaces the oldest.
const TRAPS_MAX: usize = 6;
/// Starts that a chain of deaths takes.
const CHAIN: usize = 3;

/// A step of a target or of a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    Take,
    Open,
    SwapOut,
    TellEpoch,
    ReadData,
    ReconcileCopy,
    ReadMaps,
    CatchUpCopy,
    MergeMaps,
    JoinFlush,
    SwapIn,
    JoinEpoch,
    ClearLog,
    Write,
    Heartbeat,
    /// Freeze, drop or grow.
    Layers,
    DiskMeta,
    DiskLog,
    DiskMap,
    DiskWrite,
    DiskFlush,
}

/// Steps of a target, and those of a disk.
const TARGET_STEPS: [Step; 15] = [
    Step::Take,
    Step::Open,
    Step::SwapOut,
    Step::TellEpoch,
    Step::ReadData,
    Step::ReconcileCopy,
    Step::ReadMaps,
    Step::CatchUpCopy,
    Step::MergeMaps,
    Step::JoinFlush,
    Step::SwapIn,
    Step::JoinEpoch,
    Step::ClearLog,
    Step::Write,
    Step::Layers,
];
const DISK_STEPS: [Step; 5] =
    [Step::DiskMeta, Step::DiskLog, Step::DiskMap, Step::DiskWrite, Step::DiskFlush];

/// What happens then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deed {
    KillTarget,
    PauseTarget,
    /// The replica that the step is about.
    KillReplica,
    PowerLoss,
    PowerLossOfAll,
    LoseMessage,
    DelayMessage,
    Cut,
    /// The target is cut off and sleeps about as long as a lease lasts, and the volume moves.
    SleepToTheEdge,
}

const TARGET_DEEDS: [Deed; 9] = [
    Deed::KillTarget,
    Deed::KillTarget,
    Deed::PauseTarget,
    Deed::KillReplica,
    Deed::PowerLoss,
    Deed::PowerLossOfAll,
    Deed::LoseMessage,
    Deed::DelayMessage,
    Deed::Cut,
];
const DISK_DEEDS: [Deed; 4] = [Deed::KillReplica, Deed::PowerLoss, Deed::PowerLossOfAll, Deed::Cut];

#[derive(Debug, Clone, Copy)]
struct Trap {
    step: Step,
    deed: Deed,
}

/// What waits to spring.
#[derive(Debug, Default)]
pub struct Traps {
    armed: Vec<Trap>,
    /// Steps at which the next starts of a target die, last first.
    chain: Vec<Step>,
    /// Targets that died of the chain.
    chain_deaths: Vec<TargetNumber>,
}

impl Traps {
    pub fn arm(&mut self, rng: &mut StdRng) {
        let trap = if rng.random_bool(0.75) {
            let step = TARGET_STEPS[rng.random_range(0..TARGET_STEPS.len())];
            Trap { step, deed: TARGET_DEEDS[rng.random_range(0..TARGET_DEEDS.len())] }
        } else {
            let step = DISK_STEPS[rng.random_range(0..DISK_STEPS.len())];
            Trap { step, deed: DISK_DEEDS[rng.random_range(0..DISK_DEEDS.len())] }
        };
        self.push(trap.step, trap.deed);
    }

    pub fn push(&mut self, step: Step, deed: Deed) {
        if self.armed.len() == TRAPS_MAX {
            self.armed.remove(0);
        }
        self.armed.push(Trap { step, deed });
    }

    /// Three targets in a row die, each within a step of its own.
    pub fn arm_chain(&mut self, rng: &mut StdRng) {
        let within = &TARGET_STEPS[1..12];
        self.chain = (0..CHAIN).map(|_| within[rng.random_range(0..within.len())]).collect();
        self.chain_deaths.clear();
    }

    pub fn disarm(&mut self) {
        *self = Self::default();
    }

    fn is_idle(&self) -> bool {
        self.armed.is_empty() && self.chain.is_empty()
    }

    fn spring(&mut self, step: Step) -> Option<Deed> {
        let at = self.armed.iter().position(|trap| trap.step == step)?;
        Some(self.armed.remove(at).deed)
    }
}

/// Where a target stands with a returning replica, as its messages show it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum JoinStep {
    #[default]
    None,
    Maps,
    Copying,
    Flushing,
    Swapping,
    Telling,
}

impl World {
    /// The step that an action takes, and the node it goes to.
    fn step_of(&self, number: TargetNumber, action: &TargetAction) -> Option<(Step, Option<usize>)> {
        let host = self.targets.get(&number)?;
        let join = host.join_step;
        Some(match action {
            TargetAction::Open(open) => (Step::Open, Some(node_of(open.replica))),
            TargetAction::Swap { record, .. } if record.generation != self.store.record.generation => {
                (Step::Take, None)
            }
            TargetAction::Swap { record, .. } if record.epoch == self.store.record.epoch => {
                (Step::Layers, None)
            }
            TargetAction::Swap { record, .. } => {
                let joins = record.in_sync.len() > self.store.record.in_sync.len();
                (if joins { Step::SwapIn } else { Step::SwapOut }, None)
            }
            TargetAction::Control { op, replica, .. } => {
                let step = match op {
                    Control::SetEpoch { .. } if join >= JoinStep::Swapping => Step::JoinEpoch,
                    Control::SetEpoch { .. } => Step::TellEpoch,
                    Control::ClearLog(_) | Control::ClearMap { .. } => Step::ClearLog,
                    Control::ReadMap(_) | Control::FillMap(_) => Step::ReadMaps,
                    Control::ReadExtents(_) | Control::ReadChanges { .. } => Step::CatchUpCopy,
                    Control::MergeMaps { .. } => Step::MergeMaps,
                    Control::Freeze { .. } | Control::DropSnapshot { .. } | Control::Grow { .. } => {
                        Step::Layers
                    }
                    Control::MarkBad(_) => Step::CatchUpCopy,
                    Control::Adopt(_) => Step::ReconcileCopy,
                    Control::KeepRecord(_) | Control::Verify(_) | Control::Release => return None,
                };
                (step, Some(node_of(*replica)))
            }
            // A read goes to the source, a write to the destination.
            TargetAction::Io { payload: Payload::Copy(_), replica, .. } => {
                let step = if join == JoinStep::None { Step::ReconcileCopy } else { Step::CatchUpCopy };
                (step, Some(node_of(*replica)))
            }
            TargetAction::Io { op: DataOp::Flush, replica, .. } if join == JoinStep::Flushing => {
                (Step::JoinFlush, Some(node_of(*replica)))
            }
            TargetAction::Io { op: DataOp::Write { .. }, replica, .. } => {
                (Step::Write, Some(node_of(*replica)))
            }
            TargetAction::Heartbeat { .. } => (Step::Heartbeat, None),
            _ => return None,
        })
    }

    /// Springs the trap that waits for this action; tells whether the action is lost by it.
    pub fn spring_at_target(&mut self, number: TargetNumber, action: &TargetAction) -> bool {
        let Some((step, node)) = self.step_of(number, action) else { return false };
        self.note_join_step(number, step, action);
        if self.traps.is_idle() {
            return false;
        }
        if self.traps.chain.last() == Some(&step) {
            self.traps.chain.pop();
            self.traps.chain_deaths.push(number);
            let delay = self.short_delay();
            self.schedule(delay, Event::Deed { deed: Deed::KillTarget, step, target: number, node });
            let deaths = &self.traps.chain_deaths;
            if deaths.len() == CHAIN && deaths.windows(2).all(|pair| pair[1] == pair[0] + 1) {
                self.saw(Scenario::ThreeTargetsDiedInARow);
            }
            return false;
        }
        let Some(deed) = self.traps.spring(step) else { return false };
        self.log(|| format!("-- trap: {deed:?} at {step:?} of t{number} towards {node:?}"));
        if deed == Deed::LoseMessage {
            if matches!(step, Step::TellEpoch | Step::JoinEpoch) {
                self.saw(Scenario::FirstEpochLost);
            }
            // A lost message of a session is a broken session, later.
            let message = matches!(action, TargetAction::Io { .. } | TargetAction::Control { .. });
            if message && let Some(node) = node {
                self.cut_for(number, node, 900_000);
            }
            return message;
        }
        if deed == Deed::DelayMessage {
            self.late_by = self.rng.random_range(2_000..300_000);
            return false;
        }
        let delay = match deed {
            // The answers are to arrive first.
            Deed::SleepToTheEdge => self.rng.random_range(2_000..20_000),
            _ => self.short_delay(),
        };
        self.schedule(delay, Event::Deed { deed, step, target: number, node });
        false
    }

    /// A read's data reaches its target; tells whether that sleeps first.
    pub fn spring_at_read(&mut self, number: TargetNumber) -> bool {
        if self.traps.spring(Step::ReadData).is_none() {
            return false;
        }
        self.do_deed(Deed::PauseTarget, Step::ReadData, number, None);
        true
    }

    pub fn spring_at_disk(&mut self, node: usize, op: &DiskOp) {
        if self.traps.is_idle() {
            return;
        }
        let step = match (data_op(op), op) {
            (Some(DataOp::Write { .. } | DataOp::Zero { .. }), _)
            | (Some(DataOp::MarkBad(_) | DataOp::Adopt(_)), _) => Step::DiskWrite,
            (Some(DataOp::Flush), _) => Step::DiskFlush,
            (Some(DataOp::Read(_) | DataOp::ReadSnapshot { .. } | DataOp::Verify(_)), _) => return,
            (None, DiskOp::LogAdd(_) | DiskOp::LogRemove(_)) => Step::DiskLog,
            (None, DiskOp::MapPut { .. } | DiskOp::MapUpdate { .. } | DiskOp::MapDrop { .. }) => {
                Step::DiskMap
            }
            (None, _) => Step::DiskMeta,
        };
        if let Some(deed) = self.traps.spring(step) {
            self.log(|| format!("-- trap: {deed:?} at {step:?} of n{node}"));
            let target = self.current.unwrap_or(0);
            let delay = self.short_delay();
            self.schedule(delay, Event::Deed { deed, step, target, node: Some(node) });
        }
    }

    /// At once, or when the message has arrived, or when it has been carried out.
    fn short_delay(&mut self) -> u64 {
        if self.rng.random_bool(0.4) { 0 } else { self.rng.random_range(0..4_000) }
    }

    pub fn do_deed(&mut self, deed: Deed, step: Step, target: TargetNumber, node: Option<usize>) {
        let lasts = self.rng.random_range(1_000..self.chaos.lasts_us);
        match deed {
            Deed::KillTarget => {
                if self.targets.contains_key(&target) {
                    self.note_death(target, step);
                    self.kill_target(target, true);
                }
            }
            Deed::PauseTarget => {
                if self.targets.contains_key(&target) {
                    match step {
                        Step::ReadData => self.saw(Scenario::TargetPausedAtLeaseCheck),
                        Step::SwapOut | Step::SwapIn | Step::Take => self.saw(Scenario::TargetPausedAtSwap),
                        Step::TellEpoch | Step::JoinEpoch => self.saw(Scenario::TargetPausedAtEpoch),
                        _ => {}
                    }
                }
                self.pause_target(target, lasts);
            }
            Deed::KillReplica | Deed::PowerLoss => {
                let Some(node) = node.filter(|node| self.nodes[*node].process.is_some()) else { return };
                match step {
                    Step::ReadMaps => self.saw(Scenario::MapHolderDied),
                    Step::CatchUpCopy if self.store.record.in_sync.contains(&self.replica_at(node)) => {
                        self.saw(Scenario::SourceDiedMidCopy)
                    }
                    _ => {}
                }
                if deed == Deed::PowerLoss {
                    self.power_off(node, lasts);
                } else {
                    self.kill_process(node, true);
                    self.schedule(lasts, Event::StartProcess { node });
                }
            }
            Deed::PowerLossOfAll => self.power_off_all(lasts),
            Deed::Cut => {
                if let Some(node) = node {
                    self.cut_for(target, node, lasts);
                }
            }
            Deed::SleepToTheEdge => self.fall_asleep(target),
            Deed::LoseMessage | Deed::DelayMessage => {}
        }
    }

    /// Between a target's node and another, both ways.
    fn cut_for(&mut self, target: TargetNumber, node: usize, lasts: u64) {
        let Some(from) = self.targets.get(&target).map(|host| host.node) else { return };
        let until = self.now + lasts;
        self.cuts.insert((from, node), until);
        self.cuts.insert((node, from), until);
    }

    /// Follows a returning replica's way by the messages about it.
    fn note_join_step(&mut self, number: TargetNumber, step: Step, action: &TargetAction) {
        let members = &self.store.record.in_sync;
        let of_member = matches!(action, TargetAction::Open(open) if members.contains(&open.replica));
        let Some(host) = self.targets.get_mut(&number) else { return };
        host.join_step = match step {
            Step::Open if !of_member => JoinStep::Maps,
            Step::CatchUpCopy => JoinStep::Copying.max(host.join_step),
            Step::MergeMaps => JoinStep::Flushing,
            Step::SwapIn => JoinStep::Swapping,
            Step::SwapOut => JoinStep::None,
            Step::JoinEpoch => JoinStep::Telling,
            Step::ReconcileCopy | Step::ClearLog if host.join_step == JoinStep::Telling => JoinStep::None,
            _ => host.join_step,
        };
    }

    /// Which step a target died in.
    pub fn note_death(&mut self, number: TargetNumber, step: Step) {
        let Some(host) = self.targets.get(&number) else { return };
        let status = host.target.status();
        let scenario = match step {
            Step::ReadMaps => Scenario::TargetDiedReadingMaps,
            Step::CatchUpCopy => Scenario::TargetDiedCopying,
            Step::MergeMaps => Scenario::TargetDiedMerging,
            Step::JoinFlush => Scenario::TargetDiedJoinFlush,
            Step::SwapIn => Scenario::TargetDiedJoinSwap,
            Step::JoinEpoch => Scenario::TargetDiedJoinEpoch,
            _ if status.state.word() == "opening" => Scenario::TargetDiedOpening,
            _ if status.state.word() == "settling" => Scenario::TargetDiedSettling,
            _ if status.unreconciled_regions > 0 => Scenario::TargetDiedReconciling,
            _ => return,
        };
        self.saw(scenario);
    }

    pub fn power_off_all(&mut self, lasts: u64) {
        self.saw(Scenario::PowerLossOfAll);
        for node in 0..NODES {
            self.power_off(node, lasts / (node as u64 + 1));
        }
    }

    /// The sets of members as they followed each other show the chains that only history can show.
    pub fn note_set(&mut self) {
        let set: Vec<usize> = self.store.record.in_sync.iter().map(|replica| node_of(*replica)).collect();
        if self.sets.last() != Some(&set) {
            self.sets.push(set);
            self.note_chains();
        }
    }

    fn note_chains(&mut self) {
        let [.., before, now] = self.sets.as_slice() else { return };
        let Some(joined) = now.iter().find(|node| !before.contains(node)).copied() else { return };
        // Since when the one that joined was away.
        let away = self.sets[..self.sets.len() - 1].iter().rposition(|set| set.contains(&joined));
        let during = &self.sets[away.map_or(0, |at| at + 1)..self.sets.len() - 1];
        let returned = |node: usize| {
            let out = during.iter().position(|set| !set.contains(&node));
            let back = during.iter().rposition(|set| set.contains(&node));
            out.zip(back).is_some_and(|(out, back)| {
                let kept = &during[out];
                back > out && during.last().is_some_and(|last| last.iter().all(|m| !kept.contains(m)))
            })
        };
        let hole_11 = during.first().is_some_and(|first| first.iter().any(|node| returned(*node)));
        let leaves = |pair: &[Vec<usize>]| pair[0].contains(&joined) && !pair[1].contains(&joined);
        let twice = self.sets.windows(2).filter(|pair| leaves(pair)).count() == 2;
        if hole_11 {
            self.saw(Scenario::Hole11);
        }
        if twice {
            self.saw(Scenario::LeftAndReturnedTwice);
        }
    }

    /// The replicas' nodes except one.
    pub fn other_replicas(&self, node: usize) -> impl Iterator<Item = usize> + use<> {
        (0..REPLICAS).filter(move |other| *other != node)
    }
}
