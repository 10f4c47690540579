//! What callers asked for, kept in the record so that a repeated call finds it: snapshots by name, volumes made from one,
//! and a volume that is deleted before its snapshots.
//!
//! These are the controller's changes. None of them touches the in-sync set or the layers.

use crate::ids::{SnapshotId, VolumeId};
use crate::record::{
    CloneSource, RECORD_FORMAT, REQUESTED_MAX, RequestedSnapshot, SnapshotState, VolumeRecord,
};

use super::{TransitionError, check_format, check_live};

/// Notes that a snapshot is asked for, before its cut. One that is noted under the same id is replaced, which moves its
/// time, but not once it is committed: then the time is that of the try that succeeded. Where no further one fits, the oldest
/// that was never cut is forgotten.
pub fn request_snapshot(
    record: &VolumeRecord,
    request: RequestedSnapshot,
) -> Result<VolumeRecord, TransitionError> {
    check_live(record)?;
    if record.retired {
        return Err(TransitionError::Retired(record.volume_id));
    }
    let committed = |id| record.snapshot(id).is_some_and(|s| s.state == SnapshotState::Committed);
    if committed(request.id) && record.request(request.id).is_some() {
        return Ok(record.clone());
    }
    let mut next = record.clone();
    next.format = RECORD_FORMAT;
    next.requested.retain(|other| other.id != request.id);
    if next.requested.len() >= REQUESTED_MAX {
        let uncut = next.requested.iter().enumerate().filter(|(_, r)| record.snapshot(r.id).is_none());
        let oldest = uncut.min_by_key(|(_, request)| request.asked_unix_ms).map(|(index, _)| index);
        let index = oldest.ok_or(TransitionError::RequestsFull(record.volume_id))?;
        next.requested.remove(index);
    }
    next.requested.push(request);
    Ok(next)
}

/// The snapshot is gone, or nobody wants it any more. Not there: unchanged.
pub fn forget_request(record: &VolumeRecord, snapshot: SnapshotId) -> Result<VolumeRecord, TransitionError> {
    check_format(record)?;
    let mut next = record.clone();
    next.requested.retain(|request| request.id != snapshot);
    Ok(next)
}

/// Deletes a volume for its users and keeps its snapshots. A published volume is not deleted; a second call is a success.
pub fn retire(record: &VolumeRecord) -> Result<VolumeRecord, TransitionError> {
    check_live(record)?;
    if let Some(node) = &record.attached_to {
        return Err(TransitionError::PublishedElsewhere { volume: record.volume_id, node: node.clone() });
    }
    Ok(VolumeRecord { format: RECORD_FORMAT, retired: true, ..record.clone() })
}

/// All replicas of a volume that is made from a snapshot are there. Repeating it is a success.
pub fn link_source(record: &VolumeRecord) -> Result<VolumeRecord, TransitionError> {
    check_live(record)?;
    let source = record.source.clone().map(|source| CloneSource { linked: true, ..source });
    Ok(VolumeRecord { source, ..record.clone() })
}

/// The snapshots that were cut only as the beginning of a volume, by that volume.
pub fn cut_for_clones(record: &VolumeRecord) -> impl Iterator<Item = (SnapshotId, VolumeId)> {
    record.requested.iter().filter_map(|request| request.for_clone.map(|clone| (request.id, clone)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{NodeName, TargetId};
    use crate::record::Formatted;
    use crate::transitions::tests::{mk_owned, mk_record};
    use crate::transitions::{begin_cut, begin_delete, commit_cut, publish, unpublish};

    const OWNER: TargetId = TargetId(7);

    fn mk_request(id: u128, asked_unix_ms: u64) -> RequestedSnapshot {
        RequestedSnapshot { id: SnapshotId(id), name: format!("s{id}"), asked_unix_ms, for_clone: None }
    }

    fn mk_committed(record: &VolumeRecord, id: u128) -> VolumeRecord {
        let cutting = begin_cut(record, OWNER, SnapshotId(id)).unwrap();
        commit_cut(&cutting, OWNER, SnapshotId(id), &record.in_sync).unwrap()
    }

    #[test]
    fn the_time_of_a_snapshot_is_that_of_the_try_that_cut_it() {
        let first = request_snapshot(&mk_owned(1), mk_request(1, 100)).unwrap();
        let second = request_snapshot(&first, mk_request(1, 200)).unwrap();
        assert_eq!(second.requested, [mk_request(1, 200)]);
        let cut = mk_committed(&second, 1);
        assert_eq!(request_snapshot(&cut, mk_request(1, 300)).as_ref(), Ok(&cut));
    }

    #[test]
    fn requests_that_were_never_cut_make_room_oldest_first_and_cut_ones_never() {
        let mut record = mk_committed(&request_snapshot(&mk_owned(1), mk_request(0, 1)).unwrap(), 0);
        for id in 1..REQUESTED_MAX as u128 {
            record = request_snapshot(&record, mk_request(id, 1000 - id as u64)).unwrap();
        }
        let more = request_snapshot(&record, mk_request(5000, 2000)).unwrap();
        assert_eq!(more.requested.len(), REQUESTED_MAX);
        assert!(more.request(SnapshotId(0)).is_some());
        assert!(more.request(SnapshotId(REQUESTED_MAX as u128 - 1)).is_none(), "the oldest");
        let mut full = record.clone();
        full.snapshots = (0..REQUESTED_MAX as u128)
            .map(|id| crate::record::SnapshotRecord { id: SnapshotId(id), ..record.snapshots[0].clone() })
            .collect();
        let refused = request_snapshot(&full, mk_request(5000, 1)).unwrap_err();
        assert_eq!(refused, TransitionError::RequestsFull(full.volume_id));
    }

    #[test]
    fn a_retired_volume_frees_its_name_is_never_published_and_gets_no_further_snapshot() {
        let node = NodeName("n1".to_owned());
        let published = publish(&mk_record(1), &node, false).unwrap();
        assert!(matches!(retire(&published), Err(TransitionError::PublishedElsewhere { .. })));
        let retired = retire(&unpublish(&published, None).unwrap()).unwrap();
        assert!(retired.is_gone());
        assert_eq!(retire(&retired).as_ref(), Ok(&retired));
        assert_eq!(publish(&retired, &node, false), Err(TransitionError::Retired(retired.volume_id)));
        assert!(request_snapshot(&retired, mk_request(1, 1)).is_err());
    }

    #[test]
    fn no_tombstone_takes_a_snapshot_along() {
        let cut = unpublish(&mk_committed(&mk_owned(1), 1), None).unwrap();
        let refused = begin_delete(&cut).unwrap_err();
        assert_eq!(refused, TransitionError::HasSnapshots { volume: cut.volume_id, snapshots: 1 });
        assert!(begin_delete(&retire(&cut).unwrap()).is_err());
        let bare = VolumeRecord { snapshots: Vec::new(), ..cut };
        assert!(begin_delete(&bare).unwrap().deleting);
    }

    #[test]
    fn a_clone_knows_its_source_until_it_has_links_of_its_own() {
        let source =
            CloneSource { volume: VolumeId(5), snapshot: SnapshotId(6), of_volume: true, linked: false };
        let mut record = mk_record(1);
        record.source = Some(source.clone());
        record.formatted = Formatted::Yes;
        let linked = link_source(&record).unwrap();
        assert_eq!(linked.source, Some(CloneSource { linked: true, ..source }));
        assert_eq!(link_source(&linked).as_ref(), Ok(&linked));
    }
}
