//! The coordinator step by step (R29).

use super::*;
use crate::ids::GroupId;
use crate::target::JobError;

const GROUP: GroupId = GroupId(9);
const HOLD_MS: u64 = 1_000;

/// The store of group records: one record under compare-and-swap, whose versions are never used twice.
#[derive(Debug, Default)]
struct Store {
    last: u64,
    group: Option<VersionedGroup>,
}

impl Store {
    fn swap(
        &mut self,
        expected: Option<RecordVersion>,
        record: Option<GroupRecord>,
    ) -> Result<RecordVersion, GroupStoreError> {
        if self.group.as_ref().map(|group| group.version) != expected {
            return Err(GroupStoreError::Conflict);
        }
        self.last += 1;
        let version = RecordVersion(self.last);
        self.group = record.map(|record| VersionedGroup { version, record });
        Ok(version)
    }

    fn state(&self) -> Option<GroupState> {
        self.group.as_ref().map(|group| group.record.state)
    }
}

type Asked = (GroupCall, VolumeId, Job);

struct Bench {
    group: Group,
    now_ms: u64,
    asked: Vec<Asked>,
    swaps: Vec<(GroupCall, Option<RecordVersion>, Option<GroupRecord>)>,
    done: Option<Result<BTreeMap<VolumeId, SnapshotId>, GroupError>>,
}

impl Bench {
    fn start(task: GroupTask) -> Self {
        let config =
            GroupConfig { group_id: GROUP, name: String::new(), asked_unix_ms: 0, task, hold_ms: HOLD_MS };
        let group = Group::new(0, config);
        Self { group, now_ms: 0, asked: Vec::new(), swaps: Vec::new(), done: None }
    }

    fn create(ids: [u128; 2]) -> Self {
        Self::start(GroupTask::Create(mk_snapshots(ids)))
    }

    fn event(&mut self, event: GroupEvent) {
        self.group.handle_event(self.now_ms, event);
    }

    /// Answers reads; swaps are kept for [`Self::swap`].
    fn drain(&mut self, store: &Store) {
        while let Some(action) = self.group.poll_action() {
            match action {
                GroupAction::ReadRecord { call } => {
                    self.event(GroupEvent::RecordRead { call, result: Ok(store.group.clone()) });
                }
                GroupAction::Swap { call, expected, record } => self.swaps.push((call, expected, record)),
                GroupAction::Ask { call, volume, what } => self.asked.push((call, volume, what)),
                GroupAction::Done { result } => self.done = Some(result),
            }
        }
    }

    /// Carries the store's part out until the members have to do something.
    fn store(&mut self, store: &mut Store) {
        self.drain(store);
        while let Some((call, expected, record)) = self.swaps.pop() {
            let result = store.swap(expected, record);
            self.event(GroupEvent::SwapAnswered { call, result });
            self.drain(store);
        }
    }

    fn answer(&mut self, asked: &Asked, result: Result<(), MemberError>) {
        self.event(GroupEvent::Answered { call: asked.0, result });
    }

    /// Members do what they are asked, until nothing is asked any more.
    fn all_well(&mut self, store: &mut Store) {
        self.store(store);
        while !self.asked.is_empty() {
            for asked in std::mem::take(&mut self.asked) {
                self.answer(&asked, Ok(()));
            }
            self.store(store);
        }
    }

    fn tick(&mut self, store: &mut Store) {
        self.now_ms = self.group.next_timeout().unwrap();
        self.event(GroupEvent::Tick);
        self.store(store);
    }

    fn takes(&mut self) -> Vec<Asked> {
        std::mem::take(&mut self.asked)
    }
}

fn mk_snapshots(ids: [u128; 2]) -> BTreeMap<VolumeId, SnapshotId> {
    ids.into_iter().enumerate().map(|(at, id)| (VolumeId(at as u128 + 1), SnapshotId(id))).collect()
}

fn mk_whats(asked: &[Asked]) -> Vec<Job> {
    asked.iter().map(|(_, _, what)| *what).collect()
}

/// A group whose members hold.
fn mk_held(store: &mut Store) -> (Bench, Vec<Asked>) {
    let mut bench = Bench::create([10, 20]);
    bench.store(store);
    for hold in bench.takes() {
        bench.answer(&hold, Ok(()));
    }
    bench.store(store);
    let cuts = bench.takes();
    assert_eq!(
        mk_whats(&cuts),
        [Job::Cut { snapshot: SnapshotId(10) }, Job::Cut { snapshot: SnapshotId(20) }]
    );
    (bench, cuts)
}

fn mk_group_record(snapshots: BTreeMap<VolumeId, SnapshotId>, state: GroupState) -> GroupRecord {
    GroupRecord {
        format: GROUP_FORMAT,
        group_id: GROUP,
        name: "nightly".to_owned(),
        asked_unix_ms: 7,
        snapshots,
        state,
    }
}

#[test]
fn r29_nobody_is_asked_to_cut_before_all_hold_and_the_record_says_so() {
    let mut store = Store::default();
    let mut bench = Bench::create([10, 20]);
    bench.store(&mut store);
    let holds = bench.takes();
    let hold = |id| Job::Hold { snapshot: SnapshotId(id), hold_ms: HOLD_MS };
    assert_eq!(mk_whats(&holds), [hold(10), hold(20)]);
    assert_eq!(store.state(), Some(GroupState::Holding));
    bench.answer(&holds[1], Ok(()));
    bench.drain(&store);
    assert!(bench.asked.is_empty() && bench.swaps.is_empty(), "one member does not hold yet");
    bench.answer(&holds[0], Ok(()));
    bench.drain(&store);
    assert!(bench.asked.is_empty(), "the record does not say yet that all hold");
    bench.store(&mut store);
    assert_eq!(store.state(), Some(GroupState::Cutting));
    assert_eq!(bench.asked.len(), 2);
}

#[test]
fn r29_a_group_counts_by_one_swap_after_the_last_cut() {
    let mut store = Store::default();
    let (mut bench, cuts) = mk_held(&mut store);
    bench.answer(&cuts[0], Ok(()));
    bench.store(&mut store);
    assert_eq!((store.state(), bench.done.clone()), (Some(GroupState::Cutting), None));
    bench.answer(&cuts[1], Ok(()));
    bench.store(&mut store);
    assert_eq!(store.state(), Some(GroupState::Committed));
    assert_eq!(bench.done, Some(Ok(mk_snapshots([10, 20]))));
}

#[test]
fn r29_a_member_that_does_not_cut_inside_its_hold_costs_the_group_and_leaves_nothing() {
    let mut store = Store::default();
    let (mut bench, cuts) = mk_held(&mut store);
    bench.answer(&cuts[0], Ok(()));
    bench.answer(&cuts[1], Err(MemberError::Refused(JobError::HoldOver)));
    bench.store(&mut store);
    assert_eq!(store.state(), Some(GroupState::Abandoned), "it cannot commit any more");
    let releases = bench.takes();
    let release = |id| Job::Release { snapshot: SnapshotId(id) };
    assert_eq!(mk_whats(&releases), [release(10), release(20)]);
    for asked in releases {
        bench.answer(&asked, Ok(()));
    }
    bench.store(&mut store);
    let delete = |id| Job::DeleteSnapshot { snapshot: SnapshotId(id) };
    assert_eq!(mk_whats(&bench.asked), [delete(10), delete(20)]);
    assert_eq!(bench.done, None);
    bench.all_well(&mut store);
    assert_eq!(store.state(), None);
    let error = MemberError::Refused(JobError::HoldOver);
    assert_eq!(bench.done, Some(Err(GroupError::Member { volume: VolumeId(2), error })));
}

#[test]
fn r29_members_that_do_not_hold_within_the_first_ones_hold_cost_the_group() {
    let mut store = Store::default();
    let mut bench = Bench::create([10, 20]);
    bench.store(&mut store);
    let holds = bench.takes();
    bench.answer(&holds[0], Ok(()));
    bench.tick(&mut store);
    assert_eq!(bench.now_ms, HOLD_MS);
    assert_eq!(store.state(), Some(GroupState::Abandoned));
    // Late: it must not bring the group back.
    bench.answer(&holds[1], Ok(()));
    bench.all_well(&mut store);
    assert_eq!(store.state(), None);
    let error = MemberError::Silent;
    assert_eq!(bench.done, Some(Err(GroupError::Member { volume: VolumeId(2), error })));
}

#[test]
fn a_group_that_was_committed_is_a_success_with_its_first_snapshots_and_other_members_are_refused() {
    let mut store = Store::default();
    Bench::create([10, 20]).all_well(&mut store);
    let mut again = Bench::create([30, 40]);
    again.store(&mut store);
    assert!(again.asked.is_empty());
    assert_eq!(again.done, Some(Ok(mk_snapshots([10, 20]))));
    let other = BTreeMap::from([(VolumeId(7), SnapshotId(50))]);
    let mut other = Bench::start(GroupTask::Create(other));
    other.store(&mut store);
    assert_eq!(other.done, Some(Err(GroupError::OtherMembers)));
}

#[test]
fn r29_what_a_dead_coordinator_left_is_abandoned_and_deleted_before_the_next_try_under_other_ids() {
    let mut store = Store::default();
    let (mut dead, cuts) = mk_held(&mut store);
    dead.answer(&cuts[0], Ok(()));
    let mut next = Bench::create([30, 40]);
    next.store(&mut store);
    assert_eq!(store.state(), Some(GroupState::Abandoned));
    assert_eq!(next.asked.len(), 2);
    // It was not dead: it may not commit any more, and leaves the deleting to the other.
    dead.answer(&cuts[1], Ok(()));
    dead.store(&mut store);
    assert_eq!(dead.done, Some(Err(GroupError::TakenOver)));
    assert!(dead.asked.is_empty());
    next.all_well(&mut store);
    assert_eq!(store.state(), Some(GroupState::Committed));
    assert_eq!(next.done, Some(Ok(mk_snapshots([30, 40]))));
}

#[test]
fn r29_a_coordinator_that_was_replaced_while_its_members_began_to_hold_asks_nobody_to_cut() {
    let mut store = Store::default();
    let mut old = Bench::create([10, 20]);
    old.store(&mut store);
    let holds = old.takes();
    let mut next = Bench::create([30, 40]);
    next.store(&mut store);
    for hold in holds {
        old.answer(&hold, Ok(()));
    }
    old.store(&mut store);
    assert!(old.asked.is_empty(), "{:?}", old.asked);
    assert_eq!(old.done, Some(Err(GroupError::TakenOver)));
}

#[test]
fn r29_a_group_that_commits_while_it_is_to_be_abandoned_is_kept() {
    let mut store = Store::default();
    let (mut first, cuts) = mk_held(&mut store);
    let mut twin = Bench::create([30, 40]);
    // It has read "cutting" and is about to swap.
    twin.drain(&store);
    for cut in &cuts {
        first.answer(cut, Ok(()));
    }
    first.store(&mut store);
    twin.store(&mut store);
    assert!(twin.asked.is_empty());
    assert_eq!(twin.done, Some(Ok(mk_snapshots([10, 20]))));
    assert_eq!(store.state(), Some(GroupState::Committed));
}

#[test]
fn a_swap_without_an_answer_is_read_back_and_never_taken_for_refused() {
    for applied in [true, false] {
        let mut store = Store::default();
        let (mut bench, cuts) = mk_held(&mut store);
        for cut in &cuts {
            bench.answer(cut, Ok(()));
        }
        bench.drain(&store);
        let (call, expected, record) = bench.swaps.pop().unwrap();
        if applied {
            store.swap(expected, record).unwrap();
        }
        let result = Err(GroupStoreError::Unknown("timed out".to_owned()));
        bench.event(GroupEvent::SwapAnswered { call, result });
        bench.tick(&mut store);
        assert_eq!(store.state(), Some(GroupState::Committed), "{applied}");
        assert_eq!(bench.done, Some(Ok(mk_snapshots([10, 20]))));
    }
}

#[test]
fn a_store_that_never_answers_ends_the_start_and_the_next_one_goes_on() {
    let mut store = Store::default();
    let (mut bench, cuts) = mk_held(&mut store);
    for cut in &cuts {
        bench.answer(cut, Ok(()));
    }
    let silent = || GroupStoreError::Unknown("timed out".to_owned());
    let mut calls = 0;
    loop {
        match bench.group.poll_action() {
            Some(GroupAction::Swap { call, .. }) => {
                calls += 1;
                bench.event(GroupEvent::SwapAnswered { call, result: Err(silent()) });
            }
            Some(GroupAction::ReadRecord { call }) => {
                calls += 1;
                bench.event(GroupEvent::RecordRead { call, result: Err(silent()) });
            }
            Some(GroupAction::Done { result }) => {
                assert_eq!(result, Err(GroupError::Store(silent())));
                break;
            }
            Some(GroupAction::Ask { .. }) => panic!("a member was asked"),
            None => {
                bench.now_ms = bench.group.next_timeout().unwrap();
                bench.event(GroupEvent::Tick);
            }
        }
    }
    assert_eq!(calls, timers::GROUP_TRIES_MAX);
    let mut next = Bench::create([30, 40]);
    next.all_well(&mut store);
    assert_eq!(next.done, Some(Ok(mk_snapshots([30, 40]))));
}

#[test]
fn a_member_that_is_away_is_asked_to_delete_again_and_at_the_limit_the_record_stays_for_the_next_start() {
    let mut store = Store::default();
    Bench::create([10, 20]).all_well(&mut store);
    let mut bench = Bench::start(GroupTask::Delete);
    bench.store(&mut store);
    assert_eq!(store.state(), Some(GroupState::Abandoned), "a group that lacks a member does not count");
    let mut rounds = 0;
    while bench.done.is_none() {
        for asked in bench.takes() {
            let here = asked.1 == VolumeId(1);
            bench.answer(&asked, if here { Ok(()) } else { Err(MemberError::Silent) });
            bench.store(&mut store);
        }
        if bench.asked.is_empty() && bench.done.is_none() {
            rounds += 1;
            bench.tick(&mut store);
            assert!(bench.asked.iter().all(|(_, volume, _)| *volume == VolumeId(2)), "the other is clean");
        }
    }
    assert_eq!(rounds + 1, timers::GROUP_TRIES_MAX);
    let error = GroupError::Member { volume: VolumeId(2), error: MemberError::Silent };
    assert_eq!(bench.done, Some(Err(error)));
    assert_eq!(store.state(), Some(GroupState::Abandoned));
    let mut next = Bench::start(GroupTask::Delete);
    next.all_well(&mut store);
    assert_eq!((next.done, store.state()), (Some(Ok(BTreeMap::new())), None));
}

#[test]
fn deleting_a_group_that_is_not_there_is_a_success() {
    let mut bench = Bench::start(GroupTask::Delete);
    bench.store(&mut Store::default());
    assert_eq!(bench.done, Some(Ok(BTreeMap::new())));
}

#[test]
fn a_group_of_none_or_too_many_is_refused_before_anything_is_asked() {
    let many = timers::GROUP_MEMBERS_MAX + 1;
    for size in [0, many] {
        let members = (0..size as u128).map(|at| (VolumeId(at), SnapshotId(at))).collect();
        let mut bench = Bench::start(GroupTask::Create(members));
        bench.drain(&Store::default());
        assert_eq!(bench.done, Some(Err(GroupError::Size(size))));
    }
}

#[test]
fn a_record_of_a_later_program_is_left_alone() {
    let mut store = Store::default();
    let snapshots = mk_snapshots([10, 20]);
    let format = GROUP_FORMAT + 1;
    let record = GroupRecord { format, ..mk_group_record(snapshots, GroupState::Cutting) };
    store.swap(None, Some(record.clone())).unwrap();
    let mut bench = Bench::create([30, 40]);
    bench.store(&mut store);
    assert_eq!(bench.done, Some(Err(GroupError::Format(format))));
    assert_eq!(store.group.unwrap().record, record);
}

#[test]
fn a_record_survives_its_text_form() {
    let snapshots = mk_snapshots([10, 20]);
    let record = mk_group_record(snapshots, GroupState::Committed);
    let text = serde_json::to_string(&record).unwrap();
    assert_eq!(serde_json::from_str::<GroupRecord>(&text).unwrap(), record);
}
