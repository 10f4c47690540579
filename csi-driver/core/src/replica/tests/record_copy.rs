//! The copy of the record that a replica keeps (ADR 0011).

use super::*;
use crate::ids::{RecordVersion, SnapshotId};
use crate::record_copy::{CopyStamp, RecordCopy};

fn mk_copy(version: u64) -> RecordCopy {
    let stamp = CopyStamp { lineage: Lineage(9), generation: Generation(1), version: RecordVersion(version) };
    RecordCopy { stamp, json: b"{}".as_slice().into() }
}

/// The disk operations that an event leads to, each of which succeeds.
fn ops_of(replica: &mut Replica, event: ReplicaEvent) -> Vec<DiskOp> {
    replica.handle_event(1, event);
    let mut ops = Vec::new();
    while let Some(action) = replica.poll_action() {
        if let ReplicaAction::Disk { id, op } = action {
            replica.handle_event(1, ReplicaEvent::DiskDone { id, result: Ok(()) });
            ops.push(op);
        }
    }
    ops
}

#[test]
fn no_replica_knows_a_generation_or_an_epoch_or_lacks_a_layer_that_its_own_copy_does_not_know_of() {
    let mut start = mk_start();
    start.snapshots = vec![SnapshotId(70)];
    let mut replica = Replica::new(0, start);
    let request = OpenRequest { copy: Some(mk_copy(3)), ..mk_open(1, 10) };
    let event = ReplicaEvent::Open { call: ReplicaCall(1), request, token: mk_token(1) };
    let ops = ops_of(&mut replica, event);
    assert_eq!(ops[0], DiskOp::KeepRecord(mk_copy(3)));
    assert_eq!(ops[1], DiskOp::DropSnapshot { snapshot: SnapshotId(70) });
    assert!(matches!(ops[2], DiskOp::PersistMeta(_)), "{ops:?}");

    let op = ControlOp::SetEpoch {
        epoch: Epoch { number: 6, nonce: 60 },
        in_sync: BTreeSet::from([ReplicaId(1)]),
        absent: BTreeMap::from([(ReplicaId(2), EPOCH)]),
        copy: Some(mk_copy(4)),
    };
    let event = ReplicaEvent::Control { call: ReplicaCall(2), key: mk_key(1, 10), op };
    let ops = ops_of(&mut replica, event);
    assert_eq!(ops[0], DiskOp::KeepRecord(mk_copy(4)));
    assert!(matches!(ops.last(), Some(DiskOp::PersistMeta(_))), "{ops:?}");
}

#[test]
fn r5_a_copy_of_the_record_is_taken_from_the_session_s_owner_only() {
    let mut replica = Replica::new(0, mk_start());
    open(&mut replica, 0, 1, 10);
    let keep = |generation, target| ReplicaEvent::Control {
        call: ReplicaCall(2),
        key: mk_key(generation, target),
        op: ControlOp::KeepRecord(mk_copy(4)),
    };
    assert_eq!(ops_of(&mut replica, keep(1, 11)), []);
    assert_eq!(ops_of(&mut replica, keep(1, 10)), [DiskOp::KeepRecord(mk_copy(4))]);
}
