//! The coordinator of a group: snapshots of several volumes, all of one instant (R29).
//!
//! ```text
//!  reading ─> claiming ─> holding ─> confirming ─> cutting ─> committing ─> done
//!     │       record:     Hold on    record:       Cut on     record:
//!     │       holding     every      cutting       every      committed
//!     │          ^        member        │          member        │
//!     │          │           └────────┬─┴────────────┘           └> taken over
//!     │          │ another's          v a member refused, or was silent
//!     └──────────┴─ cleaning <── abandoning ──────> cleaning ──> forgetting ──> error
//!                   Release,     record: abandoned               record gone
//!                   Delete
//! ```
//!
//! Promised: a committed group is one instant of all its members. Whatever a client began after it was told that a write
//! to one member is done is in the group only if that write is (no effect without its cause).
//!
//! Who may break it: a client that acts between two members' cuts. So nobody is asked to cut before all hold
//! (`holdfirst`), and a member that let a write go meanwhile refuses to cut (`unbroken`, in the target). The moment at
//! which the last Hold was answered is the instant: no member had a write in flight or began one from its hold to its cut.
//! Clocks play no part: a hold that lasts too long costs the group, not the promise.
//!
//! A coordinator may die at any point, be repeated, or run beside another one that does not know of it. The record decides,
//! by compare-and-swap: each start draws snapshot ids of its own, and whoever finds a record of other ids in `holding` or
//! `cutting` abandons it first and deletes after (`abandonfirst`). From then on that try cannot commit, and its coordinator
//! asks nobody to cut, as it has to swap `cutting` in before (`cutclaim`). So at the end either all snapshots are there and
//! the record says so, or none is left. A Hold that comes late ends by itself, and a Cut without a hold is refused.
//!
//! Not promised: that a group of volumes under load is cut at the first try, and anything about a member's snapshot that
//! somebody deletes on its own.

mod api;
#[cfg(test)]
mod tests;

pub use api::*;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::guards::Guards;
use crate::ids::{RecordVersion, SnapshotId, VolumeId};
use crate::target::Job;
use crate::timers;

/// One start of a coordinator, for one group and one task.
#[derive(Debug)]
pub struct Group {
    guards: Guards,
    now_ms: u64,
    config: GroupConfig,
    stage: Stage,
    /// The record as last seen, or as last swapped in.
    known: Option<VersionedGroup>,
    actions: VecDeque<GroupAction>,
    next_call: u64,
    /// The call to the store under way.
    store_call: Option<GroupCall>,
    /// What members were asked and have not answered; at most one question each.
    asked: BTreeMap<GroupCall, (VolumeId, Question)>,
    held: BTreeSet<VolumeId>,
    cut: BTreeSet<VolumeId>,
    /// Members of an abandoned try that may have a snapshot of it.
    unclean: BTreeSet<VolumeId>,
    /// Calls to the store that failed, at most [`timers::GROUP_TRIES_MAX`].
    store_tries: u32,
    /// Rounds of deletions that not all members answered, at most [`timers::GROUP_TRIES_MAX`].
    clean_tries: u32,
    /// When the pause before another try ends, or the wait for all holds.
    timer_ms: Option<u64>,
    /// Why this start's try was given up.
    failed: Option<GroupError>,
    /// Why a deletion failed last.
    not_deleted: Option<GroupError>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Reading,
    Claiming,
    Holding,
    Confirming,
    Cutting,
    Committing,
    Abandoning,
    Cleaning,
    Forgetting,
    Done,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Question {
    Hold,
    Cut,
    Release,
    Delete,
}

impl Group {
    /// Starts with a read of the record.
    #[must_use]
    pub fn new(now_ms: u64, config: GroupConfig) -> Self {
        Self::with_guards(now_ms, config, Guards::default())
    }

    #[doc(hidden)]
    #[must_use]
    pub fn with_guards(now_ms: u64, config: GroupConfig, guards: Guards) -> Self {
        let mut group = Self {
            guards,
            now_ms,
            config,
            stage: Stage::Reading,
            known: None,
            actions: VecDeque::new(),
            next_call: 0,
            store_call: None,
            asked: BTreeMap::new(),
            held: BTreeSet::new(),
            cut: BTreeSet::new(),
            unclean: BTreeSet::new(),
            store_tries: 0,
            clean_tries: 0,
            timer_ms: None,
            failed: None,
            not_deleted: None,
        };
        let size = match &group.config.task {
            GroupTask::Create(members) => members.len(),
            GroupTask::Delete => 1,
        };
        if (1..=timers::GROUP_MEMBERS_MAX).contains(&size) {
            group.read();
        } else {
            group.finish(Err(GroupError::Size(size)));
        }
        group
    }

    /// Takes an input. `now_ms` never goes back.
    pub fn handle_event(&mut self, now_ms: u64, event: GroupEvent) {
        self.now_ms = self.now_ms.max(now_ms);
        match event {
            GroupEvent::RecordRead { call, result } if self.store_call == Some(call) => {
                self.store_call = None;
                self.on_read(result);
            }
            GroupEvent::SwapAnswered { call, result } if self.store_call == Some(call) => {
                self.store_call = None;
                self.on_swapped(result);
            }
            GroupEvent::Answered { call, result } => self.on_answer(call, result),
            GroupEvent::Tick => self.on_tick(),
            GroupEvent::RecordRead { .. } | GroupEvent::SwapAnswered { .. } => {}
        }
    }

    /// The next output, until there is none.
    pub fn poll_action(&mut self) -> Option<GroupAction> {
        self.actions.pop_front()
    }

    /// When [`GroupEvent::Tick`] is wanted.
    #[must_use]
    pub fn next_timeout(&self) -> Option<u64> {
        self.timer_ms
    }

    fn call(&mut self) -> GroupCall {
        self.next_call += 1;
        GroupCall(self.next_call)
    }

    // ---- the record

    fn read(&mut self) {
        let call = self.call();
        self.store_call = Some(call);
        self.actions.push_back(GroupAction::ReadRecord { call });
    }

    fn swap(&mut self) {
        let call = self.call();
        self.store_call = Some(call);
        let expected = self.known.as_ref().map(|known| known.version);
        let record = self.wanted();
        self.actions.push_back(GroupAction::Swap { call, expected, record });
    }

    /// What the record is to be after the swap of this stage.
    fn wanted(&self) -> Option<GroupRecord> {
        match self.stage {
            Stage::Claiming => Some(self.ours(GroupState::Holding)),
            Stage::Confirming => Some(self.ours(GroupState::Cutting)),
            Stage::Committing => Some(self.ours(GroupState::Committed)),
            Stage::Abandoning => {
                self.known.as_ref().map(|k| GroupRecord { state: GroupState::Abandoned, ..k.record.clone() })
            }
            Stage::Reading
            | Stage::Holding
            | Stage::Cutting
            | Stage::Cleaning
            | Stage::Forgetting
            | Stage::Done => None,
        }
    }

    fn ours(&self, state: GroupState) -> GroupRecord {
        let GroupConfig { group_id, name, asked_unix_ms, .. } = &self.config;
        GroupRecord {
            format: GROUP_FORMAT,
            group_id: *group_id,
            name: name.clone(),
            asked_unix_ms: *asked_unix_ms,
            snapshots: self.members(),
            state,
        }
    }

    fn members(&self) -> BTreeMap<VolumeId, SnapshotId> {
        match &self.config.task {
            GroupTask::Create(members) => members.clone(),
            GroupTask::Delete => BTreeMap::new(),
        }
    }

    fn on_swapped(&mut self, result: Result<RecordVersion, GroupStoreError>) {
        match result {
            Ok(version) => {
                self.known = self.wanted().map(|record| VersionedGroup { version, record });
                self.swapped();
            }
            Err(error) => self.store_failed(error),
        }
    }

    /// Whatever a swap was answered, a read says what came of it.
    fn store_failed(&mut self, error: GroupStoreError) {
        self.store_tries += 1;
        if self.store_tries >= timers::GROUP_TRIES_MAX {
            return self.finish(Err(error.into()));
        }
        match error {
            GroupStoreError::Conflict => self.read(),
            GroupStoreError::Unknown(_) => self.timer_ms = Some(self.now_ms + timers::GROUP_RETRY_MS),
        }
    }

    fn on_read(&mut self, result: Result<Option<VersionedGroup>, GroupStoreError>) {
        let found = match result {
            Ok(found) => found,
            Err(error) => return self.store_failed(error),
        };
        let version = |group: &Option<VersionedGroup>| group.as_ref().map(|group| group.version);
        if found.is_some() && version(&found) < version(&self.known) {
            return self.store_failed(GroupStoreError::Unknown("it gave an older version".to_owned()));
        }
        if self.stage == Stage::Reading {
            self.known = found;
            return self.decide();
        }
        let record = |group: &Option<VersionedGroup>| group.as_ref().map(|group| group.record.clone());
        if record(&found) == self.wanted() {
            self.known = found;
            self.swapped();
        } else if record(&found) == record(&self.known) {
            self.known = found;
            self.swap();
        } else if self.stage == Stage::Abandoning && self.failed.is_none() {
            // It went on while it was to be abandoned.
            self.known = found;
            self.decide();
        } else {
            let error = self.failed.take().unwrap_or(GroupError::TakenOver);
            self.finish(Err(error));
        }
    }

    /// What follows from a record that is not this start's.
    fn decide(&mut self) {
        let Some(VersionedGroup { record, .. }) = &self.known else {
            return match self.config.task {
                GroupTask::Create(_) => self.enter(Stage::Claiming),
                GroupTask::Delete => self.finish(Ok(BTreeMap::new())),
            };
        };
        if record.format > GROUP_FORMAT {
            let format = record.format;
            return self.finish(Err(GroupError::Format(format)));
        }
        match (&self.config.task, record.state) {
            (GroupTask::Create(members), GroupState::Committed) => {
                let same = record.snapshots.keys().eq(members.keys());
                let result = if same { Ok(record.snapshots.clone()) } else { Err(GroupError::OtherMembers) };
                self.finish(result);
            }
            (_, GroupState::Abandoned) => self.enter(Stage::Cleaning),
            (GroupTask::Create(_), GroupState::Holding | GroupState::Cutting)
            | (GroupTask::Delete, GroupState::Holding | GroupState::Cutting | GroupState::Committed) => {
                self.enter(Stage::Abandoning);
            }
        }
    }

    /// The record is as this stage wanted it.
    fn swapped(&mut self) {
        match self.stage {
            Stage::Claiming => self.enter(Stage::Holding),
            Stage::Confirming => self.enter(Stage::Cutting),
            Stage::Committing => self.finish(Ok(self.members())),
            Stage::Abandoning => self.enter(Stage::Cleaning),
            Stage::Forgetting => {
                let result = self.failed.take().map_or_else(|| Ok(BTreeMap::new()), Err);
                self.finish(result);
            }
            Stage::Reading | Stage::Holding | Stage::Cutting | Stage::Cleaning | Stage::Done => {}
        }
    }

    // ---- the members

    fn enter(&mut self, stage: Stage) {
        self.stage = stage;
        self.timer_ms = None;
        match stage {
            Stage::Reading => self.read(),
            Stage::Claiming | Stage::Confirming | Stage::Committing | Stage::Forgetting => self.swap(),
            Stage::Abandoning if !self.guards.abandonfirst => {
                if let Some(known) = &mut self.known {
                    known.record.state = GroupState::Abandoned;
                }
                self.asked.clear();
                self.enter(Stage::Cleaning);
            }
            Stage::Abandoning => {
                self.asked.clear();
                self.swap();
            }
            Stage::Holding => {
                // The first to hold may have ended its hold by then.
                let hold_ms = self.config.hold_ms.min(timers::GROUP_HOLD_MAX_MS);
                self.timer_ms = Some(self.now_ms + hold_ms);
                self.ask_all(&self.members(), Question::Hold);
            }
            Stage::Cutting if self.failed.is_some() => self.enter(Stage::Abandoning),
            Stage::Cutting if self.guards.holdfirst => self.ask_all(&self.members(), Question::Cut),
            Stage::Cutting => self.commit_if_all_cut(),
            Stage::Cleaning => {
                self.unclean = self.abandoned().keys().copied().collect();
                self.clean();
            }
            Stage::Done => {}
        }
    }

    fn ask_all(&mut self, members: &BTreeMap<VolumeId, SnapshotId>, question: Question) {
        for (volume, snapshot) in members {
            self.ask(*volume, *snapshot, question);
        }
    }

    fn ask(&mut self, volume: VolumeId, snapshot: SnapshotId, question: Question) {
        let what = match question {
            Question::Hold => Job::Hold { snapshot, hold_ms: self.config.hold_ms },
            Question::Cut => Job::Cut { snapshot },
            Question::Release => Job::Release { snapshot },
            Question::Delete => Job::DeleteSnapshot { snapshot },
        };
        let call = self.call();
        self.asked.insert(call, (volume, question));
        self.actions.push_back(GroupAction::Ask { call, volume, what });
    }

    fn on_answer(&mut self, call: GroupCall, result: Result<(), MemberError>) {
        let Some((volume, question)) = self.asked.remove(&call) else { return };
        match (question, result) {
            (Question::Hold | Question::Cut, Err(error)) => self.give_up(volume, error),
            (Question::Hold, Ok(())) => {
                self.held.insert(volume);
                if !self.guards.holdfirst
                    && let Some(snapshot) = self.members().get(&volume)
                {
                    self.ask(volume, *snapshot, Question::Cut);
                }
                if self.held.len() == self.members().len() {
                    self.enter(if self.guards.cutclaim { Stage::Confirming } else { Stage::Cutting });
                }
            }
            (Question::Cut, Ok(())) => {
                self.cut.insert(volume);
                self.commit_if_all_cut();
            }
            // A deletion waits behind a hold that was not released.
            (Question::Release, _) => {
                if let Some(snapshot) = self.abandoned().get(&volume) {
                    self.ask(volume, *snapshot, Question::Delete);
                }
            }
            (Question::Delete, result) => {
                match result {
                    Ok(()) => {
                        self.unclean.remove(&volume);
                    }
                    Err(error) => self.not_deleted = Some(GroupError::Member { volume, error }),
                }
                if self.asked.is_empty() {
                    self.cleaned();
                }
            }
        }
    }

    fn commit_if_all_cut(&mut self) {
        if self.stage == Stage::Cutting && self.cut.len() == self.members().len() {
            self.enter(Stage::Committing);
        }
    }

    /// Nothing of this try counts any more.
    fn give_up(&mut self, volume: VolumeId, error: MemberError) {
        self.failed.get_or_insert(GroupError::Member { volume, error });
        if matches!(self.stage, Stage::Holding | Stage::Cutting) {
            self.enter(Stage::Abandoning);
        }
    }

    /// The snapshots of a try that was abandoned.
    fn abandoned(&self) -> BTreeMap<VolumeId, SnapshotId> {
        let record = self.known.as_ref().map(|known| &known.record);
        record.filter(|r| r.state == GroupState::Abandoned).map(|r| r.snapshots.clone()).unwrap_or_default()
    }

    fn clean(&mut self) {
        let mut left = self.abandoned();
        left.retain(|volume, _| self.unclean.contains(volume));
        self.ask_all(&left, Question::Release);
        if left.is_empty() {
            self.all_clean();
        }
    }

    /// Every member has answered.
    fn cleaned(&mut self) {
        if self.unclean.is_empty() {
            return self.all_clean();
        }
        self.clean_tries += 1;
        if self.clean_tries < timers::GROUP_TRIES_MAX {
            self.timer_ms = Some(self.now_ms + timers::GROUP_RETRY_MS);
            return;
        }
        // The record stays abandoned: the next start goes on here.
        let error = self.failed.take().or_else(|| self.not_deleted.take()).unwrap_or(GroupError::TakenOver);
        self.finish(Err(error));
    }

    fn all_clean(&mut self) {
        let creates = matches!(self.config.task, GroupTask::Create(_));
        self.enter(if creates && self.failed.is_none() { Stage::Claiming } else { Stage::Forgetting });
    }

    fn on_tick(&mut self) {
        if self.timer_ms.is_none_or(|at_ms| at_ms > self.now_ms) {
            return;
        }
        self.timer_ms = None;
        match self.stage {
            Stage::Holding => {
                let late = self.members().into_keys().find(|volume| !self.held.contains(volume));
                if let Some(volume) = late {
                    self.give_up(volume, MemberError::Silent);
                }
            }
            Stage::Cleaning => self.clean(),
            Stage::Reading
            | Stage::Claiming
            | Stage::Confirming
            | Stage::Committing
            | Stage::Abandoning
            | Stage::Forgetting => self.read(),
            Stage::Cutting | Stage::Done => {}
        }
    }

    fn finish(&mut self, result: Result<BTreeMap<VolumeId, SnapshotId>, GroupError>) {
        self.stage = Stage::Done;
        self.timer_ms = None;
        self.asked.clear();
        self.actions.push_back(GroupAction::Done { result });
    }
}
