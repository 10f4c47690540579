//! Snapshots, clones and growth in the record (R27 to R31).
//!
//! ```text
//!             begin_cut              commit_cut
//!  (absent) ───────────> cutting(g) ───────────> committed ──> (absent)   delete, while it has no clone
//!      ^                     │
//!      └─────────────────────┘ abandon_cut, or begin_cut of another snapshot by a later generation
//! ```

use std::collections::BTreeSet;

use crate::ids::{REGION_BYTES, ReplicaId, SnapshotId, TargetId, VolumeId};
use crate::record::{Formatted, RECORD_FORMAT, SNAPSHOTS_MAX, SnapshotRecord, SnapshotState, VolumeRecord};

use super::{TransitionError, check_live, check_owner, wrong_state};

/// The first step of a cut (R27). What earlier generations left half cut is forgotten: their layers are nothing.
pub fn begin_cut(
    record: &VolumeRecord,
    owner: TargetId,
    snapshot: SnapshotId,
) -> Result<VolumeRecord, TransitionError> {
    check_live(record)?;
    check_owner(record, owner)?;
    if record.snapshot(snapshot).is_some_and(|s| s.state == SnapshotState::Committed) {
        return Err(wrong_snapshot(record, snapshot, "new"));
    }
    let mut next = record.clone();
    next.format = RECORD_FORMAT;
    next.snapshots.retain(|other| other.state == SnapshotState::Committed);
    if next.snapshots.len() >= SNAPSHOTS_MAX {
        return Err(TransitionError::SnapshotsFull(record.volume_id));
    }
    next.snapshots.push(SnapshotRecord {
        id: snapshot,
        state: SnapshotState::Cutting { generation: record.generation },
        size_bytes: record.size_bytes,
        holders: BTreeSet::new(),
        clones: BTreeSet::new(),
        formatted: record.formatted,
    });
    Ok(next)
}

/// The last step of a cut: from here on the snapshot counts. `holders` froze it inside one lock of everything.
pub fn commit_cut(
    record: &VolumeRecord,
    owner: TargetId,
    snapshot: SnapshotId,
    holders: &BTreeSet<ReplicaId>,
) -> Result<VolumeRecord, TransitionError> {
    check_owner(record, owner)?;
    let known = |replica: &ReplicaId| record.replicas.contains_key(replica);
    let holders: BTreeSet<ReplicaId> = holders.iter().copied().filter(known).collect();
    let ours = SnapshotState::Cutting { generation: record.generation };
    let mut next = record.clone();
    match next.snapshots.iter_mut().find(|s| s.id == snapshot && s.state == ours) {
        Some(entry) if !holders.is_empty() => {
            entry.state = SnapshotState::Committed;
            entry.holders = holders;
            // It moved on during the cut, so nobody knows what the layer has: mkfs is forbidden there.
            if entry.formatted != record.formatted {
                entry.formatted = Formatted::Yes;
            }
        }
        _ => return Err(wrong_snapshot(record, snapshot, "being cut by this target")),
    }
    Ok(next)
}

/// Gives a cut up. Not there: unchanged.
pub fn abandon_cut(
    record: &VolumeRecord,
    owner: TargetId,
    snapshot: SnapshotId,
) -> Result<VolumeRecord, TransitionError> {
    check_owner(record, owner)?;
    let mut next = record.clone();
    next.snapshots.retain(|s| s.id != snapshot || s.state == SnapshotState::Committed);
    Ok(next)
}

/// Forgets a snapshot, before any holder drops its layer: a holder that is away drops it when it returns (R28). Refused
/// while it has clones (R30). Not there: unchanged.
pub fn delete_snapshot(
    record: &VolumeRecord,
    owner: TargetId,
    snapshot: SnapshotId,
) -> Result<VolumeRecord, TransitionError> {
    check_owner(record, owner)?;
    if let Some(entry) = record.snapshot(snapshot).filter(|s| !s.clones.is_empty()) {
        let clones = entry.clones.len();
        return Err(TransitionError::SnapshotInUse { volume: record.volume_id, snapshot, clones });
    }
    let mut next = record.clone();
    next.snapshots.retain(|s| s.id != snapshot);
    Ok(next)
}

/// A returning replica rebuilt a snapshot's layer (R28).
pub fn add_holder(
    record: &VolumeRecord,
    owner: TargetId,
    snapshot: SnapshotId,
    replica: ReplicaId,
) -> Result<VolumeRecord, TransitionError> {
    check_owner(record, owner)?;
    if !record.replicas.contains_key(&replica) {
        return Err(wrong_state(record, replica, "known"));
    }
    let mut next = record.clone();
    let entry = next.snapshots.iter_mut().find(|s| s.id == snapshot && s.state == SnapshotState::Committed);
    entry.ok_or_else(|| wrong_snapshot(record, snapshot, "committed"))?.holders.insert(replica);
    Ok(next)
}

/// Names a volume that is going to be made from the snapshot, before anything of it is made: from here on the snapshot
/// cannot be deleted (R30). By whoever makes the clone, not by the target: the set and the layers stay as they are.
/// Repeating it is a success.
pub fn add_clone(
    record: &VolumeRecord,
    snapshot: SnapshotId,
    clone: VolumeId,
) -> Result<VolumeRecord, TransitionError> {
    check_live(record)?;
    let mut next = record.clone();
    let entry = next.snapshots.iter_mut().find(|s| s.id == snapshot && s.state == SnapshotState::Committed);
    entry.ok_or_else(|| wrong_snapshot(record, snapshot, "committed"))?.clones.insert(clone);
    Ok(next)
}

/// The clone is gone, or has layers of its own only. Not there: unchanged.
pub fn remove_clone(
    record: &VolumeRecord,
    snapshot: SnapshotId,
    clone: VolumeId,
) -> Result<VolumeRecord, TransitionError> {
    super::check_format(record)?;
    let mut next = record.clone();
    for entry in next.snapshots.iter_mut().filter(|s| s.id == snapshot) {
        entry.clones.remove(&clone);
    }
    Ok(next)
}

/// Makes the volume larger, once every member is (R31). The size it has is a success.
pub fn grow(
    record: &VolumeRecord,
    owner: TargetId,
    size_bytes: u64,
) -> Result<VolumeRecord, TransitionError> {
    check_live(record)?;
    check_owner(record, owner)?;
    check_growth(record, size_bytes)?;
    let mut next = record.clone();
    next.size_bytes = size_bytes;
    Ok(next)
}

/// Whether the volume may be made this large.
pub fn check_growth(record: &VolumeRecord, size_bytes: u64) -> Result<(), TransitionError> {
    if size_bytes >= record.size_bytes && size_bytes.is_multiple_of(REGION_BYTES) {
        return Ok(());
    }
    let (volume, from_bytes) = (record.volume_id, record.size_bytes);
    Err(TransitionError::Size { volume, from_bytes, to_bytes: size_bytes })
}

fn wrong_snapshot(record: &VolumeRecord, snapshot: SnapshotId, expected: &'static str) -> TransitionError {
    TransitionError::SnapshotState { volume: record.volume_id, snapshot, expected }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Attachment, Generation, NodeName};
    use crate::transitions::tests::mk_owned;
    use crate::transitions::{
        join, set_formatted, swap_out, take_detached_generation, take_generation, unpublish,
    };

    const OWNER: TargetId = TargetId(7);
    const ONE: SnapshotId = SnapshotId(1);

    fn mk_holders(replicas: &[u128]) -> BTreeSet<ReplicaId> {
        replicas.iter().map(|n| ReplicaId(*n)).collect()
    }

    fn mk_cut(record: &VolumeRecord, snapshot: SnapshotId, holders: &[u128]) -> VolumeRecord {
        let cutting = begin_cut(record, OWNER, snapshot).unwrap();
        commit_cut(&cutting, OWNER, snapshot, &mk_holders(holders)).unwrap()
    }

    #[test]
    fn r27_a_snapshot_counts_from_its_commit_on_and_only_by_the_generation_that_cut_it() {
        let record = mk_owned(3);
        let cutting = begin_cut(&record, OWNER, ONE).unwrap();
        assert_eq!(cutting.committed().count(), 0);
        assert_eq!(cutting.held_by(ReplicaId(1)), BTreeSet::new());
        let node = NodeName("n1".to_owned());
        let later = take_generation(&cutting, &node, Attachment(1), TargetId(8)).unwrap();
        let holders = mk_holders(&[1, 2]);
        assert!(matches!(
            commit_cut(&later, OWNER, ONE, &holders),
            Err(TransitionError::GenerationMoved { .. })
        ));
        assert!(matches!(
            commit_cut(&later, TargetId(8), ONE, &holders),
            Err(TransitionError::SnapshotState { .. })
        ));
        let again = begin_cut(&later, TargetId(8), ONE).unwrap();
        assert_eq!(again.snapshots.len(), 1);
        let committed = commit_cut(&again, TargetId(8), ONE, &holders).unwrap();
        assert_eq!(committed.held_by(ReplicaId(2)), BTreeSet::from([ONE]));
        assert_eq!(committed.held_by(ReplicaId(3)), BTreeSet::new());
        assert!(begin_cut(&committed, TargetId(8), ONE).is_err());
        assert!(commit_cut(&again, TargetId(8), ONE, &BTreeSet::new()).is_err(), "nobody holds it");
    }

    #[test]
    fn r27_what_an_earlier_generation_left_half_cut_is_forgotten_by_the_next_cut() {
        let stale = begin_cut(&mk_owned(2), OWNER, ONE).unwrap();
        let next = begin_cut(&stale, OWNER, SnapshotId(2)).unwrap();
        let ids: Vec<SnapshotId> = next.snapshots.iter().map(|s| s.id).collect();
        assert_eq!(ids, [SnapshotId(2)]);
        assert_eq!(abandon_cut(&next, OWNER, SnapshotId(2)).unwrap().snapshots, []);
    }

    #[test]
    fn r28_a_replica_joins_only_with_all_snapshots() {
        let record = mk_owned(2);
        let left = swap_out(&record, OWNER, &[ReplicaId(2)], 1).unwrap();
        let cut = mk_cut(&left, ONE, &[1]);
        assert!(matches!(join(&cut, OWNER, ReplicaId(2), 2), Err(TransitionError::SnapshotMissing { .. })));
        let rebuilt = add_holder(&cut, OWNER, ONE, ReplicaId(2)).unwrap();
        assert_eq!(join(&rebuilt, OWNER, ReplicaId(2), 2).unwrap().in_sync, record.in_sync);
        assert!(add_holder(&left, OWNER, ONE, ReplicaId(2)).is_err());
    }

    #[test]
    fn r30_a_snapshot_with_a_clone_is_not_deleted() {
        let cut = mk_cut(&mk_owned(2), ONE, &[1, 2]);
        let cloned = add_clone(&cut, ONE, VolumeId(5)).unwrap();
        let refused = delete_snapshot(&cloned, OWNER, ONE).unwrap_err();
        assert!(refused.to_string().contains("1 clones"), "{refused}");
        let freed = remove_clone(&cloned, ONE, VolumeId(5)).unwrap();
        let gone = delete_snapshot(&freed, OWNER, ONE).unwrap();
        assert_eq!(gone.snapshots, []);
        assert_eq!(delete_snapshot(&gone, OWNER, ONE).as_ref(), Ok(&gone));
        assert!(add_clone(&gone, ONE, VolumeId(6)).is_err(), "a clone of what is deleted");
    }

    #[test]
    fn r31_a_volume_grows_by_whole_regions_and_never_shrinks() {
        let record = mk_owned(1);
        assert_eq!(grow(&record, OWNER, 3 << 20).unwrap().size_bytes, 3 << 20);
        assert_eq!(grow(&record, OWNER, 1 << 20).as_ref(), Ok(&record));
        for size_bytes in [0, (1 << 20) + 4096, 1] {
            assert!(matches!(grow(&record, OWNER, size_bytes), Err(TransitionError::Size { .. })));
        }
    }

    #[test]
    fn r36_a_snapshot_remembers_how_far_formatting_was_and_forbids_mkfs_where_nobody_knows() {
        let record = mk_owned(1);
        let state = |cut: &VolumeRecord| cut.snapshot(ONE).map(|s| s.formatted);
        assert_eq!(state(&mk_cut(&record, ONE, &[1])), Some(Formatted::Never));
        let cutting = begin_cut(&record, OWNER, ONE).unwrap();
        let moved = set_formatted(&cutting, Formatted::Formatting).unwrap();
        let committed = commit_cut(&moved, OWNER, ONE, &mk_holders(&[1])).unwrap();
        assert_eq!(state(&committed), Some(Formatted::Yes));
        let yes = set_formatted(&moved, Formatted::Yes).unwrap();
        assert_eq!(state(&mk_cut(&yes, ONE, &[1])), Some(Formatted::Yes));
    }

    #[test]
    fn r7_work_on_a_detached_volume_takes_a_generation() {
        let record = mk_owned(1);
        assert!(matches!(take_detached_generation(&record, OWNER), Err(TransitionError::Published { .. })));
        let detached = unpublish(&record, None).unwrap();
        let taken = take_detached_generation(&detached, TargetId(9)).unwrap();
        assert_eq!((taken.generation, taken.target_id), (Generation(2), Some(TargetId(9))));
        assert_eq!((taken.attachment, taken.generation_attachment), (Attachment(1), Attachment(1)));
    }

    #[test]
    fn the_number_of_snapshots_is_bounded() {
        let mut record = mk_owned(1);
        for id in 0..SNAPSHOTS_MAX as u128 {
            record = mk_cut(&record, SnapshotId(id + 10), &[1]);
        }
        assert_eq!(begin_cut(&record, OWNER, ONE), Err(TransitionError::SnapshotsFull(record.volume_id)));
    }

    #[test]
    fn a_record_of_format_1_is_read_and_becomes_one_of_today_with_its_first_snapshot() {
        let mut old = mk_owned(1);
        old.format = 1;
        let mut json = serde_json::to_value(&old).unwrap();
        assert!(json.as_object_mut().unwrap().get("snapshots").is_none());
        let read: VolumeRecord = serde_json::from_value(json).unwrap();
        assert_eq!(read, old);
        assert_eq!(mk_cut(&read, ONE, &[1]).format, RECORD_FORMAT);
    }
}
