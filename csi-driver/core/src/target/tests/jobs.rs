//! Snapshots, groups and growth, step by step (R27 to R31).

use super::*;
use crate::ids::SnapshotId;
use crate::record::SnapshotState;
use crate::replica::DiskError;
use crate::timers;

pub(super) const SNAPSHOT: SnapshotId = SnapshotId(70);

impl Bench {
    pub(super) fn job(&mut self, number: u64, what: Job) {
        self.event(TargetEvent::Job { job: JobId(number), what });
    }

    fn job_end(&mut self) -> Option<Result<(), JobError>> {
        match self.take(|a| matches!(a, TargetAction::JobDone { .. })) {
            Some(TargetAction::JobDone { result, .. }) => Some(result),
            _ => None,
        }
    }

    /// Answers every flush.
    pub(super) fn flushed(&mut self) {
        let (flushes, others): (Vec<_>, Vec<_>) =
            self.ios().into_iter().partition(|(.., op)| *op == DataOp::Flush);
        assert!(others.is_empty(), "{others:?}");
        for (io, ..) in flushes {
            self.event(TargetEvent::IoDone { io, result: Ok(()) });
        }
    }

    pub(super) fn asked(&mut self, wanted: &Control) -> Vec<(CallId, ReplicaId)> {
        let mut asked = Vec::new();
        while let Some(TargetAction::Control { call, replica, .. }) =
            self.take(|a| matches!(a, TargetAction::Control { op, .. } if op == wanted))
        {
            asked.push((call, replica));
        }
        asked
    }

    pub(super) fn done(&mut self, calls: &[(CallId, ReplicaId)]) {
        for (call, _) in calls {
            self.event(TargetEvent::ControlDone { call: *call });
        }
    }

    fn snapshot_state(&self) -> Option<SnapshotState> {
        self.store.record.snapshot(SNAPSHOT).map(|entry| entry.state)
    }
}

/// A cut whose writes are held, with Freeze sent to every member.
fn mk_freezing(replicas: u128) -> (Bench, Vec<(CallId, ReplicaId)>) {
    let mut bench = mk_serving(replicas);
    bench.job(1, Job::CreateSnapshot { snapshot: SNAPSHOT });
    bench.store();
    bench.flushed();
    let freezes = bench.asked(&Control::Freeze { snapshot: SNAPSHOT });
    assert_eq!(freezes.len(), usize::try_from(replicas).unwrap());
    (bench, freezes)
}

#[test]
fn r27_a_cut_waits_for_writes_in_flight_and_holds_new_ones_until_all_are_frozen() {
    let mut bench = mk_serving(2);
    bench.request(1, WRITE);
    let writes = bench.ios();
    bench.job(1, Job::CreateSnapshot { snapshot: SNAPSHOT });
    bench.store();
    assert_eq!(bench.snapshot_state(), Some(SnapshotState::Cutting { generation: Generation(1) }));
    bench.flushed();
    let freeze = Control::Freeze { snapshot: SNAPSHOT };
    assert_eq!(bench.asked(&freeze), [], "a write is in flight");
    for (io, ..) in writes {
        bench.event(TargetEvent::IoDone { io, result: Ok(()) });
    }
    assert_eq!(bench.completed(), Some(Ok(())));
    let freezes = bench.asked(&freeze);
    assert_eq!(freezes.len(), 2);
    bench.request(2, WRITE);
    bench.done(&freezes[..1]);
    bench.store();
    assert_eq!(bench.ios(), [], "a write began inside the cut");
    assert_eq!(bench.job_end(), None);
    bench.done(&freezes[1..]);
    assert_eq!(bench.ios().len(), 2, "writes go on before the record is swapped");
    bench.store();
    assert_eq!(bench.job_end(), Some(Ok(())));
    let holders = bench.store.record.snapshot(SNAPSHOT).unwrap().holders.clone();
    assert_eq!(holders, BTreeSet::from([ReplicaId(1), ReplicaId(2)]));
}

#[test]
fn r27_of_overlapping_writes_the_one_in_flight_is_in_the_snapshot_and_those_queued_wait_for_its_end() {
    let mut bench = mk_serving(2);
    let finish = |bench: &mut Bench, ios: Vec<(IoId, ReplicaId, SessionId, DataOp)>| {
        assert_eq!(ios.len(), 2);
        for (io, ..) in ios {
            bench.event(TargetEvent::IoDone { io, result: Ok(()) });
        }
        assert_eq!(bench.completed(), Some(Ok(())));
    };
    bench.request(1, WRITE);
    let first = bench.ios();
    bench.request(2, WRITE);
    bench.job(1, Job::CreateSnapshot { snapshot: SNAPSHOT });
    bench.store();
    bench.flushed();
    bench.request(3, WRITE);
    let freeze = Control::Freeze { snapshot: SNAPSHOT };
    assert_eq!(bench.asked(&freeze), [], "a write is in flight");
    finish(&mut bench, first);
    assert_eq!(bench.ios(), [], "a write that had waited for the range began inside the hold");
    let freezes = bench.asked(&freeze);
    bench.done(&freezes);
    let second = bench.ios();
    finish(&mut bench, second);
    let third = bench.ios();
    finish(&mut bench, third);
    bench.store();
    assert_eq!(bench.job_end(), Some(Ok(())));
}

#[test]
fn r27_a_member_that_comes_back_in_the_middle_keeps_no_layer_and_is_frozen_anew() {
    let (mut bench, freezes) = mk_freezing(1);
    let session = bench.target.peers[&ReplicaId(1)].session().unwrap().id;
    bench.event(TargetEvent::SessionLost { session });
    let Some(TargetAction::Open(open)) = bench.take(|a| matches!(a, TargetAction::Open(_))) else {
        panic!("not opened again")
    };
    assert_eq!(open.snapshots, BTreeSet::new(), "its layer is of a cut that does not count yet");
    bench.done(&freezes);
    assert_eq!(bench.snapshot_state(), Some(SnapshotState::Cutting { generation: Generation(1) }));
    bench.actions.push(TargetAction::Open(open));
    bench.open(1, false);
    bench.tell_all();
    let anew = bench.asked(&Control::Freeze { snapshot: SNAPSHOT });
    assert_eq!(anew.len(), 1);
    bench.done(&anew);
    bench.store();
    assert_eq!(bench.job_end(), Some(Ok(())));
}

#[test]
fn r27_a_hold_is_bounded_and_what_was_frozen_for_nothing_is_dropped() {
    let (mut bench, freezes) = mk_freezing(2);
    bench.done(&freezes[..1]);
    bench.request(1, WRITE);
    // Both go on talking; one is slow to freeze, and nobody else could carry the set alone meanwhile.
    while bench.now_ms < timers::CUT_HOLD_MS {
        bench.now_ms += 200;
        bench.event(TargetEvent::Tick);
        bench.beat();
        bench.store();
        bench.tell_all();
        if !bench.ios().is_empty() {
            break;
        }
    }
    assert!(bench.now_ms <= timers::CUT_HOLD_MS, "writes were held for {} ms", bench.now_ms);
}

#[test]
fn r27_a_member_without_room_ends_the_cut_and_the_others_drop_their_layers() {
    let (mut bench, freezes) = mk_freezing(2);
    bench.done(&freezes[..1]);
    bench.event(TargetEvent::ControlRefused { call: freezes[1].0, error: DiskError::LayersFull });
    let drops = bench.asked(&Control::DropSnapshot { snapshot: SNAPSHOT });
    assert_eq!(drops.len(), 2);
    assert_eq!(bench.job_end(), None, "it is not over before they are gone");
    bench.done(&drops);
    bench.store();
    let error = JobError::Replica { replica: freezes[1].1, error: DiskError::LayersFull };
    assert_eq!(bench.job_end(), Some(Err(error)));
    assert_eq!(bench.snapshot_state(), None);
}

#[test]
fn r27_a_snapshot_that_was_committed_before_is_a_success_at_once() {
    let (mut bench, freezes) = mk_freezing(1);
    bench.done(&freezes);
    bench.store();
    assert_eq!(bench.job_end(), Some(Ok(())));
    bench.job(2, Job::CreateSnapshot { snapshot: SNAPSHOT });
    assert_eq!(bench.job_end(), Some(Ok(())));
}

#[test]
fn r28_a_deleted_snapshot_leaves_the_record_before_the_layers_go() {
    let (mut bench, freezes) = mk_freezing(2);
    bench.done(&freezes);
    bench.store();
    bench.job_end();
    bench.job(2, Job::DeleteSnapshot { snapshot: SNAPSHOT });
    let drop = Control::DropSnapshot { snapshot: SNAPSHOT };
    assert_eq!(bench.asked(&drop), []);
    bench.store();
    assert_eq!(bench.snapshot_state(), None);
    let drops = bench.asked(&drop);
    assert_eq!(drops.len(), 2);
    bench.done(&drops);
    assert_eq!(bench.job_end(), Some(Ok(())));
}

#[test]
fn r29_a_cut_of_a_group_counts_only_inside_its_hold() {
    let mut bench = mk_serving(1);
    bench.job(1, Job::Hold { snapshot: SNAPSHOT, hold_ms: 1_000 });
    bench.store();
    bench.flushed();
    assert_eq!(bench.job_end(), Some(Ok(())), "held");
    bench.request(1, WRITE);
    assert_eq!(bench.ios(), []);
    for _ in 0..5 {
        bench.now_ms += 200;
        bench.event(TargetEvent::Tick);
        bench.beat();
    }
    assert_eq!(bench.ios().len(), 1, "the hold ended by itself");
    bench.job(2, Job::Cut { snapshot: SNAPSHOT });
    assert_eq!(bench.job_end(), Some(Err(JobError::HoldOver)));
    bench.store();
    assert_eq!(bench.snapshot_state(), None);
}

#[test]
fn r29_a_held_volume_is_cut_when_asked_and_its_repetition_is_a_success() {
    let mut bench = mk_serving(1);
    bench.job(1, Job::Hold { snapshot: SNAPSHOT, hold_ms: 1_000 });
    bench.store();
    bench.flushed();
    bench.job_end();
    let freeze = Control::Freeze { snapshot: SNAPSHOT };
    assert_eq!(bench.asked(&freeze), []);
    bench.job(2, Job::Cut { snapshot: SNAPSHOT });
    let freezes = bench.asked(&freeze);
    bench.done(&freezes);
    bench.store();
    assert_eq!(bench.job_end(), Some(Ok(())));
    bench.job(3, Job::Cut { snapshot: SNAPSHOT });
    assert_eq!(bench.job_end(), Some(Ok(())));
}

#[test]
fn r29_a_hold_that_is_given_up_before_its_turn_holds_nothing() {
    let (mut bench, freezes) = mk_freezing(1);
    let snapshot = SnapshotId(71);
    bench.job(2, Job::Hold { snapshot, hold_ms: 1_000 });
    bench.job(3, Job::Release { snapshot });
    assert_eq!(bench.job_end(), Some(Err(JobError::HoldOver)));
    assert_eq!(bench.job_end(), Some(Ok(())));
    bench.done(&freezes);
    bench.store();
    assert_eq!(bench.job_end(), Some(Ok(())));
    assert_eq!(bench.store.record.snapshot(snapshot), None);
    bench.request(1, WRITE);
    assert_eq!(bench.ios().len(), 1);
}

#[test]
fn r31_every_member_grows_before_the_record_does() {
    let mut bench = mk_serving(2);
    let size_bytes = 16 << 20;
    bench.job(1, Job::Grow { size_bytes });
    let asked = bench.asked(&Control::Grow { size_bytes });
    bench.store();
    bench.done(&asked[..1]);
    bench.store();
    assert_eq!(bench.store.record.size_bytes, 8 << 20);
    bench.done(&asked[1..]);
    bench.store();
    assert_eq!(bench.store.record.size_bytes, size_bytes);
    assert_eq!(bench.job_end(), Some(Ok(())));
    bench.request(1, ClientOp::Write { offset: size_bytes - 4096, len: 4096, fua: false });
    assert_eq!(bench.ios().len(), 2);
}

#[test]
fn r31_a_replica_grows_one_step_at_a_time_as_the_second_could_overtake_the_first() {
    let mut bench = mk_serving(2);
    let session = bench.target.peers[&ReplicaId(2)].session().unwrap().id;
    bench.event(TargetEvent::SessionLost { session });
    let Some(TargetAction::Open(open)) = bench.take(|a| matches!(a, TargetAction::Open(_))) else {
        panic!("not opened again")
    };
    let (cache_lost, logged, snapshots) = (false, vec![], vec![]);
    let opened = Opened { cache_lost, logged, size_bytes: 4 << 20, epoch: open.epoch, snapshots };
    bench.event(TargetEvent::Opened { session: open.session, opened });
    let first = bench.asked(&Control::Grow { size_bytes: 8 << 20 });
    assert_eq!(first.iter().map(|(_, replica)| *replica).collect::<Vec<_>>(), [ReplicaId(2)]);
    let second = Control::Grow { size_bytes: 16 << 20 };
    bench.job(1, Job::Grow { size_bytes: 16 << 20 });
    bench.store();
    assert_eq!(bench.asked(&second).into_iter().map(|(_, r)| r).collect::<Vec<_>>(), [ReplicaId(1)]);
    bench.done(&first);
    assert_eq!(bench.asked(&second).into_iter().map(|(_, r)| r).collect::<Vec<_>>(), [ReplicaId(2)]);
}

#[test]
fn jobs_of_a_target_that_ends_are_answered() {
    let (mut bench, _) = mk_freezing(1);
    bench.job(2, Job::Grow { size_bytes: 16 << 20 });
    bench.event(TargetEvent::Stop);
    assert_eq!(bench.job_end(), Some(Err(JobError::Ended)));
    assert_eq!(bench.job_end(), Some(Err(JobError::Ended)));
    bench.job(3, Job::Grow { size_bytes: 16 << 20 });
    assert_eq!(bench.job_end(), Some(Err(JobError::Ended)));
}
