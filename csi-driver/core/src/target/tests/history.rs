//! Records that were restored from a backup (R35), members that an operator gave up (R26).

use super::super::peers::Link;
use super::*;
use crate::ids::Epoch;
use crate::timers;

const OTHER: OpenRefusal = OpenRefusal::Restored(Epoch { number: 9, nonce: 1 });

impl Bench {
    fn refuse(&mut self, replica: u128, refusal: OpenRefusal) {
        let wanted =
            |a: &TargetAction| matches!(a, TargetAction::Open(open) if open.replica == ReplicaId(replica));
        let Some(TargetAction::Open(open)) = self.take(wanted) else {
            panic!("replica {replica} is not asked")
        };
        self.event(TargetEvent::OpenRefused { session: open.session, refusal });
    }

    fn pass(&mut self, ms: u64) {
        let until = self.now_ms + ms;
        while self.now_ms < until {
            self.now_ms += 200;
            self.event(TargetEvent::Tick);
            self.beat();
        }
    }

    /// The only member is gone and comes back after so long.
    fn away_for(&mut self, ms: u64) {
        let session = self.target.peers[&ReplicaId(1)].session().unwrap().id;
        self.event(TargetEvent::SessionLost { session });
        self.store();
        self.pass(ms);
        self.let_in(1);
        self.tell_all();
        self.beat();
    }

    /// The replica answers the next Open, or the one under way.
    fn let_in(&mut self, replica: u128) {
        let session = loop {
            if let Link::Opening { session, .. } = self.target.peers[&ReplicaId(replica)].link {
                break session;
            }
            self.pass(200);
        };
        let opened = Opened {
            cache_lost: false,
            logged: vec![],
            size_bytes: self.store.record.size_bytes,
            epoch: self.store.record.epoch,
            snapshots: vec![],
        };
        self.event(TargetEvent::Opened { session, opened });
    }
}

#[test]
fn r35_what_a_replica_refuses_is_in_the_record_before_the_target_ends() {
    let mut bench = mk_bench(3);
    bench.store();
    bench.open(1, false);
    bench.open(2, false);
    bench.refuse(3, OTHER);
    assert_eq!(bench.target.state().word(), "opening");
    bench.store();
    assert!(bench.store.record.restored);
    assert_eq!(bench.target.state().word(), "failed");
    assert_eq!(bench.store.record.in_sync.len(), 3, "nobody was swapped out");
}

#[test]
fn r35_a_target_that_serves_stops_when_a_returning_replica_knows_another_history() {
    let mut bench = mk_bench(2);
    let record = &bench.store.record;
    let taken =
        transitions::take_generation(record, &NodeName("n1".to_owned()), Attachment(1), TargetId(6)).unwrap();
    bench.store.record = transitions::swap_out(&taken, TargetId(6), &[ReplicaId(2)], 7).unwrap();
    bench.store();
    bench.open(1, false);
    bench.store();
    bench.tell_all();
    bench.beat();
    assert_eq!(bench.target.state().word(), "serving");
    bench.refuse(2, OTHER);
    bench.request(1, READ);
    assert!(bench.ios().is_empty());
    bench.store();
    assert!(bench.store.record.restored);
    assert_eq!(bench.completed(), Some(Err(RequestError::Failed)));
}

#[test]
fn r35_a_suspected_record_is_trusted_again_only_when_every_replica_let_the_target_in() {
    let mut bench = mk_bench(3);
    bench.store.record.restored = true;
    bench.store();
    bench.open(1, false);
    bench.open(2, false);
    bench.pass(2 * timers::OPEN_PATIENCE_MS);
    bench.store();
    assert_eq!(bench.target.state().word(), "opening", "no patience is enough");
    assert!(bench.store.record.restored);
    bench.let_in(3);
    bench.store();
    assert!(!bench.store.record.restored);
    bench.tell_all();
    assert_eq!(bench.target.state().word(), "serving");
}

#[test]
fn r26_a_member_that_was_away_for_long_serves_only_after_the_record_was_read() {
    let mut bench = mk_serving(1);
    bench.away_for(timers::GIVEN_UP_AFTER_MS + 1_000);
    bench.request(1, READ);
    assert!(bench.ios().is_empty());
    bench.store();
    assert_eq!(bench.ios().len(), 1);
}

#[test]
fn r26_a_target_that_never_heard_of_a_promotion_goes_on_with_nobody() {
    let mut bench = mk_serving(2);
    let session = bench.target.peers[&ReplicaId(2)].session().unwrap().id;
    bench.event(TargetEvent::SessionLost { session });
    bench.store();
    bench.tell_all();
    assert_eq!(bench.store.record.in_sync.len(), 1);
    let bare = transitions::unpublish(&bench.store.record, None).unwrap();
    let record = transitions::promote(&bare, ReplicaId(2), Lineage(10), 3).unwrap();
    bench.store = Versioned { version: bench.store.version.next(), record };
    bench.away_for(timers::GIVEN_UP_AFTER_MS + 1_000);
    bench.request(1, WRITE);
    bench.store();
    assert_eq!(bench.completed(), Some(Err(RequestError::Fenced)));
}

#[test]
fn r26_a_member_that_was_away_for_a_moment_goes_on_without_the_record_store() {
    let mut bench = mk_serving(1);
    bench.away_for(2_000);
    bench.request(1, READ);
    assert_eq!(bench.ios().len(), 1);
}
