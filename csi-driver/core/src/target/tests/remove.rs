//! Fewer replicas, and a record that others changed.

use super::*;
use crate::io_limits::IoLimits;
use crate::record::ReplicaState;

impl Bench {
    /// Somebody who is no target changes the record.
    fn change(&mut self, change: impl FnOnce(&mut VolumeRecord)) {
        change(&mut self.store.record);
        self.store.version = self.store.version.next();
    }

    fn ended(&mut self) -> Option<Result<(), JobError>> {
        match self.take(|a| matches!(a, TargetAction::JobDone { .. })) {
            Some(TargetAction::JobDone { result, .. }) => Some(result),
            _ => None,
        }
    }

    fn remove(&mut self, replica: u128) {
        self.job(1, Job::RemoveReplica { replica: ReplicaId(replica) });
    }

    fn is_given_up(&self, replica: u128) -> bool {
        self.store.record.replicas[&ReplicaId(replica)].state == ReplicaState::Faulted
    }
}

/// Three members of which two are wanted, and the target knows.
fn mk_lowered() -> Bench {
    let mut bench = mk_bench(3);
    bench.change(|record| record.params.replicas = 2);
    mk_serving_with(bench, 3)
}

#[test]
fn a_member_leaves_for_good_and_its_writes_in_flight_wait_for_the_others_and_their_epoch() {
    let mut bench = mk_lowered();
    bench.request(1, WRITE);
    let writes = bench.ios();
    assert_eq!(writes.len(), 3);
    bench.remove(3);
    for (io, replica, ..) in writes {
        if replica != ReplicaId(3) {
            bench.event(TargetEvent::IoDone { io, result: Ok(()) });
        }
    }
    assert_eq!(bench.completed(), None, "the swap is not answered (R8)");
    bench.store();
    assert!(bench.is_given_up(3));
    assert_eq!(bench.store.record.in_sync, BTreeSet::from([ReplicaId(1), ReplicaId(2)]));
    assert_eq!(bench.completed(), None, "the others do not have the epoch (R10)");
    bench.tell_all();
    assert_eq!(bench.completed(), Some(Ok(())));
    assert_eq!(bench.ended(), Some(Ok(())));
    let closed =
        bench.take(|a| matches!(a, TargetAction::CloseSession { replica, .. } if *replica == ReplicaId(3)));
    assert!(closed.is_some());
    bench.now_ms += 60_000;
    bench.event(TargetEvent::Tick);
    let opened = bench.take(|a| matches!(a, TargetAction::Open(open) if open.replica == ReplicaId(3)));
    assert!(opened.is_none(), "it is opened again (R34)");
    bench.remove(3);
    assert_eq!(bench.ended(), Some(Ok(())), "asked for again");
}

#[test]
fn r9_no_member_is_taken_out_while_another_may_have_lost_its_cache() {
    let mut bench = mk_serving(3);
    let sessions: Vec<SessionId> =
        (1..=3).map(|n| bench.target.peers[&ReplicaId(n)].session().unwrap().id).collect();
    bench.change(|record| record.params.replicas = 1);
    bench.job(2, Job::Reload);
    bench.store();
    assert_eq!(bench.ended(), Some(Ok(())));
    // Nobody is left to judge by before the first one's swap is answered: the target itself may be what is cut off.
    for session in sessions {
        bench.event(TargetEvent::SessionLost { session });
    }
    bench.remove(3);
    bench.store();
    assert_eq!(bench.store.record.in_sync, BTreeSet::from([ReplicaId(2), ReplicaId(3)]));
    assert!(!bench.is_given_up(3), "it may be the only one that kept its cache");
    bench.open(2, true);
    bench.open(3, false);
    bench.store();
    assert_eq!(bench.store.record.in_sync, BTreeSet::from([ReplicaId(3)]), "R12: those that lost it leave");
    assert!(!bench.is_given_up(3));
    assert!(matches!(bench.ended(), Some(Err(JobError::Record(_)))), "too few would stay");
}

#[test]
fn r9_no_member_that_kept_its_cache_is_taken_out_before_one_that_stays_has_reconciled_its_loss() {
    let mut bench = mk_bench(3);
    bench.change(|record| record.params.replicas = 2);
    bench.store();
    for replica in 1..=3 {
        bench.open(replica, true);
    }
    bench.store();
    bench.tell_all();
    let lost = |bench: &mut Bench, still: [bool; 3]| {
        bench.now_ms += timers::HEARTBEAT_MS;
        bench.event(TargetEvent::Tick);
        while let Some(TargetAction::Heartbeat { session, sequence, replica }) =
            bench.take(|a| matches!(a, TargetAction::Heartbeat { .. }))
        {
            let cache_lost = still[usize::try_from(replica.0 - 1).unwrap()];
            bench.event(TargetEvent::HeartbeatAnswered { session, sequence, cache_lost });
        }
    };
    lost(&mut bench, [true, true, false]);
    bench.remove(3);
    bench.store();
    assert!(!bench.is_given_up(3), "the next target would find nobody who kept his cache (R12)");
    lost(&mut bench, [true, false, false]);
    bench.event(TargetEvent::Tick);
    bench.store();
    assert!(bench.is_given_up(3), "one that stays has reconciled its loss");
}

#[test]
fn p6_a_member_that_the_volume_needs_is_not_taken_out() {
    let mut bench = mk_serving(3);
    bench.remove(3);
    bench.store();
    assert!(matches!(bench.ended(), Some(Err(JobError::Record(_)))));
    assert!(!bench.is_given_up(3));
    let mut bench = mk_lowered();
    let session = bench.target.peers[&ReplicaId(3)].session().unwrap().id;
    bench.event(TargetEvent::SessionLost { session });
    bench.store();
    bench.remove(3);
    bench.store();
    assert!(matches!(bench.ended(), Some(Err(JobError::Record(_)))), "it is out of sync already");
}

#[test]
fn what_others_changed_is_in_force_once_a_reload_is_answered() {
    let mut bench = mk_serving(1);
    let limits = IoLimits { iops: 100, bytes_per_s: 0 };
    assert_eq!(bench.target.limits(), IoLimits::default());
    bench.event(TargetEvent::Tick);
    bench.job(1, Job::Reload);
    let Some(TargetAction::ReadRecord { call }) =
        bench.take(|a| matches!(a, TargetAction::ReadRecord { .. }))
    else {
        panic!("the record is not read")
    };
    assert_eq!(bench.ended(), None);
    bench.event(TargetEvent::RecordRead { call, result: Err(StoreError::Unknown("lost".to_owned())) });
    assert_eq!(bench.ended(), None, "nothing is known");
    bench.change(|record| record.params.limits = limits);
    bench.now_ms += 5_000;
    bench.event(TargetEvent::Tick);
    bench.store();
    assert_eq!(bench.ended(), Some(Ok(())));
    assert_eq!(bench.target.limits(), limits);
}

#[test]
fn a_reload_is_not_answered_by_a_read_that_was_sent_before_it() {
    let mut bench = mk_serving(2);
    let before = bench.store.clone();
    // A replica fails: the target is degraded and looks at the record from time to time.
    let session = bench.target.peers[&ReplicaId(2)].session().unwrap().id;
    bench.event(TargetEvent::SessionLost { session });
    bench.store();
    bench.now_ms += timers::RECORD_POLL_MS + 1;
    bench.event(TargetEvent::Tick);
    let read = bench.take(|a| matches!(a, TargetAction::ReadRecord { .. }));
    let Some(TargetAction::ReadRecord { call }) = read else { panic!("no poll") };
    let stale = bench.store.clone();
    assert!(stale.version > before.version);
    bench.change(|record| record.params.limits = IoLimits { iops: 7, bytes_per_s: 0 });
    bench.job(1, Job::Reload);
    bench.event(TargetEvent::RecordRead { call, result: Ok(stale) });
    assert_eq!(bench.ended(), None, "that record is older than the call");
    bench.store();
    assert_eq!(bench.ended(), Some(Ok(())));
    assert_eq!(bench.target.limits().iops, 7);
}
