//! A record that is not what the replicas know (R35), and a replica that an operator makes the volume's only one (R26).
//!
//! ```text
//!          suspect                      promote: a new lineage
//!  (sound) ───────> restored ──────────────────────────────────> (sound)
//!     ^                │ trust: every replica agrees
//!     └────────────────┘
//! ```

use std::collections::BTreeSet;

use crate::ids::{Epoch, Lineage, ReplicaId, TargetId};
use crate::record::{Promotion, RECORD_FORMAT, ReplicaState, VolumeRecord};

use super::{TransitionError, check_live, check_owner, wrong_state};

/// A replica knows another history than the record: from here on no target serves before all replicas agree with it, or an
/// operator promoted one (R35). By the target that was refused.
pub fn suspect(record: &VolumeRecord, owner: TargetId) -> Result<VolumeRecord, TransitionError> {
    check_owner(record, owner)?;
    Ok(VolumeRecord { format: RECORD_FORMAT, restored: true, ..record.clone() })
}

/// Every replica that is not given up has let the target in under this record.
pub fn trust(record: &VolumeRecord, owner: TargetId) -> Result<VolumeRecord, TransitionError> {
    check_owner(record, owner)?;
    Ok(VolumeRecord { restored: false, ..record.clone() })
}

/// Makes `replica` the volume's only member, as it is, under the new `lineage` (R26): an operator's word that every member
/// is lost for ever, or that of all replicas of a restored volume this one counts (R35). All other replicas are given up,
/// since no dirty map says what they miss, and with them the snapshots that only they hold. The volume must not be
/// published: whoever wrote to the members that are lost must not go on.
///
/// The generation moves on, so that a target that still waits for one of them is fenced by the record.
pub fn promote(
    record: &VolumeRecord,
    replica: ReplicaId,
    lineage: Lineage,
    nonce: u64,
) -> Result<VolumeRecord, TransitionError> {
    check_live(record)?;
    if let Some(node) = &record.attached_to {
        return Err(TransitionError::Published { volume: record.volume_id, node: node.clone() });
    }
    if lineage == record.lineage {
        return Err(TransitionError::LineageUsed(record.volume_id));
    }
    let mut next = record.clone();
    for (id, entry) in &mut next.replicas {
        let chosen = match entry.state {
            ReplicaState::Offline { .. } => *id == replica,
            ReplicaState::InSync => *id == replica && record.restored,
            ReplicaState::Faulted => false,
        };
        entry.state = if chosen { ReplicaState::InSync } else { ReplicaState::Faulted };
    }
    if next.replicas.get(&replica).is_none_or(|entry| entry.state != ReplicaState::InSync) {
        return Err(wrong_state(record, replica, "offline"));
    }
    let held = record.held_by(replica);
    next.snapshots.retain(|snapshot| held.contains(&snapshot.id));
    // A name that went with its snapshot would give that snapshot's id to another instant.
    next.requested.retain(|request| record.snapshot(request.id).is_none() || held.contains(&request.id));
    for snapshot in &mut next.snapshots {
        snapshot.holders = BTreeSet::from([replica]);
    }
    next.format = RECORD_FORMAT;
    next.in_sync = BTreeSet::from([replica]);
    next.epoch = Epoch { number: record.epoch.number + 1, nonce };
    next.promoted = Some(Promotion { replica, from: record.lineage });
    next.lineage = lineage;
    next.restored = false;
    next.generation = record.generation.next();
    next.generation_attachment = record.attachment;
    next.target_id = None;
    Ok(next)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{NodeName, SnapshotId, VolumeId};
    use crate::record::RequestedSnapshot;
    use crate::transitions::tests::{mk_owned, mk_record};
    use crate::transitions::{add_holder, begin_cut, commit_cut, publish, swap_out, unpublish};

    const OWNER: TargetId = TargetId(7);

    #[test]
    fn r35_only_the_owner_suspects_or_trusts_a_record() {
        let record = mk_owned(2);
        assert!(suspect(&record, TargetId(8)).is_err());
        let suspected = suspect(&record, OWNER).unwrap();
        assert!(suspected.restored);
        assert!(trust(&suspected, TargetId(8)).is_err());
        assert_eq!(trust(&suspected, OWNER).unwrap(), record);
    }

    #[test]
    fn r26_a_promoted_replica_is_the_only_one_left_under_a_new_lineage_and_generation() {
        let record = mk_owned(3);
        let left = swap_out(&record, OWNER, &[ReplicaId(2), ReplicaId(3)], 1).unwrap();
        assert!(matches!(
            promote(&left, ReplicaId(2), Lineage(10), 2),
            Err(TransitionError::Published { .. })
        ));
        let bare = unpublish(&left, None).unwrap();
        assert_eq!(
            promote(&bare, ReplicaId(2), bare.lineage, 2),
            Err(TransitionError::LineageUsed(VolumeId(1)))
        );
        assert!(promote(&bare, ReplicaId(1), Lineage(10), 2).is_err(), "a member has no need of it");
        assert!(promote(&bare, ReplicaId(9), Lineage(10), 2).is_err());
        let promoted = promote(&bare, ReplicaId(2), Lineage(10), 2).unwrap();
        assert_eq!(promoted.in_sync, BTreeSet::from([ReplicaId(2)]));
        for lost in [1, 3] {
            assert_eq!(promoted.replicas[&ReplicaId(lost)].state, ReplicaState::Faulted);
        }
        assert_eq!(promoted.epoch, Epoch { number: left.epoch.number + 1, nonce: 2 });
        assert_eq!(promoted.promoted, Some(Promotion { replica: ReplicaId(2), from: left.lineage }));
        assert!(swap_out(&promoted, OWNER, &[ReplicaId(2)], 3).is_err(), "the old target owns nothing");
        assert!(promoted.generation > left.generation);
        let node = NodeName("n2".to_owned());
        assert!(publish(&promoted, &node, false).unwrap().attachment > record.attachment);
        assert!(promote(&promoted, ReplicaId(1), Lineage(11), 3).is_err(), "what is given up stays so");
    }

    #[test]
    fn r26_snapshots_that_only_lost_replicas_hold_are_gone() {
        let record = mk_owned(2);
        let cut = |record: &VolumeRecord, id: u128, holders: &[u128]| {
            let snapshot = SnapshotId(id);
            let cutting = begin_cut(record, OWNER, snapshot).unwrap();
            let holders = holders.iter().map(|id| ReplicaId(*id)).collect();
            commit_cut(&cutting, OWNER, snapshot, &holders).unwrap()
        };
        let record = cut(&record, 70, &[1]);
        let record = add_holder(&record, OWNER, SnapshotId(70), ReplicaId(2)).unwrap();
        let record = swap_out(&cut(&record, 71, &[1]), OWNER, &[ReplicaId(2)], 1).unwrap();
        let mut record = begin_cut(&record, OWNER, SnapshotId(72)).unwrap();
        for id in 70..=73 {
            let request = RequestedSnapshot {
                id: SnapshotId(id),
                name: id.to_string(),
                asked_unix_ms: 1,
                for_clone: None,
            };
            record.requested.push(request);
        }
        let promoted = promote(&unpublish(&record, None).unwrap(), ReplicaId(2), Lineage(10), 2).unwrap();
        let names: Vec<&str> = promoted.requested.iter().map(|request| request.name.as_str()).collect();
        assert_eq!(names, ["70", "73"], "no name brings an id back that belonged to another instant (R34)");
        let left: Vec<_> = promoted.snapshots.iter().map(|s| (s.id, s.holders.clone())).collect();
        assert_eq!(left, [(SnapshotId(70), BTreeSet::from([ReplicaId(2)]))]);
    }

    #[test]
    fn r35_of_a_restored_volume_any_replica_that_was_not_given_up_can_be_chosen() {
        let record = suspect(&mk_owned(2), OWNER).unwrap();
        let bare = unpublish(&record, None).unwrap();
        let promoted = promote(&bare, ReplicaId(1), Lineage(10), 2).unwrap();
        assert!(!promoted.restored);
        assert_eq!(promoted.replicas[&ReplicaId(2)].state, ReplicaState::Faulted);
        assert!(promote(&mk_record(2), ReplicaId(1), Lineage(10), 2).is_err());
    }
}
