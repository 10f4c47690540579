//! The copies of the record that the replicas keep (ADR 0011).

use super::jobs::SNAPSHOT;
use super::*;

impl Bench {
    fn keep_nothing(mut self) -> Self {
        self.keeps = false;
        self
    }

    /// The copies that were sent: the call, to whom, and of which version.
    fn copies(&mut self) -> Vec<(CallId, ReplicaId, RecordVersion)> {
        let mut copies = Vec::new();
        while let Some((call, replica, Control::KeepRecord(record))) =
            self.control_of(|op| matches!(op, Control::KeepRecord(_)))
        {
            assert_eq!(record.record, self.store.record);
            copies.push((call, replica, record.version));
        }
        copies
    }

    fn kept(&mut self, copies: &[(CallId, ReplicaId, RecordVersion)]) {
        for (call, ..) in copies {
            self.event(TargetEvent::ControlDone { call: *call });
        }
    }

    fn has_ended(&mut self) -> bool {
        self.take(|a| matches!(a, TargetAction::JobDone { result: Ok(()), .. })).is_some()
    }

    fn freeze_all(&mut self) {
        self.flushed();
        let freezes = self.asked(&Control::Freeze { snapshot: SNAPSHOT });
        self.done(&freezes);
        self.store();
    }
}

#[test]
fn a_session_and_an_epoch_carry_the_record_that_they_are_of() {
    let mut bench = mk_bench(2);
    bench.store();
    for replica in 1..=2 {
        let Some(TargetAction::Open(open)) = bench
            .actions
            .iter()
            .find(|a| matches!(a, TargetAction::Open(o) if o.replica == ReplicaId(replica)))
        else {
            panic!("replica {replica} is not opened")
        };
        assert_eq!(*open.record, bench.store, "with the generation that the target took");
    }
    let mut bench = mk_serving(2).keep_nothing();
    let session = bench.target.peers[&ReplicaId(2)].session().unwrap().id;
    bench.event(TargetEvent::SessionLost { session });
    bench.request(1, WRITE);
    bench.store();
    let told = bench.control_of(|op| matches!(op, Control::SetEpoch { .. }));
    let Some((_, ReplicaId(1), Control::SetEpoch { record, .. })) = told else { panic!("{told:?}") };
    assert_eq!(*record, bench.store);
    assert_eq!(bench.copies(), [], "it needs no second message");
}

#[test]
fn a_snapshot_is_answered_and_its_layer_dropped_only_when_every_member_s_copy_says_so() {
    let mut bench = mk_serving(2).keep_nothing();
    bench.job(1, Job::CreateSnapshot { snapshot: SNAPSHOT });
    bench.store();
    let cutting = bench.copies();
    bench.kept(&cutting);
    bench.freeze_all();
    let committed = bench.copies();
    assert_eq!(committed.iter().map(|c| c.1).collect::<Vec<_>>(), [ReplicaId(1), ReplicaId(2)]);
    bench.kept(&committed[..1]);
    assert!(!bench.has_ended(), "the store may be lost now, and with it the other replica");
    bench.kept(&committed[1..]);
    assert!(bench.has_ended());

    bench.job(2, Job::DeleteSnapshot { snapshot: SNAPSHOT });
    bench.store();
    let copies = bench.copies();
    bench.kept(&copies[..1]);
    let drop = Control::DropSnapshot { snapshot: SNAPSHOT };
    assert_eq!(bench.asked(&drop), [], "a copy names the layer");
    bench.kept(&copies[1..]);
    assert_eq!(bench.asked(&drop).len(), 2);
}

#[test]
fn nothing_is_written_beyond_the_size_that_every_member_s_copy_says() {
    let mut bench = mk_serving(2).keep_nothing();
    let size_bytes = 16 << 20;
    bench.job(1, Job::Grow { size_bytes });
    let asked = bench.asked(&Control::Grow { size_bytes });
    bench.done(&asked);
    bench.store();
    let copies = bench.copies();
    let is_grown = |a: &TargetAction| matches!(a, TargetAction::Grown { .. });
    bench.kept(&copies[..1]);
    assert!(bench.take(is_grown).is_none() && !bench.has_ended());
    bench.kept(&copies[1..]);
    assert!(bench.take(is_grown).is_some() && bench.has_ended());
}

#[test]
fn what_others_changed_reaches_every_open_replica_once() {
    let mut bench = mk_serving(2).keep_nothing();
    bench.change_params(|params| params.replicas = 2);
    let copies = bench.copies();
    let version = bench.store.version;
    assert_eq!(
        copies.iter().map(|c| (c.1, c.2)).collect::<Vec<_>>(),
        [(ReplicaId(1), version), (ReplicaId(2), version)]
    );
    bench.kept(&copies);
    bench.event(TargetEvent::Tick);
    bench.job(2, Job::Reload);
    bench.store();
    assert_eq!(bench.copies(), [], "it did not change");
}
