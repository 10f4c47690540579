//! Copying a range from one replica to others, under the range lock and through the intent log (R13, R18).
//!
//! A member that cannot read the range is replaced by another (R25, R32). A range that no member can read whole is cut
//! into blocks; one that verifies nowhere is adopted where a crash explains it (R32), and else marked bad on the replica
//! that returns, so that it answers an error there too and never something older (R25).

use std::collections::BTreeSet;

use crate::block_range::BlockRange;
use crate::ids::{Region, ReplicaId, SnapshotId};
use crate::replica::DataOp;

use super::calls::CallKind;
use super::peers::IoOwner;
use super::tasks::{Answer, LastResort, Stage, Work};
use super::{Control, CopyId, Finding, Payload, Target, TargetAction};

/// Why something is copied, and to whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CopyFor {
    /// From the round's source to all other members (R20).
    Reconcile { region: Region, round: u64 },
    /// From any member to the returning replica (R23).
    CatchUp(ReplicaId),
    /// From any member that verifies to those that do not (R33).
    Repair,
    /// A snapshot's blocks, from any member to the returning replica, which rebuilds its layer (R28).
    Layer {
        /// The returning replica.
        replica: ReplicaId,
        /// What it rebuilds.
        snapshot: SnapshotId,
    },
}

impl Target {
    pub(super) fn start_copy(&mut self, why: CopyFor, range: BlockRange) {
        let id = self.prepare_copy(why, range, BTreeSet::new());
        self.ask_lock(id);
    }

    /// A copy that has not asked for the lock; it is not read from those `tried`.
    pub(super) fn prepare_copy(
        &mut self,
        why: CopyFor,
        range: BlockRange,
        tried: BTreeSet<ReplicaId>,
    ) -> u64 {
        let copy = CopyId(self.new_id());
        let id = self.prepare_task(Work::Copy { copy, why, resort: LastResort::None }, range);
        if let Some(task) = self.tasks.get_mut(&id) {
            task.tried = tried;
        }
        id
    }

    pub(super) fn send_copy_read(&mut self, id: u64) {
        let Some(task) = self.tasks.get(&id) else { return };
        let Work::Copy { copy, why, .. } = task.work else { return };
        let (range, tried) = (task.range, task.tried.clone());
        let source = match why {
            // R20: one source; another member only for what the source cannot read (R32).
            CopyFor::Reconcile { .. } => self
                .reconcile
                .source()
                .filter(|source| !tried.contains(source) && self.is_open(*source))
                .or_else(|| if tried.is_empty() { None } else { self.choose_reader(&tried) }),
            CopyFor::CatchUp(_) | CopyFor::Layer { .. } | CopyFor::Repair => self.choose_reader(&tried),
        };
        let read = match why {
            CopyFor::Layer { snapshot, .. } => DataOp::ReadSnapshot { snapshot, range },
            CopyFor::Reconcile { .. } | CopyFor::CatchUp(_) | CopyFor::Repair => DataOp::Read(range),
        };
        let given_up =
            !self.guards.adoptlast && matches!(why, CopyFor::Reconcile { .. }) && !tried.is_empty();
        match source.filter(|_| !given_up) {
            Some(source) => {
                if let Some(task) = self.tasks.get_mut(&id) {
                    task.answers = vec![(source, Answer::Pending)];
                }
                self.send_io(source, IoOwner::Task(id), read, Payload::Copy(copy));
            }
            None if given_up || self.members().iter().all(|r| tried.contains(r)) => self.copy_unreadable(id),
            None => self.gated.push_back(id),
        }
    }

    pub(super) fn copy_was_read(&mut self, id: u64) {
        let Some(task) = self.tasks.get(&id) else { return };
        let Work::Copy { why, .. } = task.work else { return };
        let (range, tried) = (task.range, task.tried.clone());
        let source = task.answers.first().map(|(replica, _)| *replica);
        let dests: Vec<ReplicaId> = match why {
            CopyFor::Reconcile { .. } => {
                self.ack_set.iter().copied().filter(|r| Some(*r) != source).collect()
            }
            CopyFor::CatchUp(replica) | CopyFor::Layer { replica, .. } => vec![replica],
            CopyFor::Repair => {
                self.checks.to_repair(id).into_iter().filter(|r| self.ack_set.contains(r)).collect()
            }
        };
        if let CopyFor::CatchUp(_) = why
            && !tried.is_empty()
        {
            self.check_later(range);
        }
        self.send_writes(id, &dests);
    }

    pub(super) fn copy_was_written(&mut self, id: u64) {
        let Some(task) = self.tasks.get(&id) else { return };
        let (Work::Copy { copy, why, .. }, range) = (task.work.clone(), task.range) else { return };
        let written: Vec<ReplicaId> =
            task.answers.iter().filter(|(_, a)| *a == Answer::Done).map(|(replica, _)| *replica).collect();
        self.drop_task(id);
        self.emit(TargetAction::CopyDone { copy });
        match why {
            CopyFor::Reconcile { region, round } => {
                self.reconcile_bytes_copied += range.len_bytes() * written.len() as u64;
                self.region_copied(region, round);
            }
            CopyFor::CatchUp(replica) | CopyFor::Layer { replica, .. } => {
                self.range_caught_up(replica, range)
            }
            CopyFor::Repair => self.repaired(id, range, &written),
        }
    }

    /// No member can read the range as a whole.
    fn copy_unreadable(&mut self, id: u64) {
        let Some(task) = self.tasks.get(&id) else { return };
        let Work::Copy { copy, why, resort } = task.work else { return };
        let range = task.range;
        match why {
            // What was good a moment ago is not now: the next check finds out.
            CopyFor::Repair => {
                self.drop_task(id);
                self.emit(TargetAction::CopyDone { copy });
                self.repaired(id, range, &[]);
            }
            CopyFor::Reconcile { .. } | CopyFor::CatchUp(_) | CopyFor::Layer { .. } if range.count > 1 => {
                self.split_copy(id)
            }
            CopyFor::Reconcile { .. } if resort == LastResort::None => self.adopt(id),
            CopyFor::Reconcile { .. } => {
                self.found(Finding::Unrepairable { range });
                self.mark_others_bad(id);
            }
            CopyFor::CatchUp(replica) | CopyFor::Layer { replica, .. } => {
                self.found(Finding::MarkedBad { replica, range });
                self.call_for_copy(id, replica, Control::MarkBad(range));
            }
        }
    }

    /// Block by block: each may verify on another member.
    fn split_copy(&mut self, id: u64) {
        let Some(task) = self.tasks.get(&id) else { return };
        let Work::Copy { copy, why, .. } = task.work else { return };
        let range = task.range;
        self.drop_task(id);
        self.emit(TargetAction::CopyDone { copy });
        match why {
            CopyFor::Reconcile { region, round } => self.region_was_split(region, round, range.count),
            CopyFor::CatchUp(replica) | CopyFor::Layer { replica, .. } => self.run_was_split(replica, range),
            CopyFor::Repair => {}
        }
        for block in range.start.0..range.end() {
            self.start_copy(why, BlockRange::new(block, 1));
        }
    }

    /// R32: the block verifies on no member, in a region that was being written at a crash: what the source's disk holds
    /// is taken for its data, as any disk would.
    fn adopt(&mut self, id: u64) {
        let Some(range) = self.tasks.get(&id).map(|task| task.range) else { return };
        let source = self.reconcile.source().filter(|source| self.is_open(*source));
        let Some(replica) = source else { return self.gated.push_back(id) };
        if let Some(task) = self.tasks.get_mut(&id)
            && let Work::Copy { resort, .. } = &mut task.work
        {
            *resort = LastResort::Adopted;
        }
        self.found(Finding::Adopted { replica, range });
        self.call_for_copy(id, replica, Control::Adopt(range));
    }

    /// R20 for a block that its source cannot read: what the others have of it counts for nothing, and is not to come back
    /// beside what the source has, should they be able to read it again. A read of it is an error, never old data (R33).
    fn mark_others_bad(&mut self, id: u64) {
        let Some(range) = self.tasks.get(&id).map(|task| task.range) else { return };
        let source = self.reconcile.source();
        let others: Vec<ReplicaId> = self.ack_set.iter().copied().filter(|r| Some(*r) != source).collect();
        let (marks, open) = (self.guards.unreadrec, others.iter().all(|r| self.is_open(*r)));
        let Some(task) = self.tasks.get_mut(&id) else { return };
        if !open {
            // It leaves, or is back soon; the block is tried once more then.
            (task.stage, task.tried) = (Stage::Gate, BTreeSet::new());
            return self.gated.push_back(id);
        }
        if let Work::Copy { resort, .. } = &mut task.work {
            *resort = LastResort::MarkedBad;
        }
        task.answers = others.iter().map(|replica| (*replica, Answer::Pending)).collect();
        if others.is_empty() || !marks {
            return self.copy_given_up(id);
        }
        task.stage = Stage::Calls(others.len());
        for replica in others {
            self.send_control(replica, CallKind::Task(id), Control::MarkBad(range));
        }
    }

    fn copy_given_up(&mut self, id: u64) {
        let Some(task) = self.tasks.get(&id) else { return };
        let Work::Copy { copy, why: CopyFor::Reconcile { region, round }, .. } = task.work else { return };
        self.drop_task(id);
        self.emit(TargetAction::CopyDone { copy });
        self.region_copied(region, round);
    }

    fn call_for_copy(&mut self, id: u64, replica: ReplicaId, op: Control) {
        if let Some(task) = self.tasks.get_mut(&id) {
            task.stage = Stage::Calls(1);
        }
        self.send_control(replica, CallKind::Task(id), op);
    }

    /// Adopted: read again. Marked bad: nothing is left to do, unless one of those that were told is gone.
    pub(super) fn copy_call_ended(&mut self, id: u64) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        let marked = |(replica, answer): &(ReplicaId, Answer)| {
            *answer == Answer::Done || !self.ack_set.contains(replica)
        };
        match task.work {
            Work::Copy { resort: LastResort::MarkedBad, .. } if task.answers.iter().all(marked) => {
                self.copy_given_up(id);
            }
            Work::Copy { resort: LastResort::MarkedBad, .. } => {
                task.stage = Stage::Gate;
                task.tried.clear();
                self.gated.push_back(id);
            }
            Work::Copy { why: CopyFor::CatchUp(_) | CopyFor::Layer { .. }, .. } => self.copy_was_written(id),
            Work::Copy { .. }
            | Work::Check { .. }
            | Work::Read { .. }
            | Work::Write { .. }
            | Work::Zero { .. } => {
                task.stage = Stage::Read;
                task.tried.clear();
                self.send_copy_read(id);
            }
        }
    }

    /// Ends the copies to a replica that is gone.
    pub(super) fn cancel_catch_up_copies(&mut self) {
        self.cancel_copies(|why, _| matches!(why, CopyFor::CatchUp(_) | CopyFor::Layer { .. }));
    }

    /// Ends the copies of rounds that are over. What was sent to members goes on, and counts for nothing.
    pub(super) fn cancel_reconcile_copies(&mut self) {
        self.cancel_copies(|why, stage| matches!(why, CopyFor::Reconcile { .. }) && stage != Stage::Write);
    }

    fn cancel_copies(&mut self, cancels: impl Fn(CopyFor, Stage) -> bool) {
        let copies: Vec<(u64, CopyId)> = self
            .tasks
            .iter()
            .filter_map(|(id, task)| match task.work {
                Work::Copy { copy, why, .. } if cancels(why, task.stage) => Some((*id, copy)),
                _ => None,
            })
            .collect();
        for (id, copy) in copies {
            self.drop_task(id);
            self.emit(TargetAction::CopyDone { copy });
        }
    }

    /// Tasks that were sent to the replicas and are not over.
    pub(super) fn begun_tasks(&self) -> impl Iterator<Item = (u64, BlockRange)> + '_ {
        self.tasks.iter().filter(|(_, task)| task.stage == Stage::Write).map(|(id, task)| (*id, task.range))
    }
}
