//! Verifying ranges on every member and mending what does not verify (R33): after a read that failed somewhere, and by
//! the scrub.
//!
//! *Promised:* a block is only ever written over by a copy from a member where it verifies, under the lock, so that no
//! newer write is undone; two members that verify and differ are reported and left alone; a block that verifies nowhere
//! is an error to its reader, never something older.
//!
//! ```text
//! check (shared lock): verify on every member ─> verdict by block ─┬─> repair (exclusive lock): copy to those that failed
//!                                                                  └─> counted and reported only
//! ```
//!
//! Between verdict and repair the range is unlocked. A write in between makes all members equal again; the repair then
//! copies what they all have.

use std::collections::{BTreeMap, BTreeSet};

use crate::block_range::BlockRange;
use crate::ids::ReplicaId;
use crate::timers;

use super::calls::{Call, CallKind};
use super::copies::CopyFor;

use super::answers::set_answer;
use super::tasks::{Answer, Stage, Work};
use super::{CallId, Control, CorruptionCounts, Finding, Target, TargetAction};

/// What a member said of a block: a digest of its content, or that it does not verify.
type Verdict = Option<u64>;

/// Why something is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CheckFor {
    /// A member could not read it, another could.
    Repair,
    /// The task waits: no member could read all of it.
    Reader(u64),
    Scrub,
}

/// One range under check, and the repairs that follow.
#[derive(Debug)]
struct Check {
    why: CheckFor,
    range: BlockRange,
    /// Pieces whose verdicts are not complete, and repairs that are not over.
    left: usize,
}

#[derive(Debug, Default)]
pub(super) struct Checks {
    checks: BTreeMap<u64, Check>,
    /// Verdicts so far, by the task that asked.
    verdicts: BTreeMap<u64, BTreeMap<ReplicaId, Vec<Verdict>>>,
    /// Whom a repair writes to, and whom it must not read from, by its copy's task.
    repairs: BTreeMap<u64, Repair>,
    pub counts: CorruptionCounts,
}

#[derive(Debug)]
struct Repair {
    check: u64,
    bad: Vec<ReplicaId>,
}

impl Checks {
    pub(super) fn scrubs(&self) -> bool {
        self.checks.values().any(|check| check.why == CheckFor::Scrub)
    }

    /// Who failed to verify what this copy repairs.
    pub(super) fn to_repair(&self, task: u64) -> Vec<ReplicaId> {
        self.repairs.get(&task).map(|repair| repair.bad.clone()).unwrap_or_default()
    }

    pub(super) fn clear(&mut self) {
        self.checks.clear();
        self.verdicts.clear();
        self.repairs.clear();
    }
}

impl Target {
    pub(super) fn found(&mut self, finding: Finding) {
        self.checks.counts.count(finding);
        self.emit(TargetAction::Found(finding));
    }

    /// A read that another member answered: the range is checked in the background, unless too much is already (the
    /// scrub finds it then).
    pub(super) fn check_later(&mut self, range: BlockRange) {
        let known = self.checks.checks.values().any(|check| check.range.overlaps(range));
        if !known && self.checks.checks.len() < timers::CHECKS_MAX {
            self.start_check(CheckFor::Repair, range);
        }
    }

    pub(super) fn start_check(&mut self, why: CheckFor, range: BlockRange) {
        let number = self.new_id();
        let pieces: Vec<BlockRange> = pieces_of(range).collect();
        self.checks.checks.insert(number, Check { why, range, left: pieces.len() });
        for piece in pieces {
            self.start_task(Work::Check { check: number }, piece);
        }
    }

    /// The lock is held: asks every member that is there.
    pub(super) fn send_verify(&mut self, id: u64) {
        let Some(range) = self.tasks.get(&id).map(|task| task.range) else { return };
        if !self.gates.begin {
            return self.gated.push_back(id);
        }
        let members: Vec<ReplicaId> = self.deciding().into_iter().filter(|r| self.is_good(*r)).collect();
        if members.is_empty() {
            return self.gated.push_back(id);
        }
        if let Some(task) = self.tasks.get_mut(&id) {
            task.stage = Stage::Calls(members.len());
        }
        for member in members {
            self.send_control(member, CallKind::Task(id), Control::Verify(range));
        }
    }

    pub(super) fn on_verified(&mut self, call: CallId, blocks: Vec<Verdict>) {
        let Some(Call { replica, kind: CallKind::Task(id) }) = self.take_call(call) else { return };
        let Some(task) = self.tasks.get(&id) else { return };
        if blocks.len() as u64 == task.range.count {
            self.checks.verdicts.entry(id).or_default().insert(replica, blocks);
        }
        self.task_call_ended(id);
    }

    /// A replica did what a task asked of it.
    pub(super) fn task_call_done(&mut self, id: u64, replica: ReplicaId) {
        if let Some(task) = self.tasks.get_mut(&id) {
            set_answer(&mut task.answers, replica, Answer::Done);
        }
        self.task_call_ended(id);
    }

    /// One of the calls that a task waits for was answered, or its replica is gone.
    pub(super) fn task_call_ended(&mut self, id: u64) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        let Stage::Calls(left) = &mut task.stage else { return };
        *left -= 1;
        if *left > 0 {
            return;
        }
        match task.work {
            Work::Check { check } => self.judge(id, check),
            Work::Copy { .. } => self.copy_call_ended(id),
            Work::Read { .. } | Work::Write { .. } | Work::Zero { .. } => {}
        }
    }

    fn judge(&mut self, id: u64, check: u64) {
        let Some(range) = self.tasks.get(&id).map(|task| task.range) else { return };
        let verdicts = self.checks.verdicts.remove(&id).unwrap_or_default();
        // Unlocked before the repairs ask for the lock.
        self.drop_task(id);
        let repairs = self.judge_blocks(range, &verdicts);
        if let Some(entry) = self.checks.checks.get_mut(&check) {
            entry.left += repairs.len();
        }
        for (range, bad) in repairs {
            self.start_repair(check, range, bad);
        }
        self.check_piece_ended(check);
    }

    /// Counts and reports; gives what is to be repaired: runs of blocks that fail on the same members.
    fn judge_blocks(
        &mut self,
        range: BlockRange,
        verdicts: &BTreeMap<ReplicaId, Vec<Verdict>>,
    ) -> Vec<(BlockRange, Vec<ReplicaId>)> {
        let mut repairs: Vec<(BlockRange, Vec<ReplicaId>)> = Vec::new();
        for (at, block) in (range.start.0..range.end()).enumerate() {
            let one = BlockRange::new(block, 1);
            let of = |replica: &ReplicaId| verdicts[replica].get(at).copied().flatten();
            let bad: Vec<ReplicaId> = verdicts.keys().filter(|r| of(r).is_none()).copied().collect();
            let good: BTreeSet<u64> = verdicts.keys().filter_map(of).collect();
            for replica in &bad {
                self.found(Finding::Corrupt { replica: *replica, range: one });
            }
            match good.len() {
                0 if bad.is_empty() => {}
                0 => self.found(Finding::Unrepairable { range: one }),
                1 if bad.is_empty() => {}
                1 => match repairs.last_mut() {
                    Some((run, of)) if run.end() == block && *of == bad => run.count += 1,
                    _ => repairs.push((one, bad)),
                },
                _ => self.found(Finding::Differing { range: one }),
            }
        }
        repairs
    }

    fn start_repair(&mut self, check: u64, range: BlockRange, bad: Vec<ReplicaId>) {
        let tried = bad.iter().copied().collect();
        let id = self.prepare_copy(CopyFor::Repair, range, tried);
        self.checks.repairs.insert(id, Repair { check, bad });
        self.ask_lock(id);
    }

    /// A repair's copy is over: `written` to those it still found in the set.
    pub(super) fn repaired(&mut self, task: u64, range: BlockRange, written: &[ReplicaId]) {
        for replica in written {
            self.found(Finding::Repaired { replica: *replica, range });
        }
        if let Some(repair) = self.checks.repairs.remove(&task) {
            self.check_piece_ended(repair.check);
        }
    }

    fn check_piece_ended(&mut self, number: u64) {
        let Some(check) = self.checks.checks.get_mut(&number) else { return };
        check.left -= 1;
        if check.left > 0 {
            return;
        }
        let why = check.why;
        self.checks.checks.remove(&number);
        self.dirty = true;
        match why {
            CheckFor::Repair => {}
            CheckFor::Reader(task) => self.read_again(task),
            CheckFor::Scrub => self.region_scrubbed(),
        }
    }
}

/// A range cut at region borders, so that no check holds more than a region.
fn pieces_of(range: BlockRange) -> impl Iterator<Item = BlockRange> {
    range.regions().map(move |region| {
        let whole = BlockRange::of_region(region);
        let start = range.start.max(whole.start);
        BlockRange { start, count: range.end().min(whole.end()) - start.0 }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_is_cut_at_regions() {
        let pieces: Vec<BlockRange> = pieces_of(BlockRange::new(250, 300)).collect();
        let expected = [(250, 6), (256, 256), (512, 38)].map(|(start, count)| BlockRange::new(start, count));
        assert_eq!(pieces, expected);
        assert_eq!(pieces_of(BlockRange::new(7, 1)).count(), 1);
    }
}
