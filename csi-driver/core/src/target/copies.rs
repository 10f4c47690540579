//! Copying a range from one replica to others, under the range lock and through the intent log (R13, R18).

use crate::block_range::BlockRange;
use crate::ids::{Region, ReplicaId};
use crate::replica::DataOp;

use super::peers::IoOwner;
use super::tasks::{Stage, Work};
use super::{CopyId, Payload, Target, TargetAction};

/// Why something is copied, and to whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CopyFor {
    /// From the round's source to all other members (R20).
    Reconcile { region: Region, round: u64 },
    /// From any member to the returning replica (R23).
    CatchUp(ReplicaId),
}

impl Target {
    pub(super) fn start_copy(&mut self, why: CopyFor, range: BlockRange) {
        let copy = CopyId(self.new_id());
        self.start_task(Work::Copy { copy, why }, range);
    }

    pub(super) fn send_copy_read(&mut self, id: u64) {
        let Some(task) = self.tasks.get(&id) else { return };
        let Work::Copy { copy, why } = task.work else { return };
        let (range, tried) = (task.range, task.tried.clone());
        let source = match why {
            // R20: one source; another member only for what the source cannot read (R32).
            CopyFor::Reconcile { .. } => self
                .reconcile
                .source()
                .filter(|source| !tried.contains(source) && self.is_open(*source))
                .or_else(|| if tried.is_empty() { None } else { self.choose_reader(&tried) }),
            CopyFor::CatchUp(_) => self.choose_reader(&tried),
        };
        match source {
            Some(source) => {
                if let Some(task) = self.tasks.get_mut(&id) {
                    task.answers = vec![(source, super::tasks::Answer::Pending)];
                }
                self.send_io(source, IoOwner::Task(id), DataOp::Read(range), Payload::Copy(copy));
            }
            None if self.members().iter().all(|r| tried.contains(r)) => self.copy_unreadable(id),
            None => self.gated.push_back(id),
        }
    }

    pub(super) fn copy_was_read(&mut self, id: u64) {
        let Some(task) = self.tasks.get(&id) else { return };
        let Work::Copy { why, .. } = task.work else { return };
        let source = task.answers.first().map(|(replica, _)| *replica);
        let dests: Vec<ReplicaId> = match why {
            CopyFor::Reconcile { .. } => {
                self.ack_set.iter().copied().filter(|r| Some(*r) != source).collect()
            }
            CopyFor::CatchUp(replica) => vec![replica],
        };
        self.send_writes(id, &dests);
    }

    pub(super) fn copy_was_written(&mut self, id: u64) {
        let Some(task) = self.tasks.get(&id) else { return };
        let (Work::Copy { copy, why }, range) = (task.work.clone(), task.range) else { return };
        self.drop_task(id);
        self.emit(TargetAction::CopyDone { copy });
        match why {
            CopyFor::Reconcile { region, round } => self.region_copied(region, round),
            CopyFor::CatchUp(replica) => self.range_caught_up(replica, range),
        }
    }

    /// No member can read the range.
    fn copy_unreadable(&mut self, id: u64) {
        let Some(task) = self.tasks.get(&id) else { return };
        let Work::Copy { copy, why } = task.work else { return };
        match why {
            // The members stay as they are; a read of those blocks is an error, never old data (R33).
            CopyFor::Reconcile { region, round } => {
                self.drop_task(id);
                self.emit(TargetAction::CopyDone { copy });
                self.region_copied(region, round);
            }
            // The returning replica could serve old data where the members answer an error: it does not join.
            CopyFor::CatchUp(replica) => self.expel(replica),
        }
    }

    /// Ends the copies to a replica that is gone.
    pub(super) fn cancel_catch_up_copies(&mut self) {
        let copies: Vec<(u64, CopyId)> = self
            .tasks
            .iter()
            .filter_map(|(id, task)| match task.work {
                Work::Copy { copy, why: CopyFor::CatchUp(_) } => Some((*id, copy)),
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
